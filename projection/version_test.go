package projection_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// bookEntry is a row that tells which event was the last in it, and which version
// has made it.
type bookEntry struct {
	Cents int64
	Last  eventstore.Position
	Made  int
}

func ledgers(version, parts int) *projection.ViewDefinition[bookEntry] {
	return projection.View("ledgers", projection.OnMeta(func(l *bookEntry, e deposited, r eventstore.Recorded) {
		l.Cents += e.Cents
		l.Last, l.Made = r.Position, version
	})).Version(version).Partitioned(parts)
}

// expectLedgers folds the log anew.
func expectLedgers(t testing.TB, store eventstore.Store, version int, through eventstore.Position) map[string]bookEntry {
	t.Helper()
	all := map[string]bookEntry{}
	for e, err := range store.Read(context.Background(), eventstore.All(), eventstore.ReadOptions{Through: through}) {
		require.NoError(t, err)
		var d deposited
		require.NoError(t, (*eventstore.Encoding)(nil).Decode(e, &d))
		l := all[e.Stream.ID]
		all[e.Stream.ID] = bookEntry{Cents: l.Cents + d.Cents, Last: e.Position, Made: version}
	}
	return all
}

// watcher reads again and again, and remembers what it has seen.
type watcher struct {
	view *projection.ViewDefinition[bookEntry]
	last map[string]bookEntry
	made map[int]bool
}

// look reads all rows and fails if one is older than it was.
func (w *watcher) look(state projection.State) error {
	now := map[string]bookEntry{}
	err := state.View(context.Background(), func(tx projection.StateTx) error {
		for e, err := range w.view.Rows(tx, projection.Range{}) {
			if err != nil {
				return err
			}
			now[e.Key] = e.Row
		}
		return nil
	})
	if err != nil {
		return err
	}
	made := 0
	for _, l := range now {
		if made != 0 && l.Made != made {
			return fmt.Errorf("a read of %q shows rows of versions %d and %d", w.view.Name(), made, l.Made)
		}
		made = l.Made
		w.made[made] = true
	}
	for key, was := range w.last {
		if is, there := now[key]; !there || is.Last < was.Last {
			return fmt.Errorf("a read of %q went back: row %q was %+v and is %+v", w.view.Name(), key, was, is)
		}
	}
	w.last = now
	return nil
}

// watch reads by the definitions until it is stopped, which returns what went
// wrong.
func watch(state projection.State, views ...*projection.ViewDefinition[bookEntry]) (stop func() error, seen func(view, version int) bool) {
	ended := make(chan struct{})
	var all sync.WaitGroup
	errs := make([]error, len(views))
	var mu sync.Mutex
	made := make([]map[int]bool, len(views))
	for i, v := range views {
		w := &watcher{view: v, made: map[int]bool{}}
		all.Go(func() {
			for {
				if errs[i] = w.look(state); errs[i] != nil {
					return
				}
				mu.Lock()
				made[i] = map[int]bool{}
				for version := range w.made {
					made[i][version] = true
				}
				mu.Unlock()
				select {
				case <-ended:
					errs[i] = w.look(state)
					return
				case <-time.After(500 * time.Microsecond):
				}
			}
		})
	}
	return func() error {
			close(ended)
			all.Wait()
			return errors.Join(errs...)
		}, func(view, version int) bool {
			mu.Lock()
			defer mu.Unlock()
			return made[view][version]
		}
}

func activeVersion(t testing.TB, r *running, name string) int {
	t.Helper()
	all, err := r.Versions(context.Background(), name)
	require.NoError(t, err)
	for _, v := range all {
		if v.Active {
			return v.Version
		}
	}
	return 0
}

// awaits waits until the version is the one that is read.
func awaits(t testing.TB, r *running, name string, version int) {
	t.Helper()
	until := time.Now().Add(time.Minute)
	for activeVersion(t, r, name) != version {
		require.True(t, time.Now().Before(until), "version %d of %q does not become active", version, name)
		time.Sleep(time.Millisecond)
	}
}

