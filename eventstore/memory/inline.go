package memory

import (
	"context"
	"slices"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

var _ projection.Inliner = (*Store)(nil)

// Inline implements projection.Inliner. Appends then wait for updates of the state,
// and handlers must not call the store.
func (s *Store) Inline(a projection.Appends) (stop func()) {
	registered := &a
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inline = append(slices.Clip(s.inline), registered)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.inline = slices.DeleteFunc(slices.Clone(s.inline), func(other *projection.Appends) bool { return other == registered })
	}
}

// UpdateAtHead implements projection.Inliner: whoever has called Inline has
// appends wait for updates.
func (s *Store) UpdateAtHead(ctx context.Context, fn func(tx projection.StateTx, head eventstore.Position) error) error {
	return s.Update(ctx, func(tx projection.StateTx) error {
		head, err := s.Head(ctx)
		if err != nil {
			return err
		}
		return fn(tx, head)
	})
}

// appendInline is append where there is something to apply. It takes the turn of
// updates, and the lock in it.
func (s *Store) appendInline(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if err := s.takeTurn(ctx); err != nil {
		return eventstore.Receipt{}, err
	}
	defer s.endTurn()
	s.mu.Lock()
	defer s.mu.Unlock()
	if first, done, err := s.judge(c); done || err != nil {
		return first, err
	}
	base := s.state.committed.Load()
	tx := &appendTx{transaction: s.state.transaction(base)}
	defer tx.end()
	recorded := s.record(c)
	var begun []projection.Appending
	for _, a := range s.inline {
		b, err := (*a).Begin(ctx, tx, eventstore.Position(len(s.log)), nil)
		if err == nil {
			err = b.Apply(ctx, owned(recorded))
		}
		if err == nil {
			err = b.End(ctx, eventstore.Position(len(s.log)+len(recorded)))
		}
		if err == nil {
			err = tx.failed
		}
		if err != nil {
			return eventstore.Receipt{}, err
		}
		begun = append(begun, b)
	}
	receipt := s.add(c, recorded)
	s.state.committed.Store(&tx.snapshot)
	for _, b := range begun {
		b.Committed()
	}
	return receipt, nil
}

// owned returns the events such that handlers may change them, which they must not
// do to those of the log.
func owned(events []eventstore.Recorded) []eventstore.Recorded {
	all := slices.Clone(events)
	for i := range all {
		all[i].Tags, all[i].Data = slices.Clone(all[i].Tags), slices.Clone(all[i].Data)
	}
	return all
}

// appendTx implements projection.AppendTx.
type appendTx struct {
	*transaction
	held map[string]bool
}

// Hold implements projection.AppendTx.
func (t *appendTx) Hold(names []string, reads ...projection.Read) (map[string]projection.Held, error) {
	if err := t.writable(); err != nil {
		return nil, err
	}
	found := map[string]projection.Held{}
	for _, name := range names {
		l := t.leases[name]
		if l.Epoch == 0 || t.held[name] {
			continue
		}
		if t.held == nil {
			t.held = map[string]bool{}
		}
		t.held[name] = true
		c, _ := t.checkpoints.Get(name)
		found[name] = projection.Held{Lease: l.Lease, Checkpoint: c}
	}
	for _, r := range reads {
		for i, key := range r.Keys {
			value, there, err := t.Get(r.Table, key)
			if err != nil {
				return nil, err
			}
			if there {
				r.Found(i, value)
			}
		}
	}
	return found, nil
}
