package saga

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"

	"github.com/deed-go/deed/eventstore"
)

// The event types of a saga's history. They, and the payload, are stored for
// ever: testdata/history.golden pins them.
const (
	typeStarted        = "saga.started"
	typeTimerSet       = "saga.timer_set"
	typeTimerFired     = "saga.timer_fired"
	typeAttemptFailed  = "saga.attempt_failed"
	typeStepSucceeded  = "saga.step_succeeded"
	typeStepFailed     = "saga.step_failed"
	typeAwaitSet       = "saga.await_set"
	typeAwaitReceived  = "saga.await_received"
	typeAwaitTimedOut  = "saga.await_timed_out"
	typeRollbackAdded  = "saga.rollback_added"
	typeSettled        = "saga.settled"
	typeRollbackBegan  = "saga.rollback_began"
	typeCompensated    = "saga.compensated"
	typeBlocked        = "saga.blocked"
	typeResumed        = "saga.resumed"
	typeCompleted      = "saga.completed"
	typeFailed         = "saga.failed"
	historyFormat      = 1
	kindDo             = "do"
	kindExecute        = "execute"
	kindSleep          = "sleep"
	kindAwait          = "await"
	kindOnRollback     = "on rollback"
	kindSettled        = "settled"
	kindRollback       = "rollback"
	kindCompensated    = "compensated"
	causeMismatch      = "mismatch"
	causeCompensation  = "compensation"
	causeCode          = "code"
	registrationType   = "saga.registered"
	registrationStream = "saga"
)

// stepID is the identity of a step: matching compares it, in order.
type stepID struct {
	Kind string `json:"kind"`
	Name string `json:"name,omitempty"`
	// Occurrence counts the steps of the same kind and name, in the same
	// compensation, from 1 on; 1 is not stored.
	Occurrence int `json:"occurrence,omitempty"`
	// In names the compensation that the step belongs to, as "name" or "name#2".
	In string `json:"in,omitempty"`
}

// escape keeps the separators of labels and keys out of names.
var escape = strings.NewReplacer("%", "%25", "#", "%23", "@", "%40", "/", "%2F")

// label is the name with the occurrence, if it is not the first. No two names
// and occurrences share one.
func (s stepID) label() string {
	name := s.Name
	if strings.ContainsAny(name, "%#@/") {
		name = escape.Replace(name)
	}
	if s.Occurrence > 1 {
		return name + "#" + strconv.Itoa(s.Occurrence)
	}
	return name
}

func (s stepID) String() string {
	text := s.Kind
	if s.Name != "" {
		text += fmt.Sprintf(" %q", s.Name)
	}
	if s.Occurrence > 1 {
		text += fmt.Sprintf(" (occurrence %d)", s.Occurrence)
	}
	if s.In != "" {
		text += fmt.Sprintf(" in compensation %q", s.In)
	}
	return text
}

// key is the part of an idempotency key that names the step. It has no '/'.
func (s stepID) key() string {
	key := s.Kind + ":" + s.label()
	if s.In != "" {
		key += "@" + s.In
	}
	return key
}

// origin is an event of the log that a history refers to.
type origin struct {
	ID       string              `json:"id"`
	Category string              `json:"category"`
	Stream   string              `json:"stream"`
	Version  uint64              `json:"version"`
	Position eventstore.Position `json:"position"`
	Type     string              `json:"type"`
	Time     time.Time           `json:"time"`
	// Data is set when the code needs the content again at every replay.
	Data   []byte `json:"data,omitempty"`
	Schema int    `json:"schema,omitempty"`
	Codec  string `json:"codec,omitempty"`
}

// beginning is the time at which a run begins: that of the event that started
// it, however much later that was handled, or else that of the started event.
func (p *payload) beginning(at time.Time) time.Time {
	if p.Trigger != nil {
		return p.Trigger.Time
	}
	return at
}

func originOf(r *eventstore.Recorded, content bool) *origin {
	o := &origin{
		ID: r.ID.String(), Category: r.Stream.Category, Stream: r.Stream.ID, Version: r.Version,
		Position: r.Position, Type: r.Type, Time: r.Time,
	}
	if content {
		o.Data, o.Schema, o.Codec = r.Data, r.Metadata.SchemaVersion, r.Metadata.Codec
	}
	return o
}

func (o *origin) recorded() eventstore.Recorded {
	return eventstore.Recorded{
		Stream: eventstore.Stream{Category: o.Category, ID: o.Stream}, Version: o.Version, Position: o.Position,
		Type: o.Type, Time: o.Time, Data: o.Data,
		Metadata: eventstore.Metadata{SchemaVersion: o.Schema, Codec: o.Codec},
	}
}

