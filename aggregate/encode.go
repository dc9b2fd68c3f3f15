package aggregate

import (
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

type tagged interface{ Tags() []string }

// Encode returns the event as the log would be given it: for test kits and
// imports that write to a store without deciding. It refuses what Execute would
// refuse: a nil event, and one without an On in the definition.
func (d *Definition[S]) Encode(enc *eventstore.Encoding, stream eventstore.Stream, event Event, m eventstore.Metadata, at time.Time) (eventstore.Event, error) {
	if err := d.Err(); err != nil {
		return eventstore.Event{}, err
	}
	return d.encode(enc, stream, event, m, at)
}

func (d *Definition[S]) encode(enc *eventstore.Encoding, stream eventstore.Stream, event Event, m eventstore.Metadata, at time.Time) (eventstore.Event, error) {
	goType := reflect.TypeOf(event)
	if goType == nil {
		return eventstore.Event{}, fmt.Errorf("%w: aggregate %q: the event is nil", eventstore.ErrInvalid, d.category)
	}
	if goType.Kind() == reflect.Pointer {
		if reflect.ValueOf(event).IsNil() {
			return eventstore.Event{}, fmt.Errorf("%w: aggregate %q: the event is a nil %s", eventstore.ErrInvalid, d.category, goType)
		}
		goType = goType.Elem()
	}
	name := event.EventType()
	h := d.handlers[name]
	if h == nil {
		return eventstore.Event{}, fmt.Errorf("%w: aggregate %q has no On for event %q (%T): add one before a command may return it", eventstore.ErrUnknownType, d.category, name, event)
	}
	if h.goType != goType {
		return eventstore.Event{}, fmt.Errorf("%w: aggregate %q: event %q is %s in its On, but a %T was returned", eventstore.ErrInvalid, d.category, name, h.goType, event)
	}
	e := eventstore.Event{Stream: stream, Type: name, Metadata: m, Time: at}
	var err error
	if e.Data, err = enc.Encode(name, event, &e.Metadata); err != nil {
		return e, err
	}
	if t, ok := event.(tagged); ok {
		e.Tags = slices.Clone(t.Tags())
	}
	if e.ID, err = uuid.NewV7(); err != nil {
		return e, fmt.Errorf("make an event id: %w", err)
	}
	return e, nil
}

// recorded is the event as a reader will see it, but for the position.
func recorded(e *eventstore.Event, version uint64) eventstore.Recorded {
	return eventstore.Recorded{
		ID: e.ID, Stream: e.Stream, Version: version,
		Type: e.Type, Tags: e.Tags, Data: e.Data, Metadata: e.Metadata, Time: e.Time,
	}
}
