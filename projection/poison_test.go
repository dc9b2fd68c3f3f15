package projection_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/projection"
)

// fragile is a view that panics on deposits of 13 cents while it is ill.
type fragile struct {
	ill      atomic.Bool
	attempts atomic.Int64
	view     *projection.ViewDefinition[balance]
}

func newFragile() *fragile {
	f := &fragile{}
	f.ill.Store(true)
	f.view = projection.View("balances",
		projection.OnMeta(func(b *balance, e opened, r eventstore.Recorded) {
			b.Owner = e.Owner
			b.Seen = append(b.Seen, r.Version)
		}),
		projection.OnMeta(func(b *balance, e deposited, r eventstore.Recorded) {
			b.Cents += e.Cents
			b.Seen = append(b.Seen, r.Version)
			if e.Cents == 13 && f.ill.Load() {
				f.attempts.Add(1)
				panic(fmt.Sprintf("unlucky in %s", r.Stream))
			}
		}))
	return f
}

func positions(letters []projection.DeadLetter) []eventstore.Position {
	all := []eventstore.Position{}
	for _, d := range letters {
		all = append(all, d.Position)
	}
	return all
}

// Invariant 9: a failing handler retries with backoff; then the event and the
// later ones of its stream are set aside in order, and the rest goes on.
func TestInvariant9_PoisonIsSetAside(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		f := newFragile()
		put(t, store, account("ann"), opened{"Ann"}, deposited{5})  // 1, 2
		put(t, store, account("bob"), opened{"Bob"})                // 3
		put(t, store, account("ann"), deposited{13}, deposited{1})  // 4 fails, 5 follows
		put(t, store, account("bob"), deposited{7}, deposited{2})   // 6, 7
		put(t, store, account("ann"), deposited{2}, deposited{100}) // 8, 9 follow
		began := time.Now()
		r := start(t, store, store, projection.Options{}, f.view)
		defer r.stop()

		// What precedes the failure does not wait for it.
		require.NoError(t, r.WaitFor(t.Context(), "balances", 3))
		require.Zero(t, time.Since(began))
		synctest.Wait()
		status, err := r.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, projection.PhaseRetrying, status[0].Phase)
		require.EqualValues(t, 3, status[0].Position)
		require.WithinRange(t, status[0].RetryAt, began.Add(90*time.Millisecond-1), began.Add(100*time.Millisecond))
		require.ErrorContains(t, status[0].Err, "handler panicked: unlucky in account-ann")

		r.caughtUp(t, store, "balances")
		require.InDelta(t, 1425*time.Millisecond, time.Since(began), float64(75*time.Millisecond+4), "pauses of 100, 200, 400 and 800 ms, each shorter by up to a tenth")
		synctest.Wait()
		status, err = r.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, projection.PhaseLive, status[0].Phase)
		require.EqualValues(t, 1+5, f.attempts.Load(), "once within the batch, then five times alone")
		require.Equal(t, map[string]balance{
			"ann": {Owner: "Ann", Cents: 5, Seen: []uint64{1, 2}},
			"bob": {Owner: "Bob", Cents: 9, Seen: []uint64{1, 2, 3}},
		}, rows(t, store, f.view))

		letters, err := r.DeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{4, 5, 8, 9}, positions(letters))
		require.Equal(t, "handler panicked: unlucky in account-ann", letters[0].Error)
		require.Equal(t, 5, letters[0].Attempts)
		require.Equal(t, account("ann"), letters[0].Stream)
		require.Empty(t, letters[1].Error)

		// Later events of the stream follow it; after a restart too.
		put(t, store, account("ann"), deposited{3}) // 10
		put(t, store, account("bob"), deposited{1}) // 11
		r.caughtUp(t, store, "balances")
		require.NoError(t, r.stop())
		again := start(t, store, store, projection.Options{}, f.view)
		defer again.stop()
		put(t, store, account("ann"), deposited{4}) // 12
		again.caughtUp(t, store, "balances")
		letters, err = again.DeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{4, 5, 8, 9, 10, 12}, positions(letters))
		status, err = again.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, 6, status[0].DeadLetters)
		require.Equal(t, projection.PhaseLive, status[0].Phase)

		// Replaying while the cause remains changes nothing.
		n, err := again.ReplayDeadLetters(t.Context(), "balances")
		require.Zero(t, n)
		require.ErrorContains(t, err, `event "account.deposited" at position 4 of stream "account-ann" failed again: handler panicked`)
		require.EqualValues(t, 5, rows(t, store, f.view)["ann"].Cents)

		f.ill.Store(false)
		n, err = again.ReplayDeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, 6, n)
		require.Equal(t, folded(t, store), rows(t, store, f.view), "in order, each once")
		letters, err = again.DeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Empty(t, letters)

		put(t, store, account("ann"), deposited{5})
		again.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, f.view), "the stream takes part again")
	})
}

