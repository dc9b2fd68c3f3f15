package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

var endingChecks = []check{
	{
		name: "CancelledBefore",
		rule: "with a context that has ended nothing is written and every call returns the context's error, recognisable with errors.Is",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, commit(events(ann, 3)...))
			cancelled, cancel := context.WithCancel(ctx)
			cancel()
			late, cancelLate := context.WithDeadline(ctx, time.Unix(1, 0))
			defer cancelLate()
			for ended, want := range map[context.Context]error{cancelled: context.Canceled, late: context.DeadlineExceeded} {
				unchanged(t, ctx, store, func() {
					_, err := store.Append(ended, eventstore.Commit{Events: events(ann, 1), Key: "k"})
					require.ErrorIs(t, err, want, "append")
					require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown, "the commit was never on its way")
					require.True(t, eventstore.CanRetry(err), "with a new context it can succeed")
				})
				_, used := mustLookup(t, ctx, store, ann, "k")
				require.False(t, used, "a cancelled append stores no key")
				_, _, err := store.Lookup(ended, ann, "k")
				require.ErrorIs(t, err, want, "lookup")
				_, err = store.Head(ended)
				require.ErrorIs(t, err, want, "head")
				got, err := all(store.Read(ended, eventstore.All(), eventstore.ReadOptions{}))
				require.ErrorIs(t, err, want, "read")
				require.Empty(t, got)
				n := 0
				for _, err := range store.Subscribe(ended, eventstore.All(), 0) {
					require.ErrorIs(t, err, want, "subscribe")
					n++
				}
				require.Equal(t, 1, n, "the context's end is yielded once, as an error")
			}
		},
	},
	{
		name: "CancelledWhileAppending",
		rule: "cancelling at any moment leaves a true answer: a receipt means written, the context's error alone means not written, ErrOutcomeUnknown means one of the two and wraps the context's error; appending again with the same key settles it",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			const writers = 8
			each := pick(25, 5)
			require.NoError(t, together(writers, func(i int, gate func()) error {
				gate()
				for n := range each {
					to := account(fmt.Sprintf("%d.%d", i, n))
					once, cancel := context.WithCancel(ctx)
					c := eventstore.Commit{Events: events(to, 3), Key: to.ID, Fingerprint: "f"}
					go cancel()
					r, err := store.Append(once, c)
					cancel()
					got, readErr := all(store.Read(ctx, eventstore.OneStream(to), eventstore.ReadOptions{}))
					if readErr != nil {
						return readErr
					}
					switch {
					case err == nil:
						if len(got) != 3 || r.Duplicate {
							return fmt.Errorf("append answered with a receipt, but the stream has %d of 3 events", len(got))
						}
					case errors.Is(err, eventstore.ErrOutcomeUnknown):
						if !errors.Is(err, context.Canceled) {
							return fmt.Errorf("an unknown outcome must wrap the context's error: %w", err)
						}
						if len(got) != 0 && len(got) != 3 {
							return fmt.Errorf("a commit is half written: %d of 3 events", len(got))
						}
					case errors.Is(err, context.Canceled):
						if len(got) != 0 {
							return fmt.Errorf("append said that it was cancelled, but %d events are written: say ErrOutcomeUnknown", len(got))
						}
					default:
						return err
					}
					if r, err := store.Append(ctx, c); err != nil || r.Revision(to).Version != 3 {
						return fmt.Errorf("appending again with the same key: %+v, %w", r, err)
					}
				}
				return nil
			}))
			require.Len(t, mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{}), writers*each*3)
		},
	},
	{
		name: "CancelledWhileReading",
		rule: "a read that is cut short says so: it yields every event or ends with the context's error, never silently early",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			per := min(1000, s.features.Limits.EventsPerCommit)
			for range 3 {
				mustAppend(t, ctx, store, commit(events(account("ann"), per)...))
			}
			for _, at := range []int{1, 10, per} {
				once, cancel := context.WithCancel(ctx)
				n, ended := 0, false
				for _, err := range store.Read(once, eventstore.All(), eventstore.ReadOptions{}) {
					require.False(t, ended, "after an error nothing more is yielded")
					if err != nil {
						require.ErrorIs(t, err, context.Canceled)
						ended = true
						continue
					}
					if n++; n == at {
						cancel()
					}
				}
				cancel()
				require.True(t, ended || n == 3*per, "the read ended after %d of %d events without an error", n, 3*per)
			}
		},
	},
	{
		name: "Closed",
		rule: "after Close every call returns ErrClosed and writes nothing; closing again is fine",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann := account("ann")
			mustAppend(t, ctx, store, eventstore.Commit{Events: events(ann, 3), Key: "k"})
			require.NoError(t, store.Close())
			_, err := store.Append(ctx, commit(events(ann, 1)...))
			require.ErrorIs(t, err, eventstore.ErrClosed, "append")
			require.False(t, eventstore.CanRetry(err))
			_, _, err = store.Lookup(ctx, ann, "k")
			require.ErrorIs(t, err, eventstore.ErrClosed, "lookup")
			_, err = store.Head(ctx)
			require.ErrorIs(t, err, eventstore.ErrClosed, "head")
			_, err = all(store.Read(ctx, eventstore.All(), eventstore.ReadOptions{}))
			require.ErrorIs(t, err, eventstore.ErrClosed, "read")
			n := 0
			for _, err := range store.Subscribe(ctx, eventstore.All(), 0) {
				require.ErrorIs(t, err, eventstore.ErrClosed, "subscribe")
				n++
			}
			require.Equal(t, 1, n, "the end is yielded once, as an error")
			require.NoError(t, store.Close(), "closing again")
		},
	},
	{
		name: "CloseUnderLoad",
		rule: "Close while writers write answers every one of them: a receipt for what is written, ErrClosed for what is not",
		run: func(t testing.TB, s *suite) {
			ctx, p := s.context(t), s.prepare(t)
			store := p.open(t)
			const writers = 8
			acknowledged := make([]int, writers)
			enough := make(chan struct{}, writers)
			closed := make(chan error, 1)
			go func() {
				for range writers {
					<-enough
				}
				closed <- store.Close()
			}()
			require.NoError(t, together(writers, func(i int, gate func()) error {
				gate()
				for n := 0; ; n++ {
					if n == 3 {
						enough <- struct{}{}
					}
					_, err := store.Append(ctx, commit(events(account(fmt.Sprint(i)), 2)...))
					if errors.Is(err, eventstore.ErrClosed) {
						return nil
					}
					if err != nil {
						return err
					}
					acknowledged[i]++
				}
			}))
			require.NoError(t, <-closed)
			if !s.features.Reopen {
				return
			}
			store = p.open(t)
			for i, n := range acknowledged {
				require.Len(t, mustRead(t, ctx, store, eventstore.OneStream(account(fmt.Sprint(i))), eventstore.ReadOptions{}), 2*n, "writer %d has receipts for %d commits", i, n)
			}
		},
	},
}
