package saga_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

// TestSignal_WhileAnotherBranchWorks: one branch has looked and found nothing;
// what it is told while another one is at work reaches it all the same.
func TestSignal_WhileAnotherBranchWorks(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"signal", "cancel"} {
		began, goOn := make(chan struct{}), make(chan struct{})
		def := saga.Define("both", func(s *saga.Run, _ struct{}) (string, error) {
			said := ""
			err := saga.All(s, "both", func(s *saga.Run) (err error) {
				said, err = word.Wait(s, 30*day)
				return err
			}, func(s *saga.Run) error {
				if _, err := saga.Do(s, "first", func(saga.Step) (int, error) { close(began); <-goOn; return 0, nil }); err != nil {
					return err
				}
				_, err := saga.Do(s.Detached(), "second", func(saga.Step) (int, error) { return 0, nil })
				return err
			})
			return said, err
		})
		b := newBench(t, def)
		require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", struct{}{}))
		<-began
		if what == "signal" {
			require.NoError(t, word.Send(t.Context(), b.engine, def, "r", "now"))
		} else {
			require.NoError(t, b.engine.Cancel(t.Context(), "both", "r", "enough"))
		}
		close(goOn)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		said, err := saga.Wait(ctx, b.engine, def, "r")
		if what == "signal" {
			require.NoError(t, err)
			require.Equal(t, "now", said)
		} else {
			require.ErrorIs(t, err, saga.ErrCancelled)
		}
	}
}

