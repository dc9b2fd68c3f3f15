package statetest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/projection"
)

var updateChecks = []check{
	{
		name: "CommitsTogether",
		rule: "when fn returns nil all that it wrote is there",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				return errors.Join(tx.Put("t", "a", []byte("1")), tx.Put("t", "b", []byte("2")), tx.Put("u", "a", []byte("3")),
					tx.SetCheckpoint(lease, projection.Checkpoint{}, projection.Checkpoint{Log: "log", Position: 7}))
			})
			require.Equal(t, "1", value(t, ctx, state, "t", "a"))
			require.Equal(t, "2", value(t, ctx, state, "t", "b"))
			require.Equal(t, "3", value(t, ctx, state, "u", "a"))
			require.Equal(t, projection.Checkpoint{Log: "log", Epoch: lease.Epoch, Position: 7}, checkpoint(t, ctx, state, "w"))
		},
	},
	{
		name: "ErrorLeavesNothing",
		rule: "when fn returns an error nothing of it remains, rows, cleared tables and checkpoint alike, and the error comes back as it is",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			put(t, ctx, state, "t", "a", "old")
			put(t, ctx, state, "cleared", "a", "old")
			failure := errors.New("the handler failed")
			calls := 0
			err := state.Update(ctx, func(tx projection.StateTx) error {
				calls++
				require.NoError(t, errors.Join(tx.Put("t", "a", []byte("new")), tx.Put("t", "b", []byte("new")), tx.Delete("t", "a"), tx.Clear("cleared"),
					tx.SetCheckpoint(lease, projection.Checkpoint{}, projection.Checkpoint{Log: "log", Position: 7})))
				return failure
			})
			require.Equal(t, failure, err, "fn's error is returned as it is")
			require.Equal(t, 1, calls, "fn runs at most once")
			requireUntouched(t, ctx, state)
		},
	},
	{
		name: "FencedLeavesNothing",
		rule: "once a lease or a checkpoint was found to have moved on, nothing of the transaction remains, also when fn drops the error",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			old := mustAcquire(t, ctx, state, "w", "me", 0)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			put(t, ctx, state, "t", "a", "old")
			put(t, ctx, state, "cleared", "a", "old")
			moved, to := projection.Checkpoint{Log: "log", Position: 3}, projection.Checkpoint{Log: "log", Position: 7}
			for name, fenced := range map[string]func(projection.StateTx) error{
				"Fence":                   func(tx projection.StateTx) error { return tx.Fence(old) },
				"SetCheckpoint":           func(tx projection.StateTx) error { return tx.SetCheckpoint(old, projection.Checkpoint{}, to) },
				"SetCheckpoint from else": func(tx projection.StateTx) error { return tx.SetCheckpoint(lease, moved, to) },
				"DeleteCheckpoint":        func(tx projection.StateTx) error { return tx.DeleteCheckpoint(old) },
			} {
				err := state.Update(ctx, func(tx projection.StateTx) error {
					require.NoError(t, errors.Join(tx.Put("t", "a", []byte("new")), tx.Put("t", "b", []byte("new")), tx.Clear("cleared")), name)
					require.ErrorIs(t, fenced(tx), projection.ErrFenced, name)
					_ = tx.Put("t", "b", []byte("newer"))
					_ = tx.SetCheckpoint(lease, projection.Checkpoint{}, to)
					return nil
				})
				require.ErrorIs(t, err, projection.ErrFenced, "%s failed, and the update succeeded", name)
				requireUntouched(t, ctx, state)
			}
		},
	},
	{
		name: "PanicLeavesNothing",
		rule: "when fn panics nothing of it remains, and the state goes on working",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			put(t, ctx, state, "t", "a", "old")
			put(t, ctx, state, "cleared", "a", "old")
			var err error
			var panicked any
			func() {
				defer func() { panicked = recover() }()
				err = state.Update(ctx, func(tx projection.StateTx) error {
					require.NoError(t, errors.Join(tx.Put("t", "a", []byte("new")), tx.Put("t", "b", []byte("new")), tx.Clear("cleared"),
						tx.SetCheckpoint(lease, projection.Checkpoint{}, projection.Checkpoint{Log: "log", Position: 7})))
					panic("the handler panicked")
				})
			}()
			require.True(t, panicked != nil || err != nil, "a panic in fn must reach the caller, as a panic or as an error")
			require.Contains(t, fmt.Sprint(panicked, err), "the handler panicked", "what fn panicked with must not get lost")
			requireUntouched(t, ctx, state)
			put(t, ctx, state, "t", "c", "after")
			require.Equal(t, "after", value(t, ctx, state, "t", "c"))
		},
	},
	{
		name: "GoexitLeavesNothing",
		rule: "when fn's goroutine exits (a failed test does that) nothing remains and the state goes on working",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			done := make(chan struct{})
			go func() {
				defer close(done)
				_ = state.Update(ctx, func(tx projection.StateTx) error {
					if err := tx.Put("t", "a", []byte("new")); err != nil {
						return err
					}
					runtime.Goexit()
					return nil
				})
			}()
			select {
			case <-done:
			case <-ctx.Done():
				require.Fail(t, "Update never returned", "%v", context.Cause(ctx))
			}
			require.Equal(t, "(none)", value(t, ctx, state, "t", "a"))
			put(t, ctx, state, "t", "c", "after")
			require.Equal(t, "after", value(t, ctx, state, "t", "c"))
		},
	},
	{
		name: "ReadsItsOwnWrites",
		rule: "writes are seen by later reads of the same transaction, in gets, scans and checkpoints",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			put(t, ctx, state, "t", "b", "old")
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				require.NoError(t, errors.Join(tx.Put("t", "a", []byte("1")), tx.Put("t", "b", []byte("2")), tx.Put("t", "c", []byte("3"))))
				require.Equal(t, []string{"a=1", "b=2", "c=3"}, rowsIn(t, tx, "t", projection.Range{}))
				require.NoError(t, tx.Delete("t", "b"))
				require.Equal(t, "(none)", valueIn(t, tx, "t", "b"))
				require.Equal(t, []string{"c=3", "a=1"}, rowsIn(t, tx, "t", projection.Range{Backward: true}))
				require.NoError(t, tx.Clear("t"))
				require.Empty(t, rowsIn(t, tx, "t", projection.Range{}))
				require.NoError(t, tx.Put("t", "d", []byte("4")))
				require.Equal(t, []string{"d=4"}, rowsIn(t, tx, "t", projection.Range{}))
				to := projection.Checkpoint{Log: "log", Position: 3}
				require.NoError(t, tx.SetCheckpoint(lease, projection.Checkpoint{}, to))
				got, err := tx.Checkpoint("w")
				require.NoError(t, err)
				require.Equal(t, projection.Checkpoint{Log: "log", Epoch: lease.Epoch, Position: 3}, got)
				require.NoError(t, tx.SetCheckpoint(lease, got, projection.Checkpoint{Log: "log", Position: 4}), "twice in one transaction")
				return nil
			})
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Equal(t, []string{"d=4"}, rowsIn(t, tx, "t", projection.Range{}))
			})
		},
	},
}

