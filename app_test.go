package deed_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/query"
	"github.com/deed-go/deed/saga"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type Lent struct {
	Book string
	Days int
}
type Reminded struct{ Book string }

func (Lent) EventType() string     { return "loan.lent" }
func (Reminded) EventType() string { return "loan.reminded" }

type Loan struct {
	Lent      bool
	Reminders int
}

var loans = aggregate.Define("loan",
	aggregate.On(func(l *Loan, _ Lent) { l.Lent = true }),
	aggregate.On(func(l *Loan, _ Reminded) { l.Reminders++ }),
)

type Lend struct {
	Book string
	Days int
}

func (c Lend) AggregateID() string { return c.Book }
func (c Lend) Decide(l Loan) ([]aggregate.Event, error) {
	if l.Lent {
		return nil, command.Rejectf("book %q is lent", c.Book)
	}
	return aggregate.Events(Lent(c)), nil
}

type Remind struct{ Book string }

func (c Remind) AggregateID() string                    { return c.Book }
func (c Remind) Decide(Loan) ([]aggregate.Event, error) { return aggregate.Events(Reminded(c)), nil }

var shelf = projection.Of("shelf", loans)

func due() *saga.Definition[Lent, struct{}] {
	return saga.Define("due", func(s *saga.Run, in Lent) (struct{}, error) {
		if err := s.Sleep("term", time.Duration(in.Days)*24*time.Hour); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, saga.Execute(s, "remind", loans, Remind{in.Book})
	}, saga.On(func(e Lent, _ eventstore.Recorded) (string, Lent) { return e.Book, e }))
}

var newYear = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func start(t *testing.T, source eventstore.Opener, parts ...deed.Part) *deed.App {
	t.Helper()
	app, err := deed.Start(t.Context(), source, parts...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, app.Stop(context.Background())) })
	return app
}

func TestApp_CommandToQuery(t *testing.T) {
	t.Parallel()
	for name, source := range map[string]eventstore.Opener{
		"memory": memory.New(),
		"sqlite": sqlite.File(filepath.Join(t.TempDir(), "app.db")),
	} {
		t.Run(name, func(t *testing.T) {
			app := start(t, source, loans, shelf)
			for i := range 20 {
				receipt, err := deed.Execute(t.Context(), app, loans, Lend{fmt.Sprint("book", i), 7})
				require.NoError(t, err)
				row, err := query.Get(t.Context(), app, shelf, fmt.Sprint("book", i), query.AtLeast(receipt))
				require.NoError(t, err, "a query that waits for the receipt sees the write")
				require.True(t, row.Lent)
			}
			_, err := deed.Execute(t.Context(), app, loans, Lend{"book3", 7})
			require.True(t, command.IsRejection(err), "%v", err)
			state, revision, err := deed.Load(t.Context(), app, loans, "book3")
			require.NoError(t, err)
			require.True(t, state.Lent)
			require.EqualValues(t, 1, revision.Version)
		})
	}
}

// Everything due fires in order, with the clock at its instant, also what
// falls due only because of something that fired on the way.
func TestApp_AdvanceTo(t *testing.T) {
	t.Parallel()
	app := start(t, memory.New(), loans, shelf, due(), deed.ManualClock(newYear))
	for i, days := range []int{30, 10, 20, 90} {
		_, err := deed.Execute(t.Context(), app, loans, Lend{fmt.Sprint("book", i), days})
		require.NoError(t, err)
	}
	require.NoError(t, app.AdvanceTo(t.Context(), newYear.AddDate(0, 0, 60)))
	require.Equal(t, newYear.AddDate(0, 0, 60), app.Now())

	var times []string
	for r, err := range app.Store().Read(t.Context(), eventstore.OfTypes("loan.reminded"), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		times = append(times, r.Stream.ID+" "+r.Time.Format(time.DateOnly))
	}
	require.Equal(t, []string{"book1 2026-01-11", "book2 2026-01-21", "book0 2026-01-31"}, times)
	row, err := query.Get(t.Context(), app, shelf, "book0")
	require.NoError(t, err, "projections have caught up when AdvanceTo returns")
	require.Equal(t, 1, row.Reminders)

	require.ErrorIs(t, app.AdvanceTo(t.Context(), newYear), eventstore.ErrInvalid)
	require.NoError(t, app.AdvanceTo(t.Context(), app.Now()), "where the clock is, it may stay")
}

