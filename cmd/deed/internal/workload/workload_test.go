package workload

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	_ "modernc.org/sqlite" // to look into files

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// busy runs until it is interrupted, which mustRun does as soon as something was
// measured: how fast the machine is decides nothing.
var busy = Timing{Duration: time.Hour, Payload: 128}

// brief ends by itself, and what was done by then does not matter.
var brief = Timing{Duration: 50 * time.Millisecond, Warmup: time.Millisecond, Payload: 128}

// each runs the test on every backend.
func each(t *testing.T, test func(t *testing.T, store eventstore.Store)) {
	t.Run("memory", func(t *testing.T) {
		t.Parallel()
		test(t, memory.New())
	})
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		store, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "bench.db"))
		require.NoError(t, err)
		defer func() { require.NoError(t, store.Close()) }()
		test(t, store)
	})
}

// until runs the workload until the condition holds.
func until(t *testing.T, w Workload, store eventstore.Store, enough func(Progress) bool) *Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // by then it never will; the result says why
	defer cancel()
	r, err := Run(ctx, w, Target{Opener: eventstore.Opened(store), Name: "test", Progress: func(p Progress) {
		if enough(p) {
			cancel()
		}
	}})
	require.NoError(t, err)
	return r
}

func measuring(p Progress) bool { return p.Phase != "storing events" && p.PerSecond > 0 }

func mustRun(t *testing.T, w Workload, store eventstore.Store) *Result {
	t.Helper()
	r := until(t, w, store, measuring)
	require.Zero(t, r.Errors, "%v", r.Problems)
	require.Empty(t, r.Problems)
	require.True(t, r.Interrupted)
	require.Less(t, r.Seconds, time.Hour.Seconds())
	require.Equal(t, w.name(), r.Workload)
	require.Equal(t, "test", r.Store)
	require.Positive(t, r.Operations)
	require.Positive(t, r.Seconds)
	require.InDelta(t, float64(r.Operations)/r.Seconds, r.PerSecond, 0.01)
	require.LessOrEqual(t, r.P50, r.P95)
	require.LessOrEqual(t, r.P95, r.P99)
	require.NotEmpty(t, r.Details["unit"])
	require.NotEmpty(t, r.Details["latency_of"])
	return r
}

// stored counts the events that a query finds.
func stored(t *testing.T, store eventstore.Store, q eventstore.Query) (n int64) {
	t.Helper()
	for _, err := range store.Read(t.Context(), q, eventstore.ReadOptions{}) {
		require.NoError(t, err)
		n++
	}
	return n
}

func TestAppend(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		const writers, batch = 4, 3
		w := &Append{Writing: Writing{Timing: busy, Writers: writers, Batch: batch, Streams: 8, TagSpace: 1000}, Tags: 1}
		r := mustRun(t, w, store)
		written := stored(t, store, eventstore.OneCategory("bench_append"))
		require.EqualValues(t, written, r.Details["events_written"])
		// All that was written counts, but for what was under way at the end.
		require.InDelta(t, written/batch, r.Operations, writers)
		require.Zero(t, r.Conflicts, "writers that share no stream do not conflict")
		require.Equal(t, 8, r.Details["verified_streams"])
		require.InDelta(t, r.PerSecond*batch, r.Details["events_per_second"], 0.01)

		streams := map[eventstore.Stream]bool{}
		for e, err := range store.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{}) {
			require.NoError(t, err)
			streams[e.Stream] = true
			require.Len(t, e.Data, busy.Payload)
			require.True(t, json.Valid(e.Data))
			require.Len(t, e.Tags, 1)
			require.Equal(t, notedType, e.Type)
			require.Equal(t, metadata, e.Metadata)
		}
		require.LessOrEqual(t, len(streams), 8)

		// Again, on the same database: what is there does not matter.
		r = mustRun(t, w, store)
		require.EqualValues(t, stored(t, store, eventstore.OneCategory("bench_append"))-written, r.Details["events_written"])
	})
}

