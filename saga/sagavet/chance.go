package sagavet

import (
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"slices"
	"strings"

	"golang.org/x/tools/go/analysis"
)

// chance is the fact that what a function does is not up to its arguments
// alone. Packages that import it learn it this way.
type chance struct {
	Kind   kind
	Advice advice
	Calls  []string // what it calls, what that calls, …, and at last the source
	At     string   // where the source is: file.go:12
}

// AFact makes it a fact.
func (*chance) AFact() {}

func (c *chance) String() string { return c.path() }

// path says how the function comes to the source.
func (c *chance) path() string {
	last := len(c.Calls) - 1
	way := c.Calls[:last]
	const most = 4
	if n := len(way); n > most {
		way = slices.Concat(way[:most/2], []string{"…"}, way[n-most/2:])
	}
	by := ""
	if len(way) > 0 {
		by = " by way of " + strings.Join(way, ", ")
	}
	return fmt.Sprintf("it comes down to %s (%s)%s", c.Calls[last], c.At, by)
}

// function is what is known of a function, or of a package's variable that
// holds one, without a run of its own.
type function struct {
	object types.Object
	calls  []types.Object
	seen   map[types.Object]bool
	chance *chance
}

func (f *function) call(callee types.Object) {
	if f.seen == nil {
		f.seen = map[types.Object]bool{}
	}
	if !f.seen[callee] {
		f.seen[callee] = true
		f.calls = append(f.calls, callee)
	}
}

// spread passes on what functions call to those who call them, one call further
// at a time, so that the shortest way to a source is the one that is told. It
// ends when nothing is new, whoever calls whom.
func (c *checker) spread() {
	for {
		found := map[*function]*chance{}
		for _, f := range c.functions {
			if f.chance != nil {
				continue
			}
			for _, callee := range f.calls {
				if below := c.chanceOf(callee); below != nil {
					found[f] = &chance{below.Kind, below.Advice, append([]string{nameOf(callee, c.pass.Pkg)}, below.Calls...), below.At}
					break
				}
			}
		}
		if len(found) == 0 {
			return
		}
		for f, chance := range found {
			f.chance = chance
		}
	}
}

// chanceOf returns what is known of a function, from this package or from the
// facts of others.
func (c *checker) chanceOf(obj types.Object) *chance {
	if f, ok := c.byObject[obj]; ok {
		return f.chance
	}
	if obj.Pkg() == nil || obj.Pkg() == c.pass.Pkg {
		return nil
	}
	var fact chance
	if c.pass.ImportObjectFact(obj, &fact) {
		return &fact
	}
	return nil
}

// export tells other packages.
func (c *checker) export() {
	for _, f := range c.functions {
		if f.chance == nil || !f.object.Exported() {
			continue
		}
		// Of somebody else's library only what comes back counts: a logger may look
		// at the clock.
		if fn, ok := f.object.(*types.Func); ok && c.foreign && fn.Signature().Results().Len() == 0 {
			continue
		}
		c.pass.ExportObjectFact(f.object, f.chance)
	}
}

// isForeign reports whether a package is of a module that is merely used: what
// it does with goroutines and files is its business, as it is in the standard
// library, and only the time and random numbers are taken notice of.
func isForeign(pass *analysis.Pass) bool { return pass.Module != nil && pass.Module.Version != "" }

// isStandard reports whether a package is of the standard library, which is
// judged by the list of sources alone.
func isStandard(pass *analysis.Pass) bool {
	first, _, _ := strings.Cut(pass.Pkg.Path(), "/")
	if first == "command-line-arguments" {
		return false // files that were named, without a module
	}
	return (pass.Module == nil || pass.Module.Path == "" || pass.Module.Path == "std") && !strings.Contains(first, ".")
}

// where is a position as the facts tell it: the same on every machine.
func (c *checker) where(pos token.Pos) string {
	at := c.pass.Fset.Position(pos)
	name := at.Filename[strings.LastIndexAny(at.Filename, `/\`)+1:]
	return fmt.Sprintf("%s:%d", name, at.Line)
}

// add makes a function known, and returns it.
func (c *checker) add(id *ast.Ident) *function {
	obj := c.pass.TypesInfo.Defs[id]
	if obj == nil {
		return nil
	}
	f := &function{object: obj}
	c.functions = append(c.functions, f)
	c.byObject[obj] = f
	return f
}
