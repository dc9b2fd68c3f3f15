package sqlite_test

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

	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection/statetest"
)

func TestInline(t *testing.T) {
	statetest.RunInline(t, func(t testing.TB) statetest.InlineStore {
		s, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "log.db"))
		require.NoError(t, err)
		return s
	}, statetest.Features{SQL: true})
}

const inlineFile = "DEED_TEST_INLINE_FILE"

// TestInlineProcess is the process that TestInline_Killed kills.
func TestInlineProcess(t *testing.T) {
	path := os.Getenv(inlineFile)
	if path == "" {
		t.Skip("it is run by TestInline_Killed")
	}
	s, err := sqlite.Open(t.Context(), path)
	require.NoError(t, err)
	t.Fatal(statetest.WriteInline(t.Context(), s, os.Getenv(inlineFile+"_KNOWS") != "", func(r statetest.InlineReport) {
		line, _ := json.Marshal(r)
		fmt.Println(string(line)) // one write: lines of different writers do not mix
	}))
}

// A process is killed at random moments while appends move an inline projection:
// rows and events are there together, or neither. Between, a process that does not
// know the projection appends.
func TestInline_Killed(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	path := filepath.Join(t.TempDir(), "log.db")
	total, applied := 0, 0
	for kill := range 5 {
		knows := kill != 2
		reports := killedInline(t, path, knows, time.Duration(random.IntN(200))*time.Millisecond)
		s, err := sqlite.Open(t.Context(), path)
		require.NoError(t, err)
		n := statetest.CheckInline(t, s, reports)
		require.NoError(t, s.Close())
		if !knows {
			require.Zero(t, n)
		}
		total, applied = total+len(reports), applied+n
	}
	t.Logf("%d appends, %d of them applied when they returned", total, applied)
	require.Greater(t, applied, 50)
}

func killedInline(t *testing.T, path string, knows bool, after time.Duration) []statetest.InlineReport {
	t.Helper()
	program, err := os.Executable()
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	child := exec.CommandContext(ctx, program, "-test.run=^TestInlineProcess$")
	child.Env = append(os.Environ(), inlineFile+"="+path)
	if knows {
		child.Env = append(child.Env, inlineFile+"_KNOWS=yes")
	}
	var failure strings.Builder
	child.Stderr = &failure
	out, err := child.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, child.Start())
	var reports []statetest.InlineReport
	var timer *time.Timer
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var r statetest.InlineReport
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			break // the kill cut the line off
		}
		if reports = append(reports, r); timer == nil && len(reports) > 50 {
			timer = time.AfterFunc(after, func() { _ = child.Process.Kill() })
		}
	}
	_ = child.Wait()
	require.NotNil(t, timer, "the writer ended by itself: %s", failure.String())
	timer.Stop()
	return reports
}

func BenchmarkInline(b *testing.B) {
	statetest.BenchmarkInline(b, func(t testing.TB) statetest.InlineStore {
		s, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "log.db"))
		require.NoError(t, err)
		return s
	})
}
