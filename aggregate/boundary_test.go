package aggregate_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
)

type subscribed struct{ Course, Student string }

func (subscribed) EventType() string { return "course.subscribed" }
func (e subscribed) Tags() []string {
	return []string{"course:" + e.Course, "student:" + e.Student}
}

type enrolment struct {
	Course, Student  string
	Seats, OfStudent int
	Students         map[string]bool
}

var courses = aggregate.Define("course", aggregate.On(func(s *enrolment, e subscribed) {
	if e.Course == s.Course {
		s.Seats++
		s.Students[e.Student] = true
	}
	if e.Student == s.Student {
		s.OfStudent++
	}
}))

var errFull = errors.New("no seat")

func subscribe(course, student string, seats int) aggregate.Request[enrolment] {
	return aggregate.Request[enrolment]{
		ID: course,
		Boundary: func() (eventstore.Query, enrolment) {
			return eventstore.Match(
				eventstore.Item{Types: []string{"course.subscribed"}, Tags: []string{"course:" + course}},
				eventstore.Item{Types: []string{"course.subscribed"}, Tags: []string{"student:" + student}},
			), enrolment{Course: course, Student: student, Students: map[string]bool{}}
		},
		Decide: func(s enrolment) ([]aggregate.Event, error) {
			switch {
			case s.Students[student]:
				return nil, nil
			case s.Seats >= seats || s.OfStudent >= 2:
				return nil, errFull
			}
			return aggregate.Events(subscribed{course, student}), nil
		},
	}
}

func TestBoundary_Decides(t *testing.T) {
	t.Parallel()
	r, store := plain(t, aggregate.Options{})
	enrol := func(course, student string) (eventstore.Receipt, error) {
		return aggregate.Execute(t.Context(), r, courses, subscribe(course, student, 2))
	}
	receipt, err := enrol("go", "ann")
	require.NoError(t, err)
	require.Equal(t, eventstore.Revision{Version: 1, Position: 1}, receipt.Revision(courses.Stream("go")))
	_, err = enrol("c", "ann")
	require.NoError(t, err)
	_, err = enrol("sql", "ann")
	require.ErrorIs(t, err, errFull, "the student's limit, over several streams")
	receipt, err = enrol("go", "ann")
	require.NoError(t, err)
	require.Equal(t, eventstore.Receipt{Last: 2}, receipt, "nothing happens: the last event seen")
	_, err = enrol("go", "bob")
	require.NoError(t, err)
	_, err = enrol("go", "eve")
	require.ErrorIs(t, err, errFull)
	_, at, err := aggregate.Load(t.Context(), r, aggregate.Define("course", aggregate.On(func(*int, subscribed) {})), "go")
	require.NoError(t, err)
	require.Equal(t, uint64(2), at.Version)
	head, err := store.Head(t.Context())
	require.NoError(t, err)
	require.Equal(t, eventstore.Position(3), head)
}

// Several runtimes, as in several processes, compete for the last seat: all of
// them have decided before the first is written.
func TestBoundary_HoldsUnderConcurrency(t *testing.T) {
	t.Parallel()
	gated(t, aggregate.Options{}, func(t *testing.T, g *gate, first *aggregate.Runtime) {
		runtimes := []*aggregate.Runtime{first}
		for range 3 {
			runtimes = append(runtimes, aggregate.NewRuntime(g, aggregate.Options{}))
		}
		var rivals []*running
		for i, r := range runtimes {
			rivals = append(rivals, startOf(t, r, courses, subscribe("go", fmt.Sprint(i), 1)))
		}
		require.Len(t, g.held, len(rivals))
		g.pass()
		rivals[0].succeeds(t)
		for _, loser := range rivals[1:] {
			loser.fails(t, errFull)
			require.Equal(t, 2, loser.decided)
		}
		head, err := g.Head(t.Context())
		require.NoError(t, err)
		require.Equal(t, eventstore.Position(1), head, "seats taken")
		for _, r := range runtimes[1:] {
			require.NoError(t, r.Stop(t.Context()))
		}
	})
}

func TestBoundary_Conflict(t *testing.T) {
	t.Parallel()
	gated(t, aggregate.Options{Attempts: 2}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
		rival := func(student string) {
			e, err := courses.Encode(nil, courses.Stream("go"), subscribed{"go", student}, eventstore.Metadata{}, t0)
			require.NoError(t, err)
			_, err = g.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{e}})
			require.NoError(t, err)
		}
		ann := startOf(t, r, courses, subscribe("go", "ann", 1))
		commit := g.next(t)
		require.Equal(t, eventstore.ConditionNoneMatch, commit.Conditions[0].Kind)
		rival("bob")
		commit.release()
		ann.fails(t, errFull)
		require.Equal(t, 2, ann.decided)

		eve := startOf(t, r, courses, subscribe("go", "eve", 10))
		for _, name := range []string{"x", "y"} {
			commit := g.next(t)
			rival(name)
			commit.release()
		}
		eve.fails(t, eventstore.ErrConflict)
		require.ErrorContains(t, eve.err, `decided 2 times for "course-go"`)

		left := startOf(t, r, courses, subscribe("go", "left", 10))
		left.cancel()
		left.fails(t, eventstore.ErrOutcomeUnknown)
		commit = g.next(t)
		rival("z")
		commit.release()
		synctest.Wait()
		require.Equal(t, 1, left.decided, "not again for nobody")
	})
}

