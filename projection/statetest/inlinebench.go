package statetest

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// BenchmarkInline measures what an inline view costs the appends: one event a
// commit, with its expected version, by 1 and 64 writers, without a view, with one
// that follows the log, and with one that is inline.
func BenchmarkInline(b *testing.B, open func(t testing.TB) InlineStore) {
	for _, writers := range []int{1, 64} {
		for _, kind := range []string{"none", "async", "inline"} {
			b.Run(fmt.Sprintf("writers=%d/view=%s", writers, kind), func(b *testing.B) {
				store := open(b)
				defer func() { require.NoError(b, store.Close()) }()
				switch kind {
				case "async":
					defer runInline(b, store, followers("sums", nil)).stop()
				case "inline":
					n := runInline(b, store, sums("sums", nil))
					defer n.stop()
					n.awaitInline(b)
				}
				var left atomic.Int64
				left.Store(int64(b.N))
				var group sync.WaitGroup
				b.ReportAllocs()
				b.ResetTimer()
				for w := range writers {
					group.Go(func() {
						stream := eventstore.Stream{Category: "sum", ID: fmt.Sprint("w", w)}
						for n := uint64(0); left.Add(-1) >= 0; n++ {
							c := commitOf(added(stream.ID, 1))
							c.Conditions = []eventstore.Condition{eventstore.StreamAt(stream, eventstore.Revision{Version: n})}
							if _, err := store.Append(context.Background(), c); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				group.Wait()
				b.StopTimer()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "appends/s")
			})
		}
	}
}
