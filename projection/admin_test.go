package projection_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// A tool without the projection's code has its dead letters replayed and
// skipped by the process that has it.
func TestAdmin_DeadLetters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		f := newFragile()
		put(t, store, account("ann"), deposited{13}, deposited{1}, deposited{13}, deposited{2}) // 1..4
		put(t, store, account("bob"), deposited{13}, deposited{7})                              // 5, 6
		put(t, store, account("eve"), deposited{4})                                             // 7
		owner := start(t, store, store, projection.Options{Owner: "one"}, f.view)
		owner.caughtUp(t, store, "balances")
		admin := projection.NewAdmin(store, "tester")
		letters, err := admin.DeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{1, 2, 3, 4, 5, 6}, positions(letters))
		require.Contains(t, letters[0].Stack, "projection_test.newFragile", "where it panicked")
		require.Empty(t, letters[1].Stack)

		// Ill as it is, nothing can be replayed.
		n, err := admin.Replay(t.Context(), "balances")
		require.ErrorIs(t, err, projection.ErrRefused)
		require.ErrorContains(t, err, `projection "balances": event "account.deposited" at position 1 of stream "account-ann" failed again: handler panicked: unlucky in account-ann`)
		require.ErrorContains(t, err, "position 5")
		require.Zero(t, n)

		// What is given up lets the others go on, but only when they are asked to.
		require.ErrorIs(t, admin.Skip(t.Context(), "balances", 1, " "), eventstore.ErrInvalid)
		require.ErrorIs(t, admin.Skip(t.Context(), "balances", 1, strings.Repeat("x", 5000)), eventstore.ErrTooLarge)
		require.NoError(t, admin.Skip(t.Context(), "balances", 1, "the bank took it back"))
		require.NoError(t, admin.Skip(t.Context(), "balances", 1, "again"))
		err = admin.Skip(t.Context(), "balances", 7, "not set aside")
		require.ErrorIs(t, err, projection.ErrNoDeadLetter)
		require.EqualError(t, err, `projection "balances": no such dead letter: the projection has set no event at position 7 aside`)
		put(t, store, account("ann"), deposited{100}) // 8 follows the others
		owner.caughtUp(t, store, "balances")
		require.Equal(t, map[string]balance{"eve": {Cents: 4, Seen: []uint64{1}}}, rows(t, store, f.view))
		n, err = admin.Replay(t.Context(), "balances")
		require.ErrorContains(t, err, "position 3")
		require.Equal(t, 1, n)
		require.Equal(t, balance{Cents: 1, Seen: []uint64{2}}, rows(t, store, f.view)["ann"])
		skipped, err := admin.Skipped(t.Context(), "balances")
		require.NoError(t, err)
		require.Len(t, skipped, 1)
		require.Equal(t, "the bank took it back", skipped[0].Note)
		require.Equal(t, "tester", skipped[0].By)
		require.Equal(t, letters[0], skipped[0].DeadLetter)
		same, err := owner.Skipped(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, skipped, same)

		// Put right, one call drains all, in order.
		f.ill.Store(false)
		n, err = admin.Replay(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, 5, n)
		require.Equal(t, map[string]balance{
			"ann": {Cents: 116, Seen: []uint64{2, 3, 4, 5}}, "bob": {Cents: 20, Seen: []uint64{1, 2}}, "eve": {Cents: 4, Seen: []uint64{1}},
		}, rows(t, store, f.view))
		letters, err = admin.DeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Empty(t, letters)

		// A rebuild gives it another turn.
		require.NoError(t, admin.Rebuild(t.Context(), "balances"))
		owner.caughtUp(t, store, "balances")
		require.Equal(t, folded(t, store), rows(t, store, f.view))
		skipped, err = admin.Skipped(t.Context(), "balances")
		require.NoError(t, err)
		require.Empty(t, skipped)
		require.NoError(t, owner.stop())
		require.NoError(t, store.View(t.Context(), func(tx projection.StateTx) error {
			for row := range tx.Scan("projection.requests.balances", projection.Range{}) {
				t.Errorf("a request was left: %s", row.Value)
			}
			return nil
		}))
	})
}

