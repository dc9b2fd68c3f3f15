package saga

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/clock"
)

// maxNameBytes bounds the names of steps.
const maxNameBytes = 128

// Run is one run of a saga, as its function sees it. It belongs to the
// goroutine that the function was called on: a call from another one ends that
// goroutine, and blocks the run with a message. It must not be used inside a
// step, nor kept.
type Run struct {
	saga   string
	stream eventstore.Stream
	ctx    context.Context
	env    *environment // nil: replay only, nothing new happens
	code   func(*Run, json.RawMessage) (json.RawMessage, error)

	h      *history
	next   int // the next record to match
	buffer []eventstore.Event
	// written are the payloads of the buffer; the history takes them once they
	// are durable.
	written []*payload
	// urgent says that the buffer holds what could come out otherwise if it were
	// lost; it must be durable before anything is done that depends on it.
	urgent    bool
	now       time.Time
	counts    map[stepID]int
	in        string // the compensation that runs
	rollbacks []rollback
	settled   int // so many of the rollbacks are past
	consumed  []eventstore.Position
	cursors   map[string]eventstore.Position
	event     *eventstore.Recorded // delivered to the await that waits
	routed    eventstore.Position  // events up to here have been offered to it
	inStep    string
	misuse    atomic.Pointer[string]
	outcome   outcome
	replay    *eventstore.Encoding // without env
}

// environment is what a run acts on.
type environment struct {
	store    eventstore.Store
	clock    clock.Clock
	bus      *command.Bus
	encoding *eventstore.Encoding
	logger   *slog.Logger
}

type rollback struct {
	id stepID
	fn func(*Run) error
}

type outcomeKind uint8

const (
	running outcomeKind = iota
	suspended
	finished
	blocked
	conflicted // another engine wrote the history
	abandoned  // the engine stops
	broken     // the store failed
)

type outcome struct {
	kind   outcomeKind
	cause  string
	reason string
	step   *stepID
	err    error
}

// ID returns the run's id.
func (r *Run) ID() string { return r.stream.ID }

// Now returns the time at which the history stands: that of the last thing
// that happened in the run, and at first that of the event that started it,
// also when it was started late. It is the same at every replay; time.Now is not.
func (r *Run) Now() time.Time {
	r.own("Now")
	if len(r.buffer) > 0 {
		r.urgent = true // what depends on the time must not be done before it is durable
	}
	return r.now
}

// Sleep waits for d from [Run.Now] on, in the store and not in memory: nothing
// of the run remains in the process meanwhile but its entry in the list of due
// times. The error is reserved: today only [ErrUnwinding].
func (r *Run) Sleep(name string, d time.Duration) error {
	return r.sleep(name, func() time.Time { return r.now.Add(d) })
}

// Until waits like [Run.Sleep], for an instant by the engine's clock. One in
// the past is over at once.
func (r *Run) Until(name string, at time.Time) error {
	return r.sleep(name, func() time.Time { return at })
}

func (r *Run) sleep(name string, due func() time.Time) error {
	id, rec, ok := r.enter(kindSleep, name)
	if !ok {
		return ErrUnwinding
	}
	if rec != nil && rec.outcome != "" {
		r.now = rec.at
		return nil
	}
	if c := r.carried(id); c != nil {
		r.emit(typeTimerSet, &payload{Step: &id, Due: c.set.Due})
		r.now = r.emit(typeTimerFired, &payload{Step: &id})
		return nil
	}
	var at time.Time
	if rec != nil && rec.set.Due != nil {
		at = *rec.set.Due
	} else {
		at = due().UTC().Round(0)
		r.emit(typeTimerSet, &payload{Step: &id, Due: &at})
	}
	if at.After(r.env.clock.Now()) {
		r.leave(outcome{kind: suspended})
	}
	r.now = r.emit(typeTimerFired, &payload{Step: &id})
	return nil
}

