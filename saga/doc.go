// Package saga runs plain sequential functions durably: every effect is a
// named step, and when the process dies the function carries on where it was.
//
// It may import eventstore, aggregate, command, projection (its state
// contract) and internal packages.
//
// # A tour
//
// A saga is a function, and [Define] gives it a name:
//
//	var checkout = saga.Define("checkout", func(s *saga.Run, in PlaceOrder) (Receipt, error) {
//		if err := saga.Execute(s, "reserve", stocks, Reserve{in.SKU, in.ID}); err != nil {
//			return Receipt{}, err
//		}
//		s.OnRollback("release", func(s *saga.Run) error {
//			return saga.Execute(s, "release", stocks, Release{in.SKU, in.ID})
//		})
//		s.OnRollback("refund", …) // before: a charge whose answer is lost may have happened
//		charge, err := saga.Do(s, "charge", func(ctx saga.Step) (Charge, error) {
//			return gateway.Charge(ctx, in.Card, in.Total, ctx.IdempotencyKey())
//		}, saga.Retry(10), saga.Within(time.Minute))
//		if err != nil {
//			return Receipt{}, err // what was done is compensated
//		}
//		_, err = saga.Await[Shipped](s, saga.Where(in.ID), 14*24*time.Hour)
//		return Receipt{charge.ID}, err
//	}, saga.On(func(e OrderPlaced, r eventstore.Recorded) (string, PlaceOrder) {
//		return r.Stream.ID, PlaceOrder{…}
//	}))
//
// It starts on an event ([On]) or by a call ([Start]), once for each id.
//
// # Steps
//
// What a step does, and how often, is said by the function that is called:
//
//   - [Do] calls the world outside at least once, with an idempotency key that
//     never changes, until it succeeds. Its result is recorded, and it never runs
//     again.
//   - [Once] is for what must not be repeated: at most once. When it was cut off
//     the code gets [ErrOutcomeUnknown], and decides.
//   - [Tx] writes to the state's database exactly once, in one transaction with
//     the fact that it did.
//   - [Execute] executes a command; its effect happens exactly once.
//   - [Local] keeps a value that could come out otherwise next time.
//
// A step is tried again until it succeeds, unless told otherwise: [Retry] and
// [Overall] bound the attempts, [Within] the time of one, [Backoff] sets the
// pauses, [Terminal] and [NotAfter] end them. [AtMost] and [Rate] bound how many
// run at the same time, or in a period, of all steps that name the same key. A
// long attempt says with [Step.Heartbeat] how far it has come, the next one goes
// on from there ([Step.Progress]), and [Silence] ends one that says nothing.
//
// # Waiting
//
// A run that waits costs no goroutine: it is put aside, and survives the process.
//
//   - [Run.Sleep] and [Run.Until] wait for a time.
//   - [Await] waits for an event of the domain, or for a timeout.
//   - [Signal.Wait] waits for what somebody tells this one run, with
//     [Signal.Send]; it is kept until the run asks for it.
//   - [Child] runs another saga and waits for its result; [StartChild] does not
//     wait.
//   - [All] does several of these things side by side, [Race] until the first one
//     has ended, and [Deadline] ends what takes too long.
//
// # Ends, and undoing
//
// [Run.OnRollback] registers what undoes a step. When the function returns an
// error the compensations run in reverse, each until it succeeds; [Run.Settled]
// ends that duty for all that came before. [Engine.Cancel] asks a run to end: its
// waits and steps return an error, and so it compensates, unless the code goes on
// with [Run.Detached]. [Engine.Terminate] ends it where it is.
//
// A run that goes on for ever returns [Run.Continue] now and then: it begins
// anew, with the input that it gives itself. [Run.Version] marks a change of the
// code, so that runs under way finish as they began; [Engine.Versions] says when
// nobody needs the old branch any more.
//
// # Looking, and helping
//
// [Run.Publish] makes known how far a run is, for [View] and [Engine.List].
// [Engine.Timeline] tells everything that its history does, step by step, and
// [Engine.Export] writes it to a file, for a test to replay. When a run cannot go
// on by itself, [Engine.RetryNow], [Engine.Skip], [Engine.Restart] and
// [Engine.Resume] help it.
//
// # Other forms
//
// [Cron] starts runs at certain times, and [Manage] makes a process manager: a
// state, and a function for each kind of event.
//
// The smallest saga is a reaction, one function for each event of a type:
//
//	var welcome = saga.React("welcome", func(ctx saga.Step, e OrderPlaced) error {
//		return mail.Send(ctx, letter(e), ctx.IdempotencyKey())
//	})
//
// It is durable, tried again with growing pauses, in order for each stream,
// and an event that cannot be handled goes to the dead letters
// ([Engine.DeadLetters]) while the others go on. With [Send] it executes
// commands to other aggregates.
//
// An [Engine] runs them all; an application of package deed has one.
//
// # How it works, and what follows from it
//
// A run is an ordinary stream, category "saga.<name>", whose events say what
// happened: started, timer_set, step_succeeded, and so on. To go on, the
// function is called again and gets the recorded results of its steps until it
// comes to what is new. Steps are matched by kind, name, occurrence and order.
// Every append demands the stream's expected revision: there is one history,
// whoever writes it.
//
// So the function must ask for the same steps again. The command deedvet finds
// what would not be the same, such as time.Now, before it runs: see package
// sagavet. When the function does not, after a deployment that renamed, removed,
// added or moved a step, the run is blocked: it says so in its history and in
// [Engine.List] ("step 4: history has do "reserve", code asks do "charge""),
// nothing is compensated, and nothing is lost. It goes on when the code fits
// again: at the next start of the engine, or with [Engine.Resume].
// [Definition.Replay] checks histories beforehand.
// Where old and new code cannot fit the same runs, [Definition.Build] pins runs to
// the code that they began with, and both are there until the old ones have ended.
//
// What is put aside to wait is ended with runtime.Goexit: deferred functions
// run, and saga calls in them do nothing but return [ErrUnwinding].
//
// History events are written together, as late as is safe: a result before the
// next effect, everything before the run is put aside. An [Execute] whose
// record was lost with the process is executed again under the same
// idempotency key, with no second effect.
//
// Errors of steps are recorded, and reach the code as a [*StepError], the
// first time as at every replay; see there what of the original survives.
//
// # Workers
//
// Each saga, or build of it, has one worker, which follows the log from a checkpoint and keeps
// an index of the open runs: what they wait for and until when. The index is
// the fold of the log up to the checkpoint; both are stored in one
// transaction, at intervals, and made again from the log when they are lost.
//
// A run that waits, or is blocked, leaves memory as soon as its entry in the
// index is stored; what it waits for is stored beside it, by due time and by
// event, and brings it back: the event, a signal, or its time, for which the
// owner looks a minute ahead. So memory does not grow with the number of runs
// that wait, but for one MB when any waits for events. It does with those at
// work, with those that wait for a place at a limit ([AtMost], [Rate]), and with
// as many histories as [Options].CachedRuns allows. One event that very many runs
// wait for brings all of them back at once.
//
// A lease makes sure that one engine at a time is at it, of all those that have
// the saga, in this and in other processes; the others stand by, and one of them
// takes over when that one stops or is gone. An engine that lost the lease, say
// because its process was paused, drops the index, ends the contexts of the steps
// under way with a cause that wraps projection.ErrFenced, and stands by. What such
// a step has done is recorded only if nobody else has gone on with the run
// meanwhile; otherwise the record that came first counts.
//
// While the database cannot be reached everything waits, and nothing counts as a
// failed attempt but steps that notice it themselves.
//
// A new saga or reaction on a log that holds events for it must be told
// whether they count: FromStart or FromNow on its definition.
//
// When a worker is stopped, steps under way may end by themselves
// ([Options].Grace), then their context is cancelled; what did not end is
// not recorded and runs again later.
//
// # Further
//
// Package sagatest tests sagas, with time under the test's control, and with a
// crash around everything that they write. The program examples/checkout is there
// to copy from, and docs/coming-from.md says what is what for those who know
// Temporal, Restate, DBOS, Orleans or Dapr.
package saga
