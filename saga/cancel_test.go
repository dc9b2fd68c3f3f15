package saga_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// reserving registers how to undo what it does after it has done it, as is
// right for steps that either happen or do not.
func reserving(kid *saga.Definition[struct{}, int]) *saga.Definition[string, int] {
	return saga.Define("reserving", func(s *saga.Run, how string) (int, error) {
		var err error
		switch how {
		case "execute":
			err = saga.Execute(s, "reserve", stocks, Reserve{"book", s.ID()})
		case "tx":
			_, err = saga.Tx(s, "reserve", func(saga.Step, projection.Tx) (int, error) { return 0, nil })
		case "child":
			_, err = saga.StartChild(s, "reserve", kid, "kid", struct{}{})
		}
		if err != nil {
			return 0, err
		}
		s.OnRollback("undo", func(s *saga.Run) error {
			return saga.Execute(s, "undo", stocks, Release{"book", s.ID()})
		})
		return 0, s.Sleep("wait", time.Hour)
	})
}

// unrecorded loses what the runs of "reserving" write after they have started,
// as for a process that dies before it has written.
type unrecorded struct {
	backend
	cut  atomic.Bool // an engine that was left behind may still look
	lost chan struct{}
}

func (f *unrecorded) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if f.cut.Load() && c.Events[0].Stream == history("reserving", "r") && c.Events[0].Type == "saga.step_succeeded" {
		select {
		case f.lost <- struct{}{}:
		default:
		}
		return eventstore.Receipt{}, eventstore.ErrUnavailable
	}
	return f.backend.Append(ctx, c)
}

// TestCancel_StepWhoseRecordWasLost: a command, transaction or child whose
// record was lost with the process, in a run that is cancelled before it goes
// on, has happened, and is compensated.
func TestCancel_StepWhoseRecordWasLost(t *testing.T) {
	t.Parallel()
	kid := saga.Define("kid", func(s *saga.Run, _ struct{}) (int, error) { return 0, s.Sleep("a day", day) })
	def := reserving(kid)
	for _, how := range []string{"execute", "tx", "child"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			store := &unrecorded{backend: memory.New(), lost: make(chan struct{}, 1)}
			store.cut.Store(true)
			b := startBench(t, store, clock.NewManual(t0), saga.Options{Grace: time.Second}, def, kid)
			exec(b, stocks, Fill{"book", 1})
			require.NoError(t, saga.Start(ctx, b.engine, def, "r", how))
			<-store.lost
			b.stop()
			require.NoError(t, b.engine.Cancel(ctx, "reserving", "r", "changed my mind"))

			store.cut.Store(false)
			b = startBench(t, store, b.clock, saga.Options{}, def, kid)
			_, err := saga.Wait(ctx, b.engine, def, "r")
			failed, ok := errors.AsType[*saga.FailedError](err)
			require.True(t, ok, "%v", err)
			require.Equal(t, saga.StatusCancelled, failed.Status)
			require.Equal(t, []string{"undo"}, failed.Compensated)
		})
	}
}

// hesitant writes to the stock when it is told to.
type hesitant struct {
	backend
	began, write chan struct{}
	once         sync.Once
}

func (h *hesitant) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if c.Events[0].Type == (Reserved{}).EventType() {
		h.once.Do(func() { close(h.began) })
		<-h.write
	}
	return h.backend.Append(ctx, c)
}

// TestCancel_WhileACommandIsExecuted: the request does not cut a command off, so
// that the code learns what has become of it.
func TestCancel_WhileACommandIsExecuted(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	store := &hesitant{backend: memory.New(), began: make(chan struct{}), write: make(chan struct{})}
	def := reserving(nil)
	b := startBench(t, store, clock.NewManual(t0), saga.Options{}, def)
	exec(b, stocks, Fill{"book", 1})
	require.NoError(t, saga.Start(ctx, b.engine, def, "r", "execute"))
	<-store.began
	require.NoError(t, b.engine.Cancel(ctx, "reserving", "r", "changed my mind"))
	require.Eventually(t, func() bool {
		runs, err := b.engine.List(ctx, "reserving", saga.ListOptions{})
		return err == nil && (len(runs) == 0 || runs[0].Cancelling)
	}, 10*time.Second, time.Millisecond, "the worker has not heard of it")
	close(store.write)
	_, err := saga.Wait(ctx, b.engine, def, "r")
	failed, ok := errors.AsType[*saga.FailedError](err)
	require.True(t, ok, "%v", err)
	require.Equal(t, saga.StatusCancelled, failed.Status)
	require.Equal(t, []string{"undo"}, failed.Compensated)
	require.Equal(t, []string{"stock.stocked", "stock.reserved", "stock.released"}, b.types(eventstore.Stream{Category: "stock", ID: "book"}))
}

// TestRace_LoserIsUndone: what the loser was doing when it lost, and has done
// all the same, is compensated by what it registers next.
func TestRace_LoserIsUndone(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	store := &hesitant{backend: memory.New(), began: make(chan struct{}), write: make(chan struct{})}
	errLate := errors.New("too late")
	won := make(chan struct{})
	var once sync.Once
	def := saga.Define("racing", func(s *saga.Run, _ struct{}) (int, error) {
		winner, err := saga.Race(s, "race", func(s *saga.Run) error {
			if err := saga.Execute(s, "reserve", stocks, Reserve{"book", s.ID()}); err != nil {
				return err
			}
			s.OnRollback("undo", func(s *saga.Run) error {
				return saga.Execute(s, "undo", stocks, Release{"book", s.ID()})
			})
			return s.Sleep("wait", time.Hour)
		}, func(s *saga.Run) error {
			defer once.Do(func() { close(won) })
			_, err := saga.Do(s, "alarm", func(saga.Step) (int, error) {
				<-store.began
				return 0, nil
			})
			return err
		})
		if err == nil && winner == 1 {
			err = errLate
		}
		return winner, err
	})
	b := startBench(t, store, clock.NewManual(t0), saga.Options{}, def)
	exec(b, stocks, Fill{"book", 1})
	require.NoError(t, saga.Start(ctx, b.engine, def, "r", struct{}{}))
	<-won
	close(store.write)
	_, err := saga.Wait(ctx, b.engine, def, "r")
	require.ErrorIs(t, err, errLate)
	failed, ok := errors.AsType[*saga.FailedError](err)
	require.True(t, ok, "%v", err)
	require.Equal(t, []string{"race.0@undo"}, failed.Compensated)
	require.Equal(t, []string{"stock.stocked", "stock.reserved", "stock.released"}, b.types(eventstore.Stream{Category: "stock", ID: "book"}))

	recorded, err := b.engine.History(ctx, "racing", "r")
	require.NoError(t, err)
	for n := range recorded {
		require.NoError(t, def.Replay(ctx, recorded[:n+1], nil), "the first %d events", n+1)
	}
}
