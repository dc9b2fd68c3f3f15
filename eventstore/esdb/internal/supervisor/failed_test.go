package supervisor_test

import (
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
