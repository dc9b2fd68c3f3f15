package postgres

import (
	"testing"

	"github.com/deed-go/deed/eventstore/storetest"
)

func BenchmarkStore(b *testing.B) { storetest.Benchmark(b, harness()) }
