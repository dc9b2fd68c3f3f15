package aggregate_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"iter"
	"log/slog"
	"math/big"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

// snapshotMap is a snapshot store in memory.
type snapshotMap struct {
	mu         sync.Mutex
	kept       map[eventstore.Stream]aggregate.Snapshot
	saves      int
	loadErr    error
	beforeSave func()
}

func (m *snapshotMap) LoadSnapshot(_ context.Context, s eventstore.Stream) (aggregate.Snapshot, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	snapshot, ok := m.kept[s]
	return snapshot, ok, m.loadErr
}

func (m *snapshotMap) SaveSnapshot(_ context.Context, s aggregate.Snapshot) error {
	if m.beforeSave != nil {
		m.beforeSave()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kept == nil {
		m.kept = map[eventstore.Stream]aggregate.Snapshot{}
	}
	m.kept[s.Stream] = s
	m.saves++
	return nil
}

func (m *snapshotMap) of(s eventstore.Stream) aggregate.Snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.kept[s]
}

func snapshotted(every int) *aggregate.Definition[account] {
	return aggregate.Define("account", append(parts(), aggregate.SnapshotEvery[account](every))...)
}

func TestSnapshot_OfDurableStateOnly(t *testing.T) {
	t.Parallel()
	snapshots := &snapshotMap{}
	gated(t, aggregate.Options{Snapshots: snapshots}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		def := snapshotted(2)
		for i := range 5 {
			startOf(t, r, def, on("ann", deposit(int64(i+1))))
		}
		g.next(t).release()
		synctest.Wait()
		require.Zero(t, snapshots.saves)
		second := g.next(t)
		require.Zero(t, snapshots.saves, "the second event is not durable")
		second.release()
		synctest.Wait()
		s := snapshots.of(ann)
		require.Equal(t, 1, snapshots.saves)
		require.Equal(t, eventstore.Revision{Version: 2, Position: 2}, s.Revision)
		require.Equal(t, second.Events[0].ID, s.LastEvent)
		require.JSONEq(t, `{"Owner":"","Cents":3,"Notes":null}`, string(s.State), "not what was decided since")
		g.pass()
		require.Equal(t, uint64(4), snapshots.of(ann).Revision.Version)
	})
}

func TestSnapshot_OfACommitThatFails(t *testing.T) {
	t.Parallel()
	snapshots := &snapshotMap{}
	gated(t, aggregate.Options{Snapshots: snapshots}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		startOf(t, r, snapshotted(1), on("ann", deposit(1)))
		g.next(t).fail(eventstore.ErrTooLarge)
		synctest.Wait()
		require.Zero(t, snapshots.saves)
	})
}

func TestSnapshot_StopWaitsForIt(t *testing.T) {
	t.Parallel()
	hold := make(chan struct{})
	snapshots := &snapshotMap{beforeSave: func() { <-hold }}
	synctest.Test(t, func(t *testing.T) {
		hold = make(chan struct{})
		r := aggregate.NewRuntime(memory.New(), aggregate.Options{Snapshots: snapshots})
		_, err := aggregate.Execute(t.Context(), r, snapshotted(1), on("ann", deposit(1)))
		require.NoError(t, err, "nobody waits for a snapshot")
		stopped := make(chan error, 1)
		go func() { stopped <- r.Stop(t.Context()) }()
		synctest.Wait()
		require.Empty(t, stopped)
		close(hold)
		require.NoError(t, <-stopped)
		require.Equal(t, 1, snapshots.saves)
	})
}

// counting counts the events that were read.
type counting struct {
	*memory.Store
	events int
}

func (s *counting) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	return func(yield func(eventstore.Recorded, error) bool) {
		for r, err := range s.Store.Read(ctx, q, o) {
			s.events++
			if !yield(r, err) {
				return
			}
		}
	}
}

// another state, and other events, under the same names.
type wider struct {
	account
	Limit int
}

type depositedSince struct {
	Cents int64
	By    string
}

func (depositedSince) EventType() string { return "account.deposited" }

