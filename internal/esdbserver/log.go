package esdbserver

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

const (
	// deletedRevision is the revision of a tombstone, and the $tb of a stream that
	// was soft-deleted.
	deletedRevision = math.MaxInt64
	// noRevision is the last revision of a stream that is not there.
	noRevision = -1

	typeMetadata = "$metadata"
	typeDeleted  = "$streamDeleted"
	typeLink     = "$>"

	// logBegin is the position of the first record.
	logBegin = 196
	// recordOverhead is what a record takes besides its texts and bytes.
	recordOverhead = 106
	// pieceBytes is the most that goes into one event of the store.
	pieceBytes = 1_000_000
)

// logStream is where the store keeps everything.
var logStream = eventstore.Stream{Category: "esdb", ID: "log"}

// record is one event of EventStoreDB.
type record struct {
	id         uuid.UUID
	stream     string
	revision   int64
	position   uint64
	ordinal    int // its index in the log
	eventType  string
	json       bool
	data, meta []byte
	created    int64 // in 100 ns since 1970
}

func (r *record) size() uint64 {
	return uint64(recordOverhead + len(r.stream) + len(r.eventType) + len(r.data) + len(r.meta))
}

// stream is what is known of one stream.
type stream struct {
	records   []*record // by revision
	tombstone *record
	first     map[uuid.UUID]*record // the first record with an id, since the server was started
	metadata  metadata
}

// metadata is what a stream's last metadata event says of truncation.
type metadata struct {
	maxCount       int64 // 0: all
	truncateBefore int64
	maxAge         time.Duration // 0: for ever
}

func parseMetadata(data []byte) metadata {
	var fields map[string]json.RawMessage
	var m metadata
	if json.Unmarshal(data, &fields) != nil {
		return m
	}
	number := func(name string) int64 {
		var n int64
		if json.Unmarshal(fields[name], &n) != nil || n < 0 {
			return 0
		}
		return n
	}
	m.maxCount, m.truncateBefore = number("$maxCount"), number("$tb")
	if age := number("$maxAge"); age > 0 {
		m.maxAge = time.Duration(min(age, int64(math.MaxInt64/time.Second))) * time.Second
	}
	return m
}

// log is the copy in memory of what the store keeps. Its lock is held while a
// batch is being written, so readers only ever see what is in the store.
type log struct {
	store eventstore.Store
	// recent is how many of the latest records are known by their ids when an
	// append expects any revision.
	recent int
	now    func() time.Time
	// forgetful: what the log began with is not known by its ids any more.
	forgetful bool

	mu      sync.RWMutex
	records []*record
	streams map[string]*stream
	end     uint64        // the position of the next record
	changed chan struct{} // closed and replaced when the log has grown

	version uint64              // of logStream
	at      eventstore.Position // of the last event of logStream
	partial []byte
}

func newLog(store eventstore.Store, recent int, now func() time.Time) *log {
	return &log{store: store, recent: recent, now: now, streams: map[string]*stream{}, end: logBegin, forgetful: true, changed: make(chan struct{})}
}

func isMetastream(name string) bool { return strings.HasPrefix(name, "$$") }

func metastreamOf(name string) string { return "$$" + name }

func originalOf(metastream string) string { return metastream[2:] }

var nothing = &stream{}

func (l *log) stream(name string) *stream {
	if s := l.streams[name]; s != nil {
		return s
	}
	return nothing
}

// last returns the last revision of the stream: noRevision when there is none,
// deletedRevision after a tombstone.
func (l *log) last(name string) int64 {
	s := l.stream(name)
	if s.tombstone != nil {
		return deletedRevision
	}
	if isMetastream(name) && l.stream(originalOf(name)).tombstone != nil {
		return deletedRevision
	}
	return int64(len(s.records)) - 1
}

func (l *log) metadata(name string) metadata {
	if isMetastream(name) {
		return metadata{maxCount: 1}
	}
	return l.stream(name).metadata
}

func (l *log) isSoftDeleted(name string) bool {
	return l.metadata(name).truncateBefore == deletedRevision
}

// visible says from which revision on, and from which creation time on, a
// stream's events can be read.
func (l *log) visible(name string) (revision, created int64) {
	m := l.metadata(name)
	revision = m.truncateBefore
	if m.maxCount > 0 {
		revision = max(revision, int64(len(l.stream(name).records))-m.maxCount)
	}
	created = math.MinInt64
	if m.maxAge > 0 {
		created = ticks(l.now().Add(-m.maxAge))
	}
	return revision, created
}

func ticks(t time.Time) int64 { return t.Unix()*10_000_000 + int64(t.Nanosecond())/100 }

// add puts a record behind the others.
func (l *log) add(r *record) {
	s := l.streams[r.stream]
	if s == nil {
		s = &stream{first: map[uuid.UUID]*record{}}
		l.streams[r.stream] = s
	}
	r.position, r.ordinal = l.end, len(l.records)
	l.end += r.size()
	l.records = append(l.records, r)
	if r.revision == deletedRevision {
		s.tombstone = r
		return
	}
	r.revision = int64(len(s.records))
	s.records = append(s.records, r)
	if s.first[r.id] == nil && !l.forgetful {
		s.first[r.id] = r
	}
	l.refreshMetadata(r.stream)
}

