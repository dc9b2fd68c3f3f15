package statetest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

var endingChecks = []check{
	{
		name: "Cancelled",
		rule: "with a context that has ended no function runs, nothing changes, and the error is the context's",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "a", time.Hour)
			ended, cancel := context.WithCancel(ctx)
			cancel()
			never := func(projection.StateTx) error {
				t.Error("the function ran although the context had ended")
				return nil
			}
			require.ErrorIs(t, state.Update(ended, never), context.Canceled)
			require.ErrorIs(t, state.View(ended, never), context.Canceled)
			_, err := state.Acquire(ended, "w", "a", time.Hour)
			require.ErrorIs(t, err, context.Canceled)
			_, err = state.Renew(ended, lease, time.Hour)
			require.ErrorIs(t, err, context.Canceled)
			require.NoError(t, state.Update(ctx, func(tx projection.StateTx) error { return tx.Fence(lease) }), "a cancelled Acquire raises no epoch")
		},
	},
	{
		name: "CancelledWhileWaiting",
		rule: "an update that waits for its turn, or for another one that the same lease has fenced, gives up when its context ends",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			inside, goOn, first := make(chan struct{}), make(chan struct{}), make(chan error, 1)
			go func() {
				first <- state.Update(ctx, func(tx projection.StateTx) error {
					err := s.turn(tx, lease)
					close(inside)
					<-goOn
					return errors.Join(err, tx.Put("t", "first", []byte("x")))
				})
			}()
			<-inside
			waiting, cancel := context.WithCancel(ctx)
			second := make(chan error, 1)
			go func() {
				second <- state.Update(waiting, func(tx projection.StateTx) error {
					if err := s.turn(tx, lease); err != nil {
						return err
					}
					return tx.Put("t", "second", []byte("x"))
				})
			}()
			s.afterOrSoon(goOn) // it waits by then; if not, it sees an ended context anyway
			cancel()
			select {
			case err := <-second:
				require.ErrorIs(t, err, context.Canceled)
			case <-ctx.Done():
				close(goOn)
				require.Fail(t, "an update whose context has ended still waits for its turn")
			}
			close(goOn)
			require.NoError(t, <-first)
			require.Equal(t, "(none)", value(t, ctx, state, "t", "second"))
		},
	},
	{
		name: "Closed",
		rule: "after Close every call returns eventstore.ErrClosed and no function runs; closing again is fine",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "a", time.Hour)
			require.NoError(t, state.Close())
			never := func(projection.StateTx) error {
				t.Error("the function ran although the state was closed")
				return nil
			}
			require.ErrorIs(t, state.Update(ctx, never), eventstore.ErrClosed)
			require.ErrorIs(t, state.View(ctx, never), eventstore.ErrClosed)
			_, err := state.Acquire(ctx, "w", "a", time.Hour)
			require.ErrorIs(t, err, eventstore.ErrClosed)
			_, err = state.Renew(ctx, lease, time.Hour)
			require.ErrorIs(t, err, eventstore.ErrClosed)
			require.ErrorIs(t, state.Release(ctx, lease), eventstore.ErrClosed)
			require.NoError(t, state.Close(), "closing again")
		},
	},
}

