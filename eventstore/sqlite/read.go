package sqlite

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/deed-go/deed/eventstore"
)

// pageSize is how many candidates one statement looks at: it bounds how long
// a read holds a connection, and with it the part of the write-ahead log that
// cannot be reused meanwhile.
const pageSize = 512

// scanner reads events on one connection.
type scanner struct {
	c     *conn
	kinds *kinds
	names *lru.Cache[int64, eventstore.Stream] // nil: do not remember names
	room  []eventstore.Recorded                // empty: pages are built in it
}

// page is the outcome of one step of a scan.
type page struct {
	events []eventstore.Recorded
	// reached is the last position considered, in the direction of the scan. When
	// done, everything up to the end of the range was.
	reached eventstore.Position
	done    bool
}

// span is a range of positions, (after, through], and the direction.
type span struct {
	after, through eventstore.Position
	backward       bool
}

// rest narrows the range to what follows a position already considered.
func (s span) rest(reached eventstore.Position) span {
	if s.backward {
		s.through = reached - 1
	} else {
		s.after = reached
	}
	return s
}

// page returns up to most matching events of the range. It considers a bounded
// number of candidates, so it may return fewer, even none, without being done.
func (r *scanner) page(q eventstore.Query, at span, most int) (page, error) {
	if at.after >= at.through {
		return page{done: true}, nil
	}
	p, err := makePlan(q, r.kinds, r.stream)
	if err != nil {
		return page{}, err
	}
	limit := most
	if !p.exact && !q.Everything {
		limit = pageSize
	}
	var out page
	var candidates int
	consider := func(s *statement) (bool, error) {
		candidates++
		event, err := r.decode(s)
		if err != nil {
			return false, err
		}
		out.reached = event.Position
		if q.Matches(&event) {
			if out.events == nil {
				out.events = r.room
			}
			out.events = append(out.events, event)
		}
		return len(out.events) < most, nil
	}
	switch {
	case p.everything || len(p.arms) == 1 && p.arms[0].table == "e":
		var a *arm
		if !p.everything {
			a = &p.arms[0]
		}
		err = r.direct(a, at, limit, consider)
	case len(p.arms) > 0:
		err = r.merged(p.arms, at, limit, consider)
	}
	if err != nil {
		return page{}, err
	}
	out.done = candidates < limit && len(out.events) < most
	if q.Everything {
		err = contiguous(out.events, at, out.done)
	}
	return out, err
}

// contiguous fails when events that were read unfiltered leave a hole.
func contiguous(events []eventstore.Recorded, at span, done bool) error {
	want := at.after + 1
	if at.backward {
		want = at.through
	}
	for i := range events {
		if events[i].Position != want {
			return fmt.Errorf("%w: position %d follows, %d expected: the file was damaged or changed by another program", eventstore.ErrGap, events[i].Position, want)
		}
		if at.backward {
			want--
		} else {
			want++
		}
	}
	if end := at.through + 1; done && (!at.backward && want != end || at.backward && want != at.after) {
		return fmt.Errorf("%w: position %d is missing: the file was damaged or changed by another program", eventstore.ErrGap, want)
	}
	return nil
}

// direct reads one index of deed_events, or all of it.
func (r *scanner) direct(a *arm, at span, limit int, consider func(*statement) (bool, error)) error {
	s, err := r.c.prepare(rows(a, at.backward))
	if err != nil {
		return err
	}
	defer s.reset()
	var args []any
	if a != nil {
		args = slices.Clone(a.args)
	}
	if err := s.bindAll(append(args, int64(at.after), int64(at.through), limit)); err != nil {
		return err
	}
	for {
		more, err := s.step()
		if err != nil || !more {
			return err
		}
		if more, err = consider(s); err != nil || !more {
			return err
		}
	}
}

