package nats

import (
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/matrix"
	"github.com/deed-go/deed/internal/natsserver"
)

func features() storetest.Features { return matrix.Of("nats") }

var streams atomic.Int64

// quiet takes no notice of the servers' sync settings.
func quiet() Option { return Logger(slog.New(slog.DiscardHandler)) }

// servers starts n nodes for one test.
func servers(t testing.TB, n int) *natsserver.Cluster {
	t.Helper()
	c, err := natsserver.Start(natsserver.Options{Nodes: n, Directory: t.TempDir()})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func harness(c *natsserver.Cluster, options ...Option) storetest.Harness {
	return func(t testing.TB) storetest.Opener {
		name := fmt.Sprint("test-", streams.Add(1))
		options := append([]Option{Stream(name), Replicas(c.Nodes()), quiet()}, options...)
		return func() (storetest.Store, error) { return Open(t.Context(), c.URL(), options...) }
	}
}

func TestStore(t *testing.T) { storetest.Run(t, harness(servers(t, 1)), features()) }

// long skips what takes minutes unless DEED_TEST_LONG is set.
func long(t testing.TB) {
	t.Helper()
	if os.Getenv("DEED_TEST_LONG") == "" {
		t.Skip("set DEED_TEST_LONG=1 to run what takes minutes")
	}
}

// The same contract on a cluster, where every message is on three servers.
func TestStore_Replicated(t *testing.T) {
	long(t)
	storetest.Run(t, harness(servers(t, 3)), features())
}

// A tail of one event makes every subscriber read pages.
func TestStore_WithoutTail(t *testing.T) {
	long(t)
	storetest.Run(t, harness(servers(t, 1), Tail(1, 1)), features())
}
