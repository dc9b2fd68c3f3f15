package nats

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

// two commits of one stream share a batch; the answer is lost.
func TestStore_AnswerLostOfTwoOnOneStream(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		for _, blind := range []bool{true, false} {
			var open atomic.Bool
			store, _ := openLog(t, c, hooked(func(s *settings) {
				s.hold = func() bool { return !open.Load() }
				s.dropReply = once()
			}))
			ann := account("ann")
			c1 := eventstore.Commit{Events: happened(ann, 1)}
			c2 := eventstore.Commit{Events: happened(ann, 1)}
			if !blind {
				c1.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}
				c2.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: 1})}
			}
			p1 := store.Enqueue(t.Context(), c1)
			p2 := store.Enqueue(t.Context(), c2)
			open.Store(true)
			store.scheduler.signal()
			r1, err1 := p1.Result()
			r2, err2 := p2.Result()
			n := len(read(t, store, eventstore.All(), eventstore.ReadOptions{}))
			t.Logf("blind=%v: r1=%+v %v; r2=%+v %v; stored=%d", blind, r1, err1, r2, err2, n)
			if n != 2 || err1 != nil || err2 != nil {
				t.Errorf("blind=%v: r1 err=%v; r2 err=%v; stored=%d", blind, err1, err2, n)
			}
		}
	})
}

// e1 is held as a conflict, fits after the unknown outcome, and hides that e2 was written.
func TestStore_HeldHidesWritten(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		var open atomic.Bool
		store, _ := openLog(t, c, hooked(func(s *settings) {
			s.hold = func() bool { return !open.Load() }
			s.dropReply = once()
		}))
		ann := account("ann")
		p0 := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(ann, 1)})
		p1 := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(ann, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: 2})}})
		p2 := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(ann, 1)})
		open.Store(true)
		store.scheduler.signal()
		_, e0 := p0.Result()
		_, e1 := p1.Result()
		_, e2 := p2.Result()
		n := len(read(t, store, eventstore.All(), eventstore.ReadOptions{}))
		ok := 0
		for _, e := range []error{e0, e1, e2} {
			if e == nil {
				ok++
			}
		}
		t.Logf("%v %v %v stored %d", e0, e1, e2, n)
		require.Equal(t, ok, n)
	})
}

// e1 and e2 (which builds on e1) are on their way, late; e1 is cancelled; e2 is told it lost; the late batch arrives.
func TestStore_ConflictThenLate(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		var open atomic.Bool
		ctx1, cancel := context.WithCancel(t.Context())
		first := once()
		var late []*client.Msg
		var p1 *eventstore.Pending
		store, _ := openLog(t, c, hooked(func(s *settings) {
			s.hold = func() bool { return !open.Load() }
			s.swallow = func(ms []*client.Msg) bool {
				if !first() {
					return false
				}
				for _, m := range ms {
					h := client.Header{}
					for k, v := range m.Header {
						h[k] = v
					}
					late = append(late, &client.Msg{Subject: m.Subject, Header: h, Data: m.Data})
				}
				cancel()
				_, err := p1.Result()
				if !errors.Is(err, eventstore.ErrOutcomeUnknown) {
					t.Errorf("e1: %v", err)
				}
				return true
			}
		}))
		ann := account("ann")
		p1 = store.Enqueue(ctx1, eventstore.Commit{Events: happened(ann, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}})
		p2 := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(ann, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: 1})}})
		open.Store(true)
		store.scheduler.signal()
		_, e2 := p2.Result()
		require.Len(t, late, 2)
		require.NoError(t, store.conn.PublishMsg(late[0]))
		_, err := store.conn.RequestMsgWithContext(t.Context(), late[1])
		require.NoError(t, err)
		n := len(read(t, store, eventstore.All(), eventstore.ReadOptions{}))
		t.Logf("e2: %v; stored %d", e2, n)
		if errors.Is(e2, eventstore.ErrConflict) && n != 0 {
			t.Errorf("e2 was told %v and was written", e2)
		}
	})
}

