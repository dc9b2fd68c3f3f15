package nats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

// The tests in this file are about the server alone: what the store relies on,
// and why it does what it does. When a new server fails one of them, look at
// the code that the test names.

func (r *raw) send(m *client.Msg) answer {
	r.t.Helper()
	got, err := r.conn.RequestMsgWithContext(r.ctx, m)
	require.NoError(r.t, err)
	var a answer
	require.NoError(r.t, json.Unmarshal(got.Data, &a))
	return a
}

// batch sends messages as one atomic batch.
func (r *raw) batch(messages ...*client.Msg) answer {
	r.t.Helper()
	id := nuid.Next()
	for i, m := range messages {
		m.Header[headerBatchID] = []string{id}
		m.Header[headerBatchSequence] = []string{strconv.Itoa(i + 1)}
		if i == len(messages)-1 {
			m.Header[headerBatchCommit] = []string{"1"}
			return r.send(m)
		}
		require.NoError(r.t, r.conn.PublishMsg(m))
	}
	panic("no messages")
}

// put publishes and returns the sequence.
func (r *raw) put(m *client.Msg) uint64 {
	r.t.Helper()
	a := r.send(m)
	require.Nil(r.t, a.Error)
	return a.Sequence
}

func (r *raw) lastSequence() uint64 {
	r.t.Helper()
	s, err := r.js.Stream(r.ctx, r.name)
	require.NoError(r.t, err)
	return s.CachedInfo().State.LastSeq
}

// refused requires that nothing was written, and returns the server's code.
func (r *raw) refused(before uint64, a answer) int {
	r.t.Helper()
	require.NotNil(r.t, a.Error, "the server took it")
	require.Equal(r.t, before, r.lastSequence(), "what was refused uses no sequences")
	return int(a.Error.ErrorCode)
}

func number(n uint64) string { return strconv.FormatUint(n, 10) }

// send in publish.go makes batches by headers, and takes the acknowledged
// sequence for that of the last message, with the others just before it.
func TestServer_Batch(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		first := r.put(r.message("0.a.1"))
		a := r.batch(r.message("0.a.1"), r.message("0.b.1"), r.message("0.a.2"))
		require.Nil(t, a.Error)
		require.Equal(t, 3, a.Count)
		require.Equal(t, first+3, a.Sequence)
		for i, subject := range []string{"0.a.1", "0.b.1", "0.a.2"} {
			require.Eventually(t, func() bool {
				s, err := r.js.Stream(r.ctx, r.name)
				require.NoError(t, err)
				m, err := s.GetMsg(r.ctx, first+1+uint64(i))
				return err == nil && m.Subject == r.name+"."+subject
			}, 10*time.Second, 10*time.Millisecond)
		}
	})
}

// judge in plan.go: the code of a conflict depends on what is in flight, so both
// mean the same.
func TestServer_Conflict(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		require.Contains(t, []int{codeWrongSequence}, r.refused(0, r.send(r.message("0.a.1", headerExpected, "7"))))
		first := r.put(r.message("0.a.1", headerExpected, "0"))
		other := r.put(r.message("0.a.2", headerExpected, "0"))
		require.Equal(t, codeWrongSequence, r.refused(other, r.send(r.message("0.a.1", headerExpected, "0"))))
		require.Equal(t, codeWrongSequence, r.refused(other, r.send(r.message("0.a.1", headerExpected, number(other)))), "it is the subject's last sequence, not the stream's")
		require.Equal(t, other+1, r.put(r.message("0.a.1", headerExpected, number(first))), "the next sequence is used")
	})
}

