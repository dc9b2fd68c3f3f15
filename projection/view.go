package projection

import (
	"errors"
	"fmt"
	"iter"
	"reflect"
	"runtime"
	"slices"
	"strings"

	"github.com/deed-go/deed/eventstore"
)

// ViewDefinition is a read model of rows of type R, each under a string key.
// Make it with [View] or [Of], once, as a package variable; it is immutable and
// safe for concurrent use. Read it with package query.
//
// Rows are stored as JSON, so every field of R must survive that: a definition
// whose row has unexported fields, fields tagged json:"-", two fields of one
// name or the marshaller of a type it embeds (and none of its own) is a mistake
// that Err returns.
type ViewDefinition[R any] struct {
	name     string
	handlers map[string]*viewHandler[R] // by current event type
	category string                     // of Of; empty otherwise
	parts    int
	version  int // 0 is 1
	heldBack bool
	inlined  bool
	indexes  []*rowIndex[R]
	parkedBy func(eventstore.Recorded) string // nil: see ParkedBy
	mistakes []error
}

// viewHandler folds one event type.
type viewHandler[R any] struct {
	decode func(enc *eventstore.Encoding, r *eventstore.Recorded) (any, error)
	shared reflect.Type                                     // see kind
	keys   func(value any, r *eventstore.Recorded) []string // nil: the stream's id
	fold   func(enc *eventstore.Encoding, row *R, key string, value any, r *eventstore.Recorded) error
	remove bool
}

// ViewPart is one handler of a view: [On], [OnMeta], [OnKeyed] or [DeleteOn].
type ViewPart[R any] func(*ViewDefinition[R])

// View defines a read model by its handlers, one for each event type that it
// is made from; events of other types are skipped. A row that an event is the
// first to touch begins as the zero R.
//
// The name may have ASCII letters, digits, '.', '_' and '-'. It names what is
// stored: a view with another name is another view, filled from the beginning
// of the log. A view whose handlers have changed keeps the rows that the old
// ones made: give it another [ViewDefinition.Version], which is built beside them.
func View[R any](name string, parts ...ViewPart[R]) *ViewDefinition[R] {
	v := &ViewDefinition[R]{name: name, handlers: map[string]*viewHandler[R]{}}
	v.check()
	if len(parts) == 0 {
		v.mistake("%w: it has no handlers: add projection.On, OnMeta, OnKeyed or DeleteOn", eventstore.ErrInvalid)
	}
	for _, part := range parts {
		part(v)
	}
	return v
}

func (v *ViewDefinition[R]) check() {
	if err := validateName(v.name); err != nil {
		v.mistakes = append(v.mistakes, err)
	}
	if err := storable(reflect.TypeFor[R]()); err != nil {
		v.mistakes = append(v.mistakes, err)
	}
}

func (v *ViewDefinition[R]) mistake(format string, a ...any) {
	v.mistakes = append(v.mistakes, fmt.Errorf(format, a...))
}

func handle[R any, E Event](h viewHandler[R]) ViewPart[R] {
	return func(v *ViewDefinition[R]) {
		k := kindOf[E]()
		if k.mistake != nil {
			v.mistakes = append(v.mistakes, k.mistake)
			return
		}
		if _, ok := v.handlers[k.name]; ok {
			v.mistake("%w: event type %q has two handlers: merge them, or make two views", eventstore.ErrInvalid, k.name)
			return
		}
		h.decode, h.shared = decodeInto[E](k), k.shared
		v.handlers[k.name] = &h
	}
}

func missing[R any](what string) ViewPart[R] {
	return func(v *ViewDefinition[R]) {
		v.mistake("%w: %s is nil", eventstore.ErrInvalid, what)
	}
}

// On folds events of type E into the row whose key is the ID of the event's
// stream. Streams of different categories with the same ID share a row.
//
// A fold is a plain function of the row and the event: it must not do I/O nor
// read the clock, because it runs again when the view is rebuilt.
func On[R any, E Event](fold func(*R, E)) ViewPart[R] {
	if fold == nil {
		return missing[R]("the fold given to projection.On")
	}
	return handle[R, E](viewHandler[R]{
		fold: func(_ *eventstore.Encoding, row *R, _ string, value any, _ *eventstore.Recorded) error {
			fold(row, valueOf[E](value))
			return nil
		},
	})
}

