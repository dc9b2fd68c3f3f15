package nats

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// entry is a commit on its way.
type entry struct {
	commit  eventstore.Commit
	writes  []eventstore.Stream // the streams it writes, in the order of first mention
	streams []eventstore.Stream // those, and the others its conditions are about
	encoded []encoded           // the events
	most    int                 // messages at most
	bytes   int
	order   int // within the group it is written with

	state atomic.Int32
	done  func(eventstore.Receipt, error)
	stop  func() bool // the watch over its context

	// Of the group's goroutine.
	base      head     // of the first stream that it writes, when it was sent last
	bases     []uint64 // where its streams were then
	sent      bool
	uncertain bool // it may have been written, or be written yet
}

const (
	stateWaiting int32 = iota
	stateSent          // from here on only the server knows
	stateDone
)

// begin marks the entry as sent; false when it was given up before.
func (e *entry) begin() bool {
	return e.state.CompareAndSwap(stateWaiting, stateSent) || e.state.Load() == stateSent
}

func (e *entry) isDone() bool { return e.state.Load() == stateDone }

// finish tells the outcome, unless the caller has gone.
func (e *entry) finish(r eventstore.Receipt, err error) {
	if e.state.Swap(stateDone) != stateDone {
		e.settle(r, err)
	}
}

func (e *entry) settle(r eventstore.Receipt, err error) {
	if e.stop != nil {
		e.stop()
	}
	e.done(r, err)
}

// abandon tells the caller that its context has ended.
func (e *entry) abandon(cause error) {
	switch {
	case e.state.CompareAndSwap(stateWaiting, stateDone):
		e.done(eventstore.Receipt{}, cause)
	case e.state.CompareAndSwap(stateSent, stateDone):
		e.done(eventstore.Receipt{}, fmt.Errorf("%w: %w", eventstore.ErrOutcomeUnknown, cause))
	}
}

// Append implements eventstore.Store.
func (s *Store) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	pending, e := s.accept(ctx, c)
	if e == nil {
		return pending.Result()
	}
	s.hand(e)
	select {
	case <-pending.Done():
	case <-ctx.Done():
		e.abandon(ctx.Err())
	}
	return pending.Result()
}

// Enqueue implements eventstore.Enqueuer.
func (s *Store) Enqueue(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
	pending, e := s.accept(ctx, c)
	if e == nil {
		return pending
	}
	if ctx.Done() != nil {
		e.stop = context.AfterFunc(ctx, func() { e.abandon(ctx.Err()) })
	}
	s.hand(e)
	return pending
}

// accept returns no entry if the outcome is known already.
func (s *Store) accept(ctx context.Context, c eventstore.Commit) (*eventstore.Pending, *entry) {
	pending, resolve := eventstore.NewPending()
	e, err := s.newEntry(c)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		resolve(eventstore.Receipt{}, err)
		return pending, nil
	}
	e.done = resolve
	return pending, e
}

func (s *Store) hand(e *entry) {
	if !s.scheduler.put(e) {
		e.finish(eventstore.Receipt{}, eventstore.ErrClosed)
	}
}

// newEntry refuses what cannot be written.
func (s *Store) newEntry(c eventstore.Commit) (*entry, error) {
	c, err := c.Prepare(s.Limits(), s.now)
	if err != nil {
		return nil, err
	}
	e := &entry{commit: c, encoded: make([]encoded, len(c.Events)), most: len(c.Events)}
	for i := range c.Events {
		of := c.Events[i].Stream
		if !slices.Contains(e.writes, of) {
			e.writes = append(e.writes, of)
		}
		if err = s.subjects.encode(&c.Events[i], &e.encoded[i]); err != nil {
			return nil, err
		}
		n := e.encoded[i].size() + placeBytes
		if most := s.payload.Load(); most > 0 && int64(n) > most {
			return nil, fmt.Errorf("%w: event %q of stream %q needs %d bytes with its tags and metadata, at most %d are allowed by the server's max_payload or the stream's max_msg_size", eventstore.ErrTooLarge, c.Events[i].Type, of, n, most)
		}
		e.bytes += n
	}
	e.streams = slices.Clip(e.writes)
	for i := range c.Conditions {
		condition := &c.Conditions[i]
		if condition.Kind == eventstore.ConditionNoneMatch {
			return nil, fmt.Errorf("condition NoneMatch on NATS JetStream: %w: the server checks conditions on single streams only; use StreamAt on a stream that guards the rule", errors.ErrUnsupported)
		}
		if !slices.Contains(e.streams, condition.Stream) {
			e.streams = append(e.streams, condition.Stream)
			e.most++
		}
	}
	if e.most > batchMessages {
		return nil, fmt.Errorf("%w: the commit needs %d messages, %d of them for conditions on streams that it does not write; at most %d are allowed in one atomic batch", eventstore.ErrTooLarge, e.most, e.most-len(c.Events), batchMessages)
	}
	return e, nil
}

