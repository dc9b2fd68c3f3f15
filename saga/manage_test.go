package saga_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

type fulfilment struct {
	SKU      string
	Shipped  int
	Reminded int
	Refused  string
}

func byOrder[E saga.Event](_ E, r eventstore.Recorded) string { return r.Stream.ID }

// fulfil reserves what is ordered, reminds when nothing is shipped for a day,
// and ends with the second parcel.
func fulfil() *saga.Manager[fulfilment] {
	return saga.Manage("fulfil",
		saga.When(byOrder[Placed], func(f fulfilment, e Placed) (fulfilment, []saga.Action) {
			f.SKU = e.SKU
			return f, []saga.Action{
				saga.Command(stocks, Reserve{e.SKU, "fulfil"}),
				saga.SetTimer("remind", day),
			}
		}),
		saga.When(byOrder[Shipped], func(f fulfilment, _ Shipped) (fulfilment, []saga.Action) {
			if f.Shipped++; f.Shipped == 2 {
				return f, []saga.Action{saga.End()}
			}
			return f, []saga.Action{saga.StopTimer("remind")}
		}),
		saga.WhenDue("remind", func(f fulfilment) (fulfilment, []saga.Action) {
			f.Reminded++
			return f, []saga.Action{saga.Command(stocks, Fill{f.SKU, 1}), saga.SetTimer("remind", day)}
		}),
		saga.WhenRejected(func(f fulfilment, command string, reason error) (fulfilment, []saga.Action) {
			f.Refused = command
			return f, []saga.Action{saga.End()}
		}),
	)
}

func TestManager_CrashesEverywhere(t *testing.T) {
	t.Parallel()
	sagatest.CrashEverywhere(t, func() saga.Process { return fulfil() }, func(s *sagatest.Spec) {
		s.Given("stock", "book", Stocked{1}).
			When("order", "o1", Placed{"book"}).
			When("order", "o2", Placed{"pen"}). // there are none
			Completed("o2", fulfilment{SKU: "pen", Refused: "saga_test.Reserve"}).
			Advance(2*day+time.Hour).
			When("order", "o1", Shipped{"p1"}).
			Advance(10*day). // no more reminders
			When("order", "o1", Shipped{"p2"}, Shipped{"p3"}).
			Completed("o1", fulfilment{SKU: "book", Shipped: 2, Reminded: 2})
	}, nil)
}

func TestManager_ContinuesAnew(t *testing.T) {
	t.Parallel()
	def := saga.Manage("count",
		saga.When(byOrder[Shipped], func(n int, e Shipped) (int, []saga.Action) {
			if e.Parcel == "last" {
				return n, []saga.Action{saga.End()}
			}
			return n + 1, []saga.Action{saga.SetTimer("t", day)}
		}),
		saga.WhenDue("t", func(n int) (int, []saga.Action) { return n + 1000000, nil }),
	).FromStart()
	s := sagatest.For(t, def)
	const n = 2500
	for i := range n / 100 {
		events := make([]Shipped, 100)
		for k := range events {
			events[k] = Shipped{fmt.Sprint(i, k)}
		}
		for _, e := range events {
			s.Given("order", "o", e)
		}
	}
	s.Advance(2*day).When("order", "o", Shipped{"last"}).Completed("o", 1000000+n)
	info := s.Engine()
	run, err := info.Look(t.Context(), "count", "o")
	require.NoError(t, err)
	require.Equal(t, 2, run.Continued)
}

