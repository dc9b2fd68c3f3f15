package projection

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// SQLDefinition is a read model in SQL tables of the user's own. Make it with
// [SQL]; it is immutable and safe for concurrent use.
type SQLDefinition struct {
	name     string
	handlers map[string]sqlHandler // by current event type
	setup    []string
	reset    []string
	parts    int
	version  int // 0 is 1
	heldBack bool
	inlined  bool
	activate []string
	parkedBy func(eventstore.Recorded) string // nil: see ParkedBy
	mistakes []error
}

type sqlHandler struct {
	decode func(enc *eventstore.Encoding, r *eventstore.Recorded) (any, error)
	shared reflect.Type // see kind
	handle func(ctx context.Context, tx Tx, value any, r *eventstore.Recorded) error
}

// SQLPart is a part of an SQL projection: [Setup], [Reset], [Activate] or [OnSQL].
type SQLPart func(*SQLDefinition)

// SQL defines a projection whose handlers write to SQL tables, in the same
// transaction as the checkpoint: every event takes effect exactly once. It
// needs a store that has SQL (SQLite, PostgreSQL); on others it stops with an
// error wrapping errors.ErrUnsupported.
//
// Choose a [View] where rows of one type under one key are enough: it is
// faster, because its folds run outside of the transaction.
func SQL(name string, parts ...SQLPart) *SQLDefinition {
	d := &SQLDefinition{name: name, handlers: map[string]sqlHandler{}}
	if err := validateName(name); err != nil {
		d.mistakes = append(d.mistakes, err)
	}
	for _, part := range parts {
		part(d)
	}
	if len(d.handlers) == 0 && len(d.mistakes) == 0 {
		d.mistakes = append(d.mistakes, fmt.Errorf("%w: it has no handlers: add projection.OnSQL", eventstore.ErrInvalid))
	}
	return d
}

// Setup gives the statements that make the tables. They run at every start, so
// they must say IF NOT EXISTS.
func Setup(statements ...string) SQLPart {
	return func(d *SQLDefinition) { d.setup = append(d.setup, statements...) }
}

// Reset gives the statements that empty the tables, for [Engine.Rebuild].
// Dropping them is fine: Setup runs afterwards.
func Reset(statements ...string) SQLPart {
	return func(d *SQLDefinition) { d.reset = append(d.reset, statements...) }
}

// OnSQL handles events of type E in the projection's transaction. Keep it
// short and free of other I/O: on an embedded store appends wait for it. An
// error or a panic takes back everything the batch has written.
func OnSQL[E Event](handle func(ctx context.Context, tx Tx, e E, r eventstore.Recorded) error) SQLPart {
	return func(d *SQLDefinition) {
		k := kindOf[E]()
		if k.mistake == nil && handle == nil {
			k.mistake = fmt.Errorf("%w: the handler of event type %q is nil", eventstore.ErrInvalid, k.name)
		}
		if k.mistake != nil {
			d.mistakes = append(d.mistakes, k.mistake)
			return
		}
		if _, ok := d.handlers[k.name]; ok {
			d.mistakes = append(d.mistakes, fmt.Errorf("%w: event type %q has two handlers: merge them, or make two projections", eventstore.ErrInvalid, k.name))
			return
		}
		d.handlers[k.name] = sqlHandler{
			decode: decodeInto[E](k),
			shared: k.shared,
			handle: func(ctx context.Context, tx Tx, value any, r *eventstore.Recorded) error {
				return handle(ctx, tx, valueOf[E](value), *r)
			},
		}
	}
}

// Name returns the projection's name, with its version if that is not 1, as in
// "report/v2".
func (d *SQLDefinition) Name() string { return versionName(d.name, d.version) }

// Err returns the mistakes in the definition, joined; nil if there are none.
func (d *SQLDefinition) Err() error {
	return mistakes(d.Name(), d.mistakes, errors.Join(d.parkedInParts(), checkInline(d.inlined, d.parts, d.version)))
}

func (d *SQLDefinition) selection(enc *eventstore.Encoding, p partition) eventstore.Query {
	return eventstore.Match(eventstore.Item{Types: enc.StoredTypes(sortedKeys(d.handlers)...), Slices: p.slices()})
}

// Partitioned returns the projection divided into n parts, 1 to 128, that are run
// at the same time, here and in other processes that share the state; 1 is the
// default. A stream belongs to one of them, by its slice, so events of a stream
// are handled in order; those of different streams may be handled at the same time,
// in transactions of their own: rows that several streams share must be written by
// statements that bear that, such as n = n + 1.
//
// An embedded state has one writer: there, parts gain nothing. The number is part of
// what is stored: another one needs another [SQLDefinition.Version].
func (d *SQLDefinition) Partitioned(n int) *SQLDefinition {
	e := *d
	e.parts = n
	if err := checkPartitions(n); err != nil {
		e.mistakes = append(slices.Clip(e.mistakes), err)
	}
	return &e
}

func (d *SQLDefinition) partitions() int { return d.parts }

func (d *SQLDefinition) open(state State, o *Options, p partition) folder {
	return &sqlFolder{definition: d, state: state, enc: o.Encoding, part: p, most: o.SQLEvents, within: o.SQLTime}
}

