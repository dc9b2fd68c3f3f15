package projection

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// progress is what the outside sees of a runner, and where it waits.
type progress struct {
	name string

	mu      sync.Mutex
	through eventstore.Position
	stored  eventstore.Position // of the checkpoint; events between it and through do not concern the rows
	phase   Phase
	started bool  // a run has read its checkpoint since the engine was made, or since the rows were emptied
	ended   bool  // the last run is over; failure says why
	failure error // set when the run ended by itself
	lastErr error
	errAt   time.Time
	retryAt time.Time // while retrying
	inline  bool      // this runner owns it, and has left it to the appends
	pace    pace
	wake    chan struct{}
	waiters []waiter
	// wanted says that there is a new waiter, doubted that rows were seen which
	// contain less than is said here. Whoever runs the projection listens, or not.
	wanted, doubted chan struct{}
}

type waiter struct {
	through eventstore.Position
	settle  bool // is content when the runner waits for a later time
	done    chan error
}

func newProgress(name string) *progress {
	return &progress{
		name: name, phase: PhaseStopped,
		wake: make(chan struct{}, 1), wanted: make(chan struct{}, 1), doubted: make(chan struct{}, 1),
	}
}

// poke signals without waiting.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// verdict says whether a waiter is done, and with what.
func (p *progress) verdict(w *waiter) (error, bool) {
	switch {
	case p.started && p.through >= w.through:
		return nil, true
	case p.ended && p.failure != nil:
		return fmt.Errorf("%w: %q: %w", ErrStopped, p.name, p.failure), true
	case p.ended:
		return fmt.Errorf("%w: %q", ErrStopped, p.name), true
	case w.settle && (!p.retryAt.IsZero() || p.phase == PhasePaused):
		return nil, true
	}
	return nil, false
}

func (p *progress) wait(ctx context.Context, through eventstore.Position, settle bool) error {
	w := waiter{through: through, settle: settle}
	p.mu.Lock()
	if err, ok := p.verdict(&w); ok {
		p.mu.Unlock()
		return err
	}
	w.done = make(chan error, 1)
	p.waiters = append(p.waiters, w)
	p.mu.Unlock()
	poke(p.wanted)
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		for i := range p.waiters {
			if p.waiters[i].done == w.done {
				p.waiters[i] = p.waiters[len(p.waiters)-1]
				p.waiters = p.waiters[:len(p.waiters)-1]
				break
			}
		}
		return ctx.Err()
	}
}

// change alters the progress and answers the waiters whose time has come.
func (p *progress) change(alter func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	alter()
	p.pace.moved(time.Now(), p.through)
	kept := p.waiters[:0]
	for i := range p.waiters {
		if err, ok := p.verdict(&p.waiters[i]); ok {
			p.waiters[i].done <- err
			continue
		}
		kept = append(kept, p.waiters[i])
	}
	clear(p.waiters[len(kept):])
	p.waiters = kept
}

// contains reports whether rows that were committed with the checkpoint
// contain everything up to through.
func (p *progress) contains(checkpoint, through eventstore.Position) bool {
	if checkpoint >= through {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.started || p.through < through {
		return false
	}
	if checkpoint < p.stored {
		// The snapshot is old, or somebody else has emptied the rows.
		poke(p.doubted)
		return false
	}
	return true
}

// awaited reports whether anybody waits for more than is known.
func (p *progress) awaited() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiters) > 0
}

// observe notes what the owner of the projection, which is another one, has
// stored: no more is known about it, and no less. It reports whether that is news.
func (p *progress) observe(stored eventstore.Position) (news bool) {
	p.change(func() {
		news = !p.started || p.stored != stored
		p.started, p.through, p.stored, p.phase = true, stored, stored, PhaseStandby
	})
	return news
}

// applied notes that an append of this process has moved the projection, if that
// can be so: whoever owns it and has taken it back from the appends knows better.
func (p *progress) applied(at eventstore.Position) {
	p.change(func() {
		if (p.inline || p.phase == PhaseStandby) && p.started && at > p.through {
			p.through, p.stored = at, at
		}
	})
}

// emptying says that the rows are about to be removed: nobody may rely on them
// any more. What it returns takes that back.
func (p *progress) emptying() (undo func()) {
	var through, stored eventstore.Position
	var started bool
	p.change(func() {
		through, stored, started = p.through, p.stored, p.started
		p.through, p.stored, p.started = 0, 0, false
	})
	return func() {
		p.change(func() { p.through, p.stored, p.started = through, stored, started })
	}
}

func (p *progress) reached() eventstore.Position {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.through
}

func (p *progress) status() (s Status, started bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Status{Phase: p.phase, Inline: p.inline, Position: p.through, Err: p.lastErr, ErrAt: p.errAt, RetryAt: p.retryAt}, p.started
}

func (p *progress) nextDue() (time.Time, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.retryAt, !p.retryAt.IsZero()
}

// due ends a pause whose time has come; what was retried counts as running
// from here on.
func (p *progress) due(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.retryAt.IsZero() && !p.retryAt.After(now) {
		p.endPause()
	}
}

func (p *progress) endPause() {
	p.retryAt, p.phase = time.Time{}, PhaseCatchingUp
	poke(p.wake)
}

// forgetSeen drops what was seen of the owner, if another one is it: the rows are
// not what they were.
func (p *progress) forgetSeen() {
	p.change(func() {
		if p.phase == PhaseStandby {
			p.through, p.stored, p.started = 0, 0, false
		}
	})
}

// over reports whether the last run has ended.
func (p *progress) over() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended
}

// owned returns how far the runner has come, if it is the one that runs the
// projection and has begun.
func (p *progress) owned() (through eventstore.Position, is bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.through, p.started && !p.ended && p.phase != PhaseStandby
}

// How often the rate is taken, and how much of the last measure is in it.
const (
	measureEvery  = 200 * time.Millisecond
	measureWeight = 0.3
)

// pace is how fast positions are passed.
type pace struct {
	at       time.Time
	from     eventstore.Position
	rate     float64 // positions a second
	measured bool
}

// moved notes a position. One that lies behind begins anew.
func (s *pace) moved(now time.Time, p eventstore.Position) {
	passed := now.Sub(s.at)
	switch {
	case s.at.IsZero() || p < s.from:
		*s = pace{at: now, from: p}
	case passed >= measureEvery:
		rate := float64(p-s.from) / passed.Seconds()
		if s.measured {
			rate = measureWeight*rate + (1-measureWeight)*s.rate
		}
		*s = pace{at: now, from: p, rate: rate, measured: true}
	}
}

// speed returns the rate at which the runner catches up; 0 when it does not.
func (p *progress) speed() float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.phase != PhaseCatchingUp {
		return 0
	}
	p.pace.moved(time.Now(), p.through)
	return p.pace.rate
}
