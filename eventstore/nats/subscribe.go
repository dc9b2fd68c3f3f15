package nats

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/google/uuid"
	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/tail"
)

// follower reads the end of the log for all subscribers of this process. It
// begins with the first of them.
//
// The tail holds every message, those of conditions without a type among them,
// so that its positions have no gaps, and commits are added whole.
type follower struct {
	store *Store

	mu      sync.Mutex
	tail    *tail.Tail
	started chan struct{} // closed when tail is there, or could not be
	failure error         // why it has stopped
	closed  bool
}

// begin returns the tail, and starts to follow the log if nobody did.
func (f *follower) begin(ctx context.Context) (*tail.Tail, error) {
	for {
		f.mu.Lock()
		switch {
		case f.closed:
			f.mu.Unlock()
			return nil, eventstore.ErrClosed
		case f.tail != nil:
			defer f.mu.Unlock()
			return f.tail, nil
		case f.started == nil:
			started := make(chan struct{})
			f.started = started
			f.mu.Unlock()
			head, err := f.store.last(ctx, ">")
			f.mu.Lock()
			f.started = nil
			close(started)
			if err != nil || f.closed {
				f.mu.Unlock()
				if err == nil {
					err = eventstore.ErrClosed
				}
				return nil, err
			}
			position := eventstore.Position(0)
			if head != nil {
				position = head.Position
				f.store.newest.see(uint64(head.Position), head.ID)
			}
			f.tail = tail.New(position, f.store.settings.tailEvents, f.store.settings.tailBytes)
			t := f.tail
			f.store.work.Go(f.run)
			f.mu.Unlock()
			return t, nil
		}
		started := f.started
		f.mu.Unlock()
		select {
		case <-started:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (f *follower) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	if f.tail != nil {
		f.tail.Close()
	}
}

// fail ends all subscriptions.
func (f *follower) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failure == nil && !f.closed {
		f.failure = err
		f.tail.Close()
	}
}

func (f *follower) failed() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.failure == nil {
		return eventstore.ErrClosed
	}
	return f.failure
}

// run follows the log until the store is closed, over one consumer after
// another: whatever happens to one, the next begins behind what was seen.
func (f *follower) run() {
	ctx := f.store.base
	stopped := make(chan struct{})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(stopped)
		select {
		case <-f.store.closing:
			cancel()
		case <-ctx.Done():
		}
	}()
	defer func() { cancel(); <-stopped }()
	for wait := 10 * time.Millisecond; ctx.Err() == nil; {
		began := time.Now()
		err := f.consume(ctx)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, eventstore.ErrGap) || errors.Is(err, eventstore.ErrDecode) {
			f.fail(err)
			return
		}
		if f.store.conn.IsClosed() { // by whom it belongs to: it will not be back
			f.fail(unavailable("follow the log", client.ErrConnectionClosed))
			return
		}
		if time.Since(began) > time.Second {
			wait = 10 * time.Millisecond
		}
		pause(ctx, wait)
		wait = min(2*wait, 500*time.Millisecond)
	}
}

// arrival is a message as the consumer delivers it.
type arrival struct {
	message *message
	err     error
	first   bool // of its consumer: the client makes a new one in place of one that was lost
}

// followBuffer is how many messages may wait to be taken into the tail.
const followBuffer = 4096

// consume follows the log over one consumer until that fails.
func (f *follower) consume(ctx context.Context) error {
	s := f.store
	if err := s.verify(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if hook := s.settings.following; hook != nil {
		hook()
	}
	next := uint64(f.tail.Head()) + 1
	consumer, err := s.js.OrderedConsumer(ctx, s.settings.stream, jetstream.OrderedConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: next, InactiveThreshold: 30 * time.Second,
	})
	if err != nil {
		return err
	}
	arrivals := make(chan arrival, followBuffer)
	consuming, err := consumer.Consume(func(m jetstream.Msg) {
		var a arrival
		if at, err := m.Metadata(); err != nil {
			a.err = err
		} else {
			a.first = at.Sequence.Consumer == 1
			a.message, a.err = s.subjects.decode(m.Subject(), at.Sequence.Stream, m.Data())
		}
		select {
		case arrivals <- a:
		case <-ctx.Done():
		}
	}, jetstream.PullMaxMessages(1024), jetstream.PullExpiry(10*time.Second), jetstream.PullHeartbeat(time.Second))
	if err != nil {
		return err
	}
	defer func() {
		cancel()
		consuming.Stop()
		<-consuming.Closed()
	}()
	look := time.NewTicker(time.Second)
	defer look.Stop()
	idle := 0
	var batch []arrival
	var part []eventstore.Recorded // of a commit that is not whole yet
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-look.C:
			// A consumer that says nothing may be dead: is there something that it should
			// have told?
			if idle++; idle > 1 {
				once, stop := context.WithTimeout(ctx, time.Second)
				head, err := s.fresh(once, &getRequest{Last: ">"})
				stop()
				if err == nil && head != nil && head.Position > f.tail.Head() && len(arrivals) == 0 {
					return errors.New("the consumer does not deliver")
				}
				if err == nil && (head == nil && f.tail.Head() > 0 || head != nil && head.Position < f.tail.Head()) {
					if err := s.verify(ctx); err != nil {
						return err
					}
				}
				idle = 0
			}
		case a := <-arrivals:
			idle = 0
			batch := append(batch[:0], a)
			for more := true; more && len(batch) < followBuffer; {
				select {
				case a := <-arrivals:
					batch = append(batch, a)
				default:
					more = false
				}
			}
			var whole []eventstore.Recorded
			var last uuid.UUID
			for _, a := range batch {
				if a.err != nil {
					return a.err
				}
				if a.first { // the server may have been restored since it was looked at
					if err := s.verify(ctx); err != nil {
						return err
					}
				}
				got := uint64(a.message.Position)
				if got < next { // told before
					continue
				}
				if got > next {
					return f.hole(ctx, next, got)
				}
				next++
				part = append(part, a.message.Recorded)
				if a.message.index == a.message.count {
					whole = append(whole, part...)
					last = a.message.ID
					part = part[:0]
				}
			}
			if len(whole) > 0 {
				f.tail.Append(whole)
				s.saw(uint64(whole[len(whole)-1].Position))
				s.newest.see(uint64(whole[len(whole)-1].Position), last)
			}
		}
	}
}

