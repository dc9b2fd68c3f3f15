package deed

import (
	"context"

	jsonv1 "github.com/go-json-experiment/json/v1"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// snapshotTable keeps aggregate snapshots in the state; like everything there
// they can be thrown away.
type snapshotTable struct{ state projection.State }

const snapshotRows = "deed.snapshots"

// LoadSnapshot implements aggregate.SnapshotStore.
func (s snapshotTable) LoadSnapshot(ctx context.Context, stream eventstore.Stream) (aggregate.Snapshot, bool, error) {
	var snapshot aggregate.Snapshot
	found := false
	err := s.state.View(ctx, func(tx projection.StateTx) error {
		value, ok, err := tx.Get(snapshotRows, stream.String())
		if err != nil || !ok {
			return err
		}
		// A snapshot is a hint: one that does not decode is no snapshot.
		found = jsonv1.Unmarshal(value, &snapshot) == nil
		return nil
	})
	return snapshot, found, err
}

// SaveSnapshot implements aggregate.SnapshotStore.
func (s snapshotTable) SaveSnapshot(ctx context.Context, snapshot aggregate.Snapshot) error {
	value, err := jsonv1.Marshal(snapshot)
	if err != nil {
		return err
	}
	return s.state.Update(ctx, func(tx projection.StateTx) error {
		return tx.Put(snapshotRows, snapshot.Stream.String(), value)
	})
}
