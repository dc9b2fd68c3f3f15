// Package digest writes a value down so that two values have the same digest
// only if they are the same. It imports nothing of deed.
package digest

import (
	"bytes"
	"encoding"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"time"
	"unsafe"
)

// deepest is how deep values may be nested; cyclic ones are deeper.
const deepest = 500

// Of returns the content of the value for a hash: of all fields, unexported
// ones and those JSON leaves out included. It is the same for the same content
// in every process:
//
//   - Fields with the zero value are left out, so that a struct may get new ones.
//   - Pointers stand for what they point to; nil is not a pointer to zero. A
//     pointer given to Of is as good as the value.
//   - Times are their instant, whatever their location.
//   - A type that marshals itself and reads that back, as JSON or as text, is what
//     it marshals to; unless the methods may be those of an embedded field.
//   - Maps have no order. Nil and empty maps and slices differ.
//
// Functions, channels and unsafe pointers, cyclic values, and marshalers that
// fail are errors, which name the field.
func Of(value any) ([]byte, error) {
	v := reflect.ValueOf(value)
	if !v.IsValid() {
		return []byte{'n'}, nil
	}
	if v.Kind() == reflect.Pointer && !v.IsNil() {
		return appendValue(nil, v.Elem(), 0)
	}
	return appendValue(nil, addressable(v), 0)
}

// addressable returns a copy whose fields can be looked at.
func addressable(v reflect.Value) reflect.Value {
	copied := reflect.New(v.Type()).Elem()
	copied.Set(v)
	return copied
}

// tooDeep is not wrapped on its long way up.
type tooDeep struct{ at reflect.Type }

func (e *tooDeep) Error() string {
	return fmt.Sprintf("%s is cyclic, or nested more than %d deep", e.at, deepest)
}

func within(place string, err error) error {
	if _, ok := errors.AsType[*tooDeep](err); ok {
		return err
	}
	return fmt.Errorf("%s: %w", place, err)
}

var timeType = reflect.TypeFor[time.Time]()

func appendValue(b []byte, v reflect.Value, depth int) ([]byte, error) {
	if depth > deepest {
		return nil, &tooDeep{v.Type()}
	}
	if v.Type() == timeType {
		return appendBytes(append(b, 't'), []byte(v.Interface().(time.Time).UTC().Format(time.RFC3339Nano))), nil
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface, reflect.Map, reflect.Slice, reflect.Func, reflect.Chan:
		if v.IsNil() {
			return append(b, 'n'), nil
		}
	}
	if text, ok, err := itself(v); err != nil {
		return nil, fmt.Errorf("%s: %w", v.Type(), err)
	} else if ok {
		return appendBytes(append(b, 'm'), text), nil
	}
	switch v.Kind() {
	case reflect.Bool:
		if v.Bool() {
			return append(b, 'b', 1), nil
		}
		return append(b, 'b', 0), nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return binary.BigEndian.AppendUint64(append(b, 'i'), uint64(v.Int())), nil
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		return binary.BigEndian.AppendUint64(append(b, 'u'), v.Uint()), nil
	case reflect.Float32, reflect.Float64:
		return binary.BigEndian.AppendUint64(append(b, 'f'), math.Float64bits(v.Float())), nil
	case reflect.Complex64, reflect.Complex128:
		b = binary.BigEndian.AppendUint64(append(b, 'c'), math.Float64bits(real(v.Complex())))
		return binary.BigEndian.AppendUint64(b, math.Float64bits(imag(v.Complex()))), nil
	case reflect.String:
		return appendBytes(append(b, 's'), []byte(v.String())), nil
	case reflect.Pointer:
		return appendValue(append(b, 'p'), v.Elem(), depth+1)
	case reflect.Interface:
		held := addressable(v.Elem())
		b = appendBytes(append(b, 'd'), []byte(held.Type().PkgPath()+" "+held.Type().String()))
		return appendValue(b, held, depth+1)
	case reflect.Slice, reflect.Array:
		return appendList(b, v, depth)
	case reflect.Map:
		return appendMap(b, v, depth)
	case reflect.Struct:
		return appendStruct(b, v, depth)
	}
	return nil, fmt.Errorf("a %s has no content", v.Type())
}

func appendBytes(b, data []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(data))), data...)
}

func appendList(b []byte, v reflect.Value, depth int) (_ []byte, err error) {
	b = binary.AppendUvarint(append(b, 'l'), uint64(v.Len()))
	for i := range v.Len() {
		if b, err = appendValue(b, v.Index(i), depth+1); err != nil {
			return nil, within(fmt.Sprintf("element %d", i), err)
		}
	}
	return b, nil
}

func appendMap(b []byte, v reflect.Value, depth int) ([]byte, error) {
	entries := make([][]byte, 0, v.Len())
	for i := v.MapRange(); i.Next(); {
		entry, err := appendValue(nil, addressable(i.Key()), depth+1)
		if err == nil {
			entry, err = appendValue(entry, addressable(i.Value()), depth+1)
		}
		if err != nil {
			return nil, within("entry of a map", err)
		}
		entries = append(entries, entry)
	}
	slices.SortFunc(entries, bytes.Compare)
	b = binary.AppendUvarint(append(b, 'k'), uint64(len(entries)))
	for _, entry := range entries {
		b = append(b, entry...)
	}
	return b, nil
}

func appendStruct(b []byte, v reflect.Value, depth int) (_ []byte, err error) {
	b = append(b, '{')
	for i := range v.NumField() {
		field, f := v.Field(i), v.Type().Field(i)
		if f.Name == "_" || field.IsZero() {
			continue
		}
		if !field.CanInterface() {
			// Reflection lets nobody ask an unexported field's methods, or copy it.
			field = reflect.NewAt(f.Type, unsafe.Pointer(field.UnsafeAddr())).Elem()
		}
		b = appendBytes(append(b, '.'), []byte(f.Name))
		if b, err = appendValue(b, field, depth+1); err != nil {
			return nil, within(fmt.Sprintf("field %q", f.Name), err)
		}
	}
	return append(b, '}'), nil
}

var (
	toJSON   = reflect.TypeFor[json.Marshaler]()
	fromJSON = reflect.TypeFor[json.Unmarshaler]()
	toText   = reflect.TypeFor[encoding.TextMarshaler]()
	fromText = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// itself returns what the value marshals itself to, if it also reads that back:
// other marshalers may leave out what matters, for example a password.
func itself(v reflect.Value) (_ []byte, ok bool, err error) {
	p := reflect.PointerTo(v.Type())
	isJSON, isText := p.Implements(toJSON) && p.Implements(fromJSON), p.Implements(toText) && p.Implements(fromText)
	if !isJSON && !isText || v.Kind() == reflect.Interface || borrows(v.Type()) {
		return nil, false, nil
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("its marshaler panicked: %v", p)
		}
	}()
	var data []byte
	if isJSON {
		data, err = v.Addr().Interface().(json.Marshaler).MarshalJSON()
	} else {
		data, err = v.Addr().Interface().(encoding.TextMarshaler).MarshalText()
	}
	return data, true, err
}

// borrows reports whether the methods may be those of an embedded field, which
// know nothing of the others.
func borrows(t reflect.Type) bool {
	if t.Kind() != reflect.Struct {
		return false
	}
	for i := range t.NumField() {
		if f := t.Field(i); f.Anonymous {
			p := f.Type
			if p.Kind() != reflect.Pointer && p.Kind() != reflect.Interface {
				p = reflect.PointerTo(p)
			}
			if p.Implements(toJSON) || p.Implements(toText) {
				return true
			}
		}
	}
	return false
}
