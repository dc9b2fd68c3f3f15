package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

func init() {
	register("river-postgres", benchCase{
		peer: "github.com/riverqueue/river", workload: "saga", store: "postgres", unit: "jobs completed",
		guarantees: "a job queue: no event log, no order among jobs; a job is one step, at least once",
		open:       openRiver,
	})
}

type riverOrder struct {
	Order order `json:"order"`
}

func (riverOrder) Kind() string { return "order" }

type riverWorker struct {
	river.WorkerDefaults[riverOrder]
}

func (riverWorker) Work(context.Context, *river.Job[riverOrder]) error { return nil }

// openRiver inserts jobs one by one and works them in the same process, with
// the settings of the library's own benchmark: 2,000 workers, fetching every
// 2 ms. Defaults would measure the pauses between fetches. A job counts when its
// completion is stored, which the library does in batches after the work.
func openRiver(ctx context.Context, p params) (*job, error) {
	data, _, err := newOrder(p.Payload)
	if err != nil {
		return nil, err
	}
	pool, err := openPool(ctx, p)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*job, error) {
		pool.Close()
		return nil, err
	}
	setting, err := durability(ctx, pool)
	if err != nil {
		return fail(err)
	}
	driver := riverpgxv5.New(pool)
	silent := slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError + 1}))
	migrator, err := rivermigrate.New(driver, &rivermigrate.Config{Logger: silent})
	if err != nil {
		return fail(err)
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return fail(err)
	}
	workers := river.NewWorkers()
	river.AddWorker(workers, &riverWorker{})
	c, err := river.NewClient(driver, &river.Config{
		Logger: silent, Workers: workers,
		FetchCooldown: 2 * time.Millisecond, FetchPollInterval: 20 * time.Millisecond,
		Queues: map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 2000}},
	})
	if err != nil {
		return fail(err)
	}
	// The channel drops what it has no room for; verify would notice.
	completions, unsubscribe := c.SubscribeConfig(&river.SubscribeConfig{
		ChanSize: 100_000, Kinds: []river.EventKind{river.EventKindJobCompleted},
	})
	var (
		completed atomic.Int64
		counter   sync.WaitGroup
	)
	counter.Go(func() {
		for range completions {
			completed.Add(1)
		}
	})
	if err := c.Start(ctx); err != nil {
		unsubscribe()
		return fail(err)
	}
	return &job{
		durability: setting,
		notes:      "latency is that of inserting",
		finished:   completed.Load,
		close: func() error {
			ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
			defer cancel()
			err := c.Stop(ending)
			unsubscribe()
			counter.Wait()
			pool.Close()
			return err
		},
		op: func(ctx context.Context, _ int) (int, error) {
			_, err := c.Insert(ctx, riverOrder{Order: data}, nil)
			return 1, err
		},
		verify: func(ctx context.Context, done int64) error {
			return eventually(ctx, func() error {
				if n := completed.Load(); n != done {
					return fmt.Errorf("%d jobs were completed, but %d inserted", n, done)
				}
				return countRows(ctx, pool, "SELECT count(*) FROM river_job WHERE state = 'completed'", done)
			})
		},
	}, nil
}
