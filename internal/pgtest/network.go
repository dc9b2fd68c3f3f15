package pgtest

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

// Network is the way from clients to a server, in the hands of a test: see
// [Proxy]. Its methods may be called from any goroutine, in any state.
type Network struct {
	url      string
	listener net.Listener
	network  string // where the server is
	address  string
	ctx      context.Context // ends with the test
	cancel   context.CancelFunc
	running  sync.WaitGroup

	mu      sync.Mutex
	wires   map[*wire]struct{}
	refuse  bool
	resumed chan struct{} // closed by Resume; nil while bytes pass
	limit   *limit        // nil if there is none
	sent    int64
	held    int64
}

// limit is what CutAfter asked for.
type limit struct {
	left int64
	cut  chan struct{}
}

// Proxy puts a network between the test and db's server, which passes everything
// on until it is told otherwise. It ends with the test.
func Proxy(t testing.TB, db string) *Network {
	t.Helper()
	u := parse(t, db)
	config, err := pgconn.ParseConfig(db)
	if err != nil {
		t.Fatalf("find the server of %s: %v", u.Redacted(), err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("listen for clients of %s: %v", u.Redacted(), err)
	}
	n := &Network{
		url:      withHost(u, listener.Addr().String(), nil),
		listener: listener,
		wires:    map[*wire]struct{}{},
	}
	n.network, n.address = pgconn.NetworkAddress(config.Host, config.Port)
	n.ctx, n.cancel = context.WithCancel(context.WithoutCancel(t.Context()))
	n.running.Go(n.accept)
	t.Cleanup(func() {
		n.cancel()
		_ = n.listener.Close()
		n.Cut()
		n.running.Wait()
	})
	return n
}

// URL returns the URL of the database through the network.
func (n *Network) URL() string { return n.url }

// Cut breaks all connections now, as when a cable is pulled and both ends notice:
// bytes on their way are lost, and both ends get an error. New connections pass.
func (n *Network) Cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for w := range n.wires {
		w.sever()
	}
}

// CutAfter lets n more bytes pass from clients to the server, counted over all
// connections, and then breaks the connection that carried the last of them. The
// server gets every byte up to there and nothing after, not even a broken
// connection to fail on: it answers all it was asked. The client gets no byte of
// the answer to the last of them, only an error. With n = 0 it is the next byte that does not
// arrive.
//
// This happens once; the channel is closed when it does. A negative n, like the
// next call, calls it off.
func (n *Network) CutAfter(bytes int64) (cut <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	done := make(chan struct{})
	n.limit = &limit{left: bytes, cut: done}
	if bytes < 0 {
		n.limit = nil
	}
	return done
}

// Sent returns how many bytes have been passed from clients to the server, over
// all connections since the beginning.
func (n *Network) Sent() int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sent
}

// Pause holds all bytes, in both directions, without either end noticing:
// connections stay up, and new ones are taken, but hear nothing. What is being
// passed at the moment of the call may still arrive.
func (n *Network) Pause() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.resumed == nil {
		n.resumed = make(chan struct{})
	}
}

// Resume passes on what was held, in order, and everything after.
func (n *Network) Resume() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.resumed != nil {
		close(n.resumed)
		n.resumed = nil
	}
}

// Held returns how many bytes for the server are held by Pause now. Clients can
// have sent more: those that still lie in the system's buffers.
func (n *Network) Held() int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.held
}

// Refuse says whether new connections are broken at once. Others are left alone.
func (n *Network) Refuse(refuse bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refuse = refuse
}

func (n *Network) accept() {
	for {
		client, err := n.listener.Accept()
		if err != nil {
			return // the test has ended
		}
		n.running.Go(func() { n.serve(client) })
	}
}

// serve lives as long as one client's connection.
func (n *Network) serve(client net.Conn) {
	w := &wire{client: client, halted: make(chan struct{})}
	w.ctx, w.cancel = context.WithCancel(n.ctx)
	if !n.add(w) {
		w.sever()
		return
	}
	defer n.remove(w)
	defer w.close()

	var dialer net.Dialer
	server, err := dialer.DialContext(w.ctx, n.network, n.address)
	if err != nil || !w.connect(server) {
		w.sever() // the client is not to take it for an answer
		return
	}
	var back sync.WaitGroup
	back.Go(func() { n.backward(w) })
	n.forward(w)
	back.Wait()
}

