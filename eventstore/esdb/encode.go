package esdb

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// format is the version of what is stored; a program refuses newer ones.
const format = 1

// envelope is the metadata of an event as it is stored: JSON, under names that
// never change. What EventStoreDB itself has a name for has that name.
type envelope struct {
	Format int    `json:"deed"`
	Time   string `json:"time"`
	// ID is that of the event, where it is not the one that the server knows.
	ID   string   `json:"id,omitzero"`
	Tags []string `json:"tags,omitempty"`
	// Index and Of are the event's place in its commit, from 0 on, and how many
	// events that has; nothing in a commit of one.
	Index int `json:"index,omitzero"`
	Of    int `json:"of,omitzero"`
	// Key and Fingerprint are the commit's, and stand in its first event.
	Key         string `json:"key,omitzero"`
	Fingerprint string `json:"fingerprint,omitzero"`

	CorrelationID string            `json:"$correlationId,omitzero"`
	CausationID   string            `json:"$causationId,omitzero"`
	Actor         string            `json:"actor,omitzero"`
	TraceParent   string            `json:"trace,omitzero"`
	SchemaVersion int               `json:"schema,omitzero"`
	Codec         string            `json:"codec,omitzero"`
	Extra         map[string]string `json:"extra,omitempty"`
}

// encode makes the events of a prepared commit ready to be sent. Their ids on
// the wire belong to this one call of Append: the server answers "written" to
// whatever carries the ids of events that it has, and would so take a second
// commit of the same events, which must conflict, for a repetition of the
// first. An id that was given by the caller therefore travels in the metadata.
func encode(c eventstore.Commit, given []bool) ([]driver.Event, error) {
	events := make([]driver.Event, len(c.Events))
	for i := range c.Events {
		e := &c.Events[i]
		m := envelope{
			Format: format, Time: e.Time.Format(time.RFC3339Nano), Tags: e.Tags,
			CorrelationID: e.Metadata.CorrelationID, CausationID: e.Metadata.CausationID, Actor: e.Metadata.Actor,
			TraceParent: e.Metadata.TraceParent, SchemaVersion: e.Metadata.SchemaVersion, Codec: e.Metadata.Codec, Extra: e.Metadata.Extra,
		}
		id := e.ID
		if given[i] {
			var err error
			if id, err = uuid.NewV7(); err != nil {
				return nil, fmt.Errorf("make an event id: %w", err)
			}
			m.ID = e.ID.String()
		}
		if len(c.Events) > 1 {
			m.Index, m.Of = i, len(c.Events)
		}
		if i == 0 {
			m.Key, m.Fingerprint = c.Key, c.Fingerprint
		}
		metadata, err := json.Marshal(&m)
		if err != nil {
			return nil, fmt.Errorf("%w: event %d: its metadata cannot be stored: %w", eventstore.ErrInvalid, i, err)
		}
		events[i] = driver.Event{ID: id, Type: e.Type, JSON: isJSON(e), Data: e.Data, Metadata: metadata}
	}
	return events, nil
}

// isJSON reports whether the data may be marked as JSON: consumers of the
// server's parse what is marked so.
func isJSON(e *eventstore.Event) bool {
	return (e.Metadata.Codec == "" || e.Metadata.Codec == "json") && jsontext.Value(e.Data).IsValid()
}

// decoded is an event with what only this package needs to know.
type decoded struct {
	eventstore.Recorded
	wire     uuid.UUID
	revision uint64
	index    int
	of       int // at least 1
	key      string
	print    string
}

// errForeign: the event is not one of this log.
var errForeign = errors.New("the event was not written by deed")

