// Package supervisor keeps one live client of a server at a time, in
// generations: when one is found broken the next is made, and the old one is
// closed once its last call has returned. It is for clients that hang their
// callers, do not honour contexts, die for good, or must not be closed while
// they are used. It imports nothing of deed.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// ErrClosed: the supervisor was closed.
var ErrClosed = errors.New("the connection is closed")

// Config says how clients are made and closed.
type Config[C any] struct {
	// Connect makes a client and finds out that it works. Only one call runs at a
	// time. It may take as long as it likes: callers wait with their own contexts.
	// The generation is passed so that the client's callbacks can break it.
	Connect func(g *Generation[C]) (C, error)
	// Close closes a client that no call uses, or that is given up.
	Close func(C)
	// Backoff is the pause after the n-th failure in a row, n from 1 on.
	Backoff func(n int) time.Duration
	// Grace is how long Close waits for calls that do not return before it closes
	// the client under them.
	Grace time.Duration
}

// Supervisor owns the generations. Use New.
type Supervisor[C any] struct {
	config Config[C]
	base   context.Context
	stop   context.CancelFunc
	work   sync.WaitGroup // the connecting goroutine, calls, and whoever closes old clients

	mu         sync.Mutex
	closed     bool
	current    *Generation[C]
	connecting bool
	waiting    int
	changed    chan struct{} // closed and replaced when current or failure changes
	failure    error         // of the last attempt to connect
	failures   int           // in a row
	tried      time.Time     // when the last attempt to connect ended
	made       int           // generations so far
	old        map[*Generation[C]]struct{}
}

// Generation is one client and the calls on it.
type Generation[C any] struct {
	s      *Supervisor[C]
	client C

	mu       sync.Mutex
	broken   bool
	live     bool // Connect has succeeded
	starting int  // calls that may be within the part of the client that hangs
	calls    int  // calls that have not returned
	closed   bool
	idle     chan struct{} // closed when broken and nothing is starting
	done     chan struct{} // closed when broken and no call is left
}

// New returns a supervisor that has not connected yet.
func New[C any](config Config[C]) *Supervisor[C] {
	s := &Supervisor[C]{config: config, changed: make(chan struct{}), old: map[*Generation[C]]struct{}{}}
	s.base, s.stop = context.WithCancel(context.Background())
	return s
}

// Base ends when the supervisor is closed.
func (s *Supervisor[C]) Base() context.Context { return s.base }

// Generations returns how many clients were made.
func (s *Supervisor[C]) Generations() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.made
}

func (s *Supervisor[C]) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Do runs fn on a live client, in a goroutine of the supervisor's, and waits
// for it or for ctx. It returns false when fn was never called; fn may go on
// after ctx has ended, and must then keep what it gets to itself. A panic of
// the client becomes an error.
//
// Fn calls started as soon as the client has a connection for it.
func (s *Supervisor[C]) Do(ctx context.Context, fn func(g *Generation[C], client C, started func())) (called bool, err error) {
	done := make(chan error, 1)
	if err := s.Go(ctx, fn, func(err error) { done <- err }); err != nil {
		return false, err
	}
	select {
	case err := <-done:
		return true, err
	case <-ctx.Done():
		return true, context.Cause(ctx)
	}
}

// Go is Do without waiting: ctx is for getting at a live client. Ended is
// called when fn has returned, with an error if the client panicked.
func (s *Supervisor[C]) Go(ctx context.Context, fn func(g *Generation[C], client C, started func()), ended func(error)) error {
	g, err := s.acquire(ctx)
	if err != nil {
		return err
	}
	go func() {
		var once sync.Once
		// A client that hangs a call says nothing; nobody else must follow it there.
		watch := time.AfterFunc(startsWithin, g.refuse)
		started := func() {
			once.Do(func() {
				watch.Stop()
				g.started()
			})
		}
		defer g.release()
		defer started()
		defer func() {
			r := recover()
			switch {
			case r == nil:
				ended(nil)
			case g.isClosed(): // a client that is closed while it hangs panics in whoever hangs
				ended(fmt.Errorf("%w: %v", ErrClosed, r))
			default:
				ended(fmt.Errorf("the client panicked: %v", r))
			}
		}()
		fn(g, g.client, started)
	}()
	return nil
}

// acquire returns the current generation with a call counted on it, and waits
// for one as long as ctx allows.
func (s *Supervisor[C]) acquire(ctx context.Context) (*Generation[C], error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	s.mu.Lock()
	s.waiting++
	defer func() {
		s.mu.Lock()
		s.waiting--
		s.mu.Unlock()
	}()
	for {
		if s.closed {
			s.mu.Unlock()
			return nil, ErrClosed
		}
		if g := s.current; g != nil {
			if g.enter() {
				s.work.Add(1)
				s.mu.Unlock()
				return g, nil
			}
			s.current = nil
		}
		if !s.connecting {
			s.connecting = true
			s.work.Add(1)
			go s.connect()
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			s.mu.Lock()
			failure := s.failure
			s.mu.Unlock()
			if failure != nil {
				return nil, fmt.Errorf("%w: %w", context.Cause(ctx), failure)
			}
			return nil, context.Cause(ctx)
		}
		s.mu.Lock()
	}
}