func TestAppend_SharedStreamsConflict(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		w := &Append{Writing: Writing{Timing: busy, Writers: 4, Batch: 1, Streams: 1, TagSpace: 1000}}
		r := mustRun(t, w, store)
		require.Positive(t, r.Conflicts, "of writers that all expect the stream to be new one wins")
		require.EqualValues(t, stored(t, store, eventstore.All()), r.Details["events_written"])
	})
}

func TestAppendDCB(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		before := int64(0)
		for _, after := range []string{"head", "start"} {
			w := &AppendDCB{Writing: Writing{Timing: busy, Writers: 4, Batch: 2, TagSpace: 100_000}, Tags: 2, After: after}
			w.Preload = 300
			r := mustRun(t, w, store)
			written := stored(t, store, eventstore.OneCategory("bench_append"))
			require.EqualValues(t, written-before, r.Details["events_written"])
			before = written
		}
		for e, err := range store.Read(t.Context(), eventstore.OfTypes(notedType), eventstore.ReadOptions{}) {
			require.NoError(t, err)
			require.Len(t, e.Tags, 2, "also those that were stored beforehand")
			require.True(t, strings.HasPrefix(e.Tags[0], "course:") && strings.HasPrefix(e.Tags[1], "student:"), "%v", e.Tags)
		}
	})
}

// With few tags, the guard over the whole log lets each pair through once; with
// the head, only what came since is in the way.
func TestAppendDCB_ConditionsHold(t *testing.T) {
	t.Parallel()
	for after, once := range map[string]bool{"start": true, "head": false} {
		store := memory.New()
		w := &AppendDCB{Writing: Writing{Timing: busy, Writers: 4, Batch: 1, TagSpace: 10}, Tags: 2, After: after}
		r := mustRun(t, w, store)
		pairs := map[string]int{}
		for e, err := range store.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{}) {
			require.NoError(t, err)
			pairs[strings.Join(e.Tags, " ")]++
		}
		require.LessOrEqual(t, len(pairs), 10)
		require.Equal(t, once, stored(t, store, eventstore.All()) == int64(len(pairs)), "after %s: %v", after, pairs)
		if once {
			require.Positive(t, r.Conflicts)
		}
		require.NoError(t, store.Close())
	}
}

func TestLoad(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		w := &Load{Timing: busy, Writers: 2, Streams: 30, Events: 25}
		r := mustRun(t, w, store)
		require.Equal(t, 30, r.Details["streams"])
		events := stored(t, store, eventstore.OfTypes(notedType))
		require.EqualValues(t, 30*25, events)
		mustRun(t, w, store)
		require.Equal(t, events, stored(t, store, eventstore.OfTypes(notedType)), "what is stored is used again")
		// Events of a stream come a few at a time, the streams in turn.
		var order []string
		for e, err := range store.Read(t.Context(), eventstore.OfTypes(notedType), eventstore.ReadOptions{Limit: 40}) {
			require.NoError(t, err)
			order = append(order, e.Stream.ID)
		}
		require.Equal(t, order[0], order[9])
		require.NotEqual(t, order[9], order[10])
		require.NotEqual(t, order[0], order[10])
	})
}

func TestReplay(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		w := &Replay{Timing: busy, Writers: 1, Events: 2500}
		r := mustRun(t, w, store)
		head, err := store.Head(t.Context())
		require.NoError(t, err)
		require.GreaterOrEqual(t, int(head), 2500)
		require.Less(t, int(head), 2700, "no more than was asked for, in whole streams")
		require.Equal(t, head, r.Details["log"])
		require.InDelta(t, r.Details["events_read"].(int64), r.Operations, stride)
		mustRun(t, w, store)
		again, err := store.Head(t.Context())
		require.NoError(t, err)
		require.Equal(t, head, again, "reading writes nothing")
	})
}

