package nats

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/natsserver"
)

// chaosFor is how long writers write; a minute with DEED_TEST_LONG.
func chaosFor() time.Duration {
	if os.Getenv("DEED_TEST_LONG") != "" {
		return time.Minute
	}
	return 6 * time.Second
}

// The leader is killed and started again, then another node, and so on.
func TestChaos_NodesRestart(t *testing.T) {
	chaos(t, func(ctx context.Context, t *testing.T, c *natsserver.Cluster, name string) int {
		n := 0
		for ; ctx.Err() == nil; n++ {
			victim := c.Leader(name)
			if victim < 0 || n%3 == 2 {
				victim = n % c.Nodes()
			}
			c.Stop(victim)
			pause(ctx, time.Second)
			if err := c.Start(victim); err != nil {
				t.Error(err)
				return n
			}
			settle, cancel := context.WithTimeout(ctx, 20*time.Second)
			_ = c.Settled(settle, name)
			cancel()
			pause(ctx, 500*time.Millisecond)
		}
		return n
	})
}

// The leader is cut off from the others, which choose another one; its clients
// stay with it. Then it is let in again.
func TestChaos_NodeCutOff(t *testing.T) {
	chaos(t, func(ctx context.Context, t *testing.T, c *natsserver.Cluster, name string) int {
		n := 0
		for ; ctx.Err() == nil; n++ {
			victim := c.Leader(name)
			if victim < 0 || n%3 == 2 {
				victim = n % c.Nodes()
			}
			c.CutOff(victim)
			pause(ctx, 5*time.Second)
			c.Rejoin(victim)
			settle, cancel := context.WithTimeout(ctx, 20*time.Second)
			_ = c.Settled(settle, name)
			cancel()
			pause(ctx, 500*time.Millisecond)
		}
		return n
	})
}

// verdicts are what writers were told about their commits, by the ids of events.
type verdicts struct {
	mu                                               sync.Mutex
	acknowledged, unknown                            map[uuid.UUID]eventstore.Revision
	refused                                          map[uuid.UUID]error
	commits, conflicts, unknowns, unavailable, again int
}

