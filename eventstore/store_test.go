package eventstore_test

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

// observing is a wrapper that changes nothing, so it lets its powers through.
type observing struct{ eventstore.Store }

func (o observing) Unwrap() eventstore.Store { return o.Store }

// translating is a wrapper that changes what is stored, so it hides them.
type translating struct{ eventstore.Store }

func TestFind(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	for name, s := range map[string]eventstore.Store{"itself": store, "wrapped": observing{store}, "wrapped twice": observing{observing{store}}} {
		found, ok := eventstore.Find[eventstore.Enqueuer](s)
		require.True(t, ok, name)
		require.Same(t, store, found, name)
	}
	for name, s := range map[string]eventstore.Store{"hidden": translating{store}, "hidden below": observing{translating{observing{store}}}, "none": nil} {
		_, ok := eventstore.Find[eventstore.Enqueuer](s)
		require.False(t, ok, name)
	}
}

func TestLogID(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	id, err := eventstore.LogID(t.Context(), observing{store})
	require.NoError(t, err)
	require.NotEmpty(t, id)
	_, err = eventstore.LogID(t.Context(), translating{store})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.EqualError(t, err, "log id of eventstore_test.translating: unsupported operation")
}

// An application that is given an open store must not close it.
func TestOpened(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer store.Close()
	opened, err := eventstore.Opened(store).Open(t.Context())
	require.NoError(t, err)
	_, closes := opened.(interface{ Close() error })
	require.False(t, closes, "whoever opened the store closes it")
	_, ok := eventstore.Find[eventstore.Enqueuer](opened)
	require.True(t, ok, "its powers stay reachable")
	_, err = opened.Append(t.Context(), one(nil))
	require.NoError(t, err)
	head, err := store.Head(t.Context())
	require.NoError(t, err)
	require.Equal(t, eventstore.Position(1), head)
}

func TestPending(t *testing.T) {
	t.Parallel()
	p, resolve := eventstore.NewPending()
	select {
	case <-p.Done():
		require.Fail(t, "done before there is an outcome")
	default:
	}
	failure := errors.New("no")
	go resolve(eventstore.Receipt{Last: 7}, failure)
	r, err := p.Result()
	require.Equal(t, failure, err)
	require.Equal(t, eventstore.Position(7), r.At())
	<-p.Done()
	again, err := p.Result()
	require.Equal(t, r, again)
	require.Equal(t, failure, err)
}