// OnRollback registers a compensation: if the function returns an error later,
// the compensations run in reverse order, each until it succeeds. What fn does
// with the run it is given are durable steps too. One that returns an error
// blocks the run until [Engine.Resume]; none is ever skipped.
//
// Register it before a step that may have happened although it failed, and
// after a step that either happened or did not, such as [Execute].
func (r *Run) OnRollback(name string, fn func(*Run) error) {
	if r.in != "" && r.outcome.kind == running {
		r.own("OnRollback")
		r.block(causeCode, nil, "OnRollback(%q) was called in compensation %q: compensations have none of their own", name, r.in)
	}
	id, rec, ok := r.enter(kindOnRollback, name)
	if !ok {
		return
	}
	if rec == nil {
		r.emit(typeRollbackAdded, &payload{Step: &id})
	}
	r.rollbacks = append(r.rollbacks, rollback{id, fn})
}

// Settled says that from here on nothing that came before is rolled back.
func (r *Run) Settled() {
	if r.in != "" && r.outcome.kind == running {
		r.own("Settled")
		r.block(causeCode, nil, "Settled was called in compensation %q", r.in)
	}
	id, rec, ok := r.enter(kindSettled, "")
	if !ok {
		return
	}
	if rec == nil {
		r.emit(typeSettled, &payload{Step: &id})
	}
	r.settled = len(r.rollbacks)
}

// Do runs fn as a durable step: once it has succeeded, its result is recorded
// and fn never runs again. It runs at least once: when the process dies
// between the end of fn and the record, it runs again, with the same
// [Step.IdempotencyKey]. It is tried again after an error, see [StepOption];
// the error that comes back is a [*StepError].
//
// The result is stored as JSON, and comes back decoded from that, also the
// first time.
func Do[T any](s *Run, name string, fn func(Step) (T, error), options ...StepOption) (T, error) {
	var out T
	raw, err := s.effect(kindDo, name, options, func(step Step) (json.RawMessage, error) {
		value, err := fn(step)
		if err != nil {
			return nil, err
		}
		return encode(value)
	})
	if err != nil {
		return out, err
	}
	if err := eventstore.JSON().Unmarshal(raw, &out); err != nil {
		s.block(causeMismatch, nil, "the recorded result of step %q does not fit %T: %v", name, out, err)
	}
	return out, nil
}

// Execute executes a command as a durable step. Its effect happens exactly
// once: the command carries an idempotency key made of the run and the step. A
// rejection comes back to the code as a [*StepError] for which
// command.IsRejection holds; other failures are tried again.
func Execute[S any, C command.Command[S]](s *Run, name string, def *aggregate.Definition[S], c C, options ...StepOption) error {
	_, err := s.effect(kindExecute, name, options, func(step Step) (json.RawMessage, error) {
		receipt, err := command.Execute(step, s.env.bus, def, c, command.Key(step.key))
		if err == nil && receipt.First == 0 {
			s.urgent = true // without events it left no key, and would be judged again
		}
		return nil, err
	})
	return err
}

// Await waits for an event of type E that matches, durably and without a
// goroutine. It sees the events since the run began (those after its trigger,
// or after [Start]), each one once: the next Await of the same type continues
// where this one ended. After the timeout, counted from [Run.Now], the error
// is [ErrTimeout]; an event that is in the log when the timeout is handled
// wins. A timeout of 0 or less waits for ever.
func Await[E Event](s *Run, match Match, timeout time.Duration) (E, error) {
	var none E
	name, err := eventTypeOf[E]()
	if err != nil {
		s.own("Await")
		s.block(causeCode, nil, "Await: %v", err)
		return none, ErrUnwinding
	}
	o, err := s.await(name, match, timeout)
	if err != nil {
		return none, err
	}
	event, err := decodeEvent[E](s.encoding(), o.recorded())
	if err != nil {
		s.block(causeMismatch, nil, "the awaited event does not decode: %v", err)
	}
	return event, nil
}

