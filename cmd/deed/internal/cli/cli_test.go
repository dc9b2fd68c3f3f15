package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/cmd/deed/internal/stores"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
)

// asProgram makes the test binary be the deed command: for other processes.
const asProgram = "DEED_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(Main(context.Background(), os.Args[1:], Environment{
			Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Stores: stores.Known(),
		}))
	}
	goleak.VerifyTestMain(pgtest.Main(m))
}

func self(args ...string) (*exec.Cmd, error) {
	command := exec.Command(os.Args[0], args...)
	command.Env = append(os.Environ(), asProgram+"=1")
	return command, nil
}

// outcome is what a command did.
type outcome struct {
	code           int
	stdout, stderr string
}

// command runs a command in this process.
func command(t *testing.T, args ...string) outcome {
	t.Helper()
	return runIn(t, t.Context(), stores.Known(), args...)
}

func runIn(t *testing.T, ctx context.Context, known stores.Table, args ...string) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := Main(ctx, args, Environment{Stdin: strings.NewReader(""), Stdout: &stdout, Stderr: &stderr, Stores: known, Self: self})
	return outcome{code, stdout.String(), stderr.String()}
}

// ok runs a command that must succeed, without a word about it, and returns
// what it printed.
func ok(t *testing.T, args ...string) string {
	t.Helper()
	o := command(t, args...)
	require.Equal(t, exitOK, o.code, "%s", o.stderr)
	return o.stdout
}

// failure runs a command that must fail, and returns what it complained about.
func failure(t *testing.T, code int, args ...string) string {
	t.Helper()
	o := command(t, args...)
	require.Equal(t, code, o.code, "%v: stdout %q, stderr %q", args, o.stdout, o.stderr)
	require.Empty(t, o.stdout)
	require.True(t, strings.HasPrefix(o.stderr, "deed: "), "%q", o.stderr)
	return o.stderr
}

// object parses a JSON document.
func object(t *testing.T, text string) map[string]any {
	t.Helper()
	var found map[string]any
	decoder := json.NewDecoder(strings.NewReader(text))
	require.NoError(t, decoder.Decode(&found), "%s", text)
	_, err := decoder.Token()
	require.ErrorIs(t, err, io.EOF, "one document")
	return found
}

func keys(of map[string]any) (all []string) {
	for key := range of {
		all = append(all, key)
	}
	return all
}

// database makes a file with a few events, and returns its DSN.
func database(t *testing.T, fill func(ctx context.Context, store *sqlite.Store)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "shop.db")
	store, err := sqlite.Open(t.Context(), path)
	require.NoError(t, err)
	if fill != nil {
		fill(t.Context(), store)
	}
	require.NoError(t, store.Close())
	return "sqlite:" + path
}

var day = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

func event(stream, eventType, data string, tags ...string) eventstore.Event {
	s, err := eventstore.ParseStream(stream)
	if err != nil {
		panic(err)
	}
	return eventstore.Event{Stream: s, Type: eventType, Data: []byte(data), Tags: tags, Time: day}
}

func put(t *testing.T, store eventstore.Store, events ...eventstore.Event) {
	t.Helper()
	_, err := store.Append(t.Context(), eventstore.Commit{Events: events})
	require.NoError(t, err)
}

