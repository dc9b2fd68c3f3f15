package sagavet_test

import (
	"fmt"

	"golang.org/x/tools/go/analysis"
	"golang.org/x/tools/go/analysis/checker"
	"golang.org/x/tools/go/packages"

	"github.com/deed-go/deed/saga/sagavet"
)

// The command deedvet is all that is needed to check a module. This is how a
// program of one's own does it, together with other analysers if need be.
func Example() {
	pkgs, err := packages.Load(&packages.Config{Mode: packages.LoadAllSyntax | packages.NeedModule, Dir: "testdata"}, "./shop/greeting")
	if err != nil {
		panic(err)
	}
	graph, err := checker.Analyze([]*analysis.Analyzer{sagavet.Analyzer}, pkgs, nil)
	if err != nil {
		panic(err)
	}
	for _, root := range graph.Roots {
		for _, d := range root.Diagnostics {
			fmt.Printf("line %d: %s\n", root.Package.Fset.Position(d.Pos).Line, d.Message)
		}
	}
	// Output:
	// line 11: steps in the order of a map, which is another one at every replay; sort its keys first: for _, key := range slices.Sorted(maps.Keys(names))
	// line 18: greeting in a saga: it comes down to time.Now (greeting.go:22), and that is another time at every replay; give it s.Now() as an argument, or record what it returns as a step, with saga.Local
}
