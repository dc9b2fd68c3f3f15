package eventstore

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Commit is what one Append writes: all of its events or none, if all of its
// conditions hold. The events may belong to several streams; their order is
// kept.
type Commit struct {
	Events     []Event
	Conditions []Condition
	// Key makes the append idempotent: appending again with the same key writes
	// nothing and returns the first receipt. Empty means no key.
	Key string
	// Fingerprint says what the key stands for; the same key with another
	// fingerprint is [ErrKeyReused]. It should identify the request (the command),
	// not its outcome. When empty, it is derived from the events' streams, types,
	// tags and data.
	Fingerprint string
}

// ConditionKind tells the kinds of [Condition] apart.
type ConditionKind uint8

// The kinds of condition. The zero kind is refused.
const (
	ConditionStreamAt ConditionKind = iota + 1
	ConditionStreamExists
	ConditionNoneMatch
)

// Condition must hold at the moment of the append, judged against everything
// stored before it and never against the commit's own events. Build it with
// [StreamAt], [StreamExists] or [NoneMatch].
type Condition struct {
	Kind     ConditionKind
	Stream   Stream
	Revision Revision
	// LastEvent, when not zero, is the id that the stream's last event must have.
	LastEvent uuid.UUID
	Query     Query
	After     Position
}

// StreamAt demands that the stream is exactly at the revision; the zero
// Revision demands that it does not exist.
func StreamAt(s Stream, r Revision) Condition {
	return Condition{Kind: ConditionStreamAt, Stream: s, Revision: r}
}

// StreamAtEvent demands that the stream has so many events and that the last
// one is the event with the id. It is how a commit follows one of the same
// stream that is still being written, whose position nobody knows: were the
// version checked alone, the commit would pass when its predecessor lost to
// another writer who wrote as many events.
func StreamAtEvent(s Stream, version uint64, last uuid.UUID) Condition {
	return Condition{Kind: ConditionStreamAt, Stream: s, Revision: Revision{Version: version}, LastEvent: last}
}

// StreamExists demands that the stream has at least one event.
func StreamExists(s Stream) Condition {
	return Condition{Kind: ConditionStreamExists, Stream: s}
}

// NoneMatch demands that no event after the position matches the query: the
// append condition of dcb.events. After is exclusive, and is the position of
// the last event known while deciding; 0 considers the whole log, a uniqueness
// guard. A position beyond the head considers nothing.
func NoneMatch(q Query, after Position) Condition {
	return Condition{Kind: ConditionNoneMatch, Query: q, After: after}
}

// StreamRevision is the revision of a stream after a commit.
type StreamRevision struct {
	Stream   Stream
	Revision Revision
}

// Receipt tells where a commit went.
type Receipt struct {
	// First and Last are the positions of the commit's first and last event.
	First, Last Position
	// Revisions are those of the commit's streams just after it, in the order in
	// which the commit first named them.
	Revisions []StreamRevision
	// Duplicate says that the key had been used: nothing was written now, and the
	// rest is the first commit's receipt.
	Duplicate bool
	// Fingerprint is what the key stands for; empty without a key.
	Fingerprint string
}

// At returns the last position of the commit.
func (r Receipt) At() Position { return r.Last }

// Revision returns the revision of s just after the commit; zero if the commit
// did not touch s.
func (r Receipt) Revision(s Stream) Revision {
	for _, sr := range r.Revisions {
		if sr.Stream == s {
			return sr.Revision
		}
	}
	return Revision{}
}

// Limits are what a backend accepts.
type Limits struct {
	// EventBytes is the largest sum of data, metadata and tags of one event.
	EventBytes int
	// EventsPerCommit is the largest number of events in one commit.
	EventsPerCommit int
	// TagsPerEvent is the largest number of tags of one event.
	TagsPerEvent int
	// Conditions is the largest number of conditions of one commit.
	Conditions int
}

// DefaultLimits are 1 MiB an event, 1,000 events and 100 conditions a commit,
// 32 tags an event: what every backend can keep.
func DefaultLimits() Limits {
	return Limits{EventBytes: 1 << 20, EventsPerCommit: 1000, TagsPerEvent: 32, Conditions: 100}
}

