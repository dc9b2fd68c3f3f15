package postgres

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
)

//go:embed migration/*.sql
var migrationFiles embed.FS

// Migration is one step of the schema.
type Migration struct {
	Version int
	Name    string
	// SQL is the step's text, in which {schema} stands for the schema's name.
	SQL string
}

// In returns the step's statements for a schema, for people who apply them with
// a tool of their own. The last one notes that the step was applied.
func (m Migration) In(schema string) string {
	quoted := pgx.Identifier{schema}.Sanitize()
	var b strings.Builder
	if m.Version == 1 {
		// CREATE SCHEMA IF NOT EXISTS would ask for the right to make one even where it exists.
		quote := "$do$"
		for strings.Contains(quoted, quote) {
			quote = "$d" + quote[1:]
		}
		fmt.Fprintf(&b, "DO %s BEGIN IF to_regnamespace(%s) IS NULL THEN CREATE SCHEMA %s; END IF; END %s;\nCREATE TABLE %s;\n\n", quote, literal(quoted), quoted, quote, migrationsTable(quoted))
	}
	b.WriteString(strings.ReplaceAll(m.SQL, "{schema}", quoted))
	if m.Version == 1 {
		fmt.Fprintf(&b, "\nINSERT INTO %s.log (id) VALUES (gen_random_uuid());\n", quoted)
	}
	fmt.Fprintf(&b, "\nINSERT INTO %s.migrations (version, name) VALUES (%d, '%s');\n", quoted, m.Version, m.Name)
	return b.String()
}

// literal quotes a string for SQL.
func literal(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }

func migrationsTable(quotedSchema string) string {
	return quotedSchema + ".migrations (version int PRIMARY KEY, name text NOT NULL, applied timestamptz NOT NULL DEFAULT now())"
}

// Migrations returns the schema's steps in order.
func Migrations() []Migration {
	m, err := readMigrations(migrationFiles)
	if err != nil {
		panic(err) // the embedded files are checked by a test
	}
	return m
}

// readMigrations reads migration/NNN_name.sql, and refuses gaps and names that
// do not fit.
func readMigrations(files fs.FS) ([]Migration, error) {
	names, err := fs.Glob(files, "migration/*.sql") // sorted
	if err != nil {
		return nil, err
	}
	var all []Migration
	for i, name := range names {
		base := strings.TrimSuffix(strings.TrimPrefix(name, "migration/"), ".sql")
		number, title, ok := strings.Cut(base, "_")
		version, err := strconv.Atoi(number)
		if !ok || err != nil || len(number) != 3 || title == "" {
			return nil, fmt.Errorf("migration %q: the name must be NNN_name.sql", name)
		}
		if version != i+1 {
			return nil, fmt.Errorf("migration %q: number %03d expected", name, i+1)
		}
		text, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(text)) == "" {
			return nil, fmt.Errorf("migration %q is empty", name)
		}
		all = append(all, Migration{Version: version, Name: title, SQL: string(text)})
	}
	return all, nil
}

// Migrate applies to the database what is missing, and returns the steps that
// it has applied. Programs that open the log do the same, unless they are told
// not to ([WithoutMigration]); any number of them may start at once. The role
// needs the right to create the schema, or to create in it where it exists.
func Migrate(ctx context.Context, url string, options ...Option) ([]Migration, error) {
	set, err := gather(options)
	if err != nil {
		return nil, err
	}
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", eventstore.ErrInvalid, err)
	}
	if set.pooled {
		unprepared(config)
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, unavailable("connect", err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	var server facts
	if err := server.read(ctx, conn); err != nil {
		return nil, err
	}
	if err := server.check(); err != nil {
		return nil, err
	}
	return migrate(ctx, conn, set.schema, set.steps, true)
}

// appliedVersion returns the last step that was applied; 0 if there is none.
func appliedVersion(ctx context.Context, q querier, schema string) (int, error) {
	// Not to_regclass: in a transaction that has waited for a lock it may answer from
	// what the session had cached before.
	var exists bool
	quoted := pgx.Identifier{schema}.Sanitize()
	if err := q.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND c.relname = 'migrations')`, schema).Scan(&exists); err != nil {
		return 0, unavailable("look for the schema", err)
	}
	if !exists {
		return 0, nil
	}
	var version int
	err := q.QueryRow(ctx, "SELECT coalesce(max(version), 0) FROM "+quoted+".migrations").Scan(&version)
	return version, unavailable("read the version of the schema", err)
}

// migrate applies the steps that are missing, in one transaction, and returns
// them. Those who come at the same time wait for the first.
func migrate(ctx context.Context, conn *pgx.Conn, schema string, steps []Migration, apply bool) ([]Migration, error) {
	version, err := appliedVersion(ctx, conn, schema)
	if err != nil {
		return nil, err
	}
	if version > len(steps) {
		return nil, fmt.Errorf("%w: schema %q has version %d, this program knows %d: run a newer program", eventstore.ErrNewerVersion, schema, version, len(steps))
	}
	if version == len(steps) {
		return nil, nil
	}
	if !apply {
		return nil, fmt.Errorf("%w: schema %q has version %d, this program needs %d: run \"deed migrate\", or apply the statements that postgres.Migrations prints", eventstore.ErrInvalid, schema, version, len(steps))
	}
	tx, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if err != nil {
		return nil, unavailable("migrate", err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	// The schema may not exist yet, so the lock is on its name.
	if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock(hashtextextended('deed migrations of ' || $1, 0))", schema); err != nil {
		return nil, unavailable("migrate", err)
	}
	if version, err = appliedVersion(ctx, tx, schema); err != nil {
		return nil, err
	}
	if version > len(steps) {
		return nil, fmt.Errorf("%w: schema %q has version %d, this program knows %d: run a newer program", eventstore.ErrNewerVersion, schema, version, len(steps))
	}
	for _, m := range steps[version:] {
		if _, err := tx.Exec(ctx, m.In(schema), pgx.QueryExecModeSimpleProtocol); err != nil {
			return nil, unavailable(fmt.Sprintf("migration %03d_%s of schema %q", m.Version, m.Name, schema), err)
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return nil, unavailable("migrate", err)
	}
	return steps[version:], nil
}

// newID is a random id for a process.
func newID() uuid.UUID {
	id, err := uuid.NewRandom()
	if err != nil {
		panic(errors.Join(errors.New("no randomness"), err))
	}
	return id
}
