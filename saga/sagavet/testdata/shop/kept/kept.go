// Package kept has sagas that hold on to the run, or use it in steps.
package kept

import (
	"time"

	"github.com/deed-go/deed/saga"
)

var last *saga.Run

type flow struct {
	s    *saga.Run
	runs map[string]*saga.Run
}

func run(s *saga.Run, _ int) (int, error) {
	last = s         // want `^the run is kept in last: it is good for this one call of the function; pass it to functions as a parameter$`
	f := &flow{s: s} // want `the run is kept in a value`
	f.s = s          // want `the run is kept in f.s`
	f.runs["x"] = s  // want `the run is kept in f.runs\["x"\]`
	_ = s
	again := s
	return saga.Do(again, "outer", func(saga.Step) (int, error) {
		if s.Now().IsZero() { // want `the run is used inside a step: steps do not nest`
			return len(s.ID()), s.Sleep("x", time.Second) // want `the run is used inside a step`
		}
		inner := func() (int, error) {
			return saga.Do(again, "inner", func(saga.Step) (int, error) { return 1, nil }) // want `the run is used inside a step`
		}
		return inner()
	})
}

func branches(s *saga.Run, _ int) (int, error) {
	own := func(b *saga.Run) error {
		b.OnRollback("x", func(*saga.Run) error {
			return b.Sleep("x", time.Second) // want `the run of the surroundings is used`
		})
		return b.Sleep(s.ID(), time.Second)
	}
	list := []func(*saga.Run) error{own}
	for range 3 {
		list = append(list, func(b *saga.Run) error {
			wait := func() error { return s.Sleep("x", time.Second) } // want `^the run of the surroundings is used in a function that is given one: a branch uses no run but its own$`
			return wait()
		})
	}
	s.OnRollback("both", func(*saga.Run) error { return s.Sleep("x", time.Second) })
	return saga.Race(s, "both", append(list, func(*saga.Run) error {
		_, err := saga.Do(s, "x", func(saga.Step) (int, error) { return 0, nil }) // want `the run of the surroundings is used`
		return err
	})...)
}

func local() *saga.Definition[int, int] {
	var captured *saga.Run
	defer func() { captured.Settled() }()
	return saga.Define("local", func(s *saga.Run, _ int) (int, error) {
		captured = s                                // want `the run is kept in captured`
		step := func() time.Time { return s.Now() } // want `the run is used inside a step`
		return saga.Local(s, "now", step).Minute(), nil
	})
}
