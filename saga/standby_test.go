package saga_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
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
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// server is a memory store that behaves as one on a server can: it says that
// others use it, it can be away, and the outcome of a write can be unknown.
type server struct {
	*memory.Store
	down atomic.Bool
	// append and update run instead, if they are set.
	append func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error)
	update func(ctx context.Context, fn func(projection.StateTx) error) error
	lookup func() error // comes first
}

func newServer() *server { return &server{Store: memory.New()} }

func (*server) Shared() bool { return true }

var errDown = fmt.Errorf("no route to host: %w", eventstore.ErrUnavailable)

func (s *server) reach() error {
	if s.down.Load() {
		return errDown
	}
	return nil
}

func (s *server) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if err := s.reach(); err != nil {
		return eventstore.Receipt{}, err
	}
	if s.append != nil {
		return s.append(ctx, c)
	}
	return s.Store.Append(ctx, c)
}

// Enqueue hides the memory store's, which would go around Append.
func (s *server) Enqueue(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
	p, resolve := eventstore.NewPending()
	resolve(s.Append(ctx, c))
	return p
}

func (s *server) Lookup(ctx context.Context, stream eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	if err := s.reach(); err != nil {
		return eventstore.Receipt{}, false, err
	}
	if s.lookup != nil {
		if err := s.lookup(); err != nil {
			return eventstore.Receipt{}, false, err
		}
	}
	return s.Store.Lookup(ctx, stream, key)
}

func (s *server) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	if err := s.reach(); err != nil {
		return func(yield func(eventstore.Recorded, error) bool) { yield(eventstore.Recorded{}, err) }
	}
	return s.Store.Read(ctx, q, o)
}

func (s *server) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		for batch, err := range s.Store.Subscribe(ctx, q, after) {
			if down := s.reach(); down != nil {
				batch, err = eventstore.Batch{}, down
			}
			if !yield(batch, err) || err != nil {
				return
			}
		}
	}
}

func (s *server) Head(ctx context.Context) (eventstore.Position, error) {
	if err := s.reach(); err != nil {
		return 0, err
	}
	return s.Store.Head(ctx)
}

func (s *server) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := s.reach(); err != nil {
		return err
	}
	if s.update != nil {
		return s.update(ctx, fn)
	}
	return s.Store.Update(ctx, fn)
}

func (s *server) View(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := s.reach(); err != nil {
		return err
	}
	return s.Store.View(ctx, fn)
}

func (s *server) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	if err := s.reach(); err != nil {
		return projection.Lease{}, err
	}
	return s.Store.Acquire(ctx, name, owner, ttl)
}

func (s *server) Release(ctx context.Context, l projection.Lease) error {
	if err := s.reach(); err != nil {
		return err
	}
	return s.Store.Release(ctx, l)
}

// take fences whoever has the worker's lease under the owner's name, as when
// its process was paused until the lease was free and another one acquired it.
func take(t testing.TB, s projection.State, worker, owner string) (release func()) {
	t.Helper()
	lease, err := s.Acquire(context.Background(), worker, owner, 0)
	require.NoError(t, err)
	return sync.OnceFunc(func() {
		t.Helper()
		require.NoError(t, s.Release(context.Background(), lease))
	})
}

// tally counts what steps do, by idempotency key.
type tally struct {
	mu    sync.Mutex
	calls map[string]int
}

func (c *tally) add(step saga.Step) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls == nil {
		c.calls = map[string]int{}
	}
	c.calls[step.IdempotencyKey()]++
	return c.calls[step.IdempotencyKey()]
}

func (c *tally) most() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	most := 0
	for _, n := range c.calls {
		most = max(most, n)
	}
	return most
}

func (c *tally) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	total := 0
	for _, n := range c.calls {
		total += n
	}
	return total
}

