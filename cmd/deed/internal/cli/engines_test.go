package cli

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/cmd/deed/internal/stores"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/esdbserver"
	"github.com/deed-go/deed/internal/natsserver"
	"github.com/deed-go/deed/projection"
)

// TestEngines runs the commands on servers that keep events only.
func TestEngines(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(t *testing.T) string{
		"nats": func(t *testing.T) string {
			server, err := natsserver.Start(natsserver.Options{Directory: t.TempDir()})
			require.NoError(t, err)
			t.Cleanup(server.Close)
			return server.URL() + "/?stream=shop"
		},
		"esdb": func(t *testing.T) string {
			server, err := esdbserver.Start(memory.New())
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, server.Close()) })
			return server.URL()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dsn := start(t)
			more := [][]string{{"project", "--kind", "sql", "--events", "1000"}, {"live", "--rate", "100", "--listen"}, {"live", "--rate", "100", "--other-process"}}
			for _, w := range append(workloads, more...) {
				args := append(append([]string{"bench"}, w...), "--store", dsn, "--duration", "200ms", "--warmup", "20ms", "--json")
				if w[0] == "append-dcb" {
					require.Contains(t, command(t, args...).stderr, errors.ErrUnsupported.Error(), "%v", w)
					continue
				}
				result := object(t, ok(t, args...))
				require.Equal(t, 0.0, result["errors"], "%v", result)
				require.NotEmpty(t, result["durability"], "%v", w)
			}
			require.NotEmpty(t, object(t, ok(t, "streams", "--store", dsn, "--json"))["streams"])
			require.Len(t, lines(t, ok(t, "events", "--store", dsn, "--limit", "3", "--json")), 3)

			// Read models are elsewhere.
			require.Contains(t, failure(t, exitFailure, "projections", "--store", dsn), "say with --state")
			require.Contains(t, failure(t, exitUsage, "projections", "--store", dsn, "--state", dsn), "keeps events only")
			kept := "sqlite:" + filepath.Join(t.TempDir(), "state.db")
			use(t, dsn, kept)
			projections := object(t, ok(t, "projections", "--store", dsn, "--state", kept, "--json"))["projections"].([]any)
			require.Len(t, projections, 1)
			require.Equal(t, "owners", projections[0].(map[string]any)["name"])
			require.Equal(t, 0.0, projections[0].(map[string]any)["lag"])
		})
	}
}

// use runs a projection on the store.
func use(t *testing.T, dsn, kept string) {
	t.Helper()
	open := func(name string) eventstore.Store {
		parsed, err := stores.Known().Parse(name)
		require.NoError(t, err)
		source, err := parsed.Opener(t.Context(), stores.Create)
		require.NoError(t, err)
		store, err := source.Open(t.Context())
		require.NoError(t, err)
		return store
	}
	store, state := open(dsn), open(kept).(*sqlite.Store)
	defer func() { require.NoError(t, errors.Join(stores.Close(store), state.Close())) }()
	put(t, store, event("account-ann", "opened", `{"Owner":"ann"}`))
	owners := projection.View("owners", projection.On(func(r *row, e opened) { r.Owner = e.Owner }))
	app, err := deed.Start(t.Context(), eventstore.Opened(store), deed.State(state), owners)
	require.NoError(t, err)
	require.NoError(t, app.Settle(t.Context()))
	require.NoError(t, app.Stop(context.WithoutCancel(t.Context())))
}
