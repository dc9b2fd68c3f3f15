package esdb

import (
	"context"
	"errors"
	"fmt"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// errPatience ends calls that have waited for the server as long as Patience
// says.
var errPatience = errors.New("waited for the server as long as esdb.Patience says")

// again reports whether a call that writes nothing may succeed when it is made
// again: a server that stops, or a proxy, ends calls as cancelled too, or
// without a word.
func again(ctx context.Context, err error) bool {
	if driver.Transient(err) {
		return true
	}
	switch driver.KindOf(err) {
	case driver.Ended, driver.Rejected:
		return ctx.Err() == nil && !errors.Is(err, errPatience)
	}
	return false
}

// ended returns the caller's context's error, if it has ended, or ErrClosed if
// the store was closed under the call.
func (s *Store) ended(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		if cause := context.Cause(ctx); !errors.Is(cause, err) {
			return fmt.Errorf("%w: %w", err, cause)
		}
		return err
	}
	if s.base.Err() != nil {
		return eventstore.ErrClosed
	}
	return nil
}

// failure makes an error of the driver one of the contract, for calls that
// write nothing. Ctx is the caller's.
func (s *Store) failure(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	if end := s.ended(ctx); end != nil {
		return fmt.Errorf("%s: %w", what, end)
	}
	if errors.Is(err, driver.ErrClosed) {
		return eventstore.ErrClosed
	}
	if _, ok := errors.AsType[*driver.Error](err); !ok {
		return fmt.Errorf("%s: %w", what, err)
	}
	switch driver.KindOf(err) {
	case driver.Unavailable, driver.Aborted, driver.Timeout, driver.Ended:
		return fmt.Errorf("%s: %w: %w", what, eventstore.ErrUnavailable, err)
	case driver.Deleted:
		return fmt.Errorf("%s: %w: the stream was deleted for good (tombstoned): %w", what, eventstore.ErrGap, err)
	case driver.TooLarge:
		return fmt.Errorf("%s: %w for the server, or malformed: %w", what, eventstore.ErrTooLarge, err)
	case driver.Denied:
		return fmt.Errorf("%s: the server refuses this user: look at the credentials in the URL (they are sent over TLS only) and at the access control lists: %w", what, err)
	case driver.Rejected:
		return fmt.Errorf("%s: the server ended the call without a reason: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// errMissing: events of a stream are gone.
func errMissing(name string, want, got uint64) error {
	return fmt.Errorf("%w: event %d of stream %q follows where event %d is expected: the stream was truncated ($maxCount, $maxAge, $tb) or deleted and written again, which a stream of deed's must not be", eventstore.ErrGap, got, name, want)
}

// errHidden: a stream exists, and none of its events can be read.
func errHidden(name string) error {
	return fmt.Errorf("%w: the stream %q exists, but none of its events can be read: it was truncated ($maxCount, $maxAge, $tb), which a stream of deed's must not be", eventstore.ErrGap, name)
}

// errIntruder: another program has written to a stream of the log.
func errIntruder(r *driver.Recorded) error {
	return fmt.Errorf("%w: %s was not written by deed: give the log names of its own with esdb.Prefix, or the other program other streams", eventstore.ErrGap, where(r))
}
