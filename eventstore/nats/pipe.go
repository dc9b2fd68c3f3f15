package nats

import (
	"context"
	"errors"
	"fmt"
	"slices"
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

	flying int           // bytes that all loads have asked for and not got, as they reckon
	freed  chan struct{} // closed when there are less; nil: nobody waits for that
}

// load is one series of requests, numbered by who asks.
type load struct {
	store   *Store
	number  uint64
	prefix  string
	careful bool // the server is to say which stream it has looked into
	bare    bool // it did not always
	of      *streamSubject
	answers chan numbered
	open    int         // requests without an answer, about: answers may come late or twice
	costs   map[int]int // what is reserved for them
}

type numbered struct {
	number int
	answer *client.Msg
}

// inFlight is how many messages one load may have asked for and not got, and
// underWay how many bytes all loads together: the server cuts off a client that
// does not take 64 MiB fast enough, and what else is asked for waits behind them.
const (
	inFlight = 64
	underWay = 8 << 20
)

func (p *pipe) begin(s *Store, of eventstore.Stream, careful bool) (*load, error) {
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
	l := &load{store: s, number: p.count, careful: careful, of: s.subjects.streamSubject(of), answers: make(chan numbered, inFlight), costs: map[int]int{}}
	l.prefix = p.prefix + strconv.FormatUint(l.number, 10) + "-"
	p.loads[l.number] = l
	return l, nil
}

func (p *pipe) end(l *load) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.loads, l.number)
	p.release(l)
}

// reserve sets so many bytes aside for the answer with the number. When others
// have too many it returns what is closed once they have less.
func (p *pipe) reserve(l *load, number, bytes int) (wait <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.flying > 0 && p.flying+bytes > underWay {
		if p.freed == nil {
			p.freed = make(chan struct{})
		}
		return p.freed
	}
	p.flying += bytes
	l.costs[number] += bytes
	return nil
}

// got takes back what was reserved for the answer.
func (p *pipe) got(l *load, number int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free(l.costs[number])
	delete(l.costs, number)
}

// rest takes back everything that the load has reserved.
func (p *pipe) rest(l *load) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.release(l)
}

func (p *pipe) release(l *load) {
	for _, bytes := range l.costs {
		p.free(bytes)
	}
	clear(l.costs)
}

func (p *pipe) free(bytes int) {
	p.flying -= bytes
	if bytes > 0 && p.freed != nil {
		close(p.freed)
		p.freed = nil
	}
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
	if hook := l.store.settings.tamper; hook != nil {
		hook(m)
	}
	copies := 1
	if hook := l.store.settings.copies; hook != nil {
		copies = hook()
	}
	for range copies {
		select {
		case l.answers <- numbered{n, m}:
		default: // answers that came late or twice; what is missed is asked for again
		}
	}
}

// ask requests the message, and reports whether that is possible now.
func (l *load) ask(number int, sequence uint64) bool {
	s := l.store
	if stale := s.settings.stale; stale != nil && stale(&getRequest{Sequence: sequence}) {
		return false
	}
	body := strconv.AppendUint(append(make([]byte, 0, 64), `{"seq":`...), sequence, 10)
	if !l.careful {
		body = append(body, `,"no_hdr":true`...)
	}
	if s.conn.PublishRequest("$JS.API.DIRECT.GET."+s.settings.stream, l.prefix+strconv.Itoa(number), append(body, '}')) != nil {
		return false
	}
	l.open++
	return true
}

// read reads the answer to ask: nil if there is no such message. Without headers,
// which cost the server more than anything else about an answer, nothing but what
// the message says tells that it is the right one.
func (l *load) read(m *client.Msg, sequence uint64) (*message, error) {
	if len(m.Header) > 0 {
		return l.store.answer(m)
	}
	l.bare = true
	return l.store.subjects.decodeAs(l.of, "", sequence, m.Data)
}

// walk returns events of the stream that ends at the head, the last one first:
// down to but without the version above, to the first one that is not behind the
// position after, most of them at most if that is not 0, and until they have
// about so many bytes if that is not 0. have is the last event, when it was read
// already.
func (s *Store) walk(ctx context.Context, of eventstore.Stream, h head, have *message, above uint64, after eventstore.Position, most, bytes int) (found []*message, err error) {
	limit := int(h.version - min(above, h.version))
	if most > 0 {
		limit = min(limit, most)
	}
	if limit == 0 {
		return nil, nil
	}
	found, err = s.walkOnce(ctx, of, h, have, limit, after, bytes, false)
	if errors.Is(err, errUnsure) {
		// It may have been a mirror that answered, of what the log was once.
		found, err = s.walkOnce(ctx, of, h, have, limit, after, bytes, true)
	}
	return found, err
}

