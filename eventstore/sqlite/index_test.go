package sqlite

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

type paid struct{ Cents int64 }

func (paid) EventType() string { return "paid" }

// Reading a view by an index searches for the entries, in their order, and for
// their rows by key: nothing is scanned from one end to the other, nor sorted.
func TestPlans_Index(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
	byCents := projection.Index("cents", func(p paid) int64 { return p.Cents })
	view := projection.View("paid", projection.On(func(row *paid, e paid) { *row = e })).Indexed(byCents)
	engine := projection.NewEngine(s, s, projection.Options{Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, engine.Add(view))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = engine.Workers()[0].Run(ctx) })
	var c eventstore.Commit
	for i := range 300 {
		c.Events = append(c.Events, eventstore.Event{Stream: eventstore.Stream{Category: "account", ID: fmt.Sprint(i)}, Type: "paid", Data: fmt.Appendf(nil, `{"Cents":%d}`, i)})
	}
	receipt, err := s.Append(t.Context(), c)
	require.NoError(t, err)
	require.NoError(t, engine.WaitFor(t.Context(), "paid", receipt.Last))
	cancel()
	running.Wait()
	for name, r := range map[string]projection.Range{"forward": {}, "backward": {Backward: true}, "limit": {Limit: 20}} {
		for _, part := range []projection.Selection{byCents, byCents.Is(7), byCents.Between(5, 250), byCents.AtLeast(5), byCents.Below(200)} {
			require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
				c := tx.(*stateTx).c
				for text, known := range c.statements {
					known.finalize()
					delete(c.statements, text)
				}
				n := 0
				for _, err := range view.RowsBy(tx, part, r) {
					if err != nil {
						return err
					}
					n++
				}
				require.Positive(t, n)
				texts := slices.Collect(maps.Keys(c.statements))
				scans, gets := 0, 0
				for _, text := range texts {
					if !strings.Contains(text, "deed_rows") {
						continue
					}
					got := explain(t, c, text)
					switch {
					case strings.Contains(text, "ORDER BY key"):
						scans++
						require.Contains(t, got, "SEARCH deed_rows USING PRIMARY KEY (tbl=?", text)
						if part != projection.Selection(byCents) {
							require.Regexp(t, `\(tbl=\? AND key[<>]\?`, got, "%s: %s", name, text)
						}
					default:
						gets++
						require.Contains(t, got, "SEARCH deed_rows USING PRIMARY KEY (tbl=? AND key=?)", text)
					}
					require.NotContains(t, got, "SCAN", text)
					require.NotContains(t, got, "TEMP B-TREE", text)
				}
				require.Positive(t, scans)
				require.Positive(t, gets)
				return nil
			}))
		}
	}
}
