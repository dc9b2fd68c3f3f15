package nats

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/deed-go/deed/eventstore"
)

// getRequest is what JetStream's get calls understand.
type getRequest struct {
	Sequence  uint64   `json:"seq,omitempty"`
	Last      string   `json:"last_by_subj,omitempty"`
	Next      string   `json:"next_by_subj,omitempty"`
	MultiLast []string `json:"multi_last,omitempty"`
	Batch     int      `json:"batch,omitempty"`
	MaxBytes  int      `json:"max_bytes,omitempty"`
	UpTo      uint64   `json:"up_to_seq,omitempty"`
	NoHeaders bool     `json:"no_hdr,omitempty"` // a server that does not know it sends them
}

// errAgain: the answer is no answer; the same request can be sent again.
var errAgain = errors.New("the server cannot answer now")

// errMirror: a mirror of the stream has answered, which may lag and have limits
// of its own. The server lets every mirror answer direct gets for its origin.
var errMirror = fmt.Errorf("%w: a mirror of the stream answered", errAgain)

// transient reports whether the server or the way to it is to blame.
func transient(err error) bool {
	for _, cause := range []error{
		errAgain, client.ErrTimeout, client.ErrNoResponders, client.ErrDisconnected, client.ErrConnectionReconnecting, client.ErrReconnectBufExceeded,
		client.ErrNoServers, client.ErrStaleConnection, jetstream.ErrNoStreamResponse, eventstore.ErrUnavailable,
	} {
		if errors.Is(err, cause) {
			return true
		}
	}
	if refused, ok := errors.AsType[*jetstream.APIError](err); ok {
		return refused.Code >= 500
	}
	return false
}

// unavailable describes a failure of the server. Errors of contexts stay what
// they are.
func unavailable(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, client.ErrConnectionClosed), transient(err):
		if !errors.Is(err, eventstore.ErrUnavailable) {
			return fmt.Errorf("%s: %w: %w", what, eventstore.ErrUnavailable, err)
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// pause waits, and reports whether the context is still good.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// asking calls fn until it has an answer or patience is over. Each try has a
// limit of its own.
func (s *Store) asking(ctx context.Context, what string, fn func(context.Context) error) error {
	var deadline time.Time
	for wait := time.Millisecond; ; wait = min(2*wait, 250*time.Millisecond) {
		once, cancel := context.WithTimeout(ctx, s.settings.attempt)
		err := fn(once)
		late := once.Err() != nil
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !transient(err) && !late {
			return unavailable(what, err)
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(s.settings.patience)
		}
		if time.Now().After(deadline) || s.closed() {
			return fmt.Errorf("%s: %w: %w", what, eventstore.ErrUnavailable, err)
		}
		if !pause(ctx, wait) {
			return ctx.Err()
		}
	}
}

func (s *Store) request(ctx context.Context, subject string, r *getRequest) (*client.Msg, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	m, err := s.conn.RequestWithContext(ctx, subject, body)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("%w: no answer in time", errAgain)
	}
	return m, err
}

// direct asks any server that has the stream.
func (s *Store) direct(ctx context.Context, r *getRequest) (*message, error) {
	if s.settings.stale != nil && s.settings.stale(r) {
		return nil, nil
	}
	m, err := s.request(ctx, "$JS.API.DIRECT.GET."+s.settings.stream, r)
	if err != nil {
		return nil, err
	}
	return s.answer(m)
}

// answer reads the answer to a direct get: nil if there is no such message.
func (s *Store) answer(m *client.Msg) (*message, error) {
	if status := get(m.Header, "Status"); status != "" {
		if status == "404" {
			return nil, nil
		}
		return nil, fmt.Errorf("%w: status %s %s", errAgain, status, get(m.Header, "Description"))
	}
	if by := get(m.Header, "Nats-Stream"); by != s.settings.stream {
		return nil, fmt.Errorf("%w: %q answered", errMirror, by)
	}
	sequence, err := strconv.ParseUint(get(m.Header, "Nats-Sequence"), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("the server's answer has the sequence %q", get(m.Header, "Nats-Sequence"))
	}
	return s.subjects.decode(get(m.Header, "Nats-Subject"), sequence, m.Data)
}

