//go:build unix

package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// seats are what the trips of TestSagas take, with commands.
type seats struct{ Taken int }

type seatTaken struct{ Run string }

func (seatTaken) EventType() string { return "seat.taken" }

type seatFreed struct{ Run string }

func (seatFreed) EventType() string { return "seat.freed" }

var coaches = aggregate.Define("coach",
	aggregate.On(func(s *seats, _ seatTaken) { s.Taken++ }),
	aggregate.On(func(s *seats, _ seatFreed) { s.Taken-- }),
)

type takeSeat struct{ Coach, Run string }

func (c takeSeat) AggregateID() string { return c.Coach }

func (c takeSeat) Decide(seats) ([]aggregate.Event, error) {
	return aggregate.Events(seatTaken{c.Run}), nil
}

type freeSeat struct{ Coach, Run string }

func (c freeSeat) AggregateID() string { return c.Coach }

func (c freeSeat) Decide(seats) ([]aggregate.Event, error) {
	return aggregate.Events(seatFreed{c.Run}), nil
}

// journey is the input of a trip.
type journey struct {
	Coach string        `json:"coach"`
	Pause time.Duration `json:"pause"`
	Fails bool          `json:"fails"`
}

var errMissed = errors.New("the train was missed")

// The names of the sagas, and of their signals.
const (
	tripName, baggageName, diaryName        = "trip", "baggage", "diary"
	approveSignal, hurrySignal, entrySignal = "approve", "hurry", "entry"
)

var (
	approve = saga.NewSignal[string](approveSignal)
	hurryUp = saga.NewSignal[string](hurrySignal)
	entries = saga.NewSignal[string](entrySignal)
)

// diaryEntries is how many signals a diary waits for.
const diaryEntries = 3

// diaryInput is what a diary takes along when it goes on anew.
type diaryInput struct {
	Entries []string `json:"entries"`
}

// travel are the sagas of TestSagas.
type travel struct {
	trip    *saga.Definition[journey, string]
	baggage *saga.Definition[journey, string]
	diary   *saga.Definition[diaryInput, []string]
}

// cashier is the gateway, as a process sees it.
type cashier struct{ address string }

func (c cashier) call(ctx context.Context, what, run, key string) error {
	q := url.Values{"run": {run}, "key": {key}}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, c.address+"/"+what+"?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = answer.Body.Close() }()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("the gateway says %s: %s", answer.Status, strings.TrimSpace(string(text)))
	}
	return nil
}

