package saga_test

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

// journal notes what a reaction handled, and fails for chosen events.
type journal struct {
	mu      sync.Mutex
	handled []string
	broken  map[string]bool
	tried   map[string]int
}

func (j *journal) react(step saga.Step, e Placed) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	what := fmt.Sprintf("%s/%d %s", step.Event().Stream.ID, step.Event().Version, e.SKU)
	j.tried[what]++
	if j.broken[e.SKU] {
		return errors.New("cannot handle " + e.SKU)
	}
	j.handled = append(j.handled, what)
	return nil
}

func (j *journal) repair(sku string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.broken, sku)
}

func newJournal(broken ...string) *journal {
	j := &journal{broken: map[string]bool{}, tried: map[string]int{}}
	for _, sku := range broken {
		j.broken[sku] = true
	}
	return j
}

// TestReaction_PoisonIsSetAside: a failing event is tried again while the later
// ones of its stream wait, then they are dead letters together; other streams
// go on; replaying is one call and keeps the order.
func TestReaction_PoisonIsSetAside(t *testing.T) {
	t.Parallel()
	j := newJournal("poison")
	s := sagatest.For(t, saga.React("welcome", j.react, saga.Retry(3))).
		When("order", "o1", Placed{"a"}, Placed{"poison"}, Placed{"b"}).
		When("order", "o2", Placed{"c"})
	require.ElementsMatch(t, []string{"o1/1 a", "o2/1 c"}, j.handled)
	letters, err := s.Engine().DeadLetters(t.Context(), "welcome")
	require.NoError(t, err)
	require.Empty(t, letters, "one attempt of three was made")
	waiting, err := s.Engine().Backlogs(t.Context(), "welcome")
	require.NoError(t, err)
	require.Len(t, waiting, 1)
	require.Equal(t, 1, waiting[0].Attempts)
	require.Equal(t, "cannot handle poison", waiting[0].Error)
	require.Equal(t, 2, waiting[0].Count)
	require.False(t, waiting[0].Retry.IsZero())

	s.Restart().When("order", "o1", Placed{"d"}).Advance(time.Hour).Restart().When("order", "o1", Placed{"e"})
	require.Equal(t, 3, j.tried["o1/2 poison"])
	letters, err = s.Engine().DeadLetters(t.Context(), "welcome")
	require.NoError(t, err)
	require.Len(t, letters, 1)
	require.Equal(t, eventstore.Stream{Category: "order", ID: "o1"}, letters[0].Stream)
	require.Equal(t, 4, letters[0].Count)
	require.Equal(t, 3, letters[0].Attempts)
	require.Equal(t, "cannot handle poison", letters[0].Error)
	require.ElementsMatch(t, []string{"o1/1 a", "o2/1 c"}, j.handled)

	j.repair("poison")
	s.Restart().Advance(time.Hour)
	require.Len(t, j.handled, 2, "dead letters wait for the order to be replayed")
	s.ReplayDeadLetters()
	require.ElementsMatch(t, []string{"o1/1 a", "o2/1 c", "o1/2 poison", "o1/3 b", "o1/4 d", "o1/5 e"}, j.handled)
	require.Equal(t, []string{"o1/2 poison", "o1/3 b", "o1/4 d", "o1/5 e"}, j.handled[2:])
	letters, err = s.Engine().DeadLetters(t.Context(), "welcome")
	require.NoError(t, err)
	require.Empty(t, letters)
	s.Restart().When("order", "o1", Placed{"f"})
	require.Equal(t, "o1/6 f", j.handled[len(j.handled)-1])
	require.Len(t, j.handled, 7, "nothing that was handled is handled again")
}

// A reaction whose code ends its goroutine has failed, and is tried again.
func TestReaction_GoexitIsAFailure(t *testing.T) {
	t.Parallel()
	tries := 0
	s := sagatest.For(t, saga.React("welcome", func(_ saga.Step, _ Placed) error {
		if tries++; tries == 1 {
			runtime.Goexit()
		}
		return nil
	})).When("order", "o1", Placed{"a"})
	require.Equal(t, 1, tries)
	waiting, err := s.Engine().Backlogs(t.Context(), "welcome")
	require.NoError(t, err)
	require.Len(t, waiting, 1)
	require.Contains(t, waiting[0].Error, "ended its goroutine")
	s.Advance(time.Hour)
	require.Equal(t, 2, tries)
}

func TestReaction_TerminalGoesAsideAtOnce(t *testing.T) {
	t.Parallel()
	calls := 0
	s := sagatest.For(t, saga.React("welcome", func(saga.Step, Placed) error {
		calls++
		return saga.Terminal(errDeclined)
	})).When("order", "o1", Placed{"a"}, Placed{"b"}).Advance(day)
	require.Equal(t, 1, calls)
	letters, err := s.Engine().DeadLetters(t.Context(), "welcome")
	require.NoError(t, err)
	require.Equal(t, 2, letters[0].Count)
}