// Skipping through the engine that runs the projection, and through one that
// stands by.
func TestEngine_SkipDeadLetter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		f := newFragile()
		put(t, store, account("ann"), deposited{13}, deposited{1}, deposited{13}, deposited{2})
		owner := start(t, store, store, projection.Options{Owner: "one"}, f.view)
		owner.caughtUp(t, store, "balances")
		other := start(t, store, store, projection.Options{Owner: "two"}, f.view)
		ready(t, other)
		require.NoError(t, owner.SkipDeadLetter(t.Context(), "balances", 1, "one"))
		require.NoError(t, other.SkipDeadLetter(t.Context(), "balances", 3, "two"))
		err := other.SkipDeadLetter(t.Context(), "balances", 9, "three")
		require.ErrorIs(t, err, projection.ErrNoDeadLetter)
		require.ErrorIs(t, owner.SkipDeadLetter(t.Context(), "balances", 9, "four"), projection.ErrNoDeadLetter)
		require.ErrorIs(t, owner.SkipDeadLetter(t.Context(), "balances", 2, ""), eventstore.ErrInvalid)
		require.ErrorIs(t, owner.SkipDeadLetter(t.Context(), "none", 2, "x"), projection.ErrNotRegistered)
		n, err := other.ReplayDeadLetters(t.Context(), "balances")
		require.NoError(t, err)
		require.Equal(t, 2, n)
		require.Equal(t, map[string]balance{"ann": {Cents: 3, Seen: []uint64{2, 4}}}, rows(t, store, f.view))
		put(t, store, account("ann"), deposited{5})
		owner.caughtUp(t, store, "balances")
		require.EqualValues(t, 8, rows(t, store, f.view)["ann"].Cents, "the stream takes part again")
		skipped, err := other.Skipped(t.Context(), "balances")
		require.NoError(t, err)
		require.Len(t, skipped, 2)
		require.Equal(t, "one", skipped[0].By)
		require.Equal(t, "two", skipped[1].By)
		require.NoError(t, owner.stop())
		require.NoError(t, other.stop())
	})
}

// With nobody there to answer, a request is taken back in time; or, left there
// by a process that has died, it is found by the next one.
func TestAdmin_NobodyAnswers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New() // as with SQLite: a process at a time
		defer store.Close()
		f := newFragile()
		put(t, store, account("ann"), deposited{13})
		r := start(t, store, store, projection.Options{}, f.view)
		r.caughtUp(t, store, "balances")
		require.NoError(t, r.stop())
		admin := projection.NewAdmin(store, "tester")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		_, err := admin.Replay(ctx, "balances")
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, `no process that runs the projection "balances" has answered; the request was taken back`)
		require.NoError(t, store.View(t.Context(), func(tx projection.StateTx) error {
			for range tx.Scan("projection.requests.balances", projection.Range{}) {
				t.Error("it was not taken back")
			}
			return nil
		}))
		_, err = admin.Replay(t.Context(), "no name")
		require.ErrorIs(t, err, eventstore.ErrInvalid)

		f.ill.Store(false)
		answered := make(chan error, 1)
		go func() {
			n, err := admin.Replay(context.Background(), "balances")
			if n != 1 {
				err = errors.Join(err, errors.New("not one"))
			}
			answered <- err
		}()
		time.Sleep(time.Hour)
		again := start(t, store, store, projection.Options{}, f.view)
		require.NoError(t, <-answered)
		require.EqualValues(t, 13, rows(t, store, f.view)["ann"].Cents)
		require.NoError(t, again.stop())
	})
}

type sharedState struct{ *hookedState }

func (sharedState) Shared() bool { return true }

