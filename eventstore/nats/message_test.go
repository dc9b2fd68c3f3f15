package nats

import (
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
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
	const (
		subject = "bank.786.account.ann%2Eb"
		stored  = "3 1700000000000000005 0199c0de-0000-7000-8000-000000000001 4fc30095 17 8\n" +
			"786.account.ann%2Eb\n" +
			"account.opened\n" +
			`tags ["a","b"]` + "\n" +
			`metadata {"actor":"me"}` + "\n"
	)
	last := uuid.MustParse("0199c0de-0000-7000-8000-000000c0ffee")
	before := checkOf(last)

	var written encoded
	err := names.encode(&e, &written)
	require.NoError(t, err)
	require.Equal(t, subject, written.subject)
	at := place{version: 3, before: before, previous: trail{17, 9}, index: 1, count: 1}
	require.Equal(t, stored+"\n"+`{"owner":"Ann"}`, string(written.payload(at)))

	want := &message{Recorded: eventstore.Recorded{
		ID: e.ID, Stream: e.Stream, Version: 3, Position: 20, Type: e.Type, Tags: e.Tags, Data: e.Data, Metadata: e.Metadata, Time: e.Time,
	}, index: 1, count: 1, previous: trail{17, 9}, before: before}
	read, err := names.decode(subject, 20, written.payload(at))
	require.NoError(t, err)
	require.Equal(t, want, read)
	read, err = names.decodeAs(names.streamSubject(e.Stream), "", 20, written.payload(at))
	require.NoError(t, err)
	require.Equal(t, want, read)
	read, err = names.decodeAs(names.streamSubject(eventstore.Stream{Category: "account", ID: "bob"}), "", 20, written.payload(at))
	require.NoError(t, err)
	require.Equal(t, want, read, "it says whose it is")

	// Of a commit of several, with a key.
	at.index, at.count, at.key, at.fingerprint = 2, 3, " k ", "\x00\n"
	require.Equal(t, stored+"commit 2/3\nkey  k \nfingerprint \"\\x00\\n\"\n\n"+`{"owner":"Ann"}`, string(written.payload(at)))
	read, err = names.decode(subject, 20, written.payload(at))
	require.NoError(t, err)
	want.index, want.count, want.key, want.fingerprint = 2, 3, " k ", "\x00\n"
	require.Equal(t, want, read)

	// A condition.
	read, err = names.decode(names.conditions(), 20, appendIndex(nil, 1, 2))
	require.NoError(t, err)
	require.Equal(t, &message{Recorded: eventstore.Recorded{Position: 20}, index: 1, count: 2}, read)

	// Of one batch: how far before the message, and then what was there before it.
	at = place{version: 3, previous: trail{planned | 4, 9}, number: 6}
	first, _, _ := strings.Cut(string(written.payload(at)), "\n")
	require.Equal(t, "3 1700000000000000005 0199c0de-0000-7000-8000-000000000001 00000000 -2 9", first)
	read, err = names.decode(subject, 20, written.payload(at))
	require.NoError(t, err)
	require.Equal(t, trail{18, 9}, read.previous)

	const id = "0199c0de-0000-7000-8000-000000000001"
	good := "1 5 " + id + "\n786.account.ann%2Eb\nx\n"
	_, err = names.decode(subject, 20, []byte(good+"\n"))
	require.NoError(t, err)
	for name, payload := range map[string]string{
		"nothing":                  "",
		"no empty line":            good,
		"no type":                  "1 5 " + id + "\n786.account.ann%2Eb\n\n",
		"no subject":               "1 5 " + id + "\n\nx\n\n",
		"another subject":          "1 5 " + id + "\n786.account.ann%2Ec\nx\n\n",
		"a line that is not known": good + "tag a\n\n",
		"tags that are none":       good + "tags a\n\n",
		"metadata that is none":    good + "metadata []\n\n",
		"a commit of none":         good + "commit 1/0\n\n",
		"a commit of too many":     good + "commit 1/1001\n\n",
		"no commit":                good + "commit 1\n\n",
		"no fingerprint":           good + "fingerprint x\n\n",
		"version 0":                "0 5 " + id,
		"no time":                  "1  " + id,
		"no id":                    "1 5",
		"no check":                 "2 5 " + id + " 19",
		"a short check":            "2 5 " + id + " 0c 19",
		"a pointer to itself":      "2 5 " + id + " 00000000 20",
		"a pointer forward":        "2 5 " + id + " 00000000 21",
		"a pointer before all":     "2 5 " + id + " 00000000 -20",
		"a pointer below 0":        "3 5 " + id + " 00000000 9 10",
		"a pointer to 0":           "3 5 " + id + " 00000000 9 9",
		"pointers that rise":       "3 5 " + id + " 00000000 -9 17",
		"the batch behind":         "3 5 " + id + " 00000000 17 -9",
		"one pointer of two":       "3 5 " + id + " 00000000 17",
		"three pointers of two":    "3 5 " + id + " 00000000 17 1 1",
		"far pointers missing":     "17 5 " + id + " 00000000 -1 -2 -3 -4 -5 -6 -7 -8",
		"no pointer":               "2 5 " + id + " 00000000",
		"a pointer of an event":    "1 5 " + id + " 3",
	} {
		if payload != "" && !strings.Contains(payload, "\n") {
			payload += "\n786.account.ann%2Eb\nx\n\n"
		}
		for _, subject := range []string{subject, ""} {
			if subject == "" && name == "another subject" {
				continue
			}
			_, err := names.decode(subject, 20, []byte(payload))
			require.ErrorIs(t, err, eventstore.ErrDecode, name)
		}
	}
	for _, payload := range []string{"", "1", "0/1", "2/1", "x/1", "21/22", "1/1001"} {
		_, err := names.decode(names.conditions(), 20, []byte(payload))
		require.ErrorIs(t, err, eventstore.ErrDecode, payload)
	}
}