// OnMeta is [On] for folds that look at the stream, position, time or metadata
// of the event too.
func OnMeta[R any, E Event](fold func(*R, E, eventstore.Recorded)) ViewPart[R] {
	if fold == nil {
		return missing[R]("the fold given to projection.OnMeta")
	}
	return handle[R, E](viewHandler[R]{
		fold: func(_ *eventstore.Encoding, row *R, _ string, value any, r *eventstore.Recorded) error {
			fold(row, valueOf[E](value), *r)
			return nil
		},
	})
}

// OnKeyed folds events of type E into the rows under the keys that keys
// returns: none, one or several; a key that is returned twice is folded once.
// An empty key is an error of the handler.
func OnKeyed[R any, E Event](keys func(E, eventstore.Recorded) []string, fold func(row *R, key string, e E, r eventstore.Recorded)) ViewPart[R] {
	if keys == nil || fold == nil {
		return missing[R]("a function given to projection.OnKeyed")
	}
	return handle[R, E](viewHandler[R]{
		keys: func(value any, r *eventstore.Recorded) []string { return keys(valueOf[E](value), *r) },
		fold: func(_ *eventstore.Encoding, row *R, key string, value any, r *eventstore.Recorded) error {
			fold(row, key, valueOf[E](value), *r)
			return nil
		},
	})
}

// DeleteOn removes the row whose key is the ID of the event's stream. A later
// event of the stream begins a new row.
func DeleteOn[R any, E Event]() ViewPart[R] {
	return handle[R, E](viewHandler[R]{remove: true})
}

// Foldable is a fold with a name for each of its event types: an aggregate's
// definition is one.
type Foldable[S any] interface {
	// Category is that of the streams to fold.
	Category() string
	// EventTypes are the current names of the types to fold.
	EventTypes() []string
	// Err returns the mistakes in the definition.
	Err() error
	// Apply decodes the event and folds it into the state.
	Apply(enc *eventstore.Encoding, state *S, r eventstore.Recorded) error
}

// Of keeps the state of every stream of an aggregate as a row under the
// stream's ID: the same fold, to be queried.
func Of[S any](name string, fold Foldable[S]) *ViewDefinition[S] {
	v := &ViewDefinition[S]{name: name, handlers: map[string]*viewHandler[S]{}}
	v.check()
	if fold == nil {
		v.mistake("%w: the definition given to projection.Of is nil", eventstore.ErrInvalid)
		return v
	}
	if err := fold.Err(); err != nil {
		v.mistakes = append(v.mistakes, err)
		return v
	}
	v.category = fold.Category()
	for _, t := range fold.EventTypes() {
		v.handlers[t] = &viewHandler[S]{
			fold: func(enc *eventstore.Encoding, row *S, _ string, _ any, r *eventstore.Recorded) error {
				return fold.Apply(enc, row, *r)
			},
		}
	}
	if len(v.handlers) == 0 {
		v.mistake("%w: the definition of %q handles no event types", eventstore.ErrInvalid, v.category)
	}
	return v
}

// Name returns the view's name, with its version if that is not 1, as in
// "report/v2".
func (v *ViewDefinition[R]) Name() string { return versionName(v.name, v.version) }

// Err returns the mistakes in the definition, joined; nil if there are none.
func (v *ViewDefinition[R]) Err() error {
	return mistakes(v.Name(), v.mistakes, checkInline(v.inlined, v.parts, v.version))
}

// Partitioned returns the view divided into n parts, 1 to 128, that are folded
// at the same time, here and in other processes that share the state; 1 is the
// default. A row belongs to one of them, by its key, so each row gets its events
// in order. Rows of different parts may be at different positions: whoever reads
// with query.AtLeast waits for all.
//
// The number is part of what is stored: another one needs another [ViewDefinition.Version].
func (v *ViewDefinition[R]) Partitioned(n int) *ViewDefinition[R] {
	w := *v
	w.parts = n
	if err := checkPartitions(n); err != nil {
		w.mistakes = append(slices.Clip(w.mistakes), err)
	}
	return &w
}

