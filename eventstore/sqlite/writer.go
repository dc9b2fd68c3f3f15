package sqlite

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/golang-lru/v2/simplelru"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/groupcommit"
)

// entry is a commit on its way to the writer.
type entry struct {
	commit  eventstore.Commit
	encoded []encoded // beside commit.Events
	settle  func(eventstore.Receipt, error)

	// The outcome, for the writer until the batch is durable.
	receipt eventstore.Receipt
	err     error
	refused bool // err is an inline projection's, and final
}

// encoded is what of an event is encoded before the writer sees it.
type encoded struct {
	metadata []byte
	tags     []byte
}

// writer owns the connection that writes; only its goroutine uses it.
type writer struct {
	store  *Store
	c      *conn
	broken error // why the connection has to be made anew
	head   eventstore.Position
	heads  *simplelru.LRU[eventstore.Stream, *streamHead]
	kinds  *kinds // those of the store, and of the batch being written
	sync   string // the connection's synchronous setting
	moved  int64  // pages of the write-ahead log at the last checkpoint

	batch    []*entry
	recorded []eventstore.Recorded // what the batch adds to the log
	inline   *inlining             // what else the batch does; nil: nothing
}

// streamHead is what appends need to know of a stream.
type streamHead struct {
	id       int64 // 0: the stream does not exist
	revision eventstore.Revision
	last     uuid.UUID // id of the last event
	noted    *entry    // the last commit that touched it, and where its receipt says so
	at       int
}

// mostHeads bounds the streams whose head is kept in memory.
const mostHeads = 65_536

func newWriter(s *Store, c *conn, head eventstore.Position, known *kinds) *writer {
	heads, _ := simplelru.NewLRU[eventstore.Stream, *streamHead](mostHeads, nil)
	return &writer{store: s, c: c, head: head, heads: heads, kinds: known, sync: s.settings.synchronous}
}

// Append implements eventstore.Store. It returns when the commit is synced to
// the disk. Once a batch has taken the commit, the end of ctx is ignored: the
// outcome is at most one transaction away, and certain.
func (s *Store) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	pending, settle := eventstore.NewPending()
	waiting := s.enqueue(ctx, c, settle)
	select {
	case <-pending.Done():
	case <-ctx.Done():
		if waiting != nil && s.appends.Remove(waiting) {
			return eventstore.Receipt{}, ctx.Err()
		}
	}
	return pending.Result()
}

// Enqueue implements eventstore.Enqueuer.
func (s *Store) Enqueue(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
	pending, settle := eventstore.NewPending()
	if ctx.Done() == nil {
		s.enqueue(ctx, c, settle)
		return pending
	}
	var waiting *groupcommit.Entry[*entry]
	put := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		<-put
		if waiting != nil && s.appends.Remove(waiting) {
			settle(eventstore.Receipt{}, ctx.Err())
		}
	})
	waiting = s.enqueue(ctx, c, func(r eventstore.Receipt, err error) {
		stop()
		settle(r, err)
	})
	close(put)
	return pending
}

// enqueue hands the commit to the writer; the result is nil when it was
// settled at once.
func (s *Store) enqueue(ctx context.Context, c eventstore.Commit, settle func(eventstore.Receipt, error)) *groupcommit.Entry[*entry] {
	e, size, err := s.encode(ctx, c)
	if err == nil && s.closed() {
		err = eventstore.ErrClosed
	}
	if err != nil {
		settle(eventstore.Receipt{}, err)
		return nil
	}
	e.settle = settle
	waiting := s.appends.Put(e, size)
	if waiting == nil {
		settle(eventstore.Receipt{}, eventstore.ErrClosed)
	}
	return waiting
}

