package nats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/deed-go/deed/eventstore"
)

// metadataLogID is where the id of the log is kept in the stream's metadata;
// metadataFormat says how messages are written.
const (
	metadataLogID  = "deed-log-id"
	metadataFormat = "deed-format"
	format         = 3 // 1 and 2 were written otherwise, and never released
)

// oldest is the first server version with atomic batches.
const oldestMajor, oldestMinor = 2, 12

func checkVersion(version string) error {
	major, rest, _ := strings.Cut(version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	a, errA := strconv.Atoi(strings.TrimPrefix(major, "v"))
	b, errB := strconv.Atoi(minor)
	if errA != nil || errB != nil {
		return fmt.Errorf("%w: the NATS server's version is %q, which cannot be understood", eventstore.ErrInvalid, version)
	}
	if a < oldestMajor || a == oldestMajor && b < oldestMinor {
		return fmt.Errorf("%w: the NATS server's version is %s, at least %d.%d is needed", eventstore.ErrInvalid, version, oldestMajor, oldestMinor)
	}
	return nil
}

// Config returns the settings of a stream that keeps a log: for people who make
// streams with their own tools. logID is any random text.
func Config(name string, replicas int, logID string) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: name, Subjects: []string{subjects{name}.all()}, Description: "event log of deed",
		Storage: jetstream.FileStorage, Replicas: max(replicas, 1),
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardNew,
		MaxMsgs: -1, MaxBytes: -1, MaxMsgsPerSubject: -1, MaxMsgSize: -1, MaxConsumers: -1,
		DenyDelete: true, DenyPurge: true, AllowDirect: true, AllowAtomicPublish: true,
		Metadata: map[string]string{metadataLogID: logID, metadataFormat: strconv.Itoa(format)},
	}
}

// prepare checks the server and the stream, and makes it where it may.
func (s *Store) prepare(ctx context.Context) error {
	if err := checkVersion(s.conn.ConnectedServerVersion()); err != nil {
		return err
	}
	info, err := s.streamInfo(ctx)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if !s.settings.create {
			return fmt.Errorf("%w: the stream does not exist, and the option WithoutCreation was given: make it with the settings of nats.Config", eventstore.ErrInvalid)
		}
		info, err = s.createStream(ctx)
	}
	if err != nil {
		return unavailable("ask for the stream", err)
	}
	if err := s.check(&info.Config); err != nil {
		return err
	}
	s.logID, s.created = info.Config.Metadata[metadataLogID], info.Created
	s.adopt(&info.Config)
	s.saw(info.State.LastSeq)
	if err := missingEvents(&info.State); err != nil {
		return err
	}
	s.warn(ctx)
	return nil
}

// streamInfo asks until there is an answer: a cluster may be electing a leader.
func (s *Store) streamInfo(ctx context.Context) (*jetstream.StreamInfo, error) {
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		info, err := s.ask(ctx)
		if err == nil {
			return info, nil
		}
		if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) {
			return nil, err
		}
		if !pause(ctx, wait) {
			return nil, err
		}
	}
}

func (s *Store) createStream(ctx context.Context) (*jetstream.StreamInfo, error) {
	config := Config(s.settings.stream, s.settings.replicas, uuid.NewString())
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		once, cancel := context.WithTimeout(ctx, 2*s.settings.attempt)
		stream, err := s.js.CreateStream(once, config)
		cancel()
		if err == nil {
			return stream.CachedInfo(), nil
		}
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another process was faster
			return s.streamInfo(ctx)
		}
		var refused *jetstream.APIError
		if errors.As(err, &refused) && refused.Code < 500 {
			return nil, err
		}
		if !pause(ctx, wait) {
			return nil, err
		}
	}
}

// check refuses a stream that could lose events or that lacks what is needed.
func (s *Store) check(c *jetstream.StreamConfig) error {
	err := s.flaw(c)
	if err == nil || errors.Is(err, eventstore.ErrNewerVersion) {
		return err
	}
	return fmt.Errorf("%w: %w", eventstore.ErrInvalid, err)
}