// traffic appends until it is stopped, which returns what was acknowledged last.
func traffic(t testing.TB, store eventstore.Store, random *rand.Rand, longest time.Duration) (stop func() eventstore.Position) {
	ended, done := make(chan struct{}), make(chan eventstore.Position, 1)
	go func() {
		var last eventstore.Position
		for {
			select {
			case <-ended:
				done <- last
				return
			case <-time.After(time.Duration(random.Int64N(int64(longest)))):
			}
			last = put(t, store, account(fmt.Sprintf("a%02d", random.IntN(30))), deposited{random.Int64N(100)}).Last
		}
	}()
	return func() eventstore.Position { close(ended); return <-done }
}

// A version is built while events come and everybody reads; it becomes the active
// one, one goes back, and forth again. No read fails or goes back, and the rows of
// both versions are the fold of the log.
func TestVersion_SwapsUnderTraffic(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		for _, parts := range [][2]int{{1, 1}, {3, 2}} {
			t.Run(fmt.Sprint(parts), func(t *testing.T) {
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				random := rand.New(rand.NewPCG(seed, 1))
				store := open(t)
				v1, v2 := ledgers(1, parts[0]), ledgers(2, parts[1])
				for range 300 {
					put(t, store, account(fmt.Sprintf("a%02d", random.IntN(30))), deposited{random.Int64N(100)})
				}
				first := start(t, store, store, projection.Options{}, v1)
				first.caughtUp(t, store, "ledgers")
				require.NoError(t, first.stop())

				r := start(t, store, store, projection.Options{BatchEvents: 50}, v1, v2)
				stopTraffic := traffic(t, store, random, 2*time.Millisecond)
				stopReads, seen := watch(store, v1, v2)
				for i, want := range []int{2, 1, 2} {
					if i > 0 {
						require.NoError(t, r.Activate(context.Background(), "ledgers", want))
					}
					awaits(t, r, "ledgers", want)
					for until := time.Now().Add(time.Minute); !seen(1, want); time.Sleep(time.Millisecond) {
						require.True(t, time.Now().Before(until), "version %d is not read", want)
					}
					// Reads that ask for a position get it by either definition.
					for _, v := range []*projection.ViewDefinition[bookEntry]{v1, v2} {
						receipt := put(t, store, account("mine"), deposited{1})
						require.Equal(t, receipt.Last, readAtLeast(t, r, store, v, receipt.Last)["mine"].Last)
					}
				}
				last := stopTraffic()
				require.NoError(t, stopReads())
				require.True(t, seen(1, 1) && seen(1, 2), "the definition of version 2 has read both")
				require.False(t, seen(0, 2), "the definition of version 1 reads version 1")
				head, err := store.Head(t.Context())
				require.NoError(t, err)
				require.GreaterOrEqual(t, head, last)
				require.Equal(t, expectLedgers(t, store, 1, head), readAtLeast(t, r, store, v1, head))
				require.Equal(t, expectLedgers(t, store, 2, head), readAtLeast(t, r, store, v2, head))
				for _, name := range []string{"ledgers", "ledgers/v2"} {
					found, err := r.Verify(t.Context(), name)
					require.NoError(t, err)
					require.True(t, found.Agrees(), found.String())
				}
				require.NoError(t, r.stop())
			})
		}
	})
}

// insist does it again as long as the version is behind: this state has one update
// at a time, within which nobody catches up.
func insist(t testing.TB, activate func() error) {
	t.Helper()
	for until := time.Now().Add(time.Minute); ; {
		err := activate()
		if err == nil {
			return
		}
		require.ErrorIs(t, err, projection.ErrBehind)
		require.True(t, time.Now().Before(until), err)
	}
}

// readAtLeast reads as package query does.
func readAtLeast(t testing.TB, r *running, state projection.State, v *projection.ViewDefinition[bookEntry], p eventstore.Position) map[string]bookEntry {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for {
		require.NoError(t, r.WaitFor(ctx, v.Name(), p))
		all, there := map[string]bookEntry{}, false
		require.NoError(t, state.View(ctx, func(tx projection.StateTx) (err error) {
			if there, err = r.Contains(tx, v.Name(), p); err != nil || !there {
				return err
			}
			for e, err := range v.Rows(tx, projection.Range{}) {
				if err != nil {
					return err
				}
				all[e.Key] = e.Row
			}
			return nil
		}))
		if there {
			return all
		}
		require.NoError(t, ctx.Err())
		time.Sleep(time.Millisecond)
	}
}