// shop is a log of three streams.
func shop(t *testing.T) string {
	return database(t, func(_ context.Context, store *sqlite.Store) {
		put(t, store, event("account-ann", "opened", `{"owner": "ann"}`), event("account-bob", "opened", `{"owner":"bob"}`))
		put(t, store, event("order-1", "placed", `{"lines":[1,2]}`, "customer:ann", "region:eu"))
		put(t, store, event("account-ann", "deposited", `{"cents":500}`, "customer:ann"))
	})
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{},
		{"--help"},
		{"bench", "--help"},
		{"bench", "append", "--help"},
		{"bench", "append-dcb", "--help"},
		{"bench", "load", "--help"},
		{"bench", "replay", "--help"},
		{"bench", "execute", "--help"},
		{"bench", "project", "--help"},
		{"bench", "live", "--help"},
		{"bench", "saga", "--help"},
		{"migrate", "--help"},
		{"streams", "--help"},
		{"events", "--help"},
		{"projections", "--help"},
		{"projections", "list", "--help"},
		{"projections", "dead-letters", "--help"},
		{"projections", "dead-letter", "--help"},
		{"projections", "replay", "--help"},
		{"projections", "skip", "--help"},
		{"projections", "pause", "--help"},
		{"projections", "resume", "--help"},
		{"projections", "rebuild", "--help"},
		{"projections", "verify", "--help"},
		{"projections", "compare", "--help"},
		{"projections", "activate", "--help"},
		{"projections", "drop", "--help"},
	} {
		o := command(t, args...)
		require.Equal(t, exitOK, o.code, args)
		require.Contains(t, o.stdout, "Usage: deed", args)
		require.Empty(t, o.stderr, args)
	}
	help := ok(t, "events", "--help")
	for _, example := range stores.Known().Examples() {
		require.Contains(t, help, example, "the help says which stores there are")
	}
	require.NotContains(t, ok(t, "--help"), "\n  subscriber", "what is not for people is not shown")
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for says, args := range map[string][]string{
		"nonsense":                               {"nonsense"},
		"unknown flag --speed":                   {"bench", "append", "--speed", "9"},
		"choose append, append-dcb":              {"bench", "--store", "memory:"},
		"--duration 0s":                          {"bench", "append", "--store", "memory:", "--duration", "0s"},
		"--writers":                              {"bench", "append", "--store", "memory:", "--writers", "many"},
		"--after must be one of":                 {"bench", "append-dcb", "--store", "memory:", "--after", "noon"},
		"--kind must be one of":                  {"bench", "project", "--store", "memory:", "--kind", "x"},
		"--store is missing: name a database: ":  {"streams"},
		`"shop.db" does not begin with the name`: {"streams", "--store", "shop.db"},
		`"nodash" has no '-'`:                    {"events", "--store", "memory:", "--stream", "nodash"},
		`category "a-b"`:                         {"streams", "--store", "memory:", "--category", "a-b"},
		`"soon" is no position`:                  {"events", "--store", "memory:", "--after", "soon"},
		"leave out --backward":                   {"events", "--store", "memory:", "--follow", "--backward"},
		"leave out --backward and --through":     {"events", "--store", "memory:", "--follow", "--through", "5"},
		"--every 1ms":                            {"projections", "--watch", "--every", "1ms", "--store", "memory:"},
		"--limit":                                {"events", "--store", "memory:", "--limit=-5"},
		"unexpected argument":                    {"migrate", "sqlite:x.db"},
	} {
		text := failure(t, exitUsage, args...)
		require.Contains(t, text, says)
		require.Contains(t, text, "see: deed", "it says where to find help")
	}
	text := failure(t, exitUsage, "bench", "append", "--store", "memory:", "--writers", "0", "--payload", "1")
	require.Contains(t, text, "--writers 0")
	require.Contains(t, text, "--payload 1", "all mistakes are told at once")
	require.Contains(t, text, "see: deed bench append --help")
}

// A DSN of an unknown backend lists the known ones; its password is not told.
func TestUnknownBackend(t *testing.T) {
	t.Parallel()
	for _, command := range [][]string{{"bench", "append"}, {"migrate"}, {"streams"}, {"events"}, {"projections"}} {
		text := failure(t, exitUsage, append(command, "--store", "oracle://ann:secret@h/s")...)
		require.Contains(t, text, `unknown backend, "oracle"`)
		for _, example := range stores.Known().Examples() {
			require.Contains(t, text, example)
		}
		require.NotContains(t, text, "secret")
	}
}

func TestMissingFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "none.db")
	for _, command := range []string{"streams", "events", "projections"} {
		text := failure(t, exitFailure, command, "--store", "sqlite:"+path)
		require.Contains(t, text, "there is no file")
		require.Contains(t, text, path)
	}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries, "looking makes nothing")
}

func TestInUse(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "shop.db")
	store, err := sqlite.Open(t.Context(), path)
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	for _, command := range [][]string{{"streams"}, {"events"}, {"projections"}, {"migrate"}, {"bench", "append"}} {
		text := failure(t, exitFailure, append(command, "--store", "sqlite:"+path)...)
		require.Contains(t, text, fmt.Sprint("process ", os.Getpid()))
		require.Contains(t, text, "SELECT * FROM deed_history", "it says how to look at the file meanwhile")
	}
}

func TestNotADatabase(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "letter.txt")
	require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("dear ann, ", 100)), 0o600))
	require.Contains(t, failure(t, exitFailure, "events", "--store", "sqlite:"+path), "not a SQLite database")
	require.Contains(t, failure(t, exitFailure, "migrate", "--store", "sqlite:"+path), "not a SQLite database")
}

func TestMigrate(t *testing.T) {
	t.Parallel()
	dsn := "sqlite:" + filepath.Join(t.TempDir(), "new.db")
	steps := sqlite.Migrations()
	last := steps[len(steps)-1]

	require.NotContains(t, ok(t, "migrate", "--store", dsn, "--print"), "applied")
	_, err := os.Stat(strings.TrimPrefix(dsn, "sqlite:"))
	require.ErrorIs(t, err, os.ErrNotExist, "printing makes nothing")
	printed := ok(t, "migrate", "--store", dsn, "--print")
	for _, m := range steps {
		require.Contains(t, printed, strings.TrimSpace(m.SQL))
	}
	document := object(t, ok(t, "migrate", "--store", dsn, "--print", "--json"))
	require.ElementsMatch(t, []string{"store", "migrations"}, keys(document))
	require.Len(t, document["migrations"], len(steps))

	document = object(t, ok(t, "migrate", "--store", dsn, "--json"))
	require.ElementsMatch(t, []string{"store", "version", "applied"}, keys(document))
	require.Len(t, document["applied"], len(steps))
	require.EqualValues(t, last.Version, document["version"])
	document = object(t, ok(t, "migrate", "--store", dsn, "--json"))
	require.Equal(t, []any{}, document["applied"])
	require.Equal(t, fmt.Sprintf("%s is at %03d %s\n", dsn, last.Version, last.Name), ok(t, "migrate", "--store", dsn))

	other := "sqlite:" + filepath.Join(t.TempDir(), "other.db")
	require.Contains(t, ok(t, "migrate", "--store", other), fmt.Sprintf("applied %03d %s\n", last.Version, last.Name))

	require.Equal(t, "nothing to migrate: memory: has no schema\n", ok(t, "migrate", "--store", "memory:"))
	require.Contains(t, ok(t, "migrate", "--store", "memory:", "--print"), "nothing to migrate")
	document = object(t, ok(t, "migrate", "--store", "memory:", "--json"))
	require.Equal(t, []any{}, document["applied"])
}

