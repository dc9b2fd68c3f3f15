package saga

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/internal/worker"
	"github.com/deed-go/deed/projection"
)

// Options of an [Engine]. The zero value is ready to use.
type Options struct {
	// Encoding decodes the domain's events. Defaults to JSON.
	Encoding *eventstore.Encoding
	// Clock is what timers and backoffs go by. Defaults to the system's.
	Clock clock.Clock
	// Logger gets what is worth a look: attempts that panicked, runs that are
	// blocked, events set aside. Defaults to slog.Default().
	Logger *slog.Logger
	// Owner names this engine in leases. Defaults to a random id. An engine with the
	// name of an earlier one takes its leases over, once: who was fenced waits its
	// turn like any other.
	Owner string
	// Group says which of the sagas and reactions this engine is to run, of those
	// that several engines on one state could: work is spread over them, and moves when
	// they come and go. Without one, whoever acquires a lease first keeps it.
	Group *ownership.Group
	// LeaseTTL is how long a lease outlives an owner that has died. Defaults to 0:
	// until the backend takes its process for gone; with Leases to 10 s, and to no
	// less than 6 s.
	LeaseTTL time.Duration
	// Leases says where leases are kept when it is not in the state: for engines of
	// which each has a state of its own, on one log. Who has a lease keeps its index in
	// its own state; who takes over finds in the log what the other one has done. A
	// state that other processes use is the better place, since it looks at the lease
	// in the transaction that commits: here it is the time that says that a lease has
	// ended, to its owner before it does to the others. It must not be given with
	// such a state.
	Leases ownership.Leases
	// Concurrency bounds how many runs of one saga are at work at the same time;
	// runs that wait are not. Defaults to 128.
	Concurrency int
	// CachedRuns is how many waiting runs of a saga keep their history in memory,
	// about 2 KB for a short one, instead of reading it again when they go on.
	// Defaults to 10,000; below 0 for none. Histories of more than 1 MiB are not kept,
	// and not more than 64 MiB of all.
	CachedRuns int
	// Grace is how long, when the engine is stopped, steps may go on by themselves,
	// and then how long they have after their context was cancelled; the latter also
	// when another engine has taken over. Defaults to 5 s.
	Grace time.Duration
	// TracerProvider makes a span for each attempt of a step or reaction;
	// MeterProvider counts runs and attempts, and reports what is late. They default
	// to the global ones of OpenTelemetry.
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider

	ahead int // rows of a saga in memory that wait for a time to come; 0: as many as is usual
}

// Engine runs sagas and reactions on a store. It is safe for concurrent use;
// its workers do nothing until they are run.
type Engine struct {
	env     environment
	state   projection.State
	options Options
	workers []worker.Worker
	sagas   map[string]*candidate
	reacts  map[string]*candidate

	reactions map[string]*Reaction
}

// Host is what has an engine: an application, or an Engine itself.
type Host interface{ Sagas() *Engine }

// NewEngine returns an engine without processes.
func NewEngine(store eventstore.Store, state projection.State, bus *command.Bus, o Options) *Engine {
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Owner == "" {
		o.Owner = uuid.NewString()
	}
	if o.Concurrency <= 0 {
		o.Concurrency = 128
	}
	if o.CachedRuns == 0 {
		o.CachedRuns = 10_000
	}
	if o.Grace <= 0 {
		o.Grace = 5 * time.Second
	}
	if o.TracerProvider == nil {
		o.TracerProvider = otel.GetTracerProvider()
	}
	if o.MeterProvider == nil {
		o.MeterProvider = otel.GetMeterProvider()
	}
	if o.Leases != nil {
		if o.LeaseTTL == 0 {
			o.LeaseTTL = defaultLeaseTTL
		}
		o.LeaseTTL = max(o.LeaseTTL, shortestLeaseTTL)
		state = newLeasedState(state, o.Leases, o.LeaseTTL, o.Logger)
	}
	return &Engine{
		env: environment{
			store: store, state: state, clock: o.Clock, bus: bus, encoding: o.Encoding, logger: o.Logger, tell: newTelemetry(&o),
		},
		state: state, options: o, sagas: map[string]*candidate{}, reacts: map[string]*candidate{},
		reactions: map[string]*Reaction{},
	}
}

// Sagas returns the engine: an Engine is a [Host].
func (e *Engine) Sagas() *Engine { return e }

