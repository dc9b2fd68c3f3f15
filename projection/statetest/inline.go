package statetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// InlineStore is a store that applies inline projections: see [projection.Inliner].
type InlineStore interface {
	eventstore.Store
	State
	projection.Inliner
}

// RunInline tests what the backend does for inline projections. open returns a
// new, empty store each time, which the suite closes. Of the features it asks for SQL.
func RunInline(t *testing.T, open func(t testing.TB) InlineStore, f Features) {
	t.Helper()
	for _, c := range inlineChecks {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.sql && !f.SQL {
				t.Skip("the backend declares no SQL")
			}
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("the rule: %s", c.rule)
				}
			})
			store := open(t)
			t.Cleanup(func() { require.NoError(t, store.Close()) })
			c.run(t, store)
		})
	}
}

type inlineCheck struct {
	name, rule string
	run        func(t *testing.T, store InlineStore)
	sql        bool
}

var inlineChecks = []inlineCheck{
	{
		name: "AppliedWhenTheAppendReturns", rule: "when an append returns, a snapshot has its events in the rows, and the checkpoint is where they end",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			for i := range 50 {
				r, err := store.Append(t.Context(), commitOf(added("a", i), added("b", 1)))
				require.NoError(t, err)
				rows, at := n.rows(t, "sums")
				require.Equal(t, i+1, rows["b"].Sum)
				require.Equal(t, i+1, rows["a"].Events)
				require.Equal(t, r.Last, at)
			}
			require.True(t, n.status(t, "sums").Inline)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "InOrder", rule: "handlers get the events in the order of the log, each once, whoever appends",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			var group sync.WaitGroup
			for w := range 8 {
				group.Go(func() {
					for i := range 30 {
						_, err := store.Append(context.Background(), commitOf(added(fmt.Sprint("own", w), i), added("all", 1)))
						if err != nil {
							t.Error(err)
						}
					}
				})
			}
			group.Wait()
			n.verify(t, store, "sums")
			rows, _ := n.rows(t, "sums")
			require.Equal(t, 240, rows["all"].Sum)
		},
	},
	{
		name: "FailureFailsItsCommit", rule: "a handler that panics fails the commit of its event with an InlineError, nothing of which is written, and no other",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("first", nil), sums("sums", func(e sumAdded) {
				if e.N == bad {
					panic(errors.New("no such number"))
				}
			}))
			n.awaitInline(t)
			_, err := store.Append(t.Context(), commitOf(added("a", 1)))
			require.NoError(t, err)
			head, err := store.Head(t.Context())
			require.NoError(t, err)
			_, err = store.Append(t.Context(), commitOf(added("a", 5), added("a", bad)))
			failure, ok := errors.AsType[*projection.InlineError](err)
			require.True(t, ok, "%v", err)
			require.Equal(t, "sums", failure.Projection)
			require.Equal(t, eventstore.Stream{Category: "sum", ID: "a"}, failure.Stream)
			require.Equal(t, "sum.added", failure.Type)
			require.EqualValues(t, 3, failure.Version)
			require.ErrorContains(t, err, `append: nothing was written: inline projection "sums" cannot apply event "sum.added", version 3 of stream "sum-a": handler panicked: no such number`)
			require.False(t, eventstore.CanRetry(err))
			now, err := store.Head(t.Context())
			require.NoError(t, err)
			require.Equal(t, head, now)
			for _, name := range []string{"first", "sums"} {
				rows, at := n.rows(t, name)
				require.Equal(t, map[string]sum{"a": {Sum: 1, Events: 1, Last: 1}}, rows)
				require.Equal(t, head, at)
			}
			r, err := store.Append(t.Context(), commitOf(added("a", 7)))
			require.NoError(t, err)
			require.Equal(t, head+1, r.First)
			n.verify(t, store, "sums", "first")
		},
	},
	{
		name: "FailureIsNoConflict", rule: "an error of a handler that wraps a conflict does not make the append look like one",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", func(sumAdded) {
				panic(fmt.Errorf("%w: of something else", eventstore.ErrConflict))
			}))
			n.awaitInline(t)
			_, err := store.Append(t.Context(), commitOf(added("a", 1)))
			require.Error(t, err)
			require.NotErrorIs(t, err, eventstore.ErrConflict)
			require.False(t, eventstore.CanRetry(err))
		},
	},
	{
		name: "GoexitFailsItsCommit", rule: "a handler that ends its goroutine fails its commit, and the store goes on",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", func(e sumAdded) {
				if e.N == bad {
					runtime.Goexit()
				}
			}))
			n.awaitInline(t)
			_, err := store.Append(t.Context(), commitOf(added("a", bad)))
			_, ok := errors.AsType[*projection.InlineError](err)
			require.True(t, ok, "%v", err)
			_, err = store.Append(t.Context(), commitOf(added("a", 2)))
			require.NoError(t, err)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "ManyFailuresInOneBatch", rule: "of commits that are written together exactly those fail whose events cannot be applied, or whose conditions needed those",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("first", nil), sums("sums", func(e sumAdded) {
				if e.N == bad {
					panic("bad")
				}
			}))
			n.awaitInline(t)
			var pending []*eventstore.Pending
			enqueuer, ok := eventstore.Find[eventstore.Enqueuer](store)
			require.True(t, ok)
			const commits = 120
			for i := range commits {
				number := 1
				if i%5 == 3 {
					number = bad
				}
				c := commitOf(added("shared", 1), added(fmt.Sprint("k", i), number))
				if i%5 == 4 { // follows a commit that fails
					c.Conditions = []eventstore.Condition{eventstore.StreamExists(eventstore.Stream{Category: "sum", ID: fmt.Sprint("k", i-1)})}
				}
				pending = append(pending, enqueuer.Enqueue(context.Background(), c))
			}
			for i, p := range pending {
				<-p.Done()
				_, err := p.Result()
				switch i % 5 {
				case 3:
					_, ok := errors.AsType[*projection.InlineError](err)
					require.True(t, ok, "%d: %v", i, err)
				case 4:
					require.ErrorIs(t, err, eventstore.ErrConflict, i)
				default:
					require.NoError(t, err, i)
				}
			}
			head, err := store.Head(t.Context())
			require.NoError(t, err)
			require.EqualValues(t, 2*commits*3/5, head)
			n.verify(t, store, "sums", "first")
		},
	},
	{
		name: "KeysAndConflicts", rule: "what is a duplicate or a conflict is not applied",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			c := commitOf(added("a", 1))
			c.Key = "once"
			for range 3 {
				_, err := store.Append(t.Context(), c)
				require.NoError(t, err)
			}
			lost := commitOf(added("a", 1))
			lost.Conditions = []eventstore.Condition{eventstore.StreamAt(eventstore.Stream{Category: "sum", ID: "a"}, eventstore.Revision{})}
			_, err := store.Append(t.Context(), lost)
			require.ErrorIs(t, err, eventstore.ErrConflict)
			rows, _ := n.rows(t, "sums")
			require.Equal(t, 1, rows["a"].Sum)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "OtherEventsMoveTheCheckpoint", rule: "events that do not concern the projection do not leave it behind",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			other := eventstore.Event{Stream: eventstore.Stream{Category: "other", ID: "x"}, Type: "other.thing", Data: []byte(`{}`)}
			r, err := store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{other}})
			require.NoError(t, err)
			_, at := n.rows(t, "sums")
			require.Equal(t, r.Last, at)
			before, _ := n.engine.Unapplied("sums")
			_, err = store.Append(t.Context(), commitOf(added("a", 1)))
			require.NoError(t, err)
			after, _ := n.engine.Unapplied("sums")
			require.Equal(t, before, after)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "LeftBehind", rule: "an append that was made without the projection is never passed over: later ones leave it alone until its owner has caught up",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			_, err := store.Append(t.Context(), commitOf(added("a", 1)))
			require.NoError(t, err)
			for range 20 {
				was, where := n.rows(t, "sums")
				require.NoError(t, n.engine.Pause(t.Context(), "sums"))
				for i := range 3 {
					r, err := store.Append(t.Context(), commitOf(added("a", 10)))
					require.NoError(t, err)
					rows, at := n.rows(t, "sums")
					require.Equal(t, was, rows, "append %d has applied it", i)
					require.Equal(t, where, at)
					left, inline := n.engine.Unapplied("sums")
					require.True(t, inline)
					require.Equal(t, r.Last, left)
				}
				require.False(t, n.status(t, "sums").Inline)
				require.NoError(t, n.engine.Resume(t.Context(), "sums"))
				n.awaitInline(t)
				_, err = store.Append(t.Context(), commitOf(added("a", 100)))
				require.NoError(t, err)
				rows, _ := n.rows(t, "sums")
				require.Equal(t, was["a"].Sum+130, rows["a"].Sum)
			}
			n.verify(t, store, "sums")
		},
	},
	{
		name: "RestartsWhileOthersAppend", rule: "an owner that begins anew takes the projection back before it looks where the log ends: a checkpoint that appends have moved meanwhile is not one of another log",
		run: func(t *testing.T, store InlineStore) {
			if !projection.Shared(store) {
				t.Skip("nobody else can ask the owner for anything")
			}
			moving := &movingStore{InlineStore: store}
			admin := projection.NewAdmin(store, "somebody")
			n := runInline(t, moving, sums("sums", nil))
			for range 5 {
				n.awaitInline(t)
				moving.appends.Store(3)
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				require.NoError(t, admin.Pause(ctx, "sums"))
				require.NoError(t, admin.Resume(ctx, "sums"))
				cancel()
				n.awaitInline(t)
				moving.appends.Store(0)
			}
			n.verify(t, store, "sums")
		},
	},
	{
		name: "HandlersChangeTheirEvent", rule: "what a handler does to the data of the event it is given does not reach the log",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, projection.View("sums", projection.OnMeta(func(s *sum, e sumAdded, r eventstore.Recorded) {
				s.Sum, s.Events, s.Last = s.Sum+e.N, s.Events+1, r.Position
				clear(r.Data)
				clear(r.Tags)
			})).Inline())
			n.awaitInline(t)
			event := added("a", 7)
			event.Tags = []string{"seven"}
			_, err := store.Append(t.Context(), commitOf(event))
			require.NoError(t, err)
			for r, err := range store.Read(t.Context(), eventstore.OfTypes("sum.added"), eventstore.ReadOptions{}) {
				require.NoError(t, err)
				require.JSONEq(t, `{"N":7}`, string(r.Data))
				require.Equal(t, []string{"seven"}, r.Tags)
			}
		},
	},
	{
		name: "RowsLeftOpen", rule: "a handler that leaves rows open is not in the way of the commits that are written together with its own", sql: true,
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store)
			require.NoError(t, n.engine.Add(projection.SQL("open", projection.OnSQL(func(ctx context.Context, tx projection.Tx, _ sumAdded, _ eventstore.Recorded) error {
				rows, err := tx.Query(ctx, "SELECT 1 UNION ALL SELECT 2")
				if err == nil {
					rows.Next()
				}
				return err
			})).Inline()))
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- n.engine.Workers()[0].Run(ctx) }()
			defer func() {
				cancel()
				require.NoError(t, <-done)
			}()
			n.awaitInline(t)
			enqueuer, ok := eventstore.Find[eventstore.Enqueuer](store)
			require.True(t, ok)
			var pending []*eventstore.Pending
			for i := range 50 {
				pending = append(pending, enqueuer.Enqueue(context.Background(), commitOf(added(fmt.Sprint("k", i), 1))))
			}
			for _, p := range pending {
				<-p.Done()
				_, err := p.Result()
				require.NoError(t, err)
			}
		},
	},
	{
		name: "IgnorantAppend", rule: "whoever finds that an append was made by somebody who does not know the projection leaves it alone, also while it has no owner",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			_, err := store.Append(t.Context(), commitOf(added("a", 1)))
			require.NoError(t, err)
			n.stop()
			later := projection.NewEngine(store, store, projection.Options{Logger: discard})
			require.NoError(t, later.Add(sums("sums", nil)))
			_, err = store.Append(t.Context(), commitOf(added("a", 2)))
			require.NoError(t, err)
			rows, at := n.rows(t, "sums")
			require.Equal(t, 3, rows["a"].Sum, "without an owner too")
			require.EqualValues(t, 2, at)
			later.Close()
			_, err = store.Append(t.Context(), commitOf(added("a", 4)))
			require.NoError(t, err)
			later = projection.NewEngine(store, store, projection.Options{Logger: discard})
			require.NoError(t, later.Add(sums("sums", nil)))
			defer later.Close()
			for range 3 {
				r, err := store.Append(t.Context(), commitOf(added("a", 8)))
				require.NoError(t, err)
				rows, at = n.rows(t, "sums")
				require.Equal(t, 3, rows["a"].Sum)
				require.EqualValues(t, 2, at)
				left, _ := later.Unapplied("sums")
				require.Equal(t, r.Last, left)
			}
			n = runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "IgnorantOwner", rule: "an owner that knows nothing of appends has the projection for itself, also where its checkpoint is the head of the log",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			_, err := store.Append(t.Context(), commitOf(added("a", 1)))
			require.NoError(t, err)
			n.stop()
			later := projection.NewEngine(store, store, projection.Options{Logger: discard})
			require.NoError(t, later.Add(sums("sums", nil)))
			defer later.Close()
			lease, err := store.Acquire(t.Context(), "projection.sums", "ignorant", 0)
			require.NoError(t, err)
			require.NoError(t, store.Update(t.Context(), func(tx projection.StateTx) error {
				c, err := tx.Checkpoint("projection.sums")
				if err != nil {
					return err
				}
				return tx.SetCheckpoint(lease, c, c)
			}))
			_, err = store.Append(t.Context(), commitOf(added("a", 2)))
			require.NoError(t, err)
			rows, at := n.rows(t, "sums")
			require.Equal(t, 1, rows["a"].Sum)
			require.EqualValues(t, 1, at)
			require.NoError(t, store.Release(t.Context(), lease))
			n = runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "PoisonOfAnIgnorantAppend", rule: "an event that fails after an append was made without the projection is set aside, and so are later ones of its stream, which appends would apply",
		run: func(t *testing.T, store InlineStore) {
			refuse := func(e sumAdded) {
				if e.N == bad {
					panic("bad")
				}
			}
			n := runInline(t, store, sums("sums", refuse))
			n.awaitInline(t)
			n.engine.Close()
			_, err := store.Append(t.Context(), commitOf(added("a", bad)))
			require.NoError(t, err)
			require.Eventually(t, func() bool { return n.status(t, "sums").DeadLetters == 1 }, patience, 2*time.Millisecond)
			later := projection.NewEngine(store, store, projection.Options{Logger: discard})
			require.NoError(t, later.Add(sums("sums", refuse)))
			defer later.Close()
			for i := range 5 {
				r, err := store.Append(t.Context(), commitOf(added("a", 1), added("b", 1)))
				require.NoError(t, err)
				require.NoError(t, n.engine.WaitFor(t.Context(), "sums", r.Last))
				rows, _ := n.rows(t, "sums")
				require.Equal(t, map[string]sum{"b": {Sum: i + 1, Events: i + 1, Last: r.Last}}, rows)
			}
			require.Equal(t, 6, n.status(t, "sums").DeadLetters)
			require.NoError(t, n.engine.SkipDeadLetter(t.Context(), "sums", 1, "a test"))
			_, err = n.engine.ReplayDeadLetters(t.Context(), "sums")
			require.NoError(t, err)
			n.awaitInline(t)
			v, err := n.engine.Verify(t.Context(), "sums")
			require.NoError(t, err)
			require.True(t, v.Agrees(), "%s", v)
		},
	},
	{
		name: "CatchesUpWhileOthersAppend", rule: "a new projection of a log that has events, and gets more all the time, is handed over to the appends, and misses none",
		run: func(t *testing.T, store InlineStore) {
			for i := range 40 {
				var c eventstore.Commit
				for k := range 25 {
					c.Events = append(c.Events, added(fmt.Sprint("k", k), i))
				}
				_, err := store.Append(t.Context(), c)
				require.NoError(t, err)
			}
			var stop atomic.Bool
			var group sync.WaitGroup
			for w := range 3 {
				group.Go(func() {
					for i := 0; !stop.Load(); i++ {
						if _, err := store.Append(context.Background(), commitOf(added(fmt.Sprint("k", (i+w)%25), 1))); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			n := runInline(t, store, sums("sums", nil))
			inlineAppends := 0
			for began := time.Now(); inlineAppends < 20; {
				require.Less(t, time.Since(began), patience, "it never gets inline")
				_, err := store.Append(t.Context(), commitOf(added("mine", 1)))
				require.NoError(t, err)
				_, at := n.rows(t, "sums")
				head, err := store.Head(t.Context())
				require.NoError(t, err)
				if at+10 >= head {
					inlineAppends++
				}
			}
			stop.Store(true)
			group.Wait()
			n.awaitInline(t)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "RebuiltWhileOthersAppend", rule: "a rebuild takes the projection back from the appends, and no event is missed or applied twice",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			var stop atomic.Bool
			var group sync.WaitGroup
			for w := range 3 {
				group.Go(func() {
					for !stop.Load() {
						if _, err := store.Append(context.Background(), commitOf(added(fmt.Sprint("k", w), 1), added("all", 1))); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			for range 5 {
				require.NoError(t, n.engine.Rebuild(t.Context(), "sums"))
			}
			stop.Store(true)
			group.Wait()
			n.awaitInline(t)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "OwnersChange", rule: "the lease may change hands at any time: rows stay the fold of the log",
		run: func(t *testing.T, store InlineStore) {
			var stop atomic.Bool
			var group sync.WaitGroup
			for w := range 2 {
				group.Go(func() {
					for !stop.Load() {
						if _, err := store.Append(context.Background(), commitOf(added(fmt.Sprint("k", w), 1), added("all", 1))); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			var last *inlineNode
			for range 6 {
				n := runInline(t, store, sums("sums", nil))
				n.awaitInline(t)
				if last != nil {
					last.stop()
				}
				// Whoever acquires the lease knows nothing of appends.
				lease, err := store.Acquire(t.Context(), "projection.sums", n.owner, 0)
				require.NoError(t, err)
				require.NoError(t, store.Release(t.Context(), lease))
				// Not while it acquires the lease again: that may be done although it was
				// cancelled, and then nobody gives it back before the store is closed.
				require.Eventually(t, func() bool {
					var at projection.Checkpoint
					err := store.View(context.Background(), func(tx projection.StateTx) (err error) {
						at, err = tx.Checkpoint("projection.sums")
						return err
					})
					return err == nil && at.Epoch > lease.Epoch
				}, patience, time.Millisecond)
				n.awaitInline(t)
				n.stop()
				last = runInline(t, store, sums("sums", nil))
				require.Eventually(t, func() bool {
					now := last.status(t, "sums")
					return now.Inline && now.Phase == projection.PhaseLive
				}, patience, time.Millisecond)
				last.stop()
				last = nil
			}
			stop.Store(true)
			group.Wait()
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "TwoEngines", rule: "two engines on one store apply it once, and both know how far it is",
		run: func(t *testing.T, store InlineStore) {
			a := runInline(t, store, sums("sums", nil))
			a.awaitInline(t)
			b := runInline(t, store, sums("sums", nil), sums("more", nil))
			b.awaitInline(t)
			for i := range 30 {
				r, err := store.Append(t.Context(), commitOf(added("a", 1)))
				require.NoError(t, err)
				rows, at := a.rows(t, "sums")
				require.Equal(t, i+1, rows["a"].Sum)
				require.Equal(t, r.Last, at)
				require.NoError(t, b.engine.WaitFor(t.Context(), "more", r.Last))
			}
			a.stop()
			b.awaitInline(t)
			_, err := store.Append(t.Context(), commitOf(added("a", 1)))
			require.NoError(t, err)
			b.verify(t, store, "sums", "more")
		},
	},
	{
		name: "OtherDefinition", rule: "a process whose definition handles other events, or has other indexes, leaves the rows alone",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			_, err := store.Append(t.Context(), commitOf(added("a", 1)))
			require.NoError(t, err)
			n.engine.Close() // its runner goes on; its appends do not know it any more
			other := projection.NewEngine(store, store, projection.Options{Logger: discard})
			require.NoError(t, other.Add(projection.View("sums", projection.On(func(s *sum, e sumAdded) { s.Sum += 1000 }),
				projection.On(func(*sum, sumOther) {})).Inline()))
			defer other.Close()
			for range 5 {
				_, err := store.Append(t.Context(), commitOf(added("a", 1)))
				require.NoError(t, err)
			}
			head, err := store.Head(t.Context())
			require.NoError(t, err)
			require.NoError(t, n.engine.WaitFor(t.Context(), "sums", head))
			rows, _ := n.rows(t, "sums")
			require.Equal(t, 6, rows["a"].Sum)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "PoisonWhileBehind", rule: "an event that fails while the projection is behind is set aside, and the projection is not handed over before that was replayed",
		run: func(t *testing.T, store InlineStore) {
			var broken atomic.Bool
			broken.Store(true)
			n := runInline(t, store, sums("sums", func(e sumAdded) {
				if e.N == bad && broken.Load() {
					panic("bad")
				}
			}))
			n.awaitInline(t)
			require.NoError(t, n.engine.Pause(t.Context(), "sums"))
			_, err := store.Append(t.Context(), commitOf(added("a", bad)))
			require.NoError(t, err, "it is not applied now")
			require.NoError(t, n.engine.Resume(t.Context(), "sums"))
			require.Eventually(t, func() bool { return n.status(t, "sums").DeadLetters == 1 }, patience, 2*time.Millisecond)
			r, err := store.Append(t.Context(), commitOf(added("a", 1), added("b", 1)))
			require.NoError(t, err)
			require.NoError(t, n.engine.WaitFor(t.Context(), "sums", r.Last))
			rows, _ := n.rows(t, "sums")
			require.Equal(t, map[string]sum{"b": {Sum: 1, Events: 1, Last: 3}}, rows)
			require.False(t, n.status(t, "sums").Inline)
			broken.Store(false)
			count, err := n.engine.ReplayDeadLetters(t.Context(), "sums")
			require.NoError(t, err)
			require.Equal(t, 2, count)
			n.awaitInline(t)
			_, err = store.Append(t.Context(), commitOf(added("a", 1)))
			require.NoError(t, err)
			n.verify(t, store, "sums")
		},
	},
	{
		name: "Indexes", rule: "entries of indexes are those of the rows",
		run: func(t *testing.T, store InlineStore) {
			view := sums("sums", nil).Indexed(projection.Index("sum", func(s sum) int { return s.Sum }))
			n := runInline(t, store, view)
			n.awaitInline(t)
			for i := range 60 {
				_, err := store.Append(t.Context(), commitOf(added(fmt.Sprint("k", i%7), i), added("x", 1)))
				require.NoError(t, err)
			}
			n.verify(t, store, "sums")
			v, err := n.engine.Verify(t.Context(), "sums")
			require.NoError(t, err)
			require.Equal(t, 8, v.Entries)
		},
	},
	{
		name: "AtHead", rule: "nothing is appended while an update has the head of the log",
		run: func(t *testing.T, store InlineStore) {
			n := runInline(t, store, sums("sums", nil))
			n.awaitInline(t)
			for range 20 {
				appended := make(chan error, 1)
				require.NoError(t, store.UpdateAtHead(t.Context(), func(_ projection.StateTx, head eventstore.Position) error {
					go func() {
						_, err := store.Append(context.Background(), commitOf(added("a", 1)))
						appended <- err
					}()
					for range 50 {
						runtime.Gosched()
						now, err := store.Head(t.Context())
						require.NoError(t, err)
						require.Equal(t, head, now)
					}
					select {
					case err := <-appended:
						t.Errorf("the append has returned: %v", err)
					default:
					}
					return nil
				}))
				require.NoError(t, <-appended)
			}
			head, err := store.Head(t.Context())
			require.NoError(t, err)
			require.EqualValues(t, 20, head)
		},
	},
	{
		name: "SQL", rule: "handlers of SQL projections write in the transaction of the append; what a failed one has written is taken back, and only that",
		sql: true,
		run: func(t *testing.T, store InlineStore) {
			ledger := projection.SQL("ledger",
				projection.Setup("CREATE TABLE IF NOT EXISTS inline_ledger (position bigint PRIMARY KEY, name text NOT NULL, n bigint NOT NULL CHECK (n < 1000))"),
				projection.Reset("DELETE FROM inline_ledger"),
				projection.OnSQL(func(ctx context.Context, tx projection.Tx, e sumAdded, r eventstore.Recorded) error {
					if _, err := tx.Exec(ctx, "INSERT INTO inline_ledger (position, name, n) VALUES ($1, $2, $3)", int64(r.Position), r.Stream.ID, int64(min(e.N, 999))); err != nil {
						return err
					}
					if e.N == bad {
						return errors.New("a bad number")
					}
					if e.N > 1000 {
						_, err := tx.Exec(ctx, "UPDATE inline_ledger SET n = $2 WHERE position = $1", int64(r.Position), int64(e.N))
						if e.N > 2000 && err != nil {
							return nil // it bears that
						}
						return err
					}
					return nil
				}),
			).Inline()
			n := runInline(t, store, sums("sums", nil))
			require.NoError(t, n.engine.Add(ledger))
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			worker := n.engine.Workers()[1]
			go func() { done <- worker.Run(ctx) }()
			defer func() {
				cancel()
				require.NoError(t, <-done)
			}()
			n.awaitInline(t)
			for i, c := range []struct {
				number int
				fails  bool
			}{{1, false}, {bad, true}, {1500, true}, {2500, false}, {2, false}} {
				_, err := store.Append(t.Context(), commitOf(added(fmt.Sprint("k", i), 3), added("a", c.number)))
				if !c.fails {
					require.NoError(t, err)
					continue
				}
				failure, ok := errors.AsType[*projection.InlineError](err)
				require.True(t, ok, "%v", err)
				require.Equal(t, "ledger", failure.Projection)
			}
			var total, count int64
			require.NoError(t, store.View(t.Context(), func(tx projection.StateTx) error {
				rows, err := tx.Query(t.Context(), "SELECT CAST(sum(n) AS bigint), count(*) FROM inline_ledger")
				if err != nil {
					return err
				}
				defer rows.Close()
				require.True(t, rows.Next())
				return rows.Scan(&total, &count)
			}))
			require.EqualValues(t, 6, count)
			require.EqualValues(t, 3*3+1+999+2, total)
			n.verify(t, store, "sums", "ledger")
		},
	},
}

// bad is a number that handlers of tests refuse.
const bad = 666

// sum is a row that shows what was folded, and in which order.
type sum struct {
	Sum    int
	Events int
	Last   eventstore.Position
}

type sumAdded struct{ N int }

func (sumAdded) EventType() string { return "sum.added" }

type sumOther struct{}

func (sumOther) EventType() string { return "sum.other" }

// sums adds up numbers by stream. An event that comes twice, or out of order, is seen in the row.
func sums(name string, before func(sumAdded)) *projection.ViewDefinition[sum] {
	return followers(name, before).Inline()
}

// followers is sums, not inline.
func followers(name string, before func(sumAdded)) *projection.ViewDefinition[sum] {
	return projection.View(name, projection.OnMeta(func(s *sum, e sumAdded, r eventstore.Recorded) {
		if before != nil {
			before(e)
		}
		if r.Position <= s.Last {
			panic(fmt.Sprintf("event %d came behind %d", r.Position, s.Last))
		}
		s.Sum, s.Events, s.Last = s.Sum+e.N, s.Events+1, r.Position
	}))
}

func added(id string, n int) eventstore.Event {
	data, err := json.Marshal(sumAdded{n})
	if err != nil {
		panic(err)
	}
	return eventstore.Event{Stream: eventstore.Stream{Category: "sum", ID: id}, Type: "sum.added", Data: data}
}

func commitOf(events ...eventstore.Event) eventstore.Commit { return eventstore.Commit{Events: events} }

var discard = slog.New(slog.DiscardHandler)

// patience is for what must come, on a machine that is busy with other tests.
const patience = 30 * time.Second

// movingStore appends behind the heads that it tells.
type movingStore struct {
	InlineStore
	appends atomic.Int64 // how often
}

func (s *movingStore) Unwrap() eventstore.Store { return s.InlineStore }
func (s *movingStore) Shared() bool             { return projection.Shared(s.InlineStore) }

func (s *movingStore) Head(ctx context.Context) (eventstore.Position, error) {
	head, err := s.InlineStore.Head(ctx)
	if err == nil && s.appends.Add(-1) >= 0 {
		_, err = s.InlineStore.Append(ctx, commitOf(added("a", 1)))
	}
	return head, err
}

// inlineNode is an engine whose projections run.
type inlineNode struct {
	engine *projection.Engine
	store  InlineStore
	owner  string
	views  map[string]*projection.ViewDefinition[sum]
	stop   func()
}

var owners atomic.Int64

func runInline(t testing.TB, store InlineStore, views ...*projection.ViewDefinition[sum]) *inlineNode {
	t.Helper()
	n := &inlineNode{store: store, owner: fmt.Sprint("node", owners.Add(1)), views: map[string]*projection.ViewDefinition[sum]{}}
	n.engine = projection.NewEngine(store, store, projection.Options{Logger: discard, Owner: n.owner, Attempts: 2, RetryAfter: time.Millisecond})
	for _, v := range views {
		require.NoError(t, n.engine.Add(v))
		n.views[v.Name()] = v
	}
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	for _, w := range n.engine.Workers() {
		group.Go(func() {
			if err := w.Run(ctx); err != nil {
				t.Errorf("%s: %v", w.Name(), err)
			}
		})
	}
	n.stop = sync.OnceFunc(func() {
		cancel()
		group.Wait()
		n.engine.Close()
	})
	t.Cleanup(n.stop)
	return n
}

func (n *inlineNode) status(t testing.TB, name string) projection.Status {
	t.Helper()
	all, err := n.engine.Status(context.Background())
	require.NoError(t, err)
	for _, s := range all {
		if s.Name == name {
			return s
		}
	}
	require.Fail(t, "no projection "+name)
	return projection.Status{}
}

// rows returns the rows and the checkpoint of one snapshot.
func (n *inlineNode) rows(t testing.TB, name string) (rows map[string]sum, at eventstore.Position) {
	t.Helper()
	require.NoError(t, n.store.View(context.Background(), func(tx projection.StateTx) error {
		rows = map[string]sum{}
		for e, err := range n.views[name].Rows(tx, projection.Range{}) {
			if err != nil {
				return err
			}
			rows[e.Key] = e.Row
		}
		c, err := tx.Checkpoint("projection." + name)
		at = c.Position
		return err
	}))
	return rows, at
}

// verify folds the log anew and compares.
func (n *inlineNode) verify(t testing.TB, store InlineStore, names ...string) {
	t.Helper()
	head, err := store.Head(context.Background())
	require.NoError(t, err)
	for _, name := range names {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		require.NoError(t, n.engine.WaitFor(ctx, name, head))
		cancel()
		v, err := n.engine.Verify(context.Background(), name)
		require.NoError(t, err)
		require.True(t, v.Agrees(), "%s: %s", name, v)
		require.GreaterOrEqual(t, v.Position, head)
		if n.views[name] == nil {
			continue
		}
		rows, at := n.rows(t, name)
		if at == v.Position {
			require.Equal(t, folded(t, store, at), rows)
		}
	}
}
