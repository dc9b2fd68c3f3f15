package nats

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// One commit cannot be written for a reason that the server does not tell in the
// answer to the batch; others share its group.
func TestStore_RefusedBatchWithOthers(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	for _, n := range []int{1, 2} {
		var open atomic.Bool
		store, name := openLog(t, c, Patience(5*time.Second), hooked(func(s *settings) {
			s.hold = func() bool { return !open.Load() }
			s.grouping = 2
			s.lookEvery = time.Hour // the new limit is not noticed
		}))
		s, err := store.js.Stream(t.Context(), name)
		require.NoError(t, err)
		config := s.CachedInfo().Config
		config.MaxMsgSize = 4096
		_, err = store.js.UpdateStream(t.Context(), config)
		require.NoError(t, err)
		events := happened(account("ann"), n)
		events[0].Data = make([]byte, 10000)
		for i := range events[0].Data {
			events[0].Data[i] = '1'
		}
		began := time.Now()
		p1 := store.Enqueue(t.Context(), eventstore.Commit{Events: events})
		p2 := store.Enqueue(t.Context(), eventstore.Commit{Events: happened(account("bob"), 1)})
		open.Store(true)
		store.scheduler.signal()
		_, e1 := p1.Result()
		_, e2 := p2.Result()
		t.Logf("%d events: %v / %v after %s", n, e1, e2, time.Since(began))
		if e2 != nil {
			t.Errorf("%d events: innocent: %v", n, e2)
		}
	}
}

// The log is full (discard new).
func TestStore_Full(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	store, name := openLog(t, c, Patience(2*time.Second))
	s, err := store.js.Stream(t.Context(), name)
	require.NoError(t, err)
	config := s.CachedInfo().Config
	config.MaxMsgs = 3
	_, err = store.js.UpdateStream(t.Context(), config)
	require.NoError(t, err)
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 2)})
	require.NoError(t, err)
	began := time.Now()
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 3)})
	t.Logf("batch: %v after %s", err, time.Since(began))
	require.Error(t, err)
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	began = time.Now()
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	t.Logf("one: %v after %s", err, time.Since(began))
	require.Error(t, err)
	require.Len(t, read(t, store, eventstore.All(), eventstore.ReadOptions{}), 3)
}

func reopenLogErr(t *testing.T, url, name string) error {
	s, err := Open(context.Background(), url, Stream(name), quiet())
	if err == nil {
		_ = s.Close()
	}
	return err
}

// Close while commits wait and are in flight and the server is away.
func TestStore_CloseWithServerAway(t *testing.T) {
	t.Parallel()
	c := servers(t, 1)
	store, _ := openLog(t, c, hooked(func(s *settings) { s.attempt = 300 * time.Millisecond }))
	_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() {
		for _, err := range store.Subscribe(context.Background(), eventstore.All(), 0) {
			if err != nil {
				ended <- err
			}
		}
	}()
	c.Stop(0)
	var ps []*eventstore.Pending
	for i := range 50 {
		ps = append(ps, store.Enqueue(t.Context(), eventstore.Commit{Events: happened(account(string(rune('a'+i%7))), 1+i%2)}))
	}
	began := time.Now()
	require.NoError(t, store.Close())
	t.Logf("Close took %s", time.Since(began))
	for _, p := range ps {
		_, err := p.Result()
		require.Error(t, err)
		if errors.Is(err, eventstore.ErrOutcomeUnknown) {
			t.Logf("%v", err)
		}
	}
	require.ErrorIs(t, <-ended, eventstore.ErrClosed)
	require.Less(t, time.Since(began), 10*time.Second)
}

// a very large event in pages
func TestStore_LargeEvents(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	store, _ := openLog(t, c, Tail(1, 1))
	data := make([]byte, 1<<20-1000)
	for i := range data {
		data[i] = '1'
	}
	for i := range 5 {
		e := happened(account(string(rune('a'+i))), 1)
		e[0].Data = data
		_, err := store.Append(t.Context(), eventstore.Commit{Events: e})
		require.NoError(t, err)
	}
	for _, back := range []bool{true, false} {
		require.Len(t, read(t, store, eventstore.OneCategory("account"), eventstore.ReadOptions{Backward: back}), 5)
		require.Len(t, read(t, store, eventstore.All(), eventstore.ReadOptions{Backward: back}), 5)
	}
}
