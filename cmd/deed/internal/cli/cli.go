// Package cli is the deed command without the process around it. It may import
// everything of deed but the backends, which package stores knows.
//
// Each command is a struct: its fields are the flags, Validate refuses what makes
// no sense together, and Run does the work in an [Environment], so that tests run
// commands whole.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/deed-go/deed/cmd/deed/internal/stores"
	"github.com/deed-go/deed/cmd/deed/internal/workload"
	"github.com/deed-go/deed/eventstore"
)

// Environment is everything that a command touches.
type Environment struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Stores are the backends that a DSN can name.
	Stores stores.Table
	// Self returns the command that runs this program again.
	Self func(args ...string) (*exec.Cmd, error)
}

// The exit codes.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

// grammar is the whole command line.
type grammar struct {
	Bench       benchCommand       `cmd:"" help:"Measure what deed does on a database."`
	Migrate     migrateCommand     `cmd:"" help:"Bring the schema of a database up to date, or print it."`
	Streams     streamsCommand     `cmd:"" help:"List streams, the one written last first."`
	Events      eventsCommand      `cmd:"" help:"Read, filter and follow events."`
	Projections projectionsCommand `cmd:"" help:"Show how far projections have come, and what they have set aside."`
	Sagas       sagasCommand       `cmd:"" help:"List, show and steer the runs of sagas."`
	Subscriber  subscriberCommand  `cmd:"" hidden:"" help:"The other process of bench live."`
}

const description = `The operator's tool of deed, an event store with projections and sagas.

Exit codes: 0 all went well, 1 something failed, 2 the command line is wrong.`

// Main runs the command that the arguments name and returns the exit code.
// Ending ctx interrupts it.
func Main(ctx context.Context, args []string, e Environment) int {
	err := run(ctx, args, e)
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errReported):
		return exitFailure
	}
	text := stores.RedactText(err.Error())
	if errors.Is(err, context.Canceled) && ctx.Err() != nil && !strings.HasPrefix(text, "interrupted") {
		text = "interrupted: " + text
	}
	fmt.Fprintln(e.Stderr, "deed:", strings.ReplaceAll(text, "\n", "\n  "))
	if wrong, ok := errors.AsType[*usageError](err); ok {
		fmt.Fprintf(e.Stderr, "see: %s --help\n", wrong.command)
		return exitUsage
	}
	return exitFailure
}

// errReported is a failure that the command has already told.
var errReported = errors.New("reported")

// usageError is a mistake in the command line.
type usageError struct {
	command string
	err     error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// helped is what kong wants to exit with, after it has printed the help.
type helped struct{ code int }

func run(ctx context.Context, args []string, e Environment) (err error) {
	if len(args) == 0 {
		args = []string{"--help"}
	}
	defer func() {
		switch r := recover().(type) {
		case nil:
		case helped:
			if r.code != exitOK {
				err = errReported
			}
		default:
			panic(r)
		}
	}()
	var commands grammar
	parser, err := kong.New(&commands,
		kong.Name("deed"), kong.Description(description),
		kong.Writers(e.Stdout, e.Stderr), kong.Exit(func(code int) { panic(helped{code}) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100}),
		kong.Vars{"stores": strings.Join(e.Stores.Examples(), ", ")},
	)
	if err != nil {
		return err
	}
	parsed, err := parser.Parse(args)
	if err != nil {
		name := "deed"
		if wrong, ok := errors.AsType[*kong.ParseError](err); ok {
			name = commandOf(wrong.Context)
		}
		return &usageError{name, errors.New(strings.TrimPrefix(err.Error(), strings.TrimPrefix(name, "deed ")+": "))}
	}
	parsed.BindTo(ctx, (*context.Context)(nil))
	err = parsed.Run(&e)
	if wrong, ok := errors.AsType[*usageError](err); ok {
		wrong.command = commandOf(parsed)
	}
	return err
}

// commandOf names the command, for example "deed bench append".
func commandOf(parsed *kong.Context) string {
	if node := parsed.Selected(); node != nil {
		return node.FullPath()
	}
	return "deed"
}

// storeFlag is the store that a command is about.
type storeFlag struct {
	Store string `env:"DEED_STORE" placeholder:"DSN" help:"The store: ${stores}."`
}

// stateFlag is where read models are kept, for stores that cannot keep them.
type stateFlag struct {
	State string `env:"DEED_STATE" placeholder:"DSN" help:"Where read models, checkpoints and due times are kept, if the store cannot keep them: sqlite:FILE, postgres://USER:PASSWORD@HOST/DATABASE or memory:."`
}

// find parses the DSN.
func (f stateFlag) find(e *Environment) (stores.DSN, error) {
	dsn, err := e.Stores.Parse(f.State)
	if err == nil && dsn.Stateless {
		err = fmt.Errorf("%w: %s keeps events only", eventstore.ErrInvalid, dsn)
	}
	if err != nil {
		return dsn, &usageError{err: fmt.Errorf("--state: %w", err)}
	}
	return dsn, nil
}

// find parses the DSN.
func (f storeFlag) find(e *Environment) (stores.DSN, error) {
	if f.Store == "" {
		return stores.DSN{}, &usageError{err: fmt.Errorf("--store is missing: name a database: %s", strings.Join(e.Stores.Examples(), ", "))}
	}
	dsn, err := e.Stores.Parse(f.Store)
	if err != nil {
		return dsn, &usageError{err: fmt.Errorf("--store: %w", err)}
	}
	return dsn, nil
}

// open opens a store that exists, and returns what closes it.
func (f storeFlag) open(ctx context.Context, e *Environment) (stores.DSN, eventstore.Store, func(*error), error) {
	dsn, err := f.find(e)
	if err != nil {
		return dsn, nil, nil, err
	}
	source, err := dsn.Opener(ctx, stores.Existing)
	if err != nil {
		return dsn, nil, nil, err
	}
	store, err := source.Open(ctx)
	if err != nil {
		return dsn, nil, nil, err
	}
	return dsn, store, func(failed *error) {
		if closer, ok := store.(io.Closer); ok {
			*failed = errors.Join(*failed, closer.Close())
		}
	}, nil
}

// subscriberCommand is what bench live --other-process starts.
type subscriberCommand struct{}

// Run follows a stream until the standard input ends. It does not mind being
// interrupted: a terminal interrupts both processes, and this one ends when the
// other one has what it wants.
func (c *subscriberCommand) Run(ctx context.Context, e *Environment) error {
	return workload.Listen(context.WithoutCancel(ctx), func(ctx context.Context, address string) (eventstore.Opener, error) {
		dsn, err := e.Stores.Parse(address)
		if err != nil {
			return nil, err
		}
		return dsn.Opener(ctx, stores.Existing)
	}, e.Stdin, e.Stdout)
}