// Add makes the engine run the process. Add before the workers are run.
func (e *Engine) Add(p Process) error {
	if err := p.Err(); err != nil {
		return err
	}
	if whole, ok := p.(interface{ parts() []Process }); ok {
		for _, part := range whole.parts() {
			if err := e.Add(part); err != nil {
				return err
			}
		}
		return nil
	}
	key := p.Name()
	if pinned, ok := p.(interface{ pinned() string }); ok {
		key = withBuild(key, pinned.pinned())
	}
	if p.kind() == "saga" && e.sagas[key] != nil || p.kind() == "reaction" && e.reacts[p.Name()] != nil {
		return fmt.Errorf("%w: two %ss are named %q", eventstore.ErrInvalid, p.kind(), p.Name())
	}
	built := p.build(e)
	if r, ok := p.(*Reaction); ok {
		e.reacts[p.Name()], e.reactions[p.Name()] = built, r
	} else {
		e.sagas[key] = built
	}
	e.workers = append(e.workers, built)
	return nil
}

// Workers returns what is to be run: one worker for each process.
func (e *Engine) Workers() []worker.Worker { return slices.Clone(e.workers) }

// Start starts a run of the saga and returns when that is durable. Starting
// the id again with the same input does nothing: a run starts once. With another
// input the error is [ErrStarted].
func Start[In, Out any](ctx context.Context, host Host, d *Definition[In, Out], id string, in In) error {
	if err := d.Err(); err != nil {
		return err
	}
	raw, err := encode(in)
	if err != nil {
		return err
	}
	return host.Sagas().env.start(ctx, &d.blueprint, id, raw, nil)
}

// Wait waits until the run has ended and returns its result. The error is a
// [*FailedError] when it failed, and a [*BlockedError] when it is, or becomes,
// blocked. A run that does not exist yet is waited for.
func Wait[In, Out any](ctx context.Context, host Host, d *Definition[In, Out], id string) (Out, error) {
	var out Out
	if err := d.Err(); err != nil {
		return out, err
	}
	p, eventType, err := host.Sagas().wait(ctx, &d.blueprint, id)
	if err != nil {
		return out, err
	}
	if eventType != typeCompleted {
		failed := &FailedError{Saga: d.name, ID: id, Compensated: p.Compensated, Status: endedBy(eventType), failure: failure{Message: p.Reason}}
		if p.Error != nil {
			failed.failure = *p.Error
		}
		return out, failed
	}
	if err := eventstore.JSON().Unmarshal(p.Result, &out); err != nil {
		return out, fmt.Errorf("result of saga %q, run %q: %w", d.name, id, err)
	}
	return out, nil
}

func (e *Engine) wait(ctx context.Context, b *blueprint, id string) (*payload, string, error) {
	stream := b.stream(id)
	if err := stream.Validate(); err != nil {
		return nil, "", err
	}
	if p, eventType, done, err := e.hear(ctx, b, id); done || err != nil {
		return p, eventType, err
	}
	var stop, end *payload
	var endType string
	for batch, err := range e.env.store.Subscribe(ctx, eventstore.OneStream(stream), 0) {
		if err != nil {
			return nil, "", fmt.Errorf("wait for saga %q, run %q: %w", b.name, id, err)
		}
		for i := range batch.Events {
			r := &batch.Events[i]
			switch r.Type {
			case typeBlocked, typeResumed, typeSkipped, typeRestarted, typeCompleted, typeFailed, typeCancelled, typeTerminated:
				p, err := decodePayload(r)
				if err != nil {
					return nil, "", err
				}
				switch r.Type {
				case typeBlocked:
					stop, end = &p, nil
				case typeResumed, typeSkipped, typeRestarted:
					stop, end = nil, nil
				default:
					end, endType = &p, r.Type
				}
			}
		}
		if end != nil && batch.CaughtUp {
			return end, endType, nil
		}
		if stop != nil && batch.CaughtUp {
			return nil, "", &BlockedError{Saga: b.name, ID: id, Reason: stop.Reason}
		}
	}
	return nil, "", context.Cause(ctx)
}

