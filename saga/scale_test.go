package saga_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/postgres"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// The tables of the index of the saga "scaled", but for that of ended runs.
var scaledIndex = []string{"saga.scaled.due", "saga.scaled.watch", "saga.scaled.restless", "saga.scaled.open"}

func clearTables(t testing.TB, store projection.State, tables ...string) {
	t.Helper()
	require.NoError(t, store.Update(context.Background(), func(tx projection.StateTx) error {
		for _, table := range tables {
			if err := tx.Clear(table); err != nil {
				return err
			}
		}
		return nil
	}))
}

func tableSize(t testing.TB, store projection.State, table string) int {
	t.Helper()
	n := 0
	require.NoError(t, store.View(context.Background(), func(tx projection.StateTx) error {
		n = 0
		for _, err := range tx.Scan(table, projection.Range{}) {
			if err != nil {
				return err
			}
			n++
		}
		return nil
	}))
	return n
}

// scaled waits in every way, as its input says.
func scaled() *saga.Definition[string, string] {
	return saga.Define("scaled", func(s *saga.Run, how string) (string, error) {
		out := ""
		for i, c := range how {
			switch c {
			case 's':
				if err := s.Sleep("nap", time.Duration(i+1)*7*time.Hour); err != nil {
					return out, err
				}
			case 'm':
				if err := s.Sleep("blink", 20*time.Second); err != nil {
					return out, err
				}
			case 'a':
				e, err := saga.Await[Shipped](s, saga.Where(s.ID()), 50*time.Hour)
				if err != nil && !errors.Is(err, saga.ErrTimeout) {
					return out, err
				}
				out += e.Parcel
			case 't':
				_, err := saga.Await[Shipped](s, saga.WhereTag("parcel:p"+strconv.Itoa(i)), 90*time.Hour)
				if err != nil && !errors.Is(err, saga.ErrTimeout) {
					return out, err
				}
				out += fmt.Sprint(err == nil)
			case 'g':
				by, err := approval.Wait(s, 30*time.Hour)
				if err != nil && !errors.Is(err, saga.ErrTimeout) {
					return out, err
				}
				out += by
			case 'r':
				_, err := saga.Do(s, "call", func(step saga.Step) (int, error) {
					if step.Attempt() < 3 {
						return 0, errors.New("down")
					}
					return 0, nil
				}, saga.Backoff(2*time.Hour, 8*time.Hour))
				if err != nil {
					return out, err
				}
			case 'b':
				err := saga.All(s, "both", func(s *saga.Run) error {
					return s.Sleep("nap", 11*time.Hour)
				}, func(s *saga.Run) error {
					_, err := saga.Await[Shipped](s, saga.Where(s.ID()), 40*time.Hour)
					if errors.Is(err, saga.ErrTimeout) {
						return nil
					}
					return err
				}, func(s *saga.Run) error {
					_, err := approval.Wait(s, 60*time.Hour)
					if errors.Is(err, saga.ErrTimeout) {
						return nil
					}
					return err
				})
				if err != nil {
					return out, err
				}
			case 'f':
				return out, errDeclined
			case 'p':
				panic("boom")
			}
			out += string(c)
		}
		return out, nil
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
}

// TestScale_LittleMemory: whatever happens to the runs, it comes out the same
// with three rows in memory, restarts, lost tables, and every read of the index
// made twice, as when all are there.
func TestScale_LittleMemory(t *testing.T) {
	t.Parallel()
	for round := range 6 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			t.Parallel()
			t.Logf("seed %d", seed)
			littleMemory(t, seed)
		})
	}
}

// rereading is a state whose reads are all made twice, as after a connection
// was lost at the end of the first one.
type rereading struct {
	backend
	lose atomic.Int32 // of so many reads to come the caller hears that they have failed
}

var errLostConnection = errors.New("the connection was lost")

