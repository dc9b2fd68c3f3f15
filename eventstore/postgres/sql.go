package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// A statement of the user that fails takes back itself alone, as on the other
// backends, and not the transaction: before each there is a savepoint. It is
// renewed together with the statement, so that most cost one round trip.
const (
	savepoint  = "SAVEPOINT deed"
	release    = "RELEASE SAVEPOINT deed"
	rollbackTo = "ROLLBACK TO SAVEPOINT deed"
)

// save sets the savepoint, unless it lies right behind all that was done.
func (t *stateTx) save(ctx context.Context) error {
	if t.saved {
		return nil
	}
	if _, err := t.tx.Exec(ctx, savepoint); err != nil {
		return t.broke("set a savepoint", err)
	}
	t.saved = true
	return nil
}

// Exec implements projection.Tx. The text may hold several statements when
// there are no arguments.
func (t *stateTx) Exec(ctx context.Context, query string, args ...any) (int64, error) {
	if err := errors.Join(t.writable(), ctx.Err(), t.oneAtATime(), t.s.guard(query)); err != nil {
		return 0, err
	}
	if err := t.save(ctx); err != nil {
		return 0, err
	}
	var total int64
	var err error
	if len(args) == 0 {
		results, failed := t.tx.Conn().PgConn().Exec(ctx, query+"\n;"+release+";"+savepoint).ReadAll()
		for _, r := range results {
			total += r.CommandTag.RowsAffected()
			if r.CommandTag.Select() {
				total -= r.CommandTag.RowsAffected()
			}
		}
		err = failed
	} else {
		b := &pgx.Batch{}
		b.Queue(query, args...)
		b.Queue(release)
		b.Queue(savepoint)
		results := t.tx.SendBatch(ctx, b)
		tag, failed := results.Exec()
		if err = failed; err == nil && !tag.Select() {
			total = tag.RowsAffected()
		}
		if closing := results.Close(); err == nil {
			err = closing
		}
	}
	if err != nil {
		return 0, t.undo(ctx, query, err)
	}
	return total, nil
}

// undo takes back a statement that has failed.
func (t *stateTx) undo(ctx context.Context, query string, err error) error {
	failure := sqlFailure(ctx, query, err)
	if t.tx.Conn().PgConn().TxStatus() != 'E' {
		if t.tx.Conn().IsClosed() || broken(err) {
			_ = t.fail(failure)
		}
		return failure
	}
	if _, lost := t.tx.Conn().Exec(t.ctx, rollbackTo); lost != nil {
		_ = t.fail(failure)
	}
	return failure
}

func sqlFailure(ctx context.Context, query string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("sql %q: %w", query, ctx.Err())
	}
	return unavailable(fmt.Sprintf("sql %q", query), err)
}

// Query implements projection.Tx.
func (t *stateTx) Query(ctx context.Context, query string, args ...any) (projection.Rows, error) {
	if err := errors.Join(t.usable(), ctx.Err(), t.oneAtATime(), t.s.guard(query)); err != nil {
		return nil, err
	}
	if err := t.save(ctx); err != nil {
		return nil, err
	}
	b := &pgx.Batch{}
	b.Queue(query, args...)
	b.Queue(release)
	b.Queue(savepoint)
	results := t.tx.SendBatch(ctx, b)
	rows, err := results.Query()
	if err != nil {
		_ = results.Close()
		return nil, t.undo(ctx, query, err)
	}
	t.open = &queryRows{ctx: ctx, t: t, rows: rows, results: results, text: query}
	return t.open, nil
}

// oneAtATime refuses a call while rows are open.
func (t *stateTx) oneAtATime() error {
	if t.open != nil {
		return fmt.Errorf("%w: close the rows of %q before the next call on the transaction", eventstore.ErrInvalid, t.open.text)
	}
	return nil
}

// queryRows implements projection.Rows.
type queryRows struct {
	ctx     context.Context
	t       *stateTx
	rows    pgx.Rows
	results pgx.BatchResults
	text    string
	err     error
	closed  bool
}

func (r *queryRows) Next() bool {
	if r.closed {
		return false
	}
	if r.rows.Next() {
		return true
	}
	_ = r.Close()
	return false
}

func (r *queryRows) Err() error { return r.err }

func (r *queryRows) Close() error {
	if r.closed {
		return nil
	}
	r.closed = true
	r.t.open = nil
	r.rows.Close()
	err := r.rows.Err()
	if closing := r.results.Close(); err == nil {
		err = closing
	}
	if err != nil {
		r.err = r.t.undo(r.ctx, r.text, err)
	}
	return nil
}

