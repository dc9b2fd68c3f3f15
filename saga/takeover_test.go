package saga_test

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// A branch that was at work when its engine died is at work again in the next
// one, although another branch waits.
func TestAll_BranchAtWorkWhenTheEngineDies(t *testing.T) {
	t.Parallel()
	begun := make(chan struct{}, 10)
	calls := 0
	def := saga.Define("branches", func(s *saga.Run, _ int) (int, error) {
		return calls, saga.All(s, "both", func(s *saga.Run) error {
			_, err := approval.Wait(s, 0)
			return err
		}, func(s *saga.Run) error {
			_, err := saga.Do(s, "work", func(step saga.Step) (int, error) {
				calls++
				n := calls // the next engine may be at it once the test goes on
				begun <- struct{}{}
				if n == 1 {
					<-step.Done()
					return 0, step.Err()
				}
				return 0, nil
			})
			return err
		})
	})
	b := startBench(t, memory.New(), clock.NewManual(t0), saga.Options{Grace: 1}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", 0))
	<-begun
	b = b.restart(def)
	b.settle()
	require.Equal(t, 2, calls)

	// Once all of them wait nothing is done about the run by the next engine.
	b = b.restart(def)
	b.settle()
	require.NoError(t, approval.Send(t.Context(), b.engine, def, "r", "ann"))
	got, err := saga.Wait(t.Context(), b.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, 2, got)
}

// plain is a backend that is asked to append, and in no other way.
type plain struct{ backend }

func (s plain) LogID(ctx context.Context) (string, error) { return eventstore.LogID(ctx, s.backend) }

// cutOff is a store whose engine dies once something is done: it then writes no
// more.
type cutOff struct {
	plain
	over atomic.Bool
	at   func(c eventstore.Commit) bool // the last append
}

func (s *cutOff) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if s.over.Load() {
		return eventstore.Receipt{}, eventstore.ErrClosed
	}
	receipt, err := s.backend.Append(ctx, c)
	if s.at != nil && s.at(c) {
		s.over.Store(true)
		return eventstore.Receipt{}, eventstore.ErrClosed
	}
	return receipt, err
}

func (s *cutOff) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	acted := false
	err := s.backend.Update(ctx, func(tx projection.StateTx) error {
		if s.over.Load() {
			return eventstore.ErrClosed
		}
		noticed := &putTx{StateTx: tx}
		err := fn(noticed)
		acted = noticed.acted
		return err
	})
	if acted && s.at == nil {
		s.over.Store(true)
		return eventstore.ErrClosed
	}
	return err
}

// putTx notices that something is booked.
type putTx struct {
	projection.StateTx
	acted bool
}

func (t *putTx) Put(table, key string, value []byte) error {
	t.acted = t.acted || table == "test.books"
	return t.StateTx.Put(table, key, value)
}

// What an engine has done before it died, without a record of it, is known when
// the run is cancelled before the next engine is there: it is compensated.
func TestCancel_AfterAnEngineDied(t *testing.T) {
	t.Parallel()
	appended := func(category string) func(eventstore.Commit) bool {
		return func(c eventstore.Commit) bool { return c.Events[0].Stream.Category == category }
	}
	reserve := func(s *saga.Run) error {
		if err := saga.Execute(s, "reserve", stocks, Reserve{"book", s.ID()}); err != nil {
			return err
		}
		s.OnRollback("release", func(s *saga.Run) error {
			return saga.Execute(s, "release", stocks, Release{"book", s.ID()})
		})
		return nil
	}
	for name, c := range map[string]struct {
		at    func(eventstore.Commit) bool
		code  func(s *saga.Run) error
		check func(t *testing.T, b *bench)
	}{
		"a command": {appended("stock"), reserve, func(t *testing.T, b *bench) {
			require.Equal(t, []string{"stock.stocked", "stock.reserved", "stock.released"}, b.types(eventstore.Stream{Category: "stock", ID: "book"}))
		}},
		"a command after a timer": {appended("stock"), func(s *saga.Run) error {
			if err := s.Sleep("before", time.Second); err != nil {
				return err
			}
			return reserve(s)
		}, func(t *testing.T, b *bench) {
			require.Equal(t, []string{"stock.stocked", "stock.reserved", "stock.released"}, b.types(eventstore.Stream{Category: "stock", ID: "book"}))
		}},
		"a command in a branch": {appended("stock"), func(s *saga.Run) error { return saga.All(s, "both", reserve, reserve) }, func(t *testing.T, b *bench) {
			types := b.types(eventstore.Stream{Category: "stock", ID: "book"})
			count := map[string]int{}
			for _, t := range types {
				count[t]++
			}
			require.NotZero(t, count["stock.reserved"])
			require.Equal(t, count["stock.reserved"], count["stock.released"])
		}},
		"a transaction": {nil, func(s *saga.Run) error {
			if _, err := saga.Tx(s, "book", func(_ saga.Step, tx projection.Tx) (int, error) { return book(tx, s.ID(), 1) }); err != nil {
				return err
			}
			s.OnRollback("unbook", func(s *saga.Run) error {
				_, err := saga.Tx(s, "unbook", func(_ saga.Step, tx projection.Tx) (int, error) { return book(tx, s.ID(), -1) })
				return err
			})
			return nil
		}, func(t *testing.T, b *bench) { require.Equal(t, "0", booked(t, b.store, "r")) }},
		"the start of a child": {appended("saga.packing"), func(s *saga.Run) error {
			_, err := saga.Child(s, "parcel", packing, "parcel", "book")
			return err
		}, func(t *testing.T, b *bench) {
			info, err := saga.Look(t.Context(), b.engine, packing, "parcel")
			require.NoError(t, err)
			require.Equal(t, saga.StatusCancelled, info.Status)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			def := saga.Define("cancelling", func(s *saga.Run, _ int) (int, error) {
				if err := c.code(s); err != nil {
					return 0, err
				}
				return 0, s.Sleep("long", 1000*time.Hour)
			})
			store := memory.New()
			moved := clock.NewManual(t0)
			stocked := startBench(t, store, moved, saga.Options{})
			exec(stocked, stocks, Fill{"book", 5})
			require.NoError(t, saga.Start(t.Context(), stocked.engine, def, "r", 0))

			dying := &cutOff{plain: plain{store}, at: c.at}
			first := startUnready(t, dying, moved, saga.Options{Grace: 1}, def, packing)
			for !dying.over.Load() {
				moved.Set(moved.Now().Add(time.Second)) // for the timer, if there is one
				for _, w := range first.engine.Workers() {
					_ = w.Fire(t.Context(), moved.Now())
				}
				runtime.Gosched()
			}
			first.stop()

			require.NoError(t, stocked.engine.Cancel(t.Context(), def.Name(), "r", "enough"))
			next := startBench(t, store, moved, saga.Options{}, def, packing)
			_, err := saga.Wait(t.Context(), next.engine, def, "r")
			require.ErrorIs(t, err, saga.ErrCancelled)
			next.settle()
			c.check(t, next)
		})
	}
}

