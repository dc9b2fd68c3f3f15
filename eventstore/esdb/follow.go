package esdb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// news is what a subscription to the database tells: everything of the filter
// up to the place was delivered, with the event, if there is one, as the last.
type news struct {
	at    eventstore.Position
	event *decoded
	// unreadable is why no more is known of the event than where it is.
	unreadable error
	// caughtUp says that this was all there was; at is 0 then.
	caughtUp bool
}

const mostPrefixes = 200

// filter returns what the server can select of the query. The last event of the
// log is always selected: that it comes says that the end was reached, which
// neither checkpoints nor words of the server's are certain to do.
func (s *Store) filter(q eventstore.Query, last end) driver.Filter {
	streams, types := true, true
	var names, kinds []string
	for i := range q.Items {
		switch item := &q.Items[i]; {
		case !item.Stream.IsZero():
			names = append(names, s.name(item.Stream))
		case item.Category != "":
			names = append(names, s.prefix+item.Category+"-")
		default:
			streams = false
		}
		types = types && len(q.Items[i].Types) > 0
		kinds = append(kinds, q.Items[i].Types...)
	}
	switch {
	case streams && len(names) > 0 && len(names) < mostPrefixes:
		return driver.Filter{StreamPrefixes: append(names, last.name)}
	case types && len(kinds) > 0 && len(kinds) < mostPrefixes:
		return driver.Filter{TypePrefixes: append(kinds, last.kind)}
	}
	return s.everything()
}

// everything selects the streams of the log, as far as names tell.
func (s *Store) everything() driver.Filter {
	if s.prefix != "" {
		return driver.Filter{StreamPrefixes: []string{s.prefix}}
	}
	return driver.Filter{StreamRegex: "^[A-Za-z][A-Za-z0-9._]*-"}
}

// follow subscribes to the database behind the position and hands what comes to
// fn, until that returns an error, which follow returns. When the subscription
// is dropped it is made again behind what fn has last been given. Patience, if
// not 0, is how long the server may say nothing.
func (s *Store) follow(ctx, caller context.Context, filter driver.Filter, after eventstore.Position, patience time.Duration, fn func(news) error) error {
	const what = "follow the log"
	resume, done := from(after), after
	// A checkpoint may name the end of the log, as servers up to 25.0 do at times:
	// that is where the next event will lie, which is still to come, and going on
	// behind it would skip that. So it counts when something behind it has come.
	var reached *driver.Position
	settle := func(next uint64) error {
		c := reached
		if c == nil || next < c.Commit {
			return nil
		}
		reached = nil
		if next == c.Commit {
			return nil
		}
		resume = driver.AllFrom{Position: *c}
		done = max(done, eventstore.Position(c.Commit))
		if c.Commit != c.Prepare {
			return nil // good for going on here, but one number would not name it
		}
		return fn(news{at: eventstore.Position(c.Commit)})
	}
	fellBack := after == 0
	since := time.Now()
	for n := 0; ; n++ {
		heard := false
		reached = nil
		err := s.subscribe(ctx, resume, filter, patience, func(m driver.Message) error {
			heard = true
			var tell news
			switch {
			case m.Event != nil:
				tell.at = eventstore.Position(m.Event.Position.Commit)
				if tell.at <= done {
					return nil // before where it was asked to begin
				}
				if err := settle(m.Event.Position.Commit); err != nil {
					return fatal{err}
				}
				e, err := s.decode(m.Event)
				switch {
				case err == nil:
					tell.event = &e
				case errors.Is(err, errForeign):
				case e.Position > 0:
					tell.event, tell.unreadable = &e, err
				default:
					return fatal{err}
				}
				resume = driver.AllFrom{Position: m.Event.Position}
			case m.Checkpoint != nil:
				if eventstore.Position(m.Checkpoint.Commit) <= done {
					return nil
				}
				if err := settle(m.Checkpoint.Commit); err != nil {
					return fatal{err}
				}
				reached = m.Checkpoint
				since, n = time.Now(), 0
				return nil
			case m.CaughtUp:
				err := fn(news{caughtUp: true})
				if err == nil || errors.Is(err, errAgain) {
					return err
				}
				return fatal{err}
			default:
				return nil
			}
			if err := fn(tell); err != nil {
				return fatal{err}
			}
			done = tell.at
			since, n = time.Now(), 0
			return nil
		})
		if f, ok := errors.AsType[fatal](err); ok {
			return f.error
		}
		if end := s.ended(caller); end != nil {
			return end
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, errPatience):
			return fmt.Errorf("%s: %w: %w", what, eventstore.ErrUnavailable, err)
		case again(ctx, err):
			if patience > 0 && time.Since(since) > patience {
				return s.failure(caller, what, err)
			}
		case !heard && !fellBack && driver.KindOf(err) != driver.Denied:
			// The position may be none of the server's: begin at one before it.
			fellBack = true
			resume = from(s.places.floor(after))
			if resume.Position.Commit == uint64(after) {
				resume = driver.AllFrom{Start: true}
			}
			continue
		default:
			return s.failure(caller, what, err)
		}
		pause(ctx, n)
	}
}

