package esdb

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

func TestStore_CloseRacesFirstSubscribe(t *testing.T) {
	for range 3000 {
		db := newDatabase()
		s, err := Open(t.Context(), "", withDriver(db.client()))
		require.NoError(t, err)
		var w sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		for range 2 {
			w.Go(func() {
				for _, err := range s.Subscribe(ctx, eventstore.All(), 0) {
					if err != nil {
						require.True(t, errors.Is(err, eventstore.ErrClosed) || errors.Is(err, context.Canceled))
					}
				}
			})
		}
		require.NoError(t, s.Close())
		s.follower.mu.Lock()
		running := s.follower.running
		s.follower.mu.Unlock()
		if running {
			t.Fatal("the follower outlives Close")
		}
		cancel()
		w.Wait()
	}
}
