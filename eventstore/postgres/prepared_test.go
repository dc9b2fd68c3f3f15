package postgres

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

// breather is a connection that calls back, once for all of its kind, when it has
// sent what comes before a text.
type breather struct {
	net.Conn
	before []byte
	once   *atomic.Bool
	call   func()
}

func (c *breather) Write(b []byte) (int, error) {
	at := bytes.Index(b, c.before)
	if at < 0 || !c.once.CompareAndSwap(false, true) {
		return c.Conn.Write(b)
	}
	n, err := c.Conn.Write(b[:at])
	if err != nil {
		return n, err
	}
	c.call()
	m, err := c.Conn.Write(b[at:])
	return n + m, err
}

func breathe(t testing.TB, url, before string, call func()) *Store {
	t.Helper()
	var once atomic.Bool
	return openPool(t, pool(t, url, func(config *pgxpool.Config) {
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &breather{conn, []byte(before), &once, call}, nil
		}
	}), always(formTwoTrips))
}

// Some statements of a connection are prepared, and others are not: it is made
// anew, since what is there cannot be prepared again.
func TestPrepare_FailsHalfway(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	require.NoError(t, openURL(t, url).Close())
	paused := false
	s := breathe(t, parameter(t, url, "statement_timeout", "500ms"), preparedTags, func() {
		time.Sleep(900 * time.Millisecond) // the server gives up
		paused = true
	})
	for i := range 3 {
		mustAppend(t, s, commit(event(account(fmt.Sprint(i)), "noted")))
	}
	require.True(t, paused)
}

// Statements that somebody has taken away are prepared again, on a new connection.
func TestPrepare_Deallocated(t *testing.T) {
	t.Parallel()
	for _, f := range []form{formCopy, formTwoTrips} {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			s := openURL(t, url, always(f))
			mustAppend(t, s, commit(event(account("a"), "noted")))
			conn := direct(t, url)
			do(t, conn, "CREATE TABLE public.times (n int)")
			do(t, conn, `CREATE FUNCTION public.take_away() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				IF NOT EXISTS (SELECT FROM public.times) THEN INSERT INTO public.times VALUES (1); EXECUTE 'DEALLOCATE "`+preparedLock+`"; DEALLOCATE "`+preparedEvents+`"'; END IF; RETURN NULL; END $$`)
			do(t, conn, "CREATE TRIGGER take_away AFTER INSERT ON deed.events FOR EACH STATEMENT EXECUTE FUNCTION public.take_away()")
			for i := range 3 {
				mustAppend(t, s, commit(event(account(fmt.Sprint(i)), "noted")))
			}
			require.Equal(t, 1, scalar[int](t, conn, "SELECT count(*) FROM public.times"))
			require.EqualValues(t, 4, scalar[int](t, conn, "SELECT count(*) FROM deed.events"))
		})
	}
}

// A proxy that keeps the settings of a connection to itself: who stops with the lock
// does not stop the others for longer than elsewhere.
func TestPrepare_SettingsAreSwallowed(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	require.NoError(t, openURL(t, url).Close())
	through := pgtest.Bouncer(t, url, pgtest.Settings{
		"pool_mode": "session", "default_pool_size": "60",
		"ignore_startup_parameters": "extra_float_digits,enable_seqscan,jit,default_transaction_isolation,idle_in_transaction_session_timeout,lock_timeout,tcp_keepalives_idle,tcp_keepalives_interval,tcp_keepalives_count,tcp_user_timeout,synchronous_commit",
	})
	other := openURL(t, through, always(formTwoTrips))
	mustAppend(t, other, commit(event(account("b"), "noted")))
	stopped, goOn := make(chan struct{}), make(chan struct{})
	s := breathe(t, through, string(copyHeader), func() { close(stopped); <-goOn })
	outcome := make(chan error, 1)
	go func() {
		_, err := s.Append(t.Context(), commit(event(account("a"), "noted")))
		outcome <- err
	}()
	<-stopped
	ctx, cancel := context.WithTimeout(t.Context(), waiting)
	defer cancel()
	_, err := other.Append(ctx, commit(event(account("b"), "noted")))
	close(goOn)
	require.NoError(t, err)
	require.NoError(t, <-outcome)
	require.Len(t, readAll(t, other, eventstore.OneStream(account("a"))), 1)
}
