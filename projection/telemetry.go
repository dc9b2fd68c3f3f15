package projection

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

const scope = "github.com/deed-go/deed/projection"

// telemetry is what the engine tells OpenTelemetry. An instrument that cannot
// be made measures nothing; the API still returns one.
type telemetry struct {
	tracer      trace.Tracer
	meter       metric.Meter
	events      metric.Int64Counter
	retries     metric.Int64Counter
	deadLetters metric.Int64Counter
	fenced      metric.Int64Counter
	acquired    metric.Int64Counter
	moved       metric.Int64Counter
	batchEvents metric.Int64Histogram
	batchTime   metric.Float64Histogram
	waiting     metric.Int64ObservableGauge
	lagEvents   metric.Int64ObservableGauge
	lag         metric.Float64ObservableGauge
}

func newTelemetry(o *Options) *telemetry {
	t := &telemetry{tracer: o.TracerProvider.Tracer(scope), meter: o.MeterProvider.Meter(scope)}
	t.events, _ = t.meter.Int64Counter("deed.projection.events", metric.WithDescription("events folded"))
	t.retries, _ = t.meter.Int64Counter("deed.projection.retries", metric.WithDescription("pauses before another attempt"))
	t.deadLetters, _ = t.meter.Int64Counter("deed.projection.dead_letters", metric.WithDescription("events that failed for good"))
	t.fenced, _ = t.meter.Int64Counter("deed.projection.fenced", metric.WithDescription("leases lost to another owner"))
	t.acquired, _ = t.meter.Int64Counter("deed.projection.acquired", metric.WithDescription("leases acquired"))
	t.moved, _ = t.meter.Int64Counter("deed.projection.handed_over", metric.WithDescription("leases given up because the work is another node's"))
	t.batchEvents, _ = t.meter.Int64Histogram("deed.projection.batch.events", metric.WithDescription("new events folded at once"),
		metric.WithExplicitBucketBoundaries(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000))
	t.batchTime, _ = t.meter.Float64Histogram("deed.projection.batch.time", metric.WithUnit("s"), metric.WithDescription("how long that took, commit included"))
	t.waiting, _ = t.meter.Int64ObservableGauge("deed.projection.dead_letters.waiting", metric.WithDescription("events that are set aside now"))
	t.lagEvents, _ = t.meter.Int64ObservableGauge("deed.projection.lag.events", metric.WithDescription("events not yet considered"))
	t.lag, _ = t.meter.Float64ObservableGauge("deed.projection.lag", metric.WithUnit("s"), metric.WithDescription("age of the oldest event not yet considered"))
	return t
}

// observeLag reports the runner's lag whenever metrics are collected, until
// the returned function is called.
func (t *telemetry) observeLag(r *runner) (stop func()) {
	registration, err := t.meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		head, err := r.engine.store.Head(ctx)
		if err != nil {
			return err
		}
		s, err := r.status(ctx, head)
		if err != nil {
			return err
		}
		o.ObserveInt64(t.lagEvents, int64(s.LagEvents), r.attributes)
		o.ObserveFloat64(t.lag, s.Lag.Seconds(), r.attributes)
		o.ObserveInt64(t.waiting, int64(s.DeadLetters), r.attributes)
		return nil
	}, t.lagEvents, t.lag, t.waiting)
	if err != nil {
		return func() {}
	}
	return func() { _ = registration.Unregister() }
}

func nameAttribute(unit string) attribute.KeyValue {
	return attribute.String("deed.projection", unit)
}

// span covers and measures one batch of new events. What is folded while
// catching up, on a restart or a rebuild, happened before: it makes no spans.
func (r *runner) span(ctx context.Context, events int) (context.Context, func(error)) {
	if !r.live {
		return ctx, func(error) {}
	}
	ctx, span := r.engine.telemetry.tracer.Start(ctx, "projection "+r.unit,
		trace.WithNewRoot(), trace.WithAttributes(nameAttribute(r.unit), attribute.Int("deed.events", events)))
	began := time.Now()
	return ctx, func(err error) {
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, err.Error())
		} else {
			r.engine.telemetry.batchEvents.Record(ctx, int64(events), r.attributes)
			r.engine.telemetry.batchTime.Record(ctx, time.Since(began).Seconds(), r.attributes)
		}
		span.End()
	}
}
