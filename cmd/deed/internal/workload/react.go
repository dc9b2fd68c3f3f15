package workload

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
)

// React is events that a reaction handles, doing nothing.
type React struct {
	Timing
	Writers int `default:"64" help:"Writers at the same time. They wait when 2000 events are not handled yet."`
}

// Validate implements Workload.
func (w *React) Validate() error {
	return errors.Join(w.Timing.validate(), between("writers", w.Writers, 1, maxWorkers))
}

func (w *React) name() string { return "react" }

func (w *React) parameters() map[string]any {
	return w.with(map[string]any{"writers": w.Writers})
}

// reacted is what the reaction is to.
type reacted struct{ noted }

const reactedType = "bench.reacted"

// EventType implements saga.Event.
func (reacted) EventType() string { return reactedType }

func (w *React) run(ctx context.Context, b *bench) (*measured, error) {
	if err := b.preload(ctx, Tagging{}); err != nil {
		return nil, err
	}
	data, err := eventstore.JSON().Marshal(newNoted(w.Payload))
	if err != nil {
		return nil, err
	}
	name := "bench_" + b.id
	reaction := saga.React(name, func(saga.Step, reacted) error { return nil }).FromNow()
	app, err := b.start(ctx, reaction)
	if err != nil {
		return nil, err
	}
	// An event counts when it is recorded that it was handled.
	const most = 2000
	room := make(chan struct{}, most)
	watching, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var handled int64
	failed := make(chan error, 1)
	head, err := b.store.Head(ctx)
	if err != nil {
		return nil, errors.Join(err, b.stop(ctx, app))
	}
	go func() {
		query := eventstore.Match(eventstore.Item{Category: "reaction." + name, Types: []string{"reaction.handled"}})
		for batch, err := range b.store.Subscribe(watching, query, head) {
			if err != nil {
				if watching.Err() != nil {
					err = nil
				}
				failed <- err
				return
			}
			for range batch.Events {
				handled++
				<-room
			}
		}
		failed <- nil
	}()
	m := b.drive(ctx, w.Writers, func(ctx context.Context, worker int, l *lane) {
		stream, n := eventstore.Stream{Category: "bench_react", ID: fmt.Sprintf("%s-%d", b.id, worker)}, 0
		l.each(ctx, func(ctx context.Context) error {
			select {
			case room <- struct{}{}:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			n++
			stream.ID = fmt.Sprintf("%s-%d-%d", b.id, worker, n)
			_, err := b.store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{{Stream: stream, Type: reactedType, Data: data, Time: time.Now()}}})
			if err != nil {
				<-room
			}
			return err
		})
	})
	err = settle(ctx, app)
	late := time.NewTimer(patience)
	defer late.Stop()
	for len(room) > 0 && err == nil {
		select {
		case err = <-failed:
		case <-late.C:
			err = fmt.Errorf("%d events are not handled %s after the end of the run", len(room), patience)
		case <-time.After(time.Millisecond):
		}
	}
	cancel()
	err = errors.Join(err, <-failed, b.stop(ctx, app))
	if err != nil {
		return nil, err
	}
	if handled != m.total {
		return nil, fmt.Errorf("%d events were handled, but %d appended", handled, m.total)
	}
	m.details["unit"], m.details["latency_of"] = "events handled", "an append"
	m.details["reaction"] = name
	m.details["handled"] = handled
	return m, nil
}

func settle(ctx context.Context, app *deed.App) error {
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	return app.Settle(ending)
}
