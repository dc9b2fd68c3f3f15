package projection

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/deed-go/deed/eventstore"
)

// maxPartitions bounds [ViewDefinition.Partitioned] and [SQLDefinition.Partitioned].
const maxPartitions = 128

// partition is the part of a projection that one runner has: a range of slices.
// The zero partition is the whole.
type partition struct {
	index, of int
}

// slices returns the range of slices that belong to the partition.
func (p partition) slices() eventstore.SliceRange {
	if p.of <= 1 {
		return eventstore.SliceRange{}
	}
	bound := func(i int) uint16 { return uint16(i * eventstore.Slices / p.of) }
	return eventstore.SliceRange{From: bound(p.index), To: bound(p.index + 1)}
}

// owns reports whether the partition has the slice of the stream. A row is taken
// for the stream that it would be, so what belongs to it is in one partition.
func (p partition) owns(s eventstore.Stream) bool {
	if p.of <= 1 {
		return true
	}
	r, slice := p.slices(), s.Slice()
	return r.From <= slice && slice < r.To
}

// unitName is under which name a partition of the projection keeps its lease,
// checkpoint, and all that belongs to it.
func (p partition) unitName(projection string) string {
	if p.of <= 1 {
		return projection
	}
	return fmt.Sprintf("%s/%dof%d", projection, p.index+1, p.of)
}

func partitions(n int) []partition {
	all := make([]partition, max(1, n))
	for i := range all {
		all[i] = partition{index: i, of: len(all)}
	}
	return all
}

func checkPartitions(n int) error {
	if n < 1 || n > maxPartitions {
		return fmt.Errorf("%w: %d partitions: use 1 to %d", eventstore.ErrInvalid, n, maxPartitions)
	}
	return nil
}

// layouts is the table of how many partitions the stored projections have, by
// their names. One that is not there has one.
const layouts = "projection.partitions"

type layout struct {
	Partitions int `json:"partitions"`
}

// storedUnits returns the names of the partitions in which the projection is
// stored; its own name if it is not stored, or whole.
func storedUnits(tx StateTx, name string) ([]string, error) {
	l, _, err := getJSON[layout](tx, layouts, name)
	if err != nil {
		return nil, err
	}
	var units []string
	for _, p := range partitions(l.Partitions) {
		units = append(units, p.unitName(name))
	}
	return units, nil
}

// arrange notes in how many partitions the projection is stored, and refuses
// another number than that of what is stored already.
func (r *runner) arrange(tx StateTx) error {
	name := r.projection.Name()
	l, stored, err := getJSON[layout](tx, layouts, name)
	if err != nil {
		return err
	}
	had, want := max(1, l.Partitions), max(1, r.part.of)
	if had == want && (stored || want == 1) {
		return nil
	}
	if had != want {
		begun := false
		for _, p := range partitions(had) {
			c, err := tx.Checkpoint(leaseName(p.unitName(name)))
			if err != nil {
				return err
			}
			begun = begun || !c.IsZero()
		}
		if begun {
			return fmt.Errorf("%w: it is stored in %d partitions, and its definition says %d: give the definition another version, which is built beside this one, or the number that it had", eventstore.ErrInvalid, had, want)
		}
	}
	return putJSON(tx, layouts, name, layout{Partitions: want})
}

// oneByOne has the partitions of the projection wait for each other, until the
// transaction ends: of two CREATE TABLE IF NOT EXISTS at the same time one fails.
// They all write the row, and Scan is what makes sure that it is written by now.
func (p partition) oneByOne(tx StateTx, name string) error {
	if err := putJSON(tx, layouts, name, layout{Partitions: p.of}); err != nil {
		return err
	}
	for _, err := range tx.Scan(layouts, Range{Prefix: name, Limit: 1}) {
		if err != nil {
			return err
		}
	}
	return nil
}

