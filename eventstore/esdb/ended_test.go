package esdb_test

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
)

func TestStore_OpenEndsWithItsContext(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var held sync.WaitGroup
	var mu sync.Mutex
	var all []net.Conn
	held.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			all = append(all, c)
			mu.Unlock()
		}
	})
	defer func() {
		listener.Close()
		held.Wait()
		for _, c := range all {
			c.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err = esdb.Open(ctx, "esdb://"+listener.Addr().String()+"?tls=false")
	t.Log(time.Since(began), err)
	require.Error(t, err)
	require.Less(t, time.Since(began), 2*time.Second)
}

// A refusal that comes before all events were sent is told from a broken
// connection, although the client has lost its reason.
func TestStore_DeniedManyEvents(t *testing.T) {
	t.Parallel()
	server := ours(t)
	store := open(t, server.URL())
	server.Intercept(func(_ context.Context, method string) error {
		if strings.HasSuffix(method, "Append") {
			return status.Error(codes.PermissionDenied, "Access Denied")
		}
		return nil
	})
	bad := 0
	for range 20 {
		c := happened(200)
		c.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}
		_, err := store.Append(t.Context(), c)
		require.Error(t, err)
		if !strings.Contains(err.Error(), "refuses this user") {
			bad++
			t.Log(err)
		}
	}
	require.Zero(t, bad)
}

func TestStore_CanceledByRealServer(t *testing.T) {
	server := ours(t)
	store := open(t, server.URL())
	_, err := store.Append(t.Context(), happened(2))
	require.NoError(t, err)
	n := 0
	server.Intercept(func(_ context.Context, method string) error {
		if n++; n == 1 {
			return status.Error(codes.Canceled, "call cancelled")
		}
		return nil
	})
	_, err = store.Head(t.Context())
	require.NoError(t, err)
}
