package projection

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/deed-go/deed/eventstore"
)

// runner is the worker of one projection.
type runner struct {
	engine     *Engine
	projection Projection
	progress   *progress
	attributes metric.MeasurementOption
	// owning holds a token while nobody runs the projection or works on it offline.
	owning   chan struct{}
	requests chan request

	// What follows belongs to whoever has the token.
	folder folder
	parked map[eventstore.Stream]struct{}
	stored Checkpoint // as last written
	failed int        // failures in a row
	marked bool       // items may be marked as parked
	live   bool       // the head of the log has been reached
}

// request is work for the goroutine that runs the projection.
type request struct {
	ctx     context.Context
	do      func(ctx context.Context, lease Lease) error
	empties bool // removes the rows; afterwards, begin again from the stored checkpoint
	done    chan error
}

var (
	errRestart = errors.New("begin again from the stored checkpoint")
	errPaused  = errors.New("stopped while waiting to retry")
	errEnded   = errors.New("the subscription ended although nobody ended it")
)

func newRunner(e *Engine, p Projection) *runner {
	r := &runner{
		engine:     e,
		projection: p,
		progress:   newProgress(p.Name()),
		attributes: metric.WithAttributeSet(attribute.NewSet(nameAttribute(p))),
		owning:     make(chan struct{}, 1),
		requests:   make(chan request),
	}
	r.owning <- struct{}{}
	return r
}

// Name implements worker.Worker.
func (r *runner) Name() string { return "projection " + r.projection.Name() }

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

func (r *runner) leaseName() string { return "projection." + r.projection.Name() }
func (r *runner) deadTable() string { return "projection.dead." + r.projection.Name() }

// Run implements worker.Worker.
func (r *runner) Run(ctx context.Context) (err error) {
	select {
	case <-r.owning:
	default:
		return fmt.Errorf("projection %q runs already", r.projection.Name())
	}
	defer func() { r.owning <- struct{}{} }()
	r.progress.change(func() {
		r.progress.ended, r.progress.failure, r.progress.phase = false, nil, PhaseCatchingUp
	})
	defer func() {
		if ctx.Err() != nil {
			err = nil
		}
		if err != nil {
			err = fmt.Errorf("projection %q: %w", r.projection.Name(), err)
			r.engine.options.Logger.Error("projection stopped", "projection", r.projection.Name(), "error", err)
		}
		r.progress.change(func() {
			r.progress.ended, r.progress.failure, r.progress.phase, r.progress.retryAt = true, err, PhaseStopped, time.Time{}
			if err != nil {
				r.progress.lastErr, r.progress.errAt = err, r.engine.options.Clock.Now()
			}
		})
	}()
	lease, err := r.engine.state.Acquire(ctx, r.leaseName(), r.engine.options.Owner, 0)
	if err != nil {
		return err
	}
	defer func() {
		if release := r.engine.state.Release(context.WithoutCancel(ctx), lease); err == nil && ctx.Err() == nil {
			err = release
		}
	}()
	r.folder = r.projection.open(r.engine.state, &r.engine.options)
	r.failed = 0
	defer r.engine.telemetry.observeLag(r)()
	for {
		err := r.follow(ctx, lease)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errRestart):
			continue
		case final(err):
			return err
		}
		r.failed++
		if err := r.pause(ctx, lease, err, r.failed); err != nil && !errors.Is(err, errRestart) {
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
		ErrFenced, ErrLeaseHeld, ErrWrongLog, errRowShape, errors.ErrUnsupported, errSetup,
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
		return err
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
	for {
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
		case <-ctx.Done():
			r.note(ctx, lease)
			return ctx.Err()
		}
	}
}

