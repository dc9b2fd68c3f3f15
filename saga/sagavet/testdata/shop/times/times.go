// Package times has functions that look at the clock, for sagas elsewhere.
package times

import (
	"fmt"
	"time"

	"github.com/google/uuid"
)

func Stamp() string { // want Stamp:`it comes down to time.Now \(times.go:24\) by way of now`
	return fmt.Sprint(now())
}

// Now can be replaced in tests.
var Now = time.Now // want Now:`it comes down to time.Now \(times.go:\d+\)`

type Clock struct{ Zone string }

func (c *Clock) Read() time.Time { return now() } // want Read:`by way of now`

func (c Clock) Name() string { return c.Zone }

func now() time.Time { return time.Now() }

// Even and Odd call each other, and in the end the clock.
func Even(n int) bool { // want Even:`it comes down to time.Since \(times.go:\d+\) by way of Odd`
	if n == 0 {
		return true
	}
	return Odd(n - 1)
}

func Odd(n int) bool { // want Odd:`comes down to time.Since`
	if n == 0 {
		return time.Since(time.Time{}) > 0
	}
	return Even(n - 1)
}

// Up and Down call each other for nothing.
func Up(n int) int {
	if n == 0 {
		return 0
	}
	return Down(n - 1)
}

func Down(n int) int { return Up(n) + Down(n) }

// Generic is one for all types.
func Generic[T any](v T) (T, time.Time) { return v, Now() } // want Generic:`by way of Now`

type Box[T any] struct{ v T }

func (b Box[T]) Open() (T, string) { return b.v, uuid.NewString() } // want Open:`comes down to uuid.NewString`

//deed:deterministic only the log shows it
func Trusted() time.Time { return time.Now() }

func Half() time.Time {
	//deed:deterministic thrown away
	return time.Now()
}

func A() int { return b() } // want A:`it comes down to time.Now \(times.go:\d+\) by way of b, c, …, e, f`
func b() int { return c() }
func c() int { return d() }
func d() int { return e() }
func e() int { return f() }
func f() int { return time.Now().Minute() }
