// Package ownership says which of many equal nodes should do which piece of
// background work. It imports nothing of deed.
//
// Nodes find each other in a [Directory], which judges by its own clock who is
// alive. Every node looks there and computes the same assignment of units to
// those members that offer them. There is no leader, and nothing is agreed on:
// for a moment two nodes may both take a unit for theirs. Ownership is who should
// try, so that work is spread evenly and moves quickly; what makes it safe is the
// epoch of the work's own lease, which is checked where the work is committed.
//
// # What it costs, and how fast it is
//
// A node renews its membership every third of [Options.TTL] and looks every 100
// ms, or every 10 ms times the number of members if that is longer: all nodes
// together look at most about 100 times a second. A node that stops leaves, and
// the others have its units with their next look: within 100 ms and the time of
// two calls, up to ten members, or at once where the directory tells of it. A node
// that dies is a member until the directory's TTL has passed, and is followed within
// the next look: with the default after 10 seconds at most, and that look.
//
// # When the directory fails
//
// Nothing moves while it cannot be reached. A node that could neither renew nor
// look for four fifths of the TTL owns nothing from then on, before the others
// can see it gone; the deadline is local, and monotonic. A process that was
// stopped for longer finds [Unit.Valid] false and the contexts' Err set, before
// timers have fired. On Linux that clock stands still while the whole machine is
// suspended: then, too, the epoch decides.
//
// A node that has lost its membership joins again, and if that happens again
// and again, later each time, unless there is work that none of the others can
// do: a directory that comes and goes does not make work go to and fro. Who comes back first and finds nobody else waits a moment before
// it takes everything, since the others may be about to come back as well.
package ownership

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Member is a living node and the units of work that it offers to do. A unit's
// name says everything that a node must know to do it: where versions of the
// code differ in what they can do, the version too.
type Member struct {
	Name  string
	Units []string
}

// Directory is where nodes find each other. All methods may be called
// concurrently. One that can tell of changes also has a method
//
//	Watch(ctx context.Context) (<-chan struct{}, error)
//
// whose channel receives when it is worth to look, until ctx ends. It is a hint;
// nodes look, less often, all the same.
type Directory interface {
	// Join makes the node a member until ttl from some moment after the call, or
	// extends that, with the units it offers. It fails with [ErrReplaced] when
	// somebody else has its place; the next call makes it a member anew.
	Join(ctx context.Context, self Member, ttl time.Duration) error
	// Leave ends a membership at once; one that has ended is no error.
	Leave(ctx context.Context, name string) error
	// Members returns those alive by the directory's own clock.
	Members(ctx context.Context) ([]Member, error)
}

type watcher interface {
	Watch(ctx context.Context) (<-chan struct{}, error)
}

// The causes of the end of contexts that [Unit.Wait] returns, besides that of the
// context it was given.
var (
	// ErrMoved: the unit is another living member's now.
	ErrMoved = errors.New("the work has moved to another node")
	// ErrDeadline: the node could not renew its membership in time, or was found to
	// be no member; others may have its work.
	ErrDeadline = errors.New("this node could not renew its membership in time")
	// ErrWithdrawn: the node does not offer the unit any more. Wait returns it, too.
	ErrWithdrawn = errors.New("the work is not offered any more")
	// ErrEnded: the node has stopped taking part. Wait returns it, too.
	ErrEnded = errors.New("this node has stopped taking part in the work")
)

// ErrReplaced is what [Directory.Join] returns when somebody else has the place
// of the member.
var ErrReplaced = errors.New("another node has taken the place of this member")

// Options tune a [Group]. The zero value is a good choice.
type Options struct {
	// Name is this node's, unlike that of every other. Defaults to a random one.
	Name string
	// TTL is for how long a node that has said nothing is alive. Defaults to 10 s.
	TTL time.Duration
	// Look is how often members are looked up at least; more seldom with more than
	// ten members. Defaults to 100 ms, and to a second where the directory can
	// tell of changes.
	Look time.Duration
	// Logger hears of memberships lost and directories that fail. Defaults to
	// slog.Default().
	Logger *slog.Logger
}

// LookOften is how often members are looked up where nothing tells of changes.
const LookOften = 100 * time.Millisecond

