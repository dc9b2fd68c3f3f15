package saga

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Do runs fn as a durable step: once it has succeeded, its result is recorded
// and fn never runs again. It runs at least once: when the process dies
// between the end of fn and the record, it runs again, with the same
// [Step.IdempotencyKey]. It is tried again after an error, see [StepOption];
// the error that comes back is a [*StepError].
//
// The result is stored as JSON, and comes back decoded from that, also the
// first time.
func Do[T any](s *Run, name string, fn func(Step) (T, error), options ...StepOption) (T, error) {
	return value[T](s, name, func() (json.RawMessage, error) { return s.effect(kindDo, name, options, encoded(fn)) })
}

// Once runs fn at most once, for what must not be repeated and cannot recognise
// a repetition. That it begins is durable before it does; when the process dies
// before its end is recorded, nobody can know how far it came, and the code
// gets an error for which errors.Is(err, [ErrOutcomeUnknown]) holds. The code
// must handle that: ask the other side, or fail. There is one attempt; an error
// of fn comes back as a [*StepError]. Of the options only [Within] and
// [AtMost] apply.
func Once[T any](s *Run, name string, fn func(Step) (T, error), options ...StepOption) (T, error) {
	return value[T](s, name, func() (json.RawMessage, error) { return s.effect(kindOnce, name, options, encoded(fn)) })
}

// Tx runs fn in a transaction of the state's database, exactly once: what it
// writes there and the fact that it did are one transaction. When the process
// dies before the result is recorded in the history too, the result is taken
// from the database, and fn does not run again. It is tried again after an
// error, like [Do]. fn must be short, and must not use the application: where
// the database has one writer, everybody waits for it.
//
// The state's database is the log's own, unless the application was given
// another one. A backend without SQL still runs fn, whose SQL then fails. Where
// nodes have states of their own (deed.Leases), it is the database of the node that
// runs the step, and a node that takes over has another one: exactly once then
// means once in each.
func Tx[T any](s *Run, name string, fn func(step Step, tx projection.Tx) (T, error), options ...StepOption) (T, error) {
	return value[T](s, name, func() (json.RawMessage, error) {
		return s.effect(kindTx, name, options, func(step Step) (json.RawMessage, error) {
			return s.transact(step, func(tx projection.Tx) (json.RawMessage, error) {
				v, err := fn(step, tx)
				if err != nil {
					return nil, err
				}
				return encode(v)
			})
		})
	})
}

// Local records a value that could come out otherwise the next time, such as a
// random number or what is configured today. fn must have no effect, must not
// fail, and should be quick: it may be called again as long as its value has
// not been used.
func Local[T any](s *Run, name string, fn func() T) T {
	v, err := value[T](s, name, func() (json.RawMessage, error) {
		return s.effect(kindLocal, name, nil, func(Step) (json.RawMessage, error) { return encode(fn()) })
	})
	if err != nil && s.outcome.kind == running && !s.gone {
		s.block(causeCode, nil, "the value of %q: %v", name, err)
	}
	return v
}

// Execute executes a command as a durable step. Its effect happens exactly
// once: the command carries an idempotency key made of the run and the step. A
// rejection comes back to the code as a [*StepError] for which
// command.IsRejection holds; other failures are tried again.
func Execute[S any, C command.Command[S]](s *Run, name string, def *aggregate.Definition[S], c C, options ...StepOption) error {
	_, err := s.effect(kindExecute, name, options, func(step Step) (json.RawMessage, error) {
		receipt, err := command.Execute(step, s.env.bus, def, c, command.Key(step.key))
		if err == nil && receipt.First == 0 {
			return json.RawMessage("null"), nil // without events it left no key, and would be judged again
		}
		return nil, err
	})
	return err
}

// value decodes what a step came to.
func value[T any](s *Run, name string, step func() (json.RawMessage, error)) (T, error) {
	var out T
	raw, err := step()
	if err != nil {
		return out, err
	}
	if err := eventstore.JSON().Unmarshal(raw, &out); err != nil {
		s.block(causeMismatch, nil, "the recorded result of step %q does not fit %T: %v", name, out, err)
	}
	return out, nil
}

func encoded[T any](fn func(Step) (T, error)) func(Step) (json.RawMessage, error) {
	return func(step Step) (json.RawMessage, error) {
		v, err := fn(step)
		if err != nil {
			return nil, err
		}
		return encode(v)
	}
}

// doneTx is the table of the steps that were done in a transaction, until their
// history says so too.
func doneTx(saga string) string { return category(saga) + ".tx" }

