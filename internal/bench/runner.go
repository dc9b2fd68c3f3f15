package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

type options struct {
	repeat           int
	duration, warmup time.Duration
	preload          int
	postgres         string
	deed             string
	quick            bool
	dir              string
}

// A runner runs specs, each run in processes of its own on a database of its
// own.
type runner struct {
	options
	log    io.Writer
	self   string // this program
	work   string // folder for SQLite files and what is built
	server *server
	nats   *natsServers // those that the last run needed

	deedProblem error             // why there is no deed to run
	filled      map[string]string // filled logs: name -> database
	fillProblem map[string]error
	broken      map[*spec]error // what failed once is not tried again
}

// A sample is one run.
type sample struct {
	Spec   string  `json:"spec"`
	Turn   int     `json:"turn"`
	Result *Result `json:"result,omitempty"`
	Error  string  `json:"error,omitempty"`
}

// measure runs everything that the rows need, and reports.
func measure(ctx context.Context, o options, chosen []row, log io.Writer) (_ *report, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(o.dir, "deed-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for databases: %w", err)
	}
	defer os.RemoveAll(work)
	r := &runner{
		options: o, log: log, self: self, work: work,
		filled: map[string]string{}, fillProblem: map[string]error{}, broken: map[*spec]error{},
	}
	if r.deed, r.deedProblem = r.findDeed(ctx); r.deedProblem != nil {
		fmt.Fprintln(log, "deed's side is not measured:", r.deedProblem)
	}
	if needs(chosen, func(s *spec) bool { return s.store == "postgres" }) {
		if o.postgres != "" {
			r.server, err = useServer(ctx, o.postgres)
		} else {
			fmt.Fprintln(log, "starting PostgreSQL")
			r.server, err = startServer(ctx, o.dir, "2GB")
		}
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, r.dropFilled(), r.server.stop()) }()
	}
	defer func() { err = errors.Join(err, r.nats.stop()) }()
	c, err := observe(ctx, o, work, r.server)
	if err != nil {
		return nil, err
	}
	if needs(chosen, func(s *spec) bool { return natsNodes[s.store] > 0 }) {
		c.NATS = natsConditions()
	}
	rep := &report{Conditions: c, rows: chosen}
	made := groups(chosen)
	for i, g := range made {
		for turn := range o.repeat {
			for _, s := range g.specs {
				fmt.Fprintf(log, "[%d/%d, turn %d/%d] %s: ", i+1, len(made), turn+1, o.repeat, s.name)
				result, err := r.run(ctx, s)
				if ctx.Err() != nil {
					fmt.Fprintln(log, "stopped")
					rep.evaluate()
					return rep, fmt.Errorf("stopped before the end: %w", ctx.Err())
				}
				sample := sample{Spec: s.name, Turn: turn + 1, Result: result}
				if err != nil {
					sample.Error = err.Error()
					fmt.Fprintln(log, err)
				} else {
					fmt.Fprintf(log, "%s/s, p50 %s\n", short(result.PerSecond), duration(result.P50))
				}
				rep.Runs = append(rep.Runs, sample)
			}
		}
	}
	rep.evaluate()
	return rep, nil
}

// needs reports whether any of what the rows run does.
func needs(chosen []row, does func(*spec) bool) bool {
	return slices.ContainsFunc(chosen, func(row row) bool { return slices.ContainsFunc(row.specs(), does) })
}

// findDeed returns the deed program, which it builds from this checkout unless
// it was named.
func (r *runner) findDeed(ctx context.Context) (string, error) {
	if r.deed != "" {
		name, err := exec.LookPath(r.deed)
		if err != nil {
			return "", fmt.Errorf("--deed %q: %w", r.deed, err)
		}
		return filepath.Abs(name)
	}
	text, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find this checkout: go env GOMOD: %w", err)
	}
	root := filepath.Join(filepath.Dir(strings.TrimSpace(string(text))), "..", "..")
	if _, err := os.Stat(filepath.Join(root, "cmd", "deed")); err != nil {
		return "", errors.New("there is no cmd/deed two folders above: run bench from internal/bench of a checkout, or name the program with --deed")
	}
	fmt.Fprintln(r.log, "building deed")
	name := filepath.Join(r.work, "deed")
	build := exec.CommandContext(ctx, "go", "build", "-o", name, "./cmd/deed")
	build.Dir = root
	if text, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build cmd/deed: %w: %s", err, lastLine(string(text)))
	}
	return name, nil
}