// hear is wait where the run's worker is in this engine, and hears of its end
// anyhow. False says that it is not.
func (e *Engine) hear(ctx context.Context, b *blueprint, id string) (*payload, string, bool, error) {
	var w *sagaWorker
	if c := e.sagas[withBuild(b.name, b.pin)]; c != nil {
		if r := c.current(); r != nil {
			w, _ = r.behaviour.(*sagaWorker)
		}
	}
	if w == nil {
		return nil, "", false, nil
	}
	ended, open, cancel := w.listen(id)
	defer cancel()
	if !open {
		// Perhaps it has ended before, or is blocked, whatever it was told since.
		last, err := e.last(ctx, b.stream(id))
		if err != nil || last != nil && (ends(last.Type) || last.Type == typeBlocked || external(last.Type)) {
			return nil, "", false, nil
		}
	}
	select {
	case last := <-ended:
		if last.Type == typeBlocked {
			return nil, "", false, nil
		}
		p, err := decodePayload(&last)
		return &p, last.Type, true, err
	case <-w.stopped:
		return nil, "", false, nil
	case <-ctx.Done():
		return nil, "", true, context.Cause(ctx)
	}
}

// Look returns how the run is doing, read from its history: never stale, and
// without a worker. The error is [ErrNotFound] when there is none.
func Look[In, Out any](ctx context.Context, host Host, d *Definition[In, Out], id string) (Info, error) {
	return host.Sagas().Look(ctx, d.name, id)
}

// Look is the function [Look] by the saga's name.
func (e *Engine) Look(ctx context.Context, saga, id string) (Info, error) {
	r := &row{Info: Info{ID: id}}
	for event, err := range e.env.store.Read(ctx, eventstore.OneStream(eventstore.Stream{Category: category(saga), ID: id}), eventstore.ReadOptions{}) {
		if err != nil {
			return Info{}, err
		}
		if err := r.fold(&event); err != nil {
			return Info{}, err
		}
	}
	if r.Version == 0 {
		return Info{}, fmt.Errorf("%w: saga %q has no run %q", ErrNotFound, saga, id)
	}
	return r.Info, nil
}

// ListOptions narrow [Engine.List]. The zero value lists every open run.
type ListOptions struct {
	// Status keeps runs with any of these; empty: all that have not ended.
	Status []Status
	// Published keeps runs that have published, by name, the value. A string is
	// compared as it is, anything else by its JSON.
	Published map[string]string
	// Since and Until keep runs that started in this time; Until is exclusive. Zero
	// does not exclude.
	Since, Until time.Time
	// After continues behind the run of that id, the last one of a page.
	After string
	// Limit is the most runs to return; 0 means 1,000.
	Limit int
}

// List returns runs of the saga in the order of their ids. It is as fresh as
// the worker, when that runs in this engine, and at most a second older
// otherwise.
func (e *Engine) List(ctx context.Context, saga string, o ListOptions) ([]Info, error) {
	if err := e.ready(ctx, saga); err != nil {
		return nil, err
	}
	if o.Limit <= 0 {
		o.Limit = 1000
	}
	units, err := e.units(ctx, saga)
	if err != nil {
		return nil, err
	}
	var tables []string
	for _, unit := range units {
		tables = append(tables, openTable(category(unit)))
		if slices.ContainsFunc(o.Status, Status.Ended) {
			tables = append(tables, doneTable(category(unit)))
		}
	}
	var found []Info
	err = e.state.View(ctx, func(tx projection.StateTx) error {
		found = nil
		for _, table := range tables {
			n := 0
			for entry, err := range tx.Scan(table, projection.Range{After: o.After}) {
				if err != nil {
					return err
				}
				var info Info
				if err := jsonv1.Unmarshal(entry.Value, &info); err != nil {
					return fmt.Errorf("run %q: %w", entry.Key, err)
				}
				if !o.keep(&info) {
					continue
				}
				found = append(found, info)
				if n++; n == o.Limit {
					break
				}
			}
		}
		return nil
	})
	slices.SortFunc(found, func(a, b Info) int {
		switch {
		case a.ID < b.ID:
			return -1
		case a.ID > b.ID:
			return 1
		}
		return 0
	})
	return found[:min(len(found), o.Limit)], err
}

// Names returns the names of the sagas that have run on the state, in order: of
// those that the engine has, and of those that it has not.
func (e *Engine) Names(ctx context.Context) ([]string, error) {
	units, err := e.allUnits(ctx)
	for i, unit := range units {
		units[i], _, _ = strings.Cut(unit, "@")
	}
	return slices.Compact(units), err
}

// BuildUse says how many open runs are pinned to a build.
type BuildUse struct {
	// Build is "" for the runs without one.
	Build string `json:"build"`
	Open  int    `json:"open"`
}