// watch says which event an await waits for; complete in itself, so that the
// index of waits needs nothing but the history.
type watch struct {
	// Types are the stored event types that count.
	Types []string `json:"types"`
	Match Match    `json:"match"`
	// Since excludes events up to and including the position.
	Since eventstore.Position `json:"since"`
	// Skip are later positions that the run has received already.
	Skip []eventstore.Position `json:"skip,omitempty"`
}

// payload is the content of every history event; each type uses some fields.
type payload struct {
	Format      int                 `json:"format,omitempty"`
	Step        *stepID             `json:"step,omitempty"`
	In          json.RawMessage     `json:"in,omitempty"`
	Since       eventstore.Position `json:"since,omitempty"`
	Trigger     *origin             `json:"trigger,omitempty"`
	Due         *time.Time          `json:"due,omitempty"`
	Watch       *watch              `json:"watch,omitempty"`
	Event       *origin             `json:"event,omitempty"`
	Result      json.RawMessage     `json:"result,omitempty"`
	Attempt     int                 `json:"attempt,omitempty"`
	Error       *failure            `json:"error,omitempty"`
	Cause       string              `json:"cause,omitempty"`
	Reason      string              `json:"reason,omitempty"`
	Compensated []string            `json:"compensated,omitempty"`
}

// encodePayload returns what jsonv1.Marshal does, faster for what every run
// writes.
func encodePayload(p *payload) ([]byte, error) {
	if p.Watch != nil || p.Event != nil || p.Attempt != 0 || p.Error != nil || p.Cause != "" || p.Reason != "" || p.Compensated != nil {
		return jsonv1.Marshal(p)
	}
	w := writer{b: append(make([]byte, 0, 192), '{'), plain: true}
	if p.Format != 0 {
		w.number("format", uint64(p.Format))
	}
	if p.Step != nil {
		w.name("step")
		w.b = append(w.b, '{')
		w.text("kind", p.Step.Kind)
		if p.Step.Name != "" {
			w.text("name", p.Step.Name)
		}
		if p.Step.Occurrence != 0 {
			w.number("occurrence", uint64(p.Step.Occurrence))
		}
		if p.Step.In != "" {
			w.text("in", p.Step.In)
		}
		w.b = append(w.b, '}')
	}
	if len(p.In) > 0 {
		w.name("in")
		w.b = append(w.b, p.In...)
	}
	if p.Since != 0 {
		w.number("since", uint64(p.Since))
	}
	if o := p.Trigger; o != nil {
		if len(o.Data) > 0 || o.Schema != 0 || o.Codec != "" {
			return jsonv1.Marshal(p)
		}
		w.name("trigger")
		w.b = append(w.b, '{')
		w.text("id", o.ID)
		w.text("category", o.Category)
		w.text("stream", o.Stream)
		w.number("version", o.Version)
		w.number("position", uint64(o.Position))
		w.text("type", o.Type)
		w.time("time", o.Time)
		w.b = append(w.b, '}')
	}
	if p.Due != nil {
		w.time("due", *p.Due)
	}
	if len(p.Result) > 0 {
		w.name("result")
		w.b = append(w.b, p.Result...)
	}
	if !w.plain || p.Format < 0 {
		return jsonv1.Marshal(p)
	}
	return append(w.b, '}'), nil
}

// writer writes an object of plain values; plain turns false at one that needs
// more care.
type writer struct {
	b     []byte
	plain bool
}

func (w *writer) name(name string) {
	if w.b[len(w.b)-1] != '{' {
		w.b = append(w.b, ',')
	}
	w.b = append(append(append(w.b, '"'), name...), '"', ':')
}

func (w *writer) number(name string, n uint64) {
	w.name(name)
	w.b = strconv.AppendUint(w.b, n, 10)
}

func (w *writer) text(name, text string) {
	w.name(name)
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			w.plain = false
		}
	}
	w.b = append(append(append(w.b, '"'), text...), '"')
}

func (w *writer) time(name string, t time.Time) {
	w.name(name)
	if _, offset := t.Zone(); offset != 0 || t.Year() < 0 || t.Year() > 9999 {
		w.plain = false
	}
	w.b = append(t.AppendFormat(append(w.b, '"'), time.RFC3339Nano), '"')
}

func decodePayload(r *eventstore.Recorded) (payload, error) {
	var p payload
	if err := jsonv1.Unmarshal(r.Data, &p); err != nil {
		return p, &eventstore.DecodeError{Event: *r, Cause: err}
	}
	return p, nil
}