// TestBuild_DecidedBefore: a build that comes later does not start runs for what
// the first one was told to leave alone.
func TestBuild_DecidedBefore(t *testing.T) {
	t.Parallel()
	define := func() *saga.Definition[string, string] {
		return saga.Define("later", func(s *saga.Run, in string) (string, error) { return in, s.Sleep("wait", day) },
			saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
	}
	b := newBench(t)
	exec(b, orders, Place{"old", "book"})
	b = b.restart(define().FromNow())
	exec(b, orders, Place{"o1", "book"})
	b.settle()
	for _, processes := range [][]saga.Process{
		{define().Draining(), define().Build("2").FromNow()},
		{define().Build("2").Draining(), define().Build("3")},
		{define().Build("3").Draining(), define()},
	} {
		b = b.restart(processes...)
		b.settle()
		runs, err := b.engine.List(t.Context(), "later", saga.ListOptions{})
		require.NoError(t, err)
		require.Len(t, runs, 1)
		_, err = b.engine.Look(t.Context(), "later", "old")
		require.ErrorIs(t, err, saga.ErrNotFound)
	}
}

// TestLimit_PlacesComeBack from whoever does not need them any more.
func TestLimit_PlacesComeBack(t *testing.T) {
	t.Parallel()
	entered, goOn := make(chan string, 10), make(chan struct{})
	def := saga.Define("scarce", func(s *saga.Run, how string) (string, error) {
		s.OnRollback("undo", func(*saga.Run) error {
			if how == "stuck" {
				return errors.New("cannot")
			}
			return nil
		})
		attempts := 0
		_, err := saga.Do(s, "call", func(step saga.Step) (int, error) {
			if how == "retry" && step.Attempt() == 1 {
				return 0, errors.New("once more")
			}
			attempts++
			entered <- s.ID()
			<-goOn
			return attempts, nil
		}, saga.AtMost("gateway", 1), saga.Backoff(time.Second, time.Second))
		return s.ID(), err
	})
	b := newBench(t, def)
	ctx := t.Context()
	start := func(id, how string) { require.NoError(t, saga.Start(ctx, b.engine, def, id, how)) }
	until := func(id string, is func(saga.Info) bool) {
		t.Helper()
		for began := time.Now(); ; time.Sleep(time.Millisecond) {
			info, err := b.engine.Look(ctx, "scarce", id)
			if err == nil && is(info) {
				return
			}
			require.Less(t, time.Since(began), 10*time.Second, "%s is %+v", id, info)
		}
	}
	start("retries", "retry") // fails, and is due while the place is taken
	until("retries", func(i saga.Info) bool { return i.Attempts == 1 })
	start("first", "")
	require.Equal(t, "first", <-entered)
	start("stuck", "stuck")
	start("gone", "")
	start("last", "")
	b.clock.Set(b.clock.Now().Add(2 * time.Second))
	for _, w := range b.engine.Workers() {
		require.NoError(t, w.Fire(ctx, b.clock.Now()))
	}
	for _, id := range []string{"stuck", "gone"} {
		require.NoError(t, b.engine.Cancel(ctx, "scarce", id, "changed my mind"))
	}
	until("stuck", func(i saga.Info) bool { return i.Status == saga.StatusBlocked })
	until("gone", func(i saga.Info) bool { return i.Status == saga.StatusCancelled })
	close(goOn)
	for _, id := range []string{"first", "retries", "last"} {
		waiting, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := saga.Wait(waiting, b.engine, def, id)
		cancel()
		require.NoError(t, err, id)
	}
	b.settle() // nothing spins
}

// TestChild_OfTheSameSaga: a run waits for one of its own kind.
func TestChild_OfTheSameSaga(t *testing.T) {
	t.Parallel()
	var def *saga.Definition[int, int]
	def = saga.Define("factorial", func(s *saga.Run, n int) (int, error) {
		if err := s.Sleep("think", time.Hour); err != nil || n <= 1 {
			return 1, err
		}
		smaller, err := saga.Child(s, "smaller", def, "", n-1)
		return n * smaller, err
	})
	sagatest.CrashEverywhere(t, func() saga.Process { return def }, func(s *sagatest.Spec) {
		s.Start("r", 4).Advance(5*time.Hour).Completed("r", 24)
	}, nil)
}

// TestDeadline_CoversSteps: a step that hangs is cut off, counts for nothing,
// and is not begun again.
func TestDeadline_CoversSteps(t *testing.T) {
	t.Parallel()
	began := make(chan struct{}, 10)
	def := saga.Define("hanging", func(s *saga.Run, _ struct{}) (string, error) {
		err := saga.Deadline(s, "answer", time.Minute, func(s *saga.Run) error {
			_, err := saga.Do(s, "ask", func(step saga.Step) (int, error) {
				began <- struct{}{}
				<-step.Done()
				return 0, context.Cause(step)
			})
			return err
		})
		if errors.Is(err, saga.ErrTimeout) {
			return "too late", nil
		}
		return "", err
	})
	b := newBench(t, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", struct{}{}))
	<-began
	time.Sleep(50 * time.Millisecond) // so that the deadline has been set; if it has not, the test shows less
	b.clock.Set(b.clock.Now().Add(time.Minute))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	got, err := saga.Wait(ctx, b.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, "too late", got)
	require.Empty(t, began, "it is not begun again")
	require.False(t, slices.Contains(b.types(history("hanging", "r")), "saga.attempt_failed"))
}

// TestAwait_OfferedToSeveral: an event that the first one does not take in the
// end is the next one's.
func TestAwait_OfferedToSeveral(t *testing.T) {
	t.Parallel()
	def := saga.Define("several", func(s *saga.Run, _ struct{}) (string, error) {
		got := ""
		err := saga.All(s, "all", func(s *saga.Run) error {
			_, err := saga.Race(s, "either", func(s *saga.Run) error { return s.Sleep("short", time.Hour) }, func(s *saga.Run) error {
				_, err := saga.Await[Shipped](s, saga.Where("o"), 0)
				return err
			})
			return err
		}, func(s *saga.Run) error {
			e, err := saga.Await[Shipped](s, saga.Where("o"), 0)
			got = e.Parcel
			return err
		})
		return got, err
	})
	b := newBench(t, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", struct{}{}))
	b.settle()
	b.clock.Set(b.clock.Now().Add(time.Hour)) // due, and nobody has fired it
	exec(b, orders, Place{"o", "book"})
	exec(b, orders, Ship{"o", "p1"})
	b.advance(time.Minute)
	exec(b, orders, Ship{"o", "p2"})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	got, err := saga.Wait(ctx, b.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, "p1", got)
}

// TestOnce_InACompensationThatIsTriedAgain runs at most once all the same.
func TestOnce_InACompensationThatIsTriedAgain(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	def := saga.Define("twice", func(s *saga.Run, _ struct{}) (int, error) {
		s.OnRollback("undo", func(s *saga.Run) error {
			_, err := saga.Once(s, "fire", func(saga.Step) (int, error) { calls.Add(1); return 0, errors.New("jammed") })
			return err
		})
		return 0, errDeclined
	})
	s := sagatest.For(t, def).Start("r", struct{}{}).Blocked("r", "jammed").Resume("r").Blocked("r", "jammed")
	require.Equal(t, int32(1), calls.Load())
	require.NoError(t, s.Engine().Skip(t.Context(), "twice", "r", "once:fire@undo", nil, "by hand"))
	s.Failed("r", errDeclined, "undo")
	require.Equal(t, int32(1), calls.Load())
}

// TestBranches_StepEndsItsGoroutine: what t.FailNow does in a step of a branch
// blocks the run, and hangs nothing.
func TestBranches_StepEndsItsGoroutine(t *testing.T) {
	t.Parallel()
	def := saga.Define("exit", func(s *saga.Run, _ struct{}) (int, error) {
		return 0, saga.All(s, "both", func(s *saga.Run) error { return s.Sleep("x", time.Hour) }, func(s *saga.Run) error {
			_, err := saga.Do(s, "exit", func(saga.Step) (int, error) { goexit(); return 0, nil })
			return err
		})
	})
	sagatest.For(t, def).Start("r", struct{}{}).Blocked("r", "Goexit")
}

// TestSchedule_ChangedToEarlier: an instant of the new expression that is over
// when it comes was not missed.
func TestSchedule_ChangedToEarlier(t *testing.T) {
	t.Parallel()
	job := saga.Define("job", func(_ *saga.Run, at time.Time) (string, error) { return at.Format("15:04"), nil })
	cron := func(expression string) saga.Process {
		return saga.Cron("daily", expression, job, func(at time.Time) time.Time { return at }, saga.OnMissed(saga.MissedAll))
	}
	s := sagatest.For(t, cron("0 3 * * *"), sagatest.Also(job), sagatest.At(t0)).
		Advance(10*time.Hour).
		Deploy(cron("0 4 * * *")).
		Published(saga.ScheduleRun, "next", t0.Add(28*time.Hour))
	_, err := s.Engine().Look(t.Context(), "job", fmt.Sprint("daily/", t0.Add(4*time.Hour).Format(time.RFC3339)))
	require.ErrorIs(t, err, saga.ErrNotFound)
}