// Builds tells to which builds the open runs of the saga are pinned, see
// [Definition.Build]. One that has none may go.
func (e *Engine) Builds(ctx context.Context, saga string) ([]BuildUse, error) {
	if err := e.ready(ctx, saga); err != nil {
		return nil, err
	}
	units, err := e.units(ctx, saga)
	if err != nil {
		return nil, err
	}
	uses := make([]BuildUse, len(units))
	return uses, e.state.View(ctx, func(tx projection.StateTx) error {
		for i, unit := range units {
			_, build, _ := strings.Cut(unit, "@")
			uses[i] = BuildUse{Build: build}
			for _, err := range tx.Scan(openTable(category(unit)), projection.Range{}) {
				if err != nil {
					return err
				}
				uses[i].Open++
			}
		}
		return nil
	})
}

// allUnits names the sagas with their builds, in order.
func (e *Engine) allUnits(ctx context.Context) ([]string, error) {
	units := slices.Collect(maps.Keys(e.sagas))
	lister, ok := e.state.(projection.CheckpointLister)
	if ok {
		known, err := lister.Checkpoints(ctx)
		if err != nil {
			return nil, err
		}
		for _, k := range known {
			if unit, ok := strings.CutPrefix(k.Name, "saga "); ok && !k.Checkpoint.IsZero() {
				units = append(units, unit)
			}
		}
	}
	slices.Sort(units)
	return slices.Compact(units), nil
}

// units names the builds of one saga.
func (e *Engine) units(ctx context.Context, saga string) ([]string, error) {
	all, err := e.allUnits(ctx)
	return slices.DeleteFunc(all, func(unit string) bool {
		name, _, _ := strings.Cut(unit, "@")
		return name != saga
	}), err
}

// ready makes sure that what is stored of the saga is as fresh as it can be. The
// error is ErrNotFound when it is unknown.
func (e *Engine) ready(ctx context.Context, saga string) error {
	here := false
	for unit, w := range e.sagas {
		if name, _, _ := strings.Cut(unit, "@"); name == saga {
			here = true
			if err := w.refresh(ctx); err != nil {
				return err
			}
		}
	}
	if here {
		return nil
	}
	names, err := e.Names(ctx)
	if err == nil && !slices.Contains(names, saga) {
		err = fmt.Errorf("%w: there is no saga %q", ErrNotFound, saga)
		if len(names) > 0 {
			err = fmt.Errorf("%w; there is %s", err, strings.Join(names, ", "))
		}
	}
	return err
}

func (o *ListOptions) keep(info *Info) bool {
	if len(o.Status) > 0 && !slices.Contains(o.Status, info.Status) ||
		!o.Since.IsZero() && info.Started.Before(o.Since) || !o.Until.IsZero() && !info.Started.Before(o.Until) {
		return false
	}
	for name, want := range o.Published {
		raw, ok := info.Published[name]
		var text string
		if !ok || string(raw) != want && (json.Unmarshal(raw, &text) != nil || text != want) {
			return false
		}
	}
	return true
}

// endedBy is the status that the event ends a run with.
func endedBy(eventType string) Status {
	switch eventType {
	case typeFailed:
		return StatusFailed
	case typeCancelled:
		return StatusCancelled
	case typeTerminated:
		return StatusTerminated
	}
	return StatusCompleted
}

// sameJSON reports whether both are the same value.
func sameJSON(a, b json.RawMessage) bool {
	if bytes.Equal(a, b) {
		return true
	}
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && reflect.DeepEqual(x, y)
}

// refresh stores the index if the worker runs here.
func (w *runner) refresh(ctx context.Context) error {
	w.mu.Lock()
	here := w.steps != nil && w.failure == nil && !w.stopping
	w.mu.Unlock()
	if !here {
		return nil
	}
	return w.flush(ctx)
}

// Resume makes a blocked run go on, after what blocked it was put right. A
// compensation that had failed is tried again, except for its steps that
// succeeded. Runs blocked for other reasons are also tried when the engine
// starts.
func (e *Engine) Resume(ctx context.Context, saga, id string) error {
	stream := eventstore.Stream{Category: category(saga), ID: id}
	h := &history{}
	if err := h.read(ctx, e.env.store, stream, 0); err != nil {
		return err
	}
	switch {
	case h.revision.Version == 0:
		return fmt.Errorf("%w: saga %q has no run %q", ErrNotFound, saga, id)
	case h.blocked == nil:
		return nil
	}
	r := newRun(&core{saga: saga, stream: stream, ctx: ctx, env: &e.env, h: h})
	r.resumed()
	if o := r.write(); o.kind != running && o.kind != conflicted {
		return fmt.Errorf("resume saga %q, run %q: %w", saga, id, o.err)
	}
	return nil
}
