package sqlite

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain lets the test binary play the other process of some tests.
func TestMain(m *testing.M) {
	if path := os.Getenv(crashChild); path != "" {
		fmt.Fprintln(os.Stderr, crashWriter(path, os.Getenv(crashRun)))
		os.Exit(1)
	}
	if path := os.Getenv(secondProcess); path != "" {
		fmt.Println(openElsewhere(path))
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}
