package projection_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/metric"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// shared is a memory store that says what one on a server does, and lets a
// test make it unreachable or come between.
type shared struct {
	*memory.Store
	down  atomic.Bool
	views atomic.Int64
	// update and release run instead, if they are set.
	update  func(ctx context.Context, fn func(projection.StateTx) error) error
	release func(ctx context.Context, l projection.Lease) error
}

func (s *shared) Shared() bool { return true }

var errDown = fmt.Errorf("no route to host: %w", eventstore.ErrUnavailable)

func (s *shared) reach() error {
	if s.down.Load() {
		return errDown
	}
	return nil
}

func (s *shared) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := s.reach(); err != nil {
		return err
	}
	if s.update != nil {
		return s.update(ctx, fn)
	}
	return s.Store.Update(ctx, fn)
}

func (s *shared) View(ctx context.Context, fn func(projection.StateTx) error) error {
	s.views.Add(1)
	if err := s.reach(); err != nil {
		return err
	}
	return s.Store.View(ctx, fn)
}

func (s *shared) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	if err := s.reach(); err != nil {
		return projection.Lease{}, err
	}
	return s.Store.Acquire(ctx, name, owner, ttl)
}

func (s *shared) Release(ctx context.Context, l projection.Lease) error {
	if err := s.reach(); err != nil {
		return err
	}
	if s.release != nil {
		return s.release(ctx, l)
	}
	return s.Store.Release(ctx, l)
}

func (s *shared) Head(ctx context.Context) (eventstore.Position, error) {
	if err := s.reach(); err != nil {
		return 0, err
	}
	return s.Store.Head(ctx)
}

// take fences whoever has the lease, as when its process was paused until the
// lease was free and another one acquired it.
func take(t testing.TB, s projection.State, owner string) (release func()) {
	t.Helper()
	lease, err := s.Acquire(context.Background(), "projection.balances", owner, 0)
	require.NoError(t, err)
	return func() {
		t.Helper()
		require.NoError(t, s.Release(context.Background(), lease))
	}
}

func ready(t testing.TB, r *running) {
	t.Helper()
	for _, w := range r.Workers() {
		require.NoError(t, w.Ready(t.Context()))
	}
}

func (r *running) reaches(t testing.TB, p eventstore.Position) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	require.NoError(t, r.WaitFor(ctx, "balances", p))
}

func within(t testing.TB, most time.Duration, r *running, p eventstore.Position) {
	t.Helper()
	began := time.Now()
	r.reaches(t, p)
	require.LessOrEqual(t, time.Since(began), most)
}

// Of two engines one folds, the other follows what is stored and takes over.
func TestStandby_FollowsAndTakesOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		put(t, store, account("ann"), opened{"Ann"})
		first := start(t, store, store, projection.Options{Owner: "one"}, view)
		ready(t, first)
		second := start(t, store, store, projection.Options{Owner: "two"}, view)
		ready(t, second)
		synctest.Wait()
		require.Equal(t, projection.PhaseLive, first.status(t).Phase)
		require.Equal(t, projection.PhaseStandby, second.status(t).Phase)

		last := put(t, store, account("ann"), deposited{5}).Last
		within(t, 10*time.Millisecond, second, last)
		require.Equal(t, folded(t, store), rows(t, store, view))
		status := second.status(t)
		require.Equal(t, last, status.Position)
		require.Zero(t, status.LagEvents)
		reached, err := second.Reached("balances")
		require.NoError(t, err)
		require.Equal(t, last, reached)

		// An event that concerns nobody: the owner says soon that it has seen it.
		other := put(t, store, eventstore.Stream{Category: "other", ID: "x"}, renamed{}).Last
		within(t, 200*time.Millisecond, second, other)

		// Nobody folds until the lease is free, and nothing more is claimed.
		require.NoError(t, first.stop())
		last = put(t, store, account("ann"), deposited{7}).Last
		reached, err = second.Reached("balances")
		require.NoError(t, err)
		require.Equal(t, other, reached)
		within(t, 1200*time.Millisecond, second, last)
		synctest.Wait()
		require.Equal(t, projection.PhaseLive, second.status(t).Phase)
		require.Equal(t, folded(t, store), rows(t, store, view))

		// The first process is started again.
		again := start(t, store, store, projection.Options{Owner: "one"}, view)
		ready(t, again)
		require.Equal(t, projection.PhaseStandby, again.status(t).Phase)
		require.NoError(t, again.stop())
		require.NoError(t, second.stop())
	})
}