// encode checks the commit and does, on the caller's goroutine, what does not
// need the writer. It also returns the commit's size in bytes.
func (s *Store) encode(ctx context.Context, c eventstore.Commit) (*entry, int, error) {
	c, err := c.Prepare(s.limits, s.now)
	if err != nil {
		return nil, 0, err
	}
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	e := &entry{commit: c, encoded: make([]encoded, len(c.Events))}
	size := 0
	for i := range c.Events {
		event := &c.Events[i]
		if !event.Metadata.IsZero() {
			if e.encoded[i].metadata, err = event.Metadata.AppendJSON(make([]byte, 0, metadataRoom)); err != nil {
				return nil, 0, fmt.Errorf("%w: event %d: metadata: %w", eventstore.ErrInvalid, i, err)
			}
		}
		if len(event.Tags) > 0 {
			e.encoded[i].tags = []byte(strings.Join(event.Tags, "\n"))
		}
		size += len(event.Data) + len(e.encoded[i].metadata) + len(e.encoded[i].tags) + perEvent
	}
	return e, size, nil
}

const (
	// perEvent is about what an event costs beside its contents.
	perEvent = 100
	// metadataRoom is enough for most metadata.
	metadataRoom = 160
)

// run works until Close: a batch of commits first, then state updates, as
// long as no commit waits.
func (w *writer) run() {
	defer close(w.store.stopped)
	defer func() { w.c.close() }()
	for {
		worked := w.commits()
		worked = w.updates() || worked
		w.checkpoint()
		if worked {
			continue
		}
		// Closed is asked first: what was put before is then still seen by Len.
		if w.store.appends.Closed() && w.store.updates.Closed() && w.store.appends.Len() == 0 && w.store.updates.Len() == 0 {
			return
		}
		<-w.store.wake
	}
}

// checkpoint moves the write-ahead log into the database file once it is long.
// Nobody who has been answered waits for it. Its errors matter: a sync of the
// log that failed here is not repeated by the next commit.
func (w *writer) checkpoint() {
	pages := w.c.guard.pages.Load()
	if pages < w.moved {
		w.moved = 0 // it has begun anew
	}
	if w.broken != nil || pages-w.moved < int64(w.store.settings.checkpoint) {
		return
	}
	w.moved = pages
	if _, err := w.c.row("PRAGMA wal_checkpoint(PASSIVE)", func(*statement) {}); err != nil {
		w.abandon(fmt.Errorf("checkpoint: %w", err))
	}
}

// commits writes one batch, if any commit waits.
func (w *writer) commits() bool {
	s := w.store
	if hold := s.settings.hold; hold != nil {
		if s.appends.Len() == 0 {
			return false // what comes now is not to be taken without hold's consent
		}
		hold()
	}
	w.batch = s.appends.Take(w.batch[:0], s.settings.batchCommits, s.settings.batchBytes)
	if len(w.batch) == 0 {
		return false
	}
	w.recorded = nil
	if err := w.write(); err != nil {
		for _, e := range w.batch {
			e.receipt, e.err = eventstore.Receipt{}, err // also of one that was refused because of others
		}
	} else {
		s.kinds.Store(w.kinds)
		s.tail.Append(w.recorded)
	}
	w.recorded = nil
	for i, e := range w.batch {
		w.batch[i] = nil
		e.settle(e.receipt, e.err)
	}
	return true
}

// write writes the batch in one transaction. When it fails, nothing was
// written.
func (w *writer) write() error {
	for {
		err := w.attempt()
		if !errors.Is(err, errAgain) {
			return err
		}
	}
}

// attempt is write, until a handler of an inline projection has ended the
// transaction: then the commit that is to blame is refused, and the error errAgain.
func (w *writer) attempt() error {
	if err := w.begin(w.store.settings.synchronous); err != nil {
		return fmt.Errorf("append: nothing was written: %w", err)
	}
	if hooks := w.store.inline.Load(); hooks != nil && len(*hooks) > 0 {
		if err := w.beginInline(*hooks); err != nil {
			w.abandon(err)
			return fmt.Errorf("append: nothing was written: %w", err)
		}
		defer w.endInline()
	}
	for _, e := range w.batch {
		if e.refused {
			continue
		}
		if err := w.apply(e); err != nil {
			if errors.Is(err, errAgain) {
				w.again()
				return err
			}
			w.abandon(err)
			return fmt.Errorf("append: nothing was written: %w", err)
		}
	}
	if len(w.recorded) == 0 {
		if err := w.c.run("ROLLBACK"); err != nil {
			w.abandon(err)
		}
		return nil
	}
	if w.inline != nil {
		if err := w.inline.end(w.head); err != nil {
			w.abandon(err)
			return fmt.Errorf("append: nothing was written: %w", err)
		}
	}
	if err := w.c.run("COMMIT"); err != nil {
		w.abandon(err)
		return w.resolve(err)
	}
	if w.inline != nil {
		w.inline.committed()
	}
	return nil
}