// A pass over the whole log yields each event once.
func TestReplay_CountsEveryEvent(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		b := &bench{store: store, timing: brief}
		require.NoError(t, b.fillUpTo(t.Context(), 2345, Tagging{}))
		window := newWindow(Timing{Duration: time.Hour})
		l := &lane{window: window}
		require.NoError(t, replay(t.Context(), store, l))
		require.Equal(t, stored(t, store, eventstore.All()), l.operations.Load())
		require.EqualValues(t, l.total/stride, l.latencies.total)
	})
}

func TestExecute(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		for _, aggregates := range []int{1, 10} {
			before := stored(t, store, eventstore.OneCategory("bench_execute"))
			w := &Execute{Timing: busy, Writers: 4, Aggregates: aggregates}
			r := mustRun(t, w, store)
			written := stored(t, store, eventstore.OneCategory("bench_execute")) - before
			require.EqualValues(t, written, r.Details["events_written"])
			require.InDelta(t, written, r.Operations, 4)
			require.Equal(t, aggregates, r.Details["verified_streams"])
		}
		for e, err := range store.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{Limit: 1}) {
			require.NoError(t, err)
			require.Len(t, e.Data, busy.Payload)
		}
	})
}

func TestSaga(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		w := &Saga{Timing: busy, Writers: 4}
		r := mustRun(t, w, store)
		category := "saga." + r.Details["saga"].(string)
		completed := stored(t, store, eventstore.Match(eventstore.Item{Category: category, Types: []string{"saga.completed"}}))
		require.EqualValues(t, completed, r.Details["sagas_completed"])
		require.InDelta(t, completed, r.Operations, 4)
		steps := stored(t, store, eventstore.Match(eventstore.Item{Category: category, Types: []string{"saga.step_succeeded"}}))
		require.EqualValues(t, 3*completed, steps, "three steps are recorded of each")
	})
}

func TestReact(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		r := mustRun(t, &React{Timing: busy, Writers: 4}, store)
		category := "reaction." + r.Details["reaction"].(string)
		require.Positive(t, r.Operations)
		require.EqualValues(t, stored(t, store, eventstore.OneCategory(category)), r.Details["handled"])
	})
}

func TestProject(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		kinds := []string{"view"}
		if _, ok := store.(*sqlite.Store); ok {
			kinds = append(kinds, "sql")
		}
		for _, kind := range kinds {
			mustRun(t, &Project{Timing: busy, Kind: kind, Events: 1000}, store)

			// One whole pass.
			head, err := store.Head(t.Context())
			require.NoError(t, err)
			w := &Project{Timing: busy, Kind: kind}
			b := &bench{store: store, id: newID(), timing: busy}
			p, err := w.catchUp(t.Context(), b, "bench_"+b.id, head, time.Now().Add(time.Hour), func(time.Time, int64, time.Duration) {})
			require.NoError(t, err)
			require.NoError(t, p.problem)
			require.True(t, p.complete)
			require.Positive(t, p.took)
			events := stored(t, store, eventstore.OfTypes(notedType))
			require.GreaterOrEqual(t, events, int64(1000))
			require.Equal(t, events, p.events, "its rows were made from every event")

			// And one of several projections.
			w.Projections = 3
			b = &bench{store: store, id: newID(), timing: busy}
			p, err = w.catchUp(t.Context(), b, "bench_"+b.id, head, time.Now().Add(time.Hour), func(time.Time, int64, time.Duration) {})
			require.NoError(t, err)
			require.NoError(t, p.problem)
			require.True(t, p.complete)
			require.Equal(t, 3*events, p.events, "each has rows made from every event")
		}
		state, ok := eventstore.Find[projection.State](store)
		require.True(t, ok)
		left, err := projection.Inspect(t.Context(), state)
		require.NoError(t, err)
		for _, one := range left {
			require.True(t, one.Checkpoint.IsZero(), "projection %q was not removed", one.Name)
			require.False(t, one.Held)
		}
	})
}

