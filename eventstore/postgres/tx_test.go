package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

func begin(t testing.TB, conn *pgx.Conn) pgx.Tx {
	t.Helper()
	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) })
	return tx
}

// Events and the rows of the user are committed together, and rolled back
// together: then they leave no hole.
func TestStore_AppendTx(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s, other := openURL(t, url), openURL(t, url)
	mine, theirs := watch(t, s), watch(t, other)
	conn, outside := direct(t, url), direct(t, url)
	do(t, conn, "CREATE TABLE orders (id int PRIMARY KEY)")
	var a audit
	ordered := under(commit(event(account("ann"), "ordered", "order:1"), event(account("bob"), "was told"), event(account("ann"), "paid")), at(account("ann"), 0))

	tx := begin(t, conn)
	_, err := tx.Exec(t.Context(), "INSERT INTO orders VALUES (1)")
	require.NoError(t, err)
	r, err := s.AppendTx(t.Context(), tx, ordered)
	require.NoError(t, err)
	require.EqualValues(t, 3, r.Last)
	require.Equal(t, 3, scalarTx[int](t, tx, "SELECT count(*) FROM deed.events"), "the transaction itself sees its events")
	head, err := s.Head(t.Context())
	require.NoError(t, err)
	require.Zero(t, head, "nobody else sees them yet")
	require.NoError(t, tx.Rollback(t.Context()))
	a.note(ordered, r, errors.New("rolled back"))
	require.Zero(t, scalar[int](t, outside, "SELECT count(*) FROM orders"))

	again := ordered
	again.Events = nil
	for _, e := range ordered.Events {
		e.ID = newID()
		again.Events = append(again.Events, e)
	}
	tx = begin(t, conn)
	_, err = tx.Exec(t.Context(), "INSERT INTO orders VALUES (2)")
	require.NoError(t, err)
	r, err = s.AppendTx(t.Context(), tx, again)
	a.note(again, r, err)
	require.NoError(t, err)
	require.EqualValues(t, 1, r.First, "what was rolled back has left no hole")
	require.NoError(t, tx.Commit(t.Context()))
	require.Equal(t, 1, scalar[int](t, outside, "SELECT count(*) FROM orders"))
	mine.at(3)
	theirs.at(3)
	_, err = a.append(t.Context(), s, under(commit(event(account("ann"), "went on")), eventstore.StreamAt(account("ann"), r.Revision(account("ann")))))
	require.NoError(t, err)
	a.check(t, outside, "deed")
}

func scalarTx[T any](t testing.TB, tx pgx.Tx, sql string, args ...any) T {
	t.Helper()
	var v T
	require.NoError(t, tx.QueryRow(t.Context(), sql, args...).Scan(&v))
	return v
}

// A commit that fails leaves the transaction as it was, and gives the lock
// back: others append while it is still open.
func TestStore_AppendTx_Refused(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s, other := openURL(t, url), openURL(t, url)
	first := commit(event(account("ann"), "opened"))
	first.Key = "key"
	before := mustAppend(t, s, first)
	conn := direct(t, url)
	do(t, conn, "CREATE TABLE orders (id int PRIMARY KEY)")
	tx := begin(t, conn)
	_, err := tx.Exec(t.Context(), "INSERT INTO orders VALUES (1)")
	require.NoError(t, err)

	duplicate, reused := commit(event(account("ann"), "opened")), commit(event(account("ann"), "closed"))
	duplicate.Key, reused.Key = "key", "key"
	cases := []struct {
		name   string
		commit eventstore.Commit
		want   error
	}{
		{"stream conflict", under(commit(event(account("ann"), "again")), at(account("ann"), 0)), eventstore.ErrConflict},
		{"stream that must exist", under(commit(event(account("bob"), "again")), eventstore.StreamExists(account("nobody"))), eventstore.ErrConflict},
		{"query conflict", under(commit(event(account("bob"), "again")), eventstore.NoneMatch(eventstore.OfTypes("opened"), 0)), eventstore.ErrConflict},
		{"query conflict, by reading", under(commit(event(account("bob"), "again")), eventstore.NoneMatch(eventstore.Match(eventstore.Item{Stream: account("ann"), Types: []string{"opened"}}), 0)), eventstore.ErrConflict},
		{"duplicate", duplicate, nil},
		{"key reused", reused, eventstore.ErrKeyReused},
		{"nothing in it", eventstore.Commit{}, eventstore.ErrInvalid},
	}
	for _, c := range cases {
		r, err := s.AppendTx(t.Context(), tx, c.commit)
		if c.want != nil {
			require.ErrorIs(t, err, c.want, c.name)
		} else {
			require.NoError(t, err, c.name)
			require.True(t, r.Duplicate, c.name)
			require.Equal(t, before.Last, r.Last, c.name)
		}
		// The lock is free: another process appends while the transaction is open.
		mustAppend(t, other, commit(event(account("other"), c.name)))
		require.Equal(t, 1, scalarTx[int](t, tx, "SELECT count(*) FROM orders"), "the transaction can be used after: %s", c.name)
	}
	r, err := s.AppendTx(t.Context(), tx, commit(event(account("ann"), "went on")))
	require.NoError(t, err)
	require.EqualValues(t, 2, r.Revision(account("ann")).Version)
	require.NoError(t, tx.Commit(t.Context()))
	require.Len(t, readAll(t, s, eventstore.All()), 2+len(cases))
}

