package saga

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/internal/worker"
	"github.com/deed-go/deed/projection"
)

// candidate is the worker of one process. It runs the process whenever it has
// its lease, each time with a new runner: whoever lost the lease knows nothing
// any more, and a step that does not end keeps nothing but its old runner.
type candidate struct {
	role
	state  projection.State
	store  eventstore.Store
	apart  bool // from the states of the others
	group  *ownership.Group
	clock  clock.Clock
	owner  string // in the lease
	named  string // by the options
	ttl    time.Duration
	logger *slog.Logger

	fenced   func()
	opened   chan struct{} // closed when the worker, or the one that has the lease, knows where it begins
	openOnce sync.Once
	held     projection.Lease // the last one, as long as it may have to be released; used by Run
	doubt    bool             // whether one was acquired since

	mu      sync.Mutex
	started bool
	standby bool          // somebody else has the lease
	runner  *runner       // while this one has it
	failure error         // once Run has returned
	changed chan struct{} // closed, and replaced, when any of these changes
}

var (
	_ worker.Worker  = (*candidate)(nil)
	_ worker.Offerer = (*candidate)(nil)
)

// role is what a candidate needs to know of its process.
type role struct {
	name string // of the worker and its lease and checkpoint
	// begin makes the runner, before each time.
	begin func() *runner
	// idle reports whether the stored index has nothing to be done by now.
	idle func(tx projection.StateTx, now time.Time) (bool, error)
}

func newCandidate(e *Engine, r role) *candidate {
	return &candidate{
		role: r, state: e.state, store: e.env.store, apart: e.options.Leases != nil, group: e.options.Group, clock: e.env.clock, owner: e.options.Owner, named: e.options.Owner,
		ttl: e.options.LeaseTTL, logger: e.env.logger, fenced: func() { e.env.tell.count(e.env.tell.fenced, r.name) }, opened: make(chan struct{}), changed: make(chan struct{}),
	}
}

// change alters what the others see.
func (c *candidate) change(alter func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	alter()
	close(c.changed)
	c.changed = make(chan struct{})
}

// current returns the runner, if there is one.
func (c *candidate) current() *runner {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.runner
}

// Name implements worker.Worker.
func (c *candidate) Name() string { return c.name }

// Offer implements worker.Offerer.
func (c *candidate) Offer() {
	if c.group != nil {
		c.group.Offer(c.name)
	}
}

