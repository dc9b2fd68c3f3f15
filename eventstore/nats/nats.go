package nats

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/deed-go/deed/eventstore"
)

// Store is an event store in one JetStream stream. All methods may be called
// concurrently. Close it.
type Store struct {
	settings settings
	conn     *client.Conn
	ownConn  bool
	js       jetstream.JetStream
	subjects subjects
	logID    string
	created  time.Time // when the stream was made
	now      func() time.Time
	replicas atomic.Int32
	known    atomic.Uint64 // the highest sequence this process knows to be stored
	newest   newest
	// The connection's own answers wait while it writes.
	payload   atomic.Int64 // the largest message: the server's max_payload or the stream's max_msg_size
	connected atomic.Bool
	changes   atomic.Uint64 // of the connection's state

	guard     guard
	heads     heads
	scheduler scheduler
	follower  follower
	pipe      pipe

	closing   chan struct{} // closed when Close begins
	base      context.Context
	stop      context.CancelFunc // ends base
	writing   sync.WaitGroup     // the scheduler and what it started
	work      sync.WaitGroup     // the other goroutines of the store
	calls     sync.WaitGroup     // requests of reads that run
	callsMu   sync.RWMutex       // held for reading to add to calls
	closeOnce sync.Once
}

var (
	_ eventstore.Store      = (*Store)(nil)
	_ eventstore.Enqueuer   = (*Store)(nil)
	_ eventstore.Identified = (*Store)(nil)
	_ io.Closer             = (*Store)(nil)
)

// Option is a setting of [URL], [Open] and [OpenConn].
type Option func(*settings) error

type settings struct {
	stream     string
	replicas   int
	create     bool
	patience   time.Duration
	tailEvents int
	tailBytes  int
	now        func() time.Time
	logger     *slog.Logger
	system     *client.Conn

	// For tests.
	opening     time.Duration            // for how long at least it tries to open
	attempt     time.Duration            // how long one request may take before it is asked what became of it
	grouping    int                      // from how many waiting commits on they share a batch; 0: by replicas
	hold        func() bool              // nothing is taken out of what waits while it is true
	sending     func([]*client.Msg)      // called before messages are sent
	swallow     func([]*client.Msg) bool // makes messages get lost on their way, or late
	dropReply   func() bool              // makes an answer get lost
	reply       func([]byte) []byte      // makes another server answer first
	copies      func() int               // how often an answer to a load arrives
	tamper      func(*client.Msg)        // changes an answer to a load
	following   func()                   // called when the log has been looked at, before it is followed
	stale       func(*getRequest) bool   // makes a leader of yesterday answer, who has none of what is asked for
	headsMost   int
	windowBytes int           // of events that a backward read holds
	streamBytes int           // of events that a forward read of one stream holds
	lookEvery   time.Duration // how often the stream's settings are looked at
}

// DefaultStream is the JetStream stream of a log unless [Stream] says otherwise.
const DefaultStream = "deed"

func defaults() settings {
	return settings{
		stream: DefaultStream, replicas: 0, create: true, patience: 30 * time.Second,
		tailEvents: 8192, tailBytes: 16 << 20, now: time.Now, logger: slog.Default(),
		attempt: 3 * time.Second, headsMost: 1 << 16, lookEvery: lookEvery, windowBytes: 4 << 20, streamBytes: 32 << 20,
	}
}

var streamName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// Stream names the JetStream stream that holds the log; "deed" by default. Its
// subjects begin with the same name. One server can hold many logs.
func Stream(name string) Option {
	return func(s *settings) error {
		if !streamName.MatchString(name) {
			return fmt.Errorf("%w: the stream %q: use 1 to 64 ASCII letters, digits, '_' and '-'", eventstore.ErrInvalid, name)
		}
		s.stream = name
		return nil
	}
}

// Replicas is on how many servers the log is kept, 1 to 5; 1 by default. It
// counts when the stream is made. One that exists keeps what it has, and
// opening it fails when it has fewer than were asked for.
func Replicas(n int) Option {
	return func(s *settings) error {
		if n < 1 || n > 5 {
			return fmt.Errorf("%w: %d replicas: use 1 to 5, best 1 or 3", eventstore.ErrInvalid, n)
		}
		s.replicas = n
		return nil
	}
}

// WithoutCreation makes opening fail when the stream does not exist: for
// programs that may not make streams. See [Config] for how to make it.
func WithoutCreation() Option {
	return func(s *settings) error { s.create = false; return nil }
}

// Patience is how long calls wait for a server that does not answer before they
// fail with eventstore.ErrUnavailable, or eventstore.ErrOutcomeUnknown where
// that is so; 30 seconds by default. Subscriptions wait until it is back.
func Patience(d time.Duration) Option {
	return func(s *settings) error {
		if d <= 0 {
			return fmt.Errorf("%w: a patience of %s: it must be positive", eventstore.ErrInvalid, d)
		}
		s.patience = d
		return nil
	}
}

