package cli

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
)

// onServer is a store that several processes can use.
type onServer struct{ *memory.Store }

func (onServer) Shared() bool { return true }

type deposited struct{ Cents int }

func (deposited) EventType() string { return "deposited" }

// picky panics on deposits of 13 cents while it is ill.
func picky(ill *atomic.Bool) *projection.ViewDefinition[row] {
	return projection.View("owners",
		projection.On(func(r *row, e opened) { r.Owner = e.Owner }),
		projection.On(func(r *row, e deposited) {
			if e.Cents == 13 && ill.Load() {
				panic(projection.Permanent(errors.New("13 is\nunlucky")))
			}
			r.Owner += "+"
		}))
}

// While an application runs, its dead letters are listed, shown, skipped and
// replayed, and its projection rebuilt, from outside.
func TestDeadLetters(t *testing.T) {
	t.Parallel()
	store := onServer{memory.New()}
	defer func() { require.NoError(t, store.Close()) }()
	put(t, store, event("account-ann", "opened", `{"Owner":"ann"}`), event("account-ann", "deposited", `{"Cents":13}`), event("account-ann", "deposited", `{"Cents":1}`),
		event("account-bob", "deposited", `{"Cents":13}`), event("account-cid", "opened", `{"Owner":"cid"}`))
	var ill atomic.Bool
	ill.Store(true)
	owners := picky(&ill)
	app, err := deed.Start(t.Context(), eventstore.Opened(store), owners, deed.Logger(slog.New(slog.DiscardHandler)))
	require.NoError(t, err)
	require.NoError(t, app.Settle(t.Context()))
	do := func(code int, args ...string) outcome {
		t.Helper()
		o := runIn(t, t.Context(), shared(store), append([]string{"projections"}, append(args, "--store", "test:")...)...)
		require.Equal(t, code, o.code, o.stderr)
		return o
	}

	table := do(exitOK, "dead-letters", "owners").stdout
	require.Regexp(t, strings.TrimPrefix(`
POSITION  EVENT          TYPE       ATTEMPTS  SET ASIDE +ERROR
       2  account-ann@2  deposited         1  .+  handler panicked: 13 is …
       3  account-ann@3  deposited         0  .+  -
       4  account-bob@1  deposited         1  .+  handler panicked: 13 is …
`, "\n"), table)
	letters := object(t, do(exitOK, "dead-letters", "owners", "--json").stdout)["dead_letters"].([]any)
	require.Len(t, letters, 3)
	one := do(exitOK, "dead-letter", "owners", "2").stdout
	require.Contains(t, one, "event      account-ann@2, position 2\n")
	require.Contains(t, one, `data       {"Cents":13}`)
	require.Contains(t, one, "picky", "the stack")
	shown := object(t, do(exitOK, "dead-letter", "owners", "2", "--json").stdout)
	require.Equal(t, map[string]any{"Cents": 13.0}, shown["recorded"].(map[string]any)["data"])
	require.Contains(t, shown["stack"], "picky")
	require.Regexp(t, `holds up +later events of \["ann"\]`, do(exitOK, "dead-letter", "owners", "3").stdout)
	require.Contains(t, do(exitOK, "dead-letter", "owners", "3").stdout, "an earlier event that it must not overtake has failed")
	require.Contains(t, do(exitFailure, "dead-letter", "owners", "1").stderr, "no such dead letter")

	require.Contains(t, do(exitFailure, "replay", "owners").stderr, `position 2 of stream "account-ann" failed again`)
	require.Contains(t, do(exitUsage, "skip", "owners", "4").stderr, "--note")
	require.Equal(t, "the event at position 4 is given up\n", do(exitOK, "skip", "owners", "4", "--note", "a test").stdout)
	require.Regexp(t, `4  account-bob@1  deposited  .+  a test\n`, do(exitOK, "dead-letters", "owners", "--skipped").stdout)
	require.Len(t, object(t, do(exitOK, "dead-letters", "owners", "--skipped", "--json").stdout)["skipped"], 1)
	require.Contains(t, do(exitFailure, "skip", "owners", "5", "--note", "x").stderr, "no such dead letter")
	ill.Store(false)
	require.Equal(t, map[string]any{"projection": "owners", "replayed": 2.0}, object(t, do(exitOK, "replay", "owners", "--json").stdout))
	require.Equal(t, "0 events folded\n", do(exitOK, "replay", "owners").stdout)
	require.Equal(t, "projection owners has no dead letters\n", do(exitOK, "dead-letters", "owners").stderr)
	require.Equal(t, "ann++", get(t, store, owners, "ann"))
	require.Empty(t, get(t, store, owners, "bob"))
	require.Equal(t, "the projection stands still until it is resumed\n", do(exitOK, "pause", "owners").stdout)
	require.Contains(t, do(exitOK, "list").stdout, "paused")
	require.NoError(t, app.Settle(t.Context()), "it does not keep the others from settling")
	require.Equal(t, map[string]any{"projection": "owners", "paused": false}, object(t, do(exitOK, "resume", "owners", "--json").stdout))
	require.Equal(t, "the projection was emptied and is being built\n", do(exitOK, "rebuild", "owners").stdout)
	require.NoError(t, app.Settle(t.Context()))
	require.Equal(t, "+", get(t, store, owners, "bob"), "it had another turn")
	require.Equal(t, "projection owners has no skipped events\n", do(exitOK, "dead-letters", "owners", "--skipped").stderr)
	require.Regexp(t, `^5 events up to position 5 made 3 rows, as they should\n$`, do(exitOK, "verify", "owners").stdout)
	require.NoError(t, store.Update(t.Context(), func(tx projection.StateTx) error { return tx.Delete("view.owners", "bob") }))
	require.Contains(t, do(exitFailure, "verify", "owners").stdout, `of 3 rows 1 are missing, 0 are too many, 0 differ; the first is "bob": it is not there and should be {"Owner":"+"}`)
	found := object(t, do(exitFailure, "verify", "owners", "--json").stdout)
	require.Equal(t, false, found["agrees"])
	require.Equal(t, 1.0, found["verification"].(map[string]any)["missing"])
	require.Contains(t, do(exitUsage, "verify", "owners", "--later").stderr, "--later")
	require.NoError(t, app.Stop(t.Context()))

	require.Contains(t, do(exitFailure, "replay", "owners", "--wait", "1s").stderr, "no process that runs the projection \"owners\" has answered; the request was taken back, unless one had just begun it (waited 1s; see --wait and --later)")
	require.Contains(t, do(exitUsage, "replay", "owners", "--wait", "0s").stderr, "--wait 0s")
	require.Contains(t, do(exitFailure, "replay", "1").stderr, "projection name")
}

