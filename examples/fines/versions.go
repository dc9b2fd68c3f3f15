package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/projection"
)

// showVersions waits until version 2 of the monthly figures is the one that is
// read, and says how it differed from version 1 when it became so.
func showVersions(ctx context.Context, app *deed.App, w io.Writer) error {
	version, err := awaitVersion(ctx, app, monthsToo.Name(), 2)
	if err != nil || version.Comparison == nil {
		return err
	}
	_, err = fmt.Fprintln(w, *version.Comparison)
	return err
}

// awaitVersion returns when the version is the one that is read, or was.
func awaitVersion(ctx context.Context, app *deed.App, name string, version int) (projection.VersionInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for {
		all, err := app.Projections().Versions(ctx, name)
		if err != nil {
			return projection.VersionInfo{}, err
		}
		for _, v := range all {
			if v.Version == version && (v.Active || !v.Activated.IsZero()) {
				return v, nil
			}
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return projection.VersionInfo{}, errors.Join(fmt.Errorf("version %d of %q is not read yet", version, name), ctx.Err())
		}
	}
}
