package logreader

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sort"
	"sync"

	"github.com/deed-go/deed/eventstore"
)

// Options bound what a [Reader] keeps. The zero value is a good choice.
type Options struct {
	// Events and Bytes (of data) bound the windows of all groups together: one that
	// exceeds its share drops what is oldest. What is read ahead of the fastest
	// member, at most two batches of the store, does not count. Default to 16384
	// events and 16 MiB.
	Events int
	Bytes  int
}

const (
	// nearby is by how many positions subscribers may be apart and yet wait for one
	// another, once, to share from then on.
	nearby = 4096
	// ahead is how many batches are read before anybody has asked for them.
	ahead = 2
	// idle is the part of its share that a group at the head keeps of what all
	// members have.
	idle = 8
)

// Reader reads a log for its subscribers. It has nothing to be closed: without
// subscribers it has no goroutines. All methods may be called concurrently.
type Reader struct {
	store   eventstore.Store
	options Options

	mu     sync.Mutex
	groups []*group // with members, oldest first
	made   uint64   // groups so far
	apart  bool     // the store refuses unions of queries
}

// New returns a reader of the store's log.
func New(store eventstore.Store, o Options) *Reader {
	if o.Events <= 0 {
		o.Events = 16384
	}
	if o.Bytes <= 0 {
		o.Bytes = 16 << 20
	}
	return &Reader{store: store, options: o}
}

// group is what shares one subscription of the store. The reader's lock guards it.
type group struct {
	id      uint64
	query   eventstore.Query
	members map[*member]struct{}

	chunks []*chunk            // the window
	from   eventstore.Position // the window begins after it
	tip    eventstore.Position // everything up to here was read
	events int                 // in the window, with one more for each chunk
	bytes  int
	// news counts what the store has yielded; atHead says that the last of it was
	// the head of the log.
	news   uint64
	atHead bool

	// closed: nothing more is read, and the members go on elsewhere.
	closed bool
	// before are closed groups whose members it is meant for, too.
	before []*group
	// excess: the query may ask for more than the members do.
	excess  bool
	failure error

	changed chan struct{} // closed and replaced with whatever concerns members
	wanted  chan struct{} // holds a token when the goroutine should look again
	stop    context.CancelFunc
	done    chan struct{} // closed when the goroutine has ended
}

// chunk is a batch of the store. But for its memos it is not changed.
type chunk struct {
	events  []eventstore.Recorded
	through eventstore.Position
	bytes   int
	memos   memos
}

// member is one subscriber. The reader's lock guards it, but for what it has
// from the beginning.
type member struct {
	query  eventstore.Query
	filter *filter

	group *group
	// whole: the member's query selects whatever the group reads.
	whole bool
	at    eventstore.Position
	begun bool // it has yielded something
	// floor is a head of the log since the member subscribed; floored: it is known.
	// What was the head before then is not said to be.
	floor   eventstore.Position
	floored bool
	tried   uint64 // the group's news that did not tell of the head
	// left are groups of which the member was the last.
	left []*group
}

// Batch is an [eventstore.Batch] whose events other subscribers may have, too:
// neither the slice nor what it holds may be changed.
type Batch struct {
	eventstore.Batch

	chunk  *chunk
	shared bool
	offset int   // of the events in the chunk
	index  []int // unless it is nil: the place of each event in the chunk
}

// Memo returns what the subscribers that have the i-th event share of it; nil if
// there is nobody to share it with.
func (b *Batch) Memo(i int) *Memo {
	if !b.shared {
		return nil
	}
	if b.index != nil {
		i = b.index[i]
	}
	return b.chunk.memos.at(len(b.chunk.events), b.offset+i)
}

// Subscribe does what the store's Subscribe does, by its contract, except that
// the events in a batch must not be changed: others may have the same slice.
func (r *Reader) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		for b, err := range r.Follow(ctx, q, after) {
			if !yield(b.Batch, err) {
				return
			}
		}
	}
}

