package projection

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// maxVersion bounds [ViewDefinition.Version] and [SQLDefinition.Version].
const maxVersion = 1_000_000

var (
	// ErrNoVersion: the projection has no such version, or it was never begun.
	ErrNoVersion = errors.New("no such version of the projection")
	// ErrActive: the version is the one that is read.
	ErrActive = errors.New("the version is active")
	// ErrBehind: the version contains less than what is read now. See [BehindError].
	ErrBehind = errors.New("the version is behind")
)

// BehindError says how far a version of a projection, which was to be read from
// now on, is behind what has been read already.
type BehindError struct {
	// Name is the projection's, without a version.
	Name    string
	Version int
	// Position is how far the version has come, Wanted how far it must have.
	Position, Wanted eventstore.Position
}

// Error names the version and both positions.
func (e *BehindError) Error() string {
	return fmt.Sprintf("version %d of projection %q is behind: it is at position %d, and what is read now at %d: run a program that has its definition until it has caught up, or activate it although it is behind",
		e.Version, e.Name, e.Position, e.Wanted)
}

// Is makes errors.Is(err, ErrBehind) hold.
func (e *BehindError) Is(target error) bool { return target == ErrBehind }

// Version returns the view as version n, from 1, which is the default. A version
// above 1 is a projection of its own, named like "report/v2", with rows of its
// own. It is built beside the version that is read, which nobody waits for: when it
// has caught up it is compared with that one ([Engine.Versions] shows the result)
// and, unless [ViewDefinition.HeldBack], becomes the active one, in one update that
// is atomic for every reader. The old one stays until [Engine.DropVersion], so that
// [Engine.Activate] goes back to it.
//
// Who reads with a definition reads its own version once that is the active one,
// and until then, as after going back, the version that is: its row type must be
// able to read the rows of that too, and an index that only the later version has is
// not built there ([ErrIndexNotBuilt]). A definition of version 1 always reads version 1. Both may be
// given to one application, and nodes with the old one may run beside others with
// the new one.
//
// A projection that begins with a later version, without an earlier one, reads it
// at once.
func (v *ViewDefinition[R]) Version(n int) *ViewDefinition[R] {
	w := *v
	w.version = n
	w.mistakes = append(slices.Clip(w.mistakes), checkVersion(n)...)
	return &w
}

// HeldBack returns the view such that a version of it, which is built and
// compared, is not made the active one but by [Engine.Activate].
func (v *ViewDefinition[R]) HeldBack() *ViewDefinition[R] {
	w := *v
	w.heldBack = true
	return &w
}

func (v *ViewDefinition[R]) origin() origin {
	return origin{base: v.name, version: max(1, v.version), heldBack: v.heldBack}
}

// reading returns the view as the version that is to be read in the transaction.
func (v *ViewDefinition[R]) reading(tx StateTx) (*ViewDefinition[R], error) {
	if v.version <= 1 {
		return v, nil
	}
	of := v.origin()
	at, err := of.reads(tx)
	if err != nil || at == v.version {
		return v, err
	}
	l, _, err := getJSON[layout](tx, layouts, versionName(v.name, at))
	w := *v
	w.version, w.parts = at, l.Partitions
	return &w, err
}

// Version returns the projection as version n, from 1, which is the default: see
// [ViewDefinition.Version]. The Setup, Reset and handlers of a version must name
// tables that no other version has. What the program reads is switched by the
// statements of [Activate], in the very transaction that makes a version the active
// one.
func (d *SQLDefinition) Version(n int) *SQLDefinition {
	e := *d
	e.version = n
	e.mistakes = append(slices.Clip(e.mistakes), checkVersion(n)...)
	return &e
}

// HeldBack is [ViewDefinition.HeldBack].
func (d *SQLDefinition) HeldBack() *SQLDefinition {
	e := *d
	e.heldBack = true
	return &e
}

func (d *SQLDefinition) origin() origin {
	return origin{base: d.name, version: max(1, d.version), heldBack: d.heldBack, sql: true, activate: d.activate, reset: d.reset}
}

