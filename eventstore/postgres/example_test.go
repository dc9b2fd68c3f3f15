package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/postgres"
	"github.com/deed-go/deed/internal/pgtest"
)

// database is where the examples run; TestExamples sets it.
var database string

func ExampleOpen() {
	ctx := context.Background()
	store, err := postgres.Open(ctx, database)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()

	ann := eventstore.Stream{Category: "account", ID: "ann"}
	receipt, err := store.Append(ctx, eventstore.Commit{
		Events:     []eventstore.Event{{Stream: ann, Type: "account.opened", Data: []byte(`{"Owner":"Ann"}`)}},
		Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}, // must not exist yet
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("written at position", receipt.Last)
	for event, err := range store.Read(ctx, eventstore.OneStream(ann), eventstore.ReadOptions{}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(event.Version, event.Type, string(event.Data))
	}
	// Prints (checked by TestExamples):
	// written at position 1
	// 1 account.opened {"Owner":"Ann"}
}

// An order and the row that the rest of the program reads are written together.
func ExampleStore_AppendTx() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, database)
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	store, err := postgres.OpenPool(ctx, pool)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	if _, err := pool.Exec(ctx, "CREATE TABLE orders (id text PRIMARY KEY, sku text)"); err != nil {
		log.Fatal(err)
	}

	place := func(id, sku string) error {
		tx, err := pool.Begin(ctx)
		if err != nil {
			return err
		}
		defer tx.Rollback(ctx)
		if _, err := tx.Exec(ctx, "INSERT INTO orders VALUES ($1, $2) ON CONFLICT DO NOTHING", id, sku); err != nil {
			return err
		}
		order := eventstore.Stream{Category: "order", ID: id}
		if _, err := store.AppendTx(ctx, tx, eventstore.Commit{ // last: it takes the lock
			Events:     []eventstore.Event{{Stream: order, Type: "order.placed", Data: []byte(`{}`)}},
			Conditions: []eventstore.Condition{eventstore.StreamAt(order, eventstore.Revision{})},
		}); err != nil {
			return err
		}
		return tx.Commit(ctx)
	}
	fmt.Println(place("o-1", "lamp"))
	fmt.Println(errors.Is(place("o-1", "chair"), eventstore.ErrConflict))
	var rows int
	_ = pool.QueryRow(ctx, "SELECT count(*) FROM orders").Scan(&rows)
	fmt.Println(rows, "order")
	// Prints (checked by TestExamples):
	// <nil>
	// true
	// 1 order
}

func ExampleMigrations() {
	for _, m := range postgres.Migrations() {
		first, _, _ := strings.Cut(m.In("shop"), "\n")
		fmt.Printf("%03d_%s: %s\n", m.Version, m.Name, first)
	}
	// Output:
	// 001_log: DO $do$ BEGIN IF to_regnamespace('"shop"') IS NULL THEN CREATE SCHEMA "shop"; END IF; END $do$;
	// 002_state: -- What background work keeps: rows of views and the like, by table and key.
}

// TestExamples runs the examples that need a server: go test runs examples
// outside of tests, where none can be started.
func TestExamples(t *testing.T) {
	for name, example := range map[string]struct {
		run  func()
		want []string
	}{
		"Open":     {ExampleOpen, []string{"written at position 1", `1 account.opened {"Owner":"Ann"}`}},
		"AppendTx": {ExampleStore_AppendTx, []string{"<nil>", "true", "1 order"}},
	} {
		database = pgtest.Database(t)
		printed := output(t, example.run)
		require.Equal(t, example.want, strings.Split(strings.TrimSpace(printed), "\n"), name)
	}
}

func output(t *testing.T, run func()) string {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "output")
	require.NoError(t, err)
	stdout := os.Stdout
	os.Stdout = file
	defer func() { os.Stdout = stdout }()
	run()
	require.NoError(t, file.Close())
	printed, err := os.ReadFile(file.Name())
	require.NoError(t, err)
	return string(printed)
}
