package statetest

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/projection"
)

func needBubble(f Features) string {
	if f.Bubble {
		return ""
	}
	return "use inside testing/synctest"
}

var bubbleChecks = []check{
	{
		name:  "WaitsByChannelsAlone",
		rule:  "inside a testing/synctest bubble updates wait for their turn without a lock that is held meanwhile and without a timer",
		needs: needBubble,
		run: func(t testing.TB, s *suite) {
			s.bubble(t, func(t testing.TB) {
				ctx, state := s.context(t), s.open(t)
				began := time.Now()
				lease := mustAcquire(t, ctx, state, "w", "me", time.Hour)
				const waiting = 5
				inside, goOn, ended := make(chan struct{}), make(chan struct{}), make(chan error, waiting+2)
				release := sync.OnceFunc(func() { close(goOn) })
				defer release()
				go func() {
					ended <- state.Update(ctx, func(tx projection.StateTx) error {
						err := s.turn(tx, lease)
						close(inside)
						<-goOn
						return errors.Join(err, tx.Put("t", "n", []byte("1")))
					})
				}()
				<-inside
				for range waiting {
					go func() {
						ended <- state.Update(ctx, func(tx projection.StateTx) error {
							if err := s.turn(tx, lease); err != nil {
								return err
							}
							v, _, err := tx.Get("t", "n")
							if err != nil {
								return err
							}
							n, _ := strconv.Atoi(string(v))
							return tx.Put("t", "n", []byte(strconv.Itoa(n+1)))
						})
					}()
				}
				leaving, leave := context.WithCancel(ctx)
				left := make(chan error, 1)
				go func() {
					left <- state.Update(leaving, func(tx projection.StateTx) error { return s.turn(tx, lease) })
				}()
				synctest.Wait() // returns only if all of them are parked on channels
				require.Empty(t, ended, "an update ran beside another one")
				leave()
				synctest.Wait()
				require.Len(t, left, 1, "an update that waits for its turn gives up at once when its context ends")
				require.ErrorIs(t, <-left, context.Canceled)
				release()
				synctest.Wait()
				require.Len(t, ended, waiting+1, "every update has ended when everything is at rest")
				for range waiting + 1 {
					require.NoError(t, <-ended)
				}
				require.Equal(t, strconv.Itoa(waiting+1), value(t, ctx, state, "t", "n"))
				require.NoError(t, state.Release(ctx, lease))
				require.NoError(t, state.Close())
				require.Equal(t, began, time.Now(), "time has passed: something waited for a timer")
			})
		},
	},
	{
		name:  "LeasesEndOnTheBubblesClock",
		rule:  "inside a bubble leases end by the bubble's time, so that takeovers can be tested in no time",
		needs: needBubble,
		run: func(t testing.TB, s *suite) {
			s.bubble(t, func(t testing.TB) {
				ctx, state := context.WithoutCancel(t.Context()), s.open(t)
				first := mustAcquire(t, ctx, state, "w", "a", time.Hour)
				time.Sleep(time.Hour - time.Nanosecond)
				_, err := state.Acquire(ctx, "w", "b", time.Hour)
				require.ErrorIs(t, err, projection.ErrLeaseHeld, "a nanosecond early")
				time.Sleep(time.Nanosecond)
				second := mustAcquire(t, ctx, state, "w", "b", time.Hour)
				require.Equal(t, first.Epoch+1, second.Epoch)
				_, err = state.Renew(ctx, first, time.Hour)
				require.ErrorIs(t, err, projection.ErrFenced)
			})
		},
	},
}
