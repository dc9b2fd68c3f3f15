package storetest

import (
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

var appendChecks = []check{
	{
		name: "VersionsAreOneToN",
		rule: "the events of a stream are numbered 1..n without gap or repeat, whatever happens in other streams, and the receipt names the version reached",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann, bob := account("ann"), account("bob")
			versions := map[eventstore.Stream]uint64{}
			for i, n := range []int{1, 3, 2, 1, 5, 4} {
				to := ann
				if i%2 == 1 {
					to = bob
				}
				r := mustAppend(t, ctx, store, commit(events(to, n)...))
				versions[to] += uint64(n)
				require.Equal(t, eventstore.Revision{Version: versions[to], Position: r.Last}, r.Revision(to), "the receipt's revision of the stream after the commit")
				require.Len(t, r.Revisions, 1, "the receipt names the streams of the commit, each once")
			}
			for _, of := range []eventstore.Stream{ann, bob} {
				got := mustRead(t, ctx, store, eventstore.OneStream(of), eventstore.ReadOptions{})
				require.Len(t, got, int(versions[of]))
				for i, r := range got {
					require.Equal(t, uint64(i+1), r.Version, "version of event %d of stream %q", i, of)
					require.Equal(t, of, r.Stream)
				}
			}
		},
	},
	{
		name: "PositionsIncrease",
		rule: "positions rise in commit order over all streams; a receipt's First and Last are those of its first and last event; the head is the last one",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			require.Zero(t, mustHead(t, ctx, store), "the head of an empty log is 0")
			var last eventstore.Position
			for i := range 10 {
				r := mustAppend(t, ctx, store, commit(events(account(string(rune('a'+i%3))), 1+i%4)...))
				require.Greater(t, r.First, last, "a later commit lies after an earlier one")
				require.Equal(t, r.Last, mustHead(t, ctx, store), "the head is the position of the last event")
				require.Equal(t, r.Last, r.At())
				last = r.Last
				got := mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{After: r.First - 1})
				require.Len(t, got, 1+i%4, "the events of the last commit lie at or after its First")
				require.Equal(t, r.First, got[0].Position)
				require.Equal(t, r.Last, got[len(got)-1].Position)
			}
		},
	},
	{
		name:  "PositionsAreContiguous",
		rule:  "a log declared contiguous numbers its events 1, 2, 3, …; refused commits leave no holes",
		needs: func(f Features) string { return lacks(f.Contiguous, "contiguous positions") },
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			next := eventstore.Position(1)
			for i := range 20 {
				to := account(string(rune('a' + i%3)))
				if i%4 == 3 {
					_, err := store.Append(ctx, eventstore.Commit{Events: events(to, 2), Conditions: []eventstore.Condition{eventstore.StreamAt(to, eventstore.Revision{})}})
					mustConflict(t, err)
				}
				n := 1 + i%3
				r := mustAppend(t, ctx, store, commit(events(to, n)...))
				require.Equal(t, next, r.First)
				next += eventstore.Position(n)
				require.Equal(t, next-1, r.Last)
			}
			for i, r := range mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{}) {
				require.Equal(t, eventstore.Position(i+1), r.Position)
			}
		},
	},
	{
		name: "AllOrNothing",
		rule: "a commit is written whole or not at all: one bad event or one failed condition refuses all of it",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, commit(events(ann, 2)...))
			unchanged(t, ctx, store, func() {
				c := commit(events(ann, 5)...)
				c.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}
				_, err := store.Append(ctx, c)
				mustConflict(t, err)
			})
			for bad := range 3 {
				unchanged(t, ctx, store, func() {
					c := commit(events(ann, 3)...)
					c.Events[bad].Type = ""
					_, err := store.Append(ctx, c)
					require.ErrorIs(t, err, eventstore.ErrInvalid, "event %d has no type", bad)
				})
			}
			unchanged(t, ctx, store, func() {
				_, err := store.Append(ctx, eventstore.Commit{})
				require.ErrorIs(t, err, eventstore.ErrInvalid, "a commit without events")
			})
			r := mustAppend(t, ctx, store, commit(events(ann, 1)...))
			require.Equal(t, uint64(3), r.Revision(ann).Version, "refused commits use up no versions")
		},
	},
	{
		name:  "SeveralStreams",
		rule:  "one commit may write several streams; order is kept, versions count per stream, positions run through, and the receipt has one revision a stream in the order of first mention",
		needs: func(f Features) string { return lacks(f.MultiStream, "commits of several streams") },
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann, bob, fee := account("ann"), account("bob"), stream("fee", "1")
			mustAppend(t, ctx, store, commit(events(bob, 3)...))
			r := mustAppend(t, ctx, store, commit(event(fee, "a"), event(ann, "b"), event(fee, "c"), event(bob, "d"), event(ann, "e")))
			require.Len(t, r.Revisions, 3)
			for i, want := range []struct {
				of      eventstore.Stream
				version uint64
			}{{fee, 2}, {ann, 2}, {bob, 4}} {
				require.Equal(t, want.of, r.Revisions[i].Stream, "streams in the order in which the commit first named them")
				require.Equal(t, want.version, r.Revisions[i].Revision.Version, "version of %q", want.of)
			}
			require.Equal(t, r.Last, r.Revision(ann).Position)
			got := mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{After: r.First - 1})
			var types string
			for _, e := range got {
				types += e.Type
			}
			require.Equal(t, "abcde", types, "the order of the commit is the order of the log")
			unchanged(t, ctx, store, func() {
				c := commit(event(fee, "x"), event(account("new"), "y"))
				c.Conditions = []eventstore.Condition{eventstore.StreamAt(fee, eventstore.Revision{})}
				_, err := store.Append(ctx, c)
				mustConflict(t, err)
			})
		},
	},
	{
		name: "RoundTrip",
		rule: "id, type, tags, data, metadata and time come back as they were given; time to the nanosecond and in UTC; data is any bytes",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			every := make([]byte, 256)
			for i := range every {
				every[i] = byte(i)
			}
			given := []eventstore.Event{
				{
					ID: uuid.MustParse("01890a5d-ac96-774b-bcce-b302099a8057"), Stream: stream("a.B_9", "id with spaces, ünïcödé, 💥, % and - and /"),
					Type: "thing happened: ütf-8", Tags: []string{"course:c1", "student:ß", "z"}, Data: every,
					Metadata: eventstore.Metadata{
						CorrelationID: "corr", CausationID: "cause", Actor: "ann", TraceParent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
						SchemaVersion: 7, Codec: "proto", Extra: map[string]string{"k": "v", "ü": "", "": "empty key", "quote": `"'\`},
					},
					Time: time.Date(2026, 2, 28, 23, 59, 59, 123456789, time.FixedZone("plus", 3*3600+1800)),
				},
				{Stream: stream("a.B_9", "id with spaces, ünïcödé, 💥, % and - and /"), Type: "t", Time: time.Date(1969, 12, 31, 23, 59, 59, 1, time.UTC)},
				{Stream: stream("a.B_9", "id with spaces, ünïcödé, 💥, % and - and /"), Type: "t", Data: []byte{}, Time: time.Date(2200, 1, 1, 0, 0, 0, 999999999, time.UTC)},
			}
			mustAppend(t, ctx, store, commit(given...))
			got := mustRead(t, ctx, store, eventstore.OneStream(given[0].Stream), eventstore.ReadOptions{})
			require.Len(t, got, len(given))
			for i, r := range got {
				g := given[i]
				require.Equal(t, g.Type, r.Type)
				require.Equal(t, len(g.Tags), len(r.Tags))
				require.True(t, slices.Equal(g.Tags, r.Tags), "tags keep their order: gave %q, got %q", g.Tags, r.Tags)
				require.Equal(t, string(g.Data), string(r.Data))
				require.Equal(t, g.Metadata.IsZero(), r.Metadata.IsZero())
				if !g.Metadata.IsZero() {
					require.Equal(t, g.Metadata, r.Metadata)
				}
				require.True(t, g.Time.Equal(r.Time), "time to the nanosecond: gave %s, got %s", g.Time, r.Time)
				require.Equal(t, time.UTC, r.Time.Location(), "time comes back in UTC")
				require.Equal(t, eventstore.Revision{Version: r.Version, Position: r.Position}, r.Revision())
			}
			require.Equal(t, given[0].ID, got[0].ID, "a given id is kept")
		},
	},
	{
		name: "FillsInIDAndTime",
		rule: "an event without id gets a UUIDv7 of its own, one without time gets the present; the caller's commit is not changed",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			c := commit(events(ann, 3)...)
			before := time.Now()
			mustAppend(t, ctx, store, c)
			after := time.Now()
			for _, e := range c.Events {
				require.Equal(t, uuid.Nil, e.ID, "Append must not write into the caller's slice")
				require.True(t, e.Time.IsZero(), "Append must not write into the caller's slice")
			}
			seen := map[uuid.UUID]bool{}
			for _, r := range mustRead(t, ctx, store, eventstore.OneStream(ann), eventstore.ReadOptions{}) {
				require.Equal(t, uuid.Version(7), r.ID.Version(), "ids are UUIDv7")
				require.False(t, seen[r.ID], "ids are unique")
				seen[r.ID] = true
				require.False(t, r.Time.Before(before.Add(-time.Second)) || r.Time.After(after.Add(time.Second)), "time %s is not between %s and %s", r.Time, before, after)
			}
		},
	},
	{
		name: "StreamNamesDoNotMix",
		rule: "a stream is exactly its category and id: names that differ in case, share a prefix or look alike are different streams",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			streams := []eventstore.Stream{
				stream("account", "1"), stream("account", "10"), stream("accounting", "1"), stream("Account", "1"), stream("account", "a"), stream("account", "A"),
				stream("account", "1-1"), stream("account", "%"), stream("account", "_"), stream("account", "*"), stream("account", "é"), stream("account", "e\u0301"), stream("account", " 1"),
			}
			for i, of := range streams {
				mustAppend(t, ctx, store, eventstore.Commit{Events: events(of, i+1), Conditions: []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{})}})
			}
			for i, of := range streams {
				require.Len(t, mustRead(t, ctx, store, eventstore.OneStream(of), eventstore.ReadOptions{}), i+1, "events of stream %q", of)
			}
		},
	},
}
