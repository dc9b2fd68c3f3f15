package sqlite

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// crashChild, when set, makes the test binary a writer on the file named by
// it, for a run named by crashRun: it prints what was acknowledged, until it
// is killed.
const (
	crashChild = "DEED_TEST_CRASH_FILE"
	crashRun   = "DEED_TEST_CRASH_RUN"
)

func crashWriter(path, run string) error {
	s, err := Open(context.Background(), path, checkpointAt(200))
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	lines := make(chan acked, 1024)
	go func() {
		for a := range lines {
			_ = out.Encode(a)
		}
	}()
	return work(context.Background(), s, run, 8, 0, func(a acked) { lines <- a })
}

// A child process is killed at random moments under load, again and again on
// the same file. What it had reported must be there, whole and in order.
func TestStore_Crash(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	files, kills := 2, 4
	if os.Getenv("DEED_TEST_LONG") != "" {
		files, kills = 10, 6
	}
	total := 0
	for range files {
		path := filepath.Join(t.TempDir(), "log.db")
		var all []acked
		for kill := range kills {
			got := killed(t, path, fmt.Sprintf("k%d", kill), time.Duration(random.IntN(150))*time.Millisecond)
			all = append(all, got...)
			require.NoError(t, verify(path, all), "after kill %d of %s", kill+1, path)
		}
		total += len(all)
	}
	require.Greater(t, total, 10*files*kills, "commits acknowledged before the kills")
	t.Logf("%d kills, %d acknowledged commits, all there", files*kills, total)
}

// killed runs a writer and kills it some time after its first reports, and
// returns what it had reported.
func killed(t *testing.T, path, run string, after time.Duration) []acked {
	t.Helper()
	program, err := os.Executable()
	require.NoError(t, err)
	child := exec.Command(program)
	child.Env = append(os.Environ(), crashChild+"="+path, crashRun+"="+run)
	var failure strings.Builder
	child.Stderr = &failure
	reports, err := child.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, child.Start())
	var got []acked
	lines := bufio.NewScanner(reports)
	var timer *time.Timer
	for lines.Scan() {
		var a acked
		if json.Unmarshal(lines.Bytes(), &a) != nil {
			break // the kill cut the line off
		}
		if got = append(got, a); timer == nil && len(got) > 20 {
			timer = time.AfterFunc(after, func() { _ = child.Process.Kill() })
		}
	}
	_ = child.Wait()
	require.NotNil(t, timer, "the writer ended by itself: %s", failure.String())
	timer.Stop()
	return got
}
