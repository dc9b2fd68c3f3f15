package matrix_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/matrix"
)

var update = flag.Bool("update", false, "write the table into README.md")

const (
	begin = "<!-- features: made by go test ./internal/matrix -update -->\n"
	end   = "<!-- end of features -->\n"
)

// README tells what the conformance tests demand.
func TestREADME(t *testing.T) {
	t.Parallel()
	path := filepath.Join("..", "..", "README.md")
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	before, rest, found := strings.Cut(string(text), begin)
	require.True(t, found, "README.md has no %q", begin)
	old, after, found := strings.Cut(rest, end)
	require.True(t, found, "README.md has no %q", end)
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(before+begin+table()+end+after), 0o644))
		return
	}
	require.Equal(t, table(), old, "README.md is not up to date: go test ./internal/matrix -update")
}

// Every backend of the project has its column, and its conformance test demands it.
func TestBackends(t *testing.T) {
	t.Parallel()
	for _, b := range matrix.Backends() {
		tests, err := filepath.Glob(filepath.Join("..", "..", "eventstore", b.Name, "*_test.go"))
		require.NoError(t, err)
		demands := false
		for _, name := range tests {
			source, err := os.ReadFile(name)
			require.NoError(t, err)
			demands = demands || strings.Contains(string(source), fmt.Sprintf("matrix.Of(%q)", b.Name))
		}
		require.True(t, demands, "no test in eventstore/%s uses matrix.Of(%q)", b.Name, b.Name)
	}
	folders, err := os.ReadDir(filepath.Join("..", "..", "eventstore"))
	require.NoError(t, err)
	for _, f := range folders {
		if f.IsDir() && f.Name() != "storetest" && f.Name() != "testdata" {
			matrix.Of(f.Name())
		}
	}
}

func table() string {
	backends := matrix.Backends()
	var b strings.Builder
	row := func(name string, cell func(storetest.Features) string) {
		fmt.Fprintf(&b, "| %s |", name)
		for _, backend := range backends {
			fmt.Fprintf(&b, " %s |", cell(backend.Features))
		}
		b.WriteString("\n")
	}
	fmt.Fprint(&b, "| |")
	for _, backend := range backends {
		fmt.Fprintf(&b, " %s |", backend.Name)
	}
	b.WriteString("\n| --- |" + strings.Repeat(" --- |", len(backends)) + "\n")
	yes := func(of func(storetest.Features) bool) func(storetest.Features) string {
		return func(f storetest.Features) string {
			if of(f) {
				return "yes"
			}
			return "no"
		}
	}
	queries := func(of func(storetest.Features) storetest.QueryKinds) func(storetest.Features) string {
		return func(f storetest.Features) string {
			switch kinds := of(f); kinds {
			case storetest.EveryQuery:
				return "all"
			case 0:
				return "no"
			default:
				return strings.ReplaceAll(kinds.String(), "+", ", ")
			}
		}
	}
	row("reads forward, queries by", queries(func(f storetest.Features) storetest.QueryKinds {
		return f.Forward | storetest.QueryAll | storetest.QueryStream
	}))
	row("reads backward", queries(func(f storetest.Features) storetest.QueryKinds { return f.Backward }))
	row("subscriptions", queries(func(f storetest.Features) storetest.QueryKinds {
		return f.Subscribe | storetest.QueryAll | storetest.QueryStream
	}))
	row("boundaries (DCB)", queries(func(f storetest.Features) storetest.QueryKinds { return f.NoneMatch }))
	row("commits of several streams", yes(func(f storetest.Features) bool { return f.MultiStream }))
	row("conditions on other streams", yes(func(f storetest.Features) bool { return f.ForeignConditions }))
	row("positions 1, 2, 3, … without holes", yes(func(f storetest.Features) bool { return f.Contiguous }))
	row("an idempotency key is unique in", func(f storetest.Features) string {
		if f.KeyScope == storetest.KeysInLog {
			return "the log"
		}
		return "its stream"
	})
	row("commands of an aggregate are pipelined", yes(func(f storetest.Features) bool { return f.Enqueue }))
	row("the log has an id", yes(func(f storetest.Features) bool { return f.LogID }))
	row("the log outlives the process", yes(func(f storetest.Features) bool { return f.Reopen }))
	row("works in `synctest` bubbles", yes(func(f storetest.Features) bool { return f.Bubble }))
	limits := func(f storetest.Features) eventstore.Limits {
		if f.Limits == (eventstore.Limits{}) {
			return eventstore.DefaultLimits()
		}
		return f.Limits
	}
	row("events in a commit, at most", func(f storetest.Features) string { return fmt.Sprint(limits(f).EventsPerCommit) })
	row("bytes of an event, at most", func(f storetest.Features) string { return fmt.Sprint(limits(f).EventBytes) })
	return b.String()
}
