package eventstore_test

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/deed-go/deed/eventstore"
)

func TestQuery_Matches(t *testing.T) {
	t.Parallel()
	r := eventstore.Recorded{Stream: ann, Type: "enrolled", Tags: []string{"course:c1", "student:s1"}}
	slice := ann.Slice()
	for _, c := range []struct {
		name  string
		query eventstore.Query
		want  bool
	}{
		{"everything", eventstore.All(), true},
		{"nothing", eventstore.Query{}, false},
		{"its stream", eventstore.OneStream(ann), true},
		{"another stream", eventstore.OneStream(bob), false},
		{"its category", eventstore.OneCategory("account"), true},
		{"a longer category", eventstore.OneCategory("accounting"), false},
		{"a prefix of its category", eventstore.OneCategory("acc"), false},
		{"its type", eventstore.OfTypes("enrolled"), true},
		{"any of the types", eventstore.OfTypes("left", "enrolled"), true},
		{"another type", eventstore.OfTypes("enrol"), false},
		{"one of its tags", eventstore.Tagged("student:s1"), true},
		{"all of its tags", eventstore.Tagged("student:s1", "course:c1"), true},
		{"one tag too many", eventstore.Tagged("student:s1", "course:c1", "x"), false},
		{"type and tag", eventstore.Match(eventstore.Item{Types: []string{"enrolled"}, Tags: []string{"course:c1"}}), true},
		{"type, but not the tag", eventstore.Match(eventstore.Item{Types: []string{"enrolled"}, Tags: []string{"course:c2"}}), false},
		{"tag, but not the type", eventstore.Match(eventstore.Item{Types: []string{"left"}, Tags: []string{"course:c1"}}), false},
		{"its slice", eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: slice, To: slice + 1}}), true},
		{"the slice before", eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: slice - 1, To: slice}}), false},
		{"the slice after", eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: slice + 1, To: slice + 2}}), false},
		{"either of two items", eventstore.Match(eventstore.Item{Types: []string{"left"}}, eventstore.Item{Category: "account"}), true},
		{"neither of two items", eventstore.Match(eventstore.Item{Types: []string{"left"}}, eventstore.Item{Category: "x"}), false},
	} {
		require.Equal(t, c.want, c.query.Matches(&r), c.name)
	}
}

func TestQuery_Validate(t *testing.T) {
	t.Parallel()
	for _, q := range []eventstore.Query{
		eventstore.All(), eventstore.OneStream(ann), eventstore.OneCategory("a"), eventstore.OfTypes("t"), eventstore.Tagged("t"),
		eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 0, To: 1024}}),
	} {
		require.NoError(t, q.Validate(), "%+v", q)
	}
	for says, q := range map[string]eventstore.Query{
		"invalid: the query is empty: use eventstore.All() for everything, or give it items":                                                 {},
		"invalid: the query asks for everything and for 1 items: choose one":                                                                 {Everything: true, Items: []eventstore.Item{{Category: "a"}}},
		"query item 1: invalid: it constrains nothing: use eventstore.All() for everything":                                                  eventstore.Match(eventstore.Item{Category: "a"}, eventstore.Item{}),
		"query item 0: invalid: it constrains nothing: use eventstore.All() for everything":                                                  eventstore.OfTypes(),
		"query item 0: invalid: the stream id is empty":                                                                                      eventstore.OneStream(eventstore.Stream{Category: "a"}),
		"query item 0: invalid: the event type is empty":                                                                                     eventstore.OfTypes("a", ""),
		`query item 0: invalid: tag "\x00" has the control character U+0000 at byte 0`:                                                       eventstore.Tagged("\x00"),
		"query item 0: invalid: the slice range [5, 5) is empty or beyond 1024":                                                              eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 5, To: 5}}),
		"query item 0: invalid: the slice range [0, 1025) is empty or beyond 1024":                                                           eventstore.Match(eventstore.Item{Slices: eventstore.SliceRange{From: 0, To: 1025}}),
		`query item 0: invalid: category "é": 'é' is not allowed at byte 0: use ASCII letters, digits, '.' and '_', beginning with a letter`: eventstore.OneCategory("é"),
	} {
		err := q.Validate()
		require.EqualError(t, err, says)
		require.ErrorIs(t, err, eventstore.ErrInvalid)
	}
	require.EqualError(t, eventstore.ReadOptions{Limit: -1}.Validate(), "invalid: read limit -1 is negative: use 0 for no limit")
	require.NoError(t, eventstore.ReadOptions{}.Validate())
}

func TestQuery_Validate_Limits(t *testing.T) {
	t.Parallel()
	names := func(n int) []string { return slices.Repeat([]string{"a"}, n) }
	items := func(n int) eventstore.Query {
		return eventstore.Match(slices.Repeat([]eventstore.Item{{Category: "a"}}, n)...)
	}
	for _, c := range []struct {
		most int
		make func(int) eventstore.Query
		says string
	}{
		{eventstore.MaxQueryItems, items, "too large: the query has 101 items, at most 100 are allowed"},
		{eventstore.MaxItemTypes, func(n int) eventstore.Query { return eventstore.OfTypes(names(n)...) }, "query item 0: too large: it has 1001 types, at most 1000 are allowed: divide them among several items"},
		{eventstore.MaxItemTags, func(n int) eventstore.Query { return eventstore.Tagged(names(n)...) }, "query item 0: too large: it has 33 tags, at most 32 are allowed"},
	} {
		require.NoError(t, c.make(c.most).Validate())
		err := c.make(c.most + 1).Validate()
		require.EqualError(t, err, c.says)
		require.ErrorIs(t, err, eventstore.ErrTooLarge)
		commit := one(nil)
		commit.Conditions = []eventstore.Condition{eventstore.NoneMatch(c.make(c.most+1), 0)}
		_, err = commit.Prepare(eventstore.DefaultLimits(), clock)
		require.EqualError(t, err, "condition 0: "+c.says)
	}
}

// An item with more types matches more, with more tags less; more items match more.
func TestQuery_IsMonotonic(t *testing.T) {
	t.Parallel()
	word := rapid.SampledFrom([]string{"a", "b", "c"})
	rapid.Check(t, func(t *rapid.T) {
		r := eventstore.Recorded{Stream: ann, Type: word.Draw(t, "type"), Tags: rapid.SliceOfDistinct(word, rapid.ID[string]).Draw(t, "tags")}
		item := eventstore.Item{Types: rapid.SliceOf(word).Draw(t, "types"), Tags: rapid.SliceOf(word).Draw(t, "all of")}
		extra := word.Draw(t, "extra")
		matched := item.Matches(&r)
		if len(item.Types) > 0 {
			more := item
			more.Types = append(slices.Clone(item.Types), extra)
			require.True(t, more.Matches(&r) || !matched, "one more type can only add")
		}
		fewer := item
		fewer.Tags = append(slices.Clone(item.Tags), extra)
		require.True(t, matched || !fewer.Matches(&r), "one more tag can only take away")
		require.Equal(t, matched || extra == r.Type, eventstore.Match(item, eventstore.Item{Types: []string{extra}}).Matches(&r))
	})
}
