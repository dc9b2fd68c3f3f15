package nats

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// What was read earlier never takes the place of what was read, or written, later.
func TestHeads_OlderNeverReplacesNewer(t *testing.T) {
	t.Parallel()
	var h heads
	h.init(10)
	ann := account("ann")
	h.set(ann, head{version: 5, sequence: 50})
	h.set(ann, head{version: 4, sequence: 40})
	h.setNew(ann, head{version: 3, sequence: 30})
	h.keep(ann, head{version: 2, sequence: 20}, new(keys))
	now, ok := h.get(ann)
	require.True(t, ok)
	require.EqualValues(t, 5, now.version)
	require.EqualValues(t, 50, now.sequence)
	h.set(ann, head{version: 6, sequence: 60})
	now, _ = h.get(ann)
	require.EqualValues(t, 60, now.sequence)
}

// Keys count as much as streams, also those found after the head was
// remembered and those that are added later.
func TestHeads_KeysCount(t *testing.T) {
	t.Parallel()
	var h heads
	h.init(10)
	filled := func(n int) *keys {
		k := new(keys)
		for i := range n {
			k.add(fmt.Sprint(i), usedKey{})
		}
		return k
	}
	for i := range 8 {
		h.set(account(fmt.Sprint(i)), head{version: 1, sequence: uint64(i + 1)})
	}
	require.Len(t, h.known, 8)
	k := filled(4)
	h.keep(account("7"), head{version: 1, sequence: 8}, k)
	require.Equal(t, 10, h.weight)
	require.Len(t, h.known, 6)
	k.add("more", usedKey{})
	h.keep(account("7"), head{version: 1, sequence: 8}, k)
	require.Equal(t, 10, h.weight)
	require.Len(t, h.known, 5)
	h.keep(account("new"), head{version: 1, sequence: 9}, filled(8))
	require.Len(t, h.known, 1)
	require.Equal(t, 9, h.weight)
	_, ok := h.get(account("new"))
	require.True(t, ok)
}

// The same through the store: looking for keys of many streams does not grow
// what is remembered beyond its size.
func TestStore_KeysAreBounded(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	writer, name := openLog(t, c)
	for i := range 10 {
		for k := range 5 {
			_, err := writer.Append(t.Context(), eventstore.Commit{Events: happened(account(fmt.Sprint(i)), 1), Key: fmt.Sprint(k)})
			require.NoError(t, err)
		}
	}
	store := reopenLog(t, c, name, hooked(func(s *settings) { s.headsMost = 20 }))
	for range 2 {
		for i := range 10 {
			_, ok, err := store.Lookup(t.Context(), account(fmt.Sprint(i)), "3")
			require.NoError(t, err)
			require.True(t, ok)
			require.LessOrEqual(t, store.heads.weight, 20)
			r, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account(fmt.Sprint(i)), 1), Key: "3"})
			require.NoError(t, err)
			require.True(t, r.Duplicate)
			require.LessOrEqual(t, store.heads.weight, 20)
		}
	}
	weight := 0
	for _, e := range store.heads.known {
		r := e.Value.(*rememberedHead)
		require.Equal(t, 1+keysOf(r.head), r.weight)
		weight += r.weight
	}
	require.Equal(t, weight, store.heads.weight)
}

func keysOf(h head) int {
	if h.keys == nil {
		return 0
	}
	return h.keys.size()
}
