package saga_test

import (
	"context"
	"fmt"
	"iter"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

// parcels waits for two shipments of its order.
var parcels = saga.Define("parcels", func(s *saga.Run, _ string) (string, error) {
	first, err := saga.Await[Shipped](s, saga.Where(s.ID()), 10*day)
	if err != nil {
		return "", err
	}
	second, err := saga.Await[Shipped](s, saga.Where(s.ID()), 10*day)
	return first.Parcel + "," + second.Parcel, err
}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))

func TestAwait_EachEventOnce(t *testing.T) {
	t.Parallel()
	sagatest.For(t, parcels).
		When("order", "o1", Placed{"book"}).
		When("order", "o2", Shipped{"other"}).
		When("order", "o1", Shipped{"p1"}).
		Waiting("o1", `await "order.shipped" (occurrence 2)`).
		When("order", "o1", Shipped{"p2"}).
		Completed("o1", "p1,p2").
		History("o1", "saga.started", "saga.await_set", "saga.await_received", "saga.await_set", "saga.await_received", "saga.completed")
}

func TestAwait_SeesWhatHappenedSinceTheStart(t *testing.T) {
	t.Parallel()
	// All in one commit: the shipments are in the log before the run has even started.
	sagatest.For(t, parcels).
		When("order", "o1", Shipped{"before"}, Placed{"book"}, Shipped{"p1"}, Shipped{"p2"}).
		Completed("o1", "p1,p2")
}

func TestAwait_Timeout(t *testing.T) {
	t.Parallel()
	sagatest.For(t, parcels).
		When("order", "o1", Placed{"book"}).
		Advance(9*day).
		When("order", "o1", Shipped{"p1"}).
		Advance(10*day-time.Second).
		Waiting("o1", "await").
		Advance(time.Second).
		Failed("o1", saga.ErrTimeout)
}

func TestAwait_ForEverAndByTagAndStream(t *testing.T) {
	t.Parallel()
	def := saga.Define("tagged", func(s *saga.Run, parcel string) (string, error) {
		byTag, err := saga.Await[Shipped](s, saga.WhereTag("parcel:"+parcel), 0)
		if err != nil {
			return "", err
		}
		// The event matches this, too, but was received already.
		byStream, err := saga.Await[*Shipped](s, saga.WhereStream(eventstore.Stream{Category: "order", ID: "o1"}), 0)
		if err != nil {
			return "", err
		}
		anyOne, err := saga.Await[Shipped](s, saga.Match{}, 0)
		return byTag.Parcel + "," + byStream.Parcel + "," + anyOne.Parcel, err
	})
	sagatest.For(t, def).
		Start("r", "p1").
		When("order", "o1", Shipped{"p0"}).
		Advance(1000*day).
		Waiting("r", "await").
		When("order", "o1", Shipped{"p1"}).
		When("order", "o9", Shipped{"p9"}).
		Completed("r", "p1,p0,p9")
}

func TestCrash_Awaits(t *testing.T) {
	t.Parallel()
	sagatest.CrashEverywhere(t, func() sagatest.Process { return parcels }, func(s *sagatest.Spec) {
		s.When("order", "o1", Placed{"book"}, Shipped{"p1"}).
			When("order", "o1", Shipped{"p2"}).
			Completed("o1", "p1,p2")
	}, nil)
}

// gated stops the n-th append of a type of event until it is let go, with a
// hook before and after it.
type gated struct {
	*memory.Store
	eventType     string
	before, after func()
	once          sync.Once
}

func (g *gated) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	for _, e := range c.Events {
		if e.Type == g.eventType {
			first := false
			g.once.Do(func() { first = true })
			if first {
				if g.before != nil {
					g.before()
				}
				receipt, err := g.Store.Append(ctx, c)
				if g.after != nil {
					g.after()
				}
				return receipt, err
			}
		}
	}
	return g.Store.Append(ctx, c)
}

// scanned stops the scan for an awaited event.
type scanned struct {
	*memory.Store
	during func()
	once   sync.Once
}