// Ready implements worker.Worker.
func (c *candidate) Ready(ctx context.Context) error {
	for {
		c.mu.Lock()
		failure, changed := c.failure, c.changed
		c.mu.Unlock()
		select {
		case <-c.opened:
			return nil
		default:
		}
		if failure != nil {
			return failure
		}
		select {
		case <-c.opened:
			return nil
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Run implements worker.Worker. A worker runs once.
func (c *candidate) Run(ctx context.Context) error {
	c.mu.Lock()
	if c.started {
		c.mu.Unlock()
		return fmt.Errorf("%w: %s was run before: make a new engine", ErrStopped, c.name)
	}
	c.started = true
	c.mu.Unlock()

	err := c.run(ctx)
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		err = nil // it was told to stop
	}
	c.change(func() {
		if c.failure = err; err == nil {
			c.failure = fmt.Errorf("%w: %s", ErrStopped, c.name)
		}
	})
	return err
}

func (c *candidate) run(ctx context.Context) error {
	if c.group == nil {
		return c.take(ctx)
	}
	unit := c.group.Offer(c.name)
	defer unit.Withdraw()
	for {
		turn, err := c.await(ctx, unit)
		if err != nil {
			return err
		}
		err = c.take(turn)
		if ctx.Err() != nil || turn.Err() == nil || err != nil && lasting(err) {
			return err
		}
		c.logger.Info("the work is handed over", "worker", c.name, "reason", context.Cause(turn))
		if err != nil && !errors.Is(err, context.Canceled) {
			c.logger.Warn("what was done last could not be stored; it is found in the log again", "worker", c.name, "error", err)
		}
		if err := c.letGo(ctx); err != nil {
			return err
		}
	}
}

// letGo releases the lease when that has failed before: nobody else can have it
// as long as this process lives.
func (c *candidate) letGo(ctx context.Context) error {
	for n := 0; ; n++ {
		err := c.release(ctx)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case lasting(err):
			return fmt.Errorf("%s: %w", c.name, err)
		}
		pause(ctx, backoff(n))
	}
}

// await returns when it is this node's turn, and a context that ends with that.
func (c *candidate) await(ctx context.Context, unit *ownership.Unit) (context.Context, error) {
	looking, cancel := context.WithCancel(ctx)
	var looks sync.WaitGroup
	looks.Go(func() { c.lookForPlace(looking) })
	defer c.change(func() { c.standby = false })
	defer looks.Wait()
	defer cancel()
	turn, err := unit.Wait(ctx)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return turn, err
}

// lookForPlace stands by as soon as somebody has found the place in the log where
// the process begins.
func (c *candidate) lookForPlace(ctx context.Context) {
	for {
		if placed, err := c.placed(ctx); placed && err == nil {
			c.openOnce.Do(func() { close(c.opened) })
			c.change(func() { c.standby = true })
			return
		}
		if !pause(ctx, lookAtLast/5) {
			return
		}
	}
}

// placed reports whether it is known where in the log the process begins.
func (c *candidate) placed(ctx context.Context) (bool, error) {
	if c.apart {
		_, known, err := registered(ctx, c.store, c.name)
		return known, err
	}
	var at projection.Checkpoint
	err := c.state.View(ctx, func(tx projection.StateTx) (err error) {
		at, err = tx.Checkpoint(c.name)
		return err
	})
	return !at.IsZero(), err
}

// take runs the process whenever it has the lease, until ctx ends.
func (c *candidate) take(ctx context.Context) error {
	defer func() { _ = c.release(context.WithoutCancel(ctx)) }()
	for {
		lease, err := c.acquire(ctx)
		if err != nil {
			return err
		}
		began := time.Now()
		w := c.begin()
		w.opened = func() { c.openOnce.Do(func() { close(c.opened) }) }
		c.change(func() { c.runner = w })
		err = w.serve(ctx, lease)
		c.change(func() { c.runner = nil })
		switch {
		case !errors.Is(err, projection.ErrFenced):
			return err
		case ctx.Err() != nil:
			return nil
		}
		c.logger.Warn("lost the lease to another owner", "worker", c.name, "error", err)
		c.fenced()
		// The name that takes leases over has served: were two engines of one name
		// alive, they would take it from one another for ever.
		c.owner = c.named + "/" + uuid.NewString()
		if time.Since(began) < leaseRetry {
			pause(ctx, leaseRetry)
		}
	}
}

// acquire waits for the lease.
func (c *candidate) acquire(ctx context.Context) (projection.Lease, error) {
	defer c.change(func() { c.standby = false })
	failures := 0
	began := time.Now()
	for told := false; ; {
		lease, err := c.tryAcquire(ctx)
		wait := leaseRetry - leaseRetry/10 + rand.N(leaseRetry/5)
		if waited := time.Since(began); c.group != nil && waited < handoverPatience {
			wait = min(handoverRetry, max(handoverFirst, waited)) // whoever has it gives it up, or is dead
		}
		switch {
		case err == nil:
			return lease, nil
		case ctx.Err() != nil:
			return projection.Lease{}, ctx.Err()
		case lasting(err):
			return projection.Lease{}, fmt.Errorf("%s: %w", c.name, err)
		case !errors.Is(err, projection.ErrLeaseHeld):
			c.logger.Warn("the lease could not be acquired; it is tried again", "worker", c.name, "error", err)
			wait = backoff(failures)
			failures++
		case !told:
			told = true
			c.logger.Info("waiting for the lease", "worker", c.name, "reason", err)
			// Another engine follows the log, and has found its place.
			c.openOnce.Do(func() { close(c.opened) })
			c.change(func() { c.standby = true })
		}
		if !pause(ctx, wait) {
			return projection.Lease{}, ctx.Err()
		}
	}
}

func (c *candidate) tryAcquire(ctx context.Context) (projection.Lease, error) {
	if err := c.release(context.WithoutCancel(ctx)); err != nil {
		return projection.Lease{}, err
	}
	lease, err := c.state.Acquire(ctx, c.name, c.owner, c.ttl)
	if err == nil {
		c.held = lease
	} else {
		c.doubt = !errors.Is(err, projection.ErrLeaseHeld)
	}
	return lease, err
}

// release gives up the lease that was held last: it may be this worker's still,
// also after it was fenced, for then the checkpoint alone may have moved on. One of
// which it is not known whether it was acquired is acquired first: nobody else
// could have it as long as this process lives.
func (c *candidate) release(ctx context.Context) error {
	if c.held.Epoch == 0 && c.doubt {
		lease, err := c.state.Acquire(ctx, c.name, c.owner, c.ttl)
		if err != nil && !errors.Is(err, projection.ErrLeaseHeld) {
			return err
		}
		c.held, c.doubt = lease, false
	}
	if c.held.Epoch == 0 {
		return nil
	}
	if err := c.state.Release(ctx, c.held); err != nil {
		return err
	}
	c.held = projection.Lease{}
	return nil
}

// A node whose turn it is tries to acquire the lease more often for a while, at
// first handoverFirst later.
const (
	handoverFirst    = 5 * time.Millisecond
	handoverRetry    = 50 * time.Millisecond
	handoverPatience = 30 * time.Second
)

// How often whoever stands by looks at the index, while somebody waits: more
// and more seldom.
const (
	lookAtFirst = 10 * time.Millisecond
	lookAtLast  = 500 * time.Millisecond
)

// WaitThrough implements worker.Worker. Standing by, it goes by the index that
// the owner stores; where that is a state of the owner's own, there is nothing
// to go by, and it does not wait.
func (c *candidate) WaitThrough(ctx context.Context, p eventstore.Position) error {
	for pace := lookAtFirst; ; {
		c.mu.Lock()
		w, standby, failure, changed := c.runner, c.standby, c.failure, c.changed
		c.mu.Unlock()
		switch {
		case failure != nil:
			return failure
		case w != nil:
			if err := w.WaitThrough(ctx, p); !errors.Is(err, projection.ErrFenced) {
				return err
			}
			pace = lookAtFirst
		case standby && c.apart:
			return nil
		case standby:
			done, err := c.settled(ctx, p)
			if done || ctx.Err() != nil || err != nil && lasting(err) {
				return err
			}
			soon, cancel := context.WithTimeout(ctx, pace)
			select {
			case <-changed:
			case <-soon.Done():
			}
			cancel()
			pace = min(2*pace, lookAtLast)
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// settled reports whether, as the owner has stored it, nothing is left to do
// that the events up to p cause.
func (c *candidate) settled(ctx context.Context, p eventstore.Position) (done bool, err error) {
	err = c.state.View(ctx, func(tx projection.StateTx) error {
		at, err := tx.Checkpoint(c.name)
		if err != nil || at.IsZero() || at.Position < p {
			return err
		}
		done, err = c.idle(tx, c.clock.Now())
		return err
	})
	return done && err == nil, err
}

// NextDue implements worker.Worker. Standing by, nothing is due here.
func (c *candidate) NextDue() (time.Time, bool) {
	if w := c.current(); w != nil {
		return w.NextDue()
	}
	return time.Time{}, false
}

// Fire implements worker.Worker.
func (c *candidate) Fire(ctx context.Context, now time.Time) error {
	if w := c.current(); w != nil {
		if err := w.Fire(ctx, now); !errors.Is(err, projection.ErrFenced) {
			return err
		}
	}
	return nil
}

// refresh stores the index if the process runs here.
func (c *candidate) refresh(ctx context.Context) error {
	w := c.current()
	if w == nil {
		return nil
	}
	err := w.refresh(ctx)
	if errors.Is(err, projection.ErrFenced) {
		w.fail(err) // and what is stored is what the new owner says
		return nil
	}
	return err
}

// backoff is the pause after so many failures of the database in a row.
func backoff(failures int) time.Duration {
	return min(10*time.Millisecond<<min(failures, 10), longestBackoff)
}

// longestBackoff bounds how late the end of an outage is noticed.
const longestBackoff = 3 * time.Second

// errIndex: the stored index is not what this program can read.
var errIndex = errors.New("the stored index does not decode")

// lasting reports whether trying again cannot help.
func lasting(err error) bool {
	if errors.Is(err, eventstore.ErrUnavailable) {
		return false
	}
	for _, target := range []error{
		eventstore.ErrClosed, eventstore.ErrInvalid, eventstore.ErrTooLarge, eventstore.ErrGap, eventstore.ErrUnknownType, eventstore.ErrDecode,
		eventstore.ErrNewerVersion, eventstore.ErrKeyReused, errors.ErrUnsupported, ErrUndecided, errNewerHistory, errIndex,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
