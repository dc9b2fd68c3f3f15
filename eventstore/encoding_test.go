package eventstore_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

func isInput(err error) bool {
	return errors.Is(err, eventstore.ErrInvalid) || errors.Is(err, eventstore.ErrTooLarge)
}

// wordCodec is a codec that is not JSON: the value's fmt form, reversed.
type wordCodec struct{ name string }

type word string

func (c wordCodec) Name() string { return c.name }

func (c wordCodec) Marshal(value any) ([]byte, error) {
	w, ok := value.(word)
	if !ok {
		return nil, fmt.Errorf("%T is not a word", value)
	}
	return []byte(c.name + ":" + string(w)), nil
}

func (c wordCodec) Unmarshal(data []byte, pointer any) error {
	text, ok := strings.CutPrefix(string(data), c.name+":")
	if !ok {
		return fmt.Errorf("%q was not written by %q", data, c.name)
	}
	*pointer.(*word) = word(text)
	return nil
}

func mustEncoding(t testing.TB, options ...eventstore.EncodingOption) *eventstore.Encoding {
	t.Helper()
	e, err := eventstore.NewEncoding(options...)
	require.NoError(t, err)
	return e
}

func recorded(eventType string, schema int, data string) eventstore.Recorded {
	return eventstore.Recorded{
		Stream: eventstore.Stream{Category: "account", ID: "ann"}, Version: 3, Position: 7, Type: eventType,
		Data: []byte(data), Metadata: eventstore.Metadata{SchemaVersion: schema},
	}
}

// The semantics of encoding/json are part of the stored contract: what is
// written and what is read must agree with the standard library.
func TestJSON_HasTheSemanticsOfTheStandardLibrary(t *testing.T) {
	t.Parallel()
	type base struct{ ID string }
	type value struct {
		base
		Renamed  string            `json:"other"`
		Empty    string            `json:",omitempty"`
		Skipped  int               `json:"-"`
		Quoted   int               `json:",string"`
		Nil      []int             // null
		NilMap   map[string]string // null
		Bytes    []byte            // base64
		Array    [2]int
		Map      map[string]int // sorted
		Duration time.Duration  // nanoseconds
		At       time.Time
		Zero     time.Time `json:",omitzero"`
		HTML     string
		Any      any
		Raw      json.RawMessage
		Pointer  *int
		hidden   int
	}
	five := 5
	for _, v := range []value{
		{Raw: json.RawMessage(`null`)},
		{
			base: base{"i"}, Renamed: "r", Empty: "e", Skipped: 3, Quoted: 4, Nil: []int{}, NilMap: map[string]string{}, Bytes: []byte{0, 255}, Array: [2]int{1, 2},
			Map: map[string]int{"b": 1, "a": 2}, Duration: time.Second, At: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), HTML: "<a href='x'>&\u2028",
			Any: map[string]any{"z": []any{1.5, nil, "y"}}, Raw: json.RawMessage(`{"a":[1]}`), Pointer: &five, hidden: 1,
		},
	} {
		want, err := json.Marshal(v)
		require.NoError(t, err)
		got, err := eventstore.JSON().Marshal(v)
		require.NoError(t, err)
		require.Equal(t, string(want), string(got))
		var a, b value
		require.NoError(t, json.Unmarshal(want, &a))
		require.NoError(t, eventstore.JSON().Unmarshal(want, &b))
		require.Equal(t, a, b)
	}
	for _, data := range []string{
		`{"ID":"a","unknown":{"deep":[{}]}}`, `{"id":"case does not matter"}`, `{"ID":"first","ID":"second"}`, `{"Array":[1]}`, `{"Array":[1,2,3]}`, `{"Nil":null,"Pointer":null}`,
		`{"Quoted":"7"}`, `{"Quoted":7}`, `{"ID":5}`, `{"Array":"x"}`, `{"At":"yesterday"}`, `{`, ``, `{} {}`, `null`, `[]`, "{\"ID\":\"\xff\"}", `{"ID":"\ud800"}`,
	} {
		var a, b value
		wantErr, gotErr := json.Unmarshal([]byte(data), &a), eventstore.JSON().Unmarshal([]byte(data), &b)
		require.Equal(t, wantErr == nil, gotErr == nil, "%s: the standard library says %v, deed says %v", data, wantErr, gotErr)
		if wantErr == nil {
			require.Equal(t, a, b, data)
		}
	}
}