// Follow is [Reader.Subscribe] for those who share what they make of events.
func (r *Reader) Follow(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[Batch, error] {
	return func(yield func(Batch, error) bool) {
		if err := q.Validate(); err != nil {
			yield(Batch{}, err)
			return
		}
		m := &member{query: q, filter: newFilter(q), at: after}
		defer r.leave(m)
		for {
			b, err := r.next(ctx, m)
			if errors.Is(err, errEnded) {
				return // as the store's subscription did
			}
			if !yield(b, err) || err != nil {
				return
			}
		}
	}
}

// next waits for the member's next batch.
func (r *Reader) next(ctx context.Context, m *member) (Batch, error) {
	for {
		if err := ctx.Err(); err != nil {
			return Batch{}, err
		}
		s := r.look(ctx, m)
		switch {
		case s.err != nil:
			return Batch{}, s.err
		case s.wait != nil:
			select {
			case <-s.wait:
			case <-ctx.Done():
			}
			continue
		}
		if s.caughtUp && !m.floored {
			// It was the head when it was read. That may have been before the member
			// subscribed, and whoever does so after an append relies on the answer.
			head, err := r.store.Head(ctx)
			if err != nil {
				return Batch{}, err
			}
			m.floor, m.floored = head, true
		}
		s.caughtUp = s.caughtUp && s.through >= m.floor
		if b, ok := r.take(m, s); ok {
			return b, nil
		}
	}
}

// sight is what a member sees when it looks.
type sight struct {
	chunk    *chunk // nil: there is nothing beyond where the member is
	through  eventstore.Position
	caughtUp bool // when it was read
	whole    bool
	shared   bool
	err      error
	wait     <-chan struct{} // for something to look at
}

// look finds what follows for the member, in whichever group.
func (r *Reader) look(ctx context.Context, m *member) sight {
	r.mu.Lock()
	defer r.mu.Unlock()
	for moved := false; ; {
		g := m.group
		if g == nil {
			r.join(m, r.place(ctx, m))
			continue
		}
		if m.at < g.from {
			g.excess = true // until it is back
			r.part(m)
			continue
		}
		if !moved && g.reads() && len(r.groups) > 1 {
			// Once, so that three groups of which each seems better than the one before
			// are no circle.
			moved = true
			if to := r.better(ctx, m); to != nil {
				r.part(m)
				r.join(m, to)
				continue
			}
		}
		if i := sort.Search(len(g.chunks), func(i int) bool { return g.chunks[i].through > m.at }); i < len(g.chunks) {
			c := g.chunks[i]
			return sight{
				chunk: c, through: c.through, whole: m.whole, shared: len(g.members) > 1,
				caughtUp: g.atHead && i == len(g.chunks)-1,
			}
		}
		if !m.begun && m.at == g.tip && g.atHead && m.tried != g.news {
			m.tried = g.news
			return sight{through: m.at, caughtUp: true}
		}
		if g.closed {
			to := r.place(ctx, m)
			r.part(m)
			r.join(m, to)
			continue
		}
		if err := g.failure; err != nil {
			wider := !covers(m.query, g.query)
			r.part(m)
			if wider && g.news == 0 && refused(err) {
				r.apart = true
				continue
			}
			return sight{err: err}
		}
		g.ask()
		return sight{wait: g.changed}
	}
}

// refused reports whether another query could succeed.
func refused(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, eventstore.ErrTooLarge) || errors.Is(err, eventstore.ErrInvalid)
}

// take moves the member on and makes its batch. Without anything to tell there
// is none.
func (r *Reader) take(m *member, s sight) (Batch, bool) {
	if s.chunk == nil && !s.caughtUp {
		return Batch{}, false
	}
	r.mu.Lock()
	at := m.at
	m.at, m.begun = s.through, true
	m.group.ask()
	r.mu.Unlock()
	b := Batch{Batch: eventstore.Batch{Through: s.through, CaughtUp: s.caughtUp}}
	if s.chunk == nil {
		return b, true
	}
	b.chunk, b.shared = s.chunk, s.shared
	all := s.chunk.events
	b.offset = sort.Search(len(all), func(i int) bool { return all[i].Position > at })
	b.Events = all[b.offset:len(all):len(all)]
	if !s.whole {
		b.Events, b.index = m.filter.pick(b.Events)
	}
	return b, true
}

// join makes the member one of the group.
func (r *Reader) join(m *member, g *group) {
	g.members[m] = struct{}{}
	m.group, m.tried = g, 0
	m.whole = covers(m.query, g.query)
	g.ask()
}

