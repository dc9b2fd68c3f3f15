package projection

import (
	"encoding/binary"
	"math"
	"reflect"
	"strings"
	"time"
)

// IndexKey is what rows can be indexed by. Keys are in the order of their values:
// text and bytes byte by byte, false before true, NaN before all other numbers,
// and times as instants, wherever they are told.
type IndexKey interface {
	~string | ~[]byte | ~bool |
		~int | ~int8 | ~int16 | ~int32 | ~int64 |
		~uint | ~uint8 | ~uint16 | ~uint32 | ~uint64 |
		~float32 | ~float64 | time.Time
}

// appendOrdered appends the key so that stored keys are in the order of their
// values, byte by byte, and none is the beginning of another one: whatever
// follows them decides only among equal ones.
func appendOrdered[K IndexKey](b []byte, key K) []byte {
	switch k := any(key).(type) {
	case string:
		return appendText(b, k)
	case int64:
		return appendInt(b, k)
	case time.Time:
		b = appendInt(b, k.Unix())
		return binary.BigEndian.AppendUint32(b, uint32(k.Nanosecond()))
	}
	switch v := reflect.ValueOf(key); v.Kind() {
	case reflect.String:
		return appendText(b, v.String())
	case reflect.Slice:
		return appendText(b, string(v.Bytes()))
	case reflect.Bool:
		if v.Bool() {
			return append(b, 1)
		}
		return append(b, 0)
	case reflect.Float32, reflect.Float64:
		return appendFloat(b, v.Float())
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return binary.BigEndian.AppendUint64(b, v.Uint())
	default:
		return appendInt(b, v.Int())
	}
}

// orderedKind names the form in which appendOrdered stores keys of the type. It
// is kept with the entries, which are made anew when it is another one.
func orderedKind[K IndexKey]() string {
	t := reflect.TypeFor[K]()
	switch t.Kind() {
	case reflect.Struct:
		return "time"
	case reflect.String, reflect.Slice:
		return "text"
	case reflect.Bool:
		return "bool"
	case reflect.Float32, reflect.Float64:
		return "float"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "uint"
	default:
		return "int"
	}
}

// appendText ends with two zero bytes; a zero byte within is followed by 0xff.
func appendText(b []byte, text string) []byte {
	for {
		zero := strings.IndexByte(text, 0)
		if zero < 0 {
			return append(append(b, text...), 0, 0)
		}
		b = append(append(b, text[:zero]...), 0, 0xff)
		text = text[zero+1:]
	}
}

func appendInt(b []byte, n int64) []byte {
	return binary.BigEndian.AppendUint64(b, uint64(n)^1<<63)
}

func appendFloat(b []byte, f float64) []byte {
	switch {
	case math.IsNaN(f):
		return binary.BigEndian.AppendUint64(b, 0)
	case f == 0:
		f = 0 // one zero, not two
	}
	bits := math.Float64bits(f)
	if bits>>63 == 1 {
		bits = ^bits
	} else {
		bits |= 1 << 63
	}
	return binary.BigEndian.AppendUint64(b, bits)
}

// afterPrefix returns the smallest string above every one with the prefix;
// false if there is none.
func afterPrefix(prefix string) (string, bool) {
	for end := len(prefix); end > 0; end-- {
		if last := prefix[end-1]; last < 0xff {
			return prefix[:end-1] + string([]byte{last + 1}), true
		}
	}
	return "", false
}
