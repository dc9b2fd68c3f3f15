package aggregate

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// activation is an aggregate in memory. Its calls are decided by one goroutine,
// which exists while there are any.
//
// The tip is the state after every commit that was handed to the store, durable
// or not; the next call is decided on it. Calls that were decided wait in
// entries, in that order, and are answered from its front: a commit when it is
// durable, anything else when everything before it is. When a commit fails,
// whatever was decided after it is decided again.
type activation[S any] struct {
	runtime *Runtime
	def     *Definition[S]
	stream  eventstore.Stream

	// Guarded by the runtime's lock.
	place resident
	queue []*call[S]

	wake chan struct{} // has capacity 1; nobody calls while it is at rest

	calls atomic.Uint64 // how many there have been

	// The rest belongs to the goroutine.
	loaded  bool // state, tip and durable are those of the log
	hinted  bool // the state began with a snapshot
	replay  bool // the next load must not use one
	state   S
	tip     uint64    // version, commits on their way included
	tipLast uuid.UUID // id of the tip's last event
	durable eventstore.Revision
	depth   int // commits that may be on their way
	flying  int // commits that are
	late    bool
	todo    []*call[S] // to decide, in order
	entries []*call[S] // decided, in order
	keys    map[string]*call[S]
	current *call[S] // whose user code runs: being decided, or loaded for
	// fresh is the number of the last call for which durable is known to be no
	// older than the call: other processes write, too.
	fresh uint64
}

func (a *activation[S]) name() string { return a.stream.String() }

func (a *activation[S]) run() {
	rests := false
	defer func() {
		if !rests {
			a.runOn()
		}
	}()
	for {
		if len(a.todo) == 0 {
			a.take()
		}
		settled := a.settle()
		switch {
		case a.runtime.life.Err() != nil:
			a.giveUp()
			if rests = a.rest(); rests {
				return
			}
		case a.next() || settled:
		case len(a.entries) > 0:
			a.wait()
		default:
			if rests = a.rest(); rests {
				return
			}
		}
	}
}

// lead does for the only call of an activation at rest what run would do, on
// the caller's own goroutine, which saves two hand-overs. Whatever needs more
// than deciding and waiting for the commit, or would make the caller wait for
// anything but its own answer, is left to run.
func (a *activation[S]) lead(c *call[S]) {
	rests := false
	defer func() {
		switch {
		case rests:
		case a.current != nil:
			a.runOn()
		default:
			c.done = make(chan outcome, 1) // the answer now comes from elsewhere
			a.runtime.mu.Lock()
			a.runtime.start(a.run)
			a.runtime.mu.Unlock()
		}
	}()
	a.take()
	if len(a.todo) > 1 || !a.next() || len(a.entries) == 0 || c.kind != commit {
		return
	}
	select {
	case <-c.pending.Done():
	case <-c.ctx.Done():
		return
	case <-a.wake: // somebody else calls
		return
	case <-a.runtime.life.Done():
		return
	}
	if receipt, err := c.pending.Result(); err != nil || receipt.Duplicate {
		return
	}
	a.settle()
	rests = a.rest()
}

// runOn carries on in a new goroutine after user code has ended this one, as
// t.FailNow does in a test.
func (a *activation[S]) runOn() {
	if c := a.current; c != nil {
		a.current = nil
		err := fmt.Errorf("the decision on %q ended its goroutine (runtime.Goexit, for example by t.FailNow)", a.stream)
		if c.kind == commit {
			err = unknownOutcome(err)
		}
		c.answer(eventstore.Receipt{}, err, false)
		a.loaded = false
	}
	go a.run()
}

// take moves what callers have queued to the calls to decide.
func (a *activation[S]) take() {
	a.runtime.mu.Lock()
	defer a.runtime.mu.Unlock()
	a.todo = append(a.todo, a.queue...)
	clear(a.queue)
	a.queue = a.queue[:0]
}

// wait returns when the oldest commit is decided or there are new calls.
func (a *activation[S]) wait() {
	select {
	case <-a.entries[0].pending.Done():
	case <-a.wake:
	case <-a.runtime.life.Done():
	}
}

