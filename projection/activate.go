package projection

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// ActivateOption is an option of [Engine.Activate]: [AlthoughBehind].
type ActivateOption func(*activation)

// AlthoughBehind makes a version the active one although it contains less than
// what was read before: reads go back, and further on only when somebody runs it.
func AlthoughBehind() ActivateOption { return func(a *activation) { a.althoughBehind = true } }

// activation is one change of the version that is read.
type activation struct {
	base    string
	version int
	by      string
	// althoughBehind: reads may go back. unasked: only if it was never active.
	althoughBehind, unasked bool
	// patience is how long to wait, within the transaction, for the version to pass
	// what is read, where that is kept from moving meanwhile.
	patience time.Duration
}

const (
	// holdAtMost bounds how long what is read is kept from moving on.
	holdAtMost = time.Second
	holdLook   = 2 * time.Millisecond
	// swapAtMost bounds the whole update: its statements may wait for who reads what
	// they replace.
	swapAtMost = 5 * time.Second
	// activateTries is how often it is tried until one who asks is told that the
	// version is behind.
	activateTries = 5
)

// errAsked: a version that was active before is not made so but by who asks.
var errAsked = errors.New("the version was active before, or a later one is")

// apply makes the version the active one, or changes nothing. What anybody reads
// afterwards contains everything that was read before: what was read stays where
// it is until the transaction has ended, and so does what will be.
func (a activation) apply(ctx context.Context, tx StateTx) (changed bool, err error) {
	if err := serialise(tx, a.base); err != nil {
		return false, err
	}
	s, err := readStack(tx, a.base)
	if err != nil {
		return false, err
	}
	known, _, err := readRecord(tx, a.base, a.version)
	if err != nil {
		return false, err
	}
	if a.unasked && (!known.Activated.IsZero() || s.top() > a.version) {
		return false, errAsked
	}
	if s.top() == a.version {
		return false, nil
	}
	if err := a.switchable(tx, s.top(), known); err != nil {
		return false, err
	}
	next, left := s.activated(a.version)
	wanted := reach{}
	for _, version := range left {
		at, _, err := heldUnits(tx, versionName(a.base, version), true)
		if err != nil {
			return false, err
		}
		if wanted.log != "" && at.log != "" && at.log != wanted.log {
			at.log = wanted.log + ", " + at.log
		}
		if at.log != "" {
			wanted.log = at.log
		}
		wanted.most = max(wanted.most, at.most)
	}
	name := versionName(a.base, a.version)
	if err := a.await(ctx, tx, name, wanted.most); err != nil {
		return false, err
	}
	at, begun, err := heldUnits(tx, name, true)
	switch {
	case err != nil:
		return false, err
	case !begun:
		return false, fmt.Errorf("%w: %d", ErrNoVersion, a.version)
	case a.althoughBehind:
	case wanted.log != "" && at.log != wanted.log:
		return false, fmt.Errorf("%w: version %d is at a position of the log %q, and what is read now at one of %q: they cannot be compared", ErrWrongLog, a.version, at.log, wanted.log)
	case at.least < wanted.most:
		return false, &BehindError{Name: a.base, Version: a.version, Position: at.least, Wanted: wanted.most}
	}
	next.By, next.At = a.by, time.Now()
	if err := putJSON(tx, versions, a.base, next); err != nil {
		return false, err
	}
	if known.Activated.IsZero() {
		known.Activated = next.At
		if err := putJSON(tx, versions, recordKey(a.base, a.version), known); err != nil {
			return false, err
		}
	}
	return true, runAll(ctx, tx, "activate", known.Activate)
}

// switchable refuses a version that does not say how it is read, instead of one that
// does: the program would go on reading that one.
func (a activation) switchable(tx StateTx, top int, known record) error {
	now, _, err := readRecord(tx, a.base, top)
	if err == nil && known.SQL && len(now.Activate) > 0 && len(known.Activate) == 0 {
		err = fmt.Errorf("%w: version %d is read by the statements of its projection.Activate, and version %d has none: add them to its definition and start it", eventstore.ErrInvalid, top, a.version)
	}
	return err
}

