package aggregate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

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
	// once. Defaults to 64; 1 waits for each commit before deciding the next. Stores
	// that cannot take commits in order without waiting have 1.
	PipelineDepth int
	// Attempts is how often a command is decided at most when other writers keep
	// getting in between. Defaults to 10.
	Attempts int
	// Logger hears of what is not an error to any caller: snapshots that could not
	// be kept or used, outcomes that had to be looked up. Defaults to slog.Default().
	Logger *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	if o.CachedAggregates == 0 {
		o.CachedAggregates = 65536
	}
	if o.PipelineDepth <= 0 {
		o.PipelineDepth = 64
	}
	if o.Attempts <= 0 {
		o.Attempts = 10
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return o
}

// Runtime runs aggregates on a store. Its methods, and the functions that take
// it, may be called concurrently.
type Runtime struct {
	store   eventstore.Store
	options Options
}

// NewRuntime returns a runtime on the store. It starts nothing: goroutines
// exist only while there are calls.
func NewRuntime(store eventstore.Store, o Options) *Runtime {
	return &Runtime{store: store, options: o.withDefaults()}
}

// Store returns the store that the runtime writes to.
func (r *Runtime) Store() eventstore.Store { return r.store }

// Encoding returns how the runtime's events are stored.
func (r *Runtime) Encoding() *eventstore.Encoding { return r.options.Encoding }

// Stop refuses new calls and waits for those under way.
func (r *Runtime) Stop(context.Context) error { return nil }

// Request is one decision about one aggregate.
type Request[S any] struct {
	// ID says which aggregate of the definition's category.
	ID string
	// Key makes the request idempotent; empty means it is not.
	Key string
	// Fingerprint says what the key stands for: the same key with another
	// fingerprint is [eventstore.ErrKeyReused]. Defaults to the aggregate's name.
	Fingerprint string
	// Metadata is stored with every event of the decision.
	Metadata eventstore.Metadata
	// Decide returns the events that happen, none if nothing does, or an error to
	// refuse. It must be pure: it may run several times, must not change what the
	// state refers to, and must not wait.
	Decide func(state S) ([]Event, error)
	// Boundary, if set, makes the decision one about the events that match a query,
	// wherever they are: Decide gets the initial state with those events folded
	// in, and the decision is written only if no further one matched meanwhile. The
	// new events join the stream of ID.
	Boundary func() (query eventstore.Query, initial S)
}

// Execute decides on the aggregate's current state and writes what was
// decided.
func Execute[S any](ctx context.Context, r *Runtime, def *Definition[S], req Request[S]) (eventstore.Receipt, error) {
	if err := def.Err(); err != nil {
		return eventstore.Receipt{}, err
	}
	stream := def.Stream(req.ID)
	if err := stream.Validate(); err != nil {
		return eventstore.Receipt{}, err
	}
	if req.Key != "" {
		if req.Fingerprint == "" {
			req.Fingerprint = stream.String()
		}
		receipt, used, err := r.store.Lookup(ctx, stream, req.Key)
		if err != nil {
			return eventstore.Receipt{}, err
		}
		if used {
			if receipt.Fingerprint != req.Fingerprint {
				return eventstore.Receipt{}, fmt.Errorf("%w: %q", eventstore.ErrKeyReused, req.Key)
			}
			return receipt, nil
		}
	} else {
		req.Fingerprint = ""
	}
	for attempt := 1; ; attempt++ {
		state, at, err := Load(ctx, r, def, req.ID)
		if err != nil {
			return eventstore.Receipt{}, err
		}
		condition := eventstore.StreamAt(stream, at)
		if req.Boundary != nil {
			query, initial := req.Boundary()
			after, err := r.store.Head(ctx)
			if err != nil {
				return eventstore.Receipt{}, err
			}
			state = initial
			for e, err := range r.store.Read(ctx, query, eventstore.ReadOptions{}) {
				if err != nil {
					return eventstore.Receipt{}, err
				}
				if err := def.apply(r.options.Encoding, &state, &e); err != nil {
					return eventstore.Receipt{}, err
				}
				after = max(after, e.Position)
			}
			condition = eventstore.NoneMatch(query, after)
		}
		events, err := req.Decide(state)
		if err != nil {
			return eventstore.Receipt{}, err
		}
		if len(events) == 0 {
			return eventstore.Receipt{Last: at.Position}, nil
		}
		commit := eventstore.Commit{Conditions: []eventstore.Condition{condition}, Key: req.Key, Fingerprint: req.Fingerprint}
		for _, e := range events {
			encoded, err := def.encode(r.options.Encoding, stream, e, req.Metadata, r.options.Clock.Now().UTC().Round(0))
			if err != nil {
				return eventstore.Receipt{}, err
			}
			commit.Events = append(commit.Events, encoded)
		}
		receipt, err := r.store.Append(ctx, commit)
		if errors.Is(err, eventstore.ErrConflict) && attempt < r.options.Attempts {
			continue
		}
		return receipt, err
	}
}

// Load returns the aggregate's state and revision, folded from the events that
// are durable now. The state belongs to the caller.
func Load[S any](ctx context.Context, r *Runtime, def *Definition[S], id string) (S, eventstore.Revision, error) {
	var state S
	var at eventstore.Revision
	if err := def.Err(); err != nil {
		return state, at, err
	}
	stream := def.Stream(id)
	if err := stream.Validate(); err != nil {
		return state, at, err
	}
	for e, err := range r.store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{}) {
		if err == nil {
			err = def.apply(r.options.Encoding, &state, &e)
		}
		if err != nil {
			var none S
			return none, eventstore.Revision{}, err
		}
		at = e.Revision()
	}
	return state, at, nil
}
