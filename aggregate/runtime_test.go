package aggregate_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
)

// plain runs on a memory store as it is.
func plain(t *testing.T, o aggregate.Options) (*aggregate.Runtime, *memory.Store) {
	t.Helper()
	store := memory.New()
	return on1(t, store, o), store
}

func on1(t *testing.T, store eventstore.Store, o aggregate.Options) *aggregate.Runtime {
	t.Helper()
	r := aggregate.NewRuntime(store, o)
	t.Cleanup(func() { require.NoError(t, r.Stop(context.WithoutCancel(t.Context()))) })
	return r
}

func execute(t *testing.T, r *aggregate.Runtime, req aggregate.Request[account]) eventstore.Receipt {
	t.Helper()
	receipt, err := aggregate.Execute(t.Context(), r, accounts, req)
	require.NoError(t, err)
	return receipt
}

func load(t *testing.T, r *aggregate.Runtime, id string) (account, eventstore.Revision) {
	t.Helper()
	state, at, err := aggregate.Load(t.Context(), r, accounts, id)
	require.NoError(t, err)
	return state, at
}

func TestExecute_Basics(t *testing.T) {
	t.Parallel()
	r, store := plain(t, aggregate.Options{Clock: clock.NewManual(t0)})
	receipt := execute(t, r, aggregate.Request[account]{
		ID: "ann", Metadata: eventstore.Metadata{Actor: "test"},
		Decide: func(a account) ([]aggregate.Event, error) {
			require.Zero(t, a)
			return aggregate.Events(opened{"Ann"}, &deposited{Cents: 100}), nil
		},
	})
	require.Equal(t, eventstore.Receipt{First: 1, Last: 2, Revisions: []eventstore.StreamRevision{{Stream: ann, Revision: eventstore.Revision{Version: 2, Position: 2}}}}, receipt)
	execute(t, r, on("ann", withdraw(30)))
	state, at := load(t, r, "ann")
	require.Equal(t, account{Owner: "Ann", Cents: 70}, state)
	require.Equal(t, eventstore.Revision{Version: 3, Position: 3}, at)
	_, err := aggregate.Execute(t.Context(), r, accounts, on("ann", withdraw(71)))
	require.ErrorIs(t, err, errInsufficient)
	require.Equal(t, eventstore.Position(3), execute(t, r, on("ann", nothing)).Last)
	require.Zero(t, execute(t, r, on("nobody", nothing)))
	for e, err := range store.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{Limit: 2}) {
		require.NoError(t, err)
		require.Equal(t, t0, e.Time)
		require.Equal(t, "test", e.Metadata.Actor)
	}
}

func TestExecute_BadInput(t *testing.T) {
	t.Parallel()
	r, store := plain(t, aggregate.Options{})
	type stranger struct{ opened }
	def := aggregate.Define("account", append(parts(), aggregate.On(func(*account, tagged) {}), aggregate.On(func(*account, unencodable) {}))...)
	for name, c := range map[string]struct {
		req  aggregate.Request[account]
		is   error
		says string
	}{
		"EmptyID":       {on("", nothing), eventstore.ErrInvalid, "the stream id is empty"},
		"ControlID":     {on("a\nb", nothing), eventstore.ErrInvalid, `"a\nb"`},
		"NoDecide":      {on("ann", nil), eventstore.ErrInvalid, "has no Decide"},
		"NilEvent":      {on("ann", func(account) ([]aggregate.Event, error) { return aggregate.Events(nil), nil }), eventstore.ErrInvalid, "event 0 of the decision on \"account-ann\": invalid: aggregate \"account\": the event is nil"},
		"NilPointer":    {on("ann", func(account) ([]aggregate.Event, error) { return aggregate.Events((*opened)(nil)), nil }), eventstore.ErrInvalid, "the event is a nil *aggregate_test.opened"},
		"UnknownType":   {on("ann", func(account) ([]aggregate.Event, error) { return aggregate.Events(opened{"x"}, lossy{}), nil }), eventstore.ErrUnknownType, `event 1 of the decision on "account-ann": unknown event type: aggregate "account" has no On for event "account.lossy" (aggregate_test.lossy): add one`},
		"AnotherGoType": {on("ann", func(account) ([]aggregate.Event, error) { return aggregate.Events(stranger{}), nil }), eventstore.ErrInvalid, "is aggregate_test.opened in its On, but a aggregate_test.stranger was returned"},
		"DoesNotEncode": {on("ann", func(account) ([]aggregate.Event, error) { return aggregate.Events(unencodable{}), nil }), eventstore.ErrInvalid, `event "account.unencodable" does not encode`},
		"EmptyTag":      {on("ann", func(account) ([]aggregate.Event, error) { return aggregate.Events(tagged{""}), nil }), eventstore.ErrInvalid, "the tag is empty"},
		"LongKey":       {keyed("ann", string(make([]byte, 300)), deposit(1)), eventstore.ErrTooLarge, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := aggregate.Execute(t.Context(), r, def, c.req)
			require.ErrorIs(t, err, c.is)
			require.ErrorContains(t, err, c.says)
		})
	}
	_, err := aggregate.Execute(t.Context(), r, aggregate.Define[account]("no good"), on("ann", nothing))
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	_, _, err = aggregate.Load(t.Context(), r, aggregate.Define[account]("no good"), "ann")
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	_, _, err = aggregate.Load(t.Context(), r, accounts, "")
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	head, err := store.Head(t.Context())
	require.NoError(t, err)
	require.Zero(t, head, "nothing was written")
	execute(t, r, on("ann", deposit(1)))
}

