package query_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/query"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type opened struct{ Owner string }

type deposited struct{ Cents int64 }

func (opened) EventType() string    { return "account.opened" }
func (deposited) EventType() string { return "account.deposited" }

type balance struct {
	Owner string
	Cents int64
}

func newBalances() *projection.ViewDefinition[balance] {
	return projection.View("balances",
		projection.On(func(b *balance, e opened) { b.Owner = e.Owner }),
		projection.On(func(b *balance, e deposited) { b.Cents += e.Cents }),
	)
}

type owner struct{ Accounts int }

func newOwners() *projection.ViewDefinition[owner] {
	return projection.View("owners", projection.OnKeyed(
		func(e opened, _ eventstore.Recorded) []string { return []string{e.Owner} },
		func(o *owner, _ string, _ opened, _ eventstore.Recorded) { o.Accounts++ },
	))
}

// backend is a store that is a state too.
type backend interface {
	eventstore.Store
	projection.State
	Close() error
}

// app is the smallest host.
type app struct {
	store  backend
	engine *projection.Engine
	stop   func()
}

func (a *app) Projections() *projection.Engine { return a.engine }

func start(t testing.TB, projections ...projection.Projection) *app {
	t.Helper()
	return startOn(t, memory.New(), projections...)
}

func startOn(t testing.TB, store backend, projections ...projection.Projection) *app {
	t.Helper()
	return startWith(t, store, store, projections...)
}

func startWith(t testing.TB, store backend, state projection.State, projections ...projection.Projection) *app {
	t.Helper()
	a := &app{store: store, engine: projection.NewEngine(store, state, projection.Options{Logger: slog.New(slog.DiscardHandler)})}
	for _, p := range projections {
		require.NoError(t, a.engine.Add(p))
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, w := range a.engine.Workers() {
		running.Go(func() { _ = w.Run(ctx) })
	}
	a.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		_ = store.Close()
	})
	t.Cleanup(a.stop)
	return a
}

func (a *app) put(t testing.TB, id string, events ...projection.Event) eventstore.Receipt {
	t.Helper()
	var c eventstore.Commit
	for _, e := range events {
		encoded := eventstore.Event{Stream: eventstore.Stream{Category: "account", ID: id}, Type: e.EventType()}
		data, err := (*eventstore.Encoding)(nil).Encode(e.EventType(), e, &encoded.Metadata)
		require.NoError(t, err)
		encoded.Data = data
		c.Events = append(c.Events, encoded)
	}
	receipt, err := a.store.Append(context.Background(), c)
	require.NoError(t, err)
	return receipt
}

func keys[R any](page query.Page[R]) []string {
	all := []string{}
	for _, e := range page.Entries {
		all = append(all, e.Key)
	}
	return all
}

func TestGet(t *testing.T) {
	t.Parallel()
	balances := newBalances()
	a := start(t, balances)
	receipt := a.put(t, "ann", opened{"Ann"}, deposited{5})

	got, err := query.Get(t.Context(), a, balances, "ann", query.AtLeast(receipt))
	require.NoError(t, err)
	require.Equal(t, balance{Owner: "Ann", Cents: 5}, got)

	_, err = query.Get(t.Context(), a, balances, "bob", query.AtLeast(receipt))
	require.ErrorIs(t, err, query.ErrNotFound)
	require.EqualError(t, err, `get "bob" of view "balances": not found`)

	got, err = query.Live(t.Context(), a, newBalances(), eventstore.Stream{Category: "account", ID: "ann"})
	require.NoError(t, err)
	require.Equal(t, balance{Owner: "Ann", Cents: 5}, got)
	_, err = query.Live(t.Context(), a, newBalances(), eventstore.Stream{Category: "account", ID: "bob"})
	require.ErrorIs(t, err, query.ErrNotFound)
	require.EqualError(t, err, `fold stream "account-bob" with view "balances": not found`)
}

func TestGet_ViewIsNotRegistered(t *testing.T) {
	t.Parallel()
	a := start(t, newBalances())
	_, err := query.Get(t.Context(), a, newOwners(), "ann")
	require.ErrorIs(t, err, projection.ErrNotRegistered)
	require.ErrorContains(t, err, `"owners" (registered are ["balances"])`)

	_, err = query.Get(t.Context(), a, newBalances(), "ann")
	require.ErrorIs(t, err, projection.ErrNotRegistered)
	require.ErrorContains(t, err, "another definition of that name is registered")
}

