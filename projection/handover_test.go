package projection_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/projection"
)

// hall is where nodes of a test find each other; it believes them to live for
// ever, but does not see all of them.
type hall struct {
	mu      sync.Mutex
	members map[string]ownership.Member
	unseen  string
}

func (h *hall) Join(_ context.Context, self ownership.Member, _ time.Duration) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.members == nil {
		h.members = map[string]ownership.Member{}
	}
	h.members[self.Name] = self
	return nil
}

func (h *hall) Leave(_ context.Context, name string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.members, name)
	return nil
}

func (h *hall) Members(context.Context) ([]ownership.Member, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []ownership.Member
	for _, m := range h.members {
		if m.Name != h.unseen {
			all = append(all, m)
		}
	}
	return all, nil
}

func (h *hall) overlook(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.unseen = name
}

func (h *hall) join(t *testing.T, name string) *ownership.Group {
	g := ownership.New(h, ownership.Options{Name: name, Logger: quiet})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = g.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return g
}

// A node that could not give up the lease, when the work was the other's, tries
// it again: as long as it lives the other one could not have it.
func TestHandover_LeaseThatCannotBeReleased(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		failed := atomic.Int64{}
		store.release = func(ctx context.Context, l projection.Lease) error {
			if failed.Add(1) < 5 {
				return errDown
			}
			return store.Store.Release(ctx, l)
		}
		h, view := &hall{}, balances()
		first := start(t, store, store, projection.Options{Group: h.join(t, "one")}, view)
		put(t, store, account("ann"), deposited{1})
		first.caughtUp(t, store, "balances")
		h.overlook("one")
		second := start(t, store, store, projection.Options{Group: h.join(t, "two")}, view)
		time.Sleep(10 * time.Second)
		require.EqualValues(t, 5, failed.Load(), "calls to release the lease")
		require.Equal(t, projection.PhaseStandby, first.status(t).Phase)
		require.NotEqual(t, projection.PhaseStandby, second.status(t).Phase)
		last := put(t, store, account("ann"), deposited{1}).Last
		within(t, time.Second, second, last)
		require.NoError(t, first.stop())
		require.NoError(t, second.stop())
	})
}

// A node that has stood by for long tries soon, when its turn has come, to get what
// the other one is still about to give up.
func TestHandover_AfterALongTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		store.release = func(ctx context.Context, l projection.Lease) error {
			time.Sleep(120 * time.Millisecond)
			return store.Store.Release(ctx, l)
		}
		h, view := &hall{}, balances()
		first := start(t, store, store, projection.Options{Group: h.join(t, "one")}, view)
		put(t, store, account("ann"), deposited{1})
		first.caughtUp(t, store, "balances")
		second := start(t, store, store, projection.Options{Group: h.join(t, "two")}, view)
		time.Sleep(time.Minute)
		heir, former := second, "one"
		if first.status(t).Phase == projection.PhaseStandby {
			heir, former = first, "two"
		}
		require.Equal(t, projection.PhaseStandby, heir.status(t).Phase)
		h.overlook(former)
		began := time.Now()
		for heir.status(t).Phase == projection.PhaseStandby {
			time.Sleep(time.Millisecond)
		}
		require.Less(t, time.Since(began), 500*time.Millisecond)
		require.NoError(t, first.stop())
		require.NoError(t, second.stop())
	})
}

// mumbler is a state whose answers about leases are lost, after they were acquired.
type mumbler struct {
	*shared
	lost atomic.Bool
}

func (m *mumbler) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	lease, err := m.shared.Acquire(ctx, name, owner, ttl)
	if err == nil && m.lost.Load() {
		return projection.Lease{}, eventstore.ErrUnavailable
	}
	return lease, err
}

// A lease that a node has acquired without hearing of it is given up when the work
// moves: nobody else could have it as long as the node lives.
func TestHandover_LeaseOfALostAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		put(t, store, account("ann"), deposited{1})
		h, view := &hall{}, balances()
		deaf := &mumbler{shared: store}
		deaf.lost.Store(true)
		first := start(t, store, deaf, projection.Options{Group: h.join(t, "one")}, view)
		time.Sleep(5 * time.Second)
		second := start(t, store, store, projection.Options{Group: h.join(t, "two")}, view)
		time.Sleep(time.Second)
		h.overlook("one")
		deaf.lost.Store(false)
		time.Sleep(5 * time.Second)
		require.NotEqual(t, projection.PhaseStandby, second.status(t).Phase, "the other one has what it does not know of")
		second.caughtUp(t, store, "balances")
		require.NoError(t, first.stop())
		require.NoError(t, second.stop())
	})
}
