package cli

import (
	"context"
	"errors"
	"fmt"
	"os/user"
	"strings"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// deadLettersCommand lists what a projection has set aside.
type deadLettersCommand struct {
	keeper
	Name    string `arg:"" help:"The projection's name."`
	Skipped bool   `help:"Those that were skipped instead, with the reason."`
	JSON    bool   `help:"Print JSON."`
}

// Help is shown by deed projections dead-letters --help.
func (c *deadLettersCommand) Help() string {
	return `An event without an error only follows one that has failed, of its stream or of a row that both touch: it must not overtake it.`
}

// Run lists them.
func (c *deadLettersCommand) Run(ctx context.Context, e *Environment) (err error) {
	_, _, state, release, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	admin := projection.NewAdmin(state, "")
	if c.Skipped {
		skipped, err := admin.Skipped(ctx, c.Name)
		if err != nil {
			return err
		}
		if c.JSON {
			return printJSON(e.Stdout, map[string]any{"projection": c.Name, "skipped": append([]projection.SkippedEvent{}, skipped...)})
		}
		if len(skipped) == 0 {
			fmt.Fprintf(e.Stderr, "projection %s has no skipped events\n", c.Name)
			return nil
		}
		t := newTable(column{"POSITION", true}, column{title: "EVENT"}, column{title: "TYPE"}, column{title: "SKIPPED"}, column{title: "BY"}, column{title: "NOTE"})
		for _, s := range skipped {
			t.add(count(s.Position), fmt.Sprintf("%s@%d", s.Stream, s.Version), s.Type, moment(s.SkippedAt), firstLine(s.By), firstLine(s.Note))
		}
		return t.print(e.Stdout)
	}
	letters, err := admin.DeadLetters(ctx, c.Name)
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(e.Stdout, map[string]any{"projection": c.Name, "dead_letters": append([]projection.DeadLetter{}, letters...)})
	}
	if len(letters) == 0 {
		fmt.Fprintf(e.Stderr, "projection %s has no dead letters\n", c.Name)
		return nil
	}
	t := newTable(column{"POSITION", true}, column{title: "EVENT"}, column{title: "TYPE"}, column{"ATTEMPTS", true}, column{title: "SET ASIDE"}, column{title: "ERROR"})
	for _, d := range letters {
		t.add(count(d.Position), fmt.Sprintf("%s@%d", d.Stream, d.Version), d.Type, count(d.Attempts), moment(d.At), firstLine(d.Error))
	}
	return t.print(e.Stdout)
}

// firstLine is the beginning of a text, without what a terminal would obey.
func firstLine(text string) string {
	line, _, more := strings.Cut(text, "\n")
	if line == "" {
		return "-"
	}
	if more {
		line += " …"
	}
	quoted := readable([]byte(line))
	return strings.TrimSuffix(strings.TrimPrefix(quoted, `"`), `"`)
}

// deadLetterCommand shows one dead letter.
type deadLetterCommand struct {
	keeper
	Name     string `arg:"" help:"The projection's name."`
	Position uint64 `arg:"" help:"The event's position."`
	JSON     bool   `help:"Print JSON."`
}

// Run shows it, with its event.
func (c *deadLetterCommand) Run(ctx context.Context, e *Environment) (err error) {
	_, store, state, release, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	letters, err := projection.NewAdmin(state, "").DeadLetters(ctx, c.Name)
	if err != nil {
		return err
	}
	for _, d := range letters {
		if uint64(d.Position) != c.Position {
			continue
		}
		var event eventstore.Recorded
		for r, err := range store.Read(ctx, eventstore.OneStream(d.Stream), eventstore.ReadOptions{After: d.Position - 1, Through: d.Position}) {
			if err != nil {
				return err
			}
			event = r
		}
		if c.JSON {
			return printJSON(e.Stdout, struct {
				projection.DeadLetter
				Recorded jsonEvent `json:"recorded"`
			}{d, newJSONEvent(&event)})
		}
		t := newTable(column{}, column{})
		t.add("event", fmt.Sprintf("%s@%d, position %s", d.Stream, d.Version, count(d.Position)))
		t.add("type", d.Type)
		t.add("id", d.EventID.String())
		t.add("time", moment(event.Time))
		t.add("data", readable(event.Data))
		t.add("set aside", fmt.Sprintf("%s, after %d attempts", moment(d.At), d.Attempts))
		held := "later events of its stream"
		if len(d.Keys) > 0 {
			held = fmt.Sprintf("later events of %q", d.Keys)
		}
		t.add("holds up", held)
		if d.Error == "" {
			t.add("error", "none: an earlier event that it must not overtake has failed")
		} else {
			t.add("error", firstLine(d.Error))
		}
		if err := t.print(e.Stdout); err != nil {
			return err
		}
		if d.Stack != "" {
			_, err = fmt.Fprintf(e.Stdout, "\n%s\n", d.Stack)
		}
		return err
	}
	return fmt.Errorf("%w: projection %q has set no event at position %d aside", projection.ErrNoDeadLetter, c.Name, c.Position)
}

