package esdb_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/esdbserver"
)

var ann = eventstore.Stream{Category: "account", ID: "ann"}

func happened(n int) eventstore.Commit {
	var c eventstore.Commit
	for i := range n {
		c.Events = append(c.Events, eventstore.Event{Stream: ann, Type: "happened", Data: fmt.Appendf(nil, `{"N":%d}`, i)})
	}
	return c
}

// With the server down, each of many callers returns within its own deadline,
// whatever it calls; when the server is up again on its port the same store goes
// on, and a subscription that was open misses nothing.
func TestPoint67_68_ServerDown(t *testing.T) {
	t.Parallel()
	server := ours(t)
	store := open(t, server.URL(), esdb.Patience(time.Minute))
	first, err := store.Append(t.Context(), happened(2))
	require.NoError(t, err)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen, ended := make(chan eventstore.Recorded, 100), make(chan error, 1)
	caught := make(chan struct{})
	go func() {
		var last error
		once := sync.OnceFunc(func() { close(caught) })
		for batch, err := range store.Subscribe(ctx, eventstore.All(), 0) {
			last = err
			for _, e := range batch.Events {
				seen <- e
			}
			if batch.CaughtUp {
				once()
			}
		}
		ended <- last
	}()
	<-caught
	for round := range 2 {
		server.Down()
		const callers = 100
		late := make([]time.Duration, callers)
		failures := make([]error, callers)
		var all sync.WaitGroup
		for i := range callers {
			all.Go(func() {
				within := time.Duration(50+i*10) * time.Millisecond
				own, stop := context.WithTimeout(ctx, within)
				defer stop()
				began := time.Now()
				switch i % 4 {
				case 0:
					c := happened(1)
					c.Events[0].Stream.ID = fmt.Sprint("down", i)
					_, failures[i] = store.Append(own, c)
				case 1:
					_, failures[i] = store.Head(own)
				case 2:
					_, failures[i] = collect(store, own, eventstore.OneStream(ann), eventstore.ReadOptions{})
				case 3:
					_, _, failures[i] = store.Lookup(own, ann, "k")
				}
				late[i] = time.Since(began) - within
			})
		}
		all.Wait()
		worst := time.Duration(0)
		for i, err := range failures {
			require.ErrorIs(t, err, context.DeadlineExceeded, "caller %d", i)
			worst = max(worst, late[i])
		}
		require.Less(t, worst, 2*time.Second, "a caller was kept beyond its deadline")
		t.Logf("%d callers, the latest returned %s after its deadline", callers, worst)

		require.NoError(t, server.Up())
		r, err := store.Append(ctx, happened(1))
		require.NoError(t, err)
		require.Equal(t, uint64(3+round), r.Revision(ann).Version)
	}
	last := eventstore.Position(0)
	for n := range 4 {
		e := <-seen
		require.Equal(t, uint64(n+1), e.Version, "the subscription skips and repeats nothing")
		require.Greater(t, e.Position, last)
		last = e.Position
	}
	require.Greater(t, last, first.Last)
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
}

// A call without a deadline fails when the server has been waited for long
// enough, and says that nothing was written.
func TestPatience(t *testing.T) {
	t.Parallel()
	server := ours(t)
	var store *esdb.Store
	var err error
	for range 100 { // patience is short on a busy machine
		if store, err = esdb.Open(t.Context(), server.URL(), esdb.Patience(400*time.Millisecond)); err == nil {
			break
		}
		require.ErrorIs(t, err, eventstore.ErrUnavailable)
	}
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	server.Down()
	_, err = store.Append(t.Context(), happened(1))
	require.ErrorIs(t, err, eventstore.ErrUnavailable)
	require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown)
	_, err = store.Head(t.Context())
	require.ErrorIs(t, err, eventstore.ErrUnavailable)
	for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneStream(ann)} {
		for _, backward := range []bool{false, true} {
			_, err = collect(store, t.Context(), q, eventstore.ReadOptions{Backward: backward})
			require.ErrorIs(t, err, eventstore.ErrUnavailable)
		}
	}
	_, _, err = store.Lookup(t.Context(), ann, "k")
	require.ErrorIs(t, err, eventstore.ErrUnavailable)
	_, err = esdb.Open(t.Context(), server.URL(), esdb.Patience(50*time.Millisecond))
	require.ErrorIs(t, err, eventstore.ErrUnavailable)
	require.NoError(t, server.Up())
	for range 100 {
		if _, err = store.Append(t.Context(), happened(1)); err == nil {
			return
		}
		if !errors.Is(err, eventstore.ErrOutcomeUnknown) {
			require.ErrorIs(t, err, eventstore.ErrUnavailable)
		}
	}
	require.NoError(t, err, "the client that failed is used again")
}

