package saga

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// behaviour is what a saga's and a reaction's worker do differently. All
// methods are called with the runner's lock held, but for load, reset, repair,
// prepare and tend.
type behaviour interface {
	// load reads what it needs of the index, as of the checkpoint. False says that
	// the index must be repaired first.
	load(tx projection.StateTx, at projection.Checkpoint) (bool, error)
	// reset makes the index an empty one, whose checkpoint is this.
	reset(tx projection.StateTx, at projection.Checkpoint) error
	// repair makes what is missing of the index from the rest.
	repair(ctx context.Context, lease projection.Lease, at projection.Checkpoint) error
	// prepare loads what routing the events needs. What it returns is to be called
	// after that, with the lock held.
	prepare(ctx context.Context, events []eventstore.Recorded) (func(), error)
	// tend loads what of the index is needed for another reason, until ctx ends.
	tend(ctx context.Context) error
	// query selects what the worker follows; it may widen as events are routed.
	query() eventstore.Query
	// past selects the events that a new process must decide about; false: none.
	past() (eventstore.Query, bool)
	// history selects the process's own events.
	history() eventstore.Query
	// route folds the next event into the index. True says that the query has
	// widened, and that what follows in the batch must be read again.
	route(r *eventstore.Recorded) (bool, error)
	// ready gets everything going that is open, once the log has been followed to
	// where it was when the worker started.
	ready()
	// settle gets going what the last events made possible.
	settle()
	// due is the earliest instant that something waits for.
	due() (time.Time, bool)
	// alarm is the earliest instant at which there is something to fire.
	alarm() (time.Time, bool)
	// unsettled says that due is not exact, or that ready is not done with.
	unsettled() bool
	// fire gets going what is due.
	fire(now time.Time)
	// changes takes what of the index is not stored yet.
	changes() changes
	// describe names what is running, for messages.
	describe() []string
}

// changes are those of the index since the last flush.
type changes struct {
	count int
	// write writes them, which may be none. The checkpoint is the index's from then on.
	write func(tx projection.StateTx, at projection.Checkpoint) error
	// undo marks them as not stored again, and stored says that they are.
	undo, stored func()
}

// flushEvery bounds how many changes of the index gather, and so how long a
// restart takes to catch up.
const (
	flushEvery    = 500
	flushInterval = time.Second
	leaseRetry    = time.Second
)

// ledger counts work in the order of the events that caused it.
type ledger struct {
	entries []*entry
}

type entry struct {
	cause eventstore.Position
	done  bool
}

func (l *ledger) add(cause eventstore.Position) *entry {
	if n := len(l.entries); n > 0 {
		cause = max(cause, l.entries[n-1].cause)
	}
	e := &entry{cause: cause}
	l.entries = append(l.entries, e)
	return e
}

func (l *ledger) finish(e *entry) {
	e.done = true
	for len(l.entries) > 0 && l.entries[0].done {
		l.entries[0] = nil
		l.entries = l.entries[1:]
	}
}

// before reports whether work caused at or before p is left.
func (l *ledger) before(p eventstore.Position) bool {
	return len(l.entries) > 0 && l.entries[0].cause <= p
}

type job struct {
	entry *entry
	run   func(ctx context.Context)
}

type waiter struct {
	through eventstore.Position
	done    chan struct{}
}

// runner follows the log for one process while it has the lease, keeps its index
// and checkpoint, and runs its jobs. The index is the fold of the log up to
// position; both are stored in one transaction. A runner serves once.
type runner struct {
	name      string // of the worker and its lease and checkpoint
	begin     beginning
	env       *environment
	state     projection.State
	shared    bool // by other processes, which may take the lease
	apart     bool // from the states of the others
	ttl       time.Duration
	grace     time.Duration
	limit     int
	logger    *slog.Logger
	behaviour behaviour

	flushing   chan struct{} // semaphore of one
	confirming chan struct{} // semaphore of one
	rearm      chan struct{}
	unstored   chan struct{}
	full       chan struct{}
	room       chan struct{}
	flushed    chan struct{}
	hungry     chan struct{} // for tend
	opened     func()        // called when it is known where to begin
	stopped    chan struct{} // closed when serve has returned

	mu         sync.Mutex
	lease      projection.Lease
	logID      string
	checkpoint projection.Checkpoint
	doubtful   bool                // whether the last flush took effect
	sure       time.Time           // when the lease was this runner's for sure
	position   eventstore.Position // everything up to here was routed
	cause      eventstore.Position // of work that is submitted now
	target     eventstore.Position // caught up when position gets here
	caught     bool
	stopping   bool
	failure    error
	cancel     context.CancelFunc // ends serve
	steps      context.Context    // of jobs
	ledger     ledger
	queue      []job
	active     int
	idle       chan struct{} // closed when active reaches 0 while stopping
	waiters    []*waiter
	pending    int  // changes since the last flush
	starved    bool // tend waits until less is pending or in the queue
	inSweep    bool // jobs that are submitted now are held
	held       int  // jobs without which nothing is settled
}

