package ownership

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// random returns a source whose seed is printed when the test fails.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

func names(what string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("%s-%d", what, i)
	}
	return all
}

// equals returns members that all offer the same.
func equals(r *rand.Rand, n int, units []string) []Member {
	all := make([]Member, n)
	for i := range all {
		all[i] = Member{Name: fmt.Sprintf("node-%x", r.Uint64()), Units: units}
	}
	return all
}

func loads(owners map[string]string) map[string]int {
	load := map[string]int{}
	for _, m := range owners {
		load[m]++
	}
	return load
}

func TestAssign_SameInAnyOrder(t *testing.T) {
	t.Parallel()
	r := random(t)
	for range 300 {
		members := differing(r)
		want := assign(members)
		shuffled := make([]Member, len(members))
		for i, from := range r.Perm(len(members)) {
			m := Member{Name: members[from].Name, Units: slices.Clone(members[from].Units)}
			r.Shuffle(len(m.Units), func(i, j int) { m.Units[i], m.Units[j] = m.Units[j], m.Units[i] })
			shuffled[i] = m
		}
		require.Equal(t, want, assign(shuffled), "%+v", members)
	}
}

// differing returns members of several versions of a program.
func differing(r *rand.Rand) []Member {
	units := names("unit", r.IntN(12))
	members := equals(r, r.IntN(6), nil)
	for i := range members {
		for _, u := range units {
			if r.IntN(2) == 0 {
				members[i].Units = append(members[i].Units, u)
			}
		}
	}
	return members
}

// Every unit that somebody offers is given to one who offers it, nobody has
// more than the fewest that the one with most must have, and what is given
// cannot be made more even.
func TestAssign_CoversAndIsBalanced(t *testing.T) {
	t.Parallel()
	r := random(t)
	for range 500 {
		members := differing(r)
		owners := assign(members)
		load := loads(owners)
		offered := map[string][]int{}
		for i, m := range members {
			for _, u := range m.Units {
				offered[u] = append(offered[u], i)
			}
		}
		require.Len(t, owners, len(offered), "%+v", members)
		for u, by := range offered {
			require.True(t, slices.ContainsFunc(by, func(i int) bool { return members[i].Name == owners[u] }), "%s is given to %s", u, owners[u])
			for _, i := range by {
				require.LessOrEqual(t, load[owners[u]], load[members[i].Name]+1, "%s would be better off at %s: %+v", u, members[i].Name, members)
			}
		}
		// For every set of members: what only they offer must be divided among them.
		most := 0
		for set := range 1 << len(members) {
			only, size := 0, 0
			for i := range members {
				size += set >> i & 1
			}
			for _, by := range offered {
				if !slices.ContainsFunc(by, func(i int) bool { return set>>i&1 == 0 }) {
					only++
				}
			}
			if size > 0 {
				most = max(most, (only+size-1)/size)
			}
		}
		for m, l := range load {
			require.LessOrEqual(t, l, most, "%s: %+v", m, members)
		}
	}
}

func TestAssign_EqualMembers(t *testing.T) {
	t.Parallel()
	r := random(t)
	for range 300 {
		units, n := r.IntN(40), 1+r.IntN(8)
		load := loads(assign(equals(r, n, names("unit", units))))
		for m, l := range load {
			require.LessOrEqual(t, l, (units+n-1)/n, m)
		}
		if units >= n {
			require.Len(t, load, n, "somebody has nothing")
		}
	}
}

// When a member joins or leaves, little moves that need not.
func TestAssign_MovesLittle(t *testing.T) {
	t.Parallel()
	r := random(t)
	for _, size := range []struct{ members, units int }{{2, 10}, {3, 12}, {3, 64}, {5, 20}, {10, 100}, {10, 1000}} {
		const rounds = 40
		moved, worst, needed := 0, 0, size.units/(size.members+1)
		for range rounds {
			members := equals(r, size.members+1, names("unit", size.units))
			before, after := assign(members[1:]), assign(members)
			n := 0
			for u, m := range before {
				if after[u] != m {
					n++
				}
			}
			moved += n
			worst = max(worst, n)
		}
		t.Logf("%4d units, %2d members and one more: %.1f units move, %d at most, %d must", size.units, size.members, float64(moved)/rounds, worst, needed)
		require.LessOrEqual(t, moved, rounds*(2*needed+2), "units that move in %d rounds", rounds)
		require.Less(t, worst, size.units, "all units move")
	}
}

func TestAssign_Nobody(t *testing.T) {
	t.Parallel()
	require.Empty(t, assign(nil))
	require.Empty(t, assign([]Member{{Name: "a"}}))
	require.Equal(t, map[string]string{"u": "a"}, assign([]Member{{Name: "a", Units: []string{"u", "u"}}, {Name: "b"}}))
}
