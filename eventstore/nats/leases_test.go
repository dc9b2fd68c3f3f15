package nats

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/natsserver"
	"github.com/deed-go/deed/internal/ownership"
)

const unit = "saga orders.v1"

func leasesOf(t *testing.T, c *natsserver.Cluster, name string) *leases {
	t.Helper()
	l, err := Leases(reopenLog(t, c, name))
	require.NoError(t, err)
	return l.(*leases)
}

// ready waits for the bucket: to make it on several servers may take longer than
// a call has.
func ready(t *testing.T, all ...*leases) {
	t.Helper()
	for _, l := range all {
		require.EventuallyWithT(t, func(c *assert.CollectT) {
			_, err := l.stream(t.Context())
			require.NoError(c, err)
		}, time.Minute, 10*time.Millisecond)
	}
}

// acquireSoon waits for the lease, for as long as another owner may have it.
func acquireSoon(t *testing.T, l *leases, name, owner string, ttl time.Duration) ownership.Lease {
	t.Helper()
	var lease ownership.Lease
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		var err error
		lease, err = l.Acquire(t.Context(), name, owner, ttl)
		require.NoError(c, err)
	}, time.Minute, 10*time.Millisecond)
	return lease
}

func TestLeases(t *testing.T) {
	t.Parallel()
	_, err := Leases(memory.New())
	require.ErrorIs(t, err, errors.ErrUnsupported)

	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		name, ctx, long := newName(), t.Context(), time.Hour
		a, b := leasesOf(t, c, name), leasesOf(t, c, name)
		ready(t, a, b)

		first, err := a.Acquire(ctx, unit, "a", long)
		require.NoError(t, err)
		require.Equal(t, ownership.Lease{Name: unit, Owner: "a", Epoch: first.Revision, Revision: first.Revision}, first)
		_, err = b.Acquire(ctx, unit, "b", long)
		require.ErrorIs(t, err, ownership.ErrHeld)
		require.ErrorContains(t, err, `"a"`)
		other, err := b.Acquire(ctx, "saga orders/v1", "b", long)
		require.NoError(t, err, "another name is another lease")
		require.NoError(t, b.Release(ctx, other))

		// A renewal keeps the epoch, and the revision before it is worth nothing.
		second, err := a.Renew(ctx, first, long)
		require.NoError(t, err)
		require.Equal(t, first.Epoch, second.Epoch)
		require.Greater(t, second.Revision, first.Revision)
		_, ok, err := a.put(ctx, leaseValue{Name: unit, Owner: "z"}, first.Revision, long)
		require.NoError(t, err)
		require.False(t, ok, "a revision that is not the last was taken for it")

		// Nothing was heard of that renewal.
		third, err := a.Renew(ctx, first, long)
		require.NoError(t, err)
		require.Equal(t, first.Epoch, third.Epoch)
		require.Greater(t, third.Revision, second.Revision)

		// To acquire one's own lease again ends the earlier one.
		again, err := a.Acquire(ctx, unit, "a", long)
		require.NoError(t, err)
		require.Greater(t, again.Epoch, first.Epoch)
		_, err = a.Renew(ctx, third, long)
		require.ErrorIs(t, err, ownership.ErrLost)
		require.NoError(t, a.Release(ctx, third))
		_, err = b.Acquire(ctx, unit, "b", long)
		require.ErrorIs(t, err, ownership.ErrHeld, "the release of a lease that was lost has ended another one")

		// A release, too, finds a renewal of which nothing was heard.
		_, err = a.Renew(ctx, again, long)
		require.NoError(t, err)
		require.NoError(t, a.Release(ctx, again))
		require.NoError(t, a.Release(ctx, again))
		_, err = a.Renew(ctx, again, long)
		require.ErrorIs(t, err, ownership.ErrLost)
		heir := acquireSoon(t, b, unit, "b", long) // after a release nobody need wait, but a server that lags may tell of the lease
		require.Greater(t, heir.Epoch, again.Epoch)
		_, err = a.Renew(ctx, again, long)
		require.ErrorIs(t, err, ownership.ErrLost)
		require.NoError(t, a.Release(ctx, again))
		_, err = b.Renew(ctx, heir, long)
		require.NoError(t, err)

		// What is no lease is not overwritten.
		_, err = a.s.js.Publish(ctx, a.subject("x"), []byte("hello"))
		require.NoError(t, err)
		_, err = a.Acquire(ctx, "x", "a", long)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "is no lease")
	})
}

