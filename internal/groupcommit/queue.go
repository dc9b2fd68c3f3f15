// Package groupcommit gathers what many goroutines hand in for one goroutine
// that takes it in batches: while one batch is made durable, the next gathers.
// It imports nothing of deed.
package groupcommit

import (
	"slices"
	"sync"
	"time"
)

// Queue is first in, first out, and waits on purpose in Gather only. The zero
// Queue is ready; use it by pointer.
type Queue[T any] struct {
	// Wake, when set, is called after every Put and by Close, without the queue's
	// lock. It must not block.
	Wake func()

	mu      sync.Mutex
	waiting []*Entry[T]
	live    int
	cost    int // of what waits
	closed  bool
	last    int           // entries taken since Gather
	wanted  int           // how many Gather waits for; 0: it does not wait
	ready   chan struct{} // there are as many

	// Gather's own.
	returning float64 // the part of a batch that is taken to come back at once
	rests     int     // how often it did not wait
	missed    bool    // the last wait was in vain
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
	q.cost += cost
	q.tell()
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
	q.cost -= e.Cost
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
			q.cost -= e.Cost
			q.last++
			used += max(e.Cost, 1)
			into = append(into, e.Value)
		}
		n++
	}
	q.waiting = slices.Delete(q.waiting, 0, n)
	return into
}

// tell wakes Gather when it has what it waits for. It needs the lock.
func (q *Queue[T]) tell() {
	if q.wanted > 0 && (q.live >= q.wanted || q.closed) {
		q.wanted = 0
		q.ready <- struct{}{}
	}
}

const (
	// largeBatch is from where on what a batch costs by itself is a small part.
	largeBatch = 128
	// worthWaiting is the part of a batch that must be taken to come back.
	worthWaiting = 0.5
	// restsBetween are the batches until it is tried again whether they do.
	restsBetween = 64
)

// Gather is called by whoever takes, before it takes a batch, with the limits
// of that. Callers that wait for their answer before they come again, as most
// do, fall into two groups that take turns, each in half a batch, as one group is
// answered when the other's batch is already taken. Gather waits, at most as
// long as given (or a millisecond where timers are that coarse), until those who
// were just answered are back, so that one batch holds both. When they do not
// come back twice in a row it waits for no more than did, or, when these are few, for
// nobody, and tries again after many batches.
func (q *Queue[T]) Gather(most time.Duration, count, cost int) {
	q.mu.Lock()
	before, last := q.live, q.last
	q.last = 0
	if q.closed || last == 0 || last > largeBatch || last == 1 && before == 0 || before >= count || q.cost >= cost {
		q.mu.Unlock()
		return
	}
	if q.ready == nil {
		q.ready, q.returning = make(chan struct{}, 1), 1
	}
	if q.returning < worthWaiting {
		if q.rests++; q.rests < restsBetween {
			q.mu.Unlock()
			return
		}
		q.returning, q.rests, q.missed = 1, 0, true
	}
	expected := min(int(float64(last)*q.returning+0.5), count-before)
	q.wanted = before + expected
	q.mu.Unlock()

	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-q.ready:
	case <-timer.C:
	}

	q.mu.Lock()
	defer q.mu.Unlock()
	q.wanted = 0
	select {
	case <-q.ready: // told just after the time was up
	default:
	}
	switch got := q.live - before; {
	case got >= expected:
		q.returning += (1 - q.returning) / 16
		q.missed = false
	case !q.missed:
		q.missed = true // once is nothing: a collection of garbage may have kept them
	default:
		q.returning = float64(max(got, 0)) / float64(last)
	}
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
	q.tell()
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
