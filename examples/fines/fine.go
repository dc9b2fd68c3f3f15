package main

import (
	"fmt"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
)

// What can happen to a fine. Row is the row of the log that an event comes
// from; Owed is by how much the event changed what is owed, which the view of
// months could not work out from the event alone.
type (
	Issued struct {
		Row   int
		Cents Cents
	}
	Sent struct {
		Row     int
		Expense Cents
		Owed    Cents
	}
	Notified     struct{ Row int }
	PenaltyDue   struct{} // the 60 days ran out
	PenaltyAdded struct {
		Row   int
		Cents Cents // the new amount
		Owed  Cents
	}
	Paid struct {
		Row   int
		Cents Cents
		Owed  Cents
	}
	SentToCollection struct{ Row int }
	AppealRecorded   struct {
		Row      int
		Activity string
	}
	Refused struct {
		Row      int
		Activity string
		Reason   string
	}
)

func (Issued) EventType() string           { return "fine.issued" }
func (Sent) EventType() string             { return "fine.sent" }
func (Notified) EventType() string         { return "fine.notified" }
func (PenaltyDue) EventType() string       { return "fine.penalty_due" }
func (PenaltyAdded) EventType() string     { return "fine.penalty_added" }
func (Paid) EventType() string             { return "fine.paid" }
func (SentToCollection) EventType() string { return "fine.sent_to_collection" }
func (AppealRecorded) EventType() string   { return "fine.appeal_recorded" }
func (Refused) EventType() string          { return "fine.refused" }

// Why a row is refused.
const (
	AlreadyIssued      = "already issued"
	NotIssued          = "not issued"
	PenaltyNotDue      = "penalty not due"
	PaymentNotPositive = "payment not positive"
	NothingOwed        = "nothing owed"
)

// Fine is what decisions about a fine need to know.
type Fine struct {
	LastRow      int // of the log; rows up to it have been judged
	Issued       bool
	PenaltyDue   bool
	InCollection bool
	Amount       Cents
	Expense      Cents
	Paid         Cents
}

// Owed is what the offender still owes; what was paid too much is not owed
// back.
func (f Fine) Owed() Cents { return max(f.Amount+f.Expense-f.Paid, 0) }

var fines = aggregate.Define("fine",
	aggregate.On(func(f *Fine, e Issued) { f.LastRow, f.Issued, f.Amount = e.Row, true, e.Cents }),
	aggregate.On(func(f *Fine, e Sent) { f.LastRow = e.Row; f.Expense += e.Expense }),
	aggregate.On(func(f *Fine, e Notified) { f.LastRow = e.Row }),
	aggregate.On(func(f *Fine, _ PenaltyDue) { f.PenaltyDue = true }),
	aggregate.On(func(f *Fine, e PenaltyAdded) { f.LastRow, f.Amount = e.Row, e.Cents }),
	aggregate.On(func(f *Fine, e Paid) { f.LastRow = e.Row; f.Paid += e.Cents }),
	aggregate.On(func(f *Fine, e SentToCollection) { f.LastRow, f.InCollection = e.Row, true }),
	aggregate.On(func(f *Fine, e AppealRecorded) { f.LastRow = e.Row }),
	aggregate.On(func(f *Fine, e Refused) { f.LastRow = e.Row }),
)

// Entry is what the commands made from rows have in common.
type Entry struct {
	Fine     string
	Row      int
	Activity string
}

// AggregateID makes every command that embeds an Entry one about its fine.
func (e Entry) AggregateID() string { return e.Fine }

// The commands, one for each kind of row.
type (
	Issue struct {
		Entry
		Cents Cents
	}
	Send struct {
		Entry
		Expense Cents
	}
	Notify     struct{ Entry }
	AddPenalty struct {
		Entry
		Cents Cents
	}
	Pay struct {
		Entry
		Cents Cents
	}
	SendToCollection struct{ Entry }
	RecordAppeal     struct{ Entry }
)