const (
	lookWatched = time.Second
	// lookShare is how much later everybody looks for each member there is.
	lookShare = 10 * time.Millisecond
	// longestAbsence bounds for how long a node that has lost its membership again
	// and again leaves the work to others; forgiven is when losses do not count any more.
	longestAbsence = time.Minute
	forgiven       = 10 * time.Minute
)

// Group is one node's view of who does what: which units are its own. All
// methods may be called concurrently.
type Group struct {
	directory Directory
	options   Options

	changed chan struct{} // what is offered, for Run

	mu       sync.Mutex
	units    map[string]*Unit
	running  bool
	ended    bool
	version  int // of what is offered
	joined   time.Time
	looked   time.Time
	member   bool        // until deadline
	deadline *time.Timer // ends it

	losses int       // of the membership, each not long after the one before
	lostAt time.Time // the last time

	// What follows belongs to Run.
	tried    bool      // to join
	told     int       // the version of what is offered that the directory knows
	beat     time.Time // when to renew
	back     time.Time // since when it is a member again; zero: for the first time
	failures int       // in a row
	seen     []Member  // by the last look, in the order of their names
	owners   map[string]string
}

// New returns a node's group. Without a directory there is no other node: all
// that is offered is its own at once, until Run, which need not be called,
// ends; nothing is looked up and nothing ticks.
func New(d Directory, o Options) *Group {
	if o.Name == "" {
		o.Name = uuid.NewString()
	}
	if o.TTL <= 0 {
		o.TTL = 10 * time.Second
	}
	if o.Look <= 0 {
		o.Look = LookOften
		if _, ok := d.(watcher); ok {
			o.Look = lookWatched
		}
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return &Group{directory: d, options: o, changed: make(chan struct{}, 1), units: map[string]*Unit{}}
}

// Name returns the node's name.
func (g *Group) Name() string { return g.options.Name }

// Unit is a piece of work that this node can do.
type Unit struct {
	group *Group
	name  string

	// Guarded by the group's mutex.
	owned     bool
	withdrawn bool
	acquired  chan struct{} // closed when something of this changes that Wait waits for
	contexts  map[*owned]struct{}
}

// Offer says that the node can do the unit, before Run or while it runs. A unit
// that is offered already is returned as it is.
func (g *Group) Offer(unit string) *Unit {
	g.mu.Lock()
	defer g.mu.Unlock()
	if u, ok := g.units[unit]; ok {
		return u
	}
	u := &Unit{group: g, name: unit, acquired: make(chan struct{}), contexts: map[*owned]struct{}{}}
	g.units[unit] = u
	u.owned = g.directory == nil && !g.ended
	g.offersChanged()
	return u
}

// offersChanged is called with the mutex held.
func (g *Group) offersChanged() {
	g.version++
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

// Withdraw ends the offer: contexts of the unit are cancelled, and others get
// it. The unit is of no more use; offering it again makes a new one.
func (u *Unit) Withdraw() {
	g := u.group
	g.mu.Lock()
	defer g.mu.Unlock()
	if u.withdrawn {
		return
	}
	u.withdrawn = true
	delete(g.units, u.name)
	u.end(ErrWithdrawn)
	close(u.acquired)
	g.offersChanged()
}

// end is called with the group's mutex held.
func (u *Unit) end(cause error) {
	u.owned = false
	for c := range u.contexts {
		c.cancel(cause)
	}
	clear(u.contexts)
}

// begin is called with the group's mutex held.
func (u *Unit) begin() {
	if !u.owned {
		u.owned = true
		close(u.acquired)
		u.acquired = make(chan struct{})
	}
}

// Valid reports whether the unit is this node's, by the clock and not only by
// what timers have done: to be asked before something that relies on it.
func (u *Unit) Valid() bool {
	u.group.mu.Lock()
	defer u.group.mu.Unlock()
	return u.valid()
}

func (u *Unit) valid() bool {
	u.group.expire()
	return u.owned
}

// Wait blocks until the unit is this node's. The context that it returns is a
// child of ctx that is cancelled as soon as the unit is not this node's any more,
// with one of the causes of this package; its own Err, unlike that of contexts
// made from it, looks at the clock. What the context takes is freed when it or
// ctx ends. Wait fails when ctx ends, with [ErrWithdrawn] and with [ErrEnded].
func (u *Unit) Wait(ctx context.Context) (context.Context, error) {
	g := u.group
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		// Not under the mutex: ctx may be another unit's, whose Err takes it.
		inner, cancel := context.WithCancelCause(ctx)
		g.mu.Lock()
		switch {
		case u.withdrawn:
			g.mu.Unlock()
			cancel(nil)
			return nil, fmt.Errorf("wait for %q: %w", u.name, ErrWithdrawn)
		case g.ended:
			g.mu.Unlock()
			cancel(nil)
			return nil, fmt.Errorf("wait for %q: %w", u.name, ErrEnded)
		case u.valid():
			c := &owned{Context: inner, cancel: cancel, unit: u}
			u.contexts[c] = struct{}{}
			g.mu.Unlock()
			context.AfterFunc(inner, c.forget)
			return c, nil
		}
		acquired := u.acquired
		g.mu.Unlock()
		cancel(nil)
		select {
		case <-acquired:
		case <-ctx.Done():
		}
	}
}

// owned is the context of a unit that is this node's.
type owned struct {
	context.Context
	cancel context.CancelCauseFunc
	unit   *Unit
}

// Err implements context.Context. It notices a deadline that has passed before
// the timer has.
func (c *owned) Err() error {
	c.unit.Valid()
	return c.Context.Err()
}

func (c *owned) forget() {
	c.unit.group.mu.Lock()
	defer c.unit.group.mu.Unlock()
	delete(c.unit.contexts, c)
}

// patience is how long one call of the directory may take.
func (g *Group) patience() time.Duration { return g.options.TTL / 5 }

// until is when the node ceases to be sure of what it knows: it is counted from
// the beginning of the last calls that succeeded, and earlier than the directory
// forgets the node.
func (g *Group) until() time.Time {
	oldest := g.joined
	if g.looked.Before(oldest) {
		oldest = g.looked
	}
	return oldest.Add(g.options.TTL - g.options.TTL/5)
}

// expire ends the membership if its time has passed. Called with the mutex held.
func (g *Group) expire() {
	if g.member && !time.Now().Before(g.until()) {
		g.lose()
	}
}

// lose ends the membership. Called with the mutex held.
func (g *Group) lose() {
	if !g.member {
		return
	}
	now := time.Now()
	if now.Sub(g.lostAt) > forgiven {
		g.losses = 0
	}
	g.losses++
	g.lostAt = now
	g.resign(ErrDeadline)
	g.options.Logger.Warn("this node has lost its membership; others may have its work", "node", g.options.Name, "leaves_it_for", g.absence())
}

// absence is for how long the node stays away, counted from when it was lost.
func (g *Group) absence() time.Duration {
	if g.losses < 2 {
		return 0
	}
	return min(g.options.TTL/5<<min(g.losses-2, 16), longestAbsence)
}

// resign gives up all that the node owns. Called with the mutex held.
func (g *Group) resign(cause error) {
	if g.deadline != nil {
		g.deadline.Stop()
	}
	g.member = false
	for _, u := range g.units {
		u.end(cause)
	}
}

// Run takes part until ctx ends. Then it gives up everything and leaves, so
// that others have the work at once; the error says that this failed, in which
// case they have it when the TTL has passed. A group runs once.
func (g *Group) Run(ctx context.Context) error {
	g.mu.Lock()
	if g.running || g.ended {
		g.mu.Unlock()
		return fmt.Errorf("%w: make a new group", ErrEnded)
	}
	g.running = true
	g.mu.Unlock()
	if g.directory == nil {
		<-ctx.Done()
		g.end()
		return nil
	}
	hints := g.watch(ctx)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-g.changed:
		case _, more := <-hints:
			if !more {
				hints = nil
			}
		case <-ctx.Done():
			g.end()
			if !g.tried {
				return nil
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.patience())
			defer cancel()
			if err := g.directory.Leave(ctx, g.options.Name); err != nil {
				return fmt.Errorf("leave the other nodes: %w", err)
			}
			return nil
		}
		timer.Reset(g.step(ctx))
	}
}