// On replicated streams a writer whose subject has a message in flight gets
// another code than one who comes later; of writers with one expectation one wins.
func TestServer_ConflictInFlight(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		codes := map[int]int{}
		for round := range uint64(50) {
			before := round // each round writes one message
			write := func() (wins int, codes map[int]int) {
				codes = map[int]int{}
				var all sync.WaitGroup
				var mu sync.Mutex
				for range 8 {
					all.Go(func() {
						got, err := r.conn.RequestMsgWithContext(r.ctx, r.message("0.a.1", headerExpected, number(before)))
						var a answer
						if err == nil {
							err = json.Unmarshal(got.Data, &a)
						}
						mu.Lock()
						defer mu.Unlock()
						switch {
						case err != nil:
							codes[-1]++
						case a.Error == nil:
							wins++
						default:
							codes[int(a.Error.ErrorCode)]++
						}
					})
				}
				all.Wait()
				require.LessOrEqual(t, wins, 1)
				return wins, codes
			}
			wins, got := write()
			for wins == 0 && got[codeWrongSequenceConstant] == 8 {
				// The message of the round before was acknowledged, and is in flight still.
				wins, got = write()
			}
			require.Equal(t, 1, wins, "%v", got)
			for code, n := range got {
				codes[code] += n
			}
		}
		require.Equal(t, 350, codes[codeWrongSequence]+codes[codeWrongSequenceConstant], "%v", codes)
		t.Logf("codes: %v", codes)
	})
}

// add in plan.go: only the first message of a subject may carry what its last
// sequence must be.
func TestServer_SecondExpectation(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		require.Equal(t, codeWrongSequenceConstant, r.refused(0, r.batch(r.message("0.a.1", headerExpected, "0"), r.message("0.a.1", headerExpected, "1"))))
		require.Equal(t, codeWrongSequenceConstant, r.refused(0, r.batch(r.message("0.a.1"), r.message("0.a.1", headerExpected, "0"))))
		require.Nil(t, r.batch(r.message("0.a.1", headerExpected, "0"), r.message("0.a.1")).Error)
	})
}

// moved in publish.go: a batch that fails says neither which subject is to blame
// nor, for a subject that others write, that anybody has lost.
func TestServer_BatchNamesNoLoser(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		for _, subject := range []string{"0.a.1", "0.a.2", "0.a.3"} {
			r.put(r.message(subject))
		}
		a := r.batch(r.message("0.a.1", headerExpected, "1"), r.message("0.a.2", headerExpected, "1"), r.message("0.a.3", headerExpected, "3"))
		require.Equal(t, codeWrongSequence, r.refused(3, a))
		require.NotContains(t, a.Error.Description, "0.a.2")
	})
}

// add in plan.go: a message may demand something of a subject that is not its
// own, before that subject is written in the batch but not after.
func TestServer_ConditionOnAnotherSubject(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		last := r.put(r.message("0.a.1"))
		condition := func(sequence uint64) *client.Msg {
			return r.message("conditions", headerExpected, number(sequence), headerExpectedSubject, r.name+".0.a.1")
		}
		r.refused(last, r.batch(condition(0), r.message("0.b.1", headerExpected, "0")))
		r.refused(last, r.batch(condition(7), r.message("0.b.1", headerExpected, "0")))
		a := r.batch(condition(last), r.message("0.b.1", headerExpected, "0"))
		require.Nil(t, a.Error)
		require.Equal(t, last+2, a.Sequence)
		last = a.Sequence
		require.Equal(t, codeWrongSequenceConstant, r.refused(last, r.batch(r.message("0.a.1", headerExpected, "1"), condition(1))))
		require.Nil(t, r.batch(condition(1), r.message("0.a.1")).Error, "the subject may be written after the condition")
	})
}

// A condition on another subject holds at the moment of the write, also while
// that subject is being written: of a pair that excludes each other one wins.
func TestServer_ConditionOnAnotherSubjectHolds(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		for n := range 100 {
			a, b := fmt.Sprint("0.a.", n), fmt.Sprint("0.b.", n)
			var wins atomic.Int32
			var all sync.WaitGroup
			for _, pair := range [][2]string{{a, b}, {b, a}} {
				all.Go(func() {
					if r.batch(r.message("conditions", headerExpected, "0", headerExpectedSubject, r.name+"."+pair[1]), r.message(pair[0], headerExpected, "0")).Error == nil {
						wins.Add(1)
					}
				})
			}
			all.Wait()
			require.LessOrEqual(t, wins.Load(), int32(1), "both wrote although each demanded that the other had not")
		}
	})
}

