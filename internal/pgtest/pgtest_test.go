package pgtest

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/internal/metatest"
)

// quick is for tests that do not mind what kind of server is theirs.
var quick = Settings{"fsync": "off"}

func TestMain(m *testing.M) { goleak.VerifyTestMain(Main(m)) }

func TestDatabase_IsEmptyAndSeparate(t *testing.T) {
	t.Parallel()
	one, two := Database(t), Database(t)
	a, b := connect(t, one), connect(t, two)

	require.NotEqual(t, get[string](t, a, "SELECT current_database()"), get[string](t, b, "SELECT current_database()"))
	do(t, a, "CREATE TABLE mine (x int)")
	require.Equal(t, 1, get[int](t, a, "SELECT count(*) FROM pg_class WHERE relname = 'mine'"))
	require.Equal(t, 0, get[int](t, b, "SELECT count(*) FROM pg_class WHERE relname = 'mine'"), "databases share a table")
}

func TestDatabase_IsDroppedWithOpenConnections(t *testing.T) {
	t.Parallel()
	other := connect(t, Database(t))
	var name string
	t.Run("its test", func(t *testing.T) {
		var conn *pgx.Conn
		t.Cleanup(func() { conn.Close(context.Background()) }) // the last cleanup: the database has been dropped by then
		conn, err := pgx.Connect(t.Context(), Database(t))
		require.NoError(t, err)
		name = get[string](t, conn, "SELECT current_database()")
	})
	require.Equal(t, 0, get[int](t, other, "SELECT count(*) FROM pg_database WHERE datname = $1", name), "database %q is still there", name)
}

func TestRole_CanDoNothingUnlessGranted(t *testing.T) {
	t.Parallel()
	db := Database(t)
	admin, role := connect(t, db), connect(t, Role(t, db))
	do(t, admin, "CREATE TABLE secrets (x int)")
	name := get[string](t, role, "SELECT current_user")

	require.False(t, get[bool](t, role, "SELECT rolsuper OR rolcreatedb OR rolcreaterole FROM pg_roles WHERE rolname = current_user"))
	for _, statement := range []string{
		"CREATE TABLE t (x int)",
		"CREATE TEMPORARY TABLE t (x int)",
		"CREATE SCHEMA s",
		"CREATE DATABASE d",
		"CREATE ROLE r",
		"SELECT * FROM secrets",
	} {
		_, err := role.Exec(t.Context(), statement)
		require.ErrorContains(t, err, "permission denied", "%s", statement)
	}

	do(t, admin, "GRANT SELECT ON secrets TO "+name)
	require.Equal(t, 0, get[int](t, role, "SELECT count(*) FROM secrets"))
	_, err := role.Exec(t.Context(), "INSERT INTO secrets VALUES (1)")
	require.ErrorContains(t, err, "permission denied")
}

func TestRole_IsDroppedWithOpenConnections(t *testing.T) {
	t.Parallel()
	other := connect(t, Database(t))
	var name string
	t.Run("its test", func(t *testing.T) {
		var conn *pgx.Conn
		t.Cleanup(func() { conn.Close(context.Background()) }) // the last cleanup: the role has been dropped by then
		conn, err := pgx.Connect(t.Context(), Role(t, Database(t)))
		require.NoError(t, err)
		name = get[string](t, conn, "SELECT current_user")
	})
	require.Equal(t, 0, get[int](t, other, "SELECT count(*) FROM pg_roles WHERE rolname = $1", name), "role %q is still there", name)
}

func TestServer_RestartsWithTheSameURL(t *testing.T) {
	t.Parallel()
	s := Start(t, Settings{"checkpoint_timeout": "1h", "application_name": "it's quoted"})
	db := s.Database(t)
	conn := connect(t, db)
	require.Equal(t, "on", get[string](t, conn, "SHOW fsync"))
	require.Equal(t, "1h", get[string](t, conn, "SHOW checkpoint_timeout"))
	do(t, conn, "CREATE TABLE kept (x int)")

	modes := []string{"immediate", "fast", "kill"}
	for i, mode := range modes {
		do(t, conn, "INSERT INTO kept VALUES (1)")
		pid := s.Pid()
		s.Restart(mode)
		require.NotEqual(t, pid, s.Pid(), "mode %q did not restart the server", mode)
		_, err := conn.Exec(t.Context(), "SELECT 1")
		require.Error(t, err, "a connection survived mode %q", mode)

		conn = connect(t, db)
		require.Equal(t, i+1, get[int](t, conn, "SELECT count(*) FROM kept"), "after mode %q", mode)
	}

	require.NoError(t, conn.Close(t.Context()))
	s.Stop("smart")
	s.Stop("fast")
	require.Zero(t, s.Pid())
	_, err := pgx.Connect(t.Context(), s.URL())
	require.Error(t, err, "a stopped server accepts connections")
	s.Start()
	s.Start()
	require.Equal(t, len(modes), get[int](t, connect(t, db), "SELECT count(*) FROM kept"))

	require.ErrorContains(t, s.s.stop("slowly"), `unknown mode "slowly": use one of ["fast" "immediate" "kill" "smart"]`)
}