// A request to cancel does not cut off a command: it would not be known whether
// it took effect.
func TestCancel_DuringACommand(t *testing.T) {
	t.Parallel()
	def := saga.Define("cancelling", func(s *saga.Run, _ int) (int, error) {
		if err := saga.Execute(s, "reserve", stocks, Reserve{"book", s.ID()}); err != nil {
			return 0, err
		}
		s.OnRollback("release", func(s *saga.Run) error {
			return saga.Execute(s, "release", stocks, Release{"book", s.ID()})
		})
		return 0, s.Sleep("long", 1000*time.Hour)
	})
	begun, on := make(chan context.Context, 1), make(chan struct{})
	b := slowCommands(t, begun, on, def)
	exec(b, stocks, Fill{"book", 5})
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", 0))
	during := <-begun
	require.NoError(t, b.engine.Cancel(t.Context(), def.Name(), "r", "enough"))
	require.Eventually(t, func() bool { // the engine has heard of it
		runs, err := b.engine.List(t.Context(), def.Name(), saga.ListOptions{})
		require.NoError(t, err)
		return len(runs) == 1 && runs[0].Cancelling
	}, 10*time.Second, time.Millisecond)
	require.NoError(t, during.Err())
	close(on)
	_, err := saga.Wait(t.Context(), b.engine, def, "r")
	require.ErrorIs(t, err, saga.ErrCancelled)
	require.Equal(t, []string{"stock.stocked", "stock.reserved", "stock.released"}, b.types(eventstore.Stream{Category: "stock", ID: "book"}))
}

// What a branch came to is recorded although another one could not go on.
func TestAll_RecordsWhatEndedBesideAFailureOfTheStore(t *testing.T) {
	t.Parallel()
	store := newServer()
	begun, failed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	store.lookup = func() (err error) {
		<-begun
		once.Do(func() {
			close(failed)
			err = errDown
		})
		return err
	}
	calls := 0
	def := saga.Define("branches", func(s *saga.Run, _ int) (int, error) {
		got := 0
		return got, saga.All(s, "both", func(s *saga.Run) error {
			_, err := saga.Once(s, "mail", func(saga.Step) (int, error) {
				calls++
				close(begun)
				<-failed
				return 1, nil
			})
			return err
		}, func(s *saga.Run) error {
			return saga.Execute(s, "reserve", stocks, Reserve{"book", s.ID()})
		})
	})
	b := startBench(t, store, clock.NewManual(t0), saga.Options{}, def)
	exec(b, stocks, Fill{"book", 5})
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", 0))
	_, err := saga.Wait(t.Context(), b.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, 1, calls)
}

