package saga_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

// gateway counts the calls of each step by idempotency key.
type gateway struct {
	mu    sync.Mutex
	calls map[string][]string // step -> keys, in order
	fail  map[string]int      // step -> how many calls fail
	order []string
}

func newGateway() *gateway { return &gateway{calls: map[string][]string{}, fail: map[string]int{}} }

var errDeclined = errors.New("card declined")

func (g *gateway) call(step string, key string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls[step] = append(g.calls[step], key)
	g.order = append(g.order, step)
	if g.fail[step] > 0 {
		g.fail[step]--
		return fmt.Errorf("%s: gateway is down", step)
	}
	return nil
}

// sameKey demands that the step was called, and always with the same key.
func (g *gateway) sameKey(t testing.TB, step string) {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	require.NotEmpty(t, g.calls[step], "step %q never ran", step)
	for _, key := range g.calls[step] {
		require.Equal(t, g.calls[step][0], key, "step %q changed its key", step)
	}
}

// checkout is the saga of the design page.
func checkout(g *gateway, decline bool) *saga.Definition[string, string] {
	return saga.Define("checkout", func(s *saga.Run, sku string) (string, error) {
		if err := saga.Execute(s, "reserve", stocks, Reserve{sku, s.ID()}); err != nil {
			return "", err
		}
		s.OnRollback("release", func(s *saga.Run) error {
			return saga.Execute(s, "release", stocks, Release{sku, s.ID()})
		})
		s.OnRollback("refund", func(s *saga.Run) error {
			_, err := saga.Do(s, "refund", func(ctx saga.Step) (struct{}, error) {
				return struct{}{}, g.call("refund", ctx.IdempotencyKey())
			})
			return err
		})
		charge, err := saga.Do(s, "charge", func(ctx saga.Step) (string, error) {
			if decline {
				_ = g.call("charge", ctx.IdempotencyKey())
				return "", saga.Terminal(errDeclined)
			}
			return "c1", g.call("charge", ctx.IdempotencyKey())
		})
		if err != nil {
			return "", err
		}
		shipped, err := saga.Await[Shipped](s, saga.Where(s.ID()), 14*day)
		if err != nil {
			return "", err
		}
		s.Settled()
		_, err = saga.Do(s, "mail", func(ctx saga.Step) (struct{}, error) {
			return struct{}{}, g.call("mail", ctx.IdempotencyKey())
		})
		return charge + " " + shipped.Parcel, err
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
}

func TestCrash_CompletedCheckout(t *testing.T) {
	t.Parallel()
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			crashCompletedCheckout(t, sagatest.On(func(t testing.TB) sagatest.Backend { return b.open(t) }))
		})
	}
}

func crashCompletedCheckout(t *testing.T, on sagatest.Option) {
	var g *gateway
	sagatest.CrashEverywhere(t,
		func() sagatest.Process {
			g = newGateway()
			g.fail["charge"] = 2
			g.fail["mail"] = 1
			return checkout(g, false)
		},
		func(s *sagatest.Spec) {
			s.Given("stock", "book", Stocked{1}).
				When("order", "o1", Placed{"book"}).
				Advance(time.Hour).
				When("order", "o1", Shipped{"p1"}).
				Advance(time.Hour).
				Completed("o1", "c1 p1").
				Happened("stock", "book", Reserved{"o1"})
		},
		func(t testing.TB) {
			g.sameKey(t, "charge")
			g.sameKey(t, "mail")
			require.Empty(t, g.calls["refund"])
		}, on)
}

func TestCrash_FailedCheckout(t *testing.T) {
	t.Parallel()
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			crashFailedCheckout(t, sagatest.On(func(t testing.TB) sagatest.Backend { return b.open(t) }))
		})
	}
}

func crashFailedCheckout(t *testing.T, on sagatest.Option) {
	var g *gateway
	sagatest.CrashEverywhere(t,
		func() sagatest.Process { g = newGateway(); g.fail["refund"] = 2; return checkout(g, true) },
		func(s *sagatest.Spec) {
			s.Given("stock", "book", Stocked{1}).
				When("order", "o1", Placed{"book"}).
				Advance(time.Hour).
				Failed("o1", errDeclined, "refund", "release").
				Happened("stock", "book", Reserved{"o1"}, Released{"o1"})
		},
		func(t testing.TB) {
			g.sameKey(t, "charge")
			g.sameKey(t, "refund")
			// Reversed: the first refund comes after the charge.
			require.Equal(t, "charge", g.order[0])
			require.Equal(t, "refund", g.order[len(g.order)-1])
		}, on)
}

func TestCrash_Timeout(t *testing.T) {
	t.Parallel()
	var g *gateway
	sagatest.CrashEverywhere(t,
		func() sagatest.Process { g = newGateway(); return checkout(g, false) },
		func(s *sagatest.Spec) {
			s.Given("stock", "book", Stocked{1}).
				When("order", "o1", Placed{"book"}).
				Advance(14*day).
				Failed("o1", saga.ErrTimeout, "refund", "release").
				Happened("stock", "book", Reserved{"o1"}, Released{"o1"}).
				When("order", "o1", Shipped{"late"}).
				Failed("o1", saga.ErrTimeout, "refund", "release")
		}, nil)
}