// run does one run of a spec, on a fresh database or a filled one.
func (r *runner) run(ctx context.Context, s *spec) (_ *Result, err error) {
	if err := r.broken[s]; err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.broken[s] = err
		}
	}()
	if s.workload != "" && r.deedProblem != nil {
		return nil, r.deedProblem
	}
	dsn, done, err := r.database(ctx, s)
	if err != nil {
		return nil, err
	}
	result, err := r.processes(ctx, s, dsn)
	return result, errors.Join(err, done())
}

// database makes what a spec runs on, and returns a function that removes it.
func (r *runner) database(ctx context.Context, s *spec) (dsn string, done func() error, err error) {
	nothing := func() error { return nil }
	switch s.store {
	case "memory":
		return "", nothing, nil
	case "sqlite":
		dir, err := os.MkdirTemp(r.work, "sqlite-")
		if err != nil {
			return "", nil, err
		}
		return filepath.Join(dir, "bench.db"), func() error { return os.RemoveAll(dir) }, nil
	}
	if nodes := natsNodes[s.store]; nodes > 0 {
		return r.natsLog(ctx, s, nodes)
	}
	template := ""
	if s.full != "" {
		if template, err = r.fill(ctx, s.full); err != nil {
			return "", nil, err
		}
		if !s.writes {
			u := *r.server.url
			u.Path = "/" + template
			return u.String(), nothing, r.server.checkpoint(ctx)
		}
	}
	dsn, name, err := r.server.database(ctx, template)
	if err != nil {
		return "", nil, err
	}
	// Also when interrupted: the server may go on after us.
	done = func() error { return r.server.drop(context.WithoutCancel(ctx), name) }
	if err := r.server.checkpoint(ctx); err != nil {
		return "", nil, errors.Join(err, done())
	}
	return dsn, done, nil
}

// natsNodes are the stores on NATS, and on how many servers each is.
var natsNodes = map[string]int{"nats": 1, "nats-r3": 3}

// natsLog is database for NATS. Servers of another kind are stopped first: even
// idle they would take part in what is measured.
func (r *runner) natsLog(ctx context.Context, s *spec, nodes int) (dsn string, done func() error, err error) {
	if r.nats != nil && r.nats.nodes != nodes {
		err := r.nats.stop()
		if r.nats = nil; err != nil {
			return "", nil, err
		}
	}
	if r.nats == nil {
		if r.nats, err = startNATS(r.work, nodes); err != nil {
			return "", nil, err
		}
	}
	if s.full == "" {
		dsn, name := r.nats.log()
		return dsn, func() error { return r.nats.drop(name) }, nil
	}
	if r.nats.filled == "" {
		dsn, name := r.nats.log()
		if err := r.store(ctx, dsn, s.full); err != nil {
			return "", nil, errors.Join(err, r.nats.drop(name))
		}
		r.nats.filled = name
	}
	return r.nats.dsn(r.nats.filled), func() error { return nil }, nil
}

// fill returns the database of a filled log, which deed makes the first time.
func (r *runner) fill(ctx context.Context, which string) (string, error) {
	if name, ok := r.filled[which]; ok {
		return name, nil
	}
	if err := r.fillProblem[which]; err != nil {
		return "", err
	}
	name, err := r.makeFilled(ctx, which)
	if err != nil {
		r.fillProblem[which] = fmt.Errorf("store %d events first: %w", r.preload, err)
		return "", r.fillProblem[which]
	}
	r.filled[which] = name
	return name, nil
}

