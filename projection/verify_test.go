package projection_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
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

// Rows that somebody has changed are found, the first of them is shown.
func TestVerify_Rows(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	view := balances()
	for n := range 100 {
		put(t, store, account(fmt.Sprintf("%02d", n)), opened{"Ann"}, deposited{int64(n)})
	}
	r := start(t, store, store, projection.Options{}, view)
	r.caughtUp(t, store, "balances")
	v, err := r.Verify(t.Context(), "balances")
	require.NoError(t, err)
	require.True(t, v.Agrees())
	require.Equal(t, projection.Verification{Name: "balances", Position: 200, Events: 200, Applied: 200, SameEvents: true, Compared: true, Rows: 100}, v)
	require.Equal(t, "200 events up to position 200 made 100 rows, as they should", v.String())

	spoil := func(change func(tx projection.StateTx) error) { require.NoError(t, store.Update(t.Context(), change)) }
	spoil(func(tx projection.StateTx) error {
		return errors.Join(tx.Put("view.balances", "50", []byte(`{"Owner":"Eve"}`)), tx.Delete("view.balances", "70"), tx.Put("view.balances", "99x", []byte(`{}`)))
	})
	v, err = r.Verify(t.Context(), "balances")
	require.NoError(t, err)
	require.False(t, v.Agrees())
	require.True(t, v.SameEvents)
	require.Equal(t, []int{1, 1, 1}, []int{v.Missing, v.Extra, v.Changed})
	require.Equal(t, "50", v.First.Key)
	require.JSONEq(t, `{"Owner":"Eve"}`, string(v.First.Stored))
	require.Contains(t, string(v.First.Should), `"Cents":50`)
	require.Contains(t, v.String(), `at position 200 of 100 rows 1 are missing, 1 are too many, 1 differ; the first is "50": it is {"Owner":"Eve"} and should be {`)

	// A row that is missing comes first when its key does.
	spoil(func(tx projection.StateTx) error { return tx.Delete("view.balances", "07") })
	v, err = r.Verify(t.Context(), "balances")
	require.NoError(t, err)
	require.Equal(t, "07", v.First.Key)
	require.Contains(t, v.String(), "it is not there and should be")
	require.NoError(t, r.Rebuild(t.Context(), "balances"))
	v, err = r.Verify(t.Context(), "balances")
	require.NoError(t, err)
	require.True(t, v.Agrees())
	require.NoError(t, r.stop())

	// It need not run, but it must be of this log.
	v, err = r.Verify(t.Context(), "balances")
	require.NoError(t, err)
	require.True(t, v.Agrees())
	other := memory.New()
	defer other.Close()
	elsewhere := projection.NewEngine(other, store, projection.Options{})
	require.NoError(t, elsewhere.Add(view))
	_, err = elsewhere.Verify(t.Context(), "balances")
	require.ErrorIs(t, err, projection.ErrWrongLog)
	_, err = elsewhere.Verify(t.Context(), "none")
	require.ErrorIs(t, err, projection.ErrNotRegistered)
}

// cheat applies an event twice, or not at all, without a trace in the rows.
type cheat struct {
	*memory.Store
	change func(b *eventstore.Batch)
}

func (c cheat) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		for b, err := range c.Store.Subscribe(ctx, q, after) {
			b.Events = append([]eventstore.Recorded{}, b.Events...)
			if len(b.Events) > 1 {
				c.change(&b)
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

// Events that were applied twice or never are found also where rows do not show
// it, and where the number of events is right.
func TestVerify_Events(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(b *eventstore.Batch){
		"twice":               func(b *eventstore.Batch) { b.Events = append(b.Events, b.Events[len(b.Events)-1]) },
		"never":               func(b *eventstore.Batch) { b.Events = b.Events[1:] },
		"one for the other":   func(b *eventstore.Batch) { b.Events[0] = b.Events[1] },
		"one of another time": func(b *eventstore.Batch) { b.Events[1].ID[15]++ },
	} {
		store := memory.New()
		put(t, store, account("ann"), deposited{0}, deposited{0}, deposited{0})
		type nothing struct{ Owner string }
		view := projection.View("v", projection.On(func(*nothing, deposited) {}))
		engine := projection.NewEngine(cheat{store, change}, store, projection.Options{Logger: quiet})
		require.NoError(t, engine.Add(view))
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = engine.Workers()[0].Run(ctx) })
		require.NoError(t, engine.WaitFor(t.Context(), "v", 3))
		v, err := engine.Verify(t.Context(), "v")
		require.NoError(t, err)
		require.False(t, v.SameEvents, name)
		require.False(t, v.Agrees(), name)
		require.Zero(t, v.Missing+v.Changed+v.Extra, name)
		if v.Applied == v.Events {
			require.Contains(t, v.String(), "it has applied other events than those of the log", name)
		} else {
			require.Contains(t, v.String(), fmt.Sprintf("it has applied %d events of 3", v.Applied), name)
		}
		cancel()
		running.Wait()
		require.NoError(t, store.Close())
	}
}

