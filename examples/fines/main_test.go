package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/metatest"
	"github.com/deed-go/deed/internal/pgtest"
)

// TestMain lets the test binary be the program itself, so that it can be
// killed.
func TestMain(m *testing.M) {
	if os.Getenv("FINES_PROGRAM") != "" {
		main()
		return
	}
	goleak.VerifyTestMain(pgtest.Main(m))
}

// expectedSample is the oracle's report on the sample, as JSON.
func expectedSample(t *testing.T) map[string]string {
	t.Helper()
	report := oracle(t, openLog(t, sampleName))
	require.Equal(t, 1000, report.Fines)
	require.Equal(t, 4374, report.Rows)
	var text strings.Builder
	require.NoError(t, report.WriteJSON(&text))
	return figures(t, []byte(text.String()))
}

func TestSample(t *testing.T) {
	t.Parallel()
	expected := expectedSample(t)
	chart := filepath.Join(t.TempDir(), "chart.svg")
	db := filepath.Join(t.TempDir(), "fines.db")

	var stdout, stderr bytes.Buffer
	require.Zero(t, program(t.Context(), []string{"-json", "-db", db, "-chart", chart}, &stdout, &stderr), stderr.String())
	requireReport(t, expected, stdout.Bytes())
	require.Empty(t, stderr.String(), "progress is for terminals")

	// A replay that is finished is not done again.
	stdout.Reset()
	require.Zero(t, program(t.Context(), []string{"-json", "-db", db}, &stdout, &stderr), stderr.String())
	requireReport(t, expected, stdout.Bytes())

	// The chart is well-formed.
	file, err := os.Open(chart)
	require.NoError(t, err)
	defer file.Close()
	elements := 0
	for decoder := xml.NewDecoder(file); ; elements++ {
		_, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
	}
	require.Greater(t, elements, 100)

	// Another log is refused.
	other := filepath.Join(t.TempDir(), "other.csv")
	require.NoError(t, os.WriteFile(other, []byte(header+"A1,2000-01-01,Create Fine,10.0,,\n"), 0o600))
	require.Equal(t, 1, program(t.Context(), []string{"-db", db, "-input", other}, &stdout, &stderr))
	require.Contains(t, stderr.String(), `the database holds the replay of "fines-1k.csv", not of "other.csv"`)
}

func TestReadable(t *testing.T) {
	t.Parallel()
	var stdout, stderr bytes.Buffer
	require.Zero(t, program(t.Context(), nil, &stdout, &stderr), stderr.String())
	require.Contains(t, stdout.String(), "outstanding")
	require.Contains(t, stdout.String(), "nothing owed")
	require.Contains(t, stdout.String(), "4,374 rows in ")
}

const header = "fine,time,activity,amount,paymentAmount,expense\n"

