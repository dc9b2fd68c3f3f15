package postgres

import (
	"fmt"
	"strings"

	"github.com/deed-go/deed/eventstore"
)

// plan says how the events of a query are found.
type plan struct {
	// everything reads the log itself, in order.
	everything bool
	// arms are the indexes to merge.
	arms []arm
	// exact says that all candidates match, so that a limit can be left to the
	// database.
	exact bool
}

// arm finds candidate positions in one index.
type arm struct {
	kind armKind
	// where is a condition on e (events), t (tags) or k (kinds), with %d for the
	// numbers of its parameters, in order.
	where string
	args  []any
}

type armKind uint8

const (
	byStream armKind = iota
	byKind
	byTag
)

// makePlan divides the query among the indexes. Categories and types are
// looked up by the statement itself: another process may have made a kind that
// is not known here, and its events must not be missed.
func makePlan(q eventstore.Query, schema string) plan {
	p := plan{everything: q.Everything, exact: true}
	schema = verbatim(schema)
	for i := range q.Items {
		item := &q.Items[i]
		constrained := item.Category != "" || len(item.Types) > 0
		switch {
		case !item.Stream.IsZero():
			p.arms = append(p.arms, arm{kind: byStream, where: "e.stream = $%d::text", args: []any{item.Stream.String()}})
			p.exact = p.exact && !constrained && len(item.Tags) == 0 && item.Slices.IsZero()
		case len(item.Tags) > 0:
			a := arm{kind: byTag, where: "t.tag = $%d::text", args: []any{item.Tags[0]}}
			for _, tag := range item.Tags[1:] {
				a.where += " AND EXISTS (SELECT FROM " + schema + ".tags x WHERE x.tag = $%d::text AND x.position = t.position)"
				a.args = append(a.args, tag)
			}
			if constrained {
				where, args := kindsOf(item)
				a.where += " AND t.kind IN (SELECT k.id FROM " + schema + ".kinds k WHERE " + where + ")"
				a.args = append(a.args, args...)
			}
			p.arms = append(p.arms, a)
			p.exact = p.exact && item.Slices.IsZero()
		case constrained:
			where, args := kindsOf(item)
			p.arms = append(p.arms, arm{kind: byKind, where: where, args: args})
			p.exact = p.exact && item.Slices.IsZero()
		default: // slices alone
			return plan{everything: true}
		}
	}
	return p
}

// verbatim makes a name a part of a format.
func verbatim(name string) string { return strings.ReplaceAll(name, "%", "%%") }

// kindsOf is the condition on k (kinds) that the item makes.
func kindsOf(item *eventstore.Item) (where string, args []any) {
	switch {
	case len(item.Types) == 0:
		return "k.category = $%d::text", []any{item.Category}
	case item.Category == "":
		return "k.type = ANY ($%d::text[])", []any{item.Types}
	}
	return "k.category = $%d::text AND k.type = ANY ($%d::text[])", []any{item.Category, item.Types}
}

// statement is SQL with its arguments.
type statement struct {
	text  string
	args  []any
	fixed bool // its text has few forms, so that it is worth preparing
}

const columns = "e.position, e.version, e.kind, e.time, e.id, e.stream, e.tags, e.metadata, e.data"

func order(backward bool) string {
	if backward {
		return " DESC"
	}
	return ""
}

// scanLog reads the log itself.
func scanLog(schema string, at span, limit int) statement {
	return statement{
		text: "SELECT " + columns + " FROM " + schema + ".events e WHERE e.position > $1::bigint AND e.position <= $2::bigint ORDER BY e.position" + order(at.backward) + " LIMIT $3::bigint",
		args: []any{int64(at.after), int64(at.through), int64(limit)}, fixed: true,
	}
}