// giveUp answers everybody when the runtime was abandoned.
func (a *activation[S]) giveUp() {
	a.take()
	for _, c := range a.entries {
		err := ErrStopped
		if c.kind == commit || c.kind == echo {
			err = unknownOutcome(ErrStopped)
		}
		c.answer(eventstore.Receipt{}, err, false)
	}
	for _, c := range a.todo {
		c.answer(eventstore.Receipt{}, ErrStopped, false)
	}
	a.entries, a.todo, a.flying = nil, nil, 0
	a.forget()
}

// forget makes the next call load the state again.
func (a *activation[S]) forget() {
	var none S
	a.loaded, a.state, a.tip, a.tipLast, a.durable = false, none, 0, uuid.Nil, eventstore.Revision{}
}

// next decides one call, if one may be decided now.
func (a *activation[S]) next() bool {
	if len(a.todo) == 0 || a.flying >= a.depth || a.late {
		return false
	}
	c := a.todo[0]
	switch {
	case c.left():
		a.pop()
		return true
	case c.req.Boundary != nil:
		if len(a.entries) > 0 {
			return false
		}
		a.pop()
		a.current = c
		a.decideBoundary(c)
		a.current = nil
		return true
	}
	if first := a.keys[c.req.Key]; first != nil {
		a.pop()
		a.repeat(c, first)
		return true
	}
	if !a.loaded && len(a.entries) > 0 {
		return false
	}
	a.pop()
	a.current = c
	if !a.loaded {
		if err := a.load(c); err != nil {
			a.current = nil
			for _, c := range append([]*call[S]{c}, a.todo...) {
				c.answer(eventstore.Receipt{}, err, false)
			}
			a.todo = nil
			a.forget()
			return true
		}
	}
	a.decide(c)
	a.current = nil
	return true
}

func (a *activation[S]) pop() { a.todo = dropFirst(a.todo) }

// dropFirst lets the last of a line leave its memory to the next one.
func dropFirst[T any](line []*T) []*T {
	line[0] = nil
	if len(line) == 1 {
		return line[:0]
	}
	return line[1:]
}

func (a *activation[S]) load(c *call[S]) error {
	fresh := a.calls.Load()
	hints := !a.replay
	a.replay = false
	h, err := load(a.runtime.detach(c.ctx), a.runtime, a.def, a.stream, hints)
	if err != nil {
		return a.runtime.unlessAbandoned(err)
	}
	a.loaded, a.state, a.tip, a.tipLast, a.durable = true, h.state, h.at.Version, h.last, h.at
	a.hinted, a.fresh = h.hinted, fresh
	if a.snapshotDue(0, uint64(h.replayed)) {
		if state := a.picture(); state != nil {
			a.keep(state, h.at, h.last)
		}
	}
	return nil
}

// repeat answers a call whose key is on its way like the first one.
func (a *activation[S]) repeat(c, first *call[S]) {
	if first.req.Fingerprint != c.req.Fingerprint {
		c.kind, c.err = failure, keyReused(c.req.Key)
	} else if c.kind, c.first = echo, first; !c.fly() {
		return
	}
	a.entries = append(a.entries, c)
}

// decide decides on the tip and, if there are events, hands them to the store.
func (a *activation[S]) decide(c *call[S]) {
	events, err := a.ask(c, a.state)
	switch {
	case err != nil:
		c.kind, c.err = refusal, err
		if _, panicked := errors.AsType[*PanicError](err); panicked {
			c.kind = failure
			a.loaded = false // Decide may have left the state half-changed
			if a.doubt(c) {
				return
			}
		}
	case len(events) == 0:
		c.kind = nothing
	case !c.fly():
		return
	default:
		if err := a.prepare(c, events); err != nil {
			c.land()
			if !a.loaded && a.doubt(c) {
				return
			}
			c.kind, c.err = failure, err
			break
		}
		c.verifies = a.calls.Load()
		c.pending = a.runtime.enqueue(c.ctx, c.commit)
		a.flying++
		a.late = c.foldLate
		if c.req.Key != "" {
			if a.keys == nil {
				a.keys = map[string]*call[S]{}
			}
			a.keys[c.req.Key] = c
		}
	}
	a.entries = append(a.entries, c)
}

