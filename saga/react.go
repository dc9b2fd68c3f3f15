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

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// The event types of a reaction's history; testdata/history.golden pins them.
const (
	typeHandled        = "reaction.handled"
	typeReactionFailed = "reaction.attempt_failed"
	typeParked         = "reaction.parked"
	typeReplayed       = "reaction.replayed"
)

// reactionPayload is the content of every event of a reaction's history.
type reactionPayload struct {
	Format  int        `json:"format"`
	Event   *origin    `json:"event,omitempty"`
	Source  *source    `json:"source,omitempty"`
	Attempt int        `json:"attempt,omitempty"`
	Due     *time.Time `json:"due,omitempty"`
	Error   *failure   `json:"error,omitempty"`
}

type source struct {
	Category string `json:"category"`
	Stream   string `json:"stream"`
}

// Reaction is one function that is called for every event of a type. Make it
// with [React], once, as a package variable. It is immutable and safe for
// concurrent use.
type Reaction struct {
	name      string
	types     []string // of events, as they are today
	handle    func(enc *eventstore.Encoding, step Step, r eventstore.Recorded) error
	policy    policy
	beginning beginning
	mistakes  []error
}

// ReactionOption changes how a reaction is tried: [Retry], [Within],
// [Backoff]. Without any, an event is tried 10 times, after 1 s, 2 s, 4 s, …
// and at most 5 minutes, before it goes to the dead letters.
type ReactionOption interface{ applyReaction(*policy) }

// React returns a reaction: handle is called once for each event of type E,
// durably. That is: at least once, with a stable [Step.IdempotencyKey], never
// again once it has returned nil, in order within each stream, and again after
// an error. When the attempts are used up, or the error is [Terminal], the
// event and the later ones of its stream go to the dead letters, in order, and
// other streams go on; see [Engine.DeadLetters].
//
// The name (ASCII letters, digits, '.' and '_', beginning with a letter) is
// part of the stored contract.
func React[E Event](name string, handle func(Step, E) error, options ...ReactionOption) *Reaction {
	r := &Reaction{name: name, policy: defaultPolicy()}
	r.policy.attempts = 10
	if err := eventstore.ValidateCategory(reactionCategory(name)); name == "" || err != nil {
		r.mistakes = append(r.mistakes, fmt.Errorf("%w: reaction name %q: use ASCII letters, digits, '.' and '_'", eventstore.ErrInvalid, name))
	}
	eventType, err := eventTypeOf[E]()
	if err != nil {
		r.mistakes = append(r.mistakes, fmt.Errorf("reaction %q: %w", name, err))
	}
	if handle == nil {
		r.mistakes = append(r.mistakes, fmt.Errorf("%w: reaction %q has no function", eventstore.ErrInvalid, name))
	}
	r.types = []string{eventType}
	r.handle = func(enc *eventstore.Encoding, step Step, recorded eventstore.Recorded) error {
		e, err := decodeEvent[E](enc, recorded)
		if err != nil {
			return Terminal(err)
		}
		return handle(step, e)
	}
	for _, option := range options {
		option.applyReaction(&r.policy)
	}
	return r
}

func reactionCategory(name string) string { return "reaction." + name }

// Name returns the reaction's name.
func (r *Reaction) Name() string { return r.name }

// Err returns the mistakes in the definition, joined.
func (r *Reaction) Err() error { return errors.Join(r.mistakes...) }

// FromStart returns the reaction, decided about the past: when it is new and
// the log holds events for it, it handles them.
func (r *Reaction) FromStart() *Reaction { return r.begin(fromStart) }

// FromNow returns the reaction, decided about the past: when it is new, events
// that are in the log are left alone. The decision is recorded in the log and
// stays.
func (r *Reaction) FromNow() *Reaction { return r.begin(fromNow) }

func (r *Reaction) begin(b beginning) *Reaction {
	changed := *r
	changed.beginning = b
	return &changed
}

func (r *Reaction) kind() string { return "reaction" }

func (r *Reaction) build(e *Engine) *candidate {
	return newCandidate(e, role{
		name:  "reaction " + r.name,
		begin: func() *runner { return &newReactionWorker(e, r).runner },
		idle:  r.idle,
	})
}

// idle reports whether the stored index has no event that can be handled by now.
func (r *Reaction) idle(tx projection.StateTx, now time.Time) (bool, error) {
	for entry, err := range tx.Scan(backlogTable(r.name), projection.Range{}) {
		if err != nil {
			return false, err
		}
		b, err := decodeBacklog(entry)
		if err != nil {
			return false, err
		}
		if rests := b.Parked || b.Retry.After(now); !rests {
			return false, nil
		}
	}
	return true, nil
}

