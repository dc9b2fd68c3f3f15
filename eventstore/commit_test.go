package eventstore_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/deed-go/deed/eventstore"
)

var (
	ann = eventstore.Stream{Category: "account", ID: "ann"}
	bob = eventstore.Stream{Category: "account", ID: "bob"}
	now = time.Date(2026, 2, 28, 12, 0, 0, 7, time.UTC)
)

func clock() time.Time { return now }

func one(change func(*eventstore.Event)) eventstore.Commit {
	e := eventstore.Event{Stream: ann, Type: "opened", Data: []byte(`{}`)}
	if change != nil {
		change(&e)
	}
	return eventstore.Commit{Events: []eventstore.Event{e}}
}

func TestCommit_Prepare_FillsIn(t *testing.T) {
	t.Parallel()
	id := uuid.MustParse("0190f5d1-6f2b-7cc3-98c4-dc0c0c07398f")
	local := time.Date(2026, 3, 1, 1, 2, 3, 4, time.FixedZone("plus", 3600))
	given := eventstore.Commit{Events: []eventstore.Event{{Stream: ann, Type: "a"}, {Stream: bob, Type: "b", ID: id, Time: local}, {Stream: ann, Type: "c"}}, Key: "k"}
	c, err := given.Prepare(eventstore.DefaultLimits(), clock)
	require.NoError(t, err)
	require.Equal(t, uuid.Nil, given.Events[0].ID, "the given commit is not changed")
	require.True(t, given.Events[0].Time.IsZero(), "the given commit is not changed")
	require.Empty(t, given.Fingerprint, "the given commit is not changed")
	require.Equal(t, uuid.Version(7), c.Events[0].ID.Version())
	require.NotEqual(t, c.Events[0].ID, c.Events[2].ID)
	require.Equal(t, now, c.Events[0].Time)
	require.Equal(t, now, c.Events[2].Time, "the events of a commit share one moment")
	require.Equal(t, id, c.Events[1].ID)
	require.Equal(t, local.UTC(), c.Events[1].Time)
	require.Equal(t, time.UTC, c.Events[1].Time.Location())
	require.Len(t, c.Fingerprint, 32)
	plain, err := one(nil).Prepare(eventstore.DefaultLimits(), clock)
	require.NoError(t, err)
	require.Empty(t, plain.Fingerprint, "without a key there is nothing to compare")
}

// The derived fingerprint is stored, so it is part of the stored contract. The
// value was computed by another program.
func TestCommit_Prepare_Fingerprint(t *testing.T) {
	t.Parallel()
	print := func(c eventstore.Commit) string {
		c.Key = "k"
		prepared, err := c.Prepare(eventstore.DefaultLimits(), clock)
		require.NoError(t, err)
		return prepared.Fingerprint
	}
	base := one(func(e *eventstore.Event) { e.Tags = []string{"t:1", "t:2"} })
	require.Equal(t, "39406d6a96c9e5f396de09e53503b172", print(base), "fingerprints are stored and must not change")
	require.Equal(t, print(base), print(one(func(e *eventstore.Event) {
		e.Tags = []string{"t:1", "t:2"}
		e.ID = uuid.New()
		e.Time = now
		e.Metadata.Actor = "ann"
	})), "id, time and metadata differ from attempt to attempt and do not count")
	explicit := base
	explicit.Fingerprint = "mine"
	require.Equal(t, "mine", print(explicit))
	seen := map[string]string{print(base): "base"}
	for name, c := range map[string]eventstore.Commit{
		"stream":    one(func(e *eventstore.Event) { e.Tags = []string{"t:1", "t:2"}; e.Stream = bob }),
		"type":      one(func(e *eventstore.Event) { e.Tags = []string{"t:1", "t:2"}; e.Type = "closed" }),
		"data":      one(func(e *eventstore.Event) { e.Tags = []string{"t:1", "t:2"}; e.Data = []byte(`[]`) }),
		"tag order": one(func(e *eventstore.Event) { e.Tags = []string{"t:2", "t:1"} }),
		"one tag":   one(func(e *eventstore.Event) { e.Tags = []string{"t:1t:2"} }),
		"no tags":   one(nil),
		"twice":     {Events: append(base.Events[:1:1], base.Events...)},
	} {
		p := print(c)
		require.Empty(t, seen[p], "%s has the fingerprint of %s", name, seen[p])
		seen[p] = name
	}
}

