package storetest

import (
	"context"
	"errors"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/metatest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type (
	appendFunc    func(context.Context, eventstore.Commit) (eventstore.Receipt, error)
	readFunc      func(context.Context, eventstore.Query, eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error]
	subscribeFunc func(context.Context, eventstore.Query, eventstore.Position) iter.Seq2[eventstore.Batch, error]
	lookupFunc    func(context.Context, eventstore.Stream, string) (eventstore.Receipt, bool, error)
	enqueueFunc   func(context.Context, eventstore.Commit) *eventstore.Pending
)

// broken is the memory store with some of its methods replaced.
type broken struct {
	*memory.Store
	append    appendFunc
	read      readFunc
	subscribe subscribeFunc
	lookup    lookupFunc
	enqueue   enqueueFunc
	close     func() error
}

func (b *broken) Append(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
	if b.append != nil {
		return b.append(ctx, c)
	}
	return b.Store.Append(ctx, c)
}

func (b *broken) Enqueue(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
	if b.enqueue != nil {
		return b.enqueue(ctx, c)
	}
	p, resolve := eventstore.NewPending()
	resolve(b.Append(ctx, c))
	return p
}

func (b *broken) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	if b.read != nil {
		return b.read(ctx, q, o)
	}
	return b.Store.Read(ctx, q, o)
}

func (b *broken) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	if b.subscribe != nil {
		return b.subscribe(ctx, q, after)
	}
	return b.Store.Subscribe(ctx, q, after)
}

func (b *broken) Lookup(ctx context.Context, s eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
	if b.lookup != nil {
		return b.lookup(ctx, s, key)
	}
	return b.Store.Lookup(ctx, s, key)
}

func (b *broken) Close() error {
	if b.close != nil {
		return b.close()
	}
	return b.Store.Close()
}

// breakage is one way to break a store, and the checks that must notice it.
type breakage struct {
	name string
	// features declares something else than what the store does.
	features func(*Features)
	// store breaks a fresh store; base is the memory store's behaviour.
	store func(b *broken)
	// survives says that Close and Open lead to the same log.
	survives bool
	// hangs says that what the checks wait for never comes.
	hangs bool
	fails []string
}

func (x breakage) suite() *suite {
	f := Full()
	f.Reopen = x.survives
	if x.features != nil {
		x.features(&f)
	}
	s := newSuite(func(t testing.TB) Opener {
		var kept *memory.Store
		if x.survives {
			kept = memory.New()
			t.Cleanup(func() { _ = kept.Close() })
		}
		return func() (Store, error) {
			b := &broken{Store: memory.New()}
			if x.survives {
				b.Store = kept
				keepOpen(b)
			}
			if x.store != nil {
				x.store(b)
			}
			return b, nil
		}
	}, f)
	if x.hangs {
		s.patience = time.Second
	}
	return s
}

// keepOpen makes Close refuse appends without losing the log.
func keepOpen(b *broken) {
	var closed atomic.Bool
	b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
		if closed.Load() {
			return eventstore.Receipt{}, eventstore.ErrClosed
		}
		return b.Store.Append(ctx, c)
	}
	b.close = func() error {
		closed.Store(true)
		return nil
	}
}

// withCommit changes every commit on its way in.
func withCommit(change func(*eventstore.Commit)) func(*broken) {
	return func(b *broken) {
		b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
			c.Events = slices.Clone(c.Events)
			c.Conditions = slices.Clone(c.Conditions)
			change(&c)
			return b.Store.Append(ctx, c)
		}
	}
}

// withRead changes every recorded event that is read; false leaves it out.
func withRead(change func(*eventstore.Recorded) bool) func(*broken) {
	return func(b *broken) {
		b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
			return func(yield func(eventstore.Recorded, error) bool) {
				for r, err := range b.Store.Read(ctx, q, o) {
					if err == nil && !change(&r) {
						continue
					}
					if !yield(r, err) {
						return
					}
				}
			}
		}
	}
}

// withBatch changes every batch; false withholds it.
func withBatch(change func(n int, b *eventstore.Batch) bool) func(*broken) {
	return func(b *broken) {
		b.subscribe = func(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
			return func(yield func(eventstore.Batch, error) bool) {
				n := 0
				for batch, err := range b.Store.Subscribe(ctx, q, after) {
					batch.Events = slices.Clone(batch.Events)
					if err == nil && !change(n, &batch) {
						continue
					}
					n++
					if !yield(batch, err) {
						return
					}
				}
			}
		}
	}
}

