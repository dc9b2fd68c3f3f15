package workload

import (
	"math/bits"
	"time"
)

// histogram counts durations in buckets that are at most 1/64 of their value
// wide. The zero value is empty. It is not safe for concurrent use.
type histogram struct {
	counts [58 * 64]uint32
	total  uint64
}

func (h *histogram) add(d time.Duration) {
	h.counts[bucket(uint64(max(d, 0)))]++
	h.total++
}

func (h *histogram) merge(other *histogram) {
	for i, n := range other.counts {
		h.counts[i] += n
	}
	h.total += other.total
}

// quantile returns the duration that a share q of all does not exceed; 0 when
// there are none.
func (h *histogram) quantile(q float64) time.Duration {
	rank := int64(q * float64(h.total))
	for i, n := range h.counts {
		if rank -= int64(n); rank < 0 {
			return time.Duration(middle(i))
		}
	}
	return 0
}

// bucket: values below 64 have one each; above, it is the place of the highest
// bit and the six bits after it.
func bucket(v uint64) int {
	if v < 64 {
		return int(v)
	}
	shift := bits.Len64(v) - 7
	return (shift+1)*64 + int(v>>shift) - 64
}

// middle is the value that stands for a bucket.
func middle(i int) uint64 {
	if i < 64 {
		return uint64(i)
	}
	shift := i/64 - 1
	return uint64(i%64+64)<<shift + uint64(1)<<shift/2
}

func milliseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }
