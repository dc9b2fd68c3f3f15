package aggregate_test

import (
	"errors"
	"fmt"

	"github.com/deed-go/deed/aggregate"
)

type opened struct{ Owner string }

func (opened) EventType() string { return "account.opened" }

type deposited struct {
	Cents int64
	Notes []string `json:",omitempty"`
}

func (deposited) EventType() string { return "account.deposited" }

type withdrawn struct{ Cents int64 }

func (withdrawn) EventType() string { return "account.withdrawn" }

type account struct {
	Owner string
	Cents int64
	Notes []string
}

var errInsufficient = errors.New("insufficient funds")

func parts() []aggregate.Part[account] {
	return []aggregate.Part[account]{
		aggregate.On(func(a *account, e opened) { a.Owner = e.Owner }),
		aggregate.On(func(a *account, e deposited) {
			a.Cents += e.Cents
			if len(e.Notes) > 0 {
				a.Notes = e.Notes
			}
		}),
		aggregate.On(func(a *account, e *withdrawn) { a.Cents -= e.Cents }),
	}
}

var accounts = aggregate.Define("account", parts()...)

func deposit(cents int64) func(account) ([]aggregate.Event, error) {
	return func(account) ([]aggregate.Event, error) { return aggregate.Events(deposited{Cents: cents}), nil }
}

func withdraw(cents int64) func(account) ([]aggregate.Event, error) {
	return func(a account) ([]aggregate.Event, error) {
		if a.Cents < cents {
			return nil, fmt.Errorf("%w: %d of %d", errInsufficient, cents, a.Cents)
		}
		return aggregate.Events(withdrawn{cents}), nil
	}
}

func on(id string, decide func(account) ([]aggregate.Event, error)) aggregate.Request[account] {
	return aggregate.Request[account]{ID: id, Decide: decide}
}

func keyed(id, key string, decide func(account) ([]aggregate.Event, error)) aggregate.Request[account] {
	return aggregate.Request[account]{ID: id, Key: key, Decide: decide}
}