// Prepare is for backends: it checks the commit against the rules of this
// package and the limits, before anything is written, and returns it with ids,
// times and the fingerprint filled in. The given commit is not changed.
func (c Commit) Prepare(limits Limits, now func() time.Time) (Commit, error) {
	if len(c.Events) == 0 {
		return c, fmt.Errorf("%w: the commit has no events", ErrInvalid)
	}
	if len(c.Events) > limits.EventsPerCommit {
		return c, fmt.Errorf("%w: the commit has %d events, at most %d are allowed", ErrTooLarge, len(c.Events), limits.EventsPerCommit)
	}
	if len(c.Conditions) > limits.Conditions {
		return c, fmt.Errorf("%w: the commit has %d conditions, at most %d are allowed", ErrTooLarge, len(c.Conditions), limits.Conditions)
	}
	if c.Key != "" {
		if err := validateText("idempotency key", c.Key, MaxKeyBytes); err != nil {
			return c, err
		}
		if len(c.Fingerprint) > MaxKeyBytes {
			return c, fmt.Errorf("%w: the fingerprint %q of key %q has %d bytes, at most %d are allowed: use a hash", ErrTooLarge, clip(c.Fingerprint), c.Key, len(c.Fingerprint), MaxKeyBytes)
		}
	} else if c.Fingerprint != "" {
		return c, fmt.Errorf("%w: the commit has the fingerprint %q but no key", ErrInvalid, clip(c.Fingerprint))
	}
	for i, condition := range c.Conditions {
		if err := condition.validate(); err != nil {
			return c, fmt.Errorf("condition %d: %w", i, err)
		}
	}
	c.Events = slices.Clone(c.Events)
	var at time.Time
	for i := range c.Events {
		e := &c.Events[i]
		if err := e.validate(limits); err != nil {
			return c, fmt.Errorf("event %d: %w", i, err)
		}
		if e.ID == uuid.Nil {
			id, err := uuid.NewV7()
			if err != nil {
				return c, fmt.Errorf("make an event id: %w", err)
			}
			e.ID = id
		}
		if e.Time.IsZero() {
			if at.IsZero() {
				at = now()
			}
			e.Time = at
		}
		if err := e.validateTime(); err != nil {
			return c, fmt.Errorf("event %d: %w", i, err)
		}
		e.Time = e.Time.UTC().Round(0)
	}
	if c.Key != "" && c.Fingerprint == "" {
		c.Fingerprint = c.fingerprint()
	}
	return c, nil
}

func (c Condition) validate() error {
	switch c.Kind {
	case ConditionStreamAt, ConditionStreamExists:
		if c.Revision.Version == 0 && c.Revision.Position != 0 {
			return fmt.Errorf("%w: revision of %q: version 0 has no position, got %d", ErrInvalid, c.Stream, c.Revision.Position)
		}
		if c.LastEvent != uuid.Nil && c.Revision.Version == 0 {
			return fmt.Errorf("%w: revision of %q: version 0 has no last event, got %s", ErrInvalid, c.Stream, c.LastEvent)
		}
		return c.Stream.Validate()
	case ConditionNoneMatch:
		return c.Query.Validate()
	default:
		return fmt.Errorf("%w: unknown condition kind %d: use StreamAt, StreamExists or NoneMatch", ErrInvalid, c.Kind)
	}
}

func (e *Event) validate(limits Limits) error {
	if err := e.Stream.Validate(); err != nil {
		return err
	}
	if err := validateText("event type", e.Type, MaxEventTypeBytes); err != nil {
		return err
	}
	if len(e.Tags) > limits.TagsPerEvent {
		return fmt.Errorf("%w: event %q has %d tags, at most %d are allowed", ErrTooLarge, e.Type, len(e.Tags), limits.TagsPerEvent)
	}
	size := len(e.Data)
	for i, tag := range e.Tags {
		if err := validateText("tag", tag, MaxTagBytes); err != nil {
			return fmt.Errorf("event %q: %w", e.Type, err)
		}
		if slices.Contains(e.Tags[:i], tag) {
			return fmt.Errorf("%w: event %q carries the tag %q twice", ErrInvalid, e.Type, clip(tag))
		}
		size += len(tag)
	}
	m := &e.Metadata
	for _, field := range []struct{ name, text string }{
		{"correlation id", m.CorrelationID}, {"causation id", m.CausationID}, {"actor", m.Actor}, {"trace parent", m.TraceParent}, {"codec", m.Codec},
	} {
		if !utf8.ValidString(field.text) {
			return fmt.Errorf("%w: event %q: the %s %q is not valid UTF-8", ErrInvalid, e.Type, field.name, clip(field.text))
		}
		size += len(field.text)
	}
	for k, v := range m.Extra {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return fmt.Errorf("%w: event %q: the extra metadata %q: %q is not valid UTF-8", ErrInvalid, e.Type, clip(k), clip(v))
		}
		size += len(k) + len(v)
	}
	if m.SchemaVersion < 0 {
		return fmt.Errorf("%w: event %q has the schema version %d", ErrInvalid, e.Type, m.SchemaVersion)
	}
	if size > limits.EventBytes {
		return fmt.Errorf("%w: event %q of stream %q has %d bytes, at most %d are allowed: keep large content elsewhere and store a reference", ErrTooLarge, e.Type, clip(e.Stream.String()), size, limits.EventBytes)
	}
	return nil
}

// validateTime demands what nanoseconds since 1970 can express.
func (e *Event) validateTime() error {
	if s := e.Time.Unix(); s < math.MinInt64/int64(time.Second)+1 || s > math.MaxInt64/int64(time.Second)-1 {
		return fmt.Errorf("%w: event %q has the time %s, outside the years 1678 to 2261", ErrInvalid, e.Type, e.Time)
	}
	return nil
}

func (c Commit) fingerprint() string {
	h := sha256.New()
	var length [binary.MaxVarintLen64]byte
	field := func(b []byte) {
		_, _ = h.Write(length[:binary.PutUvarint(length[:], uint64(len(b)))])
		_, _ = h.Write(b)
	}
	for i := range c.Events {
		e := &c.Events[i]
		field([]byte(e.Stream.String()))
		field([]byte(e.Type))
		field([]byte{byte(len(e.Tags))})
		for _, tag := range e.Tags {
			field([]byte(tag))
		}
		field(e.Data)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
