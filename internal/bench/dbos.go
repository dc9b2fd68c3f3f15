package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
)

func init() {
	register("dbos-postgres", benchCase{
		peer: "github.com/dbos-inc/dbos-transact-golang", workload: "saga", store: "postgres", unit: "workflows",
		guarantees: "steps at least once; no event log",
		open:       openDBOS,
	})
}

// openDBOS keeps a number of workflows of three steps going. They are run by the
// process that starts them, without a queue in between, and with as many
// connections as there are callers instead of the default of 20.
func openDBOS(ctx context.Context, p params) (*job, error) {
	pool, err := openPool(ctx, p)
	if err != nil {
		return nil, err
	}
	setting, err := durability(ctx, pool)
	if err != nil {
		pool.Close()
		return nil, err
	}
	c, err := dbos.NewContext(ctx, dbos.Config{
		AppName: "bench", SystemDBPool: pool, ApplicationVersion: "bench", ExecutorID: "bench",
		Logger: slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError + 1})),
	})
	if err != nil {
		pool.Close()
		return nil, err
	}
	step := func(context.Context) (int, error) { return 1, nil }
	saga := func(ctx dbos.Context, order string) (int, error) {
		steps := 0
		for range workflowSteps {
			n, err := dbos.RunAsStep(ctx, step, dbos.WithStepName("step"))
			if err != nil {
				return 0, fmt.Errorf("order %s: %w", order, err)
			}
			steps += n
		}
		return steps, nil
	}
	dbos.RegisterWorkflow(c, saga, dbos.WithWorkflowName("saga"))
	stop := func() error {
		err := dbos.Shutdown(c, 10*time.Second)
		pool.Close()
		return err
	}
	if err := dbos.Launch(c); err != nil {
		return nil, errors.Join(err, stop())
	}
	return &job{
		durability: setting,
		notes:      fmt.Sprintf("%d steps each, %d workflows at once", workflowSteps, p.Writers),
		close:      stop,
		op: func(_ context.Context, _ int) (int, error) {
			handle, err := dbos.RunWorkflow(c, saga, newID().String())
			if err != nil {
				return 0, err
			}
			steps, err := handle.GetResult()
			if err == nil && steps != workflowSteps {
				err = fmt.Errorf("a workflow had %d steps, not %d", steps, workflowSteps)
			}
			return 1, err
		},
		verify: func(ctx context.Context, done int64) error {
			if err := countRows(ctx, pool, "SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'", done); err != nil {
				return err
			}
			return countRows(ctx, pool, "SELECT count(*) FROM dbos.operation_outputs", workflowSteps*done)
		},
	}, nil
}
