package aggregatetest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/aggregate/aggregatetest"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type Opened struct{ Owner string }

func (Opened) EventType() string { return "account.opened" }

type Deposited struct{ Cents int64 }

func (Deposited) EventType() string { return "account.deposited" }
func (Deposited) Tags() []string    { return []string{"money"} }

type Withdrawn struct{ Cents int64 }

func (*Withdrawn) EventType() string { return "account.withdrawn" }

type Account struct {
	Owner   string
	Cents   int64
	Entries map[string]int64
}

var accounts = aggregate.Define("account",
	aggregate.On(func(a *Account, e Opened) { a.Owner, a.Entries = e.Owner, map[string]int64{} }),
	aggregate.On(func(a *Account, e Deposited) { a.Cents += e.Cents }),
	aggregate.On(func(a *Account, e *Withdrawn) { a.Cents -= e.Cents }),
)

var ErrInsufficientFunds = errors.New("insufficient funds")

type Withdraw struct {
	Account string
	Cents   int64
}

func (c Withdraw) AggregateID() string { return c.Account }

func (c Withdraw) Decide(a Account) ([]aggregate.Event, error) {
	switch {
	case a.Owner == "":
		return nil, command.Rejectf("account %q is not open", c.Account)
	case c.Cents == 0:
		return nil, nil
	case c.Cents > a.Cents:
		return nil, command.Reject(ErrInsufficientFunds)
	}
	return aggregate.Events(&Withdrawn{c.Cents}), nil
}

// decides is a command made of a function.
type decides func(Account) ([]aggregate.Event, error)

func (decides) AggregateID() string                           { return "ann" }
func (d decides) Decide(a Account) ([]aggregate.Event, error) { return d(a) }
func (d decides) MarshalJSON() ([]byte, error)                { return []byte(`{}`), nil }
func emit(events ...aggregate.Event) decides {
	return func(Account) ([]aggregate.Event, error) { return events, nil }
}

// report is a testing.TB that records the failure instead of failing.
type report struct {
	testing.TB
	failure  string
	cleanups []func()
}

func (r *report) Helper()                  {}
func (r *report) Context() context.Context { return context.Background() }
func (r *report) Cleanup(f func())         { r.cleanups = append(r.cleanups, f) }
func (r *report) Errorf(format string, args ...any) {
	r.failure += fmt.Sprintf(format, args...)
}

func (r *report) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

// failure runs a story that should fail, and returns what it said.
func failure(story func(t testing.TB)) string {
	r := &report{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			for _, f := range r.cleanups {
				f()
			}
		}()
		story(r)
	}()
	<-done
	return r.failure
}

func TestSpec_Passes(t *testing.T) {
	t.Parallel()
	aggregatetest.For(t, accounts).
		Given(Opened{"ann"}, &Deposited{100}).
		When(Withdraw{"ann", 500}).Rejected(ErrInsufficientFunds).
		When(Withdraw{"ann", 500}).Rejected(nil).RejectedSaying("insufficient").
		When(Withdraw{"ann", 0}).Nothing().
		When(Withdraw{"ann", 40}).Then(&Withdrawn{40}).
		State(func(a Account) { require.Equal(t, int64(60), a.Cents) }).
		Given(Deposited{1}).
		When(&Withdraw{"ann", 61}, command.Key("k")).Then(&Withdrawn{61}).
		When(Withdraw{"ann", 60}, command.Key("k")).Fails(eventstore.ErrKeyReused).
		When(Withdraw{"bob", 1}).RejectedSaying(`account "bob" is not open`).
		Rejected(command.Rejectf("account %q is not open", "bob"))

	aggregatetest.For(t, accounts).Given(Opened{"ann"}, Deposited{7}).
		State(func(a Account) { require.Equal(t, int64(7), a.Cents) })

	at := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	aggregatetest.For(t, accounts, aggregatetest.At(at)).
		When(emit(Opened{"ann"}, Deposited{1})).Then(Opened{"ann"}, Deposited{1}).
		Recorded(func(events []eventstore.Recorded) {
			require.Len(t, events, 2)
			require.Equal(t, at, events[1].Time)
			require.Equal(t, []string{"money"}, events[1].Tags)
		})
}

