package command

import (
	"context"
	"maps"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

type metadataKey struct{}

func metadataOf(ctx context.Context) eventstore.Metadata {
	m, _ := ctx.Value(metadataKey{}).(eventstore.Metadata)
	return m
}

func with(ctx context.Context, change func(*eventstore.Metadata)) context.Context {
	m := metadataOf(ctx)
	change(&m)
	return context.WithValue(ctx, metadataKey{}, m)
}

// WithActor says who asks: commands executed with the context store it in the
// metadata of their events.
func WithActor(ctx context.Context, actor string) context.Context {
	return with(ctx, func(m *eventstore.Metadata) { m.Actor = actor })
}

// WithCorrelation names what the commands executed with the context belong to,
// for example a request id. Without it each command gets a new id.
func WithCorrelation(ctx context.Context, id string) context.Context {
	return with(ctx, func(m *eventstore.Metadata) { m.CorrelationID = id })
}

// WithCausation names the event or command that made the commands executed
// with the context necessary.
func WithCausation(ctx context.Context, id string) context.Context {
	return with(ctx, func(m *eventstore.Metadata) { m.CausationID = id })
}

// CausedBy carries on from an event: its correlation, and its id as the
// causation.
func CausedBy(ctx context.Context, r eventstore.Recorded) context.Context {
	return with(ctx, func(m *eventstore.Metadata) {
		m.CorrelationID, m.CausationID = r.Metadata.CorrelationID, r.ID.String()
	})
}

// WithExtra adds an entry of the application's own.
func WithExtra(ctx context.Context, key, value string) context.Context {
	return with(ctx, func(m *eventstore.Metadata) {
		extra := make(map[string]string, len(m.Extra)+1)
		maps.Copy(extra, m.Extra)
		extra[key] = value
		m.Extra = extra
	})
}

// MetadataOf returns the metadata that a command executed with the context
// would store, but for the correlation id it would be given.
func MetadataOf(ctx context.Context) eventstore.Metadata {
	m := metadataOf(ctx)
	m.Extra = maps.Clone(m.Extra)
	return m
}

func newCorrelation() string {
	id, err := uuid.NewV7()
	if err != nil {
		return ""
	}
	return id.String()
}
