// Bench measures deed against what people would write or use instead: plain
// SQL through pgx, and other Go libraries. It runs deed's own benchmarks (the
// deed command) and its own cases in turn, several times, and prints medians,
// ratios and the conditions they were measured under.
//
//	go run .                              all rows, five times
//	go run . --rows 1,2,5 --duration 2s   some rows
//	go run . --quick                      whether everything works
//	go run . list                         the rows and the cases
//	go run . case plain-insert --store postgres://... --json
//
// It is a module of its own so that nobody who uses deed builds the peers, and
// it imports nothing of deed: deed is measured from outside, as a program.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// run is main without the process around it.
func run(ctx context.Context, args []string, out, log io.Writer) error {
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		switch args[0] {
		case "case":
			return runCase(ctx, args[1:], out, log)
		case "list":
			return list(out)
		default:
			return fmt.Errorf("unknown command %q: use list, case NAME, or flags alone to measure", args[0])
		}
	}
	var o options
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(log)
	rows := flags.String("rows", "", "rows to measure, such as 1,2,5; all when empty")
	flags.IntVar(&o.repeat, "repeat", 5, "how often each case runs")
	flags.DurationVar(&o.duration, "duration", 5*time.Second, "how long each run measures")
	flags.DurationVar(&o.warmup, "warmup", time.Second, "how long each run goes on before it measures")
	flags.IntVar(&o.preload, "preload", 1_000_000, "events stored before the cases that need a full log")
	flags.StringVar(&o.postgres, "postgres", "", "URL of a server to use, as a role that may create databases and checkpoint; a throw-away one is started when empty")
	flags.StringVar(&o.deed, "deed", "", "the deed program; built from this checkout when empty")
	flags.StringVar(&o.dir, "dir", os.TempDir(), "folder for databases; it must be on a disk, not in memory")
	flags.BoolVar(&o.quick, "quick", false, "one short run of everything, with a tenth of the stored events: shows that it works, not how fast it is")
	jsonFile := flags.String("json", "", "file that gets every single run as JSON")
	markdown := flags.Bool("markdown", false, "print Markdown")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q: flags come before anything else", flags.Arg(0))
	}
	if o.quick {
		given := map[string]bool{}
		flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
		if !given["repeat"] {
			o.repeat = 1
		}
		if !given["duration"] {
			o.duration = time.Second
		}
		if !given["warmup"] {
			o.warmup = 200 * time.Millisecond
		}
		if !given["preload"] {
			o.preload = 100_000
		}
	}
	if o.repeat < 1 {
		return fmt.Errorf("--repeat %d: measure at least once", o.repeat)
	}
	if o.duration <= 0 || o.warmup < 0 {
		return fmt.Errorf("--duration %v --warmup %v: the first must be more than nothing, the second not less", o.duration, o.warmup)
	}
	chosen, err := choose(*rows)
	if err != nil {
		return err
	}
	rep, err := measure(ctx, o, chosen, log)
	if rep != nil {
		// What was measured before an error is worth keeping.
		if *jsonFile != "" {
			err = errors.Join(err, writeJSON(*jsonFile, rep))
		}
		err = errors.Join(err, rep.print(out, *markdown))
	}
	return err
}

func writeJSON(name string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write the runs as JSON: %w", err)
	}
	if err := os.WriteFile(name, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the runs as JSON: %w", err)
	}
	return nil
}

// runCase is what each subprocess does: one case, once.
func runCase(ctx context.Context, args []string, out, log io.Writer) error {
	if len(args) == 0 {
		return fmt.Errorf("case: name one of %s", strings.Join(caseNames(), ", "))
	}
	p := defaults()
	flags := flag.NewFlagSet("case "+args[0], flag.ContinueOnError)
	flags.SetOutput(log)
	p.register(flags)
	asJSON := flags.Bool("json", false, "print JSON")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("case %s: unexpected argument %q", args[0], flags.Arg(0))
	}
	result, err := runNamed(ctx, args[0], p)
	if err != nil {
		return err
	}
	if *asJSON {
		return json.NewEncoder(out).Encode(result)
	}
	fmt.Fprintf(out, "%s: %s/s, p50 %s ms, p95 %s ms, p99 %s ms, %d errors\n", result.Name, short(result.PerSecond),
		short(result.P50), short(result.P95), short(result.P99), result.Errors)
	if result.Notes != "" {
		fmt.Fprintln(out, result.Notes)
	}
	return nil
}