// Transactions that could not keep the promise are refused before anything is
// done.
func TestStore_AppendTx_WrongTransaction(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s := openURL(t, url)
	c := commit(event(account("ann"), "opened"))
	for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		tx, err := direct(t, url).BeginTx(t.Context(), pgx.TxOptions{IsoLevel: level})
		require.NoError(t, err)
		_, err = s.AppendTx(t.Context(), tx, c)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "ReadCommitted", "it says what to do")
		require.NoError(t, tx.Commit(t.Context()), "the transaction can be used")
	}
	elsewhere := pgtest.Database(t)
	tx := begin(t, direct(t, elsewhere))
	_, err := s.AppendTx(t.Context(), tx, c)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.ErrorContains(t, err, "another database")
	require.NoError(t, tx.Rollback(t.Context()))

	openURL(t, elsewhere)
	tx = begin(t, direct(t, elsewhere))
	_, err = s.AppendTx(t.Context(), tx, c)
	require.ErrorIs(t, err, eventstore.ErrInvalid, "there is a log, but another one")

	ended := begin(t, direct(t, url))
	require.NoError(t, ended.Commit(t.Context()))
	_, err = s.AppendTx(t.Context(), ended, c)
	require.ErrorIs(t, err, pgx.ErrTxClosed)
	require.Empty(t, readAll(t, s, eventstore.All()))

	require.NoError(t, s.Close())
	_, err = s.AppendTx(t.Context(), begin(t, direct(t, url)), c)
	require.ErrorIs(t, err, eventstore.ErrClosed)
}

// The transaction has the lock until it ends. Others wait for it and then go
// on; what they had decided is judged on what it has written.
func TestStore_AppendTx_OthersWait(t *testing.T) {
	t.Parallel()
	for _, ends := range []string{"commit", "rollback", "rollback to a savepoint"} {
		t.Run(ends, func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			var stores []*Store
			for _, f := range forms {
				stores = append(stores, openURL(t, url, always(f)))
			}
			mustAppend(t, stores[0], commit(event(account("ann"), "opened")))
			for _, s := range stores {
				mustAppend(t, s, commit(event(account("warm"), "noted")))
			}
			conn, control := direct(t, url), direct(t, url)
			tx := begin(t, conn)
			within, err := tx.Begin(t.Context())
			require.NoError(t, err)
			_, err = stores[0].AppendTx(t.Context(), within, under(commit(event(account("ann"), "decided"), event(account("bob"), "opened")), at(account("ann"), 1)))
			require.NoError(t, err)
			type answer struct {
				conditional bool
				err         error
			}
			answers := make(chan answer, 2*len(stores))
			for i, s := range stores {
				go func() {
					_, err := s.Append(t.Context(), under(commit(event(account("ann"), fmt.Sprint("decided by ", i))), at(account("ann"), 1)))
					answers <- answer{true, err}
				}()
				go func() {
					_, err := s.Append(t.Context(), commit(event(account("free"), "noted")))
					answers <- answer{false, err}
				}()
			}
			// Meanwhile the transaction does something: one that is idle for as long as a
			// slow machine may need would be ended.
			busy := make(chan error, 1)
			do(t, control, "SELECT pg_advisory_lock(7, 7)")
			go func() {
				_, err := tx.Exec(t.Context(), "SELECT pg_advisory_xact_lock(7, 7)")
				busy <- err
			}()
			eventually(t, func() bool { log, held := waiters(t, control, stores[0]); return log == len(stores) && held == 1 }, "not everybody waits for the lock")
			require.Empty(t, answers)
			do(t, control, "SELECT pg_advisory_unlock(7, 7)")
			require.NoError(t, <-busy)
			won := 1
			switch ends {
			case "commit":
				require.NoError(t, within.Commit(t.Context()))
				require.NoError(t, tx.Commit(t.Context()))
			case "rollback":
				won = 0
				require.NoError(t, tx.Rollback(t.Context()))
			default:
				won = 0
				require.NoError(t, within.Rollback(t.Context()))
			}
			for range cap(answers) {
				a := <-answers
				if a.err == nil && a.conditional {
					won++
				}
				if !a.conditional {
					require.NoError(t, a.err)
				} else if a.err != nil {
					require.ErrorIs(t, a.err, eventstore.ErrConflict)
				}
			}
			require.Equal(t, 1, won, "of those who had the same expectation one wins")
		})
	}
}

