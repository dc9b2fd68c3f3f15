package logreader_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/logreader"
)

func event(category, id, eventType string, tags ...string) eventstore.Event {
	return eventstore.Event{Stream: eventstore.Stream{Category: category, ID: id}, Type: eventType, Tags: tags, Data: []byte(`{"n":1}`)}
}

func put(t testing.TB, s eventstore.Store, events ...eventstore.Event) eventstore.Position {
	t.Helper()
	r, err := s.Append(context.Background(), eventstore.Commit{Events: events})
	require.NoError(t, err)
	return r.Last
}

// fill appends n events of the type, in commits of a hundred.
func fill(t testing.TB, s eventstore.Store, n int, eventType string) (head eventstore.Position) {
	t.Helper()
	for some := range slices.Chunk(slices.Repeat([]eventstore.Event{event("account", "ann", eventType)}, n), 100) {
		head = put(t, s, some...)
	}
	return head
}

// spy is a store that tells how it is read, and can be made to hold or fail.
type spy struct {
	eventstore.Store

	open    atomic.Int64 // subscriptions
	begun   atomic.Int64
	yielded atomic.Int64 // events

	mu      sync.Mutex
	queries []eventstore.Query
	// before is called before a subscription yields; its error ends that.
	before func(ctx context.Context, n int64, q eventstore.Query, b *eventstore.Batch) error
	// ended is called when a subscription has ended, before it returns.
	ended func(n int64)
}

func (s *spy) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		n := s.begun.Add(1)
		s.open.Add(1)
		defer s.open.Add(-1)
		s.mu.Lock()
		s.queries = append(s.queries, q)
		before, ended := s.before, s.ended
		s.mu.Unlock()
		if ended != nil {
			defer ended(n)
		}
		for b, err := range s.Store.Subscribe(ctx, q, after) {
			if err == nil && before != nil {
				err = before(ctx, n, q, &b)
			}
			s.yielded.Add(int64(len(b.Events)))
			if !yield(b, err) || err != nil {
				return
			}
		}
	}
}

func (s *spy) asked() []eventstore.Query {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.queries)
}

// receiver is a subscriber that takes a batch when it is told to.
type receiver struct {
	t       testing.TB
	query   eventstore.Query
	after   eventstore.Position
	through eventstore.Position
	batches int
	caught  bool
	got     []eventstore.Recorded
	next    func() (eventstore.Batch, error, bool)
	stop    func()
	cancel  context.CancelFunc
}

func receive(t testing.TB, r *logreader.Reader, q eventstore.Query, after eventstore.Position) *receiver {
	ctx, cancel := context.WithCancel(context.Background())
	next, stop := iter.Pull2(r.Subscribe(ctx, q, after))
	e := &receiver{t: t, query: q, after: after, through: after, next: next, stop: stop, cancel: cancel}
	t.Cleanup(e.leave)
	return e
}

func (e *receiver) leave() { e.cancel(); e.stop() }

// take takes a batch and checks it by the rules of all batches.
func (e *receiver) take() error {
	e.t.Helper()
	b, err, ok := e.next()
	require.True(e.t, ok, "the subscription ended without an error")
	if err != nil {
		return err
	}
	require.True(e.t, b.Through > e.through || e.batches == 0 && b.Through == e.through, "Through went from %d to %d", e.through, b.Through)
	last := e.through
	for i := range b.Events {
		require.Greater(e.t, b.Events[i].Position, last, "twice or out of order")
		require.LessOrEqual(e.t, b.Events[i].Position, b.Through)
		last = b.Events[i].Position
	}
	e.got = append(e.got, b.Events...)
	e.through, e.caught = b.Through, b.CaughtUp
	e.batches++
	return nil
}

func (e *receiver) until(p eventstore.Position) {
	e.t.Helper()
	for e.through < p {
		require.NoError(e.t, e.take())
	}
}

