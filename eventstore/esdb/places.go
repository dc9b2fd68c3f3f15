package esdb

import (
	"context"
	"errors"
	"io"
	"math"
	"slices"
	"sync"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// places remembers positions that the server gave lately. A server can begin
// to read only there: positions are places in its files, and one in between is
// refused.
type places struct {
	mu  sync.Mutex
	all []eventstore.Position // ascending
}

const mostPlaces = 4096

func (p *places) add(given ...eventstore.Position) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, g := range given {
		if n := len(p.all); g == 0 || n > 0 && g <= p.all[n-1] {
			continue // it came out of order: it is not needed
		}
		if len(p.all) == mostPlaces {
			p.all = slices.Delete(p.all, 0, mostPlaces/2)
		}
		p.all = append(p.all, g)
	}
}

// floor returns the last place at or before the position; 0 when none is known.
func (p *places) floor(at eventstore.Position) eventstore.Position {
	p.mu.Lock()
	defer p.mu.Unlock()
	i, found := slices.BinarySearch(p.all, at)
	switch {
	case found:
		return at
	case i == 0:
		return 0
	}
	return p.all[i-1]
}

// from returns where a read or subscription that begins at the position begins.
func from(p eventstore.Position) driver.AllFrom {
	if p == 0 {
		return driver.AllFrom{Start: true}
	}
	return driver.AllFrom{Position: driver.Position{Commit: uint64(p), Prepare: uint64(p)}}
}

// end is the last event of the log at some moment.
type end struct {
	position eventstore.Position
	name     string // of its stream, as on the server
	kind     string // its type
}

// tip knows the last event of the log as of some place in the database, so that
// what others have written behind it need not be looked through again.
type tip struct {
	mu    sync.Mutex
	last  end
	upTo  eventstore.Position // looked through up to here
	known eventstore.Position // an event of the log lies here, perhaps a later one than last
}

// reached: an event of the log lies at the position.
func (t *tip) reached(p eventstore.Position) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.known = max(t.known, p)
}

// set takes in the last event, or none, of the database up to the place.
func (t *tip) set(last end, upTo eventstore.Position) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if upTo <= t.upTo {
		return
	}
	t.upTo = upTo
	if last.position > t.last.position {
		t.last = last
		t.known = max(t.known, last.position)
	}
}

func (t *tip) get() (last end, upTo, known eventstore.Position) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last, t.upTo, t.known
}

// Head implements eventstore.Store: it asks the leader, since other processes
// append too, and may have stored how far they have come by what they know. What is
// not of the log does not count.
func (s *Store) Head(ctx context.Context) (eventstore.Position, error) {
	if err := s.enter(ctx); err != nil {
		return 0, err
	}
	defer s.leave()
	last, err := s.findEndAt(ctx, true)
	return last.position, err
}

// findEnd reads backward from the end of the database until it finds an event
// of the log, or comes to what was looked through before. A node that does not
// have what is known to be there lags: then the leader is asked.
func (s *Store) findEnd(caller context.Context) (end, error) {
	found, err := s.findEndAt(caller, false)
	if _, _, known := s.tip.get(); err == nil && found.position < known {
		return s.findEndAt(caller, true)
	}
	return found, err
}

func (s *Store) findEndAt(caller context.Context, leader bool) (end, error) {
	ctx, cancel := s.within(caller)
	defer cancel()
	last, upTo, _ := s.tip.get()
	var newest eventstore.Position
	var found end
	at, count := driver.AllFrom{End: true, Leader: leader}, uint64(4)
	// What lies behind the log's last event may be much: only silence is bounded.
	r := reading{s: s, caller: caller}
	err := r.resume(ctx, "read the end of the log", func(ctx context.Context, tell func()) error {
		for {
			n, done, err := s.endWithin(ctx, &at, count, upTo, &newest, &found, tell)
			if done || err != nil || n == 0 {
				return err
			}
			count = math.MaxInt64
		}
	})
	if err != nil {
		return end{}, err
	}
	if found.position == 0 {
		found = last
	}
	s.tip.set(found, newest)
	s.places.add(found.position)
	return found, nil
}

func (s *Store) endWithin(ctx context.Context, at *driver.AllFrom, count uint64, upTo eventstore.Position, newest *eventstore.Position, found *end, tell func()) (n int, done bool, err error) {
	reader, err := s.opening(ctx, func(ctx context.Context) (driver.Reader, error) {
		return s.driver.ReadAll(ctx, *at, true, count)
	})
	if err != nil {
		return 0, false, err
	}
	defer reader.close()
	for ; ; n++ {
		r, err := reader.next()
		if errors.Is(err, io.EOF) || driver.KindOf(err) == driver.NotFound {
			return n, false, nil
		}
		if err != nil {
			return n, false, err
		}
		tell()
		position := eventstore.Position(r.Position.Commit)
		if *newest == 0 {
			*newest = position
		}
		if upTo > 0 && position <= upTo {
			return n, true, nil
		}
		*at = driver.AllFrom{Position: r.Position, Leader: at.Leader}
		_, err = s.decode(r)
		if errors.Is(err, errForeign) {
			continue
		}
		// An event that cannot be read is one of the log all the same.
		*found = end{position: position, name: r.Stream, kind: r.Type}
		return n, true, nil
	}
}
