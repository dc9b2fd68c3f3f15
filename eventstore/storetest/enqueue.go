package storetest

import (
	"context"
	"fmt"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

func needEnqueue(f Features) string { return lacks(f.Enqueue, "Enqueue") }

func enqueuer(t testing.TB, store eventstore.Store) eventstore.Enqueuer {
	t.Helper()
	e, ok := eventstore.Find[eventstore.Enqueuer](store)
	require.True(t, ok, "Features.Enqueue is declared, but the store is no eventstore.Enqueuer")
	return e
}

// result waits for the outcome, but not for ever.
func result(ctx context.Context, p *eventstore.Pending) (eventstore.Receipt, error) {
	select {
	case <-p.Done():
		return p.Result()
	case <-ctx.Done():
		return eventstore.Receipt{}, fmt.Errorf("the outcome of an enqueued commit never became known: %w", context.Cause(ctx))
	}
}

func pipelined(s eventstore.Stream, n int, version uint64) eventstore.Commit {
	return eventstore.Commit{Events: events(s, n), Conditions: []eventstore.Condition{eventstore.StreamAt(s, eventstore.Revision{Version: version})}}
}

var enqueueChecks = []check{
	{
		name:  "Pipelined",
		rule:  "commits that are handed over one after another, each expecting the version that the one before will have made, are all written, in order",
		needs: needEnqueue,
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			var pending []*eventstore.Pending
			n := pick(200, 50)
			for i := range n {
				pending = append(pending, enqueuer(t, store).Enqueue(ctx, pipelined(ann, 2, uint64(2*i))))
			}
			var last eventstore.Position
			for i, p := range pending {
				r, err := result(ctx, p)
				require.NoError(t, err, "commit %d sees the effects of the ones enqueued before it", i)
				require.Equal(t, uint64(2*i+2), r.Revision(ann).Version)
				require.Greater(t, r.First, last, "commits are written in the order in which one goroutine enqueued them")
				last = r.Last
			}
			require.Len(t, mustRead(t, ctx, store, eventstore.OneStream(ann), eventstore.ReadOptions{}), 2*n)
		},
	},
	{
		name:  "ConflictFailsThatCommitOnly",
		rule:  "a conflict among enqueued commits fails that commit and those that built on it, never its neighbours in the batch",
		needs: needEnqueue,
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann, bob := account("ann"), account("bob")
			q := enqueuer(t, store)
			for round := range pick(20, 5) {
				v := uint64(2 * round)
				good := []*eventstore.Pending{
					q.Enqueue(ctx, pipelined(ann, 1, v)),
					q.Enqueue(ctx, pipelined(bob, 1, v)),
				}
				bad := []*eventstore.Pending{
					q.Enqueue(ctx, pipelined(ann, 5, v)),   // too late: v was just used
					q.Enqueue(ctx, pipelined(ann, 1, v+6)), // built on the one before
				}
				good = append(good, q.Enqueue(ctx, pipelined(ann, 1, v+1)), q.Enqueue(ctx, pipelined(bob, 1, v+1)))
				for i, p := range good {
					_, err := result(ctx, p)
					require.NoError(t, err, "round %d: good commit %d shares a batch with a conflict", round, i)
				}
				for _, p := range bad {
					_, err := result(ctx, p)
					require.Equal(t, v+1, mustConflict(t, err).Actual.Version, "the actual version counts the commits that were enqueued before")
				}
			}
		},
	},
	{
		name:  "FollowerOfALoser",
		rule:  "a commit that names the event it follows fails when that event was never written, also when another writer has brought the stream to the same version",
		needs: needEnqueue,
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			q := enqueuer(t, store)
			for round := range pick(20, 5) {
				of := account(fmt.Sprint(round))
				foreign, ours, next := pipelined(of, 1, 0), pipelined(of, 1, 0), pipelined(of, 1, 1)
				ours.Events[0].ID, foreign.Events[0].ID = uuid.Must(uuid.NewV7()), uuid.Must(uuid.NewV7())
				next.Conditions = []eventstore.Condition{eventstore.StreamAtEvent(of, 1, ours.Events[0].ID)}
				after := pipelined(of, 1, 1)
				after.Conditions = []eventstore.Condition{eventstore.StreamAtEvent(of, 1, foreign.Events[0].ID)}
				a, b, c, d := q.Enqueue(ctx, foreign), q.Enqueue(ctx, ours), q.Enqueue(ctx, next), q.Enqueue(ctx, after)
				_, err := result(ctx, a)
				require.NoError(t, err)
				_, err = result(ctx, b)
				mustConflict(t, err)
				_, err = result(ctx, c)
				require.Equal(t, uint64(1), mustConflict(t, err).Actual.Version, "the commit was decided on an event that was never written")
				_, err = result(ctx, d)
				require.NoError(t, err, "the commit follows the event that was written")
			}
		},
	},
	{
		name:  "DuplicateAmongPending",
		rule:  "a key that is used by an enqueued commit is used for those enqueued after it, also before it is durable",
		needs: needEnqueue,
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			q := enqueuer(t, store)
			for round := range pick(20, 5) {
				c := eventstore.Commit{Events: events(ann, 1), Key: fmt.Sprint("k", round), Fingerprint: "f"}
				other := c
				other.Fingerprint = "other"
				a, b, x := q.Enqueue(ctx, c), q.Enqueue(ctx, c), q.Enqueue(ctx, other)
				first, err := result(ctx, a)
				require.NoError(t, err)
				require.False(t, first.Duplicate)
				again, err := result(ctx, b)
				require.NoError(t, err)
				mustDuplicate(t, first, again)
				_, err = result(ctx, x)
				require.ErrorIs(t, err, eventstore.ErrKeyReused)
			}
		},
	},
	{
		name: "BoundaryAmongPending",
		rule: "a boundary condition of an enqueued commit sees the commits enqueued before it",
		needs: func(f Features) string {
			return needEnqueue(f) + lacks(f.NoneMatch&QueryTags != 0, "NoneMatch on tags")
		},
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			q := enqueuer(t, store)
			for round := range pick(20, 5) {
				tag := fmt.Sprint("name:", round)
				c := commit(event(account(fmt.Sprint(round)), "claimed", tag))
				c.Conditions = []eventstore.Condition{eventstore.NoneMatch(eventstore.Tagged(tag), 0)}
				a, b := q.Enqueue(ctx, c), q.Enqueue(ctx, c)
				first, err := result(ctx, a)
				require.NoError(t, err)
				_, err = result(ctx, b)
				require.Equal(t, first.First, mustConflict(t, err).Found)
			}
		},
	},
	{
		name:  "RefusedAtOnce",
		rule:  "bad input and an ended context are outcomes too, with nothing written",
		needs: needEnqueue,
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			q := enqueuer(t, store)
			unchanged(t, ctx, store, func() {
				_, err := result(ctx, q.Enqueue(ctx, commit()))
				require.ErrorIs(t, err, eventstore.ErrInvalid)
				ended, cancel := context.WithCancel(ctx)
				cancel()
				_, err = result(ctx, q.Enqueue(ended, commit(events(account("ann"), 1)...)))
				require.ErrorIs(t, err, context.Canceled)
				require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown, "the commit was never on its way")
			})
		},
	},
	{
		name:  "CloseAnswersEveryone",
		rule:  "Close leaves no enqueued commit without an outcome: it was written, or the error says ErrClosed",
		needs: needEnqueue,
		run: func(t testing.TB, s *suite) {
			ctx, p := s.context(t), s.prepare(t)
			store := p.open(t)
			q := enqueuer(t, store)
			var pending []*eventstore.Pending
			for i := range 100 {
				pending = append(pending, q.Enqueue(ctx, commit(events(account(fmt.Sprint(i)), 1)...)))
			}
			require.NoError(t, store.Close())
			written := 0
			for _, pend := range pending {
				if _, err := result(ctx, pend); err == nil {
					written++
				} else {
					require.ErrorIs(t, err, eventstore.ErrClosed)
				}
			}
			_, err := result(ctx, q.Enqueue(ctx, commit(events(account("late"), 1)...)))
			require.ErrorIs(t, err, eventstore.ErrClosed)
			if s.features.Reopen {
				require.Len(t, mustRead(t, ctx, p.open(t), eventstore.All(), eventstore.ReadOptions{}), written, "exactly the acknowledged commits are there")
			}
		},
	},
}
