package aggregate_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

// moved says what it was decided on, so that the log itself shows whether
// every decision was made on the history that is before it.
type moved struct {
	Op         int
	Cents      int64
	SawVersion int
	SawCents   int64
}

func (moved) EventType() string { return "ledger.moved" }

type ledger struct {
	Version int
	Cents   int64
	Ops     map[int]bool
}

var ledgers = aggregate.Define("ledger",
	aggregate.On(func(l *ledger, e moved) {
		if l.Ops == nil {
			l.Ops = map[int]bool{}
		}
		l.Version++
		l.Cents += e.Cents
		l.Ops[e.Op] = true
	}),
	aggregate.SnapshotEvery[ledger](7))

var errOverdrawn = errors.New("overdrawn")

// op is one call of the random run, with what it saw last.
type op struct {
	number  int
	stream  eventstore.Stream
	key     string
	began   int // events of the stream when it was called
	saw     ledger
	cancel  context.CancelFunc
	done    bool
	receipt eventstore.Receipt
	err     error
}

// TestPipeline_RandomFaults runs random calls on two aggregates of a store
// that conflicts, fails, loses answers, delays commits and is written to by
// others, and checks the log and every answer against a replay.
func TestPipeline_RandomFaults(t *testing.T) {
	t.Parallel()
	runs := 100
	if testing.Short() {
		runs = 20
	}
	for range runs {
		seed := rand.Uint64()
		ok := t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomFaults(t, seed) })
		})
		if !ok {
			return
		}
	}
}

