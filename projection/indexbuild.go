package projection

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/deed-go/deed/eventstore"
)

// indexMarks is the table of what the entries of indexes are good for, for each
// partition of a view. No entry is written where there is no mark, so whoever
// comes later knows of all that there are.
const indexMarks = "projection.indexes"

type indexMark struct {
	Kind  string     `json:"kind"`
	State indexState `json:"state"`
	// After is the key of the last row whose entries are there, while it is built.
	After []byte `json:"after,omitempty"`
}

type indexState string

const (
	// indexBuilt: the entries are those of the rows.
	indexBuilt indexState = "built"
	// indexBuilding: those of the rows up to After are there, and no others.
	indexBuilding indexState = "building"
	// indexStale: whoever ran the view did not know the index, or it had other keys.
	// The entries must go; then it is built.
	indexStale indexState = "stale"
	// indexDropped: whoever runs the view does not know the index. The entries are
	// being removed.
	indexDropped indexState = "dropped"
)

// markPrefix is before the names of indexes in the keys of marks.
func (v *ViewDefinition[R]) markPrefix(p partition) string {
	return fmt.Sprintf("%s#%dof%d#", v.table(), p.index+1, max(1, p.of))
}

func decodeMark(data []byte) (m indexMark, err error) {
	if err := json.Unmarshal(data, &m); err != nil {
		return m, fmt.Errorf("a mark of an index: %w", err)
	}
	return m, nil
}

// marks returns those of the partition, by the names of indexes.
func (v *ViewDefinition[R]) marks(tx StateTx, p partition) (map[string]indexMark, error) {
	all := map[string]indexMark{}
	prefix := v.markPrefix(p)
	for row, err := range tx.Scan(indexMarks, Range{Prefix: prefix}) {
		if err != nil {
			return nil, err
		}
		m, err := decodeMark(row.Value)
		if err != nil {
			return nil, err
		}
		all[row.Key[len(prefix):]] = m
	}
	return all, nil
}

func (f *viewFolder[R]) putMark(tx StateTx, name string, m indexMark) error {
	return putJSON(tx, indexMarks, f.view.markPrefix(f.part)+name, m)
}

// arrange marks the indexes of the definition, and withdraws the marks of others:
// from now on their entries are not those of the rows. It comes, behind the fence,
// before the first row is written under a lease.
func (f *viewFolder[R]) arrange(tx StateTx) error {
	marks, err := f.view.marks(tx, f.part)
	if err != nil {
		return err
	}
	f.unready = false
	for _, x := range f.view.indexes {
		m, marked := marks[x.name]
		delete(marks, x.name)
		if marked && m.Kind == x.kind && (m.State == indexBuilt || m.State == indexBuilding) {
			f.unready = f.unready || m.State != indexBuilt
			continue
		}
		f.unready = true
		m = indexMark{Kind: x.kind, State: indexBuilding}
		if marked {
			m.State = indexStale
		}
		if err := f.putMark(tx, x.name, m); err != nil {
			return err
		}
	}
	for name, m := range marks {
		f.unready = true
		m.State, m.After = indexDropped, nil
		if err := f.putMark(tx, name, m); err != nil {
			return err
		}
	}
	return nil
}

// clearIndexes removes all entries, after which those of no rows are there.
func (f *viewFolder[R]) clearIndexes(tx StateTx) error {
	marks, err := f.view.marks(tx, f.part)
	if err != nil {
		return err
	}
	for name := range marks {
		table := f.view.indexTable(name)
		if f.part.of <= 1 {
			err = tx.Clear(table)
		} else {
			var own []string
			if own, _, _, err = f.ownEntries(tx, name, Range{}); err == nil {
				err = deleteAll(tx, table, own)
			}
		}
		if err == nil {
			err = tx.Delete(indexMarks, f.view.markPrefix(f.part)+name)
		}
		if err != nil {
			return err
		}
	}
	for _, x := range f.view.indexes {
		if err := f.putMark(tx, x.name, indexMark{Kind: x.kind, State: indexBuilt}); err != nil {
			return err
		}
	}
	return nil
}

