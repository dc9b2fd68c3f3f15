package nats

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"
	client "github.com/nats-io/nats.go"

	"github.com/deed-go/deed/eventstore"
)

// Headers of stored messages. They are part of the stored contract. The payload
// is the event's data, behind the metadata where that is too large for a header.
//
// What every event has and what only deed reads is in one header, since client
// and server pay for each: version, time in nanoseconds since 1970, id, and where
// the events before this one of its stream are, the last one first; with a space
// in between.
const (
	headerEvent        = "Deed"
	headerType         = "Deed-Type"
	headerTags         = "Deed-Tags"          // a JSON array
	headerMetadata     = "Deed-Metadata"      // JSON
	headerMetadataSize = "Deed-Metadata-Size" // bytes of metadata before the data
	headerCommit       = "Deed-Commit"        // "i/n": the i-th of the n messages of a commit of several
	headerKey          = "Deed-Key"           // on the first event of a commit
	headerFingerprint  = "Deed-Fingerprint"   // likewise
)

// Headers that the server understands.
const (
	headerExpected        = "Nats-Expected-Last-Subject-Sequence"
	headerExpectedSubject = "Nats-Expected-Last-Subject-Sequence-Subject"
	headerBatchID         = "Nats-Batch-Id"
	headerBatchSequence   = "Nats-Batch-Sequence"
	headerBatchCommit     = "Nats-Batch-Commit"
)

// metadataInHeader is the largest metadata that travels in a header: all headers
// of a message together may have 64 KiB, and tags have up to half of that.
const metadataInHeader = 8 << 10

// message is a stored message: an event, or (without Type) a condition that a
// commit needed.
type message struct {
	eventstore.Recorded
	index, count     int // its place in its commit, from 1 on
	key, fingerprint string
	previous         trail
}

func (m *message) isEvent() bool { return m.Type != "" }

// quote makes any legal name a header's value: parsers trim the space around it.
func quote(text string) string {
	if text != "" && (text[0] == ' ' || text[0] == '"' || text[len(text)-1] == ' ') {
		return strconv.Quote(text)
	}
	return text
}

func unquote(value string) (string, error) {
	if value != "" && value[0] == '"' {
		return strconv.Unquote(value)
	}
	return value, nil
}

// encode returns what is sent of an event but for what depends on where it will
// be: version, pointers, expectation and batch.
func (s subjects) encode(e *eventstore.Event) (*encoded, error) {
	to := &encoded{subject: s.of(e.Stream), data: e.Data, names: make([]string, 0, 3), values: make([]string, 0, 3)}
	to.fixed = strconv.FormatInt(e.Time.UnixNano(), 10) + " " + e.ID.String()
	to.set(headerType, quote(e.Type))
	if len(e.Tags) > 0 {
		tags, err := json.Marshal(e.Tags)
		if err != nil {
			return nil, fmt.Errorf("%w: event %q: its tags do not encode: %w", eventstore.ErrInvalid, e.Type, err)
		}
		to.set(headerTags, string(tags))
	}
	if !e.Metadata.IsZero() {
		metadata, err := e.Metadata.AppendJSON(nil)
		if err != nil {
			return nil, fmt.Errorf("%w: event %q: its metadata does not encode: %w", eventstore.ErrInvalid, e.Type, err)
		}
		if len(metadata) <= metadataInHeader {
			to.set(headerMetadata, string(metadata))
		} else {
			to.set(headerMetadataSize, strconv.Itoa(len(metadata)))
			to.data = append(metadata, to.data...)
		}
	}
	return to, nil
}

// encoded is an event as a message, without what depends on its place. It is
// not changed: each message made of it has a header of its own.
type encoded struct {
	subject       string
	fixed         string   // of the event's header: time and id
	names, values []string // of the other headers
	data          []byte
}

func (e *encoded) set(name, value string) {
	e.names, e.values = append(e.names, name), append(e.values, value)
}

// message returns a message to which so many headers will be added.
func (e *encoded) message(more int) *client.Msg {
	h := make(client.Header, len(e.names)+more)
	for i, name := range e.names {
		h[name] = e.values[i : i+1 : i+1]
	}
	return &client.Msg{Subject: e.subject, Header: h, Data: e.data}
}

// size returns about how many bytes the message has on its way.
func (e *encoded) size() int {
	n := 64 + len(e.subject) + len(e.fixed) + len(e.data)
	for i := range e.names {
		n += len(e.names[i]) + len(e.values[i]) + 4
	}
	return n
}