func (r *rereading) View(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := r.backend.View(ctx, fn); err != nil {
		return err
	}
	if r.lose.Add(-1) >= 0 {
		return errLostConnection
	}
	return r.backend.View(ctx, fn)
}

// TestAwait_IndexReadAgain: an event comes for a run that is not in memory, and
// the connection is lost while its row is looked up: it is looked up again.
func TestAwait_IndexReadAgain(t *testing.T) {
	t.Parallel()
	store := &rereading{backend: memory.New()}
	def := saga.Define("parcels", func(s *saga.Run, _ string) (string, error) {
		e, err := saga.Await[Shipped](s, saga.Where(s.ID()), 0)
		return e.Parcel, err
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
	bench := startBench(t, store, clock.NewManual(t0), saga.Options{CachedRuns: -1}, def)
	exec(bench, orders, Place{"o1", "sku"})
	bench.settle()
	_, err := bench.engine.List(t.Context(), "parcels", saga.ListOptions{}) // which stores the index
	require.NoError(t, err)
	require.Zero(t, bench.engine.InMemory("parcels"))

	store.lose.Store(2)
	exec(bench, orders, Ship{"o1", "p1"})
	bench.settle()
	require.Negative(t, store.lose.Load())
	infos, err := bench.engine.List(t.Context(), "parcels", saga.ListOptions{Status: []saga.Status{saga.StatusCompleted}})
	require.NoError(t, err)
	require.Len(t, infos, 1)
	for _, err := range bench.stop() {
		require.NoError(t, err)
	}
}

func littleMemory(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // a test
	little := saga.Options{CachedRuns: -1}.Ahead(3)
	def := scaled()
	benches := []*bench{
		startBench(t, &rereading{backend: memory.New()}, clock.NewManual(t0), little, def),
		startBench(t, memory.New(), clock.NewManual(t0), saga.Options{}, def),
	}
	both := func(do func(b *bench)) {
		for _, b := range benches {
			do(b)
		}
	}
	store := func() { // and so lets go of what is in memory
		_, err := benches[0].engine.List(t.Context(), "scaled", saga.ListOptions{Limit: 1})
		require.NoError(t, err)
	}
	everything := saga.ListOptions{Status: []saga.Status{
		saga.StatusRunning, saga.StatusWaiting, saga.StatusBlocked, saga.StatusCompleted, saga.StatusFailed, saga.StatusCancelled, saga.StatusTerminated,
	}}
	compare := func() {
		list := func(b *bench) []saga.Info {
			infos, err := b.engine.List(t.Context(), "scaled", everything)
			require.NoError(t, err)
			return infos
		}
		want := list(benches[1])
		require.Equal(t, want, list(benches[0]))
		for _, info := range want {
			require.Equal(t, benches[1].types(history("scaled", info.ID)), benches[0].types(history("scaled", info.ID)), info.ID)
		}
	}
	const kinds = "smatgrbfp"
	var ids []string
	any := func() string { return ids[r.IntN(len(ids))] }
	for op := range 120 {
		switch n := r.IntN(100); {
		case n < 30 || len(ids) == 0:
			how := ""
			for range 1 + r.IntN(4) {
				how += string(kinds[r.IntN(len(kinds))])
			}
			id := fmt.Sprintf("r%03d", len(ids))
			ids = append(ids, id)
			both(func(b *bench) { exec(b, orders, Place{id, how}) })
		case n < 45:
			id, parcel := any(), "p"+strconv.Itoa(r.IntN(4))
			both(func(b *bench) { exec(b, orders, Ship{id, parcel}) })
		case n < 55:
			id := any()
			both(func(b *bench) {
				err := approval.Send(t.Context(), b.engine, def, id, "ann", saga.SignalID(strconv.Itoa(op)))
				if !errors.Is(err, saga.ErrFinished) {
					require.NoError(t, err)
				}
			})
		case n < 60:
			id := any()
			both(func(b *bench) {
				if err := b.engine.Cancel(t.Context(), "scaled", id, "no more"); !errors.Is(err, saga.ErrFinished) {
					require.NoError(t, err)
				}
			})
		case n < 64:
			id := any()
			both(func(b *bench) {
				line, err := b.engine.Timeline(t.Context(), "scaled", id)
				require.NoError(t, err)
				if line.Status.Ended() && len(line.Steps) > 0 {
					require.NoError(t, b.engine.Restart(t.Context(), "scaled", id, line.Steps[0].Key, "again"))
				}
			})
		case n < 66: // it is there already
			id := any()
			both(func(b *bench) {
				if err := saga.Start(t.Context(), b.engine, def, id, "m"); !errors.Is(err, saga.ErrStarted) {
					require.NoError(t, err)
				}
			})
		case n < 90:
			d := time.Duration(r.IntN(int(20 * time.Hour)))
			both(func(b *bench) { b.advance(d) })
		default:
			for _, err := range benches[0].stop() {
				require.NoError(t, err)
			}
			switch r.IntN(4) {
			case 0:
				clearTables(t, benches[0].store, scaledIndex[r.IntN(3)])
			case 1:
				lease, err := benches[0].store.Acquire(t.Context(), "saga scaled", "operator", 0)
				require.NoError(t, err)
				require.NoError(t, benches[0].store.Update(t.Context(), func(tx projection.StateTx) error { return tx.DeleteCheckpoint(lease) }))
				require.NoError(t, benches[0].store.Release(t.Context(), lease))
			}
			benches[0] = startBench(t, benches[0].store, benches[0].clock, little, def)
			both(func(b *bench) { b.settle() })
			if r.IntN(2) == 0 { // the oracle looks at blocked runs again, too
				benches[1] = benches[1].restart(def)
				benches[1].settle()
			}
		}
		both(func(b *bench) { b.settle() })
		store()
		if op%10 == 0 {
			compare()
		}
	}
	both(func(b *bench) { b.advance(60 * day) })
	compare()
	require.LessOrEqual(t, benches[0].engine.InMemory("scaled"), 10)
	infos, err := benches[0].engine.List(t.Context(), "scaled", saga.ListOptions{})
	require.NoError(t, err)
	for _, info := range infos {
		require.Equal(t, saga.StatusBlocked, info.Status, "%+v", info)
	}
	require.Equal(t, 1, tableSize(t, benches[0].store, "saga.scaled.due"), "nothing but the mark")
	for _, err := range slices.Concat(benches[0].stop(), benches[1].stop()) {
		require.NoError(t, err)
	}
}

// TestScale_TablesLost: an operator deletes the table of due times, or one of
// the others; the next start makes them again, and nothing is forgotten.
func TestScale_TablesLost(t *testing.T) {
	t.Parallel()
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			little := saga.Options{CachedRuns: -1}.Ahead(3)
			def := scaled()
			bench := startBench(t, b.open(t), clock.NewManual(t0), little, def)
			const n = 60
			for i := range n {
				exec(bench, orders, Place{strconv.Itoa(i), []string{"s", "a", "rs", "gp"}[i%4]})
			}
			for round, lost := range [][]string{scaledIndex[:1], scaledIndex[1:2], scaledIndex[2:3], scaledIndex[:3]} {
				bench.settle()
				for _, err := range bench.stop() {
					require.NoError(t, err)
				}
				before := map[string]int{}
				for _, table := range scaledIndex {
					before[table] = tableSize(t, bench.store, table)
				}
				require.Positive(t, before[scaledIndex[0]], "round %d", round)
				clearTables(t, bench.store, lost...)
				bench = startBench(t, bench.store, bench.clock, little, def)
				bench.settle()
				require.LessOrEqual(t, bench.engine.InMemory("scaled"), 3)
				_, err := bench.engine.List(t.Context(), "scaled", saga.ListOptions{Limit: 1})
				require.NoError(t, err)
				for _, table := range scaledIndex {
					require.Equal(t, before[table], tableSize(t, bench.store, table), "round %d: %s", round, table)
				}
			}
			exec(bench, orders, Ship{"1", "p9"})
			bench.advance(10 * day)
			for i := range n {
				info, err := saga.Look(t.Context(), bench.engine, def, strconv.Itoa(i))
				require.NoError(t, err)
				want := saga.StatusCompleted
				if i%4 == 3 {
					want = saga.StatusBlocked
				}
				require.Equal(t, want, info.Status, i)
			}
			out, err := saga.Wait(t.Context(), bench.engine, def, "1")
			require.NoError(t, err)
			require.Equal(t, "p9a", out)
		})
	}
}

