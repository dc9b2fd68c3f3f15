package pgtest

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

func TestProxy_ServerIsReached(t *testing.T) {
	t.Parallel()
	db := Database(t)
	n := Proxy(t, db)
	direct, through := connect(t, db), connect(t, n.URL())
	pid := get[int](t, through, "SELECT pg_backend_pid()")
	require.Equal(t, get[string](t, direct, "SELECT current_database()"), get[string](t, through, "SELECT current_database()"))

	n.Cut()
	_, err := through.Exec(t.Context(), "SELECT 1")
	require.Error(t, err, "a connection survived the cut")
	require.Eventually(t, func() bool {
		return get[int](t, direct, "SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid) == 0
	}, patience, 10*time.Millisecond, "the server did not notice the cut")
	require.Equal(t, 1, get[int](t, connect(t, n.URL()), "SELECT 1"))
}

// TestProxy_CutAfterEveryByteOfACommit sweeps the cut over a commit: the
// transaction is there if, and only if, all of it had passed. The client never
// gets an answer.
func TestProxy_CutAfterEveryByteOfACommit(t *testing.T) {
	t.Parallel()
	db := Database(t)
	n := Proxy(t, db)
	direct := connect(t, db)
	do(t, direct, "CREATE TABLE sums (x int)")
	insert := func(conn *pgx.Conn, x int) error {
		_, err := conn.Exec(t.Context(), "INSERT INTO sums VALUES ($1)", pgx.QueryExecModeSimpleProtocol, x)
		return err
	}

	conn := connect(t, n.URL())
	before := n.Sent()
	require.NoError(t, insert(conn, 1000))
	size := n.Sent() - before
	require.Positive(t, size)
	for _, cutAt := range []int64{0, 1, size / 2, size - 1, size} {
		conn := connect(t, n.URL())
		pid := get[int](t, conn, "SELECT pg_backend_pid()")
		// A client whose connection has broken asks the server, on another one, to give
		// up what it is doing. That is not to pass.
		n.Refuse(true)
		cut := n.CutAfter(cutAt)
		require.Error(t, insert(conn, 2000), "cut at byte %d of %d", cutAt, size)
		<-cut
		<-conn.PgConn().CleanupDone()
		n.Refuse(false)
		// The server works on; that it has ended the session says it is done.
		require.Eventually(t, func() bool {
			return get[int](t, direct, "SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid) == 0
		}, patience, 10*time.Millisecond)
		want := 0
		if cutAt == size {
			want = 1
		}
		require.Equal(t, want, get[int](t, direct, "SELECT count(*) FROM sums WHERE x = 2000"), "cut at byte %d of %d", cutAt, size)
	}
	require.NoError(t, insert(conn, 1000), "a connection that was not cut is broken")
}

func TestProxy_Pause(t *testing.T) {
	t.Parallel()
	s := newEcho(t)
	n := Proxy(t, s.url())
	conn := dial(t, n)
	say(t, conn, "one")
	hear(t, conn, "one")

	n.Pause()
	n.Pause()
	late := dial(t, n) // new connections are taken, too
	_, err := conn.Write([]byte("two"))
	require.NoError(t, err)
	_, err = late.Write([]byte("three"))
	require.NoError(t, err)
	require.Eventually(t, func() bool { return n.Held() == 8 }, patience, time.Millisecond, "nothing is held")
	require.Equal(t, int64(3), n.Sent())
	require.Equal(t, "one", s.heard(), "the server hears what is held")

	n.Resume()
	n.Resume()
	hear(t, conn, "two")
	hear(t, late, "three")
	require.Zero(t, n.Held())

	// What is held can be cut, and then never arrives.
	n.Pause()
	_, err = conn.Write([]byte("lost"))
	require.NoError(t, err)
	require.Eventually(t, func() bool { return n.Held() == 4 }, patience, time.Millisecond, "nothing is held")
	n.Cut()
	broken(t, conn)
	n.Resume()
	say(t, dial(t, n), "four")
	require.NotContains(t, s.heard(), "lost")
}

// TestProxy_CutAfter: the server gets n bytes and may answer; the client gets an
// error; others are left alone.
func TestProxy_CutAfter(t *testing.T) {
	t.Parallel()
	s := newEcho(t)
	n := Proxy(t, s.url())
	one, two := dial(t, n), dial(t, n)
	say(t, one, "12345")
	hear(t, one, "12345")
	say(t, two, "..")
	hear(t, two, "..")

	called := n.CutAfter(3)
	n.CutAfter(-1)
	cut := n.CutAfter(7)
	say(t, two, "ab")
	hear(t, two, "ab")
	_, err := one.Write([]byte("6789012345"))
	require.NoError(t, err)
	<-cut
	broken(t, one)
	require.Equal(t, "12345..ab67890", <-s.ended, "the server heard something else when the connection ended")
	require.Equal(t, int64(14), n.Sent())

	say(t, two, "cd")
	hear(t, two, "cd")
	select {
	case <-called:
		t.Fatal("a cut that was called off happened")
	default:
	}
}

func TestProxy_Refuse(t *testing.T) {
	t.Parallel()
	s := newEcho(t)
	n := Proxy(t, s.url())
	before := dial(t, n)
	say(t, before, "a")
	hear(t, before, "a")
	n.Refuse(true)
	refused(t, n)
	say(t, before, "b")
	hear(t, before, "b")
	n.Refuse(false)
	after := dial(t, n)
	say(t, after, "c")
	hear(t, after, "c")

	// A client that has said everything still gets its answer.
	say(t, after, "d")
	require.NoError(t, after.CloseWrite())
	answer, err := io.ReadAll(after)
	require.NoError(t, err)
	require.Equal(t, "d", string(answer))
}

func TestProxy_ServerIsDown(t *testing.T) {
	t.Parallel()
	s := newEcho(t)
	n := Proxy(t, s.url())
	s.listener.Close()
	refused(t, n)
}

// echo is a server that says what it hears.
type echo struct {
	listener net.Listener
	ended    chan string // what all clients said, each time one ends

	mu   sync.Mutex
	said []byte
}

func newEcho(t *testing.T) *echo {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &echo{listener: listener, ended: make(chan string, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer context.AfterFunc(ctx, func() { conn.Close() })()
				s.serve(conn)
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		listener.Close()
		running.Wait()
	})
	return s
}

func (s *echo) serve(conn net.Conn) {
	defer conn.Close()
	buffer := make([]byte, 1024)
	for {
		count, err := conn.Read(buffer)
		s.mu.Lock()
		s.said = append(s.said, buffer[:count]...)
		s.mu.Unlock()
		if err != nil {
			if errors.Is(err, io.EOF) {
				s.ended <- s.heard()
			}
			return
		}
		if _, err := conn.Write(buffer[:count]); err != nil {
			return
		}
	}
}

func (s *echo) heard() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.said)
}

func (s *echo) url() string { return "postgres://nobody@" + s.listener.Addr().String() + "/none" }

func dial(t *testing.T, n *Network) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", n.listener.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

func say(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	_, err := conn.Write([]byte(text))
	require.NoError(t, err)
}

func hear(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience)))
	buffer := make([]byte, len(text))
	_, err := io.ReadFull(conn, buffer)
	require.NoError(t, err)
	require.Equal(t, text, string(buffer))
}

// refused says that a new connection is broken, which may be before it is made.
func refused(t *testing.T, n *Network) {
	t.Helper()
	conn, err := net.Dial("tcp", n.listener.Addr().String())
	if err != nil {
		require.ErrorIs(t, err, syscall.ECONNRESET)
		return
	}
	defer conn.Close()
	broken(t, conn)
}

// broken says that the connection ends with an error, not as after a goodbye.
func broken(t *testing.T, conn net.Conn) {
	t.Helper()
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(patience/10)))
	_, err := conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
}
