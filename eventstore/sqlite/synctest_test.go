package sqlite

import (
	"context"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// In a bubble the store only ever parks on channels, so that time can jump.
func TestStore_Synctest(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log.db")
	synctest.Test(t, func(t *testing.T) {
		s, err := Open(t.Context(), path, checkpointAt(10))
		require.NoError(t, err)
		begin := time.Now()
		seen := make(chan eventstore.Position)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			defer close(seen)
			for batch, err := range s.Subscribe(ctx, eventstore.OfTypes("monthly"), 0) {
				if err != nil {
					return
				}
				for _, e := range batch.Events {
					seen <- e.Position
				}
			}
		}()
		for month := range 12 {
			time.Sleep(30 * 24 * time.Hour)
			r, err := s.Append(t.Context(), eventstore.Commit{Events: one(ann, "monthly")})
			require.NoError(t, err)
			require.Equal(t, r.Last, <-seen)
			require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error { return tx.Put("months", "n", []byte{byte(month)}) }))
			synctest.Wait() // everything has parked
		}
		require.Equal(t, 12*30*24*time.Hour, time.Since(begin))
		lease, err := s.Acquire(t.Context(), "work", "a", time.Minute)
		require.NoError(t, err)
		require.Equal(t, time.Now().Add(time.Minute).UTC(), lease.Until)
		_, err = s.Acquire(t.Context(), "work", "b", time.Minute)
		require.ErrorIs(t, err, projection.ErrLeaseHeld)
		time.Sleep(time.Minute)
		_, err = s.Acquire(t.Context(), "work", "b", time.Minute)
		require.NoError(t, err)
		cancel()
		<-seen
		require.NoError(t, s.Close())
	})
}
