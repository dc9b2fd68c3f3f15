package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/deed-go/deed/cmd/deed/internal/stores"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// projectionsCommand is about what the state keeps of projections.
type projectionsCommand struct {
	List        projectionsList    `cmd:"" default:"withargs" help:"Show how far projections have come."`
	DeadLetters deadLettersCommand `cmd:"" help:"List the events that a projection has set aside, or was told to skip."`
	DeadLetter  deadLetterCommand  `cmd:"" help:"Show one of them whole."`
	Replay      replayLetters      `cmd:"" help:"Have a projection fold the events again that it has set aside."`
	Skip        skipLetter         `cmd:"" help:"Have a projection give up one of them."`
	Verify      verifyProjection   `cmd:"" help:"Have a projection compared with what the log makes of it today."`
	Pause       pauseProjection    `cmd:"" help:"Have a projection stand still until it is resumed."`
	Resume      resumeProjection   `cmd:"" help:"Have a paused projection go on."`
	Rebuild     rebuildProjection  `cmd:"" help:"Have a projection emptied and folded again from the beginning."`
	Compare     compareVersions    `cmd:"" help:"Show how the rows of two versions of a projection differ."`
	Activate    activateVersion    `cmd:"" help:"Have another version of a projection read."`
	Drop        dropVersion        `cmd:"" help:"Remove a version of a projection that is not read."`
}

// keeper is where the projections are kept: the store, or another one.
type keeper struct {
	storeFlag
	stateFlag
}

// open opens the store and the state.
func (k keeper) open(ctx context.Context, e *Environment) (dsn stores.DSN, store eventstore.Store, state projection.State, release func(*error), err error) {
	dsn, store, closeStore, err := k.storeFlag.open(ctx, e)
	if err != nil {
		return dsn, nil, nil, nil, err
	}
	closeAll := closeStore
	defer func() {
		if err != nil {
			closeAll(&err)
		}
	}()
	holder := store
	if k.State != "" {
		kept, err := k.stateFlag.find(e)
		if err != nil {
			return dsn, nil, nil, nil, err
		}
		source, err := kept.Opener(ctx, stores.Existing)
		if err != nil {
			return dsn, nil, nil, nil, err
		}
		if holder, err = source.Open(ctx); err != nil {
			return dsn, nil, nil, nil, err
		}
		closeAll = func(failed *error) {
			*failed = errors.Join(*failed, stores.Close(holder))
			closeStore(failed)
		}
	}
	state, ok := eventstore.Find[projection.State](holder)
	if !ok {
		return dsn, nil, nil, nil, fmt.Errorf("%s keeps events only: say with --state where its read models are kept: %w", dsn, errors.ErrUnsupported)
	}
	return dsn, store, state, closeAll, nil
}

// projectionsList shows what the state keeps of projections.
type projectionsList struct {
	keeper
	Watch bool          `short:"w" help:"Look again and again, until interrupted; shows the speed, and the time left at that speed."`
	Every time.Duration `default:"1s" help:"How often to look with --watch."`
	JSON  bool          `help:"Print JSON; with --watch an object a line."`
}

// Validate refuses to look without a pause.
func (c *projectionsList) Validate() error {
	if c.Every < 10*time.Millisecond {
		return fmt.Errorf("--every %s: it must be at least 10ms", c.Every)
	}
	return nil
}

// Help is shown by deed projections --help.
func (c *projectionsList) Help() string {
	return `Shown is what is stored: a checkpoint that moved without an event for the projection is written some time later, so that a projection may be a little further than its position says. The lag is the number of positions up to the head of the log, and BEHIND how long ago the first of these events was appended. A version of a projection has its number behind the name, as in report/v2; the active one is read. An owner is shown while it has the projection; on a store for one process at a time, that is nobody but this command.`
}

// projectionInfo is what is told about one.
type projectionInfo struct {
	Name string `json:"name"`
	// Version is the projection's, and Active says that it is the one that is read.
	Version  int                 `json:"version"`
	Active   bool                `json:"active"`
	Position eventstore.Position `json:"position"`
	Lag      uint64              `json:"lag"`
	// LagSeconds is how long ago the first event was appended that it has not passed.
	LagSeconds float64 `json:"lag_seconds,omitempty"`
	// PerSecond is how many positions it has moved a second since the look before,
	// and SecondsLeft how long it takes to the head at that speed.
	PerSecond   float64 `json:"per_second,omitempty"`
	SecondsLeft float64 `json:"seconds_left,omitempty"`
	// Owner has the projection now; Until is when its lease ends, if by time.
	Owner       string    `json:"owner,omitempty"`
	Until       time.Time `json:"until,omitzero"`
	Epoch       uint64    `json:"epoch"`
	DeadLetters int       `json:"dead_letters"`
	// Paused: it stands still until it is resumed.
	Paused bool `json:"paused,omitempty"`
	// Problem is why it cannot go on.
	Problem string `json:"problem,omitempty"`
}