func TestStreams(t *testing.T) {
	t.Parallel()
	dsn := shop(t)
	require.Equal(t, strings.TrimPrefix(`
STREAM       EVENTS  LAST POSITION  LAST EVENT
account-ann       2              4  2026-05-04T12:00:00.000Z
order-1           1              3  2026-05-04T12:00:00.000Z
account-bob       1              2  2026-05-04T12:00:00.000Z
`, "\n"), ok(t, "streams", "--store", dsn))

	document := object(t, ok(t, "streams", "--store", dsn, "--category", "account", "--json"))
	require.Equal(t, map[string]any{
		"store": dsn, "head": 4.0, "more": false,
		"streams": []any{
			map[string]any{"stream": "account-ann", "category": "account", "id": "ann", "events": 2.0, "last_position": 4.0, "last_time": "2026-05-04T12:00:00Z"},
			map[string]any{"stream": "account-bob", "category": "account", "id": "bob", "events": 1.0, "last_position": 2.0, "last_time": "2026-05-04T12:00:00Z"},
		},
	}, document)

	o := command(t, "streams", "--store", dsn, "--limit", "2")
	require.Equal(t, exitOK, o.code)
	require.Len(t, strings.Split(strings.TrimSpace(o.stdout), "\n"), 3)
	require.Contains(t, o.stderr, "there are more")
	require.Equal(t, true, object(t, ok(t, "streams", "--store", dsn, "--limit", "2", "--json"))["more"])
	require.Equal(t, false, object(t, ok(t, "streams", "--store", dsn, "--limit", "3", "--json"))["more"])
	require.Len(t, object(t, ok(t, "streams", "--store", dsn, "--limit", "0", "--json"))["streams"], 3)

	o = command(t, "streams", "--store", "memory:")
	require.Equal(t, outcome{exitOK, "", "no streams\n"}, o)
	require.Equal(t, []any{}, object(t, ok(t, "streams", "--store", "memory:", "--json"))["streams"])
}

// lines parses one JSON object a line.
func lines(t *testing.T, text string) (all []map[string]any) {
	t.Helper()
	for line := range strings.Lines(text) {
		all = append(all, object(t, line))
	}
	return all
}

func positions(events []map[string]any) (all []int) {
	for _, e := range events {
		all = append(all, int(e["position"].(float64)))
	}
	return all
}

func TestEvents(t *testing.T) {
	t.Parallel()
	dsn := shop(t)
	require.Equal(t, strings.TrimPrefix(`
1  2026-05-04T12:00:00.000Z  account-ann@1  opened  {"owner":"ann"}
2  2026-05-04T12:00:00.000Z  account-bob@1  opened  {"owner":"bob"}
3  2026-05-04T12:00:00.000Z  order-1@1      placed  [customer:ann region:eu]  {"lines":[1,2]}
4  2026-05-04T12:00:00.000Z  account-ann@2  deposited  [customer:ann]  {"cents":500}
`, "\n"), ok(t, "events", "--store", dsn))

	for name, c := range map[string]struct {
		args     []string
		expected []int
	}{
		"all":            {nil, []int{1, 2, 3, 4}},
		"stream":         {[]string{"--stream", "account-ann"}, []int{1, 4}},
		"category":       {[]string{"--category", "account"}, []int{1, 2, 4}},
		"type":           {[]string{"--type", "placed"}, []int{3}},
		"any type":       {[]string{"--type", "placed", "--type", "deposited"}, []int{3, 4}},
		"tag":            {[]string{"--tag", "customer:ann"}, []int{3, 4}},
		"all tags":       {[]string{"--tag", "customer:ann", "--tag", "region:eu"}, []int{3}},
		"several":        {[]string{"--category", "account", "--tag", "customer:ann"}, []int{4}},
		"after":          {[]string{"--after", "2"}, []int{3, 4}},
		"after the head": {[]string{"--after", "head"}, nil},
		"through":        {[]string{"--after", "1", "--through", "3"}, []int{2, 3}},
		"backward":       {[]string{"--backward", "--limit", "2"}, []int{4, 3}},
		"limit":          {[]string{"--limit", "2"}, []int{1, 2}},
		"none":           {[]string{"--type", "a,b"}, nil},
	} {
		require.Equal(t, c.expected, positions(lines(t, ok(t, append([]string{"events", "--store", dsn, "--json"}, c.args...)...))), name)
	}
	require.Empty(t, ok(t, "events", "--store", "memory:"))
}

