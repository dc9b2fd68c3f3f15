package esdb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// Append implements eventstore.Store. All events, and all conditions, are of
// one stream; keys are those of that stream.
//
// Every write expects an exact revision, those without conditions too: then
// what became of it can be found out, however often it was cut off. Writes to
// one stream take turns within a process; those to different streams do not
// wait for each other.
func (s *Store) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	given := make([]bool, len(c.Events))
	for i := range c.Events {
		given[i] = c.Events[i].ID != uuid.Nil
	}
	c, err := c.Prepare(s.limits, s.settings.now)
	if err != nil {
		return eventstore.Receipt{}, err
	}
	if err := supported(c); err != nil {
		return eventstore.Receipt{}, err
	}
	events, err := encode(c, given)
	if err != nil {
		return eventstore.Receipt{}, err
	}
	if err := s.fits(events); err != nil {
		return eventstore.Receipt{}, err
	}
	if err := s.enter(ctx); err != nil {
		return eventstore.Receipt{}, err
	}
	defer s.leave()
	k, err := s.turn(ctx, c.Events[0].Stream)
	if err != nil {
		return eventstore.Receipt{}, err
	}
	defer s.streams.give(k)
	// Patience begins anew: one that was used up by waiting for others would leave
	// none to find out what became of a write that is cut off.
	bounded, cancel := s.patient(ctx)
	defer cancel()
	a := appending{s: s, k: k, c: c, events: events, name: s.name(k.stream), caller: ctx}
	return a.run(bounded)
}

// turn waits for the turn of the stream, as long as Patience allows.
func (s *Store) turn(ctx context.Context, stream eventstore.Stream) (*known, error) {
	bounded, cancel := s.patient(ctx)
	defer cancel()
	k, err := s.streams.take(bounded, stream)
	if err != nil {
		if end := s.ended(ctx); end != nil {
			return nil, end
		}
		return nil, fmt.Errorf("%w: %w for other writes of this process to stream %q", eventstore.ErrUnavailable, err, stream.String())
	}
	return k, nil
}

// supported refuses what one append of one stream cannot do.
func supported(c eventstore.Commit) error {
	stream := c.Events[0].Stream
	for i := range c.Events {
		if other := c.Events[i].Stream; other != stream {
			return fmt.Errorf("a commit of the streams %q and %q: EventStoreDB writes one stream at a time: %w", stream.String(), other.String(), errors.ErrUnsupported)
		}
		if t := c.Events[i].Type; strings.HasPrefix(t, "$") {
			return fmt.Errorf("%w: the event type %q: EventStoreDB keeps types that begin with $ for itself", eventstore.ErrInvalid, t)
		}
	}
	for i := range c.Conditions {
		switch condition := &c.Conditions[i]; {
		case condition.Kind == eventstore.ConditionNoneMatch:
			return fmt.Errorf("condition %d is about a query: EventStoreDB checks the stream that is written alone: %w", i, errors.ErrUnsupported)
		case condition.Stream != stream:
			return fmt.Errorf("condition %d is about the stream %q, the commit writes %q: EventStoreDB checks the stream that is written alone: %w", i, condition.Stream.String(), stream.String(), errors.ErrUnsupported)
		}
	}
	return nil
}

// fits checks the size before anything is sent: the server's refusal of a large
// write may arrive without its reason.
func (s *Store) fits(events []driver.Event) error {
	size := 0
	for i := range events {
		size += len(events[i].Data) + len(events[i].Metadata) + len(events[i].Type)
	}
	if size > s.settings.appendBytes {
		return fmt.Errorf("%w: the commit has %d bytes with its metadata, at most %d are allowed in one append: divide it, or raise the server's MaxAppendSize and esdb.MaxAppend", eventstore.ErrTooLarge, size, s.settings.appendBytes)
	}
	return nil
}

// appending is one call of Append, which has the turn of its stream.
type appending struct {
	s      *Store
	k      *known
	c      eventstore.Commit
	events []driver.Event
	name   string
	caller context.Context // the caller's own; ends of others are not his
}

// errMoved: the stream is not at the expected revision.
var errMoved = errors.New("the stream has moved")