// mortal is a state that dies before or after one of the updates: from then on
// nothing of its process happens any more.
type mortal struct {
	projection.State
	left  atomic.Int64
	after bool
	dead  chan struct{}
	once  sync.Once
}

func (m *mortal) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	left := m.left.Add(-1)
	if left == 0 && m.after {
		err := m.State.Update(ctx, fn)
		m.once.Do(func() { close(m.dead) })
		return errors.Join(errKilled, err)
	}
	if left <= 0 {
		m.once.Do(func() { close(m.dead) })
		return errKilled
	}
	return m.State.Update(ctx, fn)
}

var errKilled = fmt.Errorf("killed: %w", eventstore.ErrClosed)

// Whenever the process is killed while a version is built and activated, the one
// or the other is read, whole; the next process ends it.
func TestVersion_Killed(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		for _, after := range []bool{false, true} {
			for kill := int64(1); ; kill++ {
				store := open(t)
				for i := range 20 {
					put(t, store, account(fmt.Sprintf("a%d", i%3)), deposited{int64(i)})
				}
				v1, v2 := ledgers(1, 1), ledgers(2, 2)
				o := projection.Options{Owner: "one", BatchEvents: 5}
				first := start(t, store, store, o, v1)
				first.caughtUp(t, store, "ledgers")
				require.NoError(t, first.stop())
				reader := &watcher{view: v2, made: map[int]bool{}}
				require.NoError(t, reader.look(store))

				m := &mortal{State: store, after: after, dead: make(chan struct{})}
				m.left.Store(kill)
				r := start(t, store, m, o, v1, v2)
				survived := false
				for !survived {
					select {
					case <-m.dead:
					case <-time.After(time.Millisecond):
						require.NoError(t, reader.look(store))
						if all, err := r.Versions(context.Background(), "ledgers"); err == nil && len(all) == 2 && all[1].Active {
							survived = m.left.Load() > 0
						}
						continue
					}
					break
				}
				_ = r.stop()
				survived = survived && m.left.Load() > 0
				require.NoError(t, reader.look(store), "after kill %d (after: %t)", kill, after)
				require.Len(t, reader.last, 3)

				again := start(t, store, store, o, v1, v2)
				awaits(t, again, "ledgers", 2)
				require.NoError(t, reader.look(store))
				head, err := store.Head(t.Context())
				require.NoError(t, err)
				require.Equal(t, expectLedgers(t, store, 2, head), readAtLeast(t, again, store, v2, head))
				require.NoError(t, again.stop())
				if survived {
					require.Greater(t, kill, int64(5), "it dies at the first updates")
					break
				}
			}
		}
	})
}

