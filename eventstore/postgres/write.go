package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/deed-go/deed/eventstore"
)

// form is how a batch is written. All forms take the same lock and keep the
// same promises.
type form uint8

const (
	// formCopy sends everything in one message: take the lock, COPY. Where the log
	// does not end where the ledger does, the first position is taken, since there
	// are no holes, and the primary key refuses the batch. The fastest, as long as
	// nobody else writes.
	formCopy form = iota + 1
	// formFunction calls one function, which moves the batch behind what others
	// have written, if that does not concern it. The server takes the lock only
	// when it has the whole message, and gives it up without hearing from the
	// client again. It is the form for poolers.
	formFunction
	// formTwoTrips takes the lock and asks what others have written, takes along
	// what has gathered meanwhile, judges on that, and then sends the COPY and the
	// COMMIT. It always gets ahead, and holds the lock over a round trip. When
	// several processes write, its batches are the largest: twice to three times the
	// events a second of the function, side by side.
	formTwoTrips
)

// String names the form in metrics.
func (f form) String() string {
	switch f {
	case formCopy:
		return "copy"
	case formFunction:
		return "function"
	case formTwoTrips:
		return "two_trips"
	}
	return "unknown"
}

const (
	// calmEnough batches in a row that nobody else wrote between are taken to mean
	// that nobody does.
	calmEnough = 3
	// fewTries is how often a batch is judged anew because of others before it
	// takes the lock first.
	fewTries = 2
)

// choose picks the form.
func (c *committer) choose(b *batch) form {
	if choice := c.s.settings.forms; choice != nil {
		return choice(b)
	}
	switch {
	case b.anchored, b.restless >= fewTries, len(c.s.inlines()) > 0:
		return formTwoTrips
	case c.s.settings.pooled:
		return formFunction
	case c.calm >= calmEnough:
		return formCopy
	}
	return formTwoTrips
}

// landing tells where a batch was written.
type landing struct {
	form  form
	head  eventstore.Position // of the log before the batch
	delta []foreign           // what others had written behind the ledger
	// foreign says that somebody else has written since the batch before.
	foreign bool
	wait    time.Duration // for the lock
	hold    time.Duration // of the lock, at most
	inline  bool          // inline projections were applied, or know that they were not
}

// write writes the winners. Without a landing and an error nothing was
// written, and the ledger has learned why.
func (c *committer) write(b *batch, how form) (*landing, error) {
	var done *landing
	var err error
	switch how {
	case formCopy:
		done, err = c.copyAt(b)
	case formFunction:
		done, err = c.call(b)
	default:
		done, err = c.twoTrips(b)
	}
	if done != nil {
		done.form = how
		if done.foreign {
			c.calm = 0
		} else {
			c.calm++
		}
		return done, nil
	}
	c.calm = 0
	switch code(err) {
	case "":
		if err == nil {
			b.restless++
		}
		return nil, err
	case codeRewound:
		return nil, c.lookup(b, &questions{refresh: true}) // which fails, and says why
	case codeIsolation:
		return nil, fmt.Errorf("%w: %w", eventstore.ErrInvalid, err)
	case "23505":
		if how == formCopy && positionTaken(err) && !c.s.settings.unlocked {
			b.restless++
			return nil, c.lookup(b, &questions{refresh: true})
		}
		// Something that was taken for new is not: a stream, a key, or a position,
		// where somebody writes without the lock.
		c.s.meter.collided()
		b.careful, b.looked = true, answers{}
		if b.collisions++; b.collisions > mostCollisions {
			return nil, fmt.Errorf("%w: %w", eventstore.ErrUnavailable, err)
		}
		return nil, c.lookup(b, &questions{refresh: true})
	case "55P03":
		c.s.unblock(c.conn, 0)
	}
	return nil, err
}

// positionTaken reports whether it was a position that somebody else has used.
func positionTaken(err error) bool {
	answer, ok := errors.AsType[*pgconn.PgError](err)
	return ok && answer.ConstraintName == "events_pkey"
}

// mostCollisions ends a batch that meets the same wall again and again.
const mostCollisions = 100