// doubt makes the call, which failed on a state that is not usable any more,
// decide again on all events if that state began with a snapshot: nothing that
// is wrong with one may stay.
func (a *activation[S]) doubt(c *call[S]) bool {
	if !a.hinted {
		return false
	}
	a.runtime.options.Logger.Warn("deed: a decision failed on a state that began with a snapshot, and is made again without", "stream", a.stream.String())
	c.land()
	a.hinted, a.replay = false, true
	a.todo = append([]*call[S]{c}, a.todo...)
	return true
}

func (a *activation[S]) ask(c *call[S], state S) (events []Event, err error) {
	defer caught(&err, func() string { return fmt.Sprintf("Decide on %q", a.stream) })
	return c.req.Decide(state)
}

// prepare makes the commit and folds its events, in the form in which they will
// be stored, into the tip.
func (a *activation[S]) prepare(c *call[S], events []Event) error {
	encoded, err := a.encode(c, events)
	if err != nil {
		return err
	}
	for i := range encoded {
		if a.def.handlers[encoded[i].Type].durableOnly {
			c.foldLate = true
		}
	}
	from := a.tip
	for i := range encoded {
		r := recorded(&encoded[i], from+uint64(i)+1)
		if c.foldLate {
			_, err = a.def.Decode(a.runtime.options.Encoding, r)
		} else if err = a.def.fold(a.runtime.options.Encoding, &a.state, &r); err != nil {
			a.loaded = false // half-changed
		}
		if err != nil {
			return fmt.Errorf("event %d of the decision on %q was not written: %w", i, a.stream, err)
		}
	}
	condition := eventstore.StreamAt(a.stream, a.durable)
	if a.tip != a.durable.Version {
		condition = eventstore.StreamAtEvent(a.stream, a.tip, a.tipLast)
	}
	c.kind, c.version = commit, from+uint64(len(encoded))
	c.commit = eventstore.Commit{Events: encoded, Conditions: []eventstore.Condition{condition}, Key: c.req.Key, Fingerprint: c.req.Fingerprint}
	a.tip, a.tipLast = c.version, encoded[len(encoded)-1].ID
	if !c.foldLate && a.snapshotDue(from, c.version) {
		c.picture = a.picture()
	}
	return nil
}

func (a *activation[S]) encode(c *call[S], events []Event) (encoded []eventstore.Event, err error) {
	defer caught(&err, func() string { return fmt.Sprintf("encoding the events of the decision on %q", a.stream) })
	now := a.runtime.options.Clock.Now().UTC().Round(0)
	encoded = make([]eventstore.Event, len(events))
	for i, event := range events {
		if encoded[i], err = a.def.encode(a.runtime.options.Encoding, a.stream, event, c.req.Metadata, now); err != nil {
			return nil, fmt.Errorf("event %d of the decision on %q: %w", i, a.stream, err)
		}
	}
	return encoded, nil
}

// settle answers what can be answered, from the front, without waiting.
func (a *activation[S]) settle() bool {
	settled := false
	for len(a.entries) > 0 {
		c := a.entries[0]
		if c.kind == commit {
			select {
			case <-c.pending.Done():
			default:
				return settled
			}
		}
		settled = true
		a.entries = dropFirst(a.entries)
		switch c.kind {
		case refusal, nothing:
			if current, err := a.isCurrent(c); err != nil {
				c.answer(eventstore.Receipt{}, err, false)
			} else if !current {
				a.decideAgain([]*call[S]{c}, nil)
			} else if c.kind == nothing {
				c.answer(a.seen(), nil, true)
			} else {
				c.answer(eventstore.Receipt{}, c.err, true)
			}
		case failure:
			c.answer(eventstore.Receipt{}, c.err, false)
		case echo:
			receipt := c.first.receipt
			receipt.Duplicate = true
			c.answer(receipt, nil, false)
		case commit:
			a.flying--
			delete(a.keys, c.req.Key)
			receipt, err := c.pending.Result()
			if isUnknown(err) {
				receipt, err = a.resolve(c.commit, a.durable, err)
			}
			if err == nil && !receipt.Duplicate {
				a.written(c, receipt)
			} else {
				a.failed(c, receipt, err)
			}
		}
	}
	return settled
}

