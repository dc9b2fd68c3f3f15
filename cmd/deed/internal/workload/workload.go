package workload

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"strings"
	"time"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Workload is a kind of work, with its parameters. The fields' tags are for the
// command line.
type Workload interface {
	// Validate refuses parameters that make no sense.
	Validate() error

	name() string
	timing() Timing
	parameters() map[string]any
	// run does the work and says what it found.
	run(ctx context.Context, b *bench) (*measured, error)
}

// Target is what a workload runs on.
type Target struct {
	// Opener opens the store. It is opened once, unless a workload says otherwise.
	Opener eventstore.Opener
	// State opens what keeps read models and what belongs to sagas where the store
	// cannot. Without it such a store runs no workload that needs it.
	State eventstore.Opener
	// Name is what results call the store: no secrets.
	Name string
	// Address is what another process opens the store by; it may hold secrets.
	Address string
	// Shared says that several processes may have the store open.
	Shared bool
	// Gaps says that positions do not count events.
	Gaps bool
	// Durability says what an append to the store survives.
	Durability func(ctx context.Context, store eventstore.Store) (string, error)
	// Other returns the command of another process that calls [Listen] on the same
	// store with its standard input and output.
	Other func() (*exec.Cmd, error)
	// Progress, if set, hears several times a second how far the run has come, from
	// one goroutine at a time.
	Progress func(Progress)
}

// Progress is how far a run has come.
type Progress struct {
	// Phase is what it is doing, for people.
	Phase string
	// Done and Total are events while they are stored beforehand, and else the time
	// that has passed and the time there is.
	Done, Total int64
	// PerSecond is the rate of the operations measured so far; 0 when unknown.
	PerSecond float64
}

// Result is what a run has found. Its JSON is a contract: keys are added, never
// renamed.
type Result struct {
	Workload   string         `json:"workload"`
	Store      string         `json:"store"`
	Durability string         `json:"durability"`
	Parameters map[string]any `json:"parameters"`
	// Operations were done in the Seconds that were measured.
	Operations int64   `json:"operations"`
	Seconds    float64 `json:"seconds"`
	PerSecond  float64 `json:"per_second"`
	P50        float64 `json:"p50_ms"`
	P95        float64 `json:"p95_ms"`
	P99        float64 `json:"p99_ms"`
	Conflicts  int64   `json:"conflicts"`
	// Errors are those of the whole run, warm-up included.
	Errors int64 `json:"errors"`
	// Problems are the first few errors.
	Problems []string `json:"problems,omitempty"`
	// Interrupted says that the run ended before its time.
	Interrupted bool `json:"interrupted,omitempty"`
	// Details are the workload's own: "unit" is what one operation is, "latency_of"
	// what the percentiles are of.
	Details map[string]any `json:"details"`
}

// Timing is what every workload has.
type Timing struct {
	Duration time.Duration `default:"10s" help:"How long to measure."`
	Warmup   time.Duration `default:"1s" help:"How long to work before measuring."`
	Preload  int           `default:"0" help:"Store events first if the store has fewer than this: in streams of 100, interleaved."`
	InTurn   int           `default:"10" help:"How many events of one stream follow one another among those; a thousand streams take turns."`
	Payload  int           `default:"256" help:"Bytes of an event's data, which is JSON."`
}

// maxPayload leaves room for metadata and tags in an event of 1 MiB.
const maxPayload = 1<<20 - 16<<10

func (t Timing) validate() error {
	var mistakes []error
	if t.Duration <= 0 {
		mistakes = append(mistakes, fmt.Errorf("--duration %s: it must be more than nothing", t.Duration))
	}
	if t.Warmup < 0 {
		mistakes = append(mistakes, fmt.Errorf("--warmup %s: it must not be negative; 0s is none", t.Warmup))
	}
	if t.InTurn < 0 {
		mistakes = append(mistakes, fmt.Errorf("--in-turn %d: it must not be negative; 0 is the default", t.InTurn))
	}
	if t.Preload < 0 {
		mistakes = append(mistakes, fmt.Errorf("--preload %d: it must not be negative", t.Preload))
	}
	if smallest := len(newData(0)); t.Payload < smallest || t.Payload > maxPayload {
		mistakes = append(mistakes, fmt.Errorf("--payload %d: use %d to %d bytes", t.Payload, smallest, maxPayload))
	}
	return errors.Join(mistakes...)
}

