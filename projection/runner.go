package projection

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/deed-go/deed/eventstore"
)

// runner is the worker of one projection, or of one of its partitions.
type runner struct {
	engine     *Engine
	projection Projection
	part       partition
	unit       string // the name under which everything of it is stored
	progress   *progress
	attributes metric.MeasurementOption
	// owning holds a token while nobody runs the projection or works on it offline.
	owning   chan struct{}
	running  atomic.Bool
	requests chan request
	// asides is what is done beside the projection for others, until Run returns.
	asides    sync.WaitGroup
	verifying atomic.Bool
	inline    *inlineUnit // nil: it is not
	// joined: the appends may have it. joinAt is when they may have it again. Both
	// belong to whoever has the token.
	joined bool
	joinAt time.Time

	// What follows belongs to whoever has the token.
	turn   turn
	owner  string
	losses int     // of the lease in a row, each soon after it was acquired
	held   Lease   // the last one, as long as it may have to be released
	doubt  bool    // whether one was acquired since
	asked  request // done is nil: nothing
	logID  string  // once known
	folder folder
	parked parkedKeys
	stored Checkpoint // as last written
	tally  tally      // of what is applied, as last written
	tells  bool       // there is a tally: the projection was begun with one
	failed int        // failures in a row
	marked bool       // items may be marked as parked
	paused bool       // it is not to go on
	live   bool       // the head of the log has been reached
}

// request is work for the goroutine that runs the projection.
type request struct {
	ctx      context.Context
	do       func(ctx context.Context, lease Lease) error
	empties  bool // removes the rows; afterwards, begin again from the stored checkpoint
	restarts bool // afterwards, begin again
	between  bool // leaves rows alone
	done     chan error
}

var (
	errRestart = errors.New("begin again from the stored checkpoint")
	errPaused  = errors.New("stopped while waiting to retry")
	errEnded   = errors.New("the subscription ended although nobody ended it")
	errMoved   = errors.New("it is not this node's work any more")
	errNotOurs = fmt.Errorf("%w: its work is another node's", ErrLeaseHeld)
)

func newRunner(e *Engine, p Projection, part partition) *runner {
	unit := part.unitName(p.Name())
	r := &runner{
		engine:     e,
		projection: p,
		part:       part,
		unit:       unit,
		progress:   newProgress(unit),
		attributes: metric.WithAttributeSet(attribute.NewSet(nameAttribute(unit))),
		owner:      e.options.Owner,
		owning:     make(chan struct{}, 1),
		requests:   make(chan request),
	}
	r.owning <- struct{}{}
	return r
}

// Name implements worker.Worker.
func (r *runner) Name() string { return "projection " + r.unit }

// Offer implements worker.Offerer.
func (r *runner) Offer() {
	if g := r.engine.options.Group; g != nil {
		g.Offer(r.leaseName())
	}
}

// Ready implements worker.Worker.
func (r *runner) Ready(ctx context.Context) error { return r.progress.wait(ctx, 0, true) }

// WaitThrough implements worker.Worker.
func (r *runner) WaitThrough(ctx context.Context, p eventstore.Position) error {
	return r.progress.wait(ctx, p, true)
}

// NextDue implements worker.Worker: it is the time of the next retry.
func (r *runner) NextDue() (time.Time, bool) { return r.progress.nextDue() }

// Fire implements worker.Worker.
func (r *runner) Fire(_ context.Context, now time.Time) error {
	r.progress.due(now)
	return nil
}

func leaseName(unit string) string { return "projection." + unit }

func (r *runner) leaseName() string { return leaseName(r.unit) }
func (r *runner) deadTable() string { return deadTable(r.unit) }

