package storetest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// Store is a store that the suite can close.
type Store interface {
	eventstore.Store
	Close() error
}

// Opener opens the log that a [Harness] prepared. The suite calls it again
// only after it has closed the store it got before, and only to test
// [Features.Reopen].
type Opener func() (Store, error)

// Harness prepares a new, empty log (a file, a schema, a stream name) and
// returns how to open it. What it leaves behind is its own to clean up, with
// t.Cleanup or t.TempDir.
type Harness func(t testing.TB) Opener

// QueryKinds is a set of kinds of query.
type QueryKinds uint16

// The kinds of query.
const (
	QueryAll QueryKinds = 1 << iota
	QueryStream
	QueryCategory
	QueryTypes
	QueryTags
	QuerySlices
	// QueryMixed is several items, or several constraints in one item.
	QueryMixed

	// EveryQuery is all of them.
	EveryQuery = QueryAll | QueryStream | QueryCategory | QueryTypes | QueryTags | QuerySlices | QueryMixed
)

// String lists the kinds.
func (k QueryKinds) String() string {
	var names []string
	for i, name := range []string{"all", "stream", "category", "types", "tags", "slices", "mixed"} {
		if k&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, "+")
}

// KeyScope says among which commits an idempotency key must be unique.
type KeyScope uint8

// The scopes of keys.
const (
	// KeysInStream: the keys of one stream, the first that the commit names.
	KeysInStream KeyScope = iota
	// KeysInLog: the keys of the whole log.
	KeysInLog
)

// Features are what a backend supports. The zero value supports the least that
// a backend may: appends to one stream, conditions on that stream, keys
// scoped to it, and forward reads and subscriptions of everything and of one
// stream.
type Features struct {
	// Forward, Backward and Subscribe are the kinds of query by direction.
	Forward, Backward, Subscribe QueryKinds
	// NoneMatch are the kinds of query that a boundary condition may have.
	NoneMatch QueryKinds
	// MultiStream: one commit may write several streams.
	MultiStream bool
	// ForeignConditions: a commit may have conditions on streams it does not write.
	ForeignConditions bool
	// Contiguous: positions are 1, 2, 3, … without holes.
	Contiguous bool
	// KeyScope is that of idempotency keys.
	KeyScope KeyScope
	// Enqueue: the store is an eventstore.Enqueuer.
	Enqueue bool
	// LogID: the store is eventstore.Identified.
	LogID bool
	// Reopen: the log is still there after Close and another Open.
	Reopen bool
	// Bubble: the store can be opened, used and closed inside a testing/synctest
	// bubble, where it waits by channels alone and never by time. Stores that talk
	// to a server cannot.
	Bubble bool
	// Limits are those of the backend; zero means eventstore.DefaultLimits.
	Limits eventstore.Limits
}

// Full returns the features of a store that supports all of the contract.
func Full() Features {
	return Features{
		Forward: EveryQuery, Backward: EveryQuery, Subscribe: EveryQuery, NoneMatch: EveryQuery,
		MultiStream: true, ForeignConditions: true, Contiguous: true, KeyScope: KeysInLog,
		Enqueue: true, LogID: true, Reopen: true, Bubble: true,
	}
}

func (f Features) withDefaults() Features {
	f.Forward |= QueryAll | QueryStream
	f.Subscribe |= QueryAll | QueryStream
	if f.Limits == (eventstore.Limits{}) {
		f.Limits = eventstore.DefaultLimits()
	}
	return f
}

// Run tests the backend against the contract.
func Run(t *testing.T, h Harness, f Features) {
	t.Helper()
	s := newSuite(h, f)
	for _, g := range groups {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			for _, c := range g.checks {
				t.Run(c.name, func(t *testing.T) {
					t.Parallel()
					if c.needs != nil {
						if lack := c.needs(s.features); lack != "" {
							t.Skipf("the backend declares no %s", lack)
						}
					}
					t.Cleanup(func() {
						if t.Failed() {
							t.Logf("the rule: %s", c.rule)
						}
					})
					c.run(t, s)
				})
			}
		})
	}
}

// check is one clause of the contract. Its run fails t when the clause is broken.
type check struct {
	name string
	// rule is what a failure teaches.
	rule string
	// needs names the feature that is missing, or nothing.
	needs func(Features) string
	run   func(t testing.TB, s *suite)
}

type group struct {
	name   string
	checks []check
}

var groups = []group{
	{"Features", featureChecks},
	{"Append", appendChecks},
	{"Conditions", conditionChecks},
	{"Boundary", boundaryChecks},
	{"Concurrency", concurrencyChecks},
	{"Keys", keyChecks},
	{"Enqueue", enqueueChecks},
	{"Read", readChecks},
	{"Subscribe", subscribeChecks},
	{"Limits", limitChecks},
	{"Ending", endingChecks},
	{"Bubble", bubbleChecks},
	{"Random", randomChecks},
}

type suite struct {
	harness  Harness
	features Features
	// patience is how long a check waits for something that must come.
	patience time.Duration
	// bubble runs fn in a testing/synctest bubble.
	bubble func(t testing.TB, fn func(testing.TB))
}

func newSuite(h Harness, f Features) *suite {
	return &suite{harness: h, features: f.withDefaults(), patience: 5 * time.Minute, bubble: func(t testing.TB, fn func(testing.TB)) {
		synctest.Test(t.(*testing.T), func(t *testing.T) { fn(t) })
	}}
}

// open returns a store with a new log, closed when the test ends.
func (s *suite) open(t testing.TB) Store {
	t.Helper()
	return s.prepare(t).open(t)
}

// prepare makes a new log that can be opened several times in turn.
func (s *suite) prepare(t testing.TB) *place { return &place{opener: s.harness(t)} }

type place struct {
	opener Opener
	store  Store
}

func (p *place) open(t testing.TB) Store {
	t.Helper()
	store, err := p.opener()
	require.NoError(t, err, "open the store")
	p.store = store
	t.Cleanup(func() { _ = store.Close() })
	return store
}

func (p *place) reopen(t testing.TB) Store {
	t.Helper()
	require.NoError(t, p.store.Close(), "close the store to open it again")
	return p.open(t)
}

// context ends when the test does, or when the suite has lost patience.
func (s *suite) context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), s.patience, fmt.Errorf("storetest: gave up after %s", s.patience))
	t.Cleanup(cancel)
	return ctx
}

func lacks(has bool, what string) string {
	if has {
		return ""
	}
	return what
}

func needQueries(what func(Features) QueryKinds, kinds QueryKinds, in string) func(Features) string {
	return func(f Features) string {
		return lacks(what(f)&kinds == kinds, fmt.Sprintf("%s queries for %s", kinds&^what(f), in))
	}
}

func noneMatch(f Features) QueryKinds { return f.NoneMatch }

// kindOf says which feature the query asks for.
func kindOf(q eventstore.Query) QueryKinds {
	if q.Everything {
		return QueryAll
	}
	if len(q.Items) > 1 {
		return QueryMixed
	}
	item, kinds, n := q.Items[0], QueryKinds(0), 0
	add := func(set bool, kind QueryKinds) {
		if set {
			kinds |= kind
			n++
		}
	}
	add(!item.Stream.IsZero(), QueryStream)
	add(item.Category != "", QueryCategory)
	add(len(item.Types) > 0, QueryTypes)
	add(len(item.Tags) > 0, QueryTags)
	add(!item.Slices.IsZero(), QuerySlices)
	if n > 1 {
		return QueryMixed
	}
	return kinds
}