// A server that takes connections and never answers keeps nobody beyond its
// deadline, nor Close.
func TestServerThatHangs(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	var held sync.WaitGroup
	held.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	})
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = esdb.Open(ctx, "esdb://"+listener.Addr().String()+"?tls=false&gossipTimeout=1")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Less(t, time.Since(began), 10*time.Second)
	listener.Close()
	held.Wait()
}

// Calls that hang in the server end with their callers' contexts; Close ends
// what is left.
func TestCallsThatHang(t *testing.T) {
	t.Parallel()
	server := ours(t)
	store, err := esdb.Open(t.Context(), server.URL())
	require.NoError(t, err)
	hang := make(chan struct{})
	defer close(hang)
	var hanging atomic.Int64
	server.Intercept(func(ctx context.Context, _ string) error {
		hanging.Add(1)
		select {
		case <-hang:
		case <-ctx.Done():
		}
		return ctx.Err()
	})
	defer server.Intercept(nil)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // the append must get there
	defer cancel()
	_, err = store.Append(ctx, eventstore.Commit{Events: happened(1).Events, Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}})
	require.ErrorIs(t, err, eventstore.ErrOutcomeUnknown)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, err = collect(store, ctx, eventstore.OneStream(ann), eventstore.ReadOptions{})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Positive(t, hanging.Load())
	// One that has no deadline of its own is given up by Close.
	outcome := make(chan error, 1)
	before := hanging.Load()
	go func() {
		c := happened(1)
		c.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}
		_, err := store.Append(context.Background(), c)
		outcome <- err
	}()
	require.Eventually(t, func() bool { return hanging.Load() > before }, time.Minute, time.Millisecond)
	require.NoError(t, store.Close())
	require.ErrorIs(t, <-outcome, eventstore.ErrOutcomeUnknown)
}

// Cut off before or after it was written, an append has one outcome, which its
// caller is told, and is written once.
func TestPoint22_UnknownOutcomes(t *testing.T) {
	for name, moment := range map[string]esdbserver.Moment{"before": esdbserver.BeforeWritten, "after": esdbserver.AfterWritten} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := ours(t)
			store := open(t, server.URL())
			version := uint64(0)
			for cuts := range 4 {
				for _, c := range []eventstore.Commit{
					happened(1), happened(3),
					{Events: happened(2).Events, Conditions: []eventstore.Condition{eventstore.StreamExists(ann)}},
					{Events: happened(2).Events, Key: fmt.Sprint("k", cuts)},
				} {
					if version == 0 {
						c.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}
					}
					server.CutAppends(moment, cuts)
					r, err := store.Append(t.Context(), c)
					require.NoError(t, err)
					server.CutAppends(moment, 0)
					require.False(t, r.Duplicate)
					version += uint64(len(c.Events))
					require.Equal(t, version, r.Revision(ann).Version)
					got, err := collect(store, t.Context(), eventstore.OneStream(ann), eventstore.ReadOptions{})
					require.NoError(t, err)
					require.Len(t, got, int(version), "written once")
					require.Equal(t, r.Last, got[version-1].Position)
					require.Equal(t, r.First, got[int(version)-len(c.Events)].Position)
				}
			}
		})
	}
}

