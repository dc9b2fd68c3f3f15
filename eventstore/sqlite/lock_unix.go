//go:build unix

package sqlite

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

func lockFile(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return errLocked
	}
	return err
}

func unlockFile(f *os.File) error { return unix.Flock(int(f.Fd()), unix.LOCK_UN) }

// links returns how many names the file has; 0 if there is none.
func links(path string) uint64 {
	var is unix.Stat_t
	if err := unix.Stat(path, &is); err != nil {
		return 0
	}
	return uint64(is.Nlink) //nolint:unconvert // its type differs among systems
}
