package saga

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/projection"
)

// How long leases that are kept apart from the state live. An owner relies on
// its own for less: it stops that much earlier, by its own clock, than the lease
// can end, which is more than for how long it acts without looking (sureFor).
const (
	defaultLeaseTTL  = 10 * time.Second
	shortestLeaseTTL = 6 * time.Second
	leaseReserve     = sureFor + time.Second
	// renewPause is between two attempts to renew a lease where leases cannot be reached.
	renewPause = 100 * time.Millisecond
)

// leasedState is the state of this node alone, with leases that count among the
// nodes. What it keeps is the node's own, so nobody can spoil it; a lease says who
// runs a process. The lease in the state is acquired as well: it fences what this
// very node has begun under an earlier one.
type leasedState struct {
	projection.State
	leases ownership.Leases
	ttl    time.Duration
	logger *slog.Logger

	mu   sync.Mutex
	held map[string]*heldLease
}

// heldLease is one that this node has, or had.
type heldLease struct {
	epoch  uint64 // in the state
	lease  ownership.Lease
	asked  time.Time // when the call began that has acquired or renewed it
	lost   error
	remote sync.Mutex // one call at a time
}

func newLeasedState(state projection.State, leases ownership.Leases, ttl time.Duration, logger *slog.Logger) *leasedState {
	return &leasedState{State: state, leases: leases, ttl: ttl, logger: logger, held: map[string]*heldLease{}}
}

// Shared says that others may take the lease, see [projection.Shared].
func (*leasedState) Shared() bool { return true }

// trusted is for how long after it was asked for a lease is relied on.
func (s *leasedState) trusted() time.Duration { return s.ttl - leaseReserve }

// of returns the lease if it is the node's last one of the name.
func (s *leasedState) of(lease projection.Lease) *heldLease {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.held[lease.Name]; h != nil && h.epoch == lease.Epoch {
		return h
	}
	return nil
}

// check fails when the lease may have ended.
func (s *leasedState) check(lease projection.Lease) error {
	h := s.of(lease)
	if h == nil {
		return fmt.Errorf("%w: %q was acquired again", projection.ErrFenced, lease.Name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.lost != nil {
		return h.lost
	}
	// Of the two clocks one may have stood still while the process did.
	now := time.Now()
	byWall := now.Round(0).Sub(h.asked.Round(0))
	if now.Sub(h.asked) >= s.trusted() || byWall < 0 || byWall >= s.trusted() {
		h.lost = fmt.Errorf("%q: %w", lease.Name, ErrLeaseExpired)
		return h.lost
	}
	return nil
}

// Acquire implements projection.State.
func (s *leasedState) Acquire(ctx context.Context, name, owner string, _ time.Duration) (projection.Lease, error) {
	asked := time.Now()
	lease, err := s.leases.Acquire(ctx, name, owner, s.ttl)
	if errors.Is(err, ownership.ErrHeld) {
		return projection.Lease{}, fmt.Errorf("%w: %w", projection.ErrLeaseHeld, err)
	}
	if err != nil {
		return projection.Lease{}, err
	}
	own, err := s.State.Acquire(ctx, name, owner, 0)
	if err != nil {
		if failure := s.leases.Release(context.WithoutCancel(ctx), lease); failure != nil {
			s.logger.Warn("a lease that cannot be used could not be released; it ends by itself", "lease", name, "error", failure)
		}
		return projection.Lease{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[name] = &heldLease{epoch: own.Epoch, lease: lease, asked: asked}
	return own, nil
}

// Renew implements projection.State. It tries until the lease may have ended.
func (s *leasedState) Renew(ctx context.Context, lease projection.Lease, _ time.Duration) (projection.Lease, error) {
	for told := false; ; {
		if err := s.check(lease); err != nil {
			return projection.Lease{}, err
		}
		err := s.renew(ctx, lease)
		if err == nil || errors.Is(err, projection.ErrFenced) {
			return lease, err
		}
		if !told && ctx.Err() == nil {
			told = true
			s.logger.Warn("the lease could not be renewed; it is tried again until it may have ended", "lease", lease.Name, "error", err)
		}
		if !pause(ctx, renewPause) {
			return projection.Lease{}, ctx.Err()
		}
	}
}

func (s *leasedState) renew(ctx context.Context, lease projection.Lease) error {
	h := s.of(lease)
	if h == nil {
		return s.check(lease)
	}
	h.remote.Lock()
	defer h.remote.Unlock()
	s.mu.Lock()
	was, deadline := h.lease, h.asked.Add(s.trusted())
	s.mu.Unlock()
	once, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	asked := time.Now()
	renewed, err := s.leases.Renew(once, was, s.ttl)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case errors.Is(err, ownership.ErrLost):
		h.lost = fmt.Errorf("%w: %w", projection.ErrFenced, err)
		return h.lost
	case err != nil:
		return err
	}
	h.lease, h.asked = renewed, asked
	return nil
}

// Release implements projection.State.
func (s *leasedState) Release(ctx context.Context, lease projection.Lease) error {
	h := s.of(lease)
	if h == nil {
		return nil
	}
	h.remote.Lock()
	defer h.remote.Unlock()
	s.mu.Lock()
	was := h.lease
	s.mu.Unlock()
	// The state first: what is still under way here is fenced before another node begins.
	if err := s.State.Release(ctx, lease); err != nil {
		return err
	}
	if err := s.leases.Release(ctx, was); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[lease.Name] == h {
		delete(s.held, lease.Name)
	}
	return nil
}

// Update implements projection.State.
func (s *leasedState) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	return s.State.Update(ctx, func(tx projection.StateTx) error {
		t := &leasedTx{StateTx: tx, state: s}
		if err := fn(t); err != nil {
			return err
		}
		return t.lost
	})
}

// leasedTx also looks at the time that the lease has.
type leasedTx struct {
	projection.StateTx
	state *leasedState
	lost  error
}

func (t *leasedTx) check(lease projection.Lease) error {
	if err := t.state.check(lease); err != nil {
		t.lost = err
	}
	return t.lost
}

// Fence implements projection.StateTx.
func (t *leasedTx) Fence(lease projection.Lease) error {
	if err := t.check(lease); err != nil {
		return err
	}
	return t.StateTx.Fence(lease)
}

// SetCheckpoint implements projection.StateTx.
func (t *leasedTx) SetCheckpoint(lease projection.Lease, from, to projection.Checkpoint) error {
	if err := t.check(lease); err != nil {
		return err
	}
	return t.StateTx.SetCheckpoint(lease, from, to)
}

// DeleteCheckpoint implements projection.StateTx.
func (t *leasedTx) DeleteCheckpoint(lease projection.Lease) error {
	if err := t.check(lease); err != nil {
		return err
	}
	return t.StateTx.DeleteCheckpoint(lease)
}
