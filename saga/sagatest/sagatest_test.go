package sagatest_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type Borrowed struct{ Book string }

func (Borrowed) EventType() string { return "loan.borrowed" }

type Returned struct{}

func (Returned) EventType() string { return "loan.returned" }

type Reminded struct{}

func (Reminded) EventType() string { return "loan.reminded" }

type Loan struct{ Reminders int }

var loans = aggregate.Define("loan",
	aggregate.On(func(*Loan, Borrowed) {}),
	aggregate.On(func(*Loan, Returned) {}),
	aggregate.On(func(l *Loan, _ Reminded) { l.Reminders++ }),
)

type Remind struct{ ID string }

func (c Remind) AggregateID() string { return c.ID }
func (c Remind) Decide(l Loan) ([]aggregate.Event, error) {
	if l.Reminders == 3 {
		return nil, command.Rejectf("loan %q: three reminders are enough", c.ID)
	}
	return aggregate.Events(Reminded{}), nil
}

// lending reminds every two weeks until the book is back.
var lending = saga.Define("lending", func(s *saga.Run, _ string) (int, error) {
	for n := 0; ; n++ {
		_, err := saga.Await[Returned](s, saga.Where(s.ID()), 14*24*time.Hour)
		if !errors.Is(err, saga.ErrTimeout) {
			return n, err
		}
		if err := saga.Execute(s, "remind", loans, Remind{s.ID()}); err != nil {
			return n, err
		}
	}
}, saga.On(func(e Borrowed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.Book }))

const week = 7 * 24 * time.Hour

func TestLending(t *testing.T) {
	t.Parallel()
	sagatest.For(t, lending).
		When("loan", "l1", Borrowed{"moby dick"}).
		Advance(5*week).
		Waiting("l1", "await").
		Restart().
		When("loan", "l1", Returned{}).
		Completed("l1", 2).
		Happened("loan", "l1", Reminded{}, Reminded{}).
		NotStarted("l2")
}

func TestLending_CrashEverywhere(t *testing.T) {
	t.Parallel()
	checks := 0
	sagatest.CrashEverywhere(t, func() sagatest.Process { return lending }, func(s *sagatest.Spec) {
		s.When("loan", "l1", Borrowed{"moby dick"}).Advance(10*week).Failed("l1", nil)
	}, func(testing.TB) { checks++ })
	require.Greater(t, checks, 20)
}

// failing is a testing.TB that notes what a story fails with.
type failing struct {
	testing.TB
	message string
}

func (f *failing) Helper()           {}
func (f *failing) Cleanup(fn func()) { f.TB.Cleanup(fn) }
func (f *failing) Fatalf(format string, a ...any) {
	f.message = fmt.Sprintf(format, a...)
	runtime.Goexit()
}

// TestSpec_Fails: a story that is not true fails, and says why.
func TestSpec_Fails(t *testing.T) {
	t.Parallel()
	cases := map[string]struct {
		story   func(s *sagatest.Spec)
		message string
	}{
		"completed while it waits": {func(s *sagatest.Spec) { s.Completed("l1", 0) }, `run "l1" has not ended: it is waiting, at "await \"loan.returned\""`},
		"another result":           {func(s *sagatest.Spec) { s.When("loan", "l1", Returned{}).Completed("l1", 7) }, `run "l1" completed with 0, want 7`},
		"failed but completed":     {func(s *sagatest.Spec) { s.When("loan", "l1", Returned{}).Failed("l1", nil) }, `run "l1" did not fail but ended with <nil>`},
		"another error":            {func(s *sagatest.Spec) { s.Advance(10*week).Failed("l1", saga.ErrTimeout) }, `want "timed out"`},
		"other compensations":      {func(s *sagatest.Spec) { s.Advance(10*week).Failed("l1", nil, "undo") }, `compensated [], want ["undo"]`},
		"not blocked":              {func(s *sagatest.Spec) { s.Blocked("l1", "") }, `run "l1" is not blocked but waiting`},
		"another wait":             {func(s *sagatest.Spec) { s.Waiting("l1", "sleep") }, `want sleep`},
		"no such run":              {func(s *sagatest.Spec) { s.Waiting("l9", "") }, `saga "lending" has no run "l9"`},
		"started":                  {func(s *sagatest.Spec) { s.NotStarted("l1") }, `run "l1" has started`},
		"another history":          {func(s *sagatest.Spec) { s.History("l1", "saga.started") }, `saga.await_set`},
		"other events":             {func(s *sagatest.Spec) { s.Happened("loan", "l1", Reminded{}) }, `loan.reminded`},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := &failing{TB: t}
			done := make(chan struct{})
			go func() {
				defer close(done)
				c.story(sagatest.For(f, lending).When("loan", "l1", Borrowed{"moby dick"}))
			}()
			<-done
			require.NotEmpty(t, f.message, "the story passed")
			require.True(t, strings.Contains(f.message, c.message), "%s", f.message)
		})
	}
}

// TestReplay: exported histories fit the saga that made them, at every length, and
// not one that does something else.
func TestReplay(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	s := sagatest.For(t, lending).When("loan", "l1", Borrowed{"moby dick"}).When("loan", "l2", Borrowed{"emma"}).Advance(10 * week)
	for _, loan := range []string{"l1", "l2"} {
		history, err := s.Engine().Export(t.Context(), "lending", loan)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(folder, loan+".json"), history, 0o600))
	}
	sagatest.Replay(t, lending, folder)

	fails := func(p sagatest.Process, folder, message string) {
		t.Helper()
		f := &failing{TB: t}
		done := make(chan struct{})
		go func() {
			defer close(done)
			sagatest.Replay(f, p, folder)
		}()
		<-done
		require.Contains(t, f.message, message)
	}
	fails(saga.Define("lending", func(s *saga.Run, _ string) (int, error) {
		return 0, s.Sleep("nap", week)
	}), folder, "l1.json: the first 2 of")
	fails(lending, t.TempDir(), `there is no history of saga "lending"`)
	require.NoError(t, os.WriteFile(filepath.Join(folder, "torn.json"), []byte(`{"format":1`), 0o600))
	fails(lending, folder, "torn.json")
}
