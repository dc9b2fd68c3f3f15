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

// After continues where an earlier page ended, given its Next. The other
// options must be those of that page.
func After(next string) ListOption { return listOption(func(l *listing) { l.cursor = next }) }

// Backward returns the last rows first.
func Backward() ListOption { return listOption(func(l *listing) { l.backward = true }) }

// Where keeps the rows for which keep returns true. It reads every row (of the
// prefix) until the limit is reached; a view keyed by what you look for is the
// index that avoids it. Given several times, all must hold. R is the view's
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
// keys. It reads and keeps every row (of the prefix, and for which Where
// holds), whatever the limit. Without it rows are in the byte order of their
// keys.
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
	after   *Entry[R]
}

// cursor is what Page.Next says: the last entry of the page, with its row
// when the order depends on it.
type cursor struct {
	Key string          `json:"k"`
	Row json.RawMessage `json:"r,omitempty"`
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
	if err == nil && c.Key == "" {
		err = errors.New("it names no row")
	}
	if err == nil && p.compare != nil && c.Row == nil {
		err = errors.New("it comes from a list without OrderBy")
	}
	p.after = &Entry[R]{Key: c.Key}
	if err == nil && p.compare != nil {
		err = json.Unmarshal(c.Row, &p.after.Row)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: query.After(%q) is not the Next of a page of this list: %w", eventstore.ErrInvalid, p.cursor, err)
	}
	return p, nil
}

// next makes the cursor that continues after the entry.
func (p *plan[R]) next(last Entry[R]) (string, error) {
	c := cursor{Key: last.Key}
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
func (p *plan[R]) rows(ctx context.Context, tx projection.StateTx, view *projection.ViewDefinition[R]) iter.Seq2[Entry[R], error] {
	r := projection.Range{Prefix: p.prefix}
	if p.compare == nil {
		r.Backward = p.backward
		if p.after != nil {
			r.After = p.after.Key
		}
		if p.keep == nil && p.limit > 0 {
			r.Limit = p.limit + 1
		}
	}
	matching := func(yield func(Entry[R], error) bool) {
		for e, err := range view.Rows(tx, r) {
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
			if p.compare != nil && p.after != nil && p.compare(e, *p.after) <= 0 {
				continue
			}
			if !yield(e, nil) {
				return
			}
		}
	}
	if p.compare == nil {
		return matching
	}
	return func(yield func(Entry[R], error) bool) {
		var all []Entry[R]
		for e, err := range matching {
			if err != nil {
				yield(e, err)
				return
			}
			all = append(all, e)
		}
		slices.SortFunc(all, p.compare)
		for _, e := range all {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// List returns the rows of the view that the options select, from one
// snapshot, by key unless [OrderBy] says otherwise. Without [Limit] that is all
// of them, in memory; see [All] for many. A [Where] or [OrderBy] for rows of
// another type is refused.
func List[R any](ctx context.Context, host Host, view *projection.ViewDefinition[R], options ...ListOption) (Page[R], error) {
	var page Page[R]
	p, err := newPlan[R](options)
	if err == nil {
		err = read(ctx, host, p.conditions, func(tx projection.StateTx) error {
			page = Page[R]{}
			for e, err := range p.rows(ctx, tx, view) {
				if err != nil {
					return err
				}
				if p.limit > 0 && len(page.Entries) == p.limit {
					page.Next, err = p.next(page.Entries[p.limit-1])
					return err
				}
				page.Entries = append(page.Entries, e)
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
// execute commands. So the rows are in order and none comes twice, but they are
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
				if !yield(e, nil) || n == p.limit {
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
func all[R any](ctx context.Context, host Host, view *projection.ViewDefinition[R], p *plan[R]) iter.Seq2[Entry[R], error] {
	if r, ok := host.(Reader); ok {
		return func(yield func(Entry[R], error) bool) {
			if err := r.check(p.conditions, view); err != nil {
				yield(Entry[R]{}, err)
				return
			}
			p.rows(ctx, r.tx, view)(yield)
		}
	}
	return func(yield func(Entry[R], error) bool) {
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
				yield(Entry[R]{}, err)
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
func readPage[R any](ctx context.Context, host Host, view *projection.ViewDefinition[R], p *plan[R], after *Entry[R]) (page []Entry[R], more bool, err error) {
	of := &plan[R]{listing: listing{prefix: p.prefix, backward: p.backward}, compare: p.compare, after: after}
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
