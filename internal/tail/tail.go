// Package tail keeps the last events of a log in memory, so that subscribers
// who keep up never read from storage. It imports eventstore only.
package tail

import (
	"sort"
	"sync"

	"github.com/deed-go/deed/eventstore"
)

// Tail is a bounded run of the latest events, with contiguous positions. All
// methods may be called concurrently.
type Tail struct {
	mostEvents, mostBytes int

	mu     sync.Mutex
	chunks []chunk
	events int
	bytes  int
	head   eventstore.Position
	grown  chan struct{}
	closed bool
}

// chunk is what one batch appended; it is never changed.
type chunk struct {
	first  eventstore.Position
	events []eventstore.Recorded
	bytes  int
}

// New returns a tail of a log with the given head, of which it keeps nothing
// yet.
func New(head eventstore.Position, mostEvents, mostBytes int) *Tail {
	return &Tail{mostEvents: mostEvents, mostBytes: mostBytes, head: head, grown: make(chan struct{})}
}

// Append adds the events that follow the head, and wakes who waits. The slice
// is kept and must not be changed. It panics when the positions do not follow:
// handing that on would hide a hole from subscribers.
func (t *Tail) Append(events []eventstore.Recorded) {
	if len(events) == 0 {
		return
	}
	c := chunk{first: events[0].Position, events: events}
	for i := range events {
		if events[i].Position != c.first+eventstore.Position(i) {
			panic("tail: the positions of a batch are not contiguous")
		}
		c.bytes += len(events[i].Data)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.first != t.head+1 {
		panic("tail: a batch does not follow the head")
	}
	t.chunks = append(t.chunks, c)
	t.events += len(events)
	t.bytes += c.bytes
	t.head = events[len(events)-1].Position
	drop := 0
	for drop < len(t.chunks)-1 && (t.events > t.mostEvents || t.bytes > t.mostBytes) {
		t.events -= len(t.chunks[drop].events)
		t.bytes -= t.chunks[drop].bytes
		t.chunks[drop] = chunk{}
		drop++
	}
	t.chunks = t.chunks[drop:]
	t.wake()
}

// Skip moves the head without the events in between, which readers then find
// in storage, and wakes who waits. What was kept is dropped. It panics when the
// head would not move forward.
func (t *Tail) Skip(head eventstore.Position) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if head <= t.head {
		panic("tail: the head does not move forward")
	}
	t.chunks, t.events, t.bytes, t.head = nil, 0, 0, head
	t.wake()
}

func (t *Tail) wake() {
	close(t.grown)
	t.grown = make(chan struct{})
}

// Close wakes who waits, for good.
func (t *Tail) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.closed = true
		t.wake()
	}
}

// Snapshot is how the log stood at one moment.
type Snapshot struct {
	Head   eventstore.Position
	Closed bool
	// Grown is closed when the head has moved or the tail was closed.
	Grown <-chan struct{}
	// Complete says whether Events holds all events after the asked position.
	Complete bool
	// Events follow the asked position, in batches; they must not be changed.
	Events [][]eventstore.Recorded
}

// Since returns what follows the position.
func (t *Tail) Since(after eventstore.Position) Snapshot {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Snapshot{Head: t.head, Closed: t.closed, Grown: t.grown}
	if after >= t.head {
		s.Complete = true
		return s
	}
	if len(t.chunks) == 0 || after+1 < t.chunks[0].first {
		return s
	}
	s.Complete = true
	i := sort.Search(len(t.chunks), func(i int) bool { return t.chunks[i].first > after+1 }) - 1
	s.Events = make([][]eventstore.Recorded, 0, len(t.chunks)-i)
	for _, c := range t.chunks[i:] {
		events := c.events
		if c.first <= after {
			events = events[after+1-c.first:]
		}
		s.Events = append(s.Events, events)
	}
	return s
}

// Head returns the position of the last event.
func (t *Tail) Head() eventstore.Position {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.head
}
