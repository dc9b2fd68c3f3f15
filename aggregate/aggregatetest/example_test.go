package aggregatetest_test

import (
	"testing"

	"github.com/deed-go/deed/aggregate/aggregatetest"
)

// A test of the domain is one sentence.
func ExampleFor() {
	test := func(t *testing.T) {
		aggregatetest.For(t, accounts).
			Given(Opened{"ann"}, Deposited{100}).
			When(Withdraw{"ann", 500}).
			Rejected(ErrInsufficientFunds)

		aggregatetest.For(t, accounts).
			Given(Opened{"ann"}, Deposited{100}).
			When(Withdraw{"ann", 30}).
			Then(&Withdrawn{30})
	}
	_ = test
}