// ownEntries returns the keys of those entries in the range that are of rows of
// the partition, how many there are in the range, and the last.
func (f *viewFolder[R]) ownEntries(tx StateTx, name string, r Range) (own []string, read int, last string, err error) {
	for e, err := range tx.Scan(f.view.indexTable(name), r) {
		if err != nil {
			return nil, 0, "", err
		}
		read, last = read+1, e.Key
		if f.part.of > 1 {
			key, err := entryRow(e)
			if err != nil {
				return nil, 0, "", fmt.Errorf("index %q: %w", name, err)
			}
			if !f.view.owns(f.part, key) {
				continue
			}
		}
		own = append(own, e.Key)
	}
	return own, read, last, nil
}

func deleteAll(tx StateTx, table string, keys []string) error {
	for _, key := range keys {
		if err := tx.Delete(table, key); err != nil {
			return err
		}
	}
	return nil
}

// entryChange is an entry that comes or goes.
type entryChange struct {
	indexEntry
	rowKey string
	gone   bool
}

// noteEntries notes what is to be written to bring the entries of a row up to date
// with it.
func (f *viewFolder[R]) noteEntries(c *cachedRow[R]) {
	was, is := c.entries, c.next
	for len(was) > 0 || len(is) > 0 {
		order := 0
		switch {
		case len(was) == 0:
			order = 1
		case len(is) == 0:
			order = -1
		default:
			order = compareEntries(was[0], is[0])
		}
		switch {
		case order < 0:
			f.entries = append(f.entries, entryChange{was[0], c.key, true})
			was = was[1:]
		case order > 0:
			f.entries = append(f.entries, entryChange{is[0], c.key, false})
			is = is[1:]
		default:
			was, is = was[1:], is[1:]
		}
	}
}

