package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
)

// Report is the outcome of a replay.
type Report struct {
	Rows             int              `json:"rows"`
	Fines            int              `json:"fines"`
	Events           map[string]int   `json:"events"` // by activity, and PenaltyDue
	EventsTotal      int              `json:"events_total"`
	Rejected         map[string]int   `json:"rejected"` // by reason
	RejectedTotal    int              `json:"rejected_total"`
	AmountCents      Cents            `json:"amount_cents"`
	ExpenseCents     Cents            `json:"expense_cents"`
	PaidCents        Cents            `json:"paid_cents"`
	OutstandingCents Cents            `json:"outstanding_cents"`
	Settled          int              `json:"settled"`
	InCollection     int              `json:"in_collection"`
	Open             int              `json:"open"`
	PenaltiesDue     int              `json:"penalties_due"`
	Months           map[string]Month `json:"months"` // by month, 2006-01

	ElapsedSeconds float64 `json:"elapsed_seconds"`
	Store          string  `json:"store"`
}

// Month is what happened in a month.
type Month struct {
	Issued      int   `json:"issued"`
	IssuedCents Cents `json:"issued_cents"`
	Penalties   int   `json:"penalties"`
	Payments    int   `json:"payments"`
	PaidCents   Cents `json:"paid_cents"`
	Collections int   `json:"collections"`
}

// WriteJSON writes the report for programs.
func (r Report) WriteJSON(w io.Writer) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", " ")
	return encoder.Encode(r)
}

// WriteText writes the report for people.
func (r Report) WriteText(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	line := func(format string, a ...any) { fmt.Fprintf(table, format+"\t\n", a...) }

	line("Fines\tcount\teuros")
	line("issued\t%s\t%s", thousands(int64(r.Fines)), r.AmountCents)
	line("expenses\t\t%s", r.ExpenseCents)
	line("paid\t\t%s", r.PaidCents)
	line("outstanding\t\t%s", r.OutstandingCents)
	line("settled\t%s\t", thousands(int64(r.Settled)))
	line("in collection\t%s\t", thousands(int64(r.InCollection)))
	line("open\t%s\t", thousands(int64(r.Open)))

	fmt.Fprintln(table)
	line("Events\tcount")
	for _, activity := range slices.Sorted(maps.Keys(r.Events)) {
		line("%s\t%s", activity, thousands(int64(r.Events[activity])))
	}
	line("all\t%s", thousands(int64(r.EventsTotal)))

	fmt.Fprintln(table)
	line("Refused\tcount")
	for _, reason := range slices.Sorted(maps.Keys(r.Rejected)) {
		line("%s\t%s", reason, thousands(int64(r.Rejected[reason])))
	}
	line("all\t%s", thousands(int64(r.RejectedTotal)))

	fmt.Fprintln(table)
	line("Year\tissued\teuros\tpenalties\tpayments\teuros\tcollections")
	years := map[string]Month{}
	for month, m := range r.Months {
		y := years[month[:4]]
		y.Issued += m.Issued
		y.IssuedCents += m.IssuedCents
		y.Penalties += m.Penalties
		y.Payments += m.Payments
		y.PaidCents += m.PaidCents
		y.Collections += m.Collections
		years[month[:4]] = y
	}
	for _, year := range slices.Sorted(maps.Keys(years)) {
		y := years[year]
		line("%s\t%s\t%s\t%s\t%s\t%s\t%s", year, thousands(int64(y.Issued)), y.IssuedCents, thousands(int64(y.Penalties)),
			thousands(int64(y.Payments)), y.PaidCents, thousands(int64(y.Collections)))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s rows in %.1f s, %s rows/s, on %s\n", thousands(int64(r.Rows)), r.ElapsedSeconds,
		thousands(int64(float64(r.Rows)/max(r.ElapsedSeconds, 0.001))), r.Store)
	return err
}
