package sqlite

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	sqlite3 "modernc.org/sqlite/lib"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Exec implements projection.Tx. The text may hold several statements when
// there are no arguments. A statement that has begun is not interrupted: that
// would take the transaction with it.
func (tx *stateTx) Exec(ctx context.Context, query string, args ...any) (int64, error) {
	if err := errors.Join(tx.writable(), ctx.Err()); err != nil {
		return 0, err
	}
	if err := tx.oneAtATime(); err != nil {
		return 0, err
	}
	tx.c.guard.on.Store(true)
	defer tx.c.guard.on.Store(false)
	var total int64
	for text := query; ; {
		s, rest, err := tx.compile(text)
		if err != nil {
			return total, sqlFailure(query, err)
		}
		if s == nil {
			if rest == "" || rest == text {
				return total, nil
			}
			text = rest
			continue
		}
		if len(args) > 0 && strings.TrimSpace(rest) != "" {
			s.reset()
			return total, fmt.Errorf("%w: sql %q: give arguments to one statement at a time", eventstore.ErrInvalid, query)
		}
		changed, err := tx.execute(s, args)
		total += changed
		if err != nil {
			return total, sqlFailure(query, err)
		}
		if tx.c.guard.altered.Swap(false) {
			if err := tx.namesKept(); err != nil {
				return total, fmt.Errorf("sql %q: %w", query, err)
			}
		}
		text = rest
	}
}

// namesKept makes the transaction fail when a table was given one of deed's
// names.
func (tx *stateTx) namesKept() error {
	objects, err := ownObjects(tx.c)
	if err == nil && objects != tx.store.objects {
		err = fmt.Errorf("%w: names that begin with %s are taken: choose another one", eventstore.ErrInvalid, ownPrefix)
	}
	if err != nil {
		return tx.fail(err)
	}
	return nil
}

func (tx *stateTx) execute(s *statement, args []any) (int64, error) {
	defer s.reset()
	if err := bindUser(s, args); err != nil {
		return 0, err
	}
	before := tx.c.totalChanged()
	for {
		more, err := s.step()
		if err != nil {
			return 0, err
		}
		if !more {
			break
		}
	}
	if tx.c.totalChanged() == before {
		return 0, nil
	}
	return tx.c.changed(), nil
}

// userText keeps statements of the user apart from our own, which the guard
// has not seen.
const userText = "/* user */ "

// compile returns the first statement of the text, kept if it is the only one.
func (tx *stateTx) compile(text string) (*statement, string, error) {
	if s, ok := tx.c.statements[userText+text]; ok && !s.busy {
		s.busy = true
		return s, "", nil
	}
	s, rest, err := tx.c.compile(text, 0)
	if s == nil || err != nil {
		return nil, rest, err
	}
	// One that alters a table is not kept, so that the guard sees each of its runs.
	if strings.TrimSpace(rest) != "" || tx.c.guard.altered.Load() || !tx.c.keep(userText+text, s) {
		s.transient = true
	}
	return s, rest, nil
}

// Query implements projection.Tx.
func (tx *stateTx) Query(ctx context.Context, query string, args ...any) (projection.Rows, error) {
	if err := errors.Join(tx.usable(), ctx.Err()); err != nil {
		return nil, err
	}
	if err := tx.oneAtATime(); err != nil {
		return nil, err
	}
	tx.c.guard.on.Store(true)
	defer tx.c.guard.on.Store(false)
	s, rest, err := tx.compile(query)
	if err != nil {
		return nil, sqlFailure(query, err)
	}
	if s == nil || strings.TrimSpace(rest) != "" {
		if s != nil {
			s.reset()
		}
		return nil, fmt.Errorf("%w: sql %q: a query is one statement", eventstore.ErrInvalid, query)
	}
	if tx.c.guard.altered.Swap(false) {
		s.reset()
		return nil, fmt.Errorf("%w: sql %q: a query does not alter tables: use Exec", eventstore.ErrInvalid, query)
	}
	if err := bindUser(s, args); err != nil {
		s.reset()
		return nil, sqlFailure(query, err)
	}
	tx.open = &queryRows{ctx: ctx, tx: tx, s: s, text: query}
	return tx.open, nil
}

// oneAtATime refuses a call while rows are open, as other backends must.
func (tx *stateTx) oneAtATime() error {
	if tx.open != nil {
		return fmt.Errorf("%w: close the rows of %q before the next call on the transaction", eventstore.ErrInvalid, tx.open.text)
	}
	return nil
}

func sqlFailure(query string, err error) error {
	if isCode(err, sqlite3.SQLITE_AUTH) {
		return fmt.Errorf("%w: sql %q: transactions, pragmas, other files, temporary tables and names like deed_… are not for projections: %w", eventstore.ErrInvalid, query, err)
	}
	if unavailable(err) {
		return fmt.Errorf("sql %q: %w: %w", query, projection.ErrUnavailable, err)
	}
	return fmt.Errorf("sql %q: %w", query, err)
}

