package workload

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// Writing are the parameters of both kinds of append.
type Writing struct {
	Timing
	Writers  int `default:"64" help:"Writers at the same time."`
	Batch    int `default:"1" help:"Events of a commit, all in one stream."`
	Streams  int `default:"0" help:"Streams written to in turn; 0 is one for each writer. Fewer than writers are shared by several."`
	TagSpace int `default:"100000" help:"Number of different tags of a kind: with N, tags are drawn from course:0 to N/10-1, student:0 to N-1, tag3:0 to N-1 and so on."`
}

func (w Writing) validate() error {
	return errors.Join(w.Timing.validate(),
		between("writers", w.Writers, 1, maxWorkers),
		between("batch", w.Batch, 1, commitEvents),
		between("streams", w.Streams, 0, 10_000_000))
}

func (w Writing) with(own map[string]any) map[string]any {
	own["writers"], own["batch"], own["streams"] = w.Writers, w.Batch, defaultTo(w.Streams, w.Writers)
	return w.Timing.with(own)
}

// Append is conditional appends to streams.
type Append struct {
	Writing
	Tags int `default:"0" help:"Tags of each event; for comparison with append-dcb."`
}

// Validate implements Workload.
func (w *Append) Validate() error { return errors.Join(w.Writing.validate(), w.tagging().validate()) }

func (w *Append) tagging() Tagging { return Tagging{Count: w.Tags, Space: w.TagSpace} }

func (w *Append) name() string { return "append" }

func (w *Append) parameters() map[string]any {
	own := map[string]any{"tags": w.Tags}
	if w.Tags > 0 {
		own["tag_space"] = w.TagSpace
	}
	return w.with(own)
}

func (w *Append) run(ctx context.Context, b *bench) (*measured, error) {
	return w.Writing.run(ctx, b, "bench_append", w.tagging(), func(worker *writer, c *eventstore.Commit) {
		c.Conditions = []eventstore.Condition{eventstore.StreamAt(worker.stream(), worker.revision())}
	})
}

// AppendDCB is appends under a dynamic consistency boundary.
type AppendDCB struct {
	Writing
	Tags  int    `default:"2" help:"Tags of each event, and of the condition: no event carries all of them."`
	After string `default:"head" enum:"head,start" help:"Since when none may match. head: since the last event this process knows of, which is what a decision that has just been read allows for. start: in the whole log, a uniqueness guard, for which the store must look at the past."`
}

// Validate implements Workload.
func (w *AppendDCB) Validate() error {
	err := errors.Join(w.Writing.validate(), w.tagging().validate())
	if w.Tags == 0 {
		err = errors.Join(err, errors.New("--tags 0: the condition is about tags: use at least 1"))
	}
	if w.After != "head" && w.After != "start" {
		err = errors.Join(err, fmt.Errorf("--after %q: use head or start", w.After))
	}
	return err
}

func (w *AppendDCB) tagging() Tagging { return Tagging{Count: w.Tags, Space: w.TagSpace} }

func (w *AppendDCB) name() string { return "append-dcb" }

func (w *AppendDCB) parameters() map[string]any {
	return w.with(map[string]any{"tags": w.Tags, "tag_space": w.TagSpace, "after": w.After})
}

func (w *AppendDCB) run(ctx context.Context, b *bench) (*measured, error) {
	return w.Writing.run(ctx, b, "bench_append", w.tagging(), func(worker *writer, c *eventstore.Commit) {
		var after eventstore.Position
		if w.After == "head" {
			after = worker.head.position()
		}
		// One item for each event, in as many conditions as the largest query needs.
		for events := c.Events; len(events) > 0; {
			n := min(len(events), eventstore.MaxQueryItems)
			items := make([]eventstore.Item, n)
			for i := range items {
				items[i].Tags = events[i].Tags
			}
			c.Conditions = append(c.Conditions, eventstore.NoneMatch(eventstore.Match(items...), after))
			events = events[n:]
		}
	})
}