// newEntry in append.go refuses conditions over queries: a wildcard is not
// checked against what is on its way. Here, what the same batch writes; with a
// literal subject the server refuses that.
func TestServer_WildcardConditionsAreNotSafe(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		literal := r.message("conditions", headerExpected, "0", headerExpectedSubject, r.name+".0.a.1")
		require.Equal(t, codeWrongSequenceConstant, r.refused(0, r.batch(r.message("0.a.1"), literal)))
		wildcard := r.message("conditions", headerExpected, "0", headerExpectedSubject, r.name+".0.a.*")
		a := r.batch(r.message("0.a.1"), wildcard)
		if c.Nodes() > 1 {
			require.Nil(t, a.Error, "the condition is false and was not noticed; if it is noticed now, conditions on categories could be offered")
		} else {
			t.Logf("on a single server: %+v", a)
		}
	})
}

// Keys travel in a header of our own: one message id that was used before
// refuses the whole batch.
func TestServer_MessageIDsRefuseBatches(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		last := r.put(r.message("0.a.1", "Nats-Msg-Id", "one"))
		require.Equal(t, 10201, r.refused(last, r.batch(r.message("0.b.1", "Nats-Msg-Id", "two"), r.message("0.b.2", "Nats-Msg-Id", "one"))))
	})
}

// batchMessages in append.go.
func TestServer_BatchSize(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		messages := func(n int) []*client.Msg {
			all := make([]*client.Msg, n)
			for i := range all {
				all[i] = r.message("0.a.1")
			}
			return all
		}
		require.Contains(t, []int{10199, codeIncomplete}, r.refused(0, r.batch(messages(batchMessages+1)...)))
		a := r.batch(messages(batchMessages)...)
		require.Nil(t, a.Error)
		require.Equal(t, batchMessages, a.Count)
	})
}

// batchesMany in append.go: fifty batches may be open on a stream, of all
// processes together; the next one is refused by its first message.
func TestServer_OpenBatches(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		begin := func(n int) answer {
			got, err := r.conn.RequestMsgWithContext(r.ctx, r.message("0.a.1", headerBatchID, fmt.Sprint("batch", n), headerBatchSequence, "1"))
			require.NoError(t, err)
			var a answer
			if len(got.Data) > 0 {
				require.NoError(t, json.Unmarshal(got.Data, &a))
			}
			return a
		}
		for n := range 50 {
			require.Nil(t, begin(n).Error, "batch %d", n)
		}
		require.Equal(t, codeManyInFlight, r.refused(0, begin(50)))
	})
}

// lasts in publish.go: one request tells the last messages of many subjects,
// and up to where whoever answers has the stream.
func TestServer_MultiLast(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		store, _ := openLog(t, c)
		var streams []eventstore.Stream
		for n := range 30 {
			of := eventstore.Stream{Category: "account", ID: fmt.Sprint(n)}
			streams = append(streams, of)
			if n%3 > 0 {
				_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(of, n%3)})
				require.NoError(t, err)
			}
		}
		for _, fresh := range []bool{true, false} {
			require.NoError(t, store.asking(t.Context(), "test", func(ctx context.Context) error {
				found, err := store.lasts(ctx, streams, fresh)
				if err != nil {
					return err
				}
				for n, m := range found {
					if n%3 == 0 {
						require.Nil(t, m)
						continue
					}
					require.Equal(t, streams[n], m.Stream)
					require.EqualValues(t, n%3, m.Version)
				}
				return nil
			}))
		}
	})
}

