package saga_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

func TestDo_RetriesWithBackoff(t *testing.T) {
	t.Parallel()
	var times []time.Time
	var keys []string
	var attempts []int
	var spec *sagatest.Spec
	def := saga.Define("retry", func(s *saga.Run, _ int) (int, error) {
		return saga.Do(s, "call", func(step saga.Step) (int, error) {
			times = append(times, spec.Now())
			keys = append(keys, step.IdempotencyKey())
			attempts = append(attempts, step.Attempt())
			if len(times) < 12 {
				return 0, errors.New("down")
			}
			return len(times), nil
		})
	})
	spec = sagatest.For(t, def)
	spec.Start("r1", 0)
	require.Equal(t, []int{1}, attempts, "the first attempt is made at once, the second is not")
	info, err := saga.Look(t.Context(), spec.Engine(), def, "r1")
	require.NoError(t, err)
	require.Equal(t, saga.StatusWaiting, info.Status)
	require.Equal(t, 1, info.Attempts)
	require.Equal(t, "down", info.Error)
	spec.Restart().Advance(30*time.Minute).Restart().Advance(2*time.Hour).Completed("r1", 12)
	require.Equal(t, []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, attempts)
	for i := 1; i < len(times); i++ {
		require.Equal(t, keys[0], keys[i])
		nominal := min(time.Second<<(i-1), 5*time.Minute)
		require.InDelta(t, nominal, times[i].Sub(times[i-1]), 0.2*float64(nominal)+1, "pause after attempt %d", i)
	}
}

func TestDo_RetryLimitTerminalAndPanic(t *testing.T) {
	t.Parallel()
	errBase := errors.New("base")
	cases := map[string]struct {
		err     error
		calls   int32
		check   func(t *testing.T, err error)
		options []saga.StepOption
	}{
		"limit": {fmt.Errorf("wrapped: %w", errBase), 3, func(t *testing.T, err error) {
			require.ErrorIs(t, err, errBase)
			require.NotErrorIs(t, err, errDeclined)
			require.False(t, saga.IsTerminal(err))
			require.EqualError(t, err, `step "call": wrapped: base`)
		}, []saga.StepOption{saga.Retry(3)}},
		"terminal": {saga.Terminal(errBase), 1, func(t *testing.T, err error) {
			require.ErrorIs(t, err, errBase)
			require.True(t, saga.IsTerminal(err))
		}, nil},
		"rejection": {command.Rejectf("no: %w", errBase), 1, func(t *testing.T, err error) {
			require.ErrorIs(t, err, errBase)
			require.True(t, command.IsRejection(err))
			require.Contains(t, err.Error(), "no: base")
		}, nil},
		"panic": {nil, 2, func(t *testing.T, err error) {
			require.EqualError(t, err, `step "call": panic: boom`)
		}, []saga.StepOption{saga.Retry(2)}},
		"joined": {errors.Join(errBase, errDeclined), 1, func(t *testing.T, err error) {
			require.ErrorIs(t, err, errBase)
			require.ErrorIs(t, err, errDeclined)
		}, []saga.StepOption{saga.Retry(1)}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var calls atomic.Int32
			seen := 0
			def := saga.Define("limits", func(s *saga.Run, _ int) (string, error) {
				_, err := saga.Do(s, "call", func(saga.Step) (int, error) {
					calls.Add(1)
					if c.err == nil {
						panic("boom")
					}
					return 0, c.err
				}, c.options...)
				c.check(t, err) // the first time, and at each replay
				seen++
				if err := s.Sleep("then", time.Hour); err != nil {
					return "", err
				}
				return err.Error(), nil
			})
			s := sagatest.For(t, def).Start("r1", 0).Advance(30 * time.Minute).Restart().Advance(2 * time.Hour)
			info, err := saga.Look(t.Context(), s.Engine(), def, "r1")
			require.NoError(t, err)
			require.Equal(t, saga.StatusCompleted, info.Status)
			require.Equal(t, c.calls, calls.Load())
			require.GreaterOrEqual(t, seen, 2, "it was replayed")
		})
	}
}

