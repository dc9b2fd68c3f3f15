// Checkout is a whole process of a shop as one function, see checkout.go: an
// article is reserved, a card is charged, the parcel is awaited for up to two
// weeks, the customer gets mail; and when something of that fails, what was
// done before is undone.
//
// The program tells four orders: one that completes, one whose card is
// declined, one that is never shipped, and one whose customer cancels. It
// starts what they need itself, on the loopback interface: a payment gateway
// with a ledger, and a mail server. Time is the program's own, so two weeks
// pass at once.
//
//	go run ./examples/checkout
//
// To see it survive, give it a place to keep things, kill it at some point, and
// start it again:
//
//	go run ./examples/checkout -dir shop -crash after-charge
//	go run ./examples/checkout -dir shop
//
// After after-charge the gateway has taken the money, and the program has not
// recorded so: it charges again, which nobody can avoid, but under the same key,
// by which the gateway knows it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/examples/internal/engine"
	"github.com/deed-go/deed/examples/internal/mailbox"
	"github.com/deed-go/deed/saga"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := program(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "checkout: %v\n", err)
		os.Exit(1)
	}
}

// points are where the process can be killed.
var points = []string{"before-charge", "after-charge", "before-refund", "after-refund", "before-mail", "after-mail"}

// program is main with everything it touches handed in.
func program(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("checkout", flag.ContinueOnError)
	flags.SetOutput(stderr)
	dir := flags.String("dir", "", "the `FOLDER` for the database, the ledger and the mailbox (default: a temporary one)")
	store := flags.String("store", "", "the `ENGINE` to run on, instead of a file in the folder: "+engine.Usage)
	crash := flags.String("crash", "", "kill the process at the `POINT`: "+strings.Join(points, ", "))
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if *crash != "" && !slices.Contains(points, *crash) {
		return fmt.Errorf("-crash %q: say one of %s", *crash, strings.Join(points, ", "))
	}
	if *dir == "" {
		if *dir, err = os.MkdirTemp("", "checkout-"); err != nil {
			return err
		}
		defer os.RemoveAll(*dir)
	}

	// The world outside.
	stdout = &lines{to: stdout}
	inbox, err := mailbox.Start(filepath.Join(*dir, "mailbox"), stdout)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, inbox.Close()) }()
	bank, err := openGateway(filepath.Join(*dir, "ledger.jsonl"), stdout)
	if err != nil {
		return err
	}
	url, closeBank, err := bank.serve()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeBank()) }()
	at := func(point string) {
		if point == *crash {
			dieHard()
		}
	}
	checkouts := checkout(Shop{Payments: Payments{URL: url, At: at}, Mail: Mailer{Port: inbox.Port, At: at}})

	// The application.
	if *store == "" {
		*store = "sqlite:" + filepath.Join(*dir, "shop.db")
	}
	on, err := engine.Open(ctx, *store, filepath.Join(*dir, "state.db"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, on.Close()) }()
	now, err := lastTime(ctx, on.Store)
	if err != nil {
		return err
	}
	app, err := deed.Start(ctx, eventstore.Opened(on.Store), append(on.Parts, deed.ManualClock(now), stocks, orders, checkouts)...)
	if err != nil {
		return err
	}
	defer func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, app.Stop(grace))
	}()
	return story(ctx, app, checkouts, stdout)
}

// lastTime is that of the last event: the program's own time goes on from
// there.
func lastTime(ctx context.Context, store eventstore.Store) (time.Time, error) {
	for last, err := range store.Read(ctx, eventstore.All(), eventstore.ReadOptions{Backward: true, Limit: 1}) {
		return last.Time, err
	}
	return time.Date(2026, 1, 1, 9, 0, 0, 0, time.UTC), nil
}

// story tells four orders. It can be told again after it was cut off anywhere:
// what has happened does not happen again.
func story(ctx context.Context, app *deed.App, checkouts *saga.Definition[OrderPlaced, Receipt], out io.Writer) error {
	if _, err := deed.Execute(ctx, app, stocks, Fill{"lamp", 10}, command.Key("first delivery")); err != nil {
		return err
	}
	ids := []string{"order-1", "order-2", "order-3", "order-4"}
	for _, id := range ids {
		card := "golden"
		if id == "order-2" {
			card = "empty"
		}
		order := OrderPlaced{SKU: "lamp", Cents: 4900, Card: card, Name: "Ann", Email: "ann@example.com"}
		if _, err := deed.Execute(ctx, app, orders, Place{id, order}); err != nil {
			return err
		}
	}
	fmt.Fprintln(out, "four orders are placed")
	// A server would go on serving. Here we wait until everybody is done, or waits.
	if err := app.Settle(ctx); err != nil {
		return err
	}
	for _, id := range ids {
		stage, _, err := saga.View[string](ctx, app, checkouts, id, "stage")
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%s: %s\n", id, stage)
	}
	if _, err := deed.Execute(ctx, app, orders, Ship{"order-1", "parcel-77"}); err != nil {
		return err
	}
	fmt.Fprintln(out, "order-1 is shipped, the customer of order-4 has changed her mind, and two weeks go by")
	if err := app.Sagas().Cancel(ctx, checkouts.Name(), "order-4", "changed my mind"); err != nil && !errors.Is(err, saga.ErrFinished) {
		return err
	}
	if err := app.AdvanceTo(ctx, app.Now().Add(patience+time.Hour)); err != nil {
		return err
	}
	for _, id := range ids {
		info, err := saga.Look(ctx, app, checkouts, id)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%s: %s %s\n", id, info.Status, info.Error)
	}
	stock, _, err := deed.Load(ctx, app, stocks, "lamp")
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d lamps are free\n", stock.Free)
	return nil
}

// lines lets the program and its servers print at the same time.
type lines struct {
	mu sync.Mutex
	to io.Writer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.to.Write(p)
}

// dieHard ends the process as a power cut would: nothing is flushed, nothing
// deferred.
func dieHard() {
	self, err := os.FindProcess(os.Getpid())
	if err == nil {
		err = self.Kill()
	}
	if err != nil {
		panic(err)
	}
	select {}
}