// Dead letters, skipped events, and replays in another order than that of the
// log are not held against it; a handler that fails today is an error.
func TestVerify_DeadLetters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		f := newFragile()
		put(t, store, account("ann"), deposited{13}, deposited{1}, deposited{13}, deposited{2})
		put(t, store, account("bob"), deposited{5})
		r := start(t, store, store, projection.Options{Attempts: 1}, f.view)
		r.caughtUp(t, store, "balances")
		verify := func() projection.Verification {
			t.Helper()
			v, err := r.Verify(t.Context(), "balances")
			require.NoError(t, err)
			require.True(t, v.Agrees(), v.String())
			return v
		}
		v := verify()
		require.EqualValues(t, 1, v.Applied)
		require.Equal(t, 4, v.SetAside)
		require.NoError(t, r.SkipDeadLetter(t.Context(), "balances", 1, "why"))
		_, err := r.ReplayDeadLetters(t.Context(), "balances")
		require.Error(t, err)
		v = verify()
		require.EqualValues(t, 2, v.Applied)
		require.Equal(t, []int{2, 1}, []int{v.SetAside, v.Skipped})
		f.ill.Store(false)
		put(t, store, account("bob"), deposited{5})
		r.caughtUp(t, store, "balances")
		_, err = r.ReplayDeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		v = verify()
		require.EqualValues(t, 5, v.Applied)
		f.ill.Store(true)
		_, err = r.Verify(t.Context(), "balances")
		require.ErrorContains(t, err, `event "account.deposited" at position 3 of stream "account-ann": handler panicked`)
		require.NoError(t, r.stop())

		// Replayed by an engine that does not run it, which remembers nothing.
		f.ill.Store(true)
		put(t, store, account("eve"), deposited{13})
		again := start(t, store, store, projection.Options{Attempts: 1}, f.view)
		again.caughtUp(t, store, "balances")
		require.NoError(t, again.stop())
		f.ill.Store(false)
		idle := projection.NewEngine(store, store, projection.Options{})
		require.NoError(t, idle.Add(f.view))
		n, err := idle.ReplayDeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.EqualValues(t, 6, verify().Applied)
	})
}

// While events come, dead letters come and go and the projection is restarted,
// what is there is always right.
func TestVerify_WhileItRuns(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	store := memory.New()
	defer store.Close()
	f := newFragile()
	writing, stop := context.WithCancel(t.Context())
	defer stop()
	var writers sync.WaitGroup
	for w := range 2 {
		rnd := rand.New(rand.NewPCG(seed, uint64(w)))
		writers.Go(func() {
			for n := 0; writing.Err() == nil && n < 3000; n++ {
				cents := int64(1)
				if rnd.IntN(200) == 0 {
					cents = 13
				}
				put(t, store, account(fmt.Sprint(rnd.IntN(100))), deposited{cents})
			}
		})
	}
	running := start(t, store, store, projection.Options{Attempts: 1, BatchEvents: 64}, f.view)
	rnd := rand.New(rand.NewPCG(seed, 9))
	for range 30 {
		switch rnd.IntN(4) {
		case 0:
			f.ill.Store(false)
			_, _ = running.ReplayDeadLetters(t.Context(), "balances")
			f.ill.Store(true)
		case 1:
			require.NoError(t, running.stop())
			running = start(t, store, store, projection.Options{Attempts: 1, BatchEvents: 64}, f.view)
		}
		checker := projection.NewEngine(store, store, projection.Options{})
		calm := newFragile()
		calm.ill.Store(false)
		require.NoError(t, checker.Add(calm.view))
		v, err := checker.Verify(t.Context(), "balances")
		if err != nil && !errors.Is(err, eventstore.ErrInvalid) {
			require.ErrorContains(t, err, "meanwhile")
			continue
		}
		require.NoError(t, err)
		require.True(t, v.Agrees(), v.String())
	}
	stop()
	writers.Wait()
	require.NoError(t, running.stop())
}