// leader asks the server that leads the stream, which knows all that was
// acknowledged.
func (s *Store) leader(ctx context.Context, r *getRequest) (*message, error) {
	if s.settings.stale != nil && s.settings.stale(r) {
		return nil, nil
	}
	payload := *r
	payload.NoHeaders = true
	m, err := s.request(ctx, "$JS.API.STREAM.MSG.GET."+s.settings.stream, &payload)
	if err != nil {
		return nil, err
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Subject  string `json:"subject"`
			Sequence uint64 `json:"seq"`
			Data     string `json:"data"`
		} `json:"message"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return nil, fmt.Errorf("the server's answer cannot be understood: %w", err)
	}
	if answer.Error != nil {
		if answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound {
			return nil, nil
		}
		if answer.Error.Code >= 500 {
			return nil, fmt.Errorf("%w: %w", errAgain, answer.Error)
		}
		return nil, answer.Error
	}
	if answer.Message == nil {
		return nil, errors.New("the server's answer has no message")
	}
	data, err := base64.StdEncoding.DecodeString(answer.Message.Data)
	if err != nil {
		return nil, fmt.Errorf("the server's answer cannot be understood: %w", err)
	}
	return s.subjects.decode(answer.Message.Subject, answer.Message.Sequence, data)
}

// fresh asks whoever knows all that was acknowledged. The only server that has
// a stream is one of those; of several only the leader is, and the others lag.
func (s *Store) fresh(ctx context.Context, r *getRequest) (*message, error) {
	return s.leader(ctx, r)
}

// last returns the last message of the subject; nil if there is none. It sees
// everything that was acknowledged, to whomever, before it was called.
func (s *Store) last(ctx context.Context, subject string) (*message, error) {
	var found *message
	err := s.asking(ctx, "read the last message of "+subject, func(ctx context.Context) (err error) {
		found, err = s.fresh(ctx, &getRequest{Last: subject})
		if err == nil && subject == ">" && found != nil && !found.isEvent() {
			return fmt.Errorf("%w: half a commit is visible", errAgain)
		}
		if err == nil && s.replicas.Load() > 1 && s.older(subject, found) {
			if _, wrong := s.guard.state(); errors.Is(wrong, eventstore.ErrGap) {
				return wrong // it is so
			}
			return errYesterday
		}
		return err
	})
	if err == nil && found != nil {
		s.saw(uint64(found.Position))
		s.newest.see(uint64(found.Position), found.ID)
	}
	return found, err
}

// older reports whether this process knows of a later message than the one that
// is said to be the subject's last. It may be that the servers have lost it:
// then calls fail until verify says so.
func (s *Store) older(subject string, found *message) bool {
	sequence := uint64(0)
	if found != nil {
		sequence = uint64(found.Position)
	}
	if subject == ">" {
		return sequence < s.known.Load()
	}
	of, err := s.subjects.stream(subject)
	if err != nil {
		return false
	}
	h, ok := s.heads.get(of)
	return ok && sequence < h.sequence
}

// yesterday is for how long a server that has lost touch with the others may
// still take itself for the leader, and answer with what it had then: it looks
// every ten seconds whether it has heard from most of them within ten.
const yesterday = 25 * time.Second

// errYesterday: the answer may be one of a leader of yesterday.
var errYesterday = fmt.Errorf("%w: a server that does not lead any more may have answered", errAgain)

// at returns the message with the sequence, which is known to be stored.
func (s *Store) at(ctx context.Context, sequence uint64) (*message, error) {
	var found *message
	began := time.Now()
	err := s.asking(ctx, "read a message", func(ctx context.Context) (err error) {
		found, err = s.direct(ctx, &getRequest{Sequence: sequence})
		if err == nil && found == nil || errors.Is(err, errMirror) {
			// A replica that lags, or a mirror, does not have it.
			found, err = s.leader(ctx, &getRequest{Sequence: sequence})
		}
		if err == nil && found == nil && s.replicas.Load() > 1 && time.Since(began) < yesterday {
			return errYesterday
		}
		return err
	})
	if err == nil && found == nil {
		return nil, fmt.Errorf("%w: there is no message at sequence %d, which an event points to: messages were removed", eventstore.ErrGap, sequence)
	}
	return found, err
}

// many is at for several sequences at once.
func (s *Store) many(ctx context.Context, sequences []uint64) ([]*message, error) {
	found, failed := make([]*message, len(sequences)), make([]error, len(sequences))
	var all sync.WaitGroup
	for i := 1; i < len(sequences); i++ {
		all.Go(func() { found[i], failed[i] = s.at(ctx, sequences[i]) })
	}
	if len(sequences) > 0 {
		found[0], failed[0] = s.at(ctx, sequences[0])
	}
	all.Wait()
	return found, errors.Join(failed...)
}

// series sends a request that is answered by several messages, and gives each
// to fn. It returns the headers of the end; nil when there was nothing.
func (s *Store) series(ctx context.Context, r *getRequest, fn func(*message) error) (client.Header, error) {
	if s.settings.stale != nil && s.settings.stale(r) {
		return nil, nil
	}
	inbox := s.conn.NewRespInbox()
	sub, err := s.conn.SubscribeSync(inbox)
	if err != nil {
		return nil, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return nil, err
	}
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if err := s.conn.PublishRequest("$JS.API.DIRECT.GET."+s.settings.stream, inbox, body); err != nil {
		return nil, err
	}
	lost := fmt.Errorf("%w: messages were lost on their way", errAgain)
	last, n := "0", 0
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				return nil, fmt.Errorf("%w: no answer in time", errAgain)
			}
			return nil, err
		}
		switch status := get(m.Header, "Status"); status {
		case "":
		case "204": // the end
			if get(m.Header, "Nats-Last-Sequence") != last {
				return nil, lost
			}
			return m.Header, nil
		case "404": // there is none
			if n > 0 {
				return nil, lost
			}
			return nil, nil
		default:
			return nil, fmt.Errorf("%w: status %s %s", errAgain, status, get(m.Header, "Description"))
		}
		if get(m.Header, "Nats-Last-Sequence") != last { // that of the message before this one
			return nil, lost
		}
		decoded, err := s.answer(m)
		if err != nil {
			return nil, err
		}
		last = get(m.Header, "Nats-Sequence")
		n++
		if err := fn(decoded); err != nil {
			return nil, err
		}
	}
}

// page returns up to most messages of the filter from the sequence on, in
// order, and whether the server that answered has more of them.
func (s *Store) page(ctx context.Context, filter string, from uint64, most int) ([]*message, bool, error) {
	var page []*message
	more := false
	err := s.asking(ctx, "read a page of the log", func(ctx context.Context) error {
		page = page[:0]
		r := getRequest{Sequence: from, Batch: most, MaxBytes: pageBytes}
		if filter != s.subjects.all() {
			r.Next = filter
		}
		end, err := s.series(ctx, &r, func(m *message) error { page = append(page, m); return nil })
		if errors.Is(err, errMirror) {
			// Whichever is near may answer always: go on by single messages.
			m, err := s.leader(ctx, &getRequest{Next: filter, Sequence: from})
			page, more = page[:0], m != nil
			if m != nil {
				page = append(page, m)
			}
			return err
		}
		if err != nil {
			return err
		}
		more = end != nil && get(end, "Nats-Num-Pending") != "0"
		return nil
	})
	return page, more, err
}

// multiLast returns the last messages of the subjects that have any, and up to
// which sequence the server that answered has the log; 0 if it does not say.
// There may be more than fit into an answer.
func (s *Store) multiLast(ctx context.Context, names []string) (found []*message, through uint64, more bool, err error) {
	end, err := s.series(ctx, &getRequest{MultiLast: names, MaxBytes: multiLastBytes}, func(m *message) error { found = append(found, m); return nil })
	if err != nil || end == nil {
		return nil, 0, false, err
	}
	through, err = strconv.ParseUint(get(end, "Nats-UpTo-Sequence"), 10, 64)
	if err != nil {
		return nil, 0, false, fmt.Errorf("the server's answer goes up to %q", get(end, "Nats-UpTo-Sequence"))
	}
	return found, through, get(end, "Nats-Num-Pending") != "0", nil
}

// multiLastBytes bounds an answer. Without it the server ends one where it would
// cut off the client.
const multiLastBytes = 8 << 20

// next returns the first message of the filter from the sequence on, as the
// leader knows it; nil if there is none.
func (s *Store) next(ctx context.Context, filter string, from uint64) (*message, error) {
	var found *message
	err := s.asking(ctx, "read the log", func(ctx context.Context) (err error) {
		found, err = s.fresh(ctx, &getRequest{Next: filter, Sequence: from})
		return err
	})
	return found, err
}

const (
	pageEvents = 512
	pageBytes  = 1 << 20
)