// Run implements worker.Worker.
func (r *runner) Run(ctx context.Context) (err error) {
	if !r.running.CompareAndSwap(false, true) {
		return fmt.Errorf("projection %q runs already", r.unit)
	}
	defer r.running.Store(false)
	select {
	case <-r.owning: // what was asked for before it ran has been done
	case <-ctx.Done():
		return nil
	}
	defer func() { r.owning <- struct{}{} }()
	ctx, cancel := context.WithCancel(ctx)
	defer r.asides.Wait()
	defer cancel()
	r.progress.change(func() {
		r.progress.ended, r.progress.failure, r.progress.phase = false, nil, PhaseCatchingUp
	})
	defer func() {
		if ctx.Err() != nil {
			err = nil
		}
		if err != nil {
			err = fmt.Errorf("projection %q: %w", r.unit, err)
			r.engine.options.Logger.Error("projection stopped", "projection", r.unit, "error", err)
		}
		r.progress.change(func() {
			r.progress.ended, r.progress.failure, r.progress.phase, r.progress.retryAt = true, err, PhaseStopped, time.Time{}
			if err != nil {
				r.progress.lastErr, r.progress.errAt = err, r.engine.options.Clock.Now()
			}
		})
	}()
	r.failed, r.losses = 0, 0
	r.turn = newTurn(ctx, r.engine.options.Group, r.leaseName())
	defer r.turn.withdraw()
	defer r.engine.telemetry.observeLag(r)()
	for {
		lease, err := r.acquire(ctx)
		began := time.Now()
		if err == nil {
			r.engine.telemetry.acquired.Add(ctx, 1, r.attributes)
			err = r.own(ctx, lease)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errMoved):
			r.handOver(ctx, err)
			continue
		case !errors.Is(err, ErrFenced):
			return err
		}
		r.lose(ctx, err)
		if r.losses++; time.Since(began) >= acquireEvery {
			r.losses = 1
		}
		if r.losses > 1 {
			// Whatever it is that takes it away again: not as fast as possible.
			if err := r.standBy(ctx, acquireEvery); err != nil && ctx.Err() == nil {
				return err
			}
		}
	}
}

// acquire waits for the lease, standing by while another owner has it, or
// another node is to have it.
func (r *runner) acquire(ctx context.Context) (Lease, error) {
	told, failures := false, 0
	began, ours := time.Now(), false // since when it is this node's turn, or not
	for {
		if r.turn.ours() != ours {
			began, ours = time.Now(), !ours
		}
		err := errNotOurs
		if r.turn.ours() || r.asked.done != nil {
			var lease Lease
			if lease, err = r.tryAcquire(ctx); err == nil {
				return lease, nil
			}
			r.refuse(ctx, err)
		} else if failed := r.release(ctx); failed != nil {
			err = failed // nobody else can have it as long as this process lives
		}
		switch {
		case ctx.Err() != nil || final(err):
			return Lease{}, err
		case errors.Is(err, ErrLeaseHeld):
			if !told {
				r.engine.options.Logger.Info("projection stands by", "projection", r.unit, "reason", err)
				told = true
			}
			failures = 0
			every := acquireEvery
			if waited := time.Since(began); r.turn.group && waited < handoverPatience {
				every = min(acquireSoon, max(acquireFirst, waited)) // whoever has it gives it up, or is dead
			}
			err = r.standBy(ctx, every)
		default:
			failures++
			err = r.pause(ctx, Lease{}, err, failures)
		}
		if err != nil {
			return Lease{}, err
		}
	}
}

func (r *runner) tryAcquire(ctx context.Context) (Lease, error) {
	if err := r.release(context.WithoutCancel(ctx)); err != nil {
		return Lease{}, err
	}
	lease, err := r.engine.state.Acquire(ctx, r.leaseName(), r.owner, 0)
	if err != nil {
		r.doubt = !errors.Is(err, ErrLeaseHeld)
		return Lease{}, err
	}
	r.held = lease
	return lease, nil
}

// release gives up the lease that was held last: it may be this runner's still,
// also after it was fenced, for then the checkpoint alone may have moved on. One of
// which it is not known whether it was acquired is acquired first: nobody else
// could have it as long as this process lives.
func (r *runner) release(ctx context.Context) error {
	if r.held.Epoch == 0 && r.doubt {
		lease, err := r.engine.state.Acquire(ctx, r.leaseName(), r.owner, 0)
		if err != nil && !errors.Is(err, ErrLeaseHeld) {
			return err
		}
		r.held, r.doubt = lease, false
	}
	if r.held.Epoch == 0 {
		return nil
	}
	if err := r.engine.state.Release(ctx, r.held); err != nil {
		return err
	}
	r.held = Lease{}
	return nil
}

