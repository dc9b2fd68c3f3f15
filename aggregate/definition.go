package aggregate

import (
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/deed-go/deed/eventstore"
)

// Event is something that happened. EventType is its name in the log: part of
// the stored contract, the same for every value of the Go type, and written
// down rather than derived, so that the Go type can be renamed.
//
// An event may also have a method Tags() []string; its result is stored as the
// event's tags, for queries and decision boundaries across streams.
type Event interface {
	EventType() string
}

// Events lists what a command decided: aggregate.Events(Deposited{500}). With no
// arguments nothing happens.
func Events(events ...Event) []Event { return events }

// Definition says what an aggregate is: its category, and how each of its
// events changes its state S. Make it with [Define], once, as a package
// variable. It is immutable and safe for concurrent use.
type Definition[S any] struct {
	category        string
	handlers        map[string]*handler[S]
	names           []string // in the order of the parts
	snapshotEvery   int
	snapshotVersion int
	structure       string
	mistakes        []error
}

type handler[S any] struct {
	name   string
	goType reflect.Type // never a pointer
	// durableOnly marks folds that see the recorded event: its position is known
	// only when it is durable.
	durableOnly bool
	apply       func(*eventstore.Encoding, *S, *eventstore.Recorded) error
	decode      func(*eventstore.Encoding, *eventstore.Recorded) (Event, error)
}

// Part is one thing a definition says: [On], [OnMeta], [SnapshotEvery] or
// [SnapshotVersion].
type Part[S any] struct {
	add func(*Definition[S])
}

// Define returns the definition of an aggregate of the category (ASCII
// letters, digits, '.' and '_', beginning with a letter). Mistakes are kept,
// and returned by Err and by everything that uses the definition, so that
// Define can initialise a package variable.
func Define[S any](category string, parts ...Part[S]) *Definition[S] {
	d := &Definition[S]{category: category, handlers: map[string]*handler[S]{}}
	if err := eventstore.ValidateCategory(category); err != nil {
		d.mistakes = append(d.mistakes, err)
	}
	for _, part := range parts {
		if part.add == nil {
			d.mistake("a part is the zero Part: use On, OnMeta, SnapshotEvery or SnapshotVersion")
			continue
		}
		part.add(d)
	}
	if len(d.handlers) == 0 && len(d.mistakes) == 0 {
		d.mistake("no event changes it: add an aggregate.On for each of its events")
	}
	if d.snapshotEvery > 0 {
		if err := survivesJSON(reflect.TypeFor[S](), nil); err != nil {
			d.mistake("SnapshotEvery: the state does not survive JSON: %w", err)
		}
		d.structure = structureOf(d)
	}
	return d
}

// On says how an event of type E changes the state. The fold must not fail,
// and must depend on nothing but its arguments: it runs again at every load. E
// may be the event's struct or a pointer to it; commands may return either,
// whatever On was given.
func On[S any, E Event](fold func(state *S, event E)) Part[S] {
	if fold == nil {
		return mistaken[S]("On was given a nil function for %s", reflect.TypeFor[E]())
	}
	return on(false, func(s *S, e E, _ *eventstore.Recorded) { fold(s, e) })
}

// OnMeta is [On] for folds that also look at how the event was recorded: its
// time, version, position, tags or metadata. The next command of the same
// aggregate waits until such an event is durable, because its position is not
// known before; prefer On where the event alone says enough.
func OnMeta[S any, E Event](fold func(state *S, event E, recorded eventstore.Recorded)) Part[S] {
	if fold == nil {
		return mistaken[S]("OnMeta was given a nil function for %s", reflect.TypeFor[E]())
	}
	return on(true, func(s *S, e E, r *eventstore.Recorded) { fold(s, e, *r) })
}

// SnapshotEvery keeps a snapshot of the state about every so many events, so
// that a load reads only what came after. A snapshot is a hint: whatever about
// it does not fit any more (the structure of the state or of the events, the
// [SnapshotVersion], the stream itself) makes the load replay every event. The
// state must survive JSON exactly: one that does not come back as it was, nil
// for an empty map left out by omitempty, a time in another location, two
// copies of what was one pointer, is not kept, which is counted, and logged
// once. It has no effect without [Options.Snapshots].
func SnapshotEvery[S any](events int) Part[S] {
	if events < 1 {
		return mistaken[S]("SnapshotEvery(%d): want at least 1 event", events)
	}
	return Part[S]{func(d *Definition[S]) { d.snapshotEvery = events }}
}

// SnapshotVersion throws away snapshots taken under another version. Raise it
// when a fold changes its meaning while the state type stays as it is.
func SnapshotVersion[S any](version int) Part[S] {
	return Part[S]{func(d *Definition[S]) { d.snapshotVersion = version }}
}

func mistaken[S any](format string, args ...any) Part[S] {
	return Part[S]{func(d *Definition[S]) { d.mistake(format, args...) }}
}

func (d *Definition[S]) mistake(format string, args ...any) {
	d.mistakes = append(d.mistakes, fmt.Errorf("%w: aggregate %q: "+format, append([]any{eventstore.ErrInvalid, d.category}, args...)...))
}

