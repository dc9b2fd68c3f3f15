package sqlite

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// secondProcess, when set, makes the test binary open the file named by it.
const secondProcess = "DEED_TEST_OPEN_FILE"

func openElsewhere(path string) string {
	s, err := Open(context.Background(), path)
	if err != nil {
		return err.Error()
	}
	_ = s.Close()
	return "opened"
}

func elsewhere(t *testing.T, path string) string {
	t.Helper()
	program, err := os.Executable()
	require.NoError(t, err)
	child := exec.Command(program)
	child.Env = append(os.Environ(), secondProcess+"="+path)
	out, err := child.CombinedOutput()
	require.NoError(t, err, string(out))
	return string(out)
}

func appendOne(t testing.TB, s *Store, stream eventstore.Stream, eventType string) eventstore.Receipt {
	t.Helper()
	r, err := s.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: stream, Type: eventType, Data: []byte("{}")}}})
	require.NoError(t, err)
	return r
}

var ann = eventstore.Stream{Category: "account", ID: "ann"}

func TestOpen_SecondProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log.db")
	s := open(t, path)
	appendOne(t, s, ann, "opened")
	require.Contains(t, elsewhere(t, path), eventstore.ErrInUse.Error())
	appendOne(t, s, ann, "changed")
	require.NoError(t, s.Close())
	require.Equal(t, "opened\n", elsewhere(t, path))
}

func TestOpen_SecondStore(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	path := filepath.Join(folder, "log.db")
	link, dangling := filepath.Join(folder, "link.db"), filepath.Join(folder, "dangling.db")
	require.NoError(t, os.Symlink("log.db", dangling)) // made before the file
	s := open(t, path)
	require.NoError(t, os.Symlink(path, link))
	require.NoError(t, os.Mkdir(filepath.Join(folder, "sub"), 0o755))
	for _, alias := range []string{path, link, dangling, filepath.Join(folder, "sub", "..", "log.db")} {
		_, err := Open(t.Context(), alias)
		require.ErrorIs(t, err, eventstore.ErrInUse, alias)
		require.ErrorContains(t, err, path)
	}
	// A refused Open must not have broken the locks of the one who holds it.
	require.Contains(t, elsewhere(t, path), eventstore.ErrInUse.Error())
	appendOne(t, s, ann, "opened")
	require.NoError(t, s.Close())
	again := open(t, link)
	head, err := again.Head(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 1, head)
}

// Two names of one file would have two locks and two write-ahead logs.
func TestOpen_HardLink(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("links are not counted on Windows")
	}
	folder := t.TempDir()
	path, other := filepath.Join(folder, "log.db"), filepath.Join(folder, "other.db")
	require.NoError(t, open(t, path).Close())
	require.NoError(t, os.Link(path, other))
	for _, name := range []string{path, other} {
		_, err := Open(t.Context(), name)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, fmt.Sprintf("%q is one of 2 names (hard links) of a file", name))
	}
	require.NoError(t, os.Remove(other))
	appendOne(t, open(t, path), ann, "opened")
}