// naps is a saga of two steps a day apart.
func naps(c *tally) *saga.Definition[string, string] {
	do := func(s *saga.Run, name string) error {
		_, err := saga.Do(s, name, func(step saga.Step) (int, error) { return c.add(step), nil })
		return err
	}
	return saga.Define("naps", func(s *saga.Run, sku string) (string, error) {
		if err := do(s, "lie down"); err != nil {
			return "", err
		}
		if err := s.Sleep("sleep", day); err != nil {
			return "", err
		}
		return sku, do(s, "get up")
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
}

// Of two engines one works, the other one knows how far it is, and takes over;
// nothing is done twice.
func TestStandby_TakesOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, c := newServer(), clock.NewManual(t0)
		defer store.Close()
		count, j := &tally{}, newJournal()
		processes := func() []saga.Process { return []saga.Process{naps(count), saga.React("welcome", j.react)} }
		first := startBench(t, store, c, saga.Options{Owner: "one"}, processes()...)
		second := startBench(t, store, c, saga.Options{Owner: "two"}, processes()...)
		exec(second, orders, Place{"o1", "book"})
		second.settle()
		require.Equal(t, 1, count.total())
		require.Equal(t, []string{"o1/1 book"}, j.handled)
		infos, err := second.engine.List(t.Context(), "naps", saga.ListOptions{})
		require.NoError(t, err)
		require.Len(t, infos, 1)
		require.Equal(t, saga.StatusWaiting, infos[0].Status)
		_, due := second.engine.Workers()[0].NextDue()
		require.False(t, due, "it is the first engine that waits for the time")

		// What is due is work to be done, also for who stands by.
		c.Set(t0.Add(day))
		second.settle()
		require.Equal(t, 2, count.total())

		exec(second, orders, Place{"o2", "pen"})
		first.settle()
		require.NoError(t, errors.Join(first.stop()...))
		exec(second, orders, Place{"o3", "ink"})
		second.advance(2 * day)
		require.Equal(t, 6, count.total())
		require.Equal(t, 1, count.most())
		require.Equal(t, []string{"o1/1 book", "o2/1 pen", "o3/1 ink"}, j.handled)
		require.NoError(t, errors.Join(second.stop()...))
	})
}

// Invariant 7: an engine that was fenced stops what it does, with a cause that
// says so, and another one does it; what was recorded is not done again, and
// the first engine is back when it is needed.
func TestStandby_FencedWorkerHandsOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, c := newServer(), clock.NewManual(t0)
		defer store.Close()
		count := &tally{}
		var cause error
		define := func() saga.Process {
			return saga.Define("slow", func(s *saga.Run, _ int) (string, error) {
				if _, err := saga.Do(s, "one", func(step saga.Step) (int, error) { return count.add(step), nil }); err != nil {
					return "", err
				}
				return saga.Do(s, "two", func(step saga.Step) (string, error) {
					if count.add(step) == 1 {
						<-step.Done()
						cause = context.Cause(step)
						return "", step.Err()
					}
					return "done", nil
				}, saga.Retry(1))
			})
		}
		first := startBench(t, store, c, saga.Options{Owner: "one", Grace: time.Hour}, define())
		second := startBench(t, store, c, saga.Options{Owner: "two"}, define())
		def := define().(*saga.Definition[int, string])
		require.NoError(t, saga.Start(t.Context(), first.engine, def, "r1", 0))
		synctest.Wait()
		require.Equal(t, 2, count.total(), "the first engine is at the second step")

		began := time.Now()
		take(t, store, "saga slow", "one")()
		out, err := saga.Wait(t.Context(), second.engine, def, "r1")
		require.NoError(t, err)
		require.Equal(t, "done", out)
		require.Less(t, time.Since(began), 5*time.Second)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		require.ErrorIs(t, cause, projection.ErrFenced)
		require.Equal(t, 3, count.total(), "what was recorded did not run again")
		require.Equal(t, []string{"saga.started", "saga.step_succeeded", "saga.step_succeeded", "saga.completed"}, second.types(history("slow", "r1")))

		require.NoError(t, errors.Join(second.stop()...))
		require.NoError(t, saga.Start(t.Context(), first.engine, def, "r2", 0))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		require.Equal(t, []string{"saga.started", "saga.step_succeeded"}, second.types(history("slow", "r2")), "the first engine is back")
	})
}

