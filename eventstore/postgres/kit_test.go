package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// long enough for a machine that is busy with other tests.
const waiting = 30 * time.Second

func openURL(t testing.TB, url string, options ...Option) *Store {
	t.Helper()
	s, err := Open(t.Context(), url, options...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// direct returns a connection that has nothing to do with any store.
func direct(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	return conn
}

func do(t testing.TB, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	_, err := conn.Exec(t.Context(), sql, args...)
	require.NoError(t, err, sql)
}

func scalar[T any](t testing.TB, conn *pgx.Conn, sql string, args ...any) T {
	t.Helper()
	var v T
	require.NoError(t, conn.QueryRow(t.Context(), sql, args...).Scan(&v), sql)
	return v
}

// eventually waits for what must come, without saying when.
func eventually(t testing.TB, is func() bool, message string, args ...any) {
	t.Helper()
	for began := time.Now(); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Since(began) > waiting {
			require.Fail(t, fmt.Sprintf(message, args...))
		}
	}
}

func account(id string) eventstore.Stream { return eventstore.Stream{Category: "account", ID: id} }

func event(s eventstore.Stream, eventType string, tags ...string) eventstore.Event {
	return eventstore.Event{ID: newID(), Stream: s, Type: eventType, Tags: tags, Data: []byte(`{}`)}
}

func commit(e ...eventstore.Event) eventstore.Commit { return eventstore.Commit{Events: e} }

// under returns the commit with conditions.
func under(c eventstore.Commit, conditions ...eventstore.Condition) eventstore.Commit {
	c.Conditions = append(slices.Clone(c.Conditions), conditions...)
	return c
}

func at(s eventstore.Stream, version uint64) eventstore.Condition {
	return eventstore.StreamAt(s, eventstore.Revision{Version: version})
}

func mustAppend(t testing.TB, s *Store, c eventstore.Commit) eventstore.Receipt {
	t.Helper()
	r, err := s.Append(t.Context(), c)
	require.NoError(t, err)
	return r
}

// fill appends so many events to a stream that nothing else is about: enough
// of them, and a store that is opened later knows nothing of what came before.
func fill(t testing.TB, s *Store, n int) {
	t.Helper()
	for n > 0 {
		size := min(n, 1000)
		c := eventstore.Commit{Events: make([]eventstore.Event, size)}
		for i := range c.Events {
			c.Events[i] = event(eventstore.Stream{Category: "filler", ID: "1"}, "filled")
		}
		mustAppend(t, s, c)
		n -= size
	}
}

func readAll(t testing.TB, s *Store, q eventstore.Query) []eventstore.Recorded {
	t.Helper()
	var all []eventstore.Recorded
	for e, err := range s.Read(t.Context(), q, eventstore.ReadOptions{}) {
		require.NoError(t, err)
		all = append(all, e)
	}
	return all
}

// spy is a subscription that fails the test when it skips, repeats or
// disorders.
type spy struct {
	t      testing.TB
	cancel context.CancelFunc
	ended  chan struct{}

	mu     sync.Mutex
	last   eventstore.Position
	grown  chan struct{}
	failed error
}

// watch follows the whole log from the beginning.
func watch(t testing.TB, s *Store) *spy {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &spy{t: t, cancel: cancel, ended: make(chan struct{}), grown: make(chan struct{})}
	go func() {
		defer close(w.ended)
		for b, err := range s.Subscribe(ctx, eventstore.All(), 0) {
			w.mu.Lock()
			for _, e := range b.Events {
				if e.Position != w.last+1 && w.failed == nil {
					w.failed = fmt.Errorf("position %d follows %d", e.Position, w.last)
				}
				w.last = e.Position
			}
			if err == nil && b.Through != w.last && w.failed == nil {
				w.failed = fmt.Errorf("everything up to %d was considered, but the last event was %d", b.Through, w.last)
			}
			if err != nil && ctx.Err() == nil && w.failed == nil {
				w.failed = err
			}
			close(w.grown)
			w.grown = make(chan struct{})
			w.mu.Unlock()
		}
	}()
	t.Cleanup(w.stop)
	return w
}

func (w *spy) stop() {
	w.cancel()
	<-w.ended
}

// at waits until the subscription has seen the position.
func (w *spy) at(p eventstore.Position) {
	w.t.Helper()
	timer := time.NewTimer(waiting)
	defer timer.Stop()
	for {
		w.mu.Lock()
		last, failed, grown := w.last, w.failed, w.grown
		w.mu.Unlock()
		require.NoError(w.t, failed, "the subscription")
		if last >= p {
			return
		}
		select {
		case <-grown:
		case <-timer.C:
			require.Fail(w.t, fmt.Sprintf("the subscription has come to position %d and not to %d", last, p))
		}
	}
}

// fails waits until the subscription has ended with an error.
func (w *spy) fails() error {
	w.t.Helper()
	select {
	case <-w.ended:
	case <-time.After(waiting):
		require.Fail(w.t, "the subscription goes on")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failed
}

// audit compares what callers were told with what the log holds.
type audit struct {
	mu   sync.Mutex
	told []told
}

type told struct {
	commit  eventstore.Commit
	receipt eventstore.Receipt
	err     error
}

// append appends and remembers the answer. The events must have ids.
func (a *audit) append(ctx context.Context, s *Store, c eventstore.Commit) (eventstore.Receipt, error) {
	r, err := s.Append(ctx, c)
	a.note(c, r, err)
	return r, err
}

func (a *audit) note(c eventstore.Commit, r eventstore.Receipt, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.told = append(a.told, told{c, r, err})
}

// recorded reads the log as it lies in the database, past all that the store
// does to read it.
func recorded(t testing.TB, conn *pgx.Conn, schema string) []eventstore.Recorded {
	t.Helper()
	name := pgx.Identifier{schema}.Sanitize()
	rows, err := conn.Query(t.Context(), `SELECT e.position, e.version, e.stream, k.type, e.id, e.tags,
			ARRAY(SELECT t.tag FROM `+name+`.tags t WHERE t.position = e.position AND t.kind = e.kind)
		FROM `+name+`.events e JOIN `+name+`.kinds k ON k.id = e.kind ORDER BY e.position`)
	require.NoError(t, err)
	defer rows.Close()
	var all []eventstore.Recorded
	for rows.Next() {
		var r eventstore.Recorded
		var position, version int64
		var stream string
		var tags []string
		require.NoError(t, rows.Scan(&position, &version, &stream, &r.Type, &r.ID, &r.Tags, &tags))
		r.Position, r.Version = eventstore.Position(position), uint64(version)
		r.Stream, err = eventstore.ParseStream(stream)
		require.NoError(t, err)
		require.ElementsMatch(t, r.Tags, tags, "the tags of position %d and its rows in the table of tags", position)
		all = append(all, r)
	}
	require.NoError(t, rows.Err())
	return all
}

// check fails unless the log is what the answers say: every receipt is in it,
// once and as described, every commit that failed is not, whatever was stored
// was stored under conditions that held just then, and there is nothing else.
func (a *audit) check(t testing.TB, conn *pgx.Conn, schema string) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	log := recorded(t, conn, schema)
	positions := map[uuid.UUID]eventstore.Position{}
	versions := map[eventstore.Stream]uint64{}
	for i, e := range log {
		require.EqualValues(t, i+1, e.Position, "positions have no gaps")
		versions[e.Stream]++
		require.Equal(t, versions[e.Stream], e.Version, "versions of %s have no gaps", e.Stream)
		require.NotContains(t, positions, e.ID, "the event at position %d is stored a second time", e.Position)
		positions[e.ID] = e.Position
	}
	type use struct{ first, last eventstore.Position }
	keys := map[string]use{}
	claimed := 0
	for _, c := range a.told {
		// Where the commit is: as a whole, or not at all.
		first, stored := positions[c.commit.Events[0].ID]
		for i, e := range c.commit.Events {
			p, ok := positions[e.ID]
			require.True(t, ok == stored && (!ok || p == first+eventstore.Position(i)), "event %d of %d of a commit is not beside the others; it was answered %v, %v", i+1, len(c.commit.Events), c.receipt, c.err)
		}
		last := first + eventstore.Position(len(c.commit.Events)) - 1
		if stored && !c.receipt.Duplicate {
			claimed += len(c.commit.Events)
		}
		switch {
		case errors.Is(c.err, eventstore.ErrOutcomeUnknown):
		case c.err != nil:
			require.False(t, stored, "it is stored at position %d, although the answer was: %v", first, c.err)
			a.checkConflict(t, log, c)
		case c.receipt.Duplicate:
		default:
			require.True(t, stored, "it was acknowledged (%+v) and is not stored", c.receipt)
			require.Equal(t, use{first, last}, use{c.receipt.First, c.receipt.Last}, "where the receipt says it is")
			want := map[eventstore.Stream]eventstore.Revision{}
			for _, e := range log[first-1 : last] {
				want[e.Stream] = e.Revision()
			}
			require.Len(t, c.receipt.Revisions, len(want))
			for s, r := range want {
				require.Equal(t, r, c.receipt.Revision(s), "the revision of %s in the receipt", s)
			}
		}
		if !stored {
			continue
		}
		if c.commit.Key != "" {
			before, used := keys[c.commit.Key]
			require.True(t, !used || before == use{first, last}, "two commits with the key %q are stored", c.commit.Key)
			keys[c.commit.Key] = use{first, last}
		}
		for i := range c.commit.Conditions {
			checkHeld(t, log[:first-1], &c.commit.Conditions[i], first)
		}
	}
	require.Equal(t, len(log), claimed, "events in the log, and events that somebody has appended")
	for _, c := range a.told {
		if c.err == nil && c.receipt.Duplicate {
			require.Equal(t, keys[c.commit.Key], use{c.receipt.First, c.receipt.Last}, "the first receipt of key %q", c.commit.Key)
		}
	}
	rows, err := conn.Query(t.Context(), `SELECT key, first, last FROM `+pgx.Identifier{schema}.Sanitize()+`.keys`)
	require.NoError(t, err)
	defer rows.Close()
	there := 0
	for rows.Next() {
		var key string
		var first, last int64
		require.NoError(t, rows.Scan(&key, &first, &last))
		require.Equal(t, keys[key], use{eventstore.Position(first), eventstore.Position(last)}, "the key %q", key)
		there++
	}
	require.NoError(t, rows.Err())
	require.Len(t, keys, there, "keys in the database")
}

// checkHeld fails unless the condition holds on the log.
func checkHeld(t testing.TB, log []eventstore.Recorded, c *eventstore.Condition, at eventstore.Position) {
	t.Helper()
	var head eventstore.Recorded
	for i := range log {
		if c.Kind == eventstore.ConditionNoneMatch {
			require.False(t, log[i].Position > c.After && c.Query.Matches(&log[i]), "the commit at position %d is stored, although the event at position %d matches %+v after %d", at, log[i].Position, c.Query, c.After)
		} else if log[i].Stream == c.Stream {
			head = log[i]
		}
	}
	switch c.Kind {
	case eventstore.ConditionStreamAt:
		require.True(t, head.Version == c.Revision.Version && (c.Revision.Position == 0 || c.Revision.Position == head.Position) && (c.LastEvent == uuid.Nil || c.LastEvent == head.ID),
			"the commit at position %d is stored on the condition that %s is at %+v, and it was at %+v", at, c.Stream, c.Revision, head.Revision())
	case eventstore.ConditionStreamExists:
		require.NotZero(t, head.Version, "the commit at position %d is stored on the condition that %s exists", at, c.Stream)
	}
}

// checkConflict fails unless what the conflict names is, or was, there.
func (a *audit) checkConflict(t testing.TB, log []eventstore.Recorded, c told) {
	t.Helper()
	conflict, ok := errors.AsType[*eventstore.ConflictError](c.err)
	if !ok {
		return
	}
	switch conflict.Kind {
	case eventstore.ConditionNoneMatch:
		require.LessOrEqual(t, int(conflict.Found), len(log))
		require.True(t, conflict.Query.Matches(&log[conflict.Found-1]), "a conflict with position %d, which does not match", conflict.Found)
	case eventstore.ConditionStreamAt:
		if conflict.Actual.Version == 0 {
			return
		}
		require.LessOrEqual(t, int(conflict.Actual.Position), len(log))
		e := log[conflict.Actual.Position-1]
		require.True(t, e.Stream == conflict.Stream && e.Version == conflict.Actual.Version, "a conflict with %s at %+v, which is not in the log", conflict.Stream, conflict.Actual)
	}
}

// together runs fn n times at once and returns when all have ended.
func together(n int, fn func(i int)) {
	start := make(chan struct{})
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() {
			<-start
			fn(i)
		})
	}
	close(start)
	group.Wait()
}

// pool returns a pool that a test may configure.
func pool(t testing.TB, url string, change func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(url)
	require.NoError(t, err)
	config.MaxConns = 8
	if change != nil {
		change(config)
	}
	p, err := pgxpool.NewWithConfig(t.Context(), config)
	require.NoError(t, err)
	t.Cleanup(p.Close)
	return p
}

// openPool is openURL over a pool, which is closed after the store.
func openPool(t testing.TB, p *pgxpool.Pool, options ...Option) *Store {
	t.Helper()
	s, err := OpenPool(t.Context(), p, options...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// with sets unexported settings.
func with(set func(*settings)) Option {
	return func(s *settings) error { set(s); return nil }
}

func pgError(severity, unlocalized, code string) error {
	return fmt.Errorf("wrapped: %w", &pgconn.PgError{Severity: severity, SeverityUnlocalized: unlocalized, Code: code})
}
