package statetest

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// list returns what the state lists; the test is skipped if it cannot.
func list(t testing.TB, ctx context.Context, state State) []projection.NamedCheckpoint {
	t.Helper()
	lister, ok := state.(projection.CheckpointLister)
	if !ok {
		t.Skipf("%T is no projection.CheckpointLister", state)
	}
	all, err := lister.Checkpoints(ctx)
	require.NoError(t, err, "list checkpoints")
	for i := range all {
		all[i].Lease.Until = all[i].Lease.Until.UTC().Round(time.Millisecond) // as exact as backends need be
	}
	return all
}

var listingChecks = []check{
	{
		name: "NamesWithCheckpointOrLease",
		rule: "Checkpoints lists every name that has a checkpoint or ever had a lease, in byte order, with the lease given last and whether it still runs",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			require.Empty(t, list(t, ctx, state))
			acquired := func(name, owner string, ttl time.Duration) projection.Lease {
				l := mustAcquire(t, ctx, state, name, owner, ttl)
				l.Until = l.Until.UTC().Round(time.Millisecond)
				return l
			}
			timed := acquired("timed", "me", time.Hour)
			done := acquired("Done", "me", 0)
			require.NoError(t, move(ctx, state, done, projection.Checkpoint{}, at(5), "five"))
			require.NoError(t, state.Release(ctx, done))
			acquired("moved", "me", 0)
			moved := acquired("moved", "me", 0)
			require.NoError(t, move(ctx, state, moved, projection.Checkpoint{}, at(7), "seven"))
			emptied := acquired("emptied", "me", 0)
			require.NoError(t, move(ctx, state, emptied, projection.Checkpoint{}, at(9), "nine"))
			require.NoError(t, state.Update(ctx, func(tx projection.StateTx) error { return tx.DeleteCheckpoint(emptied) }))

			place := func(p eventstore.Position, l projection.Lease) projection.Checkpoint {
				return projection.Checkpoint{Log: "log", Epoch: l.Epoch, Position: p}
			}
			require.Equal(t, []projection.NamedCheckpoint{
				{Name: "Done", Checkpoint: place(5, done), Lease: done},
				{Name: "emptied", Lease: emptied, Held: true},
				{Name: "moved", Checkpoint: place(7, moved), Lease: moved, Held: true},
				{Name: "timed", Lease: timed, Held: true},
			}, list(t, ctx, state))
		},
	},
	{
		name: "EndedByTime",
		rule: "a lease whose time is up is listed as one that nobody holds, and not before",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", time.Second)
			for list(t, ctx, state)[0].Held {
				require.NoError(t, ctx.Err(), "the lease never ended")
				time.Sleep(10 * time.Millisecond)
			}
			require.False(t, time.Now().Before(lease.Until.Add(-50*time.Millisecond)), "the lease was said to have ended before its time was up")
			require.Equal(t, lease.Epoch, list(t, ctx, state)[0].Lease.Epoch)
		},
	},
}
