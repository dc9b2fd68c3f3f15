package projection_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
)

type Opened struct{ Owner string }

type Deposited struct{ Cents int64 }

type Closed struct{}

func (Opened) EventType() string    { return "account.opened" }
func (Deposited) EventType() string { return "account.deposited" }
func (Closed) EventType() string    { return "account.closed" }

// database is a store that keeps read models too, as the embedded ones do.
type database interface {
	eventstore.Store
	projection.State
}

// run is what an application does: it appends the events, has the projections
// follow, calls show when they have seen everything, and stops them.
func run(store database, p projection.Projection, show func(*projection.Engine)) {
	ctx, cancel := context.WithCancel(context.Background())
	events := []struct{ id, eventType, data string }{
		{"ann", "account.opened", `{"Owner":"Ann"}`},
		{"ann", "account.deposited", `{"Cents":500}`},
		{"bob", "account.opened", `{"Owner":"Bob"}`},
		{"bob", "account.deposited", `{"Cents":70}`},
		{"bob", "account.closed", `{}`},
		{"ann", "account.deposited", `{"Cents":250}`},
	}
	var head eventstore.Position
	for _, e := range events {
		receipt, err := store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{
			{Stream: eventstore.Stream{Category: "account", ID: e.id}, Type: e.eventType, Data: []byte(e.data)},
		}})
		if err != nil {
			panic(err)
		}
		head = receipt.Last
	}
	engine := projection.NewEngine(store, store, projection.Options{})
	if err := engine.Add(p); err != nil {
		panic(err)
	}
	var running sync.WaitGroup
	for _, w := range engine.Workers() {
		running.Go(func() { _ = w.Run(ctx) })
	}
	if err := engine.WaitFor(ctx, p.Name(), head); err != nil {
		panic(err)
	}
	show(engine)
	cancel()
	running.Wait()
}

// A view keeps a row for each account, and forgets it when the account closes.
func ExampleView() {
	type Balance struct {
		Owner string
		Cents int64
	}
	balances := projection.View("balances",
		projection.On(func(b *Balance, e Opened) { b.Owner = e.Owner }),
		projection.On(func(b *Balance, e Deposited) { b.Cents += e.Cents }),
		projection.DeleteOn[Balance, Closed](),
	)

	store := memory.New()
	defer store.Close()
	run(store, balances, func(engine *projection.Engine) {
		_ = engine.State().View(context.Background(), func(tx projection.StateTx) error {
			for entry, err := range balances.Rows(tx, projection.Range{}) {
				if err != nil {
					return err
				}
				fmt.Println(entry.Key, entry.Row)
			}
			return nil
		})
	})
	// Output: ann {Ann 750}
}

// One event may touch several rows, under keys of the view's own choosing.
func ExampleOnKeyed() {
	type Statistics struct{ Deposits, Cents int64 }
	statistics := projection.View("statistics", projection.OnKeyed(
		func(e Deposited, r eventstore.Recorded) []string {
			size := "small"
			if e.Cents >= 100 {
				size = "large"
			}
			return []string{size, "all"}
		},
		func(s *Statistics, key string, e Deposited, r eventstore.Recorded) {
			s.Deposits++
			s.Cents += e.Cents
		},
	))

	store := memory.New()
	defer store.Close()
	run(store, statistics, func(engine *projection.Engine) {
		_ = engine.State().View(context.Background(), func(tx projection.StateTx) error {
			for _, key := range []string{"small", "large", "all"} {
				row, _, err := statistics.Row(tx, key)
				if err != nil {
					return err
				}
				fmt.Println(key, row.Deposits, row.Cents)
			}
			return nil
		})
	})
	// Output:
	// small 1 70
	// large 2 750
	// all 3 820
}

