package postgres

import (
	"fmt"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/pgtest"
)

func BenchmarkStore(b *testing.B) { storetest.Benchmark(b, harness()) }

// BenchmarkReads compares reading through the store with what one would write
// by hand with pgx on the same table.
func BenchmarkReads(b *testing.B) {
	const streams, each = 1000, 100
	url := pgtest.Database(b)
	s, err := Open(b.Context(), url)
	require.NoError(b, err)
	b.Cleanup(func() { _ = s.Close() })
	payload := fmt.Appendf(nil, `{"Note":"%0247d"}`, 0)
	stream := func(i int) eventstore.Stream { return eventstore.Stream{Category: "account", ID: fmt.Sprint(i)} }
	for range each / 10 {
		for i := range streams {
			c := eventstore.Commit{}
			for range 10 {
				c.Events = append(c.Events, eventstore.Event{Stream: stream(i), Type: "noted", Data: payload})
			}
			s.Enqueue(b.Context(), c)
		}
	}
	_, err = s.Append(b.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: stream(streams), Type: "noted", Data: payload}}})
	require.NoError(b, err)
	pool, err := pgxpool.New(b.Context(), url)
	require.NoError(b, err)
	b.Cleanup(pool.Close)
	_, err = pool.Exec(b.Context(), "VACUUM ANALYZE deed.events")
	require.NoError(b, err)

	scan := func(b *testing.B, rows pgx.Rows) int {
		n := 0
		for rows.Next() {
			var e struct {
				position, version, time int64
				kind                    int32
				id                      uuid.UUID
				stream                  string
				tags                    []string
				metadata                *string
				data                    []byte
			}
			require.NoError(b, rows.Scan(&e.position, &e.version, &e.kind, &e.time, &e.id, &e.stream, &e.tags, &e.metadata, &e.data))
			n++
		}
		require.NoError(b, rows.Err())
		return n
	}
	b.Run("Load/pgx", func(b *testing.B) {
		n := 0
		for b.Loop() {
			n++
			rows, err := pool.Query(b.Context(), "SELECT "+columns+" FROM deed.events e WHERE stream = $1 ORDER BY version", stream(n*37%streams).String())
			require.NoError(b, err)
			require.Equal(b, each, scan(b, rows))
		}
	})
	b.Run("Load/deed", func(b *testing.B) {
		n := 0
		for b.Loop() {
			n++
			got := 0
			for _, err := range s.Read(b.Context(), eventstore.OneStream(stream(n*37%streams)), eventstore.ReadOptions{}) {
				require.NoError(b, err)
				got++
			}
			require.Equal(b, each, got)
		}
	})
	b.Run("Replay/pgx", func(b *testing.B) {
		for b.Loop() {
			for after := 0; ; after += 10_000 {
				rows, err := pool.Query(b.Context(), "SELECT "+columns+" FROM deed.events e WHERE position > $1 ORDER BY position LIMIT 10000", after)
				require.NoError(b, err)
				if scan(b, rows) < 10_000 {
					break
				}
			}
		}
		b.ReportMetric(float64(b.N)*streams*each/b.Elapsed().Seconds(), "events/s")
	})
	b.Run("Replay/deed", func(b *testing.B) {
		for b.Loop() {
			got := 0
			for _, err := range s.Read(b.Context(), eventstore.All(), eventstore.ReadOptions{}) {
				if err != nil {
					b.Fatal(err)
				}
				got++
			}
			require.Equal(b, streams*each+1, got)
		}
		b.ReportMetric(float64(b.N)*streams*each/b.Elapsed().Seconds(), "events/s")
	})
}

// BenchmarkForms compares the forms of writing, when nobody else writes.
func BenchmarkForms(b *testing.B) {
	for _, writers := range []int{1, 4, 16, 64, 256} {
		for _, f := range []form{formCopy, formFunction, formTwoTrips} {
			b.Run(fmt.Sprintf("writers=%d/%s", writers, f), func(b *testing.B) {
				s, err := Open(b.Context(), pgtest.Database(b), always(f))
				require.NoError(b, err)
				defer s.Close()
				payload := fmt.Appendf(nil, `{"Note":"%0247d"}`, 0)
				tickets := make(chan struct{})
				var group sync.WaitGroup
				for w := range writers {
					group.Go(func() {
						version := uint64(0)
						for range tickets {
							stream := eventstore.Stream{Category: "account", ID: fmt.Sprint(w)}
							_, err := s.Append(b.Context(), eventstore.Commit{
								Events:     []eventstore.Event{{Stream: stream, Type: "noted", Data: payload}},
								Conditions: []eventstore.Condition{eventstore.StreamAt(stream, eventstore.Revision{Version: version})},
							})
							if err != nil {
								b.Error(err)
							}
							version++
						}
					})
				}
				for b.Loop() {
					tickets <- struct{}{}
				}
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
				close(tickets)
				group.Wait()
			})
		}
	}
}
