package esdb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
	"github.com/deed-go/deed/eventstore/esdb/internal/eventstoredb"
)

// Store is an event store in an EventStoreDB database. All methods may be
// called concurrently. Close it.
type Store struct {
	settings settings
	driver   driver.Driver
	prefix   string // of the names of streams; empty, or "name:"
	marker   string // the stream that has the log's id
	logID    string
	limits   eventstore.Limits

	streams  *streams
	places   places
	tip      tip // the last event known
	follower *follower

	open  context.Context // ends when Close begins
	shut  context.CancelFunc
	base  context.Context // ends when what still runs is to be given up
	stop  context.CancelFunc
	mu    sync.Mutex // guards adding to calls
	calls sync.WaitGroup
	work  sync.WaitGroup // the follower
	once  sync.Once
	err   error // of Close
}

var (
	_ eventstore.Store      = (*Store)(nil)
	_ eventstore.Identified = (*Store)(nil)
	_ io.Closer             = (*Store)(nil)
)

// Option is a setting of [Open] and [URL].
type Option func(*settings) error

type settings struct {
	prefix      string
	patience    time.Duration
	appendBytes int
	tailEvents  int
	tailBytes   int
	now         func() time.Time
	log         *slog.Logger

	driver driver.Driver // for tests
	drain  time.Duration // how long Close waits for calls

	confirm time.Duration // how long the server may take to confirm a subscription
}

func defaults() settings {
	return settings{
		patience: 30 * time.Second, appendBytes: 1 << 20, tailEvents: 8192, tailBytes: 16 << 20, now: time.Now,
		drain: 3 * time.Second, confirm: attempt,
	}
}