func (r *Run) await(name string, match Match, timeout time.Duration) (*origin, error) {
	id, rec, ok := r.enter(kindAwait, name)
	if !ok {
		return nil, ErrUnwinding
	}
	cursor := fmt.Sprintf("%s %q %q %q", name, match.Category, match.StreamID, match.Tag)
	received := func(o *origin) *origin {
		r.consumed = append(r.consumed, o.Position)
		if r.cursors == nil {
			r.cursors = map[string]eventstore.Position{}
		}
		r.cursors[cursor] = o.Position
		return o
	}
	if rec != nil && rec.outcome != "" {
		r.now = rec.at
		if rec.outcome == typeAwaitTimedOut {
			return nil, ErrTimeout
		}
		return received(rec.result.Event), nil
	}
	if c := r.carried(id); c != nil {
		r.emit(typeAwaitSet, &payload{Step: &id, Watch: c.set.Watch, Due: c.set.Due})
		r.now = r.emit(typeAwaitReceived, &payload{Step: &id, Event: c.result.Event})
		return received(c.result.Event), nil
	}
	if rec == nil {
		w := &watch{Types: r.encoding().StoredTypes(name), Match: match, Since: r.began()}
		w.Since = max(w.Since, r.cursors[cursor])
		for _, p := range r.consumed {
			if p > w.Since {
				w.Skip = append(w.Skip, p)
			}
		}
		p := &payload{Step: &id, Watch: w}
		if timeout > 0 {
			due := r.now.Add(timeout).UTC().Round(0)
			p.Due = &due
		}
		r.emit(typeAwaitSet, p)
		r.leave(outcome{kind: suspended})
	}
	w := rec.set.Watch
	if w == nil {
		r.block(causeMismatch, nil, "the history of %s does not say what it waits for", id)
	}
	event := r.event
	r.event = nil
	due := rec.set.Due
	if event == nil && due != nil && !due.After(r.env.clock.Now()) {
		// The timeout counts only if the event is not in the log by now.
		found, err := first(r.ctx, r.env.store, w, max(w.Since, r.routed), 0)
		if err != nil {
			r.leave(outcome{kind: broken, err: err})
		}
		event = found
		if event == nil {
			r.now = r.emit(typeAwaitTimedOut, &payload{Step: &id})
			r.urgent = true
			return nil, ErrTimeout
		}
	}
	if event == nil {
		r.leave(outcome{kind: suspended})
	}
	o := originOf(event, true)
	r.now = r.emit(typeAwaitReceived, &payload{Step: &id, Event: o})
	r.urgent = true
	return received(o), nil
}

// first returns the first event that the watch takes after the position, nil
// if there is none up to through (0: the head).
func first(ctx context.Context, store eventstore.Store, w *watch, after, through eventstore.Position) (*eventstore.Recorded, error) {
	for event, err := range store.Read(ctx, w.query(), eventstore.ReadOptions{After: after, Through: through}) {
		if err != nil {
			return nil, err
		}
		if w.takes(&event) {
			return &event, nil
		}
	}
	return nil, nil
}

// began is the position after which the run sees events.
func (r *Run) began() eventstore.Position {
	if r.h.started.Since > 0 {
		return r.h.started.Since
	}
	return r.h.position
}

func (r *Run) encoding() *eventstore.Encoding {
	if r.env == nil {
		return r.replay
	}
	return r.env.encoding
}