func TestEncoding_CodecByType(t *testing.T) {
	t.Parallel()
	words, other := wordCodec{"words"}, wordCodec{"other"}
	e := mustEncoding(t, eventstore.UseCodec(words, "said", "shouted"), eventstore.UseCodec(other, "whispered"))
	encode := func(eventType string, value any) (eventstore.Recorded, error) {
		var m eventstore.Metadata
		data, err := e.Encode(eventType, value, &m)
		return eventstore.Recorded{Type: eventType, Data: data, Metadata: m}, err
	}
	for eventType, stored := range map[string]string{"said": "words:hello", "shouted": "words:hello", "whispered": "other:hello", "noted": `"hello"`} {
		r, err := encode(eventType, word("hello"))
		require.NoError(t, err)
		require.Equal(t, stored, string(r.Data))
		var back word
		require.NoError(t, e.Decode(r, &back))
		require.Equal(t, word("hello"), back, eventType)
	}
	_, err := encode("said", 5)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.EqualError(t, err, `invalid: event "said" does not encode: int is not a word`)

	// What was stored as JSON before the codec was chosen stays readable, and so
	// does what the codec wrote once the type is back at JSON.
	var back word
	require.NoError(t, e.Decode(recorded("said", 0, `"plain"`), &back))
	require.Equal(t, word("plain"), back)
	old := recorded("noted", 0, "words:old")
	old.Metadata.Codec = "words"
	require.NoError(t, e.Decode(old, &back))
	require.Equal(t, word("old"), back)

	// A codec for everything else.
	all := mustEncoding(t, eventstore.UseCodec(words), eventstore.UseCodec(eventstore.JSON(), "noted"))
	var m eventstore.Metadata
	data, err := all.Encode("anything", word("x"), &m)
	require.NoError(t, err)
	require.Equal(t, "words:x", string(data))
	require.Equal(t, "words", m.Codec)
	data, err = all.Encode("noted", word("x"), &m)
	require.NoError(t, err)
	require.Equal(t, `"x"`, string(data))
	require.Empty(t, m.Codec, "what an earlier value left in the metadata must not remain")
}

type (
	openedV1 struct{ Name string }
	openedV2 struct{ First, Last string }
	openedV3 struct {
		First, Last string
		Country     string
	}
)

func accountEncoding(t testing.TB) *eventstore.Encoding {
	return mustEncoding(t,
		eventstore.Upcast("account.opened", 1, func(old openedV1) (openedV2, error) {
			first, last, found := strings.Cut(old.Name, " ")
			if !found {
				return openedV2{}, fmt.Errorf("name %q has no last name", old.Name)
			}
			return openedV2{First: first, Last: last}, nil
		}),
		eventstore.Upcast("account.opened", 2, func(old openedV2) (openedV3, error) {
			return openedV3{First: old.First, Last: old.Last, Country: "nl"}, nil
		}),
		eventstore.Upcast("account.created", 1, func(old struct{ Who string }) (openedV1, error) { return openedV1{Name: old.Who}, nil }),
		eventstore.Rename("account.created", "account.opened"),
		eventstore.Rename("account.made", "account.created"),
	)
}

