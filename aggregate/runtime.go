package aggregate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/clock"
)

// ErrStopped: the runtime was stopped; nothing was written.
var ErrStopped = errors.New("the aggregate runtime is stopped")

// Options of a [Runtime]. The zero value is ready to use.
type Options struct {
	// Encoding says how events are stored. Defaults to JSON.
	Encoding *eventstore.Encoding
	// Clock gives events their time. Defaults to the system's.
	Clock clock.Clock
	// Snapshots keeps the snapshots of definitions with SnapshotEvery. Defaults to
	// none: every load replays all events.
	Snapshots SnapshotStore
	// CachedAggregates is how many idle aggregates keep their state in memory.
	// Defaults to 65,536; a negative number keeps none.
	CachedAggregates int
	// PipelineDepth is how many commits of one aggregate may be on their way at
	// once. Defaults to 256; 1 waits for each commit before deciding the next. Stores
	// that cannot take commits in order without waiting have 1. After a conflict
	// with another writer it begins at 1 again and doubles with each success.
	PipelineDepth int
	// Attempts is how often a command is decided at most when other writers keep
	// getting in between. Defaults to 10.
	Attempts int
	// Logger hears of what is not an error to any caller: snapshots that could not
	// be kept or used, outcomes that had to be looked up. Defaults to slog.Default().
	Logger *slog.Logger
	// MeterProvider counts conflicts, repeated decisions, unknown outcomes, and
	// snapshots that were due and could not be taken.
	// Defaults to OpenTelemetry's global one, which by default counts nothing.
	MeterProvider metric.MeterProvider
}

