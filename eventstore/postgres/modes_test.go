package postgres

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/projection/statetest"
)

// weird is a schema name that nothing is left out of.
const weird = `weird "Schema" ünï 100%d {schema} \'x'`

// parameter adds a parameter to a URL.
func parameter(t testing.TB, db, name, value string) string {
	t.Helper()
	u, err := url.Parse(db)
	require.NoError(t, err)
	q := u.Query()
	q.Set(name, value)
	u.RawQuery = q.Encode()
	return u.String()
}

// mode is a way to a database that is not the plain one.
type mode struct {
	name    string
	pooler  bool
	change  func(t testing.TB, url string) string
	options []Option
}

func modes() []mode {
	exec := func(name string) func(testing.TB, string) string {
		return func(t testing.TB, url string) string {
			return parameter(t, url, "default_query_exec_mode", name)
		}
	}
	some := []mode{
		{name: "Pooled", pooler: true, options: []Option{Pooled()}},
	}
	if long() {
		some = append(some,
			mode{name: "SimpleProtocol", change: exec("simple_protocol")},
			mode{name: "Schema", options: []Option{Schema(weird)}},
			mode{name: "PooledTwoTrips", pooler: true, options: []Option{Pooled(), always(formTwoTrips)}},
			mode{name: "PooledSimpleProtocol", pooler: true, options: []Option{Pooled()}, change: exec("simple_protocol")},
			mode{name: "Exec", change: exec("exec")},
		)
	}
	return some
}

// ways returns how to make the URL of a new database, in the mode. One pooler
// serves them all.
func (m mode) ways(t testing.TB) func(testing.TB) string {
	through := ""
	if m.pooler {
		through = pgtest.Bouncer(t, pgtest.Database(t))
	}
	return func(t testing.TB) string {
		db := pgtest.Database(t)
		if m.pooler {
			u, err := url.Parse(db)
			require.NoError(t, err)
			db = elsewhere(t, through, strings.TrimPrefix(u.Path, "/"))
		}
		if m.change != nil {
			db = m.change(t, db)
		}
		return db
	}
}

func TestStore_Modes(t *testing.T) {
	t.Parallel()
	for _, m := range modes() {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			way := m.ways(t)
			storetest.Run(t, func(t testing.TB) storetest.Opener {
				url := way(t)
				return func() (storetest.Store, error) { return Open(t.Context(), url, m.options...) }
			}, features())
		})
	}
}

func TestState_Modes(t *testing.T) {
	t.Parallel()
	for _, m := range modes() {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			way := m.ways(t)
			statetest.Run(t, func(t testing.TB) statetest.Opener {
				url := way(t)
				return func() (statetest.State, error) { return Open(t.Context(), url, m.options...) }
			}, statetest.Features{SQL: true, Reopen: true, Shared: true, ConcurrentUpdates: true})
		})
	}
}

// Several processes write through a pooler, which mixes their transactions.
func TestStore_PooledProcesses(t *testing.T) {
	t.Parallel()
	db := pgtest.Database(t)
	through := pgtest.Bouncer(t, db)
	w := &workload{writers: 6, commits: pick(60, 15)}
	var spies []*spy
	for i := range 3 {
		s := openURL(t, through, Pooled())
		if i == 2 {
			s = openURL(t, db) // one that needs no pooler
		}
		w.stores = append(w.stores, s)
		spies = append(spies, watch(t, s))
	}
	w.run(t)
	w.check(t, db, spies...)
}

// The logs in the schemas of one database have nothing in common.
func TestStore_SeveralSchemas(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	names := []string{"deed", "Deed", "other", weird}
	var stores []*Store
	for _, name := range names {
		stores = append(stores, openURL(t, url, Schema(name)))
	}
	conn := direct(t, url)
	do(t, conn, "SELECT pg_advisory_lock($1)", stores[0].lock) // the first one's log is locked
	for i, s := range stores[1:] {
		require.NotEqual(t, stores[0].logID, s.logID)
		c := commit(event(account("ann"), fmt.Sprint("of ", i)))
		c.Key = "key"
		require.EqualValues(t, 1, mustAppend(t, s, under(c, at(account("ann"), 0))).Last)
		require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error { return tx.Put("view", "row", []byte(s.logID)) }))
		_, err := s.Acquire(t.Context(), "view", s.logID, 0)
		require.NoError(t, err)
		watch(t, s).at(1)
	}
	do(t, conn, "SELECT pg_advisory_unlock_all()")
	for i, s := range stores[1:] {
		require.Equal(t, fmt.Sprint("of ", i), readAll(t, s, eventstore.All())[0].Type)
		require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
			value, _, err := tx.Get("view", "row")
			require.Equal(t, s.logID, string(value))
			return err
		}))
	}
	require.Empty(t, readAll(t, stores[0], eventstore.All()))
}

