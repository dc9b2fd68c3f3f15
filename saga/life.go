package saga

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
)

// Detached returns the run without its end by a request to cancel it ([Cancel]):
// its steps and waits go on as if there were none. It is for cleaning up.
// Compensations are detached anyhow.
func (r *Run) Detached() *Run {
	r.own("Detached")
	return &Run{core: r.core, line: r.line, detached: true}
}

// Cancelled reports whether somebody has asked to cancel the run, and the code
// has noticed: a step or wait has returned an error for which
// errors.Is(err, [ErrCancelled]) holds.
func (r *Run) Cancelled() bool {
	r.own("Cancelled")
	return r.noticed
}

// Cancel asks a run of the saga to end, and returns when the request is durable.
// Its waits end, the contexts of its steps end with the cause [ErrCancelled], and
// every later step returns an error for which errors.Is(err, ErrCancelled) holds,
// except in compensations and on [Run.Detached]. What happens or does not, that
// is [Execute], [Tx] and the start of a child, is not cut off in the middle; and
// what an engine that died may have done without recording it is done again, with
// the same key, before the run ends at the next other step or wait. So the code
// knows what is to be compensated. When the code returns that
// error what it did is compensated, and the run is cancelled. Asking again does
// nothing. The error is [ErrFinished] when the run has ended, [ErrNotFound] when
// there is none.
func (e *Engine) Cancel(ctx context.Context, saga, run, reason string) error {
	return e.tell(ctx, saga, run, typeCancelAsked, &payload{Reason: reason}, "")
}

// Terminate ends a run where it is: nothing more is done, nothing is
// compensated, and its children go on. It is for runs that can neither go on nor
// be cancelled. The error is [ErrFinished] when the run has ended, [ErrNotFound]
// when there is none.
func (e *Engine) Terminate(ctx context.Context, saga, run, reason string) error {
	return e.tell(ctx, saga, run, typeTerminated, &payload{Reason: reason}, "")
}

// RetryNow makes the steps of a run that wait for their next attempt be tried
// at once.
func (e *Engine) RetryNow(ctx context.Context, saga, run string) error {
	return e.tell(ctx, saga, run, typeRetryAsked, &payload{}, "")
}

// Skip makes a run go on as if the step that it is at had succeeded with the
// result, which is its JSON (null if it has none); the note says why. It is for
// a step that cannot succeed any more, and that somebody has done by hand: one
// that is tried again and again, or the one that has failed in a compensation
// that blocks the run. Step is its key as [Timeline] gives it. The error is [ErrConflict] when the run is
// at work, or not at that step.
func (e *Engine) Skip(ctx context.Context, saga, run, step string, result json.RawMessage, note string) error {
	if strings.TrimSpace(note) == "" {
		return fmt.Errorf("%w: a step is skipped with a note that says why", eventstore.ErrInvalid)
	}
	if len(result) == 0 {
		result = json.RawMessage("null")
	}
	if !json.Valid(result) {
		return fmt.Errorf("%w: the result is not JSON: %q", eventstore.ErrInvalid, result)
	}
	return e.change(ctx, saga, run, func(h *history) (string, *payload, error) {
		if h.finished != nil {
			return "", nil, fmt.Errorf("%w: its history ends with %s", ErrFinished, h.finishedType)
		}
		rec := h.open(step)
		if rec == nil {
			rec = h.failed(step)
		}
		if rec == nil {
			return "", nil, fmt.Errorf("%w: the run is not at step %q", ErrConflict, step)
		}
		switch rec.id.Kind {
		case kindDo, kindOnce, kindTx, kindExecute:
		default:
			return "", nil, fmt.Errorf("%w: step %q is no effect: signals and cancelling end waits", eventstore.ErrInvalid, step)
		}
		id := rec.id
		return typeSkipped, &payload{Step: &id, Result: result, Note: note}, nil
	})
}

