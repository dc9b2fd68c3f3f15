package saga

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/projection"
)

// maxNameBytes bounds the names of steps.
const maxNameBytes = 128

// Run is one run of a saga, as its function sees it. It belongs to the
// goroutine that the function was called on: a call from another one ends that
// goroutine, and blocks the run with a message. It must not be used inside a
// step, nor kept. A parallel branch ([All], [Race]) gets a Run of its own, and
// uses no other.
type Run struct {
	*core
	*line
	detached bool // not ended by a request to cancel the run
}

// core is what the branches of a run share. They take turns: only who has the
// baton touches it.
type core struct {
	saga   string
	stream eventstore.Stream
	ctx    context.Context
	live   context.Context // of steps: also ends when the run is to be cancelled
	env    *environment    // nil: replay only, nothing new happens
	code   func(*Run, json.RawMessage) (json.RawMessage, error)
	build  string
	worker *sagaWorker // nil without an engine
	lease  projection.Lease

	h      *history
	buffer []eventstore.Event
	// written are the payloads of the buffer; the history takes them once they
	// are durable.
	written []*payload
	// urgent says that the buffer holds what could come out otherwise if it were
	// lost; it must be durable before anything is done that depends on it.
	urgent    bool
	rollbacks []rollback
	consumed  []eventstore.Position
	cursors   map[string]eventstore.Position
	events    map[string]*eventstore.Recorded // delivered to awaits, by the step's key
	routed    eventstore.Position             // events up to here have been offered to them
	misuse    atomic.Pointer[string]
	outcome   outcome
	replay    *eventstore.Encoding // without env
	row       *row

	turn  *line         // who has the baton
	baton chan struct{} // a semaphore of one, once there are branches
	root  *line
}

// line is a sequence of steps that follow one another: the function with its
// compensations, or one branch.
type line struct {
	id          lineID
	next        int // the next record to match
	counts      map[stepID]int
	markers     map[string]int
	now         time.Time
	in          string // the compensation that runs
	inStep      string
	gone        bool            // it was put aside, or has ended
	up          *line           // of which this is a branch
	sleepsUntil time.Time       // it was put aside to sleep
	late        bool            // another branch of a race has slept long enough
	lost        bool            // another branch has won the race
	closed      bool            // and that is in the history
	steps       context.Context // of its steps, in a branch
	noticed     bool            // that the run is cancelled: a call has said so
	refused     int             // calls in a row that were refused because the run is cancelled
	decided     bool            // see mayHave
	yielded     chan struct{}   // closed when a branch lets go of the baton for the first time
	hasYielded  bool
}

// beaten reports whether another branch has won a race that the line is part of.
func (l *line) beaten() bool { return l != nil && (l.lost || l.up.beaten()) }

func newRun(c *core) *Run {
	if c.live == nil {
		c.live = c.ctx
	}
	r := &Run{core: c, line: &line{}}
	r.root, r.turn = r.line, r.line
	return r
}

// environment is what a run acts on.
type environment struct {
	store    eventstore.Store
	state    projection.State
	clock    clock.Clock
	bus      *command.Bus
	encoding *eventstore.Encoding
	logger   *slog.Logger
	tell     *telemetry
}

type rollback struct {
	id      stepID
	order   uint64
	fn      func(*Run) error
	settled bool
}

type outcomeKind uint8

const (
	running outcomeKind = iota
	suspended
	finished
	continued // finished, and begun anew
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
	ended  string // type of the event that ended the run
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
// of the run remains in the process meanwhile. The error is one for which
// errors.Is(err, [ErrCancelled]) holds, or [ErrUnwinding].
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
		return rec.failure()
	}
	if c := r.carried(id); c != nil {
		r.emit(typeTimerSet, &payload{Step: &id, Due: c.set.Due})
		r.now = r.emit(typeTimerFired, &payload{Step: &id})
		return nil
	}
	var at time.Time
	known := rec != nil && rec.set.Due != nil
	if known {
		at = *rec.set.Due
	} else {
		at = due().UTC().Round(0)
	}
	over := !at.After(r.env.clock.Now())
	if !over || !r.mayHave() {
		if err := r.interrupted(id); err != nil {
			return err
		}
	}
	if !known {
		r.emit(typeTimerSet, &payload{Step: &id, Due: &at, Scope: r.scope()})
	}
	if !over {
		r.sleepsUntil = at
		r.park()
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
	order := r.order()
	if rec == nil {
		r.emit(typeRollbackAdded, &payload{Step: &id})
	} else {
		order = rec.order
	}
	r.rollbacks = append(r.rollbacks, rollback{id: id, order: order, fn: fn})
}

