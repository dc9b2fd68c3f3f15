package projection_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

var (
	byOwner = projection.Index("owner", func(b balance) string { return b.Owner })
	byCents = projection.Index("cents", func(b balance) int64 { return b.Cents })
	// byDigit lists a row under the digits of its balance, and one without money not at all.
	byDigit = projection.IndexMany("digit", func(b balance) []uint8 {
		var digits []uint8
		for n := b.Cents; n > 0; n /= 10 {
			digits = append(digits, uint8(n%10))
		}
		return digits
	})
	byOwnerAndCents = projection.CompositeIndex("owner-cents", byOwner, byCents)
)

func indexed() *projection.ViewDefinition[balance] {
	return balances().Indexed(byOwner, byCents, byDigit, byOwnerAndCents)
}

// dump returns the rows of a table of the state.
func dump(t testing.TB, state projection.State, table string) map[string]string {
	t.Helper()
	all := map[string]string{}
	require.NoError(t, state.View(context.Background(), func(tx projection.StateTx) error {
		for row, err := range tx.Scan(table, projection.Range{}) {
			if err != nil {
				return err
			}
			all[row.Key] = string(row.Value)
		}
		return nil
	}))
	return all
}

// depositInEach deposits something in n accounts from the first on.
func depositInEach(t testing.TB, store eventstore.Store, prefix string, first, n int, cents func(i int) int) {
	t.Helper()
	for some := range slices.Chunk(make([]int, n), 500) {
		c := eventstore.Commit{}
		for range some {
			c.Events = append(c.Events, eventstore.Event{Stream: account(fmt.Sprint(prefix, first)), Type: "account.deposited", Data: fmt.Appendf(nil, `{"Cents":%d}`, cents(first))})
			first++
		}
		_, err := store.Append(context.Background(), c)
		require.NoError(t, err)
	}
}

func uint64Key(n uint64) string { return string(binary.BigEndian.AppendUint64(nil, n)) }

// shouldBe returns what the tables of the indexes must hold for the rows, made
// in another way than the product does.
func shouldBe(rows map[string]balance) map[string]map[string]string {
	all := map[string]map[string]string{"owner": {}, "cents": {}, "digit": {}, "owner-cents": {}}
	for key, b := range rows {
		put := func(index, of string) { all[index][of+key] = string([]byte{byte(len(key))}) }
		owner := b.Owner + "\x00\x00"
		cents := uint64Key(uint64(b.Cents) + 1<<63)
		put("owner", owner)
		put("cents", cents)
		put("owner-cents", owner+cents)
		if b.Cents > 0 {
			for _, c := range fmt.Sprint(b.Cents) {
				put("digit", uint64Key(uint64(c-'0')))
			}
		}
	}
	return all
}

// consistent checks that the indexes have the entries of the rows, and no others.
func consistent(t testing.TB, state projection.State, view *projection.ViewDefinition[balance]) {
	t.Helper()
	for name, want := range shouldBe(rows(t, state, view)) {
		require.Equal(t, want, dump(t, state, "view.balances#"+name), "index %q", name)
	}
}

func by(t testing.TB, state projection.State, view *projection.ViewDefinition[balance], s projection.Selection, r projection.Range) (keys []string, err error) {
	t.Helper()
	wrong := state.View(context.Background(), func(tx projection.StateTx) error {
		keys, err = []string{}, nil
		for e, failed := range view.RowsBy(tx, s, r) {
			if failed != nil {
				err = failed
				return nil
			}
			keys = append(keys, e.Key)
		}
		return nil
	})
	require.NoError(t, wrong)
	return keys, err
}

func found(t testing.TB, state projection.State, view *projection.ViewDefinition[balance], s projection.Selection) []string {
	t.Helper()
	keys, err := by(t, state, view, s, projection.Range{})
	require.NoError(t, err)
	return keys
}

