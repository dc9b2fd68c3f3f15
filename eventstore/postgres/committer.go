package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/groupcommit"
)

// committer owns the connection that appends; only its goroutine uses it.
type committer struct {
	s        *Store
	conn     *pgx.Conn // nil: there is none
	prepared *pgx.Conn // has what copyMessages executes
	l        *ledger
	fatal    error // why nothing can be appended any more
	calm     int   // batches in a row that found the log as the ledger knew it
	buffer   []byte
	taken    []*entry
	alone    bool      // a batch takes no others along
	began    time.Time // since when the database has not answered; zero: it does
}

func newCommitter(s *Store) *committer {
	return &committer{s: s, l: newLedger(), calm: calmEnough}
}

// Append implements eventstore.Store. It returns when the commit is durable as
// PostgreSQL and [SynchronousCommit] define it. When ctx ends after a batch has
// taken the commit, the error is eventstore.ErrOutcomeUnknown: the commit goes
// on, and its key or the ids of its events tell what became of it.
func (s *Store) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	pending, settle := eventstore.NewPending()
	waiting := s.enqueue(ctx, c, settle)
	select {
	case <-pending.Done():
		return pending.Result()
	case <-ctx.Done():
	}
	if waiting != nil && s.appends.Remove(waiting) {
		return eventstore.Receipt{}, ctx.Err()
	}
	select {
	case <-pending.Done():
		return pending.Result()
	default:
		return eventstore.Receipt{}, fmt.Errorf("append: %w: %w", eventstore.ErrOutcomeUnknown, ctx.Err())
	}
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

// enqueue hands the commit to the committer; the result is nil when it was
// settled at once.
func (s *Store) enqueue(ctx context.Context, c eventstore.Commit, settle func(eventstore.Receipt, error)) *groupcommit.Entry[*entry] {
	e, err := s.encode(ctx, c)
	if err == nil && s.closed() {
		err = eventstore.ErrClosed
	}
	if err != nil {
		settle(eventstore.Receipt{}, err)
		return nil
	}
	e.settle = settle
	waiting := s.appends.Put(e, len(e.rows)+perCondition*len(c.Conditions))
	if waiting == nil {
		settle(eventstore.Receipt{}, eventstore.ErrClosed)
	}
	return waiting
}

// encode checks the commit and does, on the caller's goroutine, what does not
// need the committer.
func (s *Store) encode(ctx context.Context, c eventstore.Commit) (*entry, error) {
	c, err := c.Prepare(s.limits, s.now)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	e := &entry{commit: c, offsets: make([]int, len(c.Events))}
	size := 0
	for i := range c.Events {
		event := &c.Events[i]
		size += perEvent + metadataRoom + len(event.Stream.Category) + len(event.Stream.ID) + len(event.Data)
		for _, tag := range event.Tags {
			size += perTag + len(tag)
		}
	}
	e.rows = make([]byte, 0, size)
	for i := range c.Events {
		event := &c.Events[i]
		var metadata []byte
		if !event.Metadata.IsZero() {
			if metadata, err = event.Metadata.AppendJSON(make([]byte, 0, metadataRoom)); err != nil {
				return nil, fmt.Errorf("%w: event %d: metadata: %w", eventstore.ErrInvalid, i, err)
			}
		}
		e.rows = appendRow(e.rows, event.Stream.Slice(), event.ID, event.Time.UnixNano(), event.Stream.String(), event.Tags, metadata, event.Data)
		e.offsets[i] = len(e.rows)
	}
	return e, nil
}

const (
	// perEvent and perTag are about what an event and a tag take beside their texts
	// and data.
	perEvent = 128
	perTag   = 4
	// metadataRoom is enough for most metadata.
	metadataRoom = 160
	// perCondition is what a condition counts for, so that the ledger can keep all
	// the streams of a batch.
	perCondition = 256
)

// gathering bounds the wait for those who were just answered. It is about what a
// batch costs by itself, where that is least.
const gathering = 300 * time.Microsecond

// run works until Close and then finishes what was handed over.
func (c *committer) run() {
	s := c.s
	defer func() {
		if c.conn != nil {
			c.hangUp()
		}
	}()
	for {
		s.appends.Gather(gathering, s.settings.batchCommits, s.settings.batchBytes)
		// Whoever holds batches back has the say over each: what comes after Len is
		// seen in the next turn.
		c.taken = c.taken[:0]
		if hold := s.settings.hold; hold == nil || s.appends.Len() > 0 {
			if hold != nil {
				hold()
			}
			c.taken = s.appends.Take(c.taken, s.settings.batchCommits, s.settings.batchBytes)
		}
		if len(c.taken) > 0 {
			c.commit(c.taken)
			clear(c.taken)
			continue
		}
		// Closed is asked first: what was put before is then still seen by Len.
		if s.appends.Closed() && s.appends.Len() == 0 {
			return
		}
		<-s.wake
	}
}

