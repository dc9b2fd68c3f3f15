package command_test

import (
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestExecute_TypicalMistakesDoNotCompile type-checks small programs; each
// wrong one says which message must name the culprit.
func TestExecute_TypicalMistakesDoNotCompile(t *testing.T) {
	t.Parallel()
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("needs the go command on the PATH, to compile what the programs import")
	}
	list := exec.CommandContext(t.Context(), goTool, "list", "-export", "-deps", "-f", "{{.ImportPath}}={{.Export}}", "github.com/deed-go/deed/command")
	list.Stderr = os.Stderr
	out, err := list.Output()
	require.NoError(t, err)
	compiled := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), "=")
		compiled[path] = file
	}
	files, err := filepath.Glob("testdata/compile/*.go")
	require.NoError(t, err)
	require.Greater(t, len(files), 5)
	want := regexp.MustCompile(`// want: (.*)`)
	for _, name := range files {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".go"), func(t *testing.T) {
			t.Parallel()
			source, err := os.ReadFile(name)
			require.NoError(t, err)
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, name, source, 0)
			require.NoError(t, err)
			var messages []string
			config := types.Config{
				Importer: importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(compiled[path]) }),
				Error:    func(err error) { messages = append(messages, err.Error()) },
			}
			_, _ = config.Check("main", fset, []*ast.File{file}, nil)
			if m := want.FindSubmatch(source); m != nil {
				require.NotEmpty(t, messages, "the program compiles, but should not")
				require.Regexp(t, string(m[1]), strings.Join(messages, "\n"))
			} else {
				require.Empty(t, messages)
			}
		})
	}
}
