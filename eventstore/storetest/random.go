package storetest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

// newSeed returns the seed of a random run; when the test fails, it is printed
// with how to replay it.
func newSeed(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if given := os.Getenv("STORETEST_SEED"); given != "" {
		var err error
		seed, err = strconv.ParseUint(given, 10, 64)
		require.NoError(t, err, "STORETEST_SEED=%q", given)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay with STORETEST_SEED=%d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 1))
}

var randomChecks = []check{
	{
		name: "SameAsMemory",
		rule: "the same random operations have the same receipts, conflicts, errors and reads as on the memory store",
		run: func(t testing.TB, s *suite) {
			r := newSeed(t)
			for range pick(6, 2) {
				compareWithMemory(t, s, r, pick(250, 80))
			}
		},
	},
	{
		name: "Linearizable",
		rule: "concurrent appends and reads of a stream can be explained by one order in which each took effect at once between its call and its answer",
		run: func(t testing.TB, s *suite) {
			r := newSeed(t)
			for range pick(4, 1) {
				checkLinearizable(t, s, r)
			}
		},
	},
}

// oracle runs operations on the store under test and on the memory store, and
// translates positions between them where the store's are not contiguous.
type oracle struct {
	t         testing.TB
	ctx       context.Context
	s         *suite
	r         *rand.Rand
	store     Store
	model     *memory.Store
	positions []eventstore.Position // by the model's position - 1
	trace     []string
}

func compareWithMemory(t testing.TB, s *suite, r *rand.Rand, operations int) {
	p := s.prepare(t)
	o := &oracle{t: t, ctx: s.context(t), s: s, r: r, store: p.open(t), model: memory.New()}
	defer func() { _ = o.model.Close() }()
	finished := false
	defer func() {
		if !finished {
			t.Logf("the last operations:\n%s", strings.Join(o.trace[max(0, len(o.trace)-12):], "\n"))
		}
	}()
	for range operations {
		switch n := r.IntN(100); {
		case n < 60:
			o.append()
		case n < 92:
			o.read()
		case n < 97:
			o.lookup()
		default:
			if s.features.Reopen {
				o.note("reopen")
				o.store = p.reopen(t)
			}
		}
	}
	o.compareReads(eventstore.All(), eventstore.ReadOptions{})
	finished = true
}

func (o *oracle) note(format string, args ...any) {
	o.trace = append(o.trace, fmt.Sprintf(format, args...))
}

// real translates a position of the model into one of the store.
func (o *oracle) real(p eventstore.Position) eventstore.Position {
	switch n := eventstore.Position(len(o.positions)); {
	case p == 0:
		return 0
	case p <= n:
		return o.positions[p-1]
	case n == 0:
		return p
	default:
		return o.positions[n-1] + p - n
	}
}

func (o *oracle) stream() eventstore.Stream {
	return stream([]string{"account", "accounting", "order"}[o.r.IntN(3)], strconv.Itoa(o.r.IntN(4)))
}

func (o *oracle) eventType() string { return []string{"a", "b", "c", "ab"}[o.r.IntN(4)] }

func (o *oracle) tags(most int) []string {
	var tags []string
	for _, tag := range []string{"t:1", "t:2", "t:10", "x"} {
		if len(tags) < most && o.r.IntN(3) == 0 {
			tags = append(tags, tag)
		}
	}
	o.r.Shuffle(len(tags), func(i, j int) { tags[i], tags[j] = tags[j], tags[i] })
	return tags
}

// position returns one at or around the log, rarely far beyond it.
func (o *oracle) position() eventstore.Position {
	if o.r.IntN(4) == 0 {
		return 0
	}
	return eventstore.Position(o.r.IntN(len(o.positions) + 3))
}

