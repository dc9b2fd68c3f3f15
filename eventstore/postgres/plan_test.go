package postgres

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

// The log that plans are tried on: 40,000 events of 400 streams in 4
// categories, of 40 kinds.
const (
	planEvents  = 40_000
	planStreams = 400
)

// fillPlain writes the log past the store.
func fillPlain(t testing.TB, conn *pgx.Conn) {
	t.Helper()
	do(t, conn, `INSERT INTO deed.kinds (category, type) SELECT 'cat' || c, 'type' || t FROM generate_series(0, 3) c, generate_series(0, 9) t`)
	do(t, conn, `INSERT INTO deed.events (position, version, kind, slice, id, time, stream, tags, data)
		SELECT n, (n - 1) / $2 + 1, k.id, n % 1024, gen_random_uuid(), n, 'cat' || n % 4 || '-' || n % $2, ARRAY['all', 'tag:' || n % 1000], '{}'
		FROM generate_series(1, $1) n JOIN deed.kinds k ON k.category = 'cat' || n % 4 AND k.type = 'type' || n % 10`, pgx.QueryExecModeSimpleProtocol, planEvents, planStreams)
	do(t, conn, `INSERT INTO deed.tags (tag, position, kind) SELECT tag, position, kind FROM deed.events, unnest(tags) tag`)
	do(t, conn, `INSERT INTO deed.keys (key, fingerprint, first, last) SELECT 'key ' || position, '', position, position FROM deed.events WHERE position % 100 = 0`)
}

// node is a node of EXPLAIN (ANALYZE, FORMAT JSON).
type node struct {
	Type     string  `json:"Node Type"`
	Relation string  `json:"Relation Name"`
	Rows     float64 `json:"Actual Rows"`
	Loops    float64 `json:"Actual Loops"`
	Filtered float64 `json:"Rows Removed by Filter"`
	Plans    []node  `json:"Plans"`
}

// touched counts the rows of the log's large tables that the plan has read.
func (n *node) touched() float64 {
	rows := 0.0
	if slices.Contains([]string{"events", "tags", "keys"}, n.Relation) {
		rows = (n.Rows + n.Filtered) * n.Loops
	}
	for i := range n.Plans {
		rows += n.Plans[i].touched()
	}
	return rows
}

func (n *node) has(kind, relation string) bool {
	if n.Type == kind && (relation == "" || n.Relation == relation) {
		return true
	}
	return slices.ContainsFunc(n.Plans, func(p node) bool { return p.has(kind, relation) })
}

// prepared is a statement that was prepared by hand, so that it can be
// explained.
type prepared struct {
	name string
	args string
}

func prepareStatement(t testing.TB, conn *pgx.Conn, name string, st statement) prepared {
	t.Helper()
	names := map[uint32]string{pgtype.Int8OID: "bigint", pgtype.TextOID: "text", pgtype.Int4ArrayOID: "int[]", pgtype.TextArrayOID: "text[]"}
	var types, values []string
	for _, arg := range st.args {
		_, oid := encodeArgument(arg)
		types = append(types, names[oid])
		switch v := arg.(type) {
		case []string:
			quoted := make([]string, len(v))
			for i := range v {
				quoted[i] = literal(v[i])
			}
			values = append(values, "ARRAY["+strings.Join(quoted, ",")+"]::text[]")
		case []int32:
			values = append(values, literal("{"+strings.Trim(strings.ReplaceAll(fmt.Sprint(v), " ", ","), "[]")+"}"))
		default:
			values = append(values, literal(fmt.Sprint(v)))
		}
	}
	if len(st.args) == 0 {
		do(t, conn, "PREPARE "+name+" AS "+st.text, pgx.QueryExecModeSimpleProtocol)
		return prepared{name, ""}
	}
	do(t, conn, fmt.Sprintf("PREPARE %s (%s) AS %s", name, strings.Join(types, ", "), st.text), pgx.QueryExecModeSimpleProtocol)
	return prepared{name, "(" + strings.Join(values, ", ") + ")"}
}

func (p prepared) explain(t testing.TB, conn *pgx.Conn) *node {
	t.Helper()
	var raw string
	require.NoError(t, conn.QueryRow(t.Context(), fmt.Sprintf("EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE %s %s", p.name, p.args), pgx.QueryExecModeSimpleProtocol).Scan(&raw))
	var out []struct{ Plan node }
	require.NoError(t, json.Unmarshal([]byte(raw), &out))
	return &out[0].Plan
}