func chaos(t *testing.T, harm func(context.Context, *testing.T, *natsserver.Cluster, string) int) {
	c, err := natsserver.Start(natsserver.Options{Nodes: 3, Directory: t.TempDir()})
	require.NoError(t, err)
	defer c.Close()
	name := newName()
	// As many processes as nodes: each begins with a node of its own.
	var stores []*Store
	for i := range 3 {
		s, err := Open(t.Context(), c.NodeURL(i)+","+c.URL(), Stream(name), Replicas(3), quiet(), Patience(10*time.Second), hooked(func(s *settings) { s.attempt = time.Second }))
		require.NoError(t, err)
		defer func() { _ = s.Close() }()
		stores = append(stores, s)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	writing, stopWriting := context.WithCancel(t.Context())
	defer stopWriting()
	following, stopFollowing := context.WithCancel(t.Context())
	defer stopFollowing()
	followers := []*listener{
		listen(following, stores[0], eventstore.All()), listen(following, stores[1], eventstore.All()),
		listen(following, stores[2], eventstore.OneCategory("own")), listen(following, stores[0], eventstore.OfTypes("shared.happened")),
	}
	v := &verdicts{acknowledged: map[uuid.UUID]eventstore.Revision{}, unknown: map[uuid.UUID]eventstore.Revision{}, refused: map[uuid.UUID]error{}}
	var writers sync.WaitGroup
	for w := range 64 {
		r := rand.New(rand.NewPCG(seed, uint64(w)))
		writers.Go(func() { write(writing, stores[w%3], w, r, v) })
	}
	require.Eventually(t, func() bool {
		v.mu.Lock()
		defer v.mu.Unlock()
		return v.commits >= 64
	}, time.Minute, 10*time.Millisecond, "nobody writes")
	harming, stopHarming := context.WithTimeout(t.Context(), chaosFor())
	defer stopHarming()
	harms := harm(harming, t, c, name)
	stopWriting()
	writers.Wait()
	for i := range 3 {
		c.Rejoin(i)
		require.NoError(t, c.Start(i))
	}
	settle, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	require.NoError(t, c.Settled(settle, name))

	// One more commit ends what the followers wait for.
	last, err := stores[0].Append(settle, eventstore.Commit{Events: happened(account("last"), 1)})
	require.NoError(t, err)
	for i, s := range stores {
		t.Logf("as process %d reads it", i)
		v.check(t, read(t, s, eventstore.All(), eventstore.ReadOptions{}), last)
	}
	all := read(t, stores[0], eventstore.All(), eventstore.ReadOptions{})
	for _, f := range followers {
		f.until(t, settle, last.Last, all)
	}
	written := 0
	for id := range v.unknown {
		for _, r := range all {
			if r.ID == id {
				written++
			}
		}
	}
	t.Logf("%d harms; %d events stored; %d commits acknowledged, %d conflicts, %d unavailable (none written), %d unknown, of whose %d events %d are written; %d keyed commits settled by trying again",
		harms, len(all), v.commits, v.conflicts, v.unavailable, v.unknowns, len(v.unknown), written, v.again)
	require.Positive(t, harms)
	require.Positive(t, v.commits)
}

// write appends to streams of its own and to shared ones until ctx ends.
func write(ctx context.Context, s *Store, w int, r *rand.Rand, v *verdicts) {
	own := eventstore.Stream{Category: "own", ID: fmt.Sprint(w)}
	var at eventstore.Revision
	lost := false // it is not known where the own stream is
	for n := 0; ctx.Err() == nil; n++ {
		if lost {
			for e, err := range s.Read(ctx, eventstore.OneStream(own), eventstore.ReadOptions{Backward: true, Limit: 1}) {
				if err == nil {
					at, lost = e.Revision(), false
				}
			}
			if lost && at.Version > 0 {
				continue
			}
			lost = false
		}
		c := eventstore.Commit{Conditions: []eventstore.Condition{eventstore.StreamAt(own, at)}}
		add := func(of eventstore.Stream, eventType string) {
			c.Events = append(c.Events, eventstore.Event{ID: uuid.Must(uuid.NewV7()), Stream: of, Type: eventType, Data: fmt.Appendf(nil, `{"W":%d,"N":%d}`, w, n)})
		}
		add(own, "own.happened")
		switch r.IntN(8) {
		case 0:
			add(own, "own.happened")
			add(own, "own.happened")
		case 1:
			add(eventstore.Stream{Category: "shared", ID: fmt.Sprint(r.IntN(8))}, "shared.happened")
		case 2:
			c.Key = fmt.Sprintf("%d.%d", w, n)
		}
		receipt, err := s.Append(ctx, c)
		if c.Key != "" && errors.Is(err, eventstore.ErrOutcomeUnknown) && ctx.Err() == nil {
			if again, e := s.Append(ctx, c); e == nil {
				receipt, err = again, nil
				v.mu.Lock()
				v.again++
				v.mu.Unlock()
			}
		}
		v.note(c, receipt, err)
		switch {
		case err == nil:
			at = receipt.Revision(own)
		case errors.Is(err, eventstore.ErrUnavailable) && !errors.Is(err, eventstore.ErrOutcomeUnknown):
		default:
			lost = true
		}
	}
}

func (v *verdicts) note(c eventstore.Commit, r eventstore.Receipt, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var to map[uuid.UUID]eventstore.Revision
	switch {
	case err == nil:
		v.commits++
		to = v.acknowledged
	case errors.Is(err, eventstore.ErrOutcomeUnknown):
		v.unknowns++
		to = v.unknown
	case errors.Is(err, eventstore.ErrConflict):
		v.conflicts++
	case errors.Is(err, eventstore.ErrUnavailable), errors.Is(err, context.Canceled):
		v.unavailable++
	}
	for _, e := range c.Events {
		if to == nil {
			v.refused[e.ID] = err
		} else {
			to[e.ID] = r.Revision(e.Stream)
		}
	}
}

// check compares the log with what writers were told.
// Behind the last commit there may be some of unknown outcome, which came late.
func (v *verdicts) check(t *testing.T, all []eventstore.Recorded, last eventstore.Receipt) {
	t.Helper()
	versions, seen := map[eventstore.Stream]uint64{}, map[uuid.UUID]bool{}
	position := eventstore.Position(0)
	for _, r := range all {
		require.Greater(t, r.Position, position)
		position = r.Position
		versions[r.Stream]++
		require.Equal(t, versions[r.Stream], r.Version, "versions of %s", r.Stream)
		require.False(t, seen[r.ID], "event %s is there twice", r.ID)
		seen[r.ID] = true
		if r.Position == last.Last {
			require.Equal(t, account("last"), r.Stream)
			continue
		}
		told, refused := v.refused[r.ID]
		require.False(t, refused, "event %s of stream %s, version %d, position %d, is there, but its writer was told that it was not written: %v", r.ID, r.Stream, r.Version, r.Position, told)
		_, acknowledged := v.acknowledged[r.ID]
		_, unknown := v.unknown[r.ID]
		require.True(t, acknowledged || unknown, "event %s of stream %s at %d was written by nobody", r.ID, r.Stream, r.Position)
	}
	for id, at := range v.acknowledged {
		if !seen[id] {
			instead := slices.IndexFunc(all, func(r eventstore.Recorded) bool { return r.Position >= at.Position })
			require.Fail(t, "event was acknowledged and is not there", "%s, acknowledged as version %d at position %d; read up to %d, last commit at %d; there: %+v", id, at.Version, at.Position, position, last.Last, all[max(instead, 0)])
		}
	}
}

// listener collects what a subscription yields.
type listener struct {
	query   eventstore.Query
	mu      sync.Mutex
	events  []eventstore.Recorded
	through eventstore.Position
	err     error
	done    chan struct{}
	stop    context.CancelFunc
}

func listen(ctx context.Context, s *Store, q eventstore.Query) *listener {
	ctx, stop := context.WithCancel(ctx)
	l := &listener{query: q, done: make(chan struct{}), stop: stop}
	go func() {
		defer close(l.done)
		for b, err := range s.Subscribe(ctx, q, 0) {
			l.mu.Lock()
			if err != nil {
				l.err = err
			} else {
				l.events = append(l.events, b.Events...)
				l.through = b.Through
			}
			l.mu.Unlock()
		}
	}()
	return l
}

// until waits for the subscription to get to the position, and compares it with
// the log up to there: it may have got further, or the log may have.
func (l *listener) until(t *testing.T, ctx context.Context, p eventstore.Position, all []eventstore.Recorded) {
	t.Helper()
	for reached := false; !reached; {
		l.mu.Lock()
		reached = l.through >= p
		l.mu.Unlock()
		select {
		case <-l.done:
			require.NoError(t, l.err, "a subscription ended")
		case <-ctx.Done():
			require.NoError(t, ctx.Err(), "a subscription is at %d, not at %d", l.through, p)
		case <-time.After(10 * time.Millisecond):
		}
	}
	l.stop()
	<-l.done
	require.ErrorIs(t, l.err, context.Canceled)
	var want []uuid.UUID
	for i := range all {
		if all[i].Position <= p && l.query.Matches(&all[i]) {
			want = append(want, all[i].ID)
		}
	}
	l.events = slices.DeleteFunc(l.events, func(r eventstore.Recorded) bool { return r.Position > p })
	require.Len(t, l.events, len(want), "a subscription skipped or repeated events")
	for i, r := range l.events {
		require.Equal(t, want[i], r.ID, "a subscription skipped or repeated events")
	}
}
