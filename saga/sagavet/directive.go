package sagavet

import (
	"go/ast"
	"go/token"
	"strings"
)

const directiveText = "//deed:deterministic"

// directives are the lines of the files of a package that are vouched for.
type directives struct {
	fset    *token.FileSet
	covered map[string]map[int]bool // file name -> lines
	bare    []*ast.Comment          // those without a reason
}

func directivesOf(fset *token.FileSet, files []*ast.File) *directives {
	d := &directives{fset: fset, covered: map[string]map[int]bool{}}
	for _, file := range files {
		var code map[int]bool
		for _, group := range file.Comments {
			for _, comment := range group.List {
				reason, ok := strings.CutPrefix(comment.Text, directiveText)
				if !ok || reason != "" && !strings.ContainsAny(reason[:1], " \t") {
					continue
				}
				reason = strings.TrimSpace(reason)
				if reason == "" || strings.HasPrefix(reason, "//") {
					d.bare = append(d.bare, comment)
					continue
				}
				if code == nil {
					code = linesWithCode(fset, file)
				}
				at := fset.Position(comment.Pos())
				if d.covered[at.Filename] == nil {
					d.covered[at.Filename] = map[int]bool{}
				}
				line := at.Line
				if !code[line] { // it stands above what it is about
					line = fset.Position(group.End()).Line + 1
				}
				d.covered[at.Filename][line] = true
			}
		}
	}
	return d
}

func linesWithCode(fset *token.FileSet, file *ast.File) map[int]bool {
	lines := map[int]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n.(type) {
		case nil, *ast.File:
			return true
		case *ast.Comment, *ast.CommentGroup:
			return false
		}
		lines[fset.Position(n.Pos()).Line] = true
		lines[fset.Position(n.End()-1).Line] = true
		return true
	})
	return lines
}

// cover reports whether somebody vouches for what stands at a position.
func (d *directives) cover(pos token.Pos) bool {
	at := d.fset.Position(pos)
	return d.covered[at.Filename][at.Line]
}
