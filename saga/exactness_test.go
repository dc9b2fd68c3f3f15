package saga_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

type (
	Locked   struct{}
	Unlocked struct{}
	Stamped  struct{ At time.Time }
)

func (Locked) EventType() string   { return "door.locked" }
func (Unlocked) EventType() string { return "door.unlocked" }
func (Stamped) EventType() string  { return "door.stamped" }

type Door struct{ Locked bool }

var doors = aggregate.Define("door",
	aggregate.On(func(d *Door, _ Locked) { d.Locked = true }),
	aggregate.On(func(d *Door, _ Unlocked) { d.Locked = false }),
	aggregate.On(func(*Door, Stamped) {}),
)

type Lock struct{ Door string }

func (c Lock) AggregateID() string { return c.Door }
func (c Lock) Decide(d Door) ([]aggregate.Event, error) {
	if d.Locked {
		return nil, nil
	}
	return aggregate.Events(Locked{}), nil
}

type Unlock struct{ Door string }

func (c Unlock) AggregateID() string                    { return c.Door }
func (c Unlock) Decide(Door) ([]aggregate.Event, error) { return aggregate.Events(Unlocked{}), nil }

type StampDoor struct {
	Door string
	At   time.Time
}

func (c StampDoor) AggregateID() string { return c.Door }
func (c StampDoor) Decide(Door) ([]aggregate.Event, error) {
	return aggregate.Events(Stamped{c.At}), nil
}

