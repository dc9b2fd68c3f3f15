package esdbserver

import (
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestEncodeDecode(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var records []*record
		for range rapid.IntRange(0, 5).Draw(t, "records") {
			r := &record{
				stream: rapid.String().Draw(t, "stream"), eventType: rapid.String().Draw(t, "type"),
				json: rapid.Bool().Draw(t, "json"), created: rapid.Int64().Draw(t, "created"),
				data: rapid.SliceOf(rapid.Byte()).Draw(t, "data"), meta: rapid.SliceOf(rapid.Byte()).Draw(t, "metadata"),
			}
			copy(r.id[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id"))
			if rapid.Bool().Draw(t, "tombstone") {
				r.revision = deletedRevision
			}
			records = append(records, r)
		}
		got, err := decode(encode(records))
		require.NoError(t, err)
		require.Equal(t, records, got)
	})
}

// Positions follow from the sizes of the records, and a database that was
// written must keep its own: the sizes never change.
func TestPositionsArePinned(t *testing.T) {
	t.Parallel()
	l := newLog(nil, 0, nil)
	for _, r := range []record{
		{stream: "a", eventType: "b", data: []byte("123"), meta: []byte("4567")},
		{stream: "größer", eventType: "$streamDeleted", revision: deletedRevision},
		{stream: "c", eventType: "d"},
	} {
		l.add(&r)
	}
	require.Equal(t, []uint64{196, 311, 439}, []uint64{l.records[0].position, l.records[1].position, l.records[2].position})
}

func FuzzDecode(f *testing.F) {
	f.Add(encode([]*record{{id: uuid.New(), stream: "a", eventType: "b", data: []byte("c"), meta: []byte("d"), created: 1}, {revision: deletedRevision}}))
	f.Add([]byte{0})
	f.Fuzz(func(t *testing.T, b []byte) {
		records, err := decode(b)
		if err != nil {
			require.ErrorIs(t, err, errStored)
			return
		}
		again, err := decode(encode(records))
		require.NoError(t, err)
		require.Equal(t, records, again)
	})
}

// What one stream's metadata says of truncation; what is no number, or no JSON,
// says nothing.
func TestParseMetadata(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]metadata{
		`{}`:                           {},
		``:                             {},
		`no`:                           {},
		`{"$tb":"3","$maxCount":2}`:    {maxCount: 2},
		`{"$tb":9223372036854775807}`:  {truncateBefore: deletedRevision},
		`{"$tb":-1,"$maxCount":-5}`:    {},
		`{"$maxAge":10,"$tb":7}`:       {maxAge: 10e9, truncateBefore: 7},
		`{"$maxAge":9000000000000000}`: {maxAge: 9223372036e9},
	} {
		require.Equal(t, want, parseMetadata([]byte(text)), text)
	}
}
