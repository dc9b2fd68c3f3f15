package sagavet

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"slices"

	"golang.org/x/tools/go/analysis"
	"golang.org/x/tools/go/types/typeutil"
)

// Analyzer reports code of sagas that would not do the same when the run is
// replayed. It passes what it finds out about functions on to the packages that
// import them, so a driver must analyse dependencies too, as go vet does.
var Analyzer = &analysis.Analyzer{
	Name: "sagavet",
	Doc: `report code of sagas that is not deterministic

A saga of github.com/deed-go/deed is run again from its history whenever it
goes on, and must then ask for the same steps. Reported are, outside of steps:
the time, random values, I/O, goroutines, channels and locks, also in the
functions that are called; steps in the order of a map; a run that is used in a
step or kept.

Vouch for a line, or for a function, with a comment on it or above it:

	//deed:deterministic REASON`,
	URL:       "https://pkg.go.dev/" + sagaPath + "/sagavet",
	Run:       run,
	FactTypes: []analysis.Fact{(*chance)(nil)},
}

// place is where code stands.
type place uint8

const (
	elsewhere place = iota // no saga: what it does counts for who calls it
	inSaga
	inStart    // the function given to saga.On
	inStep     // may do anything, but use the run
	unfollowed // a goroutine that has been reported
)

// scope is what surrounds a piece of code.
type scope struct {
	place    place
	run      string    // the name of the run
	body     ast.Node  // the saga's function
	branch   bool      // it uses no run but its own
	function *function // whose code it is, elsewhere
}

// site is the use of a function in a saga, judged when all functions are known.
type site struct {
	id     *ast.Ident
	object types.Object
	scope  scope
}

type checker struct {
	pass       *analysis.Pass
	foreign    bool
	directives *directives
	functions  []*function
	byObject   map[types.Object]*function
	sites      []site
	findings   []analysis.Diagnostic
	stepLits   map[*ast.FuncLit]bool // literals in variables that are used in steps only
	carriers   map[types.Object]bool // variables that hold functions that use the run
}

func run(pass *analysis.Pass) (any, error) {
	if isStandard(pass) || isSaga(pass.Pkg) {
		return nil, nil
	}
	c := &checker{
		pass: pass, foreign: isForeign(pass), directives: directivesOf(pass.Fset, pass.Files),
		byObject: map[types.Object]*function{},
		stepLits: map[*ast.FuncLit]bool{}, carriers: map[types.Object]bool{},
	}
	if slices.ContainsFunc(pass.Pkg.Imports(), isSaga) {
		c.prepare()
	}
	for _, file := range pass.Files {
		for _, decl := range file.Decls {
			c.declaration(decl)
		}
	}
	c.spread()
	c.export()
	for _, s := range c.sites {
		if found := c.chanceOf(s.object); found != nil {
			c.report(s.id, found.Kind, "%s in %s: %s, and that %s; %s",
				nameOf(s.object, pass.Pkg), s.scope.place, found.path(), found.Kind.why(), advise(found.Advice, s.scope, true))
		}
	}
	for _, comment := range c.directives.bare {
		c.findings = append(c.findings, analysis.Diagnostic{
			Pos: comment.Pos(), End: comment.End(), Category: string(kindDirective),
			Message: "a " + directiveText + " without a reason vouches for nothing; say why it is deterministic: " + directiveText + " REASON",
		})
	}
	slices.SortStableFunc(c.findings, func(a, b analysis.Diagnostic) int { return cmp.Compare(a.Pos, b.Pos) })
	for _, d := range c.findings {
		pass.Report(d)
	}
	return nil, nil
}

func (p place) String() string {
	if p == inStart {
		return "the start of a saga"
	}
	return "a saga"
}

// assignment is a function literal in a variable.
type assignment struct {
	variable types.Object
	lit      *ast.FuncLit
}

