package natsserver

import (
	"fmt"
	"io"
	"net"
	"regexp"
	"sync"
)

// gate is where the other nodes reach a node. It learns who comes from the
// first bytes, in which a node names itself.
type gate struct {
	own      string
	listener net.Listener
	running  sync.WaitGroup

	mu     sync.Mutex
	closed bool
	target string          // "" while the node is down
	shutTo map[string]bool // names of nodes; "" for all
	wires  map[*wire]struct{}
}

type wire struct {
	from        string // "" until known
	dialer, far net.Conn
}

func newGate(own string) (*gate, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the routes of %s: %w", own, err)
	}
	g := &gate{own: own, listener: listener, shutTo: map[string]bool{}, wires: map[*wire]struct{}{}}
	g.running.Go(g.accept)
	return g, nil
}

// lead says where the node listens; "" while it does not.
func (g *gate) lead(to string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.target = to
}

func (g *gate) address() string { return g.listener.Addr().String() }

func (g *gate) accept() {
	for {
		conn, err := g.listener.Accept()
		if err != nil {
			return
		}
		g.running.Go(func() { g.carry(conn) })
	}
}

func (g *gate) carry(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	g.mu.Lock()
	target := g.target
	g.mu.Unlock()
	if target == "" {
		return
	}
	far, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer func() { _ = far.Close() }()
	w := &wire{dialer: conn, far: far}
	g.mu.Lock()
	if g.closed || g.shutTo[""] {
		g.mu.Unlock()
		return
	}
	g.wires[w] = struct{}{}
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		delete(g.wires, w)
		g.mu.Unlock()
	}()
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(conn, far)
		_ = conn.Close()
	})
	g.forth(w)
	_ = far.Close()
	back.Wait()
}

var name = regexp.MustCompile(`"(?:server_)?name":"(node-\d+)"`)

// forth carries what the dialer sends, and stops it when it is shut out.
func (g *gate) forth(w *wire) {
	buffer, seen := make([]byte, 32<<10), []byte(nil)
	for {
		n, err := w.dialer.Read(buffer)
		if n > 0 && w.from == "" {
			seen = append(seen, buffer[:n]...)
			if found := name.FindSubmatch(seen); found != nil {
				g.mu.Lock()
				w.from = string(found[1])
				refused := g.shutTo[w.from]
				g.mu.Unlock()
				if refused {
					return
				}
				seen = nil
			}
		}
		if n > 0 {
			if _, err := w.far.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// shut breaks the connections of the named node, or all, and refuses new ones.
func (g *gate) shut(from string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shutTo[from] = true
	for w := range g.wires {
		if from == "" || w.from == from {
			_ = w.dialer.Close()
			_ = w.far.Close()
		}
	}
}

func (g *gate) open(from string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.shutTo, from)
}

func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	for w := range g.wires {
		_ = w.dialer.Close()
		_ = w.far.Close()
	}
	g.mu.Unlock()
	_ = g.listener.Close()
	g.running.Wait()
}
