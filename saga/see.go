package saga

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Timeline is everything that a run's history tells, step by step.
type Timeline struct {
	Saga string `json:"saga"`
	Info
	// Input is what the run, or its present life ([Run.Continue]), was started with.
	Input json.RawMessage `json:"input"`
	// Output is what it has returned.
	Output json.RawMessage `json:"output,omitempty"`
	// Steps are in the order in which they began.
	Steps []StepInfo `json:"steps"`
	// Pending are the compensations that would run if it failed now, the first one
	// first.
	Pending []string `json:"pending,omitempty"`
	// Signals are those that it has not taken.
	Signals []SignalInfo `json:"signals,omitempty"`
	// Events and Bytes are the size of the history.
	Events int `json:"events"`
	Bytes  int `json:"bytes"`
}

// StepInfo is one step in a [Timeline].
type StepInfo struct {
	// Key names the step within the run, for [Engine.Skip] and [Engine.Restart].
	Key string `json:"key"`
	// Text is for people: `do "charge" (occurrence 2)`.
	Text   string     `json:"text"`
	Status StepStatus `json:"status"`
	Began  time.Time  `json:"began"`
	Ended  time.Time  `json:"ended,omitzero"`
	// Attempts are the failed ones.
	Attempts []AttemptInfo   `json:"attempts,omitempty"`
	Output   json.RawMessage `json:"output,omitempty"`
	Error    string          `json:"error,omitempty"`
	// Due is when it goes on at the latest: the next attempt, the end of a sleep, the
	// timeout of a wait.
	Due time.Time `json:"due,omitzero"`
	// For is the event or signal that it waits for, or that it has got.
	For string `json:"for,omitempty"`
	// Note is why it was skipped.
	Note string `json:"note,omitempty"`
}

// StepStatus says how a step is doing.
type StepStatus string

// The statuses of a step.
const (
	// StepOpen: it is at work, or waits.
	StepOpen StepStatus = "open"
	// StepRetrying: it has failed, and is tried again.
	StepRetrying  StepStatus = "retrying"
	StepSucceeded StepStatus = "succeeded"
	StepFailed    StepStatus = "failed"
	StepCancelled StepStatus = "cancelled"
	StepTimedOut  StepStatus = "timed out"
	// StepSkipped: somebody has given its result by hand.
	StepSkipped StepStatus = "skipped"
)

// AttemptInfo is a failed attempt.
type AttemptInfo struct {
	Number int       `json:"number"`
	At     time.Time `json:"at"`
	Error  string    `json:"error"`
}

// SignalInfo is a signal that a run has got.
type SignalInfo struct {
	Name  string          `json:"name"`
	Value json.RawMessage `json:"value"`
}

