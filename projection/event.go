package projection

import (
	"fmt"
	"reflect"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/logreader"
)

// Event is what handlers take: a struct, or a pointer to one, that says under
// which name it is stored. A struct without pointers, slices, maps and interfaces
// is decoded once for all projections that take it, and each is given a copy.
type Event interface{ EventType() string }

// kind is what the definition of a handler needs to know of its event type.
type kind struct {
	name    string
	mistake error
	elem    reflect.Type // what a pointer event type points to
	// shared is the event type if handlers may be given copies of one decoded value.
	shared reflect.Type
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
	if k.elem == nil && isolated(t) {
		k.shared = t
	}
	return k
}

// isolated reports whether a copy of a value of the type has nothing in common
// with the value that could be changed: whatever a handler does to its copy, or
// keeps of it, others do not see.
func isolated(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Bool, reflect.String, reflect.Float32, reflect.Float64,
		reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return true
	case reflect.Array:
		return isolated(t.Elem())
	case reflect.Struct:
		if t == reflect.TypeFor[time.Time]() {
			return true // its location is never changed
		}
		for i := range t.NumField() {
			if !isolated(t.Field(i).Type) {
				return false
			}
		}
		return true
	}
	return false
}

// decodeItems decodes the items, and shares with other projections what may be
// shared. What another one is decoding just now is looked at again at the end.
func decodeItems(f folder, items []item) {
	var later []int
	for i := range items {
		if f.decode(&items[i]); items[i].elsewhere {
			later = append(later, i)
		}
	}
	for _, i := range later {
		f.decode(&items[i])
	}
	for i := range items {
		items[i].memo = nil // whatever is decoded again is decoded for this item alone
	}
}

// decodeWith decodes the event, or takes what another projection has decoded.
func (it *item) decodeWith(shared reflect.Type, decode func() (any, error)) {
	var toMake *logreader.Entry
	if shared != nil && it.memo != nil {
		var value any
		value, toMake = it.memo.Take(shared)
		again := it.elsewhere
		it.elsewhere = false
		switch {
		case value != nil:
			it.value = value
			return
		case toMake == nil && !again:
			it.elsewhere = true
			return
		}
	}
	it.value, it.problem = guard(decode)
	if toMake != nil && it.problem == nil {
		toMake.Give(it.value)
	}
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