// Restart makes a run do its steps again from the given one on, which is in the
// function itself, not in a branch or compensation; the note says why. What came
// before keeps its recorded results. The steps get new idempotency keys: what
// they did before is done a second time, so undo that first. A run that has
// ended runs again. Step is its key as [Timeline] gives it; "" begins with the
// first.
func (e *Engine) Restart(ctx context.Context, saga, run, step, note string) error {
	if strings.TrimSpace(note) == "" {
		return fmt.Errorf("%w: a run is restarted with a note that says why", eventstore.ErrInvalid)
	}
	return e.change(ctx, saga, run, func(h *history) (string, *payload, error) {
		records := *h.line(lineID{})
		if len(records) == 0 {
			return "", nil, fmt.Errorf("%w: the run has no steps yet", ErrConflict)
		}
		if step == "" {
			step = records[0].id.key()
		}
		for _, rec := range records {
			if rec.id.key() == step && rec.id.In == "" {
				id, began := rec.id, h.beganAt
				p := &payload{Step: &id, Note: note, Due: &began, Build: h.started.Build}
				if h.finished != nil {
					p.Since = h.revision.Position
				}
				h.restart(p)
				p.Carried = h.untaken()
				return typeRestarted, p, nil
			}
		}
		return "", nil, fmt.Errorf("%w: the run has no step %q", ErrNotFound, step)
	})
}

// change appends what decide makes of the run's whole history, if nothing has
// come between.
func (e *Engine) change(ctx context.Context, saga, run string, decide func(*history) (string, *payload, error)) error {
	stream := eventstore.Stream{Category: category(saga), ID: run}
	h := &history{}
	if err := h.read(ctx, e.env.store, stream, 0); err != nil {
		return err
	}
	if h.revision.Version == 0 {
		return fmt.Errorf("%w: saga %q has no run %q", ErrNotFound, saga, run)
	}
	about := func(err error) error { return fmt.Errorf("saga %q, run %q: %w", saga, run, err) }
	eventType, p, err := decide(h)
	if err != nil {
		return about(err)
	}
	data, err := encodePayload(p)
	if err != nil {
		return about(err)
	}
	meta := command.MetadataOf(ctx)
	meta.CorrelationID = h.meta.CorrelationID
	_, err = e.env.store.Append(ctx, eventstore.Commit{
		Events:     []eventstore.Event{{Stream: stream, Type: eventType, Data: data, Time: e.env.clock.Now(), Metadata: meta}},
		Conditions: []eventstore.Condition{eventstore.StreamAt(stream, h.revision)},
	})
	if errors.Is(err, eventstore.ErrConflict) {
		return about(fmt.Errorf("%w: it went on at the same moment; look at it again: %w", ErrConflict, err))
	}
	if err != nil {
		return about(err)
	}
	return nil
}

// continuation is the error by which a run says that it goes on anew.
type continuation struct {
	run *core
	in  json.RawMessage
	err error
}

func (c *continuation) Error() string { return "the saga continues anew: return this error" }

// Continue ends this life of the run and begins the next one, with a new input:
// return what it returns.
//
//	return Result{}, s.Continue(State{…})
//
// The run keeps its id, the signals that it has not taken, and what it has
// published; its history begins again, so that a run can go on for ever at a
// small cost ([Run.ContinueSuggested]). It goes on with the code, and the build,
// that are there now. Compensations cannot be taken along: call [Run.Settled]
// before, or the run is blocked.
func (r *Run) Continue(in any) error {
	r.own("Continue")
	raw, err := encode(in)
	return &continuation{run: r.core, in: raw, err: err}
}

// ContinueSuggested reports whether the history has become long enough for
// [Run.Continue] to be worth it: 1,000 steps. It is the same at every replay.
func (r *Run) ContinueSuggested() bool {
	const steps = 1000
	r.own("ContinueSuggested")
	return r.next >= steps
}

// goOn records that the run begins anew.
func (r *Run) goOn(next *continuation) {
	if next.err != nil {
		r.block(causeCode, nil, "the input to continue with cannot be stored: %v", next.err)
	}
	if pending := r.pending(); len(pending) > 0 {
		r.block(causeCode, nil, "the run continues anew while compensation %q is pending: call Settled, or let it fail", pending[0].id.compensation())
	}
	records := *r.h.line(r.id)
	r.skipMarkers(records)
	if r.next < len(records) {
		r.block(causeMismatch, nil, "step %d: history has %s, code continues anew", r.next+1, records[r.next].id)
	}
	if r.env == nil {
		r.park()
	}
	p := &payload{
		Format: historyFormat, In: next.in, Since: r.h.since, Segment: r.h.segment + 1, Parent: r.h.started.Parent, Build: r.build,
		Cursors: r.cursors, Consumed: r.consumed,
	}
	const most = 1000
	if len(p.Consumed) > most {
		p.Consumed = p.Consumed[len(p.Consumed)-most:]
	}
	r.carryOver(p)
	r.emit(typeContinued, p)
	r.buffer[len(r.buffer)-1].Metadata.TraceParent = r.h.meta.TraceParent
	r.outcome = outcome{kind: continued}
}