// complete compares what came with what the store says.
func (e *receiver) complete(s eventstore.Store) {
	e.t.Helper()
	var want []eventstore.Recorded
	if e.through > e.after {
		for r, err := range s.Read(context.Background(), eventstore.All(), eventstore.ReadOptions{After: e.after, Through: e.through}) {
			require.NoError(e.t, err)
			if e.query.Matches(&r) {
				want = append(want, r)
			}
		}
	}
	require.Equal(e.t, len(want), len(e.got), "events after %d through %d of %+v", e.after, e.through, e.query)
	for i := range want {
		require.Equal(e.t, want[i], e.got[i])
	}
}

// Subscribers from the same place are served by one subscription, which asks the
// store for what they want and no more.
func TestReader_ReadsOnce(t *testing.T) {
	store := &spy{Store: memory.New()}
	const n = 5000
	for range n / 100 {
		for _, eventType := range []string{"a", "b", "unwanted"} {
			fill(t, store, 100, eventType)
		}
	}
	r := logreader.New(store, logreader.Options{})
	var all []*receiver
	for i := range 10 {
		all = append(all, receive(t, r, eventstore.OfTypes([]string{"a", "b"}[i%2]), 0))
	}
	for i := 0; i < 3*n/100; i++ {
		for _, e := range all {
			if e.through < 3*n {
				require.NoError(t, e.take())
			}
		}
	}
	for _, e := range all {
		e.until(3 * n)
		e.complete(store)
		require.Len(t, e.got, n)
		require.True(t, e.caught)
	}
	require.Equal(t, 1, logreader.Groups(r))
	queries := store.asked()
	require.Equal(t, eventstore.OfTypes("a", "b"), queries[len(queries)-1])
	// The second one made the first begin again.
	require.Less(t, store.yielded.Load(), int64(2*n+4*pageOfStore), "each event is read once, but for those with which the second subscriber found the first")
	for _, e := range all {
		e.leave()
	}
	require.Zero(t, store.open.Load())
	require.Zero(t, logreader.Groups(r))
}

const pageOfStore = 512

// One that does not come back does not hold the others, and costs no memory;
// it goes on by itself, and is one of them again once it has caught up.
func TestReader_SlowSubscriber(t *testing.T) {
	store := &spy{Store: memory.New()}
	r := logreader.New(store, logreader.Options{Events: 1000})
	head := fill(t, store, 600, "a")
	slow, fast := receive(t, r, eventstore.All(), 0), receive(t, r, eventstore.OfTypes("a"), 0)
	require.NoError(t, slow.take())
	fast.until(head)
	for range 10 {
		head = fill(t, store, 1000, "a")
		fast.until(head)
		require.LessOrEqual(t, logreader.Kept(r), 1000+2*pageOfStore+10)
	}
	before := store.yielded.Load()
	slow.until(head)
	require.Greater(t, store.yielded.Load(), before, "what is beyond the window is read again")
	slow.complete(store)
	head = fill(t, store, 1, "a")
	slow.until(head)
	fast.until(head)
	head = fill(t, store, 1, "a")
	slow.until(head)
	fast.until(head)
	require.Equal(t, 1, logreader.Groups(r), "they share again")
	slow.complete(store)
	fast.complete(store)
}

// The union is widened while the log grows under it, again and again, by
// subscribers that are a little behind, at the head, or beyond it.
func TestReader_JoinsWhileTheUnionChanges(t *testing.T) {
	store := &spy{Store: memory.New()}
	r := logreader.New(store, logreader.Options{})
	fill(t, store, 700, "a")
	var all []*receiver
	for i := range 12 {
		fill(t, store, 30, fmt.Sprint("type", i))
		head := fill(t, store, 30, "a")
		after := []eventstore.Position{head - 45, head, head - 10, head + 7}[i%4]
		all = append(all, receive(t, r, eventstore.OfTypes("a", fmt.Sprint("type", i)), after))
		for k, e := range all {
			// Some take what there is, the others find the group closed later.
			for e.through+1 < head && k%3 != i%3 {
				require.NoError(t, e.take())
			}
		}
	}
	for i := range 12 {
		fill(t, store, 5, fmt.Sprint("type", i))
	}
	head := fill(t, store, 1, "a")
	for _, e := range all {
		e.until(head)
		e.complete(store)
	}
	head = fill(t, store, 1, "a")
	for range 2 {
		for _, e := range all {
			e.until(head)
		}
		head = fill(t, store, 1, "a")
	}
	require.Equal(t, 1, logreader.Groups(r))
	// Those who leave make it narrower, with the next event.
	for _, e := range all[1:] {
		e.leave()
	}
	all[0].until(head)
	head = fill(t, store, 1, "a")
	all[0].until(head)
	head = fill(t, store, 1, "a")
	all[0].until(head)
	all[0].complete(store)
	queries := store.asked()
	require.Equal(t, eventstore.OfTypes("a", "type0"), queries[len(queries)-1])
}

