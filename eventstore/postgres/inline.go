package postgres

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

var _ projection.Inliner = (*Store)(nil)

// Inline implements projection.Inliner. From then on batches take the log's lock
// before they are judged, and keep it while they are applied: some round trips more
// than without.
func (s *Store) Inline(a projection.Appends) (stop func()) {
	registered := &a
	s.changeInline(func(all []*projection.Appends) []*projection.Appends { return append(all, registered) })
	return func() {
		s.changeInline(func(all []*projection.Appends) []*projection.Appends {
			return slices.DeleteFunc(all, func(other *projection.Appends) bool { return other == registered })
		})
	}
}

func (s *Store) changeInline(change func([]*projection.Appends) []*projection.Appends) {
	for {
		was := s.inline.Load()
		var all []*projection.Appends
		if was != nil {
			all = slices.Clone(*was)
		}
		all = change(all)
		if s.inline.CompareAndSwap(was, &all) {
			return
		}
	}
}

func (s *Store) inlines() []*projection.Appends {
	if all := s.inline.Load(); all != nil {
		return *all
	}
	return nil
}

// passed tells that events were written without inline projections, or perhaps.
func (s *Store) passed(through eventstore.Position) {
	for _, a := range s.inlines() {
		(*a).Passed(through)
	}
}

// UpdateAtHead implements projection.Inliner: the update has the log's lock. Where
// its process is stopped, the server takes that from it after five seconds.
func (s *Store) UpdateAtHead(ctx context.Context, fn func(tx projection.StateTx, head eventstore.Position) error) error {
	return s.transact(ctx, fmt.Sprintf(beginUpdate, 5000), false, func(tx projection.StateTx) error {
		t := tx.(*stateTx)
		b := &pgx.Batch{}
		b.Queue(s.texts.lock, s.lock)
		var head *int64
		b.Queue(s.texts.head).QueryRow(func(row pgx.Row) error { return row.Scan(&head) })
		if err := t.tx.SendBatch(ctx, b).Close(); err != nil {
			return t.broke("take the lock of the log", err)
		}
		if head == nil {
			return fn(tx, 0)
		}
		return fn(tx, eventstore.Position(*head))
	})
}

// appendTx implements projection.AppendTx.
type appendTx struct {
	*stateTx
	held map[string]projection.Held
}

// Hold implements projection.AppendTx. It takes one round trip, and waits for
// nobody: the log's lock is held.
func (t *appendTx) Hold(names []string, reads ...projection.Read) (map[string]projection.Held, error) {
	if err := errors.Join(t.writable(), t.oneAtATime()); err != nil {
		return nil, err
	}
	if err := t.flush(); err != nil { // what is read is what was written before
		return nil, err
	}
	t.saved = false
	leases := map[string]projection.Lease{}
	found := map[string]projection.Held{}
	b := &pgx.Batch{}
	b.Queue("SELECT name, owner, epoch FROM "+t.s.schema+".leases WHERE name = ANY ($1::text[]) ORDER BY name FOR UPDATE SKIP LOCKED", names).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var l projection.Lease
			var epoch int64
			if err := rows.Scan(&l.Name, &l.Owner, &epoch); err != nil {
				return err
			}
			l.Epoch = uint64(epoch)
			leases[l.Name] = l
		}
		return rows.Err()
	})
	// In a statement of its own, which sees what was committed before the leases
	// were held.
	b.Queue("SELECT name, log, epoch, position FROM "+t.s.schema+".checkpoints WHERE name = ANY ($1::text[]) ORDER BY name FOR UPDATE SKIP LOCKED", names).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var name string
			var c projection.Checkpoint
			var epoch, position int64
			if err := rows.Scan(&name, &c.Log, &epoch, &position); err != nil {
				return err
			}
			c.Epoch, c.Position = uint64(epoch), eventstore.Position(position)
			if lease, ok := leases[name]; !ok {
				continue
			} else if _, again := t.held[name]; !again {
				found[name] = projection.Held{Lease: lease, Checkpoint: c}
			}
		}
		return rows.Err()
	})
	for _, r := range reads {
		id, err := t.table(r.Table, false)
		if err != nil {
			return nil, t.broke("read rows", err)
		}
		if id != 0 {
			t.queueRows(b, id, r.Keys, r.Found)
		}
	}
	if err := t.tx.SendBatch(t.ctx, b).Close(); err != nil {
		return nil, t.broke("hold leases", err)
	}
	if t.held == nil {
		t.held = map[string]projection.Held{}
	}
	maps.Copy(t.held, found)
	return found, nil
}

// SetCheckpoint implements projection.StateTx. The row is held, and the lease: the
// checkpoint is written with the rows.
func (t *appendTx) SetCheckpoint(lease projection.Lease, from, to projection.Checkpoint) error {
	if err := t.writable(); err != nil {
		return err
	}
	h, ok := t.held[lease.Name]
	if !ok {
		return fmt.Errorf("%w: checkpoint %q is not held by the append", eventstore.ErrInvalid, lease.Name)
	}
	if err := current(h.Lease, lease); err != nil {
		return t.fail(err)
	}
	if h.Checkpoint.Log != from.Log || h.Checkpoint.Position != from.Position {
		return t.fail(fmt.Errorf("%w: checkpoint %q is at position %d of log %q, not at %d of %q",
			projection.ErrFenced, lease.Name, h.Checkpoint.Position, h.Checkpoint.Log, from.Position, from.Log))
	}
	to.Epoch = lease.Epoch
	h.Checkpoint = to
	t.held[lease.Name] = h
	t.moves = append(t.moves, projection.NamedCheckpoint{Name: lease.Name, Checkpoint: to})
	return nil
}

