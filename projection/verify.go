package projection

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
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
		if !items[i].parked && !items[i].foreign {
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
	// Entries is how many there should be in those indexes of a view that are built.
	// MissingEntries are not there, ExtraEntries should not be there.
	Entries        int `json:"entries,omitempty"`
	MissingEntries int `json:"missing_entries,omitempty"`
	ExtraEntries   int `json:"extra_entries,omitempty"`
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
	return v.SameEvents && v.Missing+v.Extra+v.Changed+v.MissingEntries+v.ExtraEntries == 0
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
	if v.MissingEntries+v.ExtraEntries > 0 {
		wrong = append(wrong, fmt.Sprintf("of %d entries of indexes %d are missing, %d are too many", v.Entries, v.MissingEntries, v.ExtraEntries))
	}
	switch {
	case len(wrong) == 0 && !v.Compared:
		return fmt.Sprintf("%d events up to position %d were applied, each once; rows of SQL projections are not compared", v.Events, v.Position)
	case len(wrong) == 0:
		return fmt.Sprintf("%d events up to position %d made %d rows, as they should", v.Events, v.Position, v.Rows)
	}
	return fmt.Sprintf("at position %d %s", v.Position, strings.Join(wrong, "; "))
}

// errAltered: what was compared has changed in a way that one cannot follow.
var errAltered = errors.New("the projection was rebuilt, or its dead letters were replayed, meanwhile: verify it again")

// VerifyOption is an option of [Engine.Verify] and [Admin.Verify].
type VerifyOption func(*verifying)

// verifying is what is wanted of a verification.
type verifying struct {
	report func(VerifyProgress)
}

// VerifyProgress is how far a verification has come.
type VerifyProgress struct {
	// Part is which one of the Parts of the projection is looked at, from 1 on: each
	// partition reads the log by itself.
	Part  int `json:"part"`
	Parts int `json:"parts"`
	// Position is where the fold on the side is, Through where it is to go: the
	// checkpoint, which moves on while the projection runs.
	Position eventstore.Position `json:"position"`
	Through  eventstore.Position `json:"through"`
	// Rows is how many rows of the part have been compared since the fold was there.
	Rows int `json:"rows"`
}

// WithProgress has the function called while a verification goes on, again and
// again, one call after the other, and by Verify's goroutine, which waits for it. When
// another process does the work, that is about once a second.
func WithProgress(report func(VerifyProgress)) VerifyOption {
	return func(v *verifying) {
		if report != nil {
			v.report = report
		}
	}
}

func verifyOptions(options []VerifyOption) verifying {
	v := verifying{report: func(VerifyProgress) {}}
	for _, option := range options {
		option(&v)
	}
	return v
}

// Verify folds the log again, on the side, up to the checkpoint that the
// projection has when that is done, and compares: whether the projection
// has applied the events that it should, each once, and whether the rows of a
// view are what they should be. The projection goes on meanwhile, here or in
// another process. Events that are set aside or skipped are left out.
//
// Rows take about twice [Options.CacheBytes] of memory. Those that do not fit go to
// temporary files in [os.TempDir], which need about as much room as the rows, for a
// while twice as much; nothing is written to the state. The files have no names
// and end with the process, however that ends, where the system can do that: Windows
// cannot.
//
// A difference is no error; an error says that
// nothing was found out: it wraps [ErrWrongLog] when the checkpoint does not fit
// the log, and is the handler's when that fails on an event that was applied.
//
// Rows that several streams share may rightly differ after dead letters were
// replayed that did not tell their rows ([ViewDefinition.ParkedBy]), if the order of
// events matters to them: rebuild the projection then.
func (e *Engine) Verify(ctx context.Context, name string, options ...VerifyOption) (Verification, error) {
	en, err := e.entry(name)
	if err != nil {
		return Verification{}, err
	}
	wanted := verifyOptions(options)
	var all Verification
	for i, r := range en.runners {
		v, err := r.verification(ctx, func(p VerifyProgress) {
			p.Part, p.Parts = i+1, len(en.runners)
			wanted.report(p)
		})
		if err != nil {
			return Verification{}, fmt.Errorf("verify projection %q: %w", r.unit, err)
		}
		if i == 0 {
			all = v
		} else {
			all = all.and(v)
		}
	}
	all.Name = name
	return all, nil
}

// verification is verify, once more if need be.
func (r *runner) verification(ctx context.Context, report func(VerifyProgress)) (Verification, error) {
	for attempt := 1; ; attempt++ {
		v, err := r.verify(ctx, report)
		if !errors.Is(err, errAltered) || attempt == 3 {
			return v, err
		}
	}
}

// and is the verification of two partitions. Each event that concerns both counts
// in both.
func (v Verification) and(w Verification) Verification {
	v.Position = min(v.Position, w.Position)
	v.Events, v.Applied = v.Events+w.Events, v.Applied+w.Applied
	v.SameEvents, v.Compared = v.SameEvents && w.SameEvents, v.Compared && w.Compared
	v.SetAside, v.Skipped, v.Rows = v.SetAside+w.SetAside, v.Skipped+w.Skipped, v.Rows+w.Rows
	v.Missing, v.Extra, v.Changed = v.Missing+w.Missing, v.Extra+w.Extra, v.Changed+w.Changed
	v.Entries, v.MissingEntries, v.ExtraEntries = v.Entries+w.Entries, v.MissingEntries+w.MissingEntries, v.ExtraEntries+w.ExtraEntries
	if v.First == nil || w.First != nil && w.First.Key < v.First.Key {
		v.First = w.First
	}
	return v
}