func TestEvents_JSON(t *testing.T) {
	t.Parallel()
	dsn := database(t, func(_ context.Context, store *sqlite.Store) {
		with := event("account-ann", "opened", `{"owner": "<ann>", "cents": 12345678901234567890}`, "vip")
		with.Metadata = eventstore.Metadata{Actor: "bob", CorrelationID: "c1"}
		put(t, store, with, event("account-ann", "scanned", "\x00\xff"), event("account-ann", "noted", "plain text"), event("account-ann", "closed", ""))
	})
	printed := ok(t, "events", "--store", dsn, "--json")
	require.Contains(t, printed, `"data":{"owner":"<ann>","cents":12345678901234567890}`, "numbers and signs are printed as they are stored")
	events := lines(t, printed)
	require.Len(t, events, 4)
	require.Len(t, events[0]["id"], 36)
	delete(events[0], "id")
	delete(events[0], "data")
	require.Equal(t, map[string]any{
		"position": 1.0, "stream": "account-ann", "version": 1.0, "type": "opened", "time": "2026-05-04T12:00:00Z",
		"tags": []any{"vip"}, "metadata": map[string]any{"actor": "bob", "correlation": "c1"},
	}, events[0])
	require.Equal(t, "AP8=", events[1]["data"])
	require.Equal(t, "base64", events[1]["data_encoding"])
	require.Equal(t, "cGxhaW4gdGV4dA==", events[2]["data"])
	require.Equal(t, "base64", events[2]["data_encoding"])
	require.NotContains(t, events[3], "data")
	require.NotContains(t, events[3], "data_encoding")
}

// Data must not write to the terminal as it likes.
func TestReadable(t *testing.T) {
	t.Parallel()
	for data, expected := range map[string]string{
		"":                       "",
		"{ \"a\" :\n1}":          `{"a":1}`,
		"text\x1b[2J":            `"text\x1b[2J"`,
		"\x00\xff":               "base64:AP8=",
		"\"\u009b2J\u202ex\"":    "\"\ufffd2J\ufffdx\"",
		strings.Repeat("1", 200): strings.Repeat("1", longData) + "…",
	} {
		require.Equal(t, expected, readable([]byte(data)))
	}
}

// shared is a table with one more backend, whose only store is the given one.
func shared(store eventstore.Store) stores.Table {
	return append(stores.Known(), stores.Backend{
		Schemes: []string{"test"}, Example: "test:", Shared: true, Durability: "none",
		Open: func(context.Context, string, stores.Mode) (eventstore.Opener, error) {
			return eventstore.Opened(store), nil
		},
	})
}

func TestEvents_Follow(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	put(t, store, event("account-ann", "opened", `{}`), event("account-bob", "opened", `{}`))
	out, stdout := io.Pipe()
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	var stderr bytes.Buffer
	code := make(chan int, 1)
	go func() {
		defer stdout.Close()
		code <- Main(ctx, []string{"events", "--store", "test:", "--follow", "--json", "--type", "opened"}, Environment{Stdout: stdout, Stderr: &stderr, Stores: shared(store)})
	}()
	printed := bufio.NewScanner(out)
	next := func() float64 {
		require.True(t, printed.Scan(), "%v", printed.Err())
		return object(t, printed.Text())["position"].(float64)
	}
	require.Equal(t, 1.0, next(), "what is stored comes first")
	require.Equal(t, 2.0, next())
	put(t, store, event("account-cid", "closed", `{}`), event("account-cid", "opened", `{}`))
	require.Equal(t, 4.0, next())
	interrupt()
	require.False(t, printed.Scan())
	require.Equal(t, exitOK, <-code, "being interrupted is how it ends")
	require.Empty(t, stderr.String())

	o := runIn(t, t.Context(), shared(store), "events", "--store", "test:", "--follow", "--limit", "3", "--json")
	require.Equal(t, exitOK, o.code)
	require.Equal(t, []int{1, 2, 3}, positions(lines(t, o.stdout)), "a limit ends it too")
}

// Reading that is interrupted is not complete, so it fails.
func TestEvents_Interrupted(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	put(t, store, event("account-ann", "opened", `{}`))
	ctx, interrupt := context.WithCancel(t.Context())
	interrupt()
	o := runIn(t, ctx, shared(store), "events", "--store", "test:")
	require.Equal(t, exitFailure, o.code)
	require.Contains(t, o.stderr, "interrupted")
}

// full is a store's output that cannot be written.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, fmt.Errorf("the disk is full") }

