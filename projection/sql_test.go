package projection_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

func openSQLite(t *testing.T) backend { return backends["sqlite"](t) }

// ledger keeps a line for every deposit: a handler that runs twice shows.
func ledger(handle func(e deposited, r eventstore.Recorded) error) *projection.SQLDefinition {
	return projection.SQL("ledger",
		projection.Setup("CREATE TABLE IF NOT EXISTS ledger (line INTEGER PRIMARY KEY, account TEXT NOT NULL, version INTEGER NOT NULL, cents INTEGER NOT NULL)"),
		projection.Reset("DELETE FROM ledger"),
		projection.OnSQL(func(ctx context.Context, tx projection.Tx, e deposited, r eventstore.Recorded) error {
			if _, err := tx.Exec(ctx, "INSERT INTO ledger (account, version, cents) VALUES ($1, $2, $3)", r.Stream.ID, int64(r.Version), e.Cents); err != nil {
				return err
			}
			if handle != nil {
				return handle(e, r)
			}
			return nil
		}))
}

type line struct {
	account string
	version uint64
	cents   int64
}

func lines(t testing.TB, state projection.State) []line {
	t.Helper()
	all := []line{}
	require.NoError(t, state.View(context.Background(), func(tx projection.StateTx) error {
		rows, err := tx.Query(context.Background(), "SELECT account, version, cents FROM ledger ORDER BY line")
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var l line
			if err := rows.Scan(&l.account, &l.version, &l.cents); err != nil {
				return err
			}
			all = append(all, l)
		}
		return rows.Err()
	}))
	return all
}

// deposits is what the ledger must be.
func deposits(t testing.TB, store eventstore.Store) []line {
	t.Helper()
	all := []line{}
	for r, err := range store.Read(context.Background(), eventstore.OfTypes("account.deposited"), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		var e deposited
		require.NoError(t, (*eventstore.Encoding)(nil).Decode(r, &e))
		all = append(all, line{r.Stream.ID, r.Version, e.Cents})
	}
	return all
}

func TestSQL_EveryEventOnce(t *testing.T) {
	t.Parallel()
	store := openSQLite(t)
	var updates atomic.Int64
	var healthy atomic.Bool
	state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
		n := updates.Add(1)
		if healthy.Load() {
			return store.Update(ctx, fn)
		}
		switch n % 5 {
		case 2:
			return store.Update(ctx, func(tx projection.StateTx) error { return errors.Join(fn(tx), errInjected) })
		case 4:
			return errors.Join(store.Update(ctx, fn), errInjected)
		}
		return store.Update(ctx, fn)
	}}
	r := start(t, store, state, projection.Options{SQLEvents: 3, RetryAfter: 1, RetryAtMost: 1}, ledger(nil))
	for i := range 40 {
		put(t, store, account(fmt.Sprint("a", i%3)), opened{"x"}, deposited{int64(i)}, deposited{1})
	}
	r.caughtUp(t, store, "ledger")
	require.Equal(t, deposits(t, store), lines(t, store))
	healthy.Store(true)
	require.NoError(t, r.Rebuild(t.Context(), "ledger"))
	require.Equal(t, deposits(t, store), lines(t, store), "after a rebuild")
	require.NoError(t, r.stop())
	require.Greater(t, updates.Load(), int64(40))
}

// One transaction takes neither too many events nor too long.
func TestSQL_TransactionsAreBounded(t *testing.T) {
	t.Parallel()
	// updates returns how many it takes to handle ten events that are there.
	updates := func(o projection.Options) int64 {
		store := openSQLite(t)
		for range 10 {
			put(t, store, account("ann"), deposited{1})
		}
		var n atomic.Int64
		state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			n.Add(1)
			return store.Update(ctx, fn)
		}}
		r := start(t, store, state, o, ledger(func(deposited, eventstore.Recorded) error {
			time.Sleep(time.Microsecond) // any time at all
			return nil
		}))
		r.caughtUp(t, store, "ledger")
		require.NoError(t, r.stop())
		require.Equal(t, deposits(t, store), lines(t, store))
		return n.Load()
	}
	whole := updates(projection.Options{SQLEvents: 1000, SQLTime: time.Hour})
	require.Equal(t, whole+2, updates(projection.Options{SQLEvents: 4, SQLTime: time.Hour}), "4, 4 and 2 events")
	require.Equal(t, whole+9, updates(projection.Options{SQLEvents: 1000, SQLTime: time.Nanosecond}), "a transaction that is over time ends with the event at hand")
}

