package projection_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/projection"
)

// bare is a state without optional powers.
type bare struct{ projection.State }

func newMembers(t *testing.T, s projection.State) ownership.Directory {
	t.Helper()
	d, err := projection.Members(s)
	require.NoError(t, err)
	return d
}

func TestMembers_Unsupported(t *testing.T) {
	t.Parallel()
	_, err := projection.Members(bare{memory.New()})
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

func TestMembers_LiveByTheirLease(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, s := t.Context(), memory.New()
		one, two, three := newMembers(t, s), newMembers(t, s), newMembers(t, s)
		first := ownership.Member{Name: "one", Units: []string{"a", "b"}}
		second := ownership.Member{Name: "two", Units: []string{"b"}}
		require.NoError(t, one.Join(ctx, first, 10*time.Second))
		require.NoError(t, two.Join(ctx, second, 10*time.Second))
		alive, err := three.Members(ctx)
		require.NoError(t, err)
		require.Equal(t, []ownership.Member{first, second}, alive)

		time.Sleep(9 * time.Second)
		require.NoError(t, two.Join(ctx, second, 10*time.Second))
		time.Sleep(2 * time.Second)
		alive, err = three.Members(ctx)
		require.NoError(t, err)
		require.Equal(t, []ownership.Member{second}, alive, "the first one's time is up")

		// Its place is taken, and it finds that out.
		third := ownership.Member{Name: "three"}
		require.NoError(t, three.Join(ctx, third, 10*time.Second))
		require.ErrorIs(t, one.Join(ctx, first, 10*time.Second), ownership.ErrReplaced)
		require.NoError(t, one.Join(ctx, first, 10*time.Second), "as a new member")
		alive, err = two.Members(ctx)
		require.NoError(t, err)
		require.ElementsMatch(t, []ownership.Member{first, second, {Name: "three"}}, alive)

		// Another offer is seen within a second, a place that is left at once.
		first.Units = []string{"b", "c"}
		require.NoError(t, one.Join(ctx, first, 10*time.Second))
		require.NoError(t, three.Leave(ctx, "three"))
		require.NoError(t, three.Leave(ctx, "three"))
		time.Sleep(time.Second)
		alive, err = two.Members(ctx)
		require.NoError(t, err)
		require.ElementsMatch(t, []ownership.Member{first, second}, alive)

		known, err := s.Checkpoints(ctx)
		require.NoError(t, err)
		require.Len(t, known, 3, "three places were needed at most")
		inspected, err := projection.Inspect(ctx, s)
		require.NoError(t, err)
		require.Empty(t, inspected, "members are no projections")
		require.NoError(t, s.Close())
	})
}

// Nodes that come and go use the same places again.
func TestMembers_PlacesDoNotGrow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, s := t.Context(), memory.New()
		for i := range 20 {
			d := newMembers(t, s)
			require.NoError(t, d.Join(ctx, ownership.Member{Name: fmt.Sprint("node-", i)}, 10*time.Second))
			if i%2 == 0 {
				require.NoError(t, d.Leave(ctx, ""))
			} else {
				time.Sleep(10 * time.Second) // it died
			}
		}
		known, err := s.Checkpoints(ctx)
		require.NoError(t, err)
		require.Len(t, known, 1)
		require.NoError(t, s.Close())
	})
}

// A database that lost the row of a member in a crash, and not its lease, gets
// it again.
func TestMembers_RowIsLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, s := t.Context(), memory.New()
		d, self := newMembers(t, s), ownership.Member{Name: "one", Units: []string{"a"}}
		require.NoError(t, d.Join(ctx, self, time.Minute))
		for _, lost := range []func(tx projection.StateTx) error{
			func(tx projection.StateTx) error { return tx.Clear("members") },
			func(tx projection.StateTx) error { return tx.Put("members", "member.0", []byte("{")) },
		} {
			require.NoError(t, s.Update(ctx, lost))
			time.Sleep(time.Second)
			alive, err := d.Members(ctx)
			require.NoError(t, err)
			require.Empty(t, alive)
			require.NoError(t, d.Join(ctx, self, time.Minute))
			alive, err = d.Members(ctx)
			require.NoError(t, err)
			require.Equal(t, []ownership.Member{self}, alive)
		}
		require.NoError(t, s.Close())
	})
}
