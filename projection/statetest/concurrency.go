package statetest

import (
	"errors"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/projection"
)

func needConcurrency(f Features) string {
	if f.ConcurrentUpdates {
		return ""
	}
	return "concurrent updates"
}

var concurrencyChecks = []check{
	{
		name: "Declared",
		rule: "whether other processes can use the state is said by its Shared method, as it is declared: whoever runs background work goes by it",
		run: func(t testing.TB, s *suite) {
			require.Equal(t, s.features.Shared, projection.Shared(s.open(t)), "projection.Shared of the state, and Features.Shared")
		},
	},
	{
		name: "Serialised",
		rule: "updates run one after another, each seeing all earlier ones: a read-modify-write is never lost; where Features.ConcurrentUpdates is declared that holds for updates that were fenced by one lease before they read",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			increment := func(hold func()) error {
				return state.Update(ctx, func(tx projection.StateTx) error {
					if err := s.turn(tx, lease); err != nil {
						return err
					}
					v, _, err := tx.Get("t", "n")
					if err != nil {
						return err
					}
					n, _ := strconv.Atoi(string(v))
					hold()
					return tx.Put("t", "n", []byte(strconv.Itoa(n+1)))
				})
			}
			// One update has read and not yet written while another one wants to run.
			read, second := make(chan struct{}), make(chan struct{})
			results := make(chan error, 2)
			go func() {
				results <- increment(func() {
					close(read)
					s.afterOrSoon(second)
				})
			}()
			<-read
			go func() {
				err := increment(func() {})
				close(second)
				results <- err
			}()
			require.NoError(t, <-results)
			require.NoError(t, <-results)
			require.Equal(t, "2", value(t, ctx, state, "t", "n"), "an update was lost: two ran at the same time")

			var group sync.WaitGroup
			failed := make(chan error, 8)
			for range 8 {
				group.Go(func() {
					for range 25 {
						if err := increment(runtime.Gosched); err != nil {
							failed <- err
							return
						}
					}
				})
			}
			group.Wait()
			close(failed)
			require.NoError(t, <-failed)
			require.Equal(t, "202", value(t, ctx, state, "t", "n"), "an update was lost")
		},
	},
	{
		name:  "SetCheckpointFences",
		rule:  "SetCheckpoint fences as Fence does: what an update reads after it is not changed by another one that the lease has fenced, and the later one of two that go on from the same checkpoint is ErrFenced",
		needs: needConcurrency,
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			inside, second := make(chan struct{}), make(chan struct{})
			results := make(chan error, 2)
			go func() {
				results <- state.Update(ctx, func(tx projection.StateTx) error {
					if err := tx.SetCheckpoint(lease, projection.Checkpoint{}, at(1)); err != nil {
						return err
					}
					close(inside)
					s.afterOrSoon(second)
					return tx.Put("t", "by", []byte("the first"))
				})
			}()
			<-inside
			go func() {
				defer close(second)
				results <- state.Update(ctx, func(tx projection.StateTx) error {
					if err := tx.Put("t", "by", []byte("the second")); err != nil {
						return err
					}
					return tx.SetCheckpoint(lease, projection.Checkpoint{}, at(2))
				})
			}()
			failed := errors.Join(<-results, <-results)
			require.ErrorIs(t, failed, projection.ErrFenced, "two updates moved the checkpoint from the same place")
			require.Equal(t, "the first", value(t, ctx, state, "t", "by"))
			require.EqualValues(t, 1, checkpoint(t, ctx, state, "w").Position)
		},
	},
	{
		name:  "Independent",
		rule:  "updates that different leases have fenced do not wait for one another, nor does one that is not fenced: a projection's long update holds up no other",
		needs: needConcurrency,
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			a, b := mustAcquire(t, ctx, state, "a", "me", 0), mustAcquire(t, ctx, state, "b", "me", time.Hour)
			put(t, ctx, state, "t", "a", "0")
			put(t, ctx, state, "rows", "a", "0")
			inside, goOn, first := make(chan struct{}), make(chan struct{}), make(chan error, 1)
			release := sync.OnceFunc(func() { close(goOn) })
			defer release()
			go func() {
				first <- state.Update(ctx, func(tx projection.StateTx) error {
					if err := errors.Join(tx.Fence(a), tx.Put("t", "a", []byte("1"))); err != nil {
						return err
					}
					close(inside)
					<-goOn
					return tx.Put("t", "a", []byte("2"))
				})
			}()
			<-inside
			other := move(ctx, state, b, projection.Checkpoint{}, at(1), "b's")
			free := state.Update(ctx, func(tx projection.StateTx) error { return tx.Put("t", "b", []byte("free")) })
			release()
			require.NoError(t, other, "an update waits for one that another lease has fenced")
			require.NoError(t, free, "an update that is not fenced waits for one that is")
			require.NoError(t, <-first)
			require.Equal(t, "2", value(t, ctx, state, "t", "a"))
			require.Equal(t, "free", value(t, ctx, state, "t", "b"))
			require.Equal(t, "b's", value(t, ctx, state, "rows", "b"))
		},
	},
}