// part takes the member out of its group, which ends with its last one.
func (r *Reader) part(m *member) {
	g := m.group
	m.group = nil
	delete(g.members, m)
	if len(g.members) > 0 {
		g.ask() // another one is the fastest now
		return
	}
	g.closed, g.chunks = true, nil
	g.stop()
	r.groups = slices.DeleteFunc(r.groups, func(other *group) bool { return other == g })
	m.left = append(slices.DeleteFunc(m.left, (*group).ended), g)
}

// leave is for good. It waits for the goroutines that have nobody else.
func (r *Reader) leave(m *member) {
	r.mu.Lock()
	if m.group != nil {
		m.group.excess = true
		r.part(m)
	}
	r.mu.Unlock()
	for _, g := range m.left {
		<-g.done
	}
}

// serves reports whether the group reads what the member needs, and is close.
func (r *Reader) serves(g *group, m *member) bool {
	return g.reads() && g.from <= m.at && m.at <= g.tip+nearby &&
		covers(g.query, m.query) && (!r.apart || covers(m.query, g.query))
}

// place finds a group for the member, or makes one; for all members of the one
// it is in, if any, which is closed.
func (r *Reader) place(ctx context.Context, m *member) *group {
	var best *group
	for _, g := range r.groups {
		if r.serves(g, m) && (best == nil || g.tip > best.tip) {
			best = g
		}
	}
	if best != nil {
		return best
	}
	for _, g := range r.groups {
		// One whose window has moved past the member has nothing to wait for.
		if g.reads() && near(g.front(), m.at) && !covers(g.query, m.query) {
			if united := r.unite(ctx, m, g); united != nil {
				return united
			}
		}
	}
	if m.group != nil {
		if united := r.unite(ctx, m, m.group); united != nil {
			return united
		}
	}
	return r.begin(ctx, clone(m.query), m.at)
}

// better finds a group that the member should rather be in than in its own.
func (r *Reader) better(ctx context.Context, m *member) *group {
	g := m.group
	front := g.front()
	for _, other := range r.groups {
		switch theirs := other.front(); {
		case other == g || !other.reads():
		case !near(theirs, front):
			if theirs > front && r.serves(other, m) {
				return other
			}
		case covers(other.query, g.query):
			// Of two alike the older one, so that everybody decides alike.
			if (!covers(g.query, other.query) || other.id < g.id) && r.serves(other, m) {
				return other
			}
		case !covers(g.query, other.query) && near(theirs, m.at):
			if united := r.unite(ctx, m, other); united != nil {
				return united
			}
		}
	}
	return nil
}

// unite closes the group and the member's own, and begins one for the members
// of both, where the first of them will need it; nil if one query cannot be
// theirs all.
func (r *Reader) unite(ctx context.Context, m *member, g *group) *group {
	if r.apart {
		return nil
	}
	from, meant := min(m.at, g.tip), []*group{g}
	if own := m.group; own != nil && own != g {
		from, meant = min(from, own.tip), append(meant, own)
	}
	queries := []eventstore.Query{m.query}
	for _, each := range meant {
		queries = each.queries(queries)
	}
	q, ok := union(queries)
	if !ok {
		return nil
	}
	for _, each := range meant {
		each.close()
	}
	united := r.begin(ctx, q, from)
	united.before = meant
	return united
}

// queries adds those of the members, and of whoever has yet to come.
func (g *group) queries(to []eventstore.Query) []eventstore.Query {
	for m := range g.members {
		to = append(to, m.query)
	}
	g.before = slices.DeleteFunc(g.before, (*group).forsaken)
	for _, b := range g.before {
		to = b.queries(to)
	}
	return to
}

// forsaken reports whether nobody will come from the group any more.
func (g *group) forsaken() bool {
	g.before = slices.DeleteFunc(g.before, (*group).forsaken)
	return len(g.members) == 0 && len(g.before) == 0
}

func near(a, b eventstore.Position) bool { return max(a, b)-min(a, b) <= nearby }

// front is where the fastest member is.
func (g *group) front() eventstore.Position {
	_, fastest := g.reach()
	return fastest
}