func TestSnapshot_IsOnlyAHint(t *testing.T) {
	t.Parallel()
	logger := slog.New(slog.DiscardHandler)
	store := &counting{Store: memory.New()}
	snapshots := &snapshotMap{}
	def := snapshotted(5)
	r := aggregate.NewRuntime(store, aggregate.Options{Snapshots: snapshots, Logger: logger})
	for i := range 7 {
		_, err := aggregate.Execute(t.Context(), r, def, on("ann", deposit(int64(i))))
		require.NoError(t, err)
	}
	require.NoError(t, r.Stop(t.Context()))
	good := snapshots.of(ann)
	require.Equal(t, uint64(5), good.Revision.Version)

	for name, c := range map[string]struct {
		change func(s *aggregate.Snapshot, m *snapshotMap)
		def    *aggregate.Definition[account]
		want   int // events read
	}{
		"Good":               {nil, def, 1 + 2},
		"SameDefinition":     {nil, snapshotted(5), 1 + 2},
		"OtherPolicy":        {nil, snapshotted(3), 1 + 2},
		"None":               {func(_ *aggregate.Snapshot, m *snapshotMap) { m.kept = nil }, def, 7},
		"StoreFails":         {func(_ *aggregate.Snapshot, m *snapshotMap) { m.loadErr = errors.New("disk") }, def, 7},
		"OtherVersion":       {nil, aggregate.Define("account", append(parts(), aggregate.SnapshotEvery[account](5), aggregate.SnapshotVersion[account](2))...), 7},
		"OtherEventTypes":    {nil, aggregate.Define("account", append(parts(), aggregate.SnapshotEvery[account](5), aggregate.On(func(*account, dated) {}))...), 7},
		"OtherEventStruct":   {nil, aggregate.Define("account", aggregate.SnapshotEvery[account](5), aggregate.On(func(a *account, e depositedSince) { a.Cents += e.Cents })), 7},
		"DoesNotDecode":      {func(s *aggregate.Snapshot, _ *snapshotMap) { s.State = []byte(`{"Cents":"many"}`) }, def, 7},
		"BeyondTheStream":    {func(s *aggregate.Snapshot, _ *snapshotMap) { s.Revision = eventstore.Revision{Version: 9, Position: 9} }, def, 7},
		"OtherPosition":      {func(s *aggregate.Snapshot, _ *snapshotMap) { s.Revision.Position = 4 }, def, 7 + 1},
		"OtherLastEvent":     {func(s *aggregate.Snapshot, _ *snapshotMap) { s.LastEvent = uuid.UUID{1} }, def, 7 + 1},
		"OtherStream":        {func(s *aggregate.Snapshot, _ *snapshotMap) { s.Stream.ID = "bob" }, def, 7},
		"NoRevision":         {func(s *aggregate.Snapshot, _ *snapshotMap) { s.Revision = eventstore.Revision{} }, def, 7},
		"OtherFingerprint":   {func(s *aggregate.Snapshot, _ *snapshotMap) { s.Fingerprint = "x" }, def, 7},
		"WithoutSnapshotsIn": {nil, accounts, 7},
	} {
		t.Run(name, func(t *testing.T) {
			changed, m := good, &snapshotMap{}
			m.kept = map[eventstore.Stream]aggregate.Snapshot{ann: good}
			if c.change != nil {
				c.change(&changed, m)
				if m.kept != nil {
					m.kept[ann] = changed
				}
			}
			store.events = 0
			r := aggregate.NewRuntime(store, aggregate.Options{Snapshots: m, Logger: logger})
			state, at, err := aggregate.Load(t.Context(), r, c.def, "ann")
			require.NoError(t, err)
			require.Equal(t, account{Cents: 21}, state)
			require.Equal(t, eventstore.Revision{Version: 7, Position: 7}, at)
			require.Equal(t, c.want, store.events, "events read")
		})
	}

	t.Run("OtherStateType", func(t *testing.T) {
		other := aggregate.Define("account", aggregate.SnapshotEvery[wider](5), aggregate.On(func(w *wider, e deposited) { w.Cents += e.Cents; w.Limit++ }))
		state, _, err := aggregate.Load(t.Context(), aggregate.NewRuntime(store, aggregate.Options{Snapshots: snapshots, Logger: logger}), other, "ann")
		require.NoError(t, err)
		require.Equal(t, 7, state.Limit)
	})

	t.Run("OtherUpcasters", func(t *testing.T) {
		enc, err := eventstore.NewEncoding(eventstore.Upcast("account.deposited", 1, func(e deposited) (deposited, error) {
			e.Cents *= 2
			return e, nil
		}))
		require.NoError(t, err)
		state, _, err := aggregate.Load(t.Context(), aggregate.NewRuntime(store, aggregate.Options{Encoding: enc, Snapshots: snapshots, Logger: logger}), def, "ann")
		require.NoError(t, err)
		require.Equal(t, int64(42), state.Cents)
	})

	t.Run("CancelledLoad", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, _, err := aggregate.Load(ctx, aggregate.NewRuntime(store, aggregate.Options{Snapshots: &snapshotMap{loadErr: context.Canceled}, Logger: logger}), def, "ann")
		require.ErrorIs(t, err, context.Canceled)
	})
}

