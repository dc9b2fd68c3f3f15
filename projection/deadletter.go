package projection

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// DeadLetter is an event that a projection has set aside: one that it failed
// on, or a later one of the same keys, which must not overtake it.
type DeadLetter struct {
	Position eventstore.Position `json:"position"`
	Stream   eventstore.Stream   `json:"stream"`
	Version  uint64              `json:"version"`
	Type     string              `json:"type"`
	EventID  uuid.UUID           `json:"event"`
	// Keys are what it holds back: later events that have one of them, of whatever
	// stream, are set aside as well. They are those of the rows of a view that it
	// touches, or what ParkedBy said. Without any it holds back its stream.
	Keys []string `json:"keys,omitempty"`
	// Error is why; empty for events that only follow a failed one.
	Error string `json:"error,omitempty"`
	// Attempts is how often it was tried.
	Attempts int `json:"attempts,omitempty"`
	// Stack is where the handler panicked, if it did.
	Stack string `json:"stack,omitempty"`
	// At is when it was set aside, by the engine's clock.
	At time.Time `json:"at"`
}

// SkippedEvent is an event that was given up: the projection's rows do not
// contain it, and will not before a rebuild.
type SkippedEvent struct {
	DeadLetter
	// Note says why, in the words of whoever skipped it; By is who that was, and
	// SkippedAt when, by the engine's clock.
	Note      string    `json:"note"`
	By        string    `json:"by,omitempty"`
	SkippedAt time.Time `json:"skipped_at"`
}

// Permanent marks the error of a handler as one that trying again cannot help:
// the event goes to the dead letters at once. An SQL handler returns it; a view's
// handler, which has no error to return, panics with it. Other errors are tried again, up to
// [Options.Attempts] times; those of the database, which wrap [ErrUnavailable],
// until it answers.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

type permanentError struct{ error }

func (e *permanentError) Unwrap() error { return e.error }

// hopeless reports whether trying again cannot help.
func hopeless(err error) bool {
	_, permanent := errors.AsType[*permanentError](err)
	return permanent || errors.Is(err, eventstore.ErrDecode)
}

func deadKey(p eventstore.Position) string { return fmt.Sprintf("%020d", uint64(p)) }

func (r *runner) putDeadLetter(tx StateTx, it *item, cause error, attempts int) error {
	e := it.event
	d := DeadLetter{
		Position: e.Position, Stream: e.Stream, Version: e.Version, Type: e.Type, EventID: e.ID, Keys: r.folder.holds(it),
		Attempts: attempts, At: r.engine.options.Clock.Now(),
	}
	if cause != nil {
		d.Error = cause.Error()
		if panicked, ok := errors.AsType[*PanicError](cause); ok {
			d.Stack = string(panicked.Stack)
		}
	}
	return putJSON(tx, r.deadTable(), deadKey(e.Position), d)
}

func (r *runner) eachDeadLetter(tx StateTx, do func(DeadLetter)) error {
	return eachJSON(tx, r.deadTable(), func(_ string, d DeadLetter) { do(d) })
}