// Where nobody says that the state is shared, standing by works too, if not as
// fast.
func TestStandby_InOneProcess(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		first := start(t, store, store, projection.Options{}, balances())
		ready(t, first)
		second := start(t, store, store, projection.Options{}, balances())
		ready(t, second)
		within(t, 10*time.Millisecond, second, put(t, store, account("ann"), opened{"Ann"}).Last)
		within(t, 1200*time.Millisecond, second, put(t, store, eventstore.Stream{Category: "other", ID: "x"}, renamed{}).Last)
	})
}

// A standby that nobody waits for asks about once a second; while somebody
// waits long for what does not come, some ten times.
func TestStandby_LooksSeldom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		defer take(t, store, "somebody")()
		r := start(t, store, store, projection.Options{}, balances())
		ready(t, r)
		began := store.views.Load()
		time.Sleep(100 * time.Second)
		require.InDelta(t, 100, store.views.Load()-began, 15)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
		defer cancel()
		began = store.views.Load()
		require.ErrorIs(t, r.WaitFor(ctx, "balances", 1), context.DeadlineExceeded)
		require.InDelta(t, 1000, store.views.Load()-began, 600)
		require.NoError(t, r.stop())
	})
}

// Invariant 6: an owner that was fenced drops what it knows, stands by, and is
// back when the lease is free; whatever happened meanwhile is folded once.
func TestStandby_FencedOwnerComesBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		o := &observer{counts: map[string]int64{}, callbacks: map[*registration]metric.Callback{}}
		view := balances()
		first := start(t, store, store, projection.Options{Owner: "one", MeterProvider: meters{o: o}}, view)
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})
		first.caughtUp(t, store, "balances")

		release := take(t, store, "one")
		last := put(t, store, account("ann"), deposited{7}).Last
		time.Sleep(10 * time.Second)
		status := first.status(t)
		require.Equal(t, projection.PhaseStandby, status.Phase)
		require.ErrorIs(t, status.Err, projection.ErrFenced)
		require.EqualValues(t, 2, status.Position)
		require.Equal(t, []uint64{1, 2}, rows(t, store, view)["ann"].Seen)
		require.EqualValues(t, 1, o.counts["deed.projection.fenced"])

		// Whoever has it now folds with code of its own, which leaves other rows: the
		// first must not go by what it remembers.
		require.NoError(t, store.Update(t.Context(), func(tx projection.StateTx) error {
			return tx.Put("view.balances", "ann", []byte(`{"Owner":"Anna","Cents":100,"Seen":[1,2]}`))
		}))
		release()
		within(t, 1200*time.Millisecond, first, last)
		require.Equal(t, balance{Owner: "Anna", Cents: 107, Seen: []uint64{1, 2, 3}}, rows(t, store, view)["ann"])
		require.NoError(t, first.stop())
	})
}

// An owner that nothing happens to finds out all the same, when it looks at an
// event that concerns nobody.
func TestStandby_IdleOwnerFindsOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		r := start(t, store, store, projection.Options{Owner: "one"}, balances())
		ready(t, r)
		defer take(t, store, "one")()
		put(t, store, eventstore.Stream{Category: "other", ID: "x"}, renamed{})
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
		require.Equal(t, projection.PhaseStandby, r.status(t).Phase)
		require.NoError(t, r.stop())
	})
}