// effect is a step that does something outside the history.
func (r *Run) effect(kind, name string, options []StepOption, run func(Step) (json.RawMessage, error)) (json.RawMessage, error) {
	id, rec, ok := r.enter(kind, name)
	if !ok {
		return nil, ErrUnwinding
	}
	n := 1
	if rec != nil {
		switch rec.outcome {
		case typeStepSucceeded:
			r.now = rec.at
			return rec.result.Result, nil
		case typeStepFailed:
			r.now = rec.at
			return nil, &StepError{Step: name, failure: *rec.result.Error}
		}
		if rec.retryAt.After(r.env.clock.Now()) {
			r.leave(outcome{kind: suspended})
		}
		n = rec.attempts + 1
	}
	if c := r.carried(id); c != nil {
		r.now = r.emit(typeStepSucceeded, &payload{Step: &id, Result: c.result.Result})
		return c.result.Result, nil
	}
	// A run must have started before it has an effect: its start may lose to
	// that of another run of the same id.
	if kind == kindDo || r.urgent || r.h.revision.Version == 0 {
		r.flush()
	}
	if r.ctx.Err() != nil {
		r.leave(outcome{kind: abandoned}) // what was done is recorded, and nothing more is begun
	}
	p := defaultPolicy()
	for _, option := range options {
		option.applyStep(&p)
	}
	step := Step{key: keyOf(r.stream.String(), id.key()), attempt: n, bus: r.env.bus}
	var raw json.RawMessage
	r.inStep = id.String()
	err := attempt(r.context(step.key), p.within, step, func(step Step) (err error) {
		raw, err = run(step)
		return err
	})
	r.inStep = ""
	if err == nil {
		r.now = r.emit(typeStepSucceeded, &payload{Step: &id, Result: raw})
		r.urgent = r.urgent || kind == kindDo
		return raw, nil
	}
	if r.ctx.Err() != nil {
		r.leave(outcome{kind: abandoned})
	}
	var panicked *panicError
	if errors.As(err, &panicked) {
		r.env.logger.Error("saga step panicked", "saga", r.saga, "id", r.stream.ID, "step", name, "panic", panicked.value, "stack", panicked.stack)
	}
	if kind == kindExecute {
		switch {
		case errors.Is(err, eventstore.ErrKeyReused):
			r.block(causeMismatch, &id, "%s was executed before with another command; the code must ask for the same one again: %v", id, err)
		case errors.Is(err, eventstore.ErrClosed), errors.Is(err, eventstore.ErrUnavailable), errors.Is(err, eventstore.ErrOutcomeUnknown):
			// Not the command's fault: no attempt is counted, and none is the last one
			// before it is known whether it took effect.
			r.leave(outcome{kind: broken, err: err})
		}
	}
	f := failureOf(err)
	permanent := f.Terminal || f.Rejection || p.attempts > 0 && n >= p.attempts ||
		kind == kindExecute && (errors.Is(err, eventstore.ErrInvalid) || errors.Is(err, eventstore.ErrTooLarge))
	if permanent {
		r.now = r.emit(typeStepFailed, &payload{Step: &id, Attempt: n, Error: &f})
		r.urgent = true
		return nil, &StepError{Step: name, failure: f}
	}
	retry := r.env.clock.Now().Add(p.pause(step.key, n)).UTC().Round(0)
	r.emit(typeAttemptFailed, &payload{Step: &id, Attempt: n, Due: &retry, Error: &f})
	r.leave(outcome{kind: suspended})
	return nil, nil
}

// context is that of a step: commands executed with it tell where they come from.
func (r *Run) context(cause string) context.Context {
	ctx := command.WithCausation(command.WithCorrelation(r.ctx, r.h.meta.CorrelationID), cause)
	if r.h.meta.Actor != "" {
		ctx = command.WithActor(ctx, r.h.meta.Actor)
	}
	return ctx
}

// enter begins a saga call. It returns the history's record of the step, nil
// if the step is new, or false while the run is being put aside.
func (r *Run) enter(kind, name string) (stepID, *record, bool) {
	id := stepID{Kind: kind, Name: name, In: r.in}
	r.own(id.String())
	if r.outcome.kind != running {
		return id, nil, false
	}
	if kind != kindSettled {
		if problem := checkName(name); problem != "" {
			r.block(causeCode, nil, "%s: the name %s", id, problem)
		}
	}
	r.counts[id]++
	if n := r.counts[id]; n > 1 {
		id.Occurrence = n
	}
	return id, r.match(id), true
}

// match returns the record of the next step of the history, which must be id.
func (r *Run) match(id stepID) *record {
	if r.next < len(r.h.records) {
		rec := r.h.records[r.next]
		r.next++
		if rec.id != id {
			r.block(causeMismatch, &id, "step %d: history has %s, code asks %s", r.next, rec.id, id)
		}
		if rec.outcome == "" && r.env == nil {
			r.leave(outcome{kind: suspended})
		}
		if !rec.at.IsZero() {
			r.now = rec.at
		}
		return rec
	}
	if r.env == nil {
		r.leave(outcome{kind: suspended})
	}
	if r.h.finished != nil {
		r.block(causeMismatch, &id, "step %d: history has ended, code asks %s", r.next+1, id)
	}
	r.next++
	return nil
}

func (r *Run) carried(id stepID) *record { return r.h.carried[id] }