const (
	batchMessages = 1000    // the server's limit
	batchBytes    = 4 << 20 // of commits that share a batch
	groupFrom     = 16      // so many commits share a batch, where fewer are quicker alone
	plainOne      = 16      // publishes in flight to a single server
	messagesOne   = 512     // in one batch to a single server, which is written to while another one is made
	batchesOne    = 2       // batches in flight to it
	besideFrom    = 256     // so many commits make up the second one
	plainMany     = 128     // and to several
	groupMany     = 64      // so many commits share a batch on several, when as many publishes are in flight as may be
	batchesMany   = 16      // batches in flight to several servers, which take 50 a stream from everybody
)

// scheduler decides which commits are written when. Commits that share a
// stream are written in the order in which they came: together in one batch, or
// the later one after the earlier one's outcome.
//
// On a single server, which syncs each publish alone, many commits share a
// batch, and while one is written a second one is made if there is enough for it.
// On several, which gather what they replicate, each goes its own way
// until many are under way; from there on batches spare everybody messages.
type scheduler struct {
	store *Store
	wake  chan struct{}
	jobs  chan job      // for workers that have nothing to do
	quit  chan struct{} // closed when there will be no more

	mu      sync.Mutex
	waiting []*entry
	size    size // of what waits, about: who has gone may be counted
	busy    map[eventstore.Stream]struct{}
	plains  int // in flight
	batches int
	closed  bool
	returns returns
	futile  int // no second batch can be made before so many wait
}

// returns is the wait for those who have just been answered, on a single server.
// Callers come again when they have their answer. Without it some of them would be
// in a small batch, or publish on their own, while the others come back, and a batch
// costs the server a file and a sync whatever its size.
type returns struct {
	wanted    int // how many commits are to wait before a batch begins; 0: it need not wait
	before    int // of these were there when it began
	last      int // were answered then
	number    uint64
	timer     *time.Timer
	returning float64 // the part of those that is taken to come back at once
	rests     int     // how often nobody was waited for
}

// answered says whom a batch that was written at once has answered, how many
// waited before it did, and how long the server took.
type answered struct {
	callers, before int
	took            time.Duration
}

// The bounds of gathering: the part of a batch's time that is waited, and the time,
// at most; the part of its callers that must come back for it; batches until it is
// tried again.
const (
	gatherPart   = 2
	gatherMost   = 20 * time.Millisecond
	worthWaiting = 0.5
	restsBetween = 64
)

// waits returns how many commits wait.
func (c *scheduler) waits() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiting)
}

// await begins to wait for the callers of a batch. It needs the lock, as everything
// below does.
func (c *scheduler) await(a answered) {
	g := &c.returns
	if a.callers < groupFrom || c.closed || c.batches >= batchesOne || c.full() {
		return
	}
	if g.timer == nil {
		g.returning = 1
	} else if g.returning < worthWaiting {
		if g.rests++; g.rests < restsBetween {
			return
		}
		g.returning, g.rests = 1, 0
	}
	g.before, g.last = a.before, a.callers
	g.wanted = a.before + max(1, int(float64(a.callers)*g.returning+0.5))
	g.number++
	number := g.number
	g.timer = time.AfterFunc(min(a.took/gatherPart, gatherMost), func() {
		c.mu.Lock()
		if g.number == number && g.wanted > 0 {
			c.gathered()
		}
		c.mu.Unlock()
		c.signal()
	})
}

