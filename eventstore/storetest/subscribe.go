package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// follower reads a subscription in a goroutine of its own and checks each
// batch against the rules that all batches obey.
type follower struct {
	name   string
	query  eventstore.Query
	after  eventstore.Position
	target atomic.Uint64 // it stops once Through has reached it; 0: not known yet
	events []eventstore.Recorded
	caught bool
	err    error
	done   chan struct{}
}

func follow(ctx context.Context, store eventstore.Store, name string, q eventstore.Query, after eventstore.Position) *follower {
	f := &follower{name: name, query: q, after: after, done: make(chan struct{})}
	go func() {
		defer close(f.done)
		f.err = f.run(ctx, store)
	}()
	return f
}

func (f *follower) run(ctx context.Context, store eventstore.Store) error {
	through, first := f.after, true
	for batch, err := range store.Subscribe(ctx, f.query, f.after) {
		if err != nil {
			return fmt.Errorf("subscription of %s ended at %d: %w (%w)", f.name, through, err, context.Cause(ctx))
		}
		if err := f.check(batch, through, first); err != nil {
			return err
		}
		through, first = batch.Through, false
		f.events = append(f.events, batch.Events...)
		f.caught = f.caught || batch.CaughtUp
		if target := eventstore.Position(f.target.Load()); target != 0 && through >= target {
			return nil
		}
	}
	return fmt.Errorf("subscription of %s ended at %d without an error", f.name, through)
}

func (f *follower) check(b eventstore.Batch, through eventstore.Position, first bool) error {
	if b.Through < through {
		return fmt.Errorf("subscription of %s: Through went back from %d to %d", f.name, through, b.Through)
	}
	if !first && b.Through == through {
		return fmt.Errorf("subscription of %s: a batch that is not the first one brings nothing: Through stays %d", f.name, through)
	}
	last := through
	for i := range b.Events {
		e := &b.Events[i]
		if e.Position <= last {
			return fmt.Errorf("subscription of %s: the event at %d comes after %d: twice or out of order", f.name, e.Position, last)
		}
		if e.Position > b.Through {
			return fmt.Errorf("subscription of %s: the event at %d lies beyond its batch's Through %d", f.name, e.Position, b.Through)
		}
		if !f.query.Matches(e) {
			return fmt.Errorf("subscription of %s: the event at %d does not match", f.name, e.Position)
		}
		last = e.Position
	}
	return nil
}

// until waits for the follower to have considered everything up to the position.
func (f *follower) until(t testing.TB, ctx context.Context, store eventstore.Store, p eventstore.Position) {
	t.Helper()
	f.target.Store(uint64(p))
	// One more event makes every subscription yield, however far it had come.
	mustAppend(t, ctx, store, commit(event(stream("bell", "b"), "bell.rang")))
	<-f.done
	require.NoError(t, f.err)
}

// waitFor runs the loop body for each batch until it returns true.
func waitFor(t testing.TB, ctx context.Context, store eventstore.Store, q eventstore.Query, after eventstore.Position, enough func(eventstore.Batch) bool) {
	t.Helper()
	for batch, err := range store.Subscribe(ctx, q, after) {
		require.NoError(t, err, "the subscription ended before what it waits for came: %v", context.Cause(ctx))
		if enough(batch) {
			return
		}
	}
	require.Fail(t, "the subscription ended without an error")
}

