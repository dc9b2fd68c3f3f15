package main

import (
	"context"
	"errors"
	"time"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
)

// patience is how long an order may wait for its parcel.
const patience = 14 * 24 * time.Hour

// ErrNeverShipped is why an order failed that nobody has shipped in time.
var ErrNeverShipped = errors.New("the order was never shipped")

// Receipt is what a checkout comes to.
type Receipt struct{ Charge, Parcel string }

// Shop is what a checkout needs of the world outside. These are plain fields:
// a test gives it others.
type Shop struct {
	Payments interface {
		Charge(ctx context.Context, order, card string, cents int64, key string) (string, error)
		Refund(ctx context.Context, order, key string) error
	}
	Mail interface {
		Send(ctx context.Context, to OrderPlaced, subject, key string) error
	}
}

// checkout is the saga: it starts at every order placed, under the order's id.
func checkout(shop Shop) *saga.Definition[OrderPlaced, Receipt] {
	return saga.Define("checkout", shop.checkout, saga.On(func(e OrderPlaced, r eventstore.Recorded) (string, OrderPlaced) {
		return r.Stream.ID, e
	}))
}

// checkout is read from top to bottom, and runs so: over weeks, through crashes
// and deployments. What it has done is undone when it returns an error.
func (shop Shop) checkout(s *saga.Run, order OrderPlaced) (Receipt, error) {
	id := s.ID()
	s.Publish("stage", "reserving")
	if err := saga.Execute(s, "reserve", stocks, Reserve{order.SKU, id}); err != nil {
		return Receipt{}, err
	}
	s.OnRollback("release", func(s *saga.Run) error {
		return saga.Execute(s, "release", stocks, Release{order.SKU, id})
	})

	s.Publish("stage", "charging")
	// Before the charge: one whose answer is lost has failed, and may have happened.
	s.OnRollback("refund", func(s *saga.Run) error { return shop.refund(s) })
	charge, err := saga.Do(s, "charge", func(ctx saga.Step) (string, error) {
		return shop.Payments.Charge(ctx, id, order.Card, order.Cents, ctx.IdempotencyKey())
	}, saga.Retry(10), saga.Within(30*time.Second), saga.Overall(time.Hour))
	if err != nil {
		return Receipt{}, err
	}
	if s.Version("confirmation", 1) >= 1 { // runs that were past this place before it was there do without
		if err := shop.mail(s, "confirm", order, "We have your order"); err != nil {
			return Receipt{}, err
		}
	}
	if err := saga.Execute(s, "pay", orders, Pay{id, charge}); err != nil {
		return Receipt{}, err
	}

	s.Publish("stage", "waiting for the parcel")
	parcel, err := shipment(s)
	if err != nil {
		return Receipt{}, err
	}
	s.Settled() // it is on its way: from here on nothing is taken back
	s.Publish("stage", "shipped")
	return Receipt{charge, parcel}, shop.mail(s.Detached(), "thank", order, "Your parcel is on its way")
}

// shipment waits until the order is shipped, or calls it off when that takes
// too long or the customer has cancelled. It may be shipped at that very moment;
// the order says which came first.
func shipment(s *saga.Run) (parcel string, err error) {
	shipped, err := saga.Await[OrderShipped](s, saga.Where(s.ID()), patience)
	if err == nil {
		return shipped.Parcel, nil
	}
	if errors.Is(err, saga.ErrTimeout) {
		err = ErrNeverShipped
	}
	s = s.Detached() // goes on although the run is cancelled
	switch off := saga.Execute(s, "call off", orders, CallOff{s.ID()}); {
	case off == nil:
		return "", err
	case !command.IsRejection(off):
		return "", off
	}
	shipped, err = saga.Await[OrderShipped](s, saga.Where(s.ID()), 0) // it is there
	return shipped.Parcel, err
}

// refund gives back what the order was charged, if it was.
func (shop Shop) refund(s *saga.Run) error {
	id := s.ID()
	_, err := saga.Do(s, "refund", func(ctx saga.Step) (struct{}, error) {
		return struct{}{}, shop.Payments.Refund(ctx, id, ctx.IdempotencyKey())
	}, saga.Within(30*time.Second))
	return err
}

// mail writes to the customer, as often as it takes.
func (shop Shop) mail(s *saga.Run, name string, order OrderPlaced, subject string) error {
	_, err := saga.Do(s, name, func(ctx saga.Step) (struct{}, error) {
		return struct{}{}, shop.Mail.Send(ctx, order, subject, ctx.IdempotencyKey())
	}, saga.Within(time.Minute))
	return err
}