// asking is a command that has something done by whoever runs a projection.
type asking struct {
	keeper
	Name  string        `arg:"" help:"The projection's name."`
	Wait  time.Duration `default:"30s" help:"How long to wait for a process that runs the projection."`
	Later bool          `help:"Do not wait: leave the request to whoever runs the projection next. For a store that one process at a time can open."`
	JSON  bool          `help:"Print JSON."`

	patience *time.Timer // until it ends; who hears of the work begins it again
}

// askingHelp is what the commands have in common.
const askingHelp = `The work is done by the process that runs the projection, since that has its code. It finds the request within about a second.`

// Help is shown with --help.
func (c *asking) Help() string { return askingHelp }

// Validate refuses a wait that ends before it begins.
func (c *asking) Validate() error {
	if c.Wait <= 0 {
		return fmt.Errorf("--wait %s: it must be positive", c.Wait)
	}
	return nil
}

// run opens the state and asks.
func (c *asking) run(ctx context.Context, e *Environment, ask func(ctx context.Context, admin *projection.Admin) (done map[string]any, text string, err error)) (err error) {
	_, _, state, release, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	admin := projection.NewAdmin(state, whoAsks())
	if c.Later {
		admin = admin.WithoutWaiting()
	}
	waiting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c.patience = time.AfterFunc(c.Wait, func() { cancel(context.DeadlineExceeded) })
	defer c.patience.Stop()
	done, text, err := ask(waiting, admin)
	if err != nil {
		if errors.Is(context.Cause(waiting), context.DeadlineExceeded) && ctx.Err() == nil {
			err = fmt.Errorf("%w (waited %s; see --wait and --later)", err, c.Wait)
		}
		return err
	}
	if c.Later {
		done, text = map[string]any{"later": true}, "the request is left to whoever runs the projection next"
	}
	if c.JSON {
		done["projection"] = c.Name
		return printJSON(e.Stdout, done)
	}
	_, err = fmt.Fprintln(e.Stdout, text)
	return err
}

// replayLetters is deed projections replay.
type replayLetters struct{ asking }

// Run asks for it.
func (c *replayLetters) Run(ctx context.Context, e *Environment) error {
	return c.run(ctx, e, func(ctx context.Context, admin *projection.Admin) (map[string]any, string, error) {
		n, err := admin.Replay(ctx, c.Name)
		if err != nil && n > 0 {
			err = fmt.Errorf("%d events were folded, but %w", n, err)
		}
		return map[string]any{"replayed": n}, fmt.Sprintf("%s events folded", count(n)), err
	})
}

// skipLetter is deed projections skip.
type skipLetter struct {
	asking
	Position uint64 `arg:"" help:"The event's position."`
	Note     string `required:"" help:"Why; it is kept with the event."`
}

// Help is shown by deed projections skip --help.
func (c *skipLetter) Help() string {
	return `The projection's rows stay as if the event had not happened, until it is rebuilt. Later events that followed it stay set aside: replay them afterwards. ` + askingHelp
}

// Run asks for it.
func (c *skipLetter) Run(ctx context.Context, e *Environment) error {
	return c.run(ctx, e, func(ctx context.Context, admin *projection.Admin) (map[string]any, string, error) {
		err := admin.Skip(ctx, c.Name, eventstore.Position(c.Position), c.Note)
		return map[string]any{"skipped": c.Position}, fmt.Sprintf("the event at position %d is given up", c.Position), err
	})
}

// whoAsks is the name of the user, for the records.
func whoAsks() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return "deed"
}

// verifyProjection is deed projections verify.
type verifyProjection struct{ asking }