func TestIndex(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		view := indexed()
		require.NoError(t, view.Err())
		put(t, store, account("a1"), opened{"Ann"}, deposited{5})
		put(t, store, account("a2"), opened{"Ann"}, deposited{30})
		put(t, store, account("b1"), opened{"Bob"}, deposited{-7})
		put(t, store, account("c1"), opened{""}, deposited{53})
		r := start(t, store, store, projection.Options{}, view)
		r.caughtUp(t, store, "balances")
		consistent(t, store, view)
		for _, test := range []struct {
			selection projection.Selection
			want      []string
		}{
			{byOwner, []string{"c1", "a1", "a2", "b1"}},
			{byOwner.Is("Ann"), []string{"a1", "a2"}},
			{byOwner.Is(""), []string{"c1"}},
			{byOwner.Is("An"), []string{}},
			{byOwner.Above("Ann"), []string{"b1"}},
			{byOwner.AtMost("Ann"), []string{"c1", "a1", "a2"}},
			{byCents.Between(5, 30), []string{"a1", "a2"}},
			{byCents.AtLeast(5).Below(30), []string{"a1"}},
			{byCents.Below(5).AtLeast(-7), []string{"b1"}},
			{byCents.Above(-7).AtMost(30), []string{"a1", "a2"}},
			{byCents.Between(30, 5), []string{}},
			{byCents.AtMost(5).AtMost(100).AtLeast(0).AtLeast(-100), []string{"a1"}},
			{byDigit.Is(3), []string{"a2", "c1"}},
			{byDigit.Between(3, 5), []string{"a2", "c1", "a1", "c1"}},
			{byDigit.Above(255), []string{}},
			{byDigit.AtMost(255), []string{"a2", "a2", "c1", "a1", "c1"}},
			{byOwnerAndCents, []string{"c1", "a1", "a2", "b1"}},
			{byOwnerAndCents.In("Ann"), []string{"a1", "a2"}},
			{byOwnerAndCents.In("Ann").Above(5), []string{"a2"}},
			{byOwnerAndCents.In("Ann").Below(5), []string{}},
			{byOwnerAndCents.In("Bob").AtMost(1 << 62), []string{"b1"}},
		} {
			require.Equal(t, test.want, found(t, store, view, test.selection), "%+v", test.selection)
			slices.Reverse(test.want)
			backward, err := by(t, store, view, test.selection, projection.Range{Backward: true})
			require.NoError(t, err)
			require.Equal(t, test.want, backward)
		}
		keys, err := by(t, store, view, byCents, projection.Range{Prefix: "a", Limit: 1, Backward: true})
		require.NoError(t, err)
		require.Equal(t, []string{"a2"}, keys)

		// Entries follow their rows, to the end.
		put(t, store, account("a2"), opened{"Bob"}, deposited{-31})
		put(t, store, account("c1"), &closed{})
		r.caughtUp(t, store, "balances")
		consistent(t, store, view)
		require.Equal(t, []string{"a2", "b1"}, found(t, store, view, byOwner.Is("Bob")))
		require.NoError(t, r.Rebuild(t.Context(), "balances"))
		consistent(t, store, view)
		verified(t, store, view)
		for _, id := range []string{"a1", "a2", "b1"} {
			put(t, store, account(id), &closed{})
		}
		r.caughtUp(t, store, "balances")
		require.Empty(t, dump(t, store, "view.balances#owner"))
		require.NoError(t, r.stop())
	})
}

func TestIndex_IsNotOfTheView(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	view := balances().Indexed(byOwner)
	_, err := by(t, store, view, byOwner, projection.Range{})
	require.ErrorIs(t, err, projection.ErrIndexNotBuilt, "the view has never run")
	_, err = by(t, store, view, byCents, projection.Range{})
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.ErrorContains(t, err, `index "cents" is not one of the view`)
	_, err = by(t, store, view, projection.IndexRange[int]{}, projection.Range{})
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	other := projection.Index("owner", func(b balance) string { return b.Owner })
	_, err = by(t, store, view, other, projection.Range{})
	require.ErrorIs(t, err, eventstore.ErrInvalid, "one of the same name")
}

