package statetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

func at(p eventstore.Position) projection.Checkpoint {
	return projection.Checkpoint{Log: "log", Position: p}
}

// move is an update that moves the checkpoint and writes a row beside it.
func move(ctx context.Context, state State, lease projection.Lease, from, to projection.Checkpoint, row string) error {
	return state.Update(ctx, func(tx projection.StateTx) error {
		if err := tx.Put("rows", lease.Name, []byte(row)); err != nil {
			return err
		}
		return tx.SetCheckpoint(lease, from, to)
	})
}

var checkpointChecks = []check{
	{
		name: "CompareAndSet",
		rule: "a checkpoint moves only from what it was read as: another log or position is ErrFenced, and the rows of that transaction are gone; the epoch of from is not compared, that of the result is the lease's",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			require.True(t, checkpoint(t, ctx, state, "w").IsZero(), "no checkpoint is the zero checkpoint")
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			require.NoError(t, move(ctx, state, lease, projection.Checkpoint{}, at(5), "five"))
			for name, from := range map[string]projection.Checkpoint{
				"none": {}, "an older position": at(4), "a newer position": at(6), "another log": {Log: "other", Position: 5}, "no log": {Position: 5},
			} {
				require.ErrorIs(t, move(ctx, state, lease, from, at(9), "wrong"), projection.ErrFenced, "from %s", name)
			}
			require.Equal(t, projection.Checkpoint{Log: "log", Epoch: lease.Epoch, Position: 5}, checkpoint(t, ctx, state, "w"))
			require.Equal(t, "five", value(t, ctx, state, "rows", "w"), "rows of a transaction that was fenced must not remain")
			require.NoError(t, move(ctx, state, lease, projection.Checkpoint{Log: "log", Epoch: 99, Position: 5}, projection.Checkpoint{Log: "log", Epoch: 77, Position: 6}, "six"), "epochs are not compared")
			require.Equal(t, lease.Epoch, checkpoint(t, ctx, state, "w").Epoch, "the epoch of a checkpoint is that of the lease")
			require.NoError(t, move(ctx, state, lease, at(6), at(2), "back"), "a rebuild moves a checkpoint back")
			require.NoError(t, move(ctx, state, lease, at(2), projection.Checkpoint{Log: "restored", Position: 1}, "other log"))
		},
	},
	{
		name: "OnePerName",
		rule: "checkpoints of different names are independent",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			a, b := mustAcquire(t, ctx, state, "a", "me", 0), mustAcquire(t, ctx, state, "b", "me", 0)
			require.NoError(t, move(ctx, state, a, projection.Checkpoint{}, at(1), "a"))
			require.NoError(t, move(ctx, state, b, projection.Checkpoint{}, at(2), "b"))
			require.Equal(t, eventstore.Position(1), checkpoint(t, ctx, state, "a").Position)
			require.Equal(t, eventstore.Position(2), checkpoint(t, ctx, state, "b").Position)
		},
	},
	{
		name: "Delete",
		rule: "DeleteCheckpoint forgets the checkpoint named like the lease, for its current owner only; one that is not there is no error",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			old := mustAcquire(t, ctx, state, "w", "me", 0)
			other := mustAcquire(t, ctx, state, "x", "me", 0)
			require.NoError(t, move(ctx, state, old, projection.Checkpoint{}, at(5), "five"))
			require.NoError(t, move(ctx, state, other, projection.Checkpoint{}, at(6), "six"))
			current := mustAcquire(t, ctx, state, "w", "me", 0)
			forget := func(l projection.Lease) error {
				return state.Update(ctx, func(tx projection.StateTx) error { return tx.DeleteCheckpoint(l) })
			}
			require.ErrorIs(t, forget(old), projection.ErrFenced)
			require.Equal(t, eventstore.Position(5), checkpoint(t, ctx, state, "w").Position)
			require.NoError(t, forget(current))
			require.True(t, checkpoint(t, ctx, state, "w").IsZero())
			require.NoError(t, forget(current), "forgetting again")
			require.Equal(t, eventstore.Position(6), checkpoint(t, ctx, state, "x").Position, "other names keep theirs")
			require.NoError(t, move(ctx, state, current, projection.Checkpoint{}, at(1), "one"))
		},
	},
	{
		name: "Fence",
		rule: "Fence fails with ErrFenced once anybody has acquired the lease again, and for a lease that was never given; it may be called again, and before the checkpoint is moved",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			fence := func(l projection.Lease) error {
				return state.Update(ctx, func(tx projection.StateTx) error { return tx.Fence(l) })
			}
			require.ErrorIs(t, fence(projection.Lease{Name: "w", Owner: "me"}), projection.ErrFenced, "a lease that was never acquired")
			first := mustAcquire(t, ctx, state, "w", "me", 0)
			require.NoError(t, fence(first))
			second := mustAcquire(t, ctx, state, "w", "me", 0)
			require.ErrorIs(t, fence(first), projection.ErrFenced)
			require.NoError(t, fence(second))
			require.ErrorIs(t, fence(projection.Lease{Name: "w", Owner: "me", Epoch: second.Epoch + 1}), projection.ErrFenced, "an epoch from the future")
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				return errors.Join(tx.Fence(second), tx.Fence(second), tx.SetCheckpoint(second, projection.Checkpoint{}, at(1)), tx.Fence(second))
			})
			require.EqualValues(t, 1, checkpoint(t, ctx, state, "w").Position)
		},
	},
}

