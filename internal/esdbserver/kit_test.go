package esdbserver_test

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"testing"
	"time"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/esdbserver"
)

// The client forgets a dead connection, unclosed, when it is asked for one before
// its owner has left it.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("google.golang.org/grpc/internal/grpcsync.(*CallbackSerializer).run"),
		goleak.IgnoreAnyFunction("google.golang.org/grpc.(*addrConn).resetTransportAndUnlock"))
}

// patience is how long something may take that is to happen; nothing waits so
// long for something that is not to happen.
const patience = 20 * time.Second

// kit is a server, and a client of it.
type kit struct {
	*testing.T
	ctx    context.Context
	store  eventstore.Store
	server *esdbserver.Server
	client *esdb.Client
}

// both runs a test over each store.
func both(t *testing.T, f func(t *kit), options ...esdbserver.Option) {
	t.Helper()
	t.Parallel()
	t.Run("memory", func(t *testing.T) {
		t.Parallel()
		f(over(t, newMemory(t), options...))
	})
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		store, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "events.db"))
		require.NoError(t, err)
		t.Cleanup(func() { _ = store.Close() })
		f(over(t, store, options...))
	})
}

func newMemory(t testing.TB) eventstore.Store {
	store := memory.New()
	t.Cleanup(func() { _ = store.Close() })
	return store
}

func over(t *testing.T, store eventstore.Store, options ...esdbserver.Option) *kit {
	t.Helper()
	server, err := esdbserver.Start(store, options...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = server.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	t.Cleanup(cancel)
	k := &kit{T: t, ctx: ctx, store: store, server: server}
	k.client = k.connect()
	return k
}

func (k *kit) connect() *esdb.Client {
	k.Helper()
	settings, err := esdb.ParseConnectionString(k.server.URL())
	require.NoError(k, err)
	settings.Logger = esdb.NoopLogging()
	client, err := esdb.NewClient(settings)
	require.NoError(k, err)
	k.Cleanup(func() { _ = client.Close() })
	return client
}

func event(text string) esdb.EventData {
	return esdb.EventData{EventID: uuid.New(), EventType: "happened", ContentType: esdb.ContentTypeJson, Data: []byte(text)}
}

func events(n int) []esdb.EventData {
	all := make([]esdb.EventData, n)
	for i := range all {
		all[i] = event(`{}`)
	}
	return all
}

func (k *kit) try(stream string, expected esdb.ExpectedRevision, events ...esdb.EventData) (*esdb.WriteResult, error) {
	return k.client.AppendToStream(k.ctx, stream, esdb.AppendToStreamOptions{ExpectedRevision: expected}, events...)
}

// append appends, and demands the revision of the last event.
func (k *kit) append(stream string, expected esdb.ExpectedRevision, last uint64, events ...esdb.EventData) *esdb.WriteResult {
	k.Helper()
	r, err := k.try(stream, expected, events...)
	require.NoError(k, err)
	require.Equal(k, last, r.NextExpectedVersion)
	require.Equal(k, r.CommitPosition, r.PreparePosition)
	return r
}

// refused demands that an append fails with the code.
func (k *kit) refused(code esdb.ErrorCode, stream string, expected esdb.ExpectedRevision, events ...esdb.EventData) error {
	k.Helper()
	_, err := k.try(stream, expected, events...)
	k.isError(code, err)
	return err
}

func (k *kit) isError(code esdb.ErrorCode, err error) {
	k.Helper()
	var e *esdb.Error
	require.ErrorAs(k, err, &e)
	require.Equal(k, code, e.Code(), "%v", err)
}

func collect(stream *esdb.ReadStream, err error) ([]*esdb.ResolvedEvent, error) {
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var all []*esdb.ResolvedEvent
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		all = append(all, e)
	}
}

const most = 1 << 40

func (k *kit) read(stream string, o esdb.ReadStreamOptions, count uint64) ([]*esdb.ResolvedEvent, error) {
	return collect(k.client.ReadStream(k.ctx, stream, o, count))
}

// revisions reads a stream and returns the revisions that came.
func (k *kit) revisions(stream string, o esdb.ReadStreamOptions, count uint64) []uint64 {
	k.Helper()
	all, err := k.read(stream, o, count)
	require.NoError(k, err)
	found := []uint64{}
	for _, e := range all {
		require.Equal(k, stream, e.OriginalEvent().StreamID)
		found = append(found, e.OriginalEvent().EventNumber)
	}
	return found
}

func (k *kit) readAll(o esdb.ReadAllOptions, count uint64) []*esdb.ResolvedEvent {
	k.Helper()
	all, err := collect(k.client.ReadAll(k.ctx, o, count))
	require.NoError(k, err)
	return all
}

// next returns the next event of a subscription, and passes over everything else
// that a subscription says but its end.
func (k *kit) next(s *esdb.Subscription) *esdb.ResolvedEvent {
	k.Helper()
	for {
		m := s.Recv()
		if m.SubscriptionDropped != nil {
			require.NoError(k, m.SubscriptionDropped.Error)
			require.Fail(k, "the subscription ended")
		}
		if m.EventAppeared != nil {
			return m.EventAppeared
		}
	}
}

func (k *kit) follow(stream string, o esdb.SubscribeToStreamOptions) *esdb.Subscription {
	k.Helper()
	s, err := k.client.SubscribeToStream(k.ctx, stream, o)
	require.NoError(k, err)
	k.Cleanup(func() { _ = s.Close() })
	return s
}

func (k *kit) followAll(o esdb.SubscribeToAllOptions) *esdb.Subscription {
	k.Helper()
	s, err := k.client.SubscribeToAll(k.ctx, o)
	require.NoError(k, err)
	k.Cleanup(func() { _ = s.Close() })
	return s
}
