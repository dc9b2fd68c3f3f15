package esdb_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/query"
	"github.com/deed-go/deed/saga"
)

type (
	Ordered struct{ By string }
	Packed  struct{ Of string }

	Basket struct{ Orders int }
	Parcel struct{ Packed int }

	Order struct{ Basket, By string }
	Pack  struct{ Of string }
)

func (Ordered) EventType() string { return "basket.ordered" }
func (Packed) EventType() string  { return "parcel.packed" }

var (
	baskets = aggregate.Define("basket", aggregate.On(func(b *Basket, _ Ordered) { b.Orders++ }))
	parcels = aggregate.Define("parcel", aggregate.On(func(p *Parcel, _ Packed) { p.Packed++ }))
	orders  = projection.Of("orders", baskets)
)

func (c Order) AggregateID() string { return c.Basket }
func (c Order) Decide(Basket) ([]aggregate.Event, error) {
	return aggregate.Events(Ordered{c.By}), nil
}

func (c Pack) AggregateID() string                      { return c.Of }
func (c Pack) Decide(Parcel) ([]aggregate.Event, error) { return aggregate.Events(Packed(c)), nil }

// The server goes away while an application runs. With it down, each of 100
// callers returns within its own deadline; with it up again the same application
// goes on: every command that is given again under its key takes effect once, the
// projection has every event once, the reaction has answered each, and every saga
// has packed its parcel once. The second outage hits calls that are on their way.
func TestApp_ServerDown(t *testing.T) {
	t.Parallel()
	server := ours(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	var mu sync.Mutex
	letters := map[string]int{}
	reaction := saga.React("letter", func(s saga.Step, _ Ordered) error {
		mu.Lock()
		defer mu.Unlock()
		letters[s.IdempotencyKey()]++
		return nil
	}).FromStart()
	packing := saga.Define("packing", func(s *saga.Run, in Ordered) (struct{}, error) {
		return struct{}{}, saga.Execute(s, "pack", parcels, Pack{in.By})
	}, saga.On(func(e Ordered, _ eventstore.Recorded) (string, Ordered) { return e.By, e })).FromStart()
	app, err := deed.Start(ctx, esdb.URL(server.URL(), esdb.Patience(time.Minute)), deed.State(memory.New()), baskets, parcels, orders, reaction, packing)
	require.NoError(t, err)
	defer func() { require.NoError(t, app.Stop(context.WithoutCancel(ctx))) }()

	const callers, shared = 100, 10
	place := func(ctx context.Context, round, i int) error {
		by := fmt.Sprintf("%d.%d", round, i)
		_, err := deed.Execute(ctx, app, baskets, Order{fmt.Sprint("b", i%shared), by}, command.Key("order "+by))
		return err
	}
	var last eventstore.Receipt
	for i := range shared {
		by := fmt.Sprint("first.", i)
		last, err = deed.Execute(ctx, app, baskets, Order{fmt.Sprint("b", i), by})
		require.NoError(t, err)
	}
	_, err = query.Get(ctx, app, orders, "b0", query.AtLeast(last))
	require.NoError(t, err)

	const rounds = 2
	for round := range rounds {
		var placed, late, unknown, refused atomic.Int64
		var worst atomic.Int64
		outage := sync.OnceFunc(server.Down)
		if round == 0 {
			outage()
		}
		var all sync.WaitGroup
		for i := range callers {
			all.Go(func() {
				within := time.Duration(100+i*10) * time.Millisecond
				own, stop := context.WithTimeout(ctx, within)
				defer stop()
				began := time.Now()
				err := place(own, round, i)
				over := time.Since(began) - within
				switch {
				case err == nil:
					if placed.Add(1) == callers/4 {
						outage() // the others are on their way, or have not begun
					}
					return
				case errors.Is(err, eventstore.ErrOutcomeUnknown):
					unknown.Add(1)
				case errors.Is(err, context.DeadlineExceeded):
					late.Add(1)
				default:
					refused.Add(1)
					t.Errorf("caller %d: %v", i, err)
				}
				for {
					w := worst.Load()
					if int64(over) <= w || worst.CompareAndSwap(w, int64(over)) {
						return
					}
				}
			})
		}
		all.Wait()
		outage()
		require.EqualValues(t, callers, placed.Load()+late.Load()+unknown.Load()+refused.Load(), "every caller has returned")
		if round == 0 {
			require.Zero(t, placed.Load(), "the server is down")
		}
		require.Less(t, time.Duration(worst.Load()), 5*time.Second, "a caller was kept beyond its deadline")
		t.Logf("outage %d: of %d callers %d had succeeded, %d returned at their deadlines, %d with an unknown outcome; the latest %s after its deadline",
			round+1, callers, placed.Load(), late.Load(), unknown.Load(), time.Duration(worst.Load()))

		require.NoError(t, server.Up())
		for i := range callers {
			all.Go(func() {
				if err := place(ctx, round, i); err != nil {
					t.Errorf("caller %d, with the server up again: %v", i, err)
				}
			})
		}
		all.Wait()
		require.False(t, t.Failed())
		require.NoError(t, app.Settle(ctx), "projections and sagas go on")

		want := shared + (round+1)*callers
		count := 0
		for entry, err := range query.All(ctx, app, orders) {
			require.NoError(t, err)
			count += entry.Row.Orders
		}
		require.Equal(t, want, count, "the projection has each order once")
		mu.Lock()
		seen, calls := len(letters), 0
		for _, n := range letters {
			calls += n
		}
		mu.Unlock()
		require.Equal(t, want, seen, "the reaction has seen each order")
		packed := map[string]int{}
		events := 0
		for e, err := range app.Store().Read(ctx, eventstore.OfTypes("parcel.packed"), eventstore.ReadOptions{}) {
			require.NoError(t, err)
			packed[e.Stream.ID]++
			events++
		}
		require.Len(t, packed, want, "a parcel for each order")
		require.Equal(t, want, events, "and one only")
		t.Logf("after restart %d: %d orders in the projection, %d letters in %d calls, %d parcels", round+1, count, seen, calls, events)
	}
}