// answered reports whether the server has said that nothing was written.
func answered(err error) bool {
	answer, ok := errors.AsType[*pgconn.PgError](err)
	if !ok || broken(err) {
		return false // a pooler has errors, too, for servers that it has lost
	}
	if answer.SeverityUnlocalized != "" {
		return answer.SeverityUnlocalized == "ERROR"
	}
	return answer.Severity == "ERROR"
}

// Names of the statements that the committer's connection has prepared.
const (
	preparedLock   = "deed lock"
	preparedEvents = "deed COPY events"
	preparedTags   = "deed COPY tags"
	preparedKeys   = "deed COPY keys"
	preparedCommit = "deed commit"
)

// prepare prepares what copyMessages executes, once for each connection.
func (c *committer) prepare() error {
	if c.s.settings.pooled || c.prepared == c.conn {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.s.base), answerTimeout)
	defer cancel()
	texts, trip := c.s.texts, c.conn.PgConn().StartPipeline(ctx)
	for _, one := range [][2]string{
		{preparedLock, texts.lockTimed}, {preparedEvents, texts.copyEvents}, {preparedTags, texts.copyTags}, {preparedKeys, texts.copyKeys}, {preparedCommit, "COMMIT"},
	} {
		trip.SendPrepare(one[0], one[1], nil)
	}
	// What is asked for when a connection is made does not reach the server through
	// every proxy, or is undone by a hook of the program's; a batch relies on these.
	for _, name := range []string{"lock_timeout", "idle_in_transaction_session_timeout", "default_transaction_isolation", "synchronous_commit"} {
		if value, ok := c.s.config.RuntimeParams[name]; ok {
			trip.SendQueryParams("SELECT set_config($1, $2, false)", [][]byte{[]byte(name), []byte(value)}, nil, nil, nil)
		}
	}
	err := trip.Sync()
	if closing := trip.Close(); err == nil {
		err = closing
	}
	if err != nil {
		c.hangUp() // some may be there, and are not made twice
		return asLost(err)
	}
	c.prepared = c.conn
	return nil
}

// copyMessages returns the messages that write the batch, with the data that the
// server will ask for. They are a transaction, with the lock, or the end of one. What
// they execute is prepared, which saves the server parsing and planning while others
// wait; behind a pooler it is a query.
func (c *committer) copyMessages(b *batch, whole bool) []byte {
	if cap(c.buffer) > 8<<20 {
		c.buffer = nil
	}
	to := c.buffer[:0]
	execute := appendExecute
	if c.s.settings.pooled {
		text := c.s.texts.copyEvents
		if b.tags > 0 {
			text += ";" + c.s.texts.copyTags
		}
		if b.keys > 0 {
			text += ";" + c.s.texts.copyKeys
		}
		if whole { // nobody chooses it: see choose
			text = fmt.Sprintf("SELECT pg_advisory_xact_lock(%d);", c.s.lock) + text
		} else {
			text += ";COMMIT"
		}
		to = appendQuery(to, text)
		execute = func(to []byte, _ string, _ ...int64) []byte { return to }
	} else if whole && !c.s.settings.unlocked {
		to = execute(to, preparedLock, c.s.lock)
	}
	known := c.s.kinds.Load().id
	to = appendCopy(execute(to, preparedEvents), func(to []byte) []byte {
		for _, e := range b.winners {
			for i := range e.commit.Events {
				r := &b.recorded[e.base+i]
				setRow(e.row(i), uint64(r.Position), r.Version, known[kind{r.Stream.Category, r.Type}])
			}
			to = append(to, e.rows...)
		}
		return to
	})
	if b.tags > 0 {
		to = appendCopy(execute(to, preparedTags), func(to []byte) []byte {
			for i := range b.recorded {
				r := &b.recorded[i]
				for _, tag := range r.Tags {
					to = appendInt16(to, 3)
					to = fieldText(to, tag)
					to = fieldInt64(to, int64(r.Position))
					to = fieldInt32(to, known[kind{r.Stream.Category, r.Type}])
				}
			}
			return to
		})
	}
	if b.keys > 0 {
		to = appendCopy(execute(to, preparedKeys), func(to []byte) []byte {
			for _, e := range b.winners {
				if e.commit.Key == "" {
					continue
				}
				to = appendInt16(to, 4)
				to = fieldText(to, e.commit.Key)
				to = fieldText(to, e.commit.Fingerprint)
				to = fieldInt64(to, int64(e.receipt.First))
				to = fieldInt64(to, int64(e.receipt.Last))
			}
			return to
		})
	}
	if !c.s.settings.pooled {
		if !whole {
			to = execute(to, preparedCommit)
		}
		to = appendSync(to)
	}
	c.buffer = to
	return to
}

