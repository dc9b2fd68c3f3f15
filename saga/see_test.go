package saga_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

// TestTimeline_EveryStep: the history of a run with every kind of step tells how
// each came out; exported it is the same history, and it fits the code.
func TestTimeline_EveryStep(t *testing.T) {
	t.Parallel()
	g := newGateway()
	def := everything(g)
	s := sagatest.For(t, def, sagatest.Also(packing))
	s.Given("stock", "book", Stocked{2}).Given("stock", "pen", Stocked{2}).
		When("order", "o1", Placed{"book"}).When("order", "o2", Placed{"pen"}).
		Signal("o1", "approval", "ann").Signal("o2", "approval", "bob").
		Advance(2*time.Hour).
		When("order", "o1", Shipped{"p1"}).When("order", "o2", Shipped{"p2"}).
		Signal("o1", "hurry", true)
	open, err := s.Engine().Timeline(t.Context(), "everything", "o2")
	require.NoError(t, err)
	require.Equal(t, []string{"side by side.0@refund", "unbook", "release"}, open.Pending)
	s.Advance(31 * day)

	done, err := s.Engine().Timeline(t.Context(), "everything", "o1")
	require.NoError(t, err)
	require.Equal(t, saga.StatusCompleted, done.Status)
	require.JSONEq(t, `"book"`, string(done.Input))
	require.JSONEq(t, `"7 1p1packed bookann0"`, string(done.Output))
	require.Empty(t, done.Pending)
	require.Empty(t, done.Signals)
	retried := 0
	for _, step := range done.Steps {
		require.NotEmpty(t, step.Key)
		require.NotEmpty(t, step.Text)
		retried += len(step.Attempts)
		if step.Status == saga.StepSucceeded {
			require.False(t, step.Ended.Before(step.Began), step.Text)
		}
	}
	require.Equal(t, 1, retried, "the charge")

	failed, err := s.Engine().Timeline(t.Context(), "everything", "o2")
	require.NoError(t, err)
	require.Equal(t, saga.StatusFailed, failed.Status)
	require.Empty(t, failed.Pending, "all is compensated")

	data, err := s.Engine().Export(t.Context(), "everything", "o1")
	require.NoError(t, err)
	events, err := saga.ReadHistory(data)
	require.NoError(t, err)
	require.NoError(t, def.Replay(t.Context(), events, nil))
	require.Len(t, events, done.Events)
}

func TestReadHistory_Refuses(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{`:                                "no exported history",
		`{"format":9,"saga":"a","id":"b"}`: "format 9",
		`{"format":1,"saga":"a","id":"b"}`: `saga "a", run "b" has no events`,
		`{"format":1,"saga":"a","id":"b","events":[{"id":"seven","version":1}]}`: `"seven"`,
	} {
		_, err := saga.ReadHistory([]byte(text))
		require.ErrorIs(t, err, eventstore.ErrInvalid, text)
		require.ErrorContains(t, err, want)
	}
}

// TestEngine_WithoutDefinitions: a tool's engine names and lists sagas that it
// does not have.
func TestEngine_WithoutDefinitions(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	tool := saga.NewEngine(store, store, nil, saga.Options{})
	names, err := tool.Names(t.Context())
	require.NoError(t, err)
	require.Empty(t, names)
	_, err = tool.List(t.Context(), "nobody", saga.ListOptions{})
	require.ErrorIs(t, err, saga.ErrNotFound)
	_, err = tool.Versions(t.Context(), "nobody")
	require.ErrorIs(t, err, saga.ErrNotFound)
	_, err = tool.History(t.Context(), "nobody", "1")
	require.ErrorIs(t, err, saga.ErrNotFound)
	_, err = tool.List(t.Context(), "no body", saga.ListOptions{})
	require.ErrorIs(t, err, saga.ErrNotFound)
	require.ErrorContains(t, err, `"no body"`)
}
