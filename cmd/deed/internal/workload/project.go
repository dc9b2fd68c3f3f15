package workload

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/query"
)

// Project is a projection that catches up with the log.
type Project struct {
	Timing
	Kind   string `default:"view" enum:"view,sql" help:"view: rows kept by deed, one a stream. sql: the same in a table of its own, written by SQL in the projection's transaction."`
	Events int    `default:"100000" help:"Events that must be stored; missing ones are written first."`
}

// Validate implements Workload.
func (w *Project) Validate() error {
	err := errors.Join(w.Timing.validate(), between("events", w.Events, 1, 1_000_000_000))
	if w.Kind != "view" && w.Kind != "sql" {
		err = errors.Join(err, fmt.Errorf("--kind %q: use view or sql", w.Kind))
	}
	return err
}

func (w *Project) name() string { return "project" }

func (w *Project) parameters() map[string]any {
	return w.with(map[string]any{"kind": w.Kind, "events": w.Events})
}

// readModel is one of the kinds, under a name that nobody else uses.
type readModel interface {
	projection() projection.Projection
	// events returns how many events the rows were made from.
	events(ctx context.Context, app *deed.App) (int64, error)
	// remove removes what emptying it leaves behind.
	remove(ctx context.Context, state projection.State) error
}

func (w *Project) readModel(name string) readModel {
	if w.Kind == "sql" {
		return newSQLModel(name)
	}
	return newViewModel(name)
}

// tally is a row: what is known of one stream.
type tally struct {
	Events int64
	Cents  int64
}

type viewModel struct {
	*projection.ViewDefinition[tally]
}

func newViewModel(name string) readModel {
	return viewModel{projection.View(name, projection.On(func(t *tally, e noted) {
		t.Events++
		t.Cents += e.Cents
	}))}
}

func (v viewModel) projection() projection.Projection { return v.ViewDefinition }

func (v viewModel) events(ctx context.Context, app *deed.App) (n int64, err error) {
	for row, err := range query.All(ctx, app, v.ViewDefinition) {
		if err != nil {
			return 0, err
		}
		n += row.Row.Events
	}
	return n, nil
}

func (v viewModel) remove(context.Context, projection.State) error { return nil }

type sqlModel struct {
	*projection.SQLDefinition
	table, setup string
}

func newSQLModel(name string) readModel {
	setup := "CREATE TABLE IF NOT EXISTS " + name + " (stream TEXT PRIMARY KEY, events BIGINT NOT NULL, cents BIGINT NOT NULL)"
	return sqlModel{table: name, setup: setup, SQLDefinition: projection.SQL(name,
		projection.Setup(setup),
		projection.Reset("DROP TABLE IF EXISTS "+name),
		projection.OnSQL(func(ctx context.Context, tx projection.Tx, e noted, r eventstore.Recorded) error {
			_, err := tx.Exec(ctx, "INSERT INTO "+name+" AS t (stream, events, cents) VALUES ($1, 1, $2)"+
				" ON CONFLICT (stream) DO UPDATE SET events = t.events + 1, cents = t.cents + excluded.cents", r.Stream.String(), e.Cents)
			return err
		}),
	)}
}

func (s sqlModel) projection() projection.Projection { return s.SQLDefinition }

