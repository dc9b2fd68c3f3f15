// Fines replays the event log of a traffic police on deed: every fine is an
// aggregate, every row of the log a command, the sixty days until a penalty
// may be added a saga with a durable timer, and the report is read from
// projections. Time is the log's own: the clock advances from date to date.
//
// Without arguments it replays a small real sample on a fresh file:
//
//	go run ./examples/fines
//	go run ./examples/fines -input fines.csv.gz -db fines.db -chart fines.svg
//
// The same program runs on other engines, with the same report: on PostgreSQL,
// on NATS JetStream (-store nats: runs a server in this process), on
// EventStoreDB. The last two keep events only; -db then says where the read
// models are kept.
//
//	go run ./examples/fines -store postgres://user:secret@localhost/shop
//	go run ./examples/fines -store nats:
//	go run ./examples/fines -store esdb://localhost:2113?tls=false -db views.db
//
// Interrupted or killed and started again with the same -store or -db, it
// continues and ends with the same report.
//
// The monthly figures can be rebuilt while a replay runs. Interrupt one, and go on
// with their version 2, which counts appeals too: it is built beside version 1,
// compared with it, and read from then on. Going back is one call.
//
//	go run ./examples/fines -input fines.csv.gz -db fines.db
//	go run ./examples/fines -input fines.csv.gz -db fines.db -months 2
//	go run ./cmd/deed projections activate months --version 1 --store sqlite:fines.db
//
// Where to look: fine.go (aggregate and commands), penalty.go (saga),
// views.go (projections), versions.go (one that is rebuilt), query.go (report), replay.go (how rows are executed
// and how a run is taken up again).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"syscall"
	"time"

	"github.com/mattn/go-isatty"

	"github.com/deed-go/deed/examples/internal/engine"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	os.Exit(program(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

type options struct {
	input, store, db, chart, profile string
	json                             bool
	months                           int
}

// program is main with everything it touches handed in; it returns the exit
// code.
func program(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var o options
	flags := flag.NewFlagSet("fines", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.input, "input", "", "the log to replay: a `FILE` .csv or .csv.gz (default: the sample that comes with the program)")
	flags.StringVar(&o.store, "store", "", "the `ENGINE` to run on, instead of a file: "+engine.Usage)
	flags.StringVar(&o.db, "db", "", "the database `FILE`; an interrupted replay is continued (default: a temporary file); with NATS and EventStoreDB, where read models are kept (default: in memory)")
	flags.BoolVar(&o.json, "json", false, "print the report as JSON")
	flags.StringVar(&o.chart, "chart", "", "draw issued, paid and outstanding by month as an SVG `FILE`")
	flags.IntVar(&o.months, "months", 1, "the `VERSION` of the monthly figures, 1 or 2: version 2, which counts appeals, is built beside version 1 and read once it has caught up")
	flags.StringVar(&o.profile, "cpuprofile", "", "write a CPU profile to `FILE`")
	flags.Usage = func() {
		fmt.Fprint(stderr, "fines replays a log of traffic fines and prints what became of them.\n\n")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "fines: unexpected argument %q: see -help\n", flags.Arg(0))
		return 2
	}
	if o.months != 1 && o.months != 2 {
		fmt.Fprintf(stderr, "fines: -months %d: the monthly figures have versions 1 and 2\n", o.months)
		return 2
	}
	if o.store != "" && o.db != "" && !strings.HasPrefix(o.store, "nats:") && !strings.HasPrefix(o.store, "esdb") {
		fmt.Fprintf(stderr, "fines: -store %q keeps everything: leave out -db\n", o.store)
		return 2
	}
	err := run(ctx, o, stdout, stderr)
	if errors.Is(err, errInterrupted) {
		return 130
	}
	if err != nil {
		fmt.Fprintf(stderr, "fines: %v\n", err)
		return 1
	}
	return 0
}

func run(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	began := time.Now()
	if o.profile != "" {
		file, err := os.Create(o.profile)
		if err != nil {
			return err
		}
		defer file.Close()
		if err := pprof.StartCPUProfile(file); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	log, err := openInput(o.input)
	if err != nil {
		return err
	}
	defer log.Close()

	working := context.WithoutCancel(ctx) // ctx asks to stop reading, not to drop what is in hand
	name, again := o.store, "-store "+o.store
	if o.store != "" && o.db != "" {
		again += " -db " + o.db
	}
	if o.store == "" {
		db := o.db
		if db == "" {
			var dir string
			if dir, err = os.MkdirTemp("", "fines-"); err != nil {
				return err
			}
			db = filepath.Join(dir, "fines.db")
			defer func() {
				if !errors.Is(err, errInterrupted) {
					err = errors.Join(err, os.RemoveAll(dir))
				}
			}()
		}
		name, again = "sqlite:"+db, "-db "+db
	}
	on, err := engine.Open(working, name, o.db)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, on.Close()) }()
	by := months
	if o.months == 2 {
		by = monthsToo
		on.Parts = append(on.Parts, monthsToo)
	}
	app, err := start(working, on.Store, on.Parts...)
	if err != nil {
		return err
	}
	defer func() {
		// What is in flight gets some time; the rest is done after the next start.
		grace, cancel := context.WithTimeout(working, 10*time.Second)
		defer cancel()
		err = errors.Join(err, app.Stop(grace))
	}()

	screen := newScreen(stderr, began)
	end, err := replay(ctx, app, inputTitle(o.input), log, screen.show)
	screen.clear()
	if errors.Is(err, errInterrupted) {
		if o.input != "" {
			again += " -input " + o.input
		}
		fmt.Fprintf(stderr, "interrupted after %s; continue with: %s\n", screen.last, again)
	}
	if err != nil {
		return err
	}

	if o.months == 2 {
		if err := showVersions(working, app, stderr); err != nil {
			return err
		}
	}
	if o.chart != "" {
		if err := draw(working, app, by, end, o.chart); err != nil {
			return err
		}
	}
	result, err := report(working, app, by, end)
	if err != nil {
		return err
	}
	result.ElapsedSeconds = time.Since(began).Seconds()
	result.Store = on.Name
	if o.json {
		return result.WriteJSON(stdout)
	}
	return result.WriteText(stdout)
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	return ok && isatty.IsTerminal(file.Fd())
}
