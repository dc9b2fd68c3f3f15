package saga

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Status says how a run is doing.
type Status string

// The statuses of a run.
const (
	// StatusRunning: it is at work, or will be as soon as there is room.
	StatusRunning Status = "running"
	// StatusWaiting: it waits for a time, an event, or the next attempt of a step.
	StatusWaiting Status = "waiting"
	// StatusBlocked: it needs a human or other code; see [BlockedError].
	StatusBlocked Status = "blocked"
	// StatusCompleted: its function returned without an error.
	StatusCompleted Status = "completed"
	// StatusFailed: its function returned an error, and what it did is compensated.
	StatusFailed Status = "failed"
	// StatusCancelled: it failed because it was cancelled, and what it did is compensated.
	StatusCancelled Status = "cancelled"
	// StatusTerminated: it was ended where it was; nothing is compensated.
	StatusTerminated Status = "terminated"
)

// Ended reports whether nothing more happens.
func (s Status) Ended() bool {
	switch s {
	case StatusCompleted, StatusFailed, StatusCancelled, StatusTerminated:
		return true
	}
	return false
}

// Info is what the list of runs tells about one.
type Info struct {
	// ID is the run's id within its saga.
	ID     string `json:"id"`
	Status Status `json:"status"`
	// RollingBack says that compensations are running.
	RollingBack bool      `json:"rolling_back,omitempty"`
	Started     time.Time `json:"started"`
	Updated     time.Time `json:"updated"`
	// Wake is when the run goes on at the latest; zero when nothing is due.
	Wake time.Time `json:"wake,omitzero"`
	// Step is what it waits for, for example `await "order.shipped"`; with
	// branches, one of several things.
	Step string `json:"step,omitempty"`
	// Attempts counts the failed attempts of the step it is at.
	Attempts int `json:"attempts,omitempty"`
	// Error is the last error: of an attempt, of a blocked or of a failed run.
	Error string `json:"error,omitempty"`
	// Cancelling says that somebody has asked to cancel it.
	Cancelling bool `json:"cancelling,omitempty"`
	// Published is what it has published, by name, as JSON.
	Published map[string]json.RawMessage `json:"published,omitempty"`
	// Versions are its markers, see [Run.Version].
	Versions map[string]int `json:"versions,omitempty"`
	// Build is what it is pinned to, see [Definition.Build].
	Build string `json:"build,omitempty"`
	// Parent is the run whose child it is, as "saga/id".
	Parent string `json:"parent,omitempty"`
	// Continued counts how often it has begun anew.
	Continued int `json:"continued,omitempty"`
}

// wait is one thing that a run waits for.
type wait struct {
	Step  stepID    `json:"step"`
	Due   time.Time `json:"due,omitzero"`
	Scope string    `json:"scope,omitempty"`
	// Watch is the event that it waits for since the position Set.
	Watch *watch              `json:"watch,omitempty"`
	Set   eventstore.Position `json:"set,omitempty"`
	// Scanned says that no event between the watch's Since and Set is taken.
	Scanned bool `json:"scanned,omitempty"`
	// Found is the event that ends the wait.
	Found eventstore.Position `json:"found,omitempty"`
	// Signal is the name of the signal that it waits for.
	Signal string `json:"signal,omitempty"`
	// Attempts counts those of a step that is to be tried again.
	Attempts int `json:"attempts,omitempty"`

	event *eventstore.Recorded // the one at Found
}

// row is the index entry of an open run: the fold of its history, as far as
// the worker has followed the log. What has no JSON name lives in memory only.
type row struct {
	Info
	Version uint64 `json:"version"`
	// Trigger is the position of the event that starts the run, until it has started.
	Trigger eventstore.Position `json:"trigger,omitempty"`
	// Cause says why it is blocked.
	Cause string `json:"cause,omitempty"`
	// Waits are what it waits for, in the order in which that was recorded.
	Waits []wait `json:"waits,omitempty"`
	// Signals counts, by name, the signals that it has not taken.
	Signals map[string]int `json:"signals,omitempty"`
	// Branched says that it has had branches: waits end one by one.
	Branched bool `json:"branched,omitempty"`
	// Parked is the version at which every branch was put aside. At any other one
	// some may be under way, although others wait.
	Parked uint64 `json:"parked,omitempty"`
	// Transacted says that there may be entries of it in the table of transactions.
	Transacted bool `json:"transacted,omitempty"`
	// Segment is the position of the event that its present life began with.
	Segment eventstore.Position `json:"segment,omitempty"`
	// Reopened says that it had ended, and is in the table of ended runs.
	Reopened bool `json:"reopened,omitempty"`

	event    *eventstore.Recorded // the one at Trigger
	first    *eventstore.Recorded // all there is of its history
	warned   bool                 // that its history is long
	active   bool                 // a job works on it
	stop     context.CancelCauseFunc
	written  uint64 // the version its last job has seen; the fold may not be there yet
	lags     bool   // it is not there yet
	spent    uint64 // the version at which its last job could not go on
	stored   bool   // there is a row of it in the table of open runs
	dirty    bool
	flushing bool // it is being stored
	touched  bool
	entries  []string       // of it in the other tables, perhaps
	firm     bool           // they are there for sure
	due      time.Time      // in the heap
	slot     int            // there, from 1 on; 0: it is not
	keys     []string       // in the index of watches
	history  *history       // of a run that waits, if there is room; nobody else uses it
	holds    int            // its bytes when it was kept
	granted  map[string]int // places at limits that others have left to it
	queued   int            // it waits for so many; it must not leave memory meanwhile
	nudged   bool           // one came while it was at work
	limited  time.Time      // a rate lets it go on then
}

