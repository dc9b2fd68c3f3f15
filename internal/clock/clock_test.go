package clock_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/clock"
)

func TestSystem_NewTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		for _, d := range []time.Duration{-time.Hour, 0, time.Second, 5 * time.Minute, 61 * 24 * time.Hour} {
			at := time.Now().Add(d)
			elapsed, _ := clock.System{}.NewTimer(at)
			now := <-elapsed
			require.Equal(t, max(d, 0), now.Sub(at)+d, "it fires at its time")
		}
		elapsed, stop := clock.System{}.NewTimer(time.Now().Add(time.Hour))
		time.Sleep(30 * time.Minute)
		stop()
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Empty(t, elapsed)
		require.True(t, time.Since(begin) > 61*24*time.Hour)
	})
}

func TestManual(t *testing.T) {
	t.Parallel()
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	m := clock.NewManual(begin)
	past, _ := m.NewTimer(begin)
	require.Len(t, past, 1, "what is due already fires at once")
	soon, _ := m.NewTimer(begin.Add(time.Hour))
	late, _ := m.NewTimer(begin.Add(2 * time.Hour))
	abandoned, abandon := m.NewTimer(begin.Add(time.Hour))
	abandon()
	m.Set(begin.Add(time.Hour))
	require.Len(t, soon, 1)
	require.Empty(t, late)
	require.Empty(t, abandoned)
	m.Set(begin)
	require.Equal(t, begin.Add(time.Hour), m.Now(), "it does not go back")
}
