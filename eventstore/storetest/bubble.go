package storetest

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

var bubbleChecks = []check{
	{
		name:  "WaitsByChannelsAlone",
		rule:  "inside a testing/synctest bubble a store holds no lock while it waits, never polls and lets no time pass: once everything is at rest, what was appended is written and every subscriber has it",
		needs: func(f Features) string { return lacks(f.Bubble, "use inside testing/synctest") },
		run: func(t testing.TB, s *suite) {
			s.bubble(t, func(t testing.TB) {
				ctx, store := s.context(t), s.open(t)
				began := time.Now()
				subscribed, stop := context.WithCancel(ctx)
				queries := []eventstore.Query{eventstore.All(), eventstore.OneStream(account("0"))}
				seen := make([]atomic.Int64, len(queries))
				ended := make(chan error, len(queries))
				for i, q := range queries {
					go func() {
						var last error
						for batch, err := range store.Subscribe(subscribed, q, 0) {
							last = err
							seen[i].Add(int64(len(batch.Events)))
						}
						ended <- last
					}()
				}
				synctest.Wait()
				for n := range int64(5) {
					mustAppend(t, ctx, store, commit(events(account("0"), 2)...))
					synctest.Wait()
					for i := range queries {
						require.Equal(t, 2*(n+1), seen[i].Load(), "events that subscriber %d has when everything is at rest: it must be woken by the append, not by a timer", i)
					}
				}
				const writers = 32
				failed := make(chan error, writers)
				for i := range writers {
					go func() {
						_, err := store.Append(ctx, commit(events(account(fmt.Sprint(i%4)), 1)...))
						failed <- err
					}()
				}
				synctest.Wait()
				require.Len(t, failed, writers, "every append has ended when everything is at rest")
				for range writers {
					require.NoError(t, <-failed)
				}
				require.Equal(t, int64(10+writers), seen[0].Load())
				require.Equal(t, int64(10+writers/4), seen[1].Load())
				stop()
				for range queries {
					require.ErrorIs(t, <-ended, context.Canceled)
				}
				require.NoError(t, store.Close())
				require.Equal(t, began, time.Now(), "time has passed: something waited for a timer")
			})
		},
	},
}
