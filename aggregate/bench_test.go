package aggregate_test

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
)

// run executes b.N deposits by so many callers, spread over the aggregates.
func run(b *testing.B, r *aggregate.Runtime, callers int, ids []string) {
	var n atomic.Int64
	b.ReportAllocs()
	b.ResetTimer()
	done := make(chan struct{})
	for range callers {
		go func() {
			defer func() { done <- struct{}{} }()
			for {
				i := n.Add(1)
				if i > int64(b.N) {
					return
				}
				if _, err := aggregate.Execute(b.Context(), r, accounts, on(ids[int(i)%len(ids)], deposit(1))); err != nil {
					b.Error(err)
					return
				}
			}
		}()
	}
	for range callers {
		<-done
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commands/s")
}

func BenchmarkExecute(b *testing.B) {
	for name, open := range map[string]func(b *testing.B) eventstore.Store{
		"memory": func(b *testing.B) eventstore.Store {
			s := memory.New()
			b.Cleanup(func() { require.NoError(b, s.Close()) })
			return s
		},
		"sqlite": func(b *testing.B) eventstore.Store {
			s, err := sqlite.File(filepath.Join(b.TempDir(), "bench.db")).Open(b.Context())
			require.NoError(b, err)
			b.Cleanup(func() { require.NoError(b, s.(io.Closer).Close()) })
			return s
		},
	} {
		b.Run(name, func(b *testing.B) {
			for _, c := range []struct {
				name                string
				callers, aggregates int
			}{{"hot-1caller", 1, 1}, {"hot-64callers", 64, 1}, {"1000-aggregates-64callers", 64, 1000}} {
				b.Run(c.name, func(b *testing.B) {
					r := aggregate.NewRuntime(open(b), aggregate.Options{})
					b.Cleanup(func() { require.NoError(b, r.Stop(context.WithoutCancel(b.Context()))) })
					ids := make([]string, c.aggregates)
					for i := range ids {
						ids[i] = fmt.Sprintf("account-%d", i)
					}
					run(b, r, c.callers, ids)
				})
			}
		})
	}
}

// BenchmarkDepth shows what the depth of the pipeline is worth: one aggregate,
// 256 callers, every commit durable.
func BenchmarkDepth(b *testing.B) {
	for _, depth := range []int{1, 4, 16, 64, 256} {
		b.Run(fmt.Sprint(depth), func(b *testing.B) {
			s, err := sqlite.File(filepath.Join(b.TempDir(), "bench.db")).Open(b.Context())
			require.NoError(b, err)
			b.Cleanup(func() { require.NoError(b, s.(io.Closer).Close()) })
			r := aggregate.NewRuntime(s, aggregate.Options{PipelineDepth: depth})
			b.Cleanup(func() { require.NoError(b, r.Stop(context.WithoutCancel(b.Context()))) })
			run(b, r, 256, []string{"hot"})
		})
	}
}
