package sqlite

import (
	"context"
	"errors"
	"iter"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Appends go first: a commit that waits is written before updates that were
// there before it, as soon as the one that runs has ended, well or not.
func TestStore_Update_AppendsFirst(t *testing.T) {
	t.Parallel()
	for _, outcome := range []error{nil, errors.New("mistake")} {
		s := open(t, filepath.Join(t.TempDir(), "log.db"))
		running, finish := make(chan struct{}), make(chan struct{})
		update := func(fn func() error) chan error {
			done := make(chan error, 1)
			go func() { done <- s.Update(t.Context(), func(projection.StateTx) error { return fn() }) }()
			return done
		}
		first := update(func() error { close(running); <-finish; return outcome })
		<-running
		second := update(func() error {
			head, err := s.Head(t.Context())
			assert.EqualValues(t, 1, head, "the append was written before the second update")
			return err
		})
		for s.updates.Len() == 0 {
			runtime.Gosched()
		}
		pending := s.Enqueue(t.Context(), eventstore.Commit{Events: one(ann, "opened")})
		close(finish)
		require.Equal(t, outcome, <-first)
		_, err := pending.Result()
		require.NoError(t, err)
		require.NoError(t, <-second)
	}
}

// sharing lets updates share a transaction for longer than a busy machine takes to
// have them wait.
func sharing(s *settings) error {
	s.updateTime = time.Minute
	return nil
}

// Updates that wait together share a transaction; one that fails or panics
// takes only its own changes with it, and the tables it had made.
func TestStore_Update_Savepoints(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"), sharing)
	running, finish := make(chan struct{}), make(chan struct{})
	mistake := errors.New("mistake")
	results := make(chan string, 10)
	run := func(fn func(projection.StateTx) error) {
		before := s.updates.Len()
		go func() {
			defer func() {
				if p := recover(); p != nil {
					results <- p.(string)
				}
			}()
			switch err := s.Update(t.Context(), fn); {
			case err == nil:
				results <- "ok"
			default:
				results <- err.Error()
			}
		}()
		for s.updates.Len() == before {
			runtime.Gosched()
		}
	}
	held := make(chan error)
	go func() {
		held <- s.Update(t.Context(), func(projection.StateTx) error { close(running); <-finish; return nil })
	}()
	<-running
	run(func(tx projection.StateTx) error { return tx.Put("a", "kept", []byte("1")) })
	run(func(tx projection.StateTx) error {
		return errors.Join(tx.Put("b", "lost", []byte("1")), tx.Put("a", "kept", []byte("2")), mistake)
	})
	run(func(tx projection.StateTx) error {
		assert.NoError(t, tx.Put("c", "lost", nil))
		panic("panicked")
	})
	run(func(tx projection.StateTx) error {
		value, found, err := tx.Get("a", "kept")
		assert.True(t, found)
		assert.Equal(t, "1", string(value))
		_, found, err2 := tx.Get("b", "lost")
		assert.False(t, found)
		return errors.Join(err, err2, tx.Put("b", "kept", []byte("1")))
	})
	go func() { // as t.FailNow does
		defer func() { results <- "exited" }()
		_ = s.Update(t.Context(), func(tx projection.StateTx) error {
			_ = tx.Put("a", "kept", []byte("3"))
			runtime.Goexit()
			return nil
		})
	}()
	close(finish)
	require.NoError(t, <-held)
	var got []string
	for range 5 {
		got = append(got, <-results)
	}
	require.ElementsMatch(t, []string{"ok", "mistake", "panicked", "ok", "exited"}, got)
	require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
		rows := map[string]string{}
		for _, table := range []string{"a", "b", "c"} {
			for row, err := range tx.Scan(table, projection.Range{}) {
				require.NoError(t, err)
				rows[table+"/"+row.Key] = string(row.Value)
			}
		}
		require.Equal(t, map[string]string{"a/kept": "1", "b/kept": "1"}, rows)
		return nil
	}))
}

