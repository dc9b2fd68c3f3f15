package esdbserver_test

import (
	"context"
	"fmt"
	"log"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/internal/esdbserver"
)

// A server, and a client whose second append expects what is not so.
func Example() {
	store := memory.New()
	defer store.Close()
	server, err := esdbserver.Start(store)
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()

	settings, err := esdb.ParseConnectionString(server.URL())
	if err != nil {
		log.Fatal(err)
	}
	client, err := esdb.NewClient(settings)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	event := esdb.EventData{EventType: "account.opened", ContentType: esdb.ContentTypeJson, Data: []byte(`{"owner":"ann"}`)}
	for range 2 {
		written, err := client.AppendToStream(context.Background(), "account-ann", esdb.AppendToStreamOptions{ExpectedRevision: esdb.NoStream{}}, event)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println("the stream is at revision", written.NextExpectedVersion)
	}
	// Output:
	// the stream is at revision 0
	// [ErrorCodeWrongExpectedVersion] an append request failed the optimistic concurrency on the server: wrong expected version: expecting 'no_stream' but got '0'
}
