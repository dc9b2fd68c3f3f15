package esdb_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/esdbserver"
	"github.com/deed-go/deed/internal/matrix"
)

// realServer names a server to run the suite against, instead of one in the
// process. Each test has a log of its own there, by its prefix.
const realServer = "DEED_TEST_ESDB_URL"

func features() storetest.Features { return matrix.Of("esdb") }

// server starts a server over the store and returns it.
func server(t testing.TB, over eventstore.Store, options ...esdbserver.Option) *esdbserver.Server {
	t.Helper()
	s, err := esdbserver.Start(over, options...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// ours starts a server that can be told to misbehave.
func ours(t testing.TB, options ...esdbserver.Option) *esdbserver.Server {
	t.Helper()
	if os.Getenv(realServer) != "" {
		t.Skipf("the server of %s cannot be told to misbehave: unset the variable to run this test", realServer)
	}
	return server(t, memory.New(), options...)
}

// url names a database without a log, and the options to use it with.
func url(t testing.TB) (string, []esdb.Option) {
	t.Helper()
	if real := os.Getenv(realServer); real != "" {
		return real, []esdb.Option{esdb.Prefix("t" + strings.ReplaceAll(uuid.NewString(), "-", ""))}
	}
	return server(t, memory.New()).URL(), nil
}

func open(t testing.TB, url string, options ...esdb.Option) *esdb.Store {
	t.Helper()
	s, err := esdb.Open(t.Context(), url, options...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func TestStore(t *testing.T) {
	storetest.Run(t, func(t testing.TB) storetest.Opener {
		at, options := url(t)
		return func() (storetest.Store, error) { return esdb.Open(t.Context(), at, options...) }
	}, features())
}

func TestStore_OnSQLite(t *testing.T) {
	if os.Getenv(realServer) != "" {
		t.Skipf("the server of %s keeps its events by itself: unset the variable to run this test", realServer)
	}
	storetest.Run(t, func(t testing.TB) storetest.Opener {
		file, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "server.db"))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, file.Close()) })
		at := server(t, file).URL()
		return func() (storetest.Store, error) { return esdb.Open(t.Context(), at) }
	}, features())
}
