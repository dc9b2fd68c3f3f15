package aggregate

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/alike"
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
// and never change the bytes they are given or return.
type SnapshotStore interface {
	// LoadSnapshot returns the stream's snapshot, or false if there is none.
	LoadSnapshot(ctx context.Context, stream eventstore.Stream) (Snapshot, bool, error)
	// SaveSnapshot replaces the stream's snapshot.
	SaveSnapshot(ctx context.Context, snapshot Snapshot) error
}

// fingerprint adds to the definition's structure how its events are decoded.
func fingerprint[S any](r *Runtime, def *Definition[S]) string {
	if known, ok := r.fingerprints.Load(def); ok {
		return known.(string)
	}
	h := sha256.New()
	// The first word says how a state is found fit to be kept.
	_, _ = fmt.Fprintf(h, "identical %s %q", def.structure, r.options.Encoding.StoredTypes(def.names...))
	for _, name := range def.names {
		version, codec := r.options.Encoding.Schema(name)
		_, _ = fmt.Fprintf(h, " %d %q", version, codec)
	}
	f := hex.EncodeToString(h.Sum(nil)[:16])
	r.fingerprints.Store(def, f)
	return f
}

// loadFromSnapshot reports false when there is no snapshot that fits; only ctx
// and the log can make it fail.
func loadFromSnapshot[S any](ctx context.Context, r *Runtime, def *Definition[S], stream eventstore.Stream) (history[S], bool, error) {
	ignore := func(why error) (history[S], bool, error) {
		if err := ctx.Err(); err != nil {
			return history[S]{}, false, fmt.Errorf("load %q: %w", stream, err)
		}
		r.options.Logger.WarnContext(ctx, "deed: a snapshot is ignored", "stream", stream.String(), "error", why)
		return history[S]{}, false, nil
	}
	snapshot, ok, err := r.options.Snapshots.LoadSnapshot(ctx, stream)
	if err != nil {
		return ignore(err)
	}
	if !ok || snapshot.Stream != stream || snapshot.Revision.Version == 0 || snapshot.Revision.Position == 0 || snapshot.Fingerprint != fingerprint(r, def) {
		return history[S]{}, false, nil
	}
	h := history[S]{hinted: true}
	if err := fromJSON(snapshot.State, &h.state); err != nil {
		return ignore(err)
	}
	h.at, h.last = snapshot.Revision, snapshot.LastEvent
	// The read begins with the snapshot's own last event, to see that it is there.
	anchored := false
	for e, err := range r.store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{After: snapshot.Revision.Position - 1}) {
		if err != nil {
			return history[S]{}, false, fmt.Errorf("load %q: %w", stream, err)
		}
		if !anchored {
			if e.Revision() != snapshot.Revision || e.ID != snapshot.LastEvent {
				break
			}
			anchored = true
			continue
		}
		if err := h.add(def, r.options.Encoding, &e); err != nil {
			return ignore(err)
		}
	}
	if !anchored {
		return ignore(errors.New("the stream does not have its revision"))
	}
	return h, true, nil
}

// picture returns the state as JSON, or nil if it does not come back as it was:
// decisions on what comes back could be others.
func (a *activation[S]) picture() []byte {
	data, err := throughJSON(&a.state)
	if err == nil {
		return data
	}
	r := a.runtime
	r.count(r.unfit, 1, a.stream.Category)
	if _, told := r.unfitTold.LoadOrStore(a.def, true); !told {
		r.options.Logger.Warn("deed: no snapshot is taken", "stream", a.stream.String(), "error", err)
	}
	return nil
}

func throughJSON[S any](state *S) (data []byte, err error) {
	defer caught(&err, func() string { return fmt.Sprintf("the JSON of %T", *state) })
	if data, err = eventstore.JSON().Marshal(state); err != nil {
		return nil, err
	}
	var back S
	if err := eventstore.JSON().Unmarshal(data, &back); err != nil {
		return nil, err
	}
	if !alike.Identical(*state, back) {
		return nil, fmt.Errorf("%T is not the same after JSON (nil and empty slices and maps differ, and so do the locations of times)", back)
	}
	return data, nil
}

func fromJSON[S any](data []byte, state *S) (err error) {
	defer caught(&err, func() string { return fmt.Sprintf("decoding a snapshot of %T", *state) })
	return eventstore.JSON().Unmarshal(data, state)
}

// snapshotDue says whether a snapshot should follow the step from one version
// to another.
func (a *activation[S]) snapshotDue(from, to uint64) bool {
	every := uint64(a.def.snapshotEvery)
	return every > 0 && a.runtime.options.Snapshots != nil && from/every != to/every
}

// snapshotQueue holds what is to be kept: the latest picture of each stream.
// The goroutine that keeps them exists while there are any.
type snapshotQueue struct {
	running bool
	latest  map[eventstore.Stream]Snapshot
}

func (a *activation[S]) keep(state []byte, at eventstore.Revision, last uuid.UUID) {
	r := a.runtime
	s := Snapshot{Stream: a.stream, Revision: at, LastEvent: last, Fingerprint: fingerprint(r, a.def), State: state}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.snapshots.latest == nil {
		r.snapshots.latest = map[eventstore.Stream]Snapshot{}
	}
	r.snapshots.latest[s.Stream] = s
	if !r.snapshots.running {
		r.snapshots.running = true
		go r.keepSnapshots()
	}
}

func (r *Runtime) keepSnapshots() {
	done := false
	defer func() {
		if !done { // the store ended the goroutine
			go r.keepSnapshots()
		}
	}()
	for {
		r.mu.Lock()
		batch := r.snapshots.latest
		r.snapshots.latest = nil
		if len(batch) == 0 || r.life.Err() != nil {
			r.snapshots.running = false
			r.closeIfDrained()
			r.mu.Unlock()
			done = true
			return
		}
		r.mu.Unlock()
		for _, s := range batch {
			if err := r.saveSnapshot(s); err != nil && r.life.Err() == nil {
				r.options.Logger.Warn("deed: a snapshot was not kept", "stream", s.Stream.String(), "error", err)
			}
		}
	}
}

func (r *Runtime) saveSnapshot(s Snapshot) (err error) {
	defer caught(&err, func() string { return fmt.Sprintf("keeping the snapshot of %q", s.Stream) })
	return r.options.Snapshots.SaveSnapshot(r.life, s)
}