// prepare looks for functions in variables: those that are nothing but steps, or
// parts of steps, and those that use the run.
func (c *checker) prepare() {
	var (
		assignments []assignment
		steps       []ast.Node                      // what is done in steps
		uses        = map[types.Object][]ast.Node{} // of variables
	)
	assign := func(name, value ast.Expr) {
		id, ok := ast.Unparen(name).(*ast.Ident)
		lit, isLit := ast.Unparen(value).(*ast.FuncLit)
		if !ok || !isLit {
			return
		}
		if variable := c.pass.TypesInfo.ObjectOf(id); variable != nil {
			assignments = append(assignments, assignment{variable, lit})
		}
	}
	for _, file := range c.pass.Files {
		assigned := map[ast.Expr]bool{}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncLit:
				if anyOf(c.pass.TypesInfo.TypeOf(n).(*types.Signature).Params(), isStep) {
					steps = append(steps, n)
				}
			case *ast.CallExpr:
				for i, arg := range n.Args {
					if _, ok := ast.Unparen(arg).(*ast.CallExpr); !ok && c.isStepArgument(n, i) {
						steps = append(steps, arg)
					}
				}
			case *ast.AssignStmt:
				for i := range n.Lhs {
					assigned[n.Lhs[i]] = true
					if len(n.Lhs) == len(n.Rhs) {
						assign(n.Lhs[i], n.Rhs[i])
					}
				}
			case *ast.ValueSpec:
				for i := range min(len(n.Names), len(n.Values)) {
					assign(n.Names[i], n.Values[i])
				}
			case *ast.Ident:
				if v, ok := c.pass.TypesInfo.Uses[n].(*types.Var); ok && !assigned[n] {
					uses[v] = append(uses[v], n)
				}
			}
			return true
		})
	}
	inSteps := func(n ast.Node) bool {
		return slices.ContainsFunc(steps, func(step ast.Node) bool { return step.Pos() <= n.Pos() && n.End() <= step.End() })
	}
	for more := true; more; {
		more = false
		for _, a := range assignments {
			if found := uses[a.variable]; !c.stepLits[a.lit] && len(found) > 0 && !slices.ContainsFunc(found, func(n ast.Node) bool { return !inSteps(n) }) {
				c.stepLits[a.lit] = true
				steps = append(steps, a.lit)
				more = true
			}
			if !c.carriers[a.variable] && c.usesRun(a.lit.Body) {
				c.carriers[a.variable] = true
				more = true
			}
		}
	}
}

// isStart reports whether something is saga.On.
func isStart(callee types.Object) bool {
	return isSaga(callee.Pkg()) && callee.Name() == "On" && callee.Parent() == callee.Pkg().Scope()
}

// isStepArgument reports whether a call into package saga makes a step of the
// function that is its argument i: any that is not given the run, but that of
// saga.On.
func (c *checker) isStepArgument(call *ast.CallExpr, i int) bool {
	callee := typeutil.Callee(c.pass.TypesInfo, call)
	if callee == nil || !isSaga(callee.Pkg()) || isStart(callee) {
		return false
	}
	signature, ok := c.pass.TypesInfo.TypeOf(call.Fun).(*types.Signature)
	if !ok {
		return false
	}
	params := signature.Params()
	var t types.Type
	switch last := params.Len() - 1; {
	case i < last || i == last && (!signature.Variadic() || call.Ellipsis.IsValid()):
		t = params.At(i).Type()
	case signature.Variadic():
		t = params.At(last).Type().(*types.Slice).Elem()
	default:
		return false
	}
	given, ok := t.Underlying().(*types.Signature)
	return ok && !anyOf(given.Params(), isRun)
}

func (c *checker) declaration(decl ast.Decl) {
	if c.directives.cover(decl.Pos()) {
		return
	}
	switch decl := decl.(type) {
	case *ast.FuncDecl:
		if decl.Body == nil {
			return
		}
		fn, ok := c.pass.TypesInfo.Defs[decl.Name].(*types.Func)
		if !ok {
			return
		}
		s, fixed := c.placeOf(fn.Signature(), decl)
		if !fixed {
			s = scope{function: c.add(decl.Name)}
		}
		c.visit(decl.Body, s)
	case *ast.GenDecl:
		for _, spec := range decl.Specs {
			spec, ok := spec.(*ast.ValueSpec)
			if !ok || c.directives.cover(spec.Pos()) {
				continue
			}
			for i, value := range spec.Values {
				var s scope
				if t := c.pass.TypesInfo.TypeOf(value); t != nil && len(spec.Names) == len(spec.Values) {
					if _, ok := t.Underlying().(*types.Signature); ok {
						s.function = c.add(spec.Names[i])
					}
				}
				c.visit(value, s)
			}
		}
	}
}

