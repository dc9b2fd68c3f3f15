package command_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/embedded"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

type opened struct{ Owner string }

func (opened) EventType() string { return "account.opened" }

type deposited struct{ Cents int64 }

func (deposited) EventType() string { return "account.deposited" }

func (e deposited) Tags() []string { return []string{"kind:deposit"} }

type account struct {
	Owner string
	Cents int64
}

var accounts = aggregate.Define("account",
	aggregate.On(func(a *account, e opened) { a.Owner = e.Owner }),
	aggregate.On(func(a *account, e deposited) { a.Cents += e.Cents }),
)

type open struct{ Account, Owner string }

func (c open) AggregateID() string { return c.Account }

func (c open) Decide(a account) ([]aggregate.Event, error) {
	if a.Owner != "" {
		return nil, command.Rejectf("account %q is open already", c.Account)
	}
	return aggregate.Events(opened{c.Owner}), nil
}

var errNotOpen = errors.New("not open")

type deposit struct {
	Account string
	Cents   int64
}

func (c deposit) AggregateID() string { return c.Account }

func (c deposit) Validate() error {
	if c.Cents <= 0 {
		return errors.New("the amount must be positive")
	}
	return nil
}

func (c deposit) Decide(a account) ([]aggregate.Event, error) {
	if a.Owner == "" {
		return nil, command.Reject(errNotOpen)
	}
	return aggregate.Events(deposited{c.Cents}), nil
}

func setup(t *testing.T, o command.Options) (*command.Bus, *memory.Store) {
	t.Helper()
	store := memory.New()
	r := aggregate.NewRuntime(store, aggregate.Options{})
	t.Cleanup(func() {
		require.NoError(t, r.Stop(context.WithoutCancel(t.Context())))
		require.NoError(t, store.Close())
	})
	return command.NewBus(r, o), store
}

func all(t *testing.T, s eventstore.Store) []eventstore.Recorded {
	t.Helper()
	var events []eventstore.Recorded
	for e, err := range s.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		events = append(events, e)
	}
	return events
}

func TestExecute_WritesWhatWasDecided(t *testing.T) {
	t.Parallel()
	bus, store := setup(t, command.Options{})
	receipt, err := command.Execute(t.Context(), bus, accounts, open{"ann", "Ann"})
	require.NoError(t, err)
	require.Equal(t, eventstore.Position(1), receipt.Last)
	receipt, err = command.Execute(t.Context(), bus, accounts, &deposit{"ann", 500})
	require.NoError(t, err)
	require.Equal(t, eventstore.Revision{Version: 2, Position: 2}, receipt.Revision(accounts.Stream("ann")))
	events := all(t, store)
	require.Equal(t, `{"Cents":500}`, string(events[1].Data))
	require.Equal(t, []string{"kind:deposit"}, events[1].Tags)
}

func TestExecute_RejectionsAreNotFailures(t *testing.T) {
	t.Parallel()
	bus, store := setup(t, command.Options{})
	_, err := command.Execute(t.Context(), bus, accounts, deposit{"ann", 500})
	require.ErrorIs(t, err, errNotOpen)
	require.True(t, command.IsRejection(err))
	_, err = command.Execute(t.Context(), bus, accounts, deposit{"ann", -1})
	require.ErrorIs(t, err, command.ErrInvalid)
	require.True(t, command.IsRejection(err))
	require.EqualError(t, err, `invalid command: command_test.deposit for account "ann": the amount must be positive`)
	_, err = command.Execute(t.Context(), bus, accounts, deposit{"", 1})
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.False(t, command.IsRejection(err), "a stream name is not the domain's business")
	require.Empty(t, all(t, store))
	require.NoError(t, command.Reject(nil))
	require.False(t, command.IsRejection(nil))
}

func TestExecute_NilCommand(t *testing.T) {
	t.Parallel()
	bus, _ := setup(t, command.Options{})
	var missing *deposit
	_, err := command.Execute(t.Context(), bus, accounts, missing)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	_, err = command.Execute[account, command.Command[account]](t.Context(), bus, accounts, nil)
	require.EqualError(t, err, `execute on aggregate "account": invalid: the command is nil`)
}

type misspelt struct{ open }

func (misspelt) Boundary() (eventstore.Query, *account) { return eventstore.All(), nil }

func TestExecute_OptionalMethodsWithAnotherSignature(t *testing.T) {
	t.Parallel()
	bus, _ := setup(t, command.Options{})
	for range 2 {
		_, err := command.Execute(t.Context(), bus, accounts, misspelt{open{"ann", "Ann"}})
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, "make it Boundary() (eventstore.Query, command_test.account)")
	}
}

