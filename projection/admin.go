package projection

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// Admin looks after projections from outside the processes that run them, as
// the deed command does: it needs the [State] and no definitions. What has to be
// done by the projection's own code is written down there as a request, which the
// process that runs the projection finds within about a second, or when it
// starts, and answers. An [Engine] that stands by asks its owner the same way.
//
// The methods that ask return when the request was answered. When ctx ends
// before, the request is taken back, unless it is being worked on; the error is
// ctx's and says so. Asking for the same again does no harm. On a state that is
// not [Shared] requests are found only when the projection starts. All methods may
// be called concurrently.
type Admin struct {
	state State
	by    string
	leave bool
	// patience is how long to wait until somebody begins with a request; 0 is
	// without end.
	patience time.Duration
}

// NewAdmin returns an Admin for the state. by says in the records who asked, for
// example "ann".
func NewAdmin(state State, by string) *Admin { return &Admin{state: state, by: by} }

// WithoutWaiting returns an Admin that only writes requests down: they are found
// when somebody runs the projection, and nobody is told how they went. It is for
// states that one process at a time can use, where the projection counts as
// started ([Engine.WaitFor], an application's Start) when they are done.
func (a *Admin) WithoutWaiting() *Admin { return &Admin{state: a.state, by: a.by, leave: true} }

var (
	// ErrNoDeadLetter: no event at that position is set aside.
	ErrNoDeadLetter = errors.New("no such dead letter")
	// ErrRefused: the process that runs the projection could not do what it was
	// asked for; the message is its own.
	ErrRefused = errors.New("the request was refused")
)

// DeadLetters returns the events that the projection has set aside, in the
// order of the log; none if there is no such projection.
func (a *Admin) DeadLetters(ctx context.Context, name string) ([]DeadLetter, error) {
	all, err := readUnits[DeadLetter](ctx, a.state, name, deadTable)
	return inOrder(all, func(d DeadLetter) eventstore.Position { return d.Position }), err
}

// Skipped returns the events that were given up since the projection was built,
// in the order of the log.
func (a *Admin) Skipped(ctx context.Context, name string) ([]SkippedEvent, error) {
	all, err := readUnits[SkippedEvent](ctx, a.state, name, skippedTable)
	return inOrder(all, func(d SkippedEvent) eventstore.Position { return d.Position }), err
}

// Replay is [Engine.ReplayDeadLetters] by whoever runs the projection.
func (a *Admin) Replay(ctx context.Context, name string) (replayed int, err error) {
	units, err := a.units(ctx, name)
	var errs []error
	for _, unit := range units {
		got, err := a.ask(ctx, unit, order{Action: actionReplay})
		replayed += got.Count
		errs = append(errs, err)
	}
	return replayed, errors.Join(append(errs, err)...)
}

// Skip is [Engine.SkipDeadLetter] by whoever runs the projection.
func (a *Admin) Skip(ctx context.Context, name string, p eventstore.Position, note string) error {
	if err := checkNote(note); err != nil {
		return err
	}
	units, err := a.units(ctx, name)
	if err != nil {
		return err
	}
	return eachThatHas(units, func(unit string) error {
		_, err := a.ask(ctx, unit, order{Action: actionSkip, Position: p, Note: note})
		return err
	})
}

// Rebuild makes whoever runs the projection empty it and fold the log again. It
// returns when the rows are gone, not when they are back.
func (a *Admin) Rebuild(ctx context.Context, name string) error {
	return a.askAll(ctx, name, order{Action: actionRebuild})
}

// Pause is [Engine.Pause] by whoever runs the projection.
func (a *Admin) Pause(ctx context.Context, name string) error {
	return a.askAll(ctx, name, order{Action: actionPause})
}

// Resume is [Engine.Resume] by whoever runs the projection.
func (a *Admin) Resume(ctx context.Context, name string) error {
	return a.askAll(ctx, name, order{Action: actionResume})
}

