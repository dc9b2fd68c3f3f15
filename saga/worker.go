package saga

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"

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
)

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
	// Step is what it waits for, for example `await "order.shipped"`.
	Step string `json:"step,omitempty"`
	// Attempts counts the failed attempts of the step it is at.
	Attempts int `json:"attempts,omitempty"`
	// Error is the last error: of an attempt, of a blocked or of a failed run.
	Error string `json:"error,omitempty"`
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
	// Waited says that a blocked run was waiting, for Due or an event.
	Waited bool      `json:"waited,omitempty"`
	Due    time.Time `json:"due,omitzero"`
	// Watch is what it waits for since the position Set.
	Watch *watch              `json:"watch,omitempty"`
	Set   eventstore.Position `json:"set,omitempty"`
	// Scanned says that no event between the watch's Since and Set is taken.
	Scanned bool `json:"scanned,omitempty"`
	// Found is the event that ends the wait.
	Found eventstore.Position `json:"found,omitempty"`

	event   *eventstore.Recorded // the one at Found, or at Trigger
	active  bool                 // a job works on it
	written uint64               // the version its last job has seen; the fold may not be there yet
	spent   uint64               // the version at which its last job had nothing to do
	stored  bool                 // there is a row of it in the table of open runs
	dirty   bool
	touched bool
	keys    []string // in the index of watches
	history *history // of a run that waits, if there is room; nobody else uses it
}

func (r *row) done() bool { return r.Status == StatusCompleted || r.Status == StatusFailed }

// fold takes the next event of the run's history.
func (r *row) fold(e *eventstore.Recorded) error {
	r.Version, r.Updated = e.Version, e.Time
	waiting := func(p *payload) {
		r.Status = StatusWaiting
		r.Wake = time.Time{}
		if p.Due != nil {
			r.Wake = *p.Due
		}
		if p.Step != nil {
			r.Step = p.Step.String()
		}
	}
	switch e.Type {
	case typeTimerSet, typeAwaitSet, typeAttemptFailed, typeBlocked, typeFailed:
		p, err := decodePayload(e)
		if err != nil {
			return err
		}
		if e.Type != typeBlocked {
			r.Watch, r.Set, r.Scanned, r.Found, r.event = nil, 0, false, 0, nil
		}
		switch e.Type {
		case typeTimerSet:
			waiting(&p)
		case typeAwaitSet:
			waiting(&p)
			r.Watch, r.Set = p.Watch, e.Position
		case typeAttemptFailed:
			waiting(&p)
			r.Attempts = p.Attempt
			if p.Error != nil {
				r.Error = p.Error.Message
			}
		case typeBlocked:
			r.Waited, r.Due = r.Status == StatusWaiting, r.Wake
			r.Status, r.Cause, r.Error, r.Wake = StatusBlocked, p.Cause, p.Reason, time.Time{}
			if p.Step != nil {
				r.Step = p.Step.String()
			}
		case typeFailed:
			r.Status, r.Wake, r.Step, r.RollingBack = StatusFailed, time.Time{}, "", false
			if p.Error != nil {
				r.Error = p.Error.Message
			}
		}
		return nil
	case typeResumed:
		r.Status, r.Cause, r.Error = StatusRunning, "", ""
		if r.Waited {
			r.Status, r.Wake = StatusWaiting, r.Due
		}
		r.Waited, r.Due = false, time.Time{}
		return nil
	case typeStarted:
		r.Started, r.Trigger, r.event = e.Time, 0, nil
		r.Status = StatusRunning
	case typeCompleted:
		r.Status = StatusCompleted
	case typeRollbackBegan:
		r.RollingBack = true
		r.Status = StatusRunning
	default:
		r.Status = StatusRunning
	}
	r.Wake, r.Step, r.Attempts, r.Error, r.Cause = time.Time{}, "", 0, "", ""
	r.Watch, r.Set, r.Scanned, r.Found, r.event = nil, 0, false, 0, nil
	return nil
}

// dueEntry is a due time in the heap; it is stale once its row has moved on.
type dueEntry struct {
	at      time.Time
	row     *row
	version uint64
}

type dueHeap []dueEntry

func (h dueHeap) Len() int      { return len(h) }
func (h dueHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h dueHeap) Less(i, j int) bool {
	if c := h[i].at.Compare(h[j].at); c != 0 {
		return c < 0
	}
	return h[i].row.ID < h[j].row.ID
}
func (h *dueHeap) Push(x any) { *h = append(*h, x.(dueEntry)) } //nolint:forcetypeassert // only this file pushes
func (h *dueHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = dueEntry{}
	*h = old[:len(old)-1]
	return last
}

