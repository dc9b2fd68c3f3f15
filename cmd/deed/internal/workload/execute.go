package workload

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
)

// Execute is commands on aggregates.
type Execute struct {
	Timing
	Writers    int `default:"64" help:"Callers at the same time."`
	Aggregates int `default:"1000" help:"Aggregates, chosen at random and kept in memory; 1 is the hot one."`
}

// Validate implements Workload.
func (w *Execute) Validate() error {
	return errors.Join(w.Timing.validate(),
		between("writers", w.Writers, 1, maxWorkers),
		between("aggregates", w.Aggregates, 1, 10_000_000))
}

func (w *Execute) name() string { return "execute" }

func (w *Execute) parameters() map[string]any {
	return w.with(map[string]any{"writers": w.Writers, "aggregates": w.Aggregates})
}

// account is the state of the aggregates: a small fold, as most are.
type account struct {
	Events int64
	Cents  int64
}

var accounts = aggregate.Define("bench_execute",
	aggregate.On(func(a *account, e noted) {
		a.Events++
		a.Cents += e.Cents
	}),
)

// note is the command.
type note struct {
	ID    string
	Event noted
}

// AggregateID implements command.Command.
func (c note) AggregateID() string { return c.ID }

// Decide implements command.Command.
func (c note) Decide(a account) ([]aggregate.Event, error) {
	if a.Cents < 0 {
		return nil, command.Rejectf("account %q is overdrawn", c.ID)
	}
	return aggregate.Events(c.Event), nil
}

func (w *Execute) run(ctx context.Context, b *bench) (*measured, error) {
	if err := b.preload(ctx, Tagging{}); err != nil {
		return nil, err
	}
	app, err := b.start(ctx, accounts, deed.CachedAggregates(w.Aggregates))
	if err != nil {
		return nil, err
	}
	streams := b.streams(accounts.Category(), w.Aggregates)
	acknowledged := make([]atomic.Int64, len(streams))
	event := newNoted(w.Payload)
	m := b.drive(ctx, w.Writers, func(ctx context.Context, _ int, l *lane) {
		ctx = command.WithCorrelation(command.WithActor(ctx, metadata.Actor), metadata.CorrelationID)
		random := newRandom()
		l.each(ctx, func(ctx context.Context) error {
			i := random.IntN(len(streams))
			if _, err := deed.Execute(ctx, app, accounts, note{streams[i].ID, event}); err != nil {
				return err
			}
			acknowledged[i].Add(1)
			return nil
		})
	})
	if err := b.stop(ctx, app); err != nil {
		return nil, err
	}
	if err := b.verify(ctx, m, streams, func(i int) int64 { return acknowledged[i].Load() }); err != nil {
		return nil, err
	}
	m.details["unit"], m.details["latency_of"] = "commands", "a command"
	m.details["events_written"] = m.total
	return m, nil
}