// begin starts a transaction, after making the connection anew if need be.
func (w *writer) begin(synchronous string) error {
	if w.broken != nil {
		if err := w.reopen(); err != nil {
			return err
		}
	}
	if w.sync != synchronous {
		if err := w.c.exec("PRAGMA synchronous = " + synchronous); err != nil {
			return err
		}
		w.sync = synchronous
	}
	return w.lock(w.c)
}

// defaultPatience is how long the writer waits for the file's write lock. No other
// process of deed's can have it (see lock.go), but a reader takes it for a moment
// when it finds the index of the write-ahead log half-changed, and so may a tool
// that looks into the file.
const defaultPatience = time.Second

// lock begins a transaction that writes. It does not use SQLite's own way of
// waiting, which knows nothing of the clock in testing/synctest bubbles.
func (w *writer) lock(c *conn) error {
	var began time.Time
	for tries := 0; ; tries++ {
		err := c.run("BEGIN IMMEDIATE")
		if !isCode(err, sqlite3.SQLITE_BUSY) {
			return err
		}
		if locked := w.store.settings.locked; locked != nil {
			locked()
		}
		switch {
		case tries == 0:
			began = time.Now()
		case time.Since(began) > w.store.settings.patience:
			return fmt.Errorf("%w: another program has had the write lock of the file for %s: close what looks into it: %w", eventstore.ErrUnavailable, w.store.settings.patience, err)
		}
		if tries < 100 {
			runtime.Gosched()
		} else {
			time.Sleep(time.Millisecond)
		}
	}
}

// abandon rolls back and forgets what was known of the file.
func (w *writer) abandon(cause error) {
	w.broken = cause
	w.recorded = nil
	w.heads.Purge()
	w.kinds = w.store.kinds.Load()
	w.head = w.store.tail.Head()
	if w.c.inTransaction() {
		_ = w.c.exec("ROLLBACK") // closing the connection does the same
	}
}

// reopen makes the connection anew and checks that the log is as it should be.
func (w *writer) reopen() error {
	c, err := dial(w.store.path, w.store.settings.vfs)
	if err != nil {
		return err
	}
	if err = w.store.configureWriter(c); err != nil {
		c.close()
		return err
	}
	head, known, err := position(c)
	if err == nil && head != w.head {
		err = fmt.Errorf("%w: the file ends at position %d, %d expected: it was changed by another program", eventstore.ErrGap, head, w.head)
	}
	if err == nil {
		err = w.settle(c)
	}
	if err != nil {
		c.close()
		return err
	}
	w.c.close()
	w.c, w.kinds, w.sync, w.moved, w.broken = c, known, w.store.settings.synchronous, 0, nil
	return nil
}

// settle makes an end of pages that a failed commit may have left on the disk,
// and of those that a failed sync may have lost: it moves all that counts into
// the database file and begins a new write-ahead log. The old one must not be
// continued: what the system could not write, it may report as written the
// next time.
func (w *writer) settle(c *conn) error {
	busy := false
	if _, err := c.row("PRAGMA wal_checkpoint(TRUNCATE)", func(s *statement) { busy = s.int64(0) != 0 }); err != nil {
		return err
	}
	if busy {
		return errors.New("the write-ahead log cannot be renewed after a failure while it is read: try again")
	}
	if err := w.lock(c); err != nil {
		return err
	}
	return c.exec("UPDATE deed_log SET id = id; COMMIT")
}

// resolve finds out what became of a batch whose COMMIT failed.
func (w *writer) resolve(cause error) error {
	if err := w.reopen(); err != nil {
		w.broken = err
		return fmt.Errorf("append: %w: %w", eventstore.ErrOutcomeUnknown, cause)
	}
	return fmt.Errorf("append: nothing was written: %w", cause)
}