func TestOutputFails(t *testing.T) {
	t.Parallel()
	dsn := shop(t)
	for _, args := range [][]string{
		{"events", "--store", dsn},
		{"events", "--store", dsn, "--json"},
		{"streams", "--store", dsn},
		{"streams", "--store", dsn, "--json"},
		{"bench", "append", "--store", "memory:", "--duration", "1ms", "--warmup", "0s"},
	} {
		var stderr bytes.Buffer
		code := Main(t.Context(), args, Environment{Stdout: full{}, Stderr: &stderr, Stores: stores.Known()})
		require.Equal(t, exitFailure, code, args)
		require.Contains(t, stderr.String(), "the disk is full")
	}
}

type opened struct{ Owner string }

func (opened) EventType() string { return "opened" }

type row struct{ Owner string }

func TestProjections(t *testing.T) {
	t.Parallel()
	var head eventstore.Position
	dsn := database(t, func(ctx context.Context, store *sqlite.Store) {
		put(t, store, event("account-ann", "opened", `{"Owner":"ann"}`), event("account-bob", "opened", `{"Owner":`), event("account-bob", "opened", `{}`))
		owners := projection.View("owners", projection.On(func(r *row, e opened) { r.Owner = e.Owner }))
		copied := projection.View("copied", projection.On(func(r *row, e opened) { r.Owner = e.Owner }))
		app, err := deed.Start(ctx, eventstore.Opened(store), owners, copied, deed.Logger(slog.New(slog.DiscardHandler)))
		require.NoError(t, err)
		require.NoError(t, app.Settle(ctx))
		require.NoError(t, app.Stop(ctx))
		put(t, store, event("account-cid", "opened", `{}`), event("account-cid", "closed", `{}`))
		head, err = store.Head(ctx)
		require.NoError(t, err)

		// Removed: nothing but its epoch is left.
		gone := projection.View("gone", projection.On(func(r *row, e opened) { r.Owner = e.Owner }))
		app, err = deed.New(ctx, eventstore.Opened(store), gone)
		require.NoError(t, err)
		require.NoError(t, app.Projections().Rebuild(ctx, "gone"))
		require.NoError(t, app.Stop(ctx))
	})
	got := object(t, ok(t, "projections", "--store", dsn, "--json"))
	for _, one := range got["projections"].([]any) {
		p := one.(map[string]any)
		require.InDelta(t, time.Since(day).Seconds(), p["lag_seconds"], 60)
		delete(p, "lag_seconds")
	}
	require.Equal(t, map[string]any{
		"store": dsn, "head": float64(head), "projections": []any{
			map[string]any{"name": "copied", "version": 1.0, "active": true, "position": 3.0, "lag": 2.0, "epoch": 1.0, "dead_letters": 2.0},
			map[string]any{"name": "owners", "version": 1.0, "active": true, "position": 3.0, "lag": 2.0, "epoch": 1.0, "dead_letters": 2.0},
		},
	}, got)
	require.Regexp(t, `^PROJECTION  ACTIVE  POSITION  HEAD  LAG +BEHIND  DEAD LETTERS  EPOCH  OWNER  PROBLEM
copied      yes            3     5    2  \d+h\d+m\d+s             2      1  -      -
owners      yes            3     5    2  \d+h\d+m\d+s             2      1  -      -
$`, ok(t, "projections", "--store", dsn))

	require.Equal(t, outcome{exitOK, "", "no projections\n"}, command(t, "projections", "--store", "memory:"))
	require.Equal(t, []any{}, object(t, ok(t, "projections", "--store", "memory:", "--json"))["projections"])
}

// While an application runs on a store that others can open, its owner is shown.
func TestProjections_Held(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	put(t, store, event("account-ann", "opened", `{"Owner":"ann"}`))
	owners := projection.View("owners", projection.On(func(r *row, e opened) { r.Owner = e.Owner }))
	app, err := deed.Start(t.Context(), eventstore.Opened(store), owners)
	require.NoError(t, err)
	require.NoError(t, app.Settle(t.Context()))
	o := runIn(t, t.Context(), shared(store), "projections", "--store", "test:", "--json")
	require.Equal(t, exitOK, o.code, o.stderr)
	one := object(t, o.stdout)["projections"].([]any)[0].(map[string]any)
	require.NotEmpty(t, one["owner"])
	require.NoError(t, app.Stop(t.Context()))
	o = runIn(t, t.Context(), shared(store), "projections", "--store", "test:", "--json")
	require.NotContains(t, object(t, o.stdout)["projections"].([]any)[0], "owner")
}