// TestRules replays logs made up to hit every refusal and the sixtieth day
// from both sides, and compares with the oracle.
func TestRules(t *testing.T) {
	t.Parallel()
	for name, rows := range map[string]string{
		"refusals": "A,2000-01-01,Payment,,5.0,\n" +
			"A,2000-01-01,Create Fine,10.0,,\n" +
			"A,2000-01-01,Create Fine,20.0,,\n" +
			"A,2000-01-02,Payment,,0.0,\n" +
			"A,2000-01-02,Payment,,-1.0,\n" +
			"A,2000-01-02,Payment,,10.0,\n" +
			"A,2000-01-02,Send for Credit Collection,,,\n" +
			"A,2000-01-02,Send Fine,,,2.005\n" +
			"A,2000-01-02,Send for Credit Collection,,,\n" +
			"B,2000-02-01,Appeal to Judge,,,\n" +
			"B,2000-02-01,Add penalty,1,,\n" +
			"B,2000-02-01,Insert Fine Notification,,,\n" +
			"B,2000-05-01,Send Fine,,,3\n" +
			"B,2000-05-01,Send for Credit Collection,,,\n",
		"day 59 is too early": "A,2000-01-01,Create Fine,10.0,,\nA,2000-01-02,Insert Fine Notification,,,\nA,2000-03-01,Add penalty,20,,\n",
		"day 60 is not":       "A,2000-01-01,Create Fine,10.0,,\nA,2000-01-02,Insert Fine Notification,,,\nA,2000-03-02,Add penalty,20,,\n",
		"a gap of years":      "A,2000-01-01,Create Fine,10.0,,\nA,2000-01-02,Insert Fine Notification,,,\nB,2009-03-02,Create Fine,20,,\nA,2009-03-02,Add penalty,30,,\n",
		"notified twice":      "A,2000-01-01,Create Fine,10.0,,\nA,2000-01-02,Insert Fine Notification,,,\nA,2000-02-20,Insert Fine Notification,,,\nA,2000-03-02,Add penalty,20,,\nA,2000-06-02,Payment,,20,\n",
		"not due at the end":  "A,2000-01-01,Create Fine,10.0,,\nA,2000-01-02,Insert Fine Notification,,,\nA,2000-01-02,Payment,,30.0,\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			input := filepath.Join(t.TempDir(), "log.csv")
			require.NoError(t, os.WriteFile(input, []byte(header+rows), 0o600))
			var expected, stdout, stderr bytes.Buffer
			require.NoError(t, oracle(t, strings.NewReader(header+rows)).WriteJSON(&expected))
			require.Zero(t, program(t.Context(), []string{"-json", "-input", input}, &stdout, &stderr), stderr.String())
			requireReport(t, figures(t, expected.Bytes()), stdout.Bytes())
		})
	}
}

// TestBadInput: what cannot be understood is refused with its row and its
// text.
func TestBadInput(t *testing.T) {
	t.Parallel()
	for text, message := range map[string]string{
		"":                                 "read header: EOF",
		"fine,time\n":                      `the header has no column "activity"`,
		header + "A,1.1.2000,Payment,,,\n": `row 1: parsing time "1.1.2000"`,
		header + "A,2000-01-01,Create Fine,ten,,\n":                         `row 1: amount "ten" is not a number of euros`,
		header + "A,2000-01-01,Parade,1,,\n":                                `row 1: activity "Parade" is not one`,
		header + "A,2000-01-02,Create Fine,1,,\nA,2000-01-01,Payment,,1,\n": "row 2 is of 2000-01-01, after a row of 2000-01-02: sort the log by date",
		header + ",2000-01-01,Payment,,1,\n":                                "row 1 names no fine",
		header + "A,2000-01-01\n":                                           "row 1: record on line 2: wrong number of fields",
	} {
		t.Run(message, func(t *testing.T) {
			t.Parallel()
			input := filepath.Join(t.TempDir(), "log.csv")
			require.NoError(t, os.WriteFile(input, []byte(text), 0o600))
			var stdout, stderr bytes.Buffer
			require.Equal(t, 1, program(t.Context(), []string{"-input", input}, &stdout, &stderr))
			require.Contains(t, stderr.String(), message)
			require.Empty(t, stdout.String())
		})
	}
	var stdout, stderr bytes.Buffer
	require.Equal(t, 1, program(t.Context(), []string{"-input", "nowhere.csv"}, &stdout, &stderr))
	require.Contains(t, stderr.String(), "open input: open nowhere.csv")
	require.Equal(t, 2, program(t.Context(), []string{"all"}, &stdout, &stderr))
	require.Contains(t, stderr.String(), `unexpected argument "all"`)
}

// TestChart: what is outstanding in the chart's last month is what the report
// says, and months without rows are there too.
func TestChart(t *testing.T) {
	t.Parallel()
	log := header + "A,2000-01-01,Create Fine,10.0,,\nA,2000-01-02,Insert Fine Notification,,,\nA,2000-02-02,Send Fine,,,5\n" +
		"A,2000-05-01,Add penalty,30.0,,\nB,2000-05-02,Create Fine,10.0,,\nB,2000-05-02,Payment,,25.0,\nB,2000-07-02,Payment,,1,\n"
	withApp(t, filepath.Join(t.TempDir(), "fines.db"), func(app *deed.App) {
		end, err := replay(t.Context(), app, "log", strings.NewReader(log), func(Progress) {})
		require.NoError(t, err)
		all, err := points(t.Context(), app, months, end)
		require.NoError(t, err)
		month := func(m time.Month, issued, paid, outstanding Cents) Point {
			return Point{time.Date(2000, m, 1, 0, 0, 0, 0, time.UTC), issued, paid, outstanding}
		}
		require.Equal(t, []Point{
			month(1, 1000, 0, 1000), month(2, 0, 0, 1500), month(3, 0, 0, 1500), month(4, 0, 0, 1500),
			month(5, 1000, 2500, 3500), month(6, 0, 0, 3500), month(7, 0, 100, 3500),
		}, all)
		r, err := report(t.Context(), app, months, end)
		require.NoError(t, err)
		require.Equal(t, all[len(all)-1].Outstanding, r.OutstandingCents)
	})
}

