// Package esdbserver is an EventStoreDB server inside the process: it speaks the
// gRPC protocol of EventStoreDB 23.10 over any eventstore.Store, so that an
// adapter can be tested, and programs tried, where no real server is at hand.
//
//	server, err := esdbserver.Start(memory.New())
//	client connects to server.URL(), for example esdb://127.0.0.1:40613?tls=false
//	err = server.Close()
//
// It may import eventstore only; the store is passed in.
//
// # What it does
//
// Streams: append with every kind of expected revision and idempotent repeats,
// reads of streams and of $all in both directions, filtered reads of $all,
// catch-up subscriptions with caught-up and checkpoints, soft deletion,
// tombstones, stream metadata ($maxCount, $maxAge, $tb) judged when reading,
// links. ServerFeatures and Gossip. Refusals are those of the real server: the
// same status codes, trailers and answers. Not there: persistent subscriptions,
// BatchAppend (it is not announced, so clients use Append), projections, users,
// access control, scavenging, TLS.
//
// Where real servers differ from each other it does what gives a client the
// least: a subscription to filtered $all gets no checkpoint because history ends,
// only after every so many events (in history, only if another one follows);
// caught-up comes once; first and last positions of a stream are not told.
// Regular expressions of filters are RE2, not .NET's.
//
// # How it keeps things
//
// The store is the only thing that lasts: an append is answered once it is in
// the store, and a server started over the same store goes on where the last
// one ended, with the same positions. All that was written goes into one stream
// of the store, esdb-log, one commit for a batch of waiting appends; names,
// types and sizes of EventStoreDB therefore need not fit the store's rules. A
// copy of the log is held in memory, where it is judged and read: this is a
// server for tests.
//
// Positions are offsets in bytes, as on a real server: they increase from 0 on
// with gaps of the size of each record, commit equals prepare, and they are not
// the positions of the store. Within the log, a number that was never handed
// out is no position and is refused.
//
// # Misbehaving
//
// [Server] has methods to drop connections, to refuse them, to answer late, to
// say that another node is the leader, to cut an append before or after it was
// written, to end subscriptions, and to go down and come up again on the same
// port.
package esdbserver
