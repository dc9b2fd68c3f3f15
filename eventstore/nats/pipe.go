package nats

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	client "github.com/nats-io/nats.go"

	"github.com/deed-go/deed/eventstore"
)

// pipe brings the answers to many requests over one subscription for all loads
// of the store. The subject of an answer says whose it is.
type pipe struct {
	mu     sync.Mutex
	sub    *client.Subscription
	prefix string
	count  uint64
	loads  map[uint64]*load
}

// load is one series of requests, numbered by who asks.
type load struct {
	store   *Store
	number  uint64
	prefix  string
	answers chan numbered
	open    int // requests without an answer, about: answers may come late or twice
}

type numbered struct {
	number int
	answer *client.Msg
}

// inFlight is how many messages one load may have asked for, and not got, when
// it asks for more.
const inFlight = 64

func (p *pipe) begin(s *Store) (*load, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sub == nil {
		p.prefix = s.conn.NewRespInbox() + "."
		sub, err := s.conn.Subscribe(p.prefix+"*", p.arrived)
		if err != nil {
			return nil, err
		}
		if err := sub.SetPendingLimits(-1, -1); err != nil { // bounded by inFlight
			_ = sub.Unsubscribe()
			return nil, err
		}
		p.sub, p.loads = sub, map[uint64]*load{}
	}
	p.count++
	l := &load{store: s, number: p.count, answers: make(chan numbered, inFlight+pointers)}
	l.prefix = p.prefix + strconv.FormatUint(l.number, 10) + "-"
	p.loads[l.number] = l
	return l, nil
}

func (p *pipe) end(l *load) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.loads, l.number)
}

func (p *pipe) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sub != nil {
		_ = p.sub.Unsubscribe()
	}
}

func (p *pipe) arrived(m *client.Msg) {
	whose, number, _ := strings.Cut(m.Subject[len(p.prefix):], "-")
	of, errOf := strconv.ParseUint(whose, 10, 64)
	n, errN := strconv.Atoi(number)
	if errOf != nil || errN != nil {
		return
	}
	p.mu.Lock()
	l := p.loads[of]
	p.mu.Unlock()
	if l == nil {
		return
	}
	copies := 1
	if hook := l.store.settings.copies; hook != nil {
		copies = hook()
	}
	for range copies {
		select {
		case l.answers <- numbered{n, m}:
		default: // more answers than requests; what is missed is asked for again
		}
	}
}

// ask requests the message, if that is possible now.
func (l *load) ask(number int, sequence uint64) {
	s := l.store
	if stale := s.settings.stale; stale != nil && stale(&getRequest{Sequence: sequence}) {
		return
	}
	body := strconv.AppendUint([]byte(`{"seq":`), sequence, 10)
	if s.conn.PublishRequest("$JS.API.DIRECT.GET."+s.settings.stream, l.prefix+strconv.Itoa(number), append(body, '}')) == nil {
		l.open++
	}
}

// walk returns events of the stream that ends at the head, the last one first:
// down to but without the version above, to the first one that is not behind the
// position after, most of them at most if that is not 0, and until they have
// about so many bytes if that is not 0. have is the last event, when it was read
// already.
//
// It follows the pointers. The event that points furthest back is asked for
// first, so that what it points to is on its way before the others have come.
func (s *Store) walk(ctx context.Context, of eventstore.Stream, h head, have *message, above uint64, after eventstore.Position, most, bytes int) ([]*message, error) {
	limit := int(h.version - min(above, h.version))
	if most > 0 {
		limit = min(limit, most)
	}
	if limit == 0 {
		return nil, nil
	}
	l, err := s.pipe.begin(s)
	if err != nil {
		return nil, unavailable("read a stream", err)
	}
	defer s.pipe.end(l)
	var (
		sequences []uint64
		got       []*message
		missing   int
		size      int
		ended     bool
	)
	extend := func(previous []uint64) error {
		if len(previous) == 0 {
			return fmt.Errorf("%w: nothing points to version %d of stream %q", eventstore.ErrGap, h.version-uint64(len(sequences)), of)
		}
		from := len(sequences)
		sequences = append(sequences, previous[:min(len(previous), limit-from)]...)
		got = append(got, make([]*message, len(sequences)-from)...)
		missing += len(sequences) - from
		for i := len(sequences) - 1; i >= from; i-- {
			if i > 0 || have == nil {
				l.ask(i, sequences[i])
			}
		}
		return nil
	}
	place := func(i int, m *message) error {
		if i < 0 || i >= len(got) || got[i] != nil {
			return nil // an answer that came twice
		}
		if version := h.version - uint64(i); m.Stream != of || m.Version != version || uint64(m.Position) != sequences[i] {
			return fmt.Errorf("%w: version %d of stream %q was expected at sequence %d, where version %d of %q is", eventstore.ErrGap, version, of, sequences[i], m.Version, m.Stream)
		}
		got[i] = m
		missing--
		size += weigh(&m.Recorded)
		return nil
	}
	if err := extend(h.previous); err != nil {
		return nil, err
	}
	if have != nil {
		if err := place(0, have); err != nil {
			return nil, err
		}
	}
	late := time.NewTimer(s.settings.attempt)
	defer late.Stop()
	for {
		for end := len(got) - 1; got[end] != nil && len(got) < limit && l.open < inFlight && !ended; end = len(got) - 1 {
			if got[end].Position <= after || bytes > 0 && size > bytes {
				ended = true
				break
			}
			if err := extend(got[end].previous); err != nil {
				return nil, err
			}
		}
		if missing == 0 && (ended || len(got) == limit) {
			return got, nil
		}
		if l.open <= 0 { // what is missing was lost, or not answered well
			l.open = 0
			var numbers []int
			var wanted []uint64
			for i := range got {
				if got[i] == nil {
					numbers, wanted = append(numbers, i), append(wanted, sequences[i])
				}
			}
			found, err := s.many(ctx, wanted)
			if err != nil {
				return nil, err
			}
			for k, i := range numbers {
				if err := place(i, found[k]); err != nil {
					return nil, err
				}
			}
			continue
		}
		select {
		case a := <-l.answers:
			l.open--
			late.Reset(s.settings.attempt)
			m, err := s.answer(a.answer)
			switch {
			case errors.Is(err, errAgain): // it stays missing
			case err != nil:
				return nil, err
			case m != nil:
				if err := place(a.number, m); err != nil {
					return nil, err
				}
			}
		case <-late.C:
			l.open = 0
			late.Reset(s.settings.attempt)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
