package postgres

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
)

type paid struct {
	Owner string
	Cents int64
}

func (paid) EventType() string { return "paid" }

// recorder notes the statements that are run.
type recorder struct {
	mu  sync.Mutex
	ran []pgx.TraceQueryStartData
}

func (r *recorder) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ran = append(r.ran, data)
	return ctx
}

func (*recorder) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// Reading a view by an index touches the entries that it returns, in their order,
// and their rows by key, planned for the arguments or for any; the rows come in one
// round trip. As long as the server has no statistics at all it may sort what it
// finds by the primary key, but does not read the table from one end to the other.
func TestPlan_Index(t *testing.T) {
	t.Parallel()
	const accounts = 3000
	url := pgtest.Database(t)
	config, err := pgxpool.ParseConfig(url)
	require.NoError(t, err)
	seen := &recorder{}
	config.ConnConfig.Tracer = seen
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	s := openPool(t, pool)
	admin := direct(t, url)
	do(t, admin, "ALTER TABLE deed.rows SET (autovacuum_enabled = off)")
	byOwner := projection.Index("owner", func(p paid) string { return p.Owner })
	byCents := projection.Index("cents", func(p paid) int64 { return p.Cents })
	byBoth := projection.CompositeIndex("both", byOwner, byCents)
	plain := projection.View("paid", projection.On(func(row *paid, e paid) { *row = e }))
	for i := range accounts / 500 {
		var c eventstore.Commit
		for k := range 500 {
			id := i*500 + k
			c.Events = append(c.Events, eventstore.Event{Stream: eventstore.Stream{Category: "account", ID: fmt.Sprint(id)}, Type: "paid", Data: fmt.Appendf(nil, `{"Owner":"o%d","Cents":%d}`, id%100, id)})
		}
		_, err := s.Append(t.Context(), c)
		require.NoError(t, err)
	}
	runWith := func(view projection.Projection) {
		engine := projection.NewEngine(s, s, projection.Options{Logger: slog.New(slog.DiscardHandler)})
		require.NoError(t, engine.Add(view))
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = engine.Workers()[0].Run(ctx) })
		require.NoError(t, engine.WaitFor(t.Context(), "paid", accounts))
		cancel()
		running.Wait()
	}
	runWith(plain)
	view := plain.Indexed(byOwner, byCents, byBoth)
	runWith(view) // which builds them

	check := func(analyzed bool) {
		t.Helper()
		for what, test := range map[string]struct {
			part projection.Selection
			r    projection.Range
			want int
		}{
			"whole":             {byCents, projection.Range{Limit: 20}, 20},
			"whole, backward":   {byCents, projection.Range{Limit: 20, Backward: true}, 20},
			"equal":             {byOwner.Is("o7"), projection.Range{}, 30},
			"between":           {byCents.Between(1000, 1019), projection.Range{}, 20},
			"at least":          {byCents.AtLeast(1000), projection.Range{Limit: 20}, 20},
			"below, backward":   {byCents.Below(1000), projection.Range{Limit: 20, Backward: true}, 20},
			"composite":         {byBoth.In("o7").AtLeast(1000), projection.Range{}, 20},
			"composite, the 5.": {byBoth.In("o7"), projection.Range{Limit: 5, Backward: true}, 5},
		} {
			seen.mu.Lock()
			seen.ran = nil
			seen.mu.Unlock()
			require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
				n := 0
				for _, err := range view.RowsBy(tx, test.part, test.r) {
					if err != nil {
						return err
					}
					n++
				}
				require.Equal(t, test.want, n, what)
				return nil
			}))
			scans, gets := 0, 0
			seen.mu.Lock()
			ran := seen.ran
			seen.mu.Unlock()
			for _, q := range ran {
				if !strings.Contains(q.SQL, ".rows") {
					continue
				}
				if strings.Contains(q.SQL, "ORDER BY") {
					scans++
				} else {
					gets++
				}
				for _, mode := range []string{"force_generic_plan", "force_custom_plan"} {
					do(t, admin, "SET plan_cache_mode = "+mode)
					var raw string
					require.NoError(t, admin.QueryRow(t.Context(), "EXPLAIN (ANALYZE, FORMAT JSON) "+q.SQL, q.Args...).Scan(&raw))
					var out []struct{ Plan node }
					require.NoError(t, json.Unmarshal([]byte(raw), &out))
					plan := &out[0].Plan
					require.False(t, plan.has("Seq Scan", "rows"), "%s, %s: %s\n%s", what, mode, q.SQL, raw)
					if !analyzed {
						continue
					}
					require.False(t, plan.has("Sort", "") || plan.has("Incremental Sort", ""), "%s, %s: %s\n%s", what, mode, q.SQL, raw)
					require.LessOrEqual(t, touchedRows(plan), float64(test.want+1), "%s, %s: %s\n%s", what, mode, q.SQL, raw)
				}
			}
			require.Equal(t, 1, scans, what)
			require.Equal(t, 2, gets, "%s: the mark of the index, and all rows", what)
		}
	}
	check(false)
	do(t, admin, "ANALYZE deed.rows")
	check(true)
}

