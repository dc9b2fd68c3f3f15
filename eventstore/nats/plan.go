package nats

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strconv"

	"github.com/google/uuid"
	client "github.com/nats-io/nats.go"

	"github.com/deed-go/deed/eventstore"
)

// plan is what one publish or one atomic batch is to write.
type plan struct {
	messages []*client.Msg
	entries  []*entry
	receipts []eventstore.Receipt // of the entries, with the numbers of messages, from 0 on, for positions
	held     []held
	left     []*entry // for later plans
	tracks   tracks

	// Most plans are one event.
	message [1]*client.Msg
	entry   [1]*entry
	receipt [1]eventstore.Receipt
}

// tracks are those of a plan, by stream. Most plans are about one.
type tracks struct {
	of     eventstore.Stream
	first  *track
	others map[eventstore.Stream]*track
}

func (t *tracks) get(of eventstore.Stream) *track {
	if t.first != nil && t.of == of {
		return t.first
	}
	return t.others[of]
}

func (t *tracks) put(of eventstore.Stream, new *track) {
	if t.first == nil {
		t.of, t.first = of, new
		return
	}
	if t.others == nil {
		t.others = map[eventstore.Stream]*track{}
	}
	t.others[of] = new
}

func (t *tracks) all() iter.Seq2[eventstore.Stream, *track] {
	return func(yield func(eventstore.Stream, *track) bool) {
		if t.first == nil || !yield(t.of, t.first) {
			return
		}
		for of, other := range t.others {
			if !yield(of, other) {
				return
			}
		}
	}
}

// held is an entry whose outcome is what it is if the plan is written.
type held struct {
	entry   *entry
	outcome func(first uint64) (eventstore.Receipt, error)
}

// track is what becomes of a stream within a plan.
type track struct {
	base    head
	fresh   bool // the base is what was stored after the entries were taken
	guarded bool // a message of the plan demands the base
	version uint64
	last    uuid.UUID
	trail   trail // of the next event
	events  []int // the numbers of its messages
	keys    map[string]int
	event   [1]int // room for the first of events
}

func (t *track) reset(base head, fresh bool) {
	*t = track{base: base, fresh: fresh, version: base.version, last: base.last, trail: base.previous}
	t.events = t.event[:0]
}

// revision returns where the stream is within the plan, once its first message
// has a sequence.
func (t *track) revision(first uint64) eventstore.Revision {
	r := t.base.revision()
	r.Version = t.version
	if n := len(t.events); n > 0 {
		r.Position = eventstore.Position(first + uint64(t.events[n-1]))
	}
	return r
}