// flaw says which setting of the stream is bad.
func (s *Store) flaw(c *jetstream.StreamConfig) error {
	bad := func(setting, is, needed string) error {
		return fmt.Errorf("the stream's setting %s is %s, needed is %s: events could be lost or appends could not be checked: change it with \"nats stream edit\"", setting, is, needed)
	}
	limit := func(n int64) bool { return n > 0 }
	switch {
	case c.Retention != jetstream.LimitsPolicy:
		return bad("retention", fmt.Sprint(c.Retention), "limits")
	case c.Storage != jetstream.FileStorage:
		return bad("storage", fmt.Sprint(c.Storage), "file")
	case c.MaxAge > 0:
		return bad("max_age", c.MaxAge.String(), "0, unlimited")
	case limit(c.MaxMsgsPerSubject):
		return bad("max_msgs_per_subject", strconv.FormatInt(c.MaxMsgsPerSubject, 10), "-1, unlimited")
	case c.Discard == jetstream.DiscardOld && limit(c.MaxMsgs):
		return bad("discard", "old with max_msgs "+strconv.FormatInt(c.MaxMsgs, 10), "new")
	case c.Discard == jetstream.DiscardOld && limit(c.MaxBytes):
		return bad("discard", "old with max_bytes "+strconv.FormatInt(c.MaxBytes, 10), "new")
	case c.MaxMsgSize > 0 && c.MaxMsgSize < smallestMessage:
		return bad("max_msg_size", strconv.Itoa(int(c.MaxMsgSize)), fmt.Sprintf("-1, unlimited, or at least %d", smallestMessage))
	case c.AllowRollup:
		return bad("allow_rollup_hdrs", "true", "false")
	case c.AllowMsgTTL:
		return bad("allow_msg_ttl", "true", "false")
	case c.NoAck:
		return bad("no_ack", "true", "false")
	case c.Sealed:
		return bad("sealed", "true", "false")
	case c.Mirror != nil || len(c.Sources) > 0:
		return bad("mirror or sources", "set", "none")
	case c.SubjectTransform != nil:
		return bad("subject_transform", "set", "none")
	case !c.AllowDirect:
		return bad("allow_direct", "false", "true")
	case !c.AllowAtomicPublish:
		return bad("allow_atomic", "false", "true (with a server of 2.12 or later)")
	case !c.DenyDelete:
		return bad("deny_delete", "false", "true")
	case !c.DenyPurge:
		return bad("deny_purge", "false", "true")
	case len(c.Subjects) != 1 || c.Subjects[0] != s.subjects.all():
		return bad("subjects", fmt.Sprintf("%q", c.Subjects), fmt.Sprintf("[%q]", s.subjects.all()))
	case c.Replicas < s.settings.replicas:
		return fmt.Errorf("the stream has %d replicas, %d were asked for: change it with \"nats stream edit\"", c.Replicas, s.settings.replicas)
	case c.Metadata[metadataLogID] == "":
		return fmt.Errorf("the stream has no %s in its metadata: it was not made for deed", metadataLogID)
	}
	if f, err := strconv.Atoi(c.Metadata[metadataFormat]); err != nil || f < 1 {
		return fmt.Errorf("the stream's metadata %s is %q: it was not made for deed", metadataFormat, c.Metadata[metadataFormat])
	} else if f < format {
		return fmt.Errorf("the stream's metadata %s is %d: it was written before the first release, which cannot read it", metadataFormat, f)
	} else if f > format {
		return fmt.Errorf("%w: the stream is written in format %d, this program knows up to %d", eventstore.ErrNewerVersion, f, format)
	}
	return nil
}

// sync is what the servers say of when they sync.
type syncing struct {
	servers int // that answered
	always  bool
	slowest time.Duration // the longest interval among those that do not sync always
}

var errNoSystem = errors.New("no system connection was given")

// syncing asks all servers, each of which may keep a replica.
func (s *Store) syncing(ctx context.Context) (syncing, error) {
	if s.settings.system == nil {
		return syncing{}, errNoSystem
	}
	found := syncing{always: true}
	inbox := s.settings.system.NewRespInbox()
	sub, err := s.settings.system.SubscribeSync(inbox)
	if err != nil {
		return found, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := s.settings.system.PublishRequest("$SYS.REQ.SERVER.PING.JSZ", inbox, []byte(`{"config":true}`)); err != nil {
		return found, err
	}
	for wait := 2 * time.Second; ; wait = 100 * time.Millisecond { // others answer at about the same time
		m, err := sub.NextMsg(wait)
		if errors.Is(err, client.ErrTimeout) && found.servers > 0 {
			return found, nil
		}
		if err != nil {
			return found, err
		}
		var answer struct {
			Data struct {
				Disabled bool `json:"disabled"`
				Config   *struct {
					SyncAlways   bool          `json:"sync_always"`
					SyncInterval time.Duration `json:"sync_interval"`
				} `json:"config"`
			} `json:"data"`
			Error *struct {
				Description string `json:"description"`
			} `json:"error"`
		}
		if err := json.Unmarshal(m.Data, &answer); err != nil {
			return found, fmt.Errorf("the answer to JSZ cannot be understood: %w", err)
		}
		if answer.Error != nil {
			return found, errors.New(answer.Error.Description)
		}
		if answer.Data.Disabled || answer.Data.Config == nil {
			continue
		}
		found.servers++
		if !answer.Data.Config.SyncAlways {
			found.always = false
			found.slowest = max(found.slowest, answer.Data.Config.SyncInterval)
		}
		if ctx.Err() != nil {
			return found, ctx.Err()
		}
	}
}

// Durability says in a few words what an acknowledged append survives, as the
// servers are set up now: for people, and for reports of measurements.
func (s *Store) Durability(ctx context.Context) (string, error) {
	replicas := fmt.Sprintf("R%d", s.replicas.Load())
	found, err := s.syncing(ctx)
	switch {
	case errors.Is(err, errNoSystem):
		return "unknown: " + replicas + ", the server does not say without a system connection whether it syncs every write", nil
	case err != nil:
		return "", unavailable("ask the servers when they sync", err)
	case found.always:
		return "synced: " + replicas + ", sync always", nil
	default:
		return fmt.Sprintf("not durable on power loss: %s, synced every %s", replicas, found.slowest), nil
	}
}

// warn says once what is given up.
func (s *Store) warn(ctx context.Context) {
	const advice = `set "sync_interval: always" in the jetstream section of every server`
	found, err := s.syncing(ctx)
	switch {
	case errors.Is(err, errNoSystem):
		s.settings.logger.Warn("it is unknown whether the NATS servers sync every write to disk: by default they do so every two minutes, and lose acknowledged events when the power fails",
			"stream", s.settings.stream, "advice", advice, "check", "give a connection of the system account with nats.SystemConn")
	case err != nil:
		s.settings.logger.Warn("the NATS servers did not say whether they sync every write to disk", "stream", s.settings.stream, "error", err, "advice", advice)
	case !found.always:
		s.settings.logger.Warn("the NATS servers do not sync every write to disk: they lose acknowledged events when the power fails",
			"stream", s.settings.stream, "interval", found.slowest, "advice", advice)
	}
}