// touchedRows counts the rows of the state that the plan has read.
func touchedRows(n *node) float64 {
	rows := 0.0
	if n.Relation == "rows" {
		rows = (n.Rows + n.Filtered) * n.Loops
	}
	for i := range n.Plans {
		rows += touchedRows(&n.Plans[i])
	}
	return rows
}

// Partitions of a view write the same tables at the same time. Indexes come to
// rows that are there, go, and come again, while events arrive.
func TestIndex_Partitions(t *testing.T) {
	t.Parallel()
	s := openURL(t, pgtest.Database(t))
	byOwner := projection.Index("owner", func(p paid) string { return p.Owner })
	byCents := projection.Index("cents", func(p paid) int64 { return p.Cents })
	plain := projection.View("paid", projection.On(func(row *paid, e paid) { row.Owner, row.Cents = e.Owner, row.Cents+e.Cents })).Partitioned(4)
	indexed := plain.Indexed(byOwner, byCents, projection.CompositeIndex("both", byOwner, byCents))
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for _, view := range []*projection.ViewDefinition[paid]{plain, indexed, indexed, plain, indexed} {
		engine := projection.NewEngine(s, s, projection.Options{Logger: slog.New(slog.DiscardHandler), BatchEvents: 50})
		require.NoError(t, engine.Add(view))
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for _, w := range engine.Workers() {
			running.Go(func() { _ = w.Run(ctx) })
		}
		var last eventstore.Receipt
		for range 20 {
			var c eventstore.Commit
			for range 50 {
				c.Events = append(c.Events, eventstore.Event{
					Stream: eventstore.Stream{Category: "account", ID: fmt.Sprint(random.IntN(300))}, Type: "paid",
					Data: fmt.Appendf(nil, `{"Owner":"o%d","Cents":%d}`, random.IntN(9), random.IntN(100)-50),
				})
			}
			var err error
			last, err = s.Append(t.Context(), c)
			require.NoError(t, err)
		}
		require.NoError(t, engine.WaitFor(t.Context(), "paid", last.Last))
		cancel()
		running.Wait()
		v, err := engine.Verify(t.Context(), "paid")
		require.NoError(t, err)
		require.True(t, v.Agrees(), v.String())
		if view == plain {
			require.Zero(t, v.Entries)
			continue
		}
		require.Equal(t, 3*v.Rows, v.Entries)
		require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
			n, before := 0, projection.IndexedRow[paid]{}
			for e, err := range indexed.RowsBy(tx, byCents, projection.Range{}) {
				if err != nil {
					return err
				}
				if n++; n > 1 {
					require.LessOrEqual(t, before.Row.Cents, e.Row.Cents)
				}
				before = e
			}
			require.Equal(t, v.Rows, n)
			return nil
		}))
	}
}
