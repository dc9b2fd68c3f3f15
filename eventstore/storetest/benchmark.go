package storetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// payload is the data of a benchmark's event: 256 bytes of JSON.
var payload = []byte(fmt.Sprintf(`{"Note":%q}`, strings.Repeat("x", 256-len(`{"Note":""}`))))

// Benchmark measures what users feel, the same way on every backend: appends
// by 1, 64 and 1,024 writers, large commits, boundary conditions, loading a
// stream of 100 events, replaying a log, and how long a subscriber waits.
//
//	func BenchmarkStore(b *testing.B) { storetest.Benchmark(b, harness) }
func Benchmark(b *testing.B, h Harness) {
	open := func(b *testing.B) (context.Context, Store) {
		store, err := h(b)()
		require.NoError(b, err, "open the store")
		b.Cleanup(func() { _ = store.Close() })
		return b.Context(), store
	}
	for _, writers := range []int{1, 64, 1024} {
		b.Run(fmt.Sprintf("Append/writers=%d", writers), func(b *testing.B) {
			ctx, store := open(b)
			benchmarkWriters(b, writers, 1, func(writer, n int) error {
				of := account(fmt.Sprint(writer))
				_, err := store.Append(ctx, eventstore.Commit{
					Events:     []eventstore.Event{{Stream: of, Type: "noted", Data: payload}},
					Conditions: []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{Version: uint64(n)})},
				})
				return err
			})
		})
	}
	b.Run("Append/events=100", func(b *testing.B) {
		ctx, store := open(b)
		benchmarkWriters(b, 1, 100, func(int, int) error {
			c := eventstore.Commit{}
			for range 100 {
				c.Events = append(c.Events, eventstore.Event{Stream: account("bulk"), Type: "noted", Data: payload})
			}
			_, err := store.Append(ctx, c)
			return err
		})
	})
	b.Run("AppendBoundary/writers=64", func(b *testing.B) {
		ctx, store := open(b)
		probe := eventstore.Commit{Events: events(account("probe"), 1), Conditions: []eventstore.Condition{eventstore.NoneMatch(eventstore.Tagged("probe"), 0)}}
		if _, err := store.Append(ctx, probe); errors.Is(err, errors.ErrUnsupported) {
			b.Skip("the backend has no boundary conditions")
		}
		after := make([]eventstore.Position, 64)
		benchmarkWriters(b, 64, 1, func(writer, _ int) error {
			course, student := fmt.Sprint("course:", writer), fmt.Sprint("student:", writer)
			q := eventstore.Match(eventstore.Item{Types: []string{"enrolled"}, Tags: []string{course}}, eventstore.Item{Types: []string{"enrolled"}, Tags: []string{student}})
			r, err := store.Append(ctx, eventstore.Commit{
				Events:     []eventstore.Event{{Stream: stream("enrolment", fmt.Sprint(writer)), Type: "enrolled", Tags: []string{course, student}, Data: payload}},
				Conditions: []eventstore.Condition{eventstore.NoneMatch(q, after[writer])},
			})
			after[writer] = r.Last
			return err
		})
	})
	b.Run("Load/events=100", func(b *testing.B) {
		ctx, store := open(b)
		const streams = 100
		fill(b, ctx, store, streams, 100)
		n := 0
		b.ReportAllocs()
		for b.Loop() {
			n++
			got := 0
			for _, err := range store.Read(ctx, eventstore.OneStream(account(fmt.Sprint(n*37%streams))), eventstore.ReadOptions{}) {
				if err != nil {
					b.Fatal(err)
				}
				got++
			}
			if got != 100 {
				b.Fatalf("loaded %d of 100 events", got)
			}
		}
	})
	b.Run("Replay/events=50000", func(b *testing.B) {
		ctx, store := open(b)
		fill(b, ctx, store, 500, 100)
		b.ReportAllocs()
		for b.Loop() {
			got := 0
			for _, err := range store.Read(ctx, eventstore.All(), eventstore.ReadOptions{}) {
				if err != nil {
					b.Fatal(err)
				}
				got++
			}
			if got != 50_000 {
				b.Fatalf("replayed %d of 50,000 events", got)
			}
		}
		reportRate(b, 50_000)
	})
	b.Run("CatchUp/events=50000", func(b *testing.B) {
		ctx, store := open(b)
		fill(b, ctx, store, 500, 100)
		b.ReportAllocs()
		for b.Loop() {
			got := 0
			for batch, err := range store.Subscribe(ctx, eventstore.All(), 0) {
				if err != nil {
					b.Fatal(err)
				}
				if got += len(batch.Events); got >= 50_000 {
					break
				}
			}
		}
		reportRate(b, 50_000)
	})
	b.Run("Subscribe/latency", func(b *testing.B) {
		ctx, store := open(b)
		seen, ready := make(chan time.Time, 1), make(chan struct{})
		ended := make(chan struct{})
		subscribed, stop := context.WithCancel(ctx)
		go func() {
			defer close(ended)
			first := true
			for batch, err := range store.Subscribe(subscribed, eventstore.All(), 0) {
				if err != nil {
					return
				}
				if first && batch.CaughtUp {
					first = false
					close(ready)
				}
				if len(batch.Events) > 0 {
					seen <- time.Now()
				}
			}
		}()
		<-ready
		var late time.Duration
		n := 0
		for b.Loop() {
			n++
			if _, err := store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{{Stream: account("a"), Type: "noted", Data: payload}}}); err != nil {
				b.Fatal(err)
			}
			acknowledged := time.Now()
			if at := <-seen; at.After(acknowledged) {
				late += at.Sub(acknowledged)
			}
		}
		b.ReportMetric(float64(late.Nanoseconds())/float64(n), "ns-after-append/op")
		stop()
		<-ended
	})
}

// benchmarkWriters shares the iterations out among writers that all work at
// once; n counts those of one writer.
func benchmarkWriters(b *testing.B, writers, eventsPerOp int, write func(writer, n int) error) {
	b.Helper()
	tickets, failed := make(chan struct{}), make(chan error, writers)
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			n := 0
			for range tickets {
				if err := write(w, n); err != nil {
					failed <- err
					for range tickets { // the benchmark must not wait for a writer that is gone
					}
					return
				}
				n++
			}
		})
	}
	b.ReportAllocs()
	for b.Loop() {
		tickets <- struct{}{}
	}
	reportRate(b, eventsPerOp)
	close(tickets)
	group.Wait()
	close(failed)
	if err := <-failed; err != nil {
		b.Fatal(err)
	}
}

func reportRate(b *testing.B, eventsPerOp int) {
	b.ReportMetric(float64(b.N)*float64(eventsPerOp)/b.Elapsed().Seconds(), "events/s")
}

// fill writes streams of n events each, interleaved.
func fill(b *testing.B, ctx context.Context, store eventstore.Store, streams, n int) {
	b.Helper()
	for range n / 10 {
		for s := range streams {
			var c eventstore.Commit
			for range 10 {
				c.Events = append(c.Events, eventstore.Event{Stream: account(fmt.Sprint(s)), Type: "noted", Data: payload})
			}
			if _, err := store.Append(ctx, c); err != nil {
				b.Fatal(err)
			}
		}
	}
}
