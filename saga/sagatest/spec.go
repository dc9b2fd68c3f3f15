package sagatest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/saga"
)

// Option of [For] and [CrashEverywhere].
type Option func(*settings)

type settings struct {
	encoding *eventstore.Encoding
	now      time.Time
	also     []saga.Process
	open     func(t testing.TB) Backend
	store    bool
	every    int
}

// Encoding decodes the domain's events by the encoding. Defaults to JSON.
func Encoding(e *eventstore.Encoding) Option { return func(s *settings) { s.encoding = e } }

// At sets the time at which the story begins. Defaults to the first moment of
// 2000, UTC.
func At(now time.Time) Option { return func(s *settings) { s.now = now } }

// On tells the story on another store than one in memory. Open is called for
// each story; it closes the store through t.Cleanup.
func On(open func(t testing.TB) Backend) Option { return func(s *settings) { s.open = open } }

// Also runs other processes beside the one under test.
func Also(processes ...saga.Process) Option {
	return func(s *settings) { s.also = append(s.also, processes...) }
}

// Every makes [CrashEverywhere] crash at each n-th write only, for stores that
// take their time: beginning with the first, and with another one for each kind
// of crash.
func Every(n int) Option { return func(s *settings) { s.every = n } }

// storeIndex makes the engine store its index after each step of the story.
func storeIndex(s *settings) { s.store = true }

// Process is what a story is about.
type Process = saga.Process

// replayable is a saga's definition, whatever its types.
type replayable interface {
	Replay(ctx context.Context, events []eventstore.Recorded, enc *eventstore.Encoding) error
}

// Spec is one story about a saga or a reaction. Its methods return it, so that
// a story reads as one sentence, and fail the test at once when something is
// not as expected. It is used by one goroutine.
type Spec struct {
	t       testing.TB
	process Process
	set     settings
	clock   *clock.Manual
	store   Backend
	given   map[uuid.UUID]bool

	// One life of the engine.
	mortal  *mortal
	runtime *aggregate.Runtime
	engine  *saga.Engine
	cancel  context.CancelFunc
	group   *sync.WaitGroup
	// A crash is to come just before or after that write of the engine.
	dieAt   int
	after   bool
	written int
	crashes int
	told    int
}

const owner = "sagatest"

// For begins a story about the process, with an engine that runs it. The
// engine is stopped when the test ends.
func For(t testing.TB, p Process, options ...Option) *Spec {
	t.Helper()
	s := &Spec{t: t, process: p, given: map[uuid.UUID]bool{}, set: settings{
		now:  time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC),
		open: func(testing.TB) Backend { return memory.New() },
	}}
	for _, option := range options {
		option(&s.set)
	}
	s.clock = clock.NewManual(s.set.now)
	s.store = s.set.open(t)
	t.Cleanup(s.stop)
	return s
}

