package nats

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"

	"github.com/deed-go/deed/eventstore"
)

// outcome is what is known after a plan was sent.
type outcome uint8

const (
	outcomeWritten outcome = iota
	// outcomeMoved: nothing was written; a stream is not where the plan had it, or
	// others are about to write it. The server does not say which one.
	outcomeMoved
	// outcomeRefused: nothing was written; the server cannot now.
	outcomeRefused
	// outcomeUnknown: there was no answer. The messages may still be on their way.
	outcomeUnknown
)

// The server's codes. One and the same conflict has one code on a single server
// and may have the other one on several.
const (
	codeWrongSequence         = 10071
	codeWrongSequenceConstant = 10164
	codeIncomplete            = 10176
	codeManyInFlight          = 10210
	codeStoreFailed           = 10077
	codeAccountFull           = 10002
	codeInsufficient          = 10023
	codeStorageFull           = 10047
)

// full says that the server has no room for the messages: nothing was written,
// and trying again does not help until somebody makes room.
func full(refused *jetstream.APIError) bool {
	switch refused.ErrorCode {
	case codeAccountFull, codeInsufficient, codeStorageFull:
		return true
	case codeStoreFailed: // said of every failure to store; these two are checked before
		return strings.Contains(refused.Description, "maximum messages") || strings.Contains(refused.Description, "maximum bytes")
	}
	return false
}

// errFull marks an answer that is full.
var errFull = errors.New("there is no more room")

// execute finds the outcome of every entry of the group. Nobody else writes
// their streams from this process meanwhile. It returns whom the last batch has
// answered, if nothing stood in its way.
func (s *Store) execute(group []*entry) (last answered) {
	pending := group
	known := map[eventstore.Stream]bool{}
	var deadline time.Time
	var trouble error
	wait, fruitless, busy := time.Millisecond, 0, 0
	for {
		if slices.ContainsFunc(pending, (*entry).isDone) {
			pending = slices.DeleteFunc(slices.Clone(pending), (*entry).isDone)
		}
		if len(pending) == 0 {
			return last
		}
		if !deadline.IsZero() && time.Now().After(deadline) || fruitless > 5 && s.closed() {
			s.giveUp(pending, trouble)
			return answered{}
		}
		reconnects := s.conn.Stats().Reconnects
		if err := s.verifyReconnected(s.base); err != nil {
			s.giveUp(pending, err)
			return answered{}
		}
		if _, wrong := s.guard.state(); wrong != nil {
			s.giveUp(pending, wrong)
			return answered{}
		}
		p, err := s.plan(s.base, pending, known, fruitless > 2)
		if err != nil {
			if len(pending) > 1 && (errors.Is(err, eventstore.ErrGap) || errors.Is(err, eventstore.ErrDecode)) {
				for _, e := range pending { // it is the trouble of one of them
					s.execute([]*entry{e})
				}
				return answered{}
			}
			s.giveUp(pending, err)
			return answered{}
		}
		if !p.begin() { // somebody has gone: what was decided may not hold without them
			continue
		}
		if len(p.messages) == 0 {
			pending = p.left
			continue
		}
		sent := time.Now()
		outcome, first, err := s.send(p, reconnects)
		if outcome == outcomeWritten {
			last = answered{callers: len(p.entries) + len(p.held), before: s.scheduler.waits(), took: time.Since(sent)}
			if trouble != nil {
				last = answered{} // who waited for that long may not come again at once
			}
			s.record(p, first, known)
			pending, deadline, wait, fruitless, busy = p.left, time.Time{}, time.Millisecond, 0, 0
			continue
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(s.settings.patience)
		}
		trouble = err
		pending = p.back()
		if outcome == outcomeUnknown || s.replicas.Load() > 1 && s.disputable(outcome, err) {
			// One that takes itself for the leader still may have refused what the leader
			// writes: of several servers a refusal is the first answer, not the only one.
			for _, e := range p.entries {
				e.uncertain = true
			}
		}
		if outcome == outcomeRefused {
			if _, refused := errors.AsType[*jetstream.APIError](err); refused && (errors.Is(err, errFull) || !transient(err)) {
				if len(p.entries) == 1 {
					s.giveUp(p.entries, err)
					continue
				}
				fruitless += 10 // find out whose fault it is
				continue
			}
			if refused, ok := errors.AsType[*jetstream.APIError](err); ok && refused.ErrorCode == codeIncomplete && len(p.entries) == 1 && fruitless > 12 {
				// A message before the last one is refused again and again, and the server does
				// not say why. The others need not wait for this one.
				s.giveUp(p.entries, err)
				deadline, fruitless, wait = time.Time{}, 3, time.Millisecond
				continue
			}
			fruitless++
			pause(s.base, wait)
			wait = min(2*wait, 250*time.Millisecond)
			continue
		}
		if refused, ok := errors.AsType[*jetstream.APIError](err); ok && outcome == outcomeMoved && refused.ErrorCode == codeWrongSequenceConstant && busy < 3 {
			// On several servers this is also said for a moment after a message of the
			// subject was acknowledged: most often nobody has lost.
			pause(s.base, 100*time.Microsecond<<busy)
			busy++
			continue
		}
		moved, err := s.moved(p, known)
		if err != nil {
			s.giveUp(pending, err)
			return answered{}
		}
		if !moved {
			fruitless++
			pause(s.base, wait)
			wait = min(2*wait, 250*time.Millisecond)
		}
	}
}