// failure is an error as the history keeps it.
type failure struct {
	Message string `json:"message"`
	// Is holds the texts of the errors it wraps.
	Is        []string `json:"is,omitempty"`
	Rejection bool     `json:"rejection,omitempty"`
	Terminal  bool     `json:"terminal,omitempty"`
	Timeout   bool     `json:"timeout,omitempty"`
}

// record is what a history says about one step.
type record struct {
	id       stepID
	attempts int
	retryAt  time.Time
	set      payload // timer or await
	outcome  string  // type of the event that ended the step; empty while it runs
	at       time.Time
	result   payload
}

// history is a saga's stream, read for replay.
type history struct {
	started   payload
	startedAt time.Time
	meta      eventstore.Metadata
	position  eventstore.Position // of the started event
	revision  eventstore.Revision
	records   []*record
	// carried are the outcomes of steps of compensations that are tried again.
	carried map[stepID]*record
	blocked *payload
	// finished is the completed or failed event.
	finished     *payload
	finishedType string
}

var errNewerHistory = errors.New("history was written by a newer program: deploy that first")

// read takes the whole stream.
func (h *history) read(ctx context.Context, store eventstore.Store, stream eventstore.Stream) error {
	for r, err := range store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{}) {
		if err != nil {
			return err
		}
		if err := h.add(&r); err != nil {
			return err
		}
	}
	return nil
}

// add takes the next event of the stream.
func (h *history) add(r *eventstore.Recorded) error {
	p, err := decodePayload(r)
	if err != nil {
		return err
	}
	if h.revision.Version == 0 {
		if r.Type != typeStarted {
			return fmt.Errorf("%w: stream %q begins with %q, not %q: it was not written by a saga", eventstore.ErrInvalid, r.Stream, r.Type, typeStarted)
		}
		if p.Format > historyFormat {
			return fmt.Errorf("%w: stream %q has format %d, this program knows up to %d", errNewerHistory, r.Stream, p.Format, historyFormat)
		}
		h.meta = r.Metadata
	}
	if err := h.apply(r.Type, &p, r.Time, r.Revision()); err != nil {
		return fmt.Errorf("%w at version %d of stream %q", err, r.Version, r.Stream)
	}
	return nil
}

// apply takes the next event, decoded.
func (h *history) apply(eventType string, p *payload, at time.Time, revision eventstore.Revision) error {
	h.revision = revision
	switch eventType {
	case typeStarted:
		h.started, h.startedAt, h.position = *p, p.beginning(at), revision.Position
	case typeTimerSet, typeAwaitSet:
		rec := h.step(p)
		rec.set = *p
	case typeAttemptFailed:
		rec := h.step(p)
		rec.attempts = p.Attempt
		if p.Due != nil {
			rec.retryAt = *p.Due
		}
	case typeTimerFired, typeAwaitReceived, typeAwaitTimedOut, typeStepSucceeded, typeStepFailed,
		typeRollbackAdded, typeSettled, typeRollbackBegan, typeCompensated:
		rec := h.step(p)
		rec.outcome, rec.result = eventType, *p
		switch eventType {
		case typeRollbackAdded, typeSettled, typeRollbackBegan, typeCompensated:
			// Nothing was waited for: these do not move the run's time.
		default:
			rec.at = at
		}
	case typeBlocked:
		h.blocked = p
	case typeResumed:
		if h.blocked != nil && h.blocked.Cause == causeCompensation && h.blocked.Step != nil {
			h.retry(h.blocked.Step.In)
		}
		h.blocked = nil
	case typeCompleted, typeFailed:
		h.finished, h.finishedType = p, eventType
	default:
		return fmt.Errorf("%w: event %q", errNewerHistory, eventType)
	}
	return nil
}

func (h *history) step(p *payload) *record {
	id := stepID{}
	if p.Step != nil {
		id = *p.Step
	}
	if n := len(h.records); n > 0 && h.records[n-1].id == id && h.records[n-1].outcome == "" {
		return h.records[n-1]
	}
	rec := &record{id: id}
	h.records = append(h.records, rec)
	return rec
}

// retry forgets how the steps of a compensation that failed went, except that
// what succeeded is not done again.
func (h *history) retry(compensation string) {
	if h.carried == nil {
		h.carried = map[stepID]*record{}
	}
	n := len(h.records)
	for n > 0 && h.records[n-1].id.In == compensation {
		n--
		rec := h.records[n]
		switch rec.outcome {
		case typeStepSucceeded, typeTimerFired, typeAwaitReceived:
			h.carried[rec.id] = rec
		}
	}
	h.records = h.records[:n]
}