func TestIndexed_Mistakes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		view *projection.ViewDefinition[balance]
		want string
	}{
		{balances().Indexed(nil), "an index is nil"},
		{balances().Indexed(byOwner, byOwner), `two indexes are named "owner"`},
		{balances().Indexed(byOwner).Indexed(projection.Index("owner", func(balance) bool { return true })), `two indexes are named "owner"`},
		{balances().Indexed(projection.Index[balance, int]("x", nil)), `the function of index "x" is nil`},
		{balances().Indexed(projection.IndexMany[balance, int]("x", nil)), `the function of index "x" is nil`},
		{balances().Indexed(projection.Index("a#b", func(balance) int { return 1 })), `index name "a#b": use 1 to 64 ASCII letters`},
		{balances().Indexed(projection.CompositeIndex[balance, string, int64]("x", byOwner, nil)), `an index that "x" is made of is nil`},
	} {
		require.ErrorIs(t, test.view.Err(), eventstore.ErrInvalid)
		require.ErrorContains(t, test.view.Err(), test.want)
	}
	plain := balances()
	plain.Indexed(byOwner, byOwner)
	require.NoError(t, plain.Err(), "the view itself is not changed")
}

// An index that is new to a view with rows is built before the view goes on; one
// that is gone is removed; one whose keys are of another type is built anew.
func TestIndex_ComesAndGoes(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		const accounts = 1200 // some steps
		depositInEach(t, store, "a", 0, accounts, func(i int) int { return i % 77 })
		runWith := func(view *projection.ViewDefinition[balance]) {
			r := start(t, store, store, projection.Options{}, view)
			r.caughtUp(t, store, "balances")
			require.NoError(t, r.stop())
		}
		runWith(balances())
		require.Empty(t, dump(t, store, "projection.indexes"))
		all := indexed()
		_, err := by(t, store, all, byCents, projection.Range{})
		require.ErrorIs(t, err, projection.ErrIndexNotBuilt)
		runWith(all)
		consistent(t, store, all)
		require.Len(t, found(t, store, all, byCents), accounts)
		verified(t, store, all)

		// A build of the program that does not know them writes rows meanwhile.
		put(t, store, account("a1"), deposited{500}, opened{"Ann"})
		put(t, store, account("a2"), &closed{})
		runWith(balances().Indexed(byOwner))
		require.Empty(t, dump(t, store, "view.balances#cents"))
		require.Empty(t, dump(t, store, "view.balances#owner-cents"))
		require.Len(t, dump(t, store, "view.balances#owner"), accounts-1)
		_, err = by(t, store, all, byCents, projection.Range{})
		require.ErrorIs(t, err, projection.ErrIndexNotBuilt)
		require.Len(t, found(t, store, all, byOwner), accounts-1, "this one it knows")
		runWith(all)
		consistent(t, store, all)
		require.Equal(t, []string{"a1"}, found(t, store, all, byCents.AtLeast(500)))

		owners := projection.Index("owner", func(b balance) int { return len(b.Owner) })
		view := balances().Indexed(owners)
		_, err = by(t, store, view, owners, projection.Range{})
		require.ErrorIs(t, err, projection.ErrIndexNotBuilt)
		runWith(view)
		require.Equal(t, []string{"a1"}, found(t, store, view, owners.Above(0)))
		require.Len(t, dump(t, store, "view.balances#owner"), accounts-1)

		runWith(balances())
		require.Empty(t, dump(t, store, "projection.indexes"))
		require.Empty(t, dump(t, store, "view.balances#owner"))
	})
}

// A build of the program that does not know an index withdraws it before the
// first row that it writes, also where that is a dead letter's: one that is
// replayed while the view does not run, or while it waits to try again after it has
// failed to begin.
func TestIndex_IsWithdrawnByReplay(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		for _, runs := range []bool{false, true} {
			withdrawnByReplay(t, open(t), runs)
		}
	})
}

