package sqlite

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"strings"
	"time"

	sqlite3 "modernc.org/sqlite/lib"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// update is a state update on its way. The writer hands its transaction to the
// goroutine that called Update, and waits until that has used it: a panic or
// runtime.Goexit in the function stays where it belongs.
type update struct {
	turn    chan *stateTx
	verdict chan error // of the function
	outcome chan error
}

// errAbandoned: the function of an update did not return.
var errAbandoned = errors.New("the update panicked")

var _ projection.CheckpointLister = (*Store)(nil)

// defaultUpdateTime bounds how long updates share one transaction.
const defaultUpdateTime = 20 * time.Millisecond

// Update implements projection.State. Updates are not synced one by one: they
// are in the same write-ahead log as the events, behind those they were made
// from, and become durable with the next append or checkpoint, in order.
func (s *Store) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	u := &update{turn: make(chan *stateTx), verdict: make(chan error, 1), outcome: make(chan error, 1)}
	waiting := s.updates.Put(u, 1)
	if waiting == nil {
		return eventstore.ErrClosed
	}
	var tx *stateTx
	select {
	case tx = <-u.turn:
	case <-ctx.Done():
		if s.updates.Remove(waiting) {
			return ctx.Err()
		}
		tx = <-u.turn
	}
	verdict := errAbandoned
	func() {
		defer func() {
			tx.end()
			u.verdict <- verdict
		}()
		verdict = fn(tx)
	}()
	return <-u.outcome
}

// View implements projection.State.
func (s *Store) View(ctx context.Context, fn func(projection.StateTx) error) (err error) {
	c, err := s.views.get(ctx)
	if err != nil {
		return err
	}
	defer s.views.put(c)
	if err := c.run("BEGIN"); err != nil {
		return err
	}
	tx := &stateTx{store: s, c: c, readOnly: true}
	defer func() {
		tx.end()
		if ending := c.run("COMMIT"); err == nil {
			err = ending
		}
	}()
	return fn(tx)
}

// updates runs the state updates that wait, in one transaction: at least one,
// and more while no commit waits and there is time.
func (w *writer) updates() bool {
	s := w.store
	var done []*update
	var made map[string]int64
	var start time.Time
	for start.IsZero() || s.appends.Len() == 0 && time.Since(start) < s.settings.updateTime {
		next := s.updates.Take(nil, 1, 1)
		if len(next) == 0 {
			break
		}
		u := next[0]
		if start.IsZero() {
			start = time.Now()
			if err := w.begin("NORMAL"); err != nil {
				if !isCode(err, sqlite3.SQLITE_BUSY) { // else nothing has happened
					w.broken = err
				}
				w.fail(u, err)
				return true
			}
		}
		if err := w.c.run("SAVEPOINT deed"); err != nil {
			w.fail(u, err)
			w.abandonUpdates(done, err)
			return true
		}
		tx := &stateTx{store: s, c: w.c, made: made}
		u.turn <- tx
		verdict := <-u.verdict
		if verdict == nil && tx.failed != nil {
			verdict = tx.failed
		}
		if !w.c.inTransaction() {
			if verdict == nil {
				verdict = errRolledBack
			}
			u.outcome <- verdict
			w.loseUpdates(done)
			return true
		}
		if verdict != nil {
			if err := w.c.exec("ROLLBACK TO deed; RELEASE deed"); err != nil {
				u.outcome <- verdict
				w.abandonUpdates(done, err)
				return true
			}
			u.outcome <- verdict
			continue
		}
		if err := w.c.run("RELEASE deed"); err != nil {
			u.outcome <- fmt.Errorf("state update: %w", err)
			w.abandonUpdates(done, err)
			return true
		}
		made = tx.made
		done = append(done, u)
	}
	if start.IsZero() {
		return false
	}
	if err := w.c.run("COMMIT"); err != nil {
		w.abandonUpdates(done, err)
		return true
	}
	for name, id := range made {
		s.tables.Store(name, id)
	}
	for _, u := range done {
		u.outcome <- nil
	}
	return true
}

