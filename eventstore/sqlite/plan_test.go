package sqlite

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/metatest"
)

// explain returns SQLite's plan for a statement, a line a step.
func explain(t *testing.T, c *conn, text string) string {
	t.Helper()
	s, err := c.prepare("EXPLAIN QUERY PLAN " + text)
	require.NoError(t, err)
	defer s.reset()
	var lines []string
	for {
		more, err := s.step()
		require.NoError(t, err)
		if !more {
			return strings.Join(lines, "\n")
		}
		lines = append(lines, s.text(3))
	}
}

// Every kind of query is answered in position order from an index: no scan of
// the whole log, no sorting, in both directions.
func TestPlans(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
	for i := range 200 {
		stream := eventstore.Stream{Category: []string{"account", "order"}[i%2], ID: fmt.Sprint(i % 7)}
		_, err := s.Append(t.Context(), eventstore.Commit{Events: one(stream, fmt.Sprint("type", i%5), "even", fmt.Sprint("n:", i%3))})
		require.NoError(t, err)
	}
	c, err := s.pages.get(t.Context())
	require.NoError(t, err)
	defer s.pages.put(c)
	r := &scanner{c: c, kinds: s.kinds.Load()}
	account := eventstore.Stream{Category: "account", ID: "2"}
	for name, test := range map[string]struct {
		query eventstore.Query
		uses  []string
	}{
		"all":             {eventstore.All(), []string{"SEARCH e USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"}},
		"stream":          {eventstore.OneStream(account), []string{"SEARCH e USING INDEX deed_events_stream (stream=? AND rowid>? AND rowid<?)"}},
		"one type":        {eventstore.OfTypes("type1"), []string{"INDEX deed_events_kind (kind=? AND rowid>? AND rowid<?)"}},
		"category":        {eventstore.OneCategory("account"), []string{"INDEX deed_events_kind (kind=? AND rowid>? AND rowid<?)"}},
		"types":           {eventstore.OfTypes("type1", "type3"), []string{"INDEX deed_events_kind (kind=? AND rowid>? AND rowid<?)"}},
		"tag":             {eventstore.Tagged("n:1"), []string{"SEARCH t USING PRIMARY KEY (tag=? AND position>? AND position<?)"}},
		"tags":            {eventstore.Tagged("n:1", "even"), []string{"SEARCH t USING PRIMARY KEY (tag=? AND position>? AND position<?)", "SEARCH x EXISTS USING PRIMARY KEY (tag=? AND position=?)"}},
		"tag and type":    {eventstore.Match(eventstore.Item{Types: []string{"type1"}, Tags: []string{"n:1"}}), []string{"SEARCH t USING PRIMARY KEY (tag=? AND position>? AND position<?)"}},
		"stream and type": {eventstore.Match(eventstore.Item{Stream: account, Types: []string{"type1"}}), []string{"INDEX deed_events_stream (stream=? AND rowid>? AND rowid<?)"}},
		"slices":          {eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 0, To: 512}}), []string{"SEARCH e USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)"}},
		"several items": {eventstore.Match(eventstore.Item{Stream: account}, eventstore.Item{Tags: []string{"n:2"}}, eventstore.Item{Category: "order"}), []string{
			"deed_events_stream (stream=? AND rowid>? AND rowid<?)", "SEARCH t USING PRIMARY KEY (tag=? AND position>? AND position<?)", "deed_events_kind (kind=? AND rowid>? AND rowid<?)",
		}},
	} {
		for _, backward := range []bool{false, true} {
			p, err := makePlan(test.query, r.kinds, r.stream)
			require.NoError(t, err)
			var text string
			switch {
			case p.everything:
				text = rows(nil, backward)
			case len(p.arms) == 1 && p.arms[0].table == "e":
				text = rows(&p.arms[0], backward)
			default:
				text = positions(p.arms, backward)
			}
			got := explain(t, c, text)
			for _, want := range test.uses {
				require.Contains(t, got, want, "%s, backward %t: %s", name, backward, text)
			}
			require.NotContains(t, got, "SCAN", "%s, backward %t", name, backward)
			require.NotContains(t, got, "TEMP B-TREE", "%s, backward %t", name, backward)
		}
	}
	for text, want := range map[string]string{
		"SELECT max(position) FROM deed_events":                                                                         "SEARCH deed_events",
		"SELECT id FROM deed_streams WHERE category = ? AND name = ?":                                                   "COVERING INDEX",
		"SELECT fingerprint, first, last FROM deed_keys WHERE key = ?":                                                  "SEARCH deed_keys USING PRIMARY KEY (key=?)",
		"SELECT value FROM deed_rows WHERE tbl = ? AND key = ?":                                                         "SEARCH deed_rows USING PRIMARY KEY (tbl=? AND key=?)",
		"SELECT key FROM deed_rows WHERE tbl = ? AND key > ? ORDER BY key":                                              "SEARCH deed_rows USING PRIMARY KEY (tbl=? AND key>?)",
		"SELECT key FROM deed_rows WHERE tbl=? AND key<? ORDER BY key DESC":                                             "SEARCH deed_rows USING PRIMARY KEY (tbl=? AND key<?)",
		"SELECT version FROM deed_events INDEXED BY deed_events_stream WHERE stream = ? ORDER BY position DESC LIMIT 1": "deed_events_stream (stream=?)",
	} {
		got := explain(t, c, text)
		require.Contains(t, got, want, text)
		require.NotContains(t, got, "TEMP B-TREE", text)
	}
}

