// Mail shows how to send an e-mail reliably after something has happened: an
// order is placed, and its customer must get a welcome, even if the process
// dies in between. The whole of it is one reaction, see reaction.go; there is
// no queue to run.
//
// The mail goes by SMTP to a small server that the program starts itself, on
// the loopback interface, and which puts what it gets into a folder.
//
//	go run ./examples/mail
//
// To see it survive, give it a place to keep things, kill it between the
// order and the mail, and start it again:
//
//	go run ./examples/mail -dir shop -crash before
//	go run ./examples/mail -dir shop
//
// With -crash after it dies when the server has accepted the mail but the
// program has not yet recorded so. It then sends the mail again, which nobody
// can avoid, but under the same Message-ID, by which the mailbox knows it.
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
	"sync"
	"time"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/examples/internal/engine"
	"github.com/deed-go/deed/examples/internal/mailbox"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := program(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "mail: %v\n", err)
		os.Exit(1)
	}
}

// program is main with everything it touches handed in.
func program(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("mail", flag.ContinueOnError)
	flags.SetOutput(stderr)
	dir := flags.String("dir", "", "the `FOLDER` for the database and the mailbox (default: a temporary one)")
	order := flags.String("order", "order-1", "the `ID` of the order to place")
	store := flags.String("store", "", "the `ENGINE` to run on, instead of a file in the folder: "+engine.Usage)
	crash := flags.String("crash", "", "kill the process `WHEN` the mail is to be sent: before, or after the server has accepted it")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if *crash != "" && *crash != "before" && *crash != "after" {
		return fmt.Errorf("-crash %q: say before or after", *crash)
	}
	if *dir == "" {
		if *dir, err = os.MkdirTemp("", "mail-"); err != nil {
			return err
		}
		defer os.RemoveAll(*dir)
	}

	stdout = &lines{to: stdout}
	inbox, err := mailbox.Start(filepath.Join(*dir, "mailbox"), stdout)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, inbox.Close()) }()

	mailer := Mailer{Port: inbox.Port}
	switch *crash {
	case "before":
		mailer.Before = dieHard
	case "after":
		mailer.After = dieHard
	}
	if *store == "" {
		*store = "sqlite:" + filepath.Join(*dir, "shop.db")
	}
	on, err := engine.Open(ctx, *store, filepath.Join(*dir, "state.db"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, on.Close()) }()
	app, err := deed.Start(ctx, eventstore.Opened(on.Store), append(on.Parts, orders, welcome(mailer))...)
	if err != nil {
		return err
	}
	defer func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, app.Stop(grace))
	}()

	receipt, err := deed.Execute(ctx, app, orders, Place{Order: *order, Name: "Ann", Email: "ann@example.com"})
	if err != nil {
		return err
	}
	if receipt.First == 0 { // nothing happened
		fmt.Fprintf(stdout, "%s was placed before\n", *order)
	} else {
		fmt.Fprintf(stdout, "%s is placed\n", *order)
	}
	// A server would go on serving. Here we wait until all that the order causes is
	// done, or waits for its next attempt.
	if err := app.Settle(ctx); err != nil {
		return err
	}
	late, err := app.Sagas().Backlogs(ctx, "welcome")
	if err != nil {
		return err
	}
	if len(late) > 0 {
		return fmt.Errorf("the mail could not be sent yet, and is tried again after the next start: %s", late[0].Error)
	}
	return nil
}

// lines lets the program and the mailbox print at the same time.
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
