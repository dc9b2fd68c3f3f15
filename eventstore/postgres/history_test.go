package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
)

// The tests of this file repeat what has gone wrong in other event stores on
// PostgreSQL, each with the mishap held open on purpose.

// holdInserts makes inserts of events wait, inside of their transaction, while
// the test has the advisory lock: those of streams whose names begin so.
func holdInserts(t testing.TB, conn *pgx.Conn, prefix string) (release func()) {
	t.Helper()
	do(t, conn, `CREATE FUNCTION public.wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF starts_with(NEW.stream, '`+prefix+`') THEN PERFORM set_config('lock_timeout', '0', true); PERFORM pg_advisory_xact_lock_shared(7, 7); END IF; RETURN NEW;
		END $$`)
	do(t, conn, "CREATE TRIGGER wait AFTER INSERT ON deed.events FOR EACH ROW EXECUTE FUNCTION public.wait()")
	do(t, conn, "SELECT pg_advisory_lock(7, 7)")
	return func() { do(t, conn, "SELECT pg_advisory_unlock(7, 7)") }
}

// waiters counts the sessions that wait for the log's lock, or for holdInserts.
func waiters(t testing.TB, conn *pgx.Conn, s *Store) (log, held int) {
	t.Helper()
	require.NoError(t, conn.QueryRow(t.Context(), `SELECT count(*) FILTER (WHERE objsubid = 1 AND (classid::bigint << 32 | objid::bigint) = $1), count(*) FILTER (WHERE objsubid = 2)
		FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`, s.lock).Scan(&log, &held))
	return log, held
}

// A position that becomes visible before a lower one is lost to whoever has
// read in between (Marten, Axon, Eventuous and others). Here the fast writer
// waits for the slow one, and nobody sees anything until then.
func TestHistory_PositionsAreVisibleInOrder(t *testing.T) {
	t.Parallel()
	other := eventstore.Stream{Category: "invoice", ID: "fast"} // locks per category let it pass (message-db)
	for _, slow := range forms {
		for _, fast := range forms {
			t.Run(fmt.Sprintf("%s_before_%s", slow, fast), func(t *testing.T) {
				t.Parallel()
				url := pgtest.Database(t)
				s, f := openURL(t, url, always(slow)), openURL(t, url, always(fast))
				seen := []*spy{watch(t, s), watch(t, f), watch(t, openURL(t, url, Tail(1, 1)))}
				mustAppend(t, s, commit(event(account("slow"), "noted"), event(other, "noted")))
				mustAppend(t, f, commit(event(account("warm"), "noted")))
				conn, holder := direct(t, url), direct(t, url)
				release := holdInserts(t, holder, "account-slow")
				answers := make(chan error, 2)
				go func() {
					_, err := s.Append(t.Context(), commit(event(account("slow"), "noted")))
					answers <- err
				}()
				eventually(t, func() bool { _, held := waiters(t, conn, s); return held == 1 }, "the slow writer is not held")
				go func() {
					_, err := f.Append(t.Context(), commit(event(other, "noted")))
					answers <- err
				}()
				eventually(t, func() bool { log, _ := waiters(t, conn, s); return log == 1 }, "the fast writer does not wait")
				require.Len(t, readAll(t, f, eventstore.All()), 3)
				require.Empty(t, answers)
				release()
				require.NoError(t, errors.Join(<-answers, <-answers))
				got := readAll(t, f, eventstore.All())
				require.Equal(t, []eventstore.Stream{account("slow"), other}, []eventstore.Stream{got[3].Stream, got[4].Stream})
				for _, spy := range seen {
					spy.at(5)
				}
			})
		}
	}
}

