package statetest

import (
	"context"
	"errors"
	"iter"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/metatest"
	"github.com/deed-go/deed/projection"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// broken is the memory state with some of its methods, or the transactions it
// gives, replaced.
type broken struct {
	*memory.Store
	update  func(context.Context, func(projection.StateTx) error) error
	view    func(context.Context, func(projection.StateTx) error) error
	acquire func(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error)
	renew   func(context.Context, projection.Lease, time.Duration) (projection.Lease, error)
	release func(context.Context, projection.Lease) error
	listed  func([]projection.NamedCheckpoint) []projection.NamedCheckpoint
	close   func() error
	tx      func(projection.StateTx) projection.StateTx
}

func (b *broken) wrap(fn func(projection.StateTx) error) func(projection.StateTx) error {
	if b.tx == nil {
		return fn
	}
	return func(tx projection.StateTx) error { return fn(b.tx(tx)) }
}

func (b *broken) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	if b.update != nil {
		return b.update(ctx, fn)
	}
	return b.Store.Update(ctx, b.wrap(fn))
}

func (b *broken) View(ctx context.Context, fn func(projection.StateTx) error) error {
	if b.view != nil {
		return b.view(ctx, fn)
	}
	return b.Store.View(ctx, b.wrap(fn))
}

func (b *broken) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	if b.acquire != nil {
		return b.acquire(ctx, name, owner, ttl)
	}
	return b.Store.Acquire(ctx, name, owner, ttl)
}

func (b *broken) Renew(ctx context.Context, l projection.Lease, ttl time.Duration) (projection.Lease, error) {
	if b.renew != nil {
		return b.renew(ctx, l, ttl)
	}
	return b.Store.Renew(ctx, l, ttl)
}

func (b *broken) Release(ctx context.Context, l projection.Lease) error {
	if b.release != nil {
		return b.release(ctx, l)
	}
	return b.Store.Release(ctx, l)
}

func (b *broken) Checkpoints(ctx context.Context) ([]projection.NamedCheckpoint, error) {
	all, err := b.Store.Checkpoints(ctx)
	if b.listed != nil {
		all = b.listed(all)
	}
	return all, err
}

func (b *broken) Close() error {
	if b.close != nil {
		return b.close()
	}
	return b.Store.Close()
}

// brokenTx is a transaction with some of its methods replaced.
type brokenTx struct {
	projection.StateTx
	put           func(table, key string, value []byte) error
	get           func(table, key string) ([]byte, bool, error)
	clear         func(table string) error
	scan          func(table string, r projection.Range) iter.Seq2[projection.Row, error]
	setCheckpoint func(l projection.Lease, from, to projection.Checkpoint) error
	delCheckpoint func(l projection.Lease) error
	fence         func(l projection.Lease) error
	exec          func(query string) (int64, error)
}

func (t *brokenTx) Put(table, key string, value []byte) error {
	if t.put != nil {
		return t.put(table, key, value)
	}
	return t.StateTx.Put(table, key, value)
}

func (t *brokenTx) Get(table, key string) ([]byte, bool, error) {
	if t.get != nil {
		return t.get(table, key)
	}
	return t.StateTx.Get(table, key)
}

func (t *brokenTx) Clear(table string) error {
	if t.clear != nil {
		return t.clear(table)
	}
	return t.StateTx.Clear(table)
}

func (t *brokenTx) Scan(table string, r projection.Range) iter.Seq2[projection.Row, error] {
	if t.scan != nil {
		return t.scan(table, r)
	}
	return t.StateTx.Scan(table, r)
}

func (t *brokenTx) SetCheckpoint(l projection.Lease, from, to projection.Checkpoint) error {
	if t.setCheckpoint != nil {
		return t.setCheckpoint(l, from, to)
	}
	return t.StateTx.SetCheckpoint(l, from, to)
}

