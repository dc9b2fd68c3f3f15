package postgres

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/projection/statetest"
)

func TestInline(t *testing.T) {
	statetest.RunInline(t, func(t testing.TB) statetest.InlineStore { return openStore(t) }, statetest.Features{SQL: true})
}

func TestInline_Pooled(t *testing.T) {
	if !long() {
		t.Skip("TestInline asks for the same without a pooler; set DEED_TEST_LONG=1 for this one")
	}
	statetest.RunInline(t, func(t testing.TB) statetest.InlineStore {
		s, err := Open(t.Context(), pgtest.Bouncer(t, pgtest.Database(t)), Pooled())
		require.NoError(t, err)
		return s
	}, statetest.Features{SQL: true})
}

// openStore opens a store that somebody else closes.
func openStore(t testing.TB) *Store {
	t.Helper()
	s, err := Open(t.Context(), pgtest.Database(t))
	require.NoError(t, err)
	return s
}

type tillPaid struct{ Cents int64 }

func (tillPaid) EventType() string { return "till.paid" }

type till struct {
	Cents int64
	Last  eventstore.Position
}

// thirteen is what the view of tills refuses.
const thirteen = 13

func tills() *projection.ViewDefinition[till] {
	return projection.View("tills", projection.OnMeta(func(row *till, e tillPaid, r eventstore.Recorded) {
		if e.Cents == thirteen {
			panic("thirteen")
		}
		if r.Position <= row.Last {
			panic(fmt.Sprintf("event %d came behind %d", r.Position, row.Last))
		}
		row.Cents, row.Last = row.Cents+e.Cents, r.Position
	})).Inline()
}

func pay(id string, cents int64) eventstore.Commit {
	return commit(eventstore.Event{ID: newID(), Stream: eventstore.Stream{Category: "till", ID: id}, Type: "till.paid", Data: fmt.Appendf(nil, `{"Cents":%d}`, cents)})
}

// tillNode is a process that has the view.
type tillNode struct {
	*Store
	engine *projection.Engine
	view   *projection.ViewDefinition[till]
	stop   func()
}

func runTills(t testing.TB, s *Store) *tillNode {
	t.Helper()
	return runTill(t, s, tills())
}

// runTill is runTills with another definition.
func runTill(t testing.TB, s *Store, definition projection.Projection) *tillNode {
	t.Helper()
	n := &tillNode{Store: s, engine: projection.NewEngine(s, s, projection.Options{Logger: slog.New(slog.DiscardHandler), Attempts: 1})}
	n.view, _ = definition.(*projection.ViewDefinition[till])
	require.NoError(t, n.engine.Add(definition))
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	for _, w := range n.engine.Workers() {
		group.Go(func() {
			if err := w.Run(ctx); err != nil {
				t.Errorf("%s: %v", w.Name(), err)
			}
		})
	}
	n.stop = sync.OnceFunc(func() {
		cancel()
		group.Wait()
		n.engine.Close()
	})
	t.Cleanup(n.stop)
	return n
}

func (n *tillNode) inline(t testing.TB) bool {
	all, err := n.engine.Status(context.Background())
	require.NoError(t, err)
	return all[0].Inline
}

func (n *tillNode) row(t testing.TB, id string) (row till, at eventstore.Position) {
	t.Helper()
	require.NoError(t, n.View(context.Background(), func(tx projection.StateTx) error {
		var err error
		if row, _, err = n.view.Row(tx, id); err != nil {
			return err
		}
		c, err := tx.Checkpoint("projection.tills")
		at = c.Position
		return err
	}))
	return row, at
}

func (n *tillNode) verify(t testing.TB) {
	t.Helper()
	eventually(t, func() bool { return n.inline(t) }, "it is not inline")
	v, err := n.engine.Verify(context.Background(), "tills")
	require.NoError(t, err)
	require.True(t, v.Agrees(), "%s", v)
	head, err := n.Head(context.Background())
	require.NoError(t, err)
	require.Equal(t, head, v.Position)
}

