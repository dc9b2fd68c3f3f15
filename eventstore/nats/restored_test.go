package nats

import (
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

// A process that has only read where a stream ends, and a server that was restored and went on.
func TestStore_RestoredHead(t *testing.T) {
	t.Parallel()
	directory, backup := t.TempDir(), t.TempDir()
	c, err := natsserver.Start(natsserver.Options{Directory: directory})
	require.NoError(t, err)
	defer c.Close()
	store, name := openLog(t, c)
	ann := account("ann")
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("bob"), 1)})
	require.NoError(t, err)
	c.Stop(0)
	require.NoError(t, os.CopyFS(backup, os.DirFS(directory)))
	require.NoError(t, c.Start(0))
	other := reopenLog(t, c, name)
	_, err = other.Append(t.Context(), eventstore.Commit{Events: happened(ann, 2)}) // 2 and 3
	require.NoError(t, err)
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}})
	require.ErrorIs(t, err, eventstore.ErrConflict)
	c.Stop(0)
	require.NoError(t, os.RemoveAll(directory))
	require.NoError(t, os.CopyFS(directory, os.DirFS(backup)))
	require.NoError(t, c.Start(0))
	third := reopenLog(t, c, name)
	_, err = third.Append(t.Context(), eventstore.Commit{Events: append(happened(account("eve"), 1), happened(ann, 1)...)}) // 2 and 3
	require.NoError(t, err)
	require.Eventually(t, func() bool { return store.conn.IsConnected() }, 10*time.Second, time.Millisecond)
	_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 1)})
	t.Logf("%v", err)
	var versions []uint64
	for e, err := range third.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		if e.Stream == ann {
			versions = append(versions, e.Version)
		}
	}
	require.NotEqual(t, []uint64{1, 3}, versions, "ann has versions %v", versions)
}