// disputable reports whether another server may have written what was refused.
// Nobody writes a message that is too large, and when all replicas follow the
// leader there is nobody else who could have thought that there is no room.
func (s *Store) disputable(o outcome, err error) bool {
	if _, answered := errors.AsType[*jetstream.APIError](err); !answered {
		return false
	}
	if errors.Is(err, errFull) {
		return !s.leads(s.base, 0)
	}
	return o == outcomeMoved || errors.Is(err, errAgain)
}

// begin marks the plan's entries as sent; false when one was given up.
func (p *plan) begin() bool {
	if slices.ContainsFunc(p.entries, (*entry).isDone) {
		return false
	}
	for _, e := range p.entries {
		if !e.begin() {
			return false
		}
	}
	for _, e := range p.entries {
		e.sent = true
	}
	return true
}

// back returns the entries whose outcome is still open, in order.
func (p *plan) back() []*entry {
	all := slices.Clone(p.entries)
	for _, h := range p.held {
		all = append(all, h.entry)
	}
	all = append(all, p.left...)
	slices.SortFunc(all, func(a, b *entry) int { return a.order - b.order })
	return all
}

// giveUp tells the entries that there will be no outcome.
func (s *Store) giveUp(pending []*entry, cause error) {
	for _, e := range pending {
		kind := eventstore.ErrUnavailable
		switch {
		case e.uncertain:
			kind = eventstore.ErrOutcomeUnknown
		case errors.Is(cause, eventstore.ErrUnavailable), errors.Is(cause, eventstore.ErrGap), errors.Is(cause, eventstore.ErrDecode):
			e.finish(eventstore.Receipt{}, fmt.Errorf("append: %w", cause))
			continue
		}
		e.finish(eventstore.Receipt{}, fmt.Errorf("append: %w: %w", kind, cause))
	}
}

// send sends the plan and waits for the server's answer. first is the sequence
// of the first message. It sends nothing if the connection was made anew since
// the plan was made: the log must be looked at first.
func (s *Store) send(p *plan, reconnects uint64) (result outcome, first uint64, err error) {
	if hook := s.settings.sending; hook != nil {
		hook(p.messages)
	}
	if !s.connected.Load() || s.conn.Stats().Reconnects != reconnects {
		return outcomeRefused, 0, client.ErrDisconnected
	}
	count := len(p.messages)
	last := p.messages[count-1]
	if count > 1 {
		id := nuid.Next()
		ids, sequences := []string{id}, make([]string, count)
		for i, m := range p.messages {
			sequences[i] = strconv.Itoa(i + 1)
			m.Header[headerBatchID], m.Header[headerBatchSequence] = ids, sequences[i:i+1:i+1]
		}
		last.Header[headerBatchCommit] = []string{"1"}
	}
	if s.settings.swallow != nil && s.settings.swallow(p.messages) {
		return outcomeUnknown, 0, errAgain
	}
	if count > 1 {
		for _, m := range p.messages[:count-1] {
			if err := s.conn.PublishMsg(m); err != nil {
				return outcomeRefused, 0, err // without its last message no batch is committed
			}
		}
	}
	answer, err := s.conn.RequestMsg(last, s.settings.attempt)
	if s.settings.dropReply != nil && s.settings.dropReply() {
		return outcomeUnknown, 0, errAgain
	}
	if err != nil {
		if errors.Is(err, client.ErrNoResponders) || errors.Is(err, client.ErrReconnectBufExceeded) {
			return outcomeRefused, 0, err
		}
		return outcomeUnknown, 0, fmt.Errorf("no answer from the server: %w", err)
	}
	if s.settings.reply != nil {
		answer.Data = s.settings.reply(answer.Data)
	}
	if sequence, ok := plainAck(answer.Data, s.settings.stream); ok && count == 1 {
		return outcomeWritten, sequence, nil
	}
	var ack acknowledgement
	if err := json.Unmarshal(answer.Data, &ack); err != nil {
		return outcomeUnknown, 0, fmt.Errorf("the server's answer cannot be understood: %w", err)
	}
	if refused := ack.Error; refused != nil {
		if full(refused) {
			return outcomeRefused, 0, fmt.Errorf("%w for stream %q: raise its max_msgs or max_bytes, or the storage of the account or of the server: %w", errFull, s.settings.stream, refused)
		}
		switch refused.ErrorCode {
		case codeWrongSequence, codeWrongSequenceConstant:
			return outcomeMoved, 0, refused
		case codeIncomplete, codeManyInFlight:
			return outcomeRefused, 0, fmt.Errorf("%w: %w", errAgain, refused)
		}
		if refused.Code >= 500 {
			return outcomeUnknown, 0, refused
		}
		return outcomeRefused, 0, refused
	}
	if ack.Stream != s.settings.stream || ack.Sequence < uint64(count) || count > 1 && ack.Count != count {
		return outcomeUnknown, 0, fmt.Errorf("the server's answer %q does not fit %d messages for stream %q", answer.Data, count, s.settings.stream)
	}
	return outcomeWritten, ack.Sequence - uint64(count) + 1, nil
}

