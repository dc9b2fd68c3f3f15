package projection

import (
	"fmt"
	"reflect"

	"github.com/deed-go/deed/eventstore"
)

// Event is what handlers take: a struct, or a pointer to one, that says under
// which name it is stored.
type Event interface{ EventType() string }

// kind is what the definition of a handler needs to know of its event type.
type kind struct {
	name    string
	mistake error
	elem    reflect.Type // what a pointer event type points to
}

func kindOf[E Event]() kind {
	t := reflect.TypeFor[E]()
	if t.Kind() == reflect.Interface {
		return kind{mistake: fmt.Errorf("%w: the handler takes the interface %s: give it the event's own type", eventstore.ErrInvalid, t)}
	}
	k := kind{}
	value := reflect.Zero(t)
	if t.Kind() == reflect.Pointer {
		k.elem = t.Elem()
		if k.elem.Kind() == reflect.Pointer || k.elem.Kind() == reflect.Interface {
			return kind{mistake: fmt.Errorf("%w: the handler takes %s: give it the event's own type, or one pointer to it", eventstore.ErrInvalid, t)}
		}
		value = reflect.New(k.elem)
	}
	k.name = value.Interface().(Event).EventType()
	if err := inheritsName(t, k.name); err != nil {
		k.mistake = err
	} else if err := eventstore.OfTypes(k.name).Validate(); err != nil {
		k.mistake = fmt.Errorf("event %s: %w", t, err)
	}
	return k
}

// inheritsName finds events whose EventType comes from an embedded event: two
// types would be stored under one name.
func inheritsName(t reflect.Type, name string) error {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.Anonymous {
			continue
		}
		embedded := f.Type
		if embedded.Kind() == reflect.Interface {
			continue
		}
		if embedded.Kind() == reflect.Pointer {
			embedded = embedded.Elem()
		}
		if e, ok := reflect.New(embedded).Interface().(Event); ok && e.EventType() == name {
			return fmt.Errorf("%w: event %s has its name %q from the embedded %s: give it an EventType method of its own", eventstore.ErrInvalid, t, name, embedded)
		}
	}
	return nil
}

// decodeInto returns the function that decodes stored events of type E; the
// result holds an E.
func decodeInto[E Event](k kind) func(*eventstore.Encoding, *eventstore.Recorded) (any, error) {
	if k.elem != nil {
		return func(enc *eventstore.Encoding, r *eventstore.Recorded) (any, error) {
			p := reflect.New(k.elem).Interface()
			return p, enc.Decode(*r, p)
		}
	}
	return func(enc *eventstore.Encoding, r *eventstore.Recorded) (any, error) {
		p := new(E)
		return p, enc.Decode(*r, p)
	}
}

// valueOf gives back the E that decodeInto has decoded.
func valueOf[E Event](decoded any) E {
	if p, ok := decoded.(*E); ok {
		return *p
	}
	return decoded.(E)
}
