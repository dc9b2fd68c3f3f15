package saga

import (
	"bytes"
	"container/heap"
	"context"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// The stored index of a saga: the rows of its open runs by id, and three tables
// made of those rows, written in the same transaction, by which the owner finds
// the runs that have left memory: when their time comes, when the event comes
// that they wait for, and, after a takeover, when they were not at rest.
//
// What is in memory overrides what is stored. A row leaves memory only when it
// is stored as it is, and none leaves while rows are being loaded: so what a
// load finds is either in memory or as it was when the load began.

// The tables of the index, for a saga's category.
func openTable(category string) string     { return category + ".open" }
func doneTable(category string) string     { return category + ".done" }
func dueTable(category string) string      { return category + ".due" }
func watchTable(category string) string    { return category + ".watch" }
func restlessTable(category string) string { return category + ".restless" }

// indexMark is the key under which the three tables say that they are whole. In
// the table of due times its value names the checkpoint that they belong to: an
// earlier program, which does not know them, moves the checkpoint without them.
const indexMark = "\x00format"

func markOf(at projection.Checkpoint) []byte {
	return fmt.Appendf(nil, "1 %d %d", at.Epoch, at.Position)
}

func mark(tx projection.StateTx, category string, at projection.Checkpoint) error {
	return tx.Put(dueTable(category), indexMark, markOf(at))
}

// intact reports whether the three tables fit the table of open runs, as of the
// checkpoint.
func intact(tx projection.StateTx, category string, at projection.Checkpoint) (bool, error) {
	for _, table := range []string{watchTable(category), restlessTable(category), dueTable(category)} {
		value, ok, err := tx.Get(table, indexMark)
		if err != nil || !ok {
			return false, err
		}
		if table == dueTable(category) {
			return bytes.Equal(value, markOf(at)), nil
		}
	}
	return false, nil
}

// dueKey orders by time, then by id.
func dueKey(at time.Time, id string) string {
	var key [12]byte
	binary.BigEndian.PutUint64(key[:], uint64(at.Unix())^1<<63)
	binary.BigEndian.PutUint32(key[8:], uint32(at.Nanosecond()))
	return string(key[:]) + id
}

func parseDueKey(key string) (time.Time, string, error) {
	if len(key) < 13 {
		return time.Time{}, "", fmt.Errorf("%w: due time %q", errIndex, key)
	}
	seconds := binary.BigEndian.Uint64([]byte(key[:8])) ^ 1<<63
	return time.Unix(int64(seconds), int64(binary.BigEndian.Uint32([]byte(key[8:12])))).UTC(), key[12:], nil
}

// firstDue is before every due time, and behind the mark.
const firstDue = "\x00\xff"

// Entries of the three tables are told apart by their first byte.
const (
	entryDue      = 'd'
	entryWatch    = 'w'
	entryRestless = 'r'
)

// In the table of restless runs, what a takeover has to look at comes in two
// kinds: blocked ones, which the code may fit by now, and those that can go on.
const (
	restlessBlocked = "b"
	restlessGoing   = "g"
)

// indexed returns the entries of the row in the three tables.
func (r *row) indexed() []string {
	if r.done() {
		return nil
	}
	var entries []string
	if r.Status == StatusWaiting && !r.Wake.IsZero() {
		entries = append(entries, string(entryDue)+dueKey(r.Wake, r.ID))
	}
	for i := range r.Waits {
		if watch := r.Waits[i].Watch; watch != nil {
			for _, t := range watch.Types {
				entries = append(entries, string(entryWatch)+watchKey(t, &watch.Match)+"\x00"+r.ID)
			}
		}
	}
	switch {
	case r.Status == StatusBlocked && r.Cause != causeCompensation:
		entries = append(entries, string(entryRestless)+restlessBlocked+r.ID)
	case r.restless():
		entries = append(entries, string(entryRestless)+restlessGoing+r.ID)
	}
	if len(entries) > 1 {
		slices.Sort(entries)
		entries = slices.Compact(entries)
	}
	return entries
}

// restless reports whether, going by what is stored, the run can go on now.
func (r *row) restless() bool {
	switch r.Status {
	case StatusBlocked:
		return false
	case StatusWaiting:
		return r.offered() || r.unscanned() || r.called() || r.Branched && r.Version != r.Parked
	}
	return !r.done()
}

// entryTable returns the table of an entry, and its key.
func entryTable(category, entry string) (string, string) {
	switch entry[0] {
	case entryDue:
		return dueTable(category), entry[1:]
	case entryWatch:
		return watchTable(category), entry[1:]
	}
	return restlessTable(category), entry[1:]
}

// idleSaga reports whether the stored index has no run that can go on.
func idleSaga(tx projection.StateTx, b *blueprint, now time.Time) (bool, error) {
	c := b.index()
	at, err := tx.Checkpoint(b.unit())
	if err != nil {
		return false, err
	}
	whole, err := intact(tx, c, at)
	if err != nil {
		return false, err
	}
	if !whole { // an earlier program is the owner
		for entry, err := range tx.Scan(openTable(c), projection.Range{}) {
			if err != nil {
				return false, err
			}
			r, err := decodeRow(entry)
			if err != nil || r.restless() || r.Status == StatusWaiting && !r.Wake.IsZero() && !r.Wake.After(now) {
				return false, err
			}
		}
		return true, nil
	}
	for _, err := range tx.Scan(restlessTable(c), projection.Range{Prefix: restlessGoing, Limit: 1}) {
		return false, err
	}
	for entry, err := range tx.Scan(dueTable(c), projection.Range{After: firstDue, Limit: 1}) {
		if err != nil {
			return false, err
		}
		due, _, err := parseDueKey(entry.Key)
		return err == nil && due.After(now), err
	}
	return true, nil
}

// getAll reads the rows that are there of several keys, where the backend can
// in one round trip.
func getAll(tx projection.StateTx, table string, keys []string, found func(i int, value []byte)) error {
	if t, ok := tx.(interface {
		GetAll(table string, keys []string, found func(i int, value []byte)) error
	}); ok {
		return t.GetAll(table, keys, found)
	}
	for i, key := range keys {
		value, ok, err := tx.Get(table, key)
		if err != nil {
			return err
		}
		if ok {
			found(i, value)
		}
	}
	return nil
}

// openRows reads the rows of open runs that are stored of several.
func openRows(tx projection.StateTx, category string, ids []string) ([]*row, error) {
	var rows []*row
	var failure error
	err := getAll(tx, openTable(category), ids, func(i int, value []byte) {
		r, err := decodeRow(projection.Row{Key: ids[i], Value: value})
		if err != nil {
			failure = err
			return
		}
		rows = append(rows, r)
	})
	if err == nil {
		err = failure
	}
	return rows, err
}

// sieve tells for sure that a key was never added. It costs nothing before the
// first one is.
type sieve struct {
	seed maphash.Seed
	bits []uint64
}

const sieveBits = 1 << 23 // with a million keys one in twenty others passes

func (s *sieve) add(key string) {
	if s.bits == nil {
		s.seed, s.bits = maphash.MakeSeed(), make([]uint64, sieveBits/64)
	}
	h := maphash.String(s.seed, key)
	for _, bit := range [...]uint64{h % sieveBits, h >> 32 % sieveBits} {
		s.bits[bit/64] |= 1 << (bit % 64)
	}
}

func (s *sieve) mayHave(key string) bool {
	if s.bits == nil {
		return false
	}
	h := maphash.String(s.seed, key)
	for _, bit := range [...]uint64{h % sieveBits, h >> 32 % sieveBits} {
		if s.bits[bit/64]&(1<<(bit%64)) == 0 {
			return false
		}
	}
	return true
}

// dueHeap has the rows in memory that something is due for.
type dueHeap []*row

func (h dueHeap) Len() int { return len(h) }
func (h dueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].slot, h[j].slot = i+1, j+1
}