// sagaWorker runs one saga.
type sagaWorker struct {
	runner
	saga       *blueprint
	category   string
	starts     map[string]*trigger // by current type
	startTypes []string            // as stored

	// With the runner's lock:
	rows     map[string]*row // the open runs
	dirty    []*row
	touched  []*row
	dues     dueHeap
	watches  map[string]map[*row]struct{} // by key
	watched  map[string]bool              // stored types that were ever waited for
	watchAll []string
	cached   int // histories that rows hold

	histories int // the most of them
}

// build returns the worker of the saga.
func (b *blueprint) build(e *Engine) *candidate {
	return newCandidate(e, role{
		name:  "saga " + b.name,
		begin: func() *runner { return &newSagaWorker(e, b).runner },
		idle:  func(tx projection.StateTx, now time.Time) (bool, error) { return idleSaga(tx, b, now) },
	})
}

func newSagaWorker(e *Engine, b *blueprint) *sagaWorker {
	w := &sagaWorker{
		saga: b, category: category(b.name), starts: map[string]*trigger{},
		rows:    map[string]*row{},
		watches: map[string]map[*row]struct{}{}, watched: map[string]bool{}, histories: e.options.CachedRuns,
	}
	for i := range b.triggers {
		t := &b.triggers[i]
		w.starts[t.eventType] = t
		w.startTypes = append(w.startTypes, t.eventType)
	}
	w.startTypes = e.env.encoding.StoredTypes(w.startTypes...)
	w.runner = newRunner(e, "saga "+b.name, b.beginning)
	w.behaviour = w
	return w
}

// The tables of the index, for a saga's category.
func openTable(category string) string { return category + ".open" }
func doneTable(category string) string { return category + ".done" }

// idleSaga reports whether the stored index has no run that can go on.
func idleSaga(tx projection.StateTx, b *blueprint, now time.Time) (bool, error) {
	for entry, err := range tx.Scan(openTable(category(b.name)), projection.Range{}) {
		if err != nil {
			return false, err
		}
		r, err := decodeRow(entry)
		if err != nil || !r.rests(now) {
			return false, err
		}
	}
	return true, nil
}

// rests reports whether nothing is to be done about the run by now.
func (r *row) rests(now time.Time) bool {
	switch r.Status {
	case StatusBlocked:
		return true
	case StatusWaiting:
		return r.Found == 0 && (r.Watch == nil || r.Scanned) && (r.Wake.IsZero() || r.Wake.After(now))
	}
	return false
}

func decodeRow(entry projection.Row) (*row, error) {
	r := &row{}
	if err := jsonv1.Unmarshal(entry.Value, r); err != nil {
		return nil, fmt.Errorf("%w: row of run %q: %w", errIndex, entry.Key, err)
	}
	return r, nil
}

