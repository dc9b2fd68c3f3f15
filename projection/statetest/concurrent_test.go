package statetest

import (
	"context"
	"errors"
	"iter"
	"sync"
	"testing"
	"time"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// concurrent is a state that works as one on a server does: updates run at the
// same time, each statement sees what is committed by then, and fencing locks
// the lease until the end of the transaction.
type concurrent struct {
	*memory.Store
	mu    sync.Mutex
	locks map[string]chan struct{}

	// What a test breaks.
	free        bool // Fence checks the lease, and locks nothing
	compareOnly bool // SetCheckpoint does so
	stubborn    bool // waiting for a lock outlives the context
}

func newConcurrent() *concurrent {
	return &concurrent{Store: memory.New(), locks: map[string]chan struct{}{}}
}

func (*concurrent) Shared() bool { return true }

func (c *concurrent) lock(ctx context.Context, name string) (unlock func(), err error) {
	c.mu.Lock()
	l := c.locks[name]
	if l == nil {
		l = make(chan struct{}, 1)
		c.locks[name] = l
	}
	c.mu.Unlock()
	if c.stubborn {
		ctx = context.WithoutCancel(ctx)
	}
	select {
	case l <- struct{}{}:
		return func() { <-l }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (c *concurrent) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	unlock, err := c.lock(ctx, name)
	if err != nil {
		return projection.Lease{}, err
	}
	defer unlock()
	return c.Store.Acquire(ctx, name, owner, ttl)
}

func (c *concurrent) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := c.View(ctx, func(projection.StateTx) error { return nil }); err != nil {
		return err
	}
	tx := &concurrentTx{ctx: ctx, state: c, locked: map[string]func(){}}
	defer func() {
		for _, unlock := range tx.locked {
			unlock()
		}
	}()
	if err := fn(tx); err != nil {
		return err
	}
	if tx.failed != nil {
		return tx.failed
	}
	return c.Store.Update(ctx, func(to projection.StateTx) error { return tx.replay(to) })
}

type concurrentTx struct {
	projection.StateTx // SQL is not asked for
	ctx                context.Context
	state              *concurrent
	locked             map[string]func()
	writes             []func(projection.StateTx) error
	failed             error
}

func (t *concurrentTx) replay(to projection.StateTx) error {
	for _, write := range t.writes {
		if err := write(to); err != nil {
			return err
		}
	}
	return nil
}

func (t *concurrentTx) write(w func(projection.StateTx) error) error {
	if t.failed != nil {
		return t.failed
	}
	t.writes = append(t.writes, w)
	return nil
}

// read runs fn on what is committed by now and on what the transaction has written.
func (t *concurrentTx) read(fn func(projection.StateTx)) error {
	err := t.state.Store.Update(t.ctx, func(tx projection.StateTx) error {
		if err := t.replay(tx); err != nil {
			return err
		}
		fn(tx)
		return errUndo
	})
	if errors.Is(err, errUndo) {
		return nil
	}
	return err
}

var errUndo = errors.New("only read")

func (t *concurrentTx) fence(l projection.Lease, free bool) error {
	if t.failed != nil {
		return t.failed
	}
	if t.locked[l.Name] == nil && !free {
		unlock, err := t.state.lock(t.ctx, l.Name)
		if err != nil {
			return err
		}
		t.locked[l.Name] = unlock
	}
	t.failed = t.state.Store.Update(t.ctx, func(tx projection.StateTx) error { return tx.Fence(l) })
	return t.failed
}

func (t *concurrentTx) Fence(l projection.Lease) error { return t.fence(l, t.state.free) }

func (t *concurrentTx) Checkpoint(name string) (at projection.Checkpoint, err error) {
	failed := t.read(func(tx projection.StateTx) { at, err = tx.Checkpoint(name) })
	return at, firstOf(failed, err)
}

func (t *concurrentTx) SetCheckpoint(l projection.Lease, from, to projection.Checkpoint) error {
	if err := t.fence(l, t.state.compareOnly); err != nil {
		return err
	}
	is, err := t.Checkpoint(l.Name)
	if err != nil {
		return err
	}
	if is.Log != from.Log || is.Position != from.Position {
		t.failed = projection.ErrFenced
		return t.failed
	}
	return t.write(func(tx projection.StateTx) error {
		is, err := tx.Checkpoint(l.Name)
		return firstOf(err, tx.SetCheckpoint(l, is, to))
	})
}

func (t *concurrentTx) DeleteCheckpoint(l projection.Lease) error {
	if err := t.Fence(l); err != nil {
		return err
	}
	return t.write(func(tx projection.StateTx) error { return tx.DeleteCheckpoint(l) })
}

func (t *concurrentTx) Get(table, key string) (value []byte, ok bool, err error) {
	failed := t.read(func(tx projection.StateTx) { value, ok, err = tx.Get(table, key) })
	return value, ok, firstOf(failed, err)
}

func (t *concurrentTx) Put(table, key string, value []byte) error {
	return t.write(func(tx projection.StateTx) error { return tx.Put(table, key, value) })
}

func (t *concurrentTx) Delete(table, key string) error {
	return t.write(func(tx projection.StateTx) error { return tx.Delete(table, key) })
}

func (t *concurrentTx) Clear(table string) error {
	return t.write(func(tx projection.StateTx) error { return tx.Clear(table) })
}

func (t *concurrentTx) Scan(table string, r projection.Range) iter.Seq2[projection.Row, error] {
	return func(yield func(projection.Row, error) bool) {
		var rows []projection.Row
		var err error
		failed := t.read(func(tx projection.StateTx) {
			for row, wrong := range tx.Scan(table, r) {
				rows, err = append(rows, row), firstOf(err, wrong)
			}
		})
		if err := firstOf(failed, err); err != nil {
			yield(projection.Row{}, err)
			return
		}
		for _, row := range rows {
			if !yield(row, nil) {
				return
			}
		}
	}
}

func (t *concurrentTx) Exec(ctx context.Context, query string, args ...any) (n int64, err error) {
	failed := t.read(func(tx projection.StateTx) { n, err = tx.Exec(ctx, query, args...) })
	return n, firstOf(failed, err)
}

func (t *concurrentTx) Query(ctx context.Context, query string, args ...any) (rows projection.Rows, err error) {
	failed := t.read(func(tx projection.StateTx) { rows, err = tx.Query(ctx, query, args...) })
	return rows, firstOf(failed, err)
}

func firstOf(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// A state whose updates run at the same time can pass.
func TestRun_Concurrent(t *testing.T) {
	t.Parallel()
	Run(t, func(testing.TB) Opener { return func() (State, error) { return newConcurrent(), nil } }, Features{Shared: true, ConcurrentUpdates: true})
}