// parkTimers appends the histories of runs that sleep until they are due.
func parkTimers(t testing.TB, store eventstore.Store, n int, due func(i int) time.Time) {
	t.Helper()
	const perCommit = 500
	for from := 0; from < n; from += perCommit {
		events := make([]eventstore.Event, 0, 2*perCommit)
		for i := from; i < min(from+perCommit, n); i++ {
			stream := history("alarm", fmt.Sprintf("r%07d", i))
			events = append(events,
				eventstore.Event{Stream: stream, Type: "saga.started", Data: []byte(`{"format":1,"in":0}`), Time: t0},
				eventstore.Event{
					Stream: stream, Type: "saga.timer_set", Time: t0,
					Data: []byte(`{"step":{"kind":"sleep","name":"wait"},"due":"` + due(i).Format(time.RFC3339Nano) + `"}`),
				})
		}
		_, err := store.Append(context.Background(), eventstore.Commit{Events: events})
		require.NoError(t, err)
	}
}

func alarm() *saga.Definition[int, int] {
	return saga.Define("alarm", func(s *saga.Run, _ int) (int, error) { return 0, s.Sleep("wait", day) }).FromStart()
}

// heapInUse is what is live, in MB.
func heapInUse() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}

// awaitEnded waits until so many runs have ended.
func awaitEnded(t testing.TB, store eventstore.Store, n int) {
	t.Helper()
	ended := 0
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	for batch, err := range store.Subscribe(ctx, eventstore.OfTypes("saga.completed"), 0) {
		require.NoError(t, err)
		if ended += len(batch.Events); ended >= n {
			return
		}
	}
}

