// Package pgtest gives tests a PostgreSQL server. It may import nothing of deed,
// and only tests may import it.
//
// Most tests want an empty database and do not mind whose server it is on:
//
//	db := pgtest.Database(t)
//
// All of them, in one process, share one server: the one named by
// DEED_TEST_POSTGRES_URL, or else a throw-away one, started from the binaries of
// this machine when the first test asks for it. It does not sync its files.
//
// A test that crashes the server, measures it, or needs it configured, takes one
// of its own with [Start]. [Role] makes a user who may do little, [Bouncer] puts
// a connection pool in front of a server, and [Proxy] a network that can fail.
//
// What was started ends with the process that started it, however that ends: a
// panic, a killed process and an interrupted `go test` leave neither servers nor
// files behind. A package whose tests look for leaked goroutines stops the shared
// server first, in its TestMain:
//
//	func TestMain(m *testing.M) { goleak.VerifyTestMain(pgtest.Main(m)) }
//
// # Where there is no server
//
// Tests that need what this machine has not got are skipped with a sentence that
// says what to install or to set. These variables are read:
//
//   - DEED_TEST_POSTGRES_URL: the URL of a role that may create databases (and
//     roles, for [Role]).
//   - DEED_TEST_POSTGRES_BIN: the folder of the server's binaries, to test another
//     version than the one found by looking around.
//   - DEED_TEST_PGBOUNCER: the program of PgBouncer, likewise.
//   - DEED_TEST_REQUIRE: names separated by commas; with "postgres" or "pgbouncer"
//     among them, tests that would be skipped for the lack of it fail instead.
package pgtest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

const (
	urlVariable      = "DEED_TEST_POSTGRES_URL"
	binariesVariable = "DEED_TEST_POSTGRES_BIN"
	bouncerVariable  = "DEED_TEST_PGBOUNCER"
	requireVariable  = "DEED_TEST_REQUIRE"
)

// patience bounds everything that is waited for: long enough for a machine that
// is busy with other tests, short enough to get an error instead of a timeout of
// the whole test binary.
const patience = time.Minute

// Database returns the URL of a new, empty database. It is dropped when the test
// ends, with the connections that are still open.
//
// Its role is the server's superuser, unless DEED_TEST_POSTGRES_URL names
// another; see [Role] for one with few rights. The throw-away server sorts text
// by bytes (locale C), stores UTF-8, and loses its data when the machine crashes,
// though not when the server does.
func Database(t testing.TB) string {
	t.Helper()
	if external := os.Getenv(urlVariable); external != "" {
		return newDatabase(t, parse(t, external), true)
	}
	binaries, err := findBinaries()
	if err != nil {
		lacking(t, "postgres", err.Error())
	}
	s, err := common.start(binaries)
	if err != nil {
		t.Fatalf("start a throw-away PostgreSQL server for this process's tests: %v", err)
	}
	return newDatabase(t, parse(t, s.url()), true)
}

