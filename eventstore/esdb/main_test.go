package esdb

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// features are what the backend declares, over any server.
func features() storetest.Features {
	limits := eventstore.DefaultLimits()
	limits.EventBytes = 1 << 20 / 16 * 15
	return storetest.Features{
		Forward: storetest.EveryQuery, Backward: storetest.EveryQuery, Subscribe: storetest.EveryQuery,
		KeyScope: storetest.KeysInStream, LogID: true, Reopen: true, Limits: limits,
	}
}

// withDriver opens a store over a driver of the test's own.
func withDriver(d interface{ Close() error }) Option {
	return func(s *settings) error { s.driver = d.(*client); return nil }
}

// The adapter alone, over a database in memory without a server between.
func TestStore_Adapter(t *testing.T) {
	storetest.Run(t, func(t testing.TB) storetest.Opener {
		db := newDatabase()
		return func() (storetest.Store, error) { return Open(t.Context(), "", withDriver(db.client())) }
	}, features())
}
