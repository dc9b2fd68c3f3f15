//go:build unix

package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

func newCashBook() *cashBook {
	return &cashBook{charges: map[string]map[string]int{}, refunds: map[string]map[string]int{}, notified: map[string]int{}}
}

// open is the gateway: it fails one call of five, half of these after it has done
// what was asked, takes its time for some, and does what it has a key for once.
func (l *cashBook) open(t testing.TB, seed uint64) string {
	random := rand.New(rand.NewPCG(seed, 5))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		run, key := r.URL.Query().Get("run"), r.URL.Query().Get("key")
		l.mu.Lock()
		fails, before := random.IntN(5) == 0, random.IntN(2) == 0
		var slow time.Duration
		if random.IntN(20) == 0 {
			slow = time.Duration(random.IntN(1000)) * time.Millisecond
		}
		l.attempts++
		if fails {
			l.failures++
		}
		if !fails || !before {
			switch r.URL.Path {
			case "/charge":
				enter(l.charges, run, key)
			case "/refund":
				enter(l.refunds, run, key)
			}
		}
		if r.URL.Path == "/once" {
			l.notified[run]++
		}
		l.mu.Unlock()
		select {
		case <-time.After(slow):
		case <-r.Context().Done():
		}
		if fails {
			http.Error(w, "out of order", http.StatusInternalServerError)
		}
	}))
	t.Cleanup(server.Close)
	return server.URL
}

func enter(book map[string]map[string]int, run, key string) {
	if book[run] == nil {
		book[run] = map[string]int{}
	}
	book[run][key]++
}

// travellers are the processes, and who starts runs and tells them something.
type travellers struct {
	*nodes
	ledger *cashBook
	engine *saga.Engine
	all    travel
	pauses int
	sent   atomic.Int64

	facts   sync.Mutex
	started map[string]string
	inputs  map[string]journey
	told    []toldSignal
}

func newTravellers(t testing.TB, plan chaosPlan) *travellers {
	plan.Sagas = true
	l := newCashBook()
	plan.Gateway = l.open(t, uint64(time.Now().UnixNano()))
	tr := &travellers{nodes: newNodes(t, plan), ledger: l, started: map[string]string{}, inputs: map[string]journey{}}
	tr.all = journeys(cashier{}, "nobody", func() {})
	tr.engine = saga.NewEngine(tr.store, tr.store, nil, saga.Options{Logger: slog.New(slog.DiscardHandler)})
	tr.admin(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "CREATE TABLE public.bookings (run text, node text); CREATE TABLE public.unbookings (run text, node text)")
		return err
	})
	return tr
}

// insist does it until it is done; false says that the run has ended.
func (tr *travellers) insist(what string, do func(context.Context) error) bool {
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		err := do(context.WithoutCancel(tr.t.Context()))
		switch {
		case err == nil:
			return true
		case errors.Is(err, saga.ErrFinished):
			return false
		case time.Since(began) > 2*waiting || !eventstore.CanRetry(err) && !errors.Is(err, eventstore.ErrOutcomeUnknown):
			tr.t.Errorf("%s: %v", what, err)
			return false
		}
	}
}

