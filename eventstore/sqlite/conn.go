package sqlite

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"modernc.org/libc"
	"modernc.org/libc/sys/types"
	sqlite3 "modernc.org/sqlite/lib"
)

// conn is one connection, used by one goroutine at a time. It speaks to the
// SQLite library directly: database/sql would copy and box every value once
// more and runs a goroutine of its own.
type conn struct {
	tls        *libc.TLS
	db         uintptr
	statements map[string]*statement
	guard      *guard
	harm       error // the first failure that was not of a statement's making
}

// sqliteError is what the SQLite library answered.
type sqliteError struct {
	code    int
	message string
}

func (e *sqliteError) Error() string {
	return fmt.Sprintf("sqlite: %s (code %d)", e.message, e.code)
}

// isCode reports whether err is the primary result code.
func isCode(err error, code int) bool {
	var e *sqliteError
	return errors.As(err, &e) && e.code&0xff == code
}

// dial opens a connection to the file, which is made if it does not exist. The
// file system layer is SQLite's own unless vfs names another one.
func dial(path, vfs string) (*conn, error) {
	c := &conn{tls: libc.NewTLS(), statements: map[string]*statement{}}
	name, err := libc.CString(path)
	if err != nil {
		return nil, err
	}
	defer libc.Xfree(c.tls, name)
	var layer uintptr
	if vfs != "" {
		if layer, err = libc.CString(vfs); err != nil {
			return nil, err
		}
		defer libc.Xfree(c.tls, layer)
	}
	out := c.tls.Alloc(int(unsafe.Sizeof(uintptr(0))))
	defer c.tls.Free(int(unsafe.Sizeof(uintptr(0))))
	*(*uintptr)(pointer(out)) = 0
	code := sqlite3.Xsqlite3_open_v2(c.tls, name, out,
		sqlite3.SQLITE_OPEN_READWRITE|sqlite3.SQLITE_OPEN_CREATE|sqlite3.SQLITE_OPEN_NOMUTEX, layer)
	c.db = *(*uintptr)(pointer(out))
	if code != sqlite3.SQLITE_OK {
		err := c.failure(code)
		c.close()
		return nil, err
	}
	sqlite3.Xsqlite3_extended_result_codes(c.tls, c.db, 1)
	if err := c.stablePlans(); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// stablePlans keeps statements prepared when something is bound to them. Without
// it a new value for a LIMIT has the statement compiled anew, to be planned by the
// value (https://www.sqlite.org/queryplanner-ng.html#qpsg).
func (c *conn) stablePlans() error {
	values := libc.NewVaList(int32(1), uintptr(0))
	defer libc.Xfree(c.tls, values)
	if code := sqlite3.Xsqlite3_db_config(c.tls, c.db, sqlite3.SQLITE_DBCONFIG_ENABLE_QPSG, values); code != sqlite3.SQLITE_OK {
		return c.failure(code)
	}
	return nil
}

// pointer makes a pointer of an address outside of Go's heap.
func pointer(address uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&address)) }

// function makes a C function pointer of a top-level Go function.
func function[F any](f F) uintptr { return *(*uintptr)(unsafe.Pointer(&struct{ f F }{f})) }

func (c *conn) failure(code int32) error {
	message := ""
	if c.db != 0 && sqlite3.Xsqlite3_extended_errcode(c.tls, c.db) == code {
		message = libc.GoString(sqlite3.Xsqlite3_errmsg(c.tls, c.db))
	}
	if message == "" {
		message = libc.GoString(sqlite3.Xsqlite3_errstr(c.tls, code))
	}
	err := &sqliteError{code: int(code), message: message}
	switch code & 0xff {
	case sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_CORRUPT:
		if c.harm == nil {
			c.harm = err
		}
	}
	return err
}

// close releases the connection; it cannot be used afterwards.
func (c *conn) close() {
	for _, s := range c.statements {
		s.finalize()
	}
	c.statements = nil
	if c.db != 0 {
		sqlite3.Xsqlite3_close_v2(c.tls, c.db)
		c.db = 0
	}
	if c.guard != nil {
		c.guard.forget()
		c.guard = nil
	}
	if c.tls != nil {
		c.tls.Close()
		c.tls = nil
	}
}

