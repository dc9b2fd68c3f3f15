package memory

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tidwall/btree"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

var (
	_ projection.State            = (*Store)(nil)
	_ projection.CheckpointLister = (*Store)(nil)
)

// state is what the store keeps beside the log. Committed snapshots are never
// changed: an update works on copies that share everything it does not touch,
// so a view neither waits for an update nor sees half of one.
type state struct {
	turn      chan struct{} // holds a token while nobody updates
	committed atomic.Pointer[snapshot]
	leases    map[string]lease // by name; used by who has the turn
}

type snapshot struct {
	tables      *btree.Map[string, *table]
	checkpoints *btree.Map[string, projection.Checkpoint]
}

type table = btree.Map[string, []byte]

type lease struct {
	projection.Lease
	held bool
}

func newState() *state {
	s := &state{turn: make(chan struct{}, 1), leases: map[string]lease{}}
	s.turn <- struct{}{}
	s.committed.Store(&snapshot{tables: new(btree.Map[string, *table]), checkpoints: new(btree.Map[string, projection.Checkpoint])})
	return s
}

// takeTurn waits until nobody else updates.
func (s *Store) takeTurn(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-s.state.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := s.open(); err != nil {
		s.endTurn()
		return err
	}
	return nil
}

func (s *Store) endTurn() { s.state.turn <- struct{}{} }

func (s *Store) open() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return eventstore.ErrClosed
	}
	return nil
}

// Update implements projection.State. Appends and views go on while fn runs.
func (s *Store) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := s.takeTurn(ctx); err != nil {
		return err
	}
	defer s.endTurn()
	base := s.state.committed.Load()
	tx := s.state.transaction(base)
	defer tx.end()
	if err := fn(tx); err != nil {
		return err
	}
	if tx.failed != nil {
		return tx.failed
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return eventstore.ErrClosed
	}
	s.state.committed.Store(&tx.snapshot)
	return nil
}

// transaction begins an update of the snapshot.
func (s *state) transaction(base *snapshot) *transaction {
	return &transaction{
		snapshot: snapshot{tables: base.tables.Copy(), checkpoints: base.checkpoints.Copy()},
		leases:   s.leases,
		own:      map[string]*table{},
	}
}

// View implements projection.State. It never waits for updates.
func (s *Store) View(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.open(); err != nil {
		return err
	}
	tx := &transaction{snapshot: *s.state.committed.Load(), readOnly: true}
	defer tx.end()
	return fn(tx)
}

// Acquire implements projection.State. It waits for a running update.
func (s *Store) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	if err := s.takeTurn(ctx); err != nil {
		return projection.Lease{}, err
	}
	defer s.endTurn()
	now := s.now()
	was := s.state.leases[name]
	if was.held && was.Owner != owner && (was.Until.IsZero() || now.Before(was.Until)) {
		return projection.Lease{}, fmt.Errorf("%w: %q is held by %q until %s", projection.ErrLeaseHeld, name, was.Owner, until(was.Until))
	}
	l := projection.Lease{Name: name, Owner: owner, Epoch: was.Epoch + 1, Until: deadline(now, ttl)}
	s.state.leases[name] = lease{Lease: l, held: true}
	return l, nil
}

// Renew implements projection.State. It waits for a running update.
func (s *Store) Renew(ctx context.Context, l projection.Lease, ttl time.Duration) (projection.Lease, error) {
	if err := s.takeTurn(ctx); err != nil {
		return projection.Lease{}, err
	}
	defer s.endTurn()
	if err := fence(s.state.leases, l); err != nil {
		return projection.Lease{}, err
	}
	l.Until = deadline(s.now(), ttl)
	s.state.leases[l.Name] = lease{Lease: l, held: true}
	return l, nil
}

