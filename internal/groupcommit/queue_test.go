package groupcommit

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestQueue_Take(t *testing.T) {
	t.Parallel()
	var q Queue[string]
	require.Empty(t, q.Take(nil, 10, 10))
	for _, v := range []string{"a", "b", "c", "d"} {
		q.Put(v, 4)
	}
	require.Equal(t, []string{"a", "b"}, q.Take(nil, 10, 9), "as many as the cost allows")
	require.Equal(t, []string{"c"}, q.Take(nil, 1, 9), "as many as the count allows")
	require.Equal(t, 1, q.Len())
	q.Put("large", 100)
	require.Equal(t, []string{"d"}, q.Take(nil, 10, 10))
	require.Equal(t, []string{"large"}, q.Take(nil, 10, 10), "one that alone exceeds the limit is not stuck")
	require.Empty(t, q.Take(nil, 10, 10))
}

func TestQueue_Remove(t *testing.T) {
	t.Parallel()
	var q Queue[string]
	a, b, c := q.Put("a", 1), q.Put("b", 1), q.Put("c", 1)
	require.True(t, q.Remove(b))
	require.False(t, q.Remove(b), "twice")
	require.Equal(t, 2, q.Len())
	require.Equal(t, []string{"a"}, q.Take(nil, 1, 10))
	require.False(t, q.Remove(a), "a batch has taken it")
	require.True(t, q.Remove(c))
	require.Empty(t, q.Take(nil, 10, 10))
	require.Zero(t, q.Len())
}

func TestQueue_Close(t *testing.T) {
	t.Parallel()
	wakes := 0
	q := Queue[string]{Wake: func() { wakes++ }}
	q.Put("a", 1)
	q.Close()
	require.True(t, q.Closed())
	require.Equal(t, 2, wakes)
	require.Nil(t, q.Put("b", 1))
	require.Equal(t, []string{"a"}, q.Take(nil, 10, 10), "what waited can be taken")
}

// Every value comes out once, each producer's in its order, or was removed.
func TestQueue_Concurrent(t *testing.T) {
	t.Parallel()
	const producers, each = 8, 500
	wake := make(chan struct{}, 1)
	q := Queue[[2]int]{Wake: func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	}}
	var removed sync.Map
	var group sync.WaitGroup
	for p := range producers {
		group.Go(func() {
			for n := range each {
				e := q.Put([2]int{p, n}, 1)
				if n%3 == 0 && q.Remove(e) {
					removed.Store(e.Value, true)
				}
			}
		})
	}
	go func() { group.Wait(); q.Close() }()
	next := [producers]int{}
	for !q.Closed() || q.Len() > 0 {
		batch := q.Take(nil, 64, 1000)
		for _, v := range batch {
			for ; next[v[0]] < v[1]; next[v[0]]++ {
				_, ok := removed.Load([2]int{v[0], next[v[0]]})
				require.True(t, ok, "%v was skipped", [2]int{v[0], next[v[0]]})
			}
			require.Equal(t, v[1], next[v[0]], "producer %d is out of order", v[0])
			next[v[0]]++
		}
		if len(batch) == 0 {
			<-wake
		}
	}
	group.Wait()
	for p, n := range next {
		for ; n < each; n++ {
			_, ok := removed.Load([2]int{p, n})
			require.True(t, ok, "%v was lost", [2]int{p, n})
		}
	}
}
