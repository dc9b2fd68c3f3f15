// Package deed wires an event-sourced application together: the store, the
// aggregates that commands decide on, the projections that queries read, and
// the sagas that run beside them.
//
// It may import every package of deed but the backends, of which the program
// chooses one.
//
// # A tour
//
// A program defines its parts as values, without registries, and starts them
// on a store:
//
//	app, err := deed.Start(ctx, sqlite.File("bank.db"), accounts, balances)
//	if err != nil { … }
//	defer app.Stop(context.Background())
//
// [Start] opens the store, checks every definition (all mistakes are returned
// at once, before anything is written) and runs the background work. Commands
// go in through [Execute], which returns when the events are durable; read
// models come out through package query, which can wait for the receipt's
// position:
//
//	receipt, err := deed.Execute(ctx, app, accounts, Deposit{"ann", 500})
//	account, err := query.Get(ctx, app, balances, "ann", query.AtLeast(receipt))
//
// [App.Stop] refuses new commands, lets what is in flight finish, stops the
// background work and closes the store. Killing the process instead loses
// nothing that was acknowledged: everything resumes from the store.
//
// # Time
//
// Events and timers see one clock. It is the system's, or, with [ManualClock],
// one that moves only by [App.AdvanceTo], which fires every timer on the way
// in order: histories replay, and tests with sixty-day timers take
// milliseconds, on the engine that runs in production.
package deed