// What a role needs: the documentation of the package says it in these words.
const (
	grantsToMigrate = `CREATE SCHEMA deed AUTHORIZATION app`
	grantsToRun     = `
		GRANT USAGE ON SCHEMA deed TO app;
		GRANT SELECT ON ALL TABLES IN SCHEMA deed TO app;
		GRANT INSERT ON deed.kinds, deed.events, deed.tags, deed.keys TO app;
		GRANT INSERT, UPDATE, DELETE ON deed.tables, deed.rows, deed.checkpoints, deed.members, deed.leases TO app;`
	// grantsThatSuffice are even fewer: each is needed.
	grantsThatSuffice = `
		GRANT USAGE ON SCHEMA deed TO app;
		GRANT SELECT ON deed.migrations, deed.log, deed.kinds, deed.events, deed.keys, deed.tags TO app;
		GRANT INSERT ON deed.kinds, deed.events, deed.tags, deed.keys TO app;
		GRANT SELECT, INSERT ON deed.tables TO app;
		GRANT SELECT, INSERT, UPDATE, DELETE ON deed.rows, deed.checkpoints, deed.members TO app;
		GRANT SELECT, INSERT, UPDATE ON deed.leases TO app;`
)

// role returns the URL of a role that has been granted what the text grants to
// "app".
func role(t testing.TB, url, grants string) string {
	t.Helper()
	as := pgtest.Role(t, url)
	config, err := pgx.ParseConfig(as)
	require.NoError(t, err)
	do(t, direct(t, url), strings.NewReplacer("TO app", "TO "+config.User, "FROM app", "FROM "+config.User, "AUTHORIZATION app", "AUTHORIZATION "+config.User).Replace(grants), pgx.QueryExecModeSimpleProtocol)
	return as
}

// everything uses all that a store can do.
func everything(t testing.TB, url string, options ...Option) error {
	t.Helper()
	ctx := t.Context()
	for _, f := range forms {
		s, err := Open(ctx, url, append(options, always(f))...)
		if err != nil {
			return err
		}
		defer s.Close()
		keyed := under(commit(event(account("ann"), "of "+f.String(), "tag")), eventstore.NoneMatch(eventstore.OfTypes("of "+f.String()), 0))
		keyed.Key = f.String()
		if _, err := s.Append(ctx, keyed); err != nil {
			return err
		}
		if _, err := s.Append(ctx, keyed); err != nil {
			return err
		}
		if _, _, err := s.Lookup(ctx, account("ann"), f.String()); err != nil {
			return err
		}
		for _, q := range []eventstore.Query{eventstore.All(), eventstore.Tagged("tag"), eventstore.OneCategory("account"), eventstore.OneStream(account("ann"))} {
			for _, err := range s.Read(ctx, q, eventstore.ReadOptions{}) {
				if err != nil {
					return err
				}
			}
		}
		for _, err := range s.Subscribe(ctx, eventstore.All(), 0) {
			if err != nil {
				return err
			}
			break
		}
		conn, err := pgx.Connect(ctx, url)
		if err != nil {
			return err
		}
		defer conn.Close(context.WithoutCancel(ctx))
		if err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			_, err := s.AppendTx(ctx, tx, commit(event(account("in tx"), "of "+f.String())))
			return err
		}); err != nil {
			return err
		}
		lease, err := s.Acquire(ctx, "view", f.String(), 0)
		if err != nil {
			return err
		}
		if lease, err = s.Renew(ctx, lease, time.Minute); err != nil {
			return err
		}
		if err := s.Update(ctx, func(tx projection.StateTx) error {
			for _, do := range []func() error{
				func() error {
					return tx.SetCheckpoint(lease, projection.Checkpoint{}, projection.Checkpoint{Log: s.logID, Position: 1})
				},
				func() error { return tx.Put("view", "row", []byte("1")) },
				func() error { return tx.Put("view", "other", []byte("1")) },
				func() error { _, _, err := tx.Get("view", "row"); return err },
				func() error { return tx.Delete("view", "row") },
				func() error { return tx.Clear("view") },
				func() error { return tx.DeleteCheckpoint(lease) },
			} {
				if err := do(); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
		if err := s.Release(ctx, lease); err != nil {
			return err
		}
		// A stopped holder of the lock can be ended: that needs no right either.
		s.unblock(conn, 0)
		_ = s.Close()
		var members int
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM deed.members").Scan(&members); err != nil {
			return err
		}
		if members > 0 {
			return errors.New("a process that has ended is still a member")
		}
	}
	return nil
}

