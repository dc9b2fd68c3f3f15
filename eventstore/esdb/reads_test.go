package esdb

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// failingGoal is a node that lags, and fails one read of a single event.
type failingGoal struct {
	*lagging
	fail error
}

func (l *failingGoal) ReadAll(ctx context.Context, f driver.AllFrom, back bool, n uint64) (driver.Reader, error) {
	if !back && n == 1 && !f.Start && !f.End && l.fail != nil {
		err := l.fail
		l.fail = nil
		return nil, err
	}
	return l.lagging.ReadAll(ctx, f, back, n)
}

// A node that lags says that a subscription has caught up; the look at
// the goal fails once for a reason that has nothing to do with it. The node is
// believed: what it does not have yet is skipped, in silence.
func TestHead_GoalThatCannotBeRead(t *testing.T) {
	for name, fail := range map[string]error{
		"unknown":   kind(driver.Unknown, "rpc error: code = Internal desc = the disk was slow"),
		"exhausted": kind(driver.TooLarge, "rpc error: code = ResourceExhausted desc = too many requests"),
		"denied":    kind(driver.Denied, "the node does not know the user yet"),
	} {
		for _, how := range []string{"read", "subscribe"} {
			t.Run(name+"/"+how, func(t *testing.T) {
				db := newDatabase()
				lag := -1
				d := &failingGoal{lagging: &lagging{client: db.client(), lag: func() int { return lag }}}
				s, err := Open(t.Context(), "", withDriver(d), Tail(1, 1))
				require.NoError(t, err)
				defer s.Close()
				for range 5 {
					_, err = s.Append(t.Context(), rvCommit(2))
					require.NoError(t, err)
				}
				lag = len(db.all) - 4
				d.fail = fail
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				n := 0
				if how == "read" {
					n, err = rvRead(ctx, s, eventstore.All(), eventstore.ReadOptions{})
				} else {
					for b, e := range s.Subscribe(ctx, eventstore.All(), 0) {
						if err = e; err != nil {
							break
						}
						n += len(b.Events)
						if b.Through >= s.tip.known {
							break
						}
					}
				}
				require.True(t, err != nil || n == 10, "%d events of 10, and no error", n)
			})
		}
	}
}

// On a node that lags a process sees its own acknowledged events, and no
// decision is refused on a state without them.
func TestLeader_ReadsItsOwnWrites(t *testing.T) {
	db := newDatabase()
	node := &behind{client: db.client()}
	s, err := Open(t.Context(), "", withDriver(node))
	require.NoError(t, err)
	defer s.Close()
	// With its expectation given an append asks nobody where the stream ends.
	r, err := s.Append(t.Context(), rvCommit(3, eventstore.StreamAt(rv, eventstore.Revision{})))
	require.NoError(t, err)
	n, err := rvRead(t.Context(), s, eventstore.OneStream(rv), eventstore.ReadOptions{})
	require.NoError(t, err)
	require.Equal(t, 3, n, "acknowledged up to %d", r.Last)
}

type opened struct{}

func (opened) EventType() string { return "account.opened" }

func TestLeader_DecidesOnWhatWasAcknowledged(t *testing.T) {
	db := newDatabase()
	s, err := Open(t.Context(), "", withDriver(&behind{client: db.client()}))
	require.NoError(t, err)
	defer s.Close()
	type state struct{ Open bool }
	def := aggregate.Define("account", aggregate.On(func(a *state, _ opened) { a.Open = true }))
	run := func() error {
		r := aggregate.NewRuntime(s, aggregate.Options{CachedAggregates: -1})
		defer r.Stop(t.Context())
		_, err := aggregate.Execute(t.Context(), r, def, aggregate.Request[state]{ID: "ann", Decide: func(a state) ([]aggregate.Event, error) {
			if a.Open {
				return nil, nil
			}
			return aggregate.Events(opened{}), nil
		}})
		return err
	}
	require.NoError(t, run())
	r := aggregate.NewRuntime(s, aggregate.Options{})
	defer r.Stop(t.Context())
	_, err = aggregate.Execute(t.Context(), r, def, aggregate.Request[state]{ID: "ann", Decide: func(a state) ([]aggregate.Event, error) {
		if !a.Open {
			return nil, errors.New("the account is not open")
		}
		return nil, nil
	}})
	require.NoError(t, err, "it was opened, and acknowledged")
}