// A clock that decides what comes after what loses the events of whoever is behind
// (goes keeps the time of the newest event as its progress). Here one process is an hour
// ahead of the other, and positions alone count.
func TestHistory_ClocksThatDisagree(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	var stores []*Store
	for _, off := range []time.Duration{time.Hour, -time.Hour} {
		stores = append(stores, openURL(t, url, Now(func() time.Time { return time.Now().Add(off) })))
	}
	spies := []*spy{watch(t, stores[0]), watch(t, stores[1])}
	const commits = 10
	for n := range commits {
		r := mustAppend(t, stores[n%2], commit(event(account("ann"), "noted")))
		require.EqualValues(t, n+1, r.First)
		for _, spy := range spies {
			spy.at(r.Last)
		}
	}
	all := readAll(t, stores[0], eventstore.All())
	require.Len(t, all, commits)
	earlier := 0
	for n := range all[1:] {
		if all[n+1].Time.Before(all[n].Time) {
			earlier++
		}
		// Whoever has come so far goes on with exactly the rest.
		var rest []eventstore.Recorded
		for e, err := range stores[n%2].Read(t.Context(), eventstore.All(), eventstore.ReadOptions{After: all[n].Position}) {
			require.NoError(t, err)
			rest = append(rest, e)
		}
		require.Equal(t, all[n+1:], rest)
	}
	require.Equal(t, commits/2, earlier, "the clocks do not disagree")
}

// Readers behind a horizon of transaction ids stand still while any other
// transaction of the server is open, in whatever database (Emmett, sliceworkz).
func TestHistory_OthersTransactionsHoldNobodyUp(t *testing.T) {
	t.Parallel()
	url, elsewhere := pgtest.Database(t), pgtest.Database(t)
	a, b := openURL(t, url), openURL(t, url)
	spies := []*spy{watch(t, a), watch(t, b)}
	for _, place := range []string{url, elsewhere} {
		for _, level := range []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.Serializable} {
			conn := direct(t, place)
			do(t, conn, "CREATE TABLE IF NOT EXISTS unrelated (x int)")
			tx, err := conn.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: level})
			require.NoError(t, err)
			_, err = tx.Exec(t.Context(), "INSERT INTO unrelated VALUES (1)") // it has a transaction id
			require.NoError(t, err)
			t.Cleanup(func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) })
		}
	}
	before := mustAppend(t, a, commit(event(account("ann"), "opened")))
	for n := range 20 {
		r := mustAppend(t, []*Store{a, b}[n%2], under(commit(event(account("ann"), "noted")), at(account("ann"), uint64(n+1))))
		for _, spy := range spies {
			spy.at(r.Last)
		}
	}
	// Whoever loses can read what has won: the check sees nothing that reads do not.
	for _, s := range []*Store{a, b} {
		_, err := s.Append(t.Context(), under(commit(event(account("ann"), "late")), eventstore.StreamAt(account("ann"), before.Revision(account("ann")))))
		conflict, ok := errors.AsType[*eventstore.ConflictError](err)
		require.True(t, ok, err)
		got := readAll(t, s, eventstore.OneStream(account("ann")))
		require.Equal(t, conflict.Actual, got[len(got)-1].Revision())
		_, err = s.Append(t.Context(), under(commit(event(account("bob"), "late")), eventstore.NoneMatch(eventstore.OfTypes("noted"), 3)))
		conflict, ok = errors.AsType[*eventstore.ConflictError](err)
		require.True(t, ok, err)
		require.Equal(t, conflict.Found, readAll(t, s, eventstore.OfTypes("noted"))[2].Position)
	}
}

// Sequences burn numbers on every rollback and conflict, and readers stop at
// the holes. Here there are none.
func TestHistory_NothingIsBurnt(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			b := newBed(t, pgtest.Database(t), f)
			conn := direct(t, b.url)
			b.round()
			do(t, conn, `CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				IF NEW.stream = 'account-refused' THEN RAISE EXCEPTION 'this one is refused'; END IF; RETURN NEW; END $$`)
			do(t, conn, "CREATE TRIGGER refuse BEFORE INSERT ON deed.events FOR EACH ROW EXECUTE FUNCTION public.refuse()")
			for range 3 {
				// One that the database refuses fails alone, and so does one that conflicts.
				_, failed := b.batch(
					commit(event(account("fine"), "noted")),
					commit(event(account("before"), "noted"), event(account("refused"), "noted"), event(account("after"), "noted")),
					under(commit(event(account("fine"), "noted")), at(account("fine"), 1000)),
					commit(event(account("fine, too"), "noted")),
				)
				require.NoError(t, failed[0])
				require.ErrorContains(t, failed[1], "this one is refused")
				require.ErrorContains(t, failed[1], "nothing was written")
				require.False(t, eventstore.CanRetry(failed[1]), "it is refused for good: %v", failed[1])
				require.ErrorIs(t, failed[2], eventstore.ErrConflict)
				require.NoError(t, failed[3])
			}
			b.check()
		})
	}
}

