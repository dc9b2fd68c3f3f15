package memory_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/matrix"
	"github.com/deed-go/deed/projection/statetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func harness(testing.TB) storetest.Opener {
	return func() (storetest.Store, error) { return memory.New(), nil }
}

func TestStore(t *testing.T) { storetest.Run(t, harness, matrix.Of("memory")) }

func BenchmarkStore(b *testing.B) { storetest.Benchmark(b, harness) }

func TestState(t *testing.T) {
	statetest.Run(t, func(testing.TB) statetest.Opener {
		return func() (statetest.State, error) { return memory.New(), nil }
	}, statetest.Features{Bubble: true})
}
