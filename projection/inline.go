package projection

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// Inliner is the optional power of a [State] that is one store with the log: to
// apply projections in the transaction of the append itself. [Engine.Add] looks for
// it when it is given a [ViewDefinition.Inline] projection.
type Inliner interface {
	// Inline has every append of this store, from the next batch on, do what a says,
	// until stop is called, after which a is not called any more by a batch that
	// begins then. An append that another process makes does not.
	Inline(a Appends) (stop func())
	// UpdateAtHead is [State.Update] while nobody, in whatever process, can append:
	// head is where the log ends until the update has. fn may read the log.
	UpdateAtHead(ctx context.Context, fn func(tx StateTx, head eventstore.Position) error) error
}

// Appends is what has to be done with the appends of a store. An engine gives it to
// an [Inliner], which calls it.
type Appends interface {
	// Begin is called once for each transaction that appends, when nobody else can
	// append any more, and the log ends at head. The transaction may hold several
	// commits. Where reading is a round trip, events are all that Apply will be given,
	// so that what they need is read together; an error of Apply is then the end of the
	// transaction. Elsewhere they are nil.
	Begin(ctx context.Context, tx AppendTx, head eventstore.Position, events []eventstore.Recorded) (Appending, error)
	// Passed says that the events up to the position were, or may have been, written
	// without Begin. It is called before the append is answered.
	Passed(through eventstore.Position)
}

// Appending is what is done in one transaction that appends. After an error that
// is no [*InlineError] the transaction must be abandoned.
type Appending interface {
	// Apply is given the events of one commit, before or after they are written. An
	// error that is an [*InlineError] is to fail this commit and no other: the
	// backend takes back what was written to tx since Apply was called, and the
	// commit.
	Apply(ctx context.Context, commit []eventstore.Recorded) error
	// Refuse returns the [*InlineError] of a commit for which Apply has failed otherwise,
	// with the cause, whenever it was tried: the backend takes that for the handlers' doing.
	Refuse(commit []eventstore.Recorded, cause error) error
	// End is called behind the last commit; the log will end at head.
	End(ctx context.Context, head eventstore.Position) error
	// Committed is called when the transaction has been, before the appends are
	// answered.
	Committed()
}

// AppendTx is a transaction on the state that is an append's too.
type AppendTx interface {
	StateTx
	// Hold keeps the leases of the names from being acquired, and updates from being
	// fenced by them, until the transaction ends, and returns what is stored under
	// the names. It does not wait: a name is missing from the result if it never had a
	// lease, if somebody else's transaction has the lease or the checkpoint just now, or
	// if it was held in this transaction before. Behind that it reads rows, on a server
	// in the same round trip.
	Hold(names []string, reads ...Read) (map[string]Held, error)
}

// Read asks for the rows of a table under some keys. Found is called for those
// that are there, with the index of the key.
type Read struct {
	Table string
	Keys  []string
	Found func(i int, value []byte)
}

// Held is what [AppendTx.Hold] finds under a name.
type Held struct {
	Lease      Lease
	Checkpoint Checkpoint
}

// InlineError says that an inline projection could not apply an event, so that the
// commit it belongs to was not written. It is the append's error; errors.Is and
// errors.As see the Cause too, unless that would make it look like a conflict or
// like a failure of the store, which are tried again.
type InlineError struct {
	// Projection is the projection's name.
	Projection string
	// Stream, Type and Version are the event's, as it would have been written.
	Stream  eventstore.Stream
	Type    string
	Version uint64
	// Cause is the handler's error, a [*PanicError] if it has panicked.
	Cause error
}

// Error names the projection and the event.
func (e *InlineError) Error() string {
	return fmt.Sprintf("append: nothing was written: inline projection %q cannot apply event %q, version %d of stream %q: %v",
		e.Projection, e.Type, e.Version, e.Stream, e.Cause)
}

// Unwrap returns the cause.
func (e *InlineError) Unwrap() error {
	if eventstore.CanRetry(e.Cause) {
		return nil // it is no verdict on the append
	}
	return e.Cause
}

