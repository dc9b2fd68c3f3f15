package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
)

// book is a row that tells which event was the last in it, and which version has
// made it.
type book struct {
	Last eventstore.Position
	Made int
}

func books(version, parts int, fold func(r eventstore.Recorded)) *projection.ViewDefinition[book] {
	return projection.View("books", projection.OnMeta(func(b *book, _ paid, r eventstore.Recorded) {
		if fold != nil {
			fold(r)
		}
		b.Last, b.Made = r.Position, version
	})).Version(version).Partitioned(parts)
}

// engineOn runs projections on a store of its own.
func engineOn(t testing.TB, store *Store, state projection.State, projections ...projection.Projection) (engine *projection.Engine, stop func()) {
	t.Helper()
	engine = projection.NewEngine(store, state, projection.Options{Logger: slog.New(slog.DiscardHandler)})
	for _, p := range projections {
		require.NoError(t, engine.Add(p))
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for _, w := range engine.Workers() {
		all.Go(func() { _ = w.Run(ctx) })
	}
	stop = sync.OnceFunc(func() { cancel(); all.Wait() })
	t.Cleanup(stop)
	return engine, stop
}

func pays(t testing.TB, s *Store, id string) eventstore.Receipt {
	data, err := json.Marshal(paid{Owner: id})
	require.NoError(t, err)
	receipt, err := s.Append(context.Background(), eventstore.Commit{Events: []eventstore.Event{{Stream: account(id), Type: "paid", Data: data}}})
	require.NoError(t, err)
	return receipt
}

// bookReader reads all rows again and again, until it is stopped or a row is older than
// it was, or one read shows two versions.
type bookReader struct {
	stop func() error
	made [3]atomic.Bool
}

func reads(s *Store, view *projection.ViewDefinition[book]) *bookReader {
	r := &bookReader{}
	ended, done := make(chan struct{}), make(chan error, 1)
	go func() {
		last := map[string]book{}
		var err error
		for err == nil {
			now := map[string]book{}
			err = s.View(context.Background(), func(tx projection.StateTx) error {
				for e, err := range view.Rows(tx, projection.Range{}) {
					if err != nil {
						return err
					}
					now[e.Key] = e.Row
				}
				return nil
			})
			made := 0
			for key, b := range now {
				if made != 0 && made != b.Made {
					err = fmt.Errorf("a read of %q shows versions %d and %d", view.Name(), made, b.Made)
				}
				made = b.Made
				r.made[made].Store(true)
				if b.Last < last[key].Last {
					err = fmt.Errorf("a read of %q went back: %q was %+v and is %+v", view.Name(), key, last[key], b)
				}
			}
			if len(now) < len(last) {
				err = errors.Join(err, fmt.Errorf("a read of %q lost rows", view.Name()))
			}
			last = now
			select {
			case <-ended:
				done <- err
				return
			default:
			}
		}
		<-ended
		done <- err
	}()
	r.stop = func() error { close(ended); return <-done }
	return r
}

func active(t testing.TB, s projection.State) int {
	all, err := projection.NewAdmin(s, "test").Versions(context.Background(), "books")
	require.NoError(t, err)
	for _, v := range all {
		if v.Active {
			return v.Version
		}
	}
	return 0
}

// Old nodes run version 1 and a new one version 2, all on connections of their
// own, while others write and read: no read fails, none goes back.
func TestVersion_SwapsUnderTraffic(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	v1, v2 := books(1, 2, nil), books(2, 3, nil)
	writes := openURL(t, url)
	for i := range 300 {
		pays(t, writes, fmt.Sprintf("a%02d", i%20))
	}
	for range 2 {
		s := openURL(t, url)
		engineOn(t, s, s, v1)
	}
	var traffic sync.WaitGroup
	ended := make(chan struct{})
	for n := range uint64(2) {
		random := rand.New(rand.NewPCG(seed, n))
		traffic.Go(func() {
			for {
				select {
				case <-ended:
					return
				case <-time.After(time.Duration(random.IntN(3000)) * time.Microsecond):
				}
				pays(t, writes, fmt.Sprintf("a%02d", random.IntN(20)))
			}
		})
	}
	ones, twos := reads(openURL(t, url), v1), reads(openURL(t, url), v2)
	eventually(t, func() bool { return twos.made[1].Load() }, "version 1 is not read")
	fresh := openURL(t, url)
	engine, _ := engineOn(t, fresh, fresh, v2)
	eventually(t, func() bool { return active(t, fresh) == 2 }, "version 2 does not become active")
	tool := openURL(t, url)
	for _, version := range []int{1, 2, 1, 2} {
		require.NoError(t, projection.NewAdmin(tool, "ann").Activate(t.Context(), "books", version))
		receipt := pays(t, writes, "mine")
		ctx, cancel := context.WithTimeout(t.Context(), waiting)
		for there := false; !there; { // it may take a moment to be known here what is read
			require.NoError(t, engine.WaitFor(ctx, v2.Name(), receipt.Last))
			require.NoError(t, fresh.View(ctx, func(tx projection.StateTx) (err error) {
				if there, err = engine.Contains(tx, v2.Name(), receipt.Last); err != nil || !there {
					return err
				}
				b, _, err := v2.Row(tx, "mine")
				require.Equal(t, book{receipt.Last, version}, b)
				return err
			}))
		}
		cancel()
	}
	close(ended)
	traffic.Wait()
	require.NoError(t, ones.stop())
	require.NoError(t, twos.stop())
	require.True(t, twos.made[1].Load() && twos.made[2].Load())
	require.False(t, ones.made[2].Load())
	found, err := engine.Verify(t.Context(), v2.Name())
	require.NoError(t, err)
	require.True(t, found.Agrees(), found.String())
}

// slowSwap keeps the update that makes a version the active one open, once it has
// found that the version is not behind, before it commits.
type slowSwap struct {
	*Store
	once   sync.Once
	atSwap func()
}

func (s *slowSwap) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	return s.Store.Update(ctx, func(tx projection.StateTx) error {
		wrapped := &swapTx{stateTx: tx.(*stateTx)}
		err := fn(wrapped)
		if err == nil && wrapped.held {
			s.once.Do(s.atSwap)
		}
		return err
	})
}

