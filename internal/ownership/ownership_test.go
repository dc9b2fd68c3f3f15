package ownership

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// board is a directory in memory, with a clock of its own.
type board struct {
	mu      sync.Mutex
	skew    time.Duration
	members map[string]note
	looks   int
	joins   int
}

type note struct {
	Member
	until time.Time
}

// calls returns how many there were since it was asked last.
func (b *board) calls() (looks, joins int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	looks, joins = b.looks, b.joins
	b.looks, b.joins = 0, 0
	return looks, joins
}

func newBoard() *board { return &board{skew: -time.Hour, members: map[string]note{}} }

// link is how one node reaches the board.
type link struct {
	*board
	mu       sync.Mutex
	broken   bool          // calls fail at once
	hanging  bool          // calls end with their context
	slow     time.Duration // each call takes so long
	replaced bool          // the next Join finds that somebody has its place
	stuck    chan struct{} // calls end when it is closed, whatever their context
	hints    chan struct{}
}

var errBroken = errors.New("no route to host")

func (l *link) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
}

func (l *link) pass(ctx context.Context) error {
	l.mu.Lock()
	broken, hanging, slow, stuck := l.broken, l.hanging, l.slow, l.stuck
	l.mu.Unlock()
	switch {
	case stuck != nil:
		<-stuck
		return ctx.Err()
	case hanging:
		<-ctx.Done()
		return ctx.Err()
	case broken:
		return errBroken
	case slow > 0:
		select {
		case <-time.After(slow):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return ctx.Err()
}

func (l *link) Join(ctx context.Context, self Member, ttl time.Duration) error {
	if err := l.pass(ctx); err != nil {
		return err
	}
	l.mu.Lock()
	replaced := l.replaced
	l.replaced = false
	l.mu.Unlock()
	l.board.mu.Lock()
	defer l.board.mu.Unlock()
	l.joins++
	if replaced {
		delete(l.board.members, self.Name)
		return fmt.Errorf("slot 3: %w", ErrReplaced)
	}
	l.board.members[self.Name] = note{Member: self, until: time.Now().Add(l.skew + ttl)}
	return nil
}

func (l *link) Leave(ctx context.Context, name string) error {
	if err := l.pass(ctx); err != nil {
		return err
	}
	l.board.mu.Lock()
	defer l.board.mu.Unlock()
	delete(l.board.members, name)
	return nil
}

func (l *link) Members(ctx context.Context) ([]Member, error) {
	if err := l.pass(ctx); err != nil {
		return nil, err
	}
	l.board.mu.Lock()
	defer l.board.mu.Unlock()
	l.looks++
	var all []Member
	for _, n := range l.board.members {
		if time.Now().Add(l.skew).Before(n.until) {
			all = append(all, n.Member)
		}
	}
	return all, nil
}

// announcing is a link that tells of changes.
type announcing struct{ *link }

func (a announcing) Watch(context.Context) (<-chan struct{}, error) { return a.hints, nil }

// node is a group that runs, and notes who has what.
type node struct {
	t     *testing.T
	link  *link
	group *Group
	units map[string]*Unit
	stop  func() error
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func start(t *testing.T, b *board, name string, units ...string) *node {
	t.Helper()
	n := &node{t: t, link: &link{board: b}, units: map[string]*Unit{}}
	n.group = New(n.link, Options{Name: name, Logger: quiet()})
	for _, u := range units {
		n.units[u] = n.group.Offer(u)
	}
	n.run()
	return n
}

func (n *node) run() {
	ctx, cancel := context.WithCancel(n.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.group.Run(ctx) }()
	var once sync.Once
	var err error
	n.stop = func() error {
		once.Do(func() { cancel(); err = <-ended })
		return err
	}
	n.t.Cleanup(func() { cancel(); n.link.set(func() { n.link.hanging = false }) })
}

func (n *node) owns() []string {
	var all []string
	for name, u := range n.units {
		if u.Valid() {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

// shared fails unless each unit is owned once, and says by whom.
func shared(t *testing.T, units []string, nodes ...*node) map[string]*node {
	t.Helper()
	owners := map[string]*node{}
	for _, n := range nodes {
		for _, u := range n.owns() {
			require.Nil(t, owners[u], "%s has two owners", u)
			owners[u] = n
		}
	}
	require.Len(t, owners, len(units), "units that somebody owns")
	return owners
}

func spread(d []time.Duration) string {
	slices.Sort(d)
	return fmt.Sprintf("%d times: min %s, median %s, max %s", len(d), d[0], d[len(d)/2], d[len(d)-1])
}

func TestGroup_DividesWork(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b, units := newBoard(), names("unit", 10)
		one := start(t, b, "one", units...)
		time.Sleep(time.Millisecond)
		require.Len(t, one.owns(), 10, "who is alone has everything, at once")
		two := start(t, b, "two", units...)
		time.Sleep(150 * time.Millisecond)
		shared(t, units, one, two)
		require.Len(t, one.owns(), 5)
		three := start(t, b, "three", units...)
		time.Sleep(150 * time.Millisecond)
		shared(t, units, one, two, three)
		require.GreaterOrEqual(t, len(three.owns()), 3)
		time.Sleep(5 * time.Minute)
		shared(t, units, one, two, three)
		for _, n := range []*node{one, two, three} {
			require.NoError(t, n.stop())
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		require.Empty(t, b.members)
	})
}

// The time until every unit of a node that ends has another owner.
func TestGroup_Takeover(t *testing.T) {
	t.Parallel()
	for _, kind := range []struct {
		name  string
		limit time.Duration
	}{{"graceful", 200 * time.Millisecond}, {"killed", 12 * time.Second}} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var took []time.Duration
				for round := range 20 {
					b, units := newBoard(), names("unit", 9)
					var nodes []*node
					for i := range 3 {
						nodes = append(nodes, start(t, b, fmt.Sprintf("node-%d-%d", round, i), units...))
					}
					for _, n := range nodes {
						n.link.set(func() { n.link.slow = 2 * time.Millisecond })
					}
					time.Sleep(20*time.Second + time.Duration(round)*377*time.Millisecond)
					shared(t, units, nodes...)
					began := time.Now()
					if kind.name == "killed" {
						// What it has said is all there is; nobody hears from it again.
						nodes[0].link.set(func() { nodes[0].link.hanging = true })
					} else {
						require.NoError(t, nodes[0].stop())
						require.Empty(t, nodes[0].owns())
					}
					for len(nodes[1].owns())+len(nodes[2].owns()) < len(units) {
						require.Less(t, time.Since(began), kind.limit)
						time.Sleep(time.Millisecond)
					}
					took = append(took, time.Since(began))
					shared(t, units, nodes...)
					for _, n := range nodes {
						n.stop()
					}
				}
				t.Log(kind.name, spread(took))
			})
		})
	}
}