// Inline returns the view such that it is applied by the appends themselves, in
// their transactions: when an append returns, the rows contain its events, and
// whoever reads them then, in whatever process, does so without waiting. A handler
// that panics fails the append of its commit with an [*InlineError], and nothing of
// that commit is written.
//
// It needs a store that keeps log and read models in one database (SQLite,
// PostgreSQL, memory); on others the application does not start. It cannot be divided
// into partitions, nor have versions: see the package's documentation, also for what
// it costs.
func (v *ViewDefinition[R]) Inline() *ViewDefinition[R] {
	w := *v
	w.inlined = true
	w.mistakes = slices.Clip(w.mistakes)
	return &w
}

// Inline is [ViewDefinition.Inline]. The handlers run in the transaction of the
// append; one that returns an error fails its commit. On PostgreSQL postgres.Transaction
// is not available to them.
func (d *SQLDefinition) Inline() *SQLDefinition {
	e := *d
	e.inlined = true
	e.mistakes = slices.Clip(e.mistakes)
	return &e
}

func (v *ViewDefinition[R]) inline() bool { return v.inlined }
func (d *SQLDefinition) inline() bool     { return d.inlined }

// checkInline returns what an inline projection cannot be.
func checkInline(inline bool, parts, version int) error {
	switch {
	case !inline:
	case parts > 1:
		return fmt.Errorf("%w: it is inline and has %d partitions: every append would have to move the checkpoints of all of them: leave one of the two out", eventstore.ErrInvalid, parts)
	case version > 1:
		return fmt.Errorf("%w: it is inline and version %d: while a version is built another one is read, which appends need not know: give the changed projection another name, or build the version without Inline", eventstore.ErrInvalid, version)
	}
	return nil
}

// An inline projection is either in the hands of its owner, the runner with the
// lease, or of the appends. Which of them is written down in a mark. While it is not
// there, the owner does what owners do, and appends leave the rows alone. When the
// owner has caught up it writes the mark, in an update during which nobody can
// append. From then on it touches nothing; appends move rows and checkpoint, each from
// the head of the log to the next, and only as long as
//
//   - the mark has the epoch of the lease, so that it is void when anybody acquires
//     the lease, also somebody who knows nothing of it;
//   - the checkpoint is the head of the log, so that whoever finds that an append was
//     made without the projection leaves it alone;
//   - nobody's update is fenced by the lease at this moment.
//
// The owner looks whether the checkpoint follows the log. If not, and before it does
// anything that is asked of it, it removes the mark.
type inlineMark struct {
	Epoch uint64 `json:"epoch"`
	// Handles is what the projection handles and which indexes it has: a process with
	// another definition of that name leaves it alone.
	Handles string `json:"handles"`
}

// inlineKey is where the mark is, in the table of tallies: one look finds both.
func inlineKey(unit string) string { return unit + "/inline" }

const (
	// mostJoined is how many positions are left to the update that hands the
	// projection over to the appends; for as long as it runs they wait.
	mostJoined = 1000
	// longestInline is how long the handlers of one commit may take. Whatever is
	// longer would stop everybody's appends.
	longestInline = 2 * time.Second
	// joinAgain is for how long an owner keeps the projection after an append was
	// made without it: whoever makes such appends will make more.
	joinAgain = 50 * time.Millisecond
)

var errInlineSlow = fmt.Errorf("its handlers took longer than %s, for which nobody else can append: do that in a projection that is not inline", longestInline)

// inlines are the inline projections of an engine.
type inlines struct {
	power Inliner
	stop  func()

	joining sync.Mutex // one at a time: each needs two connections
	mu      sync.Mutex
	units   []*inlineUnit
}

// inlineUnit is one of them.
type inlineUnit struct {
	r       *runner
	query   eventstore.Query
	handles string
	passed  atomic.Uint64 // the last position that this store has written without it
}

func (u *inlineUnit) pass(p eventstore.Position) {
	for {
		was := u.passed.Load()
		if was >= uint64(p) || u.passed.CompareAndSwap(was, uint64(p)) {
			return
		}
	}
}