// Settled says that from here on nothing that came before is rolled back; in a
// branch, nothing that came before in that branch.
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
	for i := range r.rollbacks {
		branch := r.rollbacks[i].id.Branch
		if r.id.branch == "" || branch == r.id.branch || strings.HasPrefix(branch, r.id.branch+"@") {
			r.rollbacks[i].settled = true
		}
	}
}

// enter begins a saga call. It returns the history's record of the step, nil
// if the step is new, or false while the run is being put aside.
func (r *Run) enter(kind, name string) (stepID, *record, bool) {
	id := stepID{Kind: kind, Name: name, In: r.in, Branch: r.id.branch}
	r.own(id.String())
	if r.outcome.kind != running || r.gone {
		return id, nil, false
	}
	if kind != kindSettled {
		if problem := checkName(name); problem != "" {
			r.block(causeCode, nil, "%s: the name %s", id, problem)
		}
	}
	if r.counts == nil {
		r.counts = map[stepID]int{}
	}
	r.counts[id]++
	if n := r.counts[id]; n > 1 {
		id.Occurrence = n
	}
	return id, r.match(id), true
}

// match returns the record of the next step of the history, which must be id.
func (r *Run) match(id stepID) *record {
	records := *r.h.line(r.id)
	r.skipMarkers(records)
	if r.next < len(records) {
		rec := records[r.next]
		r.next++
		if rec.id != id {
			r.block(causeMismatch, &id, "step %d: history has %s, code asks %s", r.next, rec.id, id)
		}
		if rec.outcome == "" && (r.env == nil || r.beaten()) && id.Kind != kindAll && id.Kind != kindRace {
			r.park()
		}
		if !rec.at.IsZero() {
			r.now = rec.at
		}
		r.noticed = r.noticed || rec.outcome == typeStepFailed && rec.result.Error != nil && rec.result.Error.Cancelled
		return rec
	}
	r.fresh(id)
	return nil
}

// skipMarkers passes over version markers that the code does not ask for any more.
func (r *Run) skipMarkers(records []*record) {
	for r.next < len(records) && records[r.next].id.Kind == kindVersion {
		r.next++
	}
}

// fresh begins a step that is not in the history, unless nothing new may happen.
func (r *Run) fresh(id stepID) {
	// Who has lost the race while a step was under way still registers what undoes it.
	if r.env == nil || r.beaten() && (r.closed || id.Kind != kindOnRollback) {
		r.park()
	}
	if r.h.finished != nil {
		r.block(causeMismatch, &id, "step %d: history has ended, code asks %s", r.next+1, id)
	}
	r.next++
}

func (r *Run) carried(id stepID) *record { return r.h.carried[id] }

// order is that of the next event that is written.
func (c *core) order() uint64 { return c.h.revision.Version + uint64(len(c.buffer)) + 1 }

// scope is what a wait notes of whether a request to cancel the run ends it.
func (r *Run) scope() string {
	if r.detached || r.in != "" {
		return scopeDetached
	}
	return ""
}

// interrupted ends a step that has not ended when the run is to be cancelled,
// and returns the error that the code gets; nil if it may go on.
func (r *Run) interrupted(id stepID) error {
	if r.h.cancel == nil || r.scope() != "" {
		return nil
	}
	return r.refuse(id)
}

// refuse records that the step did not happen because the run is cancelled.
func (r *Run) refuse(id stepID) error {
	const most = 1000
	if r.refused++; r.refused > most {
		r.block(causeCode, &id, "the run was cancelled, and its code has ignored that %d times: return the error", most)
	}
	f := failure{Message: ErrCancelled.Error(), Cancelled: true}
	if r.h.cancel != nil && r.h.cancel.Reason != "" {
		f.Message += ": " + r.h.cancel.Reason
	}
	r.now = r.emit(typeStepFailed, &payload{Step: &id, Error: &f})
	r.noticed = true
	r.decide()
	return &StepError{Step: id.Name, failure: f}
}

