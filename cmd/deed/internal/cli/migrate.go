package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/deed-go/deed/cmd/deed/internal/stores"
)

// migrateCommand applies what is missing of a schema.
type migrateCommand struct {
	storeFlag
	Print bool `help:"Print the statements of the whole schema instead, for people who apply them with a tool of their own. The database is not looked at."`
	JSON  bool `help:"Print JSON."`
}

// Help is shown by deed migrate --help.
func (c *migrateCommand) Help() string {
	return `A database that does not exist is made, where the backend can. Programs that open a store do the same, unless they are told not to.`
}

// Run migrates, or prints.
func (c *migrateCommand) Run(ctx context.Context, e *Environment) error {
	dsn, err := c.find(e)
	if err != nil {
		return err
	}
	// What is wrong with the DSN is told first, also where there is nothing to do.
	if _, err := dsn.Opener(ctx, stores.Create); err != nil {
		return err
	}
	steps := []stores.Migration{}
	if dsn.Migrations != nil {
		if steps, err = dsn.Migrations(dsn.Raw()); err != nil {
			return err
		}
	}
	if c.Print {
		return c.print(e, dsn, steps)
	}
	applied := []stores.Migration{}
	if dsn.Migrate != nil {
		found, err := dsn.Migrate(ctx, dsn.Raw())
		if err != nil {
			return err
		}
		applied = append(applied, found...)
	}
	if c.JSON {
		for i := range applied {
			applied[i].SQL = ""
		}
		return printJSON(e.Stdout, map[string]any{"store": dsn.String(), "version": len(steps), "applied": applied})
	}
	if len(steps) == 0 {
		fmt.Fprintf(e.Stdout, "nothing to migrate: %s has no schema\n", dsn)
		return nil
	}
	for _, m := range applied {
		fmt.Fprintf(e.Stdout, "applied %03d %s\n", m.Version, m.Name)
	}
	last := steps[len(steps)-1]
	fmt.Fprintf(e.Stdout, "%s is at %03d %s\n", dsn, last.Version, last.Name)
	return nil
}

func (c *migrateCommand) print(e *Environment, dsn stores.DSN, steps []stores.Migration) error {
	if c.JSON {
		return printJSON(e.Stdout, map[string]any{"store": dsn.String(), "migrations": steps})
	}
	if len(steps) == 0 {
		fmt.Fprintf(e.Stdout, "-- nothing to migrate: %s has no schema\n", dsn)
	}
	for i, m := range steps {
		if i > 0 {
			fmt.Fprintln(e.Stdout)
		}
		fmt.Fprintf(e.Stdout, "-- %03d %s\n\n%s\n", m.Version, m.Name, strings.TrimSpace(m.SQL))
	}
	return nil
}