// Schema says beforehand what Encode stores.
func TestEncoding_Schema(t *testing.T) {
	t.Parallel()
	e := mustEncoding(t, eventstore.UseCodec(wordCodec{"words"}, "said"),
		eventstore.UpcastBytes("noted", 1, func(data []byte) ([]byte, error) { return data, nil }))
	for _, c := range []struct {
		encoding  *eventstore.Encoding
		eventType string
		version   int
		codec     string
	}{{e, "said", 1, "words"}, {e, "noted", 2, ""}, {e, "other", 1, ""}, {nil, "said", 1, ""}} {
		version, codec := c.encoding.Schema(c.eventType)
		require.Equal(t, c.version, version, c.eventType)
		require.Equal(t, c.codec, codec, c.eventType)
		var m eventstore.Metadata
		_, err := c.encoding.Encode(c.eventType, word("x"), &m)
		require.NoError(t, err)
		require.Equal(t, max(m.SchemaVersion, 1), version)
		require.Equal(t, m.Codec, codec)
	}
}

func TestEncoding_Upcasters(t *testing.T) {
	t.Parallel()
	e := accountEncoding(t)
	want := openedV3{First: "Ann", Last: "Lee", Country: "nl"}
	for name, r := range map[string]eventstore.Recorded{
		"no schema version means 1":              recorded("account.opened", 0, `{"Name":"Ann Lee"}`),
		"version 1":                              recorded("account.opened", 1, `{"Name":"Ann Lee"}`),
		"version 2":                              recorded("account.opened", 2, `{"First":"Ann","Last":"Lee"}`),
		"version 3":                              recorded("account.opened", 3, `{"First":"Ann","Last":"Lee","Country":"nl"}`),
		"renamed, after its own upcaster":        recorded("account.created", 2, `{"Name":"Ann Lee"}`),
		"renamed, by its own upcaster":           recorded("account.created", 0, `{"Who":"Ann Lee"}`),
		"renamed twice":                          recorded("account.made", 0, `{"Who":"Ann Lee"}`),
		"unknown fields are left out on the way": recorded("account.opened", 1, `{"Name":"Ann Lee","Extra":true}`),
	} {
		var got openedV3
		require.NoError(t, e.Decode(r, &got), name)
		require.Equal(t, want, got, name)
		up, err := e.Upcast(r)
		require.NoError(t, err)
		require.Equal(t, "account.opened", up.Type, name)
		require.Equal(t, 3, max(up.Metadata.SchemaVersion, 1), name)
		require.Equal(t, r.Position, up.Position)
		again, err := e.Upcast(up)
		require.NoError(t, err)
		require.Equal(t, up, again, "upcasting what is current changes nothing")
	}
	stored := recorded("account.opened", 1, `{"Name":"Ann Lee"}`)
	_, err := e.Upcast(stored)
	require.NoError(t, err)
	require.Equal(t, recorded("account.opened", 1, `{"Name":"Ann Lee"}`), stored, "the stored event is shared and must not change")

	var m eventstore.Metadata
	_, err = e.Encode("account.opened", want, &m)
	require.NoError(t, err)
	require.Equal(t, 3, m.SchemaVersion, "events are written with the current schema version")
	_, err = e.Encode("account.closed", struct{}{}, &m)
	require.NoError(t, err)
	require.Zero(t, m.SchemaVersion)
}

func TestEncoding_Renames(t *testing.T) {
	t.Parallel()
	e := accountEncoding(t)
	require.Equal(t, "account.opened", e.CurrentType("account.made"))
	require.Equal(t, "account.opened", e.CurrentType("account.opened"))
	require.Equal(t, "account.closed", e.CurrentType("account.closed"))
	require.Equal(t, []string{"account.closed", "account.opened", "account.created", "account.made"}, e.StoredTypes("account.closed", "account.opened"))
	require.Equal(t, []string{"account.closed"}, e.StoredTypes("account.closed"))
	var none *eventstore.Encoding
	require.Equal(t, "x", none.CurrentType("x"))
	require.Equal(t, []string{"x"}, none.StoredTypes("x"))
}