// Tail bounds what is kept in memory of the latest events: by default 8,192
// events and 16 MiB of data. Subscribers who are no further behind never read
// from the server; one consumer serves all of them.
func Tail(events, bytes int) Option {
	return func(s *settings) error {
		if events < 1 || bytes < 1 {
			return fmt.Errorf("%w: a tail of %d events and %d bytes: both must be positive", eventstore.ErrInvalid, events, bytes)
		}
		s.tailEvents, s.tailBytes = events, bytes
		return nil
	}
}

// Now sets the clock that dates events without a time; time.Now by default.
func Now(now func() time.Time) Option {
	return func(s *settings) error {
		if now == nil {
			return fmt.Errorf("%w: the clock is nil", eventstore.ErrInvalid)
		}
		s.now = now
		return nil
	}
}

// Logger is told once, when the log is opened, that the server does not sync
// every write or does not say whether it does; slog.Default() by default.
func Logger(l *slog.Logger) Option {
	return func(s *settings) error {
		if l == nil {
			return fmt.Errorf("%w: the logger is nil", eventstore.ErrInvalid)
		}
		s.logger = l
		return nil
	}
}

// SystemConn is a connection of a user of the system account, over which the
// servers are asked whether they sync every write. It is not closed.
func SystemConn(conn *client.Conn) Option {
	return func(s *settings) error {
		if conn == nil {
			return fmt.Errorf("%w: the system connection is nil", eventstore.ErrInvalid)
		}
		s.system = conn
		return nil
	}
}

// URL returns what opens the log when an application starts; see [Open].
func URL(url string, options ...Option) eventstore.Opener {
	return opener(func(ctx context.Context) (eventstore.Store, error) { return Open(ctx, url, options...) })
}

// Conn returns what opens the log over the connection when an application
// starts; see [OpenConn].
func Conn(conn *client.Conn, options ...Option) eventstore.Opener {
	return opener(func(ctx context.Context) (eventstore.Store, error) { return OpenConn(ctx, conn, options...) })
}

type opener func(context.Context) (eventstore.Store, error)

func (o opener) Open(ctx context.Context) (eventstore.Store, error) { return o(ctx) }

// Open connects to the servers and makes the stream if it does not exist. The
// URL is one that nats.go understands, or several joined by commas; of the last
// one the query can name the stream and the replicas, which options overrule:
//
//	nats://app:secret@one:4222,nats://app:secret@two:4222/?stream=orders&replicas=3
//
// The context is for opening only.
//
// Errors: eventstore.ErrInvalid for a URL that cannot be parsed, for servers
// before 2.12, and for a stream with settings that lose events, which are named;
// eventstore.ErrUnavailable when no server can be reached.
func Open(ctx context.Context, address string, options ...Option) (*Store, error) {
	servers, fromURL, err := parseURL(address)
	if err != nil {
		return nil, err
	}
	set, err := gather(append(fromURL, options...))
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	conn, err := client.Connect(servers, client.Name("deed "+set.stream), client.MaxReconnects(-1),
		client.ReconnectWait(100*time.Millisecond), client.ReconnectJitter(100*time.Millisecond, 100*time.Millisecond),
		client.ReconnectBufSize(-1), // what cannot be sent now must not be sent later
		client.PingInterval(5*time.Second), client.MaxPingsOutstanding(2), client.Timeout(5*time.Second),
		client.ErrorHandler(func(*client.Conn, *client.Subscription, error) {}))
	if wrong, ok := errors.AsType[*url.Error](err); ok { // which quotes the URL, password and all
		return nil, fmt.Errorf("%w: the NATS URL cannot be parsed: %w", eventstore.ErrInvalid, wrong.Err)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w: %w", redacted(servers), eventstore.ErrUnavailable, err)
	}
	s, err := open(ctx, conn, set)
	if err != nil {
		conn.Close()
		return nil, err
	}
	s.ownConn = true
	return s, nil
}

// OpenConn is Open over a connection of the program's own, which is not closed
// by [Store.Close]. It should reconnect for ever (nats.MaxReconnects(-1)) and
// not keep what it cannot send (nats.ReconnectBufSize(-1)).
func OpenConn(ctx context.Context, conn *client.Conn, options ...Option) (*Store, error) {
	set, err := gather(options)
	if err != nil {
		return nil, err
	}
	if conn == nil {
		return nil, fmt.Errorf("%w: the connection is nil", eventstore.ErrInvalid)
	}
	return open(ctx, conn, set)
}

func gather(options []Option) (settings, error) {
	set := defaults()
	var mistakes []error
	for _, option := range options {
		if err := option(&set); err != nil {
			mistakes = append(mistakes, err)
		}
	}
	return set, errors.Join(mistakes...)
}

