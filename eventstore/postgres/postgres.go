package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/groupcommit"
	"github.com/deed-go/deed/internal/tail"
	"github.com/deed-go/deed/projection"
)

// Store is an event store, and the state of background work, in one schema of
// a PostgreSQL database. All methods may be called concurrently. Close it.
type Store struct {
	settings settings
	schema   string // quoted
	texts    texts
	config   *pgx.ConnConfig // of connections to the log
	logs     *pgxpool.Pool   // for reads of the log
	pool     *pgxpool.Pool   // for the state, and what the user does with it
	ownPool  bool
	logID    string
	lock     int64 // key of the advisory lock
	limits   eventstore.Limits
	now      func() time.Time

	appends  groupcommit.Queue[*entry]
	wake     chan struct{} // holds a token while there may be work for the committer
	closing  chan struct{} // closed when Close begins
	base     context.Context
	stop     context.CancelFunc // ends base
	writing  sync.WaitGroup     // the committer
	work     sync.WaitGroup     // the other goroutines of the store
	calls    sync.WaitGroup     // reads and updates that run
	callsMu  sync.RWMutex       // held for reading to add to calls
	kinds    atomic.Pointer[kinds]
	follower *follower
	notifier *notifier
	releases releases
	members  members
	inline   atomic.Pointer[[]*projection.Appends]
	tables   sync.Map // name -> id of the state's tables, committed ones only
	meter    *meter
	// commitMode is the synchronous_commit that appends ask for; "" for what the server says.
	commitMode string

	closeOnce sync.Once
}

var (
	_ eventstore.Store      = (*Store)(nil)
	_ eventstore.Enqueuer   = (*Store)(nil)
	_ eventstore.Identified = (*Store)(nil)
	_ projection.State      = (*Store)(nil)

	_ projection.CheckpointLister = (*Store)(nil)
	_ io.Closer                   = (*Store)(nil)
)

// Option is a setting of [Open], [OpenPool], [URL] and [Pool].
type Option func(*settings) error

type settings struct {
	schema            string
	pooled            bool
	synchronousCommit string
	migrate           bool
	readers           int32
	patience          time.Duration
	batchCommits      int
	batchBytes        int
	tailEvents        int
	tailBytes         int
	now               func() time.Time

	// For tests.
	forms    func(*batch) form // chooses how a batch is written
	hold     func()            // called by the committer before it takes a batch
	sent     func()            // called after a batch was sent and before its answer is read
	deaf     bool              // LISTEN is not used
	leaseTTL time.Duration     // how long a process lives without a heartbeat
	steps    []Migration
	unlocked bool // formCopy takes no lock, and the schema's functions have none
}

// DefaultSchema is where a log lives unless [Schema] says otherwise.
const DefaultSchema = "deed"

func defaults() settings {
	return settings{
		schema:       DefaultSchema,
		migrate:      true,
		readers:      8,
		patience:     30 * time.Second,
		batchCommits: 4096,
		batchBytes:   4 << 20,
		tailEvents:   8192,
		tailBytes:    16 << 20,
		now:          time.Now,
		leaseTTL:     10 * time.Second,
		steps:        Migrations(),
	}
}

// Schema names the schema that the log lives in; "deed" by default. Each
// schema is a log of its own, and one database can have many. It is made if it
// does not exist and the role may do so.
func Schema(name string) Option {
	return func(s *settings) error {
		if name == "" || len(name) > 63 || strings.ContainsAny(name, "\x00$") {
			return fmt.Errorf("%w: the schema %q: use 1 to 63 bytes, and no $", eventstore.ErrInvalid, name)
		}
		s.schema = name
		return nil
	}
}

// Pooled says that the connections go through a pooler in transaction mode
// (PgBouncer, RDS Proxy, Supavisor), where a session lasts for one transaction.
// Nothing that outlives a transaction is used then: no prepared statements, no
// session settings, no LISTEN. Subscribers learn of other processes' events by
// polling, and commits are written by one call of a function.
func Pooled() Option {
	return func(s *settings) error { s.pooled = true; return nil }
}

// SynchronousCommit sets when an append counts as durable: "on" (the local
// disk, and synchronous standbys where the server has them), "local",
// "remote_write" or "remote_apply", as PostgreSQL defines them. By default the
// server's own setting holds, but where that is "off" it is raised to "on".
//
// "off" gives up the promise that an acknowledged append is kept: after a crash
// of the server the last moments of the log may be gone. What is left is in
// order and without gaps, but positions that were seen are given again, and
// processes that have seen more than the log now holds stop with
// eventstore.ErrGap. It is for tests and for logs that can be made again.
func SynchronousCommit(mode string) Option {
	return func(s *settings) error {
		switch mode {
		case "on", "off", "local", "remote_write", "remote_apply":
			s.synchronousCommit = mode
			return nil
		}
		return fmt.Errorf("%w: synchronous commit %q: use on, off, local, remote_write or remote_apply", eventstore.ErrInvalid, mode)
	}
}

