package command

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"reflect"
	"strings"
	"sync"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/digest"
)

// Command decides about one aggregate with the state S.
//
// It may also have a method Validate() error, which is asked before the
// aggregate is looked at and whose error becomes a rejection that wraps
// [ErrInvalid]; and a method Boundary() (eventstore.Query, S), which makes it a
// decision about all events that match the query, folded into the initial
// state that comes with it.
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
	// Metadata is stored with the events. Middleware may change it, but not the
	// map in it: replace that.
	Metadata *eventstore.Metadata

	runner runner
}

// Handler executes a call.
type Handler func(ctx context.Context, call *Call) (eventstore.Receipt, error)

// Middleware wraps every call of a bus.
type Middleware func(next Handler) Handler

// Options of a [Bus]. The zero value is ready to use.
type Options struct {
	// Middleware wraps every call; the first is the outermost.
	Middleware []Middleware
	// TracerProvider makes a span for each command, and its context is stored with
	// the events. Defaults to OpenTelemetry's global one, which by default makes none.
	TracerProvider trace.TracerProvider
}

// Bus executes commands. It is safe for concurrent use.
type Bus struct {
	runtime *aggregate.Runtime
	handler Handler
	tracer  trace.Tracer
	kinds   sync.Map // reflect.Type -> *kind
}

// NewBus returns a bus that executes commands on the runtime.
func NewBus(r *aggregate.Runtime, o Options) *Bus {
	handler := Handler(func(ctx context.Context, call *Call) (eventstore.Receipt, error) { return call.runner.run(ctx, call) })
	for i := len(o.Middleware) - 1; i >= 0; i-- {
		handler = o.Middleware[i](handler)
	}
	if o.TracerProvider == nil {
		o.TracerProvider = otel.GetTracerProvider()
	}
	return &Bus{runtime: r, handler: handler, tracer: o.TracerProvider.Tracer("github.com/deed-go/deed/command")}
}

// Runtime returns the runtime that the bus executes commands on.
func (b *Bus) Runtime() *aggregate.Runtime { return b.runtime }

// Option of one [Execute].
type Option func(*Call)

// Key makes the execution idempotent: executed again with the same key, the
// command is not decided again; the first receipt comes back, with Duplicate
// set. The same key with another command is [eventstore.ErrKeyReused].
// Rejections, and commands after which nothing happened, use up no key.
//
// Another command is one of another type, for another aggregate, or with
// another content. All its fields count, unexported ones and those that JSON
// leaves out included, but for those with the zero value, so that a command may
// get new ones while old ones are sent again. Times count as instants, and types
// that marshal themselves to JSON or text and back as what they marshal to. A
// command that cannot be compared so, because it holds a function or a channel
// or is cyclic, is refused with [eventstore.ErrInvalid]; nothing is written.
func Key(key string) Option { return func(c *Call) { c.Key = key } }

// Execute decides the command on its aggregate's current state, writes what was
// decided, and returns when that is durable. When nothing happens, the receipt
// names the last event that the decision was based on. It is safe to call
// concurrently; see [aggregate.Execute] for order, retries, and what the end of
// ctx means.
//
// Errors: a [Rejection] is the domain's no, and any other error of Decide comes
// back as it is; both wrote nothing. The rest is failures: of the store
// ([eventstore.ErrConflict] after too many attempts, [eventstore.ErrKeyReused],
// [eventstore.ErrOutcomeUnknown], …), of a definition or an event, or an
// [aggregate.PanicError].
func Execute[S any, C Command[S]](ctx context.Context, bus *Bus, def *aggregate.Definition[S], c C, options ...Option) (eventstore.Receipt, error) {
	kind, err := kindOf[S](bus, c)
	if err != nil {
		return eventstore.Receipt{}, fmt.Errorf("execute on aggregate %q: %w", def.Category(), err)
	}
	boxed := any(c)
	x := &execution[S]{bus: bus, def: def, decide: boxed.(Command[S]), metadata: metadataOf(ctx)}
	if x.metadata.CorrelationID == "" {
		x.metadata.CorrelationID = newCorrelation()
	}
	x.call = Call{
		Name: kind.name, Category: def.Category(), ID: c.AggregateID(),
		Command: boxed, Metadata: &x.metadata, runner: x,
	}
	for _, option := range options {
		option(&x.call)
	}
	return bus.execute(ctx, &x.call)
}

