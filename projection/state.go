package projection

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// State is what a backend keeps beside the log for background work: rows of
// views, the user's SQL tables, checkpoints, leases, and whatever else can be
// rebuilt from the log (due times, parked events). The backends implement it;
// users meet it as the [Tx] their SQL projections get. All methods may be
// called concurrently. After the store is closed they return
// [eventstore.ErrClosed].
//
// Nothing in the state is the truth: the log is. A backend may therefore make
// updates durable later than appends, as long as they are atomic, keep their
// order, and never become durable before the events they were made from.
//
// A state that other processes use at the same time says so with a method
// Shared() bool, see [Shared].
//
// Run statetest.Run against an implementation to certify it.
type State interface {
	// Update runs fn in one transaction and commits when it returns nil;
	// otherwise, and when fn panics, nothing of it remains, and fn's error is
	// returned as it is. fn runs at most once and must not call the state or append
	// to the store it belongs to, nor keep the transaction. Where the backend has
	// one writer for events and state, appends wait while fn runs: keep it short.
	//
	// Updates that are fenced by the same lease are serialised from there on: what
	// follows Fence, SetCheckpoint or DeleteCheckpoint sees every earlier update
	// that was fenced by it, and no other one gets past its own fence before this
	// one has ended. So fence before reading what is to be changed. Embedded
	// backends serialise all updates. On a server, updates that are not fenced, or
	// by different leases, may run at the same time, and then one that reads, thinks
	// and writes can undo what another one did. Only those that write the same row do
	// that one after another: what follows a read that follows the write sees what
	// the earlier ones have done.
	Update(ctx context.Context, fn func(StateTx) error) error
	// View runs fn, at most once, on a consistent snapshot of committed updates.
	// Writing in it fails. fn must not keep the transaction, and must not call Update.
	View(ctx context.Context, fn func(StateTx) error) error

	// Acquire takes the lease of the name for the owner, for ttl from now (0: until
	// it is released or the process ends), and raises its epoch by one. While another
	// owner's lease runs, the error is [ErrLeaseHeld], which should name the owner. An
	// owner may acquire its own lease again: its epoch rises all the same, which
	// fences its own earlier self. An update that the lease has fenced ends before
	// the lease is given to anybody.
	Acquire(ctx context.Context, name, owner string, ttl time.Duration) (Lease, error)
	// Renew extends the lease, with the same epoch. When another owner has acquired
	// it since, or it was acquired again, the error is [ErrFenced].
	Renew(ctx context.Context, lease Lease, ttl time.Duration) (Lease, error)
	// Release gives the lease up; the next Acquire need not wait. A lease that was
	// lost is no error. The epoch is kept for ever.
	Release(ctx context.Context, lease Lease) error
}

// StateTx is a transaction on the [State]. It is used by one goroutine, and
// only until the function it was given to returns. Writes are seen by later
// reads of the same transaction.
type StateTx interface {
	Tx

	// Checkpoint returns the checkpoint of the name; the zero Checkpoint if there is none.
	Checkpoint(name string) (Checkpoint, error)
	// SetCheckpoint moves the checkpoint named like the lease from what it was read
	// as to what it becomes; Epoch is set to the lease's. It fails with [ErrFenced],
	// and the transaction must be abandoned, if the lease has since been acquired by
	// anybody (its epoch is no longer the current one) or the stored checkpoint's
	// log or position is not that of from.
	SetCheckpoint(lease Lease, from, to Checkpoint) error
	// Fence fails with [ErrFenced] if the lease is no longer the current one, for
	// updates that move no checkpoint, and for those that read before they move it.
	// The update then fails whatever its function returns; so it does after
	// SetCheckpoint and DeleteCheckpoint have failed. Where updates run at the same
	// time it waits for those that the lease has fenced, until they or Update's ctx
	// have ended. It may be called several times in one update.
	Fence(lease Lease) error
	// DeleteCheckpoint forgets the checkpoint named like the lease, under the same
	// condition as Fence.
	DeleteCheckpoint(lease Lease) error

	// Get returns the value of the key in the table; false if there is none. The
	// value must not be changed. Tables are made by the first Put. Keys are any
	// bytes, not only text, but not empty; values are any bytes.
	Get(table, key string) ([]byte, bool, error)
	// Put sets the value of the key. The value must not be changed afterwards.
	Put(table, key string, value []byte) error
	// Delete removes the key; one that is not there is no error.
	Delete(table, key string) error
	// Clear removes every key of the table.
	Clear(table string) error
	// Scan yields the rows of the table in the byte order of their keys. Changing
	// the table while scanning it is allowed only after the loop.
	Scan(table string, r Range) iter.Seq2[Row, error]
}

// getAll reads the rows that are there of several keys. A transaction on a
// server reads them in one round trip, with a method GetAll like this.
func getAll(tx StateTx, table string, keys []string, found func(i int, value []byte)) error {
	if t, ok := tx.(interface {
		GetAll(table string, keys []string, found func(i int, value []byte)) error
	}); ok {
		return t.GetAll(table, keys, found)
	}
	for i, key := range keys {
		value, ok, err := tx.Get(table, key)
		if err != nil {
			return err
		}
		if ok {
			found(i, value)
		}
	}
	return nil
}