// What a projection wrote is gone afterwards, its table too.
func TestProject_LeavesNothing(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "bench.db")
	for _, kind := range []string{"view", "sql"} {
		w := &Project{Timing: brief, Kind: kind, Events: 500, Projections: 2}
		_, err := Run(t.Context(), w, Target{Opener: sqlite.File(path)})
		require.NoError(t, err)
	}
	db, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	for _, query := range []string{
		"SELECT count(*) FROM sqlite_schema WHERE name LIKE 'bench%'",
		"SELECT count(*) FROM deed_rows", "SELECT count(*) FROM deed_checkpoints",
	} {
		var n int
		require.NoError(t, db.QueryRowContext(t.Context(), query).Scan(&n))
		require.Zero(t, n, query)
	}
}

func TestProject_NeedsSQL(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	_, err := Run(t.Context(), &Project{Timing: brief, Kind: "sql", Events: 100}, Target{Opener: eventstore.Opened(store)})
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

func TestLive(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		w := &Live{Timing: busy, Writers: 2, Rate: 500}
		r := mustRun(t, w, store)
		written := stored(t, store, eventstore.OneCategory("bench_live"))
		require.EqualValues(t, written, r.Details["events_written"])
		require.EqualValues(t, written, r.Details["events_seen"])
		require.LessOrEqual(t, r.Operations, written)
		require.LessOrEqual(t, r.P50, r.Details["after_call_p50_ms"].(float64))
		require.LessOrEqual(t, float64(written), w.Rate*r.Seconds+2*float64(w.Writers), "no faster than was asked for")
	})
}

func TestLive_OtherProcessNeedsASharedStore(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	for _, w := range []*Live{{OtherProcess: true}, {Listen: true}} {
		w.Timing, w.Writers, w.Rate = brief, 1, 100
		_, err := Run(t.Context(), w, Target{Opener: eventstore.Opened(store), Name: "memory:"})
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorContains(t, err, `the store "memory:" can be open only once`)
	}
	head, err := store.Head(t.Context())
	require.NoError(t, err)
	require.Zero(t, head, "nothing was written before the refusal")
}

// A second handle of a store that can have several: here the same one.
func TestLive_Listen(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	w := &Live{Timing: brief, Writers: 1, Rate: 500, Listen: true}
	r, err := Run(t.Context(), w, Target{Opener: eventstore.Opened(store), Shared: true})
	require.NoError(t, err)
	require.Zero(t, r.Errors, "%v", r.Problems)
	require.Equal(t, r.Details["events_written"], r.Details["events_seen"])
}

// deaf is a store whose subscriptions fail after they have caught up.
type deaf struct{ eventstore.Store }

func (d deaf) Subscribe(_ context.Context, _ eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		if yield(eventstore.Batch{Through: after, CaughtUp: true}, nil) {
			yield(eventstore.Batch{}, errors.New("the line is dead"))
		}
	}
}

func TestLive_WhatIsNotSeenIsAnError(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	r := until(t, &Live{Timing: busy, Writers: 1, Rate: 500}, deaf{store}, measuring)
	require.Zero(t, r.Operations)
	require.EqualValues(t, 2, r.Errors)
	require.Contains(t, r.Problems[0], "the line is dead")
	require.Contains(t, r.Problems[1], "acknowledged and not seen")
}

// The other process, played by this one.
func TestListen(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	stream := eventstore.Stream{Category: "bench_live", ID: "x"}
	toChild, in := io.Pipe()
	out, fromChild := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		defer fromChild.Close()
		ended <- Listen(t.Context(), func(_ context.Context, address string) (eventstore.Opener, error) {
			if address != "where" {
				return nil, fmt.Errorf("address %q", address)
			}
			return eventstore.Opened(store), nil
		}, toChild, fromChild)
	}()
	text, err := json.Marshal(assignment{Store: "where", Stream: stream.String()})
	require.NoError(t, err)
	_, err = in.Write(append(text, '\n'))
	require.NoError(t, err)

	ready, sightings := make(chan struct{}), make(chan sighting, 10)
	read := make(chan error, 1)
	go func() {
		read <- readSightings(out, func() { close(ready) }, func(one sighting) { sightings <- one })
	}()
	<-ready
	before := stamp()
	for range 3 {
		_, err := store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: stream, Type: notedType}}})
		require.NoError(t, err)
	}
	for position := range eventstore.Position(3) {
		one := <-sightings
		require.Equal(t, position+1, one.position)
		require.GreaterOrEqual(t, one.at, before)
		require.LessOrEqual(t, one.at, stamp())
	}
	require.NoError(t, in.Close(), "which ends it")
	require.NoError(t, <-ended)
	require.NoError(t, <-read)
}

