package eventstoredb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/esdbserver"
)

// The client forgets a dead connection, unclosed, when another call asks for one
// before its supervisor has left it: a few goroutines that nobody can end.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("google.golang.org/grpc/internal/grpcsync.(*CallbackSerializer).run"),
		goleak.IgnoreAnyFunction("google.golang.org/grpc.(*addrConn).resetTransportAndUnlock"))
}

func server(t *testing.T) *esdbserver.Server {
	t.Helper()
	log := memory.New()
	s, err := esdbserver.Start(log)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		require.NoError(t, log.Close())
	})
	return s
}

// While many calls are made the server goes down and comes back, again and
// again. No call is left hanging in a client: every old client is closed, which
// happens only when its last call has returned.
func TestDriver_NoCallHangsInAClient(t *testing.T) {
	t.Parallel()
	s := server(t)
	d, err := New(s.URL(), nil)
	require.NoError(t, err)
	stop := make(chan struct{})
	var group sync.WaitGroup
	for i := range 40 {
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				if i%2 == 0 {
					_, _ = d.Append(ctx, fmt.Sprint("s", i), driver.Any, []driver.Event{{ID: uuid.New(), Type: "e"}})
				} else if r, err := d.ReadAll(ctx, driver.AllFrom{Start: true}, false, 1); err == nil {
					_, _ = r.Next(ctx)
					r.Close()
				}
				cancel()
			}
		})
	}
	for range 6 {
		before := d.Generations()
		s.Down()
		require.Eventually(t, func() bool { return d.Generations() > before }, time.Minute, time.Millisecond, "nobody noticed")
		require.NoError(t, s.Up())
		require.Eventually(t, func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := d.Append(ctx, "probe", driver.Any, []driver.Event{{ID: uuid.New(), Type: "e"}})
			return err == nil
		}, time.Minute, time.Millisecond)
	}
	close(stop)
	group.Wait()
	require.Eventually(t, func() bool { return d.pool.Old() <= 1 }, 20*time.Second, time.Millisecond, "a call hangs in a client that is not used any more")
	require.NoError(t, d.Close())
}

// What the client says is told apart as the notes list it.
func TestClassify(t *testing.T) {
	t.Parallel()
	wrapped := func(c codes.Code, text string) error { return fmt.Errorf("could not: %w", status.Error(c, text)) }
	for name, c := range map[string]struct {
		err  error
		want driver.Kind
	}{
		"wrong version as a status": {wrapped(codes.FailedPrecondition, "Append failed due to WrongExpectedVersion. Stream: s, Expected version: 7, Actual version: 0"), driver.WrongVersion},
		"tombstoned":                {wrapped(codes.FailedPrecondition, "Event stream 's' is deleted."), driver.Deleted},
		"too large":                 {wrapped(codes.InvalidArgument, "Maximum Append Size of 1048576 Exceeded."), driver.TooLarge},
		"too large a message":       {wrapped(codes.ResourceExhausted, "grpc: received message larger than max (20000000 vs. 17825792)"), driver.TooLarge},
		"no such position":          {wrapped(codes.InvalidArgument, "Trying to read from an invalid position."), driver.InvalidPosition},
		"no such position, older":   {wrapped(codes.Unknown, "Unexpected ReadAllResult: InvalidPosition"), driver.InvalidPosition},
		"a stream's name":           {wrapped(codes.FailedPrecondition, "Append failed due to WrongExpectedVersion. Stream: order-Invalid position, Expected version: 7, Actual version: 0"), driver.WrongVersion},
		"choosing a leader":         {wrapped(codes.Unknown, "No leader info available in response"), driver.Aborted},
		"no reason":                 {fmt.Errorf("could not send: %w", io.EOF), driver.Rejected},
		"cancelled":                 {wrapped(codes.Canceled, "context canceled"), driver.Ended},
		"late":                      {wrapped(codes.DeadlineExceeded, ""), driver.Timeout},
		"gone":                      {status.Error(codes.Unavailable, ""), driver.Unavailable},
		"slow consumer":             {status.Error(codes.Aborted, ""), driver.Aborted},
		"no rights":                 {wrapped(codes.PermissionDenied, ""), driver.Denied},
		"broken stream":             {status.Error(codes.Internal, "stream terminated by RST_STREAM with error code: INTERNAL_ERROR"), driver.Aborted},
		"anything":                  {errors.New("?"), driver.Unknown},
	} {
		got := classify(c.err)
		require.Equal(t, c.want, driver.KindOf(got), name)
		require.ErrorIs(t, got, c.err, name)
	}
	require.NoError(t, classify(nil))
}

