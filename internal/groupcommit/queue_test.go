package groupcommit

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

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

// Callers in a closed loop end up in one batch together, and not in two groups
// that take turns.
func TestQueue_Gather(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var q Queue[chan struct{}]
		const callers, batches, takes, thinks = 10, 50, time.Millisecond, 10 * time.Microsecond
		for range callers {
			go func() {
				for {
					answer := make(chan struct{})
					if q.Put(answer, 1) == nil {
						return
					}
					<-answer
					time.Sleep(thinks)
				}
			}()
		}
		synctest.Wait()
		taken := q.Take(nil, callers/2, 100) // one group is on its way, the other waits
		began := time.Now()
		for n := range batches {
			time.Sleep(takes)
			for _, answer := range taken {
				close(answer)
			}
			q.Gather(100*time.Microsecond, 100, 100)
			taken = q.Take(taken[:0], 100, 100)
			require.Len(t, taken, callers, "batch %d", n)
		}
		require.Equal(t, batches*(takes+thinks), time.Since(began), "it waited for longer than it took them")
		q.Close()
		for _, answer := range taken {
			close(answer)
		}
		time.Sleep(time.Second) // until the callers have noticed
	})
}

// Callers that were kept once, by a collection of garbage perhaps, are together
// again soon.
func TestQueue_GatherAfterADelay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var q Queue[chan time.Duration]
		const callers, batches, takes, thinks, most = 10, 50, time.Millisecond, 10 * time.Microsecond, 100 * time.Microsecond
		for range callers {
			go func() {
				for {
					answer := make(chan time.Duration, 1)
					if q.Put(answer, 1) == nil {
						return
					}
					time.Sleep(<-answer)
				}
			}()
		}
		synctest.Wait()
		taken := q.Take(nil, 100, 100)
		for n := range batches {
			time.Sleep(takes)
			for i, answer := range taken {
				if n == 10 && i > 0 {
					answer <- 2 * most
				} else {
					answer <- thinks
				}
			}
			q.Gather(most, 100, 100)
			taken = q.Take(taken[:0], 100, 100)
			if n < 10 || n > 15 {
				require.Len(t, taken, callers, "batch %d", n)
			}
		}
		q.Close()
		for _, answer := range taken {
			answer <- 0
		}
		time.Sleep(time.Second) // until the callers have noticed
	})
}

// Those who do not come back are not waited for.
func TestQueue_GatherInVain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var q Queue[int]
		const most, batches = time.Millisecond, 4 * restsBetween
		waited := 0
		for range batches {
			for n := range 10 {
				q.Put(n, 1)
			}
			require.Len(t, q.Take(nil, 5, 100), 5)
			before := time.Now()
			q.Gather(most, 100, 100)
			if passed := time.Since(before); passed > 0 {
				require.Equal(t, most, passed)
				waited++
			}
			require.Len(t, q.Take(nil, 100, 100), 5)
		}
		require.Positive(t, waited)
		require.LessOrEqual(t, waited, batches/restsBetween+2)
	})
}

// There is nobody to wait for: a lone caller, an empty queue, a closed one, a
// batch that is large enough.
func TestQueue_GatherNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var q Queue[int]
		before := time.Now()
		q.Gather(time.Hour, 1000, 1000)
		q.Put(1, 1)
		q.Take(nil, 10, 10)
		q.Gather(time.Hour, 1000, 1000)
		for n := range largeBatch + 1 {
			q.Put(n, 1)
		}
		q.Take(nil, 1000, 1000)
		q.Gather(time.Hour, 1000, 1000)
		// What waits is a full batch already, by count or by cost.
		for range 10 {
			q.Put(1, 100)
		}
		q.Take(nil, 5, 1000)
		q.Gather(time.Hour, 5, 1000)
		q.Take(nil, 2, 1000)
		q.Gather(time.Hour, 10, 300)
		q.Take(nil, 10, 1000)
		q.Gather(0, 1, 1)
		q.Put(1, 1)
		q.Put(2, 1)
		q.Take(nil, 10, 10)
		q.Close()
		q.Gather(time.Hour, 1000, 1000)
		require.Zero(t, time.Since(before))
	})
}

// Closing ends the wait.
func TestQueue_GatherClosed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var q Queue[int]
		q.Put(1, 1)
		q.Put(2, 1)
		q.Take(nil, 10, 10)
		before := time.Now()
		go func() { time.Sleep(time.Second); q.Close() }()
		q.Gather(time.Hour, 1000, 1000)
		require.Equal(t, time.Second, time.Since(before))
	})
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
