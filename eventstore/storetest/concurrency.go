package storetest

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

var concurrencyChecks = []check{
	{
		name: "OneExpectationOneWinner",
		rule: "of N writers with the same expected version exactly one wins; every loser's conflict names the version that it lost to",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			const writers = 8
			ann := account("ann")
			var at eventstore.Revision
			for round := range pick(30, 8) {
				receipts, failures := make([]eventstore.Receipt, writers), make([]error, writers)
				require.NoError(t, together(writers, func(i int, gate func()) error {
					c := eventstore.Commit{Events: events(ann, 1+i%3), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, at)}}
					gate()
					receipts[i], failures[i] = store.Append(ctx, c)
					return nil
				}))
				winner := -1
				for i, err := range failures {
					if err == nil {
						require.Equal(t, -1, winner, "round %d: writers %d and %d both won with the expectation %s", round, winner, i, at)
						winner = i
					}
				}
				require.NotEqual(t, -1, winner, "round %d: nobody won with the right expectation: %v", round, failures)
				next := receipts[winner].Revision(ann)
				require.Equal(t, at.Version+uint64(1+winner%3), next.Version)
				for i, err := range failures {
					if i != winner {
						conflict := mustConflict(t, err)
						require.Equal(t, at.Version, conflict.Expected.Version)
						require.Equal(t, next, conflict.Actual, "round %d: the loser learns the actual revision", round)
					}
				}
				at = next
			}
			got := mustRead(t, ctx, store, eventstore.OneStream(ann), eventstore.ReadOptions{})
			require.Len(t, got, int(at.Version), "losers write nothing")
		},
	},
	{
		name: "NoLostUpdates",
		rule: "writers that read, decide and append at the version they read, again after each conflict, lose no update; a conflict fails that commit only, never another one of the same moment",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			const writers = 8
			each := pick(25, 5)
			hot := account("hot")
			require.NoError(t, together(writers, func(i int, gate func()) error {
				own := account(fmt.Sprint(i))
				gate()
				for n := range each {
					for {
						seen, err := all(store.Read(ctx, eventstore.OneStream(hot), eventstore.ReadOptions{}))
						if err != nil {
							return err
						}
						var at eventstore.Revision
						if len(seen) > 0 {
							at = seen[len(seen)-1].Revision()
						}
						decided := event(hot, fmt.Sprint("counted to ", len(seen)+1))
						_, err = store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{decided}, Conditions: []eventstore.Condition{eventstore.StreamAt(hot, at)}})
						if err == nil {
							break
						}
						if !errors.Is(err, eventstore.ErrConflict) {
							return err
						}
					}
					r, err := store.Append(ctx, eventstore.Commit{Events: events(own, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(own, eventstore.Revision{Version: uint64(n)})}})
					if err != nil {
						return fmt.Errorf("writer %d is alone on its stream, yet: %w", i, err)
					}
					if v := r.Revision(own).Version; v != uint64(n+1) {
						return fmt.Errorf("writer %d reached version %d of its stream, want %d", i, v, n+1)
					}
				}
				return nil
			}))
			got := mustRead(t, ctx, store, eventstore.OneStream(hot), eventstore.ReadOptions{})
			require.Len(t, got, writers*each, "every successful append is there, once")
			for i, r := range got {
				require.Equal(t, uint64(i+1), r.Version)
				require.Equal(t, fmt.Sprint("counted to ", i+1), r.Type, "an event was decided on a state that another writer had already changed")
			}
			everything := mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{})
			require.Len(t, everything, 2*writers*each)
		},
	},
	{
		name: "CommitsDoNotInterleave",
		rule: "the events of one commit are neighbours in the log, also when many commits are written at once",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			const writers = 8
			receipts := make([][]eventstore.Receipt, writers)
			require.NoError(t, together(writers, func(i int, gate func()) error {
				gate()
				for n := range pick(20, 5) {
					r, err := store.Append(ctx, commit(events(account(fmt.Sprint(i)), 1+(n+i)%7)...))
					if err != nil {
						return err
					}
					receipts[i] = append(receipts[i], r)
				}
				return nil
			}))
			owner := map[eventstore.Position]int{}
			everything := mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{})
			for i, mine := range receipts {
				for n, r := range mine {
					got := 0
					for _, e := range everything {
						if e.Position >= r.First && e.Position <= r.Last {
							got++
							require.Equal(t, account(fmt.Sprint(i)), e.Stream, "an event of another commit lies between First and Last of a receipt")
							_, taken := owner[e.Position]
							require.False(t, taken, "position %d belongs to two receipts", e.Position)
							owner[e.Position] = i
						}
					}
					require.Equal(t, 1+(n+i)%7, got)
				}
			}
			require.Len(t, owner, len(everything), "every event belongs to a receipt")
		},
	},
}