func (g *Group) watch(ctx context.Context) <-chan struct{} {
	w, ok := g.directory.(watcher)
	if !ok {
		return nil
	}
	hints, err := w.Watch(ctx)
	if err != nil {
		g.options.Logger.Warn("changes of the other nodes are not announced; they are looked for", "node", g.options.Name, "error", err)
		return nil
	}
	return hints
}

func (g *Group) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
	g.resign(ErrEnded)
	for _, u := range g.units {
		close(u.acquired)
		u.acquired = make(chan struct{})
	}
}

// idle is how long a node sleeps that has nothing to offer; an offer wakes it.
const idle = time.Hour

// step renews the membership if it is time, looks, and returns when to come again.
func (g *Group) step(ctx context.Context) time.Duration {
	g.mu.Lock()
	g.expire()
	units, version, member := slices.Sorted(maps.Keys(g.units)), g.version, g.member
	away := time.Until(g.lostAt.Add(g.absence()))
	g.mu.Unlock()
	switch {
	case len(units) == 0 && !g.tried:
		return idle
	case !member && away > 0:
		members, err := g.members(ctx)
		if err != nil {
			return g.failed(ctx, "look for", err)
		}
		g.failures = 0
		if offered(members, units) {
			return min(away, g.options.TTL/10)
		}
	}
	if began := time.Now(); !member || g.told != version || !began.Before(g.beat) {
		if err := g.join(ctx, units, began); err != nil {
			return g.failed(ctx, "join", err)
		}
		g.told, g.beat = version, began.Add(g.options.TTL/3)
	}
	began := time.Now()
	members, err := g.members(ctx)
	if err != nil {
		return g.failed(ctx, "look for", err)
	}
	g.failures = 0
	g.settle(members, began)
	interval := max(g.options.Look, time.Duration(len(members))*lookShare)
	return interval - rand.N(interval/10+1)
}

