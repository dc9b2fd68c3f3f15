package aggregate_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

func nothing(account) ([]aggregate.Event, error) { return nil, nil }

var errRich = errors.New("too rich")

// unlessRich refuses when there is money, else deposits.
func unlessRich(cents int64) func(account) ([]aggregate.Event, error) {
	return func(a account) ([]aggregate.Event, error) {
		if a.Cents > 0 {
			return nil, errRich
		}
		return aggregate.Events(deposited{Cents: cents}), nil
	}
}

// Rule: each dependent commit carries its own expected revision.
func TestPipeline_OwnExpectedRevision(t *testing.T) {
	t.Parallel()

	t.Run("EachFollowsItsPredecessor", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			var calls []*running
			for i := range 3 {
				calls = append(calls, start(t, r, on("ann", deposit(int64(i)))))
			}
			a, b, c := g.next(t), g.next(t), g.next(t)
			require.Equal(t, []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}, a.Conditions)
			require.Equal(t, []eventstore.Condition{eventstore.StreamAtEvent(ann, 1, a.Events[0].ID)}, b.Conditions)
			require.Equal(t, []eventstore.Condition{eventstore.StreamAtEvent(ann, 2, b.Events[0].ID)}, c.Conditions)
			a.release()
			b.release()
			calls[0].succeeds(t)
			require.Equal(t, eventstore.Revision{Version: 2, Position: 2}, calls[1].succeeds(t).Revision(ann))
			calls[2].waits(t, "its commit is held")
			c.release()
			require.Equal(t, eventstore.Revision{Version: 3, Position: 3}, calls[2].succeeds(t).Revision(ann))
			start(t, r, on("ann", deposit(3)))
			d := g.next(t)
			require.Equal(t, []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: 3, Position: 3})}, d.Conditions, "nothing on its way: the position is known")
			d.release()
		})
	})

	// The foreign commit has as many events as the one that loses, so the version
	// alone would let the dependent commit pass.
	t.Run("AForeignCommitOfEqualLength", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(100)))
			second := start(t, r, on("ann", withdraw(100)))
			a, b := g.next(t), g.next(t)
			g.foreign(t, 1)
			a.release()
			b.release()
			require.Equal(t, []string{`account.deposited{"Cents":1}`}, g.history(t), "neither was decided on this history")
			g.pass()
			first.succeeds(t)
			second.succeeds(t)
			require.Equal(t, []string{`account.deposited{"Cents":1}`, `account.deposited{"Cents":100}`, `account.withdrawn{"Cents":100}`}, g.history(t))
		})
	})
}

// Rule: a rejection, a no-op or a result is held back until every event it saw
// is durable, and decided again if one of them fails.
func TestPipeline_AnswersWaitForWhatTheySaw(t *testing.T) {
	t.Parallel()

	t.Run("RejectionHeldBack", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(100)))
			rejected := start(t, r, on("ann", unlessRich(7)))
			noop := start(t, r, on("ann", nothing))
			require.Equal(t, 1, rejected.decided)
			rejected.waits(t, "the deposit it saw is not durable")
			noop.waits(t, "the deposit it saw is not durable")
			g.next(t).release()
			first.succeeds(t)
			rejected.fails(t, errRich)
			require.Equal(t, eventstore.Receipt{Last: 1, Revisions: []eventstore.StreamRevision{{Stream: ann, Revision: eventstore.Revision{Version: 1, Position: 1}}}}, noop.succeeds(t))
		})
	})

	t.Run("DecidedAgainWhenItFails", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(100)))
			rejected := start(t, r, on("ann", unlessRich(7)))
			g.next(t).fail(eventstore.ErrTooLarge)
			first.fails(t, eventstore.ErrTooLarge)
			rejected.waits(t, "it must decide again, on the state without the deposit")
			g.next(t).release()
			rejected.succeeds(t)
			require.Equal(t, 2, rejected.decided)
			require.Equal(t, []string{`account.deposited{"Cents":7}`}, g.history(t))
		})
	})

	t.Run("NoOpDecidedAgainWhenItFails", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(100)))
			topUp := start(t, r, on("ann", func(a account) ([]aggregate.Event, error) {
				if a.Cents >= 100 {
					return nil, nil
				}
				return aggregate.Events(deposited{Cents: 100 - a.Cents}), nil
			}))
			g.next(t).fail(eventstore.ErrInvalid)
			first.fails(t, eventstore.ErrInvalid)
			g.pass()
			require.Equal(t, eventstore.Position(1), topUp.succeeds(t).First)
		})
	})

	t.Run("ResultNotBeforeItsPredecessor", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(1)))
			second := start(t, r, on("ann", deposit(2)))
			a, b := g.next(t), g.next(t)
			receipt, err := b.store.Append(t.Context(), eventstore.Commit{Events: a.Events})
			require.NoError(t, err)
			second2, err := b.store.Append(t.Context(), b.Commit)
			require.NoError(t, err)
			b.resolve(second2, nil)
			second.waits(t, "the commit before it is not known to be durable")
			a.resolve(receipt, nil)
			first.succeeds(t)
			second.succeeds(t)
		})
	})
}