// requireUntouched checks what a failed update must have left alone.
func requireUntouched(t testing.TB, ctx context.Context, state State) {
	t.Helper()
	require.Equal(t, "old", value(t, ctx, state, "t", "a"), "a row that was changed")
	require.Equal(t, "(none)", value(t, ctx, state, "t", "b"), "a row that was added")
	require.Equal(t, "old", value(t, ctx, state, "cleared", "a"), "a table that was cleared")
	require.True(t, checkpoint(t, ctx, state, "w").IsZero(), "the checkpoint moved without the rows")
}

var viewChecks = []check{
	{
		name: "ReadOnly",
		rule: "writing in a view fails, and changes nothing",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			put(t, ctx, state, "t", "a", "1")
			for name, write := range map[string]func(projection.StateTx) error{
				"Put":    func(tx projection.StateTx) error { return tx.Put("t", "a", []byte("2")) },
				"Delete": func(tx projection.StateTx) error { return tx.Delete("t", "a") },
				"Clear":  func(tx projection.StateTx) error { return tx.Clear("t") },
				"SetCheckpoint": func(tx projection.StateTx) error {
					return tx.SetCheckpoint(lease, projection.Checkpoint{}, projection.Checkpoint{Log: "l", Position: 1})
				},
				"DeleteCheckpoint": func(tx projection.StateTx) error { return tx.DeleteCheckpoint(lease) },
			} {
				_ = state.View(ctx, func(tx projection.StateTx) error {
					require.Error(t, write(tx), "%s in a view", name)
					return nil
				})
			}
			require.Equal(t, "1", value(t, ctx, state, "t", "a"))
			require.True(t, checkpoint(t, ctx, state, "w").IsZero())
		},
	},
	{
		name: "ReturnsItsError",
		rule: "the error of a view's function is returned as it is",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			failure := errors.New("the query failed")
			require.Equal(t, failure, state.View(ctx, func(projection.StateTx) error { return failure }))
		},
	},
	{
		name: "Snapshot",
		rule: "a view sees one moment: updates that commit while it runs stay unseen, also in its later reads",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			put(t, ctx, state, "t", "a", "old")
			updated := make(chan struct{})
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Equal(t, "old", valueIn(t, tx, "t", "a"))
				go func() {
					defer close(updated)
					_ = state.Update(ctx, func(tx projection.StateTx) error {
						return errors.Join(tx.Put("t", "a", []byte("new")), tx.Put("t", "b", []byte("new")), tx.Put("u", "c", []byte("new")))
					})
				}()
				s.afterOrSoon(updated)
				require.Equal(t, []string{"a=old"}, rowsIn(t, tx, "t", projection.Range{}), "the view sees an update that committed after it had begun")
				require.Empty(t, rowsIn(t, tx, "u", projection.Range{}))
			})
			<-updated
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Equal(t, []string{"a=new", "b=new"}, rowsIn(t, tx, "t", projection.Range{}))
			})
		},
	},
	{
		name: "CommittedOnly",
		rule: "a view sees nothing of an update that has not committed",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			put(t, ctx, state, "t", "a", "old")
			written, viewed, failure := make(chan struct{}), make(chan struct{}), errors.New("given up")
			updated := make(chan error, 1)
			go func() {
				updated <- state.Update(ctx, func(tx projection.StateTx) error {
					if err := tx.Put("t", "a", []byte("never")); err != nil {
						return err
					}
					close(written)
					s.afterOrSoon(viewed)
					return failure
				})
			}()
			<-written
			got := value(t, ctx, state, "t", "a")
			close(viewed)
			require.Equal(t, "old", got, "a view sees what an update wrote before it committed")
			require.Equal(t, failure, <-updated)
		},
	},
	{
		name: "NeverTorn",
		rule: "under concurrent updates every view sees whole updates: rows that are written together are read together",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			write := func(n int) error {
				return state.Update(ctx, func(tx projection.StateTx) error {
					for i := range 20 {
						if err := tx.Put("t", fmt.Sprintf("%02d", i), []byte(strconv.Itoa(n))); err != nil {
							return err
						}
					}
					return nil
				})
			}
			require.NoError(t, write(0))
			const viewers, views = 4, 40
			failed, wrote := make(chan error, viewers), make(chan struct{})
			defer close(wrote) // views that are left when one has failed go on
			for range viewers {
				go func() {
					for n := range views {
						err := state.View(ctx, func(tx projection.StateTx) error {
							seen := map[string]int{}
							for row, err := range tx.Scan("t", projection.Range{}) {
								if err != nil {
									return err
								}
								if seen[string(row.Value)]++; n == 0 && row.Key == "05" {
									// Two updates end, or try to, while this view is half way.
									s.afterOrSoon(wrote)
									s.afterOrSoon(wrote)
								}
								runtime.Gosched()
							}
							if len(seen) != 1 {
								return fmt.Errorf("a view sees parts of several updates: %v", seen)
							}
							return nil
						})
						if err != nil {
							failed <- err
							return
						}
					}
					failed <- nil
				}()
			}
			ended := 0
			for n := 0; ended < viewers; n++ {
				require.NoError(t, write(n))
				select {
				case wrote <- struct{}{}:
				case err := <-failed:
					require.NoError(t, err)
					ended++
				default:
				}
			}
		},
	},
}