// decide says that what was buffered last must be durable before anything is done
// that depends on it.
func (r *Run) decide() { r.urgent, r.decided = true, true }

// mayHave reports whether the line may have come beyond its history before, in an
// engine that died: commands are executed before what precedes them is durable.
// As long as that is so a request to cancel the run, which came later, must not
// end what is done at once: whether it was done is found out by doing it again,
// with the same key. The next one that waits, or that may happen twice, is where
// the run ends.
func (r *Run) mayHave() bool { return !r.decided }

// failure is the error that the record says, nil if it says none.
func (rec *record) failure() error {
	if rec.outcome != typeStepFailed || rec.result.Error == nil {
		return nil
	}
	return &StepError{Step: rec.id.Name, failure: *rec.result.Error}
}

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
	if r.inStep != "" {
		step := r.inStep
		r.resume()
		r.inStep = ""
		r.block(causeCode, nil, "%s was called inside step %s: steps do not nest; use what the step is given", call, step)
	}
	if r.outcome.kind != running || r.gone {
		return
	}
	if r.line != r.turn {
		r.block(causeCode, nil, "%s was called with the run of another branch: use the run that the branch was given", call)
	}
	if message := r.misuse.Load(); message != nil {
		r.block(causeCode, nil, "%s", *message)
	}
}

// leave ends the code here, in every branch: deferred functions run, nothing
// else does.
func (r *Run) leave(o outcome) {
	if r.outcome.kind == running {
		r.outcome = o
	}
	r.gone = true
	runtime.Goexit()
}

// park puts the line aside; other branches go on.
func (r *Run) park() {
	if r.line == r.root {
		r.leave(outcome{kind: suspended})
	}
	r.gone = true
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
		r.decided = true
	}
	return at
}

// flush makes the buffer durable, or leaves.
func (r *Run) flush() {
	if o := r.write(); o.kind != running {
		r.leave(o)
	}
}

// write makes the buffer durable. What others have written to the run
// meanwhile, such as signals, comes before it.
func (c *core) write() outcome {
	for {
		o := c.append()
		if o.kind != conflicted {
			return o
		}
		if rebased, err := c.rebase(); err != nil {
			return outcome{kind: broken, err: err}
		} else if !rebased {
			return o
		}
	}
}

// rebase takes in what others have written; false says that it was not only that.
func (c *core) rebase() (bool, error) {
	var found []eventstore.Recorded
	if c.h.revision.Version == 0 {
		return false, nil
	}
	for e, err := range c.env.store.Read(c.ctx, eventstore.OneStream(c.stream), eventstore.ReadOptions{After: c.h.revision.Position}) {
		if err != nil {
			return false, err
		}
		if !external(e.Type) {
			return false, nil
		}
		found = append(found, e)
	}
	for i := range found {
		if err := c.h.add(&found[i]); err != nil {
			return false, err
		}
	}
	if n := len(c.written); n > 0 && c.buffer[n-1].Type == typeContinued {
		c.carryOver(c.written[n-1])
		data, err := encodePayload(c.written[n-1])
		if err != nil {
			return false, err
		}
		c.buffer[n-1].Data = data
	}
	return len(found) > 0, nil
}

