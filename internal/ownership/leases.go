package ownership

import (
	"context"
	"errors"
	"time"
)

// Lease is the right to do a piece of work, of somebody and up to some moment.
type Lease struct {
	Name  string
	Owner string
	// Epoch is another, larger one each time that the lease is acquired.
	Epoch uint64
	// Revision is that of what is stored; it changes with every renewal.
	Revision uint64
}

// Leases is where leases are kept apart from what is done under them. It judges by
// its own clock which of them run. All methods may be called concurrently, and
// return soon, also when what they ask does not answer.
//
// An error other than those named here leaves open what has become of the call:
// it may have taken effect, or take it later, but never after a later call of the
// same owner has succeeded.
//
// One that is a [Directory] too is also where nodes find each other, unless
// another one is named for that.
type Leases interface {
	// Acquire takes the lease for the owner, until ttl from some moment after the
	// call. It fails with [ErrHeld], and should name the owner, while another one's
	// runs. An owner may acquire its own lease again, which ends the earlier one.
	Acquire(ctx context.Context, name, owner string, ttl time.Duration) (Lease, error)
	// Renew extends the lease until ttl from some moment after the call. It fails with
	// [ErrLost] when it has ended, or was acquired since.
	Renew(ctx context.Context, lease Lease, ttl time.Duration) (Lease, error)
	// Release gives the lease up; the next Acquire need not wait. One that was lost is
	// no error.
	Release(ctx context.Context, lease Lease) error
}

var (
	// ErrHeld: another owner's lease runs.
	ErrHeld = errors.New("the lease is held by another owner")
	// ErrLost: the lease has ended, or another owner has it.
	ErrLost = errors.New("the lease was lost")
)
