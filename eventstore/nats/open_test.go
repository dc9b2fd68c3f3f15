package nats

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

// A stream that can lose events, or in which appends cannot be checked, is
// refused by the name of the setting.
func TestOpen_RefusesBadStreams(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	conn, err := c.Connect()
	require.NoError(t, err)
	defer conn.Close()
	js, err := jetstream.New(conn)
	require.NoError(t, err)
	for setting, change := range map[string]func(*jetstream.StreamConfig){
		"retention":              func(s *jetstream.StreamConfig) { s.Retention = jetstream.InterestPolicy },
		"storage":                func(s *jetstream.StreamConfig) { s.Storage = jetstream.MemoryStorage },
		"max_age":                func(s *jetstream.StreamConfig) { s.MaxAge = time.Hour },
		"max_msgs_per_subject":   func(s *jetstream.StreamConfig) { s.MaxMsgsPerSubject = 5 },
		"discard":                func(s *jetstream.StreamConfig) { s.Discard, s.MaxMsgs = jetstream.DiscardOld, 5 },
		"with max_bytes":         func(s *jetstream.StreamConfig) { s.Discard, s.MaxBytes = jetstream.DiscardOld, 5000 },
		"allow_rollup_hdrs":      func(s *jetstream.StreamConfig) { s.AllowRollup, s.DenyPurge = true, false },
		"allow_msg_ttl":          func(s *jetstream.StreamConfig) { s.AllowMsgTTL = true },
		"no_ack":                 func(s *jetstream.StreamConfig) { s.NoAck, s.AllowAtomicPublish = true, false },
		"allow_direct":           func(s *jetstream.StreamConfig) { s.AllowDirect = false },
		"allow_atomic":           func(s *jetstream.StreamConfig) { s.AllowAtomicPublish = false },
		"deny_delete":            func(s *jetstream.StreamConfig) { s.DenyDelete = false },
		"deny_purge":             func(s *jetstream.StreamConfig) { s.DenyPurge = false },
		"subjects":               func(s *jetstream.StreamConfig) { s.Subjects = append(s.Subjects, s.Name+"-other.>") },
		metadataLogID:            func(s *jetstream.StreamConfig) { s.Metadata = nil },
		metadataFormat:           func(s *jetstream.StreamConfig) { s.Metadata[metadataFormat] = "x" },
		metadataFormat + " is 1": func(s *jetstream.StreamConfig) { s.Metadata[metadataFormat] = "1" },
		metadataFormat + " is 2": func(s *jetstream.StreamConfig) { s.Metadata[metadataFormat] = "2" },
	} {
		config := Config(newName(), 1, "x")
		change(&config)
		_, err := js.CreateStream(t.Context(), config)
		require.NoError(t, err, setting)
		_, err = Open(t.Context(), c.URL(), Stream(config.Name), quiet())
		require.ErrorIs(t, err, eventstore.ErrInvalid, setting)
		require.ErrorContains(t, err, setting)
		require.ErrorContains(t, err, config.Name, "the error names the stream")
	}
	newer := Config(newName(), 1, "x")
	newer.Metadata[metadataFormat] = strconv.Itoa(format + 1)
	_, err = js.CreateStream(t.Context(), newer)
	require.NoError(t, err)
	_, err = Open(t.Context(), c.URL(), Stream(newer.Name), quiet())
	require.ErrorIs(t, err, eventstore.ErrNewerVersion)
}

func TestOpen_Options(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	for name, o := range map[string]Option{
		`"a.b"`: Stream("a.b"), "6 replicas": Replicas(6), "patience": Patience(0), "tail": Tail(0, 1), "clock": Now(nil), "logger": Logger(nil), "system": SystemConn(nil),
	} {
		_, err := Open(t.Context(), c.URL(), o)
		require.ErrorIs(t, err, eventstore.ErrInvalid, name)
		require.ErrorContains(t, err, name)
	}
	_, err := Open(t.Context(), c.URL(), Stream(newName()), WithoutCreation())
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.ErrorContains(t, err, "WithoutCreation")
	_, err = Open(t.Context(), "")
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	_, err = Open(t.Context(), "nats://127.0.0.1:1")
	require.ErrorIs(t, err, eventstore.ErrUnavailable)
	_, err = OpenConn(t.Context(), nil)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	for _, bad := range []string{"?stream=a.b", "?replicas=x", "?replicas=9", "?streams=x"} {
		_, err = Open(t.Context(), c.URL()+bad)
		require.ErrorIs(t, err, eventstore.ErrInvalid, bad)
	}
	name := newName()
	s, err := Open(t.Context(), c.URL()+"/?stream="+name+"&replicas=1", quiet())
	require.NoError(t, err)
	defer func() { _ = s.Close() }()
	require.Equal(t, name, s.settings.stream)
	_, err = Open(t.Context(), c.URL(), Stream(name), Replicas(3), quiet())
	require.ErrorContains(t, err, "1 replicas, 3 were asked for")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Open(ended, c.URL())
	require.ErrorIs(t, err, context.Canceled)
}