// last in requests.go: readers see all of a batch or nothing.
func TestServer_BatchesAreIsolated(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		r := newRaw(t, c)
		stop, written := make(chan struct{}), make(chan error, 1)
		go func() {
			defer close(written)
			for {
				select {
				case <-stop:
					return
				default:
				}
				var all []*client.Msg
				for i := range 50 {
					all = append(all, r.message("0.a.1", "Test-Number", fmt.Sprint(i+1)))
				}
				if a := r.batch(all...); a.Error != nil {
					written <- a.Error
					return
				}
			}
		}()
		end := sync.OnceValue(func() error { close(stop); return <-written })
		defer end()
		s, err := r.js.Stream(r.ctx, r.name)
		require.NoError(t, err)
		seen := map[uint64]bool{}
		for n := 0; len(written) == 0 && (len(seen) < 2 || n < 2000 && len(seen) <= 10); n++ {
			for _, get := range []func() (*jetstream.RawStreamMsg, error){
				func() (*jetstream.RawStreamMsg, error) { return s.GetLastMsgForSubject(r.ctx, r.name+".0.a.1") },
			} {
				m, err := get()
				if errors.Is(err, jetstream.ErrMsgNotFound) {
					continue
				}
				require.NoError(t, err)
				require.Equal(t, "50", m.Header.Get("Test-Number"), "half a batch is visible")
				seen[m.Sequence] = true
			}
		}
		require.NoError(t, end())
		require.Greater(t, len(seen), 1, "nothing was written meanwhile")
	})
}

// syncing in facts.go: the servers tell users of the system account.
func TestServer_SyncSetting(t *testing.T) {
	t.Parallel()
	for _, always := range []bool{true, false} {
		c, err := natsserver.Start(natsserver.Options{Directory: t.TempDir(), SyncAlways: always})
		require.NoError(t, err)
		defer c.Close()
		system, err := client.Connect(c.SystemURL())
		require.NoError(t, err)
		defer system.Close()
		store, _ := openLog(t, c, SystemConn(system))
		text, err := store.Durability(t.Context())
		require.NoError(t, err)
		if always {
			require.Equal(t, "synced: R1, sync always", text)
		} else {
			require.Equal(t, "not durable on power loss: R1, synced every 2m0s", text)
		}
		require.NoError(t, store.Close())
	}
}

// fresh in requests.go: of several servers one that was left behind answers
// direct gets with what it has.
func TestServer_DirectGetMayBeStale(t *testing.T) {
	t.Parallel()
	c := servers(t, 3)
	name := newName()
	maker := reopenLog(t, c, name)
	require.NoError(t, c.Settled(t.Context(), name))
	leader := func() (node int) {
		t.Helper()
		require.Eventually(t, func() bool { node = c.Leader(name); return node >= 0 }, time.Minute, 10*time.Millisecond)
		return node
	}
	// By the leader: clients of the node that is cut off stay with it.
	store, err := Open(t.Context(), c.NodeURL(leader()), Stream(name), quiet())
	require.NoError(t, err)
	defer func() { _ = store.Close() }()
	require.NoError(t, maker.Close())
	of := eventstore.Stream{Category: "account", ID: "ann"}
	first, err := store.Append(t.Context(), eventstore.Commit{Events: happened(of, 1)})
	require.NoError(t, err)
	require.NoError(t, c.Settled(t.Context(), name))
	behind := (leader() + 1) % 3
	stale, err := Open(t.Context(), c.NodeURL(behind), Stream(name), quiet(), opening, Patience(500*time.Millisecond))
	require.NoError(t, err)
	defer func() { _ = stale.Close() }()
	c.CutOff(behind)
	defer c.Rejoin(behind)
	r, err := store.Append(t.Context(), eventstore.Commit{Events: happened(of, 1)})
	require.NoError(t, err)
	require.EqualValues(t, 2, r.Revision(of).Version)

	// The server says what is not true any more. It may take a moment to notice that it is alone.
	require.Eventually(t, func() bool {
		once, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		m, err := stale.direct(once, &getRequest{Last: stale.subjects.of(of)})
		return err == nil && m != nil && m.Position == first.Last
	}, 20*time.Second, 10*time.Millisecond, "if this is never so any more, reads need not ask the leader")

	// The store does not.
	for m, err := range stale.Read(t.Context(), eventstore.OneStream(of), eventstore.ReadOptions{}) {
		require.ErrorIs(t, err, eventstore.ErrUnavailable, "%v", m)
	}
	_, err = stale.Head(t.Context())
	require.ErrorIs(t, err, eventstore.ErrUnavailable)
}

func happened(of eventstore.Stream, n int) []eventstore.Event {
	all := make([]eventstore.Event, n)
	for i := range all {
		all[i] = eventstore.Event{Stream: of, Type: "thing.happened", Data: []byte(`{}`)}
	}
	return all
}