func (t *brokenTx) DeleteCheckpoint(l projection.Lease) error {
	if t.delCheckpoint != nil {
		return t.delCheckpoint(l)
	}
	return t.StateTx.DeleteCheckpoint(l)
}

func (t *brokenTx) Fence(l projection.Lease) error {
	if t.fence != nil {
		return t.fence(l)
	}
	return t.StateTx.Fence(l)
}

func (t *brokenTx) Exec(ctx context.Context, query string, args ...any) (int64, error) {
	if t.exec != nil {
		return t.exec(query)
	}
	return t.StateTx.Exec(ctx, query, args...)
}

// withTx replaces methods of every transaction.
func withTx(change func(t *brokenTx)) func(*broken) {
	return func(b *broken) {
		b.tx = func(tx projection.StateTx) projection.StateTx {
			t := &brokenTx{StateTx: tx}
			change(t)
			return t
		}
	}
}

// scanned changes the rows of a scan.
func scanned(change func(r projection.Range, rows []projection.Row) []projection.Row) func(*broken) {
	return withTx(func(t *brokenTx) {
		t.scan = func(table string, r projection.Range) iter.Seq2[projection.Row, error] {
			return func(yield func(projection.Row, error) bool) {
				var rows []projection.Row
				for row, err := range t.StateTx.Scan(table, r) {
					if err != nil {
						yield(row, err)
						return
					}
					rows = append(rows, row)
				}
				for _, row := range change(r, rows) {
					if !yield(row, nil) {
						return
					}
				}
			}
		}
	})
}

// currentLease looks up the lease that is current by name; used to forge one.
type currentLeases struct {
	mu     sync.Mutex
	leases map[string]projection.Lease
}

func (c *currentLeases) follow(b *broken) {
	c.leases = map[string]projection.Lease{}
	b.acquire = func(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
		l, err := b.Store.Acquire(ctx, name, owner, ttl)
		if err == nil {
			c.mu.Lock()
			c.leases[name] = l
			c.mu.Unlock()
		}
		return l, err
	}
}

func (c *currentLeases) of(l projection.Lease) projection.Lease {
	c.mu.Lock()
	defer c.mu.Unlock()
	if current, ok := c.leases[l.Name]; ok {
		return current
	}
	return l
}

// breakage is one way to break a state, and the checks that must notice it.
type breakage struct {
	name     string
	features Features
	store    func(b *broken)
	// concurrent breaks a state whose updates run at the same time, instead.
	concurrent func(c *concurrent)
	// hangs says that what the checks wait for never comes.
	hangs bool
	fails []string
}

func (x breakage) suite() *suite {
	s := newSuite(func(t testing.TB) Opener {
		return func() (State, error) {
			if x.concurrent != nil {
				c := newConcurrent()
				x.concurrent(c)
				return c, nil
			}
			b := &broken{Store: memory.New()}
			if x.store != nil {
				x.store(b)
			}
			return b, nil
		}
	}, x.features)
	s.moment = 2 * time.Second // what is broken gets ahead also where the machine stalls
	if x.hangs {
		s.patience = 3 * time.Second // more than sound states need: a moment, or that a lease ends
	}
	return s
}

// keepAcross makes the states that one suite opens share a memory store, whose
// Close does nothing, and breaks what is opened again.
func keepAcross(again func(b *broken)) func(*broken) {
	var mu sync.Mutex
	var kept *memory.Store
	return func(b *broken) {
		mu.Lock()
		defer mu.Unlock()
		if kept == nil {
			kept = b.Store
		} else {
			b.Store = kept
			if again != nil {
				again(b)
			}
		}
		b.close = func() error { return nil }
	}
}

var concurrentFeatures = Features{Shared: true, ConcurrentUpdates: true}

