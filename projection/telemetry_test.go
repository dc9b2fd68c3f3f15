package projection_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// observer records what is told to OpenTelemetry.
type observer struct {
	tracenoop.TracerProvider
	mu        sync.Mutex
	spans     []string
	counts    map[string]int64
	callbacks map[*registration]metric.Callback
}

type tracer struct {
	tracenoop.Tracer
	o *observer
}

func (o *observer) Tracer(string, ...trace.TracerOption) trace.Tracer { return tracer{o: o} }

func (t tracer) Start(ctx context.Context, name string, options ...trace.SpanStartOption) (context.Context, trace.Span) {
	t.o.mu.Lock()
	defer t.o.mu.Unlock()
	t.o.spans = append(t.o.spans, name)
	return t.Tracer.Start(ctx, name, options...)
}

type meters struct {
	metricnoop.MeterProvider
	o *observer
}

type meter struct {
	metricnoop.Meter
	o *observer
}

type counter struct {
	metricnoop.Int64Counter
	o    *observer
	name string
}

type gauge struct {
	metricnoop.Int64ObservableGauge
	name string
}

type floatGauge struct {
	metricnoop.Float64ObservableGauge
	name string
}

type registration struct {
	metricnoop.Registration
	o *observer
}

func (m meters) Meter(string, ...metric.MeterOption) metric.Meter { return meter{o: m.o} }

func (m meter) Int64Counter(name string, _ ...metric.Int64CounterOption) (metric.Int64Counter, error) {
	return counter{o: m.o, name: name}, nil
}

func (m meter) Int64ObservableGauge(name string, _ ...metric.Int64ObservableGaugeOption) (metric.Int64ObservableGauge, error) {
	return gauge{name: name}, nil
}

func (m meter) Float64ObservableGauge(name string, _ ...metric.Float64ObservableGaugeOption) (metric.Float64ObservableGauge, error) {
	return floatGauge{name: name}, nil
}

func (m meter) RegisterCallback(f metric.Callback, _ ...metric.Observable) (metric.Registration, error) {
	m.o.mu.Lock()
	defer m.o.mu.Unlock()
	r := &registration{o: m.o}
	m.o.callbacks[r] = f
	return r, nil
}

func (r *registration) Unregister() error {
	r.o.mu.Lock()
	defer r.o.mu.Unlock()
	delete(r.o.callbacks, r)
	return nil
}

func (c counter) Add(_ context.Context, n int64, _ ...metric.AddOption) {
	c.o.mu.Lock()
	defer c.o.mu.Unlock()
	c.o.counts[c.name] += n
}

// readings is what one collection of metrics sees.
type readings struct {
	metricnoop.Observer
	values map[string]float64
}

func (r readings) ObserveInt64(o metric.Int64Observable, v int64, _ ...metric.ObserveOption) {
	r.values[o.(gauge).name] = float64(v)
}

func (r readings) ObserveFloat64(o metric.Float64Observable, v float64, _ ...metric.ObserveOption) {
	r.values[o.(floatGauge).name] = v
}

func (o *observer) collect(t testing.TB) map[string]float64 {
	r := readings{values: map[string]float64{}}
	o.mu.Lock()
	callbacks := make([]metric.Callback, 0, len(o.callbacks))
	for _, f := range o.callbacks {
		callbacks = append(callbacks, f)
	}
	o.mu.Unlock()
	for _, f := range callbacks {
		require.NoError(t, f(t.Context(), r))
	}
	return r.values
}

