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
//   - [Do] runs a function at least once, with an idempotency key that never
//     changes, until it succeeds; its result is recorded and it never runs again.
//   - [Execute] executes a command; the effect happens exactly once.
//   - [Run.Sleep] and [Run.Until] wait for a time, [Await] for an event or a
//     timeout. A run that waits costs no goroutine: it is put aside, and survives
//     the process.
//   - [Run.OnRollback] registers what undoes a step. When the function returns an
//     error the compensations run in reverse; [Run.Settled] ends that duty for
//     all that came before.
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
// commands, and is a process manager.
//
// An [Engine] runs them; an application of package deed has one.
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
// So the function must ask for the same steps again. When it does not, after a
// deployment that renamed, removed, added or moved a step, the run is blocked:
// it says so in its history and in [Engine.List] ("step 4: history has do
// "reserve", code asks do "charge""), nothing is compensated, and nothing is
// lost. It goes on when the code fits again: at the next start of the engine,
// or with [Engine.Resume]. [Definition.Replay] checks histories beforehand.
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
// Each saga has one worker, which follows the log from a checkpoint and keeps
// an index of the open runs: what they wait for and until when. The index is
// the fold of the log up to the checkpoint; both are stored in one
// transaction, at intervals, and made again from the log when they are lost.
// Memory grows with the number of open runs, by a few hundred bytes each.
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
package saga
