package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
)

// errInterrupted: the replay was asked to stop; what it has done is kept.
var errInterrupted = errors.New("interrupted")

// inFlight is how many fines are judged at once. The commits that are in
// flight together share a sync of the file.
const inFlight = 1024

// start opens the application on a store. Its clock goes on where the store's
// last event left it; that of a new store begins before every log.
func start(ctx context.Context, store eventstore.Store, parts ...deed.Part) (*deed.App, error) {
	clock := time.Date(1900, time.January, 1, 0, 0, 0, 0, time.UTC)
	for last, err := range store.Read(ctx, eventstore.All(), eventstore.ReadOptions{Backward: true, Limit: 1}) {
		if err != nil {
			return nil, err
		}
		clock = last.Time
	}
	parts = append(parts, fines, replays, penalties, status, months, activities, refusals, deed.ManualClock(clock))
	return deed.Start(ctx, eventstore.Opened(store), parts...)
}

// replay executes the rows of a log that have not been judged yet, date by
// date, and returns the receipt of the last. When ctx ends it finishes the rows
// in flight and returns errInterrupted.
func replay(ctx context.Context, app *deed.App, title string, log io.Reader, progress func(Progress)) (eventstore.Position, error) {
	working := context.WithoutCancel(ctx) // a row that has begun is finished
	if _, err := deed.Execute(working, app, replays, Begin{title}); err != nil {
		return 0, err
	}
	begun, _, err := deed.Load(working, app, replays, replayID)
	if err != nil {
		return 0, err
	}
	for date, err := range Dates(Rows(log)) {
		if err != nil {
			return 0, err
		}
		last := date[len(date)-1]
		if last.Number <= begun.Row {
			continue
		}
		if err := app.AdvanceTo(working, last.Date); err != nil {
			return 0, err
		}
		if err := judge(ctx, app, date); err != nil {
			return 0, err
		}
		if _, err := deed.Execute(working, app, replays, FinishDate{last.Date, last.Number}); err != nil {
			return 0, err
		}
		head, err := app.Store().Head(working)
		if err != nil {
			return 0, err
		}
		progress(Progress{Date: last.Date, Rows: last.Number, Executed: last.Number - begun.Row, Events: int(head)})
	}
	if err := sound(working, app); err != nil {
		return 0, err
	}
	return app.Store().Head(working)
}

// sound returns an error if something that the report rests on was set aside.
func sound(ctx context.Context, app *deed.App) error {
	blocked, err := app.Sagas().List(ctx, penalties.Name(), saga.ListOptions{Status: []saga.Status{saga.StatusBlocked}, Limit: 1})
	if err != nil {
		return err
	}
	if len(blocked) > 0 {
		return fmt.Errorf("the saga of fine %q is blocked: %s", blocked[0].ID, blocked[0].Error)
	}
	views, err := app.Projections().Status(ctx)
	if err != nil {
		return err
	}
	for _, view := range views {
		if view.DeadLetters > 0 {
			return fmt.Errorf("view %q has set %d events aside: %w", view.Name, view.DeadLetters, view.Err)
		}
	}
	return nil
}

// judge executes the rows of a date: different fines at once, the rows of one
// fine in order.
func judge(ctx context.Context, app *deed.App, date []Row) error {
	var order []string
	rows := map[string][]Row{}
	for _, row := range date {
		if rows[row.Fine] == nil {
			order = append(order, row.Fine)
		}
		rows[row.Fine] = append(rows[row.Fine], row)
	}

	queue := make(chan string)
	failed := make(chan error, inFlight)
	var workers sync.WaitGroup
	for range min(inFlight, len(order)) {
		workers.Go(func() {
			for fine := range queue {
				for _, row := range rows[fine] {
					if err := execute(context.WithoutCancel(ctx), app, row); err != nil {
						failed <- err
						return
					}
				}
			}
		})
	}
	var err error
feed:
	for _, fine := range order {
		if ctx.Err() != nil { // select takes either when a worker waits, too
			err = errInterrupted
			break
		}
		select {
		case queue <- fine:
		case err = <-failed:
			break feed
		case <-ctx.Done():
			err = errInterrupted
			break feed
		}
	}
	close(queue)
	workers.Wait()
	close(failed)
	for more := range failed {
		err = errors.Join(err, more)
	}
	return err
}

func execute(ctx context.Context, app *deed.App, row Row) error {
	c, err := commandOf(row)
	if err != nil {
		return err
	}
	if _, err := deed.Execute[Fine, command.Command[Fine]](ctx, app, fines, c); err != nil {
		return fmt.Errorf("row %d: %w", row.Number, err)
	}
	return nil
}
