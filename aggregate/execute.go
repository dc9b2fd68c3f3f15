package aggregate

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/deed-go/deed/eventstore"
)

// call is one Execute on its way through an activation.
type call[S any] struct {
	ctx       context.Context
	req       Request[S]
	done      chan outcome // nil while the caller leads the activation
	out       outcome      // instead of done, once answered
	answered  bool
	phase     atomic.Int32
	conflicts int
	number    uint64 // in the order of the activation's calls

	// What was decided; set and cleared by the activation.
	kind     decision
	err      error               // of a refusal
	commit   eventstore.Commit   // of a commit
	pending  *eventstore.Pending // of a commit
	version  uint64              // of the stream just after a commit
	picture  []byte              // of the state just after a commit, when a snapshot is due
	foldLate bool                // a commit whose folds want to know its positions
	verifies uint64              // of a commit: the number of the last call that came before it was enqueued
	first    *call[S]            // of an echo: the call whose key it shares
	receipt  eventstore.Receipt  // once durable
}

type decision uint8

const (
	refusal decision = iota + 1 // an error of Decide
	failure                     // any other error
	nothing                     // no events
	commit                      // events, on their way
	echo                        // the same key as a commit on its way
)

// The phases of a call. Whoever leaves the first two decides what the caller
// is told when its context ends.
const (
	waiting int32 = iota // nothing of it is on its way to the store
	flying               // its commit may be written
	gone                 // the caller has left
)

type outcome struct {
	receipt eventstore.Receipt
	err     error
	// judged says that Decide refused or did nothing, rather than that something failed.
	judged    bool
	conflicts int
}

// Execute decides on the aggregate's current state, writes what was decided,
// and returns when that is durable. Concurrent calls for one aggregate are
// decided in the order in which they came, each on the state that the earlier
// ones left; none is answered before everything its decision was based on is
// durable. When another writer comes first, the decision is made again, up to
// [Options.Attempts] times.
//
// A decision without events writes nothing and returns a Receipt that names
// the last event it was based on. An error of Decide is returned as it is. Both
// are based on everything that had been written, by anybody, before Execute was
// called, as a decision with events is.
//
// When ctx ends before the decision is on its way to the store nothing is
// written and the error is ctx's; later it is [eventstore.ErrOutcomeUnknown],
// which wraps ctx's, while the aggregate carries on. With a key, a refusal counts
// only once the key was looked up again: when ctx ends before that, the error
// tells the refusal, but does not wrap it.
func Execute[S any](ctx context.Context, r *Runtime, def *Definition[S], req Request[S]) (eventstore.Receipt, error) {
	if len(def.mistakes) > 0 {
		return eventstore.Receipt{}, def.Err()
	}
	stream := def.Stream(req.ID)
	if err := stream.Validate(); err != nil {
		return eventstore.Receipt{}, err
	}
	if req.Decide == nil {
		return eventstore.Receipt{}, fmt.Errorf("%w: aggregate %q: the request has no Decide", eventstore.ErrInvalid, stream)
	}
	if err := ctx.Err(); err != nil {
		return eventstore.Receipt{}, err
	}
	req.Metadata.Extra = maps.Clone(req.Metadata.Extra)
	if req.Key == "" {
		req.Fingerprint = ""
	} else {
		if req.Fingerprint == "" {
			req.Fingerprint = stream.String()
		}
		if first, used, err := lookup(ctx, r, stream, req.Key, req.Fingerprint); used || err != nil {
			return first, err
		}
	}
	c := &call[S]{ctx: ctx, req: req}
	rested, err := submit(r, def, c)
	if err != nil {
		return eventstore.Receipt{}, fmt.Errorf("execute on %q: %w", stream, err)
	}
	if rested != nil {
		rested.lead(c)
	}
	out := c.out
	if !c.answered {
		select {
		case out = <-c.done:
		case <-ctx.Done():
			var err error
			if out, err = c.leave(); err != nil {
				return eventstore.Receipt{}, fmt.Errorf("execute on %q: %w", stream, err)
			}
		}
	}
	if out.conflicts > 0 {
		trace.SpanFromContext(ctx).SetAttributes(attribute.Int("deed.conflicts", out.conflicts))
	}
	if out.judged && req.Key != "" {
		// The state may be one that this very request has changed.
		first, used, err := lookup(ctx, r, stream, req.Key, req.Fingerprint)
		if err != nil && out.err != nil {
			// Not wrapped: nobody knows whether the refusal counts.
			err = fmt.Errorf("%w; the decision, which counts only if the key is unused, was: %v", err, out.err) //nolint:errorlint // on purpose
		}
		if used || err != nil {
			return first, err
		}
	}
	return out.receipt, out.err
}

