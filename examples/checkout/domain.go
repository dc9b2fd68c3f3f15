package main

import (
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
)

// What happens to a stock: pieces come, are held for an order, and are free
// again.
type (
	Stocked  struct{ Count int }
	Reserved struct{ Order string }
	Released struct{ Order string }
)

func (Stocked) EventType() string  { return "stock.stocked" }
func (Reserved) EventType() string { return "stock.reserved" }
func (Released) EventType() string { return "stock.released" }

// Stock is what decisions about an article need to know.
type Stock struct {
	Free int
	Held map[string]bool // by order
}

var stocks = aggregate.Define("stock",
	aggregate.On(func(s *Stock, e Stocked) { s.Free += e.Count }),
	aggregate.On(func(s *Stock, e Reserved) {
		if s.Held == nil {
			s.Held = map[string]bool{}
		}
		s.Free--
		s.Held[e.Order] = true
	}),
	aggregate.On(func(s *Stock, e Released) {
		s.Free++
		delete(s.Held, e.Order)
	}),
)

// Fill brings pieces of an article into stock.
type Fill struct {
	SKU   string
	Count int
}

// AggregateID returns the article.
func (c Fill) AggregateID() string { return c.SKU }

// Decide takes what comes.
func (c Fill) Decide(Stock) ([]aggregate.Event, error) {
	return aggregate.Events(Stocked{c.Count}), nil
}

// Reserve holds one piece for an order.
type Reserve struct{ SKU, Order string }

// AggregateID returns the article.
func (c Reserve) AggregateID() string { return c.SKU }

// Decide holds a piece if one is free.
func (c Reserve) Decide(s Stock) ([]aggregate.Event, error) {
	if s.Free == 0 {
		return nil, command.Rejectf("%q is sold out", c.SKU)
	}
	return aggregate.Events(Reserved{c.Order}), nil
}

// Release lets go of the piece that is held for an order.
type Release struct{ SKU, Order string }

// AggregateID returns the article.
func (c Release) AggregateID() string { return c.SKU }

// Decide lets go of what is held, if it is.
func (c Release) Decide(s Stock) ([]aggregate.Event, error) {
	if !s.Held[c.Order] {
		return nil, nil
	}
	return aggregate.Events(Released{c.Order}), nil
}

// What happens to an order. It is placed and paid, and then either shipped or
// called off: which one, the order decides, and nobody else.
type (
	OrderPlaced struct {
		SKU   string
		Cents int64
		Card  string // the gateway's name for it, not its number
		Name  string
		Email string
	}
	OrderPaid      struct{ Charge string }
	OrderShipped   struct{ Parcel string }
	OrderCalledOff struct{}
)

func (OrderPlaced) EventType() string    { return "order.placed" }
func (OrderPaid) EventType() string      { return "order.paid" }
func (OrderShipped) EventType() string   { return "order.shipped" }
func (OrderCalledOff) EventType() string { return "order.called_off" }

// Order is what decisions about an order need to know.
type Order struct{ Placed, Paid, Shipped, CalledOff bool }

var orders = aggregate.Define("order",
	aggregate.On(func(o *Order, _ OrderPlaced) { o.Placed = true }),
	aggregate.On(func(o *Order, _ OrderPaid) { o.Paid = true }),
	aggregate.On(func(o *Order, _ OrderShipped) { o.Shipped = true }),
	aggregate.On(func(o *Order, _ OrderCalledOff) { o.CalledOff = true }),
)

// Place places an order, once.
type Place struct {
	Order string
	OrderPlaced
}

// AggregateID returns the order.
func (c Place) AggregateID() string { return c.Order }

// Decide places the order if it is not there yet.
func (c Place) Decide(o Order) ([]aggregate.Event, error) {
	if o.Placed {
		return nil, nil
	}
	return aggregate.Events(c.OrderPlaced), nil
}

// Pay notes that an order is paid, so that it may be shipped.
type Pay struct{ Order, Charge string }

// AggregateID returns the order.
func (c Pay) AggregateID() string { return c.Order }

// Decide notes it once.
func (c Pay) Decide(o Order) ([]aggregate.Event, error) {
	if o.Paid {
		return nil, nil
	}
	return aggregate.Events(OrderPaid{c.Charge}), nil
}

// Ship hands an order to the parcel service.
type Ship struct{ Order, Parcel string }

// AggregateID returns the order.
func (c Ship) AggregateID() string { return c.Order }

// Decide ships what is paid and not called off.
func (c Ship) Decide(o Order) ([]aggregate.Event, error) {
	switch {
	case o.Shipped:
		return nil, nil
	case !o.Paid || o.CalledOff:
		return nil, command.Rejectf("order %q is not to be shipped: paid %t, called off %t", c.Order, o.Paid, o.CalledOff)
	}
	return aggregate.Events(OrderShipped{c.Parcel}), nil
}

// CallOff says that an order will not be shipped.
type CallOff struct{ Order string }

// AggregateID returns the order.
func (c CallOff) AggregateID() string { return c.Order }

// Decide calls off what has not been shipped.
func (c CallOff) Decide(o Order) ([]aggregate.Event, error) {
	switch {
	case o.Shipped:
		return nil, command.Rejectf("order %q is on its way", c.Order)
	case o.CalledOff:
		return nil, nil
	}
	return aggregate.Events(OrderCalledOff{}), nil
}