// size is what commits need of a batch.
type size struct{ messages, bytes int }

func (s *size) add(e *entry) {
	s.messages += e.most
	s.bytes += e.bytes
}

// full reports whether what waits fills a batch.
func (c *scheduler) full() bool {
	return c.size.messages >= messagesOne || c.size.bytes >= batchBytes
}

// resize counts what waits.
func (c *scheduler) resize() {
	c.size = size{}
	for _, e := range c.waiting {
		c.size.add(e)
	}
}

// gathering reports whether a batch should still wait.
func (c *scheduler) gathering() bool {
	if c.returns.wanted == 0 {
		return false
	}
	if !c.closed && len(c.waiting) < c.returns.wanted && !c.full() {
		return true
	}
	c.gathered()
	return false
}

// gathered ends the wait.
func (c *scheduler) gathered() {
	g := &c.returns
	g.timer.Stop()
	if got := len(c.waiting) - g.before; len(c.waiting) >= g.wanted || c.full() {
		g.returning += (1 - g.returning) / 16
	} else {
		g.returning = min(1, float64(max(got, 0))/float64(g.last))
	}
	g.wanted = 0
}

func (c *scheduler) init(s *Store) {
	c.store = s
	c.wake = make(chan struct{}, 1)
	c.busy = map[eventstore.Stream]struct{}{}
	c.jobs, c.quit = make(chan job), make(chan struct{})
}

// job is a group that is written together.
type job struct {
	group []*entry
	batch bool
}

// launch hands the group to a worker. The lock is held.
func (c *scheduler) launch(group []*entry) {
	j := job{group, len(group) > 1 || group[0].most > 1}
	if j.batch {
		c.batches++
	} else {
		c.plains++
	}
	for _, e := range group {
		for _, of := range e.streams {
			c.busy[of] = struct{}{}
		}
	}
	select {
	case c.jobs <- j:
	default:
		c.store.writing.Go(func() { c.worker(j) })
	}
}

// worker writes one group after another.
func (c *scheduler) worker(j job) {
	for {
		c.release(j, c.store.execute(j.group))
		select {
		case j = <-c.jobs:
		case <-c.quit:
			return
		}
	}
}

func (c *scheduler) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *scheduler) put(e *entry) bool {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return false
	}
	if c.atOnce(e) {
		c.launch([]*entry{e})
		c.mu.Unlock()
		return true
	}
	c.waiting = append(c.waiting, e)
	c.size.add(e)
	c.mu.Unlock()
	c.signal()
	return true
}

// atOnce reports whether the commit is a publish that has nothing to wait for.
func (c *scheduler) atOnce(e *entry) bool {
	most := plainMany
	if c.store.replicas.Load() == 1 {
		most = plainOne
		if c.batches > 0 || c.returns.wanted > 0 {
			return false
		}
	}
	if e.most > 1 || len(c.waiting) > 0 || c.plains >= most || c.store.settings.hold != nil {
		return false
	}
	_, busy := c.busy[e.writes[0]]
	return !busy
}

// close refuses what waits; what is in flight is finished.
func (c *scheduler) close() {
	c.mu.Lock()
	c.closed = true
	waiting := c.waiting
	c.waiting = nil
	if c.returns.wanted > 0 {
		c.gathered()
	}
	c.mu.Unlock()
	for _, e := range waiting {
		e.finish(eventstore.Receipt{}, eventstore.ErrClosed)
	}
	c.signal()
}

func (c *scheduler) run() {
	defer close(c.quit)
	for range c.wake {
		if c.start() {
			return
		}
	}
}

// start starts what can be started, and reports whether there is nothing left
// to do for ever.
func (c *scheduler) start() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, group := range c.pick() {
		c.launch(group)
	}
	return c.closed && c.plains == 0 && c.batches == 0
}