// execution is one Execute, in one piece of memory.
type execution[S any] struct {
	call     Call
	metadata eventstore.Metadata
	bus      *Bus
	def      *aggregate.Definition[S]
	decide   Command[S]
}

type runner interface {
	run(ctx context.Context, call *Call) (eventstore.Receipt, error)
}

func (x *execution[S]) run(ctx context.Context, call *Call) (eventstore.Receipt, error) {
	if v, ok := x.decide.(validator); ok {
		if err := v.Validate(); err != nil {
			return eventstore.Receipt{}, invalid(call, err)
		}
	}
	req := aggregate.Request[S]{ID: call.ID, Key: call.Key, Metadata: *call.Metadata, Decide: x.decide.Decide}
	if b, ok := x.decide.(bounded[S]); ok {
		req.Boundary = b.Boundary
	}
	if call.Key != "" {
		var err error
		if req.Fingerprint, err = fingerprintOf(call); err != nil {
			return eventstore.Receipt{}, err
		}
	}
	return aggregate.Execute(ctx, x.bus.runtime, x.def, req)
}

// kind is what is known of a command's Go type.
type kind struct {
	name    string
	mistake error
}

type validator interface{ Validate() error }

type bounded[S any] interface {
	Boundary() (eventstore.Query, S)
}

func kindOf[S any](b *Bus, command any) (*kind, error) {
	t := reflect.TypeOf(command)
	if t == nil || t.Kind() == reflect.Pointer && reflect.ValueOf(command).IsNil() {
		return nil, fmt.Errorf("%w: the command is nil", eventstore.ErrInvalid)
	}
	if known, ok := b.kinds.Load(t); ok {
		k := known.(*kind)
		return k, k.mistake
	}
	k := &kind{name: strings.TrimPrefix(t.String(), "*")}
	// An optional method with another signature would be passed over in silence.
	if m, ok := t.MethodByName("Validate"); ok && !t.Implements(reflect.TypeFor[validator]()) {
		k.mistake = fmt.Errorf("%w: command %s has a method Validate of type %s: make it Validate() error, or rename it", eventstore.ErrInvalid, k.name, m.Type)
	}
	if m, ok := t.MethodByName("Boundary"); ok && !t.Implements(reflect.TypeFor[bounded[S]]()) {
		k.mistake = fmt.Errorf("%w: command %s has a method Boundary of type %s: make it Boundary() (eventstore.Query, %s), or rename it", eventstore.ErrInvalid, k.name, m.Type, reflect.TypeFor[S]())
	}
	b.kinds.Store(t, k)
	return k, k.mistake
}

var internalSpan = []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindInternal)}

func (b *Bus) execute(ctx context.Context, call *Call) (eventstore.Receipt, error) {
	ctx, span := b.tracer.Start(ctx, call.Name, internalSpan...)
	defer span.End()
	if c := span.SpanContext(); c.IsValid() {
		call.Metadata.TraceParent = traceParent(c)
	}
	if !span.IsRecording() {
		return b.handler(ctx, call)
	}
	span.SetAttributes(attribute.String("deed.category", call.Category), attribute.String("deed.id", call.ID))
	receipt, err := b.handler(ctx, call)
	switch {
	case err == nil:
		span.SetAttributes(
			attribute.Int64("deed.position", int64(min(receipt.Last, math.MaxInt64))),
			attribute.Bool("deed.duplicate", receipt.Duplicate),
		)
	case IsRejection(err):
		span.SetAttributes(attribute.String("deed.rejected", err.Error()))
	default:
		span.RecordError(err)
		span.SetStatus(codes.Error, err.Error())
	}
	return receipt, err
}

// traceParent is the span context as W3C Trace Context writes it in headers.
func traceParent(c trace.SpanContext) string {
	return "00-" + c.TraceID().String() + "-" + c.SpanID().String() + "-" + c.TraceFlags().String()
}

// fingerprintOf says what an idempotency key stands for: the command's type,
// its content, and the aggregate it is for.
func fingerprintOf(call *Call) (string, error) {
	content, err := digest.Of(call.Command)
	if err != nil {
		return "", fmt.Errorf("%w: command %s has the idempotency key %q, but nothing tells it from other commands of its type: %w", eventstore.ErrInvalid, call.Name, call.Key, err)
	}
	h := sha256.New()
	_, _ = fmt.Fprintf(h, "%q %q %q ", call.Name, call.Category, call.ID)
	_, _ = h.Write(content)
	return hex.EncodeToString(h.Sum(nil)[:16]), nil
}
