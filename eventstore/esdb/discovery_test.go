package esdb_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

func TestStore_CloseWhileConnecting(t *testing.T) {
	server := ours(t)
	store, err := esdb.Open(t.Context(), server.URL())
	require.NoError(t, err)
	entered := make(chan struct{}, 100)
	server.Intercept(func(ctx context.Context, m string) error {
		if strings.Contains(m, "GetSupportedMethods") {
			entered <- struct{}{}
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	server.Down()
	done := make(chan error, 1)
	go func() { _, err := store.Head(context.Background()); done <- err }()
	early, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = store.Head(early) // the client is found broken
	require.Error(t, err)
	require.NoError(t, server.Up())
	<-entered
	began := time.Now()
	err = store.Close()
	t.Log(time.Since(began), err, <-done)
	require.Less(t, time.Since(began), 12*time.Second) // drain, and the client's gossipTimeout
}

func TestStore_NewerEventOfAnotherCategory(t *testing.T) {
	server := ours(t)
	store := open(t, server.URL())
	_, err := store.Append(t.Context(), happened(2))
	require.NoError(t, err)
	d := connect(t, server.URL())
	_, err = d.Append(t.Context(), "order-1", driver.NoStream, []driver.Event{{ID: uuid.New(), Type: "x", Data: []byte("{}"), Metadata: []byte(`{"deed":2,"time":"2026-01-01T00:00:00Z"}`)}})
	require.NoError(t, err)
	for _, q := range []eventstore.Query{eventstore.OneCategory("account"), eventstore.OneStream(ann)} {
		for _, backward := range []bool{false, true} {
			got, err := collect(store, t.Context(), q, eventstore.ReadOptions{Backward: backward})
			require.NoError(t, err)
			require.Len(t, got, 2)
		}
	}
	_, err = collect(store, t.Context(), eventstore.All(), eventstore.ReadOptions{})
	require.ErrorIs(t, err, eventstore.ErrNewerVersion)
}

func TestStore_ServerForgetsRecentWritesAtRestart(t *testing.T) {
	server := ours(t)
	d := connect(t, server.URL())
	e := []driver.Event{{ID: uuid.New(), Type: "x", Data: []byte("{}")}}
	_, err := d.Append(t.Context(), "other-1", driver.Any, e)
	require.NoError(t, err)
	require.NoError(t, server.Restart())
	var a driver.Appended
	for range 50 {
		if a, err = d.Append(t.Context(), "other-1", driver.Any, e); err == nil {
			break
		}
	}
	require.NoError(t, err)
	require.Equal(t, uint64(1), a.Revision, "a server that was restarted has forgotten")
}