// forgotten turns the answer that a statement is not there, which somebody has taken
// away or a proxy has left on another connection, into a lost connection.
func (c *committer) forgotten(err error) error {
	if code(err) != "26000" {
		return err
	}
	c.hangUp()
	return fmt.Errorf("%w: %s", errForgotten, err.Error())
}

// copyAt writes the batch in one message.
func (c *committer) copyAt(b *batch) (*landing, error) {
	b.trying(c.l.known)
	answer, err := c.exchange(c.copyMessages(b, true))
	if err != nil {
		if answered(err) {
			b.refused()
		}
		return nil, c.forgotten(err)
	}
	return &landing{head: c.l.known, wait: answer.wait, hold: answer.hold}, nil
}

// exchanged is what came back for a message.
type exchanged struct {
	wait, hold time.Duration
}

// exchange sends what copyMessages has made, without waiting to be asked for the
// data, and reads the answers. When a statement fails, the server skips the rest.
func (c *committer) exchange(message []byte) (exchanged, error) {
	var out exchanged
	conn := c.conn.PgConn()
	began := time.Now()
	deadline := began.Add(answerTimeout)
	if err := conn.Conn().SetDeadline(deadline); err != nil {
		return out, err
	}
	if _, err := conn.Conn().Write(message); err != nil {
		c.hangUp()
		return out, err
	}
	if sent := c.s.settings.sent; sent != nil {
		sent()
	}
	var failure error
	for {
		answer, err := conn.ReceiveMessage(context.Background())
		if err != nil {
			if failure == nil || answered(failure) {
				failure = err // the connection has to be made anew, whatever the answer was
			}
			c.hangUp()
			return out, failure
		}
		switch m := answer.(type) {
		case *pgproto3.DataRow:
			// The only row is that of the lock: when it was asked for, and when it was there,
			// in microseconds. It comes when the COPY begins, which may have waited, too.
			if v := m.Values; len(v) == 3 && len(v[0]) == 8 && len(v[2]) == 8 {
				out.wait = max(0, time.Duration(binary.BigEndian.Uint64(v[2])-binary.BigEndian.Uint64(v[0]))*time.Microsecond)
			}
		case *pgproto3.ErrorResponse:
			if failure == nil {
				failure = pgconn.ErrorResponseToPgError(m)
			}
		case *pgproto3.ReadyForQuery:
			out.hold = max(0, time.Since(began)-out.wait)
			if err := conn.Conn().SetDeadline(time.Time{}); err != nil && failure == nil {
				failure = err
			}
			return out, failure
		}
	}
}

// call writes the batch by one call of the function.
func (c *committer) call(b *batch) (*landing, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.s.base), answerTimeout)
	defer cancel()
	began := time.Now()
	b.trying(c.l.known)
	result, err := c.s.callAppend(ctx, c.conn, c.s.texts.appendBatch, b, c.l.known, func() {
		if sent := c.s.settings.sent; sent != nil {
			sent()
		}
	})
	if err != nil {
		if answered(err) {
			b.refused()
		} else {
			c.hangUp()
		}
		return nil, asLost(err)
	}
	if !result.written {
		b.refused()
	}
	if result.more {
		// More was written than is worth reading: begin anew at the head.
		return nil, c.lookup(b, &questions{refresh: true})
	}
	if err := c.knowKinds(ctx, result.delta); err != nil {
		return nil, err
	}
	if !result.written {
		b.forgetKeys()
		if err := c.s.enterForeign(c.l, result.delta); err != nil {
			return nil, err
		}
		b.fresh = true
		return nil, nil
	}
	done := &landing{head: result.head, delta: result.delta, foreign: len(result.delta) > 0, wait: result.wait}
	done.hold = max(0, time.Since(began)-result.wait)
	return done, nil
}

// knowKinds learns the kinds that others have made, if what they have written is of
// such.
func (c *committer) knowKinds(ctx context.Context, delta []foreign) error {
	if c.s.knows(delta) {
		return nil
	}
	return c.s.learn(ctx, c.conn)
}

