package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/deed-go/deed/cmd/deed/internal/stores"
	"github.com/deed-go/deed/cmd/deed/internal/workload"
	"github.com/deed-go/deed/eventstore"
)

// benchCommand measures; each workload is a command below it.
type benchCommand struct {
	storeFlag
	stateFlag
	JSON bool `help:"Print the result as JSON."`

	Append    workload.Append    `cmd:"" help:"Conditional appends: each writer expects its stream where it left it."`
	AppendDCB workload.AppendDCB `cmd:"" name:"append-dcb" help:"Appends under a dynamic consistency boundary: no event with the same tags."`
	Load      workload.Load      `cmd:"" help:"Reading random streams, whole."`
	Replay    workload.Replay    `cmd:"" help:"Reading the whole log in order, undecoded."`
	Execute   workload.Execute   `cmd:"" help:"Commands on aggregates that are kept in memory."`
	Project   workload.Project   `cmd:"" help:"A projection that catches up with the log, from its beginning."`
	Live      workload.Live      `cmd:"" help:"How long a subscriber waits for an event."`
	Saga      workload.Saga      `cmd:"" help:"Durable functions of three steps that do nothing."`
	React     workload.React     `cmd:"" help:"Events that a reaction handles, doing nothing."`
}

// Help is shown by deed bench --help.
func (c *benchCommand) Help() string {
	return `Each run writes to streams of its own, in categories that begin with "bench_", and its events stay: use a database that you can throw away. It is made if it does not exist.

A run warms up, measures, and then looks whether what was acknowledged is there. Interrupt it to end it early; what was measured is printed. An operation that conflicts is counted as a conflict and not as an operation. If anything failed, the exit code is 1.

Stores that keep events only (NATS, EventStoreDB) have their read models in a temporary SQLite file, unless --state says where.`
}

// Run runs the workload that was chosen.
func (c *benchCommand) Run(ctx context.Context, parsed *kong.Context, e *Environment) error {
	chosen, ok := parsed.Selected().Target.Addr().Interface().(workload.Workload)
	if !ok {
		var names []string
		for _, child := range parsed.Selected().Children {
			names = append(names, child.Name)
		}
		return &usageError{err: fmt.Errorf("what is to be measured is missing: choose %s", strings.Join(names, ", "))}
	}
	dsn, err := c.storeFlag.find(e)
	if err != nil {
		return err
	}
	state, err := c.keeper(ctx, e, dsn)
	if err != nil {
		return err
	}
	source, err := dsn.Opener(ctx, stores.Create)
	if err != nil {
		return err
	}
	shown := newProgress(e.Stderr)
	target := workload.Target{
		Opener: source, State: state, Name: dsn.String(), Address: dsn.Raw(), Shared: dsn.Shared, Gaps: dsn.Gaps, Durability: dsn.DurabilityOf,
		Other: func() (*exec.Cmd, error) { return e.Self("subscriber") },
	}
	if shown != nil {
		target.Progress = func(p workload.Progress) { showRun(shown, p) }
	}
	result, err := workload.Run(ctx, chosen, target)
	shown.clear()
	if result == nil {
		return err
	}
	for i, text := range result.Problems {
		result.Problems[i] = stores.RedactText(text)
	}
	if c.JSON {
		err = errors.Join(err, printJSON(e.Stdout, result))
	} else {
		err = errors.Join(err, printResult(e, result))
	}
	if err == nil && result.Errors > 0 {
		fmt.Fprintf(e.Stderr, "deed: errors: %s, the first of them:\n", count(result.Errors))
		for _, text := range result.Problems {
			fmt.Fprintf(e.Stderr, "  %s\n", text)
		}
		return errReported
	}
	return err
}

// keeper is what keeps the read models; nil if the store does.
func (c *benchCommand) keeper(ctx context.Context, e *Environment, store stores.DSN) (eventstore.Opener, error) {
	if c.State != "" {
		dsn, err := c.stateFlag.find(e)
		if err != nil {
			return nil, err
		}
		return dsn.Opener(ctx, stores.Create)
	}
	if !store.Stateless {
		return nil, nil
	}
	return stores.Temporary(), nil
}

// showRun shows how far a run has come.
func showRun(shown *progress, p workload.Progress) {
	remark := ""
	switch {
	case p.PerSecond > 0:
		remark = rate(p.PerSecond) + "/s"
	case p.Phase == "storing events":
		remark = count(p.Done) + " of " + count(p.Total)
	}
	shown.show(p.Phase, remark, p.Done, p.Total)
}

// printResult prints a result for people.
func printResult(e *Environment, r *workload.Result) error {
	t := newTable(column{}, column{})
	row := func(name, value string) { t.add(name, value) }
	row("workload", r.Workload)
	row("store", r.Store)
	row("durability", r.Durability)
	row("parameters", list(r.Parameters))
	unit, _ := r.Details["unit"].(string)
	measured := fmt.Sprintf("%s %s in %.2f s", count(r.Operations), unit, r.Seconds)
	if r.Interrupted {
		measured += ", interrupted"
	}
	row("operations", measured)
	row("per second", rate(r.PerSecond))
	latency := "-" // as there is none of a pass that was not completed
	if r.P99 > 0 {
		latency = fmt.Sprintf("p50 %s   p95 %s   p99 %s", duration(r.P50), duration(r.P95), duration(r.P99))
	}
	row("latency", fmt.Sprintf("%s   (%v)", latency, r.Details["latency_of"]))
	row("conflicts", count(r.Conflicts))
	row("errors", count(r.Errors))
	details := maps.Clone(r.Details)
	delete(details, "unit")
	delete(details, "latency_of")
	for _, name := range slices.Sorted(maps.Keys(details)) {
		value := value(details[name])
		if of, ok := strings.CutSuffix(name, "_ms"); ok {
			if ms, ok := details[name].(float64); ok {
				name, value = of, duration(ms)
			}
		}
		row(strings.ReplaceAll(name, "_", " "), value)
	}
	return t.print(e.Stdout)
}

// duration writes milliseconds with three digits.
func duration(ms float64) string {
	d := time.Duration(ms * float64(time.Millisecond))
	switch {
	case d >= time.Second:
		return strconv.FormatFloat(d.Seconds(), 'f', 2, 64) + " s"
	case d >= 100*time.Millisecond:
		return strconv.FormatFloat(ms, 'f', 0, 64) + " ms"
	case d >= 10*time.Millisecond:
		return strconv.FormatFloat(ms, 'f', 1, 64) + " ms"
	case d >= time.Millisecond:
		return strconv.FormatFloat(ms, 'f', 2, 64) + " ms"
	}
	return strconv.FormatFloat(float64(d.Nanoseconds())/1000, 'f', 1, 64) + " µs"
}

func list(parameters map[string]any) string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(parameters)) {
		all = append(all, fmt.Sprintf("%s=%v", name, parameters[name]))
	}
	return strings.Join(all, " ")
}

func value(v any) string {
	switch v := v.(type) {
	case int:
		return count(v)
	case int64:
		return count(v)
	case eventstore.Position:
		return count(v)
	case float64:
		return rate(v)
	}
	return fmt.Sprint(v)
}