// fail refuses an update that was taken.
func (w *writer) fail(u *update, err error) {
	tx := &stateTx{store: w.store, c: w.c, failed: fmt.Errorf("state update: %w", err)}
	u.turn <- tx
	<-u.verdict
	u.outcome <- tx.failed
}

func (w *writer) abandonUpdates(done []*update, err error) {
	w.abandon(err)
	for _, u := range done {
		u.outcome <- fmt.Errorf("state update: %w", err)
	}
}

// loseUpdates refuses updates that SQLite rolled back together with another
// one. The connection is good unless it was more than SQL's wish.
func (w *writer) loseUpdates(done []*update) {
	if w.c.harm != nil {
		w.abandonUpdates(done, w.c.harm)
		return
	}
	for _, u := range done {
		u.outcome <- errShared
	}
}

// stateTx implements projection.StateTx.
type stateTx struct {
	store    *Store
	c        *conn
	readOnly bool
	ended    bool
	failed   error            // every call fails with it
	made     map[string]int64 // tables made in the transaction
	open     *queryRows
	scans    map[*cursor]struct{}
}

// cursor is a statement that is being read; nil once it was given back.
type cursor struct{ s *statement }

// errRolledBack: SQLite ended the transaction, as SQL's OR ROLLBACK and
// RAISE(ROLLBACK) ask for and as some failures force it to.
var errRolledBack = errors.New("the transaction was rolled back by a statement: nothing was written")

// errShared: an update that did nothing wrong is to be tried again.
var errShared = fmt.Errorf("state update: %w: another one shared its transaction: %w", projection.ErrUnavailable, errRolledBack)

var errEnded = errors.New("the transaction has ended: do not keep it beyond its function")

func (tx *stateTx) end() {
	tx.close()
	tx.ended = true
}

// close gives back the statements that are being read.
func (tx *stateTx) close() {
	if tx.open != nil {
		_ = tx.open.Close()
	}
	for c := range tx.scans { // of iterators that were left without being stopped
		tx.release(c)
	}
}

func (tx *stateTx) release(c *cursor) {
	if c.s != nil {
		c.s.reset()
		c.s = nil
		delete(tx.scans, c)
	}
}

func (tx *stateTx) usable() error {
	if tx.ended {
		return errEnded
	}
	if tx.failed == nil && !tx.c.inTransaction() {
		tx.failed = errRolledBack
	}
	return tx.failed
}

func (tx *stateTx) writable() error {
	if err := tx.usable(); err != nil {
		return err
	}
	if tx.readOnly {
		return fmt.Errorf("%w: a View cannot change the state: use Update", eventstore.ErrInvalid)
	}
	return nil
}

// fail makes the transaction fail for good, whatever its function returns.
func (tx *stateTx) fail(err error) error {
	tx.failed = err
	return err
}

// Acquire implements projection.State. The epoch is kept for ever; leases
// themselves end with the process.
func (s *Store) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	lease := projection.Lease{Name: name, Owner: owner}
	err := s.leases(ctx, func(c *conn) error {
		now := s.now()
		was, held, err := readLease(c, name)
		if err != nil {
			return err
		}
		if held && was.Owner != owner && (was.Until.IsZero() || now.Before(was.Until)) {
			until := "it is released"
			if !was.Until.IsZero() {
				until = was.Until.Format(time.RFC3339Nano)
			}
			return fmt.Errorf("%w: %q is held by %q until %s", projection.ErrLeaseHeld, name, was.Owner, until)
		}
		lease.Epoch, lease.Until = was.Epoch+1, deadline(now, ttl)
		return writeLease(c, lease, true)
	})
	if err != nil {
		return projection.Lease{}, err
	}
	return lease, nil
}

