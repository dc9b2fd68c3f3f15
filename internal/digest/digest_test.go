package digest_test

import (
	"encoding/json"
	"errors"
	"math"
	"math/big"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/digest"
)

type inner struct {
	at    time.Time
	price big.Rat
}

type stamped struct {
	time.Time
	cents int
}

// redacted shows nobody what it holds.
type redacted struct{ Word string }

func (redacted) MarshalJSON() ([]byte, error) { return []byte(`"***"`), nil }

type failing struct{ N int }

func (failing) MarshalText() ([]byte, error)  { return nil, errors.New("not today") }
func (*failing) UnmarshalText(b []byte) error { return nil }

type panicking struct{ n *int }

func (p panicking) MarshalText() ([]byte, error) { return []byte{byte(*p.n)}, nil }
func (*panicking) UnmarshalText(b []byte) error  { return nil }

type all struct {
	name   string
	Secret string `json:"-"`
	Map    map[string]inner
	keyed  map[any][]int
	List   []string
	Array  [2]int
	Next   *all
	any    any
	Number float64
	stamp  stamped
	Word   redacted
	Raw    json.RawMessage
	flag   bool
	size   uint8
	plane  complex128
	F      func()
	C      chan int
	fails  failing
	panics panicking
}

func full() all {
	return all{
		name: "n", Secret: "s", Map: map[string]inner{"a": {at: time.Unix(5, 0), price: *big.NewRat(1, 2)}, "b": {}},
		keyed: map[any][]int{1: {1}, "1": {2}, 2.5: nil}, List: []string{"x", "y"}, Array: [2]int{1, 2},
		Next: &all{name: "next"}, any: inner{at: time.Unix(7, 0)}, Number: 1.5, stamp: stamped{time.Unix(9, 0), 3},
		Word: redacted{"secret"}, Raw: json.RawMessage(`{}`), flag: true, size: 7, plane: 1 + 2i,
	}
}

func TestOf(t *testing.T) {
	t.Parallel()
	of := func(v any) string {
		t.Helper()
		b, err := digest.Of(v)
		require.NoError(t, err)
		return string(b)
	}
	base := of(full())
	for range 20 {
		require.Equal(t, base, of(full()), "maps have no order")
	}

	same := map[string]func(*all){
		"TimeZone": func(a *all) { a.any = inner{at: time.Unix(7, 0).In(time.FixedZone("x", 3600))} },
		"BigRat": func(a *all) {
			a.Map["a"] = inner{at: time.Unix(5, 0), price: *new(big.Rat).Quo(big.NewRat(2, 1), big.NewRat(4, 1))}
		},
	}
	for name, change := range same {
		other := full()
		change(&other)
		require.Equal(t, base, of(other), name)
	}

	seen := map[string]string{base: "base"}
	for name, change := range map[string]func(*all){
		"Unexported":     func(a *all) { a.name = "m" },
		"LeftOutOfJSON":  func(a *all) { a.Secret = "t" },
		"TimeInMap":      func(a *all) { a.Map["a"] = inner{at: time.Unix(6, 0), price: *big.NewRat(1, 2)} },
		"RatInMap":       func(a *all) { a.Map["a"] = inner{at: time.Unix(5, 0), price: *big.NewRat(1, 3)} },
		"OtherKey":       func(a *all) { a.Map["c"] = a.Map["b"]; delete(a.Map, "b") },
		"KeyType":        func(a *all) { a.keyed = map[any][]int{"1": {1}, 1: {2}, 2.5: nil} },
		"EmptyNotNil":    func(a *all) { a.keyed[2.5] = []int{} },
		"Regrouped":      func(a *all) { a.List = []string{"xy", ""} },
		"Order":          func(a *all) { a.Array = [2]int{2, 1} },
		"BehindPointer":  func(a *all) { a.Next.name = "last" },
		"NoPointer":      func(a *all) { a.Next = nil },
		"PointerToZero":  func(a *all) { a.Next = new(all) },
		"TypeInAny":      func(a *all) { a.any = stamped{time.Unix(7, 0), 0} },
		"NilAny":         func(a *all) { a.any = nil },
		"Float":          func(a *all) { a.Number = math.NaN() },
		"BesideEmbedded": func(a *all) { a.stamp.cents = 4 },
		"Embedded":       func(a *all) { a.stamp.Time = time.Unix(10, 0) },
		"Redacted":       func(a *all) { a.Word.Word = "other" },
		"Raw":            func(a *all) { a.Raw = json.RawMessage(`[]`) },
		"Bool":           func(a *all) { a.flag = false },
		"Uint":           func(a *all) { a.size = 8 },
		"Complex":        func(a *all) { a.plane = 1 + 3i },
	} {
		other := full()
		change(&other)
		b := of(other)
		require.Empty(t, seen[b], "%s is told apart", name)
		seen[b] = name
	}

	require.Equal(t, of(struct{ A int }{1}), of(struct{ A, B int }{A: 1}), "a field that is new and zero")
	require.NotEqual(t, of(nil), of(0))
	value := full()
	require.Equal(t, base, of(&value))
	require.NotEqual(t, of((*all)(nil)), of(new(all)))
}

func TestOf_Refuses(t *testing.T) {
	t.Parallel()
	cycle := &all{}
	cycle.Next = cycle
	list := []any{nil}
	list[0] = list
	for name, c := range map[string]struct {
		value any
		says  string
	}{
		"Func":      {all{Next: &all{F: func() {}}}, `field "Next": field "F": a func() has no content`},
		"Chan":      {all{C: make(chan int)}, `field "C": a chan int has no content`},
		"Cycle":     {cycle, "digest_test.all is cyclic, or nested more than 500 deep"},
		"CycleList": {list, "is cyclic"},
		"Marshaler": {all{fails: failing{1}}, `field "fails": digest_test.failing: not today`},
		"Panic":     {all{any: panicking{}}, `field "any": digest_test.panicking: its marshaler panicked`},
		"InAMap":    {map[string]any{"a": func() {}}, "entry of a map: a func() has no content"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := digest.Of(c.value)
			require.ErrorContains(t, err, c.says)
			require.Less(t, len(err.Error()), 200)
		})
	}
}
