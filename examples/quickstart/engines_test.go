package main

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/nats"
	"github.com/deed-go/deed/internal/esdbserver"
	"github.com/deed-go/deed/internal/natsserver"
	"github.com/deed-go/deed/query"
)

// TestEngines runs the program's domain on servers that keep events only: the
// read models are kept elsewhere, and nothing else changes.
func TestEngines(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(t *testing.T) eventstore.Opener{
		"nats": func(t *testing.T) eventstore.Opener {
			server, err := natsserver.Start(natsserver.Options{Directory: t.TempDir(), SyncAlways: true})
			require.NoError(t, err)
			t.Cleanup(server.Close)
			return nats.URL(server.URL())
		},
		"esdb": func(t *testing.T) eventstore.Opener {
			server, err := esdbserver.Start(memory.New())
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, server.Close()) })
			return esdb.URL(server.URL())
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			source := start(t)
			for _, expected := range []int64{500, 1000} {
				require.Equal(t, expected, deposit(t.Context(), t, source))
			}
		})
	}
}

// deposit is what the program does, on another store.
func deposit(ctx context.Context, t *testing.T, source eventstore.Opener) int64 {
	app, err := deed.Start(ctx, source, deed.State(memory.New()), accounts, balances)
	require.NoError(t, err)
	defer func() { require.NoError(t, app.Stop(ctx)) }()
	receipt, err := deed.Execute(ctx, app, accounts, Deposit{"ann", 500})
	require.NoError(t, err)
	balance, err := query.Get(ctx, app, balances, "ann", query.AtLeast(receipt))
	require.NoError(t, err)
	return balance.Cents
}
