package aggregate_test

import (
	"context"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
)

// meters adds up what is counted, by the name of the counter.
type meters struct {
	noop.MeterProvider
	mu     sync.Mutex
	counts map[string]int64
}

type meter struct {
	noop.Meter
	all *meters
}

type counter struct {
	noop.Int64Counter
	all  *meters
	name string
}

func (m *meters) Meter(string, ...metric.MeterOption) metric.Meter { return meter{all: m} }

func (m meter) Int64Counter(name string, _ ...metric.Int64CounterOption) (metric.Int64Counter, error) {
	return counter{all: m.all, name: name}, nil
}

func (c counter) Add(_ context.Context, n int64, _ ...metric.AddOption) {
	c.all.mu.Lock()
	defer c.all.mu.Unlock()
	c.all.counts[c.name] += n
}

func TestRuntime_Counts(t *testing.T) {
	t.Parallel()
	m := &meters{counts: map[string]int64{}}
	gated(t, aggregate.Options{MeterProvider: m}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		for range 3 {
			start(t, r, on("ann", deposit(1)))
		}
		g.foreign(t, 1)
		g.pass()
		require.Equal(t, map[string]int64{"deed.aggregate.conflicts": 1, "deed.aggregate.repeats": 3}, m.counts)
		start(t, r, on("ann", deposit(1)))
		g.next(t).fail(eventstore.ErrOutcomeUnknown)
		g.pass()
		require.Equal(t, int64(1), m.counts["deed.aggregate.unknown_outcomes"])
	})
}
