package storetest

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

var featureChecks = []check{
	{
		name: "Powers",
		rule: "optional powers are declared: Enqueue and LogID are there exactly when the features say so",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			_, enqueues := eventstore.Find[eventstore.Enqueuer](store)
			require.Equal(t, s.features.Enqueue, enqueues, "is the store an eventstore.Enqueuer (declared, actual)")
			id, err := eventstore.LogID(ctx, store)
			if !s.features.LogID {
				require.ErrorIs(t, err, errors.ErrUnsupported, "Features.LogID is not declared, but the store has a log id")
				return
			}
			require.NoError(t, err)
			require.NotEmpty(t, id)
			again, err := eventstore.LogID(ctx, store)
			require.NoError(t, err)
			require.Equal(t, id, again, "the id of a log does not change")
			other, err := eventstore.LogID(ctx, s.open(t))
			require.NoError(t, err)
			require.NotEqual(t, id, other, "another log has another id")
		},
	},
	{
		name: "SeveralStreams",
		rule: "a backend that does not declare commits of several streams refuses them, and writes nothing",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			c := commit(event(account("ann"), "a"), event(account("bob"), "a"))
			if s.features.MultiStream {
				mustAppend(t, ctx, store, c)
				return
			}
			unchanged(t, ctx, store, func() {
				_, err := store.Append(ctx, c)
				require.ErrorIs(t, err, errors.ErrUnsupported, "Features.MultiStream is not declared")
			})
		},
	},
	{
		name: "ForeignConditions",
		rule: "a backend that does not declare conditions on streams that a commit does not write refuses them, and writes nothing",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			c := eventstore.Commit{Events: events(account("ann"), 1), Conditions: []eventstore.Condition{eventstore.StreamAt(account("bob"), eventstore.Revision{})}}
			if s.features.ForeignConditions {
				mustAppend(t, ctx, store, c)
				return
			}
			unchanged(t, ctx, store, func() {
				_, err := store.Append(ctx, c)
				require.ErrorIs(t, err, errors.ErrUnsupported, "Features.ForeignConditions is not declared")
			})
		},
	},
	{
		name: "BoundaryQueries",
		rule: "NoneMatch works for the declared kinds of query and is refused for the others, and then writes nothing",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			everything := mixedLog(t, ctx, store, 42)
			head := everything[len(everything)-1].Position
			for name, q := range mixedQueries() {
				c := commit(event(stream("probe", "p"), "probe"))
				c.Conditions = []eventstore.Condition{eventstore.NoneMatch(q, 0)}
				if s.features.NoneMatch&kindOf(q) == 0 {
					unchanged(t, ctx, store, func() {
						_, err := store.Append(ctx, c)
						require.ErrorIs(t, err, errors.ErrUnsupported, "%s: NoneMatch with %s queries is not declared", name, kindOf(q))
					})
					continue
				}
				matches := matching(everything, q)
				if len(matches) > 0 {
					_, err := store.Append(ctx, c)
					require.Equal(t, matches[0].Position, mustConflict(t, err).Found, "%s: the first match", name)
				}
				if q.Everything || q.Items[0].Slices.To > q.Items[0].Slices.From {
					continue // the probe itself would match from now on
				}
				c.Conditions = []eventstore.Condition{eventstore.NoneMatch(q, head)}
				mustAppend(t, ctx, store, c)
			}
		},
	},
	{
		name: "Reopen",
		rule: "a log that can be opened again is the same log, with the same id; one that cannot is declared so",
		run: func(t testing.TB, s *suite) {
			ctx, p := s.context(t), s.prepare(t)
			store := p.open(t)
			r := mustAppend(t, ctx, store, commit(events(account("ann"), 2)...))
			id := ""
			if s.features.LogID {
				var err error
				id, err = eventstore.LogID(ctx, store)
				require.NoError(t, err)
			}
			store = p.reopen(t)
			if !s.features.Reopen {
				require.Zero(t, mustHead(t, ctx, store), "Features.Reopen is not declared, but the log survived Close and Open")
				return
			}
			require.Equal(t, r.Last, mustHead(t, ctx, store), "Features.Reopen is declared, but the log did not survive Close and Open")
			if s.features.LogID {
				again, err := eventstore.LogID(ctx, store)
				require.NoError(t, err)
				require.Equal(t, id, again, "the id survives reopening")
			}
		},
	},
}