// A stream that fails again keeps its dead letters; the others are released.
func TestReplayDeadLetters_OneStreamFailsAgain(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		var sick sync.Map
		sick.Store("ann", true)
		sick.Store("bob", true)
		view := projection.View("balances", projection.OnMeta(func(b *balance, e deposited, r eventstore.Recorded) {
			if _, ill := sick.Load(r.Stream.ID); ill && e.Cents == 13 {
				panic("unlucky")
			}
			b.Cents += e.Cents
			b.Seen = append(b.Seen, r.Version)
		}))
		for _, id := range []string{"ann", "bob", "cid"} {
			put(t, store, account(id), deposited{1}, deposited{13}, deposited{2})
		}
		r := start(t, store, store, projection.Options{Attempts: 1}, view)
		r.caughtUp(t, store, "balances")
		sick.Delete("bob")
		n, err := r.ReplayDeadLetters(t.Context(), "balances")
		require.Equal(t, 2, n)
		require.ErrorContains(t, err, `stream "account-ann" failed again`)
		letters, err := r.DeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{2, 3}, positions(letters))
		put(t, store, account("ann"), deposited{4})
		put(t, store, account("bob"), deposited{4})
		r.caughtUp(t, store, "balances")
		got := rows(t, store, view)
		require.Equal(t, balance{Cents: 1, Seen: []uint64{1}}, got["ann"])
		require.Equal(t, balance{Cents: 20, Seen: []uint64{1, 2, 3, 4}}, got["bob"])

		// Stopped projections can be replayed too.
		require.NoError(t, r.stop())
		sick.Delete("ann")
		n, err = r.ReplayDeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, 3, n)
		require.Equal(t, folded(t, store), rows(t, store, view))
	})
}

// Bytes that do not decode cannot be cured by waiting.
func TestPoison_UndecodableIsSetAsideAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		_, err := store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{
			{Stream: account("ann"), Type: "account.deposited", Data: []byte(`{"Cents":"many"}`)},
		}})
		require.NoError(t, err)
		put(t, store, account("bob"), deposited{1})
		view := balances()
		began := time.Now()
		r := start(t, store, store, projection.Options{}, view)
		defer r.stop()
		r.caughtUp(t, store, "balances")
		require.Zero(t, time.Since(began))
		letters, err := r.DeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Len(t, letters, 1)
		require.Contains(t, letters[0].Error, `cannot decode event "account.deposited" (stream "account-ann", version 1, position 1)`)
		require.Equal(t, map[string]balance{"bob": {Cents: 1, Seen: []uint64{1}}}, rows(t, store, view))
	})
}

type unmarshalPanics struct{ Cents int64 }

func (unmarshalPanics) EventType() string           { return "account.deposited" }
func (*unmarshalPanics) UnmarshalJSON([]byte) error { panic("no") }