func TestDo_Within(t *testing.T) {
	t.Parallel()
	def := saga.Define("within", func(s *saga.Run, _ int) (bool, error) {
		_, err := saga.Do(s, "call", func(step saga.Step) (int, error) {
			<-step.Done()
			return 0, step.Err()
		}, saga.Within(time.Millisecond), saga.Retry(2))
		return errors.Is(err, saga.ErrTimeout), nil
	})
	sagatest.For(t, def).Start("r1", 0).Advance(time.Hour).Completed("r1", true)
}

func TestExecute_RejectionReachesTheCode(t *testing.T) {
	t.Parallel()
	def := saga.Define("rejected", func(s *saga.Run, _ int) (string, error) {
		err := saga.Execute(s, "reserve", stocks, Reserve{"book", s.ID()})
		if !command.IsRejection(err) || !errors.Is(err, errSoldOut) {
			return "", fmt.Errorf("want a rejection, got %w", err)
		}
		if err := s.Sleep("a while", day); err != nil {
			return "", err
		}
		err = saga.Execute(s, "reserve", stocks, Reserve{"book", s.ID()})
		return "second time: " + fmt.Sprint(err), nil
	})
	sagatest.For(t, def).Start("r1", 0).
		Given("stock", "book", Stocked{1}).
		Restart().
		Advance(day).
		Completed("r1", "second time: <nil>").
		Happened("stock", "book", Reserved{"r1"})
}

// TestExecute_MetadataFlows: what a saga does can be traced to what started it.
func TestExecute_MetadataFlows(t *testing.T) {
	t.Parallel()
	def := saga.Define("trace", func(s *saga.Run, _ string) (int, error) {
		return 0, saga.Execute(s, "fill", stocks, Fill{"book", 1})
	}, saga.On(func(_ Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, "" }))
	b := newBench(t, def)
	ctx := command.WithActor(command.WithCorrelation(t.Context(), "request 7"), "ann")
	_, err := command.Execute(ctx, b.bus, orders, Place{"o1", "book"})
	require.NoError(t, err)
	b.settle()
	var placed string
	for r, err := range b.store.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		require.Equal(t, "request 7", r.Metadata.CorrelationID, r.Type)
		require.Equal(t, "ann", r.Metadata.Actor, r.Type)
		switch r.Type {
		case "order.placed":
			placed = r.ID.String()
		case "stock.stocked":
			require.Equal(t, "saga.trace-o1/execute:fill", r.Metadata.CausationID)
		default:
			require.Equal(t, placed, r.Metadata.CausationID)
		}
	}
}

func TestRollback_InReverseAndSettled(t *testing.T) {
	t.Parallel()
	var order []string
	undo := func(name string) func(*saga.Run) error {
		return func(s *saga.Run) error {
			_, err := saga.Do(s, "undo", func(saga.Step) (int, error) {
				order = append(order, name)
				return 0, nil
			})
			return err
		}
	}
	def := saga.Define("undo", func(s *saga.Run, settle bool) (int, error) {
		s.OnRollback("a", undo("a"))
		if settle {
			s.Settled()
		}
		s.OnRollback("b", undo("b"))
		s.OnRollback("b", undo("b again"))
		return 0, errDeclined
	})
	sagatest.For(t, def).Start("all", false).Failed("all", errDeclined, "b#2", "b", "a")
	require.Equal(t, []string{"b again", "b", "a"}, order)
	order = nil
	sagatest.For(t, def).Start("some", true).Failed("some", errDeclined, "b#2", "b")
	require.Equal(t, []string{"b again", "b"}, order)
}

