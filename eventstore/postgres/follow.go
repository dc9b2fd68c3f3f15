package postgres

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/tail"
)

// follower keeps the tail at the head of the log: with what this process has
// just committed, and with what others have, which it learns of by
// notifications and, whatever becomes of those, by looking.
type follower struct {
	s      *Store
	tail   *tail.Tail
	wake   chan struct{}
	failed atomic.Pointer[error] // why nobody can follow any more
	done   chan struct{}         // closed with failed set

	followers atomic.Int64 // subscriptions that want the tail to move
	hint      atomic.Uint64
	awaits    atomic.Uint64 // transactions of the program's that have appended
	awaited   atomic.Uint64 // where the last of them ends
	heard     atomic.Bool   // a notification has come since the last look by time
	listening atomic.Bool

	mu sync.Mutex // of appending to the tail
}

func newFollower(s *Store, t *tail.Tail) *follower {
	return &follower{s: s, tail: t, wake: make(chan struct{}, 1), done: make(chan struct{})}
}

func (f *follower) close() { f.tail.Close() }

// committed takes what this process has committed.
func (f *follower) committed(events []eventstore.Recorded) {
	f.mu.Lock()
	head := f.tail.Head()
	fits := events[0].Position == head+1
	if fits {
		f.tail.Append(events)
	}
	f.mu.Unlock()
	if !fits && events[len(events)-1].Position > head {
		f.expect(events[len(events)-1].Position) // others have written in between
	}
}

// expect says that the log has come at least so far.
func (f *follower) expect(p eventstore.Position) {
	raise(&f.hint, uint64(p))
	poke(f.wake)
}

// await says that a transaction of the program's own, once it is committed, will have
// brought the log so far.
func (f *follower) await(p eventstore.Position) {
	f.awaited.Store(uint64(p))
	f.awaits.Add(1)
	poke(f.wake)
}

// raise stores the number unless a larger one is there.
func raise(to *atomic.Uint64, n uint64) {
	for {
		if now := to.Load(); now >= n || to.CompareAndSwap(now, n) {
			return
		}
	}
}

// lookout is how the follower looks for what was awaited. It is used by one goroutine.
type lookout struct {
	count    uint64              // of what was awaited so far
	position eventstore.Position // where it is over
	seen     eventstore.Position
	until    time.Time
	pause    time.Duration // until the next look; 0: there is nothing to look for
}

// mostAwaited is how long it is looked for: most transactions have been committed by
// then, and the others are seen like those of other processes.
const mostAwaited = 10 * time.Second

// begin takes up what was awaited since, and reports whether the next look is sooner
// than it was.
func (l *lookout) begin(count uint64, p eventstore.Position) bool {
	if count == l.count {
		return false
	}
	sooner := l.pause != shortestPoll
	l.count, l.position, l.until, l.pause = count, p, time.Now().Add(mostAwaited), shortestPoll
	return sooner
}

// looked is told how far the log has come, and reports whether others are to be told.
// What was awaited may never come, and less than that may.
func (l *lookout) looked(head eventstore.Position) bool {
	if l.pause == 0 {
		return false
	}
	news := head > l.seen
	l.seen = max(l.seen, head)
	if l.pause = min(2*l.pause, longestPoll); head >= l.position || time.Now().After(l.until) {
		l.pause = 0
	}
	return news
}

// within is the time until the next look, where that is due anyway after the pause.
func (l *lookout) within(pause time.Duration) time.Duration {
	if l.pause == 0 {
		return pause
	}
	return min(pause, l.pause)
}

// How often the follower looks at the log. Notifications make looking needless
// while they come; that they do is checked by looking now and then.
const (
	shortestPoll  = 5 * time.Millisecond
	longestPoll   = 100 * time.Millisecond // without notifications
	reassurance   = 500 * time.Millisecond // with them
	followingPage = 1024
)