// Cancellation is recognisable, with its cause, and says whether anything was
// sent.
func TestDriver_CancellationIsRecognisable(t *testing.T) {
	t.Parallel()
	s := server(t)
	d, err := New(s.URL(), nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	why := errors.New("the caller has gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	_, err = d.Append(ctx, "s", driver.Any, []driver.Event{{ID: uuid.New(), Type: "e"}})
	require.ErrorIs(t, err, why)
	require.Equal(t, driver.Ended, driver.KindOf(err))
	require.True(t, driver.Unsent(err))

	hung := make(chan struct{})
	s.Intercept(func(ctx context.Context, _ string) error {
		close(hung)
		<-ctx.Done()
		return ctx.Err()
	})
	ctx, cancel = context.WithCancelCause(t.Context())
	go func() {
		<-hung
		cancel(why)
	}()
	// The search for a server hangs: nothing is sent yet.
	_, err = d.Append(ctx, "s", driver.Any, []driver.Event{{ID: uuid.New(), Type: "e"}})
	require.ErrorIs(t, err, why)
	require.True(t, driver.Unsent(err))
	s.Intercept(nil)
}

// A node that follows does not answer a read that asks for the leader: the
// driver goes to the leader that it names. Others it answers itself.
func TestDriver_AsksTheLeader(t *testing.T) {
	t.Parallel()
	log := memory.New()
	defer log.Close()
	leader, err := esdbserver.Start(log)
	require.NoError(t, err)
	defer leader.Close()
	follower, err := esdbserver.Start(log)
	require.NoError(t, err)
	defer follower.Close()
	var asked atomic.Int64
	leader.Intercept(func(_ context.Context, method string) error {
		if strings.HasSuffix(method, "Streams/Read") {
			asked.Add(1)
		}
		return nil
	})
	host, text, err := net.SplitHostPort(leader.Address())
	require.NoError(t, err)
	port, err := strconv.Atoi(text)
	require.NoError(t, err)
	follower.FollowLeader(host, port)
	reads := map[string]func(*Driver, bool) (driver.Reader, error){
		"stream": func(d *Driver, leader bool) (driver.Reader, error) {
			return d.ReadStream(t.Context(), "$settings", driver.StreamFrom{Start: true, Leader: leader}, false, 1)
		},
		"all": func(d *Driver, leader bool) (driver.Reader, error) {
			return d.ReadAll(t.Context(), driver.AllFrom{End: true, Leader: leader}, true, 1)
		},
	}
	for name, read := range reads {
		d, err := New(follower.URL(), nil)
		require.NoError(t, err)
		next := func(leader bool) error {
			r, err := read(d, leader)
			require.NoError(t, err)
			defer r.Close()
			_, err = r.Next(t.Context())
			return err
		}
		before := asked.Load()
		require.NoError(t, next(false), name)
		require.Equal(t, before, asked.Load(), "%s: the follower answers by itself", name)
		err = next(true)
		require.Equal(t, driver.Unavailable, driver.KindOf(err), "%s: %v", name, err)
		require.True(t, driver.Transient(err))
		require.NoError(t, next(true), name)
		require.Equal(t, before+1, asked.Load(), "%s: the leader answers", name)
		require.NoError(t, d.Close())
	}
}

// proxy stands between, and can stop to forward what goes over the connections
// that it has, without closing them.
type proxy struct {
	net.Listener
	mu     sync.Mutex
	conns  []net.Conn
	frozen chan struct{}
	all    sync.WaitGroup
}

func between(t *testing.T, to string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{Listener: l, frozen: make(chan struct{})}
	p.all.Go(func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			into, err := net.Dial("tcp", to)
			if err != nil {
				from.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, from, into)
			frozen := p.frozen
			p.mu.Unlock()
			forward := func(dst, src net.Conn) {
				buffer := make([]byte, 32<<10)
				for {
					n, err := src.Read(buffer)
					select {
					case <-frozen: // swallowed
						n = 0
					default:
					}
					if _, failed := dst.Write(buffer[:n]); failed != nil || err != nil {
						return
					}
				}
			}
			p.all.Go(func() { forward(into, from) })
			p.all.Go(func() { forward(from, into) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			c.Close()
		}
		p.mu.Unlock()
		p.all.Wait()
	})
	return p
}

func (p *proxy) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.frozen)
	p.frozen = make(chan struct{})
}

