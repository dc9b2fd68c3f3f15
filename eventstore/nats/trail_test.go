package nats

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// The trail of every event names the near and the far ones before it, and is
// read as it was written, wherever the events of a plan begin.
func TestTrail(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	at := []uint64{0} // by version
	var trail trail
	for version := uint64(1); version < 300; {
		first := at[version-1] + 1 + r.Uint64N(2000)
		within := trail
		number := 0
		for range 1 + r.IntN(20) { // the events of the stream in one plan
			sequence := first + uint64(number)
			require.Len(t, within, trailLength(version))
			read, err := parseTrail(strings.TrimPrefix(string(within.append(nil, number)), " "), version, sequence)
			require.NoError(t, err)
			require.Equal(t, len(within), len(read))
			for k, pointer := range read {
				require.Equal(t, at[pointed(version, k)], pointer, "pointer %d of version %d", k, version)
			}
			require.Zero(t, pointed(version, len(read)))
			require.ElementsMatch(t, read, within.placed(first))
			at = append(at, sequence)
			within = within.next(version, planned|uint64(number))
			number += 1 + r.IntN(3)
			version++
		}
		trail = within.placed(first)
	}
}

// The far pointers: the latest multiples of eight in front of the near ones.
func TestTrail_Far(t *testing.T) {
	t.Parallel()
	for version, want := range map[uint64][]uint64{
		1: nil, 2: {1}, 9: {8, 7, 6, 5, 4, 3, 2, 1}, 16: {15, 14, 13, 12, 11, 10, 9, 8}, 17: {16, 15, 14, 13, 12, 11, 10, 9, 8},
		100: {99, 98, 97, 96, 95, 94, 93, 92, 88, 80, 72, 64, 56, 48, 40, 32},
	} {
		var got []uint64
		for k := range pointers + 1 {
			if v := pointed(version, k); v != 0 {
				got = append(got, v)
			}
		}
		require.Equal(t, want, got, "version %d", version)
	}
}

// written returns so many events of a stream as messages, version 1 first.
func written(of eventstore.Stream, n int, size func() int) []*message {
	var all []*message
	var trail trail
	before := uint32(0)
	for version := uint64(1); version <= uint64(n); version++ {
		sequence := 1000 * version
		id := uuid.New()
		all = append(all, &message{Recorded: eventstore.Recorded{ID: id, Stream: of, Version: version, Position: eventstore.Position(sequence), Data: make([]byte, size())}, previous: trail, before: before})
		before = checkOf(id)
		trail = trail.next(version, sequence)
	}
	return all
}

func descend(all []*message, limit int, after eventstore.Position, bytes int) (*descent, error) {
	end := all[len(all)-1]
	return newDescent(end.Stream, headOf(end), nil, limit, after, bytes)
}

// TestDescent_Rounds counts how often one has to wait for the server.
func TestDescent_Rounds(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]int{1: 1, 8: 1, 9: 2, 72: 2, 79: 2, 80: 3, 100: 3, 151: 3, 152: 4, 1000: 15} {
		all := written(account("ann"), n, func() int { return 10 })
		w, err := descend(all, n, 0, 0)
		require.NoError(t, err)
		rounds := 0
		for ; !w.done(); rounds++ {
			var asked []int
			for i, ok := w.wanted(); ok; i, ok = w.wanted() {
				asked = append(asked, i)
			}
			require.NotEmpty(t, asked)
			for _, i := range asked {
				require.NoError(t, w.place(i, all[n-1-i]))
			}
		}
		require.Equal(t, want, rounds, "%d events", n)
	}
}

// TestDescent: whatever comes first, is lost or comes twice, what one gets are
// the last events in order, as many as were wanted.
func TestDescent(t *testing.T) {
	t.Parallel()
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 1))
		n := 1 + r.IntN(300)
		all := written(account("ann"), n, func() int { return r.IntN(1 << r.IntN(13)) })
		limit, after, bytes := 1+r.IntN(n), eventstore.Position(0), 0
		if r.IntN(2) == 0 {
			after = eventstore.Position(r.IntN(1000 * n))
		}
		if r.IntN(2) == 0 {
			bytes = 1 + r.IntN(n*600)
		}
		w, err := descend(all, limit, after, bytes)
		require.NoError(t, err)
		var open []int
		for !w.done() {
			for len(open) < w.window() {
				i, ok := w.wanted()
				if !ok {
					break
				}
				if r.IntN(10) == 0 { // others have asked for too much
					w.unwanted(i)
					break
				}
				open = append(open, i)
			}
			if len(open) == 0 {
				numbers, sequences, err := w.missing()
				require.NoError(t, err, "seed %d", seed)
				for k, i := range numbers {
					require.EqualValues(t, all[n-1-i].Position, sequences[k])
					require.NoError(t, w.place(i, all[n-1-i]), "seed %d", seed)
				}
				continue
			}
			k := r.IntN(len(open))
			i := open[k]
			if r.IntN(10) > 0 {
				open = append(open[:k], open[k+1:]...)
			}
			if r.IntN(10) > 0 {
				require.NoError(t, w.place(i, all[n-1-i]), "seed %d", seed)
			}
		}
		for i, m := range w.got[:w.whole] {
			require.Equal(t, all[n-1-i], m, "seed %d", seed)
		}
		last := w.got[w.whole-1]
		switch {
		case bytes > 0 && w.held > bytes:
			require.LessOrEqual(t, w.held-weigh(&last.Recorded), bytes, "seed %d: not more than needed", seed)
		case last.Position <= after:
			require.True(t, w.whole == 1 || w.got[w.whole-2].Position > after, "seed %d", seed)
		default:
			require.Equal(t, limit, w.whole, "seed %d", seed)
		}
	}
}

