package deed_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/query"
)

type purseFilled struct{ Cents int64 }

func (purseFilled) EventType() string { return "purse.filled" }

type purse struct {
	Cents int64
	Times int
}

type fill struct {
	Purse string
	Cents int64
}

func (c fill) AggregateID() string { return c.Purse }

func (c fill) Decide(purse) ([]aggregate.Event, error) {
	return aggregate.Events(purseFilled{c.Cents}), nil
}

var purses = aggregate.Define("purse", aggregate.On(func(p *purse, e purseFilled) {
	p.Cents += e.Cents
	p.Times++
}))

func eachEmbedded(t *testing.T, test func(t *testing.T, source eventstore.Opener)) {
	t.Run("memory", func(t *testing.T) { t.Parallel(); test(t, memory.New()) })
	t.Run("sqlite", func(t *testing.T) { t.Parallel(); test(t, sqlite.File(filepath.Join(t.TempDir(), "app.db"))) })
}

// After Execute has returned, a query sees what it has written, from the first
// moment on: also while the projection is not inline yet.
func TestInline_ReadsItsOwnWrites(t *testing.T) {
	t.Parallel()
	eachEmbedded(t, func(t *testing.T, source eventstore.Opener) {
		contents := projection.Of("contents", purses).Inline()
		app, err := deed.Start(t.Context(), source, purses, contents)
		require.NoError(t, err)
		defer func() { require.NoError(t, app.Stop(context.WithoutCancel(t.Context()))) }()
		var group sync.WaitGroup
		for p := range 4 {
			group.Go(func() {
				id := fmt.Sprint("p", p)
				for i := range 50 {
					if _, err := deed.Execute(context.Background(), app, purses, fill{id, 1}); err != nil {
						t.Error(err)
						return
					}
					row, err := query.Get(context.Background(), app, contents, id)
					if err != nil || row.Times != i+1 {
						t.Errorf("%s: %+v, %v after %d", id, row, err, i+1)
						return
					}
				}
			})
		}
		group.Wait()
		require.NoError(t, app.Settle(t.Context()))
		v, err := app.Projections().Verify(t.Context(), "contents")
		require.NoError(t, err)
		require.True(t, v.Agrees(), "%s", v)
	})
}

// A projection that stands still does not hold up appends, but whoever has
// written and would not see it is told so.
func TestInline_PausedSaysSo(t *testing.T) {
	t.Parallel()
	eachEmbedded(t, func(t *testing.T, source eventstore.Opener) {
		contents := projection.Of("contents", purses).Inline()
		app, err := deed.Start(t.Context(), source, purses, contents)
		require.NoError(t, err)
		defer func() { require.NoError(t, app.Stop(context.WithoutCancel(t.Context()))) }()
		require.NoError(t, app.Projections().Pause(t.Context(), "contents"))
		_, err = deed.Execute(t.Context(), app, purses, fill{"p", 1})
		require.NoError(t, err)
		_, err = query.Get(t.Context(), app, contents, "p", query.Within(10*time.Millisecond))
		require.ErrorIs(t, err, query.ErrTimeout)
		require.NoError(t, app.Projections().Resume(t.Context(), "contents"))
		row, err := query.Get(t.Context(), app, contents, "p")
		require.NoError(t, err)
		require.Equal(t, purse{Cents: 1, Times: 1}, row)
	})
}

// Commands on one aggregate, decided one after the other before any is durable:
// one that an inline projection refuses fails alone. Those behind it were decided on
// what did not happen, and are decided again.
func TestInline_PipelinedCommands(t *testing.T) {
	t.Parallel()
	eachEmbedded(t, func(t *testing.T, source eventstore.Opener) {
		contents := projection.View("contents", projection.On(func(p *purse, e purseFilled) {
			if e.Cents == 13 {
				panic(errors.New("thirteen"))
			}
			p.Cents += e.Cents
			p.Times++
		})).Inline()
		app, err := deed.Start(t.Context(), source, purses, contents)
		require.NoError(t, err)
		defer func() { require.NoError(t, app.Stop(context.WithoutCancel(t.Context()))) }()
		require.Eventually(t, func() bool {
			all, err := app.Projections().Status(context.Background())
			return err == nil && all[0].Inline
		}, 30*time.Second, time.Millisecond)
		const commands = 100
		var group sync.WaitGroup
		for i := range commands {
			group.Go(func() {
				cents := int64(1)
				if i%4 == 0 {
					cents = 13
				}
				_, err := deed.Execute(context.Background(), app, purses, fill{"p", cents})
				if _, refused := errors.AsType[*projection.InlineError](err); refused != (cents == 13) || !refused && err != nil {
					t.Errorf("%d cents: %v", cents, err)
				}
			})
		}
		group.Wait()
		should := purse{Cents: commands * 3 / 4, Times: commands * 3 / 4}
		row, err := query.Get(t.Context(), app, contents, "p")
		require.NoError(t, err)
		require.Equal(t, should, row)
		state, revision, err := deed.Load(t.Context(), app, purses, "p")
		require.NoError(t, err)
		require.Equal(t, should, state)
		require.EqualValues(t, should.Times, revision.Version)
	})
}

// plainStore hides the powers of a store.
type plainStore struct{ eventstore.Store }

func (s plainStore) Open(context.Context) (eventstore.Store, error) { return s, nil }

func TestInline_Refused(t *testing.T) {
	t.Parallel()
	contents := projection.Of("contents", purses).Inline()
	_, err := deed.New(t.Context(), plainStore{memory.New()}, purses, contents, deed.State(memory.New()))
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, `projection "contents": inline: unsupported operation: deed_test.plainStore cannot apply projections in the transaction of an append`)
	_, err = deed.New(t.Context(), memory.New(), purses, contents, deed.State(memory.New()))
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "its rows are kept in another database")
	for _, mistaken := range []*projection.ViewDefinition[purse]{contents.Partitioned(4), projection.Of("contents", purses).Partitioned(4).Inline()} {
		require.ErrorIs(t, mistaken.Err(), eventstore.ErrInvalid)
		require.ErrorContains(t, mistaken.Err(), "it is inline and has 4 partitions")
	}
	require.NoError(t, contents.Partitioned(1).Err())
	require.ErrorContains(t, contents.Version(2).Err(), "it is inline and version 2")
	sql := projection.SQL("report", projection.OnSQL(func(context.Context, projection.Tx, purseFilled, eventstore.Recorded) error { return nil })).Inline()
	require.NoError(t, sql.Err())
	require.ErrorContains(t, sql.Version(3).Err(), "it is inline and version 3")
	require.ErrorContains(t, sql.Partitioned(2).Err(), "it is inline and has 2 partitions")
}