// askAll asks for it of every partition.
func (a *Admin) askAll(ctx context.Context, name string, o order) error {
	units, err := a.units(ctx, name)
	errs := []error{err}
	for _, unit := range units {
		_, err := a.ask(ctx, unit, o)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Verify is [Engine.Verify] by whoever runs the projection, which goes on
// meanwhile. When ctx ends it gives up as well, within about a second.
func (a *Admin) Verify(ctx context.Context, name string, options ...VerifyOption) (Verification, error) {
	units, err := a.units(ctx, name)
	if err != nil {
		return Verification{}, err
	}
	wanted := verifyOptions(options)
	var all Verification
	for i, unit := range units {
		got, err := a.askTelling(ctx, unit, order{Action: actionVerify}, func(p VerifyProgress) {
			p.Part, p.Parts = i+1, len(units)
			wanted.report(p)
		})
		switch {
		case err != nil:
			return Verification{}, err
		case got.Verification == nil && a.leave:
			continue
		case got.Verification == nil:
			return Verification{}, fmt.Errorf("%w: it was answered without a result", ErrRefused)
		case i == 0:
			all = *got.Verification
		default:
			all = all.and(*got.Verification)
		}
	}
	all.Name = name
	return all, nil
}

// units returns the names of the partitions of a projection. The name of one of
// them, as a list shows it, is that one.
func (a *Admin) units(ctx context.Context, name string) (units []string, err error) {
	if err := validateUnit(name); err != nil {
		return nil, err
	}
	err = a.state.View(ctx, func(tx StateTx) (err error) {
		units, err = storedUnits(tx, name)
		return err
	})
	return units, err
}

// order is a request in the state, and later its answer.
type order struct {
	Action   action              `json:"action"`
	Position eventstore.Position `json:"position,omitempty"`
	Note     string              `json:"note,omitempty"`
	By       string              `json:"by,omitempty"`
	Unread   bool                `json:"unread,omitempty"` // nobody waits for the answer
	Begun    bool                `json:"begun,omitempty"`
	Answered time.Time           `json:"answered,omitzero"`
	Answer   *answer             `json:"answer,omitempty"`
	// Progress is how far a verification has come.
	Progress *VerifyProgress `json:"progress,omitempty"`
}

type action string

const (
	actionReplay  action = "replay"
	actionSkip    action = "skip"
	actionRebuild action = "rebuild"
	actionVerify  action = "verify"
	actionPause   action = "pause"
	actionResume  action = "resume"
)

type answer struct {
	Count   int    `json:"count,omitempty"`
	Error   string `json:"error,omitempty"`
	Missing bool   `json:"missing,omitempty"` // the error is ErrNoDeadLetter

	Verification *Verification `json:"verification,omitempty"`
}

func (a *answer) err() error {
	switch {
	case a.Missing:
		return &told{ErrNoDeadLetter, a.Error}
	case a.Error != "":
		return &told{ErrRefused, a.Error}
	}
	return nil
}

// told is an error of another process.
type told struct {
	kind error
	text string
}

func (e *told) Error() string { return e.text }
func (e *told) Unwrap() error { return e.kind }

func orderTable(name string) string   { return "projection.requests." + name }
func deadTable(name string) string    { return "projection.dead." + name }
func skippedTable(name string) string { return "projection.skipped." + name }

// How often one who asked looks for the answer.
const (
	answerFirst = 5 * time.Millisecond
	answerLast  = 250 * time.Millisecond
)

// ask writes the request down and waits for the answer.
func (a *Admin) ask(ctx context.Context, name string, o order) (answer, error) {
	return a.askTelling(ctx, name, o, func(VerifyProgress) {})
}

// askTelling is ask, and reports what is new until there is an answer.
func (a *Admin) askTelling(ctx context.Context, name string, o order, report func(VerifyProgress)) (answer, error) {
	o.By, o.Unread = a.by, a.leave
	id, err := uuid.NewV7()
	if err != nil {
		return answer{}, err
	}
	key := id.String()
	if err := a.state.Update(ctx, func(tx StateTx) error { return putJSON(tx, orderTable(name), key, o) }); err != nil {
		return a.takeBack(context.WithoutCancel(ctx), name, key, err) // it may be there all the same
	}
	if a.leave {
		return answer{}, nil
	}
	asked, patience, told := time.Now(), a.patience, VerifyProgress{}
	for wait := answerFirst; ; wait = min(2*wait, answerLast) {
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return a.takeBack(context.WithoutCancel(ctx), name, key, context.Cause(ctx))
		}
		var now order
		var there bool
		err := a.state.View(ctx, func(tx StateTx) (err error) {
			now, there, err = getJSON[order](tx, orderTable(name), key)
			return err
		})
		if err == nil && now.Answer == nil && now.Progress != nil && *now.Progress != told {
			told = *now.Progress
			report(told)
		}
		switch {
		case err != nil && (ctx.Err() != nil || errors.Is(err, ErrUnavailable)):
		case err != nil:
			return a.takeBack(context.WithoutCancel(ctx), name, key, err)
		case !there:
			return answer{}, fmt.Errorf("%w: somebody has removed it", ErrRefused)
		case now.Answer != nil:
			_, _ = a.takeBack(ctx, name, key, nil)
			return *now.Answer, now.Answer.err()
		case now.Begun:
			patience = 0
		case patience > 0 && time.Since(asked) > patience:
			got, err := a.takeBack(ctx, name, key, errNobody)
			if !errors.Is(err, errWorking) {
				return got, err
			}
			patience = 0
		}
	}
}

var (
	errNobody  = errors.New("nobody has begun with the request")
	errWorking = errors.New("it is working on the request")
)

// takeBack removes the request, unless somebody works on it.
func (a *Admin) takeBack(ctx context.Context, name, key string, cause error) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var got order
	var there bool
	err := a.state.Update(ctx, func(tx StateTx) (err error) {
		got, there, err = getJSON[order](tx, orderTable(name), key)
		if err != nil || !there || got.Begun && got.Answer == nil {
			return err
		}
		return tx.Delete(orderTable(name), key)
	})
	switch {
	case cause == nil:
		return answer{}, err
	case err != nil:
		return answer{}, fmt.Errorf("%w: the request could not be taken back, and may still be worked on: %w", cause, err)
	case got.Answer != nil:
		return *got.Answer, got.Answer.err()
	case there && got.Begun:
		return answer{}, fmt.Errorf("%w: projection %q: %w", cause, name, errWorking)
	case !there:
		return answer{}, fmt.Errorf("ask whoever runs the projection %q: %w", name, cause)
	}
	return answer{}, fmt.Errorf("%w: no process that runs the projection %q has answered; the request was taken back, unless one had just begun it", cause, name)
}

