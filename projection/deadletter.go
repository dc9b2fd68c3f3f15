package projection

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// DeadLetter is an event that a projection has set aside: one that it failed
// on, or a later one of the same stream, which must not overtake it.
type DeadLetter struct {
	Position eventstore.Position `json:"position"`
	Stream   eventstore.Stream   `json:"stream"`
	Version  uint64              `json:"version"`
	Type     string              `json:"type"`
	EventID  uuid.UUID           `json:"event"`
	// Error is why; empty for events that only follow a failed one.
	Error string `json:"error,omitempty"`
	// Attempts is how often it was tried.
	Attempts int `json:"attempts,omitempty"`
	// At is when it was set aside, by the engine's clock.
	At time.Time `json:"at"`
}

func deadKey(p eventstore.Position) string { return fmt.Sprintf("%020d", uint64(p)) }

func (r *runner) putDeadLetter(tx StateTx, e *eventstore.Recorded, cause error, attempts int) error {
	d := DeadLetter{
		Position: e.Position, Stream: e.Stream, Version: e.Version, Type: e.Type, EventID: e.ID,
		Attempts: attempts, At: r.engine.options.Clock.Now(),
	}
	if cause != nil {
		d.Error = cause.Error()
	}
	data, err := json.Marshal(d)
	if err != nil {
		return err
	}
	return tx.Put(r.deadTable(), deadKey(e.Position), data)
}

func (r *runner) eachDeadLetter(tx StateTx, do func(DeadLetter)) error {
	for row, err := range tx.Scan(r.deadTable(), Range{}) {
		if err != nil {
			return err
		}
		var d DeadLetter
		if err := json.Unmarshal(row.Value, &d); err != nil {
			return fmt.Errorf("dead letter %q: %w", row.Key, err)
		}
		do(d)
	}
	return nil
}

// setAside passes the event by, into the dead letters, and its stream with it.
func (r *runner) setAside(ctx context.Context, lease Lease, it *item, cause error, attempts int) error {
	next := Checkpoint{Log: r.stored.Log, Epoch: lease.Epoch, Position: it.event.Position}
	err := r.engine.state.Update(ctx, func(tx StateTx) error {
		if err := tx.SetCheckpoint(lease, r.stored, next); err != nil {
			return err
		}
		return r.putDeadLetter(tx, it.event, cause, attempts)
	})
	if err != nil {
		return err
	}
	r.parked[it.event.Stream] = struct{}{}
	r.engine.telemetry.deadLetters.Add(ctx, 1, r.attributes)
	r.engine.options.Logger.Error("projection set an event aside", "projection", r.projection.Name(),
		"position", it.event.Position, "stream", it.event.Stream.String(), "type", it.event.Type, "error", cause)
	r.progress.change(func() {
		r.progress.lastErr, r.progress.errAt = cause, r.engine.options.Clock.Now()
	})
	r.reach(next)
	return nil
}

// DeadLetters returns the events that the projection has set aside, in the
// order of the log.
func (e *Engine) DeadLetters(ctx context.Context, name string) ([]DeadLetter, error) {
	r, err := e.runner(name)
	if err != nil {
		return nil, err
	}
	return r.deadLetters(ctx)
}

func (r *runner) deadLetters(ctx context.Context) ([]DeadLetter, error) {
	var all []DeadLetter
	err := r.engine.state.View(ctx, func(tx StateTx) error {
		all = all[:0]
		return r.eachDeadLetter(tx, func(d DeadLetter) { all = append(all, d) })
	})
	return all, err
}

// ReplayDeadLetters folds the events that the projection has set aside, in the
// order of the log, and returns how many succeeded. Where one fails again, it
// and the later ones of its stream stay, and the error says so. A stream with
// none left takes part again.
//
// Within a stream no event overtakes another. Rows that several streams share
// get the replayed events after those that have been folded meanwhile.
//
// When another process runs the projection nothing is replayed, and the error
// wraps [ErrLeaseHeld] and names the owner: ask that one.
func (e *Engine) ReplayDeadLetters(ctx context.Context, name string) (replayed int, err error) {
	r, err := e.runner(name)
	if err != nil {
		return 0, err
	}
	_, err = r.ask(ctx, func(ctx context.Context, lease Lease) error {
		var err error
		replayed, err = r.replay(ctx, lease)
		return err
	}, false)
	if err != nil {
		err = fmt.Errorf("replay dead letters of projection %q: %w", name, err)
	}
	return replayed, err
}

func (r *runner) replay(ctx context.Context, lease Lease) (int, error) {
	letters, err := r.deadLetters(ctx)
	if err != nil {
		return 0, err
	}
	replayed, parked := 0, map[eventstore.Stream]struct{}{}
	var problems []error
	for _, d := range letters {
		if _, ok := parked[d.Stream]; ok {
			continue
		}
		err := r.replayOne(ctx, lease, d)
		failure := (*handlerError)(nil)
		switch {
		case err == nil:
			replayed++
		case errors.As(err, &failure) && ctx.Err() == nil:
			parked[d.Stream] = struct{}{}
			problems = append(problems, fmt.Errorf("event %q at position %d of stream %q failed again: %w", d.Type, d.Position, d.Stream, failure.cause))
			r.folder.forget()
		default:
			return replayed, err
		}
	}
	r.parked = parked
	return replayed, errors.Join(problems...)
}

func (r *runner) replayOne(ctx context.Context, lease Lease, d DeadLetter) error {
	items := make([]item, 0, 1)
	for e, err := range r.engine.store.Read(ctx, eventstore.OneStream(d.Stream), eventstore.ReadOptions{After: d.Position - 1, Through: d.Position}) {
		if err != nil {
			return err
		}
		items = append(items, item{event: &e})
	}
	if len(items) != 1 {
		return fmt.Errorf("%w: no event of stream %q at position %d, where a dead letter was", ErrWrongLog, d.Stream, d.Position)
	}
	r.folder.decode(&items[0])
	_, err := r.folder.apply(ctx, lease, items, func(tx StateTx, _ int) error {
		if err := tx.Fence(lease); err != nil {
			return err
		}
		return tx.Delete(r.deadTable(), deadKey(d.Position))
	})
	return err
}
