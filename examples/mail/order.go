package main

import (
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
)

// OrderPlaced is what the mail is sent for.
type OrderPlaced struct{ Name, Email string }

// EventType names the stored event.
func (OrderPlaced) EventType() string { return "order.placed" }

// Order is what decisions about an order need to know.
type Order struct{ Placed bool }

var orders = aggregate.Define("order",
	aggregate.On(func(o *Order, _ OrderPlaced) { o.Placed = true }),
)

// Place places an order, once.
type Place struct{ Order, Name, Email string }

// AggregateID returns the order.
func (c Place) AggregateID() string { return c.Order }

// Validate refuses what no mail could be sent to.
func (c Place) Validate() error {
	if c.Email == "" {
		return command.Rejectf("order %q has no e-mail address", c.Order)
	}
	return nil
}

// Decide places the order if it is not there yet.
func (c Place) Decide(o Order) ([]aggregate.Event, error) {
	if o.Placed {
		return nil, nil
	}
	return aggregate.Events(OrderPlaced{c.Name, c.Email}), nil
}
