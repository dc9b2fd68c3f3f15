package postgres

import (
	"bytes"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

func someTexts() *rapid.Generator[[]string] {
	return rapid.SliceOfN(rapid.String(), 0, 8)
}

// What is written by hand is what pgx and PostgreSQL understand.
func TestWire_Arrays(t *testing.T) {
	t.Parallel()
	m := pgtype.NewMap()
	rapid.Check(t, func(t *rapid.T) {
		all := someTexts().Draw(t, "texts")
		encoded := appendTexts(nil, all)
		var got []string
		require.NoError(t, m.Scan(pgtype.TextArrayOID, pgtype.BinaryFormatCode, encoded, &got))
		require.Equal(t, len(all), len(got))
		require.True(t, slices.Equal(all, got))

		back, err := decodeTexts(encoded)
		require.NoError(t, err)
		require.True(t, slices.Equal(all, back))
		if len(all) > 0 {
			theirs, err := m.Encode(pgtype.TextArrayOID, pgtype.BinaryFormatCode, all, nil)
			require.NoError(t, err)
			require.Equal(t, theirs, encoded)
			field := fieldTexts(nil, all)
			require.Equal(t, encoded, field[4:])
		}

		numbers := rapid.SliceOfN(rapid.Int32(), 0, 8).Draw(t, "numbers")
		value, oid := encodeArgument(numbers)
		var ints []int32
		require.NoError(t, m.Scan(oid, pgtype.BinaryFormatCode, value, &ints))
		require.True(t, slices.Equal(numbers, ints))
		value, oid = encodeArgument(all)
		require.NoError(t, m.Scan(oid, pgtype.BinaryFormatCode, value, &got))
		require.True(t, slices.Equal(all, got))

		n := rapid.Int64().Draw(t, "n")
		var number int64
		value, oid = encodeArgument(n)
		require.NoError(t, m.Scan(oid, pgtype.BinaryFormatCode, value, &number))
		require.Equal(t, n, number)
	})
	require.Panics(t, func() { encodeArgument(1.5) })
}

// A row is put together by hand and taken apart by PostgreSQL: all of COPY's
// fields, at their bounds.
func TestWire_Rows(t *testing.T) {
	t.Parallel()
	conn := direct(t, pgtest.Database(t))
	do(t, conn, "CREATE TEMPORARY TABLE events (position bigint, version bigint, kind int, slice smallint, id uuid, time bigint, stream text, tags text[], metadata text, data bytea)")
	type row struct {
		position, version uint64
		kind              int32
		slice             uint16
		id                uuid.UUID
		time              int64
		stream            string
		tags              []string
		metadata, data    []byte
	}
	rows := []row{
		{1, 1, 1, 0, newID(), 0, "a-b", nil, nil, nil},
		{math.MaxInt64, math.MaxInt64, math.MaxInt32, 1023, newID(), math.MaxInt64, "ünï-" + strings.Repeat("x", 5000), []string{"a", "", `"`, "{,}\\", "\n"}, []byte(`{"a":"b"}`), []byte{}},
		{2, 3, 4, 5, newID(), math.MinInt64, "-", []string{strings.Repeat("é", 1000)}, []byte("x"), bytes.Repeat([]byte{0, 0xff, '\\', '.'}, 100_000)},
	}
	message := appendQuery(nil, "COPY events FROM STDIN (FORMAT binary)")
	message = appendCopy(message, func(to []byte) []byte {
		for _, r := range rows {
			encoded := appendRow(nil, r.slice, r.id, r.time, r.stream, r.tags, r.metadata, r.data)
			setRow(encoded, r.position, r.version, r.kind)
			require.Equal(t, fieldText(nil, r.stream), rowField(encoded, 6))
			require.Equal(t, fieldBytes(nil, r.data), rowField(encoded, 9))
			to = append(to, encoded...)
		}
		return to
	})
	c := &committer{conn: conn, s: &Store{}}
	_, err := c.exchange(message)
	require.NoError(t, err)
	found, err := conn.Query(t.Context(), "SELECT * FROM events")
	require.NoError(t, err)
	defer found.Close()
	for _, want := range rows {
		require.True(t, found.Next())
		var got row
		var position, version, at int64
		var slice int16
		var metadata *string
		require.NoError(t, found.Scan(&position, &version, &got.kind, &slice, &got.id, &at, &got.stream, &got.tags, &metadata, &got.data))
		got.position, got.version, got.slice, got.time = uint64(position), uint64(version), uint16(slice), at
		if metadata != nil {
			got.metadata = []byte(*metadata)
		}
		require.Equal(t, want, got)
	}
	require.False(t, found.Next())
	require.NoError(t, found.Err())
}

// Prepared statements are executed up to the first that fails; nothing of what one
// message says is kept then, and the connection is sound.
func TestWire_Execute(t *testing.T) {
	t.Parallel()
	conn := direct(t, pgtest.Database(t))
	do(t, conn, "CREATE TABLE public.numbers (n bigint PRIMARY KEY)")
	for name, text := range map[string]string{"put": "INSERT INTO public.numbers VALUES ($1)", "copy": "COPY public.numbers FROM STDIN (FORMAT binary)"} {
		_, err := conn.Prepare(t.Context(), name, text)
		require.NoError(t, err)
	}
	number := func(n int64) func([]byte) []byte {
		return func(to []byte) []byte { return fieldInt64(appendInt16(to, 1), n) }
	}
	c := &committer{conn: conn, s: &Store{}}
	for i, test := range []struct{ first, copied, last, sum int64 }{
		{1, math.MaxInt64 - 10, 3, math.MaxInt64 - 6},
		{1, 5, 6, math.MaxInt64 - 6}, // the first fails, and the data is passed over
		{7, 3, 6, math.MaxInt64 - 6}, // the COPY does
		{7, 8, 1, math.MaxInt64 - 6}, // the last does
		{-7, 8, -4, math.MaxInt64 - 9},
	} {
		message := appendCopy(appendExecute(appendExecute(nil, "put", test.first), "copy"), number(test.copied))
		_, err := c.exchange(appendSync(appendExecute(message, "put", test.last)))
		if i%4 == 0 {
			require.NoError(t, err)
		} else {
			require.Equal(t, "23505", code(err))
			require.True(t, answered(err))
		}
		require.Equal(t, test.sum, scalar[int64](t, conn, "SELECT sum(n)::bigint FROM public.numbers"), "after %d", i)
	}
}

// Events come back as they were given, whatever is in them.
func TestWire_Events(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	var stores []*Store
	for _, f := range forms {
		stores = append(stores, openURL(t, url, always(f)))
	}
	n := 0
	text := func(most int) *rapid.Generator[string] {
		return rapid.StringOfN(rapid.RuneFrom(eventTexts), 1, 20, most)
	}
	rapid.Check(t, func(rt *rapid.T) {
		n++
		s := stores[n%len(stores)]
		count := rapid.IntRange(1, 4).Draw(rt, "events")
		var c eventstore.Commit
		for range count {
			e := eventstore.Event{
				Stream: eventstore.Stream{Category: rapid.StringMatching(`[a-zA-Z][a-zA-Z0-9._]{0,20}`).Draw(rt, "category"), ID: text(100).Draw(rt, "id")},
				Type:   text(100).Draw(rt, "type"),
				Tags:   rapid.SliceOfNDistinct(text(100), 0, 5, func(s string) string { return s }).Draw(rt, "tags"),
				Data:   rapid.SliceOfN(rapid.Byte(), 0, 50).Draw(rt, "data"),
				Metadata: eventstore.Metadata{
					Actor: rapid.String().Draw(rt, "actor"), SchemaVersion: rapid.IntRange(0, 9).Draw(rt, "schema"),
					Extra: rapid.MapOfN(rapid.String(), rapid.String(), 0, 3).Draw(rt, "extra"),
				},
			}
			if len(e.Tags) == 0 {
				e.Tags = nil
			}
			c.Events = append(c.Events, e)
		}
		c.Key = "key " + text(100).Draw(rt, "key") + newID().String()
		c.Fingerprint = string(rapid.SliceOfN(rapid.Byte(), 1, 30).Draw(rt, "fingerprint"))
		r, err := s.Append(t.Context(), c)
		require.NoError(rt, err, "%+v", c)
		reader := stores[(n+1)%len(stores)]
		i := 0
		for e, err := range reader.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{After: r.First - 1, Through: r.Last}) {
			require.NoError(rt, err)
			given := c.Events[i]
			require.Equal(rt, given.Stream, e.Stream)
			require.Equal(rt, given.Type, e.Type)
			require.Equal(rt, given.Tags, e.Tags)
			require.True(rt, bytes.Equal(given.Data, e.Data))
			require.Equal(rt, given.Metadata.Actor, e.Metadata.Actor)
			require.Equal(rt, len(given.Metadata.Extra), len(e.Metadata.Extra))
			i++
		}
		require.Equal(rt, len(c.Events), i)
		first, found, err := reader.Lookup(t.Context(), eventstore.Stream{}, c.Key)
		require.NoError(rt, err)
		require.True(rt, found)
		r.Duplicate = true
		require.Equal(rt, r, first)
		for _, e := range c.Events {
			for _, tag := range e.Tags {
				require.NotEmpty(rt, readAll(t, reader, eventstore.Match(eventstore.Item{Tags: []string{tag}, Types: []string{e.Type}, Category: e.Stream.Category})))
			}
		}
	})
}