// Watching looks again and again, and says how fast a projection moves.
func TestProjections_Watch(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	owners := projection.View("owners", projection.On(func(r *row, e opened) { r.Owner = e.Owner }))
	app, err := deed.Start(t.Context(), eventstore.Opened(store), owners)
	require.NoError(t, err)
	put(t, store, event("account-ann", "opened", `{"Owner":"ann"}`))
	require.NoError(t, app.Settle(t.Context()))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	read, write := io.Pipe()
	ended := make(chan int, 1)
	go func() {
		ended <- Main(ctx, []string{"projections", "--watch", "--every", "20ms", "--json", "--store", "test:"}, Environment{Stdout: write, Stderr: io.Discard, Stores: shared(store)})
		_ = write.Close()
	}()
	looks := json.NewDecoder(read)
	for looked := 0; ; looked++ {
		var s sight
		require.NoError(t, looks.Decode(&s))
		require.Len(t, s.Projections, 1)
		if looked == 0 {
			require.EqualValues(t, 1, s.Projections[0].Position)
			require.Zero(t, s.Projections[0].PerSecond)
			put(t, store, event("account-bob", "opened", `{"Owner":"bob"}`))
			require.NoError(t, app.Settle(t.Context()))
		}
		if s.Projections[0].PerSecond > 0 {
			require.EqualValues(t, 2, s.Projections[0].Position)
			break
		}
		require.Less(t, looked, 1000)
	}
	cancel()
	_, _ = io.Copy(io.Discard, read)
	require.Equal(t, exitOK, <-ended)
	require.NoError(t, app.Stop(t.Context()))
}

func TestSight(t *testing.T) {
	t.Parallel()
	before := &sight{at: day, Projections: []projectionInfo{{Name: "a", Position: 100}, {Name: "b", Position: 900}, {Name: "c", Position: 5}}}
	now := &sight{Head: 1000, at: day.Add(2 * time.Second), Projections: []projectionInfo{
		{Name: "a", Active: true, Position: 300, Lag: 700, LagSeconds: 0.2}, {Name: "b", Position: 10, Lag: 990, LagSeconds: 3725.4}, {Name: "c", Position: 5, Lag: 995, Owner: "me"}, {Name: "d", Position: 7, Lag: 993},
	}}
	now.since(before)
	var text strings.Builder
	require.NoError(t, now.table(true).print(&text))
	require.Equal(t, strings.TrimPrefix(`
PROJECTION  ACTIVE  POSITION   HEAD  LAG  BEHIND  A SECOND  LEFT  DEAD LETTERS  EPOCH  OWNER  PROBLEM
a           yes          300  1,000  700    < 1s       100    7s             0      0  -      -
b           -             10  1,000  990  1h2m5s         0     -             0      0  -      -
c           -              5  1,000  995       -         0     -             0      0  me     -
d           -              7  1,000  993       -         0     -             0      0  -      -
`, "\n"), text.String())
}

func TestInform(t *testing.T) {
	t.Parallel()
	stored := func(log string, p eventstore.Position) projection.Stored {
		return projection.Stored{Name: "owners", Checkpoint: projection.Checkpoint{Log: log, Position: p}}
	}
	require.Contains(t, inform(stored("old", 5), "new", 9).Problem, "the database was replaced")
	require.Contains(t, inform(stored("log", 10), "log", 9).Problem, "restored from an older state")
	require.Empty(t, inform(stored("log", 9), "log", 9).Problem)
	require.EqualValues(t, 4, inform(stored("log", 5), "log", 9).Lag)
}

// stateless is a store that keeps nothing but the log.
type stateless struct{ eventstore.Store }

func TestProjections_NoState(t *testing.T) {
	t.Parallel()
	inner := memory.New()
	defer func() { require.NoError(t, inner.Close()) }()
	o := runIn(t, t.Context(), shared(stateless{inner}), "projections", "--store", "test:")
	require.Equal(t, exitFailure, o.code)
	require.Contains(t, o.stderr, "keeps events only: say with --state")
}

var workloads = [][]string{
	{"append"},
	{"append", "--tags", "2", "--batch", "10"},
	{"append-dcb"},
	{"append-dcb", "--after", "start"},
	{"load", "--streams", "10"},
	{"replay", "--events", "1000"},
	{"execute", "--aggregates", "10"},
	{"project", "--events", "1000"},
	{"live", "--rate", "1000"},
	{"saga"},
	{"react"},
}

func TestBench(t *testing.T) {
	t.Parallel()
	file := "sqlite:" + filepath.Join(t.TempDir(), "bench.db")
	for _, dsn := range []string{"memory:", file} {
		for _, w := range append(workloads, []string{"project", "--kind", "sql", "--events", "1000"}) {
			if dsn == "memory:" && len(w) > 2 && w[2] == "sql" {
				continue
			}
			args := append([]string{"bench"}, w...)
			args = append(args, "--store", dsn, "--duration", "30ms", "--warmup", "1ms", "--payload", "128", "--json")
			result := object(t, ok(t, args...))
			found := keys(result)
			require.ElementsMatch(t, []string{
				"workload", "store", "durability", "parameters", "operations", "seconds", "per_second",
				"p50_ms", "p95_ms", "p99_ms", "conflicts", "errors", "details",
			}, found, w)
			require.Equal(t, w[0], result["workload"])
			require.Equal(t, dsn, result["store"])
			require.Equal(t, map[string]any{"memory:": "none", file: "synced: WAL, synchronous=FULL"}[dsn], result["durability"])
			parameters := result["parameters"].(map[string]any)
			require.Equal(t, 128.0, parameters["payload"])
			require.Equal(t, 0.03, parameters["duration_seconds"])
			require.IsType(t, 0.0, result["operations"])
			require.Equal(t, 0.0, result["errors"])
		}
	}
	// The same database, looked at with the other commands.
	require.Contains(t, ok(t, "streams", "--store", file, "--category", "bench_preload"), "bench_preload-blocks")
	require.NotEmpty(t, ok(t, "events", "--store", file, "--category", "bench_execute", "--limit", "1"))
	require.Empty(t, object(t, ok(t, "projections", "--store", file, "--json"))["projections"], "a projection that was measured is removed")
}

