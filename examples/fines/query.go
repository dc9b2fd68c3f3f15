package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/query"
)

// report reads the read models, as they are once they have seen everything up
// to the position; the figures of the months from that view.
func report(ctx context.Context, host query.Host, by *projection.ViewDefinition[MonthRow], at eventstore.Position) (Report, error) {
	r := Report{Events: map[string]int{}, Rejected: map[string]int{}, Months: map[string]Month{}}
	seen := query.AtLeast(at)

	for entry, err := range query.All(ctx, host, activities, seen) {
		if err != nil {
			return r, err
		}
		r.Events[entry.Key] = entry.Row.Count
		r.EventsTotal += entry.Row.Count
	}
	for entry, err := range query.All(ctx, host, refusals, seen) {
		if err != nil {
			return r, err
		}
		r.Rejected[entry.Key] = entry.Row.Count
		r.RejectedTotal += entry.Row.Count
	}
	r.PenaltiesDue = r.Events[penaltyDue]
	r.Rows = r.EventsTotal - r.PenaltiesDue + r.RejectedTotal

	for entry, err := range query.All(ctx, host, by, seen) {
		if err != nil {
			return r, err
		}
		r.Months[entry.Key] = entry.Row.Month
	}
	for entry, err := range query.All(ctx, host, status, seen) {
		if err != nil {
			return r, err
		}
		fine := entry.Row
		if !fine.Issued {
			continue // rows of a fine never issued were refused
		}
		r.Fines++
		r.AmountCents += fine.Amount
		r.ExpenseCents += fine.Expense
		r.PaidCents += fine.Paid
		r.OutstandingCents += fine.Owed()
		switch {
		case fine.Owed() == 0:
			r.Settled++
		case fine.InCollection:
			r.InCollection++
		default:
			r.Open++
		}
	}
	return r, nil
}

// points reads the chart's months, those without rows too.
func points(ctx context.Context, host query.Host, by *projection.ViewDefinition[MonthRow], at eventstore.Position) ([]Point, error) {
	var all []Point
	var owed Cents
	for entry, err := range query.All(ctx, host, by, query.AtLeast(at)) {
		if err != nil {
			return nil, err
		}
		month, err := time.Parse("2006-01", entry.Key)
		if err != nil {
			return nil, err
		}
		for len(all) > 0 && all[len(all)-1].Month.AddDate(0, 1, 0).Before(month) {
			all = append(all, Point{Month: all[len(all)-1].Month.AddDate(0, 1, 0), Outstanding: owed})
		}
		owed += entry.Row.Owed
		all = append(all, Point{Month: month, Issued: entry.Row.IssuedCents, Paid: entry.Row.PaidCents, Outstanding: owed})
	}
	return all, nil
}

// draw writes the chart to a file.
func draw(ctx context.Context, host query.Host, by *projection.ViewDefinition[MonthRow], at eventstore.Position, name string) error {
	all, err := points(ctx, host, by, at)
	if err != nil {
		return err
	}
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(WriteChart(file, "Traffic fines by month", all), file.Close())
}