// The events of a boundary decision join a stream that may be cached.
func TestBoundary_GrowsTheCachedStream(t *testing.T) {
	t.Parallel()
	r, _ := plain(t, aggregate.Options{})
	execute(t, r, on("ann", deposit(1)))
	bounded := on("ann", deposit(10))
	bounded.Boundary = func() (eventstore.Query, account) {
		return eventstore.OfTypes("account.deposited"), account{Cents: 1000}
	}
	execute(t, r, bounded)
	var saw account
	execute(t, r, on("ann", func(a account) ([]aggregate.Event, error) {
		saw = a
		return aggregate.Events(withdrawn{11}), nil
	}))
	require.Equal(t, int64(11), saw.Cents)
}

func TestBoundary_SeesOlderNames(t *testing.T) {
	t.Parallel()
	enc, err := eventstore.NewEncoding(eventstore.Rename("course.joined", "course.subscribed"))
	require.NoError(t, err)
	r, store := plain(t, aggregate.Options{Encoding: enc})
	old := eventstore.Event{Stream: courses.Stream("go"), Type: "course.joined", Data: []byte(`{"Course":"go","Student":"old"}`), Tags: []string{"course:go", "student:old"}}
	_, err = store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{old}})
	require.NoError(t, err)
	_, err = aggregate.Execute(t.Context(), r, courses, subscribe("go", "ann", 1))
	require.ErrorIs(t, err, errFull)
}

func TestBoundary_Errors(t *testing.T) {
	t.Parallel()
	r, store := plain(t, aggregate.Options{})
	_, err := store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: ann, Type: "account.frozen", Tags: []string{"course:go"}}}})
	require.NoError(t, err)
	ask := func(boundary func() (eventstore.Query, enrolment)) error {
		req := subscribe("go", "ann", 1)
		req.Boundary = boundary
		_, err := aggregate.Execute(t.Context(), r, courses, req)
		return err
	}
	err = ask(func() (eventstore.Query, enrolment) { return eventstore.Tagged("course:go"), enrolment{} })
	require.ErrorIs(t, err, eventstore.ErrUnknownType)
	require.ErrorContains(t, err, `read the boundary of "course-go"`)
	err = ask(func() (eventstore.Query, enrolment) { return eventstore.Query{}, enrolment{} })
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	err = ask(func() (eventstore.Query, enrolment) { panic("lost") })
	require.ErrorContains(t, err, `Boundary for "course-go" panicked: lost`)
	req := subscribe("go", "ann", 1)
	req.Decide = func(enrolment) ([]aggregate.Event, error) { panic("lost") }
	_, err = aggregate.Execute(t.Context(), r, courses, req)
	require.ErrorContains(t, err, `Decide on "course-go" panicked: lost`)
	req.Decide = func(enrolment) ([]aggregate.Event, error) { return aggregate.Events(opened{}), nil }
	_, err = aggregate.Execute(t.Context(), r, courses, req)
	require.ErrorIs(t, err, eventstore.ErrUnknownType)
}

func TestBoundary_UnknownOutcome(t *testing.T) {
	t.Parallel()

	t.Run("WithKey", func(t *testing.T) {
		t.Parallel()
		for name, written := range map[string]bool{"Written": true, "NotWritten": false} {
			t.Run(name, func(t *testing.T) {
				gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
					req := subscribe("go", "ann", 1)
					req.Key = "k"
					ann := startOf(t, r, courses, req)
					if commit := g.next(t); written {
						commit.lose()
					} else {
						commit.fail(eventstore.ErrOutcomeUnknown)
					}
					g.next(t).release() // the same commit again
					receipt := ann.succeeds(t)
					require.Equal(t, eventstore.Position(1), receipt.Last)
					require.False(t, receipt.Duplicate)
					head, err := g.Head(t.Context())
					require.NoError(t, err)
					require.Equal(t, eventstore.Position(1), head)
				})
			})
		}
	})

	t.Run("WithKeyThatAnotherProcessUsed", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			other := aggregate.NewRuntime(g, aggregate.Options{})
			req := subscribe("go", "ann", 5)
			req.Key = "k"
			ours, theirs := startOf(t, r, courses, req), startOf(t, other, courses, req)
			g.next(t).fail(eventstore.ErrOutcomeUnknown) // ours is lost
			g.pass()
			require.False(t, theirs.succeeds(t).Duplicate)
			receipt := ours.succeeds(t)
			require.True(t, receipt.Duplicate, "the other process wrote it")
			require.Equal(t, theirs.receipt.Last, receipt.Last)
			require.NoError(t, other.Stop(t.Context()))
		})
	})

	t.Run("WithoutKey", func(t *testing.T) {
		t.Parallel()
		gated(t, aggregate.Options{}, func(t *testing.T, g *gate, r *aggregate.Runtime) {
			written := startOf(t, r, courses, subscribe("go", "ann", 5))
			g.next(t).lose()
			require.Equal(t, eventstore.Revision{Version: 1, Position: 1}, written.succeeds(t).Revision(courses.Stream("go")))
			unknown := startOf(t, r, courses, subscribe("go", "bob", 5))
			g.next(t).fail(eventstore.ErrOutcomeUnknown)
			unknown.fails(t, eventstore.ErrOutcomeUnknown)
			require.Equal(t, 1, unknown.decided, "it may still arrive")
		})
	})
}

func TestBoundary_Key(t *testing.T) {
	t.Parallel()
	r, _ := plain(t, aggregate.Options{})
	req := subscribe("go", "ann", 1)
	req.Key = "k"
	_, err := aggregate.Execute(t.Context(), r, courses, req)
	require.NoError(t, err)
	again, err := aggregate.Execute(context.WithoutCancel(t.Context()), r, courses, req)
	require.NoError(t, err)
	require.True(t, again.Duplicate)
}