func (a *appending) run(ctx context.Context) (eventstore.Receipt, error) {
	fresh := false // what is known of the stream was read by this call
	look := func() error {
		fresh = true
		return a.look(ctx)
	}
	keyed := a.c.Key != ""
	expected, plain := a.plain()
	if !plain && (!a.k.last.known || keyed && a.k.scanned != a.k.last.revision) {
		if err := look(); err != nil {
			return eventstore.Receipt{}, err
		}
	}
	for n := 0; ; n++ {
		if keyed {
			if first, used := a.k.keys[a.c.Key]; used {
				if first.Fingerprint != a.c.Fingerprint {
					return eventstore.Receipt{}, fmt.Errorf("%w: %q", eventstore.ErrKeyReused, a.c.Key)
				}
				return duplicate(first), nil
			}
		}
		if !plain {
			if conflict := a.judge(); conflict != nil {
				if fresh {
					return eventstore.Receipt{}, conflict
				}
				// What is remembered proves nothing: others write too.
				if err := look(); err != nil {
					return eventstore.Receipt{}, err
				}
				continue
			}
			expected = driver.Expected(a.k.last.revision)
		}
		receipt, err := a.write(ctx, expected)
		if !errors.Is(err, errMoved) {
			return receipt, err
		}
		plain = false
		if n > 2 { // a follower that lags tells us old news
			pause(ctx, n)
		}
		if err := look(); err != nil {
			return eventstore.Receipt{}, err
		}
	}
}

// plain reports whether the server can judge all of the commit's conditions at
// once, and what it must be told to expect: a version, and no more. That spares
// a look at the stream.
func (a *appending) plain() (driver.Expected, bool) {
	if a.c.Key != "" || len(a.c.Conditions) != 1 {
		return 0, false
	}
	c := &a.c.Conditions[0]
	if c.Kind != eventstore.ConditionStreamAt || c.LastEvent != uuid.Nil || c.Revision.Version > math.MaxInt64 {
		return 0, false
	}
	return driver.Expected(int64(c.Revision.Version) - 1), true
}

// judge holds the conditions against what is known. The id of the last event is
// checked here: the revision that the server then checks says that the event
// known to be there is still the last one, since no revision is given twice.
func (a *appending) judge() error {
	at := a.k.last.revisions()
	for i := range a.c.Conditions {
		c := &a.c.Conditions[i]
		switch {
		case c.Kind == eventstore.ConditionStreamExists && at.Version == 0:
			return &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream}
		case c.Kind != eventstore.ConditionStreamAt:
		case c.Revision.Version != at.Version, c.LastEvent != uuid.Nil && c.LastEvent != a.k.last.id:
			return &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream, Expected: c.Revision, Actual: at}
		}
	}
	return nil
}

// look reads where the stream ends, and for a keyed commit all keys before that.
func (a *appending) look(ctx context.Context) error {
	var err error
	if a.c.Key != "" {
		err = a.s.scan(ctx, a.caller, a.k)
	} else {
		err = a.s.trying(ctx, a.caller, fmt.Sprintf("read the end of stream %q", a.name), func(ctx context.Context) error {
			r, err := a.s.one(ctx, a.name, driver.StreamFrom{End: true, Leader: true}, true)
			switch {
			case err != nil:
				return err
			case r == nil:
				a.k.forget()
				a.k.last = none
				return nil
			}
			e, err := a.s.own(r)
			if err == nil {
				a.k.last = last{known: true, revision: int64(r.Revision), position: e.Position, id: e.ID}
			}
			return err
		})
	}
	return err
}

// own decodes an event of a stream of the log, which must be deed's.
func (s *Store) own(r *driver.Recorded) (decoded, error) {
	e, err := s.decode(r)
	if errors.Is(err, errForeign) {
		return e, errIntruder(r)
	}
	return e, err
}

// scan reads on from what is known of the stream to its end.
func (s *Store) scan(ctx, caller context.Context, k *known) error {
	name := s.name(k.stream)
	return s.trying(ctx, caller, fmt.Sprintf("read the keys of stream %q", name), func(ctx context.Context) error {
		from := driver.StreamFrom{Start: true, Leader: true}
		if k.scanned >= 0 {
			from = driver.StreamFrom{Revision: uint64(k.scanned + 1), Leader: true}
		}
		missing := func() error {
			k.forget()
			k.last = none
			return nil
		}
		reader, err := s.driver.ReadStream(ctx, name, from, false, math.MaxInt64)
		switch {
		case driver.KindOf(err) == driver.NotFound:
			return missing()
		case err != nil:
			return err
		}
		defer reader.Close()
		for {
			r, err := reader.Next(ctx)
			switch {
			case driver.KindOf(err) == driver.NotFound:
				return missing()
			case errors.Is(err, io.EOF) && k.scanned < 0:
				return errHidden(name)
			case errors.Is(err, io.EOF):
				k.last = k.end
				return nil
			case err != nil:
				return err
			}
			if want := uint64(k.scanned + 1); r.Revision != want {
				return errMissing(name, want, r.Revision)
			}
			e, err := s.own(r)
			if err != nil {
				return err
			}
			k.see(&e)
		}
	})
}

