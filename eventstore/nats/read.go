package nats

import (
	"context"
	"fmt"
	"iter"
	"slices"

	"github.com/deed-go/deed/eventstore"
)

// Read implements eventstore.Store. One stream is read along the pointers of
// its events; everything else by pages of what the server can select by
// subject: a category or a slice. Types and tags are looked at here.
func (s *Store) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	return func(yield func(eventstore.Recorded, error) bool) {
		fail := func(err error) { yield(eventstore.Recorded{}, err) }
		if err := q.Validate(); err != nil {
			fail(err)
			return
		}
		if err := o.Validate(); err != nil {
			fail(err)
			return
		}
		left := o.Limit
		give := func(events []eventstore.Recorded) bool {
			for i := range events {
				if !yield(events[i], nil) {
					return false
				}
				if left--; left == 0 {
					return false
				}
			}
			return true
		}
		var err error
		if of, ok := oneStream(q); ok {
			err = s.readStream(ctx, of, q, o, give)
		} else {
			err = s.readLog(ctx, q, o, give)
		}
		if err != nil {
			fail(err)
		}
	}
}

// oneStream reports whether all items of the query are about the same stream.
func oneStream(q eventstore.Query) (eventstore.Stream, bool) {
	if q.Everything {
		return eventstore.Stream{}, false
	}
	of := q.Items[0].Stream
	return of, !of.IsZero() && !slices.ContainsFunc(q.Items, func(i eventstore.Item) bool { return i.Stream != of })
}

// filter returns the subjects that hold all matches of the query.
func (s subjects) filter(q eventstore.Query) string {
	if q.Everything {
		return s.all()
	}
	one := func(i *eventstore.Item) string {
		switch {
		case !i.Stream.IsZero():
			return s.of(i.Stream)
		case i.Category != "":
			return s.category(i.Category)
		case !i.Slices.IsZero() && i.Slices.To == i.Slices.From+1:
			return s.slice(i.Slices.From)
		}
		return s.all()
	}
	filter := one(&q.Items[0])
	for i := range q.Items {
		if one(&q.Items[i]) != filter {
			return s.all()
		}
	}
	return filter
}

// longStream is from how many events on a stream is read by pages: it would not
// be held in memory. So is one of more than streamBytes.
const longStream = 2048

// readStream gives the stream's matching events to give, until it returns false.
func (s *Store) readStream(ctx context.Context, of eventstore.Stream, q eventstore.Query, o eventstore.ReadOptions, give func([]eventstore.Recorded) bool) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	last, err := s.last(ctx, s.subjects.of(of))
	s.leave()
	if err != nil || last == nil {
		return err
	}
	through := last.Position
	if o.Through != 0 {
		through = min(through, o.Through)
	}
	if through <= o.After {
		return nil
	}
	if last.Version > longStream {
		return s.readPages(ctx, q, o.After, through, o.Backward, give)
	}
	h := headOf(last)
	if o.Backward {
		return s.readBackward(ctx, of, h, last, q, o, through, give)
	}
	var found []*message
	err = s.within(ctx, func(ctx context.Context) (err error) {
		found, err = s.walk(ctx, of, h, last, 0, o.After, 0, s.settings.streamBytes)
		return err
	})
	if err != nil {
		return err
	}
	if first := found[len(found)-1]; first.Version > 1 && first.Position > o.After { // it is too large to be held
		return s.readPages(ctx, q, o.After, through, false, give)
	}
	var events []eventstore.Recorded
	for _, m := range found {
		if m.Position > o.After && m.Position <= through && q.Matches(&m.Recorded) {
			events = append(events, m.Recorded)
		}
	}
	slices.Reverse(events)
	give(events)
	return nil
}

// within runs fn as a call that Close waits for.
func (s *Store) within(ctx context.Context, fn func(context.Context) error) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	return fn(ctx)
}

