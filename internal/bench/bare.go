package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
)

// How many events a second a batch per commit can bring at most: a program that
// does nothing but send the message of one batch, as deed sends it, read the
// answer, and send the next. No caller is waited for, nothing is checked.

func init() {
	register("bare-copy", benchCase{
		workload: "append", store: "postgres", unit: "events",
		guarantees: "nothing is checked; one connection, which waits for nobody",
		open:       openBare,
	})
}

// bareBatch is how many events are in a batch: as many as sixteen callers that
// wait for their answers can bring together.
const bareBatch = 16

const (
	bareTable = `CREATE TABLE events (
	position bigint PRIMARY KEY,
	version  bigint NOT NULL,
	kind     int NOT NULL,
	slice    smallint NOT NULL,
	id       uuid NOT NULL,
	time     bigint NOT NULL,
	stream   text COLLATE "C" NOT NULL,
	tags     text[],
	metadata text,
	data     bytea,
	UNIQUE (stream, version)
); CREATE INDEX ON events (kind, position)`
	bareLock = `SELECT pg_advisory_xact_lock(7266)`
	bareCopy = `COPY events (position, version, kind, slice, id, time, stream, tags, metadata, data) FROM STDIN (FORMAT binary)`
)

func openBare(ctx context.Context, p params) (*job, error) {
	_, data, err := newOrder(p.Payload)
	if err != nil {
		return nil, err
	}
	pool, err := openPool(ctx, p)
	if err != nil {
		return nil, err
	}
	j := &job{close: closePool(pool)}
	fail := func(err error) (*job, error) {
		pool.Close()
		return nil, err
	}
	if _, err := pool.Exec(ctx, bareTable); err != nil {
		return fail(err)
	}
	if j.durability, err = durability(ctx, pool); err != nil {
		return fail(err)
	}
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return fail(err)
	}
	j.close = func() error {
		conn.Release()
		pool.Close()
		return nil
	}
	j.notes = fmt.Sprintf("%d events a COPY", bareBatch)
	for name, text := range map[string]string{"lock": bareLock, "copy": bareCopy} {
		if _, err := conn.Conn().Prepare(ctx, name, text); err != nil {
			conn.Release()
			return fail(err)
		}
	}
	streams := newCursors(params{Writers: 1, Streams: 1000})[0]
	var at int64
	var message []byte
	var one sync.Mutex
	j.op = func(ctx context.Context, _ int) (int, error) {
		one.Lock()
		defer one.Unlock()
		var err error
		if message, err = bareMessage(message[:0], func(b []byte) []byte {
			for range bareBatch {
				at++
				b = bareRow(b, at, streams.advance(), data)
			}
			return b
		}); err != nil {
			return 0, err
		}
		wire := conn.Conn().PgConn()
		if _, err := wire.Conn().Write(message); err != nil {
			return 0, err
		}
		for {
			answer, err := wire.ReceiveMessage(ctx)
			if err != nil {
				return 0, err
			}
			switch m := answer.(type) {
			case *pgproto3.ErrorResponse:
				return 0, fmt.Errorf("%s: %s", m.Code, m.Message)
			case *pgproto3.ReadyForQuery:
				return bareBatch, nil
			}
		}
	}
	j.verify = func(ctx context.Context, done int64) error {
		return countRows(ctx, pool, "SELECT count(*) FROM events", done)
	}
	return j, nil
}

// bareMessage appends the statements and the data that the second will ask for, in
// the binary format of COPY.
func bareMessage(b []byte, rows func([]byte) []byte) ([]byte, error) {
	var err error
	for _, m := range []pgproto3.FrontendMessage{&pgproto3.Bind{PreparedStatement: "lock"}, &pgproto3.Execute{}, &pgproto3.Bind{PreparedStatement: "copy"}, &pgproto3.Execute{}} {
		if b, err = m.Encode(b); err != nil {
			return nil, err
		}
	}
	at := len(b) + 1
	b = append(b, 'd', 0, 0, 0, 0)
	b = rows(append(b, "PGCOPY\n\xff\r\n\x00\x00\x00\x00\x00\x00\x00\x00\x00"...))
	b = binary.BigEndian.AppendUint16(b, 0xffff)
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at))
	return append(b, 'c', 0, 0, 0, 4, 'S', 0, 0, 0, 4), nil // CopyDone, Sync
}

func bareRow(b []byte, at int64, in position, data []byte) []byte {
	number := func(size int, n int64) {
		b = binary.BigEndian.AppendUint32(b, uint32(size))
		for shift := 8 * (size - 1); shift >= 0; shift -= 8 {
			b = append(b, byte(n>>shift))
		}
	}
	text := func(v string) { b = append(binary.BigEndian.AppendUint32(b, uint32(len(v))), v...) }
	id := newID()
	b = binary.BigEndian.AppendUint16(b, 10)
	number(8, at)
	number(8, in.version)
	number(4, 1)
	number(2, at%1024)
	text(string(id[:]))
	number(8, time.Now().UnixNano())
	text(in.stream)
	b = binary.BigEndian.AppendUint32(b, 0xffffffff) // no tags
	text(metadata)
	text(string(data))
	return b
}
