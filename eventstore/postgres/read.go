package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math"
	"sync"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/deed-go/deed/eventstore"
)

// Pages bound how long one statement runs and how much it holds in memory.
const (
	pageSize   = 512  // of queries
	replayPage = 8192 // of reads of the log itself, once they turn out to be long
)

// span is a range of positions, (after, through], and the direction.
type span struct {
	after, through eventstore.Position
	backward       bool
}

// rest narrows the range to what follows a position already considered.
func (s span) rest(reached eventstore.Position) span {
	if s.backward {
		s.through = reached - 1
	} else {
		s.after = reached
	}
	return s
}

// page is the outcome of one step of a scan.
type page struct {
	events []eventstore.Recorded
	// reached is the last position considered, in the direction of the scan. When
	// done, everything up to the end of the range was.
	reached eventstore.Position
	done    bool
}

// page returns up to most matching events of the range, in the room given if it
// is large enough. It considers a bounded
// number of candidates, so it may return fewer, even none, without being done.
func (s *Store) page(ctx context.Context, conn *pgx.Conn, q eventstore.Query, at span, most int, room []eventstore.Recorded) (page, error) {
	if at.after >= at.through {
		return page{done: true}, nil
	}
	p := makePlan(q, s.schema)
	limit := most
	if !p.exact && !q.Everything {
		limit = max(most, pageSize)
	}
	st := p.statement(s.schema, at, limit)
	expected := limit
	if limit <= pageSize {
		expected = min(limit, 128)
	}
	found, err := s.fetch(ctx, conn, st, expected, room)
	if err != nil {
		return page{}, err
	}
	out := page{events: found, done: len(found) < limit}
	if n := len(found); n > 0 {
		out.reached = found[n-1].Position
	}
	if q.Everything {
		return out, contiguous(found, at, out.done)
	}
	if p.exact {
		return out, nil
	}
	out.events = found[:0]
	for i := range found {
		if !q.Matches(&found[i]) {
			continue
		}
		if out.events = append(out.events, found[i]); len(out.events) == most && i < len(found)-1 {
			out.reached, out.done = found[i].Position, false
			break
		}
	}
	return out, nil
}

// contiguous fails when events that were read unfiltered leave a hole.
func contiguous(events []eventstore.Recorded, at span, done bool) error {
	want := at.after + 1
	if at.backward {
		want = at.through
	}
	for i := range events {
		if events[i].Position != want {
			return fmt.Errorf("%w: position %d follows, %d expected: events were removed, or written by another program", eventstore.ErrGap, events[i].Position, want)
		}
		if at.backward {
			want--
		} else {
			want++
		}
	}
	if end := at.through + 1; done && (!at.backward && want != end || at.backward && want != at.after) {
		return fmt.Errorf("%w: position %d is missing: events were removed, or the database was restored from an older state", eventstore.ErrGap, want)
	}
	return nil
}

// The columns of an event, in the order of the constant columns.
const (
	colPosition = iota
	colVersion
	colKind
	colTime
	colID
	colStream
	colTags
	colMetadata
	colData
	eventColumns
)

// fetch runs a statement that reads events, about as many as expected. It
// works on the bytes that the server sends, and copies what events keep of them
// into a few large blocks.
func (s *Store) fetch(ctx context.Context, conn *pgx.Conn, st statement, expected int, room []eventstore.Recorded) ([]eventstore.Recorded, error) {
	if cap(room) < expected {
		room = make([]eventstore.Recorded, 0, expected)
	}
	d := decoder{events: room[:0], kinds: make([]int32, 0, expected), ends: make([]int, 0, expected)}
	if err := s.raw(ctx, conn, st, d.row); err != nil {
		return nil, err
	}
	known := s.kinds.Load()
	names, begin := string(d.names), 0
	for i, id := range d.kinds {
		e := &d.events[i]
		name, ok := known.byID[id]
		if !ok {
			// Another process has made it.
			if err := s.learn(ctx, conn); err != nil {
				return nil, err
			}
			known = s.kinds.Load()
			if name, ok = known.byID[id]; !ok {
				return nil, fmt.Errorf("read the event at position %d: its kind %d is missing: the database was damaged", e.Position, id)
			}
		}
		full := names[begin:d.ends[i]]
		begin = d.ends[i]
		if len(full) <= len(name.category)+1 || full[:len(name.category)] != name.category || full[len(name.category)] != '-' {
			return nil, fmt.Errorf("read the event at position %d: its stream %q is not of category %q: the database was damaged", e.Position, full, name.category)
		}
		e.Type = name.eventType
		e.Stream = eventstore.Stream{Category: name.category, ID: full[len(name.category)+1:]}
	}
	return d.events, nil
}