// withApp runs the application on a file as long as fn runs.
func withApp(t *testing.T, db string, fn func(app *deed.App)) {
	t.Helper()
	store, err := sqlite.Open(t.Context(), db)
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	app, err := start(t.Context(), store)
	require.NoError(t, err)
	defer func() { require.NoError(t, app.Stop(context.Background())) }()
	fn(app)
}

// TestKilled kills the program again and again at moments left to chance, and
// resumes it.
func TestKilled(t *testing.T) {
	t.Parallel()
	expected := expectedSample(t)
	killAndResume(t, expected, 6, 400*time.Millisecond)
}

// TestInterrupted stops a replay after some dates, as SIGINT does, and goes on
// with the same file.
func TestInterrupted(t *testing.T) {
	metatest.NotRaced(t)
	t.Parallel()
	log, err := io.ReadAll(openLog(t, sampleName))
	require.NoError(t, err)
	db := filepath.Join(t.TempDir(), "fines.db")
	dates := 0
	for _, stopAfter := range []int{1, 100, 101, 500, 870} {
		withApp(t, db, func(app *deed.App) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			end, err := replay(ctx, app, "fines-1k.csv", bytes.NewReader(log), func(Progress) {
				if dates++; dates == stopAfter {
					cancel()
				}
			})
			if stopAfter < 870 {
				require.ErrorIs(t, err, errInterrupted)
				require.Equal(t, stopAfter, dates)
				return
			}
			require.NoError(t, err)
			require.Equal(t, 870, dates, "each date is finished once")
			got, err := report(t.Context(), app, months, end)
			require.NoError(t, err)
			var text bytes.Buffer
			require.NoError(t, got.WriteJSON(&text))
			requireReport(t, expectedSample(t), text.Bytes())
		})
	}
}

// TestInterrupted_JudgesNothingMore: once asked to stop, no further row is
// judged, however many workers wait for one.
func TestInterrupted_JudgesNothingMore(t *testing.T) {
	t.Parallel()
	date := make([]Row, 64)
	for i := range date {
		date[i] = Row{Number: i + 1, Fine: strconv.Itoa(i), Activity: "Payment"}
	}
	withApp(t, filepath.Join(t.TempDir(), "fines.db"), func(app *deed.App) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 500 {
			require.ErrorIs(t, judge(ctx, app, date), errInterrupted)
		}
		head, err := app.Store().Head(t.Context())
		require.NoError(t, err)
		require.Zero(t, head)
	})
}

// TestInterrupted_SaysHowToContinue looks at what a user sees.
func TestInterrupted_SaysHowToContinue(t *testing.T) {
	metatest.NotRaced(t)
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	db := filepath.Join(t.TempDir(), "fines.db")
	var stdout, stderr bytes.Buffer
	require.Equal(t, 130, program(ctx, []string{"-db", db}, &stdout, &stderr))
	require.Equal(t, "interrupted after no date; continue with: -db "+db+"\n", stderr.String())
	require.Empty(t, stdout.String())

	// A temporary file is kept, too, until the replay is finished.
	stderr.Reset()
	require.Equal(t, 130, program(ctx, nil, &stdout, &stderr))
	_, db, found := strings.Cut(strings.TrimSpace(stderr.String()), "continue with: -db ")
	require.True(t, found, stderr.String())
	defer os.RemoveAll(filepath.Dir(db))
	require.Zero(t, program(t.Context(), []string{"-json", "-db", db}, &stdout, &stderr), stderr.String())
	requireReport(t, expectedSample(t), stdout.Bytes())
}