// a condition over more streams than are remembered
func TestStore_EvictedHead(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	writer, name := openLog(t, c)
	var conditions []eventstore.Condition
	for _, id := range []string{"a", "b", "c"} {
		r, err := writer.Append(t.Context(), eventstore.Commit{Events: happened(account(id), 1)})
		require.NoError(t, err)
		conditions = append(conditions, eventstore.StreamAt(account(id), r.Revision(account(id))))
	}
	store := reopenLog(t, c, name, Patience(3*time.Second), hooked(func(s *settings) { s.headsMost = 2 }))
	_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account("a"), 1), Conditions: conditions})
	require.NoError(t, err)
}

// the same with the default settings: one stream with very many keys
func TestStore_EvictedHeadByKeys(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	store, _ := openLog(t, c)
	ann, bob := account("ann"), account("bob")
	other, err := store.Append(t.Context(), eventstore.Commit{Events: happened(bob, 1)})
	require.NoError(t, err)
	r, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1), Key: "k"})
	require.NoError(t, err)
	// As if it had 70,000 keyed commits.
	h, _ := store.heads.get(ann)
	for i := range 70000 {
		h.keys.used[string(rune(i+0x10000))] = usedKey{}
	}
	store.heads.set(ann, h)
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1), Conditions: []eventstore.Condition{
		eventstore.StreamAt(ann, r.Revision(ann)), eventstore.StreamAt(bob, other.Revision(bob)), eventstore.StreamAt(account("nobody"), eventstore.Revision{}),
	}})
	require.NoError(t, err)
}

// something else was written into one stream: who shares a batch with it?
func TestStore_PoisonInGroup(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	var open atomic.Bool
	store, _ := openLog(t, c, hooked(func(s *settings) {
		s.hold = func() bool { return !open.Load() }
		s.grouping = 2
	}))
	_, err := store.js.Publish(t.Context(), store.subjects.of(account("ann")), []byte("x"))
	require.NoError(t, err)
	p1 := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	p2 := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(account("bob"), 1)})
	open.Store(true)
	store.scheduler.signal()
	_, e1 := p1.Result()
	_, e2 := p2.Result()
	require.ErrorIs(t, e1, eventstore.ErrDecode)
	require.NoError(t, e2)
}

// a mirror answers direct gets
func TestStore_Mirror(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		store, name := openLog(t, c, Tail(1, 1))
		ann := account("ann")
		for i := 0; i < 30; i++ {
			_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
			require.NoError(t, err)
		}
		// A mirror for people who look at the last days.
		m, err := store.js.CreateStream(t.Context(), jetstream.StreamConfig{Name: name + "-mirror", Storage: jetstream.FileStorage, Mirror: &jetstream.StreamSource{Name: name}, MaxMsgs: 5})
		require.NoError(t, err)
		t.Logf("mirror direct: %v", m.CachedInfo().Config.MirrorDirect)
		require.Eventually(t, func() bool {
			i, err := m.Info(t.Context())
			return err == nil && i.State.LastSeq >= 30
		}, time.Minute, 10*time.Millisecond)
		bad := map[string]int{}
		for range 50 {
			n := 0
			for _, err := range store.Read(t.Context(), eventstore.OneStream(ann), eventstore.ReadOptions{}) {
				if err != nil {
					bad[err.Error()]++
					break
				}
				n++
			}
			bad[string(rune('0'+n/10))+"x"]++
			n = 0
			for _, err := range store.Read(t.Context(), eventstore.OneCategory("account"), eventstore.ReadOptions{}) {
				if err != nil {
					bad["cat "+err.Error()]++
					break
				}
				n++
			}
			if n != 30 {
				bad["category short"]++
			}
		}
		require.Equal(t, map[string]int{"3x": 50}, bad, "whole streams, and nothing else")
	})
}
