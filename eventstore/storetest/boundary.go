package storetest

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// boundaryLog is a log with known matches:
//
//	first: course.defined  [course:c1]
//	       student.joined  [student:s1]
//	       enrolled        [course:c1 student:s1]
//	       course.defined  [course:c2]
//	       noise
func boundaryLog(t testing.TB, s *suite) (Store, []eventstore.Position) {
	t.Helper()
	ctx, store := s.context(t), s.open(t)
	var at []eventstore.Position
	for i, e := range []eventstore.Event{
		event(stream("course", "c1"), "course.defined", "course:c1"),
		event(stream("student", "s1"), "student.joined", "student:s1"),
		event(stream("course", "c1"), "enrolled", "course:c1", "student:s1"),
		event(stream("course", "c2"), "course.defined", "course:c2"),
		event(stream("noise", "n"), "noise"),
	} {
		r := mustAppend(t, ctx, store, commit(e))
		require.Equal(t, i, len(at))
		at = append(at, r.Last)
	}
	return store, at
}

var boundaryChecks = []check{
	{
		name:  "Matrix",
		rule:  "NoneMatch fails exactly when an event after the position matches: any item, any of its types, all of its tags; after is exclusive; 0 considers the whole log; a position beyond the head considers nothing. The conflict names the first match",
		needs: needQueries(noneMatch, QueryTypes|QueryTags|QueryMixed, "NoneMatch"),
		run: func(t testing.TB, s *suite) {
			ctx := s.context(t)
			store, at := boundaryLog(t, s)
			item := func(types []string, tags ...string) eventstore.Item { return eventstore.Item{Types: types, Tags: tags} }
			for _, c := range []struct {
				name    string
				query   eventstore.Query
				matches []int // indices into at
			}{
				{"one type", eventstore.OfTypes("course.defined"), []int{0, 3}},
				{"any of two types", eventstore.OfTypes("course.defined", "enrolled"), []int{0, 2, 3}},
				{"one tag", eventstore.Tagged("course:c1"), []int{0, 2}},
				{"all of two tags", eventstore.Tagged("course:c1", "student:s1"), []int{2}},
				{"tags in the other order", eventstore.Tagged("student:s1", "course:c1"), []int{2}},
				{"all of two tags that never meet", eventstore.Tagged("course:c1", "course:c2"), nil},
				{"type and tag", eventstore.Match(item([]string{"course.defined"}, "course:c1")), []int{0}},
				{"any of two types and a tag", eventstore.Match(item([]string{"course.defined", "enrolled"}, "course:c1")), []int{0, 2}},
				{"type and tag that never meet", eventstore.Match(item([]string{"student.joined"}, "course:c1")), nil},
				{"either of two items", eventstore.Match(item([]string{"student.joined"}), item(nil, "course:c2")), []int{1, 3}},
				{"overlapping items", eventstore.Match(item(nil, "student:s1"), item([]string{"enrolled"})), []int{1, 2}},
				{"unknown type", eventstore.OfTypes("never"), nil},
				{"unknown tag", eventstore.Tagged("never"), nil},
				{"a tag is not a prefix", eventstore.Tagged("course:c"), nil},
			} {
				for i := -1; i <= len(at)+1; i++ {
					after := eventstore.Position(0)
					switch {
					case i >= len(at):
						after = at[len(at)-1] + eventstore.Position(i-len(at)+1)*10
					case i >= 0:
						after = at[i]
					}
					var found eventstore.Position
					for _, m := range c.matches {
						if at[m] > after {
							found = at[m]
							break
						}
					}
					expect := eventstore.Commit{
						Events:     []eventstore.Event{event(stream("probe", fmt.Sprint(len(c.name), i)), "probe")},
						Conditions: []eventstore.Condition{eventstore.NoneMatch(c.query, after)},
					}
					if found == 0 {
						_, err := store.Append(ctx, expect)
						require.NoError(t, err, "%s after %d: no event matches, so the condition holds", c.name, after)
						continue
					}
					unchanged(t, ctx, store, func() {
						_, err := store.Append(ctx, expect)
						require.ErrorIs(t, err, eventstore.ErrConflict, "%s after %d: the event at %d matches", c.name, after, found)
						conflict := mustConflict(t, err)
						require.Equal(t, eventstore.ConditionNoneMatch, conflict.Kind)
						require.Equal(t, found, conflict.Found, "%s after %d: Found is the first match", c.name, after)
						require.Equal(t, after, conflict.After)
					})
				}
			}
		},
	},
	{
		name:  "ExclusiveUnderConcurrency",
		rule:  "of N writers that decided on the same read of a boundary exactly one appends; the others conflict on its event",
		needs: needQueries(noneMatch, QueryTags, "NoneMatch"),
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			const writers = 8
			for round := range pick(20, 5) {
				course := fmt.Sprintf("course:%d", round)
				q := eventstore.Tagged(course)
				mustAppend(t, ctx, store, commit(event(stream("course", fmt.Sprint(round)), "course.defined", course)))
				receipts, conflicts := make([]eventstore.Receipt, writers), make([]error, writers)
				err := together(writers, func(i int, gate func()) error {
					seen, err := all(store.Read(ctx, q, eventstore.ReadOptions{}))
					if err != nil {
						return err
					}
					if len(seen) != 1 {
						return fmt.Errorf("writer %d decided on %d events, want the 1 that defines the course", i, len(seen))
					}
					c := commit(event(stream("enrolment", fmt.Sprintf("%d.%d", round, i)), "enrolled", course))
					c.Conditions = []eventstore.Condition{eventstore.NoneMatch(q, seen[0].Position)}
					gate() // everybody has decided on the same read
					receipts[i], conflicts[i] = store.Append(ctx, c)
					return nil
				})
				require.NoError(t, err)
				winner := -1
				for i, err := range conflicts {
					if err == nil {
						require.Equal(t, -1, winner, "round %d: writers %d and %d both appended on the same read", round, winner, i)
						winner = i
					}
				}
				require.NotEqual(t, -1, winner, "round %d: nobody could append, though nobody was in the way: %v", round, conflicts)
				for i, err := range conflicts {
					if i != winner {
						require.Equal(t, receipts[winner].First, mustConflict(t, err).Found, "round %d: the loser learns the winner's position", round)
					}
				}
				require.Len(t, mustRead(t, ctx, store, q, eventstore.ReadOptions{}), 2)
			}
		},
	},
	{
		name:  "DisjointDoNotConflict",
		rule:  "a boundary is no wider than its query: writers whose queries share no event all succeed, at the same moment",
		needs: needQueries(noneMatch, QueryTags|QueryMixed, "NoneMatch"),
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			const writers = 16
			for round := range pick(10, 3) {
				err := together(writers, func(i int, gate func()) error {
					own := fmt.Sprintf("seat:%d", i)
					q := eventstore.Match(eventstore.Item{Types: []string{"reserved"}, Tags: []string{own, "hall"}})
					seen, err := all(store.Read(ctx, q, eventstore.ReadOptions{Backward: s.features.Backward&QueryMixed != 0}))
					if err != nil {
						return err
					}
					if len(seen) != round {
						return fmt.Errorf("writer %d saw %d events of its own, want %d", i, len(seen), round)
					}
					var after eventstore.Position
					for _, r := range seen {
						after = max(after, r.Position)
					}
					c := commit(event(stream("seat", fmt.Sprint(i)), "reserved", own, "hall"))
					c.Conditions = []eventstore.Condition{eventstore.NoneMatch(q, after)}
					gate()
					if _, err := store.Append(ctx, c); err != nil {
						return fmt.Errorf("writer %d of disjoint seats was refused: %w", i, err)
					}
					return nil
				})
				require.NoError(t, err, "round %d", round)
			}
		},
	},
	{
		name:  "UniquenessGuard",
		rule:  "NoneMatch(query, 0) lets exactly one of N concurrent writers claim a name, and nobody afterwards",
		needs: needQueries(noneMatch, QueryMixed, "NoneMatch"),
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			for round := range pick(20, 5) {
				name := fmt.Sprintf("name:n%d", round)
				claim := func(who string) error {
					c := commit(event(stream("user", who), "registered", name))
					c.Conditions = []eventstore.Condition{eventstore.NoneMatch(eventstore.Match(eventstore.Item{Types: []string{"registered"}, Tags: []string{name}}), 0)}
					_, err := store.Append(ctx, c)
					return err
				}
				won := make([]bool, 8)
				err := together(len(won), func(i int, gate func()) error {
					gate()
					err := claim(fmt.Sprintf("%d.%d", round, i))
					won[i] = err == nil
					if err != nil && !errors.Is(err, eventstore.ErrConflict) {
						return err
					}
					return nil
				})
				require.NoError(t, err)
				winners := 0
				for _, w := range won {
					if w {
						winners++
					}
				}
				require.Equal(t, 1, winners, "round %d: writers that claimed the name %q", round, name)
				require.ErrorIs(t, claim("late"), eventstore.ErrConflict)
			}
		},
	},
	{
		name:  "WholeLog",
		rule:  "NoneMatch(All(), head) demands that nothing at all was appended since",
		needs: needQueries(noneMatch, QueryAll, "NoneMatch"),
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			c := commit(event(account("ann"), "a"))
			c.Conditions = []eventstore.Condition{eventstore.NoneMatch(eventstore.All(), 0)}
			first := mustAppend(t, ctx, store, c)
			_, err := store.Append(ctx, c)
			require.Equal(t, first.First, mustConflict(t, err).Found)
			c.Conditions = []eventstore.Condition{eventstore.NoneMatch(eventstore.All(), first.Last)}
			mustAppend(t, ctx, store, c)
		},
	},
}
