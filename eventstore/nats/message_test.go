package nats

import (
	"testing"
	"time"

	"github.com/google/uuid"
	client "github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// TestMessage_StoredForm pins what is in the stream: what was written once must
// be read for ever.
func TestMessage_StoredForm(t *testing.T) {
	t.Parallel()
	names := subjects{"bank"}
	e := eventstore.Event{
		ID: uuid.MustParse("0199c0de-0000-7000-8000-000000000001"), Stream: eventstore.Stream{Category: "account", ID: "ann.b"},
		Type: "account.opened", Tags: []string{"a", "b"}, Data: []byte(`{"owner":"Ann"}`), Time: time.Unix(1_700_000_000, 5).UTC(),
		Metadata: eventstore.Metadata{Actor: "me"},
	}
	stored := client.Header{
		"Deed":          {"3 1700000000000000005 0199c0de-0000-7000-8000-000000000001 17 8"},
		"Deed-Type":     {"account.opened"},
		"Deed-Tags":     {`["a","b"]`},
		"Deed-Metadata": {`{"actor":"me"}`},
	}
	const subject = "bank.786.account.ann%2Eb"

	written, err := names.encode(&e)
	require.NoError(t, err)
	m := written.message(1)
	m.Header[headerEvent] = []string{written.eventHeader(3, trail{17, 9}, 0)}
	require.Equal(t, stored, m.Header)
	require.Equal(t, subject, m.Subject)
	require.Equal(t, e.Data, m.Data)

	read, err := names.decode(subject, 20, stored, e.Data)
	require.NoError(t, err)
	require.Equal(t, &message{Recorded: eventstore.Recorded{
		ID: e.ID, Stream: e.Stream, Version: 3, Position: 20, Type: e.Type, Tags: e.Tags, Data: e.Data, Metadata: e.Metadata, Time: e.Time,
	}, index: 1, count: 1, previous: trail{17, 9}}, read)

	// Of one batch: how far before the message, and then what was there before it.
	require.Equal(t, "3 1700000000000000005 0199c0de-0000-7000-8000-000000000001 -2 9", written.eventHeader(3, trail{planned | 4, 9}, 6))
	read, err = names.decode(subject, 20, client.Header{"Deed": {written.eventHeader(3, trail{planned | 4, 9}, 6)}, "Deed-Type": {"account.opened"}}, nil)
	require.NoError(t, err)
	require.Equal(t, trail{18, 9}, read.previous)

	for name, header := range map[string]client.Header{
		"nothing":               {"Deed-Type": {"x"}},
		"no type":               {"Deed": {"1 5 0199c0de-0000-7000-8000-000000000001"}},
		"version 0":             {"Deed-Type": {"x"}, "Deed": {"0 5 0199c0de-0000-7000-8000-000000000001"}},
		"no time":               {"Deed-Type": {"x"}, "Deed": {"1  0199c0de-0000-7000-8000-000000000001"}},
		"no id":                 {"Deed-Type": {"x"}, "Deed": {"1 5"}},
		"a pointer to itself":   {"Deed-Type": {"x"}, "Deed": {"2 5 0199c0de-0000-7000-8000-000000000001 20"}},
		"a pointer forward":     {"Deed-Type": {"x"}, "Deed": {"2 5 0199c0de-0000-7000-8000-000000000001 21"}},
		"a pointer before all":  {"Deed-Type": {"x"}, "Deed": {"2 5 0199c0de-0000-7000-8000-000000000001 -20"}},
		"a pointer below 0":     {"Deed-Type": {"x"}, "Deed": {"3 5 0199c0de-0000-7000-8000-000000000001 9 10"}},
		"a pointer to 0":        {"Deed-Type": {"x"}, "Deed": {"3 5 0199c0de-0000-7000-8000-000000000001 9 9"}},
		"pointers that rise":    {"Deed-Type": {"x"}, "Deed": {"3 5 0199c0de-0000-7000-8000-000000000001 -9 17"}},
		"the batch behind":      {"Deed-Type": {"x"}, "Deed": {"3 5 0199c0de-0000-7000-8000-000000000001 17 -9"}},
		"one pointer of two":    {"Deed-Type": {"x"}, "Deed": {"3 5 0199c0de-0000-7000-8000-000000000001 17"}},
		"three pointers of two": {"Deed-Type": {"x"}, "Deed": {"3 5 0199c0de-0000-7000-8000-000000000001 17 1 1"}},
		"far pointers missing":  {"Deed-Type": {"x"}, "Deed": {"17 5 0199c0de-0000-7000-8000-000000000001 -1 -2 -3 -4 -5 -6 -7 -8"}},
		"no pointer":            {"Deed-Type": {"x"}, "Deed": {"2 5 0199c0de-0000-7000-8000-000000000001"}},
		"a pointer of an event": {"Deed-Type": {"x"}, "Deed": {"1 5 0199c0de-0000-7000-8000-000000000001 3"}},
	} {
		_, err := names.decode(subject, 20, header, nil)
		require.ErrorIs(t, err, eventstore.ErrDecode, name)
	}
}

// FuzzDecode: whatever is in the stream, reading it ends with an event that
// would be written so again, or with an error.
func FuzzDecode(f *testing.F) {
	f.Add("3 1700000000000000005 0199c0de-0000-7000-8000-000000000001 17 8", "account.opened", `["a"]`, `{"actor":"me"}`, "", "2/3", "key", `"print"`, []byte("{}"), uint64(20))
	f.Add("1 -5 0199c0de-0000-7000-8000-000000000001", `" x "`, "", "", "14", "", "", "", []byte(`{"actor":"me"}{}`), uint64(1))
	f.Add("2 0 0199c0de-0000-7000-8000-000000000001 -1", "x", "null", "null", "0", "1/1", "\"", "", []byte{}, uint64(7))
	names := subjects{"bank"}
	of := eventstore.Stream{Category: "account", ID: "ann"}
	f.Fuzz(func(t *testing.T, event, kind, tags, metadata, size, commit, key, fingerprint string, data []byte, sequence uint64) {
		h := client.Header{}
		for name, value := range map[string]string{
			headerEvent: event, headerType: kind, headerTags: tags, headerMetadata: metadata, headerMetadataSize: size,
			headerCommit: commit, headerKey: key, headerFingerprint: fingerprint,
		} {
			if value != "" {
				h[name] = []string{value}
			}
		}
		m, err := names.decode(names.of(of), sequence, h, data)
		if err != nil {
			require.ErrorIs(t, err, eventstore.ErrDecode)
			return
		}
		written, err := names.encode(&eventstore.Event{ID: m.ID, Stream: m.Stream, Type: m.Type, Tags: m.Tags, Data: m.Data, Metadata: m.Metadata, Time: m.Time})
		if err != nil {
			return // tags or metadata that no event has
		}
		again := written.message(1)
		again.Header[headerEvent] = []string{written.eventHeader(m.Version, m.previous, 0)}
		second, err := names.decode(again.Subject, sequence, again.Header, again.Data)
		require.NoError(t, err)
		require.Equal(t, m.ID, second.ID)
		require.Equal(t, m.Type, second.Type)
		require.Equal(t, m.Version, second.Version)
		require.True(t, m.Time.Equal(second.Time))
		require.Equal(t, m.previous, second.previous)
		require.Equal(t, string(m.Data), string(second.Data))
	})
}
