package main

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// build returns the program, as it is installed.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "deedvet.exe")
	// Without the commit in it the program is the same as long as its code is,
	// and what go vet has remembered of it counts.
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", program, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return program
}

type outcome struct {
	stdout, stderr string
	code           int
}

func start(t *testing.T, dir, program string, args ...string) outcome {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		require.IsType(t, &exec.ExitError{}, err)
	}
	said := strings.Builder{}
	for line := range strings.Lines(stderr.String()) {
		if !strings.HasPrefix(line, "go: downloading ") {
			said.WriteString(line)
		}
	}
	return outcome{stdout.String(), said.String(), cmd.ProcessState.ExitCode()}
}

// TestDeedvet runs the program on the packages that the analyser is tested on.
func TestDeedvet(t *testing.T) {
	t.Parallel()
	program := build(t)
	module, err := filepath.Abs("../../saga/sagavet/testdata")
	require.NoError(t, err)

	t.Run("finds", func(t *testing.T) {
		t.Parallel()
		o := start(t, module, program, "./shop/clock")
		require.Equal(t, 1, o.code)
		require.Contains(t, o.stderr, "time.Now in a saga: it is another time at every replay; use s.Now()")
	})
	t.Run("finds nothing", func(t *testing.T) {
		t.Parallel()
		require.Equal(t, outcome{}, start(t, module, program, "./shop/good", "./shop/times"))
	})
	// What is known of functions must come along from package to package, and
	// from modules that are merely used only what counts of them.
	t.Run("as go vet's tool, across packages", func(t *testing.T) {
		t.Parallel()
		o := start(t, module, "go", "vet", "-vettool="+program, "./shop/helpers")
		require.Equal(t, 1, o.code)
		require.Contains(t, o.stderr, "times.Stamp in a saga: it comes down to time.Now (times.go:24) by way of now")
		require.Contains(t, o.stderr, "times.Box.Open in a saga: it comes down to uuid.NewString")
		require.Contains(t, o.stderr, "ids.Next in a saga: it comes down to rand.Int")
		require.NotContains(t, o.stderr, "ids.Name")
		require.NotContains(t, o.stderr, "ids.Sum")
		require.NotContains(t, o.stderr, "ids.Log")
	})
	t.Run("json", func(t *testing.T) {
		t.Parallel()
		o := start(t, module, program, "-json", "./shop/random")
		require.Equal(t, 0, o.code)
		require.Contains(t, o.stdout, `"category": "random"`)
	})
	t.Run("no such package", func(t *testing.T) {
		t.Parallel()
		o := start(t, module, program, "./shop/nothing")
		require.Equal(t, 1, o.code)
		require.Contains(t, o.stderr, "shop/nothing")
	})
}

// TestDeedvet_OnTheRealPackage: what the analyser is tested on is made up, so
// here is what it says of code that uses package saga itself.
func TestDeedvet_OnTheRealPackage(t *testing.T) {
	t.Parallel()
	o := start(t, ".", build(t), "./testdata/shop")
	require.Equal(t, 1, o.code)
	var told []string
	for line := range strings.Lines(o.stderr) {
		_, what, _ := strings.Cut(filepath.ToSlash(line), "testdata/shop/")
		told = append(told, strings.TrimSpace(what))
	}
	require.Equal(t, []string{
		"shop.go:65:2: steps in the order of a map, which is another one at every replay; sort its keys first: for _, key := range slices.Sorted(maps.Keys(in.Lines))",
		"shop.go:66:75: the run is used inside a step: steps do not nest; take what is needed of it before the step, and use what the step is given",
		"shop.go:70:9: today in a saga: it comes down to time.Now (shop.go:76), and that is another time at every replay; give it s.Now() as an argument, or record what it returns as a step, with saga.Local",
		"shop.go:70:40: time.Now in a saga: it is another time at every replay; use s.Now()",
		"shop.go:72:14: time.Now in the start of a saga: it is another time at every replay; use the time of the event, which is recorded",
	}, told)
}

func TestRun_Usage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--help"}, {"-help"}, {"-h"}, {"help"}} {
		var stdout, stderr bytes.Buffer
		require.Equal(t, 0, run(args, &stdout, &stderr))
		require.Equal(t, usage, stdout.String())
		require.Empty(t, stderr.String())
	}
	var stdout, stderr bytes.Buffer
	require.Equal(t, 2, run(nil, &stdout, &stderr))
	require.Empty(t, stdout.String())
	require.Equal(t, usage, stderr.String())
}

// TestOwnSagas: the sagas of this repository, those of its tests too, do the
// same at a replay, or say why not. Without DEED_TEST_LONG the packages that
// stand on everything are left to .ci/run, which looks at all.
func TestOwnSagas(t *testing.T) {
	t.Parallel()
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	found := map[string]bool{}
	require.NoError(t, filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		relative = filepath.ToSlash(relative)
		if entry.IsDir() {
			base := entry.Name()
			nested, _ := filepath.Glob(filepath.Join(name, "go.mod"))
			if relative != "." && (strings.HasPrefix(base, ".") || base == "testdata" || base == "bin" || len(nested) > 0) {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		// Reading the files also tells go test that this test depends on them.
		text, err := os.ReadFile(name)
		if err == nil && bytes.Contains(text, []byte("*saga.Run")) {
			found["./"+filepath.ToSlash(filepath.Dir(relative))] = true
		}
		return err
	}))
	require.Contains(t, found, "./saga")
	require.Contains(t, found, "./examples/fines")
	args := []string{}
	for dir := range found {
		if os.Getenv("DEED_TEST_LONG") != "" || strings.HasPrefix(dir, "./saga") || strings.HasPrefix(dir, "./examples") {
			args = append(args, dir)
		}
	}
	require.Equal(t, outcome{}, start(t, root, build(t), args...))
}
