package logreader_test

import (
	"context"
	"fmt"
	"iter"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/logreader"
)

// BenchmarkSubscribe is subscribers that read a log of 50,000 events from its
// beginning, at once: each by itself, and all through one reader.
func BenchmarkSubscribe(b *testing.B) {
	const events = 50_000
	file, err := sqlite.Open(b.Context(), filepath.Join(b.TempDir(), "log.db"))
	require.NoError(b, err)
	defer file.Close()
	for name, store := range map[string]eventstore.Store{"memory": memory.New(), "sqlite": file} {
		head := fill(b, store, events, "a")
		for _, subscribers := range []int{1, 10} {
			for _, how := range []string{"alone", "shared"} {
				b.Run(fmt.Sprintf("%s/%d/%s", name, subscribers, how), func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						subscribe := store.Subscribe
						if how == "shared" {
							subscribe = logreader.New(store, logreader.Options{}).Subscribe
						}
						var all sync.WaitGroup
						for range subscribers {
							all.Go(func() { drain(b, subscribe, head) })
						}
						all.Wait()
					}
					b.ReportMetric(float64(subscribers*events)*float64(b.N)/b.Elapsed().Seconds(), "events/s")
				})
			}
		}
	}
}

func drain(b *testing.B, subscribe func(context.Context, eventstore.Query, eventstore.Position) iter.Seq2[eventstore.Batch, error], head eventstore.Position) {
	n := 0
	for batch, err := range subscribe(b.Context(), eventstore.OfTypes("a"), 0) {
		if err != nil {
			b.Error(err)
			return
		}
		if n += len(batch.Events); batch.Through == head {
			break
		}
	}
	if n != int(head) {
		b.Errorf("%d events of %d", n, head)
	}
}

// BenchmarkLive is one event at a time, from the append to ten subscribers.
func BenchmarkLive(b *testing.B) {
	const subscribers = 10
	for _, how := range []string{"alone", "shared"} {
		b.Run(how, func(b *testing.B) {
			store := memory.New()
			subscribe := store.Subscribe
			if how == "shared" {
				subscribe = logreader.New(store, logreader.Options{}).Subscribe
			}
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			seen := make(chan struct{}, subscribers)
			var all sync.WaitGroup
			for range subscribers {
				all.Go(func() {
					for _, err := range subscribe(ctx, eventstore.All(), 0) {
						if err != nil {
							return
						}
						seen <- struct{}{}
					}
				})
			}
			for range subscribers {
				<-seen // it has caught up
			}
			b.ReportAllocs()
			for b.Loop() {
				put(b, store, event("account", "ann", "a"))
				for range subscribers {
					<-seen
				}
			}
			cancel()
			all.Wait()
		})
	}
}
