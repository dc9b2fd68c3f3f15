package saga

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/projection"
)

var (
	// ErrTimeout: an awaited event did not come in time, or a step's attempt took
	// longer than [Within] allows.
	ErrTimeout = errors.New("timed out")
	// ErrBlocked: the run waits for a human or for other code. See [BlockedError].
	ErrBlocked = errors.New("saga is blocked")
	// ErrFailed: the saga's function returned an error; what it had done is
	// compensated. See [FailedError].
	ErrFailed = errors.New("saga failed")
	// ErrCancelled: somebody has asked to cancel the run, see [Engine.Cancel].
	ErrCancelled = errors.New("saga was cancelled")
	// ErrLost: another branch has won the [Race].
	ErrLost = errors.New("another branch has won the race")
	// ErrOutcomeUnknown: a step that must not run twice ([Once]) was cut off, and
	// may or may not have had its effect.
	ErrOutcomeUnknown = errors.New("outcome of the step is unknown")
	// ErrFinished: the run has ended, and cannot be told anything any more.
	ErrFinished = errors.New("saga has ended")
	// ErrStarted: there is a run of that id with another input, or that somebody
	// else has started.
	ErrStarted = errors.New("saga was started otherwise")
	// ErrConflict: the run is not where it must be for what was asked.
	ErrConflict = errors.New("saga is not at that point")
	// ErrNotFound: there is no run of that id.
	ErrNotFound = errors.New("saga not found")
	// ErrUnwinding is what the calls of a deferred function get while the run is
	// put aside to wait; they do nothing.
	ErrUnwinding = errors.New("the saga is being put aside: calls in deferred functions do nothing")
	// ErrStopped: the engine is not running.
	ErrStopped = errors.New("saga engine has stopped")
	// ErrLeaseExpired: this node could not renew its lease in time, so another one
	// may do the work; it is the cause of the end of the contexts of steps. It wraps
	// projection.ErrFenced. See [Options.Leases].
	ErrLeaseExpired = fmt.Errorf("the lease could not be renewed in time: %w", projection.ErrFenced)
	// ErrUndecided: a new saga or reaction was not told what to do about the events
	// that are already in the log.
	ErrUndecided = errors.New("undecided about the past")
)

// terminal marks an error that trying again does not help.
type terminal struct{ err error }

func (t terminal) Error() string { return t.err.Error() }
func (t terminal) Unwrap() error { return t.err }

// Terminal marks err as final: the step that returns it is not tried again.
// Nil stays nil.
func Terminal(err error) error {
	if err == nil {
		return nil
	}
	return terminal{err}
}

// IsTerminal reports whether err was marked by [Terminal], also when it was
// since recorded and replayed.
func IsTerminal(err error) bool {
	if _, ok := errors.AsType[terminal](err); ok {
		return true
	}
	step, ok := errors.AsType[*StepError](err)
	return ok && step.failure.Terminal
}

// StepError is how a step failed for good, as the history recorded it. The
// code gets it the first time too, not only at a replay, so that it cannot
// decide differently then.
//
// The original error is gone, but errors.Is still finds a sentinel in it when
// its text is that of one of the errors that the original one wrapped:
// sentinels made by errors.New work as usual, as long as their text stays.
// command.IsRejection, [IsTerminal] and errors.Is(err, [ErrTimeout]) hold as
// for the original. errors.As does not find the original's type.
type StepError struct {
	// Step is the name of the step.
	Step    string
	failure failure
}

// Error names the step and what went wrong.
func (e *StepError) Error() string { return fmt.Sprintf("step %q: %s", e.Step, e.failure.Message) }

// Is recognises what the original error wrapped, by text.
func (e *StepError) Is(target error) bool {
	switch target { //nolint:errorlint // the sentinels themselves
	case ErrTimeout:
		return e.failure.Timeout
	case ErrOutcomeUnknown:
		return e.failure.Unknown
	case ErrCancelled:
		return e.failure.Cancelled
	}
	if target == nil {
		return false
	}
	text := target.Error()
	return text == e.failure.Message || slices.Contains(e.failure.Is, text)
}

// Unwrap returns the rejection, if the step failed with one.
func (e *StepError) Unwrap() error {
	if e.failure.Rejection {
		return command.Reject(errors.New(e.failure.Message))
	}
	return nil
}

// FailedError is how a saga ended that failed. errors.Is recognises it as
// [ErrFailed], and as the error the code returned, as for a [StepError].
type FailedError struct {
	Saga, ID string
	// Compensated names the compensations that ran, in their order.
	Compensated []string
	// Status says whether it failed, was cancelled, or was terminated.
	Status  Status
	failure failure
}

// Error names the run and the cause.
func (e *FailedError) Error() string {
	if e.Status == StatusTerminated {
		return fmt.Sprintf("saga %q, run %q was terminated: %s", e.Saga, e.ID, e.failure.Message)
	}
	return fmt.Sprintf("saga %q, run %q failed: %s", e.Saga, e.ID, e.failure.Message)
}

// Is recognises ErrFailed and what the original error wrapped.
func (e *FailedError) Is(target error) bool {
	return target == ErrFailed || (&StepError{failure: e.failure}).Is(target)
}

// Unwrap returns the rejection, if the code returned one.
func (e *FailedError) Unwrap() error { return (&StepError{failure: e.failure}).Unwrap() }

// BlockedError says why a run does not go on. Nothing was compensated and
// nothing is lost; after a fix it goes on when the engine starts, or with
// [Engine.Resume].
type BlockedError struct {
	Saga, ID string
	Reason   string
}

// Error names the run and the reason.
func (e *BlockedError) Error() string {
	return fmt.Sprintf("saga %q, run %q is blocked: %s", e.Saga, e.ID, e.Reason)
}

// Is makes errors.Is(err, ErrBlocked) hold.
func (e *BlockedError) Is(target error) bool { return target == ErrBlocked }

// mostErrorBytes bounds each text of a recorded error, so that the record of a
// failure always fits into an event.
const mostErrorBytes = 4 << 10

func shorten(text string) string {
	if len(text) <= mostErrorBytes {
		return text
	}
	return strings.ToValidUTF8(text[:mostErrorBytes], "") + "…"
}

// failureOf is the recorded form of err; its texts are cut at 4 KiB.
func failureOf(err error) failure {
	f := failure{Message: shorten(err.Error()), Rejection: command.IsRejection(err), Terminal: IsTerminal(err)}
	f.Unknown, f.Cancelled = errors.Is(err, ErrOutcomeUnknown), errors.Is(err, ErrCancelled)
	f.Timeout = errors.Is(err, ErrTimeout) || errors.Is(err, context.DeadlineExceeded)
	const most = 16
	seen := map[string]bool{}
	var walk func(error)
	walk = func(err error) {
		if err == nil || len(f.Is) >= most {
			return
		}
		texts := []string{shorten(err.Error())}
		step, recorded := err.(*StepError) //nolint:errorlint // every error of the tree is visited
		if recorded {
			texts = append([]string{step.failure.Message}, step.failure.Is...)
		}
		for _, text := range texts {
			if text != f.Message && !seen[text] {
				seen[text] = true
				f.Is = append(f.Is, text)
			}
		}
		if recorded {
			return
		}
		switch wrapper := err.(type) { //nolint:errorlint // every error of the tree is visited
		case interface{ Unwrap() error }:
			walk(wrapper.Unwrap())
		case interface{ Unwrap() []error }:
			for _, inner := range wrapper.Unwrap() {
				walk(inner)
			}
		}
	}
	walk(err)
	return f
}