// errUnsure marks what is wrong with events of which the server did not say from
// which stream they are.
var errUnsure = errors.New("the server was not asked which stream it has looked into")

func (s *Store) walkOnce(ctx context.Context, of eventstore.Stream, h head, have *message, limit int, after eventstore.Position, bytes int, careful bool) ([]*message, error) {
	l, err := s.pipe.begin(s, of, careful)
	if err != nil {
		return nil, unavailable("read a stream", err)
	}
	defer s.pipe.end(l)
	w, err := newDescent(of, h, have, limit, after, bytes)
	if err != nil {
		return nil, err
	}
	if err := s.descend(ctx, l, w); err != nil {
		return nil, err
	}
	return w.take(), nil
}

// doubt marks the error if events may be wrong of which that cannot be told.
func (l *load) doubt(err error) error {
	if err != nil && l.bare {
		return fmt.Errorf("%w (%w)", err, errUnsure)
	}
	return err
}

// descend asks until it has what is wanted.
func (s *Store) descend(ctx context.Context, l *load, w *descent) error {
	defer s.pipe.rest(l)
	late := time.NewTimer(s.settings.attempt)
	defer late.Stop()
	for {
		var wait <-chan struct{} // for other loads
		for l.open < w.window() && wait == nil {
			i, ok := w.wanted()
			if !ok {
				break
			}
			if wait = s.pipe.reserve(l, i, w.reckon()); wait != nil {
				w.unwanted(i)
			} else if !l.ask(i, w.sequences[i]) {
				s.pipe.got(l, i)
			}
		}
		switch {
		case w.done():
			return nil
		case l.open > 0:
		case wait != nil:
			s.pipe.rest(l) // not for itself: answers that came twice may have been counted twice
			select {
			case <-wait:
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		default: // what is missing was lost, or not answered well
			l.open = 0
			numbers, wanted, err := w.missing()
			if err != nil {
				return l.doubt(err)
			}
			found, err := s.many(ctx, wanted)
			if err != nil {
				return err
			}
			for k, i := range numbers {
				if err := w.place(i, found[k]); err != nil {
					return l.doubt(err)
				}
			}
			continue
		}
		var a numbered
		select {
		case a = <-l.answers:
		default:
			late.Reset(s.settings.attempt)
			select {
			case a = <-l.answers:
			case <-late.C:
				s.pipe.rest(l)
				l.open = 0
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		l.open--
		s.pipe.got(l, a.number)
		if a.number < 0 || a.number >= len(w.sequences) {
			continue
		}
		m, err := l.read(a.answer, w.sequences[a.number])
		switch {
		case errors.Is(err, errAgain): // it stays missing
		case err != nil:
			return l.doubt(err)
		case m != nil:
			if err := w.place(a.number, m); err != nil {
				return l.doubt(err)
			}
		}
	}
}

// descent is a stream on its way from its last event, number 0, to its first.
type descent struct {
	of      eventstore.Stream
	version uint64 // of number 0
	end     int    // only those with numbers below it will ever be wanted
	limit   int    // and now only those below this
	after   eventstore.Position
	bytes   int

	sequences []uint64 // 0: not known
	got       []*message
	ask       []int  // known and not asked for, in the order of asking
	given     int    // those before this one have been taken
	whole     int    // there is none missing before this one
	held      int    // bytes of those that can be taken
	size      int    // bytes of all that have not been taken
	largest   int    // bytes of the largest so far
	count     int    // how many have come
	check     uint32 // of the event that comes next
}

func newDescent(of eventstore.Stream, h head, have *message, limit int, after eventstore.Position, bytes int) (*descent, error) {
	w := &descent{of: of, version: h.version, end: limit, limit: limit, after: after, bytes: bytes, check: checkOf(h.last)}
	if err := w.learn(h.version+1, h.previous); err != nil {
		return nil, err
	}
	if have != nil {
		return w, w.place(0, have)
	}
	return w, nil
}

// taken stands for the messages that were.
var taken = new(message)

// take returns the events that are there without a gap and were not taken yet.
func (w *descent) take() []*message {
	part := slices.Clone(w.got[w.given:w.whole])
	for ; w.given < w.whole; w.given++ {
		w.got[w.given] = taken
	}
	w.size -= w.held
	w.held = 0
	return part
}

// more wants so many more than were taken.
func (w *descent) more(most int) error {
	w.limit = min(w.end, w.given+most)
	return w.advance()
}

// window is how many may be asked for at once: few, as long as it is not known
// how large they are.
func (w *descent) window() int {
	if w.count < pointers {
		return pointers
	}
	return inFlight
}

// reckon returns what the next event is taken to weigh.
func (w *descent) reckon() int {
	if w.count == 0 {
		return 64 << 10
	}
	return w.largest
}

// learn takes what the event with the version points to.
func (w *descent) learn(version uint64, previous trail) error {
	from := len(w.ask)
	for k, sequence := range previous {
		i := int(w.version - pointed(version, k))
		if i >= w.end {
			continue
		}
		if i >= len(w.sequences) {
			w.sequences = append(w.sequences, make([]uint64, i+1-len(w.sequences))...)
			w.got = append(w.got, make([]*message, i+1-len(w.got))...)
		}
		switch {
		case w.sequences[i] == 0:
			w.sequences[i] = sequence
			w.ask = append(w.ask, i)
			if sequence <= uint64(w.after) {
				w.end = i + 1
				w.limit = min(w.limit, w.end)
			}
		case w.sequences[i] != sequence:
			return fmt.Errorf("%w: version %d of stream %q is at sequence %d or %d, depending on whom one asks", eventstore.ErrGap, w.version-uint64(i), w.of, w.sequences[i], sequence)
		}
	}
	// What points furthest back first: what it points to is on its way before the
	// others have come.
	slices.Reverse(w.ask[from:])
	return nil
}

// place takes an event.
func (w *descent) place(i int, m *message) error {
	if i < 0 || i >= len(w.got) || w.got[i] != nil {
		return nil // an answer that came twice
	}
	if version := w.version - uint64(i); m.Stream != w.of || m.Version != version || uint64(m.Position) != w.sequences[i] {
		return fmt.Errorf("%w: version %d of stream %q was expected at sequence %d, where version %d of %q is", eventstore.ErrGap, version, w.of, w.sequences[i], m.Version, m.Stream)
	}
	w.got[i] = m
	w.count++
	weight := weigh(&m.Recorded)
	w.size += weight
	w.largest = max(w.largest, weight)
	if err := w.advance(); err != nil {
		return err
	}
	return w.learn(m.Version, m.previous)
}

func (w *descent) advance() error {
	for w.whole < len(w.got) && w.got[w.whole] != nil && !w.done() {
		m := w.got[w.whole]
		if checkOf(m.ID) != w.check {
			return fmt.Errorf("%w: version %d of stream %q at sequence %d is not the event that the one behind it follows: the servers have answered from different logs, or have lost events", eventstore.ErrGap, m.Version, w.of, m.Position)
		}
		w.check = m.before
		w.held += weigh(&m.Recorded)
		w.whole++
	}
	return nil
}

// done reports whether nothing more is wanted.
func (w *descent) done() bool {
	return w.whole >= w.limit || w.bytes > 0 && w.held > w.bytes
}

// wanted returns what to ask for next.
func (w *descent) wanted() (int, bool) {
	for k, i := range w.ask {
		if w.misses(i) {
			w.ask = slices.Delete(w.ask, k, k+1)
			return i, true
		}
	}
	return 0, false
}

// unwanted takes wanted back.
func (w *descent) unwanted(i int) { w.ask = slices.Insert(w.ask, 0, i) }

// misses reports whether the event has not come, and is wanted before the ones
// in front of it have.
func (w *descent) misses(i int) bool {
	if i >= w.limit || w.got[i] != nil || w.sequences[i] == 0 {
		return false
	}
	return w.bytes == 0 || i < w.whole+near || w.size <= w.bytes && w.largest*(i-w.given+1) <= w.bytes
}

// missingBytes bounds what is asked for one by one, in part of the leader, and
// must have come after the time for one request.
const missingBytes = 4 << 20

// missing returns the numbers and sequences of events that have not come though
// they may have been asked for.
func (w *descent) missing() (numbers []int, sequences []uint64, err error) {
	most := max(1, min(pointers, missingBytes/max(w.reckon(), 1)))
	for i := w.whole; i < len(w.got) && len(numbers) < most; i++ {
		if w.misses(i) {
			numbers, sequences = append(numbers, i), append(sequences, w.sequences[i])
		}
	}
	if len(numbers) == 0 {
		err = fmt.Errorf("%w: nothing points to version %d of stream %q", eventstore.ErrGap, w.version-uint64(w.whole), w.of)
	}
	return numbers, sequences, err
}
