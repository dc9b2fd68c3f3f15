package statetest

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/projection"
)

// State is a state that the suite can close.
type State interface {
	projection.State
	Close() error
}

// Opener opens the state that a [Harness] prepared. The suite calls it again
// only after it has closed the one it got before, and only to test
// [Features.Reopen].
type Opener func() (State, error)

// Harness prepares a new, empty state and returns how to open it. What it
// leaves behind is its own to clean up, with t.Cleanup or t.TempDir.
type Harness func(t testing.TB) Opener

// Features are what a backend supports beyond the core.
type Features struct {
	// SQL: Exec and Query work; otherwise they return errors.ErrUnsupported.
	SQL bool
	// Reopen: the state is still there after Close and another Open.
	Reopen bool
	// LeasesEndWithProcess: leases held when the state was closed do not block
	// after it is opened again. Embedded backends promise it, since they have one
	// process at a time.
	LeasesEndWithProcess bool
	// Shared: several processes can use the state at the same time, and its Shared
	// method says so (see [projection.Shared]).
	Shared bool
	// ConcurrentUpdates: updates that are not fenced, or by different leases, run at
	// the same time. Those that the same lease has fenced never do.
	ConcurrentUpdates bool
	// Bubble: the state can be opened, used and closed inside a testing/synctest
	// bubble, where it waits by channels alone and never by time. States that live
	// on a server cannot.
	Bubble bool
}

// Run tests the backend against the contract.
func Run(t *testing.T, h Harness, f Features) {
	t.Helper()
	s := newSuite(h, f)
	for _, g := range groups {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			for _, c := range g.checks {
				t.Run(c.name, func(t *testing.T) {
					t.Parallel()
					if c.needs != nil {
						if lack := c.needs(s.features); lack != "" {
							t.Skipf("the backend declares no %s", lack)
						}
					}
					t.Cleanup(func() {
						if t.Failed() {
							t.Logf("the rule: %s", c.rule)
						}
					})
					c.run(t, s)
				})
			}
		})
	}
}

// check is one clause of the contract. Its run fails t when the clause is broken.
type check struct {
	name string
	// rule is what a failure teaches.
	rule string
	// needs names the feature that is missing, or nothing.
	needs func(Features) string
	run   func(t testing.TB, s *suite)
}

type group struct {
	name   string
	checks []check
}

var groups = []group{
	{"Update", updateChecks},
	{"View", viewChecks},
	{"Rows", rowChecks},
	{"Checkpoint", checkpointChecks},
	{"Lease", leaseChecks},
	{"Listing", listingChecks},
	{"SQL", sqlChecks},
	{"Concurrency", concurrencyChecks},
	{"Ending", endingChecks},
	{"Bubble", bubbleChecks},
}

type suite struct {
	harness  Harness
	features Features
	// patience is how long a check waits for something that must come.
	patience time.Duration
	// moment is how long a race is held open, see afterOrSoon.
	moment time.Duration
	// bubble runs fn in a testing/synctest bubble.
	bubble func(t testing.TB, fn func(testing.TB))
}

func newSuite(h Harness, f Features) *suite {
	return &suite{harness: h, features: f, patience: time.Minute, moment: 100 * time.Millisecond, bubble: func(t testing.TB, fn func(testing.TB)) {
		synctest.Test(t.(*testing.T), func(t *testing.T) { fn(t) })
	}}
}

func (s *suite) open(t testing.TB) State {
	t.Helper()
	return s.prepare(t).open(t)
}

// prepare makes a new state that can be opened several times in turn.
func (s *suite) prepare(t testing.TB) *place { return &place{opener: s.harness(t)} }

type place struct {
	opener Opener
	state  State
}

func (p *place) open(t testing.TB) State {
	t.Helper()
	state, err := p.opener()
	require.NoError(t, err, "open the state")
	p.state = state
	t.Cleanup(func() { _ = state.Close() })
	return state
}

func (p *place) reopen(t testing.TB) State {
	t.Helper()
	require.NoError(t, p.state.Close(), "close the state to open it again")
	return p.open(t)
}

// context ends when the test does, or when the suite has lost patience.
func (s *suite) context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), s.patience, fmt.Errorf("statetest: gave up after %s", s.patience))
	t.Cleanup(cancel)
	return ctx
}

// turn is what an update does to run after the earlier ones: where updates run
// at the same time it must be fenced.
func (s *suite) turn(tx projection.StateTx, lease projection.Lease) error {
	if !s.features.ConcurrentUpdates {
		return nil
	}
	return tx.Fence(lease)
}

func needReopen(f Features) string {
	if f.Reopen {
		return ""
	}
	return "reopening"
}

func mustUpdate(t testing.TB, ctx context.Context, state State, fn func(projection.StateTx) error) {
	t.Helper()
	require.NoError(t, state.Update(ctx, fn), "update")
}

func mustView(t testing.TB, ctx context.Context, state State, fn func(projection.StateTx)) {
	t.Helper()
	require.NoError(t, state.View(ctx, func(tx projection.StateTx) error {
		fn(tx)
		return nil
	}), "view")
}

// put is an update that sets one row.
func put(t testing.TB, ctx context.Context, state State, table, key, value string) {
	t.Helper()
	mustUpdate(t, ctx, state, func(tx projection.StateTx) error { return tx.Put(table, key, []byte(value)) })
}

// value reads one row in a view of its own; missing rows are "(none)".
func value(t testing.TB, ctx context.Context, state State, table, key string) string {
	t.Helper()
	var got string
	mustView(t, ctx, state, func(tx projection.StateTx) { got = valueIn(t, tx, table, key) })
	return got
}

func valueIn(t testing.TB, tx projection.StateTx, table, key string) string {
	t.Helper()
	v, ok, err := tx.Get(table, key)
	require.NoError(t, err, "get")
	if !ok {
		return "(none)"
	}
	return string(v)
}

// rowsIn lists a table as key=value.
func rowsIn(t testing.TB, tx projection.StateTx, table string, r projection.Range) []string {
	t.Helper()
	rows := []string{}
	for row, err := range tx.Scan(table, r) {
		require.NoError(t, err, "scan %q with %+v", table, r)
		rows = append(rows, row.Key+"="+string(row.Value))
	}
	return rows
}

func checkpoint(t testing.TB, ctx context.Context, state State, name string) projection.Checkpoint {
	t.Helper()
	var c projection.Checkpoint
	mustView(t, ctx, state, func(tx projection.StateTx) {
		var err error
		c, err = tx.Checkpoint(name)
		require.NoError(t, err, "checkpoint")
	})
	return c
}

func mustAcquire(t testing.TB, ctx context.Context, state State, name, owner string, ttl time.Duration) projection.Lease {
	t.Helper()
	l, err := state.Acquire(ctx, name, owner, ttl)
	require.NoError(t, err, "acquire %q for %q", name, owner)
	return l
}

// afterOrSoon waits until done is closed, but not longer than a moment: for
// races that are held open on purpose and whose verdict must not depend on
// whether the other side could get ahead meanwhile.
func (s *suite) afterOrSoon(done <-chan struct{}) {
	timer := time.NewTimer(s.moment)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	}
}
