package saga

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
)

// Action is what a [Manager] wants to happen, as data: [Command], [SetTimer],
// [StopTimer], [End].
type Action struct {
	run   func(s *Run) error
	name  string
	timer time.Duration
	stop  bool
	end   bool
}

// Command is the action of executing a command; its effect happens exactly
// once. When it is rejected the manager hears of it, see [WhenRejected].
func Command[S any, C command.Command[S]](def *aggregate.Definition[S], c C) Action {
	name := fmt.Sprintf("%T", c)
	return Action{name: name, run: func(s *Run) error { return Execute(s, name, def, c) }}
}

// SetTimer is the action of setting the timer of the name, for [WhenDue]; it
// replaces one of the same name.
func SetTimer(name string, after time.Duration) Action {
	return Action{name: name, timer: max(after, 1)}
}

// StopTimer is the action of stopping a timer; one that is not set is no mistake.
func StopTimer(name string) Action { return Action{name: name, stop: true} }

// End is the action of ending the manager's run: events that come later for its
// key are left alone.
func End() Action { return Action{end: true} }

// Manager is a process manager, the event-driven form of a saga: a state, and a
// function for each kind of event that returns the state as it is now and what
// is to happen, as data. There is one run for each key. Make it with [Manage].
//
// It is a saga and runs as one: [Engine.List], [Look] and the tools show its
// runs, and the result is the state at the end. What it is fed with is a
// reaction of the same name, see [Engine.Backlogs].
type Manager[S any] struct {
	*Definition[managed[S], S]
	plan *plan[S]
	feed *Reaction
}

// managed is what a manager takes from one life to the next.
type managed[S any] struct {
	State  S                    `json:"state"`
	Timers map[string]time.Time `json:"timers,omitempty"`
}

// ManagerOption says what a manager does about an event: [When], [WhenDue],
// [WhenRejected].
type ManagerOption[S any] struct{ add func(*plan[S]) }

type plan[S any] struct {
	keys     map[string]func(enc *eventstore.Encoding, r eventstore.Recorded) (string, error)
	react    map[string]func(enc *eventstore.Encoding, state S, r eventstore.Recorded) (S, []Action, error)
	due      map[string]func(S) (S, []Action)
	rejected func(S, string, error) (S, []Action)
	mistakes []error
}

// When reacts to events of type E. The key names the run that an event is for;
// the first one starts it, and "" is for none. Events of one stream come in their
// order, each once. Both functions must be pure.
func When[S any, E Event](key func(E, eventstore.Recorded) string, react func(S, E) (S, []Action)) ManagerOption[S] {
	return ManagerOption[S]{func(p *plan[S]) {
		name, err := eventTypeOf[E]()
		switch {
		case err != nil:
			p.mistakes = append(p.mistakes, err)
		case p.react[name] != nil:
			p.mistakes = append(p.mistakes, fmt.Errorf("%w: two reactions to %q", eventstore.ErrInvalid, name))
		}
		p.keys[name] = func(enc *eventstore.Encoding, r eventstore.Recorded) (string, error) {
			e, err := decodeEvent[E](enc, r)
			if err != nil {
				return "", err
			}
			return key(e, r), nil
		}
		p.react[name] = func(enc *eventstore.Encoding, state S, r eventstore.Recorded) (S, []Action, error) {
			e, err := decodeEvent[E](enc, r)
			if err != nil {
				return state, nil, err
			}
			state, actions := react(state, e)
			return state, actions, nil
		}
	}}
}

// WhenDue reacts to the timer of the name.
func WhenDue[S any](timer string, react func(S) (S, []Action)) ManagerOption[S] {
	return ManagerOption[S]{func(p *plan[S]) {
		if p.due[timer] != nil {
			p.mistakes = append(p.mistakes, fmt.Errorf("%w: two reactions to timer %q", eventstore.ErrInvalid, timer))
		}
		p.due[timer] = react
	}}
}

// WhenRejected reacts to the rejection of a command, whose Go type is given as
// text. Without it the run fails.
func WhenRejected[S any](react func(state S, command string, reason error) (S, []Action)) ManagerOption[S] {
	return ManagerOption[S]{func(p *plan[S]) { p.rejected = react }}
}

// fed is the signal by which a manager gets its events.
const fed = "event"

// Manage returns a process manager. The name (ASCII letters, digits, '.' and
// '_', beginning with a letter) is part of the stored contract, as is the JSON
// form of S.
//
// What the functions return is done in its order, before the next event is
// looked at. So a manager that hangs at a command keeps its later events
// waiting, and no other run.
func Manage[S any](name string, options ...ManagerOption[S]) *Manager[S] {
	p := &plan[S]{
		keys:  map[string]func(*eventstore.Encoding, eventstore.Recorded) (string, error){},
		react: map[string]func(*eventstore.Encoding, S, eventstore.Recorded) (S, []Action, error){},
		due:   map[string]func(S) (S, []Action){},
	}
	for _, option := range options {
		option.add(p)
	}
	if len(p.react) == 0 {
		p.mistakes = append(p.mistakes, fmt.Errorf("%w: it reacts to no event: say When", eventstore.ErrInvalid))
	}
	m := &Manager[S]{Definition: Define(name, func(s *Run, in managed[S]) (S, error) { return manage(s, p, in) }), plan: p}
	m.feed = &Reaction{name: name, types: slices.Sorted(maps.Keys(p.keys)), policy: defaultPolicy(), mistakes: m.mistakes}
	m.feed.policy.attempts = 10
	m.feed.handle = p.feed(&m.blueprint)
	for _, mistake := range p.mistakes {
		m.mistakes = append(m.mistakes, fmt.Errorf("manager %q: %w", name, mistake))
	}
	return m
}

