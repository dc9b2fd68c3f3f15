// Esdb runs a command with an EventStoreDB server, ours, over a SQLite file; the
// server's URL is in ESDB_URL, and $ESDB_URL in the command's arguments is
// replaced by it. Without a command it serves until it is interrupted, and prints
// the URL.
//
//	go run ./.ci/esdb events.db [command ...]
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"

	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/esdbserver"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: esdb events.db [command ...]")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1], os.Args[2:])
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "esdb:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, file string, command []string) error {
	store, err := sqlite.Open(ctx, file)
	if err != nil {
		return err
	}
	defer store.Close()
	server, err := esdbserver.Start(store)
	if err != nil {
		return err
	}
	defer server.Close()
	if len(command) == 0 {
		fmt.Println(server.URL())
		<-ctx.Done()
		return nil
	}
	for i := range command {
		command[i] = strings.ReplaceAll(command[i], "$ESDB_URL", server.URL())
	}
	c := exec.CommandContext(ctx, command[0], command[1:]...)
	c.Env = append(os.Environ(), "ESDB_URL="+server.URL())
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	return c.Run()
}
