package projection

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// mostSamples bounds [Comparison.Samples], and sampleBytes what is kept of each
// row there.
const (
	mostSamples = 10
	sampleBytes = 4096
)

// Comparison is how the rows of two versions of a projection differ.
type Comparison struct {
	Name string `json:"name"`
	// From is the version that is compared with, To the other one.
	From ComparedVersion `json:"from"`
	To   ComparedVersion `json:"to"`
	// Compared says that rows were compared: those of views are, those of SQL
	// projections are the program's own.
	Compared bool `json:"compared"`
	// Added rows are in To only, Removed ones in From only, Changed ones have other
	// contents.
	Added   int `json:"added"`
	Removed int `json:"removed"`
	Changed int `json:"changed"`
	// Samples are the first rows that differ, up to ten, in the order of their keys.
	Samples []RowChange `json:"samples,omitempty"`
	At      time.Time   `json:"at"`
}

// ComparedVersion is one of the two sides of a [Comparison].
type ComparedVersion struct {
	Version int `json:"version"`
	// Position is how far its rows had come. Where that differs between the two, so
	// may the rows of which the events between were.
	Position eventstore.Position `json:"position"`
	Rows     int                 `json:"rows"`
}

// RowChange is a row of both versions as JSON, empty where there is none. One that
// is longer than 4,096 bytes is cut, and then is JSON text.
type RowChange struct {
	Key string          `json:"key"`
	Old json.RawMessage `json:"old,omitempty"`
	New json.RawMessage `json:"new,omitempty"`
}

// Same reports whether no row differs.
func (c Comparison) Same() bool { return c.Compared && c.Added+c.Removed+c.Changed == 0 }

// String says what differs: a line, and one for each sample.
func (c Comparison) String() string {
	where := fmt.Sprintf("at position %d", c.To.Position)
	if c.From.Position != c.To.Position {
		where = fmt.Sprintf("at positions %d and %d", c.From.Position, c.To.Position)
	}
	if !c.Compared {
		return fmt.Sprintf("versions %d and %d of %q %s: rows of SQL projections are not compared", c.From.Version, c.To.Version, c.Name, where)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "version %d of %q has %d rows, version %d has %d, %s: %d added, %d removed, %d changed",
		c.From.Version, c.Name, c.From.Rows, c.To.Version, c.To.Rows, where, c.Added, c.Removed, c.Changed)
	for _, s := range c.Samples {
		switch {
		case len(s.Old) == 0:
			fmt.Fprintf(&b, "\n+ %s %s", s.Key, s.New)
		case len(s.New) == 0:
			fmt.Fprintf(&b, "\n- %s %s", s.Key, s.Old)
		default:
			fmt.Fprintf(&b, "\n~ %s %s\n    -> %s", s.Key, s.Old, s.New)
		}
	}
	return b.String()
}

// Compare compares the rows of two versions of a projection on one snapshot,
// while both go on: in the order of their keys, without keeping them. The name may
// have a version behind it, which does not count. The error is [ErrNoVersion] if
// one of them was never begun.
func (e *Engine) Compare(ctx context.Context, name string, from, to int) (Comparison, error) {
	return e.admin().Compare(ctx, name, from, to)
}

// Compare is [Engine.Compare].
func (a *Admin) Compare(ctx context.Context, name string, from, to int) (Comparison, error) {
	if err := validateUnit(name); err != nil {
		return Comparison{}, err
	}
	base, _, _ := splitUnit(name)
	c, err := compareVersions(ctx, a.state, base, from, to)
	if err != nil {
		err = fmt.Errorf("compare versions %d and %d of projection %q: %w", from, to, base, err)
	}
	return c, err
}

// How often, and how long between, a snapshot is looked for in which both
// versions are at the same position.
const (
	alignTries = 20
	alignPause = 5 * time.Millisecond
)

func compareVersions(ctx context.Context, s State, base string, from, to int) (c Comparison, err error) {
	for try := 1; ; try++ {
		apart := false
		err = s.View(ctx, func(tx StateTx) error {
			c = Comparison{Name: base, Compared: true, At: time.Now()}
			for _, side := range []struct {
				version int
				to      *ComparedVersion
			}{{from, &c.From}, {to, &c.To}} {
				at, begun, err := heldUnits(tx, versionName(base, side.version), false)
				if err != nil {
					return err
				}
				if !begun {
					return fmt.Errorf("%w: %d", ErrNoVersion, side.version)
				}
				known, _, err := readRecord(tx, base, side.version)
				if err != nil {
					return err
				}
				*side.to = ComparedVersion{Version: side.version, Position: at.least}
				c.Compared = c.Compared && !known.SQL
			}
			if apart = c.From.Position != c.To.Position && c.Compared && try < alignTries; apart || !c.Compared {
				return nil
			}
			return c.rows(ctx, tx)
		})
		if err != nil || !apart {
			return c, err
		}
		if err := sleep(ctx, alignPause); err != nil {
			return c, err
		}
	}
}

// rows goes through both tables in the order of their keys.
func (c *Comparison) rows(ctx context.Context, tx StateTx) error {
	olds, stop := iter.Pull2(tx.Scan("view."+versionName(c.Name, c.From.Version), Range{}))
	defer stop()
	news, stop := iter.Pull2(tx.Scan("view."+versionName(c.Name, c.To.Version), Range{}))
	defer stop()
	// The rows that were yielded, false at the end.
	take := func(next func() (Row, error, bool)) (Row, bool, error) {
		row, err, more := next()
		return row, more && err == nil, err
	}
	before, hasOld, err := take(olds)
	if err != nil {
		return err
	}
	after, hasNew, err := take(news)
	if err != nil {
		return err
	}
	for n := 1; hasOld || hasNew; n++ {
		if n%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		was := hasOld && (!hasNew || before.Key <= after.Key)
		is := hasNew && (!hasOld || after.Key <= before.Key)
		switch {
		case was && is && bytes.Equal(before.Value, after.Value):
		case was && is:
			c.Changed++
			c.sample(before.Key, before.Value, after.Value)
		case was:
			c.Removed++
			c.sample(before.Key, before.Value, nil)
		default:
			c.Added++
			c.sample(after.Key, nil, after.Value)
		}
		if was {
			c.From.Rows++
			if before, hasOld, err = take(olds); err != nil {
				return err
			}
		}
		if is {
			c.To.Rows++
			if after, hasNew, err = take(news); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Comparison) sample(key string, before, after []byte) {
	if len(c.Samples) < mostSamples {
		c.Samples = append(c.Samples, RowChange{Key: strings.ToValidUTF8(key, "�"), Old: sampled(before), New: sampled(after)})
	}
}

func sampled(value []byte) json.RawMessage {
	if len(value) <= sampleBytes {
		return bytes.Clone(value)
	}
	cut, _ := json.Marshal(strings.ToValidUTF8(string(value[:sampleBytes]), "") + "…")
	return cut
}