// verifier is a fold on the side.
type verifier struct {
	r        *runner
	side     *side
	folder   folder // nil: rows are not compared
	reached  eventstore.Position
	applied  tally
	excluded map[eventstore.Position]struct{} // what has been left out
	through  eventstore.Position              // where it is to go, as was last seen
	report   func(VerifyProgress)
}

// reportRows is after how many rows it is told how far one is.
const reportRows = 1024

// nearby is how far the checkpoint may be for the rest to be folded while one
// looks at the rows.
const nearby = 4096

func (r *runner) verify(ctx context.Context, report func(VerifyProgress)) (Verification, error) {
	v := &verifier{r: r, side: newSide(r.engine.options.CacheBytes), excluded: map[eventstore.Position]struct{}{}, report: report}
	defer v.side.close()
	if _, sql := r.projection.(*SQLDefinition); !sql {
		v.folder = r.projection.open(v.side, &r.engine.options, r.part)
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
			Name: r.unit, Position: now.at, SetAside: now.setAside, Skipped: len(now.excluded) - now.setAside,
			Events: v.applied.Events, Applied: now.tally.Events, SameEvents: now.tally == v.applied, Compared: v.folder != nil,
		}
		if v.folder == nil {
			return nil
		}
		view := r.projection.(interface {
			table() string
			owns(p partition, key string) bool
			compareIndexes(tx StateTx, side *side, p partition, found *Verification) error
		})
		if err := view.compareIndexes(tx, v.side, r.part, &found); err != nil {
			return err
		}
		return v.compare(ctx, tx, view.table(), func(key string) bool { return view.owns(r.part, key) }, &found)
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
	name := r.unit
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
		return errAltered
	}
	for p := range v.excluded {
		if _, still := to.excluded[p]; !still {
			return errAltered
		}
	}
	for p := range to.excluded {
		if _, was := v.excluded[p]; !was && p <= v.reached {
			return errAltered
		}
	}
	v.through = to.at
	o := &v.r.engine.options
	items := make([]item, 0, o.BatchEvents)
	flush := func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if v.folder != nil {
			if err := foldAside(ctx, v.folder, items); err != nil {
				return err
			}
		}
		if len(items) > 0 {
			v.report(VerifyProgress{Position: items[len(items)-1].event.Position, Through: to.at})
		}
		clear(items)
		items = items[:0]
		return nil
	}
	q := v.r.projection.selection(o.Encoding, v.r.part)
	if v.reached < to.at {
		for e, err := range v.r.engine.store.Read(ctx, q, eventstore.ReadOptions{After: v.reached, Through: to.at}) {
			if err != nil {
				return err
			}
			if _, left := to.excluded[e.Position]; left {
				continue
			}
			it := item{event: &e}
			if v.folder != nil {
				if v.folder.decode(&it); it.foreign {
					continue
				}
			}
			v.applied = v.applied.plus(e.Position, e.ID)
			if items = append(items, it); len(items) == cap(items) {
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
func (v *verifier) compare(ctx context.Context, tx StateTx, table string, own func(key string) bool, found *Verification) error {
	seen := 0
	return v.side.beside(tx, table, func(stored, should *Row) error {
		if seen++; seen%reportRows == 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			v.report(VerifyProgress{Position: v.reached, Through: v.through, Rows: seen})
		}
		var first RowDifference
		switch {
		case should == nil && !own(stored.Key):
			return nil
		case should == nil:
			found.Extra++
			first = RowDifference{Key: stored.Key, Stored: bytes.Clone(stored.Value)}
		case stored == nil:
			found.Rows++
			found.Missing++
			first = RowDifference{Key: should.Key, Should: bytes.Clone(should.Value)}
		default:
			if found.Rows++; bytes.Equal(stored.Value, should.Value) {
				return nil
			}
			found.Changed++
			first = RowDifference{Key: stored.Key, Stored: bytes.Clone(stored.Value), Should: bytes.Clone(should.Value)}
		}
		if found.First == nil {
			found.First = &first
		}
		return nil
	})
}

// tellEvery is how often it is written down how far a verification for somebody
// else has come.
const tellEvery = time.Second

// verifyTelling is verification for the request under the key. It tells there how
// far it is, and ends when the request is gone, as nobody waits for it then.
func (r *runner) verifyTelling(ctx context.Context, lease Lease, key string) (Verification, error) {
	ctx, cancel := context.WithCancel(ctx)
	var reached atomic.Pointer[VerifyProgress]
	var telling sync.WaitGroup
	// By itself, as what reports may be within a view of the state.
	telling.Go(func() {
		ticker := time.NewTicker(tellEvery)
		defer ticker.Stop()
		for told := (*VerifyProgress)(nil); ; {
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return
			}
			there, err := true, error(nil)
			if now := reached.Load(); now != told {
				there, err = r.changeOrder(ctx, lease, key, func(o *order) { o.Progress = now })
				told = now
			} else {
				err = r.engine.state.View(ctx, func(tx StateTx) (err error) {
					_, there, err = tx.Get(orderTable(r.unit), key)
					return err
				})
			}
			if err == nil && !there || errors.Is(err, ErrFenced) {
				cancel()
				return
			}
		}
	})
	v, err := r.verification(ctx, func(p VerifyProgress) { reached.Store(&p) })
	cancel()
	telling.Wait()
	return v, err
}
