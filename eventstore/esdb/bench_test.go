package esdb_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// BenchmarkAppend is one event a commit, by many writers to streams of their own.
func BenchmarkAppend(b *testing.B) {
	for _, writers := range []int{1, 32} {
		b.Run(fmt.Sprintf("%d writers a processor", writers), func(b *testing.B) {
			at, options := url(b)
			store := open(b, at, options...)
			var n atomic.Int64
			b.ReportAllocs()
			b.SetParallelism(writers)
			b.RunParallel(func(pb *testing.PB) {
				c := happened(1)
				c.Events[0].Stream.ID = fmt.Sprint(n.Add(1))
				for version := uint64(0); pb.Next(); version++ {
					c.Conditions = []eventstore.Condition{eventstore.StreamAt(c.Events[0].Stream, eventstore.Revision{Version: version})}
					if _, err := store.Append(b.Context(), c); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// BenchmarkLoad reads a stream of 100 events.
func BenchmarkLoad(b *testing.B) {
	at, options := url(b)
	store := open(b, at, options...)
	_, err := store.Append(b.Context(), happened(100))
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		got, err := collect(store, b.Context(), eventstore.OneStream(ann), eventstore.ReadOptions{})
		require.NoError(b, err)
		require.Len(b, got, 100)
	}
}
