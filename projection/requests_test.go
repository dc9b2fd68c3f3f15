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
	"github.com/deed-go/deed/projection"
)

// left counts request rows.
func left(t testing.TB, s projection.State) (n int, all []string) {
	t.Helper()
	require.NoError(t, s.View(context.Background(), func(tx projection.StateTx) error {
		n, all = 0, nil
		for row, err := range tx.Scan("projection.requests.balances", projection.Range{}) {
			if err != nil {
				return err
			}
			n++
			all = append(all, string(row.Value))
		}
		return nil
	}))
	return n, all
}

// The owner dies before it answers a Rebuild asked for by a standby; the
// standby takes over and does it itself, before it looks for the answer.
func TestRequest_RebuildFromStandbyThatTakesOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		last := put(t, store, account("ann"), opened{"Ann"}, deposited{5}).Last
		release := take(t, store, "somebody") // an owner that does not answer any more
		second := start(t, store, store, projection.Options{Owner: "two"}, view)
		ready(t, second)
		rebuilt := make(chan error, 1)
		go func() { rebuilt <- second.Rebuild(context.Background(), "balances") }()
		time.Sleep(5100 * time.Millisecond)
		release()
		time.Sleep(time.Minute)
		synctest.Wait()
		select {
		case err := <-rebuilt:
			require.NoError(t, err)
		default:
			t.Error("Rebuild hangs")
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.Equal(t, folded(t, store), rows(t, store, view))
		if err := second.WaitFor(ctx, "balances", last); err != nil {
			t.Errorf("WaitFor hangs too: %v, status %+v", err, second.status(t))
		}
		last = put(t, store, account("ann"), deposited{5}).Last
		if err := second.WaitFor(ctx, "balances", last); err != nil {
			t.Errorf("WaitFor of a new event hangs too: %v, status %+v", err, second.status(t))
		}
		_ = second.stop()
		synctest.Wait()
	})
}

// Replay of a letter whose handler panics with an error that wraps
// ErrUnavailable, as of another database.
func TestRequest_ReplayUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		var calls atomic.Int64
		var giveup atomic.Bool
		view := projection.View("balances", projection.OnMeta(func(b *balance, e deposited, r eventstore.Recorded) {
			if e.Cents == 13 && !giveup.Load() {
				if calls.Add(1) == 2000 {
					giveup.Store(true)
				}
				panic(fmt.Errorf("the rates service: %w", eventstore.ErrUnavailable))
			}
			b.Cents += e.Cents
		}))
		put(t, store, account("ann"), deposited{13})
		owner := start(t, store, store, projection.Options{Owner: "one"}, view)
		owner.caughtUp(t, store, "balances")
		began := time.Now()
		before := calls.Load()
		_, err := projection.NewAdmin(store, "tester").Replay(t.Context(), "balances")
		t.Logf("answer: %v", err)
		t.Logf("%d calls within %s", calls.Load()-before, time.Since(began))
		require.LessOrEqual(t, calls.Load()-before, int64(20), "a hot loop (ended by the test only)")
		_ = owner.stop()
	})
}

// The database fails for a moment while the owner pauses for another reason.
func TestRequest_PauseThenOutageStopsTheProjection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		var failing atomic.Bool
		store.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
			if failing.Load() {
				return errors.New("a hiccup that is not classified")
			}
			return store.Store.Update(ctx, fn)
		}
		owner := start(t, store, store, projection.Options{Owner: "one"}, view)
		owner.caughtUp(t, store, "balances")
		failing.Store(true)
		last := put(t, store, account("ann"), deposited{5}).Last
		time.Sleep(3500 * time.Millisecond) // pauses of 0.1, 0.2, 0.4, 0.8, 1.6, 3.2 s
		require.Equal(t, projection.PhaseRetrying, owner.status(t).Phase)
		store.down.Store(true)
		time.Sleep(1500 * time.Millisecond)
		store.down.Store(false)
		failing.Store(false)
		time.Sleep(10 * time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.NoError(t, owner.WaitFor(ctx, "balances", last))
		require.NoError(t, owner.stop())
	})
}