// Release implements projection.State. It waits for a running update.
func (s *Store) Release(ctx context.Context, l projection.Lease) error {
	if err := s.takeTurn(ctx); err != nil {
		return err
	}
	defer s.endTurn()
	if fence(s.state.leases, l) == nil {
		s.state.leases[l.Name] = lease{Lease: l, held: false}
	}
	return nil
}

// Checkpoints implements projection.CheckpointLister. It waits for a running
// update.
func (s *Store) Checkpoints(ctx context.Context) ([]projection.NamedCheckpoint, error) {
	if err := s.takeTurn(ctx); err != nil {
		return nil, err
	}
	defer s.endTurn()
	now := s.now()
	known := map[string]projection.NamedCheckpoint{}
	for name, l := range s.state.leases {
		held := l.held && (l.Until.IsZero() || now.Before(l.Until))
		known[name] = projection.NamedCheckpoint{Name: name, Lease: l.Lease, Held: held}
	}
	s.state.committed.Load().checkpoints.Scan(func(name string, c projection.Checkpoint) bool {
		one := known[name]
		one.Name, one.Checkpoint = name, c
		known[name] = one
		return true
	})
	return slices.SortedFunc(maps.Values(known), func(a, b projection.NamedCheckpoint) int {
		return strings.Compare(a.Name, b.Name)
	}), nil
}

func deadline(now time.Time, ttl time.Duration) time.Time {
	if ttl <= 0 {
		return time.Time{}
	}
	return now.Add(ttl)
}

func until(t time.Time) string {
	if t.IsZero() {
		return "released"
	}
	return t.UTC().Format(time.RFC3339Nano)
}

func fence(leases map[string]lease, l projection.Lease) error {
	if now := leases[l.Name]; now.Epoch == 0 || now.Epoch != l.Epoch || now.Owner != l.Owner {
		return fmt.Errorf("%w: lease %q of %q has epoch %d, but epoch %d of %q is current", projection.ErrFenced, l.Name, l.Owner, l.Epoch, now.Epoch, now.Owner)
	}
	return nil
}

// transaction is a snapshot that an update changes and then publishes.
type transaction struct {
	snapshot
	leases   map[string]lease
	own      map[string]*table // the tables copied for this update
	scanning map[string]int    // running scans by table
	readOnly bool
	ended    bool
	failed   error // for good: every later call fails with it
}

var (
	errEnded    = errors.New("transaction used after its function returned")
	errReadOnly = errors.New("write in a read-only transaction: use Update")
	errNoSQL    = fmt.Errorf("SQL in the memory store: %w: use a typed view, or a store with SQL such as sqlite", errors.ErrUnsupported)
)

func (t *transaction) end() { t.ended = true }

func (t *transaction) readable() error {
	if t.ended {
		return errEnded
	}
	return t.failed
}

func (t *transaction) writable() error {
	if t.readOnly && !t.ended {
		return errReadOnly
	}
	return t.readable()
}

// change returns the update's own copy of the table.
func (t *transaction) change(name string) (*table, error) {
	if err := t.writable(); err != nil {
		return nil, err
	}
	if t.scanning[name] > 0 {
		return nil, fmt.Errorf("table %q is changed while it is scanned: end the loop first", name)
	}
	if own, ok := t.own[name]; ok {
		return own, nil
	}
	own := new(table)
	if shared, ok := t.tables.Get(name); ok {
		own = shared.Copy()
	}
	t.own[name] = own
	t.tables.Set(name, own)
	return own, nil
}

func (t *transaction) Checkpoint(name string) (projection.Checkpoint, error) {
	if err := t.readable(); err != nil {
		return projection.Checkpoint{}, err
	}
	c, _ := t.checkpoints.Get(name)
	return c, nil
}

func (t *transaction) SetCheckpoint(l projection.Lease, from, to projection.Checkpoint) error {
	if err := t.Fence(l); err != nil {
		return err
	}
	if is, _ := t.checkpoints.Get(l.Name); is.Log != from.Log || is.Position != from.Position {
		t.failed = fmt.Errorf("%w: checkpoint %q is at position %d of log %q, not at %d of %q", projection.ErrFenced, l.Name, is.Position, is.Log, from.Position, from.Log)
		return t.failed
	}
	to.Epoch = l.Epoch
	t.checkpoints.Set(l.Name, to)
	return nil
}

