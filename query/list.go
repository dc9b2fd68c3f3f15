package query

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"reflect"
	"slices"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// ListOption narrows or orders what [List] and [All] return.
type ListOption interface{ list(*listing) }

type listing struct {
	conditions
	prefix   string
	limit    int
	cursor   string
	backward bool
	where    any
	order    any
	by       projection.Selection
	mistake  error
}

type listOption func(*listing)

func (o listOption) list(l *listing) { o(l) }

// Prefix keeps the rows whose key begins with it; only those are read.
func Prefix(prefix string) ListOption { return listOption(func(l *listing) { l.prefix = prefix }) }

// Limit is the largest number of rows to return; there is no limit without it.
func Limit(rows int) ListOption {
	return listOption(func(l *listing) {
		l.limit = rows
		if rows <= 0 {
			l.mistake = fmt.Errorf("%w: limit %d: ask for at least one row, or leave the limit out", eventstore.ErrInvalid, rows)
		}
	})
}

// By reads the rows of an index of the view, or of a part of it, and no others,
// in the order of the index, those of equal keys in the order of their own:
//
//	query.List(ctx, app, accounts, query.By(byBalance.AtLeast(100)), query.Backward(), query.Limit(20))
//
// A row that has several keys in that part comes once for each, unless [OrderBy]
// sorts the rows. [Prefix] and [Where] pass by what they do not keep of it. An index
// that is not one of the view is refused; as long as its entries are not there, the
// error wraps [projection.ErrIndexNotBuilt].
func By(selection projection.Selection) ListOption {
	return listOption(func(l *listing) {
		if selection == nil {
			l.mistake = fmt.Errorf("%w: query.By was given nil", eventstore.ErrInvalid)
			return
		}
		if l.by != nil {
			l.mistake = fmt.Errorf("%w: query.By was given twice: rows are read by one index; filter them further with query.Where, or index them by both, with projection.CompositeIndex", eventstore.ErrInvalid)
		}
		l.by = selection
	})
}

// After continues where an earlier page ended, given its Next. The other
// options must be those of that page: the order of another index, or the other
// direction, is refused.
func After(next string) ListOption { return listOption(func(l *listing) { l.cursor = next }) }

// Backward returns the last rows first.
func Backward() ListOption { return listOption(func(l *listing) { l.backward = true }) }

// Where keeps the rows for which keep returns true. It reads every row (of the
// prefix, or of the part of an index) until the limit is reached; see [By] for what
// avoids it. Given several times, all must hold. R is the view's
// row type; another one is an error.
func Where[R any](keep func(key string, row R) bool) ListOption {
	return listOption(func(l *listing) {
		before, ok := l.where.(func(string, R) bool)
		switch {
		case l.where != nil && !ok:
			l.mistake = mismatch[R]("query.Where", l.where)
		case ok:
			l.where = func(key string, row R) bool { return before(key, row) && keep(key, row) }
		default:
			l.where = keep
		}
	})
}

// OrderBy sorts the rows; those that compare equal are in the order of their
// keys. It reads and keeps every row (of the prefix or the part of an index, and
// for which Where holds), whatever the limit; see [By] for what avoids it. Without
// either, rows are in the byte order of their keys.
func OrderBy[R any](compare func(a, b R) int) ListOption {
	return listOption(func(l *listing) { l.order = compare })
}

func mismatch[R any](what string, function any) error {
	return fmt.Errorf("%w: %s was given a %s, but the view's rows are of type %s", eventstore.ErrInvalid, what, reflect.TypeOf(function), reflect.TypeFor[R]())
}

// Entry is a row of a view and its key.
type Entry[R any] = projection.Entry[R]

// Page is a part of a list.
type Page[R any] struct {
	Entries []Entry[R]
	// Next, given to [After], continues the list; empty when this was its end.
	Next string
}

// plan is a listing for rows of type R.
type plan[R any] struct {
	listing
	keep    func(string, R) bool
	compare func(a, b Entry[R]) int // nil: by key
	after   *placed[R]
}

// placed is a row with its place in the index that it was found by, if it was.
type placed[R any] = projection.IndexedRow[R]

// cursor is what Page.Next says: the last entry of the page, with its row
// when the order depends on it, or its place when that is an index's.
type cursor struct {
	Key      []byte          `json:"key"`
	Row      json.RawMessage `json:"r,omitempty"`
	Place    []byte          `json:"p,omitempty"`
	Backward bool            `json:"b,omitempty"`
}

