package saga_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

// TestDeploy_MarkedGoesOnRenamedBlocks: while runs of two sagas are open, a
// build comes that adds a marked step to one and renames a step of the other.
// The marked one goes on, old and new runs each their way; the renamed one is
// blocked, says in words what differs, and goes on with a build that fits.
func TestDeploy_MarkedGoesOnRenamedBlocks(t *testing.T) {
	t.Parallel()
	step := func(s *saga.Run, name string) error {
		_, err := saga.Do(s, name, func(saga.Step) (string, error) { return name, nil })
		return err
	}
	marked := func(build int) saga.Process {
		return saga.Define("marked_order", func(s *saga.Run, _ struct{}) ([]string, error) {
			did := []string{"charge"}
			if err := step(s, "charge"); err != nil {
				return nil, err
			}
			if build == 2 && s.Version("fraud-check", 1) >= 1 {
				did = append(did, "check fraud")
				if err := step(s, "check fraud"); err != nil {
					return nil, err
				}
			}
			if err := s.Sleep("pause", time.Hour); err != nil {
				return nil, err
			}
			return append(did, "ship"), step(s, "ship")
		})
	}
	renamed := func(name string) saga.Process {
		return saga.Define("renamed_order", func(s *saga.Run, _ struct{}) (int, error) {
			s.OnRollback("refund", func(*saga.Run) error { return nil })
			if err := step(s, name); err != nil {
				return 0, err
			}
			return 1, s.Sleep("pause", time.Hour)
		})
	}
	b := newBench(t, marked(1), renamed("charge"))
	ctx := t.Context()
	start := func(name, id string) {
		t.Helper()
		def := saga.Define(name, func(*saga.Run, struct{}) (int, error) { return 0, nil })
		require.NoError(t, saga.Start(ctx, b.engine, def, id, struct{}{}))
	}
	start("marked_order", "old")
	start("renamed_order", "old")
	b.settle()
	b = b.restart(marked(2), renamed("take money"))
	start("marked_order", "new")
	b.advance(2 * time.Hour)

	look := func(name, id string) saga.Timeline {
		t.Helper()
		line, err := b.engine.Timeline(ctx, name, id)
		require.NoError(t, err)
		return line
	}
	require.JSONEq(t, `["charge","ship"]`, string(look("marked_order", "old").Output))
	require.JSONEq(t, `["charge","check fraud","ship"]`, string(look("marked_order", "new").Output))
	blocked := look("renamed_order", "old")
	require.Equal(t, saga.StatusBlocked, blocked.Status)
	require.Equal(t, `step 2: history has do "charge", code asks do "take money"`, blocked.Error)
	require.Equal(t, []string{"refund"}, blocked.Pending, "nothing is compensated")

	b = b.restart(marked(2), renamed("charge"))
	b.advance(time.Hour)
	require.Equal(t, saga.StatusCompleted, look("renamed_order", "old").Status)
}

// TestBuild_Pinned: code that runs under way could not take comes as a build of
// its own, beside the old one, in the same program and in others.
func TestBuild_Pinned(t *testing.T) {
	t.Parallel()
	build := func(n int) *saga.Definition[string, string] {
		return saga.Define("pinned", func(s *saga.Run, in string) (string, error) {
			for i := range n { // each build has other steps
				if _, err := saga.Do(s, fmt.Sprintf("step %d of build %d", i, n), func(saga.Step) (int, error) { return 0, nil }); err != nil {
					return "", err
				}
			}
			w, err := word.Wait(s, 0)
			return fmt.Sprintf("%s by build %d: %s", in, n, w), err
		}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU })).Build(fmt.Sprint(n))
	}
	b := newBench(t, build(1))
	ctx := t.Context()
	exec(b, orders, Place{"o1", "book"})
	b.settle()
	b = b.restart(build(1).Draining().FromNow(), build(2))
	exec(b, orders, Place{"o2", "pen"})
	require.NoError(t, saga.Start(ctx, b.engine, build(1), "o3", "cup"), "by hand it can be started all the same")
	b.settle()
	uses, err := b.engine.Builds(ctx, "pinned")
	require.NoError(t, err)
	require.Equal(t, []saga.BuildUse{{Build: "1", Open: 2}, {Build: "2", Open: 1}}, uses)
	runs, err := b.engine.List(ctx, "pinned", saga.ListOptions{})
	require.NoError(t, err)
	require.Len(t, runs, 3)
	for _, id := range []string{"o1", "o2", "o3"} {
		require.NoError(t, word.Send(ctx, b.engine, build(2), id, "go"))
	}
	for id, want := range map[string]string{"o1": "book by build 1: go", "o2": "pen by build 2: go", "o3": "cup by build 1: go"} {
		got, err := saga.Wait(ctx, b.engine, build(2), id)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	b.settle()
	uses, err = b.engine.Builds(ctx, "pinned")
	require.NoError(t, err)
	require.Equal(t, []saga.BuildUse{{Build: "1", Open: 0}, {Build: "2", Open: 0}}, uses)

	// Where the build is not, its runs are left alone.
	require.NoError(t, saga.Start(ctx, b.engine, build(1), "o4", "hat"))
	b.settle()
	b = b.restart(build(2))
	require.NoError(t, word.Send(ctx, b.engine, build(2), "o4", "go"))
	b.settle()
	info, err := b.engine.Look(ctx, "pinned", "o4")
	require.NoError(t, err)
	require.Equal(t, saga.StatusWaiting, info.Status)
	require.Equal(t, "1", info.Build)
	b = b.restart(build(1).Draining(), build(2))
	got, err := saga.Wait(ctx, b.engine, build(1), "o4")
	require.NoError(t, err)
	require.Equal(t, "hat by build 1: go", got)
	require.ErrorContains(t, build(1).Build("a b").Err(), `has the character ' '`)
}

// TestYear: a saga of 365 days, with something to do on each, on the real
// engine in virtual time.
func TestYear(t *testing.T) {
	t.Parallel()
	began := time.Now()
	def := saga.Define("subscription", func(s *saga.Run, days int) (int, error) {
		charged := 0
		for range days {
			if err := s.Sleep("a day", day); err != nil {
				return charged, err
			}
			if _, err := saga.Do(s, "charge", func(step saga.Step) (int, error) { return 0, nil }); err != nil {
				return charged, err
			}
			charged++
		}
		return charged, nil
	})
	s := sagatest.For(t, def, sagatest.At(t0)).Start("ann", 365).
		Advance(364*day+23*time.Hour).Waiting("ann", "a day").
		Advance(time.Hour).Completed("ann", 365)
	require.Equal(t, t0.Add(365*day), s.Now())
	took := time.Since(began)
	t.Logf("365 days took %s", took)
	require.Less(t, took, 30*time.Second) // the log says how long; a busy machine must not decide
}
