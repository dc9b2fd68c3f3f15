package projection_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/projection"
)

// spread is a view in which an event is folded into several rows, which are in
// different partitions.
func spread(parts int, fail func(e deposited) error) *projection.ViewDefinition[balance] {
	return projection.View("spread",
		projection.OnKeyed(func(e deposited, r eventstore.Recorded) []string {
			return []string{r.Stream.ID, fmt.Sprint("cents ", e.Cents%7), "all " + r.Stream.ID[:1]}
		}, func(b *balance, _ string, e deposited, r eventstore.Recorded) {
			if err := fail(e); err != nil {
				panic(projection.Permanent(err))
			}
			b.Cents += e.Cents
			b.Seen = append(b.Seen, uint64(r.Position))
		}),
		projection.DeleteOn[balance, *closed](),
	).Partitioned(parts)
}

func never(deposited) error { return nil }

// Whatever the number of partitions, rows are what the fold of the log makes
// them, each with its events in the order of the log.
func TestPartitioned_SameRows(t *testing.T) {
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		seed := rand.Uint64()
		t.Log("seed", seed)
		random := rand.New(rand.NewPCG(seed, 1))
		store := open(t)
		parts := 2 + random.IntN(9)
		plain, keyed := balances().Partitioned(parts), spread(parts, never)
		o := projection.Options{BatchEvents: 1 + random.IntN(20), CacheBytes: 1 + random.IntN(2000)}
		running := start(t, store, store, o, plain, keyed)
		for i := range 400 {
			stream := account(fmt.Sprint(string(rune('a'+random.IntN(3))), random.IntN(30)))
			switch n := random.IntN(12); {
			case n == 0:
				put(t, store, stream, &closed{})
			case n == 1:
				put(t, store, stream, opened{"x"})
			default:
				put(t, store, stream, deposited{int64(random.IntN(100))})
			}
			if i%100 == 99 && random.IntN(2) == 0 {
				require.NoError(t, running.stop())
				running = start(t, store, store, o, plain, keyed)
			}
		}
		running.caughtUp(t, store, "balances", "spread")
		require.Equal(t, folded(t, store), rows(t, store, plain))
		verified(t, store, plain)
		verified(t, store, keyed)
		for _, row := range rows(t, store, keyed) {
			require.True(t, slices.IsSorted(row.Seen), "%v", row.Seen)
		}
		whole := start(t, store, memory.New(), projection.Options{}, spread(1, never))
		whole.caughtUp(t, store, "spread")
		require.Equal(t, rows(t, whole.State(), spread(1, never)), rows(t, store, keyed))

		all, err := running.Status(t.Context())
		require.NoError(t, err)
		require.Len(t, all, 2*parts)
		require.Equal(t, fmt.Sprintf("balances/1of%d", parts), all[0].Name)
		require.NoError(t, running.Rebuild(t.Context(), "spread"))
		require.Equal(t, rows(t, whole.State(), spread(1, never)), rows(t, store, keyed))
		verified(t, store, keyed)
	})
}

// Partitions are folded at the same time: each handler waits until all do.
func TestPartitioned_AtTheSameTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		const parts = 4
		var inside sync.WaitGroup
		inside.Add(parts)
		view := projection.View("balances", projection.OnMeta(func(b *balance, e deposited, r eventstore.Recorded) {
			if e.Cents == 1 {
				inside.Done()
				inside.Wait()
			}
			b.Cents += e.Cents
		})).Partitioned(parts)
		// One event in each quarter of the slices. The key is taken for a stream.
		for part := range parts {
			for i := 0; ; i++ {
				id := fmt.Sprint("s", i)
				if int(eventstore.Stream{ID: id}.Slice())*parts/eventstore.Slices == part {
					put(t, store, account(id), deposited{1})
					break
				}
			}
		}
		r := start(t, store, store, projection.Options{}, view)
		r.caughtUp(t, store, "balances")
		require.Len(t, rows(t, store, view), parts)
		require.NoError(t, r.stop())
	})
}

