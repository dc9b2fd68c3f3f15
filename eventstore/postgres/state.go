package postgres

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Updates are not synced one by one: they are in the same write-ahead log as
// the events they were made from, and behind them. A process that is stopped
// within one must not keep its rows locked, its leases among them, for longer
// than the leases last.
const (
	beginUpdate = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = off; SET LOCAL idle_in_transaction_session_timeout = %d"
	beginView   = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
)

// Update implements projection.State. Updates under different leases run at
// the same time; those that fence the same lease run one after another from
// that call on.
func (s *Store) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	return s.transact(ctx, fmt.Sprintf(beginUpdate, s.settings.leaseTTL.Milliseconds()), false, fn)
}

// View implements projection.State.
func (s *Store) View(ctx context.Context, fn func(projection.StateTx) error) error {
	return s.transact(ctx, beginView, true, fn)
}

func (s *Store) transact(ctx context.Context, begin string, readOnly bool, fn func(projection.StateTx) error) (err error) {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	conn, tx, err := s.begin(ctx, begin)
	if err != nil {
		return err
	}
	defer conn.Release()
	t := &stateTx{ctx: ctx, s: s, tx: tx, readOnly: readOnly}
	committed := false
	defer func() {
		t.ended = true
		if !committed {
			if t.open != nil {
				_ = t.open.Close()
			}
			ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), closingPatience)
			defer cancel()
			_ = tx.Rollback(ending)
		}
	}()
	if err := fn(t); err != nil {
		return err
	}
	if t.open != nil {
		_ = t.open.Close()
	}
	if t.failed != nil {
		return t.failed
	}
	if err := t.flush(); err != nil {
		return err
	}
	committed = true
	if err := tx.Commit(ctx); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("state update: it is not known whether it was committed: %w", ctx.Err())
		}
		return unavailable("state update", err)
	}
	return nil
}

// begin starts a transaction, on another connection if need be: those of a
// pool may have been lost since they were used last.
func (s *Store) begin(ctx context.Context, begin string) (*pgxpool.Conn, pgx.Tx, error) {
	var conn *pgxpool.Conn
	var tx pgx.Tx
	err := s.trying(ctx, "begin a transaction on the state", func() error {
		c, err := s.pool.Acquire(ctx)
		if err != nil {
			return err
		}
		if tx, err = c.BeginTx(ctx, pgx.TxOptions{BeginQuery: begin}); err != nil {
			c.Release()
			return err
		}
		conn = c
		return nil
	})
	return conn, tx, err
}

// stateTx implements projection.StateTx. Rows that are put or deleted are
// gathered and written together, before anything is read and at the end.
type stateTx struct {
	ctx      context.Context
	s        *Store
	tx       pgx.Tx
	readOnly bool
	ended    bool
	failed   error // every call fails with it
	saved    bool  // nothing but statements of the user since the savepoint
	open     *queryRows
	pending  map[rowKey]*pendingRow
	moves    []projection.NamedCheckpoint // of checkpoints that are held, see appendTx
}

type rowKey struct{ table, key string }

type pendingRow struct {
	value  []byte
	delete bool
}

var errEnded = errors.New("the transaction has ended: do not keep it beyond its function")

func (t *stateTx) usable() error {
	if t.ended {
		return errEnded
	}
	return t.failed
}

func (t *stateTx) writable() error {
	if err := t.usable(); err != nil {
		return err
	}
	if t.readOnly {
		return fmt.Errorf("%w: a View cannot change the state: use Update", eventstore.ErrInvalid)
	}
	return nil
}

// fail makes the transaction fail for good, whatever its function returns.
func (t *stateTx) fail(err error) error {
	if t.failed == nil {
		t.failed = err
	}
	return err
}

// broke is fail for errors of our own statements, after which PostgreSQL
// accepts no more in the transaction.
func (t *stateTx) broke(what string, err error) error {
	if err == nil {
		return nil
	}
	if t.ctx.Err() != nil {
		return t.fail(t.ctx.Err())
	}
	return t.fail(unavailable(what, err))
}