// What was asked for by somebody who has died, or who gave up while it was worked
// on, goes away in the end.
func TestRequest_Leftovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		put(t, store, account("ann"), deposited{13})
		slow := atomic.Bool{}
		view := projection.View("balances", projection.OnMeta(func(b *balance, e deposited, r eventstore.Recorded) {
			if slow.Load() {
				time.Sleep(2 * time.Second)
				return
			}
			panic("ill")
		}))
		owner := start(t, store, store, projection.Options{Owner: "one"}, view)
		owner.caughtUp(t, store, "balances")
		slow.Store(true)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		_, err := projection.NewAdmin(store, "tester").Replay(ctx, "balances")
		cancel()
		t.Logf("asked: %v", err)
		require.NoError(t, owner.stop())
		again := start(t, store, store, projection.Options{Owner: "one"}, view)
		again.caughtUp(t, store, "balances")
		time.Sleep(24 * time.Hour)
		require.NoError(t, again.Rebuild(t.Context(), "balances"))
		require.NoError(t, again.stop())
		n, all := left(t, store)
		require.Zero(t, n, "%v", all)
	})
}

// Two tools' engines, neither of which runs the projection, ask at once.
func TestRequest_TwoIdleEngines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})
		inside := make(chan struct{})
		slow := sharedState{&hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			select {
			case inside <- struct{}{}:
				time.Sleep(20 * time.Millisecond)
			default:
			}
			return store.Update(ctx, fn)
		}}}
		one := projection.NewEngine(store, slow, projection.Options{Owner: "one"})
		require.NoError(t, one.Add(view))
		two := projection.NewEngine(store, store, projection.Options{Owner: "two"})
		require.NoError(t, two.Add(view))
		first := make(chan error, 1)
		go func() { first <- one.Rebuild(context.Background(), "balances") }()
		<-inside
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		err := two.Rebuild(ctx, "balances")
		require.NoError(t, <-first)
		require.NoError(t, err, "nobody has the projection for an hour, and it was not emptied")
	})
}

// The error says to rebuild the projection; the tool's request to do so is not found.
func TestRequest_RebuildOnWrongLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state, log := memory.New(), memory.New()
		defer state.Close()
		defer log.Close()
		put(t, log, account("ann"), opened{"Ann"})
		first := start(t, otherLog{log, "A"}, state, projection.Options{}, balances())
		first.caughtUp(t, log, "balances")
		require.NoError(t, first.stop())
		require.NoError(t, projection.NewAdmin(state, "tester").WithoutWaiting().Rebuild(t.Context(), "balances"))
		second := start(t, otherLog{log, "B"}, state, projection.Options{}, balances())
		require.NoError(t, second.WaitFor(t.Context(), "balances", 1))
		require.NoError(t, second.stop())
	})
}

// The answer of the state to the request's own update is lost.
func TestRequest_AskLosesAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		put(t, store, account("ann"), deposited{5})
		lost := atomic.Bool{}
		lost.Store(true)
		state := sharedState{&hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			err := store.Update(ctx, fn)
			if lost.CompareAndSwap(true, false) {
				return errors.Join(err, fmt.Errorf("the connection was lost: %w", eventstore.ErrUnavailable))
			}
			return err
		}}}
		err := projection.NewAdmin(state, "tester").Rebuild(t.Context(), "balances")
		t.Logf("asked: %v", err)
		n, all := left(t, store)
		require.Zero(t, n, "it failed, but the request is there: %v", all)
	})
}

// A row that cannot be read stops the projection.
func TestRequest_MalformedRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		owner := start(t, store, store, projection.Options{Owner: "one"}, view)
		owner.caughtUp(t, store, "balances")
		require.NoError(t, store.Update(t.Context(), func(tx projection.StateTx) error {
			return tx.Put("projection.requests.balances", "1", []byte(`{"action":"skip","position":"stream account-1, version 3"}`))
		}))
		time.Sleep(time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		require.NoError(t, owner.WaitFor(ctx, "balances", put(t, store, account("ann"), deposited{5}).Last))
		require.NoError(t, owner.stop())
	})
}