// journeys defines the sagas; node is who writes to the table of bookings, and
// during is called within its transaction.
func journeys(c cashier, node string, during func()) travel {
	patient := []saga.StepOption{saga.Backoff(50*time.Millisecond, time.Second), saga.Within(3 * time.Second)}
	written := func(table string) func(s *saga.Run, name string) error {
		return func(s *saga.Run, name string) error {
			_, err := saga.Tx(s, name, func(step saga.Step, tx projection.Tx) (int, error) {
				// Were it done twice, there would be nothing to stop it.
				_, err := tx.Exec(step, "INSERT INTO public."+table+" VALUES ($1, $2)", s.ID(), node)
				during()
				return 1, err
			}, saga.Backoff(50*time.Millisecond, time.Second))
			return err
		}
	}
	book, unbook := written("bookings"), written("unbookings")
	baggage := saga.Define(baggageName, func(s *saga.Run, in journey) (string, error) {
		if err := saga.Execute(s, "load", coaches, takeSeat{"baggage " + in.Coach, s.ID()}); err != nil {
			return "", err
		}
		s.OnRollback("unload", func(s *saga.Run) error {
			return saga.Execute(s, "unload", coaches, freeSeat{"baggage " + in.Coach, s.ID()})
		})
		return "loaded", s.Sleep("carry", in.Pause/4)
	})
	trip := saga.Define(tripName, func(s *saga.Run, in journey) (string, error) {
		s.Publish("coach", in.Coach)
		if err := saga.Execute(s, "take", coaches, takeSeat{in.Coach, s.ID()}); err != nil {
			return "", err
		}
		s.OnRollback("free", func(s *saga.Run) error {
			return saga.Execute(s, "free", coaches, freeSeat{in.Coach, s.ID()})
		})
		_, err := saga.Once(s, "notify", func(step saga.Step) (int, error) {
			return 0, c.call(step, "once", s.ID(), step.IdempotencyKey())
		})
		if errors.Is(err, saga.ErrCancelled) {
			return "", err // whether it was notified does not matter otherwise
		}
		if err := s.Sleep("pause", in.Pause); err != nil {
			return "", err
		}
		if err := book(s, "book"); err != nil {
			return "", err
		}
		s.OnRollback("unbook", func(s *saga.Run) error { return unbook(s, "unbook") })
		var by, loaded string
		err = saga.All(s, "prepare", func(s *saga.Run) error {
			s.OnRollback("refund", func(s *saga.Run) error {
				_, err := saga.Do(s, "refund", func(step saga.Step) (int, error) {
					return 0, c.call(step, "refund", s.ID(), step.IdempotencyKey())
				}, patient...)
				return err
			})
			_, err := saga.Do(s, "charge", func(step saga.Step) (int, error) {
				return 0, c.call(step, "charge", s.ID(), step.IdempotencyKey())
			}, patient...)
			return err
		}, func(s *saga.Run) (err error) {
			by, err = approve.Wait(s, 0)
			return err
		}, func(s *saga.Run) (err error) {
			loaded, err = saga.Child(s, "baggage", baggage, "", in)
			return err
		})
		if err != nil {
			return "", err
		}
		_, err = saga.Race(s, "leave", func(s *saga.Run) error {
			_, err := hurryUp.Wait(s, 0)
			return err
		}, func(s *saga.Run) error { return s.Sleep("leave", in.Pause/2) })
		if err != nil {
			return "", err
		}
		if in.Fails {
			return "", errMissed
		}
		return loaded + " " + by, nil
	})
	diary := saga.Define(diaryName, func(s *saga.Run, in diaryInput) ([]string, error) {
		text, err := entries.Wait(s, 0)
		if err != nil {
			return nil, err
		}
		if err := saga.Execute(s, "write", coaches, takeSeat{"diary", s.ID() + " " + text}); err != nil {
			return nil, err
		}
		if in.Entries = append(in.Entries, text); len(in.Entries) < diaryEntries {
			return nil, s.Continue(in)
		}
		return in.Entries, nil
	})
	return travel{trip, baggage, diary}
}

// sagaProcess runs the sagas until it is told to stop.
func sagaProcess(t *testing.T, plan chaosPlan) {
	w := &witness{careless: plan.Careless}
	freeze := &freezer{}
	control := newControl(map[string]*freezer{tripName: freeze})
	p := pool(t, plan.URL, func(c *pgxpool.Config) { c.ConnConfig.RuntimeParams["application_name"] = plan.Name })
	logger := slog.New(slog.NewTextHandler(appendTo(t, plan, ".log"), nil))
	all := journeys(cashier{plan.Gateway}, plan.Name, freeze.now)
	app, err := deed.Start(t.Context(), witnessed{Pool(p, Patience(plan.Patience), with(func(s *settings) { s.leaseTTL = plan.Lease })), w},
		deed.Logger(logger), deed.State(w), coaches, all.trip, all.baggage, all.diary)
	require.NoError(t, err)
	var listening sync.WaitGroup
	listening.Go(control.listen)
	say(chaosReady)
	<-control.term
	require.NoError(t, app.Stop(t.Context()))
	http.DefaultClient.CloseIdleConnections()
	say(chaosDone)
	listening.Wait()
}

// toldSignal is what somebody told a run, and was confirmed.
type toldSignal struct {
	run, signal, id string
}

// travelled is what is known in the end of what the sagas did.
type travelled struct {
	started  map[string]string                // the runs that were begun, "saga/id", and how they must end: a status, or "" for any
	inputs   map[string]journey               // of trips, by id
	streams  map[string][]eventstore.Recorded // histories, by "saga/id"
	seats    map[string]map[string]int        // events of coaches, by type and run
	booked   map[string]int
	unbooked map[string]int
	told     []toldSignal
	ledger   *cashBook
}

// cashBook is what the gateway knows.
type cashBook struct {
	mu       sync.Mutex
	charges  map[string]map[string]int // by run and key, how often it was asked for and done
	refunds  map[string]map[string]int
	notified map[string]int
	attempts int
	failures int
}