// backlogTable is the table of the index of a reaction.
func backlogTable(name string) string { return reactionCategory(name) + ".open" }

func decodeBacklog(entry projection.Row) (Backlog, error) {
	var b Backlog
	err := jsonv1.Unmarshal(entry.Value, &b)
	if err != nil {
		err = fmt.Errorf("%w: backlog %q: %w", errIndex, entry.Key, err)
	}
	return b, err
}

// stream is where the history of the reaction to one stream is kept.
func (r *Reaction) stream(source eventstore.Stream) eventstore.Stream {
	id := source.String()
	if len(id) > eventstore.MaxKeyBytes {
		id = keyOf(id, "")
	}
	return eventstore.Stream{Category: reactionCategory(r.name), ID: id}
}

// Backlog is a stream whose events a reaction has not handled yet.
type Backlog struct {
	Stream eventstore.Stream `json:"stream"`
	// After and Last enclose the events: positions above After, up to Last.
	After eventstore.Position `json:"after"`
	Last  eventstore.Position `json:"last"`
	// Count is the number of events.
	Count int `json:"count"`
	// Attempts counts the failed attempts of the first event.
	Attempts int `json:"attempts,omitempty"`
	// Retry is when it is tried again; zero: at once, or not at all.
	Retry time.Time `json:"retry,omitzero"`
	// Error is that of the last attempt.
	Error string `json:"error,omitempty"`
	// Parked says that the events are dead letters.
	Parked bool `json:"parked,omitempty"`
}

// backlog is the index entry of a stream; there is none where all is handled.
type backlog struct {
	Backlog

	key     string
	queue   []*eventstore.Recorded // some of the next events, in order
	active  bool
	handled eventstore.Position // through here by this worker; the fold may not be there yet
	wrote   eventstore.Position // the last event that this worker wrote for the stream
	stored  bool
	dirty   bool
	touched bool
	moved   uint64 // counts changes, for stale due times
}

// keep bounds how many events of a backlog are held in memory.
const keep = 64

type backlogDue struct {
	at    time.Time
	row   *backlog
	moved uint64
}

type backlogHeap []backlogDue

func (h backlogHeap) Len() int      { return len(h) }
func (h backlogHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h backlogHeap) Less(i, j int) bool {
	if c := h[i].at.Compare(h[j].at); c != 0 {
		return c < 0
	}
	return h[i].row.key < h[j].row.key
}
func (h *backlogHeap) Push(x any) { *h = append(*h, x.(backlogDue)) } //nolint:forcetypeassert // only this file pushes
func (h *backlogHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = backlogDue{}
	*h = old[:len(old)-1]
	return last
}

// reactionWorker runs one reaction.
type reactionWorker struct {
	runner
	engine   *Engine
	reaction *Reaction
	category string
	types    []string

	// With the runner's lock:
	rows    map[eventstore.Stream]*backlog
	dirty   []*backlog
	touched []*backlog
	dues    backlogHeap
}

func newReactionWorker(e *Engine, r *Reaction) *reactionWorker {
	w := &reactionWorker{
		engine: e, reaction: r, category: reactionCategory(r.name), types: e.env.encoding.StoredTypes(r.types...),
		rows: map[eventstore.Stream]*backlog{},
	}
	w.runner = newRunner(e, "reaction "+r.name, r.beginning)
	w.behaviour = w
	return w
}

func (w *reactionWorker) load(tx projection.StateTx, _ projection.Checkpoint) (bool, error) {
	clear(w.rows)
	for entry, err := range tx.Scan(backlogTable(w.reaction.name), projection.Range{}) {
		if err != nil {
			return false, err
		}
		b, err := decodeBacklog(entry)
		if err != nil {
			return false, err
		}
		w.rows[b.Stream] = &backlog{Backlog: b, key: entry.Key, stored: true}
	}
	return true, nil
}

func (w *reactionWorker) reset(projection.StateTx, projection.Checkpoint) error { return nil }

func (w *reactionWorker) repair(context.Context, projection.Lease, projection.Checkpoint) error {
	return nil
}

func (w *reactionWorker) prepare(context.Context, []eventstore.Recorded) (func(), error) {
	return func() {}, nil
}

func (w *reactionWorker) tend(context.Context) error { return nil }

func (w *reactionWorker) alarm() (time.Time, bool) { return w.due() }

func (w *reactionWorker) unsettled() bool { return false }

func (w *reactionWorker) query() eventstore.Query {
	return eventstore.Match(eventstore.Item{Category: w.category}, eventstore.Item{Types: w.types})
}

