package nats

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

// names draws legal streams, with a taste for what means something in subjects.
func names() *rapid.Generator[eventstore.Stream] {
	return rapid.Custom(func(t *rapid.T) eventstore.Stream {
		of := eventstore.Stream{
			Category: rapid.StringMatching(`[A-Za-z][A-Za-z0-9._]{0,6}`).Draw(t, "category"),
			ID: rapid.OneOf(
				rapid.StringOfN(rapid.SampledFrom([]rune(".*> %2AaE-_/$\"'\\{}ü💥\u00a0\u2028é")), 1, 8, -1),
				rapid.String(),
			).Draw(t, "id"),
		}
		if of.Validate() != nil {
			t.Skip("not a legal name")
		}
		return of
	})
}

// No two streams share a subject, and the subject tells the stream.
func TestSubjects_NoTwoStreamsMeet(t *testing.T) {
	t.Parallel()
	s := subjects{"deed"}
	rapid.Check(t, func(t *rapid.T) {
		a, b := names().Draw(t, "a"), names().Draw(t, "b")
		require.Equal(t, a == b, s.of(a) == s.of(b), "%q and %q", a, b)
		for _, of := range []eventstore.Stream{a, b} {
			subject := s.of(of)
			back, err := s.stream(subject)
			require.NoError(t, err)
			require.Equal(t, of, back)
			tokens := strings.Split(subject, ".")
			require.Len(t, tokens, 4, "prefix, slice, category, id: %q", subject)
			for _, token := range tokens {
				require.NotEmpty(t, token)
				require.False(t, strings.ContainsAny(token, " \t\r\n*>\x00"), "%q", subject)
			}
		}
	})
}

// What of does not write, stream does not read: otherwise two subjects could
// mean one stream.
func TestSubjects_OneSpelling(t *testing.T) {
	t.Parallel()
	s := subjects{"deed"}
	good := s.of(eventstore.Stream{Category: "a.b", ID: "x y"})
	require.Equal(t, "deed.750.a%2Eb.x%20y", good)
	_, err := s.stream(good)
	require.NoError(t, err)
	for _, bad := range []string{
		"", "deed", "deed.conditions", "other.750.a%2Eb.x%20y", "deed.751.a%2Eb.x%20y", "deed.0750.a%2Eb.x%20y", "deed.750.a%2eb.x%20y",
		"deed.750.a%2Eb.%78%20y", "deed.750.a%2Eb.x%20y.z", "deed.750.a%2Eb.x%2", "deed.750.a%2Eb.x%ZZy", "deed.750.a%2Eb",
	} {
		_, err := s.stream(bad)
		require.ErrorIs(t, err, eventstore.ErrInvalid, "%q", bad)
	}
	rapid.Check(t, func(t *rapid.T) {
		subject := rapid.OneOf(rapid.String(), rapid.Custom(func(t *rapid.T) string {
			return "deed." + rapid.StringMatching(`[0-9]{1,4}\.[A-Za-z%0-9]{1,6}\.[A-Za-z%0-9]{1,6}`).Draw(t, "rest")
		})).Draw(t, "subject")
		if of, err := s.stream(subject); err == nil {
			require.Equal(t, subject, s.of(of))
		}
	})
}

// Names that are easily confused live side by side on a real server, one
// subject each.
func TestSubjects_OnTheServer(t *testing.T) {
	t.Parallel()
	store, _ := openLog(t, shared.get(t, 1))
	ids := []string{".", "..", "*", ">", "a.b", "a.*", "a.>", " ", "  ", " a", "a ", "%", "%2E", "%20", "a/b", `a\b`, "$JS", "ü", "u\u0308", "💥", "\u00a0", "\u2028", strings.Repeat(".", eventstore.MaxStreamIDBytes), strings.Repeat("💥", eventstore.MaxStreamIDBytes/4)}
	var streams []eventstore.Stream
	for _, id := range ids {
		for _, category := range []string{"a", "a.b", "a_b", "A"} {
			streams = append(streams, eventstore.Stream{Category: category, ID: id})
		}
	}
	for n, of := range streams {
		c := eventstore.Commit{Events: happened(of, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{})}}
		c.Events[0].Type = fmt.Sprint(n)
		_, err := store.Append(t.Context(), c)
		require.NoError(t, err, "%q", of)
	}
	for n, of := range streams {
		got := read(t, store, eventstore.OneStream(of), eventstore.ReadOptions{})
		require.Len(t, got, 1, "%q", of)
		require.Equal(t, of, got[0].Stream)
		require.Equal(t, fmt.Sprint(n), got[0].Type)
	}
	require.Len(t, read(t, store, eventstore.OneCategory("a.b"), eventstore.ReadOptions{}), len(ids))
	require.Len(t, read(t, store, eventstore.OneCategory("a"), eventstore.ReadOptions{}), len(ids))
}

func read(t testing.TB, s eventstore.Store, q eventstore.Query, o eventstore.ReadOptions) []eventstore.Recorded {
	t.Helper()
	var all []eventstore.Recorded
	for r, err := range s.Read(t.Context(), q, o) {
		require.NoError(t, err)
		all = append(all, r)
	}
	return all
}

// Every legal event comes back as it was, through the real server.
func TestMessages_ComeBack(t *testing.T) {
	t.Parallel()
	store, _ := openLog(t, shared.get(t, 1))
	text := rapid.OneOf(rapid.StringOfN(rapid.SampledFrom([]rune(" \"\\%:;,.üé💥\u00a0\u2028a")), 1, 20, -1), rapid.String())
	rapid.Check(t, func(t *rapid.T) {
		of := eventstore.Stream{Category: "a", ID: uuid.NewString()}
		e := eventstore.Event{
			ID: uuid.New(), Stream: of, Type: text.Draw(t, "type"), Data: rapid.SliceOf(rapid.Byte()).Draw(t, "data"),
			Tags: rapid.SliceOfNDistinct(text, 0, 5, rapid.ID).Draw(t, "tags"), Time: time.Unix(0, rapid.Int64Range(-9e18, 9e18).Draw(t, "time")).UTC(),
			Metadata: eventstore.Metadata{Actor: text.Draw(t, "actor"), Extra: rapid.MapOfN(text, text, 0, 3).Draw(t, "extra")},
		}
		if rapid.IntRange(0, 3).Draw(t, "large") == 0 {
			e.Metadata.Extra["large"] = strings.Repeat("\"ü", 8<<10)
		}
		c := eventstore.Commit{Events: []eventstore.Event{e}, Key: text.Draw(t, "key"), Fingerprint: string(rapid.SliceOfN(rapid.Byte(), 1, 20).Draw(t, "fingerprint"))}
		if _, err := c.Prepare(eventstore.DefaultLimits(), time.Now); err != nil {
			t.Skip("not legal")
		}
		r, err := store.Append(t.Context(), c)
		require.NoError(t, err)
		m, err := store.at(t.Context(), uint64(r.First))
		require.NoError(t, err)
		require.Equal(t, e.ID, m.ID)
		require.Equal(t, e.Type, m.Type)
		require.Equal(t, string(e.Data), string(m.Data))
		require.ElementsMatch(t, e.Tags, m.Tags)
		require.True(t, e.Time.Equal(m.Time))
		require.Equal(t, e.Metadata.Actor, m.Metadata.Actor)
		require.Equal(t, len(e.Metadata.Extra), len(m.Metadata.Extra))
		for k, v := range e.Metadata.Extra {
			require.Equal(t, v, m.Metadata.Extra[k])
		}
		require.Equal(t, c.Key, m.key)
		require.Equal(t, c.Fingerprint, m.fingerprint)
	})
}