// Old nodes run version 1 and new ones version 2, on one state: each reads by its
// own definition all the time.
func TestVersion_RollingDeploy(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(seed, 2))
		state := &shared{Store: memory.New()}
		defer state.Close()
		for range 200 {
			put(t, state, account(fmt.Sprintf("a%02d", random.IntN(30))), deposited{1})
		}
		v1, v2 := ledgers(1, 2), ledgers(2, 3)
		old1 := start(t, state, state, projection.Options{Owner: "old1"}, v1)
		old2 := start(t, state, state, projection.Options{Owner: "old2"}, v1)
		old1.caughtUp(t, state, "ledgers")
		stopTraffic := traffic(t, state, random, 400*time.Millisecond)
		stopReads, seen := watch(state, v1, v2)
		held := v2.HeldBack()
		new1 := start(t, state, state, projection.Options{Owner: "new1"}, held)
		receipt := put(t, state, account("mine"), deposited{1})
		require.Equal(t, 1, readAtLeast(t, new1, state, held, receipt.Last)["mine"].Made, "the new node reads what the old ones make")
		require.NoError(t, new1.stop())
		new1 = start(t, state, state, projection.Options{Owner: "new1"}, v2)
		awaits(t, new1, "ledgers", 2)
		receipt = put(t, state, account("mine"), deposited{1})
		require.Equal(t, 2, readAtLeast(t, new1, state, v2, receipt.Last)["mine"].Made)
		require.NoError(t, old1.stop())
		new2 := start(t, state, state, projection.Options{Owner: "new2"}, v2)
		receipt = put(t, state, account("mine"), deposited{1})
		require.Equal(t, 1, readAtLeast(t, old2, state, v1, receipt.Last)["mine"].Made)
		require.Equal(t, 2, readAtLeast(t, new2, state, v2, receipt.Last)["mine"].Made)

		// As long as an old node runs, one can go back, from a tool too.
		require.ErrorIs(t, new1.DropVersion(t.Context(), "ledgers", 1), projection.ErrLeaseHeld)
		insist(t, func() error { return projection.NewAdmin(state, "ann").Activate(t.Context(), "ledgers", 1) })
		receipt = put(t, state, account("mine"), deposited{1})
		require.Equal(t, 1, readAtLeast(t, new2, state, v2, receipt.Last)["mine"].Made)
		insist(t, func() error { return new2.Activate(t.Context(), "ledgers", 2) })
		require.NoError(t, old2.stop())

		// Then version 1 falls behind: going back says how far, and is refused.
		stopTraffic()
		receipt = put(t, state, account("mine"), deposited{1})
		require.Equal(t, 2, readAtLeast(t, new1, state, v2, receipt.Last)["mine"].Made)
		behind, ok := errors.AsType[*projection.BehindError](new1.Activate(t.Context(), "ledgers", 1))
		require.True(t, ok)
		require.Equal(t, "ledgers", behind.Name)
		require.Less(t, behind.Position, behind.Wanted)
		require.Equal(t, 2, activeVersion(t, new1, "ledgers"))
		require.NoError(t, stopReads())
		require.True(t, seen(1, 1) && seen(1, 2))
		require.NoError(t, new1.Activate(t.Context(), "ledgers", 1, projection.AlthoughBehind()))
		require.Equal(t, 1, activeVersion(t, new1, "ledgers"))
		require.NoError(t, new1.Activate(t.Context(), "ledgers", 2))
		require.NoError(t, new1.DropVersion(t.Context(), "ledgers", 1))
		require.ErrorIs(t, new1.DropVersion(t.Context(), "ledgers", 2), projection.ErrActive)
		require.ErrorIs(t, new1.DropVersion(t.Context(), "ledgers", 1), projection.ErrNoVersion)
		require.ErrorIs(t, new1.Activate(t.Context(), "ledgers", 1), projection.ErrNoVersion)
		require.Empty(t, rows(t, state, v1))
		require.NoError(t, new1.stop())
		require.NoError(t, new2.stop())
	})
}

// Events that do not concern a version move its checkpoint seldom; that does not
// keep it from becoming the active one.
func TestVersion_LaggingCheckpoint(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		v1 := projection.View("notes",
			projection.On(func(l *bookEntry, e deposited) { l.Cents += e.Cents }),
			projection.On(func(l *bookEntry, _ opened) { l.Made++ }))
		v2 := projection.View("notes", projection.On(func(l *bookEntry, e deposited) { l.Cents += e.Cents })).Version(2)
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})
		r := start(t, store, store, projection.Options{}, v1)
		r.caughtUp(t, store, "notes")
		require.NoError(t, r.stop())
		r = start(t, store, store, projection.Options{}, v1, v2)
		began := time.Now()
		for activeVersion(t, r, "notes") == 1 {
			put(t, store, account("ann"), opened{"Ann"}) // it concerns version 1 only
			require.Less(t, time.Since(began), 900*time.Millisecond, "sooner than the checkpoint is written by itself")
			time.Sleep(200 * time.Microsecond)
		}
		require.NoError(t, r.stop())
	})
}

