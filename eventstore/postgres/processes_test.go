package postgres

import (
	"context"
	"errors"
	"iter"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/pgtest"
)

// Several processes write to one log, which each of them follows.
func TestStore_Processes(t *testing.T) {
	t.Parallel()
	modes := map[string][]Option{"default": nil, "copy": {always(formCopy)}, "function": {always(formFunction)}, "two_trips": {always(formTwoTrips)}, "no tail": {Tail(1, 1)}}
	for name, options := range modes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			w := &workload{writers: 6, commits: pick(60, 12)}
			var spies []*spy
			for range 3 {
				s := openURL(t, url, options...)
				w.stores = append(w.stores, s)
				spies = append(spies, watch(t, s))
			}
			w.run(t)
			w.check(t, url, spies...)
			stats := w.stores[0].Stats()
			require.NotZero(t, stats.Commits)
			t.Logf("%+v", stats)
		})
	}
}

// spread is one store that is several: each call goes to the next process. The
// contract does not notice.
type spread struct {
	stores []*Store
	next   atomic.Uint64
}

func (s *spread) any() *Store { return s.stores[s.next.Add(1)%uint64(len(s.stores))] }

func (s *spread) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	return s.any().Append(ctx, c)
}

func (s *spread) Lookup(ctx context.Context, stream eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	return s.any().Lookup(ctx, stream, key)
}

func (s *spread) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	return s.any().Read(ctx, q, o)
}

func (s *spread) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return s.any().Subscribe(ctx, q, after)
}

func (s *spread) Head(ctx context.Context) (eventstore.Position, error) { return s.any().Head(ctx) }

func (s *spread) LogID(ctx context.Context) (string, error) { return s.any().LogID(ctx) }

func (s *spread) Close() error {
	var failed error
	for _, one := range s.stores {
		failed = errors.Join(failed, one.Close())
	}
	return failed
}

// The whole contract holds when three processes share the calls: what one has
// acknowledged all others see, in every order that a single process has. Only
// commits that are handed over without waiting have no order between processes.
func TestStore_SpreadOverProcesses(t *testing.T) {
	t.Parallel()
	f := features()
	f.Enqueue = false
	storetest.Run(t, func(t testing.TB) storetest.Opener {
		url := pgtest.Database(t)
		return func() (storetest.Store, error) {
			s := &spread{}
			for range 3 {
				one, err := Open(t.Context(), url)
				if err != nil {
					return nil, errors.Join(err, s.Close())
				}
				s.stores = append(s.stores, one)
			}
			return s, nil
		}
	}, f)
}
