package esdb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// database is an EventStoreDB in memory, as far as the notes on its semantics
// go: positions are places with gaps, and others than it gave are refused;
// repetitions are recognised by ids.
type database struct {
	mu      sync.Mutex
	all     []driver.Recorded
	streams map[string]*fakeStream
	grown   chan struct{}
	drops   chan struct{} // closed to drop all subscriptions

	// What goes wrong, asked before and after each append.
	before, after func(stream string, expected driver.Expected, events []driver.Event) error
	reads         func() error     // asked before each read
	subscribed    []driver.AllFrom // where subscriptions began
	silent        bool             // caught-up is never said
	ahead         int              // at the end a checkpoint names where the next event will lie: 1 as an event's position, 2 not; 3: before each event, its own
	mute          int              // so many subscriptions are never confirmed
	early         bool             // that a stream is missing is said by the call, not by its first answer
}

type fakeStream struct {
	events     []int // places in all
	hidden     int   // the first events that cannot be read any more
	deleted    bool  // soft; until the next write
	tombstoned bool
}

func newDatabase() *database {
	db := &database{streams: map[string]*fakeStream{}, grown: make(chan struct{}), drops: make(chan struct{})}
	db.write("$users", "$UserCreated", nil)
	return db
}

func kind(k driver.Kind, format string, args ...any) error {
	return &driver.Error{Kind: k, Err: fmt.Errorf(format, args...)}
}

// write puts an event in; db.mu is held, or nobody else knows db.
func (db *database) write(stream, eventType string, e *driver.Event) *driver.Recorded {
	s := db.streams[stream]
	if s == nil {
		s = &fakeStream{}
		db.streams[stream] = s
	}
	place := db.next()
	r := driver.Recorded{ID: uuid.New(), Stream: stream, Revision: uint64(len(s.events)), Position: driver.Position{Commit: place, Prepare: place}, Type: eventType}
	if e != nil {
		r.ID, r.JSON, r.Data, r.Metadata = e.ID, e.JSON, e.Data, e.Metadata
	}
	s.events = append(s.events, len(db.all))
	db.all = append(db.all, r)
	return &db.all[len(db.all)-1]
}

// next is where the next event will lie.
func (db *database) next() uint64 {
	n := len(db.all)
	if n == 0 {
		return 100
	}
	return db.all[n-1].Position.Commit + 50 + uint64(n%7)*13
}

func (db *database) wake() {
	close(db.grown)
	db.grown = make(chan struct{})
}

// system writes an event that is none of any log.
func (db *database) system(stream, eventType string) {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.write(stream, eventType, &driver.Event{ID: uuid.New(), Data: []byte("{}"), Metadata: []byte("{}")})
	db.wake()
}

// drop ends all subscriptions.
func (db *database) drop() {
	db.mu.Lock()
	defer db.mu.Unlock()
	close(db.drops)
	db.drops = make(chan struct{})
}

// client is a driver of the database.
type client struct {
	db   *database
	base context.Context
	stop context.CancelFunc
}

func (db *database) client() *client {
	c := &client{db: db}
	c.base, c.stop = context.WithCancel(context.Background())
	return c
}

var _ driver.Driver = (*client)(nil)

func (c *client) Close() error { c.stop(); return nil }

func (c *client) ended(ctx context.Context) error {
	if ctx.Err() != nil {
		return &driver.Error{Kind: driver.Ended, Unsent: true, Err: context.Cause(ctx)}
	}
	if c.base.Err() != nil {
		return driver.ErrClosed
	}
	return nil
}

func (c *client) Append(ctx context.Context, stream string, expected driver.Expected, events []driver.Event) (driver.Appended, error) {
	if err := c.ended(ctx); err != nil {
		return driver.Appended{}, err
	}
	db := c.db
	db.mu.Lock()
	before, after := db.before, db.after
	db.mu.Unlock()
	if before != nil {
		if err := before(stream, expected, events); err != nil {
			return driver.Appended{}, err
		}
	}
	at, err := db.append(stream, expected, events)
	if err == nil && after != nil {
		err = after(stream, expected, events)
	}
	return at, err
}