// A node that is cut off gives everything up before another one has it.
func TestGroup_CutOff(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"broken", "hanging"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := newBoard()
				one := start(t, b, "one", "u")
				ctx, err := one.units["u"].Wait(t.Context())
				require.NoError(t, err)
				two := start(t, b, "two", "v")
				u := two.group.Offer("u")
				time.Sleep(time.Minute)
				require.NoError(t, ctx.Err(), "while both live nothing moves")
				began := time.Now()
				one.link.set(func() { one.link.broken, one.link.hanging = how == "broken", how == "hanging" })
				var ended, taken time.Duration
				context.AfterFunc(ctx, func() { ended = time.Since(began) })
				_, err = u.Wait(t.Context())
				require.NoError(t, err)
				taken = time.Since(began)
				synctest.Wait()
				require.Positive(t, ended)
				require.Less(t, ended, taken)
				require.ErrorIs(t, context.Cause(ctx), ErrDeadline)
				require.ErrorIs(t, ctx.Err(), context.Canceled)
				t.Logf("given up after %s, taken after %s", ended, taken)

				// It comes back, and the unit where the assignment says.
				one.link.set(func() { one.link.broken, one.link.hanging = false, false })
				time.Sleep(5 * time.Second)
				shared(t, []string{"u"}, one, &node{units: map[string]*Unit{"u": u}})
				one.stop()
				two.stop()
			})
		})
	}
}

// A directory was away for a while, shorter than memberships last. Who leaves just
// after that is followed as soon as ever, or nearly so.
func TestGroup_LeavesAfterAnOutage(t *testing.T) {
	t.Parallel()
	for outage := 2500 * time.Millisecond; outage < 4500*time.Millisecond; outage += 130 * time.Millisecond {
		synctest.Test(t, func(t *testing.T) {
			b := newBoard()
			units := []string{"a", "b", "c", "d"}
			one, two := start(t, b, "one", units...), start(t, b, "two", units...)
			time.Sleep(time.Minute)
			shared(t, units, one, two)
			for _, n := range []*node{one, two} {
				n.link.set(func() { n.link.broken = true })
			}
			time.Sleep(outage)
			for _, n := range []*node{one, two} {
				n.link.set(func() { n.link.broken = false })
			}
			began := time.Now()
			one.stop()
			for len(two.owns()) < len(units) {
				time.Sleep(time.Millisecond)
			}
			require.LessOrEqual(t, time.Since(began), 300*time.Millisecond, "after %s", outage)
			two.stop()
		})
	}
}

