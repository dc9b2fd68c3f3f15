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

// Project is a projection that catches up with the log, or several at once.
type Project struct {
	Timing
	Kind        string `default:"view" enum:"view,sql" help:"view: rows kept by deed, one a stream. sql: the same in a table of its own, written by SQL in the projection's transaction."`
	Events      int    `default:"100000" help:"Events that must be stored; missing ones are written first."`
	Projections int    `default:"1" help:"How many of them catch up at the same time, each with rows of its own."`
	Workers     int    `default:"1" help:"In how many partitions each of them is run, at the same time."`

	Handler time.Duration `default:"0s" help:"How long handling an event waits for something else, as a call of another service would; a view's handler only."`
}

// Validate implements Workload.
func (w *Project) Validate() error {
	err := errors.Join(w.Timing.validate(), between("events", w.Events, 1, 1_000_000_000), between("projections", w.number(), 1, 1000), between("workers", w.workers(), 1, 128))
	if w.Handler < 0 || w.Handler > 0 && w.Kind == "sql" {
		err = errors.Join(err, fmt.Errorf("--handler %s: use a duration of 0 or more, with --kind view", w.Handler))
	}
	if w.Kind != "view" && w.Kind != "sql" {
		err = errors.Join(err, fmt.Errorf("--kind %q: use view or sql", w.Kind))
	}
	return err
}

func (w *Project) name() string { return "project" }

// number returns how many projections there are; 0 is the default.
func (w *Project) number() int { return defaultTo(w.Projections, 1) }

// workers returns how many partitions there are; 0 is the default.
func (w *Project) workers() int { return defaultTo(w.Workers, 1) }

func (w *Project) parameters() map[string]any {
	return w.with(map[string]any{"kind": w.Kind, "events": w.Events, "projections": w.number(), "workers": w.workers(), "handler": w.Handler.String()})
}

// readModel is one of the kinds, under a name that nobody else uses.
type readModel interface {
	projection() projection.Projection
	// events returns how many events the rows were made from.
	events(ctx context.Context, app *deed.App) (int64, error)
	// remove removes what emptying it leaves behind.
	remove(ctx context.Context, state projection.State) error
}

// readModels returns the projections of a pass.
func (w *Project) readModels(name string) []readModel {
	all := make([]readModel, w.number())
	for i := range all {
		own := fmt.Sprintf("%s_%d", name, i+1)
		if w.Kind == "sql" {
			all[i] = newSQLModel(own, w.workers())
		} else {
			all[i] = newViewModel(own, w.workers(), w.Handler)
		}
	}
	return all
}

func parts(models []readModel) []deed.Part {
	all := make([]deed.Part, len(models))
	for i, m := range models {
		all[i] = m.projection()
	}
	return all
}

// tally is a row: what is known of one stream.
type tally struct {
	Events int64
	Cents  int64
}

type viewModel struct {
	*projection.ViewDefinition[tally]
}

