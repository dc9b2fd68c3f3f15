package projection

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"time"

	"github.com/deed-go/deed/eventstore"
)

func (v *ViewDefinition[R]) open(state State, o *Options, p partition) folder {
	return &viewFolder[R]{
		view:   v,
		part:   p,
		state:  state,
		within: o.BatchTime,
		enc:    o.Encoding,
		kinds:  map[string]*viewHandler[R]{},
		rows:   newRowCache[R](o.CacheBytes),
		logger: o.Logger,
	}
}

// viewFolder folds events into decoded rows outside of any transaction and
// then writes the rows that have changed in one short update. That is sound
// because whoever holds the current lease is the only writer of the rows: if
// the lease has moved on, the update fails as a whole and the remembered rows
// are dropped.
type viewFolder[R any] struct {
	view   *ViewDefinition[R]
	part   partition
	state  State
	within time.Duration // of one batch's handlers; 0: however long they take
	enc    *eventstore.Encoding
	rows   *rowCache[R]
	// kinds finds the handler of a stored type; used by apply alone.
	kinds  map[string]*viewHandler[R]
	logger *slog.Logger
	// arranged: the marks of the indexes are those of the definition. unready: some
	// are not built.
	arranged, unready bool

	// What follows belongs to one apply; it is kept for its memory.
	touches []touch[R]
	missing []*cachedRow[R]
	changed []*cachedRow[R]
	entries []entryChange
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
	if h.keys == nil && !f.view.owns(f.part, it.event.Stream.ID) {
		it.foreign = true
		return
	}
	if h.decode != nil && !h.remove {
		it.decodeWith(h.shared, func() (any, error) { return h.decode(f.enc, it.event) })
	}
	if h.keys != nil && it.problem == nil && !it.elsewhere {
		it.keys, it.problem = guard(func() ([]string, error) { return h.keys(it.value, it.event), nil })
		if it.problem == nil && slices.Contains(it.keys, "") {
			// What it would touch is not known: it holds back its stream.
			it.keys, it.problem = nil, errEmptyKey
		}
		if it.problem == nil && f.part.of > 1 {
			// The function's own slice, which it may keep, stays as it is.
			it.keys = slices.DeleteFunc(slices.Clone(it.keys), func(key string) bool { return !f.view.owns(f.part, key) })
			it.foreign = len(it.keys) == 0
		}
	}
}

func (f *viewFolder[R]) setup(_ context.Context, tx StateTx) error {
	f.arranged = true
	return f.arrange(tx)
}

func (f *viewFolder[R]) forget() {
	f.rows.forget()
	f.arranged = false // whether what was done for that was committed is not known either
}

func (f *viewFolder[R]) fresh() {
	f.rows.startEmpty()
	f.arranged = true // without rows there is nothing to be wrong
}

func (f *viewFolder[R]) clear(_ context.Context, tx StateTx) error {
	if err := f.clearIndexes(tx); err != nil {
		return err
	}
	if f.part.of <= 1 {
		return tx.Clear(f.view.table())
	}
	var own []string
	for row, err := range tx.Scan(f.view.table(), Range{}) {
		if err != nil {
			return err
		}
		if f.view.owns(f.part, row.Key) {
			own = append(own, row.Key)
		}
	}
	for _, key := range own {
		if err := tx.Delete(f.view.table(), key); err != nil {
			return err
		}
	}
	return nil
}

func (f *viewFolder[R]) apply(ctx context.Context, _ Lease, items []item, seal func(tx StateTx, n int) error) (int, error) {
	if err := f.load(ctx, items); err != nil {
		return 0, err
	}
	n, err := f.fold(items)
	if err != nil {
		return 0, err
	}
	if err := f.encode(); err != nil {
		return 0, err
	}
	if err := f.state.Update(ctx, func(tx StateTx) error {
		if err := seal(tx, n); err != nil {
			return err
		}
		if !f.arranged {
			if err := f.arrange(tx); err != nil {
				return err
			}
		}
		return f.write(tx)
	}); err != nil {
		return 0, err
	}
	f.arranged = true
	f.written()
	return n, nil
}

// write writes what has changed.
func (f *viewFolder[R]) write(tx StateTx) error {
	table := f.view.table()
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
	return f.writeEntries(tx)
}