func (g *scanned) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	if len(q.Items) == 1 && len(q.Items[0].Types) == 1 && q.Items[0].Types[0] == "order.shipped" {
		g.once.Do(g.during)
	}
	return g.Store.Read(ctx, q, o)
}

// TestAwait_Races puts the event into every window there is between the code
// asking for it and the index knowing that somebody waits.
func TestAwait_Races(t *testing.T) {
	t.Parallel()
	ship := func(store *memory.Store, parcel string) {
		_, err := store.Append(context.Background(), eventstore.Commit{Events: []eventstore.Event{{
			Stream: eventstore.Stream{Category: "order", ID: "o1"}, Type: "order.shipped", Data: fmt.Appendf(nil, `{"Parcel":%q}`, parcel),
		}}})
		if err != nil {
			panic(err)
		}
	}
	cases := map[string]func(*memory.Store) backend{
		"just before the wait is recorded": func(m *memory.Store) backend {
			return &gated{Store: m, eventType: "saga.await_set", before: func() { ship(m, "p1"); ship(m, "p2") }}
		},
		"just after the wait is recorded": func(m *memory.Store) backend {
			return &gated{Store: m, eventType: "saga.await_set", after: func() { ship(m, "p1"); ship(m, "p2") }}
		},
		"on both sides": func(m *memory.Store) backend {
			return &gated{Store: m, eventType: "saga.await_set", before: func() { ship(m, "p1") }, after: func() { ship(m, "p2") }}
		},
		"during the scan": func(m *memory.Store) backend {
			return &scanned{Store: m, during: func() { ship(m, "p1"); ship(m, "p2") }}
		},
		"during the scan and later": func(m *memory.Store) backend {
			return &scanned{Store: m, during: func() { ship(m, "p1") }}
		},
		"while the first is delivered": func(m *memory.Store) backend {
			return &gated{Store: m, eventType: "saga.await_received", before: func() { ship(m, "p2") }}
		},
	}
	for name, wrap := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := memory.New()
			b := startBench(t, wrap(m), clock.NewManual(t0), saga.Options{}, parcels)
			exec(b, orders, Place{"o1", "book"})
			switch name {
			case "during the scan and later":
				b.settle()
				ship(m, "p2")
			case "while the first is delivered":
				ship(m, "p1")
			}
			b.settle()
			out, err := saga.Wait(t.Context(), b.engine, parcels, "o1")
			require.NoError(t, err)
			require.Equal(t, "p1,p2", out)
		})
	}
}

// TestAwait_EventBeatsTimeout: what is in the log when the timeout is handled
// counts, although the worker has not come to it yet.
func TestAwait_EventBeatsTimeout(t *testing.T) {
	t.Parallel()
	m := memory.New()
	slow := &lagging{Store: m, held: make(chan struct{})}
	b := startBench(t, slow, clock.NewManual(t0), saga.Options{}, parcels)
	exec(b, orders, Place{"o1", "book"})
	b.settle()
	slow.hold(true)
	exec(b, orders, Ship{"o1", "p1"})
	exec(b, orders, Ship{"o1", "p2"})
	b.clock.Set(t0.Add(10 * day)) // fires by itself
	require.Eventually(t, func() bool { return len(b.types(history("parcels", "o1"))) >= 4 }, 10*time.Second, time.Millisecond)
	slow.hold(false)
	b.settle()
	out, err := saga.Wait(t.Context(), b.engine, parcels, "o1")
	require.NoError(t, err)
	require.Equal(t, "p1,p2", out)
}

// lagging holds batches of subscriptions back.
type lagging struct {
	*memory.Store
	mu   sync.Mutex
	on   bool
	held chan struct{}
}

func (l *lagging) hold(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.on = on
	if !on {
		close(l.held)
	}
}

func (l *lagging) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		for batch, err := range l.Store.Subscribe(ctx, q, after) {
			l.mu.Lock()
			on := l.on
			l.mu.Unlock()
			if on {
				select {
				case <-l.held:
				case <-ctx.Done():
				}
			}
			if !yield(batch, err) {
				return
			}
		}
	}
}