func TestListen_Nonsense(t *testing.T) {
	t.Parallel()
	nowhere := func(context.Context, string) (eventstore.Opener, error) { return nil, errors.New("nowhere") }
	for input, says := range map[string]string{
		"":                                       "read what to subscribe to",
		"x\n":                                    "read what to subscribe to",
		`{"store":"x","stream":"nodash"}` + "\n": "nodash",
		`{"store":"x","stream":"a-b"}` + "\n":    "nowhere",
	} {
		require.ErrorContains(t, Listen(t.Context(), nowhere, strings.NewReader(input), io.Discard), says)
	}
	err := readSightings(strings.NewReader("ready\n5 x\n"), func() {}, func(sighting) {})
	require.ErrorContains(t, err, `the other process says "5 x"`)
}

// moody is a store that does something else for some of the appends.
type moody struct {
	eventstore.Store
	n    atomic.Int64
	mood func(n int64, write func() (eventstore.Receipt, error)) (eventstore.Receipt, error)
}

func (m *moody) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	return m.mood(m.n.Add(1), func() (eventstore.Receipt, error) { return m.Store.Append(ctx, c) })
}

func appends() *Append {
	return &Append{Writing: Writing{Timing: busy, Writers: 2, Batch: 1, TagSpace: 10}}
}

// afterSome is when there were some appends.
func (m *moody) afterSome(Progress) bool { return m.n.Load() > 20 }

// Conflicts and errors are no operations.
func TestRun_CountsApart(t *testing.T) {
	t.Parallel()
	inner := memory.New()
	defer func() { require.NoError(t, inner.Close()) }()
	store := &moody{Store: inner, mood: func(n int64, write func() (eventstore.Receipt, error)) (eventstore.Receipt, error) {
		switch n {
		case 3, 7, 8:
			return eventstore.Receipt{}, &eventstore.ConflictError{Kind: eventstore.ConditionNoneMatch}
		case 5, 6:
			return eventstore.Receipt{}, fmt.Errorf("%w: number %d", eventstore.ErrUnavailable, n)
		}
		return write()
	}}
	r := until(t, appends(), store, store.afterSome)
	require.EqualValues(t, 3, r.Conflicts)
	require.EqualValues(t, 2, r.Errors)
	require.Len(t, r.Problems, 2)
	require.EqualValues(t, stored(t, inner, eventstore.All()), r.Details["events_written"])
	require.InDelta(t, store.n.Load()-5, r.Operations, 2)
}

// An append that was written although nobody could say so is taken into account.
func TestRun_OutcomeUnknown(t *testing.T) {
	t.Parallel()
	inner := memory.New()
	defer func() { require.NoError(t, inner.Close()) }()
	store := &moody{Store: inner, mood: func(n int64, write func() (eventstore.Receipt, error)) (eventstore.Receipt, error) {
		receipt, err := write()
		if n == 4 && err == nil {
			return eventstore.Receipt{}, eventstore.ErrOutcomeUnknown
		}
		return receipt, err
	}}
	r := until(t, appends(), store, store.afterSome)
	require.EqualValues(t, 1, r.Errors, "%v", r.Problems)
	require.Zero(t, r.Conflicts, "the writer looked where the stream was")
	require.EqualValues(t, stored(t, inner, eventstore.All())-1, r.Details["events_written"])
}

