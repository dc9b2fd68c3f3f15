package esdb

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/matrix"
)

// The client forgets a dead connection, unclosed, when another call asks for one
// before its supervisor has left it: a few goroutines that nobody can end.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("google.golang.org/grpc/internal/grpcsync.(*CallbackSerializer).run"),
		goleak.IgnoreAnyFunction("google.golang.org/grpc.(*addrConn).resetTransportAndUnlock"))
}

func features() storetest.Features { return matrix.Of("esdb") }

// A tail of one event makes every subscriber read from the server; one that
// never says that a subscription has caught up must do as well, and one whose
// client tells of a missing stream at once.
func TestStore_WithoutTail(t *testing.T) {
	storetest.Run(t, func(t testing.TB) storetest.Opener {
		db := newDatabase()
		db.silent, db.early = true, true
		return func() (storetest.Store, error) { return Open(t.Context(), "", withDriver(db.client()), Tail(1, 1)) }
	}, features())
}

// withDriver opens a store over a driver of the test's own.
func withDriver(d driver.Driver) Option {
	return func(s *settings) error { s.driver = d; return nil }
}

// The adapter alone, over a database in memory without a server between.
func TestStore_Adapter(t *testing.T) {
	storetest.Run(t, func(t testing.TB) storetest.Opener {
		db := newDatabase()
		return func() (storetest.Store, error) { return Open(t.Context(), "", withDriver(db.client())) }
	}, features())
}