func lookup(ctx context.Context, r *Runtime, stream eventstore.Stream, key, fingerprint string) (eventstore.Receipt, bool, error) {
	receipt, used, err := r.store.Lookup(ctx, stream, key)
	if err != nil {
		return eventstore.Receipt{}, false, fmt.Errorf("look up the idempotency key %q: %w", key, err)
	}
	if used && receipt.Fingerprint != fingerprint {
		return eventstore.Receipt{}, true, keyReused(key)
	}
	return receipt, used, nil
}

func keyReused(key string) error {
	return fmt.Errorf("%w: %q stands for another request: use a new key for each request", eventstore.ErrKeyReused, key)
}

// leave is what a caller does whose context ended. It returns an outcome if
// there is one after all.
func (c *call[S]) leave() (outcome, error) {
	for {
		select {
		case out := <-c.done:
			return out, nil
		default:
		}
		switch phase := c.phase.Load(); {
		case phase == waiting && c.phase.CompareAndSwap(waiting, gone), phase == gone:
			return outcome{}, c.ctx.Err()
		case phase == flying && c.phase.CompareAndSwap(flying, gone):
			return outcome{}, unknownOutcome(c.ctx.Err())
		}
	}
}

func unknownOutcome(cause error) error {
	return fmt.Errorf("%w: %w: ask again with the same idempotency key, or look at the aggregate", eventstore.ErrOutcomeUnknown, cause)
}

// fly marks the call as on its way; false means that its caller has left.
func (c *call[S]) fly() bool { return c.phase.CompareAndSwap(waiting, flying) }

// land takes fly back, to decide again.
func (c *call[S]) land() {
	c.phase.CompareAndSwap(flying, waiting)
	c.kind, c.err, c.commit, c.pending, c.version, c.picture, c.foldLate, c.verifies, c.first = 0, nil, eventstore.Commit{}, nil, 0, nil, false, 0, nil
}

// left reports whether nobody waits for the call any more. It is not asked
// while the commit is on its way.
func (c *call[S]) left() bool {
	return c.ctx.Err() != nil && c.phase.CompareAndSwap(waiting, gone) || c.phase.Load() == gone
}

func (c *call[S]) answer(receipt eventstore.Receipt, err error, judged bool) {
	c.receipt = receipt
	out := outcome{receipt: receipt, err: err, judged: judged, conflicts: c.conflicts}
	if c.done == nil {
		c.out, c.answered = out, true
		return
	}
	c.done <- out
}

// detached carries the values of a caller's context, but ends with the runtime.
type detached struct {
	context.Context
	values context.Context
}

func (d detached) Value(key any) any {
	if v := d.values.Value(key); v != nil {
		return v
	}
	return d.Context.Value(key)
}

func (r *Runtime) detach(ctx context.Context) context.Context {
	return detached{r.life, context.WithoutCancel(ctx)}
}

// unlessAbandoned keeps the end of the runtime's context, which nobody outside
// knows, from looking like the end of the caller's.
func (r *Runtime) unlessAbandoned(err error) error {
	if r.life.Err() != nil && errors.Is(err, context.Canceled) {
		return ErrStopped
	}
	return err
}

// enqueue hands the commit to the store. What was handed over stays on its way
// when the runtime is abandoned: its callers are told that its outcome is unknown.
func (r *Runtime) enqueue(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
	if r.enqueuer != nil {
		return r.enqueuer.Enqueue(context.WithoutCancel(ctx), c)
	}
	p, resolve := eventstore.NewPending()
	resolve(r.store.Append(r.detach(ctx), c))
	return p
}

// result waits for the outcome of a commit, or for the runtime to be abandoned.
func (r *Runtime) result(p *eventstore.Pending) (eventstore.Receipt, error) {
	select {
	case <-p.Done():
	default:
		select {
		case <-p.Done():
		case <-r.life.Done():
			return eventstore.Receipt{}, unknownOutcome(ErrStopped)
		}
	}
	return p.Result()
}

func isUnknown(err error) bool { return errors.Is(err, eventstore.ErrOutcomeUnknown) }
