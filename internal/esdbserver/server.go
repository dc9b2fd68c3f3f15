package esdbserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/EventStore/EventStore-Client-Go/v4/protos/gossip"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/serverfeatures"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/streams"
	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/deed-go/deed/eventstore"
)

// Version is what the server calls itself.
const Version = "23.10.6"

// DefaultMaxAppendBytes is the largest sum of the data of one append's events.
const DefaultMaxAppendBytes = 1 << 20

// DefaultRecentWrites is how many of the latest events are recognised by their
// ids when an append expects any revision.
const DefaultRecentWrites = 1 << 20

// maxMessageBytes is what one gRPC message may have, as on the real server.
const maxMessageBytes = 17 << 20

type settings struct {
	address      string
	maxAppend    int
	recentWrites int
	now          func() time.Time
}

// Option changes what [Start] starts.
type Option func(*settings)

// Address is where to listen, host:port. Defaults to a free port of 127.0.0.1.
func Address(hostPort string) Option { return func(s *settings) { s.address = hostPort } }

// MaxAppendBytes replaces [DefaultMaxAppendBytes].
func MaxAppendBytes(n int) Option { return func(s *settings) { s.maxAppend = n } }

// RecentWrites replaces [DefaultRecentWrites]. A real server has a memory of a
// limited size too, and none of what was written before it was started: with 0 an
// append that expects any revision is never known as a repeat.
func RecentWrites(n int) Option { return func(s *settings) { s.recentWrites = n } }

// Clock replaces time.Now, which dates events and judges $maxAge.
func Clock(now func() time.Time) Option { return func(s *settings) { s.now = now } }

// Server is a running server. All methods may be called concurrently.
type Server struct {
	settings
	store  eventstore.Store
	faults faults

	mu      sync.Mutex // guards what follows, and orders Up, Down and Close
	running *node
	closed  bool
	// reserved keeps the port while the server is down.
	reserved *os.File
}

// node is a server from one start to the next stop, as a process would be.
type node struct {
	server   *Server
	log      *log
	grpc     *grpc.Server
	listener *listener
	writes   chan *write
	ctx      context.Context // ends when the node stops
	stop     context.CancelFunc
	done     sync.WaitGroup
}

// Start starts a server over the store, which stays the caller's and must stay
// open until the server is closed. A store without a log of the server gets the
// system events that every database begins with. Several servers may stand on one
// store at a time.
func Start(store eventstore.Store, options ...Option) (*Server, error) {
	s := &Server{store: store, settings: settings{
		address: "127.0.0.1:0", maxAppend: DefaultMaxAppendBytes, recentWrites: DefaultRecentWrites, now: time.Now,
	}}
	for _, o := range options {
		o(&s.settings)
	}
	s.faults.reset()
	if err := s.Up(); err != nil {
		return nil, err
	}
	return s, nil
}

// Up starts a server that is down again, on the port that it had, with nothing
// but what the store keeps. When it is up it does nothing.
func (s *Server) Up() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return errors.New("start the EventStoreDB server: it was closed")
	case s.running != nil:
		return nil
	}
	ctx, stop := context.WithCancel(context.Background())
	l := newLog(s.store, s.recentWrites, s.now)
	if err := l.change(ctx, l.begin); err != nil {
		stop()
		return fmt.Errorf("start the EventStoreDB server: %w", err)
	}
	l.forgetful = false
	socket, err := net.Listen("tcp", s.address)
	if err != nil {
		stop()
		return fmt.Errorf("start the EventStoreDB server: %w", err)
	}
	s.address = socket.Addr().String()
	if s.reserved != nil {
		_ = s.reserved.Close()
		s.reserved = nil
	}
	n := &node{server: s, log: l, listener: newListener(socket, &s.faults), writes: make(chan *write), ctx: ctx, stop: stop}
	n.grpc = grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxSendMsgSize(maxMessageBytes),
		grpc.WaitForHandlers(true),
		// Clients ping every ten seconds, also when nothing is going on.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	)
	streams.RegisterStreamsServer(n.grpc, &streamsService{node: n})
	gossip.RegisterGossipServer(n.grpc, &gossipService{node: n})
	serverfeatures.RegisterServerFeaturesServer(n.grpc, &featuresService{})
	n.done.Go(func() { runWriter(ctx, l, n.writes) })
	n.done.Go(func() { n.follow() })
	n.done.Go(func() { _ = n.grpc.Serve(n.listener) })
	s.running = n
	return nil
}

// Down stops the server at once, as if its process had been killed: connections
// are cut, and what was not answered is not answered. Calling it again does
// nothing.
func (s *Server) Down() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down()
}

func (s *Server) down() {
	n := s.running
	if n == nil {
		return
	}
	s.running = nil
	n.stop()
	address := n.listener.Addr()
	_ = n.listener.Close()
	s.reserved = reserve(address)
	n.listener.drop()
	n.grpc.Stop()
	n.done.Wait()
}

// Restart is Down and Up.
func (s *Server) Restart() error {
	s.Down()
	return s.Up()
}

// Close stops the server for good. The store stays open.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down()
	s.closed = true
	if s.reserved != nil {
		_ = s.reserved.Close()
		s.reserved = nil
	}
	return nil
}

// URL is what clients connect to, with or without the server being up.
func (s *Server) URL() string { return "esdb://" + s.Address() + "?tls=false" }

// Address is host:port.
func (s *Server) Address() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.address
}

// begin writes what a new database begins with.
func (l *log) begin() {
	if len(l.records) > 0 {
		return
	}
	at := ticks(l.now())
	for _, r := range []record{
		{stream: "$epoch-information", eventType: "$epoch-information", data: []byte(`{"epochNumber":0}`)},
		{stream: "$$$settings", eventType: typeMetadata, data: []byte(`{"$acl":{"$r":"$all"}}`)},
		{stream: "$settings", eventType: "$update", data: []byte(`{}`)},
	} {
		r.id, r.json, r.created = uuid.New(), true, at
		l.add(&r)
	}
}

// follow reads what other servers over the same store write.
func (n *node) follow() {
	n.log.mu.RLock()
	after := n.log.at
	n.log.mu.RUnlock()
	for batch, err := range n.log.store.Subscribe(n.ctx, eventstore.OneStream(logStream), after) {
		if err != nil {
			return // the node stops, or the store was closed: writes will tell
		}
		n.log.mu.Lock()
		if batch.Through > n.log.at && len(batch.Events) > 0 {
			err = n.log.catchUp(n.ctx)
		}
		n.log.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// do hands a change to the writer and waits for the outcome.
func (n *node) do(ctx context.Context, judge func(*log) outcome) (outcome, error) {
	w := &write{ctx: ctx, judge: judge, answer: make(chan answer, 1)}
	select {
	case n.writes <- w:
	case <-ctx.Done():
		return outcome{}, context.Cause(ctx)
	case <-n.ctx.Done():
		return outcome{}, errStopped
	}
	select {
	case a := <-w.answer:
		return a.outcome, a.err
	case <-n.ctx.Done():
		return outcome{}, errStopped
	}
}

var errStopped = errors.New("the server is stopping")
