// Package projection folds events into read models and keeps them up to date:
// it catches up with the log, follows it, and moves its checkpoint in the same
// transaction as the rows, so that what a read model shows is always exactly
// the fold of the log up to its checkpoint.
//
// It may import eventstore, and deed's internal clock, logreader, ownership and worker.
//
// # Defining read models
//
// A view is rows of one type under string keys, made by one small function for
// each event type:
//
//	var balances = projection.View("balances",
//		projection.On(func(b *Balance, e Opened) { b.Owner = e.Owner }),
//		projection.On(func(b *Balance, e Deposited) { b.Cents += e.Cents }),
//		projection.DeleteOn[Balance, Closed](),
//	)
//
// The key is the ID of the event's stream. [OnKeyed] chooses other keys, also
// several for one event; [OnMeta] sees position, time and metadata; [Of] keeps
// an aggregate's own state as rows. Package query reads views.
//
// An [Index] is an order of a view's rows, by which package query reads a part of
// them without looking at the others. [ViewDefinition.Indexed] declares it, whenever
// it is wanted:
//
//	var byOwner = projection.Index("owner", func(b Balance) string { return b.Owner })
//	var byCents = projection.Index("cents", func(b Balance) int64 { return b.Cents })
//	var balances = projection.View("balances", …).Indexed(byOwner, byCents)
//
// Keys are text, bytes, numbers, booleans or times. [IndexMany] lists a row under
// several keys, or none, and [CompositeIndex] orders by one key and then another.
//
// [SQL] is for read models in tables of your own: handlers get the
// transaction, and one text serves every backend that has SQL.
//
// # Joins
//
// Events of several streams and categories meet in a row when their handlers
// return its key, which must be told by each of the events: an order's events name the
// customer. A keys function cannot look into rows, so an event finds only
// rows whose keys it knows. Where one event of a parent changes what is shown of
// many children (a customer is renamed, and all orders show the name), there are
// three ways:
//
//   - The row is the parent's and holds the children. The event changes one row,
//     and an [IndexMany] over the children's keys finds the row by a child, as the
//     example of [OnKeyed] shows. All of a row's events come in order, in partitions
//     too. A row is written whole, so this is for children by the dozen.
//   - Parents and children are views of their own, each with its own rows, and are
//     put together by who reads them, in one transaction on the state. A child names its
//     parent; nothing is written many times. The views may be at different positions:
//     wait for both.
//   - The tables are your own: the handler of an [SQL] projection says UPDATE … WHERE
//     customer = $1. This is for children by the thousand, and should not be divided
//     into partitions, as the streams of parent and children are then in different ones.
//
// # Running them
//
// An application that is given the definitions does all of this: an [Engine]
// has a worker for each projection. The worker takes the projection's lease,
// reads its checkpoint, refuses a log that the checkpoint cannot belong to
// ([ErrWrongLog]), subscribes after it and folds what it handles. While it
// catches up it writes in large batches; live it writes at once. Events that do
// not concern the projection cost no write. The projections of an engine that are
// near one another in the log read it once, together, and the server is asked for
// what one of them handles.
//
// [Engine.WaitFor] waits until a read model contains a position, which is how
// queries read their own writes. [Engine.Status] tells position, lag and the
// last error. [Engine.Pause] makes it stand still. [Engine.Rebuild] empties the rows and
// folds again from the beginning; [Engine.Verify]
// does so on the side and compares, and finds events that were applied twice or
// never even where rows do not show it.
//
// Entries of indexes are written in the same update as the rows that they are of.
// For an index that is new, whoever has taken the lease builds them from the rows,
// in steps that a crash does not undo, and goes on with events then: an application
// that waits until its views have caught up finds the index built. Reading by it
// earlier is an error, [ErrIndexNotBuilt], and no list that lacks something. Whoever
// runs the view and does not know an index, as an older build of the program while a
// newer one is rolled out, withdraws it before it writes the first row, and removes
// its entries; the newer build builds it again when it takes over.
//
// # Inline: in the append's own transaction
//
// A projection that says so is applied by the appends, on stores that keep log and
// rows in one database (SQLite, PostgreSQL, memory):
//
//	var balances = projection.Of("balances", accounts).Inline()
//
// When an append returns, the rows contain its events: whoever looks then, in
// whatever process, sees them, and query.Get does so without an option and without
// waiting. It is for the few read models that must never be behind, such as one
// that the next screen shows. The price is paid by every append of the store: the
// handlers run while nobody else can append. A view costs some statements more for each
// batch of appends, on PostgreSQL round trips under the log's lock: measure with
// BenchmarkInline of your backend, and see BENCHMARKS.md. A projection that follows
// costs appends next to nothing.
//
// A handler that fails, by an error or a panic, fails the append of its commit with an
// [*InlineError], which names the projection and the event; nothing of the commit
// is written, and the commits that were to be written together with it are not
// concerned. So does a handler that takes longer than two seconds. The append is not
// tried again ([eventstore.CanRetry] says no). A command gets the error as it is;
// commands on the same aggregate that were decided behind it are decided again.
// Handlers must not call the application, nor its store: they would wait for themselves.
// One that never returns is not interrupted: no append of the store is answered any more. On
// PostgreSQL handlers of SQL projections run on the session that appends, which is none of
// the pool's: what a program sets up for the sessions of a pool (AfterConnect) is not there.
// They may run more than once for an event; what they have written counts once.
//
// What applies it are all appends by a store that an [Engine] with the definition
// was made on, until [Engine.Close], whether or not its workers run and whoever has
// the lease; on PostgreSQL the AppendTx of that store too. Appends by a process without
// the definition do not, and need not: rows and checkpoint are moved together, and only
// from the head of the log to the next. Whoever finds that the checkpoint is not the head
// leaves the projection alone. Its owner, the one runner that has the lease, sees
// that, folds what is missing as it would for any projection, and hands it over to the
// appends again in a short update during which nobody appends. So a new projection
// catches up first, and one that is paused, rebuilt, handed to another owner or has
// dead letters (an event can fail while the projection is behind) is not applied
// meanwhile: appends go on without it. [Status.Inline] says how it is.
// What a process has written meanwhile its own queries still see: they wait until the
// owner has come as far ([Engine.Unapplied]), or fail with query.ErrTimeout. While a
// rebuild empties the rows they may see less than was there before.
//
// Definitions that handle other event types, or have other indexes or Setup
// statements, leave each other's rows alone, as when nodes are replaced one after the
// other. Partitions and versions above 1 cannot be inline: an append would have to move
// all checkpoints, and what is read while a version is built is another one. Give a
// changed projection another name, or take Inline out and build a version.
//
// # Changing a projection
//
// Rows that old handlers have made stay as they are when the code changes. Give the
// changed definition the next number, beside the one that runs:
//
//	var balancesToo = projection.View("balances", …).Version(2)
//
// A version has rows of its own, is run like any projection, resumes when it is
// killed, and is dropped with [Engine.DropVersion] when it is not wanted. While it is
// built, whoever reads with its definition reads the rows of the version that is
// active, with [Engine.WaitFor] and package query's AtLeast too. When all its
// partitions have caught up, it is compared with that version ([Engine.Versions],
// [Engine.Compare]) and becomes the active one, by itself or, when it is
// [ViewDefinition.HeldBack], with [Engine.Activate], in one update: every snapshot shows
// the one or the other, and none shows less than was shown before. A version that has
// set more events aside than the active one is not activated by itself.
//
// The old version stays, and goes on as long as a program has its definition, so
// that going back is one call of [Engine.Activate]. When nodes are replaced one after
// the other, the old ones run and read version 1, and the new ones version 2.
//
// Tables of an SQL projection are the program's own: a version names other tables,
// and [Activate] has the statements that switch between them.
//
// # When a handler fails
//
// Nothing of its batch remains. What precedes the event is done without it;
// the event is tried again, alone, with growing pauses, and after
// [Options.Attempts] goes to the dead letters with all later events of the same
// keys, in order, while the others go on. For a view these are the keys of the rows
// that it touches, whatever streams their events come from; for an SQL projection it
// is the stream; ParkedBy names another one. So replaying them gives the rows that
// there would be had nothing failed. An event whose stored bytes cannot
// be decoded goes there at once, and so does one whose handler says that trying
// again is no use ([Permanent]). [Engine.ReplayDeadLetters] tries them again
// after the cause was removed; [Engine.SkipDeadLetter] gives one up, with a note.
//
// A failing database is not the event's fault, also within a handler
// ([ErrUnavailable]): it is tried again until it answers.
//
// Each failure that lasts is logged as an error, with the event. What to raise an
// alarm on is the gauge deed.projection.dead_letters.waiting: it counts the later
// events that are set aside with a failed one, too, and does not fall until they
// are replayed or skipped. In the words of Prometheus, which names it with '_':
//
//	delta(deed_projection_dead_letters_waiting[10m]) > 0
//
// # Several processes on one database
//
// Start the same program as often as you like: an application divides its
// projections among the processes that share its state, evenly, to those that have
// the definitions, and moves them when processes come and go. The owner of a
// projection has its lease; the others stand by ([PhaseStandby]). Who stops hands
// over at once; who died is found out when the lease ends, on PostgreSQL after ten
// seconds. [ViewDefinition.Partitioned] divides one projection into parts that are
// run at the same time, in one process or in several.
//
// Whoever stands by follows the checkpoint that the owner stores beside the rows,
// so [Engine.WaitFor], [Engine.Status] and queries that ask for a position work there
// as well. An owner that was paused for so long that another one has its lease cannot
// commit any more ([ErrFenced]): it drops what it knows and stands by. Rebuilding,
// replaying, skipping and pausing are done by the owner: elsewhere [Engine] writes a
// request into the state, which the owner finds within about a second and answers. So
// does [Admin], for tools that do not have the definitions; the deed command is one.
//
// # State
//
// [State] is what a backend keeps for all this; see its comments to write one.
package projection
