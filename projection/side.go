package projection

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
	"slices"
	"sort"
	"strings"
	"time"
)

// side is a state for the rows of one fold, which nobody else sees. It forgets
// when it is closed, and takes back nothing.
//
// What does not fit into memory goes to files without a name, as sorted runs: of
// a row the newest run knows best. Whenever mergeRuns of one size have come
// together they become one, so that a row is written few times and looked for in
// few places.
type side struct {
	most   int // bytes to keep in memory; 0 is without bound
	bytes  int
	recent map[string]sideRow // by sideKey
	runs   []*sideRun         // the oldest first
}

// sideRow is a row, or that there is none any more.
type sideRow struct {
	value []byte
	gone  bool
}

// sideRun is a file of rows in the order of their keys.
type sideRun struct {
	file   *os.File
	name   string // where the file could not be unlinked while it is open
	level  int    // how often it was merged
	blocks []sideBlock
	end    int64
}

// sideBlock is where some rows are that follow one another.
type sideBlock struct {
	first string
	at    int64
}

const (
	mergeRuns = 4
	// blockBytes is about how much is read to find a row.
	blockBytes = 4 << 10
)

func newSide(most int) *side { return &side{most: most, recent: map[string]sideRow{}} }

// sideKey is the key of a row among those of all tables, whose names have no zero byte.
func sideKey(table, key string) string { return table + "\x00" + key }

// close removes what is stored.
func (s *side) close() {
	for _, r := range s.runs {
		r.close()
	}
	s.recent, s.runs, s.bytes = nil, nil, 0
}

func (r *sideRun) close() {
	_ = r.file.Close()
	if r.name != "" {
		_ = os.Remove(r.name)
	}
}

func (s *side) get(table, key string) ([]byte, bool, error) {
	k := sideKey(table, key)
	row, ok := s.recent[k]
	for i := len(s.runs) - 1; i >= 0 && !ok; i-- {
		var err error
		if row, ok, err = s.runs[i].get(k); err != nil {
			return nil, false, err
		}
	}
	return row.value, ok && !row.gone, nil
}

func (s *side) set(table, key string, row sideRow) error {
	k := sideKey(table, key)
	if was, ok := s.recent[k]; ok {
		s.bytes -= len(was.value)
	} else {
		s.bytes += len(k) + rowOverhead
	}
	if row.gone && len(s.runs) == 0 {
		s.bytes -= len(k) + rowOverhead
		delete(s.recent, k)
		return nil
	}
	s.recent[k] = row
	if s.bytes += len(row.value); s.most > 0 && s.bytes > s.most {
		return s.spill()
	}
	return nil
}