func TestVersion_HeldBackAndCompared(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		put(t, store, account("ann"), deposited{5}, deposited{6})
		put(t, store, account("bob"), deposited{7})
		put(t, store, account("cid"), opened{"Cid"})
		put(t, store, account("dan"), deposited{1})
		v1 := projection.View("sums", projection.On(func(l *bookEntry, e deposited) { l.Cents += e.Cents }))
		v2 := projection.View("sums",
			projection.OnMeta(func(l *bookEntry, e deposited, r eventstore.Recorded) {
				if l.Cents += e.Cents; r.Stream.ID == "bob" {
					l.Cents *= 10
				}
			}),
			projection.On(func(l *bookEntry, _ opened) { l.Made = 1 }),
			projection.DeleteOn[bookEntry, *closed]()).Version(2).HeldBack()
		put(t, store, account("dan"), &closed{})
		// Version 1 is there first: version 2 is compared with nothing that is not built.
		r := start(t, store, store, projection.Options{}, v1)
		r.caughtUp(t, store, "sums")
		require.NoError(t, r.stop())
		r = start(t, store, store, projection.Options{}, v1, v2)
		r.caughtUp(t, store, "sums")
		until := time.Now().Add(time.Minute)
		var all []projection.VersionInfo
		for {
			var err error
			all, err = r.Versions(t.Context(), "sums/v2")
			require.NoError(t, err)
			if len(all) == 2 && all[1].Comparison != nil {
				break
			}
			require.True(t, time.Now().Before(until))
			time.Sleep(time.Millisecond)
		}
		require.True(t, all[0].Active)
		require.Equal(t, `version 1 of "sums" has 3 rows, version 2 has 3, at position 6: 1 added, 1 removed, 1 changed
~ bob {"Cents":7,"Last":0,"Made":0}
    -> {"Cents":70,"Last":0,"Made":0}
+ cid {"Cents":0,"Last":0,"Made":1}
- dan {"Cents":1,"Last":0,"Made":0}`, strings.Replace(all[1].Comparison.String(), "at positions 5 and 6", "at position 6", 1))
		require.Equal(t, int64(7), rows(t, store, v2)["bob"].Cents, "it is held back")
		require.NoError(t, r.Activate(t.Context(), "sums", 2))
		require.Equal(t, int64(70), rows(t, store, v2)["bob"].Cents)
		require.Equal(t, int64(7), rows(t, store, v1)["bob"].Cents)

		status, err := r.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, []any{"sums", 1, false, "sums/v2", 2, true},
			[]any{status[0].Name, status[0].Version, status[0].Active, status[1].Name, status[1].Version, status[1].Active})
		stored, err := projection.Inspect(t.Context(), store)
		require.NoError(t, err)
		require.Equal(t, []any{"sums", 2, true}, []any{stored[1].Projection, stored[1].Version, stored[1].Active})
		_, err = r.Compare(t.Context(), "sums", 1, 3)
		require.ErrorIs(t, err, projection.ErrNoVersion)
		require.NoError(t, r.stop())
	})
}

// blinking is a store that once cannot say where the log ends, when told.
type blinking struct {
	*memory.Store
	asked atomic.Int64
	blind atomic.Bool
}

func (b *blinking) Head(ctx context.Context) (eventstore.Position, error) {
	b.asked.Add(1)
	if b.blind.CompareAndSwap(true, false) {
		return 0, errDown
	}
	return b.Store.Head(ctx)
}

