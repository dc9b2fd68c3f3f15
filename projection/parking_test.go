package projection_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// moved is an event that touches the rows of several accounts.
type moved struct {
	Accounts []string
	Poison   bool
}

func (moved) EventType() string { return "moved" }

// arrivals is a row that shows in which order events have come.
type arrivals struct{ Seen []eventstore.Position }

// moves is a view of rows that many streams share. Poison fails while ill.
func moves(ill *atomic.Bool) *projection.ViewDefinition[arrivals] {
	return projection.View("moves",
		projection.OnKeyed(func(e moved, _ eventstore.Recorded) []string { return e.Accounts },
			func(row *arrivals, _ string, e moved, r eventstore.Recorded) {
				if e.Poison && ill.Load() {
					panic("poison")
				}
				row.Seen = append(row.Seen, r.Position)
			}),
		projection.OnMeta(func(row *arrivals, _ opened, r eventstore.Recorded) { row.Seen = append(row.Seen, r.Position) }))
}

func transfer(id int) eventstore.Stream {
	return eventstore.Stream{Category: "transfer", ID: fmt.Sprint("t", id)}
}

// Invariant 9: later events of the rows that a failed one touches, of whatever
// stream, follow it to the dead letters, also those behind one that only follows; the
// rest goes on. After a restart too.
func TestInvariant9_RowsOfSeveralStreams(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		var ill atomic.Bool
		ill.Store(true)
		view := moves(&ill)
		put(t, store, transfer(1), moved{[]string{"a"}, false})      // 1
		put(t, store, transfer(2), moved{[]string{"c"}, false})      // 2
		put(t, store, transfer(1), moved{[]string{"a"}, true})       // 3 fails
		put(t, store, transfer(2), moved{[]string{"c"}, false})      // 4
		put(t, store, transfer(3), moved{[]string{"a", "b"}, false}) // 5 follows, and b with it
		put(t, store, transfer(1), moved{[]string{"c"}, false})      // 6 goes on: no row is touched by 3 too
		put(t, store, account("b"), opened{"Bob"})                   // 7 follows
		o := projection.Options{Attempts: 1}
		r := start(t, store, store, o, view)
		r.caughtUp(t, store, "moves")
		require.NoError(t, r.stop())
		again := start(t, store, store, o, view)
		defer again.stop()
		put(t, store, transfer(4), moved{[]string{"b", "d"}, false}) // 8 follows
		put(t, store, transfer(5), moved{[]string{"d"}, false})      // 9 follows
		put(t, store, transfer(5), moved{[]string{"e"}, false})      // 10
		again.caughtUp(t, store, "moves")
		letters, err := again.DeadLetters(t.Context(), "moves")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{3, 5, 7, 8, 9}, positions(letters))
		require.Equal(t, []string{"a"}, letters[0].Keys)
		require.Equal(t, []string{"a", "b"}, letters[1].Keys)
		require.Equal(t, []string{"b"}, letters[2].Keys)
		require.Equal(t, map[string]arrivals{"a": {[]eventstore.Position{1}}, "c": {[]eventstore.Position{2, 4, 6}}, "e": {[]eventstore.Position{10}}}, rows(t, store, view))

		n, err := again.ReplayDeadLetters(t.Context(), "moves")
		require.Zero(t, n)
		require.ErrorContains(t, err, "position 3")
		require.NotContains(t, err.Error(), "position 5", "it was not tried before its turn")
		ill.Store(false)
		n, err = again.ReplayDeadLetters(t.Context(), "moves")
		require.NoError(t, err)
		require.Equal(t, 5, n)
		put(t, store, transfer(6), moved{[]string{"a"}, false}) // 11
		again.caughtUp(t, store, "moves")
		require.Equal(t, map[string]arrivals{
			"a": {[]eventstore.Position{1, 3, 5, 11}}, "b": {[]eventstore.Position{5, 7, 8}},
			"c": {[]eventstore.Position{2, 4, 6}}, "d": {[]eventstore.Position{8, 9}}, "e": {[]eventstore.Position{10}},
		}, rows(t, store, view))
	})
}

// Keys of rows are any bytes; what is stored of them finds them again.
func TestParked_KeysThatAreNoText(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		var ill atomic.Bool
		ill.Store(true)
		binary := func(r eventstore.Recorded) []string { return []string{string([]byte{0xff, byte(len(r.Stream.ID))})} }
		view := projection.View("moves", projection.OnKeyed(func(_ moved, r eventstore.Recorded) []string { return binary(r) },
			func(row *arrivals, _ string, e moved, _ eventstore.Recorded) {
				if e.Poison && ill.Load() {
					panic("poison")
				}
			}))
		put(t, store, transfer(1), moved{Poison: true})
		put(t, store, transfer(10), moved{})
		r := start(t, store, store, projection.Options{Attempts: 1}, view)
		r.caughtUp(t, store, "moves")
		require.NoError(t, r.stop())
		put(t, store, transfer(2), moved{})  // 3 follows 1
		put(t, store, transfer(11), moved{}) // 4
		r = start(t, store, store, projection.Options{Attempts: 1}, view)
		defer r.stop()
		r.caughtUp(t, store, "moves")
		letters, err := r.DeadLetters(t.Context(), "moves")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{1, 3}, positions(letters))
	})
}

