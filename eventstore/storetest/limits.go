package storetest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

var limitChecks = []check{
	{
		name: "Names",
		rule: "every rule for names is checked before anything is written; the error is ErrInvalid or ErrTooLarge and quotes the input",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			good := eventstore.Commit{Events: []eventstore.Event{event(account("ann"), "a", "tag")}}
			for _, c := range []struct {
				name   string
				change func(*eventstore.Event)
				is     error
				quotes string
			}{
				{"no category", func(e *eventstore.Event) { e.Stream.Category = "" }, eventstore.ErrInvalid, "category"},
				{"dash in category", func(e *eventstore.Event) { e.Stream.Category = "bank-account" }, eventstore.ErrInvalid, `"bank-account"`},
				{"space in category", func(e *eventstore.Event) { e.Stream.Category = "bank account" }, eventstore.ErrInvalid, `"bank account"`},
				{"digit first", func(e *eventstore.Event) { e.Stream.Category = "1account" }, eventstore.ErrInvalid, `"1account"`},
				{"umlaut in category", func(e *eventstore.Event) { e.Stream.Category = "büro" }, eventstore.ErrInvalid, "büro"},
				{"long category", func(e *eventstore.Event) { e.Stream.Category = strings.Repeat("c", eventstore.MaxCategoryBytes+1) }, eventstore.ErrTooLarge, "ccc"},
				{"no id", func(e *eventstore.Event) { e.Stream.ID = "" }, eventstore.ErrInvalid, "stream id"},
				{"long id", func(e *eventstore.Event) { e.Stream.ID = strings.Repeat("i", eventstore.MaxStreamIDBytes+1) }, eventstore.ErrTooLarge, "iii"},
				{"control character in id", func(e *eventstore.Event) { e.Stream.ID = "a\nb" }, eventstore.ErrInvalid, `a\nb`},
				{"zero byte in id", func(e *eventstore.Event) { e.Stream.ID = "a\x00b" }, eventstore.ErrInvalid, `a\x00b`},
				{"id not UTF-8", func(e *eventstore.Event) { e.Stream.ID = "a\xffb" }, eventstore.ErrInvalid, `a\xffb`},
				{"no type", func(e *eventstore.Event) { e.Type = "" }, eventstore.ErrInvalid, "event type"},
				{"long type", func(e *eventstore.Event) { e.Type = strings.Repeat("t", eventstore.MaxEventTypeBytes+1) }, eventstore.ErrTooLarge, "ttt"},
				{"control character in type", func(e *eventstore.Event) { e.Type = "a\tb" }, eventstore.ErrInvalid, `a\tb`},
				{"type not UTF-8", func(e *eventstore.Event) { e.Type = "\xc3" }, eventstore.ErrInvalid, `\xc3`},
				{"empty tag", func(e *eventstore.Event) { e.Tags = []string{"a", ""} }, eventstore.ErrInvalid, "tag"},
				{"long tag", func(e *eventstore.Event) { e.Tags = []string{strings.Repeat("g", eventstore.MaxTagBytes+1)} }, eventstore.ErrTooLarge, "ggg"},
				{"tag twice", func(e *eventstore.Event) { e.Tags = []string{"twice", "x", "twice"} }, eventstore.ErrInvalid, "twice"},
				{"control character in tag", func(e *eventstore.Event) { e.Tags = []string{"a\rb"} }, eventstore.ErrInvalid, `a\rb`},
				{"negative schema version", func(e *eventstore.Event) { e.Metadata.SchemaVersion = -3 }, eventstore.ErrInvalid, "-3"},
				{"year 1", func(e *eventstore.Event) { e.Time = time.Date(1, 1, 2, 0, 0, 0, 0, time.UTC) }, eventstore.ErrInvalid, "0001"},
				{"year 2500", func(e *eventstore.Event) { e.Time = time.Date(2500, 1, 1, 0, 0, 0, 0, time.UTC) }, eventstore.ErrInvalid, "2500"},
			} {
				unchanged(t, ctx, store, func() {
					e := good.Events[0]
					c.change(&e)
					_, err := store.Append(ctx, commit(good.Events[0], e))
					require.ErrorIs(t, err, c.is, c.name)
					require.ErrorContains(t, err, c.quotes, "%s: the error quotes the input", c.name)
					require.False(t, eventstore.CanRetry(err), "%s: the same input will be refused again", c.name)
				})
			}
		},
	},
	{
		name: "LongestNames",
		rule: "names of exactly the largest allowed size are kept, in queries and conditions too",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			of := stream("c"+strings.Repeat("9", eventstore.MaxCategoryBytes-1), strings.Repeat("ü", eventstore.MaxStreamIDBytes/2))
			e := event(of, strings.Repeat("t", eventstore.MaxEventTypeBytes), strings.Repeat("g", eventstore.MaxTagBytes))
			c := eventstore.Commit{Events: []eventstore.Event{e}, Key: strings.Repeat("k", eventstore.MaxKeyBytes), Fingerprint: strings.Repeat("f", eventstore.MaxKeyBytes)}
			c.Conditions = []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{})}
			first := mustAppend(t, ctx, store, c)
			again, err := store.Append(ctx, c)
			require.NoError(t, err)
			mustDuplicate(t, first, again)
			for _, q := range []eventstore.Query{eventstore.OneStream(of), eventstore.OneCategory(of.Category), eventstore.OfTypes(e.Type), eventstore.Tagged(e.Tags...)} {
				if s.features.Forward&kindOf(q) == 0 {
					continue
				}
				got := mustRead(t, ctx, store, q, eventstore.ReadOptions{})
				require.Len(t, got, 1)
				require.Equal(t, of, got[0].Stream)
				require.Equal(t, e.Type, got[0].Type)
				require.Equal(t, e.Tags, got[0].Tags)
			}
		},
	},
	{
		name: "Keys",
		rule: "keys and fingerprints obey the rules for names",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			for _, c := range []struct {
				name, key, fingerprint string
				is                     error
				quotes                 string
			}{
				{"long key", strings.Repeat("k", eventstore.MaxKeyBytes+1), "", eventstore.ErrTooLarge, "kkk"},
				{"control character", "a\nb", "", eventstore.ErrInvalid, `a\nb`},
				{"not UTF-8", "a\xff", "", eventstore.ErrInvalid, `a\xff`},
				{"long fingerprint", "k", strings.Repeat("f", eventstore.MaxKeyBytes+1), eventstore.ErrTooLarge, "fff"},
				{"fingerprint without key", "", "fingerprint", eventstore.ErrInvalid, "fingerprint"},
			} {
				unchanged(t, ctx, store, func() {
					_, err := store.Append(ctx, eventstore.Commit{Events: events(account("ann"), 1), Key: c.key, Fingerprint: c.fingerprint})
					require.ErrorIs(t, err, c.is, c.name)
					require.ErrorContains(t, err, c.quotes, "%s: the error quotes the input", c.name)
				})
			}
		},
	},
	{
		name: "Sizes",
		rule: "the declared limits are real: exactly the limit is kept, one more is ErrTooLarge and writes nothing",
		run: func(t testing.TB, s *suite) {
			ctx, store := s.context(t), s.open(t)
			ann, limits := account("ann"), s.features.Limits
			tooLarge := func(what string, c eventstore.Commit) {
				unchanged(t, ctx, store, func() {
					_, err := store.Append(ctx, c)
					require.ErrorIs(t, err, eventstore.ErrTooLarge, "one more than the declared limit of %s", what)
					require.ErrorContains(t, err, "at most", "the error names the limit")
				})
			}
			sized := func(n int) eventstore.Event {
				e := event(ann, "a", "tag")
				e.Metadata = eventstore.Metadata{Actor: "ann", Extra: map[string]string{"k": "v"}}
				e.Data = make([]byte, n-len("tag")-len("ann")-2)
				for i := range e.Data {
					e.Data[i] = byte(i * 7)
				}
				return e
			}
			tooLarge("bytes of an event", commit(sized(limits.EventBytes+1)))
			mustAppend(t, ctx, store, commit(sized(limits.EventBytes)))
			got := mustRead(t, ctx, store, eventstore.OneStream(ann), eventstore.ReadOptions{})
			require.Equal(t, string(sized(limits.EventBytes).Data), string(got[0].Data), "the largest event comes back whole")

			tooLarge("events of a commit", commit(events(ann, limits.EventsPerCommit+1)...))
			r := mustAppend(t, ctx, store, commit(events(ann, limits.EventsPerCommit)...))
			require.Equal(t, uint64(1+limits.EventsPerCommit), r.Revision(ann).Version)

			tagged := func(n int) eventstore.Event {
				e := event(ann, "a")
				for i := range n {
					e.Tags = append(e.Tags, fmt.Sprint("t:", i))
				}
				return e
			}
			tooLarge("tags of an event", commit(tagged(limits.TagsPerEvent+1)))
			mustAppend(t, ctx, store, commit(tagged(limits.TagsPerEvent)))

			conditioned := func(n int) eventstore.Commit {
				c := commit(event(ann, "a"))
				for range n {
					c.Conditions = append(c.Conditions, eventstore.StreamExists(ann))
				}
				return c
			}
			tooLarge("conditions of a commit", conditioned(limits.Conditions+1))
			mustAppend(t, ctx, store, conditioned(limits.Conditions))
		},
	},
}