// A version that is half built is not taken for built, and compared for good,
// because the store once could not say where the log ends.
func TestVersion_HeadUnknownOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &blinking{Store: memory.New()}
		defer store.Close()
		for _, id := range []string{"ann", "bob", "cid"} {
			put(t, store, account(id), deposited{5})
		}
		head := put(t, store, account("dan"), deposited{5}).Last
		v1 := projection.View("sums", projection.On(func(l *bookEntry, e deposited) { l.Cents += e.Cents }))
		reached, goOn := make(chan struct{}), make(chan struct{})
		atCid := sync.OnceFunc(func() { close(reached) })
		v2 := projection.View("sums", projection.OnMeta(func(l *bookEntry, e deposited, r eventstore.Recorded) {
			if r.Stream.ID == "cid" {
				atCid()
				<-goOn
			}
			l.Cents += e.Cents
		})).Version(2).HeldBack()
		r := start(t, store, store, projection.Options{}, v1)
		r.caughtUp(t, store, "sums")
		require.NoError(t, r.stop())

		r = start(t, store, store, projection.Options{BatchEvents: 1}, v1, v2)
		release := sync.OnceFunc(func() { close(goOn) })
		defer release()
		<-reached
		synctest.Wait() // from now on only who wants to promote version 2 asks
		asked := store.asked.Load()
		for until := time.Now().Add(time.Minute); store.asked.Load() < asked+2; time.Sleep(time.Millisecond) {
			require.True(t, time.Now().Before(until), "nobody looks whether it has caught up")
		}
		store.blind.Store(true)
		for until := time.Now().Add(time.Minute); store.blind.Load(); time.Sleep(time.Millisecond) {
			require.True(t, time.Now().Before(until), "nobody looks whether it has caught up")
		}
		asked = store.asked.Load()
		time.Sleep(5 * time.Second) // several looks
		again := store.asked.Load() - asked
		all, err := r.Versions(t.Context(), "sums")
		require.NoError(t, err)
		require.Len(t, all, 2)
		require.Less(t, all[1].Position, head, "it is half built")
		require.NotZero(t, all[1].Position, "it is begun")
		release()
		for until := time.Now().Add(time.Minute); all[1].Comparison == nil; time.Sleep(time.Millisecond) {
			require.True(t, time.Now().Before(until), "it is not compared")
			all, err = r.Versions(t.Context(), "sums")
			require.NoError(t, err)
		}
		c := all[1].Comparison
		require.Equal(t, []eventstore.Position{head, head}, []eventstore.Position{c.From.Position, c.To.Position}, c.String())
		require.True(t, c.Same(), c.String())
		require.Greater(t, again, int64(2), "it was looked again meanwhile")
		require.NoError(t, r.stop())
	})
}

// A projection that begins with a later version reads it at once.
func TestVersion_BeginsLater(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		put(t, store, account("ann"), deposited{5})
		v3 := ledgers(3, 2)
		r := start(t, store, store, projection.Options{}, v3)
		r.caughtUp(t, store, "ledgers/v3")
		require.Equal(t, 3, activeVersion(t, r, "ledgers"))
		require.Equal(t, 3, rows(t, store, v3)["ann"].Made)
		require.NoError(t, r.stop())
	})
}

// What a definition reads in between: the version that is read is the last that
// is not beyond its own.
func TestVersion_SkipsOne(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		put(t, store, account("ann"), deposited{5})
		v1, v2, v3 := ledgers(1, 1), ledgers(2, 1).HeldBack(), ledgers(3, 1)
		r := start(t, store, store, projection.Options{}, v1)
		r.caughtUp(t, store, "ledgers")
		require.NoError(t, r.stop())
		r = start(t, store, store, projection.Options{}, v1, v2, v3)
		awaits(t, r, "ledgers", 3)
		require.Equal(t, 1, rows(t, store, v2)["ann"].Made)
		require.Equal(t, 3, rows(t, store, v3)["ann"].Made)
		require.NoError(t, r.stop())
		// Version 2 reads version 1, and so keeps it.
		require.ErrorIs(t, r.DropVersion(t.Context(), "ledgers", 1), projection.ErrLeaseHeld)
		require.NoError(t, r.DropVersion(t.Context(), "ledgers", 2))
		require.NoError(t, r.DropVersion(t.Context(), "ledgers", 1))
	})
}

func TestVersion_Mistakes(t *testing.T) {
	t.Parallel()
	require.ErrorContains(t, ledgers(1, 1).Version(0).Err(), `projection "ledgers": invalid`)
	require.ErrorIs(t, projection.SQL("a", projection.OnSQL(func(context.Context, projection.Tx, deposited, eventstore.Recorded) error { return nil })).Version(-1).Err(), eventstore.ErrInvalid)
	require.Equal(t, "ledgers/v2", ledgers(2, 1).Name())
	require.Equal(t, "ledgers", ledgers(2, 1).Version(1).Name())
}