type sqlFolder struct {
	definition *SQLDefinition
	state      State
	enc        *eventstore.Encoding
	part       partition
	most       int
	within     time.Duration
}

func (f *sqlFolder) handler(storedType string) (sqlHandler, bool) {
	h, ok := f.definition.handlers[f.enc.CurrentType(storedType)]
	return h, ok
}

func (f *sqlFolder) decode(it *item) {
	if h, ok := f.handler(it.event.Type); ok {
		it.decodeWith(h.shared, func() (any, error) { return h.decode(f.enc, it.event) })
	}
}

func (f *sqlFolder) setup(ctx context.Context, tx StateTx) error {
	if _, err := tx.Exec(ctx, "SELECT 1"); err != nil {
		return fmt.Errorf("its store must have SQL: %w", err)
	}
	if f.part.of > 1 && len(f.definition.setup) > 0 {
		if err := f.part.oneByOne(tx, f.definition.Name()); err != nil {
			return err
		}
	}
	return f.execute(ctx, tx, "set up", f.definition.setup)
}

var errResetsAll = fmt.Errorf("%w: its Reset empties the tables of all partitions, and not all of them run here: stop the other processes first, or give the definition another version, which is built beside this one", errors.ErrUnsupported)

var errNoReset = errors.New("it does not say how to empty its tables: add projection.Reset with the statements")

func (f *sqlFolder) clear(ctx context.Context, tx StateTx) error {
	if len(f.definition.reset) == 0 {
		return errNoReset
	}
	if f.part.of > 1 {
		return errResetsAll
	}
	if err := f.execute(ctx, tx, "reset", f.definition.reset); err != nil {
		return err
	}
	return f.setup(ctx, tx)
}

func (f *sqlFolder) execute(ctx context.Context, tx Tx, what string, statements []string) error {
	return runAll(ctx, tx, what, statements)
}

func (f *sqlFolder) prepare(context.Context, Lease) error { return nil }

func (f *sqlFolder) forget() {}
func (f *sqlFolder) fresh()  {}

// apply handles as many of the items as fit one transaction.
func (f *sqlFolder) apply(ctx context.Context, lease Lease, items []item, seal func(tx StateTx, n int) error) (int, error) {
	var done int
	err := f.state.Update(ctx, func(tx StateTx) error {
		// Handlers read and write: a former owner must not run beside the present one,
		// nor hold locks that this one needs.
		if err := tx.Fence(lease); err != nil {
			return err
		}
		done = 0
		began := time.Now()
		for done < len(items) && done < f.most {
			if done > 0 && time.Since(began) > f.within {
				break
			}
			if it := &items[done]; !it.parked {
				only := &onlySQL{tx: tx}
				err := f.call(ctx, only, it)
				if only.failed != nil {
					return only.failed // whatever the handler made of it
				}
				if err != nil {
					return &handlerError{index: done, cause: err}
				}
			}
			done++
		}
		return seal(tx, done)
	})
	if err != nil {
		return 0, err
	}
	return done, nil
}

// applyIn implements folder.
func (f *sqlFolder) applyIn(ctx context.Context, tx StateTx, items []item) error {
	for i := range items {
		only := &onlySQL{tx: tx}
		err := f.call(ctx, only, &items[i])
		if only.failed != nil {
			return only.failed
		}
		if err != nil {
			return &handlerError{index: i, cause: err}
		}
	}
	return nil
}

func (f *sqlFolder) reads([]item) (table string, keys []string) { return "", nil }

func (f *sqlFolder) call(ctx context.Context, tx Tx, it *item) error {
	if it.problem != nil {
		return it.problem
	}
	h, ok := f.handler(it.event.Type)
	if !ok {
		return nil
	}
	it.used = h.shared == nil
	_, err := guard(func() (struct{}, error) {
		return struct{}{}, h.handle(ctx, tx, it.value, it.event)
	})
	return err
}

// onlySQL keeps handlers from reaching the rest of the state's transaction, and
// remembers whether the database failed.
type onlySQL struct {
	tx     Tx
	failed error
}

// Unwrap is for backends, which may lend out what is their own.
func (o *onlySQL) Unwrap() Tx { return o.tx }

func (o *onlySQL) note(err error) error {
	if o.failed == nil && errors.Is(err, ErrUnavailable) {
		o.failed = err
	}
	return err
}

func (o *onlySQL) Exec(ctx context.Context, query string, args ...any) (int64, error) {
	n, err := o.tx.Exec(ctx, query, args...)
	return n, o.note(err)
}

func (o *onlySQL) Query(ctx context.Context, query string, args ...any) (Rows, error) {
	rows, err := o.tx.Query(ctx, query, args...)
	if err != nil {
		return nil, o.note(err)
	}
	return notedRows{Rows: rows, by: o}, nil
}

type notedRows struct {
	Rows
	by *onlySQL
}

func (r notedRows) Next() bool {
	more := r.Rows.Next()
	if !more {
		_ = r.by.note(r.Rows.Err())
	}
	return more
}

func (r notedRows) Err() error { return r.by.note(r.Rows.Err()) }
