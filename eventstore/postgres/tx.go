package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
)

// AppendTx appends within a transaction of the program's own: the events, and
// whatever else the transaction writes (rows of an inline projection, an
// outbox), are committed together or not at all.
//
// It takes the log's lock, and keeps it until the transaction ends: every other
// append waits for that. So do everything else first, append last, and commit
// at once. A session that is idle in the transaction for more than 5 seconds
// after it is ended by the server, and for more than 2 by others that have waited
// for the lock for 3. A commit that fails (ErrConflict,
// ErrKeyReused and so on) gives the lock back and leaves the transaction as it
// was before.
//
// Inline projections of an engine on this store are applied too, and belong to the
// transaction; where one refuses the commit, so does AppendTx. Do not write to the
// tables of an inline SQL projection before AppendTx in the same transaction: it would
// hold their rows and wait for the log's lock, while whoever appends has the lock and waits for
// the rows. PostgreSQL ends such a deadlock by failing one of the two.
//
// The receipt holds once the transaction is committed; until then nobody else
// sees the events. Since the store does not see the commit, it looks for the events for
// a while, after 5 milliseconds at first and then ever less often, and tells subscribers
// here and in other processes, unless there is a pooler between. Do not execute commands within the
// transaction: they could not see what it has written.
//
// The transaction must be one of the database that the log is in, READ
// COMMITTED (PostgreSQL's default; any other level is refused with ErrInvalid,
// because its snapshot may be older than the lock). The commit counts as
// durable when the transaction's own commit is: see [SynchronousCommit], which
// does not apply here.
func (s *Store) AppendTx(ctx context.Context, tx pgx.Tx, c eventstore.Commit) (eventstore.Receipt, error) {
	e, err := s.encode(ctx, c)
	if err != nil {
		return eventstore.Receipt{}, err
	}
	if err := s.enter(ctx); err != nil {
		return eventstore.Receipt{}, err
	}
	defer s.leave()
	if err := s.belongs(ctx, tx); err != nil {
		return eventstore.Receipt{}, err
	}
	// Kinds are made outside of the transaction: they would be locked until it ends.
	if err := s.reading(ctx, "append", func(ctx context.Context, conn *pgx.Conn) error {
		missing := map[kind]bool{}
		known := s.kinds.Load()
		for i := range e.commit.Events {
			name := kind{e.commit.Events[i].Stream.Category, e.commit.Events[i].Type}
			if _, ok := known.id[name]; !ok {
				missing[name] = true
			}
		}
		return s.makeKinds(ctx, conn, missing)
	}); err != nil {
		return eventstore.Receipt{}, err
	}
	receipt, err := s.appendTx(ctx, tx, e)
	if _, kept := errors.AsType[lockKept](err); kept {
		// Whoever has the lock may be stopped, and then nobody else ends its session.
		own := tx.Conn().PgConn().PID()
		if failed := s.reading(ctx, "append", func(_ context.Context, conn *pgx.Conn) error { s.unblock(conn, own); return nil }); failed == nil {
			receipt, err = s.appendTx(ctx, tx, e)
		}
	}
	if err == nil && !receipt.Duplicate {
		s.follower.await(receipt.Last)
	}
	return receipt, err
}

// lockKept is the error of who has waited for the log's lock in vain.
type lockKept struct{ error }

func (e lockKept) Unwrap() error { return e.error }

// appendTx appends within a savepoint: what was locked there is given back when that
// is undone.
func (s *Store) appendTx(ctx context.Context, tx pgx.Tx, e *entry) (eventstore.Receipt, error) {
	within, err := tx.Begin(ctx)
	if err != nil {
		return eventstore.Receipt{}, unavailable("append", err)
	}
	receipt, err := s.appendWithin(ctx, within, e)
	if err != nil {
		if undo := within.Rollback(context.WithoutCancel(ctx)); undo != nil && !errors.Is(undo, pgx.ErrTxClosed) {
			err = errors.Join(err, undo)
		}
		return eventstore.Receipt{}, err
	}
	if receipt.Duplicate {
		return receipt, unavailable("append", within.Rollback(ctx))
	}
	if err := within.Commit(ctx); err != nil {
		return eventstore.Receipt{}, unavailable("append", err)
	}
	return receipt, nil
}