// The checkpoint of events that concern nobody is written once for many.
func TestRun_NotesInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		updates := 0
		store.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
			updates++
			return store.Store.Update(ctx, fn)
		}
		r := start(t, store, store, projection.Options{}, balances())
		ready(t, r)
		synctest.Wait()
		begun := updates
		for range 1000 {
			put(t, store, eventstore.Stream{Category: "other", ID: "x"}, renamed{})
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		require.InDelta(t, 20, updates-begun, 2)
		begun = updates
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Equal(t, begun, updates, "there is nothing to write")
		require.NoError(t, r.stop())
	})
}

func TestStandby_Requests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})
		first := start(t, store, store, projection.Options{Owner: "one"}, view)
		first.caughtUp(t, store, "balances")
		second := start(t, store, store, projection.Options{Owner: "two"}, view)
		ready(t, second)
		idle := projection.NewEngine(store, store, projection.Options{Owner: "three"})
		require.NoError(t, idle.Add(view))
		stray := func() {
			require.NoError(t, store.Store.Update(t.Context(), func(tx projection.StateTx) error {
				return tx.Put("view.balances", "stray", []byte(`{"Owner":"nobody"}`))
			}))
		}
		// Whoever runs it does what others ask for.
		for _, other := range []interface {
			Rebuild(ctx context.Context, name string) error
		}{second, idle, projection.NewAdmin(store, "tester")} {
			stray()
			require.NoError(t, other.Rebuild(t.Context(), "balances"))
			first.caughtUp(t, store, "balances")
			require.Equal(t, folded(t, store), rows(t, store, view))
		}
		n, err := second.ReplayDeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Zero(t, n)

		// What is asked of a standby when the owner is gone need not wait.
		require.NoError(t, first.stop())
		stray()
		began := time.Now()
		require.NoError(t, second.Rebuild(t.Context(), "balances"))
		require.Equal(t, folded(t, store), rows(t, store, view))
		require.Less(t, time.Since(began), 100*time.Millisecond)
		require.NotEqual(t, projection.PhaseStandby, second.status(t).Phase)
		require.NoError(t, second.stop())
	})
}

// A database that goes away for a while ends neither the owner nor a standby,
// nor does it keep one that starts then from running later.
func TestRun_OutlivesAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		first := start(t, store, store, projection.Options{}, view)
		first.caughtUp(t, store, "balances")
		second := start(t, store, store, projection.Options{}, view)
		ready(t, second)
		store.down.Store(true)
		third := start(t, store, store, projection.Options{}, view)
		for range 5 {
			put(t, store, account("ann"), deposited{1})
			time.Sleep(time.Minute)
		}
		synctest.Wait()
		require.Error(t, second.Rebuild(t.Context(), "balances"))
		store.down.Store(false)
		last := put(t, store, account("ann"), deposited{1}).Last
		for _, r := range []*running{first, second, third} {
			within(t, 5*time.Second, r, last)
		}
		require.Equal(t, folded(t, store), rows(t, store, view))
		for _, r := range []*running{first, second, third} {
			require.NoError(t, r.stop())
		}
	})
}

// Being fenced although the lease is still one's own, because the checkpoint has
// moved on, ends well too, also when giving the lease up fails at first.
func TestStandby_FencedByTheCheckpoint(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		var fence atomic.Bool
		releases := 0
		store.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
			if fence.CompareAndSwap(true, false) {
				return projection.ErrFenced
			}
			return store.Store.Update(ctx, fn)
		}
		store.release = func(ctx context.Context, l projection.Lease) error {
			if releases++; releases < 3 {
				return errDown
			}
			return store.Store.Release(ctx, l)
		}
		r := start(t, store, store, projection.Options{}, view)
		ready(t, r)
		fence.Store(true)
		within(t, time.Second, r, put(t, store, account("ann"), opened{"Ann"}).Last)
		require.Equal(t, folded(t, store), rows(t, store, view))
		require.NoError(t, r.stop())
	})
}