// flush writes what was gathered.
func (t *stateTx) flush() error {
	if len(t.pending) == 0 && len(t.moves) == 0 {
		return nil
	}
	if err := t.oneAtATime(); err != nil {
		return t.fail(err)
	}
	var putTables, deleteTables []int32
	var putKeys, putValues, deleteKeys [][]byte
	for k, row := range t.pending {
		id, err := t.table(k.table, true)
		if err != nil {
			return t.broke("write rows", err)
		}
		if row.delete {
			deleteTables, deleteKeys = append(deleteTables, id), append(deleteKeys, []byte(k.key))
		} else {
			putTables, putKeys, putValues = append(putTables, id), append(putKeys, []byte(k.key)), append(putValues, row.value)
		}
	}
	t.pending, t.saved = nil, false
	b := &pgx.Batch{}
	if len(putTables) > 0 {
		// In the order of their keys: whoever writes the same rows does not deadlock.
		b.Queue(`INSERT INTO `+t.s.schema+`.rows (tbl, key, value)
			SELECT n.tbl, n.key, n.value FROM unnest($1::int[], $2::bytea[], $3::bytea[]) AS n (tbl, key, value) ORDER BY n.tbl, n.key
			ON CONFLICT (tbl, key) DO UPDATE SET value = excluded.value`, putTables, putKeys, putValues)
	}
	if len(deleteTables) > 0 {
		b.Queue(`DELETE FROM `+t.s.schema+`.rows r USING unnest($1::int[], $2::bytea[]) AS n (tbl, key) WHERE r.tbl = n.tbl AND r.key = n.key`, deleteTables, deleteKeys)
	}
	moves := t.moves
	t.moves = nil
	moved := int64(0)
	for _, m := range moves {
		b.Queue("UPDATE "+t.s.schema+".checkpoints SET log = $2, epoch = $3, position = $4 WHERE name = $1",
			m.Name, m.Checkpoint.Log, int64(m.Checkpoint.Epoch), int64(m.Checkpoint.Position)).Exec(func(tag pgconn.CommandTag) error {
			moved += tag.RowsAffected()
			return nil
		})
	}
	if err := t.broke("write rows", t.tx.SendBatch(t.ctx, b).Close()); err != nil {
		return err
	}
	if moved != int64(len(moves)) {
		return t.fail(fmt.Errorf("%w: of %d checkpoints that were held %d are there", projection.ErrFenced, len(moves), moved))
	}
	return nil
}

// table returns the id of a table; 0 if there is none and it is not to be
// made. It is made in a transaction of its own, so that nobody waits for this
// one because of it; a table without rows does no harm.
func (t *stateTx) table(name string, make bool) (int32, error) {
	if id, ok := t.s.tables.Load(name); ok {
		return id.(int32), nil
	}
	var id int32
	// Looked for on the transaction's own connection: with another one for each
	// transaction, those of a pool could all wait for each other.
	err := t.tx.QueryRow(t.ctx, "SELECT id FROM "+t.s.schema+".tables WHERE name = $1", name).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		err = nil
		if make {
			err = t.s.reading(t.ctx, "make a table of rows", func(ctx context.Context, conn *pgx.Conn) error {
				if _, err := conn.Exec(ctx, "INSERT INTO "+t.s.schema+".tables (name) VALUES ($1) ON CONFLICT DO NOTHING", name); err != nil {
					return err
				}
				return conn.QueryRow(ctx, "SELECT id FROM "+t.s.schema+".tables WHERE name = $1", name).Scan(&id)
			})
		}
	}
	if err == nil && id != 0 {
		t.s.tables.Store(name, id)
	}
	return id, err
}

// Checkpoint implements projection.StateTx.
func (t *stateTx) Checkpoint(name string) (projection.Checkpoint, error) {
	if err := errors.Join(t.usable(), t.oneAtATime()); err != nil {
		return projection.Checkpoint{}, err
	}
	return t.checkpoint(name, "")
}

