package projection

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// ordered checks that the stored forms of keys are in the order of the keys,
// whatever follows them, and that none is the beginning of another one.
func ordered[K IndexKey](t *testing.T, compare func(a, b K) int, keys []K) {
	t.Helper()
	for _, a := range keys {
		for _, b := range keys {
			x, y := appendOrdered(nil, a), appendOrdered(nil, b)
			want := compare(a, b)
			require.Equal(t, want, bytes.Compare(x, y), "%#v and %#v are stored as %x and %x", a, b, x, y)
			require.Equal(t, want == 0, bytes.HasPrefix(x, y), "%#v, %#v", a, b)
			for _, tails := range [][2]string{{"\xff", "\x00"}, {"\x00", "\xff\xff"}, {"a", "b"}} {
				if want != 0 {
					require.Equal(t, want, bytes.Compare(append(x[:len(x):len(x)], tails[0]...), append(y[:len(y):len(y)], tails[1]...)), "%#v and %#v", a, b)
				}
			}
		}
	}
}

type (
	level  int8
	label  string
	ratio  float32
	digest []byte
)

func TestAppendOrdered(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	ints := []int64{math.MinInt64, math.MinInt64 + 1, -256, -255, -1, 0, 1, 127, 128, 255, 256, math.MaxInt64 - 1, math.MaxInt64}
	uints := []uint64{0, 1, 255, 256, math.MaxInt64, math.MaxInt64 + 1, math.MaxUint64}
	floats := []float64{math.NaN(), math.Inf(-1), -math.MaxFloat64, -1, -math.SmallestNonzeroFloat64, math.Copysign(0, -1), 0, math.SmallestNonzeroFloat64, 0.5, 1, math.MaxFloat64, math.Inf(1)}
	texts := []string{"", "\x00", "\x00\x00", "\x00\x01", "\x00\xff", "\x01", "a", "a\x00", "a\x00b", "a\x00\xff", "aa", "ab", "\xff", "\xff\xff", "ä"}
	instants := []time.Time{{}, time.Unix(-1, 999999999), time.Unix(0, 0), time.Unix(0, 1), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(-500, 1, 1, 0, 0, 0, 0, time.UTC)}
	for range 40 {
		n := random.Uint64() >> random.IntN(64)
		ints, uints = append(ints, int64(n), -int64(n)), append(uints, n)
		floats = append(floats, math.Float64frombits(random.Uint64()), random.NormFloat64())
		text := make([]byte, random.IntN(5))
		for i := range text {
			text[i] = []byte{0, 1, 'a', 0xfe, 0xff}[random.IntN(5)]
		}
		texts = append(texts, string(text))
		instants = append(instants, time.Unix(random.Int64N(4e9)-2e9, random.Int64N(1e9)).In(time.FixedZone("", random.IntN(20000)-10000)))
	}
	ordered(t, cmp.Compare[int64], ints)
	ordered(t, cmp.Compare[uint64], uints)
	ordered(t, cmp.Compare[float64], floats)
	ordered(t, cmp.Compare[string], texts)
	ordered(t, time.Time.Compare, instants)
	ordered(t, cmp.Compare[int], []int{math.MinInt, -1, 0, 1, math.MaxInt})
	ordered(t, cmp.Compare[level], []level{-128, -1, 0, 1, 127})
	ordered(t, cmp.Compare[uint8], []uint8{0, 1, 127, 128, 255})
	ordered(t, cmp.Compare[ratio], []ratio{-1.5, 0, 0.25, 1e30})
	ordered(t, cmp.Compare[label], []label{"", "a", "b", "ba"})
	ordered(t, func(a, b bool) int {
		switch {
		case a == b:
			return 0
		case b:
			return -1
		}
		return 1
	}, []bool{false, true})
	digests := make([]digest, len(texts))
	for i, s := range texts {
		digests[i] = digest(s)
	}
	ordered(t, func(a, b digest) int { return bytes.Compare(a, b) }, digests)
}

// Stored entries hold on to their form: those of an earlier release are read by
// later ones.
func TestAppendOrdered_Golden(t *testing.T) {
	t.Parallel()
	require.Equal(t, "a\x00\xffb\x00\x00", string(appendOrdered(nil, "a\x00b")))
	require.Equal(t, "\x80\x00\x00\x00\x00\x00\x00\x05", string(appendOrdered(nil, 5)))
	require.Equal(t, "\x7f\xff\xff\xff\xff\xff\xff\xff", string(appendOrdered(nil, int8(-1))))
	require.Equal(t, "\x00\x00\x00\x00\x00\x00\x00\x05", string(appendOrdered(nil, uint(5))))
	require.Equal(t, "\xbf\xf0\x00\x00\x00\x00\x00\x00", string(appendOrdered(nil, 1.0)))
	require.Equal(t, "\x01", string(appendOrdered(nil, true)))
	require.Equal(t, "\x80\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x02", string(appendOrdered(nil, time.Unix(1, 2))))
	require.Equal(t, []string{"text", "text", "bool", "int", "uint", "float", "time"}, []string{
		orderedKind[string](), orderedKind[digest](), orderedKind[bool](), orderedKind[level](), orderedKind[uint8](), orderedKind[ratio](), orderedKind[time.Time](),
	})
}

func FuzzAppendOrdered_Text(f *testing.F) {
	f.Add("a", "a\x00")
	f.Add("\x00\xff", "\x00")
	f.Fuzz(func(t *testing.T, a, b string) {
		ordered(t, strings.Compare, []string{a, b})
	})
}

// What is read as an entry is one of the row that it was made of, or refused.
func FuzzEntryRow(f *testing.F) {
	f.Add("a\x00\x00row", []byte{3})
	f.Add("row", []byte{3})
	f.Add("row", []byte{0x80, 0})
	f.Add("", []byte{})
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		row, err := entryRow(Row{Key: key, Value: value})
		if err == nil {
			size, _ := binary.Uvarint(value)
			require.NotEmpty(t, row)
			require.Less(t, len(row), len(key))
			require.True(t, strings.HasSuffix(key, row))
			require.EqualValues(t, size, len(row))
		} else {
			require.ErrorIs(t, err, errIndexBroken)
		}
		if key != "" {
			row, err := entryRow(Row{Key: string(appendOrdered(nil, string(value))) + key, Value: entryValue(key)})
			require.NoError(t, err)
			require.Equal(t, key, row)
		}
	})
}
