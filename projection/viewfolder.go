package projection

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"

	jsonv1 "github.com/go-json-experiment/json/v1"

	"github.com/deed-go/deed/eventstore"
)

func (v *ViewDefinition[R]) open(state State, o *Options) folder {
	return &viewFolder[R]{
		view:  v,
		state: state,
		enc:   o.Encoding,
		kinds: map[string]*viewHandler[R]{},
		rows:  newRowCache[cachedRow[R]](o.CachedRows),
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
	rows  *rowCache[cachedRow[R]]
	// kinds finds the handler of a stored type; used by apply alone.
	kinds   map[string]*viewHandler[R]
	changed []*cachedRow[R]
	keys    []string
	missing []string
}

// cachedRow is what the state holds under a key, plus what apply is about to write.
type cachedRow[R any] struct {
	key     string
	row     *R // nil: no such row
	changed bool
	by      int    // index of the item that changed it last
	encoded []byte // what to write; nil deletes
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
	f.changed = f.changed[:0]
}

func (f *viewFolder[R]) fresh() { f.rows.startEmpty() }

func (f *viewFolder[R]) clear(_ context.Context, tx StateTx) error {
	return tx.Clear(f.view.table())
}

func (f *viewFolder[R]) apply(ctx context.Context, items []item, seal func(tx StateTx, n int) error) (int, error) {
	if err := f.load(ctx, items); err != nil {
		return 0, err
	}
	for i := range items {
		if items[i].parked {
			continue
		}
		if err := f.fold(i, &items[i]); err != nil {
			return 0, &handlerError{index: i, cause: err}
		}
	}
	for _, c := range f.changed {
		c.encoded = nil
		if c.row == nil {
			continue
		}
		data, err := guard(func() ([]byte, error) { return jsonv1.Marshal(c.row) })
		if err != nil {
			return 0, &handlerError{index: c.by, cause: fmt.Errorf("row %q of view %q does not encode: %w", c.key, f.view.name, err)}
		}
		c.encoded = data
	}
	table := f.view.table()
	err := f.state.Update(ctx, func(tx StateTx) error {
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
	})
	if err != nil {
		return 0, err
	}
	for _, c := range f.changed {
		c.changed, c.encoded = false, nil
	}
	clear(f.changed)
	f.changed = f.changed[:0]
	f.rows.age()
	return len(items), nil
}

// load reads the rows that the items touch and the cache does not know.
func (f *viewFolder[R]) load(ctx context.Context, items []item) error {
	f.missing = f.missing[:0]
	for i := range items {
		if items[i].parked {
			continue
		}
		h, ok := f.kindOf(items[i].event.Type)
		if !ok {
			continue
		}
		if h.keys == nil {
			f.want(items[i].event.Stream.ID)
		}
		for _, key := range items[i].keys {
			f.want(key)
		}
	}
	if len(f.missing) == 0 {
		return nil
	}
	if f.rows.complete {
		for _, key := range f.missing {
			f.rows.put(key, &cachedRow[R]{key: key})
		}
		return nil
	}
	table := f.view.table()
	return f.state.View(ctx, func(tx StateTx) error {
		for _, key := range f.missing {
			if f.rows.get(key) != nil {
				continue
			}
			data, ok, err := tx.Get(table, key)
			if err != nil {
				return err
			}
			c := &cachedRow[R]{key: key}
			if ok {
				c.row = new(R)
				if err := f.view.decodeRow(key, data, c.row); err != nil {
					return err
				}
			}
			f.rows.put(key, c)
		}
		return nil
	})
}

func (f *viewFolder[R]) want(key string) {
	if f.rows.get(key) == nil {
		f.missing = append(f.missing, key)
	}
}

// kindOf is handler for the goroutine that applies: it remembers its answers.
func (f *viewFolder[R]) kindOf(storedType string) (*viewHandler[R], bool) {
	h, known := f.kinds[storedType]
	if !known {
		found, ok := f.handler(storedType)
		if ok {
			h = found
		}
		f.kinds[storedType] = h
	}
	return h, h != nil
}

func (f *viewFolder[R]) fold(i int, it *item) error {
	if it.problem != nil {
		return it.problem
	}
	h, ok := f.kindOf(it.event.Type)
	if !ok {
		return nil
	}
	if h.keys == nil {
		f.keys = append(f.keys[:0], it.event.Stream.ID)
	} else {
		f.keys = append(f.keys[:0], it.keys...)
	}
	for k, key := range f.keys {
		if len(f.keys) > 1 && slices.Contains(f.keys[:k], key) {
			continue
		}
		c := f.rows.get(key)
		c.by = i
		if !c.changed {
			c.changed = true
			f.changed = append(f.changed, c)
		}
		if h.remove {
			c.row = nil
			continue
		}
		if c.row == nil {
			c.row = new(R)
		}
		if err := f.call(h, c.row, key, it); err != nil {
			return err
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
	return h.fold(f.enc, row, key, it.value, it.event)
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
