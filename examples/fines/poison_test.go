package main

import (
	"bytes"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/metatest"
	"github.com/deed-go/deed/projection"
)

// An upcaster with a mistake cannot read one payment. Built anew, the views set
// it aside with the later events of its fine and complete the rest; once it is
// put right, one call for each view makes the report what it should be.
func TestPoison(t *testing.T) {
	metatest.NotRaced(t)
	t.Parallel()
	file := filepath.Join(t.TempDir(), "fines.db")
	var stdout, stderr bytes.Buffer
	require.Zero(t, program(t.Context(), []string{"-json", "-db", file}, &stdout, &stderr), stderr.String())
	store, err := sqlite.Open(t.Context(), file)
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()

	// The poison: a payment after which more happens to its fine.
	var poison eventstore.Recorded
	after := map[string]int{}
	for r, err := range store.Read(t.Context(), eventstore.OneCategory("fine"), eventstore.ReadOptions{Backward: true}) {
		require.NoError(t, err)
		if r.Type == "fine.paid" && after[r.Stream.ID] >= 2 {
			poison = r
			break
		}
		after[r.Stream.ID]++
	}
	require.NotZero(t, poison.Position)
	var ill atomic.Bool
	ill.Store(true)
	open := func() *deed.App {
		app, err := start(t.Context(), store, deed.Logger(slog.New(slog.DiscardHandler)), deed.Encoding(eventstore.UpcastBytes("fine.paid", 1, func(data []byte) ([]byte, error) {
			if ill.Load() && bytes.Equal(data, poison.Data) {
				return nil, errors.New("no such currency")
			}
			return data, nil
		})))
		require.NoError(t, err)
		return app
	}
	// Payments that look the same fail as well.
	unreadable := map[eventstore.Stream]eventstore.Position{}
	var aside, all []eventstore.Position
	for r, err := range store.Read(t.Context(), eventstore.OneCategory("fine"), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		if !strings.HasPrefix(r.Type, "fine.") || r.Type == "fine.penalty_due" {
			continue
		}
		if r.Type == "fine.paid" && bytes.Equal(r.Data, poison.Data) && unreadable[r.Stream] == 0 {
			unreadable[r.Stream] = r.Position
		}
		all = append(all, r.Position)
		if unreadable[r.Stream] > 0 {
			aside = append(aside, r.Position)
		}
	}
	require.Greater(t, len(aside), 2)

	app := open()
	views := []string{months.Name(), activities.Name()}
	for _, name := range views {
		require.NoError(t, app.Projections().Rebuild(t.Context(), name))
	}
	letters, err := app.Projections().DeadLetters(t.Context(), months.Name())
	require.NoError(t, err)
	require.Equal(t, aside, at(letters), "the payment and what follows it, and nothing else, of %d", len(all))
	require.ErrorContains(t, sound(t.Context(), app), "set")
	head, err := store.Head(t.Context())
	require.NoError(t, err)
	r, err := report(t.Context(), app, months, head)
	require.NoError(t, err)
	var text strings.Builder
	require.NoError(t, r.WriteJSON(&text))
	require.NotEqual(t, figures(t, stdout.Bytes()), figures(t, []byte(text.String())), "some payments are missing")

	ill.Store(false)
	for _, name := range views {
		letters, err := app.Projections().DeadLetters(t.Context(), name)
		require.NoError(t, err)
		n, err := app.Projections().ReplayDeadLetters(t.Context(), name)
		require.NoError(t, err)
		require.Equal(t, len(letters), n)
	}
	r, err = report(t.Context(), app, months, head)
	require.NoError(t, err)
	text.Reset()
	require.NoError(t, r.WriteJSON(&text))
	requireReport(t, expectedSample(t), []byte(text.String()))
	require.NoError(t, app.Stop(t.Context()))
}

func at(letters []projection.DeadLetter) (positions []eventstore.Position) {
	for _, d := range letters {
		positions = append(positions, d.Position)
	}
	return positions
}