func withdrawnByReplay(t *testing.T, store backend, runs bool) {
	broken := true
	define := func() *projection.ViewDefinition[balance] {
		return projection.View("balances",
			projection.On(func(b *balance, e opened) { b.Owner = e.Owner }),
			projection.On(func(b *balance, e deposited) {
				if broken && e.Cents == 13 {
					panic(projection.Permanent(errors.New("unlucky")))
				}
				b.Cents += e.Cents
			}))
	}
	view := define().Indexed(byOwner, byCents, byDigit, byOwnerAndCents)
	put(t, store, account("ann"), opened{"Ann"}, deposited{1}, deposited{13})
	put(t, store, account("bob"), opened{"Bob"}, deposited{2})
	put(t, store, account("ann"), deposited{4})
	r := start(t, store, store, projection.Options{}, view)
	r.caughtUp(t, store, "balances")
	require.Equal(t, []string{"ann", "bob"}, found(t, store, view, byCents))
	require.Equal(t, 2, r.status(t).DeadLetters)
	consistent(t, store, view)
	require.NoError(t, r.stop())

	broken = false
	state := &hookedState{State: store}
	begun := false
	state.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
		if !begun && runs {
			begun = true
			return store.Update(ctx, func(tx projection.StateTx) error { return errors.Join(fn(tx), errInjected) })
		}
		return store.Update(ctx, fn)
	}
	older := projection.NewEngine(store, state, projection.Options{Logger: quiet, RetryAfter: time.Hour, RetryAtMost: time.Hour})
	require.NoError(t, older.Add(define()))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	if runs {
		running.Go(func() { _ = older.Workers()[0].Run(ctx) })
		require.Eventually(t, func() bool {
			status, err := older.Status(ctx)
			return err == nil && status[0].Phase == projection.PhaseRetrying
		}, 10*time.Second, time.Millisecond)
	}
	n, err := older.ReplayDeadLetters(t.Context(), "balances")
	cancel()
	running.Wait()
	require.NoError(t, err)
	require.Equal(t, 2, n)
	_, err = by(t, store, view, byCents, projection.Range{})
	require.ErrorIs(t, err, projection.ErrIndexNotBuilt)

	r = start(t, store, store, projection.Options{}, view)
	r.caughtUp(t, store, "balances")
	require.Equal(t, []string{"ann"}, found(t, store, view, byCents.AtLeast(18)))
	consistent(t, store, view)
	verified(t, store, view)
	require.NoError(t, r.stop())
}

// What goes wrong in the function of an index is the event's fault like anything
// that its handler does, and on rows that are there it stops the view.
func TestIndex_FunctionFails(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		picky := projection.Index("picky", func(b balance) string {
			if b.Cents == 13 {
				panic("unlucky")
			}
			return strings.Repeat("x", int(b.Cents))
		})
		view := balances().Indexed(picky)
		put(t, store, account("ann"), deposited{1})
		put(t, store, account("bob"), deposited{13})
		put(t, store, account("cid"), deposited{1022})
		put(t, store, account("dan"), deposited{1023})
		put(t, store, account("ann"), deposited{2})
		r := start(t, store, store, projection.Options{Attempts: 1}, view)
		r.caughtUp(t, store, "balances")
		letters, err := r.DeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Len(t, letters, 2)
		require.Contains(t, letters[0].Error, "unlucky")
		require.Contains(t, letters[1].Error, `the key of row "dan" in index "picky" of view "balances" takes 1025 bytes, at most 1024 are allowed`)
		require.Equal(t, []string{"ann", "cid"}, found(t, store, view, picky))
		require.Len(t, dump(t, store, "view.balances#picky"), 2)
		verified(t, store, view)
		require.NoError(t, r.stop())

		strict := projection.Index("strict", func(b balance) int64 { return 1 / (b.Cents - 3) })
		r = start(t, store, store, projection.Options{}, balances().Indexed(picky, strict))
		require.ErrorIs(t, r.WaitFor(t.Context(), "balances", 1), projection.ErrStopped)
		err = r.stop()
		require.ErrorContains(t, err, `build index "strict" of view "balances"`)
		require.ErrorContains(t, err, `row "ann": correct the function of the index: handler panicked: runtime error: integer divide by zero`)
	})
}

