package projection_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// A paused projection folds nothing, whoever runs it, until it is resumed.
func TestEngine_Pause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances().Partitioned(2)
		first := put(t, store, account("ann"), deposited{1}).Last
		put(t, store, account("bob"), deposited{1})
		r := start(t, store, store, projection.Options{}, view)
		r.caughtUp(t, store, "balances")
		before := rows(t, store, view)
		require.NoError(t, r.Pause(t.Context(), "balances"))
		require.NoError(t, r.Pause(t.Context(), "balances"), "again")
		last := put(t, store, account("ann"), deposited{2}).Last
		put(t, store, account("bob"), deposited{2})
		still := func(r *running) {
			t.Helper()
			time.Sleep(time.Minute)
			require.Equal(t, before, rows(t, store, view))
			all, err := r.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, projection.PhasePaused, all[0].Phase)
			require.Equal(t, projection.PhasePaused, all[1].Phase)
			for _, w := range r.Workers() {
				require.NoError(t, w.WaitThrough(t.Context(), last), "it does not keep others from settling")
			}
			require.NoError(t, r.WaitFor(t.Context(), "balances", first), "what is there can be read")
			soon, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			require.ErrorIs(t, r.WaitFor(soon, "balances", last), context.DeadlineExceeded)
			require.ErrorIs(t, r.WaitIdle(soon), context.DeadlineExceeded)
		}
		still(r)
		require.NoError(t, r.stop())
		r = start(t, store, store, projection.Options{}, view) // another start, another owner
		ready(t, r)
		still(r)
		stored, err := projection.Inspect(t.Context(), store)
		require.NoError(t, err)
		require.True(t, stored[0].Paused)

		require.NoError(t, r.Resume(t.Context(), "balances"))
		require.NoError(t, r.WaitIdle(t.Context()))
		require.Equal(t, folded(t, store), rows(t, store, view))

		// From a tool, by whoever runs it.
		tool := projection.NewAdmin(store, "tester")
		require.NoError(t, tool.Pause(t.Context(), "balances"))
		before = rows(t, store, view)
		last = put(t, store, account("ann"), deposited{3}).Last
		still(r)
		require.NoError(t, tool.Resume(t.Context(), "balances"))
		require.NoError(t, r.WaitFor(t.Context(), "balances", last))
		require.Equal(t, folded(t, store), rows(t, store, view))
		verified(t, store, view)
		require.NoError(t, r.stop())
	})
}