func (c *scheduler) release(j job, a answered) {
	c.mu.Lock()
	if j.batch {
		c.batches--
	} else {
		c.plains--
	}
	for _, e := range j.group {
		for _, of := range e.streams {
			delete(c.busy, of)
		}
	}
	c.futile = 0
	if j.batch && c.store.replicas.Load() == 1 {
		c.await(a)
	}
	more := len(c.waiting) > 0 || c.closed
	c.mu.Unlock()
	if more {
		c.signal()
	}
}

// pick takes groups out of what waits.
func (c *scheduler) pick() [][]*entry {
	one := c.store.replicas.Load() == 1
	grouping := c.store.settings.grouping
	if grouping == 0 && one {
		grouping = groupFrom
	} else if grouping == 0 {
		grouping = groupMany
	}
	if hold := c.store.settings.hold; hold != nil && hold() {
		return nil
	}
	if one && (c.batches >= batchesOne || c.gathering() || c.batches > 0 && len(c.waiting) < max(besideFrom, c.futile)) {
		return nil // what comes meanwhile gathers for the next batch
	}
	// Who could be written now: no stream of theirs is being written, or has somebody
	// before them who has to wait.
	blocked := map[eventstore.Stream]bool{}
	var ready []*entry
	c.waiting = slices.DeleteFunc(c.waiting, (*entry).isDone)
	for _, e := range c.waiting {
		free := true
		for _, of := range e.streams {
			if _, busy := c.busy[of]; busy || blocked[of] {
				free = false
			}
		}
		if free {
			ready = append(ready, e)
			continue
		}
		for _, of := range e.streams {
			blocked[of] = true
		}
	}
	if one && c.batches > 0 && len(ready) < besideFrom {
		// The streams of the others are busy.
		c.futile = len(c.waiting) - len(ready) + besideFrom
		c.resize()
		return nil
	}
	if len(ready) == 0 {
		c.resize()
		return nil
	}
	var groups [][]*entry
	batch := func(of []*entry) {
		n, messages, bytes, most := 0, 0, 0, batchMessages
		if one {
			most = messagesOne
		}
		for n < len(of) && (n == 0 || messages+of[n].most <= most && bytes+of[n].bytes <= batchBytes) {
			messages += of[n].most
			bytes += of[n].bytes
			n++
		}
		groups = append(groups, of[:n:n])
	}
	components := connected(ready)
	plain := !slices.ContainsFunc(components, func(group []*entry) bool { return len(group) > 1 || group[0].most > 1 })
	switch {
	case len(ready) >= grouping || one && !plain:
		if one || c.batches < batchesMany {
			batch(ready)
		}
	default:
		plains, batches := c.plains, c.batches
		mostPlain := plainMany
		if one {
			mostPlain = plainOne
		}
		for _, group := range components {
			if len(group) == 1 && group[0].most == 1 {
				if plains < mostPlain {
					plains++
					groups = append(groups, group)
				}
			} else if batches < batchesMany {
				batches++
				batch(group)
			}
		}
	}
	taken := map[*entry]bool{}
	for _, group := range groups {
		for i, e := range group {
			e.order = i
			taken[e] = true
		}
	}
	c.waiting = slices.DeleteFunc(c.waiting, func(e *entry) bool { return taken[e] })
	c.resize()
	return groups
}

// connected parts entries into groups that share no stream, each in order.
func connected(entries []*entry) [][]*entry {
	parent := make([]int, len(entries))
	find := func(i int) int {
		for parent[i] != i {
			parent[i] = parent[parent[i]]
			i = parent[i]
		}
		return i
	}
	first := make(map[eventstore.Stream]int, len(entries))
	for i, e := range entries {
		parent[i] = i
		for _, of := range e.streams {
			if j, ok := first[of]; ok {
				a, b := find(i), find(j)
				parent[max(a, b)] = min(a, b)
			} else {
				first[of] = i
			}
		}
	}
	at := make(map[int]int, len(entries))
	var groups [][]*entry
	for i, e := range entries {
		root := find(i)
		n, ok := at[root]
		if !ok {
			n = len(groups)
			at[root] = n
			groups = append(groups, nil)
		}
		groups[n] = append(groups[n], e)
	}
	return groups
}