func (w *sagaWorker) load(tx projection.StateTx) error {
	clear(w.rows)
	clear(w.watches)
	for entry, err := range tx.Scan(openTable(w.category), projection.Range{}) {
		if err != nil {
			return err
		}
		r, err := decodeRow(entry)
		if err != nil {
			return err
		}
		r.stored = true
		w.rows[r.ID] = r
		w.watch(r)
	}
	return nil
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
		return w.routeHistory(e)
	}
	if w.watched[e.Type] {
		w.routeAwaited(e)
	}
	if t, ok := w.starts[w.env.encoding.CurrentType(e.Type)]; ok {
		id, _, err := t.start(w.env.encoding, *e)
		if err != nil {
			return false, err
		}
		if id == "" || w.rows[id] != nil {
			return false, nil
		}
		if err := w.saga.stream(id).Validate(); err != nil {
			return false, fmt.Errorf("the id that the saga's start made of it: %w", err)
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
	r := w.rows[id]
	if r == nil {
		if e.Version != 1 {
			return false, nil // ended, and stored as such
		}
		r = &row{Info: Info{ID: id}}
		w.rows[id] = r
	}
	if e.Version <= r.Version {
		return false, nil
	}
	if r.history != nil && r.history.revision.Version < e.Version {
		w.uncache(r) // somebody else has written it
	}
	w.unwatch(r)
	if err := r.fold(e); err != nil {
		return false, err
	}
	w.touch(r)
	return w.watch(r), nil
}

// watch enters a waiting run in the index of watches. True says that the
// worker must follow more types than before.
func (w *sagaWorker) watch(r *row) bool {
	if r.Watch == nil {
		return false
	}
	widened := false
	for _, t := range r.Watch.Types {
		if !w.watched[t] {
			w.watched[t] = true
			w.watchAll = append(w.watchAll, t)
			widened = true
		}
		key := watchKey(t, &r.Watch.Match)
		r.keys = append(r.keys, key)
		if w.watches[key] == nil {
			w.watches[key] = map[*row]struct{}{}
		}
		w.watches[key][r] = struct{}{}
	}
	return widened
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
	return eventType
}

func (w *sagaWorker) routeAwaited(e *eventstore.Recorded) {
	offer := func(key string) {
		for r := range w.watches[key] {
			if r.Found == 0 && e.Position > r.Set && r.Watch.takes(e) {
				event := *e
				r.Found, r.event = e.Position, &event
				w.touch(r)
			}
		}
	}
	offer(e.Type)
	offer(e.Type + "\x00s" + e.Stream.ID)
	for _, tag := range e.Tags {
		offer(e.Type + "\x00t" + tag)
	}
}

func (w *sagaWorker) ready() {
	for _, r := range w.touched {
		r.touched = false
	}
	w.touched = w.touched[:0]
	open := slices.SortedFunc(maps.Values(w.rows), func(a, b *row) int { return cmp.Compare(a.ID, b.ID) })
	for _, r := range open {
		if r.Status == StatusBlocked && r.Cause != causeCompensation {
			w.start(r) // perhaps the code fits now
			continue
		}
		w.evaluate(r)
	}
}

func (w *sagaWorker) settle() {
	for _, r := range w.touched {
		r.touched = false
		w.evaluate(r)
	}
	w.touched = w.touched[:0]
}

// evaluate gets the run going if it can go on.
func (w *sagaWorker) evaluate(r *row) {
	if r.active || r.Version < r.written || !w.caught {
		return
	}
	switch {
	case r.done():
		if w.rows[r.ID] == r {
			w.uncache(r)
			delete(w.rows, r.ID)
		}
	case r.Status == StatusBlocked:
	case r.Status == StatusRunning && r.Version > 0 && r.spent == r.Version:
		// Its last activation had nothing to do: history and index disagree. Starting
		// it again would change nothing, until the next event does.
	case r.Status == StatusRunning, r.Found != 0 && r.Scanned:
		w.start(r)
	case r.Watch != nil && !r.Scanned:
		w.scan(r)
	case r.Status == StatusWaiting && !r.Wake.IsZero():
		w.push(r)
	}
}

func (w *sagaWorker) push(r *row) {
	heap.Push(&w.dues, dueEntry{r.Wake, r, r.Version})
	if w.dues[0].row == r {
		poke(w.rearm)
	}
}

// scan looks for an awaited event among those before the wait was recorded.
// Later ones are routed to it.
func (w *sagaWorker) scan(r *row) {
	r.active = true
	watch, set := r.Watch, r.Set
	w.submit(func(ctx context.Context) {
		var found *eventstore.Recorded
		var err error
		for i := 0; ; i++ {
			found, err = first(ctx, w.env.store, watch, watch.Since, set)
			if err == nil || !w.retry(ctx, i, r, err) {
				break
			}
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		r.active = false
		if err != nil || r.Watch != watch {
			w.evaluate(r)
			return
		}
		r.Scanned = true
		if found != nil {
			r.Found, r.event = found.Position, found
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
	for len(w.dues) > 0 {
		top := &w.dues[0]
		if top.row.Version == top.version && !top.row.active && top.row.Status == StatusWaiting {
			return top.at, true
		}
		heap.Pop(&w.dues)
	}
	return time.Time{}, false
}

func (w *sagaWorker) fire(now time.Time) {
	for {
		at, some := w.due()
		if !some || at.After(now) {
			return
		}
		w.start(w.dues[0].row)
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
		r         *row
		value     []byte
		done, had bool
	}
	writes := make([]write, 0, len(rows))
	var failure error
	for _, r := range rows {
		r.dirty = false
		if r.Version == 0 && w.rows[r.ID] != r { // a start that came to nothing
			if r.stored {
				writes = append(writes, write{r: r, had: true})
			}
			continue
		}
		var value []byte
		var err error
		if r.done() {
			value, err = jsonv1.Marshal(&r.Info)
		} else {
			value, err = jsonv1.Marshal(r)
		}
		failure = errors.Join(failure, err)
		writes = append(writes, write{r, value, r.done(), r.stored})
		r.stored = !r.done()
	}
	return changes{
		count: len(writes),
		write: func(tx projection.StateTx) error {
			if failure != nil {
				return failure
			}
			for _, one := range writes {
				var err error
				switch {
				case one.value == nil:
					err = tx.Delete(openTable(w.category), one.r.ID)
				case one.done:
					if one.had {
						err = tx.Delete(openTable(w.category), one.r.ID)
					}
					err = errors.Join(err, tx.Put(doneTable(w.category), one.r.ID, one.value))
				default:
					err = tx.Put(openTable(w.category), one.r.ID, one.value)
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
		undo: func() {
			for _, one := range writes {
				// Perhaps it was written all the same.
				one.r.stored = one.had || one.value != nil && !one.done
				w.touchQuietly(one.r)
			}
		},
	}
}

// start gets the run going in a job.
func (w *sagaWorker) start(r *row) {
	r.active = true
	a := activation{trigger: r.Trigger, found: r.Found, event: r.event, history: r.history}
	w.uncache(r)
	if r.Scanned {
		a.routed = w.position
	}
	w.submit(func(ctx context.Context) { w.activate(ctx, r, a) })
}

// cache keeps the history of a run that was put aside, while there is room.
// What was kept first stays: with equal timers it is also needed first. A
// history that is out of date does no harm, since the append that builds on it
// is refused.
func (w *sagaWorker) cache(r *row, h *history) {
	if h != nil && w.cached < w.histories && r.history == nil && w.rows[r.ID] == r {
		r.history = h
		w.cached++
	}
}

func (w *sagaWorker) uncache(r *row) {
	if r.history != nil {
		r.history = nil
		w.cached--
	}
}

// activation says why a run goes on.
type activation struct {
	trigger eventstore.Position  // start it on this event
	found   eventstore.Position  // give it this event
	event   *eventstore.Recorded // one of the two, if it is at hand
	routed  eventstore.Position  // events up to here have been offered to it
	history *history             // as it was when the run was put aside, if it is at hand
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
	for failures, conflicts := 0, 0; ; {
		var err error
		var h *history
		version, o, h, err = w.attempt(ctx, r.ID, a)
		a.history = nil
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
	r.active = false
	r.written = max(r.written, version)
	if foreign && r.Version == 0 && w.rows[r.ID] == r {
		// Where that history lies ahead in the log it brings its own row.
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
		if version == r.Version {
			r.spent = version
		}
	}
	w.evaluate(r)
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
// seen or written, how it ended, and the history.
func (w *sagaWorker) attempt(ctx context.Context, id string, a activation) (uint64, outcome, *history, error) {
	var err error
	event := a.event
	if at := max(a.trigger, a.found); at != 0 && (event == nil || event.Position != at) {
		if event, err = w.eventAt(ctx, at); err != nil {
			return 0, outcome{}, nil, err
		}
	}
	stream := w.saga.stream(id)
	run := &Run{saga: w.saga.name, stream: stream, ctx: ctx, env: w.env, code: w.saga.code, h: &history{}, routed: a.routed}
	if a.trigger != 0 {
		if err := run.begin(w.starts, event); err != nil {
			return 0, outcome{}, nil, err
		}
	} else {
		if a.history != nil {
			run.h = a.history
		} else if err := run.h.read(ctx, w.env.store, stream); err != nil {
			return 0, outcome{}, nil, err
		}
		version := run.h.revision.Version
		if version == 0 || run.h.finished != nil || run.h.blocked != nil && run.h.blocked.Cause == causeCompensation {
			return version, outcome{kind: suspended}, nil, nil
		}
		if a.found != 0 {
			run.event = event
		}
	}
	known := run.h.blocked
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
	case abandoned, conflicted, broken:
		return run.h.revision.Version, o, nil, nil
	}
	if last := run.write(); last.kind != running {
		if last.kind == blocked {
			run.blocked(last)
			last = run.write()
		}
		if last.kind != running {
			return run.h.revision.Version, last, nil, nil
		}
	}
	return run.h.revision.Version, o, run.h, nil
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
	r.begun(&payload{Format: historyFormat, In: in, Since: e.Position, Trigger: originOf(e, false)}, meta)
	return nil
}

// begun buffers the started event.
func (r *Run) begun(p *payload, meta eventstore.Metadata) {
	r.h.started = *p
	r.h.meta = eventstore.Metadata{CorrelationID: meta.CorrelationID, CausationID: meta.CausationID, Actor: meta.Actor}
	if r.h.meta.CorrelationID == "" {
		r.h.meta.CorrelationID = uuid.NewString()
	}
	r.h.startedAt = p.beginning(r.emit(typeStarted, p))
}

func (r *Run) resumed() {
	r.h.blocked = nil
	r.emit(typeResumed, &payload{})
}

func (r *Run) blocked(o outcome) {
	r.h.blocked = nil
	r.emit(typeBlocked, &payload{Step: o.step, Cause: o.cause, Reason: o.reason})
}
