// Package query has the signatures of the real one.
package query

import "context"

func Get(ctx context.Context, key string) (string, error) { return "", nil }