func TestApp_AdvanceToNeedsManualClock(t *testing.T) {
	t.Parallel()
	app := start(t, memory.New(), loans)
	require.ErrorIs(t, app.AdvanceTo(t.Context(), time.Now().Add(time.Hour)), errors.ErrUnsupported)
}

// The engine that runs in production runs in a bubble with the bubble's time,
// also on a file.
func TestApp_Synctest(t *testing.T) {
	for _, name := range []string{"memory", "sqlite"} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "app.db")
			synctest.Test(t, func(t *testing.T) {
				var source eventstore.Opener = memory.New()
				if name == "sqlite" {
					source = sqlite.File(path)
				}
				app, err := deed.Start(t.Context(), source, loans, shelf, due())
				require.NoError(t, err)
				_, err = deed.Execute(t.Context(), app, loans, Lend{"moby dick", 60})
				require.NoError(t, err)
				time.Sleep(60*24*time.Hour - time.Second)
				synctest.Wait()
				row, err := query.Get(t.Context(), app, shelf, "moby dick")
				require.NoError(t, err)
				require.Zero(t, row.Reminders)
				time.Sleep(2 * time.Second)
				synctest.Wait()
				row, err = query.Get(t.Context(), app, shelf, "moby dick")
				require.NoError(t, err)
				require.Equal(t, 1, row.Reminders)
				require.NoError(t, app.Stop(t.Context()))
			})
		})
	}
}

// What one process leaves behind, timers included, the next one carries on.
func TestApp_Resumes(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "app.db")
	parts := func(at time.Time) []deed.Part { return []deed.Part{loans, shelf, due(), deed.ManualClock(at)} }
	app, err := deed.Start(t.Context(), sqlite.File(path), parts(newYear)...)
	require.NoError(t, err)
	_, err = deed.Execute(t.Context(), app, loans, Lend{"moby dick", 60})
	require.NoError(t, err)
	require.NoError(t, app.Stop(t.Context()))

	app = start(t, sqlite.File(path), parts(newYear.AddDate(0, 0, 1))...)
	require.NoError(t, app.AdvanceTo(t.Context(), newYear.AddDate(0, 0, 60)))
	row, err := query.Get(t.Context(), app, shelf, "moby dick")
	require.NoError(t, err)
	require.Equal(t, 1, row.Reminders)
}

// Terms count from the event that started the saga, also when it was handled
// much later.
func TestApp_LateSagaKeepsTime(t *testing.T) {
	t.Parallel()
	store := memory.New()
	app, err := deed.Start(t.Context(), eventstore.Opened(store), loans, deed.ManualClock(newYear))
	require.NoError(t, err)
	_, err = deed.Execute(t.Context(), app, loans, Lend{"moby dick", 60})
	require.NoError(t, err)
	require.NoError(t, app.Stop(t.Context()))

	app = start(t, eventstore.Opened(store), loans, shelf, due().FromStart(), deed.ManualClock(newYear.AddDate(0, 0, 50)))
	require.NoError(t, app.AdvanceTo(t.Context(), newYear.AddDate(0, 0, 60)))
	row, err := query.Get(t.Context(), app, shelf, "moby dick")
	require.NoError(t, err)
	require.Equal(t, 1, row.Reminders)
}

func TestStart_Mistakes(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "app.db")
	nameless := aggregate.Define[Loan]("")
	_, err := deed.Start(t.Context(), sqlite.File(path), loans, loans, nameless, nil, shelf, shelf, deed.CachedAggregates(-1), deed.ManualClock(time.Time{}), strange{})
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	for _, part := range []string{`two aggregates are named "loan"`, "category is empty", "part 4 of the application is nil", `two projections are named "shelf"`, "-1 cached aggregates", "zero time", "strange"} {
		require.ErrorContains(t, err, part)
	}
	require.NoFileExists(t, path, "nothing is opened when the parts have mistakes")

	_, err = deed.Start(t.Context(), nil, loans)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
}

type strange struct{}

func (strange) Err() error { return nil }

func TestExecute_NotRegistered(t *testing.T) {
	t.Parallel()
	app := start(t, memory.New())
	_, err := deed.Execute(t.Context(), app, loans, Lend{"moby dick", 1})
	require.ErrorIs(t, err, deed.ErrNotRegistered)
	require.ErrorContains(t, err, `"loan"`)
}