var prefixes = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._]{0,63}$`)

// Prefix gives the log a name within the database: its streams are called
// "name:category-id". Logs of different names, and the one without a name, share
// nothing but the server. The name is 1 to 64 ASCII letters, digits, '.' and '_'
// and begins with a letter. By default the log has no name.
func Prefix(name string) Option {
	return func(s *settings) error {
		if !prefixes.MatchString(name) {
			return fmt.Errorf("%w: the prefix %q: use 1 to 64 ASCII letters, digits, '.' and '_', beginning with a letter", eventstore.ErrInvalid, name)
		}
		s.prefix = name
		return nil
	}
}

// Patience is how long calls wait for a server that cannot be reached before
// they fail with eventstore.ErrUnavailable; 30 seconds by default. Subscriptions
// wait until it is back.
func Patience(d time.Duration) Option {
	return func(s *settings) error {
		if d <= 0 {
			return fmt.Errorf("%w: a patience of %s: it must be positive", eventstore.ErrInvalid, d)
		}
		s.patience = d
		return nil
	}
}

// MaxAppend is what the server takes in one append (its setting
// MaxAppendSize), in bytes; 1 MiB by default, as the server's. Commits whose
// data, metadata and types are together larger are refused before they are
// sent. A single event may have 15/16 of it, and at most 1 MiB.
func MaxAppend(bytes int) Option {
	return func(s *settings) error {
		if bytes < 1<<12 {
			return fmt.Errorf("%w: appends of at most %d bytes: 4096 is the least", eventstore.ErrInvalid, bytes)
		}
		s.appendBytes = bytes
		return nil
	}
}

// Tail bounds what is kept in memory of the latest events: by default 8,192
// events and 16 MiB of data. It begins empty with the first subscription.
// Subscribers who are no further behind never read from the server.
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

// Logger receives what the client library says about its connections; by
// default nobody does. Errors are returned, never only logged.
func Logger(log *slog.Logger) Option {
	return func(s *settings) error {
		if log == nil {
			return fmt.Errorf("%w: the logger is nil", eventstore.ErrInvalid)
		}
		s.log = log
		return nil
	}
}

// URL returns what opens the log when an application starts; see [Open].
func URL(url string, options ...Option) eventstore.Opener {
	return opener(func(ctx context.Context) (eventstore.Store, error) { return Open(ctx, url, options...) })
}

type opener func(context.Context) (eventstore.Store, error)

func (o opener) Open(ctx context.Context) (eventstore.Store, error) { return o(ctx) }

// Open connects to the server and looks for the id of the log, or gives it one.
// The URL is a connection string of EventStoreDB's clients, for example
//
//	esdb://user:secret@host1:2113,host2:2113,host3:2113?tls=true
//	esdb://localhost:2113?tls=false
//
// Credentials are sent over TLS only. The context is for opening only.
//
// Errors: eventstore.ErrInvalid for a URL that cannot be parsed;
// eventstore.ErrUnavailable when the server cannot be reached.
func Open(ctx context.Context, url string, options ...Option) (*Store, error) {
	set := defaults()
	var mistakes []error
	for _, option := range options {
		if err := option(&set); err != nil {
			mistakes = append(mistakes, err)
		}
	}
	if err := errors.Join(mistakes...); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if set.driver == nil {
		d, err := eventstoredb.New(url, set.log)
		if err != nil {
			return nil, fmt.Errorf("%w: the URL of the database: %w", eventstore.ErrInvalid, err)
		}
		set.driver = d
	}
	s := newStore(set)
	var err error
	if s.logID, err = s.identify(ctx); err != nil {
		if ctx.Err() != nil {
			go func() { _ = s.Close() }() // the client may hang for some time
		} else {
			_ = s.Close()
		}
		return nil, fmt.Errorf("open the log: %w", err)
	}
	return s, nil
}

func newStore(set settings) *Store {
	s := &Store{settings: set, driver: set.driver, marker: "deed:log", limits: eventstore.DefaultLimits()}
	if set.prefix != "" {
		s.prefix = set.prefix + ":"
		s.marker += ":" + set.prefix
	}
	s.limits.EventBytes = min(s.limits.EventBytes, set.appendBytes/16*15)
	s.open, s.shut = context.WithCancel(context.Background())
	s.base, s.stop = context.WithCancel(context.Background())
	s.streams = newStreams()
	s.follower = newFollower(s)
	return s
}

// Close refuses further calls and ends subscriptions with eventstore.ErrClosed.
// What is being written is finished, for three seconds at most; then it is given
// up, with eventstore.ErrOutcomeUnknown where it may have been written. A client
// that is still searching for its server is waited for, too, for as long as the
// connection string's gossipTimeout says (5 seconds by default). Closing again
// returns the same.
func (s *Store) Close() error {
	s.once.Do(func() {
		s.mu.Lock()
		s.shut()
		s.mu.Unlock()
		timer := time.AfterFunc(s.settings.drain, s.stop)
		s.calls.Wait()
		timer.Stop()
		s.stop()
		s.work.Wait()
		s.err = s.driver.Close()
	})
	return s.err
}

func (s *Store) closed() bool { return s.open.Err() != nil }

// enter admits a call that Close waits for; leave must follow.
func (s *Store) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed() {
		return eventstore.ErrClosed
	}
	s.calls.Add(1)
	return nil
}

func (s *Store) leave() { s.calls.Done() }

// within returns a context that ends with the store too.
func (s *Store) within(ctx context.Context) (context.Context, context.CancelFunc) {
	inner, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.base, func() { cancel(eventstore.ErrClosed) })
	return inner, func() { stop(); cancel(nil) }
}

// patient is within, and ends when the server has been waited for long enough.
func (s *Store) patient(ctx context.Context) (context.Context, context.CancelFunc) {
	inner, cancel := s.within(ctx)
	bounded, stop := context.WithTimeoutCause(inner, s.settings.patience, errPatience)
	return bounded, func() { stop(); cancel() }
}

// attempt bounds one call to a server that may have died without a word.
const attempt = 10 * time.Second

// trying calls fn until it succeeds, fails for good, or ctx ends, which comes
// from patient. Caller is the context whose end is the caller's own doing.
func (s *Store) trying(ctx, caller context.Context, what string, fn func(context.Context) error) error {
	for n := 0; ; n++ {
		once, stop := context.WithTimeout(ctx, attempt)
		err := fn(once)
		stop()
		if err == nil {
			return nil
		}
		if !again(ctx, err) || ctx.Err() != nil {
			return s.failure(caller, what, err)
		}
		pause(ctx, n)
	}
}

// pause waits a little longer each time, or for the end of ctx.
func pause(ctx context.Context, n int) {
	timer := time.NewTimer(min(2*time.Millisecond<<min(n, 10), 500*time.Millisecond))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// Shared says that other processes may use the same database.
func (s *Store) Shared() bool { return true }

// LogID returns the id that the log was given when it was first opened.
func (s *Store) LogID(context.Context) (string, error) { return s.logID, nil }

// markerType is the type of the event that holds the log's id.
const markerType = "deed.log"

// identify reads the id of the log, or writes one. Of several processes that do
// so at once, the first one wins.
func (s *Store) identify(caller context.Context) (string, error) {
	ctx, cancel := s.patient(caller)
	defer cancel()
	id := uuid.New()
	for n := 0; ; n++ {
		var found *driver.Recorded
		if err := s.trying(ctx, caller, "read the id of the log", func(ctx context.Context) (err error) {
			found, err = s.one(ctx, s.marker, driver.StreamFrom{Start: true, Leader: n > 0}, false)
			return err
		}); err != nil {
			return "", err
		}
		if found != nil {
			if found.Type != markerType || found.Revision != 0 || len(found.Data) == 0 {
				return "", fmt.Errorf("%w: the stream %q, which has the id of the log, was written by another program, truncated or deleted: %s", eventstore.ErrGap, s.marker, where(found))
			}
			return parseMarker(found.Data)
		}
		switch {
		case n == 0:
			continue // a node that lags does not know: now the leader is asked
		case ctx.Err() != nil:
			return "", s.failure(caller, "read the id of the log", fmt.Errorf("%w: the stream %q cannot be read although it was written", eventstore.ErrUnavailable, s.marker))
		case n > 1:
			pause(ctx, n)
		}
		event := driver.Event{ID: id, Type: markerType, JSON: true, Data: fmt.Appendf(nil, `{"id":%q}`, id)}
		err := s.trying(ctx, caller, "write the id of the log", func(ctx context.Context) error {
			_, err := s.driver.Append(ctx, s.marker, driver.NoStream, []driver.Event{event})
			if driver.KindOf(err) == driver.WrongVersion {
				return nil // another process was faster, or an earlier attempt
			}
			return err
		})
		if err != nil {
			return "", err
		}
	}
}

// one reads the one event at the place; nil where there is none.
func (s *Store) one(ctx context.Context, name string, from driver.StreamFrom, backward bool) (*driver.Recorded, error) {
	reader, err := s.driver.ReadStream(ctx, name, from, backward, 1)
	if err == nil {
		defer reader.Close()
		var r *driver.Recorded
		if r, err = reader.Next(ctx); err == nil {
			return r, nil
		}
	}
	switch {
	case driver.KindOf(err) == driver.NotFound:
		return nil, nil
	case !errors.Is(err, io.EOF):
		return nil, err
	case from.Start || from.End:
		return nil, errHidden(name)
	}
	return nil, nil
}

func (s *Store) name(stream eventstore.Stream) string { return s.prefix + stream.String() }