// A step that ignores that its engine was fenced keeps the engine from nothing.
func TestStandby_StepThatDoesNotEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, c := newServer(), clock.NewManual(t0)
		defer store.Close()
		release := make(chan struct{})
		var calls atomic.Int32
		def := saga.Define("stuck", func(s *saga.Run, _ int) (int32, error) {
			return saga.Do(s, "step", func(saga.Step) (int32, error) {
				n := calls.Add(1)
				if n == 1 {
					<-release
				}
				return n, nil
			})
		})
		b := startBench(t, store, c, saga.Options{Owner: "one"}, def)
		require.NoError(t, saga.Start(t.Context(), b.engine, def, "r1", 0))
		synctest.Wait()
		take(t, store, "saga stuck", "one")()
		out, err := saga.Wait(t.Context(), b.engine, def, "r1")
		require.NoError(t, err)
		require.EqualValues(t, 2, out)
		close(release)
		b.settle()
		require.NoError(t, saga.Start(t.Context(), b.engine, def, "r2", 0))
		b.settle()
		require.Equal(t, []string{"saga.started", "saga.step_succeeded", "saga.completed"}, b.types(history("stuck", "r1")))
		require.Equal(t, []string{"saga.started", "saga.step_succeeded", "saga.completed"}, b.types(history("stuck", "r2")))
		require.EqualValues(t, 3, calls.Load())
		require.NoError(t, errors.Join(b.stop()...))
	})
}

// What ends well although its engine was fenced is recorded, and nothing is begun
// after it before the engine is the owner again.
func TestStandby_EndsWhatItDoes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, c := newServer(), clock.NewManual(t0)
		defer store.Close()
		count := &tally{}
		def := saga.Define("pair", func(s *saga.Run, _ int) (int, error) {
			if _, err := saga.Do(s, "one", func(step saga.Step) (int, error) {
				count.add(step)
				<-step.Done()
				return 1, nil
			}); err != nil {
				return 0, err
			}
			return saga.Do(s, "two", func(step saga.Step) (int, error) { return count.add(step), nil })
		})
		b := startBench(t, store, c, saga.Options{Owner: "one"}, def)
		require.NoError(t, saga.Start(t.Context(), b.engine, def, "r1", 0))
		synctest.Wait()
		release := take(t, store, "saga pair", "one")
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, []string{"saga.started", "saga.step_succeeded"}, b.types(history("pair", "r1")))
		require.Equal(t, 1, count.total())
		release()
		out, err := saga.Wait(t.Context(), b.engine, def, "r1")
		require.NoError(t, err)
		require.Equal(t, 1, out)
		require.Equal(t, 2, count.total())
		require.NoError(t, errors.Join(b.stop()...))
	})
}

// That the database fails, or does not tell how an append ended, is no attempt
// of a command.
func TestExecute_DatabaseFailureIsNoAttempt(t *testing.T) {
	t.Parallel()
	for _, failure := range []error{errDown, fmt.Errorf("%w: gone", eventstore.ErrOutcomeUnknown)} {
		synctest.Test(t, func(t *testing.T) {
			store, c := newServer(), clock.NewManual(t0)
			defer store.Close()
			failures := 3
			store.lookup = func() error {
				if failures--; failures >= 0 {
					return failure
				}
				return nil
			}
			def := saga.Define("fill", func(s *saga.Run, sku string) (int, error) {
				return 1, saga.Execute(s, "fill", stocks, Fill{sku, 1}, saga.Retry(1))
			})
			b := startBench(t, store, c, saga.Options{}, def)
			require.NoError(t, saga.Start(t.Context(), b.engine, def, "r1", "ink"))
			b.settle()
			require.Equal(t, []string{"saga.started", "saga.step_succeeded", "saga.completed"}, b.types(history("fill", "r1")))
			require.NoError(t, errors.Join(b.stop()...))
		})
	}
}

// After a pause of its process an engine does nothing before it knows that the
// work is still its own.
func TestStandby_ConfirmsBeforeItActs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, c := newServer(), clock.NewManual(t0)
		defer store.Close()
		count, j := &tally{}, newJournal()
		b := startBench(t, store, c, saga.Options{Owner: "one"}, naps(count), saga.React("welcome", j.react))
		exec(b, orders, Place{"o1", "book"})
		b.settle()
		time.Sleep(time.Minute) // the pause
		releaseSaga, releaseReaction := take(t, store, "saga naps", "one"), take(t, store, "reaction welcome", "one")
		c.Set(t0.Add(day))
		exec(b, orders, Place{"o2", "pen"})
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, 1, count.total(), "a step ran although another owner may be at it")
		require.Len(t, j.handled, 1)
		releaseSaga()
		releaseReaction()
		b.advance(day)
		require.Equal(t, 4, count.total())
		require.Equal(t, 1, count.most())
		require.Len(t, j.handled, 2)
		require.NoError(t, errors.Join(b.stop()...))
	})
}

