package saga_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

// goldenLine is one event of the golden file.
type goldenLine struct {
	Stream string          `json:"stream"`
	Type   string          `json:"type"`
	Time   time.Time       `json:"time"`
	Data   json.RawMessage `json:"data"`
}

// goldenSaga uses every kind of step.
var goldenSaga = saga.Define("golden", func(s *saga.Run, in Place) (Order, error) {
	if err := saga.Execute(s, "reserve", stocks, Reserve{in.SKU, in.ID}); err != nil {
		return Order{}, err
	}
	s.OnRollback("release", func(s *saga.Run) error {
		return saga.Execute(s, "release", stocks, Release{in.SKU, in.ID})
	})
	for range 2 {
		if _, err := saga.Do(s, "charge 1/2 #", func(step saga.Step) (string, error) {
			if step.Attempt() == 1 {
				return "", errors.New("gateway is down")
			}
			return "c", nil
		}); err != nil {
			return Order{}, err
		}
	}
	if err := s.Sleep("pause", time.Hour); err != nil {
		return Order{}, err
	}
	if _, err := saga.Await[Shipped](s, saga.Where(in.ID), 14*day); err != nil {
		return Order{}, err
	}
	if in.SKU == "pen" {
		return Order{}, errDeclined
	}
	_, _ = saga.Await[Shipped](s, saga.WhereTag("parcel:none"), day)
	s.Settled()
	_, err := saga.Do(s, "mail", func(saga.Step) (int, error) { return 0, saga.Terminal(fmt.Errorf("mail: %w", errDeclined)) })
	if !errors.Is(err, errDeclined) {
		return Order{}, err
	}
	return Order{in.SKU}, nil
}, saga.On(func(e Placed, r eventstore.Recorded) (string, Place) { return r.Stream.ID, Place{r.Stream.ID, e.SKU} }))

var goldenReaction = saga.React("golden", func(step saga.Step, e Placed) error {
	if e.SKU == "pen" {
		return errDeclined
	}
	return nil
}, saga.Retry(2))

var anyID = regexp.MustCompile(`"id":"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"`)

var anyDue = regexp.MustCompile(`"due":"[^"]*"`)

// TestGolden_History pins the stored form of histories: what the golden file
// holds must be written today as it was then, and fit the code for ever. When
// the format grows, add a second file; never change this one.
func TestGolden_History(t *testing.T) {
	t.Parallel()
	s := sagatest.For(t, goldenSaga, sagatest.At(t0)).
		Given("stock", "book", Stocked{1}).Given("stock", "pen", Stocked{1}).
		When("order", "o1", Placed{"book"}).
		When("order", "o2", Placed{"pen"}).
		Advance(2*time.Hour).
		When("order", "o1", Shipped{"p1"}).
		When("order", "o2", Shipped{"p2"}).
		Advance(2*day).
		Completed("o1", Order{"book"}).
		Failed("o2", errDeclined, "release")
	reacted := sagatest.For(t, goldenReaction, sagatest.At(t0)).
		When("order", "o1", Placed{"book"}).
		When("order", "o2", Placed{"pen"}).
		Advance(time.Hour).
		ReplayDeadLetters()
	var lines bytes.Buffer
	for _, streams := range []map[eventstore.Stream][]eventstore.Recorded{s.Streams(), reacted.Streams()} {
		for _, stream := range slices.SortedFunc(maps.Keys(streams), func(a, b eventstore.Stream) int {
			return bytes.Compare([]byte(a.String()), []byte(b.String()))
		}) {
			if stream.Category != "saga.golden" && stream.Category != "reaction.golden" {
				continue
			}
			for _, r := range streams[stream] {
				data := anyID.ReplaceAll(r.Data, []byte(`"id":"0198f2c1-7f7e-7c3a-9d57-0a3c5d0f9b11"`))
				if stream.Category == "reaction.golden" { // its pauses depend on the random id of the event
					data = anyDue.ReplaceAll(data, []byte(`"due":"2024-01-01T00:00:01Z"`))
					r.Time = t0
				}
				line, err := json.Marshal(goldenLine{stream.String(), r.Type, r.Time, data})
				require.NoError(t, err)
				lines.Write(append(line, '\n'))
			}
		}
	}
	const file = "testdata/history.golden"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(file, lines.Bytes(), 0o644))
	}
	golden, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(golden), lines.String())

	histories := map[string][]eventstore.Recorded{}
	for line := range bytes.Lines(golden) {
		var g goldenLine
		require.NoError(t, json.Unmarshal(line, &g))
		stream, err := eventstore.ParseStream(g.Stream)
		require.NoError(t, err)
		if stream.Category != "saga.golden" {
			continue
		}
		h := histories[stream.ID]
		histories[stream.ID] = append(h, eventstore.Recorded{Stream: stream, Version: uint64(len(h)) + 1, Type: g.Type, Data: g.Data, Time: g.Time})
	}
	require.Len(t, histories, 2)
	for id, events := range histories {
		for n := range events {
			require.NoError(t, goldenSaga.Replay(t.Context(), events[:n+1], nil), "the first %d events of %s", n+1, id)
		}
	}
}

