package nats

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// The leader gives up its place again and again while eight writers go on:
// subscriptions, those that are told by the tail and those that read pages,
// yield every event once and in order, and every acknowledged event is there.
func TestSubscribe_StepDown(t *testing.T) {
	t.Parallel()
	c := servers(t, 3)
	name := newName()
	quick := hooked(func(s *settings) { s.attempt = time.Second })
	store := reopenLog(t, c, name, quick)
	pages := reopenLog(t, c, name, quick, Tail(1, 1))
	require.NoError(t, c.Settled(t.Context(), name))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	following, stop := context.WithCancel(ctx)
	defer stop()
	followers := []*listener{
		listen(following, store, eventstore.All()), listen(following, store, eventstore.OneCategory("odd")),
		listen(following, pages, eventstore.All()), listen(following, pages, eventstore.OneCategory("odd")),
	}
	var enough atomic.Bool
	var written atomic.Int64
	var mu sync.Mutex
	acknowledged := map[uuid.UUID]bool{}
	var writers sync.WaitGroup
	for w := range 8 {
		writers.Go(func() {
			of := eventstore.Stream{Category: []string{"even", "odd"}[w%2], ID: fmt.Sprint(w)}
			for n := 0; !enough.Load(); n++ {
				commit := eventstore.Commit{Events: happened(of, 1+n%3)}
				for i := range commit.Events {
					commit.Events[i].ID = uuid.Must(uuid.NewV7())
				}
				if _, err := store.Append(ctx, commit); err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
				mu.Lock()
				for _, e := range commit.Events {
					acknowledged[e.ID] = true
				}
				mu.Unlock()
				written.Add(1)
			}
		})
	}
	// The next one begins when everybody has written under the leader before.
	downs := 0
	for range 5 {
		before := written.Load()
		require.Eventually(t, func() bool { return written.Load() > before+80 || t.Failed() }, time.Minute, time.Millisecond)
		if c.StepDown(name) == nil {
			downs++
		}
	}
	before := written.Load()
	require.Eventually(t, func() bool { return written.Load() > before+80 || t.Failed() }, time.Minute, time.Millisecond)
	enough.Store(true)
	writers.Wait()
	require.Positive(t, downs)
	last, err := store.Append(ctx, eventstore.Commit{Events: happened(eventstore.Stream{Category: "odd", ID: "last"}, 1)})
	require.NoError(t, err)
	all := read(t, store, eventstore.All(), eventstore.ReadOptions{})
	require.Len(t, all, len(acknowledged)+1)
	for _, e := range all[:len(all)-1] {
		require.True(t, acknowledged[e.ID])
	}
	for _, f := range followers {
		f.until(t, ctx, last.Last, all)
	}
	t.Logf("%d step-downs, %d commits, %d events", downs, written.Load(), len(all))
}
