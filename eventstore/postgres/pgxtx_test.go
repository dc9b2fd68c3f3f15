package postgres

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
)

type listed struct{ Tags []string }

func (listed) EventType() string { return "listed" }

type shelf struct{ N int }

var shelves = aggregate.Define("shelf", aggregate.On(func(s *shelf, e listed) { s.N += len(e.Tags) }))

type list struct{ tags []string }

func (list) AggregateID() string { return "one" }
func (c list) Decide(shelf) ([]aggregate.Event, error) {
	return aggregate.Events(listed{c.tags}), nil
}

// A handler copies rows with the transaction that its checkpoint is in, and
// cannot end it.
func TestTransaction(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	var ending []error
	copied := projection.SQL("copied",
		projection.Setup("CREATE TABLE IF NOT EXISTS copied (tag text)"),
		projection.Reset("TRUNCATE copied"),
		projection.OnSQL(func(ctx context.Context, tx projection.Tx, e listed, _ eventstore.Recorded) error {
			own, ok := Transaction(tx)
			if !ok {
				return context.Canceled
			}
			ending = append(ending, own.Commit(ctx), own.Rollback(ctx))
			rows := make([][]any, len(e.Tags))
			for i, tag := range e.Tags {
				rows[i] = []any{tag}
			}
			_, err := own.CopyFrom(ctx, pgx.Identifier{"copied"}, []string{"tag"}, pgx.CopyFromRows(rows))
			return err
		}))
	app, err := deed.Start(t.Context(), URL(url), shelves, copied)
	require.NoError(t, err)
	receipt, err := deed.Execute(t.Context(), app, shelves, list{[]string{"a", "b", "c"}})
	require.NoError(t, err)
	require.NoError(t, app.Projections().WaitFor(t.Context(), "copied", receipt.Last))
	require.Equal(t, 3, scalar[int](t, direct(t, url), "SELECT count(*)::int FROM copied"))
	for _, err := range ending {
		require.ErrorIs(t, err, eventstore.ErrInvalid)
	}
	require.NoError(t, app.Stop(t.Context()))

	require.NoError(t, memory.New().Update(t.Context(), func(tx projection.StateTx) error {
		_, ok := Transaction(tx)
		require.False(t, ok, "another backend has no such transaction")
		return nil
	}))
}