// apply judges one commit and writes it. The verdict is left in the entry; an
// error is of the file, and fails the batch.
func (w *writer) apply(e *entry) error {
	c := &e.commit
	if c.Key != "" {
		r := w.scanner()
		receipt, used, err := r.receipt(c.Key)
		if err != nil {
			return err
		}
		if used {
			if receipt.Fingerprint != c.Fingerprint {
				e.err = fmt.Errorf("%w: %q", eventstore.ErrKeyReused, c.Key)
			} else {
				e.receipt = receipt
			}
			return nil
		}
	}
	for i := range c.Conditions {
		conflict, err := w.check(&c.Conditions[i])
		if err != nil {
			return err
		}
		if conflict != nil {
			e.err = conflict
			return nil
		}
	}
	if w.inline != nil {
		if err := w.applyInline(e); err != nil || e.err != nil {
			return err
		}
	}
	e.receipt = eventstore.Receipt{First: w.head + 1, Last: w.head + eventstore.Position(len(c.Events)), Fingerprint: c.Fingerprint}
	for i := range c.Events {
		if err := w.insert(e, i); err != nil {
			return err
		}
	}
	if c.Key != "" {
		return w.c.run("INSERT INTO deed_keys (key, fingerprint, first, last) VALUES (?, ?, ?, ?)",
			c.Key, c.Fingerprint, int64(e.receipt.First), int64(e.receipt.Last))
	}
	return nil
}

// scanner reads what the writer sees, the batch so far included. It remembers
// no names, since the batch may be rolled back.
func (w *writer) scanner() *scanner { return &scanner{c: w.c, kinds: w.kinds} }

func (w *writer) check(c *eventstore.Condition) (*eventstore.ConflictError, error) {
	if c.Kind == eventstore.ConditionNoneMatch {
		found, err := w.firstMatch(c.Query, c.After)
		if err != nil || found == 0 {
			return nil, err
		}
		return &eventstore.ConflictError{Kind: c.Kind, Query: c.Query, After: c.After, Found: found}, nil
	}
	stream, err := w.stream(c.Stream)
	if err != nil {
		return nil, err
	}
	actual := stream.revision
	if c.Kind == eventstore.ConditionStreamExists {
		if actual.Version == 0 {
			return &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream}, nil
		}
		return nil, nil
	}
	if actual.Version != c.Revision.Version || c.Revision.Position != 0 && actual.Position != c.Revision.Position ||
		c.LastEvent != uuid.Nil && c.LastEvent != stream.last {
		return &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream, Expected: c.Revision, Actual: actual}, nil
	}
	return nil, nil
}

// fewRecent is how many events are compared in memory rather than looked up.
const fewRecent = 256

// firstMatch returns the position of the first event after the position that
// matches; 0 if none does. It sees the batch so far.
func (w *writer) firstMatch(q eventstore.Query, after eventstore.Position) (eventstore.Position, error) {
	if after >= w.head {
		return 0, nil
	}
	if w.head-after <= fewRecent {
		if found, ok := w.recentMatch(q, after); ok {
			return found, nil
		}
	}
	r := w.scanner()
	p, err := makePlan(q, r.kinds, r.stream)
	if err != nil || len(p.arms) == 0 && !p.everything {
		return 0, err
	}
	at := span{after: after, through: w.head}
	if p.exact && !p.everything {
		found, err := r.candidates(p.arms, at, 1)
		if err != nil || len(found) == 0 {
			return 0, err
		}
		return eventstore.Position(found[0]), nil
	}
	for at.after < at.through {
		p, err := r.page(q, at, 1)
		if err != nil {
			return 0, err
		}
		if len(p.events) > 0 {
			return p.events[0].Position, nil
		}
		if p.done {
			break
		}
		at = at.rest(p.reached)
	}
	return 0, nil
}

