package projection_test

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type opened struct{ Owner string }

type deposited struct{ Cents int64 }

type closed struct{}

func (opened) EventType() string    { return "account.opened" }
func (deposited) EventType() string { return "account.deposited" }
func (*closed) EventType() string   { return "account.closed" }

type balance struct {
	Owner string
	Cents int64
	Seen  []uint64 // versions in the order in which they were folded
}

func balances() *projection.ViewDefinition[balance] {
	return projection.View("balances",
		projection.OnMeta(func(b *balance, e opened, r eventstore.Recorded) {
			b.Owner = e.Owner
			b.Seen = append(b.Seen, r.Version)
		}),
		projection.OnMeta(func(b *balance, e deposited, r eventstore.Recorded) {
			b.Cents += e.Cents
			b.Seen = append(b.Seen, r.Version)
		}),
		projection.DeleteOn[balance, *closed](),
	)
}

func account(id string) eventstore.Stream { return eventstore.Stream{Category: "account", ID: id} }

// backend is a store that is a state too: what the engine tests run on.
type backend interface {
	eventstore.Store
	projection.State
	Close() error
}

// onBackends runs the test on every embedded store.
func onBackends(t *testing.T, test func(t *testing.T, open func(t *testing.T) backend)) {
	for name, open := range backends {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, open)
		})
	}
}

var backends = map[string]func(t *testing.T) backend{
	"memory": func(t *testing.T) backend {
		s := memory.New()
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		return s
	},
	"sqlite": func(t *testing.T) backend {
		s, err := sqlite.Open(context.Background(), filepath.Join(t.TempDir(), "events.db"))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		return s
	},
}

func put(t testing.TB, store eventstore.Store, stream eventstore.Stream, events ...projection.Event) eventstore.Receipt {
	t.Helper()
	c := eventstore.Commit{}
	for _, e := range events {
		encoded := eventstore.Event{Stream: stream, Type: e.EventType()}
		data, err := (*eventstore.Encoding)(nil).Encode(e.EventType(), e, &encoded.Metadata)
		require.NoError(t, err)
		encoded.Data = data
		c.Events = append(c.Events, encoded)
	}
	receipt, err := store.Append(context.Background(), c)
	require.NoError(t, err)
	return receipt
}

var quiet = slog.New(slog.DiscardHandler)

// running is an engine whose workers run.
type running struct {
	*projection.Engine
	cancel context.CancelFunc
	done   sync.WaitGroup
	errs   []error
}

func start(t testing.TB, store eventstore.Store, state projection.State, o projection.Options, projections ...projection.Projection) *running {
	t.Helper()
	if o.Logger == nil {
		o.Logger = quiet
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{Engine: projection.NewEngine(store, state, o), cancel: cancel}
	for _, p := range projections {
		require.NoError(t, r.Add(p))
	}
	workers := r.Workers()
	r.errs = make([]error, len(workers))
	for i, w := range workers {
		r.done.Go(func() { r.errs[i] = w.Run(ctx) })
	}
	t.Cleanup(func() { _ = r.stop() })
	return r
}

// stop ends the workers and returns what they returned.
func (r *running) stop() error {
	r.cancel()
	r.done.Wait()
	return errors.Join(r.errs...)
}

func (r *running) caughtUp(t testing.TB, store eventstore.Store, names ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	head, err := store.Head(ctx)
	require.NoError(t, err)
	for _, name := range names {
		require.NoError(t, r.WaitFor(ctx, name, head), "waiting for %q to reach %d", name, head)
	}
}

// status is that of the only projection.
func (r *running) status(t testing.TB) projection.Status {
	t.Helper()
	all, err := r.Status(context.Background())
	require.NoError(t, err)
	require.Len(t, all, 1)
	return all[0]
}

func rows[R any](t testing.TB, state projection.State, view *projection.ViewDefinition[R]) map[string]R {
	t.Helper()
	all := map[string]R{}
	require.NoError(t, state.View(context.Background(), func(tx projection.StateTx) error {
		for e, err := range view.Rows(tx, projection.Range{}) {
			if err != nil {
				return err
			}
			all[e.Key] = e.Row
		}
		return nil
	}))
	return all
}

func TestView_CatchesUpThenFollows(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})
		put(t, store, account("bob"), opened{"Bob"})
		view := balances()
		r := start(t, store, store, projection.Options{}, view)
		r.caughtUp(t, store, "balances")
		require.Equal(t, map[string]balance{
			"ann": {Owner: "Ann", Cents: 5, Seen: []uint64{1, 2}},
			"bob": {Owner: "Bob", Seen: []uint64{1}},
		}, rows(t, store, view))

		put(t, store, account("ann"), deposited{7})
		put(t, store, account("bob"), &closed{})
		r.caughtUp(t, store, "balances")
		require.Equal(t, map[string]balance{
			"ann": {Owner: "Ann", Cents: 12, Seen: []uint64{1, 2, 3}},
		}, rows(t, store, view))
		require.NoError(t, r.stop())
	})
}