// A role that is no superuser, and has been granted no more than what the
// documentation says, can run everything; another one can set it up.
func TestOpen_Grants(t *testing.T) {
	t.Parallel()
	t.Run("Migrate", func(t *testing.T) {
		t.Parallel()
		url := pgtest.Database(t)
		app := role(t, url, grantsToMigrate)
		steps, err := Migrate(t.Context(), app)
		require.NoError(t, err)
		require.Len(t, steps, len(Migrations()))
		require.NoError(t, everything(t, app))
	})
	t.Run("MigrateWithCreate", func(t *testing.T) {
		t.Parallel()
		url := pgtest.Database(t)
		app := role(t, url, "DO $$ BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO app', current_database()); END $$")
		require.NoError(t, everything(t, app))
	})
	t.Run("Documented", func(t *testing.T) {
		t.Parallel()
		url := pgtest.Database(t)
		_, err := Migrate(t.Context(), url)
		require.NoError(t, err)
		require.NoError(t, everything(t, role(t, url, grantsToRun), WithoutMigration()))
	})
	t.Run("Least", func(t *testing.T) {
		t.Parallel()
		url := pgtest.Database(t)
		_, err := Migrate(t.Context(), url)
		require.NoError(t, err)
		require.NoError(t, everything(t, role(t, url, grantsThatSuffice), WithoutMigration()))
	})
	t.Run("NoneIsTooMany", func(t *testing.T) {
		t.Parallel()
		if !long() {
			t.Skip("every single privilege is taken away in turn, which takes time: set DEED_TEST_LONG=1")
		}
		for _, line := range strings.Split(strings.TrimSpace(grantsThatSuffice), "\n") {
			what, tables, _ := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(line), "GRANT "), " TO app;"), " ON ")
			for _, privilege := range strings.Split(what, ", ") {
				for _, table := range strings.Split(tables, ", ") {
					url := pgtest.Database(t)
					_, err := Migrate(t.Context(), url)
					require.NoError(t, err)
					app := role(t, url, grantsThatSuffice+"REVOKE "+privilege+" ON "+table+" FROM app;")
					require.Error(t, everything(t, app, WithoutMigration(), Patience(time.Second)), "%s on %s is not needed", privilege, table)
				}
			}
		}
	})
	t.Run("NoRights", func(t *testing.T) {
		t.Parallel()
		url := pgtest.Database(t)
		_, err := Open(t.Context(), pgtest.Role(t, url))
		require.ErrorContains(t, err, "permission denied")
	})
}

// An append is as durable as was asked for, and never less than the promise
// because a server or a role says so. What counts is the setting at the moment
// of the commit.
func TestOpen_SynchronousCommit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		server string
		mode   string // asked for
		want   string
	}{
		{"on", "", "on"},
		{"off", "", "on"},
		{"local", "", "local"},
		{"remote_apply", "", "remote_apply"},
		{"off", "on", "on"},
		{"on", "off", "off"},
		{"off", "off", "off"},
		{"on", "remote_write", "remote_write"},
		{"off", "local", "local"},
	} {
		for _, pooled := range []bool{false, true} {
			t.Run(fmt.Sprintf("server=%s,asked=%s,pooled=%t", test.server, test.mode, pooled), func(t *testing.T) {
				t.Parallel()
				url := pgtest.Database(t)
				admin := direct(t, url)
				do(t, admin, "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = "+test.server+"', current_database()); END $$")
				var options []Option
				if test.mode != "" {
					options = append(options, SynchronousCommit(test.mode))
				}
				through, ways := url, forms
				if pooled {
					through, ways = pgtest.Bouncer(t, url), []form{formFunction, formTwoTrips}
					options = append(options, Pooled())
				}
				for _, f := range ways {
					s := openURL(t, through, append(options, always(f))...)
					if f == ways[0] {
						do(t, admin, "CREATE TABLE public.modes (mode text)")
						do(t, admin, "CREATE FUNCTION public.mode() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.modes VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$")
						do(t, admin, "CREATE CONSTRAINT TRIGGER mode AFTER INSERT ON deed.events DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION public.mode()")
					}
					mustAppend(t, s, commit(event(account("ann"), "noted")))
					require.Equal(t, test.want, scalar[string](t, admin, "DELETE FROM public.modes RETURNING mode"), f.String())
				}
			})
		}
	}
	_, err := Open(t.Context(), "postgres://", SynchronousCommit("maybe"))
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.ErrorContains(t, err, `"maybe"`)
}

