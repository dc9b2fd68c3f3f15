package postgres

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
)

type amount struct{ Cents int }

func (amount) EventType() string { return "paid" }

type total struct{ Cents int }

// Dead letters are replayed and skipped from a process that stands by, and from
// a tool; by whichever process has the projection, also when that changes.
func TestState_Admin(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	var ill atomic.Bool
	ill.Store(true)
	view := func() *projection.ViewDefinition[total] {
		return projection.View("totals", projection.On(func(r *total, e amount) {
			if e.Cents == 13 && ill.Load() {
				panic(projection.Permanent(errors.New("unlucky")))
			}
			r.Cents += e.Cents
		}))
	}
	type process struct {
		engine *projection.Engine
		view   *projection.ViewDefinition[total]
		stop   func()
	}
	run := func(name string) *process {
		s := openURL(t, url)
		p := &process{engine: projection.NewEngine(s, s, projection.Options{Owner: name, Logger: slog.New(slog.DiscardHandler)}), view: view()}
		require.NoError(t, p.engine.Add(p.view))
		w := p.engine.Workers()[0]
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = w.Run(ctx) })
		p.stop = func() { cancel(); running.Wait() }
		t.Cleanup(p.stop)
		require.NoError(t, w.Ready(t.Context()))
		return p
	}
	tool := openURL(t, url)
	admin := projection.NewAdmin(tool, "tool")
	pay := func(of string, cents string) eventstore.Position {
		e := event(account(of), "paid")
		e.Data = []byte(`{"Cents":` + cents + `}`)
		return mustAppend(t, tool, commit(e)).Last
	}
	first := pay("ann", "13")
	pay("ann", "1")
	second := pay("bob", "13")
	last := pay("bob", "2")
	one := run("one")
	require.NoError(t, one.engine.WaitFor(t.Context(), "totals", last))
	two := run("two")
	status, err := two.engine.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, projection.PhaseStandby, status[0].Phase)
	require.Equal(t, 4, status[0].DeadLetters)

	require.NoError(t, two.engine.SkipDeadLetter(t.Context(), "totals", first, "by the one that stands by"))
	n, err := two.engine.ReplayDeadLetters(t.Context(), "totals")
	require.ErrorIs(t, err, projection.ErrRefused)
	require.Equal(t, 1, n)
	require.NoError(t, admin.Skip(t.Context(), "totals", second, "by the tool"))

	// The owner stops while it is asked; the other one answers.
	answered := make(chan error, 1)
	one.stop()
	go func() {
		n, err := admin.Replay(context.WithoutCancel(t.Context()), "totals")
		if n != 1 {
			err = errors.Join(err, errors.New("not one event"))
		}
		answered <- err
	}()
	require.NoError(t, <-answered)
	totals := map[string]int{}
	read := func() map[string]int {
		clear(totals)
		require.NoError(t, tool.View(t.Context(), func(tx projection.StateTx) error {
			for e, err := range two.view.Rows(tx, projection.Range{}) {
				if err != nil {
					return err
				}
				totals[e.Key] = e.Row.Cents
			}
			return nil
		}))
		return totals
	}
	require.Equal(t, map[string]int{"ann": 1, "bob": 2}, read())
	skipped, err := admin.Skipped(t.Context(), "totals")
	require.NoError(t, err)
	require.Len(t, skipped, 2)
	require.Equal(t, "two", skipped[0].By)

	// Rebuilt from the process that stands by, which sees the end of it.
	ill.Store(false)
	three := run("three")
	require.NoError(t, three.engine.Rebuild(t.Context(), "totals"))
	require.Equal(t, map[string]int{"ann": 14, "bob": 15}, read())
	require.Empty(t, rowsOf(t, tool, "projection.requests.totals"))
}

func rowsOf(t *testing.T, s *Store, table string) (rows []projection.Row) {
	t.Helper()
	require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
		rows = rows[:0]
		for row, err := range tx.Scan(table, projection.Range{}) {
			if err != nil {
				return err
			}
			rows = append(rows, row)
		}
		return nil
	}))
	return rows
}
