// Package matrix is the one place where the features of deed's own backends are
// declared: their conformance tests demand them, and README's table is made of
// them. It may import the conformance suite, and only tests may import it.
package matrix

import (
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/storetest"
)

// Backend is a column of the table.
type Backend struct {
	// Name is that of the backend's package.
	Name     string
	Features storetest.Features
}

// Backends returns what each backend supports, the embedded ones first.
func Backends() []Backend {
	memory, server := storetest.Full(), storetest.Full()
	memory.Reopen = false
	server.Bubble = false // whoever waits for a server does not wait by channels alone
	// The server checks conditions on single streams only. A condition on a stream
	// that a commit does not write takes a position.
	nats := server
	nats.NoneMatch, nats.Contiguous, nats.KeyScope = 0, false, storetest.KeysInStream
	// One stream a commit; what the server allows for an append has to hold our
	// metadata, too.
	limits := eventstore.DefaultLimits()
	limits.EventBytes = 1 << 20 / 16 * 15
	esdb := storetest.Features{
		Forward: storetest.EveryQuery, Backward: storetest.EveryQuery, Subscribe: storetest.EveryQuery,
		KeyScope: storetest.KeysInStream, LogID: true, Reopen: true, Limits: limits,
	}
	return []Backend{
		{"memory", memory},
		{"sqlite", storetest.Full()},
		{"postgres", server},
		{"nats", nats},
		{"esdb", esdb},
	}
}

// Of returns the features of the backend.
func Of(name string) storetest.Features {
	for _, b := range Backends() {
		if b.Name == name {
			return b.Features
		}
	}
	panic("matrix: there is no backend " + name)
}
