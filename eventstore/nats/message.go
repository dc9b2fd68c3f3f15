package nats

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"
	client "github.com/nats-io/nats.go"

	"github.com/deed-go/deed/eventstore"
)

// The payload of a stored message is lines, an empty one, and the event's data as
// it is. It is part of the stored contract. The first line has the event's version,
// its time in nanoseconds since 1970, its id, and from the second event on a check
// of the id of the one before it in its stream (CRC-32, IEEE) and where those before
// it are, the last one first, with a space in between; the second one is its subject
// without the prefix, the third one its type. Further lines have a name and a value.
// The message of a condition has its place in the commit and nothing else.
//
// It is no headers because the server pays for each of them when it stores a message
// and when it answers for one, and can leave out all of them, but not some.
const (
	lineTags        = "tags"     // a JSON array
	lineMetadata    = "metadata" // JSON
	lineCommit      = "commit"   // "i/n": the i-th of the n messages of a commit of several
	lineKey         = "key"      // of the first event of a commit
	lineFingerprint = "fingerprint"
)

// Headers that the server understands.
const (
	headerExpected        = "Nats-Expected-Last-Subject-Sequence"
	headerExpectedSubject = "Nats-Expected-Last-Subject-Sequence-Subject"
	headerBatchID         = "Nats-Batch-Id"
	headerBatchSequence   = "Nats-Batch-Sequence"
	headerBatchCommit     = "Nats-Batch-Commit"
)

// message is a stored message: an event, or (without Type) a condition that a
// commit needed.
type message struct {
	eventstore.Recorded
	index, count     int // its place in its commit, from 1 on
	key, fingerprint string
	before           uint32 // the check of the event before it in its stream
	previous         trail
}

// checkOf is what an event says of the one before it in its stream. Who follows
// pointers knows by it that servers, of which one may have been restored, did not
// answer from two logs.
func checkOf(id uuid.UUID) uint32 { return crc32.ChecksumIEEE(id[:]) }

func (m *message) isEvent() bool { return m.Type != "" }

// encode makes what is sent of an event but for what depends on where it will
// be: version, pointers, expectation and batch.
func (s subjects) encode(e *eventstore.Event, to *encoded) error {
	to.subject, to.data = s.of(e.Stream), e.Data
	lines := make([]byte, 0, len(to.subject)+len(e.Type)+256)
	lines = append(strconv.AppendInt(lines, e.Time.UnixNano(), 10), ' ')
	lines = appendID(lines, e.ID)
	fixed := len(lines)
	lines = append(append(lines, to.subject[len(s.prefix)+1:]...), '\n')
	lines = append(append(lines, e.Type...), '\n')
	if len(e.Tags) > 0 {
		tags, err := json.Marshal(e.Tags)
		if err != nil {
			return fmt.Errorf("%w: event %q: its tags do not encode: %w", eventstore.ErrInvalid, e.Type, err)
		}
		lines = appendLine(lines, lineTags, string(tags))
	}
	if !e.Metadata.IsZero() {
		lines = append(lines, lineMetadata+" "...)
		var err error
		if lines, err = e.Metadata.AppendJSON(lines); err != nil {
			return fmt.Errorf("%w: event %q: its metadata does not encode: %w", eventstore.ErrInvalid, e.Type, err)
		}
		lines = append(lines, '\n')
	}
	to.fixed, to.lines = lines[:fixed:fixed], lines[fixed:]
	return nil
}

// appendID writes the id as its String does.
func appendID(to []byte, id uuid.UUID) []byte {
	to = append(hex.AppendEncode(to, id[:4]), '-')
	to = append(hex.AppendEncode(to, id[4:6]), '-')
	to = append(hex.AppendEncode(to, id[6:8]), '-')
	to = append(hex.AppendEncode(to, id[8:10]), '-')
	return hex.AppendEncode(to, id[10:])
}

func appendLine(to []byte, name, value string) []byte {
	to = append(append(to, name...), ' ')
	return append(append(to, value...), '\n')
}

// encoded is an event as a message, without what depends on its place. It is
// not changed: each message made of it has a payload of its own.
type encoded struct {
	subject string
	fixed   []byte // of the first line: time and id
	lines   []byte // the second one, and others
	data    []byte
}

// size returns about how many bytes the message has on its way.
func (e *encoded) size() int {
	return 64 + len(e.subject) + len(e.fixed) + len(e.lines) + len(e.data)
}

// placeBytes is the most that is added to an encoded event when it is sent.
const placeBytes = 1024 + 5*eventstore.MaxKeyBytes + pointers*21

// place is what depends on where an event is written.
type place struct {
	version          uint64
	before           uint32 // the check of the event before
	previous         trail
	number           int // of the message in its plan
	index, count     int // in its commit, from 1 on
	key, fingerprint string
}

// payload returns the payload of the event's message.
func (e *encoded) payload(at place) []byte {
	to := make([]byte, 0, 32+len(e.fixed)+10*len(at.previous)+len(e.lines)+len(at.key)+len(at.fingerprint)+len(e.data)+64)
	to = strconv.AppendUint(to, at.version, 10)
	to = append(to, ' ')
	to = append(to, e.fixed...)
	if at.version > 1 {
		to = hex.AppendEncode(append(to, ' '), binary.BigEndian.AppendUint32(nil, at.before))
		to = at.previous.append(to, at.number)
	}
	to = append(to, '\n')
	to = append(to, e.lines...)
	if at.count > 1 {
		to = append(to, lineCommit+" "...)
		to = append(appendIndex(to, at.index, at.count), '\n')
	}
	if at.key != "" {
		to = appendLine(to, lineKey, at.key)
		to = appendLine(to, lineFingerprint, strconv.QuoteToASCII(at.fingerprint)) // any bytes
	}
	to = append(to, '\n')
	return append(to, e.data...)
}