func TestSnapshot_TakenAfterALongReplay(t *testing.T) {
	t.Parallel()
	snapshots := &snapshotMap{}
	gated(t, aggregate.Options{Snapshots: snapshots}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		for range 3 {
			g.foreign(t, 1)
		}
		startOf(t, r, snapshotted(3), on("ann", nothing)).succeeds(t)
		require.Equal(t, uint64(3), snapshots.of(ann).Revision.Version)
	})
}

// forgetful marshals, but not everything.
type forgetful struct{ n, lost int }

func (f forgetful) MarshalJSON() ([]byte, error)  { return json.Marshal(f.n) }
func (f *forgetful) UnmarshalJSON(b []byte) error { return json.Unmarshal(b, &f.n) }

func TestSnapshot_OfAStateThatDoesNotComeBack(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	snapshots := &snapshotMap{}
	r := aggregate.NewRuntime(memory.New(), aggregate.Options{Snapshots: snapshots, Logger: slog.New(slog.NewTextHandler(&out, nil))})
	def := aggregate.Define("account", aggregate.SnapshotEvery[forgetful](1), aggregate.On(func(f *forgetful, e deposited) { f.n, f.lost = f.n+1, f.lost+1 }))
	_, err := aggregate.Execute(t.Context(), r, def, aggregate.Request[forgetful]{ID: "ann", Decide: func(forgetful) ([]aggregate.Event, error) {
		return aggregate.Events(deposited{}), nil
	}})
	require.NoError(t, err)
	require.NoError(t, r.Stop(t.Context()))
	require.Zero(t, snapshots.saves)
	require.Contains(t, out.String(), `msg="deed: no snapshot is taken" stream=account-ann error="aggregate_test.forgetful is not the same after JSON`)
}

// cart holds what JSON changes in silence: an empty map that is left out, and a
// time whose location has a name.
type cart struct {
	Items map[string]int `json:",omitempty"`
	Seen  time.Time
	Count int
}

type cartOpened struct{ At time.Time }

func (cartOpened) EventType() string { return "cart.opened" }

type cartAdded struct{ Item string }

func (cartAdded) EventType() string { return "cart.added" }

func carts(parts ...aggregate.Part[cart]) *aggregate.Definition[cart] {
	return aggregate.Define("cart", append([]aggregate.Part[cart]{
		aggregate.On(func(c *cart, e cartOpened) {
			c.Items = map[string]int{}
			if !e.At.IsZero() {
				c.Seen = e.At.In(time.FixedZone("CET", 3600))
			}
		}),
		aggregate.On(func(c *cart, e cartAdded) {
			c.Items[e.Item]++
			c.Count++
		}),
	}, parts...)...)
}

func happens(events ...aggregate.Event) aggregate.Request[cart] {
	return aggregate.Request[cart]{ID: "x", Decide: func(cart) ([]aggregate.Event, error) { return events, nil }}
}