// connect makes the next generation, with pauses between attempts, as long as
// somebody waits for it.
func (s *Supervisor[C]) connect() {
	defer s.work.Done()
	for {
		s.mu.Lock()
		if s.closed || s.waiting == 0 {
			s.connecting = false
			s.wake()
			s.mu.Unlock()
			return
		}
		pause := time.Duration(0)
		if s.failures > 0 {
			pause = s.config.Backoff(s.failures) - time.Since(s.tried)
		}
		s.mu.Unlock()
		if pause > 0 {
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-s.base.Done():
			}
			timer.Stop()
			if s.base.Err() != nil {
				continue
			}
		}
		g := &Generation[C]{s: s, idle: make(chan struct{}), done: make(chan struct{})}
		client, err := s.config.Connect(g)
		s.mu.Lock()
		s.made++
		s.tried = time.Now()
		if err != nil {
			s.failure = err
			s.failures++
			s.mu.Unlock()
			continue
		}
		g.client = client
		g.mu.Lock()
		g.live = true
		broken := g.broken
		g.mu.Unlock()
		s.old[g] = struct{}{}
		s.work.Add(1)
		go g.bury()
		if s.closed || broken {
			s.failures++
			s.mu.Unlock()
			g.refuse()
			continue
		}
		s.current, s.connecting, s.failure = g, false, nil
		s.wake()
		s.mu.Unlock()
		return
	}
}

// Succeeded says that a call on the generation has worked: the next failure is
// the first one again.
func (g *Generation[C]) Succeeded() {
	g.s.mu.Lock()
	g.s.failures = 0
	g.s.mu.Unlock()
}

// Failed breaks the generation because of an error; until a call has worked,
// the next ones are made with growing pauses. Unlike Break it does not wait: it
// is called when the client has returned, perhaps by a call that counts as
// starting itself.
func (g *Generation[C]) Failed(err error) {
	g.mu.Lock()
	first := !g.broken
	g.mu.Unlock()
	g.refuse()
	if first {
		g.s.mu.Lock()
		g.s.failure = err
		g.s.failures++
		g.s.mu.Unlock()
	}
}

// startsWithin bounds how long Break waits for calls that are starting. One that
// takes longer breaks its generation.
const startsWithin = 2 * time.Second

// Break lets no further call begin on the generation, and returns when those
// that are just beginning have passed the part of the client that can hang. A
// client that calls Break before it starts to look for another server can
// therefore hang nobody.
func (g *Generation[C]) Break() {
	g.refuse()
	timer := time.NewTimer(startsWithin)
	defer timer.Stop()
	select {
	case <-g.idle:
	case <-timer.C:
	}
}

// refuse lets no further call begin.
func (g *Generation[C]) refuse() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.broken = true
	g.settle()
}

// Broken reports whether Break was called.
func (g *Generation[C]) Broken() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.broken
}

// settle closes the channels that are due; g.mu is held.
func (g *Generation[C]) settle() {
	if !g.broken {
		return
	}
	if g.starting == 0 {
		closeOnce(g.idle)
	}
	if g.calls == 0 {
		closeOnce(g.done)
	}
}

func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

func (g *Generation[C]) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.broken {
		return false
	}
	g.starting++
	g.calls++
	return true
}

func (g *Generation[C]) started() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.starting--
	g.settle()
}

func (g *Generation[C]) release() {
	g.mu.Lock()
	g.calls--
	g.settle()
	g.mu.Unlock()
	g.s.work.Done()
}

func (g *Generation[C]) isClosed() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.closed
}

// bury closes the client when the generation is broken and its last call has
// returned, or when the supervisor is closed and the calls do not return.
func (g *Generation[C]) bury() {
	defer g.s.work.Done()
	select {
	case <-g.done:
	case <-g.s.base.Done():
		g.refuse()
		timer := time.NewTimer(g.s.config.Grace)
		select {
		case <-g.done:
		case <-timer.C:
		}
		timer.Stop()
	}
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.s.config.Close(g.client)
	g.s.mu.Lock()
	delete(g.s.old, g)
	g.s.mu.Unlock()
}

// Old returns how many generations have not been closed, the current one
// included.
func (s *Supervisor[C]) Old() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.old)
}

// Close refuses further calls, ends the base context, and returns when all
// calls have returned and all clients are closed. A call that hangs even in a
// client that was closed under it is given up after another grace.
func (s *Supervisor[C]) Close() error {
	s.mu.Lock()
	s.closed = true
	s.wake()
	s.mu.Unlock()
	s.stop()
	ended := make(chan struct{})
	go func() {
		s.work.Wait()
		close(ended)
	}()
	timer := time.NewTimer(3 * s.config.Grace)
	defer timer.Stop()
	select {
	case <-ended:
		return nil
	case <-timer.C:
		return fmt.Errorf("calls that do not return were given up: %w", ErrClosed)
	}
}