// TestRollback_FailedCompensationBlocks: it is not skipped, those before it are
// not run, and Resume does only what has not succeeded.
func TestRollback_FailedCompensationBlocks(t *testing.T) {
	t.Parallel()
	var calls []string
	broken := true
	def := saga.Define("undo", func(s *saga.Run, _ int) (int, error) {
		s.OnRollback("first", func(s *saga.Run) error {
			_, err := saga.Do(s, "one", func(saga.Step) (int, error) { calls = append(calls, "first"); return 0, nil })
			return err
		})
		s.OnRollback("second", func(s *saga.Run) error {
			if _, err := saga.Do(s, "good", func(saga.Step) (int, error) { calls = append(calls, "good"); return 0, nil }); err != nil {
				return err
			}
			_, err := saga.Do(s, "bad", func(saga.Step) (int, error) {
				calls = append(calls, "bad")
				if broken {
					return 0, saga.Terminal(errors.New("no such account"))
				}
				return 0, nil
			})
			return err
		})
		return 0, errDeclined
	})
	s := sagatest.For(t, def).Start("r1", 0).
		Blocked("r1", `compensation "second" failed: step "bad": no such account`).
		Restart().
		Blocked("r1", `compensation "second" failed`)
	require.Equal(t, []string{"good", "bad"}, calls, "a restart does not try it again")
	s.Resume("r1").Blocked("r1", "no such account")
	require.Equal(t, []string{"good", "bad", "bad"}, calls)
	broken = false
	s.Resume("r1").Failed("r1", errDeclined, "second", "first")
	require.Equal(t, []string{"good", "bad", "bad", "bad", "first"}, calls)
}

// step makes a step that notes that it ran.
func step(s *saga.Run, ran *[]string, name string) error {
	_, err := saga.Do(s, name, func(saga.Step) (int, error) { *ran = append(*ran, name); return 0, nil })
	return err
}

// TestMismatch_BlocksVisibly: code that does not fit its history is stopped at
// the first difference, says it, compensates nothing, and goes on once the code
// fits.
func TestMismatch_BlocksVisibly(t *testing.T) {
	t.Parallel()
	type variant func(s *saga.Run, ran *[]string) error
	both := func(s *saga.Run, ran *[]string, names ...string) error {
		for _, name := range names {
			if err := step(s, ran, name); err != nil {
				return err
			}
		}
		return nil
	}
	cases := map[string]struct {
		code   variant
		reason string
	}{
		"renamed": {
			func(s *saga.Run, ran *[]string) error { return both(s, ran, "reserve", "charge") },
			`step 3: history has do "pay", code asks do "charge"`,
		},
		"removed": {
			func(s *saga.Run, ran *[]string) error { return both(s, ran, "pay") },
			`step 2: history has do "reserve", code asks do "pay"`,
		},
		"reordered": {
			func(s *saga.Run, ran *[]string) error { return both(s, ran, "pay", "reserve") },
			`step 2: history has do "reserve", code asks do "pay"`,
		},
		"added": {
			func(s *saga.Run, ran *[]string) error { return both(s, ran, "check", "reserve", "pay") },
			`step 2: history has do "reserve", code asks do "check"`,
		},
		"another kind": {
			func(s *saga.Run, _ *[]string) error { return s.Sleep("reserve", time.Hour) },
			`step 2: history has do "reserve", code asks sleep "reserve"`,
		},
		"occurrence": {
			func(s *saga.Run, ran *[]string) error { return both(s, ran, "reserve", "reserve") },
			`step 3: history has do "pay", code asks do "reserve" (occurrence 2)`,
		},
		"ends early": {
			func(s *saga.Run, ran *[]string) error { return errDeclined },
			`step 2: history has do "reserve", code asks rollback`,
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var ran []string
			undone := false
			version := func(code variant) *saga.Definition[int, string] {
				return saga.Define("versions", func(s *saga.Run, _ int) (string, error) {
					s.OnRollback("undo", func(*saga.Run) error { undone = true; return nil })
					if err := code(s, &ran); err != nil {
						return "", err
					}
					if err := s.Sleep("wait", day); err != nil {
						return "", err
					}
					return "done", step(s, &ran, "last")
				})
			}
			original := func(s *saga.Run, ran *[]string) error { return both(s, ran, "reserve", "pay") }
			s := sagatest.For(t, version(original)).Start("r1", 0).Waiting("r1", "wait").
				Deploy(version(c.code)).Waiting("r1", "wait"). // it sleeps; nothing needs the code yet
				Advance(day).
				Blocked("r1", c.reason)
			require.Equal(t, []string{"reserve", "pay"}, ran)
			require.False(t, undone)
			list, err := s.Engine().List(t.Context(), "versions", saga.ListOptions{Status: []saga.Status{saga.StatusBlocked}})
			require.NoError(t, err)
			require.Len(t, list, 1)
			require.Equal(t, c.reason, list[0].Error)
			_, err = saga.Wait(t.Context(), s.Engine(), version(c.code), "r1")
			require.ErrorIs(t, err, saga.ErrBlocked)
			require.ErrorContains(t, err, c.reason)

			events := len(historyOf(t, s, "r1"))
			s.Restart().Blocked("r1", c.reason)
			require.Len(t, historyOf(t, s, "r1"), events, "a restart with the same code adds nothing to the history")

			s.Deploy(version(original)).Completed("r1", "done")
			require.Equal(t, []string{"reserve", "pay", "last"}, ran)
			require.False(t, undone)
		})
	}
}

