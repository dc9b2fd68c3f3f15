package main

import (
	"context"
	"fmt"
	"time"

	eh "github.com/looplab/eventhorizon"
	"github.com/looplab/eventhorizon/aggregatestore/events"
	ehaggregate "github.com/looplab/eventhorizon/commandhandler/aggregate"
	"github.com/looplab/eventhorizon/eventstore/memory"
	ehuuid "github.com/looplab/eventhorizon/uuid"
)

func init() {
	register("eventhorizon-execute", benchCase{
		peer: "github.com/looplab/eventhorizon", workload: "execute", store: "memory", unit: "commands",
		guarantees: "not durable: in memory; no positions; loads the stream for each command",
		open:       openEventHorizon,
	})
}

const (
	ehOrderType    = eh.AggregateType("order")
	ehPlaced       = eh.EventType(orderType)
	ehPlace        = eh.CommandType("order.place")
	ehStreamLength = 100 // events in an aggregate when a command comes, on average, unless told otherwise
)

type ehPlaceOrder struct {
	ID    ehuuid.UUID
	Order order
}

func (c *ehPlaceOrder) AggregateID() ehuuid.UUID        { return c.ID }
func (c *ehPlaceOrder) AggregateType() eh.AggregateType { return ehOrderType }
func (c *ehPlaceOrder) CommandType() eh.CommandType     { return ehPlace }

type ehOrder struct {
	*events.AggregateBase
	cents int64
}

func (o *ehOrder) HandleCommand(_ context.Context, cmd eh.Command) error {
	place, ok := cmd.(*ehPlaceOrder)
	if !ok {
		return fmt.Errorf("unknown command %T", cmd)
	}
	o.AppendEvent(ehPlaced, &place.Order, time.Now())
	return nil
}

func (o *ehOrder) ApplyEvent(_ context.Context, e eh.Event) error {
	placed, ok := e.Data().(*order)
	if !ok {
		return fmt.Errorf("unknown event data %T", e.Data())
	}
	o.cents += placed.Cents
	return nil
}

// The library registers types for the whole process.
func init() {
	eh.RegisterAggregate(func(id ehuuid.UUID) eh.Aggregate {
		return &ehOrder{AggregateBase: events.NewAggregateBase(ehOrderType, id)}
	})
	eh.RegisterEventData(ehPlaced, func() eh.EventData { return &order{} })
}

// openEventHorizon sends commands through the library's aggregate command
// handler over its store in memory. An aggregate gets two hundred commands,
// then there is a new one, so that the streams loaded have a hundred events on
// average.
func openEventHorizon(_ context.Context, p params) (*job, error) {
	data, _, err := newOrder(p.Payload)
	if err != nil {
		return nil, err
	}
	store, err := memory.NewEventStore()
	if err != nil {
		return nil, err
	}
	aggregates, err := events.NewAggregateStore(store)
	if err != nil {
		return nil, err
	}
	handler, err := ehaggregate.NewCommandHandler(ehOrderType, aggregates)
	if err != nil {
		return nil, err
	}
	length := p.Events
	if length == 0 {
		length = ehStreamLength
	}
	type place struct {
		id  ehuuid.UUID
		n   int
		ids []ehuuid.UUID
	}
	places := make([]place, p.Writers)
	return &job{
		durability: "none",
		notes:      fmt.Sprintf("streams of %d on average", length),
		op: func(ctx context.Context, worker int) (int, error) {
			at := &places[worker]
			if at.n%(2*length) == 0 {
				at.id = ehuuid.New()
				at.ids = append(at.ids, at.id)
			}
			err := handler.HandleCommand(ctx, &ehPlaceOrder{ID: at.id, Order: data})
			if err == nil {
				at.n++
			}
			return 1, err
		},
		verify: func(ctx context.Context, done int64) error {
			var n int64
			for i := range places {
				for _, id := range places[i].ids {
					stored, err := store.Load(ctx, id)
					if err != nil {
						return err
					}
					n += int64(len(stored))
				}
			}
			if n != done {
				return fmt.Errorf("the store has %d events, but %d commands were executed", n, done)
			}
			return nil
		},
	}, nil
}
