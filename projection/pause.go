package projection

import (
	"context"
	"fmt"
	"time"
)

// pauses is the table of the units that are not to go on, by their names.
const pauses = "projection.paused"

type pausedRow struct {
	By string    `json:"by,omitempty"`
	At time.Time `json:"at"`
}

func isPaused(tx StateTx, unit string) (bool, error) {
	_, paused, err := getJSON[pausedRow](tx, pauses, unit)
	return paused, err
}

// Pause makes the projection stand still, here or in whichever process runs it,
// until [Engine.Resume]; that is stored, so that neither another owner nor another
// start goes on. It returns when nothing is folded any more. Queries see the rows as
// they are; those that ask for a later position wait. Dead letters can be replayed
// and the projection rebuilt meanwhile: it then folds nothing until it is resumed.
//
// Pausing it again does nothing. As for whose process does it, see
// [Engine.ReplayDeadLetters].
func (e *Engine) Pause(ctx context.Context, name string) error {
	return e.setPaused(ctx, name, true)
}

// Resume lets the projection go on from where it stands.
func (e *Engine) Resume(ctx context.Context, name string) error {
	return e.setPaused(ctx, name, false)
}

func (e *Engine) setPaused(ctx context.Context, name string, paused bool) error {
	en, err := e.entry(name)
	if err != nil {
		return err
	}
	o, verb := order{Action: actionResume}, "resume"
	if paused {
		o.Action, verb = actionPause, "pause"
	}
	if err := en.each(func(r *runner) error {
		_, _, _, err := r.askOwner(ctx, o, r.pausing(paused, e.options.Owner), false)
		return err
	}); err != nil {
		return fmt.Errorf("%s projection %q: %w", verb, name, err)
	}
	return nil
}

// pausing returns what stores that the unit is paused, or not.
func (r *runner) pausing(paused bool, by string) func(ctx context.Context, lease Lease) error {
	return func(ctx context.Context, lease Lease) error {
		return r.engine.state.Update(ctx, func(tx StateTx) error {
			if err := tx.Fence(lease); err != nil {
				return err
			}
			if !paused {
				return tx.Delete(pauses, r.unit)
			}
			if already, err := isPaused(tx, r.unit); err != nil || already {
				return err
			}
			return putJSON(tx, pauses, r.unit, pausedRow{By: by, At: r.engine.options.Clock.Now()})
		})
	}
}

// standStill does what is asked for, and nothing else, until it is told to go on.
func (r *runner) standStill(ctx context.Context, lease Lease) error {
	r.engine.options.Logger.Info("projection is paused", "projection", r.unit)
	r.progress.change(func() { r.progress.phase = PhasePaused })
	ordered, stop := r.lookForOrders()
	defer stop()
	for {
		select {
		case q := <-r.requests:
			if err := r.serve(ctx, lease, q); err != nil {
				return err
			}
		case <-ordered:
			if err := r.orders(ctx, lease); err != nil {
				return err
			}
		case <-r.progress.doubted:
			if err := r.engine.state.Update(ctx, func(tx StateTx) error { return tx.Fence(lease) }); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
