package deed

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/clock"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// Part is something an application is made of: an aggregate definition, a
// projection, a saga or reaction, or an option of this package. Err returns
// the mistakes made in defining it.
type Part interface{ Err() error }

type configuration struct {
	clock            clock.Clock
	manual           *clock.Manual
	encoding         *eventstore.Encoding
	state            projection.State
	members          func(eventstore.Store) (ownership.Directory, error)
	leases           func(eventstore.Store) (ownership.Leases, error)
	middleware       []command.Middleware
	cachedAggregates int
	logger           *slog.Logger

	aggregates  []aggregateDefinition
	projections []projection.Projection
	processes   []saga.Process
}

// aggregateDefinition is what every *aggregate.Definition[S] is.
type aggregateDefinition interface {
	Part
	Category() string
	EventTypes() []string
}

type option struct {
	apply func(*configuration) error
	err   error
}

func (o option) Err() error { return o.err }

// ManualClock gives the application a clock that stands at the time and moves
// only by [App.AdvanceTo]: for tests and for replaying histories.
//
// Events are dated by it, so give the start a date: on a log that has events,
// usually that of the last one.
func ManualClock(start time.Time) Part {
	var err error
	if start.IsZero() {
		err = fmt.Errorf("%w: the manual clock starts at the zero time, which stores take for \"not dated\": give it a date", eventstore.ErrInvalid)
	}
	return option{err: err, apply: func(c *configuration) error {
		c.manual = clock.NewManual(start)
		c.clock = c.manual
		return nil
	}}
}

// Encoding says how events are stored and how older ones are read; see
// [eventstore.NewEncoding]. Without it everything is JSON as it was written.
func Encoding(rules ...eventstore.EncodingOption) Part {
	encoding, err := eventstore.NewEncoding(rules...)
	return option{err: err, apply: func(c *configuration) error {
		if c.encoding != nil {
			return fmt.Errorf("%w: deed.Encoding is given twice: join the rules", eventstore.ErrInvalid)
		}
		c.encoding = encoding
		return nil
	}}
}

// State names where projections and sagas keep what belongs to them, for
// stores that cannot keep it themselves.
func State(state projection.State) Part {
	return option{apply: func(c *configuration) error {
		c.state = state
		return nil
	}}
}

// Members names where the processes of the application find each other, to
// divide projections, sagas and reactions among them: for example nats.Members,
// which is given the application's store. Without it that is the state.
//
// It says who is to do a piece of work, and no more: the lease of the work stays
// with the state (but see [Leases]), and its epoch is checked in the transaction that commits what
// was done. Members that are wrong about each other cost time, and nothing else.
// All processes on one state must be given the same.
func Members(in func(eventstore.Store) (ownership.Directory, error)) Part {
	return option{apply: func(c *configuration) error {
		c.members = in
		return nil
	}}
}

// Leases names where it is decided which process runs a saga or reaction, for
// processes that share the log and nothing else, each with a state of its own
// ([State], an SQLite file for example): nats.Leases, which is given the
// application's store. Without it every process with a state of its own runs all
// of them: nothing is recorded twice, but steps run on each. A state that
// processes share decides it itself, and is refused together with Leases.
//
// Projections are not divided: every process keeps its own read models. So are
// the indexes of sagas and reactions, which whoever takes over brings up to date
// from the log first: Sagas().List, Versions and DeadLetters show what is open where
// the process asked runs them, and elsewhere what was when it last did; Look, Wait,
// Start and signals go by the log, on every process.
//
// A lease lasts 10 s and is renewed every third of that. Nobody looks at it in the
// transaction that commits, since that is the log's: what keeps a former owner from
// doing harm is its own clock (it begins nothing new from 6 s after the last
// renewal that it has heard of, at most 3 s more if it had just looked), and the history of the run, where its
// records conflict with the heir's. What is done in a transaction of the state
// (saga.Tx) is done in the one of the process that runs the step, and what a
// heartbeat keeps stays there.
//
// The processes find each other there too, unless [Members] says otherwise.
func Leases(in func(eventstore.Store) (ownership.Leases, error)) Part {
	return option{apply: func(c *configuration) error {
		c.leases = in
		return nil
	}}
}

// Use adds middleware around every command; the first given is the outermost.
func Use(middleware ...command.Middleware) Part {
	return option{apply: func(c *configuration) error {
		c.middleware = append(c.middleware, middleware...)
		return nil
	}}
}

// CachedAggregates sets how many idle aggregates are kept in memory.
func CachedAggregates(count int) Part {
	var err error
	if count < 0 {
		err = fmt.Errorf("%w: %d cached aggregates: use 0 for the default", eventstore.ErrInvalid, count)
	}
	return option{err: err, apply: func(c *configuration) error {
		c.cachedAggregates = count
		return nil
	}}
}

// Logger receives what background work has to say: retries, dead letters,
// blocked sagas. The default is slog.Default.
func Logger(logger *slog.Logger) Part {
	return option{apply: func(c *configuration) error {
		c.logger = logger
		return nil
	}}
}

// configure sorts the parts and returns every mistake in them.
func configure(parts []Part) (*configuration, error) {
	c := &configuration{clock: clock.System{}, logger: slog.Default()}
	var mistakes []error
	categories, projections := map[string]bool{}, map[string]bool{}
	unique := func(seen map[string]bool, what, name string) {
		if seen[name] {
			mistakes = append(mistakes, fmt.Errorf("%w: two %ss are named %q", eventstore.ErrInvalid, what, name))
		}
		seen[name] = true
	}
	for i, part := range parts {
		if part == nil {
			mistakes = append(mistakes, fmt.Errorf("%w: part %d of the application is nil", eventstore.ErrInvalid, i+1))
			continue
		}
		if err := part.Err(); err != nil {
			mistakes = append(mistakes, err)
			continue
		}
		switch p := part.(type) {
		case option:
			mistakes = append(mistakes, p.apply(c))
		case projection.Projection:
			unique(projections, "projection", p.Name())
			c.projections = append(c.projections, p)
		case saga.Process:
			c.processes = append(c.processes, p)
		case aggregateDefinition:
			unique(categories, "aggregate", p.Category())
			c.aggregates = append(c.aggregates, p)
		default:
			mistakes = append(mistakes, fmt.Errorf("%w: part %d of the application, a %T, is none that deed knows: give it aggregate definitions, projections, sagas, reactions and options", eventstore.ErrInvalid, i+1, part))
		}
	}
	return c, errors.Join(mistakes...)
}
