package sqlite

import (
	"maps"
	"slices"
	"strings"

	"github.com/deed-go/deed/eventstore"
)

// kind is an event type within a category.
type kind struct{ category, eventType string }

// kinds are those of the log. Once shared it is not changed.
type kinds struct {
	byID map[int64]kind
	id   map[kind]int64
}

func newKinds() *kinds { return &kinds{byID: map[int64]kind{}, id: map[kind]int64{}} }

func (k *kinds) add(id int64, name kind) { k.byID[id], k.id[name] = name, id }

func (k *kinds) clone() *kinds { return &kinds{byID: maps.Clone(k.byID), id: maps.Clone(k.id)} }

// matching returns the ids of the kinds that fit the item, in order.
func (k *kinds) matching(item *eventstore.Item) []int64 {
	var ids []int64
	if item.Category != "" && len(item.Types) > 0 {
		for _, t := range item.Types {
			if id, ok := k.id[kind{item.Category, t}]; ok {
				ids = append(ids, id)
			}
		}
		slices.Sort(ids)
		return slices.Compact(ids) // a type may be named twice
	}
	types := make(map[string]bool, len(item.Types))
	for _, t := range item.Types {
		types[t] = true
	}
	for id, name := range k.byID {
		if (item.Category == "" || item.Category == name.category) && (len(types) == 0 || types[name.eventType]) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// plan says how the events of a query are found.
type plan struct {
	// everything reads the log itself, in order.
	everything bool
	// arms are the indexes to merge; without any, nothing matches.
	arms []arm
	// exact says that all candidates match, so that a limit can be left to SQLite.
	exact bool
}

// arm finds candidate positions in one index, in order.
type arm struct {
	// from and where are parts of a SELECT over e (deed_events) or t (deed_tags);
	// where has its arguments in args, before those of the position range.
	table, from, where string
	args               []any
}

const (
	byStream = "deed_events e INDEXED BY deed_events_stream"
	byKind   = "deed_events e INDEXED BY deed_events_kind"
	byTag    = "deed_tags t"
)

// makePlan needs the id of a stream, which lookup returns; false if the
// stream does not exist.
func makePlan(q eventstore.Query, k *kinds, lookup func(eventstore.Stream) (int64, bool, error)) (plan, error) {
	p := plan{everything: q.Everything, exact: true}
	var sought map[int64]bool // kinds that have an arm
	for i := range q.Items {
		item := &q.Items[i]
		var ids []int64
		constrained := item.Category != "" || len(item.Types) > 0
		if constrained {
			if ids = k.matching(item); len(ids) == 0 {
				continue
			}
		}
		switch {
		case !item.Stream.IsZero():
			id, ok, err := lookup(item.Stream)
			if err != nil {
				return p, err
			}
			if !ok {
				continue
			}
			p.arms = append(p.arms, arm{table: "e", from: byStream, where: "e.stream = ?", args: []any{id}})
			p.exact = p.exact && !constrained && len(item.Tags) == 0 && item.Slices.IsZero()
		case len(item.Tags) > 0:
			a := arm{table: "t", from: byTag, where: "t.tag = ?", args: []any{item.Tags[0]}}
			for _, tag := range item.Tags[1:] {
				a.where += " AND EXISTS (SELECT 1 FROM deed_tags x WHERE x.tag = ? AND x.position = t.position)"
				a.args = append(a.args, tag)
			}
			if constrained && len(ids) < mostIn {
				a.where += " AND t.kind IN (?" + strings.Repeat(", ?", len(ids)-1) + ")"
				for _, id := range ids {
					a.args = append(a.args, id)
				}
			} else if constrained {
				p.exact = false
			}
			p.arms = append(p.arms, a)
			p.exact = p.exact && item.Slices.IsZero()
		case constrained:
			for _, id := range ids {
				if sought[id] {
					continue
				}
				if sought == nil {
					sought = map[int64]bool{}
				}
				sought[id] = true
				p.arms = append(p.arms, arm{table: "e", from: byKind, where: "e.kind = ?", args: []any{id}})
			}
			p.exact = p.exact && item.Slices.IsZero()
		default: // slices alone
			return plan{everything: true}, nil
		}
	}
	return p, nil
}

const (
	mostIn   = 100 // kinds in one list
	mostArms = 64  // arms in one statement
)

// positions returns the statement that merges the arms in position order; its
// arguments are those of the arms, each followed by the range, and the limit.
// One arm gives each position once; several are merged without repeats.
func positions(arms []arm, backward bool) string {
	var b strings.Builder
	for i, a := range arms {
		if i > 0 {
			b.WriteString(" UNION ")
		}
		b.WriteString("SELECT " + a.table + ".position AS position FROM " + a.from + " WHERE " + a.where)
		b.WriteString(" AND " + a.table + ".position > ? AND " + a.table + ".position <= ?")
	}
	b.WriteString(" ORDER BY position")
	if backward {
		b.WriteString(" DESC")
	}
	b.WriteString(" LIMIT ?")
	return b.String()
}

const columns = "e.position, e.stream, e.version, e.kind, e.id, e.time, e.tags, e.metadata, e.data"

// rows returns the statement that reads events in position order: of one arm
// over deed_events, or all of them (nil).
func rows(a *arm, backward bool) string {
	text := "SELECT " + columns + " FROM "
	if a == nil {
		text += "deed_events e WHERE "
	} else {
		text += a.from + " WHERE " + a.where + " AND "
	}
	text += "e.position > ? AND e.position <= ? ORDER BY e.position"
	if backward {
		text += " DESC"
	}
	return text + " LIMIT ?"
}