// Three processes apply the view, and one does not know it. Whoever has appended
// sees it, or is told that it was not applied; in the end the rows are the fold.
func TestInline_Processes(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	var nodes []*tillNode
	for range 3 {
		nodes = append(nodes, runTills(t, openURL(t, url)))
	}
	ignorant := openURL(t, url)
	eventually(t, func() bool { return nodes[0].inline(t) }, "it is not inline")
	var applied, left atomic.Int64
	run := func(commits int, disturbed bool) {
		var group sync.WaitGroup
		for i, n := range nodes {
			for w := range 3 {
				group.Go(func() {
					for c := range commits {
						id := fmt.Sprintf("n%dw%d", i, w)
						r, err := n.Append(context.Background(), pay(id, 1))
						if err != nil {
							t.Error(err)
							return
						}
						row, at := n.row(t, id)
						if at >= r.Last {
							applied.Add(1)
							if row.Last != r.Last {
								t.Errorf("%s: %+v at %d, after its commit %d at %d", id, row, at, c, r.Last)
							}
							continue
						}
						left.Add(1)
						if p, _ := n.engine.Unapplied("tills"); p < r.Last {
							t.Errorf("%s at %d was not applied, and nobody says so: %d", id, r.Last, p)
						}
					}
				})
			}
		}
		if disturbed {
			group.Go(func() {
				for range commits / 4 {
					if _, err := ignorant.Append(context.Background(), pay("ignorant", 1)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
	}
	commits := pick(200, 40)
	most := false
	for range 3 { // an owner that is busy with what was left leaves more, where the machine is slow
		before := applied.Load()
		run(commits, false)
		if most = applied.Load()-before > int64(9*commits/2); most {
			break
		}
	}
	require.True(t, most, "%d were applied, %d left", applied.Load(), left.Load())
	run(commits, true)
	for _, n := range nodes {
		n.verify(t)
	}
	run(commits, false)
	nodes[1].verify(t)
	t.Logf("%d applied when they returned, %d left to the owner", applied.Load(), left.Load())
	row, _ := nodes[0].row(t, "ignorant")
	require.EqualValues(t, commits/4, row.Cents)
}

// Somebody has the lease of the projection locked, as its owner's updates do:
// appends do not wait, and do not apply it either.
func TestInline_LeaseIsBusy(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	n := runTills(t, openURL(t, url))
	eventually(t, func() bool { return n.inline(t) }, "it is not inline")
	_, err := n.Append(t.Context(), pay("a", 1))
	require.NoError(t, err)
	for _, table := range []string{"leases", "checkpoints"} {
		row, at := n.row(t, "a")
		conn := direct(t, url)
		tx, err := conn.Begin(t.Context())
		require.NoError(t, err)
		_, err = tx.Exec(t.Context(), "SELECT FROM deed."+table+" WHERE name = 'projection.tills' FOR UPDATE")
		require.NoError(t, err)
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), waiting)
			r, err := n.Append(ctx, pay("a", 10))
			cancel()
			require.NoError(t, err)
			now, still := n.row(t, "a")
			require.Equal(t, row, now)
			require.Equal(t, at, still)
			p, _ := n.engine.Unapplied("tills")
			require.Equal(t, r.Last, p)
		}
		require.NoError(t, tx.Rollback(t.Context()))
		n.verify(t)
		now, _ := n.row(t, "a")
		require.Equal(t, row.Cents+30, now.Cents)
	}
}

// Another process has the log's lock, and an event that nobody can see yet, while
// an append that would apply the view waits: it must find that it is not at the head.
func TestInline_AnotherAppendIsOpen(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	n := runTills(t, openURL(t, url))
	ignorant := openURL(t, url)
	eventually(t, func() bool { return n.inline(t) }, "it is not inline")
	conn := direct(t, url)
	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	foreign, err := ignorant.AppendTx(t.Context(), tx, pay("a", 100))
	require.NoError(t, err)
	appended := make(chan eventstore.Receipt, 1)
	go func() {
		r, err := n.Append(context.Background(), pay("a", 1))
		if err != nil {
			t.Error(err)
		}
		appended <- r
	}()
	watcher := direct(t, url)
	eventually(t, func() bool {
		return scalar[int](t, watcher, "SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())") > 0
	}, "the append does not wait for the lock")
	require.NoError(t, tx.Commit(t.Context()))
	r := <-appended
	require.Equal(t, foreign.Last+1, r.First)
	require.NoError(t, n.engine.WaitFor(t.Context(), "tills", r.Last))
	row, _ := n.row(t, "a")
	require.Equal(t, till{Cents: 101, Last: r.Last}, row)
	n.verify(t)
}

// Within a transaction of the program's own the view is applied as well, and
// belongs to it.
func TestInline_AppendTx(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	n := runTills(t, openURL(t, url))
	eventually(t, func() bool { return n.inline(t) }, "it is not inline")
	conn := direct(t, url)
	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	_, err = n.AppendTx(t.Context(), tx, pay("a", thirteen))
	_, refused := errors.AsType[*projection.InlineError](err)
	require.True(t, refused, "%v", err)
	r, err := n.AppendTx(t.Context(), tx, pay("a", 5))
	require.NoError(t, err, "the transaction is as it was before")
	row, at := n.row(t, "a")
	require.Zero(t, row)
	require.Zero(t, at)
	require.NoError(t, tx.Commit(t.Context()))
	row, at = n.row(t, "a")
	require.Equal(t, till{Cents: 5, Last: r.Last}, row)
	require.Equal(t, r.Last, at)

	tx, err = conn.Begin(t.Context())
	require.NoError(t, err)
	for range 2 {
		_, err = n.AppendTx(t.Context(), tx, pay("a", 5))
		require.NoError(t, err)
	}
	require.NoError(t, tx.Rollback(t.Context()))
	row, at = n.row(t, "a")
	require.Equal(t, till{Cents: 5, Last: r.Last}, row)
	require.Equal(t, r.Last, at)
	tx, err = conn.BeginTx(t.Context(), pgx.TxOptions{})
	require.NoError(t, err)
	for range 2 {
		r, err = n.AppendTx(t.Context(), tx, pay("a", 5))
		require.NoError(t, err)
	}
	require.NoError(t, tx.Commit(t.Context()))
	row, _ = n.row(t, "a")
	require.Equal(t, till{Cents: 15, Last: r.Last}, row)
	p, _ := n.engine.Unapplied("tills")
	require.Zero(t, p)
	n.verify(t)
}

// The answer of a batch is lost: whether it was applied is looked up in the log, as
// the events are, and both are there once.
func TestInline_LostAnswers(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	var s *Store
	var batches, cut atomic.Int64
	sent := func() {
		if batches.Add(1)%5 == 0 {
			var n int64
			_ = s.logs.QueryRow(context.Background(), "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid <> pg_backend_pid() AND database = (SELECT oid FROM pg_database WHERE datname = current_database())").Scan(&n)
			cut.Add(n)
		}
	}
	s = openURL(t, url, func(set *settings) error { set.sent = func() { sent() }; return nil })
	n := runTills(t, s)
	eventually(t, func() bool { return n.inline(t) }, "it is not inline")
	appends := 0
	for began := time.Now(); appends < 60 || cut.Load() == 0 && time.Since(began) < waiting; appends++ {
		_, err := n.Append(t.Context(), pay("a", 1))
		require.NoError(t, err, appends)
	}
	require.NoError(t, n.engine.WaitFor(t.Context(), "tills", eventstore.Position(appends)))
	row, _ := n.row(t, "a")
	require.EqualValues(t, appends, row.Cents)
	n.verify(t)
	require.Positive(t, cut.Load(), "connections cut off behind a batch")
}

const inlineURL = "DEED_TEST_INLINE_URL"

// shortLeases is for processes whose owners are killed.
func shortLeases(s *settings) error { s.leaseTTL = 2 * time.Second; return nil }

// TestInlineProcess is the process that TestInline_Killed kills.
func TestInlineProcess(t *testing.T) {
	url := os.Getenv(inlineURL)
	if url == "" {
		t.Skip("it is run by TestInline_Killed")
	}
	s, err := Open(t.Context(), url, shortLeases)
	require.NoError(t, err)
	t.Fatal(statetest.WriteInline(t.Context(), s, os.Getenv(inlineURL+"_KNOWS") != "", func(r statetest.InlineReport) {
		line, _ := json.Marshal(r)
		fmt.Println(string(line)) // one write: lines of different writers do not mix
	}))
}

// Processes are killed at random moments while appends move an inline projection,
// one at a time, or several at once, one of which does not know the projection.
func TestInline_Killed(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	url := pgtest.Database(t)
	total, applied := 0, 0
	for _, processes := range [][]bool{{true}, {true, true}, {true, false, true}, {false}, {true}} {
		var group sync.WaitGroup
		var mu sync.Mutex
		var all []statetest.InlineReport
		for _, knows := range processes {
			after := time.Duration(random.IntN(300)) * time.Millisecond
			group.Go(func() {
				reports := killedInline(t, url, knows, after)
				mu.Lock()
				defer mu.Unlock()
				all = append(all, reports...)
			})
		}
		group.Wait()
		s, err := Open(t.Context(), url, shortLeases)
		require.NoError(t, err)
		n := statetest.CheckInline(t, s, all)
		require.NoError(t, s.Close())
		total, applied = total+len(all), applied+n
	}
	t.Logf("%d appends, %d of them applied when they returned", total, applied)
	require.Greater(t, applied, 20)
}

func killedInline(t *testing.T, url string, knows bool, after time.Duration) []statetest.InlineReport {
	program, err := os.Executable()
	if err != nil {
		t.Error(err)
		return nil
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	child := exec.CommandContext(ctx, program, "-test.run=^TestInlineProcess$")
	child.Env = append(os.Environ(), inlineURL+"="+url)
	if knows {
		child.Env = append(child.Env, inlineURL+"_KNOWS=yes")
	}
	var failure strings.Builder
	child.Stderr = &failure
	out, err := child.StdoutPipe()
	if err == nil {
		err = child.Start()
	}
	if err != nil {
		t.Error(err)
		return nil
	}
	var reports []statetest.InlineReport
	var timer *time.Timer
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var r statetest.InlineReport
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			break // the kill cut the line off
		}
		if reports = append(reports, r); timer == nil && len(reports) > 50 {
			timer = time.AfterFunc(after, func() { _ = child.Process.Kill() })
		}
	}
	_ = child.Wait()
	if timer == nil {
		t.Errorf("the writer ended by itself: %s, after %d reports", failure.String(), len(reports))
		return reports
	}
	timer.Stop()
	return reports
}

func BenchmarkInline(b *testing.B) {
	statetest.BenchmarkInline(b, func(t testing.TB) statetest.InlineStore { return openStore(t) })
}

// What a commit is refused upon must be in the log: here the commit before it, of
// the same batch, never gets there, because another process comes between.
func TestInline_RefusedUponWhatFails(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	var holding atomic.Bool
	var s *Store
	s = openURL(t, url, func(set *settings) error {
		set.hold = func() {
			for holding.Load() && s.appends.Len() < 2 {
				time.Sleep(time.Millisecond)
			}
		}
		return nil
	})
	ignorant, watcher := openURL(t, url), direct(t, url)
	_, err := ignorant.Append(t.Context(), commit(event(account("z"), "other"))) // its kinds are made
	require.NoError(t, err)
	var calls atomic.Int64
	foreign := make(chan error, 1)
	view := projection.View("tills", projection.On(func(row *till, e tillPaid) {
		if e.Cents == thirteen && row.Cents > 0 {
			if calls.Add(1) == 1 {
				go func() {
					_, err := ignorant.Append(context.Background(), commit(event(eventstore.Stream{Category: "till", ID: "x"}, "other")))
					foreign <- err
				}()
				waits := func() bool {
					var n int
					err := watcher.QueryRow(context.Background(), "SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())").Scan(&n)
					return err == nil && n > 0
				}
				for began := time.Now(); !waits() && time.Since(began) < waiting; {
					time.Sleep(time.Millisecond)
				}
			}
			panic("thirteen, upon something")
		}
		row.Cents += e.Cents
	})).Inline()
	engine := projection.NewEngine(s, s, projection.Options{Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, engine.Add(view))
	defer engine.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- engine.Workers()[0].Run(ctx) }()
	defer func() { cancel(); require.NoError(t, <-done) }()
	eventually(t, func() bool {
		all, err := engine.Status(context.Background())
		require.NoError(t, err)
		return all[0].Inline
	}, "it is not inline")
	holding.Store(true)
	first := s.Enqueue(context.Background(), under(pay("x", 1), at(eventstore.Stream{Category: "till", ID: "x"}, 0)))
	second := s.Enqueue(context.Background(), commit(eventstore.Event{ID: newID(), Stream: eventstore.Stream{Category: "other", ID: "x"}, Type: "till.paid", Data: []byte(`{"Cents":13}`)}))
	<-second.Done()
	holding.Store(false)
	<-first.Done()
	require.NoError(t, <-foreign)
	_, err = first.Result()
	require.ErrorIs(t, err, eventstore.ErrConflict)
	_, err = second.Result()
	require.NoError(t, err)
	require.EqualValues(t, 1, calls.Load())
	v, err := engine.Verify(t.Context(), "tills")
	require.NoError(t, err)
	require.True(t, v.Agrees(), "%s", v)
}

// hoard is a store whose committer waits for what is enqueued together.
func hoard(t *testing.T, url string) (s *Store, together func(commits ...eventstore.Commit) []*eventstore.Pending) {
	t.Helper()
	var many atomic.Int64
	s = openURL(t, url, func(set *settings) error {
		set.hold = func() {
			for int64(s.appends.Len()) < many.Load() {
				time.Sleep(time.Millisecond)
			}
		}
		return nil
	})
	return s, func(commits ...eventstore.Commit) []*eventstore.Pending {
		many.Store(int64(len(commits)))
		var all []*eventstore.Pending
		for _, c := range commits {
			all = append(all, s.Enqueue(context.Background(), c))
		}
		<-all[0].Done()
		many.Store(0)
		for _, p := range all {
			<-p.Done()
		}
		return all
	}
}

// The handlers of one batch would take longer than the server lets a session be idle
// in its transaction.
func TestInline_BatchOfSlowHandlers(t *testing.T) {
	t.Parallel()
	s, together := hoard(t, pgtest.Database(t))
	var slow atomic.Bool
	view := projection.View("tills", projection.On(func(row *till, e tillPaid) {
		if slow.Load() {
			time.Sleep(150 * time.Millisecond)
		}
		row.Cents += e.Cents
	})).Inline()
	n := runTill(t, s, view)
	eventually(t, func() bool { return n.inline(t) }, "it is not inline")
	slow.Store(true)
	const commits = 40
	all := make([]eventstore.Commit, commits)
	for i := range all {
		all[i] = pay("a", 1)
		all[i].Key = fmt.Sprint("k", i)
	}
	for i, p := range together(all...) {
		r, err := p.Result()
		require.NoError(t, err, i)
		require.EqualValues(t, i+1, r.Last)
	}
	slow.Store(false)
	row, at := n.row(t, "a")
	require.EqualValues(t, commits, row.Cents)
	require.EqualValues(t, commits, at)
	n.verify(t)
}

// What a handler makes look like a failure of the database is its own commit's
// failure, and nobody else's.
func TestInline_HandlerFailsLikeTheDatabase(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(ctx context.Context, tx projection.Tx) error{
		"deadline": func(ctx context.Context, tx projection.Tx) error {
			ctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
			defer cancel()
			_, err := tx.Exec(ctx, "SELECT pg_sleep(5)")
			return err
		},
		"cancelled": func(ctx context.Context, tx projection.Tx) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			defer time.AfterFunc(20*time.Millisecond, cancel).Stop()
			_, err := tx.Exec(ctx, "SELECT pg_sleep(5)")
			return err
		},
		"serialization": func(ctx context.Context, tx projection.Tx) error {
			_, err := tx.Exec(ctx, "DO $do$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $do$")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, together := hoard(t, pgtest.Database(t))
			n := runTill(t, s, projection.SQL("tills",
				projection.Setup("CREATE TABLE IF NOT EXISTS paid (position bigint PRIMARY KEY)"),
				projection.OnSQL(func(ctx context.Context, tx projection.Tx, e tillPaid, r eventstore.Recorded) error {
					if e.Cents == thirteen {
						return fail(ctx, tx)
					}
					_, err := tx.Exec(ctx, "INSERT INTO paid (position) VALUES ($1)", int64(r.Position))
					return err
				})).Inline())
			eventually(t, func() bool { return n.inline(t) }, "it is not inline")
			began := time.Now()
			var all []eventstore.Commit
			for i := range 9 {
				all = append(all, pay(fmt.Sprint("t", i), 9+int64(i))) // the fifth is thirteen
			}
			for i, p := range together(all...) {
				_, err := p.Result()
				if i != 4 {
					require.NoError(t, err, i)
					continue
				}
				refused, ok := errors.AsType[*projection.InlineError](err)
				require.True(t, ok, "%v", err)
				require.Equal(t, "tills", refused.Projection)
				require.False(t, eventstore.CanRetry(err))
			}
			require.Less(t, time.Since(began), 20*time.Second)
			conn := direct(t, n.config.ConnString())
			require.Equal(t, 8, scalar[int](t, conn, "SELECT count(*)::int FROM paid"))
		})
	}
}

// A key that this process has not heard of was used: handlers do not decide what
// becomes of the commit.
func TestInline_DuplicateOfWhatIsRefused(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	n := runTills(t, openURL(t, url))
	eventually(t, func() bool { return n.inline(t) }, "it is not inline")
	ignorant := openURL(t, url)
	c := pay("a", thirteen)
	c.Key = "once"
	first, err := ignorant.Append(t.Context(), c)
	require.NoError(t, err)
	require.NoError(t, n.engine.WaitFor(t.Context(), "tills", first.Last)) // set aside
	require.NoError(t, n.engine.SkipDeadLetter(t.Context(), "tills", first.Last, "a test"))
	eventually(t, func() bool { return n.inline(t) }, "it is not inline")
	again, err := n.Append(t.Context(), c)
	require.NoError(t, err)
	require.True(t, again.Duplicate)
	require.Equal(t, first.Last, again.Last)
}
