// Package clock has sagas that look at the clock.
package clock

import (
	"context"
	"time"

	"github.com/deed-go/deed/saga"
)

type Placed struct{ ID string }

var order = saga.Define("order", func(s *saga.Run, due time.Time) (int, error) {
	if time.Now().After(due) { // want `^time.Now in a saga: it is another time at every replay; use s.Now\(\)$`
		return 0, nil
	}
	_ = time.Since(due)     // want `time.Since in a saga: .* use s.Now\(\)`
	_ = time.Until(due)     // want `time.Until in a saga`
	time.Sleep(time.Second) // want `time.Sleep in a saga: .* use s.Sleep or s.Until`
	now := time.Now         // want `time.Now in a saga`
	defer func() {
		_ = time.NewTimer(time.Second)  // want `time.NewTimer in a saga`
		_ = time.NewTicker(time.Second) // want `time.NewTicker in a saga`
	}()
	_, cancel := context.WithTimeout(context.Background(), time.Second) // want `context.WithTimeout in a saga: .* saga.Within`
	defer cancel()
	age := func() time.Duration { return time.Since(due) } // want `time.Since in a saga`
	_, _ = saga.Local(s, "age", age), age()
	s.OnRollback("undo", func(run *saga.Run) error {
		return run.Until("later", time.Now().Add(time.Hour)) // want `time.Now in a saga: .* use run.Now\(\)`
	})
	return now().Minute(), s.Sleep("wait", time.Until(due)) // want `time.Until in a saga`
}, saga.On(func(p Placed, r saga.Recorded) (string, time.Time) {
	return p.ID, time.Now().Add(time.Hour) // want `^time.Now in the start of a saga: it is another time at every replay; use the time of the event, which is recorded$`
}))

var late = saga.Define("late", run)

func run(_ *saga.Run, due time.Time) (bool, error) {
	return time.Now().After(due), nil // want `time.Now in a saga: .* use s.Now\(\)`
}

var starts = saga.On(start) // want `start in the start of a saga: it comes down to time.Now .* use the time of the event`

func start(p Placed, r saga.Recorded) (string, time.Time) {
	return p.ID, time.Now()
}
