package pgtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/deed-go/deed/internal/freeport"
)

// Settings are names and values of a configuration file.
type Settings map[string]string

// Server is a PostgreSQL server that belongs to one test. Its methods end the
// test when they fail, so they must be called by the test's own goroutine; only
// URL and Pid are for others too.
type Server struct {
	t testing.TB
	s *server
}

// Start starts a server of the test's own, which is stopped and removed when the
// test ends. Unlike the shared one it has its files on a disk and syncs them; with
// the setting fsync=off it does neither. Settings go to postgresql.conf, so ALTER
// SYSTEM can change them.
//
// It takes a second or two, as the files of a new server have to be made: less
// than half of that with fsync=off, where there is a file system in memory.
func Start(t testing.TB, settings ...Settings) *Server {
	t.Helper()
	binaries, err := findBinaries()
	if err != nil {
		sentence := err.Error()
		if os.Getenv(urlVariable) != "" {
			sentence = "this test needs a server of its own, which " + urlVariable + " cannot give: install PostgreSQL server binaries"
		}
		lacking(t, "postgres", sentence)
	}
	all := Settings{"max_connections": "200"}
	for _, some := range settings {
		maps.Copy(all, some)
	}
	s, err := newServer(binaries, all)
	if err != nil {
		t.Fatalf("start a PostgreSQL server of this test's own: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last lines in the log of the server on port %d:\n%s", s.port, s.tail(0))
		}
		if err := s.remove(); err != nil {
			t.Errorf("remove the PostgreSQL server of this test: %v", err)
		}
	})
	return &Server{t: t, s: s}
}

// URL returns the URL of the maintenance database, with a superuser. It stays the
// same for as long as the server exists, stopped or not.
func (s *Server) URL() string { return s.s.url() }

// Database returns the URL of a new, empty database on the server, with a
// superuser. It goes when the server goes.
func (s *Server) Database(t testing.TB) string {
	t.Helper()
	return newDatabase(t, parse(t, s.s.url()), false)
}

// Pid returns the process to signal, the postmaster's; 0 while there is none.
func (s *Server) Pid() int { return s.s.pid() }

// Stop stops the server and returns when it has stopped, at once if it had.
// Modes are those of PostgreSQL, and one more:
//
//   - "smart" waits until the last client has gone, a minute at most;
//   - "fast" ends the clients' connections, rolling back, and writes a checkpoint;
//   - "immediate" is a crash: the next start recovers from the log;
//   - "kill" kills the postmaster, as a system without memory does: sessions end
//     when they notice, and the next start waits for that.
func (s *Server) Stop(mode string) {
	s.t.Helper()
	if err := s.s.stop(mode); err != nil {
		s.t.Fatalf("stop the PostgreSQL server (%s): %v", mode, err)
	}
}

// Start starts the server again, on the same port, and returns when it accepts
// connections: after recovery, if it had crashed. A running server stays as it is.
func (s *Server) Start() {
	s.t.Helper()
	if err := s.s.start(); err != nil {
		s.t.Fatalf("start the PostgreSQL server again: %v", err)
	}
}

// Restart is [Server.Stop] and [Server.Start].
func (s *Server) Restart(mode string) {
	s.t.Helper()
	s.Stop(mode)
	s.Start()
}

// server is a throw-away server, running or stopped.
type server struct {
	keeper   *keeper
	binaries string
	password string
	port     int // fixed from the first start on

	mu      sync.Mutex
	process *process // nil before the first start
}

const superuser = "postgres"

// newServer makes the files of a server and starts it.
func newServer(binaries string, settings Settings) (_ *server, err error) {
	parents := onDisk()
	if settings["fsync"] == "off" {
		parents = inMemory()
	}
	k, err := newKeeper(parents)
	if err != nil {
		return nil, err
	}
	s := &server{keeper: k, binaries: binaries, password: random(20)}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.remove())
		}
	}()
	// Without a password everybody on this machine could run programs as us.
	if err := k.write("password", s.password); err != nil {
		return nil, err
	}
	log, err := s.log()
	if err != nil {
		return nil, err
	}
	initdb, err := k.run(log, filepath.Join(binaries, "initdb"), "--pgdata", s.data(), "--no-sync", "--no-instructions",
		"--encoding=UTF8", "--no-locale", "--auth=scram-sha-256", "--username="+superuser, "--pwfile", k.path("password"))
	if err != nil {
		return nil, err
	}
	select {
	case <-initdb.done:
	case <-time.After(patience):
		initdb.kill()
		return nil, fmt.Errorf("make the files of a server with %q: not ready after %v", initdb.cmd.Path, patience)
	}
	if initdb.err != nil {
		return nil, fmt.Errorf("make the files of a server with %q: %w\n%s", initdb.cmd.Path, initdb.err, s.tail(0))
	}
	if err := s.configure(settings); err != nil {
		return nil, err
	}
	if err := s.start(); err != nil {
		return nil, err
	}
	return s, nil
}