// A process that was stopped finds that its time is up before any timer fires.
func TestUnit_PausedProcess(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBoard()
		n := start(t, b, "one", "u")
		ctx, err := n.units["u"].Wait(t.Context())
		require.NoError(t, err)
		child, cancel := context.WithCancel(ctx)
		defer cancel()
		// As if it did not run: Run hangs in a call, and the timer does not fire.
		stuck := make(chan struct{})
		n.link.set(func() { n.link.stuck = stuck })
		time.Sleep(time.Second)
		n.group.mu.Lock()
		n.group.deadline.Stop()
		n.group.mu.Unlock()
		time.Sleep(time.Minute)
		require.Error(t, ctx.Err())
		require.False(t, n.units["u"].Valid())
		require.Error(t, child.Err(), "what was made from it has ended with it")
		require.ErrorIs(t, context.Cause(child), ErrDeadline)
		n.link.set(func() { n.link.stuck = nil })
		close(stuck)
		require.NoError(t, n.stop())
	})
}

// An outage that is shorter than the deadline moves nothing; longer ones, again
// and again, move ever less.
func TestGroup_DirectoryFlaps(t *testing.T) {
	t.Parallel()
	for _, flap := range []struct {
		down, up time.Duration
		most     int
		least    int
	}{{3 * time.Second, 2 * time.Second, 0, 59000}, {9 * time.Second, 3 * time.Second, 45, 20000}} {
		t.Run(flap.down.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := newBoard()
				nodes := []*node{start(t, b, "one", "u"), start(t, b, "two", "u")}
				time.Sleep(10 * time.Second)
				owner := shared(t, []string{"u"}, nodes...)["u"]
				moves, owned := 0, 0
				for began := time.Now(); time.Since(began) < 10*time.Minute; {
					for _, down := range []bool{true, false} {
						for _, n := range nodes {
							n.link.set(func() { n.link.broken = down })
						}
						for end := time.Now().Add(map[bool]time.Duration{true: flap.down, false: flap.up}[down]); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
							for _, n := range nodes {
								if len(n.owns()) > 0 {
									owned++
									if n != owner {
										moves, owner = moves+1, n
									}
								}
							}
						}
					}
				}
				t.Logf("in 10 minutes %d outages of %s, %d moves; owned for %s", 10*time.Minute/(flap.down+flap.up), flap.down, moves, time.Duration(owned)*10*time.Millisecond)
				require.LessOrEqual(t, moves, flap.most)
				require.Greater(t, owned, flap.least, "hundredths of a second in which somebody owned it")
				for _, n := range nodes {
					n.link.set(func() { n.link.broken = false })
				}
				time.Sleep(2 * longestAbsence)
				shared(t, []string{"u"}, nodes...)
				for _, n := range nodes {
					n.stop()
				}
			})
		})
	}
}

func TestGroup_Replaced(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBoard()
		n := start(t, b, "one", "u")
		ctx, err := n.units["u"].Wait(t.Context())
		require.NoError(t, err)
		n.link.set(func() { n.link.replaced = true })
		<-ctx.Done()
		require.ErrorIs(t, context.Cause(ctx), ErrDeadline)
		_, err = n.units["u"].Wait(t.Context())
		require.NoError(t, err, "it joins again")
		n.stop()
	})
}

// Nodes get what they offer, and nothing else: also while they change.
func TestGroup_Offers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBoard()
		old := start(t, b, "old", "a", "b@1")
		time.Sleep(time.Second)
		young := start(t, b, "young", "a", "b@2")
		time.Sleep(time.Second)
		require.Contains(t, old.owns(), "b@1")
		require.Contains(t, young.owns(), "b@2")
		owner, other := old, young
		if slices.Contains(young.owns(), "a") {
			owner, other = young, old
		}
		ctx, err := owner.units["a"].Wait(t.Context())
		require.NoError(t, err)
		owner.units["a"].Withdraw()
		owner.units["a"].Withdraw()
		require.ErrorIs(t, context.Cause(ctx), ErrWithdrawn, "at once")
		_, err = owner.units["a"].Wait(t.Context())
		require.ErrorIs(t, err, ErrWithdrawn)
		require.ErrorContains(t, err, `"a"`)
		began := time.Now()
		_, err = other.units["a"].Wait(t.Context())
		require.NoError(t, err)
		require.Less(t, time.Since(began), 200*time.Millisecond)
		again := owner.group.Offer("a")
		require.NotSame(t, owner.units["a"], again)
		require.Same(t, again, owner.group.Offer("a"))
		old.stop()
		young.stop()
	})
}