// Activate gives the statements that make the program read the tables of this
// version, such as DROP VIEW IF EXISTS monthly and CREATE VIEW monthly AS SELECT *
// FROM monthly_2. They run in the transaction that makes the version the active
// one, also when it is the first, and when one goes back to it: give them to the
// first version already. Without them a program reads the tables of the version that
// it has, and queries wait until those are built.
//
// SQLite shows that to snapshots taken afterwards. On PostgreSQL a CREATE VIEW is seen
// at once, also by a transaction whose snapshot is older, which may find the tables
// of the new version as they were then. Where that matters switch by a row: UPDATE
// monthly_version SET n = 2, with a view that selects the tables by that.
func Activate(statements ...string) SQLPart {
	return func(d *SQLDefinition) { d.activate = append(d.activate, statements...) }
}

func checkVersion(n int) []error {
	if n < 1 || n > maxVersion {
		return []error{fmt.Errorf("%w: version %d: use 1 to %d", eventstore.ErrInvalid, n, maxVersion)}
	}
	return nil
}

// origin is what a definition says about its versions.
type origin struct {
	base     string
	version  int
	heldBack bool
	sql      bool
	activate []string
	reset    []string
}

// looksUp reports whether which version is read is found out in the transaction
// that reads. Tables that no statement switches are the definition's own.
func (o origin) looksUp() bool {
	if o.sql {
		return len(o.activate) > 0
	}
	return o.version > 1
}

// reads returns the version that is read in the transaction by whoever has the
// definition.
func (o origin) reads(tx StateTx) (int, error) {
	if !o.looksUp() {
		return o.version, nil
	}
	s, err := readStack(tx, o.base)
	if err != nil {
		return 0, err
	}
	if o.sql {
		return s.top(), nil // for every version, as the statements have it
	}
	return s.readBy(o.version), nil
}

func versionName(base string, version int) string {
	if version <= 1 {
		return base
	}
	return fmt.Sprintf("%s/v%d", base, version)
}

// splitUnit takes the name of a projection, a version or a partition apart.
func splitUnit(name string) (base string, version int, partition string) {
	base, rest, _ := strings.Cut(name, "/")
	version = 1
	if first, more, _ := strings.Cut(rest, "/"); strings.HasPrefix(first, "v") {
		if n, err := strconv.Atoi(first[1:]); err == nil {
			version, rest = n, more
		}
	}
	return base, version, rest
}

// versions is the table of what is known of versions: under the projection's name
// its stack, and under that of each version ("report/v1" too) its record.
const versions = "projection.versions"

// stack says which version is read: the last of Read, by those whose definition is
// of that version or a later one, and else the last that is not beyond theirs. So
// what a definition reads changes only when a version at or below its own comes or
// goes, and each of them was caught up when it came.
type stack struct {
	Read []int     `json:"read"` // ascending
	By   string    `json:"by,omitempty"`
	At   time.Time `json:"at,omitzero"`
}

func readStack(tx StateTx, base string) (stack, error) {
	s, there, err := getJSON[stack](tx, versions, base)
	if err == nil && (!there || len(s.Read) == 0) {
		s.Read = []int{1}
	}
	return s, err
}

func (s stack) top() int { return s.Read[len(s.Read)-1] }

// readBy returns what a definition of the version reads: itself, if it has none
// of those that count.
func (s stack) readBy(version int) int {
	for _, r := range slices.Backward(s.Read) {
		if r <= version {
			return r
		}
	}
	return version
}

// activated returns the stack with the version on top, and whose places its
// readers leave.
func (s stack) activated(version int) (next stack, left []int) {
	if before := s.readBy(version); before != version {
		left = append(left, before)
	}
	for _, r := range s.Read {
		switch {
		case r < version:
			next.Read = append(next.Read, r)
		case r > version:
			left = append(left, r)
		}
	}
	next.Read = append(next.Read, version)
	return next, left
}

// record is what is stored of a version, for those who do not have its definition.
type record struct {
	SQL      bool     `json:"sql,omitempty"`
	Activate []string `json:"activate,omitempty"`
	Reset    []string `json:"reset,omitempty"`
	// Activated is when the version was made the active one for the first time:
	// from then on it is only made so when somebody asks.
	Activated  time.Time   `json:"activated,omitzero"`
	Comparison *Comparison `json:"comparison,omitempty"`
}

func recordKey(base string, version int) string { return fmt.Sprintf("%s/v%d", base, version) }

func readRecord(tx StateTx, base string, version int) (record, bool, error) {
	return getJSON[record](tx, versions, recordKey(base, version))
}

