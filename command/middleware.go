package command

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// Sentinels of rejections that come from before the aggregate.
var (
	// ErrInvalid: the command is not well-formed, whatever the state.
	ErrInvalid = errors.New("invalid command")
	// ErrForbidden: whoever asks may not do this.
	ErrForbidden = errors.New("forbidden")
)

// Validate asks check about every command, in addition to the command's own
// Validate method: for rules that many commands share, or a validation
// library. Its error becomes a rejection that wraps [ErrInvalid].
func Validate(check func(command any) error) Middleware {
	return func(next Handler) Handler {
		return func(ctx context.Context, call *Call) (eventstore.Receipt, error) {
			if err := check(call.Command); err != nil {
				return eventstore.Receipt{}, invalid(call, err)
			}
			return next(ctx, call)
		}
	}
}

func invalid(call *Call, err error) error {
	return Reject(fmt.Errorf("%w: %s for %s %q: %w", ErrInvalid, call.Name, call.Category, call.ID, err))
}

// Authorize asks allow about every command; call.Metadata.Actor says who asks,
// where [WithActor] was used. Its error becomes a rejection that wraps
// [ErrForbidden].
func Authorize(allow func(ctx context.Context, call *Call) error) Middleware {
	return func(next Handler) Handler {
		return func(ctx context.Context, call *Call) (eventstore.Receipt, error) {
			if err := allow(ctx, call); err != nil {
				return eventstore.Receipt{}, Reject(fmt.Errorf("%w: %s for %s %q by %q: %w", ErrForbidden, call.Name, call.Category, call.ID, call.Metadata.Actor, err))
			}
			return next(ctx, call)
		}
	}
}

// Log writes a line for every command: at level Info for rejections, at Error
// for failures, at Debug for what succeeded. Commands are not logged, only their
// names: they may hold what a log must not.
func Log(logger *slog.Logger) Middleware {
	return func(next Handler) Handler {
		return func(ctx context.Context, call *Call) (eventstore.Receipt, error) {
			began := time.Now()
			receipt, err := next(ctx, call)
			level, message := slog.LevelDebug, "command executed"
			switch {
			case IsRejection(err):
				level, message = slog.LevelInfo, "command rejected"
			case err != nil:
				level, message = slog.LevelError, "command failed"
			}
			if !logger.Enabled(ctx, level) {
				return receipt, err
			}
			attributes := []slog.Attr{
				slog.String("command", call.Name), slog.String("category", call.Category), slog.String("id", call.ID),
				slog.String("correlation", call.Metadata.CorrelationID), slog.Duration("took", time.Since(began)),
			}
			if err != nil {
				attributes = append(attributes, slog.String("error", err.Error()))
			} else {
				attributes = append(attributes, slog.Uint64("position", uint64(receipt.Last)), slog.Bool("duplicate", receipt.Duplicate))
			}
			logger.LogAttrs(ctx, level, message, attributes...)
			return receipt, err
		}
	}
}

// Timing reports how long every command took, until its events were durable,
// and how it ended: for metrics. Report runs on the caller's goroutine.
func Timing(report func(call *Call, took time.Duration, err error)) Middleware {
	return func(next Handler) Handler {
		return func(ctx context.Context, call *Call) (eventstore.Receipt, error) {
			began := time.Now()
			receipt, err := next(ctx, call)
			report(call, time.Since(began), err)
			return receipt, err
		}
	}
}