// What a judge of sagas finds.
const (
	sagaLost      = "runs that have not ended as they must"
	sagaForked    = "histories that are not one line"
	sagaRepeated  = "steps recorded twice"
	sagaCharged   = "charges that are not one"
	sagaRefunded  = "refunds that are not what failed"
	sagaNotified  = "more than one call of a step that is done once"
	sagaBooked    = "transactions not done once"
	sagaCommanded = "commands not executed once"
	sagaTold      = "signals not given once"
	sagaChildren  = "children that their parents do not know"
)

// The events that end a run, and how it has ended then.
var endings = map[string]string{
	"saga.completed": "completed", "saga.failed": "failed", "saga.cancelled": "cancelled", "saga.terminated": "terminated",
}

// What is recorded once of a step: how it ended, or that it began.
var (
	outcomes = map[string]bool{
		"saga.step_succeeded": true, "saga.step_failed": true, "saga.timer_fired": true, "saga.await_received": true, "saga.await_timed_out": true,
		"saga.signal_taken": true, "saga.signal_timed_out": true, "saga.joined": true, "saga.rollback_added": true, "saga.rollback_began": true,
		"saga.compensated": true, "saga.published": true,
	}
	beginnings = map[string]bool{
		"saga.step_began": true, "saga.timer_set": true, "saga.await_set": true, "saga.signal_awaited": true, "saga.branched": true,
	}
)

// noted is what the judge reads of an event of a history.
type noted struct {
	Step struct {
		Kind       string `json:"kind"`
		Name       string `json:"name"`
		Occurrence int    `json:"occurrence"`
		In         string `json:"in"`
		Branch     string `json:"branch"`
	} `json:"step"`
	In      json.RawMessage `json:"in"`
	Result  json.RawMessage `json:"result"`
	Name    string          `json:"name"`
	Number  int             `json:"number"`
	Attempt int             `json:"attempt"`
}

// course is what a history comes to.
type course struct {
	end     string
	given   map[toldSignal]int
	order   []string // signals, as they were given
	entries []string // what a diary returned
	child   string   // of a trip
}

func text(raw json.RawMessage) (s string) {
	_ = json.Unmarshal(raw, &s)
	return s
}

// judge compares what is there with what must be.
func (j *travelled) judge() map[string][]string {
	found := map[string][]string{}
	complain := func(what, format string, args ...any) {
		if len(found[what]) < 10 {
			found[what] = append(found[what], fmt.Sprintf(format, args...))
		}
	}
	courses := map[string]course{}
	for run, stream := range j.streams {
		courses[run] = read(run, stream, complain)
	}
	for run, must := range j.started {
		c, ok := courses[run]
		if !ok || c.end == "" || must != "" && c.end != must {
			complain(sagaLost, "%s: %q, and it should be %q", run, c.end, must)
		}
	}
	given := map[toldSignal]int{}
	known := map[string]bool{}
	for run, c := range courses {
		for what, n := range c.given {
			given[what] = n
			if n != 1 {
				complain(sagaTold, "%+v: %d times", what, n)
			}
		}
		process, id, _ := strings.Cut(run, "/")
		if _, ours := j.started[run]; !ours && process != baggageName || c.end == "" {
			complain(sagaLost, "%s: nobody has started it, or it has not ended: %q", run, c.end)
		}
		if c.child != "" {
			known[baggageName+"/"+c.child] = true
			if courses[baggageName+"/"+c.child].end == "" {
				complain(sagaChildren, "%s: its child %q has not ended", run, c.child)
			}
		}
		taken, freed := j.seats["seat.taken"][id], j.seats["seat.freed"][id]
		switch process {
		case diaryName:
			if strings.Join(c.entries, " ") != strings.Join(c.order, " ") {
				complain(sagaTold, "%s: it has got %q, which were given as %q", run, c.entries, c.order)
			}
			for _, entry := range c.order {
				if n := j.seats["seat.taken"][id+" "+entry]; n != 1 {
					complain(sagaCommanded, "%s: entry %q was written %d times", run, entry, n)
				}
			}
		case baggageName:
			if c.end == "completed" && (taken != 1 || freed != 0) || c.end != "completed" && (taken > 1 || taken != freed) {
				complain(sagaCommanded, "%s: %s, loaded %d times and unloaded %d times", run, c.end, taken, freed)
			}
		case tripName:
			j.trip(id, c, complain)
			if c.end == "completed" && (taken != 1 || freed != 0) || c.end != "completed" && (taken > 1 || taken != freed) {
				complain(sagaCommanded, "%s: %s, %d seats taken and %d freed", run, c.end, taken, freed)
			}
		}
	}
	for run := range courses {
		if strings.HasPrefix(run, baggageName+"/") && !known[run] {
			complain(sagaChildren, "%s: no trip has a record of it", run)
		}
	}
	for _, one := range j.told {
		if given[one] != 1 {
			complain(sagaTold, "%+v: confirmed, and given %d times", one, given[one])
		}
	}
	return found
}