// Invariant 8: catching up, restarting and rebuilding make no spans; new
// events do.
func TestInvariant8_ReplayMakesNoSpans(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		o := &observer{counts: map[string]int64{}, callbacks: map[*registration]metric.Callback{}}
		options := projection.Options{TracerProvider: o, MeterProvider: meters{o: o}, Attempts: 3, RetryAfter: time.Hour, RetryAtMost: time.Hour}
		f := newFragile()
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})
		r := start(t, store, store, options, f.view)
		defer r.stop()
		r.caughtUp(t, store, "balances")
		synctest.Wait()
		require.NoError(t, r.Rebuild(t.Context(), "balances"))
		synctest.Wait()
		require.Empty(t, o.spans)
		require.EqualValues(t, 4, o.counts["deed.projection.events"])

		put(t, store, account("ann"), deposited{5})
		r.caughtUp(t, store, "balances")
		require.Equal(t, []string{"projection balances"}, o.spans)
		require.Equal(t, map[string]float64{"deed.projection.lag.events": 0, "deed.projection.lag": 0, "deed.projection.dead_letters.waiting": 0}, o.collect(t))

		put(t, store, account("ann"), deposited{13}, deposited{1})
		time.Sleep(90 * time.Minute)
		require.Equal(t, map[string]float64{"deed.projection.lag.events": 2, "deed.projection.lag": 5400, "deed.projection.dead_letters.waiting": 0}, o.collect(t))
		require.NoError(t, r.WaitFor(t.Context(), "balances", 5))
		require.EqualValues(t, 2, o.counts["deed.projection.retries"])
		require.EqualValues(t, 1, o.counts["deed.projection.dead_letters"])
		require.NoError(t, r.stop())
		require.Empty(t, o.callbacks, "a stopped projection is no longer observed")
	})
}

// metrics are what OpenTelemetry's own reader sees, by name and projection;
// of a histogram the count.
func metrics(t testing.TB, reader sdkmetric.Reader) map[string]float64 {
	t.Helper()
	var all metricdata.ResourceMetrics
	require.NoError(t, reader.Collect(t.Context(), &all))
	found := map[string]float64{}
	note := func(name string, of attribute.Set, value float64) {
		projection, ok := of.Value("deed.projection")
		require.True(t, ok, name)
		found[name+" "+projection.AsString()] = value
	}
	for _, scope := range all.ScopeMetrics {
		for _, m := range scope.Metrics {
			require.NotEmpty(t, m.Description, m.Name)
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range data.DataPoints {
					note(m.Name, p.Attributes, float64(p.Value))
				}
			case metricdata.Gauge[int64]:
				for _, p := range data.DataPoints {
					note(m.Name, p.Attributes, float64(p.Value))
				}
			case metricdata.Gauge[float64]:
				for _, p := range data.DataPoints {
					note(m.Name, p.Attributes, p.Value)
				}
			case metricdata.Histogram[int64]:
				for _, p := range data.DataPoints {
					note(m.Name, p.Attributes, float64(p.Count))
				}
			case metricdata.Histogram[float64]:
				for _, p := range data.DataPoints {
					note(m.Name, p.Attributes, float64(p.Count))
				}
			default:
				t.Errorf("%s is a %T", m.Name, m.Data)
			}
		}
	}
	return found
}

// Lag, leases, fenced commits and dead letters as a metrics backend sees them.
func TestMetrics(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		reader, otherReader := sdkmetric.NewManualReader(), sdkmetric.NewManualReader()
		provide := func(r sdkmetric.Reader) metric.MeterProvider {
			return sdkmetric.NewMeterProvider(sdkmetric.WithReader(r))
		}
		f := newFragile()
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})
		one := start(t, store, store, projection.Options{Owner: "one", MeterProvider: provide(reader), RetryAfter: time.Hour, RetryAtMost: time.Hour, Attempts: 2}, f.view)
		one.caughtUp(t, store, "balances")
		synctest.Wait()
		require.Equal(t, map[string]float64{
			"deed.projection.acquired balances": 1, "deed.projection.events balances": 2,
			"deed.projection.lag balances": 0, "deed.projection.lag.events balances": 0, "deed.projection.dead_letters.waiting balances": 0,
		}, metrics(t, reader), "catching up is not measured, but counted")

		put(t, store, account("ann"), deposited{1})
		one.caughtUp(t, store, "balances")
		put(t, store, account("bob"), deposited{13}, deposited{2})
		time.Sleep(30 * time.Minute)
		got := metrics(t, reader)
		require.EqualValues(t, 1, got["deed.projection.batch.events balances"])
		require.EqualValues(t, 1, got["deed.projection.batch.time balances"])
		require.EqualValues(t, 2, got["deed.projection.lag.events balances"])
		require.EqualValues(t, 1800, got["deed.projection.lag balances"])
		require.EqualValues(t, 1, got["deed.projection.retries balances"])
		require.NoError(t, one.WaitFor(t.Context(), "balances", 5))
		got = metrics(t, reader)
		require.EqualValues(t, 1, got["deed.projection.dead_letters balances"])
		require.EqualValues(t, 2, got["deed.projection.dead_letters.waiting balances"])
		require.Zero(t, got["deed.projection.lag.events balances"])

		// Another engine of the same name takes the lease away.
		two := start(t, store, store, projection.Options{Owner: "one", MeterProvider: provide(otherReader)}, f.view)
		ready(t, two)
		put(t, store, account("ann"), deposited{1})
		two.caughtUp(t, store, "balances")
		time.Sleep(time.Minute)
		require.EqualValues(t, 1, metrics(t, reader)["deed.projection.fenced balances"])
		require.EqualValues(t, 1, metrics(t, otherReader)["deed.projection.acquired balances"])
		require.NoError(t, one.stop())
		require.NoError(t, two.stop())
		require.NotContains(t, metrics(t, otherReader), "deed.projection.lag balances", "a stopped projection is no longer observed")
	})
}