// Two who have read the same and decide on it cannot both win, whatever their
// condition is about: a stream, a tag, a type, or everything, where a check by
// counters of what is named has nothing to count (Marten, Occurrent, sliceworkz).
func TestHistory_OfTwoRacersOneWins(t *testing.T) {
	t.Parallel()
	ann := account("ann")
	queries := map[string]eventstore.Query{
		"everything":      eventstore.All(),
		"tag":             eventstore.Tagged("course:1"),
		"two tags":        eventstore.Tagged("course:1", "student:1"),
		"type":            eventstore.OfTypes("subscribed", "other"),
		"category":        eventstore.OneCategory("account"),
		"stream":          eventstore.OneStream(ann),
		"stream and type": eventstore.Match(eventstore.Item{Stream: ann, Types: []string{"subscribed"}}),
		"tag and type":    eventstore.Match(eventstore.Item{Tags: []string{"student:1"}, Types: []string{"subscribed"}, Category: "account"}),
		"slices":          eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: ann.Slice(), To: ann.Slice() + 1}}),
		"several items":   eventstore.Match(eventstore.Item{Tags: []string{"nobody"}}, eventstore.Item{Tags: []string{"course:1"}, Slices: eventstore.SliceRange{To: eventstore.Slices}}, eventstore.Item{Types: []string{"none"}}),
	}
	elsewhere := map[string]bool{"everything": true, "tag": true, "two tags": true, "type": true, "category": true, "tag and type": true, "several items": true}
	conditions := map[string]func(head eventstore.Recorded) eventstore.Condition{
		"version": func(head eventstore.Recorded) eventstore.Condition {
			return at(ann, head.Version)
		},
		"revision": func(head eventstore.Recorded) eventstore.Condition {
			return eventstore.StreamAt(ann, head.Revision())
		},
		"last event": func(head eventstore.Recorded) eventstore.Condition {
			if head.Version == 0 {
				return at(ann, 0)
			}
			return eventstore.StreamAtEvent(ann, head.Version, head.ID)
		},
	}
	for name, q := range queries {
		conditions[name] = func(head eventstore.Recorded) eventstore.Condition { return eventstore.NoneMatch(q, head.Position) }
	}
	for _, f := range []form{0, formCopy, formFunction, formTwoTrips} {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			var options []Option
			if f != 0 {
				options = append(options, always(f))
			}
			stores := []*Store{openURL(t, url, options...), openURL(t, url, options...)}
			conn, holder := direct(t, url), direct(t, url)
			holdInserts(t, holder, "account-")()
			var a audit
			for name, condition := range conditions {
				for round := range 3 {
					// What both have read: the last event, which is the stream's.
					_, err := a.append(t.Context(), stores[round%2], commit(event(ann, "subscribed", "course:1", "student:1")))
					require.NoError(t, err)
					all := readAll(t, stores[1], eventstore.OneStream(ann))
					head := all[len(all)-1]
					race := func(i int) error {
						on := ann
						if elsewhere[name] {
							on = account(fmt.Sprint("racer ", i)) // so that nothing else can collide
						}
						_, err := a.append(t.Context(), stores[i%2], under(commit(event(on, "subscribed", "course:1", "student:1")), condition(head)))
						return err
					}
					// The first has written and is held before it commits; the others have been
					// judged without it, and wait for the lock.
					failed := make(chan error, 3)
					do(t, holder, "SELECT pg_advisory_lock(7, 7)")
					go func() { failed <- race(0) }()
					eventually(t, func() bool { _, held := waiters(t, conn, stores[0]); return held == 1 }, "the first is not held")
					go func() { failed <- race(1) }()
					eventually(t, func() bool { log, _ := waiters(t, conn, stores[0]); return log == 1 }, "the second does not wait")
					go func() { failed <- race(2) }() // behind the first, in its process
					do(t, holder, "SELECT pg_advisory_unlock(7, 7)")
					won := 0
					for range cap(failed) {
						if err := <-failed; err == nil {
							won++
						} else {
							require.ErrorIs(t, err, eventstore.ErrConflict, name)
						}
					}
					require.Equal(t, 1, won, "%s, round %d", name, round)
				}
			}
			a.check(t, direct(t, url), "deed")
		})
	}
}

