package saga_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

var word = saga.NewSignal[string]("word")

func collect(n int) *saga.Definition[struct{}, []string] {
	return saga.Define("collect", func(s *saga.Run, _ struct{}) ([]string, error) {
		var words []string
		for range n {
			w, err := word.Wait(s, 0)
			if err != nil {
				return nil, err
			}
			words = append(words, w)
		}
		return words, nil
	})
}

func TestSignal_InOrderOncePerID(t *testing.T) {
	t.Parallel()
	def := collect(3)
	b := newBench(t, def)
	ctx := t.Context()
	require.ErrorIs(t, word.Send(ctx, b.engine, def, "r", "too early"), saga.ErrNotFound)
	require.NoError(t, saga.Start(ctx, b.engine, def, "r", struct{}{}))
	for _, w := range []string{"a", "b"} {
		require.NoError(t, word.Send(ctx, b.engine, def, "r", w, saga.SignalID("id of "+w)))
		require.NoError(t, word.Send(ctx, b.engine, def, "r", w, saga.SignalID("id of "+w)), "sending it again does nothing")
	}
	b.settle()
	info, err := saga.Look(ctx, b.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, saga.StatusWaiting, info.Status)
	require.Equal(t, `signal "word" (occurrence 3)`, info.Step)
	b = b.restart(def) // nobody owns the run for a while
	require.NoError(t, word.Send(ctx, b.engine, def, "r", "c"))
	got, err := saga.Wait(ctx, b.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, []string{"a", "b", "c"}, got)
	require.ErrorIs(t, word.Send(ctx, b.engine, def, "r", "too late"), saga.ErrFinished)
	require.NoError(t, word.Send(ctx, b.engine, def, "r", "a", saga.SignalID("id of a")), "it was given, as its sender now learns")
	require.ErrorIs(t, b.engine.Signal(ctx, "collect", "r", "word", "", json.RawMessage("{")), eventstore.ErrInvalid)
}

