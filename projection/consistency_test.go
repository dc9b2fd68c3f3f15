package projection_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// hookedState lets a test interfere with updates.
type hookedState struct {
	projection.State
	// update runs instead of State.Update, which it may call.
	update func(ctx context.Context, fn func(projection.StateTx) error) error
}

func (h *hookedState) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	return h.update(ctx, fn)
}

var errInjected = errors.New("injected failure")

// verified has the view verified by an engine that knows nothing of its past.
func verified(t testing.TB, store interface {
	eventstore.Store
	projection.State
}, view projection.Projection,
) {
	t.Helper()
	engine := projection.NewEngine(store, store, projection.Options{Logger: quiet})
	require.NoError(t, engine.Add(view))
	v, err := engine.Verify(context.Background(), view.Name())
	require.NoError(t, err)
	require.True(t, v.Agrees(), v.String())
}

// folded is what a view of balances must be: the plain fold of the log.
func folded(t testing.TB, store eventstore.Store) map[string]balance {
	t.Helper()
	all := map[string]balance{}
	enc := (*eventstore.Encoding)(nil)
	for r, err := range store.Read(context.Background(), eventstore.All(), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		b := all[r.Stream.ID]
		switch r.Type {
		case "account.opened":
			var e opened
			require.NoError(t, enc.Decode(r, &e))
			b.Owner = e.Owner
		case "account.deposited":
			var e deposited
			require.NoError(t, enc.Decode(r, &e))
			b.Cents += e.Cents
		case "account.closed":
			delete(all, r.Stream.ID)
			continue
		default:
			continue
		}
		b.Seen = append(b.Seen, r.Version)
		all[r.Stream.ID] = b
	}
	return all
}

// Invariant 6: rows and checkpoint commit together. Updates fail, now before
// anything is committed, now after everything is, and no event is lost or
// folded twice.
func TestInvariant6_CheckpointAndRowsCommitTogether(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		state := &hookedState{State: store}
		var mu sync.Mutex
		updates := 0
		state.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
			mu.Lock()
			updates++
			n := updates
			mu.Unlock()
			switch n % 4 {
			case 1: // within the transaction, when all was written
				return store.Update(ctx, func(tx projection.StateTx) error {
					if err := fn(tx); err != nil {
						return err
					}
					return errInjected
				})
			case 3: // committed, but nobody learns of it
				if err := store.Update(ctx, fn); err != nil {
					return err
				}
				return errInjected
			}
			return store.Update(ctx, fn)
		}
		view := balances()
		r := start(t, store, state, projection.Options{BatchEvents: 5, RetryAfter: time.Nanosecond, RetryAtMost: time.Nanosecond}, view)
		for i := range 300 {
			put(t, store, account(fmt.Sprint("a", i%7)), opened{"x"}, deposited{int64(i)})
		}
		r.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		verified(t, store, view)
		require.Greater(t, updates, 8)
		require.NoError(t, r.stop())
	})
}

// Invariant 6: whoever lost the lease cannot commit. The former owner is held
// between folding and committing while another takes over and gets ahead.
func TestInvariant6_FormerOwnerCannotCommit(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		view := balances()
		reached, proceed := make(chan struct{}), make(chan struct{})
		var hold sync.Once
		state := &hookedState{State: store}
		armed := false
		var mu sync.Mutex
		refused := make(chan error, 1)
		state.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
			mu.Lock()
			stop := armed
			mu.Unlock()
			held := false
			if stop {
				hold.Do(func() {
					held = true
					close(reached)
					<-proceed
				})
			}
			err := store.Update(ctx, fn)
			if held {
				refused <- err
			}
			return err
		}
		former := start(t, store, state, projection.Options{Owner: "node"}, view)
		former.caughtUp(t, store, "balances")
		mu.Lock()
		armed = true
		mu.Unlock()
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})
		<-reached

		// The same owner, as after a restart that the former process outlived.
		heir := start(t, store, store, projection.Options{Owner: "node"}, view)
		heir.caughtUp(t, store, "balances")
		put(t, store, account("ann"), deposited{7})
		heir.caughtUp(t, store, "balances")
		close(proceed)

		// What the former owner held back is not committed, and it stands by.
		require.ErrorIs(t, <-refused, projection.ErrFenced)
		former.caughtUp(t, store, "balances")
		status := former.status(t)
		require.Equal(t, projection.PhaseStandby, status.Phase)
		require.ErrorIs(t, status.Err, projection.ErrFenced)
		require.Equal(t, map[string]balance{"ann": {Owner: "Ann", Cents: 12, Seen: []uint64{1, 2, 3}}}, rows(t, store, view))
		put(t, store, account("ann"), deposited{1})
		heir.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		verified(t, store, view)

		// It is not out for good, and begins with what the heir has left.
		require.NoError(t, heir.stop())
		put(t, store, account("ann"), deposited{2})
		former.caughtUp(t, store, "balances")
		require.NotEqual(t, projection.PhaseStandby, former.status(t).Phase)
		require.Equal(t, folded(t, store), rows(t, store, view))
		verified(t, store, view)
		require.NoError(t, former.stop())
	})
}