func (t *transaction) Fence(l projection.Lease) error {
	if err := t.writable(); err != nil {
		return err
	}
	t.failed = fence(t.leases, l)
	return t.failed
}

func (t *transaction) DeleteCheckpoint(l projection.Lease) error {
	if err := t.Fence(l); err != nil {
		return err
	}
	t.checkpoints.Delete(l.Name)
	return nil
}

func (t *transaction) Get(name, key string) ([]byte, bool, error) {
	if err := t.readable(); err != nil {
		return nil, false, err
	}
	rows, ok := t.tables.Get(name)
	if !ok {
		return nil, false, nil
	}
	value, ok := rows.Get(key)
	return value, ok, nil
}

func (t *transaction) Put(name, key string, value []byte) error {
	rows, err := t.change(name)
	if err != nil {
		return err
	}
	rows.Set(key, value)
	return nil
}

func (t *transaction) Delete(name, key string) error {
	rows, err := t.change(name)
	if err != nil {
		return err
	}
	rows.Delete(key)
	return nil
}

func (t *transaction) Clear(name string) error {
	if _, err := t.change(name); err != nil {
		return err
	}
	delete(t.own, name)
	t.tables.Delete(name)
	return nil
}

func (t *transaction) Scan(name string, r projection.Range) iter.Seq2[projection.Row, error] {
	return func(yield func(projection.Row, error) bool) {
		if err := t.readable(); err != nil {
			yield(projection.Row{}, err)
			return
		}
		rows, ok := t.tables.Get(name)
		if !ok {
			return
		}
		if t.scanning == nil {
			t.scanning = map[string]int{}
		}
		t.scanning[name]++
		defer func() { t.scanning[name]-- }()
		left := r.Limit
		give := func(key string, value []byte) bool {
			if !yield(projection.Row{Key: key, Value: value}, nil) {
				return false
			}
			left--
			return left != 0
		}
		if r.Backward {
			backward(rows, r, give)
		} else {
			forward(rows, r, give)
		}
	}
}

func forward(rows *table, r projection.Range, give func(string, []byte) bool) {
	rows.Ascend(max(r.Prefix, r.After), func(key string, value []byte) bool {
		switch {
		case r.After != "" && key <= r.After:
			return true
		case !strings.HasPrefix(key, r.Prefix), r.Through != "" && key > r.Through:
			return false
		}
		return give(key, value)
	})
}

func backward(rows *table, r projection.Range, give func(string, []byte) bool) {
	visit := func(key string, value []byte) bool {
		switch {
		case r.After != "" && key >= r.After, key > r.Prefix && !strings.HasPrefix(key, r.Prefix):
			return true
		case !strings.HasPrefix(key, r.Prefix), r.Through != "" && key < r.Through:
			return false
		}
		return give(key, value)
	}
	start, bounded := afterPrefix(r.Prefix)
	switch {
	case r.After != "" && (!bounded || r.After < start):
		rows.Descend(r.After, visit)
	case bounded:
		rows.Descend(start, visit)
	default:
		rows.Reverse(visit)
	}
}

// afterPrefix returns the smallest string above every one with the prefix;
// false if there is none.
func afterPrefix(prefix string) (string, bool) {
	for end := len(prefix); end > 0; end-- {
		if last := prefix[end-1]; last < 0xff {
			return prefix[:end-1] + string([]byte{last + 1}), true
		}
	}
	return "", false
}

func (t *transaction) Exec(context.Context, string, ...any) (int64, error) { return 0, errNoSQL }

func (t *transaction) Query(context.Context, string, ...any) (projection.Rows, error) {
	return nil, errNoSQL
}