// A store that loses what it has acknowledged is found out.
func TestRun_VerifiesWhatWasAcknowledged(t *testing.T) {
	t.Parallel()
	inner := memory.New()
	defer func() { require.NoError(t, inner.Close()) }()
	store := &moody{Store: inner, mood: func(_ int64, _ func() (eventstore.Receipt, error)) (eventstore.Receipt, error) {
		return eventstore.Receipt{First: 1, Last: 1}, nil
	}}
	r := until(t, appends(), store, store.afterSome)
	require.EqualValues(t, 2, r.Errors, "of each stream")
	require.Contains(t, r.Problems[0], "has 0 events, but ")
}

// What cannot get better ends the run at once.
func TestRun_HopelessErrorsEndIt(t *testing.T) {
	t.Parallel()
	inner := memory.New()
	defer func() { require.NoError(t, inner.Close()) }()
	store := &moody{Store: inner, mood: func(int64, func() (eventstore.Receipt, error)) (eventstore.Receipt, error) {
		return eventstore.Receipt{}, fmt.Errorf("conditions on tags: %w", errors.ErrUnsupported)
	}}
	r, err := Run(t.Context(), appends(), Target{Opener: eventstore.Opened(store)})
	require.NoError(t, err)
	require.Positive(t, r.Errors)
	require.False(t, r.Interrupted)
	require.Zero(t, r.Operations)
}

// A run ends when its time is up.
func TestRun_Ends(t *testing.T) {
	t.Parallel()
	for _, w := range []Workload{
		&Append{Writing: Writing{Timing: brief, Writers: 2, Batch: 1, TagSpace: 10}},
		&Live{Timing: brief, Writers: 1, Rate: 0.001},
		&Project{Timing: brief, Kind: "view", Events: 1000},
	} {
		store := memory.New()
		r, err := Run(t.Context(), w, Target{Opener: eventstore.Opened(store)})
		require.NoError(t, err)
		require.False(t, r.Interrupted)
		require.Zero(t, r.Errors, "%v", r.Problems)
		if w.name() != "project" { // it ends with a pass
			require.Equal(t, brief.Duration.Seconds(), r.Seconds, "what is measured has the length that was asked for")
		}
		require.NoError(t, store.Close())
	}
}

// What ends in the warm-up or after the end does not count.
func TestWindow(t *testing.T) {
	t.Parallel()
	w := newWindow(Timing{Warmup: time.Second, Duration: 2 * time.Second})
	at := func(d time.Duration) time.Time { return w.start.Add(d) }
	for d, counts := range map[time.Duration]bool{
		0: false, time.Second - 1: false, time.Second: true, 3 * time.Second: true, 3*time.Second + 1: false,
	} {
		require.Equal(t, counts, w.counts(at(d)), "%s", d)
	}
	require.True(t, w.open(at(3*time.Second-1)))
	require.False(t, w.open(at(3*time.Second)))
	require.Equal(t, 2.0, w.seconds())

	w.end()
	w.end()
	<-w.over
	require.False(t, w.open(time.Now()))
	require.Zero(t, w.seconds(), "it ended in the warm-up")

	l := &lane{window: newWindow(Timing{Warmup: time.Hour, Duration: time.Hour})}
	l.done(l.start, l.start.Add(time.Minute), 1)
	l.done(l.start.Add(59*time.Minute), l.start.Add(61*time.Minute), 5)
	require.EqualValues(t, 5, l.operations.Load())
	require.EqualValues(t, 6, l.total)
	require.EqualValues(t, 1, l.latencies.total)
	require.InDelta(t, float64(2*time.Minute), float64(l.latencies.quantile(0.5)), float64(2*time.Second))
}