func TestCommit_Prepare_Refuses(t *testing.T) {
	t.Parallel()
	limits := eventstore.Limits{EventBytes: 100, EventsPerCommit: 2, TagsPerEvent: 2, Conditions: 1}
	keyed := func(key, fingerprint string) eventstore.Commit {
		c := one(nil)
		c.Key, c.Fingerprint = key, fingerprint
		return c
	}
	conditioned := func(conditions ...eventstore.Condition) eventstore.Commit {
		c := one(nil)
		c.Conditions = conditions
		return c
	}
	for _, c := range []struct {
		commit eventstore.Commit
		is     error
		says   string
	}{
		{eventstore.Commit{}, eventstore.ErrInvalid, "invalid: the commit has no events"},
		{eventstore.Commit{Events: make([]eventstore.Event, 3)}, eventstore.ErrTooLarge, "too large: the commit has 3 events, at most 2 are allowed"},
		{conditioned(eventstore.StreamExists(ann), eventstore.StreamExists(ann)), eventstore.ErrTooLarge, "too large: the commit has 2 conditions, at most 1 are allowed"},
		{conditioned(eventstore.Condition{}), eventstore.ErrInvalid, "condition 0: invalid: unknown condition kind 0: use StreamAt, StreamExists or NoneMatch"},
		{conditioned(eventstore.StreamExists(eventstore.Stream{Category: "a"})), eventstore.ErrInvalid, "condition 0: invalid: the stream id is empty"},
		{conditioned(eventstore.StreamAt(ann, eventstore.Revision{Position: 3})), eventstore.ErrInvalid, `condition 0: invalid: revision of "account-ann": version 0 has no position, got 3`},
		{conditioned(eventstore.StreamAtEvent(ann, 0, uuid.Max)), eventstore.ErrInvalid, `condition 0: invalid: revision of "account-ann": version 0 has no last event, got ffffffff-ffff-ffff-ffff-ffffffffffff`},
		{conditioned(eventstore.NoneMatch(eventstore.Query{}, 0)), eventstore.ErrInvalid, "condition 0: invalid: the query is empty: use eventstore.All() for everything, or give it items"},
		{conditioned(eventstore.NoneMatch(eventstore.Match(eventstore.Item{}), 0)), eventstore.ErrInvalid, "condition 0: query item 0: invalid: it constrains nothing: use eventstore.All() for everything"},
		{keyed("a\nb", ""), eventstore.ErrInvalid, `invalid: idempotency key "a\nb" has the control character U+000A at byte 1`},
		{keyed(strings.Repeat("k", 257), ""), eventstore.ErrTooLarge, `too large: idempotency key "` + strings.Repeat("k", 80) + `…" has 257 bytes, at most 256 are allowed`},
		{keyed("k", strings.Repeat("f", 257)), eventstore.ErrTooLarge, `too large: the fingerprint "` + strings.Repeat("f", 80) + `…" of key "k" has 257 bytes, at most 256 are allowed: use a hash`},
		{keyed("", "print"), eventstore.ErrInvalid, `invalid: the commit has the fingerprint "print" but no key`},
		{one(func(e *eventstore.Event) { e.Stream.Category = "bank-account" }), eventstore.ErrInvalid, `event 0: invalid: category "bank-account": '-' is not allowed at byte 4: use ASCII letters, digits, '.' and '_', beginning with a letter`},
		{one(func(e *eventstore.Event) { e.Type = "" }), eventstore.ErrInvalid, "event 0: invalid: the event type is empty"},
		{one(func(e *eventstore.Event) { e.Type = "\xff" }), eventstore.ErrInvalid, `event 0: invalid: event type "\xff" is not valid UTF-8`},
		{one(func(e *eventstore.Event) { e.Tags = []string{"a", "b", "c"} }), eventstore.ErrTooLarge, `event 0: too large: event "opened" has 3 tags, at most 2 are allowed`},
		{one(func(e *eventstore.Event) { e.Tags = []string{"a", ""} }), eventstore.ErrInvalid, `event 0: event "opened": invalid: the tag is empty`},
		{one(func(e *eventstore.Event) { e.Tags = []string{"a", "a"} }), eventstore.ErrInvalid, `event 0: invalid: event "opened" carries the tag "a" twice`},
		{one(func(e *eventstore.Event) { e.Metadata.SchemaVersion = -1 }), eventstore.ErrInvalid, `event 0: invalid: event "opened" has the schema version -1`},
		{one(func(e *eventstore.Event) { e.Data = make([]byte, 101) }), eventstore.ErrTooLarge, `event 0: too large: event "opened" of stream "account-ann" has 101 bytes, at most 100 are allowed: keep large content elsewhere and store a reference`},
		{one(func(e *eventstore.Event) { e.Time = time.Date(1500, 1, 1, 0, 0, 0, 0, time.UTC) }), eventstore.ErrInvalid, `event 0: invalid: event "opened" has the time 1500-01-01 00:00:00 +0000 UTC, outside the years 1678 to 2261`},
		{eventstore.Commit{Events: []eventstore.Event{one(nil).Events[0], {}}}, eventstore.ErrInvalid, `event 1: invalid: the category is empty: name the kind of stream, for example "account"`},
	} {
		_, err := c.commit.Prepare(limits, clock)
		require.EqualError(t, err, c.says)
		require.ErrorIs(t, err, c.is)
		require.False(t, eventstore.CanRetry(err))
	}
}

