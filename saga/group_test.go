package saga_test

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// seats is a directory of members that can be away.
type seats struct {
	ownership.Directory
	away atomic.Bool
}

func (s *seats) Join(ctx context.Context, self ownership.Member, ttl time.Duration) error {
	if s.away.Load() {
		return errDown
	}
	return s.Directory.Join(ctx, self, ttl)
}

func (s *seats) Members(ctx context.Context) ([]ownership.Member, error) {
	if s.away.Load() {
		return nil, errDown
	}
	return s.Directory.Members(ctx)
}

// A turn that ends because the database is away is not the end of the worker: what
// it could not store any more is found out again.
func TestGroup_OutlivesAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := newServer()
		defer store.Close()
		members, err := projection.Members(store)
		require.NoError(t, err)
		directory := &seats{Directory: members}
		quiet := slog.New(slog.DiscardHandler)
		group := ownership.New(directory, ownership.Options{Name: "one", Logger: quiet})
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() { left <- group.Run(ctx) }()

		var away atomic.Bool
		store.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
			if away.Load() {
				return errDown
			}
			return store.Store.Update(ctx, fn)
		}
		j := newJournal()
		b := startBench(t, store, clock.NewManual(t0), saga.Options{Owner: "one", Group: group}, saga.React("welcome", j.react))
		b.settle()
		away.Store(true)
		exec(b, orders, Place{ID: "o1", SKU: "tea"})
		time.Sleep(time.Second)
		store.down.Store(true)
		directory.away.Store(true)
		time.Sleep(20 * time.Second)
		store.down.Store(false)
		away.Store(false)
		time.Sleep(5 * time.Second)
		// Until it is a member again, others can have the work.
		take(t, store, "reaction welcome", "two")()
		directory.away.Store(false)
		time.Sleep(20 * time.Second)
		exec(b, orders, Place{ID: "o2", SKU: "jam"})
		b.settle()
		require.Equal(t, []string{"o1/1 tea", "o2/1 jam"}, j.handled)
		for _, err := range b.stop() {
			require.NoError(t, err)
		}
		cancel()
		require.NoError(t, <-left)
	})
}

// mumbler is a state whose answers about leases are lost, after they were acquired.
type mumbler struct {
	*server
	lost atomic.Bool
}

func (m *mumbler) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	lease, err := m.server.Acquire(ctx, name, owner, ttl)
	if err == nil && m.lost.Load() {
		return projection.Lease{}, errDown
	}
	return lease, err
}

// A lease that a node has acquired without hearing of it is given up when the work
// moves: nobody else could have it as long as the node lives.
func TestGroup_LeaseOfALostAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := newServer()
		defer store.Close()
		quiet := slog.New(slog.DiscardHandler)
		var left sync.WaitGroup
		defer left.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		join := func(name string) *ownership.Group {
			members, err := projection.Members(store)
			require.NoError(t, err)
			group := ownership.New(members, ownership.Options{Name: name, Logger: quiet})
			left.Go(func() { _ = group.Run(ctx) })
			return group
		}
		j := newJournal()
		one := &mumbler{server: store}
		one.lost.Store(true)
		serve := func(state projection.State, group *ownership.Group) func() {
			engine := saga.NewEngine(store, state, nil, saga.Options{Owner: group.Name(), Group: group, Logger: quiet})
			require.NoError(t, engine.Add(saga.React("welcome", j.react)))
			working, stop := context.WithCancel(ctx)
			var ended sync.WaitGroup
			ended.Go(func() { _ = engine.Workers()[0].Run(working) })
			return func() { stop(); ended.Wait() }
		}
		defer serve(one, join("one"))()
		time.Sleep(5 * time.Second)
		require.ErrorIs(t, func() error { _, err := store.Acquire(ctx, "reaction welcome", "other", 0); return err }(), projection.ErrLeaseHeld)
		// Of the two the work is this one's, by the digest of the names.
		two := join("ten")
		soon, stop := context.WithTimeout(ctx, 10*time.Second)
		defer stop()
		_, err := two.Offer("reaction welcome").Wait(soon)
		require.NoError(t, err)
		one.lost.Store(false)
		defer serve(store, two)()
		time.Sleep(10 * time.Second)
		b := startBench(t, store.Store, clock.NewManual(t0), saga.Options{})
		exec(b, orders, Place{ID: "o1", SKU: "tea"})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		require.Equal(t, []string{"o1/1 tea"}, j.handled)
		for _, err := range b.stop() {
			require.NoError(t, err)
		}
	})
}