// Timeline returns what the history of a run tells. The error is [ErrNotFound]
// when there is none.
func (e *Engine) Timeline(ctx context.Context, saga, run string) (Timeline, error) {
	events, err := e.History(ctx, saga, run)
	if err != nil {
		return Timeline{}, err
	}
	t := Timeline{Saga: saga, Events: len(events)}
	r := &row{Info: Info{ID: run}}
	h := &history{}
	type rollback struct {
		name string
		line lineID
	}
	var pending []rollback
	steps := map[stepID]*StepInfo{}
	var order []*StepInfo
	for i := range events {
		event := &events[i]
		t.Bytes += len(event.Data)
		if err := r.fold(event); err != nil {
			return Timeline{}, err
		}
		if err := h.add(event); err != nil {
			return Timeline{}, err
		}
		p, err := decodePayload(event)
		if err != nil {
			return Timeline{}, err
		}
		switch event.Type {
		case typeContinued:
			clear(steps)
			order, pending = nil, nil
		case typeRestarted:
			known := map[stepID]bool{}
			for _, line := range h.lines {
				for _, rec := range *line {
					known[rec.id] = true
				}
			}
			order = slices.DeleteFunc(order, func(s *StepInfo) bool {
				for id, info := range steps {
					if info == s && !known[id] {
						delete(steps, id)
						return true
					}
				}
				return false
			})
		case typeRollbackAdded:
			pending = append(pending, rollback{p.Step.compensation(), p.Step.line()})
			continue
		case typeSettled:
			at := p.Step.line()
			pending = slices.DeleteFunc(pending, func(rb rollback) bool { return at.branch == "" || rb.line == at })
			continue
		case typeCompensated:
			name := p.Step.Name
			if p.Step.Occurrence > 1 {
				name = p.Step.label()
			}
			pending = slices.DeleteFunc(pending, func(rb rollback) bool { return rb.name == name })
			continue
		case typeRollbackBegan, typeVersionMarked, typePublished:
			continue
		}
		if p.Step == nil {
			continue
		}
		s := steps[*p.Step]
		if s == nil || s.Status == StepFailed && event.Type != typeStepFailed { // a compensation that is tried again
			s = &StepInfo{Key: p.Step.key(), Text: p.Step.String(), Status: StepOpen, Began: event.Time}
			steps[*p.Step] = s
			order = append(order, s)
		}
		s.take(event, &p)
	}
	t.Info, t.Input = r.Info, h.started.In
	if h.finished != nil {
		t.Output = h.finished.Result
	} else {
		for _, rb := range slices.Backward(pending) {
			t.Pending = append(t.Pending, rb.name)
		}
	}
	for _, s := range h.signals {
		if !s.taken {
			t.Signals = append(t.Signals, SignalInfo{s.name, s.data})
		}
	}
	for _, s := range order {
		t.Steps = append(t.Steps, *s)
	}
	return t, nil
}

// take folds an event of the step.
func (s *StepInfo) take(event *eventstore.Recorded, p *payload) {
	end := func(status StepStatus) {
		s.Status, s.Ended, s.Due = status, event.Time, time.Time{}
	}
	if p.Due != nil {
		s.Due = *p.Due
	}
	switch event.Type {
	case typeAwaitSet:
		s.For = p.Watch.String()
	case typeAttemptFailed:
		s.Status = StepRetrying
		if p.Error != nil {
			s.Attempts = append(s.Attempts, AttemptInfo{p.Attempt, event.Time, p.Error.Message})
		}
	case typeStepSucceeded:
		end(StepSucceeded)
		s.Output = p.Result
	case typeTimerFired, typeJoined:
		end(StepSucceeded)
	case typeAwaitReceived:
		end(StepSucceeded)
		s.For, s.Output = fmt.Sprintf("%s at position %d", p.Event.Type, p.Event.Position), p.Event.Data
	case typeSignalTaken:
		end(StepSucceeded)
		s.Output = p.In
	case typeAwaitTimedOut, typeSignalTimedOut:
		end(StepTimedOut)
	case typeSkipped:
		end(StepSkipped)
		s.Output, s.Note = p.Result, p.Note
	case typeStepFailed:
		end(StepFailed)
		if p.Error != nil {
			if s.Error = p.Error.Message; p.Error.Cancelled {
				s.Status = StepCancelled
			}
		}
	}
}

// String is for people.
func (w *watch) String() string {
	if w == nil {
		return ""
	}
	text := ""
	for i, t := range w.Types {
		if i > 0 {
			text += " or "
		}
		text += t
	}
	if w.Match.Category != "" {
		text += " in " + w.Match.Category
	}
	if w.Match.StreamID != "" {
		text += " of " + w.Match.StreamID
	}
	if w.Match.Tag != "" {
		text += " tagged " + w.Match.Tag
	}
	return text
}

