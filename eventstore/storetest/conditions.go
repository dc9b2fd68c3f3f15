package storetest

import (
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

var conditionChecks = []check{
	{
		name: "StreamAt",
		rule: "StreamAt holds exactly at that version; the zero revision means that the stream does not exist; the conflict names what was expected and what is",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			at := func(r eventstore.Revision) (eventstore.Receipt, error) {
				return store.Append(ctx, eventstore.Commit{Events: events(ann, 2), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, r)}})
			}
			unchanged(t, ctx, store, func() {
				_, err := at(eventstore.Revision{Version: 1})
				c := mustConflict(t, err)
				require.Equal(t, ann, c.Stream)
				require.Equal(t, uint64(1), c.Expected.Version)
				require.Equal(t, eventstore.Revision{}, c.Actual, "a stream that does not exist is at version 0")
			})
			first, err := at(eventstore.Revision{})
			require.NoError(t, err, "a stream without events is at the zero revision")
			unchanged(t, ctx, store, func() {
				_, err := at(eventstore.Revision{})
				c := mustConflict(t, err)
				require.Equal(t, eventstore.ConditionStreamAt, c.Kind)
				require.Equal(t, ann, c.Stream)
				require.Equal(t, eventstore.Revision{}, c.Expected)
				require.Equal(t, first.Revision(ann), c.Actual, "the loser learns the actual revision")
			})
			second, err := at(first.Revision(ann))
			require.NoError(t, err, "the revision of the last receipt is where the stream is")
			for _, version := range []uint64{1, 2, 3, 5, 1 << 40} {
				unchanged(t, ctx, store, func() {
					_, err := at(eventstore.Revision{Version: version})
					require.Equal(t, second.Revision(ann), mustConflict(t, err).Actual, "expected version %d", version)
				})
			}
		},
	},
	{
		name: "VersionAlone",
		rule: "an expectation with version n and position 0 checks the version alone: that is how a commit follows another one that is still being written",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			for n := range uint64(5) {
				r := mustAppend(t, ctx, store, eventstore.Commit{Events: events(ann, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: n})}})
				require.Equal(t, n+1, r.Revision(ann).Version)
			}
		},
	},
	{
		name: "StreamAtEvent",
		rule: "StreamAtEvent demands the id of the stream's last event beside the version: without it a commit would pass whose predecessor lost to a writer of as many events, decided on a history that never happened",
		run: func(t testing.TB, s *suite) {
			ctx, p := s.context(t), s.prepare(t)
			store := p.open(t)
			ann, bob := account("ann"), account("bob")
			ours, theirs := events(ann, 2), events(ann, 1)
			for i := range ours {
				ours[i].ID = uuid.Must(uuid.NewV7())
			}
			theirs[0].ID = uuid.Must(uuid.NewV7())
			mustAppend(t, ctx, store, eventstore.Commit{Events: theirs})
			follow := func(c eventstore.Condition) error {
				_, err := store.Append(ctx, eventstore.Commit{Events: events(ann, 1), Conditions: []eventstore.Condition{c}})
				return err
			}
			unchanged(t, ctx, store, func() {
				c := mustConflict(t, follow(eventstore.StreamAtEvent(ann, 1, ours[0].ID)))
				require.Equal(t, ann, c.Stream)
				require.Equal(t, uint64(1), c.Actual.Version, "the version is as expected, the last event is another one")
				mustConflict(t, follow(eventstore.StreamAtEvent(ann, 2, theirs[0].ID)))
			})
			require.NoError(t, follow(eventstore.StreamAtEvent(ann, 1, theirs[0].ID)))
			unchanged(t, ctx, store, func() {
				mustConflict(t, follow(eventstore.StreamAtEvent(ann, 2, theirs[0].ID)))
				_, err := store.Append(ctx, eventstore.Commit{Events: events(bob, 1), Conditions: []eventstore.Condition{eventstore.StreamAtEvent(bob, 0, theirs[0].ID)}})
				require.ErrorIs(t, err, eventstore.ErrInvalid, "a stream that does not exist has no last event")
			})
			mustAppend(t, ctx, store, eventstore.Commit{Events: ours})
			require.NoError(t, follow(eventstore.StreamAtEvent(ann, 4, ours[1].ID)), "the last event of a commit of several")

			// In a fresh process what is known of the stream comes from storage.
			if s.features.Reopen {
				store = p.reopen(t)
				got := mustRead(t, ctx, store, eventstore.OneStream(ann), eventstore.ReadOptions{})
				last := got[len(got)-1]
				unchanged(t, ctx, store, func() { mustConflict(t, follow(eventstore.StreamAtEvent(ann, 5, ours[1].ID))) })
				require.NoError(t, follow(eventstore.StreamAtEvent(ann, 5, last.ID)))
			}
		},
	},
	{
		name: "StreamExists",
		rule: "StreamExists demands at least one event that was there before the commit",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			c := eventstore.Commit{Events: events(ann, 1), Conditions: []eventstore.Condition{eventstore.StreamExists(ann)}}
			unchanged(t, ctx, store, func() {
				_, err := store.Append(ctx, c)
				conflict := mustConflict(t, err)
				require.Equal(t, eventstore.ConditionStreamExists, conflict.Kind, "a commit's own events do not make the stream exist")
				require.Equal(t, ann, conflict.Stream)
			})
			mustAppend(t, ctx, store, commit(events(ann, 1)...))
			mustAppend(t, ctx, store, c)
		},
	},
	{
		name: "JudgedBeforeOwnEvents",
		rule: "conditions are judged against what was stored before the commit, never against its own events",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, eventstore.Commit{Events: events(ann, 3), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}})
			mustAppend(t, ctx, store, eventstore.Commit{Events: events(ann, 3), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: 3}), eventstore.StreamExists(ann)}})
			if s.features.NoneMatch&QueryTypes != 0 {
				c := commit(event(ann, "unique"), event(ann, "unique"))
				c.Conditions = []eventstore.Condition{eventstore.NoneMatch(eventstore.OfTypes("unique"), 0)}
				mustAppend(t, ctx, store, c)
				_, err := store.Append(ctx, c)
				mustConflict(t, err)
			}
		},
	},
	{
		name: "AllMustHold",
		rule: "every condition of a commit must hold, in whichever place the failing one stands",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, commit(events(ann, 2)...))
			good, bad := eventstore.StreamAt(ann, eventstore.Revision{Version: 2}), eventstore.StreamAt(ann, eventstore.Revision{Version: 1})
			exists := eventstore.StreamExists(ann)
			for _, conditions := range [][]eventstore.Condition{{bad, good, exists}, {good, bad, exists}, {exists, good, bad}} {
				unchanged(t, ctx, store, func() {
					_, err := store.Append(ctx, eventstore.Commit{Events: events(ann, 1), Conditions: conditions})
					require.Equal(t, uint64(1), mustConflict(t, err).Expected.Version, "the conflict is about the condition that failed")
				})
			}
			mustAppend(t, ctx, store, eventstore.Commit{Events: events(ann, 1), Conditions: []eventstore.Condition{good, exists}})
		},
	},
	{
		name: "OnOtherStreams",
		rule: "a commit may have conditions on streams that it does not write",
		needs: func(f Features) string {
			return lacks(f.ForeignConditions, "conditions on streams that the commit does not write")
		},
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann, bob := account("ann"), account("bob")
			r := mustAppend(t, ctx, store, commit(events(ann, 2)...))
			for _, refused := range []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{}), eventstore.StreamAt(ann, eventstore.Revision{Version: 1}), eventstore.StreamExists(account("nobody"))} {
				unchanged(t, ctx, store, func() {
					_, err := store.Append(ctx, eventstore.Commit{Events: events(bob, 1), Conditions: []eventstore.Condition{refused}})
					require.Equal(t, refused.Stream, mustConflict(t, err).Stream)
				})
			}
			mustAppend(t, ctx, store, eventstore.Commit{Events: events(bob, 1), Conditions: []eventstore.Condition{
				eventstore.StreamAt(ann, r.Revision(ann)), eventstore.StreamExists(ann), eventstore.StreamAt(account("nobody"), eventstore.Revision{}),
			}})
		},
	},
	{
		name: "InvalidAreRefused",
		rule: "a condition of no kind, on a bad stream or over an empty query is ErrInvalid, and writes nothing",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			for name, c := range map[string]eventstore.Condition{
				"zero":          {},
				"unknown kind":  {Kind: 200, Stream: account("ann")},
				"bad stream":    eventstore.StreamAt(stream("no-dash", "x"), eventstore.Revision{}),
				"no stream":     eventstore.StreamExists(eventstore.Stream{}),
				"empty query":   eventstore.NoneMatch(eventstore.Query{}, 0),
				"empty item":    eventstore.NoneMatch(eventstore.Match(eventstore.Item{}), 0),
				"0 at position": eventstore.StreamAt(account("ann"), eventstore.Revision{Position: 7}),
			} {
				unchanged(t, ctx, store, func() {
					_, err := store.Append(ctx, eventstore.Commit{Events: events(account("ann"), 1), Conditions: []eventstore.Condition{c}})
					require.ErrorIs(t, err, eventstore.ErrInvalid, name)
				})
			}
		},
	},
}