// withError changes the errors of appends.
func withError(change func(error) error) func(*broken) {
	return func(b *broken) {
		b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
			r, err := b.Store.Append(ctx, c)
			if err != nil {
				err = change(err)
			}
			return r, err
		}
	}
}

// holds judges conditions by reading, in a step of its own.
func holds(ctx context.Context, b *broken, c eventstore.Condition) error {
	switch c.Kind {
	case eventstore.ConditionNoneMatch:
		for r, err := range b.Store.Read(ctx, c.Query, eventstore.ReadOptions{After: c.After, Limit: 1}) {
			if err != nil {
				return err
			}
			return &eventstore.ConflictError{Kind: c.Kind, Query: c.Query, After: c.After, Found: r.Position}
		}
	default:
		got, err := all(b.Store.Read(ctx, eventstore.OneStream(c.Stream), eventstore.ReadOptions{}))
		if err != nil {
			return err
		}
		var actual eventstore.Revision
		if len(got) > 0 {
			actual = got[len(got)-1].Revision()
		}
		if c.Kind == eventstore.ConditionStreamAt && actual.Version != c.Revision.Version || c.Kind == eventstore.ConditionStreamExists && actual.Version == 0 {
			return &eventstore.ConflictError{Kind: c.Kind, Stream: c.Stream, Expected: c.Revision, Actual: actual}
		}
	}
	return nil
}

