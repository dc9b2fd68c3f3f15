package saga

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// All runs the branches side by side and waits until all have ended. What they
// wait for, they wait for at the same time. The error joins what the branches
// returned, in their order; none is cut off because another one failed. Each
// branch keeps its result in variables of its own, and must not look at those of
// another one before All has returned: which one is faster differs from one
// time to the next.
//
// While a step of one branch is under way, what the others wait for (times,
// events, signals) is not looked at; in a race, the sleep of a branch ends the
// steps of the others all the same.
//
// A branch gets a [Run] of its own, and uses no other. Names need only be
// unique within a branch. Branches may have branches.
func All(s *Run, name string, branches ...func(*Run) error) error {
	_, err := s.parallel(kindAll, name, branches)
	return err
}

// Race runs the branches side by side until one of them returns, with or
// without an error, and returns its index and its error. Which one that was is
// recorded. The others end where they are: the context of their steps is
// cancelled with the cause [ErrLost], and what they have registered to be
// rolled back stays. A command, a transaction or the start of a child that is
// under way is done, and may still be followed by [Run.OnRollback].
func Race(s *Run, name string, branches ...func(*Run) error) (int, error) {
	return s.parallel(kindRace, name, branches)
}

// Deadline runs fn and gives it d, counted from [Run.Now]; after that it ends as
// the loser of a [Race] does, and the error is [ErrTimeout]. The deadline is
// durable, and covers what fn waits for as well as its steps.
func Deadline(s *Run, name string, d time.Duration, fn func(*Run) error) error {
	winner, err := Race(s, name, fn, func(s *Run) error { return s.Sleep("deadline", d) })
	if err == nil && winner == 1 {
		err = fmt.Errorf("%q: %w after %s", name, ErrTimeout, d)
	}
	return err
}

func (r *Run) parallel(kind, name string, branches []func(*Run) error) (int, error) {
	began := r.now
	id, rec, ok := r.enter(kind, name)
	if !ok {
		return 0, ErrUnwinding
	}
	if len(branches) == 0 {
		r.block(causeCode, nil, "%s has no branches", id)
	}
	g := &branchGroup{race: kind == kindRace, errs: make([]error, len(branches)), winner: -1, left: make(chan int, len(branches))}
	ended := false
	switch {
	case rec == nil:
		if !r.mayHave() {
			if err := r.interrupted(id); err != nil {
				return 0, err
			}
		}
		r.emit(typeBranched, &payload{Step: &id, Number: len(branches)})
	case rec.outcome == typeStepFailed:
		return 0, rec.failure()
	case rec.set.Number != len(branches):
		r.block(causeMismatch, &id, "step %d: history has %s with %d branches, code has %d", r.next, id, rec.set.Number, len(branches))
	default:
		ended = rec.outcome == typeJoined
		if ended && g.race {
			g.winner = rec.result.Number
		}
	}
	r.split(g, id, began, branches)
	switch {
	case r.outcome.kind != running:
		r.leave(r.outcome)
	case g.race && g.winner >= 0 && g.returned[g.winner], !g.race && g.parked == 0:
	case ended:
		r.block(causeMismatch, &id, "the history of %s says that it has ended, but the code of its branches waits", id)
	default:
		r.park()
	}
	if ended {
		r.now = rec.at
	} else {
		if r.beaten() || r.env == nil {
			r.park()
		}
		r.now = r.emit(typeJoined, &payload{Step: &id, Number: max(g.winner, 0)})
		r.decide()
	}
	if g.race {
		return g.winner, g.errs[g.winner]
	}
	var failures []error
	for i, err := range g.errs {
		if err != nil {
			failures = append(failures, fmt.Errorf("branch %d of %q: %w", i, name, err))
		}
	}
	return 0, errors.Join(failures...)
}