// called is what the function has to say.
type called struct {
	head    eventstore.Position
	written bool
	more    bool // the delta was too long
	delta   []foreign
	wait    time.Duration
}

// callAppend calls the function append_events for what was judged on the log
// up to known.
func (s *Store) callAppend(ctx context.Context, conn *pgx.Conn, text string, b *batch, known eventstore.Position, sent func()) (called, error) {
	values, oids := s.arguments(b, known)
	formats := make([]int16, len(values))
	for i := range formats {
		formats[i] = pgx.BinaryFormatCode
	}
	var reader *pgconn.ResultReader
	if s.settings.pooled {
		reader = conn.PgConn().ExecParams(ctx, text, values, oids, formats, binaryFormat)
	} else {
		description, err := conn.Prepare(ctx, text, text)
		if err != nil {
			return called{}, err
		}
		reader = conn.PgConn().ExecStatement(ctx, description, values, formats, binaryFormat)
	}
	sent()
	var out called
	var failed error
	first := true
	for reader.NextRow() {
		row := reader.Values()
		if first {
			first = false
			out.head = eventstore.Position(binary.BigEndian.Uint64(row[0]))
			out.written = binary.BigEndian.Uint64(row[1]) == 1
			out.wait = time.Duration(binary.BigEndian.Uint32(row[2])) * time.Microsecond
			continue
		}
		f, err := decodeForeign(row)
		if err != nil {
			failed = err
			break
		}
		out.delta = append(out.delta, f)
	}
	if _, err := reader.Close(); err != nil {
		return out, err
	}
	if failed == nil && first {
		failed = errors.New("append_events returned nothing: the schema was changed")
	}
	out.more = out.head > known && len(out.delta) == 0
	return out, failed
}