// placeOf says where the body of a function stands by what the function is
// given; false if that says nothing.
func (c *checker) placeOf(signature *types.Signature, body ast.Node) (scope, bool) {
	switch {
	case anyOf(signature.Params(), isRun):
		name := "s"
		for v := range signature.Params().Variables() {
			if isRun(v.Type()) && v.Name() != "" && v.Name() != "_" {
				name = v.Name()
			}
		}
		return scope{place: inSaga, run: name, body: body}, true
	case anyOf(signature.Params(), isStep):
		return scope{place: inStep}, true
	default:
		return scope{}, false
	}
}

func (c *checker) visit(root ast.Node, s scope) {
	ast.Inspect(root, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			c.literal(n, s, false)
			return false
		case *ast.CallExpr:
			return c.call(n, s)
		case *ast.GoStmt:
			c.found(n, source{kindGoroutine, "a go statement", adviceBranches}, s, c.runOf(n.Call))
			c.visitUnfollowed(n.Call.Fun, s)
			for _, arg := range n.Call.Args {
				c.visitUnfollowed(arg, s)
			}
			return false
		case *ast.SelectStmt:
			c.found(n, source{kindChannel, "a select statement", adviceAwait}, s, "")
			for _, clause := range n.Body.List {
				for _, stmt := range clause.(*ast.CommClause).Body {
					c.visit(stmt, s)
				}
			}
			return false
		case *ast.SendStmt:
			c.found(n, source{kindChannel, "a send on a channel", adviceStep}, s, "")
		case *ast.UnaryExpr:
			if n.Op == token.ARROW {
				c.found(n, source{kindChannel, "a receive from a channel", adviceAwait}, s, "")
			}
		case *ast.RangeStmt:
			c.loop(n, s)
		case *ast.AssignStmt:
			c.kept(n, s)
		case *ast.CompositeLit:
			for _, element := range n.Elts {
				if kv, ok := element.(*ast.KeyValueExpr); ok {
					element = kv.Value
				}
				if s.place == inSaga && c.isRunExpr(element) {
					c.complain(element, "the run is kept in a value: it is good for this one call of the function; pass it to functions as a parameter")
				}
			}
		case *ast.SelectorExpr:
			if c.isRunExpr(n.X) && n.Sel.Name == "ID" {
				return false // it is the same everywhere, and for ever
			}
		case *ast.Ident:
			c.use(n, s)
		}
		return true
	})
}

// visitUnfollowed looks at what is handed to another goroutine: values, and a
// function, which is not looked into.
func (c *checker) visitUnfollowed(n ast.Expr, s scope) {
	if t := c.pass.TypesInfo.TypeOf(n); t != nil {
		if _, ok := t.Underlying().(*types.Signature); ok {
			switch fn := ast.Unparen(n).(type) {
			case *ast.FuncLit:
				s = scope{place: unfollowed}
			case *ast.SelectorExpr:
				n = fn.X
			case *ast.Ident:
				return
			}
		}
	}
	c.visit(n, s)
}

// literal looks at a function that is made here. One that is made in a saga and
// given a run may be a branch, wherever saga.All is called; a compensation is
// not, and is given the run that surrounds it, if that is not a branch's.
func (c *checker) literal(lit *ast.FuncLit, s scope, compensation bool) {
	if c.directives.cover(lit.Pos()) {
		return
	}
	signature, ok := c.pass.TypesInfo.TypeOf(lit).(*types.Signature)
	if !ok {
		return
	}
	switch given, fixed := c.placeOf(signature, lit); {
	case fixed:
		given.branch = s.branch || given.place == inSaga && s.place == inSaga && !compensation
		s = given
	case c.stepLits[lit]:
		s = scope{place: inStep}
	}
	c.visit(lit.Body, s)
}

// call looks at a call, and reports whether to look at its parts in the usual
// way.
func (c *checker) call(call *ast.CallExpr, s scope) bool {
	callee := typeutil.Callee(c.pass.TypesInfo, call)
	if callee == nil {
		return true
	}
	if known := sourceOf(callee); known != nil && known.kind == kindGoroutine {
		c.found(call, *known, s, c.runOf(call))
		if selector, ok := ast.Unparen(call.Fun).(*ast.SelectorExpr); ok {
			c.visit(selector.X, s)
		}
		for _, arg := range call.Args {
			c.visitUnfollowed(arg, s)
		}
		return false
	}
	if !isSaga(callee.Pkg()) {
		return true
	}
	c.visit(call.Fun, s)
	for i, arg := range call.Args {
		if isStart(callee) {
			c.visit(arg, scope{place: inStart, body: arg})
			continue
		}
		if !c.isStepArgument(call, i) {
			if lit, ok := ast.Unparen(arg).(*ast.FuncLit); ok && callee.Name() == "OnRollback" {
				c.literal(lit, s, true)
			} else {
				c.visit(arg, s)
			}
			continue
		}
		switch arg := ast.Unparen(arg).(type) {
		case *ast.FuncLit:
			if !c.directives.cover(arg.Pos()) {
				c.visit(arg.Body, scope{place: inStep})
			}
		case *ast.CallExpr: // makes the function, now
			for _, a := range arg.Args {
				c.visit(a, s)
			}
		}
	}
	return false
}

