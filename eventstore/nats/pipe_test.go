package nats

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

// Loads give every event once and in order, whatever becomes of the answers,
// and also while many share the subscription.
func TestLoad_AnswersLostAndTwice(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		writer, name := openLog(t, c)
		lengths := []int{1, 2, pointers, pointers + 1, 2*pointers + 1, 100, 500}
		for i, n := range lengths {
			for left := n; left > 0; left -= min(left, 30) {
				_, err := writer.Append(t.Context(), eventstore.Commit{Events: happened(account(fmt.Sprint(i)), min(left, 30))})
				require.NoError(t, err)
			}
		}
		for kind, copies := range map[string]func() int{
			"once": func() int { return 1 }, "twice": func() int { return 2 }, "lost": func() int { return 0 },
			"any": func() int { return rand.IntN(3) },
		} {
			store := reopenLog(t, c, name, hooked(func(s *settings) { s.copies = copies; s.attempt = 100 * time.Millisecond }))
			var all sync.WaitGroup
			for w := range 8 {
				all.Go(func() {
					for k := range lengths {
						i := (k + w) % len(lengths)
						var versions []uint64
						for e, err := range store.Read(t.Context(), eventstore.OneStream(account(fmt.Sprint(i))), eventstore.ReadOptions{Backward: w%4 == 3}) {
							if err != nil {
								t.Errorf("%s: %v", kind, err)
								return
							}
							versions = append(versions, e.Version)
						}
						if len(versions) != lengths[i] {
							t.Errorf("%s: %d events of %d", kind, len(versions), lengths[i])
						}
						for k, v := range versions {
							if want := uint64(k + 1); w%4 != 3 && v != want || w%4 == 3 && v != uint64(lengths[i]-k) {
								t.Errorf("%s: event %d has version %d", kind, k, v)
							}
						}
					}
				})
			}
			all.Wait()
			store.pipe.mu.Lock()
			require.Empty(t, store.pipe.loads, "loads that have ended")
			store.pipe.mu.Unlock()
		}
	})
}

// A load whose caller has gone, or whose connection breaks, ends.
func TestLoad_Ends(t *testing.T) {
	t.Parallel()
	c := servers(t, 1)
	var lost atomic.Bool
	store, _ := openLog(t, c, Patience(time.Minute), hooked(func(s *settings) {
		s.attempt = 200 * time.Millisecond
		s.copies = func() int {
			if lost.Load() {
				return 0
			}
			return 1
		}
	}))
	ann := account("ann")
	_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 100)})
	require.NoError(t, err)
	h, ok := store.heads.get(ann)
	require.True(t, ok)
	lost.Store(true)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = store.history(ended, ann, h, 0, 0)
	require.ErrorIs(t, err, context.Canceled)
	c.Stop(0)
	done := make(chan error, 1)
	go func() {
		found, err := store.history(t.Context(), ann, h, 0, 0)
		if err == nil && len(found) != 100 {
			err = fmt.Errorf("%d events", len(found))
		}
		done <- err
	}()
	require.NoError(t, c.Start(0))
	lost.Store(false)
	require.NoError(t, <-done)
}

// A stream that is too large to be held is read by pages, from where it is wanted.
func TestLoad_LargeStream(t *testing.T) {
	t.Parallel()
	store, _ := openLog(t, shared.get(t, 1), hooked(func(s *settings) { s.streamBytes = 10000 }))
	ann := account("ann")
	for n := range 40 {
		events := append(happened(ann, 2), happened(account("bob"), 1)...)
		events[0].Data = make([]byte, n*20)
		_, err := store.Append(t.Context(), eventstore.Commit{Events: events})
		require.NoError(t, err)
	}
	all := read(t, store, eventstore.OneStream(ann), eventstore.ReadOptions{})
	require.Len(t, all, 80)
	for i, e := range all {
		require.EqualValues(t, i+1, e.Version)
		rest := read(t, store, eventstore.OneStream(ann), eventstore.ReadOptions{After: e.Position})
		require.Len(t, rest, 79-i)
		require.Len(t, read(t, store, eventstore.OneStream(ann), eventstore.ReadOptions{Through: e.Position}), i+1)
	}
}

// Of a stream that has lost its beginning a load says so.
func TestLoad_Hole(t *testing.T) {
	t.Parallel()
	store, name := openLog(t, shared.get(t, 1))
	ann := account("ann")
	_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 100)})
	require.NoError(t, err)
	stream, err := store.js.Stream(t.Context(), name)
	require.NoError(t, err)
	config := stream.CachedInfo().Config
	config.DenyDelete = true
	config.Discard, config.MaxMsgs = jetstream.DiscardOld, 60
	_, err = store.js.UpdateStream(t.Context(), config)
	require.NoError(t, err)
	h, _ := store.heads.get(ann)
	_, err = store.history(t.Context(), ann, h, 0, 0)
	require.ErrorIs(t, err, eventstore.ErrGap)
	_, err = store.history(t.Context(), ann, h, 40, 0)
	require.NoError(t, err)
}

// A mirror of what the log was once answers: the same streams and versions at the
// same sequences, but other events. They are not believed, and the load is repeated
// with what tells whose they are.
func TestLoad_OfAnotherPast(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	for name, change := range map[string]func(m *message, e *eventstore.Event){
		"another event":  func(m *message, e *eventstore.Event) { e.ID = uuid.New() },
		"another stream": func(m *message, e *eventstore.Event) { e.Stream = account("bob") },
		"another version": func(m *message, e *eventstore.Event) {
			m.Version++
			m.previous = m.previous.next(m.Version, uint64(m.Position)-1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			names := subjects{}
			var bare, headed atomic.Int64
			store, _ := openLog(t, c, hooked(func(s *settings) {
				s.tamper = func(answer *client.Msg) {
					if len(answer.Header) > 0 {
						headed.Add(1)
						return
					}
					bare.Add(1)
					m, err := names.decode("", 1<<40, answer.Data)
					if err != nil || m.Version != 30 {
						return
					}
					e := eventstore.Event{ID: m.ID, Stream: m.Stream, Type: m.Type, Data: []byte("another"), Time: m.Time}
					change(m, &e)
					var written encoded
					err = names.encode(&e, &written)
					if err == nil {
						answer.Data = written.payload(place{version: m.Version, before: m.before, previous: m.previous, index: 1, count: 1})
					}
				}
			}))
			names.prefix = store.subjects.prefix
			ann := account("ann")
			events := happened(ann, 100)
			for _, e := range events {
				_, err := store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{e}})
				require.NoError(t, err)
			}
			got := read(t, store, eventstore.OneStream(ann), eventstore.ReadOptions{})
			require.Len(t, got, len(events))
			for i := range got {
				require.Equal(t, string(events[i].Data), string(got[i].Data))
				require.EqualValues(t, i+1, got[i].Version)
			}
			require.NotZero(t, bare.Load())
			require.GreaterOrEqual(t, headed.Load(), int64(90), "it was repeated")
		})
	}
}