// Every reader sees its own write, however many write at once.
func TestGet_AtLeastReadsOwnWrites(t *testing.T) {
	t.Parallel()
	balances := newBalances()
	a := start(t, balances)
	var clients sync.WaitGroup
	problems := make(chan error, 16)
	for c := range 16 {
		clients.Go(func() {
			id := fmt.Sprint("client", c)
			for i := int64(1); i <= 100; i++ {
				receipt := a.put(t, id, deposited{1})
				got, err := query.Get(t.Context(), a, balances, id, query.AtLeast(receipt))
				if err == nil && got.Cents != i {
					err = fmt.Errorf("%s wrote %d and read %d", id, i, got.Cents)
				}
				if err != nil {
					problems <- err
					return
				}
			}
		})
	}
	clients.Wait()
	close(problems)
	for err := range problems {
		t.Error(err)
	}
}

// hookedState lets a test come between a query's wait and its snapshot.
type hookedState struct {
	projection.State
	view   func(ctx context.Context, fn func(projection.StateTx) error) error
	update func(ctx context.Context, fn func(projection.StateTx) error) error
}

func (h *hookedState) View(ctx context.Context, fn func(projection.StateTx) error) error {
	return h.view(ctx, fn)
}

func (h *hookedState) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	return h.update(ctx, fn)
}

// Rows that are removed for a rebuild after AtLeast has waited, and before
// they are read, are waited for again.
func TestAtLeast_RebuiltMeanwhile(t *testing.T) {
	t.Parallel()
	balances := newBalances()
	owner := query.Handle("owner", func(ctx context.Context, r query.Reader, id string) (string, error) {
		b, err := query.Get(ctx, r, balances, id)
		return b.Owner, err
	}, balances)
	for name, ask := range map[string]func(context.Context, query.Host, query.Option) (string, error){
		"get": func(ctx context.Context, host query.Host, o query.Option) (string, error) {
			b, err := query.Get(ctx, host, balances, "ann", o)
			return b.Owner, err
		},
		"list": func(ctx context.Context, host query.Host, o query.Option) (string, error) {
			page, err := query.List(ctx, host, balances, o)
			return fmt.Sprint(keys(page)), err
		},
		"all": func(ctx context.Context, host query.Host, o query.Option) (string, error) {
			found := []string{}
			for e, err := range query.All(ctx, host, balances, o) {
				if err != nil {
					return "", err
				}
				found = append(found, e.Key)
			}
			return fmt.Sprint(found), nil
		},
		"ask": func(ctx context.Context, host query.Host, o query.Option) (string, error) {
			return query.Ask(ctx, host, owner, "ann", o)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := memory.New()
			var armed, emptying atomic.Bool
			emptied, seen := make(chan struct{}), make(chan struct{})
			rebuilt := make(chan error, 1)
			var a *app
			state := &hookedState{
				State: store,
				view: func(ctx context.Context, fn func(projection.StateTx) error) error {
					if !armed.CompareAndSwap(true, false) {
						return store.View(ctx, fn)
					}
					emptying.Store(true)
					go func() { rebuilt <- a.engine.Rebuild(ctx, "balances") }()
					<-emptied
					defer close(seen)
					return store.View(ctx, fn)
				},
				update: func(ctx context.Context, fn func(projection.StateTx) error) error {
					err := store.Update(ctx, fn)
					if emptying.CompareAndSwap(true, false) {
						close(emptied)
						<-seen
					}
					return err
				},
			}
			a = startWith(t, store, state, balances)
			last := a.put(t, "ann", opened{"Ann"})
			want, err := ask(t.Context(), a, query.AtLeast(last))
			require.NoError(t, err)
			armed.Store(true)
			got, err := ask(t.Context(), a, query.AtLeast(last))
			require.NoError(t, err)
			require.Equal(t, want, got)
			require.NoError(t, <-rebuilt)
		})
	}
}

