package postgres

import (
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// batch is what is judged and written together.
type batch struct {
	entries []*entry // those that have no answer yet, in order
	// looked is what was looked up for the batch, beside the ledger.
	looked  answers
	careful bool // nothing is taken for granted: streams and keys are looked up
	fresh   bool // the ledger was at the head when, or after, the batch was taken

	// The outcome of a judgement.
	winners  []*entry
	losers   []*entry
	later    []*entry              // share a key with a winner: judged again after it
	recorded []eventstore.Recorded // the winners' events, at the positions behind the ledger's
	tags     int                   // of those events
	keys     int                   // of the winners
	anchored bool                  // the judgement holds at this head only

	restless   int // how often others wrote in between
	collisions int // how often something that was taken for new was not
	// searched is how far the log was searched for entries that were sent without
	// an answer.
	searched eventstore.Position
}

// trying notes that the winners, judged on the log up to the position, are
// about to be sent. Of several tries to write an entry only one can land: each
// is judged on a log without the others' events, and whichever comes later
// finds that the log has moved, or ids of its own in it.
func (b *batch) trying(known eventstore.Position) {
	for _, e := range b.winners {
		if e.tries == 0 {
			e.from = known
		}
		e.tries++
	}
}

// refused notes that the last try is known to have written nothing.
func (b *batch) refused() {
	for _, e := range b.winners {
		e.tries--
	}
}

// tried returns the entries that may have been written.
func (b *batch) tried() []*entry {
	var some []*entry
	for _, e := range b.entries {
		if e.tries > 0 {
			some = append(some, e)
		}
	}
	return some
}

// entry is a commit on its way to the committer.
type entry struct {
	commit  eventstore.Commit
	rows    []byte // of commit.Events, for COPY
	offsets []int  // where each row ends
	settle  func(eventstore.Receipt, error)

	// The verdict, provisional until the batch is durable.
	receipt eventstore.Receipt
	err     error
	base    int // index of its first event in batch.recorded

	// tries is how often it was sent without an answer; if it was written, then
	// behind the position from.
	tries int
	from  eventstore.Position
	// faults is how often the transaction failed while inline projections applied it.
	faults int
}

// row returns the row of the i-th event.
func (e *entry) row(i int) []byte {
	start := 0
	if i > 0 {
		start = e.offsets[i-1]
	}
	return e.rows[start:e.offsets[i]]
}

// questions are what must be looked up in the database before a batch can be
// judged.
type questions struct {
	refresh    bool
	streams    map[eventstore.Stream]bool
	keys       map[string]bool
	conditions []question
}

// question asks for the first event after a position that matches.
type question struct {
	query eventstore.Query
	after eventstore.Position
	of    *eventstore.Condition
}

func (q *questions) any() bool {
	return q.refresh || len(q.streams) > 0 || len(q.keys) > 0 || len(q.conditions) > 0
}

// answers hold at the ledger's position.
type answers struct {
	keys    map[string]eventstore.Receipt // those that were used
	asked   map[string]bool               // those that were looked for
	matches map[*eventstore.Condition]match
}

func (a *answers) make() {
	if a.asked == nil {
		*a = answers{keys: map[string]eventstore.Receipt{}, asked: map[string]bool{}, matches: map[*eventstore.Condition]match{}}
	}
}

// forgetKeys is called when others have written: keys that were free may have
// been used since.
func (b *batch) forgetKeys() { clear(b.looked.asked) }

// match is the first event that matched; 0 for none up to the position.
type match struct{ found, through eventstore.Position }

// judge decides the entries in order, each seeing the effects of the earlier
// winners, on what the ledger knows. If that is not enough it says what else
// must be known, and the outcome is void.
func (b *batch) judge(l *ledger) (questions, []*entry) {
	b.winners, b.losers, b.later, b.recorded = b.winners[:0], b.losers[:0], b.later[:0], nil
	b.tags, b.keys, b.anchored = 0, 0, false
	j := judgement{b: b, l: l, heads: make(map[eventstore.Stream]*tip, len(b.entries))}
	events := 0
	for _, e := range b.entries {
		events += len(e.commit.Events)
		j.queries = j.queries || slices.ContainsFunc(e.commit.Conditions, func(c eventstore.Condition) bool { return c.Kind == eventstore.ConditionNoneMatch })
	}
	b.recorded = make([]eventstore.Recorded, 0, events) // kept by the tail
	var settled []*entry
	for _, e := range b.entries {
		e.receipt, e.err = eventstore.Receipt{}, nil
		switch j.decide(e) {
		case verdictWins:
			b.winners = append(b.winners, e)
		case verdictLoses:
			b.losers = append(b.losers, e)
		case verdictLater:
			b.later = append(b.later, e)
		case verdictSettled:
			settled = append(settled, e)
		}
	}
	return j.need, settled
}

type verdict uint8

const (
	verdictOpen    verdict = iota // something must be looked up
	verdictWins                   // it is to be written
	verdictLoses                  // a conflict, if the ledger is at the head
	verdictLater                  // it depends on what becomes of a winner with the same key
	verdictSettled                // a duplicate or a reused key, whatever else is true
)

type judgement struct {
	b     *batch
	l     *ledger
	need  questions
	heads map[eventstore.Stream]*tip
	tips  []tip  // what heads points to, made many at once
	now   recent // the winners' events, where there are queries to match them
	used  map[string]bool

	queries bool // some condition is a query
}

// tip is the head of a stream with the batch's winners on it.
type tip struct {
	streamHead
	assumed bool   // it was not looked up, but taken for new
	noted   *entry // the last commit that touched it, and where its receipt says so
	at      int
}

func (j *judgement) decide(e *entry) verdict {
	c := &e.commit
	if c.Key != "" {
		if v := j.key(e); v != verdictWins {
			return v
		}
	}
	open := false
	for i := range c.Conditions {
		conflict, known := j.check(c, &c.Conditions[i])
		if !known {
			open = true
			continue
		}
		if conflict != nil && !open {
			if c.Key != "" && !j.b.looked.asked[c.Key] {
				// A key that was used comes before any condition.
				j.needKey(c.Key)
				return verdictOpen
			}
			e.err = conflict
			return verdictLoses
		}
	}
	for i := range c.Events {
		if _, known := j.head(c.Events[i].Stream, j.mustBeNew(c, c.Events[i].Stream)); !known {
			open = true
		}
	}
	if open {
		return verdictOpen
	}
	j.write(e)
	return verdictWins
}

// key returns verdictWins for a key that is not known to be used.
func (j *judgement) key(e *entry) verdict {
	c := &e.commit
	if first, ok := j.b.looked.keys[c.Key]; ok {
		if first.Fingerprint != c.Fingerprint {
			e.err = fmt.Errorf("%w: %q", eventstore.ErrKeyReused, c.Key)
		} else {
			e.receipt = first
		}
		return verdictSettled
	}
	if j.used[c.Key] {
		return verdictLater
	}
	if j.b.careful && !j.b.looked.asked[c.Key] {
		j.needKey(c.Key)
		return verdictOpen
	}
	return verdictWins
}

func (j *judgement) needKey(key string) {
	if j.need.keys == nil {
		j.need.keys = map[string]bool{}
	}
	j.need.keys[key] = true
}

// mustBeNew reports whether the commit is conditional on the stream's absence.
func (j *judgement) mustBeNew(c *eventstore.Commit, s eventstore.Stream) bool {
	for i := range c.Conditions {
		if k := &c.Conditions[i]; k.Kind == eventstore.ConditionStreamAt && k.Stream == s && k.Revision.Version == 0 {
			return true
		}
	}
	return false
}

// head returns the head of a stream; false if it must be looked up. A stream
// that must be new is taken for new: were it not, its version 1 would be
// refused, and the batch judged again with care.
func (j *judgement) head(s eventstore.Stream, mustBeNew bool) (*tip, bool) {
	t, seen := j.heads[s]
	if seen && (mustBeNew || !t.assumed || t.revision.Version > 0) {
		return t, true
	}
	h, ok := j.l.heads.Get(s)
	if !ok && (!mustBeNew || j.b.careful) {
		if j.need.streams == nil {
			j.need.streams = map[eventstore.Stream]bool{}
		}
		j.need.streams[s] = true
		return nil, false
	}
	if len(j.tips) == cap(j.tips) {
		j.tips = make([]tip, 0, max(8, len(j.b.entries)))
	}
	j.tips = append(j.tips, tip{streamHead: h, assumed: !ok})
	t = &j.tips[len(j.tips)-1]
	j.heads[s] = t
	return t, true
}

func (j *judgement) check(of *eventstore.Commit, c *eventstore.Condition) (conflict *eventstore.ConflictError, known bool) {
	if c.Kind == eventstore.ConditionNoneMatch {
		return j.checkQuery(c)
	}
	if c.Kind == eventstore.ConditionStreamAt && c.Revision.Position > j.l.known {
		j.need.refresh = !j.b.fresh
		if j.need.refresh {
			return nil, false
		}
	}
	// Only a stream that is written to can be taken for new: nothing would collide
	// with another one.
	absent := c.Kind == eventstore.ConditionStreamAt && c.Revision.Version == 0
	t, known := j.head(c.Stream, absent && slices.ContainsFunc(of.Events, func(e eventstore.Event) bool { return e.Stream == c.Stream }))
	if !known {
		return nil, false
	}
	if c.Revision.Position != 0 && t.noted != nil {
		j.b.anchored = true // the position is one of this batch's, which may still move
	}
	actual := t.revision
	if c.Kind == eventstore.ConditionStreamExists {
		if actual.Version == 0 {
			return &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream}, true
		}
		return nil, true
	}
	if actual.Version != c.Revision.Version || c.Revision.Position != 0 && actual.Position != c.Revision.Position ||
		c.LastEvent != uuid.Nil && c.LastEvent != t.last {
		return &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream, Expected: c.Revision, Actual: actual}, true
	}
	return nil, true
}