// eventTexts are characters that names may have and parsers do not like.
var eventTexts = []rune("az09 -_.,;:'\"\\{}()[]%$|/é日本\u00a0\u2028\u200b\U0001F600")

// Bytes that were stored are never trusted.
func FuzzDecodeTexts(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(appendTexts(nil, []string{"a", "", "ünï"}))
	f.Add(appendTexts(nil, nil))
	f.Add(appendArray(nil, pgtype.TextOID, math.MaxInt32))
	f.Add(appendInt32(appendArray(nil, pgtype.TextOID, 1), null))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := decodeTexts(b)
		if err != nil {
			require.ErrorIs(t, err, errArray)
			require.Nil(t, all)
			return
		}
		// What was understood is understood by others alike.
		var theirs []string
		if pgtype.NewMap().Scan(pgtype.TextArrayOID, pgtype.BinaryFormatCode, b, &theirs) == nil && len(b) > 0 {
			require.True(t, slices.Equal(theirs, all), "%q, and by pgx %q", all, theirs)
		}
		again, err := decodeTexts(appendTexts(nil, all))
		require.NoError(t, err)
		require.True(t, slices.Equal(all, again))
	})
}

// A row that somebody has damaged is an error, or what pgx understands by it.
func FuzzDecodeForeign(f *testing.F) {
	id := uuid.New()
	f.Add(appendInt64(nil, 7), appendInt64(nil, 1), appendInt32(nil, 3), id[:], "account-ann", appendTexts(nil, []string{"a"}))
	f.Add(appendInt64(nil, -1), appendInt64(nil, 0), appendInt32(nil, -3), id[:], "", []byte(nil))
	f.Add([]byte(nil), []byte{1}, []byte(nil), id[:15], "é", []byte{0})
	f.Fuzz(func(t *testing.T, position, version, kind, id []byte, stream string, tags []byte) {
		row := [][]byte{position, version, kind, id, []byte(stream), tags}
		for n := range row {
			_, err := decodeForeign(row[:n])
			require.ErrorIs(t, err, errForeign, "%d fields", n)
		}
		got, err := decodeForeign(row)
		if err != nil {
			return
		}
		scan := func(oid uint32, b []byte, into any) {
			require.NoError(t, pgtype.NewMap().Scan(oid, pgtype.BinaryFormatCode, b, into))
		}
		var p, v int64
		var k int32
		var u uuid.UUID
		scan(pgtype.Int8OID, position, &p)
		scan(pgtype.Int8OID, version, &v)
		scan(pgtype.Int4OID, kind, &k)
		scan(pgtype.UUIDOID, id, &u)
		all, err := decodeTexts(tags)
		require.NoError(t, err)
		require.Equal(t, foreign{position: eventstore.Position(p), version: uint64(v), kind: k, id: u, stream: stream, tags: all}, got)
	})
}