// AppendTx and Append on the same streams, from several processes, with
// expectations that each of them takes from its own receipts: what one process
// knows by heart is never taken for what the log says.
func TestStore_AppendTx_BesideAppend(t *testing.T) {
	t.Parallel()
	for _, f := range []form{0, formCopy, formFunction, formTwoTrips} {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			var options []Option
			if f != 0 {
				options = append(options, always(f))
			}
			stores := []*Store{openURL(t, url, options...), openURL(t, url, options...)}
			pools := []*pgxpool.Pool{pool(t, url, nil), pool(t, url, nil)}
			spies := []*spy{watch(t, stores[0]), watch(t, stores[1])}
			var a audit
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			failed := make([]error, 8)
			together(len(failed), func(i int) {
				s, p := stores[i%2], pools[i%2]
				r := rand.New(rand.NewPCG(seed, uint64(i)))
				known := map[eventstore.Stream]eventstore.Revision{}
				for n := range pick(200, 40) {
					on := account(fmt.Sprint(r.IntN(3)))
					c := under(commit(event(on, "counted", "n:"+fmt.Sprint(n%5)), event(account("free"), "noted")), eventstore.StreamAt(on, known[on]))
					switch r.IntN(4) {
					case 0:
						c.Key, c.Fingerprint = fmt.Sprint("key ", n), "the same"
					case 1:
						c.Conditions = append(c.Conditions, eventstore.NoneMatch(eventstore.Tagged("n:"+fmt.Sprint(n%5)), known[on].Position))
					}
					var receipt eventstore.Receipt
					var err error
					if r.IntN(2) == 0 {
						receipt, err = a.append(t.Context(), s, c)
					} else {
						rolledBack := errors.New("rolled back")
						err = pgx.BeginFunc(t.Context(), p, func(tx pgx.Tx) (err error) {
							if receipt, err = s.AppendTx(t.Context(), tx, c); err == nil && r.IntN(4) == 0 {
								err = rolledBack
							}
							return err
						})
						a.note(c, receipt, err)
						if errors.Is(err, rolledBack) {
							continue
						}
					}
					conflict, lost := errors.AsType[*eventstore.ConflictError](err)
					switch {
					case err == nil && !receipt.Duplicate:
						known[on] = receipt.Revision(on)
					case lost && conflict.Kind == eventstore.ConditionStreamAt:
						known[on] = conflict.Actual
					case lost:
						known[on] = eventstore.Revision{Version: known[on].Version, Position: known[on].Position}
						for e, err := range s.Read(t.Context(), eventstore.OneStream(on), eventstore.ReadOptions{Backward: true, Limit: 1}) {
							if err == nil {
								known[on] = e.Revision()
							}
						}
					case errors.Is(err, eventstore.ErrUnavailable):
						// It waited for the lock for too long, where the machine is slow.
					case err != nil:
						failed[i] = err
						return
					}
				}
			})
			require.NoError(t, errors.Join(failed...))
			conn := direct(t, url)
			a.check(t, conn, "deed")
			for _, spy := range spies {
				spy.at(scalar[eventstore.Position](t, conn, "SELECT max(position) FROM deed.events"))
			}
		})
	}
}

// Other processes are told of the transaction's events, which nobody sees being
// committed, whether or not anybody here wants to know.
func TestStore_AppendTx_IsTold(t *testing.T) {
	t.Parallel()
	for _, followed := range []bool{false, true} {
		t.Run(fmt.Sprint("followed ", followed), func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			s := openURL(t, url)
			if followed {
				watch(t, s).at(0)
			}
			conn, listener := direct(t, url), direct(t, url)
			do(t, listener, "LISTEN "+pgx.Identifier{s.channel()}.Sanitize())
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for n := range 5 {
				tx := begin(t, conn)
				r, err := s.AppendTx(t.Context(), tx, commit(event(account("ann"), fmt.Sprint(n))))
				require.NoError(t, err)
				if n == 3 {
					// One that is rolled back is looked for in vain, and does not keep the next one back.
					require.NoError(t, tx.Rollback(t.Context()))
					continue
				}
				require.NoError(t, tx.Commit(t.Context()))
				for told := ""; told != fmt.Sprint(r.Last); { // an earlier one comes again when its answer was lost
					n, err := listener.WaitForNotification(ctx)
					require.NoError(t, err, "nobody was told")
					told = n.Payload
				}
			}
		})
	}
}

