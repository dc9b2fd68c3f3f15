// Quickstart is the smallest whole program on deed: two events, an aggregate
// folded from them, a command that decides, and a read model to query. It
// keeps everything in one file, bank.db, and each run finds what the last one
// left.
package main

import (
	"context"
	"fmt"
	"log"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/query"
)

// Events: things that happened, under the names they are stored by.
type Opened struct{ Owner string }

type Deposited struct{ Cents int64 }

func (Opened) EventType() string    { return "account.opened" }
func (Deposited) EventType() string { return "account.deposited" }

// Account is what decisions need to know, always rebuilt from events.
type Account struct {
	Owner string
	Cents int64
}

var accounts = aggregate.Define("account",
	aggregate.On(func(a *Account, e Opened) { a.Owner = e.Owner }),
	aggregate.On(func(a *Account, e Deposited) { a.Cents += e.Cents }),
)

// Deposit decides which events happen: the first one opens the account.
type Deposit struct {
	Owner string
	Cents int64
}

func (c Deposit) AggregateID() string { return c.Owner }

func (c Deposit) Decide(a Account) ([]aggregate.Event, error) {
	if c.Cents <= 0 {
		return nil, command.Rejectf("a deposit of %d cents is none", c.Cents)
	}
	if a.Owner == "" {
		return aggregate.Events(Opened{c.Owner}, Deposited{c.Cents}), nil
	}
	return aggregate.Events(Deposited{c.Cents}), nil
}

// The read model: here the same fold, kept as rows to query.
var balances = projection.Of("balances", accounts)

func main() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	app, err := deed.Start(ctx, sqlite.File("bank.db"), accounts, balances)
	if err != nil {
		return err
	}
	receipt, err := deed.Execute(ctx, app, accounts, Deposit{"ann", 500})
	if err != nil {
		return err
	}
	balance, err := query.Get(ctx, app, balances, "ann", query.AtLeast(receipt)) // reads its own write
	if err != nil {
		return err
	}
	fmt.Printf("%s has %d cents\n", balance.Owner, balance.Cents)
	return app.Stop(ctx) // lets what is in flight finish
}
