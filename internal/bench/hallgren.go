package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/hallgren/eventsourcing/core"
	hallgren "github.com/hallgren/eventsourcing/eventstore/sql"
	_ "github.com/jackc/pgx/v5/stdlib"
	_ "modernc.org/sqlite"
)

func init() {
	const module = "github.com/hallgren/eventsourcing/eventstore/sql"
	register("hallgren-postgres", benchCase{
		peer: module, workload: "append", store: "postgres", unit: "events",
		guarantees: "version check, positions not in commit order",
		open: func(ctx context.Context, p params) (*job, error) {
			db, err := sql.Open("pgx", p.Store)
			if err != nil {
				return nil, err
			}
			db.SetMaxOpenConns(p.Conns)
			db.SetMaxIdleConns(p.Conns)
			store, err := hallgren.NewPostgres(db)
			if err != nil {
				return nil, closing(db, err)
			}
			var fsync, commit string
			if err := db.QueryRowContext(ctx, "SELECT current_setting('fsync'), current_setting('synchronous_commit')").Scan(&fsync, &commit); err != nil {
				return nil, closing(db, err)
			}
			return hallgrenJob(p, db, store, "fsync="+fsync+", synchronous_commit="+commit)
		},
	})
	register("hallgren-sqlite", benchCase{
		peer: module, workload: "append", store: "sqlite", unit: "events",
		guarantees: "version check, positions in commit order (one writer)",
		open: func(ctx context.Context, p params) (*job, error) {
			// The driver that deed uses, and as durable as deed; writers that meet in
			// SQLite's lock would fail, so the store's own mutex is used.
			db, err := sql.Open("sqlite", "file:"+p.Store+"?_pragma=journal_mode(wal)&_pragma=synchronous(full)&_pragma=busy_timeout(10000)")
			if err != nil {
				return nil, err
			}
			db.SetMaxOpenConns(1)
			store, err := hallgren.NewSQLiteSingelWriter(db)
			if err != nil {
				return nil, closing(db, err)
			}
			setting, err := sqliteDurability(ctx, db)
			if err != nil {
				return nil, closing(db, err)
			}
			return hallgrenJob(p, db, store, setting)
		},
	})
}

// closing returns err after db was closed.
func closing(db *sql.DB, err error) error { return errors.Join(err, db.Close()) }

// sqliteDurability asks a database what its commits are worth.
func sqliteDurability(ctx context.Context, db *sql.DB) (string, error) {
	var (
		journal string
		sync    int
	)
	if err := db.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&journal); err != nil {
		return "", err
	}
	if err := db.QueryRowContext(ctx, "PRAGMA synchronous").Scan(&sync); err != nil {
		return "", err
	}
	names := []string{"OFF", "NORMAL", "FULL", "EXTRA"}
	if sync < 0 || sync >= len(names) {
		return "", fmt.Errorf("unknown synchronous setting %d", sync)
	}
	return "journal_mode=" + journal + ", synchronous=" + names[sync], nil
}

func hallgrenJob(p params, db *sql.DB, store core.EventStore, durability string) (*job, error) {
	_, data, err := newOrder(p.Payload)
	if err != nil {
		return nil, closing(db, err)
	}
	cursors := newCursors(p)
	return &job{
		durability: durability,
		close:      db.Close,
		op: func(_ context.Context, worker int) (int, error) {
			at := cursors[worker].advance()
			return 1, store.Save([]core.Event{{
				AggregateID: at.stream, AggregateType: "order", Version: core.Version(at.version),
				Reason: orderType, Timestamp: time.Now(), Data: data, Metadata: []byte(metadata),
			}})
		},
		verify: func(ctx context.Context, done int64) error {
			var n int64
			if err := db.QueryRowContext(ctx, "SELECT count(*) FROM events").Scan(&n); err != nil {
				return err
			}
			if n != done {
				return fmt.Errorf("the table has %d events, but %d were saved", n, done)
			}
			return nil
		},
	}, nil
}