// A poison event is set aside by the partitions that it concerns, with the later
// ones of its stream; it is replayed, or given up, by one call.
func TestPartitioned_DeadLetters(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	var broken atomic.Bool
	broken.Store(true)
	view := spread(8, func(e deposited) error {
		if e.Cents == 13 && broken.Load() {
			return errors.New("thirteen")
		}
		return nil
	})
	put(t, store, account("a1"), deposited{1})
	poison := put(t, store, account("a1"), deposited{13}).Last
	put(t, store, account("a1"), deposited{2})
	put(t, store, account("b1"), deposited{3})
	r := start(t, store, store, projection.Options{}, view)
	r.caughtUp(t, store, "spread")
	letters, err := r.DeadLetters(t.Context(), "spread")
	require.NoError(t, err)
	require.NotEmpty(t, letters)
	require.Equal(t, poison, letters[0].Position)
	require.True(t, slices.IsSortedFunc(letters, func(a, b projection.DeadLetter) int { return int(a.Position) - int(b.Position) }))
	byTool, err := projection.NewAdmin(store, "tester").DeadLetters(t.Context(), "spread")
	require.NoError(t, err)
	require.Equal(t, letters, byTool)
	require.EqualValues(t, 3, rows(t, store, view)["b1"].Cents, "other streams go on")
	verified(t, store, view)

	broken.Store(false)
	replayed, err := r.ReplayDeadLetters(t.Context(), "spread")
	require.NoError(t, err)
	require.Equal(t, len(letters), replayed)
	require.EqualValues(t, 16, rows(t, store, view)["a1"].Cents)
	require.EqualValues(t, 16, rows(t, store, view)["all a"].Cents)
	verified(t, store, view)

	broken.Store(true)
	poison = put(t, store, account("b1"), deposited{13}).Last
	r.caughtUp(t, store, "spread")
	require.ErrorIs(t, r.SkipDeadLetter(t.Context(), "spread", poison+1, "no"), projection.ErrNoDeadLetter)
	require.NoError(t, r.SkipDeadLetter(t.Context(), "spread", poison, "not ours"))
	letters, err = r.DeadLetters(t.Context(), "spread")
	require.NoError(t, err)
	require.Empty(t, letters)
	skipped, err := r.Skipped(t.Context(), "spread")
	require.NoError(t, err)
	require.NotEmpty(t, skipped)
	require.Equal(t, poison, skipped[0].Position)
	broken.Store(false)
	verified(t, store, view)
	require.NoError(t, r.stop())
}

// What is stored in partitions of one number is not run in another.
func TestPartitioned_AnotherNumber(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	put(t, store, account("a"), deposited{1})
	r := start(t, store, store, projection.Options{}, balances())
	r.caughtUp(t, store, "balances")
	require.NoError(t, r.stop())
	r = start(t, store, store, projection.Options{}, balances().Partitioned(4))
	r.done.Wait()
	require.ErrorIs(t, r.stop(), eventstore.ErrInvalid)
	require.ErrorContains(t, r.stop(), "it is stored in 1 partitions, and its definition says 4")

	require.ErrorContains(t, balances().Partitioned(0).Err(), "0 partitions: use 1 to 128")
	require.ErrorContains(t, projection.SQL("x").Partitioned(129).Err(), "129 partitions")
	require.NoError(t, balances().Partitioned(128).Err())
}