func newViewModel(name string, workers int, handler time.Duration) readModel {
	return viewModel{projection.View(name, projection.On(func(t *tally, e noted) {
		if handler > 0 {
			time.Sleep(handler)
		}
		t.Events++
		t.Cents += e.Cents
	})).Partitioned(workers)}
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

func newSQLModel(name string, workers int) readModel {
	setup := "CREATE TABLE IF NOT EXISTS " + name + " (stream TEXT PRIMARY KEY, events BIGINT NOT NULL, cents BIGINT NOT NULL)"
	return sqlModel{table: name, setup: setup, SQLDefinition: projection.SQL(name,
		projection.Setup(setup),
		projection.Reset("DROP TABLE IF EXISTS "+name),
		projection.OnSQL(func(ctx context.Context, tx projection.Tx, e noted, r eventstore.Recorded) error {
			_, err := tx.Exec(ctx, "INSERT INTO "+name+" AS t (stream, events, cents) VALUES ($1, 1, $2)"+
				" ON CONFLICT (stream) DO UPDATE SET events = t.events + 1, cents = t.cents + excluded.cents", r.Stream.String(), e.Cents)
			return err
		}),
	).Partitioned(workers)}
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
	if w.number() > 1 {
		m.details["latency_of"] = fmt.Sprintf("a pass of %d projections over the whole log", w.number())
	}
	if m.seconds > 0 {
		m.details["per_second_of_one_projection"] = float64(m.operations) / float64(w.number()) / m.seconds
	}
	m.details["complete_passes"], m.details["log"] = complete, head
	m.details["events_folded"] = m.total
	return m, nil
}

// pass is one time that the projections caught up, or were stopped doing so.
type pass struct {
	events   int64 // in the rows of all of them
	took     time.Duration
	complete bool
	problem  error
}

// catchUp runs new projections until all have caught up, or their time is up,
// and removes them.
func (w *Project) catchUp(ctx context.Context, b *bench, name string, head eventstore.Position, end time.Time, tell func(time.Time, int64, time.Duration)) (p pass, err error) {
	models := w.readModels(name)
	finishing := context.WithoutCancel(ctx)
	app, err := b.prepare(finishing, parts(models)...)
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, w.remove(finishing, b, models)) }()
	running, stop := context.WithCancel(finishing)
	defer stop()
	stopped := make(chan error, 1)
	began := time.Now()
	go func() { stopped <- app.Run(running, patience) }()

	p.problem = watch(ctx, app, models, head, end, tell)
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
	looking, err := b.prepare(finishing, parts(models)...)
	if err != nil {
		return p, err
	}
	err = w.count(finishing, looking, models, &p)
	return p, errors.Join(err, b.stop(finishing, looking))
}

// count looks at what was made: projections that have caught up with one log
// must have made their rows from the same events.
func (w *Project) count(ctx context.Context, app *deed.App, models []readModel, p *pass) error {
	first := int64(0)
	for i, model := range models {
		events, err := model.events(ctx, app)
		if err != nil {
			return err
		}
		if p.events += events; i == 0 {
			first = events
		}
		if p.problem != nil {
			continue
		}
		name := model.projection().Name()
		letters, err := app.Projections().DeadLetters(ctx, name)
		switch {
		case err != nil:
			return err
		case len(letters) > 0:
			p.problem = fmt.Errorf("%d events were set aside, the first because: %s", len(letters), letters[0].Error)
		case p.complete && events != first:
			p.problem = fmt.Errorf("projection %q was made from %d events, %q from %d", name, events, models[0].projection().Name(), first)
		}
	}
	return nil
}

// watch waits until the projections have come to the head; its error is a
// context's when that did not happen in time.
func watch(ctx context.Context, app *deed.App, models []readModel, head eventstore.Position, end time.Time, tell func(time.Time, int64, time.Duration)) error {
	ctx, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	caughtUp := make(chan error, 1)
	go func() {
		for _, model := range models {
			if err := app.Projections().WaitFor(ctx, model.projection().Name(), head); err != nil {
				caughtUp <- err
				return
			}
		}
		caughtUp <- nil
	}()
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	began := time.Now()
	for {
		select {
		case err := <-caughtUp:
			return err
		case now := <-tick.C:
			sum := int64(0)
			for _, model := range models {
				if reached, err := app.Projections().Reached(model.projection().Name()); err == nil {
					sum += int64(reached)
				}
			}
			tell(now, sum, now.Sub(began))
		}
	}
}

// remove empties the projections and forgets them.
func (w *Project) remove(ctx context.Context, b *bench, models []readModel) error {
	app, err := b.prepare(ctx, parts(models)...)
	if err != nil {
		return err
	}
	for _, model := range models {
		failed := app.Projections().Rebuild(ctx, model.projection().Name())
		if failed == nil {
			failed = model.remove(ctx, app.Projections().State())
		}
		if failed == nil {
			failed = forget(ctx, app.Projections().State(), model.projection().Name())
		}
		if !errors.Is(failed, errors.ErrUnsupported) { // then nothing was made
			err = errors.Join(err, failed)
		}
	}
	return errors.Join(err, b.stop(ctx, app))
}

// forget removes what is kept of a projection for as long as it may come back.
func forget(ctx context.Context, state projection.State, name string) error {
	return state.Update(ctx, func(tx projection.StateTx) error {
		return errors.Join(
			tx.Delete("projection.partitions", name),
			tx.Delete("projection.versions", name), tx.Delete("projection.versions", name+"#"), tx.Delete("projection.versions", name+"/v1"),
		)
	})
}