// TestExecute_WithoutEventsIsNotJudgedAgain: a command that does nothing leaves
// no key behind, so its record must be durable before anything happens after it.
func TestExecute_WithoutEventsIsNotJudgedAgain(t *testing.T) {
	t.Parallel()
	def := saga.Define("visit", func(s *saga.Run, _ string) (int, error) {
		if err := saga.Execute(s, "lock", doors, Lock{"d"}); err != nil {
			return 0, err
		}
		return 0, saga.Execute(s, "unlock", doors, Unlock{"d"})
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
	sagatest.CrashEverywhere(t, func() sagatest.Process { return def }, func(s *sagatest.Spec) {
		s.Given("door", "d", Locked{}).When("order", "o1", Placed{"x"}).Completed("o1", 0).Happened("door", "d", Unlocked{})
	}, func(testing.TB) {})
}

// TestOn_SecondTriggerHasNoEffect: an event for the id of a run that has ended
// starts nothing, and executes nothing on the way to finding that out.
func TestOn_SecondTriggerHasNoEffect(t *testing.T) {
	t.Parallel()
	def := saga.Define("bonus", func(s *saga.Run, sku string) (int, error) {
		if sku == "big" {
			return 0, saga.Execute(s, "grant", doors, Unlock{"d"})
		}
		return 0, nil
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
	sagatest.For(t, def).
		When("order", "o1", Placed{"small"}).Completed("o1", 0).
		When("order", "o1", Placed{"big"}).History("o1", "saga.started", "saga.completed").
		Happened("door", "d")
}

// TestNow_IsTheSameAtReplay: registering a compensation takes no time, neither
// at first nor when it is replayed.
func TestNow_IsTheSameAtReplay(t *testing.T) {
	t.Parallel()
	c := clock.NewManual(t0)
	var seen []time.Time
	def := saga.Define("now", func(s *saga.Run, _ string) (int, error) {
		if len(seen) == 0 {
			//deed:deterministic the clock moves on as a real one does, to see what comes of it
			c.Set(c.Now().Add(time.Second))
		}
		s.OnRollback("undo", func(*saga.Run) error { return nil })
		s.Settled()
		seen = append(seen, s.Now())
		return 0, s.Sleep("a day", day)
	})
	b := startBench(t, memory.New(), c, saga.Options{}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", ""))
	b.advance(2 * day)
	require.Len(t, seen, 2)
	require.Equal(t, seen[0], seen[1])
}

// TestNow_InACommandAfterACrash: a command that carries the run's time is the
// same one when the process died before its record.
func TestNow_InACommandAfterACrash(t *testing.T) {
	t.Parallel()
	c := clock.NewManual(t0)
	store := &dying{backend: memory.New(), after: "door"}
	def := saga.Define("stamp", func(s *saga.Run, _ string) (int, error) {
		//deed:deterministic the clock moves on as a real one does, to see what comes of it
		c.Set(c.Now().Add(time.Second))
		s.OnRollback("undo", func(*saga.Run) error { return nil })
		return 0, saga.Execute(s, "stamp", doors, StampDoor{"d", s.Now()})
	})
	b := startBench(t, store, c, saga.Options{}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", ""))
	require.Error(t, b.engine.Workers()[0].WaitThrough(t.Context(), 1<<40))
	require.Error(t, errors.Join(b.stop()...))
	store.revive()
	again := startBench(t, store, c, saga.Options{Owner: "two"}, def)
	again.settle()
	info, err := saga.Look(t.Context(), again.engine, def, "r")
	require.NoError(t, err)
	require.Equal(t, saga.StatusCompleted, info.Status, info.Error)
}

// dying takes one commit to a category and then is closed.
type dying struct {
	backend
	after string

	mu   sync.Mutex
	dead bool
}

func (d *dying) revive() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead, d.after = false, ""
}

func (d *dying) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return eventstore.Receipt{}, eventstore.ErrClosed
	}
	r, err := d.backend.Append(ctx, c)
	d.dead = c.Events[0].Stream.Category == d.after
	return r, err
}

// TestNow_AfterACarriedSleep: after Resume, a wait that is over is not waited
// for again, but the next one begins where it ended.
func TestNow_AfterACarriedSleep(t *testing.T) {
	t.Parallel()
	fail := true
	var seen []time.Time
	def := saga.Define("carry", func(s *saga.Run, _ string) (int, error) {
		s.OnRollback("undo", func(s *saga.Run) error {
			if err := s.Sleep("a", day); err != nil {
				return err
			}
			if fail {
				return saga.Terminal(errSoldOut)
			}
			seen = append(seen, s.Now())
			return s.Sleep("b", day)
		})
		return 0, errSoldOut
	})
	b := startBench(t, memory.New(), clock.NewManual(t0), saga.Options{}, def)
	require.NoError(t, saga.Start(t.Context(), b.engine, def, "r", ""))
	b.advance(3 * day)
	fail = false
	require.NoError(t, b.engine.Resume(t.Context(), "carry", "r"))
	b.advance(3 * day)
	require.Len(t, seen, 2, "the second sleep took no time")
	require.Equal(t, seen[0], seen[1])
}

// TestReact_LongErrorIsShortened: an error of any length is recorded, and the
// rest of the log goes on.
func TestReact_LongErrorIsShortened(t *testing.T) {
	t.Parallel()
	handled := 0
	r := saga.React("mail", func(_ saga.Step, e Placed) error {
		if e.SKU == "bad" {
			return errors.New(strings.Repeat("ü", 2<<20))
		}
		handled++
		return nil
	}, saga.Retry(1))
	b := newBench(t, r)
	exec(b, orders, Place{"o1", "bad"})
	exec(b, orders, Place{"o2", "good"})
	require.NoError(t, settle(t.Context(), b.store, b.engine.Workers()))
	require.Equal(t, 1, handled)
}

// TestRun_StoppedWhileAcquiringGivesTheLeaseBack.
func TestRun_StoppedWhileAcquiringGivesTheLeaseBack(t *testing.T) {
	t.Parallel()
	store := memory.New()
	def := saga.Define("z", func(*saga.Run, string) (int, error) { return 0, nil })
	ctx, cancel := context.WithCancel(t.Context())
	e := saga.NewEngine(store, cancelling{store, cancel}, nil, saga.Options{Clock: clock.NewManual(t0), Owner: "one"})
	require.NoError(t, e.Add(def))
	require.NoError(t, e.Workers()[0].Run(ctx))
	_, err := store.Acquire(t.Context(), e.Workers()[0].Name(), "two", 0)
	require.NoError(t, err)
}

// cancelling ends the run's context as soon as the lease is acquired.
type cancelling struct {
	backend
	cancel context.CancelFunc
}

func (c cancelling) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	lease, err := c.backend.Acquire(ctx, name, owner, ttl)
	c.cancel()
	return lease, err
}
