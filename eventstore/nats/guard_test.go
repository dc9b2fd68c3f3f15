package nats

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

// lookOften makes changes of the stream noticed at once.
func lookOften(s *settings) { s.lookEvery = 5 * time.Millisecond }

// edit changes the stream's settings as an operator would.
func edit(t *testing.T, s *Store, change func(*jetstream.StreamConfig)) {
	t.Helper()
	stream, err := s.js.Stream(t.Context(), s.settings.stream)
	require.NoError(t, err)
	config := stream.CachedInfo().Config
	change(&config)
	_, err = s.js.UpdateStream(t.Context(), config)
	require.NoError(t, err)
}

// subscription returns what ends a subscription that has caught up.
func subscription(t *testing.T, s *Store) <-chan error {
	t.Helper()
	ended, caught := make(chan error, 1), make(chan struct{}, 1)
	go func() {
		for b, err := range s.Subscribe(t.Context(), eventstore.All(), 0) {
			if err != nil {
				ended <- err
				return
			}
			if b.CaughtUp {
				select {
				case caught <- struct{}{}:
				default:
				}
			}
		}
	}()
	select {
	case <-caught:
	case err := <-ended:
		require.NoError(t, err)
	}
	return ended
}

// A setting that is made bad while the log is open stops appends and
// subscriptions by its name, and they go on when it is put right.
func TestGuard_Settings(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		for setting, change := range map[string]func(*jetstream.StreamConfig){
			"max_age":              func(s *jetstream.StreamConfig) { s.MaxAge = time.Hour },
			"max_msgs_per_subject": func(s *jetstream.StreamConfig) { s.MaxMsgsPerSubject = 1000 },
			"discard":              func(s *jetstream.StreamConfig) { s.Discard, s.MaxMsgs = jetstream.DiscardOld, 1000 },
			"max_msg_size":         func(s *jetstream.StreamConfig) { s.MaxMsgSize = 4096 },
			"allow_direct":         func(s *jetstream.StreamConfig) { s.AllowDirect = false },
			"subjects":             func(s *jetstream.StreamConfig) { s.Subjects = append(s.Subjects, s.Name+"-other.>") },
			metadataLogID:          func(s *jetstream.StreamConfig) { s.Metadata = nil },
			"it was":               func(s *jetstream.StreamConfig) { s.Metadata[metadataLogID] = "another" },
			"replicas": func(s *jetstream.StreamConfig) {
				if s.Replicas--; s.Replicas == 0 {
					s.Replicas, s.MaxAge = 1, time.Hour // there is no fewer than one
				}
			},
		} {
			if setting == "replicas" && c.Nodes() == 1 {
				continue
			}
			store, _ := openLog(t, c, hooked(lookOften))
			ann := account("ann")
			_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1)})
			require.NoError(t, err)
			ended := subscription(t, store)
			var before jetstream.StreamConfig
			edit(t, store, func(s *jetstream.StreamConfig) {
				before = *s
				before.Metadata = map[string]string{metadataLogID: s.Metadata[metadataLogID], metadataFormat: s.Metadata[metadataFormat]}
				change(s)
			})
			err = <-ended
			require.ErrorIs(t, err, eventstore.ErrUnavailable, setting)
			require.ErrorContains(t, err, setting)
			_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1)})
			require.ErrorIs(t, err, eventstore.ErrUnavailable, setting)
			require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown)
			require.ErrorContains(t, err, setting)
			require.ErrorContains(t, err, store.settings.stream)

			edit(t, store, func(s *jetstream.StreamConfig) { *s = before })
			require.Eventually(t, func() bool {
				_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1)})
				return err == nil
			}, 20*time.Second, 5*time.Millisecond, setting)
			again := subscription(t, store)
			require.Len(t, read(t, store, eventstore.All(), eventstore.ReadOptions{}), 2, "%s: what was refused is not there", setting)
			require.NoError(t, store.Close())
			require.ErrorIs(t, <-again, eventstore.ErrClosed)
		}
	})
}