func (t *stateTx) checkpoint(name, lock string) (projection.Checkpoint, error) {
	var p projection.Checkpoint
	var epoch, position int64
	err := t.tx.QueryRow(t.ctx, "SELECT log, epoch, position FROM "+t.s.schema+".checkpoints WHERE name = $1"+lock, name).Scan(&p.Log, &epoch, &position)
	if errors.Is(err, pgx.ErrNoRows) {
		return projection.Checkpoint{}, nil
	}
	p.Epoch, p.Position = uint64(epoch), eventstore.Position(position)
	return p, t.broke("read a checkpoint", err)
}

// HoldCheckpoint is Checkpoint, and keeps it as it is until the transaction ends:
// package projection makes another version of a projection the one that is read
// while nobody can read more of the former one.
func (t *stateTx) HoldCheckpoint(name string) (projection.Checkpoint, error) {
	if err := errors.Join(t.writable(), t.oneAtATime()); err != nil {
		return projection.Checkpoint{}, err
	}
	t.saved = false // the lock must not be given back with a statement that fails
	return t.checkpoint(name, " FOR UPDATE")
}

// SetCheckpoint implements projection.StateTx. It takes one round trip.
func (t *stateTx) SetCheckpoint(lease projection.Lease, from, to projection.Checkpoint) error {
	if err := errors.Join(t.writable(), t.oneAtATime()); err != nil {
		return err
	}
	if uint64(from.Position) > math.MaxInt64 || uint64(to.Position) > math.MaxInt64 {
		return fmt.Errorf("%w: checkpoint %q: a position beyond %d", eventstore.ErrInvalid, lease.Name, int64(math.MaxInt64))
	}
	t.saved = false
	var now projection.Lease
	var moved int64
	b := &pgx.Batch{}
	t.queueFence(b, lease.Name, &now)
	b.Queue(`INSERT INTO `+t.s.schema+`.checkpoints AS c (name, log, epoch, position)
		SELECT $1, $2, $3, $4 WHERE ($5 = '' AND $6 = 0) OR EXISTS (SELECT FROM `+t.s.schema+`.checkpoints WHERE name = $1)
		ON CONFLICT (name) DO UPDATE SET log = excluded.log, epoch = excluded.epoch, position = excluded.position
		WHERE c.log = $5 AND c.position = $6 RETURNING 1`,
		lease.Name, to.Log, int64(lease.Epoch), int64(to.Position), from.Log, int64(from.Position)).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			moved++
		}
		return rows.Err()
	})
	if err := t.tx.SendBatch(t.ctx, b).Close(); err != nil {
		return t.broke("move a checkpoint", err)
	}
	if err := current(now, lease); err != nil {
		return t.fail(err)
	}
	if moved == 0 {
		is, err := t.Checkpoint(lease.Name)
		if err != nil {
			return err
		}
		return t.fail(fmt.Errorf("%w: checkpoint %q is at position %d of log %q, not at %d of %q",
			projection.ErrFenced, lease.Name, is.Position, is.Log, from.Position, from.Log))
	}
	return nil
}

// queueFence reads who has the lease, and keeps it from being acquired until
// the transaction ends.
func (t *stateTx) queueFence(b *pgx.Batch, name string, now *projection.Lease) {
	b.Queue("SELECT owner, epoch FROM "+t.s.schema+".leases WHERE name = $1 FOR UPDATE", name).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var epoch int64
			if err := rows.Scan(&now.Owner, &epoch); err != nil {
				return err
			}
			now.Epoch = uint64(epoch)
		}
		return rows.Err()
	})
}

