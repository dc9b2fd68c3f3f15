package eventstore_test

import (
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/deed-go/deed/eventstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The slice of a stream is stored by every backend and divides work among
// nodes: it must never change. The values were computed by another program.
func TestStream_Slice(t *testing.T) {
	t.Parallel()
	for name, slice := range map[string]uint16{
		"account-ann":     770,
		"account-bob":     66,
		"order-1":         109,
		"order-2":         852,
		"a-1":             582,
		"A-1":             166,
		"fine-A1":         646,
		"buro-x":          606,
		"account-ünïcödé": 924,
		"account--":       906,
		"account-0190f5d1-6f2b-7cc3-98c4-dc0c0c07398f": 247,
		"x.y_z9-id with spaces":                        427,
		"saga.transfer-42":                             95,
	} {
		s, err := eventstore.ParseStream(name)
		require.NoError(t, err)
		require.Equal(t, slice, s.Slice(), "slice of %q", name)
	}
	require.Equal(t, 1024, eventstore.Slices)
}

func genCategory() *rapid.Generator[string] {
	return rapid.StringMatching(`[a-zA-Z][a-zA-Z0-9._]{0,63}`)
}

func genID() *rapid.Generator[string] {
	return rapid.StringN(1, 120, eventstore.MaxStreamIDBytes).Filter(func(id string) bool {
		return strings.IndexFunc(id, unicode.IsControl) < 0
	})
}

func TestStream_ParseIsTheInverseOfString(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := eventstore.Stream{Category: genCategory().Draw(t, "category"), ID: genID().Draw(t, "id")}
		require.NoError(t, s.Validate())
		parsed, err := eventstore.ParseStream(s.String())
		require.NoError(t, err)
		require.Equal(t, s, parsed)
		require.Less(t, s.Slice(), uint16(eventstore.Slices))
	})
}

func TestStream_NoTwoShareAName(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		id := rapid.StringMatching(`[a-b-]{1,4}`)
		category := rapid.StringMatching(`[a-b]{1,2}`)
		a := eventstore.Stream{Category: category.Draw(t, "category"), ID: id.Draw(t, "id")}
		b := eventstore.Stream{Category: category.Draw(t, "other category"), ID: id.Draw(t, "other id")}
		require.Equal(t, a == b, a.String() == b.String())
	})
}

func TestParseStream_Mistakes(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"":                                `invalid: stream name "" has no '-' between category and id`,
		"account":                         `invalid: stream name "account" has no '-' between category and id`,
		"-ann":                            `invalid: the category is empty: name the kind of stream, for example "account"`,
		"account-":                        `invalid: the stream id is empty`,
		"1a-x":                            `invalid: category "1a": '1' is not allowed at byte 0: use ASCII letters, digits, '.' and '_', beginning with a letter`,
		"a b-x":                           `invalid: category "a b": ' ' is not allowed at byte 1: use ASCII letters, digits, '.' and '_', beginning with a letter`,
		"a-x\ty":                          `invalid: stream id "x\ty" has the control character U+0009 at byte 1`,
		"a-x\u0085":                       `invalid: stream id "x\u0085" has the control character U+0085 at byte 1`,
		"a-\xff":                          `invalid: stream id "\xff" is not valid UTF-8`,
		strings.Repeat("c", 65) + "-x":    `too large: category "` + strings.Repeat("c", 65) + `" has 65 bytes, at most 64 are allowed`,
		"a-" + strings.Repeat("i", 1+512): `too large: stream id "` + strings.Repeat("i", 80) + `…" has 513 bytes, at most 512 are allowed`,
	} {
		_, err := eventstore.ParseStream(name)
		require.EqualError(t, err, want)
	}
}

func FuzzParseStream(f *testing.F) {
	for _, name := range []string{"account-ann", "a-", "-", "a--", "a.b_C9-ü 💥", "a-\x00", "a-\xff", strings.Repeat("c", 65) + "-x", "a-" + strings.Repeat("i", 513)} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		s, err := eventstore.ParseStream(name)
		if err != nil {
			require.True(t, isInput(err), "%v", err)
			return
		}
		require.Equal(t, name, s.String())
		require.NoError(t, s.Validate())
		require.NotContains(t, s.Category, "-")
		require.NotZero(t, len(s.ID))
	})
}
