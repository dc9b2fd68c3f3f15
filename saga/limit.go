package saga

import (
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	jsonv1 "github.com/go-json-experiment/json/v1"

	"github.com/deed-go/deed/projection"
)

// limit bounds the attempts of steps that name the same key.
type limit struct {
	key  string
	most int           // at the same time; 0: as many as there are
	per  time.Duration // so much time between two of them; 0: none
}

// AtMost lets no more than n attempts of steps of the saga with this key run at
// the same time. Runs that must wait are put aside, and come in their order.
// The limit counts for the saga, wherever it runs: one node at a time does. All
// its steps must name the same n. Builds ([Definition.Build]) count apart.
func AtMost(key string, n int) StepOption {
	return stepOption(func(p *policy) { p.limits = append(p.limits, limit{key: key, most: max(n, 1)}) })
}

// Rate lets no more than n attempts of steps of the saga with this key begin in
// each period, evenly spread. Runs that must wait are put aside. All its steps
// must name the same rate. Builds ([Definition.Build]) count apart. After another
// node has taken over, the first one may come too early by one period divided by n.
func Rate(key string, n int, period time.Duration) StepOption {
	return stepOption(func(p *policy) {
		p.limits = append(p.limits, limit{key: "rate " + key, per: max(period/time.Duration(max(n, 1)), 1)})
	})
}

// gate is the state of a limit.
type gate struct {
	used  int
	queue []*row
	next  time.Time // not before
}

// admit waits, put aside, until the step's limits let it begin. The function
// that it returns is to be called when the attempt is over.
func (r *Run) admit(p *policy) func() {
	if len(p.limits) == 0 || r.worker == nil {
		return func() {}
	}
	w := r.worker
	w.mu.Lock()
	defer w.mu.Unlock()
	var had []string
	release := func() {
		for _, key := range had {
			w.leave(key)
		}
	}
	now := w.env.clock.Now()
	for _, l := range p.limits {
		if l.per > 0 {
			continue
		}
		g := w.gate(l.key)
		switch {
		case r.row.granted[l.key] > 0:
			r.row.granted[l.key]-- // somebody has left it to this run
		case g.used < l.most && len(g.queue) == 0:
			g.used++
		default:
			if !slices.Contains(g.queue, r.row) {
				g.queue = append(g.queue, r.row)
				r.row.queued++
			}
			release()
			r.park() // the deferred call unlocks
		}
		had = append(had, l.key)
	}
	for _, l := range p.limits {
		if l.per == 0 {
			continue
		}
		g := w.gate(l.key)
		if g.next.After(now) {
			// The first of those that wait takes the moment; the others ask again.
			if r.row.limited.IsZero() || g.next.Before(r.row.limited) {
				r.row.limited = g.next
			}
			release()
			r.park() // the deferred call unlocks
		}
		g.next = now.Add(l.per)
	}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		release()
		w.pump()
	}
}

func (w *sagaWorker) gate(key string) *gate {
	g := w.gates[key]
	if g == nil {
		g = &gate{}
		w.gates[key] = g
	}
	return g
}

// leave gives the place to the next one in the queue; the lock is held.
func (w *sagaWorker) leave(key string) {
	g := w.gates[key]
	for len(g.queue) > 0 {
		r := g.queue[0]
		g.queue[0] = nil
		g.queue = g.queue[1:]
		r.queued--
		if w.rows[r.ID] != r || r.done() || r.Status == StatusBlocked {
			continue
		}
		if r.granted == nil {
			r.granted = map[string]int{}
		}
		r.granted[key]++
		r.nudged = true
		if !r.active {
			w.evaluate(r)
		}
		return
	}
	g.used--
}

// ungrant gives back the places that the run was left and has not used; the
// lock is held. One that came while it was at work is used the next time, if
// there is one.
func (w *sagaWorker) ungrant(r *row, over bool) {
	if r.nudged && !over {
		return
	}
	r.nudged = false
	for key, n := range r.granted {
		delete(r.granted, key)
		for range n {
			w.leave(key)
		}
	}
}

// heart keeps what a long attempt has come to.
type heart struct {
	run     *Run
	key     string
	alarm   *time.Timer
	silence time.Duration
	beats   atomic.Int32
}

func beatTable(saga string) string { return category(saga) + ".beats" }

func (r *Run) heart(id stepID) *heart {
	return &heart{run: r, key: r.stream.ID + "\x00" + r.keyOf(id)}
}

// Heartbeat says that a long attempt is alive, see [Silence], and keeps the
// details, as JSON, for the attempt that comes after this one if it fails or
// the process dies; see [Step.Progress]. They are stored before it returns. When
// another node has taken over, or the state cannot be reached, the error says so.
func (s Step) Heartbeat(details any) error {
	h := s.beat
	if h == nil {
		return nil // a unit test of the step, or a reaction
	}
	if h.alarm != nil {
		h.alarm.Reset(h.silence)
	}
	raw, err := encode(details)
	if err != nil {
		return err
	}
	err = h.run.env.state.Update(s, func(tx projection.StateTx) error {
		if err := tx.Fence(h.run.lease); err != nil {
			return err
		}
		return tx.Put(beatTable(h.run.saga), h.key, raw)
	})
	if err != nil {
		return fmt.Errorf("heartbeat of step %q: %w", s.key, err)
	}
	h.beats.Add(1)
	return nil
}

// Progress decodes what the last [Step.Heartbeat] of an earlier attempt has kept
// into what the argument points to; false if there is none.
func (s Step) Progress(into any) (bool, error) {
	h := s.beat
	if h == nil {
		return false, nil
	}
	var raw []byte
	err := h.run.env.state.View(s, func(tx projection.StateTx) error {
		value, _, err := tx.Get(beatTable(h.run.saga), h.key)
		raw = append([]byte(nil), value...)
		return err
	})
	if err != nil || len(raw) == 0 {
		return false, err
	}
	h.beats.Add(1)
	return true, jsonv1.Unmarshal(raw, into)
}

// still forgets the details of a step that has ended. What remains of it after
// a crash does no harm.
func (h *heart) still() {
	if h.beats.Load() == 0 {
		return
	}
	_ = h.run.env.state.Update(h.run.ctx, func(tx projection.StateTx) error {
		if err := tx.Fence(h.run.lease); err != nil {
			return err
		}
		return tx.Delete(beatTable(h.run.saga), h.key)
	})
}