// plan takes as many of the entries, in order, as can be written together.
// Those that fail for certain are told so. known are the streams whose
// remembered head was read after the entries were taken.
func (s *Store) plan(ctx context.Context, pending []*entry, known map[eventstore.Stream]bool, alone bool) (*plan, error) {
	p := &plan{}
	p.messages, p.entries, p.receipts = p.message[:0], p.entry[:0], p.receipt[:0]
	if err := s.track(ctx, p, pending, known); err != nil {
		return nil, err
	}
	for i, e := range pending {
		if len(p.entries) > 0 && (alone || len(p.messages)+e.most > batchMessages) {
			p.left = append(p.left, pending[i:]...)
			break
		}
		if err := s.judge(ctx, p, e, known); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// track finds the heads of the entries' streams: remembered, assumed to be zero
// where a condition says so, or read.
func (s *Store) track(ctx context.Context, p *plan, pending []*entry, known map[eventstore.Stream]bool) error {
	var unknown []eventstore.Stream
	for _, e := range pending {
		for _, of := range e.streams {
			if p.tracks.get(of) != nil {
				continue
			}
			t := new(track)
			p.tracks.put(of, t)
			if h, ok := s.heads.get(of); ok {
				t.reset(h, known[of])
			} else if !slices.ContainsFunc(e.commit.Conditions, func(c eventstore.Condition) bool {
				return c.Kind == eventstore.ConditionStreamAt && c.Stream == of && c.Revision.Version == 0
			}) {
				unknown = append(unknown, of)
			}
		}
	}
	return s.reread(ctx, p, unknown, known)
}

// reread reads the heads of streams that no message of the plan is about yet.
func (s *Store) reread(ctx context.Context, p *plan, streams []eventstore.Stream, known map[eventstore.Stream]bool) error {
	if len(streams) == 0 {
		return nil
	}
	read, err := s.refresh(ctx, streams, true)
	if err != nil {
		return err
	}
	for i, of := range streams {
		known[of] = true
		p.tracks.get(of).reset(read[i], true)
	}
	return nil
}

// judge adds the entry to the plan, tells it why not, or holds it.
func (s *Store) judge(ctx context.Context, p *plan, e *entry, known map[eventstore.Stream]bool) error {
	looked := false
	for {
		if t := p.tracks.get(e.writes[0]); e.sent && t.base.sequence != e.base.sequence {
			if t.base.sequence < e.base.sequence { // nothing can be concluded from it
				return errRewound(e.writes[0], e.base, t.base)
			}
			if written, err := s.wasWritten(ctx, e, t.base); written || err != nil {
				return err
			}
		}
		if e.commit.Key != "" {
			decided, err := s.judgeKey(ctx, p, e)
			if decided || err != nil {
				return err
			}
		}
		failed := -1
		for i := range e.commit.Conditions {
			if !holds(&e.commit.Conditions[i], p.tracks.get(e.commit.Conditions[i].Stream)) {
				failed = i
				break
			}
		}
		if failed < 0 {
			p.add(s.subjects, e)
			return nil
		}
		var stale []eventstore.Stream
		for _, of := range e.streams {
			if t := p.tracks.get(of); !t.fresh && !t.guarded {
				stale = append(stale, of)
			}
		}
		if first := e.writes[0]; len(stale) == 0 && e.uncertain && !looked && !p.tracks.get(first).guarded {
			// It may have been written since its first stream was looked at: that is looked
			// at once more, now that another one is known to have moved.
			looked, stale = true, []eventstore.Stream{first}
		}
		if len(stale) > 0 {
			if err := s.reread(ctx, p, stale, known); err != nil {
				return err
			}
			continue
		}
		c := &e.commit.Conditions[failed]
		t := p.tracks.get(c.Stream)
		if e.uncertain && len(t.events) == 0 && t.base.sequence == e.bases[slices.Index(e.streams, c.Stream)] {
			// It was sent behind another commit that has been given up since. Both may
			// arrive yet, and the condition holds then.
			e.finish(eventstore.Receipt{}, fmt.Errorf("append: %w: it was sent behind a commit that was given up", eventstore.ErrOutcomeUnknown))
			return nil
		}
		conflict := &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream}
		if c.Kind == eventstore.ConditionStreamAt {
			conflict.Expected = c.Revision
		}
		now := *t
		outcome := func(first uint64) (eventstore.Receipt, error) {
			if c.Kind == eventstore.ConditionStreamAt {
				conflict.Actual = now.revision(first)
			}
			return eventstore.Receipt{}, conflict
		}
		if t.guarded {
			p.held = append(p.held, held{e, outcome})
		} else {
			e.finish(outcome(0))
		}
		return nil
	}
}

func holds(c *eventstore.Condition, t *track) bool {
	if c.Kind == eventstore.ConditionStreamExists {
		return t.version > 0
	}
	if t.version != c.Revision.Version || c.LastEvent != uuid.Nil && t.last != c.LastEvent {
		return false
	}
	return c.Revision.Position == 0 || len(t.events) == 0 && t.base.sequence == uint64(c.Revision.Position)
}

// judgeKey reports whether the key decides the entry's outcome.
func (s *Store) judgeKey(ctx context.Context, p *plan, e *entry) (bool, error) {
	key, first := e.commit.Key, e.writes[0]
	t := p.tracks.get(first)
	if n, ok := t.keys[key]; ok {
		earlier, receipt := p.entries[n], p.receipts[n]
		p.held = append(p.held, held{e, func(first uint64) (eventstore.Receipt, error) {
			if earlier.commit.Fingerprint != e.commit.Fingerprint {
				return eventstore.Receipt{}, errKeyReused(key)
			}
			return duplicate(placed(receipt, first)), nil
		}})
		return true, nil
	}
	used, ok, err := s.lookup(ctx, first, t.base, key)
	if err != nil || !ok {
		return false, err
	}
	if used.fingerprint != e.commit.Fingerprint {
		e.finish(eventstore.Receipt{}, errKeyReused(key))
		return true, nil
	}
	receipt, err := s.receiptOf(ctx, used)
	if err != nil {
		return false, err
	}
	e.finish(duplicate(receipt), nil)
	return true, nil
}

func errKeyReused(key string) error { return fmt.Errorf("%w: %q", eventstore.ErrKeyReused, key) }

func duplicate(first eventstore.Receipt) eventstore.Receipt {
	first.Revisions = slices.Clone(first.Revisions)
	first.Duplicate = true
	return first
}

// placed turns numbers of messages into positions.
func placed(r eventstore.Receipt, first uint64) eventstore.Receipt {
	r.Revisions = slices.Clone(r.Revisions)
	return inPlace(r, first)
}

// inPlace is placed for a receipt that nobody needs as it was.
func inPlace(r eventstore.Receipt, first uint64) eventstore.Receipt {
	r.First += eventstore.Position(first)
	r.Last += eventstore.Position(first)
	for i := range r.Revisions {
		r.Revisions[i].Revision.Position += eventstore.Position(first)
	}
	return r
}

// add appends the entry's messages. The first message about a stream carries
// what the stream's last sequence must be: the server refuses a second one.
// Streams that the commit does not write get a message of their own for that,
// before the events.
func (p *plan) add(names subjects, e *entry) {
	start := len(p.messages)
	var guards []eventstore.Stream
	for _, of := range e.streams[len(e.writes):] {
		if t := p.tracks.get(of); !t.guarded {
			t.guarded = true
			guards = append(guards, of)
		}
	}
	count := len(guards) + len(e.commit.Events)
	for i, of := range guards {
		p.messages = append(p.messages, &client.Msg{Subject: names.conditions(), Data: appendIndex(nil, i+1, count), Header: client.Header{
			headerExpected:        {strconv.FormatUint(p.tracks.get(of).base.sequence, 10)},
			headerExpectedSubject: {names.of(of)},
		}})
	}
	receipt := eventstore.Receipt{First: eventstore.Position(len(p.messages)), Fingerprint: e.commit.Fingerprint}
	for i := range e.commit.Events {
		number := len(p.messages)
		event, t := &e.commit.Events[i], p.tracks.get(e.commit.Events[i].Stream)
		at := place{version: t.version + 1, before: checkOf(t.last), previous: t.trail, number: number, index: number - start + 1, count: count}
		if i == 0 && e.commit.Key != "" {
			at.key, at.fingerprint = e.commit.Key, e.commit.Fingerprint
			if t.keys == nil {
				t.keys = map[string]int{}
			}
			t.keys[e.commit.Key] = len(p.entries)
		}
		m := &client.Msg{Subject: e.encoded[i].subject, Header: make(client.Header, 4), Data: e.encoded[i].payload(at)}
		if !t.guarded {
			t.guarded = true
			m.Header[headerExpected] = []string{strconv.FormatUint(t.base.sequence, 10)}
		}
		p.messages = append(p.messages, m)
		t.version++
		t.trail = t.trail.next(t.version, planned|uint64(number))
		t.last = event.ID
		t.events = append(t.events, number)
		of := slices.IndexFunc(receipt.Revisions, func(r eventstore.StreamRevision) bool { return r.Stream == event.Stream })
		if of < 0 {
			of = len(receipt.Revisions)
			receipt.Revisions = append(receipt.Revisions, eventstore.StreamRevision{Stream: event.Stream})
		}
		receipt.Revisions[of].Revision = eventstore.Revision{Version: t.version, Position: eventstore.Position(number)}
		receipt.Last = eventstore.Position(number)
	}
	e.base = p.tracks.get(e.writes[0]).base
	e.bases = e.bases[:0]
	for _, of := range e.streams {
		e.bases = append(e.bases, p.tracks.get(of).base.sequence)
	}
	p.entries = append(p.entries, e)
	p.receipts = append(p.receipts, receipt)
}

// streams returns those that the plan is about.
func (p *plan) streams() []eventstore.Stream {
	var all []eventstore.Stream
	for of, t := range p.tracks.all() {
		if t.guarded {
			all = append(all, of)
		}
	}
	return all
}