// use looks at a name: a source, a function that may turn out to be one, or the
// run where it must not be.
func (c *checker) use(id *ast.Ident, s scope) {
	obj := c.pass.TypesInfo.Uses[id]
	switch o := obj.(type) {
	case *types.Func:
		obj = o.Origin()
	case *types.Var:
		if s.place == inStep && isRun(o.Type()) {
			c.complain(id, "the run is used inside a step: steps do not nest; take what is needed of it before the step, and use what the step is given")
			return
		}
		if s.branch && isRun(o.Type()) && !within(s.body, o) {
			c.complain(id, "the run of the surroundings is used in a function that is given one: a branch uses no run but its own")
			return
		}
		if o.Pkg() == nil || o.Parent() != o.Pkg().Scope() {
			return
		}
	default:
		return
	}
	if known := sourceOf(obj); known != nil {
		c.found(id, *known, s, "")
		return
	}
	switch {
	case s.place == inSaga, s.place == inStart:
		if !isSaga(obj.Pkg()) {
			c.sites = append(c.sites, site{id, obj, s})
		}
	case s.function != nil && !c.directives.cover(id.Pos()):
		s.function.call(obj)
	}
}

// found takes note of a source: it is reported in a saga, and remembered of a
// function.
func (c *checker) found(n ast.Node, what source, s scope, more string) {
	switch s.place {
	case inSaga, inStart:
		c.report(n, what.kind, "%s in %s: it %s; %s%s", what.name, s.place, what.kind.why(), advise(what.advice, s, false), more)
	case elsewhere:
		if s.function == nil || s.function.chance != nil || !what.kind.travels() || c.directives.cover(n.Pos()) {
			return
		}
		if c.foreign && what.kind != kindTime && what.kind != kindRandom {
			return
		}
		s.function.chance = &chance{what.kind, what.advice, []string{what.name}, c.where(n.Pos())}
	}
}

// loop looks at a range statement.
func (c *checker) loop(loop *ast.RangeStmt, s scope) {
	t := c.pass.TypesInfo.TypeOf(loop.X)
	if t == nil {
		return
	}
	if _, ok := t.Underlying().(*types.Chan); ok {
		c.found(loop, source{kindChannel, "a receive from a channel", adviceAwait}, s, "")
		return
	}
	if s.place != inSaga || !c.usesRun(loop.Body) {
		return
	}
	if of, ok := c.inMapOrder(loop.X); ok {
		c.report(loop, kindOrder, "steps in the order of a map, which is another one at every replay; sort its keys first: for _, key := range slices.Sorted(maps.Keys(%s))", of)
	}
}

// inMapOrder reports whether an expression is a map or yields what is in one,
// in the map's order; and how the map is written.
func (c *checker) inMapOrder(x ast.Expr) (string, bool) {
	t := c.pass.TypesInfo.TypeOf(x)
	if t == nil {
		return "", false
	}
	if _, ok := t.Underlying().(*types.Map); ok {
		return types.ExprString(x), true
	}
	if param, ok := types.Unalias(t).(*types.TypeParam); ok {
		for i := range param.Underlying().(*types.Interface).NumEmbeddeds() {
			if allMaps(param.Underlying().(*types.Interface).EmbeddedType(i)) {
				return types.ExprString(x), true
			}
		}
	}
	call, ok := ast.Unparen(x).(*ast.CallExpr)
	if !ok || len(call.Args) == 0 {
		return "", false
	}
	callee := typeutil.StaticCallee(c.pass.TypesInfo, call)
	if callee == nil || callee.Pkg() == nil {
		return "", false
	}
	switch callee.Pkg().Path() + "." + callee.Name() {
	case "maps.Keys", "maps.Values", "maps.All", "golang.org/x/exp/maps.Keys", "golang.org/x/exp/maps.Values":
		return types.ExprString(call.Args[0]), true
	case "slices.Collect", "slices.Values", "slices.All":
		return c.inMapOrder(call.Args[0])
	}
	return "", false
}