// A manager whose code runs under way could not take comes as a build of its own:
// runs stay with theirs, and one of the builds gives events to all.
func TestManager_Builds(t *testing.T) {
	t.Parallel()
	build := func(name string) *saga.Manager[string] {
		return saga.Manage("count", saga.When(byOrder[Placed], func(s string, e Placed) (string, []saga.Action) {
			s += name + ":" + e.SKU + " "
			if e.SKU == "last" {
				return s, []saga.Action{saga.End()}
			}
			return s, nil
		})).Build(name)
	}
	b := newBench(t, build("old"))
	place := func(id, sku string) {
		exec(b, orders, Place{id, sku})
		b.settle()
	}
	place("o1", "a")
	b = b.restart(build("old").Draining(), build("new"))
	place("o1", "b")
	place("o2", "c")
	uses, err := b.engine.Builds(t.Context(), "count")
	require.NoError(t, err)
	require.Equal(t, []saga.BuildUse{{Build: "new", Open: 1}, {Build: "old", Open: 1}}, uses)
	place("o1", "last")
	place("o2", "last")
	for id, want := range map[string]string{"o1": "old:a old:b old:last ", "o2": "new:c new:last "} {
		got, err := saga.Wait(t.Context(), b.engine, build("new").Definition, id)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	require.ErrorContains(t, build("a b").Err(), "build")
	engine := saga.NewEngine(b.store, b.store, nil, saga.Options{})
	require.NoError(t, engine.Add(build("old")))
	require.ErrorIs(t, engine.Add(build("new")), eventstore.ErrInvalid, "two builds that take events from the log")
}

func TestManager_Mistakes(t *testing.T) {
	t.Parallel()
	require.ErrorContains(t, saga.Manage[int]("idle").Err(), "reacts to no event")
	twice := saga.When(byOrder[Shipped], func(n int, _ Shipped) (int, []saga.Action) { return n, nil })
	require.ErrorContains(t, saga.Manage("twice", twice, twice).Err(), `two reactions to "order.shipped"`)
	lost := saga.Manage("lost", saga.When(byOrder[Shipped], func(n int, _ Shipped) (int, []saga.Action) {
		return n, []saga.Action{saga.SetTimer("none", day)}
	}))
	sagatest.For(t, lost).When("order", "o", Shipped{"p"}).Blocked("o", `timer "none"`)
}

func TestSchedule_MissedAndOverlap(t *testing.T) {
	t.Parallel()
	job := saga.Define("job", func(s *saga.Run, at time.Time) (string, error) {
		if at.Hour() == 2 { // a long one
			if err := s.Sleep("work", 90*time.Minute); err != nil {
				return "", err
			}
		}
		return at.Format("15:04"), nil
	})
	input := func(at time.Time) time.Time { return at }
	at := func(hour int) string { return "hourly/" + t0.Add(time.Duration(hour)*time.Hour).Format(time.RFC3339) }
	for overlap, want := range map[saga.Overlap][]int{
		saga.OverlapSkip:   {1, 2, 4},
		saga.OverlapAllow:  {1, 2, 3, 4},
		saga.OverlapWait:   {1, 2, 3, 4},
		saga.OverlapCancel: {1, 2, 3, 4},
	} {
		define := func() saga.Process {
			return saga.Cron("hourly", "@hourly", job, input, saga.OnOverlap(overlap))
		}
		story := func(s *sagatest.Spec) {
			s.Advance(4*time.Hour + 30*time.Minute)
			for hour := range 5 {
				info, err := s.Engine().Look(t.Context(), "job", at(hour))
				if (err == nil) != contains(want, hour) {
					panic(fmt.Sprintf("overlap %d, hour %d: %v", overlap, hour, err))
				}
				if overlap == saga.OverlapCancel && hour == 2 && info.Status != saga.StatusCancelled {
					panic("hour 2 is " + info.Status)
				}
			}
			s.Published(saga.ScheduleRun, "next", t0.Add(5*time.Hour))
		}
		if overlap == saga.OverlapSkip || overlap == saga.OverlapAllow {
			story(sagatest.For(t, define(), sagatest.Also(job), sagatest.At(t0)))
			continue
		}
		sagatest.CrashEverywhere(t, define, story, nil, sagatest.Also(job), sagatest.At(t0))
	}
}

func contains(hours []int, hour int) bool {
	for _, h := range hours {
		if h == hour {
			return true
		}
	}
	return false
}

// TestSchedule_Missed: the process was away for some hours.
func TestSchedule_Missed(t *testing.T) {
	t.Parallel()
	job := saga.Define("job", func(_ *saga.Run, at time.Time) (string, error) { return at.Format("15:04"), nil })
	for missed, want := range map[saga.Missed][]int{
		saga.MissedLatest: {1, 5, 6},
		saga.MissedAll:    {1, 2, 3, 4, 5, 6},
		saga.MissedNone:   {1, 6},
	} {
		def := saga.Cron("hourly", "0 * * * *", job, func(at time.Time) time.Time { return at }, saga.OnMissed(missed), saga.OnOverlap(saga.OverlapAllow))
		b := newBench(t, def, job)
		b.advance(90 * time.Minute)
		b.stop()
		b.clock.Set(t0.Add(5*time.Hour + 30*time.Minute)) // nobody was there at 2, 3, 4 and 5
		b = b.restart(def, job)
		b.advance(time.Hour)
		for hour := range 7 {
			_, err := b.engine.Look(t.Context(), "job", "hourly/"+t0.Add(time.Duration(hour)*time.Hour).Format(time.RFC3339))
			require.Equal(t, contains(want, hour), err == nil, "missed %d, hour %d: %v", missed, hour, err)
		}
	}
}

// TestSchedule_Changed: another expression counts from the deployment on.
func TestSchedule_Changed(t *testing.T) {
	t.Parallel()
	job := saga.Define("job", func(_ *saga.Run, at time.Time) (string, error) { return at.Format("15:04"), nil })
	cron := func(expression string) saga.Process {
		return saga.Cron("often", expression, job, func(at time.Time) time.Time { return at })
	}
	s := sagatest.For(t, cron("@yearly"), sagatest.Also(job), sagatest.At(t0)).
		Advance(time.Hour).
		Published(saga.ScheduleRun, "next", t0.AddDate(1, 0, 0)).
		Deploy(cron("30 * * * *")).
		Published(saga.ScheduleRun, "next", t0.Add(90*time.Minute)).
		Advance(time.Hour)
	_, err := s.Engine().Look(t.Context(), "job", "often/2024-01-01T01:30:00Z")
	require.NoError(t, err)
	require.ErrorIs(t, cron("at noon").Err(), eventstore.ErrInvalid)
}