var rowChecks = []check{
	{
		name: "GetPutDelete",
		rule: "rows are kept by table and key, exactly as given: any bytes but an empty key, also NUL and what is not UTF-8; deleting what is not there is no error",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			binary := make([]byte, 256)
			for i := range binary {
				binary[i] = byte(i)
			}
			large := strings.Repeat("large ", 50_000)
			for _, table := range []string{"t", "T", "view orders/by-day 'x' \"y\" %", "ü"} {
				for _, key := range []string{"k", "K", " k", "k ", "account-ann", "ключ", "a'b\"c", "%", "\x00", "a\x00b", "a\x00c", "\xff\xfe", "\xc3", strings.Repeat("long", 200)} {
					require.Equal(t, "(none)", value(t, ctx, state, table, key), "key %q of table %q before it was put", key, table)
					for _, v := range []string{table + key, "", string(binary), large, "last " + table + key} {
						put(t, ctx, state, table, key, v)
						require.Equal(t, v, value(t, ctx, state, table, key), "key %q of table %q", key, table)
					}
				}
			}
			require.Equal(t, "last tk", value(t, ctx, state, "t", "k"))
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				return errors.Join(tx.Delete("t", "k"), tx.Delete("t", "k"), tx.Delete("no such table", "k"))
			})
			require.Equal(t, "(none)", value(t, ctx, state, "t", "k"))
			require.Equal(t, "last tK", value(t, ctx, state, "t", "K"))
			require.Equal(t, "last Tk", value(t, ctx, state, "T", "k"))
			put(t, ctx, state, "t", "k", "again")
			require.Equal(t, "again", value(t, ctx, state, "t", "k"))
		},
	},
	{
		name: "Clear",
		rule: "Clear removes every row of that table and of no other; clearing what is not there is no error",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			for i := range 300 {
				if i%100 == 0 {
					put(t, ctx, state, "tt", fmt.Sprint(i), "x")
				}
				put(t, ctx, state, "t", fmt.Sprint(i), "x")
			}
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				return errors.Join(tx.Clear("t"), tx.Clear("no such table"), tx.Clear("t"))
			})
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Empty(t, rowsIn(t, tx, "t", projection.Range{}))
				require.Len(t, rowsIn(t, tx, "tt", projection.Range{}), 3)
			})
			put(t, ctx, state, "t", "new", "y")
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Equal(t, []string{"new=y"}, rowsIn(t, tx, "t", projection.Range{}))
			})
		},
	},
	{
		name: "ScanMatrix",
		rule: "Scan yields the rows in the byte order of their keys; prefix, after (exclusive), through (inclusive), direction and limit hold together, and bounds need not exist",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			keys := []string{"A", "B", "a", "a b", "a%", "a-", "a-1", "a-10", "a-2", "a_", "aa", "ab", "abc", "a\u007f", "aé", "a\U0010ffff", "b", "b-1", "z", "é", "日本", "\U0010ffff", "\x00", "a\x00", "a\x00b", "a\xff", "\xff"}
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				for i := range keys {
					key := keys[(i*7)%len(keys)]
					if err := errors.Join(tx.Put("t", key, []byte("v")), tx.Put("other", key+"x", []byte("v"))); err != nil {
						return err
					}
				}
				return nil
			})
			slices.Sort(keys)
			bounds := []string{"", "A", "a", "a\x00", "a-", "a-1", "a-15", "ab", "a\xff", "c", "zz", "\U0010ffff"}
			mustView(t, ctx, state, func(tx projection.StateTx) {
				for _, prefix := range []string{"", "a", "a-", "a-1", "nothing", "é", "\U0010ffff", "a%", "a\x00", "a\xff", "\xff"} {
					for _, after := range bounds {
						for _, through := range bounds {
							for _, back := range []bool{false, true} {
								for _, limit := range []int{0, 1, 3} {
									r := projection.Range{Prefix: prefix, After: after, Through: through, Backward: back, Limit: limit}
									require.Equal(t, expected(keys, r), rowsIn(t, tx, "t", r), "%+v", r)
								}
							}
						}
					}
				}
				require.Empty(t, rowsIn(t, tx, "no such table", projection.Range{}))
			})
		},
	},
	{
		name: "ScanManyAndBreak",
		rule: "a scan goes over any number of rows, and can be broken off; the transaction goes on after it",
		run: func(t testing.TB, s *suite) {
			ctx, state := s.context(t), s.open(t)
			const n = 3000
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				for i := range n {
					if err := tx.Put("t", fmt.Sprintf("%06d", i), []byte("v")); err != nil {
						return err
					}
				}
				return nil
			})
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				require.Len(t, rowsIn(t, tx, "t", projection.Range{}), n)
				for range 50 {
					for _, err := range tx.Scan("t", projection.Range{}) {
						require.NoError(t, err)
						break
					}
				}
				first := ""
				for row, err := range tx.Scan("t", projection.Range{}) {
					require.NoError(t, err)
					if first == "" {
						first = row.Key
						require.Equal(t, "v", valueIn(t, tx, "t", "000007"), "a get within a scan")
						require.Len(t, rowsIn(t, tx, "t", projection.Range{Limit: 5}), 5, "a scan within a scan")
					}
				}
				return tx.Put("t", "last", []byte("v"))
			})
			mustView(t, ctx, state, func(tx projection.StateTx) {
				require.Len(t, rowsIn(t, tx, "t", projection.Range{}), n+1)
			})
		},
	},
	{
		name:  "SurviveReopening",
		rule:  "rows and checkpoints are there after the state was closed and opened again",
		needs: needReopen,
		run: func(t testing.TB, s *suite) {
			ctx, p := s.context(t), s.prepare(t)
			state := p.open(t)
			lease := mustAcquire(t, ctx, state, "w", "me", 0)
			mustUpdate(t, ctx, state, func(tx projection.StateTx) error {
				return errors.Join(tx.Put("t", "a", []byte("1")), tx.Put("t", "b", []byte("2")), tx.Delete("t", "a"),
					tx.SetCheckpoint(lease, projection.Checkpoint{}, projection.Checkpoint{Log: "log", Position: 1 << 40}))
			})
			require.NoError(t, state.Release(ctx, lease))
			state = p.reopen(t)
			require.Equal(t, "(none)", value(t, ctx, state, "t", "a"))
			require.Equal(t, "2", value(t, ctx, state, "t", "b"))
			require.Equal(t, projection.Checkpoint{Log: "log", Epoch: lease.Epoch, Position: 1 << 40}, checkpoint(t, ctx, state, "w"))
			again := mustAcquire(t, ctx, state, "w", "another", 0)
			require.Greater(t, again.Epoch, lease.Epoch, "epochs never repeat, also after reopening")
			require.ErrorIs(t, state.Update(ctx, func(tx projection.StateTx) error { return tx.Fence(lease) }), projection.ErrFenced, "an owner from before is fenced")
		},
	},
}

// expected is the reference for scans over rows with the value "v".
func expected(sorted []string, r projection.Range) []string {
	rows := []string{}
	keys := slices.Clone(sorted)
	if r.Backward {
		slices.Reverse(keys)
	}
	for _, key := range keys {
		before := func(a, b string) bool { return a < b != r.Backward && a != b }
		switch {
		case !strings.HasPrefix(key, r.Prefix),
			r.After != "" && !before(r.After, key),
			r.Through != "" && before(r.Through, key),
			r.Limit > 0 && len(rows) == r.Limit:
			continue
		}
		rows = append(rows, key+"=v")
	}
	return rows
}