// offered reports whether somebody can do all of the units.
func offered(members []Member, units []string) bool {
	by := map[string]bool{}
	for _, m := range members {
		for _, u := range m.Units {
			by[u] = true
		}
	}
	return !slices.ContainsFunc(units, func(u string) bool { return !by[u] })
}

// failed returns when to try again: soon enough that who leaves just after the
// directory has come back does not wait for it.
func (g *Group) failed(ctx context.Context, what string, err error) time.Duration {
	if ctx.Err() == nil && g.failures == 0 {
		g.options.Logger.Warn("cannot "+what+" the other nodes; it is tried again, and until then all stays as it is for a while", "node", g.options.Name, "error", err)
	}
	g.failures++
	wait := min(g.options.TTL/100<<min(g.failures, 4), g.options.TTL/40)
	return wait - rand.N(wait/10+1)
}

func (g *Group) join(ctx context.Context, units []string, began time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, g.patience())
	defer cancel()
	g.tried = true
	err := g.directory.Join(ctx, Member{Name: g.options.Name, Units: units}, g.options.TTL)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.expire() // of the time that the call took, too
	if errors.Is(err, ErrReplaced) {
		g.lose()
	}
	if err != nil {
		return err
	}
	g.joined = began
	if !g.member {
		// What was known of the others is of another time.
		g.member, g.looked = true, began
		if g.losses > 0 {
			g.back = time.Now()
		}
	}
	g.extend()
	return nil
}

// extend sets the timer. Called with the mutex held.
func (g *Group) extend() {
	left := time.Until(g.until())
	if g.deadline == nil {
		g.deadline = time.AfterFunc(left, func() {
			g.mu.Lock()
			defer g.mu.Unlock()
			g.expire()
		})
		return
	}
	g.deadline.Reset(left)
}

func (g *Group) members(ctx context.Context) ([]Member, error) {
	ctx, cancel := context.WithTimeout(ctx, g.patience())
	defer cancel()
	return g.directory.Members(ctx)
}

// settle takes over what the members are.
func (g *Group) settle(members []Member, began time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.expire()
	if !g.member {
		return
	}
	if !slices.ContainsFunc(members, func(m Member) bool { return m.Name == g.options.Name }) {
		g.lose()
		return
	}
	g.looked = began
	g.extend()
	if len(members) == 1 && time.Since(g.back) < g.options.TTL/10 {
		return
	}
	members = slices.SortedFunc(slices.Values(members), func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	if !slices.EqualFunc(members, g.seen, func(a, b Member) bool { return a.Name == b.Name && slices.Equal(a.Units, b.Units) }) {
		g.seen, g.owners = members, assign(members)
	}
	for name, u := range g.units {
		if g.owners[name] == g.options.Name {
			u.begin()
		} else if u.owned {
			u.end(ErrMoved)
		}
	}
}