func (db *database) append(stream string, expected driver.Expected, events []driver.Event) (driver.Appended, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	s := db.streams[stream]
	if s == nil {
		s = &fakeStream{}
	}
	if s.tombstoned {
		return driver.Appended{}, kind(driver.Deleted, "stream %q is deleted", stream)
	}
	last := driver.Expected(len(s.events) - 1)
	if s.deleted && expected == driver.NoStream {
		expected = last
	}
	if expected != driver.Any && expected != last {
		// Repeated?
		if first := int(expected) + 1; expected >= driver.NoStream && first+len(events) <= len(s.events) {
			same := true
			for i := range events {
				same = same && db.all[s.events[first+i]].ID == events[i].ID
			}
			if same {
				return driver.Appended{Revision: uint64(first + len(events) - 1)}, nil // without a position
			}
		}
		return driver.Appended{}, kind(driver.WrongVersion, "wrong expected version: expecting '%d' but got '%d'", expected, last)
	}
	var r *driver.Recorded
	for i := range events {
		r = db.write(stream, events[i].Type, &events[i])
	}
	db.streams[stream].deleted = false
	db.wake()
	return driver.Appended{Revision: r.Revision, Position: r.Position}, nil
}

type fakeReader struct {
	events []driver.Recorded
	err    error
}

func (r *fakeReader) Next(ctx context.Context) (*driver.Recorded, error) {
	if ctx.Err() != nil {
		return nil, &driver.Error{Kind: driver.Ended, Err: context.Cause(ctx)}
	}
	if len(r.events) == 0 {
		return nil, r.err
	}
	e := r.events[0]
	r.events = r.events[1:]
	return &e, nil
}

func (r *fakeReader) Close() {}

func (c *client) failing() error {
	c.db.mu.Lock()
	reads := c.db.reads
	c.db.mu.Unlock()
	if reads != nil {
		return reads()
	}
	return nil
}

func (c *client) ReadStream(ctx context.Context, stream string, from driver.StreamFrom, backward bool, count uint64) (driver.Reader, error) {
	if err := errors.Join(c.ended(ctx), c.failing()); err != nil {
		return nil, err
	}
	db := c.db
	db.mu.Lock()
	defer db.mu.Unlock()
	s := db.streams[stream]
	if s != nil && s.tombstoned {
		return &fakeReader{err: kind(driver.Deleted, "stream %q is deleted", stream)}, nil
	}
	if (s == nil || s.deleted) && db.early {
		return nil, kind(driver.NotFound, "stream %q is not found", stream)
	}
	if s == nil || s.deleted {
		return &fakeReader{err: kind(driver.NotFound, "stream %q is not found", stream)}, nil
	}
	r := &fakeReader{err: io.EOF}
	at := int(from.Revision)
	if from.Start {
		at = 0
	}
	if from.End || backward && at >= len(s.events) {
		at = len(s.events) - 1
	}
	for ; uint64(len(r.events)) < count && at >= 0 && at < len(s.events); at++ {
		if at >= s.hidden {
			r.events = append(r.events, db.all[s.events[at]])
		}
		if backward {
			at -= 2
		}
	}
	return r, nil
}

// find returns the index of the event at the position; db.mu is held.
func (db *database) find(p driver.Position) (int, error) {
	i, found := slices.BinarySearchFunc(db.all, p.Commit, func(r driver.Recorded, p uint64) int {
		return int(int64(r.Position.Commit) - int64(p))
	})
	if !found && i < len(db.all) {
		return 0, kind(driver.InvalidPosition, "unexpected ReadAllResult: InvalidPosition")
	}
	return i, nil
}

func (c *client) ReadAll(ctx context.Context, from driver.AllFrom, backward bool, count uint64) (driver.Reader, error) {
	if err := errors.Join(c.ended(ctx), c.failing()); err != nil {
		return nil, err
	}
	db := c.db
	db.mu.Lock()
	defer db.mu.Unlock()
	r := &fakeReader{err: io.EOF}
	at := 0
	switch {
	case from.End:
		at = len(db.all)
	case !from.Start:
		var err error
		if at, err = db.find(from.Position); err != nil {
			return &fakeReader{err: err}, nil
		}
	}
	n := int(min(count, math.MaxInt32))
	if backward {
		r.events = slices.Clone(db.all[max(0, at-n):at])
		slices.Reverse(r.events)
	} else {
		r.events = slices.Clone(db.all[at:min(len(db.all), at+n)])
	}
	return r, nil
}

type fakeSubscription struct {
	db     *database
	base   context.Context
	drops  chan struct{}
	at     int
	filter driver.Filter
	caught bool
	skip   int
	told   int // the place of the last checkpoint that was ahead
	err    error
	regex  *regexp.Regexp
	closed chan struct{}
}