func putJSON(tx StateTx, table, key string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return tx.Put(table, key, data)
}

func getJSON[T any](tx StateTx, table, key string) (value T, ok bool, err error) {
	data, ok, err := tx.Get(table, key)
	if err != nil || !ok {
		return value, false, err
	}
	if err := unmarshalRow(table, key, data, &value); err != nil {
		return value, false, err
	}
	return value, true, nil
}

func unmarshalRow(table, key string, data []byte, to any) error {
	if err := json.Unmarshal(data, to); err != nil {
		return fmt.Errorf("row %q of table %q: %w", key, table, err)
	}
	return nil
}

// eachJSON gives the rows of the table to do, in the order of their keys.
func eachJSON[T any](tx StateTx, table string, do func(key string, value T)) error {
	for row, err := range tx.Scan(table, Range{}) {
		if err != nil {
			return err
		}
		var value T
		if err := json.Unmarshal(row.Value, &value); err != nil {
			return fmt.Errorf("row %q of table %q: %w", row.Key, table, err)
		}
		do(row.Key, value)
	}
	return nil
}

func read[T any](ctx context.Context, s State, table string) ([]T, error) {
	var all []T
	err := s.View(ctx, func(tx StateTx) error {
		all = all[:0]
		return eachJSON(tx, table, func(_ string, one T) { all = append(all, one) })
	})
	return all, err
}

