package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	watermillsql "github.com/ThreeDotsLabs/watermill-sql/v4/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/message"
)

func init() {
	register("watermill-postgres", benchCase{
		peer: "github.com/ThreeDotsLabs/watermill-sql/v4", workload: "live", store: "postgres", unit: "messages consumed",
		guarantees: "a message bus: no streams, no version check; consumed in the order of transaction ids, at least once",
		open:       openWatermill,
	})
}

// openWatermill has publishers, and one consumer in the same process. What
// counts is what was consumed. The consumer polls every millisecond instead of
// every second, and takes 1,000 messages at a time instead of 100.
func openWatermill(ctx context.Context, p params) (*job, error) {
	const topic = "orders"
	_, data, err := newOrder(p.Payload)
	if err != nil {
		return nil, err
	}
	pool, err := openPool(ctx, p)
	if err != nil {
		return nil, err
	}
	setting, err := durability(ctx, pool)
	if err != nil {
		pool.Close()
		return nil, err
	}
	db := watermillsql.BeginnerFromPgx(pool)
	schema := watermillsql.DefaultPostgreSQLSchema{
		SubscribeBatchSize:  1000,
		GeneratePayloadType: func(string) string { return "BYTEA" },
	}
	subscriber, err := watermillsql.NewSubscriber(db, watermillsql.SubscriberConfig{
		ConsumerGroup: "bench", PollInterval: time.Millisecond,
		SchemaAdapter: schema, OffsetsAdapter: watermillsql.DefaultPostgreSQLOffsetsAdapter{}, InitializeSchema: true,
	}, watermill.NopLogger{})
	if err != nil {
		pool.Close()
		return nil, err
	}
	listening, stop := context.WithCancel(ctx)
	messages, err := subscriber.Subscribe(listening, topic)
	if err != nil {
		stop()
		pool.Close()
		return nil, err
	}
	publisher, err := watermillsql.NewPublisher(db, watermillsql.PublisherConfig{SchemaAdapter: schema}, watermill.NopLogger{})
	if err != nil {
		stop()
		pool.Close()
		return nil, err
	}
	var (
		consumed atomic.Int64
		consumer sync.WaitGroup
	)
	consumer.Go(func() {
		for m := range messages {
			m.Ack()
			consumed.Add(1)
		}
	})
	return &job{
		durability: setting,
		notes:      "latency is that of publishing",
		finished:   consumed.Load,
		close: func() error {
			stop()
			err := subscriber.Close()
			consumer.Wait()
			pool.Close()
			return err
		},
		op: func(ctx context.Context, _ int) (int, error) {
			m := message.NewMessage(newID().String(), data)
			m.Metadata.Set("actor", "customer-000042")
			m.Metadata.Set("correlation", "7f3a90")
			m.SetContext(ctx)
			return 1, publisher.Publish(topic, m)
		},
		verify: func(ctx context.Context, done int64) error {
			if err := countRows(ctx, pool, "SELECT count(*) FROM watermill_orders", done); err != nil {
				return err
			}
			return eventually(ctx, func() error {
				if n := consumed.Load(); n < done {
					return fmt.Errorf("%d messages were published, but %d consumed", done, n)
				}
				return nil
			})
		},
	}, nil
}

// eventually repeats a check until it passes, for as long as unfinished work
// may take.
func eventually(ctx context.Context, check func() error) error {
	deadline := time.Now().Add(grace)
	for {
		err := check()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