func randomFaults(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	g := &gate{Store: memory.New(), held: make(chan *heldCommit, 10000)}
	snapshots := &snapshotMap{}
	r := aggregate.NewRuntime(g, aggregate.Options{
		PipelineDepth: 1 + random.IntN(8), Attempts: 3, CachedAggregates: 1 + random.IntN(2),
		Snapshots: snapshots, Logger: slog.New(slog.DiscardHandler),
	})
	ids := []string{"a", "b"}
	var ops []*op
	keys := map[string][]*op{}

	begin := func() {
		o := &op{number: len(ops) + 1, stream: ledgers.Stream(ids[random.IntN(2)])}
		if random.IntN(3) == 0 {
			o.key = fmt.Sprintf("%s-%d", o.stream.ID, random.IntN(6))
			keys[o.key] = append(keys[o.key], o)
		}
		o.began = len(ledgerOf(t, g, o.stream))
		cents := int64(random.IntN(20) - 10)
		ctx, cancel := context.WithCancel(t.Context())
		o.cancel = cancel
		ops = append(ops, o)
		req := aggregate.Request[ledger]{ID: o.stream.ID, Key: o.key, Decide: func(l ledger) ([]aggregate.Event, error) {
			o.saw = ledger{Version: l.Version, Cents: l.Cents}
			switch {
			case l.Cents+cents < 0:
				return nil, errOverdrawn
			case cents == 0:
				return nil, nil
			}
			events := aggregate.Events(moved{o.number, cents, l.Version, l.Cents})
			if cents == 9 {
				events = append(events, moved{o.number, 1, l.Version + 1, l.Cents + 9})
			}
			return events, nil
		}}
		go func() {
			o.receipt, o.err = aggregate.Execute(ctx, r, ledgers, req)
			o.done = true
		}()
	}
	foreign := func() {
		stream := ledgers.Stream(ids[random.IntN(2)])
		events := ledgerOf(t, g, stream)
		var cents int64
		for _, e := range events {
			cents += e.Cents
		}
		e, err := ledgers.Encode(nil, stream, moved{-1, 1, len(events), cents}, eventstore.Metadata{}, t0)
		require.NoError(t, err)
		_, err = g.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{e}})
		require.NoError(t, err)
	}
	late := []*heldCommit{}
	oldest := func(fate int) {
		select {
		case c := <-g.held:
			switch {
			case fate < 12:
				c.release()
			case fate == 12:
				c.fail(eventstore.ErrTooLarge)
			case fate == 13:
				c.lose()
			case fate == 14:
				c.fail(eventstore.ErrOutcomeUnknown)
			case fate == 15:
				late = append(late, c)
				c.fail(eventstore.ErrOutcomeUnknown)
			}
		default:
		}
	}
	for range 120 {
		switch random.IntN(8) {
		case 0, 1, 2:
			begin()
		case 3:
			if random.IntN(4) == 0 {
				foreign()
			}
		case 4:
			if random.IntN(4) == 0 && len(ops) > 0 {
				ops[random.IntN(len(ops))].cancel()
			}
		case 5:
			if len(late) > 0 { // what was believed lost arrives
				_, _ = late[0].store.Append(t.Context(), late[0].Commit)
				late = late[1:]
			}
		default:
			oldest(random.IntN(16))
		}
		if random.IntN(2) == 0 {
			synctest.Wait()
		}
		if random.IntN(10) == 0 {
			time.Sleep(time.Second) // of the bubble: pauses of those who resolve
		}
	}
	for range 50 {
		g.pass()
		time.Sleep(time.Second)
	}
	require.NoError(t, r.Stop(t.Context()))

	logs := map[eventstore.Stream][]moved{}
	written := map[int]int{}
	balances := map[eventstore.Stream][]int64{}
	for _, id := range ids {
		stream := ledgers.Stream(id)
		events := ledgerOf(t, g, stream)
		cents := int64(0)
		balances[stream] = []int64{0}
		for i, e := range events {
			require.Equal(t, i, e.SawVersion, "event %d of %s was decided on another history: %+v", i, stream, e)
			require.Equal(t, cents, e.SawCents, "event %d of %s was decided on another state: %+v", i, stream, e)
			cents += e.Cents
			require.GreaterOrEqual(t, cents, int64(0))
			balances[stream] = append(balances[stream], cents)
			if e.Op > 0 && (i == 0 || events[i-1].Op != e.Op) {
				written[e.Op]++
			}
		}
		logs[stream] = events
		state, at, err := aggregate.Load(t.Context(), aggregate.NewRuntime(g, aggregate.Options{}), ledgers, id)
		require.NoError(t, err)
		fast, fastAt, err := aggregate.Load(t.Context(), r, ledgers, id)
		require.NoError(t, err)
		require.Equal(t, at, fastAt)
		require.Equal(t, state, fast, "a load with a snapshot is a full replay")
	}
	for _, o := range ops {
		require.True(t, o.done, "op %d was never answered", o.number)
		o.cancel()
		times := written[o.number]
		require.LessOrEqual(t, times, 1, "op %d was written %d times", o.number, times)
		switch {
		case o.err == nil && o.receipt.Duplicate:
			require.Zero(t, times, "op %d is called a duplicate, but was written", o.number)
			total := 0
			for _, other := range keys[o.key] {
				total += written[other.number]
			}
			require.Equal(t, 1, total, "key %q of the duplicate op %d was written %d times", o.key, o.number, total)
		case o.err == nil && o.receipt.First > 0:
			require.Equal(t, 1, times, "op %d succeeded, but was not written", o.number)
			at := o.receipt.Revision(o.stream).Version
			require.Equal(t, o.number, logs[o.stream][at-1].Op, "the receipt of op %d names another event", o.number)
		case o.err == nil, errors.Is(o.err, errOverdrawn):
			require.Zero(t, times, "op %d was refused or did nothing, but was written", o.number)
			require.GreaterOrEqual(t, o.saw.Version, o.began, "op %d did not see what was written before it was called", o.number)
			require.Less(t, o.saw.Version, len(balances[o.stream]), "op %d was judged on events that were never written", o.number)
			require.Equal(t, balances[o.stream][o.saw.Version], o.saw.Cents, "op %d was judged on a state that never was", o.number)
		case errors.Is(o.err, eventstore.ErrOutcomeUnknown):
		default:
			require.Zero(t, times, "op %d failed (%v), but was written", o.number, o.err)
			known := errors.Is(o.err, eventstore.ErrTooLarge) || errors.Is(o.err, eventstore.ErrConflict) || errors.Is(o.err, context.Canceled)
			require.True(t, known, "op %d: %v", o.number, o.err)
		}
	}
	require.NoError(t, g.Close())
}

func ledgerOf(t *testing.T, g *gate, stream eventstore.Stream) []moved {
	t.Helper()
	var events []moved
	for r, err := range g.Store.Read(t.Context(), eventstore.OneStream(stream), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		e, err := ledgers.Decode(nil, r)
		require.NoError(t, err)
		events = append(events, e.(moved))
	}
	return events
}