// Events that are removed while the log is open stop appends and subscriptions
// for good, also when the setting that did it is put back.
func TestGuard_LostEvents(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		for how, remove := range map[string]func(t *testing.T, s *Store){
			"limit": func(t *testing.T, s *Store) {
				edit(t, s, func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = 2 })
				edit(t, s, func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = -1 })
			},
			"made anew": func(t *testing.T, s *Store) {
				require.NoError(t, s.js.DeleteStream(t.Context(), s.settings.stream))
				_, err := s.js.CreateStream(t.Context(), Config(s.settings.stream, c.Nodes(), "another"))
				require.NoError(t, err)
			},
		} {
			store, _ := openLog(t, c, hooked(lookOften))
			ann := account("ann")
			_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 5)})
			require.NoError(t, err)
			ended := subscription(t, store)
			remove(t, store)
			for err := error(nil); !errors.Is(err, eventstore.ErrGap); {
				select {
				case err = <-ended: // perhaps by a bad setting first
					if errors.Is(err, eventstore.ErrUnavailable) {
						ended = subscribeAgain(t, store)
						err = nil
						continue
					}
					require.ErrorIs(t, err, eventstore.ErrGap, how)
				case <-t.Context().Done():
					require.NoError(t, t.Context().Err())
				}
			}
			require.Eventually(t, func() bool {
				_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("bob"), 1)})
				return errors.Is(err, eventstore.ErrGap)
			}, 20*time.Second, 5*time.Millisecond, how)
			for range 3 { // it looked again meanwhile
				info, err := store.ask(t.Context())
				require.NoError(t, err)
				store.judgeStream(info)
				_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("bob"), 1)})
				require.ErrorIs(t, err, eventstore.ErrGap, how)
			}
		}
	})
}

// subscribeAgain subscribes whatever comes of it.
func subscribeAgain(t *testing.T, s *Store) chan error {
	ended := make(chan error, 1)
	go func() {
		for _, err := range s.Subscribe(t.Context(), eventstore.All(), 0) {
			if err != nil {
				ended <- err
			}
		}
	}()
	return ended
}

// That the server cannot be asked says nothing about the stream.
func TestGuard_ServerAway(t *testing.T) {
	t.Parallel()
	c := servers(t, 1)
	store, _ := openLog(t, c, hooked(func(s *settings) { lookOften(s); s.attempt = 50 * time.Millisecond }))
	_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	c.Stop(0)
	for range 3 {
		_, err := store.ask(t.Context())
		require.Error(t, err)
	}
	_, wrong := store.guard.state()
	require.NoError(t, wrong)
	require.NoError(t, c.Start(0))
	require.Eventually(t, func() bool { _, err := store.ask(t.Context()); return err == nil }, 20*time.Second, time.Millisecond)
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
}

// What an event may have follows the stream's max_msg_size, when the log is
// opened and while it is open.
func TestGuard_MessageSize(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	store, name := openLog(t, c, hooked(lookOften))
	require.Equal(t, eventstore.DefaultLimits().EventBytes, store.Limits().EventBytes)
	edit(t, store, func(s *jetstream.StreamConfig) { s.MaxMsgSize = 256 << 10 })
	require.Eventually(t, func() bool { return store.Limits().EventBytes == 192<<10 }, 20*time.Second, time.Millisecond)
	fits := func(s *Store) {
		e := happened(account("ann"), 1)
		e[0].Data = make([]byte, s.Limits().EventBytes)
		for i := range e[0].Data {
			e[0].Data[i] = '1'
		}
		_, err := s.Append(t.Context(), eventstore.Commit{Events: e})
		require.NoError(t, err)
		e[0].Data = append(e[0].Data, '1')
		_, err = s.Append(t.Context(), eventstore.Commit{Events: e})
		require.ErrorIs(t, err, eventstore.ErrTooLarge)
	}
	fits(store)
	fits(reopenLog(t, c, name))
	edit(t, store, func(s *jetstream.StreamConfig) { s.MaxMsgSize = 1000 })
	_, err := Open(context.Background(), c.URL(), Stream(name), quiet())
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.ErrorContains(t, err, "max_msg_size")
}
