// Package esdb keeps the event store in an EventStoreDB database (22.6 or
// later), for any number of processes at once.
//
// It may import eventstore, its own internal packages, and EventStoreDB's
// official client, which nothing but internal/eventstoredb below it does.
//
//	app, err := deed.Start(ctx, esdb.URL("esdb://app:secret@node1:2113,node2:2113,node3:2113"), …, deed.State(…))
//
// or, without an application:
//
//	store, err := esdb.Open(ctx, "esdb://localhost:2113?tls=false")
//	defer store.Close()
//
// EventStoreDB keeps events only. Read models, checkpoints, leases and timers
// live in a database that the application names: SQLite, PostgreSQL or memory.
//
// # Durability
//
// An append returns when the server says that it is written: on a cluster, on
// disk at a majority of its nodes. How a single node syncs is the server's
// configuration; its option UnsafeDisableFlushToDisk gives the promise up.
//
// # What it can and cannot do
//
// A commit writes one stream, and has conditions on that stream alone. Commits
// of several streams, conditions on others, and conditions on queries (NoneMatch,
// dynamic consistency boundaries) are refused with errors.ErrUnsupported: the
// server has nothing to check them with. Nor does the store take commits without
// waiting (eventstore.Enqueuer).
//
// Every query can be read, in both directions, and subscribed to. A stream is
// read by itself. Forward reads and subscriptions of streams, categories and
// types are selected by the server; tags, slices and mixtures are selected here,
// from all events of the log. Backward reads of anything but a stream look at
// every event of the database on their way: give them a limit that is soon
// reached. The server's projections ($by_category and the like) are not needed.
//
// # Names and positions
//
// A stream is called "category-id" on the server, as is the custom there, and
// event n of it has the revision n-1. The position of an event is its commit
// position: an offset into the server's files, increasing, with gaps. An event
// whose commit and prepare positions differ (written in an explicit transaction
// of the old TCP protocol) has no position of its own and is refused with
// eventstore.ErrGap.
//
// The server can begin to read only at positions that it gave. After another
// one, one number before an event's for example, reading begins at the nearest
// that this process has seen, or at the very beginning: it is right, but may take
// long.
//
// Several logs can live in one database if they are given names with [Prefix].
// The id of a log stands in a stream of its own, deed:log or deed:log:name,
// written when it is first opened.
//
// An event's data is marked as JSON where it is JSON. What deed knows beside it
// (time by the writer's clock, tags, metadata, idempotency key, place in the
// commit) is JSON in the event's metadata, with the correlation and causation ids
// under the names that the server knows them by. The id of an event is the
// server's event id, unless the caller of Append chose it: then the server's is
// another one, and the chosen one stands in the metadata.
//
// # One outcome
//
// The server takes a write that repeats the ids of events it has for the same
// one, and says "written". That serves retries, and would make a success of a
// conflict if two commits had the same ids: so every call of Append has ids of
// its own on the wire. Each write expects an exact revision, those without
// conditions too. When its answer is lost the same events are sent again with the
// same expectation until the answer is known or the place is taken, and then the
// ids that stand there tell who was first. An unknown outcome is returned only
// when the caller's context ends, or the server stays away longer than [Patience]
// allows; appending again with the same key then settles it.
//
// What decides about a write (the events of its stream, where it ends, its keys,
// what became of a write that was cut off), and where the log ends, is asked of the
// cluster's leader. A node that follows names it, and from then on this process
// speaks to the leader, whatever the nodePreference in the URL.
//
// The id of the last event that eventstore.StreamAtEvent demands is compared here,
// with the event that was read at that revision; the server then confirms that
// this revision is still the last one. No revision of a stream is ever given
// twice, so the two together are the condition. A version is checked by the
// server; a position beside it is not.
//
// Idempotency keys are those of one stream, and are found by reading it: once, as
// far as it is long, and from then on what was added. They are kept as long as
// their events.
//
// A commit of one event takes one round trip; one of several takes a second one,
// as the server tells the position of the last event only.
//
// # What others write
//
// Events of the system (types and streams that begin with $), links ($>), and
// events without deed's metadata are not of the log: reads and subscriptions pass
// over them, and they do not move its head. A stream of the log that has events
// of another program among its own has holes in its versions, so reading it by
// itself fails with eventstore.ErrGap.
//
// An event of deed's that this program cannot read (of a newer format:
// eventstore.ErrNewerVersion; damaged: eventstore.ErrDecode) stops those reads and
// subscriptions that it may concern by its stream and type, and no others.
//
// # Deleted and truncated streams
//
// The streams of a log must be kept whole: deleting or truncating one voids the
// conditions and the idempotency keys of what was removed. A deleted stream takes
// a commit that demands a new stream, and one that demands the version before the
// deletion; a key of a removed event is new again, but to a process that
// remembers it. What holds is the numbering: it goes on, no version is ever given
// twice, and of two writers with one expectation one wins. Where the server's
// tools have been used on a stream all the same:
//
//   - A deleted stream is empty. Appending to it succeeds, and the numbering goes
//     on: the versions in the receipt do not begin at 1. Since its beginning is
//     missing, it cannot be read by itself any more: eventstore.ErrGap.
//   - A tombstoned stream is refused, to readers and writers: eventstore.ErrGap.
//   - A truncated stream ($maxCount, $maxAge, $tb) is eventstore.ErrGap to those
//     who would need what is missing. Reading on after a position works as long as
//     the event at that position is still there. A keyed append needs all of the
//     stream, unless this process has seen it before.
//   - The log as a whole still has the events of all of them until the server
//     scavenges; then they are gone, without a trace.
//
// # When something breaks
//
// The official client hangs its callers, or is dead for good, when it cannot find
// a server; here a lost connection makes a new client, and every call returns
// when its context ends, whatever the client does. While no server can be
// reached, calls wait as long as [Patience] says and then fail with
// eventstore.ErrUnavailable; subscriptions wait until one is back, and go on
// behind the last event that they had, with no skip and no repeat. A server that
// drops a subscription (for a slow consumer, or a change of leaders) is subscribed
// to again. The client may forget a connection when its server goes away, which
// then stays, unused, until the process ends: at most one for each time.
//
// All subscriptions of a store share one to the server, which follows the log
// from when the first of them began; [Tail] says how much of it is kept. Those who
// are further behind catch up with one of their own. A subscription's Through is
// always the position of an event, or while it catches up a checkpoint of the
// server, and reaches the head whatever stands behind that.
//
// # Limits
//
// Those of eventstore.DefaultLimits, but an event may have 960 KiB, so that it
// fits into the server's default of 1 MiB for an append with its metadata. All
// events of a commit together must fit too: see [MaxAppend]. Event types that
// begin with $ are refused.
package esdb
