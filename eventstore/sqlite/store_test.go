package sqlite

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

func open(t *testing.T, path string, options ...Option) *Store {
	t.Helper()
	s, err := Open(t.Context(), path, options...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestSmoke(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.db")
	s := open(t, path)
	ann := eventstore.Stream{Category: "account", ID: "ann"}
	r, err := s.Append(t.Context(), eventstore.Commit{Key: "k", Events: []eventstore.Event{{Stream: ann, Type: "opened", Tags: []string{"a", "b"}, Data: []byte("{}"), Metadata: eventstore.Metadata{Actor: "x"}}, {Stream: ann, Type: "closed"}}, Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}})
	require.NoError(t, err)
	require.Equal(t, eventstore.Position(2), r.Last)
	_, err = s.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: ann, Type: "opened"}}, Conditions: []eventstore.Condition{eventstore.NoneMatch(eventstore.Tagged("a"), 0)}})
	require.ErrorIs(t, err, eventstore.ErrConflict)
	for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneStream(ann), eventstore.OneCategory("account"), eventstore.OfTypes("opened", "closed"), eventstore.Tagged("a", "b"), eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 0, To: 1024}})} {
		for _, back := range []bool{false, true} {
			n := 0
			for e, err := range s.Read(t.Context(), q, eventstore.ReadOptions{Backward: back}) {
				require.NoError(t, err)
				require.Equal(t, ann, e.Stream)
				n++
			}
			require.NotZero(t, n)
		}
	}
	for b, err := range s.Subscribe(t.Context(), eventstore.All(), 0) {
		require.NoError(t, err)
		require.Len(t, b.Events, 2)
		require.True(t, b.CaughtUp)
		break
	}
	require.NoError(t, s.Close())
	s = open(t, path)
	d, ok, err := s.Lookup(t.Context(), ann, "k")
	require.NoError(t, err)
	require.True(t, ok)
	r.Duplicate = true
	require.Equal(t, r, d)
}