func (h dueHeap) Less(i, j int) bool {
	if c := h[i].due.Compare(h[j].due); c != 0 {
		return c < 0
	}
	return h[i].ID < h[j].ID
}

func (h *dueHeap) Push(x any) {
	r := x.(*row) //nolint:forcetypeassert,errcheck // only this file pushes
	*h = append(*h, r)
	r.slot = len(*h)
}

func (h *dueHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	last.slot = 0
	return last
}

// schedule makes the run go on at the time.
func (w *sagaWorker) schedule(r *row, at time.Time) {
	r.due = at
	if r.slot > 0 {
		heap.Fix(&w.dues, r.slot-1)
	} else {
		heap.Push(&w.dues, r)
	}
	if w.dues[0] == r {
		poke(w.rearm)
	}
}

func (w *sagaWorker) unschedule(r *row) {
	if r.slot > 0 {
		heap.Remove(&w.dues, r.slot-1)
	}
}

// How far ahead rows of runs that wait for a time are in memory: so long, and
// so many of them.
const (
	lookAhead     = time.Minute
	mostAhead     = 10_000
	mostLoaded    = 2000             // at once
	mostUnstored  = 8 * flushEvery   // then following the log waits for the flush
	unstoredLimit = mostUnstored / 2 // then no more rows are loaded
)