// Servers and databases that cannot keep a log are refused, with a sentence
// that says what to do.
func TestOpen_Refused(t *testing.T) {
	t.Parallel()
	t.Run("Facts", func(t *testing.T) {
		t.Parallel()
		good := facts{version: 150004, encoding: "UTF8", synchronousCommit: "on", fsync: "on"}
		require.NoError(t, good.check())
		for want, change := range map[string]func(*facts){
			"target_session_attrs=read-write": func(f *facts) { f.standby = true },
			"at least 14":                     func(f *facts) { f.version = 130012 },
			"ENCODING 'UTF8'":                 func(f *facts) { f.encoding = "LATIN1" },
		} {
			f := good
			change(&f)
			err := f.check()
			require.ErrorIs(t, err, eventstore.ErrInvalid)
			require.ErrorContains(t, err, want)
		}
	})
	t.Run("Encoding", func(t *testing.T) {
		t.Parallel()
		url := pgtest.Database(t)
		admin := direct(t, url)
		do(t, admin, "CREATE DATABASE ascii_"+strings.ToLower(strings.ReplaceAll(newID().String(), "-", ""))+" ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
		name := scalar[string](t, admin, "SELECT datname FROM pg_database WHERE datname LIKE 'ascii_%' ORDER BY oid DESC LIMIT 1")
		t.Cleanup(func() {
			_, _ = admin.Exec(context.WithoutCancel(t.Context()), "DROP DATABASE "+name+" WITH (FORCE)")
		})
		_, err := Open(t.Context(), elsewhere(t, url, name))
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "SQL_ASCII")
	})
	t.Run("Replica", func(t *testing.T) {
		t.Parallel()
		server := pgtest.Start(t, pgtest.Settings{"fsync": "off"})
		url := server.Database(t)
		s := openURL(t, url, Patience(100*time.Millisecond))
		mustAppend(t, s, commit(event(account("ann"), "noted")))
		becomeStandby(t, server)
		_, err := Open(t.Context(), url)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "read replica")

		// One that was open reads, and appends when there is a primary again.
		require.Len(t, readAll(t, s, eventstore.All()), 1)
		_, err = s.Append(t.Context(), commit(event(account("bob"), "noted")))
		require.Error(t, err) // it may have been sent before the server went away
		_, err = s.Append(t.Context(), commit(event(account("ann"), "noted")))
		require.ErrorIs(t, err, eventstore.ErrUnavailable)
		require.True(t, eventstore.CanRetry(err))
		require.True(t, scalar[bool](t, direct(t, url), "SELECT pg_promote()"))
		require.EqualValues(t, 2, mustAppend(t, s, commit(event(account("ann"), "noted"))).Last)
	})
	t.Run("NewerVersion", func(t *testing.T) {
		t.Parallel()
		url := pgtest.Database(t)
		newer := append(Migrations(), Migration{Version: len(Migrations()) + 1, Name: "of the future", SQL: "CREATE TABLE {schema}.future ();"})
		openURL(t, url, with(func(s *settings) { s.steps = newer }))
		for name, options := range map[string][]Option{"with": nil, "without": {WithoutMigration()}} {
			_, err := Open(t.Context(), url, options...)
			require.ErrorIs(t, err, eventstore.ErrNewerVersion, name)
		}
		_, err := Migrate(t.Context(), url)
		require.ErrorIs(t, err, eventstore.ErrNewerVersion)
	})
	t.Run("WithoutMigration", func(t *testing.T) {
		t.Parallel()
		url := pgtest.Database(t)
		_, err := Open(t.Context(), url, WithoutMigration())
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "deed migrate")
		_, err = Open(t.Context(), url, WithoutMigration(), with(func(s *settings) { s.steps = s.steps[:1] }))
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		openURL(t, url, with(func(s *settings) { s.steps = s.steps[:1] }), Schema("old"))
		_, err = Open(t.Context(), url, WithoutMigration(), Schema("old"))
		require.ErrorContains(t, err, "has version 1, this program needs 2")
		require.Equal(t, 0, scalar[int](t, direct(t, url), "SELECT count(*) FROM pg_namespace WHERE nspname = 'deed'"), "nothing was made")
	})
	t.Run("Unreachable", func(t *testing.T) {
		t.Parallel()
		_, err := Open(t.Context(), "postgres://nobody@127.0.0.1:1/none?connect_timeout=1")
		require.ErrorIs(t, err, eventstore.ErrUnavailable)
		require.True(t, eventstore.CanRetry(err))
		_, err = Open(t.Context(), "postgres://nobody@127.0.0.1:port/none")
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		for _, name := range []string{"", strings.Repeat("x", 64), "a$b", "a\x00b"} {
			_, err = Open(t.Context(), pgtest.Database(t), Schema(name))
			require.ErrorIs(t, err, eventstore.ErrInvalid, "%q", name)
		}
	})
	t.Run("StricterIsolationThroughAPooler", func(t *testing.T) {
		t.Parallel()
		url := pgtest.Database(t)
		do(t, direct(t, url), "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = ''repeatable read''', current_database()); END $$")
		s := openURL(t, pgtest.Bouncer(t, url), Pooled())
		_, err := s.Append(t.Context(), commit(event(account("ann"), "noted")))
		if err != nil { // it may also work; what it must not is to judge on an old snapshot
			require.ErrorIs(t, err, eventstore.ErrInvalid)
			require.ErrorContains(t, err, "READ COMMITTED")
		}
	})
}