// The one write that the server does not recognise when it is repeated is the
// first one after a deletion: its ids are found where it stands.
func TestPoint36_UnknownOutcomeAfterADeletion(t *testing.T) {
	t.Parallel()
	server := ours(t)
	store := open(t, server.URL())
	_, err := store.Append(t.Context(), happened(3))
	require.NoError(t, err)
	_, err = connect(t, server.URL()).Delete(t.Context(), ann.String(), 2)
	require.NoError(t, err)
	server.CutAppends(esdbserver.AfterWritten, 1)
	c := happened(2)
	c.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}
	r, err := store.Append(t.Context(), c)
	require.NoError(t, err, "it was written, and is no conflict with itself")
	require.Equal(t, uint64(5), r.Revision(ann).Version)
	all, err := collect(store, t.Context(), eventstore.All(), eventstore.ReadOptions{})
	require.NoError(t, err)
	require.Len(t, all, 5)
	require.Equal(t, all[3].Position, r.First)
	require.Equal(t, all[4].Position, r.Last)
}

// An append that was cut off after it was written must not take another
// writer's events for its own, nor its own for another's.
func TestPoint22_UnknownOutcomeWithRivals(t *testing.T) {
	t.Parallel()
	server := ours(t)
	ctx := t.Context()
	stores := []*esdb.Store{open(t, server.URL()), open(t, server.URL())}
	const writers, each = 6, 15
	// Every fourth success arms the next cut, so that there is always progress.
	var successes atomic.Int64
	success := func() {
		if n := successes.Add(1); n%4 == 0 {
			server.CutAppends([]esdbserver.Moment{esdbserver.AfterWritten, esdbserver.BeforeWritten}[n/4%2], 1)
		}
	}
	won := make([][]eventstore.Receipt, writers)
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			store := stores[w%2]
			for n := range each {
				for {
					got, err := collect(store, ctx, eventstore.OneStream(ann), eventstore.ReadOptions{})
					if err != nil {
						t.Errorf("read: %v", err)
						return
					}
					c := happened(1 + n%2)
					for i := range c.Events {
						c.Events[i].Type = fmt.Sprintf("by.%d.%d", w, n)
					}
					c.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: uint64(len(got))})}
					r, err := store.Append(ctx, c)
					if err == nil {
						won[w] = append(won[w], r)
						success()
						break
					}
					if !errors.Is(err, eventstore.ErrConflict) {
						t.Errorf("append: %v", err)
						return
					}
				}
			}
		})
	}
	all.Wait()
	got, err := collect(stores[0], ctx, eventstore.OneStream(ann), eventstore.ReadOptions{})
	require.NoError(t, err)
	count := map[string]int{}
	for _, e := range got {
		count[e.Type]++
	}
	for w := range writers {
		require.Len(t, won[w], each)
		for n, r := range won[w] {
			kind := fmt.Sprintf("by.%d.%d", w, n)
			require.Equal(t, 1+n%2, count[kind], "%s is written as often as it was acknowledged", kind)
			at := r.Revision(ann)
			require.Equal(t, kind, got[at.Version-1].Type, "the receipt names its own events")
			require.Equal(t, at.Position, got[at.Version-1].Position)
		}
	}
}