type unencodable struct{ C chan int }

func (unencodable) EventType() string { return "account.unencodable" }

type tagged struct{ tag string }

func (tagged) EventType() string { return "account.tagged" }
func (e tagged) Tags() []string  { return []string{e.tag} }

func TestExecute_UnknownTypeInHistory(t *testing.T) {
	t.Parallel()
	r, store := plain(t, aggregate.Options{})
	_, err := store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: ann, Type: "account.frozen", Data: []byte("{}")}}})
	require.NoError(t, err)
	_, err = aggregate.Execute(t.Context(), r, accounts, on("ann", deposit(1)))
	require.ErrorIs(t, err, eventstore.ErrUnknownType)
	require.ErrorContains(t, err, `load "account-ann": cannot decode event "account.frozen" (stream "account-ann", version 1, position 1): unknown event type: aggregate "account" has no On for it`)
	_, _, err = aggregate.Load(t.Context(), r, accounts, "ann")
	require.ErrorIs(t, err, eventstore.ErrUnknownType)
}

// A refusal has no condition that the store could check.
func TestExecute_RefusalsSeeForeignWrites(t *testing.T) {
	t.Parallel()
	gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		start(t, r, on("ann", deposit(1))) // now it is cached
		g.pass()
		g.foreign(t, 100)
		look := start(t, r, on("ann", nothing))
		require.Equal(t, eventstore.Position(2), look.succeeds(t).Last)
		require.Equal(t, 2, look.decided)
		g.foreign(t, 100)
		start(t, r, on("ann", withdraw(150)))
		g.pass()
		require.Len(t, g.history(t), 4)

		// With a commit of ours on its way that does not know of the foreign one.
		first := start(t, r, on("ann", deposit(1)))
		second := start(t, r, on("ann", nothing))
		third := start(t, r, on("ann", deposit(1)))
		g.next(t).release()
		first.succeeds(t)
		require.Equal(t, 1, second.decided)
		require.Equal(t, eventstore.Position(5), second.succeeds(t).Last)
		g.pass()
		third.succeeds(t)

		reads := 0
		g.beforeRead = func(context.Context) error { reads++; return nil }
		start(t, r, on("ann", nothing)).succeeds(t)
		require.Equal(t, 1, reads, "one look for news, no reload")
	})
}