// handOver drops what is known when the work is another node's from now on.
func (r *runner) handOver(ctx context.Context, cause error) {
	r.engine.telemetry.moved.Add(ctx, 1, r.attributes)
	r.engine.options.Logger.Info("projection is handed over", "projection", r.unit, "reason", cause)
	r.drop(func() {})
}

// drop forgets everything: another owner goes on.
func (r *runner) drop(also func()) {
	r.failed, r.folder, r.stored, r.parked, r.live = 0, nil, Checkpoint{}, nil, false
	r.progress.change(func() {
		r.progress.started, r.progress.through, r.progress.stored, r.progress.phase = false, 0, 0, PhaseStandby
		r.progress.inline = false
		also()
	})
}

// lose drops everything that is known when another owner has taken over.
func (r *runner) lose(ctx context.Context, cause error) {
	r.engine.telemetry.fenced.Add(ctx, 1, r.attributes)
	r.engine.options.Logger.Warn("projection lost its lease to another owner", "projection", r.unit, "error", cause)
	// The name that takes leases over has served: were two engines of one name
	// alive, they would take it from one another for ever.
	r.owner = r.engine.options.Owner + "/" + uuid.NewString()
	now := r.engine.options.Clock.Now()
	r.drop(func() { r.progress.lastErr, r.progress.errAt = cause, now })
}

// How often whoever stands by tries to acquire the lease, and looks at what the
// owner has stored while somebody waits for it: at first every lookAtFirst, and
// more seldom the longer nothing happens.
//
// A node whose turn it is tries more often, first acquireFirst later and then less
// and less: the one that has the lease is about to give it up, or has died, and then
// the lease ends by itself.
const (
	acquireEvery     = time.Second
	acquireFirst     = 5 * time.Millisecond
	acquireSoon      = 50 * time.Millisecond
	handoverPatience = 30 * time.Second
	lookAtFirst      = 5 * time.Millisecond
	lookAtLast       = 100 * time.Millisecond
)

