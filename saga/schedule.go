package saga

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/robfig/cron/v3"

	"github.com/deed-go/deed/eventstore"
)

// Missed says what a schedule does about instants at which nobody ran it.
type Missed uint8

// What can be done about missed instants.
const (
	// MissedLatest starts one run, for the last one. It is the default.
	MissedLatest Missed = iota
	// MissedAll starts a run for each of them, the first one first.
	MissedAll
	// MissedNone starts none for any that is over by more than a minute.
	MissedNone
)

// Overlap says what a schedule does when the run that it has started last has
// not ended.
type Overlap uint8

// What can be done about a run that has not ended.
const (
	// OverlapSkip starts none this time. It is the default.
	OverlapSkip Overlap = iota
	// OverlapWait starts the next one when the last one has ended.
	OverlapWait
	// OverlapCancel asks the last one to end, and starts the next one when it has.
	OverlapCancel
	// OverlapAllow starts the next one beside it.
	OverlapAllow
)

// ScheduleOption changes what a [Schedule] does.
type ScheduleOption func(*schedule)

// OnMissed sets what is done about missed instants.
func OnMissed(m Missed) ScheduleOption { return func(s *schedule) { s.missed = m } }

// OnOverlap sets what is done about a run that has not ended.
func OnOverlap(o Overlap) ScheduleOption { return func(s *schedule) { s.overlap = o } }

// Schedule starts runs of a saga at certain times. It is a saga itself, with one
// run that never ends, named [ScheduleRun]: it is listed, looked at, and survives
// the process as any other. What it publishes as "next" is when it starts the
// next one. Make it with [Cron].
type Schedule struct {
	*Definition[scheduleState, struct{}]
}

// ScheduleRun is the id of the one run of a schedule.
const ScheduleRun = "schedule"

type schedule struct {
	missed  Missed
	overlap Overlap
}

// scheduleState is what a schedule takes from one life to the next.
type scheduleState struct {
	Last time.Time `json:"last,omitzero"` // the last instant that it has dealt with
	Run  string    `json:"run,omitempty"` // the last run that it has started
}

var rescheduled = NewSignal[string]("rescheduled")

// Cron returns a schedule that starts a run of the saga whenever the expression
// says, each with the input that the function makes of that instant. The
// expression has five fields, minute, hour, day of the month, month and day of
// the week, as in crontab(5), or is one of @hourly, @daily, @weekly, @monthly,
// @yearly, and "@every 90m". Times are UTC; "CRON_TZ=Europe/Rome 0 3 * * *"
// names another zone. The id of a run is the schedule's name and the instant.
//
// It begins when an engine first has it. When the expression is changed the
// next instant is found anew, at the latest when the engine starts with the new
// one. The name is that of a saga, and part of the stored contract.
func Cron[In, Out any](name, expression string, d *Definition[In, Out], input func(at time.Time) In, options ...ScheduleOption) *Schedule {
	var o schedule
	for _, option := range options {
		option(&o)
	}
	times, err := cron.ParseStandard(expression)
	s := &Schedule{Define(name, func(s *Run, st scheduleState) (struct{}, error) {
		at, err := o.next(s, expression, times, &st)
		if err != nil {
			return struct{}{}, err
		}
		if !at.IsZero() {
			if err := start(s, o, d, at, input(at), &st); err != nil {
				return struct{}{}, err
			}
		}
		return struct{}{}, s.Continue(st)
	})}
	if err != nil {
		s.mistakes = append(s.mistakes, fmt.Errorf("%w: the expression of schedule %q is %q: %w", eventstore.ErrInvalid, name, expression, err))
	}
	if err := d.Err(); err != nil {
		s.mistakes = append(s.mistakes, err)
	}
	s.begun = func(ctx context.Context, w *sagaWorker) error { return beginSchedule(ctx, w, expression) }
	return s
}