// allMaps reports whether a constraint's types are maps.
func allMaps(t types.Type) bool {
	union, ok := t.(*types.Union)
	if !ok {
		_, ok := t.Underlying().(*types.Map)
		return ok
	}
	for term := range union.Terms() {
		if _, ok := term.Type().Underlying().(*types.Map); !ok {
			return false
		}
	}
	return true
}

// kept reports assignments that let the run outlive the call of the function.
func (c *checker) kept(n *ast.AssignStmt, s scope) {
	if s.place != inSaga || len(n.Lhs) != len(n.Rhs) {
		return
	}
	for i, value := range n.Rhs {
		if !c.isRunExpr(value) {
			continue
		}
		if id, ok := ast.Unparen(n.Lhs[i]).(*ast.Ident); ok {
			obj := c.pass.TypesInfo.ObjectOf(id)
			if obj == nil || within(s.body, obj) {
				continue // the blank one, or one of this call
			}
		}
		c.complain(n, "the run is kept in %s: it is good for this one call of the function; pass it to functions as a parameter", types.ExprString(n.Lhs[i]))
	}
}

// within reports whether something is declared in a function.
func within(function ast.Node, obj types.Object) bool {
	return function.Pos() <= obj.Pos() && obj.Pos() < function.End()
}

func (c *checker) isRunExpr(x ast.Expr) bool {
	t := c.pass.TypesInfo.TypeOf(x)
	return t != nil && isRun(t)
}

// usesRun reports whether code takes steps: whether it uses the run otherwise
// than to ask who it is and what time, or calls a function that does.
func (c *checker) usesRun(n ast.Node) bool {
	used := false
	ast.Inspect(n, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			if c.isRunExpr(n.X) && (n.Sel.Name == "ID" || n.Sel.Name == "Now") {
				return false
			}
		case *ast.Ident:
			if v, ok := c.pass.TypesInfo.Uses[n].(*types.Var); ok && (isRun(v.Type()) || c.carriers[v]) {
				used = true
			}
		}
		return !used
	})
	return used
}

// runOf says that what is given to another goroutine has the run, if it has.
func (c *checker) runOf(call *ast.CallExpr) string {
	if c.usesRun(call) {
		return "; and the run belongs to one goroutine: used on another one, it is blocked"
	}
	return ""
}

func (c *checker) complain(n ast.Node, format string, a ...any) { c.report(n, kindRun, format, a...) }

func (c *checker) report(n ast.Node, k kind, format string, a ...any) {
	if c.directives.cover(n.Pos()) {
		return
	}
	end := n.End()
	switch n := n.(type) { // where it begins is enough of what is long
	case *ast.GoStmt:
		end = n.Go + token.Pos(len("go"))
	case *ast.SelectStmt:
		end = n.Select + token.Pos(len("select"))
	case *ast.RangeStmt:
		end = n.X.End()
	}
	c.findings = append(c.findings, analysis.Diagnostic{Pos: n.Pos(), End: end, Category: string(k), Message: fmt.Sprintf(format, a...)})
}

// advise says what to do instead: of something, or of calling a helper that does
// it.
func advise(a advice, s scope, helper bool) string {
	start := s.place == inStart
	switch {
	case a == adviceNow && start:
		return "use the time of the event, which is recorded"
	case start && (a == adviceRecord || a == adviceWait):
		return "take it from the event, or let the saga do it"
	case start:
		return "let the saga do it, in a step"
	case a == adviceNow && helper:
		return fmt.Sprintf("give it %s.Now() as an argument, or record what it returns as a step, with saga.Local", s.run)
	case a == adviceNow:
		return fmt.Sprintf("use %s.Now()", s.run)
	case a == adviceWait:
		return fmt.Sprintf("use %s.Sleep or %s.Until", s.run, s.run)
	case a == adviceWithin:
		return "limit the time of a step with saga.Within, and of a wait with the timeout of saga.Await"
	case a == adviceRecord:
		return "record it as a step, with saga.Local"
	case a == adviceExecute:
		return "use saga.Execute"
	case a == adviceShare:
		return "what sagas share belongs in an aggregate, or in a step"
	case a == adviceBranches:
		return "use saga.All or saga.Race, and do it in steps"
	case a == adviceAwait:
		return "wait with saga.Await or a saga.Signal, for several with saga.Race"
	default:
		return "do it in a step, with saga.Do"
	}
}