// planCases are all forms of statements that read the log, with the rows that
// each may touch.
func planCases(limit int) map[string]struct {
	st   statement
	most float64
} {
	type one = struct {
		st   statement
		most float64
	}
	all := map[string]one{}
	per := float64(limit)
	queries := map[string]struct {
		q    eventstore.Query
		most float64 // times the limit
	}{
		"everything":           {eventstore.All(), 1},
		"stream":               {eventstore.OneStream(eventstore.Stream{Category: "cat3", ID: "7"}), 1},
		"stream and type":      {eventstore.Match(eventstore.Item{Stream: eventstore.Stream{Category: "cat3", ID: "7"}, Types: []string{"type7"}}), 1},
		"category":             {eventstore.OneCategory("cat1"), 10 + 1},
		"type":                 {eventstore.OfTypes("type3"), 4 + 1},
		"types":                {eventstore.OfTypes("type3", "type4"), 8 + 1},
		"category and type":    {eventstore.Match(eventstore.Item{Category: "cat1", Types: []string{"type1", "type3", "type3", "none"}}), 2 + 1},
		"tag":                  {eventstore.Tagged("tag:9"), 2},
		"common tag":           {eventstore.Tagged("all"), 2},
		"tags, the rare first": {eventstore.Tagged("tag:9", "all"), 3},
		"tag and type":         {eventstore.Match(eventstore.Item{Tags: []string{"tag:9"}, Types: []string{"type9"}}), 3},
		"tag and category":     {eventstore.Match(eventstore.Item{Tags: []string{"tag:9"}, Category: "cat1"}), 3},
		"slices":               {eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 1, To: 9}}), 1},
		"several": {eventstore.Match(eventstore.Item{Tags: []string{"tag:9"}}, eventstore.Item{Category: "cat2"}, eventstore.Item{Stream: eventstore.Stream{Category: "cat3", ID: "7"}},
			eventstore.Item{Types: []string{"type3"}}, eventstore.Item{Tags: []string{"all", "tag:10"}}), 1 + 10 + 1 + 4 + 2000 + 1},
	}
	spans := map[string]span{
		"all":         {through: farAway},
		"from middle": {after: planEvents / 2, through: farAway},
		"range":       {after: planEvents / 2, through: planEvents/2 + 10_000},
		"event":       {after: 20_007, through: farAway}, // the last one seen of the stream
		"end":         {after: planEvents - 1, through: math.MaxInt64},
	}
	for name, q := range queries {
		p := makePlan(q.q, `"deed"`)
		for where, at := range spans {
			for _, backward := range []bool{false, true} {
				at.backward = backward
				st := p.statement(`"deed"`, at, limit)
				most := q.most * per
				if strings.HasPrefix(name, "stream") || name == "several" {
					most += planEvents / planStreams // of a stream what lies before may be read
				}
				all[fmt.Sprintf("%s, %s, backward=%t", name, where, backward)] = one{st, most + 3}
				if p.exact && !p.everything && !backward {
					all[fmt.Sprintf("first of %s, %s", name, where)] = one{p.positions(`"deed"`, at, 1), q.most + 3 + planEvents/planStreams}
				}
			}
		}
	}
	texts := newTexts(`"deed"`)
	cast := strings.NewReplacer("$1", "$1::bigint", "$2", "$2::bigint")
	all["head"] = one{statement{text: texts.head}, 2}
	all["ends"] = one{statement{text: texts.ends}, 2}
	all["last event"] = one{statement{text: cast.Replace(texts.lastEvent), args: []any{int64(planEvents / 2)}}, 2}
	all["delta"] = one{statement{text: cast.Replace(texts.delta), args: []any{int64(planEvents - 10), int64(1000)}}, 12}
	all["heads"] = one{statement{text: texts.heads, args: []any{[]string{"cat3-7", "cat0-0", "none-1"}}}, 4}
	all["receipts"] = one{statement{text: texts.receipts, args: []any{[]string{"key 100", "key 40000", "none"}}}, 8 + planEvents/100} // the table of keys is small here, and may be read as a whole
	all["written"] = one{statement{text: texts.written, args: []any{int64(planEvents - 100), []string{newID().String(), newID().String()}, []int32{1, 2}}}, 300}
	return all
}