// TestSignal_WhileNobodyRuns: who sends a signal needs no owner.
func TestSignal_WhileNobodyRuns(t *testing.T) {
	t.Parallel()
	def := collect(1)
	b := newBench(t, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", struct{}{}))
	b.settle()
	b.stop()
	require.NoError(t, word.Send(t.Context(), b.engine, def, "r", "kept"))
	b = b.restart(def)
	got, err := saga.Wait(t.Context(), b.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, []string{"kept"}, got)
}

// TestSignal_WhileAStepRuns: what others write beside the owner does not make
// it lose the step that it is at.
func TestSignal_WhileAStepRuns(t *testing.T) {
	t.Parallel()
	began, goOn := make(chan struct{}), make(chan struct{})
	var calls atomic.Int32
	def := saga.Define("busy", func(s *saga.Run, _ struct{}) (string, error) {
		if _, err := saga.Do(s, "work", func(saga.Step) (int, error) {
			calls.Add(1)
			close(began)
			<-goOn
			return 0, nil
		}); err != nil {
			return "", err
		}
		return word.Wait(s, time.Hour)
	})
	b := newBench(t, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", struct{}{}))
	<-began
	require.NoError(t, word.Send(t.Context(), b.engine, def, "r", "now"))
	close(goOn)
	got, err := saga.Wait(t.Context(), b.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, "now", got)
	require.Equal(t, int32(1), calls.Load())
	require.Equal(t, []string{"saga.started", "saga.signalled", "saga.step_succeeded", "saga.signal_awaited", "saga.signal_taken", "saga.completed"}, b.types(history("busy", "r")))
}

func TestSignal_Timeout(t *testing.T) {
	t.Parallel()
	def := saga.Define("patient", func(s *saga.Run, _ struct{}) (string, error) {
		w, err := word.Wait(s, time.Hour)
		if errors.Is(err, saga.ErrTimeout) {
			return "timed out", nil
		}
		return w, err
	})
	sagatest.For(t, def).
		Start("late", struct{}{}).Start("in time", struct{}{}).
		Advance(59*time.Minute).
		Signal("in time", "word", "hello").
		Advance(time.Minute).
		Completed("late", "timed out").
		Completed("in time", "hello")
}

func TestContinue_TakesSignalsAlong(t *testing.T) {
	t.Parallel()
	type state struct {
		Seen []string
		Life int
	}
	story := func(s *sagatest.Spec) {
		s.Start("r", state{}).
			Signal("r", "word", "a").
			Signal("r", "word", "b").
			Advance(time.Hour). // a and b came in the first life
			Signal("r", "word", "c").
			Signal("r", "word", "d").
			Advance(time.Hour).
			Completed("r", state{[]string{"a", "b", "c", "d"}, 4})
	}
	sagatest.CrashEverywhere(t, func() saga.Process {
		return saga.Define("lives", func(s *saga.Run, in state) (state, error) {
			if err := s.Sleep("begin", time.Minute); err != nil {
				return in, err
			}
			w, err := word.Wait(s, 0)
			if err != nil {
				return in, err
			}
			in.Seen, in.Life = append(in.Seen, w), in.Life+1
			if len(in.Seen) == 4 {
				return in, nil
			}
			return in, s.Continue(in)
		})
	}, story, nil)
}

func TestContinue_NotWithCompensations(t *testing.T) {
	t.Parallel()
	def := saga.Define("hasty", func(s *saga.Run, settled bool) (int, error) {
		s.OnRollback("undo", func(*saga.Run) error { return nil })
		if settled {
			s.Settled()
			return 1, nil
		}
		return 0, s.Continue(true)
	})
	sagatest.For(t, def).Start("r", false).Blocked("r", `compensation "undo" is pending`)
}

// TestContinue_KeysDiffer: a step of the next life is another step.
func TestContinue_KeysDiffer(t *testing.T) {
	t.Parallel()
	var keys []string
	def := saga.Define("keys", func(s *saga.Run, n int) (int, error) {
		_, err := saga.Do(s, "work", func(step saga.Step) (int, error) {
			keys = append(keys, step.IdempotencyKey())
			return 0, nil
		})
		if err != nil || n == 2 {
			return n, err
		}
		return 0, s.Continue(n + 1)
	})
	sagatest.For(t, def).Start("r", 0).Completed("r", 2)
	require.Len(t, keys, 3)
	require.Len(t, unique(keys), 3)
}

// TestContinue_TransactionsLeaveNothing: what transactions have left is removed
// with the first one of the next life, and at the end.
func TestContinue_TransactionsLeaveNothing(t *testing.T) {
	t.Parallel()
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			store := b.open(t)
			var ran, most atomic.Int32
			def := saga.Define("lives", func(s *saga.Run, n int) (int, error) {
				err := saga.All(s, "both", func(s *saga.Run) error {
					_, err := saga.Tx(s, "book", func(saga.Step, projection.Tx) (int, error) { ran.Add(1); return 0, nil })
					return err
				}, func(s *saga.Run) error {
					_, err := saga.Tx(s, "book", func(saga.Step, projection.Tx) (int, error) { ran.Add(1); return 0, nil })
					return err
				})
				if err == nil {
					_, err = saga.Tx(s, "count", func(saga.Step, projection.Tx) (int, error) { return 0, nil })
				}
				if err == nil {
					_, err = saga.Do(s, "look", func(saga.Step) (int, error) {
						most.Store(max(most.Load(), int32(tableSize(t, store, "saga.lives.tx")))) //nolint:gosec // few
						return 0, nil
					})
				}
				if err == nil && n < 5 {
					return 0, s.Continue(n + 1)
				}
				if err == nil {
					err = s.Sleep("rest", time.Hour)
				}
				return n, err
			})
			bench := startBench(t, store, clock.NewManual(t0), saga.Options{}, def)
			require.NoError(t, saga.Start(t.Context(), bench.engine, def, "r", 0))
			bench.settle()
			require.EqualValues(t, 12, ran.Load())
			require.EqualValues(t, 3, most.Load(), "rows of the table, of one life")
			bench.advance(2 * time.Hour)
			infos, err := bench.engine.List(t.Context(), "lives", saga.ListOptions{Status: []saga.Status{saga.StatusCompleted}})
			require.NoError(t, err)
			require.Len(t, infos, 1)
			require.Zero(t, tableSize(t, store, "saga.lives.tx"))
			for _, err := range bench.stop() {
				require.NoError(t, err)
			}
		})
	}
}

// tardy is a store that holds one update back, and loses what steps have come
// to, when told.
type tardy struct {
	backend
	hold       atomic.Bool
	held, goOn chan struct{}
	lose       atomic.Bool
	lost       atomic.Int32
}

func (s *tardy) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	if s.hold.CompareAndSwap(true, false) {
		close(s.held)
		<-s.goOn
	}
	return s.backend.Update(ctx, fn)
}

func (s *tardy) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if c.Events[0].Type == "saga.step_succeeded" && s.lose.Load() {
		s.lost.Add(1)
		return eventstore.Receipt{}, eventstore.ErrUnavailable
	}
	return s.backend.Append(ctx, c)
}