func TestPoison_WhereverUserCodeFails(t *testing.T) {
	t.Parallel()
	type number struct{ Value float64 }
	for name, c := range map[string]struct {
		projection projection.Projection
		want       string
	}{
		"decoding panics": {projection.View("v", projection.On(func(*balance, unmarshalPanics) {})), "handler panicked: no"},
		"keys panics": {projection.View("v", projection.OnKeyed(
			func(deposited, eventstore.Recorded) []string { panic("no keys") },
			func(*balance, string, deposited, eventstore.Recorded) {})), "handler panicked: no keys"},
		"empty key": {projection.View("v", projection.OnKeyed(
			func(deposited, eventstore.Recorded) []string { return []string{"a", ""} },
			func(*balance, string, deposited, eventstore.Recorded) {})), "the keys function returned an empty key"},
		"row does not encode": {projection.View("v", projection.On(func(n *number, _ deposited) {
			n.Value /= n.Value // not a number
		})), `row "ann" of view "v" does not encode`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := memory.New()
			defer store.Close()
			put(t, store, account("ann"), deposited{1})
			r := start(t, store, store, projection.Options{Attempts: 2, RetryAfter: 1}, c.projection)
			r.caughtUp(t, store, "v")
			letters, err := r.DeadLetters(t.Context(), "v")
			require.NoError(t, err)
			require.Len(t, letters, 1)
			require.Contains(t, letters[0].Error, c.want)
			require.Equal(t, 2, letters[0].Attempts)
			require.NoError(t, r.stop())
		})
	}
}

// With a clock that only moves when told, a retry is something due: settling
// does not wait for it, and firing runs it.
func TestWorker_RetryIsDueByTheClock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		f := newFragile()
		begin := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
		manual := clock.NewManual(begin)
		r := start(t, store, store, projection.Options{Clock: manual, Attempts: 3}, f.view)
		defer r.stop()
		w := r.Workers()[0]
		require.Equal(t, "projection balances", w.Name())
		put(t, store, account("ann"), deposited{13}, deposited{1})
		last := put(t, store, account("bob"), deposited{1}).Last

		waited := time.Duration(0)
		for _, delay := range []time.Duration{100 * time.Millisecond, 200 * time.Millisecond} {
			require.NoError(t, w.WaitThrough(t.Context(), last))
			due, ok := w.NextDue()
			require.True(t, ok)
			require.WithinRange(t, due, manual.Now().Add(delay-delay/10-1), manual.Now().Add(delay))
			waited += due.Sub(manual.Now())
			require.NoError(t, w.Fire(t.Context(), due.Add(-1)))
			_, ok = w.NextDue()
			require.True(t, ok, "firing before the time does nothing")
			manual.Set(due)
			require.NoError(t, w.Fire(t.Context(), due))
		}
		require.NoError(t, w.WaitThrough(t.Context(), last))
		_, ok := w.NextDue()
		require.False(t, ok)
		require.EqualValues(t, 1, rows(t, store, f.view)["bob"].Cents)
		letters, err := r.DeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{1, 2}, positions(letters))
		require.Equal(t, begin.Add(waited), letters[0].At)
	})
}

// A database that fails is not the event's fault: it is asked until it answers.
func TestRun_DatabaseFailsForAWhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		var ill atomic.Bool
		state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			if ill.Load() {
				return errInjected
			}
			return store.Update(ctx, fn)
		}}
		view := balances()
		r := start(t, store, state, projection.Options{}, view)
		defer r.stop()
		r.caughtUp(t, store, "balances")
		ill.Store(true)
		put(t, store, account("ann"), deposited{1})
		time.Sleep(10 * time.Minute)
		status, err := r.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, projection.PhaseRetrying, status[0].Phase)
		require.ErrorIs(t, status[0].Err, errInjected)
		require.EqualValues(t, 1, status[0].LagEvents)
		require.Equal(t, 10*time.Minute, status[0].Lag)
		require.Zero(t, status[0].DeadLetters)
		ill.Store(false)
		r.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		status, err = r.Status(t.Context())
		require.NoError(t, err)
		require.Zero(t, status[0].Lag)
	})
}

