package saga

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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
	typeCancelled      = "saga.cancelled"
	typeTerminated     = "saga.terminated"
	typeStepBegan      = "saga.step_began"
	typeSignalAwaited  = "saga.signal_awaited"
	typeSignalTaken    = "saga.signal_taken"
	typeSignalTimedOut = "saga.signal_timed_out"
	typeBranched       = "saga.branched"
	typeJoined         = "saga.joined"
	typeVersionMarked  = "saga.version_marked"
	typePublished      = "saga.published"
	typeContinued      = "saga.continued"
	// What others than the run's owner write; see external.
	typeSignalled      = "saga.signalled"
	typeCancelAsked    = "saga.cancel_requested"
	typeRetryAsked     = "saga.retry_requested"
	typeSkipped        = "saga.step_skipped"
	typeRestarted      = "saga.restarted"
	scopeDetached      = "detached"
	historyFormat      = 1
	kindDo             = "do"
	kindExecute        = "execute"
	kindSleep          = "sleep"
	kindAwait          = "await"
	kindOnRollback     = "on rollback"
	kindSettled        = "settled"
	kindRollback       = "rollback"
	kindCompensated    = "compensated"
	kindOnce           = "once"
	kindTx             = "tx"
	kindLocal          = "local"
	kindSignal         = "signal"
	kindChild          = "child"
	kindAll            = "all"
	kindRace           = "race"
	kindVersion        = "version"
	kindPublish        = "publish"
	causeMismatch      = "mismatch"
	causeCompensation  = "compensation"
	causeCode          = "code"
	causeCancelled     = "cancelled"
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
	// Branch is the path of the parallel branch that the step belongs to, each
	// element "name.index", joined by '@'.
	Branch string `json:"branch,omitempty"`
}

// line names the sequence of steps that the step belongs to: the function with
// its compensations, or one branch.
func (s stepID) line() lineID {
	if s.Branch == "" {
		return lineID{}
	}
	return lineID{s.In, s.Branch}
}

// lineID names a sequence of steps that follow one another.
type lineID struct{ in, branch string }

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
	if s.Branch != "" {
		text += fmt.Sprintf(" in branch %q", s.Branch)
	}
	if s.In != "" {
		text += fmt.Sprintf(" in compensation %q", s.In)
	}
	return text
}

// compensation names the compensation that the registration is of, as In does.
func (s stepID) compensation() string {
	if s.Branch != "" {
		return s.Branch + "@" + s.label()
	}
	return s.label()
}

