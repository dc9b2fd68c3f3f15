package postgres

import (
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/pgtest"
)

// A process that is alone writes in one trip, takes the lock first while others
// write, and goes back when they have stopped. Behind a pooler it calls the function.
func TestForms_Switch(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s, other := openURL(t, url), openURL(t, url)
	write := func(to *Store) { mustAppend(t, to, commit(event(account("ann"), "noted"))) }
	for range 5 {
		write(s)
	}
	require.Equal(t, [3]uint64{5, 0, 0}, counted(s))
	for range 5 {
		write(other)
		write(s)
	}
	stats := counted(s)
	require.Equal(t, [3]uint64{5, 0, 5}, stats, "the others were seen too late")
	for range calmEnough + 2 {
		write(s)
	}
	require.Equal(t, uint64(5+2), counted(s)[0], "of those after the last of %d batches that found nobody else: %v", calmEnough, counted(s))

	pooled := openURL(t, url, Pooled())
	for range 3 {
		write(pooled)
	}
	require.Equal(t, [3]uint64{0, 3, 0}, counted(pooled))
}

// counted returns how many batches were copied, written by the function, and in two
// trips.
func counted(s *Store) [3]uint64 {
	stats := s.Stats()
	return [3]uint64{stats.Copies, stats.Calls, stats.DoubleTrips}
}

// How long the lock was waited for and held is told, by the server's clock, in each
// form: here the log's lock is somebody else's for a while, and then the table is.
func TestForms_LockIsTimed(t *testing.T) {
	t.Parallel()
	const long = 60 * time.Millisecond
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			s := openURL(t, url, always(f))
			mustAppend(t, s, commit(event(account("ann"), "noted")))
			conn, watcher := direct(t, url), direct(t, url)
			// meanwhile appends while somebody else has what the statement takes, and returns what was told.
			meanwhile := func(statement, locktype string, args ...any) (wait, hold time.Duration) {
				before := s.Stats()
				tx := begin(t, conn)
				_, err := tx.Exec(t.Context(), statement, args...)
				require.NoError(t, err)
				pending := s.Enqueue(t.Context(), commit(event(account("ann"), "noted")))
				eventually(t, func() bool {
					return scalar[int](t, watcher, "SELECT count(*) FROM pg_locks WHERE locktype = $1 AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())", locktype) == 1
				}, "the append does not wait")
				time.Sleep(long)
				require.NoError(t, tx.Commit(t.Context()))
				_, err = pending.Result()
				require.NoError(t, err)
				after := s.Stats()
				return after.LockWait - before.LockWait, after.LockHold - before.LockHold
			}
			wait, hold := meanwhile("SELECT pg_advisory_xact_lock($1)", "advisory", s.lock)
			require.GreaterOrEqual(t, wait, long, "somebody else had the lock")
			require.Positive(t, hold)
			_, hold = meanwhile("LOCK TABLE deed.events IN SHARE ROW EXCLUSIVE MODE", "relation")
			require.GreaterOrEqual(t, hold, long, "it had the lock, and waited for the table")
		})
	}
}

// The server gives up a session that appends when nothing comes from its client, and
// whoever waits for the lock looks after a while for who has it.
func TestOpen_Timeouts(t *testing.T) {
	t.Parallel()
	s := openURL(t, pgtest.Database(t))
	conn, err := pgx.ConnectConfig(t.Context(), s.config)
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close(t.Context())) }()
	tcp := conn.PgConn().Conn().RemoteAddr().Network() == "tcp"
	for name, want := range map[string]string{
		"lock_timeout": "3s", "idle_in_transaction_session_timeout": "5s", "tcp_user_timeout": "10000",
		"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3",
		"default_transaction_isolation": "read committed", "enable_seqscan": "off", "jit": "off",
	} {
		if strings.HasPrefix(name, "tcp_") && !tcp {
			continue // it says 0 on a socket of the machine
		}
		require.Equal(t, want, scalar[string](t, conn, "SELECT current_setting($1)", name), name)
	}
}

// What an acknowledged append survives is said of appends, and not of the session
// that is asked.
func TestStore_Durability(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	do(t, direct(t, url), "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$")
	for _, options := range [][]Option{nil, {Pooled()}} {
		text, err := openURL(t, url, options...).Durability(t.Context())
		require.NoError(t, err)
		require.Contains(t, text, "synchronous_commit=on")
	}
	text, err := openURL(t, url, SynchronousCommit("off")).Durability(t.Context())
	require.NoError(t, err)
	require.Contains(t, text, "not durable")
	require.Contains(t, text, "synchronous_commit=off")
}