// Both have seen that nobody has the lease before either of them writes; and many
// come at the same time.
func TestLeases_Race(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		name := newName()
		a, b := leasesOf(t, c, name), leasesOf(t, c, name)
		ready(t, a, b)
		seenByA, err := a.look(t.Context(), unit)
		require.NoError(t, err)
		seenByB, err := b.look(t.Context(), unit)
		require.NoError(t, err)
		_, won, err := b.put(t.Context(), leaseValue{Name: unit, Owner: "b"}, seenByB.revision, time.Hour)
		require.NoError(t, err)
		require.True(t, won)
		_, won, err = a.put(t.Context(), leaseValue{Name: unit, Owner: "a"}, seenByA.revision, time.Hour)
		require.NoError(t, err)
		require.False(t, won, "both have the lease")

		for round := range 5 {
			var winners atomic.Int32
			var group sync.WaitGroup
			for i := range 8 {
				l := []*leases{a, b}[i%2]
				group.Go(func() {
					_, err := l.Acquire(t.Context(), fmt.Sprint("round ", round), fmt.Sprint("owner ", i), time.Hour)
					for errors.Is(err, eventstore.ErrUnavailable) { // what it was told was old, again and again
						_, err = l.Acquire(t.Context(), fmt.Sprint("round ", round), fmt.Sprint("owner ", i), time.Hour)
					}
					switch {
					case err == nil:
						winners.Add(1)
					case !errors.Is(err, ownership.ErrHeld):
						t.Error(err)
					}
				})
			}
			group.Wait()
			require.EqualValues(t, 1, winners.Load())
		}
	})
}

func TestLeases_Expire(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		name := newName()
		a, b := leasesOf(t, c, name), leasesOf(t, c, name)
		ready(t, a, b)
		const ttl = 2 * time.Second

		// Who renews it keeps it for longer than it lasts.
		asked := time.Now()
		lease, err := a.Acquire(t.Context(), unit, "a", ttl)
		require.NoError(t, err)
		for began := time.Now(); time.Since(began) < 2*ttl; {
			next := time.Now()
			renewed, err := a.Renew(t.Context(), lease, ttl)
			if errors.Is(err, ownership.ErrLost) && time.Since(asked) > ttl {
				began = time.Now() // this machine was too slow to say anything
				renewed, err = acquireSoon(t, a, unit, "a", ttl), nil
			}
			require.NoError(t, err)
			lease, asked = renewed, next
			_, err = b.Acquire(t.Context(), unit, "b", ttl)
			if time.Since(asked) < ttl {
				require.ErrorIs(t, err, ownership.ErrHeld)
			}
			wait, cancel := context.WithTimeout(t.Context(), ttl/20)
			<-wait.Done()
			cancel()
		}

		// Who does not loses it, and not before its time; the epochs rise.
		heir := acquireSoon(t, b, unit, "b", ttl)
		took := time.Since(asked)
		require.GreaterOrEqual(t, took, ttl)
		require.Greater(t, heir.Epoch, lease.Epoch)
		t.Logf("a lease of %v was free %v after it was asked for last", ttl, took.Round(time.Millisecond))
		_, err = a.Renew(t.Context(), lease, ttl)
		require.ErrorIs(t, err, ownership.ErrLost)

		// Nobody comes, and the key has gone: a renewal is too late all the same.
		require.Eventually(t, func() bool {
			is, err := b.look(t.Context(), unit)
			return err == nil && !is.held && is.revision > heir.Revision // a server that lags may tell of the first one's end
		}, time.Minute, 10*time.Millisecond)
		_, err = b.Renew(t.Context(), heir, ttl)
		require.ErrorIs(t, err, ownership.ErrLost)
		require.NoError(t, b.Release(t.Context(), heir))
		last := acquireSoon(t, a, unit, "a", ttl)
		require.Greater(t, last.Epoch, heir.Epoch)
	})
}

// renewUntil renews until that succeeds, as an owner does.
func renewUntil(t *testing.T, l *leases, lease ownership.Lease, ttl time.Duration) ownership.Lease {
	t.Helper()
	for began := time.Now(); ; {
		renewed, err := l.Renew(t.Context(), lease, ttl)
		if err == nil {
			return renewed
		}
		require.NotErrorIs(t, err, ownership.ErrLost)
		require.Less(t, time.Since(began), time.Minute, "the lease cannot be renewed: %v", err)
	}
}