func (r *queryRows) Scan(dest ...any) error {
	if r.closed {
		return errors.New("scan without a row: call Next first")
	}
	// Scan of pgx ends the rows when it fails.
	if err := r.rows.Scan(dest...); err != nil {
		return fmt.Errorf("sql %q: %w", r.text, err)
	}
	return nil
}

// guard refuses statements that would end the transaction, or reach beyond
// what is a projection's.
func (s *Store) guard(query string) error {
	var word string // the first of the statement
	var before token
	for _, t := range tokens(query) {
		switch {
		case t.text == ";":
			word = ""
		case word == "":
			word = strings.ToUpper(t.text)
			switch word {
			case "BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT", "SAVEPOINT", "RELEASE", "PREPARE", "DEALLOCATE", "DISCARD", "LISTEN", "UNLISTEN", "NOTIFY", "SET", "RESET", "COPY", "VACUUM":
				return fmt.Errorf("%w: sql %q: %s is not for projections: they share the transaction of the checkpoint", eventstore.ErrInvalid, query, word)
			}
		}
		if t.text == "." && before.name && before.value() == s.settings.schema {
			return fmt.Errorf("%w: sql %q: the schema %q is the store's own: keep your tables in another one", eventstore.ErrInvalid, query, s.settings.schema)
		}
		before = t
	}
	return nil
}

// token is a word, a quoted name or a sign of SQL. Literals and comments are
// left out.
type token struct {
	text string
	name bool
}

func (t token) value() string {
	if strings.HasPrefix(t.text, `"`) {
		return strings.ReplaceAll(strings.Trim(t.text, `"`), `""`, `"`)
	}
	return strings.ToLower(t.text)
}

// tokens divides SQL, as far as it takes to find where statements begin.
func tokens(sql string) []token {
	var all []token
	for i := 0; i < len(sql); {
		rest := sql[i:]
		switch c := rest[0]; {
		case strings.HasPrefix(rest, "--"):
			i += length(rest, strings.IndexByte(rest, '\n'), 1)
		case strings.HasPrefix(rest, "/*"):
			i += comment(rest)
		case c == '\'':
			escapes := i > 0 && (sql[i-1] == 'E' || sql[i-1] == 'e') && len(all[len(all)-1].text) == 1 // the word E, not one that ends in it
			i += quoted(rest, '\'', escapes)
		case c == '"':
			n := quoted(rest, '"', false)
			all = append(all, token{text: rest[:n], name: true})
			i += n
		case c == '$' && dollar(rest) > 0:
			tag := rest[:dollar(rest)]
			i += len(tag) + length(rest[len(tag):], strings.Index(rest[len(tag):], tag), len(tag))
		case wordByte(c):
			n := 1
			for n < len(rest) && (wordByte(rest[n]) || rest[n] == '$') {
				n++
			}
			all = append(all, token{text: rest[:n], name: true})
			i += n
		case c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v':
			i++
		default:
			all = append(all, token{text: rest[:1]})
			i++
		}
	}
	return all
}

func wordByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c >= 0x80
}

// length is how much to pass over: through what was found, or everything.
func length(rest string, found, itself int) int {
	if found < 0 {
		return len(rest)
	}
	return found + itself
}

// comment returns the length of a comment; they nest.
func comment(rest string) int {
	depth := 0
	for i := 0; i < len(rest); i++ {
		switch {
		case strings.HasPrefix(rest[i:], "/*"):
			depth++
			i++
		case strings.HasPrefix(rest[i:], "*/"):
			i++
			if depth--; depth == 0 {
				return i + 1
			}
		}
	}
	return len(rest)
}

func quoted(rest string, quote byte, escapes bool) int {
	for i := 1; i < len(rest); i++ {
		switch {
		case escapes && rest[i] == '\\':
			i++
		case rest[i] == quote:
			if i+1 < len(rest) && rest[i+1] == quote {
				i++
				continue
			}
			return i + 1
		}
	}
	return len(rest)
}

// dollar returns the length of the tag that begins a dollar-quoted string; 0
// if none does.
func dollar(rest string) int {
	for i := 1; i < len(rest); i++ {
		switch c := rest[i]; {
		case c == '$':
			return i + 1
		case !wordByte(c), i == 1 && c >= '0' && c <= '9':
			return 0
		}
	}
	return 0
}