// errAgain, from fn, makes follow subscribe again where it is.
var errAgain error = &driver.Error{Kind: driver.Aborted, Err: errors.New("subscribe again")}

// errMute: the server has not confirmed a subscription for long.
var errMute error = &driver.Error{Kind: driver.Unavailable, Err: fmt.Errorf("the server has not confirmed a subscription for %s", attempt)}

// goal is the event that a subscription is to reach.
type goal struct {
	s    *Store
	last end
	gone bool // it cannot come: this was found out before the subscription was made
}

// caughtUp is asked when the server says that it has told everything, short of
// the goal. A node that lags behind the one that told of the goal says so too:
// then the rest is still to come. It returns nil to wait on, errArrived when the
// goal does not exist any more (scavenged), or errAgain.
func (g *goal) caughtUp(ctx context.Context) error {
	if g.gone {
		return errArrived
	}
	once, stop := context.WithTimeout(ctx, attempt)
	defer stop()
	var r *driver.Recorded
	at := from(g.last.position)
	at.Leader = true // who lags proves nothing
	reader, err := g.s.driver.ReadAll(once, at, false, 1)
	if err == nil {
		defer reader.Close()
		r, err = reader.Next(once)
	}
	switch {
	case errors.Is(err, io.EOF):
		return nil // the node does not have it yet
	case driver.KindOf(err) == driver.Denied:
		return err
	case driver.KindOf(err) == driver.InvalidPosition:
		g.gone = true // it is none of the server's positions any more
		return errAgain
	case err != nil:
		return errAgain
	case eventstore.Position(r.Position.Commit) > g.last.position:
		g.gone = true // what lies before is there, but may have come after the word
		return errAgain
	}
	return nil
}

// fatal is an error that subscribing again does not mend.
type fatal struct{ error }

// subscribe subscribes and receives until the subscription ends.
func (s *Store) subscribe(ctx context.Context, after driver.AllFrom, filter driver.Filter, patience time.Duration, fn func(driver.Message) error) error {
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := func() {}
	if patience > 0 {
		timer := time.AfterFunc(patience, func() { cancel(errPatience) })
		defer timer.Stop()
		quiet = func() { timer.Reset(patience) }
		// The time that the receiver takes does not count.
		receive := fn
		fn = func(m driver.Message) error {
			timer.Stop()
			return receive(m)
		}
	}
	// A node that hangs confirms nothing, and the client waits for that.
	mute := time.AfterFunc(s.settings.confirm, func() { cancel(errMute) })
	subscription, err := s.driver.SubscribeAll(inner, after, filter)
	if !mute.Stop() && errors.Is(context.Cause(inner), errMute) {
		if err == nil {
			subscription.Close()
		}
		return errMute
	}
	if err != nil {
		return err
	}
	defer subscription.Close()
	for {
		m, err := subscription.Next(inner)
		if err == nil {
			err = fn(m)
		}
		if err != nil {
			return err
		}
		quiet()
	}
}

