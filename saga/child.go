package saga

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
)

// childOptions say what happens to a child when its parent is cancelled.
type childOptions struct{ abandon bool }

// ChildOption changes what a child run has to do with its parent: [Abandon].
type ChildOption func(*childOptions)

// Abandon lets the child go on when its parent is cancelled while it waits for
// it. Without it the child is cancelled too, and the parent waits until it has
// ended.
func Abandon() ChildOption { return func(o *childOptions) { o.abandon = true } }

// Child starts a run of another saga, waits until it has ended, and returns its
// result. The error is a [*StepError] that is recognised as the [ErrFailed] and
// the error of the child. The id is the child's; empty makes one of the parent's and the step.
// When there is a run of the id that this step has not started, the error is
// [ErrStarted]. So no two runs can wait for one another.
//
// For several children side by side use [All].
func Child[In, Out any](s *Run, name string, d *Definition[In, Out], id string, in In, options ...ChildOption) (Out, error) {
	var out Out
	var o childOptions
	for _, option := range options {
		option(&o)
	}
	started, err := s.spawn(name, &d.blueprint, id, in)
	if err != nil {
		return out, err
	}
	ended := func(s *Run) (*origin, error) {
		return s.await(kindChild, name, 0, func(eventstore.Position) *watch {
			return endOf(d.stream(started))
		})
	}
	end, err := ended(s)
	if errors.Is(err, ErrCancelled) && !o.abandon {
		// The child goes first, so that what the parent compensates is not still being done.
		cleanup := s.Detached()
		_, stop := cleanup.effect(kindDo, name, nil, func(step Step) (json.RawMessage, error) {
			err := s.worker.engine.Cancel(step, d.name, started, "its parent was cancelled")
			if err != nil && !errors.Is(err, ErrFinished) {
				return nil, err
			}
			return json.RawMessage("null"), nil
		})
		if stop != nil {
			return out, stop
		}
		if _, waited := ended(cleanup); waited != nil {
			return out, waited
		}
		return out, err
	}
	if err != nil {
		return out, err
	}
	var p payload
	if p, err = decodePayload(&eventstore.Recorded{Data: end.Data}); err != nil {
		s.block(causeMismatch, nil, "the end of child %q does not decode: %v", started, err)
	}
	if end.Type != typeCompleted {
		f := failure{Message: fmt.Sprintf("saga %q, run %q was %s", d.name, started, map[string]string{typeFailed: "not completed", typeCancelled: "cancelled", typeTerminated: "terminated"}[end.Type])}
		if p.Error != nil {
			f = *p.Error
			f.Cancelled = false // it was the child that was, not this run
		}
		f.Is = append(f.Is, ErrFailed.Error())
		return out, &StepError{Step: name, failure: f}
	}
	if err := eventstore.JSON().Unmarshal(p.Result, &out); err != nil {
		s.block(causeMismatch, nil, "the result of child %q does not fit %T: %v", started, out, err)
	}
	return out, nil
}

// StartChild starts a run of another saga and does not wait for it; it goes on
// whatever becomes of this one. The id is the child's; empty makes one of the
// parent's and the step. It returns the id.
func StartChild[In, Out any](s *Run, name string, d *Definition[In, Out], id string, in In) (string, error) {
	return s.spawn(name, &d.blueprint, id, in)
}

// spawn starts a child, once, and returns its id.
func (r *Run) spawn(name string, b *blueprint, id string, in any) (string, error) {
	raw, err := r.effect(kindDo, name, []StepOption{policyOption(whole)}, func(step Step) (json.RawMessage, error) {
		if err := errors.Join(b.mistakes...); err != nil {
			return nil, Terminal(err)
		}
		child := id
		if child == "" {
			child = step.key
		}
		input, err := encode(in)
		if err != nil {
			return nil, err
		}
		by := &parent{Saga: r.saga, ID: r.stream.ID, Step: step.key}
		if err := r.env.start(step, b, child, input, by); err != nil {
			return nil, err
		}
		return encode(child)
	})
	if err != nil {
		return "", err
	}
	var child string
	if err := json.Unmarshal(raw, &child); err != nil {
		r.block(causeMismatch, nil, "the id of child %q does not decode: %v", name, err)
	}
	return child, nil
}

// start appends the beginning of a run, unless it was begun by the same call.
func (env *environment) start(ctx context.Context, b *blueprint, id string, in json.RawMessage, by *parent) error {
	stream := b.stream(id)
	if err := stream.Validate(); err != nil {
		return Terminal(err)
	}
	r := newRun(&core{saga: b.name, stream: stream, ctx: ctx, env: env, h: &history{}})
	meta := command.MetadataOf(ctx)
	if meta.TraceParent == "" {
		meta.TraceParent = traceParent(ctx)
	}
	r.begun(&payload{Format: historyFormat, In: in, Parent: by, Build: b.pin}, meta)
	_, err := env.store.Append(ctx, eventstore.Commit{
		Events:     r.buffer,
		Conditions: []eventstore.Condition{eventstore.StreamAt(stream, eventstore.Revision{})},
	})
	if err == nil {
		return nil
	}
	if !errors.Is(err, eventstore.ErrConflict) {
		return fmt.Errorf("start saga %q, run %q: %w", b.name, id, err)
	}
	for first, err := range env.store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{Limit: 1}) {
		if err != nil {
			return fmt.Errorf("start saga %q, run %q: %w", b.name, id, err)
		}
		p, err := decodePayload(&first)
		if err != nil {
			return err
		}
		if by != nil && (p.Parent == nil || *p.Parent != *by) {
			return Terminal(fmt.Errorf("%w: saga %q, run %q was not started by this step", ErrStarted, b.name, id))
		}
		if by == nil && !sameJSON(p.In, in) {
			return fmt.Errorf("%w: saga %q, run %q has another input", ErrStarted, b.name, id)
		}
		return nil
	}
	return fmt.Errorf("start saga %q, run %q: %w", b.name, id, err)
}