// What is indexed is the row as it is stored, which need not be what the fold has
// made, and what a function does to its row does no harm.
func TestIndex_IsOfTheStoredRow(t *testing.T) {
	t.Parallel()
	type page struct {
		Title string
		Words []string
	}
	byTitle := projection.Index("title", func(p page) string { return p.Title })
	byWord := projection.IndexMany("word", func(p page) []string {
		slices.Sort(p.Words)
		return p.Words
	})
	view := projection.View("pages",
		projection.On(func(p *page, e opened) {
			p.Title = e.Owner[:3] // which may be within a character
			p.Words = append(p.Words, p.Title, "a")
		}),
		projection.DeleteOn[page, *closed](),
	).Indexed(byTitle, byWord)
	for _, cache := range []int{1, 1 << 20} {
		store := memory.New()
		defer store.Close()
		r := start(t, store, store, projection.Options{CacheBytes: cache}, view)
		put(t, store, account("1"), opened{"caf\u00e9"}, opened{"ca\u00e9"})
		put(t, store, account("2"), opened{"fa\u00dfe"})
		r.caughtUp(t, store, "pages")
		put(t, store, account("2"), &closed{})
		put(t, store, account("1"), opened{"xyz"})
		r.caughtUp(t, store, "pages")
		require.Equal(t, []string{"caf", "a", "ca\ufffd", "a", "xyz", "a"}, rows(t, store, view)["1"].Words)
		require.Equal(t, map[string]string{"xyz\x00\x001": "\x01"}, dump(t, store, "view.pages#title"))
		require.Len(t, dump(t, store, "view.pages#word"), 4)
		verified(t, store, view)
		put(t, store, account("1"), &closed{})
		r.caughtUp(t, store, "pages")
		require.Empty(t, dump(t, store, "view.pages#word"))
		require.NoError(t, r.stop())
	}
}

// Entries that are missing or too many are found by a verification.
func TestVerify_Indexes(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	view := indexed()
	put(t, store, account("ann"), opened{"Ann"}, deposited{5})
	put(t, store, account("bob"), opened{"Bob"}, deposited{7})
	r := start(t, store, store, projection.Options{}, view)
	r.caughtUp(t, store, "balances")
	v, err := r.Verify(t.Context(), "balances")
	require.NoError(t, err)
	require.True(t, v.Agrees())
	require.Equal(t, 8, v.Entries)
	require.NoError(t, store.Update(t.Context(), func(tx projection.StateTx) error {
		return errors.Join(tx.Delete("view.balances#owner", "Ann\x00\x00ann"), tx.Put("view.balances#owner", "Cid\x00\x00cid", []byte{3}), tx.Put("view.balances#owner", "x", nil))
	}))
	v, err = r.Verify(t.Context(), "balances")
	require.NoError(t, err)
	require.False(t, v.Agrees())
	require.Equal(t, []int{1, 2, 0}, []int{v.MissingEntries, v.ExtraEntries, v.Missing + v.Extra + v.Changed})
	require.Contains(t, v.String(), "of 8 entries of indexes 1 are missing, 2 are too many")
	_, err = by(t, store, view, byOwner.Is("Cid"), projection.Range{})
	require.ErrorContains(t, err, `it has an entry of row "cid", which is not there: rebuild the view`)
	_, err = by(t, store, view, byOwner, projection.Range{Backward: true, Limit: 1})
	require.ErrorContains(t, err, `it has an entry "x" that is none`)
	require.NoError(t, r.Rebuild(t.Context(), "balances"))
	consistent(t, store, view)
	require.NoError(t, r.stop())
}

// Random events; definitions with now these indexes and now those, in one
// partition or three; caches and batches of random size; updates that fail or
// whose runner is killed at random points, also while indexes are built and
// removed. In the end, and wherever an index says that it is built, its entries
// are those of the rows.
func TestIndex_KilledAtRandomPoints(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		for range 2 {
			seed := rand.Uint64()
			t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) { killAtRandomPoints(t, open(t), seed) })
		}
	})
}