// What JSON would change on its way to the disk is refused: readers from memory
// and from the disk must see the same.
func TestCommit_Prepare_MetadataIsUTF8(t *testing.T) {
	t.Parallel()
	for says, change := range map[string]func(*eventstore.Metadata, string){
		`the correlation id "J\xf6rg"`:         func(m *eventstore.Metadata, s string) { m.CorrelationID = s },
		`the causation id "J\xf6rg"`:           func(m *eventstore.Metadata, s string) { m.CausationID = s },
		`the actor "J\xf6rg"`:                  func(m *eventstore.Metadata, s string) { m.Actor = s },
		`the trace parent "J\xf6rg"`:           func(m *eventstore.Metadata, s string) { m.TraceParent = s },
		`the codec "J\xf6rg"`:                  func(m *eventstore.Metadata, s string) { m.Codec = s },
		`the extra metadata "J\xf6rg": "b"`:    func(m *eventstore.Metadata, s string) { m.Extra = map[string]string{s: "b"} },
		`the extra metadata "name": "J\xf6rg"`: func(m *eventstore.Metadata, s string) { m.Extra = map[string]string{"name": s} },
	} {
		_, err := one(func(e *eventstore.Event) { change(&e.Metadata, "J\xf6rg") }).Prepare(eventstore.DefaultLimits(), clock)
		require.EqualError(t, err, `event 0: invalid: event "opened": `+says+` is not valid UTF-8`)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		_, err = one(func(e *eventstore.Event) { change(&e.Metadata, "Jörg") }).Prepare(eventstore.DefaultLimits(), clock)
		require.NoError(t, err)
	}
}

// The store's clock is no more trusted than the caller's.
func TestCommit_Prepare_ClockOutOfRange(t *testing.T) {
	t.Parallel()
	_, err := one(nil).Prepare(eventstore.DefaultLimits(), func() time.Time { return time.Date(2300, 1, 1, 0, 0, 0, 0, time.UTC) })
	require.EqualError(t, err, `event 0: invalid: event "opened" has the time 2300-01-01 00:00:00 +0000 UTC, outside the years 1678 to 2261`)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
}