func TestExecute_KeyIsLookedUp(t *testing.T) {
	t.Parallel()

	t.Run("BeforeDeciding", func(t *testing.T) {
		t.Parallel()
		r, _ := plain(t, aggregate.Options{})
		want := execute(t, r, keyed("ann", "k", deposit(1)))
		want.Duplicate = true
		got := execute(t, r, keyed("ann", "k", func(account) ([]aggregate.Event, error) {
			t.Error("decided again")
			return nil, nil
		}))
		require.Equal(t, want, got)
		other := keyed("ann", "k", deposit(1))
		other.Fingerprint = "other"
		_, err := aggregate.Execute(t.Context(), r, accounts, other)
		require.ErrorIs(t, err, eventstore.ErrKeyReused)
		_, err = aggregate.Execute(t.Context(), r, accounts, keyed("bob", "k", deposit(1)))
		require.ErrorIs(t, err, eventstore.ErrKeyReused)
	})

	// Another process executes the request between our lookup and our decision,
	// which is then judged on the state that the request itself has changed.
	t.Run("BeforeRefusing", func(t *testing.T) {
		t.Parallel()
		for name, second := range map[string]func(account) ([]aggregate.Event, error){
			"Rejection": unlessRich(5),
			"NoOp": func(a account) ([]aggregate.Event, error) {
				if a.Cents > 0 {
					return nil, nil
				}
				return aggregate.Events(deposited{Cents: 5}), nil
			},
		} {
			t.Run(name, func(t *testing.T) {
				store := &lookupHook{Store: memory.New()}
				r := on1(t, store, aggregate.Options{})
				store.after = func() {
					store.after = nil
					other := aggregate.NewRuntime(store.Store, aggregate.Options{})
					_, err := aggregate.Execute(t.Context(), other, accounts, keyed("ann", "k", second))
					require.NoError(t, err)
				}
				require.True(t, execute(t, r, keyed("ann", "k", second)).Duplicate)
			})
		}
	})
}

type lookupHook struct {
	*memory.Store
	after func()
}

func (s *lookupHook) Lookup(ctx context.Context, stream eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	r, used, err := s.Store.Lookup(ctx, stream, key)
	if s.after != nil {
		s.after()
	}
	return r, used, err
}

func TestExecute_Cancellation(t *testing.T) {
	t.Parallel()

	t.Run("BeforeItBegins", func(t *testing.T) {
		t.Parallel()
		r, _ := plain(t, aggregate.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := aggregate.Execute(ctx, r, accounts, on("ann", deposit(1)))
		require.ErrorIs(t, err, context.Canceled)
	})

	t.Run("WhileQueued", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{PipelineDepth: 1}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(1)))
			queued := start(t, r, on("ann", deposit(2)))
			third := start(t, r, on("ann", deposit(3)))
			queued.cancel()
			queued.fails(t, context.Canceled)
			require.NotErrorIs(t, queued.err, eventstore.ErrOutcomeUnknown)
			g.pass()
			first.succeeds(t)
			third.succeeds(t)
			require.Zero(t, queued.decided)
			require.Len(t, g.history(t), 2)
		})
	})

	t.Run("WhileHeldBack", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			start(t, r, on("ann", deposit(1)))
			held := start(t, r, on("ann", nothing))
			held.cancel()
			held.fails(t, context.Canceled)
			require.NotErrorIs(t, held.err, eventstore.ErrOutcomeUnknown, "nothing of it can be written")
		})
	})

	t.Run("OnItsWay", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			gone := start(t, r, on("ann", deposit(1)))
			second := start(t, r, on("ann", withdraw(1)))
			gone.cancel()
			gone.fails(t, context.Canceled)
			require.ErrorIs(t, gone.err, eventstore.ErrOutcomeUnknown)
			g.pass()
			second.succeeds(t)
			require.Len(t, g.history(t), 2, "the aggregate carried on")
		})
	})

	t.Run("NotDecidedAgainForNobody", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			gone := start(t, r, keyed("ann", "k", deposit(1)))
			echo := start(t, r, keyed("ann", "k", deposit(1)))
			gone.cancel()
			gone.fails(t, eventstore.ErrOutcomeUnknown)
			g.foreign(t, 10)
			g.pass()
			require.Equal(t, 1, gone.decided)
			require.False(t, echo.succeeds(t).Duplicate)
			require.Len(t, g.history(t), 2)
		})
	})

	t.Run("TheStoreIsGivenADetachedContext", func(t *testing.T) {
		t.Parallel()
		type keyType struct{}
		store := &ctxHook{Store: memory.New()}
		r := on1(t, store, aggregate.Options{})
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), keyType{}, "trace"))
		store.enqueue = func(inner context.Context) {
			require.Equal(t, "trace", inner.Value(keyType{}))
			cancel()
			require.NoError(t, inner.Err())
		}
		_, err := aggregate.Execute(ctx, r, accounts, on("ann", deposit(1)))
		if err != nil {
			require.ErrorIs(t, err, eventstore.ErrOutcomeUnknown)
		}
	})
}

type ctxHook struct {
	*memory.Store
	enqueue func(ctx context.Context)
}

func (s *ctxHook) Enqueue(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
	s.enqueue(ctx)
	return s.Store.Enqueue(ctx, c)
}