// travel has so many runs begin, and be told what they wait for, within a time.
func (tr *travellers) travel(runs int, span, longest time.Duration) {
	random := rand.New(rand.NewPCG(tr.plan.Seed, 6))
	type act struct {
		at time.Duration
		do func()
	}
	var acts []act
	within := func(from, to time.Duration) time.Duration { return from + time.Duration(random.Int64N(int64(to-from))) }
	tell := func(after time.Duration, process saga.Process, run string, signal saga.Signal[string], id string) {
		for range 2 { // the second time nobody notices
			acts = append(acts, act{within(after, span), func() {
				done := tr.insist("signal "+id, func(ctx context.Context) error {
					return signal.Send(ctx, tr.engine, process, run, id, saga.SignalID(id))
				})
				if done {
					tr.facts.Lock()
					tr.told = append(tr.told, toldSignal{process.Name() + "/" + run, signal.Name(), id})
					tr.facts.Unlock()
				}
			}})
		}
	}
	for i := range runs {
		begin := within(0, span/2)
		run := fmt.Sprint("r", i)
		if i%4 == 3 {
			acts = append(acts, act{begin, func() {
				tr.insist("start", func(ctx context.Context) error {
					return saga.Start(ctx, tr.engine, tr.all.diary, run, diaryInput{})
				})
			}})
			tr.started[diaryName+"/"+run] = "completed"
			for n := range diaryEntries {
				// The ids are those of a run.
				tell(begin+time.Second, tr.all.diary, run, entries, fmt.Sprint("e", n))
			}
			continue
		}
		in := journey{Coach: fmt.Sprint(random.IntN(20)), Pause: time.Duration(random.Int64N(int64(longest))), Fails: random.IntN(8) == 0}
		end := "completed"
		if in.Fails {
			end = "failed"
		}
		acts = append(acts, act{begin, func() {
			tr.insist("start", func(ctx context.Context) error { return saga.Start(ctx, tr.engine, tr.all.trip, run, in) })
		}})
		tell(begin+time.Second, tr.all.trip, run, approve, "a"+run)
		if random.IntN(3) == 0 {
			tell(begin+time.Second, tr.all.trip, run, hurryUp, "h"+run)
		}
		if random.IntN(10) == 0 {
			end = ""
			acts = append(acts, act{within(begin+time.Second, span), func() {
				tr.insist("cancel", func(ctx context.Context) error { return tr.engine.Cancel(ctx, tripName, run, "plans have changed") })
			}})
		}
		tr.started[tripName+"/"+run], tr.inputs[run] = end, in
	}
	slices.SortStableFunc(acts, func(a, b act) int { return int(a.at - b.at) })
	began := time.Now()
	next := make(chan act)
	for range 8 {
		tr.writing.Go(func() {
			for a := range next {
				a.do()
				tr.sent.Add(1)
			}
		})
	}
	tr.writing.Go(func() {
		defer close(next)
		for _, a := range acts {
			time.Sleep(time.Until(began.Add(a.at)))
			next <- a
		}
	})
}

// trouble kills, stops and cuts off processes until the time is over.
func (tr *travellers) trouble(d, pause time.Duration) {
	tr.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(min(time.Until(end), time.Duration(300+tr.random.IntN(900))*time.Millisecond))
		switch n := tr.any(); tr.random.IntN(6) {
		case 0, 1:
			n.signal(syscall.SIGKILL)
			tr.kills++
			tr.forget(n)
			tr.join(1)
		case 2, 3:
			n.signal(syscall.SIGSTOP)
			time.Sleep(pause + time.Duration(tr.random.Int64N(int64(pause))))
			n.signal(syscall.SIGCONT)
			tr.pauses++
		case 4:
			tr.terminate([]float64{0.2, 0.5, 1}[tr.random.IntN(3)])
		case 5:
			n.signal(syscall.SIGTERM)
			tr.forget(n)
			tr.stopped = append(tr.stopped, n)
			n.hearing(chaosDone, 0, nil)
			n.told(chaosFinish)
			tr.join(1)
		}
	}
}

// arrive waits until every run has ended, and stops the processes.
func (tr *travellers) arrive() {
	tr.t.Helper()
	tr.writing.Wait()
	open := map[string]bool{}
	ctx, cancel := context.WithTimeout(tr.t.Context(), 4*waiting)
	defer cancel()
	for run := range tr.started {
		open[run] = true
	}
	for batch, err := range tr.store.Subscribe(ctx, histories(), 0) {
		if err != nil {
			require.Fail(tr.t, "runs do not end", "%d runs are open after %v: %v: %v", len(open), 4*waiting, tr.describe(open), err)
		}
		for i := range batch.Events {
			e := &batch.Events[i]
			switch run := runOf(e); {
			case endings[e.Type] != "":
				delete(open, run)
			case e.Type == "saga.started":
				open[run] = true // a child
			}
		}
		if len(open) == 0 && batch.CaughtUp {
			break
		}
	}
	for _, n := range tr.alive {
		n.signal(syscall.SIGTERM)
	}
	for _, n := range tr.alive {
		n.hearing(chaosDone, 0, nil)
		n.told(chaosFinish)
	}
	for _, n := range append(tr.stopped, tr.alive...) {
		n.hearing("", n.heard(), nil) // until it has ended
		require.NoError(tr.t, n.exit, "%s: %s", n.name, &n.output)
		log, err := os.ReadFile(filepath.Join(tr.dir, n.name+".log"))
		require.NoError(tr.t, err)
		require.NotContains(tr.t, string(log), "level=ERROR", "what %s had to say", n.name)
	}
}

