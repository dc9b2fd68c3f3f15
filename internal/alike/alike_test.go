package alike_test

import (
	"math/big"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/alike"
)

type inner struct{ hidden map[string]int }

type outer struct {
	At    time.Time
	List  []inner
	Any   any
	Next  *outer
	Array [2]int
	F     func()
}

func TestEqual(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	base := func() outer {
		return outer{At: at, List: []inner{{map[string]int{"a": 1}}}, Any: 5, Next: &outer{Array: [2]int{1, 2}}}
	}
	for name, c := range map[string]struct {
		change func(*outer)
		want   bool
	}{
		"Nothing":         {func(*outer) {}, true},
		"TimeZone":        {func(o *outer) { o.At = at.In(time.FixedZone("x", 3600)) }, true},
		"Time":            {func(o *outer) { o.At = at.Add(1) }, false},
		"UnexportedMap":   {func(o *outer) { o.List[0].hidden["a"] = 2 }, false},
		"OtherKey":        {func(o *outer) { o.List[0].hidden = map[string]int{"b": 1} }, false},
		"MoreKeys":        {func(o *outer) { o.List[0].hidden["b"] = 1 }, false},
		"Length":          {func(o *outer) { o.List = append(o.List, inner{}) }, false},
		"EmptyNotNil":     {func(o *outer) { o.Next.List = []inner{} }, true},
		"TypeInInterface": {func(o *outer) { o.Any = int64(5) }, false},
		"NilInterface":    {func(o *outer) { o.Any = nil }, false},
		"NilPointer":      {func(o *outer) { o.Next = nil }, false},
		"BehindPointer":   {func(o *outer) { o.Next.Array[1] = 3 }, false},
		"Function":        {func(o *outer) { o.F = func() {} }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			other := base()
			c.change(&other)
			require.Equal(t, c.want, alike.Equal(base(), other))
			require.Equal(t, c.want, alike.Equal(other, base()))
		})
	}
	require.False(t, alike.Equal(1, "1"))
	require.False(t, alike.Equal(nil, 1))
	require.True(t, alike.Equal(nil, nil))
}

type thing struct {
	Map   map[string]int
	List  []int
	At    time.Time
	Big   big.Int
	Money money
	Any   any
	Left  *int
	Right *int
	F     func()
}

// money marshals itself.
type money struct{ cents *big.Int }

func (m money) MarshalText() ([]byte, error) { return m.cents.MarshalText() }

func TestIdentical(t *testing.T) {
	t.Parallel()
	zone := func() *time.Location { return time.FixedZone("CET", 3600) }
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	one := 1
	for name, c := range map[string]struct {
		a, b thing
		want bool
	}{
		"Zero":           {thing{}, thing{}, true},
		"EmptyMap":       {thing{Map: map[string]int{}}, thing{}, false},
		"EmptyMaps":      {thing{Map: map[string]int{}}, thing{Map: map[string]int{}}, true},
		"OtherMap":       {thing{Map: map[string]int{"a": 1}}, thing{Map: map[string]int{"a": 2}}, false},
		"OtherKey":       {thing{Map: map[string]int{"a": 1}}, thing{Map: map[string]int{"b": 1}}, false},
		"EmptySlice":     {thing{List: []int{}}, thing{}, false},
		"OtherElement":   {thing{List: []int{1}}, thing{List: []int{2}}, false},
		"Longer":         {thing{List: []int{1}}, thing{List: []int{1, 1}}, false},
		"Location":       {thing{At: at}, thing{At: at.In(zone())}, false},
		"Local":          {thing{At: at.In(zone())}, thing{At: at.Local()}, false},
		"SameLocation":   {thing{At: at.In(zone())}, thing{At: at.In(zone())}, true},
		"Time":           {thing{At: at}, thing{At: at.Add(1)}, false},
		"BigZero":        {thing{Big: *new(big.Int).Sub(big.NewInt(7), big.NewInt(7))}, thing{}, true},
		"Big":            {thing{Big: *big.NewInt(7)}, thing{Big: *big.NewInt(8)}, false},
		"Unexported":     {thing{Money: money{big.NewInt(7)}}, thing{Money: money{big.NewInt(8)}}, false},
		"SameUnexported": {thing{Money: money{big.NewInt(7)}}, thing{Money: money{big.NewInt(7)}}, true},
		"Any":            {thing{Any: 1}, thing{Any: 1.0}, false},
		"Pointers":       {thing{Left: new(int), Right: new(int)}, thing{Left: new(int), Right: new(int)}, true},
		"SharedPointer":  {thing{Left: &one, Right: &one}, thing{Left: &one, Right: &one}, false},
		"NilPointer":     {thing{Left: &one}, thing{}, false},
		"Function":       {thing{F: func() {}}, thing{F: func() {}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, c.want, alike.Identical(c.a, c.b))
			require.Equal(t, c.want, alike.Identical(c.b, c.a))
		})
	}
	cents := big.NewInt(7)
	require.True(t, alike.Identical([]money{{cents}, {cents}}, []money{{big.NewInt(7)}, {big.NewInt(7)}}), "values, though they share")
	require.False(t, alike.Identical(1, "1"))
	require.False(t, alike.Identical(nil, 1))
	require.True(t, alike.Identical(nil, nil))
}