// A state that takes every lease away at once is not asked as fast as possible.
func TestStandby_FencedAgainAndAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		updates := 0
		store.update = func(context.Context, func(projection.StateTx) error) error {
			updates++
			return projection.ErrFenced
		}
		r := start(t, store, store, projection.Options{}, balances())
		time.Sleep(100 * time.Second)
		synctest.Wait()
		require.InDelta(t, 100, updates, 15)
		require.NoError(t, r.stop())
	})
}

func TestStandby_RefusesAWrongLog(t *testing.T) {
	t.Parallel()
	state, log := memory.New(), memory.New()
	defer state.Close()
	defer log.Close()
	put(t, log, account("ann"), opened{"Ann"})
	first := start(t, otherLog{log, "A"}, state, projection.Options{}, balances())
	first.caughtUp(t, log, "balances")
	second := start(t, otherLog{log, "B"}, state, projection.Options{}, balances())
	require.ErrorIs(t, second.WaitFor(t.Context(), "balances", 1), projection.ErrWrongLog)
	require.ErrorIs(t, second.stop(), projection.ErrWrongLog)
	require.NoError(t, first.stop())
}

// Invariants 4 and 6 with several engines: they are stopped, started and fenced
// at random, and at any time whoever says that the rows contain a position is
// right.
func TestStandby_HandoversAtRandom(t *testing.T) {
	t.Parallel()
	for range 4 {
		seed := rand.Uint64()
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { handOverAtRandom(t, seed) })
		})
	}
}

func handOverAtRandom(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	store := &shared{Store: memory.New()}
	defer store.Close()
	view := balances()
	const nodes = 3
	engines := make([]*running, nodes)
	launch := func(i int) {
		engines[i] = start(t, store, store, projection.Options{
			Owner: fmt.Sprint("node", i), BatchEvents: 1 + random.IntN(8), CheckpointEvery: 1 + random.IntN(20), CacheBytes: 1 + random.IntN(4000),
		}, view)
	}
	for i := range engines {
		launch(i)
	}
	contained := func(r *running, p eventstore.Position) (ok bool, at eventstore.Position) {
		require.NoError(t, store.View(context.Background(), func(tx projection.StateTx) error {
			c, err := tx.Checkpoint("projection.balances")
			if err != nil {
				return err
			}
			at = c.Position
			ok, err = r.Contains(tx, "balances", p)
			return err
		}))
		return ok, at
	}
	concerns := eventstore.Position(0)
	for range 300 {
		i := random.IntN(nodes)
		switch random.IntN(12) {
		case 0:
			require.NoError(t, engines[i].stop())
			launch(i)
		case 1: // the owner is paused, its lease is free and taken
			for j := range nodes {
				if lease, err := store.Acquire(t.Context(), "projection.balances", fmt.Sprint("node", j), 0); err == nil {
					time.Sleep(time.Duration(random.IntN(3000)) * time.Millisecond)
					require.NoError(t, store.Release(t.Context(), lease))
					break
				}
			}
		case 2, 3, 4:
			put(t, store, eventstore.Stream{Category: "other", ID: "x"}, renamed{})
		case 5:
			time.Sleep(time.Duration(random.IntN(2000)) * time.Millisecond)
		case 6:
			last, err := store.Head(t.Context())
			require.NoError(t, err)
			engines[i].reaches(t, last)
			ok, at := contained(engines[i], last)
			require.True(t, ok, "node %d has reached %d, but the rows of checkpoint %d do not contain it", i, last, at)
			require.Equal(t, folded(t, store), rows(t, store, view))
		default:
			concerns = put(t, store, account(fmt.Sprint("a", random.IntN(5))), deposited{int64(random.IntN(100))}).Last
		}
		for j, r := range engines {
			if ok, at := contained(r, concerns); ok {
				require.GreaterOrEqual(t, at, concerns, "node %d claims what the rows do not contain", j)
			}
		}
	}
	last, err := store.Head(t.Context())
	require.NoError(t, err)
	for _, r := range engines {
		r.reaches(t, last)
	}
	require.Equal(t, folded(t, store), rows(t, store, view))
	for _, r := range engines {
		require.NoError(t, r.stop())
	}
}