// fired checks the log: so many runs have ended, each timer has fired once, and
// none before it was due.
func fired(t testing.TB, store eventstore.Store, n int, due func(i int) time.Time) {
	t.Helper()
	times := make([]uint8, n)
	ended := 0
	for r, err := range store.Read(context.Background(), eventstore.OneCategory("saga.alarm"), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		switch r.Type {
		case "saga.timer_fired":
			i, err := strconv.Atoi(r.Stream.ID[1:])
			require.NoError(t, err)
			times[i]++
			if at := due(i); r.Time.Before(at) {
				require.Failf(t, "early", "run %d, due %s, fired %s", i, at, r.Time)
			}
		case "saga.completed":
			ended++
		}
	}
	require.Equal(t, n, ended)
	for i, times := range times {
		require.EqualValues(t, 1, times, i)
	}
}

// TestScale_Timers: many runs sleep, and take no memory. When their time comes
// they go on, each once and none early, also when the engine is stopped in the
// middle of that, and the table of due times deleted.
func TestScale_Timers(t *testing.T) {
	if os.Getenv("DEED_TEST_LONG") != "" {
		t.Skip("TestScale_Million is the same with more")
	}
	n := 100_000
	if testing.Short() {
		n = 5000
	}
	// Not parallel: it measures the heap.
	timersAtScale(t, backends[1].open(t), n, 2000)
}

