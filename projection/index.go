package projection

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/deed-go/deed/eventstore"
)

// ErrIndexNotBuilt: the entries of the index are not there, or not all. Whoever
// runs the view builds them when it starts, before it goes on with events; that
// may be another process, and one with an older build of the program knows
// nothing of the index.
var ErrIndexNotBuilt = errors.New("index is not built yet")

// IndexDefinition is an order of the rows of a view by keys of type K. Make it
// with [Index] or [IndexMany], give it to [ViewDefinition.Indexed], and read by it
// with query.By, all of it or a part, as [IndexRange] has it. It is immutable and
// safe for concurrent use, and several views of the same rows may have it.
type IndexDefinition[R any, K IndexKey] struct {
	IndexRange[K]
	rows *rowIndex[R]
	keys func(row R) []K
}

// Index orders the rows of a view by what key returns for each.
//
// The function must be a plain one of the row, which it gets as it is stored. The
// name, of the characters that names of views have, stands for what it does:
// entries are stored under it. When the function changes, give it another name; the
// entries of the old one are then removed and those of the new one built.
//
// A function that panics on a row, and a key that takes more than 1,024 bytes,
// are errors of the handler that has made the row; on rows that are there when
// the index is built they stop the view.
func Index[R any, K IndexKey](name string, key func(row R) K) *IndexDefinition[R, K] {
	if key == nil {
		return IndexMany[R, K](name, nil)
	}
	return IndexMany(name, func(row R) []K { return []K{key(row)} })
}

// IndexMany is [Index] for rows that have several keys, or none: such a row is
// listed under each of them, and one without keys not at all.
func IndexMany[R any, K IndexKey](name string, keys func(row R) []K) *IndexDefinition[R, K] {
	rows := newRowIndex[R](name, orderedKind[K]())
	d := &IndexDefinition[R, K]{rows: rows, keys: keys}
	d.index = rows.index
	if keys == nil {
		rows.mistakes = append(rows.mistakes, fmt.Errorf("%w: the function of index %q is nil", eventstore.ErrInvalid, name))
		return d
	}
	rows.keys = func(row R) (all [][]byte) {
		for _, key := range keys(row) {
			all = append(all, appendOrdered(nil, key))
		}
		return all
	}
	return d
}

func (d *IndexDefinition[R, K]) ofRows() *rowIndex[R] { return d.rows }

// CompositeIndexDefinition is an order of rows by two keys. Make it with
// [CompositeIndex].
type CompositeIndexDefinition[R any, G, K IndexKey] struct {
	rows *rowIndex[R]
}

// CompositeIndex orders rows by the keys of one index, and those that are equal
// there by the keys of another: the accounts of each owner by balance. The two
// need not be indexes of the view themselves. A row that has several keys in one of
// them is listed under each pair, and one without keys not at all.
func CompositeIndex[R any, G, K IndexKey](name string, group *IndexDefinition[R, G], order *IndexDefinition[R, K]) *CompositeIndexDefinition[R, G, K] {
	rows := newRowIndex[R](name, orderedKind[G]()+" "+orderedKind[K]())
	if group == nil || order == nil || group.keys == nil || order.keys == nil {
		rows.mistakes = append(rows.mistakes, fmt.Errorf("%w: an index that %q is made of is nil, or its function is", eventstore.ErrInvalid, name))
		return &CompositeIndexDefinition[R, G, K]{rows}
	}
	rows.keys = func(row R) (all [][]byte) {
		orders := order.keys(row)
		for _, g := range group.keys(row) {
			for _, k := range orders {
				all = append(all, appendOrdered(appendOrdered(nil, g), k))
			}
		}
		return all
	}
	return &CompositeIndexDefinition[R, G, K]{rows}
}

// In is the rows with that key in the first index, in the order of the second.
func (d *CompositeIndexDefinition[R, G, K]) In(group G) IndexRange[K] {
	prefix := string(appendOrdered(nil, group))
	r := IndexRange[K]{index: d.rows.index, prefix: prefix, low: prefix}
	r.high, _ = afterPrefix(prefix)
	return r
}

