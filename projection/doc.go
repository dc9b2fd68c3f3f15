// Package projection folds events into read models and keeps them up to date:
// it catches up with the log, follows it, and moves its checkpoint in the same
// transaction as the rows, so that what a read model shows is always exactly
// the fold of the log up to its checkpoint.
//
// It may import eventstore, and deed's internal clock and worker.
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
// [SQL] is for read models in tables of your own: handlers get the
// transaction, and one text serves every backend that has SQL.
//
// # Running them
//
// An application that is given the definitions does all of this: an [Engine]
// has a worker for each projection. The worker takes the projection's lease,
// reads its checkpoint, refuses a log that the checkpoint cannot belong to
// ([ErrWrongLog]), subscribes after it and folds what it handles. While it
// catches up it writes in large batches; live it writes at once. Events that do
// not concern the projection cost no write.
//
// [Engine.WaitFor] waits until a read model contains a position, which is how
// queries read their own writes. [Engine.Status] tells position, lag and the
// last error. [Engine.Rebuild] folds again from the beginning; [Engine.Verify]
// does so on the side and compares, and finds events that were applied twice or
// never even where rows do not show it.
//
// # When a handler fails
//
// Nothing of its batch remains. What precedes the event is done without it;
// the event is tried again, alone, with growing pauses, and after
// [Options.Attempts] goes to the dead letters with all later events of its
// stream, in order, while the others go on. An event whose stored bytes cannot
// be decoded goes there at once, and so does one whose handler says that trying
// again is no use ([Permanent]). [Engine.ReplayDeadLetters] tries them again
// after the cause was removed; [Engine.SkipDeadLetter] gives one up, with a note.
//
// A failing database is not the event's fault, also within a handler
// ([ErrUnavailable]): it is tried again until it answers.
//
// # Several processes on one database
//
// Each projection is run by one engine at a time, which has its lease; the
// others stand by ([PhaseStandby]) and one of them takes over when that one
// stops or is gone. Whoever stands by follows the checkpoint that the owner
// stores beside the rows, so [Engine.WaitFor], [Engine.Status] and queries that
// ask for a position work there as well. An owner that was paused for so long
// that another one has its lease cannot commit any more ([ErrFenced]): it drops
// what it knows and stands by. Rebuilding, replaying and skipping are done by
// the owner: elsewhere [Engine] writes a request into the state, which the owner
// finds within about a second and answers. So does [Admin], for tools that do not
// have the definitions; the deed command is one.
//
// # State
//
// [State] is what a backend keeps for all this; see its comments to write one.
package projection