// WithoutMigration makes opening fail, instead of changing the schema, when it
// is not as this program needs it: for roles that may not alter tables. Run
// [Migrate] beforehand.
func WithoutMigration() Option {
	return func(s *settings) error { s.migrate = false; return nil }
}

// Readers bounds the connections that read the log; 8 by default. Beside them
// the store has three connections of its own (one writes, one sends and one
// receives notifications) and those of the pool for the state.
func Readers(connections int) Option {
	return func(s *settings) error {
		if connections < 1 {
			return fmt.Errorf("%w: %d connections for readers: at least 1 is needed", eventstore.ErrInvalid, connections)
		}
		s.readers = int32(min(connections, 1000))
		return nil
	}
}

// Patience is how long calls wait for a database that cannot be reached before
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

// Tail bounds what is kept in memory of the latest events: by default 8,192
// events and 16 MiB of data. It begins empty when the store is opened.
// Subscribers who are no further behind never read from the database.
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
// Leases end by the database's clock.
func Now(now func() time.Time) Option {
	return func(s *settings) error {
		if now == nil {
			return fmt.Errorf("%w: the clock is nil", eventstore.ErrInvalid)
		}
		s.now = now
		return nil
	}
}

// URL returns what opens the database when an application starts; see [Open].
func URL(url string, options ...Option) eventstore.Opener {
	return opener(func(ctx context.Context) (eventstore.Store, error) { return Open(ctx, url, options...) })
}

// Pool returns what opens the log over the pool when an application starts;
// see [OpenPool].
func Pool(pool *pgxpool.Pool, options ...Option) eventstore.Opener {
	return opener(func(ctx context.Context) (eventstore.Store, error) { return OpenPool(ctx, pool, options...) })
}

type opener func(context.Context) (eventstore.Store, error)

func (o opener) Open(ctx context.Context) (eventstore.Store, error) { return o(ctx) }

// Open connects to the database and applies the migrations that are missing.
// The URL is one that pgx understands, for example
//
//	postgres://user:secret@host:5432/shop?sslmode=verify-full
//
// The context is for opening only.
//
// Errors: eventstore.ErrInvalid for a URL that cannot be parsed and for servers
// that cannot keep a log (a read replica, another encoding than UTF8);
// eventstore.ErrNewerVersion when a newer program has migrated the schema;
// eventstore.ErrUnavailable when the server cannot be reached.
func Open(ctx context.Context, url string, options ...Option) (*Store, error) {
	set, err := gather(options)
	if err != nil {
		return nil, err
	}
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", eventstore.ErrInvalid, err)
	}
	if set.pooled {
		unprepared(config.ConnConfig)
	}
	if !strings.Contains(url, "pool_max_conns") {
		config.MaxConns = 16
	}
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, unavailable("connect", err)
	}
	s, err := open(ctx, pool, set)
	if err != nil {
		pool.Close()
		return nil, err
	}
	s.ownPool = true
	return s, nil
}

