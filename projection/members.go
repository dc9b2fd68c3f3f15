package projection

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/deed-go/deed/internal/ownership"
)

// Members is where the nodes of an application that share a [State] find each
// other, for the application that divides work among them. Its type is deed's
// own; see package internal/ownership. An error wrapping errors.ErrUnsupported
// says that the state is no [CheckpointLister].
//
// A member has a slot: the first lease of member.0, member.1, … that is free,
// so that slots are not used up by nodes that come and go. Whether it is alive is
// thus judged by the backend's clock. What it offers is a row beside the lease,
// which counts as long as the lease is the one it was written under.
//
// A Members serves one node.
func Members(s State) (ownership.Directory, error) {
	lister, ok := s.(CheckpointLister)
	if !ok {
		return nil, fmt.Errorf("find other nodes in %T: it does not list its leases: %w", s, errors.ErrUnsupported)
	}
	m := &members{state: s, lister: lister}
	if teller, ok := s.(releaseTeller); ok {
		return &toldMembers{m, teller}, nil
	}
	return m, nil
}

// releaseTeller is a state that tells of the leases that other processes release.
type releaseTeller interface {
	// Released returns a channel on which the names come until ctx ends, which closes
	// it. It is a hint.
	Released(ctx context.Context) <-chan string
}

// toldMembers are members that hear of those who leave.
type toldMembers struct {
	*members
	teller releaseTeller
}

// Watch is ownership.Directory's.
func (m *toldMembers) Watch(ctx context.Context) (<-chan struct{}, error) {
	names := m.teller.Released(ctx)
	left := make(chan struct{}, 1)
	go func() { // until ctx ends
		defer close(left)
		for name := range names {
			if strings.HasPrefix(name, memberPrefix) {
				select {
				case left <- struct{}{}:
				default:
				}
			}
		}
	}()
	return left, nil
}

const (
	memberPrefix = "member."
	memberTable  = "members"
	// readOffers is how often it is read again what members offer, who then say so
	// under the same lease: seldom, as when the code of a projection has failed.
	readOffers = time.Second
)

// members implements ownership.Directory.
type members struct {
	state  State
	lister CheckpointLister

	mu      sync.Mutex // held during calls: they are made one after the other
	slot    Lease      // epoch 0: none
	written []string   // what its row says; nil: not known
	rows    map[string]memberRow
	readAt  time.Time
}

// memberRow is what is stored under a slot.
type memberRow struct {
	Name  string   `json:"name"`
	Epoch uint64   `json:"epoch"`
	Units []string `json:"units"`
}

// Join implements ownership.Directory.
func (m *members) Join(ctx context.Context, self ownership.Member, ttl time.Duration) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.slot.Epoch == 0 {
		if err := m.take(ctx, self.Name, ttl); err != nil {
			return err
		}
	} else {
		slot, err := m.state.Renew(ctx, m.slot, ttl)
		if errors.Is(err, ErrFenced) {
			m.slot = Lease{}
			return fmt.Errorf("%w: %w", ownership.ErrReplaced, err)
		}
		if err != nil {
			return err
		}
		m.slot = slot
	}
	if m.written != nil && slices.Equal(m.written, self.Units) {
		return nil
	}
	row, err := json.Marshal(memberRow{Name: self.Name, Epoch: m.slot.Epoch, Units: self.Units})
	if err != nil {
		return err
	}
	m.written, m.rows = nil, nil
	err = m.state.Update(ctx, func(tx StateTx) error {
		if err := tx.Fence(m.slot); err != nil {
			return err
		}
		return tx.Put(memberTable, m.slot.Name, row)
	})
	if errors.Is(err, ErrFenced) {
		m.slot = Lease{}
		return fmt.Errorf("%w: %w", ownership.ErrReplaced, err)
	}
	if err == nil {
		m.written = append([]string{}, self.Units...)
	}
	return err
}

// take acquires the first slot that is free.
func (m *members) take(ctx context.Context, name string, ttl time.Duration) error {
	m.written = nil
	known, err := m.lister.Checkpoints(ctx)
	if err != nil {
		return err
	}
	held := map[string]bool{}
	for i := range known {
		held[known[i].Name] = known[i].Held
	}
	for n := 0; ; n++ {
		slot := memberPrefix + strconv.Itoa(n)
		if held[slot] {
			continue
		}
		lease, err := m.state.Acquire(ctx, slot, name, ttl)
		if errors.Is(err, ErrLeaseHeld) {
			continue // somebody was faster
		}
		if err == nil {
			m.slot = lease
		}
		return err
	}
}

// Leave implements ownership.Directory.
func (m *members) Leave(ctx context.Context, _ string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.slot.Epoch == 0 {
		return nil
	}
	err := m.state.Release(ctx, m.slot)
	if err == nil {
		m.slot = Lease{}
	}
	return err
}

// Members implements ownership.Directory. It asks for the leases each time, and
// for the rows when there is a lease whose row is not known, and now and then.
func (m *members) Members(ctx context.Context) ([]ownership.Member, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	known, err := m.lister.Checkpoints(ctx)
	if err != nil {
		return nil, err
	}
	var alive []Lease
	stale := m.rows == nil || time.Since(m.readAt) >= readOffers
	for i := range known {
		if known[i].Held && strings.HasPrefix(known[i].Name, memberPrefix) {
			alive = append(alive, known[i].Lease)
			stale = stale || m.rows[known[i].Name].Epoch != known[i].Lease.Epoch
		}
	}
	if stale {
		at := time.Now()
		rows, err := m.read(ctx)
		if err != nil {
			return nil, err
		}
		m.rows, m.readAt = rows, at
	}
	if m.slot.Epoch > 0 && m.rows[m.slot.Name].Epoch != m.slot.Epoch {
		// Rows are made durable later than leases: the database has lost it in a crash.
		m.written = nil
	}
	var all []ownership.Member
	for _, l := range alive {
		if row := m.rows[l.Name]; row.Epoch == l.Epoch {
			all = append(all, ownership.Member{Name: row.Name, Units: row.Units})
		}
	}
	return all, nil
}

func (m *members) read(ctx context.Context) (map[string]memberRow, error) {
	rows := map[string]memberRow{}
	err := m.state.View(ctx, func(tx StateTx) error {
		for stored, err := range tx.Scan(memberTable, Range{}) {
			if err != nil {
				return err
			}
			var row memberRow
			if json.Unmarshal(stored.Value, &row) == nil { // else it is as if there were none
				rows[stored.Key] = row
			}
		}
		return nil
	})
	return rows, err
}