// Each of two writes what the other has decided on not being there. Where only
// what is written is guarded, both pass (write skew under snapshots).
func TestHistory_EachOnTheAbsenceOfTheOther(t *testing.T) {
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
			var a audit
			for round := range pick(200, 40) {
				pair := []eventstore.Stream{account(fmt.Sprint("black ", round)), account(fmt.Sprint("white ", round))}
				failed := make([]error, 2)
				together(2, func(i int) {
					_, failed[i] = a.append(t.Context(), stores[i], under(commit(event(pair[i], "chosen")), at(pair[1-i], 0)))
				})
				require.True(t, (failed[0] == nil) != (failed[1] == nil), "round %d: %v", round, failed)
				require.ErrorIs(t, errors.Join(failed...), eventstore.ErrConflict)
			}
			a.check(t, direct(t, url), "deed")
		})
	}
}

// A commit can be conditional on the absence of a stream that it does not
// write. Nothing collides when that is wrong, so it must be looked for, also by
// a process that has just come.
func TestHistory_AbsenceOfAnotherStream(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			before := openURL(t, url)
			mustAppend(t, before, commit(event(account("there"), "opened")))
			fill(t, before, mostDelta+100)
			s := openURL(t, url, always(f))
			_, err := s.Append(t.Context(), under(commit(event(account("mine"), "opened")), at(account("there"), 0)))
			conflict, ok := errors.AsType[*eventstore.ConflictError](err)
			require.True(t, ok, "it was stored although the stream exists: %v", err)
			require.Equal(t, eventstore.Revision{Version: 1, Position: 1}, conflict.Actual)
			mustAppend(t, s, under(commit(event(account("mine"), "opened")), at(account("not there"), 0)))
		})
	}
}

// Conditions name more streams than a process remembers: they are judged all
// the same.
func TestHistory_MoreStreamsThanAreRemembered(t *testing.T) {
	t.Parallel()
	b := newBed(t, pgtest.Database(t), formFunction)
	fill(t, b.store, mostDelta+100)
	other := openURL(t, b.url, with(func(s *settings) { s.hold = b.gate.hold }))
	var pending []*eventstore.Pending
	b.gate.shut()
	for i := 0; i < mostHeads+5000; i += 100 {
		c := commit(event(account("one"), "noted"))
		for n := range 100 {
			c.Conditions = append(c.Conditions, at(account(fmt.Sprint("absent ", i+n)), 0))
		}
		pending = append(pending, other.Enqueue(t.Context(), c))
	}
	b.gate.open()
	for _, p := range pending {
		select {
		case <-p.Done():
			_, err := p.Result()
			require.NoError(t, err)
		case <-time.After(time.Minute):
			require.Fail(t, "it is judged for ever")
		}
	}
}

