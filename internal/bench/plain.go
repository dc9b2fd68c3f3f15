package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Baselines without a library: what one would write by hand with pgx.

func init() {
	register("plain-insert", benchCase{
		workload: "append", store: "postgres", unit: "events",
		guarantees: "positions not in commit order, versions checked by the unique index only",
		open:       openInsert(insertAlone),
	})
	register("plain-lock-insert", benchCase{
		workload: "append", store: "postgres", unit: "events",
		guarantees: "positions in commit order, versions checked by the unique index only",
		open:       openInsert(insertLocked),
	})
	register("plain-select-insert", benchCase{
		workload: "append", store: "postgres", unit: "events",
		guarantees: "version check, positions not in commit order",
		open:       openInsert(insertChecked),
	})
	register("plain-load", benchCase{
		workload: "load", store: "postgres", table: true, unit: "loads",
		guarantees: "rows of deed's own table, scanned and dropped",
		open:       openPlainLoad,
	})
	register("plain-replay", benchCase{
		workload: "replay", store: "postgres", table: true, unit: "events",
		guarantees: "rows of deed's own table, scanned and dropped",
		open:       openPlainReplay,
	})
}

// The table of the baselines has the columns that an event of deed has.
const (
	plainTable = `CREATE TABLE events (
	position bigserial PRIMARY KEY,
	stream   text COLLATE "C" NOT NULL,
	version  bigint NOT NULL,
	id       uuid NOT NULL,
	type     text NOT NULL,
	time     bigint NOT NULL,
	metadata text,
	data     bytea,
	UNIQUE (stream, version)
)`
	plainInsert = `INSERT INTO events (stream, version, id, type, time, metadata, data) VALUES ($1, $2, $3, $4, $5, $6, $7)`
	plainLock   = `SELECT pg_advisory_xact_lock(7266)`
	plainHead   = `SELECT coalesce(max(version), 0) FROM events WHERE stream = $1`
)

// openPool opens connections to the case's database. Pgx prepares each
// statement once a connection.
func openPool(ctx context.Context, p params) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(p.Store)
	if err != nil {
		return nil, fmt.Errorf("the database %q: %w", p.Store, err)
	}
	config.MaxConns = int32(p.Conns)
	config.MinConns = int32(min(p.Conns, p.Writers))
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	if err := pool.Ping(ctx); err != nil {
		pool.Close()
		return nil, err
	}
	return pool, nil
}

func closePool(pool *pgxpool.Pool) func() error {
	return func() error {
		pool.Close()
		return nil
	}
}

// durability asks the server what its commits are worth.
func durability(ctx context.Context, pool *pgxpool.Pool) (string, error) {
	var fsync, commit string
	err := pool.QueryRow(ctx, "SELECT current_setting('fsync'), current_setting('synchronous_commit')").Scan(&fsync, &commit)
	return "fsync=" + fsync + ", synchronous_commit=" + commit, err
}

type inserter func(ctx context.Context, pool *pgxpool.Pool, at position, data []byte) error

func openInsert(insert inserter) func(context.Context, params) (*job, error) {
	return func(ctx context.Context, p params) (*job, error) {
		_, data, err := newOrder(p.Payload)
		if err != nil {
			return nil, err
		}
		pool, err := openPool(ctx, p)
		if err != nil {
			return nil, err
		}
		j := &job{close: closePool(pool)}
		if _, err = pool.Exec(ctx, plainTable); err == nil {
			j.durability, err = durability(ctx, pool)
		}
		if err != nil {
			pool.Close()
			return nil, err
		}
		cursors := newCursors(p)
		j.op = func(ctx context.Context, worker int) (int, error) {
			return 1, insert(ctx, pool, cursors[worker].advance(), data)
		}
		j.verify = func(ctx context.Context, done int64) error {
			return countRows(ctx, pool, "SELECT count(*) FROM events", done)
		}
		return j, nil
	}
}

func countRows(ctx context.Context, pool *pgxpool.Pool, query string, want int64) error {
	var n int64
	if err := pool.QueryRow(ctx, query).Scan(&n); err != nil {
		return err
	}
	if n != want {
		return fmt.Errorf("%q finds %d, but %d were done", query, n, want)
	}
	return nil
}

func plainRow(at position, data []byte) []any {
	return []any{at.stream, at.version, newID(), orderType, time.Now().UnixNano(), metadata, data}
}

// insertAlone is one statement in a transaction of its own.
func insertAlone(ctx context.Context, pool *pgxpool.Pool, at position, data []byte) error {
	_, err := pool.Exec(ctx, plainInsert, plainRow(at, data)...)
	return err
}

// insertLocked lets one transaction in at a time, so that positions are in
// commit order and readers skip nothing.
func insertLocked(ctx context.Context, pool *pgxpool.Pool, at position, data []byte) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, plainLock); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, plainInsert, plainRow(at, data)...)
		return err
	})
}

