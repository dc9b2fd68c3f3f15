package projection_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// accountFold is what an aggregate's definition looks like from here.
type accountFold struct{ mistake error }

func (accountFold) Category() string     { return "account" }
func (accountFold) EventTypes() []string { return []string{"account.opened", "account.deposited"} }
func (f accountFold) Err() error         { return f.mistake }
func (accountFold) Apply(enc *eventstore.Encoding, b *balance, r eventstore.Recorded) error {
	b.Seen = append(b.Seen, r.Version)
	if r.Type == "account.opened" {
		var e opened
		err := enc.Decode(r, &e)
		b.Owner = e.Owner
		return err
	}
	var e deposited
	err := enc.Decode(r, &e)
	b.Cents += e.Cents
	return err
}

func TestOf_KeepsTheStateOfOneCategory(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		view := projection.Of("accounts", accountFold{})
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})
		put(t, store, eventstore.Stream{Category: "accounting", ID: "ann"}, deposited{100})
		r := start(t, store, store, projection.Options{}, view)
		r.caughtUp(t, store, "accounts")
		require.Equal(t, map[string]balance{"ann": {Owner: "Ann", Cents: 5, Seen: []uint64{1, 2}}}, rows(t, store, view))
		require.NoError(t, r.stop())
	})
	require.ErrorContains(t, projection.Of("accounts", accountFold{mistake: errors.New("no such thing")}).Err(), `projection "accounts": no such thing`)
}

func TestOnKeyed_OneEventToManyRows(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		type word struct{ Times int }
		words := projection.View("words", projection.OnKeyed(
			func(e opened, _ eventstore.Recorded) []string { return strings.Fields(e.Owner) },
			func(w *word, key string, _ opened, _ eventstore.Recorded) { w.Times += len(key) },
		))
		put(t, store, account("1"), opened{"to be or not to be"}, opened{""})
		put(t, store, account("2"), opened{"to go"}, deposited{3})
		r := start(t, store, store, projection.Options{}, words)
		r.caughtUp(t, store, "words")
		require.Equal(t, map[string]word{"to": {4}, "be": {2}, "or": {2}, "not": {3}, "go": {2}}, rows(t, store, words),
			"a key returned twice is folded once; no key touches no row")
		require.NoError(t, r.stop())
	})
}

// Events stored under old names and schemas reach the handler of today's type.
func TestView_OldEventsReachTheirHandlers(t *testing.T) {
	t.Parallel()
	enc, err := eventstore.NewEncoding(
		eventstore.Rename("account.created", "account.opened"),
		eventstore.Upcast("account.created", 1, func(old struct{ Name string }) (opened, error) { return opened{Owner: old.Name}, nil }),
	)
	require.NoError(t, err)
	store := memory.New()
	defer store.Close()
	_, err = store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{
		{Stream: account("ann"), Type: "account.created", Data: []byte(`{"Name":"Ann"}`)},
	}})
	require.NoError(t, err)
	put(t, store, account("bob"), opened{"Bob"})
	view := balances()
	r := start(t, store, store, projection.Options{Encoding: enc}, view)
	r.caughtUp(t, store, "balances")
	require.Equal(t, map[string]balance{"ann": {Owner: "Ann", Seen: []uint64{1}}, "bob": {Owner: "Bob", Seen: []uint64{1}}}, rows(t, store, view))
	require.NoError(t, r.stop())
}

// What a handler does to its event or row afterwards, it does to its own.
func TestView_RowsAreNotShared(t *testing.T) {
	t.Parallel()
	type tagged struct{ Tags []string }
	var kept []*tagged
	store := memory.New()
	defer store.Close()
	view := projection.View("tags", projection.On(func(row *tagged, e opened) {
		row.Tags = append(row.Tags, e.Owner)
		kept = append(kept, row)
	}))
	put(t, store, account("ann"), opened{"one"})
	r := start(t, store, store, projection.Options{}, view)
	r.caughtUp(t, store, "tags")
	first := rows(t, store, view)["ann"]
	first.Tags[0] = "changed by a reader"
	put(t, store, account("ann"), opened{"two"})
	r.caughtUp(t, store, "tags")
	require.Equal(t, []string{"one", "two"}, rows(t, store, view)["ann"].Tags)
	require.NoError(t, r.stop())
}

// A row type that no longer fits what is stored stops the view with the way out.
func TestView_RowTypeHasChanged(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		type before struct{ Owner string }
		type after struct{ Owner struct{ First, Last string } }
		older := projection.View("owners", projection.On(func(o *before, e opened) { o.Owner = e.Owner }))
		newer := projection.View("owners", projection.On(func(o *after, e opened) { o.Owner.First = e.Owner }))
		put(t, store, account("ann"), opened{"Ann"})
		r := start(t, store, store, projection.Options{}, older)
		r.caughtUp(t, store, "owners")
		require.NoError(t, r.stop())
		last := put(t, store, account("ann"), opened{"Anna"}).Last
		r = start(t, store, store, projection.Options{}, newer)
		err := r.WaitFor(t.Context(), "owners", last)
		require.ErrorIs(t, err, projection.ErrStopped)
		require.ErrorContains(t, err, `row "ann" of view "owners" does not decode into projection_test.after: its shape has changed: rebuild the view`)
		require.Error(t, r.stop())
		require.NoError(t, r.Rebuild(t.Context(), "owners"))
		r = start(t, store, store, projection.Options{}, newer)
		r.caughtUp(t, store, "owners")
		require.Equal(t, "Anna", rows(t, store, newer)["ann"].Owner.First)
		require.NoError(t, r.stop())
	})
}