func (w *reactionWorker) past() (eventstore.Query, bool) {
	return eventstore.OfTypes(w.types...), true
}

func (w *reactionWorker) history() eventstore.Query { return eventstore.OneCategory(w.category) }

func (w *reactionWorker) touch(r *backlog) {
	r.moved++
	if !r.touched {
		r.touched = true
		w.touched = append(w.touched, r)
	}
	w.mark(r)
}

func (w *reactionWorker) mark(r *backlog) {
	if !r.dirty {
		r.dirty = true
		w.dirty = append(w.dirty, r)
		w.changed()
	}
}

func (w *reactionWorker) route(e *eventstore.Recorded) (bool, error) {
	if e.Stream.Category == w.category {
		return false, w.fold(e)
	}
	if !slices.Contains(w.reaction.types, w.env.encoding.CurrentType(e.Type)) {
		return false, nil
	}
	r := w.rows[e.Stream]
	if r == nil {
		r = &backlog{key: e.Stream.String(), Backlog: Backlog{Stream: e.Stream, After: e.Position - 1}}
		w.rows[e.Stream] = r
	}
	if e.Position <= r.Last {
		return false, nil
	}
	if len(r.queue) == r.Count && r.Count < keep { // the queue has no hole
		event := *e
		r.queue = append(r.queue, &event)
	}
	r.Last = e.Position
	r.Count++
	w.touch(r)
	return false, nil
}

func (w *reactionWorker) fold(e *eventstore.Recorded) error {
	var p reactionPayload
	if err := jsonv1.Unmarshal(e.Data, &p); err != nil {
		return &eventstore.DecodeError{Event: *e, Cause: err}
	}
	if p.Format > historyFormat {
		return fmt.Errorf("%w: format %d, this program knows up to %d", errNewerHistory, p.Format, historyFormat)
	}
	if p.Source == nil {
		return &eventstore.DecodeError{Event: *e, Cause: errors.New("it names no source stream")}
	}
	r := w.rows[eventstore.Stream{Category: p.Source.Category, ID: p.Source.Stream}]
	if r == nil {
		return nil
	}
	if p.Event != nil && p.Event.Position <= r.After {
		return nil
	}
	switch e.Type {
	case typeHandled:
		r.After = p.Event.Position
		r.Count--
		r.Attempts, r.Retry, r.Error = 0, time.Time{}, ""
		for len(r.queue) > 0 && r.queue[0].Position <= r.After {
			r.queue = r.queue[1:]
		}
	case typeReactionFailed:
		r.Attempts, r.Error = p.Attempt, p.Error.Message
		if p.Due != nil {
			r.Retry = *p.Due
		}
	case typeParked:
		r.Attempts, r.Error, r.Retry, r.Parked = p.Attempt, p.Error.Message, time.Time{}, true
		r.queue = nil
	case typeReplayed:
		r.Attempts, r.Error, r.Retry, r.Parked = 0, "", time.Time{}, false
	}
	w.touch(r)
	return nil
}

func (w *reactionWorker) ready() {
	for _, r := range w.touched {
		r.touched = false
	}
	w.touched = w.touched[:0]
	for _, r := range slices.SortedFunc(maps.Values(w.rows), func(a, b *backlog) int { return cmp.Compare(a.After, b.After) }) {
		w.evaluate(r)
	}
}

func (w *reactionWorker) settle() {
	for _, r := range w.touched {
		r.touched = false
		w.evaluate(r)
	}
	w.touched = w.touched[:0]
}

func (w *reactionWorker) evaluate(r *backlog) {
	if r.active || !w.caught {
		return
	}
	switch {
	case r.Last <= r.After:
		if w.rows[r.Stream] == r {
			delete(w.rows, r.Stream)
			w.mark(r)
		}
	case r.Last <= r.handled, r.Parked, r.wrote > w.cause:
	case !r.Retry.IsZero() && r.handled <= r.After:
		heap.Push(&w.dues, backlogDue{r.Retry, r, r.moved})
		if w.dues[0].row == r {
			poke(w.rearm)
		}
	default:
		w.start(r)
	}
}

func (w *reactionWorker) due() (time.Time, bool) {
	for len(w.dues) > 0 {
		top := &w.dues[0]
		if top.row.moved == top.moved && !top.row.active {
			return top.at, true
		}
		// A later event of the stream has touched the row: its due time stands.
		row := top.row
		heap.Pop(&w.dues)
		if !row.active && !row.Parked && !row.Retry.IsZero() && w.rows[row.Stream] == row {
			heap.Push(&w.dues, backlogDue{row.Retry, row, row.moved})
		}
	}
	return time.Time{}, false
}

