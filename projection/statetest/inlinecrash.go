package statetest

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// InlineReport is what [WriteInline] says of an append that has returned.
type InlineReport struct {
	Last eventstore.Position `json:"last"`
	// Applied: right afterwards the rows contained it.
	Applied bool `json:"applied"`
}

// WriteInline appends to the store with several writers until ctx ends, for tests
// that kill the process which does it. With knows it runs the inline projection that
// [CheckInline] looks at; otherwise it appends without knowing of it.
func WriteInline(ctx context.Context, store InlineStore, knows bool, report func(InlineReport)) error {
	work := func(w int) error {
		for i := 0; ctx.Err() == nil; i++ {
			r, err := store.Append(ctx, commitOf(added(fmt.Sprint("k", (w+i)%9), i), added("all", 1)))
			if err != nil {
				return err
			}
			one := InlineReport{Last: r.Last}
			if err := store.View(ctx, func(tx projection.StateTx) error {
				c, err := tx.Checkpoint("projection.crashed")
				one.Applied = c.Position >= r.Last
				return err
			}); err != nil {
				return err
			}
			report(one)
		}
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var group sync.WaitGroup
	if knows {
		engine := projection.NewEngine(store, store, projection.Options{Logger: discard})
		defer engine.Close()
		if err := engine.Add(crashed()); err != nil {
			return err
		}
		for _, w := range engine.Workers() {
			group.Go(func() { cancel(w.Run(ctx)) })
		}
	}
	for w := range 4 {
		group.Go(func() {
			if err := work(w); err != nil {
				cancel(err)
			}
		})
	}
	group.Wait()
	return context.Cause(ctx)
}

func crashed() *projection.ViewDefinition[sum] {
	return sums("crashed", nil).Indexed(projection.Index("sum", func(s sum) int { return s.Sum }))
}

// CheckInline checks what processes have left behind that ran [WriteInline] and were
// killed: the rows are the fold of the log up to the checkpoint, and contain what was
// reported as applied. Then it lets the projection catch up, and checks it again. It
// returns how many of the reports say that.
func CheckInline(t testing.TB, store InlineStore, reports []InlineReport) (applied int) {
	t.Helper()
	n := &inlineNode{store: store, views: map[string]*projection.ViewDefinition[sum]{"crashed": crashed()}}
	rows, at := n.rows(t, "crashed")
	require.Equal(t, folded(t, store, at), rows, "at position %d", at)
	var last eventstore.Position
	for _, r := range reports {
		if last = max(last, r.Last); r.Applied {
			applied++
			require.GreaterOrEqual(t, at, r.Last, "it was applied, and is not any more")
		}
	}
	head, err := store.Head(context.Background())
	require.NoError(t, err)
	require.GreaterOrEqual(t, head, last)
	n = runInline(t, store, crashed())
	defer n.stop()
	n.awaitInlineWithin(t, 4*patience)
	n.verify(t, store, "crashed")
	return applied
}

// folded is what the rows must be at the position.
func folded(t testing.TB, store InlineStore, through eventstore.Position) map[string]sum {
	t.Helper()
	all := map[string]sum{}
	if through == 0 {
		return all
	}
	for r, err := range store.Read(context.Background(), eventstore.OfTypes("sum.added"), eventstore.ReadOptions{Through: through}) {
		require.NoError(t, err)
		var e sumAdded
		require.NoError(t, json.Unmarshal(r.Data, &e))
		s := all[r.Stream.ID]
		all[r.Stream.ID] = sum{Sum: s.Sum + e.N, Events: s.Events + 1, Last: r.Position}
	}
	return all
}

// awaitInline waits until all projections of the node are applied by appends.
func (n *inlineNode) awaitInline(t testing.TB) {
	t.Helper()
	n.awaitInlineWithin(t, patience)
}

func (n *inlineNode) awaitInlineWithin(t testing.TB, within time.Duration) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		all, err := n.engine.Status(context.Background())
		require.NoError(t, err)
		inline := true
		for _, s := range all {
			inline = inline && s.Inline
		}
		if inline {
			return
		}
		if time.Since(began) > within {
			var leases []projection.NamedCheckpoint
			if lister, ok := n.store.(projection.CheckpointLister); ok {
				leases, err = lister.Checkpoints(context.Background())
				require.NoError(t, err)
			}
			require.Fail(t, fmt.Sprintf("%q is not inline: %+v, stored is %+v", n.owner, all, leases))
		}
	}
}
