package eventstore_test

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// labelled is a type with a JSON form of its own.
type labelled struct{ n int }

func (l labelled) MarshalJSON() ([]byte, error) { return fmt.Appendf(nil, `{"label":%d}`, l.n), nil }

func (l *labelled) UnmarshalJSON(data []byte) error {
	var form struct{ Label int }
	err := json.Unmarshal(data, &form)
	l.n = form.Label
	return err
}

// JSON is read and written as the standard library does, whatever the shape:
// random types and values go both ways, each library reading what the other
// one wrote.
func TestJSON_AgreesWithTheStandardLibrary(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	codec := eventstore.JSON()
	for range 600 {
		shape := randomType(r, 3)
		given := reflect.New(shape)
		randomValue(r, given.Elem())

		reference, err := json.Marshal(given.Interface())
		require.NoError(t, err)
		written, err := codec.Marshal(given.Interface())
		require.NoError(t, err, "seed %d: %v", seed, shape)
		require.JSONEq(t, string(reference), string(written), "seed %d: %v", seed, shape)

		want, got, cross := reflect.New(shape), reflect.New(shape), reflect.New(shape)
		require.NoError(t, json.Unmarshal(reference, want.Interface()))
		require.NoError(t, codec.Unmarshal(reference, got.Interface()), "seed %d: %v from %s", seed, shape, reference)
		require.Equal(t, want.Interface(), got.Interface(), "seed %d: %v from %s", seed, shape, reference)
		require.NoError(t, json.Unmarshal(written, cross.Interface()))
		require.Equal(t, want.Interface(), cross.Interface(), "seed %d: %v from %s", seed, shape, written)
	}
}

// A number kept as text is still a number in the stored form.
func TestJSON_Number(t *testing.T) {
	t.Parallel()
	type amount struct {
		Cents json.Number
		Rate  json.Number `json:",omitempty"`
	}
	written, err := eventstore.JSON().Marshal(amount{Cents: "12345678901234567890"})
	require.NoError(t, err)
	require.Equal(t, `{"Cents":12345678901234567890}`, string(written))
	var read amount
	require.NoError(t, eventstore.JSON().Unmarshal(written, &read))
	require.Equal(t, amount{Cents: "12345678901234567890"}, read)
	require.Error(t, eventstore.JSON().Unmarshal([]byte(`{"Cents":"x"}`), &read))
	_, err = eventstore.JSON().Marshal(amount{Cents: "x"})
	require.Error(t, err)
}

func randomType(r *rand.Rand, depth int) reflect.Type {
	leaves := []reflect.Type{
		reflect.TypeFor[string](), reflect.TypeFor[int](), reflect.TypeFor[int8](), reflect.TypeFor[uint64](), reflect.TypeFor[float64](), reflect.TypeFor[bool](),
		reflect.TypeFor[[]byte](), reflect.TypeFor[time.Time](), reflect.TypeFor[time.Duration](), reflect.TypeFor[uuid.UUID](), reflect.TypeFor[any](), reflect.TypeFor[labelled](), reflect.TypeFor[json.Number](),
	}
	if depth == 0 || r.IntN(3) == 0 {
		return leaves[r.IntN(len(leaves))]
	}
	switch r.IntN(6) {
	case 0:
		return reflect.PointerTo(randomType(r, depth-1))
	case 1:
		return reflect.SliceOf(randomType(r, depth-1))
	case 2:
		return reflect.ArrayOf(r.IntN(3), randomType(r, depth-1))
	case 3:
		return reflect.MapOf(leaves[r.IntN(2)], randomType(r, depth-1))
	}
	var fields []reflect.StructField
	for i := range r.IntN(5) {
		tag := []string{"", "", `json:"name%d"`, `json:"name%d,omitempty"`, `json:"name%d,omitzero"`}[r.IntN(5)]
		if tag != "" {
			tag = fmt.Sprintf(tag, i)
		}
		fields = append(fields, reflect.StructField{Name: fmt.Sprintf("Field%d", i), Type: randomType(r, depth-1), Tag: reflect.StructTag(tag)})
	}
	return reflect.StructOf(fields)
}

func randomValue(r *rand.Rand, v reflect.Value) {
	if r.IntN(5) == 0 {
		return // zero
	}
	switch special := v.Addr().Interface().(type) {
	case *time.Time:
		*special = time.Unix(r.Int64N(4e9), r.Int64N(1e9)).UTC()
		return
	case *labelled:
		special.n = r.IntN(100)
		return
	case *uuid.UUID:
		*special = uuid.New()
		return
	}
	switch v.Kind() {
	case reflect.String:
		if v.Type() == reflect.TypeFor[json.Number]() {
			v.SetString(fmt.Sprint(r.Int64()))
			return
		}
		v.SetString([]string{"a", "ünïcödé 💥", "<&>", "\u2028", "q\"\\\n\x01", "\x7f"}[r.IntN(6)])
	case reflect.Int, reflect.Int8, reflect.Int64:
		v.SetInt(int64(r.Uint64()))
	case reflect.Uint64:
		v.SetUint(r.Uint64())
	case reflect.Uint8:
		v.SetUint(r.Uint64() & 0xff)
	case reflect.Float64:
		v.SetFloat([]float64{1.5, 1e21, 1e-7, math.Copysign(0, -1), r.NormFloat64()}[r.IntN(5)])
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Interface:
		v.Set(reflect.ValueOf([]any{"s", 1.5, true, []any{nil, "x"}, map[string]any{"k": []any{1.0}}}[r.IntN(5)]))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		randomValue(r, v.Elem())
	case reflect.Slice:
		n := r.IntN(4)
		v.Set(reflect.MakeSlice(v.Type(), n, n))
		for i := range n {
			randomValue(r, v.Index(i))
		}
	case reflect.Array:
		for i := range v.Len() {
			randomValue(r, v.Index(i))
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range r.IntN(4) {
			key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			randomValue(r, key)
			randomValue(r, value)
			v.SetMapIndex(key, value)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			randomValue(r, v.Field(i))
		}
	}
}

func BenchmarkJSON(b *testing.B) {
	type line struct {
		Item  string `json:"item"`
		Count int    `json:"count"`
		Cents int64  `json:"cents"`
	}
	type order struct {
		Customer string
		Placed   time.Time
		Lines    []line
		Note     string `json:",omitempty"`
		Express  bool
		Labels   map[string]string `json:"labels,omitempty"`
	}
	value := order{
		Customer: "ann@example.org", Placed: now, Lines: []line{{"apple", 3, 120}, {"pear and plum", 1, 450}}, Express: true,
		Note: "please leave the parcel with the neighbours, they know", Labels: map[string]string{"channel": "web"},
	}
	data, err := json.Marshal(value)
	require.NoError(b, err)
	for name, codec := range map[string]struct {
		marshal   func(any) ([]byte, error)
		unmarshal func([]byte, any) error
	}{"deed": {eventstore.JSON().Marshal, eventstore.JSON().Unmarshal}, "standard library": {json.Marshal, json.Unmarshal}} {
		b.Run("decode/"+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var into order
				if err := codec.unmarshal(data, &into); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run("encode/"+name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := codec.marshal(&value); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
