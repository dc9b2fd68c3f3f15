package saga_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/saga"
)

// run runs the processes on a store in memory, as an application of package
// deed would.
func run(processes ...saga.Process) (host *saga.Engine, bus *command.Bus, stop func()) {
	store := memory.New()
	runtime := aggregate.NewRuntime(store, aggregate.Options{})
	bus = command.NewBus(runtime, command.Options{})
	host = saga.NewEngine(store, store, bus, saga.Options{})
	for _, p := range processes {
		if err := host.Add(p); err != nil {
			panic(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	for _, w := range host.Workers() {
		group.Go(func() { _ = w.Run(ctx) })
		if err := w.Ready(ctx); err != nil {
			panic(err)
		}
	}
	return host, bus, func() {
		cancel()
		group.Wait()
		_ = runtime.Stop(context.Background())
	}
}

// A saga is a function whose effects are durable steps. When one of them fails
// for good, what was done is compensated in reverse.
func Example() {
	order := saga.Define("order", func(s *saga.Run, sku string) (string, error) {
		if err := saga.Execute(s, "reserve", stocks, Reserve{sku, s.ID()}); err != nil {
			return "", err
		}
		s.OnRollback("release", func(s *saga.Run) error {
			return saga.Execute(s, "release", stocks, Release{sku, s.ID()})
		})
		charge, err := saga.Do(s, "charge", func(ctx saga.Step) (string, error) {
			fmt.Println("charge with key", ctx.IdempotencyKey())
			if s.ID() == "o2" {
				return "", saga.Terminal(errors.New("card declined"))
			}
			return "charge of " + s.ID(), nil
		}, saga.Retry(10), saga.Within(time.Minute))
		return charge, err
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))

	host, bus, stop := run(order)
	defer stop()
	ctx := context.Background()
	_, _ = command.Execute(ctx, bus, stocks, Fill{"book", 1})

	_, _ = command.Execute(ctx, bus, orders, Place{"o2", "book"})
	_, err := saga.Wait(ctx, host, order, "o2")
	fmt.Println(err)

	_, _ = command.Execute(ctx, bus, orders, Place{"o1", "book"}) // the book is there again
	charge, err := saga.Wait(ctx, host, order, "o1")
	fmt.Println(charge, err)
	// Output:
	// charge with key saga.order-o2/do:charge
	// saga "order", run "o2" failed: step "charge": card declined
	// charge with key saga.order-o1/do:charge
	// charge of o1 <nil>
}

// A reaction is one function for each event.
func ExampleReact() {
	sent := make(chan string)
	welcome := saga.React("welcome", func(ctx saga.Step, e Placed) error {
		if ctx.Attempt() == 1 {
			return errors.New("mail server is busy")
		}
		sent <- fmt.Sprintf("thank you for ordering a %s (attempt %d)", e.SKU, ctx.Attempt())
		return nil
	}, saga.Backoff(time.Millisecond, time.Second))

	_, bus, stop := run(welcome)
	defer stop()
	_, _ = command.Execute(context.Background(), bus, orders, Place{"o1", "book"})
	fmt.Println(<-sent)
	// Output: thank you for ordering a book (attempt 2)
}

// Send makes a reaction a process manager: an event of one aggregate becomes a
// command to another one, with its effect exactly once.
func ExampleSend() {
	restock := saga.React("restock", func(ctx saga.Step, e Placed) error {
		return saga.Send(ctx, stocks, Fill{e.SKU, 10})
	})
	host, bus, stop := run(restock)
	defer stop()
	ctx := context.Background()
	receipt, _ := command.Execute(ctx, bus, orders, Place{"o1", "book"})
	_ = host.Workers()[0].WaitThrough(ctx, receipt.Last)
	stock, _, err := aggregate.Load(ctx, bus.Runtime(), stocks, "book")
	fmt.Println(stock.Free, err)
	// Output: 10 <nil>
}

// A function that fits no longer blocks its runs, and Replay tells beforehand.
func ExampleDefinition_Replay() {
	recorded := []eventstore.Recorded{
		{Stream: eventstore.Stream{Category: "saga.mailing", ID: "m1"}, Version: 1, Type: "saga.started", Data: []byte(`{"format":1,"in":"ann"}`)},
		{Stream: eventstore.Stream{Category: "saga.mailing", ID: "m1"}, Version: 2, Type: "saga.timer_set", Data: []byte(`{"step":{"kind":"sleep","name":"a day"},"due":"2024-01-02T00:00:00Z"}`)},
	}
	mailing := saga.Define("mailing", func(s *saga.Run, to string) (string, error) {
		return to, s.Sleep("two days", 48*time.Hour)
	})
	fmt.Println(mailing.Replay(context.Background(), recorded, nil))
	// Output: saga "mailing", run "m1" is blocked: step 1: history has sleep "a day", code asks sleep "two days"
}