func newPlan[R any](options []ListOption) (*plan[R], error) {
	p := &plan[R]{}
	for _, o := range options {
		o.list(&p.listing)
	}
	if p.mistake != nil {
		return nil, p.mistake
	}
	if p.where != nil {
		keep, ok := p.where.(func(string, R) bool)
		if !ok {
			return nil, mismatch[R]("query.Where", p.where)
		}
		p.keep = keep
	}
	if p.order != nil {
		compare, ok := p.order.(func(a, b R) int)
		if !ok {
			return nil, mismatch[R]("query.OrderBy", p.order)
		}
		p.compare = func(a, b Entry[R]) int {
			c := cmp.Or(compare(a.Row, b.Row), cmp.Compare(a.Key, b.Key))
			if p.backward {
				return -c
			}
			return c
		}
	}
	if p.cursor == "" {
		return p, nil
	}
	c := cursor{}
	data, err := base64.RawURLEncoding.DecodeString(p.cursor)
	if err == nil {
		err = json.Unmarshal(data, &c)
	}
	switch {
	case err != nil:
	case len(c.Key) == 0:
		err = errors.New("it names no row")
	case p.compare != nil && c.Row == nil:
		err = errors.New("it comes from a list without OrderBy")
	case p.compare == nil && c.Row != nil:
		err = errors.New("it comes from a list with OrderBy")
	case p.indexed() && len(c.Place) == 0:
		err = errors.New("it comes from a list without By")
	case !p.indexed() && len(c.Place) > 0:
		err = errors.New("it comes from a list in the order of an index")
	case c.Backward != p.backward:
		err = errors.New("it comes from a list in the other direction")
	}
	p.after = &placed[R]{Entry: Entry[R]{Key: string(c.Key)}, Place: string(c.Place)}
	if err == nil && p.compare != nil {
		err = json.Unmarshal(c.Row, &p.after.Row)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: query.After(%q) is not the Next of a page of this list: %w", eventstore.ErrInvalid, p.cursor, err)
	}
	return p, nil
}

// indexed: the rows are in the order of an index.
func (p *plan[R]) indexed() bool { return p.by != nil && p.compare == nil }

// next makes the cursor that continues after the entry.
func (p *plan[R]) next(last placed[R]) (string, error) {
	c := cursor{Key: []byte(last.Key), Backward: p.backward}
	if p.indexed() {
		c.Place = []byte(last.Place)
	}
	if p.compare != nil {
		row, err := json.Marshal(last.Row)
		if err != nil {
			return "", err
		}
		c.Row = row
	}
	data, err := json.Marshal(c)
	return base64.RawURLEncoding.EncodeToString(data), err
}

