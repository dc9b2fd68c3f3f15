package aggregate_test

import (
	"context"
	"runtime"
	"runtime/debug"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

// rested runs the test with ann's account in memory, at rest, with a deposit of
// 100: the next caller leads its decision itself.
func rested(t *testing.T, test func(t *testing.T, g *gate, r *aggregate.Runtime)) {
	t.Helper()
	gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		first := start(t, r, on("ann", deposit(100)))
		g.next(t).release()
		first.succeeds(t)
		test(t, g, r)
	})
}

func TestLead(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]func(t *testing.T, g *gate, r *aggregate.Runtime){
		"OnItsOwnGoroutine": func(t *testing.T, g *gate, r *aggregate.Runtime) {
			var stack string
			c := start(t, r, on("ann", func(a account) ([]aggregate.Event, error) {
				stack = string(debug.Stack())
				return withdraw(100)(a)
			}))
			require.Contains(t, stack, "aggregate.Execute[", "another goroutine decided")
			g.next(t).release()
			require.Equal(t, eventstore.Revision{Version: 2, Position: 2}, c.succeeds(t).Revision(ann))
		},
		"AnotherCallerComes": func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", withdraw(60)))
			second := start(t, r, on("ann", withdraw(60)))
			third := start(t, r, on("ann", withdraw(40)))
			a, b := g.next(t), g.next(t)
			require.Equal(t, []eventstore.Condition{eventstore.StreamAtEvent(ann, 2, a.Events[0].ID)}, b.Conditions)
			second.waits(t, "what it saw is not durable")
			a.release()
			first.succeeds(t)
			second.fails(t, errInsufficient)
			third.waits(t, "its commit is held")
			b.release()
			third.succeeds(t)
		},
		"Conflict": func(t *testing.T, g *gate, r *aggregate.Runtime) {
			c := start(t, r, on("ann", withdraw(100)))
			g.foreign(t, 5)
			g.next(t).release()
			c.waits(t, "another writer came first")
			g.next(t).release()
			c.succeeds(t)
			require.Equal(t, 2, c.decided)
		},
		"TheCallerLeaves": func(t *testing.T, g *gate, r *aggregate.Runtime) {
			c := start(t, r, on("ann", withdraw(70)))
			c.cancel()
			c.fails(t, eventstore.ErrOutcomeUnknown)
			require.ErrorIs(t, c.err, context.Canceled)
			g.next(t).release()
			start(t, r, on("ann", withdraw(31))).fails(t, errInsufficient)
		},
		"OutcomeUnknown": func(t *testing.T, g *gate, r *aggregate.Runtime) {
			c := start(t, r, on("ann", withdraw(70)))
			g.next(t).lose()
			require.Equal(t, eventstore.Revision{Version: 2, Position: 2}, c.succeeds(t).Revision(ann))
			require.Equal(t, 1, c.decided)
		},
		"Refusal": func(t *testing.T, g *gate, r *aggregate.Runtime) {
			start(t, r, on("ann", withdraw(101))).fails(t, errInsufficient)
			g.foreign(t, 1)
			c := start(t, r, on("ann", withdraw(101)))
			require.Equal(t, 2, c.decided, "the log had news")
			g.next(t).release()
			c.succeeds(t)
		},
		"DecideEndsTheGoroutine": func(t *testing.T, g *gate, r *aggregate.Runtime) {
			c := start(t, r, on("ann", func(account) ([]aggregate.Event, error) { runtime.Goexit(); return nil, nil }))
			require.Equal(t, 1, c.decided)
			next := start(t, r, on("ann", withdraw(100)))
			g.next(t).release()
			next.succeeds(t)
		},
		"Abandoned": func(t *testing.T, g *gate, r *aggregate.Runtime) {
			c := start(t, r, on("ann", withdraw(100)))
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			require.ErrorContains(t, r.Stop(ended), `"account-ann"`)
			c.fails(t, eventstore.ErrOutcomeUnknown)
			require.ErrorIs(t, c.err, aggregate.ErrStopped)
		},
		"WithAKey": func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, keyed("ann", "k", withdraw(70)))
			second := start(t, r, keyed("ann", "k", withdraw(70)))
			g.next(t).release()
			receipt := first.succeeds(t)
			receipt.Duplicate = true
			require.Equal(t, receipt, second.succeeds(t))
			require.Zero(t, second.decided)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rested(t, test)
		})
	}
}

// slow is a store that cannot be handed appends, and whose appends take as long
// as the test likes.
type slow struct {
	eventstore.Store
	hold chan struct{}
}

func (s *slow) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if s.hold != nil {
		<-s.hold
	}
	return s.Store.Append(ctx, c)
}

// A caller can leave while its commit is under way, on every store.
func TestExecute_CallerLeavesASlowStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &slow{Store: memory.New()}
		r := aggregate.NewRuntime(s, aggregate.Options{})
		start(t, r, on("ann", deposit(100))).succeeds(t)
		s.hold = make(chan struct{})
		c := start(t, r, on("ann", deposit(1)))
		c.cancel()
		synctest.Wait()
		left := c.done
		close(s.hold)
		synctest.Wait()
		require.NoError(t, r.Stop(t.Context()))
		require.True(t, left, "it waited for the store")
		require.ErrorIs(t, c.err, eventstore.ErrOutcomeUnknown)
	})
}
