package saga

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/deed-go/deed/eventstore"
)

// Process is what an [Engine] runs: a saga's [Definition] or a [Reaction].
type Process interface {
	// Name is unique among the sagas, and among the reactions, of an engine.
	Name() string
	// Err returns the mistakes in the definition, joined.
	Err() error

	build(e *Engine) *candidate
	kind() string
}

// beginning says where a new process begins in a log that has events for it.
type beginning uint8

const (
	undecided beginning = iota
	fromStart
	fromNow
)

// trigger starts runs on events of one type.
type trigger struct {
	eventType string
	start     func(enc *eventstore.Encoding, r eventstore.Recorded) (id string, in json.RawMessage, err error)
}

// blueprint is a definition without its types.
type blueprint struct {
	name      string
	code      func(*Run, json.RawMessage) (json.RawMessage, error)
	triggers  []trigger
	beginning beginning
	pin       string // the build that its runs are pinned to
	draining  bool
	mistakes  []error
	// begun, if not nil, is called when a worker has caught up.
	begun func(ctx context.Context, w *sagaWorker) error
}

func (b *blueprint) stream(id string) eventstore.Stream {
	return eventstore.Stream{Category: category(b.name), ID: id}
}

func category(name string) string { return "saga." + name }

// unit names the work of running it, and the lease of that.
func (b *blueprint) unit() string { return "saga " + withBuild(b.name, b.pin) }

// index is what the names of its tables begin with.
func (b *blueprint) index() string { return withBuild(category(b.name), b.pin) }

func withBuild(name, build string) string {
	if build == "" {
		return name
	}
	return name + "@" + build
}

// Definition is a saga: a function from In to Out whose effects are durable
// steps. Make it with [Define], once, as a package variable. It is immutable
// and safe for concurrent use.
type Definition[In, Out any] struct {
	blueprint
}

// Option is one more thing that a saga's definition says: [On].
type Option[In any] struct {
	add func(*blueprint)
}

// Define returns the definition of a saga. The name (ASCII letters, digits,
// '.' and '_', beginning with a letter) is part of the stored contract, as is
// the JSON form of In and Out. Mistakes are kept, and returned by Err and by
// [Engine.Add].
//
// The function is run again from its history whenever the run goes on, so it
// must do the same again: nothing but what it is given and what its steps
// return may decide what it asks for. The time (use [Run.Now]), random numbers,
// the order of a map, goroutines, and I/O outside of steps are the things to
// avoid; the command deedvet finds them.
func Define[In, Out any](name string, run func(*Run, In) (Out, error), options ...Option[In]) *Definition[In, Out] {
	d := &Definition[In, Out]{blueprint: blueprint{name: name}}
	if err := eventstore.ValidateCategory(category(name)); name == "" || err != nil {
		d.mistakes = append(d.mistakes, fmt.Errorf("%w: saga name %q: use ASCII letters, digits, '.' and '_'", eventstore.ErrInvalid, name))
	}
	if run == nil {
		d.mistakes = append(d.mistakes, fmt.Errorf("%w: saga %q has no function", eventstore.ErrInvalid, name))
	}
	d.code = func(r *Run, raw json.RawMessage) (json.RawMessage, error) {
		var in In
		if err := eventstore.JSON().Unmarshal(raw, &in); err != nil {
			r.block(causeMismatch, nil, "the input does not decode into %T: %v", in, err)
		}
		out, err := run(r, in)
		if err != nil {
			return nil, err
		}
		result, err := encode(out)
		if err != nil {
			r.block(causeCode, nil, "the result cannot be stored: %v", err)
		}
		return result, nil
	}
	for _, option := range options {
		option.add(&d.blueprint)
	}
	return d
}

// On starts a run at each event of type E, once, with the id and the input
// that start makes of it; the id "" starts none. When there is a run of that id
// already, nothing happens. Start must be pure: it may be called again for the
// same event, and must then say the same. An event that does not decode stops
// the saga's worker with an error, because leaving it out would lose a run: add
// an upcaster.
func On[E Event, In any](start func(e E, r eventstore.Recorded) (id string, in In)) Option[In] {
	return Option[In]{add: func(b *blueprint) {
		name, err := eventTypeOf[E]()
		if err != nil {
			b.mistakes = append(b.mistakes, fmt.Errorf("saga %q: %w", b.name, err))
			return
		}
		if slices.ContainsFunc(b.triggers, func(t trigger) bool { return t.eventType == name }) {
			b.mistakes = append(b.mistakes, fmt.Errorf("%w: saga %q has two starts on %q", eventstore.ErrInvalid, b.name, name))
			return
		}
		b.triggers = append(b.triggers, trigger{name, func(enc *eventstore.Encoding, r eventstore.Recorded) (id string, in json.RawMessage, err error) {
			e, err := decodeEvent[E](enc, r)
			if err != nil {
				return "", nil, err
			}
			defer func() {
				if p := recover(); p != nil {
					err = fmt.Errorf("the start function panicked: %v", p)
				}
			}()
			id, value := start(e, r)
			if id == "" {
				return "", nil, nil
			}
			in, err = encode(value)
			return id, in, err
		}})
	}}
}

