package postgres

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

// Event types that another process has used for the first time are found by
// reads, subscriptions and conditions, however they were planned.
func TestStore_KindsOfOthers(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	url := pgtest.Database(t)
	a, err := Open(ctx, url, Tail(1, 1)) // reads everything from the database
	require.NoError(t, err)
	defer a.Close()
	b, err := Open(ctx, url)
	require.NoError(t, err)
	defer b.Close()
	stream := eventstore.Stream{Category: "order", ID: "1"}
	for range 5 {
		_, err := b.Append(ctx, eventstore.Commit{Events: []eventstore.Event{{Stream: stream, Type: "late", Tags: []string{"x"}}}})
		require.NoError(t, err)
	}
	for name, q := range map[string]eventstore.Query{
		"type":          eventstore.OfTypes("late"),
		"category":      eventstore.OneCategory("order"),
		"tag and type":  eventstore.Match(eventstore.Item{Tags: []string{"x"}, Types: []string{"late"}}),
		"several items": eventstore.Match(eventstore.Item{Types: []string{"late"}}, eventstore.Item{Category: "other"}),
	} {
		_, err := a.Append(ctx, eventstore.Commit{
			Events:     []eventstore.Event{{Stream: eventstore.Stream{Category: "probe", ID: name}, Type: "probe"}},
			Conditions: []eventstore.Condition{eventstore.NoneMatch(q, 0)},
		})
		require.ErrorIs(t, err, eventstore.ErrConflict, name)
		n := 0
		for _, err := range a.Read(ctx, q, eventstore.ReadOptions{}) {
			require.NoError(t, err)
			n++
		}
		require.Equal(t, 5, n, name)
		n = 0
		for batch, err := range a.Subscribe(ctx, q, 0) {
			require.NoError(t, err)
			n += len(batch.Events)
			if batch.CaughtUp && batch.Through >= 5 {
				break
			}
		}
		require.Equal(t, 5, n, name)
	}
}