// scanStream reads one stream in the order of its versions, which is that of
// positions. Where the range begins at an event of the stream, as after a
// snapshot, what lies before it is not read.
func scanStream(schema, stream string, at span, limit int) statement {
	st := statement{args: []any{stream, int64(limit)}, fixed: true}
	text := "SELECT " + columns + " FROM " + schema + ".events e WHERE e.stream = $1::text"
	// The sums keep the planner from taking the index on positions instead.
	if at.after > 0 {
		st.args = append(st.args, int64(at.after))
		n := len(st.args)
		text += fmt.Sprintf(" AND e.position + 0 > $%d::bigint AND e.version > coalesce((SELECT b.version FROM %s.events b WHERE b.position = $%d::bigint AND b.stream = $1::text), 0)", n, schema, n)
	}
	if at.through < farAway {
		st.args = append(st.args, int64(at.through))
		text += fmt.Sprintf(" AND e.position + 0 <= $%d::bigint", len(st.args))
	}
	st.text = text + " ORDER BY e.version" + order(at.backward) + " LIMIT $2::bigint"
	return st
}

// positions returns the statement that finds up to limit candidates of the
// arms in position order, each once.
func (p *plan) positions(schema string, at span, limit int) statement {
	var b strings.Builder
	schema = verbatim(schema)
	st := statement{args: []any{int64(at.after), int64(at.through), int64(limit)}}
	b.WriteString("SELECT u.position FROM (")
	for i, a := range p.arms {
		if i > 0 {
			b.WriteString(" UNION ALL ")
		}
		numbers := make([]any, len(a.args))
		for n := range a.args {
			numbers[n] = len(st.args) + n + 1
		}
		st.args = append(st.args, a.args...)
		switch a.kind {
		case byStream:
			fmt.Fprintf(&b, "(SELECT e.position FROM "+schema+".events e WHERE "+a.where+" AND e.position + 0 > $1::bigint AND e.position + 0 <= $2::bigint ORDER BY e.version"+order(at.backward)+" LIMIT $3::bigint)", numbers...)
		case byTag:
			fmt.Fprintf(&b, "(SELECT t.position FROM "+schema+".tags t WHERE "+a.where+" AND t.position > $1::bigint AND t.position <= $2::bigint ORDER BY t.position"+order(at.backward)+" LIMIT $3::bigint)", numbers...)
		case byKind:
			// Each kind on its own, in order and bounded, so that the index does it all; the
			// rows keep the planner from taking the index on positions instead.
			fmt.Fprintf(&b, "(SELECT l.position FROM (SELECT k.id FROM "+schema+".kinds k WHERE "+a.where+" OFFSET 0) k CROSS JOIN LATERAL (SELECT e.position FROM "+schema+".events e WHERE (e.kind, e.position) > (k.id, $1::bigint) AND (e.kind, e.position) <= (k.id, $2::bigint) ORDER BY e.kind"+order(at.backward)+", e.position"+order(at.backward)+" LIMIT $3::bigint) l)", numbers...)
		}
	}
	b.WriteString(") u")
	if len(p.arms) > 1 {
		b.WriteString(" GROUP BY u.position") // several arms may find the same event
	}
	b.WriteString(" ORDER BY u.position" + order(at.backward) + " LIMIT $3::bigint")
	st.text, st.fixed = b.String(), len(p.arms) == 1 && len(p.arms[0].args) <= 3
	return st
}

// rows returns the statement that reads the events at the candidate positions.
func (p *plan) rows(schema string, at span, limit int) statement {
	st := p.positions(schema, at, limit)
	// The subquery keeps its own order and bound; the events are looked up one by
	// one, which OFFSET makes sure of.
	st.text = "SELECT " + columns + " FROM (" + st.text + ") c CROSS JOIN LATERAL (SELECT * FROM " + schema + ".events e WHERE e.position = c.position OFFSET 0) e ORDER BY c.position" + order(at.backward)
	return st
}

// statement returns what reads up to limit candidates of the query.
func (p *plan) statement(schema string, at span, limit int) statement {
	switch {
	case p.everything:
		return scanLog(schema, at, limit)
	case len(p.arms) == 1 && p.arms[0].kind == byStream:
		return scanStream(schema, p.arms[0].args[0].(string), at, limit)
	}
	return p.rows(schema, at, limit)
}