// configure adds the settings to the server's file, where the last one counts.
func (s *server) configure(settings Settings) error {
	all := Settings{
		"listen_addresses":        "127.0.0.1",
		"unix_socket_directories": "", // the default folder may not be there, or not be ours
		"shared_buffers":          "64MB",
		"min_wal_size":            "32MB",
		"max_wal_size":            "256MB",
	}
	maps.Copy(all, settings)
	var lines strings.Builder
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&lines, "\n%s = '%s'", name, strings.ReplaceAll(all[name], "'", "''"))
	}
	file, err := os.OpenFile(filepath.Join(s.data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(lines.String() + "\n")
	return errors.Join(err, file.Close())
}

func (s *server) data() string { return s.keeper.path("data") }

func (s *server) url() string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword(superuser, s.password),
		Host:     net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)),
		Path:     "/postgres",
		RawQuery: "sslmode=disable",
	}
	return u.String()
}

func (s *server) pid() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process == nil || s.process.ended() {
		return 0
	}
	return s.process.cmd.Process.Pid
}

func (s *server) start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process != nil && !s.process.ended() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	first := s.process == nil
	for {
		from, err := s.logged()
		if err != nil {
			return err
		}
		if first {
			if s.port, err = freeport.Find(); err != nil {
				return err
			}
		}
		err = s.attempt(ctx)
		if err == nil {
			return nil
		}
		// Somebody may have taken the port meanwhile, and what is left of a killed
		// server may need a moment to notice.
		said := s.tail(from)
		if !strings.Contains(said, "could not create any TCP/IP sockets") && !strings.Contains(said, "pre-existing shared memory block") {
			return fmt.Errorf("%w; its log:\n%s", err, said)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; its log:\n%s", err, said)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// attempt starts the server once and returns when it accepts connections.
func (s *server) attempt(ctx context.Context) error {
	log, err := s.log()
	if err != nil {
		return err
	}
	p, err := s.keeper.run(log, filepath.Join(s.binaries, "postgres"), "-D", s.data(), "-p", strconv.Itoa(s.port))
	if err != nil {
		return err
	}
	err = p.ready(ctx, func(ctx context.Context) error {
		conn, err := pgconn.Connect(ctx, s.url())
		if err != nil {
			return err
		}
		defer conn.Close(ctx)
		rows, err := conn.Exec(ctx, "SHOW data_directory").ReadAll()
		if err != nil {
			return err
		}
		// Whoever listens on this port may be another server.
		if got := string(rows[0].Rows[0][0]); got != s.data() {
			return fmt.Errorf("the server on port %d has its files in %q, not in %q", s.port, got, s.data())
		}
		return nil
	})
	if err != nil {
		p.kill()
		return err
	}
	s.process = p
	return nil
}

func (s *server) stop(mode string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	signal, ok := signals[mode]
	if !ok {
		return fmt.Errorf("unknown mode %q: use one of %q", mode, slices.Sorted(maps.Keys(signals)))
	}
	if s.process == nil || s.process.ended() {
		return nil
	}
	if err := s.process.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.process.done:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("still running after %v; close the clients' connections or use mode \"fast\"; its log:\n%s", patience, s.tail(0))
	}
}

// remove stops the server, if it runs, and removes its files.
func (s *server) remove() error {
	err := s.stop("immediate")
	if err != nil {
		s.process.kill()
	}
	return errors.Join(err, s.keeper.close())
}

// log opens the file that the server's processes write to.
func (s *server) log() (*os.File, error) {
	return os.OpenFile(s.keeper.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

func (s *server) logged() (int64, error) {
	info, err := os.Stat(s.keeper.path("log"))
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// tail returns the last lines of the log from the offset on.
func (s *server) tail(from int64) string {
	log, err := os.ReadFile(s.keeper.path("log"))
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(log[min(from, int64(len(log))):]), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-40):], []byte("\n")))
}

// findBinaries returns the folder with the programs of a PostgreSQL server. Its
// error is the sentence to skip with.
func findBinaries() (string, error) {
	if !canStart {
		return "", errors.New("servers can be started on Unix only: set " + urlVariable)
	}
	if dir := os.Getenv(binariesVariable); dir != "" {
		if !hasServer(dir) {
			return "", fmt.Errorf("no postgres and initdb in %s=%q: set %s or install PostgreSQL server binaries", binariesVariable, dir, urlVariable)
		}
		return filepath.Abs(dir)
	}
	for dir := range candidates {
		if hasServer(dir) {
			return dir, nil
		}
	}
	return "", errors.New("no PostgreSQL server: set " + urlVariable + " or install PostgreSQL server binaries")
}

// candidates yields the folders to look into, best first.
func candidates(yield func(string) bool) {
	if file, err := exec.LookPath("postgres"); err == nil {
		// What is in PATH may be a link, with the server's other programs elsewhere.
		if file, err = filepath.EvalSymlinks(file); err == nil && !yield(filepath.Dir(file)) {
			return
		}
	}
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin"} {
		dirs, _ := filepath.Glob(pattern)
		slices.SortFunc(dirs, func(a, b string) int { return version(b) - version(a) })
		for _, dir := range dirs {
			if !yield(dir) {
				return
			}
		}
	}
	if !yield("/usr/local/pgsql/bin") {
		return
	}
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		yield(strings.TrimSpace(string(out)))
	}
}

// version returns the number in a path like /usr/lib/postgresql/15/bin.
func version(dir string) int {
	digits := strings.TrimFunc(dir, func(r rune) bool { return r < '0' || r > '9' })
	n, _ := strconv.Atoi(digits)
	return n
}

func hasServer(dir string) bool {
	for _, program := range []string{"initdb", "postgres"} {
		if _, err := exec.LookPath(filepath.Join(dir, program)); err != nil {
			return false
		}
	}
	return true
}