// load implements behaviour.
func (w *sagaWorker) load(tx projection.StateTx, at projection.Checkpoint) (bool, error) {
	w.mu.Lock()
	clear(w.rows)
	clear(w.watches)
	w.mu.Unlock()
	whole, err := intact(tx, w.index, at)
	if err != nil || !whole {
		return false, err
	}
	for entry, err := range tx.Scan(watchTable(w.index), projection.Range{After: indexMark}) {
		if err != nil {
			return false, err
		}
		if end := strings.LastIndexByte(entry.Key, 0); end > 0 {
			w.asleep.add(entry.Key[:end])
			eventType, _, _ := strings.Cut(entry.Key, "\x00")
			w.follows(eventType)
		}
	}
	return true, nil
}

// reset implements behaviour.
func (w *sagaWorker) reset(tx projection.StateTx, at projection.Checkpoint) error {
	for _, table := range []string{openTable(w.index), dueTable(w.index), watchTable(w.index), restlessTable(w.index)} {
		if err := tx.Clear(table); err != nil {
			return err
		}
	}
	return w.markWhole(tx, at)
}

func (w *sagaWorker) markWhole(tx projection.StateTx, at projection.Checkpoint) error {
	for _, table := range []string{watchTable(w.index), restlessTable(w.index)} {
		if err := tx.Put(table, indexMark, []byte("1")); err != nil {
			return err
		}
	}
	return mark(tx, w.index, at)
}