// Rule: a conflict or duplicate before it drops the cache, reloads and decides
// the remaining calls again, in order.
func TestPipeline_ConflictOrDuplicateDecidesAgainInOrder(t *testing.T) {
	t.Parallel()

	t.Run("Conflict", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			var calls []*running
			for i := range 5 {
				calls = append(calls, start(t, r, on("ann", func(a account) ([]aggregate.Event, error) {
					return aggregate.Events(deposited{Cents: int64(i + 1), Notes: []string{fmt.Sprintf("saw %d", a.Cents)}}), nil
				})))
			}
			g.foreign(t, 1000)
			g.pass()
			want := []string{`account.deposited{"Cents":1000}`}
			for i, saw := range []int{1000, 1001, 1003, 1006, 1010} {
				calls[i].succeeds(t)
				want = append(want, fmt.Sprintf(`account.deposited{"Cents":%d,"Notes":["saw %d"]}`, i+1, saw))
			}
			require.Equal(t, want, g.history(t))
		})
	})

	t.Run("Duplicate", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, keyed("ann", "k", deposit(100)))
			second := start(t, r, on("ann", withdraw(150)))
			third := start(t, r, on("ann", func(a account) ([]aggregate.Event, error) {
				return aggregate.Events(opened{fmt.Sprintf("saw %d", a.Cents)}), nil
			}))
			require.False(t, second.done)
			// The same request, executed by another process.
			a := g.next(t)
			other := eventstore.Commit{Key: "k", Fingerprint: a.Fingerprint, Events: []eventstore.Event{{Stream: ann, Type: "account.deposited", Data: []byte(`{"Cents":200}`)}}}
			_, err := g.Append(t.Context(), other)
			require.NoError(t, err)
			a.release()
			g.pass()
			require.True(t, first.succeeds(t).Duplicate)
			second.succeeds(t)
			third.succeeds(t)
			require.Equal(t, 2, second.decided)
			require.Equal(t, []string{`account.deposited{"Cents":200}`, `account.withdrawn{"Cents":150}`, `account.opened{"Owner":"saw 50"}`}, g.history(t))
		})
	})

	t.Run("AttemptsAreBounded", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{Attempts: 3}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(1)))
			second := start(t, r, on("ann", deposit(2)))
			for range 3 {
				synctest.Wait()
				g.foreign(t, 10)
				for range len(g.held) {
					g.next(t).release()
				}
			}
			first.fails(t, eventstore.ErrConflict)
			require.ErrorContains(t, first.err, `decided 3 times on "account-ann"`)
			conflict, ok := errors.AsType[*eventstore.ConflictError](first.err)
			require.True(t, ok)
			require.Equal(t, uint64(3), conflict.Actual.Version)
			g.pass()
			second.succeeds(t)
		})
	})
}