func monthly(version int, factor int64) *projection.SQLDefinition {
	table := fmt.Sprintf("monthly_%d", version)
	return projection.SQL("monthly",
		projection.Setup("CREATE TABLE IF NOT EXISTS "+table+" (id TEXT PRIMARY KEY, cents BIGINT NOT NULL, last BIGINT NOT NULL)"),
		projection.Reset("DROP TABLE "+table),
		projection.Activate("DROP VIEW IF EXISTS monthly", "CREATE VIEW monthly AS SELECT * FROM "+table),
		projection.OnSQL(func(ctx context.Context, tx projection.Tx, e deposited, r eventstore.Recorded) error {
			_, err := tx.Exec(ctx, "INSERT INTO "+table+" VALUES ($1, $2, $3) ON CONFLICT (id) DO UPDATE SET cents = "+table+".cents + excluded.cents, last = excluded.last", r.Stream.ID, factor*e.Cents, int64(r.Position))
			return err
		}),
	).Version(version)
}

// readMonthly reads the table that the program knows, as of the position.
func readMonthly(ctx context.Context, r *running, state projection.State, p *projection.SQLDefinition, at eventstore.Position) (all map[string][2]int64, err error) {
	for {
		if err := r.WaitFor(ctx, p.Name(), at); err != nil {
			return nil, err
		}
		there := false
		if err := state.View(ctx, func(tx projection.StateTx) (err error) {
			if there, err = r.Contains(tx, p.Name(), at); err != nil || !there {
				return err
			}
			all = map[string][2]int64{}
			found, err := tx.Query(ctx, "SELECT id, cents, last FROM monthly")
			if err != nil {
				return err
			}
			defer found.Close()
			for found.Next() {
				var id string
				var cents, last int64
				if err := found.Scan(&id, &cents, &last); err != nil {
					return err
				}
				all[id] = [2]int64{cents, last}
			}
			return found.Err()
		}); err != nil || there {
			return all, err
		}
	}
}

