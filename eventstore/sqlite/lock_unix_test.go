//go:build unix

package sqlite

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A child process that is being started has this process's files open until it
// becomes another program. A log that was closed meanwhile can be opened again.
func TestOpen_WhileAChildStarts(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log.db")
	s, err := Open(t.Context(), path)
	require.NoError(t, err)
	inherited, err := unix.Dup(int(s.lock.file.Fd()))
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Close(inherited)) }()
	require.NoError(t, s.Close())
	s, err = Open(t.Context(), path)
	require.NoError(t, err)
	require.NoError(t, s.Close())
}