// The lease outlives the server and goes on; so do the epochs, after it was
// released, and after it has expired while the server was away.
func TestLeases_ServerRestart(t *testing.T) {
	t.Parallel()
	c, err := natsserver.Start(natsserver.Options{})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	name := newName()
	a, b := leasesOf(t, c, name), leasesOf(t, c, name)
	restart := func() {
		c.Stop(0)
		require.NoError(t, c.Start(0))
	}
	lease, err := a.Acquire(t.Context(), unit, "a", time.Hour)
	require.NoError(t, err)
	restart()
	renewed := renewUntil(t, a, lease, time.Hour)
	require.Equal(t, lease.Epoch, renewed.Epoch)
	_, err = b.Acquire(t.Context(), unit, "b", time.Hour)
	for err != nil && !errors.Is(err, ownership.ErrHeld) { // b has not come back yet
		_, err = b.Acquire(t.Context(), unit, "b", time.Hour)
	}
	require.ErrorIs(t, err, ownership.ErrHeld)

	require.NoError(t, a.Release(t.Context(), renewed))
	restart()
	heir := acquireSoon(t, b, unit, "b", time.Second)
	require.Greater(t, heir.Epoch, renewed.Revision)
	c.Stop(0)
	wait, cancel := context.WithTimeout(t.Context(), time.Second)
	<-wait.Done()
	cancel()
	require.NoError(t, c.Start(0))
	last := acquireSoon(t, a, unit, "a", time.Hour)
	require.Greater(t, last.Epoch, heir.Epoch)
}

// Leaders of the bucket step down and die while the lease is renewed: it stays
// its owner's.
func TestLeases_LeaderChanges(t *testing.T) {
	t.Parallel()
	c := servers(t, 3)
	name := newName()
	a, b := leasesOf(t, c, name), leasesOf(t, c, name)
	const ttl = 10 * time.Minute
	lease, err := a.Acquire(t.Context(), unit, "a", ttl)
	require.NoError(t, err)
	held := func() {
		t.Helper()
		var err error
		for began := time.Now(); ; {
			_, err = b.Acquire(t.Context(), unit, "b", ttl)
			require.Error(t, err)
			if errors.Is(err, ownership.ErrHeld) {
				return
			}
			require.Less(t, time.Since(began), time.Minute, "%v", err)
		}
	}
	for range 3 {
		require.NoError(t, c.Settled(t.Context(), a.name))
		require.NoError(t, c.StepDown(a.name))
		for range 5 {
			renewed := renewUntil(t, a, lease, ttl)
			require.Equal(t, lease.Epoch, renewed.Epoch)
			lease = renewed
		}
		held()
	}
	require.NoError(t, c.Settled(t.Context(), a.name))
	dead := c.Leader(a.name)
	began := time.Now()
	c.Stop(dead)
	renewed := renewUntil(t, a, lease, ttl)
	t.Logf("renewed %v after the leader had died", time.Since(began).Round(time.Millisecond))
	require.Equal(t, lease.Epoch, renewed.Epoch)
	held()
	require.NoError(t, c.Start(dead))
	require.NoError(t, a.Release(t.Context(), renewUntil(t, a, renewed, ttl)))
	require.Greater(t, acquireSoon(t, b, unit, "b", ttl).Epoch, renewed.Revision)
}

// A bucket in which nothing expires would keep the leases of the dead for ever.
func TestLeases_BadBucket(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	l := leasesOf(t, c, newName())
	_, err := l.s.js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: l.bucket})
	require.NoError(t, err)
	_, err = l.Acquire(t.Context(), unit, "a", time.Hour)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.ErrorContains(t, err, l.bucket)

	// It is deleted, and made anew.
	require.NoError(t, l.s.js.DeleteKeyValue(t.Context(), l.bucket))
	lease, err := l.Acquire(t.Context(), unit, "a", time.Hour)
	require.NoError(t, err)
	// And again, while the lease is held, which is lost then.
	require.NoError(t, l.s.js.DeleteKeyValue(t.Context(), l.bucket))
	require.Error(t, func() error { _, err := l.Renew(t.Context(), lease, time.Hour); return err }())
	acquireSoon(t, l, unit, "b", time.Hour)
	_, err = l.Renew(t.Context(), lease, time.Hour)
	require.ErrorIs(t, err, ownership.ErrLost)
}