// write sends the events, as often as it takes to know what became of them:
// always the same events with the same ids, and the same expectation. The
// server answers a repetition of what it has written with success; when the
// stream has moved meanwhile, the ids that stand at the expected place tell
// whose events came first. The place is taken then, so that no earlier attempt
// that is still on its way can be written any more.
func (a *appending) write(ctx context.Context, expected driver.Expected) (eventstore.Receipt, error) {
	var unknown error // an attempt was cut off
	rejected := 0
	for n := 0; ; n++ {
		once, stop := context.WithTimeout(ctx, attempt)
		at, err := a.s.driver.Append(once, a.name, expected, a.events)
		stop()
		switch {
		case err == nil:
			return a.written(ctx, expected, at)
		case driver.KindOf(err) == driver.WrongVersion && unknown == nil:
			return eventstore.Receipt{}, errMoved
		case driver.KindOf(err) == driver.WrongVersion:
			receipt, ours, err := a.find(ctx, expected)
			switch {
			case err != nil:
				return eventstore.Receipt{}, a.unknown(err)
			case ours:
				return receipt, nil
			}
			return eventstore.Receipt{}, errMoved
		case driver.Unsent(err):
			rejected = 0
			if unknown == nil && (ctx.Err() != nil || errors.Is(err, driver.ErrClosed)) {
				return eventstore.Receipt{}, a.s.failure(a.caller, fmt.Sprintf("append to stream %q", a.name), err)
			}
		case driver.KindOf(err) == driver.Deleted, driver.KindOf(err) == driver.TooLarge, driver.KindOf(err) == driver.Denied:
			if unknown != nil {
				return eventstore.Receipt{}, a.unknown(err)
			}
			return eventstore.Receipt{}, a.s.failure(a.caller, fmt.Sprintf("append to stream %q", a.name), err)
		case driver.KindOf(err) == driver.Rejected:
			// The call ended before the server had all events: it has written none. That
			// may be a large write that it refuses, or a connection that broke.
			rejected++
			if most := 20; unknown == nil && (rejected >= most || rejected >= 3 && a.size() > 64<<10) {
				return eventstore.Receipt{}, fmt.Errorf("append to stream %q: %d events of %d bytes were refused %d times without a reason: the server's MaxAppendSize may be less than esdb.MaxAppend: %w", a.name, len(a.events), a.size(), rejected, err)
			}
		default:
			unknown, rejected = err, 0
		}
		if ctx.Err() != nil {
			if unknown == nil {
				return eventstore.Receipt{}, a.s.failure(a.caller, fmt.Sprintf("append to stream %q", a.name), err)
			}
			return eventstore.Receipt{}, a.unknown(unknown)
		}
		pause(ctx, n)
	}
}

func (a *appending) size() int {
	size := 0
	for i := range a.events {
		size += len(a.events[i].Data) + len(a.events[i].Metadata)
	}
	return size
}

// unknown is the error of a commit that may or may not be written. What is
// known of the stream may be wrong from here on.
func (a *appending) unknown(err error) error {
	a.k.last.known = false
	if end := a.s.ended(a.caller); end != nil && !errors.Is(end, eventstore.ErrClosed) {
		return fmt.Errorf("%w: append to stream %q: %w: %w", eventstore.ErrOutcomeUnknown, a.name, end, err)
	}
	return fmt.Errorf("%w: append to stream %q: %w", eventstore.ErrOutcomeUnknown, a.name, err)
}

// written makes the receipt. Where the answer does not tell all positions they
// are read: it has that of the last event only.
func (a *appending) written(ctx context.Context, expected driver.Expected, at driver.Appended) (eventstore.Receipt, error) {
	n := uint64(len(a.events))
	first, last := at.Revision-(n-1), eventstore.Position(at.Position.Commit)
	// After a deletion the numbering goes on, so a new stream need not begin at 0.
	if at.Revision < n-1 || expected >= 0 && first != uint64(expected)+1 {
		return eventstore.Receipt{}, a.unknown(fmt.Errorf("the server says that %d events after %s end at revision %d", n, expected, at.Revision))
	}
	begin := last
	if n > 1 || last == 0 || at.Position.Commit != at.Position.Prepare {
		var err error
		if begin, err = a.positionOf(ctx, first, a.events[0].ID); err != nil {
			return eventstore.Receipt{}, a.unknown(err)
		}
		if last <= begin {
			if last, err = a.positionOf(ctx, at.Revision, a.events[n-1].ID); err != nil {
				return eventstore.Receipt{}, a.unknown(err)
			}
		}
	}
	return a.receipt(first, begin, last), nil
}

