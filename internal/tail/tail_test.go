package tail

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// batch returns events at the positions from first to last.
func batch(first, last eventstore.Position) []eventstore.Recorded {
	var events []eventstore.Recorded
	for p := first; p <= last; p++ {
		events = append(events, eventstore.Recorded{Position: p, Data: make([]byte, 10)})
	}
	return events
}

func flat(s Snapshot) []eventstore.Position {
	var all []eventstore.Position
	for _, events := range s.Events {
		for _, e := range events {
			all = append(all, e.Position)
		}
	}
	return all
}

func TestTail_Since(t *testing.T) {
	t.Parallel()
	tail := New(10, 6, 1<<20)
	s := tail.Since(9)
	require.False(t, s.Complete, "nothing of what was before is kept")
	require.True(t, tail.Since(10).Complete)
	tail.Append(batch(11, 13))
	tail.Append(batch(14, 14))
	require.Equal(t, []eventstore.Position{11, 12, 13, 14}, flat(tail.Since(10)))
	require.Equal(t, []eventstore.Position{13, 14}, flat(tail.Since(12)))
	require.Equal(t, []eventstore.Position{14}, flat(tail.Since(13)))
	require.Empty(t, flat(tail.Since(14)))
	require.True(t, tail.Since(99).Complete)
	tail.Append(batch(15, 18)) // the first batch has to go
	require.False(t, tail.Since(10).Complete)
	require.False(t, tail.Since(12).Complete)
	s = tail.Since(13)
	require.True(t, s.Complete)
	require.Equal(t, []eventstore.Position{14, 15, 16, 17, 18}, flat(s))
	require.EqualValues(t, 18, s.Head)
	tail.Append(batch(19, 30)) // larger than the tail: the last batch is kept all the same
	require.Len(t, flat(tail.Since(18)), 12)
}

func TestTail_Bytes(t *testing.T) {
	t.Parallel()
	tail := New(0, 1000, 25)
	for p := eventstore.Position(1); p <= 5; p++ {
		tail.Append(batch(p, p))
	}
	require.False(t, tail.Since(2).Complete)
	require.Equal(t, []eventstore.Position{4, 5}, flat(tail.Since(3)))
}

func TestTail_Wakes(t *testing.T) {
	t.Parallel()
	tail := New(0, 10, 1000)
	s := tail.Since(0)
	select {
	case <-s.Grown:
		t.Fatal("nothing has happened")
	default:
	}
	tail.Append(batch(1, 1))
	<-s.Grown
	s = tail.Since(1)
	tail.Close()
	<-s.Grown
	require.True(t, tail.Since(1).Closed)
	tail.Close()
}

// A hole must never get this far.
func TestTail_RefusesHoles(t *testing.T) {
	t.Parallel()
	tail := New(5, 10, 1000)
	require.Panics(t, func() { tail.Append(batch(7, 7)) })
	require.Panics(t, func() { tail.Append(append(batch(6, 6), batch(8, 8)...)) })
	require.NotPanics(t, func() { tail.Append(batch(6, 7)) })
}