// serialise makes updates that change the versions of a projection run one after
// another, on states where updates run at the same time: from here on it reads what
// the one before has written. Such an update holds, in this order, a lease, this
// place, and checkpoints.
func serialise(tx StateTx, base string) error {
	if err := tx.Put(versions, base+"#", []byte("{}")); err != nil {
		return err
	}
	_, _, err := tx.Get(versions, base) // what was put is written before anything is read
	return err
}

// knownVersions returns the versions that the state knows, ascending.
func knownVersions(tx StateTx, base string) ([]int, error) {
	found := map[int]bool{}
	s, _, err := getJSON[stack](tx, versions, base)
	if err != nil {
		return nil, err
	}
	for _, v := range s.Read {
		found[v] = true
	}
	if !found[1] {
		_, begun, err := heldUnits(tx, versionName(base, 1), false)
		if err != nil {
			return nil, err
		}
		found[1] = begun
	}
	for row, err := range tx.Scan(versions, Range{Prefix: base + "/v"}) {
		if err != nil {
			return nil, err
		}
		if _, version, _ := splitUnit(row.Key); version >= 1 {
			found[version] = true
		}
	}
	var all []int
	for v, is := range found {
		if is {
			all = append(all, v)
		}
	}
	slices.Sort(all)
	return all, nil
}

// reach is how far the partitions of a version have come.
type reach struct {
	log         string
	least, most eventstore.Position
}

// holder is the optional power of a transaction to keep a checkpoint from moving
// until it ends, on states where updates run at the same time.
type holder interface {
	HoldCheckpoint(name string) (Checkpoint, error)
}

// heldUnits reads the checkpoints of all partitions; begun says that there is one.
// With hold, they stay as they are until the transaction ends.
func heldUnits(tx StateTx, name string, hold bool) (at reach, begun bool, err error) {
	units, err := storedUnits(tx, name)
	if err != nil {
		return at, false, err
	}
	h, holds := tx.(holder)
	for i, unit := range units {
		var c Checkpoint
		if hold && holds {
			c, err = h.HoldCheckpoint(leaseName(unit))
		} else {
			c, err = tx.Checkpoint(leaseName(unit))
		}
		if err != nil {
			return at, false, err
		}
		begun = begun || !c.IsZero()
		at.log = cmp.Or(at.log, c.Log)
		at.most = max(at.most, c.Position)
		if i == 0 || c.Position < at.least {
			at.least = c.Position
		}
	}
	return at, begun, nil
}

// enroll writes down what is known of the version that begins, in the update that
// reads its checkpoint. A projection that begins, without an earlier version, is
// read at once.
func (r *runner) enroll(ctx context.Context, tx StateTx) error {
	of := r.projection.origin()
	begins := r.stored.IsZero()
	plain := of.version == 1 && !of.sql
	if plain && !begins {
		return nil
	}
	was, known, err := readRecord(tx, of.base, of.version)
	if err != nil {
		return err
	}
	first := r.part.index == 0
	changed := first && (!known || !slices.Equal(was.Activate, of.activate) || !slices.Equal(was.Reset, of.reset) || was.SQL != of.sql) && !plain
	if !begins && !changed {
		return nil
	}
	// Whoever else decides what is read sees that there is this version, or is seen.
	if err := serialise(tx, of.base); err != nil {
		return err
	}
	if was, _, err = readRecord(tx, of.base, of.version); err != nil || !first {
		return err
	}
	s, decided, err := getJSON[stack](tx, versions, of.base)
	if err != nil {
		return err
	}
	active := of.version == 1
	if decided {
		active = s.top() == of.version
	} else if of.version > 1 {
		if active, err = r.alone(tx, of); err != nil {
			return err
		}
		if active {
			s = stack{Read: []int{of.version}, By: r.owner, At: time.Now()}
			if err := putJSON(tx, versions, of.base, s); err != nil {
				return err
			}
		}
	}
	if plain {
		return nil
	}
	switches := active && !slices.Equal(was.Activate, of.activate)
	was.SQL, was.Activate, was.Reset = of.sql, of.activate, of.reset
	if active && was.Activated.IsZero() {
		was.Activated = time.Now()
	}
	if err := putJSON(tx, versions, recordKey(of.base, of.version), was); err != nil || !switches {
		return err
	}
	return runAll(ctx, tx, "activate", of.activate)
}