func get(t *testing.T, state projection.State, view *projection.ViewDefinition[row], key string) string {
	t.Helper()
	var owner string
	require.NoError(t, state.View(t.Context(), func(tx projection.StateTx) error {
		for e, err := range view.Rows(tx, projection.Range{}) {
			if err != nil {
				return err
			}
			if e.Key == key {
				owner = e.Row.Owner
			}
		}
		return nil
	}))
	return owner
}

// On a store for one process at a time a request is left to the next one.
func TestDeadLetters_Later(t *testing.T) {
	t.Parallel()
	var ill atomic.Bool
	ill.Store(true)
	start := func(store *sqlite.Store) *deed.App {
		app, err := deed.Start(t.Context(), eventstore.Opened(store), picky(&ill), deed.Logger(slog.New(slog.DiscardHandler)))
		require.NoError(t, err)
		return app
	}
	dsn := database(t, func(ctx context.Context, store *sqlite.Store) {
		put(t, store, event("account-ann", "opened", `{"Owner":"ann"}`), event("account-ann", "deposited", `{"Cents":13}`))
		app := start(store)
		require.NoError(t, app.Settle(ctx))
		require.NoError(t, app.Stop(ctx))
	})
	require.Equal(t, "the request is left to whoever runs the projection next\n", ok(t, "projections", "replay", "owners", "--later", "--store", dsn))
	ill.Store(false)
	store, err := sqlite.Open(t.Context(), strings.TrimPrefix(dsn, "sqlite:"))
	require.NoError(t, err)
	app := start(store)
	require.NoError(t, app.Settle(t.Context()))
	require.NoError(t, app.Stop(t.Context()))
	require.NoError(t, store.View(t.Context(), func(tx projection.StateTx) error {
		for row := range tx.Scan("projection.requests.owners", projection.Range{}) {
			t.Errorf("a request was left: %s", row.Value)
		}
		return nil
	}))
	require.NoError(t, store.Close())
	require.Empty(t, object(t, ok(t, "projections", "dead-letters", "owners", "--json", "--store", dsn))["dead_letters"])
}