// current fails with ErrFenced unless the lease is the one that counts.
func current(now, lease projection.Lease) error {
	if now.Epoch == 0 || now.Epoch != lease.Epoch || now.Owner != lease.Owner {
		return fmt.Errorf("%w: lease %q of %q has epoch %d, but epoch %d of %q is current",
			projection.ErrFenced, lease.Name, lease.Owner, lease.Epoch, now.Epoch, now.Owner)
	}
	return nil
}

// Fence implements projection.StateTx.
func (t *stateTx) Fence(lease projection.Lease) error {
	if err := errors.Join(t.writable(), t.oneAtATime()); err != nil {
		return err
	}
	t.saved = false // the lock must not be given back with a statement that fails
	var now projection.Lease
	b := &pgx.Batch{}
	t.queueFence(b, lease.Name, &now)
	if err := t.tx.SendBatch(t.ctx, b).Close(); err != nil {
		return t.broke("check a lease", err)
	}
	if err := current(now, lease); err != nil {
		return t.fail(err)
	}
	return nil
}

// DeleteCheckpoint implements projection.StateTx.
func (t *stateTx) DeleteCheckpoint(lease projection.Lease) error {
	if err := t.Fence(lease); err != nil {
		return err
	}
	_, err := t.tx.Exec(t.ctx, "DELETE FROM "+t.s.schema+".checkpoints WHERE name = $1", lease.Name)
	return t.broke("delete a checkpoint", err)
}

// Get implements projection.StateTx.
func (t *stateTx) Get(table, key string) ([]byte, bool, error) {
	if err := t.usable(); err != nil {
		return nil, false, err
	}
	if row, ok := t.pending[rowKey{table, key}]; ok {
		return row.value, !row.delete, nil
	}
	var value []byte
	found := false
	err := t.GetAll(table, []string{key}, func(_ int, v []byte) { value, found = v, true })
	return value, found, err
}

// GetAll reads several rows of a table in one round trip; found is called for
// those that are there.
func (t *stateTx) GetAll(table string, keys []string, found func(i int, value []byte)) error {
	if err := errors.Join(t.usable(), t.oneAtATime()); err != nil {
		return err
	}
	if err := t.flush(); err != nil {
		return err
	}
	id, err := t.table(table, false)
	if err != nil {
		return t.broke("read rows", err)
	}
	if id == 0 {
		return nil
	}
	rows, err := t.tx.Query(t.ctx, t.rowsQuery(), id, rawKeys(keys))
	if err != nil {
		return t.broke("read rows", err)
	}
	defer rows.Close()
	return t.broke("read rows", scanRows(rows, found))
}

func (t *stateTx) rowsQuery() string {
	return `SELECT n.i, r.value FROM unnest($2::bytea[]) WITH ORDINALITY AS n (key, i)
		JOIN ` + t.s.schema + `.rows r ON r.tbl = $1 AND r.key = n.key`
}

func rawKeys(keys []string) [][]byte {
	raw := make([][]byte, len(keys))
	for i, key := range keys {
		raw[i] = []byte(key)
	}
	return raw
}

func scanRows(rows pgx.Rows, found func(i int, value []byte)) error {
	for rows.Next() {
		var i int64
		var value []byte
		if err := rows.Scan(&i, &value); err != nil {
			return err
		}
		found(int(i-1), value)
	}
	return rows.Err()
}

// queueRows adds the statement that reads rows of a table to the batch.
func (t *stateTx) queueRows(b *pgx.Batch, table int32, keys []string, found func(i int, value []byte)) {
	b.Queue(t.rowsQuery(), table, rawKeys(keys)).Query(func(rows pgx.Rows) error { return scanRows(rows, found) })
}

// Put implements projection.StateTx.
func (t *stateTx) Put(table, key string, value []byte) error {
	return t.gather(rowKey{table, key}, &pendingRow{value: value})
}

// Delete implements projection.StateTx.
func (t *stateTx) Delete(table, key string) error {
	return t.gather(rowKey{table, key}, &pendingRow{delete: true})
}

// mostPending bounds what is gathered.
const mostPending = 10_000

