package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/deed-go/deed/eventstore"
)

// querier is a connection or a transaction.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
}

// foreign is an event that somebody else has written, as far as it matters for
// judging.
type foreign struct {
	position eventstore.Position
	version  uint64
	kind     int32
	id       uuid.UUID
	stream   string
	tags     []string
}

// mostDelta is how many events of others are read to catch up; beyond it the
// ledger begins anew.
const mostDelta = 1000

// lookup is one visit to the database: it brings the ledger to the head and
// answers questions there, all on one snapshot.
type lookup struct {
	s     *Store
	delta []foreign
	head  eventstore.Position
	last  uuid.UUID
	heads map[eventstore.Stream]streamHead
	keys  map[string]eventstore.Receipt
	found map[*eventstore.Condition]eventstore.Position
	// unanswered: some conditions need more than one statement.
	unanswered bool
}

// queue adds the statements to the batch. The connection must be in a
// transaction with one snapshot, or hold the log's lock.
func (l *lookup) queue(b *pgx.Batch, known eventstore.Position, q *questions) {
	s := l.s
	b.Queue(s.texts.delta, int64(known), int64(mostDelta+1)).Query(func(rows pgx.Rows) (err error) {
		l.delta, err = collectDelta(rows)
		return err
	})
	b.Queue(s.texts.ends).QueryRow(func(row pgx.Row) error {
		var head *int64
		var last *uuid.UUID
		if err := row.Scan(&head, &last); err != nil || head == nil {
			return err
		}
		l.head, l.last = eventstore.Position(*head), *last
		return nil
	})
	if len(q.streams) > 0 {
		names := make([]string, 0, len(q.streams))
		l.heads = make(map[eventstore.Stream]streamHead, len(q.streams))
		for name := range q.streams {
			names = append(names, name.String())
			l.heads[name] = streamHead{} // does not exist, unless it is found
		}
		b.Queue(s.texts.heads, names).Query(func(rows pgx.Rows) error {
			for rows.Next() {
				var name string
				var version, position int64
				var h streamHead
				if err := rows.Scan(&name, &version, &position, &h.last); err != nil {
					return err
				}
				stream, err := eventstore.ParseStream(name)
				if err != nil {
					return err
				}
				h.revision = eventstore.Revision{Version: uint64(version), Position: eventstore.Position(position)}
				l.heads[stream] = h
			}
			return rows.Err()
		})
	}
	if len(q.keys) > 0 {
		names := make([]string, 0, len(q.keys))
		for key := range q.keys {
			names = append(names, key)
		}
		b.Queue(s.texts.receipts, names).Query(func(rows pgx.Rows) error {
			var err error
			l.keys, err = collectReceipts(rows)
			return err
		})
	}
	l.found = make(map[*eventstore.Condition]eventstore.Position, len(q.conditions))
	for _, c := range q.conditions {
		st, exact := firstStatement(s.schema, c)
		if !exact {
			l.unanswered = true // by reading, afterwards
			continue
		}
		l.found[c.of] = 0
		b.Queue(st.text, st.args...).Query(func(rows pgx.Rows) error {
			for rows.Next() {
				var position int64
				if err := rows.Scan(&position); err != nil {
					return err
				}
				l.found[c.of] = eventstore.Position(position)
			}
			return rows.Err()
		})
	}
}

// queueBehind adds the statement that tells, to the holder of the log's lock, what
// others have written behind the known position: mostly that is all there is to
// ask, and everybody waits for the answer.
func (l *lookup) queueBehind(b *pgx.Batch, known eventstore.Position) {
	b.Queue(l.s.texts.delta, int64(known)-1, int64(mostDelta+2)).Query(func(rows pgx.Rows) (err error) {
		l.delta, err = collectDelta(rows)
		return err
	})
}

// behind makes the answer to queueBehind that of queue with no questions; false if
// it takes queue to know.
func (l *lookup) behind(at *ledger) (whole bool, err error) {
	rows := l.delta
	if len(rows) == 0 || rows[0].position != at.known {
		return false, nil
	}
	if err := at.recognise(rows[0].id); err != nil {
		return false, err
	}
	if len(rows) > mostDelta+1 {
		return false, nil
	}
	last := &rows[len(rows)-1]
	l.delta, l.head, l.last = rows[1:], last.position, last.id
	return true, nil
}

// collectDelta reads what others have written. Writers wait meanwhile, so that the
// rows are decoded as they come, which takes a fraction of what Scan does.
func collectDelta(rows pgx.Rows) ([]foreign, error) {
	var delta []foreign
	raw := false
	for rows.Next() {
		if len(delta) == 0 {
			raw = isRaw(rows.FieldDescriptions()) // which rows that failed do not have
		}
		var f foreign
		if raw {
			var err error
			if f, err = decodeForeign(rows.RawValues()); err != nil {
				return nil, err
			}
		} else {
			var position, version int64
			if err := rows.Scan(&position, &version, &f.kind, &f.id, &f.stream, &f.tags); err != nil {
				return nil, err
			}
			f.position, f.version = eventstore.Position(position), uint64(version)
		}
		delta = append(delta, f)
	}
	return delta, rows.Err()
}