// carryOver gives the next life of the run the signals that this one has not
// taken, and the request to cancel it.
func (c *core) carryOver(p *payload) {
	if c.h.cancel != nil {
		p.Cause, p.Reason = causeCancelled, c.h.cancel.Reason
	}
	p.Carried, p.Signals = c.h.untaken(), c.h.received
}

// untaken are the signals that the run has not taken, as they are stored.
func (h *history) untaken() []payload {
	var signals []payload
	for _, s := range h.signals {
		if !s.taken {
			signals = append(signals, payload{Name: s.name, Number: s.number, In: s.data})
		}
	}
	return signals
}

// Version marks a change of the code, so that runs that are under way finish as
// they began:
//
//	if s.Version("fraud-check", 1) >= 1 {
//		… // the new step
//	}
//
// The first time that a run comes here it records the version, which is at least
// 1, and gets it whenever it comes here again; a run that had passed this place
// before the marker was there gets 0. When [Engine.Versions] shows that no open
// run is below a version, the branch for what was before can go; and when all
// are beyond it, so can the marker.
func (r *Run) Version(name string, version int) int {
	if problem := checkName(name); problem != "" || version < 1 {
		r.own("Version")
		r.block(causeCode, nil, "Version(%q, %d): the name must be one, and the version at least 1", name, version)
	}
	r.own("Version")
	if r.outcome.kind != running || r.gone {
		return version
	}
	if known, ok := r.markers[name]; ok {
		return known
	}
	if r.markers == nil {
		r.markers = map[string]int{}
	}
	id := stepID{Kind: kindVersion, Name: name, In: r.in, Branch: r.id.branch}
	records := *r.h.line(r.id)
	for i := r.next; i < len(records) && records[i].id.Kind == kindVersion; i++ {
		if records[i].id == id {
			r.next = i + 1
			r.markers[name] = records[i].result.Number
			return records[i].result.Number
		}
	}
	switch {
	case r.next < len(records):
		r.markers[name] = 0
		return 0
	case r.beaten() || r.env == nil || r.h.finished != nil:
		// Nothing is recorded; what follows is not in the history either, or was there
		// before the marker.
		if r.h.finished != nil {
			version = 0
		}
		r.markers[name] = version
		return version
	}
	if c := r.carried(id); c != nil {
		version = c.result.Number // of a compensation that is tried again
	}
	r.next++
	r.emit(typeVersionMarked, &payload{Step: &id, Number: version})
	r.markers[name] = version
	return version
}

// Publish makes a value known under the name, for [View], [Engine.List] and the
// tools: at what stage the run is, say, or for which customer. The last one of a
// name counts.
func (r *Run) Publish(name string, value any) {
	id, rec, ok := r.enter(kindPublish, name)
	if !ok || rec != nil {
		return
	}
	raw, err := encode(value)
	if err != nil {
		r.block(causeCode, nil, "Publish(%q): %v", name, err)
	}
	r.emit(typePublished, &payload{Step: &id, Result: raw})
}

// View returns what a run of the saga has last published under the name, also
// when it has ended or is blocked; false if it has published nothing. It is read
// from the run's history.
func View[T any](ctx context.Context, host Host, p Process, run, name string) (T, bool, error) {
	var value T
	info, err := host.Sagas().Look(ctx, p.Name(), run)
	if err != nil {
		return value, false, err
	}
	raw, ok := info.Published[name]
	if !ok {
		return value, false, nil
	}
	if err := eventstore.JSON().Unmarshal(raw, &value); err != nil {
		return value, false, fmt.Errorf("saga %q, run %q: what it has published as %q does not fit %T: %w", p.Name(), run, name, value, err)
	}
	return value, true, nil
}
