package sqlite

import (
	"embed"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/deed-go/deed/eventstore"
)

//go:embed migration/*.sql
var migrationFiles embed.FS

// applicationID marks a SQLite file as deed's ("deed" in ASCII).
const applicationID = 0x64656564

// Migration is one step of the schema. Open applies what is missing, each step
// in a transaction of its own; the file's user_version is the last one applied.
type Migration struct {
	Version int
	Name    string
	SQL     string
}

// Migrations returns the schema's steps in order, for people who want to read
// them.
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

// check refuses files that are not deed's or that a newer program has written,
// before anything is changed, and returns the schema's version; 0 for a new
// file.
func check(c *conn, path string, known int) (int, error) {
	application, err := c.number("PRAGMA application_id")
	if isCode(err, sqlite3.SQLITE_NOTADB) {
		return 0, fmt.Errorf("%w: %q is not a SQLite database: choose another file", eventstore.ErrInvalid, path)
	}
	if err != nil {
		return 0, fmt.Errorf("open %q: %w", path, err)
	}
	version, err := c.number("PRAGMA user_version")
	if err != nil {
		return 0, fmt.Errorf("open %q: %w", path, err)
	}
	if application != applicationID {
		objects, err := c.number("SELECT count(*) FROM sqlite_schema")
		if err != nil {
			return 0, fmt.Errorf("open %q: %w", path, err)
		}
		if application != 0 || version != 0 || objects != 0 {
			return 0, fmt.Errorf("%w: %q is a SQLite database, but not one of deed: choose another file", eventstore.ErrInvalid, path)
		}
		return 0, nil
	}
	if int(version) > known {
		return 0, fmt.Errorf("%w: %q has schema version %d, this program knows %d: run a newer program", eventstore.ErrNewerVersion, path, version, known)
	}
	return int(version), nil
}

// migrate applies the steps after the version.
func migrate(c *conn, steps []Migration, version int) error {
	for _, m := range steps[version:] {
		text := "BEGIN IMMEDIATE;\n" + m.SQL + fmt.Sprintf("\nPRAGMA application_id = %d;\nPRAGMA user_version = %d;\n", applicationID, m.Version)
		err := c.exec(text)
		if err == nil && m.Version == 1 {
			err = c.run("INSERT INTO deed_log (id, created) VALUES (?, ?)", uuid.NewString(), time.Now().UTC().Format(time.RFC3339))
		}
		if err == nil {
			err = c.exec("COMMIT")
		}
		if err != nil {
			if c.inTransaction() {
				_ = c.exec("ROLLBACK")
			}
			return fmt.Errorf("migration %03d_%s: %w", m.Version, m.Name, err)
		}
	}
	return nil
}
