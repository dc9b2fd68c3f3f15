// Package odd has sagas that are written in less usual ways.
package odd

import (
	. "time"

	"github.com/deed-go/deed/saga"
)

type (
	Run        = saga.Run
	code       func(s *Run, in int) (int, error)
	inner      struct{ *saga.Run }
	clock      interface{ Now() Time }
	mine       struct{}
	box[T any] struct{ v T }
)

func (mine) Now() Time { return Now() } // want Now:`time.Now`

func (b box[T]) run(s *saga.Run) Time { return Now() } // want `time.Now in a saga`

func (b *box[T]) pair(other box[T]) (T, Time) { return b.v, helper[T](b.v) }

func helper[T any](T) Time { return Now() }

func _() { _ = Now() }

func init() {
	_ = saga.Define("init", func(s *Run, _ int) (int, error) {
		return Now().Minute(), nil // want `time.Now in a saga`
	})
}

var (
	one, two      = pair()
	dated    code = func(s *Run, _ int) (int, error) {
		return Now().Minute(), nil // want `time.Now in a saga`
	}
	table = map[string]code{
		"a": dated,
		"b": func(*Run, int) (int, error) { return Now().Minute(), nil }, // want `time.Now in a saga`
	}
)

func pair() (func() Time, error) { return Now, nil }

func run[T any](s *Run, in T, c clock, given func() Time) (n int, err error) {
	func() { _ = Now() }() // want `time.Now in a saga`
	defer Sleep(Second)    // want `time.Sleep in a saga`
	with(Now)              // want `time.Now in a saga`
	_ = c.Now()
	_ = given()
	_ = mine{}.Now()     // want `mine.Now in a saga: it comes down to time.Now`
	_ = mine.Now(mine{}) // want `mine.Now in a saga: it comes down to time.Now`
	f := mine{}.Now      // want `mine.Now in a saga: it comes down to time.Now`
	_ = helper(in)       // want `helper in a saga`
	_ = helper[int]      // want `helper in a saga`
	b := &box[T]{v: in}
	_, _ = b.pair(*b) // want `box.pair in a saga`
	_ = Time.Sub
	in2 := inner{s} // want `the run is kept in a value`
	in2.Settled()
	_ = struct{ s *Run }{s}                               // want `the run is kept in a value`
	if n, err = 1, s.Sleep("x", Until(f())); err != nil { // want `time.Until in a saga`
		return 0, err
	}
again:
	for i := range 3 {
		if err := s.Sleep("y", Duration(i)); err != nil {
			continue again
		}
	}
	for step := range steps {
		_ = s.Sleep(step, Second)
	}
	_, _ = two, one
	return saga.Do[int](s, "do", func(ctx saga.Step) (int, error) {
		_ = saga.Define("nested", func(s *Run, _ int) (int, error) {
			return Now().Minute(), s.Sleep("z", Second) // want `time.Now in a saga`
		})
		return Now().Minute(), nil
	})
}

func with(func() Time) {}

func steps(yield func(string) bool) { _ = yield("a") && yield("b") }
