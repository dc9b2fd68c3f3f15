package memory

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// pageSize bounds how long a reader holds the lock.
const pageSize = 512

// Store is an event store and the state of read models in memory. All methods
// may be called concurrently.
type Store struct {
	now    func() time.Time
	limits eventstore.Limits
	logID  string
	state  *state

	mu         sync.RWMutex
	closed     bool
	log        []eventstore.Recorded // log[i] has position i+1
	streams    map[eventstore.Stream][]eventstore.Position
	categories map[string][]eventstore.Position
	types      map[string][]eventstore.Position
	tags       map[string][]eventstore.Position
	keys       map[string]eventstore.Receipt
	grown      chan struct{} // closed and replaced at every commit and at Close
	inline     []*projection.Appends
}

var (
	_ eventstore.Store      = (*Store)(nil)
	_ eventstore.Enqueuer   = (*Store)(nil)
	_ eventstore.Identified = (*Store)(nil)
	_ eventstore.Opener     = (*Store)(nil)
)

// New returns an empty store.
func New() *Store {
	return &Store{
		now:        time.Now,
		limits:     eventstore.DefaultLimits(),
		logID:      uuid.NewString(),
		state:      newState(),
		streams:    map[eventstore.Stream][]eventstore.Position{},
		categories: map[string][]eventstore.Position{},
		types:      map[string][]eventstore.Position{},
		tags:       map[string][]eventstore.Position{},
		keys:       map[string]eventstore.Receipt{},
		grown:      make(chan struct{}),
	}
}

// Open returns the store itself: an application that is given it takes it
// over, and closes it.
func (s *Store) Open(context.Context) (eventstore.Store, error) { return s, nil }

// Close refuses further calls and ends subscriptions with ErrClosed. Closing
// again does nothing.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.grown)
	}
	return nil
}

// LogID returns the id given to the log by New.
func (s *Store) LogID(context.Context) (string, error) { return s.logID, nil }

// Append implements eventstore.Store.
func (s *Store) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	c, err := c.Prepare(s.limits, s.now)
	if err != nil {
		return eventstore.Receipt{}, err
	}
	if err := ctx.Err(); err != nil {
		return eventstore.Receipt{}, err
	}
	s.mu.Lock()
	if len(s.inline) > 0 {
		s.mu.Unlock()
		return s.appendInline(ctx, c)
	}
	defer s.mu.Unlock()
	if first, done, err := s.judge(c); done || err != nil {
		return first, err
	}
	return s.add(c, s.record(c)), nil
}

// Enqueue implements eventstore.Enqueuer; the outcome is known at once.
func (s *Store) Enqueue(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
	p, resolve := eventstore.NewPending()
	resolve(s.Append(ctx, c))
	return p
}

// judge decides the commit; done says that it was made before.
func (s *Store) judge(c eventstore.Commit) (first eventstore.Receipt, done bool, err error) {
	if s.closed {
		return eventstore.Receipt{}, false, eventstore.ErrClosed
	}
	if c.Key != "" {
		if first, used := s.keys[c.Key]; used {
			if first.Fingerprint != c.Fingerprint {
				return eventstore.Receipt{}, false, fmt.Errorf("%w: %q", eventstore.ErrKeyReused, c.Key)
			}
			return duplicate(first), true, nil
		}
	}
	for i := range c.Conditions {
		if err := s.check(&c.Conditions[i]); err != nil {
			return eventstore.Receipt{}, false, err
		}
	}
	return eventstore.Receipt{}, false, nil
}

// record returns the events as they are to be added.
func (s *Store) record(c eventstore.Commit) []eventstore.Recorded {
	recorded := make([]eventstore.Recorded, len(c.Events))
	for i := range c.Events {
		e := &c.Events[i]
		version := uint64(len(s.streams[e.Stream])) + 1
		for j := i - 1; j >= 0; j-- {
			if c.Events[j].Stream == e.Stream {
				version = recorded[j].Version + 1
				break
			}
		}
		recorded[i] = eventstore.Recorded{
			ID: e.ID, Stream: e.Stream, Version: version, Position: eventstore.Position(len(s.log) + i + 1),
			Type: e.Type, Tags: e.Tags, Data: e.Data, Metadata: e.Metadata, Time: e.Time,
		}
	}
	return recorded
}

