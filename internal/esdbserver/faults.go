package esdbserver

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// Moment is when an append is cut off from its caller.
type Moment int

// The moments of an append.
const (
	// BeforeWritten: nothing gets written, and the caller does not hear of it.
	BeforeWritten Moment = iota + 1
	// AfterWritten: it is written, and the caller does not hear of it.
	AfterWritten
)

// faults is how the server is to misbehave. It outlives restarts.
type faults struct {
	mu      sync.Mutex
	refuse  bool
	delay   time.Duration
	leader  *endpoint
	cuts    map[Moment]int
	members []Member
	hook    func(context.Context, string) error
	// abort is closed and replaced to end all subscriptions, behind to tell them
	// that they fell behind.
	abort, behind chan struct{}
}

type endpoint struct {
	host string
	port int
}

func (f *faults) reset() {
	f.cuts = map[Moment]int{}
	f.abort, f.behind = make(chan struct{}), make(chan struct{})
}

// DropConnections cuts every connection now. New ones are accepted.
func (s *Server) DropConnections() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running != nil {
		s.running.listener.drop()
	}
}

// RefuseConnections cuts every connection, and each new one as soon as it was
// made, until it is called with false. For a port on which nothing listens see
// [Server.Down].
func (s *Server) RefuseConnections(refuse bool) {
	s.faults.mu.Lock()
	s.faults.refuse = refuse
	s.faults.mu.Unlock()
	if refuse {
		s.DropConnections()
	}
}

// Delay holds back every message of an answer for d; 0 ends it. What is asked
// for is done before.
func (s *Server) Delay(d time.Duration) {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	s.faults.delay = d
}

// FollowLeader makes the server refuse writes, and reads that ask for the leader,
// as one that follows the leader at host:port and does not forward. An empty host
// makes it the leader again.
func (s *Server) FollowLeader(host string, port int) {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	s.faults.leader = nil
	if host != "" {
		s.faults.leader = &endpoint{host, port}
	}
}

// CutAppends cuts the connections of the next n appends at the moment. An append
// that is refused is not cut after it was written.
func (s *Server) CutAppends(at Moment, n int) {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	s.faults.cuts[at] = n
}

// EndSubscriptions ends every open subscription as that of a consumer who is too
// slow: with the status Aborted.
func (s *Server) EndSubscriptions() {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	close(s.faults.abort)
	s.faults.abort = make(chan struct{})
}

// FallBehind tells every open subscription that it fell behind, and once it has
// everything that it caught up again.
func (s *Server) FallBehind() {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	close(s.faults.behind)
	s.faults.behind = make(chan struct{})
}

// Intercept calls f before anything else is done for a call, with the full name
// of its method, for example /event_store.client.streams.Streams/Append; what it
// returns is the answer unless it is nil. It may block as long as ctx lives. A nil
// f ends it.
func (s *Server) Intercept(f func(ctx context.Context, method string) error) {
	s.faults.mu.Lock()
	defer s.faults.mu.Unlock()
	s.faults.hook = f
}

// takeCut reports whether an append is to be cut at the moment.
func (f *faults) takeCut(at Moment) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cuts[at] <= 0 {
		return false
	}
	f.cuts[at]--
	return true
}

func (f *faults) signals() (abort, behind <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.abort, f.behind
}

func (f *faults) following() *endpoint {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.leader
}

func (f *faults) before(ctx context.Context, method string) error {
	f.mu.Lock()
	hook := f.hook
	f.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(ctx, method)
}

func (f *faults) wait(ctx context.Context) error {
	f.mu.Lock()
	delay := f.delay
	f.mu.Unlock()
	if delay <= 0 {
		return nil
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Server) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := s.faults.before(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	answer, err := handler(ctx, request)
	if waited := s.faults.wait(ctx); waited != nil {
		return nil, refuseFailed(waited)
	}
	return answer, err
}

func (s *Server) stream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := s.faults.before(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	d := &delayed{ServerStream: stream, faults: &s.faults}
	err := handler(server, d)
	if err != nil && !d.sent {
		if waited := s.faults.wait(stream.Context()); waited != nil {
			return refuseFailed(waited)
		}
	}
	return err
}

// delayed holds back messages.
type delayed struct {
	grpc.ServerStream
	faults *faults
	sent   bool
}

func (d *delayed) SendMsg(m any) error {
	d.sent = true
	if err := d.faults.wait(d.Context()); err != nil {
		return refuseFailed(err)
	}
	return d.ServerStream.SendMsg(m)
}

// cut closes the connection over which a call came.
func (n *node) cut(ctx context.Context) error {
	if p, ok := peer.FromContext(ctx); ok {
		n.listener.cut(p.Addr.String())
	}
	return status.Error(codes.Unavailable, "the connection was cut")
}

// listener knows its connections.
type listener struct {
	net.Listener
	faults *faults

	mu    sync.Mutex
	conns map[string]*conn
}

type conn struct {
	net.Conn
	listener *listener
	name     string
}

func newListener(l net.Listener, f *faults) *listener {
	return &listener{Listener: l, faults: f, conns: map[string]*conn{}}
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		accepted, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.faults.mu.Lock()
		refuse := l.faults.refuse
		if !refuse {
			c := &conn{Conn: accepted, listener: l, name: accepted.RemoteAddr().String()}
			l.mu.Lock()
			l.conns[c.name] = c
			l.mu.Unlock()
			accepted = c
		}
		l.faults.mu.Unlock()
		if !refuse {
			return accepted, nil
		}
		_ = accepted.Close()
	}
}

func (c *conn) Close() error {
	c.listener.mu.Lock()
	if c.listener.conns[c.name] == c {
		delete(c.listener.conns, c.name)
	}
	c.listener.mu.Unlock()
	return c.Conn.Close()
}

func (l *listener) drop() {
	l.mu.Lock()
	conns := l.conns
	l.conns = map[string]*conn{}
	l.mu.Unlock()
	for _, c := range conns {
		c.kill()
	}
}

func (l *listener) cut(name string) {
	l.mu.Lock()
	c := l.conns[name]
	l.mu.Unlock()
	if c != nil {
		c.kill()
	}
}

// kill resets the connection: the other side hears of it at once.
func (c *conn) kill() {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}