func (r *row) done() bool { return r.Status.Ended() }

// waitFor returns the wait of the step, nil if there is none.
func (r *row) waitFor(id stepID) *wait {
	for i := range r.Waits {
		if r.Waits[i].Step == id {
			return &r.Waits[i]
		}
	}
	return nil
}

// over ends waits: that of the step, and all when the run has never had branches.
func (r *row) over(over func(*wait) bool) {
	kept := r.Waits[:0]
	for i := range r.Waits {
		if !over(&r.Waits[i]) {
			kept = append(kept, r.Waits[i])
		}
	}
	clear(r.Waits[len(kept):])
	r.Waits = kept
	if len(kept) == 0 {
		r.Waits = nil
	}
	r.show()
}

// show derives what the list tells from the waits.
func (r *row) show() {
	r.Wake, r.Step, r.Attempts = time.Time{}, "", 0
	for i := range r.Waits {
		w := &r.Waits[i]
		if !w.Due.IsZero() && (r.Wake.IsZero() || w.Due.Before(r.Wake)) {
			r.Wake = w.Due
		}
		if i == 0 {
			r.Step = w.Step.String()
		}
		r.Attempts = max(r.Attempts, w.Attempts)
	}
	if r.Attempts == 0 && r.Status != StatusBlocked && !r.done() {
		r.Error = ""
	}
}

// carry counts the signals that have not been taken anew.
func (r *row) carry(signals []payload) {
	r.Signals = nil
	for _, c := range signals {
		if r.Signals == nil {
			r.Signals = map[string]int{}
		}
		r.Signals[c.Name]++
	}
}

// underWay reports whether a branch may be at work, or was when its engine died,
// while others wait.
func (r *row) underWay() bool {
	return r.Branched && r.Version != r.spent && r.Version != r.Parked
}

// dueAfter is when the next wait ends that has not ended by now.
func (r *row) dueAfter(now time.Time) (next time.Time) {
	for i := range r.Waits {
		if due := r.Waits[i].Due; due.After(now) && (next.IsZero() || due.Before(next)) {
			next = due
		}
	}
	return next
}

// called reports whether a wait ends for another reason than its time or an
// event of the log.
func (r *row) called() bool {
	for i := range r.Waits {
		w := &r.Waits[i]
		if w.Signal != "" && r.Signals[w.Signal] > 0 || r.Cancelling && w.Scope == "" && w.Step.In == "" {
			return true
		}
	}
	return false
}

// fold takes the next event of the run's history.
func (r *row) fold(e *eventstore.Recorded) error {
	r.Version, r.Updated = e.Version, e.Time
	switch e.Type {
	case typeStepSucceeded, typeTimerFired:
		// The hot ones: they need not be decoded unless there are branches.
		r.Transacted = r.Transacted || e.Type == typeStepSucceeded && bytes.Contains(e.Data, []byte(`"kind":"tx"`))
		if !r.Branched {
			r.Status = StatusRunning
			r.over(func(*wait) bool { return true })
			return nil
		}
	}
	p, err := decodePayload(e)
	if err != nil {
		return err
	}
	var id stepID
	if p.Step != nil {
		id = *p.Step
	}
	switch e.Type {
	case typeTimerSet, typeAwaitSet, typeAttemptFailed, typeSignalAwaited:
		r.Status = StatusWaiting
		next := wait{Step: id, Scope: p.Scope, Watch: p.Watch, Attempts: 0}
		if p.Due != nil {
			next.Due = *p.Due
		}
		switch e.Type {
		case typeAwaitSet:
			next.Set = e.Position
		case typeSignalAwaited:
			next.Signal = id.Name
		case typeAttemptFailed:
			next.Attempts = p.Attempt
		}
		if old := r.waitFor(id); old != nil && r.Branched {
			*old = next
		} else if r.Branched {
			r.Waits = append(r.Waits, next)
		} else {
			r.Waits = []wait{next}
		}
		r.show()
		if e.Type == typeAttemptFailed && p.Error != nil {
			r.Error = p.Error.Message
		}
		return nil
	case typeBlocked:
		r.Status, r.Cause, r.Error, r.Wake = StatusBlocked, p.Cause, p.Reason, time.Time{}
		if p.Step != nil {
			r.Step = p.Step.String()
		}
		return nil
	case typeResumed:
		r.Status, r.Cause, r.Error = StatusRunning, "", ""
		r.show()
		return nil
	case typeSignalled:
		if r.Signals == nil {
			r.Signals = map[string]int{}
		}
		r.Signals[p.Name]++
		return nil
	case typeCancelAsked:
		r.Cancelling = true
		return nil
	case typeRetryAsked:
		for i := range r.Waits {
			if r.Waits[i].Attempts > 0 {
				r.Waits[i].Due = time.Time{}
			}
		}
		if r.Status == StatusWaiting {
			r.Status = StatusRunning
		}
		return nil
	case typePublished:
		if r.Published == nil {
			r.Published = map[string]json.RawMessage{}
		}
		r.Published[id.Name] = p.Result
		return nil
	case typeVersionMarked:
		if r.Versions == nil {
			r.Versions = map[string]int{}
		}
		r.Versions[id.Name] = p.Number
		return nil
	case typeStarted:
		r.Started, r.Trigger, r.event = e.Time, 0, nil
		r.Segment, r.Build = e.Position, p.Build
		if p.Parent != nil {
			r.Parent = p.Parent.Saga + "/" + p.Parent.ID
		}
	case typeContinued:
		r.Segment, r.Build, r.Continued = e.Position, p.Build, p.Segment
		r.Versions, r.Branched = nil, false
		r.carry(p.Carried)
		r.Waits = nil
	case typeRestarted:
		r.carry(p.Carried)
		r.Waits, r.Cancelling, r.RollingBack, r.Error, r.Cause = nil, false, false, "", ""
		r.Reopened = r.Reopened || p.Since > 0
		if p.Due != nil {
			r.Started = *p.Due
		}
	case typeBranched:
		r.Branched = true
	case typeRollbackBegan:
		r.RollingBack = true
	case typeSignalTaken:
		if r.Signals[id.Name] > 1 {
			r.Signals[id.Name]--
		} else {
			delete(r.Signals, id.Name)
		}
	case typeCompleted, typeFailed, typeCancelled, typeTerminated:
		r.Status = map[string]Status{typeCompleted: StatusCompleted, typeFailed: StatusFailed, typeCancelled: StatusCancelled, typeTerminated: StatusTerminated}[e.Type]
		r.Waits, r.Wake, r.Step, r.Attempts, r.Error, r.RollingBack, r.Cause = nil, time.Time{}, "", 0, "", false, ""
		r.Signals = nil
		switch {
		case p.Error != nil:
			r.Error = p.Error.Message
		case p.Reason != "":
			r.Error = p.Reason
		}
		return nil
	}
	if r.Status == StatusBlocked && e.Type == typeSkipped {
		r.Error, r.Cause = "", ""
	}
	r.Status = StatusRunning
	switch e.Type {
	case typeJoined:
		within := id.label() + "."
		if id.Branch != "" {
			within = id.Branch + "@" + within
		}
		r.over(func(w *wait) bool {
			return w.Step == id || w.Step.In == id.In && strings.HasPrefix(w.Step.Branch, within)
		})
	default:
		r.over(func(w *wait) bool { return w.Step == id || !r.Branched })
	}
	return nil
}

