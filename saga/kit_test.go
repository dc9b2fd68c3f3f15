package saga_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/internal/worker"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// The domain of the tests: stock that is reserved and released, orders that
// are placed and shipped.

type Stocked struct{ Count int }

func (Stocked) EventType() string { return "stock.stocked" }

type Reserved struct{ Order string }

func (Reserved) EventType() string { return "stock.reserved" }

type Released struct{ Order string }

func (Released) EventType() string { return "stock.released" }

type Stock struct{ Free int }

var stocks = aggregate.Define("stock",
	aggregate.On(func(s *Stock, e Stocked) { s.Free += e.Count }),
	aggregate.On(func(s *Stock, _ Reserved) { s.Free-- }),
	aggregate.On(func(s *Stock, _ Released) { s.Free++ }),
)

type Fill struct {
	SKU   string
	Count int
}

func (c Fill) AggregateID() string { return c.SKU }
func (c Fill) Decide(Stock) ([]aggregate.Event, error) {
	return aggregate.Events(Stocked{c.Count}), nil
}

type Reserve struct{ SKU, Order string }

func (c Reserve) AggregateID() string { return c.SKU }
func (c Reserve) Decide(s Stock) ([]aggregate.Event, error) {
	if s.Free == 0 {
		return nil, command.Rejectf("%w: %q", errSoldOut, c.SKU)
	}
	return aggregate.Events(Reserved{c.Order}), nil
}

type Release struct{ SKU, Order string }

func (c Release) AggregateID() string { return c.SKU }
func (c Release) Decide(Stock) ([]aggregate.Event, error) {
	return aggregate.Events(Released{c.Order}), nil
}

type Placed struct{ SKU string }

func (Placed) EventType() string { return "order.placed" }

type Shipped struct{ Parcel string }

func (Shipped) EventType() string { return "order.shipped" }
func (s Shipped) Tags() []string  { return []string{"parcel:" + s.Parcel} }

type Order struct{ SKU string }

var orders = aggregate.Define("order",
	aggregate.On(func(o *Order, e Placed) { o.SKU = e.SKU }),
	aggregate.On(func(*Order, Shipped) {}),
)

type Place struct{ ID, SKU string }

func (c Place) AggregateID() string { return c.ID }
func (c Place) Decide(Order) ([]aggregate.Event, error) {
	return aggregate.Events(Placed{c.SKU}), nil
}

type Ship struct{ ID, Parcel string }

func (c Ship) AggregateID() string { return c.ID }
func (c Ship) Decide(Order) ([]aggregate.Event, error) {
	return aggregate.Events(Shipped{c.Parcel}), nil
}

const day = 24 * time.Hour

var t0 = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

type backend interface {
	eventstore.Store
	projection.State
}

// bench is an engine on a store, under a clock that moves when told.
type bench struct {
	t       testing.TB
	store   backend
	clock   *clock.Manual
	bus     *command.Bus
	engine  *saga.Engine
	runtime *aggregate.Runtime
	stop    func() []error
}

func newBench(t testing.TB, processes ...saga.Process) *bench {
	t.Helper()
	return startBench(t, memory.New(), clock.NewManual(t0), saga.Options{}, processes...)
}

func startBench(t testing.TB, store backend, c *clock.Manual, o saga.Options, processes ...saga.Process) *bench {
	t.Helper()
	b := startUnready(t, store, c, o, processes...)
	for _, w := range b.engine.Workers() {
		require.NoError(t, w.Ready(context.Background()))
	}
	return b
}

// startUnready is startBench for a store that may be away.
func startUnready(t testing.TB, store backend, c *clock.Manual, o saga.Options, processes ...saga.Process) *bench {
	t.Helper()
	b := &bench{t: t, store: store, clock: c}
	b.runtime = aggregate.NewRuntime(store, aggregate.Options{Clock: c, Logger: slog.New(slog.DiscardHandler)})
	b.bus = command.NewBus(b.runtime, command.Options{})
	o.Clock = c
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	b.engine = saga.NewEngine(store, store, b.bus, o)
	for _, p := range processes {
		require.NoError(t, b.engine.Add(p))
	}
	b.run()
	t.Cleanup(func() { b.stop() })
	return b
}

func (b *bench) run() {
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	workers := b.engine.Workers()
	errs := make([]error, len(workers))
	for i, w := range workers {
		group.Go(func() { errs[i] = w.Run(ctx) })
	}
	b.stop = sync.OnceValue(func() []error {
		cancel()
		group.Wait()
		_ = b.runtime.Stop(context.Background())
		return errs
	})
}

// restart stops the engine and starts another one on the same store.
func (b *bench) restart(processes ...saga.Process) *bench {
	b.t.Helper()
	for _, err := range b.stop() {
		require.NoError(b.t, err)
	}
	return startBench(b.t, b.store, b.clock, saga.Options{}, processes...)
}

func (b *bench) settle() {
	b.t.Helper()
	require.NoError(b.t, settle(b.t.Context(), b.store, b.engine.Workers()))
}

func settle(ctx context.Context, store eventstore.Store, workers []worker.Worker) error {
	for {
		head, err := store.Head(ctx)
		if err != nil {
			return err
		}
		for _, w := range workers {
			if err := w.WaitThrough(ctx, head); err != nil {
				return err
			}
		}
		if again, err := store.Head(ctx); err != nil || again == head {
			return err
		}
	}
}

// advance moves the clock, firing what is due on the way.
func (b *bench) advance(d time.Duration) {
	b.t.Helper()
	to := b.clock.Now().Add(d)
	b.settle()
	for {
		var due time.Time
		some := false
		for _, w := range b.engine.Workers() {
			if at, ok := w.NextDue(); ok && !at.After(to) && (!some || at.Before(due)) {
				due, some = at, true
			}
		}
		if !some {
			break
		}
		b.clock.Set(due)
		for _, w := range b.engine.Workers() {
			require.NoError(b.t, w.Fire(b.t.Context(), due))
		}
		b.settle()
	}
	b.clock.Set(to)
}

func (b *bench) types(s eventstore.Stream) []string {
	b.t.Helper()
	var types []string
	for r, err := range b.store.Read(b.t.Context(), eventstore.OneStream(s), eventstore.ReadOptions{}) {
		require.NoError(b.t, err)
		types = append(types, r.Type)
	}
	return types
}

func history(name, id string) eventstore.Stream {
	return eventstore.Stream{Category: "saga." + name, ID: id}
}

func exec[S any, C command.Command[S]](b *bench, def *aggregate.Definition[S], c C) {
	b.t.Helper()
	_, err := command.Execute(b.t.Context(), b.bus, def, c)
	require.NoError(b.t, err)
}
