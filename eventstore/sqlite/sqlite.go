package sqlite

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/groupcommit"
	"github.com/deed-go/deed/internal/tail"
	"github.com/deed-go/deed/projection"
)

// Store is an event store, and the state of background work, in one SQLite
// file. All methods may be called concurrently. Close it.
type Store struct {
	settings settings
	path     string
	lock     *lock
	logID    string
	limits   eventstore.Limits
	objects  int64 // of deed's in the file
	now      func() time.Time

	appends groupcommit.Queue[*entry]
	updates groupcommit.Queue[*update]
	wake    chan struct{} // holds a token while there may be work for the writer
	stopped chan struct{} // closed when the writer has ended
	closing chan struct{} // closed when Close begins

	tail   *tail.Tail
	kinds  atomic.Pointer[kinds]
	names  *lru.Cache[int64, eventstore.Stream]
	tables sync.Map // name -> id of the state's tables, committed ones only
	inline atomic.Pointer[[]*projection.Appends]
	pages  *pool // for reads of the log
	views  *pool // for View, whose functions may read the log

	closeOnce sync.Once
	closeErr  error
}

var (
	_ eventstore.Store      = (*Store)(nil)
	_ eventstore.Enqueuer   = (*Store)(nil)
	_ eventstore.Identified = (*Store)(nil)
	_ projection.State      = (*Store)(nil)
	_ io.Closer             = (*Store)(nil)
)

// Option is a setting of [Open] and [File].
type Option func(*settings) error

type settings struct {
	batchCommits int
	batchBytes   int
	tailEvents   int
	tailBytes    int
	readers      int
	viewers      int
	now          func() time.Time

	// For tests.
	vfs         string
	synchronous string // of appends
	checkpoint  int    // pages of the write-ahead log that bring about a checkpoint
	updateTime  time.Duration
	patience    time.Duration
	hold        func()      // called by the writer before it takes a batch
	locked      func()      // called by the writer when somebody else has the write lock
	steps       []Migration // the schema
}

func defaults() settings {
	return settings{
		batchCommits: 4096,
		batchBytes:   8 << 20,
		tailEvents:   8192,
		tailBytes:    16 << 20,
		readers:      4,
		viewers:      16,
		now:          time.Now,
		synchronous:  "FULL",
		checkpoint:   4000,
		updateTime:   defaultUpdateTime,
		patience:     defaultPatience,
		steps:        Migrations(),
	}
}

// Tail bounds what is kept in memory of the latest events: by default 8,192
// events and 16 MiB of data. It begins empty when the file is opened. Subscribers
// who are no further behind never read from the file.
func Tail(events, bytes int) Option {
	return func(s *settings) error {
		if events < 1 || bytes < 1 {
			return fmt.Errorf("%w: a tail of %d events and %d bytes: both must be positive", eventstore.ErrInvalid, events, bytes)
		}
		s.tailEvents, s.tailBytes = events, bytes
		return nil
	}
}

// Now sets the clock that dates events without a time and ends leases;
// time.Now by default.
func Now(now func() time.Time) Option {
	return func(s *settings) error {
		if now == nil {
			return fmt.Errorf("%w: the clock is nil", eventstore.ErrInvalid)
		}
		s.now = now
		return nil
	}
}

// File returns what opens the file when an application starts; see [Open].
func File(path string, options ...Option) eventstore.Opener {
	return file{path: path, options: options}
}

type file struct {
	path    string
	options []Option
}

func (f file) Open(ctx context.Context) (eventstore.Store, error) {
	return Open(ctx, f.path, f.options...)
}

// Open opens the file, or makes it; its folder must exist. The context is for
// opening only.
//
// Errors: eventstore.ErrInUse while another Store, of this or another process,
// has the file open; eventstore.ErrNewerVersion when a newer program has
// written it; eventstore.ErrInvalid for a file that is not deed's, or that has
// several names (hard links). None of them changes the file.
func Open(ctx context.Context, path string, options ...Option) (*Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	set := defaults()
	var mistakes []error
	for _, option := range options {
		if err := option(&set); err != nil {
			mistakes = append(mistakes, err)
		}
	}
	if path == "" {
		mistakes = append(mistakes, fmt.Errorf("%w: the path is empty: name a file", eventstore.ErrInvalid))
	}
	if len(mistakes) > 0 {
		return nil, errors.Join(mistakes...)
	}
	real, err := canonical(path)
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", path, err)
	}
	lock, err := acquire(real)
	if err != nil {
		return nil, err
	}
	s := &Store{
		settings: set, path: real, lock: lock, limits: eventstore.DefaultLimits(), now: set.now,
		wake: make(chan struct{}, 1), stopped: make(chan struct{}), closing: make(chan struct{}),
	}
	w, err := s.start()
	if err != nil {
		return nil, errors.Join(err, lock.release())
	}
	go w.run()
	return s, nil
}

