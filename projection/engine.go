package projection

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/internal/logreader"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/internal/worker"
)

var (
	// ErrNotRegistered: the engine was not given the projection.
	ErrNotRegistered = errors.New("projection is not registered")
	// ErrStopped: the projection does not run, so it cannot get anywhere.
	ErrStopped = errors.New("projection has stopped")
	// ErrWrongLog: the checkpoint belongs to another log, or to a longer one, as
	// after the database was replaced or restored.
	ErrWrongLog = errors.New("checkpoint does not fit the log")
)

// Options tune an [Engine]. The zero value is a good choice.
type Options struct {
	// Encoding decodes events. Defaults to JSON.
	Encoding *eventstore.Encoding
	// Clock times retries and lag. Defaults to the system's.
	Clock clock.Clock
	// Logger hears of retries, dead letters and stops. Defaults to slog.Default().
	Logger *slog.Logger
	// Owner names this engine in leases. Defaults to a random name. An engine with
	// the name of an earlier one takes its leases over, once: who was fenced waits
	// its turn like any other.
	Owner string

	// Group says which of the projections, and of their partitions, this engine is to
	// run, of those that several engines on one state could: work is spread over them,
	// and moves when they come and go. Without one, whoever acquires a lease first
	// keeps it.
	Group *ownership.Group

	// BatchEvents is how many events a view folds at most before it writes its
	// rows, and BatchTime about how long its handlers may take; live, it writes as soon
	// as there are no more. Default to 4096 and 250 ms.
	BatchEvents int
	BatchTime   time.Duration
	// SQLEvents and SQLTime bound one transaction of an SQL projection, for which
	// appends may have to wait: it ends with the event that reaches either. Default
	// to 256 and 10 ms.
	SQLEvents int
	SQLTime   time.Duration
	// CheckpointEvery is after how many positions without an event for the
	// projection its checkpoint is written nevertheless; a restart reads at most
	// that many again. Defaults to 4096.
	CheckpointEvery int
	// CacheBytes bounds, roughly, what each view keeps of decoded rows, measured by
	// their stored size. Defaults to 32 MiB.
	CacheBytes int

	// Attempts is how often an event is tried before it goes to the dead letters.
	// Defaults to 5.
	Attempts int
	// RetryAfter is the pause after the first failure; it doubles with each further
	// one, up to RetryAtMost. Each is shorter by up to a tenth, at random. Default to
	// 100 ms and 30 s. See [Permanent] for errors that are not tried again.
	RetryAfter  time.Duration
	RetryAtMost time.Duration

	// TracerProvider makes a span for each batch of new events; catching up and
	// rebuilding make none. MeterProvider counts events, retries and dead letters
	// and shows the lag. Default to those set with OpenTelemetry's package otel.
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
}

func (o Options) withDefaults() Options {
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	o.Owner = cmp.Or(o.Owner, uuid.NewString())
	o.BatchEvents = positiveOr(o.BatchEvents, 4096)
	o.BatchTime = positiveOr(o.BatchTime, 250*time.Millisecond)
	o.SQLEvents = positiveOr(o.SQLEvents, 256)
	o.SQLTime = positiveOr(o.SQLTime, 10*time.Millisecond)
	o.CheckpointEvery = positiveOr(o.CheckpointEvery, 4096)
	o.CacheBytes = positiveOr(o.CacheBytes, 32<<20)
	o.Attempts = positiveOr(o.Attempts, 5)
	o.RetryAfter = positiveOr(o.RetryAfter, 100*time.Millisecond)
	o.RetryAtMost = positiveOr(o.RetryAtMost, 30*time.Second)
	if o.TracerProvider == nil {
		o.TracerProvider = otel.GetTracerProvider()
	}
	if o.MeterProvider == nil {
		o.MeterProvider = otel.GetMeterProvider()
	}
	return o
}

func positiveOr[T int | time.Duration](value, fallback T) T {
	if value > 0 {
		return value
	}
	return fallback
}