func (t *stateTx) gather(key rowKey, row *pendingRow) error {
	if err := t.writable(); err != nil {
		return err
	}
	if len(t.pending) >= mostPending {
		if err := t.flush(); err != nil {
			return err
		}
	}
	if t.pending == nil {
		t.pending = map[rowKey]*pendingRow{}
	}
	t.pending[key] = row
	return nil
}

// Clear implements projection.StateTx.
func (t *stateTx) Clear(table string) error {
	if err := errors.Join(t.writable(), t.oneAtATime()); err != nil {
		return err
	}
	if err := t.flush(); err != nil {
		return err
	}
	id, err := t.table(table, false)
	if err != nil || id == 0 {
		return t.broke("clear a table", err)
	}
	t.saved = false
	_, err = t.tx.Exec(t.ctx, "DELETE FROM "+t.s.schema+".rows WHERE tbl = $1", id)
	return t.broke("clear a table", err)
}

// Pages of a scan begin small, for those that are broken off.
const (
	firstScanPage = 64
	scanPage      = 1024
)

// Scan implements projection.StateTx.
func (t *stateTx) Scan(table string, r projection.Range) iter.Seq2[projection.Row, error] {
	return func(yield func(projection.Row, error) bool) {
		left, size := r.Limit, firstScanPage
		for {
			if r.Limit > 0 {
				size = min(size, left)
			}
			page, err := t.scanPage(table, r, size)
			if err != nil {
				yield(projection.Row{}, err)
				return
			}
			for _, row := range page {
				if !yield(row, nil) {
					return
				}
			}
			if left -= len(page); len(page) < size || r.Limit > 0 && left == 0 {
				return
			}
			r.After = page[len(page)-1].Key
			if r.After == "" {
				// The empty key, which After cannot exclude, is the first: what follows it
				// forward begins at the next one, and backward there is nothing.
				if r.Backward {
					return
				}
				r.After = "\x00"
				row, err := t.scanPage(table, projection.Range{Prefix: r.Prefix, Through: "\x00", Limit: 2}, 2)
				if err != nil || len(row) == 2 && !yield(row[1], nil) {
					if err != nil {
						yield(projection.Row{}, err)
					}
					return
				}
			}
			size = scanPage
		}
	}
}

func (t *stateTx) scanPage(table string, r projection.Range, size int) ([]projection.Row, error) {
	if err := errors.Join(t.usable(), t.oneAtATime()); err != nil {
		return nil, err
	}
	if err := t.flush(); err != nil {
		return nil, err
	}
	id, err := t.table(table, false)
	if err != nil || id == 0 {
		return nil, t.broke("scan rows", err)
	}
	text, args := t.s.scanText(id, r, size)
	rows, err := t.tx.Query(t.ctx, text, args...)
	if err != nil {
		return nil, t.broke("scan rows", err)
	}
	defer rows.Close()
	var page []projection.Row
	for rows.Next() {
		var key, value []byte
		if err := rows.Scan(&key, &value); err != nil {
			return nil, t.broke("scan rows", err)
		}
		page = append(page, projection.Row{Key: string(key), Value: value})
	}
	return page, t.broke("scan rows", rows.Err())
}

// scanText returns the statement of a range, and its arguments.
func (s *Store) scanText(id int32, r projection.Range, size int) (string, []any) {
	var b strings.Builder
	args := []any{id}
	b.WriteString("SELECT key, value FROM " + s.schema + ".rows WHERE tbl = $1")
	where := func(condition, value string) {
		args = append(args, []byte(value))
		fmt.Fprintf(&b, " AND key %s $%d", condition, len(args))
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
	b.WriteString(" ORDER BY tbl" + order(r.Backward) + ", key" + order(r.Backward))
	args = append(args, size)
	fmt.Fprintf(&b, " LIMIT $%d", len(args))
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

func deadlineText(ttl time.Duration) any {
	if ttl <= 0 {
		return nil
	}
	return ttl.Microseconds()
}
