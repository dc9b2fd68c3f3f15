package query_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/query"
)

// parcel is an event that sets the whole row.
type parcel struct {
	Owner    string
	Cents    int64
	Weight   float64
	Size     uint16
	Open     bool
	At       time.Time
	Digest   []byte
	Labels   []string
	Priority int8
}

func (parcel) EventType() string { return "parcel.changed" }

type parcelGone struct{}

func (parcelGone) EventType() string { return "parcel.gone" }

var (
	parcelOwner    = projection.Index("owner", func(p parcel) string { return p.Owner })
	parcelCents    = projection.Index("cents", func(p parcel) int64 { return p.Cents })
	parcelWeight   = projection.Index("weight", func(p parcel) float64 { return p.Weight })
	parcelSize     = projection.Index("size", func(p parcel) uint16 { return p.Size })
	parcelOpen     = projection.Index("open", func(p parcel) bool { return p.Open })
	parcelAt       = projection.Index("at", func(p parcel) time.Time { return p.At })
	parcelDigest   = projection.Index("digest", func(p parcel) []byte { return p.Digest })
	parcelLabel    = projection.IndexMany("label", func(p parcel) []string { return p.Labels })
	parcelPriority = projection.Index("priority", func(p parcel) int8 { return p.Priority })
	parcelLabelAt  = projection.CompositeIndex("label-at", parcelLabel, parcelAt)
)

func newParcels() *projection.ViewDefinition[parcel] {
	return projection.View("parcels",
		projection.On(func(row *parcel, e parcel) { *row = e }),
		projection.DeleteOn[parcel, parcelGone](),
	).Indexed(parcelOwner, parcelCents, parcelWeight, parcelSize, parcelOpen, parcelAt, parcelDigest, parcelLabel, parcelPriority, parcelLabelAt)
}

func randomText(random *rand.Rand) string {
	text := ""
	for range random.IntN(3) {
		text += []string{"a", "b", "\x00", "ß"}[random.IntN(4)]
	}
	return text
}

func randomParcel(random *rand.Rand) parcel {
	p := parcel{
		Owner: randomText(random), Cents: random.Int64N(9) - 4, Weight: float64(random.IntN(9)-4) / 4, Size: uint16(random.IntN(4)),
		Open: random.IntN(2) == 0, At: time.Unix(int64(random.IntN(5)-2), int64(random.IntN(2))).UTC(), Digest: []byte(randomText(random)), Priority: int8(random.IntN(5) - 2),
	}
	for range random.IntN(4) {
		p.Labels = append(p.Labels, randomText(random))
	}
	return p
}

// part is a selection, and the same in the model: the keys that a row has in it.
type part struct {
	name      string
	selection projection.Selection
	holds     func(p parcel) []any
	compare   func(a, b any) int
}

// randomPart narrows the index, once or twice or not at all.
func randomPart[K projection.IndexKey](random *rand.Rand, name string, all projection.IndexRange[K], compare func(a, b K) int, keys func(p parcel) []K) part {
	bounds := []func(K) bool{}
	for range random.IntN(3) {
		var k K
		for { // a key that some row may have
			if some := keys(randomParcel(random)); len(some) > 0 {
				k = some[0]
				break
			}
		}
		var holds func(c int) bool
		switch random.IntN(6) {
		case 0:
			all, holds = all.Is(k), func(c int) bool { return c == 0 }
		case 1:
			all, holds = all.AtLeast(k), func(c int) bool { return c >= 0 }
		case 2:
			all, holds = all.AtMost(k), func(c int) bool { return c <= 0 }
		case 3:
			all, holds = all.Above(k), func(c int) bool { return c > 0 }
		case 4:
			all, holds = all.Below(k), func(c int) bool { return c < 0 }
		default:
			all, holds = all.Between(k, k), func(c int) bool { return c == 0 }
		}
		bounds = append(bounds, func(of K) bool { return holds(compare(of, k)) })
	}
	return part{
		name: name, selection: all,
		holds: func(p parcel) (in []any) {
			some := slices.Clone(keys(p))
			slices.SortFunc(some, compare)
			for _, k := range slices.CompactFunc(some, func(a, b K) bool { return compare(a, b) == 0 }) {
				if !slices.ContainsFunc(bounds, func(b func(K) bool) bool { return !b(k) }) {
					in = append(in, k)
				}
			}
			return in
		},
		compare: func(a, b any) int { return compare(a.(K), b.(K)) },
	}
}