// addInline makes the appends of the engine's store apply the projection.
func (e *Engine) addInline(r *runner) error {
	if e.inline == nil {
		power, ok := eventstore.Find[Inliner](e.store)
		if !ok {
			return fmt.Errorf("projection %q: inline: %w: %T cannot apply projections in the transaction of an append: use SQLite, PostgreSQL or memory, or leave Inline out and read with query.AtLeast", r.unit, errors.ErrUnsupported, e.store)
		}
		if state, ok := power.(State); !ok || state != e.state {
			return fmt.Errorf("projection %q: inline: %w: its rows are kept in another database (%T) than the events (%T): leave Inline out and read with query.AtLeast, or keep both in one", r.unit, errors.ErrUnsupported, e.state, power)
		}
		e.inline = &inlines{power: power}
		e.inline.stop = power.Inline(e.inline)
	}
	u := &inlineUnit{r: r, query: r.projection.selection(e.options.Encoding, r.part), handles: r.projection.handles()}
	r.inline = u
	e.inline.mu.Lock()
	defer e.inline.mu.Unlock()
	e.inline.units = append(slices.Clip(e.inline.units), u)
	return nil
}

// Close takes the engine's inline projections out of the appends of its store,
// which from then on leave them behind. An application does that when it stops.
func (e *Engine) Close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.inline != nil && e.inline.stop != nil {
		e.inline.stop()
		e.inline.stop = nil
	}
}

// Unapplied returns the last position that was appended here, by the engine's
// store, without applying the inline projection in the same transaction: so much its
// rows must contain, for this process to read its own writes. It also reports whether
// the projection is inline; others have no such position. Package query asks for it.
func (e *Engine) Unapplied(name string) (p eventstore.Position, inline bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if i := e.index(name); i >= 0 {
		if u := e.entries[i].runners[0].inline; u != nil {
			return eventstore.Position(u.passed.Load()), true
		}
	}
	return 0, false
}

// Passed implements Appends.
func (i *inlines) Passed(through eventstore.Position) {
	for _, u := range i.all() {
		u.pass(through)
	}
}

func (i *inlines) all() []*inlineUnit {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.units
}

// Begin implements Appends.
func (i *inlines) Begin(_ context.Context, tx AppendTx, head eventstore.Position, events []eventstore.Recorded) (Appending, error) {
	units := i.all()
	a := &appending{staged: staged{StateTx: tx}}
	names := make([]string, len(units))
	keys := make([]string, 0, 2*len(units))
	values := make([][]byte, 2*len(units))
	reads := []Read{{Table: tallies, Found: func(n int, value []byte) { values[n] = value }}}
	parts := make([]*inlinePart, len(units))
	for n, u := range units {
		names[n] = u.r.leaseName()
		keys = append(keys, u.r.unit, inlineKey(u.r.unit))
		parts[n] = &inlinePart{u: u, folder: u.r.projection.open(nil, &u.r.engine.options, u.r.part)}
	}
	reads[0].Keys = keys
	if len(events) > 0 {
		a.first = events[0].Position
		if err := alone(func() error {
			for _, p := range parts {
				if table, keys := p.expect(events); len(keys) > 0 {
					reads = append(reads, a.staged.ahead(table, keys))
				}
			}
			return nil
		}); err != nil {
			// It will show again, and whose fault it is, when commits are applied one by one.
			a.first, a.staged.rows, reads = 0, nil, reads[:1]
		}
	}
	held, err := tx.Hold(names, reads...)
	if err != nil {
		return nil, err
	}
	for n, p := range parts {
		h, ok := held[names[n]]
		mark, applies := inlineMark{}, false
		if ok && h.Checkpoint.Position == head && h.Checkpoint.Log != "" && values[2*n+1] != nil {
			if err := unmarshalRow(tallies, keys[2*n+1], values[2*n+1], &mark); err != nil {
				return nil, err
			}
			applies = mark.Epoch == h.Lease.Epoch && mark.Handles == p.u.handles
		}
		if !applies {
			a.behind = append(a.behind, p.u)
			continue
		}
		p.held = h
		if p.tells = values[2*n] != nil; p.tells {
			if err := unmarshalRow(tallies, keys[2*n], values[2*n], &p.tally); err != nil {
				return nil, err
			}
		}
		a.parts = append(a.parts, p)
	}
	return a, nil
}

