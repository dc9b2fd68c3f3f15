package sqlite

import (
	"context"
	"errors"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

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

// Updates that wait together share a transaction; one that fails or panics
// takes only its own changes with it, and the tables it had made.
func TestStore_Update_Savepoints(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
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
		"CREATE TEMP VIEW deed_events AS SELECT 1 AS position", "CREATE VIRTUAL TABLE temp.mine USING rtree (id, low, high)",
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