// OpenPool is Open over a pool of the program's own, which carries the state
// and the transactions of projections, and is not closed by [Store.Close]. The
// log itself has connections of its own to the same database, made from the
// pool's configuration.
func OpenPool(ctx context.Context, pool *pgxpool.Pool, options ...Option) (*Store, error) {
	set, err := gather(options)
	if err != nil {
		return nil, err
	}
	if pool == nil {
		return nil, fmt.Errorf("%w: the pool is nil", eventstore.ErrInvalid)
	}
	return open(ctx, pool, set)
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

// unprepared makes connections use nothing that outlives a transaction.
func unprepared(c *pgx.ConnConfig) {
	if c.DefaultQueryExecMode != pgx.QueryExecModeSimpleProtocol {
		c.DefaultQueryExecMode = pgx.QueryExecModeExec
	}
	c.StatementCacheCapacity, c.DescriptionCacheCapacity = 0, 0
}

func open(ctx context.Context, pool *pgxpool.Pool, set settings) (*Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s := &Store{
		settings: set, schema: pgx.Identifier{set.schema}.Sanitize(), pool: pool, limits: eventstore.DefaultLimits(), now: set.now,
		wake: make(chan struct{}, 1), closing: make(chan struct{}),
	}
	s.texts = newTexts(s.schema)
	s.base, s.stop = context.WithCancel(context.Background())
	s.appends.Wake = s.signal
	var err error
	if s.meter, err = newMeter(set.schema); err != nil {
		return nil, err
	}
	if err := s.prepare(ctx); err != nil {
		s.stop()
		return nil, fmt.Errorf("open schema %q: %w", set.schema, err)
	}
	head, err := s.start(ctx)
	if err != nil {
		s.stop()
		s.logs.Close()
		return nil, fmt.Errorf("open schema %q: %w", set.schema, err)
	}
	s.follower = newFollower(s, tail.New(head, set.tailEvents, set.tailBytes))
	s.notifier = newNotifier(s)
	s.writing.Go(newCommitter(s).run)
	s.work.Go(s.follower.run)
	s.work.Go(s.notifier.run)
	if !set.pooled && !set.deaf {
		s.work.Go(s.follower.listen)
	}
	return s, nil
}

// prepare checks the server and the schema, and sets up the connections.
func (s *Store) prepare(ctx context.Context) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return unavailable("connect", err)
	}
	defer conn.Release()
	var server facts
	if err := server.read(ctx, conn.Conn()); err != nil {
		return err
	}
	if err := server.check(); err != nil {
		return err
	}
	if _, err := migrate(ctx, conn.Conn(), s.settings.schema, s.settings.steps, s.settings.migrate); err != nil {
		return err
	}
	if err := conn.Conn().QueryRow(ctx, "SELECT id::text FROM "+s.schema+".log").Scan(&s.logID); err != nil {
		return unavailable("read the id of the log", err)
	}
	id, err := uuid.Parse(s.logID)
	if err != nil {
		return fmt.Errorf("the id of the log, %q, is no UUID: the database was damaged", s.logID)
	}
	s.lock = int64(binary.BigEndian.Uint64(id[8:]))

	s.config = s.pool.Config().ConnConfig.Copy()
	if s.config.ConnectTimeout == 0 {
		s.config.ConnectTimeout = connectTimeout
	}
	s.config.OnNotification = nil
	mode := server.commitMode(s.settings.synchronousCommit)
	s.commitMode = mode
	if s.settings.pooled {
		// Sessions cannot be told: each transaction that appends is.
		if mode != "" {
			s.texts.commitMode = "SET LOCAL synchronous_commit = " + mode
			s.texts.appendBatch = strings.Replace(s.texts.appendEvents, " FROM ", " FROM (SELECT set_config('synchronous_commit', '"+mode+"', true)) AS mode CROSS JOIN ", 1)
		}
		unprepared(s.config)
		return s.openReaders(ctx)
	}
	s.config.DefaultQueryExecMode = pgx.QueryExecModeCacheStatement
	if s.config.RuntimeParams == nil {
		s.config.RuntimeParams = map[string]string{}
	}
	for name, value := range map[string]string{
		"application_name": "deed " + s.settings.schema,
		// Statements are prepared when tables may still be empty; the plan must be
		// one for large tables.
		"enable_seqscan": "off",
		"jit":            "off",
		// Each statement must see what was committed before it.
		"default_transaction_isolation": "read committed",
		// A process that is stopped or unreachable must not keep the lock.
		"idle_in_transaction_session_timeout": "5s",
		"lock_timeout":                        "3s", // whoever waits longer looks for a holder that was stopped
		"tcp_keepalives_idle":                 "5",
		"tcp_keepalives_interval":             "2",
		"tcp_keepalives_count":                "3",
		"tcp_user_timeout":                    "10s",
	} {
		s.config.RuntimeParams[name] = value
	}
	if mode != "" {
		s.config.RuntimeParams["synchronous_commit"] = mode
	}
	return s.openReaders(ctx)
}

func (s *Store) openReaders(ctx context.Context) error {
	config := s.pool.Config()
	config.ConnConfig = s.config.Copy()
	config.MaxConns, config.MinConns = s.settings.readers, 0
	config.BeforeConnect, config.AfterConnect, config.BeforeClose = nil, nil, nil
	var err error
	s.logs, err = pgxpool.NewWithConfig(ctx, config)
	return err
}

// start reads what must be known before the first call.
func (s *Store) start(ctx context.Context) (eventstore.Position, error) {
	conn, err := s.logs.Acquire(ctx)
	if err != nil {
		return 0, unavailable("connect", err)
	}
	defer conn.Release()
	known, err := s.readKinds(ctx, conn.Conn())
	if err != nil {
		return 0, err
	}
	s.kinds.Store(known)
	head, err := s.readHead(ctx, conn.Conn())
	return head, unavailable("read the head", err)
}

// signal tells the committer that there may be work.
func (s *Store) signal() { poke(s.wake) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Close refuses further calls, finishes what is being written, ends
// subscriptions with eventstore.ErrClosed and gives up the leases of this
// process. It waits for reads and updates that are running. Closing again
// returns the same.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.callsMu.Lock()
		close(s.closing) // from here on nobody enters
		s.callsMu.Unlock()
		s.appends.Close()
		s.follower.close()
		s.calls.Wait()
		s.writing.Wait()
		s.members.leave(s)
		s.stop()
		s.work.Wait()
		s.logs.Close()
		if s.ownPool {
			s.pool.Close()
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

// LogID returns the id the log was given when the schema was made.
func (s *Store) LogID(context.Context) (string, error) { return s.logID, nil }

// Shared says that other processes may use the same database.
func (s *Store) Shared() bool { return true }

// Head implements eventstore.Store: it asks the database, since other processes
// append too.
func (s *Store) Head(ctx context.Context) (eventstore.Position, error) {
	if err := s.enter(ctx); err != nil {
		return 0, err
	}
	defer s.leave()
	var head eventstore.Position
	err := s.reading(ctx, "read the head", func(ctx context.Context, conn *pgx.Conn) (err error) {
		head, err = s.readHead(ctx, conn)
		return err
	})
	return head, err
}
