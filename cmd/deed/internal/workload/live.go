package workload

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// Live is how long a subscriber waits for an event.
type Live struct {
	Timing
	Writers      int     `default:"1" help:"Writers at the same time."`
	Rate         float64 `default:"200" help:"Events a second that are appended, by all writers together."`
	Listen       bool    `xor:"subscriber" help:"Subscribe through a second handle of the store, as another process would, in this process."`
	OtherProcess bool    `xor:"subscriber" help:"Subscribe in another process, a child of this one. Both need a store that several processes can have open."`
}

// Validate implements Workload.
func (w *Live) Validate() error {
	err := errors.Join(w.Timing.validate(), between("writers", w.Writers, 1, maxWorkers))
	if !(w.Rate > 0 && w.Rate <= 1e6) {
		err = errors.Join(err, fmt.Errorf("--rate %g: use more than 0, and at most 1000000", w.Rate))
	}
	if w.Listen && w.OtherProcess {
		err = errors.Join(err, errors.New("--listen and --other-process: choose one"))
	}
	return err
}

func (w *Live) name() string { return "live" }

func (w *Live) parameters() map[string]any {
	return w.with(map[string]any{"writers": w.Writers, "rate": w.Rate, "listen": w.Listen, "other_process": w.OtherProcess})
}

// sighting is when a subscriber has seen the event at a position.
type sighting struct {
	position eventstore.Position
	at       int64
}

// clockBase is what stamps are counted from: by the monotonic clock, so that
// setting the time during a run does no harm.
var clockBase = time.Now()

// stamp is the time in nanoseconds since 1970, comparable between the processes
// of one machine.
func stamp() int64 { return clockBase.UnixNano() + int64(time.Since(clockBase)) }

// sent is an event that was appended.
type sent struct {
	position             eventstore.Position
	called, acknowledged int64
}

// lastSightings is how long the subscriber may take to see what was appended.
const lastSightings = 10 * time.Second

func (w *Live) run(ctx context.Context, b *bench) (*measured, error) {
	if (w.Listen || w.OtherProcess) && !b.Shared {
		return nil, fmt.Errorf("the store %q can be open only once, in one process: leave out --listen and --other-process, or measure a database server: %w", b.Name, errors.ErrUnsupported)
	}
	if err := b.preload(ctx, Tagging{}); err != nil {
		return nil, err
	}
	stream := b.streams("bench_live", 1)[0]
	head, err := b.store.Head(ctx)
	if err != nil {
		return nil, err
	}
	sub, err := w.subscribe(ctx, b, stream, head)
	if err != nil {
		return nil, err
	}
	appended := make([][]sent, w.Writers)
	data, pause := newData(w.Payload), time.Duration(float64(w.Writers)/w.Rate*float64(time.Second))
	m := b.drive(ctx, w.Writers, func(ctx context.Context, worker int, l *lane) {
		// Writers begin one after the other, so that their events are evenly spaced.
		next := l.start.Add(pause * time.Duration(worker) / time.Duration(w.Writers))
		timer := time.NewTimer(0)
		defer timer.Stop()
		l.each(ctx, func(ctx context.Context) error {
			timer.Reset(time.Until(next))
			select {
			case <-timer.C:
			case <-l.over:
				return errOver
			}
			called := stamp()
			receipt, err := b.store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{{Stream: stream, Type: notedType, Data: data, Metadata: metadata}}})
			acknowledged := stamp()
			if err != nil {
				return err
			}
			appended[worker] = append(appended[worker], sent{receipt.Last, called, acknowledged})
			// Time that was lost is not made up for: that would be another rate.
			if next = next.Add(pause); next.Before(time.Now()) {
				next = time.Now()
			}
			return nil
		})
	})
	var all []sent
	for _, of := range appended {
		all = append(all, of...)
	}
	seen, err := sub.finish(len(all))
	if err != nil {
		m.problem(fmt.Errorf("the subscriber: %w", err))
	}
	w.evaluate(m, all, seen)
	if err := b.verify(ctx, m, []eventstore.Stream{stream}, func(int) int64 { return int64(len(all)) }); err != nil {
		return nil, err
	}
	return m, nil
}

// evaluate compares when events were appended with when they were seen.
func (w *Live) evaluate(m *measured, all []sent, seen map[eventstore.Position]int64) {
	m.latencies, m.operations = histogram{}, 0
	var sinceCall histogram
	var missing, before int64
	for _, s := range all {
		at, ok := seen[s.position]
		if !ok {
			missing++
			continue
		}
		if !m.window.counts(clockBase.Add(time.Duration(s.acknowledged - clockBase.UnixNano()))) {
			continue
		}
		m.operations++
		if at < s.acknowledged {
			before++
		}
		m.latencies.add(time.Duration(at - s.acknowledged))
		sinceCall.add(time.Duration(at - s.called))
	}
	if missing > 0 {
		m.problem(fmt.Errorf("%d of %d events were acknowledged and not seen within %s of the end", missing, len(all), lastSightings))
	}
	m.details["unit"], m.details["latency_of"] = "events", "being seen, after the append was acknowledged; at least 0"
	m.details["seen_before_acknowledged"] = before
	m.details["after_call_p50_ms"], m.details["after_call_p95_ms"], m.details["after_call_p99_ms"] = milliseconds(sinceCall.quantile(0.50)), milliseconds(sinceCall.quantile(0.95)), milliseconds(sinceCall.quantile(0.99))
	m.details["events_written"], m.details["events_seen"] = len(all), len(seen)
	if m.seconds > 0 && math.Abs(float64(m.operations)/m.seconds-w.Rate) > w.Rate/10 {
		m.details["note"] = fmt.Sprintf("the rate of %g a second was not reached", w.Rate)
	}
}