// arguments are those of append_events, in order.
func (s *Store) arguments(b *batch, known eventstore.Position) (values [][]byte, oids []uint32) {
	add := func(oid uint32, value []byte) {
		values, oids = append(values, value), append(oids, oid)
	}
	add(pgtype.Int8OID, appendInt64(nil, s.lock))
	add(pgtype.Int8OID, appendInt64(nil, int64(known)))
	add(pgtype.Int4OID, appendInt32(nil, mostDelta))

	// What the batch relies on: the streams it writes or has conditions on, and
	// the queries of its conditions.
	seen := map[eventstore.Stream]bool{}
	var streams []string
	rely := func(name eventstore.Stream) {
		if !seen[name] {
			seen[name] = true
			streams = append(streams, name.String())
		}
	}
	var items []eventstore.Item
	for _, e := range b.winners {
		for i := range e.commit.Events {
			rely(e.commit.Events[i].Stream)
		}
		for i := range e.commit.Conditions {
			k := &e.commit.Conditions[i]
			switch {
			case k.Kind != eventstore.ConditionNoneMatch:
				rely(k.Stream)
			case k.Query.Everything:
				items = append(items, eventstore.Item{})
			default:
				items = append(items, k.Query.Items...)
			}
		}
	}
	add(pgtype.TextArrayOID, appendTexts(nil, streams))
	nullable := func(of func(*eventstore.Item) string) {
		out := appendArray(nil, pgtype.TextOID, len(items))
		for i := range items {
			if text := of(&items[i]); text != "" {
				out = fieldText(out, text)
			} else {
				out = appendInt32(out, null)
			}
		}
		add(pgtype.TextArrayOID, out)
	}
	nullable(func(i *eventstore.Item) string {
		if i.Stream.IsZero() {
			return ""
		}
		return i.Stream.String()
	})
	nullable(func(i *eventstore.Item) string { return i.Category })
	// Names have no control characters, so they can be joined by line feeds.
	nullable(func(i *eventstore.Item) string { return strings.Join(i.Types, "\n") })
	nullable(func(i *eventstore.Item) string { return strings.Join(i.Tags, "\n") })

	n := len(b.recorded)
	ids := s.kinds.Load().id
	versions, kinds := appendArray(nil, pgtype.Int8OID, n), appendArray(nil, pgtype.Int4OID, n)
	tags := appendArray(nil, pgtype.TextOID, n)
	tagTag, tagEvent, tagKind := appendArray(nil, pgtype.TextOID, b.tags), appendArray(nil, pgtype.Int4OID, b.tags), appendArray(nil, pgtype.Int4OID, b.tags)
	for i := range b.recorded {
		r := &b.recorded[i]
		id := ids[kind{r.Stream.Category, r.Type}]
		versions, kinds = fieldInt64(versions, int64(r.Version)), fieldInt32(kinds, id)
		if len(r.Tags) == 0 {
			tags = appendInt32(tags, null)
		} else {
			tags = fieldText(tags, strings.Join(r.Tags, "\n"))
		}
		for _, tag := range r.Tags {
			tagTag, tagEvent, tagKind = fieldText(tagTag, tag), fieldInt32(tagEvent, int32(i+1)), fieldInt32(tagKind, id)
		}
	}
	column := func(array, element uint32, field int) {
		out := appendArray(nil, element, n)
		for _, e := range b.winners {
			for i := range e.commit.Events {
				out = append(out, rowField(e.row(i), field)...)
			}
		}
		add(array, out)
	}
	add(pgtype.Int8ArrayOID, versions)
	add(pgtype.Int4ArrayOID, kinds)
	column(pgtype.Int2ArrayOID, pgtype.Int2OID, 3)
	column(pgtype.UUIDArrayOID, pgtype.UUIDOID, 4)
	column(pgtype.Int8ArrayOID, pgtype.Int8OID, 5)
	column(pgtype.TextArrayOID, pgtype.TextOID, 6)
	add(pgtype.TextArrayOID, tags)
	column(pgtype.TextArrayOID, pgtype.TextOID, 8)
	column(pgtype.ByteaArrayOID, pgtype.ByteaOID, 9)
	add(pgtype.TextArrayOID, tagTag)
	add(pgtype.Int4ArrayOID, tagEvent)
	add(pgtype.Int4ArrayOID, tagKind)

	keys, prints := appendArray(nil, pgtype.TextOID, b.keys), appendArray(nil, pgtype.ByteaOID, b.keys)
	first, last := appendArray(nil, pgtype.Int4OID, b.keys), appendArray(nil, pgtype.Int4OID, b.keys)
	for _, e := range b.winners {
		if e.commit.Key == "" {
			continue
		}
		keys, prints = fieldText(keys, e.commit.Key), fieldText(prints, e.commit.Fingerprint)
		first, last = fieldInt32(first, int32(e.base+1)), fieldInt32(last, int32(e.base+len(e.commit.Events)))
	}
	add(pgtype.TextArrayOID, keys)
	add(pgtype.ByteaArrayOID, prints)
	add(pgtype.Int4ArrayOID, first)
	add(pgtype.Int4ArrayOID, last)
	return values, oids
}

// join adds to the batch what waits for the next one.
func (c *committer) join(b *batch) error {
	size := 0
	for _, e := range b.entries {
		size += len(e.rows)
	}
	settings := &c.s.settings
	if len(b.entries) >= settings.batchCommits || size >= settings.batchBytes {
		return nil
	}
	b.entries = append(b.entries, c.s.appends.Take(nil, settings.batchCommits-len(b.entries), settings.batchBytes-size)...)
	missing := c.missingKinds(b)
	if missing == nil {
		return nil
	}
	// Not in this transaction, which may be rolled back after they were published.
	return c.s.reading(context.WithoutCancel(c.s.base), "make kinds", func(ctx context.Context, conn *pgx.Conn) error {
		return c.s.makeKinds(ctx, conn, missing)
	})
}