// Engine keeps projections up to date with a log. All methods may be called
// concurrently.
//
// It starts nothing by itself: an application runs the [Engine.Workers].
type Engine struct {
	store     eventstore.Store
	reader    *logreader.Reader
	state     State
	options   Options
	telemetry *telemetry
	noteAfter time.Duration

	mu      sync.Mutex
	entries []*entry
	inline  *inlines // nil: no projection is
}

// A checkpoint that lags behind what a projection has passed is written after a
// while: soon where other processes wait for it.
const (
	noteAfter       = time.Second
	noteAfterShared = 50 * time.Millisecond
)

// NewEngine returns an engine without projections.
func NewEngine(store eventstore.Store, state State, o Options) *Engine {
	e := &Engine{store: store, reader: logreader.New(store, logreader.Options{}), state: state, options: o.withDefaults(), noteAfter: noteAfter}
	if Shared(state) {
		e.noteAfter = noteAfterShared
	}
	e.telemetry = newTelemetry(&e.options)
	return e
}

// Add registers a projection. It refuses definitions with mistakes, names that
// are taken, and, with an error wrapping errors.ErrUnsupported, inline projections
// where the engine's store is no [Inliner] or keeps its rows elsewhere.
func (e *Engine) Add(p Projection) error {
	if err := p.Err(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if i := e.index(p.Name()); i >= 0 {
		return fmt.Errorf("%w: two projections are named %q", eventstore.ErrInvalid, p.Name())
	}
	en := &entry{projection: p}
	for _, part := range partitions(p.partitions()) {
		en.runners = append(en.runners, newRunner(e, p, part))
	}
	if p.inline() {
		if err := e.addInline(en.runners[0]); err != nil {
			return err
		}
	}
	e.entries = append(e.entries, en)
	return nil
}

func (e *Engine) index(name string) int {
	return slices.IndexFunc(e.entries, func(en *entry) bool { return en.projection.Name() == name })
}

func (e *Engine) entry(name string) (*entry, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if i := e.index(name); i >= 0 {
		return e.entries[i], nil
	}
	known := make([]string, len(e.entries))
	for i, en := range e.entries {
		known[i] = en.projection.Name()
	}
	return nil, fmt.Errorf("%w: %q (registered are %q): give it to the application when it starts", ErrNotRegistered, name, known)
}

// Check returns nil if p itself is registered, and otherwise an error that
// says so.
func (e *Engine) Check(p Projection) error {
	en, err := e.entry(p.Name())
	if err != nil {
		return err
	}
	if en.projection != p {
		return fmt.Errorf("%w: %q: another definition of that name is registered", ErrNotRegistered, p.Name())
	}
	return nil
}

// Workers returns a worker for each projection, or for each of its partitions,
// in the order of Add.
func (e *Engine) Workers() []worker.Worker {
	var workers []worker.Worker
	for _, r := range e.runners() {
		workers = append(workers, r)
	}
	return workers
}

func (e *Engine) runners() []*runner {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []*runner
	for _, en := range e.entries {
		all = append(all, en.runners...)
	}
	return all
}

// State returns where the rows are.
func (e *Engine) State() State { return e.state }

// WaitFor returns when the projection's rows contain everything up to p, also
// when it is another process that runs the projection. The error is ctx's when
// that ends first, one wrapping [ErrStopped] when the projection has stopped, or
// [ErrNotRegistered]. The rows of a later version are those that its definition
// reads: while it is built, those of the version that is active.
func (e *Engine) WaitFor(ctx context.Context, name string, p eventstore.Position) error {
	en, err := e.entry(name)
	if err != nil {
		return err
	}
	if en.switched() {
		return en.waitRead(ctx, e, p)
	}
	return en.wait(ctx, p)
}

// Contains reports whether the projection's rows, as the transaction sees them,
// contain everything up to p. They may not although [Engine.WaitFor] has
// returned: when the projection was rebuilt since, or another version of it is
// read.
func (e *Engine) Contains(tx StateTx, name string, p eventstore.Position) (bool, error) {
	en, err := e.entry(name)
	if err != nil {
		return false, err
	}
	if en.switched() {
		there, _, err := en.containsRead(tx, e, en.projection.origin(), p)
		return there, err
	}
	there, err := en.contains(tx, p)
	if u := en.runners[0].inline; u != nil && there {
		u.passed.CompareAndSwap(uint64(p), 0) // it need not be asked for again
	}
	return there, err
}

// Reached returns the position up to which the projection's rows are the fold
// of the log, as far as this engine has brought them or, standing by, has last
// seen them; 0 before it runs.
func (e *Engine) Reached(name string) (eventstore.Position, error) {
	en, err := e.entry(name)
	if err != nil {
		return 0, err
	}
	if en.switched() {
		return en.reachedRead(e), nil
	}
	return en.reached(), nil
}

// Phase says what a projection is doing.
type Phase string

// The phases of a projection.
const (
	// PhaseStopped: it does not run; [Status.Err] says why if it was not told to.
	PhaseStopped Phase = "stopped"
	// PhaseCatchingUp: it works through stored events.
	PhaseCatchingUp Phase = "catching up"
	// PhaseLive: it has seen the head of the log and follows it.
	PhaseLive Phase = "live"
	// PhaseRetrying: something failed and is tried again at [Status.RetryAt].
	PhaseRetrying Phase = "retrying"
	// PhasePaused: it was told to stand still, see [Engine.Pause].
	PhasePaused Phase = "paused"
	// PhaseStandby: another engine, perhaps in another process, has the lease and
	// runs it; this one takes over when that stops.
	PhaseStandby Phase = "standby"
)

// Status is how a projection, or one of its partitions, is doing.
type Status struct {
	// Name is the projection's; that of a partition has its number behind it, as in
	// "orders/3of8".
	Name  string
	Phase Phase
	// Position is how far the projection has come, Head how far the log has.
	Position, Head eventstore.Position
	// LagEvents is Head - Position. On logs with contiguous positions that is the
	// number of events not yet considered, also those the projection will skip.
	LagEvents uint64
	// Lag is the age, by the engine's clock, of the oldest event not yet
	// considered: how stale the rows can be. 0 when there is none.
	Lag time.Duration
	// Err is the last error, also when it has been overcome, and ErrAt its time. It
	// wraps [ErrFenced] when that was losing the lease to another owner.
	Err   error
	ErrAt time.Time
	// RetryAt is when what failed is tried again.
	RetryAt time.Time
	// DeadLetters is the number of events set aside.
	DeadLetters int
	// Inline says that appends apply it: it is an inline projection, and has caught up.
	Inline bool
	// Version is the projection's, and Active says that it is the one that is read.
	Version int
	Active  bool
	// Rate is how many positions a second it passes, smoothed, and Left how long it
	// takes to the head at that rate, while it catches up here; 0 otherwise.
	Rate float64
	Left time.Duration
}

// Status returns how every projection, or each of its partitions, is doing, in
// the order of Add.
func (e *Engine) Status(ctx context.Context) ([]Status, error) {
	runners := e.runners()
	head, err := e.store.Head(ctx)
	if err != nil {
		return nil, err
	}
	all := make([]Status, len(runners))
	for i, r := range runners {
		if all[i], err = r.status(ctx, head); err != nil {
			return nil, fmt.Errorf("status of projection %q: %w", r.unit, err)
		}
	}
	return all, nil
}

func (r *runner) status(ctx context.Context, head eventstore.Position) (Status, error) {
	s, started := r.progress.status()
	s.Name, s.Version, s.Rate = r.unit, r.projection.origin().version, r.progress.speed()
	err := r.engine.state.View(ctx, func(tx StateTx) error {
		s.DeadLetters = 0
		if !started || s.Phase == PhaseStandby || r.inline != nil {
			c, err := tx.Checkpoint(r.leaseName())
			if err != nil {
				return err
			}
			s.Position = c.Position
			mark, marked, err := getJSON[inlineMark](tx, tallies, inlineKey(r.unit))
			if err != nil {
				return err
			}
			// Who owns it knows; others go by what is stored.
			known := s.Inline || s.Phase == PhaseStandby || s.Phase == PhaseStopped
			s.Inline = known && marked && mark.Epoch == c.Epoch && c.Position >= head
		}
		for _, err := range tx.Scan(r.deadTable(), Range{}) {
			if err != nil {
				return err
			}
			s.DeadLetters++
		}
		read, err := readStack(tx, r.projection.origin().base)
		s.Active = read.top() == s.Version
		return err
	})
	if err != nil {
		return s, err
	}
	s.Head = max(head, s.Position)
	s.LagEvents = uint64(s.Head - s.Position)
	s.Left = timeLeft(s.LagEvents, s.Rate)
	if s.LagEvents > 0 {
		for oldest, err := range r.engine.store.Read(ctx, eventstore.All(), eventstore.ReadOptions{After: s.Position, Limit: 1}) {
			if err != nil {
				return s, err
			}
			s.Lag = max(0, r.engine.options.Clock.Now().Sub(oldest.Time))
		}
	}
	return s, nil
}

// WaitIdle returns when every projection has considered the whole log, and the
// log has not grown meanwhile: for tests. It waits also for what is retried and for
// those that are paused; end ctx to give up.
func (e *Engine) WaitIdle(ctx context.Context) error {
	for {
		head, err := e.store.Head(ctx)
		if err != nil {
			return err
		}
		for _, r := range e.runners() {
			if err := r.progress.wait(ctx, head, false); err != nil {
				return err
			}
		}
		now, err := e.store.Head(ctx)
		if err != nil || now == head {
			return err
		}
	}
}

// Rebuild empties the projection and folds the log again from its beginning.
// It returns when the projection has come as far as the log was long when
// Rebuild was called; if ctx ends before, the rebuild goes on. Until then,
// queries see the rows made so far, and those that ask for a position wait. Another
// [ViewDefinition.Version] is built without that.
//
// Dead letters and skipped events are dropped: they get their turn again.
//
// A projection that does not run is only emptied; it fills when it runs. One
// that another process runs is rebuilt by that one; where it cannot be asked,
// because the state is not [Shared], the error wraps [ErrLeaseHeld]. An SQL
// projection in partitions can only be rebuilt by a process that runs all of them,
// or while nobody does.
func (e *Engine) Rebuild(ctx context.Context, name string) error {
	en, err := e.entry(name)
	if err != nil {
		return err
	}
	head, err := e.store.Head(ctx)
	if err != nil {
		return err
	}
	if err := en.rebuild(ctx, head); err != nil {
		return fmt.Errorf("rebuild projection %q: %w", name, err)
	}
	return nil
}

func (r *runner) rebuild(ctx context.Context, head eventstore.Position) error {
	_, here, running, err := r.askOwner(ctx, order{Action: actionRebuild}, r.clear, true)
	switch {
	case err != nil || !running:
		return err
	case here:
		return r.progress.wait(ctx, head, false)
	}
	return r.awaitRebuilt(ctx, head)
}

// awaitRebuilt waits for the rows that another process has emptied. What was
// known of them is forgotten, and what was seen before is seen again.
func (r *runner) awaitRebuilt(ctx context.Context, head eventstore.Position) error {
	r.progress.forgetSeen()
	for {
		if err := r.progress.wait(ctx, head, false); err != nil {
			return err
		}
		contains := false
		if err := r.engine.state.View(ctx, func(tx StateTx) error {
			c, err := tx.Checkpoint(r.leaseName())
			contains = r.progress.contains(c.Position, head)
			return err
		}); err != nil || contains {
			return err
		}
		r.progress.forgetSeen()
		if err := sleep(ctx, lookAtFirst); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