var leaseChecks = []check{
	{
		name: "HeldByOne",
		rule: "while an owner's lease runs nobody else gets it: ErrLeaseHeld; leases of other names are free",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			for name, ttl := range map[string]time.Duration{"for an hour": time.Hour, "until released": 0} {
				l := mustAcquire(t, ctx, state, name, "a", ttl)
				require.Equal(t, name, l.Name)
				require.Equal(t, "a", l.Owner)
				require.Equal(t, ttl == 0, l.Until.IsZero(), "Until is zero exactly when the lease does not end by time")
				for range 3 {
					_, err := state.Acquire(ctx, name, "b", ttl)
					require.ErrorIs(t, err, projection.ErrLeaseHeld)
				}
				require.NoError(t, state.Update(ctx, func(tx projection.StateTx) error { return tx.Fence(l) }), "an attempt that failed fences nobody")
				mustAcquire(t, ctx, state, name+" too", "b", ttl)
			}
		},
	},
	{
		name: "EpochRises",
		rule: "every Acquire raises the epoch by one, the owner's own too, which fences its earlier self; Release keeps the epoch",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			first := mustAcquire(t, ctx, state, "w", "a", time.Hour)
			require.NotZero(t, first.Epoch)
			second := mustAcquire(t, ctx, state, "w", "a", time.Hour)
			require.Equal(t, first.Epoch+1, second.Epoch)
			require.ErrorIs(t, move(ctx, state, first, projection.Checkpoint{}, at(1), "x"), projection.ErrFenced, "an owner that acquired again fences its earlier self")
			require.NoError(t, state.Release(ctx, second))
			third := mustAcquire(t, ctx, state, "w", "b", time.Hour)
			require.Equal(t, second.Epoch+1, third.Epoch, "the epoch is kept after Release")
			require.ErrorIs(t, move(ctx, state, second, projection.Checkpoint{}, at(1), "x"), projection.ErrFenced)
			require.NoError(t, move(ctx, state, third, projection.Checkpoint{}, at(1), "x"))
		},
	},
	{
		name: "EndsByTime",
		rule: "a lease that was not renewed can be taken over once its time is up; its former owner is fenced then",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			first := mustAcquire(t, ctx, state, "w", "a", time.Second)
			var second projection.Lease
			for {
				var err error
				if second, err = state.Acquire(ctx, "w", "b", time.Hour); err == nil {
					break
				}
				require.ErrorIs(t, err, projection.ErrLeaseHeld)
				require.NoError(t, ctx.Err(), "the lease never ended")
				time.Sleep(10 * time.Millisecond)
			}
			require.False(t, time.Now().Before(first.Until.Add(-50*time.Millisecond)), "the lease was taken over before its time was up")
			require.Equal(t, first.Epoch+1, second.Epoch)
			require.ErrorIs(t, move(ctx, state, first, projection.Checkpoint{}, at(1), "x"), projection.ErrFenced)
			_, err := state.Renew(ctx, first, time.Hour)
			require.ErrorIs(t, err, projection.ErrFenced)
		},
	},
	{
		name: "Renew",
		rule: "Renew extends the lease and keeps its epoch; it is ErrFenced for whoever is no longer the owner, also for an earlier self",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			first := mustAcquire(t, ctx, state, "w", "a", time.Minute)
			renewed, err := state.Renew(ctx, first, time.Hour)
			require.NoError(t, err)
			require.Equal(t, first.Epoch, renewed.Epoch)
			require.Equal(t, first.Owner, renewed.Owner)
			require.True(t, renewed.Until.After(first.Until), "Renew extends: from %s to %s", first.Until, renewed.Until)
			require.NoError(t, move(ctx, state, first, projection.Checkpoint{}, at(1), "x"), "the epoch is the same, so the older copy is as good")
			second := mustAcquire(t, ctx, state, "w", "a", time.Minute)
			_, err = state.Renew(ctx, renewed, time.Hour)
			require.ErrorIs(t, err, projection.ErrFenced, "acquired again since")
			forever, err := state.Renew(ctx, second, 0)
			require.NoError(t, err)
			require.True(t, forever.Until.IsZero())
			_, err = state.Acquire(ctx, "w", "b", time.Minute)
			require.ErrorIs(t, err, projection.ErrLeaseHeld)
		},
	},
	{
		name: "RenewPreventsTakeover",
		rule: "a lease that is renewed in time is not lost when its first time would have been up",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			first := mustAcquire(t, ctx, state, "w", "a", 200*time.Millisecond)
			renewed, err := state.Renew(ctx, first, time.Hour)
			require.NoError(t, err)
			timer := time.NewTimer(time.Until(first.Until) + 20*time.Millisecond)
			defer timer.Stop()
			<-timer.C
			_, err = state.Acquire(ctx, "w", "b", time.Hour)
			require.ErrorIs(t, err, projection.ErrLeaseHeld)
			require.NoError(t, state.Update(ctx, func(tx projection.StateTx) error { return tx.Fence(renewed) }))
		},
	},
	{
		name: "Release",
		rule: "after Release the next owner need not wait; releasing a lease that was lost is no error, and takes it from nobody",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			first := mustAcquire(t, ctx, state, "w", "a", time.Hour)
			require.NoError(t, state.Release(ctx, first))
			second := mustAcquire(t, ctx, state, "w", "b", time.Hour)
			require.NoError(t, state.Release(ctx, first), "a lease that was lost")
			require.NoError(t, state.Release(ctx, projection.Lease{Name: "never", Owner: "a", Epoch: 3}))
			_, err := state.Acquire(ctx, "w", "c", time.Hour)
			require.ErrorIs(t, err, projection.ErrLeaseHeld, "the former owner's Release must not free the lease of the present one")
			require.NoError(t, state.Update(ctx, func(tx projection.StateTx) error { return tx.Fence(second) }))
			require.NoError(t, state.Release(ctx, second))
			require.NoError(t, state.Release(ctx, second), "releasing again")
		},
	},
	{
		name: "PausedOwnerIsFenced",
		rule: "an owner that was paused between reading its checkpoint and committing cannot commit after another one has taken over, and nothing that it wrote remains",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			a := mustAcquire(t, ctx, state, "w", "a", time.Millisecond)
			from := checkpoint(t, ctx, state, "w")
			var b projection.Lease
			for {
				var err error
				if b, err = state.Acquire(ctx, "w", "b", time.Hour); err == nil {
					break
				}
				require.ErrorIs(t, err, projection.ErrLeaseHeld)
				require.NoError(t, ctx.Err(), "the lease never ended")
				time.Sleep(time.Millisecond)
			}
			// b has taken over but not moved the checkpoint: the position alone would not stop a.
			require.ErrorIs(t, move(ctx, state, a, from, at(3), "a's"), projection.ErrFenced, "the epoch must be checked, not only the position")
			require.Equal(t, "(none)", value(t, ctx, state, "rows", "w"))
			require.NoError(t, move(ctx, state, b, from, at(2), "b's"))
			require.ErrorIs(t, move(ctx, state, a, from, at(3), "a's"), projection.ErrFenced)
			require.ErrorIs(t, move(ctx, state, a, at(2), at(3), "a's"), projection.ErrFenced)
			require.Equal(t, "b's", value(t, ctx, state, "rows", "w"))
			require.Equal(t, projection.Checkpoint{Log: "log", Epoch: b.Epoch, Position: 2}, checkpoint(t, ctx, state, "w"))
		},
	},
	{
		name: "TakeoverDuringUpdate",
		rule: "when another owner acquires while an update of the former one is running, either that update commits first or it is fenced: never both after each other",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			for round := range 5 {
				name := fmt.Sprint("w", round)
				a := mustAcquire(t, ctx, state, name, "same", time.Hour)
				inside, acquired := make(chan struct{}), make(chan struct{})
				updated := make(chan error, 1)
				go func() {
					updated <- state.Update(ctx, func(tx projection.StateTx) error {
						if err := errors.Join(tx.Put("rows", name, []byte("a's")), tx.SetCheckpoint(a, projection.Checkpoint{}, at(1))); err != nil {
							return err
						}
						close(inside)
						s.afterOrSoon(acquired) // the fence was passed, the commit is still to come
						return nil
					})
				}()
				<-inside
				// The same owner can acquire at once, so this races with the commit.
				b, err := state.Acquire(ctx, name, "same", time.Hour)
				require.NoError(t, err)
				seen := checkpoint(t, ctx, state, name)
				close(acquired)
				err = <-updated
				if err != nil {
					require.ErrorIs(t, err, projection.ErrFenced)
					require.Equal(t, "(none)", value(t, ctx, state, "rows", name))
					require.NoError(t, move(ctx, state, b, projection.Checkpoint{}, at(2), "b's"))
					continue
				}
				require.Equal(t, eventstore.Position(1), seen.Position, "the former owner committed after the new one had acquired and read the checkpoint")
				require.NoError(t, move(ctx, state, b, at(1), at(2), "b's"))
			}
		},
	},
	{
		name: "ManyOwners",
		rule: "with owners taking over from one another all the time, the checkpoint and the rows beside it move together, one step per successful commit",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			const owners, each = 6, 20
			var mu sync.Mutex
			commits := 0
			failed := make(chan error, owners)
			var group sync.WaitGroup
			for i := range owners {
				group.Go(func() {
					for range each {
						lease, err := state.Acquire(ctx, "w", "owner", time.Hour) // one name: every Acquire succeeds and fences the others
						if err != nil {
							failed <- fmt.Errorf("owner %d: %w", i, err)
							return
						}
						err = state.Update(ctx, func(tx projection.StateTx) error {
							from, err := tx.Checkpoint("w")
							if err != nil {
								return err
							}
							to := at(from.Position + 1)
							if err := tx.Put("rows", "w", fmt.Append(nil, to.Position)); err != nil {
								return err
							}
							return tx.SetCheckpoint(lease, from, to)
						})
						switch {
						case err == nil:
							mu.Lock()
							commits++
							mu.Unlock()
						case !errors.Is(err, projection.ErrFenced):
							failed <- fmt.Errorf("owner %d: %w", i, err)
							return
						}
					}
				})
			}
			group.Wait()
			close(failed)
			require.NoError(t, <-failed)
			require.NotZero(t, commits)
			require.Equal(t, eventstore.Position(commits), checkpoint(t, ctx, state, "w").Position)
			require.Equal(t, fmt.Sprint(commits), value(t, ctx, state, "rows", "w"))
		},
	},
	{
		name:  "AfterReopening",
		rule:  "epochs go on after reopening; on a backend of one process, leases that were held then block nobody now",
		needs: needReopen,
		run: func(t testing.TB, s *suite) {
			ctx, p := s.context(t), s.prepare(t)
			state := p.open(t)
			forever := mustAcquire(t, ctx, state, "forever", "a", 0)
			hour := mustAcquire(t, ctx, state, "hour", "a", time.Hour)
			state = p.reopen(t)
			if !s.features.LeasesEndWithProcess {
				_, err := state.Acquire(ctx, "hour", "b", time.Hour)
				require.ErrorIs(t, err, projection.ErrLeaseHeld, "Features.LeasesEndWithProcess is not declared, so leases outlive the process")
				return
			}
			for _, old := range []projection.Lease{forever, hour} {
				l, err := state.Acquire(ctx, old.Name, "b", time.Hour)
				require.NoError(t, err, "lease %q was held by a process that is gone", old.Name)
				require.Greater(t, l.Epoch, old.Epoch)
				require.ErrorIs(t, state.Update(ctx, func(tx projection.StateTx) error { return tx.Fence(old) }), projection.ErrFenced)
			}
		},
	},
}