// A snapshot never changes what is decided: a state that JSON would change in
// any way is not kept.
func TestSnapshot_ChangesNoAnswer(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		opened cartOpened
		added  []aggregate.Event
		saves  int
	}{
		"EmptyMap":     {added: nil, saves: 0},
		"TimeLocation": {opened: cartOpened{At: t0}, added: aggregate.Events(cartAdded{"a"}), saves: 0},
		"Same":         {added: aggregate.Events(cartAdded{"a"}), saves: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			store, snapshots := memory.New(), &snapshotMap{}
			o := aggregate.Options{Snapshots: snapshots, Logger: slog.New(slog.NewTextHandler(&out, nil))}
			def := carts(aggregate.SnapshotEvery[cart](1))
			r := aggregate.NewRuntime(store, o)
			_, err := aggregate.Execute(t.Context(), r, def, happens(append(aggregate.Events(c.opened), c.added...)...))
			require.NoError(t, err)
			require.NoError(t, r.Stop(t.Context()))
			require.Equal(t, c.saves, snapshots.saves, "snapshots kept")
			require.Equal(t, c.saves == 0, strings.Contains(out.String(), "no snapshot is taken"))

			r = aggregate.NewRuntime(store, o)
			fast, _, err := aggregate.Load(t.Context(), r, def, "x")
			require.NoError(t, err)
			full, _, err := aggregate.Load(t.Context(), r, carts(), "x")
			require.NoError(t, err)
			require.Equal(t, full, fast)
			_, err = aggregate.Execute(t.Context(), r, def, happens(cartAdded{"b"}))
			require.NoError(t, err, "after a restart")
			require.NoError(t, r.Stop(t.Context()))
		})
	}
}

func TestSnapshot_UnfitStateIsToldOnce(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	m := &meters{counts: map[string]int64{}}
	r := aggregate.NewRuntime(memory.New(), aggregate.Options{Snapshots: &snapshotMap{}, Logger: slog.New(slog.NewTextHandler(&out, nil)), MeterProvider: m})
	def := carts(aggregate.SnapshotEvery[cart](1))
	for range 3 {
		_, err := aggregate.Execute(t.Context(), r, def, happens(cartOpened{}))
		require.NoError(t, err)
	}
	require.NoError(t, r.Stop(t.Context()))
	require.Equal(t, 1, strings.Count(out.String(), "no snapshot is taken"))
	require.Equal(t, map[string]int64{"deed.aggregate.unfit_snapshots": 3}, m.counts)
}

// A snapshot that fits in all that can be checked, and whose state is wrong all
// the same, costs a replay: neither Decide nor a fold may fail because of it.
func TestSnapshot_WrongStateBlocksNothing(t *testing.T) {
	t.Parallel()
	late := aggregate.OnMeta(func(c *cart, e cartCounted, _ eventstore.Recorded) { c.Items["late"]++ })
	for name, decide := range map[string]func(cart) ([]aggregate.Event, error){
		"Fold":     func(cart) ([]aggregate.Event, error) { return aggregate.Events(cartAdded{"b"}), nil },
		"LateFold": func(cart) ([]aggregate.Event, error) { return aggregate.Events(cartCounted{}), nil },
		"Decide": func(c cart) ([]aggregate.Event, error) {
			c.Items["only to see that there is a map"] = 1
			delete(c.Items, "only to see that there is a map")
			return aggregate.Events(cartAdded{"b"}), nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store, snapshots := memory.New(), &snapshotMap{}
			o := aggregate.Options{Snapshots: snapshots, Logger: slog.New(slog.DiscardHandler)}
			def := carts(aggregate.SnapshotEvery[cart](2), late)
			r := aggregate.NewRuntime(store, o)
			_, err := aggregate.Execute(t.Context(), r, def, happens(cartOpened{}, cartAdded{"a"}))
			require.NoError(t, err)
			require.NoError(t, r.Stop(t.Context()))
			stream := def.Stream("x")
			wrong := snapshots.of(stream)
			wrong.State = []byte(`{"Count":1}`)
			snapshots.kept[stream] = wrong

			r = aggregate.NewRuntime(store, o)
			for range 2 {
				_, err = aggregate.Execute(t.Context(), r, def, aggregate.Request[cart]{ID: "x", Decide: decide})
				require.NoError(t, err)
			}
			var decidedOn cart
			_, err = aggregate.Execute(t.Context(), r, def, aggregate.Request[cart]{ID: "x", Decide: func(c cart) ([]aggregate.Event, error) {
				decidedOn = c
				return nil, nil
			}})
			require.NoError(t, err)
			full, _, err := aggregate.Load(t.Context(), r, carts(late), "x")
			require.NoError(t, err)
			require.Equal(t, full, decidedOn)
			require.NoError(t, r.Stop(t.Context()))
		})
	}
}