func checkName(name string) string {
	switch {
	case name == "":
		return "is empty"
	case len(name) > maxNameBytes:
		return fmt.Sprintf("has %d bytes, at most %d are allowed", len(name), maxNameBytes)
	case !utf8.ValidString(name):
		return "is not valid UTF-8"
	}
	for _, c := range name {
		if unicode.IsControl(c) {
			return fmt.Sprintf("has the control character %U", c)
		}
	}
	return ""
}

// own refuses calls from where the run must not be used.
func (r *Run) own(call string) {
	if !onCodeGoroutine() {
		message := fmt.Sprintf("%s was called on another goroutine than the saga's function; a run belongs to one goroutine", call)
		r.misuse.CompareAndSwap(nil, &message)
		if r.env != nil {
			r.env.logger.Error("saga call on a foreign goroutine, which ends here", "saga", r.saga, "id", r.stream.ID, "call", call)
		}
		runtime.Goexit()
	}
	if r.outcome.kind != running {
		return
	}
	if message := r.misuse.Load(); message != nil {
		r.block(causeCode, nil, "%s", *message)
	}
	if r.inStep != "" {
		step := r.inStep
		r.inStep = ""
		r.block(causeCode, nil, "%s was called inside step %s: steps do not nest; use what the step is given", call, step)
	}
}

// leave ends the code here: deferred functions run, nothing else does.
func (r *Run) leave(o outcome) {
	if r.outcome.kind == running {
		r.outcome = o
	}
	runtime.Goexit()
}

func (r *Run) block(cause string, step *stepID, format string, a ...any) {
	r.leave(outcome{kind: blocked, cause: cause, step: step, reason: fmt.Sprintf(format, a...)})
}

// emit buffers a history event and returns its time.
func (r *Run) emit(eventType string, p *payload) time.Time {
	if r.h.blocked != nil {
		r.h.blocked = nil
		r.emit(typeResumed, &payload{})
	}
	data, err := encodePayload(p)
	if err != nil {
		r.block(causeCode, p.Step, "event %s does not encode: %v", eventType, err)
	}
	at := r.env.clock.Now().UTC().Round(0)
	r.buffer = append(r.buffer, eventstore.Event{
		Stream: r.stream, Type: eventType, Data: data, Time: at,
		Metadata: eventstore.Metadata{CorrelationID: r.h.meta.CorrelationID, CausationID: r.h.meta.CausationID, Actor: r.h.meta.Actor},
	})
	r.written = append(r.written, p)
	const most = 500
	if len(r.buffer) >= most {
		r.flush()
	}
	return at
}

// flush makes the buffer durable, or leaves.
func (r *Run) flush() {
	if o := r.write(); o.kind != running {
		r.leave(o)
	}
}

func (r *Run) write() outcome {
	if len(r.buffer) == 0 {
		return outcome{}
	}
	receipt, err := r.env.store.Append(context.WithoutCancel(r.ctx), eventstore.Commit{
		Events:     r.buffer,
		Conditions: []eventstore.Condition{eventstore.StreamAt(r.stream, r.h.revision)},
	})
	switch {
	case err == nil:
		n := uint64(len(r.buffer))
		last := receipt.Revision(r.stream)
		for i, p := range r.written {
			behind := n - 1 - uint64(i)
			at := eventstore.Revision{Version: last.Version - behind, Position: last.Position - eventstore.Position(behind)}
			if err := r.h.apply(r.buffer[i].Type, p, r.buffer[i].Time, at); err != nil {
				return outcome{kind: broken, err: err}
			}
		}
		r.h.revision = last
		r.buffer, r.written, r.urgent = nil, nil, false
		return outcome{}
	case errors.Is(err, eventstore.ErrConflict):
		return outcome{kind: conflicted, err: err}
	case errors.Is(err, eventstore.ErrTooLarge), errors.Is(err, eventstore.ErrInvalid):
		r.buffer, r.written = nil, nil
		return outcome{kind: blocked, cause: causeCode, reason: fmt.Sprintf("its history cannot be written: %v", err)}
	}
	return outcome{kind: broken, err: err}
}

// execute runs the code on a goroutine of its own until it ends or must wait,
// and returns why it ended.
func (r *Run) execute() outcome {
	done := make(chan struct{})
	go runCode(r, done)
	<-done
	return r.outcome
}