type swapTx struct {
	*stateTx
	held bool
}

func (t *swapTx) HoldCheckpoint(name string) (projection.Checkpoint, error) {
	t.held = true
	return t.stateTx.HoldCheckpoint(name)
}

// Between finding that the new version is not behind and its becoming active, the
// old one could move on, and be read: what was read then would be gone. It is kept
// from that.
func TestVersion_HoldsWhatIsRead(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	gate, swapping := make(chan struct{}), atomic.Bool{}
	v1 := books(1, 1, nil)
	v2 := books(2, 1, func(eventstore.Recorded) {
		if swapping.Load() {
			<-gate // the new version does not come further meanwhile
		}
	})
	writes := openURL(t, url)
	pays(t, writes, "ann")
	old := openURL(t, url)
	oldEngine, _ := engineOn(t, old, old, v1)
	ctx, cancel := context.WithTimeout(t.Context(), waiting)
	defer cancel()
	require.NoError(t, oldEngine.WaitFor(ctx, "books", 1))
	twos := reads(openURL(t, url), v2)
	eventually(t, func() bool { return twos.made[1].Load() }, "version 1 is not read")

	reached := make(chan bool, 1)
	fresh := openURL(t, url)
	slow := &slowSwap{Store: fresh}
	slow.atSwap = func() {
		swapping.Store(true)
		receipt := pays(t, writes, "ann")
		// Without the hold this is there at once.
		limited, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		reached <- oldEngine.WaitFor(limited, "books", receipt.Last) == nil
	}
	_, stop := engineOn(t, fresh, slow, v2)
	eventually(t, func() bool { return active(t, old) == 2 }, "version 2 does not become active")
	eventually(t, func() bool { return twos.made[2].Load() }, "version 2 is not read")
	moved := <-reached
	close(gate)
	require.NoError(t, twos.stop())
	require.False(t, moved, "version 1 went on while it was replaced")
	stop()
}