type fragile struct{ Break bool }

func (fragile) EventType() string { return "account.fragile" }

func TestExecute_Panics(t *testing.T) {
	t.Parallel()
	def := aggregate.Define("account", append(parts(), aggregate.On(func(a *account, e fragile) {
		a.Cents = -1
		if e.Break {
			panic(errInsufficient)
		}
	}))...)

	t.Run("Decide", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			start(t, r, on("ann", func(account) ([]aggregate.Event, error) {
				return aggregate.Events(deposited{Cents: 1, Notes: []string{"clean"}}), nil
			}))
			culprit := start(t, r, on("ann", func(a account) ([]aggregate.Event, error) {
				a.Notes[0] = "dirty"
				panic("oh no")
			}))
			var saw account
			next := start(t, r, on("ann", func(a account) ([]aggregate.Event, error) { saw = a; return nil, nil }))
			culprit.waits(t, "what it saw is not durable")
			g.pass()
			require.True(t, culprit.done)
			require.ErrorContains(t, culprit.err, `Decide on "account-ann" panicked: oh no`)
			p, ok := errors.AsType[*aggregate.PanicError](culprit.err)
			require.True(t, ok)
			require.Contains(t, string(p.Stack), "runtime_test.go")
			next.succeeds(t)
			require.Equal(t, []string{"clean"}, saw.Notes, "the state was loaded again")
		})
	})

	t.Run("DecideEndsItsGoroutine", func(t *testing.T) {
		t.Parallel()
		for name, boundary := range map[string]func() (eventstore.Query, account){
			"Stream":   nil,
			"Boundary": func() (eventstore.Query, account) { return eventstore.All(), account{} },
		} {
			t.Run(name, func(t *testing.T) {
				gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
					first := start(t, r, on("ann", deposit(1)))
					req := on("ann", func(account) ([]aggregate.Event, error) {
						runtime.Goexit() // as t.FailNow does
						return nil, nil
					})
					req.Boundary = boundary
					culprit := start(t, r, req)
					next := start(t, r, on("ann", withdraw(1)))
					g.pass()
					first.succeeds(t)
					require.True(t, culprit.done)
					require.ErrorContains(t, culprit.err, `the decision on "account-ann" ended its goroutine`)
					next.succeeds(t)
				})
			})
		}
	})

	t.Run("Fold", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			startOf(t, r, def, on("ann", deposit(5)))
			culprit := startOf(t, r, def, on("ann", func(account) ([]aggregate.Event, error) {
				return aggregate.Events(deposited{Cents: 100}, fragile{true}), nil
			}))
			next := startOf(t, r, def, on("ann", withdraw(5)))
			g.pass()
			culprit.fails(t, errInsufficient)
			require.ErrorContains(t, culprit.err, `event 1 of the decision on "account-ann" was not written: the fold of event "account.fragile" (stream "account-ann", version 3) panicked`)
			next.succeeds(t)
			require.Len(t, g.history(t), 2, "an event that does not fold is never written")
		})
	})

	t.Run("FoldOfHistory", func(t *testing.T) {
		t.Parallel()
		r, store := plain(t, aggregate.Options{})
		e, err := def.Encode(nil, ann, fragile{true}, eventstore.Metadata{}, t0)
		require.NoError(t, err)
		_, err = store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{e}})
		require.NoError(t, err)
		_, err = aggregate.Execute(t.Context(), r, def, on("ann", nothing))
		require.ErrorContains(t, err, `load "account-ann": the fold of event "account.fragile"`)
	})

	t.Run("FoldOfHistoryEndsItsGoroutine", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			folds := 0
			ending := aggregate.Define("account", aggregate.On(func(a *account, e deposited) {
				if folds++; folds < 100 {
					runtime.Goexit()
				}
				a.Cents += e.Cents
			}))
			g.foreign(t, 1)
			for n := range 3 {
				culprit := startOf(t, r, ending, on("ann", nothing))
				require.True(t, culprit.done)
				require.ErrorContains(t, culprit.err, `the decision on "account-ann" ended its goroutine`)
				require.Equal(t, n+1, folds, "each call loads once")
			}
			folds = 100
			startOf(t, r, ending, on("ann", deposit(1)))
			g.pass()
		})
	})

	t.Run("LateFoldEndsItsGoroutine", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			ends := true
			ending := aggregate.Define("account", aggregate.OnMeta(func(a *account, e deposited, _ eventstore.Recorded) {
				if ends {
					ends = false
					runtime.Goexit()
				}
				a.Cents += e.Cents
			}))
			first := startOf(t, r, ending, on("ann", deposit(1)))
			g.pass()
			require.Equal(t, eventstore.Position(1), first.succeeds(t).Last, "it is written")
			var saw account
			startOf(t, r, ending, on("ann", func(a account) ([]aggregate.Event, error) {
				saw = a
				return nil, nil
			})).succeeds(t)
			require.Equal(t, int64(1), saw.Cents, "the state was loaded again")
		})
	})

	t.Run("Encode", func(t *testing.T) {
		t.Parallel()
		r, _ := plain(t, aggregate.Options{})
		_, err := aggregate.Execute(t.Context(), r, accounts, on("ann", func(account) ([]aggregate.Event, error) {
			return aggregate.Events(panicky{}), nil
		}))
		require.ErrorContains(t, err, `encoding the events of the decision on "account-ann" panicked: no name`)
		execute(t, r, on("ann", deposit(1)))
	})
}

