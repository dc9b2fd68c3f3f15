package sqlite

import (
	"context"
	"iter"

	"github.com/deed-go/deed/eventstore"
)

// Subscribe implements eventstore.Store. Whoever keeps up is served from
// memory, right after the commit; whoever falls behind reads pages from the
// file until it has caught up.
func (s *Store) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		fail := func(err error) { yield(eventstore.Batch{}, err) }
		if err := q.Validate(); err != nil {
			fail(err)
			return
		}
		for first := true; ; {
			if err := ctx.Err(); err != nil {
				fail(err)
				return
			}
			now := s.tail.Since(after)
			switch {
			case now.Closed || s.closed():
				fail(eventstore.ErrClosed)
				return
			case now.Head < after, now.Head == after && !first:
				first = false
				select {
				case <-now.Grown:
				case <-s.closing:
				case <-ctx.Done():
				}
				continue
			}
			var batch eventstore.Batch
			switch {
			case now.Head == after:
				batch.Through = after
			case now.Complete:
				batch = fromTail(q, now.Events)
			default:
				var p page
				err := s.scan(ctx, func(r *scanner) (err error) {
					p, err = r.page(q, span{after: after, through: now.Head}, pageSize)
					return err
				})
				if err != nil {
					fail(err)
					return
				}
				batch = eventstore.Batch{Events: p.events, Through: p.reached}
				if p.done {
					batch.Through = now.Head
				}
			}
			batch.CaughtUp = batch.Through == now.Head
			after, first = batch.Through, false
			if !yield(batch, nil) {
				return
			}
		}
	}
}

// fromTail picks up to a page of matches; the events follow the position.
func fromTail(q eventstore.Query, batches [][]eventstore.Recorded) eventstore.Batch {
	var out eventstore.Batch
	for _, events := range batches {
		for i := range events {
			if q.Matches(&events[i]) {
				out.Events = append(out.Events, events[i])
			}
			out.Through = events[i].Position
			if len(out.Events) == pageSize {
				return out
			}
		}
	}
	return out
}
