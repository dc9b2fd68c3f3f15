// Package engine opens the database that an example is told to run on. It is
// all that an example has to know about engines: its domain code is the same on
// each. It may import the backends, and is there for examples only: a program
// of your own imports the one backend it uses, and gives that to deed.Start.
package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	client "github.com/nats-io/nats.go"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/nats"
	"github.com/deed-go/deed/eventstore/postgres"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/natsserver"
	"github.com/deed-go/deed/projection"
)

// Usage says what Open takes.
const Usage = "sqlite:FILE, postgres://…, nats://HOST:4222/?stream=NAME, nats:FOLDER (a server in this process), esdb://HOST:2113?tls=false"

// Engine is an open database.
type Engine struct {
	// Name is that of the backend.
	Name string
	// Store is the log.
	Store eventstore.Store
	// Parts are what deed.Start needs to know besides.
	Parts []deed.Part

	closing []func() error
}

// Open opens the named database. NATS and EventStoreDB keep events only: read
// models are then kept in the SQLite file called state, or in memory, from
// where they are made anew at each start, if there is none.
func Open(ctx context.Context, name, state string) (_ *Engine, err error) {
	scheme, rest, ok := strings.Cut(name, ":")
	if !ok {
		return nil, fmt.Errorf("%w: the store %q: say %s", eventstore.ErrInvalid, name, Usage)
	}
	e := &Engine{Name: scheme}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	switch scheme {
	case "sqlite":
		return e, e.open(ctx, sqlite.File(rest))
	case "postgres", "postgresql":
		e.Name = "postgres"
		return e, e.open(ctx, postgres.URL(name))
	case "esdb", "esdb+discover":
		e.Name = "esdb"
		err = e.open(ctx, esdb.URL(name))
	case "nats":
		if strings.HasPrefix(rest, "//") {
			err = e.open(ctx, nats.URL(name))
		} else {
			err = e.embed(ctx, rest)
		}
	default:
		return nil, fmt.Errorf("%w: the store %q: say %s", eventstore.ErrInvalid, name, Usage)
	}
	if err != nil {
		return nil, err
	}
	return e, e.keep(ctx, state)
}

func (e *Engine) open(ctx context.Context, source eventstore.Opener) (err error) {
	if e.Store, err = source.Open(ctx); err != nil {
		return err
	}
	if closer, ok := e.Store.(io.Closer); ok {
		e.closing = append(e.closing, closer.Close)
	}
	return nil
}

// embed runs a NATS server in this process, which syncs every commit.
func (e *Engine) embed(ctx context.Context, folder string) error {
	server, err := natsserver.Start(natsserver.Options{Directory: folder, SyncAlways: true})
	if err != nil {
		return err
	}
	e.closing = append(e.closing, func() error { server.Close(); return nil })
	system, err := client.Connect(server.SystemURL()) // knows that it syncs
	if err != nil {
		return err
	}
	e.closing = append(e.closing, func() error { system.Close(); return nil })
	return e.open(ctx, nats.URL(server.URL(), nats.SystemConn(system)))
}

// keep opens what keeps the read models.
func (e *Engine) keep(ctx context.Context, file string) error {
	if file == "" {
		e.Parts = append(e.Parts, deed.State(memory.New()))
		return nil
	}
	store, err := sqlite.Open(ctx, file)
	if err != nil {
		return err
	}
	e.closing = append(e.closing, store.Close)
	var state projection.State = store
	e.Parts = append(e.Parts, deed.State(state))
	return nil
}

// Close closes what was opened, the last first.
func (e *Engine) Close() error {
	var failed []error
	for i := len(e.closing) - 1; i >= 0; i-- {
		failed = append(failed, e.closing[i]())
	}
	e.closing = nil
	return errors.Join(failed...)
}
