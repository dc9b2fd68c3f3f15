package cli

import (
	"context"
	"errors"
	"fmt"
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
	Rebuild     rebuildProjection  `cmd:"" help:"Have a projection emptied and folded again from the beginning."`
}

// keeper is where the projections are kept: the store, or another one.
type keeper struct {
	storeFlag
	stateFlag
}

// open opens the store and the state.
func (k keeper) open(ctx context.Context, e *Environment) (dsn stores.DSN, store eventstore.Store, state projection.State, release func(*error), err error) {
	dsn, store, release, err = k.storeFlag.open(ctx, e)
	if err != nil {
		return dsn, nil, nil, nil, err
	}
	closeAll := release
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
			release(failed)
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
	JSON bool `help:"Print JSON."`
}

// Help is shown by deed projections --help.
func (c *projectionsList) Help() string {
	return `Shown is what is stored: a checkpoint that moved without an event for the projection is written some time later, so that a projection may be a little further than its position says. The lag is the number of positions up to the head of the log. An owner is shown while it has the projection; on a store for one process at a time, that is nobody but this command.`
}

// projectionInfo is what is told about one.
type projectionInfo struct {
	Name     string              `json:"name"`
	Position eventstore.Position `json:"position"`
	Lag      uint64              `json:"lag"`
	// Owner has the projection now; Until is when its lease ends, if by time.
	Owner       string    `json:"owner,omitempty"`
	Until       time.Time `json:"until,omitzero"`
	Epoch       uint64    `json:"epoch"`
	DeadLetters int       `json:"dead_letters"`
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
	known, err := projection.Inspect(ctx, state)
	if err != nil {
		return err
	}
	head, err := store.Head(ctx) // after the checkpoints, which it must not lie behind
	if err != nil {
		return err
	}
	found := []projectionInfo{}
	for _, k := range known {
		// Of one that was removed the epoch of its lease is left, for ever.
		if k.Held || !k.Checkpoint.IsZero() || k.DeadLetters > 0 {
			found = append(found, inform(k, log, head))
		}
	}
	if c.JSON {
		return printJSON(e.Stdout, map[string]any{"store": dsn.String(), "head": head, "projections": found})
	}
	if len(found) == 0 {
		fmt.Fprintln(e.Stderr, "no projections")
		return nil
	}
	t := newTable(column{title: "PROJECTION"}, column{"POSITION", true}, column{"HEAD", true}, column{"LAG", true},
		column{"DEAD LETTERS", true}, column{"EPOCH", true}, column{title: "OWNER"}, column{title: "PROBLEM"})
	for _, p := range found {
		owner, problem := p.Owner, p.Problem
		if owner == "" {
			owner = "-"
		}
		if problem == "" {
			problem = "-"
		}
		t.add(p.Name, count(p.Position), count(head), count(p.Lag), count(p.DeadLetters), count(p.Epoch), owner, problem)
	}
	return t.print(e.Stdout)
}

func inform(k projection.Stored, log string, head eventstore.Position) projectionInfo {
	p := projectionInfo{Name: k.Name, Position: k.Checkpoint.Position, Epoch: k.Lease.Epoch, DeadLetters: k.DeadLetters}
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