var breakages = []breakage{
	// Declarations that are not true.
	{name: "Enqueue is not declared", features: func(f *Features) { f.Enqueue = false }, fails: []string{"Features/Powers"}},
	{name: "LogID is not declared", features: func(f *Features) { f.LogID = false }, fails: []string{"Features/Powers"}},
	{name: "several streams are not declared", features: func(f *Features) { f.MultiStream = false }, fails: []string{"Features/SeveralStreams"}},
	{name: "foreign conditions are not declared", features: func(f *Features) { f.ForeignConditions = false }, fails: []string{"Features/ForeignConditions"}},
	{name: "boundary queries are not declared", features: func(f *Features) { f.NoneMatch = QueryTags }, fails: []string{"Features/BoundaryQueries"}},
	{name: "backward queries are not declared", features: func(f *Features) { f.Backward = QueryAll }, fails: []string{"Read/Queries"}},
	{name: "forward queries are not declared", features: func(f *Features) { f.Forward = QueryAll }, fails: []string{"Read/Queries"}},
	{name: "subscriptions are not declared", features: func(f *Features) { f.Subscribe = QueryAll }, fails: []string{"Subscribe/Queries"}},
	{name: "reopening is declared but loses all", features: func(f *Features) { f.Reopen = true }, fails: []string{"Features/Reopen", "Read/SurviveReopening", "Keys/SurviveReopening"}},
	{name: "reopening is not declared", survives: true, features: func(f *Features) { f.Reopen = false }, fails: []string{"Features/Reopen"}},
	{name: "keys are declared to be unique in streams", features: func(f *Features) { f.KeyScope = KeysInStream }, fails: []string{"Keys/Scope"}},
	{name: "declared limits are too large", features: func(f *Features) { f.Limits = eventstore.DefaultLimits(); f.Limits.EventsPerCommit = 2000 }, fails: []string{"Limits/Sizes"}},

	// Appends.
	{
		name: "conditions are ignored", store: withCommit(func(c *eventstore.Commit) { c.Conditions = nil }),
		fails: []string{
			"Append/AllOrNothing", "Append/PositionsAreContiguous", "Append/SeveralStreams", "Conditions/StreamAt", "Conditions/StreamExists", "Conditions/JudgedBeforeOwnEvents",
			"Conditions/AllMustHold", "Conditions/OnOtherStreams", "Conditions/InvalidAreRefused", "Boundary/Matrix", "Boundary/ExclusiveUnderConcurrency",
			"Boundary/UniquenessGuard", "Boundary/WholeLog", "Concurrency/OneExpectationOneWinner", "Concurrency/NoLostUpdates", "Enqueue/ConflictFailsThatCommitOnly",
			"Enqueue/BoundaryAmongPending", "Features/BoundaryQueries", "Random/SameAsMemory", "Random/Linearizable",
		},
	},
	{
		name: "conditions are checked before the append, not with it", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				for _, condition := range c.Conditions {
					if err := holds(ctx, b, condition); err != nil {
						return eventstore.Receipt{}, err
					}
				}
				time.Sleep(time.Millisecond)
				c.Conditions = nil
				return b.Store.Append(ctx, c)
			}
		},
		fails: []string{"Concurrency/OneExpectationOneWinner", "Concurrency/NoLostUpdates", "Boundary/ExclusiveUnderConcurrency", "Boundary/UniquenessGuard", "Random/Linearizable"},
	},
	{
		name: "only the first condition counts", store: withCommit(func(c *eventstore.Commit) { c.Conditions = c.Conditions[:min(1, len(c.Conditions))] }),
		fails: []string{"Conditions/AllMustHold", "Random/SameAsMemory"},
	},
	{
		name: "conflicts say only that they are conflicts", store: withError(func(err error) error {
			if errors.Is(err, eventstore.ErrConflict) {
				return eventstore.ErrConflict
			}
			return err
		}),
		fails: []string{"Conditions/StreamAt", "Concurrency/OneExpectationOneWinner", "Boundary/ExclusiveUnderConcurrency", "Boundary/Matrix"},
	},
	{
		name: "any event after the position breaks a boundary", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				for _, condition := range c.Conditions {
					head, _ := b.Head(ctx)
					if condition.Kind == eventstore.ConditionNoneMatch && head > condition.After {
						return eventstore.Receipt{}, &eventstore.ConflictError{Kind: condition.Kind, Found: head, After: condition.After}
					}
				}
				return b.Store.Append(ctx, c)
			}
		},
		fails: []string{"Boundary/DisjointDoNotConflict", "Boundary/Matrix", "Features/BoundaryQueries"},
	},
	{
		name: "own events count for conditions", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				conditions := slices.Clone(c.Conditions)
				for i, condition := range conditions {
					for _, e := range c.Events {
						if condition.Kind == eventstore.ConditionNoneMatch && condition.Query.Matches(&eventstore.Recorded{Stream: e.Stream, Type: e.Type, Tags: e.Tags}) {
							return eventstore.Receipt{}, &eventstore.ConflictError{Kind: condition.Kind, Query: condition.Query}
						}
						if condition.Kind == eventstore.ConditionStreamExists && e.Stream == condition.Stream {
							conditions[i] = eventstore.NoneMatch(eventstore.OfTypes("never"), 0)
						}
					}
				}
				c.Conditions = conditions
				return b.Store.Append(ctx, c)
			}
		},
		fails: []string{"Conditions/JudgedBeforeOwnEvents", "Conditions/StreamExists"},
	},
	{
		name: "an expectation without position never holds", store: withCommit(func(c *eventstore.Commit) {
			for i, condition := range c.Conditions {
				if condition.Kind == eventstore.ConditionStreamAt && condition.Revision.Version > 0 && condition.Revision.Position == 0 {
					c.Conditions[i].Revision.Position = 1 << 50
				}
			}
		}),
		fails: []string{"Conditions/VersionAlone", "Enqueue/Pipelined"},
	},
	{
		name: "the id of the last event is not checked", store: withCommit(func(c *eventstore.Commit) {
			for i := range c.Conditions {
				c.Conditions[i].LastEvent = uuid.Nil
			}
		}),
		fails: []string{"Conditions/StreamAtEvent", "Enqueue/FollowerOfALoser", "Random/SameAsMemory"},
	},
	{
		name: "commits are written event by event", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				var first eventstore.Receipt
				for i, e := range c.Events {
					one := eventstore.Commit{Events: []eventstore.Event{e}}
					if i == 0 {
						one.Conditions = c.Conditions
					}
					r, err := b.Store.Append(ctx, one)
					if err != nil {
						return r, err
					}
					if i == 0 {
						first = r
					}
					first.Last = r.Last
					time.Sleep(10 * time.Microsecond)
				}
				return first, nil
			}
		},
		fails: []string{"Concurrency/CommitsDoNotInterleave", "Append/AllOrNothing", "Append/SeveralStreams"},
	},
	{
		name: "a refused commit leaves its first event", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				r, err := b.Store.Append(ctx, c)
				if err != nil && len(c.Events) > 0 {
					_, _ = b.Store.Append(ctx, eventstore.Commit{Events: c.Events[:1]})
				}
				return r, err
			}
		},
		fails: []string{"Append/AllOrNothing", "Append/PositionsAreContiguous", "Conditions/StreamAt", "Limits/Names", "Limits/Sizes"},
	},
	{name: "versions begin at 0", store: withRead(func(r *eventstore.Recorded) bool { r.Version--; return true }), fails: []string{"Append/VersionsAreOneToN"}},
	{
		name: "receipts name the first event only", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				r, err := b.Store.Append(ctx, c)
				r.Last = r.First
				return r, err
			}
		},
		fails: []string{"Append/PositionsIncrease", "Append/PositionsAreContiguous", "Concurrency/CommitsDoNotInterleave"},
	},
	{
		name: "commits of several streams are sorted by stream", store: withCommit(func(c *eventstore.Commit) {
			slices.SortStableFunc(c.Events, func(a, b eventstore.Event) int { return strings.Compare(a.Stream.String(), b.Stream.String()) })
		}),
		fails: []string{"Append/SeveralStreams"},
	},
	{name: "times lose their nanoseconds", store: withCommit(func(c *eventstore.Commit) {
		for i := range c.Events {
			c.Events[i].Time = c.Events[i].Time.Truncate(time.Microsecond)
		}
	}), fails: []string{"Append/RoundTrip"}},
	{name: "metadata loses its extra values", store: withCommit(func(c *eventstore.Commit) {
		for i := range c.Events {
			c.Events[i].Metadata.Extra = nil
		}
	}), fails: []string{"Append/RoundTrip"}},
	{name: "tags are sorted", store: withCommit(func(c *eventstore.Commit) {
		for i := range c.Events {
			c.Events[i].Tags = reversed(c.Events[i].Tags)
		}
	}), fails: []string{"Append/RoundTrip"}},
	{name: "ids are random", store: withCommit(func(c *eventstore.Commit) {
		for i := range c.Events {
			c.Events[i].ID = uuid.New()
		}
	}), fails: []string{"Append/FillsInIDAndTime", "Append/RoundTrip"}},
	{
		name: "ids are written into the caller's slice", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				for i := range c.Events {
					c.Events[i].ID = uuid.Must(uuid.NewV7())
				}
				return b.Store.Append(ctx, c)
			}
		},
		fails: []string{"Append/FillsInIDAndTime"},
	},
	{name: "streams ignore case", store: withCommit(func(c *eventstore.Commit) {
		for i := range c.Events {
			c.Events[i].Stream.ID = strings.ToLower(c.Events[i].Stream.ID)
		}
	}), fails: []string{"Append/StreamNamesDoNotMix"}},

	// Keys.
	{
		name: "keys are ignored", store: withCommit(func(c *eventstore.Commit) { c.Key, c.Fingerprint = "", "" }),
		fails: []string{
			"Keys/SameKeyWritesOnce", "Keys/NeverJudgedAgain", "Keys/OutcomeMayDiffer", "Keys/ReusedForSomethingElse", "Keys/DerivedFingerprint", "Keys/Lookup", "Keys/Scope",
			"Keys/OfSeveralStreams", "Keys/ConcurrentSameKey", "Enqueue/DuplicateAmongPending", "Limits/Keys", "Limits/LongestNames", "Random/SameAsMemory",
		},
	},
	{
		name: "conditions come before keys", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				for _, condition := range c.Conditions {
					if err := holds(ctx, b, condition); err != nil {
						return eventstore.Receipt{}, err
					}
				}
				return b.Store.Append(ctx, c)
			}
		},
		fails: []string{"Keys/NeverJudgedAgain", "Random/SameAsMemory"},
	},
	{name: "fingerprints are not compared", store: withCommit(func(c *eventstore.Commit) {
		if c.Key != "" {
			c.Fingerprint = "same"
		}
	}), fails: []string{"Keys/ReusedForSomethingElse", "Keys/DerivedFingerprint"}},
	{name: "fingerprints are always derived", store: withCommit(func(c *eventstore.Commit) { c.Fingerprint = "" }), fails: []string{"Keys/OutcomeMayDiffer", "Keys/SameKeyWritesOnce"}},
	{
		name: "a refused commit uses up its key", store: func(b *broken) {
			var mu sync.Mutex
			used := map[string]bool{}
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				mu.Lock()
				used[c.Key] = true
				mu.Unlock()
				return b.Store.Append(ctx, c)
			}
			b.lookup = func(ctx context.Context, s eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
				mu.Lock()
				defer mu.Unlock()
				return eventstore.Receipt{Duplicate: true}, used[key], nil
			}
		},
		fails: []string{"Keys/FailureStoresNoKey", "Keys/Lookup"},
	},
	{
		name: "a duplicate's receipt names one stream", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				r, err := b.Store.Append(ctx, c)
				if r.Duplicate {
					r.Revisions = r.Revisions[:1]
				}
				return r, err
			}
		},
		fails: []string{"Keys/OfSeveralStreams"},
	},
	{
		name: "keys are checked before the append, not with it", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				if r, used, err := b.Store.Lookup(ctx, eventstore.Stream{}, c.Key); err != nil || used {
					return r, err
				}
				time.Sleep(time.Millisecond)
				r, err := b.Store.Append(ctx, c)
				if r.Duplicate {
					c.Key, c.Fingerprint = "", ""
					return b.Store.Append(ctx, c)
				}
				return r, err
			}
		},
		fails: []string{"Keys/ConcurrentSameKey"},
	},
	{
		name: "keys are kept in the process only", survives: true, store: func(b *broken) {
			process := uuid.NewString()
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				if c.Key != "" {
					c.Key = process + c.Key
				}
				return b.Store.Append(ctx, c)
			}
			b.lookup = func(ctx context.Context, s eventstore.Stream, key string) (eventstore.Receipt, bool, error) {
				return b.Store.Lookup(ctx, s, process+key)
			}
		},
		fails: []string{"Keys/SurviveReopening"},
	},

	// Enqueue.
	{
		name: "enqueued commits overtake one another", store: func(b *broken) {
			var n atomic.Int64
			b.enqueue = func(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
				p, resolve := eventstore.NewPending()
				wait := time.Duration(n.Add(1)%3) * time.Millisecond
				go func() {
					time.Sleep(wait)
					resolve(b.Store.Append(ctx, c))
				}()
				return p
			}
		},
		fails: []string{"Enqueue/Pipelined"},
	},
	{
		name: "a conflict fails the next commit too", store: func(b *broken) {
			failed := false
			b.enqueue = func(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
				p, resolve := eventstore.NewPending()
				if failed {
					failed = false
					resolve(eventstore.Receipt{}, &eventstore.ConflictError{})
					return p
				}
				r, err := b.Store.Append(ctx, c)
				failed = err != nil
				resolve(r, err)
				return p
			}
		},
		fails: []string{"Enqueue/ConflictFailsThatCommitOnly"},
	},
	{
		name: "enqueued commits ignore their context", store: func(b *broken) {
			b.enqueue = func(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
				p, resolve := eventstore.NewPending()
				resolve(b.Store.Append(context.WithoutCancel(ctx), c))
				return p
			}
		},
		fails: []string{"Enqueue/RefusedAtOnce"},
	},
	{
		name: "enqueued commits stay without answer after Close", hangs: true, store: func(b *broken) {
			b.enqueue = func(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
				p, resolve := eventstore.NewPending()
				if r, err := b.Store.Append(ctx, c); !errors.Is(err, eventstore.ErrClosed) {
					resolve(r, err)
				}
				return p
			}
		},
		fails: []string{"Enqueue/CloseAnswersEveryone"},
	},

	// Reads.
	{
		name: "categories match by prefix", store: func(b *broken) {
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				if q.Validate() != nil || kindOf(q) != QueryCategory {
					return b.Store.Read(ctx, q, o)
				}
				return func(yield func(eventstore.Recorded, error) bool) {
					for r, err := range b.Store.Read(ctx, eventstore.All(), o) {
						if strings.HasPrefix(r.Stream.Category, q.Items[0].Category) && !yield(r, err) {
							return
						}
					}
				}
			}
		},
		fails: []string{"Read/Queries", "Random/SameAsMemory"},
	},
	{
		name: "all tags means any tag", store: func(b *broken) {
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				if q.Validate() != nil || q.Everything || len(q.Items) > 1 || len(q.Items[0].Tags) < 2 {
					return b.Store.Read(ctx, q, o)
				}
				var any eventstore.Query
				for _, tag := range q.Items[0].Tags {
					item := q.Items[0]
					item.Tags = []string{tag}
					any.Items = append(any.Items, item)
				}
				return b.Store.Read(ctx, any, o)
			}
		},
		fails: []string{"Read/Queries", "Random/SameAsMemory"},
	},
	{
		name: "backward reads ignore After", store: func(b *broken) {
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				if o.Backward {
					o.After = 0
				}
				return b.Store.Read(ctx, q, o)
			}
		},
		fails: []string{"Read/Ranges", "Random/SameAsMemory"},
	},
	{
		name: "backward limits take the first events", store: func(b *broken) {
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				if !o.Backward || o.Limit == 0 {
					return b.Store.Read(ctx, q, o)
				}
				o.Backward = false
				got, err := all(b.Store.Read(ctx, q, o))
				return func(yield func(eventstore.Recorded, error) bool) {
					for _, r := range slices.Backward(got) {
						if !yield(r, err) {
							return
						}
					}
				}
			}
		},
		fails: []string{"Read/Ranges", "Read/Long", "Random/SameAsMemory"},
	},
	{
		name: "a missing stream is an error", store: func(b *broken) {
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				return func(yield func(eventstore.Recorded, error) bool) {
					found := q.Everything
					for r, err := range b.Store.Read(ctx, q, o) {
						found = true
						if !yield(r, err) {
							return
						}
					}
					if !found {
						yield(eventstore.Recorded{}, errors.New("stream not found"))
					}
				}
			}
		},
		fails: []string{"Read/Empty"},
	},
	{
		name: "the 700th event of a read is lost", store: func(b *broken) {
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				return func(yield func(eventstore.Recorded, error) bool) {
					n := 0
					for r, err := range b.Store.Read(ctx, q, o) {
						if n++; n != 700 && !yield(r, err) {
							return
						}
					}
				}
			}
		},
		fails: []string{"Read/Long"},
	},
	{
		name: "reads go on with what is appended meanwhile", store: func(b *broken) {
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				return func(yield func(eventstore.Recorded, error) bool) {
					for more := true; more; {
						more = false
						for r, err := range b.Store.Read(ctx, q, o) {
							more = more || err == nil
							o.After = r.Position
							if !yield(r, err) || err != nil {
								return
							}
						}
						more = more && !o.Backward && o.Limit == 0
					}
				}
			}
		},
		fails: []string{"Read/EndsAtTheHeadItSaw"},
	},
	{
		name: "broken-off loops keep a connection", hangs: true, store: func(b *broken) {
			pool := make(chan struct{}, 20)
			take := func(ctx context.Context) error {
				select {
				case pool <- struct{}{}:
					return nil
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				return func(yield func(eventstore.Recorded, error) bool) {
					if err := take(ctx); err != nil {
						yield(eventstore.Recorded{}, err)
						return
					}
					for r, err := range b.Store.Read(ctx, q, o) {
						if !yield(r, err) {
							return
						}
					}
					<-pool
				}
			}
			b.subscribe = func(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
				return func(yield func(eventstore.Batch, error) bool) {
					if err := take(ctx); err != nil {
						yield(eventstore.Batch{}, err)
						return
					}
					for r, err := range b.Store.Subscribe(ctx, q, after) {
						if !yield(r, err) {
							return
						}
					}
					<-pool
				}
			}
		},
		fails: []string{"Read/Break", "Subscribe/EndsWithBreak"},
	},
	{
		name: "the zero query means everything", store: func(b *broken) {
			fix := func(q eventstore.Query) eventstore.Query {
				if q.IsZero() {
					return eventstore.All()
				}
				return q
			}
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				return b.Store.Read(ctx, fix(q), o)
			}
		},
		fails: []string{"Read/InvalidQueries"},
	},
	{
		name: "a read can be ranged over once", store: func(b *broken) {
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				used := false
				return func(yield func(eventstore.Recorded, error) bool) {
					if used {
						return
					}
					used = true
					b.Store.Read(ctx, q, o)(yield)
				}
			}
		},
		fails: []string{"Read/Again"},
	},
	{
		name: "reads are stale", store: func(b *broken) {
			var n atomic.Int64
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				if head, _ := b.Head(ctx); n.Add(1)%3 == 0 && head > 4 && o.Through == 0 {
					o.Through = head - 2
				}
				return b.Store.Read(ctx, q, o)
			}
		},
		fails: []string{"Random/Linearizable", "Random/SameAsMemory"},
	},

	// Subscriptions.
	{
		name: "every batch says that it has caught up", store: func(b *broken) {
			b.subscribe = func(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
				return func(yield func(eventstore.Batch, error) bool) {
					for batch, err := range b.Store.Subscribe(ctx, q, after) {
						for i, e := range batch.Events {
							if i < len(batch.Events)-1 && !yield(eventstore.Batch{Events: batch.Events[i : i+1], Through: e.Position, CaughtUp: true}, nil) {
								return
							}
						}
						batch.Events = batch.Events[max(0, len(batch.Events)-1):]
						if !yield(batch, err) {
							return
						}
					}
				}
			}
		},
		fails: []string{"Subscribe/CatchesUpThenFollows"},
	},
	{
		name: "batches without events are withheld", hangs: true, store: withBatch(func(_ int, b *eventstore.Batch) bool { return len(b.Events) > 0 }),
		fails: []string{"Subscribe/CaughtUpAtOnce", "Subscribe/ThroughProgresses"},
	},
	{
		name: "subscriptions begin at the start of the log", store: func(b *broken) {
			b.subscribe = func(ctx context.Context, q eventstore.Query, _ eventstore.Position) iter.Seq2[eventstore.Batch, error] {
				return b.Store.Subscribe(ctx, q, 0)
			}
		},
		fails: []string{"Subscribe/Queries", "Subscribe/BeyondTheHead", "Subscribe/NoneSkipped"},
	},
	{
		name: "a subscription beyond the head begins at the head", store: func(b *broken) {
			b.subscribe = func(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
				head, _ := b.Head(ctx)
				return b.Store.Subscribe(ctx, q, min(after, head))
			}
		},
		fails: []string{"Subscribe/BeyondTheHead"},
	},
	{
		name: "an event is skipped now and then", store: withBatch(func(n int, b *eventstore.Batch) bool {
			if n%5 == 4 && len(b.Events) > 0 {
				b.Events = b.Events[1:]
			}
			return true
		}),
		fails: []string{"Subscribe/NoneSkipped", "Subscribe/CatchesUpThenFollows"},
	},
	{
		name: "an event comes twice now and then", store: withBatch(func(n int, b *eventstore.Batch) bool {
			if n == 2 && len(b.Events) > 0 {
				b.Events = append(b.Events, b.Events[len(b.Events)-1])
			}
			return true
		}),
		fails: []string{"Subscribe/NoneSkipped"},
	},
	{
		name: "events are out of order now and then", store: withBatch(func(_ int, b *eventstore.Batch) bool {
			if len(b.Events) > 2 {
				b.Events[0], b.Events[1] = b.Events[1], b.Events[0]
			}
			return true
		}),
		fails: []string{"Subscribe/NoneSkipped", "Subscribe/CatchesUpThenFollows", "Subscribe/SlowReceiver"},
	},
	{
		name: "large commits become visible after small ones that came later", store: func(b *broken) {
			b.subscribe = func(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
				return func(yield func(eventstore.Batch, error) bool) {
					for batch, err := range b.Store.Subscribe(ctx, q, after) {
						head, _ := b.Head(ctx)
						late := func(r eventstore.Recorded) bool { return r.Stream.Category == "bulk" && r.Position+20 > head }
						batch.Events = slices.DeleteFunc(slices.Clone(batch.Events), late)
						if !yield(batch, err) {
							return
						}
					}
				}
			}
		},
		fails: []string{"Subscribe/NoneSkipped"},
	},
	{
		name: "subscriptions end without an error", store: func(b *broken) {
			b.subscribe = func(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
				return func(yield func(eventstore.Batch, error) bool) {
					for batch, err := range b.Store.Subscribe(ctx, q, after) {
						if err != nil || !yield(batch, nil) {
							return
						}
					}
				}
			}
		},
		fails: []string{"Subscribe/EndsWithContext", "Subscribe/EndsWithClose", "Ending/CancelledBefore", "Ending/Closed"},
	},
	{
		name: "writers wait for subscribers", hangs: true, store: func(b *broken) {
			turn := make(chan struct{}, 1)
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				select {
				case turn <- struct{}{}:
				case <-ctx.Done():
					return eventstore.Receipt{}, ctx.Err()
				}
				defer func() { <-turn }()
				return b.Store.Append(ctx, c)
			}
			b.subscribe = func(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
				return func(yield func(eventstore.Batch, error) bool) {
					for batch, err := range b.Store.Subscribe(ctx, q, after) {
						turn <- struct{}{}
						more := yield(batch, err)
						<-turn
						if !more {
							return
						}
					}
				}
			}
		},
		fails: []string{"Subscribe/SlowReceiver"},
	},

	{
		name: "subscriptions poll", store: func(b *broken) {
			b.subscribe = func(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
				return func(yield func(eventstore.Batch, error) bool) {
					for ; ctx.Err() == nil; time.Sleep(time.Millisecond) {
						got, err := all(b.Store.Read(ctx, q, eventstore.ReadOptions{After: after}))
						if len(got) > 0 {
							after = got[len(got)-1].Position
							if !yield(eventstore.Batch{Events: got, Through: after}, err) {
								return
							}
						}
					}
					yield(eventstore.Batch{}, ctx.Err())
				}
			}
		},
		fails: []string{"Bubble/WaitsByChannelsAlone"},
	},
	{
		name: "appends linger", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				time.Sleep(time.Millisecond)
				return b.Store.Append(ctx, c)
			}
		},
		fails: []string{"Bubble/WaitsByChannelsAlone"},
	},

	// Limits.
	{
		name: "errors do not quote the input", store: withError(func(err error) error {
			for _, kind := range []error{eventstore.ErrInvalid, eventstore.ErrTooLarge, eventstore.ErrKeyReused} {
				if errors.Is(err, kind) {
					return kind
				}
			}
			return err
		}),
		fails: []string{"Limits/Names", "Limits/Keys", "Limits/Sizes", "Keys/ReusedForSomethingElse"},
	},
	{name: "a bad tag is dropped", store: withCommit(func(c *eventstore.Commit) {
		for i := range c.Events {
			c.Events[i].Tags = slices.DeleteFunc(slices.Clone(c.Events[i].Tags), func(tag string) bool { return tag == "" })
		}
	}), fails: []string{"Limits/Names"}},
	{name: "long types are cut off", store: withCommit(func(c *eventstore.Commit) {
		for i := range c.Events {
			c.Events[i].Type = c.Events[i].Type[:min(100, len(c.Events[i].Type))]
		}
	}), fails: []string{"Limits/LongestNames", "Limits/Names"}},

	// Endings.
	{
		name: "an ended context is not noticed", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				return b.Store.Append(context.WithoutCancel(ctx), c)
			}
		},
		fails: []string{"Ending/CancelledBefore", "Enqueue/RefusedAtOnce"},
	},
	{
		name: "a cancelled append says that it failed although it was written", store: func(b *broken) {
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				r, err := b.Store.Append(context.WithoutCancel(ctx), c)
				timer := time.NewTimer(5 * time.Millisecond)
				defer timer.Stop()
				select {
				case <-ctx.Done():
					return eventstore.Receipt{}, ctx.Err()
				case <-timer.C:
				}
				return r, err
			}
		},
		fails: []string{"Ending/CancelledWhileAppending"},
	},
	{
		name: "a cancelled read ends in silence", store: func(b *broken) {
			b.read = func(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
				return func(yield func(eventstore.Recorded, error) bool) {
					for r, err := range b.Store.Read(context.WithoutCancel(ctx), q, o) {
						if ctx.Err() != nil || !yield(r, err) {
							return
						}
					}
				}
			}
		},
		fails: []string{"Ending/CancelledWhileReading", "Ending/CancelledBefore"},
	},
	{
		name: "a closed store says something else", store: withError(func(err error) error {
			if errors.Is(err, eventstore.ErrClosed) {
				return errors.New("sql: database is closed")
			}
			return err
		}),
		fails: []string{"Ending/Closed", "Ending/CloseUnderLoad", "Enqueue/CloseAnswersEveryone"},
	},
	{
		name: "what was in flight at Close is acknowledged and lost", survives: true, store: func(b *broken) {
			next := b.append
			var lied atomic.Bool
			b.append = func(ctx context.Context, c eventstore.Commit) (eventstore.Receipt, error) {
				r, err := next(ctx, c)
				if errors.Is(err, eventstore.ErrClosed) && !lied.Swap(true) {
					return eventstore.Receipt{First: 1, Last: 2}, nil
				}
				return r, err
			}
		},
		fails: []string{"Ending/CloseUnderLoad", "Enqueue/CloseAnswersEveryone"},
	},
}

