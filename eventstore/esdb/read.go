package esdb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"slices"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// page is how many events of a stream are read from its end at once.
const page = 512

// errEnough ends a read that has what it needs.
var errEnough = errors.New("enough")

// Read implements eventstore.Store. Streams are read by themselves; forward
// reads of anything else are made by the server's filters, backward ones look at
// every event of the database on the way.
func (s *Store) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	return func(yield func(eventstore.Recorded, error) bool) {
		fail := func(err error) { yield(eventstore.Recorded{}, err) }
		for _, err := range []error{q.Validate(), o.Validate(), ctx.Err()} {
			if err != nil {
				fail(err)
				return
			}
		}
		if s.closed() {
			fail(eventstore.ErrClosed)
			return
		}
		inner, cancel := s.within(ctx)
		defer cancel()
		r := reading{s: s, caller: ctx, q: q, o: o, left: o.Limit, yield: func(e *eventstore.Recorded) bool { return yield(*e, nil) }}
		if o.Through == 0 {
			r.o.Through = math.MaxUint64
		}
		if o.Limit == 0 {
			r.left = math.MaxInt
		}
		var err error
		stream, single := oneStream(q)
		switch {
		case single && o.Backward:
			err = r.streamBackward(inner, stream)
		case single:
			err = r.streamForward(inner, stream)
		case o.Backward:
			err = r.backward(inner)
		default:
			err = r.forward(inner)
		}
		if err != nil && !errors.Is(err, errEnough) {
			fail(err)
		}
	}
}

// oneStream reports whether the query is about one stream alone.
func oneStream(q eventstore.Query) (eventstore.Stream, bool) {
	if len(q.Items) == 0 {
		return eventstore.Stream{}, false
	}
	stream := q.Items[0].Stream
	for i := range q.Items {
		if q.Items[i].Stream != stream {
			return eventstore.Stream{}, false
		}
	}
	return stream, !stream.IsZero()
}

// reading is one Read.
type reading struct {
	s      *Store
	caller context.Context
	q      eventstore.Query
	o      eventstore.ReadOptions // Through is never 0
	left   int
	yield  func(*eventstore.Recorded) bool
}

// give yields the event if it matches and lies between the bounds, and returns
// errEnough when no more is wanted.
func (r *reading) give(e *eventstore.Recorded) error {
	if e.Position <= r.o.After || e.Position > r.o.Through || !r.q.Matches(e) {
		return nil
	}
	if r.left--; !r.yield(e) || r.left == 0 {
		return errEnough
	}
	return nil
}

// judge gives what was decoded. What cannot be read ends the read if it may be
// what is asked for.
func (r *reading) judge(e *decoded, err error) error {
	switch {
	case err == nil:
		return r.give(&e.Recorded)
	case errors.Is(err, errForeign), e.Position > 0 && (e.Position <= r.o.After || e.Position > r.o.Through || !concerns(r.q, &e.Recorded)):
		return nil
	}
	return err
}

// resume runs fn again after failures that pass, until the server has been
// waited for long enough without news.
func (r *reading) resume(ctx context.Context, what string, fn func(ctx context.Context, news func()) error) error {
	var since time.Time // of the first failure behind the last news
	for n := 0; ; n++ {
		began := time.Now()
		// Only getting at a server is bounded here; what it sends is waited for by fn.
		err := fn(ctx, func() { since, began, n = time.Time{}, time.Time{}, 0 })
		if err == nil || errors.Is(err, errEnough) {
			return err
		}
		if since.IsZero() {
			if since = began; began.IsZero() {
				since = time.Now() // the time that the receiver takes does not count
			}
		}
		if !again(ctx, err) || time.Since(since) > r.s.settings.patience {
			return r.s.failure(r.caller, what, err)
		}
		pause(ctx, n)
	}
}

// opening opens a read that ends when the server has said nothing for as long
// as it is waited for. The time that the receiver takes does not count.
func (s *Store) opening(ctx context.Context, open func(context.Context) (driver.Reader, error)) (*patientReader, error) {
	inner, cancel := context.WithCancelCause(ctx)
	p := &patientReader{ctx: inner, cancel: cancel, patience: s.settings.patience}
	p.timer = time.AfterFunc(p.patience, func() { cancel(errPatience) })
	reader, err := open(inner)
	p.timer.Stop()
	if err != nil {
		cancel(nil)
		return nil, err
	}
	p.reader = reader
	return p, nil
}

