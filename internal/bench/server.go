package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// A server is a PostgreSQL server that cases get databases from.
type server struct {
	url   *url.URL // of its maintenance database
	admin *pgx.Conn
	made  int

	// Only of a server that was started here.
	process *exec.Cmd
	exited  chan struct{} // closed when it has ended, as ended says
	ended   error
	dir     string
	log     string
}

// serverSettings are those of the server that bench starts. The first three
// make a commit durable; the others keep checkpoints out of short runs.
func serverSettings(sharedBuffers string) []string {
	return []string{
		"fsync=on", "synchronous_commit=on", "full_page_writes=on",
		"shared_buffers=" + sharedBuffers, "max_connections=300",
		"max_wal_size=8GB", "checkpoint_timeout=30min",
	}
}

// errNoServer says that there is nothing to start.
var errNoServer = errors.New("no PostgreSQL server found: install postgresql, put its bin folder on PATH, or give --postgres URL")

// findServer returns the folder of the newest server's programs.
func findServer() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil {
		return "", err
	}
	if len(found) > 0 {
		version := func(name string) int {
			n, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(name))))
			return n
		}
		return filepath.Dir(slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) })), nil
	}
	if name, err := exec.LookPath("postgres"); err == nil {
		return filepath.Dir(name), nil
	}
	return "", errNoServer
}

// startServer starts a server whose data is in a new folder below parent, and
// lasts until stop.
func startServer(ctx context.Context, parent, sharedBuffers string) (_ *server, err error) {
	bin, err := findServer()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(parent, "deed-bench-pg-")
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	s := &server{dir: dir, log: filepath.Join(dir, "log")}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
		}
	}()
	// Interrupting bench must not interrupt the server, which is needed to tidy up;
	// but it ends when bench is killed. PostgreSQL refuses to run as root.
	attributes := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGINT}
	if os.Geteuid() == 0 {
		if attributes.Credential, err = credential("postgres"); err != nil {
			return nil, fmt.Errorf("start PostgreSQL: it refuses to run as root: %w", err)
		}
		if err := os.Chown(dir, int(attributes.Credential.Uid), int(attributes.Credential.Gid)); err != nil {
			return nil, fmt.Errorf("start PostgreSQL: %w", err)
		}
	}
	data := filepath.Join(dir, "data")
	initdb := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "-D", data, "-U", "postgres",
		"--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
	initdb.Dir, initdb.SysProcAttr = dir, attributes
	if text, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("start PostgreSQL: initdb: %w: %s", err, lastLine(string(text)))
	}
	port, err := freePort(ctx)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	args := []string{"-D", data, "-p", strconv.Itoa(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="}
	for _, setting := range serverSettings(sharedBuffers) {
		args = append(args, "-c", setting)
	}
	log, err := os.Create(s.log)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	defer log.Close()
	// Not bound to ctx: stop ends it in good order.
	s.process = exec.Command(filepath.Join(bin, "postgres"), args...)
	s.process.Dir, s.process.SysProcAttr = dir, attributes
	s.process.Stdout, s.process.Stderr = log, log
	if err := s.process.Start(); err != nil {
		s.process = nil
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	s.exited = make(chan struct{})
	go func() {
		s.ended = s.process.Wait()
		close(s.exited)
	}()
	s.url = &url.URL{Scheme: "postgres", User: url.User("postgres"), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), Path: "/postgres", RawQuery: "sslmode=disable"}
	for deadline := time.Now().Add(30 * time.Second); ; {
		if s.admin, err = pgx.Connect(ctx, s.url.String()); err == nil {
			return s, nil
		}
		select {
		case <-s.exited:
			text, _ := os.ReadFile(s.log)
			return nil, fmt.Errorf("start PostgreSQL: it ended at once: %s", lastLine(string(text)))
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("start PostgreSQL: not ready after 30 s: %w", err)
		}
	}
}

// useServer connects to a server that runs already.
func useServer(ctx context.Context, dsn string) (*server, error) {
	u, err := url.Parse(dsn)
	if err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" {
		return nil, fmt.Errorf("--postgres %q: give a URL such as postgres://user:password@host:5432/postgres", dsn)
	}
	admin, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return nil, fmt.Errorf("--postgres %q: %w", u.Redacted(), err)
	}
	return &server{url: u, admin: admin}, nil
}