func TestOpen_OldServers(t *testing.T) {
	t.Parallel()
	for version, good := range map[string]bool{"2.12.0": true, "2.15.2": true, "3.0.0": true, "2.12.0-RC.1": true, "2.11.9": false, "1.4.0": false, "": false, "dev": false} {
		err := checkVersion(version)
		if good {
			require.NoError(t, err, version)
		} else {
			require.ErrorIs(t, err, eventstore.ErrInvalid, version)
		}
	}
}

// What is given up is said once when the log is opened, and not when nothing is.
func TestOpen_Warns(t *testing.T) {
	t.Parallel()
	for _, always := range []bool{true, false} {
		c, err := natsserver.Start(natsserver.Options{Directory: t.TempDir(), SyncAlways: always})
		require.NoError(t, err)
		defer c.Close()
		system, err := client.Connect(c.SystemURL())
		require.NoError(t, err)
		defer system.Close()
		for _, asked := range []bool{true, false} {
			var log bytes.Buffer
			options := []Option{Stream(newName()), Logger(slog.New(slog.NewTextHandler(&log, nil)))}
			if asked {
				options = append(options, SystemConn(system))
			}
			s, err := Open(t.Context(), c.URL(), options...)
			require.NoError(t, err)
			require.NoError(t, s.Close())
			warnings := strings.Count(log.String(), "level=WARN")
			if always && asked {
				require.Zero(t, warnings, "%s", &log)
			} else {
				require.Equal(t, 1, warnings, "%s", &log)
				require.Contains(t, log.String(), "lose")
			}
		}
	}
}

// A program with a connection of its own keeps it.
func TestOpenConn(t *testing.T) {
	t.Parallel()
	conn, err := shared.get(t, 1).Connect()
	require.NoError(t, err)
	defer conn.Close()
	s, err := OpenConn(t.Context(), conn, Stream(newName()), quiet())
	require.NoError(t, err)
	_, err = s.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.True(t, conn.IsConnected())
	require.True(t, s.Shared())
}

// A log that lost its end and went on from there is noticed by whoever has seen
// more: appends and subscriptions fail instead of going on with other events.
func TestOpen_RestoredServer(t *testing.T) {
	t.Parallel()
	for _, goesOn := range []bool{false, true} {
		directory, backup := t.TempDir(), t.TempDir()
		c, err := natsserver.Start(natsserver.Options{Directory: directory})
		require.NoError(t, err)
		defer c.Close()
		store, name := openLog(t, c)
		ann := account("ann")
		_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 2)})
		require.NoError(t, err)
		c.Stop(0)
		require.NoError(t, os.CopyFS(backup, os.DirFS(directory)))
		require.NoError(t, c.Start(0))
		ended := make(chan error, 1)
		caught := make(chan struct{}, 100)
		go func() {
			for b, err := range store.Subscribe(t.Context(), eventstore.All(), 0) {
				if err != nil {
					ended <- err
				} else if b.Through == 5 {
					caught <- struct{}{}
				}
			}
		}()
		r, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 3)})
		require.NoError(t, err)
		require.EqualValues(t, 5, r.Last)
		<-caught
		c.Stop(0)
		require.NoError(t, os.RemoveAll(directory))
		require.NoError(t, os.CopyFS(directory, os.DirFS(backup)))
		require.NoError(t, c.Start(0))
		if goesOn {
			other := reopenLog(t, c, name)
			_, err = other.Append(t.Context(), eventstore.Commit{Events: happened(account("bob"), 9)})
			require.NoError(t, err)
		}
		require.ErrorIs(t, <-ended, eventstore.ErrGap)
		_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1)})
		require.ErrorIs(t, err, eventstore.ErrGap)
	}
}

// The same when the server is restored in the moment between looking whether the
// log is the one that was seen and following it.
func TestSubscribe_RestoredBeforeItFollows(t *testing.T) {
	t.Parallel()
	directory, backup := t.TempDir(), t.TempDir()
	c, err := natsserver.Start(natsserver.Options{Directory: directory})
	require.NoError(t, err)
	defer c.Close()
	store, name := openLog(t, c)
	ann := account("ann")
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 2)})
	require.NoError(t, err)
	c.Stop(0)
	require.NoError(t, os.CopyFS(backup, os.DirFS(directory)))
	require.NoError(t, c.Start(0))
	r, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 3)})
	require.NoError(t, err)

	looked, goOn := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(goOn) })
	defer release()
	stop := sync.OnceFunc(func() { close(looked); <-goOn })
	store.settings.following = stop
	ended := make(chan error, 1)
	go func() {
		for b, err := range store.Subscribe(t.Context(), eventstore.All(), r.Last) {
			if err != nil || len(b.Events) > 0 {
				ended <- err
				return
			}
		}
	}()
	<-looked
	c.Stop(0)
	require.NoError(t, os.RemoveAll(directory))
	require.NoError(t, os.CopyFS(directory, os.DirFS(backup)))
	require.NoError(t, c.Start(0))
	_, err = reopenLog(t, c, name).Append(t.Context(), eventstore.Commit{Events: happened(account("bob"), 9)})
	require.NoError(t, err)
	require.Eventually(t, func() bool { return store.conn.Stats().Reconnects >= 2 && store.conn.IsConnected() }, time.Minute, time.Millisecond)
	release()
	require.ErrorIs(t, <-ended, eventstore.ErrGap, "it goes on with what it has never seen the beginning of")
}