func one[K any](of func(parcel) K) func(parcel) []K {
	return func(p parcel) []K { return []K{of(p)} }
}

func anyPart(random *rand.Rand) part {
	truth := func(a, b bool) int { return map[bool]int{false: 0, true: 1}[a] - map[bool]int{false: 0, true: 1}[b] }
	switch random.IntN(10) {
	case 0:
		return randomPart(random, "owner", parcelOwner.IndexRange, cmp.Compare, one(func(p parcel) string { return p.Owner }))
	case 1:
		return randomPart(random, "cents", parcelCents.IndexRange, cmp.Compare, one(func(p parcel) int64 { return p.Cents }))
	case 2:
		return randomPart(random, "weight", parcelWeight.IndexRange, cmp.Compare, one(func(p parcel) float64 { return p.Weight }))
	case 3:
		return randomPart(random, "size", parcelSize.IndexRange, cmp.Compare, one(func(p parcel) uint16 { return p.Size }))
	case 4:
		return randomPart(random, "open", parcelOpen.IndexRange, truth, one(func(p parcel) bool { return p.Open }))
	case 5:
		return randomPart(random, "at", parcelAt.IndexRange, time.Time.Compare, one(func(p parcel) time.Time { return p.At }))
	case 6:
		return randomPart(random, "digest", parcelDigest.IndexRange, bytes.Compare, one(func(p parcel) []byte { return p.Digest }))
	case 7:
		return randomPart(random, "priority", parcelPriority.IndexRange, cmp.Compare, one(func(p parcel) int8 { return p.Priority }))
	case 8:
		return randomPart(random, "label", parcelLabel.IndexRange, cmp.Compare, func(p parcel) []string { return p.Labels })
	default:
		label := randomText(random)
		return randomPart(random, "label-at", parcelLabelAt.In(label), time.Time.Compare, func(p parcel) []time.Time {
			if slices.Contains(p.Labels, label) {
				return []time.Time{p.At}
			}
			return nil
		})
	}
}

// Random rows change at random; random lists, whole and in pages, are those of a
// model that sorts and filters in memory.
func TestBy_Model(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]func(t *testing.T) backend{
		"memory": func(*testing.T) backend { return memory.New() },
		"sqlite": func(t *testing.T) backend {
			s, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "events.db"))
			require.NoError(t, err)
			return s
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			random := rand.New(rand.NewPCG(seed, 0))
			parcels := newParcels()
			a := startOn(t, open(t), parcels)
			model := map[string]parcel{}
			var receipt eventstore.Receipt
			for range 6 {
				for range 60 {
					id := fmt.Sprint([]string{"a", "b"}[random.IntN(2)], random.IntN(40))
					if random.IntN(5) == 0 {
						delete(model, id)
						receipt = a.put(t, id, parcelGone{})
						continue
					}
					model[id] = randomParcel(random)
					receipt = a.put(t, id, model[id])
				}
				for range 30 {
					listLikeModel(t, a, parcels, model, random, receipt)
				}
			}
		})
	}
}