// Renew implements projection.State.
func (s *Store) Renew(ctx context.Context, lease projection.Lease, ttl time.Duration) (projection.Lease, error) {
	err := s.leases(ctx, func(c *conn) error {
		if err := checkLease(c, lease); err != nil {
			return err
		}
		lease.Until = deadline(s.now(), ttl)
		return writeLease(c, lease, true)
	})
	if err != nil {
		return projection.Lease{}, err
	}
	return lease, nil
}

// Release implements projection.State.
func (s *Store) Release(ctx context.Context, lease projection.Lease) error {
	err := s.leases(ctx, func(c *conn) error {
		if err := checkLease(c, lease); err != nil {
			return err
		}
		return writeLease(c, lease, false)
	})
	if errors.Is(err, projection.ErrFenced) {
		return nil
	}
	return err
}

// leases runs fn in an update, again if that was lost because of another one.
func (s *Store) leases(ctx context.Context, fn func(*conn) error) error {
	for {
		err := s.Update(ctx, func(tx projection.StateTx) error {
			t := tx.(*stateTx)
			if err := t.usable(); err != nil {
				return err
			}
			return fn(t.c)
		})
		if !errors.Is(err, errShared) {
			return err
		}
	}
}

// Checkpoints implements projection.CheckpointLister.
func (s *Store) Checkpoints(ctx context.Context) ([]projection.NamedCheckpoint, error) {
	var all []projection.NamedCheckpoint
	err := s.View(ctx, func(tx projection.StateTx) error {
		now := s.now()
		rows, err := tx.(*stateTx).c.prepare(`SELECT n.name, c.log, c.epoch, c.position, l.owner, l.epoch, l.held, l.until
			FROM (SELECT name FROM deed_checkpoints UNION SELECT name FROM deed_leases) n
			LEFT JOIN deed_checkpoints c ON c.name = n.name LEFT JOIN deed_leases l ON l.name = n.name ORDER BY n.name`)
		if err != nil {
			return err
		}
		defer rows.reset()
		for {
			more, err := rows.step()
			if err != nil || !more {
				return err
			}
			// What is not there reads as the zero value.
			one := projection.NamedCheckpoint{
				Name:       rows.text(0),
				Checkpoint: projection.Checkpoint{Log: rows.text(1), Epoch: uint64(rows.int64(2)), Position: eventstore.Position(rows.int64(3))},
				Lease:      projection.Lease{Name: rows.text(0), Owner: rows.text(4), Epoch: uint64(rows.int64(5))},
			}
			if until := rows.int64(7); until != 0 {
				one.Lease.Until = time.Unix(0, until).UTC()
			}
			one.Held = rows.int64(6) != 0 && (one.Lease.Until.IsZero() || now.Before(one.Lease.Until))
			if one.Lease.Epoch == 0 {
				one.Lease = projection.Lease{}
			}
			all = append(all, one)
		}
	})
	return all, err
}

func deadline(now time.Time, ttl time.Duration) time.Time {
	if ttl <= 0 {
		return time.Time{}
	}
	return now.Add(ttl).UTC().Round(0)
}

func readLease(c *conn, name string) (lease projection.Lease, held bool, err error) {
	lease.Name = name
	_, err = c.row("SELECT owner, epoch, held, until FROM deed_leases WHERE name = ?", func(s *statement) {
		lease.Owner, lease.Epoch, held = s.text(0), uint64(s.int64(1)), s.int64(2) != 0
		if until := s.int64(3); until != 0 {
			lease.Until = time.Unix(0, until).UTC()
		}
	}, name)
	return lease, held, err
}

func writeLease(c *conn, lease projection.Lease, held bool) error {
	var until int64
	if !lease.Until.IsZero() {
		until = lease.Until.UnixNano()
	}
	return c.run(`INSERT INTO deed_leases (name, owner, epoch, held, until) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, epoch = excluded.epoch, held = excluded.held, until = excluded.until`,
		lease.Name, lease.Owner, int64(lease.Epoch), held, until)
}