// A query that would need more arms than one statement takes.
func TestStore_Read_ManyItems(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
	var items []eventstore.Item
	var c eventstore.Commit
	for i := range eventstore.MaxQueryItems / 2 {
		tag := fmt.Sprint("n:", i)
		items = append(items, eventstore.Item{Tags: []string{tag}}, eventstore.Item{Types: []string{"happened"}, Tags: []string{tag}})
		c.Events = append(c.Events, one(eventstore.Stream{Category: "a", ID: fmt.Sprint(i)}, "happened", tag, "all")...)
		c.Events = append(c.Events, one(eventstore.Stream{Category: "a", ID: fmt.Sprint(i)}, "ignored", "none")...)
	}
	require.Greater(t, len(items), mostArms)
	_, err := s.Append(t.Context(), c)
	require.NoError(t, err)
	for _, backward := range []bool{false, true} {
		for _, limit := range []int{0, 7} {
			var got, want []eventstore.Position
			for e, err := range s.Read(t.Context(), eventstore.Match(items...), eventstore.ReadOptions{Backward: backward, Limit: limit}) {
				require.NoError(t, err)
				got = append(got, e.Position)
			}
			for e, err := range s.Read(t.Context(), eventstore.Tagged("all"), eventstore.ReadOptions{Backward: backward, Limit: limit}) {
				require.NoError(t, err)
				want = append(want, e.Position)
			}
			require.Equal(t, want, got, "backward %t, limit %d", backward, limit)
		}
	}
}

// The largest queries that are allowed can be read, and be a condition.
func TestStore_LargestQueries(t *testing.T) {
	metatest.NotRaced(t)
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"))
	names := func(prefix string, n int) []string {
		all := make([]string, n)
		for i := range all {
			all[i] = fmt.Sprint(prefix, i)
		}
		return all
	}
	types, tags := names("type", eventstore.MaxItemTypes), names("tag", eventstore.MaxItemTags)
	var all []eventstore.Event
	for _, name := range types {
		all = append(all, one(ann, name)...)
	}
	_, err := s.Append(t.Context(), eventstore.Commit{Events: all})
	require.NoError(t, err)
	_, err = s.Append(t.Context(), eventstore.Commit{Events: one(ann, "type7", tags...)})
	require.NoError(t, err)
	items := func(make func(i int) eventstore.Item) eventstore.Query {
		var q eventstore.Query
		for i := range eventstore.MaxQueryItems {
			q.Items = append(q.Items, make(i))
		}
		return q
	}
	for name, test := range map[string]struct {
		query eventstore.Query
		want  int
	}{
		"types":                {eventstore.OfTypes(types...), len(types) + 1},
		"tags":                 {eventstore.Tagged(tags...), 1},
		"types and tags":       {eventstore.Match(eventstore.Item{Types: types, Tags: tags}), 1},
		"fewer types and tags": {eventstore.Match(eventstore.Item{Types: types[:mostIn-1], Tags: tags}), 1},
		"items of types":       {items(func(int) eventstore.Item { return eventstore.Item{Types: types} }), len(types) + 1},
		"items of types and tags": {items(func(i int) eventstore.Item {
			return eventstore.Item{Types: types[:mostIn-1], Tags: append(names(fmt.Sprint("item", i, "-"), len(tags)-1), tags[0])}
		}), 0},
		"items that match": {items(func(int) eventstore.Item { return eventstore.Item{Category: "account", Types: types, Tags: tags} }), 1},
	} {
		for _, backward := range []bool{false, true} {
			if backward && len(test.query.Items) > 1 {
				continue // they take seconds to prepare, and differ in a word
			}
			got := 0
			for _, err := range s.Read(t.Context(), test.query, eventstore.ReadOptions{Backward: backward}) {
				require.NoError(t, err, name)
				got++
			}
			require.Equal(t, test.want, got, name)
		}
		_, err = s.Append(t.Context(), eventstore.Commit{Events: one(ann, "never"), Conditions: []eventstore.Condition{eventstore.NoneMatch(test.query, 0)}})
		if test.want > 0 {
			require.ErrorIs(t, err, eventstore.ErrConflict, name)
		} else {
			require.NoError(t, err, name)
		}
	}
}