// rows yields what the plan selects, in order, one more than the limit, so
// that the caller sees whether there is more.
func (p *plan[R]) rows(ctx context.Context, tx projection.StateTx, view *projection.ViewDefinition[R]) iter.Seq2[placed[R], error] {
	if p.compare == nil {
		return p.matching(ctx, tx, view)
	}
	return func(yield func(placed[R], error) bool) {
		var all []placed[R]
		for e, err := range p.matching(ctx, tx, view) {
			if err != nil {
				yield(e, err)
				return
			}
			all = append(all, e)
		}
		slices.SortFunc(all, func(a, b placed[R]) int { return p.compare(a.Entry, b.Entry) })
		for i, e := range all {
			if i > 0 && e.Key == all[i-1].Key {
				continue // it has several keys in the index
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// matching yields what the plan selects, in the order in which it is read.
func (p *plan[R]) matching(ctx context.Context, tx projection.StateTx, view *projection.ViewDefinition[R]) iter.Seq2[placed[R], error] {
	return func(yield func(placed[R], error) bool) {
		for e, err := range p.stored(tx, view) {
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(e, err)
				return
			}
			if p.keep != nil && !p.keep(e.Key, e.Row) {
				continue
			}
			if p.compare != nil && p.after != nil && p.compare(e.Entry, p.after.Entry) <= 0 {
				continue
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// stored yields the rows among which those are that the plan selects.
func (p *plan[R]) stored(tx projection.StateTx, view *projection.ViewDefinition[R]) iter.Seq2[placed[R], error] {
	r := projection.Range{Prefix: p.prefix}
	if p.compare == nil {
		r.Backward = p.backward
		if p.after != nil {
			r.After = p.after.Key
			if p.by != nil {
				r.After = p.after.Place
			}
		}
		if p.keep == nil && p.limit > 0 {
			r.Limit = p.limit + 1
		}
	}
	if p.by != nil {
		return view.RowsBy(tx, p.by, r)
	}
	return func(yield func(placed[R], error) bool) {
		for e, err := range view.Rows(tx, r) {
			if !yield(placed[R]{Entry: e}, err) {
				return
			}
		}
	}
}

// List returns the rows of the view that the options select, from one
// snapshot, by key unless [By] or [OrderBy] says otherwise. Without [Limit] that is all
// of them, in memory; see [All] for many. A [Where] or [OrderBy] for rows of
// another type is refused.
func List[R any](ctx context.Context, host Host, view *projection.ViewDefinition[R], options ...ListOption) (Page[R], error) {
	var page Page[R]
	p, err := newPlan[R](options)
	if err == nil {
		err = read(ctx, host, p.conditions, func(tx projection.StateTx) error {
			page = Page[R]{}
			var last placed[R]
			for e, err := range p.rows(ctx, tx, view) {
				if err != nil {
					return err
				}
				if p.limit > 0 && len(page.Entries) == p.limit {
					page.Next, err = p.next(last)
					return err
				}
				last, page.Entries = e, append(page.Entries, e.Entry)
			}
			return nil
		}, view)
	}
	if err != nil {
		return Page[R]{}, fmt.Errorf("list view %q: %w", view.Name(), err)
	}
	return page, nil
}

// allPage is how many rows [All] reads at once.
const allPage = 256

// All yields the rows that [List] would return, one by one. It reads some
// hundred at a time and holds nothing while the body runs, which may query and
// execute commands. So the rows are in order and none comes twice, except by an index in which it
// has moved on meanwhile, but they are
// not of one moment: a row that changes while the loop is on its way to it is
// yielded as it is then. Only with [OrderBy], where all rows are read before
// the first is yielded, and within a [Handler], whose snapshot All uses, are
// they of one moment.
//
// [AtLeast] holds for every row. After an error nothing more is yielded.
func All[R any](ctx context.Context, host Host, view *projection.ViewDefinition[R], options ...ListOption) iter.Seq2[Entry[R], error] {
	return func(yield func(Entry[R], error) bool) {
		p, err := newPlan[R](options)
		if err == nil {
			n := 0
			for e, wrong := range all(ctx, host, view, p) {
				if err = wrong; err != nil {
					break
				}
				n++
				if !yield(e.Entry, nil) || n == p.limit {
					return
				}
			}
		}
		if err != nil {
			yield(Entry[R]{}, fmt.Errorf("read view %q: %w", view.Name(), err))
		}
	}
}

// all yields what the plan selects, in order, whatever its limit.
func all[R any](ctx context.Context, host Host, view *projection.ViewDefinition[R], p *plan[R]) iter.Seq2[placed[R], error] {
	if r, ok := host.(Reader); ok {
		return func(yield func(placed[R], error) bool) {
			if err := r.check(p.conditions, view); err != nil {
				yield(placed[R]{}, err)
				return
			}
			p.rows(ctx, r.tx, view)(yield)
		}
	}
	return func(yield func(placed[R], error) bool) {
		for after := p.after; ; {
			page, more, err := readPage(ctx, host, view, p, after)
			for _, e := range page {
				if err == nil {
					err = ctx.Err()
				}
				if err != nil {
					break
				}
				if p.compare == nil && p.keep != nil && !p.keep(e.Key, e.Row) {
					continue
				}
				if !yield(e, nil) {
					return
				}
			}
			if err != nil {
				yield(placed[R]{}, err)
				return
			}
			if !more {
				return
			}
			after = &page[len(page)-1]
		}
	}
}

// readPage returns the rows after the entry, and whether there may be more:
// every row that the plan selects if it orders them, and else a page of rows
// that may not all be wanted.
func readPage[R any](ctx context.Context, host Host, view *projection.ViewDefinition[R], p *plan[R], after *placed[R]) (page []placed[R], more bool, err error) {
	of := &plan[R]{listing: listing{prefix: p.prefix, backward: p.backward, by: p.by}, compare: p.compare, after: after}
	most := allPage
	if p.compare != nil {
		of.keep = p.keep
	} else {
		if p.keep == nil && p.limit > 0 {
			most = min(most, p.limit)
		}
		of.limit = most
	}
	err = read(ctx, host, p.conditions, func(tx projection.StateTx) error {
		page, more = nil, false
		for e, err := range of.rows(ctx, tx, view) {
			if err != nil {
				return err
			}
			if of.limit > 0 && len(page) == most {
				more = true
				return nil
			}
			page = append(page, e)
		}
		return nil
	}, view)
	return page, more, err
}