// A database that is away for a while ends nothing, whether it goes while the
// engine works, waits or starts.
func TestRun_OutlivesAnOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, c := newServer(), clock.NewManual(t0)
		defer store.Close()
		count, j := &tally{}, newJournal()
		fills := saga.React("fills", func(step saga.Step, e Placed) error { return saga.Send(step, stocks, Fill{e.SKU, 1}) })
		goDown := sync.OnceFunc(func() { store.down.Store(true) })
		reserves := saga.Define("reserves", func(s *saga.Run, sku string) (int, error) {
			goDown()
			// One attempt: the database's failures do not count.
			return 0, saga.Execute(s, "fill", stocks, Fill{sku, 1}, saga.Retry(1))
		})
		processes := []saga.Process{naps(count), saga.React("welcome", j.react), fills, reserves}
		b := startBench(t, store, c, saga.Options{Owner: "one"}, processes...)
		exec(b, orders, Place{"o1", "book"})
		b.settle()
		store.down.Store(true)
		standby := startUnready(t, store, c, saga.Options{Owner: "two"}, processes...)
		c.Set(t0.Add(day))
		time.Sleep(5 * time.Minute)
		store.down.Store(false)
		time.Sleep(5 * time.Second)
		b.settle()
		standby.settle()
		require.Equal(t, 2, count.total())
		require.Equal(t, []string{"o1/1 book"}, j.handled)

		require.NoError(t, saga.Start(t.Context(), b.engine, reserves, "r1", "ink"))
		time.Sleep(5 * time.Minute)
		require.True(t, store.down.Load())
		store.down.Store(false)
		time.Sleep(20 * time.Second)
		require.Equal(t, []string{"stock.stocked"}, b.types(eventstore.Stream{Category: "stock", ID: "ink"}))
		require.Equal(t, []string{"stock.stocked"}, b.types(eventstore.Stream{Category: "stock", ID: "book"}))
		require.NoError(t, errors.Join(b.stop()...))
		standby.settle()
		require.Equal(t, 2, count.total())
		require.NoError(t, errors.Join(standby.stop()...))
	})
}

// When the outcome of an append is unknown, written or not, it is found out:
// nothing is recorded twice and nothing is missing.
func TestRun_UnknownOutcomes(t *testing.T) {
	t.Parallel()
	for range 4 {
		seed := rand.Uint64()
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { unknownOutcomes(t, seed) })
		})
	}
}