// The owner verifies for a tool while it goes on folding.
func TestAdmin_Verify(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		put(t, store, account("ann"), deposited{5})
		r := start(t, store, store, projection.Options{}, view)
		r.caughtUp(t, store, "balances")
		admin := projection.NewAdmin(store, "tester")
		v, err := admin.Verify(t.Context(), "balances")
		require.NoError(t, err)
		require.True(t, v.Agrees())
		require.EqualValues(t, 1, v.Rows)
		require.NoError(t, store.Store.Update(t.Context(), func(tx projection.StateTx) error {
			return tx.Put("view.balances", "ann", []byte(`{}`))
		}))
		v, err = admin.Verify(t.Context(), "balances")
		require.NoError(t, err)
		require.False(t, v.Agrees())
		require.Equal(t, "ann", v.First.Key)
		require.NoError(t, r.stop())
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err = admin.Verify(ctx, "balances")
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

// Rows that do not fit into memory are compared all the same, and it is told how
// far that is.
func TestVerify_MoreThanFits(t *testing.T) {
	verifiesMoreThanFits := func(t *testing.T, store backend) {
		dir := t.TempDir()
		t.Setenv("TMPDIR", dir)
		const accounts = 3000
		owner := projection.Index("owner", func(b balance) string { return b.Owner })
		view := balances().Indexed(owner)
		for n := range accounts {
			put(t, store, account(fmt.Sprintf("%05d", n*7919%accounts)), opened{fmt.Sprint("owner ", n%10)}, deposited{int64(n)})
		}
		r := start(t, store, store, projection.Options{CacheBytes: 4000, BatchEvents: 100}, view)
		defer r.stop()
		r.caughtUp(t, store, "balances")
		var told []projection.VerifyProgress
		verify := func() projection.Verification {
			t.Helper()
			told = nil
			v, err := r.Verify(t.Context(), "balances", projection.WithProgress(func(p projection.VerifyProgress) {
				told = append(told, p)
				left, err := os.ReadDir(dir)
				require.NoError(t, err)
				require.Empty(t, left, "a process that is killed now leaves nothing")
			}))
			require.NoError(t, err)
			return v
		}
		v := verify()
		require.True(t, v.Agrees(), v.String())
		require.Equal(t, []int{accounts, accounts}, []int{v.Rows, v.Entries})
		require.Greater(t, len(told), 2*accounts/100)
		for i, p := range told {
			require.Equal(t, []int{1, 1}, []int{p.Part, p.Parts})
			require.EqualValues(t, 2*accounts, p.Through)
			if i > 0 {
				require.GreaterOrEqual(t, p.Position, told[i-1].Position)
				require.GreaterOrEqual(t, p.Rows, told[i-1].Rows)
			}
		}
		require.EqualValues(t, 2*accounts, told[len(told)-1].Position)
		require.Equal(t, accounts/1024*1024, told[len(told)-1].Rows)

		require.NoError(t, store.Update(t.Context(), func(tx projection.StateTx) error {
			return errors.Join(tx.Put("view.balances", "02000", []byte(`{}`)), tx.Delete("view.balances", "01000"),
				tx.Delete("view.balances", "02999"), tx.Put("view.balances", "zzz", []byte(`{}`)))
		}))
		v = verify()
		require.Equal(t, []int{2, 1, 1}, []int{v.Missing, v.Extra, v.Changed})
		require.Equal(t, "01000", v.First.Key)

		// It ends when it is told to, at whatever time.
		for _, at := range []int{1, 30, len(told) - 1} {
			ctx, cancel := context.WithCancel(t.Context())
			calls := 0
			_, err := r.Verify(ctx, "balances", projection.WithProgress(func(projection.VerifyProgress) {
				if calls++; calls == at {
					cancel()
				}
			}))
			require.ErrorIs(t, err, context.Canceled)
			require.Less(t, calls, at+20)
		}
	}
	for name, open := range backends {
		t.Run(name, func(t *testing.T) { verifiesMoreThanFits(t, open(t)) })
	}
}

// Who has it done elsewhere is told how far it is, and when nobody waits any more
// it ends.
func TestAdmin_VerifyProgress(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		slow, folded := atomic.Bool{}, atomic.Int64{}
		view := projection.View("v", projection.On(func(*balance, deposited) {
			if folded.Add(1); slow.Load() {
				time.Sleep(10 * time.Second)
			}
		}))
		put(t, store, account("ann"), deposited{1}, deposited{2}, deposited{3})
		r := start(t, store, store, projection.Options{BatchEvents: 1}, view)
		defer r.stop()
		r.caughtUp(t, store, "v")
		slow.Store(true)
		admin := projection.NewAdmin(store, "tester")
		var told []projection.VerifyProgress
		v, err := admin.Verify(t.Context(), "v", projection.WithProgress(func(p projection.VerifyProgress) { told = append(told, p) }))
		require.NoError(t, err)
		require.True(t, v.Agrees())
		require.Equal(t, []projection.VerifyProgress{{Part: 1, Parts: 1, Position: 1, Through: 3}, {Part: 1, Parts: 1, Position: 2, Through: 3}}, told)

		begun := folded.Load()
		ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
		defer cancel()
		_, err = admin.Verify(ctx, "v")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		time.Sleep(time.Minute)
		require.EqualValues(t, 2, folded.Load()-begun, "the third event was not folded")
		v, err = admin.Verify(t.Context(), "v")
		require.NoError(t, err)
		require.True(t, v.Agrees())
	})
}