func TestEngine_Status(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		engine := projection.NewEngine(store, store, projection.Options{})
		require.NoError(t, engine.Add(balances()))
		put(t, store, account("ann"), opened{"Ann"}, deposited{1})
		time.Sleep(time.Minute)
		put(t, store, account("ann"), deposited{1})
		time.Sleep(time.Minute)
		status, err := engine.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, []projection.Status{{
			Name: "balances", Phase: projection.PhaseStopped, Head: 3, LagEvents: 3, Lag: 2 * time.Minute, Version: 1, Active: true,
		}}, status, "the lag is the age of the oldest event not yet considered")

		r := start(t, store, store, projection.Options{}, balances())
		r.caughtUp(t, store, "balances")
		synctest.Wait()
		status, err = r.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, []projection.Status{{Name: "balances", Phase: projection.PhaseLive, Position: 3, Head: 3, Version: 1, Active: true}}, status)
		require.NoError(t, r.stop())

		// Another engine knows from the checkpoint.
		status, err = engine.Status(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 3, status[0].Position)
		require.Zero(t, status[0].Lag)
	})
}

func TestEngine_NotRegistered(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	engine := projection.NewEngine(store, store, projection.Options{})
	require.NoError(t, engine.Add(balances()))
	for name, call := range map[string]func() error{
		"wait":     func() error { return engine.WaitFor(t.Context(), "x", 1) },
		"reached":  func() error { _, err := engine.Reached("x"); return err },
		"rebuild":  func() error { return engine.Rebuild(t.Context(), "x") },
		"letters":  func() error { _, err := engine.DeadLetters(t.Context(), "x"); return err },
		"replay":   func() error { _, err := engine.ReplayDeadLetters(t.Context(), "x"); return err },
		"register": func() error { return engine.Check(totals()) },
	} {
		err := call()
		require.ErrorIs(t, err, projection.ErrNotRegistered, name)
		require.ErrorContains(t, err, `(registered are ["balances"])`, name)
	}
}

func TestRun_Twice(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	r := start(t, store, store, projection.Options{}, balances())
	r.caughtUp(t, store, "balances")
	require.EqualError(t, r.Workers()[0].Run(t.Context()), `projection "balances" runs already`)
	r.caughtUp(t, store, "balances")
	require.NoError(t, r.stop())
}

// What is asked for just before the projection runs is done first.
func TestRun_WhileAsked(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		put(t, store, account("ann"), deposited{1})
		var held atomic.Bool
		held.Store(true)
		asking, goOn := make(chan struct{}), make(chan struct{})
		state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			if held.CompareAndSwap(true, false) {
				close(asking)
				<-goOn
			}
			return store.Update(ctx, fn)
		}}
		engine := projection.NewEngine(store, state, projection.Options{Logger: quiet})
		require.NoError(t, engine.Add(balances()))
		asked, ran := make(chan error, 1), make(chan error, 1)
		go func() { asked <- engine.Rebuild(t.Context(), "balances") }()
		<-asking
		ctx, cancel := context.WithCancel(t.Context())
		worker := engine.Workers()[0]
		go func() { ran <- worker.Run(ctx) }()
		synctest.Wait()
		require.Empty(t, ran, "it waits")
		close(goOn)
		require.NoError(t, <-asked)
		require.NoError(t, worker.WaitThrough(t.Context(), 1))
		cancel()
		require.NoError(t, <-ran)
	})
}

// Rows do not depend on how the cache forgets.
func TestView_TinyCache(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		view := balances()
		r := start(t, store, store, projection.Options{CacheBytes: 1, BatchEvents: 3}, view)
		for i := range 100 {
			put(t, store, account(fmt.Sprint(i%11)), opened{fmt.Sprint(i)}, deposited{int64(i)})
		}
		r.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		require.NoError(t, r.stop())
	})
}

type ordered struct{ Lines []int }

type added struct{}

type assigned struct{ Owners []string }

type broken struct{}

func (ordered) EventType() string  { return "order.ordered" }
func (added) EventType() string    { return "order.added" }
func (assigned) EventType() string { return "order.assigned" }
func (broken) EventType() string   { return "order.broken" }

type order struct{ Lines []int }