func (f *follower) run() {
	interval := shortestPoll
	deaf := false // notifications are not what they should be
	var look lookout
	timer := time.NewTimer(interval)
	defer timer.Stop()
	for {
		waited := false
		select {
		case <-f.wake:
		case <-timer.C:
			waited = true
		case <-f.s.closing:
			return
		}
		if look.begin(f.awaits.Load(), eventstore.Position(f.awaited.Load())) {
			timer.Reset(shortestPoll)
			waited = false
		}
		if f.followers.Load() == 0 {
			if waited {
				if look.pause > 0 {
					head, err := f.head()
					if err != nil {
						head = 0
					}
					if look.looked(head) {
						f.s.notifier.tell(head)
					}
				}
				timer.Reset(look.within(longestPoll))
			}
			continue
		}
		if !waited && eventstore.Position(f.hint.Load()) <= f.tail.Head() {
			continue
		}
		if waited {
			f.s.meter.polls.Add(1)
		}
		moved, err := f.catchUp()
		if err != nil {
			if f.s.closed() {
				return
			}
			if !transient(err) {
				f.fail(err)
				return
			}
			interval = min(max(2*interval, 10*time.Millisecond), longestPause)
			timer.Reset(interval)
			continue
		}
		looking := look.pause > 0
		if head := f.tail.Head(); look.looked(head) {
			f.s.notifier.tell(head)
		}
		heard := f.heard.Swap(false)
		switch {
		case heard:
			deaf = false
		case waited && moved && f.listening.Load() && !looking:
			deaf = true // it should have been told
		}
		switch {
		case f.listening.Load() && !deaf:
			interval = reassurance
		case moved:
			interval = shortestPoll
		default:
			interval = min(2*interval, longestPoll)
		}
		timer.Reset(look.within(interval))
	}
}

// catchUp brings the tail to the head of the log, and reports whether it moved.
func (f *follower) catchUp() (moved bool, err error) {
	for {
		after, last := f.last()
		at := span{after: after, through: farAway}
		if last != uuid.Nil {
			at.after-- // the event that was seen last must still be there
		}
		var found []eventstore.Recorded
		ctx, cancel := context.WithTimeout(f.s.base, answerTimeout)
		conn, err := f.s.logs.Acquire(ctx)
		if err == nil {
			found, err = f.s.fetch(ctx, conn.Conn(), scanLog(f.s.schema, at, followingPage), 16, nil)
			if err == nil && len(found) == 0 {
				err = f.notRewound(ctx, conn.Conn(), after)
			}
			conn.Release()
		}
		cancel()
		if err != nil {
			return moved, asLost(err)
		}
		full := len(found) == followingPage
		if last != uuid.Nil && len(found) > 0 {
			if e := &found[0]; e.Position != after {
				return moved, errGap(e.Position, after)
			} else if e.ID != last {
				return moved, fmt.Errorf("%w: position %d has the event %s, but this process has seen %s there: %w", eventstore.ErrGap, after, e.ID, last, errRestored)
			}
			found = found[1:]
		}
		if len(found) == 0 {
			return moved, nil
		}
		moved = true
		if err := contiguous(found, span{after: after, through: found[len(found)-1].Position}, false); err != nil {
			return moved, err
		}
		if full {
			// Far behind: those who want these events read them themselves.
			head, err := f.head()
			if err != nil {
				return moved, err
			}
			f.skipTo(head)
			continue
		}
		f.mu.Lock()
		if head := f.tail.Head(); head >= found[0].Position {
			found = found[min(uint64(len(found)), uint64(head-found[0].Position+1)):]
		}
		f.tail.Append(found)
		f.mu.Unlock()
	}
}

// last returns the head of the tail, and the id of the event there if it is
// kept.
func (f *follower) last() (eventstore.Position, uuid.UUID) {
	for {
		head := f.tail.Head()
		if head == 0 {
			return 0, uuid.Nil
		}
		if now := f.tail.Since(head - 1); now.Head > head {
			continue
		} else if len(now.Events) > 0 {
			return head, now.Events[0][0].ID
		}
		return head, uuid.Nil
	}
}

const farAway = eventstore.Position(1<<63 - 1)

func (f *follower) head() (eventstore.Position, error) {
	ctx, cancel := context.WithTimeout(f.s.base, answerTimeout)
	defer cancel()
	conn, err := f.s.logs.Acquire(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Release()
	return f.s.readHead(ctx, conn.Conn())
}

// notRewound fails when the log has lost events that were seen.
func (f *follower) notRewound(ctx context.Context, conn *pgx.Conn, seen eventstore.Position) error {
	if seen == 0 {
		return nil
	}
	head, err := f.s.readHead(ctx, conn)
	if err == nil && head < seen {
		err = errRewound(head, seen)
	}
	return err
}

func (f *follower) fail(err error) {
	f.failed.Store(&err)
	close(f.done)
}

// listen receives notifications until the store is closed.
func (f *follower) listen() {
	pause := firstPause
	for !f.s.closed() {
		began := time.Now()
		_ = f.hear() // whatever it was, the follower polls until it is over
		f.listening.Store(false)
		poke(f.wake)
		if time.Since(began) > time.Minute {
			pause = firstPause
		}
		if !f.s.sleep(f.s.base, pause) {
			return
		}
		pause = min(2*pause, longestPause)
	}
}

func (f *follower) hear() error {
	ctx, cancel := context.WithCancel(f.s.base)
	defer cancel()
	go func() {
		select {
		case <-f.s.closing:
			cancel()
		case <-ctx.Done():
		}
	}()
	conn, err := pgx.ConnectConfig(ctx, f.s.config)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(closing)
	}()
	if _, err := conn.Exec(ctx, "LISTEN "+pgx.Identifier{f.s.channel()}.Sanitize()); err != nil {
		return err
	}
	f.listening.Store(true)
	poke(f.wake)
	f.expect(f.tail.Head() + 1) // something may have come before LISTEN
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		if name, ok := strings.CutPrefix(n.Payload, releasedPrefix); ok {
			f.s.releases.tell(name)
			continue
		}
		position, err := strconv.ParseUint(n.Payload, 10, 64)
		if err != nil {
			continue
		}
		f.heard.Store(true)
		if eventstore.Position(position) > f.tail.Head() {
			f.expect(eventstore.Position(position))
		}
	}
}

