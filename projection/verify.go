package projection

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// tally says which events a projection has applied: how many, and the sum of
// their digests, which is the same in whatever order they came. It is kept beside
// the checkpoint and changed in the same update.
type tally struct {
	Events uint64 `json:"events"`
	Digest uint64 `json:"digest,string"`
}

// plus is the tally after the event.
func (t tally) plus(p eventstore.Position, id uuid.UUID) tally {
	// FNV-1a, and then the finalizer of MurmurHash3, as digests are added up.
	h := uint64(14695981039346656037)
	var at [8]byte
	binary.BigEndian.PutUint64(at[:], uint64(p))
	for _, b := range at {
		h = (h ^ uint64(b)) * 1099511628211
	}
	for _, b := range id {
		h = (h ^ uint64(b)) * 1099511628211
	}
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	h ^= h >> 33
	return tally{t.Events + 1, t.Digest + h}
}

// tallies is the table of them, by the names of projections.
const tallies = "projection.tallies"

// count adds the items that are applied.
func (t tally) count(items []item) tally {
	for i := range items {
		if !items[i].parked {
			t = t.plus(items[i].event.Position, items[i].event.ID)
		}
	}
	return t
}

// Verification is what [Engine.Verify] has found.
type Verification struct {
	Name string `json:"name"`
	// Position is where the comparison was made: the projection's checkpoint.
	Position eventstore.Position `json:"position"`
	// Events is how many events up to there concern the projection and are not set
	// aside or skipped; Applied is how many it says to have applied.
	Events  uint64 `json:"events"`
	Applied uint64 `json:"applied"`
	// SameEvents: it has applied those events, each once.
	SameEvents bool `json:"same_events"`
	// SetAside and Skipped are the events that its rows do not contain.
	SetAside int `json:"set_aside"`
	Skipped  int `json:"skipped"`
	// Compared says that rows were compared: those of views are, those of SQL
	// projections are the program's own.
	Compared bool `json:"compared"`
	// Rows is how many there should be. Missing are not there, Extra should not be
	// there, Changed have other contents.
	Rows    int `json:"rows"`
	Missing int `json:"missing"`
	Extra   int `json:"extra"`
	Changed int `json:"changed"`
	// First is the first row that differs, in the order of the keys; nil if none does.
	First *RowDifference `json:"first,omitempty"`
}

// RowDifference is a row as it is stored and as it should be; JSON, or empty
// where there is none.
type RowDifference struct {
	Key    string          `json:"key"`
	Stored json.RawMessage `json:"stored,omitempty"`
	Should json.RawMessage `json:"should,omitempty"`
}

// Agrees reports whether nothing wrong was found.
func (v Verification) Agrees() bool {
	return v.SameEvents && v.Missing+v.Extra+v.Changed == 0
}

// String says in a line what was found.
func (v Verification) String() string {
	var wrong []string
	if !v.SameEvents {
		text := "it has applied other events than those of the log"
		if v.Applied != v.Events {
			text = fmt.Sprintf("it has applied %d events of %d", v.Applied, v.Events)
		}
		wrong = append(wrong, text)
	}
	if v.First != nil {
		stored, should := string(v.First.Stored), string(v.First.Should)
		if stored == "" {
			stored = "not there"
		}
		if should == "" {
			should = "not there"
		}
		wrong = append(wrong, fmt.Sprintf("of %d rows %d are missing, %d are too many, %d differ; the first is %q: it is %s and should be %s", v.Rows, v.Missing, v.Extra, v.Changed, v.First.Key, stored, should))
	}
	switch {
	case len(wrong) == 0 && !v.Compared:
		return fmt.Sprintf("%d events up to position %d were applied, each once; rows of SQL projections are not compared", v.Events, v.Position)
	case len(wrong) == 0:
		return fmt.Sprintf("%d events up to position %d made %d rows, as they should", v.Events, v.Position, v.Rows)
	}
	return fmt.Sprintf("at position %d %s", v.Position, strings.Join(wrong, "; "))
}

// errMoved: what was compared has changed in a way that one cannot follow.
var errMoved = errors.New("the projection was rebuilt, or its dead letters were replayed, meanwhile: verify it again")