// Invariant 8: while a version is built, and while one is built again, the one that
// is read stays as it is, and so does the log: there are no spans, no batches
// measured and no events for anybody to react to. How far it is, is its own.
func TestInvariant8_BuildingAVersionIsSilent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		reader := sdkmetric.NewManualReader()
		spans := &observer{counts: map[string]int64{}, callbacks: map[*registration]metric.Callback{}}
		gate := make(chan struct{})
		view := balances()
		next := projection.View("balances", projection.On(func(b *balance, e deposited) {
			<-gate
			b.Cents += 2 * e.Cents
		})).Version(2)
		for n := range 50 {
			put(t, store, account("ann"), deposited{int64(n)})
		}
		time.Sleep(time.Hour)
		head, err := store.Head(t.Context())
		require.NoError(t, err)
		r := start(t, store, store, projection.Options{
			BatchEvents: 10, BatchTime: 1, TracerProvider: spans, MeterProvider: sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)),
		}, view, next)
		defer r.stop()
		r.caughtUp(t, store, "balances")
		first := rows(t, store, view)

		for range 15 {
			gate <- struct{}{} // some of its batches, each of a few events
		}
		synctest.Wait()
		got := metrics(t, reader)
		require.Zero(t, got["deed.projection.lag balances"])
		require.Zero(t, got["deed.projection.lag.events balances"])
		left := got["deed.projection.lag.events balances/v2"]
		require.Greater(t, left, 0.0)
		require.Less(t, left, 50.0)
		status, err := r.Status(t.Context())
		require.NoError(t, err)
		require.True(t, status[0].Active)
		require.EqualValues(t, 0, status[0].LagEvents)
		require.False(t, status[1].Active)
		require.Equal(t, projection.PhaseCatchingUp, status[1].Phase)
		require.EqualValues(t, left, status[1].LagEvents)
		require.Equal(t, first, rows(t, store, view), "what is read does not move")

		silent := func() {
			t.Helper()
			time.Sleep(time.Second) // on the bubble's clock: it knows by then that it has caught up
			synctest.Wait()
			status, err := r.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, projection.PhaseLive, status[1].Phase)
			got := metrics(t, reader)
			for _, name := range []string{"balances", "balances/v2"} {
				require.NotContains(t, got, "deed.projection.batch.events "+name)
				require.NotContains(t, got, "deed.projection.batch.time "+name)
				require.NotContains(t, got, "deed.projection.dead_letters "+name)
				require.Zero(t, got["deed.projection.lag "+name])
			}
			require.Empty(t, spans.spans)
			now, err := store.Head(t.Context())
			require.NoError(t, err)
			require.Equal(t, head, now, "nothing is appended that could be reacted to")
		}
		close(gate)
		r.caughtUp(t, store, "balances/v2")
		silent()
		require.NoError(t, r.Rebuild(t.Context(), "balances/v2"))
		r.caughtUp(t, store, "balances/v2")
		silent()

		put(t, store, account("ann"), deposited{1})
		r.caughtUp(t, store, "balances")
		r.caughtUp(t, store, "balances/v2")
		synctest.Wait() // a batch is measured when it is committed
		require.ElementsMatch(t, []string{"projection balances", "projection balances/v2"}, spans.spans)
		require.EqualValues(t, 1, metrics(t, reader)["deed.projection.batch.events balances/v2"])
	})
}
