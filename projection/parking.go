package projection

import (
	"fmt"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/deed-go/deed/eventstore"
)

// ParkedBy returns the view with another answer to what must not overtake an
// event that was set aside.
//
// Without it, that is what its rows say: once an event is set aside, later events
// of any stream that touch one of the rows that it touches are set aside as well,
// and so on, and are replayed in the order of the log, so that the rows are then
// what they would be had nothing failed. Other rows go on. An event that
// cannot be decoded, or whose keys function fails, does not tell its rows: it holds
// back its stream.
//
// With it, the event and later ones with the same key are set aside. The key can be
// told without decoding the event, from its stream, tags or metadata. It is up to
// the function that events that touch one row have one key. An empty key, or a panic,
// means the event's stream. Events that are set aside already keep their keys.
func (v *ViewDefinition[R]) ParkedBy(key func(r eventstore.Recorded) string) *ViewDefinition[R] {
	w := *v
	if w.parkedBy = key; key == nil {
		w.mistakes = append(slices.Clip(w.mistakes), errParkedByNil)
	}
	return &w
}

// ParkedBy returns the projection with another answer to what must not overtake an
// event that was set aside: later events with the same key, of any stream, are set
// aside as well, and replayed in the order of the log. Without it the key is the
// stream, and so it is where the function returns an empty key or panics. Events
// that are set aside already keep their keys.
//
// It is for projections that are not [SQLDefinition.Partitioned]: the streams of one
// key could be in different parts, which do not wait for one another.
func (d *SQLDefinition) ParkedBy(key func(r eventstore.Recorded) string) *SQLDefinition {
	e := *d
	if e.parkedBy = key; key == nil {
		e.mistakes = append(slices.Clip(e.mistakes), errParkedByNil)
	}
	return &e
}

var errParkedByNil = fmt.Errorf("%w: the function given to ParkedBy is nil", eventstore.ErrInvalid)

// parkedInParts refuses what SQLDefinition.ParkedBy says that it cannot keep.
func (d *SQLDefinition) parkedInParts() error {
	if d.parkedBy == nil || d.parts <= 1 {
		return nil
	}
	return fmt.Errorf("%w: it is both ParkedBy and Partitioned: streams of one key may be in different partitions, which do not wait for one another: leave one of the two out, or use a view", eventstore.ErrInvalid)
}

// parkedKeys is what later events must not have, to be folded while others are
// set aside.
type parkedKeys map[string]struct{}

// A key is told from a stream by its first byte.
const (
	parkedKey    = "k"
	parkedStream = "s"
)

func (p parkedKeys) add(stream eventstore.Stream, keys []string) {
	for _, key := range keys {
		p[parkedKey+key] = struct{}{}
	}
	if len(keys) == 0 {
		p[parkedStream+stream.String()] = struct{}{}
	}
}

// has reports whether an event of the stream with the keys must wait.
func (p parkedKeys) has(stream eventstore.Stream, keys []string) bool {
	if len(p) == 0 {
		return false
	}
	for _, key := range keys {
		if _, ok := p[parkedKey+key]; ok {
			return true
		}
	}
	_, ok := p[parkedStream+stream.String()]
	return ok
}

// park marks what must wait for events that were set aside, and for what waits
// before it in items. That becomes known to others when it is stored.
func (r *runner) park(items []item) {
	if len(r.parked) == 0 && !r.marked {
		return
	}
	r.marked = len(r.parked) > 0
	also := parkedKeys{}
	for i := range items {
		it := &items[i]
		if it.parked = false; it.foreign {
			continue
		}
		stream, keys := it.event.Stream, r.folder.holds(it)
		if it.parked = r.parked.has(stream, keys) || also.has(stream, keys); it.parked {
			also.add(stream, keys)
		}
	}
}

// parkedNow notes the keys of items that were stored as dead letters.
func (r *runner) parkedNow(items []item) {
	for i := range items {
		if it := &items[i]; it.parked {
			r.parked.add(it.event.Stream, r.folder.holds(it))
		}
	}
}

// holds implements folder.
func (f *viewFolder[R]) holds(it *item) []string {
	if f.view.parkedBy != nil {
		return parkingKey(f.view.parkedBy, it)
	}
	if h, ok := f.handler(it.event.Type); ok && h.keys == nil {
		return asText(it.event.Stream.ID)
	}
	return asText(it.keys...)
}

// asText returns the keys as JSON can keep them: one that is no text is quoted.
func asText(keys ...string) []string {
	if slices.ContainsFunc(keys, func(key string) bool { return !utf8.ValidString(key) }) {
		keys = slices.Clone(keys)
		for i, key := range keys {
			if !utf8.ValidString(key) {
				keys[i] = strconv.Quote(key)
			}
		}
	}
	return keys
}

// holds implements folder.
func (f *sqlFolder) holds(it *item) []string {
	if f.definition.parkedBy == nil {
		return nil
	}
	return parkingKey(f.definition.parkedBy, it)
}

func parkingKey(of func(eventstore.Recorded) string, it *item) []string {
	key, err := guard(func() (string, error) { return of(*it.event), nil })
	if err != nil || key == "" {
		return nil
	}
	return asText(key)
}
