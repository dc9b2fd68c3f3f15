package nats

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/deed-go/deed/eventstore"
)

// history returns the events of the stream that ends at the head, down to but
// without the given version, the last one first; most of them at most, if that
// is not 0.
func (s *Store) history(ctx context.Context, of eventstore.Stream, h head, above uint64, most int) ([]*message, error) {
	return s.walk(ctx, of, h, nil, above, 0, most, 0)
}

// receiptOf reads the commit whose first event is at the sequence.
func (s *Store) receiptOf(ctx context.Context, used usedKey) (eventstore.Receipt, error) {
	if used.receipt != nil {
		return *used.receipt, nil
	}
	first, err := s.at(ctx, used.sequence)
	if err != nil {
		return eventstore.Receipt{}, err
	}
	events := []*message{first}
	if n := uint64(first.count - first.index); n > 0 {
		rest, err := s.span(ctx, used.sequence+1, used.sequence+n)
		if err != nil {
			return eventstore.Receipt{}, err
		}
		events = append(events, rest...)
	}
	receipt := eventstore.Receipt{First: first.Position, Last: events[len(events)-1].Position, Fingerprint: used.fingerprint}
	for i, m := range events {
		if m.index != first.index+i || m.count != first.count || !m.isEvent() {
			return eventstore.Receipt{}, fmt.Errorf("%w: the commit at sequence %d is not whole at %d", eventstore.ErrGap, used.sequence, m.Position)
		}
		at := slices.IndexFunc(receipt.Revisions, func(r eventstore.StreamRevision) bool { return r.Stream == m.Stream })
		if at < 0 {
			at = len(receipt.Revisions)
			receipt.Revisions = append(receipt.Revisions, eventstore.StreamRevision{Stream: m.Stream})
		}
		receipt.Revisions[at].Revision = m.Revision()
	}
	return receipt, nil
}

// span returns all messages from one sequence through another, which are known
// to be stored.
func (s *Store) span(ctx context.Context, from, through uint64) ([]*message, error) {
	all := make([]*message, 0, through-from+1)
	err := s.asking(ctx, "read the log", func(ctx context.Context) error {
		for from <= through {
			page, _, err := s.page(ctx, s.subjects.all(), from, int(min(through-from+1, pageEvents)))
			if err != nil {
				return err
			}
			for _, m := range page {
				if uint64(m.Position) != from {
					return errHole(from, uint64(m.Position))
				}
				all = append(all, m)
				from++
			}
			if len(page) == 0 {
				return fmt.Errorf("%w: a replica lags", errAgain)
			}
		}
		return nil
	})
	return all, err
}

func errHole(want, got uint64) error {
	return fmt.Errorf("%w: the message at sequence %d follows, %d was expected: messages were removed, or the server has lost them", eventstore.ErrGap, got, want)
}

// keys of a stream.
type keys struct {
	mu      sync.Mutex
	through uint64 // those of the events up to this version are known
	used    map[string]usedKey
}

type usedKey struct {
	fingerprint string
	sequence    uint64 // of the first event of its commit
	receipt     *eventstore.Receipt
}

// extend adds the keys of the events after one version up to another, if those
// before are known.
func (k *keys) extend(from, to uint64, each func(add func(string, usedKey))) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.through != from {
		return
	}
	each(k.add)
	k.through = to
}

func (k *keys) add(key string, used usedKey) {
	if k.used == nil {
		k.used = map[string]usedKey{}
	}
	k.used[key] = used
}

func (k *keys) size() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.used)
}

// lookup finds the key among the commits of the stream up to the head. What is
// not remembered of the stream's keys is read.
func (s *Store) lookup(ctx context.Context, of eventstore.Stream, h head, key string) (usedKey, bool, error) {
	if h.version == 0 {
		return usedKey{}, false, nil
	}
	k := s.heads.keys(of)
	k.mu.Lock()
	known, have := k.through, map[string]usedKey{}
	used, ok := k.used[key]
	k.mu.Unlock()
	if ok || known >= h.version {
		return used, ok, nil
	}
	after, err := s.history(ctx, of, h, known, 0)
	if err != nil {
		return usedKey{}, false, err
	}
	for i := len(after) - 1; i >= 0; i-- {
		if m := after[i]; m.key != "" {
			have[m.key] = usedKey{fingerprint: m.fingerprint, sequence: uint64(m.Position)}
		}
	}
	k.extend(known, h.version, func(add func(string, usedKey)) {
		for key, one := range have {
			add(key, one)
		}
	})
	s.heads.keep(of, h, k)
	used, ok = have[key]
	return used, ok, nil
}

// Lookup implements eventstore.Store; keys are scoped to the stream.
func (s *Store) Lookup(ctx context.Context, of eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	if err := s.enter(ctx); err != nil {
		return eventstore.Receipt{}, false, err
	}
	defer s.leave()
	if key == "" {
		return eventstore.Receipt{}, false, nil
	}
	if err := of.Validate(); err != nil {
		return eventstore.Receipt{}, false, err
	}
	last, err := s.last(ctx, s.subjects.of(of))
	if err != nil {
		return eventstore.Receipt{}, false, err
	}
	used, ok, err := s.lookup(ctx, of, headOf(last), key)
	if err != nil || !ok {
		return eventstore.Receipt{}, false, err
	}
	receipt, err := s.receiptOf(ctx, used)
	if err != nil {
		return eventstore.Receipt{}, false, err
	}
	return duplicate(receipt), true, nil
}