// add adds what was judged and recorded.
func (s *Store) add(c eventstore.Commit, recorded []eventstore.Recorded) eventstore.Receipt {
	head := eventstore.Position(len(s.log))
	receipt := eventstore.Receipt{First: head + 1, Last: head + eventstore.Position(len(c.Events)), Fingerprint: c.Fingerprint}
	for i := range recorded {
		e, r, position := &c.Events[i], recorded[i], recorded[i].Position
		s.log = append(s.log, r)
		s.streams[e.Stream] = append(s.streams[e.Stream], position)
		s.categories[e.Stream.Category] = append(s.categories[e.Stream.Category], position)
		s.types[e.Type] = append(s.types[e.Type], position)
		for _, tag := range e.Tags {
			s.tags[tag] = append(s.tags[tag], position)
		}
		at := slices.IndexFunc(receipt.Revisions, func(sr eventstore.StreamRevision) bool { return sr.Stream == e.Stream })
		if at < 0 {
			at = len(receipt.Revisions)
			receipt.Revisions = append(receipt.Revisions, eventstore.StreamRevision{Stream: e.Stream})
		}
		receipt.Revisions[at].Revision = r.Revision()
	}
	if c.Key != "" {
		stored := receipt
		stored.Revisions = slices.Clone(receipt.Revisions)
		s.keys[c.Key] = stored
	}
	close(s.grown)
	s.grown = make(chan struct{})
	return receipt
}

func duplicate(first eventstore.Receipt) eventstore.Receipt {
	first.Revisions = slices.Clone(first.Revisions)
	first.Duplicate = true
	return first
}

func (s *Store) check(c *eventstore.Condition) error {
	switch c.Kind {
	case eventstore.ConditionStreamAt:
		actual := s.revision(c.Stream)
		if actual.Version != c.Revision.Version || c.Revision.Position != 0 && actual.Position != c.Revision.Position ||
			c.LastEvent != uuid.Nil && s.log[actual.Position-1].ID != c.LastEvent {
			return &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream, Expected: c.Revision, Actual: actual}
		}
	case eventstore.ConditionStreamExists:
		if len(s.streams[c.Stream]) == 0 {
			return &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream}
		}
	case eventstore.ConditionNoneMatch:
		for p := range s.scan(c.Query, c.After, eventstore.Position(len(s.log)), false) {
			return &eventstore.ConflictError{Kind: c.Kind, Query: c.Query, After: c.After, Found: p}
		}
	}
	return nil
}

func (s *Store) revision(stream eventstore.Stream) eventstore.Revision {
	positions := s.streams[stream]
	if len(positions) == 0 {
		return eventstore.Revision{}
	}
	return eventstore.Revision{Version: uint64(len(positions)), Position: positions[len(positions)-1]}
}

// scan yields the matching positions in (after, through]. The lock is held by
// the caller for the whole loop.
func (s *Store) scan(q eventstore.Query, after, through eventstore.Position, backward bool) iter.Seq[eventstore.Position] {
	through = min(through, eventstore.Position(len(s.log)))
	return func(yield func(eventstore.Position) bool) {
		if after >= through {
			return
		}
		if len(q.Items) == 1 {
			if list, ok := s.candidates(&q.Items[0]); ok {
				from := sort.Search(len(list), func(i int) bool { return list[i] > after })
				to := sort.Search(len(list), func(i int) bool { return list[i] > through })
				for i := range to - from {
					p := list[from+i]
					if backward {
						p = list[to-1-i]
					}
					if q.Matches(&s.log[p-1]) && !yield(p) {
						return
					}
				}
				return
			}
		}
		for i := range through - after {
			p := after + 1 + i
			if backward {
				p = through - i
			}
			if q.Matches(&s.log[p-1]) && !yield(p) {
				return
			}
		}
	}
}

