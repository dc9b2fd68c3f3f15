package workload

import (
	"context"
	"errors"
	"fmt"

	"github.com/deed-go/deed/saga"
)

// Saga is durable functions of three steps that do nothing.
type Saga struct {
	Timing
	Writers int `default:"64" help:"Sagas at the same time; 128 of them are at work at once."`
}

// Validate implements Workload.
func (w *Saga) Validate() error {
	return errors.Join(w.Timing.validate(), between("writers", w.Writers, 1, maxWorkers))
}

func (w *Saga) name() string { return "saga" }

func (w *Saga) parameters() map[string]any {
	return w.with(map[string]any{"writers": w.Writers, "steps": len(sagaSteps)})
}

var sagaSteps = []string{"reserve", "charge", "ship"}

// newSaga makes a saga of its own for the run: one that an earlier run has left
// unfinished would go on.
func (b *bench) newSaga() *saga.Definition[noted, int] {
	return saga.Define("bench_"+b.id, func(s *saga.Run, in noted) (int, error) {
		for i, name := range sagaSteps {
			if _, err := saga.Do(s, name, func(saga.Step) (int, error) { return i, nil }); err != nil {
				return 0, err
			}
		}
		return len(sagaSteps), nil
	})
}

func (w *Saga) run(ctx context.Context, b *bench) (*measured, error) {
	if err := b.preload(ctx, Tagging{}); err != nil {
		return nil, err
	}
	definition := b.newSaga()
	app, err := b.start(ctx, definition)
	if err != nil {
		return nil, err
	}
	input := newNoted(w.Payload)
	m := b.drive(ctx, w.Writers, func(ctx context.Context, worker int, l *lane) {
		n := 0
		l.each(ctx, func(ctx context.Context) error {
			n++
			id := fmt.Sprintf("%d-%d", worker, n)
			if err := saga.Start(ctx, app, definition, id, input); err != nil {
				return err
			}
			steps, err := saga.Wait(ctx, app, definition, id)
			if err == nil && steps != len(sagaSteps) {
				err = fmt.Errorf("saga %q has done %d steps", id, steps)
			}
			return err
		})
	})
	if err := b.stop(ctx, app); err != nil {
		return nil, err
	}
	m.details["unit"], m.details["latency_of"] = "sagas", "a saga, from its start to its result"
	m.details["saga"] = definition.Name()
	m.details["sagas_completed"] = m.total
	return m, nil
}