// An SQL projection writes tables of its own, in the transaction that moves
// its checkpoint.
func ExampleSQL() {
	ledger := projection.SQL("ledger",
		projection.Setup(`CREATE TABLE IF NOT EXISTS ledger (account TEXT, cents INTEGER)`),
		projection.Reset(`DELETE FROM ledger`),
		projection.OnSQL(func(ctx context.Context, tx projection.Tx, e Deposited, r eventstore.Recorded) error {
			_, err := tx.Exec(ctx, `INSERT INTO ledger VALUES ($1, $2)`, r.Stream.ID, e.Cents)
			return err
		}))

	folder, _ := os.MkdirTemp("", "example")
	defer os.RemoveAll(folder)
	store, err := sqlite.Open(context.Background(), filepath.Join(folder, "bank.db"))
	if err != nil {
		panic(err)
	}
	defer store.Close()
	run(store, ledger, func(engine *projection.Engine) {
		_ = engine.State().View(context.Background(), func(tx projection.StateTx) error {
			rows, err := tx.Query(context.Background(), `SELECT account, count(*), sum(cents) FROM ledger GROUP BY account ORDER BY account`)
			if err != nil {
				return err
			}
			defer rows.Close()
			for rows.Next() {
				var account string
				var count, cents int64
				if err := rows.Scan(&account, &count, &cents); err != nil {
					return err
				}
				fmt.Println(account, count, cents)
			}
			return rows.Err()
		})
	})
	// Output:
	// ann 2 750
	// bob 1 70
}

// Status says how a projection is doing.
func ExampleEngine_Status() {
	type Count struct{ Events int }
	counts := projection.View("counts", projection.On(func(c *Count, _ Deposited) { c.Events++ }))

	store := memory.New()
	defer store.Close()
	run(store, counts, func(engine *projection.Engine) {
		all, err := engine.Status(context.Background())
		if err != nil {
			panic(err)
		}
		for _, s := range all {
			fmt.Println(s.Name, s.Position, "of", s.Head, "lag", s.LagEvents, s.Lag, "dead letters", s.DeadLetters)
		}
	})
	// Output: counts 6 of 6 lag 0 0s dead letters 0
}

// A changed view is built as version 2 while version 1 is read, and compared with
// it. Going back is one call.
func ExampleViewDefinition_Version() {
	type Sum struct{ Cents int64 }
	deposits := projection.View("deposits",
		projection.On(func(s *Sum, e Deposited) { s.Cents += e.Cents }))
	// Closed accounts are to be left out, from version 2 on. It is held back, to look
	// at the difference first.
	depositsToo := projection.View("deposits",
		projection.On(func(s *Sum, e Deposited) { s.Cents += e.Cents }),
		projection.DeleteOn[Sum, Closed](),
	).Version(2).HeldBack()

	ctx := context.Background()
	store := memory.New()
	defer store.Close()
	run(store, deposits, func(*projection.Engine) {})

	// The next build of the program has both.
	follow(store, func(engine *projection.Engine) {
		count := func() (rows int) {
			_ = store.View(ctx, func(tx projection.StateTx) error {
				for range depositsToo.Rows(tx, projection.Range{}) {
					rows++
				}
				return nil
			})
			return rows
		}
		versions := compared(engine, "deposits")
		fmt.Println(versions[1].Comparison)
		fmt.Println("rows that are read:", count())
		for _, version := range []int{2, 1} {
			if err := engine.Activate(ctx, "deposits", version); err != nil {
				panic(err)
			}
			fmt.Println("version", version, "has", count())
		}
	}, deposits, depositsToo)
	// Output:
	// version 1 of "deposits" has 2 rows, version 2 has 1, at position 6: 0 added, 1 removed, 0 changed
	// - bob {"Cents":70}
	// rows that are read: 2
	// version 2 has 1
	// version 1 has 2
}

// compared waits until all versions have been.
func compared(engine *projection.Engine, name string) []projection.VersionInfo {
	for {
		all, err := engine.Versions(context.Background(), name)
		if err != nil {
			panic(err)
		}
		if len(all) > 1 && all[1].Comparison != nil {
			return all
		}
		time.Sleep(time.Millisecond)
	}
}