func (d *CompositeIndexDefinition[R, G, K]) ofRows() *rowIndex[R] { return d.rows }
func (d *CompositeIndexDefinition[R, G, K]) span() span           { return span{index: d.rows.index} }

// ViewIndex is an index of rows of type R, whatever its keys: an
// [IndexDefinition] or a [CompositeIndexDefinition].
type ViewIndex[R any] interface{ ofRows() *rowIndex[R] }

// Selection is an index or a part of one, for query.By.
type Selection interface{ span() span }

// IndexRange is a part of an index: what follows narrows it, so
// byTime.AtLeast(monday).Below(tuesday) is a day. It is a value.
type IndexRange[K IndexKey] struct {
	index  *index
	prefix string // of all keys of it
	low    string // no entry is equal to a bound: a row's key follows
	high   string // empty: none
	none   bool
}

// Is keeps the rows with that key.
func (r IndexRange[K]) Is(key K) IndexRange[K] { return r.Between(key, key) }

// Between keeps the rows with keys from low to high, both included.
func (r IndexRange[K]) Between(low, high K) IndexRange[K] { return r.AtLeast(low).AtMost(high) }

// AtLeast keeps the rows with that key or a greater one.
func (r IndexRange[K]) AtLeast(key K) IndexRange[K] {
	r.low = max(r.low, r.bound(key))
	return r
}

// Above keeps the rows with a greater key.
func (r IndexRange[K]) Above(key K) IndexRange[K] {
	after, some := afterPrefix(r.bound(key))
	r.low, r.none = max(r.low, after), r.none || !some
	return r
}

// AtMost keeps the rows with that key or a smaller one.
func (r IndexRange[K]) AtMost(key K) IndexRange[K] {
	if after, some := afterPrefix(r.bound(key)); some && (r.high == "" || after < r.high) {
		r.high = after
	}
	return r
}

// Below keeps the rows with a smaller key.
func (r IndexRange[K]) Below(key K) IndexRange[K] {
	if bound := r.bound(key); r.high == "" || bound < r.high {
		r.high = bound
	}
	return r
}

func (r IndexRange[K]) bound(key K) string { return string(appendOrdered([]byte(r.prefix), key)) }

func (r IndexRange[K]) span() span {
	return span{index: r.index, low: r.low, high: r.high, none: r.none || r.high != "" && r.low >= r.high}
}

// span is a part of an index: the entries between two bounds.
type span struct {
	index     *index
	low, high string
	none      bool
}

// index is what is known of an index without its types.
type index struct {
	name string
	kind string // of its keys
}

// rowIndex finds the keys of rows.
type rowIndex[R any] struct {
	*index
	keys     func(row R) [][]byte
	mistakes []error
}

func newRowIndex[R any](name, kind string) *rowIndex[R] {
	i := &rowIndex[R]{index: &index{name: name, kind: kind}}
	if validateName(name) != nil {
		i.mistakes = append(i.mistakes, fmt.Errorf("%w: index name %q: use 1 to %d ASCII letters, digits, '.', '_' and '-', beginning with a letter", eventstore.ErrInvalid, name, maxNameBytes))
	}
	return i
}

// maxIndexKeyBytes bounds the stored form of a key. Behind it is the row's, and
// PostgreSQL takes 2,704 bytes for both.
const maxIndexKeyBytes = 1024