// The plans of all statements touch about as many rows as they return, and no
// more when the log is longer: from the middle and at the end, forward and
// backward, planned for the arguments or for any, before and after ANALYZE.
func TestPlan_TouchesWhatItReturns(t *testing.T) {
	t.Parallel()
	const limit = 20
	url := pgtest.Database(t)
	s := openURL(t, url)
	admin := direct(t, url)
	for _, table := range []string{"events", "tags", "keys", "kinds"} {
		do(t, admin, "ALTER TABLE deed."+table+" SET (autovacuum_enabled = off)")
	}
	// Some sessions have planned while there was nothing.
	sessions := map[string]*pgx.Conn{}
	session := func(name string, pooled bool, mode string) *pgx.Conn {
		conn := direct(t, url)
		if !pooled {
			for _, setting := range []string{"enable_seqscan", "jit"} {
				do(t, conn, "SET "+setting+" = "+s.config.RuntimeParams[setting])
			}
		}
		do(t, conn, "SET plan_cache_mode = "+mode)
		sessions[name] = conn
		return conn
	}
	plans := map[string]map[string]prepared{}
	prepareAll := func(name string) {
		plans[name] = map[string]prepared{}
		n := 0
		for what, c := range planCases(limit) {
			n++
			plans[name][what] = prepareStatement(t, sessions[name], fmt.Sprint("p", n), c.st)
		}
	}
	session("planned while it was empty", false, "force_generic_plan")
	prepareAll("planned while it was empty")
	for _, p := range plans["planned while it was empty"] {
		p.explain(t, sessions["planned while it was empty"])
	}
	fillPlain(t, admin)
	check := func(names ...string) {
		t.Helper()
		for _, name := range names {
			for what, c := range planCases(limit) {
				plan := plans[name][what].explain(t, sessions[name])
				if touched := plan.touched(); touched > c.most || plan.has("Seq Scan", "events") || plan.has("Seq Scan", "tags") {
					pretty, _ := json.MarshalIndent(plan, "", " ")
					t.Errorf("session %q: %s: %d rows are touched, %d expected:\n%s\n%s", name, what, int(touched), int(c.most), c.st.text, pretty)
				}
			}
		}
	}
	check("planned while it was empty")
	session("generic", false, "force_generic_plan")
	session("custom", false, "force_custom_plan")
	prepareAll("generic")
	prepareAll("custom")
	check("generic", "custom")
	do(t, admin, "ANALYZE deed.events, deed.tags, deed.keys, deed.kinds")
	check("planned while it was empty", "generic", "custom")
	session("pooled", true, "auto") // no settings of the session
	prepareAll("pooled")
	check("pooled")
}

// The function that appends reads by the indexes, also in the session of a
// user, who has not set anything, and when its plans were made on empty tables.
func TestPlan_AppendEvents(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s := openURL(t, url)
	admin, conn := direct(t, url), direct(t, url)
	for _, table := range []string{"events", "tags", "keys", "kinds"} {
		do(t, admin, "ALTER TABLE deed."+table+" SET (autovacuum_enabled = off)")
	}
	do(t, conn, "SET plan_cache_mode = force_generic_plan")
	counted := func(tx pgx.Tx) (scans, tuples int) { // by this session, of late
		require.NoError(t, tx.QueryRow(t.Context(), "SELECT sum(seq_scan), sum(coalesce(idx_tup_fetch, 0)) FROM pg_stat_xact_user_tables WHERE schemaname = 'deed' AND relname IN ('events', 'tags', 'keys')").Scan(&scans, &tuples))
		return scans, tuples
	}
	appendAt := func(known int, touching bool) (scans, tuples int) {
		tx := begin(t, conn)
		b := &batch{}
		c, err := s.encode(t.Context(), under(commit(event(account("new"), "noted", "new")), eventstore.NoneMatch(eventstore.Match(eventstore.Item{Category: "none", Tags: []string{"x"}}), 0), at(account("new"), 0)))
		require.NoError(t, err)
		c.commit.Key, c.commit.Fingerprint = "new", "new"
		if touching {
			c.commit.Conditions[0].Query = eventstore.Tagged("all")
		}
		b.entries, b.careful, b.fresh = []*entry{c}, false, true
		l := newLedger()
		l.reset(eventstore.Position(known), newID())
		require.NoError(t, s.makeKinds(t.Context(), admin, map[kind]bool{{"account", "noted"}: true}))
		b.looked.make()
		b.looked.matches[&c.commit.Conditions[0]] = match{through: l.known}
		need, _ := b.judge(l)
		require.False(t, need.any(), "%+v", need)
		require.Len(t, b.winners, 1)
		scansBefore, tuplesBefore := counted(tx)
		done, err := s.callAppend(t.Context(), conn, s.texts.appendBatch, b, l.known, func() {})
		require.NoError(t, err)
		require.Equal(t, !touching, done.written)
		scans, tuples = counted(tx)
		require.NoError(t, tx.Rollback(t.Context()))
		return scans - scansBefore, tuples - tuplesBefore
	}
	for range 7 {
		appendAt(0, false)
	}
	fillPlain(t, admin)
	for _, analyzed := range []bool{false, true} {
		if analyzed {
			do(t, admin, "ANALYZE deed.events, deed.tags, deed.keys, deed.kinds")
		}
		for behind := range 3 {
			scans, tuples := appendAt(planEvents-50*behind, false)
			require.Zero(t, scans, "a table is read from one end to the other")
			require.LessOrEqual(t, tuples, 10+behind*50*6)
		}
		scans, _ := appendAt(planEvents-50, true)
		require.Zero(t, scans)
	}
}