// follower subscribes to the whole log, once for all subscribers, and keeps the
// latest events. It begins with the first subscriber. So a subscriber who keeps
// up costs the server nothing, and learns of every position of the log, which
// the server does not tell those who filter.
type follower struct {
	store *Store

	mu      sync.Mutex
	running bool
	ready   bool
	err     error               // why it ended
	low     eventstore.Position // all events behind it are in events
	head    end                 // the last event seen
	events  []kept
	bytes   int
	grown   chan struct{} // closed and replaced whenever any of this changes
}

// kept is an event of the tail; one that cannot be read stops those whom it
// concerns.
type kept struct {
	eventstore.Recorded
	unreadable error
}

func newFollower(s *Store) *follower { return &follower{store: s, grown: make(chan struct{})} }

// view is how the follower stands at one moment.
type view struct {
	ready  bool
	err    error
	low    eventstore.Position
	head   end
	events []kept // behind the position asked for, if that is not before low
	grown  <-chan struct{}
}

// since starts the follower if it does not run, and returns what follows the
// position.
func (f *follower) since(after eventstore.Position, start bool) view {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.running && start {
		f.store.mu.Lock() // Close waits for work once it has shut
		if !f.store.closed() {
			f.running, f.ready, f.err = true, false, nil
			f.store.work.Go(f.run)
		}
		f.store.mu.Unlock()
	}
	v := view{ready: f.ready, err: f.err, low: f.low, head: f.head, grown: f.grown}
	if f.ready && after >= f.low {
		i := len(f.events)
		for i > 0 && f.events[i-1].Position > after {
			i--
		}
		v.events = f.events[i:len(f.events):len(f.events)]
	}
	return v
}

func (f *follower) wake() {
	close(f.grown)
	f.grown = make(chan struct{})
}

// run follows until the store is closed or something fails for good.
func (f *follower) run() {
	s := f.store
	err := f.follow(s.open)
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.closed() {
		err = eventstore.ErrClosed
	}
	f.running, f.ready, f.err = false, false, err
	f.wake()
}

func (f *follower) follow(ctx context.Context) error {
	s := f.store
	var last end
	for n := 0; ; n++ {
		var err error
		if last, err = s.findEnd(ctx); err == nil {
			break
		}
		if !errors.Is(err, eventstore.ErrUnavailable) {
			return err
		}
		pause(ctx, n)
	}
	f.mu.Lock()
	f.ready, f.low, f.head, f.events, f.bytes = true, last.position, last, nil, 0
	f.wake()
	f.mu.Unlock()
	var held []kept // the events of a commit that has not come whole
	return s.follow(ctx, ctx, s.everything(), last.position, 0, func(n news) error {
		whole := true
		if n.event != nil {
			if len(held) > 0 && held[0].Stream != n.event.Stream {
				f.take(held)
				held = held[:0]
			}
			held = append(held, kept{n.event.Recorded, n.unreadable})
			whole = n.event.index == n.event.of-1
		}
		if whole && len(held) > 0 {
			f.take(held)
			held = held[:0]
		}
		return nil
	})
}

// take keeps the events and wakes who waits.
func (f *follower) take(events []kept) {
	s := f.store
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range events {
		e := &events[i]
		f.events = append(f.events, *e)
		f.bytes += len(e.Data)
		s.places.add(e.Position)
	}
	newest := &events[len(events)-1]
	f.head = end{position: newest.Position, name: s.name(newest.Stream), kind: newest.Type}
	// Dropping copies what stays, as others look at the slice: so not each time.
	if most, bytes := s.settings.tailEvents, s.settings.tailBytes; len(f.events) > most+most/4 || f.bytes > bytes+bytes/4 {
		drop := 0
		for drop < len(f.events)-1 && (len(f.events)-drop > most || f.bytes > bytes) {
			f.bytes -= len(f.events[drop].Data)
			f.low = f.events[drop].Position
			drop++
		}
		f.events = slices.Clone(f.events[drop:])
	}
	s.tip.set(f.head, f.head.position)
	f.wake()
}

// batchEvents is the largest number of events of a batch.
const batchEvents = 512

// Subscribe implements eventstore.Store: what the follower does not keep is
// first read from the server. It waits until a server that has gone is back.
func (s *Store) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		if err := q.Validate(); err != nil {
			yield(eventstore.Batch{}, err)
			return
		}
		sub := subscriber{s: s, q: q, caller: ctx, through: after, first: true, yield: func(b eventstore.Batch) bool { return yield(b, nil) }}
		if err := sub.run(ctx); err != nil && !errors.Is(err, errEnough) {
			yield(eventstore.Batch{}, err)
		}
	}
}

