package sqlite

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// acked is a commit that Append has confirmed.
type acked struct {
	ID          string
	First, Last eventstore.Position
}

// marked is the content of the workload's events.
type marked struct {
	Commit string
	N, Of  int
}

const copyName = "copy" // the workload's read model

// work appends with several writers until the context ends or the store
// refuses, and folds the events into a read model meanwhile. Every second
// commit has a key; a third of them write two streams, one of which all
// writers share. commits bounds each writer's appends; 0 is no bound.
func work(ctx context.Context, s *Store, run string, writers, commits int, ack func(acked)) error {
	var group sync.WaitGroup
	failures := make(chan error, writers+1)
	foldCtx, stop := context.WithCancel(ctx)
	var fold sync.WaitGroup
	fold.Go(func() { failures <- follow(foldCtx, s, run) })
	for w := range writers {
		group.Go(func() {
			failures <- func() error {
				for n := 0; commits == 0 || n < commits; n++ {
					id := fmt.Sprintf("%s-%d-%d", run, w, n)
					own := eventstore.Stream{Category: "own", ID: fmt.Sprintf("%s-%d-%d", run, w, n/5)}
					streams := []eventstore.Stream{own}
					if n%3 == 0 {
						streams = append(streams, eventstore.Stream{Category: "shared", ID: run}, own)
					}
					c := eventstore.Commit{}
					if n%2 == 0 {
						c.Key = id
					}
					for i, stream := range streams {
						data, err := json.Marshal(marked{id, i + 1, len(streams)})
						if err != nil {
							return err
						}
						c.Events = append(c.Events, eventstore.Event{Stream: stream, Type: "marked", Data: data, Tags: []string{"run:" + run, "writer:" + fmt.Sprint(w)}})
					}
					r, err := s.Append(ctx, c)
					if err != nil {
						return err
					}
					ack(acked{id, r.First, r.Last})
				}
				return nil
			}()
		})
	}
	group.Wait()
	stop()
	fold.Wait()
	close(failures)
	var all error
	for err := range failures {
		if !errors.Is(err, context.Canceled) {
			all = errors.Join(all, err)
		}
	}
	return all
}

// follow counts the events of each stream in the state.
func follow(ctx context.Context, s *Store, run string) error {
	lease, err := s.Acquire(ctx, copyName, run, 0)
	if err != nil {
		return err
	}
	var at projection.Checkpoint
	if err := s.View(ctx, func(tx projection.StateTx) (err error) { at, err = tx.Checkpoint(copyName); return err }); err != nil {
		return err
	}
	for batch, err := range s.Subscribe(ctx, eventstore.All(), at.Position) {
		if err != nil {
			return err
		}
		to := projection.Checkpoint{Log: s.logID, Position: batch.Through}
		err := s.Update(ctx, func(tx projection.StateTx) error {
			for _, e := range batch.Events {
				if err := tx.Put(copyName, fmt.Sprintf("%020d", e.Position), e.ID[:]); err != nil {
					return err
				}
			}
			return tx.SetCheckpoint(lease, at, to)
		})
		if err != nil {
			return err
		}
		at = to
	}
	return nil
}

// verify checks a file that was written by work and then cut off: every
// acknowledged commit is there, whole and in order, none is there in part or
// twice, and the read model is the fold of the log up to its checkpoint.
func verify(path string, all []acked) (err error) {
	ctx := context.Background()
	s, err := Open(ctx, path)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	err = s.scan(ctx, func(r *scanner) error {
		result := ""
		_, err := r.c.row("PRAGMA integrity_check", func(s *statement) { result = s.text(0) })
		if err == nil && result != "ok" {
			err = errors.New("integrity check: " + result)
		}
		return err
	})
	if err != nil {
		return err
	}
	ids := map[eventstore.Position]string{}
	versions := map[eventstore.Stream]uint64{}
	commits := map[string]acked{}
	var open *marked
	head := eventstore.Position(0)
	for e, err := range s.Read(ctx, eventstore.All(), eventstore.ReadOptions{}) {
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		head++
		if e.Position != head {
			return fmt.Errorf("position %d where %d belongs", e.Position, head)
		}
		versions[e.Stream]++
		if e.Version != versions[e.Stream] {
			return fmt.Errorf("%s has version %d where %d belongs", e.Stream, e.Version, versions[e.Stream])
		}
		ids[head] = string(e.ID[:])
		var m marked
		if err := json.Unmarshal(e.Data, &m); err != nil {
			return fmt.Errorf("position %d: %w", head, err)
		}
		switch {
		case open == nil && m.N != 1, open != nil && (open.Commit != m.Commit || open.N+1 != m.N):
			return fmt.Errorf("position %d: event %d of commit %s, after %+v", head, m.N, m.Commit, open)
		case m.N == 1:
			if _, twice := commits[m.Commit]; twice {
				return fmt.Errorf("commit %s is there twice", m.Commit)
			}
			commits[m.Commit] = acked{m.Commit, head, head}
		}
		c := commits[m.Commit]
		c.Last = head
		commits[m.Commit] = c
		if open = &m; m.N == m.Of {
			open = nil
		}
	}
	if open != nil {
		return fmt.Errorf("commit %s ends after event %d of %d", open.Commit, open.N, open.Of)
	}
	for _, a := range all {
		if is, ok := commits[a.ID]; !ok || is != a {
			return fmt.Errorf("lost: acknowledged as %+v, found %+v; the head is %d", a, is, head)
		}
	}
	for id, c := range commits {
		var writer, n int
		var run string
		if _, err := fmt.Sscanf(dashes(id), "%s %d %d", &run, &writer, &n); err != nil {
			return fmt.Errorf("commit id %q: %w", id, err)
		}
		r, ok, err := s.Lookup(ctx, eventstore.Stream{}, id)
		if err != nil || ok != (n%2 == 0) || ok && (r.First != c.First || r.Last != c.Last) {
			return fmt.Errorf("key %s: %+v, %t, %w", id, r, ok, err)
		}
	}
	return s.View(ctx, func(tx projection.StateTx) error {
		at, err := tx.Checkpoint(copyName)
		if err != nil {
			return err
		}
		if at.Position > head {
			return fmt.Errorf("the read model is at %d, ahead of the log at %d", at.Position, head)
		}
		rows := eventstore.Position(0)
		for row, err := range tx.Scan(copyName, projection.Range{}) {
			if err != nil {
				return err
			}
			rows++
			if row.Key != fmt.Sprintf("%020d", rows) || string(row.Value) != ids[rows] {
				return fmt.Errorf("row %d of the read model is %s", rows, row.Key)
			}
		}
		if rows != at.Position {
			return fmt.Errorf("the read model has %d rows at checkpoint %d", rows, at.Position)
		}
		return nil
	})
}

func dashes(id string) string {
	b := []byte(id)
	for i := range b {
		if b[i] == '-' {
			b[i] = ' '
		}
	}
	return string(b)
}
