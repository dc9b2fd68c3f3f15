package deed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/internal/worker"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

var (
	// ErrStopped: the application was stopped.
	ErrStopped = errors.New("application is stopped")
	// ErrNotRegistered: the definition was not given to [Start] or [New].
	ErrNotRegistered = errors.New("not registered")
)

// App is a running application. Its methods may be called concurrently.
type App struct {
	store       eventstore.Store
	closer      io.Closer
	clock       clock.Clock
	manual      *clock.Manual
	runtime     *aggregate.Runtime
	commands    *command.Bus
	projections *projection.Engine
	sagas       *saga.Engine
	workers     []worker.Worker
	definitions map[any]bool

	advance chan struct{} // held by AdvanceTo, one at a time

	stopping atomic.Bool

	mu      sync.Mutex
	started bool
	cancel  context.CancelCauseFunc
	running map[string]bool
	failed  []error
	idle    chan struct{} // closed when the last worker has ended
	stopped chan struct{} // closed when Stop has finished
	stopErr error
}

// Start opens the source, checks and wires the parts, and runs the background
// work until [App.Stop]. ctx governs the start only.
//
// The parts are aggregate definitions, projections, sagas, reactions, and the
// options of this package. Mistakes in them are returned joined, and then
// nothing was written or left open.
func Start(ctx context.Context, source eventstore.Opener, parts ...Part) (*App, error) {
	app, err := New(ctx, source, parts...)
	if err != nil {
		return nil, err
	}
	if err := app.start(ctx); err != nil {
		return nil, err
	}
	return app, nil
}

// New is Start without running the background work: for programs that call
// [App.Run], or that only execute commands.
func New(ctx context.Context, source eventstore.Opener, parts ...Part) (*App, error) {
	c, err := configure(parts)
	if err != nil {
		return nil, err
	}
	if source == nil {
		return nil, fmt.Errorf("%w: the source of events is nil: give deed.Start a store, for example sqlite.File(\"app.db\")", eventstore.ErrInvalid)
	}
	store, err := source.Open(ctx)
	if err != nil {
		return nil, err
	}
	app := &App{
		store:       store,
		clock:       c.clock,
		manual:      c.manual,
		definitions: map[any]bool{},
		advance:     make(chan struct{}, 1),
		running:     map[string]bool{},
		idle:        make(chan struct{}),
		stopped:     make(chan struct{}),
	}
	app.closer, _ = store.(io.Closer)
	if err := app.wire(c); err != nil {
		if app.projections != nil {
			app.projections.Close()
		}
		return nil, errors.Join(err, app.close())
	}
	return app, nil
}

func (a *App) wire(c *configuration) error {
	state := c.state
	if state == nil {
		state, _ = eventstore.Find[projection.State](a.store)
	}
	if state == nil && len(c.projections)+len(c.processes) > 0 {
		return fmt.Errorf("%w: %T keeps no state for projections and sagas: name a database for it with deed.State", errors.ErrUnsupported, a.store)
	}
	var snapshots aggregate.SnapshotStore
	if state != nil {
		snapshots = snapshotTable{state}
	}
	a.runtime = aggregate.NewRuntime(a.store, aggregate.Options{
		Encoding: c.encoding, Clock: c.clock, Snapshots: snapshots,
		CachedAggregates: c.cachedAggregates, Logger: c.logger,
	})
	a.commands = command.NewBus(a.runtime, command.Options{Middleware: c.middleware})
	for _, d := range c.aggregates {
		a.definitions[d] = true
	}
	owner := uuid.NewString()
	var mistakes []error
	apart, err := leases(c, a.store, state)
	if err != nil {
		return err
	}
	group, err := members(c, a.store, state, apart, owner)
	if err != nil {
		return err
	}
	shared := group
	if apart != nil {
		shared = nil // every process has read models of its own
	}
	a.projections = projection.NewEngine(a.store, state, projection.Options{
		Encoding: c.encoding, Clock: c.clock, Logger: c.logger, Owner: owner, Group: shared,
	})
	for _, p := range c.projections {
		mistakes = append(mistakes, a.projections.Add(p))
	}
	a.sagas = saga.NewEngine(a.store, state, a.commands, saga.Options{
		Encoding: c.encoding, Clock: c.clock, Logger: c.logger, Owner: owner, Group: group, Leases: apart,
	})
	for _, p := range c.processes {
		mistakes = append(mistakes, a.sagas.Add(p))
	}
	a.workers = append(a.projections.Workers(), a.sagas.Workers()...)
	if group != nil && len(a.workers) > 0 {
		a.workers = append(a.workers, membership{group: group, logger: c.logger})
	}
	return errors.Join(mistakes...)
}

