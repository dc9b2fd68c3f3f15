package memory_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStore(t *testing.T) {
	features := storetest.Full()
	features.Reopen = false
	storetest.Run(t, func(testing.TB) storetest.Opener {
		return func() (storetest.Store, error) { return memory.New(), nil }
	}, features)
}
