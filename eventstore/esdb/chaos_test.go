package esdb_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/esdbserver"
)

// longer returns how long a random run lasts: a moment, or as many seconds as
// DEED_TEST_LONG says.
func longer(t testing.TB, moment time.Duration) time.Duration {
	text := os.Getenv("DEED_TEST_LONG")
	if text == "" {
		return moment
	}
	seconds, err := strconv.Atoi(text)
	require.NoError(t, err, "DEED_TEST_LONG=%q", text)
	return time.Duration(seconds) * time.Second
}

// Writers of two processes write while the server is killed and comes back,
// connections are cut, answers are lost and subscriptions dropped. Every
// acknowledged commit is there once, and in its place; every unknown one is
// settled by its key; every subscriber has seen everything once and in order; and
// every call that had a deadline has kept it.
func TestChaos(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	if given := os.Getenv("STORETEST_SEED"); given != "" {
		var err error
		seed, err = strconv.ParseUint(given, 10, 64)
		require.NoError(t, err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay with STORETEST_SEED=%d", seed)
		}
	})
	if os.Getenv(realServer) != "" {
		t.Skipf("the server of %s cannot be told to misbehave: unset the variable to run this test", realServer)
	}
	file, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "server.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, file.Close()) })
	server := server(t, file)
	stores := []*esdb.Store{open(t, server.URL(), esdb.Tail(64, 1<<20)), open(t, server.URL())}
	ctx, cancel := context.WithTimeout(t.Context(), longer(t, 0)+2*time.Minute)
	defer cancel()

	end := time.Now().Add(longer(t, 2*time.Second))
	var troubles sync.WaitGroup
	kinds := map[int]int{}
	troubles.Go(func() {
		r := rand.New(rand.NewPCG(seed, 0))
		for time.Now().Before(end) {
			time.Sleep(time.Duration(10+r.IntN(60)) * time.Millisecond)
			kind := r.IntN(6)
			kinds[kind]++
			switch kind {
			case 0:
				if err := server.Restart(); err != nil {
					t.Error(err)
				}
			case 1:
				server.DropConnections()
			case 2:
				server.CutAppends(esdbserver.AfterWritten, 1+r.IntN(3))
			case 3:
				server.CutAppends(esdbserver.BeforeWritten, 1+r.IntN(3))
			case 4:
				server.EndSubscriptions()
			case 5:
				server.Down()
				time.Sleep(time.Duration(r.IntN(100)) * time.Millisecond)
				if err := server.Up(); err != nil {
					t.Error(err)
				}
			}
		}
		server.CutAppends(esdbserver.AfterWritten, 0)
		server.CutAppends(esdbserver.BeforeWritten, 0)
	})

	const writers, streams = 8, 5
	type written struct {
		key     string
		stream  eventstore.Stream
		n       int
		receipt eventstore.Receipt
	}
	var mu sync.Mutex
	var acknowledged []written
	var unknown, conflicts, duplicates atomic.Int64
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w+1)))
			store := stores[w%2]
			for n := 0; time.Now().Before(end); n++ {
				stream := eventstore.Stream{Category: []string{"account", "order"}[r.IntN(2)], ID: fmt.Sprint(r.IntN(streams))}
				key := fmt.Sprintf("%d.%d", w, n)
				c := eventstore.Commit{Key: key, Fingerprint: key}
				for i := range 1 + r.IntN(4) {
					c.Events = append(c.Events, eventstore.Event{Stream: stream, Type: "happened", Data: fmt.Appendf(nil, `{"Key":%q,"N":%d}`, key, i)})
				}
				for {
					if r.IntN(2) == 0 {
						got, err := collect(store, ctx, eventstore.OneStream(stream), eventstore.ReadOptions{})
						if err != nil {
							t.Errorf("read: %v", err)
							return
						}
						c.Conditions = []eventstore.Condition{eventstore.StreamAt(stream, eventstore.Revision{Version: uint64(len(got))})}
						if len(got) > 0 && r.IntN(2) == 0 {
							c.Conditions[0] = eventstore.StreamAtEvent(stream, uint64(len(got)), got[len(got)-1].ID)
						}
					}
					within := time.Duration(20+r.IntN(400)) * time.Millisecond
					own, stop := context.WithTimeout(ctx, within)
					began := time.Now()
					receipt, err := store.Append(own, c)
					stop()
					if late := time.Since(began) - within; late > 5*time.Second {
						t.Errorf("an append returned %s after its deadline", late)
					}
					switch {
					case err == nil:
						if receipt.Duplicate {
							duplicates.Add(1)
						}
						mu.Lock()
						acknowledged = append(acknowledged, written{key, stream, len(c.Events), receipt})
						mu.Unlock()
					case errors.Is(err, eventstore.ErrOutcomeUnknown):
						unknown.Add(1)
						continue // again, with the same key
					case errors.Is(err, eventstore.ErrConflict):
						conflicts.Add(1)
						c.Conditions = nil
						continue
					case errors.Is(err, context.DeadlineExceeded), errors.Is(err, eventstore.ErrUnavailable):
						continue
					default:
						t.Errorf("append: %v", err)
						return
					}
					break
				}
			}
		})
	}
	queries := []eventstore.Query{eventstore.All(), eventstore.OneCategory("order"), eventstore.OneStream(eventstore.Stream{Category: "account", ID: "1"})}
	var goal atomic.Uint64
	seen := make([][]eventstore.Recorded, 2*len(queries))
	var followers sync.WaitGroup
	for i := range seen {
		followers.Go(func() {
			for batch, err := range stores[i%2].Subscribe(ctx, queries[i/2], 0) {
				if err != nil {
					t.Errorf("subscription %d: %v", i, err)
					return
				}
				seen[i] = append(seen[i], batch.Events...)
				if g := goal.Load(); g > 0 && uint64(batch.Through) >= g {
					return
				}
			}
		})
	}
	group.Wait()
	troubles.Wait()
	head, err := stores[0].Head(ctx)
	require.NoError(t, err)
	goal.Store(uint64(head))
	bell, err := stores[0].Append(ctx, eventstore.Commit{Events: []eventstore.Event{{Stream: eventstore.Stream{Category: "bell", ID: "b"}, Type: "rang"}}})
	require.NoError(t, err)
	require.Greater(t, bell.First, head)
	followers.Wait()

	everything, err := collect(stores[1], ctx, eventstore.All(), eventstore.ReadOptions{Through: head})
	require.NoError(t, err)
	byStream := map[eventstore.Stream][]eventstore.Recorded{}
	for _, e := range everything {
		byStream[e.Stream] = append(byStream[e.Stream], e)
		require.Equal(t, uint64(len(byStream[e.Stream])), e.Version, "the versions of %s", e.Stream)
	}
	events := 0
	keys := map[string]bool{}
	for _, w := range acknowledged {
		require.False(t, keys[w.key])
		keys[w.key] = true
		events += w.n
		at := w.receipt.Revision(w.stream)
		all := byStream[w.stream]
		for i := range w.n {
			e := all[int(at.Version)-w.n+i]
			require.Equal(t, fmt.Sprintf(`{"Key":%q,"N":%d}`, w.key, i), string(e.Data), "the receipt of %s names its own events", w.key)
			if i == 0 {
				require.Equal(t, w.receipt.First, e.Position)
			}
		}
		require.Equal(t, w.receipt.Last, at.Position)
	}
	require.Len(t, everything, events, "what was acknowledged is there once, and nothing else is")
	for i, got := range seen {
		n := 0
		for j := range everything {
			if queries[i/2].Matches(&everything[j]) {
				require.Less(t, n, len(got), "subscription %d lacks events", i)
				require.Equal(t, everything[j].Position, got[n].Position, "subscription %d", i)
				n++
			}
		}
		for _, e := range got[n:] {
			require.Greater(t, e.Position, head, "subscription %d has more than there is", i)
		}
	}
	t.Logf("%d commits of %d events; outcomes unknown at first %d, settled as duplicates %d, conflicts %d; restarts %d, cut connections %d, lost answers %d and %d, dropped subscriptions %d, outages %d",
		len(acknowledged), events, unknown.Load(), duplicates.Load(), conflicts.Load(), kinds[0], kinds[1], kinds[2], kinds[3], kinds[4], kinds[5])
}