// trip compares what a trip has done outside of its history.
func (j *travelled) trip(id string, c course, complain func(what, format string, args ...any)) {
	charged, refunded := len(j.ledger.charges[id]), len(j.ledger.refunds[id])
	booked, unbooked := j.booked[id], j.unbooked[id]
	if charged > 1 || c.end != "cancelled" && charged != 1 {
		complain(sagaCharged, "%s: %s, %d charges: %v", id, c.end, charged, j.ledger.charges[id])
	}
	switch {
	case refunded > 1, c.end == "completed" && refunded != 0, c.end == "failed" && refunded != 1, c.end == "cancelled" && refunded < charged:
		complain(sagaRefunded, "%s: %s, %d charges and %d refunds", id, c.end, charged, refunded)
	}
	if n := j.ledger.notified[id]; n > 1 {
		complain(sagaNotified, "%s: %d calls", id, n)
	}
	switch {
	case booked > 1, c.end == "completed" && (booked != 1 || unbooked != 0), c.end == "failed" && (booked != 1 || unbooked != 1), c.end == "cancelled" && booked != unbooked:
		complain(sagaBooked, "%s: %s, booked %d times and unbooked %d times", id, c.end, booked, unbooked)
	}
}

// read follows a history.
func read(run string, stream []eventstore.Recorded, complain func(what, format string, args ...any)) course {
	c := course{given: map[toldSignal]int{}}
	seen, attempts, taken := map[string]bool{}, map[string]int{}, map[int]bool{}
	segment := 0
	for i := range stream {
		e := &stream[i]
		if e.Version != uint64(i+1) {
			complain(sagaForked, "%s: version %d where %d should be", run, e.Version, i+1)
		}
		if c.end != "" {
			complain(sagaForked, "%s: %s after its end", run, e.Type)
		}
		var n noted
		if err := json.Unmarshal(e.Data, &n); err != nil {
			complain(sagaForked, "%s: version %d: %v", run, e.Version, err)
			continue
		}
		step := fmt.Sprint(segment, " ", n.Step)
		mark := ""
		switch {
		case outcomes[e.Type]:
			mark = step
		case beginnings[e.Type]:
			mark = step + " " + e.Type
			if seen[step] {
				complain(sagaRepeated, "%s: %s of %s after its end", run, e.Type, step)
			}
		}
		if mark != "" && seen[mark] {
			complain(sagaRepeated, "%s: %s of %s", run, e.Type, step)
		}
		seen[mark] = true
		switch e.Type {
		case "saga.attempt_failed":
			if attempts[step]++; n.Attempt != attempts[step] || seen[step] {
				complain(sagaRepeated, "%s: attempt %d of %s after %d", run, n.Attempt, step, attempts[step]-1)
			}
		case "saga.signalled":
			c.given[toldSignal{run, n.Name, text(n.In)}]++
			c.order = append(c.order, text(n.In))
		case "saga.signal_taken":
			if taken[n.Number] {
				complain(sagaTold, "%s: signal %d was taken twice", run, n.Number)
			}
			taken[n.Number] = true
		case "saga.step_succeeded":
			if n.Step.Kind == "do" && n.Step.Name == baggageName && n.Step.Occurrence == 0 {
				c.child = text(n.Result)
			}
		case "saga.continued":
			segment++
		case "saga.started":
			if i > 0 {
				complain(sagaForked, "%s: begun again at version %d", run, e.Version)
			}
		case "saga.blocked":
			complain(sagaLost, "%s: blocked: %s", run, e.Data)
		}
		if end := endings[e.Type]; end != "" {
			c.end = end
			_ = json.Unmarshal(n.Result, &c.entries)
		}
	}
	return c
}