// A version of an SQL projection has tables of its own; which of them the program
// reads is switched with the version.
func TestVersion_SQL(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 3))
	store := backends["sqlite"](t)
	v1, v2 := monthly(1, 1), monthly(2, 10)
	put(t, store, account("ann"), deposited{5})
	r := start(t, store, store, projection.Options{}, v1)
	all, err := readMonthly(t.Context(), r, store, v1, 1)
	require.NoError(t, err)
	require.Equal(t, map[string][2]int64{"ann": {5, 1}}, all)
	require.NoError(t, r.stop())

	// One that is stopped while it is built goes on with it.
	r = start(t, store, store, projection.Options{}, v1, v2.HeldBack())
	for i := range 100 {
		put(t, store, account(fmt.Sprintf("a%d", i%7)), deposited{1})
	}
	require.NoError(t, r.stop())
	r = start(t, store, store, projection.Options{SQLEvents: 3}, v1, v2)
	stopTraffic := traffic(t, store, random, 2*time.Millisecond)
	ended, done := make(chan struct{}), make(chan error, 1)
	go func() {
		last := map[string]int64{}
		for {
			now, err := readMonthly(context.Background(), r, store, v2, 1)
			for id, was := range last {
				if err == nil && now[id][1] < was {
					err = fmt.Errorf("row %q went back from %d to %d", id, was, now[id][1])
				}
			}
			for id, row := range now {
				last[id] = row[1]
			}
			select {
			case <-ended:
				done <- err
				return
			default:
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	awaits(t, r, "monthly", 2)
	for _, v := range []*projection.SQLDefinition{v1, v2} { // both read what the view is of
		receipt := put(t, store, account("both"), deposited{1})
		all, err := readMonthly(t.Context(), r, store, v, receipt.Last)
		require.NoError(t, err)
		require.Zero(t, all["both"][0]%10)
		require.EqualValues(t, receipt.Last, all["both"][1])
	}
	for _, version := range []int{1, 2, 1} {
		require.NoError(t, r.Activate(t.Context(), "monthly", version))
	}
	last := stopTraffic()
	close(ended)
	require.NoError(t, <-done)
	all, err = readMonthly(t.Context(), r, store, v2, last)
	require.NoError(t, err)
	require.EqualValues(t, 2, all["both"][0])
	for _, version := range []int{2, 1} { // there is no traffic: then both are at the end
		require.NoError(t, r.Activate(t.Context(), "monthly", version))
	}
	require.NoError(t, r.stop())

	// A tool needs no definitions, and says that it does not compare.
	admin := projection.NewAdmin(store, "ann")
	c, err := admin.Compare(t.Context(), "monthly", 1, 2)
	require.NoError(t, err)
	require.Contains(t, c.String(), "rows of SQL projections are not compared")
	require.NoError(t, admin.Activate(t.Context(), "monthly", 2))
	require.NoError(t, admin.DropVersion(t.Context(), "monthly", 1))
	require.NoError(t, store.View(t.Context(), func(tx projection.StateTx) error {
		gone, err := tx.Query(t.Context(), "SELECT name FROM sqlite_master WHERE name = 'monthly_1'")
		require.NoError(t, err)
		require.False(t, gone.Next())
		require.NoError(t, gone.Close())
		rows, err := tx.Query(t.Context(), "SELECT cents FROM monthly WHERE id = 'both'")
		require.NoError(t, err)
		defer rows.Close()
		require.True(t, rows.Next())
		var cents int64
		require.NoError(t, rows.Scan(&cents))
		require.EqualValues(t, 20, cents)
		return nil
	}))
}

// While it catches up, a projection says how fast and for how long.
func TestStatus_RateAndLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		for i := range 1000 {
			put(t, store, account(fmt.Sprintf("a%d", i%10)), deposited{1})
		}
		slow := projection.View("slow", projection.On(func(l *bookEntry, _ deposited) { time.Sleep(10 * time.Millisecond) })).Version(2)
		r := start(t, store, store, projection.Options{BatchEvents: 10}, slow)
		time.Sleep(5*time.Second + time.Millisecond)
		s := r.status(t)
		require.Equal(t, projection.PhaseCatchingUp, s.Phase)
		require.Equal(t, "slow/v2", s.Name)
		require.InDelta(t, 100, s.Rate, 5)
		require.InDelta(t, 5, s.Left.Seconds(), 1)
		time.Sleep(6 * time.Second)
		s = r.status(t)
		require.Equal(t, projection.PhaseLive, s.Phase)
		require.Zero(t, s.Rate)
		require.Zero(t, s.Left)
		require.NoError(t, r.stop())
	})
}

// A version that sets events aside which the active one has folded is not made
// active by itself.
func TestVersion_SetsAside(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		put(t, store, account("ann"), deposited{5}, deposited{13})
		v1 := ledgers(1, 1)
		ill := true
		v2 := projection.View("ledgers", projection.OnMeta(func(l *bookEntry, e deposited, r eventstore.Recorded) {
			if e.Cents == 13 && ill {
				panic(projection.Permanent(errors.New("unlucky")))
			}
			l.Cents, l.Made = l.Cents+e.Cents, 2
		})).Version(2)
		r := start(t, store, store, projection.Options{}, v1)
		r.caughtUp(t, store, "ledgers")
		require.NoError(t, r.stop())
		r = start(t, store, store, projection.Options{}, v1, v2)
		time.Sleep(5 * time.Second)
		require.Equal(t, 1, activeVersion(t, r, "ledgers"))
		status, err := r.Status(t.Context())
		require.NoError(t, err)
		require.ErrorContains(t, status[1].Err, "it has set aside 1 events more than the active version")
		ill = false
		replayed, err := r.ReplayDeadLetters(t.Context(), "ledgers/v2")
		require.NoError(t, err)
		require.Equal(t, 1, replayed)
		awaits(t, r, "ledgers", 2)
		require.NoError(t, r.stop())
	})
}