// describe says where some of the runs are.
func (tr *travellers) describe(open map[string]bool) string {
	var b strings.Builder
	ctx := context.WithoutCancel(tr.t.Context())
	for run := range open {
		process, id, _ := strings.Cut(run, "/")
		info, err := tr.engine.Look(ctx, process, id)
		fmt.Fprintf(&b, "\n\t%s: %+v %v", run, info, err)
		for e, err := range tr.store.Read(ctx, eventstore.OneStream(eventstore.Stream{Category: "saga." + process, ID: id}), eventstore.ReadOptions{}) {
			if err != nil {
				break
			}
			fmt.Fprintf(&b, "\n\t\t%d at %d, %s: %s %s", e.Version, e.Position, e.Time.Format("15:04:05.000"), e.Type, e.Data)
		}
		err = tr.store.View(ctx, func(tx projection.StateTx) error {
			for _, table := range []string{".open", ".watch", ".restless", ".due"} {
				for row, err := range tx.Scan("saga."+process+table, projection.Range{}) {
					if err != nil {
						return err
					}
					if strings.HasSuffix(row.Key, id) {
						fmt.Fprintf(&b, "\n\t\t%s %q: %s", table, row.Key, row.Value)
					}
				}
			}
			return nil
		})
		if err != nil {
			fmt.Fprintf(&b, "\n\t\t%v", err)
		}
		if b.Len() > 20000 {
			break
		}
	}
	return b.String()
}

func histories() eventstore.Query {
	return eventstore.Match(eventstore.Item{Category: "saga." + tripName}, eventstore.Item{Category: "saga." + baggageName}, eventstore.Item{Category: "saga." + diaryName})
}

func runOf(e *eventstore.Recorded) string {
	return strings.TrimPrefix(e.Stream.Category, "saga.") + "/" + e.Stream.ID
}

// evidence reads what there is in the end.
func (tr *travellers) evidence() *travelled {
	tr.t.Helper()
	j := &travelled{
		started: tr.started, inputs: tr.inputs, told: tr.told, ledger: tr.ledger, streams: map[string][]eventstore.Recorded{},
		seats: map[string]map[string]int{}, booked: map[string]int{}, unbooked: map[string]int{},
	}
	for _, e := range tr.events(histories()) {
		j.streams[runOf(&e)] = append(j.streams[runOf(&e)], e)
	}
	for _, e := range tr.events(eventstore.OneCategory(coaches.Category())) {
		var of seatTaken // or freed
		require.NoError(tr.t, json.Unmarshal(e.Data, &of))
		enter(j.seats, e.Type, of.Run)
	}
	tr.admin(func(ctx context.Context, conn *pgx.Conn) error {
		for table, into := range map[string]map[string]int{"bookings": j.booked, "unbookings": j.unbooked} {
			rows, err := conn.Query(ctx, "SELECT run, count(*) FROM public."+table+" GROUP BY run")
			if err != nil {
				return err
			}
			var run string
			var n int
			if _, err := pgx.ForEachRow(rows, []any{&run, &n}, func() error { into[run] = n; return nil }); err != nil {
				return err
			}
		}
		return nil
	})
	return j
}

func (tr *travellers) summary(j *travelled) string {
	owners := 0
	tr.admin(func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT count(*) FROM public.owners WHERE name LIKE 'saga %'").Scan(&owners)
	})
	types, ended := map[string]int{}, map[string]int{}
	events := 0
	for run, stream := range j.streams {
		process, _, _ := strings.Cut(run, "/")
		events += len(stream)
		for i := range stream {
			types[stream[i].Type]++
			if end := endings[stream[i].Type]; end != "" {
				ended[process+" "+end]++
			}
		}
	}
	return fmt.Sprintf("%d runs begun, %d with children, ended: %v; %d history events: %d steps succeeded, %d failed, %d attempts failed, %d timers, %d signals given and %d taken, %d compensations; "+
		"%d calls of the gateway, of which it failed %d; %d runs charged, %d refunded; %d seats taken, %d freed; %d processes: %d killed, %d paused, %d stopped; %d sessions ended; %d takeovers; %d writes of former owners refused",
		len(j.started), len(j.streams), ended, events, types["saga.step_succeeded"], types["saga.step_failed"], types["saga.attempt_failed"], types["saga.timer_fired"],
		types["saga.signalled"], types["saga.signal_taken"], types["saga.compensated"], tr.ledger.attempts, tr.ledger.failures, len(tr.ledger.charges), len(tr.ledger.refunds),
		len(j.seats["seat.taken"]), len(j.seats["seat.freed"]), tr.named, tr.kills, tr.pauses, len(tr.stopped), tr.terminated, owners-3, tr.attempts())
}