// slowCommands returns a bench whose commands of type Reserve tell begun their
// context, and wait for on.
func slowCommands(t *testing.T, begun chan<- context.Context, on <-chan struct{}, def saga.Process) *bench {
	t.Helper()
	store := memory.New()
	runtime := aggregate.NewRuntime(store, aggregate.Options{Logger: slog.New(slog.DiscardHandler)})
	slow := func(next command.Handler) command.Handler {
		return func(ctx context.Context, call *command.Call) (eventstore.Receipt, error) {
			if _, ok := call.Command.(Reserve); ok {
				begun <- ctx
				<-on
			}
			return next(ctx, call)
		}
	}
	b := &bench{t: t, store: store, clock: clock.NewManual(t0), runtime: runtime, bus: command.NewBus(runtime, command.Options{Middleware: []command.Middleware{slow}})}
	b.engine = saga.NewEngine(store, store, b.bus, saga.Options{Clock: b.clock, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, b.engine.Add(def))
	b.run()
	t.Cleanup(func() { b.stop() })
	return b
}

// A command that is under way in a branch when another one wins the race is done,
// and what undoes it is registered; nothing else begins in that branch.
func TestRace_CommandOfTheLoser(t *testing.T) {
	t.Parallel()
	var never atomic.Int32
	branch := func(s *saga.Run) error {
		if err := saga.Execute(s, "reserve", stocks, Reserve{"book", s.ID()}); err != nil {
			return err
		}
		s.OnRollback("release", func(s *saga.Run) error {
			return saga.Execute(s, "release", stocks, Release{"book", s.ID()})
		})
		_, err := saga.Do(s, "never", func(saga.Step) (int32, error) { return never.Add(1), nil })
		return err
	}
	for name, loser := range map[string]func(*saga.Run) error{
		"a branch":             branch,
		"a branch of a branch": func(s *saga.Run) error { return saga.All(s, "inner", branch) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			begun, on := make(chan context.Context, 1), make(chan struct{})
			def := saga.Define("race", func(s *saga.Run, _ int) (int, error) {
				_, err := saga.Race(s, "race", func(s *saga.Run) error {
					_, err := saga.Do(s, "win", func(saga.Step) (int, error) { <-begun; return 0, nil })
					return err
				}, loser, func(s *saga.Run) error {
					_, err := saga.Do(s, "lose", func(step saga.Step) (int, error) {
						<-step.Done()
						close(on)
						return 0, context.Cause(step)
					})
					return err
				})
				return 0, errors.Join(err, errDeclined)
			})
			b := slowCommands(t, begun, on, def)
			exec(b, stocks, Fill{"book", 5})
			require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", 0))
			_, err := saga.Wait(t.Context(), b.engine, def, "r")
			require.ErrorIs(t, err, errDeclined)
			require.Equal(t, []string{"stock.stocked", "stock.reserved", "stock.released"}, b.types(eventstore.Stream{Category: "stock", ID: "book"}))
			require.Zero(t, never.Load())
			var events []eventstore.Recorded
			for e, err := range b.store.Read(t.Context(), eventstore.OneStream(history("race", "r")), eventstore.ReadOptions{}) {
				require.NoError(t, err)
				events = append(events, e)
				require.NoError(t, def.Replay(t.Context(), events, nil), "%d events", len(events))
			}
		})
	}
}

// That a command took effect is found out although its time is over.
func TestExecute_OverallAfterAnEngineDied(t *testing.T) {
	t.Parallel()
	def := saga.Define("hasty", func(s *saga.Run, _ int) (int, error) {
		return 0, saga.Execute(s, "reserve", stocks, Reserve{"book", s.ID()}, saga.Overall(time.Minute))
	})
	store, c := memory.New(), clock.NewManual(t0)
	other := startBench(t, store, c, saga.Options{})
	exec(other, stocks, Fill{"book", 5})
	require.NoError(t, saga.Start(t.Context(), other.engine, def, "r", 0))
	dying := &cutOff{plain: plain{store}, at: func(c eventstore.Commit) bool { return c.Events[0].Stream.Category == "stock" }}
	first := startUnready(t, dying, c, saga.Options{Grace: 1}, def)
	require.Eventually(t, dying.over.Load, 10*time.Second, time.Millisecond)
	first.stop()
	c.Set(t0.Add(day))
	next := startBench(t, store, c, saga.Options{}, def)
	_, err := saga.Wait(t.Context(), next.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, []string{"stock.stocked", "stock.reserved"}, next.types(eventstore.Stream{Category: "stock", ID: "book"}))
}

// A step that runs at most once does not begin when its engine stops: the next
// engine would not know how far it came.
func TestOnce_DoesNotBeginAtTheEnd(t *testing.T) {
	t.Parallel()
	begun := make(chan struct{})
	var calls atomic.Int32
	def := saga.Define("late", func(s *saga.Run, _ int) (int32, error) {
		_, err := saga.Do(s, "first", func(step saga.Step) (int, error) {
			close(begun)
			<-step.Done()
			return 0, nil
		})
		if err != nil {
			return 0, err
		}
		return saga.Once(s, "second", func(saga.Step) (int32, error) { return calls.Add(1), nil })
	})
	// The grace is also how long the step has to end once it is cancelled.
	b := startBench(t, memory.New(), clock.NewManual(t0), saga.Options{Grace: time.Second}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", 0))
	<-begun
	require.NoError(t, errors.Join(b.stop()...))
	b = startBench(t, b.store, b.clock, saga.Options{}, def)
	got, err := saga.Wait(t.Context(), b.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, int32(1), got)
}
