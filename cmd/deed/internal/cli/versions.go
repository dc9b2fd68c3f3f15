package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/deed-go/deed/projection"
)

// versioned is what the commands about versions of a projection have in common.
type versioned struct {
	keeper
	Name string `arg:"" help:"The projection's name, without a version."`
	JSON bool   `help:"Print JSON."`
}

// tell prints the result in the one form or the other.
func (c *versioned) tell(e *Environment, result map[string]any, text string) error {
	if c.JSON {
		result["projection"] = c.Name
		return printJSON(e.Stdout, result)
	}
	_, err := fmt.Fprintln(e.Stdout, text)
	return err
}

// do opens the state and has it done.
func (c *versioned) do(ctx context.Context, e *Environment, do func(admin *projection.Admin) error) (err error) {
	_, _, state, release, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	return do(projection.NewAdmin(state, whoAsks()))
}

// compareVersions is deed projections compare.
type compareVersions struct {
	versioned
	From int `required:"" placeholder:"N" help:"The version to compare with."`
	To   int `required:"" placeholder:"N" help:"The version that is compared."`
}

// Help is shown by deed projections compare --help.
func (c *compareVersions) Help() string {
	return `Both tables are read on one snapshot while the versions go on. Told are the numbers of rows, of those that were added, removed and changed, and the first ten of them. Where the two are not at the same position, rows of the events between differ too. Rows of SQL projections are the program's own and are not compared. That versions differ is no failure.`
}

// Run compares.
func (c *compareVersions) Run(ctx context.Context, e *Environment) error {
	return c.do(ctx, e, func(admin *projection.Admin) error {
		found, err := admin.Compare(ctx, c.Name, c.From, c.To)
		if err != nil {
			return err
		}
		return c.tell(e, map[string]any{"comparison": found}, found.String())
	})
}

// activateVersion is deed projections activate.
type activateVersion struct {
	versioned
	Version        int  `required:"" placeholder:"N" help:"The version to read from now on."`
	AlthoughBehind bool `help:"Also if it contains less than what is read now: reads go back then."`
}

// Help is shown by deed projections activate --help.
func (c *activateVersion) Help() string {
	return `A version that was built and held back is read from now on, or an earlier one again, by every process, in one transaction. It must have come at least as far as the one that is read now, so that no read goes back; one that nobody runs any more falls behind, and is refused. A version that was gone back from becomes active again by this command alone.`
}

// Run activates.
func (c *activateVersion) Run(ctx context.Context, e *Environment) error {
	return c.do(ctx, e, func(admin *projection.Admin) error {
		var options []projection.ActivateOption
		if c.AlthoughBehind {
			options = append(options, projection.AlthoughBehind())
		}
		err := admin.Activate(ctx, c.Name, c.Version, options...)
		if errors.Is(err, projection.ErrBehind) || errors.Is(err, projection.ErrWrongLog) {
			err = fmt.Errorf("%w (see --although-behind)", err)
		}
		if err != nil {
			return err
		}
		return c.tell(e, map[string]any{"active": c.Version}, fmt.Sprintf("version %d of projection %s is read from now on", c.Version, c.Name))
	})
}

// dropVersion is deed projections drop.
type dropVersion struct {
	versioned
	Version int `required:"" placeholder:"N" help:"The version to remove."`
}

// Help is shown by deed projections drop --help.
func (c *dropVersion) Help() string {
	return `Removed are its rows, checkpoints and dead letters; of an SQL projection, what its Reset statements remove. The version that is read is refused, and so is one that a process runs.`
}

// Run drops.
func (c *dropVersion) Run(ctx context.Context, e *Environment) error {
	return c.do(ctx, e, func(admin *projection.Admin) error {
		if err := admin.DropVersion(ctx, c.Name, c.Version); err != nil {
			return err
		}
		return c.tell(e, map[string]any{"dropped": c.Version}, fmt.Sprintf("version %d of projection %s is removed", c.Version, c.Name))
	})
}