func listLikeModel(t *testing.T, a *app, parcels *projection.ViewDefinition[parcel], model map[string]parcel, random *rand.Rand, receipt eventstore.Receipt) {
	t.Helper()
	selected := anyPart(random)
	options := []query.ListOption{query.By(selected.selection), query.AtLeast(receipt)}
	says := selected.name
	keep := func(string, parcel) bool { return true }
	if random.IntN(3) == 0 {
		keep = func(_ string, p parcel) bool { return p.Cents > 0 }
		options, says = append(options, query.Where(keep)), says+" where"
	}
	prefix := []string{"", "", "a", "b3"}[random.IntN(4)]
	options, says = append(options, query.Prefix(prefix)), says+" prefix "+prefix
	sorted := random.IntN(5) == 0
	byOwner := func(a, b parcel) int { return strings.Compare(a.Owner, b.Owner) }
	if sorted {
		options, says = append(options, query.OrderBy(byOwner)), says+" order"
	}
	backward := random.IntN(2) == 0
	if backward {
		options, says = append(options, query.Backward()), says+" backward"
	}

	type entry struct {
		of  any
		key string
	}
	var should []entry
	for key, p := range model {
		if !strings.HasPrefix(key, prefix) || !keep(key, p) {
			continue
		}
		keys := selected.holds(p)
		if sorted && len(keys) > 1 {
			keys = keys[:1]
		}
		for _, of := range keys {
			should = append(should, entry{of, key})
		}
	}
	slices.SortFunc(should, func(x, y entry) int {
		c := 0
		if sorted {
			c = byOwner(model[x.key], model[y.key])
		} else {
			c = selected.compare(x.of, y.of)
		}
		c = cmp.Or(c, strings.Compare(x.key, y.key))
		if backward {
			return -c
		}
		return c
	})
	want := []string{}
	for _, e := range should {
		want = append(want, e.key)
	}

	page, err := query.List(t.Context(), a, parcels, options...)
	require.NoError(t, err, says)
	require.Equal(t, want, keys(page), says)
	for _, e := range page.Entries {
		require.Equal(t, model[e.Key].At, e.Row.At)
	}
	var got []string
	limit := 1 + random.IntN(9)
	for next := ""; ; next = page.Next {
		page, err = query.List(t.Context(), a, parcels, append(slices.Clone(options), query.Limit(limit), query.After(next))...)
		require.NoError(t, err, says)
		got = append(got, keys(page)...)
		if page.Next == "" {
			break
		}
		require.Len(t, page.Entries, limit)
	}
	require.Equal(t, want, append([]string{}, got...), "in pages: %s", says)
	got = nil
	for e, err := range query.All(t.Context(), a, parcels, options...) {
		require.NoError(t, err, says)
		got = append(got, e.Key)
	}
	require.Equal(t, want, append([]string{}, got...), "one by one: %s", says)
}

// The next page of one list is not that of another.
func TestBy_Cursors(t *testing.T) {
	t.Parallel()
	parcels := newParcels()
	a := start(t, parcels)
	var receipt eventstore.Receipt
	for i := range 10 {
		receipt = a.put(t, fmt.Sprint("p", i), parcel{Owner: "x", Cents: int64(i), Labels: []string{"l"}})
	}
	list := func(options ...query.ListOption) (query.Page[parcel], error) {
		return query.List(t.Context(), a, parcels, append(options, query.AtLeast(receipt), query.Limit(2))...)
	}
	first, err := list(query.By(parcelCents.AtLeast(3)))
	require.NoError(t, err)
	require.Equal(t, []string{"p3", "p4"}, keys(first))
	plain, err := list()
	require.NoError(t, err)
	byKey := query.OrderBy(func(_, _ parcel) int { return 0 })
	ordered, err := list(query.By(parcelCents), byKey)
	require.NoError(t, err)
	for _, test := range []struct {
		options []query.ListOption
		want    string
	}{
		{[]query.ListOption{query.After(first.Next)}, "it comes from a list in the order of an index"},
		{[]query.ListOption{query.After(first.Next), query.By(parcelCents.AtLeast(3)), query.Backward()}, "it comes from a list in the other direction"},
		{[]query.ListOption{query.After(plain.Next), query.Backward()}, "it comes from a list in the other direction"},
		{[]query.ListOption{query.After(first.Next), query.By(parcelOwner)}, `the place to go on from is one in index "cents", and this is index "owner"`},
		{[]query.ListOption{query.After(first.Next), query.By(parcelCents.AtLeast(5))}, `not in the selected part of index "cents"`},
		{[]query.ListOption{query.After(first.Next), query.By(parcelCents.Below(3))}, `not in the selected part of index "cents"`},
		{[]query.ListOption{query.After(first.Next), query.By(parcelCents), byKey}, "it comes from a list without OrderBy"},
		{[]query.ListOption{query.After(plain.Next), query.By(parcelCents)}, "it comes from a list without By"},
		{[]query.ListOption{query.After(ordered.Next), query.By(parcelCents)}, "it comes from a list with OrderBy"},
		{[]query.ListOption{query.After(base64.RawURLEncoding.EncodeToString([]byte(`{"key":"cDA=","p":"eA=="}`))), query.By(parcelCents)}, `one in index "x"`},
		{[]query.ListOption{query.By(nil)}, "query.By was given nil"},
		{[]query.ListOption{query.By(parcelCents), query.By(parcelOwner)}, "query.By was given twice"},
		{[]query.ListOption{query.By(projection.Index("cents", func(parcel) int { return 0 }))}, `index "cents" is not one of the view`},
	} {
		_, err := list(test.options...)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, test.want)
		for _, err := range query.All(t.Context(), a, parcels, test.options...) {
			require.ErrorContains(t, err, test.want)
		}
	}
	// In the selected part or not, what follows is what was behind the page then.
	wider, err := list(query.By(parcelCents), query.After(first.Next))
	require.NoError(t, err)
	require.Equal(t, []string{"p5", "p6"}, keys(wider))
	// The row that the page ended with may be gone.
	receipt = a.put(t, "p4", parcelGone{})
	second, err := list(query.By(parcelCents.AtLeast(3)), query.After(first.Next))
	require.NoError(t, err)
	require.Equal(t, []string{"p5", "p6"}, keys(second))
}

