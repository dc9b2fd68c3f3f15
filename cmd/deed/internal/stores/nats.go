package stores

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	client "github.com/nats-io/nats.go"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/nats"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/natsserver"
)

// quiet: bench tells about durability with its results, and the other commands
// write nothing.
var quiet = nats.Logger(slog.New(slog.DiscardHandler))

// openNATS opens nats://…, a stream on a server. nats: and nats:FOLDER run a
// server in this process, which syncs every commit, with its files in a
// temporary folder or in that one.
func openNATS(_ context.Context, dsn string, mode Mode) (eventstore.Opener, error) {
	if strings.Contains(dsn, "://") {
		if mode == Existing {
			return nats.URL(dsn, nats.WithoutCreation(), quiet), nil
		}
		return nats.URL(dsn, quiet), nil
	}
	folder := after(dsn)
	return opener(func(ctx context.Context) (_ eventstore.Store, err error) {
		server, err := natsserver.Start(natsserver.Options{Directory: folder, SyncAlways: true})
		if err != nil {
			return nil, err
		}
		system, err := client.Connect(server.SystemURL()) // knows that it syncs
		if err != nil {
			server.Close()
			return nil, err
		}
		store, err := nats.Open(ctx, server.URL(), nats.SystemConn(system))
		if err != nil {
			system.Close()
			server.Close()
			return nil, err
		}
		return embedded{store, func() { system.Close(); server.Close() }}, nil
	}), nil
}

// embedded is a store whose server ends with it.
type embedded struct {
	*nats.Store
	stop func()
}

// Unwrap returns the store itself.
func (e embedded) Unwrap() eventstore.Store { return e.Store }

// Close closes the store and stops its server.
func (e embedded) Close() error {
	err := e.Store.Close()
	e.stop()
	return err
}

// Temporary opens an SQLite file that is removed when it is closed.
func Temporary() eventstore.Opener {
	return opener(func(ctx context.Context) (eventstore.Store, error) {
		dir, err := os.MkdirTemp("", "deed-")
		if err != nil {
			return nil, err
		}
		store, err := sqlite.Open(ctx, filepath.Join(dir, "state.db"))
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
		return temporary{store, dir}, nil
	})
}

type temporary struct {
	*sqlite.Store
	dir string
}

// Close closes the file and removes it.
func (t temporary) Close() error { return errors.Join(t.Store.Close(), os.RemoveAll(t.dir)) }
