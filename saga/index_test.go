package saga_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// forget deletes every index and checkpoint, as when the state is lost.
func forget(t testing.TB, store backend) {
	t.Helper()
	ctx := context.Background()
	names := map[string][]string{
		"saga parcels":     {"saga.parcels.open", "saga.parcels.done"},
		"saga mixed":       {"saga.mixed.open", "saga.mixed.done"},
		"reaction welcome": {"reaction.welcome.open"},
	}
	for name, tables := range names {
		lease, err := store.Acquire(ctx, name, "operator", 0)
		require.NoError(t, err)
		require.NoError(t, store.Update(ctx, func(tx projection.StateTx) error {
			for _, table := range tables {
				if err := tx.Clear(table); err != nil {
					return err
				}
			}
			return tx.DeleteCheckpoint(lease)
		}))
		require.NoError(t, store.Release(ctx, lease))
	}
}

// TestIndex_IsMadeAgain: with sagas in every kind of state, the index and the
// checkpoint are lost; what the engine says and does is the same.
func TestIndex_IsMadeAgain(t *testing.T) {
	t.Parallel()
	for _, b := range backends {
		for _, lose := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s lost %t", b.name, lose), func(t *testing.T) {
				t.Parallel()
				steps := 0 // of the one run that has any
				def := saga.Define("mixed", func(s *saga.Run, what string) (string, error) {
					switch what {
					case "sleeps":
						return "slept", s.Sleep("wait", 30*day)
					case "awaits":
						e, err := saga.Await[Shipped](s, saga.Where(s.ID()), 60*day)
						return e.Parcel, err
					case "times out":
						_, err := saga.Await[Shipped](s, saga.Where(s.ID()), 20*day)
						return "", err
					case "retries":
						_, err := saga.Do(s, "call", func(step saga.Step) (int, error) {
							if step.Attempt() < 5 {
								return 0, errors.New("down")
							}
							return 0, nil
						}, saga.Backoff(day, 8*day))
						return "did", err
					case "fails":
						return "", errDeclined
					case "blocks":
						panic("boom")
					}
					_, err := saga.Do(s, "step", func(saga.Step) (int, error) { steps++; return 0, nil })
					if err == nil {
						_, err = saga.Do(s, "step", func(saga.Step) (int, error) { steps++; return 0, nil })
					}
					return "at once", err
				}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
				j := newJournal("retries")
				react := func() saga.Process { return saga.React("welcome", j.react, saga.Retry(2), saga.Backoff(day, day)) }

				bench := startBench(t, b.open(t), clock.NewManual(t0), saga.Options{}, def, react())
				for _, what := range []string{"sleeps", "awaits", "times out", "retries", "fails", "blocks", "ends"} {
					exec(bench, orders, Place{what, what})
				}
				bench.advance(time.Hour)
				everything := saga.ListOptions{Status: []saga.Status{saga.StatusWaiting, saga.StatusBlocked, saga.StatusCompleted, saga.StatusFailed, saga.StatusRunning}}
				list := func() []saga.Info {
					infos, err := bench.engine.List(t.Context(), "mixed", everything)
					require.NoError(t, err)
					return infos
				}
				backlogs := func() []saga.Backlog {
					all, err := bench.engine.Backlogs(t.Context(), "welcome")
					require.NoError(t, err)
					return all
				}
				before, behind := list(), backlogs()
				require.Len(t, before, 7)
				require.Len(t, behind, 1)
				bench.stop()
				if lose {
					forget(t, bench.store)
				}
				bench = startBench(t, bench.store, bench.clock, saga.Options{}, def, react())
				bench.settle()
				require.Len(t, j.handled, 6, "what was handled is not handled again")
				require.Equal(t, 2, steps, "no step runs again")
				require.Equal(t, before, list())
				require.Equal(t, behind, backlogs())

				exec(bench, orders, Ship{"awaits", "p1"})
				bench.advance(60 * day)
				got := map[string]string{}
				for _, info := range list() {
					got[info.ID] = string(info.Status)
					if info.Status == saga.StatusCompleted {
						out, err := saga.Wait(t.Context(), bench.engine, def, info.ID)
						require.NoError(t, err)
						got[info.ID] = out
					}
				}
				require.Equal(t, map[string]string{
					"sleeps": "slept", "awaits": "p1", "times out": "failed", "retries": "did", "fails": "failed", "blocks": "blocked", "ends": "at once",
				}, got)
				require.Equal(t, 2, j.tried["retries/1 retries"])
				letters, err := bench.engine.DeadLetters(t.Context(), "welcome")
				require.NoError(t, err)
				require.Len(t, letters, 1)
			})
		}
	}
}

