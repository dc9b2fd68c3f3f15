package postgres

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
)

// The partitions of an SQL projection prepare its tables at the same time, and
// of two CREATE TABLE IF NOT EXISTS that run together PostgreSQL fails one.
func TestStore_PartitionsPrepareTables(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	for i := range pick(20, 4) {
		name := fmt.Sprintf("prepared_%d", i)
		p := projection.SQL(name, projection.Setup(`CREATE TABLE IF NOT EXISTS public.`+name+` (id text PRIMARY KEY)`, `CREATE INDEX IF NOT EXISTS `+name+`_id ON public.`+name+` (id)`),
			projection.OnSQL(func(context.Context, projection.Tx, tallied, eventstore.Recorded) error { return nil })).Partitioned(16)
		app, err := deed.Start(t.Context(), URL(url), p)
		require.NoError(t, err)
		require.NoError(t, app.Stop(t.Context()))
	}
}
