// Package alike compares values that took a round trip through an encoding. It
// imports nothing of deed.
package alike

import (
	"math/big"
	"reflect"
	"time"
)

// Equal is reflect.DeepEqual, but nil and empty slices and maps are the same,
// and types with an Equal method of their own (times, decimals) say by it what
// is. Values must not be cyclic.
func Equal(a, b any) bool { return equal(reflect.ValueOf(a), reflect.ValueOf(b)) }

func equal(a, b reflect.Value) bool {
	if !a.IsValid() || !b.IsValid() {
		return a.IsValid() == b.IsValid()
	}
	if a.Type() != b.Type() {
		return false
	}
	if same, ok := ownEqual(a, b); ok {
		return same
	}
	switch a.Kind() {
	case reflect.Pointer, reflect.Interface:
		if a.IsNil() || b.IsNil() {
			return a.IsNil() == b.IsNil()
		}
		return equal(a.Elem(), b.Elem())
	case reflect.Struct:
		for i := range a.NumField() {
			if !equal(a.Field(i), b.Field(i)) {
				return false
			}
		}
		return true
	case reflect.Slice, reflect.Array:
		if a.Len() != b.Len() {
			return false
		}
		for i := range a.Len() {
			if !equal(a.Index(i), b.Index(i)) {
				return false
			}
		}
		return true
	case reflect.Map:
		if a.Len() != b.Len() {
			return false
		}
		for _, k := range a.MapKeys() {
			if v := b.MapIndex(k); !v.IsValid() || !equal(a.MapIndex(k), v) {
				return false
			}
		}
		return true
	case reflect.Func:
		return a.IsNil() && b.IsNil()
	default:
		return a.Equal(b)
	}
}

// ownEqual asks a method Equal(T) bool, where there is one that may be called.
func ownEqual(a, b reflect.Value) (same, ok bool) {
	if !a.CanInterface() || !b.CanInterface() || a.Kind() == reflect.Interface ||
		a.Kind() == reflect.Pointer && (a.IsNil() || b.IsNil()) {
		return false, false
	}
	m, ok := a.Type().MethodByName("Equal")
	if !ok || m.Type.NumIn() != 2 || m.Type.In(1) != a.Type() || m.Type.NumOut() != 1 || m.Type.Out(0).Kind() != reflect.Bool {
		return false, false
	}
	return m.Func.Call([]reflect.Value{a, b})[0].Bool(), true
}

// Identical reports whether b, made from a by an encoding, cannot be told from
// it: by structure, unexported fields included, and whatever methods the types
// have. Nil and empty slices and maps differ, and so do times in different
// locations. Only what no program can observe is passed over: how a [big.Int]
// keeps 0. Values in which one pointer or map occurs twice are not identical to
// any other, since b has two of them; within types that marshal themselves,
// which are taken for values, that is no matter. Values must not be cyclic.
func Identical(a, b any) bool {
	x := identity{}
	return x.same(reflect.ValueOf(a), reflect.ValueOf(b), false)
}

var (
	bigInt     = reflect.TypeFor[big.Int]()
	location   = reflect.TypeFor[*time.Location]()
	marshalers = []reflect.Type{
		reflect.TypeFor[interface{ MarshalJSON() ([]byte, error) }](),
		reflect.TypeFor[interface{ MarshalText() ([]byte, error) }](),
	}
)

func marshalsItself(t reflect.Type) bool {
	for _, m := range marshalers {
		if t.Implements(m) || reflect.PointerTo(t).Implements(m) {
			return true
		}
	}
	return false
}

// identity is what was seen of the first value.
type identity map[shared]bool

type shared struct {
	pointer uintptr
	kind    reflect.Type
}

// same compares; within a value that marshals itself, what is shared is no matter.
func (x identity) same(a, b reflect.Value, within bool) bool {
	if !a.IsValid() || !b.IsValid() {
		return a.IsValid() == b.IsValid()
	}
	if a.Type() != b.Type() {
		return false
	}
	switch {
	case a.Type() == bigInt:
		return equal(a, b)
	case a.Type() == location:
		return sameLocation(a, b)
	}
	within = within || a.Kind() != reflect.Interface && marshalsItself(a.Type())
	switch a.Kind() {
	case reflect.Pointer, reflect.Map, reflect.Slice, reflect.Interface, reflect.Func:
		if a.IsNil() || b.IsNil() {
			return a.IsNil() == b.IsNil()
		}
	}
	switch a.Kind() {
	case reflect.Pointer, reflect.Map:
		if !within {
			s := shared{a.Pointer(), a.Type()}
			if x[s] {
				return false
			}
			x[s] = true
		}
	}
	switch a.Kind() {
	case reflect.Pointer, reflect.Interface:
		return x.same(a.Elem(), b.Elem(), within)
	case reflect.Struct:
		for i := range a.NumField() {
			if !x.same(a.Field(i), b.Field(i), within) {
				return false
			}
		}
		return true
	case reflect.Slice, reflect.Array:
		if a.Len() != b.Len() {
			return false
		}
		for i := range a.Len() {
			if !x.same(a.Index(i), b.Index(i), within) {
				return false
			}
		}
		return true
	case reflect.Map:
		if a.Len() != b.Len() {
			return false
		}
		for _, k := range a.MapKeys() {
			if v := b.MapIndex(k); !v.IsValid() || !x.same(a.MapIndex(k), v, within) {
				return false
			}
		}
		return true
	case reflect.Func:
		return false
	default:
		return a.Equal(b)
	}
}

// sameLocation compares locations by what they say, since decoding a time makes
// new ones. The local one, which is set up when it is first asked, is like no
// other.
func sameLocation(a, b reflect.Value) bool {
	local := reflect.ValueOf(time.Local).Pointer()
	switch {
	case a.Pointer() == b.Pointer():
		return true
	case a.IsNil() || b.IsNil() || a.Pointer() == local || b.Pointer() == local:
		return false
	}
	return equal(a.Elem(), b.Elem())
}
