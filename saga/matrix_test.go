package saga_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/nats"
	"github.com/deed-go/deed/eventstore/postgres"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/natsserver"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
	"github.com/deed-go/deed/saga/sagatest"
)

var (
	approval = saga.NewSignal[string]("approval")
	hurry    = saga.NewSignal[bool]("hurry")
)

// packing is the child of everything.
var packing = saga.Define("packing", func(s *saga.Run, sku string) (string, error) {
	if err := saga.Execute(s, "take", stocks, Reserve{sku, "parcel of " + s.ID()}); err != nil {
		return "", err
	}
	if err := s.Sleep("pack", time.Hour); err != nil {
		return "", err
	}
	return "packed " + sku, nil
})

// survey begins anew until it has asked three times.
var survey = saga.Define("survey", func(s *saga.Run, n int) (int, error) {
	if err := saga.Execute(s, "ask", stocks, Release{"survey", s.ID()}); err != nil {
		return 0, err
	}
	if err := s.Until("answered", s.Now().Add(time.Hour)); err != nil {
		return 0, err
	}
	if n < 2 {
		return 0, s.Continue(n + 1)
	}
	return n, nil
})

// everything is a saga with every kind of step. A "pen" fails at the end, and
// all is rolled back.
func everything(g *gateway) *saga.Definition[string, string] {
	return saga.Define("everything", func(s *saga.Run, sku string) (string, error) {
		s.Publish("stage", "began")
		s.OnRollback("never", func(*saga.Run) error { return errors.New("it was settled") })
		s.Settled()
		number := saga.Local(s, "number", func() int { return 7 })
		if err := saga.Execute(s, "reserve", stocks, Reserve{sku, s.ID()}); err != nil {
			return "", err
		}
		s.OnRollback("release", func(s *saga.Run) error {
			return saga.Execute(s, "release", stocks, Release{sku, s.ID()})
		})
		_, err := saga.Once(s, "notify", func(step saga.Step) (int, error) { return 0, g.call("notify", step.IdempotencyKey()) })
		if err != nil && !errors.Is(err, saga.ErrOutcomeUnknown) {
			return "", err
		}
		s.OnRollback("unbook", func(s *saga.Run) error {
			_, err := saga.Tx(s, "unbook", func(_ saga.Step, tx projection.Tx) (int, error) { return book(tx, s.ID(), -1) })
			return err
		})
		booked, err := saga.Tx(s, "book", func(_ saga.Step, tx projection.Tx) (int, error) { return book(tx, s.ID(), 1) })
		if err != nil {
			return "", err
		}
		if err := s.Sleep("pause", time.Minute); err != nil {
			return "", err
		}
		var shipped Shipped
		var packed string
		err = saga.All(s, "side by side", func(s *saga.Run) error {
			s.OnRollback("refund", func(s *saga.Run) error {
				_, err := saga.Do(s, "refund", func(step saga.Step) (int, error) { return 0, g.call("refund", step.IdempotencyKey()) })
				return err
			})
			_, err := saga.Do(s, "charge", func(step saga.Step) (int, error) {
				if step.Attempt() == 1 {
					return 0, errors.New("try again")
				}
				return 0, g.call("charge", step.IdempotencyKey())
			})
			return err
		}, func(s *saga.Run) (err error) {
			shipped, err = saga.Await[Shipped](s, saga.Where(s.ID()), 14*day)
			return err
		}, func(s *saga.Run) (err error) {
			packed, err = saga.Child(s, "parcel", packing, "", sku)
			return err
		})
		if err != nil {
			return "", err
		}
		by, err := approval.Wait(s, day)
		if err != nil {
			return "", err
		}
		winner, err := saga.Race(s, "patience", func(s *saga.Run) error {
			_, err := hurry.Wait(s, 0)
			return err
		}, func(s *saga.Run) error {
			return s.Sleep("patience", 30*day)
		})
		if err != nil {
			return "", err
		}
		if s.Version("mail", 1) >= 1 {
			if _, err := saga.Do(s, "mail", func(step saga.Step) (int, error) { return 0, g.call("mail", step.IdempotencyKey()) }); err != nil {
				return "", err
			}
		}
		if _, err := saga.StartChild(s, "survey", survey, "", 0); err != nil {
			return "", err
		}
		s.Publish("stage", "done")
		if sku == "pen" {
			return "", errDeclined
		}
		return fmt.Sprint(number, booked, shipped.Parcel, packed, by, winner), nil
	}, saga.On(func(e Placed, r eventstore.Recorded) (string, string) { return r.Stream.ID, e.SKU }))
}

// book counts in a table of the state, in whatever form the backend has one.
func book(tx projection.Tx, run string, n int) (int, error) {
	state := tx.(projection.StateTx) //nolint:forcetypeassert,errcheck // of every backend
	raw, _, err := state.Get("test.books", run)
	if err != nil {
		return 0, err
	}
	had, _ := strconv.Atoi(string(raw))
	return had + n, state.Put("test.books", run, []byte(strconv.Itoa(had+n)))
}