// Interrupted while events are stored beforehand, nothing was measured.
func TestRun_InterruptedWhileStoring(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w := appends()
	w.Preload = 10_000_000
	_, err := Run(ctx, w, Target{Opener: eventstore.Opened(store), Progress: func(p Progress) {
		require.Equal(t, "storing events", p.Phase)
		cancel()
	}})
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorContains(t, err, "interrupted after ")
	require.EqualValues(t, stored(t, store, eventstore.OneCategory("bench_preload")), stored(t, store, eventstore.All()))
}

func TestPreload(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, store eventstore.Store) {
		want := 12_050
		if _, ok := store.(*memory.Store); ok {
			want = 100_050 // more than one block
		}
		w := appends()
		w.Preload, w.Duration = want, time.Millisecond
		mustRunAnyway(t, w, store)
		head, err := store.Head(t.Context())
		require.NoError(t, err)
		require.GreaterOrEqual(t, int(head), want)
		b := &bench{store: store, timing: brief}
		streams, err := b.storedStreams(t.Context(), streamLength, 1)
		require.NoError(t, err)
		require.Len(t, streams, want/streamLength+1)
		for _, stream := range spread(streams, 7) {
			version, err := versionOf(t.Context(), store, stream)
			require.NoError(t, err)
			require.EqualValues(t, streamLength, version)
		}
	})
}

func mustRunAnyway(t *testing.T, w Workload, store eventstore.Store) {
	t.Helper()
	r, err := Run(t.Context(), w, Target{Opener: eventstore.Opened(store)})
	require.NoError(t, err)
	require.Zero(t, r.Errors, "%v", r.Problems)
}

func TestValidate(t *testing.T) {
	t.Parallel()
	good := Timing{Duration: time.Second, Payload: 256}
	writing := Writing{Timing: good, Writers: 1, Batch: 1, TagSpace: 100}
	with := func(change func(*Append)) *Append {
		w := &Append{Writing: writing}
		change(w)
		return w
	}
	require.NoError(t, with(func(*Append) {}).Validate())
	for says, w := range map[string]Workload{
		"--duration 0s":           with(func(w *Append) { w.Duration = 0 }),
		"--warmup -1s":            with(func(w *Append) { w.Warmup = -time.Second }),
		"--preload -1":            with(func(w *Append) { w.Preload = -1 }),
		"--in-turn -1":            with(func(w *Append) { w.InTurn = -1 }),
		"--payload 5: use 102 to": with(func(w *Append) { w.Payload = 5 }),
		"--payload 2000000":       with(func(w *Append) { w.Payload = 2_000_000 }),
		"--writers 0":             with(func(w *Append) { w.Writers = 0 }),
		"--batch 1001":            with(func(w *Append) { w.Batch = 1001 }),
		"--streams -1":            with(func(w *Append) { w.Streams = -1 }),
		"--tags 33":               with(func(w *Append) { w.Tags = 33 }),
		"--tag-space 3":           with(func(w *Append) { w.TagSpace = 3 }),
		"--tags 0":                &AppendDCB{Writing: writing, After: "head"},
		`--after "now"`:           &AppendDCB{Writing: writing, Tags: 2, After: "now"},
		"--events 0":              &Load{Timing: good, Writers: 1},
		"--aggregates 0":          &Execute{Timing: good, Writers: 1},
		`--kind "x"`:              &Project{Timing: good, Events: 1, Kind: "x"},
		"--projections -1":        &Project{Timing: good, Events: 1, Kind: "view", Projections: -1},
		"--rate 0":                &Live{Timing: good, Writers: 1},
		"choose one":              &Live{Timing: good, Writers: 1, Rate: 1, Listen: true, OtherProcess: true},
	} {
		require.ErrorContains(t, w.Validate(), says)
		_, err := Run(t.Context(), w, Target{Opener: memory.New()})
		require.ErrorIs(t, err, eventstore.ErrInvalid, says)
	}
}

func TestNewData(t *testing.T) {
	t.Parallel()
	smallest := len(newData(0))
	for _, size := range []int{smallest, smallest + 1, 256, 4096} {
		require.Len(t, newData(size), size)
	}
}