func (s *Store) readBackward(ctx context.Context, of eventstore.Stream, h head, last *message, q eventstore.Query, o eventstore.ReadOptions, through eventstore.Position, give func([]eventstore.Recorded) bool) error {
	l, err := s.pipe.begin(s, of, true)
	if err != nil {
		return unavailable("read a stream", err)
	}
	defer s.pipe.end(l)
	w, err := newDescent(of, h, last, int(h.version), o.After, s.settings.windowBytes)
	if err != nil {
		return err
	}
	// It begins small: who reads backward often wants the last event only.
	for most := near; w.given < w.end; most = min(2*most, inFlight) {
		if err := w.more(most); err != nil {
			return err
		}
		if err := s.within(ctx, func(ctx context.Context) error { return s.descend(ctx, l, w) }); err != nil {
			return err
		}
		part := w.take()
		var events []eventstore.Recorded
		for _, m := range part {
			if m.Position > o.After && m.Position <= through && q.Matches(&m.Recorded) {
				events = append(events, m.Recorded)
			}
		}
		if !give(events) {
			return nil
		}
	}
	return nil
}

// readLog gives the log's matching events to give, until it returns false.
func (s *Store) readLog(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions, give func([]eventstore.Recorded) bool) error {
	through, err := s.Head(ctx)
	if err != nil {
		return err
	}
	if o.Through != 0 {
		through = min(through, o.Through)
	}
	if through <= o.After {
		return nil
	}
	return s.readPages(ctx, q, o.After, through, o.Backward, give)
}

func (s *Store) readPages(ctx context.Context, q eventstore.Query, after, through eventstore.Position, backward bool, give func([]eventstore.Recorded) bool) error {
	pages := s.scanner(q)
	if !backward {
		for after < through {
			events, reached, err := pages.next(ctx, after, through)
			if err != nil || !give(events) {
				return err
			}
			after = reached
		}
		return nil
	}
	// The server reads forward only: windows are read so, the last one first, and
	// grow while they hold little. Of one that holds much the end is kept.
	window := eventstore.Position(pageEvents)
	for after < through {
		from := after
		if through-after > window {
			from = through - window
		}
		var events []eventstore.Recorded
		bytes := 0
		for at := from; at < through; {
			found, reached, err := pages.next(ctx, at, through)
			if err != nil {
				return err
			}
			for i := range found {
				bytes += weigh(&found[i])
			}
			events = append(events, found...)
			drop := 0
			for ; bytes > s.settings.windowBytes && drop < len(events)-1; drop++ {
				bytes -= weigh(&events[drop])
				from = events[drop].Position
			}
			if drop > 0 {
				events = slices.Clone(events[drop:]) // lets the others go
			}
			at = reached
		}
		slices.Reverse(events)
		if !give(events) {
			return nil
		}
		switch {
		case bytes > s.settings.windowBytes/2: // what was dropped is read again
			window = max(through-from, 1)
		case len(events) < pageEvents/4:
			window = min(2*window, 64*pageEvents)
		}
		through = from
	}
	return nil
}

// weigh returns about how much memory an event takes.
func weigh(r *eventstore.Recorded) int {
	n := len(r.Data) + 512
	for _, tag := range r.Tags {
		n += len(tag) + 16
	}
	return n
}

// scanner reads what a query selects, page after page. It is used by one
// goroutine.
type scanner struct {
	s      *Store
	query  eventstore.Query
	filter string
	// dense says that much of what lies around here is the query's. For each message
	// that matches a pattern the server may look at all subjects near it, of which a
	// category has as many as it has streams: then it is cheaper to read everything.
	dense bool
	// sparse is for how many pages it is not tried again: what is between is large.
	sparse int
}

const (
	// densely is from which share of the messages on everything is read, as long as
	// it has that share of the bytes too: one of so many.
	densely = 3
	// sparsely is for how many pages, if it has not.
	sparsely = 64
)

func (s *Store) scanner(q eventstore.Query) *scanner {
	return &scanner{s: s, query: q, filter: s.subjects.filter(q)}
}

