package nats

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

// Tags and metadata of any legal size are written: they are not in headers, of which
// the server takes 64 KiB.
func TestStore_ManyTags(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	for _, n := range []int{1, 2} {
		var open atomic.Bool
		store, _ := openLog(t, c, Patience(2*time.Second), hooked(func(s *settings) {
			s.hold = func() bool { return !open.Load() }
			s.grouping = 2
		}))
		events := happened(account("ann"), n)
		for i := range 32 {
			events[0].Tags = append(events[0].Tags, fmt.Sprintf("%02d", i)+strings.Repeat("<", 250))
		}
		events[0].Metadata.Extra = map[string]string{"large": strings.Repeat("<", 4<<10)}
		p1 := store.Enqueue(t.Context(), eventstore.Commit{Events: events})
		p2 := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(account("bob"), 1)})
		open.Store(true)
		store.scheduler.signal()
		_, err := p1.Result()
		require.NoError(t, err)
		_, err = p2.Result()
		require.NoError(t, err)
		var read []eventstore.Recorded
		for e, err := range store.Read(t.Context(), eventstore.OneStream(account("ann")), eventstore.ReadOptions{}) {
			require.NoError(t, err)
			read = append(read, e)
		}
		require.Len(t, read, n)
		require.Equal(t, events[0].Tags, read[0].Tags)
		require.Equal(t, events[0].Metadata.Extra, read[0].Metadata.Extra)
	}
}

func TestStore_Names(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	store, _ := openLog(t, c)
	for i, name := range []string{"\u00a0x\u00a0", "\u3000x\u3000", "\ufeffx", "a\u2028", "%41", "%", "a.b", "*", ">", " x ", "<&>", "\ufffd", `"q"`, "x\u2028"} {
		of := eventstore.Stream{Category: "cat", ID: name}
		if of.Validate() != nil {
			t.Logf("%q refused: %v", name, of.Validate())
			continue
		}
		if eventstore.ValidateCategory(name) == nil {
			of.Category = name
		}
		e := happened(of, 1)
		e[0].Type = "t" + name
		if !strings.Contains(name, " ") {
			e[0].Type = name
		}
		e[0].Tags = []string{name}
		commit := eventstore.Commit{Events: e, Key: name}
		r, err := store.Append(t.Context(), commit)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		for _, q := range []eventstore.Query{eventstore.OneStream(of), eventstore.Match(eventstore.Item{Category: of.Category, Types: []string{e[0].Type}})} {
			got := 0
			for m, err := range store.Read(t.Context(), q, eventstore.ReadOptions{}) {
				require.NoError(t, err)
				require.Equal(t, e[0].Type, m.Type)
				require.Equal(t, of, m.Stream)
				got++
			}
			if got != 1 {
				t.Errorf("%d %q: %d", i, name, got)
			}
		}
		again, ok, err := store.Lookup(t.Context(), of, name)
		require.NoError(t, err)
		require.True(t, ok, "%q", name)
		require.Equal(t, r.First, again.First)
	}
}

// a subscriber who is far behind, and a mirror
func TestStore_MirrorSubscribe(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		store, name := openLog(t, c, Tail(1, 1))
		for i := 0; i < 30; i++ {
			_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
			require.NoError(t, err)
		}
		m, err := store.js.CreateStream(t.Context(), jetstream.StreamConfig{Name: name + "-mirror", Storage: jetstream.FileStorage, Mirror: &jetstream.StreamSource{Name: name}, MaxMsgs: 5})
		require.NoError(t, err)
		require.Eventually(t, func() bool {
			i, err := m.Info(t.Context())
			return err == nil && i.State.LastSeq >= 30
		}, time.Minute, 10*time.Millisecond)
		short := 0
		for range 20 {
			n := 0
			for b, err := range store.Subscribe(t.Context(), eventstore.OneCategory("account"), 0) {
				require.NoError(t, err)
				n += len(b.Events)
				if b.Through == 30 {
					break
				}
			}
			if n != 30 {
				short++
			}
		}
		t.Logf("%d of 20 subscriptions skipped events", short)
		require.Zero(t, short)
	})
}

// restored while a commit is about to be sent
func TestStore_RestoredWhileSending(t *testing.T) {
	t.Parallel()
	directory, backup := t.TempDir(), t.TempDir()
	c, err := natsserver.Start(natsserver.Options{Directory: directory})
	require.NoError(t, err)
	defer c.Close()
	var armed atomic.Bool
	first := once()
	ann, bob := account("ann"), account("bob")
	var name string
	var store *Store
	store, name = openLog(t, c, hooked(func(s *settings) {
		s.sending = nil
	}))
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(bob, 1)})
	require.NoError(t, err)
	c.Stop(0)
	require.NoError(t, os.CopyFS(backup, os.DirFS(directory)))
	require.NoError(t, c.Start(0))
	require.Eventually(t, func() bool {
		_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1)})
		return err == nil
	}, 10*time.Second, time.Millisecond)
	store.settings.sending = nil
	_ = armed.Load()
	reconnects := store.conn.Stats().Reconnects
	hook := func() {
		if !first() {
			return
		}
		c.Stop(0)
		_ = os.RemoveAll(directory)
		_ = os.CopyFS(directory, os.DirFS(backup))
		if err := c.Start(0); err != nil {
			t.Error(err)
		}
		other, err := Open(context.Background(), c.URL(), Stream(name), quiet())
		if err != nil {
			t.Error(err)
			return
		}
		defer other.Close()
		r, err := other.Append(context.Background(), eventstore.Commit{Events: happened(ann, 1)})
		t.Logf("other wrote %d %v", r.Last, err)
		for store.conn.Stats().Reconnects == reconnects || !store.conn.IsConnected() {
			time.Sleep(time.Millisecond)
		}
	}
	// nothing is in flight: the hook may be set
	set := store
	set.settings.swallow = nil
	store.scheduler.mu.Lock()
	store.settings.hold = nil
	store.scheduler.mu.Unlock()
	_ = hook
	p := func() error {
		s := store
		e, err := s.newEntry(eventstore.Commit{Events: happened(ann, 1)})
		require.NoError(t, err)
		done := make(chan error, 1)
		e.done = func(_ eventstore.Receipt, err error) { done <- err }
		pl, err := s.plan(s.base, []*entry{e}, map[eventstore.Stream]bool{}, false)
		require.NoError(t, err)
		require.True(t, pl.begin())
		hook()
		o, firstSeq, err := s.send(pl, reconnects)
		t.Logf("outcome %v first %d err %v", o, firstSeq, err)
		if o == outcomeWritten {
			return nil
		}
		return errors.New("not written")
	}()
	all := read(t, reopenLog(t, c, name), eventstore.OneStream(ann), eventstore.ReadOptions{})
	for _, e := range all {
		t.Logf("version %d at %d", e.Version, e.Position)
	}
	require.Error(t, p, "an event follows one that was lost")
}