// Tx runs SQL in a transaction. Parameters are $1, $2, … on every backend, so
// one text serves SQLite and PostgreSQL. Backends without SQL return an error
// wrapping errors.ErrUnsupported. An error that wraps [ErrUnavailable] is the
// database's; any other is the caller's, say a constraint.
type Tx interface {
	// Exec runs a statement and returns how many rows it changed.
	Exec(ctx context.Context, query string, args ...any) (int64, error)
	// Query runs a query. The rows must be closed before the next call on the
	// transaction; Close after the last Next is not needed but allowed.
	Query(ctx context.Context, query string, args ...any) (Rows, error)
}

// Rows is the result of a query, used as in database/sql: Next, Scan, and Err
// at the end. *sql.Rows and pgx.Rows fit with small adapters.
type Rows interface {
	Next() bool
	Scan(dest ...any) error
	Err() error
	Close() error
}

// Shared reports whether other processes may use the state at the same time as
// this one: whether it has a method Shared() bool that says so. Whoever owns
// background work on such a state stores soon how far it has come, because
// others, who stand by, can know it only from there.
func Shared(s State) bool {
	shared, ok := s.(interface{ Shared() bool })
	return ok && shared.Shared()
}

// Row is one row of a table of the state.
type Row struct {
	Key   string
	Value []byte
}

// Range narrows a scan; the zero Range is everything, forward.
type Range struct {
	// Prefix keeps the keys that begin with it.
	Prefix string
	// After excludes keys up to and including it (keys from it on, when backward);
	// empty does not exclude.
	After string
	// Through excludes keys beyond it (keys before it, when backward); empty does
	// not exclude.
	Through string
	// Backward yields the last key first.
	Backward bool
	// Limit is the largest number of rows; 0 means all.
	Limit int
}

// Checkpoint says how far background work has come, in which log.
type Checkpoint struct {
	// Log is the id of the log that Position belongs to.
	Log string
	// Epoch is that of the lease under which the checkpoint was written.
	Epoch uint64
	// Position is the Through that the work has reached.
	Position eventstore.Position
}

// IsZero reports whether there is no checkpoint.
func (c Checkpoint) IsZero() bool { return c == Checkpoint{} }

// Lease is the right to do a piece of background work. The epoch, which rises
// with every Acquire, fences whoever held it before.
type Lease struct {
	Name  string
	Owner string
	Epoch uint64
	// Until is when the lease ends by the backend's clock; zero: not by time.
	Until time.Time
}

var (
	// ErrLeaseHeld: another owner's lease runs.
	ErrLeaseHeld = errors.New("lease is held by another owner")
	// ErrFenced: the lease or the checkpoint has moved on; whoever gets this is no
	// longer the owner and must drop what it knows. Nothing was committed.
	ErrFenced = errors.New("fenced: another owner has taken over")
	// ErrUnavailable: the database failed, and not because of the statement: the disk
	// is full or broken, the connection was lost. Backends make errors of Exec, Query
	// and Rows wrap it; what failed with it is tried again until the database answers.
	// It is [eventstore.ErrUnavailable].
	ErrUnavailable = eventstore.ErrUnavailable
)

// CheckpointLister is the optional power of a [State] to say whose checkpoints
// and leases it keeps: for tools, which do not have the definitions.
type CheckpointLister interface {
	// Checkpoints returns every name that has a checkpoint or ever had a lease, in
	// byte order.
	Checkpoints(ctx context.Context) ([]NamedCheckpoint, error)
}

// NamedCheckpoint is what a [State] keeps under one name.
type NamedCheckpoint struct {
	Name string
	// Checkpoint is the zero one when there is none.
	Checkpoint Checkpoint
	// Lease is the last one given; its epoch is 0 when there never was one.
	Lease Lease
	// Held says that the lease still runs, by the backend's clock.
	Held bool
}

// Stored is what a [State] tells about a projection, without its definition.
type Stored struct {
	// Name is the projection's.
	Name       string
	Checkpoint Checkpoint
	// Lease is the last one given, and Held says that it still runs: that somebody
	// has the projection.
	Lease Lease
	Held  bool
	// DeadLetters is the number of events set aside.
	DeadLetters int
	// Paused: it stands still until it is resumed, see [Engine.Pause].
	Paused bool
	// Projection is the name without version and partition, Version the version, and
	// Active says that it is the one that is read.
	Projection string
	Version    int
	Active     bool
}

// Inspect lists the projections that the state knows, in the order of their
// names: for tools, which do not have the definitions. An error wrapping
// errors.ErrUnsupported says that the state is no [CheckpointLister].
func Inspect(ctx context.Context, s State) ([]Stored, error) {
	lister, ok := s.(CheckpointLister)
	if !ok {
		return nil, fmt.Errorf("list the checkpoints of %T: %w", s, errors.ErrUnsupported)
	}
	known, err := lister.Checkpoints(ctx)
	if err != nil {
		return nil, err
	}
	var all []Stored
	err = s.View(ctx, func(tx StateTx) error {
		all = nil
		for _, k := range known {
			// As runner.leaseName and runner.deadTable name them.
			name, ok := strings.CutPrefix(k.Name, "projection.")
			if !ok {
				continue
			}
			one := Stored{Name: name, Checkpoint: k.Checkpoint, Lease: k.Lease, Held: k.Held}
			one.Projection, one.Version, _ = splitUnit(name)
			read, err := readStack(tx, one.Projection)
			if err != nil {
				return err
			}
			one.Active = read.top() == one.Version
			for _, err := range tx.Scan("projection.dead."+name, Range{}) {
				if err != nil {
					return err
				}
				one.DeadLetters++
			}
			if one.Paused, err = isPaused(tx, name); err != nil {
				return err
			}
			all = append(all, one)
		}
		return nil
	})
	return all, err
}