func TestKey(t *testing.T) {
	t.Parallel()
	bus, store := setup(t, command.Options{})
	first, err := command.Execute(t.Context(), bus, accounts, open{"ann", "Ann"}, command.Key("k"))
	require.NoError(t, err)
	require.False(t, first.Duplicate)

	t.Run("NotJudgedAgain", func(t *testing.T) {
		again, err := command.Execute(t.Context(), bus, accounts, open{"ann", "Ann"}, command.Key("k"))
		require.NoError(t, err, "judged against the state it has changed, it would be refused")
		require.True(t, again.Duplicate)
		require.Equal(t, first.Last, again.Last)
	})
	t.Run("AnotherCommand", func(t *testing.T) {
		for _, c := range []command.Command[account]{open{"ann", "Bob"}, open{"bob", "Ann"}, deposit{"ann", 1}} {
			_, err := command.Execute(t.Context(), bus, accounts, c, command.Key("k"))
			require.ErrorIs(t, err, eventstore.ErrKeyReused)
		}
	})
	t.Run("RejectionsUseUpNoKey", func(t *testing.T) {
		_, err := command.Execute(t.Context(), bus, accounts, deposit{"bob", 1}, command.Key("k2"))
		require.ErrorIs(t, err, errNotOpen)
		_, err = command.Execute(t.Context(), bus, accounts, open{"bob", "Bob"})
		require.NoError(t, err)
		receipt, err := command.Execute(t.Context(), bus, accounts, deposit{"bob", 1}, command.Key("k2"))
		require.NoError(t, err)
		require.False(t, receipt.Duplicate)
	})
	t.Run("SurvivesTheRuntime", func(t *testing.T) {
		r := aggregate.NewRuntime(store, aggregate.Options{})
		again, err := command.Execute(t.Context(), command.NewBus(r, command.Options{}), accounts, open{"ann", "Ann"}, command.Key("k"))
		require.NoError(t, err)
		require.True(t, again.Duplicate)
	})
	t.Run("PointerToTheCommand", func(t *testing.T) {
		again, err := command.Execute(t.Context(), bus, accounts, &open{"ann", "Ann"}, command.Key("k"))
		require.NoError(t, err)
		require.True(t, again.Duplicate)
	})
	t.Run("CommandWithoutContent", func(t *testing.T) {
		_, err := command.Execute(t.Context(), bus, accounts, withFunc{F: func() {}}, command.Key("k3"))
		require.ErrorIs(t, err, eventstore.ErrInvalid)
		require.ErrorContains(t, err, `command command_test.withFunc has the idempotency key "k3", but nothing tells it from other commands of its type: field "F": a func() has no content`)
	})
}

// pay has only fields that JSON does not see.
type pay struct {
	account string
	cents   int64
	Note    string `json:"-"`
	due     time.Time
}

func (c pay) AggregateID() string { return c.account }
func (c pay) Decide(account) ([]aggregate.Event, error) {
	return aggregate.Events(deposited{c.cents}), nil
}

func TestKey_EveryFieldCounts(t *testing.T) {
	t.Parallel()
	bus, store := setup(t, command.Options{})
	due := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	first := pay{"ann", 100, "rent", due}
	_, err := command.Execute(t.Context(), bus, accounts, first, command.Key("k"))
	require.NoError(t, err)
	again, err := command.Execute(t.Context(), bus, accounts, pay{"ann", 100, "rent", due.In(time.FixedZone("CET", 3600))}, command.Key("k"))
	require.NoError(t, err, "the same instant")
	require.True(t, again.Duplicate)
	for _, other := range []pay{{"ann", 999, "rent", due}, {"ann", 100, "food", due}, {"ann", 100, "rent", due.Add(1)}} {
		_, err = command.Execute(t.Context(), bus, accounts, other, command.Key("k"))
		require.ErrorIs(t, err, eventstore.ErrKeyReused, "%+v was answered as if it were done", other)
	}
	require.Len(t, all(t, store), 1)
}

type withFunc struct{ F func() }

func (withFunc) AggregateID() string                       { return "ann" }
func (withFunc) Decide(account) ([]aggregate.Event, error) { return nil, nil }

