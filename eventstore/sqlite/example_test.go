package sqlite_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
)

func Example() {
	ctx := context.Background()
	folder, err := os.MkdirTemp("", "deed")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = os.RemoveAll(folder) }()

	store, err := sqlite.Open(ctx, filepath.Join(folder, "shop.db"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = store.Close() }()

	ann := eventstore.Stream{Category: "account", ID: "ann"}
	receipt, err := store.Append(ctx, eventstore.Commit{
		Events: []eventstore.Event{
			{Stream: ann, Type: "account.opened", Data: []byte(`{"Owner":"Ann"}`), Tags: []string{"owner:ann"}},
			{Stream: ann, Type: "account.deposited", Data: []byte(`{"Cents":500}`)},
		},
		Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}, // must not exist yet
	})
	fmt.Println("durable up to", receipt.Last, err)

	for event, err := range store.Read(ctx, eventstore.OneStream(ann), eventstore.ReadOptions{}) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(event.Version, event.Type, string(event.Data))
	}
	// Output:
	// durable up to 2 <nil>
	// 1 account.opened {"Owner":"Ann"}
	// 2 account.deposited {"Cents":500}
}

// Read models live in the same file: views as rows by key, and whatever
// tables SQL projections make.
func ExampleStore_Update() {
	ctx := context.Background()
	folder, err := os.MkdirTemp("", "deed")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = os.RemoveAll(folder) }()
	store, err := sqlite.Open(ctx, filepath.Join(folder, "shop.db"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = store.Close() }()

	err = store.Update(ctx, func(tx projection.StateTx) error {
		if _, err := tx.Exec(ctx, "CREATE TABLE balance (owner TEXT PRIMARY KEY, cents INTEGER)"); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "INSERT INTO balance VALUES ($1, $2)", "ann", 500)
		return err
	})
	fmt.Println(err)
	err = store.View(ctx, func(tx projection.StateTx) error {
		rows, err := tx.Query(ctx, "SELECT owner, cents FROM balance WHERE cents > $1", 100)
		if err != nil {
			return err
		}
		for rows.Next() {
			var owner string
			var cents int
			if err := rows.Scan(&owner, &cents); err != nil {
				return err
			}
			fmt.Println(owner, cents)
		}
		return rows.Err()
	})
	fmt.Println(err)
	// Output:
	// <nil>
	// ann 500
	// <nil>
}
