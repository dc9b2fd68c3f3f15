package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/user"
	"slices"
	"strings"
	"time"

	commands "github.com/deed-go/deed/command"
	"github.com/deed-go/deed/saga"
)

// sagasCommand is about runs of sagas.
type sagasCommand struct {
	List      sagasList      `cmd:"" default:"withargs" help:"List the sagas, or the runs of one."`
	Show      showSaga       `cmd:"" help:"Show the timeline of a run."`
	Signal    signalRun      `cmd:"" help:"Send a signal to a run."`
	Cancel    cancelRuns     `cmd:"" help:"Ask a run, or several, to end: what they did is compensated."`
	Terminate terminateRuns  `cmd:"" help:"End a run, or several, where they are: nothing is compensated."`
	Retry     retryRuns      `cmd:"" help:"Have a run, or several, try at once what they would try later."`
	Resume    resumeRuns     `cmd:"" help:"Have a blocked run, or several, go on."`
	Skip      skipStep       `cmd:"" help:"Give a run the result of a step that somebody has done by hand."`
	Restart   restartRun     `cmd:"" help:"Have a run do its steps again, from one on."`
	Versions  markerVersions `cmd:"" help:"Show which versions of a saga's markers open runs still have."`
	Export    exportRun      `cmd:"" help:"Write the history of a run to a file."`
	Import    importRun      `cmd:"" help:"Append an exported history to this log."`
}

// sagaKeeper is where the log and the index of runs are.
type sagaKeeper struct{ keeper }

// acting is ctx for what is written in the name of whoever runs the tool.
func acting(ctx context.Context) context.Context {
	if u, err := user.Current(); err == nil && u.Username != "" {
		return commands.WithActor(ctx, u.Username)
	}
	return ctx
}

// engine returns an engine without definitions, on the store.
func (k sagaKeeper) engine(ctx context.Context, e *Environment) (*saga.Engine, func(*error), error) {
	_, store, state, release, err := k.open(ctx, e)
	if err != nil {
		return nil, nil, err
	}
	return saga.NewEngine(store, state, nil, saga.Options{Logger: slog.New(slog.DiscardHandler)}), release, nil
}

// runFlags name one run.
type runFlags struct {
	sagaKeeper
	Name string `arg:"" help:"The saga's name."`
	ID   string `arg:"" help:"The run's id."`
}

// sagasList lists sagas or runs.
type sagasList struct {
	sagaKeeper
	Name      string            `arg:"" optional:"" help:"The saga's name; without one, all sagas are summed up."`
	Status    []string          `short:"s" help:"Only runs with any of these: running, waiting, blocked, completed, failed, cancelled, terminated. Without, those that have not ended."`
	Published map[string]string `help:"Only runs that have published these values, as in --published customer=ann."`
	Since     time.Time         `help:"Only runs that started at or after this time, as in 2026-01-31T00:00:00Z."`
	Until     time.Time         `help:"Only runs that started before this time."`
	Limit     int               `default:"100" help:"The most runs."`
	After     string            `help:"Runs behind the one of this id, the last one of a page."`
	Watch     bool              `short:"w" help:"Look again and again, until interrupted."`
	Every     time.Duration     `default:"1s" help:"How often to look with --watch."`
	JSON      bool              `help:"Print JSON; with --watch an object a line."`
}

// Validate refuses what makes no sense.
func (c *sagasList) Validate() error {
	var err error
	if c.Every < 10*time.Millisecond {
		err = fmt.Errorf("--every %s: it must be at least 10ms", c.Every)
	}
	if c.Limit < 1 {
		err = errors.Join(err, fmt.Errorf("--limit %d: it must be at least 1", c.Limit))
	}
	return errors.Join(err, validStatuses(c.Status))
}

var statuses = []saga.Status{
	saga.StatusRunning, saga.StatusWaiting, saga.StatusBlocked, saga.StatusCompleted, saga.StatusFailed, saga.StatusCancelled, saga.StatusTerminated,
}

func validStatuses(given []string) (err error) {
	for _, s := range given {
		if !slices.Contains(statuses, saga.Status(s)) {
			err = errors.Join(err, fmt.Errorf("--status %q: use any of %s", s, joined(statuses)))
		}
	}
	return err
}

func joined(all []saga.Status) string {
	var texts []string
	for _, s := range all {
		texts = append(texts, string(s))
	}
	return strings.Join(texts, ", ")
}

// Help is shown by deed sagas --help.
func (c *sagasList) Help() string {
	return `Examples:

  deed sagas --store postgres://localhost/shop
  deed sagas checkout --status blocked,failed
  deed sagas checkout --published customer=ann --json

Shown is the index that the process stores which runs the saga: it is at most a second older than the runs.`
}