// sagaWorker runs one saga.
type sagaWorker struct {
	runner
	saga       *blueprint
	category   string
	engine     *Engine
	index      string              // what the names of its tables begin with
	starts     map[string]*trigger // by current type
	startTypes []string            // as stored

	// Of the batch that is being routed, by whoever follows the log:
	triggers map[eventstore.Position]started
	ended    map[string]*Info // of runs that go on after they had ended

	loads chan struct{} // semaphore of one, for who loads rows

	// With the runner's lock:
	rows     map[string]*row // those in memory
	dirty    []*row
	touched  []*row
	dues     dueHeap
	watches  map[string]map[*row]struct{} // by key
	watched  map[string]bool              // stored types that were ever waited for
	watchAll []string
	cached   int    // histories that rows hold
	holding  int    // bytes of these, as stored
	asleep   sieve  // keys of watches of rows that are not in memory
	pinned   bool   // rows are being loaded: none may leave memory
	leaving  []*row // as soon as that is over
	// No row that is not in memory is due before laterAt, and one is just then,
	// unless unsure; none is due at all if not later.
	later    bool
	laterAt  time.Time
	unsure   bool
	beyond   string // no key up to this one is of a row that is not in memory
	sweeping bool   // runs that were not at rest are still to be loaded
	swept    string // up to this key
	gates    map[string]*gate
	waiting  map[string][]chan<- eventstore.Recorded // by run

	histories int // the most of them
	lagging   int // rows whose fold is behind what their jobs have written
	ahead     int // the most rows in memory that wait for a time to come
}

// build returns the worker of the saga.
func (b *blueprint) build(e *Engine) *candidate {
	return newCandidate(e, role{
		name:  b.unit(),
		begin: func() *runner { return &newSagaWorker(e, b).runner },
		idle:  func(tx projection.StateTx, now time.Time) (bool, error) { return idleSaga(tx, b, now) },
	})
}

func newSagaWorker(e *Engine, b *blueprint) *sagaWorker {
	w := &sagaWorker{
		engine: e, saga: b, category: category(b.name), index: b.index(), starts: map[string]*trigger{},
		triggers: map[eventstore.Position]started{}, ended: map[string]*Info{}, loads: make(chan struct{}, 1),
		rows: map[string]*row{}, later: true, unsure: true, beyond: firstDue, sweeping: true, swept: indexMark, ahead: mostAhead,
		watches: map[string]map[*row]struct{}{}, watched: map[string]bool{}, gates: map[string]*gate{}, histories: e.options.CachedRuns,
	}
	for i := range b.triggers {
		t := &b.triggers[i]
		w.starts[t.eventType] = t
		if !b.draining {
			w.startTypes = append(w.startTypes, t.eventType)
		}
	}
	if e.options.ahead > 0 {
		w.ahead = e.options.ahead
	}
	w.startTypes = e.env.encoding.StoredTypes(w.startTypes...)
	w.runner = newRunner(e, b.unit(), b.beginning)
	w.behaviour = w
	return w
}

// offered reports whether an event has been found that a wait is for.
func (r *row) offered() bool {
	for i := range r.Waits {
		if r.Waits[i].Found != 0 && r.Waits[i].Scanned {
			return true
		}
	}
	return false
}

// unscanned reports whether the past is still to be searched for a wait.
func (r *row) unscanned() bool {
	for i := range r.Waits {
		if r.Waits[i].Watch != nil && !r.Waits[i].Scanned {
			return true
		}
	}
	return false
}

func decodeRow(entry projection.Row) (*row, error) {
	r := &row{}
	if err := jsonv1.Unmarshal(entry.Value, r); err != nil {
		return nil, fmt.Errorf("%w: row of run %q: %w", errIndex, entry.Key, err)
	}
	if r.Waits == nil && (r.Status == StatusWaiting || r.Status == StatusBlocked) {
		// As it was stored before runs could wait for several things.
		var old struct {
			wait
			Wake time.Time `json:"wake"`
		}
		if err := jsonv1.Unmarshal(entry.Value, &old); err == nil && (old.Watch != nil || !old.Due.IsZero() || !old.Wake.IsZero()) {
			if old.Due.IsZero() {
				old.Due = old.Wake
			}
			old.Attempts = r.Attempts
			r.Waits = []wait{old.wait}
		}
	}
	return r, nil
}

