package command

import (
	"errors"
	"fmt"
)

// Rejection is the domain's no: the command was understood, and refused on
// purpose. It is not a failure: nothing is broken, and trying again changes
// nothing unless the state does. Make it with [Reject] or [Rejectf].
type Rejection struct{ reason error }

// Error returns the reason.
func (r *Rejection) Error() string { return r.reason.Error() }

// Unwrap returns the reason, for errors.Is and errors.As.
func (r *Rejection) Unwrap() error { return r.reason }

// Reject makes err a rejection; nil stays nil, and a rejection stays as it is.
func Reject(err error) error {
	if err == nil || IsRejection(err) {
		return err
	}
	return &Rejection{err}
}

// Rejectf is [Reject] with a message formatted as by fmt.Errorf; %w works.
func Rejectf(format string, a ...any) error { return Reject(fmt.Errorf(format, a...)) }

// IsRejection reports whether err is or wraps a rejection.
func IsRejection(err error) bool {
	_, ok := errors.AsType[*Rejection](err)
	return ok
}