// start runs the workers and returns when each has found its place in the log,
// or after the application was stopped because one could not.
func (a *App) start(ctx context.Context) error {
	if err := a.launch(); err != nil {
		return err
	}
	for _, w := range a.workers {
		if err := w.Ready(ctx); err != nil {
			if failure := a.Stop(context.WithoutCancel(ctx)); failure != nil {
				return failure
			}
			return err
		}
	}
	return nil
}

// launch runs the workers, each in its own goroutine.
func (a *App) launch() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stopping.Load() {
		return ErrStopped
	}
	if a.started {
		return fmt.Errorf("%w: the application is running already", eventstore.ErrInvalid)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	a.started, a.cancel = true, cancel
	var group sync.WaitGroup
	for _, w := range a.workers {
		if o, ok := w.(worker.Offerer); ok {
			o.Offer()
		}
	}
	for _, w := range a.workers {
		a.running[w.Name()] = true
		group.Go(func() {
			err := w.Run(ctx)
			a.mu.Lock()
			defer a.mu.Unlock()
			delete(a.running, w.Name())
			if err != nil {
				a.failed = append(a.failed, err)
			}
		})
	}
	go func() {
		group.Wait()
		close(a.idle)
	}()
	return nil
}

// Run runs the background work of an App made by [New] until ctx ends, and
// then stops it, giving what is in flight the grace period to finish. It
// returns what Stop does.
func (a *App) Run(ctx context.Context, grace time.Duration) error {
	if err := a.start(ctx); err != nil {
		return err
	}
	<-ctx.Done()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	return a.Stop(stop)
}

