package pgtest

import "syscall"

// memoryFolder returns the folder of a file system in memory, if it has room for
// the servers of a few test processes. Containers often have a tiny one.
func memoryFolder() (string, bool) {
	const (
		folder = "/dev/shm"
		tmpfs  = 0x01021994
		room   = 2 << 30
	)
	var s syscall.Statfs_t
	if err := syscall.Statfs(folder, &s); err != nil {
		return "", false
	}
	return folder, int64(s.Type) == tmpfs && int64(s.Bavail)*int64(s.Bsize) >= room //nolint:unconvert // the types differ by processor
}
