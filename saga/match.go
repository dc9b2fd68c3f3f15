package saga

import (
	"fmt"
	"reflect"
	"slices"

	"github.com/deed-go/deed/eventstore"
)

// Event is an event of the domain; any aggregate's event is one.
type Event interface{ EventType() string }

// Match says which events of a type an [Await] takes. The zero Match takes any.
type Match struct {
	// StreamID matches the id of the event's stream, in whatever category.
	StreamID string `json:"stream_id,omitempty"`
	// Category further constrains the stream.
	Category string `json:"category,omitempty"`
	// Tag matches events that carry it.
	Tag string `json:"tag,omitempty"`
}

// Where matches events of streams with the id: the aggregate's id.
func Where(streamID string) Match { return Match{StreamID: streamID} }

// WhereStream matches events of one stream. When the log is long it finds
// events of the past faster than [Where].
func WhereStream(s eventstore.Stream) Match { return Match{StreamID: s.ID, Category: s.Category} }

// WhereTag matches events that carry the tag.
func WhereTag(tag string) Match { return Match{Tag: tag} }

func (m Match) matches(r *eventstore.Recorded) bool {
	return (m.StreamID == "" || m.StreamID == r.Stream.ID) &&
		(m.Category == "" || m.Category == r.Stream.Category) &&
		(m.Tag == "" || slices.Contains(r.Tags, m.Tag))
}

// takes reports whether the event ends the wait.
func (w *watch) takes(r *eventstore.Recorded) bool {
	return r.Position > w.Since && !slices.Contains(w.Skip, r.Position) && slices.Contains(w.Types, r.Type) && w.Match.matches(r)
}

func (w *watch) query() eventstore.Query {
	item := eventstore.Item{Types: w.Types}
	switch {
	case w.Match.StreamID != "" && w.Match.Category != "":
		item.Stream = eventstore.Stream{Category: w.Match.Category, ID: w.Match.StreamID}
	case w.Match.Category != "":
		item.Category = w.Match.Category
	}
	if w.Match.Tag != "" {
		item.Tags = []string{w.Match.Tag}
	}
	return eventstore.Match(item)
}

// eventTypeOf returns the name of the event type E, which may be a pointer.
func eventTypeOf[E Event]() (string, error) {
	t := reflect.TypeFor[E]()
	if t.Kind() == reflect.Interface {
		return "", fmt.Errorf("%w: %s is an interface: name the event's own type", eventstore.ErrInvalid, t)
	}
	var event Event
	if t.Kind() == reflect.Pointer {
		event, _ = reflect.New(t.Elem()).Interface().(E)
	} else {
		var zero E
		event = zero
	}
	name := event.EventType()
	if err := eventstore.OfTypes(name).Validate(); err != nil {
		return "", fmt.Errorf("event type of %s: %w", t, err)
	}
	return name, nil
}

func decodeEvent[E Event](enc *eventstore.Encoding, r eventstore.Recorded) (E, error) {
	t := reflect.TypeFor[E]()
	if t.Kind() == reflect.Pointer {
		value := reflect.New(t.Elem())
		err := enc.Decode(r, value.Interface())
		event, _ := value.Interface().(E)
		return event, err
	}
	var event E
	err := enc.Decode(r, &event)
	return event, err
}