// unavailable reports whether the file or the machine is to blame, not the
// statement.
func unavailable(err error) bool {
	for _, code := range []int{
		sqlite3.SQLITE_BUSY, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT,
		sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOTADB,
	} {
		if isCode(err, code) {
			return true
		}
	}
	return false
}

func bindUser(s *statement, args []any) error {
	values := make([]any, len(args))
	for i, arg := range args {
		value := arg
		if named, ok := arg.(sql.NamedArg); ok {
			return fmt.Errorf("parameter %q is named: use $1, $2, …", named.Name)
		}
		value, err := driver.DefaultParameterConverter.ConvertValue(value)
		if err != nil {
			return fmt.Errorf("parameter $%d: %w", i+1, err)
		}
		values[i] = value
	}
	return s.bindNumbered(values)
}

// queryRows implements projection.Rows.
type queryRows struct {
	ctx  context.Context
	tx   *stateTx
	s    *statement
	text string
	row  bool
	err  error
}

func (r *queryRows) Next() bool {
	r.row = false
	if r.s == nil || r.err != nil {
		return false
	}
	if err := r.ctx.Err(); err != nil {
		r.err = err
	} else if r.row, err = r.step(); err != nil {
		r.err = sqlFailure(r.text, err)
	}
	if !r.row {
		_ = r.Close()
	}
	return r.row
}

// step is guarded because SQLite prepares a statement anew when the schema has
// changed.
func (r *queryRows) step() (bool, error) {
	r.tx.c.guard.on.Store(true)
	defer r.tx.c.guard.on.Store(false)
	return r.s.step()
}

func (r *queryRows) Err() error { return r.err }

func (r *queryRows) Close() error {
	r.row = false
	if r.s != nil {
		r.s.reset()
		r.s = nil
		r.tx.open = nil
	}
	return nil
}

func (r *queryRows) Scan(dest ...any) error {
	if !r.row {
		return errors.New("scan without a row: call Next first")
	}
	if n := r.s.columns(); n != len(dest) {
		return fmt.Errorf("sql %q: %d columns into %d destinations", r.text, n, len(dest))
	}
	for i, d := range dest {
		if err := assign(d, r.s.value(i)); err != nil {
			return fmt.Errorf("sql %q: column %d: %w", r.text, i+1, err)
		}
	}
	return nil
}

// assign converts like database/sql; times are kept as text.
func assign(dest, value any) error {
	switch d := dest.(type) {
	case sql.Scanner:
		return d.Scan(value)
	case *any:
		*d = value
		return nil
	case *string:
		return convert(d, value)
	case *[]byte:
		return convert(d, value)
	case *bool:
		return convert(d, value)
	case *int:
		return convert(d, value)
	case *int64:
		return convert(d, value)
	case *uint64:
		return convert(d, value)
	case *float64:
		return convert(d, value)
	case *time.Time:
		if text, ok := value.(string); ok {
			t, err := time.Parse(time.RFC3339Nano, text)
			*d = t
			return err
		}
		return convert(d, value)
	}
	target := reflect.ValueOf(dest)
	if target.Kind() != reflect.Pointer || target.IsNil() {
		return fmt.Errorf("the destination is a %T, not a pointer", dest)
	}
	target = target.Elem()
	if value == nil && target.Kind() != reflect.Pointer {
		return fmt.Errorf("NULL does not fit into %s: use a pointer", target.Type())
	}
	switch target.Kind() {
	case reflect.Pointer:
		if value == nil {
			target.SetZero()
			return nil
		}
		inner := reflect.New(target.Type().Elem())
		if err := assign(inner.Interface(), value); err != nil {
			return err
		}
		target.Set(inner)
		return nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		var n int64
		if err := convert(&n, value); err != nil {
			return err
		}
		if target.OverflowInt(n) {
			return fmt.Errorf("%d does not fit into %s", n, target.Type())
		}
		target.SetInt(n)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		var n uint64
		if err := convert(&n, value); err != nil {
			return err
		}
		if target.OverflowUint(n) {
			return fmt.Errorf("%d does not fit into %s", n, target.Type())
		}
		target.SetUint(n)
	case reflect.Float32, reflect.Float64:
		var f float64
		if err := convert(&f, value); err != nil {
			return err
		}
		target.SetFloat(f)
	case reflect.String:
		var text string
		if err := convert(&text, value); err != nil {
			return err
		}
		target.SetString(text)
	case reflect.Bool:
		var b bool
		if err := convert(&b, value); err != nil {
			return err
		}
		target.SetBool(b)
	default:
		return fmt.Errorf("cannot scan into %s", target.Type())
	}
	return nil
}

// convert uses the rules of database/sql.
func convert[T any](dest *T, value any) error {
	var n sql.Null[T]
	if err := n.Scan(value); err != nil {
		return err
	}
	if !n.Valid {
		if _, ok := any(dest).(*[]byte); !ok {
			return fmt.Errorf("NULL does not fit into %T: use a pointer", *dest)
		}
	}
	*dest = n.V
	return nil
}
