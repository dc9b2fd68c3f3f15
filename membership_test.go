package deed_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/projection"
)

// sharedStore is a store in memory that says that others use it.
type sharedStore struct{ *memory.Store }

func (s sharedStore) Open(context.Context) (eventstore.Store, error) { return s, nil }
func (sharedStore) Shared() bool                                     { return true }

// register is where processes find each other; it keeps what they have said.
type register struct {
	mu   sync.Mutex
	said []ownership.Member
	left bool
}

func (r *register) Join(_ context.Context, self ownership.Member, _ time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.said = append(r.said, self)
	return nil
}

func (r *register) Leave(context.Context, string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.left = true
	return nil
}

func (r *register) Members(context.Context) ([]ownership.Member, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.said[len(r.said)-1:], nil
}

// A process is known to the others with all that it can do from the first
// moment: those who believed in a part of it would leave the rest undone.
func TestMembers(t *testing.T) {
	t.Parallel()
	const views = 400
	for range 3 { // workers start in any order
		store, r := sharedStore{memory.New()}, &register{}
		parts := []deed.Part{loans, due().FromNow(), deed.Members(func(s eventstore.Store) (ownership.Directory, error) {
			require.Equal(t, store, s)
			return r, nil
		})}
		for i := range views {
			parts = append(parts, projection.View(fmt.Sprintf("view%d", i), projection.On(func(row *int, _ Lent) { *row++ })))
		}
		app, err := deed.Start(t.Context(), store, parts...)
		require.NoError(t, err)
		require.NoError(t, app.Settle(t.Context()))
		require.NoError(t, app.Stop(t.Context()))
		require.Len(t, r.said[0].Units, views+1)
		require.True(t, r.left)
	}

	_, err := deed.Start(t.Context(), sharedStore{memory.New()}, loans, due().FromNow(), deed.Leases(func(eventstore.Store) (ownership.Leases, error) { return nil, nil }))
	require.ErrorIs(t, err, eventstore.ErrInvalid, "leases beside a state that is shared")

	mistake := errors.New("no directory")
	_, err = deed.Start(t.Context(), sharedStore{memory.New()}, loans, due().FromNow(), deed.Members(func(eventstore.Store) (ownership.Directory, error) { return nil, mistake }))
	require.ErrorIs(t, err, mistake)
	_, err = deed.Start(t.Context(), eventstore.Opened(memory.New()), loans, due().FromNow(), deed.Leases(func(eventstore.Store) (ownership.Leases, error) { return nil, mistake }))
	require.ErrorIs(t, err, mistake)
}
