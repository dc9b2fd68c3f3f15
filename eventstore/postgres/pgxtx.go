package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Transaction returns the pgx transaction that an SQL projection's handler
// works in, for what [projection.Tx] has no words for: COPY, batches, arrays,
// types of PostgreSQL. False says that the projection runs on another backend, or is inline: an append's
// transaction is not lent out.
//
// It belongs to the projection: it cannot be committed or rolled back, and must
// not be used after the handler has returned. A statement that fails in it
// aborts the whole transaction (unless it ran in a savepoint, which Begin makes):
// return the error.
func Transaction(tx projection.Tx) (pgx.Tx, bool) {
	for tx != nil {
		if t, ok := tx.(*stateTx); ok {
			t.saved = false
			return lentTx{t.tx}, true
		}
		wrapper, ok := tx.(interface{ Unwrap() projection.Tx })
		if !ok {
			break
		}
		tx = wrapper.Unwrap()
	}
	return nil, false
}

// lentTx is a transaction that somebody else ends.
type lentTx struct{ pgx.Tx }

var errLent = fmt.Errorf("%w: the transaction belongs to the projection, which ends it: return nil to commit, an error to roll back", eventstore.ErrInvalid)

// Commit refuses.
func (lentTx) Commit(context.Context) error { return errLent }

// Rollback refuses.
func (lentTx) Rollback(context.Context) error { return errLent }