// placeHeaders is the most that is added to an encoded event when it is sent.
const placeHeaders = 1024 + 2*eventstore.MaxKeyBytes + pointers*21

// eventHeader writes what every event has, of the message with the number in its
// plan.
func (e *encoded) eventHeader(version uint64, previous trail, number int) string {
	to := make([]byte, 0, 24+len(e.fixed)+10*len(previous))
	to = strconv.AppendUint(to, version, 10)
	to = append(to, ' ')
	to = append(to, e.fixed...)
	return string(previous.append(to, number))
}

// errForeign says that something else than deed has written into the log.
func errForeign(sequence uint64, subject string, cause error) error {
	return fmt.Errorf("%w: the message at sequence %d, subject %q, is not an event that deed wrote: %w", eventstore.ErrDecode, sequence, subject, cause)
}

// decode reads a stored message.
func (s subjects) decode(subject string, sequence uint64, h client.Header, data []byte) (*message, error) {
	m := &message{index: 1, count: 1}
	if err := s.decodeInto(m, subject, sequence, h, data); err != nil {
		return nil, errForeign(sequence, subject, err)
	}
	return m, nil
}

func (s subjects) decodeInto(m *message, subject string, sequence uint64, h client.Header, data []byte) error {
	m.Position = eventstore.Position(sequence)
	if place := get(h, headerCommit); place != "" {
		index, count, _ := strings.Cut(place, "/")
		var err error
		if m.index, err = strconv.Atoi(index); err != nil {
			return err
		}
		if m.count, err = strconv.Atoi(count); err != nil {
			return err
		}
		if m.index < 1 || m.index > m.count || uint64(m.index) > sequence {
			return fmt.Errorf("header %s is %q", headerCommit, place)
		}
	}
	if subject == s.conditions() {
		return nil
	}
	var err error
	if m.Stream, err = s.stream(subject); err != nil {
		return err
	}
	version, rest, _ := strings.Cut(get(h, headerEvent), " ")
	nanoseconds, rest, _ := strings.Cut(rest, " ")
	id, previous, _ := strings.Cut(rest, " ")
	if m.Version, err = strconv.ParseUint(version, 10, 64); err != nil || m.Version == 0 {
		return fmt.Errorf("header %s is %q: the version is %q", headerEvent, get(h, headerEvent), version)
	}
	at, err := strconv.ParseInt(nanoseconds, 10, 64)
	if err != nil {
		return fmt.Errorf("header %s is %q: the time: %w", headerEvent, get(h, headerEvent), err)
	}
	m.Time = time.Unix(0, at).UTC()
	if m.ID, err = uuid.Parse(id); err != nil {
		return fmt.Errorf("header %s is %q: the id: %w", headerEvent, get(h, headerEvent), err)
	}
	if m.Type, err = unquote(get(h, headerType)); err != nil || m.Type == "" {
		return fmt.Errorf("header %s is %q", headerType, get(h, headerType))
	}
	if tags := get(h, headerTags); tags != "" {
		if err := jsonv1.Unmarshal([]byte(tags), &m.Tags); err != nil {
			return fmt.Errorf("header %s: %w", headerTags, err)
		}
	}
	metadata := get(h, headerMetadata)
	if n := get(h, headerMetadataSize); n != "" {
		size, err := strconv.Atoi(n)
		if err != nil || size < 0 || size > len(data) {
			return fmt.Errorf("header %s is %q, the message has %d bytes", headerMetadataSize, n, len(data))
		}
		metadata, data = string(data[:size]), data[size:]
	}
	if metadata != "" {
		if err := jsonv1.Unmarshal([]byte(metadata), &m.Metadata); err != nil {
			return fmt.Errorf("header %s: %w", headerMetadata, err)
		}
	}
	m.Data = data
	if m.key, err = unquote(get(h, headerKey)); err != nil {
		return fmt.Errorf("header %s: %w", headerKey, err)
	}
	if m.fingerprint, err = unquote(get(h, headerFingerprint)); err != nil {
		return fmt.Errorf("header %s: %w", headerFingerprint, err)
	}
	if m.previous, err = parseTrail(previous, m.Version, sequence); err != nil {
		return fmt.Errorf("header %s: %w", headerEvent, err)
	}
	return nil
}

// get returns a header without looking for other spellings of its name.
func get(h client.Header, name string) string {
	if values := h[name]; len(values) > 0 {
		return values[0]
	}
	return ""
}
