package nats

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// line is a scheduler whose groups nobody writes.
type line struct {
	*scheduler
	t    *testing.T
	next int
}

func newLine(t *testing.T) *line {
	s := &Store{}
	s.replicas.Store(1)
	l := &line{scheduler: &scheduler{store: s, wake: make(chan struct{}, 1), busy: map[eventstore.Stream]struct{}{}}, t: t}
	return l
}

// wait has so many commits wait.
func (l *line) wait(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for range n {
		l.next++
		of := account(fmt.Sprint(l.next))
		e := &entry{commit: eventstore.Commit{Events: happened(of, 1)}, writes: []eventstore.Stream{of}, streams: []eventstore.Stream{of}, most: 1, bytes: 500, done: func(eventstore.Receipt, error) {}}
		l.waiting = append(l.waiting, e)
		l.size.add(e)
	}
}

// begin returns the sizes of the groups that begin now.
func (l *line) begin() (sizes []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, group := range l.pick() {
		l.batches++
		sizes = append(sizes, len(group))
	}
	return sizes
}

// answer ends a batch that took so long; meanwhile so many of its callers come back.
func (l *line) answer(callers int, took time.Duration, back int) {
	a := answered{callers: callers, before: l.waits(), took: took}
	l.wait(back)
	l.release(job{batch: true}, a)
	select {
	case <-l.wake:
	default:
	}
}

// Those who were answered are waited for, those who came meanwhile do not begin
// without them.
func TestScheduler_Gathers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLine(t)
		l.wait(40)
		require.Equal(t, []int{40}, l.begin())
		l.wait(24)
		require.Empty(t, l.begin(), "a batch is under way, and this is little")
		l.answer(40, 8*time.Millisecond, 10)
		began := time.Now()
		require.Empty(t, l.begin(), "30 are not back")
		require.False(t, l.atOnce(&entry{most: 1, writes: []eventstore.Stream{account("x")}}), "nor does one publish beside them")
		l.wait(29)
		require.Empty(t, l.begin())
		l.wait(1)
		require.Equal(t, []int{64}, l.begin())
		require.Zero(t, time.Since(began))

		// Who does not come back is waited for half as long as the batch took, and then
		// no more for many batches.
		l.answer(64, 8*time.Millisecond, 20)
		require.Empty(t, l.begin())
		<-l.wake
		require.Equal(t, 4*time.Millisecond, time.Since(began))
		require.Equal(t, []int{20}, l.begin())
		for range restsBetween - 1 {
			l.answer(20, 8*time.Millisecond, 20)
			require.Equal(t, []int{20}, l.begin())
		}
		l.answer(20, 8*time.Millisecond, 19)
		require.Empty(t, l.begin(), "and then it is tried again")
		l.wait(1)
		require.Equal(t, []int{20}, l.begin())

		// Nobody is waited for for long, or after a batch that was in trouble.
		l.answer(20, time.Minute, 0)
		began = time.Now()
		l.wait(1)
		require.Empty(t, l.begin())
		<-l.wake
		require.Equal(t, gatherMost, time.Since(began))
		require.Equal(t, []int{1}, l.begin())
		l.batches--
		l.wait(1)
		require.Equal(t, []int{1}, l.begin())
		l.mu.Lock()
		l.await(answered{})
		l.mu.Unlock()
		require.Zero(t, l.returns.wanted)
		l.close()
		synctest.Wait()
		require.Empty(t, l.begin())
	})
}

// When nearly all that wait are blocked by the batch that is under way, this is
// not found out for each of them.
func TestScheduler_Futile(t *testing.T) {
	t.Parallel()
	l := newLine(t)
	l.wait(100)
	require.Equal(t, []int{100}, l.begin())
	for n := range 1000 { // all on one stream of that batch
		l.mu.Lock()
		of := account("1")
		l.busy[of] = struct{}{}
		l.waiting = append(l.waiting, &entry{streams: []eventstore.Stream{of}, writes: []eventstore.Stream{of}, most: 1})
		l.mu.Unlock()
		require.Empty(t, l.begin())
		if n >= besideFrom {
			require.Greater(t, l.futile, n)
		}
	}
	l.wait(besideFrom)
	require.Equal(t, []int{besideFrom}, l.begin(), "enough that are not")
}

// Of very many callers one half is written while the other one is on its way.
func TestScheduler_TwoBatches(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLine(t)
		l.wait(1024)
		require.Equal(t, []int{messagesOne}, l.begin())
		require.Equal(t, []int{messagesOne}, l.begin())
		l.wait(besideFrom)
		require.Empty(t, l.begin(), "two are under way")
		l.answer(messagesOne, 20*time.Millisecond, besideFrom)
		require.Equal(t, []int{messagesOne}, l.begin(), "a whole batch waits for nobody")
		l.answer(messagesOne, 20*time.Millisecond, besideFrom)
		require.Empty(t, l.begin())
		l.wait(messagesOne - besideFrom)
		require.Equal(t, []int{messagesOne}, l.begin())
		l.close()
	})
}