func TestRun_LeaseHeldByAnother(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		put(t, store, account("ann"), opened{"Ann"})
		first := start(t, store, store, projection.Options{Owner: "one"}, balances())
		first.caughtUp(t, store, "balances")
		second := start(t, store, store, projection.Options{Owner: "two"}, balances())
		second.caughtUp(t, store, "balances")
		require.Equal(t, projection.PhaseStandby, second.status(t).Phase)
		require.NotEqual(t, projection.PhaseStandby, first.status(t).Phase)
		require.NoError(t, first.stop())
		// Stopping gave the lease back.
		put(t, store, account("ann"), deposited{5})
		second.caughtUp(t, store, "balances")
		require.NotEqual(t, projection.PhaseStandby, second.status(t).Phase)
		require.NoError(t, second.stop())
	})
}

type journal struct{ Positions []eventstore.Position }

// Invariant 4: every event is folded once and in order while writers of
// different speed commit and the handler is slower than they are.
func TestInvariant4_EveryEventOnceInOrder(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		slow := projection.View("slow", projection.OnKeyed(
			func(deposited, eventstore.Recorded) []string { return []string{"all"} },
			func(j *journal, _ string, _ deposited, r eventstore.Recorded) {
				if r.Position%16 == 0 {
					time.Sleep(200 * time.Microsecond) // slower than the writers; decides nothing
				}
				j.Positions = append(j.Positions, r.Position)
			}))
		view := balances()
		r := start(t, store, store, projection.Options{BatchEvents: 32}, slow, view)
		var writers sync.WaitGroup
		for w := range 4 {
			writers.Go(func() {
				for i := range 100 {
					put(t, store, account(fmt.Sprint("w", w, i%3)), deposited{1}, deposited{2})
					if w == 0 && i%10 == 0 {
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		writers.Wait()
		r.caughtUp(t, store, "slow", "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		verified(t, store, view)
		got := rows(t, store, slow)["all"].Positions
		require.Len(t, got, 800)
		for i, p := range got {
			require.EqualValues(t, i+1, p)
		}
		require.NoError(t, r.stop())
	})
}

// Invariants 6 and 10, and rebuilding: random events, stops, crashes and
// failing updates at random points, with caches and batches of random size;
// the rows are the plain fold of the log in the end, and again after a rebuild.
func TestInvariant10_StoppingAtRandomPointsLosesNothing(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		for range 8 {
			seed := rand.Uint64()
			t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) { stopAtRandomPoints(t, open(t), seed) })
		}
	})
}

