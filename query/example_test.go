package query_test

import (
	"cmp"
	"context"
	"fmt"
	"testing"

	"github.com/deed-go/deed/query"
)

// The program's own write is in the view that it reads.
func ExampleGet() {
	ctx := context.Background()
	balances := newBalances()
	app := start(&testing.B{}, balances)
	defer app.stop()

	receipt := app.put(&testing.B{}, "ann", opened{"Ann"}, deposited{500})
	b, err := query.Get(ctx, app, balances, "ann", query.AtLeast(receipt))
	fmt.Println(b.Owner, b.Cents, err)

	_, err = query.Get(ctx, app, balances, "bob")
	fmt.Println(err)
	// Output:
	// Ann 500 <nil>
	// get "bob" of view "balances": not found
}

// The richest accounts, page by page.
func ExampleList() {
	ctx := context.Background()
	balances := newBalances()
	app := start(&testing.B{}, balances)
	defer app.stop()
	app.put(&testing.B{}, "ann", opened{"Ann"}, deposited{500})
	app.put(&testing.B{}, "bob", opened{"Bob"}, deposited{70})
	receipt := app.put(&testing.B{}, "cid", opened{"Cid"}, deposited{900})

	options := []query.ListOption{
		query.Where(func(key string, b balance) bool { return b.Cents >= 50 }),
		query.OrderBy(func(a, b balance) int { return cmp.Compare(b.Cents, a.Cents) }),
		query.Limit(2),
		query.AtLeast(receipt),
	}
	page, err := query.List(ctx, app, balances, options...)
	for _, e := range page.Entries {
		fmt.Println(e.Key, e.Row.Cents)
	}
	fmt.Println("more:", page.Next != "", err)
	page, err = query.List(ctx, app, balances, append(options, query.After(page.Next))...)
	for _, e := range page.Entries {
		fmt.Println(e.Key, e.Row.Cents)
	}
	fmt.Println("more:", page.Next != "", err)
	// Output:
	// cid 900
	// ann 500
	// more: true <nil>
	// bob 70
	// more: false <nil>
}

// A typed query with a name; everything it reads belongs to one moment.
func ExampleHandle() {
	ctx := context.Background()
	balances := newBalances()
	app := start(&testing.B{}, balances)
	defer app.stop()
	app.put(&testing.B{}, "ann", opened{"Ann"}, deposited{500})
	receipt := app.put(&testing.B{}, "bob", opened{"Bob"}, deposited{70})

	type Above struct{ Cents int64 }
	total := query.Handle("total", func(ctx context.Context, r query.Reader, q Above) (int64, error) {
		var sum int64
		for e, err := range query.All(ctx, r, balances) {
			if err != nil {
				return 0, err
			}
			if e.Row.Cents > q.Cents {
				sum += e.Row.Cents
			}
		}
		return sum, nil
	}, balances)

	sum, err := query.Ask(ctx, app, total, Above{Cents: 0}, query.AtLeast(receipt))
	fmt.Println(sum, err)
	// Output: 570 <nil>
}
