package nats

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// newest is the last event that this process has seen. When the server was away
// it is looked at again: a server that does not sync every write, or was
// restored, may have lost it, and have gone on with others under the same
// sequences.
type newest struct {
	mu       sync.Mutex
	sequence uint64
	id       uuid.UUID
	changes  uint64 // of the connection's state, when it was looked at last
	broken   error
}

func (n *newest) see(sequence uint64, id uuid.UUID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if sequence > n.sequence {
		n.sequence, n.id = sequence, id
	}
}

// verifyReconnected is verify if the connection was lost since the last time.
func (s *Store) verifyReconnected(ctx context.Context) error {
	changes := s.changes.Load()
	s.newest.mu.Lock()
	same, broken := changes == s.newest.changes, s.newest.broken
	s.newest.mu.Unlock()
	if same {
		return broken
	}
	if err := s.verify(ctx); err != nil {
		return err
	}
	s.newest.mu.Lock()
	s.newest.changes = max(changes, s.newest.changes)
	s.newest.mu.Unlock()
	return nil
}

// verify makes sure that the log is still the one that was seen.
func (s *Store) verify(ctx context.Context) error {
	s.newest.mu.Lock()
	sequence, id, broken := s.newest.sequence, s.newest.id, s.newest.broken
	s.newest.mu.Unlock()
	if broken != nil || sequence == 0 {
		return broken
	}
	var found *message
	for began := time.Now(); ; {
		err := s.asking(ctx, "look for the last event", func(ctx context.Context) (err error) {
			found, err = s.fresh(ctx, &getRequest{Sequence: sequence})
			return err
		})
		if err != nil {
			return err
		}
		if found != nil || s.replicas.Load() == 1 || time.Since(began) > yesterday {
			break
		}
		if s.closed() { // Close waits for appends, which wait for this
			return fmt.Errorf("look for the last event: %w: %w", eventstore.ErrUnavailable, errYesterday)
		}
		if !pause(ctx, 100*time.Millisecond) {
			return ctx.Err()
		}
	}
	if found != nil && found.ID == id {
		return nil
	}
	broken = fmt.Errorf("%w: this process has seen an event at position %d that is not there any more: the server has lost events that it acknowledged (sync_interval is not always?), or was restored: restart the program, and check what it did on the lost events", eventstore.ErrGap, sequence)
	s.newest.mu.Lock()
	s.newest.broken = broken
	s.newest.mu.Unlock()
	return broken
}