func TestTokens(t *testing.T) {
	t.Parallel()
	for sql, want := range map[string]string{
		"":                              "",
		"SELECT a.b, c":                 "SELECT a . b , c",
		"select 'a; b' ; COMMIT":        "select ; COMMIT",
		"select 'it''s'; x":             "select ; x",
		`select '\'; x`:                 "select ; x",
		`select E'\'; x'; y`:            "select E ; y",
		`select e'\\'; x`:               "select e ; x",
		`select date'\'; x`:             "select date ; x",
		`select "a;""b".c`:              `select "a;""b" . c`,
		"select -- a; b\n c":            "select c",
		"select -- a; b":                "select",
		"select /* a; /* b; */ c; */ d": "select d",
		"select /* a; ":                 "select",
		"select $$a; $x$ b$$; c":        "select ; c",
		"select $x$a; $$ b$x$; c":       "select ; c",
		"select $1, $2; c":              "select $ 1 , $ 2 ; c",
		"select a$b$c; d$b$e":           "select a$b$c ; d$b$e",
		"select 1-- x\n-2":              "select 1 - 2",
		"ünï.b":                         "ünï . b",
		"'never ends; x":                "",
		`"never ends; x`:                `"never ends; x`,
		"$$never ends; x":               "",
	} {
		var got []string
		for _, token := range tokens(sql) {
			got = append(got, token.text)
		}
		require.Equal(t, want, strings.Join(got, " "), "%q", sql)
	}
}

