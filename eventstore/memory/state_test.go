package memory_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// A view that began before an update, and one that begins while it runs, both
// see the state before it, and neither waits for it.
func TestStore_View_DuringUpdate(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	store := memory.New()
	defer store.Close()
	require.NoError(t, store.Update(ctx, func(tx projection.StateTx) error { return tx.Put("t", "k", []byte("old")) }))

	inside, goOn, done := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		done <- store.Update(ctx, func(tx projection.StateTx) error {
			if err := tx.Put("t", "k", []byte("new")); err != nil {
				return err
			}
			close(inside)
			<-goOn
			return nil
		})
	}()
	<-inside
	require.NoError(t, store.View(ctx, func(tx projection.StateTx) error {
		value, ok, err := tx.Get("t", "k")
		require.NoError(t, err)
		require.True(t, ok)
		require.Equal(t, "old", string(value))
		close(goOn)
		require.NoError(t, <-done)
		value, _, err = tx.Get("t", "k")
		require.NoError(t, err)
		require.Equal(t, "old", string(value), "a view must not see an update that committed after it began")
		return nil
	}))
}

func BenchmarkStore_Update(b *testing.B) {
	for _, rows := range []int{1_000, 100_000} {
		b.Run(fmt.Sprintf("rows=%d", rows), func(b *testing.B) {
			ctx := context.Background()
			store := memory.New()
			defer store.Close()
			require.NoError(b, store.Update(ctx, func(tx projection.StateTx) error {
				for i := range rows {
					if err := tx.Put("t", fmt.Sprintf("key-%08d", i), []byte("value")); err != nil {
						return err
					}
				}
				return nil
			}))
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i = (i + 7919) % rows
				key := fmt.Sprintf("key-%08d", i)
				if err := store.Update(ctx, func(tx projection.StateTx) error { return tx.Put("t", key, []byte("changed")) }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