func on[S any, E Event](durableOnly bool, fold func(*S, E, *eventstore.Recorded)) Part[S] {
	eventType := reflect.TypeFor[E]()
	name, err := nameOf(eventType)
	if err != nil {
		return mistaken[S]("%w", err)
	}
	h := &handler[S]{name: name, goType: eventType, durableOnly: durableOnly}
	var decode func(*eventstore.Encoding, *eventstore.Recorded) (E, error)
	if eventType.Kind() == reflect.Pointer {
		h.goType = eventType.Elem()
		decode = func(enc *eventstore.Encoding, r *eventstore.Recorded) (E, error) {
			e := reflect.New(h.goType).Interface().(E)
			return e, enc.Decode(*r, e)
		}
	} else {
		decode = func(enc *eventstore.Encoding, r *eventstore.Recorded) (E, error) {
			var e E
			err := enc.Decode(*r, &e)
			return e, err
		}
	}
	h.apply = func(enc *eventstore.Encoding, s *S, r *eventstore.Recorded) error {
		e, err := decode(enc, r)
		if err != nil {
			return err
		}
		fold(s, e, r)
		return nil
	}
	h.decode = func(enc *eventstore.Encoding, r *eventstore.Recorded) (Event, error) { return decode(enc, r) }
	return Part[S]{func(d *Definition[S]) {
		if known, ok := d.handlers[name]; ok {
			d.mistake("two Ons are named %q: %s and %s: give each event type its own name", name, known.goType, h.goType)
			return
		}
		d.handlers[name] = h
		d.names = append(d.names, name)
	}}
}

var eventInterface = reflect.TypeFor[Event]()

// nameOf returns the event type's name, or what is wrong with the type.
func nameOf(t reflect.Type) (name string, err error) {
	if t.Kind() == reflect.Interface {
		return "", fmt.Errorf("On was given the interface %s: name the struct of the event", t)
	}
	elem := t
	if t.Kind() == reflect.Pointer {
		elem = t.Elem()
		if elem.Kind() == reflect.Pointer || elem.Kind() == reflect.Interface {
			return "", fmt.Errorf("On was given %s: name the struct of the event, or a pointer to it", t)
		}
	}
	name, err = callEventType(t)
	if err != nil {
		return "", err
	}
	if err := eventstore.OfTypes(name).Validate(); err != nil {
		return "", fmt.Errorf("event %s: EventType() returns %q: %w", t, name, err)
	}
	if elem.Kind() == reflect.Struct {
		for i := range elem.NumField() {
			f := elem.Field(i)
			if !f.Anonymous {
				continue
			}
			for _, embedded := range []reflect.Type{f.Type, reflect.PointerTo(f.Type)} {
				if embedded.Kind() == reflect.Interface || !embedded.Implements(eventInterface) {
					continue
				}
				if inherited, err := callEventType(embedded); err == nil && inherited == name {
					return "", fmt.Errorf("event %s inherits its name %q from the embedded %s: give it its own EventType method", t, name, f.Type)
				}
			}
		}
	}
	return name, nil
}

func callEventType(t reflect.Type) (name string, err error) {
	defer func() {
		if p := recover(); p != nil {
			name, err = "", fmt.Errorf("event %s: EventType() panics on the zero value (%v): return a constant", t, p)
		}
	}()
	value := reflect.Zero(t)
	if t.Kind() == reflect.Pointer {
		value = reflect.New(t.Elem())
	}
	return value.Interface().(Event).EventType(), nil
}

// Category returns the category of the aggregate's streams.
func (d *Definition[S]) Category() string { return d.category }

// EventTypes returns the names of the events the aggregate knows, in the order
// in which they were defined.
func (d *Definition[S]) EventTypes() []string { return slices.Clone(d.names) }

// Err returns every mistake in the definition, joined; nil if there are none.
func (d *Definition[S]) Err() error { return errors.Join(d.mistakes...) }

// Stream returns the stream of the aggregate with the id.
func (d *Definition[S]) Stream(id string) eventstore.Stream {
	return eventstore.Stream{Category: d.category, ID: id}
}

// Apply decodes a recorded event and folds it into the state. An event without
// an On is an error that wraps [eventstore.ErrUnknownType]; the state is then
// unchanged. A panic of the fold passes through.
func (d *Definition[S]) Apply(enc *eventstore.Encoding, state *S, r eventstore.Recorded) error {
	return d.apply(enc, state, &r)
}

// Decode returns the recorded event as the Go type that its On takes. An event
// without an On is an error that wraps [eventstore.ErrUnknownType].
func (d *Definition[S]) Decode(enc *eventstore.Encoding, r eventstore.Recorded) (Event, error) {
	h, err := d.handler(enc, &r)
	if err != nil {
		return nil, err
	}
	return h.decode(enc, &r)
}

func (d *Definition[S]) apply(enc *eventstore.Encoding, state *S, r *eventstore.Recorded) error {
	h, err := d.handler(enc, r)
	if err != nil {
		return err
	}
	return h.apply(enc, state, r)
}

func (d *Definition[S]) handler(enc *eventstore.Encoding, r *eventstore.Recorded) (*handler[S], error) {
	if h := d.handlers[enc.CurrentType(r.Type)]; h != nil {
		return h, nil
	}
	return nil, &eventstore.DecodeError{Event: *r, Cause: fmt.Errorf("%w: aggregate %q has no On for it, and deciding on half of a history would be wrong: add aggregate.On, or eventstore.Rename if it has a new name", eventstore.ErrUnknownType, d.category)}
}