// appending implements Appending.
type appending struct {
	staged staged
	parts  []*inlinePart
	behind []*inlineUnit
	head   eventstore.Position
	first  eventstore.Position // of the events that were known when it began; 0: none were
	at     *inlinePart         // what applies, or was the last to
}

// inlinePart is a projection that the transaction applies.
type inlinePart struct {
	u      *inlineUnit
	held   Held
	folder folder
	tally  tally
	tells  bool
	next   tally  // with the commit that is being applied
	items  []item // of the events that were known when it began, where they concern it
	events int
}

func (p *inlinePart) decode(e *eventstore.Recorded) (it item, concerns bool) {
	if !p.u.query.Matches(e) {
		return item{}, false
	}
	it = item{event: e}
	p.folder.decode(&it)
	return it, !it.foreign
}

// expect decodes what is to come, and says which rows that needs.
func (p *inlinePart) expect(events []eventstore.Recorded) (table string, keys []string) {
	p.items = make([]item, len(events))
	var concern []item
	for i := range events {
		if it, ok := p.decode(&events[i]); ok {
			p.items[i] = it
			concern = append(concern, it)
		}
	}
	if len(concern) == 0 {
		return "", nil
	}
	return p.folder.reads(concern)
}

// Apply implements Appending.
func (a *appending) Apply(ctx context.Context, commit []eventstore.Recorded) error {
	if len(a.parts) == 0 {
		return nil
	}
	began := time.Now()
	a.at = a.parts[0]
	err := alone(func() error {
		for _, p := range a.parts {
			a.at = p
			if err := a.apply(ctx, p, commit); err != nil {
				return err
			}
			if time.Since(began) > longestInline {
				return p.refuse(&commit[0], errInlineSlow)
			}
		}
		return nil
	})
	if err != nil {
		for _, p := range a.parts {
			p.folder.forget() // the rows are not what it has made of them
		}
		if _, panicked := errors.AsType[*PanicError](err); panicked || errors.Is(err, errGoexit) {
			if _, told := errors.AsType[*InlineError](err); !told {
				err = a.at.refuse(&commit[0], err)
			}
		}
		return err
	}
	for _, p := range a.parts {
		p.events += int(p.next.Events - p.tally.Events)
		p.tally = p.next
	}
	return nil
}

func (a *appending) apply(ctx context.Context, p *inlinePart, commit []eventstore.Recorded) error {
	items := make([]item, 0, len(commit))
	for i := range commit {
		if a.first != 0 {
			if it := &p.items[commit[i].Position-a.first]; it.event != nil {
				items = append(items, *it)
			}
		} else if it, ok := p.decode(&commit[i]); ok {
			items = append(items, it)
		}
	}
	p.next = p.tally
	if len(items) == 0 {
		return nil
	}
	p.next = p.tally.count(items)
	err := p.folder.applyIn(ctx, &a.staged, items)
	switch failure := (*handlerError)(nil); {
	case err == nil:
		return nil
	case errors.As(err, &failure):
		return p.refuse(items[failure.index].event, failure.cause)
	case errors.Is(err, errRowShape):
		return p.refuse(items[0].event, err)
	}
	return err
}

func (p *inlinePart) refuse(e *eventstore.Recorded, cause error) error {
	return &InlineError{Projection: p.u.r.projection.Name(), Stream: e.Stream, Type: e.Type, Version: e.Version, Cause: cause}
}

// Refuse implements Appending.
func (a *appending) Refuse(commit []eventstore.Recorded, cause error) error {
	if a.at == nil {
		return cause
	}
	return a.at.refuse(&commit[0], cause)
}

// End implements Appending.
func (a *appending) End(_ context.Context, head eventstore.Position) error {
	a.head = head
	for _, p := range a.parts {
		lease, from := p.held.Lease, p.held.Checkpoint
		next := Checkpoint{Log: from.Log, Epoch: lease.Epoch, Position: head}
		if err := a.staged.SetCheckpoint(lease, from, next); err != nil {
			return fmt.Errorf("inline projection %q: %w", p.u.r.unit, err)
		}
		if p.tells && p.events > 0 {
			if err := putJSON(&a.staged, tallies, p.u.r.unit, p.tally); err != nil {
				return err
			}
		}
	}
	return nil
}