// Rule: an unknown outcome stalls the aggregate until it is resolved.
func TestPipeline_UnknownOutcome(t *testing.T) {
	t.Parallel()

	t.Run("Written", func(t *testing.T) {
		t.Parallel()
		for _, key := range []string{"", "k"} {
			gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
				first := start(t, r, keyed("ann", key, deposit(1)))
				second := start(t, r, on("ann", deposit(2)))
				a := g.next(t)
				a.lose()
				receipt := first.succeeds(t)
				require.False(t, receipt.Duplicate)
				require.Equal(t, eventstore.Position(1), receipt.Last)
				require.Equal(t, eventstore.Revision{Version: 1, Position: 1}, receipt.Revision(ann))
				g.next(t).release()
				second.succeeds(t)
				require.Equal(t, 1, second.decided, "nothing failed")
				require.Len(t, g.history(t), 2)
			})
		}
	})

	t.Run("NotWrittenIsAppendedAgainUnchanged", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", func(account) ([]aggregate.Event, error) {
				return aggregate.Events(opened{"Ann"}, deposited{Cents: 1}), nil
			}))
			second := start(t, r, on("ann", deposit(2)))
			a, b := g.next(t), g.next(t)
			a.fail(eventstore.ErrOutcomeUnknown)
			again := g.next(t)
			require.Equal(t, a.Commit, again.Commit)
			g.none(t)
			again.release()
			b.release()
			first.succeeds(t)
			second.succeeds(t)
			require.Equal(t, 1, first.decided)
			require.Len(t, g.history(t), 3)
		})
	})

	t.Run("ArrivesLateAfterAll", func(t *testing.T) {
		t.Parallel()
		for _, key := range []string{"", "k"} {
			gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
				first := start(t, r, keyed("ann", key, deposit(1)))
				a := g.next(t)
				a.fail(eventstore.ErrOutcomeUnknown)
				again := g.next(t)
				_, err := a.store.Append(t.Context(), a.Commit) // the first try was still on its way
				require.NoError(t, err)
				again.release()
				time.Sleep(time.Second) // of the bubble: the pause before looking again
				require.False(t, first.succeeds(t).Duplicate)
				require.Equal(t, 1, first.decided)
				require.Len(t, g.history(t), 1)
			})
		}
	})

	t.Run("LostToAnother", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(1)))
			g.foreign(t, 10)
			g.next(t).fail(eventstore.ErrOutcomeUnknown)
			g.next(t).release()
			first.succeeds(t)
			require.Equal(t, 2, first.decided)
			require.Len(t, g.history(t), 2)
		})
	})

	t.Run("StallsUntilResolved", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(1)))
			broken := errors.New("network down")
			var down atomic.Bool
			down.Store(true)
			g.beforeRead = func(context.Context) error {
				if down.Load() {
					return broken
				}
				return nil
			}
			a := g.next(t)
			a.lose()
			second := start(t, r, on("ann", deposit(2)))
			time.Sleep(time.Minute) // of the bubble
			first.waits(t, "the outcome cannot be known yet")
			second.waits(t, "the aggregate stands still")
			require.Zero(t, second.decided)
			down.Store(false)
			time.Sleep(time.Minute)
			first.succeeds(t)
			g.pass()
			second.succeeds(t)
			require.Len(t, g.history(t), 2)
		})
	})

	t.Run("StopGivesUp", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			onItsWay := start(t, r, on("ann", deposit(1)))
			held := start(t, r, on("ann", nothing))
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			err := r.Stop(ctx)
			require.ErrorIs(t, err, context.Canceled)
			require.ErrorContains(t, err, `1 aggregates were still busy ("account-ann")`)
			onItsWay.fails(t, eventstore.ErrOutcomeUnknown)
			require.ErrorIs(t, onItsWay.err, aggregate.ErrStopped)
			held.fails(t, aggregate.ErrStopped)
			require.NotErrorIs(t, held.err, eventstore.ErrOutcomeUnknown)
			late := start(t, r, on("ann", nothing))
			late.fails(t, aggregate.ErrStopped)
			g.next(t).release()
		})
	})
}

// Rule: equal keys in flight coalesce.
func TestPipeline_EqualKeysCoalesce(t *testing.T) {
	t.Parallel()

	t.Run("SameRequest", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, keyed("ann", "k", unlessRich(5)))
			second := start(t, r, keyed("ann", "k", unlessRich(5)))
			a := g.next(t)
			g.none(t)
			second.waits(t, "the first is not durable")
			a.release()
			want := first.succeeds(t)
			require.False(t, want.Duplicate)
			want.Duplicate = true
			require.Equal(t, want, second.succeeds(t))
			require.Zero(t, second.decided)
		})
	})

	t.Run("AnotherRequest", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, keyed("ann", "k", deposit(5)))
			other := keyed("ann", "k", deposit(6))
			other.Fingerprint = "other"
			second := start(t, r, other)
			second.waits(t, "the first is not durable")
			a := g.next(t)
			g.none(t)
			a.release()
			first.succeeds(t)
			second.fails(t, eventstore.ErrKeyReused)
		})
	})

	t.Run("TheFirstFails", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, keyed("ann", "k", deposit(5)))
			second := start(t, r, keyed("ann", "k", deposit(5)))
			other := keyed("ann", "k", deposit(6))
			other.Fingerprint = "other"
			third := start(t, r, other)
			g.next(t).fail(eventstore.ErrTooLarge)
			first.fails(t, eventstore.ErrTooLarge)
			g.pass()
			require.False(t, second.succeeds(t).Duplicate)
			third.fails(t, eventstore.ErrKeyReused)
			require.Len(t, g.history(t), 1)
		})
	})
}