// Another engine has taken over and emptied the rows; this one does not know. The
// query finds out, and gets its answer once the rows are there again.
func TestAtLeast_EmptiedByAnother(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		balances := newBalances()
		store := memory.New()
		own := projection.NewEngine(store, store, projection.Options{Owner: "node"})
		other := projection.NewEngine(store, store, projection.Options{Owner: "node"})
		require.NoError(t, own.Add(balances))
		require.NoError(t, other.Add(balances))
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = own.Workers()[0].Run(ctx) })
		defer func() {
			cancel()
			running.Wait()
			_ = store.Close()
		}()
		a := &app{store: store, engine: own}
		last := a.put(t, "ann", opened{"Ann"})
		_, err := query.Get(t.Context(), a, balances, "ann", query.AtLeast(last))
		require.NoError(t, err)
		require.NoError(t, other.Rebuild(t.Context(), "balances"))
		_, err = query.Get(t.Context(), a, balances, "ann")
		require.ErrorIs(t, err, query.ErrNotFound)
		got, err := query.Get(t.Context(), a, balances, "ann", query.AtLeast(last))
		require.NoError(t, err)
		require.Equal(t, "Ann", got.Owner)
		status, err := own.Status(t.Context())
		require.NoError(t, err)
		require.ErrorIs(t, status[0].Err, projection.ErrFenced)
	})
}

// onServer is a store that several hosts share; none of them closes it.
type onServer struct{ *memory.Store }

func (onServer) Shared() bool { return true }
func (onServer) Close() error { return nil }

func waitReady(t testing.TB, a *app) {
	t.Helper()
	for _, w := range a.engine.Workers() {
		require.NoError(t, w.Ready(t.Context()))
	}
}

// One's own writes are read also where another process runs the projection, and
// while that changes.
func TestAtLeast_OnAStandby(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := onServer{memory.New()}
		defer store.Store.Close()
		balances, owners := newBalances(), newOwners()
		cents := query.Handle("cents", func(ctx context.Context, r query.Reader, id string) (int64, error) {
			b, err := query.Get(ctx, r, balances, id)
			return b.Cents, err
		}, balances, owners)
		hosts := []*app{startOn(t, store, balances, owners)}
		waitReady(t, hosts[0])
		for range 2 {
			hosts = append(hosts, startOn(t, store, balances, owners))
		}
		waitReady(t, hosts[1])
		waitReady(t, hosts[2])
		hosts[0].put(t, "ann", opened{"Ann"})
		total := int64(0)
		for len(hosts) > 0 {
			for range 10 {
				last := hosts[0].put(t, "ann", deposited{1})
				total++
				for i := len(hosts) - 1; i >= 0; i-- {
					began := time.Now()
					b, err := query.Get(t.Context(), hosts[i], balances, "ann", query.AtLeast(last))
					require.NoError(t, err)
					require.Equal(t, total, b.Cents)
					// The deposit does not concern the owners.
					got, err := query.Ask(t.Context(), hosts[i], cents, "ann", query.AtLeast(last))
					require.NoError(t, err)
					require.Equal(t, total, got)
					require.Less(t, time.Since(began), 1500*time.Millisecond)
				}
			}
			hosts[0].stop()
			hosts = hosts[1:]
		}
	})
}

// Rows that the owner in another process has emptied are waited for.
func TestAtLeast_RebuiltElsewhere(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := onServer{memory.New()}
		defer store.Store.Close()
		balances := newBalances()
		var emptying atomic.Bool
		emptied, goOn := make(chan struct{}), make(chan struct{})
		state := &hookedState{State: store, view: store.View, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			err := store.Update(ctx, fn)
			if emptying.CompareAndSwap(true, false) {
				close(emptied)
				<-goOn
			}
			return err
		}}
		a := startWith(t, store, state, balances)
		waitReady(t, a)
		b := startOn(t, store, balances)
		waitReady(t, b)
		last := a.put(t, "ann", opened{"Ann"})
		_, err := query.Get(t.Context(), b, balances, "ann", query.AtLeast(last))
		require.NoError(t, err)

		emptying.Store(true)
		rebuilt, answered := make(chan error, 1), make(chan error, 1)
		go func() { rebuilt <- a.engine.Rebuild(context.Background(), "balances") }()
		<-emptied
		go func() {
			_, err := query.Get(context.Background(), b, balances, "ann", query.AtLeast(last))
			answered <- err
		}()
		time.Sleep(3 * time.Second)
		require.Empty(t, answered)
		close(goOn)
		require.NoError(t, <-answered)
		require.NoError(t, <-rebuilt)
		b.stop()
		a.stop()
	})
}