// The owner dies while it works on a request: the next one begins again with
// it, and it is done once in effect.
func TestAdmin_OwnerDies(t *testing.T) {
	t.Parallel()
	for _, dies := range []int64{1, 2, 3, 4} { // after so many updates of the request's
		synctest.Test(t, func(t *testing.T) {
			store := &shared{Store: memory.New()}
			defer store.Close()
			f := newFragile()
			put(t, store, account("ann"), deposited{13}, deposited{1})
			put(t, store, account("bob"), deposited{2})
			var armed atomic.Bool
			var updates atomic.Int64
			dead := make(chan struct{})
			mortal := sharedState{&hookedState{State: store, update: func(ctx context.Context, fn func(projection.StateTx) error) error {
				if armed.Load() && updates.Add(1) == dies {
					armed.Store(false)
					err := store.Update(ctx, fn)
					close(dead)
					<-ctx.Done() // it does not get to hear of it
					return errors.Join(err, ctx.Err())
				}
				return store.Update(ctx, fn)
			}}}
			owner := start(t, store, mortal, projection.Options{Owner: "one"}, f.view)
			owner.caughtUp(t, store, "balances")
			f.ill.Store(false)
			armed.Store(true)
			answered := make(chan error, 1)
			go func() {
				answered <- projection.NewAdmin(store, "tester").Skip(context.Background(), "balances", 1, "why")
			}()
			select {
			case <-dead:
				go func() { _ = owner.stop() }()
			case err := <-answered:
				require.NoError(t, err)
				armed.Store(false)
				require.NoError(t, owner.stop())
				answered <- nil
			}
			heir := start(t, store, store, projection.Options{Owner: "two"}, f.view)
			require.NoError(t, <-answered)
			skipped, err := heir.Skipped(t.Context(), "balances")
			require.NoError(t, err)
			require.Len(t, skipped, 1)
			n, err := heir.ReplayDeadLetters(t.Context(), "balances")
			require.NoError(t, err)
			require.Equal(t, 1, n)
			require.Equal(t, map[string]balance{"ann": {Cents: 1, Seen: []uint64{2}}, "bob": {Cents: 2, Seen: []uint64{1}}}, rows(t, store, f.view))
			require.NoError(t, heir.stop())
			synctest.Wait()
		})
	}
}

// A request of a later release is answered, and does not stop the projection.
func TestAdmin_UnknownRequest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &shared{Store: memory.New()}
		defer store.Close()
		view := balances()
		owner := start(t, store, store, projection.Options{}, view)
		owner.caughtUp(t, store, "balances")
		require.NoError(t, store.Update(t.Context(), func(tx projection.StateTx) error {
			return tx.Put("projection.requests.balances", "1", []byte(`{"action":"fly"}`))
		}))
		time.Sleep(3 * time.Second)
		var o struct{ Answer struct{ Error string } }
		require.NoError(t, store.View(t.Context(), func(tx projection.StateTx) error {
			value, _, err := tx.Get("projection.requests.balances", "1")
			return errors.Join(err, json.Unmarshal(value, &o))
		}))
		require.Contains(t, o.Answer.Error, `the request "fly" is not known`)
		put(t, store, account("ann"), deposited{5})
		owner.caughtUp(t, store, "balances")
		require.EqualValues(t, 5, rows(t, store, view)["ann"].Cents)
		require.NoError(t, owner.stop())
	})
}

// An error that is marked as permanent is not tried again.
func TestPermanent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := memory.New()
		defer store.Close()
		broken := errors.New("no such currency")
		calls := 0
		view := projection.View("v", projection.On(func(b *balance, e deposited) {
			if e.Cents == 13 {
				calls++
				panic(projection.Permanent(broken))
			}
			b.Cents += e.Cents
		}))
		require.NoError(t, projection.Permanent(nil))
		require.ErrorIs(t, projection.Permanent(broken), broken)
		put(t, store, account("ann"), deposited{13}, deposited{1})
		put(t, store, account("bob"), deposited{2})
		began := time.Now()
		r := start(t, store, store, projection.Options{}, view)
		r.caughtUp(t, store, "v")
		require.Zero(t, time.Since(began))
		require.LessOrEqual(t, calls, 2, "once among others, once alone")
		letters, err := r.DeadLetters(t.Context(), "v")
		require.NoError(t, err)
		require.Equal(t, []eventstore.Position{1, 2}, positions(letters))
		require.Equal(t, "handler panicked: no such currency", letters[0].Error)
		require.NoError(t, r.stop())
	})
}
