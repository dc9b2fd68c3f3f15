package saga_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// run runs the processes on a store in memory, as an application of package
// deed would.
func run(processes ...saga.Process) (host *saga.Engine, bus *command.Bus, stop func()) {
	return runOn(memory.New(), processes...)
}

// runOn runs them on a store that may have runs already.
func runOn(store backend, processes ...saga.Process) (host *saga.Engine, bus *command.Bus, stop func()) {
	runtime := aggregate.NewRuntime(store, aggregate.Options{})
	bus = command.NewBus(runtime, command.Options{})
	host = saga.NewEngine(store, store, bus, saga.Options{Grace: time.Millisecond})
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

func untilItWaits(host *saga.Engine, name, id string) {
	for {
		if info, err := host.Look(context.Background(), name, id); err != nil || info.Status == saga.StatusWaiting {
			return
		}
		time.Sleep(time.Millisecond)
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

// What is told to a run is kept until the run asks for it.
func ExampleSignal() {
	approval := saga.NewSignal[string]("approval")
	expense := saga.Define("expense", func(s *saga.Run, cents int) (string, error) {
		by, err := approval.Wait(s, 48*time.Hour)
		if errors.Is(err, saga.ErrTimeout) {
			return "nobody has looked at it", nil
		}
		return fmt.Sprintf("%d cents, approved by %s", cents, by), err
	})

	host, _, stop := run(expense)
	defer stop()
	ctx := context.Background()
	_ = saga.Start(ctx, host, expense, "e1", 4200)
	for range 2 { // sent twice, given once
		if err := approval.Send(ctx, host, expense, "e1", "ann", saga.SignalID("click-7")); err != nil {
			fmt.Println(err)
		}
	}
	fmt.Println(saga.Wait(ctx, host, expense, "e1"))
	fmt.Println(approval.Send(ctx, host, expense, "e1", "bob", saga.SignalID("click-8")))
	// Output:
	// 4200 cents, approved by ann <nil>
	// saga "expense", run "e1": saga has ended: its history ends with saga.completed
}

// A step that must not be repeated, and was cut off, tells so: the code decides
// what to do about it.
func ExampleOnce() {
	began := make(chan struct{})
	lottery := saga.Define("lottery", func(s *saga.Run, player string) (string, error) {
		prize, err := saga.Once(s, "draw", func(ctx saga.Step) (string, error) {
			close(began)
			<-ctx.Done() // the process ends here
			return "", context.Cause(ctx)
		})
		if errors.Is(err, saga.ErrOutcomeUnknown) {
			return "ask the notary what " + player + " has drawn", nil
		}
		return prize, err
	})

	store, ctx := memory.New(), context.Background()
	host, _, stop := runOn(store, lottery)
	_ = saga.Start(ctx, host, lottery, "l1", "ann")
	<-began
	stop()

	host, _, stop = runOn(store, lottery)
	defer stop()
	fmt.Println(saga.Wait(ctx, host, lottery, "l1"))
	// Output: ask the notary what ann has drawn <nil>
}

// What a transaction writes, and that it did, are one thing.
func ExampleTx() {
	booking := saga.Define("booking", func(s *saga.Run, guest string) (int64, error) {
		return saga.Tx(s, "book", func(ctx saga.Step, tx projection.Tx) (int64, error) {
			return tx.Exec(ctx, "INSERT INTO rooms (guest) VALUES ($1)", guest)
		})
	})

	folder, err := os.MkdirTemp("", "example-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(folder)
	ctx := context.Background()
	store, err := sqlite.Open(ctx, filepath.Join(folder, "hotel.db"))
	if err != nil {
		panic(err)
	}
	defer store.Close()
	_ = store.Update(ctx, func(tx projection.StateTx) error {
		_, err := tx.Exec(ctx, "CREATE TABLE rooms (number INTEGER PRIMARY KEY, guest TEXT)")
		return err
	})
	host, _, stop := runOn(store, booking)
	defer stop()
	_ = saga.Start(ctx, host, booking, "b1", "ann")
	fmt.Println(saga.Wait(ctx, host, booking, "b1"))
	// Output: 1 <nil>
}

// Branches run side by side, here with a child in each, and have all ended when
// All returns.
func ExampleAll() {
	parcel := saga.Define("parcel", func(s *saga.Run, from string) (string, error) {
		return saga.Do(s, "pack", func(saga.Step) (string, error) {
			return "a parcel from " + from, nil
		})
	})
	delivery := saga.Define("delivery", func(s *saga.Run, warehouses []string) (string, error) {
		parcels := make([]string, len(warehouses))
		var branches []func(*saga.Run) error
		for i, from := range warehouses {
			branches = append(branches, func(s *saga.Run) (err error) {
				parcels[i], err = saga.Child(s, "parcel", parcel, "", from)
				return err
			})
		}
		if err := saga.All(s, "parcels", branches...); err != nil {
			return "", err
		}
		return strings.Join(parcels, " and "), nil
	})

	host, _, stop := run(delivery, parcel)
	defer stop()
	ctx := context.Background()
	_ = saga.Start(ctx, host, delivery, "d1", []string{"Bari", "Trani"})
	fmt.Println(saga.Wait(ctx, host, delivery, "d1"))
	// Output: a parcel from Bari and a parcel from Trani <nil>
}

// The first branch that returns wins. Which one that was is recorded, and the
// others end where they are.
func ExampleRace() {
	bid := saga.NewSignal[int]("bid")
	auction := saga.Define("auction", func(s *saga.Run, lot string) (string, error) {
		var cents int
		winner, err := saga.Race(s, "bid or end",
			func(s *saga.Run) (err error) {
				cents, err = bid.Wait(s, 0)
				return err
			},
			func(s *saga.Run) error { return s.Sleep("a week", 7*24*time.Hour) },
		)
		if winner == 1 {
			return lot + " is not sold", err
		}
		return fmt.Sprintf("%s for %d cents", lot, cents), err
	})

	host, _, stop := run(auction)
	defer stop()
	ctx := context.Background()
	_ = saga.Start(ctx, host, auction, "a1", "a lamp")
	_ = bid.Send(ctx, host, auction, "a1", 4900)
	fmt.Println(saga.Wait(ctx, host, auction, "a1"))
	// Output: a lamp for 4900 cents <nil>
}

// A run that is cancelled gets an error from where it waits, and compensates
// when it returns that. What must be done all the same it does on the run
// without its end.
func ExampleEngine_Cancel() {
	trip := saga.Define("trip", func(s *saga.Run, sku string) (string, error) {
		if err := saga.Execute(s, "reserve", stocks, Reserve{sku, s.ID()}); err != nil {
			return "", err
		}
		s.OnRollback("release", func(s *saga.Run) error {
			return saga.Execute(s, "release", stocks, Release{sku, s.ID()})
		})
		err := s.Sleep("until the day", 90*24*time.Hour)
		if errors.Is(err, saga.ErrCancelled) {
			_, _ = saga.Do(s.Detached(), "tell", func(saga.Step) (bool, error) {
				fmt.Println("we are sorry that you cannot come")
				return true, nil
			})
		}
		return "bon voyage", err
	})

	host, bus, stop := run(trip)
	defer stop()
	ctx := context.Background()
	_, _ = command.Execute(ctx, bus, stocks, Fill{"seat", 1})
	_ = saga.Start(ctx, host, trip, "t1", "seat")
	untilItWaits(host, "trip", "t1")
	_ = host.Cancel(ctx, "trip", "t1", "ill")
	_, err := saga.Wait(ctx, host, trip, "t1")
	fmt.Println(errors.Is(err, saga.ErrCancelled))
	seat, _, _ := aggregate.Load(ctx, bus.Runtime(), stocks, "seat")
	fmt.Println(seat.Free, "free seat")
	// Output:
	// we are sorry that you cannot come
	// true
	// 1 free seat
}

// A run that goes on for ever begins a new life now and then, with what it must
// remember; what it was told meanwhile comes along.
func ExampleRun_Continue() {
	paid := saga.NewSignal[int]("paid")
	account := saga.Define("account", func(s *saga.Run, total int) (int, error) {
		for total < 100 {
			cents, err := paid.Wait(s, 0)
			if err != nil {
				return total, err
			}
			total += cents
			if s.ContinueSuggested() || total >= 50 { // in earnest: the former only
				return total, s.Continue(total)
			}
		}
		return total, nil
	})

	host, _, stop := run(account)
	defer stop()
	ctx := context.Background()
	_ = saga.Start(ctx, host, account, "a1", 0)
	for _, cents := range []int{20, 30, 40, 10} {
		_ = paid.Send(ctx, host, account, "a1", cents)
	}
	fmt.Println(saga.Wait(ctx, host, account, "a1"))
	info, _ := saga.Look(ctx, host, account, "a1")
	fmt.Println("lives:", info.Continued+1)
	// Output:
	// 100 <nil>
	// lives: 4
}

// A change of the code is marked, so that runs under way finish as they began.
func ExampleRun_Version() {
	goOn := saga.NewSignal[bool]("go on")
	step := func(s *saga.Run, name string) error {
		_, err := saga.Do(s, name, func(saga.Step) (bool, error) {
			fmt.Println(s.ID(), name)
			return true, nil
		})
		return err
	}
	yesterday := saga.Define("hiring", func(s *saga.Run, _ string) (bool, error) {
		if err := step(s, "interview"); err != nil {
			return false, err
		}
		return goOn.Wait(s, 0)
	})
	today := saga.Define("hiring", func(s *saga.Run, _ string) (bool, error) {
		if err := step(s, "interview"); err != nil {
			return false, err
		}
		if s.Version("references", 1) >= 1 {
			if err := step(s, "references"); err != nil {
				return false, err
			}
		}
		return goOn.Wait(s, 0)
	})

	store, ctx := memory.New(), context.Background()
	host, _, stop := runOn(store, yesterday)
	_ = saga.Start(ctx, host, yesterday, "ann", "")
	_ = goOn.Send(ctx, host, yesterday, "ann", true)
	_, _ = saga.Wait(ctx, host, yesterday, "ann")
	_ = saga.Start(ctx, host, yesterday, "bob", "")
	untilItWaits(host, "hiring", "bob")
	stop()

	host, _, stop = runOn(store, today)
	defer stop()
	for _, id := range []string{"bob", "cat"} {
		_ = saga.Start(ctx, host, today, id, "")
		_ = goOn.Send(ctx, host, today, id, true)
		fmt.Println(saga.Wait(ctx, host, today, id))
	}
	// Output:
	// ann interview
	// bob interview
	// true <nil>
	// cat interview
	// cat references
	// true <nil>
}

// What a run publishes can be read at any time, also when it has ended.
func ExampleRun_Publish() {
	brew := saga.Define("brew", func(s *saga.Run, what string) (string, error) {
		s.Publish("what", what)
		s.Publish("stage", "mashing")
		if err := s.Sleep("mash", time.Millisecond); err != nil {
			return "", err
		}
		s.Publish("stage", "bottled")
		return what, nil
	})
	host, _, stop := run(brew)
	defer stop()
	ctx := context.Background()
	_ = saga.Start(ctx, host, brew, "b1", "stout")
	_, _ = saga.Wait(ctx, host, brew, "b1")
	stage, _, err := saga.View[string](ctx, host, brew, "b1", "stage")
	fmt.Println(stage, err)
	// Output: bottled <nil>
}