// What a view does not handle it contains, although its checkpoint is behind.
func TestAtLeast_EventsOfOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		owners := newOwners()
		a := start(t, owners)
		defer a.stop()
		a.put(t, "ann", opened{"Ann"})
		last := a.put(t, "ann", deposited{1})
		began := time.Now()
		got, err := query.Get(t.Context(), a, owners, "Ann", query.AtLeast(last))
		require.NoError(t, err)
		require.Equal(t, 1, got.Accounts)
		require.Zero(t, time.Since(began))
	})
}

func TestGet_TimesOutByName(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		balances := newBalances()
		a := start(t, balances)
		defer a.stop()
		receipt := a.put(t, "ann", opened{"Ann"})

		began := time.Now()
		_, err := query.Get(t.Context(), a, balances, "ann", query.AtLeast(receipt.Last+7))
		require.Equal(t, query.DefaultWithin, time.Since(began))
		require.ErrorIs(t, err, query.ErrTimeout)
		behind, ok := errors.AsType[*query.TimeoutError](err)
		require.True(t, ok)
		require.Equal(t, &query.TimeoutError{Projection: "balances", Wanted: 8, Reached: 1, Within: 5 * time.Second}, behind)

		began = time.Now()
		_, err = query.Get(t.Context(), a, balances, "ann", query.AtLeast(receipt.Last+7), query.Within(time.Minute))
		require.Equal(t, time.Minute, time.Since(began))
		require.ErrorContains(t, err, `read model "balances" is behind by 7 positions: wanted position 8, reached 1 within 1m0s`)

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = query.Get(ctx, a, balances, "ann", query.AtLeast(receipt.Last+7))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NotErrorIs(t, err, query.ErrTimeout, "the caller's own deadline is not the view's fault")
	})
}

func TestList(t *testing.T) {
	t.Parallel()
	balances := newBalances()
	a := start(t, balances)
	var last eventstore.Receipt
	for _, c := range []struct {
		id    string
		cents int64
	}{{"ann", 30}, {"bob", 10}, {"amy", 20}, {"cid", 20}, {"al", 5}} {
		last = a.put(t, c.id, opened{c.id}, deposited{c.cents})
	}
	byCents := query.OrderBy(func(x, y balance) int { return cmp.Compare(x.Cents, y.Cents) })
	rich := query.Where(func(_ string, b balance) bool { return b.Cents >= 20 })
	for _, c := range []struct {
		name    string
		options []query.ListOption
		want    []string
	}{
		{"all, by key", nil, []string{"al", "amy", "ann", "bob", "cid"}},
		{"backward", []query.ListOption{query.Backward()}, []string{"cid", "bob", "ann", "amy", "al"}},
		{"prefix", []query.ListOption{query.Prefix("a")}, []string{"al", "amy", "ann"}},
		{"prefix backward", []query.ListOption{query.Prefix("a"), query.Backward()}, []string{"ann", "amy", "al"}},
		{"where", []query.ListOption{rich}, []string{"amy", "ann", "cid"}},
		{"two wheres", []query.ListOption{rich, query.Where(func(key string, _ balance) bool { return key != "ann" })}, []string{"amy", "cid"}},
		{"ordered, ties by key", []query.ListOption{byCents}, []string{"al", "bob", "amy", "cid", "ann"}},
		{"ordered backward", []query.ListOption{byCents, query.Backward()}, []string{"ann", "cid", "amy", "bob", "al"}},
		{"ordered where", []query.ListOption{rich, byCents}, []string{"amy", "cid", "ann"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			whole, err := query.List(t.Context(), a, balances, append(c.options, query.AtLeast(last))...)
			require.NoError(t, err)
			require.Equal(t, c.want, keys(whole))
			require.Empty(t, whole.Next)

			var iterated []string
			for e, err := range query.All(t.Context(), a, balances, c.options...) {
				require.NoError(t, err)
				iterated = append(iterated, e.Key)
			}
			require.Equal(t, c.want, iterated)

			// Pages of any size put together are the whole list.
			for limit := 1; limit <= len(c.want)+1; limit++ {
				paged, next := []string{}, ""
				for pages := 1; ; pages++ {
					require.LessOrEqual(t, pages, len(c.want)+1, "the cursor does not advance")
					options := append([]query.ListOption{query.Limit(limit)}, c.options...)
					if next != "" {
						options = append(options, query.After(next))
					}
					page, err := query.List(t.Context(), a, balances, options...)
					require.NoError(t, err)
					require.LessOrEqual(t, len(page.Entries), limit)
					paged = append(paged, keys(page)...)
					if next = page.Next; next == "" {
						break
					}
				}
				require.Equal(t, c.want, paged, "in pages of %d", limit)
			}
		})
	}
}

