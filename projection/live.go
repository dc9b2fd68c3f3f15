package projection

import (
	"context"
	"errors"
	"fmt"

	"github.com/deed-go/deed/eventstore"
)

// Live folds the events of one stream, as the view's handlers would, when it is
// called, and stores nothing: for views that are read seldom, or must be as new as the
// log. It returns false where the view would have no row. The view need not be
// registered. Package query has the comfortable form.
//
// It reads the whole stream each time. Views with [OnKeyed], whose rows are made from
// many streams, are refused. A handler that fails is an error.
func Live[R any](ctx context.Context, e *Engine, v *ViewDefinition[R], stream eventstore.Stream) (row R, found bool, err error) {
	if err := v.Err(); err != nil {
		return row, false, err
	}
	for name, h := range v.handlers {
		if h.keys != nil {
			return row, false, fmt.Errorf("%w: rows of view %q are made from many streams (see its handler of %q): register the view, and read what is stored", eventstore.ErrInvalid, v.name, name)
		}
	}
	if v.category != "" && stream.Category != v.category {
		return row, false, fmt.Errorf("%w: view %q is of streams of category %q, not of %q", eventstore.ErrInvalid, v.name, v.category, stream)
	}
	aside := newSide(0)
	folder := v.open(aside, &e.options, partition{})
	folder.fresh()
	items := make([]item, 0, 64)
	flush := func() error {
		err := foldAside(ctx, folder, items)
		clear(items)
		items = items[:0]
		return err
	}
	for r, err := range e.store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{}) {
		if err != nil {
			return row, false, err
		}
		it := item{event: &r}
		folder.decode(&it)
		if items = append(items, it); len(items) == e.options.BatchEvents {
			if err := flush(); err != nil {
				return row, false, err
			}
		}
	}
	if err := flush(); err != nil {
		return row, false, err
	}
	data, found, err := aside.get(v.table(), stream.ID)
	if err != nil || !found {
		return row, false, err
	}
	return row, true, v.decodeRow(stream.ID, data, &row)
}

// foldAside folds all of the items, and says which event a handler has failed on.
func foldAside(ctx context.Context, f folder, items []item) error {
	for len(items) > 0 {
		n, err := f.apply(ctx, Lease{}, items, func(StateTx, int) error { return nil })
		if err != nil {
			failure := (*handlerError)(nil)
			if errors.As(err, &failure) {
				e := items[failure.index].event
				return fmt.Errorf("event %q at position %d of stream %q: %w", e.Type, e.Position, e.Stream, failure.cause)
			}
			return err
		}
		items = items[n:]
	}
	return nil
}
