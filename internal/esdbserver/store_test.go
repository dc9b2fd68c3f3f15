package esdbserver_test

import (
	"context"
	"errors"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/esdbserver"
)

// broken is a store whose appends fail, before or after they were written.
type broken struct {
	eventstore.Store
	before, after atomic.Bool
}

var errBroken = errors.New("the disk is on fire")

func (b *broken) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if b.before.Load() {
		return eventstore.Receipt{}, errBroken
	}
	r, err := b.Store.Append(ctx, c)
	if err == nil && b.after.Load() {
		return eventstore.Receipt{}, eventstore.ErrOutcomeUnknown
	}
	return r, err
}

func TestAStoreThatFails(t *testing.T) {
	t.Parallel()
	store := &broken{Store: newMemory(t)}
	k := over(t, store)
	k.append("a", esdb.NoStream{}, 0, event(`{}`))
	k.delete("a", esdb.Any{})
	before := k.readAll(esdb.ReadAllOptions{}, most)

	// What fails leaves nothing behind: no event, no metadata, no id, no tombstone.
	store.before.Store(true)
	batch := events(3)
	for range 2 {
		_, err := k.try("a", esdb.NoStream{}, batch...)
		require.ErrorContains(t, err, "the disk is on fire")
		_, err = k.try("b", esdb.Any{}, batch...)
		require.ErrorContains(t, err, "the disk is on fire")
		_, err = k.client.TombstoneStream(k.ctx, "a", esdb.TombstoneStreamOptions{ExpectedRevision: esdb.Any{}})
		require.ErrorContains(t, err, "the disk is on fire")
		require.Equal(t, before, k.readAll(esdb.ReadAllOptions{}, most))
		_, err = k.read("a", forward, most)
		k.isError(esdb.ErrorCodeResourceNotFound, err)
	}
	store.before.Store(false)
	k.append("b", esdb.Any{}, 2, batch...)
	k.append("a", esdb.NoStream{}, 3, batch...)
	require.Equal(t, []uint64{1, 2, 3}, k.revisions("a", forward, most))

	// What was written although the store could not say so is there.
	store.after.Store(true)
	batch = events(2)
	s := k.follow("a", esdb.SubscribeToStreamOptions{From: esdb.End{}})
	_, err := k.try("a", esdb.Revision(3), batch...)
	require.ErrorContains(t, err, "outcome unknown")
	require.Equal(t, uint64(4), k.next(s).Event.EventNumber)
	require.Equal(t, uint64(5), k.next(s).Event.EventNumber)
	store.after.Store(false)
	k.append("a", esdb.Revision(3), 5, batch...)
	require.Equal(t, []uint64{1, 2, 3, 4, 5}, k.revisions("a", forward, most))

	after := k.readAll(esdb.ReadAllOptions{}, most)
	require.NoError(t, k.server.Restart())
	k.client = k.connect()
	require.Equal(t, after, k.readAll(esdb.ReadAllOptions{}, most), "positions too")
}

// The file is closed and opened again, by another store and another server.
func TestPositionsSurviveInAFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "events.db")
	var before []*esdb.ResolvedEvent
	for i := range uint64(3) {
		store, err := sqlite.Open(t.Context(), path)
		require.NoError(t, err)
		k := over(t, store)
		all := k.readAll(esdb.ReadAllOptions{}, most)
		if i > 0 {
			require.Equal(t, before, all)
		}
		k.append("a", esdb.Any{}, 2*i, event(`{}`))
		k.append("a", esdb.Any{}, 2*i+1, event(`{}`))
		k.delete("a", esdb.Any{})
		before = k.readAll(esdb.ReadAllOptions{}, most)
		require.NoError(t, k.server.Close())
		require.NoError(t, store.Close())
	}
}

func TestStart_Errors(t *testing.T) {
	t.Parallel()
	k := over(t, newMemory(t))
	_, err := esdbserver.Start(newMemory(t), esdbserver.Address(k.server.Address()))
	require.ErrorContains(t, err, "start the EventStoreDB server: listen tcp")
	_, err = esdbserver.Start(&broken{Store: newMemory(t)}, esdbserver.Address("nonsense"))
	require.ErrorContains(t, err, "nonsense")
	failing := &broken{Store: newMemory(t)}
	failing.before.Store(true)
	_, err = esdbserver.Start(failing)
	require.ErrorIs(t, err, errBroken)
}