// A replay during the pause after an update that failed works on rows
// that were never stored: the letter is gone, and so is its event.
func replayInPause(t *testing.T, failure error, byAdmin bool) {
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		var ill, failing atomic.Bool
		ill.Store(true)
		view := projection.View("balances", projection.OnKeyed(
			func(deposited, eventstore.Recorded) []string { return []string{"all"} },
			func(b *balance, _ string, e deposited, r eventstore.Recorded) {
				if e.Cents == 13 && ill.Load() {
					panic(projection.Permanent(errors.New("ill")))
				}
				b.Cents += e.Cents
				b.Seen = append(b.Seen, uint64(r.Position))
			}))
		store.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
			if failing.Load() {
				return failure
			}
			return store.Store.Update(ctx, fn)
		}
		put(t, store, account("eve"), deposited{100}) // 1
		put(t, store, account("ann"), deposited{13})  // 2, set aside
		owner := start(t, store, store, projection.Options{Owner: "one", RetryAfter: 2 * time.Second}, view)
		owner.caughtUp(t, store, "balances")
		ill.Store(false)
		failing.Store(true)
		last := put(t, store, account("bob"), deposited{1000}).Last // 3
		synctest.Wait()
		require.Equal(t, projection.PhaseRetrying, owner.status(t).Phase)
		failing.Store(false) // over, but the pause goes on
		var n int
		var err error
		if byAdmin {
			n, err = projection.NewAdmin(store, "tester").Replay(t.Context(), "balances")
		} else {
			n, err = owner.ReplayDeadLetters(t.Context(), "balances")
		}
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.NoError(t, owner.WaitFor(t.Context(), "balances", last))
		got := rows(t, store, view)["all"]
		require.NoError(t, owner.stop())
		require.EqualValues(t, 1113, got.Cents, "%+v", got)
	})
}

func TestRequest_ReplayInPause_InProcess(t *testing.T) {
	replayInPause(t, fmt.Errorf("gone: %w", eventstore.ErrUnavailable), false)
}

func TestRequest_ReplayInPause_ByAdmin(t *testing.T) {
	replayInPause(t, errors.New("a hiccup that is not classified"), true)
}

// Skipping an event again, which "does nothing", makes the owner forget
// which streams are set aside: later events overtake the dead letters.
func TestRequest_SkipAgain(t *testing.T) {
	for _, how := range []string{"engine", "admin"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &shared{Store: memory.New()}
				defer store.Close()
				f := newFragile()
				put(t, store, account("ann"), deposited{13}, deposited{1}) // 1, 2
				put(t, store, account("bob"), deposited{13}, deposited{2}) // 3, 4
				owner := start(t, store, store, projection.Options{Owner: "one"}, f.view)
				owner.caughtUp(t, store, "balances")
				for range 2 {
					if how == "engine" {
						require.NoError(t, owner.SkipDeadLetter(t.Context(), "balances", 1, "why"))
					} else {
						require.NoError(t, projection.NewAdmin(store, "tester").Skip(t.Context(), "balances", 1, "why"))
					}
				}
				put(t, store, account("bob"), deposited{1000}) // 5 must follow 3 and 4
				owner.caughtUp(t, store, "balances")
				letters, err := owner.DeadLetters(t.Context(), "balances")
				require.NoError(t, err)
				if got := positions(letters); len(got) != 4 {
					t.Errorf("5 has overtaken 3 and 4, which are set aside: letters %v, rows %v", got, rows(t, store, f.view))
				}
				f.ill.Store(false)
				_, err = owner.ReplayDeadLetters(t.Context(), "balances")
				require.NoError(t, err)
				require.Equal(t, []uint64{1, 2, 3}, rows(t, store, f.view)["bob"].Seen)
				require.NoError(t, owner.stop())
			})
		})
	}
}

// While the replay fails as unavailable, nothing else gets its turn, the
// request cannot be taken back, and the next process does not even start.
func TestRequest_ReplayStarves(t *testing.T) {
	store := &shared{Store: memory.New()}
	defer store.Close()
	var calls atomic.Int64
	view := projection.View("balances", projection.OnMeta(func(b *balance, e deposited, r eventstore.Recorded) {
		if e.Cents == 13 {
			calls.Add(1)
			panic(fmt.Errorf("the rates service: %w", eventstore.ErrUnavailable))
		}
		b.Cents += e.Cents
	}))
	put(t, store, account("ann"), deposited{13})
	owner := start(t, store, store, projection.Options{Owner: "one", Attempts: 2, RetryAfter: time.Millisecond}, view)
	owner.caughtUp(t, store, "balances")
	before := calls.Load()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	_, err := projection.NewAdmin(store, "tester").Replay(ctx, "balances")
	t.Logf("answer: %v; %d calls of the handler", err, calls.Load()-before)
	last := put(t, store, account("bob"), deposited{1}).Last
	brief, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := owner.WaitFor(brief, "balances", last); err != nil {
		t.Errorf("another stream's event is not folded: %v; phase %s", err, owner.status(t).Phase)
	}
	require.NoError(t, owner.stop())
	again := start(t, store, store, projection.Options{Owner: "two", Attempts: 2, RetryAfter: time.Millisecond}, view)
	brief, cancel = context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := again.Workers()[0].Ready(brief); err != nil {
		t.Errorf("the next process does not start: %v", err)
	}
	require.NoError(t, again.stop())
}

