// Package freeport finds ports for servers that cannot be told to take any one,
// or that must have the same one after a restart. It imports nothing of deed.
package freeport

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
)

var found sync.Map

// Find returns a port of the loopback interface that nobody listens on now. It
// is none of those that systems give to outgoing connections and to whoever
// listens on port 0: before a server has started, and while it is down, its port
// must not become the local end of some other connection. It returns no port
// twice; another process may find the same one.
func Find() (int, error) {
	var problem error
	for range 100 {
		port := 15000 + rand.IntN(17000)
		if _, before := found.LoadOrStore(port, true); before {
			continue
		}
		listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return port, listener.Close()
		}
		problem = err
	}
	return 0, fmt.Errorf("find a free port: %w", cmp.Or(problem, errors.New("all were tried")))
}