// standBy follows what the owner of the projection stores. It returns when it
// is time to try to acquire the lease: after a while, when it is this node's turn,
// or at once when somebody asks for something.
func (r *runner) standBy(ctx context.Context, every time.Duration) error {
	try := time.NewTimer(every - every/10 + rand.N(every/5))
	defer try.Stop()
	if !r.turn.ours() {
		try.Stop()
	}
	look := time.NewTimer(0)
	defer look.Stop()
	r.progress.change(func() { r.progress.phase = PhaseStandby })
	pace, looked := lookAtFirst, time.Time{}
	hurry := func() {
		pace = lookAtFirst
		look.Reset(lookAtFirst - time.Since(looked))
	}
	for {
		select {
		case <-look.C:
			news, err := r.observe(ctx)
			if err != nil && (ctx.Err() != nil || final(err)) {
				return err // anything else will show when acquiring
			}
			looked = time.Now()
			if news {
				pace = lookAtFirst
			}
			if r.progress.awaited() {
				look.Reset(pace)
				pace = min(2*pace, lookAtLast)
			}
		case <-r.progress.wanted:
			hurry()
		case <-r.progress.doubted:
			hurry()
		case r.asked = <-r.requests:
			return nil
		case r.turn.ending = <-r.turn.comes():
			return nil
		case <-try.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// observe reads how far the owner has come.
func (r *runner) observe(ctx context.Context) (news bool, err error) {
	if r.logID == "" {
		if r.logID, err = eventstore.LogID(ctx, r.engine.store); err != nil {
			return false, err
		}
	}
	var c Checkpoint
	err = r.engine.state.View(ctx, func(tx StateTx) error {
		var err error
		c, err = tx.Checkpoint(r.leaseName())
		return err
	})
	if err == nil {
		err = c.fits(r.logID)
	}
	if err != nil {
		return false, err
	}
	return r.progress.observe(c.Position), nil
}

// refuse answers what was asked of a projection that this runner does not own.
func (r *runner) refuse(ctx context.Context, err error) {
	if r.asked.done == nil {
		return
	}
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("%w: %q", ErrStopped, r.unit)
	case errors.Is(err, ErrLeaseHeld):
		err = runsElsewhere(err)
	}
	r.asked.done <- err
	r.asked = request{}
}

func runsElsewhere(held error) error {
	return fmt.Errorf("%w: another process runs the projection: ask that one, or stop it", held)
}

// own runs the projection until ctx ends, the lease is lost, or an error for good.
func (r *runner) own(ctx context.Context, lease Lease) error {
	defer func() { _ = r.release(context.WithoutCancel(ctx)) }()
	r.folder = r.projection.open(r.engine.state, &r.engine.options, r.part)
	if q := r.asked; q.done != nil {
		r.asked = request{}
		if err := r.serve(ctx, lease, q); errors.Is(err, ErrFenced) {
			return err
		}
	}
	ctx = r.turn.within(ctx)
	defer r.promote(ctx)()
	for {
		err := r.follow(ctx, lease)
		switch {
		case errors.Is(err, ErrFenced):
			return err // also when the turn is over: somebody tried too late, and is counted
		case ctx.Err() != nil:
			return fmt.Errorf("%w: %w", errMoved, context.Cause(ctx))
		case errors.Is(err, errRestart):
			continue
		case final(err):
			return err
		}
		r.failed++
		err = r.pause(ctx, lease, err, r.failed)
		switch {
		case errors.Is(err, ErrFenced):
			return err
		case ctx.Err() != nil:
			return fmt.Errorf("%w: %w", errMoved, context.Cause(ctx))
		case err != nil && final(err):
			return err
		}
	}
}

// final reports whether trying again cannot help.
func final(err error) bool {
	if errors.Is(err, ErrUnavailable) {
		return false
	}
	for _, target := range []error{
		ErrWrongLog, errRowShape, errors.ErrUnsupported, errSetup,
		eventstore.ErrClosed, eventstore.ErrGap, eventstore.ErrNewerVersion, eventstore.ErrInvalid,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// infrastructure reports whether a handler failed because the state did.
func infrastructure(err error) bool {
	return errors.Is(err, ErrFenced) || errors.Is(err, eventstore.ErrClosed)
}

var errSetup = errors.New("cannot prepare its tables")

// arrival is what the subscription brings.
type arrival struct {
	items    []item
	through  eventstore.Position
	caughtUp bool
	err      error
}

// follow works from the stored checkpoint on, until ctx ends or an error.
func (r *runner) follow(ctx context.Context, lease Lease) error {
	if err := r.resume(ctx, lease); err != nil {
		if errors.Is(err, ErrWrongLog) {
			// It may have been asked to do what the error asks for.
			if done := r.orders(ctx, lease, actionRebuild); errors.Is(done, errRestart) {
				return done
			}
		}
		return err
	}
	if Shared(r.engine.state) {
		if err := r.orders(ctx, lease); err != nil {
			return err
		}
	}
	if r.paused {
		return r.standStill(ctx, lease)
	}
	ctx, cancel := context.WithCancel(ctx)
	arrivals := make(chan arrival, 1)
	go func() {
		defer close(arrivals)
		r.read(ctx, r.stored.Position, arrivals)
	}()
	defer func() {
		cancel()
		for range arrivals {
			// The reader ends when it is told to; only then may the next one begin.
		}
	}()
	ordered, stop := r.lookForOrders()
	defer stop()
	join := time.NewTimer(time.Until(r.joinAt))
	defer join.Stop()
	note := time.NewTimer(r.engine.noteAfter)
	note.Stop()
	defer note.Stop()
	for noting := false; ; {
		if r.joins() {
			joined, err := r.join(ctx, lease)
			if err != nil {
				return err
			}
			if joined {
				return r.watch(ctx, lease, arrivals, ordered)
			}
		}
		if !noting && r.progress.reached() > r.stored.Position {
			note.Reset(r.engine.noteAfter)
			noting = true
		}
		select {
		case a, more := <-arrivals:
			if !more {
				a.err = errEnded
			}
			if err := r.take(ctx, lease, a, arrivals); err != nil {
				if ctx.Err() != nil {
					r.note(ctx, lease)
				}
				return err
			}
		case q := <-r.requests:
			if err := r.serve(ctx, lease, q); err != nil {
				return err
			}
		case <-ordered:
			if err := r.orders(ctx, lease); err != nil {
				return err
			}
		case <-join.C: // what is to be done is above
		case <-note.C:
			noting = false
			if through := r.progress.reached(); through > r.stored.Position {
				if err := r.mark(ctx, lease, through); err != nil {
					return err
				}
			}
		case <-r.progress.doubted:
			if err := r.engine.state.Update(ctx, func(tx StateTx) error { return tx.Fence(lease) }); err != nil {
				return err
			}
		case <-ctx.Done():
			r.note(ctx, lease)
			return ctx.Err()
		}
	}
}

// resume reads where the projection is, and refuses a log that this cannot be
// a place in.
func (r *runner) resume(ctx context.Context, lease Lease) error {
	// First of all: while appends have it, the checkpoint follows the log, and soon is
	// beyond any head that was read before it.
	if err := r.withdraw(ctx, lease); err != nil {
		return err
	}
	id, err := eventstore.LogID(ctx, r.engine.store)
	if err != nil {
		return err
	}
	head, err := r.engine.store.Head(ctx)
	if err != nil {
		return err
	}
	r.logID, r.stored, r.live = id, Checkpoint{}, false
	r.folder.forget()
	// The checkpoint is read behind the fence: an update of this very runner whose
	// outcome is unknown has ended by then.
	err = r.engine.state.Update(ctx, func(tx StateTx) error {
		if err := tx.Fence(lease); err != nil {
			return err
		}
		var err error
		if r.stored, err = tx.Checkpoint(r.leaseName()); err != nil {
			return err
		}
		if err := r.unmark(tx); err != nil {
			return err
		}
		if err := r.stored.fits(id); err != nil {
			return err
		}
		if r.stored.Position > head {
			return fmt.Errorf("%w: it is at position %d, but the log ends at %d: the database was restored from an older state: rebuild the projection, or bring the right log back", ErrWrongLog, r.stored.Position, head)
		}
		if err := r.arrange(tx); err != nil {
			return err
		}
		if err := r.folder.setup(ctx, tx); err != nil {
			return fmt.Errorf("%w: %w", errSetup, err)
		}
		if r.paused, err = isPaused(tx, r.unit); err != nil {
			return err
		}
		if err := r.enroll(ctx, tx); err != nil {
			return fmt.Errorf("%w: %w", errSetup, err)
		}
		if !r.stored.IsZero() {
			r.tally, r.tells, err = getJSON[tally](tx, tallies, r.unit)
			return err
		}
		if err := tx.SetCheckpoint(lease, r.stored, Checkpoint{Log: id}); err != nil {
			return err
		}
		r.tally, r.tells = tally{}, true
		if err := r.putTally(tx, r.tally); err != nil {
			return err
		}
		// Rows without a checkpoint are not a fold of anything.
		if _, sql := r.projection.(*SQLDefinition); !sql {
			return r.folder.clear(ctx, tx)
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.joined = false
	if r.stored.IsZero() {
		r.stored = Checkpoint{Log: id}
	}
	r.parked = parkedKeys{}
	if err := r.engine.state.View(ctx, func(tx StateTx) error {
		return r.eachDeadLetter(tx, func(d DeadLetter) { r.parked.add(d.Stream, d.Keys) })
	}); err != nil {
		return err
	}
	if err := r.folder.prepare(ctx, lease); err != nil {
		return err
	}
	if r.stored.Position == 0 {
		r.folder.fresh()
	}
	// Where requests are found at the start only, before anybody hears of that:
	// whoever waits for no more than that may stop it at once.
	if !Shared(r.engine.state) {
		if err := r.orders(ctx, lease); err != nil {
			return err
		}
	}
	r.progress.change(func() {
		r.progress.started, r.progress.through, r.progress.stored, r.progress.phase = true, r.stored.Position, r.stored.Position, PhaseCatchingUp
	})
	return nil
}

// fits refuses a checkpoint of another log.
func (c Checkpoint) fits(log string) error {
	if c.IsZero() || c.Log == log {
		return nil
	}
	return fmt.Errorf("%w: it is at position %d of the log %q, but this log is %q: the database was replaced: rebuild the projection, or bring the right log back", ErrWrongLog, c.Position, c.Log, log)
}

// read brings what the projection handles, decoded, while earlier events are
// being folded.
func (r *runner) read(ctx context.Context, after eventstore.Position, to chan<- arrival) {
	q := r.projection.selection(r.engine.options.Encoding, r.part)
	for b, err := range r.engine.reader.Follow(ctx, q, after) {
		a := arrival{through: b.Through, caughtUp: b.CaughtUp, err: err}
		if len(b.Events) > 0 {
			a.items = make([]item, len(b.Events))
			for i := range b.Events {
				a.items[i].event, a.items[i].memo = &b.Events[i], b.Memo(i)
			}
			decodeItems(r.folder, a.items)
			a.items = slices.DeleteFunc(a.items, func(it item) bool { return it.foreign })
		}
		select {
		case to <- a:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

// What is gathered into one batch is bounded in number of the subscription's
// batches and in time.
const (
	manyArrivals     = 64
	longestGathering = 50 * time.Millisecond
)

// take gathers what has arrived, or is about to while catching up, and applies it.
func (r *runner) take(ctx context.Context, lease Lease, a arrival, more <-chan arrival) error {
	var late <-chan time.Time
	for n := 1; a.err == nil && n < manyArrivals && len(a.items) < r.engine.options.BatchEvents; n++ {
		var next arrival
		var open bool
		if a.caughtUp {
			select {
			case next, open = <-more:
			default:
				n = manyArrivals
				continue
			}
		} else {
			if late == nil {
				timer := time.NewTimer(longestGathering)
				defer timer.Stop()
				late = timer.C
			}
			select {
			case next, open = <-more:
			case <-late:
				n = manyArrivals
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if !open {
			next.err = errEnded
		}
		if next.err != nil {
			a.err = next.err
			break
		}
		if len(a.items) == 0 {
			a.items = next.items
		} else {
			a.items = append(a.items, next.items...)
		}
		a.through, a.caughtUp = next.through, next.caughtUp
	}
	if err := r.apply(ctx, lease, a.items, a.through); err != nil {
		return err
	}
	if a.err != nil {
		return a.err
	}
	r.failed = 0
	if a.caughtUp {
		r.live = true
		r.progress.change(func() { r.progress.phase = PhaseLive })
	}
	return nil
}

// apply commits the items, in order, whatever it takes: what fails is tried
// again alone, and set aside in the end.
func (r *runner) apply(ctx context.Context, lease Lease, items []item, through eventstore.Position) error {
	most := r.engine.options.BatchEvents
	attempts, limit := 0, min(len(items), most)
	for len(items) > 0 {
		r.park(items)
		n, err := r.commit(ctx, lease, items[:limit], through, limit == len(items))
		if err == nil {
			items, attempts = items[n:], 0
			if limit -= n; limit == 0 {
				limit = min(len(items), most)
			}
			continue
		}
		failure := (*handlerError)(nil)
		if !errors.As(err, &failure) || ctx.Err() != nil || infrastructure(failure.cause) {
			return err
		}
		r.folder.forget()
		r.renew(items[:limit])
		if failure.index > 0 {
			// Whatever precedes the failure is done first, so that it is not held up.
			limit, attempts = failure.index, 0
			continue
		}
		limit = 1
		if attempts++; attempts < r.engine.options.Attempts && !hopeless(failure.cause) {
			if err := r.pause(ctx, lease, failure, attempts); err != nil {
				return err
			}
			continue
		}
		if err := r.setAside(ctx, lease, &items[0], failure.cause, attempts); err != nil {
			return err
		}
		items, attempts = items[1:], 0
		limit = min(len(items), most)
	}
	if r.stored.Position < through {
		return r.skip(ctx, lease, through)
	}
	return nil
}

// renew decodes again what handlers have had in their hands: they may have
// changed it, or kept parts of it in rows.
func (r *runner) renew(items []item) {
	for i := range items {
		if it := &items[i]; it.used || it.problem != nil {
			it.value, it.keys, it.problem, it.used, it.foreign = nil, nil, nil, false, false
			r.folder.decode(it)
		}
	}
}

// commit folds items and moves the checkpoint in one update. The checkpoint
// goes to through with the last of all items, and else to the last item done.
func (r *runner) commit(ctx context.Context, lease Lease, items []item, through eventstore.Position, last bool) (int, error) {
	var next Checkpoint
	var applied tally
	ctx, end := r.span(ctx, len(items))
	n, err := r.folder.apply(ctx, lease, items, func(tx StateTx, n int) error {
		next = Checkpoint{Log: r.stored.Log, Epoch: lease.Epoch, Position: items[n-1].event.Position}
		if last && n == len(items) {
			next.Position = through
		}
		if err := tx.SetCheckpoint(lease, r.stored, next); err != nil {
			return err
		}
		for i := range items[:n] {
			if !items[i].parked {
				continue
			}
			if err := r.putDeadLetter(tx, &items[i], nil, 0); err != nil {
				return err
			}
		}
		applied = r.tally.count(items[:n])
		return r.putTally(tx, applied)
	})
	end(err)
	if err != nil {
		return 0, err
	}
	r.tally = applied
	r.parkedNow(items[:n])
	r.engine.telemetry.events.Add(ctx, int64(n), r.attributes)
	r.reach(next)
	return n, nil
}

func (r *runner) putTally(tx StateTx, t tally) error {
	if !r.tells {
		return nil
	}
	return putJSON(tx, tallies, r.unit, t)
}

func (r *runner) reach(c Checkpoint) {
	r.stored = c
	r.progress.change(func() { r.progress.through, r.progress.stored = c.Position, c.Position })
}

// skip passes events that do not concern the projection. The checkpoint is
// written after many of them, or a while later; what is lost by a crash is to
// look at them again.
func (r *runner) skip(ctx context.Context, lease Lease, through eventstore.Position) error {
	if uint64(through-r.stored.Position) < uint64(r.engine.options.CheckpointEvery) {
		r.progress.change(func() { r.progress.through = through })
		return nil
	}
	return r.mark(ctx, lease, through)
}

func (r *runner) mark(ctx context.Context, lease Lease, through eventstore.Position) error {
	next := Checkpoint{Log: r.stored.Log, Epoch: lease.Epoch, Position: through}
	if err := r.engine.state.Update(ctx, func(tx StateTx) error { return tx.SetCheckpoint(lease, r.stored, next) }); err != nil {
		return err
	}
	r.reach(next)
	return nil
}

// note writes, when the projection is told to stop, how far skip has come.
// Without it the next run looks at a few events again, so errors do not matter.
func (r *runner) note(ctx context.Context, lease Lease) {
	if through := r.progress.reached(); through > r.stored.Position {
		_ = r.mark(context.WithoutCancel(ctx), lease, through)
	}
}

// longestOutage bounds the pauses while the database cannot be reached.
const longestOutage = 3 * time.Second

// pause waits before the next attempt, longer each time. It serves requests
// meanwhile.
func (r *runner) pause(ctx context.Context, lease Lease, cause error, attempt int) error {
	o := &r.engine.options
	delay, most := o.RetryAfter, o.RetryAtMost
	if lease.Epoch == 0 || errors.Is(cause, ErrUnavailable) {
		most = min(most, max(delay, longestOutage)) // not the projection's fault, and over at once
	}
	for n := 1; n < attempt && delay < most; n++ {
		delay *= 2
	}
	delay = min(delay, most)
	delay -= rand.N(delay/10 + 1)
	r.engine.telemetry.retries.Add(ctx, 1, r.attributes)
	now := o.Clock.Now()
	at := now.Add(delay)
	o.Logger.Warn("projection retries", "projection", r.unit, "attempt", attempt, "after", delay, "error", cause)
	select {
	case <-r.progress.wake:
	default:
	}
	elapsed, abandon := o.Clock.NewTimer(at)
	defer abandon()
	var ordered <-chan time.Time
	if lease.Epoch != 0 && !errors.Is(cause, ErrUnavailable) {
		var stop func()
		ordered, stop = r.lookForOrders()
		defer stop()
	}
	r.progress.change(func() {
		r.progress.lastErr, r.progress.errAt, r.progress.retryAt, r.progress.phase = cause, now, at, PhaseRetrying
	})
	defer r.progress.change(func() { r.progress.retryAt = time.Time{} })
	for {
		select {
		case <-elapsed:
			r.progress.due(at)
			return nil
		case <-r.progress.wake:
			return nil
		case q := <-r.requests:
			if lease.Epoch == 0 { // while acquiring it
				q.done <- cause
				continue
			}
			if err := r.serve(ctx, lease, q); err != nil {
				return err
			}
		case <-ordered:
			if err := r.orders(ctx, lease); err != nil {
				return err
			}
		case <-ctx.Done():
			return errPaused
		}
	}
}

// serve runs a request between batches.
func (r *runner) serve(ctx context.Context, lease Lease, q request) error {
	if q.ctx.Err() != nil {
		q.done <- q.ctx.Err()
		return nil
	}
	if err := r.withdraw(ctx, lease); err != nil {
		q.done <- err
		return err
	}
	if q.between {
		err := q.do(ctx, lease)
		q.done <- err
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(q.ctx, cancel)
	r.folder.forget()
	err := r.perform(ctx, lease, q)
	stop()
	cancel()
	r.folder.forget()
	if err == nil && q.empties {
		r.progress.change(func() { r.progress.phase = PhaseCatchingUp })
		q.done <- nil
		return errRestart
	}
	q.done <- err
	if err == nil && !q.restarts || errors.Is(err, ErrFenced) {
		return err
	}
	// Whether the failed update took effect is not known: look.
	return errRestart
}

// perform does what is asked for. Rows are not relied on from before they are
// removed: whoever then finds none knows that they are missing.
func (r *runner) perform(ctx context.Context, lease Lease, q request) error {
	if !q.empties {
		return q.do(ctx, lease)
	}
	undo := r.progress.emptying()
	err := q.do(ctx, lease)
	if err != nil {
		undo()
	}
	return err
}

// ask has what is requested done by the projection's goroutine, or, when it does not run, here
// under a lease of its own. It reports which.
func (r *runner) ask(ctx context.Context, q request) (running bool, err error) {
	q.ctx, q.done = ctx, make(chan error, 1)
	select {
	case r.requests <- q:
		select {
		case err := <-q.done:
			return true, err
		case <-ctx.Done():
			return true, ctx.Err()
		}
	case <-r.owning:
		defer func() { r.owning <- struct{}{} }()
	case <-ctx.Done():
		return false, ctx.Err()
	}
	lease, err := r.tryAcquire(ctx)
	if errors.Is(err, ErrLeaseHeld) {
		err = runsElsewhere(err)
	}
	if err != nil {
		return false, err
	}
	r.folder = r.projection.open(r.engine.state, &r.engine.options, r.part)
	err = r.perform(ctx, lease, q)
	return false, errors.Join(err, r.release(context.WithoutCancel(ctx)))
}

// clear empties the projection: rows, dead letters and checkpoint.
func (r *runner) clear(ctx context.Context, lease Lease) error {
	return r.engine.state.Update(ctx, func(tx StateTx) error {
		if err := r.clearRecords(tx, lease); err != nil {
			return err
		}
		return r.folder.clear(ctx, tx)
	})
}

// clearRecords removes everything but the rows.
func (r *runner) clearRecords(tx StateTx, lease Lease) error {
	if err := tx.DeleteCheckpoint(lease); err != nil {
		return err
	}
	if err := errors.Join(tx.Delete(tallies, r.unit), r.unmark(tx)); err != nil {
		return err
	}
	for _, table := range []string{r.deadTable(), skippedTable(r.unit)} {
		if err := tx.Clear(table); err != nil {
			return err
		}
	}
	return nil
}
