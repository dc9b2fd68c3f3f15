package workload

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// measured is what was found.
type measured struct {
	operations  int64
	seconds     float64
	latencies   histogram
	conflicts   int64
	errors      int64
	problems    []string
	interrupted bool
	details     map[string]any

	total  int64 // operations, before and after the measured time too
	window *window
}

// mostProblems is how many errors are told in full.
const mostProblems = 5

// problem counts an error.
func (m *measured) problem(err error) {
	m.errors++
	if text := err.Error(); len(m.problems) < mostProblems && !slices.Contains(m.problems, text) {
		m.problems = append(m.problems, text)
	}
}

const (
	// patience is how long operations that are under way at the end may take.
	patience = 30 * time.Second
	// reportEvery is how often the progress is told.
	reportEvery = 200 * time.Millisecond
	// afterError is what a worker waits after an error before it goes on.
	afterError = 100 * time.Millisecond
)

// window is the time of a run; instants are durations since its start.
type window struct {
	start time.Time
	from  time.Duration
	until atomic.Int64 // moves back when the run ends early
	over  chan struct{}
	once  sync.Once
}

func newWindow(t Timing) *window {
	w := &window{start: time.Now(), from: t.Warmup, over: make(chan struct{})}
	w.until.Store(int64(t.Warmup + t.Duration))
	return w
}

// end ends the run, now or when it was to end, whichever is earlier.
func (w *window) end() {
	w.once.Do(func() {
		w.until.Store(min(w.until.Load(), int64(time.Since(w.start))))
		close(w.over)
	})
}

// open reports whether the run goes on at the instant.
func (w *window) open(at time.Time) bool { return int64(at.Sub(w.start)) < w.until.Load() }

// counts reports whether the instant is in the measured time.
func (w *window) counts(at time.Time) bool {
	d := at.Sub(w.start)
	return d >= w.from && int64(d) <= w.until.Load()
}

func (w *window) seconds() float64 {
	return max(0, time.Duration(w.until.Load())-w.from).Seconds()
}

// lane is where one worker writes down what it does. It belongs to the worker,
// but for the number of operations.
type lane struct {
	*window
	operations atomic.Int64
	total      int64
	conflicts  int64
	latencies  histogram
	failed     measured // its errors
}

// done counts n operations that ended together, and how long they took.
func (l *lane) done(began, ended time.Time, n int64) {
	if l.add(ended, n) {
		l.latencies.add(ended.Sub(began))
	}
}

// add counts n operations, and reports whether they are in the measured time.
func (l *lane) add(ended time.Time, n int64) bool {
	l.total += n
	counts := l.counts(ended)
	if counts {
		l.operations.Add(n)
	}
	return counts
}

// each does one operation after the other while the run goes on.
func (l *lane) each(ctx context.Context, operation func(context.Context) error) {
	for began := time.Now(); l.open(began); {
		err := operation(ctx)
		ended := time.Now()
		switch {
		case err == nil:
			l.done(began, ended, 1)
		case errors.Is(err, eventstore.ErrConflict):
			if l.counts(ended) {
				l.conflicts++
			}
		case errors.Is(err, errOver):
			return
		default:
			if !l.fail(err) {
				return
			}
			ended = time.Now()
		}
		began = ended
	}
}

// errOver is what an operation returns that was not begun, because the run is
// over.
var errOver = errors.New("the run is over")

// fail counts an error and waits a moment. False says that nothing will get
// better, and ends the run.
func (l *lane) fail(err error) (goOn bool) {
	l.failed.problem(err)
	if hopeless(err) {
		l.end()
		return false
	}
	timer := time.NewTimer(afterError)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.over:
		return false
	}
}

func hopeless(err error) bool {
	for _, target := range []error{errors.ErrUnsupported, eventstore.ErrInvalid, eventstore.ErrTooLarge, eventstore.ErrClosed, eventstore.ErrGap} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// drive runs the workers for the time of the run, or until ctx ends. What they
// have begun is finished before it returns; their context ends only if that
// takes too long.
func (b *bench) drive(ctx context.Context, workers int, work func(ctx context.Context, worker int, l *lane)) *measured {
	working, abandon := context.WithCancelCause(context.WithoutCancel(ctx))
	defer abandon(nil)
	w := newWindow(b.timing)
	lanes := make([]*lane, workers)
	var group sync.WaitGroup
	for i := range lanes {
		lanes[i] = &lane{window: w}
		group.Go(func() { work(working, i, lanes[i]) })
	}
	ended := make(chan struct{})
	go func() {
		group.Wait()
		close(ended)
	}()

	m := &measured{details: map[string]any{}, window: w}
	timer := time.NewTimer(b.timing.Warmup + b.timing.Duration)
	defer timer.Stop()
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for running := true; running; {
		select {
		case <-timer.C:
			running = false
		case <-w.over: // nothing will get better
			running = false
		case <-ended:
			running = false
		case <-ctx.Done():
			running, m.interrupted = false, true
		case now := <-tick.C:
			b.tell(w, lanes, now)
		}
	}
	w.end()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C:
		abandon(fmt.Errorf("operations still run %s after the end of the run: given up", patience))
		<-ended
	}
	m.seconds = w.seconds()
	for _, l := range lanes {
		m.operations += l.operations.Load()
		m.total += l.total
		m.conflicts += l.conflicts
		m.latencies.merge(&l.latencies)
		m.errors += l.failed.errors
		for _, text := range l.failed.problems {
			if len(m.problems) < mostProblems && !slices.Contains(m.problems, text) {
				m.problems = append(m.problems, text)
			}
		}
	}
	return m
}

// tell reports the progress.
func (b *bench) tell(w *window, lanes []*lane, now time.Time) {
	if b.Progress == nil {
		return
	}
	passed := now.Sub(w.start)
	p := Progress{Phase: "warming up", Done: int64(passed), Total: int64(b.timing.Warmup + b.timing.Duration)}
	if passed > w.from {
		var operations int64
		for _, l := range lanes {
			operations += l.operations.Load()
		}
		p.Phase, p.PerSecond = "measuring", float64(operations)/(passed-w.from).Seconds()
	}
	b.Progress(p)
}

// verify looks whether the streams have as many events as were acknowledged, or,
// when the outcome of some appends is not known, at least that. It looks at a
// thousand of them at most.
func (b *bench) verify(ctx context.Context, m *measured, streams []eventstore.Stream, acknowledged func(i int) int64) error {
	const most = 1000
	ctx = context.WithoutCancel(ctx) // whoever interrupts a run wants to know what it was worth
	failed := m.errors > 0
	step := max(1, (len(streams)+most-1)/most)
	looked := 0
	for i := 0; i < len(streams); i += step {
		version, err := versionOf(ctx, b.store, streams[i])
		if err != nil {
			return fmt.Errorf("look for what was written: %w", err)
		}
		looked++
		if due := acknowledged(i); int64(version) < due || int64(version) > due && !failed {
			m.problem(fmt.Errorf("stream %q has %d events, but %d were acknowledged", streams[i], version, due))
		}
	}
	m.details["verified_streams"] = looked
	return nil
}

// versionOf returns the number of events of a stream.
func versionOf(ctx context.Context, store eventstore.Store, stream eventstore.Stream) (uint64, error) {
	for e, err := range store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{Backward: true, Limit: 1}) {
		return e.Version, err
	}
	return 0, nil
}
