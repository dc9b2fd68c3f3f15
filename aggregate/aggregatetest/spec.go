package aggregatetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/alike"
	"github.com/deed-go/deed/internal/clock"
)

// Option of [For].
type Option func(*settings)

type settings struct {
	encoding *eventstore.Encoding
	now      time.Time
	commands command.Options
}

// Encoding stores the events by the encoding. Defaults to JSON.
func Encoding(e *eventstore.Encoding) Option { return func(s *settings) { s.encoding = e } }

// At sets the time at which events are recorded. Defaults to the first moment
// of 2000, UTC.
func At(now time.Time) Option { return func(s *settings) { s.now = now } }

// Commands sets up the bus, for example with middleware.
func Commands(o command.Options) Option { return func(s *settings) { s.commands = o } }

// Spec is one story about an aggregate. Its methods return it, so that a story
// reads as one sentence, and fail the test at once when something is not as
// expected. It is used by one goroutine.
type Spec[S any] struct {
	t       testing.TB
	def     *aggregate.Definition[S]
	enc     *eventstore.Encoding
	now     time.Time
	store   *memory.Store
	runtime *aggregate.Runtime
	bus     *command.Bus

	given []aggregate.Event // for the stream of the next command
	id    string

	// The last command, and what became of it.
	told    string
	receipt eventstore.Receipt
	err     error
	events  []eventstore.Recorded
}

// For begins a story on an empty log. The engine stops with the test.
func For[S any](t testing.TB, def *aggregate.Definition[S], options ...Option) *Spec[S] {
	t.Helper()
	settings := settings{now: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)}
	for _, option := range options {
		option(&settings)
	}
	if err := def.Err(); err != nil {
		t.Fatalf("the definition has mistakes:\n%v", err)
	}
	store := memory.New()
	s := &Spec[S]{
		t: t, def: def, enc: settings.encoding, now: settings.now, store: store,
		runtime: aggregate.NewRuntime(store, aggregate.Options{Encoding: settings.encoding, Clock: clock.NewManual(settings.now)}),
	}
	s.bus = command.NewBus(s.runtime, settings.commands)
	t.Cleanup(func() {
		if err := s.runtime.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Errorf("stop: %v", err)
		}
		_ = store.Close()
	})
	return s
}

// Given adds events to the history of the aggregate that the next command is
// for.
func (s *Spec[S]) Given(events ...aggregate.Event) *Spec[S] {
	s.given = append(s.given, events...)
	return s
}

// GivenIn adds events to the history of another stream, for decisions over a
// boundary. The definition must know them.
func (s *Spec[S]) GivenIn(stream eventstore.Stream, events ...aggregate.Event) *Spec[S] {
	s.t.Helper()
	var encoded []eventstore.Event
	for _, event := range events {
		e, err := s.def.Encode(s.enc, stream, event, eventstore.Metadata{}, s.now)
		if err != nil {
			s.t.Fatalf("given %s: %v", show(event), err)
		}
		s.survives(event, e)
		encoded = append(encoded, e)
	}
	for part := range slices.Chunk(encoded, eventstore.DefaultLimits().EventsPerCommit) {
		if _, err := s.store.Append(s.t.Context(), eventstore.Commit{Events: part}); err != nil {
			s.t.Fatalf("given the events of %q: %v", stream, err)
		}
	}
	return s
}

// survives fails the test if the event does not come back from its stored form.
func (s *Spec[S]) survives(event aggregate.Event, stored eventstore.Event) {
	s.t.Helper()
	want := pointed(event)
	got := reflect.New(reflect.TypeOf(want).Elem()).Interface()
	r := eventstore.Recorded{Stream: stored.Stream, Type: stored.Type, Data: stored.Data, Metadata: stored.Metadata}
	if err := s.enc.Decode(r, got); err != nil {
		s.t.Fatalf("event %s does not come back from the log: %v", show(event), err)
	}
	if !alike.Equal(want, got) {
		s.t.Fatalf("event %q does not come back from the log as it was; unexported fields and fields tagged \"-\" are lost:\nbefore %+v\nafter  %+v\nstored %s",
			stored.Type, reflect.ValueOf(want).Elem(), reflect.ValueOf(got).Elem(), stored.Data)
	}
}

// pointed returns a pointer to the event's struct.
func pointed(event aggregate.Event) any {
	v := reflect.ValueOf(event)
	if v.Kind() == reflect.Pointer {
		return event
	}
	p := reflect.New(v.Type())
	p.Elem().Set(v)
	return p.Interface()
}

