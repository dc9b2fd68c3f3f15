package esdb

import (
	"container/list"
	"context"
	"slices"
	"sync"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// What is known of streams is bounded by these.
const (
	mostStreams = 8192
	mostKeys    = 200_000
)

// streams remembers, of the streams used last, where they ended and which keys
// they have. It is never proof: the server judges every write by the revision.
type streams struct {
	mu   sync.Mutex
	all  map[eventstore.Stream]*known
	used *list.List // of *known, the one used last in front
	keys int
}

// known is what is known of a stream. Whoever has its turn may read and change
// it: the writes of one stream follow one another within a process.
type known struct {
	stream eventstore.Stream
	turn   chan struct{}
	users  int
	place  *list.Element
	counts int // keys that are counted in streams.keys

	// last is where the stream ended when it was last looked at.
	last last
	// scanned: the keys of the events up to this revision are in keys; -1: none is.
	scanned int64
	end     last // the event at scanned
	keys    map[string]eventstore.Receipt
	opening *opening
}

// last is the end of a stream: its last event, or none at revision -1.
type last struct {
	known    bool
	revision int64
	position eventstore.Position
	id       uuid.UUID
}

// none is the end of a stream that has no events.
var none = last{known: true, revision: -1}

func (l last) revisions() eventstore.Revision {
	return eventstore.Revision{Version: uint64(l.revision + 1), Position: l.position}
}

// opening is a keyed commit of which not all events were seen yet.
type opening struct {
	key     string
	receipt eventstore.Receipt
	end     uint64 // revision of its last event
}

func newStreams() *streams {
	return &streams{all: map[eventstore.Stream]*known{}, used: list.New()}
}

// pin returns what is known of the stream, without its turn; release must follow.
func (s *streams) pin(stream eventstore.Stream) *known {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.all[stream]
	if k == nil {
		k = &known{stream: stream, turn: make(chan struct{}, 1), scanned: -1, end: none, keys: map[string]eventstore.Receipt{}}
		k.place = s.used.PushFront(k)
		s.all[stream] = k
	}
	k.users++
	s.used.MoveToFront(k.place)
	return k
}

// take waits for the stream's turn; give must follow.
func (s *streams) take(ctx context.Context, stream eventstore.Stream) (*known, error) {
	k := s.pin(stream)
	select {
	case k.turn <- struct{}{}:
		return k, nil
	case <-ctx.Done():
		s.release(k)
		return nil, context.Cause(ctx)
	}
}

// give hands the turn on.
func (s *streams) give(k *known) {
	counts := len(k.keys)
	s.mu.Lock()
	s.keys += counts - k.counts
	k.counts = counts
	s.mu.Unlock()
	<-k.turn
	s.release(k)
}

func (s *streams) release(k *known) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k.users--
	for e := s.used.Back(); e != nil && (len(s.all) > mostStreams || s.keys > mostKeys && len(s.all) > 1); {
		old, before := e.Value.(*known), e.Prev()
		if old.users == 0 {
			s.used.Remove(e)
			delete(s.all, old.stream)
			s.keys -= old.counts
		}
		e = before
	}
}

// forget makes the stream unknown again.
func (k *known) forget() {
	k.last, k.scanned, k.end, k.keys, k.opening = last{}, -1, none, map[string]eventstore.Receipt{}, nil
}

// see takes in the event that follows the scanned ones.
func (k *known) see(e *decoded) {
	k.scanned = int64(e.revision)
	k.end = last{known: true, revision: int64(e.revision), position: e.Position, id: e.ID}
	k.last = k.end
	if e.key != "" {
		k.opening = &opening{key: e.key, receipt: eventstore.Receipt{First: e.Position, Fingerprint: e.print}, end: e.revision + uint64(e.of) - 1}
	}
	if o := k.opening; o != nil && o.end == e.revision {
		o.receipt.Last = e.Position
		o.receipt.Revisions = []eventstore.StreamRevision{{Stream: e.Stream, Revision: e.Revision()}}
		k.keys[o.key] = o.receipt
		k.opening = nil
	}
}

// duplicate returns the receipt for those who come again with its key.
func duplicate(first eventstore.Receipt) eventstore.Receipt {
	first.Revisions = slices.Clone(first.Revisions)
	first.Duplicate = true
	return first
}

// learn takes in what a read of the whole stream has found, unless somebody has
// its turn: they know better.
func (s *streams) learn(stream eventstore.Stream, found *known) {
	k := s.pin(stream)
	select {
	case k.turn <- struct{}{}:
	default:
		s.release(k)
		return
	}
	if found.scanned > k.scanned {
		k.scanned, k.end, k.keys, k.opening = found.scanned, found.end, found.keys, found.opening
		if !k.last.known || k.last.revision < k.end.revision {
			k.last = k.end
		}
	}
	s.give(k)
}
