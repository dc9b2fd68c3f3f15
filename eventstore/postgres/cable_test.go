package postgres

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// cable is the network between a store and its server, in the hands of a test.
// It sees what the committer sends, write by write, and decides what becomes of
// it. Other connections pass.
type cable struct {
	mu     sync.Mutex
	lines  []*line
	decide func(l *line, message []byte) fate
	refuse bool
	sent   int // bytes of the committer since it was last set to 0
}

// fate is what becomes of a message. The zero fate lets it pass.
type fate struct {
	cut bool
	// arrives are the bytes that reach the server before the connection breaks for
	// the client, which takes the message for sent and waits for an answer in vain.
	arrives int
	// late keeps the server's side open, so that the rest can arrive later.
	late bool
	// done breaks it for the client only when the server is done with the message.
	done bool
	// answers are the bytes of the answer that reach the client, where all arrives.
	answers int
}

// newCable returns a cable and a pool whose connections go through it.
func newCable(t testing.TB, url string) (*cable, *pgxpool.Pool) {
	t.Helper()
	c := &cable{}
	t.Cleanup(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, l := range c.lines {
			_ = l.Conn.Close()
			if l.lost {
				<-l.gone
			}
		}
	})
	p := pool(t, url, func(config *pgxpool.Config) {
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			c.mu.Lock()
			refused := c.refuse
			c.mu.Unlock()
			if refused {
				return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
			}
			var dialer net.Dialer
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			l := &line{Conn: conn, of: c, gone: make(chan struct{})}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.lines = append(c.lines, l)
			return l, nil
		}
	})
	return c, p
}

// onSend sets what decides about the committer's messages.
func (c *cable) onSend(decide func(l *line, message []byte) fate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.decide = decide
}

// setRefuse says whether new connections are refused.
func (c *cable) setRefuse(refuse bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuse = refuse
}

// measure returns how many bytes the committer has sent since the last call.
func (c *cable) measure() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.sent
	c.sent = 0
	return n
}

// settle waits until the server has nothing more to do for broken connections.
func (c *cable) settle() {
	c.mu.Lock()
	lines := append([]*line(nil), c.lines...)
	c.mu.Unlock()
	for _, l := range lines {
		l.mu.Lock()
		lost := l.lost
		l.mu.Unlock()
		if lost {
			<-l.gone
		}
	}
}

// line is one connection.
type line struct {
	net.Conn  // the server's side
	of        *cable
	committer bool // seen by its goroutine only

	mu      sync.Mutex
	lost    bool // for the client
	rest    []byte
	answers int // bytes of the answer that may still pass; -1: all
	cutting bool
	gone    chan struct{} // closed when the server has ended a lost one
}

// Only the committer asks these, and first of all.
var signatures = [][]byte{[]byte(" AS one (row)"), []byte("events WHERE position = $1")}

func (l *line) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost {
		return 0, syscall.ECONNRESET
	}
	for _, signature := range signatures {
		l.committer = l.committer || bytes.Contains(b, signature)
	}
	if !l.committer {
		return l.Conn.Write(b)
	}
	l.of.mu.Lock()
	decide := l.of.decide
	l.of.sent += len(b)
	l.of.mu.Unlock()
	var f fate
	if decide != nil {
		f = decide(l, b)
	}
	if !f.cut {
		return l.Conn.Write(b)
	}
	if n, err := l.Conn.Write(b[:f.arrives]); err != nil {
		return n, err
	}
	if f.answers > 0 {
		l.cutting, l.answers = true, f.answers
		return len(b), nil
	}
	l.rest = bytes.Clone(b[f.arrives:])
	l.lose()
	if !f.late {
		l.finish()
	}
	if f.done {
		<-l.gone
	}
	return len(b), nil
}

// lose breaks the connection for the client. The server's answers are read and
// thrown away.
func (l *line) lose() {
	l.lost = true
	_ = l.Conn.SetReadDeadline(time.Unix(1, 0)) // for whoever reads now
	go func() {
		defer close(l.gone)
		_ = l.Conn.SetReadDeadline(time.Time{})
		_, _ = io.Copy(io.Discard, l.Conn)
	}()
}

// finish says to the server that nothing more will come.
func (l *line) finish() { _ = l.Conn.(*net.TCPConn).CloseWrite() }

// deliver lets the rest of the cut message arrive after all, and returns when
// the server is done with it.
func (l *line) deliver() {
	l.mu.Lock()
	rest := l.rest
	l.mu.Unlock()
	_, _ = l.Conn.Write(rest)
	l.finish()
	<-l.gone
}

func (l *line) Read(b []byte) (int, error) {
	l.mu.Lock()
	lost, cutting, left := l.lost, l.cutting, l.answers
	l.mu.Unlock()
	if lost || cutting && left == 0 {
		return l.reset()
	}
	if cutting {
		b = b[:min(len(b), left)]
	}
	n, err := l.Conn.Read(b)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost {
		return 0, syscall.ECONNRESET
	}
	if l.cutting {
		// A read that had begun before the cut may bring more than may pass.
		n = min(n, l.answers)
		l.answers -= n
	}
	return n, err
}

// reset breaks the connection once the allowed part of an answer was read.
func (l *line) reset() (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.lost {
		l.lose()
		l.finish()
	}
	return 0, syscall.ECONNRESET
}

// What the client does to a line that it has lost must not reach the server.

func (l *line) unless(do func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost {
		return nil
	}
	return do()
}

func (l *line) Close() error { return l.unless(l.Conn.Close) }

func (l *line) SetDeadline(t time.Time) error {
	return l.unless(func() error { return l.Conn.SetDeadline(t) })
}

func (l *line) SetReadDeadline(t time.Time) error {
	return l.unless(func() error { return l.Conn.SetReadDeadline(t) })
}

func (l *line) SetWriteDeadline(t time.Time) error {
	return l.unless(func() error { return l.Conn.SetWriteDeadline(t) })
}