// TestScale_Million is the same with a million, all of which fire.
func TestScale_Million(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("DEED_TEST_LONG"))
	if err != nil {
		t.Skip("so many sagas take their time: set DEED_TEST_LONG=1 for 100,000, or to a number, say 1000000")
	}
	if n == 1 {
		n = 100_000
	}
	t.Run("sqlite", func(t *testing.T) { timersAtScale(t, backends[1].open(t), n, n) })
	t.Run("postgres", func(t *testing.T) {
		store, err := postgres.Open(context.Background(), pgtest.Database(t))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, store.Close()) })
		timersAtScale(t, store, n, n)
	})
}

// timersAtScale has n runs sleep. The first ones, as many as most says, fire: a
// third within a second, the others at one instant, and while those are fired the
// engine is stopped twice.
func timersAtScale(t *testing.T, store backend, n, most int) {
	soon, later := t0.Add(day), t0.Add(30*day)
	due := func(i int) time.Time {
		switch {
		case i >= most:
			return t0.Add(365 * day).Add(time.Duration(i) * time.Second)
		case i%3 == 0:
			return soon.Add(time.Duration(i%1000) * time.Millisecond)
		}
		return later
	}
	began := time.Now()
	parkTimers(t, store, n, due)
	t.Logf("%d histories appended in %s", n, time.Since(began).Round(time.Millisecond))

	began = time.Now()
	def := alarm()
	manual := clock.NewManual(t0)
	bench := startBench(t, store, manual, saga.Options{}, def)
	flush := func() {
		_, err := bench.engine.List(t.Context(), "alarm", saga.ListOptions{Limit: 1})
		require.NoError(t, err)
	}
	bench.settle()
	flush()
	t.Logf("%d runs indexed in %s", n, time.Since(began).Round(time.Millisecond))
	require.Zero(t, bench.engine.InMemory("alarm"))
	with := heapInUse()
	for _, err := range bench.stop() {
		require.NoError(t, err)
	}
	bench = nil
	without := heapInUse()
	t.Logf("%d timers pending: heap %.1f MB, %.1f MB without the engine", n, with, without)
	require.Less(t, with-without, 8.0, "MB of heap for runs that wait")
	began = time.Now()
	bench = startBench(t, store, manual, saga.Options{}, def)
	bench.settle()
	t.Logf("taken over in %s", time.Since(began).Round(time.Millisecond))

	first := (most + 2) / 3
	at, some := bench.engine.Workers()[0].NextDue()
	require.True(t, some)
	require.Equal(t, soon, at)
	fire := func(what string, to time.Time, from, until int) {
		t.Helper()
		began, cpu := time.Now(), cpuTime()
		bench.clock.Set(to)
		awaitEnded(t, store, until)
		took, used := time.Since(began), cpuTime()-cpu
		t.Logf("%s: %d fired in %s, %.0f/s, %.0f us of processor time each; heap %.1f MB, %d rows in memory", what, until-from, took.Round(time.Millisecond),
			float64(until-from)/took.Seconds(), float64(used.Microseconds())/float64(until-from), heapInUse(), bench.engine.InMemory("alarm"))
	}
	fire("due within a second", soon.Add(time.Second), 0, first)
	bench.settle()

	fire("due at once", later, first, (first+most)/2)
	for _, err := range bench.stop() {
		require.NoError(t, err)
	}
	clearTables(t, store, "saga.alarm.due")
	began = time.Now()
	bench = startBench(t, store, bench.clock, saga.Options{}, def)
	t.Logf("the table of due times made again in %s", time.Since(began).Round(time.Millisecond))
	awaitEnded(t, store, first+(most-first)*3/4)
	bench = bench.restart(def)
	bench.settle()
	t.Logf("the rest after two restarts in %s", time.Since(began).Round(time.Millisecond))
	flush()
	require.Zero(t, bench.engine.InMemory("alarm"))
	with = heapInUse()
	for _, err := range bench.stop() {
		require.NoError(t, err)
	}
	require.Less(t, with-heapInUse(), 8.0, "MB of heap for runs that have ended, or wait")
	fired(t, store, most, due)
}
