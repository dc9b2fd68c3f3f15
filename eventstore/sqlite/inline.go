package sqlite

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

var _ projection.Inliner = (*Store)(nil)

// Inline implements projection.Inliner. Each commit is applied behind a savepoint
// of its own, on the writer's connection: what its handlers take, everybody's
// appends wait for.
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

// UpdateAtHead implements projection.Inliner: updates and appends take turns.
func (s *Store) UpdateAtHead(ctx context.Context, fn func(tx projection.StateTx, head eventstore.Position) error) error {
	return s.Update(ctx, func(tx projection.StateTx) error { return fn(tx, s.tail.Head()) })
}

// errAgain: the batch lost its transaction because of one commit.
var errAgain = errors.New("write the batch again, without the commit that was refused")

// inlining is what a batch does beside writing events.
type inlining struct {
	tx    *appendTx
	begun []projection.Appending
}

// appendTx implements projection.AppendTx.
type appendTx struct {
	*stateTx
	held map[string]bool
}

// Hold implements projection.AppendTx.
func (tx *appendTx) Hold(names []string, reads ...projection.Read) (map[string]projection.Held, error) {
	found := map[string]projection.Held{}
	for _, name := range names {
		if tx.held[name] {
			continue
		}
		lease, _, err := readLease(tx.c, name)
		if err != nil {
			return nil, err
		}
		if lease.Epoch == 0 {
			continue
		}
		at, err := tx.Checkpoint(name)
		if err != nil {
			return nil, err
		}
		if tx.held == nil {
			tx.held = map[string]bool{}
		}
		tx.held[name] = true
		found[name] = projection.Held{Lease: lease, Checkpoint: at}
	}
	for _, r := range reads {
		for i, key := range r.Keys {
			value, there, err := tx.Get(r.Table, key)
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

func (w *writer) beginInline(hooks []*projection.Appends) error {
	w.inline = &inlining{tx: &appendTx{stateTx: &stateTx{store: w.store, c: w.c}}}
	for _, a := range hooks {
		b, err := (*a).Begin(context.Background(), w.inline.tx, w.head, nil)
		if err != nil {
			w.endInline()
			return err
		}
		w.inline.begun = append(w.inline.begun, b)
	}
	return nil
}

func (w *writer) endInline() {
	w.inline.tx.end()
	w.inline = nil
}

// applyInline applies a commit that is about to be written. Where a projection
// refuses it, nothing remains of that, and the verdict is in the entry.
func (w *writer) applyInline(e *entry) error {
	recorded, err := w.foresee(e)
	if err != nil {
		return err
	}
	if err := w.c.run("SAVEPOINT inline"); err != nil {
		return err
	}
	tx := w.inline.tx
	made := tx.made
	for _, b := range w.inline.begun {
		err = b.Apply(context.Background(), recorded)
		tx.close() // rows that a handler has left open are not to be in the way of others
		if err != nil {
			break
		}
	}
	if !w.c.inTransaction() { // SQL may ask for that, with OR ROLLBACK
		if w.c.harm != nil {
			return w.c.harm
		}
		if _, is := errors.AsType[*projection.InlineError](err); !is {
			err = fmt.Errorf("append: nothing was written: an inline projection has ended the transaction: %w", errRolledBack)
		}
		e.receipt, e.err, e.refused = eventstore.Receipt{}, err, true
		return errAgain
	}
	if err == nil && tx.failed != nil {
		return tx.failed
	}
	if err == nil {
		return w.c.run("RELEASE inline")
	}
	if _, refused := errors.AsType[*projection.InlineError](err); !refused || tx.failed != nil {
		return err
	}
	e.receipt, e.err, e.refused = eventstore.Receipt{}, err, true
	tx.made = made
	tx.close()
	return w.c.exec("ROLLBACK TO inline; RELEASE inline")
}

// foresee returns the events of the commit as they will be in the log.
func (w *writer) foresee(e *entry) ([]eventstore.Recorded, error) {
	events := e.commit.Events
	recorded := make([]eventstore.Recorded, len(events))
	for i := range events {
		event := &events[i]
		stream, err := w.stream(event.Stream)
		if err != nil {
			return nil, err
		}
		version := stream.revision.Version + 1
		for j := i - 1; j >= 0; j-- {
			if events[j].Stream == event.Stream {
				version = recorded[j].Version + 1
				break
			}
		}
		recorded[i] = eventstore.Recorded{
			ID: event.ID, Stream: event.Stream, Version: version, Position: w.head + eventstore.Position(i) + 1,
			// Of their own: it is not written yet, and handlers may change what they get.
			Type: event.Type, Tags: slices.Clone(event.Tags), Data: slices.Clone(event.Data), Metadata: event.Metadata, Time: event.Time,
		}
	}
	return recorded, nil
}

// end writes how far the projections are when the batch is.
func (i *inlining) end(head eventstore.Position) error {
	for _, b := range i.begun {
		if err := b.End(context.Background(), head); err != nil {
			return err
		}
	}
	return i.tx.failed
}

// committed tells what the transaction has made.
func (i *inlining) committed() {
	for name, id := range i.tx.made {
		i.tx.store.tables.Store(name, id)
	}
	for _, b := range i.begun {
		b.Committed()
	}
}

// again forgets what was known of a transaction that is over.
func (w *writer) again() {
	w.recorded = nil
	w.heads.Purge()
	w.kinds = w.store.kinds.Load()
	w.head = w.store.tail.Head()
	for _, e := range w.batch {
		if !e.refused {
			e.receipt, e.err = eventstore.Receipt{}, nil
		}
	}
}