// alone reports whether there is no earlier version, here or stored.
func (r *runner) alone(tx StateTx, of origin) (bool, error) {
	if r.engine.hasEarlier(of) {
		return false, nil
	}
	known, err := knownVersions(tx, of.base)
	return err == nil && (len(known) == 0 || known[0] >= of.version), err
}

func (e *Engine) hasEarlier(of origin) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.ContainsFunc(e.entries, func(en *entry) bool {
		other := en.projection.origin()
		return other.base == of.base && other.version < of.version
	})
}

func runAll(ctx context.Context, tx Tx, what string, statements []string) error {
	for _, s := range statements {
		if _, err := tx.Exec(ctx, s); err != nil {
			return fmt.Errorf("%s tables with %q: %w", what, s, err)
		}
	}
	return nil
}

// switched reports whether what the entry's definition reads is looked up.
func (en *entry) switched() bool {
	return en.projection.origin().looksUp()
}

// other returns the entry of another version, if the engine has it.
func (e *Engine) other(base string, version int) *entry {
	e.mu.Lock()
	defer e.mu.Unlock()
	if i := e.index(versionName(base, version)); i >= 0 {
		return e.entries[i]
	}
	return nil
}

// activeLasts is for how long it is not asked again which version is read, by who
// waits: whether the rows contain what was waited for is found out in the
// transaction that reads them.
const activeLasts = time.Second

// seenVersion is what was last seen of which version is read.
type seenVersion struct {
	version int
	at      time.Time
	reached eventstore.Position
}

func (en *entry) saw(version int, reached eventstore.Position) {
	en.seen.Store(&seenVersion{version: version, at: time.Now(), reached: reached})
}

// waitRead is wait for what the definition reads.
func (en *entry) waitRead(ctx context.Context, e *Engine, p eventstore.Position) error {
	of := en.projection.origin()
	for pause := lookAtFirst; ; pause = min(2*pause, lookAtLast) {
		if s := en.seen.Load(); s != nil && s.version == of.version && time.Since(s.at) < activeLasts {
			return en.wait(ctx, p)
		}
		there, version := false, 0
		if err := e.state.View(ctx, func(tx StateTx) (err error) {
			there, version, err = en.containsRead(tx, e, of, p)
			return err
		}); err != nil || there {
			return err
		}
		if version == of.version {
			return en.wait(ctx, p)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if old := e.other(of.base, version); old != nil {
			limited, cancel := context.WithTimeout(ctx, pause)
			err := old.wait(limited, p)
			expired := limited.Err() != nil
			cancel()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err == nil || !expired && !errors.Is(err, ErrStopped) {
				return err
			}
			if expired {
				continue
			}
		}
		if err := en.stopped(); err != nil {
			return err
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// stopped returns an error if none of the runners will go on.
func (en *entry) stopped() error {
	for _, r := range en.runners {
		if !r.progress.over() {
			return nil
		}
	}
	return fmt.Errorf("%w: %q", ErrStopped, en.projection.Name())
}

// containsRead is contains for what the definition reads, and says what that is.
func (en *entry) containsRead(tx StateTx, e *Engine, of origin, p eventstore.Position) (bool, int, error) {
	version, err := of.reads(tx)
	if err != nil {
		return false, 0, err
	}
	if version == of.version {
		en.saw(version, 0)
		there, err := en.contains(tx, p)
		return there, version, err
	}
	at, _, err := heldUnits(tx, versionName(of.base, version), false)
	if err != nil {
		return false, 0, err
	}
	en.saw(version, at.least)
	if at.least >= p {
		return true, version, nil
	}
	old := e.other(of.base, version)
	if old == nil {
		return false, version, nil
	}
	there, err := old.contains(tx, p)
	return there, version, err
}

// reachedRead is reached for what the definition reads, as far as is known.
func (en *entry) reachedRead(e *Engine) eventstore.Position {
	of := en.projection.origin()
	s := en.seen.Load()
	switch {
	case s == nil:
		return 0
	case s.version == of.version:
		return en.reached()
	}
	if old := e.other(of.base, s.version); old != nil {
		return max(s.reached, old.reached())
	}
	return s.reached
}
