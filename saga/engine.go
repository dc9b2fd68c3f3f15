package saga

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/clock"
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
	// LeaseTTL is how long a lease outlives an owner that has died. Defaults to 0:
	// until the backend takes its process for gone.
	LeaseTTL time.Duration
	// Concurrency bounds how many runs of one saga are at work at the same time;
	// runs that wait are not. Defaults to 128.
	Concurrency int
	// CachedRuns is how many waiting runs of a saga keep their history in memory,
	// about 2 KB for a short one, instead of reading it again when they go on.
	// Defaults to 10,000; below 0 for none.
	CachedRuns int
	// Grace is how long, when the engine is stopped, steps may go on by themselves,
	// and then how long they have after their context was cancelled; the latter also
	// when another engine has taken over. Defaults to 5 s.
	Grace time.Duration
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
	return &Engine{
		env:   environment{store: store, clock: o.Clock, bus: bus, encoding: o.Encoding, logger: o.Logger},
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
	if p.kind() == "saga" && e.sagas[p.Name()] != nil || p.kind() == "reaction" && e.reacts[p.Name()] != nil {
		return fmt.Errorf("%w: two %ss are named %q", eventstore.ErrInvalid, p.kind(), p.Name())
	}
	built := p.build(e)
	if r, ok := p.(*Reaction); ok {
		e.reacts[p.Name()], e.reactions[p.Name()] = built, r
	} else {
		e.sagas[p.Name()] = built
	}
	e.workers = append(e.workers, built)
	return nil
}

// Workers returns what is to be run: one worker for each process.
func (e *Engine) Workers() []worker.Worker { return slices.Clone(e.workers) }

// Start starts a run of the saga and returns when that is durable. Starting
// the id again does nothing, whatever the input: a run starts once.
func Start[In, Out any](ctx context.Context, host Host, d *Definition[In, Out], id string, in In) error {
	if err := d.Err(); err != nil {
		return err
	}
	e := host.Sagas()
	raw, err := encode(in)
	if err != nil {
		return err
	}
	r := &Run{saga: d.name, stream: d.stream(id), ctx: ctx, env: &e.env, h: &history{}}
	r.begun(&payload{Format: historyFormat, In: raw}, command.MetadataOf(ctx))
	_, err = e.env.store.Append(ctx, eventstore.Commit{
		Events:     r.buffer,
		Conditions: []eventstore.Condition{eventstore.StreamAt(r.stream, eventstore.Revision{})},
	})
	if err != nil && !errors.Is(err, eventstore.ErrConflict) {
		return fmt.Errorf("start saga %q, run %q: %w", d.name, id, err)
	}
	return nil
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
	if eventType == typeFailed {
		return out, &FailedError{Saga: d.name, ID: id, Compensated: p.Compensated, failure: *p.Error}
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
	var stop *payload
	for batch, err := range e.env.store.Subscribe(ctx, eventstore.OneStream(stream), 0) {
		if err != nil {
			return nil, "", fmt.Errorf("wait for saga %q, run %q: %w", b.name, id, err)
		}
		for i := range batch.Events {
			r := &batch.Events[i]
			switch r.Type {
			case typeBlocked, typeResumed, typeCompleted, typeFailed:
				p, err := decodePayload(r)
				if err != nil {
					return nil, "", err
				}
				switch r.Type {
				case typeBlocked:
					stop = &p
				case typeResumed:
					stop = nil
				default:
					return &p, r.Type, nil
				}
			}
		}
		if stop != nil && batch.CaughtUp {
			return nil, "", &BlockedError{Saga: b.name, ID: id, Reason: stop.Reason}
		}
	}
	return nil, "", context.Cause(ctx)
}

// Look returns how the run is doing, read from its history: never stale, and
// without a worker. The error is [ErrNotFound] when there is none.
func Look[In, Out any](ctx context.Context, host Host, d *Definition[In, Out], id string) (Info, error) {
	e := host.Sagas()
	r := &row{Info: Info{ID: id}}
	for event, err := range e.env.store.Read(ctx, eventstore.OneStream(d.stream(id)), eventstore.ReadOptions{}) {
		if err != nil {
			return Info{}, err
		}
		if err := r.fold(&event); err != nil {
			return Info{}, err
		}
	}
	if r.Version == 0 {
		return Info{}, fmt.Errorf("%w: saga %q has no run %q", ErrNotFound, d.name, id)
	}
	return r.Info, nil
}

// ListOptions narrow [Engine.List]. The zero value lists every open run.
type ListOptions struct {
	// Status keeps runs with any of these; empty: all that have not ended.
	Status []Status
	// After continues behind the run of that id, the last one of a page.
	After string
	// Limit is the most runs to return; 0 means 1,000.
	Limit int
}

// List returns runs of the saga in the order of their ids. It is as fresh as
// the worker, when that runs in this engine, and at most a second older
// otherwise.
func (e *Engine) List(ctx context.Context, saga string, o ListOptions) ([]Info, error) {
	w := e.sagas[saga]
	if w == nil {
		return nil, fmt.Errorf("%w: the engine has no saga %q", ErrNotFound, saga)
	}
	if err := w.refresh(ctx); err != nil {
		return nil, err
	}
	if o.Limit <= 0 {
		o.Limit = 1000
	}
	wanted := func(s Status) bool { return len(o.Status) == 0 || slices.Contains(o.Status, s) }
	tables := []string{openTable(category(saga))}
	if slices.Contains(o.Status, StatusCompleted) || slices.Contains(o.Status, StatusFailed) {
		tables = append(tables, doneTable(category(saga)))
	}
	var found []Info
	err := e.state.View(ctx, func(tx projection.StateTx) error {
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
				if !wanted(info.Status) {
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

// refresh stores the index if the worker runs here.
func (w *runner) refresh(ctx context.Context) error {
	w.mu.Lock()
	here := w.cancel != nil && w.failure == nil && !w.stopping
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
	if err := h.read(ctx, e.env.store, stream); err != nil {
		return err
	}
	switch {
	case h.revision.Version == 0:
		return fmt.Errorf("%w: saga %q has no run %q", ErrNotFound, saga, id)
	case h.blocked == nil:
		return nil
	}
	r := &Run{saga: saga, stream: stream, ctx: ctx, env: &e.env, h: h}
	r.resumed()
	if o := r.write(); o.kind != running && o.kind != conflicted {
		return fmt.Errorf("resume saga %q, run %q: %w", saga, id, o.err)
	}
	return nil
}
