// Package postgres keeps the event store and the state of read models in a
// PostgreSQL database (14 or later), for any number of processes at once.
//
// It may import eventstore, the state contract of projection, and internal
// packages.
//
//	app, err := deed.Start(ctx, postgres.URL("postgres://app:secret@db/shop"), …)
//
// or, without an application:
//
//	store, err := postgres.Open(ctx, "postgres://app:secret@db/shop")
//	defer store.Close()
//
// A program that has a pool of its own gives that ([Pool], [OpenPool]).
//
// # Durability
//
// An append returns when its transaction is committed: with fsync=on and
// synchronous_commit=on, PostgreSQL's defaults, it survives a crash of the
// server and power loss, whole or not at all. Where the server has synchronous
// standbys it is on those too. A server or role that says
// synchronous_commit=off is overruled, unless [SynchronousCommit] asks for it.
//
// Updates of the state (rows, checkpoints, the tables of SQL projections) are
// atomic, but not synced one by one. They lie in the same write-ahead log behind
// the events they were made from, so after a crash of the server they may be a
// moment behind, never ahead, and catch up.
//
// # Order
//
// Positions begin at 1, have no gaps, and are given in the order of commits: a
// reader never sees an event before an earlier one, and no reader waits for
// transactions that are still running. No sequence gives them out. Every append
// takes one advisory lock, for the length of its transaction, reads where the
// log ends, and writes behind it; PostgreSQL makes a commit visible before it
// gives its locks back. Were the lock ever missing, two writers would collide on
// the primary key and one would try again; nothing could be skipped. Readers and
// subscribers check that positions follow one another and fail with
// eventstore.ErrGap where they do not.
//
// What the lock costs, batches pay for: a process writes all commits that have
// gathered while it was writing the ones before. Conditions are judged in
// memory, on what the process knows of the log and on what others have written
// since, which each round trip brings along; a commit that loses is told so and
// the others of its batch are written. [Store.Stats] and the OpenTelemetry
// metrics deed.postgres.lock.wait and deed.postgres.lock.hold tell how long the
// lock was waited for and held.
//
// # When something breaks
//
// Connections that are lost are made anew. A commit whose answer was lost with
// one is looked for in the log by the ids of its events, and written again if it
// is not there: callers get the outcome, not a guess. Reads and subscriptions go
// on where they were. While the database cannot be reached, calls wait as long
// as [Patience] says and then fail with eventstore.ErrUnavailable; subscriptions
// wait until it is back.
//
// A process that is stopped while it has the lock does not stop the others:
// whoever waits for the lock longer than three seconds ends the session that
// keeps it if that is waiting for its client. Sessions of the same role may do
// that. Transactions that are left idle are ended by the server.
//
// When the log is found to be shorter than this process has seen it (a restored
// backup, a failover to a standby that lagged, a crash with
// synchronous_commit=off), appends and subscriptions fail with
// eventstore.ErrGap: what was done on the lost events is for people to decide.
//
// # Inline projections
//
// Where an application has an inline projection (see package projection), each batch
// of appends takes the log's lock first and keeps it while the projection's rows are
// read and written, some round trips long; without one, appends are written as before.
// Rows that handlers of SQL projections write must not be locked for long by
// others: all appends wait for that.
//
// # Transactions of your own
//
// [Store.AppendTx] appends within a transaction of the program, beside rows of
// an inline projection or an outbox. The other way round, handlers of SQL
// projections get at the pgx transaction they run in with [Transaction].
//
// # Several processes
//
// Subscribers learn of events of other processes by LISTEN and NOTIFY, in a
// fraction of a millisecond when nothing else is going on; while thousands of events
// come in each second, a process notifies every 8 milliseconds. Notifications are
// sent after the commit, gathered, and outside of its transaction, and nothing
// depends on them: the log is also looked at every half second, and every 5 to
// 100 milliseconds where notifications do not come. Leases of projections and
// sagas are kept by the database's clock; the epoch is checked in the
// transaction that commits the work, so a process that was paused and lost its
// lease cannot commit. That a lease was released is announced in the same way, so
// that the work of a process that stops is taken over at once and not at the next look.
//
// # Poolers
//
// Through a pooler in transaction mode open the log with [Pooled]. Commits are
// then written by a function in one round trip, and subscribers poll. Prepared
// statements, session settings and LISTEN are not used. Poolers in session mode
// that refuse settings at the start of a session, as PgBouncer does, need it too.
// The role's default isolation must then be READ COMMITTED.
//
// # Replicas
//
// The log cannot be opened on a read replica. With several hosts in the URL,
// say target_session_attrs=read-write. (The events table on a physical replica is
// a prefix of the log, without gaps, and can be queried there with SQL.)
//
// # Schema and rights
//
// A log lives in a schema of its own, "deed" unless [Schema] says otherwise;
// one database can hold many. Opening it applies what is missing of the schema;
// ten processes may start at once. A superuser is not needed. The role that
// migrates needs CREATE on the database, or on the schema where that exists:
//
//	CREATE SCHEMA deed AUTHORIZATION app;
//
// A role that only runs the program, opened with [WithoutMigration], needs
//
//	GRANT USAGE ON SCHEMA deed TO app;
//	GRANT SELECT ON ALL TABLES IN SCHEMA deed TO app;
//	GRANT INSERT ON deed.kinds, deed.events, deed.tags, deed.keys TO app;
//	GRANT INSERT, UPDATE, DELETE ON deed.tables, deed.rows, deed.checkpoints, deed.members, deed.leases TO app;
//
// and the right to create its own tables somewhere, if it has SQL projections.
// [Migrations] and "deed migrate --print" give the statements of the schema.
// The views deed.history and deed.view_rows are made for people with psql.
//
// The database's encoding must be UTF8.
//
// # Limits
//
// Those of eventstore.DefaultLimits. Every query, condition and read option of
// the contract is supported. Idempotency keys are scoped to the whole log and
// kept as long as the log. SQL projections use $1, $2, …; statements that would
// end their transaction, and the log's own schema, are refused to them.
package postgres
