package saga_test

import (
	"context"
	"fmt"
	"iter"
	"reflect"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/saga"
)

// Keys of most backends are those of the whole log: what one run was told must
// not look like what another one is told.
func TestSignal_SameIDToSeveralRuns(t *testing.T) {
	t.Parallel()
	def := saga.Define("told", func(s *saga.Run, _ int) (string, error) { return approval.Wait(s, 0) })
	other := saga.Define("told_as_well", func(s *saga.Run, _ int) (string, error) { return approval.Wait(s, 0) })
	b := newBench(t, def, other)
	for _, d := range []*saga.Definition[int, string]{def, other} {
		for i := range 3 {
			run := fmt.Sprint("r", i)
			require.NoError(t, saga.Start(t.Context(), b.engine, d, run, i))
			for range 2 {
				require.NoError(t, approval.Send(t.Context(), b.engine, d, run, run, saga.SignalID("1")))
			}
			got, err := saga.Wait(t.Context(), b.engine, d, run)
			require.NoError(t, err)
			require.Equal(t, run, got)
		}
	}
}

func TestEngine_CancelSeveralRuns(t *testing.T) {
	t.Parallel()
	def := saga.Define("cancelled", func(s *saga.Run, _ int) (string, error) { return "", s.Sleep("long", 1000*time.Hour) })
	b := newBench(t, def)
	for i := range 3 {
		run := fmt.Sprint("r", i)
		require.NoError(t, saga.Start(t.Context(), b.engine, def, run, i))
		for range 2 {
			require.NoError(t, b.engine.Cancel(t.Context(), def.Name(), run, "enough"))
		}
		_, err := saga.Wait(t.Context(), b.engine, def, run)
		require.ErrorIs(t, err, saga.ErrCancelled)
	}
}

// A run that was restarted can be cancelled again.
func TestEngine_CancelAfterRestart(t *testing.T) {
	t.Parallel()
	def := saga.Define("cancelled", func(s *saga.Run, _ int) (string, error) { return "", s.Sleep("long", 1000*time.Hour) })
	b := newBench(t, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", 0))
	for range 3 {
		b.settle()
		require.NoError(t, b.engine.Cancel(t.Context(), def.Name(), "r", "enough"))
		_, err := saga.Wait(t.Context(), b.engine, def, "r")
		require.ErrorIs(t, err, saga.ErrCancelled)
		require.NoError(t, b.engine.Restart(t.Context(), def.Name(), "r", "", "once more"))
	}
}

// Whether the code has noticed that the run is cancelled is the same at every
// replay.
func TestRun_CancelledIsReplayed(t *testing.T) {
	t.Parallel()
	var seen []bool
	def := saga.Define("cancelled", func(s *saga.Run, _ int) (string, error) {
		see := func(s *saga.Run) { seen = append(seen, s.Cancelled()) }
		see(s)
		cause := saga.All(s, "both", func(s *saga.Run) error { return s.Sleep("long", 1000*time.Hour) }, func(s *saga.Run) error {
			see(s)
			return nil
		})
		see(s)
		if err := s.Detached().Sleep("clean up", time.Hour); err != nil {
			return "", err
		}
		see(s)
		return "", cause
	})
	b := newBench(t, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", 0))
	b.settle()
	require.NoError(t, b.engine.Cancel(t.Context(), def.Name(), "r", "enough"))
	b.settle()
	b.advance(2 * time.Hour)
	_, err := saga.Wait(t.Context(), b.engine, def, "r")
	require.ErrorIs(t, err, saga.ErrCancelled)
	require.Equal(t, []bool{false, false, false, false, true, false, false, true, true}, seen)
}

// slowRead is a store that holds up who has read the history of a run.
type slowRead struct {
	plain
	slow     atomic.Bool
	read, on chan struct{}
}

func (s *slowRead) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	if !reflect.DeepEqual(q, eventstore.OneStream(history("told", "r"))) || o.Backward || !s.slow.CompareAndSwap(true, false) {
		return s.backend.Read(ctx, q, o)
	}
	return func(yield func(eventstore.Recorded, error) bool) {
		var events []eventstore.Recorded
		for e, err := range s.backend.Read(ctx, q, o) {
			if err != nil {
				yield(eventstore.Recorded{}, err)
				return
			}
			events = append(events, e)
		}
		close(s.read)
		<-s.on
		for _, e := range events {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// A run that is told something while it finds that it has nothing to do hears of
// it.
func TestRun_ToldWhileItHasNothingToDo(t *testing.T) {
	t.Parallel()
	def := saga.Define("told", func(s *saga.Run, _ int) (string, error) { return "", s.Sleep("long", 1000*time.Hour) })
	store := &slowRead{plain: plain{memory.New()}, read: make(chan struct{}), on: make(chan struct{})}
	b := startBench(t, store, clock.NewManual(t0), saga.Options{}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", 0))
	b.settle()
	store.slow.Store(true)
	require.NoError(t, b.engine.RetryNow(t.Context(), def.Name(), "r"))
	<-store.read
	require.NoError(t, b.engine.Cancel(t.Context(), def.Name(), "r", "enough"))
	require.Eventually(t, func() bool { // the engine has heard of it
		runs, err := b.engine.List(t.Context(), def.Name(), saga.ListOptions{})
		require.NoError(t, err)
		return len(runs) == 1 && runs[0].Cancelling
	}, 10*time.Second, time.Millisecond)
	close(store.on)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := saga.Wait(ctx, b.engine, def, "r")
	require.ErrorIs(t, err, saga.ErrCancelled)
}

// Who waits for a run that is blocked is told so, also when the run was told
// something since.
func TestWait_BlockedAndTold(t *testing.T) {
	t.Parallel()
	def := saga.Define("stuck", func(*saga.Run, int) (string, error) { panic("stuck") })
	b := newBench(t, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", 0))
	b.settle()
	require.NoError(t, approval.Send(t.Context(), b.engine, def, "r", "ann"))
	b.settle()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := saga.Wait(ctx, b.engine, def, "r")
	require.ErrorIs(t, err, saga.ErrBlocked)
}