func (v *ViewDefinition[R]) partitions() int { return v.parts }

func (v *ViewDefinition[R]) selection(enc *eventstore.Encoding, p partition) eventstore.Query {
	i := eventstore.Item{Category: v.category, Types: enc.StoredTypes(sortedKeys(v.handlers)...)}
	if v.category != "" {
		i.Slices = p.slices() // a row of Of is a stream
	}
	return eventstore.Match(i)
}

// owns reports whether the row of the key belongs to the partition.
func (v *ViewDefinition[R]) owns(p partition, key string) bool {
	return p.of <= 1 || p.owns(eventstore.Stream{Category: v.category, ID: key})
}

// Entry is a row of a view and its key.
type Entry[R any] struct {
	Key string
	Row R
}

// Row reads one row within a transaction on the state; false if there is none.
// Package query is the comfortable way to read views.
func (v *ViewDefinition[R]) Row(tx StateTx, key string) (R, bool, error) {
	var row R
	v, err := v.reading(tx)
	if err != nil {
		return row, false, err
	}
	data, ok, err := tx.Get(v.table(), key)
	if err != nil || !ok {
		return row, false, err
	}
	err = v.decodeRow(key, data, &row)
	return row, err == nil, err
}

// Rows yields rows in the byte order of their keys, within a transaction on
// the state.
func (v *ViewDefinition[R]) Rows(tx StateTx, r Range) iter.Seq2[Entry[R], error] {
	return func(yield func(Entry[R], error) bool) {
		v, err := v.reading(tx)
		if err != nil {
			yield(Entry[R]{}, err)
			return
		}
		for stored, err := range tx.Scan(v.table(), r) {
			entry := Entry[R]{Key: stored.Key}
			if err == nil {
				err = v.decodeRow(stored.Key, stored.Value, &entry.Row)
			}
			if !yield(entry, err) || err != nil {
				return
			}
		}
	}
}

func (v *ViewDefinition[R]) table() string { return "view." + v.Name() }

func (v *ViewDefinition[R]) decodeRow(key string, data []byte, row *R) error {
	if err := eventstore.JSON().Unmarshal(data, row); err != nil {
		return fmt.Errorf("row %q of view %q does not decode into %T: its shape has changed: rebuild the view: %w", key, v.Name(), *row, errors.Join(errRowShape, err))
	}
	return nil
}

// errRowShape marks stored rows that the program's row type cannot read.
var errRowShape = errors.New("stored row does not fit")

// storable refuses row types that lose fields when stored as JSON: what a fold
// has kept there would be gone whenever the row is read back.
func storable(t reflect.Type) error {
	return storableAt(t, t.String(), nil)
}

var (
	jsonMarshaler   = reflect.TypeFor[interface{ MarshalJSON() ([]byte, error) }]()
	jsonUnmarshaler = reflect.TypeFor[interface{ UnmarshalJSON([]byte) error }]()
	textMarshaler   = reflect.TypeFor[interface{ MarshalText() ([]byte, error) }]()
	textUnmarshaler = reflect.TypeFor[interface{ UnmarshalText([]byte) error }]()
)

func storableAt(t reflect.Type, path string, seen []reflect.Type) error {
	if slices.Contains(seen, t) {
		return nil
	}
	if err := lendsMarshaller(t, path); err != nil {
		return err
	}
	pointer := reflect.PointerTo(t)
	if pointer.Implements(jsonMarshaler) && pointer.Implements(jsonUnmarshaler) ||
		pointer.Implements(textMarshaler) && pointer.Implements(textUnmarshaler) {
		return nil
	}
	seen = append(seen, t)
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Array, reflect.Map:
		return storableAt(t.Elem(), path, seen)
	case reflect.Struct:
		return storableFields(t, path, seen, map[string]string{})
	case reflect.Chan, reflect.Func, reflect.UnsafePointer, reflect.Complex64, reflect.Complex128, reflect.Uintptr:
		return fmt.Errorf("%w: the row's %s is a %s, which cannot be stored as JSON", eventstore.ErrInvalid, path, t)
	case reflect.Interface:
		return fmt.Errorf("%w: the row's %s is the interface %s, which does not decode back into what it held: use a concrete type", eventstore.ErrInvalid, path, t)
	}
	return nil
}

