package projectiontest_test

import (
	"testing"

	"github.com/deed-go/deed/projection/projectiontest"
)

// A test of a view gives events, stream by stream, and checks rows.
func ExampleFor() {
	_ = func(t *testing.T) { // func TestBooks(t *testing.T)
		projectiontest.For(t, books).
			Given("book", "dune", Borrowed{"Ann"}, Returned{}).
			Given("book", "emma", Borrowed{"Bob"}).
			Row("dune", Book{Times: 1}).
			NoRow("ulysses").
			Rebuilt()
	}
}