func killAtRandomPoints(t *testing.T, store backend, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	var mu sync.Mutex
	failures := rand.New(rand.NewPCG(seed, 1))
	state := &hookedState{State: store}
	state.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
		mu.Lock()
		dice := failures.IntN(12)
		mu.Unlock()
		switch dice {
		case 0:
			return store.Update(ctx, func(tx projection.StateTx) error { return errors.Join(fn(tx), errInjected) })
		case 1:
			return errors.Join(store.Update(ctx, fn), errInjected)
		case 2:
			return errors.Join(store.Update(ctx, fn), eventstore.ErrClosed)
		case 3:
			return errors.Join(store.Update(ctx, func(tx projection.StateTx) error { return errors.Join(fn(tx), errInjected) }), eventstore.ErrClosed)
		}
		return store.Update(ctx, fn)
	}
	partitioned := 1 + 2*random.IntN(2)
	define := func(indexes ...projection.ViewIndex[balance]) *projection.ViewDefinition[balance] {
		return balances().Partitioned(partitioned).Indexed(indexes...)
	}
	options := func() projection.Options {
		return projection.Options{
			Owner: "node", BatchEvents: 1 + random.IntN(40), CacheBytes: 1 + random.IntN(8000), CheckpointEvery: 1 + random.IntN(20),
			RetryAfter: time.Nanosecond, RetryAtMost: time.Nanosecond,
		}
	}
	all := []projection.ViewIndex[balance]{byOwner, byCents, byDigit, byOwnerAndCents}
	full := define(all...)
	many := 0
	for range 10 {
		var some []projection.ViewIndex[balance]
		for _, x := range all {
			if random.IntN(3) > 0 {
				some = append(some, x)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		engine := projection.NewEngine(store, state, withQuiet(options()))
		require.NoError(t, engine.Add(define(some...)))
		var running sync.WaitGroup
		for _, w := range engine.Workers() {
			running.Go(func() { _ = w.Run(ctx) })
		}
		if random.IntN(4) == 0 { // rows for more than one step
			depositInEach(t, store, "m", many, 1100, func(int) int { return random.IntN(1000) })
			many += 1100
		}
		for range random.IntN(20) {
			id := account(fmt.Sprint("a", random.IntN(30)))
			switch random.IntN(8) {
			case 0:
				put(t, store, id, opened{fmt.Sprint("owner", random.IntN(5))})
			case 1:
				put(t, store, id, &closed{})
			default:
				put(t, store, id, deposited{int64(random.IntN(1000)) - 300}, deposited{1})
			}
		}
		if head, err := store.Head(ctx); err == nil && random.IntN(3) > 0 {
			_ = engine.WaitFor(ctx, "balances", head)
		}
		if random.IntN(8) == 0 {
			_ = engine.Rebuild(ctx, "balances")
		}
		cancel()
		running.Wait()
		// Whatever says that it is built, is.
		want := shouldBe(rows(t, store, full))
		for name, s := range map[string]projection.Selection{"owner": byOwner, "cents": byCents, "digit": byDigit, "owner-cents": byOwnerAndCents} {
			keys, err := by(t, store, full, s, projection.Range{})
			if errors.Is(err, projection.ErrIndexNotBuilt) {
				continue
			}
			require.NoError(t, err)
			require.Len(t, keys, len(want[name]))
			require.Equal(t, want[name], dump(t, store, "view.balances#"+name), "index %q", name)
		}
	}
	r := start(t, store, store, options(), full)
	r.caughtUp(t, store, "balances")
	consistent(t, store, full)
	verified(t, store, full)
	require.Len(t, found(t, store, full, byOwnerAndCents), len(folded(t, store)))
	require.Equal(t, slices.Sorted(maps.Keys(folded(t, store))), slices.Sorted(slices.Values(found(t, store, full, byCents))))
	require.NoError(t, r.Rebuild(t.Context(), "balances"))
	consistent(t, store, full)
	require.NoError(t, r.stop())
	// And nothing is left of what a definition does not have.
	r = start(t, store, store, options(), define())
	r.caughtUp(t, store, "balances")
	require.NoError(t, r.stop())
	for _, table := range []string{"projection.indexes", "view.balances#owner", "view.balances#cents", "view.balances#digit", "view.balances#owner-cents"} {
		require.Empty(t, dump(t, store, table))
	}
}