// When a statement rolls everything back and the function goes on, nothing of
// its update is kept, nor of those that shared the transaction, which learn of
// it. The connection and later updates are sound.
func TestStore_Update_RolledBack(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"), sharing)
	ctx := t.Context()
	require.NoError(t, s.Update(ctx, func(tx projection.StateTx) error {
		_, err := tx.Exec(ctx, `CREATE TABLE mine (id INTEGER PRIMARY KEY); INSERT INTO mine VALUES (1);
			CREATE TRIGGER strict BEFORE DELETE ON mine BEGIN SELECT RAISE(ROLLBACK, 'kept'); END`)
		return err
	}))
	lease, err := s.Acquire(ctx, "p", "me", 0)
	require.NoError(t, err)
	view := func(fn func(tx projection.StateTx)) {
		require.NoError(t, s.View(ctx, func(tx projection.StateTx) error { fn(tx); return nil }))
	}
	for _, text := range []string{"INSERT OR ROLLBACK INTO mine VALUES (1)", "DELETE FROM mine"} {
		running, finish := make(chan struct{}), make(chan struct{})
		var done []chan error
		update := func(fn func(projection.StateTx) error) {
			result := make(chan error, 1)
			done = append(done, result)
			before := s.updates.Len()
			go func() { result <- s.Update(ctx, fn) }()
			for len(done) > 1 && s.updates.Len() == before {
				runtime.Gosched()
			}
		}
		update(func(tx projection.StateTx) error { close(running); <-finish; return tx.Put("shared", "a", nil) })
		<-running
		acquired := make(chan error, 1)
		go func() {
			_, err := s.Acquire(ctx, "another "+text, "me", 0)
			acquired <- err
		}()
		for s.updates.Len() == 0 {
			runtime.Gosched()
		}
		update(func(tx projection.StateTx) error {
			err := tx.Put("own", "a", nil)
			_, ignored := tx.Exec(ctx, text)
			assert.Error(t, ignored)
			assert.ErrorIs(t, tx.Put("own", "b", nil), errRolledBack)
			assert.ErrorIs(t, tx.SetCheckpoint(lease, projection.Checkpoint{}, projection.Checkpoint{Log: "log", Position: 7}), errRolledBack)
			return err
		})
		update(func(tx projection.StateTx) error { return tx.Put("later", "a", nil) })
		close(finish)
		require.ErrorIs(t, <-done[1], errRolledBack, text)
		require.ErrorIs(t, <-done[0], projection.ErrUnavailable, "it shared the transaction: %s", text)
		require.NoError(t, <-acquired, "a lease is acquired again")
		require.NoError(t, <-done[2], text)
		view(func(tx projection.StateTx) {
			for _, key := range []string{"shared/a", "own/a", "own/b"} {
				table, name, _ := strings.Cut(key, "/")
				_, found, err := tx.Get(table, name)
				require.NoError(t, err)
				require.False(t, found, key)
			}
			p, err := tx.Checkpoint("p")
			require.NoError(t, err)
			require.Zero(t, p)
		})
	}
	// The last statement of a function, which nothing follows.
	require.ErrorIs(t, s.Update(ctx, func(tx projection.StateTx) error {
		_, _ = tx.Exec(ctx, "DELETE FROM mine")
		return nil
	}), errRolledBack)
	// Ids of tables that were rolled back are forgotten.
	require.NoError(t, s.Update(ctx, func(tx projection.StateTx) error { return tx.Put("other", "z", nil) }))
	require.NoError(t, s.Update(ctx, func(tx projection.StateTx) error { return tx.Put("own", "c", nil) }))
	view(func(tx projection.StateTx) {
		for _, key := range []string{"a", "b", "c"} {
			_, found, err := tx.Get("other", key)
			require.NoError(t, err)
			require.False(t, found, "%q is not a row of this table", key)
		}
	})
	appendOne(t, s, ann, "opened")
}

// An iterator that was left without being stopped does not keep its
// transaction, and does not disturb whoever has the connection next.
func TestStore_View_ScanLeft(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"), func(s *settings) error { s.viewers = 1; return nil })
	put := func(key string) {
		require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error { return tx.Put("rows", key, []byte("1")) }))
	}
	put("a")
	put("b")
	var next func() (projection.Row, error, bool)
	var stop func()
	require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
		next, stop = iter.Pull2(tx.Scan("rows", projection.Range{}))
		row, err, ok := next()
		require.True(t, ok)
		require.Equal(t, "a", row.Key)
		return err
	}))
	put("c")
	require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
		_, found, err := tx.Get("rows", "c")
		require.NoError(t, err)
		require.True(t, found, "the view began after the update")
		var keys []string
		for row, err := range tx.Scan("rows", projection.Range{}) {
			require.NoError(t, err)
			if keys = append(keys, row.Key); len(keys) == 1 {
				_, err, _ := next()
				require.ErrorIs(t, err, errEnded)
				stop()
			}
		}
		require.Equal(t, []string{"a", "b", "c"}, keys)
		return nil
	}))
}

