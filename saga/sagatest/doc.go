// Package sagatest tests sagas and reactions in the words of the domain, on
// the real engine: given what happened, when something happens or time goes
// by, then the run has done this.
//
// It may import saga, aggregate, command, eventstore, eventstore/memory,
// projection and internal packages; only tests import it.
//
//	sagatest.For(t, checkout).
//		Given("stock", "book", Stocked{1}).
//		When("order", "o1", Placed{"book"}).
//		Advance(14*24*time.Hour).
//		Failed("o1", saga.ErrTimeout).
//		Happened("stock", "book", Reserved{"o1"}, Released{"o1"})
//
// The store is in memory and the clock moves only when told, so sixty days
// take no time. The engine may be stopped and started anywhere by
// [Spec.Restart], and [CrashEverywhere] runs a whole story again for every
// append that the engine makes, kills it there, and compares the end.
package sagatest