// Stop refuses new commands, waits for those in flight, stops the background
// work and closes the store, unless it was given as [eventstore.Opened]. When
// ctx ends first the rest is abandoned, which loses nothing: it is done again
// after the next start; the error is then a [*StopError] that names it. Work
// that had failed for good before is returned too. Stopping again waits for
// the first Stop and returns its result.
func (a *App) Stop(ctx context.Context) error {
	a.mu.Lock() // not while the workers are being launched
	first := a.stopping.CompareAndSwap(false, true)
	a.mu.Unlock()
	if !first {
		select {
		case <-a.stopped:
			return a.stopErr
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	a.stopErr = a.stop(ctx)
	close(a.stopped)
	return a.stopErr
}

func (a *App) stop(ctx context.Context) error {
	var errs []error
	var unfinished []string
	// Background work stops first: sagas execute commands, and must be able to
	// finish those they have begun.
	if a.cancel != nil {
		a.cancel(ErrStopped)
		select {
		case <-a.idle:
		case <-ctx.Done():
		}
	}
	if err := a.runtime.Stop(ctx); err != nil {
		if ctx.Err() != nil {
			unfinished = append(unfinished, "commands in flight")
		}
		errs = append(errs, err)
	}
	a.projections.Close()
	a.mu.Lock()
	for name := range a.running {
		unfinished = append(unfinished, name)
	}
	errs = append(errs, a.failed...)
	a.mu.Unlock()
	closed := make(chan error, 1)
	go func() { closed <- a.close() }()
	select {
	case err := <-closed:
		errs = append(errs, err)
	case <-afterwards(ctx, closeGrace):
		unfinished = append(unfinished, "closing the store")
	}
	if len(unfinished) > 0 {
		sort.Strings(unfinished)
		errs = append(errs, &StopError{Unfinished: unfinished, Cause: context.Cause(ctx)})
	}
	return errors.Join(errs...)
}

// closeGrace is how long Stop waits for the store to close when its time is
// over; a handler that does not return can keep it from closing.
const closeGrace = time.Second

// afterwards returns a channel that is closed when d has passed after ctx's end.
func afterwards(ctx context.Context, d time.Duration) <-chan struct{} {
	late := make(chan struct{})
	context.AfterFunc(ctx, func() { time.AfterFunc(d, func() { close(late) }) })
	return late
}

func (a *App) close() error {
	if a.closer == nil {
		return nil
	}
	return a.closer.Close()
}

// StopError says what was abandoned because [App.Stop] ran out of time. None
// of it is lost: it continues after the next start.
type StopError struct {
	Unfinished []string
	Cause      error
}

// Error lists what was abandoned.
func (e *StopError) Error() string {
	return fmt.Sprintf("stopped before these had finished: %s: %v", strings.Join(e.Unfinished, ", "), e.Cause)
}

// Unwrap returns the cause, ctx's error.
func (e *StopError) Unwrap() error { return e.Cause }

// Execute decides and appends: it loads the aggregate (or takes it from the
// cache), lets the command decide, and returns when the events are durable. On
// a conflict it decides again. A rejection by the command is recognised by
// command.IsRejection.
//
// Definition and command must agree on the state type, or the program does not
// compile.
func Execute[S any, C command.Command[S]](ctx context.Context, app *App, definition *aggregate.Definition[S], c C, options ...command.Option) (eventstore.Receipt, error) {
	if err := app.knows(definition, definition.Category()); err != nil {
		return eventstore.Receipt{}, err
	}
	return command.Execute(ctx, app.commands, definition, c, options...)
}

// Load folds the durable events of one aggregate. Queries usually read a
// projection instead.
func Load[S any](ctx context.Context, app *App, definition *aggregate.Definition[S], id string) (S, eventstore.Revision, error) {
	if err := app.knows(definition, definition.Category()); err != nil {
		var none S
		return none, eventstore.Revision{}, err
	}
	return aggregate.Load(ctx, app.runtime, definition, id)
}

func (a *App) knows(definition any, category string) error {
	if a.stopping.Load() {
		return fmt.Errorf("aggregate %q: %w", category, ErrStopped)
	}
	if !a.definitions[definition] {
		return fmt.Errorf("aggregate %q: %w: pass its definition to deed.Start", category, ErrNotRegistered)
	}
	return nil
}

// Store returns the store that the application runs on.
func (a *App) Store() eventstore.Store { return a.store }

// Commands returns the command bus.
func (a *App) Commands() *command.Bus { return a.commands }

// Projections returns the engine of the read models; it makes App a query.Host.
func (a *App) Projections() *projection.Engine { return a.projections }

// Sagas returns the saga engine; it makes App a saga.Host.
func (a *App) Sagas() *saga.Engine { return a.sagas }

// Now returns the time by the application's clock.
func (a *App) Now() time.Time { return a.clock.Now() }

// Settle returns when the background work has done everything that the log,
// as it is, asks for: every projection has caught up and no saga can run. Work
// that waits for a later time does not count, nor do sagas that are blocked and
// events that were set aside: Sagas().List and Projections().Status show them.
// Work that another process does is waited for too, by what that one stores of
// its progress, about every second; with [Leases] it is not, since that is stored
// where only the other one sees it. It fails if a projection, saga or reaction has
// stopped for good. While others keep appending, it keeps waiting.
func (a *App) Settle(ctx context.Context) error {
	a.mu.Lock()
	running := a.started && !a.stopping.Load()
	a.mu.Unlock()
	if !running {
		return fmt.Errorf("%w: the background work is not running: use deed.Start, or Run", ErrStopped)
	}
	for {
		head, err := a.store.Head(ctx)
		if err != nil {
			return err
		}
		for _, w := range a.workers {
			if err := w.WaitThrough(ctx, head); err != nil {
				return err
			}
		}
		now, err := a.store.Head(ctx)
		if err != nil {
			return err
		}
		if now == head {
			return nil
		}
	}
}

// AdvanceTo moves the application's manual clock to t. Everything due on the
// way happens in order: the application settles, then, for each due instant up
// to t, the clock is set to it, what is due fires, and the application settles
// again; at the end the clock is at t. It needs [ManualClock], and one caller
// at a time moves the clock; the others wait.
func (a *App) AdvanceTo(ctx context.Context, t time.Time) error {
	if a.manual == nil {
		return fmt.Errorf("%w: advance to %s: the application runs on the system clock: pass deed.ManualClock to deed.Start", errors.ErrUnsupported, t.Format(time.RFC3339))
	}
	select {
	case a.advance <- struct{}{}:
		defer func() { <-a.advance }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if now := a.manual.Now(); t.Before(now) {
		return fmt.Errorf("%w: advance to %s: the clock is already at %s", eventstore.ErrInvalid, t.Format(time.RFC3339Nano), now.Format(time.RFC3339Nano))
	}
	for {
		if err := a.Settle(ctx); err != nil {
			return fmt.Errorf("advance to %s: %w", t.Format(time.RFC3339), err)
		}
		due, any := a.nextDue()
		if !any || due.After(t) {
			a.manual.Set(t)
			return nil
		}
		a.manual.Set(due)
		for _, w := range a.workers {
			if err := w.Fire(ctx, a.manual.Now()); err != nil {
				return fmt.Errorf("advance to %s: %w", t.Format(time.RFC3339), err)
			}
		}
	}
}

func (a *App) nextDue() (time.Time, bool) {
	var first time.Time
	found := false
	for _, w := range a.workers {
		if due, ok := w.NextDue(); ok && (!found || due.Before(first)) {
			first, found = due, true
		}
	}
	return first, found
}