// feed returns what gives an event to the run that it is for, which is started as
// the blueprint says.
func (p *plan[S]) feed(b *blueprint) func(*eventstore.Encoding, Step, eventstore.Recorded) error {
	return func(enc *eventstore.Encoding, step Step, r eventstore.Recorded) error {
		key, err := p.keys[enc.CurrentType(r.Type)](enc, r)
		if err != nil {
			return Terminal(err)
		}
		if key == "" {
			return nil
		}
		return step.engine.feed(step, b, key, r)
	}
}

// FromStart returns the manager, decided about the past: when it is new, it gets
// the events that are in the log.
func (m *Manager[S]) FromStart() *Manager[S] { return m.begin(fromStart) }

// FromNow returns the manager, decided about the past: when it is new, events
// that are in the log are not for it.
func (m *Manager[S]) FromNow() *Manager[S] { return m.begin(fromNow) }

func (m *Manager[S]) begin(b beginning) *Manager[S] {
	changed, feed := *m, *m.feed
	feed.beginning = b
	changed.feed = &feed
	return &changed
}

// Build returns the manager, pinned to a build, see [Definition.Build]. Events are
// given to the runs of all builds by the one that is not [Manager.Draining]; what
// it starts is of its own build.
func (m *Manager[S]) Build(build string) *Manager[S] {
	changed, feed := *m, *m.feed
	changed.Definition = m.Definition.Build(build)
	feed.handle, feed.mistakes = m.plan.feed(&changed.blueprint), changed.mistakes
	changed.feed = &feed
	return &changed
}

// Draining returns the manager, which leaves it to another build to take events
// from the log: what there is of its build is run to the end.
func (m *Manager[S]) Draining() *Manager[S] {
	changed := *m
	changed.Definition = m.Definition.Draining()
	return &changed
}

// parts are the processes that it is made of.
func (m *Manager[S]) parts() []Process {
	if m.draining {
		return []Process{m.Definition}
	}
	return []Process{m.Definition, m.feed}
}

// feed gives the event to the run of the key, once; the first one starts it.
func (e *Engine) feed(step Step, b *blueprint, key string, r eventstore.Recorded) error {
	raw, err := encode(originOf(&r, true))
	if err != nil {
		return err
	}
	for range 2 {
		err = e.tell(step, b.name, key, typeSignalled, &payload{Name: fed, In: raw}, "event:"+r.ID.String())
		switch {
		case errors.Is(err, ErrFinished):
			return nil
		case !errors.Is(err, ErrNotFound):
			return err
		}
		if err = e.env.start(step, b, key, json.RawMessage("{}"), nil); err != nil {
			return err
		}
	}
	return err
}

// manage is the saga that a manager is.
func manage[S any](s *Run, p *plan[S], in managed[S]) (S, error) {
	act := func(actions []Action) (bool, error) {
		for len(actions) > 0 {
			a := actions[0]
			actions = actions[1:]
			switch {
			case a.end:
				return true, nil
			case a.stop:
				delete(in.Timers, a.name)
			case a.timer > 0:
				if p.due[a.name] == nil {
					s.block(causeCode, nil, "the manager sets timer %q and has no WhenDue for it", a.name)
				}
				if in.Timers == nil {
					in.Timers = map[string]time.Time{}
				}
				in.Timers[a.name] = s.Now().Add(a.timer)
			case a.run != nil:
				err := a.run(s)
				if err != nil && p.rejected != nil && command.IsRejection(err) {
					var more []Action
					in.State, more = p.rejected(in.State, a.name, err)
					actions, err = append(more, actions...), nil
				}
				if err != nil {
					return true, err
				}
			}
		}
		return false, nil
	}
	for {
		if s.ContinueSuggested() {
			return in.State, s.Continue(in)
		}
		timer, due := "", time.Time{}
		for _, name := range slices.Sorted(maps.Keys(in.Timers)) {
			if at := in.Timers[name]; due.IsZero() || at.Before(due) {
				timer, due = name, at
			}
		}
		var actions []Action
		var wait time.Duration
		if timer != "" {
			wait = max(due.Sub(s.Now()), 1)
		}
		raw, err := s.signal(fed, wait)
		switch {
		case err == nil:
			var o origin
			if err := json.Unmarshal(raw, &o); err != nil {
				s.block(causeMismatch, nil, "what it was fed with does not decode: %v", err)
			}
			r := o.recorded()
			react := p.react[s.encoding().CurrentType(r.Type)]
			if react == nil {
				s.block(causeMismatch, nil, "it has no reaction to event %q any more", r.Type)
			}
			if in.State, actions, err = react(s.encoding(), in.State, r); err != nil {
				s.block(causeMismatch, nil, "event %q does not decode: %v", r.Type, err)
			}
		case errors.Is(err, ErrTimeout):
			delete(in.Timers, timer)
			react := p.due[timer]
			if react == nil {
				s.block(causeMismatch, nil, "it has no reaction to timer %q any more", timer)
			}
			in.State, actions = react(in.State)
		default:
			return in.State, err
		}
		if end, err := act(actions); end || err != nil {
			return in.State, err
		}
	}
}