func TestBench_Table(t *testing.T) {
	t.Parallel()
	printed := ok(t, "bench", "append", "--store", "memory:", "--writers", "2", "--duration", "20ms", "--warmup", "0s")
	for _, says := range []string{
		"workload           append\n", "store              memory:\n", "durability         none\n", "writers=2", " commits in 0.02 s\n",
		"latency            ", "(a commit)\n", "conflicts          0\n", "errors             0\n", "verified streams   2\n",
	} {
		require.Contains(t, printed, says)
	}
}

// failing is a store that refuses every append for good; its error knows a
// password.
type failing struct{ eventstore.Store }

func (failing) Append(context.Context, eventstore.Commit) (eventstore.Receipt, error) {
	return eventstore.Receipt{}, fmt.Errorf("%w: it was postgres://ann:secret@h/s", eventstore.ErrClosed)
}

// When operations failed, the result is printed all the same.
func TestBench_Errors(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	args := []string{"bench", "append", "--store", "test:", "--writers", "1", "--duration", "1h", "--warmup", "0s"}
	o := runIn(t, t.Context(), shared(failing{store}), append(args, "--json")...)
	require.Equal(t, exitFailure, o.code)
	result := object(t, o.stdout)
	require.Equal(t, 0.0, result["operations"])
	require.Equal(t, 0.0, result["per_second"])
	require.Equal(t, 1.0, result["errors"])
	require.Equal(t, []any{"store is closed: it was postgres://ann:xxxxx@h/s"}, result["problems"])
	require.Equal(t, "deed: errors: 1, the first of them:\n  store is closed: it was postgres://ann:xxxxx@h/s\n", o.stderr)

	o = runIn(t, t.Context(), shared(failing{store}), args...)
	require.Equal(t, exitFailure, o.code)
	require.Contains(t, o.stdout, "errors             1\n")
	require.NotContains(t, o.stdout+o.stderr, "secret")

	o = runIn(t, t.Context(), shared(failing{store}), append(args, "--preload", "100")...)
	require.Equal(t, exitFailure, o.code)
	require.Empty(t, o.stdout, "nothing was measured")
	require.Contains(t, o.stderr, "store events beforehand: store is closed: it was postgres://ann:xxxxx@h/s")
}

// A password in the DSN is neither in the result nor in an error.
func TestBench_RedactsTheStore(t *testing.T) {
	t.Parallel()
	known := shared(memory.New())
	known[len(known)-1].Schemes = []string{"postgres"}
	args := []string{"bench", "append", "--store", "postgres://ann:secret@h/s?password=secret", "--duration", "1ms", "--warmup", "0s"}
	o := runIn(t, t.Context(), known[len(known)-1:], append(args, "--json")...)
	require.Equal(t, exitOK, o.code, o.stderr)
	require.Equal(t, "postgres://ann:xxxxx@h/s?password=xxxxx", object(t, o.stdout)["store"])
	o = runIn(t, t.Context(), known[len(known)-1:], args...)
	require.NotContains(t, o.stdout+o.stderr, "secret")
	known[len(known)-1].Open = func(_ context.Context, dsn string, _ stores.Mode) (eventstore.Opener, error) {
		return nil, fmt.Errorf("cannot open %q", dsn)
	}
	o = runIn(t, t.Context(), known[len(known)-1:], args...)
	require.Equal(t, exitFailure, o.code)
	require.NotContains(t, o.stderr, "secret")
}

func TestBench_Interrupted(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	done := make(chan outcome, 1)
	go func() {
		done <- runIn(t, ctx, shared(store), "bench", "append", "--store", "test:", "--writers", "2", "--duration", "1h", "--warmup", "0s", "--json")
	}()
	for _, err := range store.Subscribe(t.Context(), eventstore.OneCategory("bench_append"), 0) {
		require.NoError(t, err)
		if head, err := store.Head(t.Context()); err == nil && head > 10 {
			break
		}
	}
	interrupt()
	o := <-done
	require.Equal(t, exitOK, o.code, o.stderr)
	result := object(t, o.stdout)
	require.Equal(t, true, result["interrupted"])
	require.Positive(t, result["operations"])
}

func TestBench_OtherProcessIsRefused(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{"memory:", "sqlite:" + filepath.Join(t.TempDir(), "bench.db")} {
		for _, flag := range []string{"--other-process", "--listen"} {
			text := failure(t, exitFailure, "bench", "live", "--store", dsn, flag)
			require.Contains(t, text, "can be open only once, in one process")
		}
	}
	require.Contains(t, failure(t, exitUsage, "bench", "live", "--store", "memory:", "--listen", "--other-process"), "--listen and --other-process")
}