// commit answers every entry of a batch.
func (c *committer) commit(entries []*entry) {
	b := &batch{entries: slices.Clone(entries)}
	pause := firstPause
	for len(b.entries) > 0 {
		err := c.fatal
		if err == nil {
			err = c.step(b)
		}
		if err == nil {
			c.began, pause = time.Time{}, firstPause
			continue
		}
		if errors.Is(err, eventstore.ErrGap) {
			c.fatal = err
		}
		if !transient(err) || c.fatal != nil {
			if len(b.entries) > 1 && c.fatal == nil && len(b.tried()) == 0 {
				// One of them is to blame; the others are not to suffer for it.
				alone := c.alone
				c.alone = true
				for _, e := range b.entries {
					c.commit([]*entry{e})
				}
				c.alone = alone
				return
			}
			b.fail(fmt.Errorf("append: nothing was written: %w", err), err)
			return
		}
		// The database does not answer. It is tried again for as long as patience
		// lasts, counted from the first failure and not anew for each batch.
		if c.began.IsZero() {
			c.began = time.Now()
		}
		if broken(err) || code(err) == "25006" { // another server may be the primary now
			c.hangUp()
		}
		patience := c.s.settings.patience
		if c.s.closed() {
			patience = min(patience, closingPatience)
		}
		if time.Since(c.began) > patience {
			b.fail(unavailable("append", err), err)
			return
		}
		time.Sleep(pause)
		pause = min(2*pause, longestPause)
	}
}

// closingPatience is how long Close waits for a database that does not answer.
const closingPatience = 5 * time.Second

// fail answers the entries that have no answer yet. What was sent before the
// connection was lost may have been written.
func (b *batch) fail(err, cause error) {
	for _, e := range b.entries {
		failure := err
		if e.tries > 0 {
			failure = fmt.Errorf("append: %w: %w", eventstore.ErrOutcomeUnknown, cause)
		}
		e.settle(eventstore.Receipt{}, failure)
	}
	b.entries = nil
}

// settled answers entries and takes them out of the batch.
func (b *batch) settled(done []*entry) {
	if len(done) == 0 {
		return
	}
	if len(done) == len(b.entries) {
		b.entries = nil
	} else {
		gone := make(map[*entry]bool, len(done))
		for _, e := range done {
			gone[e] = true
		}
		b.entries = slices.DeleteFunc(b.entries, func(e *entry) bool { return gone[e] })
	}
	for _, e := range done {
		e.settle(e.receipt, e.err)
	}
}

// step brings the batch a step further: it judges, looks up what is missing
// for that, and writes the winners. Entries that got their answer are gone from
// the batch.
func (c *committer) step(b *batch) error {
	if err := c.connect(b); err != nil {
		return err
	}
	if err := c.recover(b); err != nil {
		return err
	}
	if len(b.entries) == 0 {
		return nil
	}
	need, settled := b.judge(c.l)
	if need.any() {
		return c.lookup(b, &need)
	}
	if len(settled) > 0 {
		// What follows them may depend on nothing they did: they did nothing.
		b.settled(settled)
	}
	if len(b.winners) == 0 {
		if len(b.later) == 0 && len(b.losers) == 0 {
			return nil
		}
		if !b.fresh {
			// A conflict must be one with the log as it is, not as it was.
			return c.lookup(b, &questions{refresh: true})
		}
		b.settled(b.losers)
		return nil
	}
	if err := c.makeKinds(b); err != nil {
		return err
	}
	if err := c.prepare(); err != nil {
		return err
	}
	done, err := c.write(b, c.choose(b))
	if err != nil {
		return err
	}
	if done == nil {
		return nil // others had written: it is judged again
	}
	c.written(b, done)
	return nil
}

// written enters the winners into the ledger and answers them.
func (c *committer) written(b *batch, done *landing) {
	s := c.s
	b.move(done.head - c.l.known) // the ledger still ends where the batch was judged
	losers := b.losers
	if len(done.delta) > 0 {
		b.forgetKeys()
		if err := s.enterForeign(c.l, done.delta); err != nil {
			c.fatal = err
		}
		losers = nil // others have written: the next round judges them
	}
	b.fresh = true
	if len(b.later) > 0 {
		b.looked.make()
		for _, e := range b.winners {
			if e.commit.Key != "" {
				r := e.receipt
				r.Revisions = slices.Clone(r.Revisions)
				r.Duplicate = true
				b.looked.keys[e.commit.Key] = r
			}
		}
	}
	if !done.inline {
		s.passed(done.head + eventstore.Position(len(b.recorded)))
	}
	s.follower.committed(b.recorded)
	s.meter.batch(done, len(b.winners), len(b.recorded))
	b.settled(append(slices.Clone(b.winners), losers...))
	// While those who were answered make their next commits.
	for i := range b.recorded {
		c.l.enter(&b.recorded[i])
	}
	s.notifier.tell(c.l.known)
}