// TestRestart_WhileItsEndIsStored: what the transaction of a restarted run has left
// is not removed with what its first end made superfluous, and it does not run again.
func TestRestart_WhileItsEndIsStored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &tardy{backend: memory.New(), held: make(chan struct{}), goOn: make(chan struct{})}
		release := sync.OnceFunc(func() { close(store.goOn) })
		var ran atomic.Int32
		def := saga.Define("booking", func(s *saga.Run, _ int) (int, error) {
			return saga.Tx(s, "book", func(saga.Step, projection.Tx) (int, error) { return int(ran.Add(1)), nil })
		})
		bench := startBench(t, store, clock.NewManual(t0), saga.Options{}, def)
		defer release()
		require.NoError(t, saga.Start(t.Context(), bench.engine, def, "r", 0))
		bench.settle()
		require.EqualValues(t, 1, ran.Load())
		require.Equal(t, 1, tableSize(t, store, "saga.booking.tx"), "its end is not stored yet")
		store.hold.Store(true)
		<-store.held // the flush that has taken it as ended

		store.lose.Store(true)
		timeline, err := bench.engine.Timeline(t.Context(), "booking", "r")
		require.NoError(t, err)
		require.NoError(t, bench.engine.Restart(t.Context(), "booking", "r", timeline.Steps[0].Key, "once more"))
		synctest.Wait()
		require.Positive(t, store.lost.Load())
		require.EqualValues(t, 2, ran.Load())
		require.Equal(t, 2, tableSize(t, store, "saga.booking.tx"))
		release()
		synctest.Wait() // the flush is done, and the step not tried again yet
		require.Equal(t, 2, tableSize(t, store, "saga.booking.tx"), "the history does not have the second one yet")

		store.lose.Store(false)
		out, err := saga.Wait(t.Context(), bench.engine, def, "r")
		require.NoError(t, err)
		require.Equal(t, 2, out)
		require.EqualValues(t, 2, ran.Load())
		bench.settle()
		_, err = bench.engine.List(t.Context(), "booking", saga.ListOptions{}) // which stores the index
		require.NoError(t, err)
		require.Zero(t, tableSize(t, store, "saga.booking.tx"))
		for _, err := range bench.stop() {
			require.NoError(t, err)
		}
	})
}

func TestCancel_EndsWaitsAndCompensates(t *testing.T) {
	t.Parallel()
	define := func(g *gateway) saga.Process {
		return saga.Define("cancelled", func(s *saga.Run, kind string) (string, error) {
			s.OnRollback("undo", func(s *saga.Run) error {
				if err := s.Sleep("rest", time.Minute); err != nil { // compensations are not cancelled
					return err
				}
				_, err := saga.Do(s, "undo", func(step saga.Step) (int, error) { return 0, g.call("undo", step.IdempotencyKey()) })
				return err
			})
			var err error
			switch kind {
			case "sleep":
				err = s.Sleep("long", day)
			case "await":
				_, err = saga.Await[Shipped](s, saga.Where("o"), 0)
			case "signal":
				_, err = word.Wait(s, 0)
			case "retry":
				_, err = saga.Do(s, "never", func(saga.Step) (int, error) { return 0, errors.New("no") })
			case "branches":
				err = saga.All(s, "both", func(s *saga.Run) error { return s.Sleep("a", day) }, func(s *saga.Run) error {
					_, err := word.Wait(s, 0)
					return err
				})
			case "race":
				_, err = saga.Race(s, "either", func(s *saga.Run) error { return s.Sleep("a", day) }, func(s *saga.Run) error { return s.Sleep("b", day) })
			}
			if !errors.Is(err, saga.ErrCancelled) {
				return "", fmt.Errorf("not cancelled: %w", err)
			}
			if !s.Cancelled() {
				return "", errors.New("does not know it")
			}
			if _, again := saga.Do(s, "after", func(step saga.Step) (int, error) { return 0, g.call("after", step.IdempotencyKey()) }); !errors.Is(again, saga.ErrCancelled) {
				return "", fmt.Errorf("still at work: %w", again)
			}
			_, cleanup := saga.Do(s.Detached(), "clean up", func(step saga.Step) (int, error) { return 0, g.call("clean up", step.IdempotencyKey()) })
			return "", errors.Join(err, cleanup)
		})
	}
	for _, kind := range []string{"sleep", "await", "signal", "retry", "branches", "race"} {
		t.Run(kind, func(t *testing.T) {
			var g *gateway
			sagatest.CrashEverywhere(t, func() saga.Process { g = newGateway(); return define(g) }, func(s *sagatest.Spec) {
				s.Start("r", kind).
					Advance(time.Minute).
					Cancel("r", "changed my mind").
					Advance(time.Hour).
					Cancelled("r", "undo")
			}, func(t testing.TB) {
				require.Len(t, unique(g.calls["undo"]), 1)
				require.Len(t, unique(g.calls["clean up"]), 1)
				require.Empty(t, g.calls["after"])
			})
		})
	}
}