// An SQL projection in partitions handles each event once, those of a stream in
// order.
func TestPartitioned_SQL(t *testing.T) {
	t.Parallel()
	store := openSQLite(t)
	sql := ledger(nil).Partitioned(5)
	for i := range 200 {
		put(t, store, account(fmt.Sprint("a", i%17)), deposited{int64(i)})
	}
	r := start(t, store, store, projection.Options{SQLEvents: 7}, sql)
	r.caughtUp(t, store, sql.Name())
	require.ElementsMatch(t, deposits(t, store), lines(t, store))
	verified(t, store, sql)
	require.NoError(t, r.Rebuild(t.Context(), sql.Name()))
	require.ElementsMatch(t, deposits(t, store), lines(t, store))
	verified(t, store, sql)

	// One of them is another's: nothing is emptied.
	require.NoError(t, r.stop())
	_, err := store.Acquire(t.Context(), "projection."+sql.Name()+"/3of5", "another", 0)
	require.NoError(t, err)
	idle := projection.NewEngine(store, store, projection.Options{Logger: quiet})
	require.NoError(t, idle.Add(sql))
	err = idle.Rebuild(t.Context(), sql.Name())
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "not all of them run here")
	require.ElementsMatch(t, deposits(t, store), lines(t, store))
}

// grouped is an engine among others on one state.
func grouped(t testing.TB, store *shared, name string, projections ...projection.Projection) (*running, *ownership.Group) {
	directory, err := projection.Members(store)
	require.NoError(t, err)
	group := ownership.New(directory, ownership.Options{Name: name, Logger: quiet})
	r := start(t, store, store, projection.Options{Owner: name, Group: group}, projections...)
	ctx, cancel := context.WithCancel(context.Background())
	stop := r.cancel
	r.cancel = func() {
		cancel()
		stop()
	}
	r.done.Go(func() { _ = group.Run(ctx) })
	return r, group
}

// owned counts the units that a node runs.
func owned(t testing.TB, r *running) (n int) {
	all, err := r.Status(context.Background())
	require.NoError(t, err)
	for _, s := range all {
		if s.Phase != projection.PhaseStandby && s.Phase != projection.PhaseStopped {
			n++
		}
	}
	return n
}

// Nodes on one state divide the work, and hand it over when they come and go;
// rows are the fold of the log all the while.
func TestGroup_WorkMoves(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view, keyed := balances().Partitioned(8), spread(4, never)
		append := func() {
			for i := range 20 {
				put(t, store, account(fmt.Sprint("a", i)), deposited{int64(i)})
			}
		}
		settled := func(nodes ...*running) {
			t.Helper()
			append()
			head, err := store.Head(t.Context())
			require.NoError(t, err)
			for _, r := range nodes {
				require.NoError(t, r.WaitFor(t.Context(), "balances", head))
				require.NoError(t, r.WaitFor(t.Context(), "spread", head))
			}
			require.Equal(t, folded(t, store), rows(t, store, view))
			verified(t, store, view)
			verified(t, store, keyed)
		}
		one, _ := grouped(t, store, "one", view, keyed)
		settled(one)
		require.Equal(t, 12, owned(t, one))

		two, _ := grouped(t, store, "two", view, keyed)
		three, _ := grouped(t, store, "three", view, keyed)
		time.Sleep(5 * time.Second)
		settled(one, two, three)
		for name, r := range map[string]*running{"one": one, "two": two, "three": three} {
			require.Equal(t, 4, owned(t, r), "node %q", name)
		}

		// Whoever stops hands over at once.
		began := time.Now()
		require.NoError(t, one.stop())
		settled(two, three)
		require.LessOrEqual(t, time.Since(began), 400*time.Millisecond)
		time.Sleep(time.Second) // some moved between the two, too
		require.Equal(t, 12, owned(t, two)+owned(t, three))

		require.NoError(t, three.stop())
		settled(two)
		require.Equal(t, 12, owned(t, two))
		require.NoError(t, two.stop())
	})
}

// A node that knows only some of the projections is given only those.
func TestGroup_KnowsOnlySome(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view, keyed := balances().Partitioned(4), spread(4, never)
		old, _ := grouped(t, store, "old", view)
		recent, _ := grouped(t, store, "recent", view, keyed)
		time.Sleep(5 * time.Second)
		last := put(t, store, account("a1"), deposited{1}).Last
		require.NoError(t, old.WaitFor(t.Context(), "balances", last))
		require.NoError(t, recent.WaitFor(t.Context(), "spread", last))
		require.Equal(t, 4, owned(t, old))
		require.Equal(t, 4, owned(t, recent))
		require.NoError(t, old.stop())
		last = put(t, store, account("a1"), deposited{1}).Last
		require.NoError(t, recent.WaitFor(t.Context(), "balances", last))
		require.Equal(t, 8, owned(t, recent))
		require.NoError(t, recent.stop())
	})
}