// A unit that moves to a living member ends with that cause.
func TestGroup_Moved(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBoard()
		one := start(t, b, "one", "a", "b")
		type work struct{ ctx context.Context }
		var works []work
		for _, u := range []string{"a", "b"} {
			ctx, err := one.units[u].Wait(t.Context())
			require.NoError(t, err)
			works = append(works, work{ctx})
		}
		two := start(t, b, "two", "a", "b")
		time.Sleep(time.Second)
		var causes []string
		for _, w := range works {
			causes = append(causes, fmt.Sprint(context.Cause(w.ctx)))
		}
		require.Contains(t, causes, ErrMoved.Error())
		require.Contains(t, causes, "<nil>")
		one.stop()
		synctest.Wait()
		for _, w := range works {
			require.Error(t, w.ctx.Err())
		}
		_, err := one.units["a"].Wait(t.Context())
		require.ErrorIs(t, err, ErrEnded)
		require.ErrorIs(t, one.group.Run(t.Context()), ErrEnded)
		two.stop()
	})
}

func TestGroup_WithoutDirectory(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := New(nil, Options{})
		u := g.Offer("u")
		ctx, err := u.Wait(t.Context())
		require.NoError(t, err)
		run, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- g.Run(run) }()
		synctest.Wait()
		began := time.Now()
		time.Sleep(1000 * time.Hour)
		require.Equal(t, 1000*time.Hour, time.Since(began))
		require.True(t, g.Offer("v").Valid())
		require.NoError(t, ctx.Err())
		cancel()
		require.NoError(t, <-ended)
		require.ErrorIs(t, context.Cause(ctx), ErrEnded)
		require.False(t, u.Valid())
		require.False(t, g.Offer("w").Valid(), "nothing begins after the end")
	})
}

// A node that offers nothing says and asks nothing; looks are bounded, however
// many nodes there are.
func TestGroup_LooksAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBoard()
		idle := start(t, b, "idle")
		time.Sleep(time.Minute)
		looks, joins := b.calls()
		require.Zero(t, looks+joins)
		var nodes []*node
		for i := range 50 {
			nodes = append(nodes, start(t, b, fmt.Sprint("node-", i), "u"))
		}
		time.Sleep(time.Minute)
		b.calls()
		time.Sleep(time.Minute)
		looks, joins = b.calls()
		t.Logf("50 nodes: %.1f looks and %.1f renewals a second", float64(looks)/60, float64(joins)/60)
		require.Less(t, looks, 60*115)
		require.Less(t, joins, 60*16)
		for _, n := range append(nodes, idle) {
			require.NoError(t, n.stop())
		}
	})
}

func TestGroup_Hints(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBoard()
		l := &link{board: b, hints: make(chan struct{}, 1)}
		g := New(announcing{l}, Options{Name: "two", Logger: quiet()})
		n := &node{t: t, link: l, group: g, units: map[string]*Unit{"u": g.Offer("u")}}
		n.run()
		_, err := n.units["u"].Wait(t.Context())
		require.NoError(t, err)
		b.calls()
		time.Sleep(10 * time.Second)
		looks, _ := b.calls()
		require.Less(t, looks, 15, "it looks seldom")
		l.hints <- struct{}{}
		synctest.Wait()
		looks, _ = b.calls()
		require.Equal(t, 1, looks)
		close(l.hints)
		time.Sleep(10 * time.Second)
		looks, _ = b.calls()
		require.Greater(t, looks, 5, "also when hints have ended")
		n.stop()
	})
}

// Whoever waits is let go when its own context ends, and one unit's context can
// be another's parent.
func TestUnit_Wait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBoard()
		one := start(t, b, "one", "u", "v")
		ended, cancel := context.WithCancelCause(t.Context())
		ctx, err := one.units["u"].Wait(ended)
		require.NoError(t, err)
		inner, err := one.units["v"].Wait(ctx)
		require.NoError(t, err)
		cancel(errBroken)
		require.ErrorIs(t, context.Cause(inner), errBroken)
		_, err = one.units["u"].Wait(ctx)
		require.ErrorIs(t, err, errBroken)
		synctest.Wait()
		require.Empty(t, one.units["u"].contexts, "nothing is kept of contexts that have ended")
		foreign := New(&link{board: b}, Options{}).Offer("u")
		soon, stop := context.WithTimeout(t.Context(), time.Minute)
		defer stop()
		_, err = foreign.Wait(soon)
		require.ErrorIs(t, err, context.DeadlineExceeded, "a group that does not run owns nothing")
		one.stop()
	})
}

// A stop that cannot be told says so.
func TestGroup_LeaveFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := start(t, newBoard(), "one", "u")
		time.Sleep(time.Second)
		n.link.set(func() { n.link.broken = true })
		err := n.stop()
		require.ErrorIs(t, err, errBroken)
		require.True(t, strings.HasPrefix(err.Error(), "leave"), err)
	})
}