// Three processes run sagas with timers, signals, children and a gateway that
// fails, while they are killed, stopped for longer than their leases last and cut
// off from the server: no run is lost or has two histories, and whatever must
// happen once does.
func TestSagas(t *testing.T) {
	if !long() {
		t.Parallel()
	}
	tr := newTravellers(t, chaosPlan{Lease: time.Second})
	tr.join(3)
	runs, span, longest := 80, 4*time.Second, 2*time.Second
	if long() {
		runs, span, longest = 2000, 2*time.Minute, 20*time.Second
	}
	tr.travel(runs, span, longest)
	tr.trouble(span, 1500*time.Millisecond)
	tr.arrive()
	j := tr.evidence()
	t.Log(tr.summary(j))
	found := j.judge()
	require.Empty(t, found, complaints(found))
}

// Were the epoch not looked at when a transaction of a step ends, the checks of
// TestSagas would say so.
func TestSagas_NoticesTransactionsWithoutEpoch(t *testing.T) {
	t.Parallel()
	tr := newTravellers(t, chaosPlan{Lease: time.Second, Careless: true})
	tr.join(3)
	for _, n := range tr.alive {
		n.told(chaosFreeze, tripName)
	}
	require.NoError(t, saga.Start(t.Context(), tr.engine, tr.all.trip, "r", journey{Coach: "1"}))
	tr.started[tripName+"/r"] = ""
	var frozen *peer
	eventually(t, func() bool {
		for _, n := range tr.alive {
			n.mu.Lock()
			if slices.Contains(n.lines, chaosFreezing) {
				frozen = n
			}
			n.mu.Unlock()
		}
		return frozen != nil
	}, "nobody books")
	for _, n := range tr.alive {
		if n != frozen {
			n.told(chaosThaw, tripName)
		}
	}
	bookings := func() (n int) {
		tr.admin(func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, "SELECT count(*) FROM public.bookings").Scan(&n)
		})
		return n
	}
	eventually(t, func() bool { return bookings() == 1 }, "nobody takes over from %s", frozen.name)
	frozen.signal(syscall.SIGCONT)
	eventually(t, func() bool { return bookings() == 2 }, "%s does not go on", frozen.name)
	found := tr.evidence().judge()
	t.Logf("found: %s", found[sagaBooked])
	require.NotEmpty(t, found[sagaBooked])
}