// Indexed returns the view with indexes, by which query.By reads a part of its
// rows, in order, without looking at the others. Entries are written in the same
// update as the rows that they are of: an event that changes a row's key in an index
// costs two more writes, and any that changes the row decodes it once more.
//
// An index may be added to a view that has rows: whoever runs the view builds the
// entries when it starts, in steps, before it goes on with events. Until then
// reading by it fails with [ErrIndexNotBuilt], also while an older build of the
// program, which does not know the index, runs the view. The entries of an index
// that the definition has no more are removed.
func (v *ViewDefinition[R]) Indexed(indexes ...ViewIndex[R]) *ViewDefinition[R] {
	w := *v
	w.indexes, w.mistakes = slices.Clip(w.indexes), slices.Clip(w.mistakes)
	for _, i := range indexes {
		if i == nil || i.ofRows() == nil {
			w.mistake("%w: an index is nil: make it with projection.Index", eventstore.ErrInvalid)
			continue
		}
		x := i.ofRows()
		if slices.ContainsFunc(w.indexes, func(other *rowIndex[R]) bool { return other.name == x.name }) {
			w.mistake("%w: two indexes are named %q", eventstore.ErrInvalid, x.name)
		}
		w.indexes, w.mistakes = append(w.indexes, x), append(w.mistakes, x.mistakes...)
	}
	return &w
}

// indexTable is where the entries of an index are. No view's table has a '#'.
func (v *ViewDefinition[R]) indexTable(name string) string { return v.table() + "#" + name }

// entry of an index: its key, in the table of the index, is the ordered form of
// the row's key in the index, followed by the row's key.
type indexEntry struct {
	index int
	key   string
}

// entriesOf returns the entries of a row as it is stored, sorted, each once. A row
// of its own is decoded for that: the one that is folded may hold what does not
// survive being stored, say text cut within a character, and the functions of
// indexes may do to theirs what they like.
func (v *ViewDefinition[R]) entriesOf(key string, stored []byte) ([]indexEntry, error) {
	if len(v.indexes) == 0 {
		return nil, nil
	}
	row := new(R)
	if err := v.decodeRow(key, stored, row); err != nil {
		return nil, err
	}
	return guard(func() ([]indexEntry, error) {
		all := make([]indexEntry, 0, len(v.indexes))
		for i, x := range v.indexes {
			first := len(all)
			for _, k := range x.keys(*row) {
				if len(k) > maxIndexKeyBytes {
					return nil, Permanent(fmt.Errorf("%w: the key of row %q in index %q of view %q takes %d bytes, at most %d are allowed: shorten it in the function of the index",
						eventstore.ErrTooLarge, key, x.name, v.Name(), len(k), maxIndexKeyBytes))
				}
				all = append(all, indexEntry{i, string(append(k, key...))})
			}
			if own := all[first:]; len(own) > 1 {
				slices.SortFunc(own, compareEntries)
				all = all[:first+len(slices.Compact(own))]
			}
		}
		return all, nil
	})
}

func compareEntries(a, b indexEntry) int {
	switch {
	case a == b:
		return 0
	case a.index < b.index || a.index == b.index && a.key < b.key:
		return -1
	}
	return 1
}

// entryValue tells where in an entry's key the row's begins.
func entryValue(rowKey string) []byte { return binary.AppendUvarint(nil, uint64(len(rowKey))) }

// entryRow returns the key of the row that an entry is of.
func entryRow(e Row) (string, error) {
	size, n := binary.Uvarint(e.Value)
	if n <= 0 || n != len(e.Value) || size == 0 || size >= uint64(len(e.Key)) {
		return "", fmt.Errorf("%w: it has an entry %q that is none: rebuild the view", errIndexBroken, e.Key)
	}
	return e.Key[len(e.Key)-int(size):], nil
}

// errIndexBroken: entries are not those of the rows.
var errIndexBroken = errors.New("index is broken")

// IndexedRow is a row that was found by an index, with the place of its entry
// there.
type IndexedRow[R any] struct {
	Entry[R]
	// Place, as Range.After, goes on behind the entry, in the same index.
	Place string
}

// RowsBy yields rows in the order of an index, those of equal keys in the order of
// their own, within a transaction on the state. A row that has several keys in the
// selection comes with each of them. Of the range, Prefix is that of the rows'
// own keys, After a Place, and Through must be empty.
//
// The error is [ErrIndexNotBuilt] if the entries are not there yet.
func (v *ViewDefinition[R]) RowsBy(tx StateTx, s Selection, r Range) iter.Seq2[IndexedRow[R], error] {
	return func(yield func(IndexedRow[R], error) bool) {
		at, err := v.reading(tx)
		if err == nil {
			err = at.rowsBy(tx, s.span(), r, yield)
		}
		if err != nil {
			yield(IndexedRow[R]{}, err)
		}
	}
}