// recentMatch is firstMatch in memory; false if not all events are there.
func (w *writer) recentMatch(q eventstore.Query, after eventstore.Position) (eventstore.Position, bool) {
	recent := w.store.tail.Since(after)
	if !recent.Complete {
		return 0, false
	}
	for _, events := range append(recent.Events, w.recorded) {
		for i := range events {
			if events[i].Position > after && q.Matches(&events[i]) {
				return events[i].Position, true
			}
		}
	}
	return 0, true
}

// stream returns the head of a stream, from memory if it is there.
func (w *writer) stream(name eventstore.Stream) (*streamHead, error) {
	if known, ok := w.heads.Get(name); ok {
		return known, nil
	}
	h := &streamHead{}
	_, err := w.c.row("SELECT id FROM deed_streams WHERE category = ? AND name = ?", func(s *statement) { h.id = s.int64(0) }, name.Category, name.ID)
	if err != nil {
		return nil, err
	}
	if h.id != 0 {
		_, err = w.c.row("SELECT version, position, id FROM deed_events INDEXED BY deed_events_stream WHERE stream = ? ORDER BY position DESC LIMIT 1",
			func(s *statement) {
				h.revision = eventstore.Revision{Version: uint64(s.int64(0)), Position: eventstore.Position(s.int64(1))}
				copy(h.last[:], s.view(2))
			}, h.id)
		if err != nil {
			return nil, err
		}
	}
	w.heads.Add(name, h)
	return h, nil
}

// insert writes one event of the commit behind the head.
func (w *writer) insert(e *entry, i int) error {
	event, encoded := &e.commit.Events[i], &e.encoded[i]
	stream, err := w.stream(event.Stream)
	if err != nil {
		return err
	}
	if stream.id == 0 {
		if stream.id, err = w.insertID("INSERT INTO deed_streams (category, name) VALUES (?, ?)", event.Stream.Category, event.Stream.ID); err != nil {
			return err
		}
	}
	name := kind{event.Stream.Category, event.Type}
	kindID, known := w.kinds.id[name]
	if !known {
		if kindID, err = w.insertID("INSERT INTO deed_kinds (category, type) VALUES (?, ?)", name.category, name.eventType); err != nil {
			return err
		}
		w.kinds = w.kinds.clone() // the old one is shared
		w.kinds.add(kindID, name)
	}
	position := w.head + 1
	version := stream.revision.Version + 1
	s, err := w.c.prepare("INSERT INTO deed_events (position, stream, version, kind, id, time, tags, metadata, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)")
	if err != nil {
		return err
	}
	err = errors.Join(s.bindInt64(0, int64(position)), s.bindInt64(1, stream.id), s.bindInt64(2, int64(version)), s.bindInt64(3, kindID),
		s.bindBlob(4, event.ID[:]), s.bindInt64(5, event.Time.UnixNano()), s.bindTextBytes(6, encoded.tags), s.bindTextBytes(7, encoded.metadata), s.bindBlob(8, event.Data))
	if err == nil {
		_, err = s.step()
	}
	s.reset()
	if err != nil {
		return err
	}
	for _, tag := range event.Tags {
		if err := w.c.run("INSERT INTO deed_tags (tag, position, kind) VALUES (?, ?, ?)", tag, int64(position), kindID); err != nil {
			return err
		}
	}
	w.head = position
	stream.revision, stream.last = eventstore.Revision{Version: version, Position: position}, event.ID
	if stream.noted != e {
		stream.noted, stream.at = e, len(e.receipt.Revisions)
		e.receipt.Revisions = append(e.receipt.Revisions, eventstore.StreamRevision{Stream: event.Stream})
	}
	e.receipt.Revisions[stream.at].Revision = stream.revision
	w.recorded = append(w.recorded, eventstore.Recorded{
		ID: event.ID, Stream: event.Stream, Version: version, Position: position,
		Type: event.Type, Tags: event.Tags, Data: event.Data, Metadata: event.Metadata, Time: event.Time,
	})
	return nil
}

func (w *writer) insertID(text string, args ...any) (int64, error) {
	if err := w.c.run(text, args...); err != nil {
		return 0, err
	}
	return w.c.lastInsertID(), nil
}