// TestReaction_LongBacklog: more events than are held in memory wait behind one
// that fails, and come in order.
func TestReaction_LongBacklog(t *testing.T) {
	t.Parallel()
	j := newJournal("poison")
	s := sagatest.For(t, saga.React("welcome", j.react)).When("order", "o1", Placed{"poison"})
	var want []string
	for i := range 200 {
		s.Given("order", "o1", Placed{fmt.Sprint(i)})
		want = append(want, fmt.Sprintf("o1/%d %d", i+2, i))
	}
	require.Empty(t, j.handled)
	j.repair("poison")
	s.Advance(time.Hour)
	require.Equal(t, append([]string{"o1/1 poison"}, want...), j.handled)
}

// TestReaction_Random compares many streams, failures and restarts with the
// rule: each event handled once, in order within its stream.
func TestReaction_ManyStreams(t *testing.T) {
	t.Parallel()
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			failures := map[string]int{}
			seen := map[string][]uint64{}
			reaction := saga.React("count", func(step saga.Step, _ Placed) error {
				mu.Lock()
				defer mu.Unlock()
				e := step.Event()
				key := step.IdempotencyKey()
				if (e.Position+eventstore.Position(e.Version))%7 == 0 && failures[key] < 2 {
					failures[key]++
					return errors.New("not yet")
				}
				seen[e.Stream.ID] = append(seen[e.Stream.ID], e.Version)
				return nil
			})
			bench := startBench(t, b.open(t), clock.NewManual(t0), saga.Options{Concurrency: 8}, reaction)
			for i := range 300 {
				exec(bench, orders, Place{fmt.Sprintf("o%d", i%20), "x"})
				if i%100 == 50 {
					bench = bench.restart(reaction)
				}
			}
			bench.advance(day)
			require.Len(t, seen, 20)
			for id, versions := range seen {
				var want []uint64
				for v := range uint64(15) {
					want = append(want, v+1)
				}
				require.Equal(t, want, versions, id)
			}
		})
	}
}

func TestBeginning(t *testing.T) {
	t.Parallel()
	prepare := func(t *testing.T) *memory.Store {
		store := memory.New()
		b := startBench(t, store, clock.NewManual(t0), saga.Options{})
		exec(b, orders, Place{"old", "a"})
		b.stop()
		return store
	}
	engine := func(store *memory.Store, p saga.Process) *saga.Engine {
		e := saga.NewEngine(store, store, nil, saga.Options{Clock: clock.NewManual(t0)})
		require.NoError(t, e.Add(p))
		return e
	}
	t.Run("undecided is refused", func(t *testing.T) {
		t.Parallel()
		store := prepare(t)
		for _, p := range []saga.Process{parcels, saga.React("welcome", newJournal().react)} {
			err := engine(store, p).Workers()[0].Run(t.Context())
			require.ErrorIs(t, err, saga.ErrUndecided)
			require.ErrorContains(t, err, `the first is "order.placed" at position 1`)
			require.ErrorContains(t, err, "say .FromStart() on its definition to handle them, or .FromNow() to leave them alone")
		}
	})
	t.Run("from start", func(t *testing.T) {
		t.Parallel()
		j := newJournal()
		b := startBench(t, prepare(t), clock.NewManual(t0), saga.Options{}, parcels.FromStart(), saga.React("welcome", j.react).FromStart())
		b.settle()
		require.Equal(t, []string{"old/1 a"}, j.handled)
		require.Equal(t, []string{"saga.started", "saga.await_set"}, b.types(history("parcels", "old")))
	})
	t.Run("from now", func(t *testing.T) {
		t.Parallel()
		j := newJournal()
		define := func() []saga.Process {
			return []saga.Process{parcels.FromNow(), saga.React("welcome", j.react).FromNow()}
		}
		b := startBench(t, prepare(t), clock.NewManual(t0), saga.Options{}, define()...)
		exec(b, orders, Place{"new", "b"})
		b.settle()
		require.Equal(t, []string{"new/1 b"}, j.handled)
		require.Empty(t, b.types(history("parcels", "old")))
		// The decision outlives the index, and the word in the code.
		b.stop()
		forget(t, b.store)
		b = startBench(t, b.store, b.clock, saga.Options{}, parcels, saga.React("welcome", j.react))
		exec(b, orders, Place{"newer", "c"})
		b.settle()
		require.Equal(t, []string{"new/1 b", "newer/1 c"}, j.handled)
		require.Empty(t, b.types(history("parcels", "old")))
	})
	t.Run("nothing to decide", func(t *testing.T) {
		t.Parallel()
		store := memory.New()
		b := startBench(t, store, clock.NewManual(t0), saga.Options{}, parcels)
		exec(b, orders, Place{"o1", "a"})
		b.stop() // perhaps before the run was started
		b = startBench(t, store, b.clock, saga.Options{}, parcels)
		b.settle()
		require.Len(t, b.types(history("parcels", "o1")), 2)
	})
}