// A version in partitions changes nothing about how the one before is stored.
func TestPartitioned_VersionsApart(t *testing.T) {
	t.Parallel()
	store := openSQLite(t)
	first := ledger(func(e deposited, _ eventstore.Recorded) error {
		if e.Cents == 13 {
			return projection.Permanent(errInjected)
		}
		return nil
	}).Partitioned(2)
	put(t, store, account("ann"), deposited{13}, deposited{1})
	r := start(t, store, store, projection.Options{}, first, ledger(nil).Partitioned(3).Version(2))
	r.caughtUp(t, store, "ledger", "ledger/v2")
	require.NoError(t, r.stop())
	letters, err := projection.NewAdmin(store, "").DeadLetters(t.Context(), "ledger")
	require.NoError(t, err)
	require.Len(t, letters, 2)
}

// The lease of what was handed over is given up as soon as that can be done.
func TestGroup_LeaseIsGivenUpLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		view := balances().Partitioned(8)
		var stuck atomic.Bool
		old := &shared{Store: store, release: func(ctx context.Context, l projection.Lease) error {
			if stuck.Load() {
				return errDown
			}
			return store.Release(ctx, l)
		}}
		put(t, store, account("ann"), deposited{1})
		one, _ := grouped(t, old, "one", view)
		one.caughtUp(t, store, "balances")
		require.Equal(t, 8, owned(t, one))

		stuck.Store(true)
		two, _ := grouped(t, &shared{Store: store}, "two", view)
		time.Sleep(5 * time.Second)
		require.Zero(t, owned(t, two))
		stuck.Store(false)
		time.Sleep(5 * time.Second)
		require.Equal(t, 4, owned(t, two))
		for i := range 20 {
			put(t, store, account(fmt.Sprint("a", i)), deposited{int64(i)})
		}
		one.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		require.NoError(t, one.stop())
		require.NoError(t, two.stop())
	})
}

// All partitions stand still until their tables are emptied, or not, also when
// whoever has asked for it does not wait.
func TestPartitioned_SQLStandsStill(t *testing.T) {
	t.Parallel()
	store := openSQLite(t)
	sql := ledger(nil).Partitioned(2)
	for i := range 20 {
		put(t, store, account(fmt.Sprint("a", i)), deposited{int64(i)})
	}
	var armed atomic.Bool
	var meanwhile atomic.Int64
	begun, finish := make(chan struct{}), make(chan struct{})
	state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
		if armed.CompareAndSwap(true, false) {
			close(begun)
			<-finish
			meanwhile.Add(-1 << 32)
			return store.Update(context.WithoutCancel(ctx), fn)
		}
		meanwhile.Add(1)
		return store.Update(ctx, fn)
	}}
	r := start(t, store, state, projection.Options{}, sql)
	release := sync.OnceFunc(func() { close(finish) })
	t.Cleanup(release) // before the engine is stopped
	r.caughtUp(t, store, sql.Name())
	meanwhile.Store(0)
	armed.Store(true)
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan error, 1)
	go func() { asked <- r.Rebuild(ctx, sql.Name()) }()
	<-begun
	cancel()
	require.Never(t, func() bool { return meanwhile.Load() > 0 }, 300*time.Millisecond, 10*time.Millisecond)
	release()
	require.ErrorIs(t, <-asked, context.Canceled)
	r.caughtUp(t, store, sql.Name())
	require.Eventually(t, func() bool { return len(lines(t, store)) == 20 }, 10*time.Second, 10*time.Millisecond)
	verified(t, store, sql)
	require.NoError(t, r.stop())
}