// acknowledgement is the server's answer to a publish or a batch.
type acknowledgement struct {
	Error    *jetstream.APIError `json:"error"`
	Stream   string              `json:"stream"`
	Sequence uint64              `json:"seq"`
	Count    int                 `json:"count"`
}

// plainAck reads the answer that nearly every publish gets,
// {"stream":"deed","seq":7}, and nothing else: JSON takes a twelfth of what a
// publish costs here.
func plainAck(answer []byte, stream string) (uint64, bool) {
	rest, a := bytes.CutPrefix(answer, []byte(`{"stream":"`))
	name, rest, b := bytes.Cut(rest, []byte(`","seq":`))
	digits, c := bytes.CutSuffix(rest, []byte{'}'})
	if !a || !b || !c || string(name) != stream || len(digits) == 0 || digits[0] == '0' {
		return 0, false
	}
	sequence, err := strconv.ParseUint(string(digits), 10, 64)
	return sequence, err == nil
}

// record remembers where the plan has brought the streams, and tells the
// callers.
func (s *Store) record(p *plan, first uint64, known map[eventstore.Stream]bool) {
	newest := first + uint64(len(p.messages)) - 1
	s.saw(newest)
	events := p.entries[len(p.entries)-1].commit.Events
	s.newest.see(newest, events[len(events)-1].ID)
	for of, t := range p.tracks.all() {
		if !t.guarded {
			continue
		}
		if len(p.left) > 0 { // for those who come next
			known[of] = true
		}
		if len(t.events) == 0 {
			s.heads.set(of, t.base)
			continue
		}
		now := head{version: t.version, sequence: first + uint64(t.events[len(t.events)-1]), last: t.last, keys: t.base.keys, previous: t.trail.placed(first)}
		if now.keys == nil && t.base.version == 0 {
			now.keys = new(keys)
		}
		if now.keys != nil {
			now.keys.extend(t.base.version, t.version, func(add func(string, usedKey)) {
				for key, n := range t.keys {
					receipt := placed(p.receipts[n], first)
					add(key, usedKey{fingerprint: receipt.Fingerprint, sequence: uint64(receipt.First), receipt: &receipt})
				}
			})
		}
		s.heads.set(of, now)
	}
	for i, e := range p.entries {
		if len(p.held) > 0 { // which need the receipts as they are
			e.finish(placed(p.receipts[i], first), nil)
		} else {
			e.finish(inPlace(p.receipts[i], first), nil)
		}
	}
	for _, h := range p.held {
		h.entry.finish(h.outcome(first))
	}
}

// moved reads where the plan's streams are, and reports whether one of them is
// not where the plan has it. Of several replicas any may answer: what it knows
// is stored, but there may be more.
func (s *Store) moved(p *plan, known map[eventstore.Stream]bool) (bool, error) {
	streams := p.streams()
	read, err := s.refresh(s.base, streams, false)
	if err != nil {
		return false, err
	}
	moved := false
	for i, of := range streams {
		if h := read[i]; h.sequence != p.tracks.get(of).base.sequence {
			moved = true
			known[of] = true
		}
	}
	return moved, nil
}

// wasWritten finds out what became of an entry that was sent, now that its
// first stream is not where it was: either its event is among those that came
// since, or it never will be.
func (s *Store) wasWritten(ctx context.Context, e *entry, now head) (bool, error) {
	if now.version > e.base.version {
		after, err := s.history(ctx, e.writes[0], now, e.base.version, 0)
		if err != nil {
			return false, err
		}
		// It need not be the next one: others of its batch may have written the stream
		// before it.
		for _, next := range after {
			if next.ID != e.commit.Events[0].ID {
				continue
			}
			receipt, err := s.receiptOf(ctx, usedKey{fingerprint: e.commit.Fingerprint, sequence: uint64(next.Position)})
			if err != nil {
				return false, err
			}
			e.finish(receipt, nil)
			return true, nil
		}
	}
	e.sent, e.uncertain = false, false
	return false, nil
}

