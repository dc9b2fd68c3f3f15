package storetest

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// mustDuplicate checks that got is the first receipt again.
func mustDuplicate(t testing.TB, first, got eventstore.Receipt) {
	t.Helper()
	require.True(t, got.Duplicate, "the receipt of a used key has Duplicate set")
	require.Equal(t, first.First, got.First, "the first receipt comes back")
	require.Equal(t, first.Last, got.Last, "the first receipt comes back")
	require.Equal(t, first.Revisions, got.Revisions, "the first receipt comes back with its revisions")
	require.Equal(t, first.Fingerprint, got.Fingerprint, "the first receipt comes back with its fingerprint")
}

func mustLookup(t testing.TB, ctx context.Context, store eventstore.Store, s eventstore.Stream, key string) (eventstore.Receipt, bool) {
	t.Helper()
	r, used, err := store.Lookup(ctx, s, key)
	require.NoError(t, err, "look up key %q", key)
	return r, used
}

var keyChecks = []check{
	{
		name: "SameKeyWritesOnce",
		rule: "appending again with the same key writes nothing and returns the first receipt with Duplicate set",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			c := eventstore.Commit{Events: events(ann, 3), Key: "k", Fingerprint: "deposit 3"}
			first := mustAppend(t, ctx, store, c)
			require.False(t, first.Duplicate)
			require.Equal(t, "deposit 3", first.Fingerprint)
			mustAppend(t, ctx, store, commit(events(ann, 2)...))
			unchanged(t, ctx, store, func() {
				again, err := store.Append(ctx, c)
				require.NoError(t, err)
				mustDuplicate(t, first, again)
			})
			without := mustAppend(t, ctx, store, commit(events(ann, 1)...))
			require.Empty(t, without.Fingerprint, "a receipt without key has no fingerprint")
		},
	},
	{
		name: "NeverJudgedAgain",
		rule: "the key is looked at before the conditions: a retry is not judged against what it has itself changed",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			c := eventstore.Commit{Events: events(ann, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}, Key: "k"}
			first := mustAppend(t, ctx, store, c)
			again, err := store.Append(ctx, c)
			require.NoError(t, err, "the condition no longer holds, but the key was used: that is a duplicate, not a conflict")
			mustDuplicate(t, first, again)
		},
	},
	{
		name: "OutcomeMayDiffer",
		rule: "the fingerprint says what a key stands for: with the same one, a retry that decided on other events gets the first receipt, and its events are not written",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			first := mustAppend(t, ctx, store, eventstore.Commit{Events: events(ann, 1), Key: "k", Fingerprint: "request 1"})
			unchanged(t, ctx, store, func() {
				again, err := store.Append(ctx, eventstore.Commit{Events: events(ann, 4), Key: "k", Fingerprint: "request 1"})
				require.NoError(t, err)
				mustDuplicate(t, first, again)
			})
		},
	},
	{
		name: "ReusedForSomethingElse",
		rule: "the same key with another fingerprint is ErrKeyReused, quotes the key and writes nothing",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			first := mustAppend(t, ctx, store, eventstore.Commit{Events: events(ann, 1), Key: "the-key", Fingerprint: "one"})
			unchanged(t, ctx, store, func() {
				_, err := store.Append(ctx, eventstore.Commit{Events: events(ann, 1), Key: "the-key", Fingerprint: "two"})
				require.ErrorIs(t, err, eventstore.ErrKeyReused)
				require.ErrorContains(t, err, "the-key", "the error quotes the key")
				require.False(t, eventstore.CanRetry(err))
			})
			again, err := store.Append(ctx, eventstore.Commit{Events: events(ann, 1), Key: "the-key", Fingerprint: "one"})
			require.NoError(t, err)
			mustDuplicate(t, first, again)
		},
	},
	{
		name: "DerivedFingerprint",
		rule: "without a fingerprint it is derived from the events: the same content is a duplicate, other content is ErrKeyReused",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			base := func() eventstore.Commit {
				return eventstore.Commit{Events: []eventstore.Event{{Stream: ann, Type: "a", Tags: []string{"t:1"}, Data: []byte(`{"N":1}`)}}, Key: "k"}
			}
			first := mustAppend(t, ctx, store, base())
			require.NotEmpty(t, first.Fingerprint, "a receipt with a key has the derived fingerprint")
			again, err := store.Append(ctx, base())
			require.NoError(t, err)
			mustDuplicate(t, first, again)
			for name, change := range map[string]func(*eventstore.Commit){
				"type":       func(c *eventstore.Commit) { c.Events[0].Type = "b" },
				"data":       func(c *eventstore.Commit) { c.Events[0].Data = []byte(`{"N":2}`) },
				"tags":       func(c *eventstore.Commit) { c.Events[0].Tags = []string{"t:2"} },
				"more":       func(c *eventstore.Commit) { c.Events = append(c.Events, c.Events[0]) },
				"tag as two": func(c *eventstore.Commit) { c.Events[0].Tags = []string{"t:", "1"} },
			} {
				unchanged(t, ctx, store, func() {
					c := base()
					change(&c)
					_, err := store.Append(ctx, c)
					require.ErrorIs(t, err, eventstore.ErrKeyReused, "other %s", name)
				})
			}
		},
	},
	{
		name: "FailureStoresNoKey",
		rule: "a commit that was refused leaves its key unused",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			c := eventstore.Commit{Events: events(ann, 1), Conditions: []eventstore.Condition{eventstore.StreamExists(ann)}, Key: "k", Fingerprint: "f"}
			_, err := store.Append(ctx, c)
			mustConflict(t, err)
			_, used := mustLookup(t, ctx, store, ann, "k")
			require.False(t, used, "a conflict stores no key")
			bad := c
			bad.Events = []eventstore.Event{event(ann, "")}
			_, err = store.Append(ctx, bad)
			require.ErrorIs(t, err, eventstore.ErrInvalid)
			_, used = mustLookup(t, ctx, store, ann, "k")
			require.False(t, used, "a refused commit stores no key")
			mustAppend(t, ctx, store, commit(events(ann, 1)...))
			r := mustAppend(t, ctx, store, c)
			require.False(t, r.Duplicate, "the key was never used before")
		},
	},
	{
		name: "Lookup",
		rule: "Lookup finds the receipt of a used key, with Duplicate set, and says false for one never used",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			_, used := mustLookup(t, ctx, store, ann, "k")
			require.False(t, used, "a key that was never used")
			first := mustAppend(t, ctx, store, eventstore.Commit{Events: events(ann, 2), Key: "k", Fingerprint: "f"})
			got, used := mustLookup(t, ctx, store, ann, "k")
			require.True(t, used)
			mustDuplicate(t, first, got)
			for _, other := range []string{"K", "k ", "", "k2"} {
				_, used := mustLookup(t, ctx, store, ann, other)
				require.False(t, used, "key %q was never used", other)
			}
			got.Revisions[0].Revision.Version = 99
			first.Revisions[0].Revision.Version = 98
			again, _ := mustLookup(t, ctx, store, ann, "k")
			require.Equal(t, uint64(2), again.Revisions[0].Revision.Version, "a receipt belongs to the caller: changing it must not change what is stored")
		},
	},
	{
		name: "Scope",
		rule: "keys are unique within their declared scope: the whole log, or the first stream of the commit",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann, bob := account("ann"), account("bob")
			mustAppend(t, ctx, store, eventstore.Commit{Events: events(ann, 1), Key: "k", Fingerprint: "ann's"})
			r, err := store.Append(ctx, eventstore.Commit{Events: events(bob, 1), Key: "k", Fingerprint: "bob's"})
			if s.features.KeyScope == KeysInLog {
				require.ErrorIs(t, err, eventstore.ErrKeyReused, "keys are declared unique in the log, but another stream could use the same one: declare KeysInStream")
				_, used := mustLookup(t, ctx, store, bob, "k")
				require.True(t, used, "Lookup ignores the stream when keys are unique in the log")
				return
			}
			require.NoError(t, err, "keys are declared unique in their stream, but another stream could not use the same one: declare KeysInLog")
			require.False(t, r.Duplicate)
			mine, _ := mustLookup(t, ctx, store, ann, "k")
			theirs, _ := mustLookup(t, ctx, store, bob, "k")
			require.Equal(t, "ann's", mine.Fingerprint)
			require.Equal(t, "bob's", theirs.Fingerprint)
		},
	},
	{
		name:  "OfSeveralStreams",
		rule:  "the receipt of a commit of several streams comes back with all of its revisions",
		needs: func(f Features) string { return lacks(f.MultiStream, "commits of several streams") },
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			c := eventstore.Commit{Events: append(events(account("ann"), 2), append(events(account("bob"), 1), events(account("ann"), 1)...)...), Key: "k"}
			first := mustAppend(t, ctx, store, c)
			mustAppend(t, ctx, store, commit(events(account("bob"), 5)...))
			again, err := store.Append(ctx, c)
			require.NoError(t, err)
			mustDuplicate(t, first, again)
			got, _ := mustLookup(t, ctx, store, account("ann"), "k")
			mustDuplicate(t, first, got)
		},
	},
	{
		name: "ConcurrentSameKey",
		rule: "of N concurrent appends with one key exactly one writes; the others get its receipt with Duplicate set",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			const writers = 8
			for round := range pick(20, 5) {
				to := account(fmt.Sprint(round))
				receipts := make([]eventstore.Receipt, writers)
				require.NoError(t, together(writers, func(i int, gate func()) error {
					c := eventstore.Commit{Events: events(to, 2), Key: fmt.Sprint("k", round), Fingerprint: "same"}
					gate()
					var err error
					receipts[i], err = store.Append(ctx, c)
					return err
				}))
				require.Len(t, mustRead(t, ctx, store, eventstore.OneStream(to), eventstore.ReadOptions{}), 2, "round %d: one write", round)
				firsts := 0
				for _, r := range receipts {
					if !r.Duplicate {
						firsts++
					}
					require.Equal(t, receipts[0].First, r.First)
					require.Equal(t, receipts[0].Revisions, r.Revisions)
				}
				require.Equal(t, 1, firsts, "round %d: exactly one receipt is not a duplicate", round)
			}
		},
	},
	{
		name:  "SurviveReopening",
		rule:  "a key stays used after the store was closed and opened again, receipt and fingerprint included",
		needs: func(f Features) string { return lacks(f.Reopen, "reopening") },
		run: func(t testing.TB, s *suite) {
			ctx, p := s.context(t), s.prepare(t)
			store := p.open(t)
			ann := account("ann")
			c := eventstore.Commit{Events: events(ann, 3), Key: "k", Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}}
			first := mustAppend(t, ctx, store, c)
			store = p.reopen(t)
			unchanged(t, ctx, store, func() {
				again, err := store.Append(ctx, c)
				require.NoError(t, err)
				mustDuplicate(t, first, again)
				got, used := mustLookup(t, ctx, store, ann, "k")
				require.True(t, used)
				mustDuplicate(t, first, got)
				other := c
				other.Fingerprint = "other"
				_, err = store.Append(ctx, other)
				require.ErrorIs(t, err, eventstore.ErrKeyReused)
			})
		},
	},
}