func (a *appending) positionOf(ctx context.Context, revision uint64, id uuid.UUID) (eventstore.Position, error) {
	var position eventstore.Position
	err := a.s.trying(ctx, a.caller, fmt.Sprintf("read event %d of stream %q, which was just written", revision, a.name), func(ctx context.Context) error {
		r, err := a.s.one(ctx, a.name, driver.StreamFrom{Revision: revision, Leader: true}, false)
		switch {
		case err != nil:
			return err
		case r == nil: // a node that follows gets it a moment later
			return &driver.Error{Kind: driver.Aborted, Err: errors.New("it is not there")}
		case r.Revision != revision || r.ID != id:
			return fmt.Errorf("%w: another one is there", eventstore.ErrGap)
		}
		e, err := a.s.own(r)
		position = e.Position
		return err
	})
	return position, err
}

// find looks for the events behind the expected revision, by their ids. That
// they are not there counts only when another event is there, or the stream
// ends before that place: the server has said that it does not end at it. An
// answer that knows of neither is older than the server's, and asked for again.
func (a *appending) find(ctx context.Context, expected driver.Expected) (eventstore.Receipt, bool, error) {
	var receipt eventstore.Receipt
	ours := false
	err := a.s.trying(ctx, a.caller, fmt.Sprintf("look for what was written to stream %q", a.name), func(ctx context.Context) error {
		from := driver.StreamFrom{Revision: uint64(expected + 1), Leader: true}
		reader, err := a.s.driver.ReadStream(ctx, a.name, from, false, uint64(len(a.events)))
		if driver.KindOf(err) == driver.NotFound {
			return a.endsBefore(ctx, expected)
		}
		if err != nil {
			return err
		}
		defer reader.Close()
		var first, last decoded
		for i := range a.events {
			r, err := reader.Next(ctx)
			if errors.Is(err, io.EOF) || driver.KindOf(err) == driver.NotFound {
				return a.endsBefore(ctx, expected)
			}
			if err != nil {
				return err
			}
			if r.ID != a.events[i].ID {
				return nil
			}
			if last, err = a.s.own(r); err != nil {
				return err
			}
			if i == 0 {
				first = last
			}
		}
		receipt, ours = a.receipt(first.revision, first.Position, last.Position), true
		return nil
	})
	return receipt, ours, err
}

// endsBefore returns an error that passes unless the stream ends before the
// expected revision, so that nothing was ever written behind it.
func (a *appending) endsBefore(ctx context.Context, expected driver.Expected) error {
	r, err := a.s.one(ctx, a.name, driver.StreamFrom{End: true, Leader: true}, true)
	switch {
	case err != nil:
		return err
	case r == nil && expected >= 0, r != nil && int64(r.Revision) < int64(expected):
		return nil
	}
	return &driver.Error{Kind: driver.Aborted, Err: fmt.Errorf("the stream does not end at %s, says the server, but what follows cannot be read", expected)}
}

// receipt takes in what was written, and tells it.
func (a *appending) receipt(first uint64, begin, end eventstore.Position) eventstore.Receipt {
	n := len(a.events)
	revision := int64(first) + int64(n) - 1
	r := eventstore.Receipt{
		First: begin, Last: end, Fingerprint: a.c.Fingerprint,
		Revisions: []eventstore.StreamRevision{{Stream: a.k.stream, Revision: eventstore.Revision{Version: uint64(revision + 1), Position: end}}},
	}
	at := last{known: true, revision: revision, position: end, id: a.c.Events[n-1].ID}
	if a.k.scanned == int64(first)-1 {
		a.k.scanned, a.k.end = revision, at
		if a.c.Key != "" {
			stored := duplicate(r)
			stored.Duplicate = false
			a.k.keys[a.c.Key] = stored
		}
	}
	a.k.last = at
	a.s.places.add(begin, end)
	a.s.tip.reached(end)
	return r
}

// Lookup implements eventstore.Store: keys are those of one stream, and as old
// as its events.
func (s *Store) Lookup(ctx context.Context, stream eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	if err := stream.Validate(); err != nil {
		return eventstore.Receipt{}, false, err
	}
	if err := s.enter(ctx); err != nil {
		return eventstore.Receipt{}, false, err
	}
	defer s.leave()
	k, err := s.turn(ctx, stream)
	if err != nil {
		return eventstore.Receipt{}, false, err
	}
	defer s.streams.give(k)
	bounded, cancel := s.patient(ctx)
	defer cancel()
	if first, used := k.keys[key]; used {
		return duplicate(first), true, nil
	}
	if err := s.scan(bounded, ctx, k); err != nil {
		return eventstore.Receipt{}, false, err
	}
	first, used := k.keys[key]
	if !used {
		return eventstore.Receipt{}, false, nil
	}
	return duplicate(first), true, nil
}
