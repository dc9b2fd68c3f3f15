package sagatest

import (
	"context"
	"iter"
	"strings"
	"sync"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Backend is a store with the state beside it.
type Backend interface {
	eventstore.Store
	projection.State
}

// mortal is the store as one life of an engine sees it. It dies at a given
// write, before or after it is done; from then on everything fails, as for a
// process that is no more. Writes are the appends, and the transactions of the
// state in which a step does something.
type mortal struct {
	store Backend

	mu     sync.Mutex
	writes int
	dieAt  int // 0: never
	after  bool
	dead   bool
	// died is closed at death.
	died chan struct{}
}

var (
	_ eventstore.Store = (*mortal)(nil)
	_ projection.State = (*mortal)(nil)
)

func newMortal(store Backend, dieAt int, after bool) *mortal {
	return &mortal{store: store, dieAt: dieAt, after: after, died: make(chan struct{})}
}

func (m *mortal) alive() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return eventstore.ErrClosed
	}
	return nil
}

func (m *mortal) isDead() bool { return m.alive() != nil }

func (m *mortal) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.writes
}

// write counts a write that is about to be done, and reports whether it is the
// last one. The error says that it is not to be done.
func (m *mortal) write() (last bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return false, eventstore.ErrClosed
	}
	if m.writes++; m.writes != m.dieAt {
		return false, nil
	}
	if !m.after {
		m.die()
		return false, eventstore.ErrClosed
	}
	return true, nil
}

// die is called with the lock.
func (m *mortal) die() {
	if !m.dead {
		m.dead = true
		close(m.died)
	}
}

// written ends a write: whoever is dead does not learn what came of it.
func (m *mortal) written(last bool, err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if last {
		m.die()
	}
	if m.dead {
		return eventstore.ErrClosed
	}
	return err
}

// Append implements eventstore.Store.
func (m *mortal) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	last, err := m.write()
	if err != nil {
		return eventstore.Receipt{}, err
	}
	receipt, err := m.store.Append(ctx, c)
	if err = m.written(last, err); err != nil {
		return eventstore.Receipt{}, err
	}
	return receipt, nil
}

// Lookup implements eventstore.Store.
func (m *mortal) Lookup(ctx context.Context, s eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	if err := m.alive(); err != nil {
		return eventstore.Receipt{}, false, err
	}
	return m.store.Lookup(ctx, s, key)
}

// Read implements eventstore.Store.
func (m *mortal) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	if err := m.alive(); err != nil {
		return func(yield func(eventstore.Recorded, error) bool) { yield(eventstore.Recorded{}, err) }
	}
	return m.store.Read(ctx, q, o)
}

// Subscribe implements eventstore.Store.
func (m *mortal) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		watched := make(chan struct{})
		defer func() { <-watched }()
		defer cancel()
		go func() {
			defer close(watched)
			select {
			case <-m.died:
				cancel()
			case <-ctx.Done():
			}
		}()
		for batch, err := range m.store.Subscribe(ctx, q, after) {
			if dead := m.alive(); dead != nil {
				yield(eventstore.Batch{}, dead)
				return
			}
			if !yield(batch, err) {
				return
			}
		}
	}
}

// Head implements eventstore.Store.
func (m *mortal) Head(ctx context.Context) (eventstore.Position, error) {
	if err := m.alive(); err != nil {
		return 0, err
	}
	return m.store.Head(ctx)
}

// LogID implements eventstore.Identified.
func (m *mortal) LogID(ctx context.Context) (string, error) { return eventstore.LogID(ctx, m.store) }

// Update implements projection.State.
func (m *mortal) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := m.alive(); err != nil {
		return err
	}
	var counted, last bool
	err := m.store.Update(ctx, func(tx projection.StateTx) error {
		acting := &actingTx{StateTx: tx}
		if err := fn(acting); err != nil {
			return err
		}
		if !acting.acted || counted {
			return m.alive()
		}
		counted = true
		var err error
		last, err = m.write()
		return err
	})
	return m.written(last, err)
}

// actingTx notices that a step does something in the transaction.
type actingTx struct {
	projection.StateTx
	acted bool
}

// Unwrap gives backends their transaction.
func (t *actingTx) Unwrap() projection.Tx { return t.StateTx }

// Put implements projection.StateTx. The engine enters the steps that are done in
// a table of the saga's, before their transaction ends.
func (t *actingTx) Put(table, key string, value []byte) error {
	t.acted = t.acted || strings.HasPrefix(table, "saga.") && strings.HasSuffix(table, ".tx")
	return t.StateTx.Put(table, key, value)
}

// View implements projection.State.
func (m *mortal) View(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := m.alive(); err != nil {
		return err
	}
	return m.store.View(ctx, fn)
}

// Acquire implements projection.State.
func (m *mortal) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	if err := m.alive(); err != nil {
		return projection.Lease{}, err
	}
	return m.store.Acquire(ctx, name, owner, ttl)
}

// Renew implements projection.State.
func (m *mortal) Renew(ctx context.Context, l projection.Lease, ttl time.Duration) (projection.Lease, error) {
	if err := m.alive(); err != nil {
		return projection.Lease{}, err
	}
	return m.store.Renew(ctx, l, ttl)
}

// Release implements projection.State.
func (m *mortal) Release(ctx context.Context, l projection.Lease) error {
	if err := m.alive(); err != nil {
		return err
	}
	return m.store.Release(ctx, l)
}