// parseURL takes our own parameters out of the query.
func parseURL(address string) (string, []Option, error) {
	if address == "" {
		return "", nil, fmt.Errorf("%w: the NATS URL is empty: use, for example, nats://host:4222", eventstore.ErrInvalid)
	}
	bare, query := address, ""
	for i := range len(address) {
		if address[i] == '?' {
			bare, query = address[:i], address[i+1:]
			break
		}
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return "", nil, fmt.Errorf("%w: the query %q of the NATS URL: %w", eventstore.ErrInvalid, query, err)
	}
	var options []Option
	for name, given := range values {
		value := given[len(given)-1]
		switch name {
		case "stream":
			options = append(options, Stream(value))
		case "replicas":
			n, err := strconv.Atoi(value)
			if err != nil {
				return "", nil, fmt.Errorf("%w: replicas=%q in the NATS URL is no number", eventstore.ErrInvalid, value)
			}
			options = append(options, Replicas(n))
		default:
			return "", nil, fmt.Errorf("%w: %q in the query of the NATS URL: use stream and replicas", eventstore.ErrInvalid, name)
		}
	}
	for len(bare) > 0 && bare[len(bare)-1] == '/' {
		bare = bare[:len(bare)-1]
	}
	return bare, options, nil
}

// redacted hides passwords.
func redacted(servers string) string {
	if u, err := url.Parse(servers); err == nil {
		return u.Redacted()
	}
	return "NATS"
}

func open(ctx context.Context, conn *client.Conn, set settings) (*Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	js, err := jetstream.New(conn)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", eventstore.ErrInvalid, err)
	}
	s := &Store{
		settings: set, conn: conn, js: js, subjects: subjects{set.stream}, now: set.now,
		closing: make(chan struct{}),
	}
	s.heads.init(set.headsMost)
	s.base, s.stop = context.WithCancel(context.Background())
	s.scheduler.init(s)
	s.follower.store = s
	once, cancel := context.WithTimeout(ctx, max(set.patience, set.opening))
	defer cancel()
	if err := s.prepare(once); err != nil {
		s.stop()
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", ctx.Err(), err)
		}
		return nil, fmt.Errorf("open stream %q: %w", set.stream, err)
	}
	s.watch()
	s.work.Go(s.look)
	s.writing.Go(s.scheduler.run)
	return s, nil
}

// watch follows the state of the connection.
func (s *Store) watch() {
	changed := s.conn.StatusChanged()
	s.connected.Store(s.conn.IsConnected())
	s.work.Go(func() {
		for {
			select {
			case _, open := <-changed:
				s.changes.Add(1)
				s.connected.Store(s.conn.IsConnected())
				if !open {
					return
				}
			case <-s.base.Done():
				s.conn.RemoveStatusListener(changed)
				return
			}
		}
	})
}

// allowance is what is set aside for tags, metadata and the rest in the largest message.
const allowance = 64 << 10

// smallestMessage is the least that max_payload and max_msg_size must allow.
const smallestMessage = 2 * allowance

// Limits returns what one commit and one event may have. They depend on the
// server's max_payload and the stream's max_msg_size: with the default, 1 MiB,
// an event may have 960 KiB, its tags and metadata included.
func (s *Store) Limits() eventstore.Limits {
	limits := eventstore.DefaultLimits()
	if most := s.payload.Load(); most > 0 {
		limits.EventBytes = max(min(limits.EventBytes, int(most)-allowance), 1)
	}
	return limits
}

// Close refuses further calls, finishes what is being written and ends
// subscriptions with eventstore.ErrClosed. Closing again returns the same.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.callsMu.Lock()
		close(s.closing) // from here on nobody enters
		s.callsMu.Unlock()
		s.scheduler.close()
		s.follower.close()
		s.writing.Wait()
		s.calls.Wait()
		s.pipe.close()
		s.stop()
		s.work.Wait()
		if s.ownConn {
			s.conn.Close()
		}
	})
	return nil
}

// enter admits a call that Close waits for; leave must follow.
func (s *Store) enter(ctx context.Context) error {
	s.callsMu.RLock()
	defer s.callsMu.RUnlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.closed() {
		return eventstore.ErrClosed
	}
	s.calls.Add(1)
	return nil
}

func (s *Store) leave() { s.calls.Done() }

func (s *Store) closed() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// LogID returns the id the log was given when the stream was made.
func (s *Store) LogID(context.Context) (string, error) { return s.logID, nil }

// Shared says that other processes may use the same stream.
func (s *Store) Shared() bool { return true }

// Head implements eventstore.Store: it asks the server, since other processes
// append too.
func (s *Store) Head(ctx context.Context) (eventstore.Position, error) {
	if err := s.enter(ctx); err != nil {
		return 0, err
	}
	defer s.leave()
	return s.head(ctx)
}

func (s *Store) head(ctx context.Context) (eventstore.Position, error) {
	m, err := s.last(ctx, ">")
	if err != nil || m == nil {
		return 0, err
	}
	return m.Position, nil
}

// saw notes that the sequence is stored.
func (s *Store) saw(sequence uint64) {
	for {
		known := s.known.Load()
		if sequence <= known || s.known.CompareAndSwap(known, sequence) {
			return
		}
	}
}