// commandOf turns a row of the log into the command that it stands for.
func commandOf(row Row) (command.Command[Fine], error) {
	entry := Entry{Fine: row.Fine, Row: row.Number, Activity: row.Activity}
	switch row.Activity {
	case "Create Fine":
		return Issue{entry, row.Amount}, nil
	case "Send Fine":
		return Send{entry, row.Expense}, nil
	case "Insert Fine Notification":
		return Notify{entry}, nil
	case "Add penalty":
		return AddPenalty{entry, row.Amount}, nil
	case "Payment":
		return Pay{entry, row.Payment}, nil
	case "Send for Credit Collection":
		return SendToCollection{entry}, nil
	case "Insert Date Appeal to Prefecture", "Send Appeal to Prefecture", "Receive Result Appeal from Prefecture",
		"Notify Result Appeal to Offender", "Appeal to Judge":
		return RecordAppeal{entry}, nil
	}
	return nil, fmt.Errorf("row %d: activity %q is not one that a fine knows", row.Number, row.Activity)
}

func (c Issue) Decide(f Fine) ([]aggregate.Event, error) {
	if f.Issued {
		return f.refuse(c.Entry, AlreadyIssued)
	}
	return f.record(c.Entry, Issued{c.Row, c.Cents})
}

func (c Send) Decide(f Fine) ([]aggregate.Event, error) {
	if !f.Issued {
		return f.refuse(c.Entry, NotIssued)
	}
	after := f
	after.Expense += c.Expense
	return f.record(c.Entry, Sent{c.Row, c.Expense, after.Owed() - f.Owed()})
}

func (c Notify) Decide(f Fine) ([]aggregate.Event, error) {
	if !f.Issued {
		return f.refuse(c.Entry, NotIssued)
	}
	return f.record(c.Entry, Notified{c.Row})
}

func (c AddPenalty) Decide(f Fine) ([]aggregate.Event, error) {
	switch {
	case !f.Issued:
		return f.refuse(c.Entry, NotIssued)
	case !f.PenaltyDue:
		return f.refuse(c.Entry, PenaltyNotDue)
	}
	after := f
	after.Amount = c.Cents
	return f.record(c.Entry, PenaltyAdded{c.Row, c.Cents, after.Owed() - f.Owed()})
}

func (c Pay) Decide(f Fine) ([]aggregate.Event, error) {
	switch {
	case !f.Issued:
		return f.refuse(c.Entry, NotIssued)
	case c.Cents <= 0:
		return f.refuse(c.Entry, PaymentNotPositive)
	}
	after := f
	after.Paid += c.Cents
	return f.record(c.Entry, Paid{c.Row, c.Cents, after.Owed() - f.Owed()})
}

func (c SendToCollection) Decide(f Fine) ([]aggregate.Event, error) {
	switch {
	case !f.Issued:
		return f.refuse(c.Entry, NotIssued)
	case f.Owed() == 0:
		return f.refuse(c.Entry, NothingOwed)
	}
	return f.record(c.Entry, SentToCollection{c.Row})
}

func (c RecordAppeal) Decide(f Fine) ([]aggregate.Event, error) {
	if !f.Issued {
		return f.refuse(c.Entry, NotIssued)
	}
	return f.record(c.Entry, AppealRecorded{c.Row, c.Activity})
}

// record makes the event of a row happen, unless the row was judged before: a
// run that was interrupted in the middle of a date gives the date's first rows
// again.
func (f Fine) record(e Entry, event aggregate.Event) ([]aggregate.Event, error) {
	if e.Row <= f.LastRow {
		return nil, nil
	}
	return aggregate.Events(event), nil
}

// refuse records that the row was refused. It is an event and not a rejection,
// because the refusal itself is a fact to be counted and kept.
func (f Fine) refuse(e Entry, reason string) ([]aggregate.Event, error) {
	return f.record(e, Refused{e.Row, e.Activity, reason})
}

// MarkPenaltyDue says that the 60 days ran out.
type MarkPenaltyDue struct{ Fine string }

// AggregateID returns the fine.
func (c MarkPenaltyDue) AggregateID() string { return c.Fine }

// Decide marks a fine once.
func (c MarkPenaltyDue) Decide(f Fine) ([]aggregate.Event, error) {
	if f.PenaltyDue {
		return nil, nil
	}
	return aggregate.Events(PenaltyDue{}), nil
}