func (o *oracle) item() eventstore.Item {
	var item eventstore.Item
	switch o.r.IntN(8) {
	case 0, 1:
		item.Stream = o.stream()
	case 2, 3:
		item.Category = o.stream().Category
	case 4:
		from := uint16(o.r.IntN(eventstore.Slices))
		item.Slices = eventstore.SliceRange{From: from, To: from + 1 + uint16(o.r.IntN(eventstore.Slices-int(from)))}
	}
	if o.r.IntN(2) == 0 {
		for range 1 + o.r.IntN(2) {
			item.Types = append(item.Types, o.eventType())
		}
	}
	if o.r.IntN(2) == 0 {
		item.Tags = o.tags(3)
	}
	return item
}

// query returns a random query of a kind that is allowed, often one that
// constrains by several things at once.
func (o *oracle) query(allowed QueryKinds) eventstore.Query {
	for range 50 {
		var q eventstore.Query
		if o.r.IntN(8) == 0 {
			q = eventstore.All()
		} else {
			for range 1 + o.r.IntN(3)*o.r.IntN(2) {
				q.Items = append(q.Items, o.item())
			}
		}
		if q.Validate() == nil && allowed&kindOf(q) != 0 {
			return q
		}
	}
	if allowed&QueryAll != 0 {
		return eventstore.All()
	}
	return eventstore.OneStream(o.stream())
}

func (o *oracle) append() {
	var c eventstore.Commit
	to := o.stream()
	for i := range 1 + o.r.IntN(4)*o.r.IntN(2) {
		if i > 0 && o.s.features.MultiStream && o.r.IntN(2) == 0 {
			to = o.stream()
		}
		e := event(to, o.eventType(), o.tags(4)...)
		e.Data = fmt.Appendf(nil, `{"N":%d}`, o.r.IntN(3))
		binary.BigEndian.PutUint64(e.ID[8:], o.r.Uint64())
		e.ID[6] = 0x70 // both stores must know the event by the same id
		c.Events = append(c.Events, e)
	}
	for range o.r.IntN(3) * o.r.IntN(2) {
		of := c.Events[0].Stream
		if o.s.features.ForeignConditions {
			of = o.stream()
		}
		switch kind := o.r.IntN(4); {
		case kind == 0:
			c.Conditions = append(c.Conditions, eventstore.StreamExists(of))
		case kind == 1 && o.s.features.NoneMatch != 0:
			c.Conditions = append(c.Conditions, eventstore.NoneMatch(o.query(o.s.features.NoneMatch), o.position()))
		default:
			seen, err := all(o.model.Read(o.ctx, eventstore.OneStream(of), eventstore.ReadOptions{}))
			require.NoError(o.t, err)
			version := len(seen)
			if o.r.IntN(4) == 0 {
				version = o.r.IntN(4)
			}
			if version > 0 && version <= len(seen) && o.r.IntN(2) == 0 {
				follows := seen[version-1-o.r.IntN(2)*o.r.IntN(version)]
				c.Conditions = append(c.Conditions, eventstore.StreamAtEvent(of, uint64(version), follows.ID))
			} else {
				c.Conditions = append(c.Conditions, eventstore.StreamAt(of, eventstore.Revision{Version: uint64(version)}))
			}
		}
	}
	if o.r.IntN(3) == 0 {
		c.Key = fmt.Sprint("key", o.r.IntN(20))
		if o.s.features.KeyScope == KeysInStream {
			c.Key += c.Events[0].Stream.String() // the model's keys are those of the whole log
		}
		if o.r.IntN(2) == 0 {
			c.Fingerprint = fmt.Sprint("print", o.r.IntN(2))
		}
	}
	o.note("append %+v", c)
	theirs := c
	theirs.Conditions = slices.Clone(c.Conditions)
	for i := range theirs.Conditions {
		theirs.Conditions[i].After = o.real(theirs.Conditions[i].After)
	}
	want, wantErr := o.model.Append(o.ctx, c)
	got, gotErr := o.store.Append(o.ctx, theirs)
	o.sameError(wantErr, gotErr)
	if wantErr != nil {
		return
	}
	o.note("  -> %+v", want)
	if !want.Duplicate {
		written := mustRead(o.t, o.ctx, o.store, eventstore.All(), eventstore.ReadOptions{After: got.First - 1})
		require.Len(o.t, written, len(c.Events), "events written")
		for _, e := range written {
			o.positions = append(o.positions, e.Position)
		}
		if o.s.features.Contiguous {
			require.Equal(o.t, want.First, got.First, "the positions of a contiguous log")
		}
	}
	o.sameReceipt(want, got)
}