// The other process runs into trouble of its own, and says so.
func TestBench_OtherProcessFails(t *testing.T) {
	t.Parallel()
	store := memory.New()
	defer func() { require.NoError(t, store.Close()) }()
	o := runIn(t, t.Context(), shared(store), "bench", "live", "--store", "test:", "--other-process", "--duration", "1ms")
	require.Equal(t, exitFailure, o.code)
	require.Contains(t, o.stderr, "another process: it ended before")
	require.Contains(t, o.stderr, `unknown backend, "test"`, "the other process is a real one, which knows no such store")
}

// server returns the DSN of a database on a server, or skips the test.
func server(t *testing.T) string {
	t.Helper()
	if _, err := stores.Known().Parse("postgres://h/s"); err != nil {
		t.Skip("the table of stores has no database server yet")
	}
	return pgtest.Database(t)
}

func TestServer(t *testing.T) {
	t.Parallel()
	dsn := server(t)
	require.NotEqual(t, exitOK, command(t, "streams", "--store", dsn).code, "reading makes no schema")
	applied := object(t, ok(t, "migrate", "--store", dsn, "--json"))["applied"]
	require.NotEmpty(t, applied)
	require.Empty(t, object(t, ok(t, "migrate", "--store", dsn, "--json"))["applied"])
	require.Contains(t, ok(t, "migrate", "--store", dsn, "--print"), "CREATE TABLE")
	more := [][]string{{"project", "--kind", "sql", "--events", "1000"}, {"live", "--rate", "100", "--listen"}, {"live", "--rate", "100", "--other-process"}}
	for _, w := range append(workloads, more...) {
		args := append([]string{"bench"}, w...)
		result := object(t, ok(t, append(args, "--store", dsn, "--duration", "300ms", "--warmup", "50ms", "--json")...))
		require.Equal(t, 0.0, result["errors"], "%v", result)
		require.Contains(t, result["durability"], "synchronous_commit=")
		if w[0] == "live" {
			details := result["details"].(map[string]any)
			require.Equal(t, details["events_written"], details["events_seen"])
			require.Positive(t, details["events_seen"])
		}
	}
	require.NotEmpty(t, object(t, ok(t, "streams", "--store", dsn, "--json"))["streams"])
	require.Len(t, lines(t, ok(t, "events", "--store", dsn, "--limit", "3", "--json")), 3)
	require.Empty(t, object(t, ok(t, "projections", "--store", dsn, "--json"))["projections"])
}

func TestNumbers(t *testing.T) {
	t.Parallel()
	for n, expected := range map[int64]string{0: "0", 7: "7", 999: "999", 1000: "1,000", -1234567: "-1,234,567", 100000: "100,000"} {
		require.Equal(t, expected, count(n))
	}
	for ms, expected := range map[float64]string{0: "0.0 µs", 0.0123: "12.3 µs", 1.5: "1.50 ms", 12.34: "12.3 ms", 123.4: "123 ms", 2500: "2.50 s"} {
		require.Equal(t, expected, duration(ms))
	}
	require.Equal(t, "1.23", rate(1.234))
	require.Equal(t, "12,346", rate(12345.6))
}

// Progress is drawn on a terminal, and nowhere else.
func TestProgress(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.Nil(t, newProgress(&out), "a buffer is no terminal")
	var none *progress
	none.show("reading", "", 1, 2)
	none.clear()

	p := &progress{out: &out}
	p.show("storing events", "10 of 100", 10, 100)
	require.Contains(t, out.String(), "storing events 10 of 100")
	p.show("measuring", "5/s", 100, 100)
	require.Contains(t, out.String(), "measuring 5/s")
	p.clear()
	p.clear()

	// A verification shows speed and time left since the look before.
	out.Reset()
	shown := verifyShown{progress: &progress{out: &out}}
	at := time.Now()
	step := func(p projection.VerifyProgress, after time.Duration) string {
		out.Reset()
		shown.drawn = time.Time{}
		shown.report(p, at.Add(after))
		return out.String()
	}
	require.Contains(t, step(projection.VerifyProgress{Part: 1, Parts: 1, Position: 1000, Through: 10000}, 0), "folding")
	require.Contains(t, step(projection.VerifyProgress{Part: 1, Parts: 1, Position: 4000, Through: 10000}, 2*time.Second), "folding 1,500/s, 4s left")
	require.Contains(t, step(projection.VerifyProgress{Part: 1, Parts: 1, Position: 10000, Through: 10000, Rows: 2048}, 3*time.Second), "comparing 2,048 rows")
	require.NotContains(t, step(projection.VerifyProgress{Part: 2, Parts: 3, Position: 500, Through: 10000}, 4*time.Second), "left", "another part has just begun")
	require.Contains(t, out.String(), "folding part 2 of 3")
}
