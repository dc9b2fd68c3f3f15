package nats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	client "github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

func account(id string) eventstore.Stream { return eventstore.Stream{Category: "account", ID: id} }

// hooked sets the settings of tests.
func hooked(set func(*settings)) Option {
	return func(s *settings) error { set(s); return nil }
}

// once returns a function that is true when it is called the first time.
func once() func() bool {
	var done atomic.Bool
	return func() bool { return done.CompareAndSwap(false, true) }
}

// shapes are commits that travel as a publish, as a batch, and as a batch of
// several streams with a condition on another one.
func shapes() map[string]eventstore.Commit {
	ann, bob := account("ann"), account("bob")
	return map[string]eventstore.Commit{
		"one":     {Events: happened(ann, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}},
		"blind":   {Events: happened(ann, 1)},
		"several": {Events: happened(ann, 3), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}},
		"streams": {Events: append(happened(ann, 2), happened(bob, 1)...), Conditions: []eventstore.Condition{eventstore.StreamAt(account("eve"), eventstore.Revision{})}},
		"keyed":   {Events: happened(ann, 2), Key: "k"},
	}
}

// stored requires that the log is exactly these commits, each whole and once.
func stored(t testing.TB, s *Store, commits ...eventstore.Commit) []eventstore.Recorded {
	t.Helper()
	want := map[eventstore.Stream]uint64{}
	for _, c := range commits {
		for _, e := range c.Events {
			want[e.Stream]++
		}
	}
	all := read(t, s, eventstore.All(), eventstore.ReadOptions{})
	versions, ids := map[eventstore.Stream]uint64{}, map[uuid.UUID]bool{}
	for _, r := range all {
		versions[r.Stream]++
		require.Equal(t, versions[r.Stream], r.Version)
		require.False(t, ids[r.ID], "an event is there twice")
		ids[r.ID] = true
	}
	require.Equal(t, want, versions)
	return all
}

// The server has written the commit, and the answer is lost.
func TestOutcome_AnswerLost(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		for name, commit := range shapes() {
			store, _ := openLog(t, c, hooked(func(s *settings) { s.dropReply = once() }))
			r, err := store.Append(t.Context(), commit)
			require.NoError(t, err, name)
			require.False(t, r.Duplicate, name)
			all := stored(t, store, commit)
			require.Equal(t, all[0].Position, r.First, name)
			require.Equal(t, all[len(all)-1].Position, r.Last, name)
			for _, sr := range r.Revisions {
				last := read(t, store, eventstore.OneStream(sr.Stream), eventstore.ReadOptions{Backward: true, Limit: 1})
				require.Equal(t, last[0].Revision(), sr.Revision, name)
			}
			_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1), Conditions: []eventstore.Condition{eventstore.StreamAt(account("ann"), r.Revision(account("ann")))}})
			require.NoError(t, err, "%s: what the store remembers of the stream is right", name)
		}
	})
}

// The messages are held up on their way, the commit is sent again, and then the
// first ones arrive.
func TestOutcome_LateMessages(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		for name, commit := range shapes() {
			var late []*client.Msg
			first := once()
			store, _ := openLog(t, c, hooked(func(s *settings) {
				s.swallow = func(messages []*client.Msg) bool {
					if !first() {
						return false
					}
					for _, m := range messages {
						header := client.Header{}
						for k, v := range m.Header {
							header[k] = v
						}
						late = append(late, &client.Msg{Subject: m.Subject, Header: header, Data: m.Data})
					}
					return true
				}
			}))
			_, err := store.Append(t.Context(), commit)
			require.NoError(t, err, name)
			require.NotEmpty(t, late)
			for i, m := range late {
				if i < len(late)-1 {
					require.NoError(t, store.conn.PublishMsg(m))
					continue
				}
				got, err := store.conn.RequestMsgWithContext(t.Context(), m)
				require.NoError(t, err)
				var a answer
				require.NoError(t, json.Unmarshal(got.Data, &a))
				require.NotNil(t, a.Error, "%s: it was written twice", name)
			}
			stored(t, store, commit)
		}
	})
}

// The messages are lost, and somebody else writes the stream before they are
// sent again: whoever had a condition has lost, whoever had none comes after.
func TestOutcome_OvertakenWhileUnknown(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		for name, commit := range shapes() {
			log := newName()
			other := reopenLog(t, c, log)
			first := once()
			theirs := eventstore.Commit{Events: happened(account("ann"), 1)}
			store := reopenLog(t, c, log, hooked(func(s *settings) {
				s.swallow = func([]*client.Msg) bool {
					if !first() {
						return false
					}
					_, err := other.Append(context.Background(), theirs)
					return err == nil
				}
			}))
			r, err := store.Append(t.Context(), commit)
			if len(commit.Conditions) > 0 && commit.Conditions[0].Stream == account("ann") {
				conflict, ok := errors.AsType[*eventstore.ConflictError](err)
				require.True(t, ok, "%s: %v", name, err)
				require.EqualValues(t, 1, conflict.Actual.Version)
				stored(t, store, theirs)
				continue
			}
			require.NoError(t, err, name)
			require.EqualValues(t, 1+len(commit.Events)-strings.Count(fmt.Sprint(commit.Events), "bob"), r.Revision(account("ann")).Version, name)
			stored(t, store, theirs, commit)
		}
	})
}