func TestList_RefusesMistakes(t *testing.T) {
	t.Parallel()
	balances := newBalances()
	a := start(t, balances)
	first := a.put(t, "ann", opened{"Ann"}, deposited{5})
	last := a.put(t, "bob", opened{"Bob"}, deposited{5})
	require.Less(t, first.Last, last.Last)
	page, err := query.List(t.Context(), a, balances, query.Limit(1), query.AtLeast(last))
	require.NoError(t, err)
	require.NotEmpty(t, page.Next)

	for _, c := range []struct {
		option query.ListOption
		want   string
	}{
		{query.Limit(0), "limit 0"},
		{query.Where(func(string, owner) bool { return true }), "query.Where was given a func(string, query_test.owner) bool, but the view's rows are of type query_test.balance"},
		{query.OrderBy(func(_, _ owner) int { return 0 }), "query.OrderBy was given"},
		{query.After("%%"), `query.After("%%") is not the Next of a page`},
		{query.After("e30"), `is not the Next`},
	} {
		_, err := query.List(t.Context(), a, balances, c.option)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, c.want)
		for _, err := range query.All(t.Context(), a, balances, c.option) {
			require.ErrorContains(t, err, c.want)
		}
	}
	_, err = query.List(t.Context(), a, balances, query.After(page.Next), query.OrderBy(func(_, _ balance) int { return 0 }))
	require.ErrorContains(t, err, "without OrderBy")
}

func TestAll_StopsEarly(t *testing.T) {
	t.Parallel()
	balances := newBalances()
	a := start(t, balances)
	a.put(t, "ann", opened{"Ann"})
	last := a.put(t, "bob", opened{"Bob"})
	n := 0
	for _, err := range query.All(t.Context(), a, balances, query.AtLeast(last)) {
		require.NoError(t, err)
		n++
		break
	}
	require.Equal(t, 1, n)

	// The body may query and write.
	for e, err := range query.All(t.Context(), a, balances) {
		require.NoError(t, err)
		receipt := a.put(t, e.Key, deposited{1})
		got, err := query.Get(t.Context(), a, balances, e.Key, query.AtLeast(receipt))
		require.NoError(t, err)
		require.EqualValues(t, 1, got.Cents)
		require.Zero(t, e.Row.Cents)
	}
}

// What All yields is what List returns, also when it takes many reads.
func TestAll_ReadsInPages(t *testing.T) {
	t.Parallel()
	balances := newBalances()
	a := start(t, balances)
	var last eventstore.Receipt
	for i := range 1000 {
		last = a.put(t, fmt.Sprintf("%c%03d", 'a'+i%2, i), deposited{int64(i % 7)})
	}
	cut, err := query.List(t.Context(), a, balances, query.Limit(100), query.AtLeast(last))
	require.NoError(t, err)
	cutBackward, err := query.List(t.Context(), a, balances, query.Limit(100), query.Backward())
	require.NoError(t, err)
	byCents := query.OrderBy(func(x, y balance) int { return cmp.Compare(x.Cents, y.Cents) })
	cutOrdered, err := query.List(t.Context(), a, balances, query.Limit(100), byCents)
	require.NoError(t, err)
	rare := query.Where(func(key string, _ balance) bool { return key == "a002" || key == "b997" })
	for name, options := range map[string][]query.ListOption{
		"all":                  nil,
		"backward":             {query.Backward()},
		"prefix":               {query.Prefix("b")},
		"prefix backward":      {query.Prefix("a"), query.Backward()},
		"after":                {query.After(cut.Next)},
		"after backward":       {query.After(cutBackward.Next), query.Backward()},
		"limit":                {query.Limit(300)},
		"limit of a page":      {query.Limit(256)},
		"limit within a page":  {query.Limit(10), query.After(cut.Next)},
		"pages without a row":  {rare},
		"where, limit":         {rare, query.Limit(2)},
		"ordered":              {byCents},
		"ordered backward":     {byCents, query.Backward(), query.Prefix("a")},
		"ordered after":        {byCents, query.After(cutOrdered.Next), query.Limit(300)},
		"ordered where":        {byCents, rare},
		"nothing":              {query.Prefix("c")},
		"prefix, after, limit": {query.Prefix("a"), query.After(cut.Next), query.Limit(256)},
	} {
		t.Run(name, func(t *testing.T) {
			want, err := query.List(t.Context(), a, balances, options...)
			require.NoError(t, err)
			var got []query.Entry[balance]
			for e, err := range query.All(t.Context(), a, balances, options...) {
				require.NoError(t, err)
				got = append(got, e)
			}
			require.Equal(t, want.Entries, got)
		})
	}
	n := 0
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, err := range query.All(ctx, a, balances) {
		if n++; n == 300 {
			cancel()
		} else if n > 300 {
			require.ErrorIs(t, err, context.Canceled)
		}
	}
	require.Equal(t, 301, n, "the end of the context ends the loop with an error")
}

