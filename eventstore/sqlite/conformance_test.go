package sqlite_test

import (
	"path/filepath"
	"testing"

	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/matrix"
	"github.com/deed-go/deed/projection/statetest"
)

func TestStore(t *testing.T) {
	storetest.Run(t, harness(), matrix.Of("sqlite"))
}

// A tail of one event makes every subscriber read from the file.
func TestStore_WithoutTail(t *testing.T) {
	storetest.Run(t, harness(sqlite.Tail(1, 1)), matrix.Of("sqlite"))
}

func TestState(t *testing.T) {
	statetest.Run(t, func(t testing.TB) statetest.Opener {
		path := filepath.Join(t.TempDir(), "state.db")
		return func() (statetest.State, error) { return sqlite.Open(t.Context(), path) }
	}, statetest.Features{SQL: true, Reopen: true, LeasesEndWithProcess: true})
}

func harness(options ...sqlite.Option) storetest.Harness {
	return func(t testing.TB) storetest.Opener {
		path := filepath.Join(t.TempDir(), "log.db")
		return func() (storetest.Store, error) { return sqlite.Open(t.Context(), path, options...) }
	}
}
