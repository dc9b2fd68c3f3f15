// Package workload measures deed on a database: what appends, loads, replays,
// commands, projections, subscriptions and sagas cost there. It may import deed
// and the packages below it, but no backend: a store comes as an
// [eventstore.Opener].
//
// # How it measures
//
// The workers of a run do one operation after the other, each waiting for its
// outcome, so the load follows from how many workers there are. The first part
// of the run, the warm-up, does not count. An operation counts if it ends within
// the time that is measured; one that is still under way at the end is waited for,
// and does not count. Conflicts and errors are counted apart and are no
// operations.
//
// Latencies go into a histogram, one a worker, whose buckets are at most 1/64 of
// their value wide: recording one costs some nanoseconds and no memory, and the
// percentiles are exact to within 1 %.
//
// What is acknowledged is looked for afterwards: the streams that a run has
// written must have as many events as it was told, or the run has errors.
//
// # What it leaves behind
//
// Each run writes to streams of its own, so that it can be repeated on a
// database that holds anything. The categories begin with "bench_" and the only
// type of event is "bench.noted". Events cannot be removed: use a database that
// can be.
package workload
