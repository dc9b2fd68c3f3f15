package nats

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// A backward read holds no more than it may, and gives every event once, in
// order, however large they are.
func TestStore_BackwardIsBounded(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	const most = 64 << 10
	store, _ := openLog(t, c, hooked(func(s *settings) { s.windowBytes = most }))
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 60 {
		events := happened(account(fmt.Sprint(n%7)), 1+r.IntN(20))
		for i := range events {
			size := r.IntN(300)
			if r.IntN(10) == 0 {
				size = r.IntN(2 * most)
			}
			events[i].Data = make([]byte, size)
			if r.IntN(2) == 0 {
				events[i].Stream.Category = "other"
			}
		}
		_, err := store.Append(t.Context(), eventstore.Commit{Events: events})
		require.NoError(t, err)
	}
	head, err := store.Head(t.Context())
	require.NoError(t, err)
	for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneCategory("other"), eventstore.OneStream(account("3"))} {
		forward := read(t, store, q, eventstore.ReadOptions{})
		require.NotEmpty(t, forward)
		var backward []eventstore.Position
		largest := 0
		err := store.readPages(t.Context(), q, 0, head, true, func(events []eventstore.Recorded) bool {
			bytes := 0
			for i := range events {
				backward = append(backward, events[i].Position)
				bytes += weigh(&events[i])
			}
			if len(events) > 1 {
				largest = max(largest, bytes)
			}
			return true
		})
		require.NoError(t, err)
		require.LessOrEqual(t, largest, most)
		require.Len(t, backward, len(forward))
		for i, p := range backward {
			require.Equal(t, forward[len(forward)-1-i].Position, p)
		}
	}
}