// isCurrent reports whether a decision that no condition of a commit will
// check was made on everything that was written before its call. If a commit
// that came after the call has not shown it yet, the log is asked.
func (a *activation[S]) isCurrent(c *call[S]) (bool, error) {
	if c.number <= a.fresh {
		return true, nil
	}
	fresh := a.calls.Load()
	o := eventstore.ReadOptions{After: a.durable.Position, Limit: 1}
	for e, err := range a.runtime.store.Read(a.runtime.detach(c.ctx), eventstore.OneStream(a.stream), o) {
		if err != nil {
			return false, a.runtime.unlessAbandoned(fmt.Errorf("look for news of %q: %w", a.stream, err))
		}
		ours := slices.ContainsFunc(a.entries, func(later *call[S]) bool { return later.kind == commit && later.commit.Events[0].ID == e.ID })
		if !ours {
			return false, nil
		}
	}
	a.fresh = fresh
	return true, nil
}

// seen is the receipt of a decision without events.
func (a *activation[S]) seen() eventstore.Receipt {
	r := eventstore.Receipt{Last: a.durable.Position}
	if a.durable.Version > 0 {
		r.Revisions = []eventstore.StreamRevision{{Stream: a.stream, Revision: a.durable}}
	}
	return r
}

func (a *activation[S]) written(c *call[S], receipt eventstore.Receipt) {
	whole := false
	defer func() {
		if !whole {
			a.loaded = false // a fold ended the goroutine
		}
		c.answer(receipt, nil, false)
	}()
	from := a.durable.Version
	a.durable = receipt.Revision(a.stream)
	a.fresh = max(a.fresh, c.verifies)
	a.depth = min(a.depth*2, a.runtime.options.PipelineDepth)
	if a.durable.Version != c.version {
		a.loaded = false // a store that checked no condition
	}
	last := c.commit.Events[len(c.commit.Events)-1].ID
	if c.foldLate {
		a.late = false
		if receipt.Last-receipt.First != eventstore.Position(len(c.commit.Events)-1) {
			a.loaded = false // positions that cannot be told from the receipt
		}
		for i := 0; a.loaded && i < len(c.commit.Events); i++ {
			r := recorded(&c.commit.Events[i], from+uint64(i)+1)
			r.Position = receipt.Last - eventstore.Position(len(c.commit.Events)-1-i)
			if err := a.def.fold(a.runtime.options.Encoding, &a.state, &r); err != nil {
				// It is written: the next load tells what is wrong with it.
				a.loaded = false
			}
		}
		if a.loaded && a.snapshotDue(from, c.version) {
			c.picture = a.picture()
		}
	}
	if c.picture != nil {
		a.keep(c.picture, a.durable, last)
	}
	whole = true
}

// failed answers a commit that was not written, or makes it decide again, and
// makes everything decided after it decide again.
func (a *activation[S]) failed(c *call[S], receipt eventstore.Receipt, err error) {
	var again []*call[S]
	if errors.Is(err, eventstore.ErrConflict) {
		c.conflicts++
		a.depth = 1
		a.runtime.count(a.runtime.conflicts, 1, a.stream.Category)
		if c.conflicts < a.runtime.options.Attempts {
			again = append(again, c)
		} else {
			err = fmt.Errorf("decided %d times on %q, and each time another writer came first: %w", c.conflicts, a.stream, err)
		}
	}
	if len(again) == 0 {
		c.answer(receipt, err, false)
	}
	a.decideAgain(again, err)
}

