package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// mixedLog writes a log whose categories, types and tags overlap, and returns
// all of it.
func mixedLog(t testing.TB, ctx context.Context, store eventstore.Store, n int) []eventstore.Recorded {
	t.Helper()
	categories := []string{"account", "accounting", "order", "a"}
	types := []string{"opened", "closed", "opened.late", "noted"}
	for i := range n {
		e := event(stream(categories[i%4], fmt.Sprint(i%7)), types[(i/2)%4])
		e.Data = fmt.Appendf(nil, `{"N":%d}`, i)
		for j, tag := range []string{"t:1", "t:2", "t:10", "other"} {
			if i%(j+2) == 0 {
				e.Tags = append(e.Tags, tag)
			}
		}
		mustAppend(t, ctx, store, commit(e))
	}
	everything := mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{})
	require.Len(t, everything, n, "reading everything yields everything")
	return everything
}

// mixedQueries are queries on the log of mixedLog, by name.
func mixedQueries() map[string]eventstore.Query {
	q := map[string]eventstore.Query{
		"all":                     eventstore.All(),
		"stream":                  eventstore.OneStream(stream("account", "0")),
		"missing stream":          eventstore.OneStream(stream("account", "nobody")),
		"category":                eventstore.OneCategory("account"),
		"category, longer":        eventstore.OneCategory("accounting"),
		"category, a prefix":      eventstore.OneCategory("a"),
		"category, missing":       eventstore.OneCategory("acc"),
		"type":                    eventstore.OfTypes("opened"),
		"any of two types":        eventstore.OfTypes("opened", "noted"),
		"type, missing":           eventstore.OfTypes("open"),
		"a type twice":            eventstore.OfTypes("opened", "opened"),
		"tag":                     eventstore.Tagged("t:1"),
		"tag, longer":             eventstore.Tagged("t:10"),
		"all of two tags":         eventstore.Tagged("t:1", "t:2"),
		"all of three tags":       eventstore.Tagged("other", "t:1", "t:10"),
		"a tag twice":             eventstore.Tagged("t:2", "t:2"),
		"tag, missing":            eventstore.Tagged("t"),
		"slices, low half":        eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 0, To: 512}}),
		"slices, high half":       eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 512, To: 1024}}),
		"slices, one":             eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: stream("account", "0").Slice(), To: stream("account", "0").Slice() + 1}}),
		"category and type":       eventstore.Match(eventstore.Item{Category: "account", Types: []string{"opened", "closed"}}),
		"category and tag":        eventstore.Match(eventstore.Item{Category: "order", Tags: []string{"t:1"}}),
		"category and slices":     eventstore.Match(eventstore.Item{Category: "order", Slices: eventstore.SliceRange{From: 100, To: 900}}),
		"stream and type":         eventstore.Match(eventstore.Item{Stream: stream("account", "4"), Types: []string{"opened"}}),
		"stream, other category":  eventstore.Match(eventstore.Item{Stream: stream("account", "4"), Category: "order"}),
		"type and tags":           eventstore.Match(eventstore.Item{Types: []string{"opened", "noted"}, Tags: []string{"t:1", "t:2"}}),
		"everything constrained":  eventstore.Match(eventstore.Item{Category: "account", Stream: stream("account", "4"), Types: []string{"opened", "noted"}, Tags: []string{"t:1"}, Slices: eventstore.SliceRange{From: 0, To: 1024}}),
		"two categories":          eventstore.Match(eventstore.Item{Category: "account"}, eventstore.Item{Category: "order"}),
		"overlapping items":       eventstore.Match(eventstore.Item{Category: "account"}, eventstore.Item{Types: []string{"opened"}}, eventstore.Item{Tags: []string{"t:1"}}),
		"the same item twice":     eventstore.Match(eventstore.Item{Category: "account"}, eventstore.Item{Category: "account"}),
		"either of tags":          eventstore.Match(eventstore.Item{Tags: []string{"t:1"}}, eventstore.Item{Tags: []string{"t:2"}}),
		"types of two categories": eventstore.Match(eventstore.Item{Category: "account", Types: []string{"opened"}}, eventstore.Item{Category: "order", Types: []string{"closed"}}),
		"missing or there":        eventstore.Match(eventstore.Item{Category: "nothing"}, eventstore.Item{Stream: stream("a", "3")}),
		"both missing":            eventstore.Match(eventstore.Item{Category: "nothing"}, eventstore.Item{Tags: []string{"nothing"}}),
	}
	return q
}

func requireSameEvents(t testing.TB, want, got []eventstore.Recorded, format string, args ...any) {
	t.Helper()
	require.Equal(t, positions(want), positions(got), append([]any{format}, args...)...)
	for i := range want {
		require.True(t, sameEvent(&want[i], &got[i]), "the event at position %d is %+v in one answer and %+v in another", want[i].Position, want[i], got[i])
	}
}