// transact runs fn in a transaction of the state, unless that was done before.
func (r *Run) transact(step Step, fn func(projection.Tx) (json.RawMessage, error)) (json.RawMessage, error) {
	var result json.RawMessage
	var failure error
	err := r.env.state.Update(step, func(tx projection.StateTx) error {
		// Fencing also makes the updates of this run follow one another.
		if err := tx.Fence(r.lease); err != nil {
			return err
		}
		if step.first {
			if err := forgetTx(tx, r.saga, r.stream.ID, r.transacted()); err != nil {
				return err
			}
		}
		key := r.transacted() + step.key
		done, ok, err := tx.Get(doneTx(r.saga), key)
		if err != nil {
			return err
		}
		if ok {
			result = append(json.RawMessage(nil), done...)
			return nil
		}
		if result, failure = fn(tx); failure != nil {
			return failure
		}
		return tx.Put(doneTx(r.saga), key, result)
	})
	switch {
	case err == nil:
		return result, nil
	case failure != nil && errors.Is(err, failure):
		return nil, failure
	}
	return nil, &stateError{err}
}

// transacted is what the keys of the present life's rows in that table begin with.
func (c *core) transacted() string {
	if c.h.segment == 0 {
		return c.stream.ID + "\x00"
	}
	return fmt.Sprintf("%s\x00c%d\x00", c.stream.ID, c.h.segment)
}

// beginsTx reports whether the next transaction is the first one of a life
// after another one: it removes what those before have left, since a run that
// continues for ever never ends.
func (h *history) beginsTx() bool {
	if h.segment == 0 {
		return false
	}
	for _, records := range h.lines {
		if slices.ContainsFunc(*records, func(rec *record) bool { return rec.id.Kind == kindTx && rec.outcome == typeStepSucceeded }) {
			return false
		}
	}
	return true
}

// forgetTx removes what transactions have left of a run whose history says the
// same, but for what begins with the prefix.
func forgetTx(tx projection.StateTx, saga, run, but string) error {
	var keys []string
	for entry, err := range tx.Scan(doneTx(saga), projection.Range{Prefix: run + "\x00"}) {
		if err != nil {
			return err
		}
		if but == "" || !strings.HasPrefix(entry.Key, but) {
			keys = append(keys, entry.Key)
		}
	}
	for _, key := range keys {
		if err := tx.Delete(doneTx(saga), key); err != nil {
			return err
		}
	}
	return nil
}

// stateError is a failure of the state, which is not the step's fault.
type stateError struct{ err error }

func (e *stateError) Error() string { return "state: " + e.err.Error() }
func (e *stateError) Unwrap() error { return e.err }