// Entries are read in pages, and then their rows, in one round trip each. The
// first page is small, for lists that are broken off.
const (
	firstEntries = 64
	pageEntries  = 1024
)

func (v *ViewDefinition[R]) rowsBy(tx StateTx, s span, r Range, yield func(IndexedRow[R], error) bool) error {
	if err := v.readable(tx, s.index); err != nil || s.none {
		return err
	}
	if r.Through != "" {
		return fmt.Errorf("%w: a range of an index has no Through: select a part of the index", eventstore.ErrInvalid)
	}
	scan := Range{After: s.low, Through: s.high, Backward: r.Backward, Limit: firstEntries}
	if r.Backward {
		scan.After, scan.Through = s.high, s.low
	}
	if r.After != "" {
		name, place, _ := strings.Cut(r.After, "#")
		switch {
		case name != s.index.name:
			return fmt.Errorf("%w: the place to go on from is one in index %q, and this is index %q", eventstore.ErrInvalid, name, s.index.name)
		case place <= s.low || s.high != "" && place >= s.high:
			return fmt.Errorf("%w: the place to go on from is not in the selected part of index %q", eventstore.ErrInvalid, name)
		}
		scan.After = place
	}
	for left := r.Limit; ; scan.Limit = pageEntries {
		if r.Limit > 0 && r.Prefix == "" {
			scan.Limit = min(scan.Limit, left)
		}
		var page []IndexedRow[R]
		var keys []string
		read := 0
		for e, err := range tx.Scan(v.indexTable(s.index.name), scan) {
			if err != nil {
				return err
			}
			read, scan.After = read+1, e.Key
			key, err := entryRow(e)
			if err != nil {
				return fmt.Errorf("index %q: %w", s.index.name, err)
			}
			if len(key) >= len(r.Prefix) && key[:len(r.Prefix)] == r.Prefix {
				page, keys = append(page, IndexedRow[R]{Entry: Entry[R]{Key: key}, Place: s.index.name + "#" + e.Key}), append(keys, key)
			}
		}
		values := make([][]byte, len(page))
		if err := getAll(tx, v.table(), keys, func(i int, value []byte) { values[i] = value }); err != nil {
			return err
		}
		for i := range page {
			if values[i] == nil {
				return fmt.Errorf("index %q: %w: it has an entry of row %q, which is not there: rebuild the view", s.index.name, errIndexBroken, page[i].Key)
			}
			if err := v.decodeRow(page[i].Key, values[i], &page[i].Row); err != nil {
				return err
			}
			if !yield(page[i], nil) {
				return nil
			}
			if left--; left == 0 {
				return nil
			}
		}
		if read < scan.Limit {
			return nil
		}
	}
}

// readable refuses indexes that are not the view's, or not built.
func (v *ViewDefinition[R]) readable(tx StateTx, x *index) error {
	if x == nil || !slices.ContainsFunc(v.indexes, func(own *rowIndex[R]) bool { return own.index == x }) {
		name := ""
		if x != nil {
			name = x.name
		}
		return fmt.Errorf("%w: index %q is not one of the view: give it to its definition with Indexed", eventstore.ErrInvalid, name)
	}
	var keys []string
	for _, p := range partitions(v.parts) {
		keys = append(keys, v.markPrefix(p)+x.name)
	}
	built := 0
	var wrong error
	err := getAll(tx, indexMarks, keys, func(_ int, value []byte) {
		m, err := decodeMark(value)
		if err != nil {
			wrong = err
		}
		if m.State == indexBuilt && m.Kind == x.kind {
			built++
		}
	})
	switch {
	case err != nil || wrong != nil:
		return errors.Join(err, wrong)
	case built < len(keys):
		return fmt.Errorf("%w: %q: whoever runs the view builds it when it starts, unless that is an older build of the program: try again later, or read without it", ErrIndexNotBuilt, x.name)
	}
	return nil
}