// Within a handler everything is read from its snapshot, by indexes too, and an
// index that has not been built is an error that can be told from others.
func TestBy_Reader(t *testing.T) {
	t.Parallel()
	store := memory.New()
	parcels := newParcels()
	richest := query.Handle("richest", func(ctx context.Context, r query.Reader, n int) ([]string, error) {
		var names []string
		for e, err := range query.All(ctx, r, parcels, query.By(parcelCents), query.Backward(), query.Limit(n)) {
			if err != nil {
				return nil, err
			}
			names = append(names, e.Key)
		}
		return names, nil
	}, parcels)
	a := startWith(t, store, store, parcels)
	for i := range 300 {
		a.put(t, fmt.Sprintf("p%03d", i), parcel{Cents: int64(i)})
	}
	receipt := a.put(t, "p300", parcel{Cents: 300})
	names, err := query.Ask(t.Context(), a, richest, 280, query.AtLeast(receipt))
	require.NoError(t, err)
	require.Len(t, names, 280)
	require.Equal(t, []string{"p300", "p299"}, names[:2])

	engine := projection.NewEngine(memory.New(), memory.New(), projection.Options{})
	require.NoError(t, engine.Add(parcels))
	_, err = query.List(t.Context(), &app{engine: engine}, parcels, query.By(parcelCents))
	require.ErrorIs(t, err, projection.ErrIndexNotBuilt)
	require.ErrorContains(t, err, `list view "parcels": index is not built yet: "cents"`)
}

// BenchmarkList reads 20 of 100,000 rows, the largest ones first, and the ten of
// one owner.
func BenchmarkList(b *testing.B) {
	const rows = 100_000
	byOwner := projection.Index("owner", func(r balance) string { return r.Owner })
	byCents := projection.Index("cents", func(r balance) int64 { return r.Cents })
	view := newBalances().Indexed(byOwner, byCents)
	store, err := sqlite.Open(context.Background(), filepath.Join(b.TempDir(), "events.db"))
	require.NoError(b, err)
	a := startOn(b, store, view)
	var receipt eventstore.Receipt
	for i := 0; i < rows; {
		c := eventstore.Commit{}
		for range 500 {
			stream := eventstore.Stream{Category: "account", ID: fmt.Sprint(i)}
			c.Events = append(
				c.Events, eventstore.Event{Stream: stream, Type: "account.opened", Data: fmt.Appendf(nil, `{"Owner":"owner%d"}`, i%(rows/10))},
				eventstore.Event{Stream: stream, Type: "account.deposited", Data: fmt.Appendf(nil, `{"Cents":%d}`, i*7919%rows)},
			)
			i++
		}
		receipt, err = store.Append(context.Background(), c)
		require.NoError(b, err)
	}
	require.NoError(b, a.engine.WaitFor(context.Background(), "balances", receipt.Last))
	for name, options := range map[string][]query.ListOption{
		"order/index":  {query.By(byCents), query.Backward(), query.Limit(20)},
		"order/sorted": {query.OrderBy(func(a, b balance) int { return cmp.Compare(b.Cents, a.Cents) }), query.Limit(20)},
		"owner/index":  {query.By(byOwner.Is("owner77"))},
		"owner/where":  {query.Where(func(_ string, r balance) bool { return r.Owner == "owner77" })},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				page, err := query.List(context.Background(), a, view, options...)
				if err != nil || len(page.Entries) < 10 {
					b.Fatal(err, len(page.Entries))
				}
			}
		})
	}
}