func (w *sagaWorker) query() eventstore.Query {
	items := []eventstore.Item{{Category: w.category}}
	types := append(slices.Clone(w.startTypes), w.watchAll...)
	if len(types) > 0 {
		items = append(items, eventstore.Item{Types: types})
	}
	return eventstore.Match(items...)
}

func (w *sagaWorker) past() (eventstore.Query, bool) {
	return eventstore.OfTypes(w.startTypes...), len(w.startTypes) > 0
}

func (w *sagaWorker) history() eventstore.Query { return eventstore.OneCategory(w.category) }

func (w *sagaWorker) touch(r *row) {
	if !r.touched {
		r.touched = true
		w.touched = append(w.touched, r)
	}
	if !r.dirty {
		r.dirty = true
		w.dirty = append(w.dirty, r)
		w.changed()
	}
}

func (w *sagaWorker) route(e *eventstore.Recorded) (bool, error) {
	if e.Stream.Category == w.category {
		widened, err := w.routeHistory(e)
		if w.watched[e.Type] {
			w.routeAwaited(e) // a child may be of the same saga
		}
		return widened, err
	}
	if w.watched[e.Type] {
		w.routeAwaited(e)
	}
	if _, ok := w.starts[w.env.encoding.CurrentType(e.Type)]; ok && !w.saga.draining {
		s := w.triggers[e.Position]
		id := s.id
		if s.err != nil || id == "" || w.rows[id] != nil {
			return false, s.err
		}
		event := *e
		r := &row{Info: Info{ID: id, Status: StatusRunning, Started: e.Time, Updated: e.Time}, Trigger: e.Position, event: &event}
		w.rows[id] = r
		w.touch(r)
	}
	return false, nil
}

func (w *sagaWorker) routeHistory(e *eventstore.Recorded) (bool, error) {
	id := e.Stream.ID
	w.tell(e)
	r := w.rows[id]
	if (e.Version == 1 || e.Type == typeRestarted && r == nil) && w.foreign(e) {
		// It is another build's, also where this one was about to start it.
		if r != nil && r.Version == 0 && !r.active {
			delete(w.rows, id)
			w.touchQuietly(r)
		}
		return false, nil
	}
	if r == nil {
		if e.Version != 1 && e.Type != typeRestarted {
			return false, nil // ended, and stored as such
		}
		r = &row{Info: Info{ID: id}}
		if e.Type == typeRestarted {
			if info := w.ended[id]; info != nil {
				r.Info = *info
			}
			r.Branched = true // perhaps; then waits end one by one, which is right in any case
		}
		w.rows[id] = r
	}
	if e.Version <= r.Version {
		return false, nil
	}
	if r.stop != nil {
		switch e.Type {
		case typeCancelAsked:
			r.stop(ErrCancelled)
		case typeTerminated, typeRestarted:
			r.stop(ErrFinished)
		}
	}
	if r.history != nil && r.history.revision.Version < e.Version {
		w.uncache(r) // somebody else has written it
	}
	w.unwatch(r)
	w.unschedule(r)
	if err := r.fold(e); err != nil {
		return false, err
	}
	w.lag(r, r.Version < r.written)
	r.first = nil
	if e.Version == 1 {
		event := *e
		r.first = &event
	}
	w.touch(r)
	return w.watch(r), nil
}

// foreign reports whether the run that begins with the event is pinned to
// another build.
func (w *sagaWorker) foreign(e *eventstore.Recorded) bool {
	if w.saga.pin == "" && !bytes.Contains(e.Data, []byte(`"build"`)) {
		return false
	}
	p, err := decodePayload(e)
	return err == nil && p.Build != w.saga.pin
}

// tell tells who waits for the run that it has ended, or is blocked.
func (w *sagaWorker) tell(e *eventstore.Recorded) {
	if len(w.waiting) == 0 || !ends(e.Type) && e.Type != typeBlocked {
		return
	}
	for _, to := range w.waiting[e.Stream.ID] {
		to <- *e // it has room for one, and is told once
	}
	delete(w.waiting, e.Stream.ID)
}

// listen returns a channel on which the end of the run comes, or that it is
// blocked; and whether the run is known to be open by now. The function undoes it.
func (w *sagaWorker) listen(id string) (ended <-chan eventstore.Recorded, open bool, cancel func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	to := make(chan eventstore.Recorded, 1)
	if w.waiting == nil {
		w.waiting = map[string][]chan<- eventstore.Recorded{}
	}
	w.waiting[id] = append(w.waiting[id], to)
	r := w.rows[id]
	return to, r != nil && r.Version > 0 && !r.done() && r.Status != StatusBlocked, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		all := slices.DeleteFunc(w.waiting[id], func(c chan<- eventstore.Recorded) bool { return c == to })
		if w.waiting[id] = all; len(all) == 0 {
			delete(w.waiting, id)
		}
	}
}

// watch enters a waiting run in the index of watches. True says that the
// worker must follow more types than before.
func (w *sagaWorker) watch(r *row) bool {
	widened := false
	for i := range r.Waits {
		watch := r.Waits[i].Watch
		if watch == nil {
			continue
		}
		for _, t := range watch.Types {
			widened = w.follows(t) || widened
			key := watchKey(t, &watch.Match)
			r.keys = append(r.keys, key)
			if w.watches[key] == nil {
				w.watches[key] = map[*row]struct{}{}
			}
			w.watches[key][r] = struct{}{}
		}
	}
	return widened
}

