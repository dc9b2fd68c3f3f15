package nats

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

// One commit cannot be written for a reason that the server does not tell in the
// answer to the batch; others share its group.
func TestStore_RefusedBatchWithOthers(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	for _, n := range []int{1, 2} {
		var open atomic.Bool
		store, name := openLog(t, c, hooked(func(s *settings) {
			s.hold = func() bool { return !open.Load() }
			s.grouping = 2
			s.lookEvery = time.Hour // the new limit is not noticed
		}))
		s, err := store.js.Stream(t.Context(), name)
		require.NoError(t, err)
		config := s.CachedInfo().Config
		config.MaxMsgSize = 4096
		_, err = store.js.UpdateStream(t.Context(), config)
		require.NoError(t, err)
		events := happened(account("ann"), n)
		events[0].Data = make([]byte, 10000)
		for i := range events[0].Data {
			events[0].Data[i] = '1'
		}
		began := time.Now()
		p1 := store.Enqueue(t.Context(), eventstore.Commit{Events: events})
		p2 := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(account("bob"), 1)})
		open.Store(true)
		store.scheduler.signal()
		_, e1 := p1.Result()
		_, e2 := p2.Result()
		t.Logf("%d events: %v / %v after %s", n, e1, e2, time.Since(began))
		if e2 != nil {
			t.Errorf("%d events: innocent: %v", n, e2)
		}
	}
}

// A log that is full says so at once, by the name of the limit, whatever the
// patience; nothing is written, and there is room again when the limit is raised.
func TestStore_Full(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		for limit, set := range map[string]func(*jetstream.StreamConfig, int){
			"maximum messages exceeded": func(c *jetstream.StreamConfig, n int) { c.MaxMsgs = int64(n) },
			"maximum bytes exceeded":    func(c *jetstream.StreamConfig, n int) { c.MaxBytes = int64(n) * 400 },
		} {
			store, _ := openLog(t, c, Patience(time.Hour))
			edit(t, store, func(c *jetstream.StreamConfig) { set(c, 4) })
			ann := account("ann")
			_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 2)})
			require.NoError(t, err)
			refused := func(events []eventstore.Event) {
				t.Helper()
				before := len(read(t, store, eventstore.All(), eventstore.ReadOptions{}))
				var err error
				for range 10 { // on a busy machine an answer may come late, or a replica be silent for a while
					// A refusal is final while all replicas are known to follow the leader.
					require.Eventually(t, func() bool { return store.leads(t.Context(), 0) }, time.Minute, 10*time.Millisecond)
					if _, err = store.Append(t.Context(), eventstore.Commit{Events: events}); !errors.Is(err, eventstore.ErrOutcomeUnknown) {
						break
					}
				}
				require.ErrorIs(t, err, eventstore.ErrUnavailable)
				require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown)
				require.ErrorContains(t, err, limit)
				require.ErrorContains(t, err, "no more room")
				require.Len(t, read(t, store, eventstore.All(), eventstore.ReadOptions{}), before)
			}
			refused(happened(ann, 5))
			for err = nil; err == nil; {
				_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1)})
			}
			refused(happened(ann, 1))
			edit(t, store, func(c *jetstream.StreamConfig) { set(c, 100) })
			_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 3)})
			require.NoError(t, err)
		}
	})
}

// Which answers mean that there is no room, and which that nobody knows.
func TestFull(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{"maximum messages exceeded": true, "maximum bytes exceeded": true, "store is closed": false, "write error: no space left on device": false} {
		require.Equal(t, want, full(&jetstream.APIError{Code: 503, ErrorCode: codeStoreFailed, Description: text}), text)
	}
	for code, want := range map[jetstream.ErrorCode]bool{codeAccountFull: true, codeInsufficient: true, codeStorageFull: true, 10008: false, codeWrongSequence: false} {
		require.Equal(t, want, full(&jetstream.APIError{Code: 500, ErrorCode: code}), "%d", code)
	}
}

// Close while commits wait and are in flight and the server is away.
func TestStore_CloseWithServerAway(t *testing.T) {
	t.Parallel()
	c := servers(t, 1)
	store, _ := openLog(t, c, hooked(func(s *settings) { s.attempt = 300 * time.Millisecond }))
	_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() {
		for _, err := range store.Subscribe(context.Background(), eventstore.All(), 0) {
			if err != nil {
				ended <- err
			}
		}
	}()
	c.Stop(0)
	var ps []*eventstore.Pending
	for i := range 50 {
		ps = append(ps, store.Enqueue(t.Context(), eventstore.Commit{Events: happened(account(string(rune('a'+i%7))), 1+i%2)}))
	}
	began := time.Now()
	require.NoError(t, store.Close())
	t.Logf("Close took %s", time.Since(began))
	for _, p := range ps {
		_, err := p.Result()
		require.Error(t, err)
		if errors.Is(err, eventstore.ErrOutcomeUnknown) {
			t.Logf("%v", err)
		}
	}
	require.ErrorIs(t, <-ended, eventstore.ErrClosed)
	require.Less(t, time.Since(began), 10*time.Second)
}

// Close, and the end of the connection, while a subscription that has got nothing
// yet asks where the log ends.
func TestStore_CloseBeforeFollowing(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	conn, err := c.Connect()
	require.NoError(t, err)
	var store *Store
	closed, first := make(chan error, 1), once()
	store, err = OpenConn(t.Context(), conn, Stream(newName()), quiet(), opening, hooked(func(s *settings) {
		s.stale = func(*getRequest) bool {
			if first() {
				go func() { closed <- store.Close() }()
				<-store.closing
				conn.Close()
			}
			return false
		}
	}))
	require.NoError(t, err)
	for _, err := range store.Subscribe(t.Context(), eventstore.All(), 0) {
		require.ErrorIs(t, err, eventstore.ErrClosed)
	}
	require.NoError(t, <-closed)
}

// a very large event in pages
func TestStore_LargeEvents(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	store, _ := openLog(t, c, Tail(1, 1))
	data := make([]byte, 1<<20-1000)
	for i := range data {
		data[i] = '1'
	}
	for i := range 5 {
		e := happened(account(string(rune('a'+i))), 1)
		e[0].Data = data
		_, err := store.Append(t.Context(), eventstore.Commit{Events: e})
		require.NoError(t, err)
	}
	for _, back := range []bool{true, false} {
		require.Len(t, read(t, store, eventstore.OneCategory("account"), eventstore.ReadOptions{Backward: back}), 5)
		require.Len(t, read(t, store, eventstore.All(), eventstore.ReadOptions{Backward: back}), 5)
	}
}