var sqlChecks = []check{
	{
		name: "Declared",
		rule: "a backend without SQL says so with errors.ErrUnsupported",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			err := state.Update(ctx, func(tx projection.StateTx) error {
				_, err := tx.Exec(ctx, "CREATE TABLE probe (n BIGINT)")
				return err
			})
			if s.features.SQL {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, errors.ErrUnsupported, "Features.SQL is not declared, so Exec must refuse")
			require.ErrorIs(t, state.Update(ctx, func(tx projection.StateTx) error {
				_, err := tx.Query(ctx, "SELECT 1")
				return err
			}), errors.ErrUnsupported, "Features.SQL is not declared, so Query must refuse")
		},
	},
	{
		name:  "SameTransaction",
		rule:  "SQL runs in the transaction of the rows and the checkpoint: all of it commits or none; parameters are $1, $2, …",
		needs: needSQL,
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			exec := func(tx projection.StateTx, query string, args ...any) int64 {
				n, err := tx.Exec(ctx, query, args...)
				require.NoError(t, err, query)
				return n
			}
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				exec(tx, "CREATE TABLE balances (owner TEXT PRIMARY KEY, cents BIGINT NOT NULL)")
				require.Equal(t, int64(1), exec(tx, "INSERT INTO balances (cents, owner) VALUES ($2, $1)", "ann", 5), "one row changed, parameters by number")
				require.Equal(t, int64(1), exec(tx, "INSERT INTO balances (owner, cents) VALUES ($1, $2)", "bob", 7))
				require.Equal(t, [][2]any{{"ann", int64(5)}, {"bob", int64(7)}}, balances(t, ctx, tx), "SQL sees its own writes")
				return nil
			})
			failure := errors.New("the handler failed")
			require.Equal(t, failure, state.Update(ctx, func(tx projection.StateTx) error {
				require.Equal(t, int64(2), exec(tx, "UPDATE balances SET cents = cents + $1", 100), "two rows changed")
				exec(tx, "CREATE TABLE never (n BIGINT)")
				require.NoError(t, errors.Join(tx.Put("t", "k", []byte("never")), tx.SetCheckpoint(lease, projection.Checkpoint{}, at(1))))
				return failure
			}))
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Equal(t, [][2]any{{"ann", int64(5)}, {"bob", int64(7)}}, balances(t, ctx, tx))
				_, err := tx.Query(ctx, "SELECT n FROM never")
				require.Error(t, err, "a table made by a failed update")
			})
			require.Equal(t, "(none)", value(t, ctx, state, "t", "k"))
			require.True(t, checkpoint(t, ctx, state, "w").IsZero())
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				exec(tx, "DELETE FROM balances WHERE owner = $1", "bob")
				return errors.Join(tx.Put("t", "k", []byte("v")), tx.SetCheckpoint(lease, projection.Checkpoint{}, at(1)))
			})
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Equal(t, [][2]any{{"ann", int64(5)}}, balances(t, ctx, tx))
				require.Equal(t, "v", valueIn(t, tx, "t", "k"))
			})
		},
	},
	{
		name:  "FailedStatement",
		rule:  "a statement that fails is an error; an update that returns it leaves nothing, and the next one works",
		needs: needSQL,
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				_, err := tx.Exec(ctx, "CREATE TABLE balances (owner TEXT PRIMARY KEY, cents BIGINT NOT NULL)")
				return err
			})
			require.Error(t, state.Update(ctx, func(tx projection.StateTx) error {
				require.NoError(t, tx.Put("t", "k", []byte("never")))
				if _, err := tx.Exec(ctx, "INSERT INTO balances (owner, cents) VALUES ($1, $2), ($1, $2)", "ann", 5); err != nil {
					return err
				}
				return nil
			}), "the same primary key twice")
			require.Equal(t, "(none)", value(t, ctx, state, "t", "k"))
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				_, err := tx.Exec(ctx, "INSERT INTO balances (owner, cents) VALUES ($1, $2)", "ann", 5)
				return err
			})
			_ = state.View(ctx, func(tx projection.StateTx) error {
				_, err := tx.Exec(ctx, "UPDATE balances SET cents = 0")
				require.Error(t, err, "SQL that writes in a view")
				return nil
			})
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Equal(t, [][2]any{{"ann", int64(5)}}, balances(t, ctx, tx))
			})
		},
	},
	{
		name:  "SurvivesReopening",
		rule:  "the user's tables are there after reopening",
		needs: func(f Features) string { return needSQL(f) + needReopen(f) },
		run: func(t testing.TB, s *suite) {
			ctx, p := s.context(t), s.prepare(t)
			state := p.open(t)
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				_, err := tx.Exec(ctx, "CREATE TABLE balances (owner TEXT PRIMARY KEY, cents BIGINT NOT NULL)")
				require.NoError(t, err)
				_, err = tx.Exec(ctx, "INSERT INTO balances (owner, cents) VALUES ($1, $2)", "ann", 5)
				return err
			})
			state = p.reopen(t)
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Equal(t, [][2]any{{"ann", int64(5)}}, balances(t, ctx, tx))
			})
		},
	},
}

func needSQL(f Features) string {
	if f.SQL {
		return ""
	}
	return "SQL"
}

func balances(t testing.TB, ctx context.Context, tx projection.StateTx) [][2]any {
	t.Helper()
	rows, err := tx.Query(ctx, "SELECT owner, cents FROM balances WHERE cents >= $1 ORDER BY owner", 0)
	require.NoError(t, err)
	var all [][2]any
	for rows.Next() {
		var owner string
		var cents int64
		require.NoError(t, rows.Scan(&owner, &cents))
		all = append(all, [2]any{owner, cents})
	}
	require.NoError(t, rows.Err())
	require.NoError(t, rows.Close())
	return all
}
