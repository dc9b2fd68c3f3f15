package workload

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// Load is reading whole streams.
type Load struct {
	Timing
	Writers int `default:"16" help:"Readers at the same time."`
	Streams int `default:"0" help:"Streams to choose from, at random; missing ones are written first. 0 is all that are stored, at least 1000."`
	Events  int `default:"100" help:"Events of a stream."`
}

const fewStreams = 1000

// Validate implements Workload.
func (w *Load) Validate() error {
	return errors.Join(w.Timing.validate(),
		between("writers", w.Writers, 1, maxWorkers),
		between("streams", w.Streams, 0, 10_000_000),
		between("events", w.Events, 1, 1_000_000))
}

func (w *Load) name() string { return "load" }

func (w *Load) parameters() map[string]any {
	return w.with(map[string]any{"writers": w.Writers, "streams": w.Streams, "events": w.Events})
}

func (w *Load) run(ctx context.Context, b *bench) (*measured, error) {
	if err := b.preload(ctx, Tagging{}); err != nil {
		return nil, err
	}
	streams, err := b.storedStreams(ctx, w.Events, defaultTo(w.Streams, fewStreams))
	if err != nil {
		return nil, err
	}
	if w.Streams > 0 {
		streams = spread(streams, w.Streams)
	}
	m := b.drive(ctx, w.Writers, func(ctx context.Context, _ int, l *lane) {
		random := newRandom()
		l.each(ctx, func(ctx context.Context) error { return w.load(ctx, b.store, streams, random) })
	})
	m.details["unit"], m.details["latency_of"] = "loads", "a load"
	m.details["streams"] = len(streams)
	if m.seconds > 0 {
		m.details["events_per_second"] = float64(m.operations*int64(w.Events)) / m.seconds
	}
	return m, nil
}

func (w *Load) load(ctx context.Context, store eventstore.Store, streams []eventstore.Stream, random *rand.Rand) error {
	stream := streams[random.IntN(len(streams))]
	last := uint64(0)
	for e, err := range store.Read(ctx, eventstore.OneStream(stream), eventstore.ReadOptions{}) {
		if err != nil {
			return err
		}
		if e.Version != last+1 {
			return fmt.Errorf("stream %q: version %d follows %d", stream, e.Version, last)
		}
		last = e.Version
	}
	if last != uint64(w.Events) {
		return fmt.Errorf("stream %q has %d events, %d were stored", stream, last, w.Events)
	}
	return nil
}

// Replay is reading the whole log in order.
type Replay struct {
	Timing
	Writers int `default:"1" help:"Readers at the same time, each of which reads the whole log."`
	Events  int `default:"100000" help:"Events that the log must have; missing ones are written first."`
}

// Validate implements Workload.
func (w *Replay) Validate() error {
	return errors.Join(w.Timing.validate(),
		between("writers", w.Writers, 1, maxWorkers),
		between("events", w.Events, 1, 1_000_000_000))
}

func (w *Replay) name() string { return "replay" }

func (w *Replay) parameters() map[string]any {
	return w.with(map[string]any{"writers": w.Writers, "events": w.Events})
}

// stride is how many events are counted, and timed, at once.
const stride = 1000

func (w *Replay) run(ctx context.Context, b *bench) (*measured, error) {
	if err := b.fillUpTo(ctx, max(w.Events, w.Preload), Tagging{}); err != nil {
		return nil, err
	}
	head, err := b.store.Head(ctx)
	if err != nil {
		return nil, err
	}
	m := b.drive(ctx, w.Writers, func(ctx context.Context, _ int, l *lane) {
		for l.open(time.Now()) {
			if err := replay(ctx, b.store, l); err != nil && !l.fail(err) {
				return
			}
		}
	})
	m.details["unit"], m.details["latency_of"] = "events", fmt.Sprintf("%d events", stride)
	m.details["log"] = head
	m.details["events_read"] = m.total
	return m, nil
}

// replay reads the log once, or until the run is over.
func replay(ctx context.Context, store eventstore.Store, l *lane) error {
	began, n, last := time.Now(), int64(0), eventstore.Position(0)
	for e, err := range store.Read(ctx, eventstore.All(), eventstore.ReadOptions{}) {
		if err != nil {
			return err
		}
		if e.Position <= last {
			return fmt.Errorf("%w: position %d follows %d", eventstore.ErrGap, e.Position, last)
		}
		last = e.Position
		if n++; n == stride {
			ended := time.Now()
			l.done(began, ended, n)
			began, n = ended, 0
			if !l.open(ended) {
				return nil
			}
		}
	}
	if n > 0 { // what is left over at the end of the log counts, but is not timed
		l.add(time.Now(), n)
	}
	return nil
}