// Committed implements Appending.
func (a *appending) Committed() {
	for _, u := range a.behind {
		u.pass(a.head)
	}
	for _, p := range a.parts {
		r := p.u.r
		r.progress.applied(a.head)
		r.engine.telemetry.events.Add(context.Background(), int64(p.events), r.attributes)
	}
}

var errGoexit = errors.New("a handler has ended its goroutine")

// alone runs what calls handlers on a goroutine of its own: one that ends its
// goroutine, as runtime.Goexit does, must not end the store's.
func alone(do func() error) (err error) {
	done := make(chan struct{})
	err = errGoexit
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				err = &PanicError{Value: p, Stack: debug.Stack()}
			}
		}()
		err = do()
	}()
	<-done
	return err
}

// staged is a transaction of which some rows were read before they are asked for.
type staged struct {
	StateTx
	rows map[stagedKey][]byte // nil: there is none
}

type stagedKey struct{ table, key string }

// ahead asks for rows that are then known.
func (s *staged) ahead(table string, keys []string) Read {
	if s.rows == nil {
		s.rows = make(map[stagedKey][]byte, len(keys))
	}
	for _, key := range keys {
		s.rows[stagedKey{table, key}] = nil
	}
	return Read{Table: table, Keys: keys, Found: func(i int, value []byte) { s.rows[stagedKey{table, keys[i]}] = value }}
}

// Get implements StateTx.
func (s *staged) Get(table, key string) ([]byte, bool, error) {
	if value, known := s.rows[stagedKey{table, key}]; known {
		return value, value != nil, nil
	}
	return s.StateTx.Get(table, key)
}

