package esdb_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/esdbserver"
)

// exampleServer stands for a real server.
func exampleServer() (url string, stop func()) {
	s, err := esdbserver.Start(memory.New())
	if err != nil {
		log.Fatal(err)
	}
	return s.URL(), func() { _ = s.Close() }
}

func ExampleOpen() {
	url, stop := exampleServer() // for example esdb://localhost:2113?tls=false
	defer stop()
	ctx := context.Background()
	store, err := esdb.Open(ctx, url)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()

	ann := eventstore.Stream{Category: "account", ID: "ann"}
	open := eventstore.Commit{
		Events:     []eventstore.Event{{Stream: ann, Type: "account.opened", Data: []byte(`{"Owner":"Ann"}`)}},
		Conditions: []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}, // must not exist yet
	}
	if _, err := store.Append(ctx, open); err != nil {
		log.Fatal(err)
	}
	_, err = store.Append(ctx, open)
	fmt.Println("again:", err)
	for event, err := range store.Read(ctx, eventstore.OneStream(ann), eventstore.ReadOptions{}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(event.Version, event.Type, string(event.Data))
	}
	// Output:
	// again: conflict: stream "account-ann" is at version 1, expected version 0 (no events)
	// 1 account.opened {"Owner":"Ann"}
}

// Two logs in one database.
func ExamplePrefix() {
	url, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	for _, name := range []string{"shop", "warehouse"} {
		store, err := esdb.Open(ctx, url, esdb.Prefix(name))
		if err != nil {
			log.Fatal(err)
		}
		lamp := eventstore.Stream{Category: "item", ID: "lamp"}
		r, err := store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{{Stream: lamp, Type: "item.added", Data: []byte(`{}`)}}})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(name, "has the lamp at", r.Revision(lamp))
		_ = store.Close()
	}
	// Output:
	// shop has the lamp at version 1
	// warehouse has the lamp at version 1
}

// What one append of one stream cannot do is refused.
func ExampleStore_Append_unsupported() {
	url, stop := exampleServer()
	defer stop()
	ctx := context.Background()
	store, err := esdb.Open(ctx, url)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	_, err = store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{
		{Stream: eventstore.Stream{Category: "account", ID: "ann"}, Type: "account.debited", Data: []byte(`{}`)},
		{Stream: eventstore.Stream{Category: "account", ID: "bob"}, Type: "account.credited", Data: []byte(`{}`)},
	}})
	fmt.Println(errors.Is(err, errors.ErrUnsupported))
	fmt.Println(err)
	// Output:
	// true
	// a commit of the streams "account-ann" and "account-bob": EventStoreDB writes one stream at a time: unsupported operation
}
