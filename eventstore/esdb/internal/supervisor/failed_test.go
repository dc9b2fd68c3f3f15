package supervisor_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A call that fails before it has started is not waited for by itself, nor is
// its generation by whoever closes.
func TestFailed_BeforeStarted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := &factory{}
		s := f.new()
		gone := errors.New("gone")
		began := time.Now()
		for range 3 {
			called, err := s.Do(t.Context(), func(g *generation, _ *client, _ func()) { g.Failed(gone) })
			require.True(t, called)
			require.NoError(t, err)
		}
		require.Less(t, time.Since(began), time.Second, "nothing but the pauses between attempts")
		began = time.Now()
		require.NoError(t, s.Close())
		require.Zero(t, time.Since(began))
		require.Zero(t, s.Old())
	})
}

// A client that hangs a call before it has started, without a word, is left by
// those who come after: also where each of them has little time.
func TestGo_AClientThatHangsIsLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := &factory{}
		s := f.new()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		called, err := s.Do(ctx, func(_ *generation, c *client, _ func()) { <-c.hang })
		require.True(t, called)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		time.Sleep(3 * time.Second)
		used := 0
		_, err = s.Do(t.Context(), func(_ *generation, c *client, started func()) {
			started()
			used = c.n
		})
		require.NoError(t, err)
		require.Equal(t, 2, used)
		time.Sleep(time.Minute)
		_, err = s.Do(t.Context(), func(_ *generation, c *client, started func()) { used = c.n })
		require.NoError(t, err)
		require.Equal(t, 2, used, "calls that have started are not watched")
		require.NoError(t, s.Close())
	})
}