// await returns when all partitions have come as far as that, or after a while.
// It waits only where the others can go on: where updates run one at a time, what
// is there is all there will be.
func (a activation) await(ctx context.Context, tx StateTx, name string, wanted eventstore.Position) error {
	if _, ok := tx.(holder); !ok || a.althoughBehind {
		return nil
	}
	for began := time.Now(); time.Since(began) < a.patience; {
		if at, begun, err := heldUnits(tx, name, false); err != nil || !begun || at.least >= wanted {
			return err
		}
		if err := sleep(ctx, holdLook); err != nil {
			return err
		}
	}
	return nil
}

func (a activation) update(ctx context.Context, s State) (changed bool, err error) {
	limited, cancel := context.WithTimeout(ctx, swapAtMost)
	defer cancel()
	err = s.Update(limited, func(tx StateTx) (err error) {
		changed, err = a.apply(limited, tx)
		return err
	})
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		// Whether it was committed is seen when it is tried again.
		err = fmt.Errorf("%w: it took longer than %s: %w", ErrUnavailable, swapAtMost, err)
	}
	return changed && err == nil, err
}

func (a *Admin) activation(name string, version int, options []ActivateOption) (activation, error) {
	if err := errors.Join(append(checkVersion(version), validateUnit(name))...); err != nil {
		return activation{}, err
	}
	base, _, _ := splitUnit(name)
	act := activation{base: base, version: version, by: a.by, patience: holdAtMost}
	for _, o := range options {
		o(&act)
	}
	return act, nil
}

// Activate is [Engine.Activate] from outside.
func (a *Admin) Activate(ctx context.Context, name string, version int, options ...ActivateOption) error {
	act, err := a.activation(name, version, options)
	if err != nil {
		return err
	}
	tries := 1
	if Shared(a.state) {
		tries = activateTries // whoever runs it goes on meanwhile
	}
	return act.insist(ctx, tries, func(ctx context.Context) error {
		_, err := act.update(ctx, a.state)
		return err
	})
}

// insist tries it until the version is not behind any more.
func (a activation) insist(ctx context.Context, tries int, try func(ctx context.Context) error) error {
	for n := 1; ; n++ {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if n >= tries || !errors.Is(err, ErrBehind) && !errors.Is(err, ErrUnavailable) {
			return fmt.Errorf("activate version %d of projection %q: %w", a.version, a.base, err)
		}
		if err := sleep(ctx, lookAtLast); err != nil {
			return err
		}
	}
}

// Activate makes a version of the projection the one that is read, in one update
// that is atomic for every reader: a later one that was held back, or an earlier
// one, to go back. The name may have a version behind it, which does not count. A
// version that somebody has gone back from is from then on made active by Activate
// alone.
//
// Reads never go back: a version must contain everything that could be read before,
// and if it does not, because it has not caught up or nobody runs it any more, the
// error is a [*BehindError]; see [AlthoughBehind]. A version that was never begun is
// [ErrNoVersion]. Activating the active one does nothing.
func (e *Engine) Activate(ctx context.Context, name string, version int, options ...ActivateOption) error {
	act, err := e.admin().activation(name, version, options)
	if err != nil {
		return err
	}
	return act.insist(ctx, activateTries, func(ctx context.Context) error {
		_, err := e.activate(ctx, act)
		return err
	})
}

func (e *Engine) admin() *Admin { return NewAdmin(e.state, e.options.Owner) }