func TestEncoding_Nil(t *testing.T) {
	t.Parallel()
	var e *eventstore.Encoding
	var m eventstore.Metadata
	data, err := e.Encode("account.opened", openedV1{"Ann"}, &m)
	require.NoError(t, err)
	require.Equal(t, `{"Name":"Ann"}`, string(data))
	require.True(t, m.IsZero())
	var back openedV1
	require.NoError(t, e.Decode(recorded("account.opened", 0, string(data)), &back))
	require.Equal(t, openedV1{"Ann"}, back)
	require.ErrorIs(t, e.Decode(recorded("account.opened", 2, string(data)), &back), eventstore.ErrUnknownType)
}

func TestEncoding_WhatItRefusesToRead(t *testing.T) {
	t.Parallel()
	e := accountEncoding(t)
	unknownCodec := recorded("account.opened", 3, `{}`)
	unknownCodec.Metadata.Codec = "proto"
	for _, c := range []struct {
		name string
		r    eventstore.Recorded
		is   error
		says string
	}{
		{
			"newer schema", recorded("account.opened", 4, `{}`), eventstore.ErrUnknownType,
			`cannot decode event "account.opened" (stream "account-ann", version 3, position 7): unknown event type: schema version 4, this program knows up to 3: deploy the newer program first`,
		},
		{
			"newer schema of a type without upcasters", recorded("account.closed", 2, `{}`), eventstore.ErrUnknownType,
			`cannot decode event "account.closed" (stream "account-ann", version 3, position 7): unknown event type: schema version 2, this program knows up to 1: deploy the newer program first`,
		},
		{
			"unknown codec", unknownCodec, eventstore.ErrUnknownType,
			`cannot decode event "account.opened" (stream "account-ann", version 3, position 7): unknown event type: codec "proto": add it with eventstore.UseCodec`,
		},
		{
			"upcaster fails", recorded("account.opened", 1, `{"Name":"Ann"}`), nil,
			`cannot decode event "account.opened" (stream "account-ann", version 3, position 7): upcast from schema version 1: name "Ann" has no last name`,
		},
		{"upcaster meets nonsense", recorded("account.opened", 2, `nonsense`), nil, "upcast from schema version 2: "},
		{"nonsense", recorded("account.opened", 3, `nonsense`), nil, "into *eventstore_test.openedV3: "},
		{"other shape", recorded("account.opened", 3, `{"First":7}`), nil, "into *eventstore_test.openedV3: "},
	} {
		var got openedV3
		err := e.Decode(c.r, &got)
		require.ErrorIs(t, err, eventstore.ErrDecode, c.name)
		require.ErrorContains(t, err, c.says, c.name)
		require.False(t, eventstore.CanRetry(err), c.name)
		if c.is != nil {
			require.ErrorIs(t, err, c.is, c.name)
		} else {
			require.NotErrorIs(t, err, eventstore.ErrUnknownType, c.name)
		}
		var typed *eventstore.DecodeError
		require.ErrorAs(t, err, &typed)
		require.Equal(t, c.r.Position, typed.Event.Position)
	}
}

