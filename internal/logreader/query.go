package logreader

import (
	"slices"

	"github.com/deed-go/deed/eventstore"
)

// covers reports whether a is known to select everything that b does. It may
// not know.
func covers(a, b eventstore.Query) bool {
	if a.Everything || b.Everything {
		return a.Everything
	}
	for i := range b.Items {
		if !slices.ContainsFunc(a.Items, func(item eventstore.Item) bool { return implied(&item, &b.Items[i]) }) {
			return false
		}
	}
	return true
}

// implied reports whether item a selects everything that item b does.
func implied(a, b *eventstore.Item) bool {
	if a.Category != "" && a.Category != b.Category && a.Category != b.Stream.Category {
		return false
	}
	if !a.Stream.IsZero() && a.Stream != b.Stream {
		return false
	}
	if len(a.Types) > 0 && (len(b.Types) == 0 || !contains(a.Types, b.Types)) {
		return false
	}
	if !contains(b.Tags, a.Tags) {
		return false
	}
	return a.Slices.IsZero() || !b.Slices.IsZero() && a.Slices.From <= b.Slices.From && b.Slices.To <= a.Slices.To
}

func contains(all, some []string) bool {
	if len(some) <= 4 || len(all) <= 4 {
		return !slices.ContainsFunc(some, func(s string) bool { return !slices.Contains(all, s) })
	}
	known := make(map[string]struct{}, len(all))
	for _, s := range all {
		known[s] = struct{}{}
	}
	return !slices.ContainsFunc(some, func(s string) bool { _, ok := known[s]; return !ok })
}

// clone returns a query that shares nothing with q, whose owner may change it.
func clone(q eventstore.Query) eventstore.Query {
	q.Items = slices.Clone(q.Items)
	for i := range q.Items {
		q.Items[i].Types, q.Items[i].Tags = slices.Clone(q.Items[i].Types), slices.Clone(q.Items[i].Tags)
	}
	return q
}

// union returns the query that selects what any of them does; false if that
// would be more than a query may be.
func union(queries []eventstore.Query) (eventstore.Query, bool) {
	all := clone(queries[0])
	for _, q := range queries[1:] {
		switch {
		case covers(all, q):
		case covers(q, all):
			all = clone(q)
		default:
			for _, item := range clone(q).Items {
				all.Items = add(all.Items, item)
			}
		}
	}
	return all, all.Validate() == nil
}

// add joins an item to others, with as few items as that takes.
func add(items []eventstore.Item, item eventstore.Item) []eventstore.Item {
	if slices.ContainsFunc(items, func(other eventstore.Item) bool { return implied(&other, &item) }) {
		return items
	}
	items = slices.DeleteFunc(items, func(other eventstore.Item) bool { return implied(&item, &other) })
	for i := range items {
		if plain(&items[i]) && plain(&item) && items[i].Category == item.Category {
			types := append(items[i].Types, item.Types...)
			slices.Sort(types)
			items[i].Types = slices.Compact(types)
			return items
		}
	}
	return append(items, item)
}

// plain reports whether the item asks for types, within a category at most.
func plain(i *eventstore.Item) bool {
	return len(i.Types) > 0 && i.Stream.IsZero() && len(i.Tags) == 0 && i.Slices.IsZero()
}

// filter finds the events of one member among those of all. It agrees with
// Query.Matches.
type filter struct {
	everything bool
	byType     map[string]kind
	untyped    []eventstore.Item
}

// kind says which events of a type are selected.
type kind struct {
	all   bool
	items []eventstore.Item
}

func newFilter(q eventstore.Query) *filter {
	f := &filter{everything: q.Everything, byType: map[string]kind{}}
	for _, item := range clone(q).Items {
		if len(item.Types) == 0 {
			f.untyped = append(f.untyped, item)
			continue
		}
		types := item.Types
		item.Types = nil // looked up
		all := item.Category == "" && item.Stream.IsZero() && len(item.Tags) == 0 && item.Slices.IsZero()
		for _, t := range types {
			k := f.byType[t]
			if all {
				k.all = true
			} else {
				k.items = append(k.items, item)
			}
			f.byType[t] = k
		}
	}
	return f
}

func (f *filter) selects(r *eventstore.Recorded) bool {
	if f.everything {
		return true
	}
	if len(f.byType) > 0 {
		k := f.byType[r.Type]
		if k.all {
			return true
		}
		for i := range k.items {
			if k.items[i].Matches(r) {
				return true
			}
		}
	}
	for i := range f.untyped {
		if f.untyped[i].Matches(r) {
			return true
		}
	}
	return false
}

// pick returns the events that are selected, and their places; no places when
// those are all.
func (f *filter) pick(events []eventstore.Recorded) ([]eventstore.Recorded, []int) {
	same := 0
	for same < len(events) && f.selects(&events[same]) {
		same++
	}
	if same == len(events) {
		return events, nil
	}
	places := make([]int, same, len(events))
	for i := range places {
		places[i] = i
	}
	for i := same + 1; i < len(events); i++ {
		if f.selects(&events[i]) {
			places = append(places, i)
		}
	}
	if len(places) == 0 {
		return nil, places
	}
	picked := make([]eventstore.Recorded, len(places))
	for i, place := range places {
		picked[i] = events[place]
	}
	return picked, places
}
