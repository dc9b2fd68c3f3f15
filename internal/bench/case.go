package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// Params are what a case can be told. They have the names, and the meaning,
// that they have for deed's own benchmarks.
type params struct {
	Store    string        `json:"-"`
	Writers  int           `json:"writers"`
	Conns    int           `json:"conns,omitempty"`
	Payload  int           `json:"payload"`
	Streams  int           `json:"streams,omitempty"`
	Events   int           `json:"events,omitempty"`
	Duration time.Duration `json:"-"`
	Warmup   time.Duration `json:"-"`
}

func defaults() params {
	return params{Writers: 64, Conns: 64, Payload: 256, Duration: 5 * time.Second, Warmup: time.Second}
}

func (p *params) register(flags *flag.FlagSet) {
	flags.StringVar(&p.Store, "store", p.Store, "PostgreSQL URL or path of an SQLite file")
	flags.IntVar(&p.Writers, "writers", p.Writers, "callers at once")
	flags.IntVar(&p.Conns, "conns", p.Conns, "connections to PostgreSQL")
	flags.IntVar(&p.Payload, "payload", p.Payload, "bytes of JSON in an event")
	flags.IntVar(&p.Streams, "streams", p.Streams, "streams written to at once; one a writer when 0")
	flags.IntVar(&p.Events, "events", p.Events, "events in a stream; without end when 0, unless the case says otherwise")
	flags.DurationVar(&p.Duration, "duration", p.Duration, "how long to measure")
	flags.DurationVar(&p.Warmup, "warmup", p.Warmup, "how long to go on before measuring")
}

func (p params) validate() error {
	for name, n := range map[string]int{"writers": p.Writers, "conns": p.Conns, "payload": p.Payload} {
		if n < 1 {
			return fmt.Errorf("--%s %d: use at least 1", name, n)
		}
	}
	if p.Streams < 0 || p.Events < 0 {
		return fmt.Errorf("--streams %d --events %d: must not be negative", p.Streams, p.Events)
	}
	return nil
}

// Result is what one run of a case found. Deed's own benchmarks print the same
// keys, but for name, peer and notes, and the last two beside them.
type Result struct {
	Name       string         `json:"name"`
	Peer       string         `json:"peer,omitempty"`
	Workload   string         `json:"workload"`
	Store      string         `json:"store"`
	Durability string         `json:"durability"`
	Parameters map[string]any `json:"parameters"`
	Operations int64          `json:"operations"`
	Seconds    float64        `json:"seconds"`
	PerSecond  float64        `json:"per_second"`
	P50        float64        `json:"p50_ms"`
	P95        float64        `json:"p95_ms"`
	P99        float64        `json:"p99_ms"`
	Conflicts  int64          `json:"conflicts"`
	Errors     int64          `json:"errors"`
	Notes      string         `json:"notes,omitempty"`

	Problems []string       `json:"problems,omitempty"` // the first few errors
	Details  map[string]any `json:"details,omitempty"`  // "unit" is what one operation is
}

// A benchCase is a baseline or a peer doing one kind of work.
type benchCase struct {
	peer       string // module whose version is shown; "" for plain SQL
	workload   string // the deed workload it stands beside
	store      string // "postgres", "sqlite" or "memory"
	table      bool   // needs a database with deed's own, filled table
	unit       string // what is counted
	guarantees string // what it promises less, or more, than deed
	open       func(ctx context.Context, p params) (*job, error)
}

// A job is an opened case.
type job struct {
	// op does one operation for one of the workers, which call it in a loop, and
	// returns how many units that was.
	op func(ctx context.Context, worker int) (int, error)
	// finished, when set, says how many units are finished by now: for cases whose
	// work goes on after op returns. What op returns is then not counted.
	finished func() int64
	// verify looks whether all the work is really there; done is the sum of what
	// op returned, before and after the measured time too.
	verify func(ctx context.Context, done int64) error
	close  func() error

	durability string
	notes      string
}

var cases = map[string]benchCase{}

// register is called by the files that hold the cases.
func register(name string, c benchCase) { cases[name] = c }

func caseNames() []string { return slices.Sorted(maps.Keys(cases)) }

// grace is how long a worker may take to finish its last operation.
const grace = time.Minute

func runNamed(ctx context.Context, name string, p params) (_ *Result, err error) {
	c, ok := cases[name]
	if !ok {
		return nil, fmt.Errorf("unknown case %q: use one of %s", name, strings.Join(caseNames(), ", "))
	}
	if err := p.validate(); err != nil {
		return nil, fmt.Errorf("case %s: %w", name, err)
	}
	if p.Store == "" && c.store != "memory" {
		return nil, fmt.Errorf("case %s: say with --store which %s database to use", name, c.store)
	}
	j, err := c.open(ctx, p)
	if err != nil {
		return nil, fmt.Errorf("case %s: %w", name, err)
	}
	if j.close != nil {
		defer func() {
			if e := j.close(); e != nil {
				err = errors.Join(err, fmt.Errorf("case %s: close: %w", name, e))
			}
		}()
	}
	result, done, err := drive(ctx, j, p)
	if err != nil {
		return nil, fmt.Errorf("case %s: %w", name, err)
	}
	if j.verify != nil {
		if err := j.verify(ctx, done); err != nil {
			return nil, fmt.Errorf("case %s: the work was not done: %w", name, err)
		}
	}
	result.Name, result.Workload, result.Store = name, c.workload, c.store
	result.Peer = c.peer
	if c.peer != "" {
		result.Peer += " " + moduleVersion(c.peer)
	}
	result.Parameters, err = asMap(p)
	return result, err
}