// TestCancel_EndsTheStepThatRuns by its context, and a result that comes all
// the same counts.
func TestCancel_EndsTheStepThatRuns(t *testing.T) {
	t.Parallel()
	for _, obeys := range []bool{true, false} {
		began := make(chan struct{})
		def := saga.Define("cut", func(s *saga.Run, _ struct{}) (string, error) {
			done, err := saga.Do(s, "work", func(step saga.Step) (string, error) {
				close(began)
				<-step.Done()
				if obeys {
					return "", context.Cause(step)
				}
				return "done", nil
			})
			if err != nil {
				return "", err
			}
			return done, s.Sleep("then", day)
		})
		b := newBench(t, def)
		require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", struct{}{}))
		<-began
		require.NoError(t, b.engine.Cancel(t.Context(), "cut", "r", "enough"))
		_, err := saga.Wait(t.Context(), b.engine, def, "r")
		require.ErrorIs(t, err, saga.ErrCancelled)
		require.ErrorIs(t, err, saga.ErrFailed)
		succeeded := slices.Contains(b.types(history("cut", "r")), "saga.step_succeeded")
		require.Equal(t, !obeys, succeeded)
		require.ErrorIs(t, b.engine.Cancel(t.Context(), "cut", "other", ""), saga.ErrNotFound)
	}
}

func TestCancel_IgnoredForEverBlocks(t *testing.T) {
	t.Parallel()
	def := saga.Define("deaf", func(s *saga.Run, _ struct{}) (int, error) {
		for {
			_ = s.Sleep("on", time.Hour)
		}
	})
	sagatest.For(t, def).Start("r", struct{}{}).Cancel("r", "stop").Blocked("r", "ignored")
}

