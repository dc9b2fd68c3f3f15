package saga_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/saga"
)

// spans records what is begun.
type spans struct {
	tracenoop.TracerProvider
	mu    sync.Mutex
	names []string
	links []trace.TraceID
}

type spanTracer struct {
	tracenoop.Tracer
	s *spans
}

func (s *spans) Tracer(string, ...trace.TracerOption) trace.Tracer { return spanTracer{s: s} }

func (t spanTracer) Start(ctx context.Context, name string, options ...trace.SpanStartOption) (context.Context, trace.Span) {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	t.s.names = append(t.s.names, name)
	config := trace.NewSpanStartConfig(options...)
	for _, link := range config.Links() {
		t.s.links = append(t.s.links, link.SpanContext.TraceID())
	}
	return t.Tracer.Start(ctx, name, options...)
}

// TestTelemetry_AttemptsOnce: each attempt makes a span that is linked to where
// the run was started, and is counted; going on from the history makes none.
func TestTelemetry_AttemptsOnce(t *testing.T) {
	t.Parallel()
	def := saga.Define("told", func(s *saga.Run, _ struct{}) (int, error) {
		if _, err := saga.Do(s, "first", func(step saga.Step) (int, error) {
			if step.Attempt() == 1 {
				return 0, errors.New("not yet")
			}
			return 0, nil
		}); err != nil {
			return 0, err
		}
		if err := s.Sleep("pause", time.Hour); err != nil {
			return 0, err
		}
		return saga.Once(s, "second", func(saga.Step) (int, error) { return 0, errDeclined })
	})
	recorded := &spans{}
	reader := sdkmetric.NewManualReader()
	o := saga.Options{TracerProvider: recorded, MeterProvider: sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))}
	b := startBench(t, memory.New(), clock.NewManual(t0), o, def)
	origin := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{7}, SpanID: trace.SpanID{8}})
	require.NoError(t, saga.Start(trace.ContextWithSpanContext(t.Context(), origin), b.engine, def, "r", struct{}{}))
	b.advance(time.Minute)
	b.stop()
	b = startBench(t, b.store, b.clock, o, def) // it goes on from its history
	b.advance(2 * time.Hour)
	_, err := saga.Wait(t.Context(), b.engine, def, "r")
	require.ErrorIs(t, err, errDeclined)
	require.Equal(t, []string{"saga told first", "saga told first", "saga told second"}, recorded.names)
	require.Equal(t, []trace.TraceID{{7}, {7}, {7}}, recorded.links)

	var collected metricdata.ResourceMetrics
	require.NoError(t, reader.Collect(t.Context(), &collected))
	sums := map[string]int64{}
	gauges := map[string]int{}
	for _, m := range collected.ScopeMetrics[0].Metrics {
		switch data := m.Data.(type) {
		case metricdata.Sum[int64]:
			for _, point := range data.DataPoints {
				outcome, _ := point.Attributes.Value("deed.outcome")
				status, _ := point.Attributes.Value("deed.status")
				sums[m.Name+" "+outcome.AsString()+status.AsString()] += point.Value
			}
		case metricdata.Gauge[float64]:
			gauges[m.Name] = len(data.DataPoints)
		}
	}
	require.EqualValues(t, 1, sums["deed.saga.started "])
	require.EqualValues(t, 1, sums["deed.saga.ended failed"])
	require.EqualValues(t, 1, sums["deed.saga.attempts succeeded"])
	require.EqualValues(t, 2, sums["deed.saga.attempts failed"])
	require.Equal(t, 1, gauges["deed.saga.late"])
}

// TestTelemetry_LongHistory: a history that has become long is warned of, once, and
// counted; there is no limit to it.
func TestTelemetry_LongHistory(t *testing.T) {
	t.Parallel()
	const result = 1 << 19
	def := saga.Define("long", func(s *saga.Run, n int) (int, error) {
		for i := range n {
			if _, err := saga.Do(s, fmt.Sprint("copy ", i), func(saga.Step) (string, error) { return strings.Repeat("a", result), nil }); err != nil {
				return 0, err
			}
		}
		for _, pause := range []string{"nap", "rest"} {
			if err := s.Sleep(pause, time.Minute); err != nil {
				return 0, err
			}
		}
		return n, nil
	})
	reader := sdkmetric.NewManualReader()
	var said bytes.Buffer
	o := saga.Options{MeterProvider: sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)), Logger: slog.New(slog.NewTextHandler(&said, nil))}
	b := startBench(t, memory.New(), clock.NewManual(t0), o, def)
	const long = 16 << 20 / result
	for id, n := range map[string]int{"short": long - 2, "long": long + 4} {
		require.NoError(t, saga.Start(t.Context(), b.engine, def, id, n))
	}
	b.advance(2 * time.Hour)
	for id, n := range map[string]int{"short": long - 2, "long": long + 4} {
		got, err := saga.Wait(t.Context(), b.engine, def, id)
		require.NoError(t, err)
		require.Equal(t, n, got)
	}
	b.stop()
	require.Equal(t, 1, strings.Count(said.String(), "the history of a run has become long"), said.String())
	require.Contains(t, said.String(), "id=long")
	var collected metricdata.ResourceMetrics
	require.NoError(t, reader.Collect(t.Context(), &collected))
	counted := int64(0)
	for _, m := range collected.ScopeMetrics[0].Metrics {
		if data, ok := m.Data.(metricdata.Sum[int64]); ok && m.Name == "deed.saga.long_histories" {
			for _, point := range data.DataPoints {
				counted += point.Value
			}
		}
	}
	require.EqualValues(t, 1, counted)
}