// spill writes what is in memory to a run, and merges runs.
func (s *side) spill() error {
	run, err := writeRun(0, func(yield func(string, sideRow) bool) {
		for _, k := range slices.Sorted(maps.Keys(s.recent)) {
			if !yield(k, s.recent[k]) {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	s.runs, s.recent, s.bytes = append(s.runs, run), map[string]sideRow{}, 0
	for len(s.runs) >= mergeRuns {
		from := len(s.runs) - mergeRuns
		merging := s.runs[from:]
		level := merging[mergeRuns-1].level
		if merging[0].level != level {
			break
		}
		sources := make([]iter.Seq2[string, sideEntry], 0, mergeRuns)
		for _, r := range merging {
			sources = append(sources, r.from(""))
		}
		var failed error
		merged, err := writeRun(level+1, func(yield func(string, sideRow) bool) {
			for k, e := range mergeSides(sources) {
				if failed = e.err; failed != nil {
					return
				}
				if e.gone && from == 0 {
					continue // there is nothing older that it hides
				}
				if !yield(k, e.sideRow) {
					return
				}
			}
		})
		if err != nil {
			return err
		}
		if failed != nil {
			merged.close()
			return failed
		}
		for _, r := range merging {
			r.close()
		}
		s.runs = append(slices.Clone(s.runs[:from]), merged)
	}
	return nil
}

// errSpill says where it was that rows could not be kept.
func errSpill(err error) error {
	return fmt.Errorf("keep rows that do not fit into memory in a temporary file in %q (see TMPDIR): %w", os.TempDir(), err)
}

func writeRun(level int, rows iter.Seq2[string, sideRow]) (*sideRun, error) {
	file, err := os.CreateTemp("", "deed-side-*")
	if err != nil {
		return nil, errSpill(err)
	}
	r := &sideRun{file: file, level: level}
	// Without a name it is gone with the process, however that ends.
	if err := os.Remove(file.Name()); err != nil {
		r.name = file.Name()
	}
	out := bufio.NewWriterSize(file, 64<<10)
	var head []byte
	for k, row := range rows {
		if n := len(r.blocks); n == 0 || r.end-r.blocks[n-1].at >= blockBytes {
			r.blocks = append(r.blocks, sideBlock{strings.Clone(k), r.end})
		}
		size := uint64(len(row.value)) << 1
		if row.gone {
			size = 1
		}
		head = binary.AppendUvarint(head[:0], uint64(len(k)))
		head = binary.AppendUvarint(head, size)
		for _, part := range [][]byte{head, []byte(k), row.value} {
			n, err := out.Write(part)
			if r.end += int64(n); err != nil {
				r.close()
				return nil, errSpill(err)
			}
		}
	}
	if err := out.Flush(); err != nil {
		r.close()
		return nil, errSpill(err)
	}
	return r, nil
}

// sideEntry is a row of a run, or why it cannot be read.
type sideEntry struct {
	sideRow
	err error
}

// block is the number of the block in which the key would be.
func (r *sideRun) block(k string) int {
	return max(0, sort.Search(len(r.blocks), func(i int) bool { return r.blocks[i].first > k })-1)
}

func (r *sideRun) get(k string) (sideRow, bool, error) {
	i := r.block(k)
	if i >= len(r.blocks) || k < r.blocks[i].first {
		return sideRow{}, false, nil
	}
	end := r.end
	if i+1 < len(r.blocks) {
		end = r.blocks[i+1].at
	}
	data := make([]byte, end-r.blocks[i].at)
	if _, err := r.file.ReadAt(data, r.blocks[i].at); err != nil {
		return sideRow{}, false, errSpill(err)
	}
	for at := bytes.NewReader(data); at.Len() > 0; {
		key, row, err := readSide(at)
		if err != nil {
			return sideRow{}, false, errSpill(err)
		}
		if key == k {
			return row, true, nil
		}
		if key > k {
			break
		}
	}
	return sideRow{}, false, nil
}

// from yields the rows from the key on.
func (r *sideRun) from(k string) iter.Seq2[string, sideEntry] {
	return func(yield func(string, sideEntry) bool) {
		if len(r.blocks) == 0 {
			return
		}
		at := r.blocks[r.block(k)].at
		in := bufio.NewReaderSize(io.NewSectionReader(r.file, at, r.end-at), 64<<10)
		for {
			key, row, err := readSide(in)
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				yield("", sideEntry{err: errSpill(err)})
				return
			}
			if key >= k && !yield(key, sideEntry{sideRow: row}) {
				return
			}
		}
	}
}

// readSide reads one row; io.EOF says that there is none.
func readSide(in interface {
	io.Reader
	io.ByteReader
},
) (string, sideRow, error) {
	keyBytes, err := binary.ReadUvarint(in)
	if err != nil {
		return "", sideRow{}, err
	}
	size, err := binary.ReadUvarint(in)
	if err != nil {
		return "", sideRow{}, whole(err)
	}
	data := make([]byte, keyBytes+size>>1)
	if _, err := io.ReadFull(in, data); err != nil {
		return "", sideRow{}, whole(err)
	}
	return string(data[:keyBytes]), sideRow{value: data[keyBytes:], gone: size&1 == 1}, nil
}

// whole is err, where the end is not where it should be.
func whole(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// mergeSides yields the rows of all sources in the order of their keys; of those
// with one key that of the last source. An error ends it.
func mergeSides(sources []iter.Seq2[string, sideEntry]) iter.Seq2[string, sideEntry] {
	type head struct {
		key   string
		entry sideEntry
		more  bool
		next  func() (string, sideEntry, bool)
	}
	return func(yield func(string, sideEntry) bool) {
		heads := make([]head, len(sources))
		for i, source := range sources {
			next, stop := iter.Pull2(source)
			defer stop()
			heads[i].next = next
			heads[i].key, heads[i].entry, heads[i].more = next()
		}
		for {
			newest := -1
			for i := range heads {
				h := &heads[i]
				if !h.more {
					continue
				}
				if h.entry.err != nil {
					yield("", h.entry)
					return
				}
				if newest < 0 || h.key <= heads[newest].key {
					newest = i
				}
			}
			if newest < 0 {
				return
			}
			key, entry := heads[newest].key, heads[newest].entry
			for i := range heads {
				if h := &heads[i]; h.more && h.key == key {
					h.key, h.entry, h.more = h.next()
				}
			}
			if !yield(key, entry) {
				return
			}
		}
	}
}

// scan yields the rows of a table in the order of their keys.
func (s *side) scan(table string) iter.Seq2[Row, error] {
	begin := sideKey(table, "")
	return func(yield func(Row, error) bool) {
		sources := make([]iter.Seq2[string, sideEntry], 0, len(s.runs)+1)
		for _, r := range s.runs {
			sources = append(sources, r.from(begin))
		}
		var recent []string
		for k := range s.recent {
			if strings.HasPrefix(k, begin) {
				recent = append(recent, k)
			}
		}
		slices.Sort(recent)
		sources = append(sources, func(yield func(string, sideEntry) bool) {
			for _, k := range recent {
				if !yield(k, sideEntry{sideRow: s.recent[k]}) {
					return
				}
			}
		})
		for k, e := range mergeSides(sources) {
			if e.err != nil {
				yield(Row{}, e.err)
				return
			}
			key, ours := strings.CutPrefix(k, begin)
			if !ours {
				return
			}
			if !e.gone && !yield(Row{key, e.value}, nil) {
				return
			}
		}
	}
}

// beside gives the rows of a table of the state, and those of the same table on
// the side, to each, in the order of their keys; nil is where there is none.
func (s *side) beside(tx StateTx, table string, each func(stored, should *Row) error) error {
	next, stop := iter.Pull2(s.scan(table))
	defer stop()
	should, failed, more := next()
	for stored, err := range tx.Scan(table, Range{}) {
		if err != nil {
			return err
		}
		for more && failed == nil && should.Key < stored.Key {
			if err := each(nil, &should); err != nil {
				return err
			}
			should, failed, more = next()
		}
		if failed != nil {
			return failed
		}
		if !more || should.Key != stored.Key {
			if err := each(&stored, nil); err != nil {
				return err
			}
			continue
		}
		if err := each(&stored, &should); err != nil {
			return err
		}
		should, failed, more = next()
	}
	for ; more; should, failed, more = next() {
		if failed != nil {
			return failed
		}
		if err := each(nil, &should); err != nil {
			return err
		}
	}
	return nil
}

func (s *side) Update(_ context.Context, fn func(StateTx) error) error { return fn(sideTx{s}) }
func (s *side) View(_ context.Context, fn func(StateTx) error) error   { return fn(sideTx{s}) }

func (s *side) Acquire(context.Context, string, string, time.Duration) (Lease, error) {
	return Lease{}, errOnTheSide
}

func (s *side) Renew(context.Context, Lease, time.Duration) (Lease, error) {
	return Lease{}, errOnTheSide
}
func (s *side) Release(context.Context, Lease) error { return errOnTheSide }

var errOnTheSide = fmt.Errorf("a fold on the side: %w", errors.ErrUnsupported)

type sideTx struct{ s *side }

func (sideTx) Exec(context.Context, string, ...any) (int64, error) { return 0, errOnTheSide }
func (sideTx) Query(context.Context, string, ...any) (Rows, error) { return nil, errOnTheSide }
func (sideTx) Checkpoint(string) (Checkpoint, error)               { return Checkpoint{}, errOnTheSide }
func (sideTx) SetCheckpoint(Lease, Checkpoint, Checkpoint) error   { return errOnTheSide }
func (sideTx) Fence(Lease) error                                   { return errOnTheSide }
func (sideTx) DeleteCheckpoint(Lease) error                        { return errOnTheSide }
func (sideTx) Clear(string) error                                  { return errOnTheSide }

func (t sideTx) Get(table, key string) ([]byte, bool, error) { return t.s.get(table, key) }

func (t sideTx) Put(table, key string, value []byte) error {
	return t.s.set(table, key, sideRow{value: value})
}

func (t sideTx) Delete(table, key string) error { return t.s.set(table, key, sideRow{gone: true}) }

func (t sideTx) Scan(table string, _ Range) iter.Seq2[Row, error] { return t.s.scan(table) }