// isRaw reports whether decodeForeign can read rows of the fields. The text is the
// same in both formats; behind a pooler all is text.
func isRaw(fields []pgconn.FieldDescription) bool {
	for i := range fields {
		if fields[i].Format != pgx.BinaryFormatCode && i != 4 {
			return false
		}
	}
	return true
}

var errForeign = errors.New("it is no row of an event: the schema was changed")

// decodeForeign reads a row of position, version, kind, id, stream and tags in the
// binary format.
func decodeForeign(row [][]byte) (foreign, error) {
	if len(row) != 6 || len(row[0]) != 8 || len(row[1]) != 8 || len(row[2]) != 4 || len(row[3]) != 16 {
		return foreign{}, errForeign
	}
	tags, err := decodeTexts(row[5])
	return foreign{
		position: eventstore.Position(binary.BigEndian.Uint64(row[0])), version: binary.BigEndian.Uint64(row[1]),
		kind: int32(binary.BigEndian.Uint32(row[2])), id: uuid.UUID(row[3]), stream: string(row[4]), tags: tags,
	}, err
}

// firstStatement finds the first position after which the condition's query
// matches; false if the indexes alone cannot tell.
func firstStatement(schema string, c question) (statement, bool) {
	at := span{after: c.after, through: farAway}
	p := makePlan(c.query, schema)
	switch {
	case !p.exact:
		return statement{}, false
	case p.everything:
		return statement{text: "SELECT position FROM " + schema + ".events WHERE position > $1::bigint ORDER BY position LIMIT 1", args: []any{int64(c.after)}}, true
	}
	return p.positions(schema, at, 1), true
}

// scan answers by reading events what the indexes could not tell. It sees the
// same snapshot as the rest of the lookup.
func (l *lookup) scan(ctx context.Context, conn *pgx.Conn, q *questions) error {
	for _, c := range q.conditions {
		if _, done := l.found[c.of]; done {
			continue
		}
		at := span{after: c.after, through: l.head}
		for l.found[c.of] = 0; at.after < at.through; {
			p, err := l.s.page(ctx, conn, c.query, at, 1, nil)
			if err != nil {
				return err
			}
			if len(p.events) > 0 {
				l.found[c.of] = p.events[0].Position
				break
			}
			if p.done {
				break
			}
			at = at.rest(p.reached)
		}
	}
	return nil
}

// knows reports whether the kinds of all that others have written are known. How
// many there are says nothing: this process and another may have made one each.
func (s *Store) knows(delta []foreign) bool {
	known := s.kinds.Load()
	for i := range delta {
		if _, ok := known.byID[delta[i].kind]; !ok {
			return false
		}
	}
	return true
}

// settle enters what was found into the ledger and the batch.
func (l *lookup) settle(to *ledger, b *batch, q *questions) error {
	if l.head < to.known {
		return errRewound(l.head, to.known)
	}
	if l.head > to.known {
		b.forgetKeys()
	}
	if len(l.delta) > mostDelta {
		to.reset(l.head, l.last)
	} else if err := l.s.enterForeign(to, l.delta); err != nil {
		return err
	}
	for name, h := range l.heads {
		to.heads.Add(name, h)
	}
	b.fresh = true
	b.looked.make()
	for key := range q.keys {
		b.looked.asked[key] = true
	}
	for key, receipt := range l.keys {
		b.looked.keys[key] = receipt
	}
	for condition, found := range l.found {
		b.looked.matches[condition] = match{found: found, through: to.known}
	}
	return nil
}

// enterForeign adds events of others to the ledger, which must know their
// kinds.
func (s *Store) enterForeign(to *ledger, delta []foreign) error {
	known := s.kinds.Load()
	for i := range delta {
		f := &delta[i]
		if f.position <= to.known {
			continue
		}
		if f.position != to.known+1 {
			return errGap(f.position, to.known+1)
		}
		stream, err := eventstore.ParseStream(f.stream)
		if err != nil {
			return err
		}
		of, ok := known.byID[f.kind]
		if !ok {
			return fmt.Errorf("%w: the event at position %d is of the kind %d, which there is not: %w", eventstore.ErrGap, f.position, f.kind, errRestored)
		}
		to.enter(&eventstore.Recorded{ID: f.id, Stream: stream, Version: f.version, Position: f.position, Type: of.eventType, Tags: f.tags})
	}
	return nil
}
