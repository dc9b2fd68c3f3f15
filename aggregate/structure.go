package aggregate

import (
	"crypto/sha256"
	"encoding"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
)

var (
	jsonMarshaler   = reflect.TypeFor[json.Marshaler]()
	jsonUnmarshaler = reflect.TypeFor[json.Unmarshaler]()
	textMarshaler   = reflect.TypeFor[encoding.TextMarshaler]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
)

func marshalsItself(t reflect.Type) bool {
	p := reflect.PointerTo(t)
	return p.Implements(jsonMarshaler) && p.Implements(jsonUnmarshaler) ||
		p.Implements(textMarshaler) && p.Implements(textUnmarshaler)
}

// survivesJSON looks for what JSON would silently lose: unexported or ignored
// fields, and values that do not come back as the type they were.
func survivesJSON(t reflect.Type, seen []reflect.Type) error {
	if slices.Contains(seen, t) || marshalsItself(t) {
		return nil
	}
	seen = append(seen, t)
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Array:
		return survivesJSON(t.Elem(), seen)
	case reflect.Map:
		switch k := t.Key().Kind(); {
		case k == reflect.String, k >= reflect.Int && k <= reflect.Uint64, marshalsItself(t.Key()):
		default:
			return fmt.Errorf("%s has keys of type %s: use strings or integers", t, t.Key())
		}
		return survivesJSON(t.Elem(), seen)
	case reflect.Struct:
		for i := range t.NumField() {
			f := t.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch {
			case !f.IsExported() && !f.Anonymous:
				return fmt.Errorf("%s has the unexported field %q: export it, or give the type MarshalJSON and UnmarshalJSON", t, f.Name)
			case f.Tag.Get("json") == "-":
				return fmt.Errorf("%s leaves the field %q out of JSON: remove its `json:\"-\"`, or give the type MarshalJSON and UnmarshalJSON", t, f.Name)
			case name == "" && f.Anonymous && !f.IsExported() && f.Type.Kind() == reflect.Pointer:
				return fmt.Errorf("%s embeds a pointer to the unexported %s, which JSON cannot fill", t, f.Type.Elem())
			}
			if err := survivesJSON(f.Type, seen); err != nil {
				return fmt.Errorf("field %q: %w", f.Name, err)
			}
		}
		return nil
	case reflect.Interface:
		return fmt.Errorf("%s is an interface, whose type JSON forgets", t)
	case reflect.Func, reflect.Chan, reflect.Complex64, reflect.Complex128, reflect.UnsafePointer:
		return fmt.Errorf("%s has no form in JSON", t)
	}
	return nil
}

// structureOf fingerprints what a snapshot depends on and the program can see:
// the structure of the state and of the events, and the user's version.
func structureOf[S any](d *Definition[S]) string {
	h := sha256.New()
	_, _ = fmt.Fprintf(h, "%s %d\n", d.category, d.snapshotVersion)
	writeType(h, reflect.TypeFor[S](), nil)
	names := slices.Sorted(slices.Values(d.names))
	for _, name := range names {
		_, _ = fmt.Fprintf(h, "\n%q ", name)
		writeType(h, d.handlers[name].goType, nil)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

func writeType(w io.Writer, t reflect.Type, seen []reflect.Type) {
	_, _ = io.WriteString(w, t.String())
	if slices.Contains(seen, t) || marshalsItself(t) {
		return
	}
	seen = append(seen, t)
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Array:
		_, _ = io.WriteString(w, " of ")
		writeType(w, t.Elem(), seen)
	case reflect.Map:
		_, _ = io.WriteString(w, " from ")
		writeType(w, t.Key(), seen)
		_, _ = io.WriteString(w, " to ")
		writeType(w, t.Elem(), seen)
	case reflect.Struct:
		_, _ = io.WriteString(w, "{")
		for i := range t.NumField() {
			f := t.Field(i)
			_, _ = fmt.Fprintf(w, "%s %q ", f.Name, f.Tag)
			writeType(w, f.Type, seen)
			_, _ = io.WriteString(w, ";")
		}
		_, _ = io.WriteString(w, "}")
	default:
		_, _ = fmt.Fprintf(w, " %s", t.Kind())
	}
}
