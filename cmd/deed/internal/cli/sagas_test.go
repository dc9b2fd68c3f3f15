package cli

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/saga"
)

var answer = saga.NewSignal[string]("answer")

// selling is a saga whose runs come to different ends, by their input.
func selling(chargeFails bool) *saga.Definition[string, string] {
	return saga.Define("shop", func(s *saga.Run, in string) (string, error) {
		s.Publish("customer", in)
		s.OnRollback("refund", func(s *saga.Run) error {
			_, err := saga.Do(s, "refund", func(saga.Step) (int, error) { return 1, nil })
			return err
		})
		if _, err := saga.Do(s, "charge", func(saga.Step) (int, error) {
			if chargeFails && in == "bob" {
				return 0, errors.New("no answer")
			}
			return 100, nil
		}, saga.Backoff(time.Hour, time.Hour)); err != nil {
			return "", err
		}
		if s.Version("both", 1) >= 1 {
			if err := saga.All(s, "both", func(s *saga.Run) error {
				_, err := saga.Do(s, "pack", func(saga.Step) (string, error) { return "box", nil })
				return err
			}, func(s *saga.Run) error {
				_, err := saga.Do(s, "label", func(saga.Step) (string, error) { return "label", nil })
				return err
			}); err != nil {
				return "", err
			}
		}
		return answer.Wait(s, 0)
	})
}

// shopping is a database with runs of it.
func shopping(t *testing.T) (dsn string, again func(chargeFails bool)) {
	t.Helper()
	run := func(ctx context.Context, store *sqlite.Store, chargeFails bool) {
		app, err := deed.Start(ctx, eventstore.Opened(store), selling(chargeFails), deed.Logger(slog.New(slog.DiscardHandler)))
		require.NoError(t, err)
		for _, customer := range []string{"ann", "bob", "eve"} {
			require.NoError(t, saga.Start(ctx, app, selling(chargeFails), "order of "+customer, customer))
		}
		require.NoError(t, app.Settle(ctx))
		require.NoError(t, app.Stop(ctx))
	}
	dsn = database(t, func(ctx context.Context, store *sqlite.Store) { run(ctx, store, true) })
	return dsn, func(chargeFails bool) {
		store, err := sqlite.Open(t.Context(), strings.TrimPrefix(dsn, "sqlite:"))
		require.NoError(t, err)
		run(t.Context(), store, chargeFails)
		require.NoError(t, store.Close())
	}
}

var anyTime = regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z`)

func TestSagas_ListAndShow(t *testing.T) {
	t.Parallel()
	dsn, _ := shopping(t)
	do := func(args ...string) string {
		t.Helper()
		return ok(t, append(append([]string{"sagas"}, args...), "--store", dsn)...)
	}
	squeeze := func(text string) string {
		return regexp.MustCompile(` {2,}`).ReplaceAllString(anyTime.ReplaceAllString(text, "TIME"), "  ")
	}
	require.Equal(t, strings.TrimPrefix(`
SAGA  RUNNING  WAITING  BLOCKED  OLDEST  NEXT
shop  0  3  0  TIME  TIME
`, "\n"), squeeze(do()))
	require.Equal(t, strings.TrimPrefix(`
RUN  STATUS  AT  WAKES  ATTEMPTS  STARTED  ERROR
order of ann  waiting  signal "answer"  -  0  TIME  -
order of bob  waiting  do "charge"  TIME  1  TIME  no answer
order of eve  waiting  signal "answer"  -  0  TIME  -
`, "\n"), squeeze(do("list", "shop")))
	listed := object(t, do("shop", "--published", "customer=bob", "--json"))
	require.Len(t, listed["runs"], 1)
	require.Len(t, object(t, do("shop", "--limit", "2", "--after", "order of ann", "--json"))["runs"], 2)
	require.Equal(t, 3.0, object(t, do("--json"))["sagas"].([]any)[0].(map[string]any)["open"].(map[string]any)["waiting"])

	shown := do("show", "shop", "order of ann")
	for _, part := range []string{
		"run         shop order of ann", "would undo  refund", `✓  do "charge"`, "→ 100",
		`✓    do "pack" [both.0]`, `✓    do "label" [both.1]`, `…  signal "answer"`, "█",
	} {
		require.Contains(t, shown, part)
	}
	line := object(t, do("show", "shop", "order of bob", "--json"))
	require.Equal(t, "waiting", line["status"])
	step := line["steps"].([]any)[0].(map[string]any)
	require.Equal(t, "do:charge", step["key"])
	require.Equal(t, "retrying", step["status"])
	require.Equal(t, strings.TrimPrefix(`
