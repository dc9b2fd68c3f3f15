package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/deed-go/deed/eventstore"
)

// The codes that our own functions raise; see migration/001_log.sql.
const (
	codeIsolation = "DE002" // not READ COMMITTED
	codeRewound   = "DE003" // the log ends before the known position
)

// code returns the SQLSTATE of the server's answer; "" if there was none.
func code(err error) string {
	if answer, ok := errors.AsType[*pgconn.PgError](err); ok {
		return answer.Code
	}
	return ""
}

// transient reports whether the server or the way to it is to blame, and not
// the statement: the connection was lost or refused, the server starts, stops
// or has run out of something.
func transient(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) {
		return false
	}
	if _, connecting := errors.AsType[*pgconn.ConnectError](err); errors.Is(err, context.DeadlineExceeded) && !connecting {
		return false // connecting has a limit of its own
	}
	c := code(err)
	if len(c) < 2 {
		return lost(err)
	}
	switch c[:2] {
	case "08", // connection exception
		"53", // insufficient resources: disk full, out of memory, too many connections
		"57", // operator intervention: shutdown, crash shutdown, cannot connect now, query cancelled
		"58": // system error
		return true
	}
	switch c {
	case "40001", "40P01", // serialization failure, deadlock
		"55P03", // lock not available
		"25P03", // idle in transaction session timeout
		"25006": // read only transaction: a server that has become a standby
		return true
	}
	return false
}

// errNoAnswer: the server was given all the time it can have.
var errNoAnswer = errors.New("the server did not answer in time")

// errForgotten: the session has lost what was prepared in it.
var errForgotten = errors.New("the session has lost its prepared statements")

// lost reports whether there was no answer: the connection was refused, broke,
// or was closed before.
func lost(err error) bool {
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	return errors.Is(err, errNoAnswer) || errors.Is(err, errForgotten) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || pgconn.SafeToRetry(err)
}

// broken reports whether the connection cannot be used any more.
func broken(err error) bool {
	c := code(err)
	return c == "" && lost(err) || strings.HasPrefix(c, "57P") || strings.HasPrefix(c, "08") || c == "25P03"
}

// unavailable describes a failure of the database. Errors of contexts stay what
// they are, and statements that are wrong are not the database's fault.
func unavailable(what string, err error) error {
	if err == nil {
		return nil
	}
	if transient(err) && !errors.Is(err, eventstore.ErrUnavailable) {
		return fmt.Errorf("%s: %w: %w", what, eventstore.ErrUnavailable, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// errRestored says what can have happened to a log that has lost something.
var errRestored = errors.New("the database was restored, failed over to a standby that lagged, or crashed with synchronous_commit=off: restart the program, and check what it did on the lost events")

// errRewound: the log has lost events that this process has seen.
func errRewound(head, known eventstore.Position) error {
	return fmt.Errorf("%w: the log ends at position %d, but this process has seen position %d: %w", eventstore.ErrGap, head, known, errRestored)
}

func errGap(got, want eventstore.Position) error {
	return fmt.Errorf("%w: position %d follows, %d expected: events were removed, or written by another program", eventstore.ErrGap, got, want)
}
