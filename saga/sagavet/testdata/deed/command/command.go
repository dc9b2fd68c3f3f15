// Package command has the signatures of the real one.
package command

import "context"

type Bus struct{}

func Execute[C any](ctx context.Context, bus *Bus, c C) error { return nil }

func WithActor(ctx context.Context, actor string) context.Context { return ctx }

func Rejectf(format string, a ...any) error { return nil }