// A loop holds nothing while its body runs: more of them than the store has
// connections for views, each with a query in its body, do not wait for each
// other.
func TestAll_BodiesMayQuery(t *testing.T) {
	t.Parallel()
	store, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "events.db"))
	require.NoError(t, err)
	balances := newBalances()
	a := startOn(t, store, balances)
	last := a.put(t, "ann", opened{"Ann"})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	const loops = 40 // of 16 connections
	var loop, within sync.WaitGroup
	within.Add(loops)
	everybody := make(chan struct{})
	go func() { within.Wait(); close(everybody) }()
	problems := make(chan error, loops)
	for range loops {
		loop.Go(func() {
			entered := sync.OnceFunc(within.Done)
			defer entered()
			for e, err := range query.All(ctx, a, balances, query.AtLeast(last)) {
				if err != nil {
					problems <- err
					return
				}
				entered()
				select {
				case <-everybody:
				case <-ctx.Done():
					problems <- errors.New("the loops wait for each other")
					return
				}
				if _, err := query.Get(ctx, a, balances, e.Key); err != nil {
					problems <- err
				}
			}
		})
	}
	loop.Wait()
	<-everybody
	close(problems)
	for err := range problems {
		t.Error(err)
	}
}

// Within a handler All shows the handler's moment.
func TestAll_WithinAHandler(t *testing.T) {
	t.Parallel()
	balances := newBalances()
	a := start(t, balances)
	var last eventstore.Receipt
	for i := range 600 {
		last = a.put(t, fmt.Sprintf("%03d", i), deposited{1})
	}
	sum := query.Handle("sum", func(ctx context.Context, r query.Reader, _ struct{}) (int64, error) {
		var total int64
		for e, err := range query.All(ctx, r, balances) {
			if err != nil {
				return 0, err
			}
			if total += e.Row.Cents; e.Key == "000" {
				moved := a.put(t, "599", deposited{1})
				if _, err := query.Get(ctx, a, balances, "599", query.AtLeast(moved)); err != nil {
					return 0, err
				}
			}
		}
		return total, nil
	}, balances)
	got, err := query.Ask(t.Context(), a, sum, struct{}{}, query.AtLeast(last))
	require.NoError(t, err)
	require.EqualValues(t, 600, got)
	got, err = query.Ask(t.Context(), a, sum, struct{}{})
	require.NoError(t, err)
	require.EqualValues(t, 601, got)
}

// A handler sees all its views at one moment, however fast they move.
func TestAsk_OneSnapshot(t *testing.T) {
	t.Parallel()
	balances := newBalances()
	a := start(t, balances)
	a.put(t, "x", deposited{100})
	last := a.put(t, "y", deposited{-100})
	sum := query.Handle("sum", func(ctx context.Context, r query.Reader, ids []string) (int64, error) {
		var total int64
		for _, id := range ids {
			b, err := query.Get(ctx, r, balances, id)
			if err != nil {
				return 0, err
			}
			total += b.Cents
			if id == "x" {
				// Both move while the question is being answered.
				moved := a.put(t, "x", deposited{1})
				_, err := query.Get(ctx, a, balances, "x", query.AtLeast(moved))
				if err != nil {
					return 0, err
				}
			}
		}
		again, err := query.Get(ctx, r, balances, "x")
		return total + again.Cents - 100, err
	}, balances)
	got, err := query.Ask(t.Context(), a, sum, []string{"x", "y"}, query.AtLeast(last))
	require.NoError(t, err)
	require.Zero(t, got)
	moved, err := query.Get(t.Context(), a, balances, "x")
	require.NoError(t, err)
	require.EqualValues(t, 101, moved.Cents)
}

