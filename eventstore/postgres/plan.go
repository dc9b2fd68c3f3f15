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
	// arms are the indexes to merge; without any, nothing matches.
	arms []arm
	// exact says that all candidates match, so that a limit can be left to the
	// database.
	exact bool
}

// arm finds candidate positions in one index.
type arm struct {
	// from and where are parts of a SELECT over e (events) or t (tags); both have
	// %d for the numbers of their parameters, in order.
	kind  armKind
	where string
	args  []any
}

type armKind uint8

const (
	byStream armKind = iota
	byKind
	byTag
)

// makePlan divides the query among the indexes.
func makePlan(q eventstore.Query, k *kinds, schema string) plan {
	p := plan{everything: q.Everything, exact: true}
	sought := map[int32]bool{} // kinds that have an arm
	for i := range q.Items {
		item := &q.Items[i]
		var ids []int32
		constrained := item.Category != "" || len(item.Types) > 0
		if constrained {
			if ids = k.matching(item); len(ids) == 0 {
				continue
			}
		}
		switch {
		case !item.Stream.IsZero():
			if constrained && item.Category != "" && item.Category != item.Stream.Category {
				continue
			}
			p.arms = append(p.arms, arm{kind: byStream, where: "e.stream = $%d::text", args: []any{item.Stream.String()}})
			p.exact = p.exact && !constrained && len(item.Tags) == 0 && item.Slices.IsZero()
		case len(item.Tags) > 0:
			a := arm{kind: byTag, where: "t.tag = $%d::text", args: []any{item.Tags[0]}}
			for _, tag := range item.Tags[1:] {
				a.where += " AND EXISTS (SELECT FROM " + schema + ".tags x WHERE x.tag = $%d::text AND x.position = t.position)"
				a.args = append(a.args, tag)
			}
			if constrained {
				a.where += " AND t.kind = ANY ($%d::int[])"
				a.args = append(a.args, ids)
			}
			p.arms = append(p.arms, a)
			p.exact = p.exact && item.Slices.IsZero()
		case constrained:
			fresh := ids[:0:0]
			for _, id := range ids {
				if !sought[id] {
					sought[id] = true
					fresh = append(fresh, id)
				}
			}
			if len(fresh) > 0 {
				p.arms = append(p.arms, arm{kind: byKind, where: "e.kind = k.id", args: []any{fresh}})
			}
			p.exact = p.exact && item.Slices.IsZero()
		default: // slices alone
			return plan{everything: true}
		}
	}
	return p
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
			// Each kind on its own, in order and bounded, so that the index does it all.
			fmt.Fprintf(&b, "(SELECT l.position FROM unnest($%d::int[]) AS k (id) CROSS JOIN LATERAL (SELECT e.position FROM "+schema+".events e WHERE "+a.where+" AND e.position > $1::bigint AND e.position <= $2::bigint ORDER BY e.position"+order(at.backward)+" LIMIT $3::bigint) l)", numbers...)
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
	// The subquery keeps its own order and bound; the events are looked up one by one.
	st.text = "SELECT " + columns + " FROM (" + st.text + ") c JOIN " + schema + ".events e ON e.position = c.position ORDER BY e.position" + order(at.backward)
	return st
}

// statement returns what reads up to limit candidates of the query; false if
// nothing can match.
func (p *plan) statement(schema string, at span, limit int) (statement, bool) {
	switch {
	case p.everything:
		return scanLog(schema, at, limit), true
	case len(p.arms) == 0:
		return statement{}, false
	case len(p.arms) == 1 && p.arms[0].kind == byStream:
		return scanStream(schema, p.arms[0].args[0].(string), at, limit), true
	}
	return p.rows(schema, at, limit), true
}
