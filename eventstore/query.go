package eventstore

import (
	"fmt"
	"slices"
)

// Limits of queries. They are the same on every backend, and such that one
// statement of each can answer the largest query; more is [ErrTooLarge].
const (
	MaxQueryItems = 100
	MaxItemTypes  = 1000
	MaxItemTags   = 32
)

// Query selects events: everything, or those that match any of its items. The
// zero Query selects nothing and is refused with [ErrInvalid], so that a
// forgotten filter is not mistaken for "everything".
//
// The item rules are those of dcb.events: an item matches an event that has
// any of its types and all of its tags.
//
// A query has at most [MaxQueryItems] items, an item at most [MaxItemTypes]
// types and [MaxItemTags] tags.
type Query struct {
	Everything bool
	Items      []Item
}

// Item constrains events. What is zero does not constrain; what is set must
// all hold. An item without any constraint is refused: say [All].
type Item struct {
	// Category selects streams of one category; "account" never matches "accounting".
	Category string
	// Stream selects one stream.
	Stream Stream
	// Types selects events whose type is any of these.
	Types []string
	// Tags selects events that carry all of these.
	Tags []string
	// Slices selects streams whose slice lies in the range.
	Slices SliceRange
}

// SliceRange is the half-open range of slices [From, To). The zero range does
// not constrain.
type SliceRange struct{ From, To uint16 }

// IsZero reports whether r does not constrain.
func (r SliceRange) IsZero() bool { return r == SliceRange{} }

// All selects every event.
func All() Query { return Query{Everything: true} }

// Match selects the events that match any of the items.
func Match(items ...Item) Query { return Query{Items: items} }

// OneStream selects the events of one stream.
func OneStream(s Stream) Query { return Match(Item{Stream: s}) }

// OneCategory selects the events of one category.
func OneCategory(category string) Query { return Match(Item{Category: category}) }

// OfTypes selects the events of any of the types.
func OfTypes(types ...string) Query { return Match(Item{Types: types}) }

// Tagged selects the events that carry all the tags.
func Tagged(tags ...string) Query { return Match(Item{Tags: tags}) }

// IsZero reports whether q was left unset.
func (q Query) IsZero() bool { return !q.Everything && len(q.Items) == 0 }

// Validate refuses queries that select nothing by mistake, break the rules of
// names, or exceed a limit.
func (q Query) Validate() error {
	switch {
	case q.Everything && len(q.Items) > 0:
		return fmt.Errorf("%w: the query asks for everything and for %d items: choose one", ErrInvalid, len(q.Items))
	case q.IsZero():
		return fmt.Errorf("%w: the query is empty: use eventstore.All() for everything, or give it items", ErrInvalid)
	}
	if len(q.Items) > MaxQueryItems {
		return fmt.Errorf("%w: the query has %d items, at most %d are allowed", ErrTooLarge, len(q.Items), MaxQueryItems)
	}
	for i, item := range q.Items {
		if err := item.validate(); err != nil {
			return fmt.Errorf("query item %d: %w", i, err)
		}
	}
	return nil
}

func (i Item) validate() error {
	if i.Category == "" && i.Stream.IsZero() && len(i.Types) == 0 && len(i.Tags) == 0 && i.Slices.IsZero() {
		return fmt.Errorf("%w: it constrains nothing: use eventstore.All() for everything", ErrInvalid)
	}
	if len(i.Types) > MaxItemTypes {
		return fmt.Errorf("%w: it has %d types, at most %d are allowed: divide them among several items", ErrTooLarge, len(i.Types), MaxItemTypes)
	}
	if len(i.Tags) > MaxItemTags {
		return fmt.Errorf("%w: it has %d tags, at most %d are allowed", ErrTooLarge, len(i.Tags), MaxItemTags)
	}
	if i.Category != "" {
		if err := ValidateCategory(i.Category); err != nil {
			return err
		}
	}
	if !i.Stream.IsZero() {
		if err := i.Stream.Validate(); err != nil {
			return err
		}
	}
	for _, t := range i.Types {
		if err := validateText("event type", t, MaxEventTypeBytes); err != nil {
			return err
		}
	}
	for _, t := range i.Tags {
		if err := validateText("tag", t, MaxTagBytes); err != nil {
			return err
		}
	}
	if !i.Slices.IsZero() && (i.Slices.From >= i.Slices.To || i.Slices.To > Slices) {
		return fmt.Errorf("%w: the slice range [%d, %d) is empty or beyond %d", ErrInvalid, i.Slices.From, i.Slices.To, Slices)
	}
	return nil
}

// Matches reports whether the query selects the event. Every backend's answer
// must agree with it.
func (q Query) Matches(r *Recorded) bool {
	if q.Everything {
		return true
	}
	for i := range q.Items {
		if q.Items[i].Matches(r) {
			return true
		}
	}
	return false
}

// Matches reports whether the item selects the event.
func (i *Item) Matches(r *Recorded) bool {
	if i.Category != "" && i.Category != r.Stream.Category {
		return false
	}
	if !i.Stream.IsZero() && i.Stream != r.Stream {
		return false
	}
	if len(i.Types) > 0 && !slices.Contains(i.Types, r.Type) {
		return false
	}
	for _, tag := range i.Tags {
		if !slices.Contains(r.Tags, tag) {
			return false
		}
	}
	if !i.Slices.IsZero() {
		if s := r.Stream.Slice(); s < i.Slices.From || s >= i.Slices.To {
			return false
		}
	}
	return true
}