// logOnly is a store without a state of its own.
type logOnly struct{ eventstore.Store }

func (s logOnly) Open(context.Context) (eventstore.Store, error) { return s, nil }

func TestStart_State(t *testing.T) {
	t.Parallel()
	log := memory.New()
	_, err := deed.Start(t.Context(), logOnly{log}, loans, shelf)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "deed.State")
}

// A saga that is new on a log with events for it must be told what to do with
// them, and Start is where that is said.
func TestStart_UndecidedSaga(t *testing.T) {
	t.Parallel()
	store := memory.New()
	app, err := deed.Start(t.Context(), eventstore.Opened(store), loans)
	require.NoError(t, err)
	_, err = deed.Execute(t.Context(), app, loans, Lend{"moby dick", 1})
	require.NoError(t, err)
	require.NoError(t, app.Stop(t.Context()))

	_, err = deed.Start(t.Context(), eventstore.Opened(store), loans, due())
	require.ErrorIs(t, err, saga.ErrUndecided)
	start(t, eventstore.Opened(store), loans, due().FromNow())
}

func TestApp_StopTwiceAndExecuteAfter(t *testing.T) {
	t.Parallel()
	store := memory.New()
	app, err := deed.Start(t.Context(), eventstore.Opened(store), loans, shelf)
	require.NoError(t, err)
	require.NoError(t, app.Stop(t.Context()))
	require.NoError(t, app.Stop(t.Context()))
	_, err = deed.Execute(t.Context(), app, loans, Lend{"moby dick", 1})
	require.ErrorIs(t, err, deed.ErrStopped)
	require.ErrorIs(t, app.Settle(t.Context()), deed.ErrStopped)
	_, err = store.Head(t.Context())
	require.NoError(t, err, "a store given as Opened stays open")
}

// Stop lets a step that is at work finish, and its record is in the log.
func TestApp_StopDrains(t *testing.T) {
	t.Parallel()
	store := memory.New()
	entered, leave := make(chan struct{}), make(chan struct{})
	slow := saga.Define("slow", func(s *saga.Run, _ Lent) (string, error) {
		return saga.Do(s, "work", func(saga.Step) (string, error) {
			close(entered)
			<-leave
			return "done", nil
		})
	}, saga.On(func(e Lent, _ eventstore.Recorded) (string, Lent) { return e.Book, e }))
	app, err := deed.Start(t.Context(), eventstore.Opened(store), loans, slow)
	require.NoError(t, err)
	_, err = deed.Execute(t.Context(), app, loans, Lend{"moby dick", 1})
	require.NoError(t, err)
	<-entered
	var group sync.WaitGroup
	stopped := make(chan error, 1)
	group.Go(func() { stopped <- app.Stop(context.Background()) })
	close(leave)
	group.Wait()
	require.NoError(t, <-stopped)
	var types []string
	for r, err := range store.Read(t.Context(), eventstore.OneCategory("saga.slow"), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		types = append(types, r.Type)
	}
	require.Contains(t, types, "saga.step_succeeded")
}

// A Stop that runs out of time names what it abandons, also when a handler
// keeps the store from closing.
func TestApp_StopNamesWhatIsUnfinished(t *testing.T) {
	t.Parallel()
	entered, leave := make(chan struct{}), make(chan struct{})
	stuck := projection.SQL("stuck", projection.OnSQL(func(context.Context, projection.Tx, Lent, eventstore.Recorded) error {
		close(entered)
		<-leave
		return nil
	}))
	app, err := deed.Start(t.Context(), sqlite.File(filepath.Join(t.TempDir(), "app.db")), loans, stuck)
	require.NoError(t, err)
	_, err = deed.Execute(t.Context(), app, loans, Lend{"moby dick", 1})
	require.NoError(t, err)
	<-entered
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err = app.Stop(ctx)
	stop, ok := errors.AsType[*deed.StopError](err)
	require.True(t, ok, "%v", err)
	require.Equal(t, []string{"closing the store", "projection stuck"}, stop.Unfinished)
	require.ErrorIs(t, err, context.Canceled)
	close(leave)
}

