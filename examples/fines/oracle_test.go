package main

import (
	"compress/gzip"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// oracle replays a log by the rules of the data alone: one loop, no framework,
// nothing shared with the program but the shape of its report.
func oracle(t *testing.T, log io.Reader) Report {
	t.Helper()
	type fine struct {
		issued, due, collected bool
		notified               time.Time
		amount, expense, paid  int64
	}
	fines := map[string]*fine{}
	var waiting []*fine // notified, not yet due, in the order of the log
	report := Report{Events: map[string]int{}, Rejected: map[string]int{}, Months: map[string]Month{}}

	reader := csv.NewReader(log)
	header, err := reader.Read()
	require.NoError(t, err)
	var today time.Time
	for {
		record, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		row := map[string]string{}
		for i, name := range header {
			row[name] = record[i]
		}
		report.Rows++

		date, err := time.Parse("2006-01-02", row["time"])
		require.NoError(t, err)
		if date.After(today) {
			today = date
			for len(waiting) > 0 && !waiting[0].notified.After(today.AddDate(0, 0, -60)) {
				waiting[0].due = true
				report.Events["PenaltyDue"]++
				waiting = waiting[1:]
			}
		}

		f := fines[row["fine"]]
		if f == nil {
			f = &fine{}
			fines[row["fine"]] = f
		}
		month := report.Months[row["time"][:7]]
		refused := ""
		switch activity := row["activity"]; {
		case activity == "Create Fine" && f.issued:
			refused = "already issued"
		case activity == "Create Fine":
			f.issued, f.amount = true, euros(t, row["amount"])
			month.Issued++
			month.IssuedCents += Cents(f.amount)
		case !f.issued:
			refused = "not issued"
		case activity == "Send Fine":
			f.expense += euros(t, row["expense"])
		case activity == "Insert Fine Notification":
			if f.notified.IsZero() {
				f.notified = date
				waiting = append(waiting, f)
			}
		case activity == "Add penalty" && !f.due:
			refused = "penalty not due"
		case activity == "Add penalty":
			f.amount = euros(t, row["amount"])
			month.Penalties++
		case activity == "Payment" && euros(t, row["paymentAmount"]) <= 0:
			refused = "payment not positive"
		case activity == "Payment":
			f.paid += euros(t, row["paymentAmount"])
			month.Payments++
			month.PaidCents += Cents(euros(t, row["paymentAmount"]))
		case activity == "Send for Credit Collection" && f.paid >= f.amount+f.expense:
			refused = "nothing owed"
		case activity == "Send for Credit Collection":
			f.collected = true
			month.Collections++
		}
		report.Months[row["time"][:7]] = month
		if refused != "" {
			report.Rejected[refused]++
			report.RejectedTotal++
		} else {
			report.Events[row["activity"]]++
		}
	}
	for _, count := range report.Events {
		report.EventsTotal += count
	}
	report.PenaltiesDue = report.Events["PenaltyDue"]
	for _, f := range fines {
		if !f.issued {
			continue
		}
		report.Fines++
		report.AmountCents += Cents(f.amount)
		report.ExpenseCents += Cents(f.expense)
		report.PaidCents += Cents(f.paid)
		switch owed := f.amount + f.expense - f.paid; {
		case owed <= 0:
			report.Settled++
		case f.collected:
			report.InCollection++
			report.OutstandingCents += Cents(owed)
		default:
			report.Open++
			report.OutstandingCents += Cents(owed)
		}
	}
	return report
}

// euros is floor(100x + 1/2) on rationals.
func euros(t *testing.T, text string) int64 {
	t.Helper()
	if text == "" {
		return 0
	}
	value, ok := new(big.Rat).SetString(text)
	require.True(t, ok, "amount %q", text)
	value.Mul(value, big.NewRat(100, 1)).Add(value, big.NewRat(1, 2))
	cents := new(big.Int).Div(value.Num(), value.Denom()) // Euclidean: floor, as the divisor is positive
	return cents.Int64()
}

// sharedData is where the 30,000 fines lie beside the repository.
const sharedData = "../../../shared/data"

// openLog opens a gzip-packed log, or skips the test.
func openLog(t *testing.T, name string) io.Reader {
	t.Helper()
	file, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) && !strings.Contains(os.Getenv("DEED_TEST_REQUIRE"), "data") {
		t.Skipf("%s is not there: lay the shared data beside the repository to run this test", name)
	}
	require.NoError(t, err)
	t.Cleanup(func() { file.Close() })
	log, err := gzip.NewReader(file)
	require.NoError(t, err)
	return log
}

