// Package outside has sagas that do in passing what steps are for.
package outside

import (
	"context"
	"database/sql"
	"net"
	"net/http"
	"os"
	"os/exec"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/query"
	"github.com/deed-go/deed/saga"
)

type pay struct {
	db     *sql.DB
	client *http.Client
	bus    *command.Bus
	host   saga.Host
}

func (p *pay) run(s *saga.Run, id string) (string, error) {
	_ = os.Getenv("REGION")             // want `^os.Getenv in a saga: it happens again at every replay, and may end otherwise; do it in a step, with saga.Do$`
	_, _ = os.ReadFile("rates.json")    // want `os.ReadFile in a saga`
	_, _ = http.Get("http://localhost") // want `http.Get in a saga`
	_, _ = p.client.Do(nil)             // want `http.Client.Do in a saga`
	_, _ = net.Dial("tcp", "localhost") // want `net.Dial in a saga`
	_, _ = p.db.Query("select 1")       // want `sql.DB.Query in a saga`
	_ = exec.Command("true")            // want `exec.Command in a saga`
	ctx := command.WithActor(context.Background(), "ann")
	_ = command.Execute(ctx, p.bus, id)                                  // want `command.Execute in a saga: .* use saga.Execute`
	_ = saga.Start(ctx, p.host, &saga.Definition[string, int]{}, id, id) // want `saga.Start in a saga`
	return query.Get(ctx, id)                                            // want `query.Get in a saga: .* do it in a step, with saga.Do`
}

var order = saga.Define("order", (&pay{}).run, saga.On(func(id string, _ saga.Recorded) (string, string) {
	return id, os.Getenv("REGION") // want `os.Getenv in the start of a saga: .* let the saga do it, in a step`
}))
