package postgres

import (
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

// What others have written is the same however the server sends it.
func TestLookup_DeltaInBothFormats(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s := openURL(t, url)
	for i, tags := range [][]string{nil, {"a"}, {"a", `quote " comma , brace }`, "ü", "NULL"}} {
		mustAppend(t, s, commit(event(account(fmt.Sprint("stream ", i)), fmt.Sprint("type ", i), tags...)))
	}
	conn := direct(t, url)
	read := func(mode pgx.QueryExecMode) ([]foreign, bool) {
		rows, err := conn.Query(t.Context(), s.texts.delta, mode, int64(0), int64(10))
		require.NoError(t, err)
		defer rows.Close()
		delta, err := collectDelta(rows)
		require.NoError(t, err)
		return delta, rows.FieldDescriptions()[0].Format == pgx.BinaryFormatCode
	}
	raw, binary := read(pgx.QueryExecModeCacheStatement)
	require.True(t, binary, "it is the texts that are compared")
	scanned, binary := read(pgx.QueryExecModeSimpleProtocol)
	require.False(t, binary)
	require.Len(t, raw, 3)
	require.Equal(t, scanned, raw)
	require.Equal(t, []string{"a", `quote " comma , brace }`, "ü", "NULL"}, raw[2].tags)

	_, err := decodeForeign([][]byte{{1}, nil, nil, nil, nil, nil})
	require.ErrorIs(t, err, errForeign)
}

// Who has the lock asks for what lies behind the event that it saw last. Where
// that is not the answer, it asks for everything.
func TestLookup_Behind(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s, other := openURL(t, url, always(formTwoTrips)), openURL(t, url)
	expect := func(first eventstore.Position, of string) {
		t.Helper()
		require.Equal(t, first, mustAppend(t, s, commit(event(account("ann"), "noted"))).First, of)
	}
	expect(1, "an empty log")
	expect(2, "nothing is behind it")
	mustAppend(t, other, commit(event(account("bob"), "of a kind that is new")))
	expect(4, "one is, of a kind that was not known")
	fill(t, other, mostDelta)
	expect(mostDelta+5, "as many as are read")
	fill(t, other, mostDelta+1)
	expect(2*mostDelta+7, "more than are read")
	mustAppend(t, other, commit(event(account("ann"), "noted")))
	_, err := s.Append(t.Context(), under(commit(event(account("ann"), "noted")), at(account("ann"), 5)))
	require.ErrorIs(t, err, eventstore.ErrConflict, "it is judged on what is behind")
	require.EqualValues(t, 5, s.Stats().DoubleTrips)
}

// While the lock is held, another event of a kind that is not known here is found,
// and a reader of this process makes another kind known: as many as there are.
func TestLookup_KindsOfTwo(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s, other := openURL(t, url), openURL(t, url)
	mustAppend(t, s, commit(event(account("x"), "first")))
	c := &committer{s: s, l: newLedger(), conn: direct(t, url)}
	c.l.reset(1, readAll(t, s, eventstore.All())[0].ID)
	do(t, c.conn, "INSERT INTO deed.kinds (category, type) VALUES ('account', 'A')")
	learned, err := s.readKinds(t.Context(), c.conn)
	require.NoError(t, err)
	mustAppend(t, other, commit(event(account("y"), "B")))

	l, trip := &lookup{s: s}, &pgx.Batch{}
	l.queueBehind(trip, c.l.known)
	require.NoError(t, c.conn.SendBatch(t.Context(), trip).Close())
	whole, err := l.behind(c.l)
	require.NoError(t, err)
	require.True(t, whole)
	s.kinds.Store(learned) // as the reader does
	require.False(t, s.knows(l.delta))
	b := &batch{entries: []*entry{{commit: under(commit(event(account("z"), "first")), at(account("z"), 0), eventstore.NoneMatch(eventstore.OfTypes("B"), 1))}}}
	require.ErrorIs(t, l.settle(c.l, b, &questions{}), eventstore.ErrGap, "an event of no kind is not entered")

	require.NoError(t, c.knowKinds(t.Context(), l.delta))
	require.NoError(t, l.settle(c.l, b, &questions{}))
	need, _ := b.judge(c.l)
	require.False(t, need.any())
	require.Len(t, b.losers, 1, "there is a B")
}
