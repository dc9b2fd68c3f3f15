package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// TestMain lets the test binary stand in for the program where it runs itself,
// and for deed, and ends the server that tests share.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "case" {
		main()
		return
	}
	if len(os.Args) > 2 && os.Args[1] == "bench" {
		if err := standIn(os.Args[2], os.Args[3:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	code := m.Run()
	if shared.server != nil {
		if err := shared.server.stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

var shared struct {
	once   sync.Once
	server *server
	err    error
}

// testServer returns the server that all tests share, or skips.
func testServer(t *testing.T) *server {
	t.Helper()
	shared.once.Do(func() {
		//nolint:usetesting // it outlives the test that starts it
		shared.server, shared.err = startServer(context.Background(), os.TempDir(), "128MB")
	})
	if errors.Is(shared.err, errNoServer) {
		t.Skip(shared.err)
	}
	require.NoError(t, shared.err)
	return shared.server
}

// standIn answers like deed bench, for tests of what is around it: it knows
// three workloads, and of those only how to fill a log.
func standIn(workload string, args []string) error {
	if !slices.Contains([]string{"append", "load", "replay"}, workload) {
		return fmt.Errorf("unknown workload %q", workload)
	}
	if slices.Contains(args, "--preload") {
		if err := fillTable(context.Background(), args[slices.Index(args, "--store")+1]); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(Result{Workload: workload, Operations: 1000, Seconds: 1, PerSecond: 1000, P50: 1})
}

func brief(store string) params {
	p := defaults()
	p.Store, p.Writers, p.Conns = store, 4, 4
	p.Duration, p.Warmup = 100*time.Millisecond, 20*time.Millisecond
	return p
}

// Every case runs, and finds afterwards that its work was really done. Not
// parallel: cases share two cores at best, and the admin connection.
func TestCases(t *testing.T) {
	for _, name := range caseNames() {
		t.Run(name, func(t *testing.T) {
			c := cases[name]
			store := ""
			switch c.store {
			case "sqlite":
				store = filepath.Join(t.TempDir(), "bench.db")
			case "postgres":
				s := testServer(t)
				dsn, database, err := s.database(t.Context(), "")
				require.NoError(t, err)
				t.Cleanup(func() { require.NoError(t, s.drop(context.WithoutCancel(t.Context()), database)) })
				if c.table {
					require.NoError(t, fillTable(t.Context(), dsn))
				}
				store = dsn
			case "nats":
				servers, err := startNATS(t.TempDir(), 1)
				require.NoError(t, err)
				t.Cleanup(func() { require.NoError(t, servers.stop()) })
				dsn, name := servers.log()
				if c.table {
					require.NoError(t, fillLog(t.Context(), servers, name))
				}
				store = dsn
			}
			p := brief(store)
			if c.workload == "saga" {
				p.Duration = time.Second // one workflow may take longer than 100 ms
			}
			result, err := runNamed(t.Context(), name, p)
			require.NoError(t, err)
			require.Positive(t, result.Operations)
			require.Positive(t, result.PerSecond)
			require.Zero(t, result.Errors, result.Notes)
			require.NotEmpty(t, result.Durability)
			require.Equal(t, c.workload, result.Workload)
			if c.peer != "" {
				require.Regexp(t, ` v\d`, result.Peer, "the peer's version is shown")
			}
		})
	}
}

// fillLog makes a stream of messages with 20 interleaved subjects of 100.
func fillLog(ctx context.Context, servers *natsServers, name string) error {
	if _, err := servers.create(name); err != nil {
		return err
	}
	for n := range 2000 {
		if _, err := servers.js.PublishAsync(fmt.Sprintf("%s.0.order.%d", name, n%20), []byte("{}")); err != nil {
			return err
		}
	}
	select {
	case <-servers.js.PublishAsyncComplete():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// fillTable makes a table with the columns of deed's, holding 20 interleaved
// streams of 100 events.
func fillTable(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, `
CREATE SCHEMA deed;
CREATE TABLE deed.events (
	position bigint PRIMARY KEY, version bigint NOT NULL, kind int NOT NULL, slice smallint NOT NULL, id uuid NOT NULL,
	time bigint NOT NULL, stream text COLLATE "C" NOT NULL, tags text[], metadata text, data bytea, UNIQUE (stream, version)
);
INSERT INTO deed.events
	SELECT n, (n - 1) / 20 + 1, 1, 0, gen_random_uuid(), 0, 'order-' || n % 20, NULL, '{}', '\x7b7d' FROM generate_series(1, 2000) n`)
	return err
}

func TestRunNamed_BadInput(t *testing.T) {
	t.Parallel()
	p := brief("")
	_, err := runNamed(t.Context(), "plain-inserts", p)
	require.ErrorContains(t, err, `unknown case "plain-inserts"`)
	require.ErrorContains(t, err, "plain-insert,", "the names that exist are listed")
	_, err = runNamed(t.Context(), "plain-insert", p)
	require.ErrorContains(t, err, "--store")
	p.Writers = 0
	_, err = runNamed(t.Context(), "eventhorizon-execute", p)
	require.ErrorContains(t, err, "--writers 0")
}

// A case whose work is not there afterwards fails: it would be a fast nothing.
func TestRunNamed_LostWork(t *testing.T) {
	register("lost", benchCase{store: "memory", open: func(context.Context, params) (*job, error) {
		return &job{
			op:     func(context.Context, int) (int, error) { return 1, nil },
			verify: func(context.Context, int64) error { return errors.New("0 rows") },
		}, nil
	}})
	t.Cleanup(func() { delete(cases, "lost") })
	_, err := runNamed(t.Context(), "lost", brief(""))
	require.ErrorContains(t, err, "the work was not done: 0 rows")
}

func TestDrive_Errors(t *testing.T) {
	t.Parallel()
	calls := make([]int, 4)
	result, done, err := drive(t.Context(), &job{op: func(_ context.Context, worker int) (int, error) {
		time.Sleep(time.Millisecond)
		if calls[worker]++; calls[worker]%10 == 0 {
			return 0, errors.New("every tenth")
		}
		return 1, nil
	}}, brief(""))
	require.NoError(t, err)
	require.Positive(t, result.Errors)
	require.Contains(t, result.Notes, "every tenth")
	require.GreaterOrEqual(t, done, result.Operations)

	_, _, err = drive(t.Context(), &job{op: func(context.Context, int) (int, error) { return 0, errors.New("always") }}, brief(""))
	require.ErrorContains(t, err, "no operation succeeded: always")
}

func TestHistogram_Quantile(t *testing.T) {
	t.Parallel()
	var h, other histogram
	require.Zero(t, h.quantile(0.5))
	durations := make([]time.Duration, 10_000)
	for i := range durations {
		durations[i] = time.Duration(rand.ExpFloat64() * float64(time.Millisecond))
		if i%2 == 0 {
			h.add(durations[i])
		} else {
			other.add(durations[i])
		}
	}
	h.merge(&other)
	slices.Sort(durations)
	for _, q := range []float64{0, 0.5, 0.95, 0.99} {
		exact := durations[int(q*float64(len(durations)))]
		require.InEpsilon(t, float64(exact)+1, float64(h.quantile(q))+1, 0.02, "quantile %v", q)
	}
	h.add(-1)
	h.add(1 << 62)
}

func TestNewOrder_Size(t *testing.T) {
	t.Parallel()
	for _, size := range []int{256, 1024} {
		o, text, err := newOrder(size)
		require.NoError(t, err)
		require.Len(t, text, size)
		again, err := json.Marshal(o)
		require.NoError(t, err)
		require.Equal(t, text, again, "peers that encode it themselves store the same")
	}
}

func TestCursor_Advance(t *testing.T) {
	t.Parallel()
	p := defaults()
	p.Writers, p.Streams, p.Events = 2, 4, 3
	versions := map[string][]int64{}
	for _, c := range newCursors(p) {
		for range 12 {
			at := c.advance()
			versions[at.stream] = append(versions[at.stream], at.version)
		}
	}
	require.Len(t, versions, 8)
	for stream, got := range versions {
		require.Equal(t, []int64{1, 2, 3}, got, stream)
	}
}

func TestChoose(t *testing.T) {
	t.Parallel()
	all, err := choose("")
	require.NoError(t, err)
	require.Len(t, all, len(rows))
	chosen, err := choose("8, 1,1")
	require.NoError(t, err)
	require.Len(t, chosen, 3)
	require.Equal(t, "8a", chosen[0].id)
	_, err = choose("99")
	require.ErrorContains(t, err, `no row "99"`)
}

// Rows that share something to run are measured in one turn, and it runs once.
func TestGroups(t *testing.T) {
	t.Parallel()
	seen := map[*spec]int{}
	count := 0
	for i, g := range groups(rows) {
		count += len(g.rows)
		for _, s := range g.specs {
			earlier, ok := seen[s]
			require.False(t, ok, "%s runs in groups %d and %d", s.name, earlier, i)
			seen[s] = i
		}
		for _, r := range g.rows {
			for _, s := range r.specs() {
				require.Contains(t, g.specs, s)
			}
		}
	}
	require.Equal(t, len(rows), count)
	require.Equal(t, seen[append64], seen[execute64])
}

// Names identify what ran, and every case that a row names exists.
func TestRows(t *testing.T) {
	t.Parallel()
	names := map[string]*spec{}
	for _, r := range rows {
		for _, s := range r.specs() {
			if other, ok := names[s.name]; ok {
				require.Same(t, other, s, s.name)
			}
			names[s.name] = s
			require.NotEqual(t, s.bench == "", s.workload == "", s.name)
			if s.bench != "" {
				require.Contains(t, cases, s.bench)
				require.Equal(t, cases[s.bench].store, strings.TrimSuffix(s.store, "-r3"), s.name)
				require.Equal(t, cases[s.bench].table, s.full != "", s.name)
			}
		}
	}
}

func TestReport_Judge(t *testing.T) {
	t.Parallel()
	rep := &report{rows: []row{
		{id: "1", deed: append64, base: insert64, floor: 2.5, goal: 3.3},
		{id: "2", deed: append64, base: lock64, floor: 10, goal: 14},
		{id: "12", deed: liveSame, floor: 0.05, goal: 0.005},
		{id: "13", deed: liveOther, floor: 0.5, goal: 0.25},
	}}
	for turn, rate := range []float64{30_000, 50_000, 40_000} {
		rep.Runs = append(rep.Runs,
			sample{Spec: append64.name, Turn: turn, Result: &Result{PerSecond: rate}},
			sample{Spec: insert64.name, Turn: turn, Result: &Result{PerSecond: 12_500}},
			sample{Spec: lock64.name, Turn: turn, Error: "it broke"},
			sample{Spec: liveSame.name, Turn: turn, Result: &Result{PerSecond: 1, P50: 0.02}},
			sample{Spec: liveOther.name, Turn: turn, Result: &Result{PerSecond: 1, P50: 0}})
	}
	rep.evaluate()
	v := rep.Rows[0]
	require.InDelta(t, 3.2, v.Ratio, 1e-9)
	require.InDelta(t, 2.4, v.Lowest, 1e-9)
	require.InDelta(t, 4, v.Highest, 1e-9)
	require.Equal(t, "floor", v.Verdict)
	require.Empty(t, rep.Rows[1].Verdict)
	require.Equal(t, lock64.name+": it broke", rep.Rows[1].Problem)
	require.Equal(t, "floor", rep.Rows[2].Verdict, "20 us are within 50 us, not within 5 us")
	require.Equal(t, "goal", rep.Rows[3].Verdict, "seen before the acknowledgement")

	var out bytes.Buffer
	require.NoError(t, rep.print(&out, true))
	require.Contains(t, out.String(), "| 40k/s | 12.5k/s | 3.2x (2.4..4) | 2.5x | 3.3x | floor |")
	require.Contains(t, out.String(), "| 20 us | - | (20 us..20 us) | 50 us | 5 us | floor |")
	require.Contains(t, out.String(), "| 0 us | - | (0 us..0 us) | 500 us | 250 us | goal |")
	require.Contains(t, out.String(), "it broke")
}

func TestShort(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{
		0: "0", 0.0012: "0.0012", 0.25: "0.25", 3.333: "3.33", 10: "10", 99.96: "100", 123.4: "123",
		999.6: "1k", 52_345: "52.3k", 999_600: "1M", 1_234_567: "1.23M",
	} {
		require.Equal(t, want, short(v))
	}
}

// The whole command, with a program in deed's place that does not know every
// workload: what is missing is reported, and the baselines are measured all the
// same.
func TestMeasure_MissingWorkload(t *testing.T) {
	deed, err := os.Executable()
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "runs.json")
	var out, log bytes.Buffer
	err = run(t.Context(), []string{
		"--rows", "15,16", "--repeat", "2", "--duration", "50ms", "--warmup", "10ms",
		"--deed", deed, "--dir", onDisk(t), "--json", file,
	}, &out, &log)
	require.NoError(t, err, log.String())
	require.Contains(t, out.String(), `unknown workload "execute"`)

	text, err := os.ReadFile(file)
	require.NoError(t, err)
	var rep report
	require.NoError(t, json.Unmarshal(text, &rep))
	require.Len(t, rep.Runs, 8)
	require.Positive(t, rep.Rows[0].Ratio)
	require.Zero(t, rep.Rows[1].Ratio)
	require.Positive(t, rep.Rows[1].BaseValue)
	require.Positive(t, rep.Conditions.Syncs)
	require.Equal(t, 1, strings.Count(out.String(), "unknown workload"), out.String())
}

// Rows on a filled log share one, which is filled once; databases are gone
// afterwards, from a server that is not ours too.
func TestMeasure_Filled(t *testing.T) {
	s := testServer(t)
	deed, err := os.Executable()
	require.NoError(t, err)
	var out, log bytes.Buffer
	err = run(t.Context(), []string{
		"--rows", "1,7,8,9,14", "--repeat", "2", "--duration", "50ms", "--warmup", "10ms",
		"--deed", deed, "--postgres", s.url.String(), "--dir", onDisk(t), "--markdown",
	}, &out, &log)
	require.NoError(t, err, log.String())
	require.Equal(t, 1, strings.Count(log.String(), "storing"), log.String())
	require.Contains(t, out.String(), `unknown workload "project"`)
	require.Contains(t, out.String(), "20 streams")
	require.Contains(t, out.String(), "| 7 | append by 3 processes against 1 | 3k/s | 1k/s | 3x (3..3) |")
	var left int
	require.NoError(t, s.admin.QueryRow(t.Context(), "SELECT count(*) FROM pg_database WHERE datname LIKE 'deed_bench_%'").Scan(&left))
	require.Zero(t, left)
}

// onDisk returns a folder whose syncs mean something, or skips.
func onDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if _, err := fileSystem(dir); err != nil {
		t.Skipf("%v: set TMPDIR to a folder on a disk", err)
	}
	return dir
}

func TestRun_BadInput(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		`unknown command "bench"`:    {"bench"},
		`no row "x"`:                 {"--rows", "x"},
		"--repeat 0":                 {"--repeat", "0"},
		"--duration 0s":              {"--duration", "0s"},
		`unexpected argument "more"`: {"--quick", "more"},
		"case: name one of":          {"case"},
		`--deed "/no/such/program"`:  {"--rows", "16", "--deed", "/no/such/program", "--duration", "20ms", "--warmup", "0s", "--repeat", "1", "--dir", onDisk(t)},
	} {
		var out, log bytes.Buffer
		err := run(t.Context(), args, &out, &log)
		if err == nil { // it goes on without deed, and says so
			require.Contains(t, out.String(), want)
			continue
		}
		require.ErrorContains(t, err, want)
	}
}