func (w *reactionWorker) fire(now time.Time) {
	for {
		at, some := w.due()
		if !some || at.After(now) {
			return
		}
		w.start(w.dues[0].row)
	}
}

func (w *reactionWorker) describe() []string {
	var keys []string
	for _, r := range w.rows {
		if r.active {
			keys = append(keys, r.key)
		}
	}
	slices.Sort(keys)
	return keys
}

func (w *reactionWorker) changes() changes {
	rows := w.dirty
	w.dirty = nil
	type write struct {
		r     *backlog
		value []byte
		had   bool
	}
	var writes []write
	var failure error
	for _, r := range rows {
		r.dirty = false
		if r.Last <= r.After {
			if r.stored {
				writes = append(writes, write{r: r, had: true})
				r.stored = false
			}
			continue
		}
		value, err := jsonv1.Marshal(&r.Backlog)
		failure = errors.Join(failure, err)
		writes = append(writes, write{r, value, r.stored})
		r.stored = true
	}
	return changes{
		count: len(writes),
		write: func(tx projection.StateTx, _ projection.Checkpoint) error {
			if failure != nil {
				return failure
			}
			for _, one := range writes {
				var err error
				if one.value == nil {
					err = tx.Delete(backlogTable(w.reaction.name), one.r.key)
				} else {
					err = tx.Put(backlogTable(w.reaction.name), one.r.key, one.value)
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
		undo: func() {
			for _, one := range writes {
				one.r.stored = one.had || one.value != nil // perhaps it was written all the same
				w.mark(one.r)
			}
		},
		stored: func() {},
	}
}

// start handles the next event of the stream in a job.
func (w *reactionWorker) start(r *backlog) {
	r.active = true
	after := max(r.After, r.handled)
	attempts := 0
	if r.handled <= r.After {
		attempts = r.Attempts
	}
	var event *eventstore.Recorded
	for _, e := range r.queue {
		if e.Position > after {
			event = e
			break
		}
	}
	w.submit(func(ctx context.Context) {
		handled, wrote := w.handle(ctx, r, event, after, attempts)
		w.mu.Lock()
		defer w.mu.Unlock()
		r.active = false
		r.handled = max(r.handled, handled)
		if handled == 0 {
			r.wrote = max(r.wrote, wrote)
		}
		if handled != 0 || wrote != 0 {
			w.evaluate(r)
		}
	})
}

// handle calls the function for one event and records the outcome. It returns
// the event's position if it was handled, and where the outcome was written;
// zeros when it was abandoned.
func (w *reactionWorker) handle(ctx context.Context, r *backlog, event *eventstore.Recorded, after eventstore.Position, attempts int) (handled, wrote eventstore.Position) {
	if !w.confirm(ctx) {
		return 0, 0
	}
	for i := 0; event == nil; i++ {
		next, err := w.next(ctx, r.Stream, after)
		if err != nil {
			if !w.retry(ctx, i, r, err) {
				return 0, 0
			}
			continue
		}
		event = next
	}
	step := Step{key: keyOf(w.category, event.ID.String()), attempt: attempts + 1, bus: w.env.bus, event: event, engine: w.engine}
	within := command.CausedBy(ctx, *event)
	within, done := w.env.tell.span(within, w.reaction.name, event.Stream.String(), event.Type, "reaction", attempts+1, event.Metadata.TraceParent)
	err := surviving(func() error {
		return attempt(within, w.reaction.policy.within, 0, step, func(step Step) error {
			return w.reaction.handle(w.env.encoding, step, *event)
		})
	})
	done(err)
	p := reactionPayload{Format: historyFormat, Event: originOf(event, false), Source: &source{r.Stream.Category, r.Stream.ID}}
	commit := eventstore.Commit{}
	eventType := typeHandled
	switch {
	case err == nil:
		commit.Key = keyOf(w.category, "handled:"+event.ID.String())
		commit.Fingerprint = "handled"
	case ctx.Err() != nil:
		return 0, 0
	default:
		var panicked *panicError
		if errors.As(err, &panicked) {
			w.logger.Error("reaction panicked", "reaction", w.reaction.name, "stream", r.key, "position", event.Position, "panic", panicked.value, "stack", panicked.stack)
		}
		f := failureOf(err)
		p.Error, p.Attempt = &f, attempts+1
		// So that it is written once although the outcome of writing it be unknown. The
		// attempts are counted anew after a replay, and do not make a key.
		commit.Key = keyOf(w.category, "failed:"+uuid.NewString())
		eventType = typeReactionFailed
		if f.Terminal || w.reaction.policy.hopeless(err) || w.reaction.policy.attempts > 0 && p.Attempt >= w.reaction.policy.attempts {
			eventType = typeParked
			w.logger.Error("event goes to the dead letters, with the later ones of its stream", "reaction", w.reaction.name, "stream", r.key, "position", event.Position, "attempts", p.Attempt, "error", err)
			break
		}
		due := w.env.clock.Now().Add(w.reaction.policy.pause(step.key, p.Attempt)).UTC().Round(0)
		p.Due = &due
	}
	data, err := jsonv1.Marshal(&p)
	if err != nil {
		w.fail(fmt.Errorf("%s: %w", w.name, err))
		return 0, 0
	}
	commit.Events = []eventstore.Event{{
		Stream: w.reaction.stream(r.Stream), Type: eventType, Data: data, Time: w.env.clock.Now(),
		Metadata: eventstore.Metadata{CorrelationID: event.Metadata.CorrelationID, CausationID: event.ID.String()},
	}}
	for i := 0; ; i++ {
		receipt, err := w.env.store.Append(context.WithoutCancel(ctx), commit)
		if err == nil {
			if eventType == typeHandled {
				return event.Position, receipt.Last
			}
			return 0, receipt.Last
		}
		if !w.retry(ctx, i, r, err) {
			return 0, 0
		}
	}
}

// next reads the first event of the stream after the position that the
// reaction handles.
func (w *reactionWorker) next(ctx context.Context, stream eventstore.Stream, after eventstore.Position) (*eventstore.Recorded, error) {
	query := eventstore.Match(eventstore.Item{Stream: stream, Types: w.types})
	for e, err := range w.env.store.Read(ctx, query, eventstore.ReadOptions{After: after, Limit: 1}) {
		return &e, err
	}
	return nil, fmt.Errorf("%w: stream %q has no event for the reaction after position %d", eventstore.ErrGap, stream, after)
}

func (w *reactionWorker) retry(ctx context.Context, n int, r *backlog, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	if errors.Is(err, eventstore.ErrClosed) || errors.Is(err, eventstore.ErrGap) || errors.Is(err, eventstore.ErrInvalid) || errors.Is(err, eventstore.ErrTooLarge) {
		w.fail(fmt.Errorf("%s, stream %q: %w", w.name, r.key, err))
		return false
	}
	w.logger.Warn("a reaction could not go on; it is tried again", "worker", w.name, "stream", r.key, "error", err)
	return pause(ctx, min(10*time.Millisecond<<min(n, 10), 10*time.Second))
}

// Backlogs lists the streams with events that the reaction has not handled
// yet: under way, waiting for the next attempt, or among the dead letters.
func (e *Engine) Backlogs(ctx context.Context, reaction string) ([]Backlog, error) {
	w := e.reacts[reaction]
	if w == nil {
		return nil, fmt.Errorf("%w: the engine has no reaction %q", ErrNotFound, reaction)
	}
	if err := w.refresh(ctx); err != nil {
		return nil, err
	}
	var found []Backlog
	err := e.state.View(ctx, func(tx projection.StateTx) error {
		found = nil
		for entry, err := range tx.Scan(backlogTable(reaction), projection.Range{}) {
			if err != nil {
				return err
			}
			b, err := decodeBacklog(entry)
			if err != nil {
				return err
			}
			found = append(found, b)
		}
		return nil
	})
	return found, err
}

// DeadLetters lists the streams whose events the reaction has given up on, the
// first of them for the reason given and the later ones to keep their order.
func (e *Engine) DeadLetters(ctx context.Context, reaction string) ([]Backlog, error) {
	all, err := e.Backlogs(ctx, reaction)
	return slices.DeleteFunc(all, func(b Backlog) bool { return !b.Parked }), err
}

// ReplayDeadLetters makes the reaction handle its dead letters again, in order
// and with all attempts, and returns how many events that are. It returns when
// the order to do so is durable.
func (e *Engine) ReplayDeadLetters(ctx context.Context, reaction string) (int, error) {
	letters, err := e.DeadLetters(ctx, reaction)
	if err != nil {
		return 0, err
	}
	r, n := e.reactions[reaction], 0
	for _, b := range letters {
		data, err := jsonv1.Marshal(&reactionPayload{Format: historyFormat, Source: &source{b.Stream.Category, b.Stream.ID}})
		if err != nil {
			return n, err
		}
		_, err = e.env.store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{
			{Stream: r.stream(b.Stream), Type: typeReplayed, Data: data, Time: e.env.clock.Now()},
		}})
		if err != nil {
			return n, fmt.Errorf("replay the dead letters of reaction %q, stream %q: %w", reaction, b.Stream, err)
		}
		n += b.Count
	}
	return n, nil
}
