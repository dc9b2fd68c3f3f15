package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/cschleiden/go-workflows/backend"
	"github.com/cschleiden/go-workflows/backend/sqlite"
	"github.com/cschleiden/go-workflows/client"
	"github.com/cschleiden/go-workflows/worker"
	"github.com/cschleiden/go-workflows/workflow"
)

func init() {
	register("go-workflows-sqlite", benchCase{
		peer: "github.com/cschleiden/go-workflows", workload: "saga", store: "sqlite", unit: "workflows",
		guarantees: "activities at least once",
		open:       openGoWorkflows,
	})
}

// The steps of a workflow: three activities that do nothing, so that only the
// engine is measured.
const workflowSteps = 3

// openGoWorkflows keeps a number of workflows of three activities each going.
// A caller starts the next one when the last activity of its own has run, not
// when the client's polling has noticed the end: that would measure the polling.
// For the same reason workers poll every millisecond instead of every 200 ms,
// with one poller each instead of two; nothing that was tried was clearly faster.
func openGoWorkflows(ctx context.Context, p params) (*job, error) {
	// The library puts its own parameters, which this driver does not know, behind
	// the path; so a path with parameters decides the journal mode.
	path := p.Store + "?_pragma=journal_mode(wal)&_pragma=synchronous(full)&_pragma=busy_timeout(10000)&bench="
	silent := slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelError + 1}))
	store := sqlite.NewSqliteBackend(path, sqlite.WithBackendOptions(backend.WithLogger(silent)))
	options := worker.DefaultOptions
	options.WorkflowPollers, options.ActivityPollers = 1, 1
	options.WorkflowPollingInterval = time.Millisecond
	options.ActivityPollingInterval = time.Millisecond
	options.WorkflowExecutorCacheSize = max(options.WorkflowExecutorCacheSize, 4*p.Writers)
	engine := worker.New(store, &options)

	var (
		mu      sync.Mutex
		waiting = map[string]chan struct{}{}
	)
	step := func(context.Context, string) (int, error) { return 1, nil }
	last := func(_ context.Context, id string) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		if done, ok := waiting[id]; ok { // an activity may run twice
			close(done)
			delete(waiting, id)
		}
		return 1, nil
	}
	saga := func(ctx workflow.Context, id string) error {
		for i := range workflowSteps {
			activity := step
			if i == workflowSteps-1 {
				activity = last
			}
			if _, err := workflow.ExecuteActivity[int](ctx, workflow.DefaultActivityOptions, activity, id).Get(ctx); err != nil {
				return err
			}
		}
		return nil
	}
	running, stop := context.WithCancel(ctx)
	fail := func(err error) (*job, error) {
		stop()
		return nil, errors.Join(err, store.Close())
	}
	if err := engine.RegisterWorkflow(saga); err != nil {
		return fail(err)
	}
	if err := engine.RegisterActivity(step); err != nil {
		return fail(err)
	}
	if err := engine.RegisterActivity(last); err != nil {
		return fail(err)
	}
	if err := engine.Start(running); err != nil {
		return fail(err)
	}
	reader, err := sql.Open("sqlite", "file:"+p.Store+"?_pragma=synchronous(full)&_pragma=busy_timeout(10000)")
	if err != nil {
		return fail(err)
	}
	// The journal mode is a property of the file; that it is what the path asked
	// for shows that the path's other settings were heard too.
	setting, err := sqliteDurability(ctx, reader)
	if err == nil && !strings.HasPrefix(setting, "journal_mode=wal,") {
		err = fmt.Errorf("the database is in %s: its settings were not heard", setting)
	}
	if err != nil {
		return fail(closing(reader, err))
	}
	c := client.New(store)
	return &job{
		durability: setting,
		notes:      fmt.Sprintf("%d activities each, %d workflows at once", workflowSteps, p.Writers),
		close: func() error {
			stop()
			return errors.Join(engine.WaitForCompletion(), reader.Close(), store.Close())
		},
		op: func(ctx context.Context, _ int) (int, error) {
			id := newID().String()
			done := make(chan struct{})
			mu.Lock()
			waiting[id] = done
			mu.Unlock()
			if _, err := c.CreateWorkflowInstance(ctx, client.WorkflowInstanceOptions{InstanceID: id}, saga, id); err != nil {
				return 0, err
			}
			select {
			case <-done:
				return 1, nil
			case <-time.After(grace / 2):
				return 0, fmt.Errorf("workflow %s did not end in %v", id, grace/2)
			}
		},
		verify: func(ctx context.Context, done int64) error {
			return eventually(ctx, func() error {
				var n int64
				if err := reader.QueryRowContext(ctx, "SELECT count(*) FROM instances WHERE completed_at IS NOT NULL").Scan(&n); err != nil {
					return err
				}
				if n != done {
					return fmt.Errorf("%d workflows are complete, but %d were run", n, done)
				}
				return nil
			})
		},
	}, nil
}