func (r *runner) makeFilled(ctx context.Context, which string) (string, error) {
	dsn, name, err := r.server.database(ctx, "")
	if err != nil {
		return "", err
	}
	if err := r.store(ctx, dsn, which); err != nil {
		return "", errors.Join(err, r.server.drop(context.WithoutCancel(ctx), name))
	}
	if err := r.server.vacuum(ctx, dsn); err != nil {
		return "", errors.Join(err, r.server.drop(context.WithoutCancel(ctx), name))
	}
	return name, nil
}

// store fills a log with events.
func (r *runner) store(ctx context.Context, dsn, which string) error {
	if r.deedProblem != nil {
		return r.deedProblem
	}
	fmt.Fprintf(r.log, "storing %d events: ", r.preload)
	how := fills[which]
	args := append([]string{"bench", how[0], "--store", dsn}, how[1:]...)
	args = append(args, "--preload", strconv.Itoa(r.preload), "--duration", "100ms", "--warmup", "0s", "--json")
	_, err := r.process(ctx, r.deed, args)
	return err
}

func (r *runner) dropFilled() error {
	if r.server.process != nil {
		return nil // they go with the server
	}
	var problems []error
	for _, name := range r.filled {
		problems = append(problems, r.server.drop(context.Background(), name))
	}
	return errors.Join(problems...)
}

// processes runs the processes of one run and adds up what they did.
func (r *runner) processes(ctx context.Context, s *spec, dsn string) (*Result, error) {
	program, args := r.self, []string{"case", s.bench}
	if s.workload != "" {
		program, args = r.deed, []string{"bench", s.workload}
		if s.store == "sqlite" {
			dsn = "sqlite:" + dsn
		}
		if s.full != "" {
			// They are there already; this says that they are to be read.
			args = append(args, "--preload", strconv.Itoa(r.preload))
		}
	}
	if dsn != "" {
		args = append(args, "--store", dsn)
	}
	args = append(args, s.args...)
	args = append(args, "--duration", r.duration.String(), "--warmup", r.warmup.String(), "--json")
	n := max(1, s.processes)
	if n > 1 {
		// So that none of them has to make the schema, which is not what is measured.
		first := []string{"bench", "append", "--store", dsn, "--writers", "1", "--duration", "10ms", "--warmup", "0s", "--json"}
		if _, err := r.process(ctx, program, first); err != nil {
			return nil, err
		}
	}
	results, errs := make([]*Result, n), make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { results[i], errs[i] = r.process(ctx, program, args) })
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	for _, result := range results {
		if result.Operations == 0 {
			return nil, fmt.Errorf("%s %s: nothing was done in %v s", args[0], args[1], result.Seconds)
		}
	}
	sum := *results[0]
	for _, other := range results[1:] {
		sum.Operations += other.Operations
		sum.PerSecond += other.PerSecond
		sum.Conflicts += other.Conflicts
		sum.Errors += other.Errors
		sum.Problems = append(sum.Problems, other.Problems...)
		// The slowest process speaks for the latency of all.
		sum.P50, sum.P95, sum.P99 = max(sum.P50, other.P50), max(sum.P95, other.P95), max(sum.P99, other.P99)
	}
	return &sum, nil
}

// process runs a program that prints a result as JSON.
func (r *runner) process(ctx context.Context, program string, args []string) (*Result, error) {
	const patience = 10 * time.Minute
	ctx, cancel := context.WithTimeout(ctx, r.duration+r.warmup+patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	name := strings.Join(args[:2], " ")
	failed := cmd.Run()
	var result Result
	err := json.Unmarshal(out.Bytes(), &result)
	switch {
	case failed != nil && (err != nil || result.Errors == 0):
		return nil, fmt.Errorf("%s: %w: %s", name, failed, lastLine(problems.String()))
	case err != nil:
		return nil, fmt.Errorf("%s: its output is no result: %w", name, err)
	}
	// A result with errors is shown, with its errors.
	return &result, nil
}