// follows makes the worker follow the type. True says that it did not before.
func (w *sagaWorker) follows(eventType string) bool {
	if w.watched[eventType] {
		return false
	}
	w.watched[eventType] = true
	w.watchAll = append(w.watchAll, eventType)
	return true
}

func (w *sagaWorker) unwatch(r *row) {
	for _, key := range r.keys {
		delete(w.watches[key], r)
		if len(w.watches[key]) == 0 {
			delete(w.watches, key)
		}
	}
	r.keys = nil
}

func watchKey(eventType string, m *Match) string {
	switch {
	case m.Tag != "":
		return eventType + "\x00t" + m.Tag
	case m.StreamID != "":
		return eventType + "\x00s" + m.StreamID
	}
	return eventType + "\x00a"
}

// watchKeys returns the keys of the watches that may take the event.
func watchKeys(e *eventstore.Recorded) []string {
	keys := append(make([]string, 0, 2+len(e.Tags)), e.Type+"\x00a", e.Type+"\x00s"+e.Stream.ID)
	for _, tag := range e.Tags {
		keys = append(keys, e.Type+"\x00t"+tag)
	}
	return keys
}

func (w *sagaWorker) routeAwaited(e *eventstore.Recorded) {
	for _, key := range watchKeys(e) {
		for r := range w.watches[key] {
			if r.offer(e) {
				w.touch(r)
			}
		}
	}
}

// offer gives the event to each wait that takes it. Only one of them can have it
// in the end, see [Run.await], and which one is not known yet.
func (r *row) offer(e *eventstore.Recorded) bool {
	given := false
	for i := range r.Waits {
		w := &r.Waits[i]
		if w.Watch != nil && w.Found == 0 && e.Position > w.Set && w.Watch.takes(e) {
			event := *e
			w.Found, w.event = e.Position, &event
			given = true
		}
	}
	return given
}

func (w *sagaWorker) ready() {
	for _, r := range w.touched {
		r.touched = false
	}
	w.touched = w.touched[:0]
	open := slices.SortedFunc(maps.Values(w.rows), func(a, b *row) int { return cmp.Compare(a.ID, b.ID) })
	for _, r := range open {
		w.awaken(r)
	}
	poke(w.hungry)
	if w.saga.begun != nil {
		w.submit(func(ctx context.Context) {
			for n := 0; ; n++ {
				err := w.saga.begun(ctx, w)
				if err == nil || ctx.Err() != nil {
					return
				}
				if lasting(err) {
					w.fail(fmt.Errorf("%s: %w", w.name, err))
					return
				}
				w.logger.Warn("the process could not be begun; it is tried again", "worker", w.name, "error", err)
				pause(ctx, backoff(n))
			}
		})
	}
}

// awaken gets the run going, after a takeover, if it can go on.
func (w *sagaWorker) awaken(r *row) {
	if r.Status == StatusBlocked && r.Cause != causeCompensation && !r.active {
		w.start(r) // perhaps the code fits now
		return
	}
	w.evaluate(r)
}

func (w *sagaWorker) settle() {
	for _, r := range w.touched {
		r.touched = false
		w.evaluate(r)
	}
	w.touched = w.touched[:0]
}

// evaluate gets the run going if it can go on, and otherwise lets it leave
// memory when it is not needed there.
func (w *sagaWorker) evaluate(r *row) {
	if !r.active && r.Version >= r.written && w.caught && w.failure == nil {
		w.advance(r)
	}
	w.release(r)
}

func (w *sagaWorker) advance(r *row) {
	parked := r.Version > 0 && r.spent == r.Version
	if parked && r.Status == StatusRunning && len(r.Waits) > 0 {
		r.Status = StatusWaiting // one of several branches has gone on, and ended
		w.touchQuietly(r)
	}
	switch {
	case r.done():
		w.uncache(r)
		w.ungrant(r, true)
	case r.Status == StatusBlocked:
		w.ungrant(r, true)
	case r.nudged, r.Status == StatusRunning && !parked, r.offered(), r.called() && !parked, r.Status == StatusWaiting && r.underWay():
		w.start(r)
	case r.unscanned():
		w.scan(r)
	case parked && (!r.limited.IsZero() || r.queued > 0):
		// What is due and waits for a place at a limit goes on when there is one.
		at := r.limited
		if due := r.dueAfter(w.env.clock.Now()); r.Status == StatusWaiting && !due.IsZero() && (at.IsZero() || due.Before(at)) {
			at = due
		}
		if !at.IsZero() {
			w.schedule(r, at)
		}
	case r.Status == StatusRunning:
		// Its last activation had nothing to do: history and index disagree. Starting
		// it again would change nothing, until the next event does.
	case r.Status == StatusWaiting && !r.Wake.IsZero():
		w.schedule(r, r.Wake)
	}
}