func TestCrash_TimerThenExecute(t *testing.T) {
	t.Parallel()
	def := func() sagatest.Process {
		return saga.Define("grace", func(s *saga.Run, sku string) (time.Time, error) {
			if err := s.Sleep("grace", 60*day); err != nil {
				return time.Time{}, err
			}
			return s.Now(), saga.Execute(s, "fill", stocks, Fill{sku, int(s.Now().Sub(t0)/day) - 60})
		}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
	}
	sagatest.CrashEverywhere(t, def, func(s *sagatest.Spec) {
		s.When("order", "o1", Placed{"book"}).
			Advance(60*day-time.Nanosecond).
			Waiting("o1", `sleep "grace"`).
			Advance(time.Nanosecond).
			Completed("o1", t0.Add(60*day)).
			Happened("stock", "book", Stocked{0})
	}, nil, sagatest.At(t0))
}

func TestCrash_Reaction(t *testing.T) {
	t.Parallel()
	var g *gateway
	sagatest.CrashEverywhere(t,
		func() sagatest.Process {
			g = newGateway()
			g.fail["mail o1"] = 2
			return saga.React("welcome", func(step saga.Step, e Placed) error {
				id := step.Event().Stream.ID
				// The mail fails after the command: each attempt sends it again.
				if err := saga.Send(step, stocks, Fill{e.SKU, 1}); err != nil {
					return err
				}
				return g.call("mail "+id, step.IdempotencyKey())
			})
		},
		func(s *sagatest.Spec) {
			s.When("order", "o1", Placed{"book"}).
				When("order", "o2", Placed{"pen"}).
				Advance(time.Hour).
				Happened("stock", "book", Stocked{1}).
				Happened("stock", "pen", Stocked{1})
		},
		func(t testing.TB) {
			g.sameKey(t, "mail o1")
			g.sameKey(t, "mail o2")
		})
}

// TestCrash_RepeatsOneStepAtMost: a result is durable before the next effect, so
// a crash repeats at most the step that was under way.
func TestCrash_RepeatsOneStepAtMost(t *testing.T) {
	t.Parallel()
	var g *gateway
	sagatest.CrashEverywhere(t,
		func() sagatest.Process {
			g = newGateway()
			return saga.Define("three", func(s *saga.Run, _ int) (int, error) {
				for _, name := range []string{"one", "two", "three"} {
					if _, err := saga.Do(s, name, func(step saga.Step) (int, error) { return 0, g.call(name, step.IdempotencyKey()) }); err != nil {
						return 0, err
					}
				}
				return 3, nil
			})
		},
		func(s *sagatest.Spec) { s.Start("r1", 0).Completed("r1", 3) },
		func(t testing.TB) {
			require.LessOrEqual(t, len(g.order), 4, "%q", g.order)
		})
}

// TestCrash_RejectionIsNotJudgedAgain: the saga acts on a rejection; after a
// crash the command would no longer be rejected, but the code must not learn.
func TestCrash_RejectionIsNotJudgedAgain(t *testing.T) {
	t.Parallel()
	sagatest.CrashEverywhere(t,
		func() sagatest.Process {
			return saga.Define("refill", func(s *saga.Run, sku string) (string, error) {
				err := saga.Execute(s, "reserve", stocks, Reserve{sku, s.ID()})
				if err == nil {
					return "had one", nil
				}
				return "filled up", saga.Execute(s, "fill", stocks, Fill{sku, 1})
			})
		},
		func(s *sagatest.Spec) {
			s.Start("r1", "book").Completed("r1", "filled up").Happened("stock", "book", Stocked{1})
		}, nil)
}

// TestNow_IsDurableBeforeItIsUsed: the time that a command was made of does not
// change when its record is lost.
func TestNow_IsDurableBeforeItIsUsed(t *testing.T) {
	t.Parallel()
	def := saga.Define("clocked", func(s *saga.Run, _ string) (string, error) {
		if err := s.Sleep("a day", day); err != nil {
			return "", err
		}
		at := s.Now().Format(time.RFC3339)
		return at, saga.Execute(s, "place", orders, Place{s.ID(), at})
	})
	c := clock.NewManual(t0)
	store := &forgetful{Store: memory.New(), clock: c}
	b := startBench(t, store, c, saga.Options{}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r1", ""))
	b.advance(day)
	out, err := saga.Wait(t.Context(), b.engine, def, "r1")
	require.NoError(t, err)
	require.Equal(t, "2024-01-02T00:00:00Z", out)
	require.True(t, store.lost, "the record was lost once")
}

// forgetful loses the first record of a run's end, an hour passes, and the run
// goes on.
type forgetful struct {
	*memory.Store
	clock *clock.Manual
	lost  bool
}

func (f *forgetful) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if !f.lost && c.Events[len(c.Events)-1].Type == "saga.completed" {
		f.lost = true
		f.clock.Set(f.clock.Now().Add(time.Hour))
		return eventstore.Receipt{}, errors.New("the disk is slow")
	}
	return f.Store.Append(ctx, c)
}
