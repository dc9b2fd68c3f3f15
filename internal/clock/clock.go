// Package clock is the time that deed's background work and events see: the
// system's, or one that moves only when told. It imports nothing of deed.
package clock

import (
	"sync"
	"time"
)

// Clock tells the time. Implementations are safe for concurrent use.
type Clock interface {
	Now() time.Time
	// NewTimer returns a channel that receives once the clock has reached the
	// time, and a function that abandons the timer.
	NewTimer(at time.Time) (<-chan time.Time, func())
}

// System is the real clock; inside a testing/synctest bubble it is the
// bubble's.
type System struct{}

// Now returns the current time.
func (System) Now() time.Time { return time.Now() }

// lookAgain bounds how late a timer can be after the machine was suspended or
// its clock was set: timers of the time package do not notice either.
const lookAgain = 5 * time.Minute

// NewTimer waits by the wall clock, on timers of the time package.
func (System) NewTimer(at time.Time) (<-chan time.Time, func()) {
	at = at.Round(0) // without the monotonic reading
	t := &systemTimer{at: at, c: make(chan time.Time, 1)}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.timer = time.AfterFunc(t.left(), t.look)
	return t.c, t.stop
}

type systemTimer struct {
	at time.Time
	c  chan time.Time

	mu      sync.Mutex
	timer   *time.Timer
	stopped bool
}

func (t *systemTimer) left() time.Duration { return min(time.Until(t.at), lookAgain) }

func (t *systemTimer) look() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return
	}
	if now := time.Now(); now.Before(t.at) {
		t.timer.Reset(t.left())
	} else {
		t.stopped = true
		t.c <- now
	}
}

func (t *systemTimer) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	t.timer.Stop()
}

// Manual moves only by Set.
type Manual struct {
	mu     sync.Mutex
	now    time.Time
	timers map[*manualTimer]struct{}
}

type manualTimer struct {
	at time.Time
	c  chan time.Time
}

// NewManual returns a clock that stands at the time.
func NewManual(at time.Time) *Manual {
	return &Manual{now: at.UTC(), timers: map[*manualTimer]struct{}{}}
}

// Now returns the time last set.
func (m *Manual) Now() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

// NewTimer fires when Set reaches the time; at once if it is past.
func (m *Manual) NewTimer(at time.Time) (<-chan time.Time, func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := &manualTimer{at: at, c: make(chan time.Time, 1)}
	if !at.After(m.now) {
		t.c <- m.now
		return t.c, func() {}
	}
	m.timers[t] = struct{}{}
	return t.c, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.timers, t)
	}
}

// Set moves the clock forward and fires what is due; a time in the past
// changes nothing.
func (m *Manual) Set(to time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !to.After(m.now) {
		return
	}
	m.now = to.UTC()
	for t := range m.timers {
		if !t.at.After(m.now) {
			delete(m.timers, t)
			t.c <- m.now
		}
	}
}