// scan looks for an awaited event among those before the wait was recorded.
// Later ones are routed to it.
func (w *sagaWorker) scan(r *row) {
	r.active = true
	w.unschedule(r)
	version := r.Version
	var waits []wait
	for i := range r.Waits {
		if r.Waits[i].Watch != nil && !r.Waits[i].Scanned {
			waits = append(waits, r.Waits[i])
		}
	}
	w.submit(func(ctx context.Context) {
		var err error
		for k := range waits {
			wt := &waits[k]
			for i := 0; ; i++ {
				wt.event, err = first(ctx, w.env.store, wt.Watch, wt.Watch.Since, wt.Set)
				if err == nil || !w.retry(ctx, i, r, err) {
					break
				}
			}
			if err != nil {
				break
			}
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		r.active = false
		if err != nil || r.Version != version {
			w.evaluate(r)
			return
		}
		for _, wt := range waits {
			to := r.waitFor(wt.Step)
			to.Scanned = true
			if wt.event != nil {
				to.Found, to.event = wt.event.Position, wt.event
			}
		}
		w.touchQuietly(r)
		w.evaluate(r)
	})
}

// touchQuietly marks the row as changed by a job, not by an event.
func (w *sagaWorker) touchQuietly(r *row) {
	if !r.dirty {
		r.dirty = true
		w.dirty = append(w.dirty, r)
		w.changed()
	}
}

func (w *sagaWorker) due() (time.Time, bool) {
	at, some := w.alarm()
	if w.caught && w.later && !w.laterAt.IsZero() && (!some || w.laterAt.Before(at)) {
		return w.laterAt, true
	}
	return at, some
}

func (w *sagaWorker) alarm() (time.Time, bool) {
	if len(w.dues) == 0 {
		return time.Time{}, false
	}
	return w.dues[0].due, true
}

func (w *sagaWorker) unsettled() bool { return w.caught && (w.unsure || w.sweeping) }

func (w *sagaWorker) fire(now time.Time) {
	for len(w.dues) > 0 && !w.dues[0].due.After(now) {
		w.start(w.dues[0])
	}
	if w.later {
		poke(w.hungry)
	}
}

func (w *sagaWorker) describe() []string {
	var ids []string
	for _, r := range w.rows {
		if r.active {
			ids = append(ids, r.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

func (w *sagaWorker) changes() changes {
	rows := w.dirty
	w.dirty = nil
	type write struct {
		r           *row
		version     uint64
		value       []byte
		done, had   bool
		gone, added []string // entries
		before      []string
	}
	writes := make([]write, 0, len(rows))
	var failure error
	for _, r := range rows {
		r.dirty = false
		one := write{r: r, version: r.Version, had: r.stored, done: r.done(), before: r.entries}
		if r.Version == 0 && w.rows[r.ID] != r { // a start that came to nothing
			if !r.stored {
				continue
			}
			r.entries = nil
		} else {
			var err error
			if one.done {
				one.value, err = jsonv1.Marshal(&r.Info)
			} else {
				one.value, err = jsonv1.Marshal(r)
			}
			failure = errors.Join(failure, err)
			r.stored, r.entries = !one.done, r.indexed()
		}
		for _, entry := range one.before {
			if !slices.Contains(r.entries, entry) {
				one.gone = append(one.gone, entry)
			}
		}
		for _, entry := range r.entries {
			if !r.firm || !slices.Contains(one.before, entry) {
				one.added = append(one.added, entry)
			}
		}
		r.flushing, r.firm = true, true
		writes = append(writes, one)
	}
	return changes{
		count: len(writes),
		write: func(tx projection.StateTx, at projection.Checkpoint) error {
			if failure != nil {
				return failure
			}
			for _, one := range writes {
				var err error
				switch {
				case one.value == nil:
					err = tx.Delete(openTable(w.index), one.r.ID)
				case one.done:
					if one.had {
						err = tx.Delete(openTable(w.index), one.r.ID)
					}
					err = errors.Join(err, tx.Put(doneTable(w.index), one.r.ID, one.value))
					if one.r.Transacted && w.isOver(one.r, one.version) {
						err = errors.Join(err, forgetTx(tx, w.saga.name, one.r.ID, ""))
					}
				default:
					err = tx.Put(openTable(w.index), one.r.ID, one.value)
					if one.r.Reopened {
						err = errors.Join(err, tx.Delete(doneTable(w.index), one.r.ID))
					}
				}
				for _, entry := range one.gone {
					table, key := entryTable(w.index, entry)
					err = errors.Join(err, tx.Delete(table, key))
				}
				for _, entry := range one.added {
					table, key := entryTable(w.index, entry)
					err = errors.Join(err, tx.Put(table, key, nil))
				}
				if err != nil {
					return err
				}
			}
			return mark(tx, w.index, at)
		},
		undo: func() {
			for _, one := range writes {
				// Perhaps it was written all the same.
				r := one.r
				r.stored = one.had || one.value != nil && !one.done
				r.entries = append(slices.Clone(one.before), one.added...)
				r.flushing, r.firm = false, false
				w.touchQuietly(r)
			}
		},
		stored: func() {
			for _, one := range writes {
				one.r.flushing = false
				w.release(one.r)
			}
		},
	}
}

// isOver reports whether the run has ended at the version and was not begun anew
// since. To be asked behind the fence: what a restarted run does in transactions
// waits there.
func (w *sagaWorker) isOver(r *row, version uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return r.done() && r.Version == version && (w.rows[r.ID] == nil || w.rows[r.ID] == r)
}

// There is no limit to a history, but a warning.
const (
	longSteps = 10_000
	longBytes = 16 << 20
)

// start gets the run going in a job.
func (w *sagaWorker) start(r *row) {
	r.active, r.nudged, r.limited = true, false, time.Time{}
	a := activation{trigger: r.Trigger, event: r.event, first: r.first, history: r.history, segment: r.Segment, row: r}
	w.uncache(r)
	w.unschedule(r)
	r.first = nil
	scanned := true
	for i := range r.Waits {
		wt := &r.Waits[i]
		if wt.Found != 0 && wt.Scanned {
			a.found = append(a.found, found{wt.Step.key(), wt.Found, wt.event})
		}
		scanned = scanned && (wt.Watch == nil || wt.Scanned)
	}
	if scanned {
		a.routed = w.position
	}
	w.submit(func(ctx context.Context) { w.activate(ctx, r, a) })
}

// cache keeps the history of a run that was put aside, while there is room.
// What was kept first stays: with equal timers it is also needed first. One that
// is out of date already is not kept: a run that has nothing to write would never
// learn what it was told meanwhile. Nor is a large one, which would keep many others
// out.
func (w *sagaWorker) cache(r *row, h *history) {
	if h != nil && h.revision.Version >= r.Version && w.cached < w.histories && h.bytes <= largeHistory && w.holding+h.bytes <= cachedBytes &&
		r.history == nil && w.rows[r.ID] == r {
		r.history, r.holds = h, h.bytes
		w.cached++
		w.holding += r.holds
	}
}

// The bounds of the histories of a saga that are kept in memory, in bytes as stored.
const (
	cachedBytes  = 64 << 20
	largeHistory = 1 << 20
)

func (w *sagaWorker) uncache(r *row) {
	if r.history != nil {
		r.history = nil
		w.cached--
		w.holding -= r.holds
	}
}

// activation says why a run goes on.
type activation struct {
	row     *row
	trigger eventstore.Position  // start it on this event
	event   *eventstore.Recorded // that one, if it is at hand
	found   []found              // give it these events
	routed  eventstore.Position  // events up to here have been offered to it
	first   *eventstore.Recorded // all there is of its history, if it is at hand
	segment eventstore.Position  // its history begins here, if that is known
	history *history             // as it was when the run was put aside, if it is at hand
}

// found is an event that a step waits for.
type found struct {
	step  string
	at    eventstore.Position
	event *eventstore.Recorded // if it is at hand
}

// activate runs the saga's code from its history on as far as it gets.
func (w *sagaWorker) activate(ctx context.Context, r *row, a activation) {
	if !w.confirm(ctx) {
		w.mu.Lock()
		defer w.mu.Unlock()
		r.active = false
		return
	}
	var version uint64
	var o outcome
	var kept *history
	var unread error
	foreign := false // the history was there before its trigger came
	late := false    // somebody has told the run something that it has not looked at
	live, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	w.mu.Lock()
	r.stop = stop
	w.mu.Unlock()
	for failures, conflicts := 0, 0; ; {
		var err error
		var h *history
		version, o, h, late, err = w.attempt(ctx, live, r.ID, a)
		a.history, a.first, a.routed = nil, nil, 0
		if version > 0 {
			a.trigger = 0
		}
		if err == nil && o.kind == suspended {
			kept = h
		}
		if err == nil && o.kind == broken {
			err = o.err
		}
		if err != nil && unreadable(err) {
			unread = err
			break
		}
		if err != nil {
			if !w.retry(ctx, failures, r, err) {
				break
			}
			failures++
			continue
		}
		if o.kind != conflicted {
			break
		}
		// Somebody else has written the history: see what it says now.
		if a.trigger != 0 {
			a.trigger, foreign = 0, true
		}
		if conflicts++; conflicts > 1 {
			if lost, _ := w.fenced(ctx); lost || !pause(ctx, min(time.Duration(conflicts)*10*time.Millisecond, time.Second)) {
				break
			}
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	r.active, r.stop = false, nil
	r.written = max(r.written, version)
	w.lag(r, r.Version < r.written)
	w.ungrant(r, o.kind != suspended)
	switch {
	case o.kind == finished:
		w.env.tell.count(w.env.tell.ended, w.saga.name, attribute.String("deed.status", string(endedBy(o.ended))))
	case o.kind == blocked:
		w.env.tell.count(w.env.tell.blocked, w.saga.name)
	case kept != nil && !r.warned && (kept.steps > longSteps || kept.bytes > longBytes):
		r.warned = true
		w.env.tell.count(w.env.tell.long, w.saga.name)
		w.logger.Warn("the history of a run has become long, and so does going on after a takeover: let it continue anew (Run.Continue)",
			"saga", w.saga.name, "id", r.ID, "steps", kept.steps, "bytes", kept.bytes)
	}
	if foreign && r.Version == 0 && w.rows[r.ID] == r {
		w.ungrant(r, true)
		// Where that history lies ahead in the log it brings its own row.
		w.unschedule(r)
		w.lag(r, false)
		delete(w.rows, r.ID)
		w.touchQuietly(r)
		return
	}
	if unread != nil {
		// Blocked in the index only: what cannot be read must not be written to.
		w.logger.Error("saga is blocked", "saga", w.saga.name, "id", r.ID, "reason", unread)
		r.Status, r.Cause, r.Error, r.Wake = StatusBlocked, causeMismatch, unread.Error(), time.Time{}
		w.touchQuietly(r)
		return
	}
	if o.kind == suspended {
		w.cache(r, kept)
		if !late {
			r.spent = version
			if kept != nil && (len(kept.lines) > 1 || r.Branched) && r.Parked != version {
				r.Parked = version
				w.touchQuietly(r)
			}
		}
	}
	w.evaluate(r)
}

// lag counts the row as lagging or not.
func (w *sagaWorker) lag(r *row, lags bool) {
	switch {
	case lags && !r.lags:
		w.lagging++
	case !lags && r.lags:
		w.lagging--
	}
	r.lags = lags
}

// unreadable reports whether the history, or the event that starts the run, is
// not what this program can read.
func unreadable(err error) bool {
	return errors.Is(err, errNewerHistory) || errors.Is(err, eventstore.ErrDecode) || errors.Is(err, eventstore.ErrInvalid) || errors.Is(err, eventstore.ErrUnknownType)
}

// retry decides whether to go on after the store has failed, and pauses.
func (w *sagaWorker) retry(ctx context.Context, n int, r *row, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	if errors.Is(err, eventstore.ErrClosed) {
		w.fail(fmt.Errorf("%s, run %q: %w", w.name, r.ID, err))
		return false
	}
	w.logger.Warn("a run could not go on; it is tried again", "worker", w.name, "id", r.ID, "error", err)
	return pause(ctx, min(10*time.Millisecond<<min(n, 10), 10*time.Second))
}

// attempt is one activation. It returns the version of the history that it has
// seen or written, how it ended, the history, and whether others have told the
// run something after it had looked.
func (w *sagaWorker) attempt(ctx, live context.Context, id string, a activation) (uint64, outcome, *history, bool, error) {
	var err error
	event := a.event
	if a.trigger != 0 && (event == nil || event.Position != a.trigger) {
		if event, err = w.eventAt(ctx, a.trigger); err != nil {
			return 0, outcome{}, nil, false, err
		}
	}
	w.mu.Lock()
	lease := w.lease
	w.mu.Unlock()
	run := newRun(&core{
		saga: w.saga.name, stream: w.saga.stream(id), ctx: ctx, live: live, env: w.env, code: w.saga.code, build: w.saga.pin,
		h: &history{}, routed: a.routed, worker: w, lease: lease, row: a.row,
	})
	w.env.tell.count(w.env.tell.hits, w.saga.name, attribute.Bool("deed.in_memory", a.trigger != 0 || a.first != nil || a.history != nil))
	if a.trigger != 0 || a.first != nil {
		w.env.tell.count(w.env.tell.started, w.saga.name)
	}
	if a.trigger != 0 {
		if err := run.begin(w.starts, event); err != nil {
			return 0, outcome{}, nil, false, err
		}
	} else {
		if a.history != nil {
			run.h = a.history
		} else if a.first != nil {
			if err := run.h.add(a.first); err != nil {
				return 0, outcome{}, nil, false, err
			}
		} else if err := run.h.read(ctx, w.env.store, run.stream, a.segment); err != nil {
			return 0, outcome{}, nil, false, err
		}
		version := run.h.revision.Version
		if version > 0 && run.h.started.Build != w.saga.pin {
			return version, outcome{kind: suspended}, nil, false, nil
		}
		if version == 0 || run.h.finished != nil || run.h.blocked != nil && run.h.blocked.Cause == causeCompensation {
			return version, outcome{kind: suspended}, nil, false, nil
		}
		for _, f := range a.found {
			if f.event == nil || f.event.Position != f.at {
				if f.event, err = w.eventAt(ctx, f.at); err != nil {
					return 0, outcome{}, nil, false, err
				}
			}
			if run.events == nil {
				run.events = map[string]*eventstore.Recorded{}
			}
			run.events[f.step] = f.event
		}
	}
	known, told := run.h.blocked, run.h.told
	o := run.execute()
	switch o.kind {
	case suspended:
		if run.h.blocked != nil {
			run.resumed()
		}
	case blocked:
		w.logger.Error("saga is blocked", "saga", w.saga.name, "id", id, "reason", o.reason)
		if run.h.blocked == nil || known == nil || known.Reason != o.reason {
			run.blocked(o)
		}
	case abandoned, broken:
		// What other branches came to is recorded if it can be.
		if run.urgent {
			_ = run.write()
		}
		return run.h.revision.Version, o, nil, false, nil
	case conflicted:
		return run.h.revision.Version, o, nil, false, nil
	}
	if last := run.write(); last.kind != running {
		if last.kind == blocked {
			run.blocked(last)
			last = run.write()
		}
		if last.kind != running {
			return run.h.revision.Version, last, nil, false, nil
		}
	}
	return run.h.revision.Version, o, run.h, run.h.told != told, nil
}

func (w *sagaWorker) eventAt(ctx context.Context, p eventstore.Position) (*eventstore.Recorded, error) {
	for e, err := range w.env.store.Read(ctx, eventstore.All(), eventstore.ReadOptions{After: p - 1, Through: p}) {
		return &e, err
	}
	return nil, fmt.Errorf("%w: there is no event at position %d", eventstore.ErrGap, p)
}

// begin makes the history of a run that its trigger starts.
func (r *Run) begin(starts map[string]*trigger, e *eventstore.Recorded) error {
	t := starts[r.env.encoding.CurrentType(e.Type)]
	if t == nil {
		return fmt.Errorf("%w: event %q at position %d starts nothing any more", eventstore.ErrUnknownType, e.Type, e.Position)
	}
	_, in, err := t.start(r.env.encoding, *e)
	if err != nil {
		return err
	}
	meta := e.Metadata
	if meta.CorrelationID == "" {
		meta.CorrelationID = e.ID.String()
	}
	meta.CausationID = e.ID.String()
	r.begun(&payload{Format: historyFormat, In: in, Since: e.Position, Trigger: originOf(e, false), Build: r.build}, meta)
	return nil
}

// begun buffers the started event.
func (r *Run) begun(p *payload, meta eventstore.Metadata) {
	r.h.started, r.h.since = *p, p.Since
	r.h.meta = eventstore.Metadata{CorrelationID: meta.CorrelationID, CausationID: meta.CausationID, Actor: meta.Actor}
	if r.h.meta.CorrelationID == "" {
		r.h.meta.CorrelationID = uuid.NewString()
	}
	r.h.meta.TraceParent = meta.TraceParent
	r.h.startedAt = p.beginning(r.emit(typeStarted, p))
	r.buffer[0].Metadata.TraceParent = meta.TraceParent
}

func (r *Run) resumed() {
	r.h.blocked = nil
	r.emit(typeResumed, &payload{})
}

func (r *Run) blocked(o outcome) {
	r.h.blocked = nil
	r.emit(typeBlocked, &payload{Step: o.step, Cause: o.cause, Reason: o.reason})
}