// undo takes back the records from the one at the index on.
func (l *log) undo(from int) {
	for _, r := range slices.Backward(l.records[from:]) {
		s := l.streams[r.stream]
		l.end = r.position
		if r.revision == deletedRevision {
			s.tombstone = nil
			continue
		}
		s.records = s.records[:r.revision]
		if s.first[r.id] == r {
			delete(s.first, r.id)
		}
		l.refreshMetadata(r.stream)
	}
	l.records = l.records[:from]
}

func (l *log) refreshMetadata(name string) {
	if !isMetastream(name) {
		return
	}
	original := l.streams[originalOf(name)]
	if original == nil {
		original = &stream{first: map[uuid.UUID]*record{}}
		l.streams[originalOf(name)] = original
	}
	original.metadata = metadata{}
	if all := l.streams[name].records; len(all) > 0 {
		original.metadata = parseMetadata(all[len(all)-1].data)
	}
}

// find returns the index of the first record at or after the position.
func (l *log) find(position uint64) int {
	return sort.Search(len(l.records), func(i int) bool { return l.records[i].position >= position })
}

// isPosition reports whether the position can be read from: 0, that of a record,
// or one beyond the last.
func (l *log) isPosition(position uint64) bool {
	if position == 0 || position >= l.end {
		return true
	}
	i := l.find(position)
	return i < len(l.records) && l.records[i].position == position
}

// catchUp reads from the store what the log does not have yet. The lock is held.
func (l *log) catchUp(ctx context.Context) error {
	grown := false
	for r, err := range l.store.Read(ctx, eventstore.OneStream(logStream), eventstore.ReadOptions{After: l.at}) {
		if err != nil {
			return fmt.Errorf("read the log of the server from the store: %w", err)
		}
		if r.Version != l.version+1 {
			return fmt.Errorf("%w: %s has version %d after %d", eventstore.ErrGap, logStream, r.Version, l.version)
		}
		if len(r.Data) == 0 {
			return fmt.Errorf("%s, version %d: the event is empty", logStream, r.Version)
		}
		l.version, l.at = r.Version, r.Position
		l.partial = append(l.partial, r.Data[1:]...)
		if r.Data[0] == pieceMore {
			continue
		}
		records, err := decode(l.partial)
		if err != nil {
			return fmt.Errorf("%s, version %d: %w", logStream, r.Version, err)
		}
		l.partial = nil
		for _, r := range records {
			l.add(r)
		}
		grown = true
	}
	if grown {
		l.wake()
	}
	return nil
}

func (l *log) wake() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// change lets judge look at the log and add records to it, and returns when they
// are in the store. When they do not get there the log is as before.
func (l *log) change(ctx context.Context, judge func()) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		if err := l.catchUp(ctx); err != nil {
			return err
		}
		before := len(l.records)
		judge()
		if len(l.records) == before {
			return nil
		}
		commit := eventstore.Commit{
			Conditions: []eventstore.Condition{eventstore.StreamAt(logStream, eventstore.Revision{Version: l.version})},
		}
		payload := encode(l.records[before:])
		for len(payload) > 0 {
			piece := payload[:min(len(payload), pieceBytes)]
			payload = payload[len(piece):]
			flag := pieceLast
			if len(payload) > 0 {
				flag = pieceMore
			}
			commit.Events = append(commit.Events, eventstore.Event{
				Stream: logStream, Type: "esdb.written", Data: append([]byte{flag}, piece...),
				Metadata: eventstore.Metadata{Codec: "esdb"},
			})
		}
		receipt, err := l.store.Append(ctx, commit)
		if err == nil {
			l.version, l.at = receipt.Revision(logStream).Version, receipt.Last
			l.wake()
			return nil
		}
		l.undo(before)
		// Another server over the same store was faster: judge again.
		if !errors.Is(err, eventstore.ErrConflict) {
			return fmt.Errorf("write to the store: %w", err)
		}
	}
}

const (
	pieceLast byte = 0
	pieceMore byte = 1
)

const (
	flagJSON byte = 1 << iota
	flagTombstone
)

// encode writes records for the store. What follows from the order of the
// records, revisions and positions, is not written.
func encode(records []*record) []byte {
	var b []byte
	for _, r := range records {
		var flags byte
		if r.json {
			flags |= flagJSON
		}
		if r.revision == deletedRevision {
			flags |= flagTombstone
		}
		b = append(b, flags)
		b = append(b, r.id[:]...)
		b = binary.AppendVarint(b, r.created)
		for _, field := range [][]byte{[]byte(r.stream), []byte(r.eventType), r.data, r.meta} {
			b = binary.AppendUvarint(b, uint64(len(field)))
			b = append(b, field...)
		}
	}
	return b
}

var errStored = errors.New("stored records do not decode")

func decode(b []byte) ([]*record, error) {
	var records []*record
	for len(b) > 0 {
		if len(b) < 17 {
			return nil, errStored
		}
		r := &record{json: b[0]&flagJSON != 0}
		if b[0]&flagTombstone != 0 {
			r.revision = deletedRevision
		}
		copy(r.id[:], b[1:])
		var n int
		if r.created, n = binary.Varint(b[17:]); n <= 0 {
			return nil, errStored
		}
		b = b[17+n:]
		var fields [4][]byte
		for i := range fields {
			length, n := binary.Uvarint(b)
			if n <= 0 || length > uint64(len(b)-n) {
				return nil, errStored
			}
			fields[i] = b[n : n+int(length) : n+int(length)]
			b = b[n+int(length):]
		}
		r.stream, r.eventType, r.data, r.meta = string(fields[0]), string(fields[1]), fields[2], fields[3]
		records = append(records, r)
	}
	return records, nil
}