// Help is shown by deed projections verify --help.
func (c *verifyProjection) Help() string {
	return `The log is folded again on the side, up to the projection's checkpoint; the projection goes on meanwhile. Rows that do not fit into the memory set aside for them go to a temporary file of the process that does the work. Told are events that were applied twice or never, and, for views, rows that are missing, too many or different. The exit code is 1 when something is wrong. It is waited for as long as the work goes on: --wait is how long nothing may be heard of it; when this command ends, the work does. A program whose store one process at a time can open verifies itself, with Engine.Verify. ` + askingHelp
}

// Validate refuses a question whose answer nobody waits for.
func (c *verifyProjection) Validate() error {
	if c.Later {
		return errors.New("--later: nobody would hear of the result")
	}
	return c.asking.Validate()
}

// Run asks for it.
func (c *verifyProjection) Run(ctx context.Context, e *Environment) error {
	wrong := false
	shown := verifyShown{progress: newProgress(e.Stderr)}
	err := c.run(ctx, e, func(ctx context.Context, admin *projection.Admin) (map[string]any, string, error) {
		defer shown.clear()
		v, err := admin.Verify(ctx, c.Name, projection.WithProgress(func(p projection.VerifyProgress) {
			c.patience.Reset(c.Wait)
			shown.report(p, time.Now())
		}))
		wrong = !v.Agrees()
		return map[string]any{"agrees": !wrong, "verification": v}, v.String(), err
	})
	if err == nil && wrong {
		err = errReported
	}
	return err
}

// verifyShown shows how far a verification has come.
type verifyShown struct {
	*progress
	before projection.VerifyProgress
	at     time.Time
	remark string
}

// report shows the next step, with the speed since the one before and the time left.
func (s *verifyShown) report(p projection.VerifyProgress, now time.Time) {
	phase := "folding"
	if p.Parts > 1 {
		phase = fmt.Sprintf("folding part %d of %d", p.Part, p.Parts)
	}
	if p.Rows > 0 {
		s.show(strings.Replace(phase, "folding", "comparing", 1), count(p.Rows)+" rows", int64(p.Position), int64(p.Through)+1)
		return
	}
	if passed := now.Sub(s.at).Seconds(); passed >= drawEvery.Seconds() || p.Part != s.before.Part || p.Position < s.before.Position {
		s.remark = ""
		if moved := float64(p.Position) - float64(s.before.Position); p.Part == s.before.Part && moved > 0 {
			speed := moved / passed
			left := float64(p.Through-min(p.Through, p.Position)) / speed
			s.remark = fmt.Sprintf("%s/s, %s left", rate(speed), time.Duration(left*float64(time.Second)).Round(time.Second))
		}
		s.before, s.at = p, now
	}
	s.show(phase, s.remark, int64(p.Position), int64(p.Through)+1)
}

// rebuildProjection is deed projections rebuild.
type rebuildProjection struct{ asking }

// Help is shown by deed projections rebuild --help.
func (c *rebuildProjection) Help() string {
	return `Until it has caught up, queries see the rows made so far. This returns when the rows are gone; deed projections shows how far it has come since. ` + askingHelp
}

// Run asks for it.
func (c *rebuildProjection) Run(ctx context.Context, e *Environment) error {
	return c.run(ctx, e, func(ctx context.Context, admin *projection.Admin) (map[string]any, string, error) {
		return map[string]any{"emptied": true}, "the projection was emptied and is being built", admin.Rebuild(ctx, c.Name)
	})
}

// pauseProjection is deed projections pause.
type pauseProjection struct{ asking }

// Help is shown by deed projections pause --help.
func (c *pauseProjection) Help() string {
	return `Nothing is folded until it is resumed, also after a restart and by other processes. Queries see the rows as they are. ` + askingHelp
}

// Run asks for it.
func (c *pauseProjection) Run(ctx context.Context, e *Environment) error {
	return c.run(ctx, e, func(ctx context.Context, admin *projection.Admin) (map[string]any, string, error) {
		return map[string]any{"paused": true}, "the projection stands still until it is resumed", admin.Pause(ctx, c.Name)
	})
}

// resumeProjection is deed projections resume.
type resumeProjection struct{ asking }

// Help is shown by deed projections resume --help.
func (c *resumeProjection) Help() string {
	return `It goes on from where it stands. ` + askingHelp
}

// Run asks for it.
func (c *resumeProjection) Run(ctx context.Context, e *Environment) error {
	return c.run(ctx, e, func(ctx context.Context, admin *projection.Admin) (map[string]any, string, error) {
		return map[string]any{"paused": false}, "the projection goes on", admin.Resume(ctx, c.Name)
	})
}
