package postgres

import (
	"context"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Stats count what a store has done since it was opened. They are the same
// figures that the store reports as OpenTelemetry metrics (deed.postgres.…).
type Stats struct {
	// Batches were committed with so many Commits and Events, in these forms.
	Batches, Commits, Events   uint64
	Copies, Calls, DoubleTrips uint64
	// LockWait is how long batches have waited for the log's lock, by the server's
	// clock; LockHold is how long, at most, they have held it, commit and the way to the
	// server included.
	LockWait, LockHold time.Duration
	// Collisions are batches that were refused because something was there
	// already (23505) and judged again.
	Collisions uint64
	// Unblocked are sessions that were ended because they kept the lock while
	// their client was stopped.
	Unblocked uint64
	// Polls are looks at the log that nothing but time asked for.
	Polls uint64
}

// Stats returns the counts.
func (s *Store) Stats() Stats {
	m := s.meter
	return Stats{
		Batches: m.batches.Load(), Commits: m.commits.Load(), Events: m.events.Load(),
		Copies: m.forms[formCopy].Load(), Calls: m.forms[formFunction].Load(), DoubleTrips: m.forms[formTwoTrips].Load(),
		LockWait: time.Duration(m.wait.Load()), LockHold: time.Duration(m.hold.Load()),
		Collisions: m.collisions.Load(), Unblocked: m.unblocked.Load(), Polls: m.polls.Load(),
	}
}

type meter struct {
	batches, commits, events           atomic.Uint64
	forms                              [formTwoTrips + 1]atomic.Uint64
	wait, hold                         atomic.Int64
	collisions, unblocked, polls       atomic.Uint64
	waits, holds                       metric.Float64Histogram
	sizes                              metric.Int64Histogram
	collisionCounter, unblockedCounter metric.Int64Counter
	attributes                         [formTwoTrips + 1]metric.MeasurementOption
	schema                             metric.MeasurementOption
}

func newMeter(schema string) (*meter, error) {
	m := &meter{}
	from := otel.Meter("github.com/deed-go/deed/eventstore/postgres")
	var err error
	note := func(e error) {
		if err == nil {
			err = e
		}
	}
	seconds := metric.WithExplicitBucketBoundaries(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
	var e error
	m.waits, e = from.Float64Histogram("deed.postgres.lock.wait", metric.WithUnit("s"), metric.WithDescription("how long a batch of appends waited for the lock of the log"), seconds)
	note(e)
	m.holds, e = from.Float64Histogram("deed.postgres.lock.hold", metric.WithUnit("s"), metric.WithDescription("how long, at most, a batch of appends held the lock of the log, commit included"), seconds)
	note(e)
	m.sizes, e = from.Int64Histogram("deed.postgres.batch.events", metric.WithDescription("events written in one transaction"), metric.WithExplicitBucketBoundaries(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096))
	note(e)
	m.collisionCounter, e = from.Int64Counter("deed.postgres.collisions", metric.WithDescription("batches that were refused because something was there already, and judged again"))
	note(e)
	m.unblockedCounter, e = from.Int64Counter("deed.postgres.unblocked", metric.WithDescription("sessions that were ended because they kept the lock while their client was stopped"))
	note(e)
	name := attribute.String("schema", schema)
	m.schema = metric.WithAttributeSet(attribute.NewSet(name))
	for f := formCopy; f <= formTwoTrips; f++ {
		m.attributes[f] = metric.WithAttributeSet(attribute.NewSet(name, attribute.String("form", f.String())))
	}
	return m, err
}

func (m *meter) batch(l *landing, commits, events int) {
	ctx := context.Background()
	m.batches.Add(1)
	m.commits.Add(uint64(commits))
	m.events.Add(uint64(events))
	m.forms[l.form].Add(1)
	m.wait.Add(int64(l.wait))
	m.hold.Add(int64(l.hold))
	m.waits.Record(ctx, l.wait.Seconds(), m.attributes[l.form])
	m.holds.Record(ctx, l.hold.Seconds(), m.attributes[l.form])
	m.sizes.Record(ctx, int64(events), m.attributes[l.form])
}

func (m *meter) collided() {
	m.collisions.Add(1)
	m.collisionCounter.Add(context.Background(), 1, m.schema)
}

func (m *meter) ended(sessions int64) {
	if sessions > 0 {
		m.unblocked.Add(uint64(sessions))
		m.unblockedCounter.Add(context.Background(), sessions, m.schema)
	}
}
