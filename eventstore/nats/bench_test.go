package nats

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/natsserver"
)

func benchServers(b *testing.B, nodes int) *natsserver.Cluster {
	b.Helper()
	c, err := natsserver.Start(natsserver.Options{Nodes: nodes, Directory: b.TempDir(), SyncAlways: true})
	require.NoError(b, err)
	b.Cleanup(c.Close)
	return c
}

func Benchmark(b *testing.B) { storetest.Benchmark(b, harness(benchServers(b, 1))) }

// together runs b.N operations by the writers.
func together(b *testing.B, writers int, op func(w, n int) error) {
	b.Helper()
	var next atomic.Int64
	var all sync.WaitGroup
	b.ReportAllocs()
	b.ResetTimer()
	for w := range writers {
		all.Go(func() {
			for n := 0; next.Add(1) <= int64(b.N); n++ {
				if err := op(w, n); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
}

// BenchmarkAppend compares the store with plain publishing, every write synced:
// each writer has a stream of its own and says what its last sequence must be.
func BenchmarkAppend(b *testing.B) {
	data := make([]byte, 256)
	for _, nodes := range []int{1, 3} {
		for _, writers := range []int{1, 64, 1024} {
			b.Run(fmt.Sprintf("R%d/%d/plain", nodes, writers), func(b *testing.B) {
				c := benchServers(b, nodes)
				conn, err := c.Connect()
				require.NoError(b, err)
				defer conn.Close()
				js, err := jetstream.New(conn)
				require.NoError(b, err)
				_, err = js.CreateStream(b.Context(), Config("plain", nodes, "x"))
				require.NoError(b, err)
				lasts := make([]uint64, writers)
				together(b, writers, func(w, n int) error {
					for {
						ack, err := js.PublishMsg(b.Context(), &client.Msg{Subject: fmt.Sprintf("plain.0.a.%d", w), Data: data}, jetstream.WithExpectLastSequencePerSubject(lasts[w]))
						if refused, ok := errors.AsType[*jetstream.APIError](err); ok && refused.ErrorCode == codeWrongSequenceConstant {
							pause(b.Context(), 100*time.Microsecond) // the last one is acknowledged but not applied
							continue
						}
						if err == nil {
							lasts[w] = ack.Sequence
						}
						return err
					}
				})
			})
			b.Run(fmt.Sprintf("R%d/%d/store", nodes, writers), func(b *testing.B) {
				store, _ := openLog(b, benchServers(b, nodes))
				together(b, writers, func(w, n int) error {
					of := account(fmt.Sprint(w))
					_, err := store.Append(b.Context(), eventstore.Commit{
						Events:     []eventstore.Event{{Stream: of, Type: "thing.happened", Data: data}},
						Conditions: []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{Version: uint64(n)})},
					})
					return err
				})
			})
		}
	}
}

// BenchmarkLoad reads streams of 100 events that lie 1,000 messages apart, by
// pointers and by an ordered consumer.
func BenchmarkLoad(b *testing.B) {
	const streams, each = 1000, 100
	c, err := natsserver.Start(natsserver.Options{Directory: b.TempDir()})
	require.NoError(b, err)
	defer c.Close()
	store, name := openLog(b, c)
	var all sync.WaitGroup
	for w := range 4 {
		all.Go(func() {
			for n := range each {
				var commit eventstore.Commit
				for k := w; k < streams; k += 4 {
					commit.Events = append(commit.Events, eventstore.Event{Stream: account(fmt.Sprint(k)), Type: "thing.happened", Data: make([]byte, 256)})
				}
				if _, err := store.Append(b.Context(), commit); err != nil {
					b.Errorf("commit %d: %v", n, err)
				}
			}
		})
	}
	all.Wait()
	for _, readers := range []int{1, 16} {
		b.Run(fmt.Sprintf("pointers/%d", readers), func(b *testing.B) {
			loads(b, readers, func(ctx context.Context, of eventstore.Stream) (n int, err error) {
				for _, e := range store.Read(ctx, eventstore.OneStream(of), eventstore.ReadOptions{}) {
					if n++; e != nil {
						return n, e
					}
				}
				return n, nil
			})
		})
		b.Run(fmt.Sprintf("consumer/%d", readers), func(b *testing.B) {
			loads(b, readers, func(ctx context.Context, of eventstore.Stream) (n int, err error) {
				consumer, err := store.js.OrderedConsumer(ctx, name, jetstream.OrderedConsumerConfig{FilterSubjects: []string{store.subjects.of(of)}})
				if err != nil {
					return 0, err
				}
				batch, err := consumer.FetchNoWait(2 * each)
				if err != nil {
					return 0, err
				}
				for range batch.Messages() {
					n++
				}
				return n, batch.Error()
			})
		})
	}
}

func loads(b *testing.B, readers int, load func(context.Context, eventstore.Stream) (int, error)) {
	together(b, readers, func(w, n int) error {
		got, err := load(b.Context(), account(fmt.Sprint((w*37+n*11)%1000)))
		if err == nil && got != 100 {
			err = fmt.Errorf("%d events of 100", got)
		}
		return err
	})
	runtime.KeepAlive(readers)
}
