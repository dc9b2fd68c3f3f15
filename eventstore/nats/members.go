package nats

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
	"sync"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/ownership"
)

// Members returns where the processes that use the log can find each other, to
// divide their background work: it is made to be given to deed.Members. An error
// wrapping errors.ErrUnsupported says that s is no store of this package.
//
// They say that they are there in a stream of its own, named like the log with
// "_members" behind; it is made when the first one comes, with as many replicas.
// What is in it is removed by the server when it is as old as a silent member may
// be, so it is the server's clock that counts.
//
// A directory serves one process.
func Members(s eventstore.Store) (ownership.Directory, error) {
	store, ok := eventstore.Find[*Store](s)
	if !ok {
		return nil, fmt.Errorf("find other nodes in %T: it is no log in NATS: %w", s, errors.ErrUnsupported)
	}
	return &members{s: store, name: store.settings.stream + "_members"}, nil
}

// members implements ownership.Directory. A member's message is the only one
// under a subject that says its name and, by a digest, what it offers: who lists
// the subjects need not read what it has read before.
type members struct {
	s    *Store
	name string // of the stream, and first token of its subjects

	mu      sync.Mutex // held during calls
	stream  jetstream.Stream
	ttl     time.Duration
	subject string // of this member; empty: none
	last    uint64 // its sequence there
	known   map[string]ownership.Member
}

// open finds the stream; it makes it, or changes how long its messages live, if
// ttl is not 0.
func (m *members) open(ctx context.Context, ttl time.Duration) error {
	if m.stream != nil && (ttl == 0 || m.ttl == ttl) {
		return nil
	}
	stream, err := m.s.js.Stream(ctx, m.name)
	switch {
	case err == nil && (ttl == 0 || stream.CachedInfo().Config.MaxAge == ttl):
	case err != nil && (ttl == 0 || !errors.Is(err, jetstream.ErrStreamNotFound)):
		return err
	default:
		stream, err = m.s.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
			Name: m.name, Subjects: []string{m.name + ".>"}, Storage: jetstream.FileStorage, Replicas: int(max(1, m.s.replicas.Load())),
			MaxMsgsPerSubject: 1, MaxAge: ttl, Duplicates: min(ttl, time.Minute), AllowDirect: true,
			Description: "which processes of the application live",
		})
		if err != nil {
			return fmt.Errorf("make the stream %q: %w", m.name, err)
		}
	}
	m.stream, m.ttl = stream, stream.CachedInfo().Config.MaxAge
	return nil
}

// lost forgets the stream if there is none any more.
func (m *members) lost(err error) error {
	if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrNoStreamResponse) {
		m.stream = nil
	}
	return err
}

func (m *members) prefix(name string) string {
	return m.name + "." + base64.RawURLEncoding.EncodeToString([]byte(name))
}

// Join implements ownership.Directory.
func (m *members) Join(ctx context.Context, self ownership.Member, ttl time.Duration) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.open(ctx, ttl); err != nil {
		return err
	}
	data, err := json.Marshal(self)
	if err != nil {
		return err
	}
	digest := fnv.New64a()
	_, _ = digest.Write(data)
	subject := fmt.Sprintf("%s.%016x", m.prefix(self.Name), digest.Sum64())
	if subject != m.subject && m.subject != "" {
		// What it offered before goes first: nobody is to see both.
		if err := m.purge(ctx, self.Name); err != nil {
			return err
		}
	}
	if subject != m.subject {
		m.subject, m.last = subject, 0
	}
	message := &client.Msg{Subject: subject, Data: data}
	ack, err := m.s.js.PublishMsg(ctx, message, jetstream.WithExpectLastSequencePerSubject(m.last), jetstream.WithRetryAttempts(0))
	if apiErr := (*jetstream.APIError)(nil); errors.As(err, &apiErr) && apiErr.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
		// It has expired; or an earlier call has succeeded, of which nothing was heard:
		// then it is there twice over, and begins anew as well.
		m.subject = ""
		return errors.Join(fmt.Errorf("%w: %w", ownership.ErrReplaced, err), m.purge(ctx, self.Name))
	}
	if err != nil {
		return m.lost(err)
	}
	m.last = ack.Sequence
	return nil
}

func (m *members) purge(ctx context.Context, name string) error {
	if err := m.stream.Purge(ctx, jetstream.WithPurgeSubject(m.prefix(name)+".*")); err != nil {
		return m.lost(err)
	}
	m.subject, m.last = "", 0
	return nil
}

// Leave implements ownership.Directory.
func (m *members) Leave(ctx context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.open(ctx, 0); errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	return m.purge(ctx, name)
}

// Members implements ownership.Directory.
func (m *members) Members(ctx context.Context) ([]ownership.Member, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.open(ctx, 0); errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	info, err := m.stream.Info(ctx, jetstream.WithSubjectFilter(m.name+".>"))
	if err != nil {
		return nil, m.lost(err)
	}
	now := map[string]ownership.Member{}
	var all []ownership.Member
	for subject := range info.State.Subjects {
		one, ok := m.known[subject]
		if !ok {
			raw, err := m.stream.GetLastMsgForSubject(ctx, subject)
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				continue // it has just gone
			}
			if err != nil {
				return nil, m.lost(err)
			}
			if json.Unmarshal(raw.Data, &one) != nil || !strings.HasPrefix(subject, m.prefix(one.Name)+".") {
				continue // nothing of ours
			}
		}
		now[subject] = one
		all = append(all, one)
	}
	m.known = now
	return all, nil
}
