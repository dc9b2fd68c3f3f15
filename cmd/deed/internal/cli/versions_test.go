package cli

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
)

// Versions are listed, compared, activated and removed by a tool without their
// definitions.
func TestVersions(t *testing.T) {
	t.Parallel()
	owners := func(suffix string) *projection.ViewDefinition[row] {
		return projection.View("owners", projection.On(func(r *row, e opened) { r.Owner = e.Owner + suffix }))
	}
	dsn := database(t, func(ctx context.Context, store *sqlite.Store) {
		put(t, store, event("account-ann", "opened", `{"Owner":"ann"}`), event("account-bob", "opened", `{"Owner":"bob"}`))
		quiet := deed.Logger(slog.New(slog.DiscardHandler))
		app, err := deed.Start(ctx, eventstore.Opened(store), owners(""), quiet)
		require.NoError(t, err)
		require.NoError(t, app.Settle(ctx))
		require.NoError(t, app.Stop(ctx))
		app, err = deed.Start(ctx, eventstore.Opened(store), owners(""), owners("!").Version(2), quiet)
		require.NoError(t, err)
		for until := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			all, err := app.Projections().Versions(ctx, "owners")
			require.NoError(t, err)
			if len(all) == 2 && all[1].Active {
				break
			}
			require.True(t, time.Now().Before(until))
		}
		require.NoError(t, app.Stop(ctx))
	})
	do := func(code int, args ...string) outcome {
		t.Helper()
		o := command(t, append([]string{"projections"}, append(args, "--store", dsn)...)...)
		require.Equal(t, code, o.code, o.stderr)
		return o
	}
	require.Equal(t, strings.TrimPrefix(`
PROJECTION  ACTIVE  POSITION  HEAD  LAG  BEHIND  DEAD LETTERS  EPOCH  OWNER  PROBLEM
owners      -              2     2    0       -             0      2  -      -
owners/v2   yes            2     2    0       -             0      1  -      -
`, "\n"), do(exitOK).stdout)
	second := object(t, do(exitOK, "--json").stdout)["projections"].([]any)[1].(map[string]any)
	require.Equal(t, 2.0, second["version"])
	require.Equal(t, true, second["active"])

	require.Equal(t, `version 1 of "owners" has 2 rows, version 2 has 2, at position 2: 0 added, 0 removed, 2 changed
~ ann {"Owner":"ann"}
    -> {"Owner":"ann!"}
~ bob {"Owner":"bob"}
    -> {"Owner":"bob!"}
`, do(exitOK, "compare", "owners", "--from", "1", "--to", "2").stdout)
	found := object(t, do(exitOK, "compare", "owners", "--from", "1", "--to", "2", "--json").stdout)
	require.Equal(t, 2.0, found["comparison"].(map[string]any)["changed"])
	require.Contains(t, do(exitFailure, "compare", "owners", "--from", "1", "--to", "3").stderr, "no such version of the projection: 3")
	require.Contains(t, do(exitUsage, "compare", "owners", "--from", "1").stderr, "--to")

	require.Contains(t, do(exitFailure, "drop", "owners", "--version", "2").stderr, "the version is active: activate another one before")
	require.Equal(t, "version 1 of projection owners is read from now on\n", do(exitOK, "activate", "owners", "--version", "1").stdout)
	require.Equal(t, map[string]any{"projection": "owners", "active": 2.0}, object(t, do(exitOK, "activate", "owners", "--version", "2", "--json").stdout))
	require.Equal(t, "version 1 of projection owners is removed\n", do(exitOK, "drop", "owners", "--version", "1").stdout)
	require.Contains(t, do(exitFailure, "activate", "owners", "--version", "1").stderr, "no such version of the projection: 1")
	require.Len(t, object(t, do(exitOK, "--json").stdout)["projections"], 1)
	require.Contains(t, do(exitUsage, "activate", "owners").stderr, "--version")
	require.Contains(t, do(exitFailure, "activate", "owners", "--version", "0").stderr, "version 0: use 1 to")
}

// What nobody runs any more falls behind, and is read again only if one insists.
func TestVersions_Behind(t *testing.T) {
	t.Parallel()
	view := projection.View("owners", projection.On(func(r *row, e opened) { r.Owner = e.Owner }))
	dsn := database(t, func(ctx context.Context, store *sqlite.Store) {
		put(t, store, event("account-ann", "opened", `{"Owner":"ann"}`))
		quiet := deed.Logger(slog.New(slog.DiscardHandler))
		for _, p := range []*projection.ViewDefinition[row]{view, view.Version(2)} {
			app, err := deed.Start(ctx, eventstore.Opened(store), p, quiet)
			require.NoError(t, err)
			put(t, store, event("account-bob", "opened", `{"Owner":"bob"}`))
			require.NoError(t, app.Settle(ctx))
			for until := time.Now().Add(time.Minute); p.Name() != view.Name(); time.Sleep(time.Millisecond) {
				all, err := app.Projections().Versions(ctx, "owners")
				require.NoError(t, err)
				if all[len(all)-1].Active {
					break
				}
				require.True(t, time.Now().Before(until))
			}
			require.NoError(t, app.Stop(ctx))
		}
	})
	refused := failure(t, exitFailure, "projections", "activate", "owners", "--version", "1", "--store", dsn)
	require.Contains(t, refused, "version 1 of projection \"owners\" is behind: it is at position 2, and what is read now at 3")
	require.Contains(t, refused, "--although-behind")
	require.Equal(t, "version 1 of projection owners is read from now on\n", ok(t, "projections", "activate", "owners", "--version", "1", "--although-behind", "--store", dsn))
}