func unknownOutcomes(t *testing.T, seed uint64) {
	store, c := newServer(), clock.NewManual(t0)
	defer store.Close()
	var mu sync.Mutex
	random := rand.New(rand.NewPCG(seed, 0))
	unknown := 0
	dice := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return random.IntN(n)
	}
	store.append = func(ctx context.Context, commit eventstore.Commit) (eventstore.Receipt, error) {
		lost := fmt.Errorf("%w: the connection was lost", eventstore.ErrOutcomeUnknown)
		switch dice(4) {
		case 0:
			mu.Lock()
			unknown++
			mu.Unlock()
			return eventstore.Receipt{}, lost
		case 1:
			if receipt, err := store.Store.Append(ctx, commit); err != nil {
				return receipt, err
			}
			return eventstore.Receipt{}, lost
		}
		return store.Store.Append(ctx, commit)
	}
	store.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
		switch dice(6) {
		case 0:
			return errDown
		case 1: // committed, and nobody learns of it
			return errors.Join(store.Store.Update(ctx, fn), errors.New("the connection was lost"))
		}
		return store.Store.Update(ctx, fn)
	}
	count, j := &tally{}, newJournal("poison", "flaky3", "flaky6", "flaky9", "flaky12")
	fills := saga.Define("fills", func(s *saga.Run, sku string) (int, error) {
		for range 3 {
			if err := saga.Execute(s, "fill", stocks, Fill{sku, 1}, saga.Retry(1)); err != nil {
				return 0, err
			}
		}
		return 3, s.Sleep("sleep", day)
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
	welcome := saga.React("welcome", j.react, saga.Retry(3))
	var said messages
	b := startBench(t, store, c, saga.Options{Owner: "one", Logger: slog.New(&said)}, naps(count), fills, welcome)
	const n = 20
	flaky := func(i int) bool { return i > 0 && i < 13 && i%3 == 0 }
	for i := range n {
		sku := fmt.Sprint("sku", i)
		switch {
		case i == 7:
			sku = "poison"
		case flaky(i):
			sku = fmt.Sprint("flaky", i)
		}
		exec(b, orders, Place{fmt.Sprint("o", i), sku})
		time.Sleep(700 * time.Millisecond) // the index is stored meanwhile
	}
	b.settle()
	for i := range n {
		j.repair(fmt.Sprint("flaky", i))
	}
	b.advance(2 * day)
	for i := range n {
		id := fmt.Sprint("o", i)
		require.Equal(t, []string{"saga.started", "saga.step_succeeded", "saga.timer_set", "saga.timer_fired", "saga.step_succeeded", "saga.completed"}, b.types(history("naps", id)))
		require.Equal(t, []string{"saga.started", "saga.step_succeeded", "saga.step_succeeded", "saga.step_succeeded", "saga.timer_set", "saga.timer_fired", "saga.completed"}, b.types(history("fills", id)))
		want := []string{"reaction.handled"}
		sku := fmt.Sprint("sku", i)
		switch {
		case i == 7:
			want, sku = []string{"reaction.attempt_failed", "reaction.attempt_failed", "reaction.parked"}, "poison"
		case flaky(i):
			want, sku = []string{"reaction.attempt_failed", "reaction.handled"}, fmt.Sprint("flaky", i)
		}
		require.Equal(t, want, b.types(eventstore.Stream{Category: "reaction.welcome", ID: "order-" + id}))
		require.Equal(t, []string{"stock.stocked", "stock.stocked", "stock.stocked"}, b.types(eventstore.Stream{Category: "stock", ID: sku}))
	}
	require.Len(t, j.handled, n-1, "the record of what was handled is repeated, not the handling")
	require.NotZero(t, unknown)
	// The index has not been led astray.
	store.append, store.update = nil, nil
	infos, err := b.engine.List(t.Context(), "naps", saga.ListOptions{})
	require.NoError(t, err)
	require.Empty(t, infos)
	infos, err = b.engine.List(t.Context(), "fills", saga.ListOptions{})
	require.NoError(t, err)
	require.Empty(t, infos)
	backlogs, err := b.engine.Backlogs(t.Context(), "welcome")
	require.NoError(t, err)
	require.Len(t, backlogs, 1)
	require.True(t, backlogs[0].Parked)
	require.NoError(t, errors.Join(b.stop()...))
	require.NotZero(t, said.count("the index could not be stored; it is tried again"))
	require.Zero(t, said.count("lost the lease to another owner"), "the engine took itself for another one")
}

// The index was stored, the engine does not know, and what was stored ends before
// it is stored again: nothing of it stays behind.
func TestIndex_StoredUnknowingly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, c := newServer(), clock.NewManual(t0)
		defer store.Close()
		var armed atomic.Bool
		stored := make(chan struct{})
		store.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
			err := store.Store.Update(ctx, fn)
			if armed.CompareAndSwap(true, false) {
				close(stored)
				return errors.Join(err, errors.New("the connection was lost"))
			}
			return err
		}
		j := newJournal("flaky")
		b := startBench(t, store, c, saga.Options{Owner: "one"}, saga.React("welcome", j.react))
		armed.Store(true)
		exec(b, orders, Place{"o1", "flaky"})
		<-stored
		j.repair("flaky")
		b.advance(day)
		require.Len(t, j.handled, 1)
		backlogs, err := b.engine.Backlogs(t.Context(), "welcome")
		require.NoError(t, err)
		require.Empty(t, backlogs)
		require.NoError(t, errors.Join(b.stop()...))
	})
}

// messages counts what is logged.
type messages struct {
	mu   sync.Mutex
	said map[string]int
}

func (m *messages) Enabled(context.Context, slog.Level) bool { return true }
func (m *messages) WithAttrs([]slog.Attr) slog.Handler       { return m }
func (m *messages) WithGroup(string) slog.Handler            { return m }

func (m *messages) Handle(_ context.Context, r slog.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.said == nil {
		m.said = map[string]int{}
	}
	m.said[r.Message]++
	return nil
}

func (m *messages) count(message string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.said[message]
}

