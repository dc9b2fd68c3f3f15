package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// workload is what several writers on several stores of one log do at once: a
// stream that all of them count up, streams of their own, commits of several
// streams, keys and names that all of them want.
type workload struct {
	stores  []*Store
	writers int // of each store
	commits int // of each writer
	seed    uint64
	audit   audit
	done    atomic.Int64 // commits that have been answered
	step    func(int64)  // called after each, from any goroutine
}

var hot = account("hot")

// run works to the end, or to the first answer that must not be.
func (w *workload) run(t testing.TB) {
	t.Helper()
	if w.seed == 0 {
		w.seed = rand.Uint64()
	}
	t.Logf("seed %d", w.seed)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var mu sync.Mutex
	var failed error
	together(len(w.stores)*w.writers, func(i int) {
		r := rand.New(rand.NewPCG(w.seed, uint64(i)))
		for n := range w.commits {
			if err := w.one(ctx, w.stores[i%len(w.stores)], r, i, n); err != nil && ctx.Err() == nil {
				mu.Lock()
				failed = errors.Join(failed, fmt.Errorf("writer %d, commit %d: %w", i, n, err))
				mu.Unlock()
				cancel()
				return
			}
			if done := w.done.Add(1); w.step != nil {
				w.step(done)
			}
		}
	})
	require.NoError(t, failed)
}

func (w *workload) one(ctx context.Context, s *Store, r *rand.Rand, i, n int) error {
	own := eventstore.Stream{Category: "own", ID: fmt.Sprint(i)}
	expected := at(own, uint64(n)) // nobody else writes it, so it never fails
	mine := event(own, "noted", "writer:"+fmt.Sprint(i))
	unexpected := func(err error) error {
		if errors.Is(err, eventstore.ErrConflict) {
			return nil
		}
		return err
	}
	if r.IntN(2) == 0 {
		// Count: no update is lost.
		for {
			head, err := w.head(ctx, s)
			if err != nil {
				return err
			}
			_, err = w.audit.append(ctx, s, under(commit(event(hot, fmt.Sprint("counted to ", head.Version+1), "hot")), eventstore.StreamAt(hot, head)))
			if err == nil {
				break
			}
			if !errors.Is(err, eventstore.ErrConflict) {
				return err
			}
		}
	}
	switch r.IntN(4) {
	case 0: // a key that each of the writers uses
		c := commit(event(eventstore.Stream{Category: "keyed", ID: fmt.Sprint(n)}, "noted"), event(account("shared"), "noted"))
		c.Key, c.Fingerprint = fmt.Sprint("key ", n), "the same"
		if _, err := w.audit.append(ctx, s, c); err != nil {
			return err
		}
	case 1: // a name that is to be used once
		name := "name:" + fmt.Sprint(n)
		c := under(commit(event(eventstore.Stream{Category: "user", ID: fmt.Sprint(i, " ", n)}, "registered", name)), eventstore.NoneMatch(eventstore.Tagged(name), 0))
		if _, err := w.audit.append(ctx, s, c); unexpected(err) != nil {
			return err
		}
	case 2: // decided on what was read
		head, err := s.Head(ctx)
		if err != nil {
			return err
		}
		q := eventstore.Match(eventstore.Item{Category: "seat", Types: []string{"taken"}, Tags: []string{"row:" + fmt.Sprint(n%3)}}, eventstore.Item{Stream: hot, Types: []string{"none"}})
		c := under(commit(event(eventstore.Stream{Category: "seat", ID: fmt.Sprint(i)}, "taken", "row:"+fmt.Sprint(n%3))), eventstore.NoneMatch(q, head))
		if r.IntN(2) == 0 { // and on a stream that it does not write
			read, err := w.head(ctx, s)
			if err != nil {
				return err
			}
			c = under(c, eventstore.StreamAt(hot, read))
		}
		if _, err := w.audit.append(ctx, s, c); unexpected(err) != nil {
			return err
		}
	}
	c := under(commit(event(account("shared"), "noted"), mine, event(eventstore.Stream{Category: "fresh", ID: fmt.Sprint(i, " ", n)}, "opened")),
		expected, at(eventstore.Stream{Category: "fresh", ID: fmt.Sprint(i, " ", n)}, 0))
	if r.IntN(3) == 0 {
		c.Key = fmt.Sprint("own ", i, " ", n)
	}
	_, err := w.audit.append(ctx, s, c)
	return err
}

// head is the revision of the hot stream.
func (w *workload) head(ctx context.Context, s *Store) (eventstore.Revision, error) {
	for e, err := range s.Read(ctx, eventstore.OneStream(hot), eventstore.ReadOptions{Backward: true, Limit: 1}) {
		return e.Revision(), err
	}
	return eventstore.Revision{}, nil
}

// check compares the answers with the log, and the log with what subscribers
// have seen.
func (w *workload) check(t testing.TB, url string, spies ...*spy) {
	t.Helper()
	conn := direct(t, url)
	w.audit.check(t, conn, "deed")
	log := recorded(t, conn, "deed")
	names := map[string]bool{}
	for _, e := range log {
		if e.Stream == hot {
			require.Equal(t, fmt.Sprint("counted to ", e.Version), e.Type, "an update was decided on what was not the last state")
		}
		if e.Type == "registered" {
			require.False(t, names[e.Tags[0]], "%s is used twice", e.Tags[0])
			names[e.Tags[0]] = true
		}
	}
	for _, s := range spies {
		s.at(eventstore.Position(len(log)))
	}
}