type cartCounted struct{}

func (cartCounted) EventType() string { return "cart.counted" }

// priced encodes no zero value.
type priced struct{ Price *big.Rat }

func (priced) EventType() string              { return "account.priced" }
func (p priced) MarshalJSON() ([]byte, error) { return json.Marshal(p.Price.RatString()) }
func (p *priced) UnmarshalJSON(b []byte) error {
	p.Price = new(big.Rat)
	return json.Unmarshal(b, p.Price)
}

func TestSnapshot_EncodesNoZeroValues(t *testing.T) {
	t.Parallel()
	snapshots := &snapshotMap{}
	r := aggregate.NewRuntime(memory.New(), aggregate.Options{Snapshots: snapshots})
	def := aggregate.Define("account", aggregate.SnapshotEvery[account](1), aggregate.On(func(a *account, e priced) { a.Cents++ }))
	_, err := aggregate.Execute(t.Context(), r, def, on("ann", func(account) ([]aggregate.Event, error) {
		return aggregate.Events(priced{big.NewRat(1, 2)}), nil
	}))
	require.NoError(t, err)
	require.NoError(t, r.Stop(t.Context()))
	require.Equal(t, 1, snapshots.saves)
}

func TestSnapshot_StoreThatEndsItsGoroutineOrPanics(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(){"Goexit": runtime.Goexit, "Panic": func() { panic("disk") }} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := aggregate.NewRuntime(memory.New(), aggregate.Options{
					Snapshots: &snapshotMap{beforeSave: end}, Logger: slog.New(slog.DiscardHandler),
				})
				_, err := aggregate.Execute(t.Context(), r, snapshotted(1), on("ann", deposit(1)))
				require.NoError(t, err)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				require.NoError(t, r.Stop(ctx))
			})
		})
	}
}

// TestSnapshot_EqualsFullReplay: whatever was written, in commits of whatever
// size, a load with snapshots is a full replay.
func TestSnapshot_EqualsFullReplay(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		store, snapshots := memory.New(), &snapshotMap{}
		every := rapid.IntRange(1, 6).Draw(t, "every")
		def := snapshotted(every)
		commits := rapid.SliceOfN(rapid.SliceOfN(rapid.Int64Range(-5, 5), 0, 4), 0, 20).Draw(t, "commits")
		restart := rapid.SliceOfN(rapid.Bool(), len(commits), len(commits)).Draw(t, "restart")
		r := aggregate.NewRuntime(store, aggregate.Options{Snapshots: snapshots})
		total := 0
		for i, cents := range commits {
			_, err := aggregate.Execute(context.Background(), r, def, on("ann", func(account) ([]aggregate.Event, error) {
				var events []aggregate.Event
				for _, c := range cents {
					events = append(events, deposited{Cents: c, Notes: []string{"a", "b"}[:(c+5)%3]})
				}
				return events, nil
			}))
			require.NoError(t, err)
			total += len(cents)
			if restart[i] {
				require.NoError(t, r.Stop(context.Background()))
				r = aggregate.NewRuntime(store, aggregate.Options{Snapshots: snapshots})
			}
		}
		require.NoError(t, r.Stop(context.Background()))
		require.Equal(t, total >= every, snapshots.saves > 0)
		fast, fastAt, err := aggregate.Load(context.Background(), r, def, "ann")
		require.NoError(t, err)
		full, at, err := aggregate.Load(context.Background(), r, accounts, "ann")
		require.NoError(t, err)
		require.Equal(t, at, fastAt)
		require.Equal(t, full, fast)
	})
}