func TestNewEncoding_ReportsAllMistakes(t *testing.T) {
	t.Parallel()
	up := func(data []byte) ([]byte, error) { return data, nil }
	_, err := eventstore.NewEncoding(
		eventstore.UseCodec(wordCodec{"words"}, "said"),
		eventstore.UseCodec(wordCodec{"words"}, "said"),
		eventstore.UseCodec(wordCodec{""}, "x"),
		eventstore.UpcastBytes("a", 0, up),
		eventstore.UpcastBytes("a", 1, nil),
		eventstore.Upcast[openedV1, openedV2]("typed", 1, nil),
		eventstore.UseCodec(nil, "coded"),
		eventstore.UpcastBytes("b", 1, up),
		eventstore.UpcastBytes("b", 1, up),
		eventstore.UpcastBytes("c", 2, up),
		eventstore.Rename("d", "d"),
		eventstore.Rename("e", "f"),
		eventstore.Rename("e", "g"),
		eventstore.Rename("h", "i"),
		eventstore.Rename("i", "h"),
	)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	for _, says := range []string{
		`event type "said" has two codecs`,
		`event type "typed": the upcaster from schema version 1 is nil`,
		`the codec of event types ["coded"] is nil`,
		`two codecs are named ""`,
		`event type "a": upcasters start from schema version 1, got 0`,
		`event type "a": the upcaster from schema version 1 is nil`,
		`event type "b" has two upcasters from schema version 1`,
		`event type "c" has an upcaster from schema version 2 but none from 1`,
		`event type "d" is renamed to itself`,
		`event type "e" is renamed twice`,
		`event type "h" is renamed in a circle`,
	} {
		require.ErrorContains(t, err, says)
	}
}

// golden is one stored event and what it must decode into for ever. Add to
// testdata/stored.json; never change what is there.
type golden struct {
	Why      string
	Type     string
	Data     string
	Metadata eventstore.Metadata
	Want     json.RawMessage
}

func TestEncoding_OldEventsDecodeForEver(t *testing.T) {
	t.Parallel()
	raw, err := os.ReadFile(filepath.Join("testdata", "stored.json"))
	require.NoError(t, err)
	var all []golden
	require.NoError(t, json.Unmarshal(raw, &all))
	require.GreaterOrEqual(t, len(all), 11, "stored forms are added, never removed")
	e := mustEncoding(t,
		eventstore.Upcast("account.opened", 1, func(old openedV1) (openedV2, error) {
			first, last, _ := strings.Cut(old.Name, " ")
			return openedV2{First: first, Last: last}, nil
		}),
		eventstore.Rename("account.created", "account.opened"),
		eventstore.UseCodec(wordCodec{"words"}, "said"),
	)
	for _, g := range all {
		r := eventstore.Recorded{Type: g.Type, Data: []byte(g.Data), Metadata: g.Metadata}
		var into any
		switch e.CurrentType(g.Type) {
		case "account.opened":
			into = new(openedV2)
		case "said":
			into = new(word)
		case "account.measured":
			into = new(measured)
		default:
			t.Fatalf("%s: the test knows no type %q", g.Why, g.Type)
		}
		require.NoError(t, e.Decode(r, into), g.Why)
		got, err := json.Marshal(into)
		require.NoError(t, err)
		require.JSONEq(t, string(g.Want), string(got), g.Why)
	}
}

// measured has a field of every kind whose JSON form has had variants.
type measured struct {
	N        int64
	U        uint64
	F        float64
	B        []byte
	Duration time.Duration
	At       time.Time
	ID       uuid.UUID
	Map      map[string]int
	List     []string
	Pointer  *string
	Quoted   int    `json:",string"`
	Tagged   string `json:"tagged_name,omitempty"`
}

// What is written is pinned too: programs of different versions read one log.
func TestEncoding_WritesTheStoredForm(t *testing.T) {
	t.Parallel()
	text := "<p>"
	var m eventstore.Metadata
	data, err := (*eventstore.Encoding)(nil).Encode("account.measured", measured{
		N: -1, U: 1<<64 - 1, F: 1e21, B: []byte{0, 255}, Duration: 1500 * time.Millisecond, At: time.Date(2026, 2, 28, 23, 59, 59, 120000000, time.UTC),
		ID: uuid.MustParse("0190f5d1-6f2b-7cc3-98c4-dc0c0c07398f"), Map: map[string]int{"b": 1, "a": 2}, Pointer: &text, Quoted: 5, Tagged: "ü",
	}, &m)
	require.NoError(t, err)
	require.Equal(t, `{"N":-1,"U":18446744073709551615,"F":1e+21,"B":"AP8=","Duration":1500000000,"At":"2026-02-28T23:59:59.12Z","ID":"0190f5d1-6f2b-7cc3-98c4-dc0c0c07398f",`+
		`"Map":{"a":2,"b":1},"List":null,"Pointer":"\u003cp\u003e","Quoted":"5","tagged_name":"ü"}`, string(data))

	metadata, err := json.Marshal(eventstore.Metadata{
		CorrelationID: "c", CausationID: "d", Actor: "a", TraceParent: "t", SchemaVersion: 2, Codec: "words", Extra: map[string]string{"k": "v"},
	})
	require.NoError(t, err)
	require.Equal(t, `{"correlation":"c","causation":"d","actor":"a","trace":"t","schema":2,"codec":"words","extra":{"k":"v"}}`, string(metadata))
}

