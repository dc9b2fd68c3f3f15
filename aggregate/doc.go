// Package aggregate turns a state struct and one small function per event into
// an aggregate that is loaded, cached, decided upon and written without losing
// or reordering anything.
//
// It may import eventstore and internal packages.
//
// # A tour
//
// An event is a struct with a name that is written down. The state is a struct
// with what decisions need to know, always rebuilt from events:
//
//	type Opened struct{ Owner string }
//
//	func (Opened) EventType() string { return "account.opened" }
//
//	type Account struct{ Owner string; Cents int64 }
//
//	var accounts = aggregate.Define("account",
//		aggregate.On(func(a *Account, e Opened) { a.Owner = e.Owner }),
//		aggregate.On(func(a *Account, e Deposited) { a.Cents += e.Cents }),
//	)
//
// [Define] keeps its mistakes (two events of one name, a name inherited by
// embedding, a state that cannot be snapshotted, …); [Definition.Err] tells all
// of them before anything is written.
//
// A [Runtime] runs definitions on a store. [Execute] makes one decision and
// returns when it is durable; package command is the usual way to call it.
// [Load] shows the durable state:
//
//	runtime := aggregate.NewRuntime(store, aggregate.Options{})
//	receipt, err := aggregate.Execute(ctx, runtime, accounts, aggregate.Request[Account]{
//		ID:     "ann",
//		Decide: func(a Account) ([]aggregate.Event, error) { return aggregate.Events(Deposited{500}), nil },
//	})
//	account, revision, err := aggregate.Load(ctx, runtime, accounts, "ann")
//	err = runtime.Stop(ctx)
//
// Decide must be pure: no clock, no I/O, no change to what the state refers to.
// The runtime keeps the state for the next call and may ask again; package
// aggregatetest checks it.
//
// # What the runtime does
//
// Aggregates are always there: asked for by id, activated when needed, kept in
// memory while there is room. Each decides one call at a time, in the order in
// which they came. The next call does not wait for the disk: it is decided on
// the state that includes what is still being written, and joins the next
// batch, so that one busy aggregate is about as fast as many. What makes that
// sound:
//
//   - a commit carries the version and the last event that it was decided on,
//     and loses if the stream is not exactly there;
//   - a refusal, a decision without events or a result is answered when
//     everything it was based on is durable, and decided again if that fails;
//   - after a conflict the state is loaded again and the calls are decided
//     again, in order; Decide may therefore run several times, and nothing is
//     written twice;
//   - when nobody knows whether a commit was written, the aggregate stands
//     still until it is known;
//   - calls with one idempotency key are one call;
//   - the state is folded from the events as they were stored.
//
// The rest is never assumed: other processes may run the same aggregate, and
// the conditions of the append decide.
//
// # Decisions across streams
//
// With [Request.Boundary] a decision is made on all events that match a query
// (a dynamic consistency boundary), and written only if no other one has
// matched meanwhile. Such decisions are not pipelined.
//
// # Snapshots
//
// [SnapshotEvery] bounds how many events a load reads. Snapshots are taken of
// durable state, written behind the calls' backs, and never trusted: whatever
// about one does not fit makes the load replay every event.
package aggregate