// connect makes a connection if there is none. A batch whose outcome is not
// known is then looked for in the log.
func (c *committer) connect(b *batch) error {
	if c.conn != nil {
		return nil
	}
	// Not the caller's context, which is one of many; and not one that Close has
	// ended, as Close waits for what was handed over.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.s.base), connectTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, c.s.config)
	if err != nil {
		return err
	}
	c.conn = conn
	if c.l.known == 0 && c.l.recent.events == nil {
		return c.lookup(b, &questions{refresh: true})
	}
	// The event that was last seen must still be there.
	if c.l.known > 0 {
		var id uuid.UUID
		err := conn.QueryRow(ctx, c.s.texts.lastEvent, int64(c.l.known)).Scan(&id)
		if errors.Is(err, pgx.ErrNoRows) {
			head, err := c.s.readHead(ctx, conn)
			if err != nil {
				return err
			}
			return errRewound(head, c.l.known)
		}
		if err != nil {
			return err
		}
		if err := c.l.recognise(id); err != nil {
			return err
		}
	}
	return c.lookup(b, &questions{refresh: true})
}

const (
	connectTimeout = 5 * time.Second
	answerTimeout  = 30 * time.Second
)

// hangUp gives the connection up.
func (c *committer) hangUp() {
	if c.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.conn.Close(ctx)
	c.conn = nil
}

// lookup brings the ledger to the head and answers the questions there.
func (c *committer) lookup(b *batch, q *questions) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.s.base), answerTimeout)
	defer cancel()
	l := &lookup{s: c.s}
	if err := c.snapshot(ctx, l, q); err != nil {
		return asLost(err)
	}
	if err := c.knowKinds(ctx, l.delta); err != nil {
		return asLost(err)
	}
	before := c.l.known
	if err := l.settle(c.l, b, q); err != nil {
		return err
	}
	if c.l.known > before {
		c.calm = 0
	}
	return nil
}

// snapshot asks the questions in one transaction with one snapshot, and in one
// round trip if that is possible.
func (c *committer) snapshot(ctx context.Context, l *lookup, q *questions) error {
	batch := &pgx.Batch{}
	batch.Queue("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
	l.queue(batch, c.l.known, q)
	if !l.unanswered {
		batch.Queue("COMMIT")
	}
	err := c.conn.SendBatch(ctx, batch).Close()
	if err == nil && l.unanswered {
		if err = l.scan(ctx, c.conn, q); err == nil {
			_, err = c.conn.Exec(ctx, "COMMIT")
		}
	}
	if err != nil && !broken(err) {
		_, _ = c.conn.Exec(ctx, "ROLLBACK")
	}
	return err
}

// asLost turns the end of an answer's time into a lost connection: nobody asked
// for it.
func asLost(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %s have passed", errNoAnswer, answerTimeout)
	}
	return err
}

// recover answers the entries that were sent without an answer and have been
// written all the same. It searches as far as the ledger goes, so that nothing
// is judged again that is in the log already.
func (c *committer) recover(b *batch) error {
	tried := b.tried()
	if len(tried) == 0 || b.searched == c.l.known {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.s.base), answerTimeout)
	defer cancel()
	searched, from := c.l.known, tried[0].from
	ids, sizes := make([]string, len(tried)), make([]int32, len(tried))
	wanted := make(map[uuid.UUID]*entry, len(tried))
	for i, e := range tried {
		first := e.commit.Events[0].ID
		from, ids[i], sizes[i], wanted[first] = min(from, e.from), first.String(), int32(len(e.commit.Events)), e
		e.receipt = eventstore.Receipt{Fingerprint: e.commit.Fingerprint}
	}
	rows, err := c.conn.Query(ctx, c.s.texts.written, int64(from), ids, sizes)
	if err != nil {
		return asLost(err)
	}
	defer rows.Close()
	for rows.Next() {
		var id uuid.UUID
		var position, version int64
		if err := rows.Scan(&id, &position, &version); err != nil {
			return asLost(err)
		}
		r, events := &wanted[id].receipt, wanted[id].commit.Events
		if r.First == 0 {
			r.First, r.Last = eventstore.Position(position), eventstore.Position(position)+eventstore.Position(len(events))-1
		}
		note(r, events[eventstore.Position(position)-r.First].Stream, eventstore.Revision{Version: uint64(version), Position: eventstore.Position(position)})
	}
	if err := rows.Err(); err != nil {
		return asLost(err)
	}
	var found []*entry
	for _, e := range tried {
		if e.receipt.First > 0 {
			e.err = nil
			found = append(found, e)
			c.s.passed(e.receipt.Last)
			c.s.follower.expect(e.receipt.Last)
			c.s.notifier.tell(e.receipt.Last)
		}
	}
	b.searched = searched
	b.settled(found)
	return nil
}

// makeKinds makes the kinds of the batch's events that are new.
func (c *committer) makeKinds(b *batch) error {
	missing := c.missingKinds(b)
	if missing == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.s.base), answerTimeout)
	defer cancel()
	return asLost(c.s.makeKinds(ctx, c.conn, missing))
}

// missingKinds returns the kinds of the batch's events that are not known.
func (c *committer) missingKinds(b *batch) map[kind]bool {
	known := c.s.kinds.Load()
	var missing map[kind]bool
	for _, e := range b.entries {
		for i := range e.commit.Events {
			name := kind{e.commit.Events[i].Stream.Category, e.commit.Events[i].Type}
			if _, ok := known.id[name]; !ok {
				if missing == nil {
					missing = map[kind]bool{}
				}
				missing[name] = true
			}
		}
	}
	return missing
}