func (n *Network) add(w *wire) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.refuse || n.ctx.Err() != nil {
		return false
	}
	n.wires[w] = struct{}{}
	return true
}

func (n *Network) remove(w *wire) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.wires, w)
}

// forward passes bytes from the client to the server.
func (n *Network) forward(w *wire) {
	buffer := make([]byte, 32<<10)
	for {
		count, err := w.client.Read(buffer)
		for rest := buffer[:count]; len(rest) > 0; {
			if !n.pass(w, &n.held, len(rest)) {
				return
			}
			allowed, cut := n.take(len(rest))
			if cut != nil {
				w.halt() // first: the answer can be quick
			}
			if _, err := w.server.Write(rest[:allowed]); err != nil {
				w.sever()
			}
			if cut != nil {
				closeWrite(w.server)
				close(cut)
			}
			if cut != nil || w.ctx.Err() != nil {
				return
			}
			rest = rest[allowed:]
		}
		switch {
		case errors.Is(err, io.EOF):
			if n.pass(w, nil, 0) {
				closeWrite(w.server)
			}
			return
		case err != nil:
			w.sever()
			return
		}
	}
}

// backward passes bytes from the server to the client.
func (n *Network) backward(w *wire) {
	buffer := make([]byte, 32<<10)
	for {
		count, err := w.server.Read(buffer)
		if count > 0 {
			if !n.pass(w, nil, 0) {
				return
			}
			// After the cut of CutAfter the server still wants to be listened to.
			if _, err := w.client.Write(buffer[:count]); err != nil && !w.isHalted() {
				w.sever()
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			if n.pass(w, nil, 0) {
				closeWrite(w.client)
			}
			return
		case err != nil:
			w.sever()
			return
		}
	}
}

// pass returns true when bytes may pass, and false when the connection is cut. It
// counts them in held meanwhile.
func (n *Network) pass(w *wire, held *int64, count int) bool {
	for {
		n.mu.Lock()
		resumed := n.resumed
		if resumed == nil {
			n.mu.Unlock()
			return w.ctx.Err() == nil
		}
		if held != nil {
			*held += int64(count)
		}
		n.mu.Unlock()

		passing, halted := true, false
		select {
		case <-resumed:
		case <-w.halted:
			halted = true
		case <-w.ctx.Done():
			passing = false
		}
		if held != nil {
			n.mu.Lock()
			*held -= int64(count)
			n.mu.Unlock()
		}
		if halted || !passing {
			return passing
		}
	}
}

// take returns how many of the client's bytes may go on to the server, and the
// channel to close if the connection is to be cut after them.
func (n *Network) take(count int) (allowed int, cut chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.limit != nil {
		allowed := min(int64(count), n.limit.left)
		count = int(allowed)
		n.limit.left -= allowed
		if n.limit.left == 0 {
			cut = n.limit.cut
			n.limit = nil
		}
	}
	n.sent += int64(count)
	return count, cut
}

// wire is one client's connection and what it goes on to.
type wire struct {
	client net.Conn
	server net.Conn // written by connect, under mu; read by others after it
	ctx    context.Context
	cancel context.CancelFunc
	halted chan struct{} // closed when only the server's side is left

	mu sync.Mutex
}

// connect adds the server's side, unless the wire was cut meanwhile.
func (w *wire) connect(server net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ctx.Err() != nil {
		reset(server)
		return false
	}
	w.server = server
	return true
}

// sever breaks both sides. Repeating it is fine.
func (w *wire) sever() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cancel()
	reset(w.client)
	if w.server != nil {
		reset(w.server)
	}
}

// close ends what the two ends have ended, or sever has broken.
func (w *wire) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cancel()
	_ = w.client.Close()
	if w.server != nil {
		_ = w.server.Close()
	}
}

// halt breaks the client's side only.
func (w *wire) halt() {
	close(w.halted)
	reset(w.client)
}

func (w *wire) isHalted() bool {
	select {
	case <-w.halted:
		return true
	default:
		return false
	}
}

// reset closes a connection so that the other end gets an error, not an end.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails if it is closed already
	}
	_ = conn.Close()
}

// closeWrite ends one direction of a connection. If that fails, the connection is
// broken, which whoever reads from it gets to know.
func closeWrite(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}
