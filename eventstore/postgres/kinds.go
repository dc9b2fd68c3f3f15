package postgres

import (
	"context"
	"fmt"
	"maps"

	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
)

// kind is an event type within a category.
type kind struct{ category, eventType string }

// kinds are those of the log. Once shared it is not changed. They are made
// before the first event that has them, so whoever reads an event finds its
// kind in the database.
type kinds struct {
	byID map[int32]kind
	id   map[kind]int32
}

// readKinds reads all kinds.
func (s *Store) readKinds(ctx context.Context, conn *pgx.Conn) (*kinds, error) {
	rows, err := conn.Query(ctx, "SELECT id, category, type FROM "+s.schema+".kinds")
	if err != nil {
		return nil, unavailable("read the kinds of events", err)
	}
	defer rows.Close()
	known := &kinds{byID: map[int32]kind{}, id: map[kind]int32{}}
	for rows.Next() {
		var id int32
		var name kind
		if err := rows.Scan(&id, &name.category, &name.eventType); err != nil {
			return nil, unavailable("read the kinds of events", err)
		}
		known.byID[id], known.id[name] = name, id
	}
	return known, unavailable("read the kinds of events", rows.Err())
}

// learn publishes kinds that were read from the database.
func (s *Store) learn(ctx context.Context, conn *pgx.Conn) error {
	before := s.kinds.Load()
	read, err := s.readKinds(ctx, conn)
	if err != nil {
		return err
	}
	for id, name := range before.byID {
		if read.byID[id] != name {
			return fmt.Errorf("%w: the kind of events %d, %q of category %q, is not what it was: %w", eventstore.ErrGap, id, name.eventType, name.category, errRestored)
		}
	}
	for {
		known := s.kinds.Load()
		merged := &kinds{byID: maps.Clone(known.byID), id: maps.Clone(known.id)}
		maps.Copy(merged.byID, read.byID)
		maps.Copy(merged.id, read.id)
		if s.kinds.CompareAndSwap(known, merged) {
			return nil
		}
	}
}

// makeKinds makes the kinds that are not known, in a transaction of their own:
// one that no event will have does no harm.
func (s *Store) makeKinds(ctx context.Context, conn *pgx.Conn, missing map[kind]bool) error {
	if len(missing) == 0 {
		return nil
	}
	var categories, types []string
	for name := range missing {
		categories, types = append(categories, name.category), append(types, name.eventType)
	}
	// Those that are there already would use up numbers if they were inserted.
	_, err := conn.Exec(ctx, `INSERT INTO `+s.schema+`.kinds (category, type)
		SELECT n.category, n.type FROM unnest($1::text[], $2::text[]) AS n (category, type)
		WHERE NOT EXISTS (SELECT FROM `+s.schema+`.kinds k WHERE k.category = n.category AND k.type = n.type)
		ORDER BY n.category, n.type ON CONFLICT DO NOTHING`, categories, types)
	if err != nil {
		return err
	}
	return s.learn(ctx, conn)
}