// figures returns every value of a report by its path, for example
// months.2000-01.issued, but those that differ from run to run.
func figures(t *testing.T, report []byte) map[string]string {
	t.Helper()
	fields := map[string]any{}
	require.NoError(t, json.Unmarshal(report, &fields), "%s", report)
	delete(fields, "elapsed_seconds")
	delete(fields, "store")
	flat := map[string]string{}
	var flatten func(string, any)
	flatten = func(path string, value any) {
		object, ok := value.(map[string]any)
		if !ok {
			flat[path] = fmt.Sprintf("%.15g", value)
			return
		}
		flat[path] = "an object"
		for name, inner := range object {
			flatten(strings.TrimPrefix(path+"."+name, "."), inner)
		}
	}
	flatten("", fields)
	return flat
}

// requireReport fails with the values that differ, and with nothing else.
func requireReport(t *testing.T, expected map[string]string, report []byte) {
	t.Helper()
	got := figures(t, report)
	var differences []string
	for name, value := range expected {
		if got[name] != value {
			differences = append(differences, fmt.Sprintf("%s: expected %s, got %q", name, value, got[name]))
		}
	}
	for name, value := range got {
		if _, ok := expected[name]; !ok {
			differences = append(differences, fmt.Sprintf("%s: not expected, got %s", name, value))
		}
	}
	slices.Sort(differences)
	if len(differences) > 0 {
		t.Fatalf("%d values of the report are wrong:\n%s", len(differences), strings.Join(differences, "\n"))
	}
}

// TestOracle holds the oracle against the report that came with the data.
func TestOracle(t *testing.T) {
	t.Parallel()
	report := oracle(t, openLog(t, filepath.Join(sharedData, "fines-30k.csv.gz")))
	expected, err := os.ReadFile(filepath.Join(sharedData, "fines-30k.expected.json"))
	require.NoError(t, err)
	var got strings.Builder
	require.NoError(t, report.WriteJSON(&got))
	requireReport(t, figures(t, expected), []byte(got.String()))
}

// TestParseCents compares the parser with exact rational arithmetic.
func TestParseCents(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"0", "0.0", "62.59", "31.3", "20", "007.5", ".5", "5.", "0.005", "0.004", "0.0049999", "1.995", "2.675", "1.005",
		"-0.005", "-0.0051", "-0.006", "-12.345", "-1", "90000000000000.99", "0.00500000000000000000000001",
	} {
		got, err := ParseCents(text)
		require.NoError(t, err, text)
		require.Equal(t, euros(t, text), int64(got), text)
	}
	blank, err := ParseCents("")
	require.NoError(t, err)
	require.Zero(t, blank)
	for _, text := range []string{"-", ".", "x", "1,5", "1e3", "1.2.3", "+1", "--1", "99999999999999999999"} {
		_, err := ParseCents(text)
		require.ErrorContains(t, err, text)
	}
}

func TestCents_String(t *testing.T) {
	t.Parallel()
	for cents, text := range map[Cents]string{0: "0.00", 5: "0.05", -5: "-0.05", 123450: "1,234.50", 100000000: "1,000,000.00", -123456: "-1,234.56"} {
		require.Equal(t, text, cents.String())
	}
}