func booked(t testing.TB, store projection.State, run string) string {
	t.Helper()
	var value []byte
	require.NoError(t, store.View(t.Context(), func(tx projection.StateTx) (err error) {
		value, _, err = tx.Get("test.books", run)
		return err
	}))
	return string(value)
}

// A saga that uses every kind of step is killed before and after each write, and
// goes on in another engine: it comes out the same, on every backend. Unless
// DEED_TEST_LONG is set it is killed at some of the writes only.
func TestMatrix_EveryStep(t *testing.T) {
	t.Parallel()
	crashMatrix(t, func(testing.TB) sagatest.Backend { return memory.New() }, someWrites(3))
}

func TestMatrix_EveryStep_SQLite(t *testing.T) {
	t.Parallel()
	crashMatrix(t, func(t testing.TB) sagatest.Backend { return openSQLite(t) }, someWrites(19))
}

func TestMatrix_EveryStep_Postgres(t *testing.T) {
	t.Parallel()
	crashMatrix(t, func(t testing.TB) sagatest.Backend {
		store, err := postgres.Open(context.WithoutCancel(t.Context()), pgtest.Database(t))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, store.Close()) })
		return store
	}, someWrites(47))
}

// The log is in NATS, and the state in SQLite.
func TestMatrix_EveryStep_NATS(t *testing.T) {
	t.Parallel()
	server, err := natsserver.Start(natsserver.Options{})
	require.NoError(t, err)
	t.Cleanup(server.Close)
	logs := 0
	crashMatrix(t, func(t testing.TB) sagatest.Backend {
		logs++
		log, err := nats.Open(context.WithoutCancel(t.Context()), server.URL(), nats.Stream(fmt.Sprint("matrix", logs)), nats.Logger(slog.New(slog.DiscardHandler)))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, log.Close()) })
		return struct {
			eventstore.Store
			projection.State
		}{log, openSQLite(t)}
	}, someWrites(47))
}

func openSQLite(t testing.TB) *sqlite.Store {
	store, err := sqlite.Open(context.WithoutCancel(t.Context()), filepath.Join(t.TempDir(), "deed.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	return store
}

// someWrites spares crashes where the time is short.
func someWrites(every int) sagatest.Option {
	if os.Getenv("DEED_TEST_LONG") != "" {
		every = 1
	}
	return sagatest.Every(every)
}

func crashMatrix(t *testing.T, open func(testing.TB) sagatest.Backend, options ...sagatest.Option) {
	t.Helper()
	var g *gateway
	var store sagatest.Backend
	sagatest.CrashEverywhere(t, func() saga.Process {
		g = newGateway()
		return everything(g)
	}, func(s *sagatest.Spec) {
		s.Given("stock", "book", Stocked{2}).Given("stock", "pen", Stocked{2}).Given("stock", "cup", Stocked{2}).
			When("order", "o1", Placed{"book"}).
			When("order", "o2", Placed{"pen"}).
			When("order", "o3", Placed{"cup"}).
			Signal("o1", "approval", "ann").
			Advance(10*time.Minute).
			Cancel("o3", "changed their mind").
			Cancelled("o3", "side by side.0@refund", "unbook", "release").
			Advance(2*time.Hour).
			When("order", "o1", Shipped{"p1"}).
			When("order", "o2", Shipped{"p2"}).
			Signal("o2", "approval", "bob").
			Signal("o1", "hurry", true).
			Advance(31*day).
			Completed("o1", "7 1p1packed bookann0").
			Failed("o2", errDeclined, "side by side.0@refund", "unbook", "release").
			Published("o1", "stage", "done")
	}, func(t testing.TB) {
		g.mu.Lock()
		defer g.mu.Unlock()
		require.LessOrEqual(t, len(g.calls["notify"]), 3, "once for each run")
		require.Equal(t, len(g.calls["notify"]), len(unique(g.calls["notify"])), "no run notified twice")
		require.Len(t, unique(g.calls["charge"]), 3, "one key for each run")
		require.Len(t, unique(g.calls["mail"]), 2)
		require.Len(t, unique(g.calls["refund"]), 2)
		require.Equal(t, "1", booked(t, store, "o1"))
		require.Equal(t, "0", booked(t, store, "o2"))
		require.Equal(t, "0", booked(t, store, "o3"))
	}, append(options, sagatest.Also(packing, survey), sagatest.On(func(t testing.TB) sagatest.Backend {
		store = open(t)
		return store
	}))...)
}

func unique(keys []string) map[string]bool {
	set := map[string]bool{}
	for _, key := range keys {
		set[key] = true
	}
	return set
}