// TestGolden_NewerFormat: what a newer program wrote is not guessed at.
func TestGolden_NewerFormat(t *testing.T) {
	t.Parallel()
	stream := history("golden", "o1")
	started := eventstore.Recorded{Stream: stream, Version: 1, Type: "saga.started", Data: []byte(`{"format":1,"in":{}}`)}
	require.ErrorContains(t, goldenSaga.Replay(t.Context(), []eventstore.Recorded{{Stream: stream, Version: 1, Type: "saga.started", Data: []byte(`{"format":2,"in":{}}`)}}, nil), "newer program")
	require.ErrorContains(t, goldenSaga.Replay(t.Context(), []eventstore.Recorded{started, {Stream: stream, Version: 2, Type: "saga.forked", Data: []byte(`{}`)}}, nil), `event "saga.forked" at version 2`)
	require.ErrorContains(t, goldenSaga.Replay(t.Context(), []eventstore.Recorded{{Stream: stream, Version: 1, Type: "saga.completed", Data: []byte(`{}`)}}, nil), "was not written by a saga")
	require.ErrorIs(t, goldenSaga.Replay(t.Context(), []eventstore.Recorded{{Stream: stream, Version: 1, Type: "saga.started", Data: []byte(`{`)}}, nil), eventstore.ErrDecode)
}

// TestMismatch_NewerHistory: a run that a newer program went on with, before an
// older one came back, is left alone and shown as blocked; other runs go on.
func TestMismatch_NewerHistory(t *testing.T) {
	t.Parallel()
	b := newBench(t, parcels)
	exec(b, orders, Place{"o1", "book"})
	exec(b, orders, Place{"o2", "book"})
	b.settle()
	_, err := b.store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{
		{Stream: history("parcels", "o1"), Type: "saga.forked", Data: []byte(`{}`)},
	}})
	require.NoError(t, err)
	exec(b, orders, Ship{"o1", "p1"})
	exec(b, orders, Ship{"o2", "p2"})
	b = b.restart(parcels)
	exec(b, orders, Ship{"o2", "p3"})
	b.settle()
	infos, err := b.engine.List(t.Context(), "parcels", saga.ListOptions{})
	require.NoError(t, err)
	require.Len(t, infos, 1)
	require.Equal(t, saga.StatusBlocked, infos[0].Status)
	require.Contains(t, infos[0].Error, "newer program")
	require.Len(t, b.types(history("parcels", "o1")), 3, "nothing is written to it")
	out, err := saga.Wait(t.Context(), b.engine, parcels, "o2")
	require.NoError(t, err)
	require.Equal(t, "p2,p3", out)
}