// Several engines, stopped, started and fenced at random: every run goes to its
// end, and no step is recorded twice or run again once it is recorded.
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
	store, c := newServer(), clock.NewManual(t0)
	defer store.Close()
	count := &tally{}
	def := saga.Define("three", func(s *saga.Run, _ string) (int, error) {
		for range 3 {
			if _, err := saga.Do(s, "step", func(step saga.Step) (int, error) { return count.add(step), nil }); err != nil {
				return 0, err
			}
			if err := s.Sleep("sleep", time.Hour); err != nil {
				return 0, err
			}
		}
		return 3, nil
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
	welcome := saga.React("welcome", func(step saga.Step, _ Placed) error { count.add(step); return nil })
	const nodes = 3
	engines := make([]*bench, nodes)
	launch := func(i int) {
		engines[i] = startBench(t, store, c, saga.Options{Owner: fmt.Sprint("node", i), CachedRuns: random.IntN(10) - 1}, def, welcome)
	}
	for i := range engines {
		launch(i)
	}
	placed, disturbed := 0, 0
	for range 200 {
		i := random.IntN(nodes)
		switch random.IntN(10) {
		case 0:
			disturbed++
			require.NoError(t, errors.Join(engines[i].stop()...))
			launch(i)
		case 1: // the owner is paused, its lease is free and taken
			worker := engines[i].engine.Workers()[random.IntN(2)].Name()
			for j := range nodes {
				if lease, err := store.Acquire(t.Context(), worker, fmt.Sprint("node", j), 0); err == nil {
					disturbed++
					time.Sleep(time.Duration(random.IntN(3000)) * time.Millisecond)
					require.NoError(t, store.Release(t.Context(), lease))
					break
				}
			}
		case 2, 3:
			c.Set(c.Now().Add(time.Duration(random.IntN(90)) * time.Minute))
		case 4:
			time.Sleep(time.Duration(random.IntN(5000)) * time.Millisecond)
		case 5:
			engines[i].settle()
		default:
			exec(engines[i], orders, Place{fmt.Sprint("o", placed), "book"})
			placed++
		}
	}
	for range 4 {
		for _, b := range engines {
			b.settle()
		}
		c.Set(c.Now().Add(time.Hour))
	}
	for i := range placed {
		id := fmt.Sprint("o", i)
		step := []string{"saga.step_succeeded", "saga.timer_set", "saga.timer_fired"}
		want := append(slices.Concat([]string{"saga.started"}, step, step, step), "saga.completed")
		require.Equal(t, want, engines[0].types(history("three", id)))
		require.Equal(t, []string{"reaction.handled"}, engines[0].types(eventstore.Stream{Category: "reaction.welcome", ID: "order-" + id}))
	}
	require.Len(t, count.calls, 4*placed, "a step changed its key")
	t.Logf("%d steps of %d runs ran %d times, with %d stops and fences", 4*placed, placed, count.total(), disturbed)
	for _, b := range engines {
		require.NoError(t, errors.Join(b.stop()...))
	}
}

// So it is when the pause comes in the middle of a run: the next step waits.
func TestStandby_ConfirmsBeforeEachStep(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store, c := newServer(), clock.NewManual(t0)
		defer store.Close()
		count := &tally{}
		var paused atomic.Bool
		on := make(chan struct{})
		store.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
			if paused.Load() {
				<-on
			}
			return store.Store.Update(ctx, fn)
		}
		do := func(s *saga.Run, name string) error {
			_, err := saga.Do(s, name, func(step saga.Step) (int, error) {
				if name == "first" {
					paused.Store(true)
					time.Sleep(time.Minute)
				}
				return count.add(step), nil
			})
			return err
		}
		def := saga.Define("steps", func(s *saga.Run, _ string) (int, error) {
			return 0, errors.Join(do(s, "first"), do(s, "second"))
		})
		b := startBench(t, store, c, saga.Options{Owner: "one"}, def)
		require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", ""))
		time.Sleep(2 * time.Minute)
		require.Equal(t, 1, count.total(), "a step ran although another owner may be at it")
		release := take(t, store, "saga steps", "one")
		close(on)
		synctest.Wait()
		require.Equal(t, 1, count.total())
		release()
		_, err := saga.Wait(t.Context(), b.engine, def, "r")
		require.NoError(t, err)
		require.Equal(t, 2, count.total())
		require.NoError(t, errors.Join(b.stop()...))
	})
}
