package freeport_test

import (
	"fmt"
	"net"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/freeport"
)

func TestFind(t *testing.T) {
	var first, last int
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		_, err = fmt.Sscan(string(text), &first, &last)
		require.NoError(t, err)
	}
	seen := map[int]bool{}
	for range 100 {
		port, err := freeport.Find()
		require.NoError(t, err)
		require.False(t, seen[port], "%d was found before", port)
		seen[port] = true
		require.False(t, first >= 32000 && first <= port && port <= last, "%d is of those that outgoing connections get", port)
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		require.NoError(t, err)
		require.NoError(t, listener.Close())
	}
}
