package eventstore

import (
	"strconv"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"
)

// Position is the place of an event in its log. It begins at 1; 0 is before
// the first event. Positions increase in commit order; on memory, SQLite and
// PostgreSQL they are contiguous.
type Position uint64

// At returns p: a Position is a [Positioned].
func (p Position) At() Position { return p }

// Positioned is anything that knows how far the log had come: a [Position], a
// [Receipt] or a [Recorded] event.
type Positioned interface{ At() Position }

// Revision is the state of a stream: Version is its number of events (0: it
// does not exist), Position that of its last event. Backends check what they
// can: relational stores the version, JetStream the position.
//
// In an expectation a Position of 0 beside a Version above 0 means "not known":
// the version alone is checked. To follow a commit of the same stream that is
// still being written, use [StreamAtEvent].
type Revision struct {
	Version  uint64
	Position Position
}

// Metadata travels with an event but is not part of the domain. Its texts must
// be valid UTF-8.
type Metadata struct {
	// CorrelationID is shared by everything that one request caused.
	CorrelationID string `json:"correlation,omitempty"`
	// CausationID is the id of the event or command that caused this event.
	CausationID string `json:"causation,omitempty"`
	// Actor says who asked, for example a user id.
	Actor string `json:"actor,omitempty"`
	// TraceParent is the W3C trace context of the command.
	TraceParent string `json:"trace,omitempty"`
	// SchemaVersion is the version of the event type's schema; 0 means 1.
	SchemaVersion int `json:"schema,omitempty"`
	// Codec names what encoded Data; empty means JSON.
	Codec string `json:"codec,omitempty"`
	// Extra is the application's own.
	Extra map[string]string `json:"extra,omitempty"`
}

// IsZero reports whether m says nothing.
func (m Metadata) IsZero() bool {
	return m.CorrelationID == "" && m.CausationID == "" && m.Actor == "" && m.TraceParent == "" &&
		m.SchemaVersion == 0 && m.Codec == "" && len(m.Extra) == 0
}

// AppendJSON appends the metadata as JSON, as it is stored with every event: what
// encoding/json would write, at a fraction of the cost. (It is not called
// MarshalJSON so that structs which embed Metadata do not inherit it.)
func (m *Metadata) AppendJSON(to []byte) ([]byte, error) {
	start := len(to)
	to = append(to, '{')
	bare := len(m.Extra) == 0
	name := func(name string) {
		if to[len(to)-1] != '{' {
			to = append(to, ',')
		}
		to = append(append(append(to, '"'), name...), '"', ':')
	}
	text := func(key, value string) {
		if value == "" || !bare {
			return
		}
		name(key)
		to = append(append(append(to, '"'), value...), '"')
		bare = isBare(value)
	}
	text("correlation", m.CorrelationID)
	text("causation", m.CausationID)
	text("actor", m.Actor)
	text("trace", m.TraceParent)
	if m.SchemaVersion != 0 {
		name("schema")
		to = strconv.AppendInt(to, int64(m.SchemaVersion), 10)
	}
	text("codec", m.Codec)
	if bare {
		return append(to, '}'), nil
	}
	data, err := jsonv1.Marshal(m)
	return append(to[:start], data...), err
}

// isBare reports whether nothing in the text needs an escape in JSON.
func isBare(text string) bool {
	for i := range len(text) {
		switch c := text[i]; {
		case c < ' ', c > '~', c == '"', c == '\\', c == '<', c == '>', c == '&':
			return false
		}
	}
	return true
}

// Event is an event on its way into the log. The slices and the map it refers
// to must not be changed after it was given to Append.
type Event struct {
	// ID identifies the event for ever. The zero ID is replaced by a new UUIDv7.
	ID     uuid.UUID
	Stream Stream
	// Type names the kind of event, for example "account.opened".
	Type string
	// Tags are opaque strings for queries across streams, for example "course:c1".
	Tags     []string
	Data     []byte
	Metadata Metadata
	// Time is when it happened by the writer's clock; zero means now. It is
	// kept to the nanosecond, in UTC.
	Time time.Time
}

// Recorded is an event as the log keeps it. It belongs to the receiver; what
// it refers to is immutable, because subscribers share it.
type Recorded struct {
	ID     uuid.UUID
	Stream Stream
	// Version is the event's number within its stream, from 1 on, without gaps.
	Version  uint64
	Position Position
	Type     string
	Tags     []string
	Data     []byte
	Metadata Metadata
	Time     time.Time
}

// At returns the position of the event.
func (r Recorded) At() Position { return r.Position }

// Revision returns the revision of the stream just after this event.
func (r Recorded) Revision() Revision { return Revision{Version: r.Version, Position: r.Position} }
