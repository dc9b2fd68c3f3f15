package command

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"reflect"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
)

// Command decides about one aggregate with the state S.
//
// It may also have a method Validate() error, which the middleware [Validate]
// calls before the aggregate is looked at, and a method
// Boundary() (eventstore.Query, S), which makes it a decision about all events
// that match the query, folded into the given initial state.
type Command[S any] interface {
	// AggregateID says which aggregate the command is for, and whose stream its
	// events join.
	AggregateID() string
	// Decide returns the events that happen, none if nothing does, or an error to
	// refuse, best made by [Reject]. It must be pure: no clock, no I/O, no change to
	// what the state refers to; it may run several times.
	Decide(state S) ([]aggregate.Event, error)
}

// Call is a command on its way to its aggregate, as middleware sees it.
type Call struct {
	// Name is the command's Go type, for example "bank.Deposit".
	Name string
	// Category and ID say which aggregate it is for.
	Category, ID string
	// Key is its idempotency key, if any.
	Key string
	// Command is the command itself. To read only.
	Command any
	// Metadata is stored with the events; middleware may change it.
	Metadata *eventstore.Metadata

	run Handler
}

// Handler executes a call.
type Handler func(ctx context.Context, call *Call) (eventstore.Receipt, error)

// Middleware wraps every call of a bus.
type Middleware func(next Handler) Handler

// Options of a [Bus]. The zero value is ready to use.
type Options struct {
	// Middleware wraps every call; the first is the outermost.
	Middleware []Middleware
}

// Bus executes commands. It is safe for concurrent use.
type Bus struct {
	runtime *aggregate.Runtime
	handler Handler
}

// NewBus returns a bus that executes commands on the runtime.
func NewBus(r *aggregate.Runtime, o Options) *Bus {
	handler := Handler(func(ctx context.Context, call *Call) (eventstore.Receipt, error) { return call.run(ctx, call) })
	for i := len(o.Middleware) - 1; i >= 0; i-- {
		handler = o.Middleware[i](handler)
	}
	return &Bus{runtime: r, handler: handler}
}

// Runtime returns the runtime that the bus executes commands on.
func (b *Bus) Runtime() *aggregate.Runtime { return b.runtime }

// Option of one [Execute].
type Option func(*Call)

// Key makes the execution idempotent: executed again with the same key, the
// command is not decided again; the first receipt comes back, with Duplicate
// set. The same key with another command is [eventstore.ErrKeyReused].
// Rejections, and commands after which nothing happened, use up no key.
func Key(key string) Option { return func(c *Call) { c.Key = key } }

// Execute decides the command on its aggregate's state and returns when its
// events are durable.
func Execute[S any, C Command[S]](ctx context.Context, bus *Bus, def *aggregate.Definition[S], c C, options ...Option) (eventstore.Receipt, error) {
	metadata := metadataOf(ctx)
	if metadata.CorrelationID == "" {
		metadata.CorrelationID = newCorrelation()
	}
	call := &Call{
		Name: reflect.TypeOf(c).String(), Category: def.Category(), ID: c.AggregateID(),
		Command: c, Metadata: &metadata,
	}
	for _, option := range options {
		option(call)
	}
	call.run = func(ctx context.Context, call *Call) (eventstore.Receipt, error) {
		req := aggregate.Request[S]{ID: call.ID, Key: call.Key, Metadata: *call.Metadata, Decide: c.Decide}
		if b, ok := any(c).(interface {
			Boundary() (eventstore.Query, S)
		}); ok {
			req.Boundary = b.Boundary
		}
		if call.Key != "" {
			fingerprint, err := fingerprintOf(call)
			if err != nil {
				return eventstore.Receipt{}, err
			}
			req.Fingerprint = fingerprint
		}
		return aggregate.Execute(ctx, bus.runtime, def, req)
	}
	return bus.handler(ctx, call)
}

func fingerprintOf(call *Call) (string, error) {
	content, err := json.Marshal(call.Command)
	if err != nil {
		return "", fmt.Errorf("%w: command %s has the idempotency key %q but does not encode as JSON, which tells it from other commands: %w", eventstore.ErrInvalid, call.Name, call.Key, err)
	}
	h := sha256.New()
	_, _ = fmt.Fprintf(h, "%q %q %q ", call.Name, call.Category, call.ID)
	_, _ = h.Write(content)
	return hex.EncodeToString(h.Sum(nil)[:16]), nil
}
