package logreader_test

import (
	"context"
	"iter"
	"os"
	"path/filepath"
	"testing"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/eventstore/storetest"
	"github.com/deed-go/deed/internal/logreader"
	"github.com/deed-go/deed/internal/matrix"
)

// through is a store whose subscriptions go through one reader.
type through struct {
	storetest.Store
	reader *logreader.Reader
}

func (s through) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return s.reader.Subscribe(ctx, q, after)
}

// Unwrap keeps the optional powers.
func (s through) Unwrap() eventstore.Store { return s.Store }

// A store that is read through a reader is a store: by the whole suite, also
// with windows that hold next to nothing.
func TestReader_IsAStore(t *testing.T) {
	inMemory := func(testing.TB) storetest.Opener {
		return func() (storetest.Store, error) { return memory.New(), nil }
	}
	inFile := func(t testing.TB) storetest.Opener {
		path := filepath.Join(t.TempDir(), "log.db")
		return func() (storetest.Store, error) { return sqlite.Open(t.Context(), path) }
	}
	for _, c := range []struct {
		name, backend string
		open          storetest.Harness
		options       logreader.Options
	}{
		{"Memory", "memory", inMemory, logreader.Options{}},
		{"SQLite", "sqlite", inFile, logreader.Options{}},
		{"Memory_NoWindow", "memory", inMemory, logreader.Options{Events: 1, Bytes: 1}},
		{"SQLite_SmallWindow", "sqlite", inFile, logreader.Options{Events: 30, Bytes: 4096}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "SQLite" && os.Getenv("DEED_TEST_LONG") == "" {
				t.Skip("the small window asks for more; set DEED_TEST_LONG=1 for this one")
			}
			storetest.Run(t, func(t testing.TB) storetest.Opener {
				opener := c.open(t)
				return func() (storetest.Store, error) {
					store, err := opener()
					if err != nil {
						return nil, err
					}
					return through{store, logreader.New(store, c.options)}, nil
				}
			}, matrix.Of(c.backend))
		})
	}
}