// activate is activation.update, with the runners that this engine has of the
// versions at rest or brought up to date: their checkpoints may lag behind.
func (e *Engine) activate(ctx context.Context, act activation) (changed bool, err error) {
	var s stack
	if err := e.state.View(ctx, func(tx StateTx) (err error) {
		s, err = readStack(tx, act.base)
		return err
	}); err != nil {
		return false, err
	}
	_, left := s.activated(act.version)
	near, err := e.near(ctx, act, left)
	if err != nil {
		return false, err
	}
	if near && !act.althoughBehind {
		held, cancel := context.WithTimeout(ctx, holdAtMost)
		defer cancel()
		for _, version := range left {
			if old := e.other(act.base, version); old != nil {
				for _, r := range old.runners {
					defer r.rest(held)()
				}
			}
		}
		e.bringUp(held, act, left)
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	changed, err = act.update(ctx, e.state)
	if err == nil {
		e.forgetSeen(act.base)
	}
	return changed, err
}

// near reports whether it is not far to where the version must be: nothing has to
// rest for one that will not get there.
func (e *Engine) near(ctx context.Context, act activation, left []int) (bool, error) {
	near := false
	err := e.state.View(ctx, func(tx StateTx) error {
		at, _, err := heldUnits(tx, versionName(act.base, act.version), false)
		if err != nil {
			return err
		}
		if en := e.other(act.base, act.version); en != nil {
			at.least = max(at.least, en.reached()) // what is stored lags behind
		}
		near = true
		for _, version := range left {
			old, _, err := heldUnits(tx, versionName(act.base, version), false)
			if err != nil {
				return err
			}
			near = near && at.least+nearby >= old.most
		}
		return nil
	})
	return near, err
}

// bringUp has the version's runners here come as far as what is read, and write
// that down. What they do not get done until ctx ends is left to another try.
func (e *Engine) bringUp(ctx context.Context, act activation, left []int) {
	en := e.other(act.base, act.version)
	if en == nil {
		return
	}
	var wanted eventstore.Position
	if err := e.state.View(ctx, func(tx StateTx) error {
		for _, version := range left {
			at, _, err := heldUnits(tx, versionName(act.base, version), false)
			if err != nil {
				return err
			}
			wanted = max(wanted, at.most)
		}
		return nil
	}); err != nil {
		return
	}
	for _, r := range en.runners {
		if _, own := r.progress.owned(); !own || r.progress.wait(ctx, wanted, false) != nil {
			continue
		}
		r.between(ctx, func(ctx context.Context, lease Lease) error {
			if through := r.progress.reached(); !r.stored.IsZero() && through > r.stored.Position {
				return r.mark(ctx, lease, through)
			}
			return nil
		})
	}
}

// forgetSeen has it looked up again which version is read.
func (e *Engine) forgetSeen(base string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, en := range e.entries {
		if en.projection.origin().base == base {
			en.seen.Store(nil)
		}
	}
}

// between has do run by the goroutine that runs the projection, between two
// batches, if it runs here, and returns when that is done or ctx has ended.
func (r *runner) between(ctx context.Context, do func(ctx context.Context, lease Lease) error) {
	if _, own := r.progress.owned(); !own {
		return
	}
	q := request{ctx: ctx, do: do, between: true, done: make(chan error, 1)}
	select {
	case r.requests <- q:
	case <-ctx.Done():
		return
	}
	select {
	case err := <-q.done:
		_ = err // it ends the run, and shows there
	case <-ctx.Done():
	}
}

// rest keeps the projection, if it runs here, from going on until it is woken or
// ctx ends.
func (r *runner) rest(ctx context.Context) (wake func()) {
	woken, resting := make(chan struct{}), make(chan struct{})
	limited, cancel := context.WithCancel(ctx)
	go func() {
		r.between(limited, func(run context.Context, _ Lease) error {
			close(resting)
			select {
			case <-woken:
			case <-run.Done():
			case <-limited.Done():
			}
			return nil
		})
		cancel()
	}()
	select {
	case <-resting:
	case <-limited.Done():
	}
	return func() {
		close(woken)
		cancel()
	}
}

// reportEvery is how often a version that is built says how far it has come.
const reportEvery = 10 * time.Second

// promoteAgain and promoteAtMost are the pauses after a version could not be
// compared or made the active one for another reason than being behind.
const (
	promoteAgain  = 500 * time.Millisecond
	promoteAtMost = time.Minute
)

// promote makes the version that the runner builds the active one, beside it, when
// all partitions have caught up: it is the first partition's. What it does ends with
// the lease.
func (r *runner) promote(ctx context.Context) (stop func()) {
	of := r.projection.origin()
	if of.version <= 1 || r.part.index != 0 {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	r.asides.Go(func() {
		p := &promotion{r: r, of: of, reported: time.Now()}
		pause, failing := lookAtFirst, time.Duration(0)
		for {
			done, err := p.advance(ctx)
			if done || ctx.Err() != nil {
				return
			}
			wait := pause
			pause = min(2*pause, p.longest())
			if err == nil || errors.Is(err, ErrBehind) {
				failing = 0
			} else {
				failing = min(max(2*failing, promoteAgain), promoteAtMost)
				wait = failing
				r.engine.options.Logger.Warn("a version could not be made the active one, and it is tried again", "projection", of.base, "version", of.version, "after", wait, "error", err)
				r.progress.change(func() { r.progress.lastErr, r.progress.errAt = err, r.engine.options.Clock.Now() })
			}
			if sleep(ctx, wait) != nil {
				return
			}
		}
	})
	return cancel
}

// promotion is how far it is with making a version the active one.
type promotion struct {
	r        *runner
	of       origin
	head     eventstore.Position // when it was looked last
	looked   bool
	compared bool
	reported time.Time
}

func (p *promotion) longest() time.Duration {
	if p.compared {
		return lookAtLast / 2 // what is missing is that the right moment comes
	}
	return 2 * lookAtLast
}

// advance does what can be done now.
func (p *promotion) advance(ctx context.Context) (done bool, err error) {
	r, of := p.r, p.of
	var known record
	var s stack
	if err := r.engine.state.View(ctx, func(tx StateTx) (err error) {
		if s, err = readStack(tx, of.base); err == nil {
			known, _, err = readRecord(tx, of.base, of.version)
		}
		return err
	}); err != nil {
		return false, err
	}
	if !known.Activated.IsZero() || s.top() >= of.version {
		return true, nil
	}
	if caught, err := p.caughtUp(ctx); err != nil || !caught {
		return false, err
	}
	if !p.compared {
		c, err := compareVersions(ctx, r.engine.state, of.base, s.readBy(of.version), of.version)
		switch {
		case errors.Is(err, ErrNoVersion): // the earlier one was dropped, or emptied
		case err != nil:
			return false, err
		default:
			if err := p.note(ctx, c); err != nil {
				return false, err
			}
		}
		p.compared = true
	}
	if of.heldBack {
		r.engine.options.Logger.Info("a version of a projection is built, and held back", "projection", of.base, "version", of.version, "active", s.top())
		return true, nil
	}
	if set, err := p.setAside(ctx, s.readBy(of.version)); err != nil {
		return false, err
	} else if set > 0 {
		return false, fmt.Errorf("it has set aside %d events more than the active version: replay or skip them, or activate it as it is", set)
	}
	changed, err := r.engine.activate(ctx, activation{base: of.base, version: of.version, by: r.engine.options.Owner, unasked: true, patience: holdAtMost})
	if errors.Is(err, errAsked) {
		return true, nil
	}
	if err == nil && changed {
		r.engine.options.Logger.Info("another version of a projection is read from now on", "projection", of.base, "version", of.version, "before", s.top(), "position", p.head)
	}
	return err == nil, err
}

// caughtUp reports whether all partitions have come to where the log ended when it
// was asked before.
func (p *promotion) caughtUp(ctx context.Context) (bool, error) {
	r := p.r
	wanted := p.head
	head, err := r.engine.store.Head(ctx)
	if err != nil {
		return false, err // and wanted stays what it is
	}
	p.head = head
	least := p.head
	for _, other := range r.engine.other(p.of.base, p.of.version).runners {
		at, own := other.progress.owned()
		if !own {
			if err := r.engine.state.View(ctx, func(tx StateTx) error {
				c, err := tx.Checkpoint(other.leaseName())
				at = c.Position
				return err
			}); err != nil {
				return false, err
			}
		}
		least = min(least, at)
	}
	if time.Since(p.reported) >= reportEvery {
		p.reported = time.Now()
		rate := r.progress.speed()
		r.engine.options.Logger.Info("a version of a projection is being built", "projection", p.of.base, "version", p.of.version,
			"position", least, "head", p.head, "rate", rate, "left", timeLeft(uint64(p.head-least), rate))
	}
	looked := p.looked
	p.looked = true
	return looked && least >= wanted, nil
}

// setAside returns how many events more than the other version it has set aside.
func (p *promotion) setAside(ctx context.Context, other int) (more int, err error) {
	err = p.r.engine.state.View(ctx, func(tx StateTx) error {
		more = 0
		for version, sign := range map[int]int{p.of.version: 1, other: -1} {
			units, err := storedUnits(tx, versionName(p.of.base, version))
			if err != nil {
				return err
			}
			for _, unit := range units {
				for _, err := range tx.Scan(deadTable(unit), Range{}) {
					if err != nil {
						return err
					}
					more += sign
				}
			}
		}
		return nil
	})
	return more, err
}

// note keeps the comparison for who asks, and says it.
func (p *promotion) note(ctx context.Context, c Comparison) error {
	if err := p.r.engine.state.Update(ctx, func(tx StateTx) error {
		if err := serialise(tx, p.of.base); err != nil {
			return err
		}
		known, _, err := readRecord(tx, p.of.base, p.of.version)
		if err != nil {
			return err
		}
		known.Comparison = &c
		return putJSON(tx, versions, recordKey(p.of.base, p.of.version), known)
	}); err != nil {
		return err
	}
	p.r.engine.options.Logger.Info("a version of a projection was compared with the active one", "projection", p.of.base, "version", p.of.version, "active", c.From.Version,
		"rows", c.To.Rows, "before", c.From.Rows, "added", c.Added, "removed", c.Removed, "changed", c.Changed)
	return nil
}

// timeLeft is how long it takes at that rate; 0 when it is not known.
func timeLeft(positions uint64, rate float64) time.Duration {
	if positions == 0 || rate <= 0 {
		return 0
	}
	return time.Duration(min(float64(positions)/rate, 1e9) * float64(time.Second))
}

// VersionInfo is a version of a projection, as it is stored.
type VersionInfo struct {
	// Name is the projection's, without a version.
	Name    string `json:"name"`
	Version int    `json:"version"`
	// Active: it is the one that is read.
	Active bool `json:"active"`
	// Position is how far it has come; of several partitions, the one that is
	// furthest behind.
	Position eventstore.Position `json:"position"`
	// Activated is when it became the active one for the first time; zero if it never
	// did, or was the first.
	Activated time.Time `json:"activated,omitzero"`
	// Comparison is that with the version that was active when it was built; nil if
	// there is none.
	Comparison *Comparison `json:"comparison,omitempty"`
}

// Versions returns the versions of a projection that are stored, ascending. The
// name may have a version behind it, which does not count.
func (e *Engine) Versions(ctx context.Context, name string) ([]VersionInfo, error) {
	return e.admin().Versions(ctx, name)
}

// Versions is [Engine.Versions].
func (a *Admin) Versions(ctx context.Context, name string) (all []VersionInfo, err error) {
	if err := validateUnit(name); err != nil {
		return nil, err
	}
	base, _, _ := splitUnit(name)
	err = a.state.View(ctx, func(tx StateTx) error {
		all = nil
		s, err := readStack(tx, base)
		if err != nil {
			return err
		}
		known, err := knownVersions(tx, base)
		if err != nil {
			return err
		}
		for _, v := range known {
			at, begun, err := heldUnits(tx, versionName(base, v), false)
			if err != nil {
				return err
			}
			r, _, err := readRecord(tx, base, v)
			if err != nil {
				return err
			}
			if begun || s.top() == v {
				all = append(all, VersionInfo{Name: base, Version: v, Active: s.top() == v, Position: at.least, Activated: r.Activated, Comparison: r.Comparison})
			}
		}
		return nil
	})
	return all, err
}

// DropVersion removes a version of a projection that is not read and that nobody
// runs: its rows, checkpoints and dead letters; of an SQL projection it runs the
// statements of Reset. The name may have a version behind it, which does not count.
// The active version is refused with [ErrActive], one that somebody runs, or that a
// version which is being built reads, with [ErrLeaseHeld].
func (e *Engine) DropVersion(ctx context.Context, name string, version int) error {
	return e.admin().DropVersion(ctx, name, version)
}

// dropAtMost is for how long the leases of what is dropped are taken, at first.
const dropAtMost = time.Minute

// DropVersion is [Engine.DropVersion].
func (a *Admin) DropVersion(ctx context.Context, name string, version int) (err error) {
	if err := errors.Join(append(checkVersion(version), validateUnit(name))...); err != nil {
		return err
	}
	base, _, _ := splitUnit(name)
	defer func() {
		if err != nil {
			err = fmt.Errorf("drop version %d of projection %q: %w", version, base, err)
		}
	}()
	var units []string
	if err := a.state.View(ctx, func(tx StateTx) (err error) {
		if err = droppable(tx, base, version); err == nil {
			units, err = storedUnits(tx, versionName(base, version))
		}
		return err
	}); err != nil {
		return err
	}
	by := a.by + "/" + uuid.NewString() // an owner would take its own leases over
	var leases []Lease
	defer func() {
		for _, l := range leases {
			err = errors.Join(err, a.state.Release(context.WithoutCancel(ctx), l))
		}
	}()
	for _, unit := range units {
		l, err := a.state.Acquire(ctx, leaseName(unit), by, dropAtMost)
		if err != nil {
			return err
		}
		leases = append(leases, l)
	}
	return a.state.Update(ctx, func(tx StateTx) error {
		for _, l := range leases {
			if err := tx.Fence(l); err != nil {
				return err
			}
		}
		if err := serialise(tx, base); err != nil {
			return err
		}
		if err := droppable(tx, base, version); err != nil {
			return err
		}
		return drop(ctx, tx, base, version, units, leases)
	})
}

// droppable refuses versions that are read.
func droppable(tx StateTx, base string, version int) error {
	_, begun, err := heldUnits(tx, versionName(base, version), false)
	if err != nil {
		return err
	}
	if !begun {
		return fmt.Errorf("%w: %d", ErrNoVersion, version)
	}
	s, err := readStack(tx, base)
	if err != nil {
		return err
	}
	if s.top() == version {
		return fmt.Errorf("%w: activate another one before", ErrActive)
	}
	known, err := knownVersions(tx, base)
	if err != nil {
		return err
	}
	for _, other := range known {
		if other != version && s.readBy(other) == version {
			return fmt.Errorf("%w: those who have version %d read this one: activate that, or drop it before", ErrLeaseHeld, other)
		}
	}
	return nil
}

func drop(ctx context.Context, tx StateTx, base string, version int, units []string, leases []Lease) error {
	name := versionName(base, version)
	known, _, err := readRecord(tx, base, version)
	if err != nil {
		return err
	}
	s, err := readStack(tx, base)
	if err != nil {
		return err
	}
	kept := stack{By: s.By, At: s.At}
	for _, r := range s.Read {
		if r != version {
			kept.Read = append(kept.Read, r)
		}
	}
	if err := putJSON(tx, versions, base, kept); err != nil {
		return err
	}
	for i, unit := range units {
		if err := tx.DeleteCheckpoint(leases[i]); err != nil {
			return err
		}
		if err := errors.Join(tx.Delete(tallies, unit), tx.Delete(tallies, inlineKey(unit)), tx.Delete(pauses, unit)); err != nil {
			return err
		}
		for _, table := range []string{deadTable(unit), skippedTable(unit), orderTable(unit)} {
			if err := tx.Clear(table); err != nil {
				return err
			}
		}
	}
	if err := errors.Join(tx.Delete(layouts, name), tx.Delete(versions, recordKey(base, version))); err != nil {
		return err
	}
	if known.SQL {
		return runAll(ctx, tx, "reset", known.Reset)
	}
	return dropRows(tx, "view."+name)
}
