package nats

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/natsserver"
	"github.com/deed-go/deed/internal/ownership"
)

func present(t *testing.T, d ownership.Directory) (all []string) {
	t.Helper()
	members, err := d.Members(t.Context())
	require.NoError(t, err)
	for _, m := range members {
		all = append(all, m.Name)
	}
	slices.Sort(all)
	return all
}

func TestMembers(t *testing.T) {
	t.Parallel()
	_, err := Members(memory.New())
	require.ErrorIs(t, err, errors.ErrUnsupported)

	server, err := natsserver.Start(natsserver.Options{})
	require.NoError(t, err)
	t.Cleanup(server.Close)
	open := func() ownership.Directory {
		s, err := Open(t.Context(), server.URL())
		require.NoError(t, err)
		t.Cleanup(func() { _ = s.Close() })
		d, err := Members(s)
		require.NoError(t, err)
		return d
	}
	a, b := open(), open()
	require.Empty(t, present(t, a), "before anybody has come")
	require.NoError(t, a.Leave(t.Context(), "a"), "of what has not begun")

	const ttl = 5 * time.Second // and round trips are much shorter
	one := ownership.Member{Name: "a/1", Units: []string{"x", "y"}}
	require.NoError(t, a.Join(t.Context(), one, ttl))
	require.NoError(t, b.Join(t.Context(), ownership.Member{Name: "b"}, ttl))
	require.Equal(t, []string{"a/1", "b"}, present(t, a))
	require.Equal(t, []string{"a/1", "b"}, present(t, b))

	// What is offered can change; and then there is one of it still.
	one.Units = []string{"x"}
	asked := time.Now()
	require.NoError(t, a.Join(t.Context(), one, ttl))
	members, err := b.Members(t.Context())
	require.NoError(t, err)
	require.Len(t, members, 2)
	require.Contains(t, members, one)

	// Who leaves is gone at once, and can come again.
	require.NoError(t, b.Leave(t.Context(), "b"))
	require.NoError(t, b.Leave(t.Context(), "b"))
	require.Equal(t, []string{"a/1"}, present(t, a))
	require.NoError(t, b.Join(t.Context(), ownership.Member{Name: "b"}, ttl))

	// Who goes on saying so is there for longer than one term; who says nothing is
	// not, and learns of it.
	for began := time.Now(); time.Since(began) < 30*time.Second; {
		require.NoError(t, b.Join(t.Context(), ownership.Member{Name: "b"}, ttl))
		if all := present(t, b); !slices.Contains(all, "a/1") {
			require.Equal(t, []string{"b"}, all)
			require.GreaterOrEqual(t, time.Since(asked), ttl)
			break
		}
		wait, cancel := context.WithTimeout(t.Context(), ttl/20)
		<-wait.Done()
		cancel()
	}
	require.ErrorIs(t, a.Join(t.Context(), one, ttl), ownership.ErrReplaced)
	require.NoError(t, a.Join(t.Context(), one, ttl))
	require.Equal(t, []string{"a/1", "b"}, present(t, a))
}