// writeEntries writes what was noted, in the order of the keys: neighbours are on
// the same pages.
func (f *viewFolder[R]) writeEntries(tx StateTx) error {
	for i := range f.entries {
		e := &f.entries[i]
		table := f.view.indexTable(f.view.indexes[e.index].name)
		var err error
		if e.gone {
			err = tx.Delete(table, e.key)
		} else {
			err = tx.Put(table, e.key, entryValue(e.rowKey))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// buildStep is how many rows or entries one update is about while indexes are
// built or removed.
const buildStep = 1000

// prepare implements folder: it builds what indexes lack, and removes the entries
// of those that are no more. What it finds of rows in views stays true until it
// writes, because whoever has the lease is the only one to change them.
func (f *viewFolder[R]) prepare(ctx context.Context, lease Lease) error {
	if !f.unready {
		return nil
	}
	var marks map[string]indexMark
	if err := f.state.View(ctx, func(tx StateTx) (err error) {
		marks, err = f.view.marks(tx, f.part)
		return err
	}); err != nil {
		return err
	}
	for name, m := range marks {
		if m.State != indexDropped {
			continue
		}
		if err := f.empty(ctx, lease, name, func(tx StateTx) error {
			return tx.Delete(indexMarks, f.view.markPrefix(f.part)+name)
		}); err != nil {
			return fmt.Errorf("remove index %q of view %q: %w", name, f.view.Name(), err)
		}
		f.logger.Info("index was removed", "projection", f.part.unitName(f.view.Name()), "index", name)
	}
	for i, x := range f.view.indexes {
		m := marks[x.name]
		if m.State == indexStale {
			m = indexMark{Kind: x.kind, State: indexBuilding}
			if err := f.empty(ctx, lease, x.name, func(tx StateTx) error { return f.putMark(tx, x.name, m) }); err != nil {
				return fmt.Errorf("empty index %q of view %q: %w", x.name, f.view.Name(), err)
			}
		}
		if m.State == indexBuilding {
			if err := f.build(ctx, lease, i, m); err != nil {
				return fmt.Errorf("build index %q of view %q: %w", x.name, f.view.Name(), err)
			}
			f.logger.Info("index was built", "projection", f.part.unitName(f.view.Name()), "index", x.name)
		}
	}
	f.unready = false
	return nil
}

// empty removes the entries of an index; done is part of the last update.
func (f *viewFolder[R]) empty(ctx context.Context, lease Lease, name string, done func(tx StateTx) error) error {
	for r := (Range{Limit: buildStep}); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		var own []string
		var read int
		var last string
		if err := f.state.View(ctx, func(tx StateTx) (err error) {
			own, read, last, err = f.ownEntries(tx, name, r)
			return err
		}); err != nil {
			return err
		}
		if err := f.state.Update(ctx, func(tx StateTx) error {
			if err := tx.Fence(lease); err != nil {
				return err
			}
			if err := deleteAll(tx, f.view.indexTable(name), own); err != nil || read == r.Limit {
				return err
			}
			return done(tx)
		}); err != nil || read < r.Limit {
			return err
		}
		r.After = last
	}
}

// build writes the entries of the rows behind the mark.
func (f *viewFolder[R]) build(ctx context.Context, lease Lease, i int, m indexMark) error {
	name := f.view.indexes[i].name
	for m.State != indexBuilt {
		if err := ctx.Err(); err != nil {
			return err
		}
		var found []indexEntry
		var of []string
		next := m
		if err := f.state.View(ctx, func(tx StateTx) error {
			found, of, next = nil, nil, m
			read := 0
			for row, err := range tx.Scan(f.view.table(), Range{After: string(m.After), Limit: buildStep}) {
				if err != nil {
					return err
				}
				read, next.After = read+1, []byte(row.Key)
				if !f.view.owns(f.part, row.Key) {
					continue
				}
				entries, err := f.view.entriesOf(row.Key, row.Value)
				if errors.Is(err, errRowShape) {
					return err
				}
				if err != nil {
					return fmt.Errorf("%w: row %q: correct the function of the index: %w", eventstore.ErrInvalid, row.Key, err)
				}
				for _, e := range entries {
					if e.index == i {
						found, of = append(found, e), append(of, row.Key)
					}
				}
			}
			if read < buildStep {
				next.State, next.After = indexBuilt, nil
			}
			return nil
		}); err != nil {
			return err
		}
		if err := f.state.Update(ctx, func(tx StateTx) error {
			if err := tx.Fence(lease); err != nil {
				return err
			}
			for k, e := range found {
				if err := tx.Put(f.view.indexTable(name), e.key, entryValue(of[k])); err != nil {
					return err
				}
			}
			return f.putMark(tx, name, next)
		}); err != nil {
			return err
		}
		m = next
	}
	return nil
}

// compareIndexes compares the entries of those rows that belong to the partition
// with those of a fold on the side, of indexes that are built.
func (v *ViewDefinition[R]) compareIndexes(tx StateTx, side *side, p partition, found *Verification) error {
	marks, err := v.marks(tx, p)
	if err != nil {
		return err
	}
	for _, x := range v.indexes {
		if m := marks[x.name]; m.State != indexBuilt || m.Kind != x.kind {
			continue
		}
		if err := side.beside(tx, v.indexTable(x.name), func(stored, should *Row) error {
			if should != nil {
				found.Entries++
			}
			if stored != nil && should != nil && string(stored.Value) == string(should.Value) {
				return nil
			}
			if should != nil {
				found.MissingEntries++
			}
			if stored != nil {
				if key, broken := entryRow(*stored); broken != nil || v.owns(p, key) {
					found.ExtraEntries++
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// dropRows removes the rows of a view and the entries of all its indexes, without
// its definition.
func dropRows(tx StateTx, table string) error {
	if err := tx.Clear(table); err != nil {
		return err
	}
	var marks []string
	for row, err := range tx.Scan(indexMarks, Range{Prefix: table + "#"}) {
		if err != nil {
			return err
		}
		marks = append(marks, row.Key)
	}
	for _, mark := range marks {
		_, name, _ := strings.Cut(mark[len(table)+1:], "#")
		if err := tx.Clear(table + "#" + name); err != nil {
			return err
		}
	}
	return deleteAll(tx, indexMarks, marks)
}