// A row that keeps a slice of its event changes it later on. When the batch is
// folded again, because of an event elsewhere, the event is as it was stored.
func TestView_FoldingAgainBeginsWithTheStoredEvents(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		orders := projection.View("orders",
			projection.On(func(o *order, e ordered) { o.Lines = e.Lines }),
			projection.On(func(o *order, _ added) { o.Lines[0]++ }),
			projection.On(func(*order, broken) { panic("broken") }),
		)
		put(t, store, account("one"), ordered{[]int{1}}, added{})
		put(t, store, account("other"), broken{})
		put(t, store, account("two"), ordered{[]int{1}}, added{})
		put(t, store, account("another"), broken{})
		r := start(t, store, store, projection.Options{Attempts: 2, RetryAfter: 1}, orders)
		r.caughtUp(t, store, "orders")
		require.Equal(t, map[string]order{"one": {[]int{2}}, "two": {[]int{2}}}, rows(t, store, orders))
		require.NoError(t, r.stop())
	})
}

// Keys may be the event's own, and spoilt by the fold.
func TestOnKeyed_FoldingAgainAsksForTheKeysAgain(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		type count struct{ Events int }
		owners := projection.View("owners",
			projection.OnKeyed(
				func(e assigned, _ eventstore.Recorded) []string { return e.Owners },
				func(c *count, _ string, e assigned, _ eventstore.Recorded) {
					e.Owners[0] = "spoilt"
					c.Events++
				}),
			projection.On(func(*count, broken) { panic("broken") }),
		)
		put(t, store, account("x"), assigned{[]string{"ann"}}, assigned{[]string{"bob"}})
		put(t, store, account("y"), broken{})
		r := start(t, store, store, projection.Options{Attempts: 2, RetryAfter: 1}, owners)
		r.caughtUp(t, store, "owners")
		require.Equal(t, map[string]count{"ann": {1}, "bob": {1}}, rows(t, store, owners))
		require.NoError(t, r.stop())
	})
}

// An event that touches several rows gives each of them memory of its own.
func TestOnKeyed_RowsDoNotShareTheEvent(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		orders := projection.View("orders",
			projection.OnKeyed(
				func(ordered, eventstore.Recorded) []string { return []string{"a", "b", "c"} },
				func(o *order, _ string, e ordered, _ eventstore.Recorded) { o.Lines = e.Lines }),
			projection.On(func(o *order, _ added) { o.Lines[0]++ }),
		)
		put(t, store, account("x"), ordered{[]int{1}})
		put(t, store, account("a"), added{})
		put(t, store, account("c"), added{}, added{})
		r := start(t, store, store, projection.Options{}, orders)
		r.caughtUp(t, store, "orders")
		require.Equal(t, map[string]order{"a": {[]int{2}}, "b": {[]int{1}}, "c": {[]int{3}}}, rows(t, store, orders))
		require.NoError(t, r.stop())
	})
}

// Slow handlers do not keep a whole batch from being written.
func TestView_BatchesAreBoundedInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		for i := range 100 {
			put(t, store, account(fmt.Sprint("a", i%7)), deposited{int64(i)})
		}
		batches := 0
		state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			batches++
			return store.Update(ctx, fn)
		}}
		view := projection.View("balances", projection.OnMeta(func(b *balance, e deposited, r eventstore.Recorded) {
			time.Sleep(50 * time.Millisecond)
			b.Cents += e.Cents
			b.Seen = append(b.Seen, r.Version)
		}))
		r := start(t, store, state, projection.Options{BatchTime: 500 * time.Millisecond}, view)
		began := time.Now()
		require.NoError(t, r.WaitFor(t.Context(), "balances", 10))
		require.LessOrEqual(t, time.Since(began), time.Second)
		r.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		require.Less(t, batches, 12, "and they are no smaller than that")
		verified(t, store, view)
		require.NoError(t, r.stop())
	})
}

// What is folded on demand is what would be stored.
func TestLive(t *testing.T) {
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		for i := range 300 {
			put(t, store, account(fmt.Sprint("a", i%3)), deposited{int64(i)})
		}
		put(t, store, account("a2"), &closed{})
		engine := projection.NewEngine(store, nil, projection.Options{BatchEvents: 7, Logger: quiet})
		should := folded(t, store)
		for _, view := range []*projection.ViewDefinition[balance]{balances(), balances().Version(3).Partitioned(4)} {
			for i := range 2 {
				id := fmt.Sprint("a", i)
				row, found, err := projection.Live(t.Context(), engine, view, account(id))
				require.NoError(t, err)
				require.True(t, found)
				require.Equal(t, should[id], row)
			}
			_, found, err := projection.Live(t.Context(), engine, view, account("a2"))
			require.NoError(t, err)
			require.False(t, found, "it was closed")
			_, found, err = projection.Live(t.Context(), engine, view, account("nobody"))
			require.NoError(t, err)
			require.False(t, found)
		}
		require.NoError(t, store.View(t.Context(), func(tx projection.StateTx) error {
			for range tx.Scan("view.balances", projection.Range{}) {
				t.Error("nothing is stored")
			}
			return nil
		}))
		_, _, err := projection.Live(t.Context(), engine, spread(1, never), account("a1"))
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "made from many streams")
		picky := projection.View("picky", projection.On(func(*balance, deposited) { panic("no") }))
		_, _, err = projection.Live(t.Context(), engine, picky, account("a1"))
		require.ErrorContains(t, err, `event "account.deposited" at position 2 of stream "account-a1": handler panicked: no`)
	})
}