type patientReader struct {
	reader   driver.Reader
	ctx      context.Context
	cancel   context.CancelCauseFunc
	timer    *time.Timer
	patience time.Duration
}

func (p *patientReader) next() (*driver.Recorded, error) {
	p.timer.Reset(p.patience)
	r, err := p.reader.Next(p.ctx)
	p.timer.Stop()
	return r, err
}

func (p *patientReader) close() {
	p.reader.Close()
	p.cancel(nil)
}

// streamForward yields a stream in order. It is read from its end first: that
// tells where it ends at this moment, is all there is to do for most streams, and
// finds what follows a position without reading what lies before it.
func (r *reading) streamForward(ctx context.Context, stream eventstore.Stream) error {
	name := r.s.name(stream)
	what := fmt.Sprintf("read stream %q", name)
	var late []decoded // the last events, the last one first
	complete := false
	count := uint64(page)
	if r.left < page/4 && r.o.After == 0 {
		count = 1 // the beginning is wanted; this tells where the stream ends
	}
	err := r.resume(ctx, what, func(ctx context.Context, news func()) error {
		late, complete = late[:0], false
		err := r.s.readStream(ctx, name, driver.StreamFrom{End: true}, true, count, func(e *decoded) error {
			if n := len(late); n > 0 && late[n-1].revision != e.revision+1 {
				return errMissing(name, e.revision+2, late[n-1].Version)
			}
			if e.Position <= r.o.After {
				complete = true
				return errEnough
			}
			late = append(late, *e)
			complete = e.revision == 0
			return nil
		})
		if errors.Is(err, errEnough) {
			return nil
		}
		return err
	})
	if err != nil || len(late) == 0 {
		return err
	}
	first := late[len(late)-1].revision
	if !complete && uint64(len(late)) < count {
		return errMissing(name, 1, first+1)
	}
	var keys *known // collects what a write with a key needs to know
	if r.o.After == 0 && r.o.Through == math.MaxUint64 {
		keys = &known{scanned: -1, end: none, keys: map[string]eventstore.Receipt{}}
	}
	if !complete {
		next := uint64(0)
		err := r.resume(ctx, what, func(ctx context.Context, news func()) error {
			if next == first {
				return nil
			}
			return r.s.readStream(ctx, name, driver.StreamFrom{Revision: next}, false, first-next, func(e *decoded) error {
				if e.revision != next && !(next == 0 && e.Position <= r.o.After) {
					return errMissing(name, next+1, e.Version)
				}
				news()
				next = e.revision + 1
				if e.Position > r.o.Through {
					return errEnough
				}
				if keys != nil {
					keys.see(e)
				}
				return r.give(&e.Recorded)
			})
		})
		if err != nil {
			return err
		}
		if next != first {
			return errMissing(name, next+1, first+1)
		}
	}
	for _, e := range slices.Backward(late) {
		if keys != nil {
			keys.see(&e)
		}
		if err := r.give(&e.Recorded); err != nil {
			return err
		}
	}
	if keys != nil {
		r.s.streams.learn(stream, keys)
	}
	return nil
}

// streamBackward yields a stream in reverse.
func (r *reading) streamBackward(ctx context.Context, stream eventstore.Stream) error {
	name := r.s.name(stream)
	at := driver.StreamFrom{End: true}
	begun, next := false, uint64(0) // the revision that must come next, once begun
	err := r.resume(ctx, fmt.Sprintf("read stream %q", name), func(ctx context.Context, news func()) error {
		count := uint64(math.MaxInt64)
		if r.left < page {
			count = page
		}
		for {
			got := uint64(0)
			err := r.s.readStream(ctx, name, at, true, count, func(e *decoded) error {
				if begun && e.revision != next {
					return errMissing(name, e.revision+2, next+2)
				}
				news()
				got++
				if e.Position <= r.o.After {
					return errEnough
				}
				if err := r.give(&e.Recorded); err != nil {
					return err
				}
				if e.revision == 0 {
					return errEnough
				}
				begun, next = true, e.revision-1
				at = driver.StreamFrom{Revision: next}
				return nil
			})
			if err != nil || got == 0 {
				return err
			}
		}
	})
	if err == nil && begun {
		return errMissing(name, 1, next+2)
	}
	return err
}

