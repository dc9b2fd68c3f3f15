package postgres

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/pgtest"
)

// Several processes write to one log, which each of them follows.
func TestStore_Processes(t *testing.T) {
	t.Parallel()
	modes := map[string][]Option{"default": nil, "copy": {always(formCopy)}, "function": {always(formFunction)}, "two_trips": {always(formTwoTrips)}, "no tail": {Tail(1, 1)}}
	for name, options := range modes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			w := &workload{writers: 6, commits: pick(60, 12)}
			var spies []*spy
			for range 3 {
				s := openURL(t, url, options...)
				w.stores = append(w.stores, s)
				spies = append(spies, watch(t, s))
			}
			w.run(t)
			w.check(t, url, spies...)
			stats := w.stores[0].Stats()
			require.NotZero(t, stats.Commits)
			t.Logf("%+v", stats)
		})
	}
}
