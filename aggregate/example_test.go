package aggregate_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

type Opened struct{ Owner string }

func (Opened) EventType() string { return "account.opened" }

type Deposited struct{ Cents int64 }

func (Deposited) EventType() string { return "account.deposited" }

type Account struct {
	Owner string
	Cents int64
}

var bank = aggregate.Define("account",
	aggregate.On(func(a *Account, e Opened) { a.Owner = e.Owner }),
	aggregate.On(func(a *Account, e Deposited) { a.Cents += e.Cents }),
)

func Example() {
	ctx := context.Background()
	runtime := aggregate.NewRuntime(memory.New(), aggregate.Options{})

	receipt, err := aggregate.Execute(ctx, runtime, bank, aggregate.Request[Account]{
		ID: "ann",
		Decide: func(a Account) ([]aggregate.Event, error) {
			if a.Owner != "" {
				return nil, errors.New("open already")
			}
			return aggregate.Events(Opened{"Ann"}, Deposited{500}), nil
		},
	})
	fmt.Println(receipt.Revision(bank.Stream("ann")), err)

	account, revision, err := aggregate.Load(ctx, runtime, bank, "ann")
	fmt.Println(account, revision, err)
	fmt.Println(runtime.Stop(ctx))
	// Output:
	// version 2 <nil>
	// {Ann 500} version 2 <nil>
	// <nil>
}

func ExampleDefine_mistakes() {
	wrong := aggregate.Define("bank account",
		aggregate.On(func(a *Account, e Opened) {}),
		aggregate.On(func(a *Account, e Opened) {}),
	)
	fmt.Println(wrong.Err())
	// Output:
	// invalid: category "bank account": ' ' is not allowed at byte 4: use ASCII letters, digits, '.' and '_', beginning with a letter
	// invalid: aggregate "bank account": two Ons are named "account.opened": aggregate_test.Opened and aggregate_test.Opened: give each event type its own name
}

type Subscribed struct{ Course, Student string }

func (Subscribed) EventType() string { return "course.subscribed" }

func (e Subscribed) Tags() []string {
	return []string{"course:" + e.Course, "student:" + e.Student}
}

// Enrolment is what must be known to enrol one student in one course.
type Enrolment struct {
	Course, Student  string
	Seats, OfStudent int
}

var enrolments = aggregate.Define("enrolment", aggregate.On(func(s *Enrolment, e Subscribed) {
	if e.Course == s.Course {
		s.Seats++
	}
	if e.Student == s.Student {
		s.OfStudent++
	}
}))

// A course has two seats, and a student takes at most ten courses: a rule over
// two things at once, which no single stream can guard.
func ExampleRequest_boundary() {
	ctx := context.Background()
	runtime := aggregate.NewRuntime(memory.New(), aggregate.Options{})
	enrol := func(course, student string) error {
		_, err := aggregate.Execute(ctx, runtime, enrolments, aggregate.Request[Enrolment]{
			ID: course,
			Boundary: func() (eventstore.Query, Enrolment) {
				return eventstore.Match(
					eventstore.Item{Types: []string{"course.subscribed"}, Tags: []string{"course:" + course}},
					eventstore.Item{Types: []string{"course.subscribed"}, Tags: []string{"student:" + student}},
				), Enrolment{Course: course, Student: student}
			},
			Decide: func(s Enrolment) ([]aggregate.Event, error) {
				if s.Seats >= 2 || s.OfStudent >= 10 {
					return nil, fmt.Errorf("no seat for %s in %s", student, course)
				}
				return aggregate.Events(Subscribed{course, student}), nil
			},
		})
		return err
	}
	fmt.Println(enrol("go", "ann"))
	fmt.Println(enrol("go", "bob"))
	fmt.Println(enrol("go", "eve"))
	fmt.Println(runtime.Stop(ctx))
	// Output:
	// <nil>
	// <nil>
	// no seat for eve in go
	// <nil>
}