var breakages = []breakage{
	{
		name: "updates commit although they fail", store: func(b *broken) {
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				var failed error
				if err := b.Store.Update(ctx, func(tx projection.StateTx) error {
					failed = fn(tx)
					return nil
				}); err != nil {
					return err
				}
				return failed
			}
		},
		fails: []string{"Update/ErrorLeavesNothing"},
	},
	{
		name: "updates commit although they panic", store: func(b *broken) {
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				var panicked any
				err := b.Store.Update(ctx, func(tx projection.StateTx) (err error) {
					defer func() { panicked = recover() }()
					return fn(tx)
				})
				if panicked != nil {
					panic(panicked)
				}
				return err
			}
		},
		fails: []string{"Update/PanicLeavesNothing"},
	},
	{
		name: "a panic is swallowed", store: func(b *broken) {
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) (err error) {
				defer func() {
					if recover() != nil {
						err = nil
					}
				}()
				return b.Store.Update(ctx, fn)
			}
		},
		fails: []string{"Update/PanicLeavesNothing"},
	},
	{
		name: "a goroutine that exits keeps the turn", hangs: true, store: func(b *broken) {
			turn := make(chan struct{}, 1)
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				select {
				case turn <- struct{}{}:
				case <-ctx.Done():
					return ctx.Err()
				}
				err := b.Store.Update(ctx, fn)
				<-turn
				return err
			}
		},
		fails: []string{"Update/GoexitLeavesNothing", "Update/PanicLeavesNothing"},
	},
	{
		name: "errors are wrapped", store: func(b *broken) {
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				if err := b.Store.Update(ctx, fn); err != nil {
					return errors.Join(errors.New("update failed"), err)
				}
				return nil
			}
			b.view = func(ctx context.Context, fn func(projection.StateTx) error) error {
				if err := b.Store.View(ctx, fn); err != nil {
					return errors.Join(errors.New("view failed"), err)
				}
				return nil
			}
		},
		fails: []string{"Update/ErrorLeavesNothing", "View/ReturnsItsError"},
	},
	{
		name: "checkpoints are forgotten", store: withTx(func(t *brokenTx) {
			t.setCheckpoint = func(projection.Lease, projection.Checkpoint, projection.Checkpoint) error { return nil }
		}),
		fails: []string{"Update/CommitsTogether", "Update/ReadsItsOwnWrites", "Checkpoint/CompareAndSet", "Checkpoint/OnePerName", "Lease/ManyOwners"},
	},
	{
		name: "transactions do not see their own writes", store: func(b *broken) {
			b.tx = func(tx projection.StateTx) projection.StateTx {
				t := &brokenTx{StateTx: tx}
				t.scan = func(table string, r projection.Range) iter.Seq2[projection.Row, error] {
					return func(yield func(projection.Row, error) bool) {
						_ = b.Store.View(context.Background(), func(old projection.StateTx) error {
							old.Scan(table, r)(yield)
							return nil
						})
					}
				}
				return t
			}
		},
		fails: []string{"Update/ReadsItsOwnWrites"},
	},
	{
		name: "updates run at the same time, the last one wins", store: func(b *broken) {
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				// What fn writes is recorded on a snapshot and replayed in one go.
				var writes []func(projection.StateTx) error
				if err := b.Store.View(ctx, func(tx projection.StateTx) error {
					return fn(&brokenTx{StateTx: tx, put: func(table, key string, value []byte) error {
						writes = append(writes, func(tx projection.StateTx) error { return tx.Put(table, key, value) })
						return nil
					}})
				}); err != nil {
					return err
				}
				return b.Store.Update(ctx, func(tx projection.StateTx) error {
					for _, write := range writes {
						if err := write(tx); err != nil {
							return err
						}
					}
					return nil
				})
			}
		},
		fails: []string{"Concurrency/Serialised"},
	},
	{
		name: "Fence looks and does not wait", features: concurrentFeatures,
		concurrent: func(c *concurrent) { c.free, c.compareOnly = true, true },
		fails:      []string{"Concurrency/Serialised", "Concurrency/SetCheckpointFences"},
	},
	{
		name: "SetCheckpoint looks and does not wait", features: concurrentFeatures,
		concurrent: func(c *concurrent) { c.compareOnly = true },
		fails:      []string{"Concurrency/SetCheckpointFences"},
	},
	{
		name: "concurrent updates are declared, and run one after another", hangs: true, features: Features{ConcurrentUpdates: true},
		fails: []string{"Concurrency/Independent"},
	},
	{
		name: "concurrent updates are not declared", features: Features{Shared: true}, concurrent: func(*concurrent) {},
		fails: []string{"Concurrency/Serialised"},
	},
	{name: "sharing is declared, but not said", features: Features{Shared: true}, fails: []string{"Concurrency/Declared"}},
	{name: "sharing is said, but not declared", concurrent: func(*concurrent) {}, fails: []string{"Concurrency/Declared"}},
	{
		name: "fenced updates wait for ever", hangs: true, features: concurrentFeatures,
		concurrent: func(c *concurrent) { c.stubborn = true },
		fails:      []string{"Ending/CancelledWhileWaiting"},
	},
	{
		name: "views are not read-only", store: func(b *broken) {
			b.view = func(ctx context.Context, fn func(projection.StateTx) error) error { return b.Store.Update(ctx, fn) }
		},
		fails: []string{"View/ReadOnly"},
	},
	{
		name: "views read what is committed now, not then", store: func(b *broken) {
			b.view = func(ctx context.Context, fn func(projection.StateTx) error) error {
				return b.Store.View(ctx, func(tx projection.StateTx) error {
					now := func(read func(projection.StateTx)) {
						_ = b.Store.View(ctx, func(tx projection.StateTx) error {
							read(tx)
							return nil
						})
					}
					return fn(&brokenTx{
						StateTx: tx,
						get: func(table, key string) (v []byte, ok bool, err error) {
							now(func(tx projection.StateTx) { v, ok, err = tx.Get(table, key) })
							return v, ok, err
						},
						scan: func(table string, r projection.Range) iter.Seq2[projection.Row, error] {
							return func(yield func(projection.Row, error) bool) {
								// Row by row, each as it is by then.
								last, more := "", true
								for more {
									more = false
									now(func(tx projection.StateTx) {
										for row, err := range tx.Scan(table, projection.Range{After: last, Limit: 1}) {
											last = row.Key
											more = yield(row, err)
										}
									})
								}
							}
						},
					})
				})
			}
		},
		fails: []string{"View/Snapshot", "View/NeverTorn"},
	},
	{
		name: "views see what is not committed", store: func(b *broken) {
			var mu sync.Mutex
			dirty := map[string][]byte{}
			b.tx = func(tx projection.StateTx) projection.StateTx {
				return &brokenTx{
					StateTx: tx,
					put: func(table, key string, value []byte) error {
						mu.Lock()
						dirty[table+key] = value
						mu.Unlock()
						return tx.Put(table, key, value)
					},
					get: func(table, key string) ([]byte, bool, error) {
						mu.Lock()
						defer mu.Unlock()
						v, ok := dirty[table+key]
						return v, ok, nil
					},
				}
			}
		},
		fails: []string{"View/CommittedOnly", "Update/ErrorLeavesNothing"},
	},
	{
		name: "keys ignore case", store: withTx(func(t *brokenTx) {
			t.put = func(table, key string, value []byte) error { return t.StateTx.Put(table, strings.ToLower(key), value) }
			t.get = func(table, key string) ([]byte, bool, error) { return t.StateTx.Get(table, strings.ToLower(key)) }
		}),
		fails: []string{"Rows/GetPutDelete", "Rows/ScanMatrix"},
	},
	{
		name: "keys end at a NUL byte", store: withTx(func(t *brokenTx) {
			until := func(key string) string {
				key, _, _ = strings.Cut(key, "\x00")
				return key
			}
			t.put = func(table, key string, value []byte) error { return t.StateTx.Put(table, until(key), value) }
			t.get = func(table, key string) ([]byte, bool, error) { return t.StateTx.Get(table, until(key)) }
		}),
		fails: []string{"Rows/GetPutDelete", "Rows/ScanMatrix"},
	},
	{
		name: "keys are made valid UTF-8", store: withTx(func(t *brokenTx) {
			t.put = func(table, key string, value []byte) error {
				return t.StateTx.Put(table, strings.ToValidUTF8(key, "?"), value)
			}
		}),
		fails: []string{"Rows/GetPutDelete", "Rows/ScanMatrix"},
	},
	{
		name: "empty values are missing", store: withTx(func(t *brokenTx) {
			t.get = func(table, key string) ([]byte, bool, error) {
				v, ok, err := t.StateTx.Get(table, key)
				return v, ok && len(v) > 0, err
			}
		}),
		fails: []string{"Rows/GetPutDelete"},
	},
	{
		name: "clearing a table clears those whose names it begins", store: withTx(func(t *brokenTx) {
			t.clear = func(table string) error { return errors.Join(t.StateTx.Clear(table), t.StateTx.Clear(table+table)) }
		}),
		fails: []string{"Rows/Clear"},
	},
	{
		name: "Clear does nothing", store: withTx(func(t *brokenTx) {
			t.clear = func(string) error { return nil }
		}),
		fails: []string{"Rows/Clear", "Update/ReadsItsOwnWrites"},
	},
	{
		name: "scans ignore the limit", store: withTx(func(t *brokenTx) {
			t.scan = func(table string, r projection.Range) iter.Seq2[projection.Row, error] {
				r.Limit = 0
				return t.StateTx.Scan(table, r)
			}
		}),
		fails: []string{"Rows/ScanMatrix"},
	},
	{
		name: "after is inclusive", store: scanned(func(r projection.Range, rows []projection.Row) []projection.Row {
			if r.After == "a" && !r.Backward && r.Limit == 0 && strings.HasPrefix("a", r.Prefix) {
				return append([]projection.Row{{Key: "a", Value: []byte("v")}}, rows...)
			}
			return rows
		}),
		fails: []string{"Rows/ScanMatrix"},
	},
	{
		name: "keys are ordered as a dictionary does", store: scanned(func(r projection.Range, rows []projection.Row) []projection.Row {
			slices.SortStableFunc(rows, func(a, b projection.Row) int {
				return strings.Compare(strings.ToLower(a.Key), strings.ToLower(b.Key))
			})
			return rows
		}),
		fails: []string{"Rows/ScanMatrix"},
	},
	{
		name: "a scan ends after a thousand rows", store: scanned(func(_ projection.Range, rows []projection.Row) []projection.Row {
			return rows[:min(1000, len(rows))]
		}),
		fails: []string{"Rows/ScanManyAndBreak"},
	},

	// Checkpoints and leases.
	{
		name: "checkpoints move from anywhere", store: withTx(func(t *brokenTx) {
			t.setCheckpoint = func(l projection.Lease, _, to projection.Checkpoint) error {
				is, err := t.Checkpoint(l.Name)
				if err != nil {
					return err
				}
				return t.StateTx.SetCheckpoint(l, is, to)
			}
		}),
		fails: []string{"Checkpoint/CompareAndSet"},
	},
	{
		name: "only the position is compared, not the log", store: withTx(func(t *brokenTx) {
			t.setCheckpoint = func(l projection.Lease, from, to projection.Checkpoint) error {
				is, err := t.Checkpoint(l.Name)
				if err != nil {
					return err
				}
				from.Log = is.Log
				return t.StateTx.SetCheckpoint(l, from, to)
			}
		}),
		fails: []string{"Checkpoint/CompareAndSet"},
	},
	{
		name: "the epoch is not checked", store: func(b *broken) {
			var current currentLeases
			current.follow(b)
			b.tx = func(tx projection.StateTx) projection.StateTx {
				return &brokenTx{
					StateTx: tx,
					setCheckpoint: func(l projection.Lease, from, to projection.Checkpoint) error {
						return tx.SetCheckpoint(current.of(l), from, to)
					},
					delCheckpoint: func(l projection.Lease) error { return tx.DeleteCheckpoint(current.of(l)) },
					fence:         func(l projection.Lease) error { return tx.Fence(current.of(l)) },
				}
			}
		},
		fails: []string{"Lease/PausedOwnerIsFenced", "Lease/EpochRises", "Lease/EndsByTime", "Checkpoint/Fence", "Checkpoint/Delete"},
	},
	{
		name: "the epoch is checked before the commit, not with it", store: func(b *broken) {
			// The fence is passed in a transaction of its own, and the writes follow
			// later in another one that takes no notice of leases.
			var current currentLeases
			current.follow(b)
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				var writes []func(projection.StateTx) error
				err := b.Store.View(ctx, func(tx projection.StateTx) error {
					return fn(&brokenTx{
						StateTx: tx,
						put: func(table, key string, value []byte) error {
							writes = append(writes, func(tx projection.StateTx) error { return tx.Put(table, key, value) })
							return nil
						},
						setCheckpoint: func(l projection.Lease, from, to projection.Checkpoint) error {
							if current.of(l).Epoch != l.Epoch {
								return projection.ErrFenced
							}
							writes = append(writes, func(tx projection.StateTx) error {
								is, _ := tx.Checkpoint(l.Name)
								return tx.SetCheckpoint(current.of(l), is, to)
							})
							return nil
						},
					})
				})
				if err != nil {
					return err
				}
				return b.Store.Update(ctx, func(tx projection.StateTx) error {
					for _, write := range writes {
						if err := write(tx); err != nil {
							return err
						}
					}
					return nil
				})
			}
		},
		fails: []string{"Lease/TakeoverDuringUpdate"},
	},
	{
		name: "acquiring one's own lease keeps its epoch", store: func(b *broken) {
			var mu sync.Mutex
			held := map[string]projection.Lease{}
			b.acquire = func(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
				mu.Lock()
				defer mu.Unlock()
				if l, ok := held[name]; ok && l.Owner == owner {
					return l, nil
				}
				l, err := b.Store.Acquire(ctx, name, owner, ttl)
				if err == nil {
					held[name] = l
				}
				return l, err
			}
		},
		fails: []string{"Lease/EpochRises", "Checkpoint/Fence", "Lease/Renew"},
	},
	{
		name: "anybody gets the lease", store: func(b *broken) {
			b.acquire = func(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
				l, err := b.Store.Acquire(ctx, name, "everybody", ttl)
				l.Owner = owner
				return l, err
			}
		},
		fails: []string{"Lease/HeldByOne", "Lease/RenewPreventsTakeover", "Lease/Release"},
	},
	{
		name: "leases never end", hangs: true, store: func(b *broken) {
			b.acquire = func(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
				l, err := b.Store.Acquire(ctx, name, owner, 0)
				l.Until = time.Now().Add(ttl)
				return l, err
			}
		},
		fails: []string{"Lease/EndsByTime", "Bubble/LeasesEndOnTheBubblesClock"},
	},
	{
		name: "leases end at once", store: func(b *broken) {
			b.acquire = func(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
				l, err := b.Store.Acquire(ctx, name, owner, time.Nanosecond)
				l.Until = time.Now().Add(ttl)
				return l, err
			}
		},
		fails: []string{"Lease/EndsByTime", "Lease/HeldByOne"},
	},
	{
		name: "Renew does nothing", store: func(b *broken) {
			b.renew = func(_ context.Context, l projection.Lease, ttl time.Duration) (projection.Lease, error) {
				l.Until = time.Now().Add(ttl)
				return l, nil
			}
		},
		fails: []string{"Lease/Renew", "Lease/RenewPreventsTakeover", "Lease/EndsByTime"},
	},
	{
		name: "anybody can release", store: func(b *broken) {
			var current currentLeases
			current.follow(b)
			b.release = func(ctx context.Context, l projection.Lease) error { return b.Store.Release(ctx, current.of(l)) }
		},
		fails: []string{"Lease/Release"},
	},
	{
		name: "Release does nothing", store: func(b *broken) {
			b.release = func(context.Context, projection.Lease) error { return nil }
		},
		fails: []string{"Lease/Release", "Lease/EpochRises"},
	},
	{
		name: "a fenced update commits if its function drops the error", store: func(b *broken) {
			var current currentLeases
			current.follow(b)
			b.tx = func(tx projection.StateTx) projection.StateTx {
				// What is said is right, but only said.
				check := func(l projection.Lease, then func() error) error {
					if l.Epoch != current.of(l).Epoch {
						return projection.ErrFenced
					}
					return then()
				}
				return &brokenTx{
					StateTx: tx,
					setCheckpoint: func(l projection.Lease, from, to projection.Checkpoint) error {
						return check(l, func() error {
							if is, _ := tx.Checkpoint(l.Name); is.Log != from.Log || is.Position != from.Position {
								return projection.ErrFenced
							}
							return tx.SetCheckpoint(l, from, to)
						})
					},
					delCheckpoint: func(l projection.Lease) error { return check(l, func() error { return tx.DeleteCheckpoint(l) }) },
					fence:         func(l projection.Lease) error { return check(l, func() error { return tx.Fence(l) }) },
				}
			}
		},
		fails: []string{"Update/FencedLeavesNothing"},
	},
	{
		name: "fenced owners can delete", store: withTx(func(t *brokenTx) {
			t.delCheckpoint = func(projection.Lease) error { return nil }
		}),
		fails: []string{"Checkpoint/Delete"},
	},

	// Listing.
	{
		name: "what has no checkpoint is not listed", store: func(b *broken) {
			b.listed = func(all []projection.NamedCheckpoint) []projection.NamedCheckpoint {
				return slices.DeleteFunc(all, func(c projection.NamedCheckpoint) bool { return c.Checkpoint.IsZero() })
			}
		},
		fails: []string{"Listing/NamesWithCheckpointOrLease"},
	},
	{
		name: "names are listed in no order", store: func(b *broken) {
			b.listed = func(all []projection.NamedCheckpoint) []projection.NamedCheckpoint {
				slices.Reverse(all)
				return all
			}
		},
		fails: []string{"Listing/NamesWithCheckpointOrLease"},
	},
	{
		name: "leases are listed as held whenever they were given", store: func(b *broken) {
			b.listed = func(all []projection.NamedCheckpoint) []projection.NamedCheckpoint {
				for i := range all {
					all[i].Held = true
				}
				return all
			}
		},
		fails: []string{"Listing/NamesWithCheckpointOrLease"},
	},
	{
		name: "leases that end by time are listed as not held", store: func(b *broken) {
			b.listed = func(all []projection.NamedCheckpoint) []projection.NamedCheckpoint {
				for i := range all {
					all[i].Held = all[i].Held && all[i].Lease.Until.IsZero()
				}
				return all
			}
		},
		fails: []string{"Listing/NamesWithCheckpointOrLease", "Listing/EndedByTime"},
	},

	// Features, reopening, ending.
	{name: "SQL is declared but missing", features: Features{SQL: true}, fails: []string{"SQL/Declared", "SQL/SameTransaction", "SQL/FailedStatement"}},
	{
		name: "SQL pretends to work", store: withTx(func(t *brokenTx) {
			t.exec = func(string) (int64, error) { return 0, nil }
		}),
		fails: []string{"SQL/Declared"},
	},
	{name: "reopening is declared but loses all", features: Features{Reopen: true, LeasesEndWithProcess: true, SQL: true}, fails: []string{"Rows/SurviveReopening", "Lease/AfterReopening", "SQL/SurvivesReopening"}},
	{name: "leases outlive the process", features: Features{Reopen: true, LeasesEndWithProcess: true}, store: keepAcross(nil), fails: []string{"Lease/AfterReopening"}},
	{
		name: "leases are forgotten by the process", features: Features{Reopen: true}, store: keepAcross(func(b *broken) {
			b.acquire = func(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
				return b.Store.Acquire(ctx, "another "+name, owner, ttl)
			}
		}),
		fails: []string{"Lease/AfterReopening"},
	},
	{
		name: "an ended context is not noticed", store: func(b *broken) {
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				return b.Store.Update(context.WithoutCancel(ctx), fn)
			}
		},
		fails: []string{"Ending/Cancelled"},
	},
	{
		name: "waiting updates do not give up", hangs: true, store: func(b *broken) {
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				if err := ctx.Err(); err != nil {
					return err
				}
				return b.Store.Update(context.WithoutCancel(ctx), func(tx projection.StateTx) error {
					if err := ctx.Err(); err != nil {
						return err
					}
					return fn(tx)
				})
			}
		},
		fails: []string{"Ending/CancelledWhileWaiting"},
	},
	{
		name: "updates try again and again", store: func(b *broken) {
			turn := make(chan struct{}, 1)
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				for {
					select {
					case turn <- struct{}{}:
						defer func() { <-turn }()
						return b.Store.Update(ctx, fn)
					case <-ctx.Done():
						return ctx.Err()
					default:
						time.Sleep(time.Millisecond)
					}
				}
			}
		},
		fails: []string{"Bubble/WaitsByChannelsAlone"},
	},
	{
		name: "a closed state says something else", store: func(b *broken) {
			b.update = func(ctx context.Context, fn func(projection.StateTx) error) error {
				err := b.Store.Update(ctx, fn)
				if errors.Is(err, eventstore.ErrClosed) {
					return errors.New("sql: database is closed")
				}
				return err
			}
		},
		fails: []string{"Ending/Closed"},
	},
}

