package esdbserver

import (
	"context"
	"encoding/json"
	"math"

	"github.com/google/uuid"
)

// What an append may expect of a stream, besides a revision.
const (
	expectAny    int64 = -2
	expectNone   int64 = -1
	expectExists int64 = -4
)

type verdict int

const (
	written verdict = iota + 1
	wrongVersion
	streamDeleted
)

// outcome is the answer to a write.
type outcome struct {
	verdict  verdict
	current  int64  // the last revision before; only with wrongVersion
	last     int64  // the last revision written, or written before
	position uint64 // of that event; 0 when unknown
	repeat   bool   // nothing was written now
}

// judge decides about an append as the real server's index writer does:
// tombstone, existence, idempotent repeats, revision.
func (l *log) judge(name string, expected int64, ids []uuid.UUID) (outcome, bool) {
	current := l.last(name)
	wrong := outcome{verdict: wrongVersion, current: current}
	if current == deletedRevision {
		return outcome{verdict: streamDeleted}, false
	}
	soft := l.isSoftDeleted(name)
	if expected == expectExists {
		if soft {
			return outcome{verdict: streamDeleted}, false
		}
		if current < 0 && l.last(metastreamOf(name)) < 0 {
			return wrong, false
		}
	}
	s := l.stream(name)
	if expected == expectAny || expected == expectExists {
		var end *record
		for i, id := range ids {
			seen := s.first[id]
			if seen == nil || len(l.records)-seen.ordinal > l.recent {
				if i > 0 {
					return wrong, false
				}
				return outcome{verdict: written}, soft
			}
			end = seen
		}
		if end == nil {
			return outcome{verdict: written}, soft
		}
		return outcome{verdict: written, last: end.revision, position: end.position, repeat: true}, false
	}
	switch {
	case expected > current:
		return wrong, false
	case expected == current:
		return outcome{verdict: written}, soft
	}
	for i, id := range ids {
		at := expected + 1 + int64(i)
		if at < int64(len(s.records)) && s.records[at].id == id {
			continue
		}
		if i == 0 && expected == expectNone && soft {
			return outcome{verdict: written}, true
		}
		return wrong, false
	}
	if len(ids) == 0 {
		return wrong, false
	}
	end := s.records[expected+int64(len(ids))]
	return outcome{verdict: written, last: end.revision, position: end.position, repeat: true}, false
}

// append judges and adds the events to the log. The lock is held.
func (l *log) append(name string, expected int64, events []*record) outcome {
	ids := make([]uuid.UUID, len(events))
	for i, e := range events {
		ids[i] = e.id
	}
	o, undelete := l.judge(name, expected, ids)
	if o.verdict != written || o.repeat {
		return o
	}
	if len(events) == 0 {
		o.last = l.last(name)
		return o
	}
	undeleteOriginal := isMetastream(name) && l.isSoftDeleted(originalOf(name))
	recreateFrom := l.last(name) + 1
	now := ticks(l.now())
	for _, e := range events {
		added := *e // it may be judged again
		added.created = now
		l.add(&added)
		o.last, o.position = added.revision, added.position
	}
	switch {
	case undelete:
		l.recreate(name, recreateFrom)
	case undeleteOriginal:
		l.recreate(originalOf(name), l.last(originalOf(name))+1)
	}
	return o
}

// recreate lets a soft-deleted stream be seen again from a revision on, and
// leaves the rest of its metadata as it is. Metadata that is not JSON stays.
func (l *log) recreate(name string, from int64) {
	all := l.stream(metastreamOf(name)).records
	fields := map[string]json.RawMessage{}
	if len(all) > 0 && json.Unmarshal(all[len(all)-1].data, &fields) != nil {
		return
	}
	fields["$tb"], _ = json.Marshal(from)
	l.setMetadata(name, fields)
}

func (l *log) setMetadata(name string, fields map[string]json.RawMessage) {
	data, _ := json.Marshal(fields)
	l.add(&record{
		id: uuid.New(), stream: metastreamOf(name), eventType: typeMetadata, json: true, data: data, created: ticks(l.now()),
	})
}

// remove deletes a stream: softly through its metadata, or with a tombstone.
// The lock is held.
func (l *log) remove(name string, expected int64, hard bool) outcome {
	o, _ := l.judge(name, expected, []uuid.UUID{uuid.New()})
	if o.verdict != written {
		return o
	}
	if hard {
		l.add(&record{id: uuid.New(), stream: name, revision: deletedRevision, eventType: typeDeleted, created: ticks(l.now())})
	} else {
		tb, _ := json.Marshal(int64(math.MaxInt64))
		l.setMetadata(name, map[string]json.RawMessage{"$tb": tb})
	}
	end := l.records[len(l.records)-1]
	o.last, o.position = end.revision, end.position
	return o
}

// write is a change on its way to the writer.
type write struct {
	ctx   context.Context
	judge func(*log) outcome
	// answer has room for one.
	answer chan answer
}

type answer struct {
	outcome outcome
	err     error
}

// batchWrites is the most that goes into one commit of the store.
const batchWrites = 256

// runWriter judges and writes what comes in, all that waits in one commit, until
// ctx ends. What it has not taken by then is never answered.
func runWriter(ctx context.Context, l *log, writes <-chan *write) {
	for {
		var batch []*write
		select {
		case <-ctx.Done():
			return
		case w := <-writes:
			batch = append(batch, w)
		}
	gather:
		for len(batch) < batchWrites {
			select {
			case w := <-writes:
				batch = append(batch, w)
			default:
				break gather
			}
		}
		outcomes := make([]outcome, len(batch))
		err := l.change(ctx, func() {
			for i, w := range batch {
				if w.ctx.Err() == nil {
					outcomes[i] = w.judge(l)
				}
			}
		})
		for i, w := range batch {
			a := answer{outcome: outcomes[i], err: err}
			if a.err == nil && a.outcome.verdict == 0 {
				a.err = context.Cause(w.ctx)
			}
			w.answer <- a
		}
	}
}
