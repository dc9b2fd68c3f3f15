package nats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/ownership"
)

// Leases returns leases that are kept where the log is, for processes that have
// no state in common: it is made to be given to deed.Leases. An error wrapping
// errors.ErrUnsupported says that s is no store of this package.
//
// They are keys of a key-value bucket of its own, named like the log with
// "_leases" behind; it is made when the first one is acquired, with as many
// replicas. A key is written by its revision, and removed by the server when its
// time to live, in whole seconds, has passed since: so it is the server's clock
// that counts, and no two processes' clocks are compared. The value says who has
// the lease (`nats kv get deed_leases KEY`); to delete the key takes it away.
//
// Processes find each other there too, as with [Members].
func Leases(s eventstore.Store) (ownership.Leases, error) {
	store, ok := eventstore.Find[*Store](s)
	if !ok {
		return nil, fmt.Errorf("keep leases in %T: it is no log in NATS: %w", s, errors.ErrUnsupported)
	}
	bucket := store.settings.stream + "_leases"
	return &leases{
		members: &members{s: store, name: store.settings.stream + "_members"},
		bucket:  bucket, name: "KV_" + bucket, prefix: "$KV." + bucket + ".",
	}, nil
}

// leases implements ownership.Leases, and ownership.Directory by what it has of
// members.
type leases struct {
	*members
	bucket string
	name   string // of the bucket's stream
	prefix string // of its subjects

	opening sync.Mutex
	opened  jetstream.Stream
}

var (
	_ ownership.Leases    = (*leases)(nil)
	_ ownership.Directory = (*leases)(nil)
)

// leaseValue is what a key holds.
type leaseValue struct {
	Name  string `json:"name"`
	Owner string `json:"owner"`
	// Epoch is the revision that the lease was acquired at; 0: this one.
	Epoch uint64 `json:"epoch,omitempty"`
}

// current is the last revision of a key; the zero one when there is none.
type current struct {
	leaseValue
	revision uint64
	held     bool
}

// askLeases bounds each request: who has a lease must get to ask several times.
const askLeases = 2 * time.Second

// markers is how long the server keeps, in place of a key whose time has passed,
// that it has.
const markers = time.Minute

// stream finds the bucket, and makes it if there is none.
func (l *leases) stream(ctx context.Context) (jetstream.Stream, error) {
	l.opening.Lock()
	defer l.opening.Unlock()
	if l.opened != nil {
		return l.opened, nil
	}
	stream, err := l.s.js.Stream(ctx, l.name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		_, err = l.s.js.CreateStream(ctx, l.config())
		if err != nil && !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			return nil, fmt.Errorf("make the bucket %q: %w", l.bucket, err)
		}
		stream, err = l.s.js.Stream(ctx, l.name)
	}
	if err != nil {
		return nil, err
	}
	if c := stream.CachedInfo().Config; !c.AllowMsgTTL || c.MaxMsgsPerSubject != 1 {
		return nil, fmt.Errorf("%w: the bucket %q does not let keys expire, or keeps a history: delete it, and it is made anew", eventstore.ErrInvalid, l.bucket)
	}
	l.opened = stream
	return stream, nil
}

// config is that of a key-value bucket whose revisions begin with the time: were
// it deleted and made anew, they would otherwise be those of other leases.
func (l *leases) config() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: l.name, Subjects: []string{l.prefix + ">"}, Storage: jetstream.FileStorage, Replicas: int(max(1, l.s.replicas.Load())),
		MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew, DenyDelete: true, AllowRollup: true, AllowDirect: true,
		AllowMsgTTL: true, SubjectDeleteMarkerTTL: markers, FirstSeq: uint64(time.Now().UnixMilli()),
		Description: "who runs the sagas and reactions of the application",
	}
}

// subject is that of the lease's key: letters, digits, '_' and '-' stand for
// themselves, other bytes are '=' and two digits.
func (l *leases) subject(name string) string {
	var key strings.Builder
	key.WriteString(l.prefix)
	for _, b := range []byte(name) {
		if b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '_' || b == '-' {
			key.WriteByte(b)
		} else {
			fmt.Fprintf(&key, "=%02x", b)
		}
	}
	return key.String()
}

// look reads the key. A replica that lags may answer, with an earlier revision:
// whoever writes on it is refused, and looks again.
func (l *leases) look(ctx context.Context, name string) (current, error) {
	once, cancel := context.WithTimeout(ctx, askLeases)
	defer cancel()
	stream, err := l.stream(once)
	if err != nil {
		return current{}, err
	}
	raw, err := stream.GetLastMsgForSubject(once, l.subject(name))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return current{}, nil
	}
	if err != nil {
		return current{}, l.missing(err)
	}
	is := current{revision: raw.Sequence}
	if raw.Header.Get(jetstream.MarkerReasonHeader) != "" || raw.Header.Get(kvOperation) != "" {
		return is, nil // it was released, or has expired
	}
	if err := json.Unmarshal(raw.Data, &is.leaseValue); err != nil || is.Name != name {
		return current{}, fmt.Errorf("%w: the key %q is no lease: delete it", eventstore.ErrInvalid, strings.TrimPrefix(raw.Subject, l.prefix))
	}
	is.held = true
	if is.Epoch == 0 {
		is.Epoch = is.revision
	}
	return is, nil
}