func sameEvent(a, b *eventstore.Recorded) bool {
	return a.ID == b.ID && a.Stream == b.Stream && a.Version == b.Version && a.Position == b.Position && a.Type == b.Type &&
		slices.Equal(a.Tags, b.Tags) && string(a.Data) == string(b.Data) && a.Time.Equal(b.Time)
}

var readChecks = []check{
	{
		name: "Queries",
		rule: "a read yields exactly the events that Query.Matches selects, in position order, or in reverse; kinds of query that are not declared are refused with errors.ErrUnsupported",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			everything := mixedLog(t, ctx, store, 84)
			for name, q := range mixedQueries() {
				for _, back := range []bool{false, true} {
					declared := s.features.Forward
					if back {
						declared = s.features.Backward
					}
					got, err := all(store.Read(ctx, q, eventstore.ReadOptions{Backward: back}))
					if declared&kindOf(q) == 0 {
						require.ErrorIs(t, err, errors.ErrUnsupported, "%s (backward: %v): %s queries are not declared, so they must be refused", name, back, kindOf(q))
						require.Empty(t, got)
						continue
					}
					require.NoError(t, err, "%s (backward: %v): %s queries are declared", name, back, kindOf(q))
					want := matching(everything, q)
					if back {
						slices.Reverse(want)
					}
					requireSameEvents(t, want, got, "%s (backward: %v)", name, back)
				}
			}
		},
	},
	{
		name: "Ranges",
		rule: "After is exclusive and Through inclusive in both directions; limits count matching events from where the read begins; bounds beyond the log are no error",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			everything := mixedLog(t, ctx, store, 42)
			head := everything[len(everything)-1].Position
			bounds := []eventstore.Position{0, everything[0].Position, everything[9].Position, everything[20].Position, head - 1, head, head + 1, head + 1000}
			for _, name := range []string{"all", "stream", "category", "type", "tag", "all of two tags", "slices, low half", "type and tags", "overlapping items"} {
				q := mixedQueries()[name]
				for _, back := range []bool{false, true} {
					declared := s.features.Forward
					if back {
						declared = s.features.Backward
					}
					if declared&kindOf(q) == 0 {
						continue
					}
					for _, after := range bounds {
						for _, through := range bounds {
							for _, limit := range []int{0, 1, 3, 1000} {
								var want []eventstore.Recorded
								for _, r := range matching(everything, q) {
									if r.Position > after && (through == 0 || r.Position <= through) {
										want = append(want, r)
									}
								}
								if back {
									slices.Reverse(want)
								}
								if limit > 0 && len(want) > limit {
									want = want[:limit]
								}
								o := eventstore.ReadOptions{After: after, Through: through, Backward: back, Limit: limit}
								require.Equal(t, positions(want), positions(mustRead(t, ctx, store, q, o)), "%s with %+v", name, o)
							}
						}
					}
				}
			}
		},
	},
	{
		name: "Empty",
		rule: "an empty log and a stream that does not exist are empty, not an error",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			empty := func() {
				require.Empty(t, mustRead(t, ctx, store, eventstore.OneStream(account("nobody")), eventstore.ReadOptions{}))
				if s.features.Backward&QueryStream != 0 {
					require.Empty(t, mustRead(t, ctx, store, eventstore.OneStream(account("nobody")), eventstore.ReadOptions{Backward: true}))
				}
			}
			require.Empty(t, mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{}))
			empty()
			mustAppend(t, ctx, store, commit(events(account("ann"), 1)...))
			empty()
		},
	},
	{
		name: "Long",
		rule: "a read of many events yields every one once and in order, across whatever pages the backend reads by",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			per := min(700, s.features.Limits.EventsPerCommit)
			total := 0
			for range 4 {
				mustAppend(t, ctx, store, commit(events(account("ann"), per)...))
				mustAppend(t, ctx, store, commit(events(account("bob"), 1)...))
				total += per + 1
			}
			everything := mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{})
			require.Len(t, everything, total)
			for i := 1; i < len(everything); i++ {
				require.Greater(t, everything[i].Position, everything[i-1].Position)
			}
			ann := mustRead(t, ctx, store, eventstore.OneStream(account("ann")), eventstore.ReadOptions{})
			require.Len(t, ann, 4*per)
			for i, r := range ann {
				require.Equal(t, uint64(i+1), r.Version)
			}
			for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneStream(account("ann"))} {
				if s.features.Backward&kindOf(q) == 0 {
					continue
				}
				back := mustRead(t, ctx, store, q, eventstore.ReadOptions{Backward: true})
				slices.Reverse(back)
				require.Equal(t, positions(mustRead(t, ctx, store, q, eventstore.ReadOptions{})), positions(back))
				require.Equal(t, positions(back[len(back)-per-30:]), reversed(positions(mustRead(t, ctx, store, q, eventstore.ReadOptions{Backward: true, Limit: per + 30}))), "a limit beyond one page")
			}
		},
	},
	{
		name: "EndsAtTheHeadItSaw",
		rule: "a forward read ends at the head seen when it began, also when events are appended while it runs; appending and reading within the loop must not block",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, commit(events(ann, 10)...))
			for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneStream(ann)} {
				head := mustHead(t, ctx, store)
				n := len(mustRead(t, ctx, store, q, eventstore.ReadOptions{}))
				got := 0
				for r, err := range store.Read(ctx, q, eventstore.ReadOptions{}) {
					require.NoError(t, err)
					require.LessOrEqual(t, r.Position, head, "the read goes on beyond the head at which it began")
					mustAppend(t, ctx, store, commit(events(ann, 1)...))
					if got++; got == 1 {
						require.NotEmpty(t, mustRead(t, ctx, store, q, eventstore.ReadOptions{Limit: 3}), "a read within a read")
					}
				}
				require.Equal(t, n, got)
			}
		},
	},
	{
		name: "Break",
		rule: "breaking out of a read releases what it held: the store goes on working, however often that happens",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, commit(events(ann, 50)...))
			for i := range 200 {
				seq := store.Read(ctx, eventstore.All(), eventstore.ReadOptions{Backward: i%2 == 1 && s.features.Backward&QueryAll != 0})
				for _, err := range seq {
					require.NoError(t, err)
					break
				}
			}
			mustAppend(t, ctx, store, commit(events(ann, 1)...))
			require.NoError(t, store.Close(), "close after broken-off reads")
		},
	},
	{
		name: "InvalidQueries",
		rule: "a query that selects nothing by mistake is ErrInvalid: the zero query, an item without constraint, a bad name, an empty slice range, a negative limit",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			mustAppend(t, ctx, store, commit(events(account("ann"), 1)...))
			for name, q := range map[string]eventstore.Query{
				"zero":           {},
				"empty item":     eventstore.Match(eventstore.Item{}),
				"one empty item": eventstore.Match(eventstore.Item{Stream: account("ann")}, eventstore.Item{}),
				"both":           {Everything: true, Items: []eventstore.Item{{Category: "account"}}},
				"bad category":   eventstore.OneCategory("no-dash"),
				"bad stream":     eventstore.OneStream(eventstore.Stream{Category: "account"}),
				"bad type":       eventstore.OfTypes(""),
				"bad tag":        eventstore.Tagged("a\x00b"),
				"slices":         eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 7, To: 7}}),
				"slices beyond":  eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 0, To: 1025}}),
			} {
				got, err := all(store.Read(ctx, q, eventstore.ReadOptions{}))
				require.ErrorIs(t, err, eventstore.ErrInvalid, "read: %s", name)
				require.Empty(t, got)
				for _, err := range store.Subscribe(ctx, q, 0) {
					require.ErrorIs(t, err, eventstore.ErrInvalid, "subscribe: %s", name)
					break
				}
			}
			_, err := all(store.Read(ctx, eventstore.All(), eventstore.ReadOptions{Limit: -1}))
			require.ErrorIs(t, err, eventstore.ErrInvalid, "negative limit")
		},
	},
	{
		name: "Again",
		rule: "the sequence that Read returns can be ranged over again, and reads anew each time; what one reader got does not change under another one",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, commit(events(ann, 3)...))
			seq := store.Read(ctx, eventstore.OneStream(ann), eventstore.ReadOptions{})
			first, err := all(seq)
			require.NoError(t, err)
			mustAppend(t, ctx, store, commit(events(ann, 2)...))
			second, err := all(seq)
			require.NoError(t, err)
			require.Len(t, first, 3)
			require.Len(t, second, 5)
			requireSameEvents(t, first, second[:3], "the same events come back")
		},
	},
	{
		name:  "SurviveReopening",
		rule:  "what was acknowledged is there after the store was closed and opened again, and the log goes on where it ended",
		needs: func(f Features) string { return lacks(f.Reopen, "reopening") },
		run: func(t testing.TB, s *suite) {
			ctx, p := s.context(t), s.prepare(t)
			store := p.open(t)
			before := mixedLog(t, ctx, store, 42)
			head := before[len(before)-1].Position
			store = p.reopen(t)
			require.Equal(t, head, mustHead(t, ctx, store))
			requireSameEvents(t, before, mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{}), "after reopening")
			for name, q := range mixedQueries() {
				if s.features.Forward&kindOf(q) != 0 {
					requireSameEvents(t, matching(before, q), mustRead(t, ctx, store, q, eventstore.ReadOptions{}), "%s after reopening", name)
				}
			}
			at := before[len(before)-1].Revision()
			of := before[len(before)-1].Stream
			_, err := store.Append(ctx, eventstore.Commit{Events: events(of, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{})}})
			require.Equal(t, at, mustConflict(t, err).Actual, "versions are known after reopening")
			r := mustAppend(t, ctx, store, eventstore.Commit{Events: events(of, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(of, at)}})
			require.Greater(t, r.First, head)
			if s.features.Contiguous {
				require.Equal(t, head+1, r.First)
			}
		},
	},
}

func reversed[E any](s []E) []E {
	s = slices.Clone(s)
	slices.Reverse(s)
	return s
}
