package eventstore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
)

// Sentinels to branch on with errors.Is. What a backend cannot do honestly it
// refuses with an error that wraps errors.ErrUnsupported.
var (
	// ErrConflict: a condition did not hold; nothing was written. See [ConflictError].
	ErrConflict = errors.New("conflict")
	// ErrKeyReused: the idempotency key was used before for something else; nothing was written.
	ErrKeyReused = errors.New("idempotency key reused")
	// ErrClosed: the store was closed; nothing was written.
	ErrClosed = errors.New("store is closed")
	// ErrTooLarge: the input exceeds a limit; nothing was written.
	ErrTooLarge = errors.New("too large")
	// ErrInvalid: the input breaks a rule; nothing was written.
	ErrInvalid = errors.New("invalid")
	// ErrOutcomeUnknown: the append was cut off after it was on its way; it may or
	// may not have been written. Append again with the same key, or read the stream.
	ErrOutcomeUnknown = errors.New("outcome unknown")
	// ErrGap: the log has a hole or is out of order; the reader must not go on.
	ErrGap = errors.New("gap in the log")
	// ErrUnknownType: an event of a type, schema version or codec that this program does not know.
	ErrUnknownType = errors.New("unknown event type")
	// ErrDecode: stored bytes that do not decode into the type registered for them.
	ErrDecode = errors.New("cannot decode event")
	// ErrNewerVersion: the database was written by a newer version of deed.
	ErrNewerVersion = errors.New("database is newer than this program")
	// ErrUnavailable: the database cannot be reached, or failed for a reason that is
	// not the caller's; nothing was written. Trying again later can help.
	ErrUnavailable = errors.New("the database failed")
	// ErrInUse: another process has the database open for writing.
	ErrInUse = errors.New("database is in use by another process")
)

// ConflictError says which condition failed. For a stream condition Stream,
// Expected and Actual are set; for [NoneMatch] Query, After and Found, the
// position of the first event that matched.
type ConflictError struct {
	Kind             ConditionKind
	Stream           Stream
	Expected, Actual Revision
	Query            Query
	After, Found     Position
}

// Error describes the conflict.
func (e *ConflictError) Error() string {
	switch e.Kind {
	case ConditionStreamExists:
		return fmt.Sprintf("conflict: stream %q does not exist", clip(e.Stream.String()))
	case ConditionNoneMatch:
		return fmt.Sprintf("conflict: an event at position %d, after %d, matches the condition's query: decide again on the events up to it", e.Found, e.After)
	default:
		if e.Kind == ConditionStreamAt && e.Expected.Version == e.Actual.Version {
			return fmt.Sprintf("conflict: stream %q is at %s, but its last event is not the expected one", clip(e.Stream.String()), e.Actual)
		}
		return fmt.Sprintf("conflict: stream %q is at %s, expected %s", clip(e.Stream.String()), e.Actual, e.Expected)
	}
}

// Is makes errors.Is(err, ErrConflict) hold.
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// String returns "version n", or "version 0 (no events)".
func (r Revision) String() string {
	if r.Version == 0 {
		return "version 0 (no events)"
	}
	return "version " + strconv.FormatUint(r.Version, 10)
}

// CanRetry reports whether trying again can help: after a conflict by deciding
// again, after an unknown outcome by appending again with the same key, after
// a cancellation with a new context. Bad input, a reused key and a closed
// store stay what they are.
func CanRetry(err error) bool {
	switch {
	case err == nil:
		return false
	case errors.Is(err, ErrConflict), errors.Is(err, ErrOutcomeUnknown), errors.Is(err, ErrUnavailable):
		return true
	case errors.Is(err, ErrKeyReused), errors.Is(err, ErrClosed), errors.Is(err, ErrTooLarge), errors.Is(err, ErrInvalid),
		errors.Is(err, ErrGap), errors.Is(err, ErrUnknownType), errors.Is(err, ErrDecode),
		errors.Is(err, ErrNewerVersion), errors.Is(err, ErrInUse), errors.Is(err, errors.ErrUnsupported):
		return false
	}
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
