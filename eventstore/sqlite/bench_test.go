package sqlite_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/eventstore/storetest"
)

func BenchmarkStore(b *testing.B) { storetest.Benchmark(b, harness()) }

// BenchmarkAppend appends events of 256 bytes, each with its expected version
// and to one of the writer's streams of 20, durably.
func BenchmarkAppend(b *testing.B) {
	for _, writers := range []int{1, 16, 64, 256, 1024} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			s, err := sqlite.Open(b.Context(), filepath.Join(b.TempDir(), "log.db"))
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = s.Close() }()
			data := make([]byte, 256)
			metadata := eventstore.Metadata{CorrelationID: "0198f2c1-7f7e-7c3a-9d57-0a3c5d0f9b11"}
			var left atomic.Int64
			left.Store(int64(b.N))
			var group sync.WaitGroup
			b.ReportAllocs()
			b.ResetTimer()
			for w := range writers {
				group.Go(func() {
					for n := uint64(0); left.Add(-1) >= 0; n++ {
						stream := eventstore.Stream{Category: "order", ID: fmt.Sprintf("%d-%d", w, n/20)}
						_, err := s.Append(b.Context(), eventstore.Commit{
							Events:     []eventstore.Event{{Stream: stream, Type: "order.changed", Data: data, Metadata: metadata}},
							Conditions: []eventstore.Condition{eventstore.StreamAt(stream, eventstore.Revision{Version: n % 20})},
						})
						if err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			group.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}