// A subscriber that comes after an append is not told that it has caught up by
// what was read before.
func TestReader_CaughtUpIsNotStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := memory.New()
		var hold atomic.Bool
		released := make(chan struct{})
		store := &spy{Store: inner}
		store.before = func(ctx context.Context, _ int64, _ eventstore.Query, _ *eventstore.Batch) error {
			if hold.Load() {
				<-released
			}
			return nil
		}
		head := fill(t, store, 10, "a")
		r := logreader.New(store, logreader.Options{})
		first := receive(t, r, eventstore.All(), 0)
		first.until(head)
		require.True(t, first.caught)
		hold.Store(true) // the group does not learn of what comes
		fill(t, store, 1, "a")
		for _, after := range []eventstore.Position{0, 5, head} {
			late := receive(t, r, eventstore.All(), after)
			if after < head {
				require.NoError(t, late.take())
				require.Equal(t, head, late.through)
				require.False(t, late.caught, "the log had grown before it came")
				continue
			}
			taken := make(chan error, 1)
			go func() { taken <- late.take() }()
			synctest.Wait()
			require.Empty(t, taken, "nothing is known of what follows")
			close(released)
			require.NoError(t, <-taken)
			require.Equal(t, head+1, late.through)
			require.True(t, late.caught)
		}
		// Without any news the head is confirmed.
		again := receive(t, r, eventstore.All(), head+1)
		require.NoError(t, again.take())
		require.True(t, again.caught)
		require.Equal(t, head+1, again.through)
		first.leave()
		again.leave()
	})
}

var errBroken = errors.New("broken")

// Whoever shares a subscription that fails is told, once, behind what was read
// before; whoever comes anew begins anew.
func TestReader_Errors(t *testing.T) {
	store := &spy{Store: memory.New()}
	var fail atomic.Bool
	store.before = func(context.Context, int64, eventstore.Query, *eventstore.Batch) error {
		if fail.Load() {
			return errBroken
		}
		return nil
	}
	head := fill(t, store, 100, "a")
	r := logreader.New(store, logreader.Options{})
	var all []*receiver
	for i := range 4 {
		all = append(all, receive(t, r, eventstore.OfTypes("a", fmt.Sprint(i)), 0))
	}
	for _, e := range all[:3] {
		e.until(head)
	}
	fail.Store(true)
	fill(t, store, 1, "a")
	for _, e := range all {
		for {
			err := e.take()
			if err != nil {
				require.ErrorIs(t, err, errBroken)
				break
			}
		}
		_, _, more := e.next()
		require.False(t, more, "after the error nothing more is yielded")
		e.complete(store)
	}
	require.Zero(t, logreader.Groups(r))
	require.Zero(t, store.open.Load())
	fail.Store(false)
	for _, e := range all {
		again := receive(t, r, e.query, e.through)
		again.until(head + 1)
		again.complete(store)
	}
}