// Notifications are a hint. Subscribers lose nothing when the connection that
// listens is ended, when notifications are not sent, not heard, out of order,
// or nonsense (commanded, pyeventsourcing, epoch).
func TestHistory_NotificationsAreAHint(t *testing.T) {
	t.Parallel()
	silent := func(s *Store) { s.texts.notify = "SELECT $1::text, $2::text" }
	for name, test := range map[string]struct {
		options []Option
		sender  func(*Store)
		disturb func(t *testing.T, conn *pgx.Conn, s *Store, n int)
	}{
		"NotHeard": {options: []Option{with(func(s *settings) { s.deaf = true })}},
		"NotSent":  {sender: silent},
		"ListenerIsEnded": {disturb: func(t *testing.T, conn *pgx.Conn, _ *Store, n int) {
			if n%10 == 0 {
				do(t, conn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'")
			}
		}},
		"Nonsense": {sender: silent, disturb: func(t *testing.T, conn *pgx.Conn, s *Store, n int) {
			for _, payload := range []string{"", "x", "-1", "18446744073709551616", "1", "0"} {
				do(t, conn, "SELECT pg_notify($1, $2)", s.channel(), payload)
			}
		}},
		"OutOfOrder": {sender: silent, disturb: func(t *testing.T, conn *pgx.Conn, s *Store, n int) {
			do(t, conn, "SELECT pg_notify($1, $2)", s.channel(), strconv.Itoa(rand.IntN(2*n+2)))
		}},
		"FromTheFuture": {sender: silent, disturb: func(t *testing.T, conn *pgx.Conn, s *Store, n int) {
			if n == 0 {
				do(t, conn, "SELECT pg_notify($1, $2)", s.channel(), "18446744073709551615")
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			follower, writer := openURL(t, url, test.options...), openURL(t, url)
			if test.sender != nil {
				test.sender(writer)
			}
			conn := direct(t, url)
			spies := []*spy{watch(t, follower), watch(t, writer)}
			var last eventstore.Position
			for n := range 50 {
				last = mustAppend(t, writer, commit(event(account("ann"), "noted"), event(account("bob"), "noted"))).Last
				if test.disturb != nil {
					test.disturb(t, conn, writer, n)
				}
				if n%10 == 9 {
					for _, spy := range spies {
						spy.at(last)
					}
				}
			}
			require.EqualValues(t, 100, last)
		})
	}
}

// A notification that arrives before what it tells of can be read wakes readers
// for nothing, and then they sleep (sliceworkz).
func TestHistory_ToldAfterItIsVisible(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s := openURL(t, url)
	listener, reader := direct(t, url), direct(t, url)
	do(t, listener, "LISTEN "+pgx.Identifier{s.channel()}.Sanitize())
	told, appended := 0, 0
	for appended < 20 {
		r := mustAppend(t, s, commit(event(account("ann"), "noted")))
		appended++
		for {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			n, err := listener.WaitForNotification(ctx)
			cancel()
			if errors.Is(err, context.DeadlineExceeded) && told == 0 && appended < 5 {
				listener = direct(t, url) // the wait has ended the other one
				do(t, listener, "LISTEN "+pgx.Identifier{s.channel()}.Sanitize())
				break // it is a hint: a notifier that takes long to connect gives up
			}
			require.NoError(t, err)
			position, err := strconv.Atoi(n.Payload)
			require.NoError(t, err)
			require.GreaterOrEqual(t, scalar[int](t, reader, "SELECT max(position) FROM deed.events"), position)
			told++
			if position == int(r.Last) {
				break
			}
		}
	}
	require.LessOrEqual(t, told, appended)
}

// program returns one of PostgreSQL's own, of the server's version.
func program(t testing.TB, conn *pgx.Conn, name string) string {
	t.Helper()
	major := scalar[int](t, conn, "SELECT current_setting('server_version_num')::int / 10000")
	for _, dir := range []string{os.Getenv("DEED_TEST_POSTGRES_BIN"), fmt.Sprintf("/usr/lib/postgresql/%d/bin", major), fmt.Sprintf("/usr/pgsql-%d/bin", major)} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); dir != "" && err == nil {
			return path
		}
	}
	t.Skipf("no %s of PostgreSQL %d: install its client programs, or set DEED_TEST_POSTGRES_BIN", name, major)
	return ""
}