// manyInline is after how much time no further commit of a batch is applied: others
// wait for the lock, and the server ends a session that is idle for long within its
// transaction, as this one is while handlers of views run.
const manyInline = 500 * time.Millisecond

// applyInline applies commits within the transaction that writes their events,
// which has the log's lock, and where the log ends at head. refused is the commit that
// cannot be applied; its err says why, and the transaction must be rolled back. Winners
// that there was no time for are taken out of the batch's judgement, and of the
// transaction. With an error, blamed is what tells whose it was, if it came while a
// commit was applied.
func (s *Store) applyInline(ctx context.Context, tx pgx.Tx, b *batch, head eventstore.Position) (begun []projection.Appending, refused *entry, blamed *blame, err error) {
	hooks := s.inlines()
	if len(hooks) == 0 {
		return nil, nil, nil, nil
	}
	t := &appendTx{stateTx: &stateTx{ctx: ctx, s: s, tx: tx}}
	defer func() {
		t.ended = true
		if t.open != nil {
			_ = t.open.Close()
		}
	}()
	// Handlers may change what they get, and the batch may be judged again.
	events := slices.Clone(b.recorded)
	for i := range events {
		events[i].Tags, events[i].Data = slices.Clone(events[i].Tags), slices.Clone(events[i].Data)
	}
	for _, a := range hooks {
		one, err := (*a).Begin(ctx, t, head, events)
		if err != nil {
			return nil, nil, nil, err
		}
		begun = append(begun, one)
	}
	began := time.Now()
	for i, e := range b.winners {
		if i > 0 && time.Since(began) > manyInline {
			b.cut(i)
			break
		}
		commit := events[e.base : e.base+len(e.commit.Events)]
		for _, one := range begun {
			err := one.Apply(ctx, commit)
			if t.failed != nil {
				return nil, nil, &blame{e, one, commit}, t.failed
			}
			if _, is := errors.AsType[*projection.InlineError](err); is {
				e.receipt, e.err = eventstore.Receipt{}, err
				return nil, e, nil, nil
			}
			if err != nil {
				return nil, nil, &blame{e, one, commit}, err
			}
		}
	}
	for _, one := range begun {
		if err := one.End(ctx, head+eventstore.Position(len(b.recorded))); err != nil {
			return nil, nil, nil, err
		}
	}
	if t.open != nil {
		_ = t.open.Close()
	}
	if t.failed != nil {
		return nil, nil, nil, t.failed
	}
	return begun, nil, nil, t.flush()
}

// blame is a commit, and what was applying it when the transaction failed.
type blame struct {
	entry  *entry
	by     projection.Appending
	commit []eventstore.Recorded
}

// mostFaults is how often in a row the transaction may fail while a commit is
// applied, before that is taken for the handlers' doing: they can run into time limits
// of their own, or break the connection. Where it is the database's, the next try does
// not come as far.
const mostFaults = 3

// cut takes the winners from the i-th on out of the judgement, and whatever was
// decided upon them: those that remain depend on none of it. All are judged again
// behind what is written now.
func (b *batch) cut(i int) {
	b.recorded = b.recorded[:b.winners[i].base]
	b.winners, b.losers = b.winners[:i], b.losers[:0]
	b.tags, b.keys = 0, 0
	for k := range b.recorded {
		b.tags += len(b.recorded[k].Tags)
	}
	for _, e := range b.winners {
		if e.commit.Key != "" {
			b.keys++
		}
	}
}

// failedInline deals with a transaction that has failed while a commit was applied,
// and is over. What precedes the commit is written without it; once the commit is
// first, it is tried again, and at last refused. False says that nothing was done
// about it.
func (c *committer) failedInline(b *batch, whose *blame, err error) (dealt bool) {
	e := whose.entry
	switch {
	case !transient(err) || c.fatal != nil:
		return false
	case e != b.winners[0]:
		c.divide(b, e)
		return true
	}
	if e.faults++; e.faults < mostFaults {
		return false
	}
	e.receipt, e.err = eventstore.Receipt{}, whose.by.Refuse(whose.commit, err)
	b.refuse(e)
	return true
}

// refuse answers the first winner, which an inline projection refuses, once it is
// certain that it is one: without care a key is taken for unused and a stream for new,
// and handlers see the commit before the log can say otherwise.
func (b *batch) refuse(e *entry) {
	if !b.careful {
		b.careful, b.looked = true, answers{}
		e.receipt, e.err = eventstore.Receipt{}, nil
		return
	}
	b.settled([]*entry{e})
}

// divide answers the entries of a batch in two batches, the second of which begins
// with one that an inline projection has refused. What precedes it was not in the log
// yet, and may never be, so that was no verdict: now it gets one.
func (c *committer) divide(b *batch, refused *entry) {
	entries, alone := b.entries, c.alone
	at := slices.Index(entries, refused)
	refused.err, b.entries, c.alone = nil, nil, true
	c.commit(entries[:at])
	c.commit(entries[at:])
	c.alone = alone
}

// ownTx lets the state's transaction run on the committer's connection, which has
// begun one and ends it itself.
type ownTx struct{ *session }

type session = pgx.Conn

func (ownTx) Commit(context.Context) error   { return errLent }
func (ownTx) Rollback(context.Context) error { return errLent }
func (ownTx) LargeObjects() pgx.LargeObjects { return pgx.LargeObjects{} }
func (t ownTx) Conn() *pgx.Conn              { return t.session }