// writer is one of those who append. It writes to its streams in turn.
type writer struct {
	streams   []eventstore.Stream
	revisions []eventstore.Revision
	events    []*atomic.Int64 // acknowledged in each stream, by whomever
	next      int
	head      *head
}

func (w *writer) stream() eventstore.Stream     { return w.streams[w.next] }
func (w *writer) revision() eventstore.Revision { return w.revisions[w.next] }

// head is the last position that this process has heard of.
type head struct{ p atomic.Uint64 }

func (h *head) position() eventstore.Position { return eventstore.Position(h.p.Load()) }

func (h *head) reached(p eventstore.Position) {
	for {
		known := h.p.Load()
		if uint64(p) <= known || h.p.CompareAndSwap(known, uint64(p)) {
			return
		}
	}
}

// run appends batches, under the conditions that condition adds to each.
func (w Writing) run(ctx context.Context, b *bench, category string, tags Tagging, condition func(*writer, *eventstore.Commit)) (*measured, error) {
	if err := b.preload(ctx, tags); err != nil {
		return nil, err
	}
	start, err := b.store.Head(ctx)
	if err != nil {
		return nil, err
	}
	var known head
	known.reached(start)
	streams := b.streams(category, defaultTo(w.Streams, w.Writers))
	acknowledged := make([]atomic.Int64, len(streams))
	data := newData(w.Payload)
	m := b.drive(ctx, w.Writers, func(ctx context.Context, number int, l *lane) {
		self := &writer{head: &known}
		for i := number % len(streams); i < len(streams); i += w.Writers {
			self.streams = append(self.streams, streams[i])
			self.events = append(self.events, &acknowledged[i])
		}
		self.revisions = make([]eventstore.Revision, len(self.streams))
		random := newRandom()
		l.each(ctx, func(ctx context.Context) error {
			c := eventstore.Commit{Events: make([]eventstore.Event, w.Batch)}
			for i := range c.Events {
				c.Events[i] = eventstore.Event{Stream: self.stream(), Type: notedType, Tags: tags.draw(random), Data: data, Metadata: metadata}
			}
			condition(self, &c)
			return self.append(ctx, b.store, c)
		})
	})
	if err := b.verify(ctx, m, streams, func(i int) int64 { return acknowledged[i].Load() }); err != nil {
		return nil, err
	}
	m.details["unit"], m.details["latency_of"] = "commits", "a commit"
	m.details["events_written"] = m.total * int64(w.Batch)
	if m.seconds > 0 {
		m.details["events_per_second"] = float64(m.operations*int64(w.Batch)) / m.seconds
	}
	return m, nil
}

// append writes the commit to the writer's present stream, and goes on to the
// next one. After a failure it learns where the stream is.
func (w *writer) append(ctx context.Context, store eventstore.Store, c eventstore.Commit) error {
	at := w.next
	receipt, err := store.Append(ctx, c)
	if err == nil {
		w.revisions[at] = receipt.Revision(w.streams[at])
		w.events[at].Add(int64(len(c.Events)))
		w.head.reached(receipt.Last)
		w.next = (at + 1) % len(w.streams)
		return nil
	}
	if conflict, ok := errors.AsType[*eventstore.ConflictError](err); ok {
		w.head.reached(conflict.Found)
		if conflict.Kind == eventstore.ConditionStreamAt {
			w.revisions[at] = conflict.Actual
		}
		return err
	}
	if errors.Is(err, eventstore.ErrOutcomeUnknown) {
		// Whether it was written decides what to expect next.
		looking, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		for e, failed := range store.Read(looking, eventstore.OneStream(w.streams[at]), eventstore.ReadOptions{Backward: true, Limit: 1}) {
			if failed == nil {
				w.revisions[at] = e.Revision()
			}
		}
	}
	return err
}