type subscriber struct {
	s       *Store
	q       eventstore.Query
	caller  context.Context
	through eventstore.Position // everything up to here was considered and handed on
	first   bool
	yield   func(eventstore.Batch) bool
}

func (b *subscriber) run(ctx context.Context) error {
	s := b.s
	inner, cancel := s.within(ctx)
	defer cancel()
	start := true
	for {
		if err := ctx.Err(); err != nil {
			return s.ended(ctx)
		}
		if s.closed() {
			return eventstore.ErrClosed
		}
		v := s.follower.since(b.through, start)
		start = false
		switch {
		case v.err != nil:
			return v.err
		case !v.ready:
		case b.through < v.low:
			if err := b.catchUp(inner, v.head); err != nil {
				return err
			}
			continue
		case v.head.position > b.through || b.first && v.head.position == b.through:
			if err := b.fromTail(v); err != nil {
				return err
			}
			continue
		}
		select {
		case <-v.grown:
		case <-ctx.Done():
		case <-s.open.Done():
		}
	}
}

// hand yields a batch.
func (b *subscriber) hand(events []eventstore.Recorded, through eventstore.Position, caughtUp bool) error {
	b.first, b.through = false, through
	if !b.yield(eventstore.Batch{Events: events, Through: through, CaughtUp: caughtUp}) {
		return errEnough
	}
	return nil
}

// caughtUp reports whether nothing behind the position is known.
func (s *Store) caughtUp(at eventstore.Position) bool {
	_, _, known := s.tip.get()
	return at >= known
}

func (b *subscriber) fromTail(v view) error {
	var events []eventstore.Recorded
	for i := range v.events {
		e := &v.events[i]
		if e.unreadable != nil && concerns(b.q, &e.Recorded) {
			if len(events) == 0 {
				return e.unreadable
			}
			// First what lies before.
			return b.hand(events, v.events[i-1].Position, false)
		}
		if e.unreadable != nil || !b.q.Matches(&e.Recorded) {
			continue
		}
		events = append(events, e.Recorded)
		if len(events) == batchEvents && i < len(v.events)-1 {
			return b.hand(events, e.Position, false)
		}
	}
	return b.hand(events, v.head.position, b.s.caughtUp(v.head.position))
}

// catchUp hands on what lies between where the subscriber is and the last event
// that the follower has seen.
func (b *subscriber) catchUp(ctx context.Context, last end) error {
	s := b.s
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.open, cancel)()
	var events []eventstore.Recorded
	arrive := func() error {
		v := s.follower.since(last.position, false)
		if err := b.hand(events, last.position, v.ready && v.head.position == last.position && s.caughtUp(last.position)); err != nil {
			return err
		}
		return errArrived
	}
	to := goal{s: s, last: last}
	err := s.follow(inner, b.caller, s.filter(b.q, last), b.through, 0, func(n news) error {
		if n.caughtUp {
			if err := to.caughtUp(inner); !errors.Is(err, errArrived) {
				return err
			}
			return arrive()
		}
		if n.at > last.position {
			return arrive()
		}
		if n.unreadable != nil && n.at <= last.position && concerns(b.q, &n.event.Recorded) {
			if len(events) > 0 { // first what lies before
				if err := b.hand(events, events[len(events)-1].Position, false); err != nil {
					return err
				}
			}
			return n.unreadable
		}
		if n.event != nil && n.unreadable == nil && b.q.Matches(&n.event.Recorded) {
			events = append(events, n.event.Recorded)
		}
		switch {
		case n.at == last.position:
			return arrive()
		case len(events) >= batchEvents || n.event == nil && n.at > b.through:
			err := b.hand(events, n.at, false)
			events = nil
			return err
		}
		return nil
	})
	switch {
	case errors.Is(err, errArrived):
		return nil
	case s.closed() && b.caller.Err() == nil:
		return eventstore.ErrClosed
	}
	return err
}

// errArrived ends catching up.
var errArrived = errors.New("arrived")