func TestAsk_RefusesMistakes(t *testing.T) {
	t.Parallel()
	balances, owners := newBalances(), newOwners()
	a := start(t, balances, owners)
	ask := func(uses []projection.Projection, answer func(ctx context.Context, r query.Reader, q string) (string, error)) error {
		_, err := query.Ask(t.Context(), a, query.Handle("question", answer, uses...), "?")
		return err
	}
	nothing := func(context.Context, query.Reader, string) (string, error) { return "", nil }

	err := ask(nil, nothing)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.ErrorContains(t, err, `query "question": invalid: it names no projection`)
	require.ErrorContains(t, ask([]projection.Projection{balances}, nil), "its function is nil")

	err = ask([]projection.Projection{balances}, func(ctx context.Context, r query.Reader, _ string) (string, error) {
		_, err := query.Get(ctx, r, owners, "Ann")
		return "", err
	})
	require.ErrorContains(t, err, `does not say that it reads projection "owners"`)

	err = ask([]projection.Projection{balances}, func(ctx context.Context, r query.Reader, _ string) (string, error) {
		_, err := query.Get(ctx, r, balances, "ann", query.AtLeast(eventstore.Position(1)))
		return "", err
	})
	require.ErrorContains(t, err, "query.AtLeast and query.Within belong to query.Ask")

	err = ask([]projection.Projection{newBalances()}, nothing)
	require.ErrorIs(t, err, projection.ErrNotRegistered)

	err = ask([]projection.Projection{balances}, func(ctx context.Context, r query.Reader, _ string) (string, error) {
		_, err := r.Query(ctx, "SELECT 1")
		return "", err
	})
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

func TestAsk_WithinAHandler(t *testing.T) {
	t.Parallel()
	owners := newOwners()
	a := start(t, owners)
	last := a.put(t, "x", opened{"Ann"})
	count := query.Handle("count", func(ctx context.Context, r query.Reader, name string) (int, error) {
		o, err := query.Get(ctx, r, owners, name)
		return o.Accounts, err
	}, owners)
	twice := query.Handle("twice", func(ctx context.Context, r query.Reader, name string) (int, error) {
		n, err := query.Ask(ctx, r, count, name)
		return 2 * n, err
	}, owners)
	got, err := query.Ask(t.Context(), a, twice, "Ann", query.AtLeast(last))
	require.NoError(t, err)
	require.Equal(t, 2, got)
}

// Reads that ask for a position get it while a version is built, when it becomes
// the active one, and when one goes back; and each by the rows that count.
func TestGet_AcrossVersions(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"memory", "sqlite"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var store backend = memory.New()
			if name == "sqlite" {
				var err error
				store, err = sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "events.db"))
				require.NoError(t, err)
			}
			v1 := newBalances()
			v2 := projection.View("balances", projection.On(func(b *balance, e deposited) { b.Owner, b.Cents = "v2", b.Cents+e.Cents })).Version(2)
			a := startOn(t, store, v1, v2)
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			ended, done := make(chan struct{}), make(chan error, 2)
			for _, v := range []*projection.ViewDefinition[balance]{v1, v2} {
				go func() {
					for cents := int64(1); ; cents++ {
						id := fmt.Sprintf("%s-%d", v.Name(), cents)
						receipt := a.put(t, id, deposited{cents})
						b, err := query.Get(ctx, a, v, id, query.AtLeast(receipt))
						if err == nil && b.Cents != cents {
							err = fmt.Errorf("%s has %d cents, not %d", id, b.Cents, cents)
						}
						select {
						case <-ended:
							done <- err
							return
						default:
						}
						if err != nil {
							done <- err
							return
						}
					}
				}()
			}
			for i, version := range []int{2, 1, 2, 1} {
				if i > 0 {
					require.NoError(t, a.Projections().Activate(ctx, "balances", version))
				}
				for active := 0; active != version; time.Sleep(time.Millisecond) {
					require.NoError(t, ctx.Err())
					all, err := a.Projections().Versions(ctx, "balances")
					require.NoError(t, err)
					for _, v := range all {
						if v.Active {
							active = v.Version
						}
					}
				}
				receipt := a.put(t, "mine", deposited{1})
				b, err := query.Get(ctx, a, v2, "mine", query.AtLeast(receipt))
				require.NoError(t, err)
				require.Equal(t, balance{Owner: map[int]string{2: "v2"}[version], Cents: int64(i + 1)}, b)
			}
			close(ended)
			require.NoError(t, errors.Join(<-done, <-done))
		})
	}
}