// twoTrips takes the lock and looks, judges again on what it has found, and
// writes.
func (c *committer) twoTrips(b *batch) (*landing, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.s.base), answerTimeout)
	defer cancel()
	began := time.Now()
	l := &lookup{s: c.s}
	var waited int64
	trip := &pgx.Batch{}
	trip.Queue("BEGIN ISOLATION LEVEL READ COMMITTED")
	told := !c.s.settings.pooled && !c.s.settings.unlocked && len(c.s.inlines()) == 0 // whose handlers may tell the session something else
	if told {
		// The session knows the rest.
		trip.Queue(c.s.texts.lockTimed, c.s.lock).QueryRow(func(row pgx.Row) error {
			var asked, locked time.Time
			err := row.Scan(&asked, nil, &locked)
			waited = locked.Sub(asked).Microseconds()
			return err
		})
	} else {
		trip.Queue("SET LOCAL idle_in_transaction_session_timeout = '5s'")
		if mode := c.s.texts.commitMode; mode != "" {
			trip.Queue(mode)
		}
		trip.Queue(c.s.texts.lock, c.s.lock).QueryRow(func(row pgx.Row) error { return row.Scan(&waited) })
	}
	behind := c.l.known > 0 && !c.s.settings.unlocked
	if behind {
		l.queueBehind(trip, c.l.known)
	} else {
		l.queue(trip, c.l.known, &questions{})
	}
	rollback := func(err error) (*landing, error) {
		if _, failed := c.conn.Exec(ctx, "ROLLBACK"); failed != nil {
			c.hangUp()
			err = failed // the connection has to be made anew, whatever was before
		}
		return nil, err
	}
	if err := c.conn.SendBatch(ctx, trip).Close(); err != nil {
		if broken(err) {
			c.hangUp()
			return nil, asLost(err)
		}
		return rollback(err)
	}
	if behind {
		whole, err := l.behind(c.l)
		if err == nil && !whole {
			l = &lookup{s: c.s}
			again := &pgx.Batch{}
			l.queue(again, c.l.known, &questions{})
			err = c.conn.SendBatch(ctx, again).Close()
		}
		if broken(err) {
			c.hangUp()
			return nil, asLost(err)
		}
		if err != nil {
			return rollback(err)
		}
	}
	if err := c.knowKinds(ctx, l.delta); err != nil {
		return rollback(asLost(err))
	}
	before := c.l.known
	if err := l.settle(c.l, b, &questions{}); err != nil {
		return rollback(err)
	}
	if err := c.recover(b); err != nil {
		return rollback(err)
	}
	if len(b.entries) == 0 {
		return rollback(nil)
	}
	// What has gathered while the lock was waited for comes along: the longer the
	// wait, the larger the batch.
	if !c.alone {
		if err := c.join(b); err != nil {
			return rollback(asLost(err))
		}
	}
	need, _ := b.judge(c.l)
	if need.any() {
		// What is missing can be looked up here and now: nobody else can write.
		more := &lookup{s: c.s}
		again := &pgx.Batch{}
		more.queue(again, c.l.known, &need)
		err := c.conn.SendBatch(ctx, again).Close()
		if err == nil {
			err = more.scan(ctx, c.conn, &need)
		}
		if err != nil {
			if broken(err) {
				c.hangUp()
				return nil, asLost(err)
			}
			return rollback(err)
		}
		if err := more.settle(c.l, b, &need); err != nil {
			return rollback(err)
		}
		if need, _ = b.judge(c.l); need.any() {
			return rollback(nil)
		}
	}
	if len(b.winners) == 0 {
		return rollback(nil)
	}
	begun, refused, blamed, err := c.s.applyInline(ctx, ownTx{c.conn}, b, c.l.known)
	if err != nil {
		if broken(err) || c.conn.IsClosed() {
			c.hangUp()
			if err = asLost(err); errors.Is(err, context.Canceled) {
				err = fmt.Errorf("%w: %s", errNoAnswer, err.Error()) // of a handler, and no caller's
			}
		} else {
			_, err = rollback(err)
		}
		if blamed != nil && c.failedInline(b, blamed, err) {
			return nil, nil
		}
		return nil, err
	}
	if refused != nil {
		done, err := rollback(nil) // it will not be committed, whatever comes back
		if refused != b.winners[0] {
			c.divide(b, refused)
			return nil, nil
		}
		b.refuse(refused)
		return done, err
	}
	b.trying(c.l.known)
	_, err = c.exchange(c.copyMessages(b, false))
	if err != nil {
		if answered(err) {
			b.refused()
			if err := c.forgotten(err); c.conn == nil {
				return nil, err
			}
			return rollback(err)
		}
		return nil, err
	}
	for _, one := range begun {
		one.Committed()
	}
	wait := time.Duration(waited) * time.Microsecond
	return &landing{inline: len(begun) > 0, head: c.l.known, foreign: c.l.known > before, wait: wait, hold: max(0, time.Since(began)-wait)}, nil
}
