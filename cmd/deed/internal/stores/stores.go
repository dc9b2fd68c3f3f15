// Package stores is the table of the databases that the deed command can open,
// by DSN. It may import eventstore and every backend: a new one is an entry in
// Known, and nothing else of the command changes.
package stores

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
)

// Mode says what opening may do to the database.
type Mode int

// The modes.
const (
	// Existing opens what is there: it makes no database, and changes no schema where
	// the backend can be opened without.
	Existing Mode = iota + 1
	// Create makes what is missing.
	Create
)

// Backend is one kind of database.
type Backend struct {
	// Schemes are what a DSN begins with, up to the colon.
	Schemes []string
	// Example is a whole DSN, for messages.
	Example string
	// Stateless says that it keeps events only, and read models elsewhere.
	Stateless bool
	// Gaps says that positions do not count events.
	Gaps bool
	// Shared says that several processes may have a store open at the same time.
	Shared bool
	// Durability says what an acknowledged append survives. A store that has a method
	// Durability(ctx) (string, error) is asked instead.
	Durability string
	// Open returns what opens the store. It looks at the DSN, and with [Existing] at
	// whether the database exists, and otherwise leaves the database alone.
	Open func(ctx context.Context, dsn string, mode Mode) (eventstore.Opener, error)
	// Migrations returns the steps of the schema, in order; nil: there is no schema.
	Migrations func(dsn string) ([]Migration, error)
	// Migrate applies the steps that are missing, and returns those.
	Migrate func(ctx context.Context, dsn string) ([]Migration, error)
}

// Migration is one step of a schema.
type Migration struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
	SQL     string `json:"sql,omitempty"`
}

// Known returns the backends of this program.
func Known() Table {
	return Table{
		{
			Schemes:    []string{"sqlite"},
			Example:    "sqlite:FILE",
			Durability: "synced: WAL, synchronous=FULL",
			Open:       openSQLite,
			Migrations: func(string) ([]Migration, error) { return sqliteMigrations(), nil },
			Migrate:    migrateSQLite,
		},
		{
			Schemes:    []string{"postgres", "postgresql"},
			Example:    "postgres://USER:PASSWORD@HOST/DATABASE",
			Shared:     true,
			Open:       openPostgres,
			Migrations: printPostgres,
			Migrate:    migratePostgres,
		},
		{
			Schemes:   []string{"nats"},
			Example:   "nats://HOST:4222/?stream=NAME",
			Stateless: true,
			Shared:    true,
			Open:      openNATS,
		},
		{
			Schemes:   []string{"esdb", "esdb+discover"},
			Example:   "esdb://HOST:2113?tls=false",
			Stateless: true,
			Gaps:      true,
			Shared:    true,
			// As the server is configured by default; it tells nobody.
			Durability: "synced to disk by the server, unless it was told otherwise (UnsafeDisableFlushToDisk)",
			Open: func(_ context.Context, dsn string, _ Mode) (eventstore.Opener, error) {
				return esdb.URL(dsn), nil
			},
		},
		{
			Schemes:    []string{"memory"},
			Example:    "memory:",
			Durability: "none",
			Open: func(_ context.Context, dsn string, _ Mode) (eventstore.Opener, error) {
				if rest := after(dsn); rest != "" {
					return nil, fmt.Errorf("%w: the store %q: a store in memory has no name: say memory:", eventstore.ErrInvalid, dsn)
				}
				return memory.New(), nil
			},
		},
	}
}

func openSQLite(_ context.Context, dsn string, mode Mode) (eventstore.Opener, error) {
	path := after(dsn)
	if path == "" {
		return nil, fmt.Errorf("%w: the store %q names no file: say for example sqlite:shop.db", eventstore.ErrInvalid, dsn)
	}
	if mode == Existing {
		info, err := os.Stat(path)
		switch {
		case errors.Is(err, os.ErrNotExist):
			return nil, fmt.Errorf("there is no file %q: check the path; a new database is made by the program that uses it, or by: deed migrate --store sqlite:%s: %w", path, path, os.ErrNotExist)
		case err != nil:
			return nil, err
		case info.IsDir():
			return nil, fmt.Errorf("%w: %q is a folder, not a database file", eventstore.ErrInvalid, path)
		case info.Size() == 0:
			// What was just made by a process that died may still be in the write-ahead log.
			if wal, err := os.Stat(path + "-wal"); err != nil || wal.Size() == 0 {
				return nil, fmt.Errorf("%w: the file %q is empty: it is no database yet; make it one with: deed migrate --store sqlite:%s", eventstore.ErrInvalid, path, path)
			}
		}
	}
	return opener(func(ctx context.Context) (eventstore.Store, error) {
		store, err := sqlite.Open(ctx, path)
		if errors.Is(err, eventstore.ErrInUse) {
			return nil, fmt.Errorf("%w (one process at a time can have it; what it holds can be read meanwhile with: sqlite3 -readonly %s 'SELECT * FROM deed_history')", err, path)
		}
		if err != nil {
			return nil, err
		}
		return store, nil
	}), nil
}

func sqliteMigrations() []Migration {
	var all []Migration
	for _, m := range sqlite.Migrations() {
		all = append(all, Migration(m))
	}
	return all
}

// migrateSQLite opens the file, which applies what is missing, and compares.
func migrateSQLite(ctx context.Context, dsn string) ([]Migration, error) {
	source, err := openSQLite(ctx, dsn, Create)
	if err != nil {
		return nil, err
	}
	before := sqliteVersion(ctx, after(dsn))
	store, err := source.Open(ctx)
	if err != nil {
		return nil, err
	}
	if err := Close(store); err != nil {
		return nil, err
	}
	all := sqliteMigrations()
	return all[min(max(before, 0), len(all)):], nil
}