// Invariant 6, whatever fails and whenever: every row is the fold of its first
// events while some are set aside, and of all its events when they were replayed.
// Restarts, partitions, batches of any size, and replays that fail on the way.
func TestParked_RowsEqualTheFold(t *testing.T) {
	t.Parallel()
	for round := range 12 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			t.Parallel()
			t.Logf("seed %d", seed)
			synctest.Test(t, func(t *testing.T) {
				random := rand.New(rand.NewPCG(seed, 1))
				store := memory.New()
				defer store.Close()
				var ill atomic.Bool
				ill.Store(true)
				view := moves(&ill).Partitioned([]int{1, 4}[round%2])
				full := map[string][]eventstore.Position{}
				write := func(events int) {
					for range events {
						e := moved{Poison: random.IntN(25) == 0}
						for range random.IntN(4) {
							e.Accounts = append(e.Accounts, fmt.Sprint(random.IntN(60)))
						}
						at := put(t, store, transfer(random.IntN(10)), e).Last
						slices.Sort(e.Accounts)
						for _, key := range slices.Compact(e.Accounts) {
							full[key] = append(full[key], at)
						}
					}
				}
				options := func() projection.Options {
					return projection.Options{Attempts: 1 + random.IntN(2), BatchEvents: 1 + random.IntN(30), CacheBytes: 1 + random.IntN(3000)}
				}
				behind := false
				for range 4 {
					write(random.IntN(60))
					r := start(t, store, store, options(), view)
					write(random.IntN(60))
					r.caughtUp(t, store, "moves")
					for key, row := range rows(t, store, view) {
						all := full[key]
						require.LessOrEqual(t, len(row.Seen), len(all))
						require.Equal(t, all[:len(row.Seen)], row.Seen, key)
						behind = behind || len(row.Seen) < len(all)
					}
					letters, err := r.DeadLetters(t.Context(), "moves")
					require.NoError(t, err)
					switch {
					case len(letters) == 0:
					case random.IntN(2) == 0:
						_, err := r.ReplayDeadLetters(t.Context(), "moves")
						require.Error(t, err)
					case random.IntN(3) == 0:
						ill.Store(false)
						_, err := r.ReplayDeadLetters(t.Context(), "moves")
						require.NoError(t, err)
						ill.Store(true)
					}
					require.NoError(t, r.stop())
				}
				require.True(t, behind, "something was set aside")
				ill.Store(false)
				r := start(t, store, store, options(), view)
				r.caughtUp(t, store, "moves")
				_, err := r.ReplayDeadLetters(t.Context(), "moves")
				require.NoError(t, err)
				got := map[string][]eventstore.Position{}
				for key, row := range rows(t, store, view) {
					got[key] = row.Seen
				}
				require.Equal(t, full, got)
				v, err := r.Verify(t.Context(), "moves")
				require.NoError(t, err)
				require.True(t, v.Agrees(), v.String())
				require.NoError(t, r.stop())
			})
		})
	}
}

// An event that cannot be decoded does not tell its rows: it holds back its
// stream, or what ParkedBy says.
func TestViewDefinition_ParkedBy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calm atomic.Bool
		region := func(r eventstore.Recorded) string {
			if r.Position == 4 {
				panic("no region")
			}
			region, _, _ := strings.Cut(r.Stream.ID, "-")
			return region
		}
		for name, view := range map[string]*projection.ViewDefinition[arrivals]{"rows": moves(&calm), "regions": moves(&calm).ParkedBy(region)} {
			store := memory.New()
			in := func(id string) eventstore.Stream { return eventstore.Stream{Category: "transfer", ID: id} }
			put(t, store, in("north-1"), moved{[]string{"a"}, false}) // 1
			_, err := store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: in("north-1"), Type: "moved", Data: []byte("{")}}})
			require.NoError(t, err)                                   // 2 fails
			put(t, store, in("north-2"), moved{[]string{"a"}, false}) // 3
			put(t, store, in("north-1"), moved{[]string{"b"}, false}) // 4
			put(t, store, in("south-1"), moved{[]string{"a"}, false}) // 5
			put(t, store, in("south-1"), moved{[]string{"c"}, false}) // 6
			r := start(t, store, store, projection.Options{}, view)
			r.caughtUp(t, store, "moves")
			letters, err := r.DeadLetters(t.Context(), "moves")
			require.NoError(t, err)
			if name == "rows" {
				require.Equal(t, []eventstore.Position{2, 4}, positions(letters), "4 is of its stream")
				require.Empty(t, letters[0].Keys)
			} else {
				require.Equal(t, []eventstore.Position{2, 3}, positions(letters))
				require.Equal(t, []string{"north"}, letters[0].Keys)
			}
			require.NoError(t, r.stop())
			require.NoError(t, store.Close())
		}
	})
	require.ErrorContains(t, moves(&atomic.Bool{}).ParkedBy(nil).Err(), "ParkedBy is nil")
}

