package aggregate

import (
	"context"
	"fmt"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// Load returns the aggregate's state and revision, folded from the events that
// are durable now; an aggregate without events has the zero state and revision.
// The state belongs to the caller.
//
// An event that the definition does not know is an error that wraps
// [eventstore.ErrUnknownType].
func Load[S any](ctx context.Context, r *Runtime, def *Definition[S], id string) (S, eventstore.Revision, error) {
	var none S
	if err := def.Err(); err != nil {
		return none, eventstore.Revision{}, err
	}
	stream := def.Stream(id)
	if err := stream.Validate(); err != nil {
		return none, eventstore.Revision{}, err
	}
	h, err := load(ctx, r, def, stream, true)
	if err != nil {
		return none, eventstore.Revision{}, err
	}
	return h.state, h.at, nil
}

// history is what a load found.
type history[S any] struct {
	state    S
	at       eventstore.Revision
	last     uuid.UUID
	replayed int  // events, without those a snapshot stood for
	hinted   bool // began with a snapshot
}

func load[S any](ctx context.Context, r *Runtime, def *Definition[S], stream eventstore.Stream, hints bool) (history[S], error) {
	if hints && def.snapshotEvery > 0 && r.options.Snapshots != nil {
		h, ok, err := loadFromSnapshot(ctx, r, def, stream)
		if ok || err != nil {
			return h, err
		}
	}
	var h history[S]
	for e, err := range r.store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{}) {
		if err == nil {
			err = h.add(def, r.options.Encoding, &e)
		}
		if err != nil {
			return history[S]{}, fmt.Errorf("load %q: %w", stream, err)
		}
	}
	return h, nil
}

func (h *history[S]) add(def *Definition[S], enc *eventstore.Encoding, e *eventstore.Recorded) error {
	if e.Version != h.at.Version+1 {
		return fmt.Errorf("%w: version %d follows %d", eventstore.ErrGap, e.Version, h.at.Version)
	}
	if err := def.fold(enc, &h.state, e); err != nil {
		return err
	}
	h.at, h.last = e.Revision(), e.ID
	h.replayed++
	return nil
}

// fold is apply with panics as errors; after one the state may be half-changed.
func (d *Definition[S]) fold(enc *eventstore.Encoding, state *S, r *eventstore.Recorded) (err error) {
	defer caught(&err, func() string {
		return fmt.Sprintf("the fold of event %q (stream %q, version %d)", r.Type, r.Stream, r.Version)
	})
	return d.apply(enc, state, r)
}