// TestDescent_Parts takes a stream part by part: every event is asked for once,
// and given once, in order; and what is held is bounded, whatever their sizes.
func TestDescent_Parts(t *testing.T) {
	t.Parallel()
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 2))
		n := 1 + r.IntN(300)
		large := 1 + r.IntN(1<<16)
		all := written(account("ann"), n, func() int {
			if r.IntN(3) == 0 {
				return large
			}
			return r.IntN(100)
		})
		if r.IntN(2) == 0 { // the far ones are small
			for i := range all {
				all[i].Data = make([]byte, large)
				if all[i].Version%spacing == 0 {
					all[i].Data = nil
				}
			}
		}
		const bytes = 64 << 10
		w, err := descend(all, n, 0, bytes)
		require.NoError(t, err)
		asked, most, next := map[int]int{}, 0, 0
		for part := 0; w.given < w.end; part++ {
			w.more(min(near<<min(part, 10), inFlight))
			var open []int
			for !w.done() {
				for len(open) < w.window() {
					i, ok := w.wanted()
					if !ok {
						break
					}
					asked[i]++
					open = append(open, i)
				}
				require.NotEmpty(t, open, "seed %d", seed)
				i := open[0] // in the order of asking
				open = open[1:]
				require.NoError(t, w.place(i, all[n-1-i]))
				most = max(most, w.size)
			}
			for _, i := range open { // the answers come while the part is looked at
				require.NoError(t, w.place(i, all[n-1-i]))
				most = max(most, w.size)
			}
			for _, m := range w.take() {
				require.Equal(t, all[n-1-next], m, "seed %d", seed)
				next++
			}
		}
		require.Equal(t, n, next)
		for i, times := range asked {
			require.Equal(t, 1, times, "seed %d: number %d", seed, i)
		}
		require.LessOrEqual(t, most, bytes+(pointers+near)*(large+512), "seed %d", seed)
		require.Zero(t, w.size)
	}
}

// TestPipe_Bounded: all loads together ask for a bounded number of bytes, and
// what a load has reserved comes back, however it ends.
func TestPipe_Bounded(t *testing.T) {
	t.Parallel()
	p := &pipe{loads: map[uint64]*load{}}
	a, b := &load{number: 1, costs: map[int]int{}}, &load{number: 2, costs: map[int]int{}}
	require.Nil(t, p.reserve(a, 0, 2*underWay), "one at least, however large")
	wait := p.reserve(b, 0, 1)
	require.NotNil(t, wait)
	require.Equal(t, wait, p.reserve(b, 0, 1))
	p.got(a, 7) // which nobody has asked for
	select {
	case <-wait:
		require.Fail(t, "nothing has come back")
	default:
	}
	p.got(a, 0)
	<-wait
	require.Nil(t, p.reserve(b, 0, 1))
	require.Nil(t, p.reserve(b, 1, 2))
	require.NotNil(t, p.reserve(a, 1, underWay))
	p.rest(b)
	require.Zero(t, p.flying)
	require.Nil(t, p.reserve(b, 5, 100))
	p.end(b)
	require.Zero(t, p.flying)
}

// Events that disagree about where an earlier one is, or of which one is not
// what it should be, are no stream.
func TestDescent_Wrong(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(all []*message){
		"another place":   func(all []*message) { all[30].previous[3]-- },
		"another far one": func(all []*message) { all[30].previous[9]-- },
		"another version": func(all []*message) { all[30].Version++ },
		"another event":   func(all []*message) { all[30].ID = uuid.New() },
		"another stream":  func(all []*message) { all[30].Stream.ID = "bob" },
		"no trail":        func(all []*message) { all[30].previous = nil },
	} {
		all := written(account("ann"), 60, func() int { return 10 })
		spoil(all)
		w, err := descend(all, 60, 0, 0)
		for err == nil && !w.done() {
			i, ok := w.wanted()
			if !ok {
				_, _, err = w.missing()
				break
			}
			err = w.place(i, all[59-i])
		}
		if name == "no trail" { // others point to the same
			require.NoError(t, err)
			continue
		}
		require.ErrorIs(t, err, eventstore.ErrGap, name)
	}
	w, err := newDescent(account("ann"), head{version: 3}, nil, 3, 0, 0)
	require.NoError(t, err)
	_, _, err = w.missing()
	require.ErrorIs(t, err, eventstore.ErrGap, fmt.Sprint(err))
}