// What SQL of the user must not do fails, and harms neither its transaction
// nor the log.
func TestStore_SQL_Guard(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
	appendOne(t, s, ann, "opened")
	require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error {
		_, err := tx.Exec(t.Context(), "CREATE TABLE other (a)")
		return err
	}))
	texts := 0
	for _, text := range []string{
		"COMMIT", "ROLLBACK", "BEGIN", "SAVEPOINT a", "RELEASE deed", "ROLLBACK TO deed", "SELECT 1; COMMIT",
		"PRAGMA synchronous = OFF", "ATTACH 'x.db' AS x", "VACUUM",
		"DELETE FROM deed_events", "UPDATE Deed_Events SET data = NULL", "DROP TABLE deed_keys", "INSERT INTO deed_log VALUES ('a', 'b')",
		"CREATE TABLE deed_mine (a)", "CREATE TRIGGER mine AFTER INSERT ON deed_events BEGIN SELECT 1; END", "CREATE INDEX mine ON deed_events (data)",
		"ALTER TABLE deed_events ADD COLUMN mine", "ALTER TABLE deed_events RENAME TO mine",
		"CREATE TEMP TABLE deed_events (position INTEGER PRIMARY KEY)", "CREATE TEMP TABLE mine (a)", "CREATE TABLE temp.mine (a)",
		"CREATE TEMP VIEW deed_events AS SELECT 1 AS position", "CREATE VIRTUAL TABLE Temp.mine USING rtree (id, low, high)", "CREATE VIEW temp.deed_mine AS SELECT 1",
		"CREATE VIEW temp.mine AS SELECT 1", "CREATE TRIGGER temp.mine AFTER INSERT ON main.deed_events BEGIN SELECT 1; END",
		"CREATE TEMP TRIGGER mine AFTER INSERT ON main.deed_events BEGIN DELETE FROM deed_events WHERE position = new.position; END",
		"CREATE VIRTUAL TABLE deed_search USING fts5 (a)", "CREATE TRIGGER deed_mine AFTER INSERT ON other BEGIN SELECT 1; END",
		"UPDATE sqlite_dbpage SET data = zeroblob(4096) WHERE pgno = 2",
	} {
		texts++
		err := s.Update(t.Context(), func(tx projection.StateTx) error {
			require.NoError(t, tx.Put("rows", text, nil))
			_, err := tx.Exec(t.Context(), text)
			require.Error(t, err, text)
			if text != "VACUUM" { // SQLite itself refuses it
				require.ErrorIs(t, err, eventstore.ErrInvalid, text)
			}
			return nil
		})
		require.NoError(t, err, text)
	}
	require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error {
		_, err := tx.Exec(t.Context(), "CREATE TABLE mine (a); CREATE INDEX mine_a ON mine (a); INSERT INTO mine VALUES (1), (2);")
		require.NoError(t, err)
		n, err := tx.Exec(t.Context(), "UPDATE mine SET a = a + $1", 1)
		require.EqualValues(t, 2, n)
		return err
	}))
	appendOne(t, s, ann, "changed")
	require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
		n := 0
		for _, err := range tx.Scan("rows", projection.Range{}) {
			require.NoError(t, err)
			n++
		}
		require.Equal(t, texts, n)
		rows, err := tx.Query(t.Context(), "SELECT count(*), max(a), (SELECT count(*) FROM deed_history) FROM mine")
		require.NoError(t, err)
		require.True(t, rows.Next())
		var count, most, events int
		require.NoError(t, rows.Scan(&count, &most, &events))
		require.Equal(t, []int{2, 3, 2}, []int{count, most, events})
		return rows.Close()
	}))
}

// A table cannot be given one of deed's names, in whatever way: the guard does
// not learn the new one.
func TestStore_SQL_Rename(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
	require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error {
		_, err := tx.Exec(t.Context(), "CREATE TABLE mine (a); CREATE VIRTUAL TABLE search USING fts5 (a)")
		return err
	}))
	for _, text := range []string{"ALTER TABLE mine RENAME TO Deed_mine", "ALTER TABLE search RENAME TO deed_search; SELECT 1"} {
		for range 2 { // also when the connection knows the text
			err := s.Update(t.Context(), func(tx projection.StateTx) error {
				_, _ = tx.Exec(t.Context(), text)
				return nil
			})
			require.ErrorIs(t, err, eventstore.ErrInvalid, text)
			require.ErrorContains(t, err, "names that begin with deed_ are taken")
		}
	}
	require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error {
		_, err := tx.Query(t.Context(), "ALTER TABLE mine RENAME TO deed_mine")
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "use Exec")
		return nil
	}))
	require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error {
		_, err := tx.Exec(t.Context(), "ALTER TABLE mine RENAME TO yours; INSERT INTO yours VALUES (1); ALTER TABLE search RENAME TO finds")
		return err
	}))
}

