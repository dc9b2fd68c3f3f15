package query

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Host has projections to ask: an application is one, and so is a [Reader].
type Host interface {
	Projections() *projection.Engine
}

var (
	// ErrNotFound: the view has no row under the key.
	ErrNotFound = errors.New("not found")
	// ErrTimeout: the read model did not reach the wanted position in time. See
	// [TimeoutError].
	ErrTimeout = errors.New("read model is behind")
)

// DefaultWithin is how long [AtLeast] waits unless [Within] says otherwise.
const DefaultWithin = 5 * time.Second

// TimeoutError says which read model did not reach which position in time.
type TimeoutError struct {
	Projection      string
	Wanted, Reached eventstore.Position
	Within          time.Duration
}

// Error names the read model and both positions.
func (e *TimeoutError) Error() string {
	return fmt.Sprintf("read model %q is behind by %d positions: wanted position %d, reached %d within %s: see the status of projection %q, or give it more time with query.Within",
		e.Projection, e.Behind(), e.Wanted, e.Reached, e.Within, e.Projection)
}

// Behind is how many positions there were to go.
func (e *TimeoutError) Behind() uint64 { return uint64(e.Wanted - min(e.Wanted, e.Reached)) }

// Is makes errors.Is(err, ErrTimeout) hold.
func (e *TimeoutError) Is(target error) bool { return target == ErrTimeout }

// Option is a condition under which any query is answered: [AtLeast] or [Within].
type Option interface {
	ListOption
	apply(*conditions)
}

// conditions are what has to hold before anything is read.
type conditions struct {
	after  eventstore.Position
	within time.Duration
}

type option func(*conditions)

func (o option) apply(c *conditions) { o(c) }
func (o option) list(l *listing)     { o(&l.conditions) }

// AtLeast waits until the read model contains everything up to p, for example
// a command's receipt: so one reads one's own writes. Given several times, the
// latest position counts.
func AtLeast(p eventstore.Positioned) Option {
	return option(func(c *conditions) { c.after = max(c.after, p.At()) })
}

// Within bounds the wait of [AtLeast]; the default is [DefaultWithin]. The end
// of the query's context bounds it too.
func Within(d time.Duration) Option {
	return option(func(c *conditions) { c.within = d })
}

func gather(options []Option) conditions {
	var c conditions
	for _, o := range options {
		o.apply(&c)
	}
	return c
}

// view runs fn, once, on a snapshot in which the projections have come as far
// as the conditions say.
func (c conditions) view(ctx context.Context, engine *projection.Engine, fn func(tx projection.StateTx) error, projections ...projection.Projection) error {
	for _, p := range projections {
		if err := engine.Check(p); err != nil {
			return err
		}
	}
	waits, inline := c.waits(engine, projections)
	if !waits {
		return engine.State().View(ctx, fn)
	}
	if c.within == 0 {
		c.within = DefaultWithin
	}
	limited, cancel := context.WithTimeout(ctx, c.within)
	defer cancel()
	for try := 1; ; try++ {
		if try > 1 || !inline { // what appends apply is there already, as a rule
			if err := c.wait(ctx, limited, engine, projections); err != nil {
				return err
			}
		}
		var behind projection.Projection
		err := engine.State().View(ctx, func(tx projection.StateTx) error {
			for _, p := range projections {
				if ok, err := engine.Contains(tx, p.Name(), c.wanted(engine, p)); err != nil {
					return err
				} else if !ok {
					behind = p
					return nil
				}
			}
			return fn(tx)
		})
		if err != nil || behind == nil {
			return err
		}
		// It was emptied since, or has written more while it was asked.
		if try == 1 {
			continue
		}
		if err := c.breathe(ctx, limited, engine, behind, min(breath<<min(try-2, 10), longestBreath)); err != nil {
			return err
		}
	}
}

// wanted is what the projection's rows must contain: what was asked for, and, of
// one that is inline, what was written here and not applied with it.
func (c conditions) wanted(engine *projection.Engine, p projection.Projection) eventstore.Position {
	unapplied, _ := engine.Unapplied(p.Name())
	return max(c.after, unapplied)
}

// waits reports whether anything must be there, and whether all of the
// projections are inline.
func (c conditions) waits(engine *projection.Engine, projections []projection.Projection) (waits, inline bool) {
	inline = true
	for _, p := range projections {
		_, is := engine.Unapplied(p.Name())
		inline = inline && is
		waits = waits || c.wanted(engine, p) > 0
	}
	return waits, inline
}

// wait returns when the projections have come as far as the conditions say.
func (c conditions) wait(ctx, limited context.Context, engine *projection.Engine, projections []projection.Projection) error {
	for _, p := range projections {
		err := engine.WaitFor(limited, p.Name(), c.wanted(engine, p))
		if err != nil && errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			return c.timeout(engine, p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// breath is the pause before a snapshot that was found wanting is taken again;
// it doubles up to the longest one. Somebody else may have emptied the rows, and
// the projection here not know yet.
const (
	breath        = time.Millisecond
	longestBreath = 50 * time.Millisecond
)

func (c conditions) breathe(ctx, limited context.Context, engine *projection.Engine, p projection.Projection, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-limited.Done():
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return c.timeout(engine, p)
	}
}

func (c conditions) timeout(engine *projection.Engine, p projection.Projection) error {
	reached, _ := engine.Reached(p.Name())
	return &TimeoutError{Projection: p.Name(), Wanted: c.wanted(engine, p), Reached: reached, Within: c.within}
}

// read runs fn on a snapshot in which the projection has come as far as the
// conditions say. Inside of a handler that is the handler's own snapshot.
func read(ctx context.Context, host Host, c conditions, fn func(tx projection.StateTx) error, p projection.Projection) error {
	if r, ok := host.(Reader); ok {
		return r.read(c, fn, p)
	}
	return c.view(ctx, host.Projections(), fn, p)
}

// Get returns the row of the view under the key. The error is [ErrNotFound] if
// there is none, [ErrTimeout] if the view did not come far enough in time, and
// wraps [projection.ErrNotRegistered] if the host does not run the view.
func Get[R any](ctx context.Context, host Host, view *projection.ViewDefinition[R], key string, options ...Option) (R, error) {
	var row R
	err := read(ctx, host, gather(options), func(tx projection.StateTx) error {
		var ok bool
		var err error
		row, ok, err = view.Row(tx, key)
		if err == nil && !ok {
			err = ErrNotFound
		}
		return err
	}, view)
	if err != nil {
		var none R
		return none, fmt.Errorf("get %q of view %q: %w", key, view.Name(), err)
	}
	return row, nil
}

// Live folds the events of one stream now, as the view would, and returns the row:
// the view need not be registered, and nothing is stored. See [projection.Live]. The
// error is [ErrNotFound] if the view would have no row.
func Live[R any](ctx context.Context, host Host, view *projection.ViewDefinition[R], stream eventstore.Stream) (R, error) {
	row, found, err := projection.Live(ctx, host.Projections(), view, stream)
	if err == nil && !found {
		err = ErrNotFound
	}
	if err != nil {
		var none R
		return none, fmt.Errorf("fold stream %q with view %q: %w", stream, view.Name(), err)
	}
	return row, nil
}
