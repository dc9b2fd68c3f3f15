package postgres

import (
	"context"

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
	kinds int // in the database
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
	b.Queue(s.texts.delta, int64(known), int64(mostDelta+1)).Query(func(rows pgx.Rows) error {
		for rows.Next() {
			var f foreign
			var position, version int64
			if err := rows.Scan(&position, &version, &f.kind, &f.id, &f.stream, &f.tags); err != nil {
				return err
			}
			f.position, f.version = eventstore.Position(position), uint64(version)
			l.delta = append(l.delta, f)
		}
		return rows.Err()
	})
	b.Queue(s.texts.ends).QueryRow(func(row pgx.Row) error {
		var head *int64
		var last *uuid.UUID
		if err := row.Scan(&l.kinds, &head, &last); err != nil || head == nil {
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

// outdated reports whether others have made kinds that are not known here.
func (l *lookup) outdated() bool { return l.kinds != len(l.s.kinds.Load().byID) }

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
		to.enter(&eventstore.Recorded{ID: f.id, Stream: stream, Version: f.version, Position: f.position, Type: known.byID[f.kind].eventType, Tags: f.tags})
	}
	return nil
}
