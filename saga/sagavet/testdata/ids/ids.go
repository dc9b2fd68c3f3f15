// Package ids is somebody else's library: a module with a version.
package ids

import (
	"math/rand/v2"
	"os"
	"time"
)

// Next is another one each time.
func Next() int { return number() }

func number() int { return rand.Int() }

// Log looks at the clock, and tells nobody.
func Log(string) { _ = time.Now() }

// Name is read from the machine, as a library does at its own risk.
func Name() string { return os.Getenv("NAME") }

// Sum has a goroutine of its own, and the same result each time.
func Sum(numbers ...int) int {
	sum := make(chan int)
	go func() {
		total := 0
		for _, n := range numbers {
			total += n
		}
		sum <- total
	}()
	return <-sum
}