// Of the commits of a batch one has lost to another process: that one gets its
// conflict, the others are written.
func TestOutcome_OneLoserOfABatch(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		log := newName()
		other := reopenLog(t, c, log)
		const writers = 40
		var open atomic.Bool
		var sizes []int // of the batches
		store := reopenLog(t, c, log, hooked(func(s *settings) {
			s.grouping = 2
			s.hold = func() bool { return !open.Load() }
			s.sending = func(messages []*client.Msg) {
				if sizes = append(sizes, len(messages)); len(sizes) == 1 {
					_, err := other.Append(context.Background(), eventstore.Commit{Events: happened(account("7"), 1)})
					require.NoError(t, err)
				}
			}
		}))
		var pending []*eventstore.Pending
		for n := range writers {
			of := account(fmt.Sprint(n))
			pending = append(pending, store.Enqueue(t.Context(), eventstore.Commit{Events: happened(of, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{})}}))
		}
		open.Store(true)
		store.scheduler.signal()
		for n, p := range pending {
			_, err := p.Result()
			if n == 7 {
				conflict, ok := errors.AsType[*eventstore.ConflictError](err)
				require.True(t, ok, "%v", err)
				require.EqualValues(t, 1, conflict.Actual.Version)
				continue
			}
			require.NoError(t, err, "writer %d shares a batch with a loser", n)
		}
		// One batch that failed, and one of those who had not lost; the server may refuse
		// either for a moment, and is asked again.
		require.Equal(t, writers, sizes[0], "they do not share a batch")
		for _, n := range sizes {
			require.Contains(t, []int{writers, writers - 1}, n, "%v", sizes)
		}
		require.Equal(t, writers-1, sizes[len(sizes)-1], "%v", sizes)
		require.Len(t, read(t, store, eventstore.All(), eventstore.ReadOptions{}), writers)
	})
}

// Two processes append to the same streams, with and without conditions: no
// update is lost, no commit fails without having lost.
func TestOutcome_TwoProcesses(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		log := newName()
		stores := []*Store{reopenLog(t, c, log), reopenLog(t, c, log)}
		const writers, each = 8, 15
		var all sync.WaitGroup
		var conflicts atomic.Int64
		for w := range writers {
			all.Go(func() {
				s := stores[w%2]
				for n := range each {
					of := account(fmt.Sprint("hot", n%2))
					if w < 2 { // blind, two streams at once
						if _, err := s.Append(t.Context(), eventstore.Commit{Events: append(happened(of, 2), happened(account("cold"), 1)...)}); err != nil {
							t.Errorf("a commit without conditions: %v", err)
						}
						continue
					}
					for {
						var at eventstore.Revision
						for r, err := range s.Read(t.Context(), eventstore.OneStream(of), eventstore.ReadOptions{Backward: true, Limit: 1}) {
							if err != nil {
								t.Error(err)
								return
							}
							at = r.Revision()
						}
						_, err := s.Append(t.Context(), eventstore.Commit{Events: happened(of, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(of, at)}})
						if err == nil {
							break
						}
						if !errors.Is(err, eventstore.ErrConflict) {
							t.Error(err)
							return
						}
						conflicts.Add(1)
					}
				}
			})
		}
		all.Wait()
		var written eventstore.Commit
		for w := range writers {
			for n := range each {
				of := account(fmt.Sprint("hot", n%2))
				if w < 2 {
					written.Events = append(written.Events, append(happened(of, 2), happened(account("cold"), 1)...)...)
				} else {
					written.Events = append(written.Events, happened(of, 1)...)
				}
			}
		}
		stored(t, stores[1], written)
		t.Logf("%d conflicts", conflicts.Load())
	})
}

// With the server down calls fail within their patience, or when their contexts
// end, and say that nothing was written; when it is back everything goes on,
// subscriptions included.
func TestOutage_OneServer(t *testing.T) {
	t.Parallel()
	c := servers(t, 1)
	patient, name := openLog(t, c)
	store := reopenLog(t, c, name, Patience(300*time.Millisecond), hooked(func(s *settings) { s.attempt = 200 * time.Millisecond }))
	ann := account("ann")
	_, err := patient.Append(t.Context(), eventstore.Commit{Events: happened(ann, 3)})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	seen := make(chan eventstore.Recorded, 100)
	ended := make(chan error, 1)
	go func() {
		for b, err := range store.Subscribe(ctx, eventstore.All(), 0) {
			if err != nil {
				ended <- err
				return
			}
			for _, e := range b.Events {
				seen <- e
			}
		}
	}()
	for v := range uint64(3) {
		require.Equal(t, v+1, (<-seen).Version)
	}
	c.Stop(0)
	var all sync.WaitGroup
	for n := range 100 {
		all.Go(func() {
			began := time.Now()
			once, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			var err error
			switch n % 4 {
			case 0:
				_, err = store.Append(once, eventstore.Commit{Events: happened(account(fmt.Sprint(n)), 1)})
			case 1:
				_, err = store.Head(once)
			case 2:
				for _, e := range store.Read(once, eventstore.OneStream(ann), eventstore.ReadOptions{}) {
					err = e
				}
			case 3:
				_, _, err = store.Lookup(once, ann, "k")
			}
			if !errors.Is(err, eventstore.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("call %d: %v", n, err)
			}
			if errors.Is(err, eventstore.ErrOutcomeUnknown) {
				t.Errorf("call %d: nothing was sent, yet: %v", n, err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("call %d took %s", n, took)
			}
		})
	}
	all.Wait()
	require.NoError(t, c.Start(0))
	require.Eventually(t, func() bool {
		// By its key a commit whose answer was lost is found again.
		_, err := store.Append(ctx, eventstore.Commit{Events: happened(ann, 1), Key: "again", Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: 3})}})
		return err == nil
	}, 30*time.Second, 10*time.Millisecond)
	require.Equal(t, uint64(4), (<-seen).Version)
	require.Empty(t, ended)
	require.Len(t, read(t, store, eventstore.All(), eventstore.ReadOptions{}), 4, "what failed was not written")
}
