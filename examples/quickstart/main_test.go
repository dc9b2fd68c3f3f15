package main

import (
	"go/format"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate/aggregatetest"
)

func TestDeposit(t *testing.T) {
	t.Parallel()
	aggregatetest.For(t, accounts).
		When(Deposit{"ann", 500}).
		Then(Opened{"ann"}, Deposited{500})
	aggregatetest.For(t, accounts).
		Given(Opened{"ann"}, Deposited{100}).
		When(Deposit{"ann", 500}).
		Then(Deposited{500})
	aggregatetest.For(t, accounts).
		Given(Opened{"ann"}).
		When(Deposit{"ann", 0}).
		RejectedSaying("a deposit of 0 cents is none")
}

// TestRun runs the program twice on one file: the second run finds what
// the first one left.
func TestRun(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, expected := range []string{"ann has 500 cents\n", "ann has 1000 cents\n"} {
		require.Equal(t, expected, output(t, func() error { return run(t.Context()) }))
	}
}

// TestSource keeps the program short enough for a first screen, and the
// README's first Go block equal to it.
func TestSource(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("main.go")
	require.NoError(t, err)
	formatted, err := format.Source(source)
	require.NoError(t, err)
	require.Equal(t, string(formatted), string(source), "main.go is not gofmt-ed")

	_, program, found := strings.Cut(string(source), "package main\n")
	require.True(t, found)
	lines := 1 // package main
	for line := range strings.Lines(program) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "//") {
			lines++
		}
	}
	require.LessOrEqual(t, lines, 60, "lines of the program, without blanks and comments")

	readme, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	_, block, found := strings.Cut(string(readme), "```go\n")
	require.True(t, found, "README.md has no Go block")
	block, _, found = strings.Cut(block, "```")
	require.True(t, found)
	require.Equal(t, "package main\n"+program, block, "README.md's first Go block is not examples/quickstart/main.go from its package line on")
}

// output returns what the function prints.
func output(t *testing.T, print func() error) string {
	t.Helper()
	file, err := os.Create("output.txt")
	require.NoError(t, err)
	standard := os.Stdout
	os.Stdout = file
	err = print()
	os.Stdout = standard
	require.NoError(t, err)
	require.NoError(t, file.Close())
	text, err := os.ReadFile("output.txt")
	require.NoError(t, err)
	return string(text)
}