// inTransaction reports whether a transaction is open.
func (c *conn) inTransaction() bool { return sqlite3.Xsqlite3_get_autocommit(c.tls, c.db) == 0 }

func (c *conn) lastInsertID() int64 { return sqlite3.Xsqlite3_last_insert_rowid(c.tls, c.db) }

// changed returns how many rows the last INSERT, UPDATE or DELETE changed.
func (c *conn) changed() int64 { return sqlite3.Xsqlite3_changes64(c.tls, c.db) }

func (c *conn) totalChanged() int64 { return sqlite3.Xsqlite3_total_changes64(c.tls, c.db) }

// mostStatements bounds the statements that a connection keeps prepared.
const mostStatements = 128

// prepare returns the statement for the text, which the connection keeps. It
// is the caller's until reset, which must be called.
func (c *conn) prepare(text string) (*statement, error) {
	if s, ok := c.statements[text]; ok && !s.busy {
		s.busy = true
		return s, nil
	}
	s, rest, err := c.compile(text, sqlite3.SQLITE_PREPARE_PERSISTENT)
	if err != nil {
		return nil, fmt.Errorf("prepare %q: %w", text, err)
	}
	if s == nil || strings.TrimSpace(rest) != "" {
		return nil, fmt.Errorf("prepare %q: one statement expected", text)
	}
	if !c.keep(text, s) {
		s.transient = true
	}
	return s, nil
}

// keep remembers a prepared statement; false if one in use has its name.
func (c *conn) keep(name string, s *statement) bool {
	if old, ok := c.statements[name]; ok {
		if old.busy {
			return false
		}
		old.finalize()
		delete(c.statements, name)
	}
	if len(c.statements) >= mostStatements {
		for name, old := range c.statements {
			if !old.busy {
				old.finalize()
				delete(c.statements, name)
			}
		}
	}
	c.statements[name] = s
	return true
}

// compile prepares the first statement of the text; nil if there is none.
func (c *conn) compile(text string, flags uint32) (*statement, string, error) {
	z, err := libc.CString(text)
	if err != nil {
		return nil, "", err
	}
	defer libc.Xfree(c.tls, z)
	const word = int(unsafe.Sizeof(uintptr(0)))
	out := c.tls.Alloc(2 * word)
	defer c.tls.Free(2 * word)
	tail := out + uintptr(word)
	if code := sqlite3.Xsqlite3_prepare_v3(c.tls, c.db, z, -1, flags, out, tail); code != sqlite3.SQLITE_OK {
		return nil, "", c.failure(code)
	}
	rest := text[min(len(text), int(*(*uintptr)(pointer(tail))-z)):]
	p := *(*uintptr)(pointer(out))
	if p == 0 {
		return nil, rest, nil
	}
	n := int(sqlite3.Xsqlite3_bind_parameter_count(c.tls, p))
	return &statement{c: c, p: p, buffers: make([]buffer, n), busy: true}, rest, nil
}

// exec runs statements without parameters, whatever rows they give.
func (c *conn) exec(text string) error {
	for text != "" {
		s, rest, err := c.compile(text, 0)
		if err != nil {
			return fmt.Errorf("%q: %w", text, err)
		}
		if s == nil {
			if rest == text {
				return nil
			}
			text = rest
			continue
		}
		more := true
		for more && err == nil {
			more, err = s.step()
		}
		s.finalize()
		if err != nil {
			return fmt.Errorf("%q: %w", text, err)
		}
		text = rest
	}
	return nil
}

// run executes a kept statement that gives no rows.
func (c *conn) run(text string, args ...any) error {
	s, err := c.prepare(text)
	if err != nil {
		return err
	}
	defer s.reset()
	if err := s.bindAll(args); err != nil {
		return err
	}
	_, err = s.step()
	return err
}

// row executes a kept statement and hands the first row, if there is one, to
// scan; it reports whether there was one.
func (c *conn) row(text string, scan func(*statement), args ...any) (bool, error) {
	s, err := c.prepare(text)
	if err != nil {
		return false, err
	}
	defer s.reset()
	if err := s.bindAll(args); err != nil {
		return false, err
	}
	found, err := s.step()
	if found {
		scan(s)
	}
	return found, err
}