type panicky struct{}

func (panicky) EventType() string { panic("no name") }

func TestRuntime_CachesAndEvicts(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ cached, loads int }{
		{0, 3},  // the default keeps all
		{2, 4},  // c takes b's place, b takes c's
		{1, 6},  // each takes the other's
		{-1, 6}, // nothing is kept
	} {
		t.Run(fmt.Sprint(c.cached), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				store := &readHook{Store: memory.New()}
				r := aggregate.NewRuntime(store, aggregate.Options{CachedAggregates: c.cached})
				for _, id := range []string{"a", "b", "a", "c", "a", "b"} {
					execute(t, r, on(id, deposit(1)))
					synctest.Wait() // until it is idle
				}
				require.Equal(t, c.loads, store.reads)
				state, at := load(t, r, "a")
				require.Equal(t, int64(3), state.Cents)
				require.Equal(t, uint64(3), at.Version)
				require.NoError(t, r.Stop(t.Context()))
			})
		})
	}
}

// A busy aggregate is not forgotten, however many others come and go.
func TestRuntime_BusyAggregatesStay(t *testing.T) {
	t.Parallel()
	gated(t, aggregate.Options{CachedAggregates: 1}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		start(t, r, on("ann", deposit(1)))
		held := g.next(t)
		for i := range 5 {
			start(t, r, on(fmt.Sprintf("other-%d", i), deposit(1)))
			g.next(t).release()
		}
		start(t, r, on("ann", withdraw(1)))
		require.Equal(t, []eventstore.Condition{eventstore.StreamAtEvent(ann, 1, held.Events[0].ID)}, g.held0(t).Conditions)
		held.release()
	})
}

type readHook struct {
	*memory.Store
	reads int
}

func (s *readHook) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	s.reads++
	return s.Store.Read(ctx, q, o)
}

type dated struct{ Note string }

func (dated) EventType() string { return "account.dated" }

func TestOnMeta_KnowsThePosition(t *testing.T) {
	t.Parallel()
	type history struct{ Seen []string }
	def := aggregate.Define("account",
		aggregate.On(func(h *history, e deposited) { h.Seen = append(h.Seen, fmt.Sprintf("deposit %d", e.Cents)) }),
		aggregate.OnMeta(func(h *history, e dated, r eventstore.Recorded) {
			h.Seen = append(h.Seen, fmt.Sprintf("%s v%d p%d %s by %s", e.Note, r.Version, r.Position, r.Time.Format(time.DateOnly), r.Metadata.Actor))
		}))
	gated(t, aggregate.Options{Clock: clock.NewManual(t0)}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		_, err := g.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: eventstore.Stream{Category: "other", ID: "x"}, Type: "x"}}})
		require.NoError(t, err)
		req := func(decide func(history) ([]aggregate.Event, error)) aggregate.Request[history] {
			return aggregate.Request[history]{ID: "ann", Metadata: eventstore.Metadata{Actor: "me"}, Decide: decide}
		}
		first := startOf(t, r, def, req(func(history) ([]aggregate.Event, error) {
			return aggregate.Events(deposited{Cents: 1}, dated{"x"}, dated{"y"}), nil
		}))
		var saw history
		second := startOf(t, r, def, req(func(h history) ([]aggregate.Event, error) { saw = h; return nil, nil }))
		require.Zero(t, second.decided, "the positions are not known yet")
		g.next(t).release()
		first.succeeds(t)
		second.succeeds(t)
		require.Equal(t, []string{"deposit 1", "x v2 p3 2026-01-02 by me", "y v3 p4 2026-01-02 by me"}, saw.Seen)
		replayed, _, err := aggregate.Load(t.Context(), r, def, "ann")
		require.NoError(t, err)
		require.Equal(t, replayed, saw)
	})
}