// Positions that depend on transaction ids do not survive a move to another
// server: old events lie above the new horizon (sliceworkz, Emmett). These do.
func TestHistory_DumpedAndRestored(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s := openURL(t, url)
	seat := under(commit(event(account("seat"), "taken", "seat:1")), eventstore.NoneMatch(eventstore.Tagged("seat:1"), 0))
	keyed := commit(event(account("ann"), "opened", "a"), event(account("bob"), "opened"))
	keyed.Key = "key"
	first := mustAppend(t, s, keyed)
	mustAppend(t, s, seat)
	log := readAll(t, s, eventstore.All())
	require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error { return tx.Put("view", "row", []byte("value")) }))
	file := filepath.Join(t.TempDir(), "dump")
	conn := direct(t, url)
	out, err := exec.CommandContext(t.Context(), program(t, conn, "pg_dump"), "--format=custom", "--file="+file, "--dbname="+url).CombinedOutput()
	require.NoError(t, err, string(out))

	moved := pgtest.Start(t, pgtest.Settings{"fsync": "off"}).Database(t)
	out, err = exec.CommandContext(t.Context(), program(t, conn, "pg_restore"), "--dbname="+moved, file).CombinedOutput()
	require.NoError(t, err, string(out))
	there := openURL(t, moved)
	require.Equal(t, s.logID, there.logID, "it is the same log")
	require.Equal(t, log, readAll(t, there, eventstore.All()))
	require.EqualValues(t, 4, mustAppend(t, there, under(commit(event(account("ann"), "went on")), eventstore.StreamAt(account("ann"), first.Revision(account("ann"))))).First)
	_, err = there.Append(t.Context(), under(commit(event(account("seat"), "taken", "seat:1")), eventstore.NoneMatch(eventstore.Tagged("seat:1"), 0)))
	require.ErrorIs(t, err, eventstore.ErrConflict)
	again, err := there.Append(t.Context(), keyed)
	require.NoError(t, err)
	require.True(t, again.Duplicate)
	require.EqualValues(t, 5, mustAppend(t, there, commit(event(account("new"), "of a type that is new"))).First)
	require.Len(t, readAll(t, there, eventstore.OfTypes("of a type that is new")), 1)
	watch(t, there).at(5)
	require.NoError(t, there.View(t.Context(), func(tx projection.StateTx) error {
		value, ok, err := tx.Get("view", "row")
		require.True(t, ok)
		require.Equal(t, "value", string(value))
		return err
	}))
}

// A hole is never passed over in silence.
func TestHistory_AHoleIsLoud(t *testing.T) {
	t.Parallel()
	for _, missing := range []int{1, 2, pageSize, pageSize + 1, 2*pageSize + 7} {
		t.Run(fmt.Sprint(missing), func(t *testing.T) {
			t.Parallel()
			const size = 2*pageSize + 10
			url := pgtest.Database(t)
			s := openURL(t, url)
			fill(t, s, size)
			conn := direct(t, url)
			do(t, conn, "DELETE FROM deed.events WHERE position = $1", missing)
			for _, o := range []eventstore.ReadOptions{{}, {Backward: true}, {After: eventstore.Position(missing - 1)}, {Through: eventstore.Position(missing)}, {Through: eventstore.Position(missing), Backward: true}} {
				var failed error
				for _, err := range s.Read(t.Context(), eventstore.All(), o) {
					failed = err
				}
				require.ErrorIs(t, failed, eventstore.ErrGap, "%+v", o)
				require.False(t, eventstore.CanRetry(failed))
			}
			require.ErrorIs(t, watch(t, openURL(t, url, Tail(1, 1))).fails(), eventstore.ErrGap)
		})
	}
}