// candidates merges several indexes into up to limit positions.
func (r *scanner) candidates(arms []arm, at span, limit int) ([]int64, error) {
	var found []int64
	groups := 0
	for group := range slices.Chunk(arms, mostArms) {
		groups++
		var args []any
		for _, a := range group {
			args = append(append(args, a.args...), int64(at.after), int64(at.through))
		}
		s, err := r.c.prepare(positions(group, at.backward))
		if err != nil {
			return nil, err
		}
		if err := s.bindAll(append(args, limit)); err != nil {
			s.reset()
			return nil, err
		}
		for {
			more, err := s.step()
			if err != nil {
				s.reset()
				return nil, err
			}
			if !more {
				break
			}
			found = append(found, s.int64(0))
		}
		s.reset()
	}
	if groups > 1 {
		slices.Sort(found)
		found = slices.Compact(found)
		if at.backward {
			slices.Reverse(found)
		}
		found = found[:min(limit, len(found))]
	}
	return found, nil
}

// merged reads several indexes as one.
func (r *scanner) merged(arms []arm, at span, limit int, consider func(*statement) (bool, error)) error {
	found, err := r.candidates(arms, at, limit)
	if err != nil {
		return err
	}
	s, err := r.c.prepare("SELECT " + columns + " FROM deed_events e WHERE e.position = ?")
	if err != nil {
		return err
	}
	defer s.reset()
	for _, p := range found {
		if err := s.bindInt64(0, p); err != nil {
			return err
		}
		ok, err := s.step()
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%w: an index names position %d, which is missing", eventstore.ErrGap, p)
		}
		more, err := consider(s)
		if err != nil || !more {
			return err
		}
		s.rewind()
	}
	return nil
}

// stream returns the id of a stream.
func (r *scanner) stream(name eventstore.Stream) (int64, bool, error) {
	var id int64
	found, err := r.c.row("SELECT id FROM deed_streams WHERE category = ? AND name = ?", func(s *statement) { id = s.int64(0) }, name.Category, name.ID)
	return id, found, err
}

// name returns the stream of an id.
func (r *scanner) name(id int64) (eventstore.Stream, error) {
	if r.names != nil {
		if stream, ok := r.names.Get(id); ok {
			return stream, nil
		}
	}
	var stream eventstore.Stream
	found, err := r.c.row("SELECT category, name FROM deed_streams WHERE id = ?",
		func(s *statement) { stream = eventstore.Stream{Category: s.text(0), ID: s.text(1)} }, id)
	if err == nil && !found {
		err = fmt.Errorf("stream %d of an event is missing: the file was damaged", id)
	}
	if err == nil && r.names != nil {
		r.names.Add(id, stream)
	}
	return stream, err
}

// decode reads a row of the columns.
func (r *scanner) decode(s *statement) (eventstore.Recorded, error) {
	event := eventstore.Recorded{
		Position: eventstore.Position(s.int64(0)),
		Version:  uint64(s.int64(2)),
		Time:     time.Unix(0, s.int64(5)).UTC(),
		Data:     s.blob(8),
	}
	fail := func(err error) (eventstore.Recorded, error) {
		return eventstore.Recorded{}, fmt.Errorf("read the event at position %d: %w", event.Position, err)
	}
	var err error
	if event.Stream, err = r.name(s.int64(1)); err != nil {
		return fail(err)
	}
	name, ok := r.kinds.byID[s.int64(3)]
	if !ok {
		return fail(fmt.Errorf("kind %d is missing: the file was damaged", s.int64(3)))
	}
	event.Type = name.eventType
	if id := s.view(4); len(id) == len(event.ID) {
		copy(event.ID[:], id)
	} else {
		return fail(fmt.Errorf("the id has %d bytes: the file was damaged", len(id)))
	}
	if tags := s.view(6); len(tags) > 0 {
		event.Tags = strings.Split(string(tags), "\n")
	}
	if metadata := s.view(7); len(metadata) > 0 {
		if err := jsonv1.Unmarshal(metadata, &event.Metadata); err != nil {
			return fail(fmt.Errorf("metadata: %w", err))
		}
	}
	return event, nil
}