func TestSpec_Options(t *testing.T) {
	t.Parallel()
	enc, err := eventstore.NewEncoding(eventstore.UseCodec(shouting{}))
	require.NoError(t, err)
	forbid := command.Authorize(func(context.Context, *command.Call) error { return errors.New("no") })
	aggregatetest.For(t, accounts, aggregatetest.Encoding(enc)).
		Given(Opened{"ann"}).When(emit(Deposited{5})).Then(Deposited{5}).
		Recorded(func(events []eventstore.Recorded) { require.Equal(t, "shouting", events[0].Metadata.Codec) })
	aggregatetest.For(t, accounts, aggregatetest.Commands(command.Options{Middleware: []command.Middleware{forbid}})).
		When(emit(Deposited{5})).Rejected(command.ErrForbidden)
}

type shouting struct{}

func (shouting) Name() string { return "shouting" }
func (shouting) Marshal(v any) ([]byte, error) {
	data, err := json.Marshal(v)
	return append([]byte("!"), data...), err
}
func (shouting) Unmarshal(data []byte, p any) error { return json.Unmarshal(data[1:], p) }

type course struct{ Taken map[string]bool }

type enrolled struct{ Course string }

func (enrolled) EventType() string { return "enrolled" }
func (e enrolled) Tags() []string  { return []string{"course:" + e.Course} }

var courses = aggregate.Define("student", aggregate.On(func(c *course, e enrolled) { c.Taken[e.Course] = true }))

type enroll struct{ Student, Course string }

func (c enroll) AggregateID() string { return c.Student }
func (c enroll) Boundary() (eventstore.Query, course) {
	return eventstore.Tagged("course:" + c.Course), course{Taken: map[string]bool{}}
}

func (c enroll) Decide(s course) ([]aggregate.Event, error) {
	if s.Taken[c.Course] {
		return nil, command.Rejectf("course %q is full", c.Course)
	}
	return aggregate.Events(enrolled{c.Course}), nil
}

func TestSpec_Boundary(t *testing.T) {
	t.Parallel()
	aggregatetest.For(t, courses).
		GivenIn(courses.Stream("bob"), enrolled{"go"}).
		When(enroll{"ann", "go"}).RejectedSaying(`"go" is full`).
		When(enroll{"ann", "c"}).Then(enrolled{"c"}).
		When(enroll{"bob", "c"}).Rejected(nil)
}

type lossy struct{ Kept, lost string }

func (lossy) EventType() string { return "account.lossy" }

