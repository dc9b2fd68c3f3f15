// Package sqlite is the embedded default: the event store and the state of
// read models in one SQLite file, in pure Go.
//
// It may import eventstore, the state contract of projection, and internal
// packages.
//
//	app, err := deed.Start(ctx, sqlite.File("shop.db"), …)
//
// or, without an application:
//
//	store, err := sqlite.Open(ctx, "shop.db")
//	defer store.Close()
//
// # Durability
//
// An append returns when its events are synced to the disk (write-ahead log,
// synchronous=FULL), so it survives kill -9 and power loss, whole or not at
// all, on a disk that keeps what it says it has synced. Appends that arrive
// while others are being written share one transaction and one sync.
//
// Updates of the state are atomic and keep their order, but are not synced one
// by one: they lie in the same log behind the events they were made from and
// become durable with the next append. After a power loss the state may be a
// little behind the events, never ahead of them, and catches up.
//
// # Order
//
// One goroutine writes. Positions begin at 1 and have no gaps; they are given
// in commit order, so that readers and subscribers never see an event before
// an earlier one. Commits are written in the order in which they were handed
// over. Appends go first: updates of the state run between batches, and while
// one runs, appends wait, so a handler that takes a second delays them by a
// second.
//
// Inline projections (see package projection) are applied by that goroutine, each
// commit behind a savepoint: all appends wait for their handlers.
//
// # Limits
//
// Those of eventstore.DefaultLimits. Every query, condition and read option of
// the contract is supported. Idempotency keys are scoped to the whole log and
// kept as long as the log.
//
// # The file
//
// One process at a time may have the file open: a second one gets
// eventstore.ErrInUse at once, by a lock on FILE.lock, which is left behind
// and harmless. The file must have one name: hard links are refused on Unix, and
// would go unnoticed on Windows. FILE-wal and FILE-shm belong to the file while it is open: to
// copy it, close the store first, or use SQLite's backup. Other programs may
// read the file at any time (the view deed_history is made for people), and
// must not write to it. Keep it off network file systems.
//
// Projections make their own tables in the same file with plain SQL; names
// that begin with deed_ are taken, and nothing can be temporary. A statement
// that rolls back more than itself (OR ROLLBACK, RAISE(ROLLBACK)) fails its
// update whatever the function makes of the error, and with it updates that
// happened to share the transaction, which are to be tried again.
package sqlite