func newRunner(e *Engine, name string, begin beginning) runner {
	return runner{
		name: name, begin: begin, env: &e.env, state: e.state, shared: projection.Shared(e.state), apart: e.options.Leases != nil,
		ttl: e.options.LeaseTTL, grace: e.options.Grace, limit: e.options.Concurrency, logger: e.env.logger,
		flushing: make(chan struct{}, 1), confirming: make(chan struct{}, 1), rearm: make(chan struct{}, 1), unstored: make(chan struct{}, 1),
		full: make(chan struct{}, 1), room: make(chan struct{}, 1), flushed: make(chan struct{}, 1), hungry: make(chan struct{}, 1),
		stopped: make(chan struct{}),
	}
}

// poke signals without waiting.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// serve works until ctx ends, and then returns nil, or until it fails; when
// another owner has taken over the error wraps projection.ErrFenced.
func (w *runner) serve(ctx context.Context, lease projection.Lease) error {
	err := w.run(ctx, lease)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failure == nil {
		w.failure = err
	}
	if w.failure == nil {
		w.failure = fmt.Errorf("%w: %s", ErrStopped, w.name)
	}
	close(w.stopped)
	return err
}

func (w *runner) run(ctx context.Context, lease projection.Lease) error {
	following, cancel := context.WithCancel(ctx)
	defer cancel()
	w.mu.Lock()
	w.lease, w.cancel = lease, cancel
	w.mu.Unlock()
	// To load the index, and to wait for steps at the end, can take longer than the
	// lease lasts.
	var keeper sync.WaitGroup
	defer keeper.Wait()
	keeping, let := context.WithCancel(context.WithoutCancel(ctx))
	defer let()
	keeper.Go(func() {
		if err := w.renewLoop(keeping); err != nil && keeping.Err() == nil {
			w.fail(err)
		}
	})
	for n := 0; ; n++ {
		err := w.open(following, lease)
		if err == nil {
			break
		}
		if following.Err() != nil {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.failure
		}
		if errors.Is(err, projection.ErrFenced) || lasting(err) {
			return err
		}
		w.logger.Warn("could not find its place in the log; it is tried again", "worker", w.name, "error", err)
		pause(following, backoff(n))
	}
	w.opened()
	defer w.env.tell.observe(w)()

	steps, cancelSteps := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancelSteps(ErrStopped)
	w.mu.Lock()
	w.steps = steps
	if w.position >= w.target {
		w.caught = true
		w.behaviour.ready()
	}
	w.pump()
	w.mu.Unlock()

	var loops sync.WaitGroup
	for _, loop := range []func(context.Context) error{w.follow, w.fireLoop, w.flushLoop, w.behaviour.tend} {
		loops.Go(func() {
			if err := loop(following); err != nil && following.Err() == nil {
				w.fail(err)
			}
		})
	}
	<-following.Done()
	loops.Wait()
	w.drain(cancelSteps)

	w.mu.Lock()
	failure := w.failure
	w.mu.Unlock()
	if failure != nil {
		return failure
	}
	if err := w.flush(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	return nil
}

// pause waits in real time; false says that ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// open loads the index and finds where to begin.
func (w *runner) open(ctx context.Context, lease projection.Lease) error {
	logID, err := eventstore.LogID(ctx, w.env.store)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("%s: %w", w.name, err)
	}
	head, err := w.env.store.Head(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", w.name, err)
	}
	var checkpoint projection.Checkpoint
	whole := true
	load := func(tx projection.StateTx) error {
		var err error
		if checkpoint, err = tx.Checkpoint(w.name); err != nil || checkpoint.IsZero() {
			return err
		}
		whole, err = w.behaviour.load(tx, checkpoint)
		return err
	}
	err = w.state.View(ctx, load)
	if err == nil && !whole {
		if err = w.behaviour.repair(ctx, lease, checkpoint); err == nil {
			err = w.state.View(ctx, load)
		}
	}
	if err == nil && !whole {
		err = fmt.Errorf("%w: another owner has written meanwhile", projection.ErrFenced)
	}
	if err != nil {
		return fmt.Errorf("%s: load the index: %w", w.name, err)
	}
	switch {
	case checkpoint.IsZero():
		from, err := w.decide(ctx, head)
		if err == nil {
			err = w.announce(ctx, from)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		// Stored at once: events of tomorrow must not look like the past.
		first := projection.Checkpoint{Log: logID, Epoch: lease.Epoch, Position: from}
		err = w.state.Update(ctx, func(tx projection.StateTx) error {
			if err := tx.SetCheckpoint(lease, checkpoint, first); err != nil {
				return err
			}
			return w.behaviour.reset(tx, first)
		})
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		checkpoint = first
	case checkpoint.Log != logID:
		return fmt.Errorf("%s: %w: its checkpoint belongs to the log %q, the store has the log %q: was one of them replaced?", w.name, eventstore.ErrInvalid, checkpoint.Log, logID)
	case checkpoint.Position > head:
		return fmt.Errorf("%s: %w: its checkpoint is at position %d, but the log ends at %d: was the log restored from an older copy?", w.name, eventstore.ErrInvalid, checkpoint.Position, head)
	default:
		// It began where the log says, or at the start.
		if err := w.announce(ctx, 0); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.logID, w.checkpoint = logID, checkpoint
	w.position, w.target = checkpoint.Position, head
	return nil
}

// registration is how a process that began in the middle of the log says so,
// for the day its checkpoint is lost.
type registration struct {
	Format int                 `json:"format"`
	From   eventstore.Position `json:"from"`
}

// decide returns where a process without checkpoint begins.
func (w *runner) decide(ctx context.Context, head eventstore.Position) (eventstore.Position, error) {
	if from, known, err := registered(ctx, w.env.store, w.name); known || err != nil {
		return from, err
	}
	// Another build of the process has decided before.
	if from, known, err := w.decided(ctx); known || err != nil {
		return from, err
	}
	if w.begin == fromStart {
		return 0, nil
	}
	w.mu.Lock()
	history := w.behaviour.history()
	past, some := w.behaviour.past()
	w.mu.Unlock()
	for _, err := range w.env.store.Read(ctx, history, eventstore.ReadOptions{Limit: 1}) {
		return 0, err // it has run before; its index was lost and is made again
	}
	if !some {
		return 0, nil
	}
	for r, err := range w.env.store.Read(ctx, past, eventstore.ReadOptions{Limit: 1}) {
		if err != nil {
			return 0, err
		}
		if w.begin == undecided {
			return 0, fmt.Errorf("%w: it is new, and the log holds events for it (the first is %q at position %d): say .FromStart() on its definition to handle them, or .FromNow() to leave them alone", ErrUndecided, r.Type, r.Position)
		}
		return head, w.register(ctx, head)
	}
	return 0, nil
}

// decided returns where the first of the builds of the same process began, if
// one has said so.
func (w *runner) decided(ctx context.Context) (from eventstore.Position, known bool, err error) {
	name, _, _ := strings.Cut(w.name, "@")
	for r, err := range w.env.store.Read(ctx, eventstore.OneCategory(registrationStream), eventstore.ReadOptions{}) {
		if err != nil {
			return 0, false, err
		}
		if other, _, _ := strings.Cut(r.Stream.ID, "@"); other != name {
			continue
		}
		began, err := decodeRegistration(&r)
		if err != nil {
			return 0, false, err
		}
		if !known || began < from {
			from, known = began, true
		}
	}
	return from, known, nil
}

// register records where the process begins.
func (w *runner) register(ctx context.Context, from eventstore.Position) error {
	data, err := encodeRegistration(from)
	if err != nil {
		return err
	}
	stream := registrationOf(w.name)
	_, err = w.env.store.Append(ctx, eventstore.Commit{
		Events:     []eventstore.Event{{Stream: stream, Type: registrationType, Data: data, Time: w.env.clock.Now()}},
		Conditions: []eventstore.Condition{eventstore.StreamAt(stream, eventstore.Revision{})},
	})
	return err
}

// announce records where the process begins, if nobody has, where the others
// cannot see it in the state: whoever takes over must not decide about the past
// once more.
func (w *runner) announce(ctx context.Context, from eventstore.Position) error {
	if !w.apart {
		return nil
	}
	if _, known, err := registered(ctx, w.env.store, w.name); known || err != nil {
		return err
	}
	return w.register(ctx, from)
}

// follow routes the log as it grows.
func (w *runner) follow(ctx context.Context) error {
	for failures := 0; ; {
		w.mu.Lock()
		q, after := w.behaviour.query(), w.position
		w.mu.Unlock()
		var failure error
		for batch, err := range w.env.store.Subscribe(ctx, q, after) {
			if err != nil {
				failure = err
				break
			}
			failures = 0
			again, err := w.take(ctx, batch)
			if err != nil {
				return err
			}
			if again {
				break
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case failure != nil && lasting(failure):
			return fmt.Errorf("%s: follow the log: %w", w.name, failure)
		case failure != nil:
			w.logger.Warn("following the log was interrupted", "worker", w.name, "error", failure)
			pause(ctx, backoff(failures))
			failures++
		}
	}
}

func (w *runner) take(ctx context.Context, batch eventstore.Batch) (bool, error) {
	again := false
	finish, err := w.behaviour.prepare(ctx, batch.Events)
	if err != nil {
		if ctx.Err() != nil {
			return false, nil
		}
		return false, err
	}
	w.mu.Lock()
	through := batch.Through
	for i := range batch.Events {
		r := &batch.Events[i]
		w.cause = r.Position
		widened, err := w.behaviour.route(r)
		if err != nil {
			finish()
			w.mu.Unlock()
			return false, fmt.Errorf("%s: event %q at position %d: %w", w.name, r.Type, r.Position, err)
		}
		if widened {
			through, again = r.Position, true
			break
		}
	}
	moved := through > w.position
	w.position = max(w.position, through)
	w.cause = w.position
	switch {
	case !w.caught && w.position >= w.target:
		w.caught = true
		w.behaviour.ready()
	default:
		w.behaviour.settle()
	}
	finish()
	w.pump()
	w.feed()
	w.notify()
	if moved {
		poke(w.unstored)
	}
	crowded := len(w.queue) > 16*w.limit
	unstored := w.pending > mostUnstored
	w.mu.Unlock()
	for unstored {
		select {
		case <-w.flushed:
		case <-ctx.Done():
			return false, nil
		}
		w.mu.Lock()
		unstored = w.pending > mostUnstored
		w.mu.Unlock()
	}
	for crowded {
		select {
		case <-w.room:
		case <-ctx.Done():
			return false, nil
		}
		w.mu.Lock()
		crowded = len(w.queue) > 8*w.limit
		w.mu.Unlock()
	}
	return again, nil
}

// changed counts a change of the index; the lock is held.
func (w *runner) changed() {
	w.pending++
	if w.pending == 1 {
		poke(w.unstored)
	}
	if w.pending == flushEvery {
		poke(w.full)
	}
}

// submit queues a job; the lock is held.
func (w *runner) submit(run func(ctx context.Context)) {
	if w.inSweep {
		w.held++
		free := run
		run = func(ctx context.Context) {
			free(ctx)
			w.mu.Lock()
			defer w.mu.Unlock()
			w.held--
		}
	}
	w.queue = append(w.queue, job{w.ledger.add(max(w.cause, w.position)), run})
}

// pump starts jobs while there is room; the lock is held.
func (w *runner) pump() {
	for !w.stopping && w.steps != nil && w.active < w.limit && len(w.queue) > 0 {
		j := w.queue[0]
		w.queue[0] = job{}
		w.queue = w.queue[1:]
		w.active++
		go w.work(w.steps, j)
	}
	w.roomy()
}

// roomy says that there is room in the queue, if there is; the lock is held.
func (w *runner) roomy() {
	if len(w.queue) <= 8*w.limit {
		poke(w.room)
		w.feed()
	}
}

// feed makes tend look again; the lock is held.
func (w *runner) feed() {
	if w.starved {
		w.starved = false
		poke(w.hungry)
	}
}

func (w *runner) work(ctx context.Context, j job) {
	for {
		j.run(ctx)
		w.mu.Lock()
		w.ledger.finish(j.entry)
		if w.stopping || len(w.queue) == 0 {
			break
		}
		// Go on with the next one on this goroutine, whose stack has grown already.
		j = w.queue[0]
		w.queue[0] = job{}
		w.queue = w.queue[1:]
		w.roomy()
		w.mu.Unlock()
	}
	defer w.mu.Unlock()
	w.active--
	w.notify()
	if w.active == 0 && w.idle != nil {
		close(w.idle)
		w.idle = nil
	}
}

// notify wakes who waits for what is done; the lock is held.
func (w *runner) notify() {
	if !w.caught {
		return
	}
	kept := w.waiters[:0]
	for _, wt := range w.waiters {
		if w.settled(wt.through) {
			close(wt.done)
		} else {
			kept = append(kept, wt)
		}
	}
	clear(w.waiters[len(kept):])
	w.waiters = kept
}

// settled reports whether nothing is left to do that the events up to p cause.
// What is overdue counts as work, although the loop that fires it may not have
// got to it yet: a run must not begin behind the back of who has settled, and
// then move the clock.
func (w *runner) settled(p eventstore.Position) bool {
	if !w.caught || w.position < p || w.ledger.before(p) || w.held > 0 || w.behaviour.unsettled() {
		return false
	}
	at, some := w.behaviour.due()
	return !some || at.After(w.env.clock.Now())
}

// WaitThrough is candidate's, while the runner serves.
func (w *runner) WaitThrough(ctx context.Context, p eventstore.Position) error {
	w.mu.Lock()
	if w.failure != nil {
		defer w.mu.Unlock()
		return w.failure
	}
	if w.settled(p) {
		w.mu.Unlock()
		return nil
	}
	wt := &waiter{p, make(chan struct{})}
	w.waiters = append(w.waiters, wt)
	w.mu.Unlock()
	select {
	case <-wt.done:
		return nil
	case <-w.stopped:
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.failure
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// NextDue is candidate's, while the runner serves.
func (w *runner) NextDue() (time.Time, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.behaviour.due()
}

// Fire is candidate's, while the runner serves.
func (w *runner) Fire(_ context.Context, now time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failure != nil {
		return w.failure
	}
	w.behaviour.fire(now)
	w.pump()
	return nil
}

// fireLoop fires by the engine's clock.
func (w *runner) fireLoop(ctx context.Context) error {
	for {
		w.mu.Lock()
		at, some := w.behaviour.alarm()
		w.mu.Unlock()
		var timer <-chan time.Time
		stop := func() {}
		if some {
			timer, stop = w.env.clock.NewTimer(at)
		}
		select {
		case <-timer:
			if err := w.Fire(ctx, w.env.clock.Now()); err != nil {
				return nil
			}
		case <-w.rearm:
		case <-ctx.Done():
		}
		stop()
		if ctx.Err() != nil {
			return nil
		}
	}
}

// flushLoop stores the index: when much has changed, or a while after
// anything has.
func (w *runner) flushLoop(ctx context.Context) error {
	for {
		select {
		case <-w.unstored:
		case <-ctx.Done():
			return nil
		}
		t := time.NewTimer(flushInterval)
		select {
		case <-t.C:
		case <-w.full:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
		t.Stop()
		if err := w.flush(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, projection.ErrFenced) || errors.Is(err, eventstore.ErrClosed) {
				return err
			}
			w.logger.Warn("the index could not be stored; it is tried again", "worker", w.name, "error", err)
			pause(ctx, flushInterval)
			poke(w.unstored)
		}
	}
}

// flush stores the index and the checkpoint in one transaction.
func (w *runner) flush(ctx context.Context) error {
	select {
	case w.flushing <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-w.flushing }()
	w.mu.Lock()
	lease, doubtful := w.lease, w.doubtful
	from, to := w.checkpoint, projection.Checkpoint{Log: w.logID, Epoch: w.lease.Epoch, Position: w.position}
	ch := w.behaviour.changes()
	w.pending = 0
	w.mu.Unlock()
	if ch.count == 0 && to.Position == from.Position && !doubtful {
		return nil
	}
	began := time.Now()
	err := w.state.Update(ctx, func(tx projection.StateTx) error {
		if doubtful {
			if err := tx.Fence(lease); err != nil {
				return err
			}
			// What has this epoch is this runner's, so the flush that failed took effect.
			if is, err := tx.Checkpoint(w.name); err != nil {
				return err
			} else if is.Epoch == lease.Epoch {
				from = is
			}
		}
		// First, because it fences.
		if err := tx.SetCheckpoint(lease, from, to); err != nil {
			return err
		}
		return ch.write(tx, to)
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	defer poke(w.flushed)
	defer w.feed()
	if w.doubtful = err != nil; w.doubtful {
		ch.undo()
		return fmt.Errorf("%s: store the index: %w", w.name, err)
	}
	w.checkpoint, w.sure = to, began
	ch.stored()
	return nil
}

// renewLoop keeps the lease, where leases end by time.
func (w *runner) renewLoop(ctx context.Context) error {
	if w.ttl <= 0 {
		return nil
	}
	for pause(ctx, w.ttl/3) {
		w.mu.Lock()
		lease := w.lease
		w.mu.Unlock()
		began := time.Now()
		renewed, err := w.state.Renew(ctx, lease, w.ttl)
		switch {
		case err == nil:
			w.mu.Lock()
			w.lease, w.sure = renewed, began
			w.mu.Unlock()
		case errors.Is(err, projection.ErrFenced):
			return fmt.Errorf("%s: %w", w.name, err)
		case ctx.Err() == nil:
			w.logger.Warn("the lease could not be renewed; it is tried again", "worker", w.name, "error", err)
		}
	}
	return nil
}

// fenced reports whether another owner has taken over, and then stops.
func (w *runner) fenced(ctx context.Context) (bool, error) {
	w.mu.Lock()
	lease := w.lease
	w.mu.Unlock()
	began := time.Now()
	err := w.state.Update(ctx, func(tx projection.StateTx) error { return tx.Fence(lease) })
	if errors.Is(err, projection.ErrFenced) {
		w.fail(fmt.Errorf("%s: %w", w.name, err))
		return true, nil
	}
	if err == nil {
		w.mu.Lock()
		w.sure = began
		w.mu.Unlock()
	}
	return false, err
}

// sureFor is for how long a runner relies on having the lease. It is less than
// it takes for the lease of a process that was paused to become free.
const sureFor = 3 * time.Second

func (w *runner) isSure() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	// Of the two clocks one may have stood still while the process did.
	byWall := now.Round(0).Sub(w.sure.Round(0))
	return now.Sub(w.sure) < sureFor && byWall >= 0 && byWall < sureFor
}

// confirm makes sure, before anything is done that has an effect outside, that
// the lease is still this runner's: after a pause of the whole process another
// one may be at the same work. False says to leave it alone.
func (w *runner) confirm(ctx context.Context) bool {
	for n := 0; w.shared && !w.isSure(); n++ {
		select {
		case w.confirming <- struct{}{}:
		case <-ctx.Done():
			return false
		}
		var lost bool
		var err error
		if !w.isSure() {
			lost, err = w.fenced(ctx)
		}
		<-w.confirming
		if lost || ctx.Err() != nil {
			return false
		}
		if err != nil {
			w.logger.Warn("the lease could not be confirmed; it is tried again", "worker", w.name, "error", err)
			pause(ctx, backoff(n))
		}
	}
	return true
}

// fail ends serve with the error.
func (w *runner) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failure == nil && !w.stopping {
		w.failure = err
	}
	if w.cancel != nil {
		w.cancel()
	}
}

// drain lets the jobs that run end by themselves for a while, unless another
// owner has taken over, then cancels their contexts, and at last leaves them
// behind: they can no longer do harm, since what they would record is checked
// against the history.
func (w *runner) drain(cancelSteps context.CancelCauseFunc) {
	w.mu.Lock()
	w.stopping = true
	w.queue = nil
	lost := errors.Is(w.failure, projection.ErrFenced)
	if lost {
		cancelSteps(w.failure)
	}
	idle := make(chan struct{})
	if w.active == 0 {
		close(idle)
	} else {
		w.idle = idle
	}
	w.mu.Unlock()
	for i := range 2 {
		if i == 0 && lost {
			continue
		}
		t := time.NewTimer(w.grace)
		select {
		case <-idle:
			t.Stop()
			return
		case <-t.C:
		}
		if i == 0 {
			cancelSteps(ErrStopped)
		}
	}
	w.mu.Lock()
	left := w.behaviour.describe()
	w.mu.Unlock()
	w.logger.Error("stopped while steps were running that ignore their context; they will run again", "worker", w.name, "running", left)
}