func TestApp_Run(t *testing.T) {
	t.Parallel()
	app, err := deed.New(t.Context(), memory.New(), loans, shelf)
	require.NoError(t, err)
	require.ErrorIs(t, app.Settle(t.Context()), deed.ErrStopped, "New runs nothing")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- app.Run(ctx, time.Second) }()
	receipt, err := deed.Execute(t.Context(), app, loans, Lend{"moby dick", 1})
	require.NoError(t, err)
	_, err = query.Get(t.Context(), app, shelf, "moby dick", query.AtLeast(receipt))
	require.NoError(t, err)
	cancel()
	require.NoError(t, <-ended)
}

// Two nodes on one store: either of them answers what the other one has just
// written, and when one stops, the other carries on what it did.
func TestApp_TwoNodes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		nodes := []*deed.App{
			start(t, eventstore.Opened(store), loans, shelf, due()),
			start(t, eventstore.Opened(store), loans, shelf, due()),
		}
		lend := func(book string) {
			for i, node := range nodes {
				receipt, err := deed.Execute(t.Context(), node, loans, Lend{fmt.Sprint(book, i), 60})
				require.NoError(t, err)
				for _, reader := range nodes {
					row, err := query.Get(t.Context(), reader, shelf, fmt.Sprint(book, i), query.AtLeast(receipt))
					require.NoError(t, err)
					require.True(t, row.Lent)
				}
			}
		}
		lend("one")
		for _, node := range nodes {
			require.NoError(t, node.Settle(t.Context()))
		}
		require.NoError(t, nodes[0].Stop(t.Context()))
		nodes = nodes[1:]
		lend("two")
		require.NoError(t, nodes[0].Settle(t.Context()))
		time.Sleep(61 * 24 * time.Hour)
		require.NoError(t, nodes[0].Settle(t.Context()))
		for _, book := range []string{"one0", "one1", "two0"} {
			row, err := query.Get(t.Context(), nodes[0], shelf, book)
			require.NoError(t, err)
			require.Equal(t, 1, row.Reminders, book)
		}
		again := start(t, eventstore.Opened(store), loans, shelf, due())
		require.NoError(t, again.Settle(t.Context()))
		status, err := again.Projections().Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, projection.PhaseStandby, status[0].Phase)
	})
}

// Invariant 8: building another version of a view, and building one again, starts
// no saga and calls no reaction; what happens afterwards does.
func TestInvariant8_BuildingAVersionTriggersNothing(t *testing.T) {
	t.Parallel()
	store := sqlite.File(filepath.Join(t.TempDir(), "app.db"))
	var calls atomic.Int64
	welcome := saga.React("welcome", func(saga.Step, Lent) error { calls.Add(1); return nil })
	parts := []deed.Part{loans, shelf, due(), welcome, deed.ManualClock(newYear)}
	app, err := deed.Start(t.Context(), store, parts...)
	require.NoError(t, err)
	for i := range 20 {
		_, err := deed.Execute(t.Context(), app, loans, Lend{fmt.Sprint("book", i), 7})
		require.NoError(t, err)
	}
	require.NoError(t, app.Settle(t.Context()))
	require.EqualValues(t, 20, calls.Load())
	before, err := app.Store().Head(t.Context())
	require.NoError(t, err)
	next := shelf.Version(2)
	require.NoError(t, app.Projections().Rebuild(t.Context(), "shelf"))
	require.NoError(t, app.Settle(t.Context()))
	require.EqualValues(t, 20, calls.Load())
	require.NoError(t, app.Stop(t.Context()))

	app = start(t, store, append(parts, next)...)
	require.NoError(t, app.Settle(t.Context()))
	require.NoError(t, app.Projections().WaitFor(t.Context(), "shelf/v2", before))
	require.NoError(t, app.Projections().Rebuild(t.Context(), "shelf/v2"))
	require.NoError(t, app.Settle(t.Context()))
	after, err := app.Store().Head(t.Context())
	require.NoError(t, err)
	require.Equal(t, before, after, "no run was started, no step recorded")
	require.EqualValues(t, 20, calls.Load())
	_, err = deed.Execute(t.Context(), app, loans, Lend{"another", 7})
	require.NoError(t, err)
	require.NoError(t, app.Settle(t.Context()))
	require.EqualValues(t, 21, calls.Load())
}