func TestSQL_PoisonIsSetAside(t *testing.T) {
	t.Parallel()
	store := openSQLite(t)
	var ill atomic.Bool
	ill.Store(true)
	d := ledger(func(e deposited, _ eventstore.Recorded) error {
		if e.Cents == 13 && ill.Load() {
			return errors.New("unlucky")
		}
		if e.Cents == 14 && ill.Load() {
			panic("worse")
		}
		return nil
	})
	put(t, store, account("ann"), deposited{1}, deposited{13}, deposited{2})
	put(t, store, account("bob"), deposited{1}, deposited{14}, deposited{2})
	put(t, store, account("cid"), deposited{1}, deposited{2})
	r := start(t, store, store, projection.Options{Attempts: 2, RetryAfter: 1, RetryAtMost: 1}, d)
	r.caughtUp(t, store, "ledger")
	require.Equal(t, []line{{"ann", 1, 1}, {"bob", 1, 1}, {"cid", 1, 1}, {"cid", 2, 2}}, lines(t, store), "nothing of the failed ones remains")
	letters, err := r.DeadLetters(t.Context(), "ledger")
	require.NoError(t, err)
	require.Equal(t, []eventstore.Position{2, 3, 5, 6}, positions(letters))
	require.Equal(t, "unlucky", letters[0].Error)
	require.Equal(t, "handler panicked: worse", letters[2].Error)
	ill.Store(false)
	n, err := r.ReplayDeadLetters(t.Context(), "ledger")
	require.NoError(t, err)
	require.Equal(t, 4, n)
	require.Equal(t, []line{{"ann", 2, 13}, {"ann", 3, 2}, {"bob", 2, 14}, {"bob", 3, 2}}, lines(t, store)[4:])
	require.NoError(t, r.stop())
}

// failingTx is a transaction whose database fails, or refuses.
type failingTx struct {
	projection.StateTx
	exec  func() error
	query func() error
	rows  func() error
}

func (f failingTx) Exec(ctx context.Context, query string, args ...any) (int64, error) {
	if err := f.exec(); err != nil {
		return 0, err
	}
	return f.StateTx.Exec(ctx, query, args...)
}

func (f failingTx) Query(ctx context.Context, query string, args ...any) (projection.Rows, error) {
	if err := f.query(); err != nil {
		return nil, err
	}
	rows, err := f.StateTx.Query(ctx, query, args...)
	return failingRows{rows, f.rows()}, err
}

type failingRows struct {
	projection.Rows
	err error
}

func (f failingRows) Next() bool { return f.err == nil && f.Rows.Next() }
func (f failingRows) Err() error { return errors.Join(f.err, f.Rows.Err()) }

// A database that fails within a handler is tried again without limit, whatever
// the handler makes of the error; other errors are the event's.
func TestSQL_DatabaseFailsInAHandler(t *testing.T) {
	t.Parallel()
	full := fmt.Errorf("write: %w: no space left", projection.ErrUnavailable)
	type handler = func(ctx context.Context, tx projection.Tx) error
	exec := func(ctx context.Context, tx projection.Tx) error {
		_, err := tx.Exec(ctx, "INSERT INTO done VALUES (1)")
		return err
	}
	read := func(ctx context.Context, tx projection.Tx) error {
		rows, err := tx.Query(ctx, "SELECT n FROM done")
		if err != nil {
			return err
		}
		for rows.Next() {
		}
		return errors.Join(rows.Err(), rows.Close())
	}
	for name, c := range map[string]struct {
		handle            handler
		exec, query, rows error
		parked            bool
	}{
		"exec":           {handle: exec, exec: full},
		"query":          {handle: read, query: full},
		"rows":           {handle: read, rows: full},
		"another error":  {handle: func(ctx context.Context, tx projection.Tx) error { return errorText(exec(ctx, tx)) }, exec: full},
		"swallowed":      {handle: func(ctx context.Context, tx projection.Tx) error { _ = exec(ctx, tx); return nil }, exec: full},
		"panics":         {handle: func(ctx context.Context, tx projection.Tx) error { mustNot(exec(ctx, tx)); return nil }, exec: full},
		"event's, exec":  {handle: exec, exec: errors.New("constraint"), parked: true},
		"event's, query": {handle: read, query: errors.New("no such table"), parked: true},
		"event's, rows":  {handle: read, rows: errors.New("overflow"), parked: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := openSQLite(t)
			var within, failures atomic.Int64
			failing := func(err error) func() error {
				return func() error {
					if err == nil || within.Load() == 0 || failures.Add(1) > 20 {
						return nil
					}
					return err
				}
			}
			state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
				return store.Update(ctx, func(tx projection.StateTx) error {
					return fn(failingTx{tx, failing(c.exec), failing(c.query), failing(c.rows)})
				})
			}}
			d := projection.SQL("done",
				projection.Setup("CREATE TABLE IF NOT EXISTS done (n INTEGER)"),
				projection.OnSQL(func(ctx context.Context, tx projection.Tx, _ deposited, _ eventstore.Recorded) error {
					within.Add(1)
					defer within.Add(-1)
					return c.handle(ctx, tx)
				}))
			put(t, store, account("ann"), deposited{1})
			r := start(t, store, state, projection.Options{Attempts: 2, RetryAfter: 1, RetryAtMost: 1}, d)
			r.caughtUp(t, store, "done")
			letters, err := r.DeadLetters(t.Context(), "done")
			require.NoError(t, err)
			if c.parked {
				require.Len(t, letters, 1)
			} else {
				require.Empty(t, letters)
				require.EqualValues(t, 21, failures.Load())
			}
			require.NoError(t, r.stop())
		})
	}
}