func credential(name string) (*syscall.Credential, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// freePort returns none of the ports that systems give to outgoing connections:
// one of those might get it before the server has started.
func freePort(ctx context.Context) (int, error) {
	var listen net.ListenConfig
	var problem error
	for range 100 {
		port := 15000 + rand.IntN(17000)
		l, err := listen.Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return port, l.Close()
		}
		problem = err
	}
	return 0, problem
}

// stop closes the connection and, if the server was started here, ends it and
// removes its data.
func (s *server) stop() error {
	var problems []error
	if s.admin != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		problems = append(problems, s.admin.Close(ctx))
		cancel()
	}
	if s.process != nil {
		problems = append(problems, s.signal(syscall.SIGINT)) // a fast shutdown
		select {
		case <-s.exited:
		case <-time.After(time.Minute):
			problems = append(problems, s.signal(syscall.SIGQUIT)) // an immediate one
			<-s.exited
		}
		problems = append(problems, s.ended)
	}
	if s.dir != "" {
		problems = append(problems, os.RemoveAll(s.dir))
	}
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("stop PostgreSQL: %w", err)
	}
	return nil
}

func (s *server) signal(which os.Signal) error {
	if err := s.process.Process.Signal(which); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// database makes a database, a copy of template unless that is empty, and
// returns its URL and name. Names are of the process, so that several can
// share a server.
func (s *server) database(ctx context.Context, template string) (dsn, name string, err error) {
	s.made++
	name = fmt.Sprintf("deed_bench_%d_%d", os.Getpid(), s.made)
	statement := "CREATE DATABASE " + name
	if template != "" {
		statement += " TEMPLATE " + template
		if s.version(ctx) >= 150000 {
			// The default writes the whole copy to the log first.
			statement += " STRATEGY FILE_COPY"
		}
	}
	if _, err := s.admin.Exec(ctx, statement); err != nil {
		return "", "", fmt.Errorf("make a database: %w", err)
	}
	u := *s.url
	u.Path = "/" + name
	return u.String(), name, nil
}

func (s *server) version(ctx context.Context) int {
	var n int
	if err := s.admin.QueryRow(ctx, "SELECT current_setting('server_version_num')::int").Scan(&n); err != nil {
		return 0
	}
	return n
}

// drop removes a database, whoever is still connected.
func (s *server) drop(ctx context.Context, name string) error {
	if _, err := s.admin.Exec(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)"); err != nil {
		return fmt.Errorf("drop database %s: %w", name, err)
	}
	return nil
}

// checkpoint writes everything out, so that a case does not pay for the one
// before it.
func (s *server) checkpoint(ctx context.Context) error {
	if _, err := s.admin.Exec(ctx, "CHECKPOINT"); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	return nil
}

// vacuum brings the statistics and the visibility map of a filled database up
// to date.
func (s *server) vacuum(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return fmt.Errorf("vacuum: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "VACUUM ANALYZE"); err != nil {
		return fmt.Errorf("vacuum: %w", err)
	}
	return nil
}

// settings reads what the conditions of a measurement name.
func (s *server) settings(ctx context.Context) (string, error) {
	rows, err := s.admin.Query(ctx, `SELECT name || '=' || current_setting(name) FROM unnest($1::text[]) AS name`, []string{
		"fsync", "synchronous_commit", "full_page_writes", "wal_sync_method", "shared_buffers",
		"max_connections", "max_wal_size", "checkpoint_timeout",
	})
	if err != nil {
		return "", err
	}
	settings, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return "", err
	}
	var version string
	if err := s.admin.QueryRow(ctx, "SELECT current_setting('server_version')").Scan(&version); err != nil {
		return "", err
	}
	version, _, _ = strings.Cut(version, " ")
	return version + ", " + strings.Join(settings, ", "), nil
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
