package saga_test

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
)

var errSoldOut = errors.New("sold out")

func TestTimerSaga(t *testing.T) {
	t.Parallel()
	def := saga.Define("grace", func(s *saga.Run, sku string) (string, error) {
		if err := s.Sleep("grace", 60*day); err != nil {
			return "", err
		}
		return "reserved " + sku, saga.Execute(s, "reserve", stocks, Reserve{sku, s.ID()})
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
	b := newBench(t, def)
	exec(b, stocks, Fill{"book", 1})
	exec(b, orders, Place{"o1", "book"})
	b.settle()
	require.Equal(t, []string{"saga.started", "saga.timer_set"}, b.types(history("grace", "o1")))
	due, some := b.engine.Workers()[0].NextDue()
	require.True(t, some)
	require.Equal(t, t0.Add(60*day), due)

	head, err := b.store.Head(t.Context())
	require.NoError(t, err)
	b.advance(60*day - time.Nanosecond)
	again, err := b.store.Head(t.Context())
	require.NoError(t, err)
	require.Equal(t, head, again, "nothing happens before the sixty days are over")
	b.advance(time.Nanosecond)
	require.Equal(t, []string{"saga.started", "saga.timer_set", "saga.timer_fired", "saga.step_succeeded", "saga.completed"}, b.types(history("grace", "o1")))
	out, err := saga.Wait(t.Context(), b.engine, def, "o1")
	require.NoError(t, err)
	require.Equal(t, "reserved book", out)
	stock, _, err := aggregate.Load(t.Context(), b.runtime, stocks, "book")
	require.NoError(t, err)
	require.Equal(t, 0, stock.Free)
}
