package eventstore

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// Store is a log of events. All methods may be called concurrently. After
// Close (on the concrete type) they return [ErrClosed].
//
// Run storetest.Run against an implementation to certify it.
type Store interface {
	// Append writes the commit's events, all or nothing, if every condition holds
	// at that moment, and returns when they are durable under the backend's stated
	// durability. The events get the next versions of their streams and, together,
	// consecutive positions.
	//
	// The idempotency key is looked at before the conditions: if it was used, the
	// first receipt comes back with Duplicate set, whatever the conditions say.
	//
	// Errors: ErrInvalid and ErrTooLarge for bad input, ErrConflict (a
	// *ConflictError) for a failed condition, ErrKeyReused, ErrClosed; with all of
	// these nothing was written. When ctx ends before the commit was on its way
	// nothing was written and the error is ctx's alone; after that it is either the
	// outcome or ErrOutcomeUnknown, which then wraps ctx's error too.
	//
	// Append may keep the commit's slices: do not change them afterwards.
	Append(ctx context.Context, c Commit) (Receipt, error)

	// Lookup returns the receipt stored for an idempotency key, with Duplicate
	// set, or false when the key was not used. Stream is the first stream of the
	// keyed commit; backends whose keys are scoped to the whole log ignore it.
	Lookup(ctx context.Context, stream Stream, key string) (Receipt, bool, error)

	// Read yields the matching events in position order, or in reverse. It ends: a
	// forward read at the head seen when it began. A stream that does not exist is
	// empty, not an error. After an error nothing more is yielded. Breaking out of
	// the loop releases what the read held.
	Read(ctx context.Context, q Query, o ReadOptions) iter.Seq2[Recorded, error]

	// Subscribe yields every matching event after the position, once and in order:
	// first those already stored, then new ones as they are committed. It ends only
	// when ctx is done, the loop breaks, or with an error; ctx's end is yielded as
	// its error. A hole in the log is ErrGap, never silence.
	//
	// A slow receiver does not slow writers; it reads on from storage. After may lie
	// beyond the head: nothing is yielded until the log has grown past it.
	Subscribe(ctx context.Context, q Query, after Position) iter.Seq2[Batch, error]

	// Head returns the position of the last event, 0 for an empty log.
	Head(ctx context.Context) (Position, error)
}

// ReadOptions narrow a read. The zero value reads everything forward.
type ReadOptions struct {
	// After excludes events at or before the position, in both directions.
	After Position
	// Through excludes events beyond the position; 0 means up to the head.
	Through Position
	// Backward yields the last event first.
	Backward bool
	// Limit is the largest number of events; 0 means all.
	Limit int
}

// Validate refuses a negative limit.
func (o ReadOptions) Validate() error {
	if o.Limit < 0 {
		return fmt.Errorf("%w: read limit %d is negative: use 0 for no limit", ErrInvalid, o.Limit)
	}
	return nil
}

// Batch is what a subscription yields. Every event up to and including Through
// has been considered, also when none of them matched, so Through is what a
// checkpoint stores. Through never decreases, and increases with every batch
// but for the first one, which may report that there is nothing new.
type Batch struct {
	Events  []Recorded
	Through Position
	// CaughtUp says that Through was the head when the batch was made.
	CaughtUp bool
}

// Opener opens a store when an application starts, for example sqlite.File.
type Opener interface {
	Open(ctx context.Context) (Store, error)
}

// Opened returns an Opener for a store that is already open. The caller keeps
// it: an application that uses it does not close it.
func Opened(s Store) Opener { return opened{s} }

type opened struct{ store Store }

func (o opened) Open(context.Context) (Store, error) { return borrowed{o.store}, nil }

// borrowed hides Close from whoever opened the store through Opened.
type borrowed struct{ Store }

// Unwrap returns the borrowed store, whose optional powers stay reachable.
func (b borrowed) Unwrap() Store { return b.Store }

// Find looks for an optional power T on the store, and on the stores it wraps
// (those with an Unwrap() Store method). A wrapper that changes what an append
// or a read means must not have Unwrap, or data would go around it.
func Find[T any](s Store) (T, bool) {
	for s != nil {
		if power, ok := s.(T); ok {
			return power, true
		}
		wrapper, ok := s.(interface{ Unwrap() Store })
		if !ok {
			break
		}
		s = wrapper.Unwrap()
	}
	var none T
	return none, false
}

// Pending is an append that was handed over and is on its way.
type Pending struct {
	done    chan struct{}
	receipt Receipt
	err     error
}

// NewPending is for backends: the returned function sets the outcome, once.
func NewPending() (*Pending, func(Receipt, error)) {
	p := &Pending{done: make(chan struct{})}
	return p, func(r Receipt, err error) {
		p.receipt, p.err = r, err
		close(p.done)
	}
}

// Done is closed when the outcome is known.
func (p *Pending) Done() <-chan struct{} { return p.done }

// Result returns the outcome, as Append would; it waits for Done.
func (p *Pending) Result() (Receipt, error) {
	<-p.done
	return p.receipt, p.err
}

// Enqueuer is the optional power to hand over a commit without waiting for it.
// Commits are checked and written in the order of the Enqueue calls of one
// goroutine, each seeing the effects of the earlier ones; a conflict fails that
// commit only. Ending ctx removes the commit only while no batch has taken it.
type Enqueuer interface {
	Enqueue(ctx context.Context, c Commit) *Pending
}

// Identified is the optional power to tell one log from another.
type Identified interface {
	// LogID is a random id given to the log when it was created. It survives
	// restarts and tells a log from a replaced or restored one.
	LogID(ctx context.Context) (string, error)
}

// LogID returns the id of the log. An error wrapping errors.ErrUnsupported
// says that the backend has none.
func LogID(ctx context.Context, s Store) (string, error) {
	if i, ok := Find[Identified](s); ok {
		return i.LogID(ctx)
	}
	return "", fmt.Errorf("log id of %T: %w", s, errors.ErrUnsupported)
}