func appendIndex(to []byte, index, count int) []byte {
	to = append(strconv.AppendInt(to, int64(index), 10), '/')
	return strconv.AppendInt(to, int64(count), 10)
}

// errForeign says that something else than deed has written into the log.
func errForeign(sequence uint64, subject string, cause error) error {
	return fmt.Errorf("%w: the message at sequence %d, subject %q, is not an event that deed wrote: %w", eventstore.ErrDecode, sequence, subject, cause)
}

// decode reads a stored message. The subject may be empty when the server was not
// asked for it.
func (s subjects) decode(subject string, sequence uint64, payload []byte) (*message, error) {
	return s.decodeAs(nil, subject, sequence, payload)
}

// decodeAs is decode for a message that should be one of the stream: it need not
// be taken apart then how that is written.
func (s subjects) decodeAs(of *streamSubject, subject string, sequence uint64, payload []byte) (*message, error) {
	m := &message{index: 1, count: 1}
	if err := s.decodeInto(m, of, subject, sequence, payload); err != nil {
		return nil, errForeign(sequence, subject, err)
	}
	return m, nil
}

// streamSubject is a stream and how it is written in payloads.
type streamSubject struct {
	stream  eventstore.Stream
	written string
}

func (s subjects) streamSubject(of eventstore.Stream) *streamSubject {
	return &streamSubject{of, s.of(of)[len(s.prefix)+1:]}
}

func (m *message) decodeIndex(text []byte, sequence uint64) error {
	index, count, _ := bytes.Cut(text, []byte{'/'})
	var err error
	if m.index, err = strconv.Atoi(string(index)); err != nil {
		return fmt.Errorf("its place in its commit is %q: %w", text, err)
	}
	if m.count, err = strconv.Atoi(string(count)); err != nil {
		return fmt.Errorf("its place in its commit is %q: %w", text, err)
	}
	if m.index < 1 || m.index > m.count || m.count > batchMessages || uint64(m.index) > sequence {
		return fmt.Errorf("its place in its commit is %q", text)
	}
	return nil
}

func (s subjects) decodeInto(m *message, of *streamSubject, subject string, sequence uint64, payload []byte) error {
	m.Position = eventstore.Position(sequence)
	if subject == s.conditions() {
		return m.decodeIndex(payload, sequence)
	}
	end := bytes.Index(payload, []byte("\n\n"))
	if end < 0 {
		return errors.New("its payload has no empty line")
	}
	lines := payload[:end]
	m.Data = payload[end+2:]
	line := func() (next []byte) {
		next, lines, _ = bytes.Cut(lines, []byte{'\n'})
		return next
	}
	first, written, kind := line(), line(), line()
	if subject != "" && (!strings.HasPrefix(subject, s.prefix+".") || subject[len(s.prefix)+1:] != string(written)) {
		return fmt.Errorf("its payload says that its subject is %q", s.prefix+"."+string(written))
	}
	var err error
	if of != nil && string(written) == of.written {
		m.Stream = of.stream
	} else if m.Stream, err = s.stream(s.prefix + "." + string(written)); err != nil {
		return err
	}
	if err := m.decodeFirst(string(first), sequence); err != nil {
		return fmt.Errorf("its first line is %q: %w", first, err)
	}
	if m.Type = string(kind); m.Type == "" {
		return errors.New("it has no type")
	}
	for len(lines) > 0 {
		line := line()
		name, value, _ := bytes.Cut(line, []byte{' '})
		switch string(name) {
		case lineTags:
			err = jsonv1.Unmarshal(value, &m.Tags)
		case lineMetadata:
			err = jsonv1.Unmarshal(value, &m.Metadata)
		case lineCommit:
			err = m.decodeIndex(value, sequence)
		case lineKey:
			m.key = string(value)
		case lineFingerprint:
			m.fingerprint, err = strconv.Unquote(string(value))
		default:
			err = errors.New("there is no such line")
		}
		if err != nil {
			return fmt.Errorf("its line %q: %w", line, err)
		}
	}
	return nil
}

// decodeFirst reads the first line.
func (m *message) decodeFirst(line string, sequence uint64) error {
	version, rest, _ := strings.Cut(line, " ")
	nanoseconds, rest, _ := strings.Cut(rest, " ")
	id, previous, _ := strings.Cut(rest, " ")
	var err error
	if m.Version, err = strconv.ParseUint(version, 10, 64); err != nil || m.Version == 0 {
		return fmt.Errorf("the version is %q", version)
	}
	at, err := strconv.ParseInt(nanoseconds, 10, 64)
	if err != nil {
		return fmt.Errorf("the time: %w", err)
	}
	m.Time = time.Unix(0, at).UTC()
	if m.ID, err = uuid.Parse(id); err != nil {
		return fmt.Errorf("the id: %w", err)
	}
	if m.Version > 1 {
		var check string
		check, previous, _ = strings.Cut(previous, " ")
		n, err := strconv.ParseUint(check, 16, 32)
		if err != nil || len(check) != 8 {
			return fmt.Errorf("of the event before it it says %q", check)
		}
		m.before = uint32(n)
	}
	m.previous, err = parseTrail(previous, m.Version, sequence)
	return err
}

// get returns a header without looking for other spellings of its name.
func get(h client.Header, name string) string {
	if values := h[name]; len(values) > 0 {
		return values[0]
	}
	return ""
}
