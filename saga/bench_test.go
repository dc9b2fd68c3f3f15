package saga_test

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/saga"
)

// backends are the stores that the tests and benchmarks of the engine run on.
var backends = []struct {
	name string
	open func(t testing.TB) backend
}{
	{"memory", func(testing.TB) backend { return memory.New() }},
	{"sqlite", func(t testing.TB) backend {
		s, err := sqlite.Open(context.Background(), filepath.Join(t.TempDir(), "log.db"))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		return s
	}},
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkTimers runs sagas that wait sixty days and then execute a command:
// one iteration is one saga, from its trigger to its end.
func BenchmarkTimers(b *testing.B) {
	def := saga.Define("grace", func(s *saga.Run, sku string) (struct{}, error) {
		if err := s.Sleep("grace", 60*day); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, saga.Execute(s, "fill", stocks, Fill{s.ID(), 1})
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
	for _, backend := range backends {
		b.Run(backend.name, func(b *testing.B) {
			bench := startBench(b, backend.open(b), clock.NewManual(t0), saga.Options{}, def)
			b.ReportAllocs()
			b.ResetTimer()
			before := cpuTime()
			const perCommit = 100
			for from := 0; from < b.N; from += perCommit {
				var events []eventstore.Event
				for i := from; i < min(from+perCommit, b.N); i++ {
					events = append(events, eventstore.Event{
						Stream: eventstore.Stream{Category: "order", ID: fmt.Sprintf("o%d", i)}, Type: "order.placed", Data: []byte(`{"SKU":"book"}`), Time: t0,
					})
				}
				_, err := bench.store.Append(b.Context(), eventstore.Commit{Events: events})
				require.NoError(b, err)
			}
			bench.settle()
			bench.advance(61 * day)
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sagas/s")
			b.ReportMetric(float64((cpuTime()-before).Microseconds())/float64(b.N), "cpu-us/saga")
			info, err := saga.Look(b.Context(), bench.engine, def, fmt.Sprintf("o%d", b.N-1))
			require.NoError(b, err)
			require.Equal(b, saga.StatusCompleted, info.Status)
		})
	}
}

// BenchmarkDue fires timers that are all due at the same instant, of runs that
// are not in memory: one iteration is one run, from there to its end.
func BenchmarkDue(b *testing.B) {
	for _, backend := range backends {
		b.Run(backend.name, func(b *testing.B) {
			bench := startBench(b, backend.open(b), clock.NewManual(t0), saga.Options{}, alarm())
			parkTimers(b, bench.store, b.N, func(int) time.Time { return t0.Add(day) })
			bench.settle()
			_, err := bench.engine.List(b.Context(), "alarm", saga.ListOptions{Limit: 1})
			require.NoError(b, err)
			require.Zero(b, bench.engine.InMemory("alarm"))
			b.ReportAllocs()
			b.ResetTimer()
			before := cpuTime()
			bench.clock.Set(t0.Add(day))
			awaitEnded(b, bench.store, b.N)
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "fires/s")
			b.ReportMetric(float64((cpuTime()-before).Microseconds())/float64(b.N), "cpu-us/fire")
		})
	}
}

// BenchmarkSteps runs sagas of three steps, started by 64 callers that wait for
// the result.
func BenchmarkSteps(b *testing.B) {
	nothing := func(saga.Step) (int, error) { return 1, nil }
	def := saga.Define("three", func(s *saga.Run, _ int) (int, error) {
		sum := 0
		for _, name := range []string{"one", "two", "three"} {
			n, err := saga.Do(s, name, nothing)
			if err != nil {
				return 0, err
			}
			sum += n
		}
		return sum, nil
	})
	for _, backend := range backends {
		b.Run(backend.name, func(b *testing.B) {
			bench := startBench(b, backend.open(b), clock.NewManual(t0), saga.Options{Logger: slog.New(slog.DiscardHandler)}, def)
			b.ReportAllocs()
			b.ResetTimer()
			before := cpuTime()
			var next atomic.Int64
			var group sync.WaitGroup
			for range 64 {
				group.Go(func() {
					for {
						i := next.Add(1)
						if i > int64(b.N) {
							return
						}
						id := fmt.Sprintf("r%d", i)
						if err := saga.Start(b.Context(), bench.engine, def, id, 0); err != nil {
							b.Error(err)
							return
						}
						if out, err := saga.Wait(b.Context(), bench.engine, def, id); err != nil || out != 3 {
							b.Error(out, err)
							return
						}
					}
				})
			}
			group.Wait()
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sagas/s")
			b.ReportMetric(float64((cpuTime()-before).Microseconds())/float64(b.N), "cpu-us/saga")
		})
	}
}