const kvOperation = "KV-Operation"

// write puts a revision behind the one that is said to be the last. False says
// that another one is.
func (l *leases) write(ctx context.Context, m *client.Msg, behind uint64, options ...jetstream.PublishOpt) (uint64, bool, error) {
	once, cancel := context.WithTimeout(ctx, askLeases)
	defer cancel()
	options = append(options, jetstream.WithExpectLastSequencePerSubject(behind), jetstream.WithRetryAttempts(0))
	ack, err := l.s.js.PublishMsg(once, m, options...)
	if apiErr := (*jetstream.APIError)(nil); errors.As(err, &apiErr) &&
		(apiErr.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || apiErr.ErrorCode == codeWrongSequenceConstant) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, l.missing(err)
	}
	return ack.Sequence, true, nil
}

// missing forgets the bucket if there is none any more.
func (l *leases) missing(err error) error {
	if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrNoStreamResponse) {
		l.opening.Lock()
		defer l.opening.Unlock()
		l.opened = nil
	}
	return err
}

func (l *leases) put(ctx context.Context, v leaseValue, behind uint64, ttl time.Duration) (uint64, bool, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return 0, false, err
	}
	ttl = max(time.Second, (ttl + time.Second - 1).Truncate(time.Second))
	return l.write(ctx, &client.Msg{Subject: l.subject(v.Name), Data: data}, behind, jetstream.WithMsgTTL(ttl))
}

// looks is how often a key is looked at when what was seen of it is not the last.
const looks = 5

// again pauses before the n-th look.
func again(ctx context.Context, n int) bool {
	t := time.NewTimer(5 * time.Millisecond << n)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// outdated is told when that did not help.
func outdated(name string) error {
	return fmt.Errorf("%w: the lease of %q changes, or is read from a server that lags: try again", eventstore.ErrUnavailable, name)
}

// Acquire implements ownership.Leases.
func (l *leases) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (ownership.Lease, error) {
	for n := range looks {
		if n > 0 && !again(ctx, n) {
			break
		}
		is, err := l.look(ctx, name)
		if err != nil {
			return ownership.Lease{}, fmt.Errorf("acquire the lease of %q: %w", name, err)
		}
		if is.held && is.Owner != owner {
			return ownership.Lease{}, fmt.Errorf("%w: %q is held by %q", ownership.ErrHeld, name, is.Owner)
		}
		revision, ok, err := l.put(ctx, leaseValue{Name: name, Owner: owner}, is.revision, ttl)
		if err != nil {
			return ownership.Lease{}, fmt.Errorf("acquire the lease of %q: %w", name, err)
		}
		if ok {
			return ownership.Lease{Name: name, Owner: owner, Epoch: revision, Revision: revision}, nil
		}
	}
	return ownership.Lease{}, outdated(name)
}

// own finds the revision of a lease that is not the one the caller knows: an
// earlier renewal of which nothing was heard may have succeeded.
func (l *leases) own(ctx context.Context, lease ownership.Lease) (ownership.Lease, error) {
	is, err := l.look(ctx, lease.Name)
	switch {
	case err != nil:
		return lease, err
	case !is.held || is.Owner != lease.Owner || is.Epoch != lease.Epoch:
		return lease, ownership.ErrLost
	}
	lease.Revision = max(lease.Revision, is.revision)
	return lease, nil
}

// Renew implements ownership.Leases.
func (l *leases) Renew(ctx context.Context, lease ownership.Lease, ttl time.Duration) (ownership.Lease, error) {
	for n := range looks {
		if n > 0 && !again(ctx, n) {
			break
		}
		revision, ok, err := l.put(ctx, leaseValue{Name: lease.Name, Owner: lease.Owner, Epoch: lease.Epoch}, lease.Revision, ttl)
		if err != nil {
			return lease, fmt.Errorf("renew the lease of %q: %w", lease.Name, err)
		}
		if ok {
			lease.Revision = revision
			return lease, nil
		}
		if lease, err = l.own(ctx, lease); err != nil {
			return lease, fmt.Errorf("renew the lease of %q: %w", lease.Name, err)
		}
	}
	return lease, outdated(lease.Name)
}

// Release implements ownership.Leases.
func (l *leases) Release(ctx context.Context, lease ownership.Lease) error {
	for n := range looks {
		if n > 0 && !again(ctx, n) {
			break
		}
		m := &client.Msg{Subject: l.subject(lease.Name), Header: client.Header{kvOperation: []string{"DEL"}}}
		_, ok, err := l.write(ctx, m, lease.Revision)
		if ok {
			return nil
		}
		if err == nil {
			lease, err = l.own(ctx, lease)
		}
		switch {
		case errors.Is(err, ownership.ErrLost):
			return nil
		case err != nil:
			return fmt.Errorf("release the lease of %q: %w", lease.Name, err)
		}
	}
	return outdated(lease.Name)
}
