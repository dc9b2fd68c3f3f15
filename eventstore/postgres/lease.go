package postgres

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// members keeps this process known as living, for the leases that it holds
// until they are released: a heartbeat by the database's clock.
type members struct {
	mu      sync.Mutex
	id      uuid.UUID
	joined  bool
	left    bool
	leaving chan struct{}
	done    chan struct{}
}

// join makes the process a member, once.
func (m *members) join(ctx context.Context, s *Store) (uuid.UUID, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.joined {
		return m.id, nil
	}
	if m.id == uuid.Nil {
		m.id = newID()
	}
	if err := m.beat(ctx, s); err != nil {
		return m.id, err
	}
	m.joined = true
	m.leaving, m.done = make(chan struct{}), make(chan struct{})
	go m.live(s)
	return m.id, nil
}

func (m *members) beat(ctx context.Context, s *Store) error {
	// Not on the pool of the state, whose connections long updates may all have.
	_, err := s.logs.Exec(ctx, `INSERT INTO `+s.schema+`.members (id, until) VALUES ($1, clock_timestamp() + $2 * interval '1 microsecond')
		ON CONFLICT (id) DO UPDATE SET until = excluded.until`, m.id, s.settings.leaseTTL.Microseconds())
	return err
}

// live sends heartbeats until the process leaves.
func (m *members) live(s *Store) {
	defer close(m.done)
	interval := s.settings.leaseTTL / 3
	timer := time.NewTimer(interval)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-m.leaving:
			return
		}
		ctx, cancel := context.WithTimeout(s.base, interval)
		err := m.beat(ctx, s)
		if err == nil {
			// Processes that ended without a word are forgotten in the end.
			_, _ = s.logs.Exec(ctx, `DELETE FROM `+s.schema+`.members m WHERE m.until < clock_timestamp() - interval '1 day'`)
		}
		cancel()
		if err != nil {
			timer.Reset(interval / 10) // what is lost by a missed beat is time, not safety: the epoch decides
		} else {
			timer.Reset(interval)
		}
	}
}

// leave gives up all leases of the process that do not end by time.
func (m *members) leave(s *Store) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.joined || m.left {
		return
	}
	m.left = true
	close(m.leaving)
	<-m.done
	ctx, cancel := context.WithTimeout(s.base, closingPatience)
	defer cancel()
	_, _ = s.pool.Exec(ctx, `DELETE FROM `+s.schema+`.members WHERE id = $1`, m.id)
}

// LeaseTTL returns for how long a process that has died, or says nothing, keeps
// the leases that do not end by time: 10 seconds.
func (s *Store) LeaseTTL() time.Duration { return s.settings.leaseTTL }

// Acquire implements projection.State. Leases end by the database's clock; one
// without an end is held as long as this process lives, which it says every
// few seconds: ten seconds after its last word others can have it.
func (s *Store) Acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	if err := s.enter(ctx); err != nil {
		return projection.Lease{}, err
	}
	// Cut off in the middle, it might have the lease and nobody would know. So it
	// goes on by itself, and gives back what it gets.
	going, cut := context.WithCancel(context.WithoutCancel(ctx))
	type answer struct {
		lease projection.Lease
		err   error
	}
	answers := make(chan answer, 1)
	var mu sync.Mutex
	abandoned := false
	go func() {
		defer s.leave()
		defer cut()
		lease, err := s.acquire(going, name, owner, ttl)
		mu.Lock()
		late := abandoned
		if !late {
			answers <- answer{lease, err}
		}
		mu.Unlock()
		if late && err == nil {
			_ = s.Release(going, lease)
		}
	}()
	select {
	case a := <-answers:
		return a.lease, a.err
	case <-ctx.Done():
	}
	mu.Lock()
	defer mu.Unlock()
	select {
	case a := <-answers:
		return a.lease, a.err
	default:
	}
	abandoned = true
	time.AfterFunc(acquireGrace, cut)
	return projection.Lease{}, context.Cause(ctx)
}

// acquireGrace is how long an attempt to acquire a lease goes on that nobody
// waits for any more.
const acquireGrace = 2 * time.Second

// acquire is Acquire, whoever waits for it.
func (s *Store) acquire(ctx context.Context, name, owner string, ttl time.Duration) (projection.Lease, error) {
	lease := projection.Lease{Name: name, Owner: owner}
	err := s.trying(ctx, fmt.Sprintf("acquire the lease %q", name), func() error {
		var member *uuid.UUID
		if ttl <= 0 {
			id, err := s.members.join(ctx, s)
			if err != nil {
				return err
			}
			member = &id
		}
		var epoch int64
		var until *time.Time
		// An update of the owner may have the row locked. Only after that wait, in a
		// statement of its own, is it looked whether the owner still lives.
		b := &pgx.Batch{}
		b.Queue("SELECT FROM "+s.schema+".leases WHERE name = $1 FOR UPDATE", name)
		b.Queue(`INSERT INTO `+s.schema+`.leases AS l (name, owner, epoch, held, until, member)
			VALUES ($1, $2, 1, true, clock_timestamp() + $3::bigint * interval '1 microsecond', $4)
			ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, epoch = l.epoch + 1, held = true, until = excluded.until, member = excluded.member
			WHERE NOT l.held OR l.owner = excluded.owner OR l.until <= clock_timestamp()
			   OR l.until IS NULL AND NOT EXISTS (SELECT FROM `+s.schema+`.members m WHERE m.id = l.member AND m.until > clock_timestamp())
			RETURNING epoch, until`, name, owner, deadlineText(ttl), member)
		results := s.pool.SendBatch(ctx, b)
		_, err := results.Exec()
		if err == nil {
			err = results.QueryRow().Scan(&epoch, &until)
		}
		if closing := results.Close(); err == nil {
			err = closing
		}
		if errors.Is(err, pgx.ErrNoRows) {
			return s.held(ctx, name)
		}
		if err != nil {
			return err
		}
		lease.Epoch = uint64(epoch)
		if until != nil {
			lease.Until = until.UTC()
		}
		return nil
	})
	if err != nil {
		return projection.Lease{}, err
	}
	return lease, nil
}