// A group is closed while its subscription is held in the store: its members go
// on, and leave, without waiting for what comes of it, and nothing of that reaches
// them twice. Whoever is last to leave waits until it has ended.
func TestReader_HandOver(t *testing.T) {
	for _, what := range []string{"goes on", "is cancelled", "fails"} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &spy{Store: memory.New()}
				release := make(chan struct{})
				var hold, fail atomic.Bool
				store.before = func(_ context.Context, n int64, _ eventstore.Query, _ *eventstore.Batch) error {
					if n == 1 && hold.Load() {
						<-release // whatever becomes of its context
					}
					if n == 1 && hold.Load() && fail.Load() {
						return errBroken
					}
					return nil
				}
				r := logreader.New(store, logreader.Options{})
				head := fill(t, store, 20, "a")
				one, two := receive(t, r, eventstore.OfTypes("a"), 0), receive(t, r, eventstore.OfTypes("a"), 0)
				one.until(head)
				two.until(head)
				seen := len(two.got)
				hold.Store(true)
				fail.Store(what == "fails")
				head = fill(t, store, 20, "a") // the first subscription has it, and does not yield
				synctest.Wait()

				wider := receive(t, r, eventstore.OfTypes("a", "b"), 10)
				require.NoError(t, wider.take())
				require.EqualValues(t, 2, store.begun.Load())
				one.until(head)
				left := make(chan struct{})
				if what == "is cancelled" {
					go func() { two.leave(); close(left) }()
					synctest.Wait()
				} else {
					two.until(head)
				}
				wider.until(head)
				require.EqualValues(t, 2, store.open.Load(), "the one that is held")
				close(release)
				synctest.Wait()
				require.EqualValues(t, 1, store.open.Load())
				head = put(t, store, event("account", "ann", "a"), event("account", "ann", "b"))
				for _, e := range []*receiver{one, two, wider} {
					if e == two && what == "is cancelled" {
						<-left
						require.Len(t, e.got, seen)
						continue
					}
					e.until(head)
					e.complete(store)
				}
				require.EqualValues(t, 2, store.begun.Load())
				one.leave()
				two.leave()
				wider.leave()
				require.Zero(t, store.open.Load())
			})
		})
	}
}

// The last subscriber leaves, and waits for the store to let go, while another
// one comes: that one gets a subscription of its own.
func TestReader_LastLeavesWhileOneJoins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &spy{Store: memory.New()}
		letGo := make(chan struct{})
		store.ended = func(n int64) {
			if n == 1 {
				<-letGo
			}
		}
		r := logreader.New(store, logreader.Options{})
		head := fill(t, store, 20, "a")
		first := receive(t, r, eventstore.All(), 0)
		first.until(head)
		left := make(chan struct{})
		go func() { first.leave(); close(left) }()
		synctest.Wait()
		select {
		case <-left:
			require.Fail(t, "it did not wait for the subscription that it owns")
		default:
		}
		second := receive(t, r, eventstore.All(), 7)
		second.until(head)
		head = fill(t, store, 3, "a")
		second.until(head)
		second.complete(store)
		close(letGo)
		<-left
		head = fill(t, store, 3, "a")
		second.until(head)
		second.complete(store)
		second.leave()
		require.Zero(t, store.open.Load())
	})
}

// A subscriber that waits ends with its context alone; the others stay.
func TestReader_CancelWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &spy{Store: memory.New()}
		r := logreader.New(store, logreader.Options{})
		head := fill(t, store, 5, "a")
		one, two := receive(t, r, eventstore.All(), 0), receive(t, r, eventstore.All(), 0)
		one.until(head)
		two.until(head)
		failed := make(chan error, 1)
		go func() { failed <- one.take() }()
		synctest.Wait()
		one.cancel()
		require.ErrorIs(t, <-failed, context.Canceled)
		one.leave()
		head = fill(t, store, 5, "a")
		two.until(head)
		two.complete(store)
		two.leave()
		require.Zero(t, store.open.Load())
	})
}

// A store that takes single kinds of query only is asked for each by itself.
func TestReader_UnionsAreRefused(t *testing.T) {
	store := &spy{Store: memory.New()}
	store.before = func(_ context.Context, _ int64, q eventstore.Query, _ *eventstore.Batch) error {
		if len(q.Items) > 1 || q.Everything {
			return fmt.Errorf("several items: %w", errors.ErrUnsupported)
		}
		return nil
	}
	r := logreader.New(store, logreader.Options{})
	head := fill(t, store, 100, "a")
	var all []*receiver
	for range 2 {
		all = append(all, receive(t, r, eventstore.OfTypes("a"), 0), receive(t, r, eventstore.OneCategory("account"), 0), receive(t, r, eventstore.Tagged("t"), 0))
	}
	for _, e := range all {
		e.until(head)
		e.complete(store)
	}
	head = fill(t, store, 100, "a")
	for _, e := range all {
		e.until(head)
		e.complete(store)
	}
	require.Equal(t, 3, logreader.Groups(r), "equal queries share nevertheless")
	unsupported := receive(t, r, eventstore.All(), 0)
	require.ErrorIs(t, unsupported.take(), errors.ErrUnsupported, "its own query is refused as the store does it")
}