// follow runs the projections while show does.
func follow(store database, show func(*projection.Engine), all ...projection.Projection) {
	ctx, cancel := context.WithCancel(context.Background())
	engine := projection.NewEngine(store, store, projection.Options{Logger: slog.New(slog.DiscardHandler)})
	for _, p := range all {
		if err := engine.Add(p); err != nil {
			panic(err)
		}
	}
	var workers sync.WaitGroup
	for _, w := range engine.Workers() {
		workers.Go(func() { _ = w.Run(ctx) })
	}
	show(engine)
	cancel()
	workers.Wait()
}

type Registered struct{ Name string }

type Renamed struct{ Name string }

type Ordered struct {
	Customer string
	Cents    int64
}

type Shipped struct{ Customer string }

func (Registered) EventType() string { return "customer.registered" }
func (Renamed) EventType() string    { return "customer.renamed" }
func (Ordered) EventType() string    { return "order.ordered" }
func (Shipped) EventType() string    { return "order.shipped" }

// A join: events of customers and of their orders, each with a stream of its own,
// meet in one row, which has the customer's ID as its key. A new name is
// thereby that of all orders at once, and an index finds the row by an order.
func ExampleOnKeyed_join() {
	type Order struct {
		Cents   int64
		Shipped bool
	}
	type Customer struct {
		Name   string
		Orders map[string]Order // by the IDs of their streams
	}
	byOrder := projection.IndexMany("order", func(c Customer) []string { return slices.Collect(maps.Keys(c.Orders)) })
	customers := projection.View("customers",
		projection.On(func(c *Customer, e Registered) { c.Name = e.Name }),
		projection.On(func(c *Customer, e Renamed) { c.Name = e.Name }),
		projection.OnKeyed(
			func(e Ordered, _ eventstore.Recorded) []string { return []string{e.Customer} },
			func(c *Customer, _ string, e Ordered, r eventstore.Recorded) {
				if c.Orders == nil {
					c.Orders = map[string]Order{}
				}
				c.Orders[r.Stream.ID] = Order{Cents: e.Cents}
			}),
		projection.OnKeyed(
			func(e Shipped, _ eventstore.Recorded) []string { return []string{e.Customer} },
			func(c *Customer, _ string, _ Shipped, r eventstore.Recorded) {
				order := c.Orders[r.Stream.ID]
				order.Shipped = true
				c.Orders[r.Stream.ID] = order
			}),
	).Indexed(byOrder).Partitioned(4) // rows are divided by their keys, so each has all of its events

	store := memory.New()
	defer store.Close()
	ctx := context.Background()
	var head eventstore.Position
	for _, e := range []struct{ category, id, eventType, data string }{
		{"customer", "ann", "customer.registered", `{"Name":"Ann"}`},
		{"customer", "bob", "customer.registered", `{"Name":"Bob"}`},
		{"order", "o1", "order.ordered", `{"Customer":"ann","Cents":500}`},
		{"order", "o2", "order.ordered", `{"Customer":"bob","Cents":70}`},
		{"order", "o3", "order.ordered", `{"Customer":"ann","Cents":20}`},
		{"customer", "ann", "customer.renamed", `{"Name":"Ann Smith"}`},
		{"order", "o3", "order.shipped", `{"Customer":"ann"}`},
	} {
		receipt, err := store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{
			{Stream: eventstore.Stream{Category: e.category, ID: e.id}, Type: e.eventType, Data: []byte(e.data)},
		}})
		if err != nil {
			panic(err)
		}
		head = receipt.Last
	}
	follow(store, func(engine *projection.Engine) {
		if err := engine.WaitFor(ctx, "customers", head); err != nil {
			panic(err)
		}
		_ = store.View(ctx, func(tx projection.StateTx) error {
			for _, id := range []string{"o1", "o2", "o3"} {
				for found, err := range customers.RowsBy(tx, byOrder.Is(id), projection.Range{}) {
					if err != nil {
						return err
					}
					fmt.Println(id, found.Key, found.Row.Name, found.Row.Orders[id])
				}
			}
			return nil
		})
	}, customers)
	// Output:
	// o1 ann Ann Smith {500 false}
	// o2 bob Bob {70 false}
	// o3 ann Ann Smith {20 true}
}