func (o *oracle) sameReceipt(want, got eventstore.Receipt) {
	want.First, want.Last = o.real(want.First), o.real(want.Last)
	want.Revisions = slices.Clone(want.Revisions)
	for i := range want.Revisions {
		want.Revisions[i].Revision.Position = o.real(want.Revisions[i].Revision.Position)
	}
	require.Equal(o.t, want, got, "receipt")
}

func (o *oracle) sameError(want, got error) {
	if want == nil {
		require.NoError(o.t, got, "on the memory store it succeeds")
		return
	}
	require.Error(o.t, got, "on the memory store it fails: %v", want)
	for _, kind := range []error{eventstore.ErrConflict, eventstore.ErrKeyReused, eventstore.ErrInvalid, eventstore.ErrTooLarge} {
		require.Equal(o.t, errors.Is(want, kind), errors.Is(got, kind), "is it %v: on the memory store the error is %q, here %q", kind, want, got)
	}
	var a, b *eventstore.ConflictError
	if errors.As(want, &a) && errors.As(got, &b) {
		require.Equal(o.t, a.Kind, b.Kind, "the first condition that fails is reported: %v, %v", want, got)
		require.Equal(o.t, a.Stream, b.Stream)
		require.Equal(o.t, a.Actual.Version, b.Actual.Version)
		require.Equal(o.t, o.real(a.Found), b.Found, "the first match")
	}
}

func (o *oracle) read() {
	q := o.query(o.s.features.Forward & o.s.features.Backward)
	options := eventstore.ReadOptions{After: o.position(), Through: o.position(), Backward: o.r.IntN(2) == 0}
	if o.s.features.Backward&kindOf(q) == 0 {
		options.Backward = false
	}
	if o.r.IntN(2) == 0 {
		options.Limit = 1 + o.r.IntN(6)
	}
	o.compareReads(q, options)
}

func (o *oracle) compareReads(q eventstore.Query, options eventstore.ReadOptions) {
	o.note("read %+v %+v", q, options)
	want, err := all(o.model.Read(o.ctx, q, options))
	require.NoError(o.t, err)
	options.After, options.Through = o.real(options.After), o.real(options.Through)
	got := mustRead(o.t, o.ctx, o.store, q, options)
	require.Equal(o.t, len(want), len(got), "events of %+v with %+v", q, options)
	for i := range want {
		w, g := want[i], got[i]
		require.Equal(o.t, o.real(w.Position), g.Position, "event %d of %+v with %+v", i, q, options)
		require.Equal(o.t, w.ID, g.ID)
		require.Equal(o.t, w.Version, g.Version)
		require.Equal(o.t, w.Stream, g.Stream)
		require.Equal(o.t, w.Type, g.Type)
		require.True(o.t, slices.Equal(w.Tags, g.Tags), "tags: want %q, got %q", w.Tags, g.Tags)
		require.Equal(o.t, string(w.Data), string(g.Data))
	}
}

func (o *oracle) lookup() {
	of, key := o.stream(), fmt.Sprint("key", o.r.IntN(20))
	if o.s.features.KeyScope == KeysInStream {
		key += of.String()
	}
	o.note("lookup %q of %q", key, of)
	want, wantUsed, err := o.model.Lookup(o.ctx, of, key)
	require.NoError(o.t, err)
	got, used := mustLookup(o.t, o.ctx, o.store, of, key)
	require.Equal(o.t, wantUsed, used, "was key %q used", key)
	if used {
		o.sameReceipt(want, got)
	}
}
