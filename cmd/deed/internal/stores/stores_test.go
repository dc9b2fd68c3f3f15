package stores

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(pgtest.Main(m)) }

func TestTable_Parse(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{"memory:", "sqlite:shop.db", "SQLite:shop.db", "sqlite:///var/shop.db"} {
		_, err := Known().Parse(dsn)
		require.NoError(t, err, dsn)
	}
	for dsn, says := range map[string]string{
		"":                          `the store "" does not begin with the name of a backend`,
		"shop.db":                   "if that is an SQLite file, say sqlite:shop.db",
		"oracle://ann:secret@h/s":   `"oracle://ann:xxxxx@h/s" is of an unknown backend, "oracle"`,
		"host=h password=secret":    `"host=h password=xxxxx"`,
		"host=h password='a secret": `does not begin with the name of a backend`,
	} {
		_, err := Known().Parse(dsn)
		require.ErrorIs(t, err, eventstore.ErrInvalid, dsn)
		require.ErrorContains(t, err, says)
		require.ErrorContains(t, err, "known are ", dsn)
		for _, b := range Known() {
			require.ErrorContains(t, err, b.Example, "an unknown backend is answered with all that are known")
		}
		require.NotContains(t, err.Error(), "ann:secret")
		require.NotContains(t, err.Error(), "password=secret")
	}
}

func TestRedact(t *testing.T) {
	t.Parallel()
	for dsn, expected := range map[string]string{
		"memory:":         "memory:",
		"sqlite:a@b:c.db": "sqlite:a@b:c.db",
		"postgres://h/s":  "postgres://h/s",
		"postgres://ann@h:5432/s?sslmode=disable":     "postgres://ann@h:5432/s?sslmode=disable",
		"postgres://ann:se%2Fcret@h:5432/s":           "postgres://ann:xxxxx@h:5432/s",
		"postgres://h/s?user=ann&password=secret&x=1": "postgres://h/s?user=ann&password=xxxxx&x=1",
		"postgres://h/s?sslpassword=secret":           "postgres://h/s?sslpassword=xxxxx",
		"postgres://ann:12/secret@h/s":                "postgres://xxxxx",
		"postgres://ann:se/cret@h/s":                  "postgres://xxxxx",
		"postgres://ann:%zz@h/s":                      "postgres://xxxxx",
		"host=h password=secret dbname=s":             "host=h password=xxxxx dbname=s",
		"host=h password='a \\' secret' dbname=s":     "host=h password=xxxxx dbname=s",
	} {
		require.Equal(t, expected, Redact(dsn))
	}
	for text, expected := range map[string]string{
		`cannot parse "postgres://ann:secret@h/s": failed`: `cannot parse "postgres://ann:xxxxx@h/s": failed`,
		`cannot parse "host=h password=secret": failed`:    `cannot parse "host=h password=xxxxx": failed`,
		"known is postgres://USER:PASSWORD@HOST/DATABASE":  "known is postgres://USER:PASSWORD@HOST/DATABASE",
		"nothing to hide: at 12:30 a@b":                    "nothing to hide: at 12:30 a@b",
	} {
		require.Equal(t, expected, RedactText(text))
	}
}

func dsn(t *testing.T, text string) DSN {
	t.Helper()
	d, err := Known().Parse(text)
	require.NoError(t, err)
	return d
}

// Looking at what is not there must not make it.
func TestSQLite_ExistingMakesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty.db")
	require.NoError(t, os.WriteFile(empty, nil, 0o600))
	for path, says := range map[string]string{
		filepath.Join(dir, "none.db"): "there is no file",
		dir:                           "is a folder",
		empty:                         "is empty",
	} {
		_, err := dsn(t, "sqlite:"+path).Opener(t.Context(), Existing)
		require.ErrorContains(t, err, says)
		require.ErrorContains(t, err, path)
	}
	_, err := dsn(t, "sqlite:").Opener(t.Context(), Create)
	require.ErrorContains(t, err, "names no file")
	_, err = dsn(t, "memory:shop").Opener(t.Context(), Create)
	require.ErrorContains(t, err, "has no name")
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1, "only the file that was there")
}

func TestSQLite_InUseSaysWhatToDo(t *testing.T) {
	t.Parallel()
	d := dsn(t, "sqlite:"+filepath.Join(t.TempDir(), "shop.db"))
	source, err := d.Opener(t.Context(), Create)
	require.NoError(t, err)
	store, err := source.Open(t.Context())
	require.NoError(t, err)
	defer func() { require.NoError(t, Close(store)) }()

	again, err := d.Opener(t.Context(), Existing)
	require.NoError(t, err)
	_, err = again.Open(t.Context())
	require.ErrorIs(t, err, eventstore.ErrInUse)
	require.ErrorContains(t, err, fmt.Sprint("process ", os.Getpid()))
	require.ErrorContains(t, err, "sqlite3 -readonly")

	durability, err := d.DurabilityOf(t.Context(), store)
	require.NoError(t, err)
	require.Equal(t, "synced: WAL, synchronous=FULL", durability)
}

// asked is a store that knows how durable it is.
type asked struct{ eventstore.Store }

func (asked) Durability(context.Context) (string, error) { return "fsync=off", nil }

func TestDSN_DurabilityIsAskedFor(t *testing.T) {
	t.Parallel()
	store, err := eventstore.Opened(asked{}).Open(t.Context())
	require.NoError(t, err)
	durability, err := dsn(t, "memory:").DurabilityOf(t.Context(), store)
	require.NoError(t, err)
	require.Equal(t, "fsync=off", durability)
}

func TestSQLite_Migrate(t *testing.T) {
	t.Parallel()
	all := sqliteMigrations()
	require.Greater(t, len(all), 1)

	path := filepath.Join(t.TempDir(), "new.db")
	applied, err := dsn(t, "sqlite:"+path).Migrate(t.Context(), "sqlite:"+path)
	require.NoError(t, err)
	require.Equal(t, all, applied)
	applied, err = dsn(t, "sqlite:"+path).Migrate(t.Context(), "sqlite:"+path)
	require.NoError(t, err)
	require.Empty(t, applied, "the second time there is nothing to do")

	// A file as an older program leaves it.
	path = filepath.Join(t.TempDir(), "old #1 file.db")
	db, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	_, err = db.ExecContext(t.Context(), all[0].SQL+fmt.Sprintf("; INSERT INTO deed_log (id, created) VALUES ('%s', ''); PRAGMA application_id = 0x64656564; PRAGMA user_version = 1", uuid.New()))
	require.NoError(t, err)
	require.NoError(t, db.Close())
	applied, err = dsn(t, "sqlite:"+path).Migrate(t.Context(), "sqlite:"+path)
	require.NoError(t, err)
	require.Equal(t, all[1:], applied)
}