// readStream hands each event of the stream to fn. A stream that does not exist
// has none.
func (s *Store) readStream(ctx context.Context, name string, at driver.StreamFrom, backward bool, count uint64, fn func(*decoded) error) error {
	at.Leader = true // decisions are made on what is read of a stream
	reader, err := s.opening(ctx, func(ctx context.Context) (driver.Reader, error) {
		return s.driver.ReadStream(ctx, name, at, backward, count)
	})
	if err != nil {
		if driver.KindOf(err) == driver.NotFound {
			return nil
		}
		return err
	}
	defer reader.close()
	for n := 0; ; n++ {
		r, err := reader.next()
		switch {
		case driver.KindOf(err) == driver.NotFound:
			return nil
		case errors.Is(err, io.EOF):
			if n == 0 && at.End {
				return errHidden(name)
			}
			return nil
		case err != nil:
			return err
		}
		e, err := s.own(r)
		if err != nil {
			return err
		}
		if err := fn(&e); err != nil {
			return err
		}
	}
}

// forward yields the events of many streams, up to the end of the log at this
// moment.
func (r *reading) forward(ctx context.Context) error {
	last, err := r.s.findEnd(r.caller)
	if err != nil {
		return err
	}
	r.o.Through = min(r.o.Through, last.position)
	if r.o.After >= r.o.Through {
		return nil
	}
	to := goal{s: r.s, last: last}
	err = r.s.follow(ctx, r.caller, r.s.filter(r.q, last), r.o.After, r.s.settings.patience, func(n news) error {
		if n.event != nil && n.at <= r.o.Through {
			if err := r.judge(n.event, n.unreadable); err != nil {
				return err
			}
		}
		if n.caughtUp {
			if err := to.caughtUp(ctx); !errors.Is(err, errArrived) {
				return err
			}
			return errEnough
		}
		if n.at >= r.o.Through {
			return errEnough
		}
		return nil
	})
	return err
}

// backward yields the events of many streams in reverse.
func (r *reading) backward(ctx context.Context) error {
	const what = "read the log backward"
	at := driver.AllFrom{End: true}
	if r.o.Through != math.MaxUint64 {
		// The server begins before the position that it is given, which must be one of
		// its own: that of the first event behind the bound.
		first, err := r.behind(ctx)
		if err != nil {
			return err
		}
		if first != nil {
			at = driver.AllFrom{Position: first.Position}
			e, err := r.s.decode(first)
			if eventstore.Position(first.Position.Commit) <= r.o.Through {
				if err := r.judge(&e, err); err != nil {
					return err
				}
			}
		}
	}
	return r.resume(ctx, what, func(ctx context.Context, news func()) error {
		reader, err := r.s.opening(ctx, func(ctx context.Context) (driver.Reader, error) {
			return r.s.driver.ReadAll(ctx, at, true, math.MaxInt64)
		})
		if err != nil {
			return err
		}
		defer reader.close()
		for {
			got, err := reader.next()
			if errors.Is(err, io.EOF) || driver.KindOf(err) == driver.NotFound {
				return nil
			}
			if err != nil {
				return err
			}
			news()
			at = driver.AllFrom{Position: got.Position}
			if eventstore.Position(got.Position.Commit) <= r.o.After {
				return nil
			}
			e, err := r.s.decode(got)
			if err := r.judge(&e, err); err != nil {
				return err
			}
		}
	})
}

// behind returns the first event of the database at or behind Through; nil when
// there is none, or the server does not know the position.
func (r *reading) behind(ctx context.Context) (*driver.Recorded, error) {
	bounded, cancel := context.WithTimeoutCause(ctx, r.s.settings.patience, errPatience)
	defer cancel()
	var first *driver.Recorded
	err := r.s.trying(bounded, r.caller, "read the log backward", func(ctx context.Context) error {
		reader, err := r.s.driver.ReadAll(ctx, from(r.o.Through), false, 1)
		if err == nil {
			defer reader.Close()
			first, err = reader.Next(ctx)
		}
		if err != nil {
			first = nil
			if !driver.Transient(err) && driver.KindOf(err) != driver.Ended && !errors.Is(err, driver.ErrClosed) {
				return nil
			}
		}
		return err
	})
	if first != nil && eventstore.Position(first.Position.Commit) < r.o.Through {
		first = nil // it is none of its positions
	}
	return first, err
}
