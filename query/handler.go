package query

import (
	"context"
	"fmt"
	"slices"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Handler answers questions of type Q with answers of type A. Make it with
// [Handle] and use it with [Ask]; it is immutable and safe for concurrent use.
type Handler[Q, A any] struct {
	name   string
	answer func(context.Context, Reader, Q) (A, error)
	uses   []projection.Projection
}

// Handle defines a query by a function and the projections that it reads: only
// those are there in the [Reader], and [AtLeast] waits for all of them.
func Handle[Q, A any](name string, answer func(ctx context.Context, r Reader, question Q) (A, error), uses ...projection.Projection) *Handler[Q, A] {
	return &Handler[Q, A]{name: name, answer: answer, uses: uses}
}

// Name returns the handler's name.
func (h *Handler[Q, A]) Name() string { return h.name }

// Ask has the handler answer the question, on one snapshot.
func Ask[Q, A any](ctx context.Context, host Host, h *Handler[Q, A], question Q, options ...Option) (A, error) {
	var none A
	answer, err := ask(ctx, host, h, question, gather(options))
	if err != nil {
		return none, fmt.Errorf("query %q: %w", h.name, err)
	}
	return answer, nil
}

func ask[Q, A any](ctx context.Context, host Host, h *Handler[Q, A], question Q, c conditions) (answer A, err error) {
	if h.answer == nil {
		return answer, fmt.Errorf("%w: its function is nil", eventstore.ErrInvalid)
	}
	if len(h.uses) == 0 {
		return answer, fmt.Errorf("%w: it names no projection that it reads: add them to query.Handle", eventstore.ErrInvalid)
	}
	if outer, ok := host.(Reader); ok {
		for _, p := range h.uses {
			if err := outer.check(c, p); err != nil {
				return answer, err
			}
		}
		return h.answer(ctx, outer, question)
	}
	engine := host.Projections()
	err = c.view(ctx, engine, func(tx projection.StateTx) error {
		var err error
		answer, err = h.answer(ctx, Reader{engine: engine, tx: tx, uses: h.uses}, question)
		return err
	}, h.uses...)
	return answer, err
}

// Reader reads projections within one query: everything it shows belongs to
// one moment. It is a [Host], for [Get], [List], [All] and [Ask]; options that
// wait are refused there, because the moment is chosen. Do not keep it.
type Reader struct {
	engine *projection.Engine
	tx     projection.StateTx
	uses   []projection.Projection
}

// Projections makes Reader a [Host].
func (r Reader) Projections() *projection.Engine { return r.engine }

// Query runs a query on the tables of SQL projections, with parameters $1, $2
// and so on. Close the rows before the next read.
func (r Reader) Query(ctx context.Context, query string, args ...any) (projection.Rows, error) {
	return r.tx.Query(ctx, query, args...)
}

func (r Reader) read(c conditions, fn func(projection.StateTx) error, p projection.Projection) error {
	if err := r.check(c, p); err != nil {
		return err
	}
	return fn(r.tx)
}

func (r Reader) check(c conditions, p projection.Projection) error {
	if !slices.Contains(r.uses, p) {
		return fmt.Errorf("%w: the handler does not say that it reads projection %q: add it to query.Handle", eventstore.ErrInvalid, p.Name())
	}
	if c != (conditions{}) {
		return fmt.Errorf("%w: query.AtLeast and query.Within belong to query.Ask: inside of a handler the snapshot is chosen", eventstore.ErrInvalid)
	}
	return nil
}