// History returns the events of a run, all of its lives. The error is
// [ErrNotFound] when there is none.
func (e *Engine) History(ctx context.Context, saga, run string) ([]eventstore.Recorded, error) {
	stream := eventstore.Stream{Category: category(saga), ID: run}
	if err := stream.Validate(); err != nil {
		return nil, err
	}
	var events []eventstore.Recorded
	for r, err := range e.env.store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{}) {
		if err != nil {
			return nil, err
		}
		events = append(events, r)
	}
	if len(events) == 0 {
		return nil, fmt.Errorf("%w: saga %q has no run %q", ErrNotFound, saga, run)
	}
	return events, nil
}

// exported is a history as a file.
type exported struct {
	Format int             `json:"format"`
	Saga   string          `json:"saga"`
	ID     string          `json:"id"`
	Events []exportedEvent `json:"events"`
}

type exportedEvent struct {
	ID       string              `json:"id"`
	Version  uint64              `json:"version"`
	Position eventstore.Position `json:"position"`
	Type     string              `json:"type"`
	Time     time.Time           `json:"time"`
	Data     json.RawMessage     `json:"data"`
	// Metadata that a history has.
	Correlation string `json:"correlation,omitempty"`
	Causation   string `json:"causation,omitempty"`
	Actor       string `json:"actor,omitempty"`
}

const exportFormat = 1

// Export returns the history of a run as JSON: to keep, to look at, to replay in
// a test against the code of tomorrow (sagatest.Replay, [ReadHistory]), or to
// [Engine.Import].
func (e *Engine) Export(ctx context.Context, saga, run string) ([]byte, error) {
	events, err := e.History(ctx, saga, run)
	if err != nil {
		return nil, err
	}
	out := exported{Format: exportFormat, Saga: saga, ID: run}
	for _, r := range events {
		out.Events = append(out.Events, exportedEvent{
			r.ID.String(), r.Version, r.Position, r.Type, r.Time, json.RawMessage(r.Data),
			r.Metadata.CorrelationID, r.Metadata.CausationID, r.Metadata.Actor,
		})
	}
	return json.MarshalIndent(out, "", "  ")
}

// ReadHistory returns the history that [Engine.Export] has written, for
// [Definition.Replay].
func ReadHistory(data []byte) ([]eventstore.Recorded, error) {
	var in exported
	if err := json.Unmarshal(data, &in); err != nil {
		return nil, fmt.Errorf("%w: this is no exported history: %w", eventstore.ErrInvalid, err)
	}
	if in.Format != exportFormat {
		return nil, fmt.Errorf("%w: the exported history has format %d, this program knows %d", eventstore.ErrInvalid, in.Format, exportFormat)
	}
	stream := eventstore.Stream{Category: category(in.Saga), ID: in.ID}
	if err := stream.Validate(); err != nil {
		return nil, err
	}
	if len(in.Events) == 0 {
		return nil, fmt.Errorf("%w: the exported history of saga %q, run %q has no events", eventstore.ErrInvalid, in.Saga, in.ID)
	}
	var events []eventstore.Recorded
	for i, e := range in.Events {
		id, err := uuid.Parse(e.ID)
		if err != nil {
			return nil, fmt.Errorf("%w: event %d of the exported history has the id %q: %w", eventstore.ErrInvalid, i+1, e.ID, err)
		}
		if e.Version != uint64(i)+1 {
			return nil, fmt.Errorf("%w: event %d of the exported history has version %d", eventstore.ErrInvalid, i+1, e.Version)
		}
		events = append(events, eventstore.Recorded{
			ID: id, Stream: stream, Version: e.Version, Position: e.Position, Type: e.Type, Time: e.Time, Data: e.Data,
			Metadata: eventstore.Metadata{CorrelationID: e.Correlation, CausationID: e.Causation, Actor: e.Actor},
		})
	}
	return events, nil
}

