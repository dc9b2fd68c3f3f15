package saga_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// lockers keeps leases by the time of the bubble.
type lockers struct {
	mu    sync.Mutex
	last  uint64
	kept  map[string]ownership.Lease
	until map[string]time.Time
}

func newLockers() *lockers {
	return &lockers{kept: map[string]ownership.Lease{}, until: map[string]time.Time{}}
}

// locker is how one node reaches them, unless it is cut off.
type locker struct {
	*lockers
	cut     atomic.Bool
	renewed atomic.Int64
}

var errCut = errors.New("no route to the leases")

func (l *locker) Acquire(_ context.Context, name, owner string, ttl time.Duration) (ownership.Lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut.Load() {
		return ownership.Lease{}, errCut
	}
	if was, ok := l.kept[name]; ok && was.Owner != owner && time.Now().Before(l.until[name]) {
		return ownership.Lease{}, fmt.Errorf("%w: by %q", ownership.ErrHeld, was.Owner)
	}
	l.last++
	lease := ownership.Lease{Name: name, Owner: owner, Epoch: l.last, Revision: l.last}
	l.kept[name], l.until[name] = lease, time.Now().Add(ttl)
	return lease, nil
}

func (l *locker) Renew(_ context.Context, lease ownership.Lease, ttl time.Duration) (ownership.Lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.cut.Load():
		return lease, errCut
	case l.kept[lease.Name].Epoch != lease.Epoch || !time.Now().Before(l.until[lease.Name]):
		return lease, ownership.ErrLost
	}
	l.last++
	l.renewed.Add(1)
	lease.Revision = l.last
	l.kept[lease.Name], l.until[lease.Name] = lease, time.Now().Add(ttl)
	return lease, nil
}

func (l *locker) Release(_ context.Context, lease ownership.Lease) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut.Load() {
		return errCut
	}
	if l.kept[lease.Name].Epoch == lease.Epoch {
		delete(l.kept, lease.Name)
	}
	return nil
}

// island is a node that shares the log with others, and nothing else.
type island struct {
	t      *testing.T
	state  *memory.Store
	leases *locker
	engine *saga.Engine
	bus    *command.Bus
	stop   func()
}

func newIsland(t *testing.T, log eventstore.Store, all *lockers, state *memory.Store, processes ...saga.Process) *island {
	t.Helper()
	n := &island{t: t, state: state, leases: &locker{lockers: all}}
	quiet := slog.New(slog.DiscardHandler)
	runtime := aggregate.NewRuntime(log, aggregate.Options{Logger: quiet})
	n.bus = command.NewBus(runtime, command.Options{})
	n.engine = saga.NewEngine(log, n.state, n.bus, saga.Options{Leases: n.leases, Logger: quiet})
	for _, p := range processes {
		require.NoError(t, n.engine.Add(p))
	}
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	for _, w := range n.engine.Workers() {
		group.Go(func() { _ = w.Run(ctx) })
	}
	n.stop = sync.OnceFunc(func() {
		cancel()
		group.Wait()
		_ = runtime.Stop(context.Background())
	})
	for _, w := range n.engine.Workers() {
		require.NoError(t, w.Ready(context.Background()))
	}
	return n
}

func (n *island) settle(log eventstore.Store) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	require.NoError(n.t, settle(ctx, log, n.engine.Workers()))
}

// One node at a time runs the saga. When it goes, or is cut off, the other one
// finds in the log what was done: every run ends, and no step runs twice.
func TestLeases_TakeOver(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"stopped", "cut off"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				log, all := memory.New(), newLockers()
				var mu sync.Mutex
				did := map[string]int{}
				var at string // the node that works
				process := func(node string) saga.Process {
					count := func(key string) {
						mu.Lock()
						defer mu.Unlock()
						did[key]++
						at = node
					}
					return saga.Define("trip", func(s *saga.Run, id string) (string, error) {
						if _, err := saga.Once(s, "first", func(saga.Step) (int, error) { count(id + " first"); return 0, nil }); err != nil {
							return "", err
						}
						if err := s.Sleep("wait", time.Minute); err != nil {
							return "", err
						}
						if _, err := saga.Once(s, "second", func(saga.Step) (int, error) { count(id + " second"); return 0, nil }); err != nil {
							return "", err
						}
						return "done", nil
					})
				}
				a := newIsland(t, log, all, memory.New(), process("a"))
				defer a.stop()
				b := newIsland(t, log, all, memory.New(), process("b"))
				defer b.stop()
				define := process("a").(*saga.Definition[string, string])
				for i := range 20 {
					id := fmt.Sprint("run ", i)
					require.NoError(t, saga.Start(t.Context(), b.engine, define, id, id))
				}
				a.settle(log)
				b.settle(log) // which does not wait for the other one
				time.Sleep(30 * time.Second)
				require.Len(t, did, 20)
				require.Equal(t, "a", at)
				require.Greater(t, a.leases.renewed.Load(), int64(5))
				gone := time.Now()
				if how == "stopped" {
					a.stop()
				} else {
					a.leases.cut.Store(true)
				}
				for i := range 20 {
					id := fmt.Sprint("run ", i)
					out, err := saga.Wait(t.Context(), b.engine, define, id)
					require.NoError(t, err)
					require.Equal(t, "done", out)
				}
				require.WithinDuration(t, gone, time.Now(), 31*time.Second, "timers go by when the run began")
				require.Equal(t, "b", at)
				require.Len(t, did, 40)
				for step, n := range did {
					require.Equal(t, 1, n, "%s", step)
				}

				// Who comes back takes over again, with an index that is out of date.
				if how == "cut off" {
					a.leases.cut.Store(false)
				} else {
					a = newIsland(t, log, all, a.state, process("a"))
					defer a.stop()
				}
				require.NoError(t, saga.Start(t.Context(), a.engine, define, "last", "last"))
				b.settle(log)
				b.stop()
				_, err := saga.Wait(t.Context(), a.engine, define, "last")
				require.NoError(t, err)
				require.Equal(t, "a", at)
				a.settle(log) // a list is as fresh as the worker
				open, err := a.engine.List(t.Context(), "trip", saga.ListOptions{})
				require.NoError(t, err)
				require.Empty(t, open)
				require.Equal(t, 1, did["last first"])
				require.Equal(t, 1, did["last second"])
			})
		})
	}
}