// Three nodes and an idle engine are asked for replays, skips and rebuilds while
// the database fails now and then, answers are lost and leases are taken away.
func TestRequest_Chaos(t *testing.T) {
	t.Parallel()
	for range 40 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { requestChaos(t, seed) })
		})
		if t.Failed() {
			return
		}
	}
}

func requestChaos(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 1))
	store := &shared{Store: memory.New()}
	defer store.Close()
	var mu sync.Mutex
	faults := rand.New(rand.NewPCG(seed, 2))
	var faulty atomic.Bool
	dice := func(n int) int { mu.Lock(); defer mu.Unlock(); return faults.IntN(n) }
	store.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
		if faulty.Load() {
			switch dice(30) {
			case 0:
				return errDown
			case 1:
				return errInjected
			}
			time.Sleep(time.Duration(dice(3)) * time.Millisecond)
		}
		err := store.Store.Update(ctx, fn)
		if err == nil && faulty.Load() && dice(20) == 0 {
			return errDown
		}
		return err
	}
	f := &fragile{}
	f.ill.Store(true)
	f.view = projection.View("balances", projection.OnKeyed(
		func(_ deposited, r eventstore.Recorded) []string { return []string{"all", r.Stream.ID} },
		func(b *balance, key string, e deposited, r eventstore.Recorded) {
			b.Cents += e.Cents
			if key == "all" {
				b.Seen = append(b.Seen, uint64(r.Position))
			} else {
				b.Seen = append(b.Seen, r.Version)
			}
			if e.Cents == 13 && f.ill.Load() {
				panic("unlucky")
			}
		}))
	const nodes = 3
	engines := make([]*running, nodes)
	launch := func(i int) {
		engines[i] = start(t, store, store, projection.Options{
			Owner: fmt.Sprint("node", i), BatchEvents: 1 + random.IntN(8), CheckpointEvery: 1 + random.IntN(20), Attempts: 2, RetryAfter: time.Duration(1+random.IntN(4000)) * time.Millisecond,
		}, f.view)
		synctest.Wait()
	}
	for i := range engines {
		launch(i)
	}
	faulty.Store(true)
	admin := projection.NewAdmin(store, "tester")
	idle := projection.NewEngine(store, store, projection.Options{Owner: "idle", Logger: quiet})
	require.NoError(t, idle.Add(f.view))
	var asked sync.WaitGroup
	for range 300 {
		i := random.IntN(nodes)
		within := time.Duration(1+random.IntN(4000)) * time.Millisecond
		pos := eventstore.Position(1 + random.IntN(100))
		e := engines[i]
		ask := func(what string, do func(ctx context.Context) error) {
			asked.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), within)
				defer cancel()
				began := time.Now()
				_ = do(ctx) // it may have failed in many ways
				if took := time.Since(began); took > within+4*time.Second {
					t.Errorf("%s took %s, wanted %s", what, took, within)
				}
			})
		}
		switch random.IntN(16) {
		case 0:
			require.NoError(t, e.stop())
			launch(i)
		case 1:
			f.ill.Store(!f.ill.Load())
		case 2:
			ask("admin replay", func(ctx context.Context) error { _, err := admin.Replay(ctx, "balances"); return err })
		case 3:
			ask("engine replay", func(ctx context.Context) error { _, err := e.ReplayDeadLetters(ctx, "balances"); return err })
		case 4:
			ask("admin skip", func(ctx context.Context) error { return admin.Skip(ctx, "balances", pos, "x") })
		case 5:
			ask("engine skip", func(ctx context.Context) error { return e.SkipDeadLetter(ctx, "balances", pos, "x") })
		case 6:
			if random.IntN(4) == 0 {
				ask("admin rebuild", func(ctx context.Context) error { return admin.Rebuild(ctx, "balances") })
			}
		case 7:
			ask("engine rebuild", func(ctx context.Context) error { return e.Rebuild(ctx, "balances") })
		case 11: // the owner is fenced
			if lease, err := store.Store.Acquire(t.Context(), "projection.balances", fmt.Sprint("node", i), 0); err == nil {
				time.Sleep(time.Duration(random.IntN(1500)) * time.Millisecond)
				require.NoError(t, store.Store.Release(t.Context(), lease))
			}
		case 8:
			time.Sleep(time.Duration(random.IntN(3000)) * time.Millisecond)
		case 9:
			ask("idle replay", func(ctx context.Context) error { _, err := idle.ReplayDeadLetters(ctx, "balances"); return err })
		case 10:
			ask("later", func(ctx context.Context) error { _, err := admin.WithoutWaiting().Replay(ctx, "balances"); return err })
		default:
			cents := int64(random.IntN(40))
			if random.IntN(6) == 0 {
				cents = 13
			}
			put(t, store, account(fmt.Sprint("a", random.IntN(5))), deposited{cents})
		}
	}
	asked.Wait()
	faulty.Store(false)
	f.ill.Store(false)
	// Whoever has it now is asked until all is in.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	last, err := store.Head(ctx)
	require.NoError(t, err)
	for i, r := range engines {
		require.NoError(t, r.WaitFor(ctx, "balances", last), "node %d: %+v", i, r.status(t))
	}
	_, err = admin.Replay(ctx, "balances")
	require.NoError(t, err)
	letters, err := admin.DeadLetters(ctx, "balances")
	require.NoError(t, err)
	require.Empty(t, letters)
	skipped, err := admin.Skipped(ctx, "balances")
	require.NoError(t, err)
	gone := map[eventstore.Position]bool{}
	for _, s := range skipped {
		gone[s.Position] = true
	}
	want := map[string]balance{}
	for r, err := range store.Read(ctx, eventstore.All(), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		if gone[r.Position] {
			continue
		}
		var d deposited
		require.NoError(t, (*eventstore.Encoding)(nil).Decode(r, &d))
		b := want[r.Stream.ID]
		b.Cents += d.Cents
		b.Seen = append(b.Seen, r.Version)
		want[r.Stream.ID] = b
		b = want["all"]
		b.Cents += d.Cents
		b.Seen = append(b.Seen, uint64(r.Position))
		want["all"] = b
	}
	have := rows(t, store, f.view)
	slices.Sort(have["all"].Seen)
	require.Equal(t, want, have)
	for i, r := range engines {
		require.NoError(t, r.WaitFor(ctx, "balances", last), "node %d: %+v", i, r.status(t))
		require.NoError(t, r.stop())
	}
	checker := projection.NewEngine(store, store, projection.Options{Logger: quiet})
	require.NoError(t, checker.Add(f.view))
	v, err := checker.Verify(ctx, "balances")
	require.NoError(t, err)
	require.True(t, v.SameEvents, v.String()) // the order within "all" may differ
}

// Work that takes longer than one waits for somebody to begin with it is asked
// for once.
func TestRequest_TakesLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		var ill atomic.Bool
		ill.Store(true)
		view := projection.View("balances", projection.On(func(b *balance, e deposited) {
			if ill.Load() {
				panic(projection.Permanent(errors.New("ill")))
			}
			time.Sleep(5 * time.Second)
			b.Cents += e.Cents
		}))
		put(t, store, account("ann"), deposited{1}, deposited{2}, deposited{3})
		owner := start(t, store, store, projection.Options{Owner: "one"}, view)
		owner.caughtUp(t, store, "balances")
		second := start(t, store, store, projection.Options{Owner: "two"}, view)
		ready(t, second)
		ill.Store(false)
		n, err := second.ReplayDeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, 3, n)
		require.EqualValues(t, 6, rows(t, store, view)["ann"].Cents)
		k, all := left(t, store)
		require.Zero(t, k, "%v", all)
		require.NoError(t, owner.stop())
		require.NoError(t, second.stop())
	})
}
