// Package layers holds the test that keeps the arrows between the project's
// packages pointing down. It has no code of its own and imports nothing.
package layers

import (
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/deed-go/deed"

// layers says for every package which other packages of the project its
// non-test files may import, besides what those may import themselves. "."
// is package deed. A name that ends in /... stands for the packages below it.
//
// Test files may import everything: only backends' and engines' users need to
// be spared, and tests have none.
var layers = map[string][]string{
	"eventstore":         {},
	"internal/...":       {"eventstore"},
	"internal/clock":     {},
	"internal/ownership": {},
	"internal/freeport":  {},
	"internal/pgtest":    {"internal/freeport"},
	"projection":         {"eventstore", "internal/..."},
	"aggregate":          {"eventstore", "internal/..."},
	"command":            {"aggregate"},
	"query":              {"projection"},
	"saga":               {"command", "projection"},
	".":                  {"saga", "query"},

	// Backends stand on the contract and the state interface; nothing but the
	// programs, the test kits and tests imports one.
	"eventstore/memory":   {"projection"},
	"eventstore/sqlite":   {"projection"},
	"eventstore/postgres": {"projection"},
	"eventstore/nats":     {"internal/..."},
	"eventstore/esdb":     {"internal/...", "eventstore/esdb/internal/..."},

	// What stands between the adapter and the client knows nothing of deed.
	"eventstore/esdb/internal/driver":       {},
	"eventstore/esdb/internal/supervisor":   {},
	"eventstore/esdb/internal/eventstoredb": {"eventstore/esdb/internal/driver", "eventstore/esdb/internal/supervisor"},

	// The conformance suites know no backend but the oracle.
	"eventstore/storetest": {"eventstore/memory"},
	"internal/matrix":      {"eventstore/storetest"},
	"projection/statetest": {"eventstore/memory"},

	// Test kits run the real engine on the memory store.
	"aggregate/aggregatetest":   {"command", "eventstore/memory"},
	"projection/projectiontest": {"query", "eventstore/memory"},
	"saga/sagatest":             {"saga", "query", "eventstore/memory"},

	// The analyser reads code that uses deed, and knows it by name only.
	"saga/sagavet": {},
	"cmd/deedvet":  {"saga/sagavet"},

	"cmd/...":      {".", "eventstore/memory", "eventstore/sqlite", "eventstore/postgres", "eventstore/nats", "eventstore/esdb"},
	"examples/...": {".", "eventstore/memory", "eventstore/sqlite", "eventstore/postgres", "eventstore/nats", "eventstore/esdb"},
}

// testOnly are libraries that must not become part of what users build; the
// suites and kits, which only tests import, may use them.
var testOnly = []string{
	"testing",
	"github.com/stretchr/testify",
	"github.com/anishathalye/porcupine",
	"go.uber.org/goleak",
	"pgregory.net/rapid",
}

// programOnly are libraries of the command line: what users import must not
// make them build those.
var programOnly = []string{
	"github.com/alecthomas/kong",
	"github.com/schollz/progressbar",
	"github.com/mattn/go-isatty",
}

// analysisOnly are libraries to analyse code with, for those who do.
var analysisOnly = []string{"golang.org/x/tools"}

func isAnalyser(pkg string) bool { return pkg == "saga/sagavet" || pkg == "cmd/deedvet" }

func isProgram(pkg string) bool {
	return strings.HasPrefix(pkg, "cmd/") || strings.HasPrefix(pkg, "examples/")
}

func isTestKit(pkg string) bool { return strings.HasSuffix(pkg, "test") }

// TestLayers_ArrowsPointDown reads the imports of every file of the project.
func TestLayers_ArrowsPointDown(t *testing.T) {
	t.Parallel()
	for pkg, files := range packages(t) {
		if !slices.ContainsFunc(slices.Collect(maps.Values(files)), func(f file) bool { return !f.test }) {
			continue
		}
		rule, ok := ruleFor(pkg)
		if !ok {
			t.Errorf("package %q is in no layer: add it to the table in internal/layers", pkg)
			continue
		}
		allowed := reach(rule)
		for name, f := range files {
			if f.test {
				continue
			}
			for _, imported := range f.imports {
				inside, ours := within(imported)
				switch {
				case ours && inside != pkg && !matches(allowed, inside):
					t.Errorf("%s: package %q must not import %q: that arrow points up; it may import %s", name, pkg, inside, sorted(allowed))
				case !ours && !isTestKit(pkg) && isOf(testOnly, imported):
					t.Errorf("%s: package %q must not import %q outside of its tests: users would build it", name, pkg, imported)
				case !ours && !isProgram(pkg) && isOf(programOnly, imported):
					t.Errorf("%s: package %q must not import %q: it is for programs, and users would build it", name, pkg, imported)
				case !ours && !isAnalyser(pkg) && isOf(analysisOnly, imported):
					t.Errorf("%s: package %q must not import %q: it is for the analyser, and users would build it", name, pkg, imported)
				}
			}
		}
	}
}

// isOf reports whether a package is of one of the modules.
func isOf(modules []string, pkg string) bool {
	return slices.ContainsFunc(modules, func(m string) bool { return pkg == m || strings.HasPrefix(pkg, m+"/") })
}

// TestLayers_DocsSayWhatMayBeImported keeps the sentence that a reader learns
// the architecture from in every package's documentation.
func TestLayers_DocsSayWhatMayBeImported(t *testing.T) {
	t.Parallel()
	for pkg, files := range packages(t) {
		if strings.HasPrefix(pkg, "examples") || strings.HasPrefix(pkg, "cmd") {
			continue
		}
		var doc strings.Builder
		for _, f := range files {
			doc.WriteString(f.doc)
		}
		if !strings.Contains(doc.String(), "import") {
			t.Errorf("package %q: its documentation does not say in one sentence what it may import", pkg)
		}
	}
}

// ruleFor returns the key in layers: the package's own, or that of the nearest
// folder above it that stands for all packages below.
func ruleFor(pkg string) (string, bool) {
	if _, ok := layers[pkg]; ok {
		return pkg, true
	}
	for dir := path.Dir(pkg); dir != "."; dir = path.Dir(dir) {
		if _, ok := layers[dir+"/..."]; ok {
			return dir + "/...", true
		}
	}
	return "", false
}

// reach returns everything below a rule: what it names, and what those name.
func reach(rule string) map[string]bool {
	seen := map[string]bool{}
	var visit func(string)
	visit = func(r string) {
		for _, below := range layers[r] {
			if !seen[below] {
				seen[below] = true
				visit(below)
			}
		}
	}
	visit(rule)
	if strings.HasSuffix(rule, "/...") {
		seen[rule] = true // neighbours
	}
	return seen
}

func matches(allowed map[string]bool, pkg string) bool {
	if allowed[pkg] {
		return true
	}
	for a := range allowed {
		if prefix, ok := strings.CutSuffix(a, "..."); ok && strings.HasPrefix(pkg, prefix) {
			return true
		}
	}
	return false
}

func within(imported string) (string, bool) {
	if imported == module {
		return ".", true
	}
	return strings.CutPrefix(imported, module+"/")
}

func sorted(set map[string]bool) string {
	if len(set) == 0 {
		return "nothing of the project"
	}
	return strings.Join(slices.Sorted(maps.Keys(set)), ", ")
}

type file struct {
	test    bool
	doc     string
	imports []string
}

// packages parses every Go file below the module's root: package folder ->
// file name -> file. Nested modules and testdata are left out.
func packages(t *testing.T) map[string]map[string]file {
	t.Helper()
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	found := map[string]map[string]file{}
	err = filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
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
			if relative != "." && (strings.HasPrefix(base, ".") || base == "testdata" || base == "bin") {
				return filepath.SkipDir
			}
			if nested, _ := filepath.Glob(filepath.Join(name, "go.mod")); relative != "." && len(nested) > 0 {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(relative, ".go") {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		f := file{test: strings.HasSuffix(relative, "_test.go"), doc: parsed.Doc.Text()}
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			f.imports = append(f.imports, imported)
		}
		pkg := path.Dir(relative)
		if found[pkg] == nil {
			found[pkg] = map[string]file{}
		}
		found[pkg][relative] = f
		return nil
	})
	require.NoError(t, err)
	require.Contains(t, found, "eventstore", "the module's root is not where it is looked for: %s", root)
	return found
}
