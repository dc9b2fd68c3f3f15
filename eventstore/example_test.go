package eventstore_test

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

func Example() {
	ctx := context.Background()
	store := memory.New()
	defer store.Close()

	account := eventstore.Stream{Category: "account", ID: "ann"}
	receipt, err := store.Append(ctx, eventstore.Commit{
		Events: []eventstore.Event{
			{Stream: account, Type: "account.opened", Data: []byte(`{"Owner":"Ann"}`)},
			{Stream: account, Type: "account.deposited", Data: []byte(`{"Cents":500}`)},
		},
		Conditions: []eventstore.Condition{eventstore.StreamAt(account, eventstore.Revision{})}, // must not exist yet
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("now at", receipt.Revision(account), "and position", receipt.Last)

	for event, err := range store.Read(ctx, eventstore.OneStream(account), eventstore.ReadOptions{}) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(event.Version, event.Type, string(event.Data))
	}
	// Output:
	// now at version 2 and position 2
	// 1 account.opened {"Owner":"Ann"}
	// 2 account.deposited {"Cents":500}
}

// Two writers decide on the same revision: one of them loses, learns where the
// stream is now, and decides again.
func ExampleConflictError() {
	ctx := context.Background()
	store := memory.New()
	defer store.Close()

	account := eventstore.Stream{Category: "account", ID: "ann"}
	withdraw := eventstore.Commit{
		Events:     []eventstore.Event{{Stream: account, Type: "account.withdrawn"}},
		Conditions: []eventstore.Condition{eventstore.StreamAt(account, eventstore.Revision{})},
	}
	_, _ = store.Append(ctx, withdraw)
	_, err := store.Append(ctx, withdraw)
	if conflict, ok := errors.AsType[*eventstore.ConflictError](err); ok {
		fmt.Println(err)
		fmt.Println("decide again from", conflict.Actual)
	}
	// Output:
	// conflict: stream "account-ann" is at version 1, expected version 0 (no events)
	// decide again from version 1
}

// A boundary condition makes a decision over several streams safe: here, that
// a user name is taken only once.
func ExampleNoneMatch() {
	ctx := context.Background()
	store := memory.New()
	defer store.Close()

	register := func(user string) error {
		taken := eventstore.Match(eventstore.Item{Types: []string{"user.registered"}, Tags: []string{"name:ann"}})
		_, err := store.Append(ctx, eventstore.Commit{
			Events:     []eventstore.Event{{Stream: eventstore.Stream{Category: "user", ID: user}, Type: "user.registered", Tags: []string{"name:ann"}}},
			Conditions: []eventstore.Condition{eventstore.NoneMatch(taken, 0)},
		})
		return err
	}
	fmt.Println(register("u1"))
	fmt.Println(register("u2"))
	// Output:
	// <nil>
	// conflict: an event at position 1, after 0, matches the condition's query: decide again on the events up to it
}

// An idempotency key makes an append safe to repeat, whatever became of the
// first attempt.
func ExampleCommit_key() {
	ctx := context.Background()
	store := memory.New()
	defer store.Close()

	deposit := eventstore.Commit{
		Events: []eventstore.Event{{Stream: eventstore.Stream{Category: "account", ID: "ann"}, Type: "account.deposited"}},
		Key:    "request-17",
	}
	for range 2 {
		receipt, err := store.Append(ctx, deposit)
		fmt.Println("position", receipt.Last, "duplicate:", receipt.Duplicate, err)
	}
	// Output:
	// position 1 duplicate: false <nil>
	// position 1 duplicate: true <nil>
}

// A subscription yields what is stored and then what is appended, until its
// context ends or the loop breaks.
func ExampleStore_subscribe() {
	ctx := context.Background()
	store := memory.New()
	defer store.Close()

	note := func(id string) {
		_, _ = store.Append(ctx, eventstore.Commit{Events: []eventstore.Event{{Stream: eventstore.Stream{Category: "note", ID: id}, Type: "noted"}}})
	}
	note("a")
	note("b")
	more := true
	for batch, err := range store.Subscribe(ctx, eventstore.OneCategory("note"), 0) {
		if err != nil {
			fmt.Println(err)
			return
		}
		for _, event := range batch.Events {
			fmt.Println(event.Position, event.Stream)
		}
		if !more {
			break
		}
		if batch.CaughtUp {
			fmt.Println("caught up at", batch.Through)
			note("c")
			more = false
		}
	}
	// Output:
	// 1 note-a
	// 2 note-b
	// caught up at 2
	// 3 note-c
}

// An event type whose shape changed: old events are led to the new one
// wherever they are read.
func ExampleUpcast() {
	type openedV1 struct{ Name string }
	type opened struct{ First, Last string }

	encoding, err := eventstore.NewEncoding(
		eventstore.Upcast("account.opened", 1, func(old openedV1) (opened, error) {
			first, last, _ := strings.Cut(old.Name, " ")
			return opened{First: first, Last: last}, nil
		}),
		eventstore.Rename("account.created", "account.opened"),
	)
	if err != nil {
		fmt.Println(err)
		return
	}
	stored := eventstore.Recorded{Type: "account.created", Data: []byte(`{"Name":"Ann Lee"}`)}
	var event opened
	if err := encoding.Decode(stored, &event); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s %+v\n", encoding.CurrentType(stored.Type), event)
	// Output: account.opened {First:Ann Last:Lee}
}
