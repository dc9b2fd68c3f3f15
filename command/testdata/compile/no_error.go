package main

// want: \(type Open\) does not satisfy command.Command\[S\] \(wrong type for method Decide\)

import (
	"context"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
)

type Opened struct{}

func (Opened) EventType() string { return "account.opened" }

type Account struct{ Open bool }

var accounts = aggregate.Define("account", aggregate.On(func(a *Account, _ Opened) { a.Open = true }))

type Open struct{ Account string }

func (c Open) AggregateID() string              { return c.Account }
func (c Open) Decide(Account) []aggregate.Event { return nil }

func main() {
	var bus *command.Bus
	_, _ = command.Execute(context.Background(), bus, accounts, Open{"ann"})
}