// TestServer_StartsAfterSessionsOfAKilledOne holds a session in a loop, in which it
// does not notice that the postmaster is gone. While it runs, PostgreSQL does not
// start on the same files.
func TestServer_StartsAfterSessionsOfAKilledOne(t *testing.T) {
	t.Parallel()
	s := Start(t, quick)
	busy, watch := connect(t, s.URL()), connect(t, s.URL())
	do(t, busy, "SET statement_timeout = '5s'")
	ended := make(chan error, 1)
	go func() {
		_, err := busy.Exec(t.Context(), "DO $$ BEGIN LOOP END LOOP; END $$")
		ended <- err
	}()
	require.Eventually(t, func() bool {
		return get[int](t, watch, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO %' AND state = 'active'") == 1
	}, patience, time.Millisecond, "the session is not busy")
	s.Restart("kill")
	require.Error(t, <-ended)
	connect(t, s.URL())
}

func TestServer_SaysWhyItDoesNotStart(t *testing.T) {
	t.Parallel()
	binaries := filepath.Dir(Start(t, quick).s.process.cmd.Path)
	_, err := newServer(binaries, Settings{"fsync": "off", "wal_level": "everything"})
	require.ErrorContains(t, err, "has ended")
	require.ErrorContains(t, err, `invalid value for parameter "wal_level": "everything"`)
}

func TestServer_WaitsForItsPort(t *testing.T) {
	t.Parallel()
	s := Start(t, quick)
	s.Stop("fast")
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", s.s.port))
	require.NoError(t, err)
	started := make(chan error, 1)
	go func() { started <- s.s.start() }()
	// The server's log tells that it found the port taken.
	require.Eventually(t, func() bool { return strings.Contains(s.s.tail(0), "could not create any TCP/IP sockets") },
		patience, 10*time.Millisecond)
	require.NoError(t, listener.Close())
	require.NoError(t, <-started)
	connect(t, s.URL())
}

func TestBouncer_PoolsTransactions(t *testing.T) {
	t.Parallel()
	db := Database(t)
	through := Bouncer(t, db, Settings{"default_pool_size": "1"})
	require.NotEqual(t, db, through)
	// A pool of one connection serves both, which sessions would not let it.
	one, two := connect(t, through), connect(t, through)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	pid := func(conn *pgx.Conn) (n int) {
		require.NoError(t, conn.QueryRow(ctx, "SELECT pg_backend_pid()", pgx.QueryExecModeSimpleProtocol).Scan(&n))
		return n
	}
	require.Equal(t, pid(one), pid(two), "two clients of a pool of one got different sessions")

	// Whoever is within a transaction keeps the session.
	tx, err := one.Begin(ctx)
	require.NoError(t, err)
	waited := make(chan int, 1)
	go func() { waited <- pid(two) }()
	console := connect(t, withDatabase(parse(t, through), "pgbouncer"))
	require.Eventually(t, func() bool {
		rows, err := console.Query(ctx, "SHOW POOLS", pgx.QueryExecModeSimpleProtocol)
		require.NoError(t, err)
		pools, err := pgx.CollectRows(rows, pgx.RowToMap)
		require.NoError(t, err)
		for _, pool := range pools {
			if fmt.Sprint(pool["cl_waiting"]) == "1" {
				return true
			}
		}
		return false
	}, patience, 10*time.Millisecond, "nobody waits for the only session")
	require.NoError(t, tx.Commit(ctx))
	require.Equal(t, pid(one), <-waited)
}

func TestBouncer_SaysWhyItDoesNotStart(t *testing.T) {
	t.Parallel()
	db := Database(t)
	_, err := findBouncer()
	if err != nil {
		lacking(t, "pgbouncer", err.Error())
	}
	message := failure(t, func(t testing.TB) { Bouncer(t, db, Settings{"pool_mode": "everything"}) })
	require.Contains(t, message, "start pgbouncer in front of")
	require.Contains(t, message, "everything")
	require.NotContains(t, message, password(t, db), "a password is shown")
}

// TestLacking runs tests in a process that finds neither servers nor pools.
func TestLacking(t *testing.T) {
	t.Parallel()
	hidden := []string{"PATH=", binariesVariable + "=" + t.TempDir(), bouncerVariable + "=" + filepath.Join(t.TempDir(), "pgbouncer")}
	cases := map[string]struct {
		run, name string
		external  bool
		says      string
	}{
		"database": {run: "TestDatabase_IsEmptyAndSeparate", name: "postgres", says: "set DEED_TEST_POSTGRES_URL or install PostgreSQL server binaries"},
		"server":   {run: "TestServer_RestartsWithTheSameURL", name: "postgres", says: "set DEED_TEST_POSTGRES_URL or install PostgreSQL server binaries"},
		"server where there is only a URL": {
			run: "TestServer_RestartsWithTheSameURL", name: "postgres", external: true,
			says: "needs a server of its own, which DEED_TEST_POSTGRES_URL cannot give: install PostgreSQL server binaries",
		},
		"pool": {run: "TestBouncer_PoolsTransactions", name: "pgbouncer", external: true, says: "install PgBouncer or set DEED_TEST_PGBOUNCER"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := append([]string{urlVariable + "="}, hidden...)
			if c.external {
				env = append(env, urlVariable+"="+Start(t, quick).URL())
			}
			out, err := child(t, c.run, append(env, requireVariable+"=data")...).CombinedOutput()
			require.NoError(t, err, "%s", out)
			require.Contains(t, string(out), "--- SKIP: "+c.run)
			require.Contains(t, string(out), c.says)

			out, err = child(t, c.run, append(env, requireVariable+"=data,"+c.name)...).CombinedOutput()
			require.Error(t, err, "not skipped, not failed:\n%s", out)
			require.Contains(t, string(out), "--- FAIL: "+c.run)
			require.Contains(t, string(out), c.says)
			require.Contains(t, string(out), fmt.Sprintf("DEED_TEST_REQUIRE contains %q", c.name))
		})
	}
}