// number executes a kept statement that gives one number; 0 without a row.
func (c *conn) number(text string, args ...any) (int64, error) {
	var n int64
	_, err := c.row(text, func(s *statement) { n = s.int64(0) }, args...)
	return n, err
}

// statement is a prepared statement. Parameters and columns count from 0.
type statement struct {
	c         *conn
	p         uintptr
	buffers   []buffer
	busy      bool // in use: not reset yet
	transient bool // finalized by reset
}

// buffer is memory outside of Go's heap that holds one parameter's bytes
// while the statement runs.
type buffer struct {
	address uintptr
	size    int
}

const (
	emptyBuffer   = 64
	largestBuffer = 64 << 10 // larger ones are freed after use
)

func (s *statement) finalize() {
	if s.p == 0 {
		return
	}
	sqlite3.Xsqlite3_finalize(s.c.tls, s.p)
	s.p = 0
	for i := range s.buffers {
		s.release(i)
	}
}

func (s *statement) release(i int) {
	if b := &s.buffers[i]; b.address != 0 {
		libc.Xfree(s.c.tls, b.address)
		*b = buffer{}
	}
}

// rewind makes the statement, which stays the caller's, ready to be bound and
// stepped again.
func (s *statement) rewind() { sqlite3.Xsqlite3_reset(s.c.tls, s.p) }

// reset gives the statement back.
func (s *statement) reset() {
	s.busy = false
	if s.transient {
		s.finalize()
		return
	}
	sqlite3.Xsqlite3_reset(s.c.tls, s.p)
	for i := range s.buffers {
		if s.buffers[i].size > largestBuffer {
			sqlite3.Xsqlite3_bind_null(s.c.tls, s.p, int32(i+1))
			s.release(i)
		}
	}
}

// step reports whether there is a row.
func (s *statement) step() (bool, error) {
	switch code := sqlite3.Xsqlite3_step(s.c.tls, s.p); code {
	case sqlite3.SQLITE_ROW:
		return true, nil
	case sqlite3.SQLITE_DONE:
		return false, nil
	default:
		return false, s.c.failure(code)
	}
}

func (s *statement) bound(code int32) error {
	if code != sqlite3.SQLITE_OK {
		return s.c.failure(code)
	}
	return nil
}

func (s *statement) bindInt64(i int, v int64) error {
	return s.bound(sqlite3.Xsqlite3_bind_int64(s.c.tls, s.p, int32(i+1), v))
}

func (s *statement) bindNull(i int) error {
	return s.bound(sqlite3.Xsqlite3_bind_null(s.c.tls, s.p, int32(i+1)))
}

// bytes gives the parameter room for n bytes.
func (s *statement) bytes(i, n int) (uintptr, []byte, error) {
	if n > math.MaxInt32 {
		return 0, nil, fmt.Errorf("parameter %d has %d bytes", i+1, n)
	}
	b := &s.buffers[i]
	if b.address == 0 || b.size < n {
		s.release(i)
		size := emptyBuffer
		for size < n {
			size *= 2
		}
		address := libc.Xmalloc(s.c.tls, types.Size_t(size))
		if address == 0 {
			return 0, nil, fmt.Errorf("parameter %d: no memory for %d bytes", i+1, n)
		}
		*b = buffer{address: address, size: size}
	}
	return b.address, unsafe.Slice((*byte)(pointer(b.address)), n), nil
}

// bindBlob binds the bytes; nil is NULL.
func (s *statement) bindBlob(i int, v []byte) error {
	if v == nil {
		return s.bindNull(i)
	}
	address, room, err := s.bytes(i, len(v))
	if err != nil {
		return err
	}
	copy(room, v)
	return s.bound(sqlite3.Xsqlite3_bind_blob(s.c.tls, s.p, int32(i+1), address, int32(len(v)), 0))
}