// start begins a life of the engine.
func (s *Spec) start() {
	s.t.Helper()
	dieAt := 0
	if s.dieAt > s.written {
		dieAt = s.dieAt - s.written
	}
	s.mortal = newMortal(s.store, dieAt, s.after)
	s.runtime = aggregate.NewRuntime(s.mortal, aggregate.Options{Clock: s.clock, Encoding: s.set.encoding})
	bus := command.NewBus(s.runtime, command.Options{})
	s.engine = saga.NewEngine(s.mortal, s.mortal, bus, saga.Options{
		Encoding: s.set.encoding, Clock: s.clock, Owner: owner, Logger: slog.New(slog.DiscardHandler), Grace: time.Second,
	})
	for _, p := range append([]saga.Process{s.process}, s.set.also...) {
		if err := s.engine.Add(p); err != nil {
			s.t.Fatalf("the process cannot run: %v", err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	group := &sync.WaitGroup{}
	for _, w := range s.engine.Workers() {
		group.Go(func() { _ = w.Run(ctx) })
	}
	s.cancel, s.group = cancel, group
	for _, w := range s.engine.Workers() {
		if err := w.Ready(ctx); err != nil && !s.mortal.isDead() {
			s.t.Fatalf("the engine does not start: %v", err)
		}
	}
}

func (s *Spec) stop() {
	if s.cancel == nil {
		return
	}
	s.cancel()
	s.group.Wait()
	_ = s.runtime.Stop(context.Background())
	s.written += s.mortal.count()
	s.cancel = nil
}

// running makes sure that an engine is there, and that it is alive.
func (s *Spec) running() {
	s.t.Helper()
	if s.cancel != nil && s.mortal.isDead() {
		s.crashes++
		s.stop()
	}
	if s.cancel == nil {
		s.start()
	}
}

// settle waits until the engine has nothing left to do at this time. An engine
// that dies on the way is replaced.
func (s *Spec) settle() {
	s.t.Helper()
	for {
		s.running()
		err := s.settleOnce()
		if err == nil && s.set.store {
			for _, name := range s.names() {
				_, err = s.engine.List(context.Background(), name, saga.ListOptions{})
				if errors.Is(err, saga.ErrNotFound) {
					_, err = s.engine.Backlogs(context.Background(), name)
				}
			}
		}
		if err == nil && !s.mortal.isDead() {
			return
		}
		if !s.mortal.isDead() {
			s.t.Fatalf("the engine stopped: %v", err)
		}
	}
}

func (s *Spec) names() []string {
	names := []string{s.process.Name()}
	for _, p := range s.set.also {
		names = append(names, p.Name())
	}
	return names
}

func (s *Spec) settleOnce() error {
	ctx := context.Background()
	for {
		head, err := s.store.Head(ctx)
		if err != nil {
			return err
		}
		for _, w := range s.engine.Workers() {
			if err := w.WaitThrough(ctx, head); err != nil {
				return err
			}
		}
		if again, err := s.store.Head(ctx); err != nil || again == head {
			return err
		}
	}
}

// Given says what had happened in a stream before the engine starts, or
// happens without being looked at by [Spec.Happened].
func (s *Spec) Given(category, id string, events ...aggregate.Event) *Spec {
	s.t.Helper()
	s.append(category, id, events)
	if s.cancel != nil {
		s.settle()
	}
	return s
}

// When says that events happen, and lets the engine do what it does about them.
func (s *Spec) When(category, id string, events ...aggregate.Event) *Spec {
	s.t.Helper()
	s.running()
	s.Given(category, id, events...)
	s.settle()
	return s
}

func (s *Spec) append(category, id string, events []aggregate.Event) {
	s.t.Helper()
	var commit eventstore.Commit
	for _, e := range events {
		event := eventstore.Event{ID: uuid.Must(uuid.NewV7()), Stream: eventstore.Stream{Category: category, ID: id}, Type: e.EventType(), Time: s.clock.Now()}
		data, err := s.set.encoding.Encode(event.Type, e, &event.Metadata)
		if err != nil {
			s.t.Fatalf("event %T: %v", e, err)
		}
		event.Data = data
		s.given[event.ID] = true
		if tagged, ok := e.(interface{ Tags() []string }); ok {
			event.Tags = tagged.Tags()
		}
		commit.Events = append(commit.Events, event)
	}
	if _, err := s.store.Append(context.Background(), commit); err != nil {
		s.t.Fatalf("events of stream %s-%s: %v", category, id, err)
	}
}

// Start starts a run of the saga. The input is given to it as JSON.
func (s *Spec) Start(id string, in any) *Spec {
	s.t.Helper()
	starter, ok := s.process.(interface {
		StartAny(ctx context.Context, host saga.Host, id string, in any) error
	})
	if !ok {
		s.t.Fatalf("%T cannot be started by a call", s.process)
	}
	s.running()
	s.settle()
	for {
		if err := starter.StartAny(context.Background(), s.engine, id, in); err == nil {
			break
		} else if !s.mortal.isDead() {
			s.t.Fatalf("start run %q: %v", id, err)
		}
		s.running()
	}
	s.settle()
	return s
}

// Signal tells a run of the saga something, see saga.Signal.Send. The signal's
// id is made of the run and of how often the story has said this before, so that
// it is given once although the engine may crash over it.
func (s *Spec) Signal(run, name string, value any) *Spec {
	s.t.Helper()
	raw, err := json.Marshal(value)
	if err != nil {
		s.t.Fatalf("signal %q: %v", name, err)
	}
	s.told++
	id := fmt.Sprintf("story-%d", s.told)
	return s.tell(run, func(e *saga.Engine) error {
		return e.Signal(context.Background(), s.process.Name(), run, name, id, raw)
	})
}

// Cancel asks a run of the saga to end.
func (s *Spec) Cancel(run, reason string) *Spec {
	s.t.Helper()
	return s.tell(run, func(e *saga.Engine) error { return e.Cancel(context.Background(), s.process.Name(), run, reason) })
}

func (s *Spec) tell(run string, tell func(*saga.Engine) error) *Spec {
	s.t.Helper()
	s.settle()
	for {
		if err := tell(s.engine); err == nil {
			break
		} else if !s.mortal.isDead() {
			s.t.Fatalf("run %q: %v", run, err)
		}
		s.running()
	}
	s.settle()
	return s
}

// Advance lets the time go by: whatever is due on the way happens at its
// instant, in order.
func (s *Spec) Advance(d time.Duration) *Spec {
	s.t.Helper()
	to := s.clock.Now().Add(d)
	s.settle()
	for {
		var due time.Time
		some := false
		for _, w := range s.engine.Workers() {
			if at, ok := w.NextDue(); ok && !at.After(to) && (!some || at.Before(due)) {
				due, some = at, true
			}
		}
		if !some {
			break
		}
		s.clock.Set(due)
		for _, w := range s.engine.Workers() {
			_ = w.Fire(context.Background(), due) // an error shows when it settles
		}
		s.settle()
	}
	s.clock.Set(to)
	s.settle()
	return s
}

// Restart stops the engine and starts another one, as a deployment does.
func (s *Spec) Restart() *Spec {
	s.t.Helper()
	s.running()
	s.stop()
	s.start()
	s.settle()
	return s
}

// Deploy is [Restart] with other code under the same name.
func (s *Spec) Deploy(p Process) *Spec {
	s.t.Helper()
	s.process = p
	return s.Restart()
}

// Resume makes a blocked run go on.
func (s *Spec) Resume(id string) *Spec {
	s.t.Helper()
	s.running()
	if err := s.engine.Resume(context.Background(), s.process.Name(), id); err != nil && !s.mortal.isDead() {
		s.t.Fatalf("resume run %q: %v", id, err)
	}
	s.settle()
	return s
}

// ReplayDeadLetters makes the reaction handle its dead letters again.
func (s *Spec) ReplayDeadLetters() *Spec {
	s.t.Helper()
	s.running()
	if _, err := s.engine.ReplayDeadLetters(context.Background(), s.process.Name()); err != nil && !s.mortal.isDead() {
		s.t.Fatalf("replay the dead letters: %v", err)
	}
	s.settle()
	return s
}

// Engine returns the engine that runs now, for what the kit has no word for.
func (s *Spec) Engine() *saga.Engine {
	s.t.Helper()
	s.settle()
	return s.engine
}

// Streams returns everything that is in the log, by stream.
func (s *Spec) Streams() map[eventstore.Stream][]eventstore.Recorded {
	s.t.Helper()
	s.settle()
	all := map[eventstore.Stream][]eventstore.Recorded{}
	for r, err := range s.store.Read(context.Background(), eventstore.All(), eventstore.ReadOptions{}) {
		if err != nil {
			s.t.Fatal(err)
		}
		all[r.Stream] = append(all[r.Stream], r)
	}
	return all
}

// Now returns the time of the story.
func (s *Spec) Now() time.Time { return s.clock.Now() }

func (s *Spec) look(id string) saga.Info {
	s.t.Helper()
	s.settle()
	looker, ok := s.process.(interface {
		LookAny(ctx context.Context, host saga.Host, id string) (saga.Info, error)
	})
	if !ok {
		s.t.Fatalf("%T has no runs", s.process)
	}
	info, err := looker.LookAny(context.Background(), s.engine, id)
	if err != nil {
		s.t.Fatalf("run %q: %v", id, err)
	}
	return info
}

func (s *Spec) history(id string) []eventstore.Recorded {
	s.t.Helper()
	return s.read(eventstore.Stream{Category: "saga." + s.process.Name(), ID: id})
}

func (s *Spec) read(stream eventstore.Stream) []eventstore.Recorded {
	s.t.Helper()
	var events []eventstore.Recorded
	for r, err := range s.store.Read(context.Background(), eventstore.OneStream(stream), eventstore.ReadOptions{}) {
		if err != nil {
			s.t.Fatalf("read stream %s: %v", stream, err)
		}
		events = append(events, r)
	}
	return events
}

// End returns how the run ended: nil, a *saga.FailedError or, if it is
// blocked, a *saga.BlockedError; its result is decoded into out unless that is
// nil. The test fails if the run has not ended.
func (s *Spec) end(id string, out any) error {
	s.t.Helper()
	info := s.look(id)
	switch info.Status {
	case saga.StatusCompleted, saga.StatusFailed, saga.StatusCancelled, saga.StatusTerminated, saga.StatusBlocked:
	default:
		s.t.Fatalf("run %q has not ended: it is %s, at %q, last error %q", id, info.Status, info.Step, info.Error)
	}
	waiter, ok := s.process.(interface {
		WaitAny(ctx context.Context, host saga.Host, id string, out any) error
	})
	if !ok {
		s.t.Fatalf("%T has no runs", s.process)
	}
	return waiter.WaitAny(context.Background(), s.engine, id, out)
}

// Completed expects that the run has ended with the result.
func (s *Spec) Completed(id string, want any) *Spec {
	s.t.Helper()
	got := reflect.New(reflect.TypeOf(want))
	if err := s.end(id, got.Interface()); err != nil {
		s.t.Fatalf("run %q did not complete: %v", id, err)
	}
	if !reflect.DeepEqual(got.Elem().Interface(), want) {
		s.t.Fatalf("run %q completed with %+v, want %+v", id, got.Elem().Interface(), want)
	}
	return s
}

// Failed expects that the run has failed, with the error by errors.Is, and that
// the compensations ran, in this order.
func (s *Spec) Failed(id string, want error, compensations ...string) *Spec {
	s.t.Helper()
	err := s.end(id, nil)
	failed, ok := errors.AsType[*saga.FailedError](err)
	if !ok {
		s.t.Fatalf("run %q did not fail but ended with %v", id, err)
	}
	if want != nil && !errors.Is(err, want) {
		s.t.Fatalf("run %q failed with %q, want %q", id, err, want)
	}
	if !slices.Equal(failed.Compensated, compensations) {
		s.t.Fatalf("run %q compensated %q, want %q", id, failed.Compensated, compensations)
	}
	return s
}

// Cancelled expects that the run was cancelled, and that the compensations ran,
// in this order.
func (s *Spec) Cancelled(id string, compensations ...string) *Spec {
	s.t.Helper()
	s.Failed(id, nil, compensations...)
	if info := s.look(id); info.Status != saga.StatusCancelled {
		s.t.Fatalf("run %q was not cancelled, it is %s", id, info.Status)
	}
	return s
}

// Published expects what the run has last published under the name.
func (s *Spec) Published(id, name string, want any) *Spec {
	s.t.Helper()
	raw, ok := s.look(id).Published[name]
	if !ok {
		s.t.Fatalf("run %q has published nothing as %q", id, name)
	}
	got := reflect.New(reflect.TypeOf(want))
	if err := json.Unmarshal(raw, got.Interface()); err != nil {
		s.t.Fatalf("run %q has published %s as %q: %v", id, raw, name, err)
	}
	if !reflect.DeepEqual(got.Elem().Interface(), want) {
		s.t.Fatalf("run %q has published %+v as %q, want %+v", id, got.Elem().Interface(), name, want)
	}
	return s
}

// Blocked expects that the run is blocked, for a reason that contains the text.
func (s *Spec) Blocked(id, text string) *Spec {
	s.t.Helper()
	info := s.look(id)
	if info.Status != saga.StatusBlocked {
		s.t.Fatalf("run %q is not blocked but %s", id, info.Status)
	}
	if !strings.Contains(info.Error, text) {
		s.t.Fatalf("run %q is blocked because %q, want %q in it", id, info.Error, text)
	}
	return s
}

// Waiting expects that the run waits at a step whose text, for example
// `sleep "grace"`, contains the given one.
func (s *Spec) Waiting(id, step string) *Spec {
	s.t.Helper()
	info := s.look(id)
	if info.Status != saga.StatusWaiting {
		s.t.Fatalf("run %q does not wait: it is %s, last error %q", id, info.Status, info.Error)
	}
	if !strings.Contains(info.Step, step) {
		s.t.Fatalf("run %q waits at %s, want %s", id, info.Step, step)
	}
	return s
}

// NotStarted expects that there is no run of the id.
func (s *Spec) NotStarted(id string) *Spec {
	s.t.Helper()
	s.settle()
	if events := s.history(id); len(events) > 0 {
		s.t.Fatalf("run %q has started: its history has %d events", id, len(events))
	}
	return s
}

// History expects the types of the events of the run's history.
func (s *Spec) History(id string, want ...string) *Spec {
	s.t.Helper()
	s.settle()
	var got []string
	for _, r := range s.history(id) {
		got = append(got, r.Type)
	}
	if !slices.Equal(got, want) {
		s.t.Fatalf("history of run %q is\n  %s\nwant\n  %s", id, strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
	return s
}

// Happened expects the events of a stream that were not given by the test.
func (s *Spec) Happened(category, id string, want ...aggregate.Event) *Spec {
	s.t.Helper()
	s.settle()
	stream := eventstore.Stream{Category: category, ID: id}
	var got, wanted []string
	for _, r := range s.read(stream) {
		if !s.given[r.ID] {
			got = append(got, r.Type+" "+string(r.Data))
		}
	}
	for _, e := range want {
		var m eventstore.Metadata
		data, err := s.set.encoding.Encode(e.EventType(), e, &m)
		if err != nil {
			s.t.Fatalf("event %T: %v", e, err)
		}
		wanted = append(wanted, e.EventType()+" "+string(data))
	}
	if !slices.Equal(got, wanted) {
		s.t.Fatalf("stream %s got\n  %s\nwant\n  %s", stream, strings.Join(got, "\n  "), strings.Join(wanted, "\n  "))
	}
	return s
}

// outcome is what a story came to: the domain's streams, and how each run ended.
func (s *Spec) outcome() map[string][]string {
	s.t.Helper()
	s.settle()
	all := map[string][]string{}
	for r, err := range s.store.Read(context.Background(), eventstore.All(), eventstore.ReadOptions{}) {
		if err != nil {
			s.t.Fatal(err)
		}
		name := r.Stream.String()
		switch {
		case strings.HasPrefix(r.Stream.Category, "saga."):
			switch r.Type {
			case "saga.completed", "saga.failed", "saga.cancelled", "saga.compensated":
				all[name] = append(all[name], r.Type+" "+string(r.Data))
			}
		case strings.HasPrefix(r.Stream.Category, "reaction."):
			if r.Type == "reaction.handled" {
				var p struct {
					Event struct {
						Stream  string `json:"stream"`
						Version int    `json:"version"`
					} `json:"event"`
				}
				_ = json.Unmarshal(r.Data, &p)
				all[name] = append(all[name], fmt.Sprintf("%s %s %d", r.Type, p.Event.Stream, p.Event.Version))
			}
		default:
			all[name] = append(all[name], r.Type+" "+string(r.Data))
		}
	}
	return all
}

// replayEverywhere replays each history, and every beginning of it.
func (s *Spec) replayEverywhere() {
	s.t.Helper()
	r, ok := s.process.(replayable)
	if !ok {
		return
	}
	runs := map[string][]eventstore.Recorded{}
	for e, err := range s.store.Read(context.Background(), eventstore.OneCategory("saga."+s.process.Name()), eventstore.ReadOptions{}) {
		if err != nil {
			s.t.Fatal(err)
		}
		runs[e.Stream.ID] = append(runs[e.Stream.ID], e)
	}
	for _, id := range slices.Sorted(maps.Keys(runs)) {
		for n := range runs[id] {
			if err := r.Replay(context.Background(), runs[id][:n+1], s.set.encoding); err != nil {
				s.t.Fatalf("the first %d events of its history do not fit: %v", n+1, err)
			}
		}
	}
}

// Replay replays every history in the folder, and every beginning of each,
// against the saga as it is today. They are files that saga.Engine.Export, or
// "deed sagas export", has written; keep some of production beside the test, and
// a change that runs under way could not take fails it. Files of other sagas
// are left alone; a folder without any of this one fails the test.
func Replay(t testing.TB, p Process, folder string, options ...Option) {
	t.Helper()
	r, ok := p.(replayable)
	if !ok {
		t.Fatalf("%T has no histories", p)
	}
	var set settings
	for _, option := range options {
		option(&set)
	}
	files, err := filepath.Glob(filepath.Join(folder, "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	replayed := 0
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		events, err := saga.ReadHistory(data)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if len(events) == 0 || events[0].Stream.Category != "saga."+p.Name() {
			continue
		}
		replayed++
		for n := range events {
			if err := r.Replay(context.Background(), events[:n+1], set.encoding); err != nil {
				t.Fatalf("%s: the first %d of %d events do not fit: %v", file, n+1, len(events), err)
			}
		}
	}
	if replayed == 0 {
		t.Fatalf("there is no history of saga %q in %s", p.Name(), folder)
	}
}

// CrashEverywhere tells the story once as it is, then again for every write
// that the engine makes in it, with a crash just before and just after that
// write, after which a new engine goes on with the story. Writes are its appends,
// and the transactions of saga.Tx. Each time the
// streams of the domain, the results of the runs and the compensations must
// come out the same; check, if not nil, looks at the rest, such as what the
// gateways saw. Story is called with a new Spec each time, and must make its
// gateways anew. At the end every history is replayed, at every length.
//
// The crashes are told twice: with an index that is made again from the log,
// and with one that was stored just before.
func CrashEverywhere(t *testing.T, p func() Process, story func(s *Spec), check func(t testing.TB), options ...Option) {
	t.Helper()
	reference := For(t, p(), options...)
	story(reference)
	want := reference.outcome()
	writes := reference.written + reference.mortal.count()
	if check != nil {
		check(t)
	}
	reference.replayEverywhere()
	reference.stop()
	if writes == 0 {
		t.Fatal("the engine wrote nothing in this story: it would not crash anywhere")
	}
	every, crashes, kind := max(reference.set.every, 1), 0, 0
	for _, stored := range []bool{false, true} {
		for _, after := range []bool{false, true} {
			when := "before"
			if after {
				when = "after"
			}
			for k := 1 + kind%every; k <= writes; k += every {
				crashes++
				t.Run(fmt.Sprintf("%s write %d, index stored %t", when, k, stored), func(t *testing.T) {
					with := slices.Clone(options)
					if stored {
						with = append(with, storeIndex)
					}
					// What goes on side by side is not always written in as many pieces.
					for tries := 0; ; tries++ {
						s := For(t, p(), with...)
						s.dieAt, s.after = k, after
						story(s)
						got := s.outcome()
						if !reflect.DeepEqual(got, want) {
							t.Fatalf("after %d crashes the story ends with\n%s\nwant\n%s", s.crashes, render(got), render(want))
						}
						if check != nil {
							check(t)
						}
						s.replayEverywhere()
						s.stop()
						if s.crashes > 0 {
							return
						}
						if tries == 5 && k <= writes/2 {
							t.Fatalf("the engine makes fewer than %d of the %d writes that it made at first: it did not crash", k, writes)
						}
						if tries == 5 {
							t.Skipf("the engine makes fewer than the %d writes that it made at first", k)
						}
					}
				})
			}
			kind++
		}
	}
	t.Logf("%d crashes, at %d writes", crashes, writes)
}

func render(outcome map[string][]string) string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(outcome)) {
		fmt.Fprintf(&b, "  %s\n", name)
		for _, line := range outcome[name] {
			fmt.Fprintf(&b, "    %s\n", line)
		}
	}
	return b.String()
}