// Verify folds the log again, on the side and in memory, up to the checkpoint
// that the projection has when that is done, and compares: whether the projection
// has applied the events that it should, each once, and whether the rows of a
// view are what they should be. The projection goes on meanwhile, here or in
// another process. Events that are set aside or skipped are left out.
//
// The rows must fit into memory. A difference is no error; an error says that
// nothing was found out: it wraps [ErrWrongLog] when the checkpoint does not fit
// the log, and is the handler's when that fails on an event that was applied.
//
// Rows that several streams share may rightly differ after dead letters were
// replayed, if the order of events matters to them: rebuild the projection then.
func (e *Engine) Verify(ctx context.Context, name string) (Verification, error) {
	r, err := e.runner(name)
	if err != nil {
		return Verification{}, err
	}
	for attempt := 1; ; attempt++ {
		v, err := r.verify(ctx)
		if errors.Is(err, errMoved) && attempt < 3 {
			continue
		}
		if err != nil {
			return Verification{}, fmt.Errorf("verify projection %q: %w", name, err)
		}
		return v, nil
	}
}

// verifier is a fold on the side.
type verifier struct {
	r        *runner
	side     *side
	folder   folder // nil: rows are not compared
	reached  eventstore.Position
	applied  tally
	excluded map[eventstore.Position]struct{} // what has been left out
}

// nearby is how far the checkpoint may be for the rest to be folded while one
// looks at the rows.
const nearby = 4096

func (r *runner) verify(ctx context.Context) (Verification, error) {
	v := &verifier{r: r, side: &side{tables: map[string]map[string][]byte{}}, excluded: map[eventstore.Position]struct{}{}}
	if _, sql := r.projection.(*SQLDefinition); !sql {
		v.folder = r.projection.open(v.side, &r.engine.options)
		v.folder.fresh()
	}
	logID, err := eventstore.LogID(ctx, r.engine.store)
	if err != nil {
		return Verification{}, err
	}
	for {
		var now standing
		if err := r.engine.state.View(ctx, func(tx StateTx) (err error) {
			now, err = r.standing(tx, logID)
			return err
		}); err != nil {
			return Verification{}, err
		}
		far := now.at-min(now.at, v.reached) > nearby
		if err := v.foldTo(ctx, now); err != nil {
			return Verification{}, err
		}
		if !far {
			break
		}
	}
	var found Verification
	err = r.engine.state.View(ctx, func(tx StateTx) error {
		now, err := r.standing(tx, logID)
		if err != nil {
			return err
		}
		if err := v.foldTo(ctx, now); err != nil {
			return err
		}
		found = Verification{
			Name: r.projection.Name(), Position: now.at, SetAside: now.setAside, Skipped: len(now.excluded) - now.setAside,
			Events: v.applied.Events, Applied: now.tally.Events, SameEvents: now.tally == v.applied, Compared: v.folder != nil,
		}
		if v.folder == nil {
			return nil
		}
		return v.compare(tx, r.projection.(interface{ table() string }).table(), &found)
	})
	return found, err
}

// standing is how far a projection is and what it has left out.
type standing struct {
	at       eventstore.Position
	tally    tally
	excluded map[eventstore.Position]struct{}
	setAside int
}

func (r *runner) standing(tx StateTx, logID string) (standing, error) {
	name := r.projection.Name()
	now := standing{excluded: map[eventstore.Position]struct{}{}}
	c, err := tx.Checkpoint(r.leaseName())
	if err == nil {
		err = c.fits(logID)
	}
	if err != nil {
		return now, err
	}
	now.at = c.Position
	counted := false
	if now.tally, counted, err = getJSON[tally](tx, tallies, name); err != nil {
		return now, err
	}
	if !counted && !c.IsZero() {
		return now, fmt.Errorf("%w: it was not recorded which events the projection has applied, as an earlier release built it: rebuild it", eventstore.ErrInvalid)
	}
	if err := r.eachDeadLetter(tx, func(d DeadLetter) { now.excluded[d.Position] = struct{}{} }); err != nil {
		return now, err
	}
	now.setAside = len(now.excluded)
	err = eachJSON(tx, skippedTable(name), func(_ string, s SkippedEvent) { now.excluded[s.Position] = struct{}{} })
	return now, err
}

