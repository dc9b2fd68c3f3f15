// Package driver is what the adapter needs of a client of EventStoreDB, in
// plain structs and typed errors, so that another client (KurrentDB's) can be
// put below the adapter without touching it. It imports nothing of deed.
package driver

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// Driver speaks to one database. All methods may be called concurrently, and
// every call returns soon after its context has ended, whatever the client
// below it does. Errors are of type [*Error], or ErrClosed.
type Driver interface {
	// Append writes the events to the stream, all or none. It is sent once.
	Append(ctx context.Context, stream string, expected Expected, events []Event) (Appended, error)
	// ReadStream reads at most count events; from is inclusive. A stream without
	// events is NotFound, from the call or from the first Next.
	ReadStream(ctx context.Context, stream string, from StreamFrom, backward bool, count uint64) (Reader, error)
	// ReadAll reads at most count events of all streams, those of the system
	// included. Forward includes the event at the position, backward excludes it.
	ReadAll(ctx context.Context, from AllFrom, backward bool, count uint64) (Reader, error)
	// SubscribeStream delivers what follows the revision, which is exclusive.
	SubscribeStream(ctx context.Context, stream string, after StreamFrom) (Subscription, error)
	// SubscribeAll delivers what follows the position, which is exclusive, and
	// matches the filter.
	SubscribeAll(ctx context.Context, after AllFrom, filter Filter) (Subscription, error)
	// Delete hides the events of the stream; its numbering goes on.
	Delete(ctx context.Context, stream string, expected Expected) (Position, error)
	// Tombstone ends the stream for good.
	Tombstone(ctx context.Context, stream string, expected Expected) (Position, error)
	// Metadata returns the JSON of the stream's metadata; nil when it has none.
	Metadata(ctx context.Context, stream string) ([]byte, error)
	// SetMetadata replaces the stream's metadata.
	SetMetadata(ctx context.Context, stream string, expected Expected, json []byte) error
	// Close ends what is running, waits for it, and closes the connections.
	Close() error
}

// Expected is the expectation of a write: a revision, or one of the constants.
type Expected int64

// Expectations that are no revision.
const (
	NoStream     Expected = -1
	Any          Expected = -2
	StreamExists Expected = -4
)

// String describes the expectation.
func (e Expected) String() string {
	switch e {
	case NoStream:
		return "no stream"
	case Any:
		return "any"
	case StreamExists:
		return "an existing stream"
	}
	return fmt.Sprintf("revision %d", int64(e))
}

// Event is an event to be written.
type Event struct {
	ID             uuid.UUID // never zero
	Type           string
	JSON           bool // the data is JSON
	Data, Metadata []byte
}

// Position is a place in the log of all streams.
type Position struct{ Commit, Prepare uint64 }

// Appended tells where a write went; Revision is that of its last event.
type Appended struct {
	Revision uint64
	Position Position
}

// Recorded is an event as the server keeps it.
type Recorded struct {
	ID             uuid.UUID
	Stream         string
	Revision       uint64
	Position       Position
	Type           string
	JSON           bool
	Data, Metadata []byte
}

// StreamFrom is where a read or subscription of a stream begins: the revision,
// unless Start or End is set.
type StreamFrom struct {
	Start, End bool
	Revision   uint64
	// Leader: a node that follows, and may lag, must not answer a read.
	Leader bool
}

// AllFrom is where a read or subscription of all streams begins: the position,
// unless Start or End is set.
type AllFrom struct {
	Start, End bool
	Position   Position
	// Leader: a node that follows, and may lag, must not answer a read.
	Leader bool
}

// Filter selects events on the server. Exactly one member is set, or none for
// everything.
type Filter struct {
	// StreamPrefixes are beginnings of names of streams.
	StreamPrefixes []string
	// StreamRegex is a regular expression on names of streams.
	StreamRegex string
	// TypePrefixes are beginnings of types of events.
	TypePrefixes []string
}

// Reader is a read that is running. Next returns io.EOF at the end. Close it.
type Reader interface {
	Next(ctx context.Context) (*Recorded, error)
	Close()
}

// Subscription is a subscription that is running. Next returns an error when it
// was dropped. Close it.
type Subscription interface {
	Next(ctx context.Context) (Message, error)
	Close()
}

// Message is one of: an event, a checkpoint, or a word on how far the
// subscription has come.
type Message struct {
	Event      *Recorded
	Checkpoint *Position
	CaughtUp   bool
}

// Kind says what went wrong.
type Kind uint8

// The kinds of error.
const (
	// Unknown: none of the others.
	Unknown Kind = iota
	// WrongVersion: the stream is not at the expected revision; nothing was written.
	WrongVersion
	// NotFound: the stream has no events, or none that are not deleted.
	NotFound
	// Deleted: the stream was tombstoned; nothing was written.
	Deleted
	// TooLarge: the server found the write too large or malformed; nothing was written.
	TooLarge
	// InvalidPosition: no event of the server's has the position that was to be read
	// from.
	InvalidPosition
	// Denied: credentials or rights are missing; nothing was written.
	Denied
	// Rejected: the server ended the write before it had all of it, and the
	// reason is lost; nothing was written.
	Rejected
	// Unavailable: the server cannot be reached, or the connection was lost.
	Unavailable
	// Aborted: the server gave up, for example on a timeout or a slow consumer.
	Aborted
	// Timeout: the server did not answer in time.
	Timeout
	// Ended: the caller's context has ended.
	Ended
)

// ErrClosed: the driver was closed.
var ErrClosed = errors.New("the driver is closed")

// Error is a failure, classified.
type Error struct {
	Kind Kind
	// Unsent says that the server never heard of the call: nothing was written.
	Unsent bool
	Err    error
}

// Error describes the failure.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// KindOf returns the kind of the error; Unknown for errors of other types.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Unknown
}

// Transient reports whether the same call can succeed later, on another
// connection.
func Transient(err error) bool {
	switch KindOf(err) {
	case Unavailable, Aborted, Timeout:
		return true
	}
	return false
}

// Unsent reports whether the server never heard of the call.
func Unsent(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Unsent
}