// channel names the notifications of the log.
func (s *Store) channel() string { return "deed_" + s.logID }

// notifier tells other processes that the log has grown, and which leases were
// released: after the commit and outside of its transaction, since a transaction
// that notifies takes a lock of the whole server when it commits. While one
// notification is on its way, and for a moment after it, the next ones gather into
// one.
type notifier struct {
	s    *Store
	head atomic.Uint64
	wake chan struct{}

	mu       sync.Mutex
	released []string
}

// releasedPrefix begins the notification of a lease that was released, whose name
// follows. That the log has grown is a number.
const releasedPrefix = "released "

// longestName bounds the names of leases that are told; the server takes less than
// 8,000 bytes.
const longestName = 1000

// mostReleased bounds how many are told at once.
const mostReleased = 1000

// lease tells that it was released.
func (n *notifier) lease(name string) {
	if len(name) > longestName {
		return
	}
	n.mu.Lock()
	if len(n.released) < mostReleased {
		n.released = append(n.released, releasedPrefix+name)
	}
	n.mu.Unlock()
	poke(n.wake)
}

// take returns what is to be told of leases.
func (n *notifier) take() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	names := n.released
	n.released = nil
	return names
}

// putBack keeps names that could not be told for the next time.
func (n *notifier) putBack(names []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.released = append(names, n.released...)
	n.released = n.released[:min(len(n.released), mostReleased)]
}

// releases are those who want to hear of leases.
type releases struct {
	mu  sync.Mutex
	all map[chan string]struct{}
}

func (r *releases) tell(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for to := range r.all {
		select {
		case to <- name:
		default: // it is behind, and has something to wake it
		}
	}
}

// Released returns a channel on which come the names of leases that any process
// has released, until ctx ends, which closes it. It is a hint, for those who would
// else look more often: a name may be missing, as all are through a pooler.
func (s *Store) Released(ctx context.Context) <-chan string {
	to := make(chan string, mostReleased)
	s.releases.mu.Lock()
	defer s.releases.mu.Unlock()
	if s.releases.all == nil {
		s.releases.all = map[chan string]struct{}{}
	}
	s.releases.all[to] = struct{}{}
	context.AfterFunc(ctx, func() {
		s.releases.mu.Lock()
		defer s.releases.mu.Unlock()
		delete(s.releases.all, to)
		close(to)
	})
	return to
}

const (
	// betweenNotifications is the least time from one to the next.
	betweenNotifications = 2 * time.Millisecond
	// whileBusy is what that time grows to while busyGrowth events or more come in
	// each millisecond: a notification is a transaction, and wakes all who listen.
	whileBusy  = 8 * time.Millisecond
	busyGrowth = 5
)

// pauseAfter returns the pause that follows one when so many events have come in
// the time since the last notification was made.
func pauseAfter(pause time.Duration, events int64, since time.Duration) time.Duration {
	if events < busyGrowth*since.Milliseconds() {
		return betweenNotifications
	}
	return min(2*pause, whileBusy)
}

func newNotifier(s *Store) *notifier { return &notifier{s: s, wake: make(chan struct{}, 1)} }

func (n *notifier) tell(head eventstore.Position) {
	raise(&n.head, uint64(head))
	poke(n.wake)
}

