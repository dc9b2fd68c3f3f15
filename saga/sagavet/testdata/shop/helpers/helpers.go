// Package helpers has sagas that call functions, here and elsewhere.
package helpers

import (
	"slices"
	"sync"
	"time"

	"example.com/shop/times"
	"example.org/ids"
	"github.com/deed-go/deed/saga"
)

var locks sync.Mutex

var today = func() string { return time.Now().Weekday().String() }

var order = saga.Define("order", func(s *saga.Run, in string) (string, error) {
	_ = stamp(in)                     // want `^stamp in a saga: it comes down to time.Now \(helpers.go:\d+\), and that is another time at every replay; give it s.Now\(\) as an argument, or record what it returns as a step, with saga.Local$`
	_ = deeper(in)                    // want `^deeper in a saga: it comes down to time.Now \(helpers.go:\d+\) by way of stamp, and that`
	_ = today()                       // want `today in a saga: it comes down to time.Now \(helpers.go:\d+\)`
	_ = ping(3)                       // want `ping in a saga: it comes down to time.Sleep \(helpers.go:\d+\) by way of pong`
	_ = fork()                        // want `fork in a saga: it comes down to a go statement`
	_ = wait(nil)                     // want `wait in a saga: it comes down to a receive from a channel`
	_ = (&box{}).open()               // want `box.open in a saga`
	slices.SortFunc([]string{in}, by) // want `by in a saga`

	_ = times.Stamp()           // want `^times.Stamp in a saga: it comes down to time.Now \(times.go:\d+\) by way of now, and that`
	_ = times.Now()             // want `times.Now in a saga`
	_ = (&times.Clock{}).Read() // want `times.Clock.Read in a saga`
	_ = times.Clock{}.Name()
	_ = times.Even(1) // want `times.Even in a saga`
	_ = times.Up(1)
	_, _ = times.Generic(1)        // want `times.Generic in a saga`
	_, _ = times.Generic[any](1)   // want `times.Generic in a saga`
	_, _ = times.Box[int]{}.Open() // want `times.Box.Open in a saga`
	_ = times.Trusted()
	_ = times.Half()

	_ = ids.Next() // want `ids.Next in a saga: it comes down to rand.Int \(ids.go:\d+\) by way of number`
	_ = ids.Name()
	_ = ids.Sum(1, 2)
	ids.Log(in)

	pure(in)
	guarded()
	made()
	if err := given(s); err != nil {
		return "", err
	}
	return saga.Local(s, "stamp", func() string { return stamp(in) }), nil
}, saga.On(func(in string, _ saga.Recorded) (string, string) {
	return stamp(in), in // want `^stamp in the start of a saga: .* use the time of the event`
}))

// given is the saga's code too.
func given(s *saga.Run) error {
	_ = time.Now() // want `time.Now in a saga`
	return s.Sleep("x", time.Second)
}

func stamp(in string) string { return in + time.Now().String() }

func deeper(in string) string { return stamp(in) }

func ping(n int) int { return pong(n - 1) }

func pong(n int) int {
	if n > 0 {
		return ping(n)
	}
	time.Sleep(time.Second)
	return 0
}

func fork() (n int) {
	go func() { n++ }()
	return n
}

func wait(done chan int) int { return <-done }

type box struct{}

func (*box) open() string { return deeper("x") }

func by(a, b string) int { return time.Now().Minute() }

func pure(in string) string { return in + time.Unix(0, 0).String() }

// made makes a saga, whose code is not its own.
func made() *saga.Definition[int, int] {
	return saga.Define("made", func(s *saga.Run, in int) (int, error) {
		return saga.Do(s, "x", func(saga.Step) (int, error) { return time.Now().Minute(), nil })
	})
}

func guarded() {
	locks.Lock()
	defer locks.Unlock()
}