func historyOf(t *testing.T, s *sagatest.Spec, id string) []string {
	t.Helper()
	var types []string
	for name := range s.Streams() {
		if name.ID == id {
			for _, r := range s.Streams()[name] {
				types = append(types, r.Type)
			}
		}
	}
	return types
}

// TestMismatch_EndsEarly: code that ends before its history does is no less a
// mismatch, whether it returns a result or an error.
func TestMismatch_EndsEarly(t *testing.T) {
	t.Parallel()
	for name, result := range map[string]error{"completed": nil, "failed": errDeclined} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			version := func(long bool) *saga.Definition[int, int] {
				return saga.Define("short", func(s *saga.Run, _ int) (int, error) {
					var ran []string
					if err := step(s, &ran, "a"); err != nil || !long {
						return 0, errors.Join(err, result)
					}
					return 7, s.Sleep("wait", day)
				})
			}
			sagatest.For(t, version(true)).Start("r1", 0).Waiting("r1", "wait").
				Deploy(version(false)).Advance(day).
				Blocked("r1", `step 2: history has sleep "wait", code has ended`).
				Deploy(version(true)).
				Completed("r1", 7)
		})
	}
}

// TestMismatch_WhileAwaiting: a blocked run misses no event, and Resume is
// enough where the code was right again all along.
func TestMismatch_WhileAwaiting(t *testing.T) {
	t.Parallel()
	version := func(name string) *saga.Definition[int, string] {
		return saga.Define("awaiting", func(s *saga.Run, _ int) (string, error) {
			var ran []string
			if err := step(s, &ran, name); err != nil {
				return "", err
			}
			first, err := saga.Await[Shipped](s, saga.Where("o1"), 0)
			if err != nil {
				return "", err
			}
			second, err := saga.Await[Shipped](s, saga.Where("o1"), 10*day)
			return first.Parcel + second.Parcel, err
		})
	}
	sagatest.For(t, version("a")).Start("r1", 0).
		Deploy(version("b")).
		When("order", "o1", Shipped{"p1"}).
		Blocked("r1", `history has do "a", code asks do "b"`).
		When("order", "o1", Shipped{"p2"}).
		Deploy(version("a")).
		Completed("r1", "p1p2")
}

