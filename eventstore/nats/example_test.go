package nats_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/nats"
	"github.com/deed-go/deed/internal/natsserver"
)

// A server in the process stands in for one of yours.
func ExampleOpen() {
	server, err := natsserver.Start(natsserver.Options{SyncAlways: true})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()

	ctx := context.Background()
	store, err := nats.Open(ctx, server.URL(), nats.Stream("shop"), nats.Logger(slog.New(slog.DiscardHandler)))
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()

	ann := eventstore.Stream{Category: "account", ID: "ann"}
	open := eventstore.Commit{
		Events:     []eventstore.Event{{Stream: ann, Type: "account.opened", Data: []byte(`{"Owner":"Ann"}`)}},
		Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}, // must not exist yet
	}
	receipt, err := store.Append(ctx, open)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("written at position", receipt.Last)
	for event, err := range store.Read(ctx, eventstore.OneStream(ann), eventstore.ReadOptions{}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(event.Version, event.Type, string(event.Data))
	}
	_, err = store.Append(ctx, open)
	fmt.Println(err)
	fmt.Println(errors.Is(err, eventstore.ErrConflict))
	// Output:
	// written at position 1
	// 1 account.opened {"Owner":"Ann"}
	// conflict: stream "account-ann" is at version 1, expected version 0 (no events)
	// true
}

// Another program makes the stream, with settings of ours.
func ExampleConfig() {
	c := nats.Config("shop", 3, "0b5f6a4e-7b0c-4a52-9d1c-4f7d6a0c2c11")
	fmt.Println(c.Subjects, c.Replicas, c.Retention, c.DenyDelete, c.DenyPurge, c.AllowAtomicPublish)
	// Output:
	// [shop.>] 3 Limits true true true
}

// Conditions over queries are refused before anything is written.
func ExampleStore_Append_unsupported() {
	server, err := natsserver.Start(natsserver.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	ctx := context.Background()
	store, err := nats.Open(ctx, server.URL(), nats.Logger(slog.New(slog.DiscardHandler)))
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	_, err = store.Append(ctx, eventstore.Commit{
		Events:     []eventstore.Event{{Stream: eventstore.Stream{Category: "account", ID: "ann"}, Type: "account.opened"}},
		Conditions: []eventstore.Condition{eventstore.NoneMatch(eventstore.Tagged("name:ann"), 0)},
	})
	fmt.Println(errors.Is(err, errors.ErrUnsupported))
	// Output:
	// true
}