// candidates returns the shortest indexed list that holds every match of the item.
func (s *Store) candidates(item *eventstore.Item) ([]eventstore.Position, bool) {
	var best []eventstore.Position
	found := false
	consider := func(list []eventstore.Position) {
		if !found || len(list) < len(best) {
			best, found = list, true
		}
	}
	if !item.Stream.IsZero() {
		consider(s.streams[item.Stream])
	}
	if item.Category != "" {
		consider(s.categories[item.Category])
	}
	if len(item.Types) == 1 {
		consider(s.types[item.Types[0]])
	}
	for _, tag := range item.Tags {
		consider(s.tags[tag])
	}
	return best, found
}

// Lookup implements eventstore.Store; keys are scoped to the whole log.
func (s *Store) Lookup(ctx context.Context, _ eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	if err := ctx.Err(); err != nil {
		return eventstore.Receipt{}, false, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return eventstore.Receipt{}, false, eventstore.ErrClosed
	}
	first, used := s.keys[key]
	if !used {
		return eventstore.Receipt{}, false, nil
	}
	return duplicate(first), true, nil
}

// Head implements eventstore.Store.
func (s *Store) Head(ctx context.Context) (eventstore.Position, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return 0, eventstore.ErrClosed
	}
	return eventstore.Position(len(s.log)), nil
}

// Read implements eventstore.Store.
func (s *Store) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	return func(yield func(eventstore.Recorded, error) bool) {
		fail := func(err error) { yield(eventstore.Recorded{}, err) }
		if err := q.Validate(); err != nil {
			fail(err)
			return
		}
		if err := o.Validate(); err != nil {
			fail(err)
			return
		}
		head, err := s.Head(ctx)
		if err != nil {
			fail(err)
			return
		}
		after, through := o.After, head
		if o.Through != 0 {
			through = min(through, o.Through)
		}
		left := o.Limit
		for after < through {
			if err := ctx.Err(); err != nil {
				fail(err)
				return
			}
			most := pageSize
			if o.Limit > 0 {
				most = min(most, left)
			}
			page, err := s.page(q, after, through, o.Backward, most)
			if err != nil {
				fail(err)
				return
			}
			for _, r := range page {
				if !yield(r, nil) {
					return
				}
			}
			if left -= len(page); len(page) < most || o.Limit > 0 && left == 0 {
				return
			}
			if o.Backward {
				through = page[len(page)-1].Position - 1
			} else {
				after = page[len(page)-1].Position
			}
		}
	}
}

func (s *Store) page(q eventstore.Query, after, through eventstore.Position, backward bool, most int) ([]eventstore.Recorded, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, eventstore.ErrClosed
	}
	var page []eventstore.Recorded
	for p := range s.scan(q, after, through, backward) {
		page = append(page, s.log[p-1])
		if len(page) == most {
			break
		}
	}
	return page, nil
}

// Subscribe implements eventstore.Store.
func (s *Store) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		if err := q.Validate(); err != nil {
			yield(eventstore.Batch{}, err)
			return
		}
		first := true
		for {
			if err := ctx.Err(); err != nil {
				yield(eventstore.Batch{}, err)
				return
			}
			s.mu.RLock()
			head, grown, closed := eventstore.Position(len(s.log)), s.grown, s.closed
			s.mu.RUnlock()
			if closed {
				yield(eventstore.Batch{}, eventstore.ErrClosed)
				return
			}
			if head > after || first && head == after {
				batch := eventstore.Batch{Through: head, CaughtUp: true}
				page, err := s.page(q, after, head, false, pageSize)
				if err != nil {
					yield(eventstore.Batch{}, err)
					return
				}
				if len(page) == pageSize && page[pageSize-1].Position < head {
					batch.Through, batch.CaughtUp = page[pageSize-1].Position, false
				}
				batch.Events = page
				after, first = batch.Through, false
				if !yield(batch, nil) {
					return
				}
				continue
			}
			select {
			case <-grown:
			case <-ctx.Done():
			}
		}
	}
}