// FuzzDecode: whatever is in the stream, reading it ends with an event that
// would be written so again, or with an error.
func FuzzDecode(f *testing.F) {
	const id = "0199c0de-0000-7000-8000-000000000001"
	f.Add([]byte("3 1700000000000000005 "+id+" 00c0ffee 17 8\n786.account.ann\naccount.opened\ntags [\"a\"]\nmetadata {\"actor\":\"me\"}\ncommit 2/3\nkey a\nfingerprint \"print\"\n\n{}"), uint64(20))
	f.Add([]byte("1 -5 "+id+"\n786.account.ann\n x \n\n\n"), uint64(1))
	f.Add([]byte("2 0 "+id+" 00000000 -1\n786.account.ann\nx\ntags null\nmetadata null\n\n"), uint64(7))
	names := subjects{"bank"}
	f.Fuzz(func(t *testing.T, payload []byte, sequence uint64) {
		m, err := names.decode("", sequence, payload)
		if err != nil {
			require.ErrorIs(t, err, eventstore.ErrDecode)
			return
		}
		_, err = names.decode(names.of(m.Stream), sequence, payload)
		require.NoError(t, err)
		var written encoded
		err = names.encode(&eventstore.Event{ID: m.ID, Stream: m.Stream, Type: m.Type, Tags: m.Tags, Data: m.Data, Metadata: m.Metadata, Time: m.Time}, &written)
		if err != nil {
			return // tags or metadata that no event has
		}
		at := place{version: m.Version, previous: m.previous, index: m.index, count: m.count, key: m.key, fingerprint: m.fingerprint, before: m.before}
		second, err := names.decode(written.subject, sequence, written.payload(at))
		require.NoError(t, err)
		if len(m.Tags) == 0 {
			m.Tags, second.Tags = nil, nil
		}
		if m.key == "" {
			m.fingerprint = ""
		}
		require.Equal(t, m.Data, second.Data)
		m.Data, second.Data = nil, nil
		require.Equal(t, m, second)
	})
}
