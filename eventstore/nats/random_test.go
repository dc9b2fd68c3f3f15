package nats

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	client "github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

func TestStore_Random(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		for round := range 6 {
			log := newName()
			var mu sync.Mutex
			r := rand.New(rand.NewPCG(uint64(round), 7))
			chance := func(p float64) bool { mu.Lock(); defer mu.Unlock(); return r.Float64() < p }
			intn := func(n int) int { mu.Lock(); defer mu.Unlock(); return r.IntN(n) }
			var lateMu sync.Mutex
			var late [][]*client.Msg
			conn, err := c.Connect()
			require.NoError(t, err)
			open := func() *Store {
				return reopenLog(t, c, log, hooked(func(s *settings) {
					s.grouping = 2
					s.headsMost = 8
					s.dropReply = func() bool { return chance(0.15) }
					s.sending = func([]*client.Msg) {
						if chance(0.5) {
							lateMu.Lock()
							var ms []*client.Msg
							if len(late) > 0 {
								ms, late = late[0], late[1:]
							}
							lateMu.Unlock()
							for _, m := range ms {
								_ = conn.PublishMsg(m)
							}
							_ = conn.Flush()
						}
					}
					s.swallow = func(ms []*client.Msg) bool {
						if !chance(0.2) {
							return false
						}
						var copies []*client.Msg
						for _, m := range ms {
							h := client.Header{}
							for k, v := range m.Header {
								h[k] = v
							}
							copies = append(copies, &client.Msg{Subject: m.Subject, Header: h, Data: m.Data})
						}
						lateMu.Lock()
						late = append(late, copies)
						lateMu.Unlock()
						return true
					}
				}))
			}
			stores := []*Store{open(), open()}
			type done struct {
				ids []uuid.UUID
				r   eventstore.Receipt
				err error
				c   eventstore.Commit
			}
			var all sync.WaitGroup
			var results []done
			for w := range 16 {
				all.Go(func() {
					s := stores[w%2]
					for range 12 {
						var commit eventstore.Commit
						n := 1 + intn(2)
						for range n {
							commit.Events = append(commit.Events, happened(account(fmt.Sprint(intn(3))), 1)...)
						}
						for i := range commit.Events {
							commit.Events[i].ID = uuid.New()
						}
						if chance(0.4) {
							of := account(fmt.Sprint(intn(4)))
							h, _ := s.heads.get(of)
							commit.Conditions = []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{Version: h.version + uint64(intn(2))})}
						}
						if chance(0.2) {
							commit.Key = fmt.Sprint("k", intn(5))
							commit.Fingerprint = "f"
						}
						ctx, cancel := context.WithCancel(t.Context())
						p := s.Enqueue(ctx, commit)
						if chance(0.2) {
							go func() { time.Sleep(time.Duration(intn(10)) * time.Millisecond); cancel() }()
						}
						rec, err := p.Result()
						cancel()
						d := done{r: rec, err: err, c: commit}
						for _, e := range commit.Events {
							d.ids = append(d.ids, e.ID)
						}
						mu.Lock()
						results = append(results, d)
						mu.Unlock()
					}
				})
			}
			all.Wait()
			for _, s := range stores {
				require.NoError(t, s.Close())
			}
			for _, ms := range late {
				for _, m := range ms {
					_ = conn.PublishMsg(m)
				}
			}
			_ = conn.Flush()
			conn.Close()
			check := reopenLog(t, c, log)
			time.Sleep(50 * time.Millisecond)
			recorded := read(t, check, eventstore.All(), eventstore.ReadOptions{})
			at := map[uuid.UUID]eventstore.Recorded{}
			versions := map[eventstore.Stream]uint64{}
			for _, e := range recorded {
				if _, ok := at[e.ID]; ok {
					t.Errorf("round %d: event twice", round)
				}
				at[e.ID] = e
				versions[e.Stream]++
				require.Equal(t, versions[e.Stream], e.Version)
			}
			for of := range versions {
				// What was late may still come.
				through := recorded[len(recorded)-1].Position
				require.Len(t, read(t, check, eventstore.OneStream(of), eventstore.ReadOptions{Backward: true, Through: through}), int(versions[of]))
			}
			kinds := map[string]int{}
			for _, d := range results {
				n := 0
				for _, id := range d.ids {
					if _, ok := at[id]; ok {
						n++
					}
				}
				switch {
				case d.err == nil && !d.r.Duplicate:
					kinds["written"]++
					if n != len(d.ids) || at[d.ids[0]].Position != d.r.First {
						t.Errorf("round %d: told written: %d of %d are there, first %d receipt %d key %q", round, n, len(d.ids), at[d.ids[0]].Position, d.r.First, d.c.Key)
					}
				case d.err == nil:
					kinds["duplicate"]++
					if n != 0 && at[d.ids[0]].Position != d.r.First {
						t.Errorf("round %d: duplicate and written", round)
					}
				case errors.Is(d.err, eventstore.ErrConflict), errors.Is(d.err, eventstore.ErrUnavailable), errors.Is(d.err, eventstore.ErrKeyReused):
					kinds["conflict"]++
					if n != 0 {
						t.Errorf("round %d: told %v and written", round, d.err)
					}
				case errors.Is(d.err, eventstore.ErrOutcomeUnknown):
					kinds["unknown"]++
					if n != 0 && n != len(d.ids) {
						t.Errorf("half")
					}
				case errors.Is(d.err, context.Canceled):
					kinds["cancelled"]++
					if n != 0 {
						t.Errorf("round %d: cancelled and written", round)
					}
				default:
					t.Errorf("%v", d.err)
				}
			}
			t.Logf("round %d: %v, %d events", round, kinds, len(recorded))
		}
	})
}