func (s sqlModel) events(ctx context.Context, app *deed.App) (n int64, err error) {
	err = app.Projections().State().Update(ctx, func(tx projection.StateTx) error {
		if _, err := tx.Exec(ctx, s.setup); err != nil { // a pass may be stopped before it has
			return err
		}
		rows, err := tx.Query(ctx, "SELECT CAST(coalesce(sum(events), 0) AS BIGINT) FROM "+s.table)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			if err := rows.Scan(&n); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	return n, err
}

func (s sqlModel) remove(ctx context.Context, state projection.State) error {
	return state.Update(ctx, func(tx projection.StateTx) error {
		_, err := tx.Exec(ctx, "DROP TABLE IF EXISTS "+s.table)
		return err
	})
}

func (w *Project) run(ctx context.Context, b *bench) (*measured, error) {
	if err := b.preload(ctx, Tagging{}); err != nil {
		return nil, err
	}
	if err := b.storedEvents(ctx, w.Events); err != nil {
		return nil, err
	}
	head, err := b.store.Head(ctx)
	if err != nil {
		return nil, err
	}
	m := &measured{details: map[string]any{}}
	began, told := time.Now(), time.Time{}
	from, until := began.Add(w.Warmup), began.Add(w.Warmup+w.Duration)
	tell := func(now time.Time, events int64, took time.Duration) {
		if b.Progress == nil || now.Sub(told) < reportEvery {
			return
		}
		told = now
		b.Progress(Progress{
			Phase: "catching up", Done: int64(now.Sub(began)), Total: int64(w.Warmup + w.Duration),
			PerSecond: float64(events) / took.Seconds(),
		})
	}
	complete := 0
	for m.errors == 0 && ctx.Err() == nil && time.Now().Before(until) {
		end, warm := until, time.Now().Before(from)
		if warm {
			end = from
		}
		pass, err := w.catchUp(ctx, b, "bench_"+b.id, head, end, tell)
		if err != nil {
			return nil, err
		}
		tell(time.Now(), pass.events, pass.took)
		m.total += pass.events
		if pass.problem != nil {
			m.problem(pass.problem)
		}
		if warm {
			continue
		}
		m.operations += pass.events
		m.seconds += pass.took.Seconds()
		if pass.complete {
			complete++
			m.latencies.add(pass.took)
		}
	}
	m.interrupted = ctx.Err() != nil
	m.details["unit"], m.details["latency_of"] = "events", "a pass over the whole log"
	m.details["complete_passes"], m.details["log"] = complete, head
	m.details["events_folded"] = m.total
	return m, nil
}

// pass is one time that a projection caught up, or was stopped doing so.
type pass struct {
	events   int64 // in its rows
	took     time.Duration
	complete bool
	problem  error
}

// catchUp runs a new projection until it has caught up, or its time is up, and
// removes it.
func (w *Project) catchUp(ctx context.Context, b *bench, name string, head eventstore.Position, end time.Time, tell func(time.Time, int64, time.Duration)) (p pass, err error) {
	model := w.readModel(name)
	finishing := context.WithoutCancel(ctx)
	app, err := b.prepare(finishing, model.projection())
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, w.remove(finishing, b, model)) }()
	running, stop := context.WithCancel(finishing)
	defer stop()
	stopped := make(chan error, 1)
	began := time.Now()
	go func() { stopped <- app.Run(running, patience) }()

	p.problem = watch(ctx, app, name, head, end, tell)
	if p.complete = p.problem == nil; p.complete {
		p.took = time.Since(began)
	}
	if errors.Is(p.problem, context.DeadlineExceeded) || errors.Is(p.problem, context.Canceled) {
		p.problem = nil
	}
	stop()
	// It may have been told to stop before it had quite started.
	if err := <-stopped; err != nil && !errors.Is(err, context.Canceled) && p.problem == nil {
		p.problem = err
	}
	if !p.complete {
		p.took = time.Since(began) // what was under way was finished, or does not count
	}
	if errors.Is(p.problem, errors.ErrUnsupported) {
		return p, p.problem
	}
	looking, err := b.prepare(finishing, model.projection())
	if err != nil {
		return p, err
	}
	if p.events, err = model.events(finishing, looking); err == nil && p.problem == nil {
		var letters []projection.DeadLetter
		if letters, err = looking.Projections().DeadLetters(finishing, name); len(letters) > 0 {
			p.problem = fmt.Errorf("%d events were set aside, the first because: %s", len(letters), letters[0].Error)
		}
	}
	return p, errors.Join(err, b.stop(finishing, looking))
}

// watch waits until the projection has come to the head; its error is a
// context's when that did not happen in time.
func watch(ctx context.Context, app *deed.App, name string, head eventstore.Position, end time.Time, tell func(time.Time, int64, time.Duration)) error {
	ctx, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	caughtUp := make(chan error, 1)
	go func() { caughtUp <- app.Projections().WaitFor(ctx, name, head) }()
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	began := time.Now()
	for {
		select {
		case err := <-caughtUp:
			return err
		case now := <-tick.C:
			if reached, err := app.Projections().Reached(name); err == nil {
				tell(now, int64(reached), now.Sub(began))
			}
		}
	}
}

// remove empties the projection and forgets it.
func (w *Project) remove(ctx context.Context, b *bench, model readModel) error {
	app, err := b.prepare(ctx, model.projection())
	if err != nil {
		return err
	}
	err = app.Projections().Rebuild(ctx, model.projection().Name())
	if err == nil {
		err = model.remove(ctx, app.Projections().State())
	}
	if errors.Is(err, errors.ErrUnsupported) {
		err = nil // then nothing was made
	}
	return errors.Join(err, b.stop(ctx, app))
}
