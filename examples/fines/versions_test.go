package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/metatest"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/query"
)

// TestVersions builds version 2 of the monthly figures while the replay goes on
// and they are read without a pause.
func TestVersions(t *testing.T) {
	t.Parallel()
	rebuildMonths(t, sampleName, expectedSample(t))
}

// TestVersions_ThirtyThousand does so on the shared data.
func TestVersions_ThirtyThousand(t *testing.T) {
	if os.Getenv("DEED_TEST_LONG") == "" {
		t.Skip("set DEED_TEST_LONG=1 to replay 30,000 fines")
	}
	input := filepath.Join(sharedData, "fines-30k.csv.gz")
	openLog(t, input) // skips when it is not there
	expected, err := os.ReadFile(filepath.Join(sharedData, "fines-30k.expected.json"))
	require.NoError(t, err)
	rebuildMonths(t, input, figures(t, expected))
}

func rebuildMonths(t *testing.T, name string, expected map[string]string) {
	log, err := io.ReadAll(openLog(t, name))
	require.NoError(t, err)
	rows := bytes.Count(log, []byte("\n")) - 1
	db := filepath.Join(t.TempDir(), "fines.db")
	title := inputTitle("")

	// The program as it is deployed runs for a while.
	withApp(t, db, func(app *deed.App) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		_, err := replay(ctx, app, title, bytes.NewReader(log), func(p Progress) {
			if p.Rows >= rows*6/10 {
				cancel()
			}
		})
		require.ErrorIs(t, err, errInterrupted)
	})

	// The next build has version 2 too, and goes on.
	store, err := sqlite.Open(t.Context(), db)
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	app, err := start(t.Context(), store, monthsToo)
	require.NoError(t, err)
	defer func() { require.NoError(t, app.Stop(context.Background())) }()
	began := time.Now()

	stop := make(chan struct{})
	reads, lists := make(chan error, 1), atomic.Int64{}
	go func() { reads <- readMonths(app, stop, &lists) }()
	swappedAt, swappedAfter := 0, time.Duration(0)
	end, err := replay(t.Context(), app, title, bytes.NewReader(log), func(p Progress) {
		if swappedAt > 0 {
			return
		}
		if p.Rows < rows*9/10 {
			all, err := app.Projections().Versions(t.Context(), "months")
			require.NoError(t, err)
			if len(all) < 2 || !all[1].Active {
				return
			}
		}
		_, err := awaitVersion(t.Context(), app, "months", 2) // at the latest now
		require.NoError(t, err)
		swappedAt, swappedAfter = p.Rows, time.Since(began)
	})
	require.NoError(t, err)
	require.Less(t, swappedAt, rows, "the replay still ran")
	close(stop)
	require.NoError(t, <-reads)

	// The report is what it should be, by either version, and both are the fold of
	// the log.
	for _, by := range []*projection.ViewDefinition[MonthRow]{months, monthsToo} {
		got, err := report(t.Context(), app, by, end)
		require.NoError(t, err)
		var text bytes.Buffer
		require.NoError(t, got.WriteJSON(&text))
		requireReport(t, expected, text.Bytes())
		found, err := app.Projections().Verify(t.Context(), by.Name())
		require.NoError(t, err)
		require.True(t, found.Agrees(), found.String())
		t.Log(by.Name(), "verified:", found)
	}

	// They differ where there were appeals, and nowhere else.
	appeals := map[string]bool{}
	for e, err := range store.Read(t.Context(), eventstore.OfTypes(AppealRecorded{}.EventType()), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		appeals[e.Time.Format("2006-01")] = true
	}
	var before string
	all, err := app.Projections().Versions(t.Context(), "months")
	require.NoError(t, err)
	require.NotNil(t, all[1].Comparison)
	before, _, _ = strings.Cut(all[1].Comparison.String(), "\n")
	diff, err := app.Projections().Compare(t.Context(), "months", 1, 2)
	require.NoError(t, err)
	require.True(t, diff.Compared)
	require.Equal(t, []int{len(appeals), 0, 0}, []int{diff.Changed, diff.Added, diff.Removed})
	require.NotEmpty(t, diff.Samples)
	t.Logf("after %d of %d rows, %s after the start, version 2 was read; %d lists were read meanwhile; then: %s", swappedAt, rows, swappedAfter.Round(time.Millisecond), lists.Load(), before)
	t.Logf("in the end: %s", diff)

	// Going back is one call, and so is going forth.
	for _, version := range []int{1, 2} {
		require.NoError(t, app.Projections().Activate(t.Context(), "months", version))
		counted := 0
		for e, err := range query.All(t.Context(), app, monthsToo, query.AtLeast(end)) {
			require.NoError(t, err)
			counted += e.Row.Appeals
		}
		require.Equal(t, version == 2, counted > 0)
	}
}

// readMonths lists the months again and again. No figure that was read is ever
// smaller again, and appeals that were counted stay.
func readMonths(app *deed.App, stop <-chan struct{}, lists *atomic.Int64) error {
	last := map[string]MonthRow{}
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		now := map[string]MonthRow{}
		for e, err := range query.All(context.Background(), app, monthsToo) {
			if err != nil {
				return err
			}
			now[e.Key] = e.Row
		}
		for month, was := range last {
			is, there := now[month]
			if !there || is.Issued < was.Issued || is.Payments < was.Payments || is.Penalties < was.Penalties || is.Collections < was.Collections || is.Appeals < was.Appeals {
				return fmt.Errorf("month %s went back from %+v to %+v", month, was, is)
			}
		}
		last = now
		lists.Add(1)
	}
}

// What a user sees of it.
func TestVersions_Program(t *testing.T) {
	metatest.NotRaced(t)
	t.Parallel()
	expected := expectedSample(t)
	db := filepath.Join(t.TempDir(), "fines.db")
	var stdout, stderr bytes.Buffer
	require.Zero(t, program(t.Context(), []string{"-json", "-db", db}, &stdout, &stderr), stderr.String())
	stdout.Reset()
	require.Zero(t, program(t.Context(), []string{"-json", "-db", db, "-months", "2"}, &stdout, &stderr), stderr.String())
	requireReport(t, expected, stdout.Bytes())
	require.Contains(t, stderr.String(), `version 1 of "months" has `)
	require.Contains(t, stderr.String(), ": 0 added, 0 removed, ")
	require.Equal(t, 2, program(t.Context(), []string{"-months", "3"}, &stdout, &stderr))
}