// held says who has the lease.
func (s *Store) held(ctx context.Context, name string) error {
	var owner string
	var until *time.Time
	if err := s.pool.QueryRow(ctx, "SELECT owner, until FROM "+s.schema+".leases WHERE name = $1", name).Scan(&owner, &until); err != nil {
		return err
	}
	text := "it is released, or its process has ended"
	if until != nil {
		text = until.UTC().Format(time.RFC3339Nano)
	}
	return &settledError{fmt.Errorf("%w: %q is held by %q until %s", projection.ErrLeaseHeld, name, owner, text)}
}

// settledError is an answer, which is not to be asked for again.
type settledError struct{ error }

func (e *settledError) Unwrap() error { return e.error }

// Renew implements projection.State.
func (s *Store) Renew(ctx context.Context, lease projection.Lease, ttl time.Duration) (projection.Lease, error) {
	if err := s.enter(ctx); err != nil {
		return projection.Lease{}, err
	}
	defer s.leave()
	err := s.trying(ctx, fmt.Sprintf("renew the lease %q", lease.Name), func() error {
		var member *uuid.UUID
		if ttl <= 0 {
			id, err := s.members.join(ctx, s)
			if err != nil {
				return err
			}
			member = &id
		}
		var until *time.Time
		err := s.pool.QueryRow(ctx, `UPDATE `+s.schema+`.leases SET held = true, until = clock_timestamp() + $4::bigint * interval '1 microsecond', member = $5
			WHERE name = $1 AND owner = $2 AND epoch = $3 RETURNING until`, lease.Name, lease.Owner, int64(lease.Epoch), deadlineText(ttl), member).Scan(&until)
		if errors.Is(err, pgx.ErrNoRows) {
			return s.lost(ctx, lease)
		}
		if err != nil {
			return err
		}
		lease.Until = time.Time{}
		if until != nil {
			lease.Until = until.UTC()
		}
		return nil
	})
	if err != nil {
		return projection.Lease{}, err
	}
	return lease, nil
}

// lost says who has the lease instead.
func (s *Store) lost(ctx context.Context, lease projection.Lease) error {
	var now projection.Lease
	var epoch int64
	err := s.pool.QueryRow(ctx, "SELECT owner, epoch FROM "+s.schema+".leases WHERE name = $1", lease.Name).Scan(&now.Owner, &epoch)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	now.Epoch = uint64(epoch)
	return &settledError{current(now, lease)}
}

// Release implements projection.State.
func (s *Store) Release(ctx context.Context, lease projection.Lease) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.leave()
	err := s.trying(ctx, fmt.Sprintf("release the lease %q", lease.Name), func() error {
		_, err := s.pool.Exec(ctx, "UPDATE "+s.schema+".leases SET held = false WHERE name = $1 AND owner = $2 AND epoch = $3", lease.Name, lease.Owner, int64(lease.Epoch))
		return err
	})
	if err == nil && !s.settings.pooled {
		s.notifier.lease(lease.Name)
	}
	return err
}

// Checkpoints implements projection.CheckpointLister.
func (s *Store) Checkpoints(ctx context.Context) ([]projection.NamedCheckpoint, error) {
	if err := s.enter(ctx); err != nil {
		return nil, err
	}
	defer s.leave()
	var all []projection.NamedCheckpoint
	err := s.trying(ctx, "list the checkpoints", func() error {
		all = nil
		rows, err := s.pool.Query(ctx, `SELECT n.name, coalesce(c.log, ''), coalesce(c.epoch, 0), coalesce(c.position, 0), coalesce(l.owner, ''), coalesce(l.epoch, 0), l.until,
				coalesce(l.held AND (l.until > clock_timestamp() OR l.until IS NULL AND EXISTS (SELECT FROM `+s.schema+`.members m WHERE m.id = l.member AND m.until > clock_timestamp())), false)
			FROM (SELECT name FROM `+s.schema+`.checkpoints UNION SELECT name FROM `+s.schema+`.leases) n
			LEFT JOIN `+s.schema+`.checkpoints c ON c.name = n.name LEFT JOIN `+s.schema+`.leases l ON l.name = n.name ORDER BY n.name COLLATE "C"`)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var one projection.NamedCheckpoint
			var checkpointEpoch, position, leaseEpoch int64
			var until *time.Time
			if err := rows.Scan(&one.Name, &one.Checkpoint.Log, &checkpointEpoch, &position, &one.Lease.Owner, &leaseEpoch, &until, &one.Held); err != nil {
				return err
			}
			one.Checkpoint.Epoch, one.Checkpoint.Position = uint64(checkpointEpoch), eventstore.Position(position)
			if leaseEpoch > 0 {
				one.Lease.Name, one.Lease.Epoch = one.Name, uint64(leaseEpoch)
				if until != nil {
					one.Lease.Until = until.UTC()
				}
			}
			all = append(all, one)
		}
		return rows.Err()
	})
	return all, err
}