// Metadata is stored as JSON libraries would write it.
func TestMetadata_AppendJSON(t *testing.T) {
	t.Parallel()
	texts := []string{"", "a", "order-1", `say "hi"`, `back\slash`, "<b>&</b>", "tab\t", "ü", "\x7f", "\xff", "\u2028", " ~"}
	random := rand.New(rand.NewPCG(1, 2))
	text := func() string { return texts[random.IntN(len(texts))] }
	for range 5000 {
		m := eventstore.Metadata{CorrelationID: text(), CausationID: text(), Actor: text(), TraceParent: text(), SchemaVersion: random.IntN(3) - 1, Codec: text()}
		if random.IntN(4) == 0 {
			m.Extra = map[string]string{text(): text(), "k": text()}
		}
		want, err := jsonv1.Marshal(m)
		require.NoError(t, err)
		got, err := m.AppendJSON([]byte("before"))
		require.NoError(t, err)
		require.Equal(t, "before"+string(want), string(got))
	}
}

// What embeds Metadata is encoded whole.
func TestMetadata_Embedded(t *testing.T) {
	t.Parallel()
	type imported struct {
		eventstore.Metadata
		Cents int64
	}
	var m eventstore.Metadata
	data, err := (*eventstore.Encoding)(nil).Encode("account.imported", imported{eventstore.Metadata{Actor: "old system"}, 500}, &m)
	require.NoError(t, err)
	require.Equal(t, `{"actor":"old system","Cents":500}`, string(data))
}

// Stored bytes come from disk: whatever they are, the answer is a value or a
// DecodeError, never a panic, and upcasting is stable.
func FuzzEncoding_Decode(f *testing.F) {
	for _, seed := range []struct {
		eventType string
		schema    int
		data      string
	}{
		{"account.opened", 0, `{"Name":"Ann Lee"}`},
		{"account.opened", 2, `{"First":"Ann"}`},
		{"account.opened", 3, `{}`},
		{"account.made", 1, `{"Who":"A B"}`},
		{"account.opened", 9, `{}`},
		{"x", 0, `null`},
		{"account.opened", 1, `{"Name":`},
		{"account.opened", -5, "\xff"},
		{"account.created", 2, `[[[[`},
	} {
		f.Add(seed.eventType, seed.schema, []byte(seed.data))
	}
	e := accountEncoding(f)
	f.Fuzz(func(t *testing.T, eventType string, schema int, data []byte) {
		r := recorded(eventType, schema, string(data))
		var got openedV3
		if err := e.Decode(r, &got); err != nil {
			require.ErrorIs(t, err, eventstore.ErrDecode)
		}
		var shape struct {
			Event map[string]any
			measured
		}
		_ = e.Decode(r, &shape)
		require.Equal(t, string(data), string(r.Data), "decoding must not change the stored bytes")
		up, err := e.Upcast(r)
		if err != nil {
			require.ErrorIs(t, err, eventstore.ErrDecode)
			return
		}
		again, err := e.Upcast(up)
		require.NoError(t, err)
		require.Equal(t, up, again)
	})
}