func TestSpec_Fails(t *testing.T) {
	t.Parallel()
	calls := 0
	withLossy := aggregate.Define("account", aggregate.On(func(*Account, lossy) {}), aggregate.On(func(a *Account, e Opened) {
		calls++
		a.Cents = int64(calls)
	}))
	for name, c := range map[string]struct {
		story func(t testing.TB)
		want  string
	}{
		"OtherEvents": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(emit(Opened{"ann"}, Deposited{5}, Deposited{6})).Then(Opened{"ann"}, Deposited{7}, Deposited{6})
		}, `aggregatetest_test.decides {}: what happened is not what was expected (- expected, + happened):
  account.opened {"Owner":"ann"}
- account.deposited {"Cents":7}
+ account.deposited {"Cents":5}
  account.deposited {"Cents":6}`},
		"MoreEvents": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(emit(Opened{"ann"}, Deposited{5})).Then(Opened{"ann"})
		}, `+ account.deposited {"Cents":5}`},
		"SomethingInsteadOfNothing": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(emit(Opened{"ann"})).Nothing()
		}, `+ account.opened {"Owner":"ann"}`},
		"RejectionInsteadOfEvents": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(Withdraw{"ann", 5}).Then(&Withdrawn{5})
		}, `aggregatetest_test.Withdraw {"Account":"ann","Cents":5} failed: account "ann" is not open
expected:
  account.withdrawn {"Cents":5}`},
		"EventsInsteadOfRejection": {func(t testing.TB) {
			aggregatetest.For(t, accounts).Given(Opened{"ann"}, Deposited{5}).When(Withdraw{"ann", 5}).Rejected(ErrInsufficientFunds)
		}, `aggregatetest_test.Withdraw {"Account":"ann","Cents":5} was not rejected; this happened:
  account.withdrawn {"Cents":5}`},
		"AnotherReason": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(Withdraw{"ann", 5}).Rejected(ErrInsufficientFunds)
		}, "was rejected for another reason:\nexpected insufficient funds\ngot      account \"ann\" is not open"},
		"AnotherMessage": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(Withdraw{"ann", 5}).Rejected(command.Rejectf("account %q is not open", "bob"))
		}, "was rejected for another reason:\nexpected account \"bob\" is not open\ngot      account \"ann\" is not open"},
		"SameMessageOfAnError": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(Withdraw{"ann", 5}).Rejected(errors.New(`account "ann" is not open`))
		}, "was rejected for another reason"},
		"AnotherText": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(Withdraw{"ann", 5}).RejectedSaying("closed")
		}, "was rejected for another reason:\nexpected …closed…"},
		"FailureInsteadOfRejection": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(decides(func(Account) ([]aggregate.Event, error) { return nil, errors.New("disk full") })).Rejected(nil)
		}, "failed, but not by a command.Rejection: disk full"},
		"RejectionInsteadOfFailure": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(Withdraw{"ann", 5}).Fails(eventstore.ErrKeyReused)
		}, "did not fail as expected"},
		"Panic": {func(t testing.TB) {
			aggregatetest.For(t, accounts).When(decides(func(Account) ([]aggregate.Event, error) { panic("oh") })).Nothing()
		}, `Decide on "account-ann" panicked: oh`},
		"ImpureChange": {func(t testing.TB) {
			aggregatetest.For(t, accounts).Given(Opened{"ann"}).When(decides(func(a Account) ([]aggregate.Event, error) {
				a.Entries["x"]++
				return nil, nil
			})).Nothing()
		}, "Decide changed the state it was given"},
		"ImpureDecision": {func(t testing.TB) {
			n := int64(0)
			aggregatetest.For(t, accounts).Given(Opened{"ann"}).When(decides(func(Account) ([]aggregate.Event, error) {
				n++
				return aggregate.Events(Deposited{n}), nil
			})).Then(Deposited{1})
		}, "Decide decided differently when asked again on the same state"},
		"ImpureFold": {func(t testing.TB) {
			aggregatetest.For(t, withLossy).Given(Opened{"ann"}).When(emit()).Nothing()
		}, "replaying the events twice gives two states"},
		"LossyEventGiven": {func(t testing.TB) {
			aggregatetest.For(t, withLossy).Given(lossy{"a", "b"}).When(emit()).Nothing()
		}, `event "account.lossy" does not come back from the log as it was`},
		"LossyEventReturned": {func(t testing.TB) {
			aggregatetest.For(t, withLossy).When(emit(lossy{"a", "b"})).Then(lossy{"a", "b"})
		}, `event "account.lossy" does not come back from the log as it was`},
		"UnknownEventGiven": {func(t testing.TB) {
			aggregatetest.For(t, accounts).Given(lossy{"a", ""}).When(emit()).Nothing()
		}, `given {"Kept":"a"}: unknown event type: aggregate "account" has no On for event "account.lossy"`},
		"NoWhen":          {func(t testing.TB) { aggregatetest.For(t, accounts).Then() }, "Then without a command: call When first"},
		"WrongDefinition": {func(t testing.TB) { aggregatetest.For(t, aggregate.Define[Account]("no good")) }, "the definition has mistakes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.Contains(t, failure(c.story), c.want)
		})
	}
}
