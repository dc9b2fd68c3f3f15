// Package nats keeps the event store in one stream of NATS JetStream (server
// 2.12 or later). By default a NATS server syncs what it has acknowledged every
// two minutes only: when the power fails, or the operating system, acknowledged
// events of the last moments are lost, on one server and on several that fail
// together. For a log that must not lose events, set this on every server:
//
//	jetstream { sync_interval: always }
//
// Servers tell their setting only to the system account. With a connection of
// it ([SystemConn]) opening the log warns when a server does not sync every
// write, without one it warns that this is unknown: once, over [Logger].
// [Store.Durability] says how it is. A crash of the server process alone loses
// nothing.
//
// It may import eventstore and internal packages.
//
//	app, err := deed.Start(ctx, nats.URL("nats://app:secret@one:4222,nats://app:secret@two:4222", nats.Replicas(3)),
//		deed.State(…), …)
//
// or, without an application:
//
//	store, err := nats.Open(ctx, "nats://localhost:4222/?stream=orders&replicas=3")
//	defer store.Close()
//
// JetStream keeps events and nothing else of deed: the state of projections and
// sagas lives in a store that the program names, such as SQLite or PostgreSQL.
//
// Processes that share such a state divide the work among them, and can find
// each other where the log is: deed.Start(ctx, …, deed.Members(nats.Members)).
// That takes a small second stream, named like the log with "_members" behind.
//
// Processes that each have a state of their own, an SQLite file for example, must
// be told to divide the work at all: deed.Start(ctx, …, deed.Leases(nats.Leases)).
// Then leases in a key-value bucket, named like the log with "_leases" behind,
// decide who runs a saga or reaction, while every process keeps its own read
// models. The work of a process that has died is taken over when its lease has
// ended, after 10 s at most and the second in which the server notices. It is the
// server's clock that says so; a server whose clock jumps ahead ends leases early.
//
// The epoch of such a lease is not checked in the transaction that commits, since
// the log knows nothing of it: the owner goes by its own clock and stops before the
// lease can have ended, and where that was in vain, because the process stood still
// in the middle of a step, the history of the run refuses what it records. A
// saga.Once is done once at most all the same; a saga.Do may be done twice, with the
// same key.
//
// # What is supported
//
// Everything of the contract but these, which are refused with
// errors.ErrUnsupported or are as said:
//
//   - conditions over queries (eventstore.NoneMatch): the server checks one
//     subject safely, and does not check a wildcard against what is being
//     written at the same time;
//   - idempotency keys are unique in the first stream of their commit, not in the
//     whole log. They are kept as long as the log. Finding a key for the first
//     time reads its stream; from then on the store remembers;
//   - positions are sequences of the JetStream stream. They increase, and have
//     gaps where a commit has conditions on streams that it does not write: each
//     takes a message of its own, in front of the events.
//
// A commit has at most 1,000 messages, those for such conditions included: an
// atomic batch of the server takes no more. An event must fit into the server's
// max_payload, and the stream's max_msg_size, with 64 KiB for what is written around
// it: with the default of 1 MiB it may have 960 KiB, tags and metadata included
// ([Store.Limits]).
//
// Queries for a stream, a category or one slice are answered by subject, and so
// is a query of several items when all of them are about the same one of these.
// Every other query reads all subjects; types and tags are always looked at in
// the program.
//
// # What is changed while the log is open
//
// The stream is looked at every five seconds: its settings, its metadata and how
// many messages it says to have. When a setting has become bad, appends and
// subscriptions fail with eventstore.ErrUnavailable and the name of the setting
// until it is put right. When events were removed, or the stream was made anew,
// they fail with eventstore.ErrGap until the program is restarted. A server that
// does not answer says nothing about the stream. Up to the next look appends are
// acknowledged as ever: limits that remove events must not be set at all.
//
// The number of replicas and max_msg_size may be changed, to no fewer than
// [Replicas] asked for and no less than 128 KiB.
//
// # How events are stored
//
// An event is one message with the subject stream.slice.category.id, in which
// bytes that mean something to NATS are escaped, so that no two streams of
// events share a subject. Its payload is some lines of text, an empty line, and the
// event's data as it is:
//
//	3 1700000000000000005 0199c0de-0000-7000-8000-000000000001 00c0ffee 17 8
//	786.account.ann
//	account.opened
//	tags ["a","b"]
//	metadata {"actor":"me"}
//
//	{"owner":"Ann"}
//
// The first line has the event's version, time, id, a check of the id of the event
// before it in its stream, and the sequences of up to sixteen events before it (those
// after the first as differences); the next are the subject without the prefix, and
// the type. Lines for tags, metadata, the event's place in its commit, and the
// commit's key and fingerprint are there where there are such.
//
// To load a stream is to read its last message and to follow these sequences, many at
// once: no consumer has to be made, and the server has nothing to search. It is asked
// for payloads alone, as headers cost it more than anything else about an answer.
// Such a load compares each event with what the one behind it says of its id, and is
// repeated with headers, which name the stream that was read, when they do not fit
// together: a mirror of what the log was before it was restored may have answered. A
// stream of more than 2,048 events, or 32 MiB, is read by pages, with headers.
//
// A category is read by pages of what the server selects by subject, and where it is
// a third of the log or more by pages of everything: to select, the server looks at all
// streams of the category for each message.
//
// # Appending
//
// Each commit demands what the last sequences of its streams are, also one
// without conditions: that is how versions are numbered without gaps, by any
// number of processes, and how the store finds out what became of a commit. A
// commit of one event is a publish; one of several is an atomic batch. On a
// single server, which syncs every publish alone, waiting commits share a batch
// from sixteen on; a batch waits, at most half as long as the last one took, for
// callers who have just been answered, if they mostly come again. On several servers
// commits of one event go their own ways, since the servers gather what they
// replicate, until 128 are on their way; what waits then shares batches. Commits on
// one stream are written in the order of the calls.
//
// When the server refuses a batch it does not say why. The store then reads
// where the streams are, gives those commits a conflict whose conditions do not
// hold any more, and sends the others again.
//
// # When something breaks
//
// A commit whose answer does not come is looked for by the ids of its events,
// and sent again if it is not there: with the same demands, so that messages
// that arrive late are refused once the commit is written. Callers get the
// outcome, not a guess; when none can be had for as long as [Patience] says, the
// error is eventstore.ErrOutcomeUnknown, or eventstore.ErrUnavailable where
// nothing can have been written.
//
// All subscribers of a process share one consumer, whose messages must follow
// one another without a gap; it is made anew, behind what was seen, whenever it
// fails. Those who are far behind read pages. Subscriptions wait for a server
// that is away.
//
// Whenever the server was away the last event that was seen is looked at again.
// When it is not there, or another one is, the server has lost events: appends
// and subscriptions then fail with eventstore.ErrGap, since what was done on the
// lost events is for people to decide.
//
// # Several servers
//
// With [Replicas] an event is acknowledged when most of the servers have it.
// Three survive the loss of one. What must be known for certain (where a stream
// ends, whether there is more to read) is asked of the stream's leader, because
// others lag behind it; messages that are known to exist come from any of them.
// While there is no leader calls wait.
//
// A server that is cut off takes itself for the leader for up to twenty seconds,
// and its clients stay with it. What it says is not the last word: a commit that
// it refuses may have been written by the leader, and is looked for before its
// outcome is told; an end before one that was seen is not believed; messages that
// it does not find are asked for until it must have noticed; and that nothing more
// matches is believed only of a leader that has just heard from all replicas. A
// read through such a server may end where the log ended when it was cut off.
//
// A log that is full is told at once (eventstore.ErrUnavailable, with the name of
// the limit): nothing is written, and nothing is tried again.
//
// # The stream
//
// Opening a log makes the stream with settings that keep it ([Config]): limits
// retention without limits, nothing can be deleted or purged, file storage,
// direct gets, atomic batches. A stream that exists is refused, by the name of
// the setting, when it could lose events or appends could not be checked. Its
// metadata holds the id of the log. Nothing else may publish to its subjects.
//
// A program needs these rights, for a stream named deed: to publish to deed.>,
// $JS.API.INFO, $JS.API.STREAM.INFO.deed, $JS.API.STREAM.MSG.GET.deed,
// $JS.API.DIRECT.GET.deed and below, $JS.API.CONSUMER.*.deed and below, and
// $JS.API.STREAM.CREATE.deed unless it is opened with [WithoutCreation]; to
// subscribe to _INBOX.>. With [Leases], also to publish to $KV.deed_leases.> and
// $JS.API.STREAM.INFO, STREAM.CREATE and DIRECT.GET of KV_deed_leases; with these
// or [Members], deed_members.> and $JS.API.STREAM.*.deed_members and DIRECT.GET of it.
package nats
