// Package shop has two sagas on the real package saga: one that does the same at
// every replay, and one that does not.
package shop

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

type Placed struct {
	ID    string
	Lines map[string]int
	At    time.Time
}

func (Placed) EventType() string { return "order.placed" }

var paid = saga.NewSignal[time.Time]("paid")

func start(e Placed, r eventstore.Recorded) (string, Placed) {
	e.At = r.Time
	return r.Stream.ID, e
}

var Same = saga.Define("same", func(s *saga.Run, in Placed) (string, error) {
	number := saga.Local(s, "number", func() int { return rand.IntN(100) })
	s.OnRollback("refund", func(s *saga.Run) error {
		_, err := saga.Once(s, "refund", func(saga.Step) (time.Time, error) { return time.Now(), nil })
		return err
	})
	if _, err := saga.Tx(s, "row", func(step saga.Step, tx projection.Tx) (time.Time, error) {
		return time.Now(), nil
	}); err != nil {
		return "", err
	}
	var branches []func(*saga.Run) error
	for _, sku := range slices.Sorted(maps.Keys(in.Lines)) {
		branches = append(branches, func(b *saga.Run) error {
			_, err := saga.Do(b, "reserve "+sku, func(ctx saga.Step) (string, error) {
				return fmt.Sprint(s.ID(), sku, time.Now()), nil
			})
			return err
		})
	}
	if err := saga.All(s, "reserve", branches...); err != nil {
		return "", err
	}
	_, err := saga.Race(s, "paid or late",
		func(b *saga.Run) error { _, err := paid.Wait(b, 0); return err },
		func(b *saga.Run) error {
			return errors.Join(b.Until("late", b.Now().Add(time.Hour)), saga.Terminal(errors.New("late")))
		})
	return fmt.Sprint(number), err
}, saga.On(start))

var Other = saga.Define("other", func(s *saga.Run, in Placed) (string, error) {
	for sku := range in.Lines {
		if _, err := saga.Once(s, sku, func(saga.Step) (int, error) { return 0, s.Sleep("x", time.Second) }); err != nil {
			return "", err
		}
	}
	return today(), s.Until("later", time.Now())
}, saga.On(func(e Placed, r eventstore.Recorded) (string, Placed) {
	e.At = time.Now()
	return e.ID, e
}))

func today() string { return time.Now().Weekday().String() }
