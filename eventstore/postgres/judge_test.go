package postgres

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

// A condition on a position that an event of the same batch was meant to have
// does not pass when others write in between and the batch moves.
func TestStore_Append_GuessedPosition(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	other := openURL(t, url)
	var armed atomic.Bool
	gate := make(chan struct{})
	a := openURL(t, url, with(func(s *settings) {
		s.hold = func() {
			if armed.Load() {
				<-gate
			}
		}
		s.forms = func(b *batch) form {
			if armed.CompareAndSwap(true, false) {
				_, _ = other.Append(context.Background(), commit(event(account("other"), "opened")))
			}
			if b.anchored {
				return formTwoTrips
			}
			return formFunction
		}
	}))
	first := mustAppend(t, a, commit(event(account("exists"), "opened")))
	armed.Store(true)
	x := account("x")
	p1 := a.Enqueue(t.Context(), commit(event(x, "opened")))
	guess := eventstore.Revision{Version: 1, Position: first.Last + 1}
	p2 := a.Enqueue(t.Context(), under(commit(event(account("y"), "opened")), eventstore.StreamAt(x, guess)))
	close(gate)
	r1, err := p1.Result()
	require.NoError(t, err)
	_, err = p2.Result()
	if r1.Revision(x) != guess {
		require.ErrorIs(t, err, eventstore.ErrConflict, "x is at %v, not at %v", r1.Revision(x), guess)
	}
}

func TestStore_EmptyDataIsNotNil(t *testing.T) {
	t.Parallel()
	s := openURL(t, pgtest.Database(t))
	e := event(account("x"), "opened")
	e.Data = []byte{}
	mustAppend(t, s, commit(e))
	require.NotNil(t, readAll(t, s, eventstore.All())[0].Data)
}
