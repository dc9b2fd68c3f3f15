// Package sagavet finds code of sagas that would not do the same when the run
// is replayed: an analyser as go vet runs them.
//
// It may import nothing of deed, which it knows by name; programs and tests
// may import it.
//
// # Running it
//
// The command deedvet has it:
//
//	go install github.com/deed-go/deed/cmd/deedvet@latest
//	deedvet ./...
//
// or, the same:
//
//	go vet -vettool=$(which deedvet) ./...
//
// Either loads the packages, their tests and their dependencies, and looks again
// only at what has changed. In CI the version of deed that go.mod has is the one
// to take: add the command once, as a tool of the module, and run it; the exit
// code is 1 when something is found.
//
//	go get -tool github.com/deed-go/deed/cmd/deedvet
//	go tool deedvet ./...
//
// [Analyzer] can also be put together with others, in a vettool or a linter of
// one's own; the driver must support facts.
//
// # What is a saga
//
// Every function that is given a *saga.Run: that of saga.Define, compensations,
// branches, and functions that they call with the run. A function that is given a
// saga.Step, or that a call into package saga makes a step of, may do anything
// but use the run. The function of saga.On is looked at too, since it may be
// called again for the same event.
//
// # What is reported
//
//	category   what                                              instead
//	time       time.Now, Since, Until; Sleep, After, Tick,       s.Now, s.Sleep, s.Until,
//	           NewTimer, NewTicker; context.WithTimeout          saga.Within
//	random     math/rand without a seed, crypto/rand,            a step that records it
//	           hash/maphash seeds, uuid.New and the like
//	io         the environment, files, os/exec, net, net/http,   a step, saga.Execute
//	           database/sql, pgx; what deed itself does with a
//	           context: command.Execute, query.Get
//	goroutine  go, WaitGroup.Go, errgroup, AfterFunc             saga.All, saga.Race, steps
//	channel    select, send, receive, range over a channel,      saga.Await, a saga.Signal,
//	           sync.Cond.Wait                                    saga.Race
//	lock       Lock of a sync.Mutex or RWMutex                   an aggregate, a step
//	order      a loop over a map, or over maps.Keys, Values or   slices.Sorted(maps.Keys(m))
//	           All, whose body takes steps or makes branches
//	run        the run used in a step, or in a branch that has   the run that is given,
//	           its own; given to another goroutine; or kept: in  passed on as a parameter
//	           a field, an element, a variable that outlives
//	           the call
//	directive  a //deed:deterministic without a reason           say why
//
// Of the first five kinds, a function that does such a thing, itself or by what
// it calls in turn, is reported where a saga calls it or passes it on:
//
//	stamp in a saga: it comes down to time.Now (clock.go:12) by way of now, …
//
// This reaches through all packages of the module (or the workspace). Of the
// modules it depends on only the time and random values count, and only in
// functions that return something: a logger may look at the clock, and what
// they do with goroutines or files is their affair. The standard library is
// judged by the list above alone.
//
// # What is right all the same
//
// A comment on the line, above it, or above the function vouches for it:
//
//	//deed:deterministic it is only shown in the log
//	started := time.Now()
//
// What is vouched for in a function is not held against those who call it. A
// reason is needed, and a directive without one vouches for nothing.
//
// # What is not found
//
// Calls of methods of interfaces, and of functions in fields and parameters, are
// not followed; variables of the package that change are not noticed, nor is a
// slice that was filled in the order of a map. What is found is a mistake almost
// always; that nothing is found is no proof. [saga.Definition.Replay], on
// histories, and sagatest are the tests of that.
//
// [saga.Definition.Replay]: https://pkg.go.dev/github.com/deed-go/deed/saga#Definition.Replay
package sagavet
