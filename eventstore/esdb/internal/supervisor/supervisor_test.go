package supervisor_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore/esdb/internal/supervisor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// client is one that can be told to hang.
type client struct {
	n      int
	hang   chan struct{} // closed by Close: whoever hangs panics
	closed atomic.Bool
	using  atomic.Int64
}

type generation = supervisor.Generation[*client]

// factory makes clients.
type factory struct {
	mu      sync.Mutex
	made    []*client
	failing error
	connect func() // called within Connect
}

func (f *factory) new() *supervisor.Supervisor[*client] {
	return supervisor.New(supervisor.Config[*client]{
		Connect: func(*generation) (*client, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.connect != nil {
				f.connect()
			}
			if f.failing != nil {
				return nil, f.failing
			}
			c := &client{n: len(f.made) + 1, hang: make(chan struct{})}
			f.made = append(f.made, c)
			return c, nil
		},
		Close: func(c *client) {
			c.closed.Store(true)
			close(c.hang)
		},
		Backoff: func(int) time.Duration { return time.Millisecond },
		Grace:   50 * time.Millisecond,
	})
}

func (f *factory) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failing = err
}

// Callers wait for one attempt to connect, each with a context of its own.
func TestDo_WaitersKeepTheirDeadlines(t *testing.T) {
	t.Parallel()
	blocked, release := make(chan struct{}), make(chan struct{})
	f := &factory{connect: sync.OnceFunc(func() { close(blocked); <-release })}
	s := f.new()
	const callers = 50
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	failures := make(chan error, callers)
	for range callers {
		all.Go(func() {
			called, err := s.Do(ctx, func(*generation, *client, func()) { t.Error("called without a connection") })
			if called {
				t.Error("it says that it was called")
			}
			failures <- err
		})
	}
	<-blocked
	cancel()
	all.Wait() // although Connect still hangs
	for range callers {
		require.ErrorIs(t, <-failures, context.Canceled)
	}
	close(release)
	called, err := s.Do(t.Context(), func(_ *generation, c *client, _ func()) { require.Equal(t, 1, c.n) })
	require.NoError(t, err)
	require.True(t, called)
	require.NoError(t, s.Close())
	require.Len(t, f.made, 1, "one attempt for all")
}

// A broken generation is used by nobody new, and closed when its last call has
// returned, not before.
func TestBreak_ClosesAfterTheLastCall(t *testing.T) {
	t.Parallel()
	f := &factory{}
	s := f.new()
	inside, leave := make(chan *client), make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		_, err := s.Do(t.Context(), func(_ *generation, c *client, started func()) {
			started()
			inside <- c
			<-leave
			if c.closed.Load() {
				t.Error("closed under a call")
			}
		})
		require.NoError(t, err)
	})
	old := <-inside
	_, err := s.Do(t.Context(), func(g *generation, c *client, started func()) {
		require.Same(t, old, c)
		started()
		g.Failed(errors.New("the server has gone"))
	})
	require.NoError(t, err)
	_, err = s.Do(t.Context(), func(_ *generation, c *client, _ func()) { require.NotSame(t, old, c) })
	require.NoError(t, err)
	require.False(t, old.closed.Load())
	require.Equal(t, 2, s.Old())
	close(leave)
	all.Wait()
	require.Eventually(t, func() bool { return old.closed.Load() && s.Old() == 1 }, time.Minute, time.Millisecond)
	require.NoError(t, s.Close())
}

// Break returns when no call is between its beginning and its connection: what
// would hang them can be done after it.
func TestBreak_WaitsForThoseWhoStart(t *testing.T) {
	t.Parallel()
	f := &factory{}
	s := f.new()
	starting, go1 := make(chan *generation), make(chan struct{})
	var passed atomic.Bool
	var all sync.WaitGroup
	all.Go(func() {
		_, err := s.Do(t.Context(), func(g *generation, _ *client, started func()) {
			starting <- g
			<-go1
			passed.Store(true)
			started()
		})
		require.NoError(t, err)
	})
	g := <-starting
	broken := make(chan bool)
	go func() {
		g.Break()
		broken <- passed.Load()
	}()
	require.Eventually(t, g.Broken, time.Minute, time.Millisecond)
	close(go1)
	require.True(t, <-broken, "Break returned while a call was starting")
	all.Wait()
	require.NoError(t, s.Close())
}

// A call that hangs returns to its caller with his context, and its goroutine
// is ended by Close, by closing the client under it.
func TestClose_EndsCallsThatHang(t *testing.T) {
	t.Parallel()
	f := &factory{}
	s := f.new()
	ctx, cancel := context.WithCancel(t.Context())
	hanging := make(chan struct{})
	go func() {
		<-hanging
		cancel()
	}()
	called, err := s.Do(ctx, func(_ *generation, c *client, _ func()) {
		close(hanging)
		<-c.hang
		panic("send on closed channel")
	})
	require.True(t, called)
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, s.Close())
	require.Zero(t, s.Old())
	_, err = s.Do(t.Context(), func(*generation, *client, func()) {})
	require.ErrorIs(t, err, supervisor.ErrClosed)
	require.NoError(t, s.Close())
}

// A panic of the client is an error of that call.
func TestDo_PanicsAreErrors(t *testing.T) {
	t.Parallel()
	f := &factory{}
	s := f.new()
	called, err := s.Do(t.Context(), func(*generation, *client, func()) { panic("unreachable code") })
	require.True(t, called)
	require.ErrorContains(t, err, "unreachable code")
	_, err = s.Do(t.Context(), func(*generation, *client, func()) {})
	require.NoError(t, err)
	require.NoError(t, s.Close())
}

// While nothing can be reached it is tried again as long as somebody waits; what
// failed last is in the error of those who gave up.
func TestDo_TriesAgain(t *testing.T) {
	t.Parallel()
	refused := errors.New("connection refused")
	f := &factory{failing: refused}
	s := f.new()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err := s.Do(ctx, func(*generation, *client, func()) {})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorIs(t, err, refused)
	done := make(chan error)
	go func() {
		_, err := s.Do(t.Context(), func(*generation, *client, func()) {})
		done <- err
	}()
	before := s.Generations()
	require.Eventually(t, func() bool { return s.Generations() > before+2 }, time.Minute, time.Millisecond)
	f.fail(nil)
	require.NoError(t, <-done)
	require.NoError(t, s.Close())
}