MARKER  VERSION  OPEN RUNS  FOR EXAMPLE
both  0  1  order of bob
both  1  2  order of ann
`, "\n"), squeeze(do("versions", "shop")))

	require.Contains(t, failure(t, exitFailure, "sagas", "list", "none", "--store", dsn), `there is no saga "none"; there is shop`)
	require.Contains(t, failure(t, exitFailure, "sagas", "show", "shop", "none", "--store", dsn), `saga "shop" has no run "none"`)
	require.Contains(t, failure(t, exitUsage, "sagas", "shop", "--status", "bad", "--store", dsn), `--status "bad"`)
	require.Contains(t, failure(t, exitUsage, "sagas", "shop", "--limit", "0", "--store", dsn), `--limit 0`)
}

func TestSagas_Actions(t *testing.T) {
	t.Parallel()
	dsn, again := shopping(t)
	do := func(args ...string) string {
		t.Helper()
		return ok(t, append(append([]string{"sagas"}, args...), "--store", dsn)...)
	}
	status := func(id string) string {
		t.Helper()
		return object(t, do("show", "shop", id, "--json"))["status"].(string)
	}
	require.Equal(t, "signal answer was sent to saga shop, run order of ann\n", do("signal", "shop", "order of ann", "answer", "--value", `"yes"`, "--id", "1"))
	do("signal", "shop", "order of ann", "answer", "--value", `"yes"`, "--id", "1")
	require.Contains(t, failure(t, exitFailure, "sagas", "signal", "shop", "order of ann", "answer", "--value", "{", "--store", dsn), `is not JSON: "{"`)
	require.Equal(t, "saga shop, run order of bob tries again\n", do("retry", "shop", "order of bob"))
	require.Equal(t, "saga shop, run order of eve is asked to end\n", do("cancel", "shop", "order of eve", "--reason", "changed her mind"))
	again(false)
	require.Equal(t, "completed", status("order of ann"))
	require.Equal(t, "waiting", status("order of bob"))
	require.Equal(t, "cancelled", status("order of eve"))
	require.Contains(t, failure(t, exitFailure, "sagas", "cancel", "shop", "order of eve", "--store", dsn), "saga has ended")

	require.Contains(t, failure(t, exitUsage, "sagas", "restart", "shop", "order of ann", "--store", dsn), "--note")
	require.Contains(t, failure(t, exitFailure, "sagas", "restart", "shop", "order of ann", "--from", "do:none", "--note", "why", "--store", dsn), `no step "do:none"`)
	do("restart", "shop", "order of ann", "--from", "do:charge", "--note", "charged too little")
	again(true)
	require.Equal(t, "completed", status("order of ann"))

	require.Contains(t, failure(t, exitUsage, "sagas", "terminate", "shop", "--store", dsn), "say the run's id, or --all")
	require.Equal(t, "it would be 1 runs of saga shop: say --yes to do it\n", do("terminate", "shop", "--all", "--published", "customer=bob"))
	require.Equal(t, "1 runs of saga shop: is terminated\n", do("terminate", "shop", "--all", "--yes", "--reason", "closed"))
	require.Equal(t, "terminated", status("order of bob"))
	again(true)
	require.Len(t, object(t, do("shop", "--status", "completed,cancelled,terminated", "--json"))["runs"], 3)
}

func TestSagas_SkipExportImport(t *testing.T) {
	t.Parallel()
	dsn, again := shopping(t)
	file := filepath.Join(t.TempDir(), "bob.json")
	ok(t, "sagas", "export", "shop", "order of bob", "-o", file, "--store", dsn)
	ok(t, "sagas", "skip", "shop", "order of bob", "do:charge", "--result", "100", "--note", "by phone", "--store", dsn)
	require.Contains(t, failure(t, exitFailure, "sagas", "skip", "shop", "order of bob", "do:charge", "--note", "twice", "--store", dsn), "not at step")
	again(true)
	skipped := object(t, ok(t, "sagas", "show", "shop", "order of bob", "--json", "--store", dsn))["steps"].([]any)[0].(map[string]any)
	require.Equal(t, "skipped", skipped["status"])
	require.Equal(t, "by phone", skipped["note"])

	data, err := os.ReadFile(file)
	require.NoError(t, err)
	events, err := saga.ReadHistory(data)
	require.NoError(t, err)
	require.NoError(t, selling(false).Replay(t.Context(), events, nil))
	copied, err := saga.ReadHistory([]byte(ok(t, "sagas", "export", "shop", "order of bob", "--store", other(t, file))))
	require.NoError(t, err)
	require.Len(t, copied, len(events))
	for i := range events {
		require.Equal(t, events[i].Type, copied[i].Type)
		require.Equal(t, events[i].Time, copied[i].Time)
	}

	require.Contains(t, failure(t, exitFailure, "sagas", "import", file, "--store", dsn), `saga "shop", run "order of bob"`)
	bad := filepath.Join(t.TempDir(), "bad.json")
	require.NoError(t, os.WriteFile(bad, []byte(`{"format":9}`), 0o600))
	require.Contains(t, failure(t, exitFailure, "sagas", "import", bad, "--store", dsn), "has format 9")
}

// other is a database into which the history was imported, after one in which
// the run has gone on.
func other(t *testing.T, file string) string {
	t.Helper()
	dsn := database(t, func(context.Context, *sqlite.Store) {})
	require.Equal(t, "saga shop, run order of bob is here\n", ok(t, "sagas", "import", file, "--store", dsn))
	store, err := sqlite.Open(t.Context(), strings.TrimPrefix(dsn, "sqlite:"))
	require.NoError(t, err)
	defer store.Close()
	app, err := deed.Start(t.Context(), eventstore.Opened(store), selling(false), deed.Logger(slog.New(slog.DiscardHandler)))
	require.NoError(t, err)
	require.NoError(t, app.Sagas().RetryNow(t.Context(), "shop", "order of bob"))
	require.NoError(t, app.Settle(t.Context()))
	info, err := app.Sagas().Look(t.Context(), "shop", "order of bob")
	require.NoError(t, err)
	require.Equal(t, `signal "answer"`, info.Step, "it has gone on here")
	require.NoError(t, app.Stop(t.Context()))

	fresh := database(t, func(context.Context, *sqlite.Store) {})
	ok(t, "sagas", "import", file, "--store", fresh)
	var in map[string]any
	require.NoError(t, json.Unmarshal([]byte(ok(t, "sagas", "show", "shop", "order of bob", "--json", "--store", fresh)), &in))
	require.Equal(t, "waiting", in["status"])
	return fresh
}