func (c *client) SubscribeStream(context.Context, string, driver.StreamFrom) (driver.Subscription, error) {
	return nil, errors.ErrUnsupported
}

func (c *client) SubscribeAll(ctx context.Context, after driver.AllFrom, filter driver.Filter) (driver.Subscription, error) {
	if err := errors.Join(c.ended(ctx), c.failing()); err != nil {
		return nil, err
	}
	db := c.db
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.mute > 0 {
		db.mute--
		db.mu.Unlock()
		<-ctx.Done()
		db.mu.Lock()
		return nil, &driver.Error{Kind: driver.Ended, Err: context.Cause(ctx)}
	}
	s := &fakeSubscription{db: db, base: c.base, drops: db.drops, filter: filter, told: -1}
	db.subscribed = append(db.subscribed, after)
	if filter.StreamRegex != "" {
		s.regex = regexp.MustCompile(filter.StreamRegex)
	}
	switch {
	case after.End:
		s.at = len(db.all)
	case !after.Start:
		i, err := db.find(after.Position)
		s.at, s.err = i+1, err
	}
	return s, nil
}

func (s *fakeSubscription) match(r *driver.Recorded) bool {
	has := func(prefixes []string, text string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(text, p) })
	}
	switch f := s.filter; {
	case len(f.StreamPrefixes) > 0:
		return has(f.StreamPrefixes, r.Stream)
	case s.regex != nil:
		return s.regex.MatchString(r.Stream)
	case len(f.TypePrefixes) > 0:
		return has(f.TypePrefixes, r.Type)
	}
	return true
}

func (s *fakeSubscription) Next(ctx context.Context) (driver.Message, error) {
	for {
		if ctx.Err() != nil {
			return driver.Message{}, &driver.Error{Kind: driver.Ended, Err: context.Cause(ctx)}
		}
		if s.err != nil {
			return driver.Message{}, s.err
		}
		db := s.db
		db.mu.Lock()
		if at := s.at; db.ahead > 0 && s.told != at && (at == len(db.all) || at < len(db.all) && db.ahead == 3) {
			s.told = at
			p := driver.Position{Commit: db.next(), Prepare: db.next()}
			switch {
			case at < len(db.all):
				p = db.all[at].Position
			case db.ahead == 2:
				p.Prepare = 0
			}
			db.mu.Unlock()
			return driver.Message{Checkpoint: &p}, nil
		}
		if s.at < len(db.all) {
			r := db.all[s.at]
			s.at++
			db.mu.Unlock()
			if s.match(&r) {
				s.skip = 0
				return driver.Message{Event: &r}, nil
			}
			if s.skip++; s.skip%32 == 0 {
				return driver.Message{Checkpoint: &r.Position}, nil
			}
			continue
		}
		grown := db.grown
		silent := db.silent
		db.mu.Unlock()
		if !s.caught && !silent {
			s.caught = true
			return driver.Message{CaughtUp: true}, nil
		}
		select {
		case <-grown:
		case <-s.drops:
			s.err = kind(driver.Unavailable, "the connection is closing")
		case <-s.base.Done():
			s.err = driver.ErrClosed
		case <-ctx.Done():
		}
	}
}

func (s *fakeSubscription) Close() {}

func (c *client) Delete(_ context.Context, stream string, _ driver.Expected) (driver.Position, error) {
	c.db.mu.Lock()
	defer c.db.mu.Unlock()
	s := c.db.streams[stream]
	s.hidden, s.deleted = len(s.events), true
	r := c.db.write("$$"+stream, "$metadata", nil)
	return r.Position, nil
}

func (c *client) Tombstone(_ context.Context, stream string, _ driver.Expected) (driver.Position, error) {
	c.db.mu.Lock()
	defer c.db.mu.Unlock()
	r := c.db.write(stream, "$streamDeleted", nil)
	c.db.streams[stream].tombstoned = true
	return r.Position, nil
}

func (c *client) Metadata(context.Context, string) ([]byte, error) { return nil, errors.ErrUnsupported }

func (c *client) SetMetadata(context.Context, string, driver.Expected, []byte) error {
	return errors.ErrUnsupported
}

// truncate hides the first events of the stream, as $tb does.
func (db *database) truncate(stream string, before int) {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.streams[stream].hidden = before
}