func (s *statement) bindText(i int, v string) error {
	address, room, err := s.bytes(i, len(v))
	if err != nil {
		return err
	}
	copy(room, v)
	return s.bound(sqlite3.Xsqlite3_bind_text(s.c.tls, s.p, int32(i+1), address, int32(len(v)), 0))
}

// bindTextBytes binds the bytes as text; nil is NULL.
func (s *statement) bindTextBytes(i int, v []byte) error {
	if v == nil {
		return s.bindNull(i)
	}
	address, room, err := s.bytes(i, len(v))
	if err != nil {
		return err
	}
	copy(room, v)
	return s.bound(sqlite3.Xsqlite3_bind_text(s.c.tls, s.p, int32(i+1), address, int32(len(v)), 0))
}

// bind binds a value of one of database/sql/driver's types, or an int.
func (s *statement) bind(i int, v any) error {
	switch v := v.(type) {
	case nil:
		return s.bindNull(i)
	case int64:
		return s.bindInt64(i, v)
	case int:
		return s.bindInt64(i, int64(v))
	case string:
		return s.bindText(i, v)
	case []byte:
		return s.bindBlob(i, v)
	case bool:
		if v {
			return s.bindInt64(i, 1)
		}
		return s.bindInt64(i, 0)
	case float64:
		return s.bound(sqlite3.Xsqlite3_bind_double(s.c.tls, s.p, int32(i+1), v))
	case time.Time:
		return s.bindText(i, v.UTC().Format(time.RFC3339Nano))
	default:
		return fmt.Errorf("parameter %d has the type %T, which SQLite cannot store", i+1, v)
	}
}

// bindAll binds the arguments in order.
func (s *statement) bindAll(args []any) error {
	for i, v := range args {
		if err := s.bind(i, v); err != nil {
			return err
		}
	}
	return nil
}

// bindNumbered binds $1, $2, … and ?.
func (s *statement) bindNumbered(args []any) error {
	for i := range s.buffers {
		at := i
		if name := libc.GoString(sqlite3.Xsqlite3_bind_parameter_name(s.c.tls, s.p, int32(i+1))); name != "" {
			n, err := strconv.Atoi(name[1:])
			if err != nil || name[0] != '$' && name[0] != '?' {
				return fmt.Errorf("parameter %q: use $1, $2, …", name)
			}
			at = n - 1
		}
		if at < 0 || at >= len(args) {
			return fmt.Errorf("parameter $%d has no argument: %d were given", at+1, len(args))
		}
		if err := s.bind(i, args[at]); err != nil {
			return err
		}
	}
	return nil
}

func (s *statement) int64(i int) int64 {
	return sqlite3.Xsqlite3_column_int64(s.c.tls, s.p, int32(i))
}

func (s *statement) isNull(i int) bool {
	return sqlite3.Xsqlite3_column_type(s.c.tls, s.p, int32(i)) == sqlite3.SQLITE_NULL
}

// view returns the bytes of a column, valid until the next step or reset.
func (s *statement) view(i int) []byte {
	address := sqlite3.Xsqlite3_column_blob(s.c.tls, s.p, int32(i))
	n := sqlite3.Xsqlite3_column_bytes(s.c.tls, s.p, int32(i))
	if address == 0 || n == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(pointer(address)), int(n))
}

func (s *statement) text(i int) string { return string(s.view(i)) }

// blob returns a copy of the bytes of a column; nil for NULL.
func (s *statement) blob(i int) []byte {
	if s.isNull(i) {
		return nil
	}
	return append([]byte{}, s.view(i)...)
}

// value returns a column as one of database/sql/driver's types.
func (s *statement) value(i int) any {
	switch sqlite3.Xsqlite3_column_type(s.c.tls, s.p, int32(i)) {
	case sqlite3.SQLITE_INTEGER:
		return s.int64(i)
	case sqlite3.SQLITE_FLOAT:
		return sqlite3.Xsqlite3_column_double(s.c.tls, s.p, int32(i))
	case sqlite3.SQLITE_TEXT:
		return s.text(i)
	case sqlite3.SQLITE_BLOB:
		return s.blob(i)
	default:
		return nil
	}
}

func (s *statement) columns() int { return int(sqlite3.Xsqlite3_column_count(s.c.tls, s.p)) }