// decoder turns rows into events. Their kinds and streams are left open.
type decoder struct {
	events []eventstore.Recorded
	kinds  []int32
	names  []byte // of the streams, one after the other
	ends   []int  // of each name
	block  []byte // where data is copied to

	// Of the row before, which the next one often agrees with.
	metadata string
	meaning  eventstore.Metadata
}

const blockSize = 64 << 10

// keep copies the bytes into a block.
func (d *decoder) keep(b []byte) []byte {
	if b == nil {
		return nil
	}
	if len(b) == 0 {
		return []byte{}
	}
	if len(b) > cap(d.block)-len(d.block) {
		if len(b) > blockSize/8 {
			return append([]byte{}, b...)
		}
		d.block = make([]byte, 0, min(blockSize, max(2*cap(d.block), blockSize/8))) // most reads are short
	}
	at := len(d.block)
	d.block = append(d.block, b...)
	return d.block[at:len(d.block):len(d.block)]
}

var errShape = errors.New("an event does not have the columns that were asked for: the schema was changed")

func (d *decoder) row(row [][]byte) error {
	if len(row) != eventColumns || len(row[colPosition]) != 8 || len(row[colVersion]) != 8 || len(row[colKind]) != 4 || len(row[colTime]) != 8 || len(row[colID]) != 16 {
		return errShape
	}
	d.events = append(d.events, eventstore.Recorded{
		Position: eventstore.Position(binary.BigEndian.Uint64(row[colPosition])),
		Version:  binary.BigEndian.Uint64(row[colVersion]),
		Time:     time.Unix(0, int64(binary.BigEndian.Uint64(row[colTime]))).UTC(),
		Data:     d.keep(row[colData]),
	})
	e := &d.events[len(d.events)-1]
	d.kinds = append(d.kinds, int32(binary.BigEndian.Uint32(row[colKind])))
	copy(e.ID[:], row[colID])
	d.names = append(d.names, row[colStream]...)
	d.ends = append(d.ends, len(d.names))
	var err error
	if e.Tags, err = decodeTexts(row[colTags]); err != nil {
		return fmt.Errorf("read the event at position %d: tags: %w", e.Position, err)
	}
	if len(row[colMetadata]) == 0 {
		return nil
	}
	if string(row[colMetadata]) != d.metadata {
		d.meaning = eventstore.Metadata{}
		if err := jsonv1.Unmarshal(row[colMetadata], &d.meaning); err != nil {
			return fmt.Errorf("read the event at position %d: metadata: %w", e.Position, err)
		}
		d.metadata = string(row[colMetadata])
	}
	e.Metadata = d.meaning
	return nil
}

// raw runs a statement and hands over each row as the bytes that the server
// sends, which are valid for the call only. Arguments are int64, string,
// []int32 and []string.
func (s *Store) raw(ctx context.Context, conn *pgx.Conn, st statement, row func([][]byte) error) error {
	values, formats, oids := make([][]byte, len(st.args)), make([]int16, len(st.args)), make([]uint32, len(st.args))
	for i, arg := range st.args {
		formats[i] = pgx.BinaryFormatCode
		values[i], oids[i] = encodeArgument(arg)
	}
	var reader *pgconn.ResultReader
	if st.fixed && !s.settings.pooled {
		description, err := conn.Prepare(ctx, st.text, st.text)
		if err != nil {
			return err
		}
		reader = conn.PgConn().ExecStatement(ctx, description, values, formats, binaryFormat)
	} else {
		reader = conn.PgConn().ExecParams(ctx, st.text, values, oids, formats, binaryFormat)
	}
	var failed error
	for reader.NextRow() {
		if failed == nil {
			failed = row(reader.Values())
		}
	}
	_, err := reader.Close()
	if failed != nil {
		return failed
	}
	return err
}

var binaryFormat = []int16{pgx.BinaryFormatCode}

func (s *Store) readHead(ctx context.Context, conn *pgx.Conn) (eventstore.Position, error) {
	var head eventstore.Position
	err := s.raw(ctx, conn, statement{text: s.texts.head, fixed: true}, func(row [][]byte) error {
		if len(row[0]) == 8 {
			head = eventstore.Position(binary.BigEndian.Uint64(row[0]))
		}
		return nil
	})
	return head, err
}

