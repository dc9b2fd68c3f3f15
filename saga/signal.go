package saga

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
)

// Signal is something that a run can be told, with a value of type T. Make it
// with [NewSignal], once, as a package variable.
type Signal[T any] struct {
	name    string
	mistake error
}

// NewSignal returns the signal of the name, which is part of the stored
// contract, as is the JSON form of T.
func NewSignal[T any](name string) Signal[T] {
	s := Signal[T]{name: name}
	if problem := checkName(name); problem != "" {
		s.mistake = fmt.Errorf("%w: signal name %q: the name %s", eventstore.ErrInvalid, name, problem)
	}
	return s
}

// Name returns the signal's name.
func (s Signal[T]) Name() string { return s.name }

// Send tells a run of the saga, and returns when that is durable: whoever runs
// it, now or later, gets it, each signal once and in their order. The run keeps
// what it has not taken yet, also when it continues anew ([Run.Continue]).
//
// Each call is a signal of its own, unless [SignalID] says which one it is.
//
// The error is [ErrFinished] when the run has ended, and [ErrNotFound] when
// there is none.
func (s Signal[T]) Send(ctx context.Context, host Host, p Process, run string, value T, options ...SignalOption) error {
	var o signalOptions
	for _, option := range options {
		option(&o)
	}
	if s.mistake != nil {
		return s.mistake
	}
	raw, err := encode(value)
	if err != nil {
		return err
	}
	return host.Sagas().Signal(ctx, p.Name(), run, s.name, o.id, raw)
}

type signalOptions struct{ id string }

// SignalOption changes how a signal is sent: [SignalID].
type SignalOption func(*signalOptions)

// SignalID names a signal, so that sending it again does no harm: a run gets one
// of the name and id once.
func SignalID(id string) SignalOption { return func(o *signalOptions) { o.id = id } }

// Signal is [Signal.Send] for tools that do not know the types: value is the
// signal's JSON.
func (e *Engine) Signal(ctx context.Context, saga, run, signal, id string, value json.RawMessage) error {
	if problem := checkName(signal); problem != "" {
		return fmt.Errorf("%w: signal name %q: the name %s", eventstore.ErrInvalid, signal, problem)
	}
	if !json.Valid(value) {
		return fmt.Errorf("%w: the value of signal %q is not JSON: %q", eventstore.ErrInvalid, signal, value)
	}
	key := ""
	if id != "" {
		key = keyOf("signal:"+signal, id)
	}
	return e.tell(ctx, saga, run, typeSignalled, &payload{Name: signal, In: value}, key)
}

// tell appends an event to the history of a run that has not ended. The key, if
// there is one, makes it happen once for each run.
func (e *Engine) tell(ctx context.Context, saga, run, eventType string, p *payload, key string) error {
	stream := eventstore.Stream{Category: category(saga), ID: run}
	if err := stream.Validate(); err != nil {
		return err
	}
	data, err := encodePayload(p)
	if err != nil {
		return err
	}
	if key != "" {
		key = keyOf(stream.String(), key) // keys may be those of the whole log
	}
	about := func(err error) error { return fmt.Errorf("saga %q, run %q: %w", saga, run, err) }
	for n := 0; ; n++ {
		last, err := e.last(ctx, stream)
		if err != nil {
			return about(err)
		}
		if last == nil || ends(last.Type) {
			if last != nil && key != "" {
				if _, had, err := e.env.store.Lookup(ctx, stream, key); err != nil {
					return about(err)
				} else if had {
					return nil
				}
			}
			if last == nil {
				return fmt.Errorf("%w: saga %q has no run %q", ErrNotFound, saga, run)
			}
			return about(fmt.Errorf("%w: its history ends with %s", ErrFinished, last.Type))
		}
		meta := command.MetadataOf(ctx)
		meta.CorrelationID = last.Metadata.CorrelationID
		_, err = e.env.store.Append(ctx, eventstore.Commit{
			Events:     []eventstore.Event{{Stream: stream, Type: eventType, Data: data, Time: e.env.clock.Now(), Metadata: meta}},
			Conditions: []eventstore.Condition{eventstore.StreamAt(stream, last.Revision())},
			Key:        key,
		})
		if err == nil || !errors.Is(err, eventstore.ErrConflict) {
			if err != nil {
				return about(err)
			}
			return nil
		}
		// The run went on at the same moment.
		if !pause(ctx, min(time.Duration(n)*time.Millisecond, 50*time.Millisecond)) {
			return about(context.Cause(ctx))
		}
	}
}

// last returns the last event of the stream, nil if it has none.
func (e *Engine) last(ctx context.Context, stream eventstore.Stream) (*eventstore.Recorded, error) {
	for r, err := range e.env.store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{Backward: true, Limit: 1}) {
		if err != nil {
			return nil, err
		}
		return &r, nil
	}
	return nil, nil
}

// Wait waits, within a run, until the signal comes, and takes it: the oldest
// that the run has not taken yet. After the timeout, counted from [Run.Now], the
// error is [ErrTimeout]; a signal that has come by the time the timeout is
// handled wins. A timeout of 0 or less waits for ever.
func (s Signal[T]) Wait(r *Run, timeout time.Duration) (T, error) {
	var none T
	if s.mistake != nil {
		r.own("Wait")
		r.block(causeCode, nil, "%v", s.mistake)
	}
	raw, err := r.signal(s.name, timeout)
	if err != nil {
		return none, err
	}
	var value T
	if err := eventstore.JSON().Unmarshal(raw, &value); err != nil {
		r.block(causeMismatch, nil, "signal %q does not decode into %T: %v", s.name, value, err)
	}
	return value, nil
}

func (r *Run) signal(name string, timeout time.Duration) (json.RawMessage, error) {
	id, rec, ok := r.enter(kindSignal, name)
	if !ok {
		return nil, ErrUnwinding
	}
	if rec != nil {
		switch rec.outcome {
		case typeSignalTimedOut:
			r.now = rec.at
			return nil, ErrTimeout
		case typeStepFailed:
			r.now = rec.at
			return nil, rec.failure()
		case typeSignalTaken:
			r.now = rec.at
			return rec.result.In, nil
		}
	}
	if c := r.carried(id); c != nil {
		r.now = r.emit(typeSignalTaken, &payload{Step: &id, Number: c.result.Number, In: c.result.In})
		return c.result.In, nil
	}
	if err := r.interrupted(id); err != nil {
		return nil, err
	}
	var due *time.Time
	if rec != nil {
		due = rec.set.Due
	} else if timeout > 0 {
		at := r.now.Add(timeout).UTC().Round(0)
		due = &at
	}
	overdue := due != nil && !due.After(r.env.clock.Now())
	if overdue {
		// What others have told the run by now counts.
		r.flush()
		if _, err := r.rebase(); err != nil {
			r.leave(outcome{kind: broken, err: err})
		}
	}
	for _, s := range r.h.signals {
		if s.name == name && !s.taken {
			s.taken = true
			r.now = r.emit(typeSignalTaken, &payload{Step: &id, Number: s.number, In: s.data})
			r.decide()
			return s.data, nil
		}
	}
	switch {
	case overdue:
		r.now = r.emit(typeSignalTimedOut, &payload{Step: &id})
		r.decide()
		return nil, ErrTimeout
	case rec == nil:
		r.emit(typeSignalAwaited, &payload{Step: &id, Due: due, Scope: r.scope()})
	}
	r.park()
	return nil, nil
}
