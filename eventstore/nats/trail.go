package nats

import (
	"fmt"
	"strconv"
	"strings"
)

// trail is what an event points to, the last one first: the sequences of the
// near events before it in its stream, and then of the far ones, those whose
// version is a multiple of spacing. Who reads a stream backward follows all of
// the far ones at once: 72 events or more are there after two rounds, 144 after
// three.
type trail []uint64

const (
	near     = 8
	far      = 8
	spacing  = near
	pointers = near + far
	// planned marks what is no sequence yet but the number of a message in a plan.
	planned = 1 << 63
)

// pointed returns which version the k-th pointer of an event names, 0 if it has
// no such pointer.
func pointed(version uint64, k int) uint64 {
	if version == 0 {
		return 0
	}
	n := min(version-1, near)
	if uint64(k) < n {
		return version - 1 - uint64(k)
	}
	latest := (version - 1 - n) / spacing * spacing
	before := (uint64(k) - n) * spacing
	if k >= pointers || n < near || latest <= before {
		return 0
	}
	return latest - before
}

// trailLength returns how many pointers an event has.
func trailLength(version uint64) int {
	if version <= near {
		return int(max(version, 1) - 1)
	}
	return near + int(min((version-1-near)/spacing, far))
}

// next returns the trail of the event after the one with this version, trail and
// sequence. It shares nothing with t.
func (t trail) next(version, sequence uint64) trail {
	to := make(trail, 0, pointers)
	to = append(to, sequence)
	n := min(len(t), near)
	to = append(to, t[:min(n, near-1)]...)
	if n == near && (version-near)%spacing == 0 {
		to = append(to, t[near-1])
	}
	return append(to, t[n:n+min(len(t)-n, pointers-len(to))]...)
}

// placed returns the trail once the plan's first message has a sequence.
func (t trail) placed(first uint64) trail {
	to := make(trail, len(t))
	for i, at := range t {
		if at&planned != 0 {
			at = first + at&^planned
		}
		to[i] = at
	}
	return to
}

// append writes the trail of the plan's message with the number. Messages of the
// plan, which come first, are given by how far before this one they are; the one
// behind them by its sequence, and the others by how far before that they are,
// each from the one in front of it.
func (t trail) append(to []byte, number int) []byte {
	last := uint64(0)
	for _, at := range t {
		switch {
		case at&planned != 0:
			to = append(to, " -"...)
			to = strconv.AppendUint(to, uint64(number)-at&^planned, 10)
		case last == 0:
			to = strconv.AppendUint(append(to, ' '), at, 10)
			last = at
		default:
			to = strconv.AppendUint(append(to, ' '), last-at, 10)
			last = at
		}
	}
	return to
}

// parseTrail reads the trail of the event with the version at the sequence.
func parseTrail(value string, version, sequence uint64) (trail, error) {
	want := trailLength(version)
	bad := func() (trail, error) {
		return nil, fmt.Errorf("%q are not the %d pointers of version %d at %d", value, want, version, sequence)
	}
	if want == 0 {
		if value != "" {
			return bad()
		}
		return nil, nil
	}
	t := make(trail, 0, pointers)
	last, absolute := sequence, uint64(0)
	for field := range strings.SplitSeq(value, " ") {
		digits, relative := strings.CutPrefix(field, "-")
		n, err := strconv.ParseUint(digits, 10, 64)
		switch {
		case err != nil || len(t) == want || relative && absolute != 0:
			return bad()
		case relative:
			n = sequence - n
		case absolute != 0:
			n = absolute - n
			absolute = n
		default:
			absolute = n
		}
		if n == 0 || n >= last { // also what is below 0
			return bad()
		}
		t = append(t, n)
		last = n
	}
	if len(t) < want {
		return bad()
	}
	return t, nil
}
