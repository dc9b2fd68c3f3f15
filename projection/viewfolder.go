package projection

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"

	"github.com/deed-go/deed/eventstore"
)

func (v *ViewDefinition[R]) open(state State, o *Options) folder {
	return &viewFolder[R]{
		view:  v,
		state: state,
		enc:   o.Encoding,
		kinds: map[string]*viewHandler[R]{},
		rows:  newRowCache[R](o.CacheBytes),
	}
}

// viewFolder folds events into decoded rows outside of any transaction and
// then writes the rows that have changed in one short update. That is sound
// because whoever holds the current lease is the only writer of the rows: if
// the lease has moved on, the update fails as a whole and the remembered rows
// are dropped.
type viewFolder[R any] struct {
	view  *ViewDefinition[R]
	state State
	enc   *eventstore.Encoding
	rows  *rowCache[R]
	// kinds finds the handler of a stored type; used by apply alone.
	kinds map[string]*viewHandler[R]

	// What follows belongs to one apply; it is kept for its memory.
	touches []touch[R]
	missing []*cachedRow[R]
	changed []*cachedRow[R]
}

// touch is an event's turn on one row.
type touch[R any] struct {
	item    int
	handler *viewHandler[R]
	row     *cachedRow[R]
}

func (f *viewFolder[R]) handler(storedType string) (*viewHandler[R], bool) {
	h, ok := f.view.handlers[f.enc.CurrentType(storedType)]
	return h, ok
}

func (f *viewFolder[R]) decode(it *item) {
	h, ok := f.handler(it.event.Type)
	if !ok {
		return
	}
	if h.decode != nil && !h.remove {
		it.value, it.problem = guard(func() (any, error) { return h.decode(f.enc, it.event) })
	}
	if h.keys != nil && it.problem == nil {
		it.keys, it.problem = guard(func() ([]string, error) { return h.keys(it.value, it.event), nil })
		if it.problem == nil && slices.Contains(it.keys, "") {
			it.problem = errEmptyKey
		}
	}
}

func (f *viewFolder[R]) setup(context.Context, StateTx) error { return nil }

func (f *viewFolder[R]) forget() {
	f.rows.forget()
}

func (f *viewFolder[R]) fresh() { f.rows.startEmpty() }

func (f *viewFolder[R]) clear(_ context.Context, tx StateTx) error {
	return tx.Clear(f.view.table())
}

func (f *viewFolder[R]) apply(ctx context.Context, _ Lease, items []item, seal func(tx StateTx, n int) error) (int, error) {
	if err := f.load(ctx, items); err != nil {
		return 0, err
	}
	if err := f.fold(items); err != nil {
		return 0, err
	}
	if err := f.encode(); err != nil {
		return 0, err
	}
	table := f.view.table()
	if err := f.state.Update(ctx, func(tx StateTx) error {
		if err := seal(tx, len(items)); err != nil {
			return err
		}
		for _, c := range f.changed {
			var err error
			if c.encoded != nil {
				err = tx.Put(table, c.key, c.encoded)
			} else {
				err = tx.Delete(table, c.key)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return 0, err
	}
	for _, c := range f.changed {
		f.rows.resize(c, len(c.encoded))
		c.changed, c.encoded = false, nil
	}
	f.rows.age()
	return len(items), nil
}

// load finds the rows that the items touch, and reads those that the cache
// does not know.
func (f *viewFolder[R]) load(ctx context.Context, items []item) error {
	clear(f.touches)
	clear(f.missing)
	clear(f.changed)
	f.touches, f.missing, f.changed = f.touches[:0], f.missing[:0], f.changed[:0]
	for i := range items {
		it := &items[i]
		if it.parked {
			continue
		}
		h, ok := f.kindOf(it.event.Type)
		switch {
		case !ok:
		case it.problem != nil:
			f.touches = append(f.touches, touch[R]{item: i})
		case h.keys == nil:
			f.touch(i, h, it.event.Stream.ID)
		default:
			for k, key := range it.keys {
				if !slices.Contains(it.keys[:k], key) {
					f.touch(i, h, key)
				}
			}
		}
	}
	if len(f.missing) == 0 || f.rows.complete {
		return nil
	}
	table := f.view.table()
	return f.state.View(ctx, func(tx StateTx) error {
		var failed error
		keys := make([]string, len(f.missing))
		for i, c := range f.missing {
			keys[i] = c.key
		}
		err := getAll(tx, table, keys, func(i int, data []byte) {
			c := f.missing[i]
			c.row = new(R)
			if err := f.view.decodeRow(c.key, data, c.row); err != nil && failed == nil {
				failed = err
			}
			f.rows.resize(c, len(data))
		})
		return errors.Join(failed, err)
	})
}

func (f *viewFolder[R]) touch(item int, h *viewHandler[R], key string) {
	row := f.rows.get(key)
	if row == nil {
		row = f.rows.add(key)
		f.missing = append(f.missing, row)
	}
	f.touches = append(f.touches, touch[R]{item: item, handler: h, row: row})
}

// kindOf is handler for the goroutine that applies: it remembers its answers.
func (f *viewFolder[R]) kindOf(storedType string) (*viewHandler[R], bool) {
	h, known := f.kinds[storedType]
	if !known {
		h, _ = f.handler(storedType)
		f.kinds[storedType] = h
	}
	return h, h != nil
}

func (f *viewFolder[R]) fold(items []item) error {
	for i := range f.touches {
		t := &f.touches[i]
		it, c := &items[t.item], t.row
		if it.problem != nil {
			return &handlerError{index: t.item, cause: it.problem}
		}
		c.by = t.item
		if !c.changed {
			c.changed = true
			f.changed = append(f.changed, c)
		}
		if t.handler.remove {
			c.row = nil
			continue
		}
		if c.row == nil {
			c.row = new(R)
		}
		if err := f.call(t.handler, c.row, c.key, it); err != nil {
			return &handlerError{index: t.item, cause: err}
		}
	}
	return nil
}

func (f *viewFolder[R]) encode() error {
	for _, c := range f.changed {
		if c.row == nil {
			continue
		}
		var err error
		if c.encoded, err = guard(func() ([]byte, error) { return eventstore.JSON().Marshal(c.row) }); err != nil {
			return &handlerError{index: c.by, cause: fmt.Errorf("row %q of view %q does not encode: %w", c.key, f.view.name, err)}
		}
	}
	return nil
}

func (f *viewFolder[R]) call(h *viewHandler[R], row *R, key string, it *item) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = &PanicError{Value: p, Stack: debug.Stack()}
		}
	}()
	value := it.value
	if it.used && h.decode != nil {
		// Rows that keep parts of the event must not share them.
		if value, err = h.decode(f.enc, it.event); err != nil {
			return err
		}
	}
	it.used = true
	return h.fold(f.enc, row, key, value, it.event)
}

var errEmptyKey = errors.New("the keys function returned an empty key: leave it out to touch no row")

// guard turns a panic of the user's code into an error.
func guard[T any](call func() (T, error)) (result T, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = &PanicError{Value: p, Stack: debug.Stack()}
		}
	}()
	return call()
}
