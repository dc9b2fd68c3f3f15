package projection

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// Whatever is written, of however little of it there is room for in memory, is
// read as it was written last, one by one and in the order of the keys.
func TestSide_LikeAMap(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	for _, most := range []int{0, 1, 700, 5000} {
		side := newSide(most)
		like := map[string]map[string]string{"a": {}, "ab": {}, "b": {}}
		tables := slices.Sorted(maps.Keys(like))
		deepest := 0
		for n := range 4000 {
			table, key := tables[random.IntN(3)], fmt.Sprint(random.IntN(300))
			if random.IntN(20) == 0 {
				key = string([]byte{0, byte(random.IntN(4)), 0xff})
			}
			switch random.IntN(4) {
			case 0:
				require.NoError(t, side.set(table, key, sideRow{gone: true}))
				delete(like[table], key)
			default:
				value := fmt.Sprintf("%d%*s", n, random.IntN(200), "")
				require.NoError(t, side.set(table, key, sideRow{value: []byte(value)}))
				like[table][key] = value
			}
			if most > 0 {
				require.LessOrEqual(t, side.bytes, most)
			}
			deepest = max(deepest, len(side.runs))
			got, ok, err := side.get(table, key)
			require.NoError(t, err)
			require.Equal(t, like[table][key], string(got))
			_, there := like[table][key]
			require.Equal(t, there, ok)
		}
		if most == 0 {
			require.Zero(t, deepest)
		} else {
			require.Greater(t, deepest, 1)
			require.Less(t, deepest, 30, "runs are merged")
		}
		require.Equal(t, len(side.recent) == 0, side.bytes == 0)
		for _, table := range tables {
			var keys []string
			for row, err := range side.scan(table) {
				require.NoError(t, err)
				require.Equal(t, like[table][row.Key], string(row.Value))
				keys = append(keys, row.Key)
			}
			require.Equal(t, slices.Sorted(maps.Keys(like[table])), keys)
			for key, value := range like[table] {
				got, ok, err := side.get(table, key)
				require.NoError(t, err)
				require.True(t, ok)
				require.Equal(t, value, string(got))
			}
		}
		for range side.scan("b") {
			break // nothing is left of a scan that is not finished: see the leak check
		}
		side.close()
	}
}

// The files have no names, so that nothing is left of a process that is killed,
// and are closed when they are merged.
func TestSide_LeavesNothing(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a file that is open keeps its name")
	}
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	side := newSide(1000)
	for n := range 5000 {
		require.NoError(t, side.set("t", fmt.Sprint(n), sideRow{value: []byte("some value")}))
	}
	require.NotEmpty(t, side.runs)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
	files := slices.Clone(side.runs)
	side.close()
	for _, r := range files {
		_, err := r.file.Stat()
		require.ErrorIs(t, err, os.ErrClosed)
	}

	// Where there is no room the error says where that was.
	t.Setenv("TMPDIR", dir+"/none")
	side = newSide(1)
	require.ErrorContains(t, side.set("t", "key", sideRow{}), `in a temporary file in "`+dir+`/none" (see TMPDIR)`)
}