// foldTo folds what is behind the events that were folded.
func (v *verifier) foldTo(ctx context.Context, to standing) error {
	if to.at < v.reached {
		return errMoved
	}
	for p := range v.excluded {
		if _, still := to.excluded[p]; !still {
			return errMoved
		}
	}
	for p := range to.excluded {
		if _, was := v.excluded[p]; !was && p <= v.reached {
			return errMoved
		}
	}
	o := &v.r.engine.options
	items := make([]item, 0, o.BatchEvents)
	flush := func() error {
		if v.folder != nil && len(items) > 0 {
			for i := range items {
				v.folder.decode(&items[i])
			}
			if _, err := v.folder.apply(ctx, Lease{}, items, func(StateTx, int) error { return nil }); err != nil {
				failure := (*handlerError)(nil)
				if errors.As(err, &failure) {
					e := items[failure.index].event
					return fmt.Errorf("event %q at position %d of stream %q: %w", e.Type, e.Position, e.Stream, failure.cause)
				}
				return err
			}
		}
		clear(items)
		items = items[:0]
		return nil
	}
	q := v.r.projection.selection(o.Encoding)
	if v.reached < to.at {
		for e, err := range v.r.engine.store.Read(ctx, q, eventstore.ReadOptions{After: v.reached, Through: to.at}) {
			if err != nil {
				return err
			}
			if _, left := to.excluded[e.Position]; left {
				continue
			}
			v.applied = v.applied.plus(e.Position, e.ID)
			if items = append(items, item{event: &e}); len(items) == cap(items) {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	if err := flush(); err != nil {
		return err
	}
	v.reached, v.excluded = to.at, to.excluded
	return nil
}

// compare goes through both tables in the order of their keys.
func (v *verifier) compare(tx StateTx, table string, found *Verification) error {
	should := v.side.tables[table]
	found.Rows = len(should)
	different := func(key string, stored, folded []byte) {
		if found.First == nil || key < found.First.Key {
			found.First = &RowDifference{Key: key, Stored: bytes.Clone(stored), Should: bytes.Clone(folded)}
		}
	}
	seen := make(map[string]struct{}, len(should)) // and should stays as it is: a view of the state may be begun again
	for row, err := range tx.Scan(table, Range{}) {
		if err != nil {
			return err
		}
		folded, ok := should[row.Key]
		switch {
		case !ok:
			found.Extra++
			different(row.Key, row.Value, nil)
		case !bytes.Equal(row.Value, folded):
			found.Changed++
			different(row.Key, row.Value, folded)
		}
		if ok {
			seen[row.Key] = struct{}{}
		}
	}
	if found.Missing = len(should) - len(seen); found.Missing > 0 {
		for key, folded := range should {
			if _, there := seen[key]; !there {
				different(key, nil, folded)
			}
		}
	}
	return nil
}

// side is a state in memory for the rows of one fold. It forgets when it is
// dropped, and takes back nothing.
type side struct{ tables map[string]map[string][]byte }

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

func (t sideTx) Get(table, key string) ([]byte, bool, error) {
	value, ok := t.s.tables[table][key]
	return value, ok, nil
}

func (t sideTx) Put(table, key string, value []byte) error {
	if t.s.tables[table] == nil {
		t.s.tables[table] = map[string][]byte{}
	}
	t.s.tables[table][key] = value
	return nil
}

func (t sideTx) Delete(table, key string) error {
	delete(t.s.tables[table], key)
	return nil
}

func (t sideTx) Clear(table string) error {
	delete(t.s.tables, table)
	return nil
}

func (t sideTx) Scan(table string, _ Range) iter.Seq2[Row, error] {
	return func(yield func(Row, error) bool) {
		for _, key := range slices.Sorted(maps.Keys(t.s.tables[table])) {
			if !yield(Row{key, t.s.tables[table][key]}, nil) {
				return
			}
		}
	}
}
