package eventstore_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

func TestCanRetry(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{errors.New("anything"), false},
		{eventstore.ErrConflict, true},
		{&eventstore.ConflictError{}, true},
		{fmt.Errorf("deposit: %w", &eventstore.ConflictError{}), true},
		{eventstore.ErrOutcomeUnknown, true},
		{fmt.Errorf("%w: %w", eventstore.ErrOutcomeUnknown, context.Canceled), true},
		{fmt.Errorf("%w: %w", eventstore.ErrOutcomeUnknown, eventstore.ErrClosed), true},
		{context.Canceled, true},
		{context.DeadlineExceeded, true},
		{fmt.Errorf("append: %w", context.DeadlineExceeded), true},
		{eventstore.ErrKeyReused, false},
		{eventstore.ErrClosed, false},
		{fmt.Errorf("%w: %w", eventstore.ErrClosed, context.Canceled), false},
		{eventstore.ErrTooLarge, false},
		{eventstore.ErrInvalid, false},
		{eventstore.ErrGap, false},
		{eventstore.ErrUnknownType, false},
		{eventstore.ErrDecode, false},
		{&eventstore.DecodeError{Cause: context.Canceled}, false},
		{eventstore.ErrNewerVersion, false},
		{eventstore.ErrInUse, false},
		{fmt.Errorf("boundary: %w", errors.ErrUnsupported), false},
	} {
		require.Equal(t, c.want, eventstore.CanRetry(c.err), "%v", c.err)
	}
}

func TestConflictError(t *testing.T) {
	t.Parallel()
	for says, err := range map[string]*eventstore.ConflictError{
		`conflict: stream "account-ann" is at version 3, expected version 2`: {
			Kind: eventstore.ConditionStreamAt, Stream: ann, Expected: eventstore.Revision{Version: 2}, Actual: eventstore.Revision{Version: 3, Position: 9},
		},
		`conflict: stream "account-ann" is at version 1, expected version 0 (no events)`: {
			Kind: eventstore.ConditionStreamAt, Stream: ann, Actual: eventstore.Revision{Version: 1, Position: 9},
		},
		`conflict: stream "account-ann" is at version 3, but its last event is not the expected one`: {
			Kind: eventstore.ConditionStreamAt, Stream: ann, Expected: eventstore.Revision{Version: 3}, Actual: eventstore.Revision{Version: 3, Position: 9},
		},
		`conflict: stream "account-ann" does not exist`: {Kind: eventstore.ConditionStreamExists, Stream: ann},
		`conflict: an event at position 7, after 4, matches the condition's query: decide again on the events up to it`: {
			Kind: eventstore.ConditionNoneMatch, Query: eventstore.All(), After: 4, Found: 7,
		},
		`conflict: stream "a-` + strings.Repeat("x", 78) + `…" does not exist`: {
			Kind: eventstore.ConditionStreamExists, Stream: eventstore.Stream{Category: "a", ID: strings.Repeat("x", 500)},
		},
	} {
		require.EqualError(t, err, says)
		wrapped := fmt.Errorf("append: %w", err)
		require.ErrorIs(t, wrapped, eventstore.ErrConflict)
		require.NotErrorIs(t, wrapped, eventstore.ErrInvalid)
		got, ok := errors.AsType[*eventstore.ConflictError](wrapped)
		require.True(t, ok)
		require.Same(t, err, got)
	}
}