// elsewhere is the URL of another database of the server.
func elsewhere(t testing.TB, db, name string) string {
	t.Helper()
	u, err := url.Parse(db)
	require.NoError(t, err)
	u.Path = "/" + name
	return u.String()
}

// becomeStandby makes the server a read replica, whose primary is out of reach.
func becomeStandby(t testing.TB, server *pgtest.Server) {
	t.Helper()
	dir := scalar[string](t, direct(t, server.URL()), "SHOW data_directory")
	server.Stop("fast")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "standby.signal"), nil, 0o600))
	server.Start()
}

// The text of the migrations, applied with a tool of one's own, makes a log
// like any other.
func TestMigration_In(t *testing.T) {
	t.Parallel()
	for _, schema := range []string{"deed", weird} {
		t.Run(schema, func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			var text strings.Builder
			for _, m := range Migrations() {
				text.WriteString(m.In(schema))
			}
			conn := direct(t, url)
			file := filepath.Join(t.TempDir(), "schema.sql")
			require.NoError(t, os.WriteFile(file, []byte(text.String()), 0o600))
			out, err := exec.CommandContext(t.Context(), program(t, conn, "psql"), "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--single-transaction", "--file="+file, "--dbname="+url).CombinedOutput()
			require.NoError(t, err, string(out))
			s := openURL(t, url, Schema(schema), WithoutMigration())
			mustAppend(t, s, commit(event(account("ann"), "noted")))
			watch(t, s).at(1)
			steps, err := Migrate(t.Context(), url, Schema(schema))
			require.NoError(t, err)
			require.Empty(t, steps)
			quoted := pgx.Identifier{schema}.Sanitize()
			require.Equal(t, 1, scalar[int](t, conn, "SELECT count(*) FROM "+quoted+".history"))
			require.Equal(t, 0, scalar[int](t, conn, "SELECT count(*) FROM "+quoted+".view_rows"))
		})
	}
}

// Each step is applied by one of those who start at once, and each says what it
// has applied itself.
func TestMigrate_TenAtOnce(t *testing.T) {
	t.Parallel()
	for done := range Migrations() { // on an empty database, and where some steps have been done
		t.Run(fmt.Sprint("after ", done), func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			if done > 0 {
				conn := direct(t, url)
				for _, m := range Migrations()[:done] {
					do(t, conn, m.In(DefaultSchema))
				}
			}
			var mu sync.Mutex
			var applied []string
			together(10, func(int) {
				steps, err := Migrate(t.Context(), url)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				for _, step := range steps {
					applied = append(applied, step.Name)
				}
			})
			var want []string
			for _, m := range Migrations()[done:] {
				want = append(want, m.Name)
			}
			require.Equal(t, want, applied)
			require.Equal(t, len(Migrations()), scalar[int](t, direct(t, url), "SELECT count(*) FROM deed.migrations"))
		})
	}
}
