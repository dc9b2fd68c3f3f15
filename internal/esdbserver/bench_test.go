package esdbserver_test

import (
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/esdbserver"
)

// BenchmarkAppend is 64 writers, each with a stream of its own.
func BenchmarkAppend(b *testing.B) {
	for name, open := range map[string]func() eventstore.Store{
		"memory": func() eventstore.Store { return newMemory(b) },
		"sqlite": func() eventstore.Store {
			store, err := sqlite.Open(b.Context(), filepath.Join(b.TempDir(), "events.db"))
			require.NoError(b, err)
			b.Cleanup(func() { store.Close() })
			return store
		},
	} {
		b.Run(name, func(b *testing.B) {
			server, err := esdbserver.Start(open())
			require.NoError(b, err)
			defer server.Close()
			settings, err := esdb.ParseConnectionString(server.URL())
			require.NoError(b, err)
			settings.Logger = esdb.NoopLogging()
			client, err := esdb.NewClient(settings)
			require.NoError(b, err)
			defer client.Close()
			var writer atomic.Int64
			b.SetParallelism(32)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				stream := "writer-" + strconv.FormatInt(writer.Add(1), 10)
				for pb.Next() {
					if _, err := client.AppendToStream(b.Context(), stream, esdb.AppendToStreamOptions{}, event(`{"cents":500}`)); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
