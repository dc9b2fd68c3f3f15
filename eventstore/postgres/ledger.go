package postgres

import (
	"fmt"
	"slices"

	"github.com/google/uuid"
	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/deed-go/deed/eventstore"
)

// ledger is what the committer knows of the log up to one position: the heads
// of streams, and the last events. It is exact, because everything that was
// appended since is entered before it is used: the committer's own commits, and
// what others have written, which every round trip brings along.
type ledger struct {
	known  eventstore.Position
	last   uuid.UUID // id of the event at known; zero if it was not seen
	heads  *simplelru.LRU[eventstore.Stream, streamHead]
	recent recent // the events after recent.from, up to known
}

// streamHead is what appends need to know of a stream; zero if it does not
// exist.
type streamHead struct {
	revision eventstore.Revision
	last     uuid.UUID // id of the last event
}

const (
	mostHeads  = 65_536
	mostRecent = 8192
)

func newLedger() *ledger {
	heads, _ := simplelru.NewLRU[eventstore.Stream, streamHead](mostHeads, nil)
	return &ledger{heads: heads}
}

// reset forgets everything; the log ends at known.
func (l *ledger) reset(known eventstore.Position, last uuid.UUID) {
	l.known, l.last = known, last
	l.heads.Purge()
	l.recent = recent{from: known}
}

// enter adds the event that follows.
func (l *ledger) enter(e *eventstore.Recorded) {
	l.known, l.last = e.Position, e.ID
	l.heads.Add(e.Stream, streamHead{revision: e.Revision(), last: e.ID})
	l.recent.add(e)
	l.recent.trim(mostRecent)
}

// recognise returns an error when the event at the known position has another id
// than the one that was seen there.
func (l *ledger) recognise(id uuid.UUID) error {
	if l.last == uuid.Nil || id == l.last {
		return nil
	}
	return fmt.Errorf("%w: position %d has the event %s, but this process has seen %s there: %w", eventstore.ErrGap, l.known, id, l.last, errRewound(l.known-1, l.known))
}

// recent is a run of events with an index of what they are about.
type recent struct {
	from   eventstore.Position // the events after it are here
	events []mark
	tags   map[string]eventstore.Position // the last event with the tag
	kinds  map[kind]eventstore.Position   // the last event of the kind
}

// mark is what queries select an event by.
type mark struct {
	position eventstore.Position
	stream   eventstore.Stream
	typ      string
	tags     []string
}

func (r *recent) add(e *eventstore.Recorded) {
	if r.kinds == nil {
		r.tags, r.kinds = map[string]eventstore.Position{}, map[kind]eventstore.Position{}
	}
	r.events = append(r.events, mark{e.Position, e.Stream, e.Type, e.Tags})
	r.kinds[kind{e.Stream.Category, e.Type}] = e.Position
	for _, tag := range e.Tags {
		r.tags[tag] = e.Position
	}
}

// trim keeps about the last events.
func (r *recent) trim(most int) {
	if len(r.events) < 2*most {
		return
	}
	drop := len(r.events) - most
	for i := range r.events[:drop] {
		e := &r.events[i]
		for _, tag := range e.tags {
			if r.tags[tag] == e.position {
				delete(r.tags, tag)
			}
		}
	}
	r.from = r.events[drop-1].position
	copy(r.events, r.events[drop:])
	clear(r.events[most:])
	r.events = r.events[:most]
}

// firstMatch returns the position of the first event after the position that
// matches; 0 if none does. What lies before from is not looked at.
func (r *recent) firstMatch(q eventstore.Query, after eventstore.Position) eventstore.Position {
	if len(r.events) == 0 || !r.possible(&q, after) {
		return 0
	}
	start := 0
	if first := r.events[0].position; after >= first {
		start = int(after - first + 1)
	}
	var event eventstore.Recorded
	for i := min(start, len(r.events)); i < len(r.events); i++ {
		m := &r.events[i]
		event.Stream, event.Type, event.Tags = m.stream, m.typ, m.tags
		if q.Matches(&event) {
			return m.position
		}
	}
	return 0
}

// possible says no where the index alone knows that nothing matches.
func (r *recent) possible(q *eventstore.Query, after eventstore.Position) bool {
	if q.Everything {
		return true
	}
	for i := range q.Items {
		if r.possibleItem(&q.Items[i], after) {
			return true
		}
	}
	return false
}

func (r *recent) possibleItem(item *eventstore.Item, after eventstore.Position) bool {
	for _, tag := range item.Tags {
		if r.tags[tag] <= after {
			return false
		}
	}
	if item.Category == "" && len(item.Types) == 0 {
		return true
	}
	for name, last := range r.kinds {
		if last > after && (item.Category == "" || item.Category == name.category) &&
			(len(item.Types) == 0 || slices.Contains(item.Types, name.eventType)) {
			return true
		}
	}
	return false
}
