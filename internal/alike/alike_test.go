package alike_test

import (
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
