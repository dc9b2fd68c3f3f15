package logreader

import "sync/atomic"

// Memo is what those who have an event have made of it, each thing under a key.
// All methods may be called concurrently, and none waits.
type Memo struct {
	first atomic.Pointer[Entry]
}

// Entry is one thing that is made of an event, once.
type Entry struct {
	key   any
	value atomic.Pointer[any]
	next  *Entry
}

// Take returns what was made under the key. If nobody has begun to, the caller
// is the one to make it, and gives it to the entry; others who come meanwhile
// get neither. Whoever does not succeed just leaves it: nobody relies on it.
func (m *Memo) Take(key any) (value any, toMake *Entry) {
	for {
		first := m.first.Load()
		for e := first; e != nil; e = e.next {
			if e.key != key {
				continue
			}
			if made := e.value.Load(); made != nil {
				return *made, nil
			}
			return nil, nil
		}
		e := &Entry{key: key, next: first}
		if m.first.CompareAndSwap(first, e) {
			return nil, e
		}
	}
}

// Give lets others have the value, which is not nil, and is not changed any more.
func (e *Entry) Give(value any) { e.value.Store(&value) }

// memos are those of a batch's events, made when the first is needed.
type memos struct {
	all atomic.Pointer[[]Memo]
}

func (m *memos) at(n, i int) *Memo {
	all := m.all.Load()
	if all == nil {
		made := make([]Memo, n)
		if all = &made; !m.all.CompareAndSwap(nil, all) {
			all = m.all.Load()
		}
	}
	return &(*all)[i]
}
