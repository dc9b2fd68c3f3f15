package esdbserver

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcmetadata "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// The refusals of the real server: a status, and trailers that clients read.

func refuse(ctx context.Context, code codes.Code, exception, text string, trailers ...string) error {
	_ = grpc.SetTrailer(ctx, grpcmetadata.Pairs(append([]string{"exception", exception}, trailers...)...))
	return status.Error(code, text)
}

func refuseDeleted(ctx context.Context, stream string) error {
	return refuse(ctx, codes.FailedPrecondition, "stream-deleted", fmt.Sprintf("Event stream '%s' is deleted.", stream), "stream-name", stream)
}

func refuseWrongVersion(ctx context.Context, stream string, expected, actual int64) error {
	return refuse(ctx, codes.FailedPrecondition, "wrong-expected-version",
		fmt.Sprintf("Append failed due to WrongExpectedVersion. Stream: %s, Expected version: %d, Actual version: %d", stream, expected, actual),
		"stream-name", stream, "expected-version", strconv.FormatInt(expected, 10), "actual-version", strconv.FormatInt(actual, 10))
}

func refuseTooLarge(ctx context.Context, most int) error {
	return refuse(ctx, codes.InvalidArgument, "maximum-append-size-exceeded",
		fmt.Sprintf("Maximum Append Size of %d Exceeded.", most), "maximum-append-size", strconv.Itoa(most))
}

func refuseMissingProperty(ctx context.Context, name string) error {
	return refuse(ctx, codes.InvalidArgument, "missing-required-metadata-property",
		fmt.Sprintf("Required Metadata Property '%s' is missing", name), "required-metadata-properties", "type,content-type")
}

func refuseNotLeader(ctx context.Context, host string, port int) error {
	return refuse(ctx, codes.NotFound, "not-leader", "Leader info available", "leader-endpoint-host", host, "leader-endpoint-port", strconv.Itoa(port))
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

// refuseFailed answers with what went wrong in the server itself.
func refuseFailed(err error) error {
	switch {
	case errors.Is(err, errStopped):
		return status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	return status.Error(codes.Unknown, err.Error())
}