func TestStore_Guard(t *testing.T) {
	t.Parallel()
	s := &Store{settings: settings{schema: "Deed x"}}
	for _, sql := range []string{
		"SELECT 1", "INSERT INTO deed.events VALUES (1)", "SELECT 'COMMIT; ROLLBACK'", `SELECT "Deed x"`, "SELECT deed, x.y FROM a.b", "/* COMMIT */ SELECT 1 -- ; COMMIT",
		"CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$", "UPDATE a SET b = 1", "SELECT 1; SELECT 2;",
	} {
		require.NoError(t, s.guard(sql), sql)
	}
	for _, sql := range []string{
		"COMMIT", "commit;", "SELECT 1; RollBack", "; END", "/* x */ BEGIN", "-- x\nABORT", "SAVEPOINT a", "SET search_path = x", "LISTEN x", "COPY a FROM STDIN",
		`SELECT * FROM "Deed x".events`, `DELETE FROM "Deed x" . "events"`, `SELECT date'\'; COMMIT --'`, "VACUUM", "PREPARE TRANSACTION 'x'", "DEALLOCATE ALL",
	} {
		err := s.guard(sql)
		require.ErrorIs(t, err, eventstore.ErrInvalid, sql)
		require.ErrorContains(t, err, "sql", "it quotes the statement")
	}
}

// Whatever comes, dividing it ends, and the tokens are parts of it, in order.
// What the server takes for one statement is never taken for one that ends the
// transaction.
func FuzzTokens(f *testing.F) {
	for _, sql := range []string{"SELECT 1; COMMIT", "E'\\''", "$a$ $b$ $a$", "/* /* */", `"a""b"`, "--\n", "é'", "$", "''''"} {
		f.Add(sql)
	}
	f.Fuzz(func(t *testing.T, sql string) {
		rest := sql
		for _, token := range tokens(sql) {
			require.NotEmpty(t, token.text)
			at := strings.Index(rest, token.text)
			require.GreaterOrEqual(t, at, 0, "%q is not in %q", token.text, rest)
			rest = rest[at+len(token.text):]
			_ = token.value()
		}
		// A literal, a comment and a quoted name are one piece, whatever is in them.
		for _, piece := range []string{literal(strings.ReplaceAll(sql, `\`, "")), "/*" + strings.ReplaceAll(sql, "*", "") + " */", pgx.Identifier{sql}.Sanitize()} {
			got := tokens("a " + piece + " ; b")
			require.Equal(t, "a", got[0].text)
			require.Equal(t, "b", got[len(got)-1].text)
			require.LessOrEqual(t, len(got), 4, "%q: %+v", piece, got)
		}
	})
}

// Answers of the server and of poolers, and of what is in between.
func TestAnswered(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		severity, unlocalized, code string
		want                        bool
	}{
		{"ERROR", "ERROR", "23505", true},
		{"FEHLER", "ERROR", "23505", true}, // the server speaks the language of lc_messages
		{"ERROR", "", "23505", true},
		{"FATAL", "FATAL", "57P01", false},
		{"FATAL", "FATAL", "25P03", false},
		{"ERROR", "", "08P01", false}, // a pooler that has lost the server
		{"PANIC", "PANIC", "XX000", false},
	} {
		require.Equal(t, test.want, answered(pgError(test.severity, test.unlocalized, test.code)), "%+v", test)
	}
	require.False(t, answered(nil))
	require.False(t, answered(errNoAnswer))
}

// The server is asked: what the guard lets pass does not end the transaction.
func TestStore_GuardAsTheServerReads(t *testing.T) {
	t.Parallel()
	s := &Store{settings: settings{schema: "deed"}}
	conn := direct(t, pgtest.Database(t)).PgConn()
	fragments := []string{"'", "'", `\`, "$$", "$a$", "E", "e", "date", "N", "--", "\n", "/*", "*/", ";", ";", "COMMIT", "commit", "ROLLBACK", "SELECT 1", "SELECT ", "x", `"`, " ", "U&", "B", "1", "$1", "::text", "é"}
	passed := 0
	rapid.Check(t, func(rt *rapid.T) {
		for range pick(100, 10) {
			sql := strings.Join(rapid.SliceOfN(rapid.SampledFrom(fragments), 1, 14).Draw(rt, "fragments"), "")
			if s.guard(sql) != nil {
				continue
			}
			passed++
			if conn.TxStatus() != 'T' {
				_, err := conn.Exec(t.Context(), "ROLLBACK").ReadAll()
				require.NoError(rt, err)
				_, err = conn.Exec(t.Context(), "BEGIN").ReadAll()
				require.NoError(rt, err)
			}
			_, _ = conn.Exec(t.Context(), sql).ReadAll()
			require.NotEqual(rt, byte('I'), conn.TxStatus(), "%q has ended the transaction", sql)
		}
	})
	require.Greater(t, passed, 100)
}