func stopAtRandomPoints(t *testing.T, store backend, seed uint64) {
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	view := balances()
	var mu sync.Mutex
	failures := rand.New(rand.NewPCG(seed, 1))
	state := &hookedState{State: store}
	crashed := make(chan struct{}, 1)
	state.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
		mu.Lock()
		dice := failures.IntN(12)
		mu.Unlock()
		switch dice {
		case 0:
			return store.Update(ctx, func(tx projection.StateTx) error { return errors.Join(fn(tx), errInjected) })
		case 1:
			return errors.Join(store.Update(ctx, fn), errInjected)
		case 2: // a crash after the commit: whoever runs it is gone
			err := store.Update(ctx, fn)
			select {
			case crashed <- struct{}{}:
			default:
			}
			return errors.Join(err, eventstore.ErrClosed)
		}
		return store.Update(ctx, fn)
	}
	options := func() projection.Options {
		return projection.Options{
			Owner: "node", BatchEvents: 1 + random.IntN(40), CacheBytes: 1 + random.IntN(8000), CheckpointEvery: 1 + random.IntN(20),
			RetryAfter: time.Nanosecond, RetryAtMost: time.Nanosecond,
		}
	}
	for range 12 {
		ctx, cancel := context.WithCancel(t.Context())
		engine := projection.NewEngine(store, state, withQuiet(options()))
		require.NoError(t, engine.Add(view))
		var running sync.WaitGroup
		running.Go(func() { _ = engine.Workers()[0].Run(ctx) })
		for range random.IntN(20) {
			id := account(fmt.Sprint("a", random.IntN(30)))
			switch random.IntN(8) {
			case 0:
				put(t, store, id, opened{fmt.Sprint("owner", random.IntN(100))})
			case 1:
				put(t, store, id, &closed{})
			case 2:
				put(t, store, eventstore.Stream{Category: "other", ID: id.ID}, renamed{})
			default:
				put(t, store, id, deposited{int64(random.IntN(100))}, deposited{1})
			}
		}
		if random.IntN(2) == 0 {
			head, err := store.Head(ctx)
			require.NoError(t, err)
			_ = engine.WaitFor(ctx, "balances", eventstore.Position(random.Uint64N(uint64(head)+1)))
		}
		cancel()
		running.Wait()
	}
	r := start(t, store, store, options(), view)
	r.caughtUp(t, store, "balances")
	want := folded(t, store)
	require.Equal(t, want, rows(t, store, view))
	require.NoError(t, r.Rebuild(t.Context(), "balances"))
	require.Equal(t, want, rows(t, store, view), "after a rebuild")
	require.NoError(t, r.stop())
}

func withQuiet(o projection.Options) projection.Options {
	o.Logger = quiet
	return o
}

// Invariant 10: stopping in the middle of a batch abandons it whole, and the
// next run does it whole.
func TestInvariant10_StopInTheMiddleOfABatch(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		for range 10 {
			put(t, store, account("ann"), deposited{1})
		}
		within, proceed := make(chan struct{}), make(chan struct{})
		var once sync.Once
		blocked := projection.View("balances", projection.OnMeta(func(b *balance, e deposited, r eventstore.Recorded) {
			if r.Version == 5 {
				once.Do(func() {
					close(within)
					<-proceed
				})
			}
			b.Cents += e.Cents
			b.Seen = append(b.Seen, r.Version)
		}))
		r := start(t, store, store, projection.Options{}, blocked)
		<-within
		r.cancel()
		close(proceed)
		require.NoError(t, r.stop(), "being told to stop is no error")
		_, partial := rows(t, store, blocked)["ann"]
		require.False(t, partial, "an abandoned batch leaves nothing")
		require.ErrorIs(t, r.WaitFor(t.Context(), "balances", 10), projection.ErrStopped)

		again := start(t, store, store, projection.Options{}, blocked)
		again.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, blocked))
		require.NoError(t, again.stop())
	})
}

// otherLog is a log with an id of the test's choice.
type otherLog struct {
	eventstore.Store
	id string
}

func (o otherLog) LogID(context.Context) (string, error) { return o.id, nil }