// checkLease fails with ErrFenced unless the lease is the current one.
func checkLease(c *conn, lease projection.Lease) error {
	now, _, err := readLease(c, lease.Name)
	if err != nil {
		return err
	}
	if now.Epoch == 0 || now.Epoch != lease.Epoch || now.Owner != lease.Owner {
		return fmt.Errorf("%w: lease %q of %q has epoch %d, but epoch %d of %q is current",
			projection.ErrFenced, lease.Name, lease.Owner, lease.Epoch, now.Epoch, now.Owner)
	}
	return nil
}

// Checkpoint implements projection.StateTx.
func (tx *stateTx) Checkpoint(name string) (projection.Checkpoint, error) {
	var p projection.Checkpoint
	if err := tx.usable(); err != nil {
		return p, err
	}
	_, err := tx.c.row("SELECT log, epoch, position FROM deed_checkpoints WHERE name = ?", func(s *statement) {
		p = projection.Checkpoint{Log: s.text(0), Epoch: uint64(s.int64(1)), Position: eventstore.Position(s.int64(2))}
	}, name)
	return p, err
}

// SetCheckpoint implements projection.StateTx.
func (tx *stateTx) SetCheckpoint(lease projection.Lease, from, to projection.Checkpoint) error {
	if err := tx.Fence(lease); err != nil {
		return err
	}
	is, err := tx.Checkpoint(lease.Name)
	if err != nil {
		return err
	}
	if is.Log != from.Log || is.Position != from.Position {
		return tx.fail(fmt.Errorf("%w: checkpoint %q is at position %d of log %q, not at %d of %q",
			projection.ErrFenced, lease.Name, is.Position, is.Log, from.Position, from.Log))
	}
	return tx.c.run(`INSERT INTO deed_checkpoints (name, log, epoch, position) VALUES (?, ?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET log = excluded.log, epoch = excluded.epoch, position = excluded.position`,
		lease.Name, to.Log, int64(lease.Epoch), int64(to.Position))
}

// Fence implements projection.StateTx.
func (tx *stateTx) Fence(lease projection.Lease) error {
	if err := tx.writable(); err != nil {
		return err
	}
	err := checkLease(tx.c, lease)
	if errors.Is(err, projection.ErrFenced) {
		return tx.fail(err)
	}
	return err
}

// DeleteCheckpoint implements projection.StateTx.
func (tx *stateTx) DeleteCheckpoint(lease projection.Lease) error {
	if err := tx.Fence(lease); err != nil {
		return err
	}
	return tx.c.run("DELETE FROM deed_checkpoints WHERE name = ?", lease.Name)
}

// table returns the id of a table; 0 if there is none.
func (tx *stateTx) table(name string) (int64, error) {
	if id, ok := tx.store.tables.Load(name); ok {
		return id.(int64), nil
	}
	if id, ok := tx.made[name]; ok {
		return id, nil
	}
	id, err := tx.c.number("SELECT id FROM deed_tables WHERE name = ?", name)
	if err == nil && id != 0 && tx.readOnly {
		tx.store.tables.Store(name, id) // a view sees committed tables only
	}
	return id, err
}

// makeTable returns the id of a table, which is made if need be.
func (tx *stateTx) makeTable(name string) (int64, error) {
	id, err := tx.table(name)
	if err != nil || id != 0 {
		return id, err
	}
	if err := tx.c.run("INSERT INTO deed_tables (name) VALUES (?)", name); err != nil {
		return 0, err
	}
	tx.made = maps.Clone(tx.made) // the old one outlives this update's rollback
	if tx.made == nil {
		tx.made = map[string]int64{}
	}
	tx.made[name] = tx.c.lastInsertID()
	return tx.made[name], nil
}