// next returns a page of the matching events in (after, through], where through
// is known to be stored, and how far it looked.
func (r *scanner) next(ctx context.Context, after, through eventstore.Position) ([]eventstore.Recorded, eventstore.Position, error) {
	if err := r.s.enter(ctx); err != nil {
		return nil, 0, err
	}
	defer r.s.leave()
	filter := r.filter
	if r.dense {
		filter = r.s.subjects.all()
	}
	events, reached, other, err := r.s.scanBy(ctx, filter, r.query, after, through)
	if err != nil || r.filter == r.s.subjects.all() {
		return events, reached, err
	}
	bytes := 0
	for i := range events {
		bytes += weigh(&events[i])
	}
	many := reached-after <= densely*eventstore.Position(len(events))
	if many && other > (densely-1)*bytes {
		r.sparse = sparsely
	}
	r.sparse = max(0, r.sparse-1)
	r.dense = many && r.sparse == 0
	return events, reached, nil
}

// scanBy is next. other is about how much memory was taken by messages that the
// query does not select.
func (s *Store) scanBy(ctx context.Context, filter string, q eventstore.Query, after, through eventstore.Position) (_ []eventstore.Recorded, _ eventstore.Position, other int, _ error) {
	whole := filter == s.subjects.all()
	most := int(min(through-after, pageEvents))
	page, more, err := s.page(ctx, filter, uint64(after)+1, most)
	if err != nil {
		return nil, 0, 0, err
	}
	unproven := false
	if !more && !whole && (len(page) == 0 || page[len(page)-1].Position < through) {
		// A replica that lags has told what it knows. The leader knows whether there is
		// more, but so does a leader of yesterday think; then the messages themselves
		// are looked at, of which none can be missed.
		from := after
		if len(page) > 0 {
			from = page[len(page)-1].Position
		}
		if s.replicas.Load() > 1 && (through-from <= pageEvents || !s.leads(ctx, uint64(through))) {
			unproven = true
		} else {
			next, err := s.next(ctx, filter, uint64(from)+1)
			if err != nil {
				return nil, 0, 0, err
			}
			if next != nil {
				page = append(page, next)
				more = true
			}
		}
	}
	reached := after
	events := make([]eventstore.Recorded, 0, len(page))
	there := make(map[uint64]struct{}, len(page))
	for _, m := range page {
		if whole && m.Position != reached+1 {
			return nil, 0, 0, errHole(uint64(reached)+1, uint64(m.Position))
		}
		if !whole {
			// What is before it in its stream is in the filter too.
			if len(m.previous) > 0 && m.previous[0] > uint64(after) {
				if _, ok := there[m.previous[0]]; !ok {
					return nil, 0, 0, fmt.Errorf("%w: the event at position %d of stream %q follows the one at %d, which was not found: messages were removed", eventstore.ErrGap, m.Position, m.Stream, m.previous[0])
				}
			}
			there[uint64(m.Position)] = struct{}{}
		}
		if m.Position > through {
			return events, through, other, nil
		}
		reached = m.Position
		if m.isEvent() && q.Matches(&m.Recorded) {
			events = append(events, m.Recorded)
		} else {
			other += weigh(&m.Recorded)
		}
	}
	if unproven {
		rest, reached, more, err := s.scanBy(ctx, s.subjects.all(), q, reached, through)
		return append(events, rest...), reached, other + more, err
	}
	if !more && !whole {
		reached = through
	}
	if whole && reached == after {
		// It is stored, but who answered does not have it yet.
		m, err := s.at(ctx, uint64(after)+1)
		if err != nil {
			return nil, 0, 0, err
		}
		reached = m.Position
		if m.isEvent() && q.Matches(&m.Recorded) {
			events = append(events, m.Recorded)
		}
	}
	if reached <= after {
		return nil, 0, 0, fmt.Errorf("%w: reading from position %d brought nothing", eventstore.ErrGap, after)
	}
	return events, reached, other, nil
}
