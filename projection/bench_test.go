package projection_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
)

type total struct{ Count, Cents int64 }

func totals() *projection.ViewDefinition[total] {
	return projection.View("totals", projection.On(func(t *total, e deposited) {
		t.Count++
		t.Cents += e.Cents
	}))
}

// ranking is totals with an index whose keys change with every event, and kinds
// with one whose keys never do.
func ranking() *projection.ViewDefinition[total] {
	return projection.View("ranking", projection.On(func(t *total, e deposited) {
		t.Count++
		t.Cents += e.Cents
	})).Indexed(projection.Index("cents", func(t total) int64 { return t.Cents }))
}

func kinds() *projection.ViewDefinition[total] {
	return projection.View("kinds", projection.On(func(t *total, e deposited) {
		t.Count++
		t.Cents += e.Cents
	})).Indexed(projection.Index("kind", func(t total) bool { return t.Count > 0 }))
}

func months() *projection.ViewDefinition[total] {
	return projection.View("months", projection.OnKeyed(
		func(_ deposited, r eventstore.Recorded) []string { return []string{r.Time.Format("2006-01")} },
		func(t *total, _ string, e deposited, _ eventstore.Recorded) {
			t.Count++
			t.Cents += e.Cents
		}))
}

func table() *projection.SQLDefinition {
	return projection.SQL("table",
		projection.Setup("CREATE TABLE IF NOT EXISTS totals (id TEXT PRIMARY KEY, count INTEGER NOT NULL, cents INTEGER NOT NULL)"),
		projection.Reset("DELETE FROM totals"),
		projection.OnSQL(func(ctx context.Context, tx projection.Tx, e deposited, r eventstore.Recorded) error {
			_, err := tx.Exec(ctx, `INSERT INTO totals VALUES ($1, 1, $2) ON CONFLICT (id) DO UPDATE SET count = count + 1, cents = cents + $2`, r.Stream.ID, e.Cents)
			return err
		}))
}

func benchBackends(b *testing.B, run func(b *testing.B, open func() backend)) {
	b.Run("memory", func(b *testing.B) { run(b, func() backend { return memory.New() }) })
	b.Run("sqlite", func(b *testing.B) {
		run(b, func() backend {
			s, err := sqlite.Open(context.Background(), b.TempDir()+"/events.db")
			require.NoError(b, err)
			return s
		})
	})
}

func fill(b testing.TB, store eventstore.Store, events, streams int) {
	for i := 0; i < events; {
		c := eventstore.Commit{}
		for range 1000 {
			c.Events = append(c.Events, eventstore.Event{
				Stream: account(fmt.Sprint("account", i%streams)), Type: "account.deposited", Data: fmt.Appendf(nil, `{"Cents":%d}`, i%100),
			})
			i++
		}
		_, err := store.Append(context.Background(), c)
		require.NoError(b, err)
	}
}

// BenchmarkCatchUp is a view folding a log of 100,000 events in 20,000 streams
// (months: into one row) from its beginning; ranking and kinds have an index.
func BenchmarkCatchUp(b *testing.B) {
	const events, streams = 100_000, 20_000
	benchBackends(b, func(b *testing.B, open func() backend) {
		store := open()
		defer store.Close()
		fill(b, store, events, streams)
		for _, p := range []projection.Projection{totals(), ranking(), kinds(), months(), table()} {
			if _, ok := p.(*projection.SQLDefinition); ok {
				if _, ok := store.(*memory.Store); ok {
					continue
				}
			}
			b.Run(p.Name(), func(b *testing.B) {
				r := start(b, store, store, projection.Options{}, p)
				r.caughtUp(b, store, p.Name())
				b.ReportAllocs()
				for b.Loop() {
					require.NoError(b, r.Rebuild(context.Background(), p.Name()))
				}
				b.ReportMetric(float64(events)*float64(b.N)/b.Elapsed().Seconds(), "events/s")
				require.NoError(b, r.stop())
			})
		}
	})
}

// BenchmarkLive is one event at a time: appended, folded, written, seen.
func BenchmarkLive(b *testing.B) {
	benchBackends(b, func(b *testing.B, open func() backend) {
		store := open()
		defer store.Close()
		view := totals()
		r := start(b, store, store, projection.Options{}, view)
		r.caughtUp(b, store, "totals")
		n := 0
		b.ReportAllocs()
		for b.Loop() {
			n++
			receipt := put(b, store, account(fmt.Sprint(n%1000)), deposited{1})
			if err := r.WaitFor(context.Background(), "totals", receipt.Last); err != nil {
				b.Fatal(err)
			}
		}
		require.NoError(b, r.stop())
	})
}