// What a transaction will have written is looked for soon, then less often, and not
// for ever.
func TestLookout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var l lookout
		require.False(t, l.begin(0, 0), "nothing is awaited")
		require.Equal(t, time.Second, l.within(time.Second))
		require.False(t, l.looked(7))
		require.True(t, l.begin(1, 9))
		require.False(t, l.begin(1, 9))
		require.True(t, l.looked(7), "nobody was told of what was there")
		for _, want := range []time.Duration{10, 20, 40, 80, 100, 100} {
			require.Equal(t, want*time.Millisecond, l.within(time.Second))
			require.Equal(t, time.Millisecond, l.within(time.Millisecond))
			require.False(t, l.looked(7))
		}
		require.True(t, l.begin(2, 8), "the first one was rolled back")
		require.False(t, l.begin(3, 8), "it is about to look: those who come all the time do not keep it from that")
		require.True(t, l.looked(8))
		require.False(t, l.looked(9), "it is over")
		require.True(t, l.begin(4, 8), "it was rolled back and is written again")
		time.Sleep(mostAwaited + 1)
		require.False(t, l.looked(8))
		require.True(t, l.begin(5, 12))
		time.Sleep(mostAwaited + 1)
		require.True(t, l.looked(10))
		require.Equal(t, time.Hour, l.within(time.Hour), "it was not given up")
	})
}

// Subscribers of this process and of others get the transaction's events.
func TestStore_AppendTx_IsSeen(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s, other := openURL(t, url), openURL(t, url)
	spies := []*spy{watch(t, s), watch(t, other)}
	conn := direct(t, url)
	var slowest time.Duration
	for n := range 20 {
		tx := begin(t, conn)
		r, err := s.AppendTx(t.Context(), tx, commit(event(account("ann"), fmt.Sprint(n))))
		require.NoError(t, err)
		began := time.Now()
		require.NoError(t, tx.Commit(t.Context()))
		for _, spy := range spies {
			spy.at(r.Last)
		}
		slowest = max(slowest, time.Since(began))
	}
	t.Logf("seen after %s at most", slowest)
	require.Less(t, slowest, 5*time.Second)
}

// Logs in several schemas can be appended to in one transaction, over one
// connection.
func TestStore_AppendTx_SeveralLogs(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	a, b := openURL(t, url, Schema("one")), openURL(t, url, Schema("two"))
	conn := direct(t, url)
	for n := range 3 {
		tx := begin(t, conn)
		for _, s := range []*Store{a, b} {
			r, err := s.AppendTx(t.Context(), tx, commit(event(account("ann"), "noted")))
			require.NoError(t, err)
			require.EqualValues(t, n+1, r.Last)
		}
		require.NoError(t, tx.Commit(t.Context()))
	}
}

// What is written in a transaction can be as large as any commit, and have all
// that a commit can have.
func TestStore_AppendTx_Large(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s := openURL(t, url)
	fill(t, s, 1200)
	var c eventstore.Commit
	for n := range 1000 {
		e := event(account(fmt.Sprint(n%7)), fmt.Sprint("type ", n%13), "a:"+fmt.Sprint(n%5), "b", "c:"+strings.Repeat("é", 50))
		e.Data, e.Metadata = []byte{0, 1, 2, 0xff, '\n'}, eventstore.Metadata{Actor: "a\nb\x00", Extra: map[string]string{"k": "\u2028"}}
		c.Events = append(c.Events, e)
	}
	c.Key = "key"
	c = under(c, eventstore.NoneMatch(eventstore.Tagged("b"), 0), eventstore.NoneMatch(eventstore.Match(eventstore.Item{Category: "account", Slices: eventstore.SliceRange{From: 0, To: 1024}}), 0))
	var r eventstore.Receipt
	require.NoError(t, pgx.BeginFunc(t.Context(), direct(t, url), func(tx pgx.Tx) (err error) {
		r, err = s.AppendTx(t.Context(), tx, c)
		return err
	}))
	got := readAll(t, s, eventstore.OneCategory("account"))
	require.Len(t, got, 1000)
	for i, e := range got {
		require.Equal(t, c.Events[i].Data, e.Data)
		require.Equal(t, c.Events[i].Metadata, e.Metadata)
		require.Equal(t, c.Events[i].Tags, e.Tags)
		require.Equal(t, c.Events[i].ID, e.ID)
	}
	again, err := s.Append(t.Context(), c)
	require.NoError(t, err)
	r.Duplicate = true
	require.Equal(t, r, again)
}