// setAside passes the event by, into the dead letters, and its keys with it.
func (r *runner) setAside(ctx context.Context, lease Lease, it *item, cause error, attempts int) error {
	next := Checkpoint{Log: r.stored.Log, Epoch: lease.Epoch, Position: it.event.Position}
	err := r.engine.state.Update(ctx, func(tx StateTx) error {
		if err := tx.SetCheckpoint(lease, r.stored, next); err != nil {
			return err
		}
		return r.putDeadLetter(tx, it, cause, attempts)
	})
	if err != nil {
		return err
	}
	r.parked.add(it.event.Stream, r.folder.holds(it))
	r.engine.telemetry.deadLetters.Add(ctx, 1, r.attributes)
	r.engine.options.Logger.Error("projection set an event aside", "projection", r.unit,
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
	en, err := e.entry(name)
	if err != nil {
		return nil, err
	}
	var all []DeadLetter
	err = en.each(func(r *runner) error {
		some, err := r.deadLetters(ctx)
		all = append(all, some...)
		return err
	})
	return inOrder(all, func(d DeadLetter) eventstore.Position { return d.Position }), err
}

func (r *runner) deadLetters(ctx context.Context) ([]DeadLetter, error) {
	return read[DeadLetter](ctx, r.engine.state, r.deadTable())
}

// ReplayDeadLetters folds the events that the projection has set aside, in the
// order of the log, and returns how many succeeded. Where one fails again, it
// and the later ones of its keys stay, and the error says so. Keys with
// none left take part again.
//
// No event overtakes another one that has a key in common with it: see
// [ViewDefinition.ParkedBy] and [SQLDefinition.ParkedBy] for what the keys are.
// Everything else that several streams share, such as the tables of an SQL
// projection, gets the replayed events after those that have been folded meanwhile.
//
// When another process runs the projection, that one does it; where it cannot
// be asked, because the state is not [Shared], the error wraps [ErrLeaseHeld].
func (e *Engine) ReplayDeadLetters(ctx context.Context, name string) (replayed int, err error) {
	en, err := e.entry(name)
	if err != nil {
		return 0, err
	}
	err = en.each(func(r *runner) error {
		n := 0
		got, here, _, err := r.askOwner(ctx, order{Action: actionReplay}, func(ctx context.Context, lease Lease) error {
			var err error
			n, err = r.replay(ctx, lease)
			return err
		}, false)
		if !here {
			n = got.Count
		}
		replayed += n
		return err
	})
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
	replayed, parked := 0, parkedKeys{}
	var problems []error
	for _, d := range letters {
		if parked.has(d.Stream, d.Keys) {
			parked.add(d.Stream, d.Keys)
			continue
		}
		items, err := r.letter(ctx, d)
		if err != nil {
			return replayed, err
		}
		// What could not be decoded then, and can be now, may touch more than is stored.
		keys := r.folder.holds(&items[0])
		if parked.has(d.Stream, keys) {
			parked.add(d.Stream, d.Keys)
			parked.add(d.Stream, keys)
			continue
		}
		err = r.replayOne(ctx, lease, d, items)
		failure := (*handlerError)(nil)
		switch {
		case err == nil:
			replayed++
		case errors.As(err, &failure) && ctx.Err() == nil:
			parked.add(d.Stream, d.Keys)
			parked.add(d.Stream, keys)
			problems = append(problems, fmt.Errorf("event %q at position %d of stream %q failed again: %w", d.Type, d.Position, d.Stream, failure.cause))
			r.folder.forget()
		default:
			return replayed, err
		}
	}
	r.parked = parked
	return replayed, errors.Join(problems...)
}

// letter reads the event of a dead letter, and decodes it.
func (r *runner) letter(ctx context.Context, d DeadLetter) ([]item, error) {
	items := make([]item, 0, 1)
	for e, err := range r.engine.store.Read(ctx, eventstore.OneStream(d.Stream), eventstore.ReadOptions{After: d.Position - 1, Through: d.Position}) {
		if err != nil {
			return nil, err
		}
		items = append(items, item{event: &e})
	}
	if len(items) != 1 {
		return nil, fmt.Errorf("%w: no event of stream %q at position %d, where a dead letter was", ErrWrongLog, d.Stream, d.Position)
	}
	r.folder.decode(&items[0])
	return items, nil
}

func (r *runner) replayOne(ctx context.Context, lease Lease, d DeadLetter, items []item) error {
	var applied tally
	_, err := r.folder.apply(ctx, lease, items, func(tx StateTx, _ int) error {
		if err := tx.Fence(lease); err != nil {
			return err
		}
		// Not the one remembered: the projection may not run here.
		was, there, err := getJSON[tally](tx, tallies, r.unit)
		if err != nil {
			return err
		}
		r.tells, applied = there, was.count(items)
		if err := r.putTally(tx, applied); err != nil {
			return err
		}
		return tx.Delete(r.deadTable(), deadKey(d.Position))
	})
	if err == nil {
		r.tally = applied
	}
	return err
}

// SkipDeadLetter gives up one event that the projection has set aside, for
// good: its rows are as if the event had not happened, until a rebuild gives it
// another turn. The note, which must not be empty, says why, and is kept with it;
// see [Engine.Skipped]. Later events of its keys stay set aside until
// [Engine.ReplayDeadLetters] is called.
//
// Skipping an event again does nothing. One that is not set aside is
// [ErrNoDeadLetter]. As for whose process does it, see ReplayDeadLetters.
func (e *Engine) SkipDeadLetter(ctx context.Context, name string, p eventstore.Position, note string) error {
	en, err := e.entry(name)
	if err != nil {
		return err
	}
	if err := checkNote(note); err != nil {
		return err
	}
	err = eachThatHas(en.runners, func(r *runner) error {
		_, _, _, err := r.askOwner(ctx, order{Action: actionSkip, Position: p, Note: note}, func(ctx context.Context, lease Lease) error {
			return r.giveUp(ctx, lease, p, note, e.options.Owner)
		}, false)
		return err
	})
	if err != nil {
		return fmt.Errorf("skip a dead letter of projection %q: %w", name, err)
	}
	return nil
}

// eachThatHas does it for all partitions. That there is no dead letter is an error
// if none has it.
func eachThatHas[P any](parts []P, do func(P) error) error {
	var errs []error
	none := 0
	for _, p := range parts {
		err := do(p)
		if errors.Is(err, ErrNoDeadLetter) {
			if none++; none < len(parts) {
				continue
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// maxNoteBytes bounds what is kept with a skipped event.
const maxNoteBytes = 4096

func checkNote(note string) error {
	if strings.TrimSpace(note) == "" {
		return fmt.Errorf("%w: the note is empty: say why the event is given up", eventstore.ErrInvalid)
	}
	if len(note) > maxNoteBytes {
		return fmt.Errorf("%w: the note has %d bytes, at most %d are kept", eventstore.ErrTooLarge, len(note), maxNoteBytes)
	}
	return nil
}

// giveUp moves the event from the dead letters to those that were skipped.
func (r *runner) giveUp(ctx context.Context, lease Lease, p eventstore.Position, note, by string) error {
	parked := parkedKeys{}
	err := r.engine.state.Update(ctx, func(tx StateTx) error {
		clear(parked)
		if err := tx.Fence(lease); err != nil {
			return err
		}
		letter, there, err := getJSON[DeadLetter](tx, r.deadTable(), deadKey(p))
		if err != nil {
			return err
		}
		skipped := skippedTable(r.unit)
		if !there {
			if _, again, err := tx.Get(skipped, deadKey(p)); err != nil {
				return err
			} else if again {
				return r.eachDeadLetter(tx, func(d DeadLetter) { parked.add(d.Stream, d.Keys) })
			}
			return fmt.Errorf("%w: the projection has set no event at position %d aside", ErrNoDeadLetter, p)
		}
		if err := tx.Delete(r.deadTable(), deadKey(p)); err != nil {
			return err
		}
		if err := putJSON(tx, skipped, deadKey(p), SkippedEvent{DeadLetter: letter, Note: note, By: by, SkippedAt: r.engine.options.Clock.Now()}); err != nil {
			return err
		}
		return r.eachDeadLetter(tx, func(d DeadLetter) { parked.add(d.Stream, d.Keys) })
	})
	if err != nil {
		return err
	}
	r.parked = parked
	r.engine.options.Logger.Warn("an event that the projection had set aside was given up", "projection", r.unit, "position", p, "note", note, "by", by)
	return nil
}

// Skipped returns the events that were given up since the projection was built,
// in the order of the log.
func (e *Engine) Skipped(ctx context.Context, name string) ([]SkippedEvent, error) {
	if _, err := e.entry(name); err != nil {
		return nil, err
	}
	return NewAdmin(e.state, e.options.Owner).Skipped(ctx, name)
}
