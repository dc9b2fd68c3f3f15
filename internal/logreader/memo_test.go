package logreader_test

import (
	"iter"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/logreader"
)

func TestMemo(t *testing.T) {
	var m logreader.Memo
	value, first := m.Take("a")
	require.Nil(t, value)
	require.NotNil(t, first)
	value, second := m.Take("a")
	require.Nil(t, value, "it is being made")
	require.Nil(t, second, "by another one")
	_, other := m.Take("b")
	require.NotNil(t, other, "another key is another thing")
	first.Give(7)
	value, toMake := m.Take("a")
	require.Equal(t, 7, value)
	require.Nil(t, toMake)

	var once logreader.Memo
	var made atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for key := range 100 {
				if _, toMake := once.Take(key); toMake != nil {
					made.Add(1)
					toMake.Give(key)
				}
			}
		})
	}
	all.Wait()
	require.EqualValues(t, 100, made.Load(), "of several that come at once one makes it")
}

// The memo of an event is the same one for all who have the event, whatever else
// they have.
func TestReader_Memos(t *testing.T) {
	store := memory.New()
	abc := func(n int) (head eventstore.Position) {
		for range n {
			head = put(t, store, event("account", "ann", "a"), event("account", "ann", "b"), event("account", "ann", "c"))
		}
		return head
	}
	r := logreader.New(store, logreader.Options{})
	var nexts []func() (logreader.Batch, error, bool)
	for i, q := range []eventstore.Query{eventstore.OfTypes("a", "b"), eventstore.OfTypes("b", "c"), eventstore.All(), eventstore.OfTypes("b")} {
		next, stop := iter.Pull2(r.Follow(t.Context(), q, eventstore.Position(i)))
		defer stop()
		nexts = append(nexts, next)
	}
	made, given := 0, 0
	until := func(head eventstore.Position) {
		for _, next := range nexts {
			for through := eventstore.Position(0); through < head; {
				b, err, ok := next()
				require.True(t, ok)
				require.NoError(t, err)
				through = b.Through
				for k := range b.Events {
					memo := b.Memo(k)
					if memo == nil {
						continue // alone with it
					}
					value, toMake := memo.Take("position")
					if toMake != nil {
						toMake.Give(b.Events[k].Position)
						made++
						continue
					}
					require.Equal(t, b.Events[k].Position, value)
					given++
				}
			}
		}
	}
	for range 3 {
		until(abc(40)) // they find one another
	}
	require.Equal(t, 1, logreader.Groups(r))
	made, given = 0, 0
	until(abc(40))
	require.Equal(t, 3*40, made)
	require.Equal(t, 2*40+2*40+3*40+40-made, given)
}