// Subscriptions that the server drops go on where they were, with no skip and no
// repeat, while they catch up and afterwards.
func TestPoint54_56_DroppedSubscriptions(t *testing.T) {
	t.Parallel()
	server := ours(t)
	store := open(t, server.URL(), esdb.Tail(20, 1<<20))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const commits = 120
	acknowledged, written := make(chan struct{}, 1), make(chan struct{})
	write := func(n int) eventstore.Position {
		var last eventstore.Position
		for i := range n {
			c := happened(2)
			for j := range c.Events {
				c.Events[j].Stream = eventstore.Stream{Category: []string{"account", "order"}[i%2], ID: fmt.Sprint(i % 5)}
			}
			r, err := store.Append(ctx, c)
			if err != nil {
				t.Errorf("append: %v", err)
				return 0
			}
			last = r.Last
			select {
			case acknowledged <- struct{}{}:
			default:
			}
		}
		return last
	}
	write(commits)
	stop := make(chan struct{})
	var troubles sync.WaitGroup
	troubles.Go(func() {
		// Faults must not outrun what they disturb: each waits for an append while there
		// are any, and for longer than the one before.
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(15+n) * time.Millisecond):
			}
			select {
			case <-acknowledged:
			case <-written:
			}
			switch n % 3 {
			case 0:
				server.EndSubscriptions()
			case 1:
				server.FallBehind()
			case 2:
				server.DropConnections()
			}
		}
	})
	var goal atomic.Uint64
	var followers sync.WaitGroup
	queries := []eventstore.Query{eventstore.All(), eventstore.OneCategory("order"), eventstore.OneStream(eventstore.Stream{Category: "account", ID: "0"}), eventstore.OfTypes("happened"), eventstore.OfTypes("nothing")}
	got := make([][]eventstore.Position, len(queries))
	for i, q := range queries {
		followers.Go(func() {
			through := eventstore.Position(0)
			for batch, err := range store.Subscribe(ctx, q, 0) {
				if err != nil {
					t.Errorf("subscription %d: %v", i, err)
					return
				}
				if batch.Through < through {
					t.Errorf("subscription %d: Through went back", i)
				}
				through = batch.Through
				for _, e := range batch.Events {
					got[i] = append(got[i], e.Position)
				}
				if g := goal.Load(); g != 0 && uint64(through) >= g {
					return
				}
			}
		})
	}
	last := write(commits)
	close(written)
	goal.Store(uint64(last))
	write(1) // a bell for those who have seen the last one already
	followers.Wait()
	close(stop)
	troubles.Wait()
	for i, q := range queries {
		want, err := collect(store, ctx, q, eventstore.ReadOptions{Through: last})
		require.NoError(t, err)
		n := 0
		for _, p := range got[i] {
			if p > last {
				break
			}
			require.Less(t, n, len(want))
			require.Equal(t, want[n].Position, p, "subscription %d, event %d", i, n)
			n++
		}
		require.Equal(t, len(want), n, "subscription %d", i)
	}
}

// A follower that forwards nothing names the leader: the store goes there.
func TestNotLeader(t *testing.T) {
	t.Parallel()
	log := memory.New()
	if t.Cleanup(func() { _ = log.Close() }); true {
		_ = ours(t) // skips where the server is a real one
	}
	leader, follower := server(t, log), server(t, log)
	host, port, err := net.SplitHostPort(leader.Address())
	require.NoError(t, err)
	var n int
	_, err = fmt.Sscan(port, &n)
	require.NoError(t, err)
	follower.FollowLeader(host, n)
	store := open(t, follower.URL())
	for i := range 3 {
		r, err := store.Append(t.Context(), happened(2))
		require.NoError(t, err)
		require.Equal(t, uint64(2*i+2), r.Revision(ann).Version)
	}
}

// What the server refuses for good is not tried again.
func TestRefusals(t *testing.T) {
	t.Parallel()
	server := ours(t)
	store := open(t, server.URL())
	server.Intercept(func(_ context.Context, method string) error {
		if strings.HasSuffix(method, "Append") || strings.HasSuffix(method, "Read") {
			return status.Error(codes.PermissionDenied, "Access Denied")
		}
		return nil
	})
	began := time.Now()
	_, err := store.Append(t.Context(), happened(1))
	require.ErrorContains(t, err, "refuses this user")
	require.False(t, eventstore.CanRetry(err))
	for _, err := range store.Subscribe(t.Context(), eventstore.All(), 0) {
		require.ErrorContains(t, err, "refuses this user")
	}
	require.Less(t, time.Since(began), 20*time.Second)
	server.Intercept(nil)
	_, err = store.Append(t.Context(), happened(1))
	require.NoError(t, err)
	for batch, err := range store.Subscribe(t.Context(), eventstore.All(), 0) {
		require.NoError(t, err, "a new subscription begins anew")
		if len(batch.Events) == 1 {
			break
		}
	}
}