// storableFields looks at the fields of a struct, and of those it embeds.
// paths has the field that is stored under each name.
func storableFields(t reflect.Type, path string, seen []reflect.Type, paths map[string]string) error {
	for i := range t.NumField() {
		f := t.Field(i)
		at := path + "." + f.Name
		tag := f.Tag.Get("json")
		name, _, _ := strings.Cut(tag, ",")
		if f.Anonymous && name == "" {
			embedded := f.Type
			if embedded.Kind() == reflect.Pointer {
				embedded = embedded.Elem()
			}
			if embedded.Kind() == reflect.Struct && (f.IsExported() || f.Type.Kind() == reflect.Struct) {
				if slices.Contains(seen, embedded) {
					return fmt.Errorf("%w: the row's field %s embeds %s in itself: give the field a name", eventstore.ErrInvalid, at, embedded)
				}
				if err := lendsMarshaller(embedded, at); err != nil {
					return err
				}
				if err := storableFields(embedded, at, append(seen, embedded), paths); err != nil {
					return err
				}
				continue
			}
		}
		if !f.IsExported() {
			if f.Name == "_" {
				continue
			}
			return fmt.Errorf("%w: the row's field %s is unexported and would not be stored: export it, or give its type MarshalJSON and UnmarshalJSON", eventstore.ErrInvalid, at)
		}
		if tag == "-" {
			return fmt.Errorf("%w: the row's field %s is tagged json:\"-\" and would not be stored", eventstore.ErrInvalid, at)
		}
		if name == "" {
			name = f.Name
		}
		if other, taken := paths[name]; taken {
			return fmt.Errorf("%w: the row's fields %s and %s would both be stored as %q, and one of them lost: give them different names", eventstore.ErrInvalid, other, at, name)
		}
		paths[name] = at
		if err := storableAt(f.Type, at, seen); err != nil {
			return err
		}
	}
	return nil
}

// lendsMarshaller refuses structs that have a marshaller from a type they
// embed: it would store that type, and nothing of their other fields.
func lendsMarshaller(t reflect.Type, path string) error {
	if t.Kind() != reflect.Struct || t.NumField() < 2 {
		return nil
	}
	for _, names := range [][]string{{"MarshalJSON", "UnmarshalJSON"}, {"MarshalText", "UnmarshalText"}} {
		own := 0
		for _, name := range names {
			switch from, has := lender(t, name); {
			case from != nil:
				return fmt.Errorf("%w: the row's %s has %s from the embedded %s, which would store nothing of the other fields: give the field a name, or %s methods MarshalJSON and UnmarshalJSON of its own",
					eventstore.ErrInvalid, path, name, from, t)
			case has:
				own++
			}
		}
		if own == len(names) {
			return nil
		}
	}
	return nil
}

// lender returns the embedded type whose method t has; nil if the method is
// t's own, or it has none.
func lender(t reflect.Type, name string) (from reflect.Type, has bool) {
	method, ok := t.MethodByName(name)
	if !ok {
		if method, ok = reflect.PointerTo(t).MethodByName(name); !ok {
			return nil, false
		}
	}
	// The compiler writes the methods that come from embedded types.
	if file, _ := runtime.FuncForPC(method.Func.Pointer()).FileLine(method.Func.Pointer()); file != "<autogenerated>" {
		return nil, true
	}
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.Anonymous {
			continue
		}
		embedded := f.Type
		if embedded.Kind() != reflect.Pointer && embedded.Kind() != reflect.Interface {
			embedded = reflect.PointerTo(embedded)
		}
		if _, ok := embedded.MethodByName(name); ok {
			return f.Type, true
		}
	}
	return nil, true
}
