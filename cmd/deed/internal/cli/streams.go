package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// streamsCommand lists streams.
type streamsCommand struct {
	storeFlag
	Category string `help:"Only streams of this category."`
	Limit    int    `default:"100" help:"The most streams to list; 0 is all. So many are kept in memory."`
	JSON     bool   `help:"Print JSON."`
}

// Help is shown by deed streams --help.
func (c *streamsCommand) Help() string {
	return `The log is read backward, until as many streams are found as are to be listed: the ones that were written last. Where there are fewer, the whole log is read.`
}

// Validate refuses what is no category, and negative limits.
func (c *streamsCommand) Validate() error {
	var mistakes []error
	if c.Category != "" {
		if err := eventstore.ValidateCategory(c.Category); err != nil {
			mistakes = append(mistakes, fmt.Errorf("--category: %w", err))
		}
	}
	return errors.Join(append(mistakes, validateLimit(c.Limit))...)
}

func validateLimit(limit int) error {
	if limit < 0 {
		return fmt.Errorf("--limit %d: it must not be negative; 0 is no limit", limit)
	}
	return nil
}

// streamInfo is what is told about one.
type streamInfo struct {
	Stream       string              `json:"stream"`
	Category     string              `json:"category"`
	ID           string              `json:"id"`
	Events       uint64              `json:"events"`
	LastPosition eventstore.Position `json:"last_position"`
	LastTime     time.Time           `json:"last_time"`
}

// Run lists the streams. The last event of each says it all: its version is the
// number of events.
func (c *streamsCommand) Run(ctx context.Context, e *Environment) (err error) {
	dsn, store, release, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	head, err := store.Head(ctx)
	if err != nil {
		return err
	}
	q := eventstore.All()
	if c.Category != "" {
		q = eventstore.OneCategory(c.Category)
	}
	shown := newProgress(e.Stderr)
	defer shown.clear()
	found, known, more := []streamInfo{}, map[eventstore.Stream]struct{}{}, false
	for r, err := range store.Read(ctx, q, eventstore.ReadOptions{Backward: true}) {
		if err != nil {
			return err
		}
		if r.Position%1024 == 0 {
			shown.show("reading", count(len(found))+" streams", int64(head-r.Position), int64(head))
		}
		if _, ok := known[r.Stream]; ok {
			continue
		}
		if c.Limit > 0 && len(found) == c.Limit {
			more = true
			break
		}
		known[r.Stream] = struct{}{}
		found = append(found, streamInfo{r.Stream.String(), r.Stream.Category, r.Stream.ID, r.Version, r.Position, r.Time})
	}
	shown.clear()
	if c.JSON {
		return printJSON(e.Stdout, map[string]any{"store": dsn.String(), "head": head, "streams": found, "more": more})
	}
	if len(found) == 0 {
		fmt.Fprintln(e.Stderr, "no streams")
		return nil
	}
	t := newTable(column{title: "STREAM"}, column{"EVENTS", true}, column{"LAST POSITION", true}, column{title: "LAST EVENT"})
	for _, s := range found {
		t.add(s.Stream, count(s.Events), count(s.LastPosition), moment(s.LastTime))
	}
	if err := t.print(e.Stdout); err != nil {
		return err
	}
	if more {
		fmt.Fprintf(e.Stderr, "there are more: --limit 0 lists all\n")
	}
	return nil
}
