package query_test

import (
	"cmp"
	"context"
	"fmt"
	"testing"

	"github.com/deed-go/deed/projection"
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

// Rows by an index: those of one owner, and the largest first, page by page.
func ExampleBy() {
	ctx := context.Background()
	byOwner := projection.Index("owner", func(b balance) string { return b.Owner })
	byCents := projection.Index("cents", func(b balance) int64 { return b.Cents })
	balances := newBalances().Indexed(byOwner, byCents)
	app := start(&testing.B{}, balances)
	defer app.stop()
	app.put(&testing.B{}, "1", opened{"Ann"}, deposited{500})
	app.put(&testing.B{}, "2", opened{"Bob"}, deposited{70})
	app.put(&testing.B{}, "3", opened{"Ann"}, deposited{900})
	receipt := app.put(&testing.B{}, "4", opened{"Cid"}, deposited{20})

	page, err := query.List(ctx, app, balances, query.By(byOwner.Is("Ann")), query.AtLeast(receipt))
	for _, e := range page.Entries {
		fmt.Println(e.Key, e.Row.Owner, e.Row.Cents)
	}
	fmt.Println("more:", page.Next != "", err)

	options := []query.ListOption{query.By(byCents.AtLeast(50)), query.Backward(), query.Limit(2)}
	page, err = query.List(ctx, app, balances, options...)
	for _, e := range page.Entries {
		fmt.Println(e.Key, e.Row.Owner, e.Row.Cents)
	}
	fmt.Println("more:", page.Next != "", err)
	page, err = query.List(ctx, app, balances, append(options, query.After(page.Next))...)
	for _, e := range page.Entries {
		fmt.Println(e.Key, e.Row.Owner, e.Row.Cents)
	}
	fmt.Println("more:", page.Next != "", err)
	// Output:
	// 1 Ann 500
	// 3 Ann 900
	// more: false <nil>
	// 3 Ann 900
	// 1 Ann 500
	// more: true <nil>
	// 2 Bob 70
	// more: false <nil>
}

// The rows of one owner by balance, with an index of two keys.
func ExampleBy_composite() {
	ctx := context.Background()
	byOwnerAndCents := projection.CompositeIndex("owner-cents",
		projection.Index("owner", func(b balance) string { return b.Owner }),
		projection.Index("cents", func(b balance) int64 { return b.Cents }))
	balances := newBalances().Indexed(byOwnerAndCents)
	app := start(&testing.B{}, balances)
	defer app.stop()
	app.put(&testing.B{}, "1", opened{"Ann"}, deposited{900})
	app.put(&testing.B{}, "2", opened{"Bob"}, deposited{70})
	app.put(&testing.B{}, "3", opened{"Ann"}, deposited{20})
	receipt := app.put(&testing.B{}, "4", opened{"Ann"}, deposited{500})

	for e, err := range query.All(ctx, app, balances, query.By(byOwnerAndCents.In("Ann").Above(20)), query.AtLeast(receipt)) {
		fmt.Println(e.Key, e.Row.Cents, err)
	}
	// Output:
	// 4 500 <nil>
	// 1 900 <nil>
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