// written takes what write has written for what is stored.
func (f *viewFolder[R]) written() {
	for _, c := range f.changed {
		c.entries, c.next = c.next, nil
		f.rows.resize(c, len(c.encoded))
		c.changed, c.encoded = false, nil
	}
	f.rows.age()
}

// applyIn implements folder.
func (f *viewFolder[R]) applyIn(_ context.Context, tx StateTx, items []item) error {
	f.within = 0
	f.find(items)
	if err := f.fetch(tx); err != nil {
		return err
	}
	if _, err := f.fold(items); err != nil {
		return err
	}
	if err := f.encode(); err != nil {
		return err
	}
	if err := f.write(tx); err != nil {
		return err
	}
	f.written()
	return nil
}

// reads implements folder.
func (f *viewFolder[R]) reads(items []item) (table string, keys []string) {
	f.find(items)
	for _, c := range f.missing {
		keys = append(keys, c.key)
	}
	f.forget()
	return f.view.table(), keys
}

// load finds the rows that the items touch, and reads those that the cache
// does not know.
func (f *viewFolder[R]) load(ctx context.Context, items []item) error {
	f.find(items)
	if len(f.missing) == 0 || f.rows.complete {
		return nil
	}
	return f.state.View(ctx, f.fetch)
}

// find finds the rows that the items touch, and which of them are missing.
func (f *viewFolder[R]) find(items []item) {
	clear(f.touches)
	clear(f.missing)
	clear(f.changed)
	clear(f.entries)
	f.touches, f.missing, f.changed, f.entries = f.touches[:0], f.missing[:0], f.changed[:0], f.entries[:0]
	for i := range items {
		it := &items[i]
		if it.parked || it.foreign {
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
}

// fetch reads what is missing.
func (f *viewFolder[R]) fetch(tx StateTx) error {
	if len(f.missing) == 0 || f.rows.complete {
		return nil
	}
	var failed error
	keys := make([]string, len(f.missing))
	for i, c := range f.missing {
		keys[i] = c.key
	}
	err := getAll(tx, f.view.table(), keys, func(i int, data []byte) {
		c := f.missing[i]
		c.row = new(R)
		if err := f.view.decodeRow(c.key, data, c.row); err != nil && failed == nil {
			failed = err
		}
		c.entries, c.noEntries = f.view.entriesOf(c.key, data)
		f.rows.resize(c, len(data))
	})
	return errors.Join(failed, err)
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

// clockEvery is after how many turns it is looked whether the time is up.
const clockEvery = 8

// fold gives the events to their handlers, and returns the number of items that are
// done when their time is up.
func (f *viewFolder[R]) fold(items []item) (int, error) {
	began := time.Now()
	for i := range f.touches {
		t := &f.touches[i]
		if i%clockEvery == 0 && i > 0 && f.within > 0 && time.Since(began) > f.within {
			if n := t.item; n > 0 && f.touches[i-1].item < n {
				return n, nil
			}
		}
		it, c := &items[t.item], t.row
		if it.problem != nil {
			return 0, &handlerError{index: t.item, cause: it.problem}
		}
		c.by = t.item
		if !c.changed {
			c.changed = true
			f.changed = append(f.changed, c)
			if c.noEntries != nil {
				return 0, &handlerError{index: t.item, cause: c.noEntries}
			}
		}
		if t.handler.remove {
			c.row = nil
			continue
		}
		if c.row == nil {
			c.row = new(R)
		}
		if err := f.call(t.handler, c.row, c.key, it); err != nil {
			return 0, &handlerError{index: t.item, cause: err}
		}
	}
	return len(items), nil
}

func (f *viewFolder[R]) encode() error {
	for _, c := range f.changed {
		if c.row == nil {
			f.noteEntries(c)
			continue
		}
		var err error
		if c.encoded, err = guard(func() ([]byte, error) { return eventstore.JSON().Marshal(c.row) }); err != nil {
			return &handlerError{index: c.by, cause: fmt.Errorf("row %q of view %q does not encode: %w", c.key, f.view.Name(), err)}
		}
		if c.next, err = f.view.entriesOf(c.key, c.encoded); err != nil {
			return &handlerError{index: c.by, cause: err}
		}
		f.noteEntries(c)
	}
	if len(f.entries) > 1 {
		slices.SortFunc(f.entries, func(a, b entryChange) int { return compareEntries(a.indexEntry, b.indexEntry) })
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
	it.used = h.shared == nil
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