// Name returns the saga's name.
func (d *Definition[In, Out]) Name() string { return d.name }

// Err returns the mistakes in the definition, joined.
func (d *Definition[In, Out]) Err() error { return errors.Join(d.mistakes...) }

// FromStart returns the definition, decided about the past: when the saga is
// new and the log holds events that start it, it starts a run for each of them.
func (d *Definition[In, Out]) FromStart() *Definition[In, Out] { return d.begin(fromStart) }

// FromNow returns the definition, decided about the past: when the saga is new,
// events that are in the log start no run. The decision is recorded in the log
// and stays.
func (d *Definition[In, Out]) FromNow() *Definition[In, Out] { return d.begin(fromNow) }

// Build returns the definition, pinned to a build (ASCII letters, digits, '.', '_'
// and '-'): the runs that it starts are run by definitions of that build only,
// their whole lives long, and it runs no others. So code that runs under way could
// not take is deployed as a new build beside the old one, in the same program or
// in others, until [Engine.Builds] shows that the old one has no open runs. Each
// build has its own lease, and is given to nodes that have it.
//
// Runs that were started without a build belong to the definition without one.
// With several builds, an event that starts a run ([On]) starts it in one of
// them; [Definition.Draining] keeps the old ones out of it.
func (d *Definition[In, Out]) Build(build string) *Definition[In, Out] {
	changed := *d
	changed.pin = build
	if problem := checkBuild(build); problem != "" {
		changed.mistakes = append(slices.Clone(d.mistakes), fmt.Errorf("%w: build %q of saga %q %s", eventstore.ErrInvalid, build, d.name, problem))
	}
	return &changed
}

// Draining returns the definition, which starts no more runs on events ([On]):
// what there is of its build is run to the end.
func (d *Definition[In, Out]) Draining() *Definition[In, Out] {
	changed := *d
	changed.draining = true
	return &changed
}

func checkBuild(build string) string {
	const most = 64
	if build == "" || len(build) > most {
		return fmt.Sprintf("must have 1 to %d characters", most)
	}
	for _, c := range build {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-') {
			return fmt.Sprintf("has the character %q: use ASCII letters, digits, '.', '_' and '-'", c)
		}
	}
	return ""
}

func (d *Definition[In, Out]) begin(b beginning) *Definition[In, Out] {
	changed := *d
	changed.beginning = b
	return &changed
}

func (d *Definition[In, Out]) kind() string { return "saga" }

func (d *Definition[In, Out]) pinned() string { return d.pin }

// Replay runs the function against a recorded history, from the store or from
// a file, without doing anything: what is not recorded ends the replay. It
// returns a [*BlockedError] when the code does not fit the history; in a test
// it tells, before a deployment, whether runs in flight will go on.
func (d *Definition[In, Out]) Replay(ctx context.Context, events []eventstore.Recorded, enc *eventstore.Encoding) error {
	if len(events) == 0 {
		return nil
	}
	h := &history{}
	for i := range events {
		if err := h.add(&events[i]); err != nil {
			return err
		}
	}
	r := newRun(&core{saga: d.name, stream: events[0].Stream, ctx: ctx, code: d.code, h: h, replay: enc})
	if o := r.execute(); o.kind == blocked && o.cause != causeCompensation {
		return &BlockedError{Saga: d.name, ID: r.stream.ID, Reason: o.reason}
	}
	return nil
}

// StartAny is [Start] for tools and tests that do not know the types: the
// input is anything that encodes to the JSON of an In.
func (d *Definition[In, Out]) StartAny(ctx context.Context, host Host, id string, in any) error {
	raw, err := encode(in)
	if err != nil {
		return err
	}
	var typed In
	if err := eventstore.JSON().Unmarshal(raw, &typed); err != nil {
		return fmt.Errorf("%w: the input does not decode into %T: %w", eventstore.ErrInvalid, typed, err)
	}
	return Start(ctx, host, d, id, typed)
}

// WaitAny is [Wait] for tools and tests that do not know the types: the result
// is decoded into what out points to, unless that is nil.
func (d *Definition[In, Out]) WaitAny(ctx context.Context, host Host, id string, out any) error {
	result, err := Wait(ctx, host, d, id)
	if err != nil || out == nil {
		return err
	}
	raw, err := encode(result)
	if err != nil {
		return err
	}
	return eventstore.JSON().Unmarshal(raw, out)
}

// LookAny is [Look] for tools and tests that do not know the types.
func (d *Definition[In, Out]) LookAny(ctx context.Context, host Host, id string) (Info, error) {
	return Look(ctx, host, d, id)
}