// resume reads where the projection is, and refuses a log that this cannot be
// a place in.
func (r *runner) resume(ctx context.Context, lease Lease) error {
	id, err := eventstore.LogID(ctx, r.engine.store)
	if err != nil {
		return err
	}
	head, err := r.engine.store.Head(ctx)
	if err != nil {
		return err
	}
	r.stored, r.parked = Checkpoint{}, map[eventstore.Stream]struct{}{}
	err = r.engine.state.View(ctx, func(tx StateTx) error {
		var err error
		if r.stored, err = tx.Checkpoint(r.leaseName()); err != nil {
			return err
		}
		return r.eachDeadLetter(tx, func(d DeadLetter) { r.parked[d.Stream] = struct{}{} })
	})
	if err != nil {
		return err
	}
	if !r.stored.IsZero() && r.stored.Log != id {
		return fmt.Errorf("%w: it is at position %d of the log %q, but this log is %q: the database was replaced: rebuild the projection, or bring the right log back", ErrWrongLog, r.stored.Position, r.stored.Log, id)
	}
	if r.stored.Position > head {
		return fmt.Errorf("%w: it is at position %d, but the log ends at %d: the database was restored from an older state: rebuild the projection, or bring the right log back", ErrWrongLog, r.stored.Position, head)
	}
	r.folder.forget()
	r.live = false
	if err := r.engine.state.Update(ctx, func(tx StateTx) error {
		if err := tx.Fence(lease); err != nil {
			return err
		}
		if err := r.folder.setup(ctx, tx); err != nil {
			return fmt.Errorf("%w: %w", errSetup, err)
		}
		if r.stored.IsZero() {
			next := Checkpoint{Log: id}
			if err := tx.SetCheckpoint(lease, r.stored, next); err != nil {
				return err
			}
			// Rows without a checkpoint are not a fold of anything.
			if _, sql := r.projection.(*SQLDefinition); !sql {
				return r.folder.clear(ctx, tx)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	if r.stored.IsZero() {
		r.stored = Checkpoint{Log: id}
	}
	if r.stored.Position == 0 {
		r.folder.fresh()
	}
	r.progress.change(func() {
		r.progress.started, r.progress.through, r.progress.stored, r.progress.phase = true, r.stored.Position, r.stored.Position, PhaseCatchingUp
	})
	return nil
}

// read brings what the projection handles, decoded, while earlier events are
// being folded.
func (r *runner) read(ctx context.Context, after eventstore.Position, to chan<- arrival) {
	q := r.projection.selection(r.engine.options.Encoding)
	for b, err := range r.engine.store.Subscribe(ctx, q, after) {
		a := arrival{through: b.Through, caughtUp: b.CaughtUp, err: err}
		if len(b.Events) > 0 {
			a.items = make([]item, len(b.Events))
			for i := range b.Events {
				a.items[i].event = &b.Events[i]
				r.folder.decode(&a.items[i])
			}
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
		if attempts++; attempts < r.engine.options.Attempts && !errors.Is(failure.cause, eventstore.ErrDecode) {
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
			it.value, it.keys, it.problem, it.used = nil, nil, nil, false
			r.folder.decode(it)
		}
	}
}

// park marks what belongs to streams that were set aside.
func (r *runner) park(items []item) {
	if len(r.parked) == 0 && !r.marked {
		return
	}
	r.marked = len(r.parked) > 0
	for i := range items {
		_, items[i].parked = r.parked[items[i].event.Stream]
	}
}

// commit folds items and moves the checkpoint in one update. The checkpoint
// goes to through with the last of all items, and else to the last item done.
func (r *runner) commit(ctx context.Context, lease Lease, items []item, through eventstore.Position, last bool) (int, error) {
	var next Checkpoint
	ctx, end := r.span(ctx, len(items))
	n, err := r.folder.apply(ctx, items, func(tx StateTx, n int) error {
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
			if err := r.putDeadLetter(tx, items[i].event, nil, 0); err != nil {
				return err
			}
		}
		return nil
	})
	end(err)
	if err != nil {
		return 0, err
	}
	r.engine.telemetry.events.Add(ctx, int64(n), r.attributes)
	r.reach(next)
	return n, nil
}

func (r *runner) reach(c Checkpoint) {
	r.stored = c
	r.progress.change(func() { r.progress.through, r.progress.stored = c.Position, c.Position })
}

// skip passes events that do not concern the projection. The checkpoint is
// written only now and then; what is lost by a crash is to look at them again.
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

// pause waits before the next attempt, longer each time. It serves requests
// meanwhile.
func (r *runner) pause(ctx context.Context, lease Lease, cause error, attempt int) error {
	o := &r.engine.options
	delay := o.RetryAfter
	for n := 1; n < attempt && delay < o.RetryAtMost; n++ {
		delay *= 2
	}
	delay = min(delay, o.RetryAtMost)
	r.engine.telemetry.retries.Add(ctx, 1, r.attributes)
	now := o.Clock.Now()
	at := now.Add(delay)
	o.Logger.Warn("projection retries", "projection", r.projection.Name(), "attempt", attempt, "after", delay, "error", cause)
	select {
	case <-r.progress.wake:
	default:
	}
	elapsed, abandon := o.Clock.NewTimer(at)
	defer abandon()
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
			if err := r.serve(ctx, lease, q); err != nil {
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
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(q.ctx, cancel)
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
	if err == nil || errors.Is(err, ErrFenced) {
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

// ask has do run by the projection's goroutine, or, when it does not run, here
// under a lease of its own. It reports which.
func (r *runner) ask(ctx context.Context, do func(ctx context.Context, lease Lease) error, empties bool) (running bool, err error) {
	q := request{ctx: ctx, do: do, empties: empties, done: make(chan error, 1)}
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
	lease, err := r.engine.state.Acquire(ctx, r.leaseName(), r.engine.options.Owner, 0)
	if err != nil {
		return false, err
	}
	r.folder = r.projection.open(r.engine.state, &r.engine.options)
	err = r.perform(ctx, lease, q)
	return false, errors.Join(err, r.engine.state.Release(context.WithoutCancel(ctx), lease))
}

// clear empties the projection: rows, dead letters and checkpoint.
func (r *runner) clear(ctx context.Context, lease Lease) error {
	return r.engine.state.Update(ctx, func(tx StateTx) error {
		if err := tx.DeleteCheckpoint(lease); err != nil {
			return err
		}
		if err := tx.Clear(r.deadTable()); err != nil {
			return err
		}
		return r.folder.clear(ctx, tx)
	})
}