// insertChecked compares the expected version first, as most frameworks do.
func insertChecked(ctx context.Context, pool *pgxpool.Pool, at position, data []byte) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		var version int64
		if err := tx.QueryRow(ctx, plainHead, at.stream).Scan(&version); err != nil {
			return err
		}
		if version != at.version-1 {
			return fmt.Errorf("stream %q is at version %d, not %d", at.stream, version, at.version-1)
		}
		_, err := tx.Exec(ctx, plainInsert, plainRow(at, data)...)
		return err
	})
}

// Deed's own table, as the read baselines see it. A change of its columns is
// followed here and in scan, nowhere else.
const (
	deedTable   = "deed.events"
	deedColumns = "position, version, kind, id, time, stream, tags, metadata, data"
	streamSize  = 100
)

// deedRow has the types that fit the columns most naturally.
type deedRow struct {
	position int64
	version  int64
	kind     int32
	id       uuid.UUID
	time     int64
	stream   string
	tags     []string
	metadata *string
	data     []byte
}

func (r *deedRow) scan(rows pgx.Rows) error {
	return rows.Scan(&r.position, &r.version, &r.kind, &r.id, &r.time, &r.stream, &r.tags, &r.metadata, &r.data)
}

// openPlainLoad reads random streams of 100 events whole.
func openPlainLoad(ctx context.Context, p params) (*job, error) {
	p.Conns = p.Writers
	pool, err := openPool(ctx, p)
	if err != nil {
		return nil, err
	}
	rows, err := pool.Query(ctx, "SELECT stream FROM "+deedTable+" WHERE version = $1 LIMIT 100000", streamSize)
	if err != nil {
		pool.Close()
		return nil, err
	}
	streams, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err == nil && len(streams) == 0 {
		err = fmt.Errorf("no stream in %s has %d events: fill it with deed bench load --preload N first", deedTable, streamSize)
	}
	if err != nil {
		pool.Close()
		return nil, err
	}
	query := "SELECT " + deedColumns + " FROM " + deedTable + " WHERE stream = $1 ORDER BY version"
	return &job{
		close:      closePool(pool),
		durability: "reads only",
		notes:      fmt.Sprintf("%d streams", len(streams)),
		op: func(ctx context.Context, _ int) (int, error) {
			rows, err := pool.Query(ctx, query, streams[rand.IntN(len(streams))])
			if err != nil {
				return 0, err
			}
			defer rows.Close()
			var last int64
			for rows.Next() {
				var r deedRow
				if err := r.scan(rows); err != nil {
					return 0, err
				}
				if r.version != last+1 {
					return 0, fmt.Errorf("stream %q: version %d follows %d", r.stream, r.version, last)
				}
				last = r.version
			}
			if err := rows.Err(); err != nil {
				return 0, err
			}
			if last < streamSize {
				return 0, fmt.Errorf("a stream ended at version %d", last)
			}
			return 1, nil
		},
	}, nil
}

// openPlainReplay reads the whole log in pages by position, again and again.
func openPlainReplay(ctx context.Context, p params) (*job, error) {
	const page = 10_000
	p.Conns = p.Writers
	pool, err := openPool(ctx, p)
	if err != nil {
		return nil, err
	}
	var head int64
	if err := pool.QueryRow(ctx, "SELECT coalesce(max(position), 0) FROM "+deedTable).Scan(&head); err != nil {
		pool.Close()
		return nil, err
	}
	if head == 0 {
		pool.Close()
		return nil, fmt.Errorf("%s is empty: fill it with deed bench replay --preload N first", deedTable)
	}
	query := fmt.Sprintf("SELECT %s FROM %s WHERE position > $1 ORDER BY position LIMIT %d", deedColumns, deedTable, page)
	at := make([]int64, p.Writers)
	var seen atomic.Int64
	return &job{
		close:      closePool(pool),
		durability: "reads only",
		notes:      fmt.Sprintf("%d events in pages of %d", head, page),
		op: func(ctx context.Context, worker int) (int, error) {
			after := at[worker]
			rows, err := pool.Query(ctx, query, after)
			if err != nil {
				return 0, err
			}
			defer rows.Close()
			n := 0
			for rows.Next() {
				var r deedRow
				if err := r.scan(rows); err != nil {
					return 0, err
				}
				if r.position != after+1 {
					return 0, fmt.Errorf("position %d follows %d", r.position, after)
				}
				after = r.position
				n++
			}
			if err := rows.Err(); err != nil {
				return 0, err
			}
			if at[worker] = after; after >= head {
				at[worker] = 0
			}
			seen.Add(int64(n))
			return n, nil
		},
		verify: func(_ context.Context, done int64) error {
			if seen.Load() != done {
				return fmt.Errorf("%d rows were scanned, but %d counted", seen.Load(), done)
			}
			return nil
		},
	}, nil
}
