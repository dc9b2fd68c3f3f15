// Package query reads what projections have made: single rows, lists, whole
// views, and answers of typed handlers that look at several of them at once.
//
// It may import projection and eventstore.
//
// # Reading views
//
//	b, err := query.Get(ctx, app, balances, "ann")
//	page, err := query.List(ctx, app, balances, query.Prefix("a"), query.Limit(20))
//	for entry, err := range query.All(ctx, app, balances) { … }
//
// [Where] and [OrderBy] look at every row. [By] reads an index that the view
// declares, or a part of it, in its order and page by page, and looks at no others:
//
//	var byOwner = projection.Index("owner", func(b Balance) string { return b.Owner })
//	var byCents = projection.Index("cents", func(b Balance) int64 { return b.Cents })
//	var balances = projection.Of("balances", accounts).Indexed(byOwner, byCents)
//
//	page, err := query.List(ctx, app, balances, query.By(byOwner.Is("ann")))
//	page, err = query.List(ctx, app, balances, query.By(byCents.AtLeast(100)), query.Backward(), query.Limit(20))
//	page, err = query.List(ctx, app, balances, query.By(byCents.AtLeast(100)), query.Backward(), query.Limit(20), query.After(page.Next))
//
// A page costs what its rows cost, however many there are before it. Together with
// By, Where passes by what it does not keep, and OrderBy sorts what the index finds.
//
// Read models follow the log; a query right after a command may not see its
// effect yet. [AtLeast] waits until it does:
//
//	receipt, err := deed.Execute(ctx, app, accounts, Deposit{"ann", 500})
//	b, err := query.Get(ctx, app, balances, "ann", query.AtLeast(receipt))
//
// It waits for five seconds, or as long as [Within] says, and then fails with a
// [*TimeoutError] that names the view, the wanted and the reached position.
//
// # Typed handlers
//
// A [Handler] is a query with a name, a question and an answer. It reads
// through a [Reader]: [Get], [List] and [All] work on it as they do on the
// application, and [Reader.Query] runs SQL, all on one snapshot:
//
//	var richest = query.Handle("richest", func(ctx context.Context, r query.Reader, q Richest) ([]string, error) {
//		page, err := query.List(ctx, r, balances, query.OrderBy(byCents), query.Limit(q.Count))
//		…
//	}, balances)
//
//	names, err := query.Ask(ctx, app, richest, Richest{Count: 3})
package query