// effect is a step that does something outside the history.
func (r *Run) effect(kind, name string, options []StepOption, run func(Step) (json.RawMessage, error)) (json.RawMessage, error) {
	id, rec, ok := r.enter(kind, name)
	if !ok {
		return nil, ErrUnwinding
	}
	if rec != nil {
		switch rec.outcome {
		case typeStepSucceeded, typeSkipped:
			r.now = rec.at
			return rec.result.Result, nil
		case typeStepFailed:
			r.now = rec.at
			return nil, rec.failure()
		}
	}
	if c := r.carried(id); c != nil {
		switch c.outcome {
		case typeStepFailed: // of a step that runs at most once: it is not tried again
			return r.failed(id, 1, *c.result.Error)
		case "":
			return r.failed(id, 1, cutOff())
		}
		r.now = r.emit(typeStepSucceeded, &payload{Step: &id, Result: c.result.Result})
		return c.result.Result, nil
	}
	if kind == kindOnce && rec != nil && rec.began {
		return r.failed(id, 1, cutOff())
	}
	p := defaultPolicy()
	for _, option := range options {
		option.applyStep(&p)
	}
	p.whole = p.whole || kind == kindExecute || kind == kindTx
	early := rec != nil && rec.retryAt.After(r.env.clock.Now())
	perhaps := p.whole && !early && r.mayHave()
	if kind != kindLocal && !perhaps { // a value is recorded whatever happens
		if err := r.interrupted(id); err != nil {
			return nil, err
		}
	}
	if early {
		r.park()
	}
	n := 1
	if rec != nil {
		n = rec.attempts + 1
	}
	if kind == kindOnce {
		p.attempts = 1
	}
	if r.overdue() {
		r.park()
	}
	release := r.admit(&p)
	defer release()
	// Before it is recorded that a step begins that does so once.
	if r.ctx.Err() != nil || r.worker != nil && kind != kindLocal && !r.worker.confirm(r.ctx) {
		r.leave(outcome{kind: abandoned}) // or the process was paused, and another one has the run
	}
	if kind == kindOnce {
		r.emit(typeStepBegan, &payload{Step: &id})
	}
	// A run must have started before it has an effect: its start may lose to
	// that of another run of the same id.
	if kind != kindExecute && kind != kindLocal || r.urgent || r.h.revision.Version == 0 {
		r.flush()
		r.decided = r.decided || kind != kindLocal
		if kind != kindLocal && kind != kindOnce && !perhaps {
			if err := r.interrupted(id); err != nil { // somebody has asked for it meanwhile
				return nil, err
			}
		}
	}
	if r.ctx.Err() != nil {
		r.leave(outcome{kind: abandoned}) // what was done is recorded, and nothing more is begun
	}
	step := Step{key: r.keyOf(id), attempt: n, bus: r.env.bus, beat: r.heart(id), first: kind == kindTx && r.h.beginsTx()}
	ctx := r.context(step.key, p.whole)
	within, total := p.within, time.Duration(0)
	if p.total > 0 {
		if total = r.now.Add(p.total).Sub(r.env.clock.Now()); perhaps {
			total = max(total, time.Second) // whether it was done must be found out
		}
		if total <= 0 {
			return r.failed(id, n-1, failure{Message: fmt.Sprintf("%v after %s and %d attempts", ErrTimeout, p.total, n-1), Timeout: true})
		}
		if within <= 0 || total < within {
			within = total
		}
	}
	var raw json.RawMessage
	r.inStep = id.String()
	r.pass()
	done := func(error) {}
	if kind != kindLocal {
		ctx, done = r.env.tell.span(ctx, r.saga, r.stream.ID, id.Name, "saga", n, r.h.meta.TraceParent)
	}
	err := attempt(ctx, within, p.silence, step, func(step Step) (err error) {
		raw, err = run(step)
		return err
	})
	done(err)
	r.resume()
	r.inStep = ""
	if err == nil {
		step.beat.still()
		if kind == kindExecute && raw != nil {
			raw, r.urgent = nil, true
		}
		r.now = r.emit(typeStepSucceeded, &payload{Step: &id, Result: raw})
		if kind != kindExecute {
			r.decide()
		}
		return raw, nil
	}
	if r.ctx.Err() != nil {
		r.leave(outcome{kind: abandoned})
	}
	if r.scope() == "" && errors.Is(context.Cause(ctx), ErrCancelled) {
		return nil, r.refuse(id)
	}
	if r.beaten() {
		r.park()
	}
	if r.overdue() {
		r.park() // what it came to does not count any more
	}
	var panicked *panicError
	if errors.As(err, &panicked) {
		r.env.logger.Error("saga step panicked", "saga", r.saga, "id", r.stream.ID, "step", name, "panic", panicked.value, "stack", panicked.stack)
	}
	if state, ok := errors.AsType[*stateError](err); ok {
		r.leave(outcome{kind: broken, err: state.err})
	}
	if p.whole && kind != kindTx {
		switch {
		case kind == kindExecute && errors.Is(err, eventstore.ErrKeyReused):
			r.block(causeMismatch, &id, "%s was executed before with another command; the code must ask for the same one again: %v", id, err)
		case errors.Is(err, eventstore.ErrClosed), errors.Is(err, eventstore.ErrUnavailable), errors.Is(err, eventstore.ErrOutcomeUnknown):
			// Not the command's fault: no attempt is counted, and none is the last one
			// before it is known whether it took effect.
			r.leave(outcome{kind: broken, err: err})
		}
	}
	f := failureOf(err)
	retry := r.env.clock.Now().Add(p.pause(step.key, n)).UTC().Round(0)
	permanent := f.Terminal || f.Rejection || p.attempts > 0 && n >= p.attempts || p.hopeless(err) ||
		p.total > 0 && retry.After(r.now.Add(p.total)) ||
		kind == kindExecute && (errors.Is(err, eventstore.ErrInvalid) || errors.Is(err, eventstore.ErrTooLarge))
	if permanent {
		step.beat.still()
		return r.failed(id, n, f)
	}
	r.emit(typeAttemptFailed, &payload{Step: &id, Attempt: n, Due: &retry, Error: &f, Scope: r.scope()})
	r.park()
	return nil, nil
}

// overdue reports whether the branch, or one that it is in, has no time left in
// a race.
func (r *Run) overdue() bool {
	for l := r.line; l != nil; l = l.up {
		if l.late {
			return true
		}
	}
	return false
}

// cutOff is how a step failed that runs at most once, and whose end is not known.
func cutOff() failure {
	return failure{Message: ErrOutcomeUnknown.Error() + ": the process ended while it ran", Unknown: true}
}

// failed records that the step has failed for good.
func (r *Run) failed(id stepID, attempts int, f failure) (json.RawMessage, error) {
	r.now = r.emit(typeStepFailed, &payload{Step: &id, Attempt: attempts, Error: &f})
	r.decide()
	return nil, &StepError{Step: id.Name, failure: f}
}

// keyOf is the idempotency key of a step.
func (r *Run) keyOf(id stepID) string {
	part := id.key()
	if r.h.segment > 0 {
		part += fmt.Sprintf("@@@c%d", r.h.segment)
	}
	if r.h.restarts > 0 {
		part += fmt.Sprintf("@@@r%d", r.h.restarts)
	}
	return keyOf(r.stream.String(), part)
}

// context is that of a step: commands executed with it tell where they come
// from. It ends with the run's branch, and when the run is cancelled, unless the
// step is to be done as a whole.
func (r *Run) context(cause string, whole bool) context.Context {
	ctx := r.live
	switch {
	case r.scope() != "", whole:
		ctx = r.ctx
	case r.steps != nil:
		ctx = r.steps
	}
	ctx = command.WithCausation(command.WithCorrelation(ctx, r.h.meta.CorrelationID), cause)
	if r.h.meta.Actor != "" {
		ctx = command.WithActor(ctx, r.h.meta.Actor)
	}
	return ctx
}
