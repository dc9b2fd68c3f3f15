package command_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

type Opened struct{ Owner string }

func (Opened) EventType() string { return "account.opened" }

type Account struct{ Owner string }

var bank = aggregate.Define("account",
	aggregate.On(func(a *Account, e Opened) { a.Owner = e.Owner }),
)

type Open struct{ Account, Owner string }

func (c Open) AggregateID() string { return c.Account }

func (c Open) Validate() error {
	if c.Owner == "" {
		return errors.New("an account needs an owner")
	}
	return nil
}

func (c Open) Decide(a Account) ([]aggregate.Event, error) {
	if a.Owner != "" {
		return nil, command.Rejectf("account %q belongs to %s", c.Account, a.Owner)
	}
	return aggregate.Events(Opened{c.Owner}), nil
}

func Example() {
	ctx := context.Background()
	runtime := aggregate.NewRuntime(memory.New(), aggregate.Options{})
	bus := command.NewBus(runtime, command.Options{})

	receipt, err := command.Execute(ctx, bus, bank, Open{"a-1", "Ann"}, command.Key("request-1"))
	fmt.Println(receipt.Last, receipt.Duplicate, err)

	// Sent again, it is not judged against the state that it has itself changed.
	receipt, err = command.Execute(ctx, bus, bank, Open{"a-1", "Ann"}, command.Key("request-1"))
	fmt.Println(receipt.Last, receipt.Duplicate, err)

	_, err = command.Execute(ctx, bus, bank, Open{"a-1", "Bob"})
	fmt.Println(command.IsRejection(err), err)

	_, err = command.Execute(ctx, bus, bank, Open{"a-2", ""})
	fmt.Println(errors.Is(err, command.ErrInvalid), err)
	fmt.Println(runtime.Stop(ctx))
	// Output:
	// 1 false <nil>
	// 1 true <nil>
	// true account "a-1" belongs to Ann
	// true invalid command: command_test.Open for account "a-2": an account needs an owner
	// <nil>
}

func ExampleAuthorize() {
	ctx := context.Background()
	runtime := aggregate.NewRuntime(memory.New(), aggregate.Options{})
	bus := command.NewBus(runtime, command.Options{Middleware: []command.Middleware{
		command.Authorize(func(_ context.Context, call *command.Call) error {
			if call.Metadata.Actor == "" {
				return errors.New("log in first")
			}
			return nil
		}),
	}})

	_, err := command.Execute(ctx, bus, bank, Open{"a-1", "Ann"})
	fmt.Println(err)
	_, err = command.Execute(command.WithActor(ctx, "ann"), bus, bank, Open{"a-1", "Ann"})
	fmt.Println(err)
	fmt.Println(runtime.Stop(ctx))
	// Output:
	// forbidden: command_test.Open for account "a-1" by "": log in first
	// <nil>
	// <nil>
}

func ExampleMiddleware() {
	ctx := context.Background()
	runtime := aggregate.NewRuntime(memory.New(), aggregate.Options{})
	announce := func(next command.Handler) command.Handler {
		return func(ctx context.Context, call *command.Call) (eventstore.Receipt, error) {
			receipt, err := next(ctx, call)
			fmt.Printf("%s for %s %q: %v\n", call.Name, call.Category, call.ID, err)
			return receipt, err
		}
	}
	bus := command.NewBus(runtime, command.Options{Middleware: []command.Middleware{announce}})
	_, _ = command.Execute(ctx, bus, bank, Open{"a-1", "Ann"})
	_, _ = command.Execute(ctx, bus, bank, Open{"a-1", "Bob"})
	fmt.Println(runtime.Stop(ctx))
	// Output:
	// command_test.Open for account "a-1": <nil>
	// command_test.Open for account "a-1": account "a-1" belongs to Ann
	// <nil>
}