// A connection that is dead without a word is not used for ever: whoever comes
// after a call that was never answered gets another one.
func TestDriver_ConnectionDeadWithoutAWord(t *testing.T) {
	t.Parallel()
	s := server(t)
	p := between(t, s.Address())
	d, err := New("esdb://"+p.Addr().String()+"?tls=false", nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	d.silence = 0
	events := []driver.Event{{ID: uuid.New(), Type: "e"}}
	_, err = d.Append(t.Context(), "s", driver.NoStream, events)
	require.NoError(t, err)
	p.freeze()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = d.Append(ctx, "s", 0, events)
	require.Equal(t, driver.Ended, driver.KindOf(err))
	require.False(t, driver.Unsent(err), "nobody knows what became of it")
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err = d.Append(ctx, "s", 0, events)
	require.NoError(t, err)
	require.Equal(t, 2, d.Generations())
}

// Looking for a reason writes nothing, whatever the stream is.
func TestDriver_ReasonWritesNothing(t *testing.T) {
	t.Parallel()
	s := server(t)
	d, err := New(s.URL(), nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	rejected := errors.New("rejected")
	end := func() driver.Position {
		r, err := d.ReadAll(t.Context(), driver.AllFrom{End: true}, true, 1)
		require.NoError(t, err)
		defer r.Close()
		e, err := r.Next(t.Context())
		require.NoError(t, err)
		return e.Position
	}
	events := []driver.Event{{ID: uuid.New(), Type: "e"}}
	for _, name := range []string{"missing", "there", "deleted", "tombstoned"} {
		if name != "missing" {
			_, err := d.Append(t.Context(), name, driver.NoStream, events)
			require.NoError(t, err)
		}
		switch name {
		case "deleted":
			_, err = d.Delete(t.Context(), name, driver.Any)
		case "tombstoned":
			_, err = d.Tombstone(t.Context(), name, driver.Any)
		}
		require.NoError(t, err)
		before := end()
		err := d.reason(t.Context(), name, rejected)
		if name == "tombstoned" {
			require.Equal(t, driver.Deleted, driver.KindOf(err))
		} else {
			require.Equal(t, rejected, err, name)
		}
		require.Equal(t, before, end(), name)
	}
}

// The client is pinned; what this driver needs of its insides is checked here.
func TestClientsInsides(t *testing.T) {
	t.Parallel()
	s := server(t)
	config, err := esdb.ParseConnectionString(s.URL())
	require.NoError(t, err)
	config.MaxDiscoverAttempts, config.DiscoveryInterval = 1, 1
	reported := make(chan error, 10)
	config.Logger = func(_ esdb.LogLevel, format string, args ...any) {
		for _, arg := range args {
			if err, ok := arg.(error); ok && format == "unexpected exception: %v" {
				reported <- err
			}
		}
	}
	client, err := esdb.NewClient(config)
	require.NoError(t, err)
	_, err = client.GetServerVersion()
	require.NoError(t, err)
	passed := 0
	ctx := passing{t.Context(), func() { passed++ }}
	_, err = client.AppendToStream(ctx, "s", esdb.AppendToStreamOptions{}, esdb.EventData{EventType: "e"})
	require.NoError(t, err)
	require.Positive(t, passed, "the client asks for the deadline once it has a connection")
	s.Down()
	for {
		_, err = client.AppendToStream(t.Context(), "s", esdb.AppendToStreamOptions{}, esdb.EventData{EventType: "e"})
		require.Error(t, err)
		if driver.KindOf(classify(err)) == driver.Unavailable {
			break
		}
		<-reported // while it sends, it says EOF
	}
	select {
	case err := <-reported:
		require.Equal(t, codes.Unavailable, status.Code(err), "the client reports the loss of its server before it looks for another")
	default:
		require.Fail(t, "the client did not report that its server has gone before the call returned")
	}
	require.NoError(t, client.Close())
}