// When executes the command.
func (s *Spec[S]) When(c command.Command[S], options ...command.Option) *Spec[S] {
	s.t.Helper()
	ctx := s.t.Context()
	s.told, s.id = describe(c), c.AggregateID()
	given := s.given
	s.given = nil
	s.GivenIn(s.def.Stream(s.id), given...)
	s.isPure(c)
	before, err := s.store.Head(ctx)
	if err != nil {
		s.t.Fatalf("%s: %v", s.told, err)
	}
	s.receipt, s.err = command.Execute(ctx, s.bus, s.def, c, options...)
	s.events = nil
	for r, err := range s.store.Read(ctx, eventstore.All(), eventstore.ReadOptions{After: before}) {
		if err != nil {
			s.t.Fatalf("%s: %v", s.told, err)
		}
		s.events = append(s.events, r)
	}
	if s.err != nil && len(s.events) > 0 {
		s.t.Fatalf("%s failed (%v), but these events were written:\n%s", s.told, s.err, s.list(s.events))
	}
	s.replays()
	return s
}

// isPure asks Decide twice, on two states that share nothing.
func (s *Spec[S]) isPure(c command.Command[S]) {
	s.t.Helper()
	first, err1 := s.state(c)
	second, err2 := s.state(c)
	if err1 != nil || err2 != nil {
		return // the execution tells
	}
	if !alike.Equal(first, second) {
		s.t.Fatalf("%s: replaying the events twice gives two states; folds must depend on nothing but the event:\nfirst %+v\nthen  %+v", s.told, first, second)
	}
	events, err, panicked := ask(c, first)
	if panicked {
		return
	}
	if !alike.Equal(first, second) {
		s.t.Fatalf("%s: Decide changed the state it was given, which the engine keeps for the next command; it may only return events:\nbefore %+v\nafter  %+v", s.told, second, first)
	}
	again, errAgain, _ := ask(c, second)
	if (err == nil) != (errAgain == nil) || err != nil && err.Error() != errAgain.Error() || !alike.Equal(events, again) {
		s.t.Fatalf("%s: Decide decided differently when asked again on the same state; clocks, random numbers and counters belong into the command:\nfirst %s %v\nthen  %s %v", s.told, show(events), err, show(again), errAgain)
	}
	for _, event := range events {
		if event == nil {
			continue
		}
		if stored, err := s.def.Encode(s.enc, s.def.Stream(s.id), event, eventstore.Metadata{}, s.now); err == nil {
			s.survives(event, stored)
		}
	}
}

func ask[S any](c command.Command[S], state S) (events []aggregate.Event, err error, panicked bool) { //nolint:staticcheck // the error is the command's answer
	defer func() {
		if recover() != nil {
			panicked = true
		}
	}()
	events, err = c.Decide(state)
	return events, err, false
}

// state folds what the command will be decided on.
func (s *Spec[S]) state(c command.Command[S]) (state S, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	bounded, ok := c.(interface {
		Boundary() (eventstore.Query, S)
	})
	if !ok {
		state, _, err = aggregate.Load(s.t.Context(), s.runtime, s.def, s.id)
		return state, err
	}
	query, state := bounded.Boundary()
	for r, err := range s.store.Read(s.t.Context(), query, eventstore.ReadOptions{}) {
		if err == nil {
			err = s.def.Apply(s.enc, &state, r)
		}
		if err != nil {
			return state, err
		}
	}
	return state, nil
}

// replays compares the state in memory with a replay.
func (s *Spec[S]) replays() {
	s.t.Helper()
	replayed, _, err := aggregate.Load(s.t.Context(), s.runtime, s.def, s.id)
	if err != nil {
		return
	}
	var kept S
	_, err = aggregate.Execute(s.t.Context(), s.runtime, s.def, aggregate.Request[S]{ID: s.id, Decide: func(state S) ([]aggregate.Event, error) {
		kept = state
		return nil, nil
	}})
	if err == nil && !alike.Equal(kept, replayed) {
		s.t.Fatalf("%s: replaying the events gives another state than the one in memory; folds must depend on nothing but the event:\nin memory %+v\nreplayed  %+v", s.told, kept, replayed)
	}
}

func (s *Spec[S]) needsWhen(method string) {
	s.t.Helper()
	if s.told == "" {
		s.t.Fatalf("%s without a command: call When first", method)
	}
}

// Then expects that the command succeeded and exactly these events happened,
// in this order.
func (s *Spec[S]) Then(events ...aggregate.Event) *Spec[S] {
	s.t.Helper()
	s.needsWhen("Then")
	if s.err != nil {
		s.t.Fatalf("%s failed: %v\nexpected:\n%s", s.told, s.err, indent(lines(events)))
	}
	happened := make([]aggregate.Event, len(s.events))
	for i, r := range s.events {
		happened[i] = s.value(r)
	}
	if len(events) == len(happened) {
		same := true
		for i := range events {
			same = same && alike.Equal(pointed(events[i]), pointed(happened[i]))
		}
		if same {
			return s
		}
	}
	s.t.Fatalf("%s: what happened is not what was expected (- expected, + happened):\n%s", s.told, diff(lines(events), lines(happened)))
	return s
}

// value decodes a recorded event into the Go type of its On.
func (s *Spec[S]) value(r eventstore.Recorded) aggregate.Event {
	s.t.Helper()
	e, err := s.def.Decode(s.enc, r)
	if err != nil {
		s.t.Fatalf("%s: %v", s.told, err)
	}
	return e
}