// Import appends an exported history to this log, where there must be no run of
// its id, and returns the saga and the id. A run that has not ended goes on here:
// make sure that it does not go on elsewhere. What it waits for of the log it
// waits for from now on. It is one commit: a history of more events than the store
// takes at once (1,000, by eventstore.DefaultLimits) is refused, with
// eventstore.ErrTooLarge.
func (e *Engine) Import(ctx context.Context, data []byte) (saga, run string, err error) {
	var in exported
	events, err := ReadHistory(data)
	if err != nil {
		return "", "", err
	}
	_ = json.Unmarshal(data, &in)
	head, err := e.env.store.Head(ctx)
	if err != nil {
		return "", "", err
	}
	stream := events[0].Stream
	var commit eventstore.Commit
	check := &history{}
	for i := range events {
		r := &events[i]
		if err := check.add(r); err != nil {
			return "", "", err
		}
		p, err := decodePayload(r)
		if err != nil {
			return "", "", err
		}
		// Positions are those of another log.
		if p.Since > 0 {
			p.Since = head
		}
		if p.Watch != nil {
			p.Watch.Skip = nil
			if p.Watch.Since > 0 {
				p.Watch.Since = head
			}
		}
		if p.Event != nil {
			p.Event.Position = 0
		}
		p.Cursors, p.Consumed = nil, nil
		raw, err := encodePayload(&p)
		if err != nil {
			return "", "", err
		}
		commit.Events = append(commit.Events, eventstore.Event{Stream: stream, Type: r.Type, Data: raw, Time: r.Time, Metadata: r.Metadata})
	}
	commit.Conditions = []eventstore.Condition{eventstore.StreamAt(stream, eventstore.Revision{})}
	if _, err := e.env.store.Append(ctx, commit); err != nil {
		return "", "", fmt.Errorf("import saga %q, run %q: %w", in.Saga, in.ID, err)
	}
	return in.Saga, in.ID, nil
}

// VersionUse says how many open runs have a version of a marker.
type VersionUse struct {
	// Name is the marker's, see [Run.Version].
	Name string `json:"name"`
	// Version is 0 for the runs that have not come by the marker, or had passed its
	// place before it was there.
	Version int `json:"version"`
	// Open is how many runs, and Example one of them.
	Open    int    `json:"open"`
	Example string `json:"example"`
}

// Versions tells which versions of the saga's markers open runs still have. The
// code for a version below the lowest one that is listed can go.
func (e *Engine) Versions(ctx context.Context, saga string) ([]VersionUse, error) {
	if err := e.ready(ctx, saga); err != nil {
		return nil, err
	}
	type use struct {
		name    string
		version int
	}
	uses := map[use]*VersionUse{}
	names := map[string]bool{}
	without := map[string]string{} // an example of a run without the marker
	var runs []Info
	units, err := e.units(ctx, saga)
	if err != nil {
		return nil, err
	}
	err = e.state.View(ctx, func(tx projection.StateTx) error {
		clear(uses)
		clear(names)
		runs = nil
		for _, unit := range units {
			for entry, err := range tx.Scan(openTable(category(unit)), projection.Range{}) {
				if err != nil {
					return err
				}
				var info Info
				if err := jsonv1.Unmarshal(entry.Value, &info); err != nil {
					return fmt.Errorf("run %q: %w", entry.Key, err)
				}
				runs = append(runs, Info{ID: info.ID, Versions: info.Versions})
				for name, version := range info.Versions {
					names[name] = true
					u := uses[use{name, version}]
					if u == nil {
						u = &VersionUse{Name: name, Version: version, Example: info.ID}
						uses[use{name, version}] = u
					}
					u.Open++
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for name := range names {
		n := 0
		for _, run := range runs {
			if _, ok := run.Versions[name]; !ok {
				n++
				without[name] = run.ID
			}
		}
		if n > 0 {
			uses[use{name, 0}] = &VersionUse{Name: name, Open: n, Example: without[name]}
		}
	}
	found := make([]VersionUse, 0, len(uses))
	for u := range maps.Values(uses) {
		found = append(found, *u)
	}
	slices.SortFunc(found, func(a, b VersionUse) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Version, b.Version))
	})
	return found, nil
}