// belongs refuses transactions that cannot keep the promise.
func (s *Store) belongs(ctx context.Context, tx pgx.Tx) error {
	var isolation string
	var id *string
	err := tx.QueryRow(ctx, "SELECT current_setting('transaction_isolation'), to_regclass($1)::text", s.schema+".log").Scan(&isolation, &id)
	if err != nil {
		return unavailable("append", err)
	}
	if isolation != "read committed" {
		return fmt.Errorf("%w: append in a transaction that is %q: begin it with pgx.TxOptions{IsoLevel: pgx.ReadCommitted}", eventstore.ErrInvalid, isolation)
	}
	var log string
	if id != nil {
		if err := tx.QueryRow(ctx, "SELECT id::text FROM "+s.schema+".log").Scan(&log); err != nil {
			return unavailable("append", err)
		}
	}
	if log != s.logID {
		return fmt.Errorf("%w: append in a transaction of another database: the log %s is not there", eventstore.ErrInvalid, s.logID)
	}
	return nil
}

// appendWithin judges and writes the commit under the lock.
func (s *Store) appendWithin(ctx context.Context, tx pgx.Tx, e *entry) (eventstore.Receipt, error) {
	l := newLedger()
	b := &batch{entries: []*entry{e}, careful: true}
	lock := &pgx.Batch{}
	lock.Queue("SET LOCAL idle_in_transaction_session_timeout = '5s'")
	lock.Queue(s.texts.lock, s.lock)
	if err := tx.SendBatch(ctx, lock).Close(); err != nil {
		kept := code(err) == "55P03"
		if err = unavailable("append: take the lock of the log", err); kept {
			err = lockKept{err}
		}
		return eventstore.Receipt{}, err
	}
	head, err := s.headWithin(ctx, tx)
	if err != nil {
		return eventstore.Receipt{}, err
	}
	l.reset(head, [16]byte{})
	b.fresh = true
	for {
		need, settled := b.judge(l)
		switch {
		case need.any():
			found := &lookup{s: s}
			questions := &pgx.Batch{}
			found.queue(questions, l.known, &need)
			err := tx.SendBatch(ctx, questions).Close()
			if err == nil {
				err = found.scan(ctx, tx.Conn(), &need)
			}
			if err == nil && !s.knows(found.delta) {
				// Not in this transaction, which may see what will be rolled back.
				err = s.reading(ctx, "append", func(ctx context.Context, conn *pgx.Conn) error { return s.learn(ctx, conn) })
			}
			if err == nil {
				err = found.settle(l, b, &need)
			}
			if err != nil {
				return eventstore.Receipt{}, unavailable("append", err)
			}
		case len(settled)+len(b.losers) > 0:
			return e.receipt, e.err
		default:
			done, err := s.callAppend(ctx, tx.Conn(), s.texts.appendEvents, b, l.known, func() {})
			if err != nil {
				return eventstore.Receipt{}, unavailable("append", err)
			}
			if !done.written {
				return eventstore.Receipt{}, fmt.Errorf("append: the log has moved although it is locked: %w", errGap(done.head, l.known))
			}
			_, refused, _, err := s.applyInline(ctx, tx, b, l.known)
			if err != nil {
				return eventstore.Receipt{}, unavailable("append", err)
			}
			if refused != nil {
				return eventstore.Receipt{}, refused.err
			}
			return e.receipt, nil
		}
	}
}

func (s *Store) headWithin(ctx context.Context, tx pgx.Tx) (eventstore.Position, error) {
	var head *int64
	if err := tx.QueryRow(ctx, s.texts.head).Scan(&head); err != nil || head == nil {
		return 0, unavailable("append", err)
	}
	return eventstore.Position(*head), nil
}

// unblock ends sessions that keep the lock while their client is stopped: they
// have sent a part of a message, or are idle in the transaction, and nothing
// has come from the client for a while. Sessions of the same role may be ended
// without further rights. The session of one process of the server is left alone.
func (s *Store) unblock(conn *pgx.Conn, but uint32) {
	ctx, cancel := context.WithTimeout(s.base, closingPatience)
	defer cancel()
	var ended int64
	err := conn.QueryRow(ctx, `SELECT count(*) FILTER (WHERE pg_terminate_backend(a.pid))
		FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
		WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
		  AND l.classid = (($1::bigint >> 32) & 4294967295)::oid AND l.objid = ($1::bigint & 4294967295)::oid
		  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
		  AND a.wait_event_type = 'Client' AND a.state_change < clock_timestamp() - interval '2 seconds'
		  AND a.pid <> $2 AND a.usesysid = (SELECT oid FROM pg_roles WHERE rolname = current_user)`, s.lock, int32(but)).Scan(&ended)
	if err == nil {
		s.meter.ended(ended)
	}
}
