package ownership

import (
	"cmp"
	"hash/fnv"
	"slices"
	"strings"
)

// assign says which member each unit belongs to. It depends on nothing but
// what the members are and offer, in any order, so every node that sees the
// same members finds the same.
//
// Each unit goes to the member with the highest weight for it (rendezvous
// hashing: who joins or leaves moves no unit between the others), and then
// members with much hand over to those with less until no unit could move, also
// by way of others, to a member with two units fewer: no assignment has a smaller
// greatest load. Among members that offer the same, nobody has more than one
// unit more than anybody else.
func assign(members []Member) map[string]string {
	b := newBalance(members)
	for b.improve() {
		// Each round moves one unit of load; the sum of the squares of all loads falls.
		continue
	}
	owners := make(map[string]string, len(b.owner))
	for unit, m := range b.owner {
		owners[b.units[unit]] = b.names[m]
	}
	return owners
}

type balance struct {
	names   []string
	units   []string
	offers  [][]bool   // by member and unit
	weights [][]uint64 // by member and unit
	owner   []int      // by unit
	load    []int      // by member
}

func newBalance(members []Member) *balance {
	members = slices.Clone(members)
	slices.SortFunc(members, func(x, y Member) int { return strings.Compare(x.Name, y.Name) })
	members = slices.CompactFunc(members, func(x, y Member) bool { return x.Name == y.Name })
	b := &balance{load: make([]int, len(members))}
	for _, m := range members {
		b.names = append(b.names, m.Name)
		b.units = append(b.units, m.Units...)
	}
	slices.Sort(b.units)
	b.units = slices.Compact(b.units)
	b.owner = make([]int, len(b.units))
	for unit := range b.owner {
		b.owner[unit] = -1
	}
	for m, member := range members {
		b.offers = append(b.offers, make([]bool, len(b.units)))
		b.weights = append(b.weights, make([]uint64, len(b.units)))
		for _, name := range member.Units {
			unit, _ := slices.BinarySearch(b.units, name)
			b.offers[m][unit], b.weights[m][unit] = true, weight(member.Name, name)
			if was := b.owner[unit]; was < 0 || b.weights[was][unit] < b.weights[m][unit] {
				b.owner[unit] = m
			}
		}
	}
	for _, m := range b.owner {
		b.load[m]++
	}
	return b
}

// improve moves one unit's worth of load from a member to one with at least
// two units fewer, along the shortest way, beginning with whom has most.
func (b *balance) improve() bool {
	from := make([]int, len(b.names))
	for m := range from {
		from[m] = m
	}
	slices.SortStableFunc(from, func(x, y int) int { return cmp.Compare(b.load[y], b.load[x]) })
	for _, m := range from {
		if b.relieve(m) {
			return true
		}
	}
	return false
}

func (b *balance) relieve(heavy int) bool {
	// How each member is reached: from whom, and with which unit.
	type step struct{ from, unit int }
	reached := make([]step, len(b.names))
	for m := range reached {
		reached[m].from = -1
	}
	reached[heavy].from = heavy
	held := make([][]int, len(b.names))
	for unit, m := range b.owner {
		held[m] = append(held[m], unit)
	}
	best := -1
	for layer := []int{heavy}; len(layer) > 0 && best < 0; {
		var next []int
		for _, a := range layer {
			for c := range b.names {
				if reached[c].from >= 0 {
					continue
				}
				// The unit that is most at home there.
				move := -1
				for _, unit := range held[a] {
					if b.offers[c][unit] && (move < 0 || b.weights[c][unit] > b.weights[c][move]) {
						move = unit
					}
				}
				if move >= 0 {
					reached[c] = step{a, move}
					next = append(next, c)
				}
			}
		}
		for _, c := range next {
			if b.load[c] <= b.load[heavy]-2 && (best < 0 || b.load[c] < b.load[best] || b.load[c] == b.load[best] && b.weights[c][reached[c].unit] > b.weights[best][reached[best].unit]) {
				best = c
			}
		}
		layer = next
	}
	if best < 0 {
		return false
	}
	b.load[heavy]--
	b.load[best]++
	for c := best; c != heavy; c = reached[c].from {
		b.owner[reached[c].unit] = c
	}
	return true
}

// weight is a number for the pair that looks random. Of equal ones, which are
// not to be expected, the member's whose name comes first counts.
func weight(member, unit string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(member))
	_, _ = h.Write([]byte{0})
	_, _ = h.Write([]byte(unit))
	// FNV leaves the high bits of similar names alike; this mixes them (splitmix64).
	x := h.Sum64()
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