// Every part of an event counts for its size.
func TestCommit_Prepare_EventBytes(t *testing.T) {
	t.Parallel()
	limits := eventstore.DefaultLimits()
	limits.EventBytes = 10
	for name, change := range map[string]func(*eventstore.Event, string){
		"data":        func(e *eventstore.Event, s string) { e.Data = []byte(s) },
		"tags":        func(e *eventstore.Event, s string) { e.Tags = []string{s[:4], s[:3], s[:len(s)-7]} },
		"correlation": func(e *eventstore.Event, s string) { e.Metadata.CorrelationID = s },
		"causation":   func(e *eventstore.Event, s string) { e.Metadata.CausationID = s },
		"actor":       func(e *eventstore.Event, s string) { e.Metadata.Actor = s },
		"trace":       func(e *eventstore.Event, s string) { e.Metadata.TraceParent = s },
		"codec":       func(e *eventstore.Event, s string) { e.Metadata.Codec = s },
		"extra":       func(e *eventstore.Event, s string) { e.Metadata.Extra = map[string]string{s[:5]: s[5:]} },
	} {
		sized := func(n int) error {
			_, err := one(func(e *eventstore.Event) {
				e.Data = nil
				change(e, strings.Repeat("x", n))
			}).Prepare(limits, clock)
			return err
		}
		if name == "tags" { // which must differ
			sized = func(n int) error {
				_, err := one(func(e *eventstore.Event) {
					e.Data, e.Tags = nil, []string{"aaaa", "bbbb", strings.Repeat("c", n-8)}
				}).Prepare(limits, clock)
				return err
			}
		}
		require.NoError(t, sized(10), "10 bytes of %s", name)
		require.ErrorIs(t, sized(11), eventstore.ErrTooLarge, "11 bytes of %s", name)
	}
}

// Preparing what was prepared changes nothing: backends may hand commits on.
func TestCommit_Prepare_IsIdempotent(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var c eventstore.Commit
		for range rapid.IntRange(1, 4).Draw(t, "events") {
			c.Events = append(c.Events, eventstore.Event{
				Stream: eventstore.Stream{Category: genCategory().Draw(t, "category"), ID: genID().Draw(t, "id")},
				Type:   rapid.StringMatching(`[a-z.]{1,20}`).Draw(t, "type"),
				Tags:   rapid.SliceOfNDistinct(rapid.StringMatching(`[a-z]:[0-9]{1,3}`), 0, 3, rapid.ID[string]).Draw(t, "tags"),
				Data:   rapid.SliceOfN(rapid.Byte(), 0, 30).Draw(t, "data"),
			})
		}
		if rapid.Bool().Draw(t, "keyed") {
			c.Key = rapid.StringMatching(`[a-z]{1,10}`).Draw(t, "key")
		}
		first, err := c.Prepare(eventstore.DefaultLimits(), clock)
		require.NoError(t, err)
		second, err := first.Prepare(eventstore.DefaultLimits(), func() time.Time { return now.Add(time.Hour) })
		require.NoError(t, err)
		require.Equal(t, first, second)
	})
}

func TestReceipt_Revision(t *testing.T) {
	t.Parallel()
	r := eventstore.Receipt{First: 4, Last: 6, Revisions: []eventstore.StreamRevision{{Stream: ann, Revision: eventstore.Revision{Version: 2, Position: 6}}}}
	require.Equal(t, eventstore.Revision{Version: 2, Position: 6}, r.Revision(ann))
	require.Equal(t, eventstore.Revision{}, r.Revision(bob))
	for _, p := range []eventstore.Positioned{r, eventstore.Position(6), eventstore.Recorded{Position: 6}} {
		require.Equal(t, eventstore.Position(6), p.At(), fmt.Sprintf("%T", p))
	}
}
