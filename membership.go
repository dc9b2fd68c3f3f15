package deed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/internal/worker"
	"github.com/deed-go/deed/projection"
)

// leases returns where leases are kept, if that is not the state.
func leases(c *configuration, store eventstore.Store, state projection.State) (ownership.Leases, error) {
	if c.leases == nil || len(c.processes) == 0 {
		return nil, nil
	}
	if projection.Shared(state) {
		return nil, fmt.Errorf("%w: deed.Leases with a state that processes share, a %T: leave it out, the state keeps the leases, and looks at them in the transactions that commit", eventstore.ErrInvalid, state)
	}
	return c.leases(store)
}

// members returns this node's part in dividing the background work among the
// processes that share the state or the leases; nil where there is nobody to
// share with.
func members(c *configuration, store eventstore.Store, state projection.State, apart ownership.Leases, name string) (*ownership.Group, error) {
	if apart == nil && (state == nil || !projection.Shared(state)) {
		return nil, nil
	}
	options := ownership.Options{Name: name, Logger: c.logger}
	var directory ownership.Directory
	var err error
	if c.members != nil {
		directory, err = c.members(store)
	} else if apart != nil {
		var ok bool
		if directory, ok = apart.(ownership.Directory); !ok {
			return nil, nil
		}
	} else if directory, err = projection.Members(state); errors.Is(err, errors.ErrUnsupported) {
		return nil, nil // whoever comes first has the work
	} else {
		options.Look = ownership.LookOften // what it tells is of those who leave, and may not come
	}
	if err != nil {
		return nil, err
	}
	if leases, ok := state.(interface{ LeaseTTL() time.Duration }); ok {
		options.TTL = leases.LeaseTTL() // work is taken from the dead when their leases end
	}
	return ownership.New(directory, options), nil
}

// membership is the worker that keeps this process known to the others.
type membership struct {
	group  *ownership.Group
	logger *slog.Logger
}

var _ worker.Worker = membership{}

func (membership) Name() string { return "membership" }

func (m membership) Run(ctx context.Context) error {
	if err := m.group.Run(ctx); err != nil {
		m.logger.Warn("the others will find out by themselves that this process has stopped", "error", err)
	}
	return nil
}

func (membership) Ready(context.Context) error                            { return nil }
func (membership) WaitThrough(context.Context, eventstore.Position) error { return nil }
func (membership) NextDue() (time.Time, bool)                             { return time.Time{}, false }
func (membership) Fire(context.Context, time.Time) error                  { return nil }