func TestOpen_Refusals(t *testing.T) {
	t.Parallel()
	t.Run("NotSQLite", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "notes.txt")
		content := []byte("these are my notes, and quite long enough to be a database header, one would think, if one did not look")
		require.NoError(t, os.WriteFile(path, content, 0o600))
		_, err := Open(t.Context(), path)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "is not a SQLite database")
		now, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, content, now)
	})
	t.Run("NotDeed", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "other.db")
		c, err := dial(path, "")
		require.NoError(t, err)
		require.NoError(t, c.exec("CREATE TABLE mine (a)"))
		c.close()
		_, err = Open(t.Context(), path)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "not one of deed")
		c, err = dial(path, "")
		require.NoError(t, err)
		defer c.close()
		n, err := c.number("SELECT count(*) FROM sqlite_schema")
		require.NoError(t, err)
		require.EqualValues(t, 1, n, "nothing was made in it")
	})
	t.Run("Newer", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "log.db")
		next := append(Migrations(), Migration{Version: len(Migrations()) + 1, Name: "future", SQL: "CREATE TABLE deed_future (a);"})
		future := open(t, path, schema(next))
		appendOne(t, future, ann, "opened")
		require.NoError(t, future.Close())
		_, err := Open(t.Context(), path)
		require.ErrorIs(t, err, eventstore.ErrNewerVersion)
		require.ErrorContains(t, err, "has schema version 3, this program knows 2: run a newer program")
		again := open(t, path, schema(next))
		appendOne(t, again, ann, "changed")
	})
	t.Run("NoFolder", func(t *testing.T) {
		t.Parallel()
		_, err := Open(t.Context(), filepath.Join(t.TempDir(), "missing", "log.db"))
		require.ErrorIs(t, err, os.ErrNotExist)
	})
	t.Run("NoPath", func(t *testing.T) {
		t.Parallel()
		_, err := Open(t.Context(), "")
		require.ErrorIs(t, err, eventstore.ErrInvalid)
	})
	t.Run("BadOptions", func(t *testing.T) {
		t.Parallel()
		_, err := Open(t.Context(), filepath.Join(t.TempDir(), "log.db"), Tail(0, 1), Now(nil))
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "a tail of 0 events and 1 bytes")
		require.ErrorContains(t, err, "the clock is nil")
	})
}

func schema(steps []Migration) Option {
	return func(s *settings) error { s.steps = steps; return nil }
}

func TestMigrations(t *testing.T) {
	t.Parallel()
	t.Run("Validated", func(t *testing.T) {
		t.Parallel()
		text := &fstest.MapFile{Data: []byte("SELECT 1;")}
		for name, files := range map[string]fstest.MapFS{
			`number 002 expected`:        {"migration/001_a.sql": text, "migration/003_b.sql": text},
			`must be NNN_name.sql`:       {"migration/1_a.sql": text},
			`"migration/001_a.sql" is e`: {"migration/001_a.sql": {Data: []byte(" \n")}},
		} {
			_, err := readMigrations(files)
			require.ErrorContains(t, err, name)
		}
		require.Len(t, Migrations(), 2)
		require.Contains(t, Migrations()[0].SQL, "CREATE TABLE deed_events")
	})
	t.Run("UpgradeKeepsEverything", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "log.db")
		old := open(t, path)
		first := appendOne(t, old, ann, "opened")
		id, err := old.LogID(t.Context())
		require.NoError(t, err)
		require.NoError(t, old.Close())
		next := append(Migrations(), Migration{Version: 3, Name: "note", SQL: "ALTER TABLE deed_events ADD COLUMN note TEXT;"})
		upgraded := open(t, path, schema(next))
		now, err := upgraded.LogID(t.Context())
		require.NoError(t, err)
		require.Equal(t, id, now)
		for e, err := range upgraded.Read(t.Context(), eventstore.OneStream(ann), eventstore.ReadOptions{}) {
			require.NoError(t, err)
			require.Equal(t, first.Last, e.Position)
		}
		appendOne(t, upgraded, ann, "changed")
	})
	t.Run("FailureLeavesTheFile", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "log.db")
		require.NoError(t, open(t, path).Close())
		broken := append(Migrations(), Migration{Version: 3, Name: "broken", SQL: "CREATE TABLE deed_half (a); CREATE TABLE deed_half (a);"})
		_, err := Open(t.Context(), path, schema(broken))
		require.ErrorContains(t, err, "migration 003_broken")
		s := open(t, path) // still version 2, without half a step
		err = s.View(t.Context(), func(tx projection.StateTx) error {
			_, err := tx.Query(t.Context(), "SELECT * FROM deed_half")
			return err
		})
		require.ErrorContains(t, err, "no such table: deed_half")
	})
}