// TestExternal runs tests in a process that finds a server by its URL only, with
// a role that may do anything, and with one that may just do what is needed.
func TestExternal(t *testing.T) {
	t.Parallel()
	s := Start(t, quick)
	admin := connect(t, s.URL())
	do(t, admin, "CREATE ROLE creator LOGIN CREATEDB CREATEROLE PASSWORD 'creator'")
	creator := parse(t, s.URL())
	creator.User = url.UserPassword("creator", "creator")
	for _, external := range []string{s.URL(), creator.String()} {
		out, err := child(t, "TestDatabase|TestRole|TestProxy_ServerIsReached",
			urlVariable+"="+external, binariesVariable+"="+t.TempDir(), requireVariable+"=postgres").CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "--- PASS: TestRole")
		require.Contains(t, string(out), "--- PASS: TestProxy")
		require.Equal(t, 0, get[int](t, admin, "SELECT count(*) FROM pg_database WHERE datname LIKE 'deed%'"), "databases are left")
		require.Equal(t, 0, get[int](t, admin, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'deed%'"), "roles are left")
	}
}

func TestDatabase_ExternalMistakes(t *testing.T) {
	const unreachable = "@127.0.0.1:1/db?connect_timeout=5"
	for given, says := range map[string]string{
		"host=localhost":                     "\"host=localhost\" does not begin with postgres://",
		"postgres://me:geheim@[::1/db":       "it must look like postgres://user:password@host:5432/database",
		"postgres://me:geheim" + unreachable: "check that the server at postgres://me:xxxxx" + unreachable + " is up",
	} {
		t.Setenv(urlVariable, given)
		message := failure(t, func(t testing.TB) { Database(t) })
		require.Contains(t, message, says)
		require.NotContains(t, message, "geheim", "a password is shown")
	}
}

func BenchmarkDatabase(b *testing.B) {
	Database(b) // not the server's start
	for b.Loop() {
		Database(b)
	}
}

func BenchmarkStart(b *testing.B) {
	binaries, err := findBinaries()
	if err != nil {
		lacking(b, "postgres", err.Error())
	}
	for _, fsync := range []string{"on", "off"} {
		b.Run("fsync="+fsync, func(b *testing.B) {
			for b.Loop() {
				s, err := newServer(binaries, Settings{"fsync": fsync})
				require.NoError(b, err)
				require.NoError(b, s.remove())
			}
		})
	}
}

// child prepares this test binary to run other tests of it.
func child(t *testing.T, run string, env ...string) *exec.Cmd {
	t.Helper()
	program, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), program, "-test.v", "-test.run=^("+run+")")
	cmd.Env = append(os.Environ(), env...)
	return cmd
}

// failure runs a body that must fail and returns what it said.
func failure(t *testing.T, body func(testing.TB)) string {
	t.Helper()
	message := metatest.Failure(t, body)
	require.NotEmpty(t, message, "it did not fail")
	return message
}

func password(t *testing.T, db string) string {
	t.Helper()
	secret, _ := parse(t, db).User.Password()
	require.NotEmpty(t, secret)
	return secret
}

func connect(t *testing.T, db string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), db)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func do(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	_, err := conn.Exec(t.Context(), sql)
	require.NoError(t, err, "%s", sql)
}

func get[T any](t *testing.T, conn *pgx.Conn, sql string, args ...any) (v T) {
	t.Helper()
	require.NoError(t, conn.QueryRow(t.Context(), sql, args...).Scan(&v), "%s", sql)
	return v
}