// Tables of an SQL projection are switched by a row, in the update that activates
// the version: a snapshot shows the tables of the one version or of the other, and
// none that is older than one before.
func TestVersion_SQL(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	admin := direct(t, url)
	do(t, admin, "CREATE TABLE public.paid_version (n int); INSERT INTO public.paid_version VALUES (1)")
	for n := 1; n <= 2; n++ {
		do(t, admin, fmt.Sprintf("CREATE TABLE public.paid_%d (id text PRIMARY KEY, last bigint)", n))
	}
	do(t, admin, `CREATE VIEW public.paid_all AS SELECT 1 AS made, * FROM public.paid_1 WHERE (SELECT n FROM public.paid_version) = 1
		UNION ALL SELECT 2, * FROM public.paid_2 WHERE (SELECT n FROM public.paid_version) = 2`)
	paids := func(n int) *projection.SQLDefinition {
		return projection.SQL("books",
			projection.Activate(fmt.Sprintf("UPDATE public.paid_version SET n = %d", n)),
			projection.Reset(fmt.Sprintf("TRUNCATE public.paid_%d", n)),
			projection.OnSQL(func(ctx context.Context, tx projection.Tx, e paid, r eventstore.Recorded) error {
				_, err := tx.Exec(ctx, fmt.Sprintf("INSERT INTO public.paid_%d VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET last = excluded.last", n), r.Stream.ID, int64(r.Position))
				return err
			})).Version(n)
	}
	v1, v2 := paids(1), paids(2)
	writes, old, fresh := openURL(t, url), openURL(t, url), openURL(t, url)
	for i := range 200 {
		pays(t, writes, fmt.Sprintf("a%02d", i%20))
	}
	oldEngine, stopOld := engineOn(t, old, old, v1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*waiting)
	defer cancel()
	require.NoError(t, oldEngine.WaitFor(ctx, "books", 200))

	ended, done := make(chan struct{}), make(chan error, 2)
	random := rand.New(rand.NewPCG(seed, 9))
	go func() {
		for {
			select {
			case <-ended:
				done <- nil
				return
			case <-time.After(time.Duration(random.IntN(3000)) * time.Microsecond):
			}
			pays(t, writes, fmt.Sprintf("a%02d", random.IntN(20)))
		}
	}()
	go func() {
		last := map[string]int64{}
		for {
			err := writes.View(context.Background(), func(tx projection.StateTx) error {
				rows, err := tx.Query(context.Background(), "SELECT made, id, last FROM public.paid_all")
				if err != nil {
					return err
				}
				defer rows.Close()
				seen, made := 0, 0
				for rows.Next() {
					var id string
					var by int
					var at int64
					if err := rows.Scan(&by, &id, &at); err != nil {
						return err
					}
					if at < last[id] || made != 0 && by != made {
						return fmt.Errorf("%q was at %d, and is at %d by version %d, after one of version %d", id, last[id], at, by, made)
					}
					last[id], made = at, by
					seen++
				}
				if seen < len(last) {
					return fmt.Errorf("%d rows of %d", seen, len(last))
				}
				return rows.Err()
			})
			select {
			case <-ended:
				done <- err
				return
			default:
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	_, stopFresh := engineOn(t, fresh, fresh, v2)
	eventually(t, func() bool { return active(t, fresh) == 2 }, "version 2 does not become active")
	for _, version := range []int{1, 2, 1, 2} {
		require.NoError(t, projection.NewAdmin(writes, "ann").Activate(ctx, "books", version))
		require.Equal(t, version, scalar[int](t, admin, "SELECT n FROM public.paid_version"))
	}
	close(ended)
	require.NoError(t, errors.Join(<-done, <-done))
	stopOld()
	stopFresh()
	require.NoError(t, projection.NewAdmin(writes, "ann").DropVersion(ctx, "books", 1))
	require.Zero(t, scalar[int](t, admin, "SELECT count(*) FROM public.paid_1"))
	require.Equal(t, 20, scalar[int](t, admin, "SELECT count(*) FROM public.paid_all"))
}