// anyQuery draws a query.
func anyQuery(random *rand.Rand) eventstore.Query {
	if random.IntN(12) == 0 {
		return eventstore.All()
	}
	types := func() (some []string) {
		for range 1 + random.IntN(3) {
			some = append(some, fmt.Sprint("type", random.IntN(8)))
		}
		return some
	}
	var items []eventstore.Item
	for range 1 + random.IntN(2)*random.IntN(3) {
		var item eventstore.Item
		switch random.IntN(8) {
		case 0:
			item.Category = fmt.Sprint("category", random.IntN(3))
		case 1:
			item.Stream = eventstore.Stream{Category: fmt.Sprint("category", random.IntN(3)), ID: fmt.Sprint(random.IntN(4))}
		case 2:
			item.Tags = []string{fmt.Sprint("tag", random.IntN(3))}
		case 3:
			from := random.IntN(1000)
			item.Slices = eventstore.SliceRange{From: uint16(from), To: uint16(from + 1 + random.IntN(1024-from))}
		case 4:
			item.Category, item.Types = fmt.Sprint("category", random.IntN(3)), types()
		case 5:
			item.Types, item.Tags = types(), []string{"tag0", fmt.Sprint("tag", random.IntN(3))}
		default:
			item.Types = types()
		}
		items = append(items, item)
	}
	return eventstore.Match(items...)
}

func anyEvent(random *rand.Rand) eventstore.Event {
	e := event(fmt.Sprint("category", random.IntN(3)), fmt.Sprint(random.IntN(4)), fmt.Sprint("type", random.IntN(8)))
	for i := range 3 {
		if random.IntN(3) == 0 {
			e.Tags = append(e.Tags, fmt.Sprint("tag", i))
		}
	}
	return e
}

// What is known of queries is what Query.Matches says, and unions are unions.
func TestQueries(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	var events []eventstore.Recorded
	for i := range 300 {
		e := anyEvent(random)
		events = append(events, eventstore.Recorded{Position: eventstore.Position(i + 1), Stream: e.Stream, Type: e.Type, Tags: e.Tags})
	}
	known := 0
	for range 3000 {
		a, b := anyQuery(random), anyQuery(random)
		covered := logreader.Covers(a, b)
		all, ok := logreader.Union([]eventstore.Query{a, b})
		require.True(t, ok)
		require.True(t, logreader.Covers(all, a) && logreader.Covers(all, b), "%+v of %+v and %+v", all, a, b)
		f := logreader.NewFilter(a)
		for i := range events {
			e := &events[i]
			require.Equal(t, a.Matches(e), f.Selects(e), "%+v: %+v", a, e)
			require.Equal(t, a.Matches(e) || b.Matches(e), all.Matches(e), "union %+v of %+v and %+v: %+v", all, a, b, e)
			require.True(t, !covered || !b.Matches(e) || a.Matches(e), "%+v does not cover %+v: %+v", a, b, e)
		}
		if covered {
			known++
		}
		picked, places := f.Pick(events)
		require.Equal(t, len(picked) == len(events), places == nil)
		for i, place := range places {
			require.Equal(t, events[place], picked[i])
		}
	}
	require.Positive(t, known)
}

// Whatever subscribers do, in whatever order and at whatever speed, each gets
// what a subscription of its own would have got.
func TestReader_LikeItsOwnSubscription(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) eventstore.Store{
		"memory": func(*testing.T) eventstore.Store { return memory.New() },
		"sqlite": func(t *testing.T) eventstore.Store {
			s, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "log.db"), sqlite.Tail(300, 1<<20))
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, s.Close()) })
			return s
		},
	} {
		t.Run(name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			like(t, open(t), rand.New(rand.NewPCG(seed, 2)), 25)
		})
	}
}

