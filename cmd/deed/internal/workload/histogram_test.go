package workload

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestHistogram_Quantile(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var h, other histogram
	require.Zero(t, h.quantile(0.5), "of nothing")
	var all []time.Duration
	for i := range 20_000 {
		d := time.Duration(random.Uint64N(1 << random.UintN(40)))
		all = append(all, d)
		if i%2 == 0 {
			h.add(d)
		} else {
			other.add(d)
		}
	}
	h.merge(&other)
	slices.Sort(all)
	for _, q := range []float64{0, 0.5, 0.95, 0.99, 0.999} {
		exact := all[int(q*float64(len(all)))]
		require.InDelta(t, float64(exact), float64(h.quantile(q)), float64(exact)/100+1, "quantile %g", q)
	}
	h.add(-time.Second)
	require.Zero(t, h.quantile(0), "before the start counts as at once")
}

// Every value falls into a bucket whose middle is near it.
func TestHistogram_Buckets(t *testing.T) {
	t.Parallel()
	last := -1
	for _, v := range []uint64{0, 1, 63, 64, 65, 127, 128, 129, 1000, 1 << 20, 1<<20 + 1<<14, 1 << 40, 1<<63 - 1} {
		b := bucket(v)
		require.GreaterOrEqual(t, b, last, "%d", v)
		last = b
		require.Less(t, b, len(histogram{}.counts), "%d", v)
		require.InDelta(t, float64(v), float64(middle(b)), float64(v)/64+0.5, "%d", v)
	}
}