// start prepares everything but the writer's goroutine.
func (s *Store) start() (*writer, error) {
	c, err := dial(s.path, s.settings.vfs)
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", s.path, err)
	}
	version, err := check(c, s.path, len(s.settings.steps))
	if err == nil {
		err = s.configureWriter(c)
	}
	if err == nil {
		err = migrate(c, s.settings.steps, version)
	}
	if err == nil {
		// Whoever held leases was a process that has ended.
		err = c.run("UPDATE deed_leases SET held = 0 WHERE held <> 0")
	}
	if err == nil {
		_, err = c.row("SELECT id FROM deed_log", func(row *statement) { s.logID = row.text(0) })
	}
	if err == nil {
		s.objects, err = ownObjects(c)
	}
	var head eventstore.Position
	var known *kinds
	if err == nil {
		head, known, err = position(c)
	}
	if err != nil {
		c.close()
		return nil, fmt.Errorf("open %q: %w", s.path, err)
	}
	s.kinds.Store(known)
	s.tail = tail.New(head, s.settings.tailEvents, s.settings.tailBytes)
	s.names, _ = lru.New[int64, eventstore.Stream](mostNames)
	s.pages = newPool(s.settings.readers, s.dialReader)
	s.views = newPool(s.settings.viewers, s.dialReader)
	s.appends.Wake, s.updates.Wake = s.signal, s.signal
	return newWriter(s, c, head, known), nil
}

// mostNames bounds the names of streams kept in memory for reads.
const mostNames = 65_536

// configureWriter sets up the one connection that writes.
func (s *Store) configureWriter(c *conn) error {
	if err := c.exec("PRAGMA wal_autocheckpoint = 0"); err != nil { // see writer.checkpoint
		return err
	}
	c.install()
	mode := ""
	if _, err := c.row("PRAGMA journal_mode = WAL", func(s *statement) { mode = s.text(0) }); err != nil {
		return err
	}
	if mode != "wal" {
		return fmt.Errorf("the file system does not support a write-ahead log (got %q): use a local disk", mode)
	}
	return c.exec(`
		PRAGMA synchronous = ` + s.settings.synchronous + `;
		PRAGMA busy_timeout = 0;
		PRAGMA journal_size_limit = 67108864;
		PRAGMA temp_store = MEMORY;
		PRAGMA cache_size = -65536;`)
}

func (s *Store) dialReader() (*conn, error) {
	c, err := dial(s.path, s.settings.vfs)
	if err != nil {
		return nil, fmt.Errorf("open a reader of %q: %w", s.path, err)
	}
	c.install()
	if err := c.exec("PRAGMA query_only = 1; PRAGMA busy_timeout = 0; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -8192; PRAGMA mmap_size = 268435456;"); err != nil {
		c.close()
		return nil, fmt.Errorf("open a reader of %q: %w", s.path, err)
	}
	return c, nil
}

// position reads the head and the kinds.
func position(c *conn) (eventstore.Position, *kinds, error) {
	head, err := c.number("SELECT max(position) FROM deed_events")
	if err != nil {
		return 0, nil, err
	}
	known := newKinds()
	s, err := c.prepare("SELECT id, category, type FROM deed_kinds")
	if err != nil {
		return 0, nil, err
	}
	defer s.reset()
	for {
		more, err := s.step()
		if err != nil {
			return 0, nil, err
		}
		if !more {
			return eventstore.Position(head), known, nil
		}
		known.add(s.int64(0), kind{category: s.text(1), eventType: s.text(2)})
	}
}

// signal tells the writer that there may be work.
func (s *Store) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Close refuses further calls, finishes what the writer has been given, ends
// subscriptions with eventstore.ErrClosed, and gives the file free. It waits
// for reads and views that are running. Closing again returns the same.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		close(s.closing)
		s.appends.Close()
		s.updates.Close()
		<-s.stopped
		s.tail.Close()
		s.pages.close()
		s.views.close()
		s.closeErr = s.lock.release()
	})
	return s.closeErr
}

func (s *Store) closed() bool {
	select {
	case <-s.closing:
		return true
	default:
		return false
	}
}

// LogID returns the id the log was given when the file was made.
func (s *Store) LogID(context.Context) (string, error) { return s.logID, nil }

// Head implements eventstore.Store.
func (s *Store) Head(ctx context.Context) (eventstore.Position, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if s.closed() {
		return 0, eventstore.ErrClosed
	}
	return s.tail.Head(), nil
}