func (t Timing) timing() Timing { return t }

// with adds the parameters that every workload has.
func (t Timing) with(own map[string]any) map[string]any {
	own["duration_seconds"], own["warmup_seconds"] = t.Duration.Seconds(), t.Warmup.Seconds()
	own["preload"], own["payload"] = t.Preload, t.Payload
	return own
}

// between refuses a number out of its range.
func between(flag string, n, least, most int) error {
	if n < least || n > most {
		return fmt.Errorf("--%s %d: use %d to %d", flag, n, least, most)
	}
	return nil
}

const maxWorkers = 65_536

// Run runs the workload and measures it. Ending ctx ends the run early, and
// what was measured by then is returned. The result is also returned beside an
// error that came after the measurement.
func Run(ctx context.Context, w Workload, target Target) (_ *Result, err error) {
	if err := w.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", eventstore.ErrInvalid, err)
	}
	store, err := target.Opener.Open(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closeStore(store)) }()
	durability := ""
	if target.Durability != nil {
		if durability, err = target.Durability(ctx, store); err != nil {
			return nil, err
		}
	}
	b := &bench{Target: target, store: store, id: newID(), timing: w.timing()}
	if _, keeps := eventstore.Find[projection.State](store); !keeps && target.State != nil {
		kept, err := target.State.Open(ctx)
		if err != nil {
			return nil, fmt.Errorf("open what keeps the read models: %w", err)
		}
		defer func() { err = errors.Join(err, closeStore(kept)) }()
		state, ok := eventstore.Find[projection.State](kept)
		if !ok {
			return nil, fmt.Errorf("%T keeps no read models: name an SQLite file, a PostgreSQL database or memory: %w", kept, errors.ErrUnsupported)
		}
		b.state = state
	}
	m, err := w.run(ctx, b)
	if err != nil {
		return nil, err
	}
	r := &Result{
		Workload: w.name(), Store: target.Name, Durability: durability, Parameters: w.parameters(),
		Operations: m.operations, Seconds: m.seconds, Conflicts: m.conflicts, Errors: m.errors,
		P50: milliseconds(m.latencies.quantile(0.50)), P95: milliseconds(m.latencies.quantile(0.95)), P99: milliseconds(m.latencies.quantile(0.99)),
		Problems: m.problems, Interrupted: m.interrupted, Details: m.details,
	}
	if m.seconds > 0 {
		r.PerSecond = float64(m.operations) / m.seconds
	}
	return r, nil
}

// bench is one run.
type bench struct {
	Target
	store  eventstore.Store
	state  projection.State // nil: the store keeps it
	id     string           // no other run has it
	timing Timing
}

// newID returns what makes the names of a run unlike those of any other.
func newID() string { return strings.ToLower(rand.Text()[:10]) }

// streams names n streams of this run.
func (b *bench) streams(category string, n int) []eventstore.Stream {
	all := make([]eventstore.Stream, n)
	for i := range all {
		all[i] = eventstore.Stream{Category: category, ID: fmt.Sprintf("%s-%d", b.id, i)}
	}
	return all
}

// start runs an application on the store. What its background work has to say
// comes back as errors of the workload.
func (b *bench) start(ctx context.Context, parts ...deed.Part) (*deed.App, error) {
	return deed.Start(ctx, eventstore.Opened(b.store), b.with(parts)...)
}

// with adds what every application of a run has.
func (b *bench) with(parts []deed.Part) []deed.Part {
	parts = append(parts, deed.Logger(slog.New(slog.DiscardHandler)))
	if b.state != nil {
		parts = append(parts, deed.State(b.state))
	}
	return parts
}

// prepare is start without the background work.
func (b *bench) prepare(ctx context.Context, parts ...deed.Part) (*deed.App, error) {
	return deed.New(ctx, eventstore.Opened(b.store), b.with(parts)...)
}

// stop stops an application, also after ctx has ended.
func (b *bench) stop(ctx context.Context, app *deed.App) error {
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	if err := app.Stop(stopping); err != nil {
		return fmt.Errorf("stop the application: %w", err)
	}
	return nil
}

func closeStore(store eventstore.Store) error {
	if closer, ok := store.(io.Closer); ok {
		return closer.Close()
	}
	return nil
}
