package sqlite

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/metatest"
)

func synchronous(mode string) Option {
	return func(s *settings) error { s.synchronous = mode; return nil }
}

func checkpointAt(pages int) Option {
	return func(s *settings) error { s.checkpoint = pages; return nil }
}

// powerTrace runs the workload on a recording disk.
func powerTrace(t *testing.T, options ...Option) []operation {
	t.Helper()
	d := newDisk(t)
	path := filepath.Join(t.TempDir(), "log.db")
	s, err := Open(t.Context(), path, append(options, vfs(d.name), checkpointAt(100))...)
	require.NoError(t, err)
	err = work(t.Context(), s, "p", 4, commitsEach(), func(a acked) { d.note(a) })
	trace := d.operations() // closing would tidy up
	require.NoError(t, s.Close())
	require.NoError(t, err)
	checkpoints := 0
	for _, o := range trace {
		if o.kind == opWrite && o.file == "log.db-wal" && o.at == 0 {
			checkpoints++ // the log begins again
		}
	}
	require.Greater(t, checkpoints, 5, "checkpoints must be among what is cut off")
	return trace
}

func commitsEach() int {
	if os.Getenv("DEED_TEST_LONG") != "" {
		return 600
	}
	return 200
}

// cut rebuilds the files as a power failure may leave them at moments of the
// trace, and returns what verify says of the first one that is wrong.
func cut(t *testing.T, trace []operation, cuts int, random *rand.Rand) error {
	t.Helper()
	moments := map[int]bool{len(trace): true}
	for len(moments) < min(cuts, len(trace)/2) {
		moments[random.IntN(len(trace)+1)] = true
	}
	disk := newPlatter()
	var confirmed []acked
	for i := range len(trace) + 1 {
		if moments[i] {
			for kind := range crash(crashKinds) {
				folder, err := os.MkdirTemp(t.TempDir(), "cut")
				require.NoError(t, err)
				files := disk.after(kind, random)
				require.NoError(t, write(folder, files))
				if err := verify(filepath.Join(folder, "log.db"), confirmed); err != nil {
					t.Logf("power cut after operation %d of %d, %s: %d confirmed: %v", i, len(trace), kind, len(confirmed), err)
					return err
				}
				require.NoError(t, os.RemoveAll(folder))
			}
		}
		if i < len(trace) {
			if a, ok := trace[i].note.(acked); ok {
				confirmed = append(confirmed, a)
			}
			disk.play(trace[i])
		}
	}
	return nil
}

func TestStore_PowerLoss(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	cuts := 40
	if metatest.Raced() {
		cuts = 10
	}
	if os.Getenv("DEED_TEST_LONG") != "" {
		cuts = 150
	}
	trace := powerTrace(t)
	require.NoError(t, cut(t, trace, cuts, rand.New(rand.NewPCG(seed, 0))))
}

// The power-loss test can fail: without syncs it must find what is lost.
func TestStore_PowerLoss_IsSeenWithoutSync(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"OFF", "NORMAL"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			trace := powerTrace(t, synchronous(mode))
			require.ErrorContains(t, cut(t, trace, 40, rand.New(rand.NewPCG(1, 2))), "lost: acknowledged")
		})
	}
}