func errorText(err error) error {
	if err == nil {
		return nil
	}
	return errors.New(err.Error())
}

func mustNot(err error) {
	if err != nil {
		panic(err)
	}
}

// A database that fails while the tables are made does not stop the projection.
func TestSQL_DatabaseFailsInSetup(t *testing.T) {
	t.Parallel()
	store := openSQLite(t)
	var failures atomic.Int64
	state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
		return store.Update(ctx, func(tx projection.StateTx) error {
			none := func() error { return nil }
			return fn(failingTx{tx, func() error {
				if failures.Add(1) > 3 {
					return nil
				}
				return projection.ErrUnavailable
			}, none, none})
		})
	}}
	put(t, store, account("ann"), deposited{1})
	r := start(t, store, state, projection.Options{RetryAfter: 1, RetryAtMost: 1}, ledger(nil))
	r.caughtUp(t, store, "ledger")
	require.Equal(t, deposits(t, store), lines(t, store))
	require.NoError(t, r.stop())
}

// A handler that changes its event gets it as it was stored when it is called again.
func TestSQL_RetryBeginsWithTheStoredEvent(t *testing.T) {
	t.Parallel()
	store := openSQLite(t)
	var calls atomic.Int64
	var got []int // by the worker alone, read when it has caught up
	d := projection.SQL("orders", projection.OnSQL(func(_ context.Context, _ projection.Tx, e ordered, _ eventstore.Recorded) error {
		got = append(got, e.Lines[0])
		e.Lines[0]++
		if calls.Add(1) < 3 {
			return errors.New("not yet")
		}
		return nil
	}))
	put(t, store, account("ann"), ordered{[]int{1}})
	r := start(t, store, store, projection.Options{RetryAfter: 1, RetryAtMost: 1}, d)
	r.caughtUp(t, store, "orders")
	require.NoError(t, r.stop())
	require.Equal(t, []int{1, 1, 1}, got)
}

func TestSQL_RebuildNeedsReset(t *testing.T) {
	t.Parallel()
	store := openSQLite(t)
	d := projection.SQL("bare", projection.OnSQL(func(context.Context, projection.Tx, deposited, eventstore.Recorded) error { return nil }))
	put(t, store, account("ann"), deposited{1})
	r := start(t, store, store, projection.Options{}, d)
	r.caughtUp(t, store, "bare")
	err := r.Rebuild(t.Context(), "bare")
	require.ErrorContains(t, err, `rebuild projection "bare": it does not say how to empty its tables: add projection.Reset`)
	reached, err := r.Reached("bare")
	require.NoError(t, err)
	require.EqualValues(t, 1, reached, "the refused rebuild changed nothing")
	put(t, store, account("ann"), deposited{1})
	r.caughtUp(t, store, "bare")
	require.NoError(t, r.stop())
}

func TestSQL_StopsWhereItCannotWork(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	r := start(t, store, store, projection.Options{}, ledger(nil))
	err := r.WaitFor(t.Context(), "ledger", 1)
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, `projection "ledger": cannot prepare its tables: its store must have SQL`)

	lite := openSQLite(t)
	wrong := start(t, lite, lite, projection.Options{}, projection.SQL("wrong", projection.Setup("CREATE TABEL x"), projection.OnSQL(
		func(context.Context, projection.Tx, deposited, eventstore.Recorded) error { return nil })))
	err = wrong.WaitFor(t.Context(), "wrong", 1)
	require.ErrorIs(t, err, projection.ErrStopped)
	require.ErrorContains(t, err, `set up tables with "CREATE TABEL x"`)
}

// A handler's transaction is for SQL alone: the engine's own tables are out of reach.
func TestSQL_HandlersGetSQLOnly(t *testing.T) {
	t.Parallel()
	store := openSQLite(t)
	put(t, store, account("ann"), deposited{1})
	var isState atomic.Bool
	r := start(t, store, store, projection.Options{}, projection.SQL("x", projection.OnSQL(
		func(_ context.Context, tx projection.Tx, _ deposited, _ eventstore.Recorded) error {
			_, ok := tx.(projection.StateTx)
			isState.Store(ok)
			return nil
		})))
	r.caughtUp(t, store, "x")
	require.False(t, isState.Load())
	require.NoError(t, r.stop())
}

// A request that fails after it has taken effect does not leave the worker
// with a wrong idea of where it is.
func TestRebuild_OutcomeUnknown(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		var ill atomic.Bool
		state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			err := store.Update(ctx, fn)
			if ill.CompareAndSwap(true, false) {
				return errors.Join(err, errInjected)
			}
			return err
		}}
		view := balances()
		put(t, store, account("ann"), opened{"Ann"}, deposited{1})
		r := start(t, store, state, projection.Options{}, view)
		r.caughtUp(t, store, "balances")
		ill.Store(true)
		require.ErrorIs(t, r.Rebuild(t.Context(), "balances"), errInjected)
		put(t, store, account("ann"), deposited{2})
		r.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		require.NoError(t, r.stop())
	})
}
