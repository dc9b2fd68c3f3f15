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
	return fmt.Sprintf("read model %q is behind: wanted position %d, reached %d within %s: see the status of projection %q, or give it more time with query.Within",
		e.Projection, e.Wanted, e.Reached, e.Within, e.Projection)
}

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

// wait returns when the projections are registered and the conditions hold.
func (c conditions) wait(ctx context.Context, engine *projection.Engine, projections ...projection.Projection) error {
	for _, p := range projections {
		if err := engine.Check(p); err != nil {
			return err
		}
	}
	if c.after == 0 {
		return nil
	}
	within := c.within
	if within == 0 {
		within = DefaultWithin
	}
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for _, p := range projections {
		err := engine.WaitFor(limited, p.Name(), c.after)
		if err != nil && errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			reached, _ := engine.Reached(p.Name())
			return &TimeoutError{Projection: p.Name(), Wanted: c.after, Reached: reached, Within: within}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// read runs fn on a snapshot in which the projections have come as far as the
// conditions say. Inside of a handler that is the handler's own snapshot.
func read(ctx context.Context, host Host, c conditions, fn func(tx projection.StateTx) error, p projection.Projection) error {
	if r, ok := host.(Reader); ok {
		return r.read(c, fn, p)
	}
	engine := host.Projections()
	if err := c.wait(ctx, engine, p); err != nil {
		return err
	}
	return engine.State().View(ctx, fn)
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