// repair implements behaviour: it makes the three tables again from the rows,
// when they are lost, or an earlier program has written the rows.
func (w *sagaWorker) repair(ctx context.Context, lease projection.Lease, at projection.Checkpoint) error {
	began := time.Now()
	w.logger.Info("the index of due times is made again from the open runs", "worker", w.name)
	err := w.state.Update(ctx, func(tx projection.StateTx) error {
		if err := tx.Fence(lease); err != nil {
			return err
		}
		for _, table := range []string{dueTable(w.index), watchTable(w.index), restlessTable(w.index)} {
			if err := tx.Clear(table); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	total := 0
	for after := ""; ; {
		n := 0
		err := w.state.Update(ctx, func(tx projection.StateTx) error {
			if err := tx.Fence(lease); err != nil {
				return err
			}
			var entries []string
			for entry, err := range tx.Scan(openTable(w.index), projection.Range{After: after, Limit: mostLoaded}) {
				if err != nil {
					return err
				}
				r, err := decodeRow(entry)
				if err != nil {
					return err
				}
				entries = append(entries, r.indexed()...)
				after = entry.Key
				n++
			}
			for _, entry := range entries {
				table, key := entryTable(w.index, entry)
				if err := tx.Put(table, key, nil); err != nil {
					return err
				}
			}
			if n < mostLoaded {
				return w.markWhole(tx, at)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if total += n; n < mostLoaded {
			w.logger.Info("the index of due times was made again", "worker", w.name, "runs", total, "took", time.Since(began))
			return nil
		}
	}
}

// loading begins to load rows: until the function that it returns is called,
// with the lock held, none leaves memory.
func (w *sagaWorker) loading(ctx context.Context) (func(), error) {
	select {
	case w.loads <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	w.mu.Lock()
	w.pinned = true
	w.mu.Unlock()
	return func() {
		w.pinned = false
		for i, r := range w.leaving {
			w.leaving[i] = nil
			w.release(r)
		}
		w.leaving = w.leaving[:0]
		<-w.loads
	}, nil
}

// started is what a trigger event starts.
type started struct {
	id  string
	err error
}

// prepare implements behaviour: it loads the rows that the events are for.
func (w *sagaWorker) prepare(ctx context.Context, events []eventstore.Recorded) (func(), error) {
	clear(w.triggers)
	for i := range events {
		e := &events[i]
		if e.Stream.Category == w.category {
			continue
		}
		if t, ok := w.starts[w.env.encoding.CurrentType(e.Type)]; ok && !w.saga.draining {
			id, _, err := t.start(w.env.encoding, *e)
			if err == nil && id != "" {
				if err = w.saga.stream(id).Validate(); err != nil {
					err = fmt.Errorf("the id that the saga's start made of it: %w", err)
				}
			}
			w.triggers[e.Position] = started{id, err}
		}
	}
	finish, err := w.loading(ctx)
	if err != nil {
		return nil, err
	}
	var ids, reopened, prefixes []string
	asked := map[string]bool{}
	ask := func(id string) {
		if w.rows[id] == nil && !asked[id] {
			asked[id] = true
			ids = append(ids, id)
		}
	}
	w.mu.Lock()
	for i := range events {
		e := &events[i]
		if e.Stream.Category == w.category {
			ask(e.Stream.ID)
			if e.Type == typeRestarted && w.rows[e.Stream.ID] == nil {
				reopened = append(reopened, e.Stream.ID)
			}
		}
		if w.watched[e.Type] {
			for _, key := range watchKeys(e) {
				if prefix := key + "\x00"; w.asleep.mayHave(key) && !asked[prefix] {
					asked[prefix] = true
					prefixes = append(prefixes, prefix)
				}
			}
		}
		if s := w.triggers[e.Position]; s.err == nil && s.id != "" {
			ask(s.id)
		}
	}
	w.mu.Unlock()
	var rows []*row
	var ended []Info
	if len(ids) > 0 || len(prefixes) > 0 {
		err = w.view(ctx, func(tx projection.StateTx) error {
			wanted, known := slices.Clone(ids), maps.Clone(asked) // of this attempt: it may have to be repeated
			for _, prefix := range prefixes {
				for entry, err := range tx.Scan(watchTable(w.index), projection.Range{Prefix: prefix}) {
					if err != nil {
						return err
					}
					if id := entry.Key[len(prefix):]; !known[id] {
						known[id] = true
						wanted = append(wanted, id)
					}
				}
			}
			var err error
			if rows, err = openRows(tx, w.index, wanted); err != nil {
				return err
			}
			ended = ended[:0]
			return getAll(tx, doneTable(w.index), reopened, func(_ int, value []byte) {
				var info Info
				if jsonv1.Unmarshal(value, &info) == nil {
					ended = append(ended, info)
				}
			})
		})
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		finish()
		return nil, err
	}
	for _, r := range rows {
		w.admit(r)
	}
	clear(w.ended)
	for i := range ended {
		w.ended[ended[i].ID] = &ended[i]
	}
	return finish, nil
}

// view reads the state, as often as it takes.
func (w *sagaWorker) view(ctx context.Context, read func(tx projection.StateTx) error) error {
	for n := 0; ; n++ {
		err := w.state.View(ctx, read)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if lasting(err) {
			return fmt.Errorf("%s: read the index: %w", w.name, err)
		}
		w.logger.Warn("the index could not be read; it is tried again", "worker", w.name, "error", err)
		pause(ctx, backoff(n))
	}
}

// admit takes a row that was loaded into memory, unless there is one, which is
// newer. It is looked at when the events of the batch have been routed.
func (w *sagaWorker) admit(r *row) *row {
	if there := w.rows[r.ID]; there != nil {
		return there
	}
	r.stored, r.entries, r.firm = true, r.indexed(), true
	w.rows[r.ID] = r
	w.watch(r)
	if w.later && r.Wake.Equal(w.laterAt) {
		w.unsure = true // whose time is the next one then must be looked up
		poke(w.hungry)
	}
	w.glance(r)
	return r
}

// glance has the row looked at as if it were touched.
func (w *sagaWorker) glance(r *row) {
	if !r.touched {
		r.touched = true
		w.touched = append(w.touched, r)
	}
}

// release lets the row leave memory if it is stored as it is, and not needed
// soon.
func (w *sagaWorker) release(r *row) {
	if w.rows[r.ID] != r || r.active || r.dirty || r.flushing || r.touched || r.Version < r.written ||
		r.queued > 0 || len(r.granted) > 0 || r.nudged || !r.limited.IsZero() || r.history != nil || !r.stored && !r.done() {
		return
	}
	if w.caught && !r.done() {
		if r.restless() && !(r.Status == StatusWaiting && r.spent == r.Version && !r.offered() && !r.unscanned()) {
			return
		}
		if r.slot > 0 {
			if now := w.env.clock.Now(); !r.Wake.After(now) || !r.Wake.After(now.Add(lookAhead)) && len(w.dues)-w.cached <= w.ahead {
				return
			}
		}
	}
	if w.pinned {
		w.leaving = append(w.leaving, r)
		return
	}
	for _, key := range r.keys {
		w.asleep.add(key)
	}
	w.unwatch(r)
	w.unschedule(r)
	delete(w.rows, r.ID)
	if r.Status == StatusWaiting && !r.Wake.IsZero() {
		w.beyond = min(w.beyond, dueKey(r.Wake, ""))
		if !w.later || r.Wake.Before(w.laterAt) {
			w.later, w.laterAt = true, r.Wake
			poke(w.hungry)
		}
	}
}

// tend implements behaviour: it loads the rows of runs whose time comes, and,
// after a takeover, of those that were not at rest.
func (w *sagaWorker) tend(ctx context.Context) error {
	for {
		var alarm <-chan time.Time
		stop := func() {}
		w.mu.Lock()
		now := w.env.clock.Now()
		room := w.ahead - (len(w.dues) - w.cached)
		soon := w.later && (!w.laterAt.After(now) || room > 0 && !w.laterAt.After(now.Add(lookAhead)))
		work := w.caught && (w.sweeping || w.unsure || soon)
		crowded := work && (len(w.queue) > 8*w.limit || w.pending > unstoredLimit || w.lagging > unstoredLimit)
		w.starved = crowded
		sweeping := w.sweeping
		if w.caught && !work && w.later {
			at := w.laterAt
			if room > 0 {
				at = at.Add(-lookAhead)
			}
			alarm, stop = w.env.clock.NewTimer(at)
		}
		w.mu.Unlock()
		if work && !crowded {
			stop()
			read := w.refill
			if sweeping {
				read = w.sweep
			}
			if err := read(ctx); err != nil {
				return err
			}
			continue
		}
		select {
		case <-alarm:
		case <-w.hungry:
		case <-ctx.Done():
			stop()
			return nil
		}
		stop()
	}
}

// refill loads the runs whose time comes next, as far ahead as there is room,
// and finds out when the next one after them is due.
func (w *sagaWorker) refill(ctx context.Context) error {
	finish, err := w.loading(ctx)
	if err != nil {
		return err
	}
	w.mu.Lock()
	now := w.env.clock.Now()
	room := w.ahead - (len(w.dues) - w.cached)
	beyond := w.beyond
	w.mu.Unlock()
	most := min(mostLoaded, max(w.ahead, 1))
	var rows []*row
	var next time.Time
	more, last := false, beyond
	err = w.view(ctx, func(tx projection.StateTx) error {
		var ids []string
		more, last = false, beyond
		for entry, err := range tx.Scan(dueTable(w.index), projection.Range{After: beyond}) {
			if err != nil {
				return err
			}
			due, id, err := parseDueKey(entry.Key)
			if err != nil {
				return err
			}
			w.mu.Lock()
			_, here := w.rows[id]
			w.mu.Unlock()
			if here {
				last = entry.Key
				continue
			}
			if len(ids) == most || due.After(now) && (len(ids) >= room || due.After(now.Add(lookAhead))) {
				next, more = due, true
				break
			}
			ids, last = append(ids, id), entry.Key
		}
		var err error
		rows, err = openRows(tx, w.index, ids)
		return err
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.beyond = last
		w.later, w.laterAt, w.unsure = more, next, false
		for _, r := range rows {
			w.admit(r)
		}
		w.settle()
		w.pump()
	}
	finish()
	w.notify()
	return err
}

// sweep loads some of the runs that were not at rest when the last owner stored
// them, or that a new program may unblock, and gets them going.
func (w *sagaWorker) sweep(ctx context.Context) error {
	finish, err := w.loading(ctx)
	if err != nil {
		return err
	}
	most := min(mostLoaded, max(w.ahead, 1))
	var rows []*row
	var ids []string
	last := ""
	err = w.view(ctx, func(tx projection.StateTx) error {
		ids, last = ids[:0], ""
		for entry, err := range tx.Scan(restlessTable(w.index), projection.Range{After: w.swept, Limit: most}) {
			if err != nil {
				return err
			}
			ids, last = append(ids, entry.Key[1:]), entry.Key
		}
		var err error
		rows, err = openRows(tx, w.index, ids)
		return err
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		for _, r := range rows {
			w.admit(r)
		}
		w.inSweep = true
		for _, id := range ids {
			if r := w.rows[id]; r != nil {
				r.touched = false
				w.awaken(r)
			}
		}
		w.inSweep = false
		w.settle()
		if w.swept = last; len(ids) < most {
			w.sweeping = false
		}
		w.pump()
	}
	finish()
	w.notify()
	return err
}
