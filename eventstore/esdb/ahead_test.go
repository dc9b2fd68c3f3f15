package esdb

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// Servers name the end of the log in checkpoints at times, which is where the next
// event will lie: it is not taken for one that has been delivered, neither when it
// comes nor when the subscription is made anew in between.
func TestPoint59_CheckpointsAhead(t *testing.T) {
	t.Parallel()
	for ahead := range 4 {
		for _, dropping := range []bool{false, true} {
			t.Run(fmt.Sprintf("ahead %d, dropped %v", ahead, dropping), func(t *testing.T) {
				t.Parallel()
				db := newDatabase()
				db.ahead = ahead
				s := over(t, db, Tail(4, 1<<20))
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				seen := make(chan eventstore.Position, 1000)
				ended := make(chan error, 2)
				for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneCategory("account")} {
					go func() {
						for batch, err := range s.Subscribe(ctx, q, 0) {
							if err != nil {
								ended <- err
								return
							}
							for i := range batch.Events {
								seen <- batch.Events[i].Position
							}
						}
						ended <- nil
					}()
				}
				var want []eventstore.Position
				for n := range 60 {
					if n%7 == 3 { // what is none of the log lies where a checkpoint has named
						db.system("$stats", "$statsCollected")
					}
					r, err := s.Append(ctx, happened(1))
					require.NoError(t, err)
					want = append(want, r.Last)
					for range 2 {
						select {
						case p := <-seen:
							require.Equal(t, r.Last, p)
						case <-ctx.Done():
							t.Fatalf("event %d, at %d, was not delivered", n, r.Last)
						}
					}
					if dropping && n%5 == 1 {
						db.drop()
					}
				}
				// One who begins now is given everything once.
				var got []eventstore.Position
				for batch, err := range s.Subscribe(ctx, eventstore.OneCategory("account"), 0) {
					require.NoError(t, err)
					for i := range batch.Events {
						got = append(got, batch.Events[i].Position)
					}
					if batch.Through >= want[len(want)-1] {
						break
					}
				}
				require.Equal(t, want, got)
				require.Empty(t, seen)
				cancel()
				for range 2 {
					require.ErrorIs(t, <-ended, context.Canceled)
				}
			})
		}
	}
}

// A server that hangs.drains no subscription: another one is asked for.
func TestSubscribe_NeverConfirmed(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	s := over(t, db, func(s *settings) error { s.confirm = 10 * time.Millisecond; return nil })
	db.mu.Lock()
	db.mute = 3
	db.mu.Unlock()
	r, err := s.Append(t.Context(), happened(1))
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for batch, err := range s.Subscribe(ctx, eventstore.All(), 0) {
		require.NoError(t, err)
		if batch.Through >= r.Last {
			break
		}
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	require.Zero(t, db.mute)
}

// Where the log ends is asked of the leader: others may have stored that they have
// come further than a node that lags has the log.
func TestHead_OfTheLeader(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	first := over(t, db)
	r, err := first.Append(t.Context(), happened(4))
	require.NoError(t, err)
	lagging, err := Open(t.Context(), "", withDriver(&behind{client: db.client(), hidden: 2}))
	require.NoError(t, err)
	defer lagging.Close()
	head, err := lagging.Head(t.Context())
	require.NoError(t, err)
	require.Equal(t, r.Last, head)
}
