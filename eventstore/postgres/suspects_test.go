package postgres

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

func TestSuspect_ForeignAbsence(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	a := openURL(t, url)
	mustAppend(t, a, commit(event(account("x"), "opened")))
	fill(t, a, 1500)
	b := openURL(t, url)
	_, err := b.Append(t.Context(), under(commit(event(account("y"), "opened")), at(account("x"), 0)))
	require.ErrorIs(t, err, eventstore.ErrConflict)
}