func TestMetadata(t *testing.T) {
	t.Parallel()
	bus, store := setup(t, command.Options{})
	ctx := command.WithActor(t.Context(), "ann@example.com")
	ctx = command.WithCorrelation(ctx, "request-1")
	ctx = command.WithCausation(ctx, "cause-1")
	outer := command.WithExtra(ctx, "tenant", "blue")
	inner := command.WithExtra(outer, "region", "eu")
	_, err := command.Execute(inner, bus, accounts, open{"ann", "Ann"})
	require.NoError(t, err)
	_, err = command.Execute(outer, bus, accounts, open{"bob", "Bob"})
	require.NoError(t, err)
	_, err = command.Execute(t.Context(), bus, accounts, open{"eve", "Eve"})
	require.NoError(t, err)
	events := all(t, store)
	require.Equal(t, eventstore.Metadata{
		Actor: "ann@example.com", CorrelationID: "request-1", CausationID: "cause-1",
		Extra: map[string]string{"tenant": "blue", "region": "eu"},
	}, events[0].Metadata)
	require.Equal(t, map[string]string{"tenant": "blue"}, events[1].Metadata.Extra)
	require.Len(t, events[2].Metadata.CorrelationID, 36, "a new one")

	_, err = command.Execute(command.CausedBy(t.Context(), events[0]), bus, accounts, deposit{"ann", 1})
	require.NoError(t, err)
	caused := all(t, store)[3].Metadata
	require.Equal(t, "request-1", caused.CorrelationID)
	require.Equal(t, events[0].ID.String(), caused.CausationID)
	require.Equal(t, "blue", command.MetadataOf(outer).Extra["tenant"])
}

func TestMiddleware(t *testing.T) {
	t.Parallel()

	t.Run("Order", func(t *testing.T) {
		t.Parallel()
		var order []string
		note := func(name string) command.Middleware {
			return func(next command.Handler) command.Handler {
				return func(ctx context.Context, call *command.Call) (eventstore.Receipt, error) {
					order = append(order, name+" "+call.Name)
					return next(ctx, call)
				}
			}
		}
		bus, _ := setup(t, command.Options{Middleware: []command.Middleware{note("outer"), note("inner")}})
		_, err := command.Execute(t.Context(), bus, accounts, &open{"ann", "Ann"})
		require.NoError(t, err)
		require.Equal(t, []string{"outer command_test.open", "inner command_test.open"}, order)
	})

	t.Run("Validate", func(t *testing.T) {
		t.Parallel()
		bus, store := setup(t, command.Options{Middleware: []command.Middleware{command.Validate(func(c any) error {
			if o, ok := c.(open); ok && o.Owner == "" {
				return errors.New("owner is required")
			}
			return nil
		})}})
		_, err := command.Execute(t.Context(), bus, accounts, open{"ann", ""})
		require.ErrorIs(t, err, command.ErrInvalid)
		require.True(t, command.IsRejection(err))
		require.Empty(t, all(t, store))
		_, err = command.Execute(t.Context(), bus, accounts, open{"ann", "Ann"})
		require.NoError(t, err)
	})

	t.Run("Authorize", func(t *testing.T) {
		t.Parallel()
		bus, store := setup(t, command.Options{Middleware: []command.Middleware{command.Authorize(func(_ context.Context, call *command.Call) error {
			if call.Metadata.Actor != call.ID {
				return errors.New("not the owner")
			}
			return nil
		})}})
		_, err := command.Execute(command.WithActor(t.Context(), "eve"), bus, accounts, open{"ann", "Ann"})
		require.ErrorIs(t, err, command.ErrForbidden)
		require.EqualError(t, err, `forbidden: command_test.open for account "ann" by "eve": not the owner`)
		require.True(t, command.IsRejection(err))
		require.Empty(t, all(t, store))
		_, err = command.Execute(command.WithActor(t.Context(), "ann"), bus, accounts, open{"ann", "Ann"})
		require.NoError(t, err)
	})

	t.Run("Log", func(t *testing.T) {
		t.Parallel()
		var out bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
		bus, store := setup(t, command.Options{Middleware: []command.Middleware{command.Log(logger)}})
		_, _ = command.Execute(t.Context(), bus, accounts, open{"ann", "Ann Secret"})
		_, _ = command.Execute(t.Context(), bus, accounts, open{"ann", "Ann Secret"})
		require.NoError(t, store.Close())
		_, _ = command.Execute(t.Context(), bus, accounts, open{"bob", "Bob"})
		lines := strings.Split(out.String(), "\n")
		require.Contains(t, lines[0], `level=DEBUG msg="command executed" command=command_test.open category=account id=ann`)
		require.Contains(t, lines[0], "position=1")
		require.Contains(t, lines[1], `level=INFO msg="command rejected"`)
		require.Contains(t, lines[2], `level=ERROR msg="command failed"`)
		require.NotContains(t, out.String(), "Secret")
	})

	t.Run("Timing", func(t *testing.T) {
		t.Parallel()
		var names []string
		bus, _ := setup(t, command.Options{Middleware: []command.Middleware{command.Timing(func(call *command.Call, took time.Duration, err error) {
			require.Positive(t, took)
			names = append(names, call.Name)
			if len(names) == 2 {
				require.True(t, command.IsRejection(err))
			}
		})}})
		_, _ = command.Execute(t.Context(), bus, accounts, open{"ann", "Ann"})
		_, _ = command.Execute(t.Context(), bus, accounts, open{"ann", "Ann"})
		require.Len(t, names, 2)
	})
}