// TestSignal sends SIGINT to the program itself, at a moment left to chance.
func TestSignal(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("interrupts cannot be sent to a process on Windows")
	}
	db := filepath.Join(t.TempDir(), "fines.db")
	child, _, stderr := childProgram(t, "-json", "-db", db)
	require.NoError(t, child.Start())
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	select {
	case err := <-ended:
		require.NoError(t, err, stderr)
	case <-time.After(200 * time.Millisecond):
		requireUnlessEnded(t, child.Process.Signal(os.Interrupt))
		if err := <-ended; err != nil { // it may have ended just before
			var exit *exec.ExitError
			require.ErrorAs(t, err, &exit)
			if exit.ExitCode() != -1 { // killed before it could listen
				require.Equal(t, 130, exit.ExitCode(), stderr.String())
				require.Contains(t, stderr.String(), "continue with: -db "+db)
			}
		}
	}
	child, stdout, stderr := childProgram(t, "-json", "-db", db)
	require.NoError(t, child.Run(), stderr)
	requireReport(t, expectedSample(t), stdout.Bytes())
}

// TestThirtyThousand replays the shared data, killed again and again.
func TestThirtyThousand(t *testing.T) {
	if os.Getenv("DEED_TEST_LONG") == "" {
		t.Skip("set DEED_TEST_LONG=1 to replay 30,000 fines")
	}
	input := filepath.Join(sharedData, "fines-30k.csv.gz")
	openLog(t, input) // skips when it is not there
	expected, err := os.ReadFile(filepath.Join(sharedData, "fines-30k.expected.json"))
	require.NoError(t, err)
	killAndResume(t, figures(t, expected), 6, 5*time.Second, "-input", input)
}

// killAndResume kills the program a number of times, each some time below the
// longest after its start, then lets it end, and compares its report.
func killAndResume(t *testing.T, expected map[string]string, kills int, longest time.Duration, args ...string) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	chance := rand.New(rand.NewPCG(seed, 0))
	args = append(args, "-json", "-db", filepath.Join(t.TempDir(), "fines.db"))
	for range kills {
		child, stdout, stderr := childProgram(t, args...)
		require.NoError(t, child.Start())
		ended := make(chan error, 1)
		go func() { ended <- child.Wait() }()
		select {
		case err := <-ended:
			require.NoError(t, err, stderr)
			requireReport(t, expected, stdout.Bytes())
		case <-time.After(time.Duration(chance.Int64N(int64(longest)))):
			requireUnlessEnded(t, child.Process.Kill())
			<-ended
		}
	}
	child, stdout, stderr := childProgram(t, args...)
	require.NoError(t, child.Run(), stderr)
	requireReport(t, expected, stdout.Bytes())
}

// requireUnlessEnded: a child that is sent a signal may have ended just before.
func requireUnlessEnded(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, os.ErrProcessDone) {
		require.NoError(t, err)
	}
}

func childProgram(t *testing.T, args ...string) (*exec.Cmd, *bytes.Buffer, *bytes.Buffer) {
	t.Helper()
	binary, err := os.Executable()
	require.NoError(t, err)
	child := exec.CommandContext(t.Context(), binary, args...)
	child.Env = append(os.Environ(), "FINES_PROGRAM=1")
	var stdout, stderr bytes.Buffer
	child.Stdout, child.Stderr = &stdout, &stderr
	return child, &stdout, &stderr
}

// TestDates: a date at a time, numbered through.
func TestDates(t *testing.T) {
	t.Parallel()
	log, err := gzip.NewReader(must(sample.Open(sampleName)))
	require.NoError(t, err)
	var dates, rows int
	for date, err := range Dates(Rows(log)) {
		require.NoError(t, err)
		dates++
		for _, row := range date {
			rows++
			require.Equal(t, rows, row.Number)
			require.Equal(t, date[0].Date, row.Date)
		}
	}
	require.Equal(t, "870 4374", fmt.Sprint(dates, rows))
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}
