//go:build unix

package pgtest

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// running is what a child process has started.
type running struct {
	Pids []int
	Dirs []string
}

const childVariable = "DEED_PGTEST_CHILD"

// TestChild is the process that other tests end, in the way it is told.
func TestChild(t *testing.T) {
	end := os.Getenv(childVariable)
	if end == "" {
		t.Skip("this is the other process of TestNothingIsLeft")
	}
	conn := connect(t, Database(t))
	own := Start(t, quick)
	ownConn := connect(t, own.URL())
	started := running{}
	for _, c := range []*pgx.Conn{conn, ownConn} {
		// Only those that stay: no workers, nor sessions that are about to end.
		rows, err := c.Query(t.Context(), `SELECT pid FROM pg_stat_activity
			WHERE pid = pg_backend_pid() OR backend_type NOT IN ('client backend', 'autovacuum worker', 'parallel worker')`)
		require.NoError(t, err)
		sessions, err := pgx.CollectRows(rows, pgx.RowTo[int])
		require.NoError(t, err)
		started.Pids = append(started.Pids, sessions...)
	}
	for _, s := range []*server{common.server, own.s} {
		started.Pids = append(started.Pids, s.pid(), s.keeper.shell.Process.Pid)
		started.Dirs = append(started.Dirs, s.keeper.dir)
	}
	if program, err := findBouncer(); err == nil {
		config, err := pgx.ParseConfig(own.URL())
		require.NoError(t, err)
		b, err := newBouncer(program, &config.Config, nil)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, b.remove()) })
		require.NoError(t, b.start(withHost(parse(t, own.URL()), fmt.Sprintf("127.0.0.1:%d", b.port), nil)))
		started.Pids = append(started.Pids, b.process.cmd.Process.Pid, b.keeper.shell.Process.Pid)
		started.Dirs = append(started.Dirs, b.keeper.dir)
	}
	require.NoError(t, json.NewEncoder(os.NewFile(3, "parent")).Encode(started))
	io.Copy(io.Discard, os.Stdin) // until the parent says so
	switch end {
	case "panic":
		panic("as the parent wishes")
	case "exit":
		os.Exit(3)
	}
}

// TestNothingIsLeft ends a process that has started one of everything.
func TestNothingIsLeft(t *testing.T) {
	t.Parallel()
	if _, err := findBinaries(); err != nil {
		lacking(t, "postgres", err.Error())
	}
	for _, end := range []string{"passes", "panic", "exit", "SIGKILL", "SIGINT"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			said, write, err := os.Pipe()
			require.NoError(t, err)
			defer said.Close()
			cmd := child(t, "TestChild", childVariable+"="+end, urlVariable+"=")
			cmd.ExtraFiles = []*os.File{write}
			stdin, err := cmd.StdinPipe()
			require.NoError(t, err)
			var out strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &out
			require.NoError(t, cmd.Start())
			require.NoError(t, write.Close())

			var started running
			err = json.NewDecoder(said).Decode(&started)
			for _, pid := range started.Pids {
				require.True(t, alive(pid), "process %d does not run", pid)
			}
			switch end {
			case "SIGKILL":
				require.NoError(t, cmd.Process.Signal(syscall.SIGKILL))
			case "SIGINT":
				require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
			}
			stdin.Close()
			ended := cmd.Wait()
			require.NoError(t, err, "%s", out.String())
			if end == "passes" {
				require.NoError(t, ended, "%s", out.String())
				for _, dir := range started.Dirs {
					require.NoDirExists(t, dir, "it must be gone before the process is")
				}
			} else {
				require.Error(t, ended)
			}

			// Less than the minute after which a server notices that its files are gone.
			const soon = 20 * time.Second
			require.GreaterOrEqual(t, len(started.Pids), 10)
			for _, pid := range started.Pids {
				require.Eventually(t, func() bool { return !alive(pid) }, soon, 10*time.Millisecond, "process %d still runs", pid)
			}
			for _, dir := range started.Dirs {
				require.Eventually(t, func() bool {
					_, err := os.Stat(dir)
					return os.IsNotExist(err)
				}, soon, 10*time.Millisecond, "folder %q is still there", dir)
			}
		})
	}
}

// alive says whether the process runs; one that has ended but that nobody has
// waited for does not.
func alive(pid int) bool {
	if err := syscall.Kill(pid, 0); err != nil {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return !os.IsNotExist(err) || !exists("/proc/self/stat")
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(state, "Z")
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}
