package pgtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/deed-go/deed/internal/freeport"
)

// Bouncer starts PgBouncer in front of db's server and returns db's URL through
// it. Connections are pooled by transaction, as people run it: what a session
// keeps (prepared statements, advisory locks, LISTEN, settings) is gone, or
// another client's, after the next COMMIT. Ten connections to the server serve
// any number of clients, and those who find none free wait.
//
// It knows db's role only, for every database of the server. Settings go to the
// section [pgbouncer] of its file. That role may also query its console, the
// database "pgbouncer". It is killed when the test ends.
func Bouncer(t testing.TB, db string, settings ...Settings) string {
	t.Helper()
	u := parse(t, db)
	program, err := findBouncer()
	if err != nil {
		lacking(t, "pgbouncer", err.Error())
	}
	config, err := pgconn.ParseConfig(db)
	if err != nil {
		t.Fatalf("start pgbouncer in front of %s: %v", u.Redacted(), err)
	}
	all := Settings{
		"pool_mode":                 "transaction",
		"default_pool_size":         "10",
		"max_client_conn":           "1000",
		"ignore_startup_parameters": "extra_float_digits",
	}
	for _, some := range settings {
		maps.Copy(all, some)
	}
	for tries := 1; ; tries++ {
		b, err := newBouncer(program, config, all)
		if err != nil {
			t.Fatalf("start pgbouncer in front of %s: %v", u.Redacted(), err)
		}
		t.Cleanup(func() {
			if err := b.remove(); err != nil {
				t.Errorf("stop pgbouncer: %v", err)
			}
		})
		through := withHost(u, net.JoinHostPort("127.0.0.1", strconv.Itoa(b.port)), map[string]string{"sslmode": "disable"})
		switch err := b.start(through); {
		case err == nil:
			return through
		case tries == 3 || !portTaken(err.Error()):
			t.Fatalf("start pgbouncer in front of %s: %v", u.Redacted(), err)
		}
	}
}

// portTaken reports whether PgBouncer has ended because somebody else has its port.
func portTaken(said string) bool {
	return strings.Contains(strings.ToLower(said), "address already in use")
}

type bouncer struct {
	keeper  *keeper
	program string
	port    int
	process *process
}

func newBouncer(program string, config *pgconn.Config, settings Settings) (_ *bouncer, err error) {
	port, err := freeport.Find()
	if err != nil {
		return nil, err
	}
	k, err := newKeeper(onDisk())
	if err != nil {
		return nil, err
	}
	b := &bouncer{keeper: k, program: program, port: port}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.remove())
		}
	}()
	quote := func(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }
	if err := k.write("users", quote(config.User)+" "+quote(config.Password)+"\n"); err != nil {
		return nil, err
	}
	all := Settings{
		"listen_addr":     "127.0.0.1",
		"listen_port":     strconv.Itoa(b.port),
		"unix_socket_dir": "",
		"auth_type":       "scram-sha-256",
		"auth_file":       k.path("users"),
		"admin_users":     config.User,
	}
	if config.Password == "" {
		all["auth_type"] = "trust" // the server asks for none, or for what only it can see
	}
	maps.Copy(all, settings)
	var file strings.Builder
	fmt.Fprintf(&file, "[databases]\n* = host=%s port=%d\n\n[pgbouncer]\n", config.Host, config.Port)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&file, "%s = %s\n", name, all[name])
	}
	return b, k.write("pgbouncer.ini", file.String())
}

// start returns when clients are served.
func (b *bouncer) start(through string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	log, err := os.Create(b.keeper.path("log"))
	if err != nil {
		return err
	}
	b.process, err = b.keeper.run(log, b.program, b.keeper.path("pgbouncer.ini"))
	if err != nil {
		return err
	}
	err = b.process.ready(ctx, func(ctx context.Context) error { return execute(ctx, through, "SELECT 1") })
	if err != nil {
		said, _ := os.ReadFile(b.keeper.path("log"))
		return fmt.Errorf("%w; its log:\n%s", err, said)
	}
	return nil
}

// remove kills the pool, which has nothing to lose, and removes its files.
func (b *bouncer) remove() error {
	if b.process != nil {
		b.process.kill()
	}
	return b.keeper.close()
}

// findBouncer returns PgBouncer's program. Its error is the sentence to skip with.
func findBouncer() (string, error) {
	if !canStart {
		return "", errors.New("pgbouncer can be started on Unix only")
	}
	// Not everybody has the folder for daemons in PATH.
	names := []string{"pgbouncer", "/usr/sbin/pgbouncer"}
	if name := os.Getenv(bouncerVariable); name != "" {
		names = []string{name}
	}
	for _, name := range names {
		if program, err := exec.LookPath(name); err == nil {
			return filepath.Abs(program)
		}
	}
	return "", fmt.Errorf("no program %q: install PgBouncer or set %s", names, bouncerVariable)
}
