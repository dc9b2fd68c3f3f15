package main

import (
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// status keeps every fine as it stands: the fold that decisions are made on,
// as rows to query.
var status = projection.Of("status", fines)

// MonthRow is a row of the view months: the month's figures, and by how much
// what is owed changed in it.
type MonthRow struct {
	Month
	Owed Cents
	// Appeals is counted from version 2 of the view on.
	Appeals int `json:",omitempty"`
}

// months keeps the figures of each month. Events carry no date of their own:
// the clock that they are recorded by is set to the log's dates.
var months = monthly(inMonth(func(*MonthRow, AppealRecorded) {}))

// monthsToo is version 2 of the same view: it counts appeals. It is given to the
// application beside the first one, which is read until the other is built.
var monthsToo = monthly(inMonth(func(m *MonthRow, _ AppealRecorded) { m.Appeals++ })).Version(2)

func monthly(appeals projection.ViewPart[MonthRow]) *projection.ViewDefinition[MonthRow] {
	return projection.View("months",
		inMonth(func(m *MonthRow, e Issued) { m.Issued++; m.IssuedCents += e.Cents; m.Owed += e.Cents }),
		inMonth(func(m *MonthRow, e Sent) { m.Owed += e.Owed }),
		inMonth(func(m *MonthRow, e PenaltyAdded) { m.Penalties++; m.Owed += e.Owed }),
		inMonth(func(m *MonthRow, e Paid) { m.Payments++; m.PaidCents += e.Cents; m.Owed += e.Owed }),
		inMonth(func(m *MonthRow, _ SentToCollection) { m.Collections++ }),
		// These change no figure, but every month that has a row of the log is listed.
		inMonth(func(*MonthRow, Notified) {}),
		appeals,
		inMonth(func(*MonthRow, Refused) {}),
	)
}

func inMonth[E aggregate.Event](fold func(*MonthRow, E)) projection.ViewPart[MonthRow] {
	return projection.OnKeyed(
		func(_ E, r eventstore.Recorded) []string { return []string{r.Time.Format("2006-01")} },
		func(row *MonthRow, _ string, e E, _ eventstore.Recorded) { fold(row, e) },
	)
}

// Tally counts.
type Tally struct{ Count int }

// activities counts what was accepted, by activity.
var activities = projection.View("activities",
	tally(func(Issued) string { return "Create Fine" }),
	tally(func(Sent) string { return "Send Fine" }),
	tally(func(Notified) string { return "Insert Fine Notification" }),
	tally(func(PenaltyDue) string { return penaltyDue }),
	tally(func(PenaltyAdded) string { return "Add penalty" }),
	tally(func(Paid) string { return "Payment" }),
	tally(func(SentToCollection) string { return "Send for Credit Collection" }),
	tally(func(e AppealRecorded) string { return e.Activity }),
)

// penaltyDue is the only activity that is no row of the log.
const penaltyDue = "PenaltyDue"

// refusals counts what was refused, by reason.
var refusals = projection.View("refusals",
	tally(func(e Refused) string { return e.Reason }),
)

func tally[E aggregate.Event](key func(E) string) projection.ViewPart[Tally] {
	return projection.OnKeyed(
		func(e E, _ eventstore.Recorded) []string { return []string{key(e)} },
		func(t *Tally, _ string, _ E, _ eventstore.Recorded) { t.Count++ },
	)
}