// The key of an SQL projection is its stream, or what ParkedBy says.
func TestSQLDefinition_ParkedBy(t *testing.T) {
	t.Parallel()
	var ill atomic.Bool
	ill.Store(true)
	define := func() *projection.SQLDefinition {
		return projection.SQL("log",
			projection.Setup("CREATE TABLE IF NOT EXISTS moves (n INTEGER PRIMARY KEY AUTOINCREMENT, position BIGINT)"),
			projection.OnSQL(func(ctx context.Context, tx projection.Tx, e moved, r eventstore.Recorded) error {
				if e.Poison && ill.Load() {
					return projection.Permanent(errors.New("poison"))
				}
				_, err := tx.Exec(ctx, "INSERT INTO moves (position) VALUES ($1)", int64(r.Position))
				return err
			}))
	}
	customer := func(r eventstore.Recorded) string {
		customer, _, _ := strings.Cut(r.Stream.ID, "-")
		return customer
	}
	store := backends["sqlite"](t)
	in := func(id string) eventstore.Stream { return eventstore.Stream{Category: "transfer", ID: id} }
	d := define().ParkedBy(customer)
	put(t, store, in("ann-1"), moved{Poison: true}) // 1 fails
	put(t, store, in("bob-1"), moved{})             // 2
	put(t, store, in("ann-2"), moved{})             // 3 follows
	r := start(t, store, store, projection.Options{}, d)
	r.caughtUp(t, store, "log")
	require.NoError(t, r.stop())
	r = start(t, store, store, projection.Options{}, d)
	put(t, store, in("ann-3"), moved{}) // 4 follows
	put(t, store, in("bob-2"), moved{}) // 5
	r.caughtUp(t, store, "log")
	letters, err := r.DeadLetters(t.Context(), "log")
	require.NoError(t, err)
	require.Equal(t, []eventstore.Position{1, 3, 4}, positions(letters))
	ill.Store(false)
	n, err := r.ReplayDeadLetters(t.Context(), "log")
	require.NoError(t, err)
	require.Equal(t, 3, n)
	require.NoError(t, r.stop())
	var got []int64
	require.NoError(t, store.View(t.Context(), func(tx projection.StateTx) error {
		rows, err := tx.Query(t.Context(), "SELECT position FROM moves ORDER BY n")
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var p int64
			if err := rows.Scan(&p); err != nil {
				return err
			}
			got = append(got, p)
		}
		return rows.Err()
	}))
	require.Equal(t, []int64{2, 5, 1, 3, 4}, got, "in the order of the log within a key")

	require.NoError(t, d.Err())
	require.ErrorContains(t, define().ParkedBy(nil).Err(), "ParkedBy is nil")
	for _, both := range []*projection.SQLDefinition{d.Partitioned(2), define().Partitioned(2).ParkedBy(customer)} {
		require.ErrorIs(t, both.Err(), eventstore.ErrInvalid)
		require.ErrorContains(t, both.Err(), "both ParkedBy and Partitioned")
	}
}

// An event whose keys function gives an empty key holds back its stream.
func TestInvariant9_EmptyKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		var ill atomic.Bool
		view := moves(&ill)
		put(t, store, transfer(1), moved{[]string{"a", ""}, false}) // 1 fails
		put(t, store, transfer(1), moved{[]string{"b"}, false})     // 2 follows
		put(t, store, transfer(2), moved{[]string{"a"}, false})     // 3
		r := start(t, store, store, projection.Options{Attempts: 1}, view)
		defer r.stop()
		r.caughtUp(t, store, "moves")
		letters, err := r.DeadLetters(t.Context(), "moves")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{1, 2}, positions(letters))
		require.Empty(t, letters[0].Keys)
	})
}

// An event that could not be decoded is one of rows that nobody knew; once it can be,
// it does not overtake what fails again on the same row.
func TestInvariant9_ReplayKnowsMoreKeys(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		var blind atomic.Bool
		blind.Store(true)
		view := projection.View("moves", projection.OnKeyed(func(e moved, r eventstore.Recorded) []string {
			if blind.Load() && r.Stream == transfer(2) {
				panic("cannot tell")
			}
			return e.Accounts
		}, func(row *arrivals, _ string, e moved, r eventstore.Recorded) {
			if e.Poison {
				panic("poison")
			}
			row.Seen = append(row.Seen, r.Position)
		}))
		put(t, store, transfer(1), moved{[]string{"a"}, true})       // 1 fails
		put(t, store, transfer(2), moved{[]string{"a", "b"}, false}) // 2 fails
		put(t, store, transfer(3), moved{[]string{"c"}, false})      // 3
		r := start(t, store, store, projection.Options{Attempts: 1}, view)
		defer r.stop()
		r.caughtUp(t, store, "moves")
		blind.Store(false)
		n, err := r.ReplayDeadLetters(t.Context(), "moves")
		require.Zero(t, n)
		require.ErrorContains(t, err, "position 1")
		require.NotContains(t, err.Error(), "position 2")
		letters, err := r.DeadLetters(t.Context(), "moves")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{1, 2}, positions(letters))
		require.Equal(t, map[string]arrivals{"c": {[]eventstore.Position{3}}}, rows(t, store, view))
	})
}
