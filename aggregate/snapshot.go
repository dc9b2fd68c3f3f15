package aggregate

import (
	"context"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// Snapshot is the state of an aggregate at a revision. It is only a hint: one
// that is lost, damaged or outdated costs time, never correctness.
type Snapshot struct {
	Stream   eventstore.Stream   `json:"stream"`
	Revision eventstore.Revision `json:"revision"`
	// LastEvent is the id of the event at the revision.
	LastEvent uuid.UUID `json:"lastEvent"`
	// Fingerprint says which program can use the snapshot.
	Fingerprint string `json:"fingerprint"`
	// State is the state as JSON.
	State []byte `json:"state"`
}

// SnapshotStore keeps the latest snapshot of each stream. It may lose
// snapshots, and return old ones. Implementations are safe for concurrent use
// and do not change or keep the State they are given or return beyond what is
// needed to store it.
type SnapshotStore interface {
	// LoadSnapshot returns the stream's snapshot, or false if there is none.
	LoadSnapshot(ctx context.Context, stream eventstore.Stream) (Snapshot, bool, error)
	// SaveSnapshot replaces the stream's snapshot.
	SaveSnapshot(ctx context.Context, snapshot Snapshot) error
}