// split runs the branches until each has ended or been put aside.
func (r *Run) split(g *branchGroup, id stepID, began time.Time, branches []func(*Run) error) {
	if r.baton == nil {
		r.baton = make(chan struct{}, 1)
		r.baton <- struct{}{}
	}
	base := r.live
	switch {
	case r.scope() != "":
		base = r.ctx
	case r.steps != nil:
		base = r.steps
	}
	g.returned = make([]bool, len(branches))
	for i := range branches {
		path := id.label() + "." + strconv.Itoa(i)
		if r.id.branch != "" {
			path = r.id.branch + "@" + path
		}
		var steps context.Context
		cancel := context.CancelCauseFunc(func(error) {})
		if r.env != nil {
			steps, cancel = context.WithCancelCause(base)
			defer cancel(nil)
		}
		g.cancels = append(g.cancels, cancel)
		g.branches = append(g.branches, &Run{core: r.core, detached: r.detached, line: &line{
			id: lineID{r.in, path}, in: r.in, now: began, steps: steps, yielded: make(chan struct{}),
			up: r.line, lost: g.winner >= 0 && i != g.winner, closed: r.closed || g.winner >= 0 && i != g.winner,
		}})
	}
	for _, i := range r.beginnings(g) {
		// One after the other, each up to where it first waits for something.
		go runBranch(g.branches[i], branches[i], g, i)
		<-g.branches[i].yielded
		r.turn = r.line
	}
	r.pass()
	r.join(g)
	r.resume()
	for i, branch := range g.branches {
		r.noticed = r.noticed || branch.noticed && (!g.race || i == g.winner)
	}
}

// beginnings is the order in which branches begin: in a race those first whose
// sleep is over, so that the others begin nothing more.
func (r *Run) beginnings(g *branchGroup) []int {
	var over, others []int
	for i, branch := range g.branches {
		records := *r.h.line(branch.id)
		if n := len(records); g.race && r.env != nil && n > 0 && records[n-1].id.Kind == kindSleep && records[n-1].outcome == "" &&
			records[n-1].set.Due != nil && !records[n-1].set.Due.After(r.env.clock.Now()) {
			over = append(over, i)
		} else {
			others = append(others, i)
		}
	}
	return append(over, others...)
}

// join waits until each branch has ended or been put aside. In a race in which
// one sleeps, the steps of the others have until then.
func (r *Run) join(g *branchGroup) {
	var alarm <-chan time.Time
	stop := func() {}
	defer func() { stop() }()
	var due time.Time
	here := map[int]bool{}
	for i := range g.branches {
		here[i] = true
	}
	for len(here) > 0 {
		select {
		case i := <-g.left:
			delete(here, i)
			if at := g.branches[i].sleepsUntil; g.race && !at.IsZero() && (due.IsZero() || at.Before(due)) {
				stop()
				due = at
				alarm, stop = r.env.clock.NewTimer(at)
			}
		case <-alarm:
			alarm = nil
			r.baton <- struct{}{}
			for i := range here {
				if g.winner < 0 {
					g.branches[i].late = true
					g.cancels[i](ErrLost)
				}
			}
			<-r.baton
		}
	}
}

// branchGroup is what the branches of one call have in common; it belongs to
// who has the baton.
type branchGroup struct {
	race     bool
	branches []*Run
	cancels  []context.CancelCauseFunc
	errs     []error
	returned []bool
	parked   int
	winner   int // of a race; -1: none yet
	left     chan int
}

// win ends the race.
func (g *branchGroup) win(i int) {
	g.winner = i
	for other := range g.branches {
		if other != i {
			g.branches[other].lost = true
			g.cancels[other](ErrLost)
		}
	}
}

// runBranch is the outermost function of every goroutine that runs a branch.
// It begins with the baton, which its parent has lent to it.
func runBranch(r *Run, code func(*Run) error, g *branchGroup, i int) {
	defer func() { g.left <- i }()
	growStack(len(r.saga))
	r.turn = r.line
	returned := false
	defer func() {
		p := recover()
		if r.inStep != "" { // the step has ended the goroutine
			r.resume()
		}
		r.recovered(p, returned)
		if !returned {
			g.parked++
		}
		r.pass()
	}()
	err := code(r)
	records := *r.h.line(r.id)
	r.skipMarkers(records)
	if r.next < len(records) && r.outcome.kind == running {
		r.block(causeMismatch, nil, "branch %q, step %d: history has %s, code has ended", r.id.branch, r.next+1, records[r.next].id)
	}
	returned = true
	g.errs[i], g.returned[i] = err, true
	if g.race && g.winner < 0 && r.outcome.kind == running {
		g.win(i)
	}
}

// pass lets go of the baton: to the parent the first time, which has lent it,
// and to any branch later.
func (r *Run) pass() {
	switch {
	case r.baton == nil:
	case r.yielded != nil && !r.hasYielded:
		r.hasYielded = true
		close(r.yielded)
	default:
		<-r.baton
	}
}

// resume gets the baton back.
func (r *Run) resume() {
	if r.baton != nil {
		r.baton <- struct{}{}
		r.turn = r.line
	}
}
