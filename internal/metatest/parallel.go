package metatest

import (
	"flag"
	"os"
	"runtime"
	"testing"
)

// Raced reports whether the race detector is on, under which everything takes many
// times as long.
func Raced() bool { return race }

// NotRaced skips, under the race detector, what has nothing for it, or nothing that
// other tests have not, and takes long.
func NotRaced(t testing.TB) {
	if race {
		t.Skip("under the race detector it takes long, and shows no more than others: run it without")
	}
}

// AtOnce lets so many tests run at once, where there are fewer processors, of a
// package whose tests mostly wait for servers. Call it in TestMain, before the tests
// run; the flag -parallel comes first. It does nothing under the race detector, where
// they work more than they wait, and in the long run, whose tests wait for less.
func AtOnce(tests string) {
	if !race && os.Getenv("DEED_TEST_LONG") == "" && runtime.GOMAXPROCS(0) < 4 {
		_ = flag.Set("test.parallel", tests) // only a number can be refused
	}
}