// Every check can fail: for each there is a broken state that it notices.
func TestChecks_NoticeBrokenStates(t *testing.T) {
	t.Parallel()
	checks := map[string]check{}
	for _, g := range groups {
		for _, c := range g.checks {
			checks[g.name+"/"+c.name] = c
		}
	}
	proven := map[string]bool{}
	for _, x := range breakages {
		for _, name := range x.fails {
			proven[name] = true
		}
	}
	for name := range checks {
		require.True(t, proven[name], "no breakage shows that the check %q can fail", name)
	}
	for _, x := range breakages {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			for _, name := range x.fails {
				c, ok := checks[name]
				require.True(t, ok, "there is no check %q", name)
				s := x.suite()
				s.bubble = func(outer testing.TB, fn func(testing.TB)) {
					said := ""
					synctest.Test(t, func(t *testing.T) {
						said = metatest.Failure(t, fn)
						time.Sleep(time.Hour) // what is broken may need time to end
					})
					if said != "" {
						outer.Fatal(said)
					}
				}
				said := metatest.Failure(t, func(t testing.TB) { c.run(t, s) })
				require.NotEmpty(t, said, "a state in which %s passes %s", x.name, name)
				if !x.hangs {
					require.NotContains(t, said, "gave up", "%s must be noticed by what it does, not by patience", x.name)
					require.NotContains(t, said, context.DeadlineExceeded.Error(), "%s must be noticed by what it does, not by patience", x.name)
				}
				_, what, found := strings.Cut(said, "Messages:")
				if !found {
					_, what, _ = strings.Cut(said, "Error:")
				}
				t.Logf("%s: %s", name, strings.Join(strings.Fields(what), " "))
			}
		})
	}
}
