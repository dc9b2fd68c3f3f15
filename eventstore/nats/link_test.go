package nats

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/metatest"
)

// link is between a client and a server that is reached at so many bytes a second.
func link(t *testing.T, server string, perSecond int) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var running sync.WaitGroup
	t.Cleanup(func() { _ = listener.Close(); running.Wait() })
	carry := func(near net.Conn) {
		defer func() { _ = near.Close() }()
		far, err := net.Dial("tcp", server)
		if err != nil {
			return
		}
		defer func() { _ = far.Close() }()
		_ = far.(*net.TCPConn).SetReadBuffer(64 << 10)
		var forth sync.WaitGroup
		forth.Go(func() { _, _ = io.Copy(far, near); _ = far.Close() })
		defer forth.Wait()
		defer func() { _ = near.Close() }()
		for buffer := make([]byte, perSecond/100); ; {
			began := time.Now()
			n, err := far.Read(buffer)
			if _, failed := near.Write(buffer[:n]); err != nil || failed != nil {
				return
			}
			time.Sleep(time.Duration(n)*time.Second/time.Duration(perSecond) - time.Since(began))
		}
	}
	running.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { carry(near) })
		}
	})
	return listener.Addr().String()
}

// large appends streams of so many events of so many bytes.
func large(t *testing.T, s *Store, streams, events, bytes int) {
	t.Helper()
	for i := range streams {
		for n := 0; n < events; n += 10 {
			e := happened(account(fmt.Sprint(i)), min(10, events-n))
			for k := range e {
				e[k].Data = make([]byte, bytes)
			}
			_, err := s.Append(t.Context(), eventstore.Commit{Events: e})
			require.NoError(t, err)
		}
	}
}

// Loads of large events do not ask for so much at once that the server cuts the
// process off, which would end everything else on the connection too: many loads
// over a network, and one over a slow one.
func TestLoad_OverALink(t *testing.T) {
	t.Parallel()
	type load struct{ loads, events, bytes, perSecond int }
	tests := []load{{32, 64, 48 << 10, 110 << 20}, {8, 24, 900 << 10, 110 << 20}, {1, 16, 1 << 20, 10 << 20}}
	if os.Getenv("DEED_TEST_LONG") == "" {
		tests = []load{{40, 64, 48 << 10, 110 << 20}}
	}
	if metatest.Raced() {
		tests = []load{{8, 64, 48 << 10, 110 << 20}} // too little to be cut off for, but as many at once
	}
	for _, test := range tests {
		c := shared.get(t, 1)
		writer, name := openLog(t, c)
		large(t, writer, test.loads, test.events, test.bytes)
		host := c.URL()[strings.LastIndexAny(c.URL(), "/@")+1:]
		var broke atomic.Int64
		conn, err := client.Connect("nats://"+link(t, host, test.perSecond), client.MaxReconnects(-1), client.ReconnectBufSize(-1), client.IgnoreDiscoveredServers(),
			client.DisconnectErrHandler(func(_ *client.Conn, err error) {
				if err != nil {
					broke.Add(1)
				}
			}))
		require.NoError(t, err)
		store, err := OpenConn(t.Context(), conn, Stream(name), quiet(), opening)
		require.NoError(t, err)
		var all sync.WaitGroup
		for i := range test.loads {
			all.Go(func() {
				n := 0
				for _, err := range store.Read(t.Context(), eventstore.OneStream(account(fmt.Sprint(i))), eventstore.ReadOptions{Backward: i%2 == 1}) {
					if err != nil {
						t.Error(err)
						return
					}
					n++
				}
				if n != test.events {
					t.Errorf("%d events of %d", n, test.events)
				}
				if _, _, err := store.Lookup(t.Context(), account(fmt.Sprint(i)), "none"); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		require.Zero(t, store.pipe.flying, "what was reserved has come back")
		require.NoError(t, store.Close())
		conn.Close()
		require.Zero(t, broke.Load(), "%+v: cut off", test)
	}
}

// A replica that has none of the events answers for a while: the leader, whose
// answers are larger, is not asked for too much either.
func TestLoad_LaggingReplica(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	writer, name := openLog(t, c)
	events := 100
	if metatest.Raced() {
		events = 20
	}
	large(t, writer, 1, events, 1<<20)
	var mu sync.Mutex
	asked := map[uint64]int{}
	var lags atomic.Bool
	store := reopenLog(t, c, name, hooked(func(s *settings) {
		s.stale = func(r *getRequest) bool {
			mu.Lock()
			defer mu.Unlock()
			if !lags.Load() || r.Sequence == 0 || r.Batch > 0 || r.Next != "" || r.Last != "" {
				return false
			}
			asked[r.Sequence]++
			return asked[r.Sequence] <= 2 // the load's own request, and direct; then comes the leader
		}
	}))
	lags.Store(true)
	var broke atomic.Int64
	store.conn.SetDisconnectErrHandler(func(*client.Conn, error) { broke.Add(1) })
	_, _, err := store.Lookup(t.Context(), account("0"), "none")
	require.NoError(t, err)
	require.Zero(t, broke.Load(), "cut off")
}

// A backward read asks for each event once, however large they are.
func TestLoad_BackwardAsksOnce(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	for _, bytes := range []int{1 << 10, 200 << 10, 900 << 10} {
		writer, name := openLog(t, c)
		large(t, writer, 1, 60, bytes)
		var asked atomic.Int64
		store := reopenLog(t, c, name, hooked(func(s *settings) {
			s.stale = func(r *getRequest) bool {
				if r.Sequence > 0 && r.Last == "" && r.Next == "" && r.Batch == 0 {
					asked.Add(1)
				}
				return false
			}
		}))
		asked.Store(0)
		require.Len(t, read(t, store, eventstore.OneStream(account("0")), eventstore.ReadOptions{Backward: true}), 60)
		require.LessOrEqual(t, asked.Load(), int64(60), "%d bytes", bytes)
	}
}

// A hole that reaches beyond where a read is to end is one all the same.
func TestRead_HoleBeyondTheEnd(t *testing.T) {
	t.Parallel()
	for name, q := range map[string]eventstore.Query{
		"all": eventstore.All(), "category": eventstore.OneCategory("account"), "long stream": eventstore.OneStream(account("ann")),
	} {
		for _, backward := range []bool{false, true} {
			store, log := openLog(t, shared.get(t, 1), hooked(func(s *settings) { s.streamBytes = 1000; s.lookEvery = time.Hour }))
			_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 100)})
			require.NoError(t, err)
			stream, err := store.js.Stream(t.Context(), log)
			require.NoError(t, err)
			config := stream.CachedInfo().Config
			config.Discard, config.MaxMsgs = jetstream.DiscardOld, 40
			_, err = store.js.UpdateStream(t.Context(), config)
			require.NoError(t, err)
			n := 0
			for _, e := range store.Read(t.Context(), q, eventstore.ReadOptions{Through: 50, Backward: backward}) {
				if err = e; e != nil {
					break
				}
				n++
			}
			require.ErrorIs(t, err, eventstore.ErrGap, "%s, backward %v: %d events of 50, and no error", name, backward, n)
		}
	}
}