// The heir, who has no checkpoint, begins where the first owner did: it neither
// leaves events alone that came since, nor is undecided about them.
func TestLeases_Beginning(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		past  bool
		begin func(*saga.Reaction) *saga.Reaction
		first int
	}{
		"new log":             {false, func(r *saga.Reaction) *saga.Reaction { return r }, 1},
		"new log, from now":   {false, (*saga.Reaction).FromNow, 1},
		"past, from now":      {true, (*saga.Reaction).FromNow, 1},
		"past, from start":    {true, (*saga.Reaction).FromStart, 0},
		"new log, from start": {false, (*saga.Reaction).FromStart, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				log, all := memory.New(), newLockers()
				runtime := aggregate.NewRuntime(log, aggregate.Options{})
				bus := command.NewBus(runtime, command.Options{})
				defer func() { _ = runtime.Stop(context.Background()) }()
				place := func(i int) {
					_, err := command.Execute(t.Context(), bus, orders, Place{fmt.Sprint(i), "tea"})
					require.NoError(t, err)
				}
				if c.past {
					place(0)
				}
				blocked := make(chan struct{})
				dead := c.begin(saga.React("welcome", func(step saga.Step, _ Placed) error {
					select {
					case <-blocked:
					case <-step.Done():
					}
					return errors.New("it does not get that far")
				}))
				var mu sync.Mutex
				var seen []string
				alive := c.begin(saga.React("welcome", func(step saga.Step, _ Placed) error {
					mu.Lock()
					defer mu.Unlock()
					seen = append(seen, step.Event().Stream.ID)
					return nil
				}))
				a := newIsland(t, log, all, memory.New(), dead)
				place(1)
				time.Sleep(time.Second)
				a.leases.cut.Store(true)
				b := newIsland(t, log, all, memory.New(), alive)
				defer b.stop()
				time.Sleep(20 * time.Second)
				b.settle(log)
				mu.Lock()
				defer mu.Unlock()
				var want []string
				for i := c.first; i <= 1; i++ {
					want = append(want, fmt.Sprint(i))
				}
				require.ElementsMatch(t, want, seen)
				close(blocked)
				a.leases.cut.Store(false)
				a.stop()
			})
		})
	}
}

// A node that cannot renew its lease stops before anybody else can have it, tells
// its steps why, and can store nothing any more.
func TestLeases_StopsInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log, all := memory.New(), newLockers()
		began, told := make(chan time.Time, 1), make(chan error, 1)
		process := saga.Define("long", func(s *saga.Run, _ string) (string, error) {
			return saga.Do(s, "wait", func(step saga.Step) (string, error) {
				began <- time.Now()
				<-step.Done()
				told <- context.Cause(step)
				return "", step.Err()
			})
		})
		a := newIsland(t, log, all, memory.New(), process)
		defer a.stop()
		require.NoError(t, saga.Start(t.Context(), a.engine, process, "1", ""))
		<-began
		time.Sleep(time.Minute)
		require.Empty(t, told, "the lease is renewed while the step runs")
		a.leases.cut.Store(true)
		cut := time.Now()
		cause := <-told
		require.ErrorIs(t, cause, saga.ErrLeaseExpired)
		require.ErrorIs(t, cause, projection.ErrFenced)
		require.Less(t, time.Since(cut), 10*time.Second-4*time.Second+time.Second)
		all.mu.Lock()
		for name, until := range all.until {
			require.True(t, time.Now().Before(until), "%s: others could have it before it was let go", name)
		}
		all.mu.Unlock()
		// It comes back, and takes the run up again.
		a.leases.cut.Store(false)
		<-began
	})
}
