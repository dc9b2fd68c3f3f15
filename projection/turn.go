package projection

import (
	"context"

	"github.com/deed-go/deed/internal/ownership"
)

// turn is whether a unit of work is this node's to do. It belongs to the
// goroutine that runs the unit; without a group it always is.
type turn struct {
	group  bool
	unit   *ownership.Unit
	come   chan context.Context // brings what Wait has returned
	await  func()               // begins to wait
	ending context.Context      // of the node's turn; nil: not now
}

func newTurn(ctx context.Context, g *ownership.Group, name string) turn {
	if g == nil {
		return turn{}
	}
	t := turn{group: true, unit: g.Offer(name), come: make(chan context.Context, 1)}
	t.await = func() {
		unit, come := t.unit, t.come
		go func() {
			// It ends with ctx, or when the offer is withdrawn.
			if ending, err := unit.Wait(ctx); err == nil {
				come <- ending
			}
		}()
	}
	t.await()
	return t
}

// ours reports whether it is this node's turn.
func (t *turn) ours() bool {
	if !t.group {
		return true
	}
	if t.ending == nil {
		select {
		case t.ending = <-t.come:
		default:
			return false
		}
	}
	if t.ending.Err() != nil {
		t.ending = nil
		t.await()
		return false
	}
	return true
}

// comes returns a channel that gives the next value of ending; nil while there is
// one.
func (t *turn) comes() <-chan context.Context {
	if t.ending != nil {
		return nil
	}
	return t.come
}

// within returns a context that ends with the turn.
func (t *turn) within(ctx context.Context) context.Context {
	switch {
	case !t.group:
		return ctx
	case t.ours():
		return t.ending
	}
	over, cancel := context.WithCancelCause(ctx)
	cancel(ownership.ErrMoved)
	return over
}

// withdraw says that this node does not do the work any more.
func (t *turn) withdraw() {
	if t.group {
		t.unit.Withdraw()
	}
}