func like(t *testing.T, inner eventstore.Store, random *rand.Rand, subscribers int) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	store := &spy{Store: inner}
	store.before = func(_ context.Context, n int64, _ eventstore.Query, b *eventstore.Batch) error {
		if uint64(b.Through)%97 == 13 && n%3 == 0 {
			return errBroken
		}
		return nil
	}
	r := logreader.New(store, logreader.Options{Events: 50 + random.IntN(2000)})
	const total = 6000
	for range 20 {
		put(t, store, slices.Collect(func(yield func(eventstore.Event) bool) {
			for range 100 {
				if !yield(anyEvent(random)) {
					return
				}
			}
		})...)
	}
	var appended atomic.Uint64
	appended.Store(2000)
	failed := make(chan error, subscribers+1)
	seeds := make([]uint64, subscribers+1)
	for i := range seeds {
		seeds[i] = random.Uint64()
	}
	go func() {
		random := rand.New(rand.NewPCG(seeds[subscribers], 3))
		for n := 2000; n < total; {
			var events []eventstore.Event
			for range min(total-n, 1+random.IntN(60)) {
				events = append(events, anyEvent(random))
			}
			receipt, err := store.Append(ctx, eventstore.Commit{Events: events})
			if err != nil {
				failed <- err
				return
			}
			n = int(receipt.Last)
			appended.Store(uint64(n))
		}
		failed <- nil
	}()
	for i := range subscribers {
		go func() {
			random := rand.New(rand.NewPCG(seeds[i], 4))
			failed <- oneOfMany(ctx, r, store, random, &appended, total)
		}()
	}
	for range subscribers + 1 {
		require.NoError(t, <-failed)
	}
	require.Zero(t, logreader.Groups(r))
	require.Zero(t, store.open.Load())
}

// oneOfMany reads the log to its end, in one go or several, and compares.
func oneOfMany(ctx context.Context, r *logreader.Reader, store eventstore.Store, random *rand.Rand, appended *atomic.Uint64, total eventstore.Position) error {
	q := anyQuery(random)
	begin := eventstore.Position(random.IntN(int(total) / 2))
	if random.IntN(2) == 0 {
		begin = 0
	}
	through, slow := begin, random.IntN(4) == 0
	var got []eventstore.Recorded
	for through < total {
		once, cancel := context.WithCancel(ctx)
		first, from := true, through
		known := eventstore.Position(appended.Load())
		last := 1 + random.IntN(200)
		for b, err := range r.Subscribe(once, q, through) {
			if err != nil {
				if !errors.Is(err, errBroken) && !errors.Is(err, context.Canceled) || ctx.Err() != nil {
					cancel()
					return fmt.Errorf("at %d: %w", through, err)
				}
				break
			}
			if b.Through < through || b.Through == through && !first {
				cancel()
				return fmt.Errorf("Through went from %d to %d", through, b.Through)
			}
			if b.CaughtUp && b.Through < known {
				cancel()
				return fmt.Errorf("caught up at %d, but the log was at %d when the subscription after %d was asked", b.Through, known, from)
			}
			for i := range b.Events {
				if p := b.Events[i].Position; p <= through || p > b.Through {
					cancel()
					return fmt.Errorf("the event at %d in a batch from %d through %d", p, through, b.Through)
				}
			}
			got = append(got, b.Events...)
			through, first = b.Through, false
			if slow {
				for range random.IntN(50) {
					if _, err := store.Head(ctx); err != nil {
						cancel()
						return err
					}
				}
			}
			if through >= total {
				break
			}
			if last--; last == 0 {
				if random.IntN(2) == 0 {
					break
				}
				cancel()
			}
		}
		cancel()
	}
	var want []eventstore.Recorded
	for e, err := range store.Read(ctx, eventstore.All(), eventstore.ReadOptions{After: begin}) {
		if err != nil {
			return err
		}
		if q.Matches(&e) {
			want = append(want, e)
		}
	}
	if len(want) != len(got) {
		return fmt.Errorf("%d events after %d of %+v instead of %d", len(got), begin, q, len(want))
	}
	for i := range want {
		if want[i].ID != got[i].ID || want[i].Position != got[i].Position {
			return fmt.Errorf("at index %d: the event at %d instead of %d", i, got[i].Position, want[i].Position)
		}
	}
	return nil
}