// recorder is a tracer provider that remembers its spans.
type recorder struct {
	embedded.TracerProvider
	mu    sync.Mutex
	spans []*span
}

type tracer struct {
	embedded.Tracer
	*recorder
}

type span struct {
	noop.Span
	name       string
	attributes map[attribute.Key]attribute.Value
	status     codes.Code
	ended      bool
}

func (r *recorder) Tracer(string, ...trace.TracerOption) trace.Tracer { return tracer{recorder: r} }

func (r tracer) Start(ctx context.Context, name string, _ ...trace.SpanStartOption) (context.Context, trace.Span) {
	s := &span{name: name, attributes: map[attribute.Key]attribute.Value{}}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.spans = append(r.spans, s)
	return trace.ContextWithSpan(ctx, s), s
}

func (s *span) SpanContext() trace.SpanContext {
	return trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled})
}
func (s *span) IsRecording() bool                   { return true }
func (s *span) End(...trace.SpanEndOption)          { s.ended = true }
func (s *span) SetStatus(code codes.Code, _ string) { s.status = code }
func (s *span) SetAttributes(kv ...attribute.KeyValue) {
	for _, a := range kv {
		s.attributes[a.Key] = a.Value
	}
}

// losing is a store to which another process has just written.
type losing struct {
	*memory.Store
	once sync.Once
}

func (s *losing) Enqueue(ctx context.Context, c eventstore.Commit) *eventstore.Pending {
	s.once.Do(func() {
		e := c.Events[0]
		e.ID[0]++
		_, _ = s.Append(ctx, eventstore.Commit{Events: []eventstore.Event{e}})
	})
	return s.Store.Enqueue(ctx, c)
}

func TestExecute_Span(t *testing.T) {
	t.Parallel()
	tracing := &recorder{}
	store := &losing{Store: memory.New()}
	r := aggregate.NewRuntime(store, aggregate.Options{})
	bus := command.NewBus(r, command.Options{TracerProvider: tracing})
	_, err := command.Execute(t.Context(), bus, accounts, deposit{"ann", 1})
	require.True(t, command.IsRejection(err))
	_, err = command.Execute(t.Context(), bus, accounts, open{"eve", "Eve"})
	require.True(t, command.IsRejection(err), "the other process opened it first")
	_, err = command.Execute(t.Context(), bus, accounts, deposit{"eve", 1})
	require.NoError(t, err)
	require.NoError(t, store.Close())
	_, err = command.Execute(t.Context(), bus, accounts, deposit{"eve", 1})
	require.ErrorIs(t, err, eventstore.ErrClosed)

	require.Len(t, tracing.spans, 4)
	refused, conflicted, written, failed := tracing.spans[0], tracing.spans[1], tracing.spans[2], tracing.spans[3]
	require.Equal(t, "command_test.deposit", refused.name)
	require.Equal(t, "not open", refused.attributes["deed.rejected"].AsString())
	require.Equal(t, codes.Unset, refused.status)
	require.Equal(t, int64(1), conflicted.attributes["deed.conflicts"].AsInt64())
	require.Equal(t, int64(2), written.attributes["deed.position"].AsInt64())
	require.Equal(t, codes.Error, failed.status)
	for _, s := range tracing.spans {
		require.True(t, s.ended)
	}
}

func TestExecute_TraceParentIsStored(t *testing.T) {
	t.Parallel()
	bus, store := setup(t, command.Options{TracerProvider: &recorder{}})
	_, err := command.Execute(t.Context(), bus, accounts, open{"ann", "Ann"})
	require.NoError(t, err)
	require.Equal(t, "00-01000000000000000000000000000000-0200000000000000-01", all(t, store)[0].Metadata.TraceParent)
}