var subscribeChecks = []check{
	{
		name: "CatchesUpThenFollows",
		rule: "a subscription yields what is stored and then what is appended, in order and once; CaughtUp says that Through is the head",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, commit(events(ann, 5)...))
			head := mustHead(t, ctx, store)
			var got []eventstore.Recorded
			appended := 0
			waitFor(t, ctx, store, eventstore.All(), 0, func(b eventstore.Batch) bool {
				got = append(got, b.Events...)
				if b.CaughtUp {
					require.Equal(t, head, b.Through, "CaughtUp: nobody appends meanwhile, so Through is the head")
				} else {
					return false
				}
				if appended == 4 {
					return true
				}
				appended++
				head = mustAppend(t, ctx, store, commit(events(ann, appended)...)).Last
				return false
			})
			requireSameEvents(t, mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{}), got, "what was read and what was subscribed to")
		},
	},
	{
		name: "CaughtUpAtOnce",
		rule: "a subscription with nothing to catch up says so at once, with a batch without events",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			for range 2 {
				head := mustHead(t, ctx, store)
				waitFor(t, ctx, store, eventstore.All(), head, func(b eventstore.Batch) bool {
					require.Empty(t, b.Events)
					require.True(t, b.CaughtUp)
					require.Equal(t, head, b.Through)
					return true
				})
				mustAppend(t, ctx, store, commit(events(account("ann"), 3)...))
			}
		},
	},
	{
		name: "Queries",
		rule: "a subscription yields exactly the events that Query.Matches selects; kinds of query that are not declared are refused with errors.ErrUnsupported",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			everything := mixedLog(t, ctx, store, 84)
			head, middle := everything[len(everything)-1].Position, everything[40].Position
			for name, q := range mixedQueries() {
				for _, after := range []eventstore.Position{0, middle, head} {
					if s.features.Subscribe&kindOf(q) == 0 {
						for _, err := range store.Subscribe(ctx, q, after) {
							require.ErrorIs(t, err, errors.ErrUnsupported, "%s: %s queries are not declared, so they must be refused", name, kindOf(q))
							break
						}
						continue
					}
					var want, got []eventstore.Recorded
					for _, r := range matching(everything, q) {
						if r.Position > after {
							want = append(want, r)
						}
					}
					waitFor(t, ctx, store, q, after, func(b eventstore.Batch) bool {
						got = append(got, b.Events...)
						return b.Through >= head
					})
					requireSameEvents(t, want, got, "%s after %d", name, after)
				}
			}
		},
	},
	{
		name: "ThroughProgresses",
		rule: "Through advances also when nothing matches: a filter must not hold back a checkpoint, nor anyone who waits for a position",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			queries := []eventstore.Query{eventstore.OneStream(account("nobody"))}
			for _, q := range []eventstore.Query{eventstore.OneCategory("nothing"), eventstore.OfTypes("nothing"), eventstore.Tagged("nothing"), eventstore.Tagged("nothing", "at all")} {
				if s.features.Subscribe&kindOf(q) != 0 {
					queries = append(queries, q)
				}
			}
			for range 3 {
				mustAppend(t, ctx, store, commit(events(ann, min(700, s.features.Limits.EventsPerCommit))...))
			}
			for _, q := range queries {
				head, rounds := mustHead(t, ctx, store), 0
				waitFor(t, ctx, store, q, 0, func(b eventstore.Batch) bool {
					require.Empty(t, b.Events)
					if b.Through < head {
						return false
					}
					require.True(t, b.CaughtUp)
					head = mustAppend(t, ctx, store, commit(events(ann, 1)...)).Last
					rounds++
					return rounds == 4
				})
			}
		},
	},
	{
		name: "BeyondTheHead",
		rule: "After may lie beyond the head: nothing is yielded until the log has grown past it",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			first := mustAppend(t, ctx, store, commit(events(ann, 2)...))
			after := first.Last + 3
			started := make(chan struct{})
			go func() {
				defer close(started)
				for range 10 {
					if _, err := store.Append(ctx, commit(events(ann, 1)...)); err != nil {
						return
					}
				}
			}()
			var got []eventstore.Position
			waitFor(t, ctx, store, eventstore.All(), after, func(b eventstore.Batch) bool {
				// Where the log ends at the position just when the subscription begins, that is
				// said: it has caught up.
				require.GreaterOrEqual(t, b.Through, after, "a batch came although the log had not grown to the position")
				got = append(got, positions(b.Events)...)
				return len(got) > 0
			})
			<-started
			require.Greater(t, got[0], after)
			if s.features.Contiguous {
				require.Equal(t, after+1, got[0])
			}
		},
	},
	{
		name: "EndsWithContext",
		rule: "a waiting subscription ends when its context does, and yields the context's error once",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			mustAppend(t, ctx, store, commit(events(account("ann"), 1)...))
			for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneStream(account("nobody"))} {
				once, cancel := context.WithCancel(ctx)
				ends := 0
				for b, err := range store.Subscribe(once, q, 0) {
					if err != nil {
						require.ErrorIs(t, err, context.Canceled)
						ends++
						continue
					}
					require.Zero(t, ends, "after the error nothing more is yielded")
					if b.CaughtUp {
						go cancel() // the subscription is about to wait
					}
				}
				cancel()
				require.Equal(t, 1, ends)
			}
		},
	},
	{
		name: "EndsWithBreak",
		rule: "breaking out of a subscription releases what it held, however often that happens",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			mustAppend(t, ctx, store, commit(events(account("ann"), 20)...))
			for range 100 {
				for _, err := range store.Subscribe(ctx, eventstore.All(), 0) {
					require.NoError(t, err)
					break
				}
			}
			mustAppend(t, ctx, store, commit(events(account("ann"), 1)...))
			require.NoError(t, store.Close(), "close after broken-off subscriptions")
		},
	},
	{
		name: "EndsWithClose",
		rule: "Close ends waiting subscriptions with ErrClosed",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			mustAppend(t, ctx, store, commit(events(account("ann"), 1)...))
			const subscribers = 4
			waiting, ended := make(chan struct{}, subscribers), make(chan error, subscribers)
			for i := range subscribers {
				go func() {
					var last error
					for b, err := range store.Subscribe(ctx, eventstore.OneStream(account([]string{"ann", "nobody"}[i%2])), 0) {
						last = err
						if err == nil && b.CaughtUp {
							waiting <- struct{}{}
						}
					}
					ended <- last
				}()
			}
			for range subscribers {
				select {
				case <-waiting:
				case err := <-ended:
					require.NoError(t, err, "a subscription ended before Close")
				case <-ctx.Done():
					require.NoError(t, context.Cause(ctx), "a subscription never said that it had caught up")
				}
			}
			require.NoError(t, store.Close())
			for range subscribers {
				require.ErrorIs(t, <-ended, eventstore.ErrClosed)
			}
		},
	},
	{
		name: "SlowReceiver",
		rule: "a receiver that does not come back for its next batch slows no writer, and misses nothing once it does",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, commit(events(ann, 1)...))
			written := make(chan error, 1)
			var got []eventstore.Recorded
			n := pick(300, 60)
			var head eventstore.Position
			waitFor(t, ctx, store, eventstore.All(), 0, func(b eventstore.Batch) bool {
				got = append(got, b.Events...)
				if head == 0 {
					go func() {
						for range n {
							r, err := store.Append(ctx, commit(events(ann, 10)...))
							if err != nil {
								written <- fmt.Errorf("the writer waits for a subscriber: %w", err)
								return
							}
							head = r.Last
						}
						written <- nil
					}()
					require.NoError(t, <-written)
				}
				return b.Through >= head
			})
			require.Len(t, got, 1+10*n)
			requireSameEvents(t, mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{}), got, "the slow receiver")
		},
	},
	{
		name: "NoneSkipped",
		rule: "while fast writers of small commits and slow writers of large ones are at work, every subscription, of whatever filter and from wherever it starts, yields every matching event once and in order",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			const fast, slow = 6, 3
			queries := map[string]eventstore.Query{
				"all":      eventstore.All(),
				"stream":   eventstore.OneStream(account("fast1")),
				"category": eventstore.OneCategory("bulk"),
				"type":     eventstore.OfTypes("fast.happened", "bulk.7"),
				"tag":      eventstore.Tagged("even"),
				"slices":   eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 0, To: 512}}),
				"mixed":    eventstore.Match(eventstore.Item{Category: "account", Tags: []string{"even"}}, eventstore.Item{Types: []string{"bulk.3"}}),
			}
			for name, q := range queries {
				if s.features.Subscribe&kindOf(q) == 0 {
					delete(queries, name)
				}
			}
			var followers []*follower
			start := func(when string, after eventstore.Position) {
				for name, q := range queries {
					followers = append(followers, follow(ctx, store, fmt.Sprintf("%s, started %s after %d", name, when, after), q, after))
				}
			}
			start("before", 0)
			small, large := pick(120, 30), pick(15, 4)
			halfway := make(chan struct{}, fast+slow)
			written := make(chan error, 1)
			go func() {
				written <- together(fast+slow, func(i int, gate func()) error {
					gate()
					if i < fast {
						for n := range small {
							e := event(account(fmt.Sprint("fast", i)), "fast.happened")
							if n%2 == 0 {
								e.Tags = []string{"even"}
							}
							if n == small/2 {
								halfway <- struct{}{}
							}
							if _, err := store.Append(ctx, commit(e)); err != nil {
								return err
							}
						}
						return nil
					}
					for n := range large {
						var c eventstore.Commit
						for k := range min(400, s.features.Limits.EventsPerCommit) {
							e := event(stream("bulk", fmt.Sprint(i, ".", k%5)), fmt.Sprint("bulk.", k%10), "tag:"+fmt.Sprint(k))
							if !s.features.MultiStream {
								e.Stream = stream("bulk", fmt.Sprint(i))
							}
							e.Data = make([]byte, 512)
							c.Events = append(c.Events, e)
						}
						if n == large/2 {
							halfway <- struct{}{}
						}
						if _, err := store.Append(ctx, c); err != nil {
							return err
						}
					}
					return nil
				})
			}()
			for range fast + slow {
				<-halfway
			}
			middle := mustHead(t, ctx, store)
			start("halfway", 0)
			start("halfway", middle/2)
			start("halfway", middle)
			require.NoError(t, <-written)
			head := mustHead(t, ctx, store)
			start("afterwards", 0)
			everything := mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{Through: head})
			for _, f := range followers {
				f.until(t, ctx, store, head)
			}
			for _, f := range followers {
				var want []eventstore.Position
				for _, r := range matching(everything, f.query) {
					if r.Position > f.after {
						want = append(want, r.Position)
					}
				}
				got := slices.DeleteFunc(positions(f.events), func(p eventstore.Position) bool { return p > head })
				require.Equal(t, len(want), len(got), "subscription of %s: number of events", f.name)
				require.True(t, slices.Equal(want, got), "subscription of %s skipped or repeated events: %s", f.name, firstDifference(want, got))
			}
			if s.features.Contiguous {
				for i, r := range everything {
					require.Equal(t, eventstore.Position(i+1), r.Position, "the log has a hole")
				}
			}
		},
	},
}

func firstDifference[E comparable](want, got []E) string {
	for i := range min(len(want), len(got)) {
		if want[i] != got[i] {
			return fmt.Sprintf("at index %d want %v, got %v", i, want[i], got[i])
		}
	}
	return fmt.Sprintf("want %d, got %d", len(want), len(got))
}