func TestTerminate(t *testing.T) {
	t.Parallel()
	def := collect(1)
	b := newBench(t, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", struct{}{}))
	b.settle()
	require.NoError(t, b.engine.Terminate(t.Context(), "collect", "r", "by mistake"))
	_, err := saga.Wait(t.Context(), b.engine, def, "r")
	failed, ok := errors.AsType[*saga.FailedError](err)
	require.True(t, ok)
	require.Equal(t, saga.StatusTerminated, failed.Status)
	require.ErrorContains(t, err, "by mistake")
	require.ErrorIs(t, b.engine.Terminate(t.Context(), "collect", "r", "again"), saga.ErrFinished)
	b.settle()
	runs, err := b.engine.List(t.Context(), "collect", saga.ListOptions{Status: []saga.Status{saga.StatusTerminated}})
	require.NoError(t, err)
	require.Len(t, runs, 1)
}

func TestChild_FailsCancelsAndIsItsOwn(t *testing.T) {
	t.Parallel()
	child := saga.Define("kid", func(s *saga.Run, how string) (string, error) {
		s.OnRollback("undo", func(*saga.Run) error { return nil })
		switch how {
		case "fail":
			return "", fmt.Errorf("kid: %w", errDeclined)
		case "wait":
			if err := s.Sleep("long", day); err != nil {
				return "", err
			}
		}
		return "did " + how, nil
	})
	parent := saga.Define("mum", func(s *saga.Run, how string) (string, error) {
		if how == "abandon" {
			return saga.Child(s, "kid", child, "kid of "+s.ID(), "wait", saga.Abandon())
		}
		if how == "start" {
			return saga.StartChild(s, "kid", child, "", "quick")
		}
		got, err := saga.Child(s, "kid", child, "kid of "+s.ID(), how)
		if errors.Is(err, saga.ErrFailed) && errors.Is(err, errDeclined) && !errors.Is(err, saga.ErrCancelled) {
			return "handled", nil
		}
		return got, err
	})
	story := func(s *sagatest.Spec) {
		s.Start("ok", "quick").Completed("ok", "did quick").
			Start("failing", "fail").Completed("failing", "handled").
			Start("cancelled", "wait").Waiting("cancelled", `child "kid"`).
			Start("abandoning", "abandon").
			Cancel("cancelled", "enough").Cancelled("cancelled").
			Cancel("abandoning", "enough").Cancelled("abandoning").
			Start("spawning", "start").
			Completed("spawning", "saga.mum-spawning/do:kid").
			Advance(2 * day)
		// What became of the children.
		for run, want := range map[string]saga.Status{
			"kid of cancelled": saga.StatusCancelled, "kid of abandoning": saga.StatusCompleted, "saga.mum-spawning/do:kid": saga.StatusCompleted,
		} {
			info, err := s.Engine().Look(context.Background(), "kid", run)
			if err != nil || info.Status != want {
				panic(fmt.Sprintf("%s is %s, %v; want %s", run, info.Status, err, want))
			}
		}
	}
	sagatest.CrashEverywhere(t, func() saga.Process { return parent }, story, nil, sagatest.Also(child))

	b := newBench(t, parent, child)
	require.NoError(t, saga.Start(t.Context(), b.engine, child, "kid of thief", "quick"))
	require.NoError(t, saga.Start(t.Context(), b.engine, parent, "thief", "quick"))
	_, err := saga.Wait(t.Context(), b.engine, parent, "thief")
	require.ErrorIs(t, err, saga.ErrStarted)
}

func TestOnce_UnknownAfterACrash(t *testing.T) {
	t.Parallel()
	var calls, unknown atomic.Int32
	sagatest.CrashEverywhere(t, func() saga.Process {
		calls.Store(0)
		return saga.Define("careful", func(s *saga.Run, _ struct{}) (string, error) {
			_, err := saga.Once(s, "fire", func(saga.Step) (int, error) { return int(calls.Add(1)), nil })
			if errors.Is(err, saga.ErrOutcomeUnknown) {
				unknown.Add(1)
				err = nil
			}
			return "", err
		})
	}, func(s *sagatest.Spec) { s.Start("r", struct{}{}).Completed("r", "") }, func(t testing.TB) {
		require.LessOrEqual(t, calls.Load(), int32(1))
	})
	require.Positive(t, unknown.Load(), "no crash fell between the beginning and the end of the step")
}

func TestOnce_FailsAtOnce(t *testing.T) {
	t.Parallel()
	def := saga.Define("once_failing", func(s *saga.Run, _ struct{}) (int, error) {
		return saga.Once(s, "fire", func(saga.Step) (int, error) { return 0, errDeclined }, saga.Retry(5))
	})
	sagatest.For(t, def).Start("r", struct{}{}).Failed("r", errDeclined)
}

func TestStep_OverallAndNotAfter(t *testing.T) {
	t.Parallel()
	var attempts int
	def := saga.Define("budget", func(s *saga.Run, final bool) (int, error) {
		return saga.Do(s, "try", func(saga.Step) (int, error) {
			attempts++
			if final {
				return 0, fmt.Errorf("gateway: %w", errDeclined)
			}
			return 0, errors.New("down")
		}, saga.Overall(time.Minute), saga.NotAfter(errDeclined))
	})
	s := sagatest.For(t, def).Start("r", false).Advance(59 * time.Second)
	s.Failed("r", nil)
	require.Equal(t, 6, attempts) // after 0, 1, 3, 7, 15, 31 s; the next would be after 63 s
	attempts = 0
	s.Start("final", true).Failed("final", errDeclined)
	require.Equal(t, 1, attempts)
}

func TestLimit_AtMostAndRate(t *testing.T) {
	t.Parallel()
	var now, most atomic.Int32
	entered, goOn := make(chan string, 10), make(chan struct{})
	def := saga.Define("limited", func(s *saga.Run, _ int) (int, error) {
		return saga.Do(s, "call", func(saga.Step) (int, error) {
			n := now.Add(1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			entered <- s.ID()
			<-goOn
			now.Add(-1)
			return 0, nil
		}, saga.AtMost("gateway", 2))
	})
	b := newBench(t, def)
	for i := range 6 {
		require.NoError(t, saga.Start(t.Context(), b.engine, def, fmt.Sprint(i), i))
	}
	<-entered
	for i := range 6 {
		if i < 5 {
			<-entered // another one, while one is there
		}
		goOn <- struct{}{}
	}
	b.settle()
	require.Equal(t, int32(2), most.Load())
	for i := range 6 {
		_, err := saga.Wait(t.Context(), b.engine, def, fmt.Sprint(i))
		require.NoError(t, err)
	}

	var at []time.Duration
	var s *sagatest.Spec
	rated := saga.Define("rated", func(r *saga.Run, _ int) (int, error) {
		return saga.Do(r, "call", func(saga.Step) (int, error) {
			at = append(at, s.Now().Sub(t0))
			return 0, nil
		}, saga.Rate("gateway", 2, time.Minute))
	})
	s = sagatest.For(t, rated, sagatest.At(t0))
	for i := range 4 {
		s.Start(fmt.Sprint(i), i)
	}
	s.Advance(time.Hour)
	require.Equal(t, []time.Duration{0, 30 * time.Second, time.Minute, 90 * time.Second}, at)
	for i := range 4 {
		s.Completed(fmt.Sprint(i), 0)
	}
}

// TestLimit_InBranches: the branches of a run wait for a limit too, and give it back.
func TestLimit_InBranches(t *testing.T) {
	t.Parallel()
	var now, most int
	var mu sync.Mutex
	def := saga.Define("wide", func(s *saga.Run, n int) (int, error) {
		branches := make([]func(*saga.Run) error, n)
		for i := range branches {
			branches[i] = func(s *saga.Run) error {
				_, err := saga.Do(s, "call", func(saga.Step) (int, error) {
					mu.Lock()
					now++
					most = max(most, now)
					mu.Unlock()
					time.Sleep(time.Millisecond) // so that they meet; the verdict does not hang on it
					mu.Lock()
					now--
					mu.Unlock()
					return 0, nil
				}, saga.AtMost("gateway", 3))
				return err
			}
		}
		return n, saga.All(s, "wide", branches...)
	})
	sagatest.For(t, def).Start("r", 10).Completed("r", 10).Start("r2", 10).Completed("r2", 10)
	require.LessOrEqual(t, most, 3)
}

func TestHeartbeat_ResumesAndTimesOut(t *testing.T) {
	t.Parallel()
	var began []int
	def := saga.Define("long", func(s *saga.Run, _ struct{}) (int, error) {
		return saga.Do(s, "copy", func(step saga.Step) (int, error) {
			done := 0
			if _, err := step.Progress(&done); err != nil {
				return 0, err
			}
			began = append(began, done)
			for ; done < 10; done++ {
				if err := step.Heartbeat(done); err != nil {
					return 0, err
				}
				if done == 4 && step.Attempt() == 1 {
					<-step.Done() // it hangs
					return 0, context.Cause(step)
				}
			}
			return done, nil
		}, saga.Silence(2*time.Second)) // in real time: long enough for a machine that stalls
	})
	sagatest.For(t, def).Start("r", struct{}{}).Advance(time.Minute).Completed("r", 10)
	require.Equal(t, []int{0, 4}, began)
}

func TestActions_SkipRestartRetryNow(t *testing.T) {
	t.Parallel()
	var keys []string
	var broken atomic.Bool
	broken.Store(true)
	def := saga.Define("handled", func(s *saga.Run, _ struct{}) (string, error) {
		a, err := saga.Do(s, "a", func(step saga.Step) (string, error) {
			keys = append(keys, step.IdempotencyKey())
			return fmt.Sprint("a", len(keys)), nil
		})
		if err != nil {
			return "", err
		}
		b, err := saga.Do(s, "b", func(saga.Step) (string, error) {
			if broken.Load() {
				return "", errors.New("down")
			}
			return "b", nil
		}, saga.Backoff(day, day))
		if err != nil {
			return "", err
		}
		c, err := word.Wait(s, 0)
		return a + b + c, err
	})
	s := sagatest.For(t, def).Start("skipped", struct{}{}).Start("retried", struct{}{})
	ctx := t.Context()
	e := s.Engine()
	require.ErrorIs(t, e.Skip(ctx, "handled", "skipped", "do:b", nil, " "), eventstore.ErrInvalid)
	require.ErrorIs(t, e.Skip(ctx, "handled", "skipped", "do:a", nil, "why"), saga.ErrConflict)
	require.NoError(t, e.Skip(ctx, "handled", "skipped", "do:b", json.RawMessage(`"by hand"`), "done by hand"))
	s.Waiting("skipped", "word").Signal("skipped", "word", "!").Completed("skipped", "a1by hand!")
	broken.Store(false)
	require.NoError(t, e.RetryNow(ctx, "handled", "retried"))
	s.Waiting("retried", "word").Signal("retried", "word", "?").Completed("retried", "a2b?")

	require.ErrorIs(t, e.Restart(ctx, "handled", "retried", "do:none", "why"), saga.ErrNotFound)
	require.NoError(t, e.Restart(ctx, "handled", "retried", "do:a", "once more"))
	s.Completed("retried", "a3b?") // with the signal that it had got
	require.Len(t, unique(keys), 3)
	s.Restart()
	runs, err := s.Engine().List(ctx, "handled", saga.ListOptions{Status: []saga.Status{saga.StatusCompleted, saga.StatusRunning}})
	require.NoError(t, err)
	require.Len(t, runs, 2)
	require.Equal(t, t0.Year(), 2024)
	require.False(t, runs[0].Started.IsZero())
}

// TestActions_SkipInACompensation: a compensation that cannot succeed is done by
// hand, and the ones before it follow.
func TestActions_SkipInACompensation(t *testing.T) {
	t.Parallel()
	g := newGateway()
	def := saga.Define("stuck", func(s *saga.Run, _ struct{}) (int, error) {
		s.OnRollback("release", func(s *saga.Run) error {
			_, err := saga.Do(s, "release", func(step saga.Step) (int, error) { return 0, g.call("release", step.IdempotencyKey()) })
			return err
		})
		s.OnRollback("refund", func(s *saga.Run) error {
			if _, err := saga.Do(s, "find", func(step saga.Step) (int, error) { return 0, g.call("find", step.IdempotencyKey()) }); err != nil {
				return err
			}
			how, err := saga.Do(s, "refund", func(saga.Step) (string, error) { return "", saga.Terminal(errors.New("account closed")) })
			if err == nil && how != "by cheque" {
				err = errors.New("refunded " + how)
			}
			return err
		})
		return 0, errDeclined
	})
	s := sagatest.For(t, def).Start("r", struct{}{}).Blocked("r", "account closed")
	e := s.Engine()
	require.NoError(t, e.RetryNow(t.Context(), "stuck", "r"))
	s.Blocked("r", "account closed")
	require.ErrorIs(t, e.Skip(t.Context(), "stuck", "r", "do:find@refund", nil, "why"), saga.ErrConflict)
	require.NoError(t, e.Skip(t.Context(), "stuck", "r", "do:refund@refund", json.RawMessage(`"by cheque"`), "sent a cheque"))
	s.Failed("r", errDeclined, "refund", "release")
	require.Len(t, g.calls["find"], 1)
	require.Len(t, g.calls["release"], 1)
}

// TestCancel_OutlivesContinue: who continues anew is still to be cancelled, also
// when its new life alone is read.
func TestCancel_OutlivesContinue(t *testing.T) {
	t.Parallel()
	sagatest.CrashEverywhere(t, func() saga.Process {
		return saga.Define("stubborn", func(s *saga.Run, life int) (int, error) {
			if life == 0 {
				_, _ = word.Wait(s, 0) // it takes no notice
				return 0, s.Continue(1)
			}
			return life, s.Sleep("long", day)
		})
	}, func(s *sagatest.Spec) {
		s.Start("r", 0).Cancel("r", "enough").Cancelled("r")
	}, nil)
}

func TestVersion_MarkersAndTheirUse(t *testing.T) {
	t.Parallel()
	define := func(marker bool, remove bool) saga.Process {
		return saga.Define("marked", func(s *saga.Run, _ struct{}) ([]string, error) {
			var did []string
			step := func(name string) error {
				_, err := saga.Do(s, name, func(saga.Step) (int, error) { return 0, nil })
				did = append(did, name)
				return err
			}
			if err := step("first"); err != nil {
				return nil, err
			}
			if remove || marker && s.Version("check", 1) >= 1 {
				if err := step("check"); err != nil {
					return nil, err
				}
			}
			if _, err := word.Wait(s, 0); err != nil {
				return nil, err
			}
			return did, step("last")
		})
	}
	s := sagatest.For(t, define(false, false)).Start("old", struct{}{}).
		Deploy(define(true, false)).
		Start("new", struct{}{}).
		Waiting("old", "word").Waiting("new", "word")
	uses, err := s.Engine().Versions(t.Context(), "marked")
	require.NoError(t, err)
	require.Equal(t, []saga.VersionUse{{Name: "check", Version: 0, Open: 1, Example: "old"}, {Name: "check", Version: 1, Open: 1, Example: "new"}}, uses)
	s.Signal("old", "word", "go").Completed("old", []string{"first", "last"})
	uses, err = s.Engine().Versions(t.Context(), "marked")
	require.NoError(t, err)
	require.Equal(t, []saga.VersionUse{{Name: "check", Version: 1, Open: 1, Example: "new"}}, uses)
	// Nobody is below 1: the branch can go, and so can the marker.
	s.Deploy(define(true, true)).Waiting("new", "word").
		Signal("new", "word", "go").Completed("new", []string{"first", "check", "last"})
}

func TestRace_LoserEndsInItsStep(t *testing.T) {
	t.Parallel()
	began := make(chan struct{})
	var cause atomic.Value
	def := saga.Define("race", func(s *saga.Run, _ struct{}) (int, error) {
		winner, err := saga.Race(s, "first", func(s *saga.Run) error {
			s.OnRollback("undo slow", func(*saga.Run) error { return nil })
			_, err := saga.Do(s, "slow", func(step saga.Step) (int, error) {
				close(began)
				<-step.Done()
				cause.Store(context.Cause(step))
				return 0, context.Cause(step)
			})
			return err
		}, func(s *saga.Run) error {
			_, err := saga.Do(s, "fast", func(saga.Step) (int, error) { <-began; return 0, nil })
			return err
		})
		if err != nil {
			return 0, err
		}
		if err := s.Sleep("then", time.Hour); err != nil {
			return 0, err
		}
		return 0, fmt.Errorf("winner %d: %w", winner, errDeclined)
	})
	s := sagatest.For(t, def).Start("r", struct{}{}).Waiting("r", "then").
		Restart().
		Advance(time.Hour)
	s.Failed("r", errDeclined, "first.0@undo slow")
	require.Equal(t, saga.ErrLost, cause.Load())
}

func TestDeadline(t *testing.T) {
	t.Parallel()
	def := saga.Define("deadline", func(s *saga.Run, _ struct{}) (string, error) {
		said := ""
		err := saga.Deadline(s, "answer", time.Hour, func(s *saga.Run) (err error) {
			said, err = word.Wait(s, 0)
			return err
		})
		if errors.Is(err, saga.ErrTimeout) {
			return "too late", nil
		}
		return said, err
	})
	sagatest.For(t, def).Start("r", struct{}{}).Start("q", struct{}{}).
		Advance(59*time.Minute).Signal("q", "word", "hello").Completed("q", "hello").
		Advance(time.Minute).Completed("r", "too late")
}

func TestBranches_NestedWithEvents(t *testing.T) {
	t.Parallel()
	def := func() saga.Process {
		return saga.Define("nested", func(s *saga.Run, _ struct{}) ([]string, error) {
			got := make([]string, 4)
			await := func(i int) func(*saga.Run) error {
				return func(s *saga.Run) error {
					e, err := saga.Await[Shipped](s, saga.Where("o"), 0)
					got[i] = e.Parcel
					return err
				}
			}
			err := saga.All(s, "outer", await(0), func(s *saga.Run) error {
				return saga.All(s, "inner", await(1), await(2))
			}, await(3))
			slices.Sort(got)
			return got, err
		})
	}
	sagatest.CrashEverywhere(t, def, func(s *sagatest.Spec) {
		s.Start("r", struct{}{})
		for _, p := range []string{"a", "b", "c", "d"} {
			s.When("order", "o", Shipped{p}) // each goes to one of those that wait
		}
		s.Completed("r", []string{"a", "b", "c", "d"})
	}, nil)
}

func TestBranches_Misuse(t *testing.T) {
	t.Parallel()
	for reason, code := range map[string]func(s *saga.Run) error{
		//deed:deterministic the misuse is what is tested
		"with the run of another branch": func(s *saga.Run) error {
			return saga.All(s, "both", func(*saga.Run) error { return s.Sleep("of the parent", time.Hour) })
		},
		"no branches": func(s *saga.Run) error { return saga.All(s, "none") },
		"panicked: in a branch": func(s *saga.Run) error {
			return saga.All(s, "both", func(s *saga.Run) error { return s.Sleep("x", time.Hour) }, func(*saga.Run) error { panic("in a branch") })
		},
		//deed:deterministic the misuse is what is tested
		"steps do not nest": func(s *saga.Run) error {
			return saga.All(s, "both", func(s *saga.Run) error { return s.Sleep("x", time.Hour) }, func(s *saga.Run) error {
				_, err := saga.Do(s, "outer", func(saga.Step) (int, error) { return 0, s.Sleep("inner", time.Hour) })
				return err
			})
		},
	} {
		def := saga.Define("misuse", func(s *saga.Run, _ struct{}) (int, error) { return 0, code(s) })
		sagatest.For(t, def).Start("r", struct{}{}).Blocked("r", reason)
	}
}

func TestBranches_Mismatch(t *testing.T) {
	t.Parallel()
	define := func(names ...string) saga.Process {
		return saga.Define("branching", func(s *saga.Run, _ struct{}) (int, error) {
			var branches []func(*saga.Run) error
			for _, name := range names {
				branches = append(branches, func(s *saga.Run) error { return s.Sleep(name, time.Hour) })
			}
			return len(names), saga.All(s, "all", branches...)
		})
	}
	sagatest.For(t, define("a", "b")).Start("r", struct{}{}).
		Deploy(define("a", "c")).Advance(time.Hour).Blocked("r", `history has sleep "b" in branch "all.1", code asks sleep "c" in branch "all.1"`).
		Deploy(define("a")).Blocked("r", "with 2 branches, code has 1").
		Deploy(define("a", "b")).Completed("r", 2)
}

// TestBranches_StepsOverlap: two steps of one run are under way at the same time.
func TestBranches_StepsOverlap(t *testing.T) {
	t.Parallel()
	meet := make(chan struct{})
	step := func(s *saga.Run) error {
		_, err := saga.Do(s, "meet", func(step saga.Step) (int, error) {
			select {
			case meet <- struct{}{}:
			case <-meet:
			case <-step.Done():
				return 0, step.Err()
			}
			return 0, nil
		})
		return err
	}
	def := saga.Define("overlap", func(s *saga.Run, _ struct{}) (int, error) { return 2, saga.All(s, "both", step, step) })
	sagatest.For(t, def).Start("r", struct{}{}).Completed("r", 2)
}

func TestPublish_ListAndView(t *testing.T) {
	t.Parallel()
	def := saga.Define("public", func(s *saga.Run, customer string) (int, error) {
		s.Publish("customer", customer)
		s.Publish("progress", 1)
		if err := s.Sleep("work", time.Hour); err != nil {
			return 0, err
		}
		s.Publish("progress", 2)
		return 0, nil
	})
	b := startBench(t, memory.New(), clock.NewManual(t0), saga.Options{}, def)
	for i, customer := range []string{"ann", "bob", "ann"} {
		require.NoError(t, saga.Start(t.Context(), b.engine, def, fmt.Sprint(i), customer))
	}
	b.settle()
	runs, err := b.engine.List(t.Context(), "public", saga.ListOptions{Published: map[string]string{"customer": "ann", "progress": "1"}})
	require.NoError(t, err)
	require.Len(t, runs, 2)
	b.advance(2 * time.Hour)
	progress, ok, err := saga.View[int](t.Context(), b.engine, def, "1", "progress")
	require.NoError(t, err)
	require.True(t, ok)
	require.Equal(t, 2, progress)
	_, ok, err = saga.View[int](t.Context(), b.engine, def, "1", "nothing")
	require.NoError(t, err)
	require.False(t, ok)
}