// entry is a projection of an engine, with a runner for each partition.
type entry struct {
	projection Projection
	runners    []*runner
	seen       atomic.Pointer[seenVersion] // where the version that is read is looked up
}

// each calls do for every runner, and joins the errors.
func (en *entry) each(do func(r *runner) error) error {
	var errs []error
	for _, r := range en.runners {
		errs = append(errs, do(r))
	}
	return errors.Join(errs...)
}

// rebuild empties the projection and waits until it has come as far as head.
func (en *entry) rebuild(ctx context.Context, head eventstore.Position) error {
	d, sql := en.projection.(*SQLDefinition)
	if !sql || len(en.runners) == 1 {
		return en.each(func(r *runner) error { return r.rebuild(ctx, head) })
	}
	running, err := en.clearTogether(ctx, d, 0, nil)
	if errors.Is(err, ErrLeaseHeld) {
		return fmt.Errorf("%w: %w", errResetsAll, err)
	}
	if err != nil || !running {
		return err
	}
	return en.wait(ctx, head)
}

// clearTogether empties the tables that all partitions write, in one update, while
// all of them stand still: each is asked while the ones before it wait. It
// reports whether any of them runs.
func (en *entry) clearTogether(ctx context.Context, d *SQLDefinition, i int, leases []Lease) (running bool, err error) {
	if i < len(en.runners) {
		var mu sync.Mutex
		later, over := false, false
		running, err = en.runners[i].ask(ctx, request{empties: true, do: func(ctx context.Context, lease Lease) (err error) {
			mu.Lock()
			defer mu.Unlock()
			if over {
				return context.Canceled
			}
			later, err = en.clearTogether(ctx, d, i+1, append(leases, lease))
			return err
		}})
		// Whoever does not wait for the answer goes on only when nothing is done any more.
		mu.Lock()
		defer mu.Unlock()
		over = true
		return running || later, err
	}
	first := en.runners[0]
	return false, first.engine.state.Update(ctx, func(tx StateTx) error {
		for i, r := range en.runners {
			if err := r.clearRecords(tx, leases[i]); err != nil {
				return err
			}
		}
		whole := d.open(first.engine.state, &first.engine.options, partition{})
		return whole.clear(ctx, tx)
	})
}

// wait returns when all partitions have come as far as p.
func (en *entry) wait(ctx context.Context, p eventstore.Position) error {
	for _, r := range en.runners {
		if err := r.progress.wait(ctx, p, false); err != nil {
			return err
		}
	}
	return nil
}

// contains reports whether the rows of all partitions contain everything up to p.
func (en *entry) contains(tx StateTx, p eventstore.Position) (bool, error) {
	for _, r := range en.runners {
		c, err := tx.Checkpoint(r.leaseName())
		if err != nil || !r.progress.contains(c.Position, p) {
			return false, err
		}
	}
	return true, nil
}

// reached is how far the one that is furthest behind has come.
func (en *entry) reached() eventstore.Position {
	least := en.runners[0].progress.reached()
	for _, r := range en.runners[1:] {
		least = min(least, r.progress.reached())
	}
	return least
}

// inOrder sorts what several partitions have said by position.
func inOrder[T any](all []T, at func(T) eventstore.Position) []T {
	slices.SortStableFunc(all, func(a, b T) int {
		switch x, y := at(a), at(b); {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	})
	return all
}

// validateUnit refuses what is no name of a projection or of one of its
// partitions, as "orders", "orders/v2", "orders/3of8", "orders/v2/3of8".
func validateUnit(name string) error {
	base, rest, _ := strings.Cut(name, "/")
	if err := validateName(base); err != nil {
		return err
	}
	if strings.Count(rest, "/") > 1 || strings.Trim(rest, "0123456789vof/") != "" {
		return fmt.Errorf("%w: projection name %q: behind the name only a version and a partition may follow, as in \"orders/v2/3of8\"", eventstore.ErrInvalid, name)
	}
	return nil
}