// decode returns errForeign for events that are none of this log: those of the
// system, links, other logs, and other programs.
//
// An event that is one of this log but cannot be read (of a newer format, or
// damaged) is returned with the error as far as it is known: its stream, version,
// position and type. It must stop whoever asks for it, and nobody else: see
// concerns. One without a position of its own is returned as an error alone.
func (s *Store) decode(r *driver.Recorded) (decoded, error) {
	name, ours := strings.CutPrefix(r.Stream, s.prefix)
	if !ours || strings.HasPrefix(r.Type, "$") {
		return decoded{}, errForeign
	}
	stream, err := eventstore.ParseStream(name)
	if err != nil {
		return decoded{}, errForeign
	}
	// Most foreign metadata is told from ours by its first look.
	if len(r.Metadata) == 0 || r.Metadata[0] != '{' {
		return decoded{}, errForeign
	}
	var mark struct {
		Format int `json:"deed"`
	}
	var m envelope
	broken := json.Unmarshal(r.Metadata, &m)
	if broken != nil {
		if json.Unmarshal(r.Metadata, &mark) != nil {
			return decoded{}, errForeign
		}
		m.Format = mark.Format
	}
	switch {
	case m.Format == 0:
		return decoded{}, errForeign
	case r.Position.Commit != r.Position.Prepare:
		return decoded{}, fmt.Errorf("%w: %s has the commit position %d and the prepare position %d: it belongs to an explicit transaction of the old TCP protocol, or the server is older than 22.6, and has no position of its own", eventstore.ErrGap, where(r), r.Position.Commit, r.Position.Prepare)
	case r.Position.Commit == 0 || r.Position.Commit > 1<<63-1:
		return decoded{}, fmt.Errorf("%w: %s has the position %d, which is none: servers older than 22.6 do not tell", eventstore.ErrGap, where(r), r.Position.Commit)
	}
	e := decoded{
		Recorded: eventstore.Recorded{ID: r.ID, Stream: stream, Version: r.Revision + 1, Position: eventstore.Position(r.Position.Commit), Type: r.Type},
		wire:     r.ID, revision: r.Revision, of: 1,
	}
	switch {
	case m.Format > format || m.Format < 0:
		return e, fmt.Errorf("%w: %s has the format %d, this program knows %d: use a newer one", eventstore.ErrNewerVersion, where(r), m.Format, format)
	case broken != nil:
		return e, fmt.Errorf("%w: the metadata of %s: %w", eventstore.ErrDecode, where(r), broken)
	}
	at, err := time.Parse(time.RFC3339Nano, m.Time)
	if err != nil {
		return e, fmt.Errorf("%w: the time of %s: %w", eventstore.ErrDecode, where(r), err)
	}
	if m.ID != "" {
		id, err := uuid.Parse(m.ID)
		if err != nil {
			return e, fmt.Errorf("%w: the id of %s: %w", eventstore.ErrDecode, where(r), err)
		}
		e.ID = id
	}
	e.Tags, e.Data, e.Time = m.Tags, r.Data, at.UTC()
	e.Metadata = eventstore.Metadata{
		CorrelationID: m.CorrelationID, CausationID: m.CausationID, Actor: m.Actor, TraceParent: m.TraceParent,
		SchemaVersion: m.SchemaVersion, Codec: m.Codec, Extra: m.Extra,
	}
	e.index, e.of, e.key, e.print = m.Index, max(m.Of, 1), m.Key, m.Fingerprint
	return e, nil
}

// concerns reports whether the query may select an event of which stream and
// type are all that is known.
func concerns(q eventstore.Query, e *eventstore.Recorded) bool {
	q.Items = slices.Clone(q.Items)
	for i := range q.Items {
		q.Items[i].Tags = nil
	}
	return q.Matches(e)
}

func where(r *driver.Recorded) string {
	return fmt.Sprintf("event %d of stream %q, of type %q", r.Revision, r.Stream, r.Type)
}

// parseMarker reads the id of the log from its event.
func parseMarker(data []byte) (string, error) {
	var marker struct {
		ID string `json:"id"`
	}
	err := json.Unmarshal(data, &marker)
	if err == nil {
		var id uuid.UUID
		if id, err = uuid.Parse(marker.ID); err == nil {
			return id.String(), nil
		}
	}
	return "", fmt.Errorf("%w: the id of the log, %q: %w", eventstore.ErrDecode, data, err)
}