// TestIndex_ManyTimersInOrder: timers fire at their instants, in order, also
// through restarts with a stored index.
func TestIndex_ManyTimers(t *testing.T) {
	t.Parallel()
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			def := saga.Define("alarm", func(s *saga.Run, hours int) (time.Time, error) {
				for range 3 {
					if err := s.Sleep("nap", time.Duration(hours)*time.Hour); err != nil {
						return time.Time{}, err
					}
				}
				return s.Now(), nil
			})
			bench := startBench(t, b.open(t), clock.NewManual(t0), saga.Options{}, def)
			const n = 100
			for i := range n {
				require.NoError(t, saga.Start(t.Context(), bench.engine, def, fmt.Sprint(i), i%10))
			}
			for range 5 {
				bench.advance(6 * time.Hour)
				bench = bench.restart(def)
			}
			for i := range n {
				at, err := saga.Wait(t.Context(), bench.engine, def, fmt.Sprint(i))
				require.NoError(t, err)
				require.Equal(t, t0.Add(time.Duration(3*(i%10))*time.Hour), at)
			}
		})
	}
}

// TestSynctest runs the engine on the system's clock inside a bubble.
func TestSynctest_ThousandSixtyDaySagas(t *testing.T) {
	t.Parallel()
	began := time.Now()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		runtime := aggregate.NewRuntime(store, aggregate.Options{})
		engine := saga.NewEngine(store, store, command.NewBus(runtime, command.Options{}), saga.Options{Logger: slog.New(slog.DiscardHandler)})
		def := saga.Define("grace", func(s *saga.Run, n int) (int, error) {
			if err := s.Sleep("grace", 60*day); err != nil {
				return 0, err
			}
			return n, saga.Execute(s, "fill", stocks, Fill{s.ID(), 1})
		})
		require.NoError(t, engine.Add(def))
		ctx, cancel := context.WithCancel(t.Context())
		var group sync.WaitGroup
		for _, w := range engine.Workers() {
			group.Go(func() { _ = w.Run(ctx) })
		}
		start := time.Now()
		for i := range 1000 {
			require.NoError(t, saga.Start(ctx, engine, def, fmt.Sprint(i), i))
		}
		for i := range 1000 {
			out, err := saga.Wait(ctx, engine, def, fmt.Sprint(i))
			require.NoError(t, err)
			require.Equal(t, i, out)
		}
		require.Equal(t, 60*day, time.Since(start).Truncate(time.Second))
		cancel()
		group.Wait()
		require.NoError(t, runtime.Stop(context.Background()))
	})
	t.Logf("1,000 sagas of sixty days took %s", time.Since(began))
}

func TestList(t *testing.T) {
	t.Parallel()
	def := saga.Define("listed", func(s *saga.Run, d time.Duration) (int, error) { return 0, s.Sleep("wait", d) })
	b := newBench(t, def)
	for i := range 10 {
		require.NoError(t, saga.Start(t.Context(), b.engine, def, fmt.Sprint(i), time.Duration(i)*day))
	}
	b.advance(5 * day)
	ids := func(o saga.ListOptions) []string {
		infos, err := b.engine.List(t.Context(), "listed", o)
		require.NoError(t, err)
		var ids []string
		for _, info := range infos {
			ids = append(ids, info.ID)
		}
		return ids
	}
	require.Equal(t, []string{"6", "7", "8", "9"}, ids(saga.ListOptions{}))
	require.Equal(t, []string{"0", "1", "2", "3", "4", "5"}, ids(saga.ListOptions{Status: []saga.Status{saga.StatusCompleted}}))
	require.Equal(t, []string{"3", "4"}, ids(saga.ListOptions{Status: []saga.Status{saga.StatusCompleted}, After: "2", Limit: 2}))
	infos, err := b.engine.List(t.Context(), "listed", saga.ListOptions{After: "6", Limit: 1})
	require.NoError(t, err)
	require.Equal(t, []saga.Info{{
		ID: "7", Status: saga.StatusWaiting, Started: t0, Updated: t0, Wake: t0.Add(7 * day), Step: `sleep "wait"`,
	}}, infos)
	_, err = b.engine.List(t.Context(), "unknown", saga.ListOptions{})
	require.ErrorIs(t, err, saga.ErrNotFound)
}

