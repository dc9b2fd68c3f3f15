package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
)

// facts are what has to be known of a server before it is trusted with a log.
type facts struct {
	version           int
	standby           bool
	encoding          string
	synchronousCommit string
	fsync             string
}

func (f *facts) read(ctx context.Context, conn *pgx.Conn) error {
	err := conn.QueryRow(ctx, `SELECT current_setting('server_version_num')::int, pg_is_in_recovery(),
		current_setting('server_encoding'), current_setting('synchronous_commit'), current_setting('fsync')`).
		Scan(&f.version, &f.standby, &f.encoding, &f.synchronousCommit, &f.fsync)
	return unavailable("ask the server for its settings", err)
}

const oldestServer = 140000

func (f *facts) check() error {
	switch {
	case f.standby:
		return fmt.Errorf("%w: the server is a read replica, which cannot be written: connect to the primary (target_session_attrs=read-write)", eventstore.ErrInvalid)
	case f.version < oldestServer:
		return fmt.Errorf("%w: the server's version is %d, at least %d is needed", eventstore.ErrInvalid, f.version/10000, oldestServer/10000)
	case f.encoding != "UTF8":
		return fmt.Errorf("%w: the database's encoding is %s: create it with ENCODING 'UTF8'", eventstore.ErrInvalid, f.encoding)
	}
	return nil
}

// commitMode returns the synchronous_commit to ask for; "" to leave it.
func (f *facts) commitMode(wanted string) string {
	if wanted == "" && f.synchronousCommit == "off" {
		return "on"
	}
	return wanted
}

// Durability says in a few words what an acknowledged append survives, as the
// server is set up now: for people, and for reports of measurements.
func (s *Store) Durability(ctx context.Context) (string, error) {
	var f facts
	conn, err := s.logs.Acquire(ctx)
	if err != nil {
		return "", unavailable("connect", err)
	}
	defer conn.Release()
	if err := f.read(ctx, conn.Conn()); err != nil {
		return "", err
	}
	if s.commitMode != "" {
		f.synchronousCommit = s.commitMode // as appends ask for it, wherever this session stands
	}
	text := "fsync=" + f.fsync + ", synchronous_commit=" + f.synchronousCommit
	if f.fsync != "on" || f.synchronousCommit == "off" {
		text = "not durable: " + text
	}
	return text, nil
}