// reading lends a connection to fn, and calls it again when the connection was
// lost or has gone silent, until it answers or patience is at an end. fn must
// only read.
func (s *Store) reading(ctx context.Context, what string, fn func(context.Context, *pgx.Conn) error) error {
	return s.trying(ctx, what, func() error {
		ctx, cancel := context.WithTimeout(ctx, answerTimeout)
		defer cancel()
		conn, err := s.logs.Acquire(ctx)
		if err != nil {
			return asLost(err)
		}
		defer conn.Release()
		return asLost(fn(ctx, conn.Conn()))
	})
}

// trying calls fn until it succeeds or fails for a reason that will not pass.
func (s *Store) trying(ctx context.Context, what string, fn func() error) error {
	began := time.Now()
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := fn()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if s.closed() && transient(err) {
			return eventstore.ErrClosed
		}
		if !transient(err) || time.Since(began) > s.settings.patience {
			return unavailable(what, err)
		}
		if !s.sleep(ctx, pause) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return eventstore.ErrClosed
		}
	}
}

const (
	firstPause   = 5 * time.Millisecond
	longestPause = 500 * time.Millisecond
)

// sleep waits; false says that ctx ended or the store is closing.
func (s *Store) sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
	case <-s.closing:
	}
	return false
}

// Lookup implements eventstore.Store; keys are scoped to the whole log.
func (s *Store) Lookup(ctx context.Context, _ eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	if err := s.enter(ctx); err != nil {
		return eventstore.Receipt{}, false, err
	}
	defer s.leave()
	var receipt eventstore.Receipt
	found := false
	err := s.reading(ctx, "look up an idempotency key", func(ctx context.Context, conn *pgx.Conn) error {
		receipts, err := s.receipts(ctx, conn, []string{key})
		receipt, found = receipts[key]
		return err
	})
	return receipt, found, err
}

// receipts returns those of the keys that were used.
func (s *Store) receipts(ctx context.Context, q querier, keys []string) (map[string]eventstore.Receipt, error) {
	rows, err := q.Query(ctx, s.texts.receipts, keys)
	if err != nil {
		return nil, err
	}
	return collectReceipts(rows)
}

func collectReceipts(rows pgx.Rows) (map[string]eventstore.Receipt, error) {
	defer rows.Close()
	all := map[string]eventstore.Receipt{}
	for rows.Next() {
		var key, stream string
		var fingerprint []byte
		var first, last, version, position int64
		if err := rows.Scan(&key, &fingerprint, &first, &last, &stream, &version, &position); err != nil {
			return nil, err
		}
		name, err := eventstore.ParseStream(stream)
		if err != nil {
			return nil, fmt.Errorf("read the receipt of key %q: %w", key, err)
		}
		r, ok := all[key]
		if !ok {
			r = eventstore.Receipt{First: eventstore.Position(first), Last: eventstore.Position(last), Fingerprint: string(fingerprint), Duplicate: true}
		}
		note(&r, name, eventstore.Revision{Version: uint64(version), Position: eventstore.Position(position)})
		all[key] = r
	}
	return all, rows.Err()
}

// note records in the receipt what an event made of its stream.
func note(receipt *eventstore.Receipt, stream eventstore.Stream, r eventstore.Revision) {
	for i := range receipt.Revisions {
		if receipt.Revisions[i].Stream == stream {
			receipt.Revisions[i].Revision = r
			return
		}
	}
	receipt.Revisions = append(receipt.Revisions, eventstore.StreamRevision{Stream: stream, Revision: r})
}

// Read implements eventstore.Store. Its statements are short: nothing is held
// in the database between two pages. Whoever reads the whole log has the next
// page fetched while it works on one.
func (s *Store) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	return func(yield func(eventstore.Recorded, error) bool) {
		fail := func(err error) { yield(eventstore.Recorded{}, err) }
		if err := errors.Join(q.Validate(), o.Validate()); err != nil {
			fail(err)
			return
		}
		r := &reader{s: s, q: q, limit: o.Limit, at: span{after: o.After, through: o.Through, backward: o.Backward}}
		defer r.stop()
		defer r.recycle()
		for {
			p, err := r.next(ctx)
			if err != nil {
				fail(err)
				return
			}
			for i := range p.events {
				if i&1023 == 1023 && ctx.Err() != nil {
					fail(ctx.Err())
					return
				}
				if !yield(p.events[i], nil) {
					return
				}
			}
			if p.done {
				return
			}
		}
	}
}

