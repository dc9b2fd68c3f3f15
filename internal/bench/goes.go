package main

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	pgx4 "github.com/jackc/pgx/v4/pgxpool"
	"github.com/modernice/goes/aggregate"
	"github.com/modernice/goes/aggregate/repository"
	goes "github.com/modernice/goes/backend/postgres"
	"github.com/modernice/goes/codec"
	"github.com/modernice/goes/event"
)

func init() {
	register("goes-execute", benchCase{
		peer: "github.com/modernice/goes", workload: "execute", store: "postgres", unit: "commands",
		guarantees: "no positions: events are ordered by time; conflicts come as raw unique violations; loads the stream for each command",
		open:       openGoes,
	})
}

const (
	goesAggregate = "order"
	goesEvents    = 10 // events in an aggregate when a command comes, on average, unless told otherwise
)

// goesOrder is an aggregate that folds something, so that loading it means
// decoding its events.
type goesOrder struct {
	*aggregate.Base
	cents  int64
	events int
}

func newGoesOrder(id uuid.UUID) *goesOrder {
	o := &goesOrder{Base: aggregate.New(goesAggregate, id)}
	event.ApplyWith(o, o.placed, orderType)
	return o
}

func (o *goesOrder) placed(e event.Of[order]) {
	o.cents += e.Data().Cents
	o.events++
}

type goesPlace struct {
	id uuid.UUID
	n  int // commands it has had
}

// openGoes sends commands through the repository, as the library's handlers
// do: load the aggregate, decide, append. An aggregate gets twenty commands,
// then there is a new one, so that the streams loaded have ten events on
// average. A caller has one at a time, or its part of p.Streams in turn.
func openGoes(ctx context.Context, p params) (*job, error) {
	data, _, err := newOrder(p.Payload)
	if err != nil {
		return nil, err
	}
	config, err := pgx4.ParseConfig(p.Store)
	if err != nil {
		return nil, fmt.Errorf("the database %q: %w", p.Store, err)
	}
	config.MaxConns = int32(p.Conns)
	pool, err := pgx4.ConnectConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	registry := codec.New()
	codec.Register[order](registry, orderType)
	store := goes.NewEventStore(registry, goes.Pool(pool))
	if err := store.Connect(ctx); err != nil {
		pool.Close()
		return nil, err
	}
	var fsync, commit string
	if err := pool.QueryRow(ctx, "SELECT current_setting('fsync'), current_setting('synchronous_commit')").Scan(&fsync, &commit); err != nil {
		pool.Close()
		return nil, err
	}
	orders := repository.Typed(repository.New(store), newGoesOrder)
	length := p.Events
	if length == 0 {
		length = goesEvents
	}
	places := make([][]goesPlace, p.Writers)
	prepared := int64(0)
	for w := range places {
		places[w] = make([]goesPlace, max(1, p.Streams/p.Writers))
		if len(places[w]) == 1 {
			continue
		}
		// As many events as each would have by now if commands had gone on for long.
		for i := range places[w] {
			at := &places[w][i]
			at.id, at.n = newID(), 2*length*i/len(places[w])
			if at.n == 0 {
				continue
			}
			err := orders.Use(ctx, at.id, func(o *goesOrder) error {
				for range at.n {
					aggregate.Next(o, orderType, data)
				}
				return nil
			})
			if err != nil {
				pool.Close()
				return nil, err
			}
			prepared += int64(at.n)
		}
	}
	turns := make([]int, p.Writers)
	return &job{
		durability: "fsync=" + fsync + ", synchronous_commit=" + commit,
		notes:      fmt.Sprintf("streams of %d on average, %d at once", length, max(p.Writers, p.Streams)),
		close: func() error {
			pool.Close()
			return nil
		},
		op: func(ctx context.Context, worker int) (int, error) {
			at := &places[worker][turns[worker]%len(places[worker])]
			turns[worker]++
			if at.n%(2*length) == 0 {
				at.id = newID()
			}
			known := at.n % (2 * length)
			err := orders.Use(ctx, at.id, func(o *goesOrder) error {
				if o.events != known {
					return fmt.Errorf("aggregate %s has %d events, not %d", at.id, o.events, known)
				}
				aggregate.Next(o, orderType, data)
				return nil
			})
			if err == nil {
				at.n++
			}
			return 1, err
		},
		verify: func(ctx context.Context, done int64) error {
			var n int64
			if err := pool.QueryRow(ctx, "SELECT count(*) FROM events").Scan(&n); err != nil {
				return err
			}
			if n != done+prepared {
				return fmt.Errorf("the table has %d events, but there were %d, and %d commands were executed", n, prepared, done)
			}
			return nil
		},
	}, nil
}