// newDatabase creates a database on the server of admin.
func newDatabase(t testing.TB, admin *url.URL, drop bool) string {
	t.Helper()
	name := "deed_" + identifier(t.Name()) + "_" + random(10)
	// Nobody can be connected to template0, nor have left anything in it.
	err := execute(context.WithoutCancel(t.Context()), admin.String(), "CREATE DATABASE "+name+" TEMPLATE template0")
	if err != nil {
		t.Fatalf("create database %q for this test: %v; check that the server at %s is up and that this role may create databases",
			name, err, admin.Redacted())
	}
	if drop {
		t.Cleanup(func() {
			err := execute(context.WithoutCancel(t.Context()), admin.String(), "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
			if err != nil {
				t.Errorf("drop database %q after this test: %v; drop it by hand", name, err)
			}
		})
	}
	return withDatabase(admin, name)
}

// Role returns db, the URL of a test's database, with a new role in it that may
// log in and do nothing else: not even create a temporary table, which PostgreSQL
// lets everybody by default. The test grants it what it is to have, over db. The
// role is dropped when the test ends, with its connections and all it owns there.
func Role(t testing.TB, db string) string {
	t.Helper()
	admin := parse(t, db)
	name, password := "deed_role_"+random(10), random(20)
	err := execute(context.WithoutCancel(t.Context()), db,
		"CREATE ROLE "+name+" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD '"+password+"'",
		// One who is no superuser may drop what the role owns only as a member.
		"GRANT "+name+" TO CURRENT_USER",
		// Before version 15 everybody may create tables in the schema public.
		"REVOKE CREATE ON SCHEMA public FROM PUBLIC",
		"DO $$ BEGIN EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database()); END $$",
	)
	if err != nil {
		t.Fatalf("create role %q for this test: %v; check that the role in %s may create roles", name, err, admin.Redacted())
	}
	t.Cleanup(func() {
		err := execute(context.WithoutCancel(t.Context()), db,
			// Sessions outlive the role, and may then be ended by a superuser only, so
			// that the database could not be dropped.
			`DO $$ BEGIN
				WHILE (SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = '`+name+`') > 0 LOOP
					PERFORM pg_sleep(0.01);
					PERFORM pg_stat_clear_snapshot();
				END LOOP;
			END $$`,
			"DROP OWNED BY "+name, "DROP ROLE "+name)
		if refused, ok := errors.AsType[*pgconn.ConnectError](err); ok {
			t.Logf("role %q was not dropped, as the server is gone: %v", name, refused)
		} else if err != nil {
			t.Errorf("drop role %q after this test: %v; drop it by hand", name, err)
		}
	})
	u := *admin
	u.User = url.UserPassword(name, password)
	return u.String()
}

// Main wraps what a TestMain runs, so that the server shared by the tests is
// stopped, and its files are removed, right after the last test. Without it this
// happens too, but only once the process has ended.
func Main(m interface{ Run() int }) Runner { return Runner{m} }

// Runner is what [Main] returns, for [os.Exit] or goleak.
type Runner struct{ m interface{ Run() int } }

// Run runs the tests and returns the exit code for the process.
func (r Runner) Run() int {
	code := r.m.Run()
	if err := common.stop(); err != nil {
		fmt.Fprintf(os.Stderr, "stop the tests' PostgreSQL server: %v\n", err)
		code = max(code, 1)
	}
	return code
}

// common is the server that the tests of a process share.
var common shared

type shared struct {
	mu     sync.Mutex
	server *server
	err    error // remembered: a server that does not start fails each test at once
}

func (c *shared) start(binaries string) (*server, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server == nil && c.err == nil {
		c.server, c.err = newServer(binaries, Settings{
			"fsync":            "off",
			"full_page_writes": "off",
			"max_connections":  "400",
		})
	}
	return c.server, c.err
}

func (c *shared) stop() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server == nil {
		return nil
	}
	err := c.server.remove()
	c.server = nil
	return err
}

// lacking ends the test because name is not to be had here.
func lacking(t testing.TB, name, sentence string) {
	t.Helper()
	required := strings.FieldsFunc(os.Getenv(requireVariable), func(r rune) bool { return r == ',' || r == ' ' })
	if slices.Contains(required, name) {
		t.Fatalf("%s; %s contains %q, so this test must not be skipped", sentence, requireVariable, name)
	}
	t.Skip(sentence)
}

// execute runs the statements on a connection of its own.
func execute(ctx context.Context, db string, statements ...string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := pgconn.Connect(ctx, db)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, statement := range statements {
		if _, err := conn.Exec(ctx, statement).ReadAll(); err != nil {
			return err
		}
	}
	return nil
}

// parse reads the URL of a database. Its errors show no password.
func parse(t testing.TB, raw string) *url.URL {
	t.Helper()
	u, err := url.Parse(raw)
	if wrong, ok := errors.AsType[*url.Error](err); ok {
		err = wrong.Err
	}
	if err != nil {
		t.Fatalf("parse the URL of a PostgreSQL database: %v; it must look like postgres://user:password@host:5432/database", err)
	}
	if u.Scheme != "postgres" && u.Scheme != "postgresql" {
		t.Fatalf("parse the URL of a PostgreSQL database: %q does not begin with postgres://", u.Redacted())
	}
	return u
}

func withDatabase(u *url.URL, name string) string {
	v := *u
	v.Path = "/" + name
	q := v.Query()
	q.Del("dbname")
	v.RawQuery = q.Encode()
	return v.String()
}

// withHost returns the URL of the same database seen through another address.
func withHost(u *url.URL, address string, change map[string]string) string {
	v := *u
	v.Host = address
	q := v.Query()
	for _, key := range []string{"host", "hostaddr", "port"} {
		q.Del(key)
	}
	for key, value := range change {
		q.Set(key, value)
	}
	v.RawQuery = q.Encode()
	return v.String()
}

// identifier makes of a test's name what needs no quotes in SQL, short enough to
// leave room in the 63 bytes of an identifier.
func identifier(name string) string {
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToLower(name))
	return name[:min(len(name), 40)]
}

// random returns n letters and digits, n at most 26, of five bits each.
func random(n int) string { return strings.ToLower(rand.Text()[:n]) }
