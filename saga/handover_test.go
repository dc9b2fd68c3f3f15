package saga_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/saga"
)

// alone is where a node finds nobody else, unless the server is down.
type alone struct {
	server *server
	self   atomic.Pointer[ownership.Member]
}

func (a *alone) Join(_ context.Context, self ownership.Member, _ time.Duration) error {
	a.self.Store(&self)
	return a.server.reach()
}

func (a *alone) Leave(context.Context, string) error { return a.server.reach() }

func (a *alone) Members(context.Context) ([]ownership.Member, error) {
	return []ownership.Member{*a.self.Load()}, a.server.reach()
}

// A database that is away for longer than members are believed in ends the turns
// of all of them, and what was done last cannot be stored. All goes on when it is
// back.
func TestHandover_OutlivesAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, c := newServer(), clock.NewManual(t0)
		defer store.Close()
		group := ownership.New(&alone{server: store}, ownership.Options{Logger: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = group.Run(ctx) })
		defer running.Wait()
		defer cancel()
		var handled []string
		var fails atomic.Bool
		b := startBench(t, store, c, saga.Options{Group: group}, saga.React("welcome", func(step saga.Step, e Placed) error {
			handled = append(handled, e.SKU)
			if fails.CompareAndSwap(true, false) {
				store.down.Store(true)
			}
			return nil
		}))
		exec(b, orders, Place{"o1", "first"})
		b.settle()
		for range 3 {
			fails.Store(true)
			exec(b, orders, Place{"o2", "last"})
			time.Sleep(5 * time.Minute)
			require.True(t, store.down.Load())
			store.down.Store(false)
			time.Sleep(20 * time.Second)
		}
		exec(b, orders, Place{"o3", "next"})
		b.settle()
		require.Equal(t, "first", handled[0])
		require.Equal(t, "next", handled[len(handled)-1])
		require.NoError(t, errors.Join(b.stop()...))
	})
}