// reader reads page after page.
type reader struct {
	s     *Store
	q     eventstore.Query
	limit int // of events still wanted; 0: all
	at    span
	begun bool
	pages int
	room  []eventstore.Recorded // of the last page

	borrowed *[]eventstore.Recorded
	first    []eventstore.Recorded // the first page, in what was borrowed if that was large enough

	ahead  chan outcome // the page that is being fetched
	cancel context.CancelFunc
}

type outcome struct {
	page page
	err  error
}

// rooms are for the events of reads that end with their first page, as loads of
// aggregates do. The receiver gets copies of the events.
var rooms = sync.Pool{New: func() any { return new([]eventstore.Recorded) }}

// recycle gives the room of such a read back.
func (r *reader) recycle() {
	const most = 256
	if r.first == nil || r.pages != 1 || r.room != nil || cap(r.first) > most {
		return
	}
	room := r.first[:cap(r.first)]
	clear(room)
	*r.borrowed = room[:0]
	rooms.Put(r.borrowed)
}

func (r *reader) stop() {
	if r.ahead != nil {
		r.cancel()
		<-r.ahead
		r.ahead = nil
	}
}

// next returns the next page, and begins to fetch the one after it.
func (r *reader) next(ctx context.Context) (page, error) {
	if err := ctx.Err(); err != nil {
		return page{}, err
	}
	var p page
	var err error
	if r.ahead != nil {
		select {
		case o := <-r.ahead:
			p, err = o.page, o.err
		case <-ctx.Done():
			r.stop()
			return page{}, ctx.Err()
		}
		r.cancel()
		r.ahead = nil
	} else {
		r.borrowed = rooms.Get().(*[]eventstore.Recorded)
		p, err = r.fetch(ctx, r.most(), *r.borrowed)
		r.first = p.events
	}
	if err != nil {
		return page{}, err
	}
	if r.pages++; r.limit > 0 {
		if r.limit -= len(p.events); r.limit == 0 {
			p.done = true
		}
	}
	if p.done {
		return p, nil
	}
	r.at = r.at.rest(p.reached)
	if r.at.after >= r.at.through {
		p.done = true
		return p, nil
	}
	ahead, cancel := context.WithCancel(ctx)
	r.ahead, r.cancel = make(chan outcome, 1), cancel
	// The receiver has copied the events of the page before this one.
	room := r.room
	r.room = p.events
	go func(to chan<- outcome, most int) {
		p, err := r.fetch(ahead, most, room)
		to <- outcome{p, err}
	}(r.ahead, r.most())
	return p, nil
}

func (r *reader) most() int {
	most := pageSize
	if r.pages > 0 && r.q.Everything {
		most = replayPage
	}
	if r.limit > 0 {
		most = min(most, r.limit)
	}
	return most
}

// fetch reads a page. The first one of a forward read also finds the head at
// which the read ends.
func (r *reader) fetch(ctx context.Context, most int, room []eventstore.Recorded) (page, error) {
	s := r.s
	if err := s.enter(ctx); err != nil {
		return page{}, err
	}
	defer s.leave()
	var p page
	err := s.reading(ctx, "read events", func(ctx context.Context, conn *pgx.Conn) error {
		at := r.at
		if !r.begun {
			if at.through == 0 {
				at.through = math.MaxInt64
			}
			// The stream of an aggregate is mostly read in one page, whose statement sees
			// one moment: the head need not be known.
			if !r.q.Everything && isStream(r.q) {
				found, err := s.page(ctx, conn, r.q, at, most, room)
				if err != nil {
					return err
				}
				if p = found; found.done {
					return nil
				}
				head, err := s.readHead(ctx, conn)
				if err == nil {
					at.through = min(at.through, head)
					r.begun, r.at = true, at
				}
				return err
			}
			head, err := s.readHead(ctx, conn)
			if err != nil {
				return err
			}
			at.through = min(at.through, head)
		}
		var err error
		if p, err = s.page(ctx, conn, r.q, at, most, room); err == nil {
			r.begun, r.at = true, at
		}
		return err
	})
	return p, err
}

// isStream reports whether the query is for one stream and nothing else.
func isStream(q eventstore.Query) bool {
	if len(q.Items) != 1 {
		return false
	}
	item := &q.Items[0]
	return !item.Stream.IsZero() && item.Category == "" && len(item.Types) == 0 && len(item.Tags) == 0 && item.Slices.IsZero()
}