func asMap(p params) (map[string]any, error) {
	text, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	m := map[string]any{}
	return m, json.Unmarshal(text, &m)
}

// drive runs the workers and measures them. It returns how many units were
// done in all, also before and after the time that was measured.
func drive(ctx context.Context, j *job, p params) (*Result, int64, error) {
	const (
		warming int32 = iota
		measuring
		ended
	)
	type tally struct {
		latency     histogram
		units, done int64
		errors      int64
		firstError  error
	}
	var (
		phase   atomic.Int32
		workers sync.WaitGroup
		tallies = make([]tally, p.Writers)
	)
	for w := range p.Writers {
		workers.Go(func() {
			t := &tallies[w]
			for phase.Load() != ended && ctx.Err() == nil {
				began := time.Now()
				n, err := j.op(ctx, w)
				took := time.Since(began)
				if err != nil {
					t.errors++
					if t.firstError == nil {
						t.firstError = err
					}
					if t.errors >= 10 {
						return // it will not get better
					}
					continue
				}
				t.done += int64(n)
				if phase.Load() == measuring {
					t.units += int64(n)
					t.latency.add(took)
				}
			}
		})
	}
	stopped := make(chan struct{})
	go func() { workers.Wait(); close(stopped) }()

	sleep(ctx, stopped, p.Warmup)
	var finished int64
	if j.finished != nil {
		finished = -j.finished()
	}
	began := time.Now()
	phase.Store(measuring)
	sleep(ctx, stopped, p.Duration)
	phase.Store(ended)
	seconds := time.Since(began).Seconds()
	if j.finished != nil {
		finished += j.finished()
	}
	select {
	case <-stopped:
	case <-time.After(grace):
		return nil, 0, fmt.Errorf("operations still run %v after the end", grace)
	}
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}

	r := &Result{Seconds: seconds, Durability: j.durability, Notes: j.notes}
	var (
		all   histogram
		done  int64
		first error
	)
	for i := range tallies {
		t := &tallies[i]
		all.merge(&t.latency)
		r.Operations += t.units
		r.Errors += t.errors
		done += t.done
		if first == nil {
			first = t.firstError
		}
	}
	if j.finished != nil {
		r.Operations = finished
	}
	if first != nil {
		if done == 0 {
			return nil, 0, fmt.Errorf("no operation succeeded: %w", first)
		}
		r.Notes = strings.TrimPrefix(r.Notes+"; first error: "+first.Error(), "; ")
	}
	r.PerSecond = float64(r.Operations) / seconds
	r.P50, r.P95, r.P99 = ms(all.quantile(0.50)), ms(all.quantile(0.95)), ms(all.quantile(0.99))
	return r, done, nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// sleep waits for d, or until there is nothing to wait for.
func sleep(ctx context.Context, stopped <-chan struct{}, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-stopped:
	case <-ctx.Done():
	}
}

// moduleVersion returns the version of a module that this program was built
// with.
func moduleVersion(path string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "?"
	}
	for _, m := range info.Deps {
		if m.Path == path {
			return m.Version
		}
	}
	return "?"
}

// order is the event that every case stores: JSON of a given size.
type order struct {
	Order    string `json:"order"`
	Customer string `json:"customer"`
	Cents    int64  `json:"cents"`
	Note     string `json:"note"`
}

const orderType = "order.placed"

// newOrder returns an order that is size bytes of JSON, or the smallest there
// is when size is less than that.
func newOrder(size int) (order, []byte, error) {
	o := order{Order: "0199c0de-0000-7000-8000-000000000001", Customer: "customer-000042", Cents: 129_900}
	text, err := json.Marshal(o)
	if err != nil {
		return o, nil, err
	}
	o.Note = strings.Repeat("x", max(0, size-len(text)))
	text, err = json.Marshal(o)
	return o, text, err
}

// metadata is what accompanies each event: some 50 bytes.
const metadata = `{"actor":"customer-000042","correlation":"7f3a90"}`

// A cursor hands one worker the stream and version of its next event. Workers
// never share a stream, so no case has conflicts.
type cursor struct {
	streams []position
	next    int
	length  int
}

type position struct {
	stream  string
	version int64
}

// newCursors shares p.Streams streams among the workers. A stream that has
// p.Events events is replaced by a fresh one.
func newCursors(p params) []*cursor {
	cursors := make([]*cursor, p.Writers)
	each := max(1, p.Streams/p.Writers)
	for w := range cursors {
		c := &cursor{streams: make([]position, each), length: p.Events}
		for i := range c.streams {
			c.streams[i].stream = newStream()
		}
		cursors[w] = c
	}
	return cursors
}

// newStream names a stream, later ones after earlier ones.
func newStream() string { return "order-" + newID().String() }

// newID returns a version 7 UUID, as deed gives to its events.
func newID() uuid.UUID {
	id, err := uuid.NewV7()
	if err != nil {
		panic(errors.Join(errors.New("no random numbers"), err))
	}
	return id
}

// advance returns the place of the worker's next event.
func (c *cursor) advance() position {
	p := &c.streams[c.next]
	c.next = (c.next + 1) % len(c.streams)
	if c.length > 0 && p.version == int64(c.length) {
		*p = position{stream: newStream()}
	}
	p.version++
	return *p
}