// hole finds out whether messages are missing in the log or were only not
// delivered.
func (f *follower) hole(ctx context.Context, want, got uint64) error {
	if _, err := f.store.at(ctx, want); errors.Is(err, eventstore.ErrGap) {
		return errHole(want, got)
	}
	return fmt.Errorf("the consumer delivered %d, not %d", got, want)
}

// Subscribe implements eventstore.Store. All subscribers of a process share one
// consumer; those who are far behind read pages until they have caught up with it.
func (s *Store) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		fail := func(err error) { yield(eventstore.Batch{}, err) }
		if err := q.Validate(); err != nil {
			fail(err)
			return
		}
		log, begun, err := s.beginFollowing(ctx)
		if err != nil {
			fail(err)
			return
		}
		pages := s.scanner(q)
		for first := begun >= after; ; { // not when after lies beyond the end
			if err := ctx.Err(); err != nil {
				fail(err)
				return
			}
			bell, wrong := s.guard.state()
			if wrong != nil {
				fail(fmt.Errorf("subscribe: %w", wrong))
				return
			}
			known := max(eventstore.Position(s.known.Load()), begun)
			snapshot := log.Since(after)
			if snapshot.Closed {
				fail(s.follower.failed())
				return
			}
			caughtUp := snapshot.Head >= known
			if snapshot.Head > after || first && snapshot.Head == after && caughtUp {
				batch := eventstore.Batch{Through: snapshot.Head, CaughtUp: caughtUp}
				if snapshot.Complete {
					batch.Events, batch.Through = fromTail(q, snapshot.Events)
					batch.Through = max(batch.Through, after)
					batch.CaughtUp = caughtUp && batch.Through == snapshot.Head
				} else {
					events, reached, err := pages.next(ctx, after, snapshot.Head)
					if errors.Is(err, eventstore.ErrUnavailable) && (s.closed() || !s.conn.IsClosed()) {
						continue // for ever: the server will be back, or the tail says that the store is closed
					}
					if err != nil {
						fail(err)
						return
					}
					batch.Events, batch.Through = events, reached
					batch.CaughtUp = caughtUp && reached == snapshot.Head
				}
				after, first = batch.Through, false
				if !yield(batch, nil) {
					return
				}
				continue
			}
			select {
			case <-snapshot.Grown:
			case <-bell:
			case <-ctx.Done():
			}
		}
	}
}

// beginFollowing returns the tail, and where the log ended when the
// subscription began. It waits for the server as long as it takes.
func (s *Store) beginFollowing(ctx context.Context) (*tail.Tail, eventstore.Position, error) {
	for {
		var log *tail.Tail
		var head eventstore.Position
		err := s.within(ctx, func(ctx context.Context) (err error) {
			if log, err = s.follower.begin(ctx); err != nil {
				return err
			}
			head, err = s.head(ctx)
			return err
		})
		switch {
		case !errors.Is(err, eventstore.ErrUnavailable):
			return log, head, err
		case s.closed(): // what it waited for is of no interest any more
			return nil, 0, eventstore.ErrClosed
		case s.conn.IsClosed():
			return nil, 0, err
		}
	}
}

// fromTail returns the matching events of the next few batches, and how far
// they go.
func fromTail(q eventstore.Query, batches [][]eventstore.Recorded) ([]eventstore.Recorded, eventstore.Position) {
	var events []eventstore.Recorded
	through := eventstore.Position(0)
	for _, batch := range batches {
		for i := range batch {
			through = batch[i].Position
			if batch[i].Type != "" && q.Matches(&batch[i]) {
				events = append(events, batch[i])
			}
			if len(events) == pageEvents {
				return events, through
			}
		}
	}
	return events, through
}
