package saga

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/deed-go/deed/projection"
)

const scope = "github.com/deed-go/deed/saga"

// telemetry is what the engine tells OpenTelemetry. An instrument that cannot
// be made measures nothing; the API still returns one.
type telemetry struct {
	tracer   trace.Tracer
	meter    metric.Meter
	started  metric.Int64Counter
	ended    metric.Int64Counter
	blocked  metric.Int64Counter
	attempts metric.Int64Counter
	took     metric.Float64Histogram
	hits     metric.Int64Counter
	fenced   metric.Int64Counter
	long     metric.Int64Counter
	late     metric.Float64ObservableGauge
	active   metric.Int64ObservableGauge
}

func newTelemetry(o *Options) *telemetry {
	t := &telemetry{tracer: o.TracerProvider.Tracer(scope), meter: o.MeterProvider.Meter(scope)}
	t.started, _ = t.meter.Int64Counter("deed.saga.started", metric.WithDescription("runs that have begun"))
	t.ended, _ = t.meter.Int64Counter("deed.saga.ended", metric.WithDescription("runs that have ended, by status"))
	t.blocked, _ = t.meter.Int64Counter("deed.saga.blocked", metric.WithDescription("runs that were blocked"))
	t.attempts, _ = t.meter.Int64Counter("deed.saga.attempts", metric.WithDescription("attempts of steps and reactions, by outcome"))
	t.took, _ = t.meter.Float64Histogram("deed.saga.attempt.time", metric.WithUnit("s"), metric.WithDescription("how long an attempt took"))
	t.hits, _ = t.meter.Int64Counter("deed.saga.activations", metric.WithDescription("runs that went on, by whether their history was in memory"))
	t.fenced, _ = t.meter.Int64Counter("deed.saga.fenced", metric.WithDescription("leases lost to another owner"))
	t.long, _ = t.meter.Int64Counter("deed.saga.long_histories", metric.WithDescription("runs whose history has become long: let them continue anew"))
	t.late, _ = t.meter.Float64ObservableGauge("deed.saga.late", metric.WithUnit("s"), metric.WithDescription("for how long the oldest instant that is due has been"))
	t.active, _ = t.meter.Int64ObservableGauge("deed.saga.active", metric.WithDescription("runs at work now"))
	return t
}

// observe reports how the runner is doing whenever metrics are collected, until
// the returned function is called.
func (t *telemetry) observe(w *runner) (stop func()) {
	attributes := metric.WithAttributes(attribute.String("deed.worker", w.name))
	registration, err := t.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		w.mu.Lock()
		at, some := w.behaviour.due()
		active := w.active
		w.mu.Unlock()
		late := 0.0
		if now := w.env.clock.Now(); some && now.After(at) {
			late = now.Sub(at).Seconds()
		}
		o.ObserveFloat64(t.late, late, attributes)
		o.ObserveInt64(t.active, int64(active), attributes)
		return nil
	}, t.late, t.active)
	if err != nil {
		return func() {}
	}
	return func() { _ = registration.Unregister() }
}

// span covers and measures one attempt. It is a root, linked to where the run
// began: a run of weeks must not be a span of weeks. A replay makes none.
func (t *telemetry) span(ctx context.Context, process, id, step, kind string, n int, parent string) (context.Context, func(error)) {
	options := []trace.SpanStartOption{
		trace.WithNewRoot(), trace.WithAttributes(
			attribute.String("deed.saga", process), attribute.String("deed.saga.id", id), attribute.String("deed.saga.step", step), attribute.Int("deed.attempt", n),
		),
	}
	if link := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{"traceparent": parent})); link.IsValid() {
		options = append(options, trace.WithLinks(trace.Link{SpanContext: link}))
	}
	ctx, span := t.tracer.Start(ctx, kind+" "+process+" "+step, options...)
	began := time.Now()
	return ctx, func(err error) {
		outcome := "succeeded"
		switch {
		case err == nil:
		case errors.Is(err, context.Canceled) || errors.Is(context.Cause(ctx), projection.ErrFenced):
			outcome = "cut off"
		case errors.Is(err, ErrTimeout):
			outcome = "timed out"
		default:
			outcome = "failed"
		}
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
		attributes := metric.WithAttributes(attribute.String("deed.saga", process), attribute.String("deed.saga.step", step), attribute.String("deed.outcome", outcome))
		t.attempts.Add(ctx, 1, attributes)
		t.took.Record(ctx, time.Since(began).Seconds(), attributes)
	}
}

func traceParent(ctx context.Context) string {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier["traceparent"]
}

func (t *telemetry) count(counter metric.Int64Counter, process string, more ...attribute.KeyValue) {
	counter.Add(context.Background(), 1, metric.WithAttributes(append(more, attribute.String("deed.saga", process))...))
}