func TestLoad_SeesDurableStateOnly(t *testing.T) {
	t.Parallel()
	gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		start(t, r, on("ann", func(account) ([]aggregate.Event, error) {
			return aggregate.Events(deposited{Cents: 5, Notes: []string{"a"}}), nil
		}))
		state, at, err := aggregate.Load(t.Context(), r, accounts, "ann")
		require.NoError(t, err)
		require.Zero(t, state)
		require.Zero(t, at)
		g.pass()
		state, _, err = aggregate.Load(t.Context(), r, accounts, "ann")
		require.NoError(t, err)
		state.Notes[0] = "changed by its owner"
		var saw account
		start(t, r, on("ann", func(a account) ([]aggregate.Event, error) { saw = a; return nil, nil })).succeeds(t)
		require.Equal(t, []string{"a"}, saw.Notes, "what Load returns is not the cache's")
	})
}

// A store without the power to enqueue is waited for.
type onlyAppend struct{ eventstore.Store }

func TestRuntime_StoreThatCannotEnqueue(t *testing.T) {
	t.Parallel()
	inner := memory.New()
	r := on1(t, onlyAppend{inner}, aggregate.Options{})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, err := aggregate.Execute(t.Context(), r, accounts, on("ann", deposit(1)))
			require.NoError(t, err)
		})
	}
	wg.Wait()
	state, at := load(t, r, "ann")
	require.Equal(t, int64(20), state.Cents)
	require.Equal(t, uint64(20), at.Version)
}

func TestRuntime_Stop(t *testing.T) {
	t.Parallel()

	t.Run("Drains", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{PipelineDepth: 1}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			first := start(t, r, on("ann", deposit(1)))
			queued := start(t, r, on("ann", deposit(2)))
			stopped := make(chan error, 1)
			go func() { stopped <- r.Stop(t.Context()) }()
			synctest.Wait()
			require.Empty(t, stopped)
			late := start(t, r, on("ann", deposit(3)))
			late.fails(t, aggregate.ErrStopped)
			require.EqualError(t, late.err, `execute on "account-ann": the aggregate runtime is stopped`)
			g.pass()
			first.succeeds(t)
			queued.succeeds(t)
			require.NoError(t, <-stopped)
			require.NoError(t, r.Stop(t.Context()), "again")
		})
	})

	t.Run("BeforeAnything", func(t *testing.T) {
		t.Parallel()
		r := aggregate.NewRuntime(memory.New(), aggregate.Options{})
		require.NoError(t, r.Stop(t.Context()))
	})
}

func TestRuntime_LogsUnknownOutcomes(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	gated(t, aggregate.Options{Logger: slog.New(slog.NewTextHandler(&out, nil))}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		start(t, r, on("ann", deposit(1)))
		g.next(t).lose()
	})
	require.Contains(t, out.String(), `msg="deed: the outcome of a commit is unknown, looking it up" stream=account-ann`)
}

// leaving is a store whose second lookup comes when its caller has left.
type leaving struct {
	*memory.Store
	lookups int
	leave   context.CancelFunc
}

func (s *leaving) Lookup(ctx context.Context, stream eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	if s.lookups++; s.lookups == 2 {
		s.leave()
	}
	return s.Store.Lookup(ctx, stream, key)
}

// Whether a refusal counts is known only when the key was looked up again; the
// caller who leaves before hears of both, and errors.Is finds no refusal.
func TestExecute_RefusalThatWasNotConfirmed(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	r := on1(t, &leaving{Store: memory.New(), leave: cancel}, aggregate.Options{})
	_, err := aggregate.Execute(ctx, r, accounts, keyed("ann", "k", withdraw(1)))
	require.ErrorIs(t, err, context.Canceled)
	require.NotErrorIs(t, err, errInsufficient)
	require.EqualError(t, err, `look up the idempotency key "k": context canceled; the decision, which counts only if the key is unused, was: insufficient funds: 1 of 0`)
}
