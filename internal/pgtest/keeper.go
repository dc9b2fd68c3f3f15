package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// keeper owns a folder and the one program that works in it at a time. When it is
// closed, or when this process ends in whatever way, the program is killed and
// the folder removed.
//
// That is done by a shell in a session of its own, which waits for the end of its
// input. The other end of that pipe is ours alone, so the system closes it when
// we are gone. This process needs no goroutine and no thread for it, unlike for
// Linux' parent death signal, and other systems have no such signal.
type keeper struct {
	dir   string
	user  account
	shell *exec.Cmd
	input *os.File
}

// keeperScript gets the number of the process to kill in the last line of its
// input, which is empty if there is none. Should the process never be seen to
// end, as under an init that does not wait for orphans, it goes on regardless.
const keeperScript = `
while read -r line; do pid=$line; done
if [ -n "$pid" ]; then
	kill -QUIT "$pid"
	n=0
	while [ $n -lt 150 ] && kill -0 "$pid"; do
		n=$((n + 1))
		[ $n -ne 100 ] || kill -KILL "$pid"
		sleep 0.1
	done
fi
rm -rf "$0" || { sleep 1; rm -rf "$0"; }
`

func newKeeper(parents []string) (_ *keeper, err error) {
	user, err := unprivileged()
	if err != nil {
		return nil, err
	}
	dir, err := user.mkdir(parents)
	if err != nil {
		return nil, err
	}
	ours, theirs := (*os.File)(nil), (*os.File)(nil)
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
			_ = ours.Close()
		}
		_ = theirs.Close() // the shell has its own; nil if there is no pipe
	}()
	theirs, ours, err = os.Pipe()
	if err != nil {
		return nil, err
	}
	k := &keeper{dir: dir, user: user, input: ours}
	k.shell = k.command("/bin/sh", "-c", keeperScript, dir)
	k.shell.Dir = "/" // not in the folder that it removes
	k.shell.Stdin = theirs
	if err := k.shell.Start(); err != nil {
		return nil, fmt.Errorf("start the shell that cleans up: %w", err)
	}
	return k, nil
}

func (k *keeper) path(name string) string { return filepath.Join(k.dir, name) }

// write makes a file that only the program's account can read.
func (k *keeper) write(name, content string) error {
	if err := os.WriteFile(k.path(name), []byte(content), 0o600); err != nil {
		return err
	}
	return k.user.own(k.path(name))
}

// command prepares a program to run in the folder and as its owner. It does not
// see the variables of PostgreSQL's clients, nor get the signals that a terminal
// sends to us: its end is ours to decide.
func (k *keeper) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Dir = k.dir
	cmd.Env = slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "PG") || strings.HasPrefix(variable, "LC_")
	})
	cmd.Env = append(cmd.Env, "LC_ALL=C")
	k.user.detach(cmd)
	return cmd
}

// run starts a program that writes to the log, which it closes, and puts it into
// the shell's care.
func (k *keeper) run(log *os.File, program string, args ...string) (*process, error) {
	defer log.Close()
	cmd := k.command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, keeper: k, done: make(chan struct{})}
	_, err := fmt.Fprintln(k.input, cmd.Process.Pid)
	go p.wait()
	if err != nil {
		p.kill()
		return nil, fmt.Errorf("hand %q to the shell that cleans up: %w", program, err)
	}
	return p, nil
}

// close removes the folder. What ran in it must have ended.
func (k *keeper) close() error {
	_ = k.input.Close() // repeating it is fine
	// How the shell ended is of no interest if the folder is gone.
	waited := k.shell.Wait()
	if _, err := os.Stat(k.dir); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("folder %q was not removed", k.dir), err, waited)
	}
	return nil
}

// process is a program that runs in a keeper's folder. It owns one goroutine,
// which lives as long as the program.
type process struct {
	cmd    *exec.Cmd
	keeper *keeper
	done   chan struct{}
	err    error // how it ended; to be read after done
}

func (p *process) wait() {
	defer close(p.done)
	p.err = p.cmd.Wait()
	// From now on the number may be another's. If the shell is gone, so is whom
	// this is for.
	_, _ = fmt.Fprintln(p.keeper.input)
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it has ended, otherwise
	<-p.done
}

// ready returns nil as soon as the probe does, and an error when the program ends
// or ctx does.
func (p *process) ready(ctx context.Context, probe func(context.Context) error) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, patience/10)
		err := probe(attempt)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%q has ended: %w", p.cmd.Path, p.err)
		case <-ctx.Done():
			return fmt.Errorf("%q does not accept connections: %w", p.cmd.Path, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// account is who the programs run as, when that is not who we are. PostgreSQL
// and its companions refuse to run as root.
type account struct {
	name     string
	uid, gid int
	other    bool
}

// onDisk returns the folders for files that need not be quick to make.
func onDisk() []string { return []string{os.TempDir(), "/tmp", "/var/tmp"} }

// inMemory returns the folders for files that need not survive anything. Making a
// database means making 300 files, which in memory takes a tenth of the time. Who
// sets TMPDIR wants them there.
func inMemory() []string {
	if folder, ok := memoryFolder(); ok && os.Getenv("TMPDIR") == "" {
		return append([]string{folder}, onDisk()...)
	}
	return onDisk()
}

// mkdir makes the folder of a keeper in the first parent where the account can
// reach it.
func (a account) mkdir(parents []string) (string, error) {
	var problems error
	for _, parent := range parents {
		if err := a.reaches(parent); err != nil {
			problems = errors.Join(problems, err)
			continue
		}
		dir, err := os.MkdirTemp(parent, "deed-pgtest-")
		if err != nil {
			return "", err
		}
		// What the server calls its folder is what it is compared with.
		if dir, err = filepath.EvalSymlinks(dir); err != nil {
			return "", err
		}
		if dir, err = filepath.Abs(dir); err != nil {
			return "", err
		}
		return dir, a.own(dir)
	}
	return "", fmt.Errorf("find a folder for a server's files: %w; set TMPDIR to one that everybody can reach", problems)
}

func (a account) reaches(dir string) error {
	if !a.other {
		return nil
	}
	for ; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o001 == 0 {
			return fmt.Errorf("user %q cannot enter %q", a.name, dir)
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
	}
}

func (a account) own(name string) error {
	if !a.other {
		return nil
	}
	return os.Chown(name, a.uid, a.gid)
}