// A statement that is read row by row is not finalized meanwhile, though the
// names of streams need others and the connection keeps only so many.
func TestStore_Read_StatementsMakeRoom(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "log.db"), func(s *settings) error { s.readers = 1; return nil })
	for i := range 4 {
		_, err := s.Append(t.Context(), eventstore.Commit{Events: one(eventstore.Stream{Category: "account", ID: fmt.Sprint(i)}, "opened", "a", "b")})
		require.NoError(t, err)
	}
	for _, err := range s.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{Limit: 1}) {
		require.NoError(t, err) // the first name is known
	}
	c, err := s.pages.get(t.Context())
	require.NoError(t, err)
	for text, known := range c.statements {
		known.finalize()
		delete(c.statements, text)
	}
	// BEGIN, the positions and the events make it full; the second name needs room.
	for i := range mostStatements - 3 {
		require.NoError(t, c.run(fmt.Sprintf("SELECT %d WHERE 0", i)))
	}
	s.pages.put(c)
	n := 0
	for e, err := range s.Read(t.Context(), eventstore.Tagged("a", "b"), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint(n), e.Stream.ID)
		n++
	}
	require.Equal(t, 4, n)
}

// Events that another program removed are a loud error, not silence.
func TestStore_Gap(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ damage, wants string }{
		"Middle": {"DELETE FROM deed_events WHERE position = 3", "position 4 follows, 3 expected"},
		"First":  {"DELETE FROM deed_events WHERE position = 1", "position 2 follows, 1 expected"},
		"Last":   {"DELETE FROM deed_events WHERE position = 5", "position 5 is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "log.db")
			s := open(t, path, Tail(1, 1))
			for range 5 {
				appendOne(t, s, ann, "happened")
			}
			c, err := dial(path, "")
			require.NoError(t, err)
			require.NoError(t, c.exec(test.damage))
			c.close()
			var failure error
			for _, err := range s.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{}) {
				failure = err
			}
			require.ErrorIs(t, failure, eventstore.ErrGap)
			require.ErrorContains(t, failure, test.wants)
			for _, err := range s.Subscribe(t.Context(), eventstore.All(), 0) {
				failure = err
			}
			require.ErrorIs(t, failure, eventstore.ErrGap)
			for _, err := range s.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{Backward: true}) {
				failure = err
			}
			require.ErrorIs(t, failure, eventstore.ErrGap)
		})
	}
}

// What is bound to a statement does not have it compiled anew, which takes longer
// than to read a short stream.
func TestPrepare_Once(t *testing.T) {
	t.Parallel()
	c, err := dial(filepath.Join(t.TempDir(), "once.db"), "")
	require.NoError(t, err)
	defer c.close()
	require.NoError(t, c.exec("CREATE TABLE numbers (n INTEGER PRIMARY KEY); INSERT INTO numbers VALUES (1), (2), (3)"))
	for limit := range 4 {
		s, err := c.prepare("SELECT n FROM numbers WHERE n > ? ORDER BY n LIMIT ?")
		require.NoError(t, err)
		require.NoError(t, s.bindAll([]any{0, limit}))
		rows := 0
		for more, err := s.step(); more; more, err = s.step() {
			require.NoError(t, err)
			rows++
		}
		require.Equal(t, limit, rows)
		require.Zero(t, sqlite3.Xsqlite3_stmt_status(c.tls, s.p, sqlite3.SQLITE_STMTSTATUS_REPREPARE, 0))
		s.reset()
	}
}
