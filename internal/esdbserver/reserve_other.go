//go:build !linux

package esdbserver

import (
	"net"
	"os"
)

// reserve is not needed for correctness: see reserve_linux.go.
func reserve(net.Addr) *os.File { return nil }