func TestRebuild_WhileRetrying(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		f := newFragile()
		put(t, store, account("ann"), deposited{1}, deposited{13})
		r := start(t, store, store, projection.Options{RetryAfter: time.Hour, RetryAtMost: time.Hour}, f.view)
		defer r.stop()
		require.NoError(t, r.WaitFor(t.Context(), "balances", 1))
		synctest.Wait()
		f.ill.Store(false)
		began := time.Now()
		require.NoError(t, r.Rebuild(t.Context(), "balances"))
		require.Zero(t, time.Since(began), "a rebuild does not wait for the retry")
		require.Equal(t, folded(t, store), rows(t, store, f.view))
	})
}

func TestRun_StopsWithTheStore(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		r := start(t, store, store, projection.Options{}, balances())
		r.caughtUp(t, store, "balances")
		require.NoError(t, store.Close())
		err := r.WaitFor(t.Context(), "balances", 1)
		require.ErrorIs(t, err, projection.ErrStopped)
		require.ErrorIs(t, err, eventstore.ErrClosed)
		require.ErrorIs(t, r.stop(), eventstore.ErrClosed)
	})
}

// gapLog yields a hole.
type gapLog struct{ *memory.Store }

func (g gapLog) Subscribe(context.Context, eventstore.Query, eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		yield(eventstore.Batch{}, fmt.Errorf("%w: position 3 is missing", eventstore.ErrGap))
	}
}

func TestRun_StopsAtAGap(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	r := start(t, gapLog{store}, store, projection.Options{}, balances())
	err := r.WaitFor(t.Context(), "balances", 1)
	require.ErrorIs(t, err, eventstore.ErrGap)
	require.True(t, errors.Is(r.stop(), eventstore.ErrGap))
}

// endingLog has subscriptions that end without a word, once.
type endingLog struct {
	*memory.Store
	ended *atomic.Bool
}

func (l endingLog) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	if l.ended.CompareAndSwap(false, true) {
		return func(func(eventstore.Batch, error) bool) {}
	}
	return l.Store.Subscribe(ctx, q, after)
}

func TestRun_SubscriptionEndsByItself(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		put(t, store, account("ann"), deposited{1})
		view := balances()
		r := start(t, endingLog{store, new(atomic.Bool)}, store, projection.Options{}, view)
		defer r.stop()
		r.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, view))
		status, err := r.Status(t.Context())
		require.NoError(t, err)
		require.EqualError(t, status[0].Err, "the subscription ended although nobody ended it")
	})
}

// Invariant 6, for dead letters: a former owner cannot replay what the new one
// has replayed already.
func TestInvariant6_FormerOwnerCannotReplay(t *testing.T) {
	t.Parallel()
	onBackends(t, func(t *testing.T, open func(*testing.T) backend) {
		store := open(t)
		f := newFragile()
		put(t, store, account("ann"), deposited{1}, deposited{13}, deposited{2})
		var armed atomic.Bool
		reached, proceed := make(chan struct{}), make(chan struct{})
		state := &hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
			if armed.CompareAndSwap(true, false) {
				close(reached)
				<-proceed
			}
			return store.Update(ctx, fn)
		}}
		former := start(t, store, state, projection.Options{Owner: "node", Attempts: 1}, f.view)
		former.caughtUp(t, store, "balances")
		f.ill.Store(false)
		armed.Store(true)
		replayed := make(chan error, 1)
		go func() {
			_, err := former.ReplayDeadLetters(context.Background(), "balances")
			replayed <- err
		}()
		<-reached
		heir := start(t, store, store, projection.Options{Owner: "node"}, f.view)
		heir.caughtUp(t, store, "balances")
		n, err := heir.ReplayDeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, 2, n)
		close(proceed)
		require.ErrorIs(t, <-replayed, projection.ErrFenced)
		put(t, store, account("ann"), deposited{3})
		heir.caughtUp(t, store, "balances")
		former.caughtUp(t, store, "balances")
		require.Equal(t, projection.PhaseStandby, former.status(t).Phase)
		_, err = former.ReplayDeadLetters(t.Context(), "balances")
		require.ErrorIs(t, err, projection.ErrLeaseHeld)
		require.ErrorContains(t, err, `held by "node"`)
		require.Equal(t, folded(t, store), rows(t, store, f.view))
		require.NoError(t, heir.stop())
	})
}
