// Package memory is the event store and the state of read models kept in
// memory: for tests, for programs that may forget, and as the oracle that the
// durable backends are compared with. Nothing survives the process.
//
// It may import eventstore, the state contract of projection, and internal
// packages.
//
//	store := memory.New()
//	defer store.Close()
//
// A Store is also its own eventstore.Opener: deed.Start(ctx, memory.New(), …).
// Every feature of the contract is supported: queries of all kinds in both
// directions, several streams in a commit, boundary conditions, idempotency
// keys scoped to the whole log and kept for its life, contiguous positions.
package memory