// readUnits reads the tables of all partitions on one snapshot.
func readUnits[T any](ctx context.Context, s State, name string, table func(unit string) string) ([]T, error) {
	var all []T
	err := s.View(ctx, func(tx StateTx) error {
		all = all[:0]
		units, err := storedUnits(tx, name)
		for _, unit := range units {
			if err == nil {
				err = eachJSON(tx, table(unit), func(_ string, one T) { all = append(all, one) })
			}
		}
		return err
	})
	return all, err
}

// ordersEvery is how often the owner of a projection looks for requests, where
// other processes can make them while it runs.
const ordersEvery = time.Second

// lookForOrders says when to look for requests.
func (r *runner) lookForOrders() (now <-chan time.Time, stop func()) {
	if !Shared(r.engine.state) {
		return nil, func() {}
	}
	ticker := time.NewTicker(ordersEvery)
	return ticker.C, ticker.Stop
}

// answersLast is for how long the answer to a request is kept for somebody who
// does not take it.
const answersLast = time.Hour

// orders does what others ask for, of the given actions or, without any, all.
func (r *runner) orders(ctx context.Context, lease Lease, only ...action) error {
	table := orderTable(r.unit)
	var keys, left []string
	var all []order
	err := r.engine.state.View(ctx, func(tx StateTx) error {
		keys, left, all = keys[:0], left[:0], all[:0]
		for row, err := range tx.Scan(table, Range{}) {
			if err != nil {
				return err
			}
			var o order
			switch err := json.Unmarshal(row.Value, &o); {
			case err != nil:
				r.engine.options.Logger.Error("a request to a projection cannot be read, and is removed", "projection", r.unit, "request", row.Key, "error", err)
				left = append(left, row.Key)
			case o.Answer == nil && (len(only) == 0 || slices.Contains(only, o.Action)):
				keys, all = append(keys, row.Key), append(all, o)
			case o.Answer != nil && time.Since(o.Answered) > answersLast:
				left = append(left, row.Key)
			}
		}
		return nil
	})
	if err == nil && len(left) > 0 {
		err = r.engine.state.Update(ctx, func(tx StateTx) error {
			for _, key := range left {
				if err := tx.Delete(table, key); err != nil {
					return err
				}
			}
			return nil
		})
	}
	for i := 0; err == nil && i < len(all); i++ {
		err = r.obey(ctx, lease, keys[i], all[i])
	}
	return err
}

// ordered reports whether anything is asked for that the owner itself must do.
func (r *runner) ordered(ctx context.Context) (waiting bool, err error) {
	err = r.engine.state.View(ctx, func(tx StateTx) error {
		waiting = false
		for row, err := range tx.Scan(orderTable(r.unit), Range{}) {
			if err != nil {
				return err
			}
			var o order
			waiting = waiting || json.Unmarshal(row.Value, &o) != nil || o.Answer == nil && o.Action != actionVerify
		}
		return nil
	})
	return waiting, err
}