// TestCache_OutdatedHistory: a run goes on from a history kept in memory to
// which somebody else has added, unseen so far; the append is refused, and the
// history read again.
func TestCache_OutdatedHistory(t *testing.T) {
	t.Parallel()
	def := saga.Define("cached", func(s *saga.Run, _ int) (time.Time, error) {
		err := s.Sleep("wait", day)
		return s.Now(), err
	})
	slow := &lagging{Store: memory.New(), held: make(chan struct{})}
	b := startBench(t, slow, clock.NewManual(t0), saga.Options{}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r1", 0))
	b.settle()
	slow.hold(true)
	fired := t0.Add(time.Hour)
	_, err := b.store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{
		{Stream: history("cached", "r1"), Type: "saga.timer_fired", Data: []byte(`{"step":{"kind":"sleep","name":"wait"}}`), Time: fired},
	}})
	require.NoError(t, err)
	b.clock.Set(t0.Add(day)) // fires by itself
	out, err := saga.Wait(t.Context(), host{b.engine, slow.Store}, def, "r1")
	require.NoError(t, err)
	require.Equal(t, fired, out)
	slow.hold(false)
	b.settle()
	require.Equal(t, []string{"saga.started", "saga.timer_set", "saga.timer_fired", "saga.completed"}, b.types(history("cached", "r1")))
}

// TestCache_Bytes: histories are kept by what they weigh, not only by their
// number, and none is that is large.
func TestCache_Bytes(t *testing.T) {
	t.Parallel()
	def := saga.Define("heavy", func(s *saga.Run, size int) (int, error) {
		length := 0
		for range 2 { // as one event may not have so much
			text, err := saga.Do(s, "fetch", func(saga.Step) (string, error) { return strings.Repeat("x", size/2), nil })
			if err != nil {
				return 0, err
			}
			length += len(text)
		}
		err := s.Sleep("wait", time.Second)
		return length, err
	})
	b := startBench(t, memory.New(), clock.NewManual(t0), saga.Options{}, def)
	const light, heavy, large, most = 100, 900 << 10, 1200 << 10, 64 << 20
	start := func(n, size int) {
		for i := range n {
			require.NoError(t, saga.Start(t.Context(), b.engine, def, fmt.Sprint(size, "-", i), size))
		}
		b.settle()
	}
	start(10, large)
	n, bytes := b.engine.Cached("heavy")
	require.Zero(t, n, "each is larger than is kept")
	require.Zero(t, bytes)
	start(10, light)
	n, bytes = b.engine.Cached("heavy")
	require.Equal(t, 10, n)
	require.Less(t, bytes, 10<<10)
	start(80, heavy)
	n, bytes = b.engine.Cached("heavy")
	require.LessOrEqual(t, bytes, most)
	require.Greater(t, bytes, most-heavy-1024)
	require.Equal(t, 10+(most-10<<10)/heavy, n)
	b.clock.Set(t0.Add(day))
	b.settle()
	n, bytes = b.engine.Cached("heavy")
	require.Zero(t, n)
	require.Zero(t, bytes)
	for _, size := range []int{large, light, heavy} {
		out, err := saga.Wait(t.Context(), b.engine, def, fmt.Sprint(size, "-", 0))
		require.NoError(t, err)
		require.Equal(t, size, out)
	}
}

// host waits on a store that does not lag.
type host struct {
	*saga.Engine
	store *memory.Store
}

func (h host) Sagas() *saga.Engine { return saga.NewEngine(h.store, h.store, nil, saga.Options{}) }