// runCode is the outermost function of every goroutine that runs a saga's code.
func runCode(r *Run, done chan<- struct{}) {
	defer close(done)
	growStack(len(r.saga))
	returned := false
	defer func() {
		p := recover()
		switch {
		case p != nil:
			if r.env != nil {
				r.env.logger.Error("saga panicked", "saga", r.saga, "id", r.stream.ID, "panic", p, "stack", stack())
			}
			r.outcome = outcome{kind: blocked, cause: causeCode, reason: fmt.Sprintf("the code panicked: %v", p)}
		case !returned && r.outcome.kind == running:
			r.outcome = outcome{kind: blocked, cause: causeCode, reason: "the code ended its goroutine by runtime.Goexit"}
		}
	}()
	r.now = r.h.startedAt
	r.counts = map[stepID]int{}
	result, err := r.code(r, r.h.started.In)
	r.end(result, err)
	returned = true
}

// growStack makes room for the code at once, while there is nothing on the
// stack to move; it would grow in several steps otherwise.
//
//go:noinline
func growStack(n int) byte {
	var room [12 << 10]byte
	return room[n&0xfff]
}

// end records how the code ended, after rolling back if it failed.
func (r *Run) end(result json.RawMessage, err error) {
	if message := r.misuse.Load(); message != nil {
		r.block(causeCode, nil, "%s", *message)
	}
	last := payload{Result: result}
	lastType := typeCompleted
	if err != nil {
		lastType = typeFailed
		f := failureOf(err)
		last = payload{Error: &f}
		if pending := r.rollbacks[r.settled:]; len(pending) > 0 {
			id := stepID{Kind: kindRollback}
			if rec := r.match(id); rec == nil {
				r.emit(typeRollbackBegan, &payload{Step: &id, Error: &f})
				r.urgent = true
			} else if rec.result.Error != nil {
				last.Error = rec.result.Error
			}
			for _, rb := range slices.Backward(pending) {
				r.in = rb.id.label()
				err := rb.fn(r)
				if err != nil {
					r.block(causeCompensation, &stepID{Kind: kindCompensated, Name: rb.id.Name, Occurrence: rb.id.Occurrence, In: r.in}, "compensation %q failed: %v; Resume tries it again", r.in, err)
				}
				r.in = ""
				id := stepID{Kind: kindCompensated, Name: rb.id.Name, Occurrence: rb.id.Occurrence}
				if rec := r.match(id); rec == nil {
					r.emit(typeCompensated, &payload{Step: &id})
				}
				last.Compensated = append(last.Compensated, rb.id.label())
			}
		}
	}
	if r.next < len(r.h.records) {
		r.block(causeMismatch, nil, "step %d: history has %s, code has ended", r.next+1, r.h.records[r.next].id)
	}
	if r.h.finished != nil {
		if r.h.finishedType != lastType {
			r.block(causeMismatch, nil, "history has %s, code ended with %s", r.h.finishedType, lastType)
		}
	} else if r.env != nil {
		r.emit(lastType, &last)
	}
	r.outcome = outcome{kind: finished}
}

func encode(value any) (json.RawMessage, error) {
	raw, err := eventstore.JSON().Marshal(value)
	if err != nil {
		return nil, Terminal(fmt.Errorf("%w: a %T does not encode as JSON: %w", eventstore.ErrInvalid, value, err))
	}
	return raw, nil
}

type panicError struct {
	value any
	stack string
}

func (p *panicError) Error() string { return fmt.Sprintf("panic: %v", p.value) }

func stack() string { return string(debug.Stack()) }

// onCodeGoroutine reports whether the caller runs on a goroutine that a run
// started for its code: one whose outermost function is runCode. It
// only serves to refuse calls, and gives very deep stacks the benefit of the
// doubt.
func onCodeGoroutine() bool {
	var pcs [96]uintptr
	n := runtime.Callers(2, pcs[:])
	if n < 2 || n == len(pcs) {
		return true
	}
	f := runtime.FuncForPC(pcs[n-2] - 1)
	return f == nil || f.Entry() == codeEntry()
}

// codeEntry is the entry of runCode.
var codeEntry = sync.OnceValue(func() uintptr { return reflect.ValueOf(runCode).Pointer() })