// The log has become shorter than a process has seen it: somebody has restored
// a backup, or another server has taken over. The process stops with an error
// that says so; it does not go on as if nothing had happened.
func TestHistory_ARewoundLogIsLoud(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		for _, how := range []string{"connected", "reconnected", "written again", "written again, connected"} {
			if how == "written again, connected" && f != formTwoTrips {
				continue // nor do they ask for the event that they saw last
			}
			if f == formCopy && how == "connected" {
				// It asks nothing that would tell. A database that was restored, or another
				// that has taken over, is one that was connected to anew.
				continue
			}
			t.Run(f.String()+", "+how, func(t *testing.T) {
				t.Parallel()
				url := pgtest.Database(t)
				s := openURL(t, url, always(f))
				seen := watch(t, s)
				for n := range 5 {
					mustAppend(t, s, commit(event(account("ann"), "noted"), event(account("bob"), fmt.Sprint("type ", n))))
				}
				seen.at(10)
				conn := direct(t, url)
				do(t, conn, "DELETE FROM deed.events WHERE position > 6")
				switch how {
				case "connected":
					do(t, conn, "DELETE FROM deed.kinds WHERE id NOT IN (SELECT kind FROM deed.events)")
				case "reconnected":
					do(t, conn, "DELETE FROM deed.kinds WHERE id NOT IN (SELECT kind FROM deed.events)")
					do(t, conn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
				case "written again", "written again, connected":
					if how == "written again" {
						do(t, conn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
					}
					other := openURL(t, url)
					for range 4 {
						mustAppend(t, other, commit(event(account("new"), "noted"), event(account("new"), "another history")))
					}
				}
				answer := make(chan error, 1)
				go func() {
					_, err := s.Append(t.Context(), commit(event(account("ann"), "noted")))
					answer <- err
				}()
				select {
				case err := <-answer:
					require.ErrorIs(t, err, eventstore.ErrGap)
					require.True(t, !eventstore.CanRetry(err) || errors.Is(err, eventstore.ErrOutcomeUnknown), err)
					require.ErrorContains(t, err, "restart the program")
				case <-time.After(waiting):
					require.Fail(t, "there is no answer")
				}
				if how != "written again, connected" { // it has not looked back
					require.ErrorIs(t, seen.fails(), eventstore.ErrGap)
				}
				require.NoError(t, s.Close())
				again := openURL(t, url)
				head, err := again.Head(t.Context())
				require.NoError(t, err)
				require.Equal(t, head+1, mustAppend(t, again, commit(event(account("ann"), "noted"))).First, "a program that is started anew goes on")
			})
		}
	}
}

// Snapshots that are older than the lock would pass conditions that do not
// hold. Databases and roles whose transactions are stricter by default work, or
// are refused, and never wrong.
func TestHistory_StricterIsolationByDefault(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"repeatable read", "serializable"} {
		for _, scope := range []string{"DATABASE", "ROLE"} {
			t.Run(level+" of the "+scope, func(t *testing.T) {
				t.Parallel()
				url := pgtest.Database(t)
				admin := direct(t, url)
				if scope == "DATABASE" {
					do(t, admin, "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = ''"+level+"''', current_database()); END $$")
				} else {
					role := pgtest.Role(t, url)
					config, err := pgx.ParseConfig(role)
					require.NoError(t, err)
					do(t, admin, "ALTER ROLE "+config.User+" SET default_transaction_isolation = '"+level+"'")
					do(t, admin, "CREATE SCHEMA deed AUTHORIZATION "+config.User)
					url = role
				}
				require.Equal(t, level, scalar[string](t, direct(t, url), "SHOW transaction_isolation"))
				w := &workload{writers: 4, commits: 10}
				var spies []*spy
				for range 2 {
					s := openURL(t, url)
					w.stores = append(w.stores, s)
					spies = append(spies, watch(t, s))
				}
				w.run(t)
				w.check(t, url, spies...)
				s := w.stores[0]
				require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error { return tx.Put("view", "row", nil) }))
				_, err := s.Acquire(t.Context(), "view", "me", 0)
				require.NoError(t, err)
				_, err = s.AppendTx(t.Context(), begin(t, direct(t, url)), commit(event(account("ann"), "noted")))
				require.ErrorIs(t, err, eventstore.ErrInvalid)
			})
		}
	}
}