func (c *core) append() outcome {
	if len(c.buffer) == 0 {
		return outcome{}
	}
	receipt, err := c.env.store.Append(context.WithoutCancel(c.ctx), eventstore.Commit{
		Events:     c.buffer,
		Conditions: []eventstore.Condition{eventstore.StreamAt(c.stream, c.h.revision)},
	})
	switch {
	case err == nil:
		n := uint64(len(c.buffer))
		last := receipt.Revision(c.stream)
		for i, p := range c.written {
			behind := n - 1 - uint64(i)
			at := eventstore.Revision{Version: last.Version - behind, Position: last.Position - eventstore.Position(behind)}
			if err := c.h.apply(c.buffer[i].Type, p, c.buffer[i].Time, at); err != nil {
				return outcome{kind: broken, err: err}
			}
			c.h.bytes += len(c.buffer[i].Data)
		}
		c.h.revision = last
		c.buffer, c.written, c.urgent = nil, nil, false
		return outcome{}
	case errors.Is(err, eventstore.ErrConflict):
		return outcome{kind: conflicted, err: err}
	case errors.Is(err, eventstore.ErrTooLarge), errors.Is(err, eventstore.ErrInvalid):
		c.buffer, c.written = nil, nil
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
	defer func() { r.recovered(recover(), returned) }()
	r.now = r.h.startedAt
	r.consumed, r.cursors = slices.Clone(r.h.started.Consumed), maps.Clone(r.h.started.Cursors)
	result, err := r.code(r, r.h.started.In)
	r.end(result, err)
	returned = true
}

// recovered turns a panic, and an end of the goroutine that is not the run's
// own, into a block of the run.
func (r *Run) recovered(p any, returned bool) {
	switch {
	case p != nil:
		if r.env != nil {
			r.env.logger.Error("saga panicked", "saga", r.saga, "id", r.stream.ID, "panic", p, "stack", stack())
		}
		r.outcome = outcome{kind: blocked, cause: causeCode, reason: fmt.Sprintf("the code panicked: %v", p)}
	case !returned && r.outcome.kind == running && !r.gone:
		r.outcome = outcome{kind: blocked, cause: causeCode, reason: "the code ended its goroutine by runtime.Goexit"}
	}
	r.gone = true
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
	if next, ok := errors.AsType[*continuation](err); ok && next.run == r.core {
		r.goOn(next)
		return
	}
	last := payload{Result: result}
	lastType := typeCompleted
	if err != nil {
		lastType = typeFailed
		f := failureOf(err)
		last = payload{Error: &f}
		if f.Cancelled {
			lastType = typeCancelled
		}
		if pending := r.pending(); len(pending) > 0 {
			id := stepID{Kind: kindRollback}
			if rec := r.match(id); rec == nil {
				r.emit(typeRollbackBegan, &payload{Step: &id, Error: &f})
				r.decide()
			} else if rec.result.Error != nil {
				last.Error = rec.result.Error
				if lastType = typeFailed; last.Error.Cancelled {
					lastType = typeCancelled
				}
			}
			for _, rb := range slices.Backward(pending) {
				r.in = rb.id.compensation()
				err := rb.fn(r)
				if err != nil {
					r.block(causeCompensation, &stepID{Kind: kindCompensated, Name: rb.id.Name, Occurrence: rb.id.Occurrence, In: r.in}, "compensation %q failed: %v; Resume tries it again", r.in, err)
				}
				r.in = ""
				id := stepID{Kind: kindCompensated, Name: rb.id.Name, Occurrence: rb.id.Occurrence}
				if rb.id.Branch != "" {
					id = stepID{Kind: kindCompensated, Name: rb.id.compensation()}
				}
				if rec := r.match(id); rec == nil {
					r.emit(typeCompensated, &payload{Step: &id})
				}
				last.Compensated = append(last.Compensated, rb.id.compensation())
			}
		}
	}
	r.finish(lastType, &last)
}

// pending are the compensations that are due when the code has failed, in the
// order in which they were registered.
func (r *Run) pending() []rollback {
	pending := slices.DeleteFunc(slices.Clone(r.rollbacks), func(rb rollback) bool { return rb.settled })
	slices.SortStableFunc(pending, func(a, b rollback) int { return cmp.Compare(a.order, b.order) })
	return pending
}

// finish records the end of the run.
func (r *Run) finish(lastType string, last *payload) {
	records := *r.h.line(r.id)
	r.skipMarkers(records)
	if r.next < len(records) {
		r.block(causeMismatch, nil, "step %d: history has %s, code has ended", r.next+1, records[r.next].id)
	}
	if r.h.finished != nil {
		if r.h.finishedType != lastType && r.h.finishedType != typeTerminated {
			r.block(causeMismatch, nil, "history has %s, code ended with %s", r.h.finishedType, lastType)
		}
	} else if r.env != nil {
		r.emit(lastType, last)
	}
	r.outcome = outcome{kind: finished, ended: lastType}
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
	return f == nil || f.Entry() == codeEntry() || f.Entry() == branchEntry()
}

// codeEntry and branchEntry are the entries of runCode and runBranch.
var (
	codeEntry   = sync.OnceValue(func() uintptr { return reflect.ValueOf(runCode).Pointer() })
	branchEntry = sync.OnceValue(func() uintptr { return reflect.ValueOf(runBranch).Pointer() })
)
