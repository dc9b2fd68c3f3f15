// Package groupcommit gathers what many goroutines hand in for one goroutine
// that takes it in batches: while one batch is made durable, the next gathers.
// It imports nothing of deed.
package groupcommit

import (
	"slices"
	"sync"
)

// Queue is first in, first out, and never waits on purpose. The zero Queue is
// ready; use it by pointer.
type Queue[T any] struct {
	// Wake, when set, is called after every Put and by Close, without the queue's
	// lock. It must not block.
	Wake func()

	mu      sync.Mutex
	waiting []*Entry[T]
	live    int
	closed  bool
}

// Entry is one value on its way.
type Entry[T any] struct {
	Value T
	// Cost counts against the limit given to Take, for example bytes.
	Cost  int
	state state
}

type state uint8

const (
	waiting state = iota
	taken
	removed
)

// Put appends the value; nil when the queue is closed.
func (q *Queue[T]) Put(value T, cost int) *Entry[T] {
	e := &Entry[T]{Value: value, Cost: cost}
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return nil
	}
	q.waiting = append(q.waiting, e)
	q.live++
	q.mu.Unlock()
	if q.Wake != nil {
		q.Wake()
	}
	return e
}

// Remove takes the entry out, and reports whether no batch had taken it.
func (q *Queue[T]) Remove(e *Entry[T]) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if e.state != waiting {
		return false
	}
	e.state = removed
	q.live--
	return true
}

// Take appends the next batch to into: as many entries as fit into count and
// cost, but at least one if any waits. An entry that was taken cannot be
// removed.
func (q *Queue[T]) Take(into []T, count, cost int) []T {
	q.mu.Lock()
	defer q.mu.Unlock()
	n, used := 0, 0
	for n < len(q.waiting) {
		e := q.waiting[n]
		if e.state == waiting {
			if used > 0 && (len(into) >= count || used+e.Cost > cost) {
				break
			}
			e.state = taken
			q.live--
			used += max(e.Cost, 1)
			into = append(into, e.Value)
		}
		n++
	}
	q.waiting = slices.Delete(q.waiting, 0, n)
	return into
}

// Len returns how many entries wait.
func (q *Queue[T]) Len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.live
}

// Close refuses further values; what waits can still be taken.
func (q *Queue[T]) Close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	if q.Wake != nil {
		q.Wake()
	}
}

// Closed reports whether Close was called.
func (q *Queue[T]) Closed() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.closed
}