func (o Options) withDefaults() Options {
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	if o.CachedAggregates == 0 {
		o.CachedAggregates = 65536
	}
	if o.PipelineDepth <= 0 {
		o.PipelineDepth = 256
	}
	if o.Attempts <= 0 {
		o.Attempts = 10
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.MeterProvider == nil {
		o.MeterProvider = otel.GetMeterProvider()
	}
	return o
}

// Runtime runs aggregates on a store. Its methods, and the functions that take
// it, may be called concurrently.
//
// Each aggregate that is asked for is activated: its state is loaded once and
// kept, its calls are decided one at a time in the order in which they came,
// and idle ones are forgotten when there are too many. Nothing depends on the
// aggregate being active in one place only: the conditional append decides.
type Runtime struct {
	store        eventstore.Store
	enqueuer     eventstore.Enqueuer // nil if the store has not that power
	options      Options
	fingerprints sync.Map // *Definition[S] -> string
	conflicts    metric.Int64Counter
	repeats      metric.Int64Counter
	unknowns     metric.Int64Counter
	unfit        metric.Int64Counter
	unfitTold    sync.Map // *Definition[S] -> true

	// life ends when Stop gives up waiting.
	life    context.Context
	abandon context.CancelCauseFunc

	mu        sync.Mutex
	stopping  bool
	drained   chan struct{} // closed when stopping and nothing is busy
	residents *residents
	spares    []chan func() // goroutines that wait for the next activation
	snapshots snapshotQueue
}

// address says which activation: two definitions of one category are two.
type address struct {
	definition any
	id         string
}

// active is an activation[S] of any S.
type active interface {
	name() string
}

// NewRuntime returns a runtime on the store. It starts nothing: goroutines
// exist only while there are calls.
func NewRuntime(store eventstore.Store, o Options) *Runtime {
	r := &Runtime{store: store, options: o.withDefaults(), drained: make(chan struct{})}
	r.life, r.abandon = context.WithCancelCause(context.Background())
	if r.enqueuer, _ = eventstore.Find[eventstore.Enqueuer](store); r.enqueuer == nil {
		r.options.PipelineDepth = 1
	}
	r.residents = newResidents(r.options.CachedAggregates)
	meter := r.options.MeterProvider.Meter("github.com/deed-go/deed/aggregate")
	// A counter that cannot be made counts nothing; the API still returns one.
	r.conflicts, _ = meter.Int64Counter("deed.aggregate.conflicts", metric.WithDescription("commits that lost to another writer"))
	r.repeats, _ = meter.Int64Counter("deed.aggregate.repeats", metric.WithDescription("decisions made again"))
	r.unknowns, _ = meter.Int64Counter("deed.aggregate.unknown_outcomes", metric.WithDescription("commits whose outcome had to be looked up"))
	r.unfit, _ = meter.Int64Counter("deed.aggregate.unfit_snapshots", metric.WithDescription("snapshots that were not taken because the state does not come back from JSON as it was"))
	return r
}

func (r *Runtime) count(c metric.Int64Counter, n int, category string) {
	if n > 0 {
		c.Add(context.Background(), int64(n), metric.WithAttributes(attribute.String("deed.category", category)))
	}
}

// Store returns the store that the runtime writes to.
func (r *Runtime) Store() eventstore.Store { return r.store }

// Encoding returns how the runtime's events are stored.
func (r *Runtime) Encoding() *eventstore.Encoding { return r.options.Encoding }

// Stop refuses new calls with [ErrStopped] and waits until those under way are
// answered and their snapshots are kept. When ctx ends first, the remaining
// callers get ErrStopped, or [eventstore.ErrOutcomeUnknown] if their commit is on
// its way, and the error names the aggregates that were busy. Stopping again
// waits again.
func (r *Runtime) Stop(ctx context.Context) error {
	r.mu.Lock()
	if !r.stopping {
		r.stopping = true
		r.closeIfDrained()
	}
	r.mu.Unlock()
	select {
	case <-r.drained:
	case <-ctx.Done():
	}
	select {
	case <-r.drained:
		r.abandon(ErrStopped)
		return nil
	default:
	}
	r.mu.Lock()
	var names []string
	for _, a := range r.residents.at {
		if a.busy {
			names = append(names, fmt.Sprintf("%q", a.active.name()))
		}
	}
	r.abandon(ErrStopped)
	r.dismiss()
	r.mu.Unlock()
	slices.Sort(names)
	if len(names) == 0 {
		return fmt.Errorf("stop the aggregate runtime: snapshots were still being kept, and were abandoned: %w", ctx.Err())
	}
	most := names[:min(len(names), 5)]
	return fmt.Errorf("stop the aggregate runtime: %d aggregates were still busy (%s) and were abandoned: %w", len(names), strings.Join(most, ", "), ctx.Err())
}

// closeIfDrained needs the lock.
func (r *Runtime) closeIfDrained() {
	if r.stopping && r.residents.busy == 0 && !r.snapshots.running {
		select {
		case <-r.drained:
		default:
			close(r.drained)
		}
	}
}

// submit queues the call at its activation, which is made and started if need
// be. Instead of starting one that is loaded and at rest, it returns it: the
// caller is to lead it. Where the store's appends cannot be handed over, the
// caller could not leave while one is under way, so it does not.
func submit[S any](r *Runtime, def *Definition[S], c *call[S]) (rested *activation[S], err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping {
		return nil, ErrStopped
	}
	at := address{def, c.req.ID}
	var a *activation[S]
	known := r.residents.at[at]
	if known != nil {
		a = known.active.(*activation[S])
	} else {
		a = &activation[S]{runtime: r, def: def, stream: def.Stream(c.req.ID), depth: r.options.PipelineDepth, wake: make(chan struct{}, 1)}
		a.place.active, a.place.address = a, at
	}
	if !a.place.busy {
		if known != nil {
			r.residents.wake(known)
		} else {
			r.residents.enter(&a.place)
		}
		if a.loaded && c.req.Boundary == nil && r.enqueuer != nil {
			rested = a
		} else {
			r.start(a.run)
		}
	}
	c.number = a.calls.Add(1)
	a.queue = append(a.queue, c)
	if rested == nil {
		c.done = make(chan outcome, 1)
		select {
		case a.wake <- struct{}{}:
		default:
		}
	}
	return rested, nil
}

// mostSpares bounds the goroutines that wait for the next activation.
const mostSpares = 128

// start runs an activation in a goroutine: in one whose last activation has
// come to rest if there is any, since its stack has grown to what they need.
// Such spares exist only while other activations are busy. It needs the lock.
func (r *Runtime) start(run func()) {
	if n := len(r.spares); n > 0 {
		r.spares[n-1] <- run
		r.spares = r.spares[:n-1]
		return
	}
	go func() {
		next := make(chan func(), 1)
		for run != nil {
			run()
			r.mu.Lock()
			if r.residents.busy == 0 || len(r.spares) >= mostSpares || r.life.Err() != nil {
				r.mu.Unlock()
				return
			}
			r.spares = append(r.spares, next)
			r.mu.Unlock()
			run = <-next
		}
	}()
}

// dismiss ends the spares. It needs the lock.
func (r *Runtime) dismiss() {
	for _, next := range r.spares {
		close(next)
	}
	r.spares = nil
}

// rest ends the busy time of an activation, unless there are new calls.
func (a *activation[S]) rest() bool {
	r := a.runtime
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(a.queue) > 0 {
		return false
	}
	if a.loaded && !r.stopping {
		r.residents.rest(&a.place)
	} else {
		r.residents.leave(&a.place)
	}
	if r.residents.busy == 0 {
		r.dismiss()
	}
	a.queue, a.todo, a.entries, a.keys = small(a.queue), small(a.todo), small(a.entries), nil
	select {
	case <-a.wake:
	default:
	}
	r.closeIfDrained()
	return true
}

// small lets an idle activation keep the memory of a line that is empty for the
// next call, but not that of a crowd.
func small[T any](line []T) []T {
	if cap(line) > 4 {
		return nil
	}
	return line[:0]
}

// Request is one decision about one aggregate.
type Request[S any] struct {
	// ID says which aggregate of the definition's category.
	ID string
	// Key makes the request idempotent: asked again with the same key, nothing is
	// decided; the first receipt comes back, with Duplicate set. Refusals, and
	// decisions after which nothing happened, use up no key. Empty means no key.
	Key string
	// Fingerprint says what the key stands for: the same key with another
	// fingerprint is [eventstore.ErrKeyReused]. Defaults to the aggregate's name.
	Fingerprint string
	// Metadata is stored with every event of the decision.
	Metadata eventstore.Metadata
	// Decide returns the events that happen, none if nothing does, or an error to
	// refuse. It must be pure: it may run several times, must not change what the
	// state refers to (its maps, slices and pointers are the cache's), and must not
	// wait, least of all for another call to the same aggregate: the end of a
	// context is not noticed while it runs. It may run on the goroutine that called
	// Execute, which runtime.Goexit (t.FailNow) then ends.
	Decide func(state S) ([]Event, error)
	// Boundary, if set, makes the decision one about the events that match a query,
	// wherever they are: Decide gets the initial state with those events folded
	// in, and the decision is written only if no further one has matched meanwhile.
	// The new events join the stream of ID. Boundary may run several times and
	// returns a fresh initial state each time.
	Boundary func() (query eventstore.Query, initial S)
}
