// Package parallel has sagas with goroutines of their own.
package parallel

import (
	"context"
	"sync"
	"time"

	"github.com/deed-go/deed/saga"
	"golang.org/x/sync/errgroup"
)

var (
	mu     sync.Mutex
	signal = make(chan int)
)

func run(s *saga.Run, in []string) (int, error) {
	go func() { time.Sleep(time.Second) }() // want `^a go statement in a saga: it leaves the order of what happens to chance; use saga.All or saga.Race, and do it in steps$`
	go saga.Execute(s, "x", in)             // want `a go statement in a saga: .*; and the run belongs to one goroutine: used on another one, it is blocked$`

	go worker()                   // want `a go statement in a saga: it leaves the order of what happens to chance; use saga.All or saga.Race, and do it in steps$`
	go (&pool{}).work(time.Now()) // want `a go statement in a saga` `time.Now in a saga`

	var group sync.WaitGroup
	group.Go(worker)                                   // want `sync.WaitGroup.Go in a saga: it leaves the order of what happens to chance; use saga.All or saga.Race, and do it in steps$`
	group.Go(func() { _ = s.Sleep("x", time.Second) }) // want `sync.WaitGroup.Go in a saga: .* the run belongs to one goroutine`
	var eg errgroup.Group
	eg.Go(func() error { return nil })                              // want `errgroup.Group.Go in a saga`
	time.AfterFunc(time.Second, func() { s.Settled() })             // want `time.AfterFunc in a saga: .* the run belongs to one goroutine`
	context.AfterFunc(context.Background(), func() { signal <- 1 }) // want `context.AfterFunc in a saga`

	select { // want `^a select statement in a saga: it depends on what other goroutines do; wait with saga.Await or a saga.Signal, for several with saga.Race$`
	case n := <-signal:
		return n, s.Sleep("x", time.Until(time.Time{})) // want `time.Until in a saga`
	default:
	}
	signal <- 1        // want `a send on a channel in a saga`
	<-signal           // want `a receive from a channel in a saga`
	for range signal { // want `a receive from a channel in a saga`
	}
	mu.Lock() // want `^sync.Mutex.Lock in a saga: it is held while the run is put aside to wait; what sagas share belongs in an aggregate, or in a step$`
	defer mu.Unlock()
	return 0, nil
}

func worker() { time.Sleep(time.Second) }

type pool struct{}

func (*pool) work(time.Time) { worker() }
