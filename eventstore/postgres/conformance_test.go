package postgres

import (
	"testing"

	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/matrix"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection/statetest"
)

func features() storetest.Features { return matrix.Of("postgres") }

func harness(options ...Option) storetest.Harness {
	return func(t testing.TB) storetest.Opener {
		url := pgtest.Database(t)
		return func() (storetest.Store, error) { return Open(t.Context(), url, options...) }
	}
}

func always(f form) Option {
	return func(s *settings) error { s.forms = func(*batch) form { return f }; return nil }
}

func TestStore(t *testing.T) { storetest.Run(t, harness(), features()) }

// Every form of writing keeps the whole contract.
func TestStore_Function(t *testing.T) { storetest.Run(t, harness(always(formFunction)), features()) }

func TestStore_TwoTrips(t *testing.T) {
	atLength(t)
	storetest.Run(t, harness(always(formTwoTrips)), features())
}

// A tail of one event makes every subscriber read from the database.
func TestStore_WithoutTail(t *testing.T) {
	atLength(t)
	storetest.Run(t, harness(Tail(1, 1)), features())
}

func TestState(t *testing.T) {
	statetest.Run(t, func(t testing.TB) statetest.Opener {
		url := pgtest.Database(t)
		return func() (statetest.State, error) { return Open(t.Context(), url) }
	}, statetest.Features{SQL: true, Reopen: true, Shared: true, ConcurrentUpdates: true})
}
