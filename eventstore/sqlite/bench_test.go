package sqlite_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
)

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

// BenchmarkRead reads a log of 100,000 events of 256 bytes in 1,000 streams
// that were written in turn.
func BenchmarkRead(b *testing.B) {
	s, err := sqlite.Open(b.Context(), filepath.Join(b.TempDir(), "log.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	const streams, each = 1000, 100
	name := func(i int) eventstore.Stream { return eventstore.Stream{Category: "order", ID: fmt.Sprint(i)} }
	for range each {
		var c eventstore.Commit
		for i := range streams {
			c.Events = append(c.Events, eventstore.Event{Stream: name(i), Type: "order.changed", Data: make([]byte, 256),
				Metadata: eventstore.Metadata{CorrelationID: "0198f2c1-7f7e-7c3a-9d57-0a3c5d0f9b11"}})
		}
		if _, err := s.Append(b.Context(), c); err != nil {
			b.Fatal(err)
		}
	}
	read := func(b *testing.B, q eventstore.Query, want int) {
		n := 0
		for _, err := range s.Read(b.Context(), q, eventstore.ReadOptions{}) {
			if err != nil {
				b.Fatal(err)
			}
			n++
		}
		if n != want {
			b.Fatalf("%d events, want %d", n, want)
		}
	}
	b.Run("all", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			read(b, eventstore.All(), streams*each)
		}
		b.ReportMetric(float64(b.N)*streams*each/b.Elapsed().Seconds(), "events/s")
	})
	b.Run("stream of 100", func(b *testing.B) {
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			read(b, eventstore.OneStream(name(i%streams)), each)
			i += 7
		}
	})
	b.Run("head of a stream", func(b *testing.B) {
		i := 0
		for b.Loop() {
			for _, err := range s.Read(b.Context(), eventstore.OneStream(name(i%streams)), eventstore.ReadOptions{Backward: true, Limit: 1}) {
				if err != nil {
					b.Fatal(err)
				}
			}
			i += 7
		}
	})
}