// beginSchedule starts the one run of a schedule, and tells it when the
// expression has changed.
func beginSchedule(ctx context.Context, w *sagaWorker, expression string) error {
	if err := w.env.start(ctx, w.saga, ScheduleRun, []byte("{}"), nil); err != nil {
		return err
	}
	info, err := w.engine.Look(ctx, w.saga.name, ScheduleRun)
	if err != nil {
		return err
	}
	raw, ok := info.Published["expression"]
	var known string
	if !ok || eventstore.JSON().Unmarshal(raw, &known) == nil && known == expression {
		return nil
	}
	err = w.engine.tell(ctx, w.saga.name, ScheduleRun, typeSignalled, &payload{Name: rescheduled.name, In: []byte("null")}, "")
	if errors.Is(err, ErrFinished) {
		return nil // somebody has terminated it
	}
	return err
}

// next waits for the next instant and returns it; zero when there is nothing to
// start.
func (o schedule) next(s *Run, expression string, times cron.Schedule, st *scheduleState) (time.Time, error) {
	s.Publish("expression", expression)
	if st.Last.IsZero() {
		st.Last = s.Now()
	}
	next := Local(s, "next", func() time.Time { return times.Next(st.Last.UTC()).UTC() })
	if next.IsZero() {
		return next, Terminal(fmt.Errorf("%q never comes again", expression))
	}
	s.Publish("next", next)
	if wait := next.Sub(s.Now()); wait > 0 {
		_, err := rescheduled.Wait(s, wait)
		if err == nil && s.Now().Before(next) {
			st.Last = s.Now() // what the new expression says of the past was not missed
			return time.Time{}, nil
		}
		if err != nil && !errors.Is(err, ErrTimeout) {
			return time.Time{}, err
		}
	}
	// What else has been missed, seen from the time at which this is handled.
	latest := Local(s, "latest", func() time.Time {
		latest := next
		for t := times.Next(next.UTC()).UTC(); !t.IsZero() && !t.After(s.env.clock.Now()); t = times.Next(t).UTC() {
			latest = t
		}
		return latest
	})
	const late = time.Minute
	switch o.missed {
	case MissedAll:
		st.Last = next
		return next, nil
	case MissedNone:
		st.Last = latest
		if s.Now().Sub(latest) > late {
			return time.Time{}, nil
		}
	default:
		st.Last = latest
	}
	return latest, nil
}

// start starts the run of an instant, as the last one allows.
func start[In, Out any](s *Run, o schedule, d *Definition[In, Out], at time.Time, in In, st *scheduleState) error {
	id := s.saga + "/" + at.Format(time.RFC3339)
	if st.Run != "" && o.overlap != OverlapAllow {
		ended, err := Do(s, "look", func(step Step) (bool, error) {
			info, err := s.worker.engine.Look(step, d.name, st.Run)
			if errors.Is(err, ErrNotFound) {
				return true, nil
			}
			return info.Status.Ended(), err
		})
		switch {
		case err != nil:
			return err
		case ended:
		case o.overlap == OverlapSkip:
			s.Publish("skipped", at)
			return nil
		default:
			if o.overlap == OverlapCancel {
				if _, err := Do(s, "cancel", func(step Step) (struct{}, error) {
					err := s.worker.engine.Cancel(step, d.name, st.Run, "the schedule starts the next run")
					if errors.Is(err, ErrFinished) {
						err = nil
					}
					return struct{}{}, err
				}); err != nil {
					return err
				}
			}
			if _, err := s.await(kindChild, "last", 0, func(eventstore.Position) *watch { return endOf(d.stream(st.Run)) }); err != nil {
				return err
			}
		}
	}
	st.Run = id
	_, err := StartChild(s, "start", d, id, in)
	return err
}

// endOf watches for the end of a run.
func endOf(run eventstore.Stream) *watch {
	return &watch{Types: []string{typeCompleted, typeFailed, typeCancelled, typeTerminated}, Match: WhereStream(run)}
}