// sagaSummary is what is told about all runs of a saga.
type sagaSummary struct {
	Name string `json:"name"`
	// Open counts the runs that have not ended, by status.
	Open map[saga.Status]int `json:"open"`
	// Oldest is when the oldest of them has started, and Next when one goes on.
	Oldest time.Time `json:"oldest,omitzero"`
	Next   time.Time `json:"next,omitzero"`
}

// Run lists.
func (c *sagasList) Run(ctx context.Context, e *Environment) (err error) {
	engine, release, err := c.engine(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	for {
		if c.Watch && !c.JSON && isTerminal(e.Stdout) {
			fmt.Fprint(e.Stdout, "\x1b[H\x1b[2J")
		}
		if c.Name == "" {
			err = c.summary(ctx, e, engine)
		} else {
			err = c.runs(ctx, e, engine)
		}
		if err != nil || !c.Watch {
			if c.Watch && ctx.Err() != nil {
				return nil //nolint:nilerr // it was told to end
			}
			return err
		}
		timer := time.NewTimer(c.Every)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}

func (c *sagasList) print(e *Environment, value any) error {
	if c.Watch {
		return json.NewEncoder(e.Stdout).Encode(value)
	}
	return printJSON(e.Stdout, value)
}

func (c *sagasList) summary(ctx context.Context, e *Environment, engine *saga.Engine) error {
	names, err := engine.Names(ctx)
	if err != nil {
		return err
	}
	all := []sagaSummary{}
	for _, name := range names {
		s := sagaSummary{Name: name, Open: map[saga.Status]int{}}
		err := pages(ctx, engine, name, saga.ListOptions{}, func(run saga.Info) error {
			s.Open[run.Status]++
			if s.Oldest.IsZero() || run.Started.Before(s.Oldest) {
				s.Oldest = run.Started
			}
			if !run.Wake.IsZero() && (s.Next.IsZero() || run.Wake.Before(s.Next)) {
				s.Next = run.Wake
			}
			return nil
		})
		if err != nil {
			return err
		}
		all = append(all, s)
	}
	if c.JSON {
		return c.print(e, map[string]any{"sagas": all})
	}
	if len(all) == 0 {
		fmt.Fprintln(e.Stderr, "no sagas")
		return nil
	}
	t := newTable(column{title: "SAGA"}, column{"RUNNING", true}, column{"WAITING", true}, column{"BLOCKED", true}, column{title: "OLDEST"}, column{title: "NEXT"})
	for _, s := range all {
		t.add(s.Name, count(s.Open[saga.StatusRunning]), count(s.Open[saga.StatusWaiting]), count(s.Open[saga.StatusBlocked]), moment(s.Oldest), moment(s.Next))
	}
	return t.print(e.Stdout)
}

// pages calls visit with each run of the list.
func pages(ctx context.Context, engine *saga.Engine, name string, o saga.ListOptions, visit func(saga.Info) error) error {
	const size = 1000
	for o.Limit = size; ; {
		runs, err := engine.List(ctx, name, o)
		if err != nil {
			return err
		}
		for _, run := range runs {
			if err := visit(run); err != nil {
				return err
			}
		}
		if len(runs) < size {
			return nil
		}
		o.After = runs[size-1].ID
	}
}

func (c *sagasList) options() saga.ListOptions {
	o := saga.ListOptions{Published: c.Published, Since: c.Since, Until: c.Until, Limit: c.Limit, After: c.After}
	for _, s := range c.Status {
		o.Status = append(o.Status, saga.Status(s))
	}
	return o
}

func (c *sagasList) runs(ctx context.Context, e *Environment, engine *saga.Engine) error {
	runs, err := engine.List(ctx, c.Name, c.options())
	if err != nil {
		return err
	}
	if c.JSON {
		return c.print(e, map[string]any{"saga": c.Name, "runs": append([]saga.Info{}, runs...)})
	}
	if len(runs) == 0 {
		fmt.Fprintf(e.Stderr, "saga %s has no such runs\n", c.Name)
		return nil
	}
	t := newTable(column{title: "RUN"}, column{title: "STATUS"}, column{title: "AT"}, column{title: "WAKES"}, column{"ATTEMPTS", true}, column{title: "STARTED"}, column{title: "ERROR"})
	for _, r := range runs {
		status := string(r.Status)
		switch {
		case r.RollingBack:
			status += ", rolling back"
		case r.Cancelling && !r.Status.Ended():
			status += ", to be cancelled"
		}
		t.add(firstLine(r.ID), status, cmp.Or(r.Step, "-"), moment(r.Wake), count(r.Attempts), moment(r.Started), firstLine(r.Error))
	}
	if err := t.print(e.Stdout); err != nil {
		return err
	}
	if len(runs) == c.Limit {
		fmt.Fprintf(e.Stderr, "there may be more: --after %q\n", runs[len(runs)-1].ID)
	}
	return nil
}

// showSaga shows a timeline.
type showSaga struct {
	runFlags
	JSON bool `help:"Print JSON."`
}

// Run shows it.
func (c *showSaga) Run(ctx context.Context, e *Environment) (err error) {
	engine, release, err := c.engine(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	t, err := engine.Timeline(ctx, c.Name, c.ID)
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(e.Stdout, t)
	}
	return drawTimeline(e.Stdout, &t)
}

// marks are what the statuses of steps look like.
var marks = map[saga.StepStatus]string{
	saga.StepOpen: "…", saga.StepRetrying: "↻", saga.StepSucceeded: "✓", saga.StepFailed: "✗", saga.StepCancelled: "⊘", saga.StepTimedOut: "⏱", saga.StepSkipped: "»",
}

// drawTimeline draws the steps below one another, those of branches and
// compensations indented, with a bar that says when each was under way.
func drawTimeline(out io.Writer, t *saga.Timeline) error {
	head := newTable(column{}, column{})
	head.add("run", fmt.Sprintf("%s %s", t.Saga, firstLine(t.ID)))
	status := string(t.Status)
	if t.Cancelling && !t.Status.Ended() {
		status += ", to be cancelled"
	}
	head.add("status", status)
	head.add("started", moment(t.Started))
	if !t.Wake.IsZero() {
		head.add("wakes", moment(t.Wake))
	}
	if t.Error != "" {
		head.add("error", firstLine(t.Error))
	}
	for _, name := range slices.Sorted(maps.Keys(t.Published)) {
		head.add(name, firstLine(string(t.Published[name])))
	}
	head.add("input", firstLine(string(t.Input)))
	if len(t.Output) > 0 {
		head.add("output", firstLine(string(t.Output)))
	}
	if len(t.Pending) > 0 {
		head.add("would undo", strings.Join(t.Pending, ", "))
	}
	for _, s := range t.Signals {
		head.add("signal", fmt.Sprintf("%s %s", s.Name, firstLine(string(s.Value))))
	}
	history := fmt.Sprintf("%s events, %s bytes", count(t.Events), count(t.Bytes))
	if t.Continued > 0 {
		history += fmt.Sprintf(", continued %d times", t.Continued)
	}
	head.add("history", history)
	if err := head.print(out); err != nil || len(t.Steps) == 0 {
		return err
	}
	fmt.Fprintln(out)

	from, to := t.Steps[0].Began, t.Updated
	for _, s := range t.Steps {
		if s.Ended.After(to) {
			to = s.Ended
		}
	}
	steps := newTable(column{}, column{title: "STEP"}, column{title: "BEGAN"}, column{"TOOK", true}, column{title: "WHEN"}, column{title: "WHAT"})
	for _, s := range t.Steps {
		depth := 0
		text := s.Text
		if at := strings.Index(text, " in branch "); at >= 0 {
			path := text[at+len(" in branch "):]
			depth, text = 1+strings.Count(path, "@"), text[:at]+" ["+strings.Trim(strings.SplitN(path, " in ", 2)[0], `"`)+"]"
		}
		if strings.Contains(s.Text, " in compensation ") {
			depth++
		}
		ended := s.Ended
		if ended.IsZero() {
			ended = to
		}
		took := "-"
		if !s.Ended.IsZero() {
			took = s.Ended.Sub(s.Began).Round(time.Millisecond).String()
		}
		steps.add(marks[s.Status], strings.Repeat("  ", depth)+text, moment(s.Began), took, bar(from, to, s.Began, ended), whatOf(&s))
	}
	return steps.print(out)
}

// bar draws the part of a time in which something was under way.
func bar(from, to, began, ended time.Time) string {
	const width = 20
	whole := to.Sub(from)
	at := func(t time.Time) int {
		if whole <= 0 {
			return 0
		}
		return min(max(int(float64(t.Sub(from))/float64(whole)*width), 0), width)
	}
	a, b := at(began), at(ended)
	if b == a {
		a, b = min(a, width-1), min(a, width-1)+1
	}
	return strings.Repeat("·", a) + strings.Repeat("█", b-a) + strings.Repeat("·", width-b)
}

func whatOf(s *saga.StepInfo) string {
	var parts []string
	if n := len(s.Attempts); n > 0 {
		parts = append(parts, fmt.Sprintf("%d failed: %s", n, firstLine(s.Attempts[n-1].Error)))
	}
	if s.Error != "" {
		parts = append(parts, firstLine(s.Error))
	}
	if s.For != "" {
		parts = append(parts, firstLine(s.For))
	}
	if !s.Due.IsZero() {
		parts = append(parts, "due "+moment(s.Due))
	}
	if len(s.Output) > 0 && string(s.Output) != "null" {
		parts = append(parts, "→ "+firstLine(string(s.Output)))
	}
	if s.Note != "" {
		parts = append(parts, "note: "+firstLine(s.Note))
	}
	return strings.Join(parts, "; ")
}

// signalRun sends a signal.
type signalRun struct {
	runFlags
	Signal   string `arg:"" help:"The signal's name."`
	Value    string `default:"null" help:"Its value, as JSON."`
	SignalID string `name:"id" help:"Sending another one with this id does nothing."`
}

// Run sends it.
func (c *signalRun) Run(ctx context.Context, e *Environment) (err error) {
	engine, release, err := c.engine(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	if err := engine.Signal(acting(ctx), c.Name, c.ID, c.Signal, c.SignalID, json.RawMessage(c.Value)); err != nil {
		return err
	}
	fmt.Fprintf(e.Stdout, "signal %s was sent to saga %s, run %s\n", c.Signal, c.Name, c.ID)
	return nil
}

// selection is one run, or those of a list.
type selection struct {
	sagaKeeper
	Name      string            `arg:"" help:"The saga's name."`
	ID        string            `arg:"" optional:"" help:"The run's id."`
	All       bool              `help:"Every open run of the saga that --status and --published select, instead of one."`
	Status    []string          `help:"With --all: only runs with any of these statuses."`
	Published map[string]string `help:"With --all: only runs that have published these values."`
	Yes       bool              `help:"With --all: do it; without, only say how many runs it would be."`
}

// Validate refuses to do it to nothing in particular.
func (c *selection) Validate() error {
	err := validStatuses(c.Status)
	if c.All == (c.ID != "") {
		err = errors.Join(err, errors.New("say the run's id, or --all"))
	}
	return err
}

// each does it to the runs.
func (c *selection) each(ctx context.Context, e *Environment, done string, do func(engine *saga.Engine, id string) error) (err error) {
	engine, release, err := c.engine(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	if !c.All {
		if err := do(engine, c.ID); err != nil {
			return err
		}
		fmt.Fprintf(e.Stdout, "saga %s, run %s %s\n", c.Name, c.ID, done)
		return nil
	}
	o := saga.ListOptions{Published: c.Published}
	for _, s := range c.Status {
		o.Status = append(o.Status, saga.Status(s))
	}
	var ids []string
	if err := pages(ctx, engine, c.Name, o, func(run saga.Info) error {
		if !run.Status.Ended() {
			ids = append(ids, run.ID)
		}
		return nil
	}); err != nil {
		return err
	}
	if !c.Yes {
		fmt.Fprintf(e.Stdout, "it would be %s runs of saga %s: say --yes to do it\n", count(len(ids)), c.Name)
		return nil
	}
	n := 0
	for _, id := range ids {
		switch failed := do(engine, id); {
		case failed == nil:
			n++
		case errors.Is(failed, saga.ErrFinished): // it has ended meanwhile
		default:
			err = errors.Join(err, failed)
		}
	}
	fmt.Fprintf(e.Stdout, "%s runs of saga %s: %s\n", count(n), c.Name, done)
	return err
}

// cancelRuns asks runs to end.
type cancelRuns struct {
	selection
	Reason string `help:"Why, for the history."`
}

// Run asks.
func (c *cancelRuns) Run(ctx context.Context, e *Environment) error {
	return c.each(ctx, e, "is asked to end", func(engine *saga.Engine, id string) error { return engine.Cancel(acting(ctx), c.Name, id, c.Reason) })
}

// terminateRuns ends runs.
type terminateRuns struct {
	selection
	Reason string `help:"Why, for the history."`
}

// Run ends them.
func (c *terminateRuns) Run(ctx context.Context, e *Environment) error {
	return c.each(ctx, e, "is terminated", func(engine *saga.Engine, id string) error { return engine.Terminate(acting(ctx), c.Name, id, c.Reason) })
}

// retryRuns has runs try again.
type retryRuns struct{ selection }

// Run says so.
func (c *retryRuns) Run(ctx context.Context, e *Environment) error {
	return c.each(ctx, e, "tries again", func(engine *saga.Engine, id string) error { return engine.RetryNow(acting(ctx), c.Name, id) })
}

// resumeRuns has blocked runs go on.
type resumeRuns struct{ selection }

// Run says so.
func (c *resumeRuns) Run(ctx context.Context, e *Environment) error {
	return c.each(ctx, e, "goes on", func(engine *saga.Engine, id string) error { return engine.Resume(ctx, c.Name, id) })
}

// skipStep gives a step its result.
type skipStep struct {
	runFlags
	Step   string `arg:"" help:"The step's key, as show --json gives it: do:charge."`
	Result string `default:"null" help:"What it came to, as JSON."`
	Note   string `required:"" help:"Why, for the history."`
}

// Run does.
func (c *skipStep) Run(ctx context.Context, e *Environment) (err error) {
	engine, release, err := c.engine(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	if err := engine.Skip(acting(ctx), c.Name, c.ID, c.Step, json.RawMessage(c.Result), c.Note); err != nil {
		return err
	}
	fmt.Fprintf(e.Stdout, "saga %s, run %s goes on behind step %s\n", c.Name, c.ID, c.Step)
	return nil
}

// restartRun has steps done again.
type restartRun struct {
	runFlags
	From string `help:"The key of the first step that is done again, as show --json gives it; without, the first of all."`
	Note string `required:"" help:"Why, for the history."`
}

// Help is shown by deed sagas restart --help.
func (c *restartRun) Help() string {
	return `The steps are done again with new idempotency keys: what they did before is done a second time. Undo that first.`
}

// Run does.
func (c *restartRun) Run(ctx context.Context, e *Environment) (err error) {
	engine, release, err := c.engine(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	if err := engine.Restart(acting(ctx), c.Name, c.ID, c.From, c.Note); err != nil {
		return err
	}
	fmt.Fprintf(e.Stdout, "saga %s, run %s begins again at %s\n", c.Name, c.ID, cmp.Or(c.From, "its first step"))
	return nil
}

// markerVersions shows the use of markers.
type markerVersions struct {
	sagaKeeper
	Name string `arg:"" help:"The saga's name."`
	JSON bool   `help:"Print JSON."`
}

// Run shows it.
func (c *markerVersions) Run(ctx context.Context, e *Environment) (err error) {
	engine, release, err := c.engine(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	uses, err := engine.Versions(ctx, c.Name)
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(e.Stdout, map[string]any{"saga": c.Name, "versions": append([]saga.VersionUse{}, uses...)})
	}
	if len(uses) == 0 {
		fmt.Fprintf(e.Stderr, "no open run of saga %s has a marker\n", c.Name)
		return nil
	}
	t := newTable(column{title: "MARKER"}, column{"VERSION", true}, column{"OPEN RUNS", true}, column{title: "FOR EXAMPLE"})
	for _, u := range uses {
		t.add(u.Name, count(u.Version), count(u.Open), firstLine(u.Example))
	}
	return t.print(e.Stdout)
}

// exportRun writes a history.
type exportRun struct {
	runFlags
	Output string `short:"o" help:"The file to write, which must not be there yet; without, standard output."`
}

// Run writes it.
func (c *exportRun) Run(ctx context.Context, e *Environment) (err error) {
	engine, release, err := c.engine(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	data, err := engine.Export(ctx, c.Name, c.ID)
	if err != nil {
		return err
	}
	data = append(data, '\n')
	if c.Output == "" {
		_, err = e.Stdout.Write(data)
		return err
	}
	file, err := os.OpenFile(c.Output, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("--output %q: %w", c.Output, err)
	}
	_, err = file.Write(data)
	return errors.Join(err, file.Close())
}

// importRun reads a history.
type importRun struct {
	sagaKeeper
	File string `arg:"" type:"existingfile" help:"What deed sagas export has written."`
}

// Help is shown by deed sagas import --help.
func (c *importRun) Help() string {
	return `A run that has not ended goes on here: make sure that it does not go on where it comes from. What it waits for of the log it waits for from now on.`
}

// Run appends it.
func (c *importRun) Run(ctx context.Context, e *Environment) (err error) {
	engine, release, err := c.engine(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	data, err := os.ReadFile(c.File)
	if err != nil {
		return err
	}
	name, id, err := engine.Import(ctx, data)
	if err != nil {
		return err
	}
	fmt.Fprintf(e.Stdout, "saga %s, run %s is here\n", name, id)
	return nil
}