func (j *judgement) checkQuery(c *eventstore.Condition) (conflict *eventstore.ConflictError, known bool) {
	if c.After > j.l.known {
		if !j.b.fresh {
			// It was decided on events that the ledger has not seen yet.
			j.need.refresh = true
			return nil, false
		}
		j.b.anchored = true // beyond the head: which events it passes over depends on where they land
	}
	found := eventstore.Position(0)
	after := c.After
	if after < j.l.recent.from {
		m, ok := j.b.looked.matches[c]
		if !ok || m.through < j.l.recent.from {
			j.need.conditions = append(j.need.conditions, question{query: c.Query, after: c.After, of: c})
			return nil, false
		}
		found, after = m.found, max(after, m.through)
	}
	if found == 0 {
		found = j.l.recent.firstMatch(c.Query, after)
	}
	if found == 0 {
		found = j.now.firstMatch(c.Query, c.After)
	}
	if found == 0 {
		return nil, true
	}
	return &eventstore.ConflictError{Kind: c.Kind, Query: c.Query, After: c.After, Found: found}, true
}

// write enters the events of a winner.
func (j *judgement) write(e *entry) {
	c := &e.commit
	head := j.l.known + eventstore.Position(len(j.b.recorded))
	e.base = len(j.b.recorded)
	e.receipt = eventstore.Receipt{First: head + 1, Last: head + eventstore.Position(len(c.Events)), Fingerprint: c.Fingerprint}
	for i := range c.Events {
		event := &c.Events[i]
		t := j.heads[event.Stream]
		head++
		t.revision = eventstore.Revision{Version: t.revision.Version + 1, Position: head}
		t.last = event.ID
		if t.noted != e {
			t.noted, t.at = e, len(e.receipt.Revisions)
			e.receipt.Revisions = append(e.receipt.Revisions, eventstore.StreamRevision{Stream: event.Stream})
		}
		e.receipt.Revisions[t.at].Revision = t.revision
		j.b.recorded = append(j.b.recorded, eventstore.Recorded{
			ID: event.ID, Stream: event.Stream, Version: t.revision.Version, Position: head,
			Type: event.Type, Tags: event.Tags, Data: event.Data, Metadata: event.Metadata, Time: event.Time,
		})
		j.b.tags += len(event.Tags)
		if j.queries {
			j.now.add(&j.b.recorded[len(j.b.recorded)-1])
		}
	}
	if c.Key != "" {
		if j.used == nil {
			j.used = map[string]bool{}
		}
		j.used[c.Key] = true
		j.b.keys++
	}
}

// move shifts what was judged behind the ledger's position to where it landed.
func (b *batch) move(by eventstore.Position) {
	if by == 0 {
		return
	}
	for i := range b.recorded {
		b.recorded[i].Position += by
	}
	for _, e := range b.winners {
		moveBy(&e.receipt, by)
	}
}

func moveBy(r *eventstore.Receipt, by eventstore.Position) {
	r.First += by
	r.Last += by
	for i := range r.Revisions {
		r.Revisions[i].Revision.Position += by
	}
}
