package projection_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

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