type lossy struct {
	Kept string
	Lost string `json:"-"`
}

func (lossy) EventType() string { return "account.lossy" }

// Rule: the state is folded from the decoded stored form, never from the
// caller's originals.
func TestPipeline_StateIsTheStoredForm(t *testing.T) {
	t.Parallel()
	def := aggregate.Define("account", append(parts(), aggregate.On(func(a *account, e lossy) { a.Owner = e.Kept + e.Lost }))...)

	gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		notes := []string{"original"}
		event := &deposited{Cents: 5, Notes: notes}
		first := startOf(t, r, def, on("ann", func(account) ([]aggregate.Event, error) {
			return aggregate.Events(event, lossy{Kept: "kept", Lost: "lost"}), nil
		}))
		notes[0], event.Cents = "changed", 500 // after Decide, before the commit is durable
		var saw account
		look := func(a account) ([]aggregate.Event, error) {
			saw = a
			return nil, nil
		}
		startOf(t, r, def, on("ann", look))
		require.Equal(t, account{Owner: "kept", Cents: 5, Notes: []string{"original"}}, saw)
		g.pass()
		first.succeeds(t)
		durable, at, err := aggregate.Load(t.Context(), r, def, "ann")
		require.NoError(t, err)
		require.Equal(t, eventstore.Revision{Version: 2, Position: 2}, at)
		require.Equal(t, durable, saw)
	})
}

// Rule: DCB commits are not pipelined.
func TestPipeline_BoundaryIsNotPipelined(t *testing.T) {
	t.Parallel()
	gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		bounded := on("ann", deposit(2))
		bounded.Boundary = func() (eventstore.Query, account) { return eventstore.OneCategory("account"), account{} }
		first := start(t, r, on("ann", deposit(1)))
		second := start(t, r, bounded)
		third := start(t, r, on("ann", withdraw(3)))
		a := g.next(t)
		g.none(t)
		require.Zero(t, second.decided, "what it reads is not durable")
		a.release()
		first.succeeds(t)
		b := g.next(t)
		require.Equal(t, []eventstore.Condition{eventstore.NoneMatch(eventstore.OneCategory("account"), 1)}, b.Conditions)
		g.none(t)
		require.Zero(t, third.decided, "the boundary's outcome is not known")
		b.release()
		second.succeeds(t)
		g.pass()
		third.succeeds(t)
	})
}

// Rule: depth is bounded, and 1 after a foreign conflict.
func TestPipeline_DepthIsBounded(t *testing.T) {
	t.Parallel()
	gated(t, aggregate.Options{PipelineDepth: 3}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		for i := range 6 {
			start(t, r, on("ann", deposit(int64(i))))
		}
		require.Len(t, g.held, 3)
		g.foreign(t, 100)
		for range 3 {
			g.next(t).release()
		}
		for _, depth := range []int{1, 2, 3} {
			synctest.Wait()
			require.Len(t, g.held, depth, "on their way, growing with each success")
			g.next(t).release()
		}
		g.pass()
		require.Len(t, g.history(t), 7)
	})
}

// A commit of unknown outcome that was not written is sent again, and refused, as by
// an inline projection, for a reason that will not go away.
func TestExecute_RefusedAfterUnknown(t *testing.T) {
	t.Parallel()
	gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		first := start(t, r, on("ann", deposit(1)))
		g.next(t).fail(eventstore.ErrOutcomeUnknown)
		refusal := errors.New("an inline projection cannot apply it")
		g.next(t).fail(refusal)
		first.fails(t, eventstore.ErrOutcomeUnknown)
		require.ErrorIs(t, first.err, refusal)
		second := start(t, r, on("ann", deposit(2)))
		g.pass()
		second.succeeds(t)
		require.Len(t, g.history(t), 1)
	})
}