func (n *notifier) run() {
	if n.s.settings.pooled {
		return // nobody can listen through a pooler
	}
	var conn *pgx.Conn
	hangUp := func() {
		if conn != nil {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			_ = conn.Close(ctx)
			conn = nil
		}
	}
	defer hangUp()
	told, pause, failed := uint64(0), betweenNotifications, time.Duration(0)
	for last := false; !last; {
		select {
		case <-n.wake:
		case <-n.s.base.Done():
			// What was committed last is told before the end.
			select {
			case <-n.wake:
				last = true
			default:
				return
			}
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(n.s.base), time.Second)
		var err error
		if conn == nil {
			config := n.s.config.Copy()
			config.RuntimeParams["synchronous_commit"] = "off" // a notification is not worth a sync
			conn, err = pgx.ConnectConfig(ctx, config)
			if err != nil {
				conn = nil
			}
		}
		began := time.Now()
		if head := n.head.Load(); err == nil && head != told {
			_, err = conn.Exec(ctx, n.s.texts.notify, n.s.channel(), strconv.FormatUint(head, 10))
			if err == nil {
				told = head
			}
		}
		if names := n.take(); len(names) > 0 {
			if err == nil {
				_, err = conn.Exec(ctx, n.s.texts.notifyAll, n.s.channel(), names)
			}
			if err != nil {
				n.putBack(names)
			}
		}
		cancel()
		wait := pause
		if err != nil {
			hangUp()
			failed = min(max(2*failed, longestPoll), longestPause) // those who wait are polling
			wait = failed
		} else {
			failed = 0
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
			if err != nil {
				poke(n.wake) // it is still to be told
				continue
			}
			pause = pauseAfter(pause, int64(n.head.Load()-told), time.Since(began))
		case <-n.s.base.Done():
			timer.Stop()
			if err != nil {
				poke(n.wake) // once more, if this was not the last time
			}
		}
	}
}

// Subscribe implements eventstore.Store. Whoever keeps up is served from
// memory: right after the commit for events of this process, and as soon as the
// process has heard of them for those of others. Whoever falls behind reads
// pages until it has caught up. While the database cannot be reached
// subscriptions wait, and then go on where they were.
func (s *Store) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		fail := func(err error) { yield(eventstore.Batch{}, err) }
		if err := q.Validate(); err != nil {
			fail(err)
			return
		}
		f := s.follower
		f.followers.Add(1)
		defer f.followers.Add(-1)
		if err := s.lookAhead(ctx); err != nil {
			fail(err)
			return
		}
		for first := true; ; {
			if err := ctx.Err(); err != nil {
				fail(err)
				return
			}
			now := f.tail.Since(after)
			failure := f.failed.Load()
			switch {
			case now.Closed || s.closed():
				fail(eventstore.ErrClosed)
				return
			case failure != nil:
				fail(*failure)
				return
			case now.Head < after, now.Head == after && !first:
				first = false
				select {
				case <-now.Grown:
				case <-f.done:
				case <-s.closing:
				case <-ctx.Done():
				}
				continue
			}
			var batch eventstore.Batch
			switch {
			case now.Head == after:
				batch.Through = after
			case now.Complete:
				batch = fromTail(q, now.Events)
			default:
				p, err := s.pageThrough(ctx, q, span{after: after, through: now.Head})
				if err != nil {
					fail(err)
					return
				}
				batch = eventstore.Batch{Events: p.events, Through: p.reached}
				if p.done {
					batch.Through = now.Head
				}
			}
			batch.CaughtUp = batch.Through == now.Head
			after, first = batch.Through, false
			if !yield(batch, nil) {
				return
			}
		}
	}
}

// lookAhead moves the tail to the head, which nobody may have followed so far.
func (s *Store) lookAhead(ctx context.Context) error {
	var head eventstore.Position
	for {
		var err error
		if head, err = s.Head(ctx); err == nil {
			break
		}
		if !errors.Is(err, eventstore.ErrUnavailable) {
			return err
		}
	}
	if head > s.follower.tail.Head() {
		s.follower.expect(head)
		s.follower.skipTo(head)
	}
	return nil
}

// skipTo moves the tail to the head without the events in between, unless it
// has got there by itself.
func (f *follower) skipTo(head eventstore.Position) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if head > f.tail.Head() {
		f.tail.Skip(head)
	}
}

// pageThrough reads a page for a subscription, however long the database takes
// to answer.
func (s *Store) pageThrough(ctx context.Context, q eventstore.Query, at span) (page, error) {
	for {
		var p page
		err := s.enter(ctx)
		if err == nil {
			err = s.reading(ctx, "read events", func(ctx context.Context, conn *pgx.Conn) (err error) {
				p, err = s.page(ctx, conn, q, at, pageSize, nil)
				return err
			})
			s.leave()
		}
		if !errors.Is(err, eventstore.ErrUnavailable) {
			return p, err
		}
	}
}

// fromTail picks up to a page of matches; the events follow the position.
func fromTail(q eventstore.Query, batches [][]eventstore.Recorded) eventstore.Batch {
	var out eventstore.Batch
	for _, events := range batches {
		for i := range events {
			if q.Matches(&events[i]) {
				out.Events = append(out.Events, events[i])
			}
			out.Through = events[i].Position
			if len(out.Events) == pageSize {
				return out
			}
		}
	}
	return out
}