// obey works on a request and answers it. It is written down first that it was
// begun: whoever has asked knows then that it may have been done. The next owner
// begins again with what was begun and not answered.
func (r *runner) obey(ctx context.Context, lease Lease, key string, o order) error {
	name := r.unit
	if o.Action == actionVerify {
		r.verifyAside(ctx, lease, key, o)
		return nil
	}
	if there, err := r.changeOrder(ctx, lease, key, func(o *order) { o.Begun = true }); err != nil || !there {
		return err
	}
	var done answer
	q := request{ctx: ctx, done: make(chan error, 1)}
	switch o.Action {
	case actionReplay:
		q.do = func(ctx context.Context, lease Lease) (err error) {
			done.Count, err = r.replay(ctx, lease)
			return err
		}
	case actionSkip:
		q.do = func(ctx context.Context, lease Lease) error { return r.giveUp(ctx, lease, o.Position, o.Note, o.By) }
	case actionRebuild:
		q.do, q.empties = r.clear, true
	case actionPause, actionResume:
		q.do, q.restarts = r.pausing(o.Action == actionPause, o.By), true
	default:
		q.do = func(context.Context, Lease) error {
			return fmt.Errorf("%w: the request %q is not known to the process that runs the projection", eventstore.ErrInvalid, o.Action)
		}
	}
	next := r.serve(ctx, lease, q)
	err := <-q.done
	if ctx.Err() != nil || errors.Is(err, ErrFenced) {
		return next // whoever has the projection then begins it again
	}
	if err != nil {
		done.Error, done.Missing = fmt.Sprintf("projection %q: %v", name, err), errors.Is(err, ErrNoDeadLetter)
	}
	if err := r.answerOrder(ctx, lease, key, o, done); err != nil {
		return err
	}
	return next
}

// changeOrder alters a request, if it is still there.
func (r *runner) changeOrder(ctx context.Context, lease Lease, key string, alter func(o *order)) (there bool, err error) {
	table := orderTable(r.unit)
	err = r.engine.state.Update(ctx, func(tx StateTx) error {
		if err := tx.Fence(lease); err != nil {
			return err
		}
		var now order
		if now, there, err = getJSON[order](tx, table, key); err != nil || !there {
			return err
		}
		if alter(&now); now.Answer != nil && now.Unread {
			return tx.Delete(table, key)
		}
		return putJSON(tx, table, key, now)
	})
	return there, err
}

func (r *runner) answerOrder(ctx context.Context, lease Lease, key string, o order, done answer) error {
	r.engine.options.Logger.Info("projection has answered a request", "projection", r.unit, "request", string(o.Action), "by", o.By, "error", done.Error)
	_, err := r.changeOrder(ctx, lease, key, func(o *order) { o.Answer, o.Answered = &done, time.Now() })
	return err
}

// verifyAside verifies while the projection goes on, one request at a time. If
// it cannot be answered, the next look at the requests begins it again.
func (r *runner) verifyAside(ctx context.Context, lease Lease, key string, o order) {
	if !r.verifying.CompareAndSwap(false, true) {
		return
	}
	r.asides.Go(func() {
		defer r.verifying.Store(false)
		v, err := r.verifyTelling(ctx, lease, key)
		done := answer{Verification: &v}
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, context.Canceled) {
				return // or nobody waits for it
			}
			done = answer{Error: err.Error()}
		}
		_ = r.answerOrder(ctx, lease, key, o, done)
	})
}

// patience is how long an engine waits for the owner of a projection to begin
// with a request, until it looks whether it can be the owner itself: who had the
// lease may only have had it for a request of its own.
const patience = 3 * time.Second

// askOwner has the request done here, if this engine runs the projection or
// nobody does, or by the process that does. It reports whether it was done here,
// and by the goroutine that runs the projection.
func (r *runner) askOwner(ctx context.Context, o order, do func(ctx context.Context, lease Lease) error, empties bool) (got answer, here, running bool, err error) {
	for {
		running, err = r.ask(ctx, request{do: do, empties: empties, restarts: o.Action == actionPause || o.Action == actionResume})
		if !errors.Is(err, ErrLeaseHeld) || !Shared(r.engine.state) {
			return answer{}, true, running, err
		}
		owner := &Admin{state: r.engine.state, by: r.engine.options.Owner, patience: patience}
		if got, err = owner.ask(ctx, r.unit, o); !errors.Is(err, errNobody) {
			return got, false, running, err
		}
	}
}