func TestRows_Scan(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
	type cents int16
	type name string
	require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
		rows, err := tx.Query(t.Context(), "SELECT $1, $2, $3, NULL, $4, 300, NULL, $1, x'0102', 1", 7, "ann", 1.5, true)
		require.NoError(t, err)
		require.True(t, rows.Next())
		var a cents
		var b name
		var c float32
		var d *int
		var e bool
		var f *cents
		var g []byte
		var h any
		var i []byte
		var j uint8
		require.NoError(t, rows.Scan(&a, &b, &c, &d, &e, &f, &g, &h, &i, &j))
		require.Equal(t, cents(7), a)
		require.Equal(t, name("ann"), b)
		require.Equal(t, float32(1.5), c)
		require.Nil(t, d)
		require.True(t, e)
		require.Equal(t, cents(300), *f)
		require.Nil(t, g)
		require.Equal(t, int64(7), h)
		require.Equal(t, []byte{1, 2}, i)
		require.Equal(t, uint8(1), j)
		require.False(t, rows.Next())
		require.NoError(t, rows.Err())
		rows, err = tx.Query(t.Context(), "SELECT NULL, 300, 'x'")
		require.NoError(t, err)
		require.True(t, rows.Next())
		var n int
		var small uint8
		require.ErrorContains(t, rows.Scan(&n, &small, &b), "column 1: NULL does not fit into int")
		require.ErrorContains(t, rows.Scan(&d, &small, &b), "column 2: 300 does not fit into uint8")
		require.ErrorContains(t, rows.Scan(&d), "3 columns into 1 destinations")
		_, err = tx.Query(t.Context(), "SELECT 1")
		require.ErrorContains(t, err, "close the rows")
		require.NoError(t, rows.Close())
		_, err = tx.Query(t.Context(), "SELECT $2", 1)
		require.ErrorContains(t, err, "parameter $2 has no argument")
		return nil
	}))
}

func TestStore_Update_Cancelled(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
	running, finish := make(chan struct{}), make(chan struct{})
	held := make(chan error)
	go func() {
		held <- s.Update(t.Context(), func(projection.StateTx) error { close(running); <-finish; return nil })
	}()
	<-running
	ctx, cancel := context.WithCancel(t.Context())
	waiting := make(chan error)
	go func() { waiting <- s.Update(ctx, func(projection.StateTx) error { panic("ran") }) }()
	cancel()
	require.Equal(t, context.Canceled, <-waiting)
	close(finish)
	require.NoError(t, <-held)
}

// What fails because of the disk is told from what fails because of the statement.
func TestStore_Update_DatabaseFails(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
	exec := func(query string) error {
		return s.Update(t.Context(), func(tx projection.StateTx) error {
			_, err := tx.Exec(t.Context(), query)
			return err
		})
	}
	pages := func(most string) {
		require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error {
			return tx.(*stateTx).c.exec("PRAGMA max_page_count = " + most)
		}))
	}
	require.NoError(t, exec("CREATE TABLE lines (n INTEGER PRIMARY KEY, text BLOB NOT NULL)"))
	require.NoError(t, exec("INSERT INTO lines VALUES (1, 'one')"))
	for _, mistake := range []string{
		"INSERT INTO lines VALUES (1, 'again')", "INSERT INTO lines VALUES (2, NULL)", "INSERT INTO lines VALUES ('x', 'y')",
		"INSERT INTO line VALUES (2, 'two')", "INSART", "DELETE FROM deed_events", "INSERT INTO lines VALUES (2, zeroblob(2000000000))",
	} {
		err := exec(mistake)
		require.Error(t, err, mistake)
		require.NotErrorIs(t, err, projection.ErrUnavailable)
	}
	pages("1") // the disk is full: it grows to what is there, and no further
	require.ErrorIs(t, exec("INSERT INTO lines VALUES (2, randomblob(1000000))"), projection.ErrUnavailable)
	pages("1000000000")
	require.NoError(t, exec("INSERT INTO lines VALUES (2, randomblob(1000000))"))
	for _, code := range []int{sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_BUSY_SNAPSHOT, sqlite3.SQLITE_NOMEM} {
		require.ErrorIs(t, sqlFailure("SELECT 1", &sqliteError{code: code}), projection.ErrUnavailable, code)
	}
}