// key is the part of an idempotency key that names the step. It has no '/'.
func (s stepID) key() string {
	key := s.Kind + ":" + s.label()
	if s.In != "" {
		key += "@" + s.In
	}
	if s.Branch != "" {
		key += "@@" + s.Branch
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
	// Name is that of a signal, of a marker, or of what is published.
	Name string `json:"name,omitempty"`
	// Number is that of a signal within the run, a marker's version, or the index of
	// the branch that won.
	Number int `json:"number,omitempty"`
	// Build is what the run is pinned to.
	Build string `json:"build,omitempty"`
	// Segment counts from 0 on how often the run has been continued.
	Segment int `json:"segment,omitempty"`
	// Carried are the signals, and Cursors and Consumed what awaits have received,
	// that a continued run takes along.
	Carried  []payload                      `json:"carried,omitempty"`
	Cursors  map[string]eventstore.Position `json:"cursors,omitempty"`
	Consumed []eventstore.Position          `json:"consumed,omitempty"`
	// Signals is how many signals the run had got.
	Signals int `json:"signals,omitempty"`
	// Parent is the run whose child this is.
	Parent *parent `json:"parent,omitempty"`
	// Scope tells waits that a request to cancel the run does not end.
	Scope string `json:"scope,omitempty"`
	Note  string `json:"note,omitempty"`
}

// parent says which step of which run started a child.
type parent struct {
	Saga string `json:"saga"`
	ID   string `json:"id"`
	Step string `json:"step"`
}

// encodePayload returns what jsonv1.Marshal does, faster for what every run
// writes.
func encodePayload(p *payload) ([]byte, error) {
	if p.Watch != nil || p.Event != nil || p.Attempt != 0 || p.Error != nil || p.Cause != "" || p.Reason != "" || p.Compensated != nil ||
		p.Name != "" || p.Number != 0 || p.Build != "" || p.Segment != 0 || p.Carried != nil || p.Cursors != nil || p.Consumed != nil ||
		p.Signals != 0 || p.Parent != nil || p.Scope != "" || p.Note != "" {
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
		if p.Step.Branch != "" {
			w.text("branch", p.Step.Branch)
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
	// Unknown: a step that must not run twice was cut off.
	Unknown bool `json:"unknown,omitempty"`
	// Cancelled: the run was cancelled.
	Cancelled bool `json:"cancelled,omitempty"`
}

// record is what a history says about one step.
type record struct {
	id       stepID
	order    uint64 // of its first event
	began    bool   // a step that must not run twice was begun
	attempts int
	retryAt  time.Time
	set      payload // timer or await
	outcome  string  // type of the event that ended the step; empty while it runs
	at       time.Time
	result   payload
}

// signalled is a signal that a run has got.
type signalled struct {
	number int
	name   string
	data   json.RawMessage
	taken  bool
}

// history is a saga's stream, read for replay.
type history struct {
	started   payload // or continued
	startedAt time.Time
	beganAt   time.Time // when it was first started
	meta      eventstore.Metadata
	position  eventstore.Position // of the started event
	since     eventstore.Position // awaits see what is later
	segment   int
	segmentAt eventstore.Position // of the event that began the segment
	revision  eventstore.Revision
	lines     map[lineID]*[]*record
	steps     int // records in all lines
	bytes     int
	signals   []*signalled
	received  int // signals so far, in all segments
	told      int // what others have written
	restarts  int
	// carried are the outcomes of steps of compensations that are tried again.
	carried map[stepID]*record
	blocked *payload
	// cancel is the request to cancel the run.
	cancel *payload
	// finished is the event that ended the run.
	finished     *payload
	finishedType string
}

var errNewerHistory = errors.New("history was written by a newer program: deploy that first")

// external reports whether others than the run's owner write the type, at any
// time: who finds such an event where it wanted to write takes it in, and
// writes behind it.
func external(eventType string) bool {
	switch eventType {
	case typeSignalled, typeCancelAsked, typeRetryAsked:
		return true
	}
	return false
}

// ends reports whether the type is that of the last event of a history.
func ends(eventType string) bool {
	switch eventType {
	case typeCompleted, typeFailed, typeCancelled, typeTerminated:
		return true
	}
	return false
}

// read takes the stream, from the beginning of its last segment on, which is
// the event at from, if that is known.
func (h *history) read(ctx context.Context, store eventstore.Store, stream eventstore.Stream, from eventstore.Position) error {
	o := eventstore.ReadOptions{}
	if from > 0 {
		o.After = from - 1
	}
	for r, err := range store.Read(ctx, eventstore.OneStream(stream), o) {
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
		if r.Type != typeStarted && r.Type != typeContinued {
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
	h.bytes += len(r.Data)
	if external(r.Type) {
		h.told++
	}
	return nil
}

// apply takes the next event, decoded.
func (h *history) apply(eventType string, p *payload, at time.Time, revision eventstore.Revision) error {
	h.revision = revision
	switch eventType {
	case typeStarted:
		h.started, h.startedAt, h.position, h.segmentAt = *p, p.beginning(at), revision.Position, revision.Position
		h.beganAt = at
		if h.since = p.Since; h.since == 0 {
			h.since = h.position
		}
	case typeContinued:
		*h = history{
			started: *p, startedAt: at, beganAt: h.beganAt, meta: h.meta, position: revision.Position, since: p.Since, segment: p.Segment,
			segmentAt: revision.Position, revision: revision, received: p.Signals, told: h.told,
		}
		if p.Cause == causeCancelled {
			h.cancel = &payload{Reason: p.Reason}
		}
		for _, c := range p.Carried {
			h.signals = append(h.signals, &signalled{number: c.Number, name: c.Name, data: c.In})
		}
	case typeTimerSet, typeAwaitSet, typeSignalAwaited, typeBranched:
		rec := h.step(p)
		rec.set = *p
	case typeStepBegan:
		h.step(p).began = true
	case typeAttemptFailed:
		rec := h.step(p)
		rec.attempts = p.Attempt
		if p.Due != nil {
			rec.retryAt = *p.Due
		}
	case typeTimerFired, typeAwaitReceived, typeAwaitTimedOut, typeStepSucceeded, typeStepFailed,
		typeRollbackAdded, typeSettled, typeRollbackBegan, typeCompensated,
		typeSignalTaken, typeSignalTimedOut, typeJoined, typeVersionMarked, typePublished, typeSkipped:
		if eventType == typeSkipped && h.blocked != nil && h.blocked.Cause == causeCompensation && p.Step != nil {
			// It has failed for good. Its compensation is tried again, without it.
			h.retry(p.Step.In)
			h.carry(&record{id: *p.Step, outcome: typeSkipped, at: at, result: *p})
			h.blocked = nil
			return nil
		}
		rec := h.step(p)
		rec.outcome, rec.result = eventType, *p
		switch eventType {
		case typeRollbackAdded, typeSettled, typeRollbackBegan, typeCompensated, typeVersionMarked, typePublished:
			// Nothing was waited for: these do not move the run's time.
		case typeSignalTaken:
			rec.at = at
			if s := h.signal(p.Number); s != nil {
				s.taken = true
			}
		case typeSkipped:
			rec.at = at
			h.blocked = nil
		default:
			rec.at = at
		}
	case typeSignalled:
		h.received++
		h.signals = append(h.signals, &signalled{number: h.received, name: p.Name, data: p.In})
	case typeCancelAsked:
		if h.cancel == nil {
			h.cancel = p
		}
	case typeRetryAsked:
		for _, line := range h.lines {
			if n := len(*line); n > 0 && (*line)[n-1].outcome == "" {
				(*line)[n-1].retryAt = time.Time{}
			}
		}
	case typeRestarted:
		h.restarts++
		h.restart(p)
	case typeBlocked:
		h.blocked = p
	case typeResumed:
		if h.blocked != nil && h.blocked.Cause == causeCompensation && h.blocked.Step != nil {
			h.retry(h.blocked.Step.In)
		}
		h.blocked = nil
	case typeCompleted, typeFailed, typeCancelled, typeTerminated:
		h.finished, h.finishedType = p, eventType
	default:
		return fmt.Errorf("%w: event %q", errNewerHistory, eventType)
	}
	return nil
}

// signal returns the signal of the number, nil if the segment has none.
func (h *history) signal(number int) *signalled {
	for _, s := range h.signals {
		if s.number == number {
			return s
		}
	}
	return nil
}

func (h *history) step(p *payload) *record {
	id := stepID{}
	if p.Step != nil {
		id = *p.Step
	}
	line := h.line(id.line())
	if n := len(*line); n > 0 && (*line)[n-1].id == id && (*line)[n-1].outcome == "" {
		return (*line)[n-1]
	}
	h.steps++
	rec := &record{id: id, order: h.revision.Version}
	*line = append(*line, rec)
	return rec
}

// line returns the records of the line.
func (h *history) line(id lineID) *[]*record {
	line := h.lines[id]
	if line == nil {
		if h.lines == nil {
			h.lines = map[lineID]*[]*record{}
		}
		line = &[]*record{}
		h.lines[id] = line
	}
	return line
}

// open returns the step that has begun and not ended, in any line, and that has
// the key; nil if there is none.
func (h *history) open(key string) *record {
	for _, line := range h.lines {
		if n := len(*line); n > 0 && (*line)[n-1].outcome == "" && (*line)[n-1].id.key() == key {
			return (*line)[n-1]
		}
	}
	return nil
}

// failed returns the step of the compensation that blocks the run, if it has
// the key and has failed; nil otherwise.
func (h *history) failed(key string) *record {
	if h.blocked == nil || h.blocked.Cause != causeCompensation || h.blocked.Step == nil {
		return nil
	}
	for _, line := range h.lines {
		for _, rec := range *line {
			if rec.id.In == h.blocked.Step.In && rec.id.key() == key && rec.outcome == typeStepFailed {
				return rec
			}
		}
	}
	return nil
}

// retry forgets how the steps of a compensation that failed went, except that
// what succeeded is not done again.
func (h *history) retry(compensation string) {
	for id, line := range h.lines {
		n := len(*line)
		for n > 0 && (*line)[n-1].id.In == compensation {
			n--
			h.carry((*line)[n])
		}
		*line = (*line)[:n]
		if n == 0 && id.branch != "" {
			delete(h.lines, id)
		}
	}
}

// carry keeps what a step that is forgotten came to, if it need not be done again.
func (h *history) carry(rec *record) {
	once := rec.id.Kind == kindOnce && (rec.began || rec.outcome == typeStepFailed)
	switch {
	case once, slices.Contains([]string{typeStepSucceeded, typeTimerFired, typeAwaitReceived, typeSignalTaken, typeSkipped, typeVersionMarked}, rec.outcome):
		if h.carried == nil {
			h.carried = map[stepID]*record{}
		}
		h.carried[rec.id] = rec
	}
}

// restart forgets the steps of the function from the given one on, and how the
// run had ended. Nothing of them is carried over: they are to be done again.
func (h *history) restart(p *payload) {
	h.blocked, h.finished, h.finishedType, h.cancel, h.carried = nil, nil, "", nil, nil
	if p.Step == nil {
		return
	}
	line := h.lines[p.Step.line()]
	if line == nil {
		return
	}
	at := slices.IndexFunc(*line, func(rec *record) bool { return rec.id == *p.Step })
	if at < 0 {
		return
	}
	from := (*line)[at].order
	for id, line := range h.lines {
		n := len(*line)
		for n > 0 && (*line)[n-1].order >= from {
			n--
			if rec := (*line)[n]; rec.outcome == typeSignalTaken {
				if s := h.signal(rec.result.Number); s != nil {
					s.taken = false
				}
			}
		}
		*line = (*line)[:n]
		if n == 0 && id.branch != "" {
			delete(h.lines, id)
		}
	}
}
