// Package worker is the shape of background work, so that an application can
// run, settle and stop projections and sagas alike. It may import eventstore.
package worker

import (
	"context"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// Worker is one piece of background work that follows the log.
type Worker interface {
	// Name is unique within an application, for example "projection balances".
	Name() string
	// Run works until ctx ends and then returns nil, after what was in flight is
	// finished or safely abandoned; or it returns the error that stopped it for good.
	Run(ctx context.Context) error
	// Ready returns nil when Run has found its place in the log: events appended
	// from now on are new to it. It returns the error when Run failed instead.
	Ready(ctx context.Context) error
	// WaitThrough returns nil when everything that the events up to p cause has
	// been done, or waits for a later due time. It returns an error when the worker
	// cannot get there: it has stopped, or is blocked for good.
	WaitThrough(ctx context.Context, p eventstore.Position) error
	// NextDue returns the earliest instant that some of its work waits for.
	NextDue() (time.Time, bool)
	// Fire starts everything that is due at or before now. When it returns, that
	// work counts as running for WaitThrough.
	Fire(ctx context.Context, now time.Time) error
}

// Offerer is a worker that is run where it is this node's turn. Offer says,
// before Run, that the node can do the work: who begins with all that it offers
// is known to the others with all of it.
type Offerer interface{ Offer() }