// Run shows the projections.
func (c *projectionsList) Run(ctx context.Context, e *Environment) (err error) {
	dsn, store, state, release, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	log, err := eventstore.LogID(ctx, store)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	look := func() (*sight, error) {
		known, err := projection.Inspect(ctx, state)
		if err != nil {
			return nil, err
		}
		s := &sight{Store: dsn.String(), Projections: []projectionInfo{}, at: time.Now()}
		if s.Head, err = store.Head(ctx); err != nil { // after the checkpoints, which it must not lie behind
			return nil, err
		}
		for _, k := range known {
			// Of one that was removed the epoch of its lease is left, for ever.
			if k.Held || !k.Checkpoint.IsZero() || k.DeadLetters > 0 {
				s.Projections = append(s.Projections, inform(k, log, s.Head))
			}
		}
		return s, s.age(ctx, store)
	}
	now, err := look()
	if err != nil {
		return err
	}
	if !c.Watch {
		if c.JSON {
			return printJSON(e.Stdout, now)
		}
		if len(now.Projections) == 0 {
			fmt.Fprintln(e.Stderr, "no projections")
			return nil
		}
		return now.table(false).print(e.Stdout)
	}
	ticker := time.NewTicker(c.Every)
	defer ticker.Stop()
	for {
		if err := c.show(e, now); err != nil {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil // it was told to end
		}
		before := now
		if now, err = look(); err != nil {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // likewise
			}
			return err
		}
		now.since(before)
	}
}

// show prints one of many looks.
func (c *projectionsList) show(e *Environment, s *sight) error {
	if c.JSON {
		return json.NewEncoder(e.Stdout).Encode(s)
	}
	if isTerminal(e.Stdout) {
		fmt.Fprint(e.Stdout, "\x1b[H\x1b[2J")
	}
	return s.table(true).print(e.Stdout)
}

// sight is what one look has seen.
type sight struct {
	Store       string              `json:"store"`
	Head        eventstore.Position `json:"head"`
	Projections []projectionInfo    `json:"projections"`

	at time.Time
}

// age fills in for how long the projections have been behind.
func (s *sight) age(ctx context.Context, store eventstore.Store) error {
	appended := map[eventstore.Position]time.Time{}
	for i := range s.Projections {
		p := &s.Projections[i]
		if p.Lag == 0 {
			continue
		}
		at, known := appended[p.Position]
		if !known {
			for r, err := range store.Read(ctx, eventstore.All(), eventstore.ReadOptions{After: p.Position, Limit: 1}) {
				if err != nil {
					return err
				}
				at = r.Time
			}
			appended[p.Position] = at
		}
		if !at.IsZero() {
			p.LagSeconds = max(0, s.at.Sub(at).Seconds())
		}
	}
	return nil
}

// since fills in how fast the projections have moved.
func (s *sight) since(before *sight) {
	passed := s.at.Sub(before.at).Seconds()
	for i := range s.Projections {
		p := &s.Projections[i]
		was := slices.IndexFunc(before.Projections, func(b projectionInfo) bool { return b.Name == p.Name })
		if was < 0 || p.Position < before.Projections[was].Position || passed <= 0 {
			continue // it has just begun, or again
		}
		p.PerSecond = float64(p.Position-before.Projections[was].Position) / passed
		if p.PerSecond > 0 {
			p.SecondsLeft = float64(p.Lag) / p.PerSecond
		}
	}
}

func (s *sight) table(speed bool) *textTable {
	columns := []column{{title: "PROJECTION"}, {title: "ACTIVE"}, {"POSITION", true}, {"HEAD", true}, {"LAG", true}, {"BEHIND", true}}
	if speed {
		columns = append(columns, column{"A SECOND", true}, column{"LEFT", true})
	}
	t := newTable(append(columns, column{"DEAD LETTERS", true}, column{"EPOCH", true}, column{title: "OWNER"}, column{title: "PROBLEM"})...)
	for _, p := range s.Projections {
		active := "-"
		if p.Active {
			active = "yes"
		}
		cells := []string{p.Name, active, count(p.Position), count(s.Head), count(p.Lag), behind(p.LagSeconds)}
		if speed {
			left := "-"
			if p.SecondsLeft > 0 {
				left = time.Duration(p.SecondsLeft * float64(time.Second)).Round(time.Second).String()
			}
			cells = append(cells, rate(p.PerSecond), left)
		}
		t.add(append(cells, count(p.DeadLetters), count(p.Epoch), cmp.Or(p.Owner, "-"), cmp.Or(p.Problem, p.standing(), "-"))...)
	}
	return t
}

// behind tells seconds as people read them.
func behind(seconds float64) string {
	switch d := time.Duration(seconds * float64(time.Second)); {
	case d <= 0:
		return "-"
	case d < time.Second:
		return "< 1s"
	default:
		return d.Round(time.Second).String()
	}
}

// standing says that the projection was told to stand still.
func (p *projectionInfo) standing() string {
	if p.Paused {
		return "paused"
	}
	return ""
}

func inform(k projection.Stored, log string, head eventstore.Position) projectionInfo {
	p := projectionInfo{Name: k.Name, Version: k.Version, Active: k.Active, Position: k.Checkpoint.Position, Epoch: k.Lease.Epoch, DeadLetters: k.DeadLetters, Paused: k.Paused}
	if k.Held {
		p.Owner, p.Until = k.Lease.Owner, k.Lease.Until
	}
	switch {
	case !k.Checkpoint.IsZero() && log != "" && k.Checkpoint.Log != log:
		p.Problem = fmt.Sprintf("its checkpoint is in the log %q, this one is %q: the database was replaced: rebuild the projection", k.Checkpoint.Log, log)
	case k.Checkpoint.Position > head:
		p.Problem = fmt.Sprintf("the log ends at %d: the database was restored from an older state: rebuild the projection", head)
	default:
		p.Lag = uint64(head - k.Checkpoint.Position)
	}
	return p
}