// refresh reads the heads of the streams; all that was acknowledged when fresh.
// What it returns may be forgotten by the time somebody looks at what is remembered.
func (s *Store) refresh(ctx context.Context, streams []eventstore.Stream, fresh bool) ([]head, error) {
	read := make([]head, 0, len(streams))
	// In parts, since the time for an answer is limited and events may be large.
	for part := range slices.Chunk(streams, 32) {
		more, err := s.refreshPart(ctx, part, fresh)
		if err != nil {
			return nil, err
		}
		read = append(read, more...)
	}
	return read, nil
}

func (s *Store) refreshPart(ctx context.Context, streams []eventstore.Stream, fresh bool) ([]head, error) {
	read := make([]head, len(streams))
	return read, s.asking(ctx, "read the ends of streams", func(ctx context.Context) error {
		found, err := s.lasts(ctx, streams, fresh)
		if err != nil {
			return err
		}
		for i, of := range streams {
			now := headOf(found[i])
			if found[i] != nil {
				s.newest.see(now.sequence, now.last)
			}
			if before, ok := s.heads.get(of); ok {
				if before.sequence > now.sequence {
					if s.replicas.Load() > 1 { // a leader of yesterday may have answered
						return fmt.Errorf("%w: %w", errAgain, errRewound(of, before, now))
					}
					return errRewound(of, before, now)
				}
				now.keys = before.keys
			}
			s.heads.set(of, now)
			read[i] = now
		}
		return nil
	})
}

func errRewound(of eventstore.Stream, before, now head) error {
	return fmt.Errorf("%w: stream %q ends at position %d, but this process has seen position %d: the server has lost events that it acknowledged (sync_interval is not always?), or was restored", eventstore.ErrGap, of, now.sequence, before.sequence)
}

// lasts returns the last message of each stream; nil where there is none. On a
// single server one request answers for all of them.
func (s *Store) lasts(ctx context.Context, streams []eventstore.Stream, fresh bool) ([]*message, error) {
	found := make([]*message, len(streams))
	names := make([]string, len(streams))
	at := make(map[string]int, len(streams))
	for i, of := range streams {
		names[i] = s.subjects.of(of)
		at[names[i]] = i
	}
	if fresh && s.replicas.Load() > 1 || len(streams) == 1 {
		return s.lastsOneByOne(ctx, streams)
	}
	through := s.known.Load()
	if fresh {
		m, err := s.leader(ctx, &getRequest{Last: ">"})
		if err != nil {
			return nil, err
		}
		if m != nil {
			through = max(through, uint64(m.Position))
		}
	}
	for len(names) > 0 {
		n, bytes := 0, 0
		for n < len(names) && n < batchMessages && bytes < 128<<10 {
			bytes += len(names[n])
			n++
		}
		// Where events are large an answer does not hold all: the rest is asked for again.
		for asked, more := names[:n], true; more; {
			messages, reached, rest, err := s.multiLast(ctx, asked)
			if len(messages) == 0 && err == nil && through > 0 || errors.Is(err, errMirror) { // it does not say how far it is
				return s.lastsOneByOne(ctx, streams)
			}
			if err != nil {
				return nil, err
			}
			if reached < through {
				return nil, fmt.Errorf("%w: a replica lags", errAgain)
			}
			for _, m := range messages {
				found[at[s.subjects.of(m.Stream)]] = m
			}
			if more = rest; more {
				asked = slices.DeleteFunc(slices.Clone(asked), func(name string) bool { return found[at[name]] != nil })
			}
		}
		names = names[n:]
	}
	return found, nil
}

// lastsOneByOne asks the leader for each.
func (s *Store) lastsOneByOne(ctx context.Context, streams []eventstore.Stream) ([]*message, error) {
	found := make([]*message, len(streams))
	var failed error
	var mu sync.Mutex
	var all sync.WaitGroup
	turns := make(chan struct{}, 32) // of 1.4 MiB at most: the server cuts off a client to which more than 64 are under way
	for i := range streams {
		turns <- struct{}{}
		all.Go(func() {
			defer func() { <-turns }()
			m, err := s.fresh(ctx, &getRequest{Last: s.subjects.of(streams[i])})
			mu.Lock()
			defer mu.Unlock()
			found[i] = m
			failed = errors.Join(failed, err)
		})
	}
	all.Wait()
	return found, failed
}