// Logs of one database have nothing to do with each other, also when one's name
// begins like another's.
func TestPrefix_LogsAreApart(t *testing.T) {
	t.Parallel()
	at, _ := url(t)
	id := "t" + strings.ReplaceAll(uuid.NewString(), "-", "")
	names := []string{id, id + "x", id + ".x", id + "_"}
	var stores []*esdb.Store
	ids := map[string]bool{}
	for _, name := range names {
		s := open(t, at, esdb.Prefix(name))
		stores = append(stores, s)
		logID, err := s.LogID(t.Context())
		require.NoError(t, err)
		require.False(t, ids[logID])
		ids[logID] = true
	}
	var receipts []eventstore.Receipt
	for round := range 3 {
		receipts = nil
		for i, s := range stores {
			c := happened(i + 1)
			c.Key, c.Conditions = fmt.Sprint("k", round), []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: uint64(round * (i + 1))})}
			r, err := s.Append(t.Context(), c)
			require.NoError(t, err)
			require.False(t, r.Duplicate)
			receipts = append(receipts, r)
		}
	}
	for i, s := range stores {
		head, err := s.Head(t.Context())
		require.NoError(t, err)
		require.Equal(t, receipts[i].Last, head)
		for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneCategory("account"), eventstore.OneStream(ann), eventstore.OfTypes("happened")} {
			for _, backward := range []bool{false, true} {
				got, err := collect(s, t.Context(), q, eventstore.ReadOptions{Backward: backward})
				require.NoError(t, err)
				require.Len(t, got, 3*(i+1))
			}
			n := 0
			for batch, err := range s.Subscribe(t.Context(), q, 0) {
				require.NoError(t, err)
				if n += len(batch.Events); batch.CaughtUp {
					require.Equal(t, head, batch.Through)
					break
				}
			}
			require.Equal(t, 3*(i+1), n)
		}
	}
}