func TestMisuse_BlocksWithAMessage(t *testing.T) {
	t.Parallel()
	nothing := func(saga.Step) (int, error) { return 0, nil }
	cases := map[string]struct {
		code   func(s *saga.Run) error
		reason string
	}{
		//deed:deterministic the misuse is what is tested
		"foreign goroutine": {func(s *saga.Run) error {
			var group sync.WaitGroup
			group.Go(func() { _, _ = saga.Do(s, "x", nothing) })
			group.Wait()
			return nil
		}, `do "x" was called on another goroutine`},
		//deed:deterministic the misuse is what is tested
		"nested step": {func(s *saga.Run) error {
			_, err := saga.Do(s, "outer", func(saga.Step) (int, error) { return saga.Do(s, "inner", nothing) })
			return err
		}, `do "inner" was called inside step do "outer"`},
		"panic":      {func(*saga.Run) error { panic("boom") }, "the code panicked: boom"},
		"empty name": {func(s *saga.Run) error { return s.Sleep("", day) }, "the name is empty"},
		"result that does not encode": {func(s *saga.Run) error {
			_, err := saga.Do(s, "x", func(saga.Step) (func(), error) { return func() {}, nil })
			return err
		}, ""},
		"rollback in a rollback": {func(s *saga.Run) error {
			s.OnRollback("a", func(s *saga.Run) error {
				s.OnRollback("b", func(*saga.Run) error { return nil })
				return nil
			})
			return errDeclined
		}, `OnRollback("b") was called in compensation "a"`},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			def := saga.Define("misuse", func(s *saga.Run, _ int) (int, error) { return 0, c.code(s) })
			s := sagatest.For(t, def).Start("r1", 0)
			if c.reason == "" {
				s.Failed("r1", eventstore.ErrInvalid)
				return
			}
			s.Blocked("r1", c.reason)
		})
	}
}

// TestUnwinding: what is put aside runs its deferred functions; saga calls in
// them do nothing.
func TestUnwinding(t *testing.T) {
	t.Parallel()
	var deferred []error
	def := saga.Define("deferred", func(s *saga.Run, _ int) (int, error) {
		defer func() {
			_, err := saga.Do(s, "cleanup", func(saga.Step) (int, error) { return 1, nil })
			deferred = append(deferred, err)
		}()
		return 7, s.Sleep("wait", day)
	})
	sagatest.For(t, def).Start("r1", 0).Waiting("r1", "wait").
		Advance(day).
		Completed("r1", 7).
		History("r1", "saga.started", "saga.timer_set", "saga.timer_fired", "saga.step_succeeded", "saga.completed")
	require.Equal(t, []error{saga.ErrUnwinding, nil}, deferred)
}

func TestStart_OncePerID(t *testing.T) {
	t.Parallel()
	var runs atomic.Int32
	def := saga.Define("once", func(s *saga.Run, in string) (string, error) {
		_, err := saga.Do(s, "count", func(saga.Step) (int, error) { return int(runs.Add(1)), nil })
		return in, err
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) {
		if e.SKU == "ignored" {
			return "", ""
		}
		return r.Stream.ID, e.SKU
	}))
	story := sagatest.For(t, def).
		Start("o1", "first").
		Start("o1", "first")
	require.ErrorIs(t, saga.Start(t.Context(), story.Engine(), def, "o1", "second"), saga.ErrStarted)
	story.
		When("order", "o1", Placed{"third"}, Placed{"fourth"}).
		Completed("o1", "first").
		Restart().
		When("order", "o1", Placed{"fifth"}).
		Completed("o1", "first").
		When("order", "o2", Placed{"a"}, Placed{"b"}).
		Completed("o2", "a").
		When("order", "o3", Placed{"ignored"}).
		NotStarted("o3")
	require.Equal(t, int32(2), runs.Load())
}

