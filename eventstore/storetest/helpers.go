package storetest

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

func stream(category, id string) eventstore.Stream {
	return eventstore.Stream{Category: category, ID: id}
}

func account(id string) eventstore.Stream { return stream("account", id) }

func event(s eventstore.Stream, eventType string, tags ...string) eventstore.Event {
	return eventstore.Event{Stream: s, Type: eventType, Tags: tags, Data: []byte(`{}`)}
}

// events returns n events of the stream.
func events(s eventstore.Stream, n int) []eventstore.Event {
	all := make([]eventstore.Event, n)
	for i := range all {
		all[i] = event(s, "thing.happened")
		all[i].Data = fmt.Appendf(nil, `{"N":%d}`, i+1)
	}
	return all
}

func commit(e ...eventstore.Event) eventstore.Commit { return eventstore.Commit{Events: e} }

func mustAppend(t testing.TB, ctx context.Context, store eventstore.Store, c eventstore.Commit) eventstore.Receipt {
	t.Helper()
	r, err := store.Append(ctx, c)
	require.NoError(t, err, "an append that nothing forbids must succeed")
	return r
}

// all drains a read.
func all(seq iter.Seq2[eventstore.Recorded, error]) ([]eventstore.Recorded, error) {
	var got []eventstore.Recorded
	for r, err := range seq {
		if err != nil {
			return got, err
		}
		got = append(got, r)
	}
	return got, nil
}

func mustRead(t testing.TB, ctx context.Context, store eventstore.Store, q eventstore.Query, o eventstore.ReadOptions) []eventstore.Recorded {
	t.Helper()
	got, err := all(store.Read(ctx, q, o))
	require.NoError(t, err, "read %+v with %+v", q, o)
	return got
}

func mustHead(t testing.TB, ctx context.Context, store eventstore.Store) eventstore.Position {
	t.Helper()
	head, err := store.Head(ctx)
	require.NoError(t, err, "head")
	return head
}

// positions lists those of the events, for comparisons people can read.
func positions(events []eventstore.Recorded) []eventstore.Position {
	all := make([]eventstore.Position, len(events))
	for i := range events {
		all[i] = events[i].Position
	}
	return all
}

// matching filters by the reference implementation of queries.
func matching(events []eventstore.Recorded, q eventstore.Query) []eventstore.Recorded {
	var some []eventstore.Recorded
	for i := range events {
		if q.Matches(&events[i]) {
			some = append(some, events[i])
		}
	}
	return some
}

// unchanged fails the test unless fn leaves the log as it was.
func unchanged(t testing.TB, ctx context.Context, store eventstore.Store, fn func()) {
	t.Helper()
	before := mustHead(t, ctx, store)
	fn()
	require.Equal(t, before, mustHead(t, ctx, store), "a refused append must write nothing, but the head moved")
	require.Empty(t, mustRead(t, ctx, store, eventstore.All(), eventstore.ReadOptions{After: before}), "a refused append must write nothing")
}

// mustConflict returns the typed error of a conflict.
func mustConflict(t testing.TB, err error) *eventstore.ConflictError {
	t.Helper()
	require.ErrorIs(t, err, eventstore.ErrConflict, "a condition that does not hold is ErrConflict")
	var c *eventstore.ConflictError
	require.ErrorAs(t, err, &c, "a conflict must be a *eventstore.ConflictError, so that callers can read what was expected and found")
	require.True(t, eventstore.CanRetry(err), "deciding again can help after a conflict, so CanRetry must say so")
	return c
}

// together runs fn n times at the same moment: every call gets a gate that
// opens once all n wait at it. It returns the first unexpected error.
func together(n int, fn func(i int, gate func()) error) error {
	arrived, open, done := make(chan struct{}), make(chan struct{}), make(chan error, n)
	for i := range n {
		go func() {
			passed := false
			gate := func() {
				passed = true
				arrived <- struct{}{}
				<-open
			}
			err := fn(i, gate)
			if !passed {
				arrived <- struct{}{}
			}
			done <- err
		}()
	}
	for range n {
		<-arrived
	}
	close(open)
	var failed []error
	for range n {
		if err := <-done; err != nil {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

// pick returns the smaller number with -short.
func pick(long, short int) int {
	if testing.Short() {
		return short
	}
	return long
}