// receipt returns the receipt of an idempotency key.
func (r *scanner) receipt(key string) (eventstore.Receipt, bool, error) {
	receipt := eventstore.Receipt{Duplicate: true}
	found, err := r.c.row("SELECT fingerprint, first, last FROM deed_keys WHERE key = ?", func(s *statement) {
		receipt.Fingerprint, receipt.First, receipt.Last = s.text(0), eventstore.Position(s.int64(1)), eventstore.Position(s.int64(2))
	}, key)
	if err != nil || !found {
		return eventstore.Receipt{}, false, err
	}
	s, err := r.c.prepare(`SELECT s.category, s.name, e.version, e.position FROM deed_events e JOIN deed_streams s ON s.id = e.stream
		WHERE e.position BETWEEN ? AND ? ORDER BY e.position`)
	if err != nil {
		return eventstore.Receipt{}, false, err
	}
	defer s.reset()
	if err := s.bindAll([]any{int64(receipt.First), int64(receipt.Last)}); err != nil {
		return eventstore.Receipt{}, false, err
	}
	for {
		more, err := s.step()
		if err != nil {
			return eventstore.Receipt{}, false, err
		}
		if !more {
			return receipt, true, nil
		}
		note(&receipt, eventstore.Stream{Category: s.text(0), ID: s.text(1)},
			eventstore.Revision{Version: uint64(s.int64(2)), Position: eventstore.Position(s.int64(3))})
	}
}

// note records in the receipt what an event made of its stream.
func note(receipt *eventstore.Receipt, stream eventstore.Stream, r eventstore.Revision) {
	for i := range receipt.Revisions {
		if receipt.Revisions[i].Stream == stream {
			receipt.Revisions[i].Revision = r
			return
		}
	}
	receipt.Revisions = append(receipt.Revisions, eventstore.StreamRevision{Stream: stream, Revision: r})
}

// scan lends a scanner to fn, within one read transaction.
func (s *Store) scan(ctx context.Context, fn func(*scanner) error) error {
	c, err := s.pages.get(ctx)
	if err != nil {
		return err
	}
	defer s.pages.put(c)
	if err := c.run("BEGIN"); err != nil {
		return err
	}
	// The kinds are published before the head moves, so they cover every event up
	// to a head that was read before.
	err = fn(&scanner{c: c, kinds: s.kinds.Load(), names: s.names})
	if ending := c.run("COMMIT"); err == nil {
		err = ending
	}
	return err
}

// Lookup implements eventstore.Store; keys are scoped to the whole log.
func (s *Store) Lookup(ctx context.Context, _ eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	var receipt eventstore.Receipt
	var found bool
	err := s.scan(ctx, func(r *scanner) (err error) {
		receipt, found, err = r.receipt(key)
		return err
	})
	return receipt, found, err
}

// Read implements eventstore.Store.
func (s *Store) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	return func(yield func(eventstore.Recorded, error) bool) {
		fail := func(err error) { yield(eventstore.Recorded{}, err) }
		if err := errors.Join(q.Validate(), o.Validate()); err != nil {
			fail(err)
			return
		}
		head, err := s.Head(ctx)
		if err != nil {
			fail(err)
			return
		}
		at := span{after: o.After, through: head, backward: o.Backward}
		if o.Through != 0 {
			at.through = min(head, o.Through)
		}
		left := o.Limit
		var p page
		for at.after < at.through {
			if err := ctx.Err(); err != nil {
				fail(err)
				return
			}
			most := pageSize
			if o.Limit > 0 {
				most = min(most, left)
			}
			err := s.scan(ctx, func(r *scanner) (err error) {
				r.room = p.events[:0]
				p, err = r.page(q, at, most)
				return err
			})
			if err != nil {
				fail(err)
				return
			}
			for _, event := range p.events {
				if !yield(event, nil) {
					return
				}
			}
			if left -= len(p.events); p.done || o.Limit > 0 && left == 0 {
				return
			}
			at = at.rest(p.reached)
		}
	}
}
