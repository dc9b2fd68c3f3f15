package sqlite

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/deed-go/deed/eventstore"
)

// errLocked: somebody else holds the lock.
var errLocked = errors.New("locked")

// lock proves that nobody else has the database open through deed: an
// exclusive lock of the operating system on a file of its own beside it, gone
// with the process that held it. The database file itself is not used, since
// closing any handle of it would drop SQLite's own locks of this process.
type lock struct{ file *os.File }

// acquire locks the database of the path, which must be canonical.
func acquire(path string) (*lock, error) {
	name := path + ".lock"
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the lock file of %q: %w", path, err)
	}
	if err := lockFile(file); err != nil {
		holder := make([]byte, 32)
		n, _ := file.ReadAt(holder, 0)
		_ = file.Close()
		if errors.Is(err, errLocked) {
			by := ""
			if pid := strings.TrimSpace(string(holder[:n])); pid != "" {
				by = ", process " + pid
			}
			return nil, fmt.Errorf("%w: %q is open%s: close it there, or give this program another file", eventstore.ErrInUse, path, by)
		}
		return nil, fmt.Errorf("lock %q: %w", name, err)
	}
	if n := links(path); n > 1 {
		_ = file.Close()
		return nil, fmt.Errorf("%w: %q is one of %d names (hard links) of a file: SQLite and its lock know a file by one name: remove the others, or copy the file instead", eventstore.ErrInvalid, path, n)
	}
	if err := file.Truncate(0); err == nil {
		_, _ = fmt.Fprintf(file, "%d\n", os.Getpid()) // for the message above
	}
	return &lock{file}, nil
}

// release gives the lock up itself, and not by closing the file alone: a child
// process that is just being started has the file open, too, for a moment.
func (l *lock) release() error { return errors.Join(unlockFile(l.file), l.file.Close()) }

// canonical returns the path under which every alias of the file is known.
func canonical(path string) (string, error) {
	absolute, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	for range 40 { // a link may point at a file that does not exist yet
		if real, err := filepath.EvalSymlinks(absolute); err == nil {
			return real, nil
		}
		target, err := os.Readlink(absolute)
		if err != nil {
			break
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(absolute), target)
		}
		absolute = target
	}
	folder, err := filepath.EvalSymlinks(filepath.Dir(absolute))
	if err != nil {
		return "", err
	}
	return filepath.Join(folder, filepath.Base(absolute)), nil
}