// decideAgain makes the calls, and then everything decided after them, decide
// again on what is in the log. The error is that of the commit that failed.
func (a *activation[S]) decideAgain(again []*call[S], err error) {
	for _, later := range a.entries {
		if later.kind == commit {
			receipt, laterErr := a.runtime.result(later.pending)
			// It demands to follow the failed commit's event, so it was not written,
			// whatever is known about it, unless that one may have been.
			if laterErr == nil || isUnknown(err) && isUnknown(laterErr) {
				later.answer(receipt, laterErr, false)
				continue
			}
		}
		again = append(again, later)
	}
	for _, c := range again {
		c.land()
	}
	a.runtime.count(a.runtime.repeats, len(again), a.stream.Category)
	clear(a.keys)
	a.entries, a.flying, a.late = nil, 0, false
	a.todo = append(again, a.todo...)
	a.forget()
}

// resolve finds out what became of a commit whose outcome is unknown, for as
// long as it takes: the aggregate stands still meanwhile. The commit is never
// changed: it may still be on its way.
func (a *activation[S]) resolve(c eventstore.Commit, base eventstore.Revision, cause error) (eventstore.Receipt, error) {
	r := a.runtime
	r.count(r.unknowns, 1, a.stream.Category)
	r.options.Logger.Warn("deed: the outcome of a commit is unknown, looking it up", "stream", a.stream.String(), "error", cause)
	for pause := time.Millisecond; ; pause = min(pause*2, time.Second) {
		receipt, fate, err := a.find(c, base)
		switch {
		case err != nil:
			if permanent(err) {
				return eventstore.Receipt{}, unknownOutcome(err)
			}
		case fate == isWritten:
			return receipt, nil
		case fate == isLost:
			return eventstore.Receipt{}, &eventstore.ConflictError{Kind: eventstore.ConditionStreamAt, Stream: a.stream, Expected: base, Actual: receipt.Revision(a.stream)}
		default:
			receipt, err := r.result(r.enqueue(r.life, c))
			switch {
			case err == nil && !receipt.Duplicate:
				return receipt, nil
			case err == nil:
				// Ours arrived after all, or another request's with the same key.
				if ours, fate, err := a.find(c, base); err == nil && fate == isWritten {
					return ours, nil
				} else if err == nil {
					return receipt, nil
				}
			case errors.Is(err, eventstore.ErrKeyReused):
				return eventstore.Receipt{}, err
			case !eventstore.CanRetry(err):
				// It would be refused each time, as by an inline projection. That says nothing
				// of the first try, which may still arrive.
				return eventstore.Receipt{}, unknownOutcome(err)
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-r.life.Done():
			timer.Stop()
			return eventstore.Receipt{}, unknownOutcome(ErrStopped)
		}
	}
}

// permanent reports whether asking again cannot help.
func permanent(err error) bool {
	return !eventstore.CanRetry(err) && (errors.Is(err, eventstore.ErrClosed) || errors.Is(err, eventstore.ErrInvalid) ||
		errors.Is(err, eventstore.ErrTooLarge) || errors.Is(err, eventstore.ErrGap) || errors.Is(err, errors.ErrUnsupported))
}

type fate uint8

const (
	isAbsent  fate = iota // not there, and may still arrive
	isWritten             // there
	isLost                // another event is in its place: it will never be there
)

// find looks for the commit's events where they belong.
func (a *activation[S]) find(c eventstore.Commit, base eventstore.Revision) (eventstore.Receipt, fate, error) {
	receipt := eventstore.Receipt{Fingerprint: c.Fingerprint}
	o := eventstore.ReadOptions{After: base.Position, Limit: len(c.Events)}
	n := 0
	for e, err := range a.runtime.store.Read(a.runtime.life, eventstore.OneStream(a.stream), o) {
		if err != nil {
			return receipt, isAbsent, err
		}
		if n == 0 {
			receipt.First = e.Position
		}
		receipt.Last = e.Position
		receipt.Revisions = []eventstore.StreamRevision{{Stream: a.stream, Revision: e.Revision()}}
		if e.ID != c.Events[n].ID {
			return receipt, isLost, nil
		}
		n++
	}
	switch n {
	case 0:
		return receipt, isAbsent, nil
	case len(c.Events):
		return receipt, isWritten, nil
	}
	return receipt, isAbsent, fmt.Errorf("%w: stream %q holds %d of the %d events of a commit", eventstore.ErrGap, a.stream, n, len(c.Events))
}