func TestRun_RefusesAWrongLog(t *testing.T) {
	t.Parallel()
	state, log := memory.New(), memory.New()
	defer state.Close()
	defer log.Close()
	put(t, log, account("ann"), opened{"Ann"}, deposited{5})
	view := balances()
	r := start(t, otherLog{log, "A"}, state, projection.Options{}, view)
	r.caughtUp(t, log, "balances")
	require.NoError(t, r.stop())

	replaced := start(t, otherLog{log, "B"}, state, projection.Options{}, view)
	err := replaced.WaitFor(t.Context(), "balances", 3)
	require.ErrorIs(t, err, projection.ErrWrongLog)
	require.ErrorContains(t, err, `at position 2 of the log "A", but this log is "B"`)
	require.ErrorIs(t, replaced.stop(), projection.ErrWrongLog)

	older := memory.New()
	defer older.Close()
	put(t, older, account("ann"), opened{"Ann"})
	restored := start(t, otherLog{older, "A"}, state, projection.Options{}, view)
	err = restored.WaitFor(t.Context(), "balances", 3)
	require.ErrorIs(t, err, projection.ErrWrongLog)
	require.ErrorContains(t, err, `it is at position 2, but the log ends at 1`)
	require.ErrorIs(t, restored.stop(), projection.ErrWrongLog)
	require.Equal(t, map[string]balance{"ann": {Owner: "Ann", Cents: 5, Seen: []uint64{1, 2}}}, rows(t, state, view), "nothing was touched")

	// The way out that the error names.
	require.NoError(t, restored.Rebuild(t.Context(), "balances"))
	rebuilt := start(t, otherLog{older, "A"}, state, projection.Options{}, view)
	rebuilt.caughtUp(t, older, "balances")
	require.Equal(t, map[string]balance{"ann": {Owner: "Ann", Seen: []uint64{1}}}, rows(t, state, view))
	require.NoError(t, rebuilt.stop())
}

// Invariant 8: a rebuild only folds.
func TestInvariant8_RebuildIsSilent(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		view := balances()
		r := start(t, store, store, projection.Options{}, view)
		for i := range 50 {
			put(t, store, account(fmt.Sprint("a", i%5)), opened{"x"}, deposited{int64(i)})
		}
		r.caughtUp(t, store, "balances")
		before, err := store.Head(t.Context())
		require.NoError(t, err)
		first := rows(t, store, view)
		require.NoError(t, store.Update(t.Context(), func(tx projection.StateTx) error {
			return tx.Put("view.balances", "stray", []byte(`{"Owner":"nobody"}`))
		}))
		require.NoError(t, r.Rebuild(t.Context(), "balances"))
		require.Equal(t, first, rows(t, store, view))
		after, err := store.Head(t.Context())
		require.NoError(t, err)
		require.Equal(t, before, after, "rebuilding writes no events")
		require.NoError(t, r.stop())
	})
}

// Whoever waits for a projection that has stopped is not told that it has come
// far when its rows were removed since.
func TestRebuild_OfAProjectionThatHasStopped(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		view := balances()
		put(t, store, account("ann"), opened{"Ann"})
		r := start(t, store, store, projection.Options{}, view)
		r.caughtUp(t, store, "balances")
		require.NoError(t, r.stop())
		require.NoError(t, r.WaitFor(t.Context(), "balances", 1), "its rows are there")
		require.NoError(t, r.Rebuild(t.Context(), "balances"))
		require.Empty(t, rows(t, store, view))
		require.ErrorIs(t, r.WaitFor(t.Context(), "balances", 1), projection.ErrStopped)
		reached, err := r.Reached("balances")
		require.NoError(t, err)
		require.Zero(t, reached)
		status, err := r.Status(t.Context())
		require.NoError(t, err)
		require.Zero(t, status[0].Position)

		again := start(t, store, store, projection.Options{}, view)
		again.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		require.NoError(t, again.stop())
	})
}

// Events that do not concern a projection cost it no update, and do not hold
// up those who wait for it.
func TestRun_SkipsWithoutWriting(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		updates := 0
		state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			updates++
			return store.Update(ctx, fn)
		}}
		r := start(t, store, state, projection.Options{CheckpointEvery: 100}, balances())
		r.caughtUp(t, store, "balances")
		synctest.Wait()
		begun := updates
		other := eventstore.Stream{Category: "other", ID: "x"}
		for range 99 {
			put(t, store, other, renamed{})
		}
		r.caughtUp(t, store, "balances")
		synctest.Wait()
		require.Equal(t, begun, updates)
		put(t, store, other, renamed{})
		r.caughtUp(t, store, "balances")
		synctest.Wait()
		require.Equal(t, begun+1, updates, "the checkpoint is written now and then")
		put(t, store, other, renamed{})
		r.caughtUp(t, store, "balances")
		require.NoError(t, r.stop())
		require.Equal(t, begun+2, updates, "and when stopping")
		require.NoError(t, store.View(context.Background(), func(tx projection.StateTx) error {
			c, err := tx.Checkpoint("projection.balances")
			require.EqualValues(t, 101, c.Position)
			return err
		}))
	})
}
