package nats

import (
	"container/list"
	"sync"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// head is what must be known of a stream to append to it.
type head struct {
	version  uint64
	sequence uint64    // of its last event
	last     uuid.UUID // its last event
	previous trail     // of the next event
	keys     *keys     // nil: nothing is known of the keys used
}

func (h *head) revision() eventstore.Revision {
	return eventstore.Revision{Version: h.version, Position: eventstore.Position(h.sequence)}
}

// headOf returns what the stream's last message says.
func headOf(m *message) head {
	if m == nil {
		return head{}
	}
	return head{version: m.Version, sequence: uint64(m.Position), last: m.ID, previous: m.previous.next(m.Version, uint64(m.Position))}
}

// heads remembers those of the streams that were used last. What it knows may
// be old, since other processes append too: the server checks what is built on
// it.
type heads struct {
	mu     sync.Mutex
	most   int // entries, where a key counts as one too
	weight int
	known  map[eventstore.Stream]*list.Element
	order  list.List // the latest first
}

type rememberedHead struct {
	stream eventstore.Stream
	head   head
	weight int
}

func (h *heads) init(most int) {
	h.most = most
	h.known = map[eventstore.Stream]*list.Element{}
}

func (h *heads) get(stream eventstore.Stream) (head, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e, ok := h.known[stream]
	if !ok {
		return head{}, false
	}
	h.order.MoveToFront(e)
	return e.Value.(*rememberedHead).head, true
}

func (h *heads) set(stream eventstore.Stream, now head) { h.put(stream, now, true) }

// setNew is set unless something is known already.
func (h *heads) setNew(stream eventstore.Stream, now head) { h.put(stream, now, false) }

func (h *heads) put(stream eventstore.Stream, now head, replace bool) {
	weight := 1
	if now.keys != nil {
		weight += now.keys.size()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if e, ok := h.known[stream]; ok {
		if !replace {
			return
		}
		r := e.Value.(*rememberedHead)
		if now.sequence < r.head.sequence {
			return // who says so has looked earlier
		}
		h.weight += weight - r.weight
		r.head, r.weight = now, weight
		h.order.MoveToFront(e)
	} else {
		h.weight += weight
		h.known[stream] = h.order.PushFront(&rememberedHead{stream, now, weight})
	}
	h.evict()
}

// evict forgets what was used longest ago, but not all. The lock is held.
func (h *heads) evict() {
	for h.weight > h.most && h.order.Len() > 1 {
		e := h.order.Back()
		r := h.order.Remove(e).(*rememberedHead)
		delete(h.known, r.stream)
		h.weight -= r.weight
	}
}

// keys returns what is remembered of the stream's keys; nothing, if nothing is.
func (h *heads) keys(stream eventstore.Stream) *keys {
	if now, ok := h.get(stream); ok && now.keys != nil {
		return now.keys
	}
	return new(keys)
}

// keep remembers the keys beside the head. What is known of the head already is
// not replaced: it belongs to whoever writes the stream.
func (h *heads) keep(stream eventstore.Stream, now head, k *keys) {
	weight := 1 + k.size()
	h.mu.Lock()
	e, ok := h.known[stream]
	if ok {
		r := e.Value.(*rememberedHead)
		if r.head.keys == nil {
			r.head.keys = k
		}
		if r.head.keys == k {
			h.weight += weight - r.weight
			r.weight = weight
			h.order.MoveToFront(e)
			h.evict()
		}
	}
	h.mu.Unlock()
	if !ok {
		now.keys = k
		h.setNew(stream, now)
	}
}