// What the judge finds when something is wrong, one thing at a time.
func TestSagas_Judge(t *testing.T) {
	t.Parallel()
	type step = map[string]any
	var j *travelled
	add := func(run, eventType string, payload step) {
		process, id, _ := strings.Cut(run, "/")
		data, err := json.Marshal(payload)
		require.NoError(t, err)
		j.streams[run] = append(j.streams[run], eventstore.Recorded{
			Stream: eventstore.Stream{Category: "saga." + process, ID: id}, Type: eventType, Version: uint64(len(j.streams[run]) + 1), Data: data,
		})
	}
	sound := func() {
		j = &travelled{
			started: map[string]string{"trip/c": "completed", "trip/f": "failed", "trip/x": "", "diary/d": "completed"},
			streams: map[string][]eventstore.Recorded{}, ledger: newCashBook(),
			seats: map[string]map[string]int{"seat.taken": {}, "seat.freed": {}}, booked: map[string]int{}, unbooked: map[string]int{},
		}
		for _, id := range []string{"c", "f", "x"} {
			run, child := "trip/"+id, "of "+id
			add(run, "saga.started", nil)
			add(run, "saga.step_began", step{"step": step{"kind": "once", "name": "notify"}})
			add(run, "saga.step_succeeded", step{"step": step{"kind": "once", "name": "notify"}})
			add(run, "saga.attempt_failed", step{"step": step{"kind": "do", "name": "charge"}, "attempt": 1})
			add(run, "saga.signalled", step{"name": "approve", "in": "a" + id})
			add(run, "saga.step_succeeded", step{"step": step{"kind": "do", "name": "charge"}})
			add(run, "saga.step_succeeded", step{"step": step{"kind": "do", "name": "baggage"}, "result": child})
			add(run, map[string]string{"c": "saga.completed", "f": "saga.failed", "x": "saga.cancelled"}[id], nil)
			add("baggage/"+child, "saga.started", nil)
			add("baggage/"+child, "saga.completed", nil)
			j.told = append(j.told, toldSignal{run, "approve", "a" + id})
			j.seats["seat.taken"][id], j.seats["seat.taken"][child], j.booked[id] = 1, 1, 1
			enter(j.ledger.charges, id, "key")
			j.ledger.notified[id] = 1
			if id != "c" {
				j.seats["seat.freed"][id], j.unbooked[id] = 1, 1
				enter(j.ledger.refunds, id, "key")
			}
		}
		add("diary/d", "saga.started", nil)
		add("diary/d", "saga.signalled", step{"name": "entry", "in": "e1"})
		add("diary/d", "saga.signalled", step{"name": "entry", "in": "e0"})
		add("diary/d", "saga.signal_taken", step{"number": 1, "step": step{"kind": "signal", "name": "entry"}})
		add("diary/d", "saga.continued", nil)
		add("diary/d", "saga.signal_taken", step{"number": 2, "step": step{"kind": "signal", "name": "entry"}})
		add("diary/d", "saga.completed", step{"result": []string{"e1", "e0"}})
		j.seats["seat.taken"]["d e0"], j.seats["seat.taken"]["d e1"] = 1, 1
		j.told = append(j.told, toldSignal{"diary/d", "entry", "e0"})
	}
	sound()
	require.Empty(t, j.judge())
	again := func(run string, n int) {
		e := j.streams[run][n]
		j.streams[run] = slices.Insert(j.streams[run], n+1, e)
		for i := range j.streams[run] {
			j.streams[run][i].Version = uint64(i + 1)
		}
	}
	cut := func(run string) { j.streams[run] = j.streams[run][:len(j.streams[run])-1] }
	for name, c := range map[string]struct {
		found  string
		change func()
	}{
		"a run that was lost":                      {sagaLost, func() { delete(j.streams, "trip/c") }},
		"a run that has not ended":                 {sagaLost, func() { cut("trip/x") }},
		"a run that has ended otherwise":           {sagaLost, func() { j.started["trip/c"] = "failed" }},
		"a run that nobody has started":            {sagaLost, func() { add("trip/y", "saga.completed", nil) }},
		"a version that is missing":                {sagaForked, func() { j.streams["trip/c"] = slices.Delete(j.streams["trip/c"], 2, 3) }},
		"two ends":                                 {sagaForked, func() { again("trip/c", 7) }},
		"a second beginning":                       {sagaForked, func() { again("trip/c", 0) }},
		"a step that ended twice":                  {sagaRepeated, func() { again("trip/c", 5) }},
		"a step that began twice":                  {sagaRepeated, func() { again("trip/c", 1) }},
		"an attempt that counts twice":             {sagaRepeated, func() { again("trip/c", 3) }},
		"a charge that is missing":                 {sagaCharged, func() { delete(j.ledger.charges, "f") }},
		"a double charge":                          {sagaCharged, func() { enter(j.ledger.charges, "c", "another key") }},
		"a refund of what was done":                {sagaRefunded, func() { enter(j.ledger.refunds, "c", "key") }},
		"a refund that is missing":                 {sagaRefunded, func() { delete(j.ledger.refunds, "x") }},
		"a double refund":                          {sagaRefunded, func() { enter(j.ledger.refunds, "f", "another key") }},
		"a step that ran twice":                    {sagaNotified, func() { j.ledger.notified["x"] = 2 }},
		"a transaction done twice":                 {sagaBooked, func() { j.booked["c"] = 2 }},
		"a transaction that is missing":            {sagaBooked, func() { delete(j.booked, "f") }},
		"a transaction that was not undone":        {sagaBooked, func() { delete(j.unbooked, "x") }},
		"a command executed twice":                 {sagaCommanded, func() { j.seats["seat.taken"]["c"] = 2 }},
		"a command that was not undone":            {sagaCommanded, func() { delete(j.seats["seat.freed"], "x") }},
		"a command of a child executed twice":      {sagaCommanded, func() { j.seats["seat.taken"]["of c"] = 2 }},
		"a command before a run goes on anew":      {sagaCommanded, func() { delete(j.seats["seat.taken"], "d e1") }},
		"a signal that was lost":                   {sagaTold, func() { j.told = append(j.told, toldSignal{"trip/c", "hurry", "h"}) }},
		"a signal given twice":                     {sagaTold, func() { again("trip/c", 4) }},
		"a signal taken twice":                     {sagaTold, func() { again("diary/d", 3) }},
		"signals in another order":                 {sagaTold, func() { cut("diary/d"); add("diary/d", "saga.completed", step{"result": []string{"e0", "e1"}}) }},
		"a child that has not ended":               {sagaChildren, func() { cut("baggage/of c") }},
		"a child that its parent does not know of": {sagaChildren, func() { add("baggage/stray", "saga.completed", nil) }},
	} {
		sound()
		c.change()
		require.NotEmpty(t, j.judge()[c.found], name)
	}
}