// begin starts a group.
func (r *Reader) begin(ctx context.Context, q eventstore.Query, from eventstore.Position) *group {
	// It outlives the call that needs it first.
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	r.made++
	g := &group{
		id: r.made, query: q, members: map[*member]struct{}{}, from: from, tip: from,
		changed: make(chan struct{}), wanted: make(chan struct{}, 1), stop: stop, done: make(chan struct{}),
	}
	r.groups = append(r.groups, g)
	go r.read(ctx, g, from)
	return g
}

// reads reports whether there is more to come.
func (g *group) reads() bool { return !g.closed && g.failure == nil }

func (g *group) ended() bool {
	select {
	case <-g.done:
		return true
	default:
		return false
	}
}

// close ends the reading. Members take what there is.
func (g *group) close() {
	g.closed = true
	g.stop()
	g.wake()
}

func (g *group) wake() {
	close(g.changed)
	g.changed = make(chan struct{})
}

// ask has the goroutine look whether somebody needs more.
func (g *group) ask() {
	select {
	case g.wanted <- struct{}{}:
	default:
	}
}

// errEnded: the store's subscription ended without an error.
var errEnded = errors.New("the subscription ended although nobody ended it")

// read is the group's goroutine.
func (r *Reader) read(ctx context.Context, g *group, from eventstore.Position) {
	defer close(g.done)
	failure := errEnded
	for b, err := range r.store.Subscribe(ctx, g.query, from) {
		if err == nil {
			err = r.publish(g, b)
		}
		if err != nil {
			failure = err
			break
		}
		if !r.needed(ctx, g) {
			return
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !g.closed {
		g.failure = failure
		g.wake()
	}
}

// publish shows the members what was read.
func (r *Reader) publish(g *group, b eventstore.Batch) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if g.closed {
		return nil // the members, if any, have been told where it ends
	}
	if b.Through < g.tip || b.Through == g.tip && len(b.Events) > 0 {
		return fmt.Errorf("%w: the store's subscription is at position %d and yields what is up to %d", eventstore.ErrGap, g.tip, b.Through)
	}
	if b.Through > g.tip {
		c := &chunk{events: b.Events, through: b.Through}
		for i := range b.Events {
			c.bytes += len(b.Events[i].Data)
		}
		g.chunks = append(g.chunks, c)
		g.events += len(c.events) + 1
		g.bytes += c.bytes
	}
	g.tip, g.atHead = b.Through, b.CaughtUp
	g.news++
	r.drop(g)
	g.before = slices.DeleteFunc(g.before, (*group).forsaken)
	if g.excess {
		g.excess = false
		if q, ok := union(g.queries(nil)); ok && !covers(q, g.query) {
			g.close()
			return nil
		}
	}
	g.wake()
	return nil
}

// drop keeps the window within the group's share: at the head, within a part of
// it where all members have taken what is in it. What nobody has yet is kept, so
// that there is always one who gets on.
func (r *Reader) drop(g *group) {
	slowest, fastest := g.reach()
	share := len(r.groups)
	for n, c := range g.chunks {
		part := share
		if c.through <= slowest && g.atHead {
			part *= idle
		}
		if c.through > fastest || n == len(g.chunks)-1 || g.events <= r.options.Events/part && g.bytes <= r.options.Bytes/part {
			g.chunks = slices.Delete(g.chunks, 0, n)
			return
		}
		g.from = c.through
		g.events -= len(c.events) + 1
		g.bytes -= c.bytes
	}
}

// reach returns where the slowest and the fastest member are.
func (g *group) reach() (slowest, fastest eventstore.Position) {
	first := true
	for m := range g.members {
		if first || m.at < slowest {
			slowest = m.at
		}
		fastest, first = max(fastest, m.at), false
	}
	return slowest, fastest
}

// needed waits until a member has asked for more than there is, or soon will;
// false when the group has ended.
func (r *Reader) needed(ctx context.Context, g *group) bool {
	for {
		r.mu.Lock()
		_, fastest := g.reach()
		spare := len(g.chunks) - sort.Search(len(g.chunks), func(i int) bool { return g.chunks[i].through > fastest })
		r.mu.Unlock()
		if ctx.Err() != nil {
			return false
		}
		if spare < ahead {
			return true
		}
		select {
		case <-g.wanted:
		case <-ctx.Done():
			return false
		}
	}
}
