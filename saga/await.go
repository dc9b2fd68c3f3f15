package saga

import (
	"context"
	"fmt"
	"time"

	"github.com/deed-go/deed/eventstore"
)

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
	o, err := s.await(kindAwait, name, timeout, func(since eventstore.Position) *watch {
		return &watch{Types: s.encoding().StoredTypes(name), Match: match, Since: since}
	})
	if err != nil {
		return none, err
	}
	event, err := decodeEvent[E](s.encoding(), o.recorded())
	if err != nil {
		s.block(causeMismatch, nil, "the awaited event does not decode: %v", err)
	}
	return event, nil
}

// cursorOf names what awaits of the same kind share: where they continue.
func (w *watch) cursorOf(name string) string {
	if w == nil {
		return name
	}
	return fmt.Sprintf("%s %q %q %q", name, w.Match.Category, w.Match.StreamID, w.Match.Tag)
}

func (r *Run) await(kind, name string, timeout time.Duration, watching func(since eventstore.Position) *watch) (*origin, error) {
	id, rec, ok := r.enter(kind, name)
	if !ok {
		return nil, ErrUnwinding
	}
	received := func(w *watch, o *origin) *origin {
		r.consumed = append(r.consumed, o.Position)
		if r.cursors == nil {
			r.cursors = map[string]eventstore.Position{}
		}
		r.cursors[w.cursorOf(name)] = o.Position
		return o
	}
	if rec != nil {
		switch rec.outcome {
		case typeAwaitTimedOut:
			r.now = rec.at
			return nil, ErrTimeout
		case typeStepFailed:
			r.now = rec.at
			return nil, rec.failure()
		case typeAwaitReceived:
			r.now = rec.at
			return received(rec.set.Watch, rec.result.Event), nil
		}
	}
	if c := r.carried(id); c != nil {
		r.emit(typeAwaitSet, &payload{Step: &id, Watch: c.set.Watch, Due: c.set.Due, Scope: r.scope()})
		r.now = r.emit(typeAwaitReceived, &payload{Step: &id, Event: c.result.Event})
		return received(c.set.Watch, c.result.Event), nil
	}
	if err := r.interrupted(id); err != nil {
		return nil, err
	}
	if rec == nil {
		w := watching(r.h.since)
		if kind == kindAwait {
			w.Since = max(w.Since, r.cursors[w.cursorOf(name)])
			for _, p := range r.consumed {
				if p > w.Since {
					w.Skip = append(w.Skip, p)
				}
			}
		}
		p := &payload{Step: &id, Watch: w, Scope: r.scope()}
		if timeout > 0 {
			due := r.now.Add(timeout).UTC().Round(0)
			p.Due = &due
		}
		r.emit(typeAwaitSet, p)
		r.park()
	}
	w := rec.set.Watch
	if w == nil {
		r.block(causeMismatch, nil, "the history of %s does not say what it waits for", id)
	}
	event := r.events[id.key()]
	delete(r.events, id.key())
	if event != nil && kind == kindAwait && r.taken(event.Position) {
		// Another branch was faster. Ask again, without that one.
		again := *w
		again.Skip = append(append([]eventstore.Position(nil), w.Skip...), event.Position)
		r.emit(typeAwaitSet, &payload{Step: &id, Watch: &again, Due: rec.set.Due, Scope: r.scope()})
		r.park()
	}
	due := rec.set.Due
	if event == nil && due != nil && !due.After(r.env.clock.Now()) {
		// The timeout counts only if the event is not in the log by now.
		found, err := r.lookUp(w)
		if err != nil {
			r.leave(outcome{kind: broken, err: err})
		}
		event = found
		if event == nil {
			r.now = r.emit(typeAwaitTimedOut, &payload{Step: &id})
			r.decide()
			return nil, ErrTimeout
		}
	}
	if event == nil {
		r.park()
	}
	o := originOf(event, true)
	r.now = r.emit(typeAwaitReceived, &payload{Step: &id, Event: o})
	r.decide()
	return received(w, o), nil
}

// taken reports whether the run has received the event at the position.
func (c *core) taken(p eventstore.Position) bool {
	for _, had := range c.consumed {
		if had == p {
			return true
		}
	}
	return false
}

// lookUp returns the first event in the log that the watch takes and that the
// run has not been offered.
func (r *Run) lookUp(w *watch) (*eventstore.Recorded, error) {
	after := max(w.Since, r.routed)
	for {
		found, err := first(r.ctx, r.env.store, w, after, 0)
		if err != nil || found == nil || !r.taken(found.Position) {
			return found, err
		}
		after = found.Position
	}
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

func (r *Run) encoding() *eventstore.Encoding {
	if r.env == nil {
		return r.replay
	}
	return r.env.encoding
}
