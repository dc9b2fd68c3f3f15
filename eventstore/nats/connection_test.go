package nats

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

type heldConn struct {
	net.Conn
	held   *atomic.Bool
	closed chan struct{}
	once   sync.Once
}

func (h *heldConn) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	if h.held.Load() {
		<-h.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (h *heldConn) Close() error {
	h.once.Do(func() { close(h.closed) })
	return h.Conn.Close()
}

type heldDialer struct{ held atomic.Bool }

func (d *heldDialer) Dial(network, address string) (net.Conn, error) {
	c, err := net.Dial(network, address)
	if err != nil {
		return nil, err
	}
	return &heldConn{Conn: c, held: &d.held, closed: make(chan struct{})}, nil
}

func TestStore_ClosedAfterSending(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	other, name := openLog(t, c)
	d := &heldDialer{}
	conn, err := client.Connect(c.URL(), client.SetCustomDialer(d), client.MaxReconnects(-1), client.ReconnectBufSize(-1))
	require.NoError(t, err)
	defer conn.Close()
	store, err := OpenConn(t.Context(), conn, Stream(name), quiet(), opening, Patience(time.Second))
	require.NoError(t, err)
	defer store.Close()
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	d.held.Store(true)
	p := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.Eventually(t, func() bool { h, err := other.Head(t.Context()); return err == nil && h == 2 }, time.Minute, time.Millisecond)
	conn.Close()
	_, err = p.Result()
	t.Logf("%v", err)
	require.ErrorIs(t, err, eventstore.ErrOutcomeUnknown, "it was written")
}

func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func TestStore_SubscribeOnClosedConnection(t *testing.T) {
	c := shared.get(t, 1)
	conn, err := c.Connect()
	require.NoError(t, err)
	store, err := OpenConn(t.Context(), conn, Stream(newName()), quiet(), opening, Patience(200*time.Millisecond))
	require.NoError(t, err)
	defer store.Close()
	conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	before := cpu()
	var ended error
	for _, err := range store.Subscribe(ctx, eventstore.All(), 0) {
		ended = err
	}
	t.Logf("%v after %s of cpu, %d goroutines", ended, cpu()-before, runtime.NumGoroutine())
	require.Less(t, cpu()-before, 500*time.Millisecond)
}

// A stream that has lost its beginning.
func TestStore_LongStreamWithHole(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	for _, n := range []int{100, longStream + 52} {
		store, name := openLog(t, c)
		ann := account("ann")
		for left := n; left > 0; left -= min(left, 500) {
			_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, min(left, 500))})
			require.NoError(t, err)
		}
		s, err := store.js.Stream(t.Context(), name)
		require.NoError(t, err)
		config := s.CachedInfo().Config
		config.MaxMsgsPerSubject = int64(n) - 10
		_, err = store.js.UpdateStream(t.Context(), config)
		require.NoError(t, err)
		var first uint64
		var failed error
		got := 0
		for e, err := range store.Read(t.Context(), eventstore.OneStream(ann), eventstore.ReadOptions{}) {
			if err != nil {
				failed = err
				break
			}
			if got++; got == 1 {
				first = e.Version
			}
		}
		if !errors.Is(failed, eventstore.ErrGap) {
			t.Errorf("%d events: %d read, the first one has version %d, error %v", n, got, first, failed)
		}
	}
}

func TestStore_BadURL(t *testing.T) {
	t.Parallel()
	_, err := Open(t.Context(), "nats://app:secret@[bad:4222")
	t.Log(err)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.NotContains(t, fmt.Sprint(err), "secret")
}
