package saga_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

const comingFrom = "../docs/coming-from.md"

// TestComingFrom_Limits runs what the page shows of limits.
func TestComingFrom_Limits(t *testing.T) {
	t.Parallel()
	call := func(saga.Step) (string, error) { return "called", nil }
	def := saga.Define("calling", func(s *saga.Run, _ string) (string, error) {
		return saga.Do(s, "call", call, saga.AtMost("gateway", 4), saga.Rate("gateway", 100, time.Minute))
	})
	sagatest.For(t, def).Start("r", "").Completed("r", "called")
}

// squeezed is code without indentation and blank lines.
func squeezed(code string) string {
	var b strings.Builder
	for line := range strings.Lines(code) {
		if line = strings.TrimSpace(line); line != "" {
			b.WriteString(line + "\n")
		}
	}
	return b.String()
}

// TestComingFrom_CodeCompiles: each block of deed's code on the page is, line by
// line, in a file that is compiled. Code of others is marked with a second word.
func TestComingFrom_CodeCompiles(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(comingFrom)
	require.NoError(t, err)
	var compiled []string
	for _, pattern := range []string{"*_test.go", "../examples/checkout/*.go"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			source, err := os.ReadFile(file)
			require.NoError(t, err)
			compiled = append(compiled, squeezed(string(source)))
		}
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(page), -1)
	require.GreaterOrEqual(t, len(blocks), 8)
	for _, block := range blocks {
		want, found := squeezed(block[1]), false
		for _, source := range compiled {
			found = found || strings.Contains(source, want)
		}
		require.True(t, found, "this block of %s is in no file that is compiled:\n%s", comingFrom, block[1])
	}
}

// TestComingFrom_Names: what the page names is there.
func TestComingFrom_Names(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(comingFrom)
	require.NoError(t, err)
	text := regexp.MustCompile("(?s)```go temporal\n.*?```").ReplaceAllString(string(page), "")

	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	there := map[string]bool{}
	set := token.NewFileSet()
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(set, file, nil, 0)
		require.NoError(t, err)
		for _, d := range parsed.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				name := d.Name.Name
				if d.Recv != nil {
					name = receiver(d.Recv.List[0].Type) + "." + name
				}
				there[name] = true
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						there[spec.Name.Name] = true
					case *ast.ValueSpec:
						for _, name := range spec.Names {
							there[name.Name] = true
						}
					}
				}
			}
		}
	}
	named := 0
	for _, match := range regexp.MustCompile(`\b(saga|s|Engine|Signal|Step)\.([A-Z]\w*)`).FindAllStringSubmatch(text, -1) {
		owner, name := match[1], match[2]
		switch {
		case owner == "saga":
		case owner == "s" && !strings.Contains("SKU Free", name):
			name = "Run." + name
		case owner == "s":
			continue // a state in an example
		default:
			name = owner + "." + name
		}
		named++
		require.True(t, there[name], "%s names %s, which is not there", comingFrom, match[0])
	}
	require.Greater(t, named, 100)

	for _, link := range regexp.MustCompile(`\]\((\.\./[^)#]+)\)`).FindAllStringSubmatch(text, -1) {
		_, err := os.Stat(filepath.Join("../docs", link[1]))
		require.NoError(t, err)
	}
}

// receiver is the name of a method's type.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.IndexListExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}
