package esdbserver_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/esdbserver"
)

// Writers try each append again, with the same ids and the same expected
// revision, until it is acknowledged, while connections are cut, appends are cut
// off before and after they were written, and the server goes down. In the end
// every event is there once and in its place, and a subscription that is taken up
// again from its last position saw all of them.
func TestChaos(t *testing.T) {
	t.Parallel()
	store, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "events.db"))
	require.NoError(t, err)
	t.Cleanup(func() { store.Close() })
	k := over(t, store)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)

	writers, each := 4, 100
	if os.Getenv("DEED_TEST_LONG") != "" {
		writers, each = 16, 1000
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	connect := func() *esdb.Client {
		settings, err := esdb.ParseConnectionString(k.server.URL() + "&discoveryInterval=10&maxDiscoverAttempts=3")
		require.NoError(t, err)
		settings.Logger = esdb.NoopLogging()
		client, err := esdb.NewClient(settings)
		require.NoError(t, err)
		return client
	}
	written := make([][]uuid.UUID, writers)
	var working, rest sync.WaitGroup
	var retries [64]int
	// Between two faults some appends get through, however slow the machine is.
	acknowledged := make(chan struct{}, writers*each)
	for w := range writers {
		working.Go(func() {
			client := connect()
			defer func() { client.Close() }()
			for i := range each {
				batch := events(1 + i%3)
				var expected esdb.ExpectedRevision = esdb.NoStream{}
				if n := len(written[w]); n > 0 {
					expected = esdb.Revision(uint64(n - 1))
				}
				for {
					short, done := context.WithTimeout(ctx, 5*time.Second)
					r, err := client.AppendToStream(short, fmt.Sprintf("writer-%d", w), esdb.AppendToStreamOptions{ExpectedRevision: expected}, batch...)
					done()
					if err == nil {
						for _, e := range batch {
							written[w] = append(written[w], e.EventID)
						}
						if r.NextExpectedVersion != uint64(len(written[w])-1) {
							t.Errorf("writer %d: at %d, not %d", w, r.NextExpectedVersion, len(written[w])-1)
							return
						}
						acknowledged <- struct{}{}
						break
					}
					if e, _ := esdb.FromError(err); e.Code() == esdb.ErrorCodeWrongExpectedVersion || ctx.Err() != nil {
						t.Errorf("writer %d, append %d: %v", w, i, err)
						return
					}
					retries[w]++
					client.Close()
					client = connect()
				}
			}
		})
	}
	finished := make(chan struct{})
	rest.Go(func() {
		random := rand.New(rand.NewPCG(seed, 1))
		for {
			for range 1 + random.IntN(2*writers) {
				select {
				case <-finished:
					return
				case <-acknowledged:
				}
			}
			switch random.IntN(4) {
			case 0:
				k.server.DropConnections()
			case 1:
				k.server.CutAppends(esdbserver.BeforeWritten, 1+random.IntN(3))
			case 2:
				k.server.CutAppends(esdbserver.AfterWritten, 1+random.IntN(3))
			case 3:
				if err := k.server.Restart(); err != nil {
					t.Errorf("restart: %v", err)
					return
				}
			}
		}
	})
	seen := map[string][]uuid.UUID{}
	resumed := 0
	following, stop := context.WithCancel(ctx)
	var total int
	rest.Go(func() {
		var from esdb.AllPosition = esdb.Start{}
		for following.Err() == nil {
			client := connect()
			s, err := client.SubscribeToAll(following, esdb.SubscribeToAllOptions{From: from, Filter: esdb.ExcludeSystemEventsFilter()})
			for err == nil {
				m := s.Recv()
				if m.SubscriptionDropped != nil {
					break
				}
				if m.CheckPointReached != nil {
					from = *m.CheckPointReached
				}
				if m.EventAppeared != nil {
					e := m.EventAppeared.Event
					seen[e.StreamID] = append(seen[e.StreamID], e.EventID)
					from = e.Position
					if e.EventType == "end" {
						stop()
						break
					}
				}
			}
			if err == nil {
				s.Close()
			}
			client.Close()
			resumed++
		}
	})
	working.Wait()
	close(finished)
	k.server.CutAppends(esdbserver.BeforeWritten, 0)
	k.server.CutAppends(esdbserver.AfterWritten, 0)
	end := event(`{}`)
	end.EventType = "end"
	for {
		client := connect()
		_, err := client.AppendToStream(ctx, "end", esdb.AppendToStreamOptions{ExpectedRevision: esdb.NoStream{}}, end)
		client.Close()
		if err == nil {
			break
		}
		require.NoError(t, ctx.Err())
	}
	rest.Wait()
	stop()
	k.client = k.connect()
	tried := 0
	for w := range writers {
		stream := fmt.Sprintf("writer-%d", w)
		all, err := k.read(stream, forward, most)
		require.NoError(t, err)
		var got []uuid.UUID
		for i, e := range all {
			require.Equal(t, uint64(i), e.Event.EventNumber)
			got = append(got, e.Event.EventID)
		}
		require.Equal(t, written[w], got, "seed %d, %s", seed, stream)
		require.Equal(t, written[w], seen[stream], "seed %d: what the subscription saw of %s", seed, stream)
		total += len(got)
		tried += retries[w]
	}
	require.Positive(t, tried, "nothing went wrong")
	t.Logf("%d events by %d writers, %d appends tried again, the subscription taken up %d times", total, writers, tried, resumed)
}