// Get implements projection.StateTx.
func (tx *stateTx) Get(table, key string) (value []byte, found bool, err error) {
	if err := tx.usable(); err != nil {
		return nil, false, err
	}
	id, err := tx.table(table)
	if err != nil || id == 0 {
		return nil, false, err
	}
	s, err := tx.c.prepare("SELECT value FROM deed_rows WHERE tbl = ? AND key = ?")
	if err != nil {
		return nil, false, err
	}
	defer s.reset()
	if err := errors.Join(s.bindInt64(0, id), s.bindText(1, key)); err != nil {
		return nil, false, err
	}
	if found, err = s.step(); found {
		value = s.blob(0)
	}
	return value, found, err
}

// Put implements projection.StateTx.
func (tx *stateTx) Put(table, key string, value []byte) error {
	if err := tx.writable(); err != nil {
		return err
	}
	id, err := tx.makeTable(table)
	if err != nil {
		return err
	}
	s, err := tx.c.prepare("INSERT INTO deed_rows (tbl, key, value) VALUES (?, ?, ?) ON CONFLICT (tbl, key) DO UPDATE SET value = excluded.value")
	if err != nil {
		return err
	}
	defer s.reset()
	if err := errors.Join(s.bindInt64(0, id), s.bindText(1, key), s.bindBlob(2, value)); err != nil {
		return err
	}
	_, err = s.step()
	return err
}

// Delete implements projection.StateTx.
func (tx *stateTx) Delete(table, key string) error {
	return tx.remove("DELETE FROM deed_rows WHERE tbl = ? AND key = ?", table, key)
}

// Clear implements projection.StateTx.
func (tx *stateTx) Clear(table string) error {
	return tx.remove("DELETE FROM deed_rows WHERE tbl = ?", table)
}

func (tx *stateTx) remove(text, table string, key ...any) error {
	if err := tx.writable(); err != nil {
		return err
	}
	id, err := tx.table(table)
	if err != nil || id == 0 {
		return err
	}
	return tx.c.run(text, append([]any{id}, key...)...)
}

// Scan implements projection.StateTx.
func (tx *stateTx) Scan(table string, r projection.Range) iter.Seq2[projection.Row, error] {
	return func(yield func(projection.Row, error) bool) {
		fail := func(err error) { yield(projection.Row{}, err) }
		if err := tx.usable(); err != nil {
			fail(err)
			return
		}
		id, err := tx.table(table)
		if err != nil {
			fail(err)
			return
		}
		if id == 0 {
			return
		}
		text, args := scanText(r)
		s, err := tx.c.prepare(text)
		if err != nil {
			fail(err)
			return
		}
		c := &cursor{s}
		if tx.scans == nil {
			tx.scans = map[*cursor]struct{}{}
		}
		tx.scans[c] = struct{}{}
		defer tx.release(c)
		if err := s.bindAll(append([]any{id}, args...)); err != nil {
			fail(err)
			return
		}
		for {
			more, err := s.step()
			if err != nil {
				fail(err)
				return
			}
			if !more || !yield(projection.Row{Key: s.text(0), Value: s.blob(1)}, nil) {
				return
			}
			if err := tx.usable(); err != nil {
				fail(err)
				return
			}
		}
	}
}

// scanText returns the statement of a range, and its arguments after the
// table's id.
func scanText(r projection.Range) (string, []any) {
	var b strings.Builder
	var args []any
	b.WriteString("SELECT key, value FROM deed_rows WHERE tbl = ?")
	where := func(condition, value string) {
		b.WriteString(" AND key " + condition + " ?")
		args = append(args, value)
	}
	if r.Prefix != "" {
		where(">=", r.Prefix)
		if end, ok := afterPrefix(r.Prefix); ok {
			where("<", end)
		}
	}
	after, through := ">", "<="
	if r.Backward {
		after, through = "<", ">="
	}
	if r.After != "" {
		where(after, r.After)
	}
	if r.Through != "" {
		where(through, r.Through)
	}
	b.WriteString(" ORDER BY key")
	if r.Backward {
		b.WriteString(" DESC")
	}
	if r.Limit > 0 {
		b.WriteString(" LIMIT ?")
		args = append(args, r.Limit)
	}
	return b.String(), args
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