// GetAll is Get of several keys.
func (s *staged) GetAll(table string, keys []string, found func(i int, value []byte)) error {
	var missing []string
	var at []int
	for i, key := range keys {
		value, known := s.rows[stagedKey{table, key}]
		switch {
		case !known:
			missing, at = append(missing, key), append(at, i)
		case value != nil:
			found(i, value)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return getAll(s.StateTx, table, missing, func(i int, value []byte) { found(at[i], value) })
}

// Put implements StateTx.
func (s *staged) Put(table, key string, value []byte) error {
	if _, known := s.rows[stagedKey{table, key}]; known {
		s.rows[stagedKey{table, key}] = value
	}
	return s.StateTx.Put(table, key, value)
}

// Delete implements StateTx.
func (s *staged) Delete(table, key string) error {
	if _, known := s.rows[stagedKey{table, key}]; known {
		s.rows[stagedKey{table, key}] = nil
	}
	return s.StateTx.Delete(table, key)
}

// errNotYet: the projection is too far behind to be handed over to the appends.
var errNotYet = errors.New("too far behind the log")

// joins reports whether the projection is to be handed over to the appends.
func (r *runner) joins() bool {
	return r.inline != nil && r.live && len(r.parked) == 0 && !r.paused && !time.Now().Before(r.joinAt)
}

// join hands the projection over to the appends, from where it is to the head of
// the log, while nobody can append.
func (r *runner) join(ctx context.Context, lease Lease) (joined bool, err error) {
	e := r.engine
	e.inline.joining.Lock()
	defer e.inline.joining.Unlock()
	reached := r.progress.reached()
	r.joined = true // perhaps, whatever comes back
	folder := r.projection.open(nil, &e.options, r.part)
	var next Checkpoint
	var applied tally
	err = e.inline.power.UpdateAtHead(ctx, func(tx StateTx, head eventstore.Position) error {
		if err := tx.Fence(lease); err != nil {
			return err
		}
		if head < reached || head-reached > mostJoined {
			return errNotYet
		}
		var events []eventstore.Recorded
		if head > reached {
			for event, err := range e.store.Read(ctx, r.inline.query, eventstore.ReadOptions{After: reached, Through: head}) {
				if err != nil {
					return err
				}
				events = append(events, event)
			}
		}
		p := &inlinePart{u: r.inline, folder: folder}
		var items []item
		for i := range events {
			if it, ok := p.decode(&events[i]); ok {
				items = append(items, it)
			}
		}
		if len(items) > 0 {
			if err := folder.applyIn(ctx, tx, items); err != nil {
				return err
			}
		}
		next = Checkpoint{Log: r.stored.Log, Epoch: lease.Epoch, Position: head}
		if err := tx.SetCheckpoint(lease, r.stored, next); err != nil {
			return err
		}
		applied = r.tally.count(items)
		if err := r.putTally(tx, applied); err != nil {
			return err
		}
		return putJSON(tx, tallies, inlineKey(r.unit), inlineMark{Epoch: lease.Epoch, Handles: r.inline.handles})
	})
	failure := (*handlerError)(nil)
	switch {
	case errors.Is(err, errNotYet):
		return false, nil
	case errors.As(err, &failure):
		return false, nil // the events are about to come, and it is set aside then if need be
	case err != nil:
		return false, err
	}
	r.tally = applied
	r.stored = next
	r.folder.forget()
	r.progress.change(func() {
		r.progress.through, r.progress.stored, r.progress.phase, r.progress.inline = next.Position, next.Position, PhaseLive, true
	})
	e.options.Logger.Debug("projection is applied by appends", "projection", r.unit, "position", next.Position)
	return true, nil
}

// watch looks whether the appends move the projection, and touches nothing. It
// returns errRestart when the owner is to go on itself; the projection begins then by
// removing the mark.
func (r *runner) watch(ctx context.Context, lease Lease, arrivals <-chan arrival, ordered <-chan time.Time) error {
	leave := func() { r.progress.change(func() { r.progress.inline = false }) }
	defer leave()
	for {
		select {
		case a, more := <-arrivals:
			if !more {
				return errEnded
			}
			if a.err != nil {
				return a.err
			}
			if a.through <= r.progress.reached() {
				continue
			}
			var c Checkpoint
			if err := r.engine.state.View(ctx, func(tx StateTx) (err error) {
				c, err = tx.Checkpoint(r.leaseName())
				return err
			}); err != nil {
				return err
			}
			if c.Position < a.through || c.Log != r.stored.Log {
				r.engine.options.Logger.Debug("an append was made without the projection", "projection", r.unit, "position", c.Position, "log", a.through)
				r.joinAt = time.Now().Add(joinAgain)
				return errRestart
			}
			r.progress.applied(c.Position)
		case q := <-r.requests:
			leave() // before anything of it is done
			if err := r.serve(ctx, lease, q); err != nil {
				return err
			}
			return errRestart
		case <-ordered:
			waiting, err := r.ordered(ctx)
			if err != nil {
				return err
			}
			if waiting {
				return errRestart
			}
			if err := r.orders(ctx, lease, actionVerify); err != nil {
				return err
			}
		case <-r.progress.doubted:
			if err := r.engine.state.Update(ctx, func(tx StateTx) error { return tx.Fence(lease) }); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// withdraw takes the projection back from the appends, if they may have it, and
// looks where they have left it.
func (r *runner) withdraw(ctx context.Context, lease Lease) error {
	if !r.joined {
		return nil
	}
	r.folder.forget()
	err := r.engine.state.Update(ctx, func(tx StateTx) error {
		if err := tx.Fence(lease); err != nil {
			return err
		}
		if err := r.unmark(tx); err != nil {
			return err
		}
		var err error
		if r.stored, err = tx.Checkpoint(r.leaseName()); err != nil {
			return err
		}
		r.tally, r.tells, err = getJSON[tally](tx, tallies, r.unit)
		return err
	})
	r.joined = err != nil
	return err
}

// unmark removes the mark, if there is one.
func (r *runner) unmark(tx StateTx) error {
	_, marked, err := tx.Get(tallies, inlineKey(r.unit))
	if err != nil || !marked {
		return err
	}
	return tx.Delete(tallies, inlineKey(r.unit))
}

// handles names what the view handles, and its indexes.
func (v *ViewDefinition[R]) handles() string {
	all := append([]string{"view", v.category}, sortedKeys(v.handlers)...)
	for _, x := range v.indexes {
		all = append(all, "index "+x.name+" "+x.kind)
	}
	slices.Sort(all[2:])
	return strings.Join(all, "\n")
}

func (d *SQLDefinition) handles() string {
	return strings.Join(slices.Concat([]string{"sql"}, sortedKeys(d.handlers), d.setup), "\n")
}