// TestConflict_FirstRecordWins: of two engines at one run, one records, and the
// other goes by what was recorded.
func TestConflict_FirstRecordWins(t *testing.T) {
	t.Parallel()
	store := memory.New()
	entered, release := make(chan struct{}, 2), make(chan struct{})
	var calls atomic.Int32
	zombieDone := make(chan struct{})
	define := func() *saga.Definition[int, string] {
		return saga.Define("fenced", func(s *saga.Run, _ int) (string, error) {
			who, err := saga.Do(s, "charge", func(saga.Step) (string, error) {
				if calls.Add(1) == 1 {
					defer close(zombieDone)
					entered <- struct{}{}
					<-release
					return "first", nil
				}
				return "second", nil
			})
			return who, err
		})
	}
	c := clock.NewManual(t0)
	first := startBench(t, store, c, saga.Options{Owner: "node", Grace: 10 * time.Second}, define())
	require.NoError(t, saga.Start(t.Context(), first.engine, define(), "r1", 0))
	<-entered
	// The same owner again: its lease is renewed at once, and fences the first engine.
	second := startBench(t, store, c, saga.Options{Owner: "node"}, define())
	out, err := saga.Wait(t.Context(), second.engine, define(), "r1")
	require.NoError(t, err)
	require.Equal(t, "second", out)
	close(release)
	<-zombieDone
	second.settle()
	ended := saga.ListOptions{Status: []saga.Status{saga.StatusCompleted}}
	_, err = second.engine.List(t.Context(), "fenced", ended)
	require.NoError(t, err)
	listed, err := first.engine.List(t.Context(), "fenced", ended)
	require.NoError(t, err)
	require.Len(t, listed, 1, "the first engine can store nothing any more, and says what the second one has stored")
	out, err = saga.Wait(t.Context(), second.engine, define(), "r1")
	require.NoError(t, err)
	require.Equal(t, "second", out)
	require.Equal(t, []string{"saga.started", "saga.step_succeeded", "saga.completed"}, second.types(history("fenced", "r1")))

	// It stands by now, and is back when the second one stops.
	require.NoError(t, errors.Join(second.stop()...))
	require.NoError(t, saga.Start(t.Context(), first.engine, define(), "r2", 0))
	out, err = saga.Wait(t.Context(), first.engine, define(), "r2")
	require.NoError(t, err)
	require.Equal(t, "second", out)
	require.Equal(t, int32(3), calls.Load())
	require.NoError(t, errors.Join(first.stop()...))
}

// TestStop_WhileAStepRuns: Run returns, nothing is recorded of what did not
// end, and the next engine does it.
func TestStop_WhileAStepRuns(t *testing.T) {
	t.Parallel()
	entered := make(chan struct{})
	var calls atomic.Int32
	def := saga.Define("stopped", func(s *saga.Run, _ int) (string, error) {
		return saga.Do(s, "call", func(step saga.Step) (string, error) {
			if calls.Add(1) == 1 {
				close(entered)
				<-step.Done()
				return "", fmt.Errorf("cut off: %w", context.Cause(step))
			}
			return "done", nil
		}, saga.Retry(1))
	})
	b := startBench(t, memory.New(), clock.NewManual(t0), saga.Options{Grace: time.Millisecond}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r1", 0))
	<-entered
	b = b.restart(def)
	b.settle()
	out, err := saga.Wait(t.Context(), b.engine, def, "r1")
	require.NoError(t, err)
	require.Equal(t, "done", out, "an attempt that was cut off does not count")
	require.Equal(t, int32(2), calls.Load())
}

// TestStop_StepsMayEnd: a step that ends within the grace is recorded.
func TestStop_StepsMayEnd(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	var calls atomic.Int32
	def := saga.Define("stopped", func(s *saga.Run, _ int) (string, error) {
		return saga.Do(s, "call", func(saga.Step) (string, error) {
			calls.Add(1)
			close(entered)
			<-release
			return "done", nil
		})
	})
	b := startBench(t, memory.New(), clock.NewManual(t0), saga.Options{Grace: time.Minute}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r1", 0))
	<-entered
	stopped := make(chan []error)
	go func() { stopped <- b.stop() }()
	close(release)
	for _, err := range <-stopped {
		require.NoError(t, err)
	}
	require.Equal(t, []string{"saga.started", "saga.step_succeeded", "saga.completed"}, b.types(history("stopped", "r1")))
	require.Equal(t, int32(1), calls.Load())
}