// Every check can fail: for each there is a broken store that it notices.
func TestChecks_NoticeBrokenStores(t *testing.T) {
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
				if testing.Short() && (strings.HasPrefix(name, "Random/") || strings.HasPrefix(name, "Concurrency/")) {
					continue // which so few operations need not come upon
				}
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
				if c.needs != nil {
					require.Empty(t, c.needs(s.features), "%s would be skipped", name)
				}
				said := metatest.Failure(t, func(t testing.TB) { c.run(t, s) })
				require.NotEmpty(t, said, "a store in which %s passes %s", x.name, name)
				if !x.hangs && name != "Ending/CancelledBefore" {
					require.NotContains(t, said, "gave up", "%s must be noticed by what it does, not by patience", x.name)
					require.NotContains(t, said, context.DeadlineExceeded.Error(), "%s must be noticed by what it does, not by patience", x.name)
				}
				t.Logf("%s:%s", name, lastMessage(said))
			}
		})
	}
}

// lastMessage shortens a failure to what it is about.
func lastMessage(said string) string {
	if _, message, ok := strings.Cut(said, "Messages:"); ok {
		return strings.Join(strings.Fields(message), " ")
	}
	_, trace, _ := strings.Cut(said, "Error:")
	return strings.Join(strings.Fields(trace), " ")
}

// What the reopening breakages are built on passes, so that it is the breakage
// that fails. The plain memory store runs the suite in its own package.
func TestChecks_PassOnAStoreThatSurvives(t *testing.T) {
	t.Parallel()
	for _, g := range groups {
		for _, c := range g.checks {
			if !strings.Contains(c.name, "Reopen") {
				continue
			}
			s := breakage{survives: true}.suite()
			require.Empty(t, metatest.Failure(t, func(t testing.TB) { c.run(t, s) }), g.name+"/"+c.name)
		}
	}
}