// Nothing expects that the command succeeded and nothing happened.
func (s *Spec[S]) Nothing() *Spec[S] {
	s.t.Helper()
	s.needsWhen("Nothing")
	return s.Then()
}

// Rejected expects that the command was refused for the reason, and that nothing
// happened. The reason is the same as errors.Is sees it; one made by
// [command.Reject] or [command.Rejectf] also when it says the same. With nil,
// any [command.Rejection] will do.
func (s *Spec[S]) Rejected(reason error) *Spec[S] {
	s.t.Helper()
	s.needsWhen("Rejected")
	switch {
	case s.err == nil:
		s.t.Fatalf("%s was not rejected; this happened:\n%s", s.told, s.list(s.events))
	case reason == nil && !command.IsRejection(s.err):
		s.t.Fatalf("%s failed, but not by a command.Rejection: %v", s.told, s.err)
	case reason != nil && !errors.Is(s.err, reason) && !saysTheSame(s.err, reason):
		s.t.Fatalf("%s was rejected for another reason:\nexpected %v\ngot      %v", s.told, reason, s.err)
	}
	return s
}

// saysTheSame compares rejections that were made on the spot.
func saysTheSame(err, reason error) bool {
	return command.IsRejection(err) && command.IsRejection(reason) && err.Error() == reason.Error()
}

// RejectedSaying is [Spec.Rejected] for reasons without a name of their own:
// the message of the rejection must contain the text.
func (s *Spec[S]) RejectedSaying(text string) *Spec[S] {
	s.t.Helper()
	s.needsWhen("RejectedSaying")
	s.Rejected(nil)
	if !strings.Contains(s.err.Error(), text) {
		s.t.Fatalf("%s was rejected for another reason:\nexpected …%s…\ngot      %v", s.told, text, s.err)
	}
	return s
}

// Fails expects that the command failed with the error, as errors.Is sees it,
// for what is not the domain's no: an unknown event, a reused key.
func (s *Spec[S]) Fails(target error) *Spec[S] {
	s.t.Helper()
	s.needsWhen("Fails")
	if command.IsRejection(s.err) || !errors.Is(s.err, target) {
		s.t.Fatalf("%s did not fail as expected:\nexpected %v\ngot      %v", s.told, target, s.err)
	}
	return s
}

// State shows the aggregate's state, replayed from its events, to check.
func (s *Spec[S]) State(check func(state S)) *Spec[S] {
	s.t.Helper()
	if s.told == "" {
		s.id = "given"
		given := s.given
		s.given = nil
		s.GivenIn(s.def.Stream(s.id), given...)
	}
	state, _, err := aggregate.Load(s.t.Context(), s.runtime, s.def, s.id)
	if err != nil {
		s.t.Fatalf("load %q: %v", s.def.Stream(s.id), err)
	}
	check(state)
	return s
}

// Recorded shows how the events of the last command were recorded: tags,
// metadata, streams.
func (s *Spec[S]) Recorded(check func(events []eventstore.Recorded)) *Spec[S] {
	s.t.Helper()
	s.needsWhen("Recorded")
	check(s.events)
	return s
}

func (s *Spec[S]) list(events []eventstore.Recorded) string {
	all := make([]string, 0, len(events))
	for _, r := range events {
		all = append(all, r.Type+" "+string(r.Data))
	}
	return indent(all)
}

func describe(c any) string {
	return strings.TrimPrefix(reflect.TypeOf(c).String(), "*") + " " + show(c)
}

// show is JSON where possible, for it is what readers of tests know.
func show(v any) string {
	if data, err := json.Marshal(v); err == nil {
		return string(data)
	}
	return fmt.Sprintf("%+v", v)
}

func lines(events []aggregate.Event) []string {
	all := make([]string, 0, len(events))
	for _, e := range events {
		if e == nil {
			all = append(all, "<nil>")
			continue
		}
		all = append(all, e.EventType()+" "+show(e))
	}
	return all
}

func indent(lines []string) string {
	if len(lines) == 0 {
		return "  (nothing)"
	}
	return "  " + strings.Join(lines, "\n  ")
}

// diff is the shortest edit from one list of lines to another.
func diff(from, to []string) string {
	common := make([][]int, len(from)+1)
	for i := range common {
		common[i] = make([]int, len(to)+1)
	}
	for i := len(from) - 1; i >= 0; i-- {
		for j := len(to) - 1; j >= 0; j-- {
			if from[i] == to[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out []string
	i, j := 0, 0
	for i < len(from) || j < len(to) {
		switch {
		case i < len(from) && j < len(to) && from[i] == to[j]:
			out = append(out, "  "+from[i])
			i++
			j++
		case i < len(from) && (j == len(to) || common[i+1][j] >= common[i][j+1]):
			out = append(out, "- "+from[i])
			i++
		default:
			out = append(out, "+ "+to[j])
			j++
		}
	}
	return strings.Join(out, "\n")
}
